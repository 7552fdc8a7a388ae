"""What a user of fastai does with a Learner, with network and loss: search, save, export, freeze, resume, predict."""

import copy
import pickle
import random
import subprocess
import sys
import warnings

import fastai.callback.fp16
import matplotlib
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastcore.basics import noop
from PIL import Image
from torch import nn

from dml_nb.data.loaders import TensorSet, eval_loader, set_epoch, train_loader
from dml_nb.data.samplers import ClassSampler
from dml_nb.losses import create_loss
from dml_nb.models import create_embedder
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.training.checkpoint import Checkpoint, resume
from dml_nb.training.learner import dml_learner, feature_dls, image_dls

matplotlib.use("Agg")
pytestmark = pytest.mark.filterwarnings("ignore:the training has", "ignore:the backbone is frozen")

C, D = 6, 8
LOSSES = dict(
    proxy_anchor={},
    cp_proxy_anchor=dict(start_epoch=2),
    xbm=dict(start_iteration=2),
    mcl={},
    triplet={},
)


def features():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(2 * C).repeat_interleave(8)
    x = torch.randn(2 * C, 16, generator=generator)[y] + 0.8 * torch.randn(len(y), 16, generator=generator)
    return x[y < C], y[y < C], x[y >= C], y[y >= C] - C


def without_output(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def new_learner(loss="proxy_anchor", model=None, batch_size=12, folder=None, **options):
    "Random features of six classes of eight, four batches an epoch."
    torch.manual_seed(0)
    params = options.pop("params", LOSSES.get(loss, {}))
    model = EmbeddingHead(16, D) if model is None else model
    loss = create_loss(loss, num_classes=C, embedding_size=D, **params)
    options = dict(lr=1e-2, proxy_lr_mult=1.0, warm_epochs=0) | options
    learn = without_output(dml_learner(feature_dls(*features(), batch_size), model, loss, **options))
    if folder is not None:
        learn.path = folder
    return learn


@pytest.fixture
def photos(draw_photos):
    "Eight classes of three small pictures; the first class has one."
    return draw_photos(in_first_class=1)


def photo_learner(photos, **options):
    torch.manual_seed(0)
    model = create_embedder("small_cnn", D, pretrained=False)
    loss = create_loss("proxy_anchor", num_classes=len(photos.train.classes), embedding_size=D)
    return without_output(dml_learner(image_dls(photos, model.spec, 4), model, loss, lr=1e-3, **options))


def state(learn):
    "A copy of every parameter and buffer of network and loss."
    parts = (learn.model, learn.loss_func)
    return [value.detach().clone() for part in parts for value in part.state_dict().values()]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


# search


@pytest.mark.parametrize(
    "loss, trained", [*((loss, False) for loss in LOSSES), ("cp_proxy_anchor", True), ("xbm", True)]
)
def test_lr_find_suggests_a_rate_and_leaves_network_and_loss(loss, trained, tmp_path):
    learn = new_learner(loss, folder=tmp_path)
    if trained:
        learn.fit(3)
    before, history = state(learn), list(learn.retrieval_metrics.history)
    (rate,) = learn.lr_find(show_plot=False, num_it=40)
    assert 1e-7 < rate < 10
    assert same(state(learn), before) and learn.retrieval_metrics.history == history


def test_lr_find_survives_a_network_that_overflows(tmp_path):
    class Overflow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, D)

        def forward(self, x):
            return self.linear(x).exp().square().exp()

    learn = new_learner(model=Overflow(), folder=tmp_path)
    nn.init.normal_(learn.model.linear.weight, std=1e-3)
    before = state(learn)
    learn.lr_find(show_plot=False, stop_div=False, suggest_funcs=None)
    assert same(state(learn), before) and len(learn.recorder.losses) < 100


def test_lr_find_of_a_resumed_run_does_not_move_its_first_epoch(tmp_path):
    learn = new_learner(folder=tmp_path)
    learn.first_epoch = 2
    learn.lr_find(show_plot=False)
    assert learn.first_epoch == 2


# files


