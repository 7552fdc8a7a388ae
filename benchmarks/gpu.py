"""Everything that is measured on the day a GPU is there, in one command that can be interrupted and repeated.

    make gpu                     # on a machine with a GPU
    make gpu ARGS="--tiny"       # a trial of all steps with tiny settings, also without a GPU
    make gpu ARGS="--only rows"  # steps whose name begins with "rows"
    make gpu ARGS="--list"       # the steps and their commands

In this order: the CUDA tests; the benchmarks train, losses, retrieval and loaders; the rows of CP Tables I, II and IV
on CUB at the setting of the paper (60 epochs at 224 pixels), each with one seed; their report.

A step takes minutes. Its output is shown and kept in `benchmarks/results/gpu-CARD/STEP.log`. A step that has ended well
has a file `STEP.done` beside it and is skipped the next time; delete the file to repeat the step. The report is always
written again. Rows are written to `runs`; a row that was interrupted resumes from its checkpoint. If a step fails, the
others still run, and the command ends with status 1.

The rows need CUB (`dml_nb data cub`) and the weights of BN-Inception. Where those weights are absent, the rows use
EfficientNet-Lite0 instead, and their results are recorded as another setting than the paper's. The rows train in
float32, because the paper names no other precision. `--tiny` trains one row on photographs in the package and keeps
everything in a folder of its own, so it replaces no result.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from dml_nb.data.datasets import is_here
from dml_nb.experiments.tables import find_rows, why_not_runnable
from dml_nb.models.weights import why_no_weights

HERE = Path(__file__).parent
ROOT = HERE.parent
TABLES = ("I", "II", "IV")
LOSSES = "proxy_anchor multi_similarity circle triplet contrastive softtriple proxy_nca_pp arcface".split()


def card() -> str:
    "Name of the GPU in a form that suits a folder."
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def script(name: str, *args) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), *map(str, args)]


def command(*args) -> list[str]:
    return [sys.executable, "-m", "dml_nb", *map(str, args)]


def row_steps(runs: Path) -> dict[str, list[str]]:  # step -> command
    "A step for each row of the three tables on CUB that can run."
    other = ["--backbone", "efficientnet_lite0"] if why_no_weights("bn_inception") else []
    rows = [row for table in TABLES for row in find_rows(table) if row.dataset == "cub" and not why_not_runnable(row)]
    place = ["--dataset", "cub", "--out", runs]
    return {f"rows-{row.id.replace('/', '-')}": command("run", row.id, *place, *other) for row in rows}


def steps(results: Path, runs: Path) -> dict[str, list[str]]:  # name -> command, in order
    "All steps of the full command."
    data = "cub" if is_here("cub") else "groceries-mini"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = ["--data", data, "--batch", 120, "--size", 224, "--steps", 20, "--skip", 10, "--out", results]
    kinds = ["--precisions", "float32", "bf16", "fp16"]
    out = ["--device", device, "--out", results]
    found = {
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "cuda", str(ROOT / "tests")],
        "bench-train": script("train", *size, *kinds),
        "bench-losses": script("losses", "--losses", *LOSSES, "--batches", 120, 512, *out),
        "bench-retrieval": script("retrieval", *out),
        "bench-loaders": script("loaders", "--data", data),
    }
    return found | row_steps(runs) | {"report": command("report", "--runs", runs)}


def tiny_steps(results: Path, runs: Path) -> dict[str, list[str]]:  # name -> command, in order
    "The same steps with tiny settings; the row trains on photographs of groceries."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train = "--backbone small_cnn --random --size 64 --batch 12 --steps 2 --skip 1 --repeats 1".split()
    place = (
        "--dataset groceries-mini --backbone small_cnn --set epochs=1 --set batch_size=12 --set warm_epochs=0".split()
    )
    row = next(row.id for row in find_rows("II") if row.dataset == "cub")
    start = ["--set", "embedding_size=16"]
    return {
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "cuda", str(ROOT / "tests" / "test_precision.py")],
        "bench-train": script("train", *train, "--out", results),
        "bench-losses": script(
            "losses", "--losses", "triplet", "--batches", 32, "--classes", 8, "--device", device, "--out", results
        ),
        "bench-retrieval": script(
            "retrieval", "--cases", "cub ours", "--shrink", 20, "--device", device, "--out", results
        ),
        "bench-loaders": script(
            "loaders", "--data", "groceries-mini", "--repeats", 1, "--images", 60, "--long-side", 0, "--batch", 10
        ),
        "rows-" + row.replace("/", "-"): command("run", row, *place, *start, "--out", runs),
        "report": command("report", "--runs", runs),
    }


def execute(name: str, step: list[str], folder: Path) -> bool:
    "Run a step unless it is done; show its output and keep it."
    done, log = folder / f"{name}.done", folder / f"{name}.log"
    if done.exists() and name != "report":  # which must hold the rows of this time
        print(f"{name}: done before", flush=True)
        return True
    print(f"{name}: {' '.join(step)}", flush=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            step, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
        )
        for line in process.stdout:
            print(f"    {line}", end="", flush=True)
            file.write(line.replace(f"{ROOT}/", ""))
    if status := process.wait():
        print(f"{name}: failed with status {status}, see {log}", flush=True)
        return False
    done.touch()
    print(f"{name}: done", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="try all steps with tiny settings, also without a GPU")
    parser.add_argument("--only", default="", help="the beginning of the names of the steps to run")
    parser.add_argument("--list", action="store_true", help="print the steps and their commands")
    parser.add_argument("--out", type=Path, help="folder instead of `benchmarks/results` and `runs`")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny and not args.list:
        parser.error("no GPU is present: add --tiny to try the steps without one.")
    out = args.out or (ROOT / ".out" / "gpu-tiny" if args.tiny else None)
    results, runs = (out / "results", out / "runs") if out else (HERE / "results", ROOT / "runs")
    chosen = (tiny_steps if args.tiny else steps)(results.resolve(), runs.resolve())
    chosen = {name: step for name, step in chosen.items() if name.startswith(args.only)}
    if args.list:
        return print("\n".join(f"{name}: {' '.join(step)}" for name, step in chosen.items()))
    folder = results / f"gpu-{card()}"
    folder.mkdir(parents=True, exist_ok=True)
    failed = [name for name, step in chosen.items() if not execute(name, step, folder)]
    print(
        f"{len(chosen) - len(failed)} of {len(chosen)} steps are done"
        + (f"; failed: {', '.join(failed)}" * bool(failed))
    )
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
