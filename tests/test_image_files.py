"Image files as people have them: all modes of Pillow, 16 bits and floats, transparency, EXIF orientation, animations."

import io
import os
import zlib

import numpy as np
import pytest
from PIL import Image

from dml_nb.core.files import cache_root, content_hashes, once_per_file
from dml_nb.data.folders import load_folder
from dml_nb.data.image_files import decoding_errors, open_image, to_rgb
from dml_nb.data.image_sets import ImageSet, RetrievalData, same_checksum
from dml_nb.models import create_embedder
from dml_nb.models.features import cached_features, images_hash
from dml_nb.models.input_spec import image_transform


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "cache"))


RAMP = np.arange(256, dtype=np.uint8)[None].repeat(8, 0)
PHOTO = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)


def saved(folder, name, image, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def grey_of(path):
    return np.asarray(open_image(path))[..., 0]


# more than eight bits

SIXTEEN = RAMP.astype(np.uint16) * 257


@pytest.mark.parametrize(
    "values, suffix",
    [(SIXTEEN, suffix) for suffix in (".png", ".tif", ".ppm", ".jp2")]
    + [(values, ".tif") for values in (SIXTEEN.astype(">u2"), SIXTEEN.astype(np.int32), np.float32(RAMP) / 255)]
    + [(np.float32(RAMP) / 255, ".pfm")],
    ids="png tif ppm jp2 big-endian integers floats pfm".split(),
)
def test_a_ramp_of_more_than_eight_bits_stays_a_ramp(tmp_path, values, suffix):
    np.testing.assert_array_equal(grey_of(saved(tmp_path, f"ramp{suffix}", values)), RAMP)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_values_of_a_camera_with_fewer_than_16_bits_are_not_black(tmp_path, bits):
    values = np.round(RAMP / 255 * (2**bits - 1)).astype(np.uint16)
    np.testing.assert_array_equal(grey_of(saved(tmp_path, "camera.png", values)), RAMP)


def test_an_evenly_grey_16_bit_image_keeps_its_grey(tmp_path):
    assert set(grey_of(saved(tmp_path, "grey.png", np.full((4, 4), 128 * 257, np.uint16))).flat) == {128}


@pytest.mark.parametrize(
    "values, shown",
    [
        (np.float32([[0, 255]]), "from 0 to 255"),
        (np.float32([[-1, 1]]), "from -1 to 1"),
        (np.float32([[0, np.nan]]), "nan"),
        (np.float32([[0, np.inf]]), "inf"),
        (np.int32([[0, 70_000]]), "from 0 to 70000"),
        (np.int32([[-5, 5]]), "from -5 to 5"),
    ],
)
def test_values_without_a_known_range_are_refused_by_name(tmp_path, values, shown):
    for c in "abcd":
        for i in range(2):
            saved(tmp_path, f"d/{c}/{i}.png", PHOTO)
    saved(tmp_path, "d/a/odd.tif", values)
    with pytest.raises(
        ValueError, match=r"1 of 9 files .* cannot be read: a/odd.tif \(its values go .*floats from 0 to 1"
    ) as e:
        load_folder(tmp_path / "d")
    assert shown in str(e.value)


def test_float_images_in_memory_are_refused():
    with pytest.raises(TypeError, match="must be uint8 values from 0 to 255, got float32"):
        ImageSet("mine", [0], ["a"], array=np.zeros((1, 8, 8), np.float32))


def test_colour_images_in_memory_keep_their_colours():
    np.testing.assert_array_equal(ImageSet("mine", [0], ["a"], array=PHOTO[None]).image(0), PHOTO)


# transparency and other modes

ALPHA = np.zeros((8, 12), np.uint8)
ALPHA[:, 6:] = 255


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".avif", ".tga"])
def test_transparent_pixels_are_white(tmp_path, suffix):
    rgba = Image.fromarray(np.dstack([np.zeros_like(PHOTO), ALPHA]))
    options = dict(lossless=True, exact=True) if suffix == ".webp" else dict(quality=100) if suffix == ".avif" else {}
    pixels = np.asarray(open_image(saved(tmp_path, f"x{suffix}", rgba, **options)))
    assert pixels[:, :5].min() >= 250 and pixels[:, 7:].max() <= 5


def test_half_transparent_pixels_are_mixed_with_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


def test_opaque_pixels_keep_their_values():
    opaque = Image.fromarray(np.dstack([PHOTO, np.full((8, 12), 255, np.uint8)]))
    np.testing.assert_array_equal(to_rgb(opaque), PHOTO)