@pytest.mark.parametrize("loss", ["proxy_anchor", "cp_proxy_anchor", "xbm"])
def test_saving_and_loading_keeps_proxies_and_memory(loss, tmp_path):
    learn, other = new_learner(loss, folder=tmp_path), new_learner(loss, folder=tmp_path)
    learn.fit(3)
    learn.save("stage1")
    assert not same(state(learn), state(other))
    other.load("stage1")
    assert same(state(learn), state(other))
    for each in (learn, other):
        each.fit(4)  # the moments of the optimiser are loaded too
    assert same(state(learn), state(other))


@pytest.mark.parametrize("loss", LOSSES)
def test_an_exported_learner_gives_the_same_embeddings_and_keeps_its_loss(loss, tmp_path):
    learn = new_learner(loss, folder=tmp_path)
    learn.fit(3)
    learn.export("learner.pkl")
    embeddings, x = learn.get_preds()[0], features()[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_learner(tmp_path / "learner.pkl")
    assert same(state(learn), state(loaded))
    assert torch.allclose(loaded.get_preds(dl=loaded.dls.test_dl(x))[0], embeddings, atol=1e-6)
    assert torch.allclose(loaded.predict(x[5]), embeddings[5], atol=1e-6)
    loaded.dls = learn.dls  # with data, it can be trained further
    for each in (learn, loaded):
        each.fit(3, reset_opt=True)
    assert same(state(learn), state(loaded))


def test_an_exported_learner_reads_image_files(photos, tmp_path):
    learn = photo_learner(photos)
    learn.path = tmp_path
    learn.export("learner.pkl")
    embeddings, labels = learn.get_preds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_learner(tmp_path / "learner.pkl")
    file = photos.test.paths[4]
    for item in (file, str(file), Image.open(file), np.asarray(Image.open(file))):
        assert torch.allclose(loaded.predict(item), embeddings[4], atol=1e-6)
    found = loaded.get_preds(dl=loaded.dls.test_dl(photos.test.paths))[0]
    assert torch.allclose(found, embeddings, atol=1e-6) and labels.equal(photos.test.labels)
    assert (tmp_path / "learner.pkl").stat().st_size < 8e6  # without images


@pytest.mark.parametrize("how", [copy.deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))])
def test_a_copied_learner_trains_as_the_original(how, tmp_path):
    learn = new_learner("cp_proxy_anchor", folder=tmp_path)
    learn.fit(3)
    other = how(learn)
    for each in (learn, other):
        each.fit(4)
    assert same(state(learn), state(other))


# learning rates and gradients


@pytest.mark.parametrize(
    "how", ["fit", "fit_one_cycle", "fit_flat_cos", "fit_schedule", "fine_tune", lambda learn: learn.fit_sgdr(2, 1)]
)
def test_every_way_of_training_uses_the_rates_of_dml_learner(how):
    class Highest(Callback):
        def before_step(self):
            rates = [hyper["lr"] for hyper in self.opt.hypers]
            self.learn.highest_rates = np.maximum(getattr(self.learn, "highest_rates", 0), rates)

    learn = new_learner(lr=1e-5, head_lr=2e-5, proxy_lr_mult=100, cbs=[Highest()])
    how(learn) if callable(how) else getattr(learn, how)(3)
    assert learn.rates == pytest.approx(dict(head=2e-5, loss=1e-3))
    assert learn.highest_rates.tolist() == pytest.approx(list(learn.rates.values()), rel=0.02)


class SeeGradient(Callback):
    "The gradient of the first step, as the optimiser gets it."

    order = 90

    def before_step(self):
        if not hasattr(self.learn, "seen"):
            self.learn.seen = torch.cat([p.grad.flatten().clone() for p, *_ in self.opt.all_params()])


def first_gradient(clip_value, batch_size=12, cbs=(), half=False):
    learn = new_learner(clip_value=clip_value, batch_size=batch_size, cbs=[SeeGradient(), *cbs])
    if half:
        learn.to_fp16()
    learn.fit(1)
    return learn.seen


@pytest.mark.parametrize("clip_value", [10.0, 0.1])
def test_half_precision_clips_the_true_gradient(clip_value, monkeypatch):
    on_cpu = lambda device, **kwargs: torch.amp.GradScaler("cpu", **kwargs)  # noqa: E731
    monkeypatch.setattr(fastai.callback.fp16, "GradScaler", on_cpu)
    full, half = first_gradient(clip_value), first_gradient(clip_value, half=True)
    assert torch.allclose(full, half, atol=1e-5) and full.abs().max() <= clip_value
    assert full.abs().max() > 0.09


