"""The search page: what it shows, without a browser; then the page itself in headless Chromium.

The browser tests need the extra `app` (Gradio), the package playwright and an installed Chromium; without one of them
they are skipped with the reason. The gallery has classes whose names are markup, and one that is not UTF-8.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

NAMES = [
    "<script>document.title='markup'<",
    "<img src=x onerror=document.title='markup'>",
    "${document.title='markup'} {{x}} $x^2$ **b**",
    os.fsdecode(b"caf\xe9"),
]


@pytest.fixture(scope="module")
def gallery(glyph_folder, tmp_path_factory) -> Path:
    "A folder with `letters`, where four classes have strange names, `model`, `index` and `empty`, an index of nothing."
    import torch

    from dml_nb.face.image_index import embed_gallery
    from dml_nb.face.model_folder import save_model
    from dml_nb.models.embedder import create_embedder

    top = tmp_path_factory.mktemp("page")
    shutil.copytree(glyph_folder, top / "letters")
    for old, new in zip("abcd", NAMES):
        (top / "letters" / old).rename(top / "letters" / new)
    torch.manual_seed(0)
    save_model(create_embedder("small_cnn", 16, pretrained=False), top / "model", "small_cnn")
    index, _ = embed_gallery(top / "model", top / "letters", top / "index", say=lambda text: None)
    shutil.copytree(top / "index", top / "empty")
    from dml_nb.face.image_index import open_index

    nothing = open_index(top / "empty")
    nothing.remove(nothing.names)
    return top


@pytest.fixture
def page(gallery):
    from dml_nb.face.gallery_map import SearchPage

    return SearchPage(gallery / "index")


def _bytes(kind: str) -> bytes:
    "The content of a file that is no good image."
    if kind == "half":
        whole = _png(Image.effect_noise((64, 64), 80))
        return whole[: len(whole) // 2]
    if kind == "thin":
        return _png(Image.new("1", (1, 20_000)))
    if kind == "pixels":
        return _png(Image.new("1", (20_000, 20_000)))
    return dict(
        words=b"no picture", nothing=b"", svg=b"<svg xmlns='http://www.w3.org/2000/svg'/>", large=bytes(21 << 20)
    )[kind]


def _png(image: Image.Image) -> bytes:
    from io import BytesIO

    image.save(stream := BytesIO(), "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("words", "not an image of the types JPEG"),
        ("nothing", "not an image of the types JPEG"),
        ("svg", "not an image of the types JPEG"),
        ("half", "The image is damaged"),
        ("pixels", "more than 50 million pixels"),
        ("thin", "more than 20 times as long as wide"),
        ("large", "The file has 21 MB, and 20 are allowed"),
    ],
)
def test_a_file_that_is_no_good_image_is_refused(tmp_path, kind, message):
    from dml_nb.face.search_page import read_upload

    file = tmp_path / "image.jpg"
    file.write_bytes(_bytes(kind))
    with pytest.raises(ValueError, match=message) as caught:
        read_upload(file)
    assert str(tmp_path) not in str(caught.value)


def test_neighbours_are_those_of_the_search_command(page, gallery):
    path = gallery / "letters" / page.index.names[70]
    (expected,) = page.index.query_by_files([path], k=7)
    found = page.neighbours(page.ask_image(70), 7)
    assert [each["name"] for each in found] == [each["name"] for each in expected]
    uploaded = page.neighbours(page.ask_upload(path), 8)
    assert uploaded[0]["id"] == 70 and [e["name"] for e in uploaded[1:]] == [e["name"] for e in expected]
    label = page.index.labels[70]
    assert len(page.neighbours(page.ask_image(70), 60, label)) == 11  # without the query


def test_confusions_count_what_a_loop_counts(page):
    import torch

    x = torch.nn.functional.normalize(torch.from_numpy(np.array(page.index.embeddings)))
    nearest = (x @ x.T - 9 * torch.eye(len(x))).argmax(1)
    label = page.classes[-1]
    expected = [page.index.labels[nearest[i]] for i in page.rows[label]]
    assert page.taken_for(label) == {name: expected.count(name) for name in set(expected)}
    query = page.ask_image(page.rows[label][0])
    near = page.neighbours(query, 50)
    heading, *rows = page.confusions(query, near, 12)
    assert heading[3] == f"{label} taken for it" and sum(int(row[2]) for row in rows) == 12


def test_an_index_of_nothing_says_so(gallery):
    from dml_nb.face.gallery_map import SearchPage

    page = SearchPage(gallery / "empty")
    query = page.ask_upload(next((gallery / "letters/e").iterdir()))
    assert page.neighbours(query, 12) == page.neighbours(None, 12) == page.confusions(query, [], 12) == []
    assert "The index holds no images" in page.sentence(query, [])
    with pytest.raises(ValueError, match="A map needs at least 4 images, and the index holds 0"):
        page.map_points()


def test_no_file_outside_the_gallery_is_shown(gallery, tmp_path):
    "Names with dots, absolute names and links lead to a grey square."
    from dml_nb.face.search_page import SearchPage

    root = tmp_path / "letters"
    shutil.copytree(gallery / "letters", root)
    Image.new("RGB", (50, 50), "red").save(tmp_path / "secret.png")
    page = SearchPage(gallery / "index", root)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    page.index.names[:4] = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "gone.png"]
    (root / page.index.names[4]).write_bytes(b"no picture")
    for picture in page.pictures(list(range(5)), 80):
        assert picture.getpixel((0, 0)) == (221, 221, 221)
    assert page.pictures([5], 80)[0].getpixel((0, 0)) != (221, 221, 221)


def test_the_map_is_computed_once(page, monkeypatch):
    from dml_nb.face import gallery_map
    from dml_nb.face.search_page import SearchPage

    query, folder = page.ask_image(3), page.index.folder
    page.draw_map(query, [4, 5], zoom=4)
    (file,) = folder.glob("map-*.npz")
    assert (pixels := page.lay_out_map(query, [4, 5], 4)[0]).shape == (144, 2)
    assert page.image_at(*pixels[3], query, [4, 5], 4) == 3
    computed = page.map_points()
    monkeypatch.setattr(SearchPage, "_compute_map", lambda self: pytest.fail("it is computed again"))
    again = SearchPage(folder)
    assert all(np.array_equal(a, b) for a, b in zip(again.map_points(), computed))
    file.write_bytes(b"damaged")
    monkeypatch.setattr(SearchPage, "_compute_map", lambda self: computed)
    monkeypatch.setattr(gallery_map, "write_atomically", _full_disk)
    assert SearchPage(folder).map_points() is computed


def _full_disk(*args):
    raise OSError("No space left on device")


def test_sixty_thousand_images_answer_within_a_second(tmp_path):
    """An image from outside, through EfficientNet-lite0, among 60,000 embeddings of size 512.

    The processor's time is measured, so that other programs do not count.
    """
    import json

    from dml_nb.face.gallery_map import SearchPage
    from dml_nb.face.model_folder import save_model
    from dml_nb.models.embedder import create_embedder

    N, D = 60_000, 512
    folder = save_model(
        create_embedder("efficientnet_lite0", D, pretrained=False), tmp_path / "model", "efficientnet_lite0"
    ).parent
    sha = json.loads((tmp_path / "model/model.json").read_text(encoding="utf-8"))["sha256"]
    facts = dict(format=1, dml_nb="0", model=sha, embedding_size=D, root=str(tmp_path), revision=0, complete=True)
    (folder / "index.json").write_text(json.dumps(facts), encoding="utf-8")
    np.random.default_rng(0).standard_normal((N, D), np.float32).tofile(folder / "embeddings-0.f32")
    lines = (json.dumps({"name": f"{i}.jpg", "class": f"class {i % 2000}"}) for i in range(N))
    (folder / "images-0.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    Image.effect_noise((3000, 4000), 50).convert("RGB").save(tmp_path / "0.jpg")
    page, seconds = SearchPage(folder), []
    for _ in range(3):
        start = time.process_time()
        query = page.ask_upload(tmp_path / "0.jpg")
        found = page.neighbours(query, 50)[:12]
        assert len(page.pictures([each["id"] for each in found])) == 12 and page.sentence(query, found)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1, seconds


def test_help_answers_without_torch_and_gradio():
    code = "import sys; from dml_nb.face.app_cli import app; app(['app', '--help'], standalone_mode=False); "
    code += "assert not {'torch', 'numpy', 'gradio', 'PIL'} & set(sys.modules), sorted(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "Example: dml_nb app index" in done.stdout and "Exit status: 0 done" in done.stdout


@pytest.fixture
def app_shell(shell, monkeypatch):
    "The command line with `dml_nb app`, inside the test process; Gradio seems to be installed."
    from dml_nb.face import app_cli

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr(app_cli, "find_spec", lambda name: True)
    monkeypatch.setattr(app_cli, "start_page", lambda *args: pytest.fail("the page was started"))
    return shell


def test_bad_input_is_one_sentence(app_shell, gallery, tmp_path, monkeypatch):
    import json

    from dml_nb.face import app_cli
    from dml_nb.face.model_folder import save_model
    from dml_nb.models.embedder import create_embedder

    def copy(name: str, **facts) -> Path:
        shutil.copytree(gallery / "index", tmp_path / name)
        file = tmp_path / name / "index.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | facts), encoding="utf-8")
        return tmp_path / name

    moved = copy("moved", root=str(tmp_path / "nowhere"))
    assert f"are not in {tmp_path}/nowhere: if the gallery was moved" in app_shell("app", moved, status=1)
    assert "are not in" in app_shell("app", gallery / "index", "--root", tmp_path, status=1)
    other = copy("other")
    save_model(create_embedder("small_cnn", 16, pretrained=False), other / "model", "small_cnn")
    assert "was built by another model than the one in it" in app_shell("app", other, status=1)
    wide = copy("wide", embedding_size=8)
    message = "holds embeddings of size 8, and its model computes 16: embed the gallery again"
    assert message in app_shell("app", wide, status=1)
    assert "there is no index nope" in app_shell("app", "nope", status=1)
    assert "--port" in app_shell("app", gallery / "index", "--port", 0, status=2)
    monkeypatch.setattr(app_cli, "find_spec", lambda name: None)
    assert "pip install 'dml_nb[app]'" in app_shell("app", gallery / "index", status=1)


# The page in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if CHROMIUM else ["chromium"])
in_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
SERVER = """if True:
    import sys
    from dml_nb.face import app_cli
    from dml_nb.face.search_page import SearchPage

    def note(event, args):
        where = args[1] if event == "socket.connect" else args[0] if event == "socket.getaddrinfo" else None
        host = where[0] if isinstance(where, tuple) else where
        if host not in (None, "127.0.0.1", "localhost"):
            print("outside:", event, host, file=sys.stderr, flush=True)

    def start_both(*args):
        print("page:", start_page(SearchPage(empty, device="cpu")).local_url, file=sys.__stdout__, flush=True)
        return start_page(*args)

    sys.addaudithook(note)
    empty, start_page, app_cli.start_page = sys.argv.pop(), app_cli.start_page, start_both
    app_cli.app()
