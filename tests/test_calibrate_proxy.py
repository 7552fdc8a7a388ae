"CP: what it refuses, what it keeps, and that a step reads nothing back from a device."

import pytest
import torch

from dml_nb.core.class_queues import ClassQueues
from dml_nb.losses import calibrate, create_loss, list_losses
from dml_nb.losses.cp_readings import READINGS
from dml_nb.losses.proxy_hosts import CP_HOST_DEFAULTS

REFUSED = [
    ("cp_proxy_anchor", dict(capacity=True), "capacity must be a whole number, got True"),
    ("cp_proxy_anchor", dict(capacity=2.5), "capacity must be a whole number, got 2.5"),
    ("cp_proxy_anchor", dict(start_epoch=2.5), "start_epoch must be a whole number, got 2.5"),
    ("cp_proxy_anchor", dict(start_epoch=-1), "start_epoch must be at least 0"),
    ("cp_proxy_anchor", dict(proxies_per_class=0), "proxies_per_class must be at least 1"),
    ("cp_proxy_anchor", dict(calib_lambda=-1.0), "calib_lambda must be at least 0"),
    ("cp_proxy_anchor", dict(center_weight=-1.0), "center_weight must be at least 0"),
    ("cp_proxy_anchor", dict(proxy_temp=0.0), "proxy_temp must be at least"),
    ("cp_proxy_anchor", dict(center="rwa"), "unknown center 'rwa': did you mean 'raw'"),
    ("cp_proxy_anchor", dict(capcity=3), "did you mean 'capacity'"),
    ("cp_proxy_anchor", dict(preset="sharpe"), "did you mean 'sharp'"),
    ("cp_proxy_anchor", dict(alpha=0), "alpha must be at least"),
    ("cp_proxy_nca", dict(scale=-1), "scale must be at least"),
    ("cp_proxy_nca", dict(include_postive=True), "did you mean 'include_positive'"),
    ("cp_softtriple", dict(tau=-1.0), "tau must be at least 0"),
    ("cp_softtriple", dict(margin=-1.0), "margin must be at least 0"),
    ("cp_softtriple", dict(proxies_per_class=1, tau=0.5), "tau=0.5 has no effect with one proxy"),
    ("cp_norm_softmax", dict(temperature=0.0), "temperature must be at least"),
    ("cp_norm_softmax", dict(center="centred"), "no effect under the host 'norm_softmax'"),
    ("cp_proxy_nca", dict(center="centred", include_positive=True), "no effect under the host 'proxy_nca'"),
    ("cp_softtriple", dict(center="centred"), "no effect under the host 'softtriple'"),
    ("cp_softtriple", dict(center="centered"), "did you mean 'centred'"),
    ("cp_cosface", dict(center="centred"), "no effect under the host 'cosface'"),
    ("cp_cosface", dict(calib_lamda=1.0), "did you mean 'calib_lambda'"),
]


@pytest.mark.parametrize("name, params, message", REFUSED)
def test_a_wrong_parameter_is_named_with_its_remedy(name, params, message):
    with pytest.raises(ValueError, match=message):
        create_loss(name, 5, 8, **params)


@pytest.mark.parametrize("option", READINGS)
def test_an_unknown_reading_is_named(option):
    with pytest.raises(ValueError, match=f"unknown {option} 'x'"):
        create_loss("cp_reading", 5, 8, **{option: "x"})


def test_an_unknown_host_is_named():
    with pytest.raises(ValueError, match="unknown host 'cosfaec': did you mean 'cosface'"):
        calibrate("cosfaec", 5, 8)
    with pytest.raises(ValueError, match="did you mean 'capacity'"):
        calibrate(lambda sim_BC, labels: sim_BC.mean(), 5, 8, capcity=3)


def test_arcface_refuses_the_centred_reading_because_it_needs_a_cosine():
    with pytest.raises(ValueError, match="center='centred' gives no cosine"):
        create_loss("cp_arcface", 5, 8, center="centred", start_epoch=0)(torch.randn(4, 8), torch.arange(4))


def test_every_host_has_its_loss():
    assert {f"cp_{host}" for host in CP_HOST_DEFAULTS} | {"cp_reading"} == {
        n for n in list_losses() if n.startswith("cp_")
    }


def test_presets_name_the_two_readings_of_the_softmax():
    assert create_loss("cp_softtriple", 5, 8, preset="literal").proxy_temp == 1.0
    assert create_loss("cp_proxy_nca", 5, 8, preset="sharp").proxy_temp == 0.1
    assert create_loss("cp_proxy_nca", 5, 8, preset="sharp", proxies_per_class=1).proxy_temp == 0.1


def test_a_push_reads_nothing_back():
    "On a meta device there is no number to read, so any read-back would be an error."
    queues = ClassQueues(5, 8, 3).to("meta")
    labels = torch.zeros(4, dtype=torch.long, device="meta")
    push = ClassQueues.enqueue.__wrapped__ if hasattr(ClassQueues.enqueue, "__wrapped__") else ClassQueues.enqueue
    with pytest.MonkeyPatch.context() as patched:  # the checks of values are not part of it
        patched.setattr("dml_nb.core.class_queues.check_embeddings", lambda *args: None)
        patched.setattr("dml_nb.core.class_queues.check_labels", lambda *args: None)
        push(queues, torch.empty(4, 8, device="meta"), labels)
    assert queues.mean.is_meta


def test_more_samples_than_a_queue_holds_leave_the_newest_ones():
    queues = ClassQueues(2, 4, 3)
    x = torch.eye(4).repeat(3, 1)[:11]
    queues.enqueue(x, torch.zeros(11, dtype=torch.long))
    assert {tuple(q) for q in queues.queue[0].tolist()} == {tuple(q) for q in x[-3:].tolist()}
    assert queues.count.tolist() == [3, 0] and queues.pushed.tolist() == [11, 0]
