"""Every method under one protocol: kNN and linear top-1 on real images, with two controls.

    python benchmarks/results.py --data /path/of/cifar10 --jobs 2         30 epochs of resnet8: hours; again: goes on
    python benchmarks/results.py --data /path/of/cifar10 --quick          two epochs of a tenth of the images: minutes
    python benchmarks/results.py --data cifar10 --device cuda --backbone resnet18 --epochs 200 --amp bf16

`/path/of/cifar10` holds `train/` and `test/` with a folder of images a class; `cifar10` downloads. Each row is a
method's preset cifar with one backbone, batch and number of epochs, a warm-up of a tenth of them, and a learning rate
by one rule: of --rates, multiples of the preset's (scaled with N where the method does not), the one with the best kNN
of h after a third of the epochs on a tenth of the training images, judged on another tenth of them. The held-out images
choose nothing: the row is of the last epoch. Controls: the same network before training, and cross-entropy with all
labels. Flags that are not listed, such as --device or --amp, go to every run.

Runs live in --out, a process a row; stopped (Ctrl-C, SIGTERM, power) and started again, what is done stays and what was
running goes on from its checkpoint. The table and the commands of its rows are printed and written to --out/results.md.
Minutes and images/s are those of the training steps; the start, kNN and the short runs come on top.
"""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import linear_eval
from benchmarks import table
from common import OneLineParser, ensure
from images import CORES, Data, Images, InputError

ROWS = {  # row -> the method's file, and what differs from its preset cifar
    "SimCLR": ("simclr", ""),
    "MoCo v2": ("moco", "--projection-head mlp"),
    "BYOL": ("byol", ""),
    "SimSiam": ("simsiam", ""),
    "SwAV": ("swav", ""),
    "SupCon": ("supcon", ""),
    "cross-entropy": ("supcon", "--loss cross-entropy"),
    "untrained": ("simclr", "--epochs 0"),
}
HEAD = ("", "lr", "kNN of h", "linear on h", "images/s", "minutes", "GB of the GPU")
FORM = {"knn_top1": 3, "linear_top1": 3, "images_per_second": 0, "minutes": 1, "gigabytes": 2}  # digits
# flags that the protocol sets
SET = ("preset", "lr", "seed", "warmup_epochs", "knn_every", "resume", "projection_head", "loss")


def parser() -> argparse.ArgumentParser:
    result = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = result.add_argument
    given = os.environ.get("CIFAR10_FOLDER", "cifar10")
    add(
        "--data",
        default=given,
        help="folder with train/ and test/, cifar10 or cifar100 (default $CIFAR10_FOLDER or cifar10)",
    )
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="some of the rows (default: all)")
    add("--backbone", default="resnet8", help="of every row (default resnet8)")
    add("--epochs", type=int, default=30, help="of every row (default 30)")
    add("--batch-size", type=int, default=128, help="N of every row (default 128)")
    add("--rates", type=float, nargs="+", default=[1, 3, 10], help="tried, times the preset's (default 1 3 10)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of SimCLR; other rows take the first (default 0 1 2)")
    add("--jobs", type=int, default=1, help="rows at a time (default 1)")
    add("--threads", type=int, default=0, help="of each row (default: the cores over --jobs)")
    add("--quick", action="store_true", help="2 epochs of a tenth of the images, the preset's rate, one seed")
    add("--out", default="runs/results", help="folder of the runs (default runs/results)")
    return result


def tenth(data: Data) -> Data:
    """A tenth of the training images of each class to train on, and another tenth of them to judge by. Raises
    `InputError` where not all have a label, or are in memory."""
    ensure(data.labelled and (data.train.labels >= 0).all(), f"--data {data.name}: give images that all have a label")
    ensure(data.train.images is not None, f"--data {data.name}: too large for --resident-gb; raise it")
    labels, place = data.train.labels, torch.zeros(len(data.train), dtype=torch.long)
    for label in labels.unique():
        of_class = (labels == label).nonzero().squeeze(1)
        place[of_class] = torch.arange(len(of_class)) % 10

    def part(number: int) -> Images:
        s, rows = data.train, (place == number).nonzero().squeeze(1)
        return Images(s.images, (), s.sizes[rows], s.labels[rows], s.device, s.rows[rows])

    return Data(data.name, part(0), part(1), data.classes)


