"""What CP costs: a step of a multi-proxy loss without CP, with CP, and with CP as its formulas are written.

    python benchmarks/calibrate.py                                    # about ten minutes
    python benchmarks/calibrate.py --classes 100 --hosts proxy_nca --threads 1 --processes 1

A step is forward and backward; with CP it includes the update of full queues. The literal form visits every queue entry
for the similarity and for the calibration, and pushes sample by sample. Its value is checked against the closed form
first. Every case runs in several processes, one after the other, because the memory layout of one process shifts its
ratio by some hundredths. Each process alternates the variants and takes medians; the table shows the median over the
processes, and the lowest and highest ratio.

Two more measurements follow: the share of CP in a whole training step of EfficientNet-Lite0 at 224 pixels, and the
memory of a step with the 11,318 classes of Stanford Online Products.
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
from dml_nb.losses import calibrate
from dml_nb.losses.calibrate_proxy import CalibrateProxyLoss
from dml_nb.losses.proxy_anchor import multi_proxy_similarity

B, D, K, CAPACITY = 150, 512, 3, 30
TARGETS = {100: 1.35, 1000: 1.1}  # classes -> step with CP over step without
SHARE_TARGET = 0.01  # CP's share of a whole training step
STEP_IMAGES = 30  # images of that step: a batch that fits into the memory of a small machine
NEVER = 10**9
HERE = Path(__file__).parent


class LiteralCP:
    "CP around the host of a given loss, formula by formula, with a queue of its own."

    def __init__(self, loss: CalibrateProxyLoss):
        self.loss, queues = loss, loss.global_center
        self.queue, self.pushed = queues.queue.clone(), queues.pushed.tolist()

    def parameters(self):
        return self.loss.parameters()

    def __call__(self, x, y):
        loss, z, w = self.loss, unit(x), unit(self.loss.proxies)  # the queues are full
        global_similarity = (z @ self.queue.flatten(0, 1).T).unflatten(1, (-1, CAPACITY)).mean(2)
        distance_CKm = (w[:, :, None] - self.queue[:, None]).square().sum(3)
        value = loss.host(multi_proxy_similarity(x, loss.proxies, loss.proxy_temp) + global_similarity, y)
        value = value + distance_CKm.mean((1, 2)).sum()
        return value + loss.regulariser(w) if loss.regulariser else value

    def remember(self, x, y):
        for z, c in zip(unit(x.detach()), y.tolist()):
            self.queue[c, self.pushed[c] % CAPACITY] = z
            self.pushed[c] += 1


def step(loss, x, y, remember):
    "Seconds of one forward and backward pass, and of the update of the queues."
    start = perf_counter()
    x = x.clone().requires_grad_()
    loss(x, y).backward()
    for p in loss.parameters():
        p.grad = None
    if remember:
        loss.remember(x.detach(), y)
    return perf_counter() - start


def with_full_queues(host, num_classes):
    loss = calibrate(host, num_classes, D, start_epoch=0)
    for _ in range(CAPACITY):
        loss.remember(torch.randn(num_classes, D), torch.arange(num_classes))
    return loss


def measure_ratio(host, num_classes, threads, budget):
    "In a process of its own: medians in milliseconds."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batches = [(torch.randn(B, D), torch.randint(0, num_classes, (B,))) for _ in range(8)]
    without, cp = calibrate(host, num_classes, D, start_epoch=NEVER), with_full_queues(host, num_classes)
    literal = LiteralCP(cp)
    torch.testing.assert_close(literal(*batches[0]), cp(*batches[0]), rtol=1e-4, atol=1e-4)
    times = {"without": [], "cp": [], "literal": [], "enqueue": []}
    start, number = perf_counter(), 0
    while perf_counter() - start < budget or number < 13:
        x, y = batches[number % len(batches)]
        times["without"].append(step(without, x, y, False))
        times["cp"].append(step(cp, x, y, True))
        began = perf_counter()
        cp.remember(x, y)
        times["enqueue"].append(perf_counter() - began)
        if number % 8 == 0:  # rarely, because it is slow and empties the caches for the others
            times["literal"].append(step(literal, x, y, True))
            step(without, x, y, False), step(cp, x, y, True)
        number += 1
    return {name: median(values) * 1000 for name, values in times.items()}


def measure_share(threads):
    "In a process of its own: milliseconds of a whole training step of EfficientNet-Lite0 at 224, and of CP in it."
    from dml_nb.models import create_embedder

    torch.set_num_threads(threads)
    model, cp = (
        create_embedder("efficientnet_lite0", D, pretrained=False).train(),
        with_full_queues("proxy_anchor", 100),
    )
    optimizer = torch.optim.AdamW([*model.parameters(), *cp.parameters()])
    images, y = torch.randn(STEP_IMAGES, 3, 224, 224), torch.randint(0, 100, (STEP_IMAGES,))
    whole, loss_alone = [], []
    for _ in range(4):
        start = perf_counter()
        embeddings = model(images)
        cp(embeddings, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        cp.remember(embeddings.detach(), y)
        whole.append(perf_counter() - start)
        loss_alone += [step(cp, embeddings.detach(), y, True) for _ in range(10)]
    return dict(step=median(whole[1:]) * 1000, cp=median(loss_alone) * 1000)


def measure_memory(num_classes, threads):
    "In a process of its own: MiB of the loss, of the process with full queues, and at the peak of three steps."
    torch.set_num_threads(threads)
    loss = with_full_queues("proxy_anchor", num_classes)
    state = sum(t.numel() * t.element_size() for t in [*loss.parameters(), *loss.buffers()]) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(3):
        step(loss, torch.randn(B, D), torch.randint(0, num_classes, (B,)), True)
    return dict(state=state, before=before, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


MEASUREMENTS = dict(ratio=measure_ratio, share=measure_share, memory=measure_memory)


def in_a_process(kind, *args):
    "A measurement in a fresh process."
    case = [sys.executable, __file__, "--child", json.dumps([kind, *args])]
    done = subprocess.run(case, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def ratio_row(host, num_classes, args):
    each = [in_a_process("ratio", host, num_classes, args.threads, args.seconds) for _ in range(args.processes)]
    ratios = [ms["cp"] / ms["without"] for ms in each]
    return dict(
        host=host,
        classes=num_classes,
        **{f"{name}_ms": median(ms[name] for ms in each) for name in each[0]},
        cp_ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        literal_ratio=median(ms["literal"] / ms["cp"] for ms in each),
    )


def show(row):
    target = TARGETS.get(row["classes"])
    verdict = f"  above the target {target}x" if target and row["cp_ratio"] > target else ""
    times = "".join(f"{row[f'{name}_ms']:10.2f} ms" for name in ("without", "cp", "enqueue", "literal"))
    ratios = f"{row['cp_ratio']:7.2f}x ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}){row['literal_ratio']:9.1f}x"
    print(f"{row['host']:14}{row['classes']:6}{times}{ratios}{verdict}", flush=True)


def cpu_name():
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def main():
    import pandas as pd

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", nargs="+", default=["proxy_anchor", "proxy_nca", "softtriple"], metavar="NAME")
    parser.add_argument("--classes", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="for each process")
    parser.add_argument("--processes", type=int, default=5, help="for each case")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *rest = json.loads(args.child)
        return print(json.dumps(MEASUREMENTS[kind](*rest)))
    print(f"B={B} D={D} K={K} m={CAPACITY}, {args.threads} threads")
    heads = ("without", "CP", "enqueue", "literal")
    print(f"{'host':14}{'C':>6}{''.join(f'{head:>13}' for head in heads)}{'CP/without':>21}{'literal/CP':>12}")
    rows = []
    for num_classes in args.classes:
        for host in args.hosts:
            rows.append(ratio_row(host, num_classes, args))
            show(rows[-1])
    share = in_a_process("share", args.threads)
    part = share["cp"] / share["step"]
    verdict = "" if part <= SHARE_TARGET else f", above the target of {SHARE_TARGET:.0%}"
    print(
        f"whole training step, EfficientNet-Lite0 at 224, {STEP_IMAGES} images: {share['step']:.0f} ms; "
        f"CP {share['cp']:.2f} ms, {part:.2%}{verdict}"
    )
    memory = in_a_process("memory", 11_318, args.threads)
    print(
        f"C=11318: loss {memory['state']:.0f} MiB, process with full queues {memory['before']:.0f} MiB, "
        f"peak of three steps {memory['peak']:.0f} MiB"
    )
    rows.append(dict(host="proxy_anchor", classes=100, whole_step_ms=share["step"], cp_ms=share["cp"], share=part))
    rows.append(dict(host="proxy_anchor", classes=11_318, state_mib=memory["state"], peak_mib=memory["peak"]))
    file = args.out / f"calibrate-{args.threads}threads-torch{version('torch')}.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows).assign(
        cpu=cpu_name(), threads=args.threads, torch=version("torch"), date=str(date.today())
    )
    table.round(5).to_csv(file, index=False)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
