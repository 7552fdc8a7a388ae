"The report says what ran, the figure notebooks run on any folder of results, the page sorts in a browser."

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dml_nb.experiments import compare
from dml_nb.experiments.compare import CLAIMED, holm, paired, paired_tests, side_by_side
from dml_nb.experiments.report import load_results, write_report
from dml_nb.experiments.results import interval, runs_frame
from dml_nb.experiments.rows import all_rows, missing, settings_for

ROOT = Path(__file__).parents[1]
FROZEN = dict(dataset="cub", backbone="efficientnet_lite0", regime="frozen")


def write_run(out: Path, row: str, seed: int = 0, r1: float = 0.55, version: str = "0.0.1", subfolder: str = "", **overrides) -> dict:
    "What a run leaves behind, without running."
    row, settings = all_rows()[row], settings_for(all_rows()[row], **FROZEN, **overrides)
    start = settings["params"].get("start_epoch", 2)
    curve = pd.DataFrame({"epoch": range(settings["epochs"]), "train_loss": 5.0})
    curve["R@1"] = r1 - 0.02 * 0.5**curve.epoch + 0.003 * np.sin(seed + curve.epoch)
    curve["MAP@R"], curve["R@2"] = curve["R@1"] / 3, curve["R@1"] + 0.1
    curve["deviation"] = np.where(curve.epoch < start, 1.2, 1.8 - 0.9 * settings["params"].get("calib_lambda", 1)) + 0.01 * seed
    best = int(curve["R@1"].idxmax())
    result = dict(row=row.id, method=row.method, table=row.table, seed=seed, settings=settings, claimed=row.claimed, own_setting=False, environment=dict(dml_nb=version, commit="c1"),
                  best=curve.drop(columns="train_loss").loc[best].to_dict(), last=curve.drop(columns="train_loss").iloc[-1].to_dict(), data_checksum="d1", seconds={})
    name = re.sub("[^a-z0-9]+", "-", f"{version}-{json.dumps(overrides)}".lower())
    folder = out / subfolder / row.id / name / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    curve.to_csv(folder / "history.csv", index=False)
    return result | dict(folder=str(folder))


def test_versions_are_never_in_one_mean_and_copies_count_once(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "002-II/cub-cp-pa-k-3", seed, 0.5, version="0.0.1")
        write_run(tmp_path, "002-II/cub-cp-pa-k-3", seed, 0.6, version="0.0.2")
        write_run(tmp_path, "002-II/cub-cp-pa-k-3", seed, 0.6, version="0.0.2", subfolder="copied/elsewhere")
    results = load_results(tmp_path)
    assert len(results) == 6
    frame = runs_frame(results).query("metric == 'R@1' and epoch == 'last'")
    assert frame.groupby("variant").size().to_dict() == {"dml_nb 0.0.1": 2, "dml_nb 0.0.2": 2}
    table = side_by_side(results)
    assert table.index.get_level_values("changed").tolist() == ["dml_nb 0.0.1", "dml_nb 0.0.2"]


def test_every_row_keeps_its_claims_and_gets_no_difference_in_another_setting(tmp_path):
    rows = [row for row in all_rows().values() if missing(row, "cub", "efficientnet_lite0") is None]
    results = [write_run(tmp_path, row.id) for row in rows]
    for row, result in zip(rows, results):
        table = side_by_side([result], metrics=tuple(row.claimed))
        for metric, value in row.claimed.items():
            if (CLAIMED, metric) in table:
                assert table[CLAIMED, metric].tolist() == [value]
        assert not [c for c in table if "difference" in c[1]]
    numbers = compare.numbers(results)
    assert set(numbers.row) == {row.id for row in rows} and numbers.difference.isna().all()
    paths = write_report([r for r in results if r["table"] in ("002-III", "002-V")], tmp_path / "report", "two tables")
    assert all(path.stat().st_size > 100 for path in paths)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_its_definition(p):
    corrected, order = holm(p), np.argsort(p, kind="stable")
    for rank, i in enumerate(order):
        assert corrected[i] == pytest.approx(min(1, max((len(p) - j) * p[order[j]] for j in range(rank + 1))))


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=3, max_size=8))
def test_paired_is_scipys_paired_t_test_over_common_seeds(pairs):
    a, b = (pd.Series([pair[i] for pair in pairs], dtype=float) for i in (0, 1))
    got = paired(a, b.drop(0))
    d = (a - b).to_numpy()[1:]
    assert got["seeds"] == len(d) and got["difference"] == pytest.approx(d.mean())
    if np.ptp(d) > 1e-6:
        expected = stats.ttest_rel(a[1:], b[1:])
        low, high = expected.confidence_interval()
        assert got["p_t"] == pytest.approx(expected.pvalue) and got["half"] == pytest.approx((high - low) / 2) and interval(d)[0] == got["difference"]


def test_tests_do_not_cross_settings(tmp_path):
    for seed in range(3):
        for name, r1 in (("cp-pa-k-3", 0.56), ("cp-pa-k-1", 0.55)):
            write_run(tmp_path, f"002-II/cub-{name}", seed, r1)
            write_run(tmp_path, f"002-II/cub-{name}", seed, r1, noise="20%")
    tests = paired_tests(load_results(tmp_path))
    assert sorted(tests.block.str.contains("noise")) == [False, True] and len(tests) == 2


