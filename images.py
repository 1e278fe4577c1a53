"""Any set of pictures in, batches of augmented views out: `load` reads pictures, `Images.views` crops them, and the
operations at the end are what a method's `augment` does. Every image has a random draw of its own."""

import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import current_process
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch import distributed as dist
from torchvision.transforms import functional as TF

flip = TF.hflip
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # (3, 1, 1), torchvision's
SUFFIXES = {*".jpg .jpeg .jpe .jfif .png .bmp .ppm .pgm .tif .tiff .webp .gif .avif".split()}  # noqa: SIM905
FORMATS = ["JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF"] + ["AVIF"] * bool(find_spec("PIL._avif"))
SPLITS = (("train", "training"), ("test", "testing"), ("val", "valid", "validation"))  # names of a set's folders
SMALLEST_SIDE, MOST_PIXELS = 8, 89_000_000  # a smaller picture has nothing to crop; a larger one takes gigabytes
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InputError(ValueError):
    """The user gave something wrong. The message is one line: what is wrong, and what to give."""


def ensure(ok: Any, message: str) -> None:
    if not ok:
        raise InputError(message)


@contextmanager
def explain(what: str, advice: str, kind: type[Exception] = InputError) -> Iterator[None]:
    """Turn an exception in the block into one of `kind`: "what: why it failed; advice". Keep the blocks small."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise many kinds
        raise kind(f"{what}: {reason(error)}; {advice}") from None


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or repr(error)


def seed_of(*numbers: int) -> int:
    """A seed hashed from numbers such as (seed, step, rank): of a seed PyTorch's CPU generator reads 32 bits alone."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


