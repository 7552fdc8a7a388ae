"The search for settings: published values, widened ranges, refused values, interruption, and CP beside its hosts."

import shlex
from math import log
from pathlib import Path

import pandas as pd
import pytest
import torch

from dml_nb.data.glyphs import letter_folder
from dml_nb.experiments import tune
from dml_nb.experiments.recipes import settings_for
from dml_nb.experiments.tables import find_rows, load_recipes, loss_defaults
from dml_nb.face.cli import parse_settings
from dml_nb.losses import create_loss

PLACE = dict(dataset="cub", backbone="efficientnet_lite0", regime="frozen")
LOSSES = [*load_recipes()["search"]["parameters"], "cp_proxy_anchor", "cp_proxy_nca", "cp_softtriple"]


@pytest.fixture
def scored(monkeypatch):
    "Put a function of the setting in place of training; the settings it was asked for are collected."

    def replace(score):
        asked = []

        def run_trial(row, folds, dataset, backbone, regime, embedding_size=512, **setting):
            asked.append((folds, embedding_size, setting))
            return {"R@1": score(setting), "MAP@R": score(setting) / 2}

        monkeypatch.setattr(tune, "run_trial", run_trial)
        return asked

    return replace


def near(**best):
    "A score that is highest at these numbers, and 1 there."
    return lambda setting: 1 - sum(log(setting[name] / value) ** 2 for name, value in best.items()) / 100


@pytest.mark.parametrize("loss", LOSSES)
def test_published_values_meet_every_learning_rate(loss, scored, tmp_path):
    asked = scored(lambda setting: 0.5)
    rule = tune.search_rule(loss)
    best, trials = tune.search_row(find_rows(loss)[0], tmp_path, **PLACE)
    published = {name: values[0] for name, values in rule.items()}
    for name, value in published.items():
        if name != "lr":
            assert loss_defaults(loss)[name.removeprefix("loss.")] in (value, None)  # None: depends on the variant
    assert asked[0][2] == published == best  # of equal trials, the first
    settings = [setting for _, _, setting in asked]
    assert all(published | {name: value} in settings for name, values in rule.items() for value in values)
    assert {(folds, size) for folds, size, _ in asked} == {((0, 1), 512)}
    assert len(trials) == len(asked) == len({str(setting) for setting in settings})


@pytest.mark.parametrize("loss", LOSSES)
def test_every_value_of_the_rule_is_accepted(loss):
    row, rule = find_rows(loss)[0], tune.search_rule(loss)
    for name, values in rule.items():
        for value in values:
            settings_for(row, **PLACE, **{name: value})


@pytest.mark.parametrize(
    "alpha, tried",
    [
        (3.0, {8.0, 16.0, 32.0, 4.0, 2.0}),  # 4 is still the edge, so 2 is tried as well
        (1e-3, {8.0, 16.0, 32.0, 4.0, 2.0}),  # not more than two
        (55.0, {8.0, 16.0, 32.0, 64.0, 128.0}),
        (1e9, {8.0, 16.0, 32.0, 64.0, 128.0}),
        (15.0, {8.0, 16.0, 32.0}),
        (9.0, {8.0, 16.0, 32.0, 4.0}),  # 4 is worse than 8
    ],
)
def test_a_range_whose_edge_wins_is_widened(alpha, tried, scored, tmp_path):
    scored(near(alpha=alpha, lr=1e-3))
    best, trials = tune.search_row(find_rows("proxy_anchor")[0], tmp_path, **PLACE)
    assert {*trials.alpha} == tried
    assert {*trials.lr} == {1e-4, 3e-4, 1e-3, 3e-3}
    assert best == dict(alpha=min(tried, key=lambda value: abs(log(value / alpha))), lr=1e-3)


@pytest.mark.parametrize("lr, added", [(1e-6, {3.33e-5, 1.11e-5}), (1.0, {0.009, 0.027})])
def test_learning_rates_are_widened_too(lr, added, scored, tmp_path):
    scored(near(alpha=16.0, lr=lr))
    _, trials = tune.search_row(find_rows("proxy_anchor")[0], tmp_path, **PLACE)
    assert {*trials.lr} == {1e-4, 3e-4, 1e-3, 3e-3} | added


