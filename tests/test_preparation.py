"Data sets prepared from a local server, and verified in place."

import errno
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from PIL import Image
from test_benchmarks import CAR_NAMES, cells, cub, inshop, new_cars, structs  # noqa: F401

from dml_nb.data import list_datasets, load_dataset, preparation
from dml_nb.data.benchmarks import BENCHMARKS, read_cub
from dml_nb.data.downloads import file_fault
from dml_nb.data.preparation import PUBLIC_DATA, Archive, prepare


class Handler(SimpleHTTPRequestHandler):
    "Serves a folder; the first answers break off after as many bytes as `server.cuts` says."

    def do_GET(self):
        self.server.asked.append(self.path)
        time.sleep(self.server.delay)
        super().do_GET()

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: self.server.cuts.pop(0)] if self.server.cuts else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, serve):
    httpd = serve(partial(Handler, directory=tmp_path / "web"))
    httpd.folder = tmp_path / "web"
    httpd.folder.mkdir()
    httpd.asked, httpd.cuts, httpd.delay = [], [], 0
    return httpd


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DML_NB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("dml_nb.data.downloads.PAUSE", 0.001)


def tar(folder: Path, file: Path, extra: dict | None = None) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder, folder.name)
        for name, content in (extra or {}).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def sha256(file: Path) -> str:
    import hashlib

    return "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def public_cub(cub, server, monkeypatch):  # noqa: F811
    "A small CUB on the local server in place of the published one; returns its description."
    file = tar(cub, server.folder / "CUB_200_2011.tgz", {"attributes.txt": b"beside the folder"})
    archive = Archive((f"{server.url}/{file.name}",), file.stat().st_size, sha256(file), "CUB_200_2011")
    monkeypatch.setitem(PUBLIC_DATA, "cub", replace(PUBLIC_DATA["cub"], archives=(archive,)))
    monkeypatch.setitem(BENCHMARKS, "cub", replace(BENCHMARKS["cub"], counts=read_cub(cub).counts))
    shutil.rmtree(cub)
    return archive


def left_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_a_data_set_is_downloaded_once_and_verified(public_cub, server, tmp_path, capsys):
    first = prepare("cub", progress=False)
    assert first["train images"] == first["test images"] == 4 and first["test classes"] == 2
    assert "non-commercial research" in capsys.readouterr().out
    files = left_in(tmp_path / "data")
    assert "CUB_200_2011/manifest.json" in files and not [f for f in files if "._" in f or "downloads" in f]
    assert prepare("cub", progress=False) == first and len(server.asked) == 1
    assert load_dataset("cub").checksum == first["content"]


def test_a_broken_connection_does_not_matter(public_cub, server):
    server.cuts = [100, 200]
    assert prepare("cub", progress=False)["train images"] == 4
    assert len(server.asked) == 3


def test_the_second_address_is_used_if_the_first_does_not_answer(public_cub, server, monkeypatch):
    two = replace(public_cub, urls=(f"{server.url}/gone/CUB_200_2011.tgz", *public_cub.urls))
    monkeypatch.setitem(PUBLIC_DATA, "cub", replace(PUBLIC_DATA["cub"], archives=(two,)))
    assert prepare("cub", progress=False)["train images"] == 4
    none = replace(public_cub, urls=(f"{server.url}/gone.tgz",))
    shutil.rmtree(preparation.data_root())
    monkeypatch.setitem(PUBLIC_DATA, "cub", replace(PUBLIC_DATA["cub"], archives=(none,)))
    with pytest.raises(ConnectionError, match="answers 404 .* save it as .*/downloads/gone.tgz"):
        prepare("cub", progress=False)


def test_an_archive_put_there_by_hand_needs_no_network(public_cub, server, tmp_path):
    (tmp_path / "data/downloads").mkdir(parents=True)
    shutil.copy(server.folder / "CUB_200_2011.tgz", tmp_path / "data/downloads")
    assert prepare("cub", progress=False)["train images"] == 4 and server.asked == []


def test_a_damaged_archive_leaves_nothing(public_cub, server, tmp_path):
    file = server.folder / "CUB_200_2011.tgz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="the download of .* is damaged"):
        prepare("cub", progress=False)
    assert left_in(tmp_path / "data") == []


def test_wrong_counts_leave_no_data_set(public_cub, server, tmp_path, monkeypatch):
    counts = BENCHMARKS["cub"].counts
    monkeypatch.setitem(BENCHMARKS, "cub", replace(BENCHMARKS["cub"], counts=counts | {"test images": 5}))
    with pytest.raises(ValueError, match="CUB has 4 test images in .*, expected 5"):
        prepare("cub", progress=False)
    assert left_in(tmp_path / "data") == ["downloads/CUB_200_2011.tgz"]


