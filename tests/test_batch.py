"""Batches that are killed, started twice, spread over machines, or meet damaged files.

No run is computed twice, and no incomplete result counts.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import psutil
import pytest

from dml_nb.experiments import batch, run_store
from dml_nb.experiments import notebook_job as job_module
from dml_nb.experiments.tables import find_rows
from dml_nb.training.checkpoint import read_checkpoint

SMALL = dict(backbone="small_cnn", embedding_size=32, batch_size=24, lr=0.001)
TINY = ["--backbone", "small_cnn", "--set", "embedding_size=32", "--set", "batch_size=24", "--set", "lr=0.001"]
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'dml_nb[cluster]'")


def until(what, process=None, seconds=240):
    "Wait for something to be true."
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline and (process is None or process.poll() is None), (
            process and process.communicate()[0]
        )
        time.sleep(0.02)
    return found


def start(dml_nb, *args):
    # a job in the background inherits an ignored SIGINT; at a terminal it is not ignored
    return subprocess.Popen(
        [dml_nb.command, *map(str, args)],
        cwd=dml_nb.folder,
        env=dml_nb.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def kernels(folder):
    "Processes of notebooks that work below a folder."
    found = []
    for process in psutil.process_iter():
        try:
            if any("ipykernel" in word for word in process.cmdline()) and process.cwd().startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            pass
    return found


def checkpoints(folder):
    "Checkpoints of runs that have finished an epoch."
    return [path for path in Path(folder).glob("runs/**/checkpoint.pt") if epochs_before(path)]


def epochs_before(checkpoint):
    return read_checkpoint(checkpoint)["history"]


def check_resumed(folder, before, epochs):
    "The epochs of the first attempt were kept, the others added, and one whole result is there."
    history = pd.read_csv(folder / "history.csv")
    assert 0 < len(before) < epochs and history.epoch.tolist() == list(range(epochs))
    assert history.train_seconds[: len(before)].tolist() == pytest.approx(
        [line["train_seconds"] for line in before], rel=1e-4
    )
    assert run_store.read_result(folder / "result.json")["last"]["epoch"] == epochs - 1
    assert not list(folder.glob("checkpoint*")) and not list(folder.glob("*.tmp*")) and not (folder / ".lock").exists()


def test_a_killed_notebook_is_started_again_where_it_stopped(shell, tmp_path, glyph_folder):
    with ThreadPoolExecutor(1) as pool:
        args = ["run", "CP + PA K=3", "--dataset", glyph_folder, *TINY, "--set", "epochs=6"]
        command = pool.submit(shell, *args)
        (path,) = until(lambda: command.done() and command.result() or checkpoints(tmp_path))
        kernel = min(kernels(tmp_path), key=lambda process: process.create_time())  # the others read its images
        kernel.send_signal(signal.SIGSTOP)
        before = epochs_before(path)
        kernel.kill()
        assert "1 done, 0 failed: 1 run now" in command.result()
    check_resumed(path.parent, before, 6)


ORPHANS = """
import os, signal, time, torch
from dml_nb.data.loaders import TensorSet, eval_loader
loader = eval_loader(TensorSet(torch.zeros(600, 1)), workers=2)
begun = loader.worker_init_fn
loader.worker_init_fn = lambda i: (time.sleep(2), begun(i))
batches = iter(loader)
print(*(worker.pid for worker in batches._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_is_killed_while_they_start():
    process = subprocess.run(
        [sys.executable, "-c", ORPHANS], capture_output=True, encoding="utf-8", timeout=100
    )  # ends when no worker holds the output open
    assert len(process.stdout.split()) == 2 and process.returncode == -signal.SIGKILL, process.stderr


def test_a_killed_batch_is_finished_by_one_of_two_that_start_at_once(dml_nb, glyph_folder):
    args = ["run", "CP + PA K=3", "--dataset", glyph_folder, *TINY, "--set", "epochs=6"]
    process = start(dml_nb, *args)
    (path,) = until(lambda: checkpoints(dml_nb.folder), process)
    process.kill()  # its notebook lives on for a moment: a new one must not write beside it
    process.wait()
    before = epochs_before(path)
    assert not list(path.parent.glob("result.json"))
    both = [start(dml_nb, *args) for _ in range(2)]
    outputs = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert sorted("1 run now, 0 done before" in output for output in outputs) == [False, True], outputs
    assert sorted("0 run now, 1 done before" in output for output in outputs) == [False, True], outputs
    check_resumed(path.parent, before, 6)
    assert len(list(dml_nb.folder.glob("runs/**/result.json"))) == 1


def test_a_failing_row_is_written_down_and_the_others_go_on(shell, tmp_path, glyph_folder):
    rows = ["CP + PA K=3", "Proxy Anchor"]
    args = ["run", *rows, "--dataset", glyph_folder, *TINY, "--set", "epochs=1"]
    first, _ = batch.plan_jobs([find_rows(name)[0] for name in rows], [0], str(glyph_folder), epochs=1, **SMALL)
    folder = run_store.run_folder(tmp_path / "runs", first.rows[0], first.settings, 0)
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"cut short")
    output = shell(*args, status=1)
    assert "1 done, 1 failed: 1 run now" in output and "is damaged: delete it" in output
    failed = json.loads((folder / "failed.json").read_text(encoding="utf-8"))
    assert (
        failed["error"] == "ValueError" and "resume(learn" in failed["traceback"] and (folder / "failed.ipynb").exists()
    )
    assert not (folder / "result.json").exists() and not (folder / "run.ipynb").exists()
    (folder / "checkpoint.pt").unlink()
    assert "2 done, 0 failed: 1 run now, 1 done before" in shell(*args)
    assert not list(folder.glob("failed.*"))


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="a small disk is made with unshare -rm, which this machine does not allow",
)
def test_on_a_full_disk_nothing_half_counts(dml_nb, glyph_folder):
    run = " ".join(
        [
            "'" + str(a) + "'"
            for a in (
                dml_nb.command,
                "run",
                "CP + PA K=3",
                "Proxy Anchor",
                "--dataset",
                glyph_folder,
                *TINY,
                "--set",
                "epochs=1",
            )
        ]
    )
    (dml_nb.folder / "runs").mkdir()
    script = f"""
        mount -t tmpfs -o size=800k tmpfs runs || exit 77
        {run} > first.txt 2>&1; echo $? > status.txt
        find runs -name result.json > half.txt
        mount -o remount,size=100m runs || exit 77
        {run} > second.txt 2>&1 || exit 1
        find runs -name result.json > whole.txt
    """
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=dml_nb.folder,
        env=dml_nb.environment,
        capture_output=True,
        encoding="utf-8",
        timeout=400,
    )
    if done.returncode == 77:
        pytest.skip("this machine does not allow mounting a small disk")
    texts = {
        name: (dml_nb.folder / f"{name}.txt").read_text(encoding="utf-8")
        for name in ("first", "second", "status", "half", "whole")
    }
    assert done.returncode == 0, texts
    assert texts["status"] == "1\n" and "is full: free some space" in texts["first"] and texts["half"] == ""
    assert "2 done, 0 failed: 2 run now" in texts["second"] and texts["whole"].count("result.json") == 2


