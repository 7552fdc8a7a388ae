"Downloads from a local HTTP server that cuts, damages, exchanges, hides or withholds the file."

import errno
import hashlib
import multiprocessing
import os
import time
from http.server import BaseHTTPRequestHandler

import pytest
import requests

from dml_nb.data import downloads
from dml_nb.data.downloads import ATTEMPTS, download

SIZE = 1_000_000
CONTENT = hashlib.shake_128(b"birds").digest(SIZE)
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
ETAG, DATE = '"v1"', "Mon, 01 Jan 2024 00:00:00 GMT"


class Handler(BaseHTTPRequestHandler):
    "Serves `server.content` with the faults that the attributes of the server state."

    def do_GET(self):
        server = self.server
        server.asked.append({name: self.headers[name] for name in ("Range", "If-Range")})
        if server.statuses:
            status = server.statuses.pop(0)
            if status != 200:
                return self.send_error(status)
        if server.silence:
            time.sleep(server.silence)
        body, start = server.content, int((self.headers["Range"] or "bytes=0-")[6:-1])
        same = not server.knows_if_range or self.headers["If-Range"] in (server.version.get("ETag"), DATE)
        if not (start and same and server.knows_ranges):
            start = 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        for name, value in server.version.items():
            self.send_header(name, value)
        if server.states_length:
            self.send_header("Content-Length", str(len(body) - start + server.extra_length))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        end = start + (server.cuts.pop(0) if server.cuts else len(body))
        self.wfile.write(body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(serve):
    httpd = serve(Handler)
    httpd.content, httpd.version = CONTENT, {"ETag": ETAG}
    httpd.cuts, httpd.statuses, httpd.asked = [], [], []
    httpd.knows_ranges = httpd.knows_if_range = httpd.states_length = True
    httpd.silence, httpd.extra_length = 0, 0
    httpd.url += "/birds.tgz"
    return httpd


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.001)


def get(server, folder, size=SIZE, checksum=SHA256, timeout=5.0):
    return download(server.url, folder / "birds.tgz", size, checksum, timeout, progress=False)


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def test_a_file_is_downloaded_once_into_a_new_folder(server, tmp_path):
    for _ in range(2):
        assert get(server, tmp_path / "a" / "b").read_bytes() == CONTENT
    assert len(server.asked) == 1 and names(tmp_path / "a" / "b") == ["birds.tgz"]


@pytest.mark.parametrize("version", [{"ETag": ETAG}, {"Last-Modified": DATE}, {"ETag": 'W/"1"', "Last-Modified": DATE}])
def test_a_broken_connection_is_continued(server, tmp_path, version):
    server.version, server.cuts = version, [400_000, 300_000]
    assert get(server, tmp_path).read_bytes() == CONTENT
    starts = [int((asked["Range"] or "bytes=0-")[6:-1]) for asked in server.asked]
    assert len(starts) == 3 and starts[0] == 0 and 300_000 < starts[1] <= 400_000 and 550_000 < starts[2] <= 700_000
    assert names(tmp_path) == ["birds.tgz"]


def test_the_next_call_continues_where_the_last_one_gave_up(server, tmp_path):
    server.cuts = [500_000] + [0] * ATTEMPTS
    with pytest.raises(ConnectionError) as error:
        get(server, tmp_path)
    message, kept = str(error.value), (tmp_path / "birds.tgz.part").stat().st_size
    assert f"The first {kept:,} bytes are kept, and the next call continues there." in message and "\n" not in message
    assert f"save it as {tmp_path / 'birds.tgz'}" in message
    server.cuts, server.asked = [], []
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert [asked["Range"] for asked in server.asked] == [f"bytes={kept}-"]


def test_a_long_download_may_break_more_often_than_five_times(server, tmp_path):
    server.cuts = [100_000] * 9
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges_sends_the_file_again(server, tmp_path):
    server.knows_ranges, server.cuts = False, [400_000]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[1]["Range"] is not None


def test_a_server_without_a_version_is_not_asked_for_the_rest(server, tmp_path):
    server.version, server.cuts = {}, [400_000]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert [asked["Range"] for asked in server.asked] == [None, None]


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_halves_of_two_versions_are_never_joined(server, tmp_path, knows_if_range):
    server.cuts, server.knows_if_range = [400_000] + [0] * ATTEMPTS, knows_if_range
    with pytest.raises(ConnectionError):
        get(server, tmp_path, size=None, checksum=None)
    server.cuts, server.content, server.version = [], CONTENT[::-1], {"ETag": '"v2"'}
    assert get(server, tmp_path, size=None, checksum=None).read_bytes() == CONTENT[::-1]


def test_a_part_of_another_address_is_not_continued(server, tmp_path):
    server.cuts = [400_000] + [0] * ATTEMPTS
    with pytest.raises(ConnectionError):
        get(server, tmp_path)
    server.cuts, server.asked = [], []
    download(server.url + "?mirror", tmp_path / "birds.tgz", SIZE, SHA256, progress=False)
    assert server.asked[0]["Range"] is None


