"""What every method file shares, and nothing that knows a method.

Sections: errors and exit status | flags | data | batched views | backbones | optimisation | evaluation |
checkpoint and log. Copy this file together with a method file; it needs torch, torchvision, Pillow and numpy.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import functional as TF

# ---------------------------------------------------------------------------------------- errors and exit status


class InputError(ValueError):
    """Something the user gave is wrong: one line, exit status 2."""


class RunFailure(RuntimeError):
    """The run itself failed (a non-finite loss, a full disk): one line, exit status 1."""


@contextmanager
def exit_status() -> Iterator[None]:
    """Turn the outcome of a script into its exit status: 0 done, 1 failed, 2 bad input, 130 interrupted.

    Every expected failure prints exactly one line, `error: what is wrong, and what to do`; anything else is a bug
    and keeps its traceback.
    """
    try:
        yield
        return
    except InputError as error:
        status, line = 2, f"error: {error}"
    except RunFailure as error:
        status, line = 1, f"error: {error}"
    except KeyboardInterrupt as error:
        status, line = 130, str(error) or "stopped"
    except (torch.OutOfMemoryError, MemoryError):
        status, line = 1, "error: out of memory; give a smaller --batch-size, or pieces of it by --micro-batch-size"
    except OSError as error:
        status, line = 1, f"error: {error.filename or 'a file'}: {error.strerror or error}; is the disk full?"
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)


# --------------------------------------------------------------------------------------------------------- flags

BOUNDS: dict[str, Callable[[float], bool]] = {
    "> 0": lambda v: v > 0,
    ">= 0": lambda v: v >= 0,
    ">= 1": lambda v: v >= 1,
    ">= 8": lambda v: v >= 8,
    "0 to 1": lambda v: 0 <= v <= 1,
    "> 0, <= 1": lambda v: 0 < v <= 1,
}


@dataclass(kw_only=True)
class RunConfig:
    """The flags that every method takes. A method's `Config` inherits them, adds its own and sets `PRESETS`.

    One line is one flag: `name: Annotated[type, "help", "bound"] = default`, the bound one of `BOUNDS`. Values are
    checked when a config is made, from the command line or in Python; a bad one raises `InputError`.
    """

    METHOD: ClassVar[str] = ""
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "cifar": {}, "demo": {}}

    preset: Annotated[
        Literal["paper", "cifar", "demo"],
        "recipe that sets the defaults of the flags below; when left out: demo for shapes, cifar for cifar10 and "
        "cifar100, paper for anything else",
    ] = "paper"
    data: Annotated[
        str,
        "shapes (made on the spot), cifar10, cifar100, stl10 (downloaded), or a folder: of class sub-folders, with "
        "train/ and test/ or val/ of such, or of images without labels",
    ] = "shapes"
    data_dir: Annotated[str, "where downloads are kept"] = "data"
    resident_gb: Annotated[
        float,
        "hold a folder's decoded images in memory up to this size (photos of many shapes at 8/7 of the view's side), "
        "stream above it",
        ">= 0",
    ] = 4.0
    epochs: Annotated[int, "passes over the training images", ">= 1"] = 100
    batch_size: Annotated[int, "images in a step (each gives two views)", ">= 1"] = 256
    micro_batch_size: Annotated[
        int,
        "embed the batch in pieces of this many images, twice each: the loss of all N in the memory of a piece, but "
        "BN sees a piece; 0 = off",
        ">= 0",
    ] = 0
    backbone: Annotated[str, "a torchvision ResNet name (resnet18, resnet50, ...) or resnet8, small and quick"] = (
        "resnet50"
    )
    stem: Annotated[
        Literal["auto", "cifar", "imagenet"],
        "first layers: cifar = 3x3 without max-pool, imagenet = 7x7 stride 2 with it; auto = cifar up to 64 pixels",
    ] = "auto"
    image_size: Annotated[int, "side of a view in pixels", ">= 8"] = 224
    lr: Annotated[float, "learning rate before scaling by the batch size", "> 0"] = 0.1
    weight_decay: Annotated[float, "weight decay", ">= 0"] = 0.0
    warmup_epochs: Annotated[float, "epochs of linear warm-up of the learning rate", ">= 0"] = 0.0
    seed: Annotated[int, "seed of everything random: weights, data order, views", ">= 0"] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], "auto = cuda where there is one"] = "auto"
    workers: Annotated[
        int, "threads that decode, or processes that stream, images; no more are started than there are cores", ">= 1"
    ] = 4
    amp: Annotated[Literal["off", "bf16", "fp16"], "mixed precision of the network"] = "off"
    compile: Annotated[bool, "torch.compile the network (slow start, faster steps)"] = False
    knn_every: Annotated[int, "epochs between kNN checks on the held-out images; 0 = never", ">= 0"] = 1
    out: Annotated[str, "folder of the run's files"] = "runs/run"
    resume: Annotated[bool, "continue the run in --out; flags left out keep that run's values"] = False

    def __post_init__(self) -> None:
        self.batch_size_by_hand = True  # parse_args knows better; see fit_batch_size
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for name, (kind, _, bound) in flags(type(self)).items():
            value, choices = getattr(self, name), typing.get_args(kind)
            if typing.get_origin(kind) is Literal and value not in choices:
                raise InputError(f"{dashed(name)} {value}: choose one of {', '.join(map(str, choices))}")
            if kind in (int, float, str, bool) and not isinstance(value, (int, float) if kind is float else kind):
                raise InputError(f"{dashed(name)} {value}: must be {kind.__name__}")
            if bound and value is not default[name] and not (math.isfinite(value) and BOUNDS[bound](value)):
                raise InputError(f"{dashed(name)} {value}: must be {bound}")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise InputError(
                f"--micro-batch-size {self.micro_batch_size}: must divide the batch size {self.batch_size}"
            )
        if self.micro_batch_size == 1:
            raise InputError("--micro-batch-size 1: BN has nothing to compare then; give 2 or more")


C = typing.TypeVar("C", bound=RunConfig)


def dashed(name: str) -> str:
    """The flag of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def flags(config: type[RunConfig]) -> dict[str, tuple[Any, str, str]]:
    """Field name -> (type, help, bound or "") of every flag of a config class."""
    hints = typing.get_type_hints(config, include_extras=True)
    table = {}
    for field in dataclasses.fields(config):
        kind, help_text, *bound = typing.get_args(hints[field.name])
        table[field.name] = (kind, help_text, bound[0] if bound else "")
    return table


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaint is one line, with a suggestion for a mistyped flag."""

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = (message.removeprefix("unrecognized arguments: ").split() or ["''"])[0].split("=")[0]
            known = list(self._option_string_actions)
            near = [k for k in known if k.startswith(word)] or difflib.get_close_matches(word, known, n=1, cutoff=0.75)
            message = f"unknown flag {word}" + (f"; did you mean {near[0]}?" if near else "; see --help")
            if not word.startswith("-"):
                message = (
                    f"unexpected word {word}; give its flag first, as in --data PATH (an on/off flag takes no word)"
                )
        raise InputError(message)


def parse_args(config: type[C], argv: Sequence[str] | None = None) -> C:
    """Read the command line into a config: a flag given by hand wins over the preset, the preset over the defaults.

    With `--resume`, the values of the run in `--out` stand where the preset would. Raises `InputError`.
    """
    doc = (sys.modules[config.__module__].__doc__ or "").strip().split("\n")[0]
    parser = OneLineParser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, (kind, help_text, bound) in flags(config).items():
        default = next(f.default for f in dataclasses.fields(config) if f.name == name)
        values = {p: v[name] for p, v in config.PRESETS.items() if name in v and v[name] != default}
        shown = [f"default {default}", *(f"{preset}: {value}" for preset, value in values.items())]
        shown = [] if name == "preset" else [bound, *shown] if bound else shown
        text = (help_text + f" ({'; '.join(shown)})" * bool(shown)).replace("%", "%%")
        if kind is bool:
            parser.add_argument(dashed(name), action=argparse.BooleanOptionalAction, help=text)
        elif typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            parser.add_argument(dashed(name), type=type(choices[0]), choices=choices, help=text)
        else:
            parser.add_argument(dashed(name), type=kind, metavar=kind.__name__.upper(), help=text)
    given = vars(parser.parse_args(argv))

    saved = Path(given.get("out", config.out)) / "config.json"
    if given.get("resume"):
        if not saved.is_file():
            raise InputError(f"--resume: no run in {saved.parent}; give its folder with --out, or leave out --resume")
        try:
            stored = json.loads(saved.read_text())
        except ValueError:
            raise InputError(f"--resume: {saved} cannot be read; start again without --resume") from None
        if stored.pop("method", None) != config.METHOD:
            raise InputError(f"--resume: {saved.parent} holds a run of another method, not of {config.METHOD}")
        base = {k: v for k, v in stored.items() if k in flags(config)}
        if "preset" in given:
            base |= config.PRESETS[given["preset"]]
    else:
        data = given.get("data", "shapes")
        small = {"shapes": "demo", "cifar10": "cifar", "cifar100": "cifar"}
        given.setdefault("preset", small.get(data, "paper"))
        base = config.PRESETS[given["preset"]]
    result = config(**(base | given))
    settled = given.get("resume") and not {"epochs", "preset"} & given.keys()  # by that run
    if result.warmup_epochs >= result.epochs and "warmup_epochs" not in given and not settled:
        print(f"note: the warm-up of {result.warmup_epochs:g} epochs is lowered to a tenth of --epochs {result.epochs}")
        result.warmup_epochs = result.epochs / 10
    result.batch_size_by_hand = "batch_size" in given
    return result


# ---------------------------------------------------------------------------------------------------------- data

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
SMALLEST_SIDE = 8  # pixels; a smaller picture has nothing to crop and is skipped
VIEW_RATIO = (3 / 4, 4 / 3)  # aspect ratios of a random crop, the same in every paper here


class Images:
    """One split of a data set: N images with a label each (-1 where there is none).

    Resident: `images` is a uint8 tensor (N, 3, H, W) on the device. Streamed: `images` is None and worker
    processes decode `paths`. `sizes` (N, 2) holds each original height and width: crops are drawn in the
    coordinates of the original picture even where the resident copy was resized.
    """

    def __init__(self, images: Tensor | None, paths: Sequence[Path], sizes: Tensor, labels: Tensor, device: Any):
        self.images, self.paths, self.sizes, self.labels, self.device = images, paths, sizes, labels, device

    def __len__(self) -> int:
        return len(self.labels)

    def crops(
        self,
        batches: Sequence[Tensor],
        size: int,
        views: int,
        scale: tuple[float, float] | None,
        seed: int = 0,
        workers: int = 4,
    ) -> Iterator[list[Tensor]]:
        """For each batch of indices yield `views` random resized crops (B, 3, size, size), float in [0, 1].

        `scale` is the range of a crop's fraction of the area; None takes the whole picture. A resident set draws
        from torch's CPU generator, a streamed one from (`seed`, image): the number of workers changes nothing.
        """
        if self.images is None:
            for batch in self.stream(batches, size, views, scale, seed, workers):
                yield [view.float().div_(255) for view in batch.unbind(1)]
            return
        for index in batches:
            picked, sizes = self.images[index.to(self.device)], self.sizes[index]
            boxes = [random_crop_boxes(sizes, scale) if scale else whole_boxes(sizes) for _ in range(views)]
            yield [crop_resize(picked, self.stored(box, sizes), size) for box in boxes]

    def centered(self, batches: Sequence[Tensor], size: int, workers: int = 4) -> Iterator[Tensor]:
        """For each batch of indices yield the central views (B, 3, size, size) that evaluation uses."""
        if self.images is None:
            for batch in self.stream(batches, size, 1, "centre", 0, workers):
                yield batch[:, 0].float().div_(255)
            return
        for index in batches:
            sizes = self.sizes[index]
            boxes = self.stored(central_boxes(sizes, size), sizes)
            yield crop_resize(self.images[index.to(self.device)], boxes, size)

    def stored(self, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Boxes in original pixels -> boxes in pixels of the resident copy."""
        shrink = torch.tensor(self.images.shape[2:]) / sizes
        return boxes * torch.cat([shrink, shrink], dim=1)

    def stream(self, batches, size, views, scale, seed, workers) -> Iterator[Tensor]:
        """Batches uint8 (B, views, 3, size, size) from worker processes, which fill pieces of at most 256 images."""
        pieces = [[piece.tolist() for piece in batch.split(256)] for batch in batches]
        loader = torch.utils.data.DataLoader(
            StreamedViews(self.paths, size, views, scale, seed),
            batch_sampler=[piece for batch in pieces for piece in batch],
            num_workers=min(workers, os.cpu_count() or 1),
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),  # else it draws from torch's own, and a resumed run draws once more
        )
        try:
            arriving = iter(loader)
            for batch in pieces:
                yield torch.cat([next(arriving).to(self.device, non_blocking=True) for _ in batch])
        except RunFailure as error:  # a worker's, with its traceback in the text
            raise RunFailure(str(error).strip().split("RunFailure: ")[-1]) from None


