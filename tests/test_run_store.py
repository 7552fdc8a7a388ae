"Stored runs: every record is read, or refused with its file and field."

import copy
import json
import random
import re
from pathlib import Path

import pandas as pd
import pytest

from dml_nb.experiments import batch, run_store
from dml_nb.experiments.recipes import settings_for
from dml_nb.experiments.results import load_results, runs_frame
from dml_nb.experiments.tables import row_of

RUNS = Path(__file__).parents[1] / "runs"
STORED = RUNS / "002-II/cub-cp-pa-k-3"
VALUES = [
    None,
    "",
    "x",
    "<b>",
    -1,
    0,
    0.5,
    1,
    3,
    10**30,
    True,
    [],
    [1],
    ["x"],
    {},
    {"x": 1},
    float("nan"),
    float("inf"),
]


def entries(record, place=()):
    "The places of all entries of a record, such as ('settings', 'params', 'alpha')."
    for key, value in record.items():
        yield (*place, key)
        if isinstance(value, dict):
            yield from entries(value, (*place, key))


def mutated(record, chance):
    "A copy of a record with one entry that is missing, has another value, or is new."
    record = copy.deepcopy(record)
    *parents, last = chance.choice([*entries(record)])
    part = record
    for parent in parents:
        part = part[parent]
    match chance.randrange(4):
        case 0:
            del part[last]
        case 1:
            part[f"{last}-new"] = chance.choice(VALUES)
        case _:
            part[last] = chance.choice(VALUES)
    return record, ".".join([*parents, last])


@pytest.fixture(scope="module")
def stored():
    "The result of a stored run."
    return json.loads(next(STORED.glob("cub-*/seed0/result.json")).read_text(encoding="utf-8"))


def test_a_changed_record_is_read_and_reported_or_refused_with_file_and_field(stored, tmp_path):
    chance, refused = random.Random(0), 0
    file = tmp_path / "002-II/cub-cp-pa-k-3/somewhere/seed0/result.json"
    file.parent.mkdir(parents=True)
    for _ in range(400):
        record, field = mutated(stored, chance)
        file.write_text(json.dumps(record), encoding="utf-8")
        try:
            run_store.read_result(file)
        except ValueError as e:
            refused += 1
            assert str(file) in str(e) and field.split(".")[-1].removesuffix("-new") in str(e), (field, str(e))
            assert re.search(r"Delete it and run its row again\.|update dml_nb", str(e))
            continue
        try:
            runs_frame(load_results(tmp_path))
        except ValueError as e:  # a row or a table that this version does not know
            assert str(file) in str(e), field
    assert 150 < refused < 350


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"x"', "[" * 100_000, "\x00", '{"row": NaN}'])
def test_text_that_is_no_record_is_damaged(tmp_path, content):
    (tmp_path / "result.json").write_text(content, encoding="utf-8")
    with pytest.raises(run_store.DamagedResult, match="result.json is damaged: .* Delete it"):
        run_store.read_result(tmp_path / "result.json")


def test_a_result_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(ValueError, match="cannot be read") as e:
        run_store.read_result(tmp_path / "result.json")
    assert not isinstance(e.value, run_store.DamagedResult)  # which would be renamed and run again


def test_damaged_parameters_of_a_request_are_ignored(stored, tmp_path):
    params = dict(row=stored["row"], seed=0, version="0.1.0", settings=stored["settings"], asked={}, data_checksum="c")
    for changed, kept in [({}, True), ({"asked": "x"}, False), ({"settings": {}}, False), ({"version": 1}, False)]:
        (tmp_path / "params.json").write_text(json.dumps(params | changed), encoding="utf-8")
        assert bool(run_store.read_params(tmp_path)) is kept


@pytest.fixture
def run_of_three_epochs(stored, tmp_path):
    "The folder of a finished run with its learning curve."
    record = copy.deepcopy(stored)
    record["settings"]["epochs"] = 3
    (tmp_path / "result.json").write_text(json.dumps(record), encoding="utf-8")
    pd.DataFrame({"epoch": range(3), "R@1": [0.1, 0.2, 0.3]}).to_csv(tmp_path / "history.csv", index=False)
    return tmp_path