def test_a_later_stage_can_widen_an_earlier_range(scored, tmp_path):
    "α=16 wins with the published learning rate; with a smaller one, the published α=32 wins, and then 64 and 128."
    scored(lambda s: near(alpha=100.0)(s) + 1 if s["lr"] == 1e-4 else near(alpha=16.0)(s))
    best, trials = tune.search_row(find_rows("proxy_anchor")[0], tmp_path, **PLACE)
    assert best["alpha"] == 128 and trials["R@1"].is_monotonic_decreasing


@pytest.mark.parametrize(
    "loss, name, tried",
    [
        ("proxy_synthesis", "mu", {0.25, 0.5, 1.0}),  # a share above 1 is refused
        ("memvir", "gap", {2, 5, 10, 20, 40}),  # whole numbers stay whole
        ("histogram", "nodes", {51, 101, 201, 400, 796}),
    ],
)
def test_a_refused_value_ends_the_widening(loss, name, tried, scored, tmp_path):
    scored(lambda setting: float(setting[name]))
    best, trials = tune.search_row(find_rows(loss)[0], tmp_path, **PLACE)
    assert {*trials[name]} == tried and best[name] == max(tried) and type(best[name]) is type(max(tried))


def test_an_interrupted_search_continues(scored, tmp_path, monkeypatch):
    row, score = find_rows("cp_proxy_anchor")[0], near(alpha=100.0, lr=1e-5)
    asked = scored(score)
    whole = tune.search_row(row, tmp_path / "whole", **PLACE)
    expected = [setting for _, _, setting in asked]
    asked = scored(score)
    complete = tune.run_trial

    def interrupted(*args, **settings):
        if len(asked) == 7:
            raise KeyboardInterrupt
        return complete(*args, **settings)

    monkeypatch.setattr(tune, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.search_row(row, tmp_path / "parts", **PLACE)
    monkeypatch.setattr(tune, "run_trial", complete)
    best, trials = tune.search_row(row, tmp_path / "parts", **PLACE)
    assert [setting for _, _, setting in asked] == expected
    assert best == whole[0]
    pd.testing.assert_frame_equal(trials, whole[1])
    (file,) = (tmp_path / "parts").iterdir()
    stored = pd.read_csv(file)
    assert [*stored] == ["method", "alpha", "lr", "calib_lambda", "center", "R@1", "MAP@R", "trial"]
    assert len(stored) == len(expected)


def test_trials_of_the_earlier_rule_are_used_again(scored, tmp_path):
    "A file of the earlier rule has lines of the same form."
    row = find_rows("MS", "cub")[0]
    name = f'["{row.id}", [0, 1], {{"backbone": "efficientnet_lite0", "base": 0.5, "dataset": "cub", '
    name += '"embedding_size": 512, "lr": 0.001, "regime": "frozen"}]'
    line = {"method": row.method, "base": 0.5, "lr": 0.001, "R@1": 0.9, "MAP@R": 0.5, "trial": name}
    pd.DataFrame([line]).to_csv(tmp_path / "cub-efficientnet_lite0-frozen-multi_similarity.csv", index=False)
    asked = scored(lambda setting: 0.5)
    best, _ = tune.search_row(row, tmp_path, **PLACE)
    assert best == dict(base=0.5, lr=0.001) and best not in [setting for _, _, setting in asked]


def test_the_best_of_all_trials_wins(scored, tmp_path):
    "The winner is found in the first stage, and no later stage reaches it."
    scored(lambda setting: 1.0 if setting == dict(base=0.3, lr=1e-3) else 0.5)
    best, trials = tune.search_row(find_rows("MS")[0], tmp_path, **PLACE)
    assert best == dict(base=0.3, lr=1e-3)
    assert trials["R@1"].tolist() == [1.0] + [0.5] * (len(trials) - 1)


@pytest.mark.parametrize("host", ["proxy_anchor", "proxy_nca", "softtriple", "cosface", "arcface"])
def test_cp_is_searched_like_its_host(host):
    rule, cp = tune.search_rule(host), tune.search_rule(f"cp_{host}")
    own = ["calib_lambda"] + ["center"] * (host == "proxy_anchor")
    assert [*cp] == [*({"scale_x": "scale"}.get(name, name) for name in rule), *own]
    assert [len(cp[name]) for name in cp if name not in own] == [len(values) for values in rule.values()]
    assert cp["lr"] == rule["lr"] and sorted(cp["calib_lambda"]) == [0, 0.01, 0.1, 1]


@pytest.mark.parametrize("scale_x, scale", zip(tune.search_rule("proxy_nca")["scale_x"], [18.0, 6.0, 54.0]))
def test_proxy_nca_has_the_same_scales_under_cp(scale_x, scale):
    assert scale in tune.search_rule("cp_proxy_nca")["scale"]
    z, y = torch.randn(12, 8), torch.arange(12) % 4
    host = create_loss("proxy_nca", 4, 8, scale_x=scale_x, smoothing=0.0, include_positive=False)
    cp = create_loss("cp_proxy_nca", 4, 8, scale=scale, proxies_per_class=1, calib_lambda=0.0, center_weight=0.0)
    with torch.no_grad():
        cp.proxies.copy_(host.proxies.view_as(cp.proxies))
    torch.testing.assert_close(cp(z, y), host(z, y))


def test_the_search_starts_from_the_learning_rate_of_the_regime(scored, tmp_path):
    asked = scored(lambda setting: 0.5)
    tune.search_row(find_rows("MS")[0], tmp_path, "cub", "efficientnet_lite0", "finetune")
    assert asked[0][2] == dict(base=0.5, lr=1e-4)


def test_the_command_searches_each_loss_once(scored, shell):
    asked = scored(near(base=0.5, lr=1e-3))
    printed = shell("tune", "MS", "multi_similarity", "--dataset", "cub", "--backbone", "efficientnet_lite0")
    file = "runs/search/cub-efficientnet_lite0-frozen-multi_similarity.csv"
    start, first, *_, best, command = printed.splitlines()
    assert start == f"multi_similarity: at least 6 trials, stored in {file}"
    assert first == "  base=0.5, lr=0.001: R@1 100.0, 0 s"
    assert best == "MS: R@1 100.0 on held-out classes. To train with this setting:"
    assert command == (
        "  dml_nb run 000-T2/cub-ms --dataset cub --backbone efficientnet_lite0 --regime frozen "
        "--set embedding_size=512 --set base=0.5 --set lr=0.001"
    )
    assert len(asked) == 6


@pytest.mark.parametrize("loss", LOSSES)
def test_the_printed_command_trains_with_the_settings_of_the_best_trial(loss, scored, tmp_path, monkeypatch):
    scored(lambda setting: sum(map(ord, str(setting))) % 97 / 97)
    row, extra = find_rows(loss, "cub")[0], dict(epochs=20, pool="max")
    best, _ = tune.search_row(row, tmp_path, **PLACE, epochs=20)
    plan = tune.plan_search(row, **PLACE, **extra)[1]
    words = shlex.split(tune.run_command(row, **plan, **best))
    assert words[:3] == ["dml_nb", "run", row.id]
    options = dict(zip(words[3::2], words[4::2])) | {
        "--set": [v for k, v in zip(words[3::2], words[4::2]) if k == "--set"]
    }
    asked = {name: options[f"--{name}"] for name in PLACE} | parse_settings(options["--set"])
    assert settings_for(row, **asked) == settings_for(row, **PLACE, **extra, embedding_size=512, **best)


def test_a_row_with_label_noise_is_searched_and_trained_with_correct_labels(scored, tmp_path):
    row = find_rows("002-V/cub-cp-pa-noise-20")[0]
    _, plan = tune.plan_search(row, **PLACE)
    assert plan["noise"] is None and "--set noise=null" in tune.run_command(row, **plan)
    assert "noise" not in settings_for(row, **plan)


@pytest.fixture
def own(tmp_path):
    return letter_folder(tmp_path / "my letters", "abcdefgh")


def test_a_folder_of_your_own_is_searched_into_the_folder_of_results(own, scored, tmp_path, monkeypatch):
    "However its path is written, the trials are the same; nothing is written beside the images."
    asked, place = scored(near(base=0.5, lr=1e-4)), dict(backbone="small_cnn", regime="finetune")
    before = sorted(Path(own).iterdir())
    monkeypatch.chdir(tmp_path)
    tune.search_row(find_rows("MS")[0], tmp_path / "out", own, **place)
    once = len(asked)
    for path in ("my letters", "./my letters/"):
        tune.search_row(find_rows("MS")[0], tmp_path / "out", path, **place)
    assert len(asked) == once and sorted(Path(own).iterdir()) == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["my-letters-small_cnn-finetune-multi_similarity.csv"]


def test_two_folders_with_one_name_keep_their_own_trials(scored, tmp_path):
    asked, counts = scored(lambda setting: 0.5), []
    for folder in [letter_folder(tmp_path / place / "letters", "abcdef") for place in "ab"] * 2:
        tune.search_row(find_rows("MS")[0], tmp_path / "out", folder, "small_cnn", "finetune")
        counts.append(len(asked))
    assert counts == [counts[0], 2 * counts[0], 2 * counts[0], 2 * counts[0]]


def test_other_images_in_the_same_folder_are_searched_again(own, scored, tmp_path):
    asked = scored(lambda setting: 0.5)

    def search():
        tune.search_row(find_rows("MS")[0], tmp_path, own, "small_cnn", "finetune")
        return len(asked)

    once = search()
    assert search() == once
    one, two = sorted(Path(own).rglob("*.png"))[:2]
    one.write_bytes(two.read_bytes())
    assert (search(), search()) == (2 * once, 2 * once)


def test_old_trials_stay_in_the_file_as_they_were(scored, tmp_path):
    "Numbers are written back with every digit, and a search of an older version goes on."
    row, asked = find_rows("MS", "cub")[0], scored(near(base=0.5, lr=1e-3))
    tune.search_row(row, tmp_path, **PLACE)
    (file,) = tmp_path.iterdir()
    whole = file.read_text(encoding="utf-8")
    first = [line + "\n" for line in whole.splitlines()[:3]]
    first[1] = first[1].replace("1.0,0.5,", "1.0,0.12345678901234566,")
    file.write_text("".join(first), encoding="utf-8")
    tune.search_row(row, tmp_path, **PLACE)
    assert file.read_text(encoding="utf-8").startswith("".join(first)) and len(asked) == 6 + 4


def test_methods_that_cannot_be_searched_are_named(capsys):
    rows = find_rows("MS") + find_rows("Devide-Conquer") + find_rows("own/norm-softmax")
    assert [row.method for row in tune.rows_to_search(rows)] == ["MS"]
    output = capsys.readouterr().out
    assert "left out: Devide-Conquer: recipes.json" in output and "left out: norm_softmax: recipes.json" in output


def test_a_trial_of_an_earlier_version_is_not_run_again(scored, tmp_path):
    scored(lambda setting: 0.5)
    row, path = find_rows("MS")[0], tmp_path / "own.csv"
    old, now, other = "57271cd917889410", "a" * 32, "b" * 32
    for checksum, runs in [(old, 1), (now, 1), (None, 1)]:
        tune.stored_trial(row, dict(lr=0.1), path, (0,), checksum, **PLACE)
        assert len(pd.read_csv(path)) == runs
    tune.stored_trial(row, dict(lr=0.2), path, (0,), now, **PLACE)
    tune.stored_trial(row, dict(lr=0.2), path, (0,), other, **PLACE)
    assert len(pd.read_csv(path)) == 3


def test_a_batch_that_the_classes_cannot_fill_is_refused_before_features_are_computed(tmp_path, glyph_folder):
    place = dict(dataset=str(glyph_folder), backbone="efficientnet_lite0", regime="frozen")
    with pytest.raises(ValueError, match="a batch needs 30 classes but there are 4: use batch_size=20 or less"):
        tune.search_row(find_rows("MS")[0], tmp_path, **place)
