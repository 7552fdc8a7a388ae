"Text files and the output of commands are UTF-8, also where the system's own encoding is another."

import ast
from pathlib import Path
from shutil import copytree

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("dml_nb", "tests", "benchmarks", ".") for path in sorted((ROOT / folder).glob("*.py"))]
FILES += sorted((ROOT / "dml_nb").glob("*/**/*.py"))


def is_binary(call: ast.Call, position: int, default: str) -> bool:
    "Does the mode of a call that opens a file contain a b?"
    given = [word.value for word in call.keywords if word.arg == "mode"] + call.args[position : position + 1]
    mode = given[0] if given else ast.Constant(default)
    return not isinstance(mode, ast.Constant) or "b" in str(mode.value)


def lacks_encoding(call: ast.Call) -> bool:
    "Does a call read or write text in the encoding of the system?"
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    words = {word.arg for word in call.keywords}
    if "encoding" in words or None in words:  # None: **options
        return False
    if name == "read_text":
        return len(call.args) < 1
    if name == "write_text":
        return len(call.args) < 2
    if name == "open" and isinstance(call.func, ast.Name):
        return not is_binary(call, 1, "r")
    if name in ("NamedTemporaryFile", "TemporaryFile"):
        return not is_binary(call, 0, "w+b")
    texts = [word for word in call.keywords if word.arg in ("text", "universal_newlines")]
    return any(not isinstance(word.value, ast.Constant) or word.value.value for word in texts)


@pytest.mark.parametrize(
    "code, lacks",
    [
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("open(path, mode='wb')", False),
        ("open(path, encoding='utf-8')", False),
        ("Image.open(path)", False),
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("path.write_text(text, 'utf-8')", False),
        ("NamedTemporaryFile(dir=folder)", False),
        ("NamedTemporaryFile('w')", True),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8')", False),
    ],
)
def test_calls_that_lack_an_encoding_are_recognised(code, lacks):
    assert lacks_encoding(ast.parse(code).body[0].value) is lacks


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_text_is_read_and_written_with_an_encoding(file):
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert [f"line {call.lineno}: {ast.unparse(call)}" for call in calls if lacks_encoding(call)] == []


@pytest.fixture
def ascii_alone(dml_nb):
    "The command in a terminal whose locale knows ASCII alone."
    dml_nb.environment |= dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    return dml_nb


TINY = ["--backbone", "small_cnn", "--set", "embedding_size=32", "--set", "batch_size=24", "--set", "epochs=1"]


def test_a_run_is_reported_without_a_utf8_locale(ascii_alone, glyph_folder):
    "Dots between names, plus-minus signs and the notebook itself are no ASCII."
    assert "1 done, 0 failed" in ascii_alone("run", "Proxy Anchor", "--dataset", glyph_folder, "--seeds", "0", *TINY)
    ascii_alone("report")
    written = (ascii_alone.folder / "runs" / "report.md").read_text(encoding="utf-8")
    assert "letters" in written and "Â" not in written


def test_a_folder_whose_name_is_no_text_in_the_locale_is_refused_before_the_run(ascii_alone, glyph_folder):
    copytree(glyph_folder, ascii_alone.folder / "Blätter")
    output = ascii_alone("run", "Proxy Anchor", "--dataset", "Blätter", *TINY, status=1)
    assert "set PYTHONUTF8=1, or rename the folder" in output
    assert not (ascii_alone.folder / "runs").exists()
