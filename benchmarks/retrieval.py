"""Evaluation and search beside their floor, the float32 product of the same matrices, and beside other packages.

    python benchmarks/retrieval.py                                # about six minutes on two cores
    python benchmarks/retrieval.py --cases "cub *" --oml python   # some cases; the interpreter that has OpenMetricLearning
    python benchmarks/retrieval.py --device cuda                  # the cases that run on a GPU: ours, torch, pml

Each case runs in a process of its own: the work once to warm up where it is short, then the work and the floor in turn,
so that a slow moment of the machine hits both; medians are compared. Peak memory is what the process grew by in its first
work, before any floor, after a small work that imports what is needed; on a GPU it is what torch allocated there. The
embeddings are drawn (by the parent process, whose memory does not count): classes of realistic sizes around centres that share super-classes, with a
falling spectrum and images of different difficulty, so that recall is in the range of trained networks.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import warnings
from datetime import date
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

HERE = Path(__file__).parent
LIMIT_S = 240
# images, classes, K of Recall@K, how often work and floor alternate, noise of an image in units of its class's spread
SIZES = {
    "cub": dict(n=5924, classes=100, recall_at=(1, 2, 4, 8), repeats=9, noise=2.0),
    "sop": dict(n=60502, classes=11316, recall_at=(1, 10, 100, 1000), repeats=2, noise=0.9),
}
D = 512


def data(n, classes, noise, **_):
    g = torch.Generator().manual_seed(0)
    labels, spectrum = torch.arange(n) * classes // n, torch.arange(1, D + 1) ** -0.6
    supers = torch.randn(max(4, classes // 100), D, generator=g)
    centers = supers[torch.randint(0, len(supers), (classes,), generator=g)] + torch.randn(classes, D, generator=g)
    hard = noise * torch.exp(0.4 * torch.randn(n, 1, generator=g))
    x = (centers[labels] + hard * torch.randn(n, D, generator=g)) * spectrum
    return torch.nn.functional.normalize(x @ torch.linalg.qr(torch.randn(D, D, generator=g))[0]), labels


def floor(x):
    for rows in x.split(1024):
        rows @ x.T


def ours(x, y, recall_at):
    from dml_nb.retrieval import evaluate

    return evaluate(x, y, recall_at=recall_at, with_nmi=False)


def plain(x, y, recall_at):
    "Ours on a processor without bfloat16."
    from dml_nb.retrieval import metrics
    from dml_nb.retrieval.ranker import Ranker

    both = metrics.each_query(x, y, recall_at=recall_at, ranker=Ranker(x, precision="float32"))
    return {name: v.nanmean().item() for name, v in both["optimistic"].items()}


def top(k):
    def search_ours(x, y, recall_at):
        from dml_nb.retrieval import search

        ids = search(x, x, k, exclude_self=True)[1]
        return {"R@1": (y[ids[:, 0]] == y).double().mean().item()}

    def search_faiss(x, y, recall_at):
        import faiss

        index = faiss.IndexFlatIP(D)
        index.add(x.numpy())
        ids = torch.from_numpy(index.search(x.numpy(), k + 1)[1])
        return {"R@1": (y[ids[:, 1]] == y).double().mean().item()}

    def search_torch(x, y, recall_at):
        ids = torch.cat([(rows @ x.T).topk(k + 1).indices for rows in x.split(1024)])
        return {"R@1": (y[ids[:, 1]] == y).double().mean().item()}

    return search_ours, search_torch, search_faiss


def pml(*include, k="max_bin_count"):
    def work(x, y, recall_at):
        from pytorch_metric_learning.distances import CosineSimilarity
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        from pytorch_metric_learning.utils.inference import CustomKNN

        names = {"precision_at_1": "R@1", "mean_average_precision_at_r": "MAP@R", "r_precision": "R-precision"}
        knn = CustomKNN(CosineSimilarity(), batch_size=1024) if k == "torch" else None
        calculator = AccuracyCalculator(include=include, k=None if k == "torch" else k, device=x.device, knn_func=knn)
        return {names[name]: value for name, value in calculator.get_accuracy(x, y).items()}

    return work


def oml(x, y, recall_at):
    from oml.functional.knn import batched_knn
    from oml.functional.metrics import calc_retrieval_metrics

    ids = torch.arange(len(x))
    _, found, right = batched_knn(x, ids, ids, top_n=max(recall_at), labels_gt=y)
    cmc = calc_retrieval_metrics(found, right, cmc_top_k=recall_at, precision_top_k=(), map_top_k=(), verbose=False)[
        "cmc"
    ]
    return {f"R@{k}": float(v) for k, v in cmc.items()}


ALL = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
# size, name in the table, what it computes, work
CASES = {
    "cub ours": ("all metrics", ours),
    "cub ours, float32": ("all metrics", plain),
    "cub torch topk": ("top 8", top(8)[1]),
    "cub faiss flat": ("top 8", top(8)[2]),
    "cub ours, search": ("top 8", top(8)[0]),
    "cub pml": ("P@1, R-precision, MAP@R", pml(*ALL)),
    "cub pml, default k": ("P@1, R-precision, MAP@R", pml(*ALL, k=None)),
    "cub oml": ("R@K", oml),
    "sop ours": ("all metrics", ours),
    "sop ours, float32": ("all metrics", plain),
    "sop torch topk": ("top 10", top(10)[1]),
    "sop faiss flat": ("top 10", top(10)[2]),
    "sop ours, search": ("top 10", top(10)[0]),
    "sop pml": ("P@1", pml("precision_at_1", k=1)),
    "sop oml": ("R@K", oml),
}


def shrunk(name, shrink):
    size = SIZES[name]
    return size | dict(n=size["n"] // shrink, classes=max(2, size["classes"] // shrink))


def megabytes(device, name):
    "Memory of this process now (VmRSS) or at most so far (VmHWM; unlike getrusage's, without that of the parent)."
    if device == "cuda":
        return (torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**20
    return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def seconds(do, device):
    start = perf_counter()
    value = do()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start, value


def measure(case, shrink, device, file):
    "In a process of its own: seconds of work and floor, their values, the memory that the first work took."
    size, work, long = shrunk(case.split()[0], shrink), CASES[case][1], "sop" in case
    x, y = (t.to(device) for t in torch.load(file))
    once, recall_at = long and "ours" not in case, tuple(k for k in size["recall_at"] if k < size["n"])
    work(x[:400], y[:400], tuple(k for k in recall_at if k < 400))
    floor(x[:64])
    before = megabytes(device, "VmRSS")
    first, values = seconds(lambda: work(x, y, recall_at), device)
    extra = megabytes(device, "VmHWM") - before
    times, floors = [first] if long else [], []
    while len(floors) < (1 if once else size["repeats"]):
        floors.append(seconds(lambda: floor(x), device)[0])
        if not once:
            times.append(seconds(lambda: work(x, y, recall_at), device)[0])
    return dict(
        seconds=median(times), floor=median(floors), ratio=median(times) / median(floors), extra_mb=extra, **values
    )


def child(case, args, file):
    "Measure in a fresh process; a word instead of numbers where it was stopped."
    command = [args.oml if " oml" in case else sys.executable, __file__, "--child", case, "--data", file]
    command += ["--shrink", str(args.shrink), "--device", args.device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except (subprocess.TimeoutExpired, FileNotFoundError) as error:
        return {"note": f"over {LIMIT_S} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)}
    if done.returncode:
        return {"note": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def line(row):
    if "note" in row:
        return f"{row['case']:22}{row['what']:25} {row['note']}"
    values = "  ".join(f"{name} {row[name]:.4f}" for name in row if re.match("R@|MAP|R-p", name))
    return f"{row['case']:22}{row['what']:25}{row['seconds']:8.2f} s {row['floor']:8.2f} s {row['ratio']:6.2f}x {row['extra_mb']:8.0f} MB  {values}"


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def installed_oml(python):
    if python is None:
        return ""
    code = "from importlib.metadata import version; print(version('open-metric-learning'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def hardware(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = (
        next((part.split(":")[1].strip() for part in open("/proc/cpuinfo") if part.startswith("model name")), "")
        if sys.platform == "linux"
        else platform.processor()
    )
    return cpu or platform.machine()


def main():
    import pandas as pd

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", nargs="+", default=["*"], metavar="CASE", help=f"names or patterns: {', '.join(CASES)}"
    )
    parser.add_argument(
        "--oml",
        default=None,
        metavar="PYTHON",
        help="interpreter of an environment with open-metric-learning; without it those cases are left out",
    )
    parser.add_argument("--shrink", type=int, default=1, help="divide images and classes by this, for a trial")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder of the CSV; a full run goes to benchmarks/results, any other is only printed unless this is given",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the embeddings are")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.child:
        return print(json.dumps(measure(args.child, args.shrink, args.device, args.data)))
    chosen = [
        case
        for case in CASES
        if any(fnmatch(case, pattern) for pattern in args.cases) and (args.oml or " oml" not in case)
    ]
    if args.device == "cuda":
        chosen = [case for case in chosen if not re.search("oml|faiss", case)]
    if not chosen:
        parser.error(f"no case {' '.join(args.cases)!r}: known are {', '.join(CASES)}")
    print(f"{'case':22}{'computes':25}{'seconds':>10} {'floor':>10} {'ratio':>7} {'extra memory':>11}")
    rows = []
    with TemporaryDirectory() as folder:
        for name in {case.split()[0]: None for case in chosen}:
            torch.save(data(**shrunk(name, args.shrink)), f"{folder}/{name}.pt")
        for case in chosen:
            name = case.split()[0]
            rows.append(
                dict(case=case, what=CASES[case][0], images=shrunk(name, args.shrink)["n"])
                | child(case, args, f"{folder}/{name}.pt")
            )
            print(line(rows[-1]), flush=True)
    out = args.out or (HERE / "results" if args.cases == ["*"] and args.shrink == 1 else None)
    if out is None:
        return
    device = hardware(args.device)
    short = "-".join(re.findall(r"[A-Za-z0-9]+", device.replace("(R)", "").replace("CPU", ""))[:4]).lower()
    versions = {
        "torch": version("torch"),
        "faiss": installed("faiss-cpu"),
        "pml": installed("pytorch-metric-learning"),
        "oml": installed_oml(args.oml),
    }
    file = out / f"retrieval-{short}-{torch.get_num_threads()}threads-torch{versions['torch']}.csv"
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).assign(
        hardware=device, threads=torch.get_num_threads(), **versions, date=str(date.today())
    ).round(4).to_csv(file, index=False)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
