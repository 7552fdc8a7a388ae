"""A step of a loss reads nothing back from a GPU.

A program that reads a value of a GPU tensor waits until the GPU has computed it. The test needs no GPU: it says to the
losses that no tensor is on the CPU, and counts the operations for which a GPU program would wait. These are the reading
of a number, and every operation whose result has a size that depends on values.
"""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dml_nb.core.checks import check_indices, check_labels, check_sample_ids
from dml_nb.losses import create_loss, facility_location, list_losses
from dml_nb.losses.base import takes_ids

B, C, D = 24, 6, 8
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "repeat_interleave")
TRIPLETS = "the number of triplets depends on the values"
# losses that read, with the largest number of reads in a step and what they read
READS = {
    "angular": (1, "the number of classes with a pair"),
    "npair": (1, "the number of classes with a pair"),
    "triplet": (3, TRIPLETS),
    "margin": (3, TRIPLETS),
    "divide_and_conquer": (3, TRIPLETS),
    "htl": (2, TRIPLETS),
    "mic": (3, TRIPLETS),
    "smart_mining": (2, TRIPLETS),
    "quadruplet": (10, "the number of pairs of each kind, and of classes in the batch"),
    "prism": (4, "how many samples are kept, and of which classes"),
    "memvir": (1, "how many past samples there are, because batches can have different sizes"),
    "proxy_synthesis": (2, "how many samples have a partner of another class; λ is drawn on the CPU"),
}


def values_decide_size(name, args):
    "Whether the result of an operation has a size that depends on values."
    if name.lstrip("_").startswith("unique"):
        return True
    masks = args[1] if name.lstrip("_").startswith("index") and "put" in name or name == "index" else ()
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in masks)


class CountReads(TorchDispatchMode):
    "Count the operations that wait for a GPU; numbers in `on_cpu` are free."

    def __init__(self, on_cpu=()):
        super().__init__()
        self.reads, self.on_cpu = Counter(), {number.data_ptr() for number in on_cpu}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        free = name == "_local_scalar_dense" and args[0].data_ptr() in self.on_cpu
        if (name in WAITS or values_decide_size(name, args)) and not free:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def watch_copies(monkeypatch, note):
    "Call `note(name)` at `tolist`, `numpy` and `cpu`, which bypass the dispatcher for a tensor on the CPU."

    def watched(name):
        plain = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            note(name)
            return plain(self, *args, **kwargs)

        return method

    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))


@pytest.fixture
def as_on_gpu(monkeypatch):
    "No tensor is on the CPU; reads are counted."
    reads = Counter()
    watch_copies(monkeypatch, lambda name: reads.update([name]))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    return reads


def counters(loss):
    "The buffers that stay on the CPU when the loss moves to another device."
    moved = dict(copy.deepcopy(loss).to("meta").named_buffers())
    return [buffer for name, buffer in loss.named_buffers() if moved[name].device.type == "cpu"]


def count_step(name, as_on_gpu):
    "Reads of forward, backward and `remember`, in the fourth of four steps."
    torch.manual_seed(0)
    loss = create_loss(name, num_classes=C, embedding_size=D)
    for part in loss.modules():
        if hasattr(part, "start_iteration"):
            part.start_iteration = 0
        if hasattr(part, "gap"):
            part.gap = 0
    loss.set_epoch(100)  # past the start of every schedule
    labels = torch.arange(B) % C
    ids = dict(sample_ids=torch.arange(B)) if takes_ids(loss) else {}
    for _ in range(4):
        embeddings = torch.randn(B, D, requires_grad=True)
        as_on_gpu.clear()
        with CountReads(counters(loss)) as mode:
            loss(embeddings, labels, **ids).backward()
            if hasattr(loss, "remember"):
                loss.remember(embeddings.detach(), labels, **ids)
    return mode.reads + as_on_gpu


@pytest.mark.parametrize("name", [name for name in list_losses() if name != "facility_location"])
def test_a_step_reads_nothing_back(name, as_on_gpu):
    reads, (allowed, reason) = count_step(name, as_on_gpu), READS.get(name, (0, "none"))
    assert reads.total() <= allowed, f"{name} reads {dict(reads)}; known: {allowed}, {reason}"


def test_facility_location_copies_its_distances_once(as_on_gpu, monkeypatch):
    "The search runs on the CPU, so what it reads there is free; distances and labels are copied."
    search = facility_location.worst_clustering

    def on_cpu(*args):
        with torch.utils._python_dispatch._disable_current_modes():
            return search(*args)

    monkeypatch.setattr(facility_location, "worst_clustering", on_cpu)
    assert count_step("facility_location", as_on_gpu) == {"cpu": 2}


def test_the_counter_finds_every_kind_of_read(as_on_gpu):
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    with CountReads() as mode:
        x[mask], x.nonzero(), x.masked_select(mask), x.unique(), x[0].item(), int(x[1]), bool(x[2]), x.tolist()
        x[mask] = torch.zeros(3)
        x[torch.tensor([1])] = 2.0
        x.sum(), x.sort(), x.where(mask, 0), x.index_select(0, torch.tensor([1]))
    assert (mode.reads.total(), as_on_gpu.total()) == (8, 1)


def test_on_a_gpu_the_checks_read_nothing(as_on_gpu):
    "Wrong shapes and types are errors as before; wrong values are not read."
    with CountReads() as mode:
        check_labels(torch.tensor([0, 9]), 2, 3)
        check_sample_ids(torch.tensor([-1]), 1)
        check_indices((torch.tensor([7]),) * 3, (2, 2))
    assert not mode.reads and not as_on_gpu
    with pytest.raises(ValueError, match="labels must have shape"):
        check_labels(torch.tensor([0, 9]), 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_on_a_gpu_wrong_embeddings_make_the_value_nan(bad, as_on_gpu):
    embeddings = torch.randn(B, D)
    embeddings[3, 2] = bad
    for name in ("proxy_anchor", "contrastive", "hard_mining"):
        value = create_loss(name, num_classes=C, embedding_size=D)(embeddings, torch.arange(B) % C)
        assert value.isnan()
