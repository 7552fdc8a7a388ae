"Reports of stored results, the notebooks that read folders of results, and the sorting of the page in a browser."

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

from dml_nb.experiments.example_runs import example_result
from dml_nb.experiments.plots import plot_recall
from dml_nb.experiments.recipes import settings_for
from dml_nb.experiments.report import style_table, to_html, to_markdown, write_report
from dml_nb.experiments.report_tables import (
    CLAIMED_BLOCK,
    OWN_BLOCK,
    RANK_COLUMN,
    describe_runs,
    means_over_seeds,
    report_sections,
    side_by_side,
)
from dml_nb.experiments.results import load_results, runs_frame
from dml_nb.experiments.statistics import (
    holm,
    mean_interval,
    order_agreement,
    paired_difference,
    paired_tests,
    variant_tests,
)
from dml_nb.experiments.tables import all_rows, row_of, why_not_runnable

ROOT = Path(__file__).parents[1]


def write_run(
    out: Path,
    row: str,
    seed: int = 0,
    recall: float = 0.55,
    **changes,  # further arguments of `example_result`
) -> dict:
    "Write the result and the learning curve of a run without training."
    result = example_result(row, seed, recall, **changes)
    settings, params = result["settings"], result["settings"]["params"]
    start, weight = params.get("start_epoch", 2), params.get("calib_lambda", 1)
    curve = pd.DataFrame({"epoch": range(settings["epochs"]), "train_loss": 5.0})
    curve["R@1"] = recall - 0.02 * 0.5**curve.epoch + 0.003 * np.sin(seed + curve.epoch)
    curve["MAP@R"], curve["R@2"] = curve["R@1"] / 3, curve["R@1"] + 0.1
    curve["deviation"] = np.where(curve.epoch < start, 1.2, 1.8 - 0.9 * weight) + 0.01 * seed
    lines = curve.drop(columns="train_loss").to_dict("records")
    result |= dict(best=lines[curve["R@1"].idxmax()], last=lines[-1])
    name = re.sub("[^a-z0-9]+", "-", json.dumps(changes).lower())
    folder = out / result["row"] / name / f"seed{seed}"
    folder.mkdir(parents=True)
    del result["folder"]
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    curve.to_csv(folder / "history.csv", index=False)
    return result | dict(folder=str(folder))


def test_versions_are_never_in_one_mean_and_copies_count_once(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "002-II/cub-cp-pa-k-3", seed, 0.5, version="0.0.1")
        write_run(tmp_path, "002-II/cub-cp-pa-k-3", seed, 0.6, version="0.0.2")
        write_run(tmp_path / "copied" / "elsewhere", "002-II/cub-cp-pa-k-3", seed, 0.6, version="0.0.2")
    results = load_results([tmp_path, tmp_path / "copied" / "elsewhere"])
    assert len(results) == 6
    frame = runs_frame(results).query("metric == 'R@1' and epoch == 'last'")
    assert frame.groupby("variant").size().to_dict() == {"dml_nb 0.0.1": 2, "": 2}  # the newer version is the table's
    table = side_by_side(results)
    assert table.index.get_level_values("changed").tolist() == ["dml_nb 0.0.1", ""]


def test_experiments_in_their_own_folders_stay_out_of_the_tables(tmp_path):
    out = tmp_path / "out"
    for seed in range(3):
        for name, recall in (("cp-pa-k-3", 0.56), ("cp-pa-k-2", 0.55), ("cp-pa-k-1", 0.54)):
            write_run(out, f"002-II/cub-{name}", seed, recall)
        for capacity in (1, 5, 60):
            write_run(out / "settling", "002-II/cub-cp-pa-k-3", seed, 0.6, capacity=capacity)
            write_run(out / "figure4", "002-II/cub-cp-pa-k-3", seed, 0.6, capacity=capacity)
    assert len(load_results(out)) == 9 and len(load_results(out / "settling")) == 9
    assert len(paired_tests(load_results(out))) == 3
    (part,) = report_sections(load_results(out))
    assert part.title == "002-II, cub, 512-d" and len(part.beside) == 3
    both = report_sections(load_results([out, out / "settling"]))
    assert [len(part.tests) for part in both] == [3, 3] and both[1].title == "Changed settings: 002-II, cub, 512-d"
    assert both[0].beside.equals(part.beside), "ablations change nothing in the table: neither its lines nor its ranks"
    with pytest.raises(ValueError, match="name that folder"):
        load_results(tmp_path)