def test_an_archive_without_the_folder(public_cub, tmp_path, monkeypatch):
    other = replace(public_cub, inside="birds")
    monkeypatch.setitem(PUBLIC_DATA, "cub", replace(PUBLIC_DATA["cub"], archives=(other,)))
    with pytest.raises(ValueError, match="CUB_200_2011.tgz holds no folder birds"):
        prepare("cub", progress=False)
    assert not (tmp_path / "data/CUB_200_2011").exists()


def test_what_a_killed_process_left_is_removed(public_cub, tmp_path):
    left = tmp_path / "data/.CUB_200_2011.x1y2/data"
    left.mkdir(parents=True)
    (left / "images.txt").write_text("half", encoding="utf-8")
    prepare("cub", progress=False)
    assert not left.parent.exists()


def test_a_changed_image_is_noticed(public_cub, tmp_path):
    prepare("cub", progress=False)
    image = next((tmp_path / "data/CUB_200_2011/images").rglob("*.jpg"))
    Image.new("RGB", (6, 6), "white").save(image)
    with pytest.raises(ValueError, match="is not as it was prepared: content changed from .* to .*Delete the folder"):
        prepare("cub", progress=False)


def test_an_incomplete_folder_is_named(public_cub, tmp_path):
    (tmp_path / "data/CUB_200_2011").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="CUB_200_2011 is incomplete: delete it, then it is downloaded"):
        prepare("cub", progress=False)


