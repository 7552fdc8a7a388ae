"Losses with a memory over several training steps: agreement with another package, several processes, large sizes."

import warnings
from multiprocessing import set_forkserver_preload
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dml_nb.core.batch_memory import CrossBatchMemory
from dml_nb.core.distributed import gather, own_rows
from dml_nb.losses import create_loss, list_losses
from dml_nb.losses.base import takes_ids
from dml_nb.losses.memvir import QUEUE_BYTES
from dml_nb.losses.pair_base import PairLoss
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.training.learner import FeedMemory, dml_learner, feature_dls

C, D, B = 6, 8, 12
MEMORY_LOSSES = {
    "xbm": dict(memory_size=50, start_iteration=0),
    "mcl": dict(memory_size=50),
    "prism": dict(memory_size=50, noise_rate=0.25, window=3),
    "memvir": dict(steps=2, gap=1, start_epoch=0),
    "cp_proxy_anchor": dict(start_epoch=0, capacity=5),
    "cp_proxy_nca": dict(start_epoch=0, capacity=5),
}


def build(name):
    torch.manual_seed(0)
    return create_loss(name, C, D, **MEMORY_LOSSES[name]).double()


def steps(count, size=B):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield (
            torch.randn(size, D, generator=generator, dtype=torch.float64),
            torch.randint(0, C, (size,), generator=generator),
        )


