"One training on two processes has the numbers of one process, for every loss."

import os
import signal
import subprocess
import sys
from contextlib import suppress
from time import perf_counter

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader

from dml_nb.core.distributed import gather, process_rank
from dml_nb.losses import create_loss, list_losses
from dml_nb.losses.base import loss_parameters
from dml_nb.training.checkpoint import Checkpoint, resume
from dml_nb.training.joint_learner import NetworkAndLoss
from dml_nb.training.learner import dml_learner, feature_dls
from dml_nb.training.several_processes import SeveralProcesses, first_process_only, helpers, join_processes, launch

C, D, F, EPOCHS = 6, 8, 16, 2


class InFloat64(nn.Linear):
    "A linear layer in float64, in which equal gradients are not hidden by rounding."

    def __init__(self):
        super().__init__(F, D, dtype=torch.float64)

    def forward(self, x):
        return super().forward(x.double())


class FloatLog(Callback):
    "fastai averages the loss in float32."

    def after_loss(self):
        self.learn.loss = self.loss.float()


def loaders(per_class, evaluated=True):
    images = 48
    labels = torch.arange(images) % C
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(C, F, generator=generator)[labels] + torch.randn(images, F, generator=generator)
    dls = feature_dls(features, labels, features[:12], labels[:12], batch_size=12, per_class=per_class)
    if not evaluated:
        dls.test_labels = labels[:0]
    return dls


def quick_start(name):
    "Parameters with which schedules and memories act within two epochs of four steps."
    small = dict(
        clusters=2, learners=4, start_epoch=1, start_iteration=3, memory_size=30, capacity=3, warm_up=2, steps=2, gap=1
    )
    return {key: value for key, value in small.items() if key in loss_parameters(name)}


def train(name, network=InFloat64, cbs=(), **params):
    "The state of network and loss after a training."
    torch.manual_seed(0)
    loss = create_loss(name, C, D, **quick_start(name), **params).double()
    # a pair loss needs several images of a class; the other losses get random batches
    dls = loaders(2 if "num_classes" not in loss_parameters(name) else None, evaluated=False)
    learn = dml_learner(dls, network(), loss, lr=1e-2, warm_epochs=0, proxy_lr_mult=1, cbs=[FloatLog(), *cbs])
    with learn.no_bar(), learn.no_logging():
        learn.fit_schedule(EPOCHS)
    state = {key: value.clone() for key, value in NetworkAndLoss(learn.model, loss).state_dict().items()}
    flat = torch.cat([value.double().flatten() for value in state.values()]).nan_to_num()
    own_and_others = gather(flat[None])
    assert own_and_others[0].equal(own_and_others[-1]), "the processes differ"
    return state


def train_all():
    return {name: train(name) for name in list_losses()}


@pytest.fixture(scope="module")
def one_and_two():
    torch.set_num_threads(1)
    return train_all(), launch(train_all)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list_losses())
def test_two_processes_train_as_one(name, one_and_two):
    one, two = (states[name] for states in one_and_two)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-6, atol=1e-6, equal_nan=True, msg=f"{name}: {key}")


def dropout_network():
    return nn.Sequential(nn.Linear(F, F), nn.Dropout(0.5), nn.Linear(F, D))


class KeepMasks(Callback):
    "The embeddings of equal inputs, which differ where the masks of dropout do."

    run_valid = False

    def before_batch(self):
        self.learn.xb = (torch.ones_like(self.xb[0]),)

    def after_loss(self):
        self.masked = self.pred.detach()


def train_with_dropout():
    keep = KeepMasks()
    state = train("proxy_synthesis", dropout_network, [keep])  # a loss that draws random numbers
    return state, keep.masked


def test_dropout_differs_between_processes_and_the_draws_of_the_loss_do_not():
    _, masked = launch(train_with_dropout)  # `train` checks that both processes have the same proxies
    assert len(masked) == 12 and not masked[:6].isclose(masked[6:]).all(1).any()


