"""Precision, switches, and waiting for values of the device: what a training step does beside its formulas."""

import traceback
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from test_checkpoint import silent
from test_no_read_back import WAITS, values_decide_size, watch_copies
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dml_nb.data import load_dataset
from dml_nb.experiments.recipes import settings_for
from dml_nb.experiments.results import changes_from_recipe
from dml_nb.experiments.run import Run
from dml_nb.experiments.tables import find_rows
from dml_nb.losses import create_loss
from dml_nb.models import create_embedder
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.training import callbacks, learner
from dml_nb.training.checkpoint import Checkpoint, resume
from dml_nb.training.evaluation import whole_classes
from dml_nb.training.learner import dml_learner, feature_dls, image_dls
from dml_nb.training.precision import precision_of, prepare_network

pytestmark = pytest.mark.filterwarnings("ignore:the training has", "ignore:the backbone is frozen")

LOSSES = dict(
    proxy_anchor={},
    cp_proxy_anchor=dict(start_epoch=1),
    xbm=dict(start_iteration=2),
    memvir=dict(steps=2, start_epoch=1),
)


def new_learner(loss="proxy_anchor", model=None, **options):
    "Random features of six classes of eight, four batches an epoch."
    torch.manual_seed(0)
    generator, y = torch.Generator().manual_seed(0), torch.arange(6).repeat_interleave(8)
    x = torch.randn(6, 16, generator=generator)[y] + 0.8 * torch.randn(48, 16, generator=generator)
    loss = create_loss(loss, num_classes=6, embedding_size=8, **LOSSES[loss])
    options = dict(lr=1e-2, proxy_lr_mult=1.0, warm_epochs=0) | options
    model = EmbeddingHead(16, 8) if model is None else model
    return silent(dml_learner(feature_dls(x, y, x, y, 12), model, loss, **options))


def weights(learn):
    parts = [*learn.model.state_dict().values(), *learn.loss_func.state_dict().values()]
    return torch.cat([part.double().flatten() for part in parts])


# waiting for values


