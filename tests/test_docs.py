"The web site: links of the notebooks lead somewhere, they become links between pages, and a dead link is found."

import re

import nbformat
from make_docs import ROOT, dead_links, write_site

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)")


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


def test_links_become_links_between_pages(tmp_path):
    top, site = tmp_path / "nbs", tmp_path / "site"
    texts = {
        "index.ipynb": "# Start\n[data](../nbs/20_data), [folders](20_data/03_folders.ipynb#a-title)",
        "20_data/03_folders.ipynb": "# Folders\n> Reads folders\n\n[back](../index.ipynb), [other](https://example.org)",
    }
    for name, text in texts.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), top / name)
    write_site([top / name for name in texts], site, top)
    assert dead_links(site) == []
    start, contents = site / "index.html", site / "20_data" / "index.html"
    assert all(
        f'href="20_data/{page}"' in start.read_text(encoding="utf-8")
        for page in ("index.html", "03_folders.html#a-title")
    )
    assert 'href="03_folders.html"' in contents.read_text(encoding="utf-8") and "Reads folders" in contents.read_text(
        encoding="utf-8"
    )
    contents.unlink()
    assert dead_links(site) == ["index.html: 20_data/index.html"]