def test_accumulated_gradients_are_clipped_once():
    parts = dict(batch_size=6, cbs=[GradientAccumulation(12)])
    whole = first_gradient(None, **parts)
    assert whole.abs().max() > 0.1
    assert torch.allclose(first_gradient(0.1, **parts), whole.clamp(-0.1, 0.1))


# embeddings and metrics


@pytest.mark.parametrize("loss", LOSSES)
def test_validate_gives_retrieval_metrics_before_and_after_training(loss):
    learn = new_learner(loss)
    untrained = learn.validate()
    learn.fit(3)
    names = learn.recorder.metric_names[1:-1]
    assert len(untrained) == len(learn.validate()) == len(names) - 1
    last = learn.retrieval_metrics.history[-1]
    assert dict(zip(names[1:], learn.validate()))["R@1"] == last["R@1"] != untrained[1]


@pytest.mark.parametrize("loss", LOSSES)
def test_looking_at_a_learner_changes_nothing(loss):
    learn = new_learner(loss)
    learn.fit(3)
    before, history = state(learn), list(learn.retrieval_metrics.history)
    numbers, losses = torch.get_rng_state(), list(learn.recorder.losses)
    for look in (
        learn.validate,
        learn.get_preds,
        lambda: learn.get_preds(ds_idx=0),
        lambda: learn.predict(features()[0][0]),
        learn.summary,
        learn.show_results,
        learn.dls.show_batch,
        learn.recorder.plot_loss,
    ):
        look()
        assert same(state(learn), before) and learn.retrieval_metrics.history == history
        assert torch.equal(torch.get_rng_state(), numbers) and learn.recorder.losses == losses


def test_get_preds_embeds_test_and_training_images_in_order(photos):
    learn = photo_learner(photos)
    learn.fit(1)
    learn.model.eval()
    for ds_idx, plain in enumerate((learn.dls.train_plain, learn.dls.test_plain)):
        embeddings, labels = learn.get_preds(ds_idx=ds_idx)
        with torch.no_grad():
            expected = learn.model(torch.cat([x for (x,) in eval_loader(plain)]))
        assert torch.allclose(embeddings, expected, atol=1e-6) and labels.equal(plain.labels)
    assert torch.equal(learn.get_preds(dl=learn.dls.train)[0], learn.get_preds(0)[0])
    assert torch.equal(learn.get_preds(dl=learn.dls.valid)[0], learn.get_preds()[0])
    assert learn.get_preds(dl=learn.dls.test_dl(photos.test))[1].equal(photos.test.labels)
    x, embeddings, labels = learn.get_preds(with_input=True)
    assert x.shape == (len(labels), 1, 32, 32)


def test_pictures_and_summary_of_a_learner_on_images(photos):
    learn = photo_learner(photos)
    assert "Parameters of the loss: " in learn.summary() and "Conv2d" in learn.summary()
    learn.dls.show_batch()
    learn.dls.valid.show_batch(max_n=2)
    assert len(learn.show_results(max_n=2).axes) == 12


@pytest.mark.parametrize("kind", [np.float16, np.float64, ">f4", np.longdouble, "half", "reversed"])
def test_training_on_features_of_any_precision(kind):
    x, y, *_ = features()
    other = dict(half=x.half(), reversed=x.numpy()[::-1])
    given = other[kind] if kind in other else x.numpy().astype(kind)
    dls = feature_dls(given, y.numpy().astype(np.uint16), given, y)
    learn = dml_learner(dls, EmbeddingHead(16, D), create_loss("proxy_anchor", num_classes=C, embedding_size=D))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert learn.predict(given[0]).shape == (D,)


# freezing


def moved(learn, before):
    "Which parts have changed: backbone, head, loss."
    after = dict(learn.model.named_parameters()) | {f"loss.{k}": v for k, v in learn.loss_func.named_parameters()}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    return [any(name.startswith(part) for name in changed) for part in ("backbone", "head", "loss")]


def parameters(learn):
    both = dict(learn.model.named_parameters()) | {f"loss.{k}": v for k, v in learn.loss_func.named_parameters()}
    return {name: value.detach().clone() for name, value in both.items()}


