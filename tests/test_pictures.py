"Pictures of data as people have them: any class name, any type of array, few images."

import os
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from dml_nb.experiments.example_runs import example_result  # noqa: E402
from dml_nb.experiments.plots import plot_ranks, plot_recall, plot_results  # noqa: E402
from dml_nb.retrieval.embedding_plots import (  # noqa: E402
    confusion_table,
    plot_confusion,
    plot_similarities,
    plot_worst_queries,
)
from dml_nb.retrieval.label_errors import find_label_errors, plot_label_errors  # noqa: E402
from dml_nb.retrieval.query_analysis import per_query  # noqa: E402
from dml_nb.retrieval.view import plain_text, plot_history, plot_retrieval, plot_tsne  # noqa: E402

NAMES = ["$$", "$", "$x^$", r"a\$b$", r"\$$", "cost $5 and $6", "<script>", "_under", "a\\", os.fsdecode(b"caf\xe9")]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", NAMES)
def test_a_class_may_have_any_name(name):
    fig, ax = plt.subplots()
    title = ax.set_title(plain_text(name))
    fig.canvas.draw()
    assert title._preprocess_math(title.get_text()) == (name.encode(errors="replace").decode(), False)


def test_the_nearest_images_of_classes_with_any_name_are_drawn():
    y = torch.arange(len(NAMES)).repeat_interleave(2)
    images = SimpleNamespace(image=lambda i: np.zeros((4, 4)), labels=y, classes=NAMES)
    x = torch.randn(len(y), 8, generator=torch.Generator().manual_seed(0))
    plot_retrieval(images, x.requires_grad_(), queries=list(range(0, len(y), 2))).canvas.draw()
    few = SimpleNamespace(image=lambda i: np.zeros((4, 4)), labels=y[:3], classes=NAMES)
    plot_retrieval(few, x[:3].detach().numpy()).canvas.draw()


@pytest.mark.parametrize("recall", [["R@1", "R@2"], ["R@2", "R@4"], ["R@10"], []])
def test_the_curves_of_a_run_are_those_of_its_first_depth(recall):
    history = pd.DataFrame(
        dict(epoch=[0, 1], train_loss=[2.0, 1.0]) | {name: [0.1, 0.2] for name in [*recall, "MAP@R"]}
    )
    fig = plot_history(history)
    labels = [text.get_text() for text in fig.axes[1].get_legend().get_texts()]
    assert labels == [*recall[:1], "MAP@R"]


