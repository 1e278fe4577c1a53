"""Features of any pictures by a run's network, a map of them, and the most similar pairs.

    python embed.py runs/simclr --data /any/photos --out features.npz       every picture below a folder
    python embed.py runs/simclr --data /any/photos --map map.png            the pictures, arranged by their features
    python embed.py runs/simclr --data /any/photos --similar 3              similar.txt: duplicates come first
    python embed.py runs/simclr --out features.npz --features z             the run's own pictures, z instead of h

features.npz holds `features` (N, d) and `paths` (N,); with classes also `labels` (N,), -1: none, and `classes`.
"""

import io
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import common
import images
from images import Images, ensure
from linear_eval import embed_readable, open_run


def pictures_of(folder: str, config: Any, device: torch.device) -> tuple[Images, list[str]]:
    """Every picture below a folder, to be streamed in full size, and the class names, if it has class sub-folders."""
    with images.explain(f"--data {folder}", "give a folder that can be read"):
        paths = [*images.pictures_below(folder, left_out := Counter())]
        ways = [Path(path).relative_to(folder).parts[:-1] for path in paths]
    skipped = ", ".join(f"{n:,} {kind}" for kind, n in left_out.items()) or "none"
    ensure(paths, f"--data {folder}: no picture (left out: {skipped}); give a folder with pictures")
    words = [next((word for word in way if word.lower() not in sum(images.SPLITS, ())), "") for way in ways]
    classes = sorted({*words} - {""})
    number = {word: i for i, word in enumerate(classes)} if len(classes) > 1 else {}
    labels, classes = torch.tensor([number.get(word, -1) for word in words]), list(number)
    span = config.span or images.survey(paths[:: len(paths) // 100 + 1])[1]
    print(f"{folder}: {len(paths):,} pictures, {len(classes)} classes; left out: {skipped}", flush=True)
    return Images(labels, device, paths=paths, span=span), [os.fsencode(w).decode(errors="replace") for w in classes]


def draw_map(features: torch.Tensor, split: Images, rows: torch.Tensor, classes: list[str], config: Any) -> Image.Image:
    """A map of at most 900 of `rows` (N,): component 1 sorts columns, 2 sorts each upwards; frames show classes."""
    side, few = 1200, torch.linspace(0, len(rows) - 1, min(900, len(rows))).long()
    x, columns = features.cpu().double() - features.cpu().double().mean(0), math.ceil(len(few) ** 0.5)
    at = F.pad(x[few] @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -2:].flip(1), (0, 1))[:, :2]  # (n, 2)
    placed = [column[at[column, 1].argsort()] for column in at[:, 0].argsort().split(columns)]
    index, tile = rows[few[torch.cat(placed)]], side // columns
    sheet = Image.new("RGB", (side + 200 * bool(classes), side + 24), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    colours = [f"hsv({360 * i // len(classes)},85%,80%)" for i in range(len(classes))] + ["white"]  # white: no label
    views = split.views(index.split(64), [(config.image_size, None)], workers=config.workers)
    pictures = (view for (x,) in views for view in x.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    for i, (label, picture) in enumerate(zip(split.labels[index], pictures, strict=True)):
        left, top = i // columns * tile, side - (i % columns + 1) * tile
        sheet.paste(colours[label], (left, top, left + tile - 2, top + tile - 2))
        sheet.paste(Image.fromarray(picture).resize((tile - 8, tile - 8)), (left + 3, top + 3))
    pen.text((4, side + 4), f"{len(few):,} of {len(x):,} pictures, by their principal components", "black", font)
    for i, name in enumerate([*classes[:40], f"and {len(classes) - 40} more"] if len(classes) > 41 else classes):
        pen.text((side + 12, 8 + 28 * i), name[:22], colours[i], font)
    return sheet


def most_similar(features: torch.Tensor, paths: np.ndarray, n: int) -> bytes:
    """Lines of a cosine and two paths: each picture with its n nearest others, the most similar pictures first."""
    x, found = F.normalize(features.cpu(), dim=1), []
    for rows in torch.arange(len(x)).split(1024):
        cosine = x[rows] @ x.T
        cosine[torch.arange(len(rows)), rows] = -2  # a picture is not its own neighbour
        values, near = (part.flatten().tolist() for part in cosine.topk(min(n, len(x) - 1)))
        found += zip(values, paths[rows.repeat_interleave(len(near) // len(rows)).numpy()], paths[near], strict=True)
    return os.fsencode("".join(f"{cosine:.4f}\t{one}\t{other}\n" for cosine, one, other in sorted(found)[::-1]))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Do what the command line asks for; returns what features.npz holds."""
    usage, title = "python embed.py RUN [flags]", __doc__.split("\n")[0]
    parser = common.OneLineParser(usage=usage, description=title, allow_abbrev=False)
    add, home = parser.add_argument, os.path.expanduser
    add("run", type=home, help="a run's folder, such as runs/simclr")
    add("--data", type=home, help="a folder of pictures, or a set such as cifar10 (default: the run's own)")
    add("--out", type=home, metavar="NPZ", help="write features, paths, and labels and classes if there are any")
    add("--map", type=home, metavar="PNG", help="draw the pictures, sorted by the first two principal components")
    add("--similar", type=int, default=0, metavar="N", help="write similar.txt (beside --out): N others each")
    add("--features", choices=("h", "z"), default="h", help="the backbone's h, or the projection head's z (default h)")
    add("--device", default="auto", help="any torch device; auto is cuda where there is a GPU, else cpu")
    add("--workers", type=int, help="processes that decode pictures (default: the run's own)")
    args = parser.parse_args(argv)
    something = (args.out or args.map or args.similar) and args.similar >= 0
    ensure(something, "nothing to write; give --out features.npz, --map map.png or --similar 3")
    for flag, path, suffixes in (("--out", args.out, (".npz",)), ("--map", args.map, (".png", ".jpg"))):
        path = Path(path or f"left-out{suffixes[0]}")
        ensure(path.suffix in suffixes, f"{flag} {path}: give a name that ends in {' or '.join(suffixes)}")
        ensure(path.absolute().parent.is_dir(), f"{flag} {path}: there is no folder {path.parent}; make it first")
    (config, model), device = open_run(args), common.pick_device(args.device)
    model = model.to(device, memory_format=torch.channels_last)
    if config.data in common.RunConfig.PRESET_OF:  # a set, such as cifar10
        data = images.load(config, device)
        print(data.describe(), flush=True)
        parts, classes = (data.train, data.test), list(data.classes)
        whole = Images(torch.cat([p.labels for p in parts]), device, torch.cat([p.pixels for p in parts]))
    else:
        whole, classes = pictures_of(config.data, config, device)
    paths = whole.paths or [f"{name}/{i:06}" for name in ("train", "test") for i in range(len(getattr(data, name)))]
    features, rows = embed_readable(model.backbone if args.features == "h" else model.embed, whole, config)
    result = {"features": features.cpu().numpy(), "paths": np.array(paths)[rows.numpy()]}
    result |= {"labels": whole.labels[rows].numpy(), "classes": np.array(classes)} if classes else {}
    print(f"{len(rows):,} pictures, {args.features} {features.shape[1]}-d")
    if common.share()[0]:
        return result
    if args.out:
        np.savez(file := io.BytesIO(), **result)
        common.save_whole(file.getvalue(), Path(args.out))
    if args.map:
        draw_map(features, whole, rows, classes, config).save(args.map)
    if args.similar:
        path = Path(args.out or args.map or "similar").with_name("similar.txt")
        common.save_whole(most_similar(features, result["paths"], args.similar), path)
        print(f"{path}: cosine, picture, similar picture; the most similar ones first")
    return result


if __name__ == "__main__":
    with common.exit_status():
        main()
