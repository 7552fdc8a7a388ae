"What a run records about its machine, and which Python executes its notebook, on machines unlike that of the authors."

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager

from dml_nb.experiments import notebook_job, record


def git(folder, *args):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *args], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path):
    "The repository of somebody's own project, with a commit."
    (tmp_path / "project").mkdir()
    git(tmp_path / "project", "init", "--quiet")
    (tmp_path / "project" / "mine.py").touch()
    git(tmp_path / "project", "add", ".")
    git(tmp_path / "project", "commit", "--quiet", "--message", "mine")
    return tmp_path / "project"


def package_in(folder: Path, monkeypatch):
    "As if dml_nb were installed in this folder."
    (folder / "dml_nb").mkdir(parents=True)
    (folder / "dml_nb" / "__init__.py").touch()
    monkeypatch.setattr(record.dml_nb, "__file__", str(folder / "dml_nb" / "__init__.py"))


@pytest.mark.parametrize("place", [".venv/lib/python3.11/site-packages", ".", "libs"])
def test_an_installed_package_does_not_name_the_commit_of_the_project_around_it(project, monkeypatch, place):
    package_in(project / place, monkeypatch)
    assert record.environment()["commit"] == "not a git checkout"


def test_a_copy_that_a_project_keeps_in_a_folder_is_not_a_checkout_of_this_package(project, monkeypatch):
    package_in(project / "libs", monkeypatch)
    git(project, "add", "libs")
    git(project, "commit", "--quiet", "--message", "copied")
    assert record.environment()["commit"] == "not a git checkout"


def test_a_checkout_names_its_own_commit_also_below_another_repository(project, monkeypatch):
    package_in(project / "dml", monkeypatch)
    git(project / "dml", "init", "--quiet")
    git(project / "dml", "add", ".")
    git(project / "dml", "commit", "--quiet", "--message", "first")
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=project / "dml", capture_output=True, encoding="utf-8").stdout.strip()
    assert record.environment()["commit"] == commit[:12]
    monkeypatch.setenv("GIT_DIR", str(project / ".git"))  # as in a hook of the other repository
    assert record.environment()["commit"] == commit[:12]


def test_a_machine_without_git_records_that_it_has_none(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert record.environment()["commit"] == "not a git checkout"


def test_memory_is_recorded_or_left_open_where_the_system_does_not_tell(monkeypatch):
    assert record.peak_memory_mb() > 50
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert record.peak_memory_mb() is None


def test_the_gpu_has_a_peak_of_its_own(monkeypatch):
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: False)
    assert record.peak_device_memory_mb() is None
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record.torch.cuda, "max_memory_reserved", lambda: 3 * 2**20)
    assert record.peak_device_memory_mb() == 3


def test_a_kernel_of_another_python_is_not_started(tmp_path, monkeypatch):
    foreign = tmp_path / "kernels" / "python3" / "kernel.json"
    foreign.parent.mkdir(parents=True)
    spec = dict(argv=["/opt/hub/bin/python", "-m", "ipykernel_launcher"], display_name="Hub", language="python")
    foreign.write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert KernelSpecManager().get_kernel_spec("python3").argv[0] == "/opt/hub/bin/python"
    cell = nbformat.v4.new_code_cell("import sys\nprint(sys.executable)")
    kernel = dict(name="a-kernel-of-the-author", language="python", display_name="x")
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, tmp_path / "asks.ipynb")
    done = notebook_job.execute(tmp_path / "asks.ipynb", tmp_path / "done.ipynb", {}, tmp_path)
    assert done.cells[-1].outputs[0].text.strip() == sys.executable


def test_an_installed_package_uses_its_own_template(tmp_path, monkeypatch):
    "A folder `nbs/rows` beside an installed package belongs to somebody else."
    for folder in ("nbs/rows", "dml_nb/experiments/templates"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "row.ipynb").touch()
    monkeypatch.setattr(notebook_job, "__file__", str(tmp_path / "dml_nb/experiments/notebook_job.py"))
    assert notebook_job.template_path() == tmp_path / "dml_nb/experiments/templates/row.ipynb"
