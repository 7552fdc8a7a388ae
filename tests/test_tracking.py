"Trackers: curves go on after an interruption, only the first process writes, and no number of the training changes."

import importlib.util
import os

import pandas as pd
import pytest
import torch

from dml_nb.experiments import batch
from dml_nb.experiments.recipes import settings_for
from dml_nb.experiments.run import Run
from dml_nb.experiments.tables import row_of
from dml_nb.losses import create_loss
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.training.checkpoint import Checkpoint, resume
from dml_nb.training.learner import dml_learner, feature_dls
from dml_nb.training.several_processes import launch
from dml_nb.training.tracking import TRACKERS, trackers

pytestmark = pytest.mark.filterwarnings("ignore:the training has", "ignore::FutureWarning", "ignore::UserWarning")

C, D, STEPS = 6, 8, 4


def train(folder, epochs, names):
    "The weights after a training that is resumed if there is a checkpoint; it evaluates every other epoch."
    torch.manual_seed(0)
    generator, labels = torch.Generator().manual_seed(0), torch.arange(C).repeat_interleave(8)
    x = torch.randn(len(labels), 16, generator=generator)
    dls, loss = feature_dls(x, labels, x, labels, 12), create_loss("proxy_anchor", C, D)
    learn = dml_learner(dls, EmbeddingHead(16, D), loss, lr=1e-2, evaluate_every=2)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    resume(learn, folder / "checkpoint.pt", "key")
    learn.fit_schedule(epochs, "constant", cbs=[Checkpoint(folder, "key"), *trackers(names, folder)])
    return learn.model.linear.weight.detach().clone()


def check_twice(folder, name):
    "Three epochs, then two more: the weights are those of a training without the tracker."
    train(folder / "tracked", 3, [name])
    tracked = train(folder / "tracked", 5, [name])
    train(folder / "plain", 3, [])
    assert tracked.equal(train(folder / "plain", 5, []))


def test_tensorboard_holds_each_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install dml_nb[tracking]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_twice(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tracked/tensorboard")).Reload()
    assert {"train_loss", "lr_0", "lr_1", "R@1", "MAP@R"} <= set(events.Tags()["scalars"])
    assert [scalar.step for scalar in events.Scalars("R@1")] == [STEPS * epoch for epoch in range(1, 6)]
    steps = [scalar.step for scalar in events.Scalars("train_loss")]
    assert sorted({*steps}) == list(range(1, 5 * STEPS + 1)) and steps == sorted(steps)
    assert {scalar.value for scalar in events.Scalars("lr_1")} == {1.0}  # 100 times 0.01


def test_weights_and_biases_continues_its_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install dml_nb[tracking]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    check_twice(tmp_path, "wandb")
    ids = {path.name.rpartition("-")[2] for path in (tmp_path / "tracked/wandb").glob("offline-run-*")}
    assert len(ids) == 1 and wandb.run.summary["R@1"] > 0
    wandb.finish()


def track_here(folder):
    name = "tensorboard" if importlib.util.find_spec("tensorboard") else "csv"
    train(folder, 2, ["csv", name] if name != "csv" else [name])
    return sorted(path.name for path in folder.iterdir()), name


def test_only_the_first_of_two_processes_writes(tmp_path):
    names, name = launch(track_here, tmp_path)
    assert {"log.csv", "checkpoint.pt"} <= {*names}
    assert pd.read_csv(tmp_path / "log.csv").epoch.tolist() == [0, 1]
    if name == "tensorboard":
        assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_row_is_tracked_without_another_setting(glyph_folder, tmp_path, monkeypatch):
    settings = settings_for(row_of("own/proxy-anchor"), str(glyph_folder), "small_cnn", batch_size=24, epochs=2)
    logs = {}
    for track in ("csv", ""):
        monkeypatch.setenv("DML_NB_TRACK", track)
        run = Run("own/proxy-anchor", settings, 0, tmp_path / f"run{track}")
        learn = run.learner()
        with learn.no_bar(), learn.no_logging():
            run.train(learn)
        logs[track] = [entry["R@1"] for entry in learn.retrieval_metrics.history]
        assert run.key == Run("own/proxy-anchor", settings, 0, tmp_path).key
    assert pd.read_csv(tmp_path / "runcsv/log.csv")["R@1"].tolist() == logs["csv"] == logs[""]
    assert not (tmp_path / "run/log.csv").exists()


def test_the_option_reaches_the_notebooks_of_the_rows(shell, monkeypatch):
    monkeypatch.setenv("DML_NB_TRACK", "")  # restored after the test
    monkeypatch.setattr(batch, "run_rows", lambda *_, **overrides: ([], []) if not overrides else None)
    shell("run", "own/circle", "--track", "csv")
    assert os.environ["DML_NB_TRACK"] == "csv"


def test_a_tracker_that_cannot_be_used_is_refused_before_the_run(shell, monkeypatch):
    monkeypatch.setitem(TRACKERS, "wandb", "a_package_that_is_missing")
    for name, message in [("tensorbord", "did you mean 'tensorboard'"), ("csv,wandb", "pip install dml_nb[tracking]")]:
        assert message in shell("run", "own/circle", "--track", name, status=1)