PAIRS = {
    "contrastive": (dict(variant="pml"), lambda losses: losses.ContrastiveLoss()),
    "multi_similarity": (dict(mining_eps=None), lambda losses: losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)),
    "circle": (dict(), lambda losses: losses.CircleLoss(m=0.4, gamma=80)),
    "triplet": (dict(rule="all", squared=False, reduction="active"), lambda losses: losses.TripletMarginLoss(0.2)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_memory_term_agrees_with_pytorch_metric_learning(name):
    """Value and gradient agree at every step, while the ring buffer is filled three times.

    Their loss consists of the memory term alone and enqueues the batch itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = pytest.importorskip(
            "pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed"
        )
    params, other = PAIRS[name]
    ours = create_loss(
        "xbm", embedding_size=D, pair_loss=name, pair_params=params, memory_size=50, start_iteration=0
    ).double()
    theirs = losses.CrossBatchMemory(other(losses), D, memory_size=50)
    for x, y in steps(13):
        x = torch.nn.functional.normalize(x).requires_grad_()
        values = ours.memory_term(x, y), theirs(x, y)
        grads = [torch.autograd.grad(value, x)[0] for value in values]
        across = [g - (g * x).sum(1, keepdim=True) * x for g in grads]  # our loss normalises inside
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-9)
        torch.testing.assert_close(*across, rtol=1e-8, atol=1e-11)
        ours.remember(x, y)


@pytest.mark.parametrize("name", MEMORY_LOSSES)
def test_resuming_in_the_middle_of_a_queue(name, tmp_path):
    "After a save to disk, every step gives the same value and the same state as without an interruption."
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


def against_references():
    "Pair losses that can be compared with a memory, and options that depend on the batch being the references."
    for name in list_losses():
        if name not in ("xbm", "mcl", "prism"):
            try:
                create_loss("xbm", C, D, pair_loss=name)
            except ValueError as error:
                assert "cannot be compared with a memory" in str(error) or not isinstance(
                    create_loss(name, C, D), PairLoss
                )
            else:
                yield name, {}
    yield "circle", dict(scope="batch")
    yield "triplet", dict(rule="all", reduction="active")


@pytest.mark.parametrize("name, params", against_references(), ids=str)
def test_a_memory_as_large_as_the_batch_is_not_mistaken_for_the_batch(name, params):
    "The memory term equals the pair loss with the stored entries as references."
    loss = create_loss(
        "xbm", C, D, pair_loss=name, pair_params=params, start_iteration=0, enqueue="after", self_eps=None
    ).double()
    (old, y), (x, _) = steps(2)
    loss.remember(old, y)
    torch.manual_seed(0)
    value = loss(x, y)
    torch.manual_seed(0)
    assert value.item() == pytest.approx(
        (loss.pair_loss(x, y) + loss.pair_loss(x, y, ref_emb=old, ref_labels=y)).item(), rel=1e-9
    )


def test_a_loss_that_needs_the_batch_as_its_references_raises_an_error_at_once():
    with pytest.raises(ValueError, match="each_pair_once needs the batch"):
        create_loss("xbm", C, D, pair_loss="triplet", pair_params=dict(each_pair_once=True))


# in a training run


def train(loss, epochs=3, cbs=(), **params):
    "Train on classes of five images with four per batch, so that the sampler repeats some images."
    x, y = torch.randn(60, 16, generator=torch.Generator().manual_seed(3)), torch.arange(60) // 5 % 12
    torch.manual_seed(0)
    learn = dml_learner(
        feature_dls(x, y, x, y, batch_size=16, per_class=4), EmbeddingHead(16, D), loss, lr=1e-3, cbs=cbs, **params
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit_schedule(epochs)
    return learn, y


@pytest.mark.parametrize("name", ["xbm", "mcl", "prism"])
@pytest.mark.parametrize("in_sum", [False, True])
def test_training_passes_sample_ids_to_the_loss(name, in_sum):
    params = {key: value for key, value in MEMORY_LOSSES[name].items() if key != "memory_size"}
    loss = (
        create_loss({name: 1.0, "norm_softmax": 0.5}, 12, D, **{name: params})
        if in_sum
        else create_loss(name, 12, D, **params)
    )
    part, seen, references = loss.losses[name] if in_sum else loss, [], []
    plain, against = part.remember, part.memory_pairs

    def remember(embeddings, labels, sample_ids):
        seen.append(sample_ids)
        plain(embeddings, labels, sample_ids)

    def watched(embeddings, labels, sample_ids):
        sim_BN, pos_BN, neg_BN = against(embeddings, labels, sample_ids)
        ids_N = (
            torch.cat([part.memory.entries()[2], sample_ids]) if part.enqueue == "before" else part.memory.entries()[2]
        )
        references.append((pos_BN & (sample_ids[:, None] == ids_N)).sum().item())
        return sim_BN, pos_BN, neg_BN

    part.remember, part.memory_pairs = remember, watched
    assert takes_ids(loss)
    _, y = train(loss)
    _, labels, ids = part.memory.entries()
    assert (y[ids] == labels).all() and len(ids) > 60
    assert torch.cat(seen[:3]).tolist() != torch.cat(seen[3:6]).tolist()  # each epoch has other batches
    assert max(len(batch) - len(batch.unique()) for batch in seen) > 0  # some batch contains an image twice
    assert len(references) == 9 and sum(references) == 0  # an anchor's own image is never its positive


def test_losses_without_a_memory_get_no_sample_ids():
    class Plain(torch.nn.Module):
        def forward(self, embeddings, labels):
            return (embeddings.sum(1) - labels).square().mean()

    assert len(train(Plain())[0].retrieval_metrics.history) == 3
    assert len(train(create_loss("cp_proxy_anchor", 12, D, start_epoch=1))[0].retrieval_metrics.history) == 3


def test_a_memory_that_would_never_be_used_raises_an_error():
    with pytest.raises(ValueError, match="start_iteration 1000 is never reached in 9 steps"):
        train(create_loss({"xbm": 1.0, "norm_softmax": 1.0}, 12, D))
    with pytest.raises(ValueError, match="start_epoch 40 is never reached in 3 epochs"):
        train(create_loss("memvir", 12, D))


# several processes


def join_two_processes(rank, folder):
    "Start communication; return the rows of the batch that this process gets."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    return slice(0, 5) if rank == 0 else slice(5, B)  # parts of different lengths


def run_one_of_two_processes(rank, folder):
    mine, found = join_two_processes(rank, folder), {}
    for name in MEMORY_LOSSES:
        loss, callback = build(name), FeedMemory()
        for step, (x, y) in enumerate(steps(9)):
            x, ids = (
                x.float().double(),
                (torch.arange(B) + 3 * step,) if takes_ids(loss) else (),
            )  # the callback passes float32 to the memory
            part = [each[mine] for each in (x, y, *ids)]
            assert gather(part[0]).equal(x) and gather(part[1]).equal(y) and own_rows(part[0]) == mine
            if name in ("xbm", "prism"):
                found[name, step] = loss.memory_term(*part[:2], sample_ids=part[2]).item() * len(part[0]) / B
            if name == "prism":
                loss(*part[:2], sample_ids=part[2])
                found["kept", step] = loss.last_active
            if name.startswith("cp_"):
                loss(*part[:2])
            callback.learn = SimpleNamespace(
                training=True,
                loss_func=loss,
                pred=part[0],
                yb=(part[1], None, None, None, part[2]) if ids else (part[1],),
            )
            callback.after_batch()
        torch.save(loss.state_dict(), f"{folder}/{name}-{rank}.pt")
        if name == "memvir":
            x, y = next(steps(1))
            half = slice(0, 6) if rank == 0 else slice(6, B)
            found["gradient"] = torch.autograd.grad(loss(x[half], y[half]), loss.proxies)[0]
    torch.save(found, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    "States, memory terms and PRISM's selections agree, with batches of different size in the two processes."
    set_forkserver_preload(["dml_nb.training.learner"])  # both processes share the time of importing it
    mp.start_processes(run_one_of_two_processes, (str(tmp_path),), nprocs=2, start_method="forkserver")
    found = [torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1)]
    for name in MEMORY_LOSSES:
        single = build(name)
        for step, (x, y) in enumerate(steps(9)):
            x, ids = x.float().double(), (torch.arange(B) + 3 * step,) if takes_ids(single) else ()
            if name in ("xbm", "prism"):
                assert sum(part[name, step] for part in found) == pytest.approx(
                    single.memory_term(x, y, sample_ids=ids[0]).item(), rel=1e-6
                )
            if name.startswith("cp_"):
                single(x, y)
            if name == "prism":
                assert sum(part["kept", step] for part in found) == single.select_clean(x, y)[0].sum()
            single.remember(x.float(), y, *ids)
        if name == "memvir":  # the mean over processes, as in DDP
            x, y = next(steps(1))
            expected = torch.autograd.grad(single(x, y), single.proxies)[0]
            torch.testing.assert_close(sum(part["gradient"] for part in found) / 2, expected, rtol=1e-6, atol=1e-9)
        for rank in (0, 1):
            twin = build(name)
            twin.load_state_dict(torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True))
            same_state(single, twin)


@pytest.mark.parametrize("dtype, expected", [(torch.float32, 113.5e6), (torch.float16, 57.2e6)])
def test_size_of_the_memory_for_stanford_online_products(dtype, expected):
    memory = CrossBatchMemory(55_000, 512, dtype)
    for _ in range(3):
        memory.enqueue(torch.randn(30_000, 512), torch.randint(0, 11_318, (30_000,)))
    assert memory.count == 55_000
    assert sum(b.numel() * b.element_size() for b in memory.buffers()) == pytest.approx(expected, rel=1e-3)


# MemVir's bound


def queue_bytes(loss):
    return sum(b.numel() * b.element_size() for name, b in loss.named_buffers() if name.startswith("past_"))


@pytest.mark.parametrize("dtype, steps", [("float32", 3), ("float16", 7)])
def test_size_of_memvir_for_stanford_online_products(dtype, steps):
    "The queue stays below its bound, also with the first batch, and takes no room before its start."
    with pytest.warns(UserWarning, match="past steps in place of 45"):
        loss = create_loss("memvir", 11_318, 512, start_epoch=1, queue_dtype=dtype)
    x, y = torch.randn(150, 512), torch.randint(0, 11_318, (150,))
    loss.remember(x, y)
    assert queue_bytes(loss) == 0
    loss.set_epoch(1)
    for _ in range(12):
        loss.remember(x, y)
    assert len(loss.past_labels) == steps * 11 and queue_bytes(loss) <= QUEUE_BYTES
    assert len(loss.virtual_classes()[1]) == 150


def test_memvir_refuses_a_queue_that_cannot_hold_one_used_step():
    with pytest.raises(
        ValueError, match="with 100000 classes and gap=10, the queue of a single past step exceeds 1 GB"
    ):
        create_loss("memvir", 100_000, 512)
    with pytest.warns(UserWarning, match="uses 1 past steps"):
        create_loss("memvir", 100_000, 128, gap=10)


def test_a_bounded_memvir_equals_one_with_fewer_steps(monkeypatch):
    "Also where a larger batch makes the queue shorter: then both start anew."
    monkeypatch.setattr("dml_nb.losses.memvir.QUEUE_BYTES", 3 * 2 * ((B + C) * D * 8 + B * 8))
    bounded, short = (build_memvir(steps) for steps in (50, 3))
    for x, y in steps(9):
        assert bounded(x, y).item() == short(x, y).item()
        for loss in (bounded, short):
            loss.remember(x, y)
    twin = build_memvir(50)
    twin.load_state_dict(bounded.state_dict())
    same_state(bounded, twin)
    (x, y), *_ = steps(1, 3 * B)
    bounded.remember(x, y)
    assert (
        len(bounded.past_labels) == 2 and bounded.count == 1 and queue_bytes(bounded) <= 3 * 2 * ((B + C) * D + B) * 8
    )


def build_memvir(steps):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_loss("memvir", C, D, steps=steps, gap=1, start_epoch=0).double()


def test_a_stored_memvir_of_full_length_without_entries_still_loads():
    "Before the queue was created with the first batch, it had its full length from the start."
    loss, (x, y) = build("memvir"), next(steps(1))
    state = loss.state_dict()
    state |= dict(past_embeddings=torch.zeros(4, 0, D), past_labels=torch.zeros(4, 0).long())
    loss.load_state_dict(state | dict(past_proxies=torch.zeros(4, C, D)))
    fresh = build("memvir")
    for x, y in steps(7):
        assert loss(x, y).item() == fresh(x, y).item()
        for each in (loss, fresh):
            each.remember(x, y)
