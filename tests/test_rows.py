"Tables and recipes: no printed value is lost, every value of a run has a source, and wrong settings are refused."

import json
import warnings
from collections import Counter, defaultdict
from contextlib import suppress
from csv import DictReader
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dml_nb
from dml_nb.experiments import batch
from dml_nb.experiments import tables as tables_module
from dml_nb.experiments.provenance import contradictions, describe, explain
from dml_nb.experiments.recipes import (
    CROPS,
    OPTIMIZER_VALUES,
    check_setting_names,
    is_table_setting,
    list_recipes,
    setting_layers,
    settings_for,
)
from dml_nb.experiments.tables import (
    all_rows,
    count_printed_rows,
    find_rows,
    find_table,
    load_recipes,
    loss_defaults,
    loss_rows,
    row_of,
    rows_from_lines,
    slug,
    why_not_here,
    why_not_runnable,
)
from dml_nb.losses import create_loss, list_losses
from dml_nb.models import list_backbones

FOLDER = Path(dml_nb.__file__).parent / "experiments"


def cells_of_file():
    with open(FOLDER / "tables.csv", encoding="utf-8", newline="") as f:
        return list(DictReader(f))


def as_cells(rows):
    "The values of rows, as counted tuples that can be compared with a file."
    return Counter(
        (row.table, row.dataset, row.backbone, row.embedding_size, row.method, row.noise, metric, value)
        for row in rows.values()
        for metric, value in row.claimed.items()
    )


def as_printed(lines):
    known = load_recipes()
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
    assert len(lines) == 680 and as_cells(all_rows()) == as_printed(lines)
    assert sum(value == "-" for row in all_rows().values() for value in row.claimed.values()) == 42


def test_116_rows_are_printed_in_fourteen_tables(monkeypatch):
    "Printed rows for each table of the four sources."
    monkeypatch.setattr(tables_module, "why_no_weights", lambda backbone: None)
    printed = {row.printed: row.table for row in all_rows().values()}
    expected = {"000-T1": 12, "000-T2": 9, "000-T3": 6, "000-T4": 7, "000-T5": 6, "000-T6": 7, "001-T1": 7, "001-T2": 6}
    expected |= {"002-I": 6, "002-II": 10, "002-III": 13, "002-IV": 13, "002-V": 11, "003-unsupervised": 3}
    assert Counter(printed.values()) == expected and len(printed) == 116 and len(expected) == 14
    whole, part = count_printed_rows(all_rows().values())[1:]
    assert 0 < whole and whole + part <= 116


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
        rows = rows_from_lines(made_up)
    except ValueError as e:
        assert "occurs" in str(e)
        return
    assert as_cells(rows) == as_printed(made_up)


@settings(max_examples=50, deadline=None)
@given(st.lists(lines, min_size=1, max_size=10, unique_by=lambda line: slug(line["method"])), st.data())
def test_a_doubled_cell_is_never_swallowed(made_up, data):
    again = data.draw(st.sampled_from(made_up))
    with pytest.raises(ValueError, match="occurs twice"):
        rows_from_lines([*made_up, dict(again, value="0")])


def test_the_order_of_the_file_does_not_matter():
    assert rows_from_lines(cells_of_file()[::-1]) == all_rows()


def test_every_method_has_a_recipe_or_says_which_part_is_missing():
    known = load_recipes()
    built, absent = ([name for entry in known[kind] for name in entry["names"]] for kind in ("methods", "missing"))
    names = Counter(built + absent)
    assert max(names.values()) == 1 and set(names) == {row.method for row in all_rows().values()}
    assert {entry["loss"] for entry in known["methods"]} <= set(list_losses())
    for row in all_rows().values():
        assert (row.recipe is None) == (row.method in absent)
        if row.recipe is None:
            assert "is not built yet: it needs " in why_not_runnable(row)


