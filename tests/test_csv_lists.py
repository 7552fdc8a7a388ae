"Data sets from CSV files: everything that spreadsheet programs and hands do to them."

from pathlib import Path

import pytest
from PIL import Image

from dml_nb.data.csv_lists import load_csv

ROWS = [("a/1.png", "cat"), ("a/2.png", "cat"), ("b/1.png", "dog"), ("b/2.png", "dog"), ("c/1.png", "eel"),
        ("c/2.png", "eel"), ("d/1.png", "fox"), ("d/2.png", "fox")]  # fmt: skip
SPLIT = [("train" if label in ("dog", "fox") else "test") for _, label in ROWS]
ROLES = ["query", "gallery", "", "", "gallery", "query", "", ""]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    "A folder with spaces and other letters in its name, and the images of `ROWS`."
    folder = tmp_path / "Bilder für uns"
    for i, (path, _) in enumerate(ROWS):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (i, 0, 0)).save(folder / path)
    return folder


def table(columns: int = 4) -> list[list[str]]:
    "Header and lines with the first columns of path, label, split, role."
    rows = [["path", "label", "split", "role"], *([*row, s, r] for row, s, r in zip(ROWS, SPLIT, ROLES))]
    return [row[:columns] for row in rows]


def save(folder: Path, rows, separator=",", end="\n", encoding="utf-8") -> Path:
    file = folder / "mine.csv"
    file.write_bytes(end.join(separator.join(row) for row in rows).encode(encoding))
    return file


def test_path_and_label_alone(folder):
    data = load_csv(save(folder, table(2)))
    assert data.name == "mine" and (data.train.classes, data.test.classes) == (["cat", "dog"], ["eel", "fox"])
    assert data.train.labels.tolist() == [0, 0, 1, 1]


def test_a_split(folder):
    data = load_csv(save(folder, table(3)))
    assert (data.train.classes, data.test.classes) == (["dog", "fox"], ["cat", "eel"])


def test_ones_own_queries_and_gallery(folder):
    data = load_csv(save(folder, table()))
    assert [p.name for p in data.test.paths] == ["1.png", "2.png", "1.png", "2.png"]
    assert data.test.is_query.tolist() == [True, False, False, True]


def test_a_role_column_without_roles_is_as_none(folder):
    rows = [row[:3] + [""] for row in table()[1:]]
    assert load_csv(save(folder, [table()[0], *rows])).checksum == load_csv(save(folder, table(3))).checksum


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_spreadsheet_programs_write(folder, separator, end, encoding):
    expected = load_csv(save(folder, table()))
    found = load_csv(save(folder, table(), separator, end, encoding))
    assert found.checksum == expected.checksum and found.test.is_query.tolist() == expected.test.is_query.tolist()


def test_windows_paths_quotes_spaces_and_empty_lines(folder):
    expected = load_csv(save(folder, table(3)))
    rows = [[path.replace("/", "\\"), f'"{label}"', f" {split.upper()} "] for path, label, split in table(3)[1:]]
    rows = [["Path", " LABEL", "Split "], *rows[:3], [], ["", "", ""], *rows[3:], []]
    assert load_csv(save(folder, rows)).checksum == expected.checksum


def test_other_columns_are_ignored_and_the_order_is_free(folder):
    rows = [[row[1], "price" if i == 0 else "1,5", row[0]] for i, row in enumerate(table(2))]
    assert load_csv(save(folder, rows, ";")).checksum == load_csv(save(folder, table(2))).checksum


def test_labels_are_text(folder):
    names = dict(cat="007", dog="7", eel="NA", fox="1e3")
    rows = [["path", "label"], *([path, names[label]] for path, label in ROWS)]
    data = load_csv(save(folder, rows))
    assert (data.train.classes, data.test.classes) == (["007", "1e3"], ["7", "NA"])


def test_one_name_in_two_spellings_of_unicode_is_one_class(folder):
    names = dict(cat="caf\u00e9", dog="cafe\u0301", eel="x", fox="y")
    rows = [["path", "label"], *([path, names[label]] for path, label in ROWS)]
    assert load_csv(save(folder, rows)).train.classes == ["caf\u00e9", "x"]


