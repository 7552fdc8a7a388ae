"""Modules, notebooks and README must be what the notebooks say.

Run by `make test`. With --write-readme (from `make export`) it renews README.md instead of only comparing it.
"""

import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def state() -> dict[str, str]:
    files = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("dml_nb/**/*.py")]
    return {
        str(f.relative_to(ROOT)): sha256(f.read_bytes()).hexdigest()
        for f in files
        if ".ipynb_checkpoints" not in f.parts
    }


def readme() -> str:
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata.language_info = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return text.replace("](../", "](").strip() + "\n"


def with_paths() -> list[str]:
    "Notebooks whose outputs name a folder of the machine they ran on."
    folder = re.compile(r"(?<![\w.])/(?:work|root|tmp|home|Users)/[\w.]")
    files = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("runs/**/run.ipynb")]
    return [str(f.relative_to(ROOT)) for f in files if folder.search(f.read_text(encoding="utf-8"))]


def main() -> int:
    if "--write-readme" in sys.argv:
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
        return 0
    before = state()
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([BIN / command], cwd=ROOT, check=True)
    after = state()
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if (ROOT / "README.md").read_text(encoding="utf-8") != readme():
        changed.append("README.md")
    if changed:
        print("not what the notebooks say: " + ", ".join(changed) + ". Run `make export` and commit the result.")
        return 1
    if found := with_paths():
        print(
            "folders of the machine they ran on stand in the outputs of "
            + ", ".join(found)
            + ". Run them again with PYTHONWARNINGS=ignore."
        )
        return 1
    print(f"{len(after)} notebooks and modules agree and are clean; README.md is current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