def ignore_interrupts(worker: int) -> None:
    """A terminal sends Ctrl-C to the workers too, but the main process needs their batch to stop after a whole step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StreamedViews(torch.utils.data.Dataset):
    """Image index -> uint8 (views, 3, size, size), cropped from the full-resolution picture in a worker process."""

    def __init__(self, paths: Sequence[Path], size: int, views: int, scale: Any, seed: int):
        self.paths, self.size, self.views, self.scale, self.seed = paths, size, views, scale, seed

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * len(self.paths) + index) % 2**63)
        for offset in range(100):
            path = self.paths[(index + offset) % len(self.paths)]  # the next one stands in for a damaged file
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    image = torch.from_numpy(decode(path)[0]).permute(2, 0, 1)
                break
            except Exception as error:
                print(f"\nwarning: skipped {path}: {one_line(error)}", file=sys.stderr)
        else:
            raise RunFailure("a hundred images in a row cannot be decoded; is the folder still there?")
        sizes, views = torch.tensor([image.shape[1:]]), []
        for _ in range(self.views):
            if self.scale == "centre":
                box = central_boxes(sizes, self.size)
            else:
                box = random_crop_boxes(sizes, self.scale, generator) if self.scale else whole_boxes(sizes)
            box = [round(v) for v in box[0].tolist()]
            views.append(TF.resized_crop(image, *box, [self.size, self.size], antialias=True))
        return torch.stack(views)


@dataclass
class Data:
    """A data set ready for use: `train`, and `test` where there are held-out images (labelled or not)."""

    name: str
    train: Images
    test: Images | None
    classes: list[str]
    skipped: list[tuple[str, str]]  # (file, reason)

    def labelled(self) -> bool:
        """Whether there are held-out images with labels to evaluate on."""
        return bool(self.classes) and self.test is not None

    def describe(self) -> str:
        images = self.train.images
        where = "streamed by workers"
        if images is not None:
            total = images.nbytes + (self.test.images.nbytes if self.test else 0)
            where = f"{images.shape[3]}x{images.shape[2]}, resident on {images.device.type}, {total / 1e6:,.0f} MB"
        held = f", {len(self.test):,} held out" if self.test else ""
        kinds = f", {len(self.classes)} classes" if self.classes else ", no labels"
        bad = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{self.name}: {len(self.train):,} images{held}{kinds}{bad}; {where}"


def load_data(config: RunConfig, device: torch.device) -> Data:
    """Load `config.data` (a name or a folder). Raises `InputError` when there is nothing usable."""
    if config.data == "shapes":
        (a, la), (b, lb) = make_shapes(10_000, 0, config.image_size), make_shapes(2_000, 1, config.image_size)
        return Data("shapes", whole(a, la, device), whole(b, lb, device), list(SHAPES), [])
    if config.data in ("cifar10", "cifar100", "stl10"):
        return load_torchvision(config, device)
    return load_folder(config, device)


def whole(images: Tensor, labels: Tensor, device: torch.device) -> Images:
    """A resident split of images that all have their original size."""
    return Images(images.to(device), (), torch.tensor(images.shape[2:]).expand(len(labels), 2), labels, device)


def load_torchvision(config: RunConfig, device: torch.device) -> Data:
    """CIFAR-10, CIFAR-100 or STL-10 through torchvision; STL-10 trains on its unlabelled images too (label -1)."""
    kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}[config.data]
    make = getattr(torchvision.datasets, kind)
    splits = ["train+unlabeled", "test"] if kind == "STL10" else [True, False]
    try:
        key = "split" if kind == "STL10" else "train"
        sets = [make(config.data_dir, download=True, **{key: split}) for split in splits]
    except Exception as error:  # torchvision raises URLError, RuntimeError, OSError, EOFError, ... here
        reason = str(error).split("\n")[0]
        raise InputError(
            f"--data {config.data}: no files in {config.data_dir} and the download failed ({reason}); "
            f"check the network, put the files there, or give a folder of images"
        ) from None
    out = []
    for data in sets:
        images = torch.from_numpy(np.ascontiguousarray(data.data))
        images = images if kind == "STL10" else images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(data.labels if kind == "STL10" else data.targets, dtype=torch.int64)
        out.append(whole(images, labels, device))
    return Data(config.data, *out, list(sets[0].classes), [])


def decode(path: Path, fit: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    """Read any picture as uint8 RGB (H, W, 3), upright, with its original (height, width).

    Grey, palette, RGBA, CMYK and 16-bit pictures are converted. `fit` = (height, width) resizes, which lets JPEG
    decode at a reduced scale. Raises what Pillow raises for a damaged file.
    """
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1)  # EXIF orientation
        if fit:
            image.draft("RGB", (2 * fit[1], 2 * fit[0]))
        if turned > 1:
            image = ImageOps.exif_transpose(image)
            width, height = (height, width) if turned >= 5 else (width, height)
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert would clip at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
        elif image.mode == "F":
            image = Image.fromarray((np.asarray(image).clip(0, 1) * 255).astype(np.uint8))
        image = image.convert("RGB")
        if fit and image.size != (fit[1], fit[0]):
            image = image.resize((fit[1], fit[0]), Image.Resampling.BILINEAR)  # with antialiasing
        return np.array(image), (height, width)


def list_images(root: Path) -> list[Path]:
    """Every file below `root` named like an image, in a fixed order, through links, without hidden ones."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        names = sorted(f for f in files if Path(f).suffix.lower() in IMAGE_SUFFIXES and not f.startswith("."))
        found += [Path(folder) / name for name in names]
    return found


