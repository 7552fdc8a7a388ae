"""Time and memory of every loss, compared with pytorch-metric-learning where it has the same loss.

Measured is one forward and backward pass.

    python benchmarks/losses.py                         # all losses, about half an hour on two cores
    python benchmarks/losses.py --losses circle triplet --batches 120 512
    python benchmarks/losses.py --device cuda           # on a GPU

Each case runs in a process of its own. Calls of the two packages alternate, so a slow moment of the machine affects
both, and the medians are compared. At the largest batch, peak memory is measured in further processes, one for each
package: the peak of the whole process, and the part of it that came after the loss was ready for its first call.

A batch holds 8 images a class, and embeddings have 512 dimensions. Where the other package has the loss, ours is set to
its formula. The variant "default" is our loss as `create_loss` builds it; it is measured at the largest batch only.

Losses with a memory, with synthetic or coarse classes, or with CP are measured only when they are named, because their
cost depends on the state of the memory or of the schedule.
"""

import argparse
import json
import platform
import re
import resource
import subprocess
import sys
import warnings
from datetime import date
from importlib.metadata import version
from inspect import Parameter
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter

import torch

from dml_nb.losses import create_loss, list_losses, loss_parameters

D, PER_CLASS = 512, 8
LIMIT_S, LIMIT_GB = 150, 10  # of one process
DEVICE = "cpu"  # `main` sets it to `--device`
HERE = Path(__file__).parent

# our loss: (our parameters, their class, their parameters); C and D are added for losses with proxies
PEERS = {
    "contrastive": (dict(variant="pml"), "ContrastiveLoss", {}),
    "multi_similarity": (dict(mining_eps=None), "MultiSimilarityLoss", {}),
    "circle": ({}, "CircleLoss", {}),
    "triplet": (dict(rule="all", squared=False, reduction="active"), "TripletMarginLoss", dict(margin=0.2)),
    "margin": (dict(rule="all"), "MarginLoss", {}),
    "npair": (dict(preset="pml"), "NPairsLoss", {}),
    "angular": (dict(preset="pml"), "AngularLoss", {}),
    "tuplet_margin": ({}, "TupletMarginLoss", {}),
    "intra_pair_variance": ({}, "IntraPairVarianceLoss", {}),
    "lifted_structure": (dict(normalize=True), "LiftedStructureLoss", {}),
    "nca": ({}, "NCALoss", {}),
    "histogram": ({}, "HistogramLoss", {}),
    "ranked_list": (dict(preset="pml"), "RankedListLoss", dict(margin=0.4, Tn=10)),
    "norm_softmax": ({}, "NormalizedSoftmaxLoss", {}),
    "cosface": ({}, "CosFaceLoss", {}),
    "arcface": ({}, "ArcFaceLoss", {}),
    "softtriple": (dict(tau=0.0), "SoftTripleLoss", {}),
    "proxy_nca": (dict(smoothing=0.0), "ProxyNCALoss", {}),
    "proxy_nca_pp": ({}, "ProxyNCALoss", dict(softmax_scale=9)),
    "proxy_anchor": ({}, "ProxyAnchorLoss", {}),
    "manifold_proxy": (dict(num_proxies=50), "ManifoldLoss", dict(l=D, K=50)),
}


# losses with a memory, with synthetic or with coarse classes; they and the cp_* losses run only when named
ONLY_IF_NAMED = ("xbm", "mcl", "prism", "memvir", "proxy_synthesis", "smooth_proxy_anchor", "hpl")


def default_losses() -> list[str]:
    "The losses of a full run."
    return [name for name in list_losses() if name not in ONLY_IF_NAMED and not name.startswith("cp_")]


def needs_classes(name: str) -> bool:
    "Whether the loss cannot be built without the number of classes."
    parameters = loss_parameters(name)
    return "num_classes" in parameters and parameters["num_classes"].default is Parameter.empty


def ours(name, num_classes, default=False):
    "Our loss, set to the other package's formula unless `default`."
    params = {} if default else PEERS.get(name, ({},))[0]
    if name == "softtriple" and num_classes > 1000:
        params = params | dict(proxies_per_class=2)  # the paper's value for Stanford Online Products
    loss = create_loss(name, num_classes, D, **params)
    loss.set_epoch(1000)  # past the start of every schedule
    return loss