# With a stand-in for papermill the rest takes no time.


@pytest.fixture
def fake(monkeypatch):
    "A notebook that only writes a result; counts how often it is run."
    calls = []

    def run_notebook(job, row, folder):
        calls.append(row.id)
        (folder / "history.csv").write_text("epoch\n0\n", encoding="utf-8")
        line = {"epoch": 0, "R@1": 0.5, "MAP@R": 0.25}
        result = dict(
            row=row.id,
            method=row.method,
            table=row.table,
            seed=job.seed,
            settings=job.settings,
            best=line,
            last=line,
            claimed=row.claimed,
            own_setting=False,
            seconds=dict(train=1, evaluate=1, fit=2, notebook=3),
            environment=dict(dml_nb=run_store.version("dml_nb")),
            data_checksum=job.checksum,
        )
        run_store.stage_result(folder, result)
        run_store.publish_result(folder)
        return ["the training has 3 steps in all."]

    monkeypatch.setattr(job_module, "run_notebook", run_notebook)
    monkeypatch.setattr(batch, "why_no_weights", lambda backbone: None)
    return calls


TINY_GLYPHS = dict(dataset="glyphs", backbone="small_cnn", epochs=1)


def run(names, out, seeds=(0,), **changes):
    return batch.run_rows([find_rows(name)[0] for name in names], list(seeds), out, **TINY_GLYPHS | changes)


