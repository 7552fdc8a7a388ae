"""A training that is interrupted anywhere continues with the same numbers: exceptions, signals, damaged files, NaN."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from torch import nn

import dml_nb.training.checkpoint as checkpoint_module
from dml_nb.losses import create_loss, list_losses
from dml_nb.models import create_embedder
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.training.checkpoint import Checkpoint, read_checkpoint, resume
from dml_nb.training.learner import dml_learner, feature_dls, image_dls

pytestmark = pytest.mark.filterwarnings(
    "ignore:the training has", "ignore:the backbone is frozen", "ignore:CUDA is not"
)

C, D, EPOCHS, STEPS = 6, 8, 2, 4
EARLY = dict(
    di=dict(clusters=2), cp=dict(start_epoch=1), xb=dict(start_iteration=2), me=dict(start_epoch=1)
)  # by the start of the name


def silent(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def new_learner(loss="cp_proxy_anchor", per_class=None, model=None, **options):
    "Random features of six classes of eight, four batches an epoch."
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(C).repeat_interleave(8)
    x = torch.randn(C, 16, generator=generator)[y] + 0.8 * torch.randn(len(y), 16, generator=generator)
    loss = create_loss(loss, num_classes=C, embedding_size=D, **EARLY.get(loss[:2], {}))
    options = dict(lr=1e-2, proxy_lr_mult=1.0, warm_epochs=0) | options
    dls = feature_dls(x, y, x, y, 12, per_class=per_class)
    return silent(dml_learner(dls, EmbeddingHead(16, D) if model is None else model, loss, **options))


@pytest.fixture
def photos(draw_photos):
    "Eight classes of three small pictures."
    return draw_photos()


def photo_learner(photos, workers, **options):
    "Three batches an epoch, with dropout, which draws from torch's global random numbers."
    torch.manual_seed(0)
    model = create_embedder("small_cnn", D, pretrained=False)
    model.head = nn.Sequential(nn.Dropout(0.5), model.head) if hasattr(model, "head") else model.head
    loss = create_loss("cp_proxy_anchor", num_classes=len(photos.train.classes), embedding_size=D, start_epoch=1)
    return silent(dml_learner(image_dls(photos, model.spec, 4, workers=workers), model, loss, lr=1e-3, **options))


class At(Callback):
    "Do something after one training step."

    order = 80

    def __init__(self, epoch, step, action):
        self.at, self.action = (epoch, step), action

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == self.at:
            self.action()


class Killed(Exception):
    pass


def kill():
    raise Killed("here")


def result(learn):
    "Network, loss, optimiser and history without times."
    history = [{k: v for k, v in line.items() if "seconds" not in k} for line in learn.retrieval_metrics.history]
    return [learn.model.state_dict(), learn.loss_func.state_dict(), learn.opt.state_dict()["state"], history]


def same(a, b):
    "Bitwise; NaN is equal to NaN."
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy(), equal_nan=a.is_floating_point())
    return a == b or (a != a and b != b)


# the middle of an epoch


@pytest.mark.parametrize("per_class", [None, 4])
@pytest.mark.parametrize("loss", list_losses())
def test_every_loss_continues_after_any_step(loss, per_class, tmp_path):
    draw = random.Random(f"{loss} {per_class}")
    epoch, step = draw.randrange(EPOCHS), draw.randrange(STEPS)
    kept = tmp_path / "kept.pt"
    keep = At(epoch, step, lambda: shutil.copyfile(tmp_path / "checkpoint.pt", kept))
    whole, resumed = new_learner(loss, per_class), new_learner(loss, per_class)
    whole.fit_one_cycle(EPOCHS, cbs=[Checkpoint(tmp_path, minutes=0), keep])
    torch.rand(7), np.random.rand(7), random.random()
    resume(resumed, kept, "")
    resumed.fit_one_cycle(EPOCHS)
    assert same(result(whole), result(resumed)), (epoch, step)


@pytest.mark.parametrize("how, step", [("fit", 0), ("fit_schedule", 2), ("fit_one_cycle", 3)])
def test_a_training_that_is_killed_twice_equals_one_without_interruption(how, step, tmp_path, capsys):
    whole = new_learner()
    getattr(whole, how)(3)
    for epoch in (0, 2):
        broken = new_learner()
        resume(broken, tmp_path / "checkpoint.pt", "")
        with pytest.raises(Killed):
            getattr(broken, how)(3, cbs=[Checkpoint(tmp_path, minutes=0), At(epoch, step, kill)])
    resumed = new_learner()
    resume(resumed, tmp_path / "checkpoint.pt", "")
    position = f"in epoch 2 after batch {step + 1} of 4" if step < 3 else "at the evaluation of epoch 2"
    assert f"resumes {position} (" in capsys.readouterr().out
    getattr(resumed, how)(3)
    assert same(result(whole), result(resumed))
    steps = [learn.train_iter for learn in (whole, resumed)]
    assert steps[0] == steps[1] == 12 and whole.recorder.values[-1] == resumed.recorder.values[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_with_dropout_and_workers_continue_within_an_epoch(workers, photos, tmp_path):
    whole, broken, resumed = (photo_learner(photos, each) for each in (0, workers, workers))
    whole.fit(2)
    with pytest.raises(Killed):
        broken.fit(2, cbs=[Checkpoint(tmp_path, minutes=0), At(1, 1, kill)])
    resume(resumed, tmp_path / "checkpoint.pt", "")
    resumed.fit(2)
    assert same(result(whole), result(resumed))


def test_a_checkpoint_waits_for_accumulated_gradients_and_keeps_the_scale_of_half_precision(tmp_path, monkeypatch):
    on_cpu = lambda device, **kwargs: torch.amp.GradScaler("cpu", growth_interval=1, **kwargs)  # noqa: E731
    monkeypatch.setattr("fastai.callback.fp16.GradScaler", on_cpu)
    whole, broken, resumed = (new_learner(cbs=[MixedPrecision(), GradientAccumulation(24)]) for _ in range(3))
    whole.fit(2)
    with pytest.raises(Killed):
        broken.fit(2, cbs=[Checkpoint(tmp_path, minutes=0), At(1, 2, kill)])
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["batch"] == 2 and state["scaler"]["scale"] > 2**16
    resume(resumed, tmp_path / "checkpoint.pt", "")
    resumed.fit(2)
    assert same(result(whole), result(resumed))


def test_the_next_training_of_a_resumed_learner_begins_at_the_first_batch(tmp_path):
    learn, other = new_learner("proxy_anchor"), new_learner("proxy_anchor")
    with pytest.raises(Killed):
        learn.fit(1, cbs=[Checkpoint(tmp_path, minutes=0), At(0, 1, kill)])
    resume(other, tmp_path / "checkpoint.pt", "")
    other.fit(1)
    before = other.opt.state_dict()["state"][0]["step"].item()
    other.fit(1)
    assert other.opt.state_dict()["state"][0]["step"].item() == before + STEPS == 2 * STEPS


# evaluation


class Evaluations(Callback):
    order = 80
    stop = True

    def before_validate(self):
        if self.stop and self.epoch == 1:
            raise Killed("here")


def test_a_kill_during_the_evaluation_loses_no_training_and_seconds_add_up(tmp_path, capsys):
    whole, broken, resumed = (new_learner() for _ in range(3))
    whole.fit(3)
    with pytest.raises(Killed):
        broken.fit(3, cbs=[Checkpoint(tmp_path), Evaluations()])
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    assert (state["epoch"], state["batch"], len(state["history"])) == (0, STEPS, 1)
    steps = At(1, 0, kill)  # the epoch is not trained again
    resume(resumed, tmp_path / "checkpoint.pt", "")
    assert "resumes at the evaluation of epoch 1 (" in capsys.readouterr().out
    resumed.fit(3, cbs=[Checkpoint(tmp_path), steps])
    assert same(result(whole), result(resumed))
    lines = resumed.retrieval_metrics.history
    assert lines[0] == broken.retrieval_metrics.history[0] and lines[1]["train_seconds"] >= state["seconds"] > 0


def test_looking_at_a_learner_writes_no_checkpoint(tmp_path):
    learn = new_learner(cbs=[Checkpoint(tmp_path, minutes=0)])
    learn.path = tmp_path
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=10)
    assert not list(tmp_path.glob("*.pt"))


# signals


SCRIPT = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import numpy, sklearn.cluster, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from dml_nb.losses import create_loss
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.training.checkpoint import Checkpoint, resume
from dml_nb.training.learner import dml_learner, feature_dls

warnings.simplefilter("ignore")
folder, epochs = Path(sys.argv[1]), 20


class Slow(Callback):
    def after_batch(self):
        time.sleep(0.03)


def train(name, cbs=()):
    torch.manual_seed(0)
    y = torch.arange(48) % 6
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    loss = create_loss("cp_proxy_anchor", num_classes=6, embedding_size=8, start_epoch=2)
    learn = dml_learner(feature_dls(x, y, x, y, 12), EmbeddingHead(16, 8), loss, lr=1e-2, evaluate_every=4)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    if cbs:
        resume(learn, folder / "checkpoint.pt", "")
    learn.fit_schedule(epochs, "cosine", cbs=cbs)
    history = [{k: v for k, v in line.items() if "seconds" not in k} for line in learn.retrieval_metrics.history]
    torch.save([learn.model.state_dict(), learn.loss_func.state_dict(), history], folder / name)


def child(*args):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            train(*args)
        except SystemExit as e:
            os._exit(e.code)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


draw, kills, statuses = random.Random(int(sys.argv[2])), 0, []
while True:
    pid = child("killed.pt", [Checkpoint(folder, minutes=0.001), Slow()])
    if kills < 20:
        time.sleep(draw.uniform(0.05, 0.5))
        os.kill(pid, draw.choice([signal.SIGKILL, signal.SIGTERM]))
    status = os.waitpid(pid, 0)[1]
    kills += status != 0
    statuses.append(os.waitstatus_to_exitcode(status))
    if status == 0:
        break
os.waitpid(child("whole.pt"), 0)
print(*statuses)
"""


