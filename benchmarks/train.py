"""Images per second of a training and of its parts, and the ratio to a plain loop of PyTorch, in one run.

    python benchmarks/train.py                                     # about three minutes on two cores
    python benchmarks/train.py --data cub --batch 120 --size 224   # on a GPU
    python benchmarks/train.py --precisions float32 bf16 fp16 --compile

The plain loop is what the published training scripts do: a DataLoader with torchvision's transforms, the network, the
criterion, clipping and an optimiser step. It has the same images, crops, batches, workers, weights, loss and optimiser
as the Learner. Rounds of the plain loop and of the Learner in each precision alternate, so a slow moment of the machine
affects all of them, and the medians are compared. The first steps of a round, in which the workers start, do not count.

A further round of the Learner stops the clock at each event of a step. It shows the seconds of data, forward, loss,
backward, optimiser and queue. On a GPU the clock waits for all work at each event, so this round is slower as a whole.
"optimiser" includes clipping; "queue" is the memory of the loss; "rest" is what the other callbacks and the log take.
The evaluation embeds and ranks the test images, and embeds training images for the deviation (CP Eq. 10).
"""

import argparse
import gc
import platform
import re
import sys
from collections import Counter
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter

import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.learner import CancelFitException
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dml_nb.data import load_dataset
from dml_nb.data.loaders import usable_cpus
from dml_nb.losses import create_loss
from dml_nb.models import create_embedder
from dml_nb.training.learner import dml_learner, image_dls
from dml_nb.training.precision import TRAINING_PRECISIONS, precision_of

HERE = Path(__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PIN = DEVICE.type == "cuda"


def wait():
    "Let the GPU finish its work, so that the clock is right."
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def hardware() -> str:
    "Name of the GPU or of the processor."
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    if sys.platform != "linux":
        return platform.processor() or platform.machine()
    lines = open("/proc/cpuinfo", encoding="utf-8")
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class PlainImages(Dataset):
    "What a user of torch writes."

    def __init__(self, images, spec):
        self.images, self.labels, self.mode = images, images.labels.tolist(), "L" if spec.channels == 1 else "RGB"
        to_floats = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]
        self.transform = v2.Compose([v2.RandomResizedCrop(spec.crop), v2.RandomHorizontalFlip(), *to_floats])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images.image(i).convert(self.mode)), self.labels[i]


class Parts:
    "Data, network and loss of one training, with the same weights each time."

    def __init__(self, args, data):
        torch.manual_seed(0)
        size = dict(image_size=args.size)
        self.model = create_embedder(args.backbone, 512, pretrained=not args.random, frozen_bn=True, **size)
        start = dict(start_epoch=0) if args.loss.startswith("cp_") else {}
        self.loss = create_loss(args.loss, num_classes=len(data.train.classes), embedding_size=512, **start)
        self.data, self.args = data, args


def plain_rate(parts: Parts) -> float:  # images per second
    "The loop of a published script."
    args, model, criterion = parts.args, parts.model.to(DEVICE), parts.loss.to(DEVICE)
    images = PlainImages(parts.data.train, parts.model.spec)
    options = dict(num_workers=args.workers, persistent_workers=args.workers > 0, pin_memory=PIN)
    loader = DataLoader(images, args.batch, shuffle=True, drop_last=True, **options)
    groups = [dict(params=model.parameters(), lr=1e-4), dict(params=criterion.parameters(), lr=1e-2)]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    model.train()
    step, done = 0, args.skip + args.steps
    while step < done:
        for x, y in islice(loader, done - step):
            if step == args.skip:
                wait()
                started = perf_counter()
            x, y = x.to(DEVICE), y.to(DEVICE)
            z = model(x)
            value = criterion(z, y)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_value_(model.parameters(), 10)
            optimizer.step()
            if hasattr(criterion, "remember"):
                criterion.remember(z.detach(), y)
            step += 1
    wait()
    seconds, loader._iterator = perf_counter() - started, None  # ends the workers
    return args.steps * args.batch / seconds


class StopAfter(Callback):
    "Take the time of some steps, then stop."

    order = 90

    def __init__(self, skip: int, steps: int):
        self.skip, self.steps, self.done = skip, steps, 0

    def after_batch(self):
        if not self.training:
            return
        self.done += 1
        if self.done == self.skip:
            wait()
            self.started = perf_counter()
        if self.done == self.skip + self.steps:
            wait()
            self.seconds = perf_counter() - self.started
            self.learn.retrieval_metrics.is_evaluated = True  # no evaluation of the stopped training
            raise CancelFitException


class PhaseClock(Callback):
    "Stop the clock at the events of a step, after all other callbacks."

    order, run_valid = 80, False

    def __init__(self, skip: int):
        self.skip, self.steps, self.phase_seconds, self.last = skip, 0, Counter(), None

    def mark(self, phase):
        wait()
        now = perf_counter()
        if self.last is not None and self.steps >= self.skip:
            self.phase_seconds[phase] += now - self.last
        self.last = now

    def before_fit(self):
        remember = getattr(self.loss_func, "remember", None)

        def timed(*args):
            self.mark("rest")
            remember(*args)
            self.mark("queue")

        if remember:
            self.loss_func.remember = timed

    def before_batch(self):
        self.mark("data")

    def after_pred(self):
        self.mark("forward")

    def after_loss(self):
        self.mark("loss")

    def after_backward(self):
        self.mark("backward")

    def after_step(self):
        self.mark("optimiser")

    def after_batch(self):
        self.mark("rest")
        self.steps += 1


