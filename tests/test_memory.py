"Memories over the steps of a training run: another package as oracle, several processes, the largest sizes."

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dml_nb.cross_batch import CrossBatchMemory
from dml_nb.losses import create_loss

C, D, B = 6, 8, 12
MEMORY_LOSSES = {
    "xbm": dict(memory_size=50, start_iteration=0),
    "mcl": dict(memory_size=50),
    "prism": dict(memory_size=50, noise_rate=0.25, window=3),
    "memvir": dict(steps=2, gap=1, start_epoch=0),
    "cp_proxy_anchor": dict(start_epoch=0, capacity=5),
}


def build(name):
    torch.manual_seed(0)
    return create_loss(name, C, D, **MEMORY_LOSSES[name]).double()


def steps(count, size=B):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield torch.randn(size, D, generator=generator, dtype=torch.float64), torch.randint(0, C, (size,), generator=generator)


PAIRS = {
    "contrastive": (dict(variant="pml"), lambda losses: losses.ContrastiveLoss()),
    "multi_similarity": (dict(mining_eps=None), lambda losses: losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)),
    "circle": (dict(), lambda losses: losses.CircleLoss(m=0.4, gamma=80)),
    "triplet": (dict(rule="all", squared=False, reduction="active"), lambda losses: losses.TripletMarginLoss(0.2)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_memory_term_agrees_with_pytorch_metric_learning(name):
    "Value and gradient at every step, through three turns of the ring; theirs is the memory term alone and enqueues inside the loss."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    params, other = PAIRS[name]
    ours = create_loss("xbm", embedding_size=D, pair_loss=name, pair_params=params, memory_size=50, start_iteration=0).double()
    theirs = losses.CrossBatchMemory(other(losses), D, memory_size=50)
    for x, y in steps(13):
        x = torch.nn.functional.normalize(x).requires_grad_()
        values = ours.against_memory(x, y), theirs(x, y)
        grads = [torch.autograd.grad(value, x)[0] for value in values]
        across = [g - (g * x).sum(1, keepdim=True) * x for g in grads]  # ours normalises inside
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-9)
        torch.testing.assert_close(*across, rtol=1e-8, atol=1e-11)
        ours.remember(x, y)


@pytest.mark.parametrize("name", MEMORY_LOSSES)
def test_resumed_in_the_middle_of_a_queue(name, tmp_path):
    "The same values and the same state as without interruption, at every step after a save to disk."
    batches, whole = list(steps(12)), build(name)
    for x, y in batches[:7]:
        whole.remember(x, y)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = build(name)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for x, y in batches[7:]:
        assert resumed(x, y).item() == whole(x, y).item()
        for loss in (whole, resumed):
            loss.remember(x, y)
    same_state(whole, resumed)


def same_state(one, other):
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0, equal_nan=True)


def gathered(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in MEMORY_LOSSES:
        loss = build(name)
        for x, y in steps(9):
            mine = slice(rank * B // 2, (rank + 1) * B // 2)
            loss.remember(gathered(x[mine].contiguous()), gathered(y[mine].contiguous()))
        torch.save(loss.state_dict(), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def test_one_process_and_two_gathering_processes_hold_the_same_queue(tmp_path):
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    for name in MEMORY_LOSSES:
        single = build(name)
        for x, y in steps(9):
            single.remember(x, y)
        for rank in (0, 1):
            twin = build(name)
            twin.load_state_dict(torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True))
            same_state(single, twin)


@pytest.mark.parametrize("dtype, expected", [(torch.float32, 113.5e6), (torch.float16, 57.2e6)])
def test_the_memory_for_stanford_online_products_is_bounded(dtype, expected):
    memory = CrossBatchMemory(55_000, 512, dtype)
    for _ in range(3):
        memory.enqueue(torch.randn(30_000, 512), torch.randint(0, 11_318, (30_000,)))
    assert memory.count == 55_000
    assert sum(b.numel() * b.element_size() for b in memory.buffers()) == pytest.approx(expected, rel=1e-3)
