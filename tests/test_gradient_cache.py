"The gradient cache has the gradient of the whole batch."

import copy
import pickle

import pytest
import torch
from torch import nn

from dml_nb.losses import create_loss, list_losses
from dml_nb.losses.base import loss_parameters
from dml_nb.models.embedder import create_embedder
from dml_nb.training.gradient_cache import GradientCache, embed_in_parts
from dml_nb.training.learner import dml_learner, feature_dls
from dml_nb.training.several_processes import launch

B, C, D, F, PART = 24, 6, 8, 16, 7  # 24 images are parts of 7, 7, 7 and 3


def network(dropout=0.3):
    layers = [nn.Linear(F, F), nn.LayerNorm(F), nn.Dropout(dropout), nn.ReLU(), nn.Linear(F, D)]
    return nn.Sequential(*layers).double()


def batch():
    return torch.randn(B, F, dtype=torch.float64), torch.arange(B) % C


def build(name):
    "The loss in the state after a few steps."
    given = {key: 0 for key in ("start_epoch", "start_iteration") if key in loss_parameters(name)}
    loss = create_loss(name, C, D, **given).double()
    if hasattr(loss, "remember"):
        for _ in range(3):
            loss.remember(torch.randn(B, D), torch.arange(B) % C)
    return loss


def gradients(model, loss, embed):
    "Value, all gradients, and a random number that is drawn after the step."
    torch.manual_seed(2)
    value = loss(embed(), torch.arange(B) % C)
    value.backward()
    parameters = [*model.parameters(), *loss.parameters()]
    return [value.detach(), *(parameter.grad for parameter in parameters), torch.rand(1)]


@pytest.mark.parametrize("name", list_losses())
def test_the_gradient_with_dropout_is_that_of_the_whole_batch(name):
    torch.manual_seed(0)
    model, loss, (x, _) = network(), build(name), batch()
    twin, twin_loss = copy.deepcopy((model, loss))
    plain = gradients(model, loss, lambda: torch.cat([model(some) for some in x.split(PART)]))
    cached = gradients(twin, twin_loss, lambda: embed_in_parts(twin, x, PART))
    torch.testing.assert_close(cached, plain, rtol=1e-6, atol=1e-9)


def test_without_random_numbers_it_is_the_plain_step():
    torch.manual_seed(0)
    model, loss, (x, _) = network(dropout=0), build("multi_similarity"), batch()
    twin = copy.deepcopy(model)
    plain, cached = gradients(model, loss, lambda: model(x)), gradients(twin, loss, lambda: embed_in_parts(twin, x, 5))
    torch.testing.assert_close(cached, plain, rtol=1e-6, atol=1e-9)


def test_under_autocast_the_gradient_is_that_of_the_parts():
    "Weights that autocast has converted for the first pass must not lose their gradient in the second."
    torch.manual_seed(0)
    model, loss, x = network(dropout=0).float(), create_loss("proxy_anchor", C, D), torch.randn(B, F)
    found = []
    for embed in (lambda m: embed_in_parts(m, x, PART), lambda m: torch.cat([m(some) for some in x.split(PART)])):
        twin = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(embed(twin), torch.arange(B) % C)
        value.backward()
        found.append([parameter.grad for parameter in twin.parameters()])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4)  # bfloat16 has 8 bits
    assert all(grad.abs().sum() > 0 for grad in found[0])


def test_batch_norm_is_refused_unless_it_is_frozen():
    x = torch.randn(6, 1, 32, 32)
    model = create_embedder("small_cnn", D, pretrained=False)
    with pytest.raises(ValueError, match="backbone.0.1 takes its statistics from the batch, of which only 4 images"):
        embed_in_parts(model.train(), x, 4)
    assert embed_in_parts(model, x, 6).shape == (6, D)  # the whole batch at once is exact
    with torch.no_grad():
        assert embed_in_parts(model.eval(), x, 4).equal(model(x))
    frozen = create_embedder("small_cnn", D, pretrained=False, frozen_bn=True).train()
    torch.testing.assert_close(embed_in_parts(frozen, x, 4), frozen(x))


@pytest.mark.parametrize("part", [0, -1, 2.5])
def test_a_part_is_at_least_one_image(part):
    with pytest.raises(ValueError, match="part must be"):
        GradientCache(part)
    with pytest.raises(ValueError, match="part must be"):
        embed_in_parts(network(), batch()[0], part)


def train(*callbacks, name="xbm"):
    torch.manual_seed(0)
    labels = torch.arange(2 * B) % C
    features = torch.randn(C, F)[labels] + torch.randn(2 * B, F)
    dls = feature_dls(features, labels, features[:B], labels[:B], batch_size=B)
    start = {key: 0 for key in ("start_epoch", "start_iteration") if key in loss_parameters(name)}
    loss = create_loss(name, C, D, **start)
    learn = dml_learner(dls, nn.Linear(F, D), loss, lr=1e-2, warm_epochs=0, cbs=callbacks)
    with learn.no_bar(), learn.no_logging():
        learn.fit_schedule(3)
    return learn


@pytest.mark.filterwarnings("ignore:the training has")
def test_a_learner_with_the_cache_can_be_saved_and_trained_without_it(tmp_path):
    learn = train(GradientCache(PART))
    torch.testing.assert_close(learn.model.weight, train().model.weight, rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(learn.model)
    learn.save(tmp_path / "network")
    assert pickle.loads(pickle.dumps(learn.model)).weight.equal(learn.model.weight)


class Interrupt(GradientCache):
    def after_pred(self):
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:the training has")
def test_after_an_interruption_the_network_still_works():
    learn = train()
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[Interrupt(PART)])
    x = torch.randn(B, F)
    torch.testing.assert_close(learn.model(x), nn.functional.linear(x, learn.model.weight, learn.model.bias))
    assert copy.deepcopy(learn.model)(x).shape == pickle.loads(pickle.dumps(learn.model))(x).shape


def weights_with_cache():
    return train(GradientCache(PART)).model.weight.detach()


@pytest.mark.filterwarnings("ignore:the training has")
def test_two_processes_with_the_cache_train_as_one_without():
    torch.testing.assert_close(launch(weights_with_cache), train().model.weight, rtol=1e-5, atol=1e-6)
