"Readers of the published data sets: a small tree in the format of each, intact and damaged."

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from dml_nb.data import benchmarks
from dml_nb.data.benchmarks import BENCHMARKS, load_benchmark, read_cars, read_cub, read_inshop, read_sop


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(monkeypatch):
    "Accept the counts of a small tree in place of the published ones."

    def accept(name, folder):
        monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], counts=BENCHMARKS[name].read(folder).counts))

    return accept


def draw(file: Path, shade: int = 0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (shade % 256, 0, 0)).save(file)


def edit(file: Path, old: str, new: str):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def windows(file: Path):
    "Rewrite a list as a Windows editor does, with backslashes in its paths."
    text = file.read_text(encoding="utf-8").replace("/", "\\").replace("\n", "\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())


# CUB-200-2011

BIRDS = {1: "001.Black_footed_Albatross", 100: "100.Brown_Pelican", 101: "101.White_Pelican", 200: "200.Yellowthroat"}


@pytest.fixture
def cub(tmp_path) -> Path:
    "Two training and two test classes with two images each; the numbers of the images are not in order."
    folder = tmp_path / "CUB_200_2011"
    images = [(c, f"{name}/{name[4:]}_{i}.jpg") for c, name in BIRDS.items() for i in range(2)]
    for shade, (_, path) in enumerate(images):
        draw(folder / "images" / path, shade)
    numbered = list(enumerate(images, 1))[::-1]
    (folder / "images.txt").write_text("".join(f"{n} {path}\n" for n, (_, path) in numbered), encoding="utf-8")
    (folder / "image_class_labels.txt").write_text(
        "".join(f"{n} {c}\n" for n, (c, _) in numbered[::-1]), encoding="utf-8"
    )
    (folder / "images" / BIRDS[1] / "._Albatross_0.jpg").write_text("not an image", encoding="utf-8")
    return folder


def test_cub(cub, small):
    small("cub", cub)
    for root in (cub, cub.parent):
        data = load_benchmark("cub", root)
        assert data.train.classes == [BIRDS[1], BIRDS[100]] and data.test.classes == [BIRDS[101], BIRDS[200]]
        assert [p.name for p in data.train.paths][:2] == ["Brown_Pelican_1.jpg", "Brown_Pelican_0.jpg"]
        assert data.train.labels.tolist() == [1, 1, 0, 0]


def test_cub_lists_edited_on_windows_mean_the_same(cub):
    before = read_cub(cub)
    for name in ("images.txt", "image_class_labels.txt"):
        windows(cub / name)
    assert read_cub(cub) == before


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("images.txt", f"4 {BIRDS[100]}/Brown_Pelican_1.jpg", "4", r"images.txt, line 5: expected 'image_id path'"),
        ("images.txt", "4 ", "5 ", r"images.txt, line 5: image '5' stands in line 4 too"),
        ("images.txt", "Brown_Pelican_1", "Brown_Pelican_0", r"images.txt, line 6: file .* stands in line 5 too"),
        ("images.txt", "4 ", "44 ", r"images.txt, line 5: image 44 is not in image_class_labels.txt"),
        ("image_class_labels.txt", "8 200\n", "", r"images.txt, line 1: image 8 is not in image_class_labels.txt"),
        ("image_class_labels.txt", "4 100", "9 100", r"line \d: image \d is not in "),
        ("image_class_labels.txt", "4 100", "4 201", r"labels.txt, line 4: expected a class from 1 to 200, got '201'"),
        ("image_class_labels.txt", "4 100", "4 bird", r"line 4: expected a class from 1 to 200, got 'bird'"),
        ("image_class_labels.txt", "4 100", "3 1", r"labels.txt, line 4: image '3' stands in line 3 too"),
    ],
)  # fmt: skip
def test_damaged_cub_lists(cub, name, old, new, message):
    edit(cub / name, old, new)
    with pytest.raises(ValueError, match=message) as error:
        read_cub(cub)
    assert str(cub) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, message", [(b"", "names no image"), (b"\xff\xfe1\x00 \x00", "is not text in UTF-8")])
