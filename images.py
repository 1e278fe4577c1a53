"""Any set of pictures in, batches of augmented views out. Needs torch, torchvision, Pillow and numpy.

Sections: data sets | decoding | the embedded set | crops | operations on batches.

`load` reads `shapes`, torchvision's sets or a folder; `Images.views` yields batches of crops, each image with a random
draw of its own; a method's `augment` goes on with the operations below and ends with `normalize`.
"""

import math
import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as TF

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # (3, 1, 1), torchvision's
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")  # whatever the suffix says, no other is opened
SMALLEST_SIDE, MOST_PIXELS = 8, 89_000_000  # less has nothing to crop; more takes gigabytes: Pillow, too, warns of it
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CORES = max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # of this process; torchrun says of how many
SPLIT = re.compile(r"(train|test|val)(ing|id|idation)?([-_ ]?(set|data|images))?\d*", re.I)  # test_set, val2017, ...
Crops = Sequence[tuple[int, tuple[float, float] | None]]  # of an image: the size of each and its range of areas


class InputError(ValueError):
    """Something the user gave is wrong: one line that says what, and what to do."""


def ensure(ok: Any, message: str) -> None:
    """Raise `InputError` unless `ok`."""
    if not ok:
        raise InputError(message)


def share() -> tuple[int, int]:
    """Which of how many processes this is: (rank, W); (0, 1) without `torch.distributed`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


# ------------------------------------------------------------------------------------------------------ data sets


class Images:
    """One split of a data set: N images with a label each (-1 where there is none).

    Resident: `images` is a uint8 tensor (M, 3, H, W) on the device, which splits may share, and `rows` (N,) are theirs.
    Streamed: `images` is None and worker processes decode `paths`. `sizes` (N, 2) holds each original height and width:
    crops are drawn in the coordinates of the original picture, also where the resident copy was resized; a streamed
    one is measured anew by its worker.
    """

    def __init__(
        self, images: Tensor | None, paths: Sequence, sizes: Tensor, labels: Tensor, device: Any, rows: Any = None
    ):
        self.images, self.paths, self.sizes, self.labels, self.device = images, paths, sizes, labels, device
        self.rows = torch.arange(len(labels)) if rows is None else rows
        self.bad: set[int] = set()  # the images whose files were found damaged while streaming, each told once

    def __len__(self) -> int:
        return len(self.labels)

    def views(self, batches: Sequence[Tensor], crops: Crops, seed: int = 0, workers: int = 4) -> Iterator[list[Tensor]]:
        """For each batch of indices (B,) yield the `crops` of its images, (B, 3, size, size) each, float in [0, 1].

        A crop is (its size, the range of a random resized crop's fraction of the area, or None: evaluation's central
        view). A resident set draws from torch's CPU generator, a streamed one from (`seed`, image): workers change
        nothing.
        """
        if self.images is None:
            yield from self.stream(batches, crops, seed, workers)
            return
        for index in batches:
            picked, sizes = self.images[self.rows[index].to(self.device, non_blocking=True)], self.sizes[index]
            shrink = (torch.tensor(picked.shape[2:]) / sizes).repeat(1, 2)  # original pixels -> pixels of the copy
            boxes = [crop_boxes(sizes, size, scale) * shrink for size, scale in crops]
            yield [crop_resize(picked, box, size) for box, (size, _) in zip(boxes, crops, strict=True)]

    def stream(self, batches: Sequence[Tensor], crops: Crops, seed: int, workers: int) -> Iterator[list[Tensor]]:
        """`views` from worker processes, which decode and crop pieces of at most 256 images."""
        pieces = [[piece.tolist() for piece in batch.split(256)] for batch in batches]
        loader = torch.utils.data.DataLoader(
            Streamed(self.paths, self.labels, crops, seed),
            batch_sampler=[piece for batch in pieces for piece in batch],
            num_workers=min(workers, CORES),
            pin_memory=self.device.type == "cuda",
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else it draws from torch's own, and a resumed run draws once more
        )
        try:
            arriving = iter(loader)
            for batch in pieces:
                views, bad = zip(*(next(arriving) for _ in batch), strict=True)
                for line in {line for piece in bad for lines in piece for line in lines.splitlines()}:
                    row, why = int(line.split(" ")[0]), line.split(" ", 1)[1]
                    if row not in self.bad:
                        words = f"skipped {self.paths[row]}: {why}; another image stands in"
                        print(f"\nwarning: {words}", file=sys.stderr)
                    self.bad.add(row)
                there = [[part.to(self.device, non_blocking=True) for part in piece] for piece in views]
                yield [torch.cat(view).float().div_(255) for view in zip(*there, strict=True)]
        except InputError as error:  # a worker's, with its traceback in the text
            raise InputError(str(error).strip().split("InputError: ")[-1]) from None


def start_worker(worker: int) -> None:
    """A terminal sends Ctrl-C to the workers too, but the main process needs their batch to stop after a whole step."""
    warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # a second one ends it


class Streamed(torch.utils.data.Dataset):
    """Image index -> its crops, uint8 (3, size, size) of the full-resolution picture, from a worker process, and the
    damaged ones met, a line each. For one of these another image stands in, of its label if there is one."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, crops: Crops, seed: int):
        self.paths, self.labels, self.crops, self.seed = paths, labels, crops, seed

    def __getitem__(self, index: int) -> tuple[list[Tensor], str]:
        generator, bad = torch.Generator().manual_seed((self.seed * len(self.paths) + index) % 2**63), {}
        for _ in range(100):
            try:
                image = torch.from_numpy(decode(self.paths[index])[0]).permute(2, 0, 1)
                break
            except Exception as error:
                bad[index] = f"{index} {reason(error)}"
                alike = self.labels == self.labels[index]
                alike[list(bad)] = False
                if not alike.any():  # the last of its class
                    alike[:] = True
                    alike[list(bad)] = False
                alike = alike.nonzero().squeeze(1).tolist() or [index]
                index = alike[int(torch.randint(len(alike), (), generator=generator))]
        else:
            raise InputError("a hundred images in a row cannot be decoded; is the folder still there?")
        sizes, views = torch.tensor([image.shape[1:]]), []
        for size, scale in self.crops:
            box = [round(v) for v in crop_boxes(sizes, size, scale, generator)[0].tolist()]
            views.append(TF.resized_crop(image, *box, [size, size], antialias=True))
        return views, "\n".join(bad.values())