def test_every_value_of_every_recipe_has_a_source():
    known = load_recipes()
    for row in all_rows().values():
        if why_not_runnable(row) is not None:
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
    assert (
        contrastive.loc[["lr", "epochs", "optimizer", "per_class"], "guess"].all()
        and not contrastive.loc["embedding_size", "guess"]
    )
    stated = ["lr", "epochs", "batch_size", "train_crop", "crops", "optimizer", "loss.capacity", "loss.alpha"]
    assert not cp.loc[stated, "guess"].any() and cp.loc[["schedule", "loss.proxy_temp"], "guess"].all()
    unstated = explain(find_rows("001-T1/cub-margin")[0])
    assert unstated.loc[["backbone", "embedding_size"], "guess"].all()


def test_contradictions_of_the_sources():
    "A-BIER's R@8, Proxy Anchor on CUB, and N-Pair with 64 dimensions, which agrees with no backbone of source 000."
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
    assert all(any(entry["note"] in row.notes for row in all_rows().values()) for entry in load_recipes()["notes"])
    assert any("64 dimensions" in note for note in all_rows()["000-T5/cub-epshn"].notes)


def test_layers_name_settings_that_exist():
    row = find_rows("MS Loss")[0]
    assert [name for name, _ in setting_layers(row, "cub", "bn_inception", "finetune")] == [
        "finetune",
        "method",
        "training",
        "loss",
    ]
    assert (
        setting_layers(find_rows("Proxy Anchor")[0], "glyphs", "small_cnn", "finetune")[-2][0]
        == "finetune/glyphs/proxy_anchor"
    )


def test_a_row_needs_no_code(tmp_path):
    "A line and a recipe as text, and the row can be planned."
    line = dict(cells_of_file()[0], source="003", table="T1", method="Contrastive", value="12.3")
    (row,) = rows_from_lines([json.loads(json.dumps(line))]).values()
    assert row.id == "003-T1/cub-contrastive" and row.claimed == {"R@1": "12.3"}
    assert settings_for(row, "glyphs", "small_cnn")["loss"] == "contrastive"
    assert describe(row, "glyphs", "small_cnn").count("\n") > 20


@pytest.mark.parametrize(
    "args, message",
    [
        (["rows"], "116 rows in the sources, 680 values"),
        (["rows", "II"], "10 rows in the sources, 60 values"),
        (["rows", "002-V"], "By data set and noise: 66 rows"),
        (["rows", "002-II/cub-cp-pa-k-3"], "CP Eqs. 2-7"),
        (["rows", "001-T1/cub-htl"], "Ge et al. 2018; reconstructed"),
        (["rows", "own/circle"], "claimed     nothing"),
        (["rows", "multi_similarity"], "none: a loss on its own"),
        (["rows", "own"], "losses, each trained alone on glyphs: no source claims a value"),
    ],
)
def test_rows_are_listed_counted_and_explained(shell, args, message):
    assert message in shell(*args)


def test_rows_say_which_data_are_not_on_this_machine(shell, tmp_path, monkeypatch):
    sentence = "cub is not on this machine: `dml_nb data cub` "
    monkeypatch.setenv("DML_NB_DATA", str(tmp_path))
    output = shell("rows", "II")
    assert output.count("not on this machine") == 2 and sentence in output  # cub and cars
    assert "not on this machine" not in shell("rows", "own")  # on glyphs, which come with the package
    (tmp_path / "CUB_200_2011").mkdir()
    for name in ("images.txt", "image_class_labels.txt"):
        (tmp_path / "CUB_200_2011" / name).touch()
    assert sentence not in shell("rows", "II")


def test_a_row_whose_weights_cannot_be_had_does_not_count_as_one_that_can_run(monkeypatch):
    monkeypatch.setattr(tables_module, "why_no_weights", lambda backbone: "download them" * (backbone != "resnet50"))
    rows = [row_of(id) for id in ("002-II/cub-cp-pa-k-3", "000-T3/cub-cbml-log-resnet50", "001-T1/cub-htl")]
    rows[2] = replace(rows[2], recipe=None)
    reasons = [why_not_here(row) for row in rows]
    assert reasons[:2] == ["the weights of bn_inception cannot be had", None] and "not built" in reasons[2]
    assert count_printed_rows(rows[:1])[1:] == (0, 0) and count_printed_rows(rows[1:2])[1] == 1
    assert why_not_here(rows[0], backbone="resnet50") is None and why_not_runnable(rows[0]) is None