def create_learner(parts: Parts, precision: str, cbs):
    args = parts.args
    dls = image_dls(parts.data, parts.model.spec, args.batch, workers=args.workers)
    options = dict(warm_epochs=0, precision=precision, compile=args.compile, deterministic=args.deterministic)
    return dml_learner(dls, parts.model, parts.loss, cbs=cbs, deviation_images=args.deviation_images, **options)


def train(learn):
    "Train until `StopAfter` stops, without an evaluation."
    steps = learn.stop_after.skip + learn.stop_after.steps
    with learn.no_bar(), learn.no_logging():
        learn.retrieval_metrics.epoch_is_due = lambda: False
        learn.fit(1 + steps // len(learn.dls.train))
    learn.dls.train._iterator = None  # ends the workers


def our_rate(parts: Parts, precision: str) -> tuple[float, str]:  # images per second, the precision that was used
    args = parts.args
    learn = create_learner(parts, precision, [StopAfter(args.skip, args.steps)])
    train(learn)
    return args.steps * args.batch / learn.stop_after.seconds, precision_of(learn)


def phases(parts: Parts, precision: str) -> dict[str, float]:  # phase -> seconds per image
    args, clock = parts.args, PhaseClock(parts.args.skip)
    learn = create_learner(parts, precision, [clock, StopAfter(args.skip, args.steps)])
    train(learn)
    found = {name: seconds / (args.steps * args.batch) for name, seconds in clock.phase_seconds.items()}
    started = perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.validate()
    wait()
    return found | {"evaluation": (perf_counter() - started) / len(parts.data.test)}


def measure(args, data) -> list[dict]:  # a line for each number
    "Alternate the loops, then measure the phases."
    rates, used = {"plain loop": []}, {}
    for precision in args.precisions:
        rates[f"Learner, {precision}"] = []
    for number in range(args.repeats):
        for name, found in rates.items():
            if name == "plain loop":
                found.append(plain_rate(Parts(args, data)))
            else:
                rate, used[name] = our_rate(Parts(args, data), name.split(", ")[1])
                found.append(rate)
            gc.collect()
            print(f"round {number}: {name:20} {found[-1]:9.1f} images/s", flush=True)
    plain, rows = median(rates["plain loop"]), []
    for name, found in rates.items():
        rows.append(dict(what=name, images_per_second=median(found), ratio=median(found) / plain, used=used.get(name)))
    for precision in args.precisions:
        for phase, seconds in phases(Parts(args, data), precision).items():
            rows.append(dict(what=f"{precision}: {phase}", images_per_second=1 / max(seconds, 1e-9), ratio=None))
    return rows


def write(rows, args, out: Path):
    "Write the table as a CSV file named by hardware and version."
    device, threads = hardware(), torch.get_num_threads()
    short = "-".join(re.findall(r"[A-Za-z0-9]+", device.replace("(R)", "").replace("CPU", ""))[:4]).lower()
    settings = {name: getattr(args, name) for name in ("data", "backbone", "loss", "size", "batch", "workers", "steps")}
    switches = dict(compile=args.compile, deterministic=args.deterministic)
    known = dict(hardware=device, threads=threads, torch=version("torch"), date=str(date.today()))
    file = out / f"train-{short}-{threads}threads-torch{known['torch']}.csv"
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).assign(**settings, **switches, **known).round(3).to_csv(file, index=False)
    print(f"written: {file}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="groceries-mini", help="a data set of photographs")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--random", action="store_true", help="random weights, where there are no others")
    parser.add_argument("--loss", default="cp_proxy_anchor")
    parser.add_argument("--size", type=int, default=96, help="pixels of the crop")
    parser.add_argument("--batch", type=int, default=30)
    parser.add_argument("--steps", type=int, default=6, help="steps of a round that count")
    parser.add_argument("--skip", type=int, default=2, help="first steps of a round, which do not count")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all loops")
    parser.add_argument("--workers", type=int, default=usable_cpus())
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"], choices=TRAINING_PRECISIONS)
    parser.add_argument("--deviation-images", type=int, help="training images of the deviation; default: all")
    parser.add_argument("--compile", action="store_true", help="the Learner compiles the network; skip more steps")
    parser.add_argument("--deterministic", action="store_true", help="the Learner allows deterministic algorithms only")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the CSV file")
    args = parser.parse_args()
    if args.skip < 1:
        parser.error(f"--skip must be at least 1, got {args.skip}: the first step prepares memory and workers.")
    torch.set_num_threads(usable_cpus())
    print(f"{hardware()}, {args.workers} workers, torch {torch.__version__}")
    print(f"{args.backbone}, {args.loss}, batches of {args.batch} images of {args.data} at {args.size} pixels")
    rows = measure(args, load_dataset(args.data))
    print(pd.DataFrame(rows).fillna("").to_string(index=False, float_format=lambda v: f"{v:.2f}"))
    write(rows, args, args.out)


if __name__ == "__main__":
    main()
