"Data sets and label noise on bad input: folders, damaged files, noise lists that do not fit."

import os
import shutil
import unicodedata
import warnings
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dml_nb.core.files import data_root
from dml_nb.data import image_files, load_dataset
from dml_nb.data.datasets import no_dataset
from dml_nb.data.folders import load_folder
from dml_nb.data.groceries import ARCHIVE
from dml_nb.data.image_files import decoding_errors, open_image
from dml_nb.data.image_sets import ImageSet, RetrievalData
from dml_nb.data.label_noise import read_noise_list, with_noise
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
    (folder / "c/2.png").write_text("hello", encoding="utf-8")
    files, opened = sorted(folder.glob("*/*")), []
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(image_files, "open_image", lambda path: opened.append(path) or open_image(path))
    for _ in range(2):
        assert list(decoding_errors(files)) == [1, 6]
        assert len(opened) == len(files)
    files[1].write_bytes(whole)
    assert list(decoding_errors(files)) == [6]
    assert opened[len(files) :] == [str(files[1])]
    monkeypatch.setenv("DML_NB_CACHE", str(files[0]))  # a file, so nothing can be written below it
    assert list(decoding_errors(files)) == [6]


# files that are no images of a class


def loaded(folder):
    "The data of a folder, and the warnings."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        return load_folder(folder), [str(w.message) for w in seen]


def test_every_format_that_pillow_reads_is_loaded(tmp_path):
    folder, image = write_folder(tmp_path / "data", dict(a=2, b=2)), Image.new("RGB", (24, 24))
    formats = dict(avif="AVIF", jfif="JPEG", JPE="JPEG", ppm="PPM", pgm="PPM", jp2="JPEG2000", TIFF="TIFF", Png="PNG")
    formats |= dict(qoi="QOI", tga="TGA", webp="WEBP", gif="GIF", bmp="BMP", mpo="MPO", ico="ICO", apng="PNG")
    for suffix, format in formats.items():
        image.save(folder / f"a/x.{suffix}", format)
    data, said = loaded(folder)
    assert len(data.train) == 2 + len(formats) and said == []


def test_what_is_left_out_is_counted_and_named_in_one_sentence(tmp_path):
    folder = write_folder(tmp_path / "data", dict(a=2, b=2))
    for name in ("a/x.heic", "a/y.HEIC", "b/notes", "b/film.mpg", "a/more/1.jpg", "a/more/deep/2.png", "a/more/x.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("", encoding="utf-8")
    for link in ("a/l0.jpg", "a/l1.jpg", "gone"):
        (folder / link).symlink_to("/absent/annex")
    os.mkfifo(folder / "b/pipe.jpg")
    (folder / "loose.jpg").write_text("", encoding="utf-8")
    (folder / "README.md").write_text("", encoding="utf-8")
    data, (said,) = loaded(folder)
    assert len(data.train) == len(data.test) == 2
    assert said.startswith("in data, these files are left out: ") and said.count("\n") == 0
    for part in (
        "2 of type .heic, such as a/x.heic",
        "1 of type unknown (no suffix), such as b/notes",
        "1 of type .mpg, such as b/film.mpg",
        "2 images in folders inside class folders, such as a/more/1.jpg",
        "3 links without a target, such as a/l0.jpg",
        "1 neither files nor folders, such as b/pipe.jpg",
        "1 images outside the class folders, such as loose.jpg",
    ):
        assert part in said


def test_files_of_the_system_and_hidden_files_are_no_part_of_the_data(tmp_path):
    folder = write_folder(tmp_path / "data", dict(a=2, b=2))
    for name in ("a/._0.jpg", "a/.DS_Store", "b/Thumbs.db", "b/desktop.ini", ".git/x.jpg", "__MACOSX/a/0.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("", encoding="utf-8")
    (folder / "a/.thumbnails").mkdir()
    (folder / "a/.thumbnails/0.jpg").write_text("", encoding="utf-8")
    data, said = loaded(folder)
    assert (data.train.classes, data.test.classes, len(data.train), said) == (["a"], ["b"], 2, [])


def test_a_class_may_begin_with_two_underscores(tmp_path):
    data, said = loaded(write_folder(tmp_path / "data", dict(__background__=2, a=2)))
    assert (data.train.classes, data.test.classes, said) == (["__background__"], ["a"], [])


def test_links_to_images_and_to_class_folders_are_followed(tmp_path):
    folder = write_folder(tmp_path / "data", dict(a=2, b=2))
    (folder / "a/link.jpg").symlink_to(folder / "b/0.jpg")
    (folder / "c").symlink_to(folder / "a")
    data, said = loaded(folder)
    assert (len(data.train), len(data.test), said) == (5, 3, [])


def test_a_folder_with_train_and_test_is_not_taken_for_two_classes(tmp_path):
    (tmp_path / "data").mkdir()
    for part in ("train", "test"):
        write_folder(tmp_path / "data" / part, dict(a=2, b=2))
    with pytest.raises(
        ValueError, match="no images in its 2 class folders: .* 8 images in folders inside class folders"
    ):
        load_folder(tmp_path / "data")


def test_accents_sort_alike_on_every_machine(tmp_path):
    names = ["e", "\N{LATIN SMALL LETTER E WITH ACUTE}a", "f", "z"]  # é sorts after z if it is one character
    linux = write_folder(tmp_path / "linux", dict.fromkeys(names, 2))
    mac = tmp_path / "mac"
    mac.mkdir()
    for name in names:
        shutil.copytree(linux / name, mac / unicodedata.normalize("NFD", name))
    one, other = load_folder(linux, name="x"), load_folder(mac, name="x")
    assert one.train.classes == other.train.classes == ["e", "f"]
    assert one.test.classes == other.test.classes == ["z", names[1]]
    assert one.checksum == other.checksum


def test_two_folders_that_differ_only_in_how_an_accent_is_stored(tmp_path):
    name = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    folder = write_folder(tmp_path / "data", {name: 2, unicodedata.normalize("NFD", name): 2})
    with pytest.raises(ValueError, match=f"two folders with the name '{name}'.* move the images into one"):
        load_folder(folder)


def test_an_unreadable_file_is_reported_with_the_counts(tmp_path):
    folder = write_folder(tmp_path / "data", dict(a=3, b=2))
    (folder / "a/0.jpg").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match=r"1 of 5 files in the 2 classes of data cannot be read: a/0.jpg \("):
        load_folder(folder)


@pytest.mark.parametrize("closed", ["", "a"], ids=["the folder", "a class folder"])
def test_a_folder_without_permission_is_named(tmp_path, monkeypatch, closed):
    folder = write_folder(tmp_path / "data", dict(a=2, b=2))
    scandir = os.scandir

    def refuse(path):  # root may read everything, so the refusal is made up
        if str(path) == str(folder / closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=f"you may not read {folder / closed}: .*chmod u\\+rx"):
        load_folder(folder)


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "data", dict(a=2, b=2))

    def refuse(path):
        if path.endswith("a/1.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return open_image(path)

    monkeypatch.setattr(image_files, "open_image", refuse)
    with pytest.raises(ValueError, match=r"1 of 4 files .* cannot be read: a/1.jpg \(Permission denied\)"):
        load_folder(folder)


# what stands for a data set


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "mine", dict(a=2, b=2))
    monkeypatch.chdir(folder / "a")
    assert repr(load_dataset("..")).startswith("mine\n")
    monkeypatch.chdir(folder)
    assert repr(load_dataset(".")).startswith("mine\n")
    (tmp_path / "link").symlink_to(folder)
    assert load_dataset(tmp_path / "link").name == "link"


