"Decoded images in a memory-mapped file and on the device: the same samples, written once, completely or not at all."

import errno
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from dml_nb.data import pixel_store
from dml_nb.data.folders import load_folder
from dml_nb.data.loaders import set_epoch
from dml_nb.data.pixel_store import DeviceImages, StoredImages, resize_matrix, store_pixels
from dml_nb.models.input_spec import CAFFE, IMAGENET, InputSpec
from dml_nb.training.batches import image_dls

GREY = InputSpec(mean=(0.5,), std=(0.5,), channels=1, resize=48, crop=40)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    "Images of many sizes in six classes: large and small, tall and wide, grey, turned by EXIF."
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(24):
        size = [(90, 61), (50, 200), (33, 30), (120, 120)][i % 4]
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        image = Image.fromarray(pixels).resize((2 * size[1], 2 * size[0]))
        exif = Image.Exif()
        exif[0x112] = 6 if i % 5 == 0 else 1
        folder = tmp_path / "photos é" / f"class {i // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (image.convert("L") if i % 7 == 0 else image).save(folder / f"{i}.jpg", exif=exif)
    return load_folder(tmp_path / "photos é")


@pytest.mark.parametrize("spec", [IMAGENET.resized(56), CAFFE.resized(40), GREY], ids=["rgb", "bgr", "grey"])
@pytest.mark.parametrize("options", [dict(), dict(train_crop="resize"), dict(resize_first=True)], ids=str)
def test_all_storages_give_the_same_samples(photos, spec, options):
    make = partial(image_dls, photos, spec, batch_size=6, seed=1, per_class=2, **options)
    files, memory_map, device = (make(storage=storage) for storage in ("files", "memory_map", "device"))
    for epoch in (0, 3):
        for dls in (files, memory_map, device):
            set_epoch(dls.train, epoch)
        for (x, y), (same, labels), (near, also) in zip(files.train, memory_map.train, device.train, strict=True):
            assert torch.equal(x, same) and torch.equal(y, labels) and torch.equal(y, also)
            assert (x - near).abs().max() < 3 * (spec.scale / 255) / min(spec.std)
    for x, same, near in zip(files.valid, memory_map.valid, device.valid, strict=True):
        assert torch.equal(x[0], same[0])
        assert (x[0] - near[0]).abs().max() < 3 * (spec.scale / 255) / min(spec.std)
    assert files.test_plain.checksum == memory_map.test_plain.checksum == device.test_plain.checksum


def test_worker_processes_give_the_same_samples(photos):
    for storage in ("memory_map", "device"):
        alone, shared = (image_dls(photos, IMAGENET.resized(40), 6, workers=w, storage=storage).train for w in (0, 2))
        for (x, y), (again, labels) in zip(alone, shared, strict=True):
            assert torch.equal(x, again) and torch.equal(y, labels)


def test_a_worker_that_is_spawned_does_not_receive_the_pixels(photos):
    import pickle

    stored = StoredImages(photos.train)
    for images in (stored, DeviceImages(stored, GREY)):
        content = pickle.dumps(images)
        assert len(content) < stored.file.stat().st_size / 10
        assert pickle.loads(content).image(3).tobytes() == photos.train.image(3).tobytes()


def test_train_and_plain_images_share_the_memory_of_the_device(photos):
    dls = image_dls(photos, IMAGENET.resized(40), 6, storage="device")
    next(iter(dls.train))
    assert dls.train.dataset.dataset.on_device is dls.train_plain.on_device and dls.train_plain.on_device


SCRIPT = """
import sys, time
from dml_nb.data import pixel_store
from dml_nb.data.folders import load_folder
pixel_store.BLOCK = 2
images = load_folder(sys.argv[1]).train
if len(sys.argv) > 2:
    image, images.image = images.image, lambda i: (time.sleep(0.2), image(i))[1]
    print("begins", flush=True)
print(pixel_store.store_pixels(images).name)
"""


