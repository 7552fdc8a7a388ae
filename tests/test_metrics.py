"Retrieval metrics against loops in float64, other packages, degenerate data, and properties that must always hold."

import math
import os
import subprocess
import sys
import warnings
from multiprocessing import set_forkserver_preload

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dml_nb.core.golden import fixture, golden_value
from dml_nb.core.similarity import unit
from dml_nb.retrieval import metrics as metrics_module
from dml_nb.retrieval.clustering import between_class_cosine, class_distances, cluster_agreement, kmeans, spectrum
from dml_nb.retrieval.metrics import Positives, encode_labels, evaluate, query_metrics
from dml_nb.retrieval.query_analysis import intervals, per_class, per_query
from dml_nb.retrieval.ranker import Ranker
from dml_nb.retrieval.rerank import KReciprocal, rerank_report

K = (1, 2, 3, 4, 8, 50)
RULES = ("optimistic", "pessimistic")


def brute_force(x, y, gallery=None, gallery_labels=None, ties="optimistic"):
    "One query at a time, one rank at a time."
    same = gallery is None
    z, g = (unit(part.float()).double() for part in (x, x if same else gallery))
    labels = (y if same else gallery_labels).tolist()
    lines = []
    for q in range(len(z)):
        listed = []
        for i in range(len(g)):
            if same and i == q:
                continue
            score = np.float32(math.fsum((z[q] * g[i]).tolist()))
            right = labels[i] == y[q].item()
            listed.append((-score, right == (ties == "pessimistic"), right))
        rel = [right for *_, right in sorted(listed)]
        R = sum(rel)
        line = {f"R@{k}": float(any(rel[:k])) for k in K}
        line["MAP@R"] = sum(sum(rel[: r + 1]) / (r + 1) for r in range(R) if rel[r]) / R if R else math.nan
        line["R-precision"] = sum(rel[:R]) / R if R else math.nan
        line["MRR"] = 1 / (rel.index(True) + 1) if R else math.nan
        lines.append(line)
    return {name: torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in lines[0]}


