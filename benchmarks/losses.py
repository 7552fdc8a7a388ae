"""Forward and backward of every loss, beside pytorch-metric-learning's where it has the same loss.

    python benchmarks/losses.py                         # all of it, about half an hour on two cores
    python benchmarks/losses.py --losses circle triplet --batches 120 512

Each case runs in a process of its own. There, calls of both packages alternate, and medians are compared, so that a
slow moment of the machine hits both. At the largest batch, peak memory is measured in further processes, one for each
package: the whole process at its peak, and how much of that came after it was ready for the first call. Batches hold
8 images a class; embeddings have 512 dimensions. Where the other package has the loss, ours is set to its formula; the
formula "default" is ours as `create_loss` gives it, measured at the largest batch. Losses with a memory or with synthetic
classes are left out unless named: what they cost depends on how full the memory is.
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
from inspect import Parameter, signature
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter

import torch

from dml_nb.losses import core, create_loss, list_losses

D, PER_CLASS = 512, 8
LIMIT_S, LIMIT_GB = 150, 10
HERE = Path(__file__).parent

# our loss: (our parameters, their class, their parameters); C and D are added where the signature has them
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


# modules of the losses with a memory or with synthetic classes
LEFT_OUT = ("memory", "prism", "virtual", "synthesis", "hierarchy", "hosts", "calibrate", "calibrate_hosts")


def plain_losses() -> list[str]:
    return [name for name in list_losses() if core._registry[name].__module__.rpartition(".")[2] not in LEFT_OUT]


def needs_classes(name: str) -> bool:
    takes = signature(core._registry[name]).parameters
    return "num_classes" in takes and takes["num_classes"].default is Parameter.empty


def ours(name, num_classes, default=False):
    params = {} if default else PEERS.get(name, ({},))[0]
    if name == "softtriple" and num_classes > 1000:
        params = params | dict(proxies_per_class=2)  # the paper's value for Stanford Online Products
    loss = create_loss(name, num_classes, D, **params)
    loss.set_epoch(1000)
    return loss


def theirs(name, num_classes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_metric_learning import losses
    if name not in PEERS:
        return None
    _, cls, params = PEERS[name]
    sizes = dict(num_classes=num_classes, embedding_size=D) if needs_classes(name) and cls != "ManifoldLoss" else {}
    if name == "softtriple" and num_classes > 1000:
        params = params | dict(centers_per_class=2)
    loss = getattr(losses, cls)(**sizes, **params)
    if cls == "ManifoldLoss":  # takes the meta-class of each sample instead of its label
        plain = loss.forward
        loss.forward = lambda x, y: plain(x, indices_tuple=y % params["K"])
    return loss


def data(batch, num_classes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(batch // PER_CLASS).repeat_interleave(PER_CLASS) % num_classes
    centers = torch.randn(num_classes, D, generator=generator)
    return centers[labels] + torch.randn(batch, D, generator=generator), labels


def step(loss, x, y):
    start = perf_counter()
    x = x.clone().requires_grad_()
    loss(x, y).backward()
    for p in loss.parameters():
        p.grad = None
    return perf_counter() - start


def measure(name, batch, num_classes, who, default=False, budget=1.5):
    "In a process of its own: medians in milliseconds, or the peak memory in MB of one package."
    x, y = data(batch, num_classes)
    both = {}
    if who != "theirs":
        both["ours"] = ours(name, num_classes, default)
    if who in ("both", "theirs") and not default and (their := theirs(name, num_classes)) is not None:
        both["theirs"] = their
    if who in ("ours", "theirs"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for loss in both.values():
            step(loss, x, y)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"mb": (peak - before) / 1024, "process_mb": peak / 1024}
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
    "Measure in a fresh process; a word instead of numbers where it was stopped."
    command = [sys.executable, __file__, "--child", json.dumps([name, batch, num_classes, who, default])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"over {LIMIT_S} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return {
            "failed": f"over {LIMIT_GB} GB"
            if "alloc" in done.stderr or "MemoryError" in done.stderr
            else lines[-1][:120]
        }
    return json.loads(done.stdout.splitlines()[-1])


def cases(names, batches, classes):
    for name in names:
        for default in (False, True) if PEERS.get(name, ({},))[0] else (False,):
            for batch in batches[-1:] if default else batches:
                for num_classes in classes if needs_classes(name) else classes[:1]:
                    yield name, default, batch, num_classes


def run(names, batches, classes):
    for name, default, batch, num_classes in cases(names, batches, classes):
        peer = name in PEERS and not default
        row = dict(
            loss=name,
            variant="default" if default or name not in PEERS else PEERS[name][1],
            batch=batch,
            classes=num_classes if needs_classes(name) else "",
        )
        got, note = child(name, batch, num_classes, "both" if peer else "time", default), ""
        if "failed" in got and peer:  # most likely theirs: a B x B x B table
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
    def show(value, unit):
        return f"{value:9.2f} {unit}" if value is not None else " " * 10 + "-" + " "

    ratio = f"{row['ratio']:6.1f}x" if row["ratio"] else "      -"
    return (
        f"{row['loss']:22}{row['variant'][:20]:21}{row['batch']:6}{row['classes']!s:>7} {show(row['ours_ms'], 'ms')} {show(row['theirs_ms'], 'ms')} {ratio} "
        f"{show(row.get('ours_mb'), 'MB')} {show(row.get('theirs_mb'), 'MB')}  {row['note']}"
    )


def summary(rows):
    ratios = {}
    for row in rows:
        if row["ratio"]:
            ratios.setdefault(row["loss"], []).append(row["ratio"])
    if not ratios:
        return
    every = [r for some in ratios.values() for r in some]
    left_out = sum(row["note"].startswith("theirs") for row in rows)
    print(
        f"geometric mean over {len(ratios)} losses (of each loss's own geometric mean): {geometric_mean(map(geometric_mean, ratios.values())):.2f}x"
    )
    print(
        f"geometric mean over all {len(every)} cases: {geometric_mean(every):.2f}x; lowest {min(every):.2f}x; {left_out} cases without a ratio, because theirs did not finish"
    )


def main():
    import pandas as pd

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=None, metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=[120, 512, 2048])
    parser.add_argument("--classes", nargs="+", type=int, default=[100, 11318])
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder of the CSV; a full run goes to benchmarks/results, any other is only printed unless this is given, and then renews its losses' lines",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, batch, num_classes, who, default = json.loads(args.child)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_GB * 2**30, LIMIT_GB * 2**30))
        return print(
            json.dumps(
                measure(
                    name,
                    batch,
                    max(num_classes, batch // PER_CLASS) if not needs_classes(name) else num_classes,
                    who,
                    default,
                )
            )
        )
    unknown = set(args.losses or []) - set(list_losses())
    if unknown:
        parser.error(f"unknown loss {sorted(unknown)[0]!r}: known are {', '.join(list_losses())}")
    print(
        f"{'loss':22}{'formula':21}{'batch':>6}{'C':>7} {'ours':>12} {'theirs':>12} {'ratio':>7} {'ours peak':>12} {'theirs peak':>12}"
    )
    rows = []
    for row in run(args.losses or plain_losses(), args.batches, args.classes):
        rows.append(row)
        print(line(row), flush=True)
    summary(rows)
    out = args.out or (HERE / "results" if args.losses is None and args.batches == [120, 512, 2048] else None)
    if out is None:
        return
    cpu = (
        next((part.split(":")[1].strip() for part in open("/proc/cpuinfo") if part.startswith("model name")), "")
        if sys.platform == "linux"
        else platform.processor()
    )
    hardware = (
        "-".join(re.findall(r"[A-Za-z0-9]+", cpu.replace("(R)", "").replace("CPU", ""))[:4]).lower()
        or platform.machine()
    )
    file = (
        out
        / f"losses-{hardware}-{torch.get_num_threads()}threads-torch{version('torch')}-pml{version('pytorch-metric-learning')}.csv"
    )
    out.mkdir(parents=True, exist_ok=True)
    table = (
        pd.DataFrame(rows)
        .assign(
            cpu=cpu,
            threads=torch.get_num_threads(),
            torch=version("torch"),
            pml=version("pytorch-metric-learning"),
            date=str(date.today()),
        )
        .round(3)
    )
    if args.losses and file.exists():
        kept = pd.read_csv(file)
        table = pd.concat([kept[~kept.loss.isin(args.losses)], table]).sort_values("loss", kind="stable")
    table.to_csv(file, index=False)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