def test_rows_that_ask_for_the_same_share_a_run(fake, tmp_path, capsys):
    twins = ["002-II/cub-cp-pa-k-3", "002-IV/cub-cp-proxy-anchor-loss", "002-III/cub-cp-pa"]
    done, _ = run(twins, tmp_path)
    assert len(fake) == 1 and "3 done, 0 failed: 1 run now, 0 done before, 2 shared" in capsys.readouterr().out
    found = [run_store.read_result(folder / "result.json") for folder in done]
    assert [r["row"] for r in found] == twins and [r["claimed"] for r in found] == [
        find_rows(t)[0].claimed for t in twins
    ]
    assert [r.get("shared_with") for r in found] == [None] + [done[0].relative_to(tmp_path.resolve()).as_posix()] * 2
    late, _ = run(["002-IV/cars-cp-proxy-anchor-loss"], tmp_path)  # asked for on another day
    assert len(fake) == 1 and run_store.read_result(late[0] / "result.json")["shared_with"] == found[1]["shared_with"]
    run(twins, tmp_path)
    assert len(fake) == 1 and "3 done before" in capsys.readouterr().out


def test_a_warning_inside_a_notebook_is_said_once_for_each_job(fake, tmp_path, capsys):
    twins = ["002-II/cub-cp-pa-k-3", "002-IV/cub-cp-proxy-anchor-loss"]
    run(twins, tmp_path, seeds=(0, 1))
    assert capsys.readouterr().out.count("warning: the training has 3 steps in all.") == 2
    run(twins, tmp_path, seeds=(0, 1))
    assert "warning" not in capsys.readouterr().out


def test_a_batch_that_the_classes_cannot_fill_is_refused_before_a_notebook_starts(fake, tmp_path, glyph_folder):
    asked = dict(dataset=str(glyph_folder), batch_size=60, per_class=5)  # 12 classes, and 6 are for training
    with pytest.raises(ValueError, match="a batch needs 12 classes but there are 6: use batch_size=30 or less"):
        run(["CP + PA K=3"], tmp_path, **asked)
    with pytest.raises(ValueError, match="a batch needs 6 classes but there are 4"):  # two are held out
        run(["CP + PA K=3"], tmp_path, **asked | dict(batch_size=30, holdout=0))
    assert not fake and len(run(["CP + PA K=3"], tmp_path, **asked | dict(batch_size=30))[0]) == 1


def test_a_shared_run_is_not_lost_with_its_first_row(fake, tmp_path):
    done, _ = run(["002-II/cub-cp-pa-k-3", "002-IV/cub-cp-proxy-anchor-loss"], tmp_path)
    shutil.rmtree(done[0])
    again, _ = run(["002-IV/cub-cp-proxy-anchor-loss"], tmp_path)
    assert len(fake) == 1 and again == done[1:]


def test_another_seed_setting_or_backbone_is_another_run(fake, tmp_path):
    for changes in ({}, dict(seeds=[1]), dict(lr=0.5), dict(epochs=2), dict(backbone="resnet18")):
        run(["CP + PA K=3"], tmp_path, **changes)
    assert len(fake) == 5