def data():
    "Name -> embeddings and labels; ties, copies and lone classes among them."
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 8, (60,), generator=g)
    spread = torch.randn(60, 6, generator=g)
    clustered = torch.randn(8, 6, generator=g)[y] + 0.5 * torch.randn(60, 6, generator=g)
    copies = spread.clone()
    copies[20:40] = copies[:20]
    zero = spread.clone()
    zero[::7] = 0
    lone = torch.cat([y[:58], torch.tensor([90, 91])])
    near = spread.clone()
    near[1:30] = near[0] + 1e-6 * torch.randn(29, 6, generator=g)
    return {
        "random": (spread, y),
        "clustered": (clustered, y),
        "half precision": (clustered.half(), y),
        "double precision": (clustered.double(), y),
        "lone classes": (clustered, lone),
        "copies": (copies, y),
        "nearly copies": (near, y),
        "grid": (torch.eye(4)[torch.randint(0, 4, (60,), generator=g)], y),
        "all equal": (torch.ones(12, 3), torch.arange(12) // 3),
        "one class": (spread, torch.zeros(60, dtype=torch.long)),
        "zero rows": (zero, y),
        "all zero": (torch.zeros(12, 3), torch.arange(12) // 3),
        "one dimension": (spread[:, :1], y),
        "column-major": (torch.randn(6, 60, generator=g).T, y),
        "two images": (spread[:2], torch.zeros(2, dtype=torch.long)),
        "one class has most": (spread, torch.cat([torch.zeros(50, dtype=torch.long), y[50:] + 1])),
    }


DATA = data()


def agree(found, expected):
    assert {*found} == {*expected}
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=1e-12, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture
def set_large_class(monkeypatch):
    "Set the share of the gallery above which a class is counted from whole rows; 0: every class, 1: no class."
    return lambda share: monkeypatch.setattr(metrics_module, "LARGE_CLASS", share)


@pytest.mark.parametrize("memory_mb, share", [(0.001, 0), (0.001, 1), (256.0, 0), (256.0, 1), (256.0, 1 / 8)])
@pytest.mark.parametrize("name", DATA)
def test_every_query_agrees_with_loops(name, memory_mb, share, set_large_class):
    x, y = DATA[name]
    set_large_class(share)
    found = query_metrics(x, y, recall_at=K, mrr=True, memory_mb=memory_mb)
    for ties in RULES:
        agree(found[ties], brute_force(x, y, ties=ties))


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("name", DATA)
def test_separate_gallery_agrees_with_loops(name, share, set_large_class):
    x, y = DATA[name]
    set_large_class(share)
    parts = x[::2], y[::2], x[1::2], y[1::2]
    found = query_metrics(*parts, recall_at=K, mrr=True)
    for ties in RULES:
        agree(found[ties], brute_force(*parts, ties=ties))


def test_deep_first_positives_are_counted_exactly():
    "Two images a class among 400: most first positives lie far below R = 1."
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(2))
    x[300:] = x[:100]
    y = torch.arange(400) % 200
    found = query_metrics(x, y, recall_at=K, mrr=True)
    for ties in RULES:
        agree(found[ties], brute_force(x, y, ties=ties))


@pytest.mark.parametrize("classes, D", [(3, 512), (12, 16), (40, 64)])
def test_rows_and_lists_agree_to_the_last_bit(classes, D, set_large_class):
    g = torch.Generator().manual_seed(classes)
    y = torch.randint(0, classes, (700,), generator=g)
    x = torch.randn(classes, D, generator=g)[y] + 3 * torch.randn(700, D, generator=g)
    x[650:] = x[:50]
    found = []
    for share in (0, 1 / 24, 1):
        set_large_class(share)
        found.append(query_metrics(x, y, recall_at=K, mrr=True, memory_mb=4))
    for ties in RULES:
        for other in found[1:]:
            for name, values in found[0][ties].items():
                torch.testing.assert_close(
                    other[ties][name],
                    values,
                    rtol=0,
                    atol=1e-15 if "R" == name[-1] or "-" in name else 0,
                    equal_nan=True,
                )


def test_evaluate_is_the_mean_over_queries_and_warns_of_ties():
    for name, (x, y) in DATA.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = {ties: evaluate(x, y, recall_at=K, extra=("MRR",), with_nmi=False, ties=ties) for ties in RULES}
        for ties in RULES:
            expected = {metric: values.nanmean().item() for metric, values in brute_force(x, y, ties=ties).items()}
            assert found[ties] == pytest.approx(expected, abs=1e-12)
        gap = max(found["optimistic"][metric] - found["pessimistic"][metric] for metric in expected)
        assert any("equal similarities" in str(w.message) for w in caught) == (gap > 0.001), name


def test_golden_values():
    fix = fixture()
    found = evaluate(fix.embeddings, fix.labels, recall_at=(1, 2, 4))
    for name, quantity in {"R@1": "R@1", "R@2": "R@2", "R@4": "R@4", "MAP@R": "MAP@R", "R-precision": "RP"}.items():
        assert found[name] == pytest.approx(golden_value(quantity), abs=1e-12)
    assert found["R@1"] == pytest.approx(golden_value("P@1"), abs=1e-12)


def test_the_contract():
    x, y = DATA["clustered"]
    assert list(evaluate(x, y)) == ["R@1", "R@2", "R@4", "R@8", "MAP@R", "R-precision", "NMI"]
    everything = evaluate(x, y, recall_at=(1, 1000), extra=("MRR", "AMI", "distances", "spectrum"))
    assert list(everything)[:2] == ["R@1", "R@1000"] and {
        "MRR",
        "AMI",
        "intra",
        "inter",
        "intra/inter",
        "spectral decay",
        "effective rank",
    } <= {*everything}
    assert everything["R@1000"] == 1
    before = x.clone(), y.clone()
    evaluate(x, y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


# other packages


def pml(query, labels, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calculator = pytest.importorskip(
            "pytorch_metric_learning.utils.accuracy_calculator", reason="pytorch-metric-learning is not installed"
        )
        include = ("precision_at_1", "mean_average_precision_at_r", "r_precision", "mean_reciprocal_rank")
        k = 59 if len(query) == 60 else "max_bin_count"
        return calculator.AccuracyCalculator(include=include, k=k, device=torch.device("cpu")).get_accuracy(
            query, labels, **kwargs
        )


NAMES = {
    "R@1": "precision_at_1",
    "MAP@R": "mean_average_precision_at_r",
    "R-precision": "r_precision",
    "MRR": "mean_reciprocal_rank",
}


@pytest.mark.parametrize("name", DATA)
def test_agrees_with_pytorch_metric_learning(name):
    "Equal where nothing is tied (their MRR is float32); with ties, theirs is some order between our two readings."
    x, y = DATA[name]
    z = unit(x.float()).contiguous()
    theirs = pml(z, y)
    ours = {ties: query_metrics(z, y, recall_at=K, mrr=True)[ties] for ties in RULES}
    counted = Positives(y, y, True).R > 0  # they leave lone queries out of P@1, too
    low, high = ({metric: ours[ties][metric][counted].mean().item() for metric in NAMES} for ties in reversed(RULES))
    for metric, other in NAMES.items():
        if metric == "MRR" and len(x) != 60:
            continue  # their depth is R + 1, and what is deeper counts as 0
        if name == "nearly copies":
            continue  # below the resolution of their float32 distances
        assert low[metric] - 1e-6 <= theirs[other] <= high[metric] + 1e-6, (
            metric,
            low[metric],
            theirs[other],
            high[metric],
        )
        if name in ("random", "clustered", "lone classes", "one class", "one class has most"):
            assert theirs[other] == pytest.approx(high[metric], abs=1e-6 if metric == "MRR" else 1e-12)


def test_separate_gallery_agrees_with_pytorch_metric_learning():
    x, y = DATA["clustered"]
    z = unit(x)
    theirs = pml(z[:20], y[:20], reference=z[20:], reference_labels=y[20:])
    ours = evaluate(z[:20], y[:20], z[20:], y[20:], with_nmi=False)
    for metric in ("R@1", "MAP@R", "R-precision"):
        assert theirs[NAMES[metric]] == pytest.approx(ours[metric], abs=1e-12)


@pytest.mark.parametrize("name", DATA)
def test_recall_agrees_with_faiss(name):
    "With ties, faiss's order is some order between our two readings."
    if name == "nearly copies":
        pytest.skip("below the resolution of faiss's float32 scores")
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    x, y = DATA[name]
    z = unit(x.float()).contiguous().numpy()
    index = faiss.IndexFlatIP(z.shape[1])
    index.add(z)
    near = index.search(z, len(z))[1]
    near = near[near != np.arange(len(z))[:, None]].reshape(len(z), -1)
    high, low = (
        {name: v.mean().item() for name, v in query_metrics(x, y, recall_at=K)[ties].items()} for ties in RULES
    )
    for k in K:
        theirs = (y.numpy()[near[:, :k]] == y.numpy()[:, None]).any(1).mean()
        assert low[f"R@{k}"] - 1e-12 <= theirs <= high[f"R@{k}"] + 1e-12
        if name in (
            "random",
            "clustered",
            "half precision",
            "double precision",
            "lone classes",
            "one class",
            "column-major",
        ):
            assert theirs == pytest.approx(high[f"R@{k}"], abs=1e-12)


# properties

small = st.integers(-2, 2)


@st.composite
def sets(draw, least=2):
    "Points of a coarse grid, so that ties abound."
    n, d = draw(st.integers(least, 14)), draw(st.integers(1, 3))
    x = torch.tensor(
        draw(st.lists(st.lists(small, min_size=d, max_size=d), min_size=n, max_size=n)), dtype=torch.float32
    )
    return x, torch.tensor(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))


def with_positives(*args):
    assume(bool((args[1][:, None] == args[3]).any()) if len(args) == 4 else len(args[1].unique()) < len(args[1]))
    return query_metrics(*args, recall_at=K, mrr=True)


@settings(max_examples=60, deadline=None)
@given(sets())
def test_holds_for_any_data(part):
    "Loops agree; recall grows with K; MAP@R <= R-precision <= Recall@R; pessimistic <= optimistic."
    x, y = part
    found = with_positives(x, y)
    R = Positives(y, y, True).R
    for ties in RULES:
        values = found[ties]
        agree(values, brute_force(x, y, ties=ties))
        for a, b in zip(K, K[1:]):
            assert (values[f"R@{a}"] <= values[f"R@{b}"]).all()
        some = R > 0
        at_R = (1 / values["MRR"][some]).round() <= R[some]
        assert (values["MAP@R"][some] <= values["R-precision"][some] + 1e-12).all()
        assert (values["R-precision"][some] <= at_R).all()
    for name in found["optimistic"]:
        best, worst = found["optimistic"][name].nan_to_num(), found["pessimistic"][name].nan_to_num()
        assert (worst <= best).all()


@settings(max_examples=40, deadline=None)
@given(sets(4), st.randoms(use_true_random=False))
def test_order_of_gallery_and_queries_does_not_matter(part, random):
    x, y = part
    half = len(x) // 2
    order = torch.tensor(random.sample(range(len(x) - half), len(x) - half))
    found = with_positives(x[:half], y[:half], x[half:], y[half:])
    mixed = with_positives(x[:half], y[:half], x[half:][order], y[half:][order])
    shuffled = torch.tensor(random.sample(range(half), half))
    other = with_positives(x[:half][shuffled], y[:half][shuffled], x[half:], y[half:])
    for ties in RULES:
        agree(mixed[ties], found[ties])
        agree(other[ties], {name: values[shuffled] for name, values in found[ties].items()})


def test_permuting_the_gallery_permutes_ids_only():
    x, y = DATA["clustered"]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    found = per_query(x[:20], y[:20], x[20:], y[20:])
    mixed = per_query(x[:20], y[:20], x[20:][order], y[20:][order])
    assert (order[mixed["nearest"].to_numpy()].numpy() == found["nearest"]).all()
    pd.testing.assert_frame_equal(mixed.drop(columns="nearest"), found.drop(columns="nearest"), check_exact=True)


@settings(max_examples=40, deadline=None)
@given(sets(4), st.integers(1, 20))
def test_far_images_of_other_classes_change_nothing(part, count):
    "All points on one half of the sphere; the added ones are opposite."
    x, y = part
    x = torch.cat([x, torch.full((len(x), 1), 9.0)], 1)
    far = torch.zeros(count, x.shape[1])
    far[:, -1] = -1
    half = len(x) // 2
    found = with_positives(x[:half], y[:half], x[half:], y[half:])
    more = with_positives(
        x[:half], y[:half], torch.cat([far, x[half:]]), torch.cat([torch.full((count,), 7), y[half:]])
    )
    for ties in RULES:
        agree(more[ties], found[ties])


# input


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=["a", "b", "a", "b"]), "such as 'a': number them with"),
        (dict(labels=np.array(["a", "b", "a", "b"])), "such as .*'a'.*: number them with"),
        (dict(labels=torch.tensor([0.0, 1, 0, 1])), "labels must be integers"),
        (dict(labels=torch.arange(3)), r"labels must have shape \(4,\)"),
        (dict(labels=torch.arange(4)), "no query has an image of its class"),
        (dict(embeddings=torch.tensor([[1.0], [2], [math.nan], [math.inf]])), "NaN or infinity, first in row 2"),
        (dict(embeddings=torch.ones(4)), r"shape \(N, D\), got \(4,\): write x\[None\] for a single embedding"),
        (dict(embeddings=torch.ones(4, 2, 1)), r"shape \(N, D\), got \(4, 2, 1\): flatten or pool"),
        (dict(embeddings=torch.ones(4, 2).long()), "floating point"),
        (dict(embeddings=torch.ones(0, 2), labels=torch.ones(0).long()), "cannot evaluate 0 queries"),
        (dict(embeddings=torch.ones(1, 2), labels=torch.ones(1).long()), "against 0 gallery images"),
        (dict(gallery=torch.ones(3, 2)), "belong together"),
        (dict(gallery=torch.ones(3, 5), gallery_labels=torch.zeros(3).long()), "same size D"),
        (dict(gallery=torch.ones(0, 2), gallery_labels=torch.zeros(0).long()), "against 0 gallery images"),
        (dict(gallery=torch.ones(3, 2), gallery_labels=torch.full((3,), 5)), "no query has an image of its class"),
        (dict(recall_at=(0,)), "recall_at must hold"),
        (dict(recall_at=()), "recall_at must hold"),
        (dict(recall_at=(1, 1.5)), "recall_at must hold"),
        (dict(recall_at=None), "recall_at must hold"),
        (dict(labels=None), "labels must be integers, got NoneType"),
        (dict(labels=pd.Series(["a", "b", "a", "b"])), "such as 'a': number them with"),
        (dict(recall_at=1.5), "recall_at must hold"),
        (dict(recall_at=(0, 1)), "recall_at must hold"),
        (dict(labels=[0.0, 1.0, 0.0, 1.0]), "labels must be integers"),
        (dict(labels=[0]), r"labels must have shape \(4,\)"),
        (dict(ties="best"), "unknown rule for ties"),
        (dict(ties="optimist"), "did you mean 'optimistic'"),
        (dict(extra=("mrr",)), "did you mean 'MRR'"),
        (dict(extra="mrr"), "unknown extra metric 'mrr': did you mean 'MRR'"),
        (dict(embeddings=None), "query must be a tensor or an array, got NoneType: pass what the model returned"),
        (dict(embeddings=[[1.0], [2.0], [3.0], [4.0]]), r"got list: .* np.array\(\.\.\.\) of a list"),
        (dict(embeddings=pd.DataFrame(np.eye(4))), r"got DataFrame: .* np.array\(\.\.\.\) of a .* table"),
        (dict(embeddings=torch.ones(4, 2).to_sparse()), r"query must be a dense tensor.*call .to_dense\(\)"),
        (dict(embeddings=torch.ones(4, 2).to_sparse_csr()), r"query must be a dense tensor.*call .to_dense\(\)"),
        (dict(embeddings=torch.ones(4, 2, device="meta")), "query .*on the device 'meta', which stores no numbers"),
        (dict(embeddings=torch.ones(4, 2).to(torch.float8_e4m3fn)), "convert it to float32"),
        (dict(gallery=3.0, gallery_labels=[1]), "gallery must be a tensor or an array, got float"),
        (dict(labels=torch.ones(4, device="meta").long()), "labels .*on the device 'meta'"),
        (dict(labels=torch.ones(4).long().to_sparse()), r"labels must be a dense tensor.*call .to_dense\(\)"),
        (dict(labels=np.array([True, False, True, False])), "got bool such as True: number them with"),
        (dict(labels=[]), r"labels must have shape \(4,\)"),
    ],
)
def test_bad_input_is_one_clear_sentence(change, message):
    good = dict(embeddings=torch.randn(4, 2), labels=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match=message):
        evaluate(**(good | change))