def command(photos, *args):
    return [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        SCRIPT,
        os.path.commonpath(photos.test.paths + photos.train.paths),
        *args,
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_store_that_was_killed_continues(photos, monkeypatch):
    folder = pixel_store._store_folder(photos.train, None)
    process = subprocess.Popen(command(photos, "slowly"), stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout.readline() == "begins\n"
    while not (folder / "index").exists() or (folder / "index").stat().st_size < 3 * pixel_store.INDEX.itemsize:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = (folder / "index").stat().st_size // pixel_store.INDEX.itemsize
    assert 3 <= done < len(photos.train) and not (folder / "complete").exists()
    with open(folder / "pixels", "ab") as file:
        file.write(b"half an image")
    decoded, image = [], photos.train.image
    monkeypatch.setattr(photos.train, "image", lambda i: decoded.append(i) or image(i), raising=False)
    stored = StoredImages(photos.train)
    assert sorted(decoded) == list(range(done, len(photos.train)))
    for i in range(len(photos.train)):
        assert stored.image(i).tobytes() == image(i).tobytes()


def test_two_processes_make_one_store(photos):
    both = [
        subprocess.Popen(command(photos), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        for _ in "ab"
    ]
    answers = [process.communicate(timeout=300) for process in both]
    assert answers[0][0] == answers[1][0] != "", answers
    folder = store_pixels(photos.train)
    assert [f.name for f in folder.parent.iterdir()] == [answers[0][0].strip()]
    assert (folder / "pixels").stat().st_size == sum(
        3 * np.prod(photos.train.image(i).size) for i in range(len(photos.train))
    )


def test_other_files_another_order_or_size_never_find_a_wrong_store(photos):
    train, other = photos.train, photos.train.with_transform(None)
    other.paths = train.paths[::-1]
    assert StoredImages(other).image(0).tobytes() == train.image(len(train) - 1).tobytes()
    assert StoredImages(train, 20).image(0).size != StoredImages(train).image(0).size
    before = StoredImages(train).image(0).tobytes()
    Image.new("RGB", (50, 50)).save(train.paths[0])
    assert StoredImages(train).image(0).tobytes() == Image.open(train.paths[0]).tobytes() != before


def test_a_damaged_store_is_found_before_it_is_complete(photos):
    folder = store_pixels(photos.train)
    (folder / "complete").unlink()
    whole = (folder / "pixels").read_bytes()
    (folder / "pixels").write_bytes(whole[:100] + b"xyz" + whole[103:])
    assert (store_pixels(photos.train) / "pixels").read_bytes() == whole


def test_a_full_disk_leaves_nothing(photos, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pixel_store.zlib, "crc32", full)
    with pytest.raises(OSError, match="do not fit into .*free some space, set DML_NB_CACHE"):
        store_pixels(photos.train)
    assert not list((pixel_store.cache_root() / "pixels").iterdir())


def test_an_image_that_cannot_be_read_is_named_and_the_others_stay(photos):
    path = photos.train.paths[5]
    whole = open(path, "rb").read()
    open(path, "wb").write(b"no image")
    with pytest.raises(OSError, match="5.jpg"):
        store_pixels(photos.train)
    open(path, "wb").write(whole)
    assert StoredImages(photos.train).image(5).tobytes() == photos.train.image(5).tobytes()


@pytest.mark.parametrize("length, resized", [(300, 40), (41, 40), (40, 40), (13, 40), (1, 40), (2000, 7)])
def test_the_matrix_is_the_filter_of_pillow(length, resized):
    pixels = np.random.default_rng(length).integers(0, 256, (length, 5), np.uint8)
    matrix = resize_matrix(*torch.tensor([[length], [resized], [0]]), resized, length + 3)[0, :, :length]
    pillow = np.asarray(Image.fromarray(pixels).resize((5, resized), Image.BILINEAR)).astype(float)
    assert np.abs(matrix.numpy() @ pixels - pillow).max() < 1.01
    part = resize_matrix(*torch.tensor([[length], [resized], [3]]), 2, length)[0]
    assert torch.equal(part, resize_matrix(*torch.tensor([[length], [resized], [0]]), resized, length)[0, 3:5])


def test_a_picture_of_extreme_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "cache"))
    for name, size in (("a", (4000, 20)), ("b", (20, 4000)), ("c", (20000, 24)), ("d", (30, 30))):
        (tmp_path / "p" / name).mkdir(parents=True)
        for i in range(2):
            Image.effect_noise(size, 60).save(tmp_path / "p" / name / f"{i}.png")
    data = load_folder(tmp_path / "p")
    spec = IMAGENET.resized(32)
    files, device = (image_dls(data, spec, 4, storage=storage, resize_first=True) for storage in ("files", "device"))
    for (x, _), (near, _) in zip(files.train, device.train, strict=True):
        assert (x - near).abs().max() < 3 / 255 / min(spec.std)
