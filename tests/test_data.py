"Data sets and label noise on bad input: folders, damaged files, noise lists that do not fit."

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from torchvision.transforms import v2

from dml_nb.core.files import cache_root
from dml_nb.data import load_dataset
from dml_nb.data.folders import cached_corrupt, find_corrupt, load_folder
from dml_nb.data.groceries import ARCHIVE
from dml_nb.data.image_sets import ImageSet, RetrievalData
from dml_nb.data.label_noise import read_noise_list
from dml_nb.data.loaders import eval_loader


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "cache"))


def write_folder(folder: Path, counts: dict[str, int]) -> Path:
    "A folder of glyph JPEGs: class name -> number of images."
    glyphs = load_dataset("glyphs").train
    folder.mkdir()
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir()
        for i in range(count):
            glyphs.image(12 * label + i).save(folder / name / f"{i}.jpg")
    return folder


@pytest.mark.parametrize(
    "counts, message",
    [
        ({}, "holds no class folders"),
        (dict(a=0, b=0), "has no images in its 2 class folders"),
        (dict(a=3), "images of one class only, 'a'"),
        (dict(a=3, b=1), "data/test: 1 classes, 1 images: no class has two images"),
    ],
    ids=["no class folders", "no images", "one class", "no pair in the test"],
)
def test_a_folder_that_is_no_data_set(tmp_path, counts, message):
    with pytest.raises(ValueError, match=message):
        load_folder(write_folder(tmp_path / "data", counts))


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_folder(tmp_path / "nowhere")


def test_files_are_decoded_again_only_after_a_change(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "data", dict(a=2, b=2, c=2))
    (folder / "c/2.png").write_text("hello")
    files = sorted(folder.glob("*/*"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    assert list(find_corrupt(files)) == [1, 6]
    for _ in range(2):
        assert cached_corrupt(files) == find_corrupt(files)
        assert len(list((cache_root() / "checked").iterdir())) == 1
    files[1].write_bytes(whole)
    assert list(cached_corrupt(files)) == [6]
    assert len(list((cache_root() / "checked").iterdir())) == 2
    monkeypatch.setenv("DML_NB_CACHE", str(files[0]))  # a file, so nothing can be written below it
    assert list(cached_corrupt(files)) == [6]


def test_paths_are_taken_for_folders(tmp_path):
    folder = write_folder(tmp_path / "data", dict(a=2, b=2))
    assert load_dataset(str(folder)).train.classes == ["a"]
    assert load_dataset(os.path.relpath(folder)).checksum == load_dataset(folder).checksum
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_dataset(folder)


# the photographs that come with the package


def test_groceries_mini_needs_no_other_data(tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_DATA", str(tmp_path / "empty"))
    data = load_dataset("groceries-mini")
    assert [len(part.classes) for part in (data.train, data.test)] == [41, 40]
    assert data.train.classes + data.test.classes == sorted(data.train.classes + data.test.classes)
    assert all(min(data.test.image(i).size) == 96 for i in range(0, 960, 60))
    with pytest.raises(FileNotFoundError, match="or use groceries-mini"):
        load_dataset("groceries")


def test_worker_processes_read_groceries_mini():
    transform = v2.Compose([v2.Resize(8), v2.CenterCrop(8), v2.PILToTensor()])
    part = load_dataset("groceries-mini").subset(2, 1).test.with_transform(transform)
    alone, shared = (torch.cat([x for (x,) in eval_loader(part, 10, workers)]) for workers in (0, 2))
    assert alone.shape == (24, 3, 8, 8) and alone.equal(shared)


def test_the_archive_travels_with_its_licence():
    beside = ARCHIVE.with_name("groceries_mini_LICENSE.txt").read_text(encoding="utf-8")
    inside = ZipFile(ARCHIVE).read("LICENSE").decode()
    assert "MIT License" in inside and inside.strip() in beside
    assert "Klasson" in beside and "WACV 2019" in beside and "github.com/marcusklasson/GroceryStoreDataset" in beside
    assert ARCHIVE.stat().st_size < 5_000_000
    setup = Path(__file__).parents[1] / "setup.py"
    patterns = [word for word in setup.read_text(encoding="utf-8").split('"') if word.startswith("data/")]
    for file in ARCHIVE.parent.glob("groceries_mini*"):
        assert any(fnmatch(f"data/{file.name}", pattern) for pattern in patterns), f"{file.name} is not in package_data"


# lists of noisy labels

NAMES = [f"{c}/{c}_{i}.jpg" for c in "abcd" for i in range(6)]
TRUE = [i // 6 + 1 for i in range(24)]
OTHER = ["z/z.jpg"]


@pytest.fixture
def birds():
    "A data set of names only: no file is opened."
    train = ImageSet("birds/train", [y - 1 for y in TRUE], list("abcd"), paths=[Path("/here") / n for n in NAMES])
    return RetrievalData(
        "birds", train, ImageSet("birds/test", [0, 0], ["e"], paths=[Path("e/0.jpg"), Path("e/1.jpg")])
    )


@pytest.mark.parametrize(
    "labels, names, on_mismatch, message",
    [
        (
            TRUE[1:] + [2],
            NAMES[1:] + OTHER,
            "stop",
            "1 of 24 training images of birds have no line in list.csv, and 1 of its 24 lines",
        ),
        (TRUE, ["x/" + n for n in "abcdefgh"], "skip", "24 of 24 training images"),
        (TRUE[:-1] + ["cat"], NAMES, "stop", "list.csv, line 24: expected 'path,label' with a whole number"),
        (TRUE, NAMES[:-1] + NAMES[:1], "stop", "names 1 images more than once, such as 'a/a_0.jpg'"),
        ([], [], "stop", "list.csv is empty"),
        ([y % 4 + 1 for y in TRUE], NAMES, "stop", "numbers its classes differently from birds"),
        (TRUE, NAMES, "ignore", "unknown on_mismatch 'ignore'"),
    ],
    ids=["one image each", "nothing in common", "no number", "twice", "empty", "other numbering", "mistyped option"],
)
def test_a_noise_list_that_does_not_fit(tmp_path, birds, labels, names, on_mismatch, message):
    file = tmp_path / "list.csv"
    file.write_text("".join(f"/elsewhere/{n},{y}\n" for n, y in zip(names, labels)))
    with pytest.raises(ValueError, match=message):
        read_noise_list(file, birds, on_mismatch)


def test_a_noise_list_that_does_not_exist(birds):
    with pytest.raises(FileNotFoundError, match="noise list none.csv does not exist"):
        read_noise_list("none.csv", birds)


def test_a_noise_list_for_images_in_memory(tmp_path):
    with pytest.raises(ValueError, match="glyphs keeps its images in memory"):
        read_noise_list(tmp_path / "list.csv", load_dataset("glyphs"))