def test_labels_may_be_lists_arrays_or_encoded_names():
    x, y = DATA["clustered"]
    expected = evaluate(x, y, with_nmi=False)
    table = pd.DataFrame({"label": torch.cat([y, y]).numpy()}).iloc[len(y) :]
    for labels in (
        y.tolist(),
        y.numpy(),
        y.int(),
        y - 5,
        y * 10**12,
        table["label"],
        table["label"].astype("Int64"),
        y.numpy().astype(np.uint16),
        y.numpy().astype(">i8"),
        np.ascontiguousarray(y.numpy()[::-1])[::-1],
        *(y.to(dtype) for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64)),
    ):
        assert evaluate(x, labels, with_nmi=False) == expected
    encoded, names = encode_labels([f"class {i}" for i in y.tolist()])
    assert evaluate(x, encoded, with_nmi=False) == expected and names == sorted(names)
    with pytest.raises(ValueError, match="of one type, got float and str: fill in missing names"):
        encode_labels(["a", math.nan, "b"])


def test_embeddings_may_be_arrays_memory_maps_or_carry_gradients(tmp_path):
    x, y = DATA["clustered"]
    expected = evaluate(x, y, extra=("distances", "spectrum"))
    np.save(tmp_path / "x.npy", x.numpy())
    for same in (x.numpy(), np.load(tmp_path / "x.npy", mmap_mode="r"), x.clone().requires_grad_()):
        assert evaluate(same, y, extra=("distances", "spectrum")) == expected
        assert per_query(same, y.numpy())["R@1"].mean() == expected["R@1"]


