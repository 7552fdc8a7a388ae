"""Check that modules, notebooks and README.md belong together, and that no output names a folder of this machine.

`make test` runs this script. `make export` calls it with --write-readme, which writes README.md from nbs/index.ipynb.
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
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|tmp|home|Users)/[\w.]")


def notebooks() -> list[Path]:
    "The source notebooks, in the order of floors and numbers."
    return sorted(path for path in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def checksums() -> dict[str, str]:
    "Path -> checksum of every notebook and module."
    files = [*notebooks(), *sorted(ROOT.glob("dml_nb/**/*.py"))]
    return {str(path.relative_to(ROOT)): sha256(path.read_bytes()).hexdigest() for path in files}


def only_output(cell):
    "The Markdown that a cell displays, in place of the cell."
    shown = [output.data["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})]
    return nbformat.v4.new_markdown_cell("\n\n".join(shown))


def readme() -> str:
    "README.md as nbs/index.ipynb gives it; links that leave nbs/ are made relative to the repository."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata.language_info = {"name": "python"}
    notebook.cells = [
        only_output(cell) if cell.source.startswith("#| echo: false") else cell for cell in notebook.cells
    ]
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return text.replace("](../", "](").strip() + "\n"


def changed_by_export() -> list[str]:
    "Files that differ from what nbdev writes from the notebooks."
    before = checksums()
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([BIN / command], cwd=ROOT, check=True)
    after = checksums()
    changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    is_current = (ROOT / "README.md").read_text(encoding="utf-8") == readme()
    return changed if is_current else [*changed, "README.md"]


def with_machine_paths() -> list[str]:
    "Notebooks that name a folder of the machine they ran on."
    files = [*notebooks(), *sorted(ROOT.glob("runs/**/run.ipynb"))]
    return [str(path.relative_to(ROOT)) for path in files if MACHINE_PATH.search(path.read_text(encoding="utf-8"))]


def main() -> int:
    if "--write-readme" in sys.argv:
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
        return 0
    if changed := changed_by_export():
        print(f"These files do not agree with the notebooks: {', '.join(changed)}. Run `make export` and commit them.")
        return 1
    if found := with_machine_paths():
        print(
            f"These notebooks name a folder of the machine they ran on: {', '.join(found)}. "
            "Run them again with PYTHONWARNINGS=ignore, or use relative paths."
        )
        return 1
    print(f"{len(checksums())} notebooks and modules agree, and README.md is current.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
