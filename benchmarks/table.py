"""What the experiments share: flags, a training loop, tables of results, timing in turns, and drawing pictures."""

import argparse
import dataclasses
import multiprocessing
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import common
import linear_eval
from common import Flags, RunConfig
from images import ensure


def parser(doc: str, name: str = "") -> argparse.ArgumentParser:
    """A parser for an experiment's own flags. With a `name`, it also has `--seeds` and `--out`."""
    shape = argparse.RawDescriptionHelpFormatter
    result = common.OneLineParser(description=doc, formatter_class=shape, allow_abbrev=False)
    if name:
        result.add_argument("--seeds", type=int, nargs="+", default=[0], help="run each row with each seed (default 0)")
        result.add_argument("--out", default=f"runs/{name}", help=f"folder of the runs (default runs/{name})")
    return result


def refuse(rest: Sequence[str], names: Sequence[str]) -> None:
    """Raise `InputError` if `rest`, words of a command line, has one of the flags `names`."""
    given = {word.split("=")[0].replace("--no-", "--") for word in rest}
    for name in map(common.dashed, names):
        ensure(name not in given, f"{name}: not for this experiment; leave it out")


def base_config(method: type[Flags], rest: Sequence[str], unused: Sequence[str] = ()) -> Any:
    """The recipe of every row: the method's own, with the flags `rest`. Raises `InputError` for wrong flags, and for
    flags that the experiment sets itself or ignores; `unused` adds to these."""
    refuse(rest, ("seed", "resume", "amp", "compile", "micro_batch_size", "loss_backend", *unused))
    return common.parse_args(method, rest)


def learn(
    run: common.Run, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, losses: Callable, note: str,
    **parts: Any,
) -> dict[str, Any]:  # fmt: skip
    """The training loop of an experiment; returns the final figures. For each step `losses(network)` yields the loss,
    the output z (n, d) for the log, and the views. `lr` is the peak learning rate."""
    warmup = run.config.warmup_epochs * run.steps
    for loss, z, *views in losses(run.begin(model, optimizer=optimizer, note=note, **parts)):
        common.set_lr(optimizer, common.cosine_lr(run.step, run.total, warmup, lr))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss, z, *views)
    return run.finish()


def run(what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do `work` and return its figures and its seconds. Prints a line before and after."""
    print(f"\n=== {what}", flush=True)
    started = time.monotonic()
    found = work()
    found["seconds"] = time.monotonic() - started
    shown = [f"{key} {found[key]:.3f}" for key in ("linear_top1", "knn_top1", "loss") if found.get(key) is not None]
    print(f"=== {what}: {', '.join(shown)}, {found['seconds']:.0f} s", flush=True)
    return found


def linear(out: str) -> dict[str, Any]:
    """Linear top-1 on h, for the run in the folder `out`, by linear_eval.py's protocol of cached features."""
    return {"linear_top1": linear_eval.main([out])["linear_top1"]}


@contextmanager
def processes(jobs: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that runs `jobs` tasks at a time, each in a new process of `threads` threads. An error drops the rest."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the new processes inherit it
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def over_seeds(values: Sequence[float | None], places: int = 3) -> str:
    """The mean; with several seeds also the lowest and the highest value. Empty if a value is missing."""
    if None in values:
        return ""
    mean, low, high = sum(values) / len(values), min(values), max(values)
    return f"{mean:.{places}f}" + f" ({low:.{places}f} to {high:.{places}f})" * (len(values) > 1)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(device: str = "cpu") -> str:
    """The setting of a measurement: versions, and the GPU or the processor with the instructions that torch uses."""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    if common.pick_device(device).type == "cuda":
        return f"{versions}, {torch.cuda.get_device_name(device)}"
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists() and (named := re.search(r"model name\s*: (.+)", info.read_text())):
        cpu = named[1]
    return f"{versions}, {cpu or 'a CPU'} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"


def race(title: str, contenders: dict[str, Callable[[], float]], rounds: int) -> str:
    """Time the contenders in rounds, in changing order, after a round that warms up; print and return a table. It has
    each one's median images/s, and how much faster the first is within a round: noise shifts all of a round alike."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(contenders), len(contenders)):
            rate = contenders[name]()
            found[name] += [rate] if turn else []
    ours, rows = next(iter(found.values())), []
    for name, rates in found.items():
        lead = sorted(a / b for a, b in zip(ours, rates, strict=True))
        of = f"{statistics.median(lead):.2f} ({lead[0]:.2f} to {lead[-1]:.2f})" if rates is not ours else "1"
        rows.append([name, f"{statistics.median(rates):,.0f}", of])
    said = markdown([title, "images/s", f"{next(iter(found))} is so many times as fast"], rows)
    print(said + "\n", flush=True)
    return said


def figure(width: float, height: float, path: str | Path, draw: Callable) -> None:
    """Write the picture that `draw(figure)` makes, in inches. Prints a line if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: matplotlib is not installed (pip install matplotlib)")
        return
    draw(sheet := Figure(figsize=(width, height), layout="constrained"))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=80)


def compare(
    flags: argparse.ArgumentParser, method: type[RunConfig], rows: dict[str, tuple[Callable, str]],
    columns: dict[str, str], unused: Sequence[str] = (), argv: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """Run every row with every seed, as the command line asks; print and return the table.

    `rows`: name -> (a function that trains a config and returns figures, the paper's figure). `columns`: title -> the
    name of a figure.
    """
    flags.add_argument("--rows", nargs="+", choices=rows, default=list(rows), help="some of the rows (default: all)")
    args, rest = flags.parse_known_args(argv)
    base, lines = base_config(method, rest, unused), []
    for row in args.rows:
        train, paper = rows[row]
        outs = [(seed, f"{args.out}/{row.replace(' ', '-')}-seed-{seed}") for seed in args.seeds]
        configs = [dataclasses.replace(base, seed=seed, out=out) for seed, out in outs]
        found = [run(f"{row}, seed {c.seed}", lambda c=c, train=train: train(c)) for c in configs]
        lines.append([row, *(over_seeds([figures[key] for figures in found]) for key in columns.values()), paper])
    table = markdown(["", *columns, "the paper"], lines)
    print(f"\npython {method.method()}.py {' '.join(rest)}, seeds {', '.join(map(str, args.seeds))}\n\n{table}")
    return table
