"Reports of stored results that are odd: hostile names, values that are not numbers, and results with a changed field."

import copy
import json
import random
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import mistune
import pandas as pd
import pytest
from test_report import own_folder, write_run

from dml_nb.experiments.quickstart import plot_quickstart, quickstart_page
from dml_nb.experiments.report import (
    file_names,
    latex_text,
    markdown_text,
    report_figures,
    style_table,
    to_html,
    to_latex,
    to_markdown,
    write_report,
)
from dml_nb.experiments.report_tables import side_by_side
from dml_nb.experiments.results import load_results
from dml_nb.experiments.run_store import untrained_file

HOSTILE = """<script>alert(1)</script>"'&|_$\\"""
NAMES = [
    HOSTILE,
    "$$",
    "$x",
    "a_b^c",
    r"\alpha",
    "*a*",
    "`a`",
    "[a](javascript:alert(1))",
    "&lt;b&gt;",
    "鳥 ± é",
    "caf\udce9",
]
NAMES += ["_a_", "a\n\n# b", "Ă" * 200, "<!-- a", "%s {0} {{ a }}"]


class Page(HTMLParser):
    "The tags of a page with the names of their attributes, and its text."

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, [name for name, _ in attrs if name != "class"]))
        self.words += [value for name, value in attrs if name == "alt"]

    def handle_comment(self, data):
        self.tags.append(("comment", []))

    def handle_data(self, data):
        self.words.append(data)


def named_results(name: str, folder) -> list[dict]:
    "Results that hold this name wherever a name can come from outside."
    results = [write_run(folder, "002-II/cub-cp-pa-k-3", seed, 0.5 + 0.01 * seed) for seed in range(3)]
    results += [write_run(folder, "002-II/cub-cp-pa-k-1", seed, 0.6, noise="20%") for seed in range(3)]
    results += [write_run(folder, "own/circle", 0, place=own_folder(folder / "birds"))]
    for r in results:
        r["method"], r["data_checksum"], r["environment"]["commit"] = f"{r['method']} {name}", name, name
        r["settings"]["backbone"] = name
        r["settings"]["params"] = r["settings"]["params"] | dict(center=name)
        r["claimed"] = r["claimed"] | {name: "50.0"}
        for epoch in ("best", "last"):
            r[epoch] = r[epoch] | {name: 0.5}
    results[-1]["settings"]["dataset"], results[-1]["own_data"] = f"/data/{name}", name
    return results


def write_texts(results: list[dict], name: str) -> tuple[Page, Page, str]:
    "The page, the rendered Markdown, and what is left of the LaTeX without its characters that are text."
    page = to_html(results, {f"Measured values: {name}, 512-d": b"png", name: b"png"})
    rendered = mistune.create_markdown(plugins=["table", "strikethrough", "math"], escape=False)(to_markdown(results))
    return Page(page), Page(rendered), re.sub(r"\\[&%$#_{}]|\\text\w+\{\}|\$\\pm\$|\$-\$", "", to_latex(results))


@pytest.fixture(scope="module")
def harmless(tmp_path_factory) -> tuple[Page, Page, str]:
    return write_texts(named_results("harmless", tmp_path_factory.mktemp("harmless")), "harmless")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_in_html_and_markdown_and_latex(tmp_path, harmless, name):
    *pages, latex = write_texts(named_results(name, tmp_path), name)
    for given, expected in zip(pages, harmless):
        assert given.tags == expected.tags
        assert given.text.count(" ".join(name.split())) == expected.text.count("harmless") > 10
    for character in "&%$#_{}\\~^<>|":
        assert latex.count(character) == harmless[2].count(character), character


def test_a_report_is_written_for_every_name(tmp_path):
    paths = write_report(named_results("".join(NAMES), tmp_path / "runs"), tmp_path / "report")
    assert all(re.fullmatch(r"[a-z0-9.-]{1,100}", path.name) and path.parent.name == "report" for path in paths)
    assert all(path.stat().st_size > 100 for path in paths) and len(paths) > 7


def test_text_of_each_format():
    assert markdown_text("small_cnn, [1, 2], p <0.001 & 50 %") == "small_cnn, [1, 2], p <0.001 & 50 %"
    assert latex_text(HOSTILE) == (
        r"""\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{}"'\&\textbar{}\_\$\textbackslash{}"""
    )
    names = file_names([*NAMES, *NAMES, "../../etc/passwd", "CON", ""])
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z0-9-]{1,90}", name) for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_in_the_pictures_and_on_the_page_of_the_quickstart(name):
    name = " ".join(name.split())
    table = pd.DataFrame({"R@1": [50.0, 60.0], "MAP@R": [20.0, 30.0]}, index=["untrained", name])
    figure = plot_quickstart(table, name)
    figure.canvas.draw()
    plt.close(figure)
    page = Page(quickstart_page(name, name, table, {name: b"png"}))
    harmless = Page(quickstart_page("a", "a", table.rename({name: "a"}), {"a": b"png"}))
    assert page.tags == harmless.tags and page.text.count(name) == 6


