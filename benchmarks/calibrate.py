"""What CP costs: a step of a multi-proxy loss without CP, with it, and with CP as its formulas are written.

    python benchmarks/calibrate.py                                    # about ten minutes
    python benchmarks/calibrate.py --classes 100 --hosts proxy_nca --threads 1

A step is forward, backward and, with CP, the update of full queues. The literal form visits every queue entry, for the
similarity and for the calibration, and pushes sample by sample; its value is checked against the closed form's first.
Each case runs in several processes, one after the other, since where a process's memory happens to lie moves its ratio
by some hundredths. In each, steps of the three alternate and medians are taken; of every column, the median over the
processes is shown, and beside the ratio its lowest and highest value. The column "enqueue" is a second update right
after the first, so with warm caches; inside the step it costs more. The last line is the memory of a step with the
11,318 classes of Stanford Online Products.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from dml_nb.core.similarity import unit
from dml_nb.losses.calibrate_hosts import calibrate
from dml_nb.losses.calibrate_proxy import CalibrateProxyLoss
from dml_nb.losses.proxy_anchor import multi_proxy_similarity

B, D, K, CAPACITY = 150, 512, 3, 30
TARGET = 1.15
NEVER = 10**9
HERE = Path(__file__).parent


class Literal:
    "CP around the host of a given loss, formula by formula, with a queue of its own."

    def __init__(self, loss: CalibrateProxyLoss):
        self.loss, memory = loss, loss.global_center
        self.queue, self.position, self.count = memory.queue.clone(), memory.position.tolist(), memory.count.tolist()

    def parameters(self):
        return self.loss.parameters()

    def __call__(self, x, y):
        loss, z, w = self.loss, unit(x), unit(self.loss.proxies)
        filled = torch.tensor(self.count) > 0
        entry_similarity = (z @ self.queue.flatten(0, 1).T).unflatten(1, (-1, CAPACITY)).sum(2) / torch.tensor(
            self.count
        ).clamp_min(1)
        distance = (w[:, :, None] - self.queue[:, None]).square().sum(3)  # (C, K, m); the queues are full
        value = loss.host(multi_proxy_similarity(x, loss.proxies, loss.proxy_temp) + entry_similarity, y)
        value = value + (distance.mean((1, 2)) * filled).sum()
        return value + loss.regulariser(loss.proxies) if loss.regulariser else value

    def remember(self, x, y):
        for z, c in zip(unit(x.detach()), y.tolist()):
            self.queue[c, self.position[c]] = z
            self.position[c], self.count[c] = (self.position[c] + 1) % CAPACITY, min(self.count[c] + 1, CAPACITY)


def step(loss, x, y, remember):
    start = perf_counter()
    x = x.clone().requires_grad_()
    loss(x, y).backward()
    for p in loss.parameters():
        p.grad = None
    if remember:
        loss.remember(x.detach(), y)
    return perf_counter() - start


def measure(host, num_classes, threads, budget):
    "In a process of its own: medians in milliseconds."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batches = [(torch.randn(B, D), torch.randint(0, num_classes, (B,))) for _ in range(8)]
    without, cp = calibrate(host, num_classes, D, start_epoch=NEVER), calibrate(host, num_classes, D, start_epoch=0)
    for part in range(CAPACITY):
        cp.remember(torch.randn(num_classes, D), torch.arange(num_classes))
    literal = Literal(cp)
    torch.testing.assert_close(literal(*batches[0]), cp(*batches[0]), rtol=1e-4, atol=1e-4)
    cases = {"without": (without, False), "cp": (cp, True), "literal": (literal, True), "enqueue": None}
    times = {name: [] for name in cases}
    start, number = perf_counter(), 0
    while perf_counter() - start < budget or number < 13:
        x, y = batches[number % len(batches)]
        for name in ("without", "cp"):
            times[name].append(step(cases[name][0], x, y, cases[name][1]))
        if number % 8 == 0:  # rarely: it is slow, and empties the caches for the others
            times["literal"].append(step(literal, x, y, True))
            for _ in range(2):
                for name in ("without", "cp"):
                    step(cases[name][0], x, y, cases[name][1])
        began = perf_counter()
        cp.remember(x, y)
        times["enqueue"].append(perf_counter() - began)
        number += 1
    return {name: median(values) * 1000 for name, values in times.items()}


def measure_memory(num_classes, threads):
    "In a process of its own: megabytes of the loss, of the process with full queues, and at the peak of three steps."
    torch.set_num_threads(threads)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    loss = calibrate("proxy_anchor", num_classes, D, start_epoch=0)
    for part in range(CAPACITY):
        loss.remember(torch.randn(num_classes, D), torch.arange(num_classes))
    state = sum(t.numel() * t.element_size() for t in [*loss.parameters(), *loss.buffers()]) / 2**20
    before = peak()
    for _ in range(3):
        step(loss, torch.randn(B, D), torch.randint(0, num_classes, (B,)), True)
    return dict(state=state, before=before, peak=peak())


def child(*case):
    "Measure in a fresh process."
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def line(row):
    verdict = "" if row["cp_ratio"] <= TARGET else f"  above {TARGET}"
    return f"{row['host']:14}{row['classes']:6}{row['without_ms']:12.2f} ms{row['cp_ms']:9.2f} ms{row['enqueue_ms']:9.2f} ms{row['literal_ms']:10.1f} ms{row['cp_ratio']:8.3f}x ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}){row['literal_ratio']:9.1f}x{verdict}"


def main():
    import pandas as pd

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", nargs="+", default=["proxy_anchor", "proxy_nca", "softtriple"], metavar="NAME")
    parser.add_argument("--classes", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="for each process")
    parser.add_argument("--processes", type=int, default=7, help="for each case")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case = json.loads(args.child)
        return print(json.dumps(measure_memory(*case[1:]) if case[0] == "memory" else measure(*case)))
    print(f"B={B} D={D} K={K} m={CAPACITY}, {args.threads} threads; CP over without: target {TARGET}x")
    print(
        f"{'host':14}{'C':>6}{'without CP':>15}{'CP':>12}{'enqueue':>12}{'literal CP':>13}{'CP/w.o. (range)':>22}{'literal/CP':>10}"
    )
    rows = []
    for num_classes in args.classes:
        for host in args.hosts:
            each = [child(host, num_classes, args.threads, args.seconds) for _ in range(args.processes)]
            ratios = [ms["cp"] / ms["without"] for ms in each]
            rows.append(
                dict(
                    host=host,
                    classes=num_classes,
                    **{f"{name}_ms": median(ms[name] for ms in each) for name in each[0]},
                    cp_ratio=median(ratios),
                    ratio_low=min(ratios),
                    ratio_high=max(ratios),
                    literal_ratio=median(ms["literal"] / ms["cp"] for ms in each),
                )
            )
            print(line(rows[-1]), flush=True)
    used = child("memory", 11_318, args.threads)
    print(
        f"C=11318: loss {used['state']:.0f} MiB, process with full queues {used['before']:.0f} MiB, peak of three steps {used['peak']:.0f} MiB"
    )
    rows.append(dict(host="proxy_anchor", classes=11_318, state_mib=used["state"], peak_mib=used["peak"]))
    cpu = (
        next(
            (part.split(":")[1].strip() for part in open("/proc/cpuinfo") if part.startswith("model name")),
            platform.processor(),
        )
        if sys.platform == "linux"
        else platform.processor()
    )
    file = args.out / f"calibrate-{args.threads}threads-torch{version('torch')}.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).assign(cpu=cpu, threads=args.threads, torch=version("torch"), date=str(date.today())).round(
        3
    ).to_csv(file, index=False)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
