"Stored runs stay valid: the imports of their notebooks work, and their results can be read."

import ast
import json
from pathlib import Path

import pytest

from dml_nb.core.renamed import NAMES, current_loss, find_old_name
from dml_nb.experiments.recipes import settings_for
from dml_nb.experiments.run_store import read_result
from dml_nb.experiments.tables import row_of
from dml_nb.losses import create_loss

RUNS = Path(__file__).parents[1] / "runs"


def imports_of(notebook: Path) -> set[str]:
    "The lines that import from this package, each name in a line of its own."
    found = set()
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code" or "dml_nb" not in "".join(cell["source"]):
            continue
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dml_nb":
                found |= {f"from {node.module} import {alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {f"import {a.name}" for a in node.names if a.name.split(".")[0] == "dml_nb"}
    return found


STORED = sorted({line for notebook in RUNS.glob("**/*.ipynb") for line in imports_of(notebook)})


@pytest.mark.parametrize("line", STORED)
def test_what_a_stored_notebook_imports_can_be_imported(line):
    exec(line, {})


def test_every_old_name_leads_to_a_name_of_today():
    for old in NAMES:
        assert find_old_name(*old.rsplit(".", 1)), old


def test_every_stored_result_can_be_read_and_its_loss_can_be_built():
    results = [read_result(path) for path in RUNS.glob("**/result.json")]
    assert len(results) >= 788
    built = {(r["settings"]["loss"], json.dumps(r["settings"]["params"], sort_keys=True)) for r in results}
    for loss, params in sorted(built):
        name, params = current_loss(loss, json.loads(params))
        assert create_loss(name, num_classes=100, embedding_size=8, **params)


def test_the_settings_of_every_stored_run_can_be_asked_for_again():
    "As `dml_nb run ROW --set name=value` does; the loss that takes a parameter today may be another one."
    stored = {}
    for path in RUNS.glob("**/params.json"):
        params = json.loads(path.read_text(encoding="utf-8"))
        s = params["settings"]
        stored[params["row"], s["dataset"], json.dumps(s, sort_keys=True)] = s
    for (row, dataset, _), s in stored.items():
        fixed = {"dataset", "backbone", "regime", "loss", "params", "embedding_size"}
        asked = {name: value for name, value in s.items() if name not in fixed}
        asked |= {f"loss.{name}": value for name, value in s["params"].items() if name != "preset"}  # a recipe's alone
        again = settings_for(row_of(row), dataset, s["backbone"], s["regime"], **asked)
        assert again["params"] | s["params"] == again["params"], row