def test_changed_runs_have_a_family_of_their_own(tmp_path):
    for seed in range(4):
        for overrides, recall in (({}, 0.55), (dict(capacity=5), 0.57), (dict(lr=0.01), 0.5)):
            write_run(tmp_path, "002-II/cub-cp-pa-k-3", seed, recall + 0.001 * seed * len(overrides), **overrides)
        write_run(tmp_path, "002-II/cub-cp-pa-k-1", seed, 0.54 + 0.002 * (seed % 2))
    results = load_results(tmp_path)
    changed = variant_tests(results)
    assert set(changed.b) == {"CP + PA K=3"} and len(changed) == 2
    assert changed.holm.min() == pytest.approx(2 * changed.p_t.min())
    tests = paired_tests(results)
    assert len(tests) == 1 and tests.holm[0] == pytest.approx(tests.p_t[0])


def test_sizes_are_neither_tested_nor_ranked_together(tmp_path):
    for seed in range(3):
        for name, recall in (("proxy-nca", 0.7), ("n-pair", 0.6), ("proxy-anchor", 0.5), ("circle-loss", 0.4)):
            write_run(tmp_path, f"002-IV/cub-{name}", seed, recall + 0.001 * seed)
    results = load_results(tmp_path)
    tests = paired_tests(results)
    assert len(tests) == 2 and {frozenset(pair) for pair in zip(tests.a, tests.b)} == {
        frozenset(("Proxy-NCA", "N-pair")),
        frozenset(("Proxy Anchor", "Circle loss")),
    }
    beside = side_by_side(results)
    ranks = beside.xs(RANK_COLUMN, axis=1, level=1).iloc[:, 0].droplevel(["claimed setting", "changed"])
    assert ranks.to_dict() == {
        ("002-IV, cub, 64-d", "Proxy-NCA"): "1 (2)",
        ("002-IV, cub, 64-d", "N-pair"): "2 (1)",
        ("002-IV, cub, 512-d", "Proxy Anchor"): "1 (1)",
        ("002-IV, cub, 512-d", "Circle loss"): "2 (2)",
    }
    assert set(order_agreement(results).section) == {"002-IV, cub, 64-d", "002-IV, cub, 512-d"}


def test_only_runs_of_the_recipe_are_bold_and_each_section_has_its_own_best(tmp_path):
    write_run(tmp_path, "002-IV/cub-proxy-anchor", 0, 0.6)
    write_run(tmp_path, "002-IV/cub-circle-loss", 0, 0.53)
    write_run(tmp_path, "002-IV/cub-circle-loss", 0, 0.9, lr=0.5)
    write_run(tmp_path, "002-IV/cub-circle-loss", 0, 0.8, noise="20%")
    write_run(tmp_path, "002-IV/cub-proxy-nca", 0, 0.4)
    write_run(tmp_path, "002-IV/cub-n-pair", 0, 0.3)
    results = load_results(tmp_path)
    for result in results:  # the Cars data are not on this machine, so a result of CUB stands in for one of Cars
        if result["row"] == "002-IV/cub-n-pair":
            result.update(
                row="002-IV/cars-n-pair", method="N-pair on Cars", claimed=row_of("002-IV/cars-n-pair").claimed
            )
    html = style_table(side_by_side(results)).to_html()
    ids = re.findall(r"#(\S+?)[,\s{]", "".join(re.findall(r"([^}]*)\{\s*font-weight: bold", html)))
    bold = {re.search(rf'id="{id}"[^>]*>([^<]*)<', html)[1] for id in ids}
    best = {
        f"{100 * r['best']['R@1']:.1f}"
        for r in results
        if r["method"] in ("Proxy Anchor", "Proxy-NCA", "N-pair on Cars")
    }
    assert best <= bold and not bold & {
        f"{100 * r['best']['R@1']:.1f}" for r in results if r["method"] == "Circle loss"
    }


