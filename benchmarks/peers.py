"""How fast are our views, our streaming and our training beside other packages, each used as its documentation shows?

    python benchmarks/peers.py views       SimCLR's views at 32 and 224 pixels: torchvision's v2 image by image, kornia
    python benchmarks/peers.py stream      views of a folder of 500x375 JPEG files: torchvision's ImageFolder and v2
    python benchmarks/peers.py train       the training loop at 32 pixels: lightly's SimCLR example
    python benchmarks/loss.py              the losses, which have a separate script

Figures are images/s; higher is better. `views` makes one view of an image, `stream` and `train` make two. The
contenders take turns in one process. A package that is not installed is left out, and a line says so; `pip install
lightly kornia` installs both.
"""

import collections
import functools
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import images
import simclr
from benchmarks import pipeline, table


def config_for(size: int) -> simclr.Config:
    """The recipe for pictures of this size: CIFAR's up to 64 pixels, else ImageNet's with blur."""
    return simclr.Config.preset("cifar") if size <= 64 else simclr.Config()


def of_torchvision(size: int, config: simclr.Config) -> v2.Compose:
    """The recipe of `simclr.augment`, for a Pillow image or a uint8 tensor."""
    s, kernel = config.jitter_strength, size // 10 // 2 * 2 + 1
    blur = [v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], config.blur)] if config.blur else []
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (config.crop_min_scale, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], 0.8),
            v2.RandomGrayscale(0.2),
            *blur,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(images.MEAN.flatten().tolist(), images.STD.flatten().tolist()),
        ]
    )


