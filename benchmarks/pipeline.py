"""How much of a training step is not the network: images/s of `train` over those of a bare forward and backward pass.

    python benchmarks/pipeline.py                     training loop against the bare network, resnet8 and resnet18
    python benchmarks/pipeline.py --views             batched views against torchvision's per-image transforms, one core

Rounds of both are interleaved in one process, the median ratio is printed, so that a noisy machine shifts both alike.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import images
import simclr


def timed(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of `work`, the device's included."""
    wait = torch.cuda.synchronize if device and device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def compare(title: str, rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    """Print the median images/s of both, and of the ratio within a round."""
    rows = [(ours(), theirs()) for _ in range(rounds)]
    a, b, ratio = (statistics.median(column) for column in zip(*((a, b, a / b) for a, b in rows), strict=True))
    print(f"{title}: {a:,.0f} and {b:,.0f} images/s, median ratio {ratio:.2f}", flush=True)


def loop(backbone: str, batch: int, steps: int, rounds: int, device: str) -> None:
    """`simclr.train` by its CIFAR recipe, as it logs its second epoch, against the backbone on fixed tensors."""
    pixels, _ = images.make_shapes(batch * steps, 0, 32)
    given = {"backbone": backbone, "epochs": 2, "batch_size": batch, "knn_every": 0, "device": device}

    def trained() -> float:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            return simclr.train(simclr.Config.preset("cifar", **given, out=out), pixels)["images_per_second"]

    def bare() -> float:
        config = simclr.Config.preset("cifar", **given)
        on = common.pick_device(device)
        network = common.build_backbone(config).to(on, memory_format=torch.channels_last)
        x = torch.rand(2 * batch, 3, 32, 32, device=on).to(memory_format=torch.channels_last)

        def step() -> None:
            network(x).square().mean().backward()

        step()  # warms up
        seconds = timed(lambda: [step() for _ in range(steps)], on)
        return steps * batch / seconds

    compare(f"{backbone}, batch {batch}, train and bare", rounds, trained, bare)


def views(size: int, batch: int, rounds: int) -> None:
    """SimCLR's recipe without blur, as for CIFAR: ours on a uint8 batch, torchvision's on Pillow images, one core."""
    torch.set_num_threads(1)
    config, (pixels, labels) = simclr.Config.preset("cifar"), images.make_shapes(batch, 0, size)
    split, s = images.resident(pixels, labels, torch.device("cpu")), config.jitter_strength
    pillow = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    recipe = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, (config.crop_min_scale, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
            transforms.Normalize(images.MEAN, images.STD),
        ]
    )

    def ours() -> None:
        for (x,) in split.views([torch.arange(batch)], [(size, (config.crop_min_scale, 1.0))]):
            simclr.augment(x, config)

    def theirs() -> None:
        torch.stack([recipe(p) for p in pillow])

    title = f"views {size}x{size}, one core, ours and torchvision"
    compare(title, rounds, lambda: batch / timed(ours), lambda: batch / timed(theirs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--views", action="store_true", help="measure the views instead of the loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of the loop (default cpu)")
    args = parser.parse_args()
    if args.views:
        views(32, 512, args.rounds)
    else:
        loop("resnet8", 256, 8, args.rounds, args.device)
        loop("resnet18", 64, 3, args.rounds, args.device)
