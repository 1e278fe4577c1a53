"""Every method under one protocol: kNN and linear top-1 on real images, with two controls.

    python benchmarks/results.py --data /path/of/cifar10 --jobs 2         30 epochs of resnet8; takes hours
    python benchmarks/results.py --data /path/of/cifar10 --quick          2 epochs of a tenth of the images; minutes
    python benchmarks/results.py --data cifar10 --device cuda --backbone resnet18 --epochs 200 --amp bf16

`/path/of/cifar10` holds `train/` and `test/`, each with one folder of images per class; `cifar10` is downloaded. Each
row is a method's preset cifar. All rows share one backbone, batch size and number of epochs, a tenth of which is
warm-up. One rule sets the learning rate. --rates are multiples of the preset's rate, which is scaled with N here if the
method does not scale it. Each rate trains for a third of the epochs on a tenth of the training images, and another
tenth of them judges the kNN of h; the best rate makes the row. The held-out images choose nothing: figures are those of
the last epoch. The controls are the same network before training, and cross-entropy with all labels. Flags that are not
listed, such as --device or --amp, go to every run.

Runs are stored in --out, and each row has its own process. After a stop (Ctrl-C, SIGTERM, loss of power) the same
command goes on: a run with a result.json is kept, and a run without one continues from its checkpoint. The table and
the commands of its rows are printed and written to --out/results.md. Minutes and images/s count the training steps
only; the start, kNN and the short runs come on top.
"""

import argparse
import importlib
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import images
import linear_eval
from benchmarks import table
from images import CORES, Data, ensure

ROWS = {  # row -> (the method's file, its changes to the preset cifar)
    "SimCLR": ("simclr", ""),
    "MoCo v2": ("moco", "--projection-head mlp"),
    "BYOL": ("byol", ""),
    "SimSiam": ("simsiam", ""),
    "SwAV": ("swav", ""),
    "SupCon": ("supcon", ""),
    "cross-entropy": ("supcon", "--loss cross-entropy"),
    "untrained": ("simclr", "--epochs 0"),
}
SCALED = ("simclr", "byol", "simsiam")  # these methods multiply their --lr by N/256
HEAD = ("", "lr", "kNN of h", "linear on h", "images/s", "minutes", "GB of the GPU")
FORM = {"knn_top1": 3, "linear_top1": 3, "images_per_second": 0, "minutes": 1, "gigabytes": 2}  # digits
SET = ("preset", "lr", "warmup_epochs", "knn_every", "projection_head", "loss", "seed", "resume")  # set by the protocol