def test_a_run_of_an_old_recipe_is_not_the_tables_setting(tmp_path):
    write_run(tmp_path, "002-II/cub-cp-pa-k-3", 0, 0.69, own_setting=True)
    write_run(tmp_path, "002-II/cub-cp-pa-k-1", 0, 0.69, own_setting=True, lr=0.5)
    table = side_by_side(load_results(tmp_path))
    assert table[OWN_BLOCK, "R@1 difference"].to_dict().keys() == {k for k in table.index}
    by_method = table[OWN_BLOCK, "R@1 difference"].droplevel(["section", "claimed setting", "changed"])
    assert by_method["CP + PA K=1"] == "" and float(by_method["CP + PA K=3"]) == pytest.approx(-0.6, abs=0.5)
    assert means_over_seeds(load_results(tmp_path)).query("variant != ''").difference.isna().all()


def test_two_seeds_have_no_p_value_and_still_count_in_the_family(tmp_path):
    for name, seeds, recall in (("cp-pa-k-1", 4, 0.5), ("cp-pa-k-2", 4, 0.52), ("cp-pa-k-3", 2, 0.56)):
        for seed in range(seeds):
            write_run(tmp_path, f"002-II/cub-{name}", seed, recall + 0.002 * (seed * int(name[-1]) % 3))
    tests = paired_tests(load_results(tmp_path))
    assert tests.seeds.tolist() == [4, 2, 2] and tests.p_t.notna().tolist() == [True, False, False]
    assert tests.holm[0] == pytest.approx(min(1, 3 * tests.p_t[0]))
    assert "–" in to_markdown(load_results(tmp_path))


def test_the_report_states_the_agreement_with_the_claimed_order(tmp_path):
    # ours, worst first
    order = ["circle-loss", "softtriple", "proxy-anchor", "cp-proxy-anchor-loss", "multi-similarity"]
    for seed in range(3):
        for i, name in enumerate(order):
            write_run(tmp_path, f"002-IV/cub-{name}", seed, 0.5 + 0.02 * i, commit=f"c{seed}")
        for i, name in enumerate(("pa-s-p", "pa-s-p-s-g")):
            write_run(tmp_path, f"002-I/cub-{name}", seed, 0.5 + 0.02 * i)
    results = load_results(tmp_path)
    found = order_agreement(results).set_index("section")
    ours = range(5)
    claimed = [float(row_of(f"002-IV/cub-{name}").claimed["R@1"]) for name in order]
    assert found.tau["002-IV, cub, 512-d"] == pytest.approx(stats.kendalltau(claimed, ours).statistic)
    assert found.rho["002-IV, cub, 512-d"] == pytest.approx(stats.spearmanr(claimed, ours).statistic)
    text = to_markdown(results)
    assert (
        "5 methods by R@1; Kendall's τ" in text
        and "2 methods by R@1, too few for a rank correlation; 1 of 1 pairs have the claimed order" in text
    )
    assert (
        "3 commits, 0 of them with uncommitted changes" in text and "5 lines with seeds of more than one commit" in text
    )
    html = to_html(results, {})
    assert html.count("<tbody>") == 5 and "too few for a rank correlation" in html


def test_losses_without_claimed_values_are_ranked(tmp_path):
    place = dict(dataset="glyphs", backbone="small_cnn", regime="finetune")
    for seed in range(2):
        for name, recall in (("circle", 0.7), ("proxy-anchor", 0.8), ("contrastive", 0.6)):
            write_run(tmp_path / "runs", f"own/{name}", seed, recall, place=place)
    results = load_results(tmp_path / "runs", "own")
    table = side_by_side(results)
    assert CLAIMED_BLOCK not in table and not [c for c in table if "difference" in c[1]]
    ranks = table.xs(RANK_COLUMN, axis=1, level=1).iloc[:, 0].droplevel(["section", "claimed setting", "changed"])
    assert ranks.to_dict() == {"circle": "2", "proxy_anchor": "1", "contrastive": "3"}
    paths = write_report(results, tmp_path / "report")
    assert "claimed |" not in paths[0].read_text(encoding="utf-8") and order_agreement(results).empty and len(paths) > 5


def own_folder(path: Path) -> dict:
    "A folder of one's own as the place of a run."
    path.mkdir(parents=True)
    return dict(dataset=str(path), backbone="small_cnn", regime="finetune")