def load_folder(config: RunConfig, device: torch.device) -> Data:
    """A folder of images: `train/` with `test/` or `val/`, class sub-folders, or flat. Unreadable files are skipped.

    Without a test folder every tenth image of each class is held out. Labels are only used for evaluation.
    """
    root = Path(config.data)
    if not root.is_dir():
        raise InputError(
            f"--data {config.data}: no such folder; give a folder of images or one of shapes, cifar10, cifar100, stl10"
        )
    parts = [root / "train"] if (root / "train").is_dir() else [root]
    parts += [p for p in (root / "test", root / "val") if parts[0] != root and p.is_dir()][:1]
    names = sorted(p.name for p in parts[0].iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = {name: i for i, name in enumerate(names)} if len(names) > 1 else {}  # one folder says nothing

    paths, labels, split = [], [], []
    for which, part in enumerate(parts):
        for path in list_images(part):
            label = classes.get(path.relative_to(part).parts[0], -1)
            if which == 1 and classes and label < 0:
                continue  # a test image of a class that was not trained on
            paths.append(path)
            labels.append(label)
            split.append(which)
    if not paths:
        raise InputError(f"--data {root}: no images in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")

    side = round(config.image_size * 8 / 7)  # 256 for views of 224
    images, skipped = None, []
    sizes = in_threads(picture_size, paths, config.workers, skipped, "checked")
    if len(paths) * 3 * side * side <= config.resident_gb * 1e9:
        first = next((size for size in sizes if size), (side, side))
        same = max(first) <= side and all(size in (first, None) for size in sizes)
        fit = first if same else (side, side)  # photos of many shapes: the whole picture, squeezed into a square
        images = torch.empty((len(paths), 3, *fit), dtype=torch.uint8)

        def read(i: int) -> tuple[int, int] | None:
            if sizes[i]:
                pixels, size = decode(paths[i], fit)
                images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
                return size

        sizes = in_threads(read, range(len(paths)), config.workers, skipped, "decoded", paths)
    for path, reason in skipped[:20]:
        print(f"warning: skipped {path}: {reason}", file=sys.stderr)
    if len(skipped) > 20:
        print(f"warning: skipped {len(skipped) - 20} more like these", file=sys.stderr)
    good = [i for i, size in enumerate(sizes) if size]
    if not good:
        raise InputError(f"--data {root}: none of its {len(paths)} images can be decoded")
    if images is not None and skipped:
        images = images[good]

    labels, split = torch.tensor([labels[i] for i in good]), torch.tensor([split[i] for i in good])
    sizes = torch.tensor([sizes[i] for i in good])
    paths = [paths[i] for i in good]
    if len(parts) == 1 and classes:  # hold out every tenth image of each class
        rank = torch.zeros_like(labels)
        for label in range(len(classes)):
            mine = labels == label
            rank[mine] = torch.arange(int(mine.sum()))
        split = (rank % 10 == 9).long()

    def part(which: int) -> Images:
        index = (split == which).nonzero().squeeze(1)
        kept = None if images is None else images[index].to(device)
        return Images(kept, [paths[i] for i in index.tolist()], sizes[index], labels[index], device)

    if (split == 0).sum() == 0:
        raise InputError(f"--data {root}: no image left to train on in {parts[0]}")
    test = part(1) if (split == 1).any() else None
    return Data(str(root), part(0), test, list(classes), skipped)


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) from a file's header. Raises what Pillow does, and ValueError for a picture too small to crop."""
    with Image.open(path) as image:
        width, height = image.size
    if min(width, height) < SMALLEST_SIDE:
        raise ValueError(f"{width}x{height} pixels, smaller than {SMALLEST_SIDE}")
    return height, width


