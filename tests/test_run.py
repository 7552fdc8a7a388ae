"The command line as a user sees it: a complete run, an interrupted run, wrong input."

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from shutil import copytree

import pandas as pd
import pytest
import torch

from dml_nb.experiments import batch
from dml_nb.training.checkpoint import read_checkpoint

TINY = ["--backbone", "small_cnn", "--set", "embedding_size=32", "--set", "batch_size=24", "--set", "lr=0.001"]


def test_a_run_writes_its_files_and_is_skipped_the_second_time(dml_nb, shell, glyph_folder):
    args = ["run", "CP + PA K=3", "--dataset", glyph_folder, *TINY, "--set", "epochs=2"]
    output = dml_nb(*args)
    assert "1 done, 0 failed" in output and output.count("warning: the training has 6 steps in all") == 1
    (result_file,) = dml_nb.folder.glob("runs/002-II/cub-cp-pa-k-3/letters-small_cnn-finetune-*/seed0/result.json")
    folder, result = result_file.parent, json.loads(result_file.read_text(encoding="utf-8"))
    assert {"params.json", "result.json", "history.csv", "run.ipynb", "gallery.png"} <= {
        p.name for p in folder.iterdir()
    }
    assert not list(folder.glob("*.tmp*")) and not (folder / "checkpoint.pt").exists()
    assert {"best.safetensors", "last.safetensors"} <= {p.name for p in folder.iterdir()}
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # the umask decides, also for the weights
    assert {
        "row",
        "settings",
        "seed",
        "best",
        "last",
        "claimed",
        "seconds",
        "images_per_second",
        "peak_memory_mb",
        "environment",
        "data_checksum",
    } <= set(result)
    assert result["claimed"]["R@1"] == "69.8" and result["own_setting"] is False
    assert (result["own_data"], result["train_images"], result["test_images"]) == ("letters", 72, 72)
    assert result["peak_device_memory_mb"] is None or torch.cuda.is_available()
    assert len(pd.read_csv(folder / "history.csv")) == 2
    written = result_file.stat().st_mtime_ns
    for again in (args, [*args, "--skip-corrupt"]):  # all images can be read, so there is nothing to skip
        assert "finished before: skipped" in shell(*again) and result_file.stat().st_mtime_ns == written
    table = shell("report", "II")
    assert "CP + PA K=3" in table and "other setting" in table
    assert {".md", ".csv", ".html"} <= {p.suffix for p in (dml_nb.folder / "runs").glob("report-II*")}


