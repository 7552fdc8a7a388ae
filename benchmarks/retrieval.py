"""Time and memory of evaluation and search, compared with a matrix product and with other packages.

    python benchmarks/retrieval.py                                # all cases, about six minutes on two cores
    python benchmarks/retrieval.py --cases "cub *" --oml python   # some cases, OpenMetricLearning included
    python benchmarks/retrieval.py --device cuda                  # the cases that run on a GPU: ours, torch, pml

The floor of each case is the float32 product of the same matrices. Each case runs in a process of its own. Short work
runs once to warm up; then work and floor alternate, so a slow moment of the machine affects both, and the medians are
compared. Peak memory is the growth of the process during its first work, before any floor and after a small work that
imports what is needed. On a GPU it is the memory that torch allocated.

The parent process draws the embeddings, so that their memory does not count. Classes have realistic sizes and lie
around centres that share super-classes. The spectrum falls, and images differ in difficulty. Recall is therefore in the
range of trained networks.
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
# n images, K of Recall@K, number of alternations of work and floor, noise of an image relative to the class's spread
SIZES = {
    "cub": dict(n=5924, classes=100, recall_at=(1, 2, 4, 8), repeats=9, noise=2.0),
    "sop": dict(n=60502, classes=11316, recall_at=(1, 10, 100, 1000), repeats=2, noise=0.9),
}
D = 512


def random_embeddings(n, classes, noise, **_):
    "(n, D) unit embeddings and their labels."
    g = torch.Generator().manual_seed(0)
    labels, spectrum = torch.arange(n) * classes // n, torch.arange(1, D + 1) ** -0.6
    supers = torch.randn(max(4, classes // 100), D, generator=g)
    centers = supers[torch.randint(0, len(supers), (classes,), generator=g)] + torch.randn(classes, D, generator=g)
    difficulty = noise * torch.exp(0.4 * torch.randn(n, 1, generator=g))
    x = (centers[labels] + difficulty * torch.randn(n, D, generator=g)) * spectrum
    return torch.nn.functional.normalize(x @ torch.linalg.qr(torch.randn(D, D, generator=g))[0]), labels


def floor(x):
    "The product of all embeddings with all embeddings."
    for rows in x.split(1024):
        rows @ x.T


def ours(x, y, recall_at):
    "All metrics of `evaluate` except NMI."
    from dml_nb.retrieval import evaluate

    return evaluate(x, y, recall_at=recall_at, with_nmi=False)


def ours_float32(x, y, recall_at):
    "The same metrics without bfloat16."
    from dml_nb.retrieval import metrics
    from dml_nb.retrieval.ranker import Ranker

    both = metrics.query_metrics(x, y, recall_at=recall_at, ranker=Ranker(x, precision="float32"))
    return {name: v.nanmean().item() for name, v in both["optimistic"].items()}


def search_top(k):
    "Search for the k nearest: ours, with torch, with faiss."

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
    "Metrics of pytorch-metric-learning."

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
    "Recall@K of OpenMetricLearning."
    from oml.functional.knn import batched_knn
    from oml.functional.metrics import calc_retrieval_metrics

    ids = torch.arange(len(x))
    _, found, right = batched_knn(x, ids, ids, top_n=max(recall_at), labels_gt=y)
    none = dict(precision_top_k=(), map_top_k=(), verbose=False)
    values = calc_retrieval_metrics(found, right, cmc_top_k=recall_at, **none)
    return {f"R@{k}": float(v) for k, v in values["cmc"].items()}


ALL = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
# name, which begins with the size: (what it computes, work)
CASES = {
    "cub ours": ("all metrics", ours),
    "cub ours, float32": ("all metrics", ours_float32),
    "cub torch topk": ("top 8", search_top(8)[1]),
    "cub faiss flat": ("top 8", search_top(8)[2]),
    "cub ours, search": ("top 8", search_top(8)[0]),
    "cub pml": ("P@1, R-precision, MAP@R", pml(*ALL)),
    "cub pml, default k": ("P@1, R-precision, MAP@R", pml(*ALL, k=None)),
    "cub oml": ("R@K", oml),
    "sop ours": ("all metrics", ours),
    "sop ours, float32": ("all metrics", ours_float32),
    "sop torch topk": ("top 10", search_top(10)[1]),
    "sop faiss flat": ("top 10", search_top(10)[2]),
    "sop ours, search": ("top 10", search_top(10)[0]),
    "sop pml": ("P@1", pml("precision_at_1", k=1)),
    "sop oml": ("R@K", oml),
}


def shrunk(name, shrink):
    "The size of this name with fewer images and classes."
    size = SIZES[name]
    return size | dict(n=size["n"] // shrink, classes=max(2, size["classes"] // shrink))


def megabytes(device, name):
    """Memory of this process, now (`VmRSS`) or at its peak (`VmHWM`).

    Unlike the peak that `getrusage` gives, `VmHWM` does not include the memory of the parent process.
    """
    if device == "cuda":
        return (torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**20
    return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) / 1024


def seconds(work, device):
    "Seconds of a call, and its result."
    start = perf_counter()
    value = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start, value


def measure(case, shrink, device, file):
    "Run inside the process of one case: seconds of work and floor, memory of the first work, metrics."
    size, work = shrunk(case.split()[0], shrink), CASES[case][1]
    is_long = "sop" in case
    once = is_long and "ours" not in case  # measured once, without a warm-up
    recall_at = tuple(k for k in size["recall_at"] if k < size["n"])
    x, y = (t.to(device) for t in torch.load(file))
    work(x[:400], y[:400], tuple(k for k in recall_at if k < 400))
    floor(x[:64])
    before = megabytes(device, "VmRSS")
    first, values = seconds(lambda: work(x, y, recall_at), device)
    extra = megabytes(device, "VmHWM") - before
    times, floors = [first] if is_long else [], []
    while len(floors) < (1 if once else size["repeats"]):
        floors.append(seconds(lambda: floor(x), device)[0])
        if not once:
            times.append(seconds(lambda: work(x, y, recall_at), device)[0])
    ratio = median(times) / median(floors)
    return dict(seconds=median(times), floor=median(floors), ratio=ratio, extra_mb=extra, **values)


def child(case, args, file):
    "Measure in a new process; the result holds a `note` with the reason if the process did not finish."
    command = [args.oml if " oml" in case else sys.executable, __file__, "--child", case, "--data", file]
    command += ["--shrink", str(args.shrink), "--device", args.device]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=LIMIT_S)
    except (subprocess.TimeoutExpired, FileNotFoundError) as error:
        return {"note": f"over {LIMIT_S} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)}
    if done.returncode:
        return {"note": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def line(row):
    "One row of the table as text."
    if "note" in row:
        return f"{row['case']:22}{row['what']:25} {row['note']}"
    values = "  ".join(f"{name} {row[name]:.4f}" for name in row if re.match("R@|MAP|R-p", name))
    times = f"{row['seconds']:8.2f} s {row['floor']:8.2f} s {row['ratio']:6.2f}x"
    return f"{row['case']:22}{row['what']:25}{times} {row['extra_mb']:8.0f} MB  {values}"


def installed(package):
    "Version of a package, empty if it is not installed."
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def installed_oml(python):
    "Version of OpenMetricLearning in the environment of this interpreter."
    if python is None:
        return ""
    code = "from importlib.metadata import version; print(version('open-metric-learning'))"
    return subprocess.run([python, "-c", code], capture_output=True, encoding="utf-8").stdout.strip()


def hardware(device):
    "Name of the GPU or of the processor."
    if device == "cuda":
        return torch.cuda.get_device_name()
    if sys.platform != "linux":
        return platform.processor() or platform.machine()
    names = (
        part.split(":")[1].strip() for part in open("/proc/cpuinfo", encoding="utf-8") if part.startswith("model name")
    )
    return next(names, "") or platform.machine()


def write(rows, out, args):
    "Write the table as a CSV file named by hardware and version."
    import pandas as pd

    device, threads = hardware(args.device), torch.get_num_threads()
    versions = dict(
        torch=version("torch"),
        faiss=installed("faiss-cpu"),
        pml=installed("pytorch-metric-learning"),
        oml=installed_oml(args.oml),
    )
    short = "-".join(re.findall(r"[A-Za-z0-9]+", device.replace("(R)", "").replace("CPU", ""))[:4]).lower()
    file = out / f"retrieval-{short}-{threads}threads-torch{versions['torch']}.csv"
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows).assign(hardware=device, threads=threads, **versions, date=str(date.today()))
    table.round(4).to_csv(file, index=False)
    print(f"written: {file}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", nargs="+", default=["*"], metavar="CASE", help=f"names or patterns of cases: {', '.join(CASES)}"
    )
    parser.add_argument(
        "--oml",
        metavar="PYTHON",
        help="interpreter of an environment with open-metric-learning; without it the oml cases are left out",
    )
    parser.add_argument("--shrink", type=int, default=1, help="divide images and classes by this number, for a trial")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the CSV file. A full run is written to benchmarks/results; any other run is only printed "
        "unless this option is given",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device of the embeddings")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.chosen = [case for case in CASES if any(fnmatch(case, pattern) for pattern in args.cases)]
    if not args.oml:
        args.chosen = [case for case in args.chosen if " oml" not in case]
    if args.device == "cuda":
        args.chosen = [case for case in args.chosen if not re.search("oml|faiss", case)]
    if not args.chosen:
        parser.error(f"no case matches {' '.join(args.cases)!r}. Known cases: {', '.join(CASES)}")
    return args


def main():
    args = arguments()
    warnings.simplefilter("ignore")
    if args.child:
        return print(json.dumps(measure(args.child, args.shrink, args.device, args.data)))
    print(f"{'case':22}{'computes':25}{'seconds':>10} {'floor':>10} {'ratio':>7} {'extra memory':>11}")
    rows = []
    with TemporaryDirectory() as folder:
        for name in {case.split()[0]: None for case in args.chosen}:
            torch.save(random_embeddings(**shrunk(name, args.shrink)), f"{folder}/{name}.pt")
        for case in args.chosen:
            name = case.split()[0]
            row = dict(case=case, what=CASES[case][0], images=shrunk(name, args.shrink)["n"])
            rows.append(row | child(case, args, f"{folder}/{name}.pt"))
            print(line(rows[-1]), flush=True)
    out = args.out or (HERE / "results" if args.cases == ["*"] and args.shrink == 1 else None)
    if out is not None:
        write(rows, out, args)


if __name__ == "__main__":
    main()