@dataclass
class Images:
    """A split of a data set, N images. A resident split holds `pixels`; a streamed one decodes `paths` when needed."""

    labels: Tensor  # (N,), -1 where there is none
    device: torch.device
    pixels: Tensor | None = None  # (N, 3, H, W) uint8, on the device; photos are squeezed into squares
    sizes: Tensor | None = None  # (N, 2), heights and widths before that: crops are drawn in these coordinates
    paths: Sequence[str] = ()
    span: tuple[float, float] | None = None  # the values that 16-bit and float pictures show as black and as white
    bad: dict[int, str] = field(default_factory=dict)  # images whose files could not be read, and why

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, rows: Tensor) -> "Images":
        """The images of these rows alone; `rows` is a mask (N,) or indices, on the CPU."""
        pixels, sizes = (x if x is None else x[rows.to(x.device)] for x in (self.pixels, self.sizes))
        paths = [self.paths[i] for i in torch.arange(len(self))[rows].tolist()] if self.paths else ()
        return Images(self.labels[rows], self.device, pixels, sizes, paths, self.span)

    def views(self, batches: Sequence[Tensor], crops: Sequence, seed: Sequence = (0,), workers: int = 4) -> Iterator:
        """For each batch of indices (B,) a list with, for each of `crops`, (size, scale) as in `crop_boxes`, the views
        (B, 3, size, size) in [0, 1]. A resident split draws by torch's generator, a streamed one by (`seed`, image)."""
        if self.pixels is None:
            arriving = self.stream([piece for batch in batches for piece in batch.split(256)], crops, seed, workers)
            for batch in batches:  # a worker takes at most 256 images at a time
                *views, _ = zip(*(next(arriving) for _ in batch.split(256)), strict=True)
                ensure(2 * len(self.bad) <= len(self) + 1, f"{self.paths[0]}: few can be read; is the folder there?")
                yield [torch.cat([p.to(self.device, non_blocking=True) for p in v]).float().div_(255) for v in views]
            return
        shape = torch.tensor(self.pixels.shape[2:])
        for index in batches:
            picked = self.pixels[index.to(self.device, non_blocking=True)]
            sizes = shape.expand(len(index), 2) if self.sizes is None else self.sizes[index]
            boxes = [crop_boxes(sizes, *crop) * (shape / sizes).repeat(1, 2) for crop in crops]  # in squeezed pixels
            yield [crop_resize(picked, box, size) for box, (size, _) in zip(boxes, crops, strict=True)]

    def stream(self, batches: Sequence[Tensor], crops: Sequence, seed: Sequence, workers: int) -> Iterator:
        """What `read` makes of each batch, by worker processes."""
        loader = torch.utils.data.DataLoader(
            range(len(self)),
            batch_sampler=[batch.tolist() for batch in batches],
            collate_fn=partial(self.read, crops, seed),
            num_workers=0 if current_process().daemon else min(workers, CORES),  # a daemonic process cannot start any
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # without its own, the loader would draw from torch's
        )
        for tensors, damaged in loader:
            for index, why in damaged.items():
                if index not in self.bad and len(self.bad) < 20:  # the rest is only counted
                    print(f"warning: {self.paths[index]}: {why}", file=sys.stderr)
                self.bad[index] = why
            yield tensors

    def read(self, crops: Sequence, seed: Sequence, piece: list[int]) -> tuple[list[Tensor], dict[int, str]]:
        """In a worker: these images' crops, uint8 (B, 3, size, size) each, sizes (B, 2), and {image: reason} of damaged
        files. A random image of its label, or else any, replaces a damaged one; for crops "all" a blank one does."""
        if torch.utils.data.get_worker_info():  # Ctrl-C reaches workers too, but the main process still needs them
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        rows, bad = [], {}
        for index in piece:
            rng, row = torch.Generator().manual_seed(seed_of(*seed, index)), index
            for attempt in range(1 if crops[0][1] == "all" else 40):
                if not isinstance(picture := bad.get(row) or decode(self.paths[row], self.span, crops), str):
                    break
                bad[row], picture = picture, np.zeros((8, 8, 3), np.uint8)
                alike = ((self.labels == self.labels[index]) | (attempt >= 20)).nonzero()
                row = int(alike[torch.randint(len(alike), (), generator=rng)])
            picture = torch.from_numpy(picture).permute(2, 0, 1)
            size = torch.tensor(picture.shape[1:])
            boxes = [crop_boxes(size[None], *crop, rng)[0].round().int().tolist() for crop in crops]
            views = [TF.resized_crop(picture, *box, [side] * 2) for box, (side, _) in zip(boxes, crops, strict=True)]
            rows.append([*views, size])
        return [torch.stack(part) for part in zip(*rows, strict=True)], bad

    def in_memory(self, side: int, workers: int) -> "Images":
        """The same split, resident: whole pictures, squeezed into squares of `side` pixels, without damaged ones."""
        pixels, sizes = torch.empty((len(self), 3, side, side), dtype=torch.uint8), torch.empty((len(self), 2)).long()
        batches = torch.arange(len(self)).split(64)
        for rows, part in zip(batches, self.stream(batches, [(side, "all")], (0,), workers), strict=True):
            pixels[rows], sizes[rows] = part
        whole = torch.tensor([row not in self.bad for row in range(len(self))])
        kept = whole if self.bad else slice(None)  # without a copy
        return replace(self.at(whole), pixels=pixels[kept].to(self.device), sizes=sizes[kept])


@dataclass
class Data:
    """A data set: images to train on and, where there are some, held-out images. Either may have labels."""

    name: str
    train: Images
    test: Images | None = None
    classes: Sequence[str] = ()
    left_out: Counter = field(default_factory=Counter)  # how many files were left out, by kind

    @property
    def labelled(self) -> bool:
        return bool(self.classes and self.test)  # there are held-out images with labels to evaluate on

    def describe(self) -> str:
        """How many images and classes there are, what was left out, and where the pictures are."""
        x, span, more = self.train.pixels, self.train.span, ", ..." * (len(self.classes) > 10)
        words = f"{self.name}: {len(self.train):,} images, {len(self.test or ()):,} held out"
        words += "".join(f", {n:,} left out ({kind})" for kind, n in self.left_out.items() if n)
        words += f"; {len(self.classes) or 'no'} classes {', '.join(self.classes[:10])}".rstrip() + more
        words += "; streamed by workers" if x is None else f"; in memory, {x.shape[3]}x{x.shape[2]}"
        words += f"; grey values from {span[0]:g} to {span[1]:g}" if span else ""
        return words.encode(errors="replace").decode()  # the name of a file may be no UTF-8