def accumulate():
    return train("cp_proxy_anchor", cbs=[GradientAccumulation(24)])


def test_accumulated_gradients_are_averaged_once():
    torch.testing.assert_close(launch(accumulate), accumulate(), rtol=1e-6, atol=1e-6)


def other_start():
    "As if each process had made its own network."
    torch.manual_seed(process_rank())
    loss = create_loss("proxy_anchor", C, D)
    learn = dml_learner(loaders(None), nn.Linear(F, D), loss, warm_epochs=0)
    with learn.no_bar(), learn.no_logging():
        learn.fit_schedule(1)
    return gather(learn.model.weight[None].detach()), gather(loss.proxies[None].detach()), learn.retrieval_metrics.best


def test_the_first_process_gives_network_and_loss_to_the_others():
    weights, proxies, best = launch(other_start)
    assert weights[0].equal(weights[1]) and proxies[0].equal(proxies[1])
    assert 0 <= best["R@1"] <= 1


def search_rate():
    learn = dml_learner(loaders(None), nn.Linear(F, D), create_loss("contrastive"))
    with pytest.raises(ValueError, match="lr_find works in one process only"):
        learn.lr_find(num_it=2, show_plot=False)
    return True


def test_lr_find_is_refused():
    assert launch(search_rate)


def refused(network, batch_size):
    labels = torch.arange(48) % C
    dls = feature_dls(torch.randn(48, F), labels, torch.randn(12, F), labels[:12], batch_size=batch_size)
    loss = create_loss("contrastive")
    try:
        dml_learner(dls, network, loss, warm_epochs=0).fit(1)
    except ValueError as e:
        return str(e)


def test_what_cannot_be_equal_is_refused_before_the_training():
    with_bn = nn.Sequential(nn.Linear(F, D), nn.BatchNorm1d(D))
    assert "BatchNorm layer 1 takes its statistics from the batch" in launch(refused, with_bn, 12)
    assert "a batch of 13 images cannot be divided among 2 processes" in launch(refused, nn.Linear(F, D), 13)


def test_a_single_process_trains_as_without_the_callback():
    assert SeveralProcesses().run
    assert refused(nn.Sequential(nn.Linear(F, D), nn.BatchNorm1d(D)), 13) is None


class Die(Callback):
    def before_backward(self):
        if process_rank() == 1 and self.iter == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_the_other_dies(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(PORT))
    torch.set_num_threads(1)
    join_processes()
    try:
        train("multi_similarity", cbs=[Die()])
    except Exception as e:
        (folder / "error").write_text(f"{type(e).__name__} {e}", encoding="utf-8")


PORT = 20000 + os.getpid() % 20000


def test_if_a_process_dies_the_other_stops_with_a_sentence(tmp_path):
    context = mp.start_processes(train_until_the_other_dies, (tmp_path,), 2, join=False, start_method="fork")
    started = perf_counter()
    for process in context.processes:
        process.join(60)
    assert perf_counter() - started < 60 and context.processes[1].exitcode == -signal.SIGKILL
    assert "another of the 2 processes has ended or does not answer" in (tmp_path / "error").read_text(encoding="utf-8")


def fail_in_one():
    if process_rank() == 1:
        raise ValueError("a fault of process 1")
    train("multi_similarity")


def test_launch_shows_the_error_of_the_process_that_fails():
    with pytest.raises(Exception, match="a fault of process 1"):
        launch(fail_in_one)


def batch_sizes_after_an_error():
    "The sizes that a loss sees, after another training has failed in these processes."

    def fail(embeddings, labels):
        raise FloatingPointError("a fault of the loss")

    sizes = []

    def watch(embeddings, labels):
        sizes.append(len(embeddings))
        return embeddings.square().sum()

    for loss in (fail, watch):
        with suppress(FloatingPointError):
            dml_learner(loaders(None), nn.Linear(F, D), loss, warm_epochs=0).fit(1)
    return sizes


