"Queries and gallery apart, from a CSV file to training, metrics, the untrained network and the pictures."

import json
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

from dml_nb.data import load_dataset
from dml_nb.data.csv_lists import load_csv
from dml_nb.data.label_noise import symmetric_noise, with_noise
from dml_nb.experiments import run as run_module
from dml_nb.experiments.recipes import settings_for
from dml_nb.experiments.run import Run, measure_untrained
from dml_nb.experiments.tables import row_of
from dml_nb.models.features import embed
from dml_nb.retrieval import evaluate
from dml_nb.retrieval.view import plot_retrieval

ROW = "002-II/cub-cp-pa-k-3"
TINY = dict(epochs=2, embedding_size=16, batch_size=24, lr=0.001, recall_at=[1, 2])
EXTRA = ("between-class cosine", "spectrum")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def own_csv(glyph_folder, tmp_path) -> Path:
    "Six letters for training; of six others two fonts are queries and ten are the gallery."
    lines = ["path,label,split,role"]
    for letter in "abcdefghijkl":
        for i, file in enumerate(sorted((glyph_folder / letter).iterdir())):
            part = "train," if letter < "g" else f"test,{'query' if i in (3, 7) else 'gallery'}"
            lines.append(f"{file},{letter},{part}")
    file = tmp_path / "own.csv"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def pixel_features(monkeypatch):
    "The pixels of an image, with noise that makes retrieval imperfect, in place of the features of a backbone."

    def features(backbone, images, pool, allow_random=False):
        pixels = torch.stack([torch.tensor(list(images.image(i).convert("L").getdata())) for i in range(len(images))])
        return pixels / 255 + 2 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(run_module, "cached_features", features)
    return features


def expected(z, data) -> dict:
    q, y = data.test.is_query, data.test.labels
    parts = dict(gallery=z[~q], gallery_labels=y[~q], recall_at=(1, 2), with_nmi=False, extra=EXTRA)
    return evaluate(z[q], y[q], **parts)


def assert_recorded(found: dict, z, data):
    wanted, all_against_all = expected(z, data), evaluate(z, data.test.labels, with_nmi=False)
    assert {"R@1", "R@2", "MAP@R", "R-precision", "effective rank"} <= found.keys() & wanted.keys()
    for name in found.keys() & wanted.keys():
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
    assert found["MAP@R"] != pytest.approx(all_against_all["MAP@R"], rel=1e-3)


@pytest.mark.parametrize("regime", ["finetune", "frozen"])
def test_a_run_records_the_metrics_of_queries_against_the_gallery(own_csv, tmp_path, pixel_features, regime):
    backbone = "small_cnn" if regime == "finetune" else "efficientnet_lite0"
    settings = settings_for(row_of(ROW), str(own_csv), backbone, regime, **TINY)
    run = Run(ROW, settings, 0, tmp_path / "run")
    learn = run.learner()
    with learn.no_bar(), learn.no_logging():
        result = run.result(run.fit(learn))
    assert (result["test_images"], result["test_queries"]) == (72, 12)
    assert_recorded(result["last"], embed(learn.model, learn.dls.test_plain), run.data)
    assert run.gallery(learn).startswith("![queries on the left")


def test_the_command_records_them_too(own_csv, shell):
    options = [f"--set={name}={json.dumps(value)}" for name, value in TINY.items()]
    assert "1 done, 0 failed" in shell("run", ROW, "--dataset", own_csv, "--backbone", "small_cnn", *options)
    (file,) = Path().glob("runs/**/result.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    settings = settings_for(row_of(ROW), str(own_csv), "small_cnn", **TINY)
    run = Run(ROW, settings, 0, "again")
    learn = run.learner()
    with learn.no_bar(), learn.no_logging():
        again = run.result(run.fit(learn))
    assert result["test_queries"] == 12 and result["last"] == pytest.approx(again["last"], rel=1e-4)
    assert "own.csv" in shell("report")


def test_the_untrained_network_is_measured_in_the_same_way(own_csv, tmp_path, pixel_features):
    settings = settings_for(row_of(ROW), str(own_csv), "efficientnet_lite0", "frozen", **TINY)
    data = load_csv(own_csv)
    assert_recorded(measure_untrained(settings, tmp_path)["metrics"], pixel_features("", data.test, ""), data)


def test_pictures_show_queries_and_what_they_find_in_the_gallery(own_csv):
    test = load_csv(own_csv).test
    shown = []
    test.image = lambda i, image=test.image: shown.append(i) or image(i)
    plt.close(plot_retrieval(test, torch.randn(len(test), 8), queries=12, k=4))
    columns = list(zip(*[iter(test.is_query[shown].tolist())] * 5))
    assert columns == [(True, False, False, False, False)] * 12
    assert len({q for q in shown if test.is_query[q]}) == 12


def test_parts_of_the_data_keep_the_roles_that_they_can(own_csv):
    data = load_csv(own_csv)
    part = data.subset(3, [4, 0])
    assert part.test.is_query.tolist() == [i % 12 in (3, 7) for i in range(24)]
    assert data.holdout().test.is_query is None  # made from training images, which have no role
    noisy = with_noise(data, symmetric_noise(data.train.labels, 0.5, 6))
    assert noisy.test is data.test and noisy.train.is_query is None
    assert data.test.with_transform(str).is_query is data.test.is_query


def test_a_gallery_without_queries_is_refused(own_csv):
    own_csv.write_text(own_csv.read_text(encoding="utf-8").replace("query", "gallery"), encoding="utf-8")
    with pytest.raises(ValueError, match="own has a gallery of 72 test images but no query"):
        load_dataset(own_csv)


def test_few_training_images_on_fixed_features_keep_the_test_split(glyph_folder, tmp_path, pixel_features):
    settings = settings_for(row_of(ROW), str(glyph_folder), "efficientnet_lite0", "frozen", **TINY, shots=3)
    run = Run(ROW, settings, 0, tmp_path / "run")
    learn = run.learner()
    data = load_dataset(glyph_folder)
    assert learn.dls.train_labels.bincount().tolist() == [3] * len(data.train.classes)
    assert run.data.test.paths == data.test.paths
    torch.testing.assert_close(learn.dls.test_plain.x, pixel_features("", data.test, ""))


def test_a_fold_of_images_in_memory_trains_on_fixed_features(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "cached_features", lambda backbone, images, pool: torch.randn(len(images), 4))
    settings = settings_for(row_of(ROW), "glyphs", "efficientnet_lite0", "frozen", **TINY, fold=1)
    run = Run(ROW, settings, 0, tmp_path / "run")
    learn = run.learner()
    assert len(learn.dls.test_labels) == len(run.data.test) < len(learn.dls.train_labels)
