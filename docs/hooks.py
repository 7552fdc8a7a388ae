"""What MkDocs does with the page of a notebook after mkdocs-jupyter has converted it.

Every page would repeat the style sheet of JupyterLab (half a megabyte), and load MathJax and Mermaid from other
servers. The style sheet becomes one file of the site, and the scripts go. Headings get unique places to link to, and
the table of contents is read from them.
"""

import re
from html import unescape
from pathlib import Path

from mkdocs.structure.toc import get_toc

STYLE = re.compile(r"<style.*?</style>", re.S)
SCRIPT = re.compile(r"<script.*?</script>", re.S)
COPY = re.compile(  # the button and the text that its script would copy
    r'<div class="zeroclipboard-container">.*?</clipboard-copy>\s*</div>'
    r'|<div class="clipboard-copy-txt" id="cell-\d+">.*?</div>|<div id="cell-\d+" class="clipboard-copy-txt">.*?</div>',
    re.S,
)
HEADING = re.compile(r'<h([1-6]) id="[^"]*">(.*?)<a class="anchor-link".*?</a></h\1>', re.S)
styles: dict[str, None] = {}  # texts of style sheets, each once, in their order


def on_page_content(html, page, config, files):
    "Called by MkDocs with the content of each page."
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    styles.update(dict.fromkeys(re.sub(r"</?style[^>]*>", "", style) for style in STYLE.findall(html)))
    taken, tokens = set(), []

    def numbered(found) -> str:
        name = re.sub(r"<[^>]*>", "", found[2]).replace("¶", "").strip()
        words = re.sub(r"[^\w]+", "-", unescape(name).lower()).strip("-") or "section"
        place, number = words, 1
        while place in taken:
            number += 1
            place = f"{words}-{number}"
        taken.add(place)
        tokens.append(dict(level=int(found[1]), id=place, name=name, children=[]))
        return f'<h{found[1]} id="{place}">{found[2]}<a class="headerlink" href="#{place}">¶</a></h{found[1]}>'

    html = HEADING.sub(numbered, COPY.sub("", SCRIPT.sub("", STYLE.sub("", html))))
    page.toc = get_toc(nested(tokens))
    return html


def nested(
    tokens: list[dict],  # headings in their order, each with its level and an empty list of children
) -> list[dict]:  # those of the highest level, with the others as their children
    "Headings below those that they belong to."
    top, above = [], []
    for token in tokens:
        while above and above[-1]["level"] >= token["level"]:
            above.pop()
        (above[-1]["children"] if above else top).append(token)
        above.append(token)
    return top


def on_post_build(config):
    "Called by MkDocs when all pages are written."
    text = "\n".join(styles)
    Path(config["site_dir"], "assets", "notebook.css").write_text(text, encoding="utf-8")
