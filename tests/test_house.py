"""The rules of the house: where a thing is can be guessed, and nothing is met before its explanation.

`nbs/40_losses/09_cbml.ipynb` is the module `dml_nb/losses/cbml.py`. Folders are floors in the order in which they build
on each other; inside a floor two digits give the reading order.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dml_nb"
NOTEBOOKS = {path: nbformat.read(path, as_version=4) for path in sorted(ROOT.glob("nbs/[0-9]*/*.ipynb"))}


def module_of(notebook) -> str | None:
    "The module that a notebook exports, such as `losses.cbml`."
    for cell in notebook.cells:
        if found := re.search(r"#\|\s*default_exp\s+(\S+)", cell.source if cell.cell_type == "code" else ""):
            return found[1]
    return None


EXPORTING = {module: path for path, notebook in NOTEBOOKS.items() if (module := module_of(notebook))}
ORDER = {module: number for number, module in enumerate(EXPORTING)}
SOURCE = {module: (PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8") for module in EXPORTING}
PACKAGES = sorted({module.split(".")[0] for module in EXPORTING})


def imports_of(module: str) -> set[str]:
    "The modules of this package that a module imports, wherever in its code."
    found = set()
    for node in ast.walk(ast.parse(SOURCE[module])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["dml_nb", *module.split(".")[: -node.level], *filter(None, [base])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix("dml_nb.") for name in names} & ORDER.keys()
    return found


def public_names(module: str) -> dict[str, str]:
    "Top-level functions, classes and constants without a leading underscore, each with its kind."
    found = {}
    for node in ast.parse(SOURCE[module]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            patched = any("patch" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not patched:
                found[node.name] = type(node).__name__
        elif isinstance(node, ast.Assign):
            found |= {target.id: "constant" for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = "constant"
    return {name: kind for name, kind in found.items() if not name.startswith("_")}


def public_functions(module: str) -> dict[str, ast.FunctionDef]:
    "Functions, and methods of classes, without a leading underscore."
    found = {}
    for node in ast.parse(SOURCE[module]).body:
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(function, ast.FunctionDef):
                found[f"{owner}{function.name}:{function.lineno}"] = function
    return {name: node for name, node in found.items() if not name.startswith("_") and "._" not in name}


def test_floors_and_notebooks_are_numbered_by_two_digits():
    for path in NOTEBOOKS:
        assert re.fullmatch(r"\d\d_[a-z]+/\d\d_[a-z0-9_]+\.ipynb", f"{path.parent.name}/{path.name}"), path
    for floor in {path.parent for path in NOTEBOOKS}:
        numbers = [path.name[:2] for path in NOTEBOOKS if path.parent == floor]
        assert len(numbers) == len(set(numbers)), f"two notebooks of {floor.name} share a number"


def test_a_notebook_exports_the_module_of_its_name():
    for module, path in EXPORTING.items():
        assert module == f"{path.parent.name[3:]}.{path.stem[3:]}", path
    written = {str(p.relative_to(PACKAGE).with_suffix("")).replace("/", ".") for p in PACKAGE.glob("*/*.py")}
    assert {m for m in written if not m.endswith("__init__")} == set(EXPORTING), "a module without a notebook"


@pytest.mark.parametrize("module", EXPORTING)
def test_imports_point_to_earlier_notebooks(module):
    later = [other for other in imports_of(module) if ORDER[other] >= ORDER[module]]
    assert not later, f"{module} imports {later}, which a reader meets later"


def test_no_two_modules_share_a_name():
    names = [module.split(".")[1] for module in EXPORTING]
    assert sorted(names) == sorted(set(names))


def test_nothing_is_defined_twice():
    owners = defaultdict(list)
    for module in EXPORTING:
        for name in public_names(module):
            owners[name].append(module)
    assert {name: where for name, where in owners.items() if len(where) > 1} == {}


def test_no_name_hides_a_module():
    for package in PACKAGES:
        modules = {module.split(".")[1] for module in EXPORTING if module.startswith(f"{package}.")}
        for module in EXPORTING:
            if module.startswith(f"{package}."):
                assert not modules & public_names(module).keys(), module
        tree = ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))
        exported = {
            alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names
        }
        assert not modules & exported, f"dml_nb.{package} hides {modules & exported}"


def test_modules_fit_into_one_reading():
    long = {module: len(text.splitlines()) for module, text in SOURCE.items() if len(text.splitlines()) > 350}
    assert long == {}


@pytest.mark.parametrize("module", [module for module in EXPORTING if module.split(".")[0] != "face"])
def test_every_parameter_has_a_line_and_a_comment_of_its_own(module):
    lines = SOURCE[module].splitlines()
    for name, function in public_functions(module).items():
        given = [each for each in [*function.args.args, *function.args.kwonlyargs] if each.arg not in ("self", "cls")]
        starts = [each.lineno for each in given]
        assert len(set(starts)) == len(starts), f"{module}.{name} has two parameters in one line"
        for each in given:
            assert "#" in lines[each.end_lineno - 1], f"{module}.{name}: {each.arg} has no comment"


def test_the_package_needs_no_nbdev():
    for module, text in SOURCE.items():
        assert not re.search(r"^\s*(from|import) nbdev", text, re.M), module


TEXTS = [
    *ROOT.glob("nbs/**/*.ipynb"),
    *PACKAGE.rglob("*.py"),
    *PACKAGE.rglob("*.json"),
    *ROOT.glob("*.md"),
    *ROOT.glob("tests/*.py"),
    *ROOT.glob("benchmarks/*.py"),
]


def test_only_published_sources_are_cited():
    "A reader can look up a paper, an equation or a repository; a working paper of ours is not in this repository."
    titles = "|".join(["METH" + "ODS", "DES" + "IGN", "BR" + "IEF"])
    known = {path.name for path in ROOT.glob("*.md")} | {"report.md", "card.md"}  # written by `dml_nb report`, `train`
    unpublished = {}
    for file in TEXTS:
        text = file.read_text(encoding="utf-8")
        named = {name for name in re.findall(r"(?<![\w/.-])[\w-]+\.md\b", text) if name not in known}
        if found := named | set(re.findall(rf"\b(?:{titles})\b|\b[Ii]ssue #\d+", text)):
            unpublished[str(file.relative_to(ROOT))] = found
    assert unpublished == {}


def test_no_text_names_a_folder_of_the_machine_on_which_it_was_written():
    folder = re.compile(r"/(?:work|root|Users|home)/\w+")
    named = {str(f.relative_to(ROOT)): set(folder.findall(f.read_text(encoding="utf-8"))) for f in TEXTS}
    assert {file: found for file, found in named.items() if found} == {}


def test_every_notebook_of_a_loss_shows_paper_code_and_effect():
    parts = ("In the paper", "In code", "See it", "Proof")
    missing = {}
    for path, notebook in NOTEBOOKS.items():
        sources = [cell.source for cell in notebook.cells]
        if path.parent.name == "40_losses" and any(s.startswith("#| export") and "@register(" in s for s in sources):
            lacking = [part for part in parts if not any(re.match(rf"##+ {part}", s) for s in sources)]
            missing |= {path.stem: lacking} if lacking else {}
    assert missing == {}
