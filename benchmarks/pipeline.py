"""What a run spends beside its network: the training loop against a bare forward and backward pass, and the start.

    python benchmarks/pipeline.py                     images/s of `train` and of the bare network, resnet8 and resnet18
    python benchmarks/pipeline.py --start             from `python simclr.py` to the end of its first step

Rounds of both are interleaved in one process, and the ratio is that within a round, so that a noisy machine shifts both
alike.
"""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import images
import simclr
from benchmarks import table

LIBRARIES = "import torch, torchvision"
# Runs the demo, stopped after a step; prints what the clock said at each mark.
START = """
import json, sys, time
marks = [("the interpreter", time.time())]
def mark(what): marks.append((what, time.time()))
import torch, torchvision
mark("import torch, torchvision")
import common, simclr
mark("import the rest")
start, log = common.start, common.Run.log
def started(*args):
    load = common.load_data
    common.load_data = lambda *args: (mark("the run's folder"), load(*args), mark("the data"))[1]
    return start(*args)
def logged(*args):
    mark("network, optimizer, header, first step")
    log(*args)
    mark("views.png, the log")
    print(json.dumps(marks), file=sys.stderr)
    sys.exit()
common.start, common.Run.log = started, logged
simclr.train(common.parse_args(simclr.Config))
"""


def timed(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of `work`, the device's included."""
    wait = torch.cuda.synchronize if device and device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def trained(backbone: str, batch: int, steps: int, device: str = "cpu") -> float:
    """Images/s of `simclr.train` by its CIFAR recipe, as it logs its second epoch of `steps`."""
    pixels, _ = images.make_shapes(batch * steps, 0, 32)
    given = {"backbone": backbone, "epochs": 2, "batch_size": batch, "knn_every": 0, "device": device}
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        return simclr.train(simclr.Config.preset("cifar", **given, out=out), pixels)["images_per_second"]


def loop(backbone: str, batch: int, steps: int, rounds: int, device: str) -> None:
    """`simclr.train` against the backbone on fixed tensors."""

    def bare() -> float:
        config, on = simclr.Config.preset("cifar", backbone=backbone), common.pick_device(device)
        network = common.build_backbone(config).to(on, memory_format=torch.channels_last)
        x = torch.rand(2 * batch, 3, 32, 32, device=on).to(memory_format=torch.channels_last)

        def step() -> None:
            network(x).square().mean().backward()

        step()  # warms up
        seconds = timed(lambda: [step() for _ in range(steps)], on)
        return steps * batch / seconds

    contenders = {"train": lambda: trained(backbone, batch, steps, device), "bare network": bare}
    table.race(f"{backbone}, batch {batch}", contenders, rounds)


def start(rounds: int) -> None:
    """From the start of the process to the first step of the demo, and what it is spent on."""
    spent: dict[str, list[float]] = {}
    for _ in range(rounds + 1):  # the first one fills the disk's cache
        with tempfile.TemporaryDirectory() as out:
            began, command = time.time(), [sys.executable, "-c", START, "--out", out]
            done = subprocess.run(command, cwd=Path(simclr.__file__).parent, capture_output=True, text=True)
        common.ensure(not done.returncode, f"the demo failed: {done.stderr.strip()}")
        marks = json.loads(done.stderr.strip().split("\n")[-1])
        before = began
        for what, at in marks:
            spent.setdefault(what, []).append(at - before)
            before = at
        spent.setdefault("all", []).append(before - began)
    spent = {what: seconds[1:] for what, seconds in spent.items()}
    everything, due = spent.pop("all"), [spent[what] for what in ("the interpreter", LIBRARIES, "the data")]
    ratio = [whole / sum(parts) for whole, *parts in zip(everything, *due, strict=True)]
    rows = [[what, table.over_seeds(seconds, 2)] for what, seconds in spent.items()]
    rows += [["all", table.over_seeds(everything, 2)]]
    print(table.markdown(["to the first step of `python simclr.py`", "seconds"], rows))
    print(f"\nall over interpreter, {LIBRARIES} and data: {table.over_seeds(ratio, 2)}")


if __name__ == "__main__":
    parser = common.OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--start", action="store_true", help="measure the start instead of the loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of the loop (default cpu)")
    with common.exit_status():
        args = parser.parse_args()
        common.ensure(args.rounds > 0, f"--rounds {args.rounds}: give 1 or more")
        print(f"{table.machine(args.device)}, {torch.get_num_threads()} threads\n")
        if args.start:
            start(args.rounds)
        else:
            loop("resnet8", 256, 8, args.rounds, args.device)
            loop("resnet18", 64, 3, args.rounds, args.device)