def thumbnails(split: Images, index: Tensor, size: int, side: int) -> list[Image.Image]:
    """The central views, of `size` pixels, of the images `index` (B,), as pictures of `side` pixels."""
    (x,) = next(split.views([index], [(size, None)]))
    pixels = x.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    how = Image.Resampling.NEAREST if size < side else Image.Resampling.BOX
    return [Image.fromarray(picture).resize((side, side), how) for picture in pixels]


@dataclass
class Data:
    """A data set ready for use: `train`, and `test` where there are held-out images (labelled or not)."""

    name: str
    train: Images
    test: Images | None = None
    classes: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (file, reason)

    @property
    def labelled(self) -> bool:
        """Whether there are held-out images with labels to evaluate on."""
        return bool(self.classes) and self.test is not None

    @property
    def guess(self) -> float:
        """What always guessing the most frequent class of the held-out images gets right."""
        return self.test.labels.unique(return_counts=True)[1].max().item() / len(self.test)

    def describe(self) -> str:
        """Its size, classes by name, what was left out and why, and where the pictures are."""
        held = f", {len(self.test):,} held out" if self.test else ", none held out"
        bare = int((self.train.labels < 0).sum()) if self.classes else 0
        names = ", ".join(self.classes[:10]).encode(errors="replace").decode() + ", ..." * (len(self.classes) > 10)
        kinds = f"{len(self.classes)} classes: {names}" if self.classes else "no labels"
        kinds += f", {bare:,} images without a label" if bare else ""
        bad = f"; left out: {', '.join(f'{n:,} {why}' for n, why in reasons(self.skipped))}" if self.skipped else ""
        where, images = "streamed by workers", self.train.images
        if images is not None:
            parts = {part.images.data_ptr(): part.images.nbytes for part in (self.train, self.test) if part}
            total = sum(parts.values()) / 1e6
            where = f"{images.shape[3]}x{images.shape[2]}, resident on {images.device.type}, {total:,.0f} MB"
        return f"{self.name}: {len(self.train):,} images{held}{bad}; {kinds}; {where}"