def test_freeze_leaves_head_and_loss_and_unfreeze_trains_everything(photos):
    learn = photo_learner(photos)
    for action, expected in ((learn.freeze, [False, True, True]), (learn.unfreeze, [True, True, True])):
        action()
        for how in (learn.fit, learn.fit_schedule):
            before = parameters(learn)
            how(1)
            assert moved(learn, before) == expected
    before = parameters(learn)
    learn.fine_tune(1)
    assert moved(learn, before) == [True, True, True]


def test_parameters_that_a_user_has_fixed_stay_fixed_after_warm_epochs(photos):
    learn = photo_learner(photos, warm_epochs=1)
    fixed = next(learn.model.backbone.parameters()).requires_grad_(False)
    before = fixed.clone()
    learn.fit(2)
    assert torch.equal(fixed, before) and not fixed.requires_grad
    assert all(p.requires_grad for p in learn.model.parameters() if p is not fixed)


def test_a_head_without_backbone_is_not_frozen():
    learn = new_learner()
    learn.freeze()
    before = state(learn)
    learn.fit(1)
    assert not any(torch.equal(a, b) for a, b in zip(state(learn)[:2], before))


# too little data or training


def test_too_few_steps_are_named():
    with pytest.warns(UserWarning, match=r"the training has 8 steps in all \(2 epochs of 4\)"):
        new_learner().fit(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new_learner().fit(13)


def test_a_backbone_that_stays_frozen_is_named(photos):
    with pytest.warns(UserWarning, match="the backbone is frozen in all 1 epochs, because warm_epochs is 1"):
        photo_learner(photos).fit(1)


def test_a_batch_larger_than_the_training_set_is_named():
    with pytest.warns(UserWarning, match="batch_size 150 is larger than the training set of 48 images.*batch_size=16"):
        feature_dls(*features(), batch_size=150)
    with pytest.warns(UserWarning, match="1 of 2 classes have fewer than 4 images"):
        ClassSampler([0, 0, 0, 0, 1], 8, 4)


def test_default_batches_follow_the_size_of_the_data():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(feature_dls(*features()).train) == 3
        assert len(feature_dls(*features(), per_class=5).one_batch()[0]) == 15
    x = torch.zeros(3000, 2)
    assert len(feature_dls(x, torch.arange(3000), x, torch.arange(3000)).one_batch()[0]) == 150


# interruptions


class InterruptAt(Callback):
    order = 80

    def __init__(self, epoch, error=KeyboardInterrupt):
        self.at, self.error = epoch, error

    def after_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1:
            raise self.error


@pytest.mark.parametrize("how", ["fit", "fit_one_cycle", "fit_schedule"])
def test_an_interrupted_training_resumes_with_the_same_numbers(how, tmp_path, capsys):
    whole, broken, resumed = (new_learner("cp_proxy_anchor") for _ in range(3))
    getattr(whole, how)(5)
    with pytest.raises(KeyboardInterrupt):
        getattr(broken, how)(5, cbs=[Checkpoint(tmp_path), InterruptAt(3)])
    assert "interrupted in epoch 3 (epochs 0 to 4)" in capsys.readouterr().out
    assert resume(resumed, tmp_path / "checkpoint.pt", "") == 3
    assert "resumes after epoch 2" in capsys.readouterr().out
    getattr(resumed, how)(5, cbs=[Checkpoint(tmp_path)])
    assert same(state(whole), state(resumed))
    assert resume(resumed, tmp_path / "checkpoint.pt", "") == 5
    getattr(resumed, how)(5)
    assert "all 5 epochs are finished" in capsys.readouterr().out and same(state(whole), state(resumed))


def test_an_interruption_in_a_warm_epoch_leaves_nothing_frozen(photos):
    learn = photo_learner(photos)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[InterruptAt(0)])
    before = parameters(learn)
    learn.fit(2)
    assert moved(learn, before) == [True, True, True]