def test_a_whole_history_is_read(run_of_three_epochs):
    assert run_store.read_history(run_of_three_epochs)["R@1"].tolist() == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:2] + lines[3:],  # an epoch in the middle
        lambda lines: lines[:3],  # the last epoch
        lambda lines: lines[:2] + lines[1:],  # an epoch twice
        lambda lines: lines[1:],  # the header
        lambda lines: [],
        lambda lines: lines + ["3,0.4,0.5,0.6\n"],
        lambda lines: ["R@1\n", "0.1\n"],
    ],
)
def test_a_history_with_a_missing_line_is_named(run_of_three_epochs, damage):
    file = run_of_three_epochs / "history.csv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(damage(lines)), encoding="utf-8")
    with pytest.raises(run_store.DamagedResult, match="history.csv is damaged: .* Delete it and result.json"):
        run_store.read_history(run_of_three_epochs)
    assert not run_store.has_history(run_of_three_epochs)


def test_skipping_unreadable_images_changes_no_setting():
    row = row_of("002-II/cub-cp-pa-k-3")
    plain, skipping = settings_for(row), settings_for(row, on_corrupt="skip")
    assert run_store.run_folder("runs", row, plain, 0) == run_store.run_folder("runs", row, skipping, 0)
    assert run_store.computation_id(plain, 0) == run_store.computation_id(skipping, 0)
    assert run_store.describe_changes(plain, skipping) == []


def test_two_folders_with_one_name_have_different_untrained_features():
    files = {
        run_store.untrained_file("runs", dict(dataset=folder, backbone="resnet50", pool="avg"))
        for folder in ("/data/a/birds", "/data/b/birds", "/data/ü", "/data/鳥")
    }
    assert len(files) == 4


@pytest.mark.parametrize(
    "seed, message", [(2**64, "less than 2**64"), (-1, "at least 0"), (0.5, "whole"), (True, "whole")]
)
def test_a_seed_from_which_nothing_can_start_is_refused_before_the_data_are_read(seed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        batch.plan_jobs([row_of("own/circle")], [0, seed], dataset="/no/such/data")


def test_a_result_with_the_checksum_of_an_earlier_version_still_counts(stored, tmp_path):
    old, now, other = "57271cd917889410", "a" * 32, "b" * 32
    row, settings = row_of(stored["row"]), stored["settings"]
    folder = run_store.run_folder(tmp_path, row, settings, 0)
    asked = dict(dataset="cub", backbone=settings["backbone"], regime=settings["regime"])
    for written, kept in [(old, True), (now, True), (other, False)]:
        run_store.prepare_folder(folder, row, settings, 0, asked, written)
        (folder / "checkpoint.pt").touch()
        run_store.prepare_folder(folder, row, settings, 0, asked, now)
        assert (folder / "checkpoint.pt").exists() is kept
        result = stored | dict(data_checksum=written, environment=dict(dml_nb=run_store.version("dml_nb")))
        assert (run_store.why_stale(result, now) or "kept").startswith("kept" if kept else "the data changed") is True
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        lines = pd.DataFrame({"epoch": range(settings["epochs"])})
        lines.to_csv(folder / "history.csv", index=False)
        assert bool(run_store.find_finished(tmp_path, settings, 0, now)) is kept


def test_only_checksums_that_can_be_compared_separate_runs(stored):
    old, now, other = "57271cd917889410", "a" * 32, "b" * 32

    def variants(*checksums):
        runs = [stored | dict(seed=seed, data_checksum=c, folder="") for seed, c in enumerate(checksums)]
        return set(runs_frame(runs).variant)

    assert len(variants(old, now)) == 1 and variants(old, now) == variants(now)
    assert len(variants(old, now, other)) == 3