def test_a_data_root_that_cannot_be_written(public_cub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("DML_NB_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(OSError, match="cannot write to .* set DML_NB_DATA to a folder that you can write"):
        prepare("cub", progress=False)


def test_a_full_disk_leaves_no_data_set(public_cub, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("dml_nb.data.archives.shutil.copyfileobj", full)
        with pytest.raises(OSError, match="CUB_200_2011.tgz cannot be unpacked .*No space left"):
            prepare("cub", progress=False)
    assert left_in(tmp_path / "data") == ["downloads/CUB_200_2011.tgz"]
    assert prepare("cub", progress=False)["train images"] == 4


def test_spaces_and_other_letters_in_the_data_root(public_cub, tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_DATA", str(tmp_path / "Daten für alle"))
    manifest = prepare("cub", progress=False)
    assert manifest["manifest"] == str(tmp_path / "Daten für alle/CUB_200_2011/manifest.json")
    assert prepare("cub", progress=False) == manifest


@pytest.mark.parametrize("inner", [True, False], ids=["the folder itself", "the folder that holds it"])
def test_a_copy_is_verified_in_place_and_not_changed(public_cub, cub_copy, tmp_path, inner):
    before = left_in(tmp_path)
    manifest = prepare("cub", root=cub_copy if inner else cub_copy.parent)
    assert manifest["folder"] == str(cub_copy) and manifest["test images"] == 4
    assert [f for f in left_in(tmp_path) if not f.startswith("cache/")] == before


@pytest.fixture
def cub_copy(public_cub, server, tmp_path) -> Path:
    with tarfile.open(server.folder / "CUB_200_2011.tgz") as archive:
        archive.extractall(tmp_path / "mine", filter="data")
    return tmp_path / "mine/CUB_200_2011"


def test_the_hashes_tell_other_files_from_other_pixels(public_cub, cub_copy):
    first = prepare("cub", root=cub_copy)
    image = sorted((cub_copy / "images").rglob("*.jpg"))[1]
    Image.new("RGB", (3, 3), "white").save(image)
    scaled = prepare("cub", root=cub_copy)
    assert scaled["list"] == first["list"] and scaled["content"] != first["content"]
    image.rename(image.with_name("other.jpg"))
    text = (cub_copy / "images.txt").read_text(encoding="utf-8")
    (cub_copy / "images.txt").write_text(text.replace(image.name, "other.jpg"), encoding="utf-8")
    assert prepare("cub", root=cub_copy)["list"] != first["list"]


def test_inshop_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        prepare("inshop")
    named = "InShopRetrieval.html", "request form", "Do not take img_highres.zip", str(tmp_path / "data/inshop")
    for part in (*named, "\n  list_eval_partition.txt\n  img/MEN/Denim/"):
        assert part in str(error.value)
    assert not (tmp_path / "data").exists()


def test_inshop_in_place_counts_queries_and_gallery(inshop, monkeypatch):  # noqa: F811
    counts = BENCHMARKS["inshop"].read(inshop).counts
    monkeypatch.setitem(BENCHMARKS, "inshop", replace(BENCHMARKS["inshop"], counts=counts))
    manifest = prepare("inshop", root=inshop)
    assert (manifest["queries"], manifest["gallery images"], manifest["test images"]) == (3, 3, 6)


def test_cars_is_put_together_from_three_files(new_cars, server, monkeypatch, tmp_path):  # noqa: F811
    counts, devkit = BENCHMARKS["cars"].read(new_cars).counts, new_cars / "devkit"
    tar(devkit, server.folder / "car_devkit.tgz")
    (new_cars / "cars_test_annos_withlabels.mat").rename(server.folder / "cars_test_annos_withlabels.mat")
    shutil.rmtree(devkit)
    tar(new_cars.rename(new_cars.with_name("stanford-cars")), server.folder / "stanford-cars.tgz")
    archives = tuple(
        replace(
            archive, urls=(f"{server.url}/{archive.name}",), size=None, checksum=sha256(server.folder / archive.name)
        )
        for archive in PUBLIC_DATA["cars"].archives
    )
    monkeypatch.setitem(PUBLIC_DATA, "cars", replace(PUBLIC_DATA["cars"], archives=archives))
    monkeypatch.setitem(BENCHMARKS, "cars", replace(BENCHMARKS["cars"], counts=counts))
    assert prepare("cars", progress=False)["train images"] == 5
    assert json.loads((tmp_path / "data/cars196/manifest.json").read_text(encoding="utf-8"))["test classes"] == 2


def test_data_sets_of_the_package_and_ones_own(glyph_folder):
    assert prepare("glyphs")["folder"] == ""
    manifest = prepare(glyph_folder)
    assert manifest["content"] == load_dataset(glyph_folder).checksum and manifest["folder"] == str(glyph_folder)
    assert manifest["terms"] == manifest["manifest"] == "" and "DejaVu" in prepare("glyphs")["terms"]


def test_ones_own_data_with_the_name_of_a_public_data_set_have_not_its_terms(glyph_folder, tmp_path):
    manifest = prepare(shutil.copytree(glyph_folder, tmp_path / "cub"))
    assert (manifest["name"], manifest["terms"], manifest["please cite"]) == ("cub", "", "")


@pytest.mark.parametrize("name", ["glyphs", "groceries-mini", "folder"])
def test_a_root_belongs_to_a_named_data_set_outside_the_package(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"{name}' has no root, .*: leave out root"):
        prepare(tmp_path / name if name == "folder" else name, root=tmp_path)


def test_a_list_with_relative_and_absolute_paths(glyph_folder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(glyph_folder, tmp_path / "mine/letters"))
    images = sorted(folder.glob("[a-d]/*.png"))
    paths = [image.relative_to(tmp_path / "mine") if i % 2 else image for i, image in enumerate(images)]
    lines = ["path,label", *(f"{path},{path.parent.name}" for path in paths)]
    (tmp_path / "mine/own.csv").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "mine")
    manifest = prepare("own.csv")
    assert (manifest["train images"], manifest["folder"]) == (24, str(folder))
    assert manifest["list"] == prepare(tmp_path / "mine/own.csv")["list"]


def test_a_copy_that_holds_a_manifest_is_compared_with_it(public_cub, tmp_path):
    folder = Path(prepare("cub", progress=False)["folder"])
    assert prepare("cub", root=folder)["manifest"] == str(folder / "manifest.json")
    Image.new("RGB", (6, 6), "white").save(next((folder / "images").rglob("*.jpg")))
    with pytest.raises(ValueError, match="is not as it was prepared: content changed"):
        prepare("cub", root=folder)


def test_addresses_and_sizes_are_those_of_fastai():
    import fastai.data
    from fastai.data.external import URLs
    from fastdownload import checks_module, read_checks

    known = read_checks(checks_module(fastai.data))
    cub, cars = PUBLIC_DATA["cub"].archives[0], PUBLIC_DATA["cars"].archives[2]  # noqa: F811
    assert URLs.CUB_200_2011 in cub.urls and known[URLs.CUB_200_2011][0] == cub.size
    assert URLs.CARS in cars.urls
    assert known[URLs.CARS] == (cars.size, cars.checksum.removeprefix("md5-of-first-MiB:"))


def test_every_description_is_complete(tmp_path):
    assert PUBLIC_DATA.keys() == set(list_datasets())
    (tmp_path / "a").write_bytes(b"a")
    for name, public in PUBLIC_DATA.items():
        assert public.terms and (public.citation or name == "glyphs")
        if name in BENCHMARKS:
            assert public.tree and (public.archives or public.steps)
        for archive in public.archives:
            assert all(url.startswith("http") and url.endswith(archive.name) for url in archive.urls)
            assert "expected" in file_fault(tmp_path / "a", None, archive.checksum)


def _in_process(archive, counts, results):
    PUBLIC_DATA["cub"] = replace(PUBLIC_DATA["cub"], archives=(archive,))
    BENCHMARKS["cub"] = replace(BENCHMARKS["cub"], counts=counts)
    results.put(prepare("cub", progress=False))


def test_two_processes_prepare_one_data_set_once(public_cub, server, tmp_path):
    server.delay = 1.0
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (public_cub, BENCHMARKS["cub"].counts, results)
    processes = [context.Process(target=_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = results.get(timeout=120), results.get(timeout=120)
    for process in processes:
        process.join()
    assert first == second and len(server.asked) == 1
    assert not list((tmp_path / "data").glob(".CUB*"))
