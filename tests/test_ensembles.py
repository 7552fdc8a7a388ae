"Networks with several embeddings, their losses, and runs of both."

import copy
import warnings

import pytest
import torch
from fastcore.basics import noop
from torch import nn

from dml_nb.experiments.recipes import settings_for
from dml_nb.experiments.run import Run
from dml_nb.experiments.tables import find_rows, row_of
from dml_nb.losses import create_loss, list_losses
from dml_nb.models.embedder import BACKBONES, GREY32, create_embedder
from dml_nb.models.networks import NETWORKS, create_network
from dml_nb.training.checkpoint import Checkpoint, resume
from dml_nb.training.gradient_cache import GradientCache
from dml_nb.training.joint_learner import NetworkAndLoss, parameter_groups
from dml_nb.training.learner import dml_learner, image_dls

pytestmark = pytest.mark.filterwarnings("ignore:the training has", "ignore:the backbone is frozen")
D, C = 12, 4
SYSTEMS = dict(hdc={}, abe=dict(learners=4), bier={}, deml=dict(objects=2, channels=2), horde=dict(orders=3, width=16))
SYSTEMS |= dict(a_bier=dict(preset="adversarial", hidden=8))


def build(system, seed=0, **embedder):
    "Network and loss of a system on the small network."
    torch.manual_seed(seed)
    loss = create_loss(system.removeprefix("a_"), num_classes=C, embedding_size=D, **SYSTEMS[system])
    return create_network(embedder=create_embedder("small_cnn", D, pretrained=False, **embedder), **loss.network), loss


def images(size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 32, 32, generator=generator), torch.arange(size) % C


def learner(photos, system, cbs=(), **embedder):
    "A Learner on eight classes of three small pictures."
    model, loss = build(system, **embedder)
    learn = dml_learner(image_dls(photos, model.spec, 6, per_class=3), model, loss, lr=1e-3, cbs=cbs)
    learn.logger = noop
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)
    return learn


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_trains_every_parameter_of_network_and_loss(system):
    (model, loss), (x, y) = build(system), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = loss(model.train()(x), y)
    value.backward()
    named = [*model.named_parameters(), *loss.named_parameters()]
    assert [name for name, p in named if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()] == []
    assert {*parameter_groups(model, loss)} >= {"backbone", "head"}


