"""Losses with a large table are computed in tiles of samples, with the same value and the same gradients."""

import pytest
import torch
from torch.testing import assert_close

from dml_nb.core import tiles
from dml_nb.losses import create_loss, list_losses

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