def test_the_page_of_a_row_tells_how_to_get_its_weights(monkeypatch):
    from dml_nb.experiments import provenance

    monkeypatch.setattr(provenance, "why_no_weights", lambda backbone: f"download {backbone}.pth elsewhere")
    assert "cannot run  download bn_inception.pth elsewhere" in describe(row_of("002-II/cub-cp-pa-k-3"))


@pytest.mark.parametrize(
    "args, message",
    [
        (["rows", "002-VII"], "did you mean '002-II'"),
        (["rows", "002-II/cub-cp-pa-k-9"], "did you mean '002-II/cub-cp-pa-k-"),
        (["rows", "own/circel"], "did you mean 'own/circle'"),
        (["rows", "T1"], "exists in several sources: use one of 000-T1, 001-T1"),
        (["run", "T1"], "exists in several sources: use one of 000-T1, 001-T1"),
        (["rows", "MCL"], "only with label noise"),
        (["rows", "center"], "cannot be trained alone"),
        (["rows", "PROXY ANKOR"], "did you mean 'Proxy Anchor'"),
        (["rows", "zzz"], "there is no table, row or method 'zzz': `dml_nb rows` lists the rows"),
        (["rows", "  "], "there is no table, row or method '  ': `dml_nb rows` lists the rows"),
        (["run", ""], "there is no table, row or method '': `dml_nb rows` lists the rows"),
    ],
)
def test_an_unknown_row_or_table_names_the_nearest(shell, args, message):
    assert message in shell(*args, status=1)


@pytest.mark.parametrize("method, loss", [("MCL", "mcl"), ("MCL+PRISM", "prism"), ("CP + NCA", "cp_proxy_nca")])
def test_a_method_with_label_noise_only_says_so(method, loss):
    with pytest.raises(ValueError, match="only with label noise: name such a row, 002-V/") as e:
        find_rows(method)
    assert f"or its loss on its own, {loss}." in str(e.value) and find_rows(loss) == [row_of(f"own/{slug(loss)}")]


def test_a_table_is_found_with_and_without_its_source():
    assert all(find_table(row.table) == row.table for row in all_rows().values())
    assert (find_table("v"), find_table("own"), find_table("Proxy Anchor"), find_table("T1", {"001-T1", "002-I"})) == (
        "002-V",
        "own",
        None,
        "001-T1",
    )


def test_names_read_from_the_modules_are_those_of_the_registries():
    assert tables_module.loss_names() == list_losses() and tables_module.backbone_names() == list_backbones()


def test_every_loss_is_a_row_on_its_own():
    rows = loss_rows()
    assert {row.method for row in rows.values()} | {
        "adversarial",
        "center",
        "intra_pair_variance",
        "cp_reading",
    } == set(list_losses()) and len(all_rows()) == 252
    assert not set(rows) & set(all_rows())
    for id, row in rows.items():
        assert row_of(id) is row and find_rows(id) == find_rows(row.method) == [row]
        assert (why_not_runnable(row), row.claimed, row.dataset, row.backbone, row.embedding_size) == (
            None,
            {},
            "glyphs",
            "small_cnn",
            512,
        )
        settings = settings_for(row)
        assert not is_table_setting(row, settings) and row.recipe["names"][0] and settings["loss"] == row.method
        assert explain(row).source.str.len().min() > 3 and contradictions(row) == [] and row.notes == []
        create_loss(row.method, num_classes=1087, embedding_size=512, **settings["params"])
    assert find_rows("own") == list(rows.values()) == find_rows("own", "cub")


def test_a_name_of_the_sources_is_not_taken_by_a_loss():
    for row in all_rows().values():
        if row.recipe and any(other.noise == "none" and other.method == row.method for other in all_rows().values()):
            assert find_rows(row.method)[0].table != "own"