def test_a_list_that_is_none(cub, content, message):
    (cub / "images.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"images.txt {message}"):
        read_cub(cub)


def test_counts_name_expected_and_found(cub):
    with pytest.raises(ValueError, match="CUB has 4 training images in .*CUB_200_2011, expected 5,864: unpack"):
        load_benchmark("cub", cub)


def test_a_missing_image_is_named(cub, small):
    small("cub", cub)
    (cub / "images" / BIRDS[100] / "Brown_Pelican_1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 8 CUB images are missing .*: 100.Brown_Pelican/Brown"):
        load_benchmark("cub", cub)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_absent_data_set_says_how_to_get_it(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        load_benchmark(name, tmp_path / "nowhere")
    for part in (
        BENCHMARKS[name].lists[0][0],
        str(tmp_path / "nowhere" / BENCHMARKS[name].folder),
        f"dml_nb data {name}",
    ):
        assert part in str(error.value)


# Cars-196


def structs(fields: dict) -> np.ndarray:
    "A MATLAB struct array (1, N) as the authors saved it: fields in order, strings, and numbers of the smallest type."
    entries = np.empty((1, len(fields["class"])), [(name, object) for name in fields])
    for name, values in fields.items():
        for i, value in enumerate(values):
            entries[0, i][name] = value if isinstance(value, str) else np.array([[value]], np.uint8)
    return entries


def cells(values: list) -> np.ndarray:
    "A MATLAB cell array (1, N)."
    array = np.empty((1, len(values)), object)
    array[0, :] = values
    return array


CARS = [1, 1, 1, 98, 98, 99, 99, 196, 196, 196]
CAR_NAMES = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", *(f"Car {i} 2012" for i in range(3, 197))]


def boxes() -> dict:
    return {f"bbox_{side}": [1] * len(CARS) for side in ("x1", "y1", "x2", "y2")}


@pytest.fixture
def old_cars(tmp_path) -> Path:
    folder = tmp_path / "cars196"
    paths = [f"car_ims/{i:06}.jpg" for i in range(1, len(CARS) + 1)]
    for i, path in enumerate(paths):
        draw(folder / path, i)
    fields = dict(relative_im_path=paths, **boxes(), **{"class": CARS}, test=[i % 2 for i in range(len(CARS))])
    savemat(folder / "cars_annos.mat", dict(annotations=structs(fields), class_names=cells(CAR_NAMES)))
    return folder


@pytest.fixture
def new_cars(tmp_path) -> Path:
    "The newer form: every second image is in the folder for the test of the classification."
    folder = tmp_path / "new" / "cars196"
    (folder / "devkit").mkdir(parents=True)
    for part, classes in (("train", CARS[::2]), ("test", CARS[1::2])):
        names = [f"{i:05}.jpg" for i in range(1, len(classes) + 1)]
        for i, name in enumerate(names):
            draw(folder / f"cars_{part}" / name, i)
        fields = {k: v[: len(names)] for k, v in boxes().items()} | {"class": classes, "fname": names}
        file = "devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
        savemat(folder / file, dict(annotations=structs(fields)))
    savemat(folder / "devkit/cars_meta.mat", dict(class_names=cells(CAR_NAMES)))
    return folder


def test_cars_in_the_older_form(old_cars, small):
    small("cars", old_cars)
    data = load_benchmark("cars", old_cars)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1] and data.test.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.train.classes == [CAR_NAMES[0], CAR_NAMES[97]] and data.test.classes == [CAR_NAMES[98], CAR_NAMES[195]]
    assert [p.name for p in data.test.paths] == [f"{i:06}.jpg" for i in range(6, 11)]


def test_cars_in_the_newer_form(new_cars, small):
    small("cars", new_cars)
    data = load_benchmark("cars", new_cars)
    assert sorted(data.train.labels.tolist()) == [0, 0, 0, 1, 1] and len(data.test) == 5
    assert {p.parent.name for p in data.train.paths} == {"cars_train", "cars_test"}
    assert data.train.classes == [CAR_NAMES[0], CAR_NAMES[97]]
    assert read_cars(new_cars).classes[1] == "Ram C-V Cargo Van Minivan 2012"  # a folder can have this name
    (new_cars / "cars_test_annos_withlabels.mat").rename(new_cars / "devkit/cars_test_annos_withlabels.mat")
    assert load_benchmark("cars", new_cars).checksum == data.checksum
    (new_cars / "devkit/cars_meta.mat").unlink()
    assert load_benchmark("cars", new_cars).train.classes == ["1", "98"]


def test_the_list_without_classes_does_not_help(new_cars):
    (new_cars / "cars_test_annos_withlabels.mat").rename(new_cars / "devkit/cars_test_annos.mat")
    with pytest.raises(FileNotFoundError, match="cars_test_annos_withlabels.mat"):
        load_benchmark("cars", new_cars)


def test_damaged_cars_lists(old_cars):
    file = old_cars / "cars_annos.mat"
    for fields, message in (
        (
            {"relative_im_path": ["a.jpg", "b.jpg"], "class": [1, 197]},
            "entry 2: expected a class from 1 to 196, got 197",
        ),
        ({"relative_im_path": ["a.jpg", "a.jpg"], "class": [1, 2]}, "line 2: file 'a.jpg' stands in line 1 too"),
        ({"fname": ["a.jpg"], "class": [1]}, "holds no annotations with relative_im_path and class"),
    ):
        savemat(file, dict(annotations=structs(fields), class_names=cells(CAR_NAMES)))
        with pytest.raises(ValueError, match=f"cars_annos.mat.* {message}"):
            read_cars(old_cars)
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"<html>not found</html>"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="cars_annos.mat holds no annotations .*: get it again"):
            read_cars(old_cars)