def load(config: Any, device: torch.device) -> Data:
    """The set `config.data`: `shapes`, one of torchvision's, or a folder. The shapes have `image_size` pixels."""
    name, data_dir = config.data, config.data_dir
    if name == "shapes":
        parts = [make_shapes(n, seed, config.image_size) for seed, n in enumerate((10_000, 2_000))]
        return Data(name, *(Images(labels, device, pixels.to(device)) for pixels, labels in parts), list(SHAPES))
    if name not in ("cifar10", "cifar100", "stl10"):
        return load_folder(config, device)
    kind, stl = getattr(torchvision.datasets, name.upper()), name == "stl10"
    splits = [{"split": "train+unlabeled"}, {"split": "test"}] if stl else [{"train": True}, {"train": False}]
    several, first = dist.is_available() and dist.is_initialized(), os.environ.get("LOCAL_RANK", "0") == "0"
    if several and not first:  # the first process of a machine downloads; the others wait
        dist.barrier()
    with explain(f"--data {name}: no download to {data_dir}", "put the files there, or give a folder of pictures"):
        sets = [kind(data_dir, download=True, **split) for split in splits]
    if several and first:
        dist.barrier()
    pixels = [torch.tensor(part.data if stl else part.data.transpose(0, 3, 1, 2), device=device) for part in sets]
    labels = [torch.as_tensor(part.labels if stl else part.targets).long() for part in sets]
    return Data(name, *(Images(y, device, x) for x, y in zip(pixels, labels, strict=True)), list(sets[0].classes))