def test_arrays_in_any_memory_layout_give_the_same_metrics():
    x, y = DATA["clustered"]
    a, expected = x.numpy(), evaluate(x, y, with_nmi=False)
    record = np.zeros(len(a), [("id", "i1"), ("vector", "f4", a.shape[1])])
    record["vector"] = a
    read_only = a.copy()
    read_only.setflags(write=False)
    with torch.inference_mode():
        inference = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (
            np.ascontiguousarray(a[::-1])[::-1],
            np.ascontiguousarray(a[:, ::-1])[:, ::-1],
            a.astype(">f4"),
            a.astype(np.longdouble),
            np.asfortranarray(a),
            record["vector"],
            read_only,
            inference,
            np.array(a.tolist()),
            np.array(list(a)),
            np.array(pd.DataFrame(a)),
            x.to_sparse().to_dense(),
        ):
            assert evaluate(same, y, with_nmi=False) == expected


@pytest.mark.parametrize("scale", [1e-13, 1e-20, 1e-30, 1e-37, 1e-300, 1e15])
def test_the_length_of_an_embedding_does_not_matter(scale):
    x, y = DATA["clustered"]
    dtype = torch.float32 if scale > 1e-38 else torch.float64
    some = torch.where(torch.arange(len(x)) % 3 == 0, torch.tensor(scale, dtype=dtype), 1)[:, None]
    expected = evaluate(x, y, extra=("distances", "spectrum", "between-class cosine", "MRR"))
    for same in (x.to(dtype) * scale, x.to(dtype) * some):
        got = evaluate(same, y, extra=("distances", "spectrum", "between-class cosine", "MRR"))
        assert got == pytest.approx(expected, abs=2e-6)