def test_an_interrupted_run_has_no_result_and_is_resumed(dml_nb, shell, glyph_folder):
    args = ["run", "CP + PA K=3", "--dataset", str(glyph_folder), *TINY, "--set", "epochs=8"]
    # a background job would inherit an ignored SIGINT; restore the default of a terminal
    process = subprocess.Popen(
        [dml_nb.command, *args],
        cwd=dml_nb.folder,
        env=dml_nb.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoints, deadline = [], time.monotonic() + 120
    while not checkpoints and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        checkpoints = [p for p in dml_nb.folder.glob("runs/**/checkpoint.pt") if read_checkpoint(p)["history"]]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command resumes it" in output
    # the interrupted kernel may print a traceback of its own, but none may come from the command
    assert "dml_nb/face/cli" not in output and "papermill/" not in output
    folder = checkpoints[0].parent
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, encoding="utf-8").stdout
    assert not [line for line in processes.splitlines() if "ipykernel" in line and str(dml_nb.folder) in line]
    assert not (folder / "result.json").exists() and not list(folder.glob("*.ipynb"))
    before = read_checkpoint(checkpoints[0])["history"]
    assert 0 < len(before) < 8
    output = shell(*args)
    assert f"resumes after epoch {len(before) - 1}: {len(before)} of 8 epochs were finished before" in output
    assert output.count("resumes after") == 1
    after = pd.read_csv(folder / "history.csv")
    assert after.epoch.tolist() == list(range(8))
    assert after.train_seconds[: len(before)].tolist() == pytest.approx(
        [line["train_seconds"] for line in before], rel=1e-4
    )
    assert (folder / "result.json").exists() and not checkpoints[0].exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["run", "CP + Proxi Anchor", "--dataset", "glyphs"], "did you mean 'CP + Proxy Anchor Loss'"),
        (["run", "CP + PA", "--dataset", "glyhps"], "did you mean 'glyphs'"),
        (["run", "CP + PA", "--dataset", "glyphs", "--backbone", "smal_cnn"], "did you mean 'small_cnn'"),
        (
            ["run", "CP + PA", "--dataset", "glyphs", "--backbone", "small_cnn", "--set", "capcity=3"],
            "did you mean 'capacity'",
        ),
        (["run", "CP + PA", "--dataset", "glyphs", "--backbone", "small_cnn", "--set", "epochs"], "expects key=value"),
        (
            ["run", "CP + PA", "--dataset", "glyphs", "--backbone", "small_cnn", "--regime", "frosen"],
            "did you mean 'frozen'",
        ),
        (["run", "CP + PA", "--dataset", "./nothing/here", "--backbone", "small_cnn"], "nothing/here does not exist"),
        (["run", "CP + PA", "--dataset", "glyphs", "--backbone", "small_cnn", "--seeds", "a"], "--seeds"),
        (["run", "CP + PA", "--dataset", "", "--backbone", "small_cnn"], "--dataset is empty: give a name"),
        (["run", "CP + PA", "--dataset", "glyphs", "--backbone", ""], "--backbone is empty"),
        (
            ["run", "CP + PA", "--dataset", "glyphs", "--backbone", "small_cnn", "--seeds", str(2**64)],
            "seed must be less than 2**64",
        ),
        (
            ["run", "CP + PA", "--dataset", "glyphs", "--backbone", "small_cnn", "--set", "recall_at=[2,4]"],
            "--set recall_at=[1,2,4]",
        ),
        (
            ["run", "CP + PA K=3", "--dataset", "glyphs", "--backbone", "small_cnn", "--set", "proxies_per_class=0"],
            "proxies_per_class must be at least 1",
        ),
        (
            ["run", "CP + PA K=3", "--dataset", "glyphs", "--backbone", "small_cnn", "--set", "capacity=0"],
            "at least 1, got 0",
        ),
        (
            ["run", "CP + PA K=3", "--dataset", "glyphs", "--backbone", "small_cnn", "--set", "start_epoch=9"],
            "never reached in 5 epochs",
        ),
        (["rows", "XII"], "unknown table"),
        (["report"], "does not exist"),
    ],
)
def test_bad_input_is_one_clear_sentence(shell, args, message):
    assert message in shell(*args, status=1)
    assert not Path("runs").exists()


def test_weights_that_cannot_be_had_are_named_before_a_notebook_starts(shell, glyph_folder, monkeypatch):
    monkeypatch.setattr(batch, "why_no_weights", lambda backbone: "download weights.pth elsewhere and put it there")
    output = shell("run", "Proxy Anchor", "--dataset", glyph_folder, "--backbone", "resnet18", status=1)
    assert "resnet18 cannot be trained here: download weights.pth elsewhere" in output and "[1/1]" not in output


@pytest.fixture
def damaged(glyph_folder, tmp_path):
    "A copy of the data set, and one of its files, which is truncated."
    folder = copytree(glyph_folder, tmp_path / "damaged")
    truncated = sorted(folder.glob("d/*.png"))[0]
    truncated.write_bytes(truncated.read_bytes()[:60])
    return folder, truncated


def test_a_truncated_image_is_named_and_can_be_skipped(shell, damaged):
    folder, truncated = damaged
    output = shell("data", folder, status=1)
    assert "1 of 144 files" in output and truncated.name in output and "skip" in output
    assert re.search("train images +71\n", shell("data", folder, "--skip-corrupt"))


def test_a_run_can_skip_unreadable_images(shell, damaged):
    folder, truncated = damaged
    args = ["run", "Proxy Anchor", "--dataset", folder, *TINY, "--set", "epochs=1"]
    assert truncated.name in shell(*args, status=1)
    assert "1 done" in shell(*args, "--skip-corrupt")
    (file,) = Path("runs").glob("**/result.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert "on_corrupt" not in result["settings"] and result["train_images"] + result["test_images"] == 143


@pytest.mark.parametrize(
    "make, message", [(lambda f: None, "does not exist"), (lambda f: f.mkdir(), "no class folders")]
)
def test_a_folder_that_is_no_data_set(shell, tmp_path, make, message):
    folder = tmp_path / "pictures"
    make(folder)
    assert message in shell("data", f"./{folder.name}", status=1)


def test_help_shows_an_example(shell):
    for command in ("rows", "run", "report", "data", "tune", "quickstart", "bench"):
        assert f"Example: dml_nb {command}" in " ".join(shell(command, "--help").split())