def test_after_an_error_the_next_training_sees_whole_batches():
    alone, together = batch_sizes_after_an_error(), launch(batch_sizes_after_an_error)
    assert alone == together and alone


def test_launch_of_one_process_is_a_call():
    assert launch(sum, [1, 2], processes=1) == 3


def test_a_process_that_cannot_begin_is_noticed_at_once():
    started = perf_counter()
    with pytest.raises(mp.ProcessExitedException), helpers(Unreadable(), processes=2):
        pass
    assert perf_counter() - started < 60


class Unreadable:
    "A function that no other process can read."

    def __reduce__(self):
        return os._exit, (1,)


SCRIPT = """
import torch
from test_several_processes import train
from dml_nb.core.distributed import process_rank, world_size
torch.set_num_threads(1)
state = train("xbm")
if process_rank() == 0:
    torch.save((world_size(), state), "state.pt")
"""


def test_a_script_under_torchrun(tmp_path, one_and_two):
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | dict(PYTHONPATH=os.path.dirname(__file__), OMP_NUM_THREADS="1")
    done = subprocess.run([*command, "train.py"], cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert not done.returncode, done.stderr.decode()
    world, state = torch.load(tmp_path / "state.pt")
    assert world == 2
    for key, value in one_and_two[0]["xbm"].items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-6)


def read_and_train(name):
    list(DataLoader(range(4), num_workers=1))  # a process that may not have workers would fail
    return train(name)


def test_a_notebook_is_the_first_of_several_processes(one_and_two):
    before = dict(os.environ)
    with helpers(read_and_train, "xbm", processes=2):
        state = train("xbm")
    torch.testing.assert_close(state, one_and_two[1]["xbm"], rtol=0, atol=0)
    assert dict(os.environ) == before and not dist.is_initialized()
    with helpers(train, "xbm", processes=1):
        assert not dist.is_initialized()


def test_a_row_under_torchrun_goes_on_in_the_first_process(monkeypatch):
    assert first_process_only() == 1
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none").items():
        monkeypatch.setenv(name, value)
    assert first_process_only() == 2 and not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        first_process_only()
    assert not stop.value.code
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ValueError, match="the 16 processes are on several machines"):
        first_process_only()


class Stop(Callback):
    "End the training after a step, or after an epoch, as if the processes were killed."

    order = 70  # after `Checkpoint`

    def __init__(self, epoch, step):
        self.at = epoch, step

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == self.at:
            raise KeyboardInterrupt

    def after_epoch(self):
        if (self.epoch, None) == self.at:
            raise KeyboardInterrupt


def resumed(folder, per_class, at):
    "The state of a training that was stopped and resumed."
    for callbacks in ([Stop(*at)], []):
        torch.manual_seed(0)
        loss = create_loss("cp_proxy_anchor", C, D, start_epoch=0).double()
        callbacks += [Checkpoint(folder, minutes=0), FloatLog()]
        learn = dml_learner(loaders(per_class), InFloat64(), loss, lr=1e-2, warm_epochs=0, cbs=callbacks)
        assert bool(resume(learn, folder / "checkpoint.pt", "")) == (Stop not in map(type, callbacks))
        with learn.no_bar(), learn.no_logging(), suppress(KeyboardInterrupt):
            learn.fit_schedule(2)
        if dist.is_initialized():
            dist.barrier()  # the first process writes
    return NetworkAndLoss(learn.model, loss).state_dict()


def resumed_everywhere(folder):
    cases = [(per_class, at) for per_class in (None, 2) for at in ((1, 1), (1, 3), (0, None), (9, 9))]
    return {case: resumed(folder / str(number), *case) for number, case in enumerate(cases)}


@pytest.mark.parametrize("start", [lambda function, *args: function(*args), launch], ids=["one", "two"])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(start, tmp_path):
    states = start(resumed_everywhere, tmp_path)
    for per_class, at in states:
        torch.testing.assert_close(states[per_class, at], states[per_class, (9, 9)], rtol=0, atol=0)
