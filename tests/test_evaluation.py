"`RetrievalMetrics` among fastai's own callbacks and methods: whoever watches a metric sees evaluations only."

import matplotlib
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.callback.schedule import LRFinder  # noqa: F401  (its module adds `lr_find` to the Learner)
from fastai.callback.tracker import (
    EarlyStoppingCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    TerminateOnNaNCallback,
)
from fastai.data.core import DataLoaders
from fastai.learner import Learner

from dml_nb.data.loaders import TensorSet, eval_loader, train_loader
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.training.evaluation import RetrievalMetrics

matplotlib.use("Agg")


def make_learner(path, every=1, recall_at=(1,), test_images=60, cbs=()):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) // 6
    x = torch.randn(10, 16, generator=g)[y] + torch.randn(60, 16, generator=g)
    torch.manual_seed(0)
    test, test_labels = TensorSet(x[:test_images]), y[:test_images]
    dls = DataLoaders(train_loader(TensorSet(x, y), batch_size=20), eval_loader(test) if test_images else [])
    dls.n_inp, dls.workers, dls.test_plain, dls.test_labels = 1, 0, test, test_labels
    head = EmbeddingHead(16, 8)

    def loss(embeddings, labels):
        return (embeddings.sum(1) - labels.float()).square().mean()

    learn = Learner(dls, head, loss_func=loss, cbs=[RetrievalMetrics(recall_at, every), *cbs], path=path)
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == "ProgressCallback"])
    learn.logger = lambda log: None
    return learn


def evaluated(learn):
    return [entry["epoch"] for entry in learn.retrieval_metrics.history if "MAP@R" in entry]


class StopAfter(Callback):
    "Stop in an epoch, after it or in the middle of it."

    def __init__(self, epoch, batch=None):
        self.last, self.batch = epoch, batch

    def after_batch(self):
        if self.training and self.batch == self.iter and self.epoch == self.last:
            raise CancelFitException

    def after_epoch(self):
        if self.batch is None and self.epoch == self.last:
            raise CancelFitException


@pytest.mark.parametrize("monitor", ["R@1", "MAP@R", "valid_loss"])
def test_early_stopping_counts_evaluations_only(tmp_path, monitor):
    learn = make_learner(tmp_path, every=3)
    learn.fit(20, lr=0.0, cbs=EarlyStoppingCallback(monitor, patience=2))
    assert evaluated(learn) == [0, 3, 6] and learn.retrieval_metrics.history[-1]["epoch"] == 6


def test_the_rate_is_reduced_by_evaluations_only(tmp_path):
    learn = make_learner(tmp_path, every=3)
    learn.fit(8, lr=1e-30, cbs=ReduceLROnPlateau("R@1", patience=1, factor=10))
    assert learn.opt.hypers[-1]["lr"] == pytest.approx(1e-33)  # after the epochs 3, 6 and 7


@pytest.mark.parametrize("batch", [None, 1])
def test_a_stopped_run_ends_with_an_evaluation(tmp_path, batch):
    learn = make_learner(tmp_path, every=5, cbs=[StopAfter(2, batch)])
    learn.fit(20, lr=1e-3)
    assert evaluated(learn) == [0, 2] and [entry["epoch"] for entry in learn.retrieval_metrics.history] == [0, 1, 2]
    last = learn.retrieval_metrics.history[-1]
    assert learn.recorder.values[-1][1] == 1 - last["R@1"] == learn.final_record[1]
    assert len(learn.recorder.values) == len(learn.recorder.iters) == 3
    assert learn.validate()[0] == 1 - last["R@1"]


def test_early_stopping_of_the_training_loss_runs_every_epoch_and_ends_with_an_evaluation(tmp_path):
    learn = make_learner(tmp_path, every=10)
    learn.fit(20, lr=0.0, cbs=EarlyStoppingCallback("train_loss", comp=lambda a, b: False, patience=3))
    assert evaluated(learn) == [0, 2]


def test_a_network_that_diverged_stops_without_another_error(tmp_path):
    learn = make_learner(tmp_path, every=2)
    learn.fit(9, lr=1e30, cbs=TerminateOnNaNCallback())
    assert len(learn.retrieval_metrics.history) < 9


@pytest.mark.parametrize("every", [1, 2])
def test_saving_the_best_without_naming_a_metric_saves_the_best_recall(tmp_path, every):
    learn = make_learner(tmp_path, every=every)
    saver = SaveModelCallback()
    learn.fit(5, lr=3e-2, cbs=saver)
    assert saver.best == pytest.approx(1 - learn.retrieval_metrics.best["R@1"])
    assert learn.validate()[0] == pytest.approx(saver.best)  # the best network is loaded at the end


def test_evaluating_does_not_wake_the_callbacks_that_watch_the_training(tmp_path):
    learn = make_learner(tmp_path, cbs=[SaveModelCallback("R@1"), EarlyStoppingCallback("train_loss", patience=9)])
    learn.fit(2, lr=1e-3)
    with torch.no_grad():
        for weight in learn.model.parameters():
            weight.normal_()
    changed = [weight.clone() for weight in learn.model.parameters()]
    learn.validate()
    learn.get_preds(dl=learn.dls.valid)
    assert all(map(torch.equal, changed, learn.model.parameters()))  # the saved network is not loaded
    learn.fit(1, lr=1e-3)