# Stanford Online Products

SOP_HEADER = "image_id class_id super_class_id path\n"


@pytest.fixture
def sop(tmp_path) -> Path:
    folder, image = tmp_path / "Stanford_Online_Products", 0
    for part, classes in (("train", [1, 2]), ("test", [11319, 11320, 11321])):
        lines = []
        for c in classes:
            for i in range(2):
                image += 1
                lines.append(f"{image} {c} 1 bicycle_final/{111085122871 + c}_{i}.JPG\n")
                draw(folder / lines[-1].split()[3], image)
        (folder / f"Ebay_{part}.txt").write_text(SOP_HEADER + "".join(lines), encoding="utf-8")
    return folder


def test_sop(sop, small):
    small("sop", sop)
    data = load_benchmark("sop", sop.parent)
    assert data.train.classes == ["1", "2"] and data.test.classes == ["11319", "11320", "11321"]
    assert data.train.labels.tolist() == [0, 0, 1, 1] and len(data.test) == 6
    before = read_sop(sop)
    for part in ("train", "test"):
        windows(sop / f"Ebay_{part}.txt")
    assert read_sop(sop) == before


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("test", "5 11319", "5 2", r"Ebay_test.txt, line 2: class 2 stands in line 4 of Ebay_train.txt too"),
        (
            "test",
            "5 11319 1",
            "5 11319",
            r"Ebay_test.txt, line 2: expected 'image_id class_id super_class_id path', got",
        ),
        ("train", SOP_HEADER, "", r"Ebay_train.txt, line 1: expected 'image_id .*', got '1 1 1 bicycle"),
        ("train", "2 1 1", "1 1 1", r"Ebay_train.txt, line 3: image '1' stands in line 2 too"),
        ("train", "872_1.JPG", "872_0.JPG", r"Ebay_train.txt, line 3: file .*872_0.JPG' stands in line 2 too"),
        ("test", "5 11319", "5 22635", r"Ebay_test.txt, line 2: expected a class from 1 to 22,634, got '22635'"),
    ],
)
def test_damaged_sop_lists(sop, name, old, new, message):
    edit(sop / f"Ebay_{name}.txt", old, new)
    with pytest.raises(ValueError, match=message):
        read_sop(sop)


def test_one_image_in_both_lists(sop, small):
    edit(sop / "Ebay_test.txt", f"{111085122871 + 11319}_0.JPG", f"{111085122871 + 1}_0.JPG")
    small("sop", sop)
    with pytest.raises(ValueError, match="two lists of Stanford Online Products in .* name .*872_0.JPG"):
        load_benchmark("sop", sop)


# In-Shop

ITEMS = dict(
    id_00000002=["train"] * 3, id_00000007=["train"] * 2, id_00000001=["query", "gallery", "query"],
    id_00000080=["gallery", "gallery", "query"],
)  # fmt: skip


