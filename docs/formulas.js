// MathJax, which `make docs` copies into the site, typesets the formulas of text. It leaves code and its outputs alone.
window.MathJax = {
  tex: { inlineMath: [["$", "$"], ["\\(", "\\)"]], processEscapes: true },
  options: { ignoreHtmlClass: "md-header|md-tabs|md-sidebar|md-footer|jp-CodeCell", processHtmlClass: "jp-RenderedMarkdown", enableMenu: false },
};