def test_command_writes_every_form_and_names_bad_files(shell, tmp_path):
    for seed in range(2):
        write_run(tmp_path / "runs", "002-II/cub-cp-pa-k-3", seed)
        write_run(tmp_path / "runs", "002-II/cub-pa-multi-proxy-k-3-without-cp", seed, 0.56)
    assert "other setting" in shell("report", "II")
    assert {p.suffix for p in (tmp_path / "runs").glob("report-II.*")} == {".md", ".csv", ".html", ".png", ".tex"}
    bad = tmp_path / "runs" / "bad" / "seed0" / "result.json"
    bad.parent.mkdir(parents=True)
    for text, word in (('{"row"', "is damaged"), ("[]", "is damaged"), (json.dumps(load_results(tmp_path / "runs", "II")[0] | dict(environment=dict(dml_nb="99.0"))), "was written by dml_nb 99.0")):
        bad.write_text(text)
        assert word in shell("report", "II", status=1)


BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_page_sorts_by_number_in_a_browser(tmp_path):
    for name, r1 in (("cp-pa-k-1", 0.091), ("cp-pa-k-2", 0.56), ("cp-pa-k-3", 0.31)):
        for seed in range(2):
            write_run(tmp_path / "runs", f"002-II/cub-{name}", seed, r1)
    page = next(p for p in write_report(load_results(tmp_path / "runs"), tmp_path) if p.suffix == ".html")
    text = page.read_text()

    def order(clicks: int) -> list[str]:
        click = ";{const head = [...document.querySelector('table.sortable').tHead.rows].at(-1).cells; const i = [...head].findIndex(h => h.innerText.includes('R@1 last'));" + "head[i].click();" * clicks + "}"
        page.write_text(text.replace("</script>", click + "</script>"))
        dom = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120).stdout
        return re.findall(r"<td[^>]*>CP \+ PA (K=\d)</td>", dom.split("</table>")[0])

    assert order(0) == ["K=1", "K=2", "K=3"]
    assert order(1) == ["K=2", "K=3", "K=1"] # highest first; as text "9.1" would come first
    assert order(2) == ["K=1", "K=3", "K=2"]


def execute(name: str, out: Path, **parameters) -> str:
    "Text of all outputs of a figure notebook."
    import papermill

    notebook = papermill.execute_notebook(ROOT / "nbs" / "rows" / f"{name}.ipynb", out / f"{name}.ipynb", parameters, kernel_name="python3", progress_bar=False, cwd=str(out))
    parts = [o.get("text") or o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/plain", "") for cell in notebook.cells for o in cell.get("outputs", [])]
    assert (out / "runs" / f"{name}.png").exists() or list((out / "runs").glob(f"{name}-*.png"))
    return "\n".join("".join(part) for part in parts)


def test_settling_notebook_judges_each_option_against_the_base(tmp_path):
    for seed in range(4):
        for overrides, r1 in (({}, 0.55), (dict(combine="average"), 0.58), (dict(calib_lambda=0), 0.55), (dict(calib_lambda=1), 0.5)):
            write_run(tmp_path / "runs", "002-II/cub-cp-pa-k-3", seed, r1 + 0.001 * seed * len(overrides), **overrides)
    text = execute("settling", tmp_path, runs="runs")
    assert re.search(r"R@1 last\*\*\. Better than the base: `combine=average` \(\+3\.\d+\)\. Worse: `calib_lambda=1` \(-4\.\d+\)", text)
    assert "in all seeds: `calib_lambda=1`; it does not with `base`, `combine=average`. Calibration off, it stays above: yes" in text


def test_figure_notebooks_read_a_folder_of_results(tmp_path):
    for seed in range(2):
        for overrides in ({}, dict(capacity=5), dict(capacity=60), dict(start_epoch=0), dict(start_epoch=5), dict(calib_lambda=0)):
            write_run(tmp_path / "runs", "002-II/cub-cp-pa-k-3", seed, 0.55 + 0.01 * len(overrides), **overrides)
        write_run(tmp_path / "runs", "002-II/cub-pa-multi-proxy-k-3-without-cp", seed, 0.56, epochs=10, lr=0.001, alpha=8.0)
    assert "λ=0" in execute("figure3", tmp_path, runs="runs")
    assert "capacity" in execute("figure4", tmp_path, runs="runs")


def test_noise_notebook_pairs_each_host_with_cp(tmp_path):
    hosts = {"proxy-anchor": "cp-pa", "proxy-nca": "cp-nca", "softtriple": "cp-softtriple"}
    clean = {"cp-pa": "cp-proxy-anchor-loss", "cp-nca": "cp-proxy-nca"}
    for seed in range(3):
        for names in hosts.items():
            for name in names:
                for rate in (10, 50):
                    write_run(tmp_path / "runs", f"002-V/cub-{name}-noise-{rate}", seed, 0.55 - 0.002 * rate, embedding_size=512)
                write_run(tmp_path / "runs", f"002-IV/cub-{clean.get(name, name)}", seed, 0.55, embedding_size=512)
    text = execute("noise", tmp_path, runs="runs")
    assert text.count("SoftTriple, last epoch: from clean labels to 50 %") == 1 and "Proxy-NCA" in text
    table = pd.read_csv(tmp_path / "runs" / "noise-cub.csv", header=[0, 1], index_col=[0, 1])
    assert len(table) == 9