def test_row_of_names_the_nearest():
    assert row_of("002-II/cub-cp-pa-k-3") is all_rows()["002-II/cub-cp-pa-k-3"]
    with pytest.raises(ValueError, match="did you mean '002-II/cub-cp-pa-k-3'"):
        row_of("002-II/cub-cp-pa-k3")


def test_on_glyphs_all_methods_train_alike():
    plain = settings_for(row_of("own/norm-softmax"))
    for row in [*all_rows().values(), *loss_rows().values()]:
        if why_not_runnable(row, "glyphs", "small_cnn") is None and row.noise == "none":
            settings = settings_for(row, "glyphs", "small_cnn", embedding_size=512)
            different = {key for key in settings if settings[key] != plain.get(key)}
            assert different <= {"loss", "params", "per_class"} and settings.get("per_class") in (None, 5)


@pytest.mark.parametrize(
    "id, expected",
    [
        (
            "002-IV/sop-multi-similarity",
            dict(lr=3e-5, gamma=0.1, frozen_bn=True, step_epochs=16, beta=40.0, recall_at=[1, 10, 100, 1000]),
        ),
        ("002-IV/cars-multi-similarity", dict(lr=3e-5, gamma=0.1, step_epochs=16)),
        ("000-T2/cub-softtriple", dict(lr=1e-4, gamma=0.1, step_epochs=[19, 39], frozen_bn=True, eps=0.01)),
        ("002-IV/sop-softtriple", dict(lr=1e-4, proxies_per_class=2, gamma=0.25, train_crop="resize")),
        ("002-IV/cub-softtriple", dict(lr=1e-4, proxies_per_class="unset")),
        ("002-IV/sop-proxy-anchor", dict(lr=1e-4, gamma=0.25, step_epochs=20, frozen_bn=False, train_crop="resize")),
        (
            "002-IV/sop-cp-proxy-anchor-loss",
            dict(lr=1e-4, gamma=0.25, frozen_bn=False, train_crop="resize", proxies_per_class=3),
        ),
        ("002-IV/sop-proxy-nca", dict(scale_x=1.0, scale_p=8.0)),
        ("002-III/sop-cont-xbm", dict(memory_size=55000, schedule="plateau", frozen_bn=False, per_class=4)),
        (
            "002-III/sop-proxy-nca-plus-plus",
            dict(lr=0.024, proxy_lr_mult=10000, epochs=85, batch_size=192, per_class=3),
        ),
        ("001-T2/inshop-margin", dict(recall_at=[1, 10, 20, 30, 40, 50], lr=6e-4, per_class=5)),
    ],
)
def test_a_source_own_training_wins_over_what_proxy_anchor_wants_of_a_data_set(id, expected):
    settings = settings_for(row_of(id))
    found = settings | settings["params"]
    assert {key: found.get(key, "unset") for key in expected} == expected


def test_a_host_in_the_tables_of_cp_trains_as_cp():
    runs = {}
    for row in all_rows().values():
        if row.recipe and row.table.startswith("002"):
            values = settings_for(row)
            place = row.table, values["dataset"], values.get("noise")
            training = {name: value for name, value in values.items() if name not in ("loss", "params")}
            runs.setdefault((*place, values["loss"]), []).append(training)
    compared = 0
    for (*place, loss), trainings in runs.items():
        for host in runs.get((*place, loss.removeprefix("cp_")), []) if loss.startswith("cp_") else []:
            assert all(training == host for training in trainings), (place, loss)
            compared += 1
    assert compared > 20


def test_what_proxy_anchor_says_of_a_data_set_is_a_guess_for_others():
    margin, proxy_anchor = explain(row_of("001-T2/sop-margin")), explain(row_of("own/proxy-anchor"), "sop", "resnet50")
    assert margin.loc[["lr", "gamma", "frozen_bn"], "guess"].all() and not margin.loc["recall_at", "guess"]
    assert not proxy_anchor.loc[["lr", "gamma", "frozen_bn"], "guess"].any()
    assert explain(row_of("002-IV/sop-multi-similarity")).source["lr"].startswith("guess: as on cub")
    assert "2 on SOP" in explain(row_of("002-IV/sop-softtriple")).source["loss.proxies_per_class"]