@pytest.mark.parametrize("system", SYSTEMS)
def test_in_evaluation_mode_it_is_a_plain_embedder(system):
    (model, loss), (x, y) = build(system), images()
    with torch.no_grad():
        z = model.eval()(x)
        assert z.shape == (8, D) and torch.allclose(z.norm(dim=1), torch.ones(8))
        assert torch.allclose(torch.cat([model(part) for part in x.split(3)]), z, atol=1e-5)
        assert loss(z, y).isfinite()  # also a plain embedding has a loss
    twin, _ = build(system, seed=1)
    twin.load_state_dict(model.state_dict())
    assert twin.eval()(x).equal(z) and copy.deepcopy(model)(x).equal(z)
    with pytest.raises(ValueError, match=r"expects images of shape \(B, 1, H, W\), got \(8, 3, 32, 32\)"):
        model(x.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("system", SYSTEMS)
def test_frozen_statistics_stay_frozen_and_parts_of_a_batch_are_exact(system):
    model, x = build(system, frozen_bn=True)[0], images()[0]
    before = {name: value.clone() for name, value in model.named_buffers()}
    wide = model.train()(x)
    assert all(value.equal(before[name]) for name, value in model.named_buffers())
    torch.testing.assert_close(torch.cat([model(part) for part in x.split(3)]), wide, rtol=1e-3, atol=1e-4)


def test_a_backbone_without_stages_names_those_that_have_them(monkeypatch):
    class Other(nn.Module):
        out_channels, spec = 4, GREY32

        def __init__(self, pretrained=False):
            super().__init__()
            self.layer = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return self.layer(x)

    monkeypatch.setitem(BACKBONES, "other", Other)
    plain = create_embedder("other", 16, pretrained=False)
    for kind in ("depths", "masks"):
        with pytest.raises(
            ValueError,
            match="the backbone Other has no stages.*use one of bn_inception, .*googlenet, resnet.*small_cnn.$",
        ):
            create_network(kind, plain)
    for kind in set(NETWORKS) - {"depths", "masks"}:  # these need no taps
        assert create_network(kind, plain).eval()(torch.randn(2, 1, 32, 32)).shape[0] == 2


@pytest.mark.parametrize(
    "kind, size, options, message",
    [
        ("depths", 12, dict(levels=5), r"has 4 depths \(0, 1, 2, 3\), not 5: use at most levels=4"),
        ("depths", 2, {}, "embedding_size 2 is too small for 3 learners"),
        ("depths", 12, dict(levels=0), "levels must be at least 1"),
        ("masks", 12, {}, "embedding_size 12 cannot be divided among 8 learners.*use a multiple of 8"),
        ("groups", 2, {}, "embedding_size 2 is too small for 3 learners"),
        ("groups", 12, dict(shares=(1, -1)), "share 1 of the learners must be at least"),
        ("attention", 8, {}, "embedding_size 8 is too small for 9 learners"),
        ("high_order", 12, dict(orders=1), "orders must be at least 2, got 1"),
        ("high_order", 12, dict(width=2.5), "width must be a whole number, got 2.5"),
        ("hdc", 12, {}, "unknown kind of network 'hdc'"),
    ],
)
def test_impossible_networks_are_named(kind, size, options, message):
    with pytest.raises(ValueError, match=message):
        create_network(kind, create_embedder("small_cnn", size, pretrained=False), **options)


@pytest.mark.parametrize(
    "name, params, message",
    [
        ("hdc", dict(shares=(0.5, 1.0)), "shares must be at most 1 and must not rise"),
        ("hdc", dict(shares=()), "shares must be at most 1 and must not rise"),
        ("abe", dict(learners=1), "learners must be at least 2, got 1"),
        ("bier", dict(diversity="adversary"), "did you mean 'adversarial'"),
        ("bier", dict(eta=-1), "eta must be at least 0"),
        ("deml", dict(objects=0), "objects must be at least 1"),
        ("horde", dict(base="xbm"), "the base 'xbm' has a memory or a schedule"),
        ("horde", dict(base="contrastiv"), "did you mean 'contrastive'"),
        ("horde", dict(base_params=5), "base_params must be a dictionary"),
    ],
)
def test_impossible_losses_are_named(name, params, message):
    with pytest.raises(ValueError, match=message):
        create_loss(name, num_classes=C, embedding_size=D, **params)


def test_every_loss_with_a_network_names_one_that_exists():
    losses = [create_loss(name, C, 16) for name in list_losses()]
    networks = [loss.network for loss in losses if getattr(loss, "network", None)]
    assert {network["kind"] for network in networks} <= set(NETWORKS) and len(networks) >= 5


@pytest.mark.parametrize("system", ["hdc", "a_bier"])
def test_a_training_continues_exactly(system, draw_photos, tmp_path):
    photos = draw_photos()
    whole, first, second = (learner(photos, system) for _ in range(3))
    whole.fit_schedule(2, "constant")
    first.fit_schedule(1, "constant", cbs=[Checkpoint(tmp_path)])
    resume(second, tmp_path / "checkpoint.pt", "")
    second.fit_schedule(2, "constant")
    states = [NetworkAndLoss(each.model, each.loss_func).state_dict() for each in (whole, second)]
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


def test_the_gradient_cache_and_bfloat16_train_them(draw_photos):
    photos = draw_photos()
    learn = learner(photos, "horde", [GradientCache(4)], frozen_bn=True)
    learn.fit_schedule(1, "constant")
    half = learner(photos, "bier").to_bf16()
    half.fit_schedule(1, "constant")
    for each in (learn, half):
        assert each.retrieval_metrics.history[-1]["R@1"] >= 0
        assert all(p.isfinite().all() for p in each.model.parameters())
    embeddings, labels = half.get_preds(1)
    assert embeddings.shape == (len(photos.test), D) and labels.equal(photos.test.labels)


@pytest.mark.parametrize("system", ["hdc", "abe", "horde", "bier", "deml"])
def test_a_run_creates_the_network_that_its_loss_names(system, draw_photos, tmp_path):
    draw_photos()
    (row,), place = find_rows(system), dict(dataset=str(tmp_path / "photos"), backbone="small_cnn")
    few = dict(horde=dict(width=8), abe=dict(learners=2), deml=dict(objects=2, channels=1)).get(system, {})
    small = dict(embedding_size=24, epochs=1, batch_size=6, per_class=3) | few
    run = Run(row.id, settings_for(row, **place, **small), 0, tmp_path / "run")
    learn = run.learner()
    assert type(learn.model) is NETWORKS[learn.loss_func.network["kind"]]
    with learn.no_bar(), learn.no_logging():
        history = run.fit(learn)
    assert len(history) == 1 and 0 <= history["R@1"][0] <= 1


def test_frozen_features_are_refused():
    for system in ("HDC", "A-BIER", "ABE", "DeML", "Contrastive+HORDE"):
        with pytest.raises(ValueError, match="trains several embeddings inside the network.*use --regime finetune"):
            settings_for(find_rows(system)[0], "cub", "resnet50", "frozen")


def test_a_plain_loss_starts_as_before(draw_photos, tmp_path):
    "The look at the network of a loss uses no random number of the training."
    draw_photos()
    row, place = row_of("own/proxy-anchor"), dict(dataset=str(tmp_path / "photos"), backbone="small_cnn")
    run = Run(row.id, settings_for(row, **place, embedding_size=D, epochs=1, batch_size=6), 3, tmp_path / "run")
    learn = run.learner()
    torch.manual_seed(3)
    model = create_embedder("small_cnn", D, pool=run.settings["pool"], pretrained=False)
    loss = create_loss("proxy_anchor", len(run.data.train.classes), D, **run.settings["params"])
    assert learn.model.head.linear.weight.equal(model.head.linear.weight) and learn.loss_func.proxies.equal(
        loss.proxies
    )