def test_one_name_needs_no_list():
    x, y = DATA["clustered"]
    assert "MRR" in evaluate(x, y, extra="MRR", with_nmi=False)
    assert list(rerank_report(x, y, methods="query_expansion").index) == ["plain", "query_expansion"]
    assert list(cluster_agreement(x, y, "NMI")) == ["NMI"]
    with pytest.raises(ValueError, match="unknown agreement of clusters 'nmi': did you mean 'NMI'"):
        cluster_agreement(x, y, "nmi")


@pytest.mark.parametrize("images", [2, 3, 6, 15])
def test_defaults_work_for_a_few_images(images):
    x, y = torch.randn(images, 8, generator=torch.Generator().manual_seed(0)), torch.arange(images) // 2
    report = rerank_report(x, y)
    assert len(report) == 5 and report.notna().all(axis=None)
    assert len(rerank_report(x[:1], y[:1], x, y)) == 5
    assert len(intervals(per_query(x, y), draws=10)) == 7
    evaluate(x, y, recall_at=(1, 1000), extra=("MRR", "AMI", "distances", "spectrum", "between-class cosine"))


def test_depths_may_be_a_number_or_anything_that_holds_some():
    x, y = DATA["clustered"]
    expected = evaluate(x, y, recall_at=(1, 3), with_nmi=False)
    for recall_at in ([1, 3], np.array([1, 3]), torch.tensor([1, 3]), range(1, 4, 2), (k for k in (1, 3))):
        assert evaluate(x, y, recall_at=recall_at, with_nmi=False) == expected
    assert evaluate(x, y, recall_at=3, with_nmi=False)["R@3"] == expected["R@3"]


