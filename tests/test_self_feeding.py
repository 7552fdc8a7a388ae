"Losses with a memory or a schedule in training loops that call nothing but the loss."

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from dml_nb.losses import create_loss, list_losses, loss_parameters, remember_previous
from dml_nb.losses.base import takes_ids
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.training.learner import dml_learner, feature_dls

C, D, STEPS, EPOCHS = 6, 8, 3, 4
EARLY = dict(start_epoch=2, start_iteration=2, gap=0, steps=3, capacity=4, memory_size=30, reassign_every=2)
DECAY = dict(gamma_decay=0.5)  # gives the loss a schedule that it does not have by default


def build(name):
    torch.manual_seed(0)
    params = {key: value for key, value in (EARLY | DECAY).items() if key in loss_parameters(name)}
    return create_loss(name, C, D, **params)


def needs_calls(loss):
    return loss.has_schedule or hasattr(loss, "remember")


NAMES = [name for name in list_losses() if needs_calls(build(name))]
SUM = {"xbm": 1.0, "cp_proxy_anchor": 0.5}


def create(name):
    if name != "sum":
        return build(name)
    torch.manual_seed(0)
    return create_loss(
        SUM, C, D, **{part: {k: v for k, v in EARLY.items() if k in loss_parameters(part)} for part in SUM}
    )


def train(loss, feeds, epochs=range(EPOCHS), network=None, with_ids=False):
    "A plain loop; `feeds`: it makes the calls that `dml_learner` makes."
    generator = torch.Generator().manual_seed(1)
    values, network = [], network or nn.Linear(D, D)
    optimizer = torch.optim.SGD([*network.parameters(), *loss.parameters()], 0.1)
    for epoch in range(EPOCHS):
        batches = [
            (torch.randn(12, D, generator=generator), torch.randint(0, C, (12,), generator=generator))
            for _ in range(STEPS)
        ]
        if epoch not in epochs:
            continue
        torch.manual_seed(epoch)
        if feeds:
            loss.set_epoch(epoch)
        for x, y in batches:
            ids = [torch.arange(12)] if with_ids and takes_ids(loss) else []
            embeddings = network(x)
            value = loss(embeddings, y, **dict(zip(["sample_ids"], ids)))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if feeds and hasattr(loss, "remember"):
                loss.remember(embeddings.detach(), y, *ids)
            values.append(value.item())
        with torch.no_grad():  # validation
            values.append(loss(network(batches[0][0]), batches[0][1]).item())
    return values


def same_state(one, other):
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "sum"])
def test_a_self_feeding_loss_gives_the_values_of_a_loop_that_feeds_it(name, with_ids):
    fed, alone = create(name), create(name).self_feeding(steps_per_epoch=STEPS)
    torch.manual_seed(3)
    networks = [nn.Linear(D, D), nn.Linear(D, D)]
    networks[1].load_state_dict(networks[0].state_dict())
    values = train(fed, True, network=networks[0], with_ids=with_ids)
    assert train(alone, False, network=networks[1], with_ids=with_ids) == values
    same_state(fed, alone)
    assert alone.epoch == EPOCHS - 1


class Hidden(nn.Module):
    "A loss whose methods the Learner does not see, or sees without the ids of images."

    def __init__(self, loss, feeds):
        super().__init__()
        self.loss = loss
        if feeds:
            self.set_epoch = loss.set_epoch
            if hasattr(loss, "remember"):
                self.remember = lambda embeddings, labels: loss.remember(embeddings, labels)

    def forward(self, embeddings, labels, *_):
        return self.loss(embeddings, labels)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "manifold_proxy"])  # it draws at random
def test_a_self_feeding_loss_gives_the_values_of_the_learner(name):
    x, y = torch.randn(36, D, generator=torch.Generator().manual_seed(3)), torch.arange(36) % C
    found = []
    for feeds in (True, False):
        loss = build(name) if feeds else build(name).self_feeding(steps_per_epoch=3)
        torch.manual_seed(0)
        learn = dml_learner(feature_dls(x, y, x, y, batch_size=12), EmbeddingHead(D, D), Hidden(loss, feeds), lr=1e-2)
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn.fit_schedule(EPOCHS)
        found.append(([v.item() for v in learn.recorder.losses], loss))
    (values, fed), (own_values, alone) = found
    assert own_values == values and len(values) == 3 * EPOCHS
    same_state(fed, alone)


@pytest.mark.parametrize("name", ["cp_proxy_anchor", "xbm", "memvir", "sum"])
def test_resuming_a_self_feeding_loss_continues_exactly(name, tmp_path):
    "Also copies and pickled losses continue, with the batch that waits to be remembered."
    torch.manual_seed(3)
    start = nn.Linear(D, D)
    whole = create(name).self_feeding(STEPS)
    network = copy.deepcopy(start)
    values = train(whole, False, network=network)
    first, network = create(name).self_feeding(STEPS), copy.deepcopy(start)
    train(first, False, range(2), network)
    continued = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), create(name).self_feeding(STEPS)]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    continued[2].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for loss in continued:
        assert train(loss, False, range(2, EPOCHS), copy.deepcopy(network)) == values[-2 * (STEPS + 1) :]
        same_state(whole, loss)