def of_kornia(size: int, config: simclr.Config) -> nn.Module:
    """The same recipe for a float batch (N, 3, H, W). kornia resizes without antialiasing, and applies the steps of the
    colour jitter in one order to all images of a batch. Raises ImportError."""
    import kornia.augmentation as K

    s, kernel = config.jitter_strength, size // 10 // 2 * 2 + 1
    blur = [K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=config.blur)] if config.blur else []
    return nn.Sequential(
        K.RandomResizedCrop((size, size), (config.crop_min_scale, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
        K.RandomGrayscale(p=0.2),
        *blur,
        K.Normalize(images.MEAN.flatten(), images.STD.flatten()),
    )


def version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def views(size: int, batch: int, rounds: int) -> None:
    """Time SimCLR's views of pictures in memory, on one core: a batch is what one worker would make."""
    torch.set_num_threads(1)
    config, (pixels, labels) = config_for(size), images.make_shapes(batch, 0, size * 8 // 7 if size > 64 else size)
    split, recipe = images.Images(labels, torch.device("cpu"), pixels), of_torchvision(size, config)
    pillow = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]

    def ours() -> None:
        for (x,) in split.views([torch.arange(batch)], [(size, (config.crop_min_scale, 1.0))]):
            simclr.augment(x, config)

    work: dict[str, Callable] = {"ours": ours}
    work["torchvision v2, Pillow images"] = lambda: torch.stack([recipe(p) for p in pillow])
    work["torchvision v2, uint8 tensors"] = lambda: torch.stack([recipe(p) for p in pixels])
    try:
        batched = of_kornia(size, config)
        work[version("kornia")] = lambda: batched(pixels / 255)
    except ImportError:
        print("kornia is not installed (pip install kornia), so it is left out")
    contenders = {name: lambda f=f: batch / pipeline.timed(f) for name, f in work.items()}
    table.race(f"views of {size}x{size}, batch {batch}, one core", contenders, rounds)


def rate(batches: Iterable, images: int, device: torch.device | None = None) -> float:
    """Images/s over all batches. The clock starts before the first batch: otherwise the batches that workers
    prefetch would take no time."""
    return images / pipeline.timed(lambda: collections.deque(batches, maxlen=0), device)


def write_photos(folder: Path, count: int) -> None:
    """Write JPEG files of 500x375 pixels with detail at all scales, as in photos."""
    draw = np.random.default_rng(0)
    (folder / "all").mkdir()
    for i in range(count):
        photo = np.zeros((375, 500, 3))
        for scale in (4, 16, 64, 250):  # cells of noise along the width, coarse to fine
            coarse = draw.uniform(0, 255, (max(2, scale * 3 // 4), scale, 3)).astype(np.uint8)
            photo += np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)) / 4
        Image.fromarray(photo.astype(np.uint8)).save(folder / "all" / f"{i:05}.jpg", quality=90)


class TwoViews:
    """Apply a transform twice. This is a class so that DataLoader's workers can load it."""

    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, picture: object) -> list[torch.Tensor]:
        return [self.transform(picture), self.transform(picture)]


def stream(count: int, batch: int, workers: int, rounds: int) -> None:
    """Time two views of 224 pixels of JPEG files, read from disk, as they reach one training process."""
    size = 224
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), count)
        config = simclr.Config(data=folder, resident_gb=0.0, workers=workers)
        split = images.load(config, torch.device("cpu")).train
        crops = [(size, (config.crop_min_scale, 1.0))] * 2
        batches = torch.arange(len(split)).split(batch)[: len(split) // batch]

        def ours() -> Iterable:
            for pair in split.views(batches, crops, (0,), workers):
                yield [simclr.augment(x, config) for x in pair]

        def theirs(loader: Callable) -> Iterable:
            recipe = TwoViews(of_torchvision(size, config))
            files = torchvision.datasets.ImageFolder(folder, recipe, loader=loader)
            kept = torch.utils.data.Subset(files, range(len(split)))
            return torch.utils.data.DataLoader(kept, batch, num_workers=workers, drop_last=True)

        tensors = functools.partial(torchvision.io.decode_image, mode="RGB")
        work = {"ours": ours}
        work["ImageFolder, v2 on Pillow images"] = lambda: theirs(torchvision.datasets.folder.default_loader)
        work["ImageFolder, v2 on uint8 tensors"] = lambda: theirs(tensors)
        total = len(batches) * batch
        contenders = {name: lambda f=f: rate(f(), total) for name, f in work.items()}
        table.race(f"500x375 JPEG to two views of {size}, batch {batch}, {workers} workers", contenders, rounds)


class Pictures(torch.utils.data.Dataset):
    """Images in memory, as in torchvision's CIFAR10: each item is turned into a Pillow image and transformed."""

    def __init__(self, pixels: torch.Tensor, transform: Callable) -> None:
        self.pixels, self.transform = pixels.permute(0, 2, 3, 1).contiguous().numpy(), transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        return self.transform(Image.fromarray(self.pixels[i]))


def of_lightly(backbone: str, batch: int, steps: int, workers: int, device: str) -> float:
    """Images/s of lightly's PyTorch example for SimCLR, with its transform, head, loss, optimizer and loop. Raises
    ImportError."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    on = common.pick_device(device)
    network = common.build_backbone(simclr.Config.preset("cifar", backbone=backbone))
    width = network.feature_dim
    model = nn.Sequential(network, SimCLRProjectionHead(width, width, 128)).to(on)
    pixels, _ = images.make_shapes(batch * steps, 0, 32)
    pictures = Pictures(pixels, SimCLRTransform(input_size=32, gaussian_blur=0.0))
    given = {"shuffle": True, "drop_last": True, "num_workers": workers, "persistent_workers": workers > 0}
    loader = torch.utils.data.DataLoader(pictures, batch, **given)
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)

    def step(x0: torch.Tensor, x1: torch.Tensor) -> None:
        z0, z1 = model(x0.to(on)), model(x1.to(on))
        criterion(z0, z1).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(*next(iter(loader)))  # warms up and starts the workers, which stay; our run has an epoch before, too
    return rate((step(x0, x1) for x0, x1 in loader), batch * steps, on)


def train(backbone: str, batch: int, steps: int, rounds: int, device: str) -> None:
    """Compare our `train`, at the rate that it logs, with lightly's loop at several numbers of workers."""
    contenders = {"ours": lambda: pipeline.trained(backbone, batch, steps, device)}
    try:
        name = version("lightly")
    except importlib.metadata.PackageNotFoundError:
        print("lightly is not installed (pip install lightly), so train has nothing to compare with")
        return
    for workers in (0, 2, 8):
        contenders[f"{name}'s example, {workers} workers"] = functools.partial(
            of_lightly, backbone, batch, steps, workers, device
        )
    table.race(f"SimCLR, {backbone}, 32x32, batch {batch}", contenders, rounds)


def main(argv: list[str] | None = None) -> None:
    parser = table.parser(__doc__)
    add = parser.add_argument
    add("what", nargs="*", choices=["views", "stream", "train"], help="what to time (default: all three)")
    add("--rounds", type=int, default=5, help="turns of each contender (default 5)")
    add("--workers", type=int, default=2, help="worker processes for stream (default 2)")
    add("--backbone", nargs="+", default=["resnet8"], help="networks for train (default resnet8)")
    add("--device", default="cpu", help="device for train (default cpu)")
    args = parser.parse_args(argv)
    images.ensure(args.rounds > 0 and args.workers > 0, "--rounds, --workers: give 1 or more")
    what, threads = args.what or ["views", "stream", "train"], torch.get_num_threads()
    print(f"{table.machine(args.device)}, {threads} threads\n")
    if "stream" in what:
        stream(1280, 64, args.workers, args.rounds)
    if "train" in what:
        for backbone in args.backbone:
            train(backbone, 256, 24 if backbone == "resnet8" else 6, args.rounds, args.device)
    if "views" in what:
        views(32, 512, args.rounds)
        views(224, 64, args.rounds)


if __name__ == "__main__":
    with common.exit_status():
        main()