def test_own_data_have_a_section_of_their_name_with_ranks_and_without_claims(tmp_path):
    birds, runs = own_folder(tmp_path / "birds"), tmp_path / "runs"
    for seed in range(3):
        write_run(runs, "002-IV/cub-circle-loss", seed, 0.5, place=birds)
        write_run(runs, "002-II/cub-cp-pa-k-3", seed, 0.7 + 0.01 * seed, place=birds)
        write_run(runs, "own/contrastive", seed, 0.6, place=birds)
        write_run(runs, "own/contrastive", seed, 0.65, place=birds, lr=0.5)
    (section,) = report_sections(load_results(runs))
    assert section.title == "birds, 512-d" and not section.sentences
    assert set(section.beside.columns.get_level_values(0)) == {"ours: birds, small_cnn, finetune"}
    ranks = section.beside.xs("rank", axis=1, level=1).iloc[:, 0].droplevel(["section", "claimed setting"])
    assert ranks.to_dict() == {
        ("CP + PA K=3", ""): "1",
        ("contrastive", "lr=0.5"): "2",
        ("contrastive", ""): "3",
        ("Circle loss", ""): "4",
    }
    assert len(section.tests) == 6
    text = to_markdown(load_results(runs)).split("## ")[1:]
    assert len(text) == 1 and "claimed" not in text[0] and "cub" not in text[0] and "002" not in text[0]
    names = [path.name for path in write_report(load_results(runs), tmp_path / "report")]
    assert not [name for name in names if "claimed" in name]
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("font-weight: bold") == 1 and "Measured values: birds, 512-d" in page


def test_a_folder_called_cub_is_not_cub(tmp_path):
    write_run(tmp_path / "runs", "002-II/cub-cp-pa-k-3", place=own_folder(tmp_path / "cub"))
    write_run(tmp_path / "runs", "002-II/cub-cp-pa-k-3")
    own, table = report_sections(load_results(tmp_path / "runs"))[::-1]
    assert (table.title, own.title) == ("002-II, cub, 512-d", "cub, 512-d")
    assert CLAIMED_BLOCK in table.beside and CLAIMED_BLOCK not in own.beside
    assert set(own.beside.index.get_level_values("claimed setting")) == {""}


def test_two_folders_of_one_name_are_not_ranked_together(tmp_path):
    for folder, checksum in (("here", "d1"), ("there", "d2")):
        birds = own_folder(tmp_path / folder / "birds")
        result = write_run(tmp_path / "runs" / folder, "own/circle", place=birds)
        path = Path(result.pop("folder")) / "result.json"
        path.write_text(json.dumps(result | dict(data_checksum=checksum)), encoding="utf-8")
    results = load_results([tmp_path / "runs" / "here", tmp_path / "runs" / "there"])
    assert [part.title for part in report_sections(results)] == ["birds d1, 512-d", "birds d2, 512-d"]
    assert {ax.get_title() for ax in plot_recall(results).axes} == {
        f"birds {checksum}, small_cnn, finetune, 512-d" for checksum in ("d1", "d2")
    }


def test_own_data_rank_one_computation_once_and_name_two_of_one_name_apart(tmp_path):
    birds = own_folder(tmp_path / "birds")
    same = ("002-III/cub-proxy-anchor", "002-IV/cub-proxy-anchor")
    for row in (*same, "002-II/cub-cp-pa-k-3"):
        write_run(tmp_path / "runs", row, 0, 0.7 if row in same else 0.6, place=birds)
    settings = [settings_for(row_of(row), **birds) for row in same]
    assert settings[0] == settings[1]
    (section,) = report_sections(load_results(tmp_path / "runs"))
    assert section.beside.xs("rank", axis=1, level=1).iloc[:, 0].tolist() == ["2", "1"]
    write_run(tmp_path / "other", "002-III/cub-proxy-anchor", 0, 0.5, place=birds, lr=0.5)
    write_run(tmp_path / "other", "002-IV/cub-proxy-anchor", 0, 0.6, place=birds)
    (section,) = report_sections(load_results(tmp_path / "other"))
    names = section.beside.index.droplevel(["section", "claimed setting"]).tolist()
    assert names == [("Proxy Anchor, 002-III", "lr=0.5"), ("Proxy Anchor, 002-IV", "")]


def test_a_run_that_skipped_unreadable_files_is_not_changed(tmp_path):
    write_run(tmp_path, "002-II/cub-cp-pa-k-3", 0, on_corrupt="skip")
    write_run(tmp_path, "002-II/cub-cp-pa-k-3", 1)
    (section,) = report_sections(load_results(tmp_path))
    assert section.title == "002-II, cub, 512-d" and len(section.beside) == 1


