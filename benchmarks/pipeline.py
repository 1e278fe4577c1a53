"""What a run spends beside its network: the training loop against a bare forward and backward pass, and the start.

    python benchmarks/pipeline.py                     images/s of `train` and of the bare network, resnet8 and resnet18
    python benchmarks/pipeline.py --start             from `python simclr.py` to the end of its first step

Rounds of both are interleaved in one process, and the ratio is that within a round, so that a noisy machine shifts both
alike.
"""

import contextlib
import io
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

DUE = """
import time
import torch, torchvision
print(time.time())
import images, simclr
began = time.time()
images.load(simclr.Config.preset("demo"), torch.device("cpu"))
print(time.time() - began)
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
    given = {"backbone": backbone, "epochs": 2, "warmup_epochs": 0.0, "batch_size": batch, "knn_every": 0}
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        config = simclr.Config.preset("cifar", **given, device=device, out=out)
        return simclr.train(config, pixels)["images_per_second"]


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


def due(folder: Path) -> tuple[float, float]:
    """Seconds of a process to have torch and torchvision, and of the demo's data."""
    began = time.time()
    done = subprocess.run([sys.executable, "-c", DUE], cwd=folder, capture_output=True, text=True, check=True)
    imported, data = map(float, done.stdout.split())
    return imported - began, data


def first_step(folder: Path) -> float:
    """Seconds from the start of `python simclr.py` until views.png, which the first step writes at its end."""
    with tempfile.TemporaryDirectory() as out:
        began = time.time()
        child = subprocess.Popen([sys.executable, "simclr.py", "--out", out], cwd=folder, stdout=subprocess.DEVNULL)
        while not Path(out, "views.png").exists() and child.poll() is None:
            time.sleep(0.002)
        seconds, status = time.time() - began, child.poll()
        child.kill()
        child.wait()
    if status is not None:
        raise common.RunFailure(f"python simclr.py ended with exit status {status}")
    return seconds


def start(rounds: int) -> None:
    """From the start of the process to the first step of the demo, and what of it is due."""
    folder, found = Path(simclr.__file__).parent, []
    for _ in range(rounds + 1):
        libraries, data = due(folder)
        everything = first_step(folder)
        found.append((libraries, data, everything - libraries - data, everything))
    names = ["the interpreter, import torch, torchvision", "the data", "the rest", "all"]
    columns = list(zip(*found[1:], strict=True))  # the first round fills the disk's cache
    rows = [[name, table.over_seeds(seconds, 2)] for name, seconds in zip(names, columns, strict=True)]
    print(table.markdown(["to the first step of `python simclr.py`", "seconds"], rows))
    ratio = [everything / (libraries + data) for libraries, data, _, everything in found[1:]]
    print(f"\nall over interpreter, import torch, torchvision and data: {table.over_seeds(ratio, 2)}")


def main(argv: list[str] | None = None) -> None:
    parser = table.parser(__doc__)
    parser.add_argument("--start", action="store_true", help="measure the start instead of the loop")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--device", default="cpu", help="of the loop (default cpu)")
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
