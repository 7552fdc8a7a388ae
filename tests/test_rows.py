"The registry: every cell of the sources' tables is there once and unchanged, and so would be those of any other file."

import json
from collections import Counter, defaultdict
from csv import DictReader
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dml_nb
from dml_nb.experiments.explain import contradictions, describe, explain
from dml_nb.experiments.rows import all_rows, count_printed, find_rows, layers, missing, recipes, rows_of, settings_for, slug
from dml_nb.losses import list_losses

FOLDER = Path(dml_nb.__file__).parent / "experiments"


def cells_of_file():
    with open(FOLDER / "tables.csv", encoding="utf-8", newline="") as f:
        return list(DictReader(f))


def as_cells(rows):
    "What a registry says, in the terms of the file."
    return Counter((row.table, row.dataset, row.backbone, row.embedding_size, row.method, row.noise, metric, value) for row in rows.values() for metric, value in row.claimed.items())


def as_printed(lines):
    known = recipes()
    return Counter(
        (
            f"{line['source']}-{line['table']}",
            known["datasets"].get(line["dataset"], slug(line["dataset"])),
            known["backbones"].get(line["backbone"], slug(line["backbone"]) or None),
            int(line["embedding_dim"] or 0) or None,
            line["method"],
            line["noise"],
            line["metric"],
            line["value"],
        )
        for line in lines
    )


def test_every_cell_stands_in_exactly_one_row_unchanged():
    lines = cells_of_file()
    assert len(lines) == 671 and as_cells(all_rows()) == as_printed(lines)
    assert sum(value == "-" for row in all_rows().values() for value in row.claimed.values()) == 42


def test_113_rows_are_printed_in_thirteen_tables():
    "The counts of METHODS, section 9."
    printed = {row.printed: row.table for row in all_rows().values()}
    expected = {"000-T1": 12, "000-T2": 9, "000-T3": 6, "000-T4": 7, "000-T5": 6, "000-T6": 7, "001-T1": 7, "001-T2": 6, "002-I": 6, "002-II": 10, "002-III": 13, "002-IV": 13, "002-V": 11}
    assert Counter(printed.values()) == expected and len(printed) == 113 and len(expected) == 13
    whole, part = count_printed(all_rows().values())[1:]
    assert 0 < whole and whole + part < 113


def test_a_row_is_found_by_its_id_and_its_folder_is_safe():
    for id, row in all_rows().items():
        assert find_rows(id) == [row]
        table, _, name = id.partition("/")
        assert table == row.table and name == slug(name) and len(name) < 60


text = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), min_size=1, max_size=12).filter(slug)
lines = st.fixed_dictionaries(
    dict(
        source=st.sampled_from(["000", "001", "7"]),
        table=st.sampled_from(["T1", "IV"]),
        dataset=st.sampled_from(["CUB-200-2011", "SOP", "Dogs"]),
        backbone=st.sampled_from(["", "ResNet50", "ViT-S"]),
        embedding_dim=st.sampled_from(["", "64", "512"]),
        method=text,
        noise=st.sampled_from(["none", "10%", "50%"]),
        metric=st.sampled_from(["R@1", "R@10", "MAP@R"]),
        value=st.sampled_from(["-", "1.50", "69.8", "100"]),
        kind=st.just("baseline"),
    )
)


@settings(max_examples=150, deadline=None)
@given(st.lists(lines, max_size=25))
def test_any_file_is_kept_whole_or_refused(made_up):
    try:
        rows = rows_of(made_up)
    except ValueError as e:
        assert "stands there" in str(e)
        return
    assert as_cells(rows) == as_printed(made_up)


@settings(max_examples=50, deadline=None)
@given(st.lists(lines, min_size=1, max_size=10, unique_by=lambda line: slug(line["method"])), st.data())
def test_a_doubled_cell_is_never_swallowed(made_up, data):
    again = data.draw(st.sampled_from(made_up))
    with pytest.raises(ValueError, match="stands there twice"):
        rows_of([*made_up, dict(again, value="0")])


def test_the_order_of_the_file_does_not_matter():
    assert rows_of(cells_of_file()[::-1]) == all_rows()


def test_every_method_has_a_recipe_or_says_which_part_is_missing():
    known = recipes()
    built, absent = ([name for entry in known[kind] for name in entry["names"]] for kind in ("methods", "missing"))
    names = Counter(built + absent)
    assert max(names.values()) == 1 and set(names) == {row.method for row in all_rows().values()}
    assert {entry["loss"] for entry in known["methods"]} <= set(list_losses())
    for row in all_rows().values():
        assert (row.recipe is None) == (row.method in absent)
        if row.recipe is None:
            assert "is not built yet: it needs " in missing(row)


