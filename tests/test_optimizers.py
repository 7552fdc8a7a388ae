"Each optimiser and the schedule on a plateau: the plain loop, interruptions, and two processes."

import pytest
import torch
from fastai.callback.core import Callback

from dml_nb.losses import create_loss
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.training.checkpoint import Checkpoint, resume
from dml_nb.training.joint_learner import NetworkAndLoss
from dml_nb.training.learner import dml_learner, feature_dls
from dml_nb.training.several_processes import launch

pytestmark = pytest.mark.filterwarnings("ignore:the training has")

C, D, EPOCHS = 6, 8, 4
CASES = dict(
    adamw=(torch.optim.AdamW, {}),
    adam=(torch.optim.Adam, dict(eps=0.01, betas=(0.8, 0.9))),
    sgd=(torch.optim.SGD, dict(momentum=0.9, nesterov=True)),
    rmsprop=(torch.optim.RMSprop, dict(rms_alpha=0.9, momentum=0.9)),
)


def new_learner(optimizer):
    "Random features of six classes of eight, four batches an epoch."
    torch.manual_seed(0)
    generator, labels = torch.Generator().manual_seed(0), torch.arange(C).repeat_interleave(8)
    x = torch.randn(C, 16, generator=generator)[labels] + 3 * torch.randn(len(labels), 16, generator=generator)
    loss, dls = create_loss("proxy_anchor", C, D), feature_dls(x, labels, x, labels, 12)
    options = dict(lr=1e-3, proxy_lr_mult=10.0, weight_decay=[0.01, 0.0], clip_value=None)
    learn = dml_learner(dls, EmbeddingHead(16, D), loss, optimizer=optimizer, **CASES[optimizer][1], **options)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


def state_of(learn):
    return {name: value.clone() for name, value in NetworkAndLoss(learn.model, learn.loss_func).state_dict().items()}


def check_equal(a, b, **tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or dict(rtol=0, atol=0)))


class Batches(Callback):
    "Keep the batches of a training."

    def before_fit(self):
        self.seen = []

    def before_batch(self):
        if self.training:
            self.seen.append((self.xb[0].clone(), self.yb[0].clone()))


@pytest.mark.parametrize("optimizer", CASES)
def test_the_learner_takes_the_steps_of_a_plain_loop(optimizer):
    learn, plain, batches = new_learner(optimizer), new_learner(optimizer), Batches()
    learn.fit_schedule(1, "constant", cbs=[batches])
    cls, given = CASES[optimizer]
    groups = [
        dict(params=list(plain.model.parameters()), lr=1e-3, weight_decay=0.01),
        dict(params=list(plain.loss_func.parameters()), lr=1e-2, weight_decay=0.0),
    ]
    opt = cls(groups, **{name.removeprefix("rms_"): value for name, value in given.items()})
    for x, labels in batches.seen:
        opt.zero_grad()
        plain.loss_func(plain.model(x), labels).backward()
        opt.step()
    assert len(batches.seen) == 4
    check_equal(state_of(learn), state_of(plain), rtol=1e-6, atol=1e-7)


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def after_batch(self):
        if self.training and self.train_iter == self.step:
            raise InterruptedError("stopped")


def train(optimizer, cbs=()):
    learn = new_learner(optimizer)
    learn.fit_schedule(EPOCHS, "plateau", step_epochs=1, gamma=0.1, cbs=cbs)
    return learn


@pytest.mark.parametrize("optimizer", CASES)
@pytest.mark.parametrize("step", [6, 12])  # in the middle and at the end of an epoch
def test_an_interrupted_training_goes_on_with_the_same_numbers(optimizer, step, tmp_path):
    with pytest.raises(InterruptedError):
        train(optimizer, [Checkpoint(tmp_path, "key", minutes=0), StopAt(step)])
    learn = new_learner(optimizer)
    resume(learn, tmp_path / "checkpoint.pt", "key")
    learn.fit_schedule(EPOCHS, "plateau", step_epochs=1, gamma=0.1, cbs=[Checkpoint(tmp_path, "key")])
    whole = train(optimizer)
    check_equal(state_of(learn), state_of(whole))
    assert [group["lr"] for group in learn.opt.hypers] == [group["lr"] for group in whole.opt.hypers]


def rates_and_weights():
    learn = train("sgd")
    return [group["lr"] for group in learn.opt.hypers], state_of(learn)


def test_two_processes_lower_the_rates_together():
    (rates, alone), (of_two, together) = rates_and_weights(), launch(rates_and_weights)
    assert rates == of_two
    check_equal(alone, together, rtol=1e-5, atol=1e-6)
