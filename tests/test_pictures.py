"Pictures of data as people have them: any class name, any type of array, few images."

import os
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from dml_nb.experiments.example_runs import example_result  # noqa: E402
from dml_nb.experiments.plots import plot_ranks, plot_recall, plot_results  # noqa: E402
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
