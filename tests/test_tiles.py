"""Losses with a large table are computed in tiles of samples or of classes, with the same value and gradients."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dml_nb.core import tiles
from dml_nb.losses import create_loss, list_losses, proxy_anchor

B, C, D = 11, 6, 8


def build(name):
    torch.manual_seed(0)
    loss = create_loss(name, num_classes=C, embedding_size=D).double()
    loss.set_epoch(100)  # past the start of every schedule
    return loss


TILED = [name for name in list_losses() if build(name).mean_over_samples]


def step(name, batch):
    "Value, and gradients by embeddings and parameters."
    loss, (x, y) = build(name), batch
    if hasattr(loss, "remember"):
        loss.remember(x, y)
    x = x.clone().requires_grad_()
    value = loss(x, y)
    return value.detach(), *torch.autograd.grad(value, (x, *loss.parameters()))


def test_the_softmax_losses_are_computed_in_tiles():
    plain = {"norm_softmax", "cosface", "arcface", "proxy_nca", "proxy_nca_pp", "softtriple"}
    with_cp = {f"cp_{name}" for name in ("norm_softmax", "cosface", "arcface", "proxy_nca", "softtriple")}
    assert plain | with_cp <= set(TILED) and "proxy_anchor" not in TILED and "cp_proxy_anchor" not in TILED


@pytest.mark.parametrize("name", TILED)
def test_tiles_change_neither_value_nor_gradient(name, monkeypatch):
    batch, calls = (torch.randn(B, D).double(), torch.arange(B) % C), []
    expected = step(name, batch)
    proxies = build(name).proxies[..., 0].numel()
    monkeypatch.setattr(tiles, "MAX_TABLE_SIZE", 3 * proxies)
    plain = tiles.checkpoint
    monkeypatch.setattr(tiles, "checkpoint", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    assert_close(step(name, batch), expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 4  # tiles of three samples


def proxy_anchor_step(K, dtype=torch.float64, classes=C, embeddings_as=None):
    "Value, and gradients by embeddings and proxies; class 5 has no sample."
    torch.manual_seed(0)
    loss = create_loss("proxy_anchor", classes, D, proxies_per_class=K).to(dtype)
    x, y = torch.randn(B, D).to(embeddings_as or dtype).requires_grad_(), torch.arange(B) % 5
    value = loss(x, y)
    return value.detach(), *torch.autograd.grad(value, (x, loss.proxies))


def limit_tables(monkeypatch, numbers):
    "Set the limit of a table, and count the tiles."
    calls, plain = [], tiles.checkpoint
    for module in (tiles, proxy_anchor):
        monkeypatch.setattr(module, "MAX_TABLE_SIZE", numbers)
    monkeypatch.setattr(tiles, "checkpoint", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    return calls


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("in_tile", [1, 2, 4])
def test_tiles_of_classes_change_neither_value_nor_gradient(K, in_tile, monkeypatch):
    expected = {dtype: proxy_anchor_step(K, dtype) for dtype in (torch.float64, torch.float32)}
    calls = limit_tables(monkeypatch, in_tile * K * B)
    for dtype, eps in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for found, wanted in zip(proxy_anchor_step(K, dtype), expected[dtype]):
            assert (found - wanted).norm() <= eps * wanted.norm()
    assert len(calls) == 2 * -(-C // in_tile)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_tiles_of_classes_with_embeddings_in_half_precision(half, monkeypatch):
    expected = proxy_anchor_step(1, torch.float32, embeddings_as=half)
    calls = limit_tables(monkeypatch, 2 * B)
    found = proxy_anchor_step(1, torch.float32, embeddings_as=half)
    assert calls and found[0].dtype == torch.float32 and found[1].dtype == half
    assert_close(found, expected, rtol=torch.finfo(half).eps, atol=1e-5)


def test_a_table_below_the_limit_is_computed_at_once(monkeypatch):
    calls = limit_tables(monkeypatch, C * B)
    proxy_anchor_step(1)
    assert not calls


class LargestTensor(TorchDispatchMode):
    "The bytes of the largest tensor that any operation returns."

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self.bytes = max(self.bytes, x.nbytes if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("K", [1, 3])
def test_tiles_of_classes_bound_the_memory(K, monkeypatch):
    "The limit is a tenth of the similarities, so a tile has 0.5 MB; the proxies have 0.6 MB for each K."
    B, C, kept = 64, 20_000, {}
    limit_tables(monkeypatch, B * C * K // 10)
    loss, x = create_loss("proxy_anchor", C, D, proxies_per_class=K), torch.randn(B, D, requires_grad=True)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with LargestTensor() as largest, saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(x, torch.arange(B))
        after_forward = sum(kept.values())
        value.backward()
    table, proxies = 4 * B * C * K, loss.proxies.nbytes
    assert largest.bytes <= max(table // 10, proxies)
    assert after_forward < 2 * proxies < table