def test_the_bar_can_be_switched_off(monkeypatch, capsys):
    from dml_nb.retrieval import ranker

    bar = ranker.tqdm
    monkeypatch.setattr(ranker, "tqdm", lambda *args, **kwargs: bar(*args, **(kwargs | dict(delay=0))))
    x, y = DATA["clustered"]
    for progress in (True, False):
        evaluate(x, y, with_nmi=False, progress=progress)
        rerank_report(x, y, methods=dict(query_expansion=dict(n=3), k_reciprocal=dict(k1=5, k2=2)), progress=progress)
        assert bool(capsys.readouterr().err) == progress


# clusters


def test_clusters_agree_with_scikit_learn():
    from sklearn import metrics

    x, y = DATA["random"]
    for backend in ("faiss", "sklearn"):
        if backend == "faiss":
            pytest.importorskip("faiss")
        found = kmeans(x, 8, seed=3, backend=backend)
        assert torch.equal(found, kmeans(x * 5, 8, seed=3, backend=backend)) and len(found.unique()) == 8
        scores = cluster_agreement(x, y, seed=3, backend=backend)
        assert scores == pytest.approx(
            dict(NMI=metrics.normalized_mutual_info_score(y, found), AMI=metrics.adjusted_mutual_info_score(y, found))
        )
    tight = torch.eye(8)[y] + 0.01 * torch.randn(60, 8)
    assert cluster_agreement(tight, y, restarts=20) == pytest.approx(dict(NMI=1.0, AMI=1.0))


def test_distances_and_spectrum_agree_with_loops():
    for name in ("random", "clustered", "lone classes"):
        x, y = DATA[name]
        z = unit(x).double()
        members = [z[y == c] for c in y.unique()]
        intra = torch.stack([torch.pdist(m).mean() for m in members if len(m) > 1]).mean()
        inter = torch.pdist(torch.stack([m.mean(0) for m in members])).mean()
        found = class_distances(x, y, memory_mb=0.001)
        assert found == pytest.approx(
            {"intra": intra.item(), "inter": inter.item(), "intra/inter": (intra / inter).item()}, rel=1e-6
        )
        s = torch.linalg.svdvals(z)
        s = s / s.sum()
        assert spectrum(x)["spectral decay"] == pytest.approx(-(s.log().mean() + math.log(6)).item(), rel=1e-6)
        assert spectrum(x)["effective rank"] == pytest.approx((-(s * s.log()).sum()).exp().item(), rel=1e-6)


# queries, classes, intervals


@pytest.mark.parametrize("name", ["random", "lone classes", "copies", "two images"])
def test_tables_of_queries_and_classes(name):
    x, y = DATA[name]
    queries = per_query(x, y, recall_at=K)
    agree({metric: torch.tensor(queries[metric].to_numpy()) for metric in brute_force(x, y)}, brute_force(x, y))
    scores = (unit(x) @ unit(x).T).fill_diagonal_(-2)
    torch.testing.assert_close(torch.tensor(queries["similarity"].to_numpy()), scores.amax(1), rtol=0, atol=1e-6)
    assert (queries["nearest_label"] == y[queries["nearest"].to_numpy()].numpy()).all()
    classes = per_class(queries)
    assert list(classes["queries"].sort_index()) == y.unique(return_counts=True)[1].tolist()
    assert (classes["MAP@R"].dropna().diff().dropna() >= 0).all()