@pytest.fixture
def inshop(tmp_path) -> Path:
    folder, lines = tmp_path / "inshop", []
    for item, statuses in ITEMS.items():
        for i, status in enumerate(statuses):
            path = f"img/WOMEN/Dresses/{item}/{i:02}_1_front.jpg"
            draw(folder / path, len(lines))
            lines.append(f"{path:70} {item} {status}\n")
    header = f"{len(lines)}\nimage_name item_id evaluation_status\n"
    (folder / "list_eval_partition.txt").write_text(header + "".join(lines), encoding="utf-8")
    return folder


def test_inshop_has_queries_and_a_gallery(inshop, small):
    small("inshop", inshop)
    data = load_benchmark("inshop", inshop)
    assert data.train.classes == ["id_00000002", "id_00000007"] and data.test.classes == ["id_00000001", "id_00000080"]
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.is_query.tolist() == [True, False, True, False, False, True]
    images = {"training images": 5, "test images": 6, "queries": 3, "gallery images": 3}
    assert BENCHMARKS["inshop"].counts == images | {"training classes": 2, "test classes": 2}


def test_inshop_as_it_is_published(inshop, small):
    "Lists in Eval and images in Img, in a folder of any name; the list was edited on Windows."
    small("inshop", inshop)
    before, published = load_benchmark("inshop", inshop), inshop.parent / "In-shop Clothes Retrieval Benchmark"
    checksum = before.checksum
    for new, old in (("Eval/list_eval_partition.txt", "list_eval_partition.txt"), ("Img/img", "img")):
        (published / new).parent.mkdir(parents=True)
        (inshop / old).rename(published / new)
    windows(published / "Eval/list_eval_partition.txt")
    after = load_benchmark("inshop", published)
    assert after.checksum == checksum and torch.equal(after.test.is_query, before.test.is_query)


def test_unreadable_queries_can_be_left_out(inshop, small):
    small("inshop", inshop)
    (inshop / "img/WOMEN/Dresses/id_00000001/00_1_front.jpg").write_text("not an image", encoding="utf-8")
    with pytest.warns(UserWarning, match="They are left out"):
        data = load_benchmark("inshop", inshop, on_corrupt="skip")
    assert data.test.is_query.tolist() == [False, True, False, False, True]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("id_00000007 train", "id_00000007 gallery", "line 7: item id_00000007 is 'train' here and not for"),
        ("id_00000080 query", "id_00000080 train", "line 13: item id_00000080 is 'train' here and not for"),
        ("id_00000001 query", "id_00000001 test", "line 8: expected train, query or gallery, got 'test'"),
        ("id_00000001 query", "id_00000001", "line 8: expected 'image_name item_id evaluation_status', got"),
        ("00000002/01", "00000002/00", "line 4: file .* stands in line 3 too"),
        ("11\n", "12\n", "states '12' images in line 1 and names 11"),
        ("11\n", "", "line 2: expected 'image_name item_id evaluation_status', got 'img/WOMEN"),
    ],
)  # fmt: skip
def test_damaged_inshop_lists(inshop, old, new, message):
    edit(inshop / "list_eval_partition.txt", old, new)
    with pytest.raises(ValueError, match=f"list_eval_partition.txt,? {message}"):
        read_inshop(inshop)


def test_the_high_resolution_images_are_not_those_of_the_papers(inshop, small):
    small("inshop", inshop)
    (inshop / "img").rename(inshop / "img_highres")
    with pytest.raises(FileNotFoundError, match="papers do not use img_highres: unpack img.zip"):
        load_benchmark("inshop", inshop)


def test_a_query_without_a_gallery_image_of_its_class(inshop, small):
    edit(inshop / "list_eval_partition.txt", "id_00000001 gallery", "id_00000001 query")
    small("inshop", inshop)
    with pytest.raises(ValueError, match="1 classes of inshop have queries but no gallery image, such as id_00000001"):
        load_benchmark("inshop", inshop)


def test_a_list_of_the_size_of_sop_is_read_in_seconds(tmp_path):
    for part, first in (("train", 1), ("test", 11_319)):
        rows = (f"{i} {first + i % 11_316} 1 lamp_final/{first}_{i}.JPG\n" for i in range(60_000))
        (tmp_path / f"Ebay_{part}.txt").write_text(SOP_HEADER + "".join(rows), encoding="utf-8")
    started = time.perf_counter()
    assert len(benchmarks.read_sop(tmp_path).files) == 120_000
    assert time.perf_counter() - started < 20