def in_threads(work: Callable, items: Sequence, workers: int, skipped: list, verb: str, names: Any = None) -> list:
    """`work` of every item, in threads (Pillow releases the interpreter lock); None where it raised, which is noted
    in `skipped`, with its name. Progress in a terminal, and a line when it took more than two seconds."""

    def one(i: int) -> Any:
        try:
            return work(items[i])
        except Exception as error:  # Pillow raises many kinds for a damaged file
            skipped.append((str((names or items)[i]), one_line(error)))

    started = shown = time.monotonic()
    live, out = sys.stdout.isatty(), []
    with warnings.catch_warnings(), ThreadPoolExecutor(min(workers, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        for result in pool.map(one, range(len(items))):
            out.append(result)
            if live and time.monotonic() - shown > 0.2:
                shown = time.monotonic()
                print(f"\r{verb} {len(out):,} of {len(items):,} images ", end="", flush=True)
    seconds = time.monotonic() - started
    print("\r\x1b[K" * live + f"{verb} {len(items):,} images in {seconds:.1f} s\n" * (seconds > 2), end="", flush=True)
    return out


def one_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return str(error).split("\n")[0] or type(error).__name__


SHAPES = ("disc", "ring", "half-disc", "triangle", "square", "bar", "star", "plus", "L", "arrow")


def make_shapes(n: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Draw `n` images of ten kinds of shapes: uint8 (n, 3, size, size) and labels (n,), the same for the same seed.

    The class is the shape. Position, size, rotation, the two colours, a light gradient and noise are nuisance.
    """
    rng = torch.Generator().manual_seed(seed + 77)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=rng) * (high - low) + low

    labels = torch.arange(n) % len(SHAPES)
    outer, inner = (t[labels] for t in shape_outlines())
    radius, turn = uniform(0.26, 0.36), uniform(0, 2 * math.pi)
    centre = uniform(0.31, 0.69, 2)
    ground = uniform(0.25, 0.5, 1) + uniform(-0.05, 0.05, 3)
    figure = ground + uniform(0.3, 0.5, 1) + uniform(-0.05, 0.05, 3)
    slope = uniform(-0.1, 0.1, 2)
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    grid = (torch.arange(size) + 0.5) / size
    for rows in torch.arange(n).split(500):
        dy = grid[None, :, None] - centre[rows, 0, None, None]
        dx = grid[None, None, :] - centre[rows, 1, None, None]
        angle = ((torch.atan2(dy, dx) + turn[rows, None, None]) / (2 * math.pi)) % 1.0  # (n, size, size)
        bin_ = (angle * outer.shape[1]).long().clamp(max=outer.shape[1] - 1).flatten(1)
        distance = (dy**2 + dx**2).sqrt() / radius[rows, None, None]
        soft = radius[rows, None, None] * size  # an edge one pixel wide
        edge = outer[rows].gather(1, bin_).view_as(distance)
        hole = inner[rows].gather(1, bin_).view_as(distance)
        cover = ((edge - distance) * soft + 0.5).clamp(0, 1) * ((distance - hole) * soft + 0.5).clamp(0, 1)
        light = slope[rows, 0, None, None] * dy + slope[rows, 1, None, None] * dx
        back, front = ground[rows, :, None, None], figure[rows, :, None, None]
        picture = back + (front - back) * cover[:, None] + light[:, None]
        picture = picture + 0.03 * torch.randn(picture.shape, generator=rng)
        images[rows] = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return images, labels


OUTLINES = {  # corners, x before y, around a centre that sees every side
    "triangle": "1 0 -.5 .866 -.5 -.866",
    "square": "1 1 -1 1 -1 -1 1 -1",
    "bar": "1 .27 -1 .27 -1 -.27 1 -.27",
    "plus": ".3 .3 .3 1 -.3 1 -.3 .3 -1 .3 -1 -.3 -.3 -.3 -.3 -1 .3 -1 .3 -.3 1 -.3 1 .3",
    "L": "-.3 -.3 1.1 -.3 1.1 .2 .2 .2 .2 1.1 -.3 1.1",
    "arrow": ".9 0 -.1 .8 -.1 .27 -1 .27 -1 -.27 -.1 -.27 -.1 -.8",
    "half-disc": " ".join(f"{math.cos(t / 20) - 0.4} {math.sin(t / 20)}" for t in range(-31, 32)),
    "star": " ".join(
        f"{r * math.cos(t)} {r * math.sin(t)}" for i in range(10) for r, t in [((1, 0.42)[i % 2], i * math.pi / 5)]
    ),
}


def shape_outlines(bins: int = 720) -> tuple[Tensor, Tensor]:
    """Outer and inner radius of each shape by angle, (10, bins), all of the same area."""
    theta = (torch.arange(bins) + 0.5) * (2 * math.pi / bins)
    ray = torch.stack([theta.cos(), theta.sin()], 1)  # (bins, 2)
    outer, inner = torch.ones(len(SHAPES), bins), torch.zeros(len(SHAPES), bins)
    inner[SHAPES.index("ring")] = 0.55
    for name, corners in OUTLINES.items():
        p = torch.tensor([float(v) for v in corners.split()]).view(-1, 2)
        side = p.roll(-1, 0) - p
        cross = ray[:, None, 0] * side[None, :, 1] - ray[:, None, 1] * side[None, :, 0]  # (bins, corners)
        along = (p[:, 0] * side[:, 1] - p[:, 1] * side[:, 0]) / cross  # distance to the side's line along the ray
        where = (p[None, :, 0] * ray[:, None, 1] - p[None, :, 1] * ray[:, None, 0]) / cross  # 0..1 on the side
        hit = (where >= 0) & (where <= 1) & (along > 0)
        outer[SHAPES.index(name)] = torch.where(hit, along, 0).amax(1)
    area = (outer**2 - inner**2).mean(1, keepdim=True)  # in units of pi
    grow = (0.5 / area).sqrt()
    return outer * grow, inner * grow


# ------------------------------------------------------------------------------------------------- batched views
#
# Every op takes float images (N, 3, H, W) in [0, 1] with parameters of its own for each image, drawn on the CPU
# (so no step waits for the device), and equals torchvision's functional op with the same parameters.


def random_crop_boxes(sizes: Tensor, scale: tuple[float, float], generator: torch.Generator | None = None) -> Tensor:
    """Random-resized-crop boxes (N, 4) = top, left, height, width, drawn as torchvision's RandomResizedCrop does.

    `sizes` (N, 2) heights and widths in pixels; `scale` the range of the area's fraction. Ten tries for each
    image, the first that fits; else the central crop of the nearest allowed ratio.
    """
    n, (low, high) = len(sizes), (math.log(r) for r in VIEW_RATIO)
    height, width = sizes[:, :1].float(), sizes[:, 1:].float()
    u = torch.rand(3, n, 10, generator=generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    ratio = torch.exp(low + (high - low) * u[1])
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, none = fits.int().argmax(1, keepdim=True), ~fits.any(1, keepdim=True)
    ratio_low, ratio_high = VIEW_RATIO
    w = torch.where(none, torch.minimum(width, (height * ratio_high).round()), w.gather(1, first))
    h = torch.where(none, torch.minimum(height, (width / ratio_low).round()), h.gather(1, first))
    room = torch.cat([height - h, width - w], 1)
    corner = (u[2, :, :2] * (room + 1)).floor().minimum(room)
    return torch.cat([torch.where(none, (room / 2).floor(), corner), h, w], 1)


def whole_boxes(sizes: Tensor) -> Tensor:
    """Boxes (N, 4) around whole pictures of `sizes` (N, 2)."""
    return torch.cat([torch.zeros_like(sizes), sizes], 1).float()


def central_boxes(sizes: Tensor, size: int) -> Tensor:
    """Evaluation boxes (N, 4): the central square, of 7/8 of the short side for views above 64 pixels."""
    short = sizes.amin(1, keepdim=True).float()
    side = torch.where(short > size, short * 7 / 8, short) if size > 64 else short
    return torch.cat([(sizes - side) / 2, side, side], 1)


def resize_weights(start: Tensor, length: Tensor, n_in: int, n_out: int) -> Tensor:
    """Weights (N, n_out, n_in) of antialiased bilinear resizing of pixels [start, start + length) to n_out pixels."""
    length = length.clamp(min=1)[:, None, None]
    start = torch.minimum(start[:, None, None], n_in - length)
    scale = length / n_out
    here = torch.arange(n_in, device=start.device) + 0.5
    centre = start + (torch.arange(n_out, device=start.device)[:, None] + 0.5) * scale
    weight = (1 - (here - centre).abs() / scale.clamp(min=1)).clamp_(min=0)
    weight *= (here >= start) & (here < start + length)
    return weight / weight.sum(-1, keepdim=True)


def along_both_sides(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows_n image_n columns_n^T, channel by channel: (N, 3, H, W), (N, P, H), (N, Q, W) -> (N, 3, P, Q)."""
    n, c, h, w = images.shape
    x = images.permute(0, 2, 1, 3).to(rows.dtype).reshape(n, h, c * w)
    x = torch.bmm(rows, x).view(n, -1, w)  # (N, P * 3, W)
    x = torch.bmm(x, columns.transpose(1, 2))  # (N, P * 3, Q)
    return x.view(n, rows.shape[1], c, -1).transpose(1, 2)


def crop_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop box n from image n and resize it, antialiased, to (N, 3, size, size) float in [0, 1].

    `images` uint8 or float (N, 3, H, W); `boxes` (N, 4) = top, left, height, width in pixels.
    """
    top, left, height, width = boxes.to(images.device, non_blocking=True).float().unbind(1)
    rows = resize_weights(top, height, images.shape[2], size)
    if images.dtype == torch.uint8:
        rows = rows / 255
    return along_both_sides(images, rows, resize_weights(left, width, images.shape[3], size)).contiguous()


def coin(n: int, probability: float) -> Tensor:
    """n independent draws, True with the given probability, on the CPU."""
    return torch.rand(n) < probability


def where_drawn(x: Tensor, mask: Tensor, op: Callable[..., Tensor], *per_image: Tensor) -> Tensor:
    """Apply `op` (with its per-image parameters) to the images whose CPU `mask` (N,) is True; changes `x` in place."""
    index = mask.nonzero().squeeze(1)
    if len(index) == 0:
        return x
    there = index.to(x.device, non_blocking=True)
    picked = op(x.index_select(0, there), *(p[index] for p in per_image))
    return x.index_copy_(0, there, picked)


def flip(x: Tensor) -> Tensor:
    """Mirror left and right."""
    return x.flip(-1)


def grey(x: Tensor) -> Tensor:
    """Luma of (N, 3, H, W) as (N, 1, H, W), torchvision's weights."""
    out = x[:, 0:1] * 0.2989
    return out.add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def to_grey(x: Tensor) -> Tensor:
    """Grey picture in three equal channels."""
    return grey(x).expand_as(x)


@dataclass
class Jitter:
    """Colour-jitter parameters, each (N,): factors for brightness, contrast, saturation; a hue shift in turns."""

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor  # (N, 4): which of the four (0 brightness ... 3 hue) comes first, second, ...


def random_jitter(n: int, brightness: float, contrast: float, saturation: float, hue: float, p: float) -> Jitter:
    """Draw as torchvision's ColorJitter does, an order for every image; with probability 1 - p leave it alone."""

    def factor(width: float) -> Tensor:
        return torch.where(on, torch.empty(n).uniform_(max(0.0, 1 - width), 1 + width), 1.0)

    on = coin(n, p)
    shift = torch.where(on, torch.empty(n).uniform_(-hue, hue), 0.0)
    return Jitter(factor(brightness), factor(contrast), factor(saturation), shift, torch.rand(n, 4).argsort(1))


def color_jitter(x: Tensor, jitter: Jitter) -> Tensor:
    """Brightness, contrast, saturation and hue, in each image's own order; changes `x` in place.

    The first three are clamp(f x + (1 - f) y) with y = 0, the mean grey, or the grey picture: one blend for all.
    """
    n = len(x)
    for slot in range(4):
        kind = jitter.order[:, slot]
        factors = torch.stack([jitter.brightness, jitter.contrast, jitter.saturation, torch.ones(n)])
        factor = factors.gather(0, kind[None])[0]
        by_kind = torch.stack([factor, (1 - factor) * (kind == 1), (1 - factor) * (kind == 2)])
        f, to_mean, to_grey_ = by_kind.to(x.device, non_blocking=True).view(3, n, 1, 1, 1).unbind()
        luma = grey(x)
        other = luma.mean((2, 3), keepdim=True) * to_mean + luma.mul_(to_grey_)
        x.mul_(f).add_(other).clamp_(0, 1)
        x = where_drawn(x, (kind == 3) & (jitter.hue != 0), shift_hue, jitter.hue)
    return x


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue by `turns` (N,) in [-0.5, 0.5]: to HSV and back.

    With V the largest channel, C the chroma and H the hue in turns, each channel of the result is
    V - C clamp(2 - |6 frac(H + offset) - 2|, 0, 1).
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    sixth = torch.where(value == g, (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4))
    sixth = torch.where(value == r, g - b, sixth).div_(chroma.clamp(min=1e-12))
    hue = sixth.div_(6).add_(1 + turns.to(x.device, non_blocking=True).view(-1, 1, 1))  # > 0, so frac is the remainder
    out = torch.empty_like(x)
    for channel, offset in enumerate((5 / 6, 3 / 6, 1 / 6)):
        k = (hue + offset).frac_().mul_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(value, chroma, k, value=-1, out=out[:, channel])
    return out


def gaussian_blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur with a Gaussian of `sigma` (N,) pixels over an odd `kernel_size`, borders reflected."""
    half = kernel_size // 2
    taps = torch.arange(-half, half + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x.device, non_blocking=True)  # (N, kernel_size)

    def matrix(side: int) -> Tensor:  # the convolution as a banded matrix (N, side, side)
        position = torch.arange(side)[:, None] + torch.arange(-half, half + 1)
        position = (side - 1) - ((side - 1) - position.abs()).abs()  # reflect without repeating the edge
        return (kernel @ F.one_hot(position, side).float().permute(1, 0, 2).flatten(1).to(x.device)).view(
            -1, side, side
        )

    return along_both_sides(x, matrix(x.shape[2]), matrix(x.shape[3]))


def solarize(x: Tensor, threshold: float = 0.5) -> Tensor:
    """Invert what is at or above the threshold."""
    return torch.where(x >= threshold, 1 - x, x)


def cutout(x: Tensor, centre: Tensor, side: float = 0.5) -> Tensor:
    """Black out a square of `side` times the image's side around `centre` (N, 2) in [0, 1], cut at the border."""
    inside = []
    for axis, n in enumerate(x.shape[2:]):
        start = (centre[:, axis] * n).floor() - round(n * side) // 2
        here = torch.arange(n)
        inside.append((here >= start[:, None]) & (here < start[:, None] + round(n * side)))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x * ~hole.to(x.device, non_blocking=True)


def sobel(x: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient of the grey picture, in three equal channels, clamped to 1."""
    edge = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device)
    both = F.conv2d(F.pad(grey(x), (1, 1, 1, 1), mode="reflect"), torch.stack([edge, edge.T])[:, None])
    return both.norm(dim=1, keepdim=True).clamp_(max=1).repeat(1, 3, 1, 1)


def gaussian_noise(x: Tensor, sigma: Tensor) -> Tensor:
    """Add normal noise of standard deviation `sigma` (N,), clamped to [0, 1]."""
    noise = torch.randn(x.shape).to(x.device, non_blocking=True)
    return (x + noise * sigma.to(x.device).view(-1, 1, 1, 1)).clamp_(0, 1)


def rotate(x: Tensor, quarters: Tensor) -> Tensor:
    """Turn image n counter-clockwise by `quarters` (N,) times 90 degrees."""
    for k in (1, 2, 3):
        x = where_drawn(x, quarters == k, lambda y, k=k: y.rot90(k, (2, 3)))
    return x


# ----------------------------------------------------------------------------------------------------- backbones


class ResNet8(nn.Module):
    """A quarter-scale ResNet for small images on a CPU: a stride-2 3x3 stem, three basic blocks (32, 64, 128).

    The last BN of a block starts at 1 here: with so few blocks, 0 only delays a short run (measured on shapes).
    """

    feature_dim = 128

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = BasicBlock(32, 32)
        self.layer2 = BasicBlock(32, 64, 2, nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64)))
        self.layer3 = BasicBlock(64, 128, 2, nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128)))
        for module in self.modules():  # as torchvision initialises its ResNets
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


def build_backbone(config: RunConfig) -> nn.Module:
    """The network f: images (N, 3, H, W) -> features h (N, `feature_dim`). The last BN of each block starts at 0.

    A torchvision ResNet without its `fc`, so that its state_dict loads back into the torchvision model; with the
    "cifar" stem `conv1` is 3x3 and there is no max-pool. Raises `InputError` for an unknown name.
    """
    name = config.backbone
    known = [
        n for n in torchvision.models.list_models(module=torchvision.models) if "resne" in n and "quantized" not in n
    ]
    if name == "resnet8":
        return ResNet8()
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "resnet8"], n=1)
        raise InputError(
            f"--backbone {name}: unknown; "
            + (f"did you mean {near[0]}?" if near else f"take one of resnet8, {', '.join(known)}")
        )
    network = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
    if config.stem == "cifar" or (config.stem == "auto" and config.image_size <= 64):
        network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    network.feature_dim = network.fc.in_features
    network.fc = nn.Identity()
    return network


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights, and the BN parameters and biases, which get neither weight decay nor LARS adaptation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics of every BN layer as they are, for a forward pass that is not to count."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(m.momentum, m.num_batches_tracked) for m in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(layers, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, count


def embed_in_pieces(network: nn.Module, micro: int, *views: Tensor) -> Tensor:
    """`network` of the views (N, 3, S, S) together: (V N, d), the first view's rows before the second's.

    With `micro` > 0 in pieces of at most that many images, each with all its views. Their graphs are not kept: the
    backward pass builds each anew, from the dL/dz of the whole batch, and frees it before the next. That is GradCache
    (Gao et al. 2021, arXiv:2101.06983) by activation checkpoints; exact, but that BN sees pieces.
    """
    if not micro:
        return network(torch.cat(views) if len(views) > 1 else views[0])

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), still_statistics(network)  # the second time is for the graph alone

    pieces = zip(*(x.tensor_split(-(-len(x) // micro)) for x in views), strict=True)
    out = [checkpoint(network, torch.cat(piece), use_reentrant=False, context_fn=contexts) for piece in pieces]
    return torch.cat([torch.cat(z) for z in zip(*(z.chunk(len(views)) for z in out), strict=True)])


# -------------------------------------------------------------------------------------------------- optimisation


def cosine_lr(step: int, total: int, warmup: int, peak: float) -> float:
    """Learning rate of step 0 <= step < total: linear to `peak` over `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888), as SimCLR and BYOL use it.

    For each tensor w with gradient g:  g <- g + weight_decay w;  rate = trust |w| / |g| (1 where either is 0, or
    where the group has `adapt` False);  with the lr inside the momentum buffer (SimCLR):  v <- momentum v +
    lr rate g, w <- w - v;  outside it (BYOL, `lr_in_momentum=False`):  v <- momentum v + rate g, w <- w - lr v.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001, lr_in_momentum=True):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, adapt=True)
        super().__init__(params, defaults | {"lr_in_momentum": lr_in_momentum})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads = [p.grad for p in weights]
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
            if group["adapt"]:
                w_norms, g_norms = torch._foreach_norm(weights), torch._foreach_norm(grads)
                rates = [
                    torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0)
                    for w, g in zip(w_norms, g_norms, strict=True)
                ]
                grads = torch._foreach_mul(grads, rates)
            for p in weights:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            velocity = [self.state[p]["momentum"] for p in weights]
            torch._foreach_mul_(velocity, group["momentum"])
            inside = group["lr_in_momentum"]
            torch._foreach_add_(velocity, grads, alpha=group["lr"] if inside else 1.0)
            torch._foreach_add_(weights, velocity, alpha=-1.0 if inside else -group["lr"])
        return loss


# ---------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def embed(
    network: Callable[[Tensor], Tensor], images: Images, config: RunConfig, index: Tensor | None = None
) -> Tensor:
    """`network`, its BN in eval mode, over the central views of a split (or of its images `index`): (N, d) float32."""
    index = torch.arange(len(images)) if index is None else index
    batches = index.split(min(512, 2 * (config.micro_batch_size or config.batch_size)))
    was = isinstance(network, nn.Module) and network.training
    if was:
        network.eval()
    out = torch.cat([network(x).float() for x in images.centered(batches, config.image_size, config.workers)])
    if was:
        network.train()
    return out


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 200, temperature: float = 0.1
) -> float:
    """Top-1 of the weighted kNN classifier (Wu et al. 2018, arXiv:1805.01978): votes exp(cosine / temperature).

    `bank` (N, d) with `bank_labels` (N,), `queries` (M, d) with `labels` (M,); k is capped by N.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    bank_labels, labels = bank_labels.to(bank.device), labels.to(bank.device)
    k, classes, right = min(k, len(bank)), int(bank_labels.max()) + 1, 0
    for rows, truth in zip(queries.split(1024), labels.split(1024), strict=True):
        similarity, index = (rows @ bank.T).topk(k, dim=1)  # (m, k)
        votes = torch.zeros(len(rows), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[index], ((similarity - 1) / temperature).exp())
        right += int((votes.argmax(1) == truth).sum())
    return right / len(queries)


BANK = 100_000  # training images that kNN compares with, at most


def knn_of(network: Callable[[Tensor], Tensor], data: Data, config: RunConfig) -> float | None:
    """kNN top-1 on the held-out images with the labelled training images as the bank; None without labels."""
    if not data.labelled():
        return None
    bank = (data.train.labels >= 0).nonzero().squeeze(1)
    if len(bank) > BANK:
        bank = bank[torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:BANK]]
    known, queries = embed(network, data.train, config, bank), embed(network, data.test, config)
    if network is pixels:
        queries, known = queries - known.mean(0), known - known.mean(0)
    return knn_accuracy(known, data.train.labels[bank], queries, data.test.labels)


def pixels(x: Tensor) -> Tensor:
    """Raw pixels, at most 32x32, as features (the mean picture is then taken off): what h has to beat."""
    return (F.adaptive_avg_pool2d(x, 32) if x.shape[-1] > 32 else x).flatten(1)


@torch.no_grad()
def feature_std(z: Tensor) -> Tensor:
    """Mean over channels of the std of the l2-normalised rows of z (N, d): near 1/sqrt(d) when healthy, 0 collapsed."""
    return F.normalize(z.float(), dim=1).std(0).mean()


@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the l2-normalised rows (Roy & Vetterli 2007): 1 to d."""
    z = F.normalize(z.float(), dim=1).double()  # squared by the Gram matrix, a float32 would lose the small ones
    s = torch.linalg.eigvalsh(z.T @ z if z.shape[1] < len(z) else z @ z.T).clamp(min=0).sqrt()
    p = s / s.sum().clamp(min=1e-12)
    return float(torch.exp(-(p * p.clamp(min=1e-12).log()).sum()))


@torch.no_grad()
def likeness(z: Tensor) -> float:
    """Mean over pairs of different rows of z (N, d) of their squared cosine: 1 when all lie on one line, be it at one
    point (0 too) or at two opposite ones, 1/d when healthy."""
    if not z.any():
        return 1.0
    z, n = F.normalize(z.float(), dim=1), len(z)
    gram = z.T @ z if z.shape[1] < n else z @ z.T  # the squares of both have the same sum, N of it from i = j
    return float(gram.square().sum() - n) / max(1, n * (n - 1))


# -------------------------------------------------------------------------------------------- checkpoint and log


def pick_device(config: RunConfig) -> torch.device:
    """The device of `config.device`. Raises `InputError` where it cannot be had."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine or this torch has no CUDA device; use --device cpu or auto")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return torch.device(name)


def prepare(config: RunConfig) -> torch.device:
    """Pick the device, seed everything, and make the run's folder. Raises `InputError` for what cannot be had."""
    device = pick_device(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun with several processes is not supported yet; start one process")
    torch.manual_seed(config.seed)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".write-test").write_text("")
        (out / ".write-test").unlink()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    return device


def fit_batch_size(config: RunConfig, n: int) -> None:
    """A batch larger than the n training images: an error if it was given by hand; else the preset's is lowered to
    the power of two that makes at least 16 steps an epoch, but no lower than 16 (or n), since BN needs some."""
    if n < 2:
        raise InputError(f"--data {config.data}: only {n} image to train on; give 2 or more")
    if config.batch_size <= n:
        return
    if config.batch_size_by_hand:
        raise InputError(f"--batch-size {config.batch_size}: only {n} training images; give {n} or less")
    lower = 2 ** int(math.log2(max(n / 16, min(n, 16))))
    print(f"note: the {config.preset} preset's batch of {config.batch_size} is lowered to {lower}, for {n} images")
    config.batch_size = lower
    config.__post_init__()  # the other flags must fit this one too


PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The mixed precision of `--amp`, as a context."""
    dtype = PRECISIONS[config.amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def save_whole(state: Any, path: Path) -> None:
    """Write with torch.save so that `path` is always a whole file: temporary file, flush to disk, rename."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        kept = f"the one from before is kept in {path}" if path.exists() else "none was written before"
        reason = error.strerror if isinstance(error, OSError) else "the write stopped short: is the disk full?"
        raise RunFailure(f"cannot write {path} ({reason}); {kept}") from None


def load_checkpoint(path: Path, method: str | None = None) -> dict[str, Any]:
    """Read a checkpoint, weights only. Raises `InputError` for a missing, a damaged, or another method's one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["method"]
        _ = [state[key] for key in ("config", "model", "steps", "rows", "rng")] if found == method else None
    except FileNotFoundError:
        raise InputError(f"no checkpoint {path}; train first, or give the run's folder") from None
    except Exception:  # torch.load raises many kinds for a damaged file
        raise InputError(f"{path} is not a whole checkpoint of this project; delete it and train again") from None
    if method and found != method:
        raise InputError(f"{path} is a checkpoint of {found}, not of {method}; choose another --out")
    return state


class Run:
    """One run's loop counters and files: config.json, log.csv, checkpoint.pt, backbone.pt, pictures, progress, Ctrl-C.

    `parts` (model, optimizer, ...) are the objects whose state_dict a resumed run needs. In a `with` block, Ctrl-C
    waits for the end of the step, saves, and stops; a second one stops at once.
    """

    SETTLED = 200  # steps before a collapse is told: a healthy run may be close to one for its first 100
    COLUMNS = ("epoch", "loss", "lr", "feature_std", "effective_rank", "knn_top1", "images_per_second")

    def __init__(self, config: RunConfig, data: Data, device: torch.device, **parts: Any):
        self.config, self.data, self.device, self.parts = config, data, device, parts
        self.out, self.checkpoint = Path(config.out), Path(config.out) / "checkpoint.pt"
        self.steps = len(data.train) // config.batch_size  # an epoch; the last short batch is left out
        self.total, self.dim = self.steps * config.epochs, parts["model"].dim
        self.rows: list[list[Any]] = []
        self.epoch, self.step_in_epoch, self.losses, self.seconds = 0, 0, [], 0.0
        self.stop = self.warned = False
        self.live = sys.stdout.isatty()
        if config.resume and self.checkpoint.exists():
            self.load()
        elif config.resume:
            print("no checkpoint was written yet: starting from the beginning")
        elif self.checkpoint.exists():
            os.replace(self.checkpoint, self.out / "checkpoint.previous.pt")
            print(f"note: {self.out} held a run; its checkpoint is kept as checkpoint.previous.pt")
        saved = {"method": config.METHOD} | dataclasses.asdict(config) | {"resume": False}
        self.write_text("config.json", json.dumps(saved, indent=1) + "\n")
        self.write_log()

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.epoch * self.steps + self.step_in_epoch

    def header(self, **lines: str) -> None:
        """Say what runs: data, network, device, the method's own lines, and every resolved setting of the method."""
        config, model = self.config, self.parts["model"]
        count = sum(p.numel() for p in model.backbone.parameters()) / 1e6
        heads = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6 - count
        on = torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        about = {
            "data": self.data.describe(),
            "network": f"{config.backbone}, {count:.2f} M parameters, h {model.backbone.feature_dim}-d; "
            f"heads {heads:.2f} M, output {self.dim}-d; {config.image_size}x{config.image_size} views",
            "device": f"{on}; mixed precision {config.amp}; torch.compile {'on' if config.compile else 'off'}",
        }
        own = [f for f in flags(type(config)) if f not in flags(RunConfig) or f in ("seed", "warmup_epochs")]
        about |= lines | {"settings": ", ".join(f"{f.replace('_', '-')} {getattr(config, f)}" for f in own)}
        size = f"{config.epochs} epoch{'s' * (config.epochs > 1)} of batch {config.batch_size}"
        if micro := config.micro_batch_size:
            size += f", in pieces of at most {micro}, which BN sees"
        print(f"{config.METHOD}, preset {config.preset}, {size} -> {self.out}")
        for name, text in about.items():
            hang = {"initial_indent": f"  {name:10}", "subsequent_indent": " " * 12, "break_on_hyphens": False}
            print(textwrap.fill(text, 116, **hang), flush=True)

    def __enter__(self) -> "Run":
        def request_stop(*_: Any) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True

        self.handler = signal.getsignal(signal.SIGINT)
        if self.handler is signal.default_int_handler:  # the main thread of a script
            signal.signal(signal.SIGINT, request_stop)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.handler)

    def batches(self, views: int, scale: tuple[float, float] | None) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The rest of this epoch: for each batch its image indices (B,) and `views` crops (B, 3, S, S) of them.

        A crop's area is in `scale`, a range of fractions; None takes the whole pictures.

        The order depends on the seed and the epoch alone, so a resumed run sees the same batches.
        """
        c, batches = self.config, self.order()
        self.started, self.shown = time.monotonic() - self.seconds, time.monotonic()
        crops = self.data.train.crops(batches, c.image_size, views, scale, self.view_seed(), c.workers)
        yield from zip(batches, crops, strict=True)

    def view_seed(self) -> int:
        """The seed of this epoch's order, and of the crops of streamed images."""
        return self.config.seed * 1_000_003 + self.epoch

    def order(self) -> Sequence[Tensor]:
        """The image indices (B,) of each step that is left in this epoch."""
        n, generator = self.config.batch_size, torch.Generator().manual_seed(self.view_seed())
        order = torch.randperm(len(self.data.train), generator=generator)
        return order[self.step_in_epoch * n : self.steps * n].split(n)

    def after_step(self, loss: Tensor, z: Tensor, lr: float, *views: Tensor) -> None:
        """Count a step; about once a second check the loss (the only wait for the device) and show where we are."""
        if self.step == 0:
            self.draw_views(views)
        self.losses.append(loss.detach())
        self.step_in_epoch += 1
        if self.step_in_epoch == self.steps or self.stop or time.monotonic() - self.shown > 1:
            self.check_losses()
            self.shown, self.lr, self.z = time.monotonic(), lr, z.detach()
            self.seconds = time.monotonic() - self.started
            if self.live:
                speed = self.step_in_epoch * self.config.batch_size / self.seconds
                left = (self.total - self.step) * self.config.batch_size / speed
                healthy = float(feature_std(z)) * math.sqrt(self.dim)
                line = (  # in 80 columns; std in % of 1/sqrt(d)
                    f"epoch {self.epoch + 1}/{self.config.epochs} {self.step_in_epoch}/{self.steps} "
                    f"{left / 60:.1f} min left loss {self.losses[-1]:.4f} std {healthy:.0%} "
                    f"rank {effective_rank(z[:512]):.1f} {speed:,.0f} img/s"
                )
                print("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        if self.stop and self.step_in_epoch < self.steps:
            self.interrupt()

    def interrupt(self) -> typing.NoReturn:
        self.save()
        self.curves()
        done = f"\nstopped after step {self.step} of {self.total}"
        raise KeyboardInterrupt(f"{done}; {self.checkpoint} is saved, --resume continues from there")

    def check_losses(self) -> None:
        fresh = [v for v in self.losses if isinstance(v, Tensor)]
        known = len(self.losses) - len(fresh)
        self.losses[known:] = torch.stack(fresh).float().tolist()
        for i, value in enumerate(self.losses[known:], known + 1):
            if not math.isfinite(value):
                self.step_in_epoch = i
                self.fail(f"the loss is {value}")

    def fail(self, what: str) -> typing.NoReturn:
        print(end="\n" if self.live else "", flush=True)  # after the progress line
        last = f"the last good one is kept in {self.checkpoint}" if self.checkpoint.exists() else "none was written yet"
        raise RunFailure(f"{what} at step {self.step} of {self.total}; --lr is likely too high; checkpoint: {last}")

    def after_epoch(self, knn: Callable[[], float | None], collapse_hint: str) -> None:
        """Measure, write log and checkpoint, and say so when the output has collapsed."""
        c, speed = self.config, self.steps * self.config.batch_size / self.seconds
        std, rank = float(feature_std(self.z)), effective_rank(self.z)
        due = c.knn_every and ((self.epoch + 1) % c.knn_every == 0 or self.epoch + 1 == c.epochs)
        accuracy = knn() if due else None
        loss = sum(self.losses) / len(self.losses)
        self.rows.append([self.epoch + 1, loss, self.lr, std, rank, accuracy, speed])
        self.epoch, self.step_in_epoch, self.losses, self.seconds = self.epoch + 1, 0, [], 0.0
        self.save()
        self.write_log()
        print(
            ("\r\x1b[K" if self.live else "")
            + f"epoch {self.epoch:3d}/{c.epochs}  loss {loss:.4f}"
            + ("" if accuracy is None else f"  kNN {accuracy:.3f}")
            + f"  std {std:.4f} (healthy {1 / math.sqrt(self.dim):.4f})  rank {rank:.1f}  {speed:,.0f} images/s",
            flush=True,
        )
        settled = self.step >= self.SETTLED and len(self.z) >= 8  # two images, after a BN, are always opposite
        if settled and not self.warned and (alike := likeness(self.z)) > 0.93:  # runs that learn stay below 0.92
            self.warned = True
            normal = f"mean squared cosine of two images {alike:.3f}, 1/d = {1 / self.dim:.3f} when spread out"
            print(f"warning: the output has collapsed to a point or a line ({normal}): {collapse_hint}", flush=True)
        if self.stop:
            self.interrupt()

    def finish(self, untrained: nn.Module) -> dict[str, Any]:
        """Draw the curves, print what the representation is worth, return the last epoch's figures.

        `untrained` is the model as it was before training: with the raw pixels, the control.
        """
        self.curves()
        metrics = dict(zip(self.COLUMNS, self.rows[-1], strict=True))
        model = self.parts["model"]
        if self.config.knn_every and self.data.labelled():
            control = {"raw pixels": pixels, "h, untrained backbone": untrained.backbone}
            networks = control | {"h, trained backbone": model.backbone, "g(h), trained": model}
            print(f"\nkNN top-1 on {len(self.data.test):,} held-out images (k = 200, cosine)")
            for name, network in networks.items():
                known = metrics["knn_top1"] if network is model.backbone else None
                metrics[f"knn {name}"] = knn_of(network, self.data, self.config) if known is None else known
                print(f"  {name:24}{metrics[f'knn {name}']:.3f}", flush=True)
        labelled = "" if self.data.labelled() else " --data LABELLED_IMAGES"
        print(f"\n{self.out}: backbone.pt, log.csv and pictures; next: python linear_eval.py {self.out}{labelled}")
        return metrics

    def save(self) -> None:
        """Write checkpoint.pt and backbone.pt; refuses a model with a value that is not finite."""
        for name, value in (state := self.parts["model"].state_dict()).items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                self.fail(f"{name} is not finite")
        whole = {name: part.state_dict() for name, part in self.parts.items()} | {
            "method": self.config.METHOD,
            "kinds": {name: type(part).__name__ for name, part in self.parts.items()},
            "config": dataclasses.asdict(self.config),
            "rng": torch.get_rng_state(),  # everything random is drawn on the CPU
            "steps": self.steps,
            "losses": [float(v) for v in self.losses],
        }
        whole |= {name: getattr(self, name) for name in ("rows", "epoch", "step_in_epoch", "seconds")}
        save_whole(whole, self.checkpoint)
        backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        save_whole(backbone, self.out / "backbone.pt")

    def load(self) -> None:
        state = load_checkpoint(self.checkpoint, self.config.METHOD)
        was, now = (state["steps"], state["config"]["batch_size"]), (self.steps, self.config.batch_size)
        if was != now:
            raise InputError(
                f"--resume: {self.checkpoint} took {was[0]} steps of {was[1]} images an epoch, now it would be "
                f"{now[0]} of {now[1]}; give that run's --data and --batch-size"
            )
        for name, part in self.parts.items():
            try:
                if state["kinds"][name] != type(part).__name__:
                    raise KeyError(name)
                flags_now = [{**group, "params": None} for group in getattr(part, "param_groups", [])]
                part.load_state_dict(state[name])
                for group, now in zip(getattr(part, "param_groups", []), flags_now, strict=True):
                    group.update({key: value for key, value in now.items() if key != "params"})
            except (RuntimeError, ValueError, KeyError):
                raise InputError(
                    f"--resume: the {name} in {self.checkpoint} is another; give that run's flags"
                ) from None
        torch.set_rng_state(state["rng"])
        for name in ("rows", "epoch", "step_in_epoch", "losses", "seconds"):
            setattr(self, name, state[name])

    def write_text(self, name: str, text: str) -> None:
        part = self.out / (name + ".part")
        try:
            part.write_text(text)
            os.replace(part, self.out / name)
        except OSError as error:
            raise RunFailure(
                f"cannot write {self.out / name} ({error.strerror}); the last checkpoint is kept"
            ) from None

    def write_log(self) -> None:
        lines = [",".join(self.COLUMNS)]
        lines += [",".join("" if v is None else f"{v:.6g}" for v in row) for row in self.rows]
        self.write_text("log.csv", "\n".join(lines) + "\n")

    def draw_views(self, views: Sequence[Tensor], count: int = 8) -> None:
        """views.png: a column is an image, its views one above the other."""
        both = torch.cat([v[:count] for v in views]).float().cpu().clamp(0, 1)
        both = F.interpolate(both, scale_factor=max(1, 96 // both.shape[-1]), mode="nearest")
        torchvision.utils.save_image(both, self.out / "views.png", nrow=len(views[0][:count]), pad_value=1)

    def curves(self) -> None:
        """curves.png: loss, kNN, feature std against 1/sqrt(d), and effective rank, by epoch; needs matplotlib."""
        if not self.rows:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("no curves.png: matplotlib is not installed (pip install matplotlib)")
            return
        lines = {"loss": 1, "kNN top-1": 5, "feature std": 3, "effective rank": 4}
        points = {title: [(row[0], row[i]) for row in self.rows if row[i] is not None] for title, i in lines.items()}
        panels = [title for title in lines if points[title]]  # no kNN without labels
        figure = Figure(figsize=(3.5 * len(panels), 3.2), layout="constrained")
        for axes, title in zip(figure.subplots(1, len(panels)), panels, strict=True):
            column, (x, y) = lines[title], zip(*points[title], strict=True)
            axes.plot(x, y, marker=".")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(title=title, xlabel="epoch")
            axes.grid(alpha=0.3)
            if column == 3:
                axes.axhline(1 / math.sqrt(self.dim), color="grey", linestyle="--", label="1/sqrt(d)")
                axes.set_ylim(0, 1.3 * max(1 / math.sqrt(self.dim), *y))
                axes.legend()
            if column == 4:
                axes.set_ylim(bottom=0)
        figure.savefig(self.out / "curves.png", dpi=110)