def test_intervals_hold_the_value_and_repeat():
    x, y = DATA["clustered"]
    queries = per_query(x, y)
    for by in ("class", "query"):
        found = intervals(queries, by=by, draws=300)
        assert (found["low"] <= found["value"]).all() and (found["value"] <= found["high"]).all()
        pd.testing.assert_frame_equal(found, intervals(queries, by=by, draws=300))
    flat = intervals(queries.assign(**{"R@1": 1.0}), draws=20).loc["R@1"]
    assert tuple(flat) == (1, 1, 1)
    nothing = intervals(queries, queries, draws=20)
    assert (nothing == 0).all(axis=None)
    wide, narrow = (intervals(queries, level=level, draws=300).loc["MAP@R"] for level in (0.99, 0.5))
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]
    with pytest.raises(ValueError, match="draws must be at least 1"):
        intervals(queries, draws=0)
    with pytest.raises(ValueError, match="did you mean 'optimistic'"):
        per_query(x, y, ties="optimist")


# re-ranking


def dense_k_reciprocal(x, k1, k2, weight):
    "The definitions of Zhong et al. with sets and whole matrices."
    cos = (unit(x).double() @ unit(x).double().T).numpy()
    n, near = (
        len(cos),
        [[p] + [g for g in np.argsort(-np.float32(cos[p]), kind="stable") if g != p] for p in range(len(cos))],
    )

    def R(p, k):
        return {g for g in near[p][: k + 1] if p in near[g][: k + 1]}

    V = np.zeros((n, n))
    for p in range(n):
        more = R(p, k1)
        for q in R(p, k1):
            half = R(q, round(k1 / 2))
            if len(half & R(p, k1)) >= 2 / 3 * len(half):
                more = more | half
        for g in more:
            V[p, g] = math.exp(cos[p, g] - 1)
    V /= V.sum(1, keepdims=True)
    V = np.stack([V[near[p][:k2]].mean(0) for p in range(n)])
    jaccard = np.array([[np.minimum(a, b).sum() / np.maximum(a, b).sum() for b in V] for a in V])
    return (1 - weight) * jaccard + weight * cos


@pytest.mark.parametrize("name", ["random", "clustered", "lone classes"])
def test_k_reciprocal_agrees_with_dense_sets(name):
    x, y = DATA[name]
    expected = torch.from_numpy(dense_k_reciprocal(x, 7, 3, 0.3)).float().fill_diagonal_(-torch.inf)
    for memory_mb in (0.01, 256.0):
        ranker = KReciprocal(x, k1=7, k2=3, weight=0.3, memory_mb=memory_mb)
        for lists in ranker.ranked_lists(5):
            for i, row in enumerate(lists.rows.tolist()):
                listed = lists.scores[lists.offsets[i] : lists.offsets[i + 1]]
                torch.testing.assert_close(listed[:5], expected[row].topk(5).values, rtol=0, atol=1e-5)
    plain = query_metrics(x, y, mrr=True)["optimistic"]
    agree(query_metrics(x, y, mrr=True, ranker=KReciprocal(x, k1=7, k2=3, weight=1.0))["optimistic"], plain)


@pytest.mark.parametrize("name", DATA)
def test_re_ranking_is_reported_beside_the_plain_metric(name):
    "Also where everything is tied, zero or copied."
    x, y = DATA[name]
    n = min(5, len(x) - 1)
    methods = {method: dict(n=n) for method in ("query_expansion", "database_augmentation", "both_expansions")} | dict(
        k_reciprocal=dict(k1=n, k2=min(2, n))
    )
    report = rerank_report(x, y, methods=methods)
    assert report.index[0] == "plain" and len(report) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for metric, value in evaluate(x, y, with_nmi=False).items():
            assert report.loc["plain", metric] == pytest.approx(value, abs=1e-12)
    assert report.drop(columns="seconds").stack().between(0, 1).all()


def test_k_reciprocal_at_its_defaults_whatever_the_budget():
    "Many classes of three: most first positives are counted from single scores, several chunks of them."
    g = torch.Generator().manual_seed(5)
    y = torch.arange(300) % 100
    x = torch.randn(100, 8, generator=g)[y] + torch.randn(300, 8, generator=g)
    reports = [
        rerank_report(x, y, methods=("k_reciprocal",), memory_mb=memory_mb).drop(columns="seconds")
        for memory_mb in (256.0, 0.2)
    ]
    pd.testing.assert_frame_equal(*reports, rtol=0, atol=1e-12)
    ranker, whole = (KReciprocal(x, memory_mb=memory_mb) for memory_mb in (0.2, 256.0))
    assert len(list(ranker._chunks(None))) > 5
    offsets = torch.randint(0, 9, (300,), generator=g).cumsum(0)
    offsets = torch.cat([offsets[:1] * 0, offsets])
    ids = torch.randint(0, 300, (int(offsets[-1]),), generator=g)
    pairs = torch.arange(300), offsets, ids
    assert torch.equal(ranker.pair_scores(*pairs), whole.pair_scores(*pairs))