class CountReads(TorchDispatchMode):
    "The operations outside losses and optimisers for which a program on a GPU would wait, each with its line."

    def __init__(self):
        super().__init__()
        self.places, self.active = [], False

    def note(self, what):
        files = [Path(frame.filename).as_posix() for frame in traceback.extract_stack()]
        of_others = any("dml_nb/losses/" in file or "torch/optim/" in file for file in files)
        if self.active and not of_others:
            self.places.append(f"{what}: {[Path(file).name for file in files[-8:]]}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in WAITS or values_decide_size(name, args):
            self.note(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counter(monkeypatch):
    "Counts `cpu`, `tolist` and `numpy` too, which bypass the dispatcher for a tensor on the CPU."
    counter = CountReads()
    watch_copies(monkeypatch, counter.note)
    with counter:
        yield counter


class StepBegins(Callback):
    "Count in all training steps but the first of an epoch, whose loss the progress bar shows."

    order, run_valid = -100, False

    def before_batch(self):
        self.learn.counter.active = self.iter > 0


class StepEnds(Callback):
    order, run_valid = 100, False

    def after_batch(self):
        self.learn.counter.active = False


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_callbacks_of_a_step_wait_for_no_value(loss, precision, counter, monkeypatch):
    def train():
        learn = new_learner(loss, precision=precision, cbs=[StepBegins(), StepEnds()])
        learn.counter, counter.places = counter, []
        learn.fit(3)
        return learn

    train()
    assert any("callbacks.py" in place for place in counter.places)  # on a CPU, each step is checked
    monkeypatch.setattr(callbacks, "steps_between_reads", lambda model: callbacks.READ_EVERY)  # as on a GPU
    assert len(train().recorder.losses) == 12
    assert counter.places == []


@pytest.mark.parametrize("every", [1, 3])
def test_the_progress_bar_shows_the_average_of_fastai(every, monkeypatch):
    class See(Callback):
        order = 60

        def after_batch(self):
            if self.training:
                self.learn.seen.append(self.smooth_loss.item())

    def shown(*cbs):
        learn = new_learner(cbs=[See()])
        learn.seen = []
        for callback in cbs:
            learn.remove_cb(callback)
        learn.fit(2)
        return learn.seen, torch.stack(learn.recorder.losses).tolist()

    of_fastai, _ = shown(callbacks.LogRarely)
    monkeypatch.setattr(callbacks, "steps_between_reads", lambda model: every)
    seen, recorded = shown()
    assert recorded == of_fastai  # the curve has every step
    steps = [0, 1, 2, 3, 4, 5, 6, 7] if every == 1 else [0, 0, 2, 2, 4, 4, 6, 6]
    assert seen == [of_fastai[step] for step in steps]


# precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_training_in_16_bits_reaches_what_one_in_float32_reaches(precision):
    full, half = (new_learner(precision=p) for p in ("float32", precision))
    for learn in (full, half):
        learn.fit(5)
    assert precision_of(half) == precision and weights(half).isfinite().all()
    assert half.retrieval_metrics.best["R@1"] >= full.retrieval_metrics.best["R@1"] - 0.1
    apart = (weights(full) - weights(half)).abs().mean()
    assert 0 < apart < (0.01 if precision == "bf16" else 0.2)  # fp16 leaves out its first steps to find its scale


class Failing(nn.Module):
    "A network that gives NaN in its third step."

    def __init__(self):
        super().__init__()
        self.head, self.steps = nn.Linear(16, 8), 0

    def forward(self, x):
        self.steps += 1
        return self.head(x) * (float("nan") if self.steps == 3 else 1)


def test_an_error_in_a_step_does_not_leave_autocast_on():
    with pytest.raises(FloatingPointError):
        new_learner(model=Failing(), precision="bf16").fit(1)
    assert not torch.is_autocast_enabled("cpu")
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_resumed_run_keeps_the_precision_that_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("dml_nb.training.precision.faster_precision", lambda seconds: "bf16")
    first = new_learner(precision="auto")
    first.fit(1, cbs=[Checkpoint(tmp_path)])
    monkeypatch.setattr("dml_nb.training.precision.faster_precision", lambda seconds: "float32")
    second = new_learner(precision="auto")
    resume(second, tmp_path / "checkpoint.pt", "")
    assert precision_of(second) == "bf16"
    second.fit(1)  # nothing is left to train
    assert precision_of(second) == "bf16"


def test_measuring_does_not_change_the_training(monkeypatch):
    monkeypatch.setattr("dml_nb.training.precision.faster_precision", lambda seconds: "float32")
    plain, measured = new_learner(), new_learner(precision="auto")
    for learn in (plain, measured):
        learn.fit(2)
    assert torch.equal(weights(plain), weights(measured))


# switches


def test_the_fused_optimiser_and_the_scale_of_fp16_work_together(monkeypatch):
    plain = new_learner(clip_value=0.1)
    monkeypatch.setattr(learner, "fused_option", lambda opt, device: dict(fused=True))  # as on a GPU
    fused, half = new_learner(clip_value=0.1), new_learner(clip_value=0.1, precision="fp16")
    for learn in (plain, fused, half):
        learn.fit(3)
    assert torch.allclose(weights(plain), weights(fused), atol=1e-6)
    assert weights(half).isfinite().all() and not torch.equal(weights(half), weights(new_learner()))


def test_deterministic_algorithms_change_no_number_on_a_cpu_and_end_with_the_training():
    plain, fixed = new_learner("cp_proxy_anchor"), new_learner("cp_proxy_anchor", deterministic=True)
    for learn in (plain, fixed):
        learn.fit(2)
    assert torch.equal(weights(plain), weights(fixed))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_compiled_network_keeps_its_names_and_its_files(tmp_path):
    with torch.compiler.set_stance("force_eager"):  # the compiler itself takes minutes here
        learn = new_learner(compile=True)
        learn.path = tmp_path
        learn.fit(1)
        learn.export()
    assert learn.model.state_dict().keys() == EmbeddingHead(16, 8).state_dict().keys()


def test_a_network_of_images_is_stored_channels_last_and_embeds_the_same():
    model = create_embedder("small_cnn", 8, pretrained=False).eval()
    x = torch.randn(4, 1, 28, 28)
    before = model(x)
    assert torch.allclose(prepare_network(model)(x), before, atol=1e-5)
    convolutions = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert convolutions and all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)


# the same numbers again


def test_one_seed_gives_the_same_weights_with_and_without_workers(draw_photos):
    photos, found = draw_photos(), []
    for workers in (0, 2):
        torch.manual_seed(0)
        model = create_embedder("small_cnn", 8, pretrained=False)
        loss = create_loss("cp_proxy_anchor", num_classes=len(photos.train.classes), embedding_size=8, start_epoch=1)
        learn = dml_learner(image_dls(photos, model.spec, 3, workers=workers), model, loss, warm_epochs=0)
        with learn.no_bar(), learn.no_logging():
            learn.fit(2)
        found.append(weights(learn))
    assert torch.equal(*found)


# deviation


def test_the_deviation_of_a_sample_is_that_of_its_classes():
    whole, part, most = (new_learner(deviation_images=n) for n in (None, 17, 48))
    for learn in (whole, part, most):
        learn.fit(1)
    gaps = [learn.retrieval_metrics.history[-1]["deviation"] for learn in (whole, part, most)]
    assert gaps[0] == gaps[2] != gaps[1]
    labels = whole.dls.train_labels
    assert whole_classes(labels, 17).shape == (16,) and whole_classes(labels, 1).shape == (8,)


# rows


def test_rows_take_the_settings_and_old_rows_keep_theirs(draw_photos, tmp_path, monkeypatch):
    monkeypatch.setattr("dml_nb.training.precision.faster_precision", lambda seconds: "bf16")
    draw_photos()
    place = dict(dataset=str(tmp_path / "photos"), backbone="small_cnn")
    (row,) = find_rows("proxy_anchor", place["dataset"])[:1]
    new = ("precision", "compile", "deterministic", "deviation_images")
    assert not {*settings_for(row, **place)} & {*new}
    for name, value in dict(precision="half", compile="yes", deterministic=1, deviation_images=0).items():
        with pytest.raises(ValueError, match=name):
            settings_for(row, **place, **{name: value})
    sizes = dict(epochs=1, batch_size=6, warm_epochs=0)
    run = Run(row.id, settings_for(row, **place, **sizes, precision="auto", deviation_images=100), 0, tmp_path / "run")
    learn = run.learner()
    learn.remove_cb(ProgressCallback)
    result = run.result(run.fit(learn))
    assert result["environment"]["precision"] == "bf16" and result["settings"]["precision"] == "auto"
    assert learn.retrieval_metrics.deviation_images == 100
    assert "precision=auto" in (text := changes_from_recipe(result)) and text.endswith("measured bf16")


# on a GPU


class NoWaiting(Callback):
    "PyTorch raises an error at the first operation of a step that waits for the GPU."

    order, run_valid = -100, False

    def after_pred(self):
        torch.cuda.set_sync_debug_mode("error" if self.iter else "default")

    def after_step(self):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("loss", ["proxy_anchor", "cp_proxy_anchor"])
def test_a_step_waits_for_nothing_on_the_gpu_itself(loss, precision):
    try:
        new_learner(loss, precision=precision, cbs=[NoWaiting()]).fit(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16", "auto"])
def test_the_whole_network_trains_on_the_gpu_in_every_precision(precision):
    data = load_dataset("groceries-mini").subset(8, 2)
    model = create_embedder("small_cnn", 8, pretrained=False)
    loss = create_loss("cp_proxy_anchor", num_classes=8, embedding_size=8, start_epoch=1)
    learn = dml_learner(image_dls(data, model.spec, 8), model, loss, warm_epochs=0, precision=precision)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
    assert learn.retrieval_metrics.history[-1]["R@1"] > 0 and weights(learn).isfinite().all()


@pytest.mark.cuda
def test_deterministic_trainings_on_the_gpu_are_equal():
    first, second = (new_learner("cp_proxy_anchor", deterministic=True) for _ in range(2))
    for learn in (first, second):
        learn.fit(2)
    assert torch.equal(weights(first), weights(second))
