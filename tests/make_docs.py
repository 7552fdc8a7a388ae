"""Write the notebooks as a web site into _docs: a page for each notebook, and a list of notebooks for each folder.

`make docs` runs this script. It ends with an error if a page links to a file that does not exist.
"""

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
from nbconvert import HTMLExporter

ROOT = Path(__file__).parents[1]
RELATIVE_LINK = re.compile(r'(<a\b[^>]*\bhref=")([^"#:]+)')
RELATIVE_PICTURE = re.compile(r'<img alt="([^"]*)" src="[^":]+"\s*/?>')  # of a run; a template has none beside it


def link_to_page(
    link: str,  # relative link of a notebook: to a notebook or to a folder of notebooks
    folder: Path,  # folder of that notebook
) -> str:  # relative link to the page
    "`03_folders.ipynb` becomes `03_folders.html`, and `../nbs/20_data` becomes `20_data/index.html`."
    target = Path(os.path.normpath(folder / unquote(link)))
    if target.is_dir():
        target /= "index.html"
    elif target.suffix == ".ipynb":
        target = target.with_suffix(".html")
    return os.path.relpath(target, folder)


def to_html(notebook, title: str, folder: Path) -> str:
    "A notebook as a web page: links lead to pages, and a picture that only a run has is replaced by its description."
    text, _ = HTMLExporter().from_notebook_node(notebook, dict(metadata=dict(name=title)))
    text = RELATIVE_PICTURE.sub(r"<em>\1</em>", text)
    return RELATIVE_LINK.sub(lambda found: found[1] + link_to_page(found[2], folder), text)


def list_of_notebooks(
    folder: Path,  # nbs/20_data
    notebooks: dict,  # path -> notebook, all of this folder
) -> nbformat.NotebookNode:  # a single cell: titles with links, and summaries
    "The contents of a folder as a notebook, so that its page looks like all others."
    lines = [f"# {folder.name}", "[All notebooks](../index.ipynb)", ""]
    for path, notebook in notebooks.items():
        title, _, rest = notebook.cells[0].source.removeprefix("# ").partition("\n")
        summary = re.search(r"^> (.*)", rest, re.M)
        lines.append(f"- [{path.stem}]({path.name}): {title}" + (f". {summary[1]}" if summary else ""))
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n".join(lines))])


def write_site(
    notebooks: list[Path],  # to convert
    site: Path,  # folder that receives the pages
    top: Path = ROOT / "nbs",  # folder of all notebooks
):
    "Write a page for each notebook, and an `index.html` for each of their folders."
    folders: dict[Path, dict] = {}
    for path in notebooks:
        folders.setdefault(path.parent, {})[path] = nbformat.read(path, as_version=4)
    for folder, members in folders.items():
        pages = {path.with_suffix(".html").name: notebook for path, notebook in members.items()}
        if folder != top:
            pages["index.html"] = list_of_notebooks(folder, members)
        for name, notebook in pages.items():
            page = site / folder.relative_to(top) / name
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(to_html(notebook, name.removesuffix(".html"), folder), encoding="utf-8")


class Links(HTMLParser):
    "Collects what a page links to or shows."

    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if (tag, name) in (("a", "href"), ("img", "src"))]


def dead_links(
    site: Path,  # folder of pages
) -> list[str]:  # "index.html: 20_data/nowhere.html"
    "Relative links to files that do not exist, or that lie outside the site."
    dead = []
    for page in sorted(site.rglob("*.html")):
        for link in Links(page.read_text(encoding="utf-8")).found:
            path = unquote(link.partition("#")[0])
            target = (page.parent / path).resolve()
            if path and ":" not in path and not (target.is_file() and target.is_relative_to(site.resolve())):
                dead.append(f"{page.relative_to(site)}: {link}")
    return dead


def main() -> int:
    notebooks = sorted(path for path in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    site = ROOT / "_docs"
    write_site(notebooks, site)
    if dead := dead_links(site):
        print("These links lead nowhere: correct them in the notebooks.", *dead, sep="\n  ")
        return 1
    print(f"{len(notebooks)} notebooks are in {site.name}/; start with {site.name}/index.html.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