def load(name: str, image_size: int, device: torch.device, data_dir: str = "data", **folder: Any) -> Data:
    """`shapes`, a set of torchvision's, or a folder (`folder`: see `load_folder`), for views of `image_size` pixels.
    Raises `InputError` when there is nothing usable. Of several processes all must call it: they share the work."""
    if name == "shapes":
        (a, la), (b, lb) = make_shapes(10_000, 0, image_size), make_shapes(2_000, 1, image_size)
        return Data(name, resident(a, la, device), resident(b, lb, device), list(SHAPES))
    if name in ("cifar10", "cifar100", "stl10"):
        return load_torchvision(name, data_dir, device)
    return load_folder(Path(name), image_size, device, **folder)


def resident(images: Tensor, labels: Tensor, device: torch.device, rows: Any = None) -> Images:
    """A split of uint8 images (M, 3, H, W) that have their original size: all, or the `rows` (N,); labels (N,)."""
    return Images(images.to(device), (), torch.tensor(images.shape[2:]).expand(len(labels), 2), labels, device, rows)


def from_tensors(images: Any, labels: Any, device: torch.device) -> Data:
    """A data set of one's own: uint8 (N, 3, H, W); labels (N,), -1 for none, or None. Every tenth of a class is held
    out. Raises `InputError` for another shape or type."""
    images = torch.as_tensor(images)
    fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3 and len(images)
    ensure(fits, f"data must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if labels is None:
        return Data("a tensor", resident(images, torch.full((len(images),), -1), device))
    labels = torch.as_tensor(labels).long()
    words = f"labels must be ({len(images)},), one for each image, got {tuple(labels.shape)}"
    ensure(labels.shape == images.shape[:1], words)
    test, classes = every_tenth(labels), [str(i) for i in range(int(labels.max()) + 1)]
    images, rows = images.to(device), [mask.nonzero().squeeze(1) for mask in (~test, test)]
    parts = [resident(images, labels[row], device, row) for row in rows]
    return Data("a tensor", parts[0], parts[1] if len(parts[1]) else None, classes)


def every_tenth(labels: Tensor) -> Tensor:
    """(N,) True for the images that are held out where there is no test set: every tenth of each class, and at least
    one of two or more."""
    test = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels[labels >= 0].unique():
        mine = (labels == label).nonzero().squeeze(1)
        test[mine[max(1, min(9, len(mine) - 1)) :: 10]] = True
    return test


def load_torchvision(name: str, data_dir: str, device: torch.device) -> Data:
    """CIFAR-10, CIFAR-100 or STL-10, downloaded; STL-10 trains on its unlabelled images too (label -1)."""
    stl = name == "stl10"
    make = getattr(torchvision.datasets, name.upper())
    splits = [{"split": "train+unlabeled"}, {"split": "test"}] if stl else [{"train": True}, {"train": False}]
    (rank, world), sets = share(), []
    first = rank == 0, os.environ.get("LOCAL_RANK") == "0"  # a folder is filled by one process, else by one a machine
    try:
        for turn in (*first, True):
            if turn and not sets:
                sets = [make(data_dir, download=True, **split) for split in splits]
            if world > 1:
                dist.barrier()
    except Exception as error:  # torchvision raises URLError, RuntimeError, OSError, EOFError, ... here
        raise InputError(
            f"--data {name}: no files in {data_dir} and the download failed ({reason(error)}); "
            f"check the network, put the files there, or give a folder of images"
        ) from None
    parts = []
    for data in sets:
        images = torch.from_numpy(np.ascontiguousarray(data.data))
        images = images if stl else images.permute(0, 3, 1, 2).contiguous()
        parts.append(resident(images, torch.as_tensor(data.labels if stl else data.targets).long(), device))
    return Data(name, *parts, list(sets[0].classes))


def load_folder(root: Path, image_size: int, device: Any, resident_gb: float = 4, workers: int = 4, out="") -> Data:
    """A folder of images: `train/` with `test/` or `val/`, class sub-folders, or flat (see `inventory`, `arrange`).

    Above `resident_gb` pictures are streamed by `workers`. A run's folder `out` is no part of the set. Where no image
    of a class that is trained on is held out, every tenth of each class is.
    """
    choices = "give a folder of images or one of shapes, cifar10, cifar100, stl10"
    ensure(root.is_dir(), f"--data {root}: no such folder; {choices}")
    apart = not out or os.path.realpath(out) != os.path.realpath(root)
    ensure(apart, f"--out {out}: this is the folder of images; choose another")
    files, skipped = inventory(root, out)
    damaged, side, pixels = [], round(image_size * 8 / 7), None  # 256 for views of 224
    sizes = in_threads(picture_size, files, workers, damaged, "checked")
    size_of = {path: size for path, size in zip(files, sizes, strict=True) if size}
    train, test = arrange(root, list(size_of), skipped)
    paths = [*train, *test]
    if paths and len(paths) * 3 * side * side <= resident_gb * 1e9:
        first = size_of[paths[0]]
        same = max(first) <= side and len({size_of[path] for path in paths}) == 1
        fit = first if same else (side, side)  # photos of many shapes: the whole picture, squeezed into a square
        pixels = torch.empty((len(paths), 3, *fit), dtype=torch.uint8)

        def read(row: int) -> tuple[int, int]:
            array, size = decode(paths[row], fit)
            pixels[row] = torch.from_numpy(array).permute(2, 0, 1)
            return size

        sizes = in_threads(read, range(len(paths)), workers, damaged, "decoded", paths)
        for rank, block in enumerate(blocks(len(paths)) if share()[1] > 1 else ()):
            dist.broadcast(pixels[block], rank)
        size_of = {path: size for path, size in zip(paths, sizes, strict=True) if size}
        train, test = ({path: name for path, name in part.items() if path in size_of} for part in (train, test))
        pixels = pixels.to(device)
    for path, why in damaged[:20] if share()[0] == 0 else ():
        print(f"warning: skipped {path}: {why}", file=sys.stderr)
    if len(damaged) > 20 and share()[0] == 0:
        print(f"warning: skipped {len(damaged) - 20:,} more like these", file=sys.stderr)

    why = ", ".join(f"{n:,} {why}" for n, why in reasons(skipped + damaged)) or "it is empty"
    ensure(train, f"--data {root}: no image to train on: {why}; looked for {', '.join(sorted(SUFFIXES))}")
    rows = {path: row for row, path in enumerate(paths)}
    index = {name: label for label, name in enumerate(sorted({*train.values()} - {""}))}
    if index and not test:
        held = every_tenth(torch.tensor([index.get(name, -1) for name in train.values()])).tolist()
        test = {path: train[path] for path, mine in zip(train, held, strict=True) if mine}
        train = {path: name for path, name in train.items() if path not in test}

    def split(part: dict[Path, str]) -> Images:
        row, sizes = torch.tensor([rows[path] for path in part]), torch.tensor([size_of[path] for path in part])
        labels = torch.tensor([index.get(name, -1) for name in part.values()])
        return Images(pixels, list(part), sizes, labels, device, row)

    return Data(str(root), split(train), split(test) if test else None, list(index), skipped + damaged)


def reasons(skipped: list[tuple[str, str]]) -> list[tuple[int, str]]:
    """How many files were left out for which kind of reason, the most first."""
    return [(n, why) for why, n in Counter(why.split(":")[0] for _, why in skipped).most_common()]


def inventory(root: Path, out: str = "") -> tuple[list[Path], list[tuple[str, str]]]:
    """The files below `root` that are named like pictures, in a fixed order, and what was left out, with its reason.

    Each real folder and file is visited once, links after all that are none. A run's folder, as `out` is, is no part.
    """
    files, skipped, seen, folders, links = [], [], set(), [str(root)], []
    while folders or links:
        path = folders.pop() if folders else links.pop(0)
        real, entries = os.path.realpath(path), []
        if real in seen:
            skipped.append((path, "there already, by another name"))
        elif os.path.isdir(path):
            logs = (os.path.join(path, name) for name in ("config.json", "log.csv"))
            if path != str(root) and (out and real == os.path.realpath(out) or all(map(os.path.exists, logs))):
                skipped.append((path, "a run's folder"))
                continue
            try:
                entries = list(os.scandir(path))
            except OSError as error:
                skipped.append((path, f"unreadable: {error.strerror}"))
        elif not (why := left_out(path)):
            files.append(Path(path))
        else:
            skipped.append((path, why))
        seen.add(real)
        for entry in entries:
            if entry.name.startswith((".", "@", "__MACOSX")):
                skipped.append((entry.path, "hidden"))
            elif entry.is_symlink():
                links.append(entry.path)
            elif entry.is_dir():
                folders.append(entry.path)
            elif why := left_out(entry.path):
                skipped.append((entry.path, why))
            else:
                files.append(Path(entry.path))
                seen.add(os.path.join(real, entry.name))
        links.sort(key=lambda link: (link.count(os.sep), link))  # the shortest way there first
    return sorted(files), sorted(skipped)


def left_out(path: str) -> str:
    """Why a file is no picture by its name and kind; "" if it may be one."""
    suffix = os.path.splitext(path)[1].lower()
    return (
        "no regular file" if not os.path.isfile(path) else "" if suffix in SUFFIXES else f"of type {suffix or 'none'}"
    )


def arrange(root: Path, files: list[Path], skipped: list[tuple[str, str]]) -> tuple[dict[Path, str], dict[Path, str]]:
    """The training and the held-out pictures, each with the name of its class or "".

    A split is a folder named as SPLIT has it, be it in a folder that holds all. Held out is the first of test and val
    with a class that is trained on, or else the first. A folder `train` without class folders in it, beside pictures
    but no other split, is one class among others. What is left over goes to `skipped`.
    """
    parts = {path: path.relative_to(root).parts for path in files}
    while len(tops := {part[0] for part in parts.values()}) == 1 and not SPLIT.fullmatch(min(tops)):
        parts = {path: part[1:] or ("",) for path, part in parts.items()}
        if ("",) in parts.values():
            break
    splits = {"train": {}, "test": {}, "val": {}, "": {}}
    for path, part in parts.items():
        match = SPLIT.fullmatch(part[0]) if len(part) > 1 else None
        splits[match[1].lower() if match else ""][path] = part[1] if match and len(part) > 2 else ""
    train, trained = splits["train"], {*splits["train"].values()} - {""}
    there = train or any(SPLIT.fullmatch(p.name) and p.name.lower().startswith("train") for p in root.iterdir())
    if there and (splits["test"] or splits["val"] or trained or not splits[""]):
        known = [name for name in ("test", "val") if trained & {*splits[name].values()}]
        held = (known or [name for name in ("test", "val") if splits[name]] or ["test"])[0]
        test = splits.pop(held)
        rest = [path for name, split in splits.items() if name != "train" for path in split]
        skipped += [(str(path), "in neither train nor test") for path in rest]
    else:  # all is for training; names of splits alone are no classes
        train = {path: part[0] if len(part) > 1 and splits[""] else "" for path, part in parts.items()}
        trained, test = {*train.values()} - {""}, {}
    if len(trained) < 2:  # one folder says nothing
        return dict.fromkeys(train, ""), dict.fromkeys(test, "")
    skipped += [(str(path), "in no class of train") for path, name in test.items() if name not in trained]
    return train, {path: name for path, name in test.items() if name in trained}


# ------------------------------------------------------------------------------------------------------- decoding


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) from a file's header. Raises what Pillow does, and ValueError for a picture of a bad size."""
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
    if min(width, height) < SMALLEST_SIDE:
        raise ValueError(f"too small: {width}x{height} pixels, a side under {SMALLEST_SIDE}")
    if width * height > MOST_PIXELS:
        raise ValueError(f"too large: {width}x{height} pixels, more than {MOST_PIXELS:,} in all; scale it down")
    return height, width