def load_folder(config: Any, device: torch.device) -> Data:
    """The pictures below `train/`, or below the folder if it has no `train/`. The first sub-folder names the class.
    `test/` is held out, or `val/` if it alone shares a class with `train/`. If there is neither, see `hold_out`."""
    name, left_out = config.data, Counter()
    ensure(not os.path.isfile(name), f"--data {name}: is a file; give its folder")
    ensure(os.path.isdir(name), f"--data {name}: no such folder; give a folder, shapes, cifar10, cifar100 or stl10")
    with explain(f"--data {name}", "give a folder that can be read"):
        there = {word.lower(): os.path.join(name, word) for word in sorted(os.listdir(name))}
        folder, *others = (next((there[w] for w in words if os.path.isdir(there.get(w, ""))), None) for words in SPLITS)
        ensure(folder or not any(others), f"--data {name}: test/ or val/ without train/; put pictures in a train/")
        files = pictures_below(folder or name, left_out)
        held_out = [pictures_below(other, left_out) for other in others if other] or [{}]
    words = sorted({*files.values()} - {""})
    classes = {word: label for label, word in enumerate(words)} if len(words) > 1 else {}  # one class says nothing
    test = next((part for part in held_out if classes.keys() & part.values()), held_out[0])
    known = {path: word for path, word in test.items() if word in classes or not classes}
    left_out["in no class of train/"] += len(test) - len(known)
    longest, span = survey([*files][:: len(files) // 100 + 1])
    split = partial(Images, device=device, span=config.span or span)
    train, test = (split(torch.tensor([classes.get(w, -1) for w in p.values()]), paths=[*p]) for p in (files, known))
    train, test = (train, test) if test else hold_out(train)
    side = min(longest, round(config.image_size * 8 / 7))  # 256 for views of 224, or less if all pictures are small
    if len(train) > 1 and (len(train) + len(test)) * 3 * side**2 <= config.resident_gb * 1e9:
        train, test = (part.in_memory(side, config.workers) if part else part for part in (train, test))
        left_out["damaged"] += len(files) + len(known) - len(train) - len(test)
    found = ", ".join(f"{n:,} {kind}" for kind, n in left_out.items() if n) or "no other file"
    ensure(len(train) > 1, f"--data {name}: {len(train)} picture(s) can be read, {found}; give 2 or more to train on")
    return Data(name, train, test, [os.fsencode(word).decode(errors="replace") for word in classes], left_out)


def pictures_below(root: Any, left_out: Counter) -> dict[str, str]:
    """Every picture below a folder with the first folder on the way to it, or "". Names that begin with `.`, `_` or `@`
    are skipped. Each real folder is read once: a loop of links ends, and a class is not found again deep in another."""
    found, seen, folders = {}, set(), [(root, "")]
    for folder, word in folders:  # the list grows meanwhile
        names = [] if (real := os.path.realpath(folder)) in seen else sorted(os.listdir(folder))
        seen.add(real)
        for name in (name for name in names if name[0] not in "._@"):
            path, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES and os.path.isfile(path):  # no FIFO, which would keep its reader waiting
                found[path] = word
            elif os.path.isdir(path):
                folders.append((path, word or name))
            else:
                kind = f"{suffix}: convert these to JPEG" if suffix in (".heic", ".heif") else suffix
                left_out[kind or "without a suffix"] += 1
    return found


def hold_out(split: Images) -> tuple[Images, Images]:
    """A split without a tenth of each class (1 image of 2 to 19), and that tenth. --seed does not change the draw."""
    order, held = torch.randperm(len(split), generator=torch.Generator().manual_seed(0)), torch.zeros(len(split)).bool()
    for label in split.labels[split.labels >= 0].unique():
        mine = order[split.labels[order] == label]
        held[mine[: max(len(mine) // 10, int(len(mine) > 1))]] = True
    return split.at(~held) if held.any() else split, split.at(held)


def from_arrays(pictures: Any, labels: Any, device: torch.device) -> Data:
    """A set of one's own, see `as_pictures` and `as_labels`; labels may be None. A tenth of each class is held out."""
    pictures = as_pictures(pictures)
    labels, classes = as_labels([-1] * len(pictures) if labels is None else labels, len(pictures))
    return Data("arrays", *hold_out(Images(labels, device, pictures.to(device))), classes)


def as_pictures(array: Any) -> Tensor:
    """Pictures as a uint8 tensor (N, 3, H, W), from a tensor or what NumPy reads. Raises `InputError` for others."""
    with explain("pictures", "give uint8 (N, 3, H, W), 0 to 255, two pictures or more, none masked"):
        x = array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3 or len(x) < 2 or np.ma.is_masked(array):
            raise ValueError(f"{x.dtype} {tuple(x.shape)}")
        ensure(x.max() != 1, "pictures: the largest value is 1; give uint8, 0 to 255")
    return x


def as_labels(labels: Any, count: int) -> tuple[Tensor, list[str]]:
    """Labels (N,) as indices of the sorted class names, and these names. They are whole numbers or words, in a tensor,
    an array, a pandas column or a list. -1, NaN, None and masked entries become -1. So does a single class."""
    with explain("labels", "give one whole number or word for each picture"), np.errstate(invalid="ignore"):
        values = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
        none = np.isin(values.astype(str), ["-1", "-1.0", "nan", "NaT", "<NA>", "None", ""]) | np.ma.getmask(labels)
        known = np.array(values[~none].tolist()) if values.dtype == object else values[~none]
        whole = known.astype(int) if known.dtype.kind == "f" else known
        if values.shape != (count,) or whole.dtype.kind not in "biuU" or (whole != known).any():
            raise ValueError(f"{known.dtype} {values.shape} for {count} pictures, such as {known[:1]}")
    classes, index = np.unique(whole, return_inverse=True)
    names, rows = [str(name) for name in classes] if len(classes) > 1 else [], torch.full((count,), -1)
    rows[torch.from_numpy(~none)] = torch.from_numpy(index) if names else -1
    return rows, names


def decode(path: str, span: Any = None, crops: Sequence = ()) -> np.ndarray | str:
    """A picture's first frame as a viewer shows it: uint8 RGB (H, W, 3), upright, on white, `span` from black to white.
    If it cannot be read, the reason. For `crops` of whole pictures a JPEG decodes at a reduced scale."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            w, h = image.size
            ensure(min(w, h) >= SMALLEST_SIDE and w * h <= MOST_PIXELS, f"{w}x{h} pixels are too few or too many")
            if crops and crops[0][1] == "all":
                image.draft("RGB", (2 * crops[0][0],) * 2)
            image.load()
    except Exception as error:  # Pillow raises many kinds
        return reason(error).replace(f" {path!r}", "")
    with suppress(Exception):  # odd metadata leave the picture as it is
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # grey, of 16-bit integers or floats
        low, high = span or (0.0, 65535.0 if image.mode[0] == "I" else 1.0)
        values = (np.nan_to_num(np.array(image, np.float32)) - low) / max(high - low, 1e-30)
        values = 1 - values if getattr(image, "tag_v2", {}).get(262) == 0 else values  # in this TIFF zero is white
        image = Image.fromarray((values.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def survey(paths: Sequence[str]) -> tuple[int, tuple[float, float] | None]:
    """The longest side in a sample of pictures, and the smallest and largest 16-bit or float value, if there is one."""
    longest, values, deep = SMALLEST_SIDE, [], False
    for path in paths:
        with suppress(Exception), Image.open(path, formats=FORMATS) as image:  # a damaged file is told when it is read
            longest = max(longest, *image.size)
            deep |= ";16" in str(image.tile) and image.mode[0] not in "IF"
            if image.mode[0] in "IF" and math.prod(image.size) <= MOST_PIXELS:
                level = np.array(image, np.float32)
                values += [float(of(level[np.isfinite(level)])) for of in (np.min, np.max)]
    if deep:
        print("warning: of 16-bit colours only the upper 8 bits are read; stretch dark pictures first", file=sys.stderr)
    return longest, (min(values), max(values)) if values else None


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
    """Draw `n` images of ten kinds of shapes: uint8 (n, 3, size, size) and labels (n,), the same for the same seed."""
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
    colours = np.array([[0.2, 0.3, 0.45], [0.85, 0.65, 0.3]], np.float32)  # of ground and shape, before the light
    ground, figure = rng.uniform(0.9, 1.1, (2, n, 1, 1, 1)).astype(np.float32) * colours[:, None, :, None, None]
    pixels = ground + (figure - ground) * cover + 0.12 * rng.standard_normal((n, 3, size, size), np.float32)
    return torch.from_numpy((pixels.clip(0, 1) * 255).round().astype(np.uint8)), torch.from_numpy(labels)


# An operation takes float images (N, 3, H, W) in [0, 1], equals torchvision's, and draws its parameters on the CPU.


def crop_boxes(sizes: Tensor, size: int, scale: Any, generator: Any = None) -> Tensor:
    """Boxes (N, 4) = top, left, height, width in pixels of pictures of `sizes` (N, 2), height and width. `scale` (low,
    high): random crops of that share of the area and a ratio of 3/4 to 4/3, drawn as by torchvision. None: the central
    square that an evaluation takes, 7/8 of the short side for views above 64 pixels. "all": the whole picture."""
    sizes = sizes.float()
    if scale in (None, "all"):
        short = sizes.amin(1, keepdim=True).expand_as(sizes)
        side = sizes if scale else torch.where((short > size) & (size > 64), short * 7 / 8, short)
        return torch.cat([(sizes - side) / 2, side], 1)
    height, width = sizes[:, :1], sizes[:, 1:]
    u = torch.rand(3, len(sizes), 10, generator=generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    ratio = (4 / 3) ** (2 * u[1] - 1)  # uniform in the logarithm
    h = torch.cat([(area / ratio).sqrt().round(), torch.minimum(height, (width * 4 / 3).round())], 1)
    w = torch.cat([(area * ratio).sqrt().round(), torch.minimum(width, (height * 4 / 3).round())], 1)
    first = ((w > 0) & (w <= width) & (h > 0) & (h <= height)).int().argmax(1, keepdim=True)  # the last one does fit
    box = torch.cat([h.gather(1, first), w.gather(1, first)], 1)
    room = sizes - box
    corner = (u[2, :, :2] * (room + 1)).floor().minimum(room)
    return torch.cat([torch.where(first == 10, (room / 2).floor(), corner), box], 1)


def random_resized_crop(pictures: Tensor, size: int, scale: tuple[float, float] = (0.08, 1.0)) -> Tensor:
    """A random crop of each picture, uint8 (N, 3, H, W), as `crop_boxes` draws it: (N, 3, size, size) in [0, 1]."""
    sizes = torch.tensor(pictures.shape[2:]).expand(len(pictures), 2)
    return crop_resize(pictures, crop_boxes(sizes, size, scale), size)


def crop_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop box n of `boxes` (N, 4) from image n, uint8 (N, 3, H, W), resized, antialiased: (N, 3, size, size) float."""
    boxes, weights = boxes.to(images.device, non_blocking=True).float()[..., None, None], []
    for axis, n in enumerate(images.shape[2:]):  # bilinear weights (N, size, n) of the pixels of each side
        length = boxes[:, 2 + axis].clamp(min=1)
        start, scale = torch.minimum(boxes[:, axis], n - length), length / size
        here = torch.arange(n, device=boxes.device) + 0.5
        centre = start + (torch.arange(size, device=boxes.device)[:, None] + 0.5) * scale
        weight = (1 - (here - centre).abs() / scale.clamp(min=1)).clamp_(min=0)
        weight *= (here >= start) & (here < start + length)
        weights.append(weight / weight.sum(-1, keepdim=True))
    return (weights[0] / 255)[:, None] @ images.float() @ weights[1][:, None].mT  # rows, then columns


def where(x: Tensor, mask: Tensor, op: Callable[..., Tensor], *per_image: Tensor) -> Tensor:
    """Apply `op`, with its parameters (N,), to the images whose CPU `mask` (N,) is True; changes `x` in place."""
    index = mask.nonzero().squeeze(1)
    there = index.to(x.device, non_blocking=True)
    picked = [p[index].to(x.device, non_blocking=True).view(-1, 1, 1, 1) for p in per_image]
    return x.index_copy_(0, there, op(x.index_select(0, there), *picked))


def sometimes(x: Tensor, p: float, op: Callable[..., Tensor], *settings: float) -> Tensor:
    """Apply `op` with these settings to each image with probability `p`; changes `x` in place."""
    return where(x, torch.rand(len(x)) < p, lambda y: op(y, *settings)) if p > 0 else x


def luma(x: Tensor) -> Tensor:
    """The grey level (N, 1, H, W), by torchvision's weights."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def grey(x: Tensor) -> Tensor:
    return luma(x).expand_as(x)  # three equal channels


def color_jitter(x: Tensor, b: float, c: float, s: float, h: float) -> Tensor:
    """Brightness, contrast and saturation by factors in 1 -+ (b, c, s), hue by up to h <= 0.5 turns, in an order of its
    own for every image, as torchvision's ColorJitter draws them; changes `x` in place."""
    factors = [torch.empty(len(x)).uniform_(max(0.0, 1 - width), 1 + width) for width in (b, c, s)]
    factors.append(torch.empty(len(x)).uniform_(-h, h))
    order = torch.rand(len(x), 4).argsort(1)
    operations = (
        lambda x, f: (x * f).clamp_(0, 1),  # brightness
        lambda x, f: torch.lerp(luma(x).mean((2, 3), keepdim=True), x, f).clamp_(0, 1),  # contrast
        lambda x, f: torch.lerp(luma(x), x, f).clamp_(0, 1),  # saturation
        hue,
    )
    for slot in range(4):
        for kind, op in enumerate(operations):
            x = where(x, order[:, slot] == kind, op, factors[kind])
    return x


def hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue by `turns` (N, 1, 1, 1) in [-0.5, 0.5], to HSV and back: with V the largest channel, C the chroma
    and H the hue in turns, each channel of the result is V - C clamp(2 - |6 frac(H + offset) - 2|, 0, 1)."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    sixth = torch.where(value == g, (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4))
    sixth = torch.where(value == r, g - b, sixth).div_(chroma.clamp(min=1e-12))
    angle = sixth.div_(6).add_(1 + turns[:, 0])  # > 0, so frac is the remainder
    sixths = ((angle + offset).frac_().mul_(6) for offset in (5 / 6, 3 / 6, 1 / 6))
    ramps = (sixth.sub_(2).abs_().neg_().add_(2).clamp_(0, 1) for sixth in sixths)
    return torch.stack([torch.addcmul(value, chroma, ramp, value=-1) for ramp in ramps], 1)


def gaussian_blur(x: Tensor, low: float = 0.1, high: float = 2.0) -> Tensor:
    """Blur by a Gaussian of sigma from low to high pixels, with an odd kernel of a tenth of the side (SimCLR, A)."""
    half, matrices = max(1, x.shape[-1] // 20), []
    taps, sigma = torch.arange(-half, half + 1), torch.empty(len(x), 1).uniform_(low, high)
    kernel = torch.softmax(-0.5 * (taps / sigma) ** 2, 1).to(x.device, non_blocking=True)  # (N, 2 half + 1)
    for side in x.shape[2:]:  # the convolution as a banded matrix (N, side, side)
        position = side - 1 - (side - 1 - (torch.arange(side)[:, None] + taps).abs()).abs()  # reflect at the borders
        band = torch.eye(side)[position].permute(1, 0, 2).flatten(1).to(x.device, non_blocking=True)
        matrices.append((kernel @ band).view(-1, side, side))
    return matrices[0][:, None] @ x @ matrices[1][:, None].mT


def normalize(x: Tensor) -> Tensor:
    """Take torchvision's mean off and divide by its deviation, channel by channel; changes `x` in place."""
    return x.sub_(MEAN.to(x.device, non_blocking=True)).div_(STD.to(x.device, non_blocking=True))