def test_cbml_trains_as_its_source_does():
    tables = dict(T1="googlenet", T2="bn-inception", T3="resnet50")
    rows = {
        backbone: settings_for(row_of(f"000-{table}/cub-cbml-log-{backbone}")) for table, backbone in tables.items()
    }
    assert {backbone: s["pool"] for backbone, s in rows.items()} == {
        "googlenet": "avg",
        "bn-inception": "max",
        "resnet50": "avg",
    }
    for s in rows.values():  # the rate is lowered once
        assert len(s["step_epochs"]) == 1 and 0 < s["step_epochs"][0] < s["epochs"]
    for name in ("000-T1/cub-cbml-log-googlenet", "000-T2/cub-cbml-log-bn-inception"):
        assert not explain(row_of(name)).loc[["pool", "step_epochs"], "guess"].any()


def test_what_an_account_states_is_what_is_run():
    "A setting that a training account cites is set by it; what it does not set is a guess or no setting."
    words = {"*", "finetune", "only", "backbones", "row", "note"}
    words |= {"optimizer", "sampler", "crops", "per_class", "start_fraction"}
    for name, account in load_recipes()["training"].items():
        values = {key for part in account.get("finetune", {}).values() for key in part}
        for key, text in account.items():
            plain = key.split(" on ")[0].removeprefix("loss.")
            assert key in words or plain in values or text.startswith("guess"), (name, key)
        assert values <= {key.split(" on ")[0].removeprefix("loss.") for key in account}, name


BN_INCEPTION, ADAM = dict(backbone="bn_inception", frozen_bn=True), dict(optimizer="adam", clip_value=None)
CROP_227 = dict(train_crop="rrc", resize_first=True, crop_scale=0.16, image_size=227, image_resize=256)
RELEASED = dict(  # what the released codes do; the files are named in the sources of `recipes.json`
    proxy_anchor=BN_INCEPTION | dict(optimizer="adamw", lr=1e-4, proxy_lr_mult=100, weight_decay=1e-4, batch_size=180),
    cp=BN_INCEPTION
    | dict(optimizer="adamw", lr=1e-4, proxy_lr_mult=100, batch_size=150, epochs=60, train_crop="resize"),
    ms=BN_INCEPTION | ADAM | CROP_227 | dict(lr=3e-5, weight_decay=5e-4, batch_size=80, per_class=5, pool="max"),
    cbml=BN_INCEPTION
    | ADAM
    | CROP_227
    | dict(lr=3e-5, weight_decay=5e-4, batch_size=120, per_class=8, step_epochs=[25]),
    softtriple=BN_INCEPTION | ADAM | dict(eps=0.01, lr=1e-4, proxy_lr_mult=100, batch_size=32, step_epochs=[19, 39]),
    xbm=ADAM
    | dict(lr=1e-4, weight_decay=5e-4, batch_size=64, per_class=4, crop_scale=0.2, schedule="plateau", pool="max"),
    proxy_nca_pp=dict(
        optimizer="adam", eps=1.0, lr=4e-3, proxy_lr_mult=1e5, weight_decay=0, layer_norm=True, pool="max"
    )
    | dict(image_size=256, image_resize=288, frozen_bn=False, clip_value=10, warm_epochs=5, per_class=4),
    deep_metric=BN_INCEPTION | ADAM | CROP_227 | dict(lr=1e-5, weight_decay=5e-4, schedule="constant", pool="max"),
)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_training_is_complete_and_its_values_are_run(name):
    assert set(RELEASED) <= set(list_recipes())
    account = load_recipes()["training"][name]
    row, place = row_of(account["row"]), (account["only"][0], account["backbones"][0])
    settings = dict(optimizer="adamw") | settings_for(row, *place, recipe=name)
    assert {key: settings.get(key) for key in RELEASED[name]} == RELEASED[name]
    frame = explain(row, *place, recipe=name)
    stated = {*RELEASED[name], "optimizer", "weight_decay", "epochs", "sampler", "crops"} - {"frozen_bn", "clip_value"}
    if name == "cp":  # states a few values, the others are those of Proxy Anchor
        stated -= {"schedule", "weight_decay"}
    guessed = [key for key in stated if frame.guess[key] and not (key == "sampler" and name == "cp")]
    assert guessed == [], guessed
    place = dict(dataset="groceries-mini", backbone="efficientnet_lite0")
    elsewhere = explain(row, **place, recipe=name)
    assert (
        elsewhere.loc[["lr", "optimizer"], "guess"].all() and elsewhere.value["optimizer"] == frame.value["optimizer"]
    )