def config_of(row: str, args: argparse.Namespace, rest: list[str], seed: int, **changes: Any) -> Any:
    """The config of one run of a row; `command` says it as a command line."""
    method, own = ROWS[row]
    kind = importlib.import_module(method).Config
    lr = kind.PRESETS["cifar"].get("lr", kind.lr) * changes.pop("rate")
    if kind.lr_of_preset_batch:
        lr *= args.batch_size / kind.PRESETS["cifar"].get("batch_size", kind.batch_size)
    epochs = changes.pop("epochs")
    given = {"preset": "cifar", "data": args.data, "backbone": args.backbone, "epochs": epochs}
    given |= {"batch_size": args.batch_size, "warmup_epochs": f"{epochs / 10:g}", "lr": f"{lr:.3g}", "seed": seed}
    given |= {"knn_every": max(1, epochs), **changes}
    words = [word for name, value in given.items() for word in (common.dashed(name), str(value))]
    config = common.parse_args(kind, [*words, *shlex.split(own), *rest])
    config.resume = (Path(config.out) / "checkpoint.pt").exists()
    return config


def command(config: Any) -> str:
    """What runs the same from a command line, in the method's own folder, and its linear top-1 besides."""
    names = [name for name in common.flags(type(config)) if name in config.given - {"out"}]
    given = {common.dashed(name): getattr(config, name) for name in names}
    given = {name if v is not False else name.replace("--", "--no-", 1): v for name, v in given.items()}
    words = [name if isinstance(v, bool) else f"{name} {shlex.quote(str(v))}" for name, v in given.items()]
    method = config.method()
    return f"python {method}.py --preset {config.recipe} {' '.join(words)} && python linear_eval.py runs/{method}"