def test_a_stopped_training_ends_with_an_evaluation_and_a_checkpoint(tmp_path):
    learn = new_learner(lr=0.0, evaluate_every=4)
    learn.fit(12, cbs=[Checkpoint(tmp_path), EarlyStoppingCallback("train_loss", min_delta=10)])
    last = learn.retrieval_metrics.history[-1]
    assert last["epoch"] == 1 and "R@1" in last
    other = new_learner()
    resume(other, tmp_path / "checkpoint.pt", "")
    assert other.retrieval_metrics.history[-1] == last


def test_a_training_that_diverges_is_stopped_by_fastais_callback():
    learn = new_learner()
    learn.loss_func.proxies.data.fill_(float("nan"))
    learn.fit(3, cbs=[TerminateOnNaNCallback()])
    assert not any("R@1" in entry for entry in learn.retrieval_metrics.history)


# checkpoints


def test_one_flipped_bit_in_a_checkpoint_is_refused(tmp_path):
    learn = new_learner("cp_proxy_anchor")
    learn.fit(3, cbs=[Checkpoint(tmp_path, "run")])
    file = tmp_path / "checkpoint.pt"
    content = file.read_bytes()
    (tmp_path / "checkpoint.previous.pt").unlink()  # it would be used instead
    draw = random.Random(0)
    for bit in [0, 7, 8 * len(content) - 1, *(draw.randrange(8 * len(content)) for _ in range(100))]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        before = state(learn)
        with pytest.raises(ValueError, match="is damaged: delete it"):
            resume(learn, file, "run")
        assert same(state(learn), before)
    file.write_bytes(content)
    assert resume(learn, file, "run") == 3


def test_a_file_that_is_no_checkpoint_of_this_run_is_refused(tmp_path):
    new_learner().fit(1, cbs=[Checkpoint(tmp_path, "other")])
    with pytest.raises(ValueError, match="belongs to the run other, not to run: delete it or choose another folder"):
        resume(new_learner(), tmp_path / "checkpoint.pt", "run")
    torch.save([1, 2], tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.previous.pt").unlink()
    with pytest.raises(ValueError, match="is damaged: delete it"):
        resume(new_learner(), tmp_path / "checkpoint.pt", "run")


# images that are drawn twice


def test_an_image_that_is_drawn_twice_is_cropped_twice(photos):
    spec = create_embedder("small_cnn", D, pretrained=False).spec
    with pytest.warns(UserWarning, match="have fewer than 2 images"):
        dls = image_dls(photos, spec, 4, per_class=2)
        other = image_dls(photos, spec, 4, per_class=2, workers=2)
    pictures, drawn = [], []
    for epoch in range(3):
        for each in (dls, other):
            set_epoch(each.train, epoch)
        ids = list(dls.train.sampler)
        batches = [x for x, _ in dls.train]
        assert all(torch.equal(a, b) for a, (b, _) in zip(batches, other.train))
        pictures += list(torch.cat(batches))
        drawn += sum(ids, [])
    repeated = sum(len(batch) - len(set(batch)) for batch in ids)
    assert repeated or len(drawn) > len(set(drawn))
    for a in range(len(drawn)):
        for b in range(a):
            assert drawn[a] != drawn[b] or not torch.equal(pictures[a], pictures[b])


def test_two_batches_in_memory_that_begin_with_the_same_image_are_augmented_differently():
    images = TensorSet(torch.zeros(4, 3), range(4), lambda x: x + torch.rand(len(x), 3))
    (first, _), (again, _), (other, _) = train_loader(images, 2, sampler=[[0, 0], [0, 0], [1, 0]])
    rows = torch.cat([first, again, other])
    assert len(rows.unique(dim=0)) == 6


SCRIPT = """
import sys, multiprocessing, torch
from dml_nb.data.folders import load_folder
from dml_nb.data.loaders import train_loader
from dml_nb.models.input_spec import IMAGENET, image_transform

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    images = load_folder(sys.argv[1]).train.with_transform(image_transform(IMAGENET.resized(32), train=True))
    batches = [[x for x, _ in train_loader(images, 4, workers=workers)] for workers in (0, 1)]
    assert len(batches[0]) > 1 and all(torch.equal(a, b) for a, b in zip(*batches))
    print("equal")
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_worker_processes_of_any_start_method_give_the_same_batches(method, photos, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", tmp_path / "script.py", tmp_path / "photos", method]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert done.stdout == "equal\n", done.stderr[-2000:]