def test_twenty_kills_of_a_process_change_no_number(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, tmp_path / "script.py", tmp_path, "0"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    *killed, last = done.stdout.split()
    assert last == "0" and len(killed) >= 10, done.stdout + done.stderr[-2000:]
    assert set(killed) <= {"-9", "143", "-15"} and "143" in killed and "-9" in killed  # -15: before the training began
    assert same(*(torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("killed", "whole")))
    assert not list(tmp_path.glob("*.tmp")) or "-9" in killed


@pytest.mark.parametrize("when", ["batch", "train", "evaluation", "search"])
def test_sigterm_saves_at_the_end_of_the_step_and_exits_with_143(when, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731

    class Terminate(Callback):
        order = 80

        def before_validate(self):
            terminate()

    cbs = dict(batch=At(1, 1, terminate), train=At(1, STEPS - 1, terminate), evaluation=Terminate())
    learn = new_learner(cbs=[Checkpoint(tmp_path)])
    learn.path = tmp_path
    with pytest.raises(SystemExit) as stopped:
        if when == "search":
            learn.add_cb(At(0, 1, terminate))
            learn.lr_find(show_plot=False, num_it=50)
        else:
            learn.fit(3, cbs=[cbs[when]])
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    if when != "search":
        state = read_checkpoint(tmp_path / "checkpoint.pt")
        expected = dict(batch=(0, 3), train=(0, 4), evaluation=(-1, 4))[when]
        assert (state["epoch"], state["batch"]) == expected
    assert "stopped by SIGTERM" in capsys.readouterr().out


GROUP = """
import sys, time
from pathlib import Path
from dml_nb.data.folders import load_folder
from test_checkpoint import At, Checkpoint, photo_learner

def wait():
    print("ready", flush=True)
    end = time.monotonic() + 20
    while not checkpoint.must_stop and time.monotonic() < end:
        pass  # the step is interrupted while it computes

folder = Path(sys.argv[1])
checkpoint, in_step = Checkpoint(folder), At(1, 1, wait)
in_step.order = 0
photo_learner(load_folder(folder / "photos"), 2).fit(2, cbs=[checkpoint, in_step])
"""


def test_sigterm_to_all_processes_of_a_training_with_workers_saves_the_step(photos, tmp_path):
    environment = os.environ | dict(PYTHONPATH=str(Path(__file__).parent), PYTHONWARNINGS="ignore")
    process = subprocess.Popen(
        [sys.executable, "-c", GROUP, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env=environment,
        start_new_session=True,
    )
    while "ready" not in (line := process.stdout.readline()):
        assert line, process.wait()
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "stopped by SIGTERM" in output, output[-2000:]
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    assert (state["epoch"], state["batch"]) == (0, 2)


# damaged files and full disks


def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(tmp_path, capsys):
    whole, broken = new_learner(), new_learner()
    whole.fit(3)
    with pytest.raises(Killed):
        broken.fit(3, cbs=[Checkpoint(tmp_path, minutes=0), At(2, 1, kill)])
    file, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt"
    content = file.read_bytes()
    for damaged in (content[:1000], content[:-1] + bytes([content[-1] ^ 1]), b"", b"another file"):
        shutil.copyfile(previous, tmp_path / "kept.pt")
        file.write_bytes(damaged)
        resumed = new_learner()
        assert resume(resumed, file, "") == 2
        out = capsys.readouterr().out
        assert f"the checkpoint {file} is damaged, so the previous one is used" in out and "after batch 1 of 4" in out
        shutil.copyfile(tmp_path / "kept.pt", previous)
    resumed.fit(3)
    assert same(result(whole), result(resumed))
    for each in (file, previous):
        each.write_bytes(b"half")
    with pytest.raises(ValueError, match="previous.pt is damaged: delete it"):
        resume(new_learner(), file, "")


def test_a_full_disk_stops_the_training_with_a_sentence_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    learn = new_learner()
    with pytest.raises(Killed):
        learn.fit(3, cbs=[Checkpoint(tmp_path), At(1, 1, kill)])
    before = (tmp_path / "checkpoint.pt").read_bytes()
    files = {path.name for path in tmp_path.iterdir()}

    def full(self, data):
        self.open("wb").write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    again = new_learner()
    resume(again, tmp_path / "checkpoint.pt", "")
    with pytest.raises(OSError, match=r"checkpoint.pt cannot be written \(No space left on device\): free some space"):
        again.fit(3, cbs=[Checkpoint(tmp_path)])
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == files


def test_a_file_system_without_links_keeps_two_checkpoints(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(checkpoint_module.os, "link", no_links)
    new_learner().fit(2, cbs=[Checkpoint(tmp_path)])
    states = [read_checkpoint(tmp_path / name) for name in ("checkpoint.previous.pt", "checkpoint.pt")]
    assert [(state["epoch"], state["batch"]) for state in states] == [(0, STEPS), (1, 0)]


# values that are not finite


class Spoil(nn.Module):
    "A head whose output or gradient becomes NaN at one step."

    def __init__(self, step, forward):
        super().__init__()
        self.head, self.step, self.in_forward, self.seen = EmbeddingHead(16, D), step, forward, 0

    def forward(self, x):
        z = self.head(x)
        if self.training:
            self.seen += 1
            if self.seen == self.step + 1:
                if self.in_forward:
                    return z * float("nan")
                z.register_hook(lambda gradient: gradient * float("nan"))
        return z


@pytest.mark.parametrize("where", ["embedding", "loss", "weight"])
def test_nan_names_step_images_and_the_last_good_checkpoint(where, tmp_path):
    step = STEPS + 1
    learn = new_learner("proxy_anchor", model=Spoil(step if where != "loss" else 99, where == "embedding"))
    checkpoint = Checkpoint(tmp_path, minutes=0 if where == "weight" else 10)
    proxies = learn.loss_func.proxies
    poison = At(1, 0, lambda: proxies.data.fill_(float("nan")))
    with pytest.raises(FloatingPointError) as error:
        learn.fit(3, cbs=[checkpoint, *([poison] if where == "loss" else [])])
    text = str(error.value)
    ids = list(learn.dls.train.sampler)[1]
    name = dict(embedding="an embedding", loss="the loss", weight="a weight")[where]
    assert f"{name} is NaN or infinite in epoch 1 at step 1, with the training images {ids}:" in text
    assert f"the last good checkpoint is {tmp_path / 'checkpoint.pt'}." in text
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    assert all(value.isfinite().all() for part in ("model", "loss") for value in state[part].values())
    assert (state["epoch"], state["batch"]) == ((0, 1) if where == "weight" else (0, 0))


def test_losses_on_a_gpu_are_tested_before_a_checkpoint_is_written(tmp_path):
    class Rarely(Callback):
        order = 70

        def before_train(self):
            self.learn.check_finite.every = 50  # as on a GPU

    learn = new_learner("proxy_anchor", cbs=[Rarely()])
    poison = At(1, 0, lambda: learn.loss_func.proxies.data.fill_(float("nan")))
    with pytest.raises((FloatingPointError, ValueError)):
        learn.fit(3, cbs=[Checkpoint(tmp_path), poison])
    assert read_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 0


def test_too_little_memory_says_what_to_lower():
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(
        torch.OutOfMemoryError, match=r"(?s)for a batch of 12 images: lower batch_size.*Tried to allocate"
    ):
        new_learner("proxy_anchor").fit(1, cbs=[At(0, 1, out_of_memory)])


# the lock of fastai


@pytest.mark.parametrize("look", ["validate", "get_preds"])
def test_an_error_before_an_evaluation_leaves_no_lock(look):
    class Refuse(Callback):
        def before_fit(self):
            raise ValueError("not like this")

    learn, logger = new_learner(), None
    logger = learn.logger
    for _ in range(2):
        with pytest.raises(ValueError, match="not like this"):
            getattr(learn, look)(cbs=[Refuse()])
        assert not learn.lock.locked() and learn.logger is logger and not hasattr(learn, "refuse")
    getattr(learn, look)()


def test_the_message_of_a_resumed_run_is_printed_once(tmp_path, capsys):
    new_learner().fit(2, cbs=[Checkpoint(tmp_path)])
    resume(new_learner(), tmp_path / "checkpoint.pt", "")
    assert len(re.findall("resumes", capsys.readouterr().out)) == 1
