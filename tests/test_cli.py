"The command line as a new user meets it: wrong names, values, folders and locales; every remedy in a message works."

import json
import os
import re
import shlex
import subprocess
import warnings
from pathlib import Path
from shutil import copytree

import pytest

from dml_nb.core.files import data_root
from dml_nb.data.datasets import is_here
from dml_nb.experiments import batch, tune
from dml_nb.face import cli, command_text

RUN = ("run", "circle", "--dataset", "glyphs")
TUNE = ("tune", "MS", "--dataset", "glyphs", "--backbone", "small_cnn", "--regime", "finetune")


@pytest.mark.parametrize(
    "args, status, message",
    [
        (["nope"], 2, "No such command 'nope'"),
        (["rows", "nope"], 1, "unknown table, row or method 'nope'"),
        (["rows", ""], 1, "there is no table, row or method ''"),
        (["rows", "a", "b"], 2, "unexpected extra argument"),
        (["run"], 2, "Missing argument"),
        (["data"], 2, "Missing argument"),
        (["data", ""], 1, "a data set is a name such as 'cub'"),
        (["data", "/nope"], 1, "folder /nope does not exist"),
        (["data", "a.txt"], 1, "a.txt is a file, not a folder"),
        (["data", "./a.txt"], 1, "a.txt is a file, not a folder"),
        (["data", "none.csv"], 1, "none.csv does not exist"),
        (["data", "glyhps"], 1, "did you mean 'glyphs'?"),
        (["data", "cub", "--root", ""], 2, "'' is not a folder"),
        (["data", "cub", "--root", "a.txt"], 2, "'a.txt' is not a folder"),
        (["data", "cub", "--root", "nope"], 1, "CUB needs images.txt and image_class_labels.txt in nope/CUB_200_2011"),
        (["data", "groceries", "--root", "nope"], 1, "groceries needs natural in nope/groceries"),
        (["data", "glyphs", "--root", "."], 1, "comes with the package: leave out --root."),
        (["data", "glyphs", "--noise", "20%"], 1, "--noise needs --show"),
        (["data", "glyphs", "--show", "--noise", "0.2"], 1, "--noise expects a percentage, got '0.2'"),
        (["data", "glyphs", "--out", "a.txt"], 2, "'a.txt' is not a folder"),
        (["run", "II", "--dataset", "/nope"], 1, "folder /nope does not exist"),
        ([*RUN, "--seeds", ""], 1, "--seeds expects whole numbers separated by commas, got ''"),
        ([*RUN, "--seeds", "0,"], 1, "got '0,': for example --seeds 0,1,2"),
        ([*RUN, "--seeds", "-1"], 1, "got '-1'"),
        ([*RUN, "--set", ""], 1, "--set expects key=value, got ''"),
        ([*RUN, "--set", "=5"], 1, "--set expects key=value, got '=5'"),
        ([*RUN, "--set", "epochs="], 1, "epochs must be a whole number, got ''"),
        ([*RUN, "--set", "epochs=x"], 1, "epochs must be a whole number, got 'x'"),
        ([*RUN, "--set", "epoch=3"], 1, "did you mean 'epochs'?"),
        ([*RUN, "--set", "lr=Infinity"], 1, "lr must be a number, got inf"),
        ([*RUN, "--set", "seed=0"], 1, "--set cannot change the seed: `dml_nb run --help`"),
        ([*RUN, "--set", "rows=0"], 1, "--set cannot change the rows"),
        ([*RUN, "--set", "loss=triplet"], 1, "--set cannot change the loss"),
        ([*RUN, "--num-cpus", "2"], 1, "--num-cpus needs --cluster"),
        ([*RUN, "--num-cpus", "-1", "--cluster", "local"], 2, "--num-cpus"),
        ([*RUN, "--retries", "-1"], 2, "--retries"),
        ([*RUN, "--out", ""], 2, "'' is not a folder"),
        ([*RUN, "--out", "a.txt"], 2, "'a.txt' is not a folder"),
        (["report", "--runs", ""], 2, "'' is not a folder"),
        (["report", "--runs", "a.txt"], 2, "'a.txt' is not a folder"),
        (["report", "--runs", "nope"], 1, "the results folder nope does not exist"),
        (["quickstart", "--epochs", "0"], 2, "--epochs"),
        (["quickstart", "--out", "a.txt"], 2, "'a.txt' is not a folder"),
        (["bench", ""], 1, "unknown benchmark ''"),
        (["tune", "MS", "--dataset", "glyphs"], 2, "Missing option '--backbone'"),
        (["tune", "Devide-Conquer", *TUNE[2:]], 1, "states no values to try for the loss divide_and_conquer"),
        (["tune", "own/norm-softmax", *TUNE[2:]], 1, "states no values to try for the loss norm_softmax"),
        ([*TUNE, "--regime", "nope"], 1, "unknown regime 'nope'"),
        ([*TUNE, "--set", "lr=1"], 1, "the search itself sets lr: leave out --set lr"),
        ([*TUNE, "--set", "loss.base=1"], 1, "the search itself sets loss.base"),
        ([*TUNE, "--set", "holdout=3"], 1, "the search itself sets holdout"),
        ([*TUNE, "--set", "noise=20%"], 1, "the search itself sets noise"),
        ([*TUNE, "--set", "epoch=3"], 1, "did you mean 'epochs'?"),
        ([*TUNE, "--set", "epochs=0"], 1, "epochs must be at least 1"),
        ([*TUNE, "--set", "dataset=cub"], 1, "--set cannot change the dataset"),
        ([*TUNE, "--out", "a.txt"], 2, "'a.txt' is not a folder"),
    ],
)
def test_a_wrong_option_is_one_clear_sentence(shell, args, status, message):
    Path("a.txt").write_text("no folder", encoding="utf-8")
    output = shell(*args, status=status)
    assert message in output and "Traceback" not in output
    assert os.listdir() == ["a.txt"]


