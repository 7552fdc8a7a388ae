"Batch samplers: what every one of them promises, on one process and on several."

import json
import warnings

import pytest
import torch

from dml_nb.data.samplers import BalancedSampler, ClassSampler, EpochSampler, HardClassSampler, RankSampler

LABELS = torch.arange(60).repeat_interleave(torch.arange(60) % 5 + 4)[
    torch.randperm(360, generator=torch.Generator().manual_seed(0))
]
PROXIES = torch.randn(60, 3, 8, generator=torch.Generator().manual_seed(0))


def hard(batch_size, seed=0):
    return HardClassSampler(LABELS, batch_size, 4, lambda: PROXIES, seed)


SAMPLERS = dict(
    random=lambda batch_size, seed=0: EpochSampler(len(LABELS), batch_size, seed),
    chunks=lambda batch_size, seed=0: ClassSampler(LABELS, batch_size, 4, seed),
    balanced=lambda batch_size, seed=0: BalancedSampler(LABELS, batch_size, 4, seed),
    replacement=lambda batch_size, seed=0: BalancedSampler(LABELS, batch_size, 4, seed, replacement=True),
    hard=hard,
)
each = pytest.mark.parametrize("name", SAMPLERS)


def epochs(sampler, numbers=(0, 1, 5)):
    found = []
    for epoch in numbers:
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


@each
def test_batches_depend_on_seed_and_epoch_alone(name):
    make = SAMPLERS[name]
    first = epochs(make(24))
    torch.rand(3)  # another state of the global generator
    assert epochs(make(24)) == first
    assert epochs(make(24), (5, 1, 0)) == first[::-1]
    assert first[0] != first[1]
    assert epochs(make(24, seed=1)) != first


@each
def test_an_iteration_leaves_the_global_generator_as_it_was(name):
    sampler, before = SAMPLERS[name](24), torch.get_rng_state()
    list(sampler)
    assert torch.equal(torch.get_rng_state(), before)


@each
def test_the_length_is_the_number_of_full_batches(name):
    sampler = SAMPLERS[name](24)
    for batches in epochs(sampler):
        assert len(batches) == len(sampler) == 360 // 24
        assert all(len(batch) == 24 for batch in batches)
        assert all(0 <= i < len(LABELS) for batch in batches for i in batch)


@each
def test_a_batch_has_whole_classes(name):
    for batch in SAMPLERS[name](24):
        if name != "random":
            assert LABELS[batch].unique(return_counts=True)[1].tolist() == [4] * 6
        if name in ("random", "balanced"):
            assert len(set(batch)) == len(batch)


@each
def test_processes_get_full_and_disjoint_parts_of_the_same_batches(name):
    make, world = SAMPLERS[name], 3
    parts = [epochs(RankSampler(make(24), rank, world)) for rank in range(world)]
    assert [len(batches) for part in parts for batches in part] == [len(make(24))] * 9
    for whole, *batches in zip(sum(epochs(make(24)), []), *(sum(part, []) for part in parts)):
        assert sum(batches, []) == whole
        assert {len(batch) for batch in batches} == {8}
        classes = [set(LABELS[batch].tolist()) for batch in batches]
        if name != "random":
            assert not classes[0] & classes[1] and not classes[1] & classes[2] and not classes[0] & classes[2]
    assert len(RankSampler(make(24), 1, world)) == len(make(24))


@each
def test_a_state_gives_the_batches_of_its_epoch_again(name):
    sampler, other = SAMPLERS[name](24), RankSampler(SAMPLERS[name](24), 0, 1)
    sampler.set_epoch(7)
    batches = list(sampler)
    other.load_state_dict(sampler.state_dict())
    assert (list(other), other.epoch) == (batches, 7)


def test_hard_batches_are_kept_while_the_proxies_change():
    proxies = PROXIES.clone()
    sampler = HardClassSampler(LABELS, 24, 4, lambda: proxies)
    sampler.set_epoch(1)
    batches, state = list(sampler), sampler.state_dict()
    proxies.copy_(torch.randn(60, 3, 8))
    sampler.set_epoch(1)  # as the training of a resumed run does
    assert list(sampler) == batches
    other = HardClassSampler(LABELS, 24, 4, lambda: proxies)
    other.load_state_dict(state)
    other.set_epoch(1)
    assert list(other) == batches
    other.set_epoch(2)
    other.set_epoch(1)
    assert list(other) != batches


def test_hard_batches_hold_nearest_classes():
    near = torch.nn.functional.normalize(PROXIES, dim=2)
    first = LABELS[next(iter(hard(24)))].view(6, 4)[:, 0]  # nothing is used up yet
    sim = torch.einsum("kd,cjd->ckj", near[first[0]], near).amax((1, 2))
    sim[first[0]] = 2
    assert first.tolist() == sim.topk(6).indices.tolist()


def test_published_batches_stay_the_same():
    "Stored runs with batches of classes must be reproduced by later versions."
    labels = torch.arange(40).repeat_interleave(torch.arange(40) % 7 + 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = ClassSampler(labels, 24, 4, seed=1)
    from hashlib import sha256

    assert sha256(json.dumps(epochs(sampler, (0, 1, 7))).encode()).hexdigest()[:16] == "41ef4825eafe877f"
    random = epochs(EpochSampler(59551, 150), (0, 3))
    assert sha256(json.dumps(random).encode()).hexdigest()[:16] == "0f9f232799223528"


def test_labels_may_have_gaps_and_any_order():
    labels = torch.tensor([90, 7, 7, 90, 3, 3] * 4)
    for batch in ClassSampler(labels, 4, 2):
        assert labels[batch].unique(return_counts=True)[1].tolist() == [2, 2]


def test_a_batch_that_processes_cannot_share_is_named():
    for sampler, rank in ((EpochSampler(5, 8), 1), (EpochSampler(10, 4, drop_last=False), 0)):
        with pytest.raises(ValueError, match="cannot be divided among 4 processes"):
            list(RankSampler(sampler, rank, 4))
    with pytest.raises(AttributeError):
        RankSampler(EpochSampler(5, 8), 0, 2).nonsense  # noqa: B018
