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
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import simclr


def synchronize(device: torch.device) -> None:
    """Wait for the device, before its time is read."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare(config: simclr.Config, steps: int) -> float:
    """Images/s of forward and backward alone, on random resident tensors (2N, 3, S, S)."""
    device = common.pick_device(config)
    model = simclr.SimCLR(config).to(device, memory_format=torch.channels_last)
    x = torch.rand(2 * config.batch_size, 3, config.image_size, config.image_size, device=device)
    x = x.to(memory_format=torch.channels_last)
    started = 0.0
    for step in range(steps + 1):
        if step == 1:
            synchronize(device)
            started = time.perf_counter()
        with common.autocast(config, device):
            out = model.backbone(x)
        out.float().square().mean().backward()
    synchronize(device)
    return steps * config.batch_size / (time.perf_counter() - started)


def trained(config: simclr.Config) -> float:
    """Images/s as a run logs them (its last epoch)."""
    with contextlib.redirect_stdout(io.StringIO()):
        return simclr.train(config)["images_per_second"]


def loop(backbone: str, batch: int, images: int, rounds: int) -> None:
    original, rows = common.make_shapes, []
    common.make_shapes = lambda n, seed, size: original(images, seed, size)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            own = {"data": "shapes", "backbone": backbone, "epochs": 2, "batch_size": batch, "knn_every": 0, "out": out}
            config = simclr.Config(**simclr.Config.PRESETS["cifar"] | own)
            rows.append((trained(config), bare(config, images // batch)))
    common.make_shapes = original
    ratio = statistics.median(a / b for a, b in rows)
    a, b = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"{backbone:9} batch {batch}: train {a:,.0f} images/s, bare {b:,.0f} images/s, median ratio {ratio:.2f}",
        flush=True,
    )


def views(size: int, batch: int, rounds: int) -> None:
    """SimCLR's recipe without blur, as for CIFAR: ours on a uint8 batch, torchvision's on Pillow images, one core."""
    torch.set_num_threads(1)
    config = simclr.Config(**simclr.Config.PRESETS["cifar"] | {"image_size": size})
    pictures, labels = common.make_shapes(batch, 0, size)
    data = common.whole(pictures, labels, torch.device("cpu"))
    pillow = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures]
    s = config.jitter_strength
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, (0.08, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
        ]
    )
    rows = []
    for _ in range(rounds):
        started = time.perf_counter()
        for crops in data.crops([torch.arange(batch)], size, 1, (0.08, 1.0)):
            simclr.augment(crops[0], config, config.ops()[1:])
        middle = time.perf_counter()
        torch.stack([theirs(p) for p in pillow])
        rows.append((batch / (middle - started), batch / (time.perf_counter() - middle)))
    a, b = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(a / b for a, b in rows)
    print(f"views {size}x{size}, one core: ours {a:,.0f}/s, torchvision {b:,.0f}/s, median ratio {ratio:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--views", action="store_true", help="measure the views instead of the loop")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.views:
        views(32, 512, args.rounds)
    else:
        loop("resnet8", 256, 5120, args.rounds)
        loop("resnet18", 128, 512, args.rounds)
