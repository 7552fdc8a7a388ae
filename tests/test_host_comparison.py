"""CP and its hosts differ in CP alone: the host as CP with both parts switched off, and the stored comparison."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from dml_nb.experiments.results import load_results, settings_with_defaults
from dml_nb.losses import create_loss

RUNS = Path(__file__).parents[1] / "runs"
OFF = dict(center_weight=0.0, calib_lambda=0.0, start_epoch=0)
HOSTS = [  # CP with both parts off, and the host that it must equal
    ("cp_proxy_anchor", dict(proxies_per_class=1), "proxy_anchor", dict(proxies_per_class=1)),
    ("cp_proxy_anchor", dict(proxies_per_class=3), "proxy_anchor", dict(proxies_per_class=3)),
    ("cp_proxy_nca", dict(proxies_per_class=1), "proxy_nca", dict(smoothing=0.0, include_positive=False)),
    ("cp_softtriple", dict(proxies_per_class=3), "softtriple", dict(proxies_per_class=3)),
]


@pytest.mark.parametrize("cp, cp_params, host, host_params", HOSTS)
def test_without_its_parts_cp_is_its_host(cp, cp_params, host, host_params):
    "Same value and same gradients, also with filled queues, if weight of the centre and λ are 0."
    torch.manual_seed(0)
    loss = create_loss(cp, num_classes=10, embedding_size=16, **cp_params, **OFF)
    plain = create_loss(host, num_classes=10, embedding_size=16, **host_params)
    with torch.no_grad():
        plain.proxies.copy_(loss.proxies.view_as(plain.proxies))
    z, y = torch.randn(40, 16), torch.arange(40) % 10
    loss.set_epoch(3)
    loss.remember(z, y)
    values = []
    for each in (loss, plain):
        x = z.clone().requires_grad_()
        value = each(x, y)
        value.backward()
        values.append((value.detach(), x.grad, each.proxies.grad.flatten()))
    for ours, theirs in zip(*values):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", ["host_comparison", "host_comparison_glyphs"])
def test_the_stored_comparison_varies_cp_alone(folder):
    if not (RUNS / folder).is_dir():
        pytest.skip(f"runs/{folder} is not part of this checkout")
    varied, families = {"center_weight", "calib_lambda", "center"}, {}
    for result in load_results(RUNS / folder):
        settings = settings_with_defaults(result["settings"])
        key = settings["loss"], settings["proxies_per_class"], settings["noise"]
        families.setdefault(key, []).append(({k: v for k, v in settings.items() if k not in varied}, result["seed"]))
    assert families
    for key, runs in families.items():
        assert all(settings == runs[0][0] for settings, _ in runs), key


TUNED, TRIALS = RUNS / "host_tuned", RUNS / "search/host_tuned"
FAMILIES = dict(cp_proxy_anchor="pa", cp_proxy_nca="nca", cp_softtriple="st")


@pytest.mark.skipif(not TUNED.is_dir(), reason="runs/host_tuned is not part of this checkout")
def test_host_and_cp_were_each_run_with_the_best_trial_of_their_search():
    found = set()
    for result in load_results(TUNED):
        settings = settings_with_defaults(result["settings"])
        family = f"{FAMILIES[settings['loss']]}-{settings['proxies_per_class']}"
        who = "cp" if settings["center_weight"] else "host"
        trials = pd.read_csv(TRIALS / f"{family}-{who}.csv").sort_values("R@1", ascending=False, kind="stable")
        searched = [name for name in trials if name in settings]
        best = [trials.iloc[0]]
        if who == "cp":
            best.append(trials[trials.calib_lambda > 0].iloc[0])
        assert any(all(settings[name] == trial[name] for name in searched) for trial in best), (family, who, settings)
        found.add((family, who, settings["calib_lambda"] > 0, result["seed"]))
    assert len(found) == 60
