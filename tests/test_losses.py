"What every loss of the registry promises."

import os
from inspect import signature

import pytest
import torch

from dml_nb.learner import dml_learner, feature_dls
from dml_nb.losses import core, create_loss, list_losses
from dml_nb.losses.pairwise import PairLoss
from dml_nb.models.embedder import EmbeddingHead

C, D = 7, 16
SCHEDULED = {"start_epoch": 0}


def build(name: str, **sizes):
    takes = signature(core._registry[name]).parameters
    params = {k: v for k, v in SCHEDULED.items() if k in takes}
    torch.manual_seed(0)
    return create_loss(name, **(dict(num_classes=C, embedding_size=D) | sizes), **params)


def batch(size: int = 24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, D, generator=generator, dtype=torch.float64).to(dtype), torch.randint(0, C, (size,), generator=generator)


def value_of(loss, x, y):
    "The loss with the same random draws at every call."
    torch.manual_seed(2)
    return loss(x, y)


def is_random(loss, x, y) -> bool:
    values = set()
    for seed in range(3):
        torch.manual_seed(seed)
        values.add(round(loss(x, y).item(), 9))
    return len(values) > 1


def fill(loss, dtype=torch.float32):
    if hasattr(loss, "remember"):
        loss.remember(*batch(50, dtype))
    return loss


