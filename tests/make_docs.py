"""Write the notebooks as a web site into _docs, by MkDocs with the theme Material and the plugin mkdocs-jupyter.

`make docs` runs this script. It writes each notebook as a reader should see it into _proc, lets MkDocs make the pages,
and ends with an error if a page links to a place that does not exist. The pages ask no other server for anything:
MathJax comes from an installed package, and the search runs in the browser.
"""

import inspect
import os
import re
import shutil
import sys
from functools import partial
from html.parser import HTMLParser
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from urllib.parse import unquote

import nbformat
from check_notebooks import only_output
from fastcore.docments import DocmentTbl

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#:\s]+)")  # of Markdown, relative, up to its anchor
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^):\s]+)\)")
CODE_BLOCK = re.compile(r"(```.*?```)", re.S)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
EXPORTS = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.M)
HIDDEN = re.compile(r"^#\|\s*(hide\b|default_exp\b|include:\s*false)", re.M)
MATHJAX = "django-static-mathjax"  # the wheel of MathJax 3; its name is that of the web framework which it was made for


def relink(
    text: str,  # a Markdown cell
    folder: Path,  # folder of its notebook
    site: Path,  # folder of the processed notebooks
    top: Path = ROOT / "nbs",  # folder of all notebooks
) -> str:  # the cell with links between pages
    "`03_folders.ipynb` becomes `03_folders.html`, `../20_data` its `index.html`; a picture from elsewhere is copied."

    def to_page(found) -> str:
        target = Path(os.path.normpath(folder / unquote(found[2])))
        if target.is_file() and not target.is_relative_to(top):
            (site / "assets").mkdir(parents=True, exist_ok=True)
            shutil.copy2(target, site / "assets" / target.name)
            target = top / "assets" / target.name
        elif target.is_dir():
            target /= "index.html"
        elif target.suffix == ".ipynb":
            target = target.with_suffix(".html")
        return found[1] + os.path.relpath(target, folder)

    def picture_or_text(found) -> str:
        return found[0] if (folder / unquote(found[2])).exists() else f"*{found[1]}*"  # templates show those of a run

    parts = CODE_BLOCK.split(PICTURE.sub(picture_or_text, text))
    return "".join(part if i % 2 else LINK.sub(to_page, part) for i, part in enumerate(parts))


def reference(
    module: str,  # "losses.cbml"
) -> str:  # Markdown: for each public name its docstring and a table of its arguments
    "What a module offers, from the comments of its signatures (docments)."
    found = import_module(f"dml_nb.{module}")
    lines = []
    for name in found.__all__:
        thing = getattr(found, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        lines += [f"### {name}", inspect.getdoc(thing) or "", *_table(thing)]
        for method, code in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(code) and not method.startswith("_") and len(inspect.signature(code).parameters) > 1:
                lines += [f"**{name}.{method}**: {inspect.getdoc(code) or ''}", *_table(code)]
    return "\n\n".join(["## Reference", *lines]) if lines else ""


def _table(thing) -> list[str]:
    "The table of arguments, if there are any."
    try:
        table = DocmentTbl(thing)._repr_markdown_() if inspect.signature(thing).parameters else ""
    except ValueError:  # a class of the standard library that tells no signature
        table = ""
    return [re.sub(r"\| self \|.*\n", "", table).replace("**", "")] if table.count("\n") > 1 else []


def processed(
    notebook: nbformat.NotebookNode,  # as in nbs/
    relink_cell=lambda text: text,  # text of a Markdown cell -> the text with links to pages
) -> nbformat.NotebookNode:  # as a reader of the site should see it
    "The notebook without hidden cells and directives, and with the arguments of its functions at the end."
    cells, module = [], None
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()  # what a run left there
        if cell.cell_type == "code":
            if found := EXPORTS.search(cell.source):
                module = found[1]
            if HIDDEN.search(cell.source):
                continue
            if cell.source.startswith("#| echo: false"):
                cell = only_output(cell)
            elif "#| code-fold: true" in cell.source:
                cell.metadata.tags = ["folded"]
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source)
            for output in cell.outputs:
                if "text/markdown" in output.get("data", {}):
                    output.data["text/markdown"] = relink_cell(output.data["text/markdown"])
        else:
            cell.source = relink_cell(cell.source)
        if cell.source.strip():
            cells.append(cell)
    if module and (text := reference(module)):
        cells.append(nbformat.v4.new_markdown_cell(text))
    notebook.cells = cells
    return notebook