def change(part, value):
    "A change of one part of a result's text."
    return lambda text: json.dumps(json.loads(text) | {part: value})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1]",
        lambda text: '{"row": 1}',
        change("best", {"epoch": 0, "R@1": 0.5}),
        change("best", {"epoch": 1}),
        change("last", {"epoch": 0, "R@1": "x", "MAP@R": 0.25}),
    ],
)
def test_a_damaged_result_is_set_aside_and_run_again(fake, tmp_path, capsys, damage):
    (folder,), _ = run(["CP + PA K=3"], tmp_path)
    (folder / "result.json").write_text(damage((folder / "result.json").read_text(encoding="utf-8")), encoding="utf-8")
    run(["CP + PA K=3"], tmp_path)
    assert len(fake) == 2 and "is damaged" in capsys.readouterr().out
    assert run_store.read_result(folder / "result.json") and (folder / "result.stale.json").exists()


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("best", None, "best must be a dict, got None"),
        ("settings", {}, "settings.dataset is missing"),
        ("seconds", {}, "seconds.train is missing"),
        ("environment", "x", "environment must be a dict, got 'x'"),
        ("environment", dict(dml_nb="weird!"), "'weird!' is not a version"),
        ("environment", dict(dml_nb=1), "1 is not a version"),
        ("best", {"epoch": 0, "R@1": 0.5}, "best.MAP@R is missing"),
        ("best", {"epoch": 1, "MAP@R": 0.3}, "best.R@1 is missing"),
        ("last", {"epoch": 0, "R@1": "x", "MAP@R": 0.3}, "last.R@1 must be a number, got 'x'"),
        ("last", {"epoch": 0, "R@1": 0.5, "MAP@R": float("inf")}, "last.MAP@R must be a number, got inf"),
        (
            "best",
            {"epoch": 0, "R@1": 0.5, "MAP@R": 0.3, "deviation": None},
            "best.deviation must be a number, got None",
        ),
        ("shared_with", 1, "shared_with must be text, got 1"),
        ("settings", "no recall_at", "settings: recall_at must be a list of whole numbers, got []"),
    ],
)
def test_what_is_wrong_with_a_damaged_result(fake, tmp_path, part, value, message):
    (folder,), _ = run(["CP + PA K=3"], tmp_path)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if value == "no recall_at":
        value = result["settings"] | dict(recall_at=[])
    (folder / "result.json").write_text(json.dumps(result | {part: value}), encoding="utf-8")
    with pytest.raises(run_store.DamagedResult, match=f"is damaged: .*{re.escape(message)}"):
        run_store.read_result(folder / "result.json")


def test_a_file_that_is_no_result_is_damaged(tmp_path):
    for content in ("", "[]", '{"row": "002', "{}"):
        (tmp_path / "result.json").write_text(content, encoding="utf-8")
        with pytest.raises(run_store.DamagedResult, match="is damaged"):
            run_store.read_result(tmp_path / "result.json")


def test_a_notebook_that_is_killed_after_its_last_cell_leaves_no_result(fake, tmp_path, monkeypatch):
    from nbclient.exceptions import DeadKernelError

    stand_in = job_module.run_notebook

    def dies(job, row, folder):
        run_store.stage_result(folder, dict(row=row.id))
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(job_module, "run_notebook", dies)
    done, (failure,) = run(["CP + PA K=3"], tmp_path)
    assert not done and "was killed" in str(failure) and not list(tmp_path.glob("**/result.json"))
    monkeypatch.setattr(job_module, "run_notebook", stand_in)
    (folder,), _ = run(["CP + PA K=3"], tmp_path)
    assert run_store.is_finished(folder) and not list(tmp_path.glob("**/result.pending.json"))


def test_a_run_without_its_history_counts_but_is_not_shared(fake, tmp_path):
    rows = ["002-II/cub-cp-pa-k-3", "002-IV/cub-cp-proxy-anchor-loss", "Proxy Anchor"]
    (first,), _ = run(rows[:1], tmp_path)
    (first / "history.csv").unlink()
    done, failed = run(rows, tmp_path)  # the second row has nothing to share, so it is run
    assert not failed and fake == [rows[0], rows[1], find_rows(rows[2])[0].id]
    assert (
        done[0] == first
        and (done[1] / "history.csv").exists()
        and "shared_with" not in run_store.read_result(done[1] / "result.json")
    )
    (done[1] / "history.csv").unlink()
    assert not run(rows, tmp_path)[1] and len(fake) == 3


