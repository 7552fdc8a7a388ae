"Loaders: workers that persist, epochs that continue in the middle, and the number of processes."

import copy
import gc
import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from torch.utils.data import Subset

from dml_nb.data import loaders
from dml_nb.data.folders import load_folder
from dml_nb.data.loaders import TensorSet, eval_loader, set_epoch, train_loader, usable_cpus
from dml_nb.data.samplers import BalancedSampler, ClassSampler, EpochSampler, HardClassSampler, RankSampler
from dml_nb.models.input_spec import IMAGENET, image_transform
from dml_nb.training.batches import image_dls

SPEC = IMAGENET.resized(32)


@pytest.fixture(scope="module")
def photos(glyph_folder):
    return load_folder(glyph_folder)


@pytest.fixture(scope="module")
def images(photos):
    return photos.train.with_transform(image_transform(SPEC, train=True))


def assert_same_images(loader, other):
    for (x, _), (again, _) in zip(loader, other, strict=True):
        assert torch.equal(x, again)


def samplers(labels):
    proxies = torch.randn(int(labels.max()) + 1, 4, generator=torch.Generator().manual_seed(0))
    return dict(
        random=EpochSampler(len(labels), 12),
        chunks=ClassSampler(labels, 12, 4),
        balanced=BalancedSampler(labels, 12, 4, replacement=True),
        hard=HardClassSampler(labels, 12, 4, lambda: proxies.normal_()),  # other proxies at each call
        rank=RankSampler(ClassSampler(labels, 24, 6), 1, 2),
    )


# the middle of an epoch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["random", "chunks", "balanced", "hard", "rank"])
def test_a_loader_continues_in_the_middle_of_an_epoch(name, workers, images, tmp_path):
    loader = train_loader(images, 12, 3, workers, samplers(images.labels)[name])
    set_epoch(loader, 4)
    batches, whole = iter(loader), []
    for _ in range(2):
        whole.append(next(batches))
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    whole += batches
    assert len(whole) == len(loader) > 2

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    later = train_loader(images, 12, 3, workers, samplers(images.labels)[name])
    later.load_state_dict(state)
    set_epoch(later, 4)  # as the training does when it enters the epoch
    assert len(later) == len(whole) - 2
    for (x, y), (again, labels) in zip(whole[2:], later, strict=True):
        assert torch.equal(x, again) and torch.equal(y, labels)
    if name != "hard":  # whose proxies have changed
        for each in (loader, later):
            set_epoch(each, 5)
        assert_same_images(loader, later)


def test_the_state_counts_batches_given_not_those_prepared_in_advance(images):
    loader = train_loader(images, 12, workers=2)
    assert loader.state_dict()["batch"] == 0
    batches = iter(loader)
    for given in range(1, 4):
        next(batches)
        assert loader.state_dict()["batch"] == given
    set_epoch(loader, 1)
    assert loader.state_dict() == dict(batch=0, sampler=dict(epoch=1))
    list(loader)
    assert loader.state_dict()["batch"] == len(loader)


# worker processes


def test_workers_persist_between_epochs_and_see_each_epoch(images):
    loader, alone = train_loader(images, 12, workers=2), train_loader(images, 12)
    processes = []
    for epoch in (0, 1, 5):
        for each in (loader, alone):
            set_epoch(each, epoch)
        assert_same_images(loader, alone)
        processes.append([worker.pid for worker in loader._iterator._workers])
    assert processes[0] == processes[1] == processes[2]


def test_an_epoch_that_is_left_early_does_not_disturb_the_next(images):
    loader, alone = train_loader(images, 12, workers=2), train_loader(images, 12)
    next(iter(loader))
    for each in (loader, alone):
        set_epoch(each, 1)
    assert_same_images(loader, alone)


def test_workers_of_a_loader_that_is_no_longer_used_end(images):
    loader = eval_loader(images, 12, workers=2)
    list(loader)
    workers = [psutil.Process(worker.pid) for worker in loader._iterator._workers]
    del loader
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_a_copy_of_a_loader_with_running_workers_starts_its_own(images):
    loader = train_loader(images, 12, workers=1)
    x, _ = next(iter(loader))
    assert torch.equal(next(iter(copy.deepcopy(loader)))[0], x)


CTRL_C = """
import sys, time, torch
from dml_nb.data.loaders import TensorSet, train_loader

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, i):
        time.sleep(0.02)
        return torch.zeros(3), 0

try:
    for n, _ in enumerate(train_loader(Slow(), 2, workers=2)):
        if n == 2:
            print("running", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups of POSIX")
def test_ctrl_c_is_left_to_the_training_process():
    process = subprocess.Popen(
        [sys.executable, "-c", CTRL_C],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "running\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert out == "interrupted\n"
    assert "Traceback" not in err and process.returncode == 0


# number of processes


def test_the_number_of_workers_follows_what_the_process_may_use(monkeypatch):
    cpus = usable_cpus()
    assert 1 <= cpus <= os.cpu_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # processes of one training
    assert usable_cpus() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # set for a task of a scheduler
    assert usable_cpus() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity of Linux")
def test_a_process_that_is_bound_to_one_cpu_starts_one_worker(images):
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(bound)})
    try:
        assert train_loader(images, 12, workers=None).num_workers == 1
    finally:
        os.sched_setaffinity(0, bound)


# bytes


def test_bytes_leave_the_workers_and_floats_reach_the_network(photos):
    dls = image_dls(photos, SPEC, 12, workers=1)
    for loader in (dls.train, dls.valid, dls.test_dl(photos.test), eval_loader(Subset(dls.test_plain, [3, 1]))):
        assert loader.dataset[(0, [(0, 0)])][0].dtype == torch.uint8
        assert loader.one_batch()[0].dtype == next(iter(loader))[0].dtype == torch.float32
    centre = photos.test.with_transform(image_transform(SPEC))
    x = torch.stack([centre[i][0] for i in (3, 1)])
    assert torch.equal(eval_loader(Subset(dls.test_plain, [3, 1])).one_batch()[0], x)
    assert torch.equal(dls.valid.one_batch()[0][[3, 1]], x)


def test_the_crops_of_stored_runs_stay_the_same(photos):
    "Pixels of a batch as they were when the workers converted them to floats."
    whole = photos.train.with_transform(image_transform(SPEC, train=True))
    now, before = image_dls(photos, SPEC, 12, seed=2).train, train_loader(whole, 12, 2)
    for loader in (now, before):
        set_epoch(loader, 3)
    for (x, _), (y, _) in zip(now, before, strict=True):
        assert torch.equal(x, y)


def test_workers_of_a_loader_that_the_garbage_collector_finds_are_ended(monkeypatch):
    ended, end_workers = [], loaders._end_workers
    monkeypatch.setattr(loaders, "_end_workers", lambda *args: (ended.extend(args[0]), end_workers(*args)))
    loader = train_loader(TensorSet(torch.zeros(8, 3), torch.arange(8) % 2), 4, workers=2)
    for _ in range(2):  # the second epoch has the same workers
        next(iter(loader))
    cycle = [loader]
    cycle.append(cycle)
    del loader, cycle
    gc.collect()
    assert len(ended) == 2 and not any(worker.is_alive() for worker in ended)