def test_settings_are_checked_for_every_loss_before_the_first_is_searched(shell, monkeypatch):
    monkeypatch.setattr(tune, "run_trial", lambda *args, **settings: pytest.fail("a trial was started"))
    output = shell("tune", "Proxy Anchor", "MS", *TUNE[2:], "--set", "batch_size=7", status=1)
    assert "batch_size 7 is not a multiple of per_class 5" in output
    assert "run these rows apart" in shell("tune", "Proxy Anchor", "MS", *TUNE[2:], "--set", "beta=2", status=1)


def test_errors_go_to_stderr_and_the_exit_status_tells(dml_nb):
    def call(*args):
        options = dict(cwd=dml_nb.folder, env=dml_nb.environment, capture_output=True, encoding="utf-8")
        return subprocess.run([dml_nb.command, *args], **options)

    wrong = call("rows", "nope")
    assert (wrong.returncode, wrong.stdout) == (1, "") and wrong.stderr.startswith("dml_nb: unknown table")
    good = call("rows", "II")
    assert (good.returncode, good.stderr) == (0, "") and "\x1b" not in good.stdout
    assert call("--help").stdout.isascii()


def test_a_closed_pipe_is_quiet(dml_nb):
    command = f"{shlex.quote(str(dml_nb.command))} rows | head -n 1"
    done = subprocess.run(command, shell=True, env=dml_nb.environment, capture_output=True, encoding="utf-8")
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""