"""


@pytest.fixture(scope="module")
def served(gallery, tmp_path_factory):
    "One process with the page of an empty index and the command for the other one: addresses, process and its folder."
    home = tmp_path_factory.mktemp("served")
    with open(home / "errors", "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, "app", gallery / "index", "--device", "cpu", gallery / "empty"],
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env=os.environ | dict(TMPDIR=str(home), HOME=str(home)),
        )
    lines = [process.stdout.readline() for _ in range(2)]
    assert all(line.startswith("page: http://127.0.0.1:") for line in lines), (home / "errors").read_text("utf-8")
    yield dict(zip(("empty", "index"), (line.split()[1] for line in lines))), process, home
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, served):
    "Open the page of an index; at the end, no request may have left this machine and no script failed."
    asked, failed, tabs = [], [], []

    def open_page(name: str, says: str):
        tab = chromium.new_page(viewport=dict(width=1280, height=950))
        tabs.append(tab)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: failed.append(error))
        tab.goto(served[0][name])
        tab.wait_for_selector(f".says:has-text('{says}')")
        return tab

    yield open_page
    for tab in tabs:
        assert tab.title() == "dml_nb", "a name was taken for markup"
        tab.close()
    home = tuple(f"{kind}{address}" for kind in ("", "blob:") for address in served[0].values())
    assert asked and [url for url in asked if not url.startswith((*home, "data:"))] == []
    assert failed == []


def _says(tab, text: str) -> str:
    "Wait for a sentence of the page."
    tab.wait_for_selector(f".says:has-text('{text}')", timeout=20_000)
    return tab.locator(".says").first.inner_text()


def _captions(tab) -> list[str]:
    return tab.locator(".neighbours .caption-label").all_inner_texts()


@in_browser
def test_drop_click_filter_and_map(visit, gallery):
    tab = visit("index", "Drop an image")
    assert len(_captions(tab)) == 12
    letter = sorted((gallery / "letters/f").iterdir())[0]
    # drop
    code = """bytes => { const data = new DataTransfer(); const type = {type: 'image/png'};
        data.items.add(new File([new Uint8Array(bytes)], 'new.png', type)); return data }"""
    data = tab.evaluate_handle(code, list(letter.read_bytes()))
    tab.locator("button:has(input[type=file])").dispatch_event("drop", dict(dataTransfer=data))
    _says(tab, "Most similar class: f (similarity 1.000)")
    tab.wait_for_selector(".confusions td:has-text('of 12')")
    first = _captions(tab)
    assert len(first) == 12 and first[0].startswith("1.000") and first[0].endswith("f")
    assert tab.locator(".confusions tr").count() > 3
    # a neighbour becomes the query, and no longer finds itself
    tab.locator(".neighbours button.thumbnail-item").first.click()
    _says(tab, "An image of f")
    assert not _captions(tab)[0].startswith("1.000")
    # a class
    tab.get_by_label("Class of the neighbours").click()
    tab.get_by_role("option", name="g", exact=True).click()
    tab.wait_for_function("[...document.querySelectorAll('.caption-label')].every(e => e.innerText.endsWith('· g'))")
    assert len(_captions(tab)) == 12
    # a number
    number = tab.get_by_label("number input for Number of neighbours")
    number.fill("3")
    number.blur()
    tab.wait_for_function("document.querySelectorAll('.caption-label').length == 3")
    # a point of the map
    tab.get_by_role("tab", name="Map").click()
    drawing = tab.locator("[role=tabpanel] img:visible")
    drawing.wait_for(timeout=30_000)
    box = drawing.bounding_box()
    before = _says(tab, "An image of f")
    tab.mouse.click(box["x"] + 30, box["y"] + 30)
    tab.wait_for_function("text => document.querySelector('.says').innerText != text", arg=before)
    assert "An image of" in _says(tab, "An image of")


@in_browser
def test_names_are_text(visit, gallery):
    tab = visit("index", "Drop an image")
    captions = _captions(tab)
    assert captions[:4] == sorted(captions[:4]) and {"<script>document.title='markup'<", "caf?"} <= set(captions)
    for name in NAMES[:3]:
        tab.set_input_files("input[type=file]", next((gallery / "letters" / name).iterdir()))
        _says(tab, "Most similar class: " + name[:4])
        assert "markup" in tab.locator(".confusions").inner_text()
    tab.get_by_label("Class of the neighbours").click()
    assert "<script>document.title='markup'<" in tab.get_by_role("listbox").inner_text()


@in_browser
def test_files_that_are_no_images(visit, gallery, tmp_path):
    tab = visit("index", "Drop an image")
    for kind, message in (("words", "not an image of the types"), ("half", "The image is damaged")):
        (tmp_path / "image.jpg").write_bytes(_bytes(kind))
        tab.set_input_files("input[type=file]", tmp_path / "image.jpg")
        _says(tab, message)
    (tmp_path / "image.jpg").write_bytes(bytes(50 << 20))
    tab.set_input_files("input[type=file]", tmp_path / "image.jpg")
    tab.wait_for_selector("text=exceed the maximum allowed size")
    (tmp_path / "<img src=x onerror=document.title='markup'>.exe").write_bytes(b"MZ")
    tab.set_input_files("input[type=file]", next(tmp_path.glob("*.exe")))
    tab.wait_for_selector("text=Invalid file type")
    tab.set_input_files("input[type=file]", next((gallery / "letters/g").iterdir()))
    _says(tab, "Most similar class: g")


@in_browser
def test_an_empty_gallery(visit, gallery):
    tab = visit("empty", "The index holds no images. Add some with the command dml_nb add")
    tab.set_input_files("input[type=file]", next((gallery / "letters/g").iterdir()))
    tab.wait_for_selector("img[src*='/file=']")
    assert "The index holds no images" in tab.locator(".says").first.inner_text()
    tab.get_by_role("tab", name="Map").click()
    tab.wait_for_selector("text=A map needs at least 4 images")


@pytest.mark.skipif("gradio" in MISSING, reason="not installed: gradio")
def test_the_server_gives_no_files_and_ends_cleanly(served, gallery):
    "It ends the server, and looks at the connections that it made and at what it left."

    def status(request) -> int:
        try:
            return urllib.request.urlopen(request).status
        except urllib.error.HTTPError as e:
            return e.code
        except urllib.error.URLError as e:  # the server answers and closes before all is sent
            return 413 if isinstance(e.reason, ConnectionError) else 0

    (address, process, home) = served[0]["index"], *served[1:]
    letter = next((gallery / "letters/g").iterdir())
    for file in ("/etc/passwd", letter, gallery / "index/index.json", gallery / "letters/../model/model.json"):
        assert status(f"{address}gradio_api/file={file}") == 403
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    large = urllib.request.Request(f"{address}gradio_api/upload", head + bytes(50 << 20) + b"\r\n--x--\r\n")
    large.add_header("Content-Type", "multipart/form-data; boundary=x")
    assert status(large) == 413
    listening = {c.laddr.ip for c in psutil.Process(process.pid).net_connections("inet") if c.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130
    errors = (home / "errors").read_text(encoding="utf-8")
    assert "outside:" not in errors and "Traceback" not in errors, errors
    assert list(home.glob("dml_nb-*")) == []


@pytest.mark.skipif("gradio" in MISSING, reason="not installed: gradio")
def test_a_port_in_use_is_one_sentence(shell, gallery, monkeypatch):
    import dml_nb.face.app_cli  # noqa: F401  registers the command on the app that `shell` calls

    for name in ("GRADIO_TEMP_DIR", "no_proxy", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        output = shell("app", gallery / "index", "--port", port, status=1)
    assert f"the page cannot listen on 127.0.0.1, port {port}: choose another with --port" in output


def test_a_host_without_an_address_is_one_sentence():
    from dml_nb.face.app_cli import start_page

    with pytest.raises(ValueError, match="nonsense.invalid is no address of this machine"):
        start_page(None, "nonsense.invalid")