def test_the_last_batch_can_be_remembered_after_the_training():
    loss = create_loss("mcl", C, D).self_feeding(STEPS)
    for x in torch.randn(3, 5, D):
        loss(x, torch.arange(5))
    assert loss.memory.count == 10
    remember_previous(loss)
    remember_previous(loss)
    assert loss.memory.count == 15


def test_a_self_feeding_loss_in_a_loop_that_feeds_it_is_an_error():
    x, y = torch.randn(36, D), torch.arange(36) % C
    loss = create("cp_proxy_anchor").self_feeding(STEPS)
    learn = dml_learner(feature_dls(x, y, x, y, batch_size=12), EmbeddingHead(D, D), loss)
    with pytest.raises(ValueError, match="counts its epochs itself"), learn.no_bar(), learn.no_logging():
        learn.fit_schedule(EPOCHS)


@pytest.mark.parametrize("name", [name for name in list_losses() if name not in ("npair", "proxy_synthesis")])
def test_only_losses_with_a_schedule_depend_on_the_epoch(name):
    loss, (x, y) = build(name), (torch.randn(24, D), torch.arange(24) % C)
    for _ in range(3 if hasattr(loss, "remember") else 0):
        loss.remember(x, y)
    values = set()
    for epoch in range(6):
        torch.manual_seed(0)
        loss.set_epoch(epoch)
        torch.manual_seed(0)
        values.add(loss(x + 0.1, y).item())
    assert len(values) == 1 or loss.has_schedule


# the warning


def warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "self_feeding" in str(w.message)]


@pytest.mark.parametrize("name", list_losses())
def test_a_loop_that_forgets_the_calls_of_a_loss_is_warned_once(name):
    loss = build(name)
    found = warnings_of(lambda: train(loss, False))
    assert len(found) == needs_calls(loss)
    if found:
        assert ("remember" in found[0].split(":")[0]) == hasattr(loss, "remember")
        assert ("set_epoch" in found[0].split(":")[0]) == loss.has_schedule


@pytest.mark.parametrize("name", [*NAMES, "sum"])
def test_no_warning_where_the_loss_is_fed_and_in_tests(name):
    assert warnings_of(lambda: train(create(name), True)) == []
    assert warnings_of(lambda: train(create(name).self_feeding(STEPS), False)) == []
    x, y, loss = torch.randn(12, D, requires_grad=True), torch.arange(12) % C, create(name)
    assert warnings_of(lambda: [loss(x, y) for _ in range(9)]) == []


def test_each_part_of_a_sum_warns_for_itself():
    assert len(warnings_of(lambda: train(create("sum"), False))) == 2
    assert warnings_of(lambda: train(create_loss({"triplet": 1, "center": 0.01}, C, D), False)) == []


def test_a_loop_that_only_remembers_is_told_about_the_schedule():
    loss = create("cp_proxy_anchor")

    def loop():
        network = nn.Linear(D, D)
        for _ in range(4):
            z, y = network(torch.randn(12, D)), torch.arange(12) % C
            loss(z, y)
            loss.remember(z, y)

    (message,) = warnings_of(loop)
    assert "calls its set_epoch" in message


# in a trainer of pytorch-metric-learning


def pml_trainer(loss, miner=None, epochs=3, size=48):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainers = pytest.importorskip(
            "pytorch_metric_learning.trainers", reason="pytorch-metric-learning is not installed"
        )
        x, y = torch.randn(size, D, generator=torch.Generator().manual_seed(3)), torch.arange(size) % C
        network = nn.Linear(D, D)
        optimizers = dict(trunk_optimizer=torch.optim.SGD(network.parameters(), 0.1))
        if list(loss.parameters()):
            optimizers["metric_loss_optimizer"] = torch.optim.SGD(loss.parameters(), 0.1)
        trainer = trainers.MetricLossOnly(
            dict(trunk=network),
            optimizers,
            12,
            dict(metric_loss=loss),
            torch.utils.data.TensorDataset(x, y),
            mining_funcs={} if miner is None else dict(tuple_miner=miner),
            dataloader_num_workers=0,
            data_device="cpu",
        )
        trainer.train(num_epochs=epochs)
    return loss


@pytest.mark.parametrize("name", NAMES)
def test_a_self_feeding_loss_in_a_trainer_of_pytorch_metric_learning(name):
    loss = pml_trainer(build(name).self_feeding(steps_per_epoch=4))
    assert loss.epoch == 2
    loss.state_dict()
    if name.startswith("cp_"):
        assert loss.global_center.pushed.sum() == 3 * 48
    if name in ("xbm", "mcl", "prism"):
        assert loss.memory.count > 0 and loss.iteration == 12
    if name == "memvir":
        assert loss.count > 0


def test_a_trainer_of_pytorch_metric_learning_uses_our_miner():
    loss = pml_trainer(create_loss("triplet"), create_loss("contrastive", miner="hard").miner)
    assert loss.last_active > 0
