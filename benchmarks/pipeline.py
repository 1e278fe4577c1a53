"""How much time does a run spend outside its network? The training loop against bare passes, and the time to start.

    python benchmarks/pipeline.py                     images/s of `train` and of the bare network, resnet8 and resnet18
    python benchmarks/pipeline.py --start             seconds from `python simclr.py` to the end of its first step

`train` and the bare network take turns in one process. The ratio compares the two within a round, so that noise of the
machine shifts both alike.
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
# Runs the demo until it asks for the second batch, and prints the time at each mark.
START = """
import json, sys, time
marks = [("the interpreter", time.time())]
def mark(what): marks.append((what, time.time()))
import torch, torchvision
mark("import torch, torchvision")
import common, images, simclr
config = common.parse_args(simclr.Config)
mark("import the rest, flags")
class OneStep(images.Images):
    def views(self, *asked, **named):
        for count, views in enumerate(super().views(*asked, **named)):
            if count == 1:
                mark("network, optimizer, header, first step, views.png")
                print(json.dumps(marks), file=sys.stderr)
                sys.exit()
            yield views
data = images.load(config, common.pick_device(config.device))
data.train = OneStep(data.train.labels, data.train.device, data.train.pixels)
mark("the data")
simclr.train(config, data)
"""


def timed(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds that `work` takes, until the device has finished."""
    wait = torch.cuda.synchronize if device and device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def trained(backbone: str, batch: int, steps: int, device: str = "cpu") -> float:
    """Images/s of `simclr.train` by its CIFAR recipe, as logged for the second epoch of `steps` steps."""
    pixels, _ = images.make_shapes(batch * steps, 0, 32)
    given = {"backbone": backbone, "epochs": 2, "warmup_epochs": 0.0, "batch_size": batch, "knn_every": 0}
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        config = simclr.Config.preset("cifar", **given, device=device, out=out)
        return simclr.train(config, pixels)["images_per_second"]


def loop(backbone: str, batch: int, steps: int, rounds: int, device: str) -> None:
    """Compare `simclr.train` with the bare backbone on fixed tensors."""

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
    """Time the demo from the start of its process to the end of its first step, part by part."""
    spent: dict[str, list[float]] = {}
    for _ in range(rounds + 1):  # the first round fills the disk's cache
        with tempfile.TemporaryDirectory() as out:
            began, command = time.time(), [sys.executable, "-c", START, "--out", out]
            done = subprocess.run(command, cwd=Path(simclr.__file__).parent, capture_output=True, text=True)
        images.ensure(not done.returncode, f"the demo failed: {done.stderr.strip()}")
        before = began
        for what, at in json.loads(done.stderr.strip().split("\n")[-1]):
            spent.setdefault(what, []).append(at - before)
            before = at
        spent.setdefault("all", []).append(before - began)
    spent = {what: seconds[1:] for what, seconds in spent.items()}
    due = zip(spent["all"], spent["the interpreter"], spent[LIBRARIES], spent["the data"], strict=True)
    rows = [[what, table.over_seeds(seconds, 2)] for what, seconds in spent.items()]
    print(table.markdown(["to the first step of `python simclr.py`", "seconds"], rows))
    ratio = table.over_seeds([everything / sum(parts) for everything, *parts in due], 2)
    print(f"\nall, divided by the sum of interpreter, {LIBRARIES} and data: {ratio}")


def main(argv: list[str] | None = None) -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--start", action="store_true", help="time the start, not the loop")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default 5)")
    parser.add_argument("--device", default="cpu", help="device for the loop (default cpu)")
    args = parser.parse_args(argv)
    images.ensure(args.rounds > 0, f"--rounds {args.rounds}: give 1 or more")
    print(f"{table.machine(args.device)}, {torch.get_num_threads()} threads\n")
    if args.start:
        start(args.rounds)
    else:
        loop("resnet8", 256, 8, args.rounds, args.device)
        loop("resnet18", 64, 3, args.rounds, args.device)


if __name__ == "__main__":
    with common.exit_status():
        main()
