"""Features of any pictures by a run's network, and a map of them.

    python embed.py runs/simclr --data /any/photos --out features.npz       every picture below a folder
    python embed.py runs/simclr --data /any/photos --map map.png            the pictures, arranged by their features
    python embed.py runs/simclr --out features.npz --features z             the run's own pictures, z = g(h) for h

features.npz holds `features` (N, d) float32 and `paths` (N,). If the folder has class sub-folders, or the set has
labels, it also holds `labels` (N,), -1 for none, and the class names `classes`. Each picture is read in full size, so
that its features depend on no other picture. With torchrun each process embeds its share.
"""

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import common
import images
from common import RunConfig
from images import Images, ensure
from linear_eval import embed_readable, open_run

SPLITS = {word for words in images.SPLITS for word in words}  # folders that are no classes


def pictures_of(folder: str, config: RunConfig, device: torch.device) -> tuple[Images, list[str]]:
    """Every picture below a folder, to be streamed in full size, and the class names, if it has class sub-folders."""
    with images.explain(f"--data {folder}", "give a folder that can be read"):
        paths = [*images.pictures_below(folder, left_out := Counter())]
        ways = [Path(path).relative_to(folder).parts[:-1] for path in paths]
    skipped = ", ".join(f"{n:,} {kind}" for kind, n in left_out.items()) or "no other file"
    ensure(paths, f"--data {folder}: no picture, and {skipped}; give a folder with pictures")
    words = [next((word for word in way if word.lower() not in SPLITS), "") for way in ways]
    classes = sorted({*words} - {""})
    classes = classes if len(classes) > 1 else []  # one class says nothing
    labels = torch.tensor([classes.index(word) if word in classes else -1 for word in words])
    span = config.span or images.survey(paths[:: len(paths) // 100 + 1])[1]
    print(f"{folder}: {len(paths):,} pictures, {len(classes)} classes; left out: {skipped}", flush=True)
    return Images(labels, device, paths=paths, span=span), [os.fsencode(w).decode(errors="replace") for w in classes]


def draw_map(features: Tensor, split: Images, rows: Tensor, classes: list[str], config: RunConfig) -> Image.Image:
    """The pictures `rows` (N,) at the first two principal components of their features (N, d), framed by class.

    Where several pictures would cover each other, the first one is shown.
    """
    side, tile, x = 1200, 40, features.cpu().double()
    x = x - x.mean(0)
    variance, axes = torch.linalg.eigh(x.T @ x)  # ascending
    at = F.pad(x @ axes[:, -2:].flip(1), (0, 1))[:, :2]  # (N, 2); padded if d = 1
    place = (at - at.amin(0)) / (at.amax(0) - at.amin(0)).clamp(min=1e-12) * (side // tile - 1)
    shown = {tuple(cell): i for i, cell in reversed([*enumerate(place.round().int().tolist())])}
    sheet = Image.new("RGB", (side + 200 * bool(classes), side + 24), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    colours = [f"hsv({360 * i // len(classes)},85%,80%)" for i in range(len(classes))] + ["white"]  # white: no label
    index = rows[list(shown.values())]
    views = split.views(index.split(64), [(config.image_size, None)], workers=config.workers)
    pictures = (view for (x,) in views for view in x.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    for (right, up), label, picture in zip(shown, split.labels[index], pictures, strict=True):
        left, top = right * tile, side - (up + 1) * tile
        sheet.paste(colours[label], (left, top, left + tile - 2, top + tile - 2))
        small = Image.fromarray(picture).resize((tile - 8, tile - 8), Image.Resampling.BOX)
        sheet.paste(small, (left + 3, top + 3))
    first, second = [*(variance / variance.sum().clamp(min=1e-12)).flip(0).tolist(), 0.0][:2]
    words = f"across: first principal component, {first:.0%} of the variance; up: second, {second:.0%}"
    pen.text((4, side + 4), f"{words}; {len(shown):,} of {len(x):,} pictures", "black", font)
    for i, name in enumerate([*classes[:40], f"and {len(classes) - 40} more"] if len(classes) > 41 else classes):
        pen.text((side + 12, 8 + 28 * i), name[:22], colours[i], font)
    return sheet


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Do what the command line asks for; returns what features.npz holds."""
    usage, title = "python embed.py RUN [flags]", __doc__.split("\n")[0]
    parser = common.OneLineParser(usage=usage, description=title, allow_abbrev=False)
    add = parser.add_argument
    add("run", help="a run's folder, such as runs/simclr")
    add("--data", help="a folder of pictures, or a set such as cifar10 (default: the run's own)")
    add("--out", type=Path, metavar="NPZ", help="write features, paths, and labels and classes if there are any")
    add("--map", type=Path, metavar="PNG", help="draw the pictures at the first two principal components")
    add("--features", choices=("h", "z"), default="h", help="of the backbone, or of the projection head (default h)")
    add("--device", default="auto", help="any torch device; auto is cuda where there is a GPU, else cpu")
    add("--workers", type=int, help="processes that decode pictures (default: the run's own)")
    args = parser.parse_args(argv)
    ensure(args.out or args.map, "nothing to write; give --out features.npz, --map map.png, or both")
    for flag, path, suffixes in (("--out", args.out, (".npz",)), ("--map", args.map, (".png", ".jpg"))):
        path = path or Path(f"left-out{suffixes[0]}")
        ensure(path.suffix in suffixes, f"{flag} {path}: give a name that ends in {' or '.join(suffixes)}")
        ensure(path.absolute().parent.is_dir(), f"{flag} {path}: there is no folder {path.parent}; make it first")
    config, model = open_run(args)
    device = common.pick_device(args.device)
    model = model.to(device, memory_format=torch.channels_last)
    network = model.backbone if args.features == "h" else model.embed

    if config.data in RunConfig.PRESET_OF:  # a set, such as cifar10
        data = images.load(config, device)
        print(data.describe(), flush=True)
        parts, classes = {"train": data.train, "test": data.test}, list(data.classes)
        labels, pixels = (torch.cat([getattr(part, x) for part in parts.values()]) for x in ("labels", "pixels"))
        paths = [f"{name}/{i:06}" for name, part in parts.items() for i in range(len(part))]
        whole = Images(labels, device, pixels)
    else:
        whole, classes = pictures_of(config.data, config, device)
        paths = whole.paths
    features, rows = embed_readable(network, whole, config)
    result = {"features": features.cpu().numpy(), "paths": np.array(paths)[rows.numpy()]}
    result |= {"labels": whole.labels[rows].numpy(), "classes": np.array(classes)} if classes else {}
    print(f"{len(rows):,} pictures, {args.features} {features.shape[1]}-d")
    if common.share()[0] == 0 and args.out:
        np.savez(file := io.BytesIO(), **result)
        common.save_whole(file.getvalue(), args.out)
        print(f"{args.out}: {', '.join(result)}")
    if common.share()[0] == 0 and args.map:
        draw_map(features, whole, rows, classes, config).save(args.map)
        print(f"{args.map}: the map")
    return result


if __name__ == "__main__":
    with common.exit_status():
        main()
