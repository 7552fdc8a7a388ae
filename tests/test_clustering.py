"Losses that look at the whole training set: resumed anywhere, in two processes, and with data that do not fit."

import random
import shutil
from copy import deepcopy

import pytest
import torch
from test_checkpoint import At, same, silent
from test_several_processes import FloatLog
from torch import nn

from dml_nb.core.distributed import gather
from dml_nb.data.samplers import ClassSampler, EpochSampler
from dml_nb.losses import TrainingSetLoss, create_loss, list_losses
from dml_nb.models import create_embedder
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.models.networks import create_network
from dml_nb.training import training_set
from dml_nb.training.checkpoint import Checkpoint, resume
from dml_nb.training.joint_learner import NetworkAndLoss
from dml_nb.training.learner import dml_learner, feature_dls, image_dls
from dml_nb.training.several_processes import launch
from dml_nb.training.training_set import RefreshFromTrainingSet, nearest_rows

pytestmark = pytest.mark.filterwarnings("ignore:the training has", "ignore:the backbone is frozen")

C, D, EPOCHS, STEPS = 6, 8, 4, 4
SMALL = {
    "divide_and_conquer": dict(clusters=2, joint_share=0.25),
    "mic": dict(clusters=3, refresh_every=2, hidden=4, adversary_weight=1.0),
    "htl": dict(group=2),
    "smart_mining": dict(neighbours=5),
}


def new_loss(name):
    torch.manual_seed(0)
    return create_loss(name, num_classes=C, embedding_size=D, **SMALL[name])


def loaders(per_class=None, labels=None):
    "Random features of six classes of eight."
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(C).repeat_interleave(8) if labels is None else labels
    x = torch.randn(C, 16, generator=generator)[y] + 0.5 * torch.randn(len(y), 16, generator=generator)
    return feature_dls(x, y, x[:12], y[:12], 12, per_class=per_class)


def new_learner(name, per_class=None, cbs=(), **options):
    loss = new_loss(name)
    torch.manual_seed(0)
    options = dict(lr=1e-2, proxy_lr_mult=1.0, warm_epochs=0) | options
    return silent(dml_learner(loaders(per_class), EmbeddingHead(16, D), loss, cbs=cbs, **options))


def state(learn):
    return NetworkAndLoss(learn.model, learn.loss_func).state_dict()


@pytest.mark.parametrize("per_class", [None, 4])
@pytest.mark.parametrize("name", SMALL)
def test_a_training_continues_after_any_step(name, per_class, tmp_path):
    "Also between two looks at the training set, whose result must not be found again with other weights."
    draw = random.Random(f"{name} {per_class}")
    for epoch in (1, 2):
        step, kept = draw.randrange(STEPS), tmp_path / f"{epoch}.pt"
        keep = At(epoch, step, lambda kept=kept: shutil.copyfile(tmp_path / "checkpoint.pt", kept))
        whole, resumed = new_learner(name, per_class), new_learner(name, per_class)
        whole.fit_schedule(EPOCHS, cbs=[Checkpoint(tmp_path, minutes=0), keep])
        resume(resumed, kept, "")
        resumed.fit_schedule(EPOCHS)
        assert same(state(whole), state(resumed)), (epoch, step)
        assert whole.loss_func.is_refreshed


class InFloat64(nn.Module):
    "A network in which sums in another order differ by less than the assertion."

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, D).double()

    def forward(self, x):
        return self.layer(x.double())


def train_all():
    "The states of all methods after a training."
    found = {}
    for name in SMALL:
        torch.manual_seed(0)
        loss, dls = new_loss(name).double(), loaders(2)
        dls.test_labels = dls.test_labels[:0]
        torch.manual_seed(0)
        learn = dml_learner(dls, InFloat64(), loss, lr=1e-2, warm_epochs=0, proxy_lr_mult=1, cbs=[FloatLog()])
        with learn.no_bar(), learn.no_logging():
            learn.fit_schedule(EPOCHS)
        found[name] = {key: value.clone() for key, value in state(learn).items()}
        flat = torch.cat([value.double().flatten() for value in found[name].values()])
        every = gather(flat[None])
        assert every[0].equal(every[-1]), f"the processes differ: {name}"
    return found