def test_runs_outside_git_are_not_counted_as_a_commit(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "002-II/cub-cp-pa-k-3", seed, commit="not a git checkout")
    text = describe_runs(load_results(tmp_path))
    assert "0 commits, 0 of them with uncommitted changes; 2 results of a package outside a git checkout" in text
    assert "0 lines with seeds of more than one commit" in text


def test_results_are_reported_from_inside_their_folder(tmp_path, monkeypatch):
    write_run(tmp_path, "002-II/cub-cp-pa-k-3")
    monkeypatch.chdir(next(tmp_path.glob("*/*/*")))
    assert len(write_report(load_results("."), tmp_path / "report")) > 4


def test_every_metric_that_a_table_claims_is_shown(tmp_path):
    write_run(tmp_path, "002-III/cub-cosface")
    write_run(tmp_path, "002-IV/cub-proxy-anchor")
    assert {c[1] for c in side_by_side(load_results(tmp_path, "III")) if c[0] == CLAIMED_BLOCK} == {"MAP@R"}
    # R@4 and R@8 were not measured
    assert [c[1] for c in side_by_side(load_results(tmp_path, "IV")) if c[0] == CLAIMED_BLOCK] == ["R@1", "R@2"]


def test_every_row_keeps_its_claimed_values_and_has_no_difference_in_another_setting(tmp_path):
    rows = [row for row in all_rows().values() if why_not_runnable(row, "cub", "efficientnet_lite0") is None]
    whole = dict(dataset="cub", backbone="efficientnet_lite0", regime="finetune")
    results = [write_run(tmp_path, row.id, place=whole) for row in rows]
    for row, result in zip(rows, results):
        table = side_by_side([result], metrics=tuple(row.claimed))
        for metric, value in row.claimed.items():
            if (CLAIMED_BLOCK, metric) in table:
                assert row.dataset == "cub" and table[CLAIMED_BLOCK, metric].tolist() == [value]
        assert not [c for c in table if "difference" in c[1]]
    numbers = means_over_seeds(results)
    assert set(numbers.row) >= {row.id for row in rows if row.dataset == "cub"} and numbers.difference.isna().all()
    two_tables = [r for r in results if r["table"] in ("002-III", "002-V") and "/cub-" in r["row"]]
    paths = write_report(two_tables, tmp_path / "report", "two tables")
    assert all(path.stat().st_size > 100 for path in paths)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_its_definition(p):
    corrected, order = holm(p), np.argsort(p, kind="stable")
    for rank, i in enumerate(order):
        assert corrected[i] == pytest.approx(min(1, max((len(p) - j) * p[order[j]] for j in range(rank + 1))))


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=4, max_size=8))
def test_paired_is_scipys_paired_t_test_over_common_seeds(pairs):
    a, b = (pd.Series([pair[i] for pair in pairs], dtype=float) for i in (0, 1))
    got = paired_difference(a, b.drop(0))
    d = (a - b).to_numpy()[1:]
    assert got["seeds"] == len(d) and got["difference"] == pytest.approx(d.mean())
    if np.ptp(d) > 1e-6:
        expected = stats.ttest_rel(a[1:], b[1:])
        low, high = expected.confidence_interval()
        assert (
            got["p_t"] == pytest.approx(expected.pvalue)
            and got["half"] == pytest.approx((high - low) / 2)
            and mean_interval(d)[0] == got["difference"]
        )


def test_tests_do_not_cross_settings(tmp_path):
    for seed in range(3):
        for name, recall in (("cp-pa-k-3", 0.56), ("cp-pa-k-1", 0.55)):
            write_run(tmp_path, f"002-II/cub-{name}", seed, recall)
            write_run(tmp_path, f"002-II/cub-{name}", seed, recall, noise="20%")
    tests = paired_tests(load_results(tmp_path))
    assert sorted(tests.block.str.contains("noise")) == [False, True] and len(tests) == 2