def test_paths_are_relative_to_the_file_or_absolute(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    absolute = [["path", "label"], *([str(folder / path), label] for path, label in ROWS)]
    assert load_csv(save(folder, absolute)).checksum == load_csv(save(folder, table(2))).checksum
    assert len(load_csv("Bilder für uns/mine.csv").train) == 4


def changed(line: int, column: int, value: str):
    "The whole table with another cell; line 1 is the header."
    rows = table()
    rows[line - 1][column] = value
    return rows


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "mine.csv, line 1: no column path and label: the first line must name the columns, path,label"),
        (table()[1:], "line 1: no column path and label: .* got 'a/1.png,cat,test,query'"),
        (table()[:1], "mine.csv names no image"),
        (changed(1, 1, "class"), "line 1: no column label"),
        (changed(3, 0, ""), "line 3: the cell path is empty"),
        (changed(3, 1, " "), "line 3: the cell label is empty"),
        (changed(3, 2, ""), "line 3: the cell split is empty"),
        (changed(3, 2, "tset"), "line 3: unknown split 'tset': did you mean 'test'"),
        (changed(3, 3, "galery"), "line 3: unknown role 'galery': did you mean 'gallery'"),
        (changed(3, 3, ""), "line 3: the test image has no role"),
        (changed(4, 3, "query"), "line 4: the train image has the role 'query'"),
        (changed(3, 0, "a/1.png"), "line 3 names 'a/1.png' again in line 2"),
        (changed(6, 0, "b/../a/1.png"), "line 6 names 'b/../a/1.png' with label 'eel', but with 'cat' in line 2"),
        (changed(4, 1, "cat"), "class 'cat' is for test in line 2 and for train in line 4"),
        (changed(3, 3, "query"), "1 classes of mine have queries but no gallery image, such as cat"),
        ([row[:2] + row[3:] for row in table()], "line 1: a column role needs a column split"),
        ([[*row[:2], "train"] if i else row[:3] for i, row in enumerate(table())], "has no class for test"),
        ([*table(2), ["e/1.png"]], "line 10: it has another number of cells than the first line"),
        ([*table(2), ["e/1.png", "x", "y"]], "line 10: it has another number of cells than the first line"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(folder, rows, message):
    with pytest.raises(ValueError, match=message) as error:
        load_csv(save(folder, rows))
    assert "\n" not in str(error.value)


def test_missing_files_are_named(folder):
    with pytest.raises(
        FileNotFoundError, match="2 of 8 images of .* 'a/x.png' \\(line 2\\), 'c' \\(line 6\\). Paths are"
    ):
        rows = changed(2, 0, "a/x.png")
        rows[5][0] = "c"  # a folder
        load_csv(save(folder, rows))
    with pytest.raises(FileNotFoundError, match="none.csv does not exist"):
        load_csv(folder / "none.csv")


def test_a_class_with_one_image(folder):
    data = load_csv(save(folder, table(2)[:-1]))
    assert data.test.labels.bincount().tolist() == [2, 1]
    with pytest.raises(ValueError, match="no class has two images"):
        load_csv(save(folder, [table(2)[0], *table(2)[1::2]]))


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_another_encoding_is_named(folder, encoding):
    with pytest.raises(ValueError, match="is not text in UTF-8 .*: save it as 'CSV UTF-8'"):
        load_csv(save(folder, changed(2, 1, "Käfer"), encoding=encoding))


def test_a_quotation_mark_that_is_never_closed(folder):
    with pytest.raises(ValueError, match="mine.csv, line 2: .*: correct the quotation marks"):
        load_csv(save(folder, changed(2, 1, '"cat')))


def test_an_unreadable_image_can_be_left_out(folder):
    (folder / "a/1.png").write_text("not an image", encoding="utf-8")
    file = save(folder, table())
    with pytest.raises(ValueError, match="cannot be read"):
        load_csv(file)
    with pytest.warns(UserWarning, match="left out"):
        assert load_csv(file, on_corrupt="skip").test.is_query.tolist() == [False, False, True]
    (folder / "c/1.png").write_text("not an image", encoding="utf-8")
    (folder / "a/1.png").write_bytes((folder / "a/2.png").read_bytes())
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="queries but no gallery image"):
        load_csv(file, on_corrupt="skip")