def test_proxy_anchor_trains_resnet50_as_its_readme_says():
    row = row_of("own/proxy-anchor")
    for dataset, backbone, expected in [
        ("cub", "bn_inception", (180, 1, 10)),
        ("cars", "bn_inception", (180, 1, 20)),
        ("cub", "resnet50", (120, 5, 5)),
        ("cars", "resnet50", (120, 5, 10)),
    ]:
        settings = settings_for(row, dataset, backbone)
        assert tuple(settings[name] for name in ("batch_size", "warm_epochs", "step_epochs")) == expected
        frame = explain(row, dataset, backbone)
        assert not frame.loc[["batch_size", "warm_epochs", "step_epochs", "eps"], "guess"].any()
    assert settings_for(row_of("002-II/cub-cp-pa-k-1"))["batch_size"] == 150  # in the tables of CP, as CP


def test_a_source_of_a_batch_says_what_the_batch_is():
    for row in [*all_rows().values(), *loss_rows().values()]:
        for place in (("cub", "efficientnet_lite0", "frozen"), ("sop", "resnet50", "finetune")):
            if why_not_runnable(row, *place[:2]) is None:
                with suppress(ValueError):  # a loss over several embeddings has no frozen form
                    frame = explain(row, *place)
                    if "per_class" in frame.index and " images" in frame.source["per_class"]:
                        assert f"{frame.value['per_class']} images" in frame.source["per_class"], (row.id, place)


def test_the_optimizer_changes_no_setting_of_runs_that_do_not_name_it():
    "Stored runs are found by their settings, so a value that all of them have is left out."
    for regime, backbone in (("frozen", "efficientnet_lite0"), ("finetune", "small_cnn")):
        for row in loss_rows().values():
            dataset = "cub" if regime == "frozen" else "glyphs"
            with suppress(ValueError):  # a loss over several embeddings has no frozen form
                found = settings_for(row, dataset, backbone, regime)
                assert not {"optimizer", *OPTIMIZER_VALUES, *CROPS} & set(found)
                assert found == settings_for(row, dataset, backbone, regime, optimizer="adamw", eps=None)


def test_an_optimizer_by_hand_is_shown_as_asked_for():
    row = row_of("000-T2/cub-softtriple")
    frame = explain(row, optimizer="sgd", momentum=0.9, nesterov=True)
    assert frame.loc[["optimizer", "momentum", "nesterov"], "source"].eq("asked for").all() and "eps" not in frame.index
    frame = explain(row, optimizer="adamw")
    assert frame.value["optimizer"] == "adamw" and frame.source["optimizer"] == "asked for"
    assert not frame.guess["eps"] and frame.source["eps"] == "PyTorch's default"


@pytest.mark.parametrize(
    "args, message",
    [
        (["recipe"], "proxy_nca_pp"),
        (["recipe", "softtriple"], "  SoftTriple train.py: 0.01\n"),
        (["recipe", "proxy_nca_pp"], "run on      cub, resnet50, finetune"),
        (["recipe", "xbm", "--set", "optimizer=rmsprop"], "asked for"),
        (["recipe", "MS", "--backbone", "resnet50"], "average"),
    ],
)
def test_a_recipe_is_printed_with_its_sources(shell, args, message):
    assert message in shell(*args)


