"What every loss of the registry promises."

import warnings

import pytest
import torch

from dml_nb.golden import fixture, golden
from dml_nb.learner import dml_learner, feature_dls
from dml_nb.losses import create_loss, list_losses
from dml_nb.models.embedder import EmbeddingHead

C, D = 7, 16
SCHEDULED = {"start_epoch": 0}


def build(name: str, **sizes):
    from inspect import signature

    from dml_nb.losses import core

    takes = signature(core._registry[name]).parameters
    params = {k: v for k, v in SCHEDULED.items() if k in takes}
    torch.manual_seed(0)
    return create_loss(name, **(dict(num_classes=C, embedding_size=D) | sizes), **params)


def batch(size: int = 24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, D, generator=generator, dtype=torch.float64).to(dtype), torch.randint(0, C, (size,), generator=generator)


def fill(loss, dtype=torch.float32):
    if hasattr(loss, "remember"):
        loss.remember(*batch(50, dtype))
    return loss


@pytest.mark.parametrize("name", list_losses())
def test_gradient_in_float64(name):
    loss = fill(build(name).double(), torch.float64)
    x, y = batch(8, torch.float64)
    names, values = zip(*loss.named_parameters()) if list(loss.parameters()) else ((), ())

    def value(x, *params):
        return torch.func.functional_call(loss, dict(zip(names, params)), (x, y))

    assert torch.autograd.gradcheck(value, (x.requires_grad_(), *(v.detach().clone().requires_grad_() for v in values)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", list_losses())
def test_half_precision_with_hard_duplicates(name, dtype, autocast):
    x, y = batch(512)
    x[100:150], y[100:150] = x[0], y[0]
    x[150:200] = x[0]
    x = x.to(dtype)
    exact = fill(build(name).double(), torch.float64)(x.double(), y).item()
    loss = fill(build(name))
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(x, y)
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
    loss(*batch(200)).backward()
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
        assert twin(x, y).item() == loss(x, y).item()
        for each in (loss, twin):
            if hasattr(each, "remember"):
                each.remember(x, y)


@pytest.mark.parametrize("name", list_losses())
def test_unit_vectors_give_the_same_value(name):
    loss = fill(build(name).double(), torch.float64)
    x, y = batch(dtype=torch.float64)
    assert loss(torch.nn.functional.normalize(x), y).item() == pytest.approx(loss(x, y).item(), rel=1e-12)


@pytest.mark.parametrize("name", list_losses())
def test_bad_input_is_named(name):
    loss = build(name)
    x, y = batch()
    for bad, word in [((x[0], y), "shape"), ((x, y[:-1]), "labels"), ((x, y.float()), "integers"), ((x.index_fill(0, torch.tensor([3]), float("nan")), y), "row 3"),
                      ((x.index_fill(0, torch.tensor([3]), float("inf")), y), "row 3"), ((x[:, :-1], y), "embedding_size")]:
        with pytest.raises(ValueError, match=word):
            loss(*bad)
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


def test_pytorch_metric_learning_agrees_on_proxy_anchor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    fix = fixture()
    theirs = losses.ProxyAnchorLoss(5, 8).double()
    theirs.proxies.data = fix.proxies.clone()
    ours = create_loss("proxy_anchor", num_classes=5, embedding_size=8).double()
    ours.proxies.data = fix.proxies.clone()
    x = fix.embeddings.clone().requires_grad_()
    assert ours(x, fix.labels).item() == pytest.approx(golden("Proxy Anchor"), rel=1e-12)
    grads = [torch.autograd.grad(loss(x, fix.labels), x)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