def parser() -> argparse.ArgumentParser:
    result = table.parser(__doc__)
    add, given = result.add_argument, os.environ.get("CIFAR10_FOLDER", "cifar10")
    add("--data", default=given, help="a folder with train/ and test/, or cifar10 (default $CIFAR10_FOLDER or cifar10)")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="some of the rows (default: all)")
    add("--backbone", default="resnet8", help="network of every row (default resnet8)")
    add("--epochs", type=int, default=30, help="epochs of every row (default 30)")
    add("--batch-size", type=int, default=128, help="N of every row (default 128)")
    add("--rates", type=float, nargs="+", default=[1, 3, 10], help="multiples of the preset's (default 1 3 10)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="for SimCLR; other rows take the first (default 0 1 2)")
    add("--jobs", type=int, default=1, help="how many rows run at a time (default 1)")
    add("--threads", type=int, default=0, help="threads of each row (default: cores divided by --jobs)")
    add("--quick", action="store_true", help="take 2 epochs, a tenth of the images, the preset's rate and one seed")
    add("--out", default="runs/results", help="folder of the runs (default runs/results)")
    return result


def tenth(data: Data) -> Data:
    """Take a tenth of each class's training images to train on, and another tenth to judge by. Raises `InputError`
    unless all images have a label."""
    ensure(data.labelled and (data.train.labels >= 0).all(), f"--data {data.name}: give images that all have a label")
    labels, place = data.train.labels, torch.zeros(len(data.train), dtype=torch.long)
    for label in labels.unique():
        of_class = (labels == label).nonzero().squeeze(1)
        place[of_class] = torch.arange(len(of_class)) % 10
    return Data(data.name, data.train.at(place == 0), data.train.at(place == 1), data.classes)


def words_of(row: str, args: argparse.Namespace, rest: Sequence[str], seed: int, rate: float, epochs: int) -> list[str]:
    """The command-line flags for one run of a row."""
    method, own = ROWS[row]
    kind = importlib.import_module(method).Config
    recipe = kind.preset("cifar")
    lr = recipe.lr * rate * (1 if method in SCALED else args.batch_size / recipe.batch_size)
    given = {"preset": "cifar", "data": args.data, "backbone": args.backbone, "epochs": epochs, "lr": f"{lr:.3g}"}
    given |= {"batch_size": args.batch_size, "warmup_epochs": f"{epochs / 10:g}", "seed": seed, "knn_every": epochs}
    words = [word for name, value in given.items() for word in (common.dashed(name), str(value))]
    return [*words, *shlex.split(own), *rest]


def one_run(row: str, words: Sequence[str], out: Path, data: Data, linear: bool) -> dict[str, Any]:
    """Train, judge and write result.json, or read it if it exists. A run that diverges is a result, too."""
    if (written := out / "result.json").exists():
        return json.loads(written.read_text())
    name, device = ROWS[row][0], data.train.device
    method = importlib.import_module(name)
    config = common.parse_args(method.Config, [*words, "--resume", str(out)])
    setting = f"{table.machine(str(device))}, {torch.get_num_threads()} threads"
    command = f"python {name}.py {shlex.join(words)} && python linear_eval.py runs/{name}"
    result = {"lr": config.lr, "command": command, "setting": setting}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        result["knn_top1"] = method.train(config, data)["knn_top1"]
    except common.RunFailure as error:
        result |= {"knn_top1": 0.0, "failed": str(error)}
    if device.type == "cuda":
        result["gigabytes"] = torch.cuda.max_memory_allocated(device) / 1e9
    if speeds := [float(line.split(",")[-1]) for line in (out / "log.csv").read_text().split()[1:]]:
        each = len(data.train) // config.batch_size * config.batch_size
        result |= {"images_per_second": statistics.median(speeds), "minutes": sum(each / s for s in speeds) / 60}
    if linear and "failed" not in result:
        config, model = common.load_run(out)
        model = model.to(device, memory_format=torch.channels_last)
        result["linear_top1"] = linear_eval.evaluate(linear_eval.parse([str(out)]), config, model, data)["linear_top1"]
    common.save_whole(json.dumps(result, indent=1).encode(), written)
    return result


def one_row(row: str, seed: int, args: argparse.Namespace, rest: list[str]) -> None:
    """The work of one process: choose the row's learning rate by the rule, then make its run."""
    folder = Path(args.out) / row.replace(" ", "-")
    if (folder / f"seed-{seed}" / "result.json").exists():
        return
    config = common.parse_args(
        importlib.import_module(ROWS[row][0]).Config, words_of(row, args, rest, seed, 1, args.epochs)
    )
    data = images.load(config, common.pick_device(config.device))
    part, best, short = tenth(data), args.rates[0], -(-args.epochs // 3)
    if len(args.rates) > 1 and row != "untrained":
        knn = {}
        for rate in args.rates:  # the first seed chooses for the other seeds, too
            words = words_of(row, args, rest, args.seeds[0], rate, short)
            knn[rate] = one_run(row, words, folder / f"rate-{rate:g}", part, linear=False)["knn_top1"]
        best = max(knn, key=knn.get)
    words = words_of(row, args, rest, seed, best, args.epochs)
    one_run(row, words, folder / f"seed-{seed}", part if args.quick else data, linear=True)


def report(args: argparse.Namespace) -> str:
    """The table of the finished runs, the rates that were tried, and the commands."""

    def results_of(row: str, names: list[str]) -> dict[str, dict[str, Any]]:
        paths = {name: Path(args.out) / row.replace(" ", "-") / name / "result.json" for name in names}
        return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}

    lines, tried, runs = [], [], []
    for row in args.rows:
        seeds = args.seeds if row == "SimCLR" else args.seeds[:1]
        found = list(results_of(row, [f"seed-{seed}" for seed in seeds]).values())
        whole, runs = [f for f in found if "failed" not in f], runs + found
        if found:
            name = row + f", {len(whole)} of {len(seeds)} seeds" * (len(whole) < len(seeds))
            lr = f"{found[0]['lr']:g}" if row != "untrained" else ""
            cells = [table.over_seeds([f.get(key) for f in whole], places) for key, places in FORM.items() if whole]
            lines.append([name, lr, *(cells or [found[0]["failed"], *[""] * (len(FORM) - 1)])])
        names = [f"rate-{rate:g}" for rate in args.rates]
        if short := results_of(row, names):
            said = {n: "diverged" if "failed" in f else f"{f['knn_top1']:.3f}" for n, f in short.items()}
            tried.append([row, *(f"{said[n]} ({short[n]['lr']:g})" if n in said else "" for n in names)])
    parts = ["; ".join(dict.fromkeys(f["setting"] for f in runs)), table.markdown(HEAD, lines)]
    if tried:
        head = ["kNN of the short runs (lr)", *(f"{rate:g} times the preset's rate" for rate in args.rates)]
        parts.append(table.markdown(head, tried))
    quick = "--quick: trained on a tenth of the training images, judged on another tenth; compare it with nothing"
    return "\n\n".join([*parts, quick if args.quick else "\n".join(f"    {f['command']}" for f in runs)])


def run_all(jobs: list[tuple[str, int]], args: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """Run each (row, seed) in a process, `args.jobs` at a time; returns the ones that failed. Whatever ends this
    function also ends the processes, which first save a checkpoint."""
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads or max(1, CORES // args.jobs))}
    waiting, running, failed = list(jobs), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                row, seed = waiting.pop(0)
                output = Path(args.out) / f"{row.replace(' ', '-')}-{seed}.txt"
                with open(output, "a") as file:
                    one = [sys.executable, __file__, *words, "--one", row, str(seed)]
                    running[subprocess.Popen(one, stdout=file, stderr=file, env=env)] = f"{row}, seed {seed}", output
            time.sleep(0.1)
            for child in [child for child in running if child.poll() is not None]:
                name, output = running.pop(child)
                failed += [name] * bool(child.returncode)
                last = output.read_text().strip().split("\n")[-1]
                print(
                    f"{name}: {f'exit status {child.returncode}: {last}' if child.returncode else 'done'}", flush=True
                )
    finally:
        for child in running:
            child.terminate()
        for child in running:
            child.wait()
    return failed


def main(argv: list[str] | None = None) -> None:
    flags, words = parser(), sys.argv[1:] if argv is None else argv
    flags.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # row and seed, for the process of one row
    args, rest = flags.parse_known_args(words)
    if args.quick:
        args.epochs, args.rates, args.seeds = 2, [1], args.seeds[:1]
    if args.one:
        return one_row(args.one[0], int(args.one[1]), args, rest)

    ensure(args.jobs > 0 and args.epochs > 0 and min(args.rates) > 0, "--jobs, --epochs, --rates: give more than 0")
    table.refuse(rest, SET)
    for row, seed in itertools.product(args.rows, args.seeds):  # refuse wrong flags before any run
        config = importlib.import_module(ROWS[row][0]).Config
        common.parse_args(config, words_of(row, args, rest, seed, 1, args.epochs))
    folder = Path(args.out)
    rule = {k: v for k, v in vars(args).items() if k not in ("one", "rows", "seeds", "jobs", "threads", "out")}
    rule, kept = json.dumps(rule | {"rest": rest, "first seed": args.seeds[0]}) + "\n", folder / "protocol.json"
    same = not kept.exists() or kept.read_text() == rule
    ensure(same, f"--out {folder}: its runs follow another protocol, see {kept}; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    common.save_whole(rule.encode(), kept)

    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt(f"stopped; the same command goes on with what is left in {folder}", 128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    failed = run_all([(row, args.seeds[0]) for row in args.rows], args, words)
    failed += run_all([("SimCLR", seed) for seed in args.seeds[1:] if "SimCLR" in args.rows], args, words)
    said = report(args) if any(folder.glob("*/seed-*/result.json")) else "no run is finished yet"
    common.save_whole(f"{said}\n".encode(), folder / "results.md")
    print(f"\n{said}")
    if failed:
        raise common.RunFailure(f"{'; '.join(failed)} failed; see the .txt files of these names in {folder}")


if __name__ == "__main__":
    with common.exit_status():
        main()