def theirs(name, num_classes):
    "The other package's loss, or None if it has none."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_metric_learning import losses
    if name not in PEERS:
        return None
    _, class_name, params = PEERS[name]
    has_classes = needs_classes(name) and class_name != "ManifoldLoss"
    sizes = dict(num_classes=num_classes, embedding_size=D) if has_classes else {}
    if name == "softtriple" and num_classes > 1000:
        params = params | dict(centers_per_class=2)
    loss = getattr(losses, class_name)(**sizes, **params)
    if class_name == "ManifoldLoss":  # it takes the meta-class of each sample instead of its label
        forward = loss.forward
        loss.forward = lambda x, y: forward(x, indices_tuple=y % params["K"])
    return loss


def random_batch(batch, num_classes):
    "Embeddings around class centres, with labels."
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(batch // PER_CLASS).repeat_interleave(PER_CLASS) % num_classes
    centers = torch.randn(num_classes, D, generator=generator)
    x = centers[labels] + torch.randn(batch, D, generator=generator)
    return x.to(DEVICE), labels.to(DEVICE)


def wait():
    "Let the GPU finish its work, so that the clock is right."
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_bytes():
    "The largest memory so far: of the GPU, or of this process."
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step(loss, x, y):
    "Seconds of one forward and backward pass."
    start = perf_counter()
    x = x.clone().requires_grad_()
    loss(x, y).backward()
    for p in loss.parameters():
        p.grad = None
    wait()
    return perf_counter() - start


def measure(name, batch, num_classes, who, default=False, budget=1.5):
    "Run inside the process of one case: median milliseconds, or peak memory in MB of one package."
    x, y = random_batch(batch, num_classes)
    both = {}
    if who != "theirs":
        both["ours"] = ours(name, num_classes, default).to(DEVICE)
    if who in ("both", "theirs") and not default and (their_loss := theirs(name, num_classes)) is not None:
        both["theirs"] = their_loss.to(DEVICE)
    if who in ("ours", "theirs"):
        before = peak_bytes()
        for loss in both.values():
            step(loss, x, y)
        return {"mb": (peak_bytes() - before) / 2**20, "process_mb": peak_bytes() / 2**20}
    times = {key: [] for key in both}
    for _ in range(2 if batch < 1000 else 1):
        for loss in both.values():
            step(loss, x, y)
    start = perf_counter()
    while perf_counter() - start < budget or min(map(len, times.values())) < 3:
        for key, loss in both.items():
            times[key].append(step(loss, x, y))
        if perf_counter() - start > LIMIT_S / 2:
            break
    return {key: median(values) * 1000 for key, values in times.items()}


def child(name, batch, num_classes, who, default=False):
    "Measure in a new process; the result holds `failed` with the reason if the process did not finish."
    command = [sys.executable, __file__, "--child", json.dumps([name, batch, num_classes, who, default])]
    command += ["--device", DEVICE]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"over {LIMIT_S} s"}
    if done.returncode:
        if "alloc" in done.stderr or "MemoryError" in done.stderr:
            return {"failed": f"over {LIMIT_GB} GB"}
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return {"failed": lines[-1][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def cases(names, batches, classes):
    "All cases as (loss, default, batch, number of classes)."
    for name in names:
        for default in (False, True) if PEERS.get(name, ({},))[0] else (False,):
            for batch in batches[-1:] if default else batches:
                for num_classes in classes if needs_classes(name) else classes[:1]:
                    yield name, default, batch, num_classes


def run(names, batches, classes):
    "Measure all cases; yield one row of the table each."
    for name, default, batch, num_classes in cases(names, batches, classes):
        peer = name in PEERS and not default
        row = dict(
            loss=name,
            variant="default" if default or name not in PEERS else PEERS[name][1],
            batch=batch,
            classes=num_classes if needs_classes(name) else "",
        )
        got, note = child(name, batch, num_classes, "both" if peer else "time", default), ""
        if "failed" in got and peer:  # usually the other package, which builds a B x B x B table for some losses
            note, got = f"theirs: {got['failed']}", child(name, batch, num_classes, "time")
        if "failed" in got:
            note = f"ours: {got['failed']}"
        row |= dict(ours_ms=got.get("ours"), theirs_ms=got.get("theirs"))
        row["ratio"] = row["theirs_ms"] / row["ours_ms"] if row["theirs_ms"] and row["ours_ms"] else None
        if batch == max(batches):
            for who in ("ours", "theirs") if peer else ("ours",):
                peak = child(name, batch, num_classes, who, default)
                row |= {f"{who}_mb": peak.get("mb"), f"{who}_process_mb": peak.get("process_mb")}
                note = note or (f"{who}: {peak['failed']}" if "failed" in peak else "")
        yield row | dict(note=note)


def line(row):
    "One row of the table as text."

    def show(value, unit):
        return f"{value:9.2f} {unit}" if value is not None else " " * 10 + "-" + " "

    ratio = f"{row['ratio']:6.1f}x" if row["ratio"] else "      -"
    case = f"{row['loss']:22}{row['variant'][:20]:21}{row['batch']:6}{row['classes']!s:>7}"
    times = f"{show(row['ours_ms'], 'ms')} {show(row['theirs_ms'], 'ms')} {ratio}"
    return f"{case} {times} {show(row.get('ours_mb'), 'MB')} {show(row.get('theirs_mb'), 'MB')}  {row['note']}"


def summary(rows):
    "Print the geometric means of the ratios."
    ratios = {}
    for row in rows:
        if row["ratio"]:
            ratios.setdefault(row["loss"], []).append(row["ratio"])
    if not ratios:
        return
    by_loss = [geometric_mean(of_loss) for of_loss in ratios.values()]
    every = [ratio for of_loss in ratios.values() for ratio in of_loss]
    unfinished = sum(row["note"].startswith("theirs") for row in rows)
    print(f"geometric mean over {len(ratios)} losses (each by its own geometric mean): {geometric_mean(by_loss):.2f}x")
    print(
        f"geometric mean over all {len(every)} cases: {geometric_mean(every):.2f}x; lowest {min(every):.2f}x; "
        f"{unfinished} cases without a ratio, because the other package did not finish"
    )


def processor() -> str:
    "Name of the GPU or of the processor."
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    if sys.platform != "linux":
        return platform.processor()
    names = (
        part.split(":")[1].strip() for part in open("/proc/cpuinfo", encoding="utf-8") if part.startswith("model name")
    )
    return next(names, "")


def write(rows, out, losses):
    "Write the table; after a run of some losses, replace only the rows of these losses."
    import pandas as pd

    cpu, threads = processor(), torch.get_num_threads()
    versions = dict(torch=version("torch"), pml=version("pytorch-metric-learning"))
    words = re.findall(r"[A-Za-z0-9]+", cpu.replace("(R)", "").replace("CPU", ""))[:4]
    hardware = "-".join(words).lower() or platform.machine()
    file = out / f"losses-{hardware}-{threads}threads-torch{versions['torch']}-pml{versions['pml']}.csv"
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows).assign(cpu=cpu, threads=threads, **versions, date=str(date.today())).round(3)
    if losses and file.exists():
        kept = pd.read_csv(file)
        table = pd.concat([kept[~kept.loss.isin(losses)], table]).sort_values("loss", kind="stable")
    table.to_csv(file, index=False)
    print(f"written: {file}")


def measure_child(case):
    "The inside of `child`: limit the memory, measure, print the result."
    name, batch, num_classes, who, default = json.loads(case)
    if DEVICE == "cpu":  # CUDA reserves more addresses than there is memory
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_GB * 2**30, LIMIT_GB * 2**30))
    if not needs_classes(name):
        num_classes = max(num_classes, batch // PER_CLASS)
    print(json.dumps(measure(name, batch, num_classes, who, default)))


def main():
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--losses",
        nargs="+",
        metavar="NAME",
        help="by default all losses except those with a memory, with synthetic or coarse classes, or with CP",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[120, 512, 2048], help="batch sizes")
    parser.add_argument(
        "--classes", nargs="+", type=int, default=[100, 11318], help="numbers of classes, for losses with proxies"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the CSV file. A full run is written to benchmarks/results. A run of some losses or batches is "
        "only printed unless this option is given; then it replaces the rows of its losses",
    )
    parser.add_argument("--device", default=DEVICE, choices=("cpu", "cuda"), help="device of the embeddings")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    DEVICE = args.device
    if args.child:
        return measure_child(args.child)
    unknown = set(args.losses or []) - set(list_losses())
    if unknown:
        parser.error(f"unknown loss {sorted(unknown)[0]!r}. Known losses: {', '.join(list_losses())}")
    sizes = f"{'loss':22}{'formula':21}{'batch':>6}{'C':>7}"
    print(f"{sizes} {'ours':>12} {'theirs':>12} {'ratio':>7} {'ours peak':>12} {'theirs peak':>12}")
    rows = []
    for row in run(args.losses or default_losses(), args.batches, args.classes):
        rows.append(row)
        print(line(row), flush=True)
    summary(rows)
    full_run = args.losses is None and args.batches == parser.get_default("batches")
    out = args.out or (HERE / "results" if full_run else None)
    if out is not None:
        write(rows, out, args.losses)


if __name__ == "__main__":
    main()