@pytest.mark.parametrize("name", ["list.txt", "photos.zip"])  # a CSV file is a data set
def test_a_file_is_not_called_a_missing_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    for given in (name, tmp_path / name, f"./{name}"):
        with pytest.raises(NotADirectoryError, match=f"{name} is a file, not a folder: give the folder"):
            load_dataset(given)
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_folder(tmp_path / name)


@pytest.mark.parametrize("path", ["/nope", "./nope", "~/nope/birds", Path("nope"), "x/" * 3000])
def test_a_path_to_nothing_is_called_a_missing_folder(path):
    for error in (no_dataset(path), pytest.raises(FileNotFoundError, load_dataset, path).value):
        assert isinstance(error, FileNotFoundError) and "does not exist: check the path" in str(error)


@pytest.mark.parametrize("name", [3, None, "", 2.5, b"cub", ["cub"], Ellipsis])
def test_what_is_no_name_is_shown(name):
    with pytest.raises(ValueError, match="a data set is a name such as 'cub' or the path of a folder, got"):
        load_dataset(name)


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
    file.write_text("".join(f"/elsewhere/{n},{y}\n" for n, y in zip(names, labels)), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_noise_list(file, birds, on_mismatch)


def test_a_noise_list_that_does_not_exist(birds):
    with pytest.raises(FileNotFoundError, match="noise list none.csv does not exist"):
        read_noise_list("none.csv", birds)


def test_a_noise_list_for_images_in_memory(tmp_path):
    with pytest.raises(ValueError, match="glyphs keeps its images in memory"):
        read_noise_list(tmp_path / "list.csv", load_dataset("glyphs"))


def test_a_noise_list_from_windows_or_a_mac_fits(tmp_path):
    name = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    train = ImageSet("x", [0, 0], [name], paths=[Path("/here") / name / f"{i}.jpg" for i in (0, 1)])
    data = RetrievalData("x", train, ImageSet("x/test", [0, 0], ["e"], paths=[Path("e/0.jpg"), Path("e/1.jpg")]))
    lines = [f"D:\\birds\\{name}\\0.jpg,1", f"/mac/{unicodedata.normalize('NFD', name)}/1.jpg,1"]
    file = tmp_path / "list.csv"
    file.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert read_noise_list(file, data).rate == 0
    file.write_bytes(b"caf\xe9/0.jpg,1\n")
    with pytest.raises(ValueError, match="2 of 2 training images of x have no line in list.csv"):
        read_noise_list(file, data)


def cars(folder: str = "", number: int = 5) -> RetrievalData:
    "Cars-196 as its reader gives it: the order of the authors, in which the Integra comes after the RL and the TL."
    classes = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012", "Acura Integra Type R 2001"]
    files = [(c, part, n) for c in range(4) for part, n in (("train", 10 + c), ("test", 20 + c), ("test", 30 + c))]
    files += [(1, "train", 77), (1, "test", 77)]  # the same number twice
    paths = [Path(folder or f"cars_{part}") / f"{n:0{number}}.jpg" for _, part, n in files]
    train = ImageSet("cars/train", [c for c, _, _ in files], classes, paths=paths)
    test = ImageSet("cars/test", [0, 0], ["Volvo"], paths=[Path("cars_test/00001.jpg"), Path("cars_test/00002.jpg")])
    return RetrievalData("cars", train, test)


def cars_list(file: Path) -> Path:
    "A list in the format of PRISM: folders with the names of classes, which are numbered by name; one label is wrong."
    names = {1: "AM General Hummer SUV 2000", 3: "Acura RL Sedan 2012", 4: "Acura TL Sedan 2012"}
    names[2] = "Acura Integra Type R 2001"
    old = {1: 0, 2: 3, 3: 1, 4: 2}
    lines = [(f"{names[y]}/{tens + old[y]:05}", y) for y in sorted(names) for tens in (20, 10, 30)]
    lines += [("Acura RL Sedan 2012/00077", 3), ("Acura RL Sedan 2012/00077_2", 1)]
    text = "".join(f"/data/cars196/images/{name}.jpg,{y}\n" for name, y in lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def test_the_lists_for_cars_are_matched_by_class_name_and_number_classes_by_name(tmp_path):
    noise = read_noise_list(cars_list(tmp_path / "CARS_0.1noised_train.csv"), cars())
    assert noise.true_class.tolist() == [0, 3, 1, 2]
    assert noise.wrong.tolist() == [False] * 13 + [True]  # the second 77 is that of cars_test
    noisy = with_noise(cars(), noise).train
    assert noisy.classes[noisy.labels[-1]] == "AM General Hummer SUV 2000"
    assert noisy.classes[1] == "Acura Integra Type R 2001" and noisy.labels[1].item() == 0


def test_the_older_form_of_cars_says_which_form_the_lists_name(tmp_path):
    file = cars_list(tmp_path / "CARS_0.1noised_train.csv")
    with pytest.raises(ValueError, match="14 of 14 training images of cars .* name the newer form, in cars_train and"):
        read_noise_list(file, cars("car_ims", number=6))


def test_a_list_for_sop_names_images_by_category_and_counts_as_the_data_set(tmp_path):
    names = [f"bicycle_final/{111085122871 + c}_{i}.JPG" for c in range(12) for i in range(2)]
    classes = [str(c) for c in range(1, 13)]
    train = ImageSet("sop/train", [i // 2 for i in range(24)], classes, paths=list(map(Path, names)))
    data = RetrievalData("sop", train, ImageSet("x", [0, 0], ["11319"], paths=[Path("a/0.JPG"), Path("a/1.JPG")]))
    labels = [i // 2 + 1 for i in range(24)]
    labels[3], labels[8] = 12, 7
    file = tmp_path / "SOP_0.1noised_train.csv"
    lines = (f"/data/Stanford_Online_Products/{n},{y}\n" for n, y in zip(names, labels))
    file.write_text("".join(lines), encoding="utf-8")
    noise = read_noise_list(file, data)
    assert noise.wrong.nonzero()[:, 0].tolist() == [3, 8] and noise.true_class.tolist() == list(range(12))


@pytest.mark.parametrize("rate", ["0.1", "0.2", "0.5"])
def test_the_published_lists_fit_the_classes_in_the_order_of_the_authors(rate):
    "The whole lists for Cars, if they are here: the order of the classes changes nothing about what is wrong."
    file = data_root() / "prism" / f"CARS_{rate}noised_train.csv"
    if not file.is_file():
        pytest.skip(f"{file} is not here: set DML_NB_DATA to the folder that holds prism")
    named = [line.rpartition(",") for line in file.read_text(encoding="utf-8").splitlines()]
    folders = sorted({Path(name).parent.name for name, _, _ in named})
    moved = [*folders[1::2], *folders[::2]]
    paths, true = [Path(name) for name, _, _ in named], [moved.index(Path(name).parent.name) for name, _, _ in named]
    data = RetrievalData("cars", ImageSet("cars/train", true, moved, paths=paths), cars().test)
    noise = read_noise_list(file, data)
    assert int(noise.wrong.sum()) == {"0.1": 863, "0.2": 1628, "0.5": 4021}[rate]
    assert [moved[c] for c in noise.true_class.tolist()] == folders