@pytest.mark.parametrize(
    "args, message",
    [
        (["recipe", "softtripel"], "did you mean 'softtriple'"),
        (["recipe", "II"], "II is a table of"),
        (["recipe", "ms", "--regime", "frozen"], "recipe=ms needs the regime finetune"),
        (["recipe", "ms", "--set", "recipe=cbm"], "did you mean 'cbml'"),
    ],
)
def test_a_recipe_that_does_not_exist_is_refused(shell, args, message):
    assert message in shell(*args, status=1)


def test_every_stated_default_is_a_parameter_of_its_loss():
    for pattern, stated in load_recipes()["parameters"].items():
        losses = [loss for loss in list_losses() if fnmatch(loss, pattern)]
        assert set(stated) <= {name for loss in losses for name in loss_defaults(loss)}, pattern


def test_guesses_are_marked_for_parameters_of_the_loss():
    guessed = {
        id: explain(row_of(id)).query("guess").index
        for id in ("own/triplet", "own/hpl", "own/smooth-proxy-anchor", "own/circle")
    }
    assert "loss.reduction" in guessed["own/triplet"] and "loss.margin" not in guessed["own/triplet"]
    assert (
        "loss.levels" in guessed["own/hpl"] and "loss.coarse_weight" not in guessed["own/hpl"]
    )  # that one was searched
    assert "loss.coarse_weight" in explain(row_of("002-III/cub-hpl-pa")).query("guess").index
    assert (
        "search" in explain(row_of("own/circle")).source["loss.gamma"]
        and "search" not in explain(row_of("own/circle")).source["gamma"]
    )
    assert "loss.conf_beta" in guessed["own/smooth-proxy-anchor"]
    assert not [name for name in guessed["own/circle"] if name.startswith("loss.")]


def test_a_preset_counts_as_its_values():
    frame = explain(find_rows("PS + PA")[0])
    assert frame.value["loss.host"] == "proxy_anchor" and frame.source["loss.host"].startswith("Gu et al. 2021")