def test_a_terminal_without_a_locale(dml_nb, glyph_folder):
    folder = Path(copytree(glyph_folder, dml_nb.folder / "letters"))
    os.rename(folder / "a", folder / "ä")
    dml_nb.environment.update(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert re.search("train classes +6\n", dml_nb("data", "letters"))
    (folder / "ä" / "broken.png").write_bytes(b"")
    assert "broken.png" in dml_nb("data", "letters", status=1)


def test_words_that_a_terminal_lacks_are_escaped(shell, monkeypatch):
    monkeypatch.setattr(cli, "parse_seeds", lambda text: print("±·é≤") or [0])
    monkeypatch.setattr(batch, "run_rows", lambda *args, **settings: ([], []))
    from typer.testing import CliRunner

    for charset, expected in {"latin-1": "±·é\\u2264", "ascii": "±·é≤", "utf-8": "±·é≤"}.items():
        done = CliRunner(charset=charset).invoke(cli.app, [*RUN])
        assert done.exit_code == 0, done.output
        assert expected in done.stdout_bytes.decode("latin-1" if charset == "latin-1" else "utf-8")


def test_paths_in_every_spelling_are_the_same_folder(shell, glyph_folder, monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    folder = Path(copytree(glyph_folder, "my pictures é"))
    outputs = set()
    for path in (folder, f"./{folder}/", folder.resolve(), f"~/{folder}", f"{folder}/../{folder}"):
        outputs.add(shell("data", path))
    monkeypatch.chdir(folder)
    outputs |= {shell("data", "."), shell("data", "../my pictures é")}
    assert len(outputs) == 1 and re.match("name +my pictures é\n", outputs.pop())


def test_a_data_set_is_shown_by_its_counts_hashes_and_terms(shell, glyph_folder):
    "A copy given by --root is only read; a second call prints the same."
    output = shell("data", "groceries-mini")
    assert output == shell("data", "groceries-mini")
    shown = dict(re.split(" {2,}|(?<=cite) ", line, maxsplit=1) for line in output.splitlines())
    assert (shown["train images"], shown["test classes"]) == ("984", "40")
    assert re.fullmatch("[0-9a-f]{64}", shown["list"]) and re.fullmatch("[0-9a-f]{32}", shown["content"])
    assert shown["terms"] == "MIT licence" and "WACV 2019" in shown["please cite"]
    assert "terms" not in shell("data", glyph_folder) and not list(glyph_folder.glob("*.json"))


def test_a_page_shows_a_data_set_with_wrong_labels(shell, glyph_folder):
    output = shell("data", glyph_folder, "--show", "--noise", "20%")
    file = Path("runs/data-letters.html")
    assert re.search(f"page +{file}\n", output)
    page = file.read_text(encoding="utf-8")
    assert page.count("<img") > 50 and "Wrong labels" in page and "symmetric 20%" in page
    shell("data", glyph_folder, "--show", "--out", "pages")
    assert "Wrong labels" not in Path("pages/data-letters.html").read_text(encoding="utf-8")


def test_published_data_sets_are_verified_in_place(shell):
    "The copies in the data root, if there are any."
    found = [name for name in ("groceries", "groceries-iconic", "cub") if is_here(name)]
    if not found:
        pytest.skip("neither groceries nor cub are here: set DML_NB_DATA to the folder that holds them")
    for name in found:
        folder = data_root() / ("CUB_200_2011" if name == "cub" else "groceries")
        before = sorted(folder.iterdir())
        output = shell("data", name, "--root", folder)
        counts = {"cub": ("5,864", "5,924"), "groceries": ("2,544", "2,877"), "groceries-iconic": ("2,544", "2,917")}
        assert re.findall("(?:train|test) images +(.*)", output) == list(counts[name])
        assert str(folder.resolve()) in output and sorted(folder.iterdir()) == before


def test_a_data_set_without_an_address_says_what_to_do(shell, monkeypatch, tmp_path):
    monkeypatch.setenv("DML_NB_DATA", str(tmp_path / "data"))
    output = shell("data", "inshop", status=1)
    for part in ("1. Open https://", "img_highres", "  img/MEN/Denim/", "Please cite Z. Liu"):
        assert part in output
    assert not (tmp_path / "data").exists()


def test_home_is_expanded_in_a_folder_for_results(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command_text.parse_folder("~/runs") == tmp_path / "runs"


def test_the_advice_to_skip_unreadable_files_names_the_option(shell, glyph_folder, monkeypatch):
    "The library names its argument, the command line its option; the option works in all three commands."
    monkeypatch.setattr(tune, "run_trial", lambda row, folds, **settings: {"R@1": 0.5, "MAP@R": 0.5})
    monkeypatch.setattr(batch, "_one_by_one", lambda jobs, out, retries: (job for job in ()))
    folder = Path(copytree(glyph_folder, "damaged"))
    (folder / "a" / "broken.png").write_bytes(b"no picture")
    for args in (
        ["data", "damaged"],
        ["run", "circle", "--dataset", "damaged", "--set", "batch_size=10"],
        ["tune", "MS", "--dataset", "damaged", *TUNE[4:], "--set", "batch_size=10"],
    ):
        output = shell(*args, status=1)
        assert "145 files" in output and "broken.png" in output
        assert "leave them out with --skip-corrupt." in output and "on_corrupt" not in output
        output = shell(*args, "--skip-corrupt")
        assert "dml_nb: warning" in output and output.count("broken.png") == 1 and ".py" not in output


@pytest.mark.parametrize("folder", [".", "a"])
def test_a_folder_without_permission_is_named(shell, glyph_folder, monkeypatch, folder):
    "The superuser may read everything, so the refusal is simulated."
    copytree(glyph_folder, "pictures")
    scandir, refused = os.scandir, os.path.realpath(f"pictures/{folder}")

    def refuse(path="."):
        if os.path.realpath(path) == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    output = shell("data", "pictures", status=1)
    assert os.path.basename(refused) in output and "permission" in output.lower() and "Errno" not in output


def test_a_place_that_cannot_be_written_is_named(shell, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied", "/read/only")

    monkeypatch.setattr(batch, "run_rows", refuse)
    assert shell(*RUN, status=1) == "dml_nb: /read/only: Permission denied. Check the path and its permissions.\n"


def test_a_warning_is_shown_once_and_as_one_line(shell, monkeypatch):
    def warn(*args, **settings):
        for _ in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("few pictures.", stacklevel=1)
        return [], []

    monkeypatch.setattr(batch, "run_rows", warn)
    assert shell(*RUN).count("dml_nb: warning: few pictures.\n") == 1


def test_all_runs_failed_lists_no_notebooks(shell, monkeypatch):
    monkeypatch.setattr(batch, "run_rows", lambda *args, **settings: ([], ["failure"]))
    output = shell(*RUN, status=1)
    assert "No run has finished." in output and "Notebooks" not in output


def test_a_search_on_eight_classes_and_the_command_that_it_prints(shell, glyph_folder, tmp_path, monkeypatch):
    "The trials lie in the folder of --out, the same command skips them, and the printed command runs when pasted."
    monkeypatch.setattr(tune, "search_rule", lambda loss: dict(base=[0.5, 0.3], lr=[1e-4]))
    folder = copytree(glyph_folder, tmp_path / "my é pictures")
    for letter in "ijkl":
        for file in (folder / letter).iterdir():
            file.unlink()
        (folder / letter).rmdir()
    (folder / "a" / "broken.png").write_bytes(b"no picture")
    options = ["--set", "epochs=1", "--set", "batch_size=10", "--set", "warm_epochs=0", "--skip-corrupt"]
    searching = ["tune", "MS", "--dataset", folder, *TUNE[4:], *options, "--out", "found"]
    output = shell(*searching)
    assert [p.name for p in Path("found").iterdir()] == ["my-pictures-small_cnn-finetune-multi_similarity.csv"]
    assert not [*folder.glob("*.csv")] and "at least 2 trials" in output
    again = shell(*searching)
    assert again.count("finished before") == output.count(" s\n") >= 2
    assert again.splitlines()[-1] == output.splitlines()[-1]
    command = shlex.split(output.splitlines()[-1])
    assert command[0] == "dml_nb"
    assert "1 done, 0 failed: 1 run now" in shell(*command[1:])


def test_ctrl_c_during_a_search_says_how_it_goes_on(shell, monkeypatch):
    scores = iter([0.5, KeyboardInterrupt()])

    def run_trial(row, folds, **settings):
        if isinstance(score := next(scores), KeyboardInterrupt):
            raise score
        return {"R@1": score, "MAP@R": score}

    monkeypatch.setattr(tune, "run_trial", run_trial)
    last = shell(*TUNE, status=130).splitlines()[-1]
    assert last == "interrupted; the same command continues after the last finished trial"
    scores = iter([0.5] * 20)
    assert shell(*TUNE).count("finished before") == 1


@pytest.mark.parametrize("args", [["rows"], ["data", "glyphs"], ["report"], [*RUN], ["bench", "losses"]])
def test_ctrl_c_is_quiet(shell, monkeypatch, args):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    for place in (
        "dml_nb.experiments.tables.all_rows",
        "dml_nb.data.preparation.load_dataset",
        "dml_nb.experiments.results.load_results",
        "dml_nb.experiments.batch.run_rows",
        "subprocess.run",
    ):
        monkeypatch.setattr(place, interrupt)
    assert shell(*args, status=130) == ""


# what every command shares


@pytest.fixture
def invoke(shell):
    "Every command inside the test process; standard output and standard error stay apart."
    from typer.testing import CliRunner

    from dml_nb.face.search_cli import app

    return lambda *args, **options: CliRunner().invoke(app, [str(arg) for arg in args], **options)


def test_every_help_has_an_example_and_the_exit_status(invoke):
    from dml_nb.face.search_cli import app

    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert {"rows", "run", "train", "search"} <= {*names}
    for name in [None, *names]:
        text = " ".join(invoke(*([name] if name else []), "--help").stdout.split())
        assert f"dml_nb {name or 'train photos'}" in text and "Exit status: 0 done, 1 an error" in text, name


@pytest.mark.parametrize("args", [["--help"], ["rows", "nope"], ["nope"]])
def test_without_colours_output_is_plain(dml_nb, args):
    "Even if another variable asks for colours, as some continuous integration does."
    environment = dml_nb.environment | dict(NO_COLOR="1", FORCE_COLOR="1", PY_COLORS="1", TERM="xterm-256color")
    done = subprocess.run([dml_nb.command, *args], env=environment, capture_output=True)
    assert (done.stdout or done.stderr) and b"\x1b" not in done.stdout + done.stderr


def test_commands_start_in_less_than_a_second(dml_nb):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--unlabelled" in dml_nb("train", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    "words, expected",
    [
        ("rows 002-II", ["002-II", "002-III"]),
        ("run 002-II/cub-cp-pa-k-3", ["002-II/cub-cp-pa-k-3"]),
        ("recipe proxy_an", ["proxy_anchor"]),
        ("data gly", ["glyphs"]),
        ("tune MS --backbone small", ["small_cnn"]),
        ("report 002-II", ["002-II", "002-III"]),
        ("ru", ["run"]),
    ],
)
def test_the_shell_completes_names(invoke, words, expected):
    words = f"dml_nb {words}"
    asked = dict(_DML_NB_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
    assert invoke(env=asked, prog_name="dml_nb").stdout.split() == expected


def test_json_is_the_only_output_and_has_what_the_text_says(invoke, glyph_folder):
    def answer(*args):
        done = invoke(*args, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    listed = answer("rows", "II")
    assert len(listed) == 20 and listed[0]["claimed"].keys() >= {"R@1"} and listed[0]["can_run"] in (True, False)
    assert [row["id"] for row in answer("rows", "002-II/cub-cp-pa-k-3")] == ["002-II/cub-cp-pa-k-3"]
    assert "softtriple" in answer("recipe")
    values = answer("recipe", "own/circle", "--dataset", "glyphs", "--backbone", "small_cnn", "--set", "epochs=3")
    assert values["epochs"] == dict(value=3, source="asked for", guess=False)
    assert answer("data", glyph_folder)["train classes"] == 6
    ours = answer("report", "--runs", Path(__file__).parents[1] / "runs" / "000-T6", "--out", "out")
    assert len(ours["rows"]) > 1 and all(Path(path).is_file() for path in ours["written"])


def test_progress_of_a_run_goes_to_stderr(invoke, monkeypatch):
    def run_rows(*args, **settings):
        print("one row is running")
        return [Path("runs/a")], []

    monkeypatch.setattr(batch, "run_rows", run_rows)
    shown, quiet, as_json = invoke(*RUN), invoke(*RUN, "--quiet"), invoke(*RUN, "--json")
    assert shown.stderr == as_json.stderr == "one row is running\n" and quiet.stderr == ""
    assert shown.stdout == quiet.stdout == "No run has finished.\n"
    assert json.loads(as_json.stdout) == dict(done=["runs/a"], failed=[])


def test_an_interrupted_training_without_labels_continues(invoke, glyph_folder, monkeypatch):
    from dml_nb.face.model_folder import TRAINING, load_model
    from dml_nb.training.checkpoint import Checkpoint

    def train(out, status=0):
        settings = [
            f"--set={setting}" for setting in ("epochs=3", "embedding_size=8", "batch_size=6", "second_size=12")
        ]
        done = invoke(
            "train", glyph_folder / "a", "--unlabelled", "--backbone", "small_cnn", *settings, "-o", out, "--json"
        )
        assert done.exit_code == status, (done.output, done.exception)
        return done

    def stop(self):
        saved(self)
        if self.epoch == 1:
            raise KeyboardInterrupt

    whole, saved = json.loads(train("whole").stdout), Checkpoint.after_epoch
    assert whole == dict(verdict=whole["verdict"], kept="trained", metrics={}, model="whole")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "after_epoch", stop)
        assert "the same command continues" in train("stopped", 130).stderr
    assert os.listdir("stopped") == [TRAINING]
    train("stopped")
    assert sorted(os.listdir("stopped")) == ["model.json", "model.safetensors"]
    one, other = (load_model(folder).state_dict() for folder in ("whole", "stopped"))
    assert all(value.equal(other[name]) for name, value in one.items())
