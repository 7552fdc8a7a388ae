"Unpacking of archives: hostile names, links, damage, and interruptions; nothing half-written stays."

import errno
import gzip
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from dml_nb.data import archives
from dml_nb.data.archives import unpack

IMAGES = {f"birds/{c}/{i}.jpg": os.urandom(5000) for c in "ab" for i in range(4)}


def write_zip(file: Path, members: dict, kind: int = stat.S_IFREG) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o644) << 16
            archive.writestr(info, content)
    return file


def write_tar(file: Path, members: dict, mode: str = "w:gz", kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    with tarfile.open(file, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, link
            archive.addfile(info, io.BytesIO(content))
    return file


def contents(folder: Path) -> dict:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(archive: Path, match: str):
    "Unpacking raises one sentence that names the archive, and leaves nothing behind."
    before = sorted(archive.parent.iterdir())
    with pytest.raises(ValueError, match=match) as error:
        unpack(archive, archive.parent / "new", progress=False)
    assert str(archive) in str(error.value) and "\n" not in str(error.value)
    assert sorted(archive.parent.iterdir()) == before


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_every_format_gives_the_same_files(tmp_path, mode):
    file = tmp_path / "archive"
    write_zip(file, IMAGES) if mode == "zip" else write_tar(file, IMAGES, mode)
    assert contents(unpack(file, tmp_path / "deep" / "new")) == IMAGES


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/x", "..\\x", "a\\..\\..\\x", "C:\\x", "c:x", "\\\\host\\share\\x", "//host/x"]
)
def test_a_member_that_leaves_the_folder_is_refused(tmp_path, write, name):
    refused(write(tmp_path / "archive", IMAGES | {name: b"x"}), "lies outside the target folder")
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize(
    "kind, link",
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "a/0.jpg"),
        (tarfile.LNKTYPE, "birds/a/0.jpg"),
        (tarfile.CHRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_links_and_devices_in_a_tar_file_are_refused(tmp_path, kind, link):
    refused(write_tar(tmp_path / "a.tgz", {"birds/x": b""}, kind=kind, link=link), "is a link or a device")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_file_are_refused(tmp_path, kind):
    refused(write_zip(tmp_path / "a.zip", {"birds/x": b"/etc/passwd"}, kind), "is a link or a device")


def test_a_file_written_through_a_linked_folder_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("birds")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("birds/x"), io.BytesIO())
    refused(tmp_path / "a.tar", "is a link or a device")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_companions_of_other_systems_are_left_out(tmp_path, write):
    extra = ["birds/a/._0.jpg", "__MACOSX/birds/a/._0.jpg", "._birds", "birds/.DS_Store", "birds/a/Thumbs.db"]
    archive = write(tmp_path / "archive", IMAGES | dict.fromkeys(extra, b"no image"))
    assert contents(unpack(archive, tmp_path / "new")) == IMAGES


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_occurs_twice_is_refused(tmp_path, write):
    twice = write(tmp_path / "archive", {"a/1.jpg": b"one", "./a/1.jpg": b"two"})
    refused(twice, "holds a/1.jpg twice")


def test_windows_paths_become_folders(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"birds\\a\\1.jpg": b"x"})
    assert contents(unpack(archive, tmp_path / "new")) == {"birds/a/1.jpg": b"x"}


def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path):
    bomb = write_tar(tmp_path / "a.tgz", {f"{i}": bytes(2**22) for i in range(4)})
    refused(bomb, "100 times its own size")


def test_a_zip_file_that_states_a_smaller_size_is_refused(tmp_path):
    file = write_zip(tmp_path / "a.zip", {"a": bytes(5000)})
    data = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + offset
        data[at : at + 4] = (10).to_bytes(4, "little")
    file.write_bytes(data)
    refused(file, "Bad CRC-32|another size")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("mode", ["zip", "w", "w:gz"])
def test_a_cut_archive_is_refused(tmp_path, mode, share):
    file = tmp_path / "archive"
    write_zip(file, IMAGES) if mode == "zip" else write_tar(file, IMAGES, mode)
    whole = file.read_bytes()
    last = len(whole) if mode != "w" else whole.rindex(IMAGES["birds/b/3.jpg"][-99:])  # without the padding
    file.write_bytes(whole[: int(last * share)])
    refused(file, "was not unpacked")


def test_a_tar_file_cut_between_two_members_is_refused(tmp_path):
    file = write_tar(tmp_path / "a.tar", IMAGES, "w")
    member = 512 + 5120  # header and content, in blocks of 512
    file.write_bytes(file.read_bytes()[: 3 * member])
    refused(file, "cut off or damaged")


@pytest.mark.parametrize("mode", ["zip", "w:gz"])
def test_a_damaged_byte_is_found(tmp_path, mode):
    file = tmp_path / "archive"
    write_zip(file, IMAGES) if mode == "zip" else write_tar(file, IMAGES, mode)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    refused(file, "was not unpacked")


def test_a_damaged_tar_header_is_not_taken_for_the_end(tmp_path):
    file = write_tar(tmp_path / "a.tar", IMAGES, "w")
    data = bytearray(file.read_bytes())
    data[2 * (512 + 5120) + 10] ^= 255
    file.write_bytes(data)
    refused(file, "cut off or damaged")


def test_the_checksum_at_the_end_of_a_compressed_tar_file_is_read(tmp_path):
    plain = write_tar(tmp_path / "a.tar", IMAGES, "w").read_bytes()
    data = bytearray(gzip.compress(plain))
    data[-8] ^= 255
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.tgz").write_bytes(data)
    refused(tmp_path / "a.tgz", "CRC check failed")


def test_an_encrypted_zip_file_is_refused(tmp_path):
    file = write_zip(tmp_path / "a.zip", {"a": b"x"})
    data = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    file.write_bytes(data)
    refused(file, "password required")


def test_a_web_page_instead_of_an_archive_is_refused(tmp_path):
    (tmp_path / "a.tgz").write_text("<html>Please log in</html>", encoding="utf-8")
    refused(tmp_path / "a.tgz", "neither a zip nor a tar file")


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    file, copy, calls = write_zip(tmp_path / "a.zip", IMAGES), archives.shutil.copyfileobj, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        copy(*args)

    monkeypatch.setattr(archives.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(file, tmp_path / "new")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_a_disk_that_gets_full_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    archive = write_zip(tmp_path / "a.zip", {"a/1.jpg": b"image"})
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(
        OSError, match=r"a.zip cannot be unpacked into .*\(No space left on device\): it needs a folder"
    ):
        unpack(archive, tmp_path / "new")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(FileExistsError, match="new exists already: delete it"):
        unpack(write_zip(tmp_path / "a.zip", IMAGES), tmp_path / "new")
