"""The numbers in README, tables and conclusions are those of the stored runs."""

from pathlib import Path

import pandas as pd
import pytest

from dml_nb.experiments.report_tables import collapse_text, means_over_seeds
from dml_nb.experiments.results import load_results, settings_with_defaults, untrained_metrics
from dml_nb.experiments.run_store import read_result
from dml_nb.experiments.statistics import format_interval, mean_interval, paired_difference

RUNS = Path(__file__).parents[1] / "runs"
HOSTS = dict(cp_proxy_anchor="Proxy Anchor", cp_proxy_nca="Proxy-NCA", cp_softtriple="SoftTriple")


@pytest.fixture(scope="module")
def comparison() -> pd.DataFrame:
    "The runs of `runs/host_comparison`, a line each, straight from `result.json`."
    lines = []
    for result in load_results(RUNS / "host_comparison"):
        s = settings_with_defaults(result["settings"])
        parts = s["center"], s["center_weight"], s["calib_lambda"]
        family = f"{HOSTS[s['loss']]}, K={s['proxies_per_class']}"
        lines.append(dict(family=family, noise=s["noise"], parts=parts, seed=result["seed"], **result["last"]))
    return pd.DataFrame(lines)


PARTS = {
    "host": ("raw", 0, 0),
    "+ global centre": ("raw", 1, 0),
    "+ calibration, λ=1": ("raw", 1, 1),
    "+ calibration, λ=0.01": ("raw", 1, 0.01),
    "centred, λ=0.01": ("centred", 1, 0.01),
}


def test_the_table_of_cp_and_its_hosts_is_that_of_the_runs(comparison):
    table = pd.read_csv(RUNS / "host_comparison/host_comparison.csv", dtype=str, keep_default_na=False)
    for line in table.to_dict("records"):
        of_family = comparison[(comparison.family == line["family"]) & (comparison.noise == line["noise"])]
        runs = {
            name: of_family[[each == parts for each in of_family.parts]].set_index("seed")
            for name, parts in PARTS.items()
        }
        ours, host = runs[line["line"]], runs["host"]
        assert str(len(ours)) == line["seeds"]
        for metric in ("R@1", "MAP@R"):
            assert format_interval(*mean_interval(100 * ours[metric])) == line[f"{metric} last"]
        assert f"{ours['between-class cosine'].mean():.2f}" == line["between-class cosine"].removesuffix(" COLLAPSED")
        if line["line"] != "host":
            d = paired_difference(100 * ours["R@1"], 100 * host["R@1"])
            assert format_interval(d["difference"], d["half"], 2) == line["R@1 last − host"]


def test_the_conclusions_about_cp_hold_in_the_table():
    "What `90_results/03_what_we_found_about_cp` and the README say in words."
    table = pd.read_csv(RUNS / "host_comparison/host_comparison.csv", index_col=[0, 1, 2]).xs("none", level="noise")
    step = table["R@1 last − host"].str.split(" ").str[0].astype(float)
    for family in ("Proxy Anchor, K=1", "Proxy Anchor, K=3"):
        assert table.loc[(family, "+ calibration, λ=1"), "between-class cosine"] == "0.99 COLLAPSED"
        assert -6.5 < step[family, "+ calibration, λ=1"] < -5.5
        assert -1.5 < step[family, "+ calibration, λ=0.01"] < -1 < step[family, "centred, λ=0.01"] < -0.4
    for family in ("Proxy-NCA, K=1", "Proxy-NCA, K=3", "SoftTriple, K=3"):
        deviation = table.deviation[family].astype(float)
        assert deviation["+ calibration, λ=1"] < deviation["host"]
        assert (step[family].dropna() < 0.05).all()


def test_the_conclusions_about_noise_hold_in_the_table():
    table = pd.read_csv(RUNS / "host_comparison/host_comparison.csv", index_col=[0, 1, 2])
    step = table["R@1 last − host"].dropna().str.split(" ").str[0].astype(float).xs("50%", level="noise")
    assert (step < 0).all()
    assert step["Proxy-NCA, K=3", "+ calibration, λ=1"] < -1.2 and step["SoftTriple, K=3", "+ calibration, λ=1"] < -1.2
    cosine = table["between-class cosine"].xs("50%", level="noise")
    assert cosine["Proxy Anchor, K=3", "+ global centre"] == "0.96 COLLAPSED"


def test_the_quickstart_table_is_that_of_its_runs():
    table = pd.read_csv(RUNS / "quickstart/quickstart.csv", index_col=0)
    results = [read_result(path) for path in sorted((RUNS / "quickstart/002-II").rglob("result.json"))]
    assert len(results) == 2
    for result in results:
        name = "CP + Proxy Anchor" if result["settings"]["loss"].startswith("cp_") else "Proxy Anchor"
        for metric in ("R@1", "R@4", "MAP@R"):
            assert table.loc[name, metric] == round(100 * result["last"][metric], 1)
    assert 8 < table.loc["Proxy Anchor", "R@1"] - table.loc["untrained", "R@1"] < 10  # README: about nine points


def test_the_best_epoch_of_every_stored_run_is_one_in_which_its_loss_acts():
    for folder in ("", "settling", "constant_rate", "host_tuned", "figure3", "figure4", "host_comparison"):
        for result in load_results(RUNS / folder):
            assert result["best"]["epoch"] >= result["settings"]["params"].get("start_epoch", 0), result["folder"]


def test_a_collapse_is_named_in_the_line_of_a_run():
    lines = means_over_seeds(load_results(RUNS / "host_comparison"))
    for (_, variant), group in lines[lines.epoch == "last"].groupby(["row", "variant"]):
        cosine = group["mean"][group.metric == "between-class cosine"].iloc[0]
        assert collapse_text(group) == (f"cosine between classes {cosine:.2f}" if cosine > 0.9 else ""), variant


def test_the_untrained_features_are_found_beside_the_runs():
    metrics = untrained_metrics(load_results(RUNS, "002-IV"))
    assert round(100 * metrics["cub, efficientnet_lite0"]["R@1"], 1) == 55.5