@pytest.mark.cuda
@pytest.mark.parametrize("name", DATA)
def test_gpu_equals_cpu(name, set_large_class):
    x, y = DATA[name]
    n = min(5, len(x) - 1)
    for share in (0, 1):
        set_large_class(share)
        on_cpu, on_gpu = (query_metrics(x.to(device), y, recall_at=K, mrr=True) for device in ("cpu", "cuda"))
        for ties in RULES:
            agree({metric: values.cpu() for metric, values in on_gpu[ties].items()}, on_cpu[ties])
    methods = dict(query_expansion=dict(n=n), k_reciprocal=dict(k1=n, k2=min(2, n)))
    reports = [rerank_report(x.to(device), y, methods=methods).drop(columns="seconds") for device in ("cpu", "cuda")]
    pd.testing.assert_frame_equal(*reports, rtol=0, atol=1e-9)
    tables = [per_query(x.to(device), y) for device in ("cpu", "cuda")]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-12)


MEMORY = """
import torch
from dml_nb.retrieval.query_analysis import per_query
from dml_nb.retrieval.rerank import expand
from dml_nb.retrieval.metrics import evaluate

def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

def more(work):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    before = peak()
    work()
    print(round(peak() - before), end=" ")

x, same, few = torch.randn(2400, 64), torch.ones(900, 64), torch.randn(300, 512)
evaluate(x[:300], torch.arange(300) % 3, with_nmi=False)
for classes in (2, 6, 30, 1000):
    more(lambda: evaluate(x, torch.arange(2400) % classes, with_nmi=False, memory_mb=64))
more(lambda: evaluate(same, torch.arange(900) % 300, with_nmi=False, memory_mb=64))
more(lambda: per_query(same, torch.arange(900) % 300, memory_mb=32))
more(lambda: expand(few, n=200, memory_mb=16))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded():
    "Large classes, ties everywhere, wide expansions: twice the budget of 64 MB, and no more (16 MB for the last)."
    given_back_at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY],
        env=given_back_at_once,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    grown = [int(mb) for mb in run.stdout.split()]
    assert len(grown) == 7 and max(grown[:-1]) < 128 and grown[-1] < 64, grown


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", DATA)
def test_the_precision_of_the_ranker_does_not_matter(name, precision, set_large_class):
    x, y = DATA[name]
    set_large_class(1)
    expected, found = (
        query_metrics(x, y, mrr=True),
        query_metrics(x, y, mrr=True, ranker=Ranker(x, precision=precision)),
    )
    for ties in RULES:
        for metric, values in expected[ties].items():
            assert torch.equal(found[ties][metric].nan_to_num(), values.nan_to_num())


# training on several processes


def short_run(rank=0):
    from dml_nb.losses import create_loss
    from dml_nb.models.embedder import EmbeddingHead
    from dml_nb.training.learner import dml_learner, feature_dls

    torch.manual_seed(0)
    y = torch.arange(101) // 5
    x = torch.randn(21, 16)[y] + torch.randn(101, 16)
    learn = dml_learner(
        feature_dls(x, y, x, y, batch_size=24),
        EmbeddingHead(16, 8),
        create_loss("proxy_anchor", 21, 8),
        lr=1e-3,
        evaluate_every=2,
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit_schedule(4)
    lines = [
        {name: value for name, value in line.items() if "seconds" not in name}
        for line in learn.retrieval_metrics.history
    ]
    return lines, learn.retrieval_metrics.embeddings


def one_process(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save(short_run(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_embed_a_share_each_and_agree_with_one(tmp_path):
    "101 images: one is embedded twice and must count once."
    lines, embeddings = short_run()
    assert [("MAP@R" in line, line["epoch"]) for line in lines] == [(True, 0), (False, 1), (True, 2), (True, 3)]
    set_forkserver_preload(["dml_nb.training.learner"])  # both processes share the time of importing it
    mp.start_processes(one_process, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    for rank in range(2):
        found, rows = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(rows, embeddings, rtol=0, atol=1e-5)
        for a, b in zip(found, lines, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8])
def test_clusters_and_distances_take_labels_of_any_integer_type(dtype):
    x, y = DATA["clustered"]
    for measure in (cluster_agreement, class_distances, between_class_cosine):
        assert measure(x, y.to(dtype)) == measure(x, y)