def test_a_table_in_a_notebook_is_text(tmp_path):
    beside = side_by_side(named_results(HOSTILE, tmp_path))
    assert "<script" not in style_table(beside)._repr_html_() and "<script" not in beside._repr_html_()


@pytest.mark.parametrize("part", ["last", "both"])
def test_numbers_that_are_nan_leave_gaps(tmp_path, part):
    for seed in range(2):
        for row in ("002-II/cub-cp-pa-k-1", "002-II/cub-cp-pa-k-3"):
            result = write_run(tmp_path, row, seed)
            path = tmp_path / "x" / row / str(seed) / "result.json"
            for epoch in ("best", "last") if part == "both" else (part,):
                result[epoch] = {m: v if m == "epoch" else float("nan") for m, v in result[epoch].items()}
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(result), encoding="utf-8")
    assert len(write_report(load_results(tmp_path / "x"), tmp_path / "report")) > 4


def test_a_sweep_may_hold_a_value_that_is_no_number(tmp_path):
    for i, rate in enumerate((None, 1e-4, 1e-3, 1e-2)):
        write_run(tmp_path, "002-II/cub-cp-pa-k-3", 0, 0.5 + 0.01 * i, head_lr=rate)
    figures = report_figures(load_results(tmp_path))
    assert "Sweep of head_lr" in figures
    for figure in figures.values():
        plt.close(figure)


def test_a_folder_without_results_and_a_run_without_history(tmp_path, shell):
    (tmp_path / "runs").mkdir()
    assert "there are no finished runs to report: run something first" in shell("report", status=1)
    result = write_run(tmp_path / "runs", "002-II/cub-cp-pa-k-3")
    history = tmp_path / "runs" / result["folder"] / "history.csv"
    history.write_bytes(b"\xff\xfe")
    output = shell("report", status=1)
    assert "history.csv is damaged" in output and "Traceback" not in output
    history.unlink()
    assert "written" in shell("report")


def test_a_damaged_file_of_the_untrained_network_is_named(tmp_path):
    write_run(tmp_path, "002-II/cub-cp-pa-k-3")
    (result,) = load_results(tmp_path)
    file = untrained_file(tmp_path, result["settings"] | dict(pool="avg"))
    file.parent.mkdir()
    for text in ("{", "[]", '{"metrics": {"R@1": "x"}}'):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{file.name} is damaged .*: delete it"):
            to_markdown([result])


def fields(record, path=()):
    "The path of every field of a record."
    for key, value in record.items() if isinstance(record, dict) else enumerate(record):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from fields(value, (*path, key))


VALUES = [
    None,
    True,
    0,
    -1,
    3,
    10**30,
    0.5,
    -2.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "-",
    "0.5",
    [],
    [1],
    {},
    {"x": 1},
]
VALUES += [HOSTILE, "finetune", "glyphs", "../x", "0.0.1"]


def mutated(record: dict, draw: random.Random) -> tuple[dict, str]:
    "A copy of a record in which one field is missing, has another name or another value."
    record = copy.deepcopy(record)
    *parents, last = draw.choice(list(fields(record)))
    inside = record
    for key in parents:
        inside = inside[key]
    kind, value = draw.choice(["remove", "rename", "replace", "replace", "replace"]), draw.choice(VALUES)
    old = inside.pop(last)
    if kind == "rename" and isinstance(inside, dict):
        inside[draw.choice(["x", "R@2", "R@0", "R@x", HOSTILE])] = old
    elif kind == "replace" and isinstance(inside, dict):
        inside[last] = value
    elif kind == "replace":
        inside.insert(last, value)
    return record, f"{kind} {'.'.join(map(str, [*parents, last]))} {value!r}"


def test_a_changed_result_is_refused_with_its_name_or_reported(tmp_path):
    draw, out = random.Random(0), tmp_path / "runs"
    known = [write_run(out, "002-IV/cub-proxy-anchor", seed, 0.6) for seed in range(2)]
    known += [write_run(out, "002-IV/cub-circle-loss", 0, 0.5, noise="20%")]
    known += [write_run(out, "own/circle", 0, place=own_folder(tmp_path / "birds"))]
    reported = 0
    for _ in range(60):
        path = out / draw.choice(known)["folder"] / "result.json"
        text = path.read_text(encoding="utf-8")
        result, change = mutated(json.loads(text), draw)
        path.write_text(json.dumps(result), encoding="utf-8")
        try:
            results = load_results(out)
        except ValueError as e:
            assert str(path) in str(e), change
        else:
            reported += 1
            try:
                to_html(results, {}), to_markdown(results), to_latex(results)
                if reported % 10 == 0:
                    write_report(results, tmp_path / "report")
            except Exception as e:
                raise AssertionError(change) from e
        path.write_text(text, encoding="utf-8")
    assert 10 < reported < 50