@pytest.mark.parametrize("change", ["gradient", "numpy", "reversed", "big-endian", "half", "uint16 labels", "list"])
def test_embeddings_of_any_type_are_mapped(change):
    y = torch.arange(4).repeat_interleave(5)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    given = {
        "gradient": (x.clone().requires_grad_(), y),
        "numpy": (x.numpy(), y.numpy()),
        "reversed": (np.ascontiguousarray(x.numpy()[::-1])[::-1], y.numpy()),
        "big-endian": (x.numpy().astype(">f4"), y.numpy().astype(">i4")),
        "half": (x.half(), y),
        "uint16 labels": (x, y.to(torch.uint16)),
        "list": (x, y.tolist()),
    }[change]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fig = plot_tsne(*given, proxies=torch.randn(4, 8, requires_grad=True))
    assert len(fig.axes[0].collections[0].get_offsets()) == 20


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.full((6, 4), torch.nan), "NaN or infinity, first in row 0"),
        (None, "must be a tensor or an array, got NoneType"),
        (torch.ones(6, 4).to_sparse(), "call .to_dense"),
    ],
)
def test_what_cannot_be_mapped_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        plot_tsne(x, torch.arange(6) // 2)


LONG = "a name that is longer than those of the papers, "


@pytest.mark.parametrize(
    "changes", [[{}], [{}, dict(method=LONG * 3)], [dict(data_name=LONG * 2)]], ids=["one run", "method", "data"]
)
def test_pictures_of_few_runs_and_long_names_fit_their_frame(changes):
    runs = [example_result("002-II/cub-cp-pa-k-3", seed) | change for seed, change in enumerate(changes)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Tight layout not applied"
        plot_results(runs)
        plot_recall(runs)


def test_a_picture_of_two_ranks_fits_its_frame():
    runs = [example_result(f"002-II/cub-cp-pa-k-{k}", 0, own_setting=True) for k in (1, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_ranks(runs)


def clusters(C=6, n=8, D=16, noise=0.5):
    "Embeddings around C centres, and their labels."
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(C).repeat_interleave(n)
    return torch.randn(C, D, generator=generator)[y] + noise * torch.randn(C * n, D, generator=generator), y


def overlapping(fig, texts):
    "Pairs of texts that cover each other."
    fig.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    return [(a, b) for i, (a, first) in enumerate(boxes) for b, second in boxes[:i] if first.overlaps(second)]


def test_images_of_a_map_cover_neither_each_other_nor_the_border():
    x, y = clusters()
    images = SimpleNamespace(image=lambda i: Image.new("RGB", (40, 30)), labels=y, classes=NAMES[:6])
    fig = plot_tsne(x, y, proxies=torch.randn(6, 16), images=images)
    fig.canvas.draw()
    boxes = [a.get_window_extent(fig.canvas.get_renderer()) for a in fig.axes[0].artists]
    assert len(boxes) > 6 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame = fig.axes[0].get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    assert overlapping(fig, fig.axes[0].get_legend().get_texts()) == []


def test_a_map_of_many_classes_has_no_legend_and_no_two_equal_marks():
    x, y = clusters(C=14, n=4)
    fig = plot_tsne(x, y, classes=14, names=[f"class {c}" for c in range(14)])
    dots = fig.axes[0].collections[0]
    marks = {(tuple(color), path.vertices.tobytes()) for color, path in zip(dots.get_facecolors(), dots.get_paths())}
    assert fig.axes[0].get_legend() is None and len(marks) == 14


@pytest.mark.parametrize("noise", [0.01, 0.7])
def test_histograms_of_similarities_have_area_1_whatever_the_embeddings(noise):
    x, y = clusters(noise=noise)
    fig = plot_similarities(x.numpy(), y.tolist(), threshold=0.5)
    assert len(fig.axes[0].collections) == 2
    labels = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert labels == ["same class: 168 pairs", "different classes: 960 pairs"]
    assert overlapping(fig, fig.axes[0].get_legend().get_texts()) == []


def test_confused_classes_with_long_and_odd_names_are_readable():
    x, y = clusters(C=10, noise=3.0)
    fig = plot_confusion(x, y, [LONG * 2 + name for name in NAMES])
    ax = fig.axes[0]
    assert overlapping(fig, ax.get_yticklabels()) == []
    assert all(label.get_rotation() == 45 for label in ax.get_xticklabels())
    with pytest.raises(ValueError, match="no class is confused"):
        plot_confusion(*clusters(noise=0.01))


def test_each_line_of_a_confusion_table_sums_to_1():
    x, y = clusters(C=10, noise=3.0)
    table = confusion_table(per_query(x, y, recall_at=(1,), progress=False), count=4)
    assert table.shape == (4, 5) and np.allclose(table.sum(axis=1), 1)
    assert table.columns.tolist() == [*table.index, "others"]


def test_the_worst_queries_are_queries_also_beside_a_gallery():
    x, y = clusters(noise=2.0)
    shown = []
    images = SimpleNamespace(labels=y, classes=NAMES, is_query=torch.arange(len(y)) % 4 == 0)
    images.image = lambda i: shown.append(i) or np.zeros((4, 4))
    plot_worst_queries(images, x, count=3, k=2)
    assert [i % 4 == 0 for i in shown] == [True, False, False] * 3


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_exchanged_labels_are_found_first(k):
    x, y = clusters(C=5, n=30, noise=0.2)
    given, wrong = y.clone(), torch.tensor([3, 40, 77, 100, 149])
    given[wrong] = (y[wrong] + 2) % 5
    found = find_label_errors(x, given.numpy(), k=k)
    assert len(found) == len(y) and found.index.is_unique and found.doubt.between(-1, 1).all()
    if k in (5, 20):  # one neighbour may be wrong itself, and 149 neighbours are all images
        assert sorted(found.index[:5]) == wrong.tolist()
        assert found.suggested[wrong.tolist()].tolist() == y[wrong].tolist()
        assert (given[found.nearest.tolist()].numpy() == found.suggested).all()


def test_label_errors_of_classes_with_any_name_are_drawn():
    x, y = clusters(C=5, n=4)
    images = SimpleNamespace(image=lambda i: np.zeros((4, 4)), labels=y, classes=NAMES)
    fig = plot_label_errors(images, find_label_errors(x, y), count=5, columns=3)
    fig.canvas.draw()
    assert sum(len(part.axes) for part in fig.subfigs) == 10
