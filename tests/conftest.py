"Fixtures: a small data set of PNG files, and the command line as a process of its own or inside the test process."

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest


def pytest_runtest_setup(item):
    "A test that is marked `cuda` needs a GPU."
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU present")


@pytest.fixture(scope="session")
def glyph_folder(tmp_path_factory) -> Path:
    "Twelve classes of glyphs with twelve images each, as PNG files in class folders."
    from dml_nb.data.glyphs import letter_folder

    return Path(letter_folder(tmp_path_factory.mktemp("data") / "letters"))


@pytest.fixture
def draw_photos(tmp_path):
    "Draw eight classes of three small pictures; the first class may have another number of them."
    import numpy as np
    from PIL import Image

    from dml_nb.data.folders import load_folder

    def draw(in_first_class: int = 3):
        generator = np.random.default_rng(0)
        for c in range(8):
            (tmp_path / "photos" / f"c{c}").mkdir(parents=True)
            for i in range(in_first_class if c == 0 else 3):
                pixels = generator.integers(0, 255, (40, 44, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / f"c{c}" / f"{i}.png")
        return load_folder(tmp_path / "photos")

    return draw


@pytest.fixture
def dml_nb(tmp_path):
    "Run the command `dml_nb` in an empty folder with its own cache; check the exit status, return the output."
    command = Path(sys.executable).with_name("dml_nb")
    environment = os.environ | {"DML_NB_CACHE": str(tmp_path / "cache")}

    def run(*args: str, status: int = 0) -> str:
        done = subprocess.run(
            [command, *map(str, args)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    run.command, run.environment, run.folder = command, environment, tmp_path
    return run


@pytest.fixture
def shell(tmp_path, monkeypatch):
    "The same command inside the test process, which saves the time of importing torch."
    from typer.testing import CliRunner

    from dml_nb.face.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "cache"))

    def run(*args: str, status: int = 0) -> str:
        done = CliRunner().invoke(app, [str(a) for a in args])
        assert done.exit_code == status, f"{done.output}\n{done.exception!r}"
        return done.output

    return run


@pytest.fixture
def serve():
    "Start an HTTP server on this machine for a class of requests; it stops with the test."

    def start(handler) -> ThreadingHTTPServer:
        httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True)
        for stop in (thread.join, httpd.server_close, httpd.shutdown):  # called in reverse order
            started.callback(stop)
        thread.start()
        return httpd

    with ExitStack() as started:
        yield start