def test_two_processes_train_as_one():
    torch.set_num_threads(1)
    one, two = train_all(), launch(train_all)
    for name in SMALL:
        for key in one[name]:
            torch.testing.assert_close(two[name][key], one[name][key], rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")


def test_every_method_of_this_kind_is_tested():
    names = {name for name in SMALL if isinstance(new_loss(name), TrainingSetLoss)}
    assert names == set(SMALL) <= set(list_losses())


@pytest.mark.parametrize("name", SMALL)
def test_the_training_set_is_seen_without_augmentation_and_when_due(name):
    seen, learn = [], new_learner(name, 4)
    plain = learn.loss_func.refresh
    learn.loss_func.refresh = lambda x, y, *find: (seen.append((learn.epoch, x, learn.training)), plain(x, y, *find))
    learn.fit_schedule(EPOCHS)
    every = learn.loss_func.refresh_every
    assert [epoch for epoch, *_ in seen] == list(range(0, EPOCHS, every)) and all(training for *_, training in seen)
    features = learn.dls.train_plain.x
    assert seen[0][1].shape == (48, 16 if name == "mic" else D)
    if name == "mic":
        assert seen[0][1].equal(features)


def test_the_loaders_of_the_user_stay_as_they_are():
    dls = loaders(4)
    plain = dls.train
    learn = dml_learner(dls, EmbeddingHead(16, D), new_loss("htl"), warm_epochs=0)
    assert dls.train is plain and learn.dls is not dls and len(learn.dls.train) == len(plain) == STEPS
    assert learn.dls.valid is dls.valid and learn.dls.train_labels is dls.train_labels
    other = dml_learner(dls, EmbeddingHead(16, D), create_loss("triplet"))
    assert other.dls is dls and not [cb for cb in other.cbs if isinstance(cb, RefreshFromTrainingSet)]
    mic = dml_learner(dls, EmbeddingHead(16, D), new_loss("mic"))
    assert mic.dls is dls  # MIC has no batches of its own


def test_a_second_training_and_lr_find_begin_with_the_weights_that_they_find():
    learn = new_learner("divide_and_conquer", 4)
    with learn.no_bar(), learn.no_logging():
        before = deepcopy(state(learn))
        learn.lr_find(num_it=20, show_plot=False)
        assert same(state(learn), before)
        learn.fit_schedule(1)
        seen = []
        learn.loss_func.refresh = lambda *args: seen.append(learn.epoch)
        learn.fit_schedule(1)
    assert seen == [0]


def test_a_part_of_a_weighted_sum_looks_at_the_training_set_too():
    loss = create_loss({"htl": 1.0, "global_loss": 0.5}, C, D, htl=dict(group=2))
    learn = dml_learner(loaders(4), EmbeddingHead(16, D), loss, warm_epochs=0)
    with learn.no_bar(), learn.no_logging():
        learn.fit_schedule(1)
    assert loss.losses["htl"].is_refreshed and loss.losses["htl"].margin_CC.shape == (C, C)


def test_loaders_without_the_plain_training_images_are_named():
    dls = loaders(4)
    del dls.train_plain
    with pytest.raises(ValueError, match="HTLLoss looks at the whole training set: make dls by image_dls"):
        dml_learner(dls, EmbeddingHead(16, D), new_loss("htl"))


@pytest.mark.parametrize(
    "name, params, labels, message",
    [
        ("divide_and_conquer", dict(clusters=64), None, "48 training images cannot form 64 clusters"),
        ("divide_and_conquer", dict(clusters=3), None, "8 dimensions cannot be divided into 3 equal slices"),
        ("mic", dict(clusters=49), None, "48 training images cannot form 49 clusters"),
        ("htl", {}, torch.zeros(48).long(), r"at least 2 classes, but all 48 training images have the label \[0\]"),
        ("smart_mining", {}, torch.zeros(48).long(), "all 48 training images have the same label"),
    ],
)
def test_data_that_do_not_fit_are_named(name, params, labels, message):
    embedding_size = dict(embedding_size=64 if "64" in message else D)
    loss = create_loss(name, C, **embedding_size, **params)
    head = EmbeddingHead(16, **embedding_size)
    learn = dml_learner(loaders(None, labels), head, loss, warm_epochs=0)
    with pytest.raises(ValueError, match=message), learn.no_bar(), learn.no_logging():
        learn.fit_schedule(1)


@pytest.mark.parametrize(
    "name, params, message",
    [
        ("divide_and_conquer", dict(clusters=0), "clusters must be at least 1"),
        ("divide_and_conquer", dict(joint_share=2), "joint_share must be at most 1"),
        ("divide_and_conquer", dict(refresh_every=0), "refresh_every must be at least 1"),
        ("divide_and_conquer", dict(pair_loss="margni"), "did you mean 'margin'"),
        ("mic", dict(clusters=2.5), "clusters must be a whole number"),
        ("mic", dict(pair_params=5), "pair_params must be a dictionary, got 5"),
        ("htl", dict(group=0), "group must be at least 1"),
        ("smart_mining", dict(target=1.5), "target must be at most 1"),
        ("smart_mining", dict(neighbours=0), "neighbours must be at least 1"),
        ("quadruplet", dict(margin=-1), "margin must be at least 0"),
        ("global_loss", dict(min_gap=-1), "min_gap must be at least 0"),
        ("ranked_list_levels", dict(levels=0), "levels must be at least 1"),
    ],
)
def test_impossible_values_are_named(name, params, message):
    with pytest.raises(ValueError, match=message):
        create_loss(name, C, D, **params)


def test_a_cluster_without_pairs_gives_no_batches_and_a_class_without_images_no_margin():
    y = torch.tensor([0, 0, 1, 1, 0, 2, 3])
    loss = create_loss("divide_and_conquer", clusters=3)
    batches = loss.sampler(ClassSampler(y[:4], 4, 2), y)
    loss.cluster_N = torch.tensor([0, 0, 0, 0, 1, 1, 1])  # cluster 2 is empty
    loss.refreshed_at.fill_(0)
    assert [sorted(batch) for batch in batches] == [[0, 1, 2, 3]]
    tree = create_loss("htl")
    tree.refresh(torch.randn(4, D), torch.tensor([0, 0, 3, 3]))
    assert tree.margin_CC.shape == (4, 4) and tree.margin_CC[1:3].abs().sum() == 0
    with pytest.raises(ValueError, match="label 4 is outside"):
        tree(torch.randn(2, D), torch.tensor([0, 4]))


@pytest.mark.parametrize("name", ["divide_and_conquer", "htl", "smart_mining"])
def test_batches_have_the_length_of_the_plain_ones_and_change_with_the_epoch(name):
    y, x = torch.arange(48) % C, torch.randn(48, D)
    for plain in (EpochSampler(48, 12), ClassSampler(y, 12, 4)):
        loss = new_loss(name)
        batches = loss.sampler(plain, y)
        assert list(batches) == list(plain)
        loss.refresh(x, y, lambda rows, k, seed: torch.arange(48) // 24, nearest_rows)
        loss.refreshed_at.fill_(0)
        first = list(batches)
        assert list(batches) == first and len(first) == len(plain) and {len(batch) for batch in first} == {12}
        batches.set_epoch(1)
        assert list(batches) != first
        batches.load_state_dict(dict(epoch=0))
        assert list(batches) == first


def test_beyond_the_limit_the_search_is_approximate(monkeypatch):
    pytest.importorskip("faiss")
    x = torch.randn(300, 8)
    exact = nearest_rows(x, 5)
    monkeypatch.setattr(training_set, "EXACT_ROWS", 100)
    found = nearest_rows(x, 5)
    assert found.shape == exact.shape and (found[:, :, None] == exact[:, None]).any(2).float().mean() > 0.9
    assert not (found == torch.arange(300)[:, None]).any()
    copies = torch.ones(6, 4)
    assert nearest_rows(copies, 3).shape == (6, 3)


@pytest.mark.parametrize("name", ["mic", "ranked_list_levels"])
def test_systems_with_a_network_of_their_own_train_on_images(name, draw_photos):
    photos = draw_photos()
    torch.manual_seed(0)
    params = dict(SMALL.get(name, {}))
    loss = create_loss(name, num_classes=len(photos.train.classes), embedding_size=12, **params)
    options = dict(loss.network)
    model = create_network(options.pop("kind"), create_embedder("small_cnn", 12, pretrained=False), **options)
    learn = dml_learner(image_dls(photos, model.spec, 8, per_class=2), model, loss, warm_epochs=0)
    with learn.no_bar(), learn.no_logging():
        best = learn.fit_schedule(1)
    assert 0 <= best["R@1"] <= 1 and learn.get_preds()[0].shape[1] == 12