def code() -> str:
    """What the figures were made by: a hash of the methods, what they share, and the kernels."""
    root = Path(common.__file__).parent
    files = [path for folder in (root, root / "kernels") for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


def one_run(config: Any, data: Data, linear: bool) -> dict[str, Any]:
    """Train, judge and write result.json; read it where that has been done. A run that diverges is a result, too."""
    written, device = Path(config.out) / "result.json", data.train.device
    if written.exists():
        return json.loads(written.read_text())
    setting = f"{table.machine(str(device))}, {torch.get_num_threads()} threads"
    result = {"lr": config.lr, "command": command(config), "setting": setting, "code": code()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        result["knn_top1"] = sys.modules[type(config).__module__].train(config, data)["knn_top1"]
    except common.Diverged as error:
        result |= {"knn_top1": 0.0, "failed": str(error)}
    if device.type == "cuda":
        result["gigabytes"] = torch.cuda.max_memory_allocated(device) / 1e9
    log = (Path(config.out) / "log.csv").read_text().split()[1:]
    if speeds := [float(line.split(",")[-1]) for line in log]:
        each = len(data.train) // config.batch_size * config.batch_size
        result |= {"images_per_second": statistics.median(speeds), "minutes": sum(each / s for s in speeds) / 60}
    if linear and "failed" not in result:
        _, model = common.load_run(config.out)
        model = model.to(device, memory_format=torch.channels_last)
        found = linear_eval.class_of(linear_eval.parse([str(config.out)]), config, model, data)
        result["linear_top1"] = found["linear_top1"]
    common.save_whole(json.dumps(result, indent=1) + "\n", written)
    return result


def one_row(row: str, seed: int, args: argparse.Namespace, rest: list[str]) -> None:
    """Choose the row's rate by the rule, and make its run: the work of one process."""
    out = Path(args.out) / row.replace(" ", "-")
    final = {"epochs": args.epochs, "out": str(out / f"seed-{seed}")}
    if (out / f"seed-{seed}" / "result.json").exists():
        return
    config = config_of(row, args, rest, seed, rate=1, **final)
    data = common.load_data(config, common.pick_device(config.device))
    part, best = tenth(data), args.rates[0]
    small = f"--data {args.data}: a tenth of it is {len(part.train)} images, less than a batch of {args.batch_size}"
    ensure(len(part.train) >= args.batch_size, small)
    if len(args.rates) > 1 and row != "untrained":
        tries = {}
        for rate in args.rates:  # with the first seed, also for the others
            short = {"epochs": -(-args.epochs // 3), "out": str(out / f"rate-{rate:g}")}
            tries[rate] = one_run(config_of(row, args, rest, args.seeds[0], rate=rate, **short), part, linear=False)
        best = max(tries, key=lambda rate: tries[rate]["knn_top1"])
    one_run(config_of(row, args, rest, seed, rate=best, **final), part if args.quick else data, linear=True)


def report(args: argparse.Namespace) -> str:
    """The table of what is done, the rates that were tried, and the commands."""

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
    parts = ["; ".join(dict.fromkeys(f"{f['setting']}, code {f['code']}" for f in runs)), table.markdown(HEAD, lines)]
    if tried:
        head = ["kNN of the short runs (lr)", *(f"{rate:g} times the preset's rate" for rate in args.rates)]
        parts.append(table.markdown(head, tried))
    quick = "--quick: of a tenth of the training images, judged on another; nothing to compare with"
    return "\n\n".join([*parts, quick if args.quick else "\n".join(f"    {f['command']}" for f in runs)])


def check(args: argparse.Namespace, rest: list[str]) -> None:
    """Refuse what no table can have, before any run."""
    ensure(not common.several(), "one process starts the runs; leave torchrun out")
    for name in {word.split("=")[0] for word in rest} & {common.dashed(name) for name in SET}:
        raise InputError(f"{name}: the protocol sets it; leave it out")
    ensure(args.jobs > 0 and args.threads >= 0, "--jobs, --threads: give 1 or more")
    ensure(args.epochs > 0, f"--epochs {args.epochs}: give 1 or more")
    for name, given in (("rows", args.rows), ("rates", [f"{r:g}" for r in args.rates]), ("seeds", args.seeds)):
        ensure(len(set(given)) == len(given), f"--{name} {' '.join(map(str, given))}: give each once")
    there = Path(args.data).is_dir() or args.data in ("cifar10", "cifar100")
    ensure(there, f"--data {args.data}: no such folder; give one, or cifar10 or cifar100")
    for row, rate, seed in itertools.product(args.rows, args.rates, args.seeds):
        ensure(0 < rate < 1e9, f"--rates {rate:g}: give multiples of the preset's rate, above 0")
        config = config_of(row, args, rest, seed, rate=rate, epochs=args.epochs, out=f"{args.out}/{row}")
    common.pick_device(config.device)
    common.build_backbone(config)


def run_all(args: argparse.Namespace, words: Sequence[str]) -> tuple[list[str], list[int]]:
    """A process for each row and seed, `args.jobs` at a time. Returns those that failed, and the signals to stop."""
    threads = args.threads or max(1, CORES // args.jobs)
    running: set[subprocess.Popen] = set()
    failed, stopping = [], []

    def start(row: str, seed: int) -> None:
        if stopping:
            return
        output = Path(args.out) / f"{row.replace(' ', '-')}-{seed}.txt"
        with open(output, "a") as file:
            given = {"env": os.environ | {"OMP_NUM_THREADS": str(threads)}, "start_new_session": True}
            one = [sys.executable, __file__, *words, "--one", row, str(seed)]
            child = subprocess.Popen(one, stdout=file, stderr=file, **given)
        running.add(child)
        if stopping:  # since the line above
            child.terminate()
        if status := child.wait():
            failed.append(f"{row}, seed {seed}")
        running.discard(child)
        tail = f"exit status {status}: {(output.read_text().strip().splitlines() or [''])[-1]}" if status else "done"
        print(f"{row}, seed {seed}: {tail}", flush=True)

    def stop(number: int, _: Any) -> None:
        stopping.append(number)
        for child in list(running):
            with contextlib.suppress(ProcessLookupError):
                child.terminate()  # its checkpoint is written at the end of the step

    ways = [n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGHUP")]
    ways = [n for n in ways if signal.getsignal(n) not in (signal.SIG_IGN, None)]  # not what nohup ignores
    before = {number: signal.signal(number, stop) for number in ways}
    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda row: start(row, args.seeds[0]), args.rows))
            list(pool.map(lambda seed: start("SimCLR", seed), args.seeds[1:] if "SimCLR" in args.rows else ()))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return failed, stopping


def main(argv: list[str] | None = None) -> None:
    flags, words = parser(), sys.argv[1:] if argv is None else argv
    flags.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # row and seed: what a process of its own does
    args, rest = flags.parse_known_args(words)
    if args.quick:
        args.epochs, args.rates, args.seeds = 2, [1], args.seeds[:1]
    if args.one:
        one_row(args.one[0], int(args.one[1]), args, rest)
        return
    check(args, rest)
    folder = Path(args.out)
    held, kept = common.make(folder), folder / "protocol.json"  # the lock of the folder, until the end
    rule = {k: v for k, v in vars(args).items() if k not in ("one", "rows", "seeds", "jobs", "threads", "out")}
    rule = json.dumps(rule | {"rest": rest, "seed of the short runs": args.seeds[0]}) + "\n"
    same = not kept.exists() or kept.read_text() == rule
    ensure(same, f"--out {folder}: its runs are of another protocol, see {kept}; choose another folder")
    common.save_whole(rule, kept)
    failed, stopping = run_all(args, words)
    said = report(args) if any(folder.glob("*/seed-*/result.json")) else "nothing is done yet"
    common.save_whole(said + "\n", folder / "results.md")
    print(f"\n{said}")
    held.close()
    if stopping:
        raise common.Stopped(f"stopped; the same command goes on with what is left in {folder}", stopping[0])
    if failed:
        raise common.RunFailure(f"{'; '.join(failed)}: see the files of that name in {folder}")


if __name__ == "__main__":
    with common.exit_status():
        main()