def test_a_misspelt_setting_is_compared_with_all_chosen_rows():
    table = find_rows("II", "cub")
    apart = "but not of proxy_anchor: run these rows apart"
    for key, message in [
        ("capcity", "did you mean 'capacity'"),
        ("capacity", apart),
        ("loss", "unknown setting 'loss'"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_setting_names(table, [key])
    check_setting_names([*table, replace(table[0], recipe=None)], ["epochs", "loss.alpha", "noise"])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(recall_at=5), "recall_at must be a list of whole numbers, got 5"),
        (dict(recall_at=["1"]), "recall_at must be a whole number, got '1'"),
        (dict(recall_at=[2, 4]), "recall_at must begin with 1, got [2, 4]: --set recall_at=[1,2,4]"),
        (dict(recall_at=[4, 1]), "--set recall_at=[1,4]"),
        (dict(dataset=""), "--dataset is empty: give a name, or leave out --dataset"),
        (dict(dataset=" "), "--dataset is empty"),
        (dict(backbone=""), "--backbone is empty"),
        (dict(regime=""), "unknown regime ''"),
        (dict(epochs=2.5), "epochs must be a whole number, got 2.5"),
        (dict(epochs="many"), "epochs must be a whole number, got 'many'"),
        (dict(batch_size=None), "batch_size must be a whole number, got None"),
        (dict(lr=None), "lr must be a number, got None"),
        (dict(clip_value="x"), "clip_value must be a number"),
        (dict(holdout=-1), "holdout must be at least 0"),
        (dict(layer_norm=1), "layer_norm must be true or false"),
        (dict(pool=["max"]), "unknown pool"),
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(epochs=None), "epochs must be a whole number, got None"),
        (dict(lr="fast"), "lr must be a number, got 'fast'"),
        (dict(recall_at=[1, 2.5]), "recall_at must be a whole number, got 2.5"),
        (dict(frozen_bn="no"), "frozen_bn must be true or false"),
        (dict(schedule="cosin"), "did you mean 'cosine'"),
        (dict(per_class=1), "per_class must be at least 2"),
        (dict(noise=20), "noise must be a percentage"),
        (dict(noise="20%", holdout=1), "cannot be combined"),
        (dict(epoch=3), "did you mean 'epochs'"),
        (dict(optimizer="adamx"), "did you mean 'adam"),
        (dict(optimizer="sgd", eps=0.1), "eps is a parameter of adamw and adam and rmsprop, not of sgd"),
        (dict(optimizer="adam", betas=0.9), "betas must be two numbers, got 0.9"),
        (dict(eps=0), "eps must be greater than 0, got 0"),
        (dict(optimizer="sgd", nesterov=True), "nesterov needs a momentum"),
        (dict(crop_scale=1.5), "crop_scale must be more than 0 and at most 1, got 1.5"),
        (dict(resize_first=1), "resize_first must be true or false"),
        (dict(image_size=256, image_resize=224), "crop 256 is larger than resize 224"),
        (dict(schedule="plateau", step_epochs=[3]), "the schedule plateau needs one number as step_epochs"),
        (dict(schedule="plateau", gamma=1), "a gamma between 0 and 1"),
        (dict(recipe="soft"), "unknown recipe 'soft'"),
        (dict(capacity=0), "at least 1, got 0"),
        (dict(regime="frozn"), "did you mean 'frozen'"),
        (dict(dataset="cub200"), "did you mean 'cub'"),
        (dict(dataset="dogs"), "The path of a folder of class folders or of a CSV file works too"),
        (dict(backbone="resnt50"), "did you mean 'resnet50'"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_runs(wrong, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        settings_for(row_of("own/cp-proxy-anchor"), **wrong)


def test_values_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="not a multiple of per_class 5"):
        settings_for(find_rows("MS Loss")[0], batch_size=81)
    hpl = find_rows("HPL+PA")[0]
    assert settings_for(hpl, dataset="cub", n_coarse=10)["params"]["n_coarse"] == 10
    with pytest.raises(ValueError, match="nor exceed the 100 classes"):
        settings_for(hpl, dataset="cub", n_coarse=101)
    with pytest.raises(ValueError, match="unknown setting 'backbone'"):
        check_setting_names([hpl], ["backbone"])


@pytest.mark.parametrize("name", ["/no/such/folder", "~/no/such/folder", "./nothing"])
def test_a_folder_that_is_not_there_is_called_absent(shell, name):
    assert "does not exist: check the path" in shell("run", "II", "--dataset", name, status=1)


def test_a_file_given_as_data_is_called_a_file(shell, tmp_path):
    (tmp_path / "pictures.zip").touch()
    assert "is a file, not a folder" in shell("run", "II", "--dataset", "pictures.zip", status=1)


def test_rows_whose_data_are_missing_are_left_out_of_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DML_NB_DATA", str(tmp_path))
    rows = [row_of("own/circle"), row_of("002-II/cub-cp-pa-k-3")]
    assert batch._runnable(rows, None, None, "finetune") == rows[:1]
    assert "left out: 002-II/cub-cp-pa-k-3: cub is not on this machine: `dml_nb data cub`" in capsys.readouterr().out
    assert batch._runnable(rows[1:], None, None, "finetune") == rows[1:] and capsys.readouterr().out == ""


def test_memvir_of_a_table_keeps_its_bound_at_the_size_of_sop_and_its_record_is_true():
    row = row_of("002-III/sop-memvir-pa")
    settings = settings_for(row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the loss warns where it uses fewer steps than asked for
        loss = create_loss("memvir", num_classes=11318, embedding_size=512, **settings["params"])
        assert loss.steps_that_fit(settings["batch_size"]) == settings["params"]["steps"] == 3
    assert explain(row).loc["loss.steps", "source"].startswith("ours: as many as the bound of the queue holds")
    assert "steps" not in settings_for(row_of("002-III/cub-memvir-pa"))["params"]