def title_and_summary(
    notebook: nbformat.NotebookNode,
) -> tuple[str, str]:
    "The first heading, and the line `> …` below it."
    title, _, rest = notebook.cells[0].source.removeprefix("# ").partition("\n")
    summary = re.search(r"^> (.*)", rest, re.M)
    return title.strip(), summary[1] if summary else ""


def write_pages(
    notebooks: list[Path],  # to process, in their order
    site: Path,  # folder that receives the processed notebooks, and a list of them for each folder
    top: Path = ROOT / "nbs",  # folder of all notebooks
) -> list[dict]:  # the navigation of MkDocs: floors with the titles of their notebooks
    "Process each notebook, and list the notebooks of each floor."
    floors: dict[str, list] = {}
    for path in notebooks:
        relink_cell = partial(relink, folder=path.parent, site=site, top=top)
        notebook = processed(nbformat.read(path, as_version=4), relink_cell)
        page = path.relative_to(top)
        (site / page).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, site / page)
        if path.parent != top:
            floors.setdefault(path.parent.name, []).append((page, *title_and_summary(notebook)))
    navigation = [dict(Home="index.ipynb")]
    for floor, pages in sorted(floors.items()):
        name = floor.lstrip("0123456789_").capitalize()
        lines = [f"- [{title}]({page.name})" + (f": {summary}" if summary else "") for page, title, summary in pages]
        (site / f"{floor}/index.md").write_text("\n".join([f"# {name}", "", *lines, ""]), encoding="utf-8")
        navigation.append({name: [f"{floor}/index.md", *({title: str(page)} for page, title, _ in pages)]})
    return navigation


def copy_assets(site: Path):
    "The style, the settings of MathJax, MathJax itself and its fonts."
    (site / "assets").mkdir(parents=True, exist_ok=True)
    for file in ("style.css", "formulas.js", "iframe-worker.js"):
        shutil.copy2(ROOT / "docs" / file, site / "assets")
    source = Path(distribution(MATHJAX).locate_file("mathjax/static/mathjax/es5"))
    target = site / "assets" / "mathjax"
    shutil.copytree(source / "output" / "chtml" / "fonts", target / "output" / "chtml" / "fonts", dirs_exist_ok=True)
    shutil.copy2(source / "tex-chtml-full.js", target)


def build(
    site: Path,  # folder with the processed notebooks
    target: Path,  # folder that receives the pages
    navigation: list,  # from `write_pages`
):
    "Let MkDocs make the pages."
    from mkdocs.commands.build import build as build_pages
    from mkdocs.config import load_config

    copy_assets(site)
    build_pages(load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(site), site_dir=str(target), nav=navigation))


class Page(HTMLParser):
    "Collects what a page links to or loads, and the places in it that can be linked to."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.places.add(attributes.get("id") or attributes.get("name"))
        loaded = tag in ("script", "img", "iframe", "link") and attributes.get("rel") not in ("canonical", "edit")
        link = attributes.get("src") or (attributes.get("href") if tag == "a" or loaded else None)
        if link:
            self.links.append((link, loaded))


def dead_links(
    site: Path,  # folder of pages
) -> list[str]:  # "index.html: 20_data/nowhere.html"
    "Links to files or places that do not exist, files outside the site, and whatever is loaded from another server."
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    dead = []
    pages.pop(site / "404.html", None)  # its links begin at the root of a server
    for path, page in pages.items():
        for link, loaded in page.links:
            file, _, place = link.partition("#")
            if re.match(r"[a-z]+:|//", link):
                is_dead = loaded and not link.startswith("data:")
            else:
                target = (path.parent / unquote(file)).resolve() if file else path
                is_dead = not (target.is_file() and target.is_relative_to(site))
                if target in pages and place:
                    is_dead |= unquote(place) not in pages[target].places
            if is_dead:
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


def main() -> int:
    notebooks = sorted(path for path in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    processed_notebooks, site = ROOT / "_proc", ROOT / "_docs"
    shutil.rmtree(processed_notebooks, ignore_errors=True)
    navigation = write_pages(notebooks, processed_notebooks)
    build(processed_notebooks, site, navigation)
    if dead := dead_links(site):
        print("These links lead nowhere: correct them in the notebooks.", *dead, sep="\n  ")
        return 1
    print(f"{len(notebooks)} notebooks are in {site.name}/; start with {site.name}/index.html.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