def test_a_file_that_cannot_be_read_or_written_fails_one_row(fake, tmp_path, monkeypatch, capsys):
    share_result = batch.share_result

    def gone(folder, row, out):
        raise FileNotFoundError(2, "No such file or directory", str(folder / "history.csv"))

    monkeypatch.setattr(batch, "share_result", gone)
    names = ["002-II/cub-cp-pa-k-3", "002-IV/cub-cp-proxy-anchor-loss", "Proxy Anchor"]
    done, (failed,) = run(names, tmp_path)
    assert (
        len(done) == 1
        and len(fake) == 2
        and "history.csv" in str(failed)
        and "the same command then goes on" in str(failed)
    )
    assert "1 done, 1 failed" in capsys.readouterr().out
    monkeypatch.setattr(batch, "share_result", share_result)
    assert len(run(names, tmp_path)[0]) == 3 and len(fake) == 2


def test_a_finished_run_on_storage_that_can_only_be_read_counts_as_done(fake, tmp_path, capsys):
    rows = ["002-II/cub-cp-pa-k-3", "002-IV/cub-cp-proxy-anchor-loss"]
    done, _ = run(rows, tmp_path)
    shutil.rmtree(tmp_path / ".locks")
    (tmp_path / ".locks").touch()  # nobody can make this folder now, not even root
    assert run(rows, tmp_path) == (done, []) and len(fake) == 1
    assert "finished before: skipped" in capsys.readouterr().out
    _, (failed,) = run(rows, tmp_path, lr=0.5)
    text = str(failed)
    assert f"{tmp_path / '.locks'}: " in text and "Check the path and its permissions; the same" in text
    assert "Errno" not in text


def test_a_run_with_a_damaged_history_is_not_shared(fake, tmp_path):
    rows = ["002-II/cub-cp-pa-k-3", "002-IV/cub-cp-proxy-anchor-loss"]
    (first,), _ = run(rows[:1], tmp_path)
    (first / "history.csv").write_text("epoch\n", encoding="utf-8")
    (second,), _ = run(rows[1:], tmp_path)
    assert fake == rows and run_store.read_history(second).epoch.tolist() == [0]


def test_a_disk_that_fills_while_a_run_is_shared_stops_the_batch(fake, tmp_path, monkeypatch):
    def full(folder, row, out):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch, "share_result", full)
    with pytest.raises(OSError, match="No space left"):
        run(["002-II/cub-cp-pa-k-3", "002-IV/cub-cp-proxy-anchor-loss", "Proxy Anchor"], tmp_path)
    assert len(fake) == 1


def test_a_result_of_a_newer_version_is_not_touched(fake, tmp_path):
    (folder,), _ = run(["CP + PA K=3"], tmp_path)
    newer = json.loads((folder / "result.json").read_text(encoding="utf-8")) | dict(environment=dict(dml_nb="99.1"))
    (folder / "result.json").write_text(json.dumps(newer), encoding="utf-8")
    _, (failed,) = run(["CP + PA K=3"], tmp_path)  # a failure of this row alone
    assert re.search("was written by dml_nb 99.1, but this is .*: update dml_nb", str(failed))
    assert json.loads((folder / "result.json").read_text(encoding="utf-8")) == newer


def test_a_changed_recipe_says_what_became_stale(fake, tmp_path, capsys, monkeypatch):
    run(["CP + PA K=3"], tmp_path)
    run(["CP + PA K=3"], tmp_path, lr=0.5)  # another request is no change of the recipe
    assert "stale" not in capsys.readouterr().out
    from dml_nb.experiments import recipes

    changed = json.loads(json.dumps(recipes.load_recipes()))
    changed["settings"]["finetune/glyphs"]["weight_decay"] = 0.25
    monkeypatch.setattr(recipes, "load_recipes", lambda: changed)
    run(["CP + PA K=3"], tmp_path)
    output = capsys.readouterr().out
    assert (
        len(fake) == 3
        and output.count("stale: 002-II/cub-cp-pa-k-3/") == 1
        and "the recipe changed: weight_decay 0.0001, now 0.25" in output
    )