def test_command_writes_every_format_and_names_bad_files(shell, tmp_path):
    for seed in range(2):
        write_run(tmp_path / "runs", "002-II/cub-cp-pa-k-3", seed)
        write_run(tmp_path / "runs", "002-II/cub-pa-multi-proxy-k-3-without-cp", seed, 0.56)
    assert "other setting" in shell("report", "II")
    assert {p.suffix for p in (tmp_path / "runs").glob("report-II.*")} == {".md", ".csv", ".html", ".png", ".tex"}
    assert "written" in shell(
        "report", "--runs", tmp_path / "runs", "--runs", tmp_path / "runs", "--out", tmp_path / "both"
    )
    assert (tmp_path / "both" / "report.html").exists() and not (tmp_path / "runs" / "report.html").exists()
    assert "use one of 000-T1, 001-T1" in shell("report", "T1", status=1)
    bad = tmp_path / "runs" / "bad" / "seed0" / "result.json"
    bad.parent.mkdir(parents=True)
    for text, word in (
        ('{"row"', "is damaged"),
        ("[]", "is damaged"),
        (
            json.dumps(load_results(tmp_path / "runs", "II")[0] | dict(environment=dict(dml_nb="99.0"))),
            "was written by dml_nb 99.0",
        ),
    ):
        bad.write_text(text, encoding="utf-8")
        assert word in shell("report", "II", status=1)
    bad.unlink()
    bad.write_text(
        json.dumps(load_results(tmp_path / "runs", "II")[0] | dict(last={"epoch": 0, "R@1": "x", "MAP@R": 0.1})),
        encoding="utf-8",
    )
    output = shell("report", "II", status=1)
    assert (
        "bad/seed0/result.json is damaged: last.R@1 must be a number, got 'x'" in output
        and "run its row again" in output
    )


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_page_sorts_by_number_in_a_browser(tmp_path):
    for name, recall in (("cp-pa-k-1", 0.091), ("cp-pa-k-2", 0.56), ("cp-pa-k-3", 0.31)):
        for seed in range(2):
            write_run(tmp_path / "runs", f"002-II/cub-{name}", seed, recall)
    page = next(p for p in write_report(load_results(tmp_path / "runs"), tmp_path) if p.suffix == ".html")
    text = page.read_text(encoding="utf-8")

    def order(clicks: int) -> list[str]:
        heads = "[...document.querySelectorAll('table.sortable th')]"
        find = f"const head = {heads}.find(h => h.innerText.includes('R@1 last'));"
        click = ";{" + find + "head.click();" * clicks + "}"
        page.write_text(text.replace("</script>", click + "</script>"), encoding="utf-8")
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/profile",
            "--dump-dom",
            page.as_uri(),
        ]
        dom = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120).stdout
        table = next(part for part in dom.split("</table>") if "R@1 last" in part)
        return re.findall(r"<td[^>]*>CP \+ PA (K=\d)</td>", table)

    assert order(0) == ["K=1", "K=2", "K=3"]
    assert order(1) == ["K=2", "K=3", "K=1"]  # highest first; as text "9.1" would come first
    assert order(2) == ["K=1", "K=3", "K=2"]


def execute(name: str, where: Path, **parameters) -> str:
    "Execute a notebook of nbs/rows and return the text of all its outputs."
    import papermill

    notebook = papermill.execute_notebook(
        ROOT / "nbs" / "rows" / f"{name}.ipynb",
        where / f"{name}.ipynb",
        parameters,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(where),
    )
    parts = [
        o.get("text") or o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        for o in cell.get("outputs", [])
    ]
    assert (where / "runs" / f"{name}.png").exists() or list((where / "runs").glob(f"{name}-*.png"))
    return "\n".join("".join(part) for part in parts)


def test_settling_notebook_judges_each_option_against_the_base(tmp_path):
    for seed in range(4):
        for overrides, recall in (
            ({}, 0.55),
            (dict(center="centred"), 0.58),
            (dict(calib_lambda=0), 0.55),
            (dict(calib_lambda=1), 0.5),
        ):
            settings = dict(calib_lambda=0.01) | overrides
            write_run(
                tmp_path / "runs", "002-II/cub-cp-pa-k-3", seed, recall + 0.001 * seed * len(overrides), **settings
            )
    text = execute("settling", tmp_path, runs="runs")
    assert re.search(
        r"R@1 last\*\*\. Better than the base: `center=centred` \(\+3\.\d+\)\. Worse: `calib_lambda=1` \(-4\.\d+\)",
        text,
    )
    assert "in all seeds: `calib_lambda=1`; it does not with `base`, `center=centred`." in text
    assert "Calibration off, it stays above: yes" in text