@pytest.mark.parametrize("mode, clear", [("L", 0), ("1", 0), ("RGB", (0, 0, 0)), ("P", 0), ("I;16", 0)])
def test_a_colour_that_is_declared_transparent_is_white(tmp_path, mode, clear):
    image = Image.new("L", (4, 4), 0)
    image.putpixel((0, 0), 255)
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 200) if mode == "I;16" else image.convert(mode)
    pixels = open_image(saved(tmp_path, "x.png", image, transparency=clear))
    assert pixels.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["LA", "PA", "La", "RGBa"])
def test_alpha_of_every_mode_counts(mode):
    image = Image.fromarray(np.dstack([np.zeros_like(PHOTO), ALPHA]))
    if mode == "PA":
        image = image.convert("P")
        image.putalpha(Image.fromarray(ALPHA))
    image = image.convert("RGBA" if mode == "RGBa" else "LA").convert(mode) if mode != "PA" else image
    assert image.mode == mode
    pixels = np.asarray(to_rgb(image))
    assert pixels.shape == (8, 12, 3) and pixels[:, :6].min() == 255 and pixels[:, 6:].max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    image = Image.fromarray(PHOTO)
    image = image.convert("L").convert(mode) if mode in ("I", "I;16", "1") else image.convert(mode)
    image = Image.fromarray(np.float32(image) / 255) if mode == "F" else image
    pixels = to_rgb(image)
    assert pixels.mode == "RGB" and pixels.size == (12, 8)
    if mode in ("RGB", "RGBX", "CMYK", "YCbCr"):
        assert np.abs(np.int16(pixels) - PHOTO).max() <= 4
    if mode in ("L", "I", "I;16", "F"):
        np.testing.assert_allclose(np.asarray(pixels)[..., 0], Image.fromarray(PHOTO).convert("L"), atol=1)


def test_a_printers_cmyk_jpeg_is_not_a_negative(tmp_path):
    path = saved(tmp_path, "x.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 0)))
    assert min(open_image(path).getpixel((4, 4))) > 250


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif", ".avif"])
def test_of_an_animation_or_several_pages_the_first_picture_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    path = saved(tmp_path, f"x{suffix}", frames[0], save_all=True, append_images=frames[1:])
    red, green, blue = open_image(path).getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


# orientation

TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_a_picture_of_a_phone_is_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x112] = orientation
    options = dict(lossless=True) if suffix == ".webp" else {}
    path = saved(tmp_path, f"x{suffix}", PHOTO, exif=exif, **options)
    np.testing.assert_array_equal(open_image(path), TURNS[orientation](PHOTO))


@pytest.mark.parametrize("suffix", [".jpg", ".avif", ".mpo"])
def test_a_lying_picture_is_turned_once(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x112] = 6
    assert open_image(saved(tmp_path, f"x{suffix}", Image.new("RGB", (60, 40)), exif=exif)).size == (40, 60)


def test_a_16_bit_picture_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    np.testing.assert_array_equal(grey_of(saved(tmp_path, "x.png", SIXTEEN, exif=exif)), np.rot90(RAMP, -1))


def test_damaged_exif_data_do_not_stop_the_picture(tmp_path):
    path = saved(tmp_path, "x.jpg", PHOTO, exif=b"Exif\x00\x00nonsense", quality=100)
    assert open_image(path).size == (12, 8)


# damaged files