def test_another_version_of_the_package_is_another_run(fake, tmp_path, capsys, monkeypatch):
    from dml_nb.experiments import time_estimate

    run(["CP + PA K=3"], tmp_path)
    for module in (job_module, run_store):
        monkeypatch.setattr(module, "version", lambda name: "9.9.9")
    monkeypatch.setattr(time_estimate, "environment", lambda: dict(device="x"))
    run(["CP + PA K=3"], tmp_path)
    assert len(fake) == 2 and "now 9.9.9" in capsys.readouterr().out


def test_changed_data_make_result_and_checkpoint_stale(fake, tmp_path, glyph_folder, capsys):
    data = shutil.copytree(glyph_folder, tmp_path / "letters")
    (folder,), _ = run(["CP + PA K=3"], tmp_path / "runs", dataset=str(data))
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (folder / name).write_bytes(b"of the old data")
    next(data.glob("a/*.png")).unlink()
    run(["CP + PA K=3"], tmp_path / "runs", dataset=str(data))
    assert len(fake) == 2 and "the data changed: checksum" in capsys.readouterr().out
    assert not list(folder.glob("checkpoint*"))


def test_a_notebook_that_is_killed_every_time_fails_at_last(tmp_path, monkeypatch):
    from nbclient.exceptions import DeadKernelError

    tries = []

    def dies(job, row, folder):
        tries.append(row.id)
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(job_module, "run_notebook", dies)
    done, (failure,) = run(["CP + PA K=3"], tmp_path, retries=2)
    assert not done and len(tries) == 3 and "was killed 3 times, perhaps for lack of memory" in str(failure)


def test_a_full_disk_stops_the_batch(tmp_path, monkeypatch):
    def full(job, row, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job_module, "run_notebook", full)
    monkeypatch.setattr(job_module, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(OSError, match="is full: free some space; the same command then goes on"):
        run(["CP + PA K=3", "Proxy Anchor"], tmp_path)
    assert not list(tmp_path.glob("**/result.json"))


def test_committed_results_lie_in_the_folders_of_today():
    "The name of a folder is the hash of the settings as they are stored."
    committed = sorted((Path(__file__).parents[1] / "runs").glob("*/*/*/seed*/result.json"))
    for path in committed:
        result = run_store.read_result(path)
        row, (own,) = find_rows(result["row"])[0], find_rows(result["row"])
        assert own == row and result["claimed"] == row.claimed
        stored = json.loads(path.read_text(encoding="utf-8"))["settings"]
        if result["environment"]["dml_nb"] == run_store.version("dml_nb"):
            assert path.parent == run_store.run_folder(path.parents[4], row, stored, result["seed"])


# Ray


@pytest.fixture(scope="module")
def nodes():
    "Two Ray nodes on this machine, one CPU each."
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


class StandIn:
    "Stands for Ray; its first attempts to start fail and leave a process and files."

    def __init__(self, failing):
        self.failing, self.attempts, self.left, self.environment = failing, [], [], {}

    def init(self, _temp_dir, **options):
        self.attempts.append(int(os.environ["RAY_gcs_server_port_wait_time_s"]))
        self.left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]))
        (Path(_temp_dir) / "session").touch()
        self.environment = dict(os.environ)
        if len(self.attempts) <= self.failing:
            raise Exception("The current node timed out during startup.\nMore of it.")

    def shutdown(self):
        pass


