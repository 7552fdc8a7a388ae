"Search equals a plain sort of float64 scores for any data, back end, precision, memory budget and number of processes."

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_nb.core.similarity import unit
from dml_nb.retrieval import exact_search
from dml_nb.retrieval.exact_scores import METRICS, as_embeddings
from dml_nb.retrieval.exact_search import search
from dml_nb.retrieval.low_precision import filter_dtype
from dml_nb.retrieval.ranker import Ranker
from dml_nb.retrieval.sharded import merge_shards, search_shard, search_sharded
from dml_nb.retrieval.vector_index import build_index

CPU = torch.device("cpu")
HAS_BF16 = filter_dtype(CPU) == torch.bfloat16
WAYS = [
    dict(),
    dict(memory_mb=0.05),
    dict(precision="float32"),
    dict(precision="float64"),
    dict(backend="faiss"),
]


def exact(query, gallery, metric):
    q, g = (unit(x).double() if metric == "cosine" else x.double() for x in (query, gallery))
    if metric == "euclidean":
        return -torch.cdist(q, g, compute_mode="donot_use_mm_for_euclid_dist").float() + 0.0
    return torch.stack([(g * row).sum(1) for row in q]).float() + 0.0


def oracle(query, gallery, k, metric="cosine", exclude_self=False):
    scores = exact(query, gallery, metric)
    if exclude_self:
        scores.fill_diagonal_(-torch.inf)
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def make(kind, n, d, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    if kind == "clusters":
        x = torch.randn(5, d, generator=g)[torch.randint(0, 5, (n,), generator=g)] + 0.1 * x
    elif kind == "one corner":
        x = 1e-3 * x + torch.ones(d)
    elif kind == "grid":
        x = torch.randint(-1, 2, (n, d), generator=g).float()
    elif kind == "copies":
        x = x[torch.randint(0, max(1, n // 4), (n,), generator=g)]
    elif kind == "near copies":
        x = x[torch.randint(0, max(1, n // 4), (n,), generator=g)] * (1 + 2e-7 * torch.randn(n, d, generator=g))
    elif kind == "all equal":
        x = x[:1].expand(n, d).clone()
    elif kind == "zeros":
        x = x * (torch.rand(n, 1, generator=g) < 0.5)
    elif kind == "one long row":
        x[n // 2] *= 1000
    elif kind == "wild lengths":
        x = x * 10 ** (6 * torch.rand(n, 1, generator=g) - 3)
    return x


KINDS = [
    "random",
    "clusters",
    "one corner",
    "grid",
    "copies",
    "near copies",
    "all equal",
    "zeros",
    "one long row",
    "wild lengths",
]
SIZES = dict(n=st.integers(2, 120), d=st.sampled_from([1, 2, 7, 33, 64]), seed=st.integers(0, 10**6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data(), **SIZES)
def test_search_is_a_sort_of_exact_scores(kind, metric, data, n, d, seed):
    x, k = make(kind, n, d, seed), data.draw(st.integers(1, n - 1))
    for way in WAYS:
        for exclude_self, expected in zip((True, False), (oracle(x, x, k, metric, True), oracle(x, x, k, metric))):
            values, ids = search(x, x, k, metric=metric, exclude_self=exclude_self, **way)
            assert torch.equal(values, expected[0]) and torch.equal(ids, expected[1]), way


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(column=st.integers(0, 10**6), metric=st.sampled_from(METRICS), **SIZES)
def test_counts_are_counts_of_exact_scores(kind, column, metric, n, d, seed):
    x = make(kind, n, d, seed)
    scores = exact(x, x, metric)
    given_score = scores[:, column % n].clone()
    scores.fill_diagonal_(-torch.inf)
    expected = (scores > given_score[:, None]).sum(1), (scores == given_score[:, None]).sum(1)
    for settings_ in (
        dict(),
        dict(precision="float32"),
        dict(precision="float64"),
        dict(memory_mb=0.05),
        dict(memory_mb=8 * n * d / 2**19),
    ):
        above, equal = Ranker(x, metric=metric, **settings_).count_above(given_score)
        assert torch.equal(above, expected[0]) and torch.equal(equal, expected[1])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(**SIZES)
def test_permuting_the_gallery_permutes_ids(n, d, seed):
    x = make("random", n, d, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    values, ids = search(x[:10], x, n)
    moved, moved_ids = search(x[:10], x[order], n)
    assert torch.equal(values, moved)
    distinct = (values[:, 1:] != values[:, :-1]).all(1)
    assert torch.equal(order[moved_ids][distinct], ids[distinct])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(**SIZES)
def test_far_points_change_nothing(n, d, seed):
    x = make("random", n, d, seed)
    x[:, 0] = x[:, 0].abs() + 100
    far = -x[: max(1, n // 2)]
    for before, after in zip(search(x, x, n), search(x, torch.cat([x, far]), n)):
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["random", "clusters", "one corner", "near copies", "one long row"])
def test_galleries_where_the_bound_prunes(kind):
    x = make(kind, 5000, 64, 0)
    metric = "inner" if kind == "one long row" else "cosine"
    for k in (1, 30, 700):
        expected = oracle(x[::200], x, k, metric)
        for way in WAYS:
            for got, right in zip(search(x[::200], x, k, metric=metric, **way), expected):
                assert torch.equal(got, right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_those_of_faiss(kind, metric):
    "faiss alone, without the exact scores of the back end: equal but for float32."
    faiss = pytest.importorskip("faiss")
    x = make(kind, 400, 16, 0)
    rows = unit(x) if metric == "cosine" else x
    index = (faiss.IndexFlatL2 if metric == "euclidean" else faiss.IndexFlatIP)(16)
    index.add(rows.numpy())
    found = torch.from_numpy(index.search(rows.numpy(), 20)[0])
    values = search(x, x, 20, metric=metric)[0]
    longest = rows.norm(dim=1)[:, None] + rows.norm(dim=1).max()
    found, values = (found, values.square()) if metric == "euclidean" else (found, values)
    assert ((found - values).abs() <= 1e-5 * longest**2).all()


@pytest.mark.parametrize("metric", METRICS)
def test_layout_and_budget_do_not_matter(metric):
    x = torch.randn(64, 1500, generator=torch.Generator().manual_seed(0)).T
    expected = search(x.contiguous(), x.contiguous(), 5, metric=metric)
    for memory_mb in (0.3, 256):
        for got, right in zip(search(x, x, 5, metric=metric, memory_mb=memory_mb), expected):
            assert torch.equal(got, right)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_default_dtype_does_not_matter(backend):
    x = make("copies", 200, 16, 0)
    expected = search(x, x, 9)
    torch.set_default_dtype(torch.float64)
    try:
        for memory_mb in (0.02, 256):
            for got, right in zip(search(x, x, 9, backend=backend, memory_mb=memory_mb), expected):
                assert torch.equal(got, right)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("metric", METRICS)
def test_empty_and_tiny_shards(metric):
    x = make("copies", 40, 8, 0)
    cuts = [0, 0, 1, 2, 2, 40, 40]
    for k in (1, 7, 39):
        parts = [search_shard(x, x[lo:hi], k, lo, True, metric=metric) for lo, hi in zip(cuts, cuts[1:])]
        for merged, whole in zip(merge_shards(parts, k), oracle(x, x, k, metric, True)):
            assert torch.equal(merged, whole)


@pytest.mark.skipif(not HAS_BF16, reason="this processor does not multiply bfloat16")
def test_bfloat16_leaves_few_candidates():
    x = make("random", 5000, 128, 0)
    ranker = Ranker(x, precision="bfloat16")
    pairs = ranker.filter.candidates(torch.arange(100), torch.full((100,), 10))
    assert 1000 <= sum(len(ids) for _, _, ids in pairs) < 4000


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["random", "copies", "one corner"])
def test_gpu_equals_cpu(kind):
    x = make(kind, 3000, 64, 0)
    for metric in METRICS:
        expected = search(x, x, 20, metric=metric, exclude_self=True)
        first = search(x.cuda(), x.cuda(), 20, metric=metric, exclude_self=True)
        assert torch.allclose(first[0].cpu(), expected[0], rtol=1e-6, atol=1e-6)
        for way in (dict(precision="float32"), dict(memory_mb=1)):
            for got, right in zip(search(x.cuda(), x.cuda(), 20, metric=metric, exclude_self=True, **way), first):
                assert torch.equal(got, right)


def test_without_bfloat16_hardware(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    x = make("copies", 200, 16, 0)
    assert Ranker(x).filter.dtype == torch.float32
    assert torch.equal(search(x, x, 7)[1], oracle(x, x, 7)[1])
    with pytest.raises(ValueError, match="use 'auto'"):
        search(x, x, 7, precision="bfloat16")


@pytest.mark.parametrize("api", ["legacy", "new", "autocast"])
def test_precision_settings_of_torch_do_not_change_the_product(api):
    x, matmul = make("random", 300, 64, 0), torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        if api == "legacy":
            torch.set_float32_matmul_precision("medium")
        if api == "new":
            matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=api == "autocast"):
            values, ids = search(x, x, 20, precision="float32")
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
    expected = oracle(x, x, 20)
    assert torch.equal(values, expected[0]) and torch.equal(ids, expected[1])


def test_faiss_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    x = make("random", 20, 4, 0)
    search(x, x, 3)
    with pytest.raises(ImportError, match=r"dml_nb\[faiss\]"):
        search(x, x, 3, backend="faiss")


@pytest.mark.parametrize("way", WAYS)
def test_search_ranks_rows_of_any_length(way):
    x = make("clusters", 200, 16, 0)
    expected = search(x, x, 9, exclude_self=True)
    for scale in (1e-13, 1e-30, 1e-37):
        some = torch.where(torch.arange(200) % 2 == 0, scale, 1.0)[:, None]
        scores, ids = search(x * some, x * some, 9, exclude_self=True, **way)
        assert torch.allclose(scores, expected[0], atol=3e-6)
        assert (ids == expected[1]).float().mean() > 0.99  # neighbours whose scores are nearly equal may change places


@pytest.mark.parametrize("metric", ["inner", "euclidean"])
def test_scores_that_all_underflow_are_refused(metric):
    x = make("random", 50, 8, 0).double()
    search(torch.zeros(3, 8), torch.zeros(5, 8), 2, metric=metric)
    with pytest.raises(ValueError, match="underflow float32: scale them"):
        search(x * 1e-50, x * 1e-50, 3, metric=metric)
    expected = search(x, x, 3, metric=metric)[1]
    scaled = x * 1e-50 / (x * 1e-50).norm()
    assert torch.equal(search(scaled, scaled, 3, metric=metric)[1], expected)


def test_a_gallery_on_a_gpu_is_searched_by_faiss_for_the_cpu(monkeypatch):
    "faiss-cpu has the functions for GPUs, but they end in a NameError."
    faiss = pytest.importorskip("faiss")
    on_gpu = SimpleNamespace(device=torch.device("cuda"), metric="cosine", gallery=X, N=len(X))
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert exact_search._flat_index(on_gpu).ntotal == len(X)
    assert exact_search._faiss_candidates(on_gpu, 250) == len(X)
    moved = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: moved.append(index) or index)
    assert exact_search._flat_index(on_gpu) is moved[0]


X = make("random", 300, 16, 0)


@pytest.mark.parametrize(
    "x, message",
    [
        (X[0], r"shape \(N, D\)"),
        (X.long(), "floating point"),
        (X.numpy().astype(object), "got object"),
        (X.tolist(), "tensor or an array, got list"),
        (X[:0], "gallery is empty"),
        (X[:, :0], "size D = 0"),
    ],
)
def test_what_are_no_embeddings(x, message):
    with pytest.raises(ValueError, match=message):
        as_embeddings(x, "gallery")


@pytest.mark.parametrize(
    "args, settings, message",
    [
        ((X, X, 300), dict(exclude_self=True), r"k must lie in 1\.\.\.299"),
        ((X, X, 0), {}, r"k must lie in 1\.\.\.300"),
        ((X, X, 2.0), {}, "whole number, got 2.0"),
        ((X[:3], X, 3), dict(exclude_self=True), "the same rows"),
        ((X, X, 3), dict(backend="fais"), "did you mean 'faiss'"),
        ((X, X, 3), dict(metric="cosin"), "did you mean 'cosine'"),
        ((X, X, 3), dict(precision="bfloat"), "did you mean 'bfloat16'"),
        ((X, X[:, :4], 3), {}, "same size D"),
        ((X, X.long(), 3), {}, "floating point"),
        ((X, X.double(), 3), {}, "torch.float64"),
        ((X, X[:0], 1), {}, "gallery is empty"),
        ((X[:0], X, 1), {}, "query is empty"),
        ((X.index_fill(0, torch.tensor(4), torch.nan), X, 1), {}, "query contains NaN or infinity, first in row 4"),
        ((X * 1e30, X * 1e30, 1), {}, "overflow"),
        ((X, X, 2), dict(memory_mb=0), "memory_mb must be a positive"),
        ((X[:1], X[:1], 1), dict(exclude_self=True), r"k must lie in 1\.\.\.0"),
    ],
)
def test_bad_input_of_search(args, settings, message):
    with pytest.raises(ValueError, match=message):
        search(*args, **settings)


@pytest.mark.parametrize(
    "args, settings, message",
    [
        (([None, 1],), {}, "text or integers"),
        ((["a", "b"],), dict(rows=300), "2 ids for 300 rows"),
        ((), dict(rows=5, k=5), r"k must lie in 1\.\.\.4"),
        ((), dict(rows=1), "at least 2"),
    ],
)
def test_bad_input_of_an_index(args, settings, message):
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match=message):
        build_index(X[: settings.pop("rows", 2)], *args, **settings)


def test_an_index_of_a_few_images_is_searched_by_default():
    pytest.importorskip("faiss")
    for rows in (2, 6, 12):
        found = build_index(X[:rows]).search(X[:1].clone().requires_grad_())
        assert [i for i, _ in found[0]] == search(X[:1], X[:rows], min(10, rows))[1][0].tolist()


def test_bad_queries_of_an_index():
    pytest.importorskip("faiss")
    built = build_index(X)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.\.300, got 0"):
        built.search(X, 0)
    with pytest.raises(ValueError, match="query contains NaN"):
        built.search(X * torch.nan)


def test_bad_input_of_a_sharded_search(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"k must lie in 1\.\.\.299"):
            search_sharded(X, X, 300, exclude_self=True)
        with pytest.raises(ValueError, match="process 0: query must be a tensor"):
            search_sharded(X.tolist(), X, 3)
    finally:
        dist.destroy_process_group()


def test_no_bar_for_a_short_search(capsys):
    x = make("random", 200, 8, 0)
    search(x, x, 3)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["torch.randn(12000, 32)", "torch.ones(600, 32), torch.ones(12000, 32)"])
def test_memory_is_bounded(what):
    "A full matrix of the first scores takes 576 MB, and the ties of the second 1.1 GB in 64-bit keys and scores."
    code = f"""if True:
    import re, torch
    from dml_nb.retrieval.exact_search import search
    x = {what}
    query, gallery = x if isinstance(x, tuple) else (x, x)
    search(query[:300], query[:300], 3)
    def status(name): return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
    before = status("VmRSS")
    search(query, gallery, 10, memory_mb=48)
    print(status("VmHWM") - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert float(done.stdout) < 130


def _shard(rank, sizes, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(sizes))
    x = make("copies", sum(sizes), 16, 0)
    shard = x.split(sizes)[rank]
    got = [
        search_sharded(x, shard, k, exclude_self, metric=metric)
        for metric in METRICS
        for k in (1, 150)
        for exclude_self in (False, True)
    ]
    got += [search_sharded(x, x[:0] if rank else x, 12)]
    errors = []
    permuted = x.flip(0) if rank else x
    for bad_query, bad_shard, k in (
        (x, shard * (torch.nan if rank else 1), 3),
        (x, shard, 500),
        (permuted, shard, 3),
        (x, None if rank else shard, 3),
    ):
        try:
            search_sharded(bad_query, bad_shard, k)
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
    torch.save((got, errors), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    sizes = (70, 130)
    torch.multiprocessing.spawn(_shard, args=(sizes, tmp_path / "store", tmp_path), nprocs=2)
    x = make("copies", sum(sizes), 16, 0)
    expected = [
        search(x, x, k, metric=metric, exclude_self=own)
        for metric in METRICS
        for k in (1, 150)
        for own in (False, True)
    ]
    expected += [search(x, x, 12)]
    for rank in range(2):
        got, errors = torch.load(tmp_path / f"{rank}.pt")
        for one, whole in zip(got, expected, strict=True):
            assert torch.equal(one[0], whole[0]) and torch.equal(one[1], whole[1])
        assert len(errors) == 4 and "process 1: gallery must be a tensor or an array, got NoneType" in errors[3]
        assert (
            "process 1: gallery contains NaN" in errors[0]
            and "k must lie in 1...200" in errors[1]
            and "different queries" in errors[2]
        )