def test_a_rest_that_does_not_exist_begins_again(server, tmp_path):
    (tmp_path / "birds.tgz.part").write_bytes(CONTENT + b"more")
    (tmp_path / "birds.tgz.part.version").write_text(f"{server.url}\n{ETAG}", encoding="utf-8")
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_complete_part_needs_no_request(server, tmp_path):
    (tmp_path / "birds.tgz.part").write_bytes(CONTENT)
    (tmp_path / "birds.tgz.part.version").write_text(f"{server.url}\n{ETAG}", encoding="utf-8")
    assert get(server, tmp_path).read_bytes() == CONTENT and server.asked == []


def test_a_damaged_byte_is_found_and_the_download_can_be_repeated(server, tmp_path):
    damaged = bytearray(CONTENT)
    damaged[700_000] ^= 1
    server.content = bytes(damaged)
    with pytest.raises(
        ValueError, match="is damaged: it has the sha256 .*, expected .* It has been deleted; try again"
    ):
        get(server, tmp_path)
    assert names(tmp_path) == []
    server.content = CONTENT
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_another_size_is_refused_before_anything_is_downloaded(server, tmp_path):
    with pytest.raises(ValueError, match="has 1,000,000 bytes, expected 999,999: the file on the server has changed"):
        get(server, tmp_path, size=999_999)
    assert names(tmp_path) == []


def test_a_server_that_states_too_many_bytes_never_gives_a_complete_file(server, tmp_path):
    server.extra_length = 100
    with pytest.raises(ConnectionError, match="cannot download"):
        get(server, tmp_path, size=None)
    assert "birds.tgz" not in names(tmp_path)


def test_a_cut_answer_without_a_length_is_noticed(server, tmp_path):
    server.states_length, server.cuts = False, [400_000]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_missing_file_is_asked_for_once(server, tmp_path, status):
    server.statuses = [status] * 9
    with pytest.raises(ConnectionError) as error:
        get(server, tmp_path)
    assert f"cannot download {server.url}: the server answers {status}" in str(error.value)
    assert len(server.asked) == 1 and names(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, tmp_path, status):
    server.statuses = [status, status, 200]
    assert get(server, tmp_path).read_bytes() == CONTENT
    server.statuses, server.asked = [status] * 9, []
    with pytest.raises(ConnectionError, match=f"answers {status}"):
        get(server, tmp_path / "other")
    assert len(server.asked) == ATTEMPTS


def test_a_silent_server_ends_in_one_sentence(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "ATTEMPTS", 2)
    server.silence = 0.5
    with pytest.raises(ConnectionError, match="no data arrived for 0.1 seconds. Try again, or get the file elsewhere"):
        get(server, tmp_path, timeout=0.1)


@pytest.mark.parametrize(
    "url, reason", [("ftp://127.0.0.1/a", "No connection adapters"), ("birds.tgz", "Invalid URL"), ("", "Invalid URL")]
)
def test_an_address_that_is_none(tmp_path, url, reason):
    with pytest.raises(ConnectionError, match=f"cannot download {url}: {reason}"):
        download(url, tmp_path / "a")


def test_an_unreachable_server(server, tmp_path):
    server.server_close()
    with pytest.raises(ConnectionError, match="Connection refused"):
        get(server, tmp_path)


def test_a_file_put_there_by_hand_is_checked_and_kept(server, tmp_path):
    file = tmp_path / "birds.tgz"
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="it has 999,999 bytes, expected 1,000,000. Delete it"):
        get(server, tmp_path)
    file.write_bytes(CONTENT)
    assert get(server, tmp_path) == file and server.asked == []


def test_a_full_disk_is_noticed_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: type("usage", (), dict(free=1000)))
    with pytest.raises(OSError, match="GB free, but the rest of .* needs .* GB: free some space"):
        get(server, tmp_path)
    assert names(tmp_path) == []


def test_a_disk_that_gets_full_during_the_download_is_named(server, tmp_path, monkeypatch):
    whole = requests.Response.iter_content

    def until_full(response, size):
        yield next(whole(response, size))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(requests.Response, "iter_content", until_full)
        with pytest.raises(OSError, match=r"cannot write to .*\(No space left on device\): free some space"):
            get(server, tmp_path)
    assert "birds.tgz" not in names(tmp_path)
    assert get(server, tmp_path).stat().st_size == SIZE


def _in_process(url, file, results):
    results.put(download(url, file, SIZE, SHA256, progress=False).read_bytes() == CONTENT)


def test_two_processes_download_one_file_once(server, tmp_path):
    server.silence = 0.3
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_in_process, args=(server.url, tmp_path / "a", results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60), results.get(timeout=60)] == [True, True]
    for process in processes:
        process.join()
    assert len(server.asked) == 1 and names(tmp_path) == ["a"]