@pytest.fixture
def empty_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_gcs_server_port_wait_time_s"):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return tmp_path


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_ray_that_starts_late_gets_more_time_and_leaves_nothing(empty_temporary_folder, monkeypatch, failing):
    from dml_nb.experiments import ray_cluster

    stand_in = StandIn(failing)
    monkeypatch.setattr(ray_cluster, "_import_ray", lambda: stand_in)
    if failing == 2:
        with pytest.raises(
            ValueError, match=r"in 2 attempts \(The current node timed out during startup\.\): try again"
        ):
            ray_cluster.connect_to_ray("local").__enter__()
    else:
        with ray_cluster.connect_to_ray("local") as ray:
            assert ray is stand_in and stand_in.left[-1].poll() is None
    assert stand_in.attempts == sorted({*stand_in.attempts}) and len(stand_in.attempts) == min(failing + 1, 2)
    assert not list(empty_temporary_folder.iterdir()) and all(process.wait(5) is not None for process in stand_in.left)


def test_a_local_ray_demands_a_token(empty_temporary_folder, monkeypatch):
    "An unset mode means a token since Ray 2.59; older versions are refused."
    from dml_nb.experiments import ray_cluster

    stand_in = StandIn(0)
    monkeypatch.setattr(ray_cluster, "_import_ray", lambda: stand_in)
    with ray_cluster.connect_to_ray("local"):
        assert "RAY_AUTH_MODE" not in os.environ and len(os.environ["RAY_AUTH_TOKEN"]) == 64


@needs_ray
def test_a_ray_that_demands_no_token_is_refused(monkeypatch):
    import ray

    from dml_nb.experiments import ray_cluster

    monkeypatch.setattr(ray, "__version__", "2.51.1")
    with pytest.raises(ValueError, match="needs Ray 2.59 or later, which demands a token; this is 2.51.1: pip install"):
        ray_cluster.connect_to_ray("local").__enter__()


def test_a_finished_batch_starts_no_cluster(fake, tmp_path, monkeypatch):
    from dml_nb.experiments import ray_cluster

    done, _ = run(["CP + PA K=3"], tmp_path)
    monkeypatch.setattr(ray_cluster, "_import_ray", lambda: pytest.fail("Ray is not needed"))
    again = batch.run_rows([find_rows("CP + PA K=3")[0]], [0], tmp_path, cluster=ray_cluster.Cluster(), **TINY_GLYPHS)
    assert again == (done, [])


@needs_ray
def test_two_nodes_give_the_numbers_of_one_process_though_a_worker_is_killed(
    glyph_folder, tmp_path, nodes, monkeypatch, capsys
):
    from dml_nb.experiments.ray_cluster import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "cache"))
    rows = [find_rows(name)[0] for name in ("CP + PA K=3", "Proxy Anchor", "002-IV/cub-cp-proxy-anchor-loss")]
    asked = dict(dataset=str(glyph_folder), epochs=5, **SMALL)
    jobs = batch.plan_jobs(rows, [0], **asked)
    spread, killed = {}, []
    for i, what in Cluster(nodes).run(jobs, tmp_path / "there", retries=2):
        if not isinstance(what, str):
            spread[i] = what
        elif i == 0 and not killed:
            first = (tmp_path / "there" / jobs[0].rows[0].id).glob
            path = until(lambda first=first: [p for p in first("*/seed0/checkpoint.pt") if epochs_before(p)])[0]
            killed.append(int(what.split("process ")[1].rstrip(")")))
            os.kill(killed[0], signal.SIGKILL)
            before = path.stat().st_size and epochs_before(path)
        elif i == 0:
            known = f"process {killed[0]}) was lost; resumed on", "resumes ", "warning: the training has 15 steps"
            assert any(text in what for text in known), what
    assert len(spread) == 2 and [len(spread[i]) for i in (0, 1)] == [2, 1] and len(killed) == 1
    check_resumed(spread[0][0].folder, before, 5)
    alone, failed = batch.run_rows(rows, [0], tmp_path / "here", **asked)
    numbers = [
        {
            r["row"]: (r["best"], r["last"], r.get("shared_with"))
            for r in (run_store.read_result(p) for p in (tmp_path / side).glob("**/result.json"))
        }
        for side in ("here", "there")
    ]
    assert not failed and len(numbers[0]) == 3 and numbers[0] == numbers[1]