def test_figure_notebooks_read_a_folder_of_results(tmp_path):
    for seed in range(2):
        for overrides in (
            {},
            dict(capacity=5),
            dict(capacity=60),
            dict(start_epoch=0),
            dict(start_epoch=5),
            dict(calib_lambda=0),
        ):
            write_run(tmp_path / "runs", "002-II/cub-cp-pa-k-3", seed, 0.55 + 0.01 * len(overrides), **overrides)
        write_run(
            tmp_path / "runs", "002-II/cub-pa-multi-proxy-k-3-without-cp", seed, 0.56, epochs=10, lr=0.001, alpha=8.0
        )
    assert "λ=0" in execute("figure3", tmp_path, runs="runs")
    assert "capacity" in execute("figure4", tmp_path, runs="runs")


def test_notebooks_that_train_what_they_show(tmp_path, glyph_folder):
    small = dict(embedding_size=16, batch_size=24)
    place = dict(dataset=str(glyph_folder), backbone="small_cnn", regime="finetune")
    (tmp_path / "runs").mkdir()
    settings = json.dumps(dict(epochs=2, start_epoch=1, alpha=16.0, **small))
    execute("figure1", tmp_path, **place, settings=settings, weights="0,1", classes=3, out="runs")
    execute(
        "calibration",
        tmp_path,
        **place,
        epochs=2,
        start_epoch=1,
        seeds=[0],
        common=dict(lr=1e-3, **small),
        folder="runs",
    )
    table = pd.read_csv(next((tmp_path / "runs").glob("calibration-*.csv")))
    assert table.variant.nunique() == 6 and (table[table.epoch == 1].ratio > 0).all()


def test_ablation_notebook_reads_tables_one_and_two(tmp_path):
    rows = {
        "002-I/cub-pa-s-p": 0.55,
        "002-I/cub-pa-s-p-s-g": 0.56,
        "002-I/cub-pa-s-p-s-g-l-c": 0.58,
        "002-II/cub-cp-pa-k-1": 0.57,
        "002-II/cub-cp-pa-k-3": 0.58,
        "002-II/cub-pa-multi-proxy-k-1-without-cp": 0.55,
        "002-II/cub-pa-multi-proxy-k-3-without-cp": 0.54,
    }
    for seed in range(3):
        for row, recall in rows.items():
            write_run(tmp_path / "runs", row, seed, recall + 0.001 * seed)
    execute("ablations", tmp_path, runs="runs")
    first, second = (pd.read_csv(tmp_path / "runs" / f"table{n}-cub.csv", header=[0, 1], index_col=0) for n in (1, 2))
    # the difference to the line above, which was trained for as many epochs
    assert first["last epoch", "difference"].iloc[2] == "2.00 ± 0.00"
    claimed = next(c for c in first if c[0].startswith("the paper's"))
    assert first[claimed].astype(float).tolist() == [float(all_rows()[row].claimed["R@1"]) for row in list(rows)[:3]]
    assert second.index.tolist() == [1, 3] and second["the paper's", "with CP"].tolist() == [69.2, 69.8]


def test_noise_notebook_pairs_each_host_with_cp(tmp_path):
    hosts = {"proxy-anchor": "cp-pa", "proxy-nca": "cp-nca", "softtriple": "cp-softtriple"}
    clean = {"cp-pa": "cp-proxy-anchor-loss", "cp-nca": "cp-proxy-nca"}
    for seed in range(3):
        for names in hosts.items():
            for name in names:
                for rate in (10, 50):
                    row, recall = f"002-V/cub-{name}-noise-{rate}", 0.55 - 0.002 * rate
                    write_run(tmp_path / "runs", row, seed, recall, embedding_size=512)
                write_run(tmp_path / "runs", f"002-IV/cub-{clean.get(name, name)}", seed, 0.55, embedding_size=512)
    text = execute("noise", tmp_path, runs="runs")
    assert text.count("SoftTriple, last epoch: from clean labels to 50 %") == 1 and "Proxy-NCA" in text
    table = pd.read_csv(tmp_path / "runs" / "noise-cub.csv", header=[0, 1], index_col=[0, 1])
    assert len(table) == 9