def test_every_value_of_every_recipe_has_a_source():
    known = recipes()
    for row in all_rows().values():
        if missing(row) is not None:
            continue
        frame = explain(row)
        assert frame.source.str.len().min() > 3
        full = settings_for(row)
        shown = frame.value.to_dict()
        assert {k: shown[k] for k in full if k != "params"} == {k: v for k, v in full.items() if k != "params"}
        assert {k: shown[f"loss.{k}"] for k in full["params"]} == full["params"]
        assert frame.guess.equals(frame.source.str.startswith("guess"))
        assert {"optimizer", "sampler", "crops"} <= set(frame.index)
    assert all(entry["source"] for entry in known["methods"])
    assert {entry.get("training") for entry in known["methods"]} <= {None, *known["training"]}
    assert set(known["sources"]) - {"search"} <= set(known["settings"])


def test_what_no_source_states_is_a_guess():
    contrastive, cp = explain(find_rows("002-III/cub-contrastive")[0]), explain(find_rows("002-II/cub-cp-pa-k-3")[0])
    assert contrastive.loc[["lr", "epochs", "optimizer", "per_class"], "guess"].all() and not contrastive.loc["embedding_size", "guess"]
    assert not cp.loc[["lr", "epochs", "batch_size", "optimizer", "loss.capacity"], "guess"].any() and cp.loc["schedule", "guess"]
    unstated = explain(find_rows("001-T1/cub-margin")[0])
    assert unstated.loc[["backbone", "embedding_size"], "guess"].all()


def test_contradictions_are_those_of_the_specification():
    "METHODS, section 9: A-BIER's R@8 and Proxy Anchor on CUB; and N-Pair with 64 dimensions, which agrees with no backbone of 000."
    found = {id: texts for id, row in all_rows().items() if (texts := contradictions(row))}
    by_method = defaultdict(set)
    for id in found:
        by_method[id.split("/")[1]].add(id.split("/")[0])
    assert found["000-T1/cub-a-bier"] == ["R@8 is 82.6 here, 86.2 in 001-T1 and 002-IV"]
    assert by_method == {
        "cub-a-bier": {"000-T1"},
        "cub-abier": {"001-T1", "002-IV"},
        "cub-n-pair": {"000-T4", "000-T5", "000-T6", "002-IV"},
        "cub-pa-s-p": {"002-I"},
        "cub-pa-multi-proxy-k-1-without-cp": {"002-II"},
        "cub-proxy-anchor": {"002-IV"},
    }


def test_notes_name_rows_that_exist():
    assert all(any(entry["note"] in row.notes for row in all_rows().values()) for entry in recipes()["notes"])
    assert any("64 dimensions" in note for note in all_rows()["000-T5/cub-epshn"].notes)


def test_layers_name_settings_that_exist():
    row = find_rows("MS Loss")[0]
    assert [name for name, _ in layers(row, "cub", "bn_inception", "finetune")] == ["finetune", "method", "method/finetune", "loss"]
    assert layers(find_rows("Proxy Anchor")[0], "glyphs", "small_cnn", "finetune")[-2][0] == "finetune/glyphs/small_cnn/proxy_anchor"


def test_a_row_needs_no_code(tmp_path):
    "A line and a recipe as text, and the row can be planned."
    line = dict(cells_of_file()[0], source="003", table="T1", method="Contrastive", value="12.3")
    (row,) = rows_of([json.loads(json.dumps(line))]).values()
    assert row.id == "003-T1/cub-contrastive" and row.claimed == {"R@1": "12.3"}
    assert settings_for(row, "glyphs", "small_cnn")["loss"] == "contrastive"
    assert describe(row, "glyphs", "small_cnn").count("\n") > 20


@pytest.mark.parametrize(
    "args, message",
    [
        (["rows"], "113 rows in the sources, 671 values"),
        (["rows", "II"], "10 rows in the sources, 60 values"),
        (["rows", "002-V"], "By data set and noise: 66 rows"),
        (["rows", "002-II/cub-cp-pa-k-3"], "CP Eqs. 2-7"),
        (["rows", "001-T1/cub-htl"], "the class tree, rebuilt every epoch"),
    ],
)
def test_rows_are_listed_counted_and_explained(shell, args, message):
    assert message in shell(*args)


@pytest.mark.parametrize("args, message", [(["rows", "002-VII"], "did you mean '002-II'"), (["rows", "002-II/cub-cp-pa-k-9"], "did you mean '002-II/cub-cp-pa-k-")])
def test_an_unknown_row_or_table_names_the_nearest(shell, args, message):
    assert message in shell(*args, status=1)
