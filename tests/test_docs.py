"The web site: links become links between pages, hidden cells go, arguments are listed, and a dead link is found."

import re
import shlex
import subprocess
import sys

import nbformat
import pytest
import typer
from make_docs import ROOT, dead_links, processed, reference, write_pages

from dml_nb.face.app_cli import app

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)")
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)
START = [ROOT / "nbs" / "index.ipynb", *sorted(ROOT.glob("nbs/00_start/*.ipynb"))]
WRITTEN = {path.name: "\n".join(c.source for c in nbformat.read(path, as_version=4).cells) for path in START}
WRITTEN["CONTRIBUTING.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {
        line.partition(" #")[0].strip()
        for text in WRITTEN.values()
        for block in BLOCK.findall(text)
        for line in block.splitlines()
        if line.startswith(("dml_nb ", "make "))
    }
    | {found for text in WRITTEN.values() for found in re.findall(r"`(dml_nb [a-z]+ [^`…]+)`", text)}
)


def notebook(*cells):
    "A notebook of text, and of code that begins with `#|` or `print`."
    made = nbformat.v4.new_notebook()
    for text in cells:
        is_code = text.startswith(("#|", "print"))
        made.cells.append((nbformat.v4.new_code_cell if is_code else nbformat.v4.new_markdown_cell)(text))
    return made


def test_links_between_notebooks_exist():
    dead = []
    for path in ROOT.glob("nbs/**/*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            links = LINK.findall(cell.source) if cell.cell_type == "markdown" else []
            dead += [
                f"{path.relative_to(ROOT)}: {link}"
                for link in links
                if ":" not in link and not (path.parent / link).exists()
            ]
    assert dead == []


def test_hidden_cells_and_directives_go_and_arguments_are_listed():
    page = processed(notebook("# Parts", "#| default_exp losses.cbml", "#| hide\n1 / 0", "#| export\nprint(1)"))
    sources = [cell.source for cell in page.cells]
    assert sources[:2] == ["# Parts", "print(1)"] and len(sources) == 3
    assert sources[2] == reference("losses.cbml")
    assert re.search(
        r"### CBMLLoss\n.*\| gamma \| float \| 1.0 \| weight of the variance constraint \|", sources[2], re.S
    )


@pytest.fixture
def made(tmp_path):
    "Two notebooks with links, a picture and a formula: the source, and the folder for the processed ones."
    top = tmp_path / "nbs"
    texts = {
        "index.ipynb": (
            "# Start\n[`data`](../nbs/20_data), [folders](20_data/03_folders.ipynb#a-title) ![bar](no.png)",
        ),
        "20_data/03_folders.ipynb": (
            "# Folders\n> Reads folders\n\n[back](../index.ipynb), [other](https://example.org)",
            "## A title\n$e^x$",
            "## A title",
            "print(1)",
        ),
    }
    for name, cells in texts.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook(*cells), top / name)
    return [top / name for name in texts], tmp_path / "proc", top


def test_links_become_links_between_pages(made):
    navigation = write_pages(*made)
    start = nbformat.read(made[1] / "index.ipynb", as_version=4).cells[0].source
    assert start == "# Start\n[`data`](20_data/index.html), [folders](20_data/03_folders.html#a-title) *bar*"
    assert "[Folders](03_folders.ipynb): Reads folders" in (made[1] / "20_data/index.md").read_text(encoding="utf-8")
    assert navigation[1] == {"Data": ["20_data/index.md", {"Folders": "20_data/03_folders.ipynb"}]}


def test_pages_load_nothing_from_elsewhere_and_link_to_places_that_exist(made, tmp_path):
    pytest.importorskip("mkdocs_jupyter", reason="the extra `docs` is not installed")
    navigation, site = write_pages(*made), tmp_path / "site"
    code = f"from make_docs import *; build(Path({str(made[1])!r}), Path({str(site)!r}), {navigation!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, encoding="utf-8")
    assert not done.returncode, done.stderr
    assert dead_links(site) == []
    page = (site / "20_data" / "03_folders.html").read_text(encoding="utf-8")
    assert page.count('id="a-title"') == page.count('id="a-title-2"') == 1 and "$e^x$" in page
    assert len(page) < 60_000, "the style sheet of JupyterLab is not repeated in each page"
    assert all((site / "assets" / name).is_file() for name in ("mathjax/tex-chtml-full.js", "notebook.css"))
    (site / "20_data" / "index.html").unlink()
    (site / "index.html").write_text(
        '<a href="20_data/03_folders.html#b"></a><script src="https://a.org/b.js"></script>', encoding="utf-8"
    )
    assert {"index.html: 20_data/03_folders.html#b", "index.html: https://a.org/b.js"} < set(dead_links(site))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_are_understood(command):
    "Every command that a page shows names a command, options and make targets that exist."
    program, *words = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert [word for word in words if "=" not in word and word not in targets] == []
        return
    group = typer.main.get_command(app)
    name, *arguments = words
    if name.startswith("-") or not arguments:
        assert name.startswith("-") or name in group.commands
        return
    group.commands[name].make_context(name, arguments, resilient_parsing=False)