@needs_ray
def test_ctrl_c_ends_a_batch_on_ray_and_leaves_nothing_running(dml_nb, glyph_folder):
    args = ["run", "CP + PA K=3", "--dataset", glyph_folder, *TINY, "--set", "epochs=200", "--cluster", "local"]
    process = start(dml_nb, *args)
    until(lambda: checkpoints(dml_nb.folder), process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command resumes it" in output and "Traceback" not in output, output
    until(lambda: not kernels(dml_nb.folder), seconds=10)
    gone, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    assert checkpoints(dml_nb.folder) and not list(dml_nb.folder.glob("runs/**/result.json"))


@pytest.mark.parametrize(
    "address, message",
    [
        ("127.0.0.1:9", "does not answer"),
        ("nonsense", "expects local, auto or host:port"),
        ("", "expects local, auto or host:port, got ''"),
        (":6379", "expects local, auto or host:port"),
        ("127.0.0.1:99999", "expects local, auto or host:port"),
        ("no.such.host.invalid:6379", "does not answer"),
        ("a..b:6379", "does not answer"),
    ],
)
def test_a_cluster_that_does_not_answer_is_one_clear_sentence(shell, monkeypatch, address, message):
    monkeypatch.setattr(batch, "plan_jobs", lambda *args, **kwargs: pytest.fail("a plan is made too early"))
    started = time.monotonic()
    output = shell("run", "CP + PA", "--dataset", "glyphs", "--backbone", "small_cnn", "--cluster", address, status=1)
    assert message in output and output.count("\n") == 1
    assert time.monotonic() - started < 20


@needs_ray
def test_a_port_that_is_not_rays_is_noticed(shell):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        output = shell(
            "run",
            "CP + PA",
            "--dataset",
            "glyphs",
            "--backbone",
            "small_cnn",
            "--cluster",
            f"127.0.0.1:{server.getsockname()[1]}",
            status=1,
        )
    assert "the cluster at 127.0.0.1" in output and time.monotonic() - started < 25


@pytest.mark.parametrize(
    "args, message",
    [
        (["--num-gpus", "1"], "--num-gpus needs --cluster"),
        (["--set", "cluster=local"], "--set cannot change the cluster"),
        (["--seeds", "0,one"], "--seeds expects whole numbers"),
        (["--dataset", "dogs"], "unknown data set 'dogs'"),
    ],
)
def test_bad_options_of_a_batch(shell, args, message):
    assert message in shell(
        "run",
        "CP + PA",
        *(["--dataset", "glyphs"] if "--dataset" not in args else []),
        "--backbone",
        "small_cnn",
        *args,
        status=1,
    )


def test_missing_data_name_the_command_that_checks_them(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_DATA", str(tmp_path))
    output = shell("run", "CP + PA", "--dataset", "cub", "--backbone", "small_cnn", status=1)
    assert "unpack CUB_200_2011.tgz" in output and "dml_nb data cub" in output


def test_a_batch_ends_at_sigterm_though_its_run_could_finish(tmp_path, monkeypatch, glyph_folder):
    def signalled_at_the_end(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return []

    monkeypatch.setattr(job_module, "run_notebook", signalled_at_the_end)
    before, said = signal.getsignal(signal.SIGTERM), []
    (job,) = batch.plan_jobs(find_rows("CP + PA K=3")[:1], [0], str(glyph_folder), **SMALL)
    with pytest.raises(SystemExit) as stopped:
        job_module.run_job(job, tmp_path, say=said.append)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert "stopped by SIGTERM" in said[-1] and not list(tmp_path.glob("**/failed.json"))


def test_on_fixed_features_a_table_leaves_out_systems_that_train_a_network_of_their_own(capsys):
    rows = [*find_rows("001-T1/cub-hdc"), *find_rows("margin")[:1]]
    runnable = batch._runnable(rows, "glyphs", "small_cnn", "frozen")
    assert runnable == rows[1:]
    assert "left out: 001-T1/cub-hdc: its loss trains several embeddings" in capsys.readouterr().out