def test_what_training_could_not_open_is_found_when_the_data_are_loaded(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(PHOTO.repeat(20, 0).repeat(20, 1)).save(buffer, "JPEG")
    whole, bad = buffer.getvalue(), [tmp_path / name for name in ("cut.jpg", "empty.jpg", "text.png", "absent.png")]
    bad[0].write_bytes(whole[: len(whole) // 2])
    bad[1].touch()
    bad[2].write_text("hello", encoding="utf-8")
    good = saved(tmp_path, "good.png", PHOTO)
    assert list(decoding_errors([*bad, good])) == [0, 1, 2, 3]
    assert not any(str(tmp_path) in reason for reason in decoding_errors(bad).values())


@pytest.mark.parametrize("size", [(20_000, 50), (50, 20_000)])
@pytest.mark.parametrize("train", [True, False])
def test_a_picture_of_20000_pixels_is_read_and_cut_to_size(tmp_path, size, train):
    path = saved(tmp_path, "panorama.png", Image.new("RGB", size, "red"))
    assert decoding_errors([path]) == {}
    spec = create_embedder("efficientnet_lite0", 16, pretrained=False).spec
    assert image_transform(spec, train=train)(open_image(path)).shape == (3, spec.crop, spec.crop)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert "cannot identify image file" in decoding_errors([tmp_path / "empty.jpg"])[0]


def test_a_picture_that_promises_billions_of_pixels_is_refused(tmp_path):
    def chunk(name, content):
        numbers = np.array([len(content), zlib.crc32(name + content)], ">u4")
        return numbers[:1].tobytes() + name + content + numbers[1:].tobytes()

    size = np.array([50_000, 50_000], ">u4").tobytes()
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x00\x00\x00\x00") + chunk(b"IDAT", zlib.compress(b""))
    )
    assert "decompression bomb" in decoding_errors([path])[0]


# known by content


def folder_of(top, seed):
    "Four classes of two uncompressed pictures, which all have the same size."
    random = np.random.default_rng(seed)
    for c in "abcd":
        for i in range(2):
            saved(top, f"{c}/{i}.bmp", random.integers(0, 256, (32, 32, 3), np.uint8))
    return top


def test_equal_names_and_sizes_but_other_pixels_are_other_data(tmp_path):
    a, b, copied = (
        folder_of(tmp_path / "a/birds", 0),
        folder_of(tmp_path / "b/birds", 1),
        folder_of(tmp_path / "c/x", 0),
    )
    one, other, same = map(load_folder, (a, b, copied))
    assert one.checksum != other.checksum and images_hash(one.train) != images_hash(other.train)
    assert one.checksum == same.checksum and images_hash(one.train) == images_hash(same.train)
    options = dict(allow_random=True, workers=0)
    first, second = (cached_features("small_cnn", data.train, **options) for data in (one, other))
    assert not second.equal(first)
    assert second.equal(cached_features("small_cnn", other.train, cache=tmp_path / "new", **options))


@pytest.mark.parametrize("keep_time", [False, True], ids=["new time", "old time"])
@pytest.mark.parametrize("way", ["written over", "renamed"])
def test_a_replaced_picture_is_noticed(tmp_path, way, keep_time):
    data = load_folder(folder_of(tmp_path / "birds", 0))
    before, features = data.checksum, cached_features("small_cnn", data.train, allow_random=True, workers=0)
    path = data.train.paths[1]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    new = saved(tmp_path, "new.bmp", np.full((32, 32, 3), 77, np.uint8))
    assert new.stat().st_size == path.stat().st_size
    if way == "renamed":
        os.replace(new, path)
    else:
        path.write_bytes(new.read_bytes())
    if keep_time:
        os.utime(path, ns=times)
    assert data.checksum != before
    now = cached_features("small_cnn", data.train, allow_random=True, workers=0)
    assert now[0].equal(features[0]) and not now[1].equal(features[1])


def test_files_are_read_again_only_after_a_change(tmp_path):
    paths = [saved(tmp_path, f"{i}.bmp", PHOTO) for i in range(5)]
    before, asked = content_hashes(paths), []

    def ask(path):
        asked.append(path)
        return "new"

    assert once_per_file(paths, ask, "hashes", "") == before and asked == []
    saved(tmp_path, "3.bmp", 255 - PHOTO)
    assert once_per_file(paths, ask, "hashes", "") == [*before[:3], "new", before[4]]
    assert asked == [str(paths[3])]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"x": 1}', b"\xff\xfe"])
def test_a_damaged_store_of_hashes_is_made_again(tmp_path, damage):
    paths = [saved(tmp_path, f"{i}.bmp", PHOTO) for i in range(2)]
    before = content_hashes(paths)
    (store,) = (cache_root() / "hashes").iterdir()
    store.write_bytes(damage.replace(b"x", str(paths[0]).encode()))
    assert content_hashes(paths) == before


def test_without_a_cache_everything_works(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "file"))  # nothing can be written below a file
    data = load_folder(folder_of(tmp_path / "birds", 0))
    assert data.checksum == data.checksum
    with pytest.warns(UserWarning, match="features cannot be stored in .* set DML_NB_CACHE"):
        assert len(cached_features("small_cnn", data.train, allow_random=True, workers=0)) == 4


def test_results_of_earlier_versions_are_not_called_changed():
    assert same_checksum("57271cd917889410", "0" * 32)
    assert not same_checksum("1" * 32, "0" * 32) and not same_checksum("1" * 16, "0" * 16)


@pytest.mark.parametrize("classes, held", [(4, 2), (5, 2), (10, 3), (100, 30)])
def test_the_held_out_part_always_has_classes_to_confuse(classes, held):
    data = in_memory(classes).holdout(0.3)
    assert (len(data.train.classes), len(data.test.classes)) == (classes - held, held)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_too_few_classes_to_hold_some_out_are_one_clear_error(classes):
    with pytest.raises(ValueError, match=f"^{classes} training classes, of which 2 are held out, leave .* at least 2"):
        in_memory(classes).holdout(0.3)


def in_memory(classes):
    "This number of training classes with two images each, and one class for the test."
    labels = np.arange(classes + 1).repeat(2)
    images = ImageSet("small", labels, [str(c) for c in range(classes + 1)], array=np.zeros((len(labels), 2, 2), "u1"))
    return RetrievalData("small", images.subset(range(classes), "train"), images.subset([classes], "test"))