@pytest.mark.parametrize("name", list_losses())
def test_gradient_in_float64(name):
    loss = fill(build(name).double(), torch.float64)
    if not loss.exact_gradient:
        pytest.skip("a part of the gradient is held back or reversed on purpose; the notebook checks what remains")
    x, y = batch(8, torch.float64)
    names, values = zip(*loss.named_parameters()) if list(loss.parameters()) else ((), ())

    def value(x, *params):
        torch.manual_seed(2)
        return torch.func.functional_call(loss, dict(zip(names, params)), (x, y))

    leaves = [x.requires_grad_(), *(v.detach().clone().requires_grad_() for v in values)]
    # with many numbers, random directions are compared instead of every partial derivative
    assert torch.autograd.gradcheck(value, leaves, fast_mode=sum(v.numel() for v in leaves) > 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", list_losses())
def test_half_precision_with_hard_duplicates(name, dtype, autocast):
    x, y = batch(512)
    x[100:150], y[100:150] = x[0], y[0]
    x[150:200] = x[0]
    x = x.to(dtype)
    exact = value_of(fill(build(name).double(), torch.float64), x.double(), y).item()
    loss = fill(build(name))
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = value_of(loss, x, y)
    value.backward()
    assert value.dtype == torch.float32 and x.grad.isfinite().all()
    assert value.item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("labels", [[0] * 6, [0, 1, 2, 3, 4, 5], [3]], ids=["one class", "all distinct", "batch of one"])
@pytest.mark.parametrize("name", list_losses())
def test_degenerate_batches(name, labels):
    loss = fill(build(name))
    x = torch.randn(len(labels), D, requires_grad=True)
    loss(x, torch.tensor(labels)).backward()
    assert x.grad.isfinite().all()
    empty = torch.zeros(0, D, requires_grad=True)
    value = loss(empty, torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0 and loss.last_active == 0


@pytest.mark.parametrize("name", list_losses())
def test_gradient_reaches_every_parameter_and_the_optimiser_has_them(name):
    loss = fill(build(name))
    x, y = batch(200)
    loss(x.requires_grad_(), y).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    x, y = batch()
    learn = dml_learner(feature_dls(x, y, x, y, batch_size=12), EmbeddingHead(D, D), loss)
    learn.create_opt()
    held = {id(p) for p, *_ in learn.opt.all_params()}
    assert held == {id(p) for p in [*learn.model.parameters(), *loss.parameters()]}


@pytest.mark.parametrize("name", list_losses())
def test_state_dict_round_trip(name):
    loss, twin = fill(build(name)), build(name)
    twin.load_state_dict(loss.state_dict())
    x, y = batch()
    for _ in range(3):
        assert value_of(twin, x, y).item() == value_of(loss, x, y).item()
        for each in (loss, twin):
            if hasattr(each, "remember"):
                each.remember(x, y)


@pytest.mark.parametrize("name", list_losses())
def test_unit_vectors_give_the_same_value_unless_the_loss_says_otherwise(name):
    loss = fill(build(name).double(), torch.float64)
    x, y = batch(dtype=torch.float64)
    same = value_of(loss, torch.nn.functional.normalize(x), y).item() == pytest.approx(value_of(loss, x, y).item(), rel=1e-12)
    assert same == loss.normalised


@pytest.mark.parametrize("name", list_losses())
def test_order_of_the_batch_and_names_of_classes_do_not_matter(name):
    loss = fill(build(name).double(), torch.float64)
    x, y = batch(dtype=torch.float64)
    if is_random(loss, x, y):
        pytest.skip("draws pairs at random")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    expected = value_of(loss, x, y).item()
    assert value_of(loss, x[order], y[order]).item() == pytest.approx(expected, rel=1e-10)
    if not list(loss.parameters()) and not list(loss.buffers()):
        assert value_of(loss, x, (y + 3) % C).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", list_losses())
def test_compiled_gives_the_same_value(name):
    # "aot_eager" traces forward and backward as compilation does, without half a minute of code generation for each loss
    backend = os.environ.get("DML_NB_COMPILE", "aot_eager")
    loss = fill(build(name))
    x, y = batch()
    if is_random(loss, x, y):
        pytest.skip("draws pairs at random")
    grads = []
    for each in (loss, torch.compile(loss, backend=backend)):
        leaf = x.clone().requires_grad_()
        value = value_of(each, leaf, y)
        grads.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.compiler.reset()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list_losses())
def test_bad_input_is_named(name):
    loss = build(name)
    x, y = batch()
    for bad, word in [((x[0], y), "shape"), ((x, y[:-1]), "labels"), ((x, y.float()), "integers"), ((x.index_fill(0, torch.tensor([3]), float("nan")), y), "row 3"),
                      ((x.index_fill(0, torch.tensor([3]), float("inf")), y), "row 3")]:
        with pytest.raises(ValueError, match=word):
            loss(*bad)
    if loss.embedding_size:
        with pytest.raises(ValueError, match="embedding_size"):
            loss(x[:, :-1], y)
    if loss.num_classes:
        with pytest.raises(ValueError, match=f"label {C} is outside"):
            loss(x, y.clamp_min(C))
        with pytest.raises(ValueError, match="label -1 is outside"):
            loss(x, y - C - 1 + (C - y))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU present")
@pytest.mark.parametrize("name", list_losses())
def test_same_value_on_the_gpu(name):
    x, y = batch()
    loss = fill(build(name))
    expected = loss(x, y).item()
    assert loss.cuda()(x.cuda(), y.cuda()).item() == pytest.approx(expected, rel=1e-5)


SCALES = ("scale", "scale_x", "scale_p", "gamma", "alpha", "temperature", "proxy_temp", "sigma", "proxies_per_class", "num_proxies", "capacity", "nodes", "num_classes", "embedding_size")


@pytest.mark.parametrize("name", list_losses())
def test_impossible_parameters_are_named(name):
    takes = signature(core._registry[name]).parameters
    for key in SCALES:
        unused = key in ("num_classes", "embedding_size") and key in takes and takes[key].default is None
        if key in takes and not unused and (name, key) not in {("ranked_list", "alpha"), ("lifted_structure", "alpha")}:  # a border, a margin
            with pytest.raises(ValueError, match=key):
                create_loss(name, **(dict(num_classes=C, embedding_size=D) | {key: -1}))


class Nothing(torch.nn.Module):
    def mine(self, sim_BN, pos_BN, neg_BN):
        return torch.zeros_like(pos_BN), torch.zeros_like(neg_BN)


@pytest.mark.parametrize("name", [name for name in list_losses() if isinstance(build(name), PairLoss)])
def test_a_miner_that_returns_nothing_gives_zero(name):
    x, y = batch()
    x.requires_grad_()
    nothing = tuple(torch.zeros(0, dtype=torch.long) for _ in range(4))
    values = [build(name)(x, y, indices_tuple=nothing)]
    if "miner" in signature(core._registry[name]).parameters:
        values.append(create_loss(name, C, D, miner=Nothing())(x, y))
    for value in values:
        assert value.item() == 0 and torch.autograd.grad(value, x)[0].abs().sum() == 0