def test_saving_every_epoch_saves_every_epoch(tmp_path):
    learn = make_learner(tmp_path, every=3)
    learn.fit(4, lr=1e-3, cbs=SaveModelCallback(every_epoch=True))
    assert len(list((tmp_path / "models").glob("model_*.pth"))) == 4


def test_a_callback_that_saves_runs_again_after_a_training_that_failed(tmp_path):
    learn, saver = make_learner(tmp_path, every=4), SaveModelCallback()
    learn.add_cb(saver)

    class Fail(Callback):
        def after_batch(self):
            if self.training and self.epoch == 1:
                raise OSError("disk")

    with pytest.raises(OSError):
        learn.fit(3, lr=1e-3, cbs=Fail())
    learn.fit(2, lr=1e-3)
    assert (tmp_path / "models" / "model.pth").exists() and saver.best < 1


@pytest.mark.parametrize("every", [1, 2])
def test_the_curves_of_the_losses_are_drawn(tmp_path, every):
    learn = make_learner(tmp_path, every=every)
    learn.fit(5, lr=1e-3)
    matplotlib.pyplot.figure()
    lines = learn.recorder.plot_loss(skip_start=0).lines
    valid = lines[1].get_ydata()
    assert len(valid) == 5 and all(0 <= v <= 1 for v in valid)
    assert len(learn.retrieval_metrics.history) == 5 and len(evaluated(learn)) == (5 if every == 1 else 3)


def test_validating_before_and_after_training_gives_the_metrics(tmp_path):
    learn = make_learner(tmp_path, recall_at=(2, 4))
    names = ["valid_loss", *learn.retrieval_metrics.metric_names]
    before = dict(zip(names, learn.validate(), strict=True))
    assert before["valid_loss"] == pytest.approx(1 - before["R@2"]) and not learn.retrieval_metrics.history
    assert learn.retrieval_metrics.best == {}
    learn.fit(2, lr=1e-3)
    after = dict(zip(names, learn.validate(), strict=True))
    last = learn.retrieval_metrics.history[-1]
    assert {name: last[name] for name in names[1:]} == {name: after[name] for name in names[1:]} != before
    assert len(learn.retrieval_metrics.history) == 2
    with pytest.raises(ValueError, match=r"of dls.valid only.*get_preds"):
        learn.validate(ds_idx=0)


def test_the_best_epoch_is_that_of_the_first_depth(tmp_path):
    learn = make_learner(tmp_path, recall_at=[4, 2])
    learn.fit(4, lr=3e-2)
    history = learn.retrieval_metrics.history
    assert learn.retrieval_metrics.best["R@4"] == max(entry["R@4"] for entry in history)


def test_predictions_summaries_and_the_rate_finder_leave_no_trace(tmp_path):
    learn = make_learner(tmp_path)
    learn.lr_find(num_it=7, show_plot=False)
    learn.fit(2, lr=1e-3)
    history, z = list(learn.retrieval_metrics.history), learn.retrieval_metrics.embeddings.clone()
    values = list(learn.recorder.values)
    learn.lr_find(num_it=7, show_plot=False)
    with learn as inner:  # as `summary` does
        inner.get_preds(dl=[next(iter(learn.dls.valid))], inner=True, reorder=False)
    predictions, _ = learn.get_preds(dl=learn.dls.valid)
    learn.get_preds(dl=learn.dls.valid, inner=True)
    assert learn.retrieval_metrics.history == history and torch.equal(z, learn.retrieval_metrics.embeddings)
    assert torch.allclose(predictions, z) and len(values) == 2


def test_predictions_inside_training_do_not_disturb_it(tmp_path):
    class Predict(Callback):
        order = 70

        def after_epoch(self):
            self.learn.get_preds(dl=self.dls.valid, inner=True)

    learn = make_learner(tmp_path, every=2, cbs=[Predict()])
    learn.fit(4, lr=1e-3)
    assert evaluated(learn) == [0, 2, 3] and len(learn.retrieval_metrics.history) == 4


def test_training_without_test_images(tmp_path):
    learn = make_learner(tmp_path, test_images=0)
    learn.fit(2, lr=1e-3, cbs=[SaveModelCallback(), EarlyStoppingCallback()])
    assert [entry["epoch"] for entry in learn.retrieval_metrics.history] == [0, 1]
    assert evaluated(learn) == [] and learn.retrieval_metrics.best == {} and list(learn.validate()) == []


def test_missing_or_wrong_labels_are_refused_before_they_mislead(tmp_path):
    learn = make_learner(tmp_path)
    learn.dls.test_labels = learn.dls.test_labels[:50]
    with pytest.raises(ValueError, match="dls.valid gives 60 images, but dls.test_labels has 50 labels"):
        learn.validate()
    del learn.dls.test_labels
    with pytest.raises(ValueError, match="need dls.test_labels"):
        learn.fit(1)
    assert not learn.recorder.losses
    for _ in range(2):  # fastai holds a lock while it validates, which an error must give back
        with pytest.raises(ValueError, match="need dls.test_labels"):
            learn.validate()


def test_a_validation_that_another_callback_cut_short_is_not_evaluated(tmp_path):
    class Skip(Callback):
        order = 0

        def before_validate(self):
            if self.epoch == 1:
                raise CancelValidException

    class CutShort(Callback):
        def after_batch(self):
            if not self.training and self.epoch == 2:
                raise CancelValidException

    learn = make_learner(tmp_path, cbs=[Skip(), CutShort()])
    learn.fit(4, lr=1e-3)
    assert evaluated(learn) == [0, 3]