def decode(path: Path, fit: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    """Read any picture as a viewer shows it: uint8 RGB (H, W, 3), upright, with its original (height, width).

    Grey, palette, CMYK, 16-bit and float pictures are converted, transparent ones laid on white; of several frames the
    first is read. `fit` = (height, width) resizes, which lets JPEG decode at a reduced scale. Raises what Pillow raises
    for a damaged file.
    """
    with Image.open(path, formats=FORMATS) as image:
        full = image.size
        if fit:
            image.draft("RGB", (2 * fit[1], 2 * fit[0]))
        reduced = image.size != full
        image.load()  # turns a TIFF, and takes its tag
        try:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:  # of many kinds: odd metadata leave the picture whole
            turned = False
        width, height = (full[::-1] if turned else full) if reduced else image.size
        if image.mode[0] in "IF":
            image = eight_bits(image)
        if image.has_transparency_data:
            image, clear = Image.new("RGB", image.size, "white"), image.convert("RGBA")
            image.paste(clear, mask=clear)
        image = image.convert("RGB")
        if fit and image.size != (fit[1], fit[0]):
            image = image.resize((fit[1], fit[0]), Image.Resampling.BILINEAR)  # with antialiasing
        return np.array(image), (height, width)


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of integers or floats in 0..255.

    Of 16 bits, or as many as a TIFF says, are mode I;16 and PNG's and PGM's I. Else the range is that of 0..1, 0..255
    and 0..65535 which the values fill by a sixteenth and pass by a twentieth at most, or that from 0 to the largest.
    """
    values = np.array(image, np.float32)
    low, high = min(0.0, float(values.min())), float(values.max())
    if not math.isfinite(high - low):
        raise ValueError("its values are not all finite")
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        low, high = 0.0, 2.0 ** tags.get(258, (16,))[0] - 1
    elif tops := [top for top in (1, 255, 65535) if top / 16 < high < 1.05 * top and -low < 0.05 * top]:
        low, high = 0.0, tops[0]
    values -= low
    values *= 255 / max(high - low, 1e-30)
    values = np.clip(values, 0, 255, out=values) + 0.5
    return Image.fromarray((256 - values if tags.get(262) == 0 else values).astype(np.uint8))  # 0: white is zero


def reason(error: Exception) -> str:
    """An exception in one line; what stands before a colon is its kind."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if getattr(error, "strerror", None):
        return f"unreadable: {error.strerror}"
    text = str(error).split("\n")[0] or repr(error)
    kind = "too large: " if isinstance(error, Image.DecompressionBombError) else "damaged: "
    return text if text.startswith("too ") else kind + text


def blocks(n: int) -> list[slice]:
    """n rows in one block for each process."""
    world = share()[1]
    return [slice(n * rank // world, n * (rank + 1) // world) for rank in range(world)]


def in_threads(work: Callable, items: Sequence, workers: int, skipped: list, verb: str, paths: Any = None) -> list:
    """`work` of every item, in threads (Pillow releases the interpreter lock); None where it raised, which is noted in
    `skipped` by its path: the item's own, or that in `paths`. Of several processes each does its block of the items,
    and all know all results."""
    (rank, world), bad, count = share(), [], len(items)
    items = items[blocks(len(items))[rank]]

    def one(item: Any) -> Any:
        try:
            return work(item)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many kinds for a damaged file
            bad.append((str(paths[item] if paths else item), reason(error)))

    out = []
    with warnings.catch_warnings(), ThreadPoolExecutor(min(workers, CORES)) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        for result in pool.map(one, items):
            out.append(result)
            if len(out) % 500 == 0 and sys.stdout.isatty():
                print(f"\r{verb} {len(out):,} of {len(items):,} images\x1b[K\r", end="", flush=True)
    parts = [(out, bad, count)] * world
    if world > 1:
        dist.all_gather_object(parts, parts[0])
    alike = all(theirs == count for *_, theirs in parts)
    ensure(alike, "the processes see other files; give a folder that does not change")
    skipped += [line for _, lines, _ in parts for line in lines]
    return [result for results, *_ in parts for result in results]


# ----------------------------------------------------------------------------------------------- the embedded set


def polygon(corners: int, *radii: float) -> list[tuple[float, float]]:
    """Corners (x, y) at equal angles around the origin, at these radii in turn."""
    at = [(radii[i % len(radii)], 2 * math.pi * i / corners) for i in range(corners)]
    return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in at]


SHAPES = {  # outlines of about the same area
    "disc": polygon(40, 0.8),
    "ring": polygon(40, 1.0),  # with a hole
    "half-disc": [(x, y - 0.45) for x, y in polygon(40, 1.13) if y > -0.01],
    "triangle": polygon(3, 1.24),
    "square": polygon(4, 1.0),
    "bar": [(1.3, 0.38), (-1.3, 0.38), (-1.3, -0.38), (1.3, -0.38)],
    "star": polygon(10, 1.35, 0.57),
    "plus": [(0.32, 0.32), (0.32, 1.1), (-0.32, 1.1), (-0.32, 0.32), (-1.1, 0.32), (-1.1, -0.32)]
    + [(-0.32, -0.32), (-0.32, -1.1), (0.32, -1.1), (0.32, -0.32), (1.1, -0.32), (1.1, 0.32)],
    "L": [(-0.5, -0.7), (0.1, -0.7), (0.1, 0.6), (1.0, 0.6), (1.0, 1.2), (-0.5, 1.2)],
    "arrow": [(1.2, 0.0), (0.0, 1.0), (0.0, 0.36), (-1.1, 0.36), (-1.1, -0.36), (0.0, -0.36), (0.0, -1.0)],
}


def make_shapes(n: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Draw `n` images of ten kinds of shapes: uint8 (n, 3, size, size) and labels (n,), the same for the same seed.

    The class is the shape. Its place, size, rotation, the light on it and on the ground, and noise are nuisance, in the
    measure that crops and colour jitter hide: what they leave is what a method will learn.
    """
    rng = np.random.default_rng(seed)
    labels, side = np.arange(n) % len(SHAPES), max(128, size)
    radius, tilt, centre = rng.uniform(0.2, 0.28, n), rng.uniform(0, 2 * math.pi, n), rng.uniform(0.4, 0.6, (n, 2))
    cover = np.empty((n, 1, size, size), np.float32)  # how much of a pixel the shape covers
    for i, name in enumerate(np.array(list(SHAPES))[labels]):
        turn = radius[i] * np.array([[math.cos(tilt[i]), math.sin(tilt[i])], [-math.sin(tilt[i]), math.cos(tilt[i])]])
        canvas = Image.new("L", (side, side))
        for scale, ink in ((1.0, 255), (0.6, 0)) if name == "ring" else ((1.0, 255),):
            corners = (centre[i] + scale * np.array(SHAPES[name]) @ turn) * side
            ImageDraw.Draw(canvas).polygon(corners.flatten().tolist(), fill=ink)
        cover[i, 0] = np.asarray(canvas.resize((size, size), Image.Resampling.BOX)) / 255
    light = rng.uniform(0.9, 1.1, (2, n, 1, 1, 1)).astype(np.float32)
    colours = np.array([[0.2, 0.3, 0.45], [0.85, 0.65, 0.3]], np.float32)  # of ground and shape, before the light
    ground, figure = light * colours[:, None, :, None, None]
    noise = 0.12 * rng.standard_normal((n, 3, size, size), np.float32)
    pixels = ((ground + (figure - ground) * cover + noise).clip(0, 1) * 255).round().astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


# ---------------------------------------------------------------------------------------------------------- crops


def crop_boxes(sizes: Tensor, size: int, scale: Any, generator: torch.Generator | None = None) -> Tensor:
    """Boxes (N, 4) = top, left, height, width in pixels of pictures of `sizes` (N, 2), height and width.

    `scale` None: the central square that evaluation uses, of 7/8 of the short side for views above 64 pixels. Else
    random resized crops with `scale` the range of the area's fraction and a ratio of 3/4 to 4/3, drawn as torchvision
    does: of ten tries for each image the first that fits; else the central crop of the nearest allowed ratio.
    """
    sizes = sizes.float()
    if scale is None:
        short = sizes.amin(1, keepdim=True)
        side = torch.where(short > size, short * 7 / 8, short) if size > 64 else short
        return torch.cat([(sizes - side) / 2, side, side], 1)
    height, width = sizes[:, :1], sizes[:, 1:]
    u = torch.rand(3, len(sizes), 10, generator=generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    ratio = (4 / 3) ** (2 * u[1] - 1)  # uniform in the logarithm
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, none = fits.int().argmax(1, keepdim=True), ~fits.any(1, keepdim=True)
    w = torch.where(none, torch.minimum(width, (height * 4 / 3).round()), w.gather(1, first))
    h = torch.where(none, torch.minimum(height, (width * 4 / 3).round()), h.gather(1, first))
    room = torch.cat([height - h, width - w], 1)
    corner = (u[2, :, :2] * (room + 1)).floor().minimum(room)
    return torch.cat([torch.where(none, (room / 2).floor(), corner), h, w], 1)


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


# ------------------------------------------------------------------------------------------ operations on batches
#
# Each takes float images (N, 3, H, W) in [0, 1] and draws, or is given, parameters of its own for every image, on the
# CPU (so no step waits for the device). It equals torchvision's functional op with the same parameters.


def where(x: Tensor, mask: Tensor, op: Callable[..., Tensor], *per_image: Tensor) -> Tensor:
    """Apply `op`, with its parameters (N,), to the images whose CPU `mask` (N,) is True; changes `x` in place."""
    index = mask.nonzero().squeeze(1)
    if len(index) == 0:
        return x
    there = index.to(x.device, non_blocking=True)
    picked = [p[index].to(x.device, non_blocking=True).view(-1, 1, 1, 1) for p in per_image]
    return x.index_copy_(0, there, op(x.index_select(0, there), *picked))


def sometimes(x: Tensor, p: float, op: Callable[..., Tensor], *settings: float) -> Tensor:
    """Apply `op` with these settings to each image with probability `p`; changes `x` in place."""
    return where(x, torch.rand(len(x)) < p, lambda y: op(y, *settings)) if p > 0 else x


def flip(x: Tensor) -> Tensor:
    """Mirror left and right."""
    return x.flip(-1)


def luma(x: Tensor) -> Tensor:
    """Grey level of (N, 3, H, W) as (N, 1, H, W), torchvision's weights."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def grey(x: Tensor) -> Tensor:
    """Drop the colours: three equal channels."""
    return luma(x).expand_as(x)


def brightness(x: Tensor, f: Tensor) -> Tensor:
    """clamp(f x), f (N, 1, 1, 1)."""
    return (x * f).clamp_(0, 1)


def contrast(x: Tensor, f: Tensor) -> Tensor:
    """clamp(f x + (1 - f) times the mean grey level of the picture)."""
    return torch.lerp(luma(x).mean((2, 3), keepdim=True), x, f).clamp_(0, 1)


def saturation(x: Tensor, f: Tensor) -> Tensor:
    """clamp(f x + (1 - f) times the grey picture)."""
    return torch.lerp(luma(x), x, f).clamp_(0, 1)


def hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue by `turns` (N, 1, 1, 1) in [-0.5, 0.5]: to HSV and back.

    With V the largest channel, C the chroma and H the hue in turns, each channel of the result is
    V - C clamp(2 - |6 frac(H + offset) - 2|, 0, 1).
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    sixth = torch.where(value == g, (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4))
    sixth = torch.where(value == r, g - b, sixth).div_(chroma.clamp(min=1e-12))
    angle = sixth.div_(6).add_(1 + turns[:, 0])  # > 0, so frac is the remainder
    out = torch.empty_like(x)
    for channel, offset in enumerate((5 / 6, 3 / 6, 1 / 6)):
        k = (angle + offset).frac_().mul_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(value, chroma, k, value=-1, out=out[:, channel])
    return out


def color_jitter(x: Tensor, b: float, c: float, s: float, h: float) -> Tensor:
    """Brightness, contrast, saturation by factors in 1 -+ (b, c, s), hue by up to h turns, in an order of its own for
    every image, as torchvision's ColorJitter draws them; h <= 0.5. Changes `x` in place."""
    n = len(x)
    factors = [torch.empty(n).uniform_(max(0.0, 1 - width), 1 + width) for width in (b, c, s)]
    factors.append(torch.empty(n).uniform_(-h, h))
    order = torch.rand(n, 4).argsort(1)
    for slot in range(4):
        for kind, op in enumerate((brightness, contrast, saturation, hue)):
            x = where(x, order[:, slot] == kind, op, factors[kind])
    return x


def gaussian_blur(x: Tensor, low: float = 0.1, high: float = 2.0) -> Tensor:
    """Blur with sigma uniform in low to high pixels, by a kernel of a tenth of the side, odd (SimCLR, appendix A)."""
    return blur(x, torch.empty(len(x)).uniform_(low, high), max(3, x.shape[-1] // 10 // 2 * 2 + 1))


def blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur with a Gaussian of `sigma` (N,) pixels over an odd `kernel_size`, borders reflected."""
    half = kernel_size // 2
    kernel = torch.exp(-0.5 * (torch.arange(-half, half + 1) / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x.device, non_blocking=True)  # (N, kernel_size)

    def matrix(side: int) -> Tensor:  # the convolution as a banded matrix (N, side, side)
        position = torch.arange(side)[:, None] + torch.arange(-half, half + 1)
        position = (side - 1) - ((side - 1) - position.abs()).abs()  # reflect without repeating the edge
        band = F.one_hot(position, side).float().permute(1, 0, 2).flatten(1).to(x.device, non_blocking=True)
        return (kernel @ band).view(-1, side, side)

    return along_both_sides(x, matrix(x.shape[2]), matrix(x.shape[3]))


def rotate(x: Tensor, quarters: Tensor | None = None) -> Tensor:
    """Turn each image counter-clockwise by `quarters` (N,) times 90 degrees, or by a random one; in place."""
    quarters = torch.randint(4, (len(x),)) if quarters is None else quarters
    for k in (1, 2, 3):
        x = where(x, quarters == k, lambda y, k=k: y.rot90(k, (2, 3)))
    return x


def normalize(x: Tensor) -> Tensor:
    """Take torchvision's mean off and divide by its deviation, channel by channel; changes `x` in place."""
    return x.sub_(MEAN.to(x.device, non_blocking=True)).div_(STD.to(x.device, non_blocking=True))
