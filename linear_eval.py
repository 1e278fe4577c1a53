"""What a backbone is worth, and what can be done with it: classifiers, probes, fine-tuning, embeddings, export.

    python linear_eval.py runs/simclr                            top-1, top-5, kNN, per class, on the run's own data
    python linear_eval.py runs/simclr --protocol paper           SGD on crops and flips, as the method's paper does it
    python linear_eval.py runs/simclr --label-fraction 0.01      with the labels of 1% of the training images
    python linear_eval.py runs/simclr --protocol finetune --label-fraction 0.1        the whole network, 10% of labels
    python linear_eval.py runs/simclr --features z               on z = g(h) instead of h
    python linear_eval.py runs/simclr --data /other/photos       on another data set (transfer)
    python linear_eval.py runs/simclr --probe all                what h keeps and g(h) loses (SimCLR, table 3)
    python linear_eval.py runs/simclr --embed out.npz --map map.png --data /any/photos     features, and a map of them
    python linear_eval.py runs/simclr --save classifier.pt       keeps the classifier, for
    python linear_eval.py runs/simclr --classify classifier.pt --data /new/photos          predictions.csv
    python linear_eval.py runs/simclr --export backbone.pth      the backbone alone, for torchvision

The backbone stays frozen, its BN in eval mode, but for `--protocol finetune`. `--protocol features`, the default: every
image passes it once, as a central view of the full-size picture; a linear classifier is then fitted to the cached
features to convergence (L-BFGS), so there is no learning rate. `--protocol paper` is how the method's authors train it;
for SupCon it is the second stage of the method. The reported figures are those of the held-out images after the fit: no
epoch is chosen on them.

Controls: --untrained (the same network before training), --features pixels, --shuffle-labels (must give chance).
"""

import argparse
import csv
import dataclasses
import hashlib
import importlib.util
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import common
import images
from common import InputError, RunConfig, dashed
from images import Data, Images, ensure


class Published(NamedTuple):
    """How a paper trains its linear classifier: batch, epochs, the lr at that batch, and how the lr falls."""

    optimizer: str  # all with momentum 0.9
    batch_size: int
    epochs: int
    lr: float
    steps: tuple[float, ...]  # the parts of the run after which lr is multiplied by `factor`; () = cosine to 0
    factor: float
    crop: float  # least area of a training crop
    source: str
    weight_decay: float = 0.0


PUBLISHED = {
    "simclr": Published("nesterov", 4096, 90, 1.6, (), 0, 0.08, "SimCLR appendix B.6: 0.1 B/256, no warm-up"),
    "moco": Published("sgd", 256, 100, 30.0, (0.6, 0.8), 0.1, 0.08, "MoCo v1 section 4.1, the same in v2"),
    "byol": Published("nesterov", 1024, 80, 0.8, (), 0, 0.08, "BYOL appendix C.1; 0.2 B/256 of the lr it chooses from"),
    "simsiam": Published("lars", 4096, 90, 1.6, (), 0, 0.08, "the authors' code: 0.1 B/256 (SimSiam's appendix: 0.02)"),
    "swav": Published("sgd", 256, 100, 0.3, (), 0, 0.08, "the authors' code; its weight decay is 1e-6", 1e-6),
    "supcon": Published("sgd", 512, 100, 5.0, (0.6, 0.75, 0.9), 0.2, 0.2, "the authors' code for SupCon on CIFAR"),
}
FINETUNING = {  # of 10% of the labels; with fewer the papers train for longer. Methods without their own take SimCLR's
    "simclr": Published("nesterov", 4096, 30, 0.8, (), 0, 0.08, "SimCLR appendix B.5: 0.05 B/256; 60 epochs of 1%"),
    "byol": Published("nesterov", 1024, 30, 0.05, (), 0, 0.08, "BYOL appendix C.1, of the lrs and epochs it tries"),
}
FEW_EPOCHS = {"simclr": 60, "byol": 50}  # of less than 10%
PROBES = ("grayscale", "rotation", "corrupted", "sobel")  # see benchmarks/probes.py
BY_HAND = ("epochs", "batch_size", "lr")  # of a published setting


def pick_labels(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of `fraction` of the labelled images, the same share of every class and at least one, by a seed."""
    rng = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        if label >= 0:
            mine = (labels == label).nonzero().squeeze(1)
            count = max(1, round(len(mine) * fraction))
            chosen.append(mine[torch.randperm(len(mine), generator=rng)[:count]])
    ensure(chosen, "no training image has a label; give a set with class sub-folders")
    return torch.cat(chosen).sort().values


def embed(network: Callable, split: Images, config: RunConfig, index: Tensor) -> tuple[Tensor, Tensor]:
    """Features (M, d) of those of the images `index` (N,) whose files can be read, and their places in it, (M,). Of a
    folder each is read anew, in full size: its features depend on no other picture."""
    if len(split.paths):
        split = Images(None, split.paths, split.sizes, split.labels, split.device)
    features, bad = common.embed(network, split, config, index), torch.zeros(len(split), dtype=torch.int32)
    bad[sorted(split.bad)] = 1
    rows = (common.over_all(bad, "MAX")[index] == 0).nonzero().squeeze(1)
    if len(rows) < len(index):
        print(f"note: {len(index) - len(rows):,} damaged images are left out, and nothing stands in")
    return features[rows.to(features.device)], rows


# ------------------------------------------------------------------------------------------------ the classifiers


class Classifier(nn.Linear):
    """Logits W (x - mean) / std + b of features x (N, d); W is (classes, d)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - self.mean) / self.std)


def fit_linear(x: Tensor, y: Tensor, classes: int, l2: float = 1e-3, steps: int = 200) -> Classifier:
    """Multinomial logistic regression of standardised features: minimise mean cross-entropy + l2/2 |W|^2 by L-BFGS from
    zero.

    x: (N, d), y: (N,) in 0..classes-1. Convex, so the result is unique.
    """
    classifier = Classifier(x.shape[1], classes).to(x.device)
    classifier.mean, classifier.std = x.mean(0), x.std(0).clamp(min=1e-6)
    weights = [classifier.weight, classifier.bias]
    solver = torch.optim.LBFGS(weights, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")
    unit = (x - classifier.mean) / classifier.std

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(unit, *weights), y) + l2 / 2 * classifier.weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    classifier.requires_grad_(False)
    common.warn_of_guess(F.cross_entropy(classifier(x), y).item(), classes)
    return classifier


def fit_as_published(
    network: Any, data: Data, config: RunConfig, chosen: Tensor, labels: Tensor, how: Published, tune: bool = False
) -> Classifier:
    """A linear classifier by SGD on random crops (area `how.crop` to 1) and flips of the images `chosen` (N,).

    `labels` (N,) are theirs, on the device; `network` makes the features. With `tune` it trains too, its BN by the
    statistics of the batch, and an epoch's last short batch is left out. Several processes share each batch. Raises
    `RunFailure` when the loss is no longer finite.
    """
    rank, world = images.share()
    steps = len(chosen) // how.batch_size if tune else -(-len(chosen) // how.batch_size)  # an epoch
    lr, total, step = how.lr, how.epochs * steps, 0
    with torch.no_grad():
        width = network(torch.zeros(2, 3, config.image_size, config.image_size, device=labels.device)).shape[1]
    classifier = Classifier(width, len(data.classes)).to(labels.device)
    nn.init.normal_(classifier.weight, std=0.01)
    if tune:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # MoCo's is that of one of its groups
        classify = common.network_for(nn.Sequential(network, classifier), config, labels.device, pieces=1)
    else:
        classify = common.average_gradients(classifier)
    common.draw_apart()
    if how.optimizer == "lars":
        optimizer = common.LARS(classifier.parameters(), lr=lr)  # the bias too
    else:
        more = {"weight_decay": how.weight_decay, "nesterov": how.optimizer == "nesterov"}
        optimizer = torch.optim.SGD(classify.parameters(), lr=lr, momentum=0.9, **more)
    scaler = torch.amp.GradScaler(labels.device.type, enabled=tune and config.amp == "fp16")
    for epoch in range(how.epochs):
        order = common.same(torch.randperm(len(chosen))).split(how.batch_size)[:steps]
        weights = [len(rows[rank::world]) * world / len(rows) for rows in order]  # of its mean among the processes'
        order = [rows[min(rank, len(rows) - 1) :: world] for rows in order]  # a process without a row has one, weight 0
        seed, crop = int(torch.randint(2**31, ())), [(config.image_size, (how.crop, 1.0))]  # the workers' seed
        crops = data.train.views([chosen[i] for i in order], crop, seed, config.workers)
        for index, weight, (x,) in zip(order, weights, crops, strict=True):
            x = images.normalize(images.sometimes(x, 0.5, images.flip))
            if not tune:
                with torch.no_grad():
                    x = torch.cat([network(part).float() for part in x.split(512)])  # h: (batch, width)
            loss = F.cross_entropy(classify(x).float(), labels[index.to(labels.device)]) * weight
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            drops = sum(epoch >= round(at * how.epochs) for at in how.steps)  # by the epoch; the cosine is by the step
            common.set_lr(optimizer, lr * how.factor**drops if how.steps else common.cosine_lr(step, total, 0, lr))
            scaler.step(optimizer)
            scaler.update()
            step += 1
        last, where = common.over_all(loss.detach()).item() / world, f"epoch {epoch + 1}/{how.epochs}"
        if not math.isfinite(last):
            raise common.RunFailure(f"the classifier's loss is {last} in {where}; give a lower --lr than {lr:g}")
        print(f"  {where}  loss {last:.4f}", flush=True)
    common.warn_of_guess(last, len(data.classes))
    return classifier.requires_grad_(False)


def scores(logits: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    """Top-1 and top-5, the accuracy of each class (NaN where it has no image), and the confusion matrix.

    logits: (M, classes), labels: (M,). `confusion[i, j]` counts images of class i that were taken for class j.
    """
    hit = logits.topk(min(5, classes), dim=1).indices == labels[:, None]  # (M, 5)
    pairs = labels * classes + logits.argmax(1)
    confusion = pairs.bincount(minlength=classes**2).view(classes, classes).cpu()
    return {
        "linear_top1": hit[:, 0].float().mean().item(),
        "linear_top5": hit.any(1).float().mean().item(),
        "per_class": (confusion.diag() / confusion.sum(1)).tolist(),
        "confusion": confusion,
    }


# --------------------------------------------------------------------------------------------------- the script


def export(config: RunConfig, model: nn.Module, path: Path) -> None:
    """Write the backbone as a torchvision state_dict (no `fc`). Raises `InputError` for our own resnet8."""
    ensure(config.backbone != "resnet8", "--export: resnet8 is not a torchvision network; take the run's backbone.pt")
    common.save_whole(model.backbone.state_dict(), path)
    print(f"{path}: {config.backbone} of {config.method()}, for torchvision.models.{config.backbone}() without its fc")
    if config.stem == "cifar":
        print("its first layers are the small ones: set model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)")
        print("and model.maxpool = torch.nn.Identity() before loading it")


def draw_confusion(confusion: Tensor, names: list[str], path: Path) -> None:
    """The confusion matrix as a picture; each row sums to 1."""
    from matplotlib.figure import Figure

    side = min(16, 3 + 0.3 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow((confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 40:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="taken for", ylabel="class")
    figure.savefig(path, dpi=110)


def draw_map(x: Tensor, pictures: list, labels: list[int], names: list[str], size: int, path: Path) -> None:
    """Thumbnails of the `pictures`, (split, index) each, by the first two principal components of their features x
    (N, d), framed in the colour of their class; where several would lie on each other, the first alone."""
    side, tile, x = 1200, 40, x.cpu().double()
    x -= x.mean(0)
    variance, axes = torch.linalg.eigh(x.T @ x)  # ascending
    at = F.pad(x @ axes[:, -2:].flip(1), (0, 1))[:, :2]  # (N, 2); padded for d = 1
    place = (at - at.amin(0)) / (at.amax(0) - at.amin(0)).clamp(min=1e-12) * (side // tile - 1)
    shown = {tuple(cell): i for i, cell in reversed([*enumerate(place.round().int().tolist())])}
    sheet = Image.new("RGB", (side + 200 * bool(names), side + 24), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    colours = [f"hsv({360 * i // len(names)},85%,80%)" for i in range(len(names))] + ["white"]  # the last: no label
    for split in dict.fromkeys(pictures[i][0] for i in shown.values()):
        mine = {cell: i for cell, i in shown.items() if pictures[i][0] is split}
        small = images.thumbnails(split, torch.tensor([pictures[i][1] for i in mine.values()]), size, tile - 8)
        for ((right, up), i), picture in zip(mine.items(), small, strict=True):
            left, top = right * tile, side - (up + 1) * tile
            sheet.paste(colours[labels[i]], (left, top, left + tile - 2, top + tile - 2))
            sheet.paste(picture, (left + 3, top + 3))
    first, second = [*(variance / variance.sum().clamp(min=1e-12)).flip(0).tolist(), 0.0][:2]
    words = f"across: first principal component, {first:.0%} of the variance; up: second, {second:.0%}"
    pen.text((4, side + 4), f"{words}; {len(shown):,} of {len(x):,} pictures", "black", font)
    for i, name in enumerate([*names[:40], f"and {len(names) - 40} more"] if len(names) > 41 else names):
        pen.text((side + 12, 8 + 28 * i), name.encode(errors="replace").decode()[:22], colours[i], font)
    sheet.save(path)
    print(f"{path}: {words}")


def digest(model: nn.Module) -> str:
    """A fingerprint of the weights that a classifier was fitted to."""
    values = (value.cpu().contiguous().numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(b"".join(values)).hexdigest()


def load_classifier(path: Path, model: nn.Module) -> tuple[Classifier, list[str], str]:
    """What `--save` wrote: the classifier, its classes, and whether it reads h, z or pixels. A fine-tuned backbone is
    put into the model. Raises `InputError` for another file, and one of another run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        classifier = Classifier(*saved["weight"].T.shape).requires_grad_(False)
        classifier.load_state_dict({name: saved[name] for name in classifier.state_dict()})
        classes, features, run = (saved[name] for name in ("classes", "features", "run"))
        of = digest(model)
        if saved["backbone"]:
            model.backbone.load_state_dict(saved["backbone"])
    except Exception as error:  # of many kinds for a damaged file
        why = "no such file" if isinstance(error, FileNotFoundError) else "no whole file of a classifier"
        raise InputError(f"--classify {path}: {why}; --save writes one") from None
    ensure(run == of, f"--classify {path}: it was fitted to other weights than this run's; fit it again")
    return classifier, classes, features


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", help="a run's folder, such as runs/simclr")
    add("--data", help="another data set: a name or a folder (default: the run's own)")
    add("--data-dir", help="where downloads are kept (default: the run's own)")
    add("--features", choices=("h", "z", "pixels"), help="h = backbone, z = g(h), pixels = a control (default h)")
    add("--protocol", choices=("features", "paper", "finetune"), default="features",
        help="a classifier on cached features | by SGD as published | with the whole network")  # fmt: skip
    add("--epochs", type=int, help="of --protocol paper or finetune (default: as published)")
    add("--batch-size", type=int, help="the same (default: as published, less for a small set)")
    add("--lr", type=float, help="the same, at that batch (default: as published, scaled with the batch)")
    add("--label-fraction", type=float, default=1.0, help="share of the training labels (default 1)")
    add("--l2", type=float, default=1e-3, help="weight penalty of the classifier on cached features (default 0.001)")
    add("--probe", choices=("class", *PROBES, "all"), default="class", help="what is asked; all: but class, of h and z")
    add("--shuffle-labels", action="store_true", help="a control: must give chance")
    add("--untrained", action="store_true", help="the same network before training, as a control")
    add("--confusion", type=Path, metavar="PNG", help="write the confusion matrix as a picture")
    add("--save", type=Path, metavar="PT", help="write the classifier, for --classify")
    add("--classify", type=Path, metavar="PT", help="tell the class of every picture by this classifier, and stop")
    add("--predictions", type=Path, metavar="CSV", default=Path("predictions.csv"),
        help="what --classify writes (default predictions.csv)")  # fmt: skip
    add("--embed", type=Path, metavar="NPZ", help="write features, paths, labels, classes of every picture, and stop")
    add("--map", type=Path, metavar="PNG", help="draw the first two principal components of these features, and stop")
    add("--export", type=Path, metavar="PATH", help="write the backbone for torchvision, and stop")
    add("--seed", type=int, default=0, help="which labels --label-fraction takes, and all else that is random")
    add("--device", default="auto", help="any torch device; auto = cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    for name, ok, words in (
        ("label_fraction", 0 < args.label_fraction <= 1, "above 0 and at most 1"),
        ("lr", args.lr is None or 0 < args.lr < math.inf, "above 0"),
        ("l2", 0 <= args.l2 < math.inf, "at least 0"),
        ("epochs", args.epochs is None or args.epochs >= 1, "at least 1"),
        ("batch_size", args.batch_size is None or args.batch_size >= 2, "at least 2"),
        ("seed", 0 <= args.seed < 2**31, "at least 0 and below 2^31"),
    ):
        ensure(ok, f"{dashed(name)} {getattr(args, name)}: must be {words}")

    fitting = ["label_fraction", "shuffle_labels", "confusion", "save", "protocol", "l2", *BY_HAND]
    pictures = args.embed or args.map or args.classify
    useless = [  # flags that would do nothing, and where
        (args.export, vars(args).keys() - {"run", "untrained", "export"}, "with --export, which evaluates nothing"),
        (pictures, [*fitting, "probe", "seed"], "with --embed, --map or --classify, which fit nothing"),
        (args.classify, ["features"], "with --classify, whose file says what it reads"),
        (not args.classify, ["predictions"], "without --classify"),
        (args.probe != "class", fitting, f"with --probe {args.probe}"),
        (args.probe == "all", ["features"], "with --probe all, which reads h and z"),
        (args.protocol != "features", ["l2"], f"with --protocol {args.protocol}"),
        (args.protocol == "features", BY_HAND, "without --protocol paper or finetune"),
        (args.protocol == "finetune", ["features"], "with --protocol finetune, which trains what makes h"),
        (args.features == "pixels", ["untrained"], "with --features pixels"),
    ]
    for active, names, where in useless:
        for name in sorted(names) if active else ():
            unset = getattr(args, name) == parser.get_default(name)
            ensure(unset, f"{dashed(name)} does nothing {where}; leave it out")
    ensure(args.probe == "class" or args.features != "pixels", f"--features pixels: --probe {args.probe} reads h or z")
    ends = {"confusion": (".png", ".pdf", ".svg"), "map": (".png", ".jpg"), "embed": (".npz",)}
    for name in ("confusion", "map", "embed", "save", "predictions", "export"):
        if path := getattr(args, name):
            ensure(not path.is_dir(), f"--{name} {path}: a folder; give the name of a file")
            ensure(path.absolute().parent.is_dir(), f"--{name} {path}: no folder {path.parent}")
            kinds = ends.get(name, (path.suffix,))
            ensure(path.suffix in kinds, f"--{name} {path}: must end in {' or '.join(kinds)}")
    drawn = not args.confusion or importlib.util.find_spec("matplotlib")
    ensure(drawn, "--confusion: matplotlib is not there; pip install it")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Do what the command line asks for; prints a table and returns its figures."""
    args = parse(argv)
    config, model = common.load_run(args.run)
    images_of = isinstance(config, RunConfig)
    common.ensure(
        images_of, f"{args.run}: a run of {config.method()}, not of images; its embedding.npz is what to look at"
    )
    if args.untrained:
        torch.manual_seed(config.seed)
        model = type(model)(dataclasses.replace(config, resume=False)).eval()
    if args.export:
        export(config, model, args.export)
        return {}
    headless = isinstance(model.projector, nn.Identity) and (args.probe == "all" or args.features == "z")
    ensure(not headless, "z: this network has no projection head, so z is h; ask for h alone")
    saved = load_classifier(args.classify, model) if args.classify else None
    config.data, config.data_dir = args.data or config.data, args.data_dir or config.data_dir
    if args.probe != "class":
        try:
            from benchmarks import probes
        except ModuleNotFoundError:
            raise InputError(f"--probe {args.probe}: benchmarks/probes.py is not here; copy it along") from None
    elif args.protocol == "features":  # each picture is read once
        config.resident_gb = 0
    device = common.pick_device(args.device)
    data = common.load_data(config, device)
    model = model.to(device, memory_format=torch.channels_last)
    state = f"before training ({config.init} weights)" if args.untrained else "trained"
    print(f"{config.method()}, {config.backbone} {state}" + ", frozen" * (args.protocol != "finetune"))
    print(data.describe(), flush=True)
    if args.embed or args.map or args.classify:
        return every_picture(args, config, model, data, saved)
    return (class_of if args.probe == "class" else probes.kinds_of)(args, config, model, data)


def every_picture(
    args: argparse.Namespace, config: RunConfig, model: nn.Module, data: Data, saved: Any
) -> dict[str, Any]:
    """`--embed`, `--map` and `--classify`: of all pictures, held out or not, by their paths. Returns what was found."""
    classifier, known, features = saved or (None, [], args.features or "h")
    network = {"h": model.backbone, "z": model.embed, "pixels": common.pixels}[features]
    found, parts = [], []
    for name, split in (("train", data.train), ("test", data.test)):
        if split:
            h, rows = embed(network, split, config, torch.arange(len(split)))
            parts.append(h)
            found += [(str(split.paths[i]) if split.paths else f"{name}/{i:06}", split, i) for i in rows.tolist()]
    order = sorted(range(len(found)), key=lambda i: found[i][0])
    paths, pictures, h = [found[i][0] for i in order], [found[i][1:] for i in order], torch.cat(parts)[order]
    labels, what = [int(split.labels[i]) for split, i in pictures], f"{len(paths):,} pictures"
    result = {"features": h.cpu().numpy(), "paths": np.array(paths), "labels": np.array(labels)}
    result["classes"] = np.array(data.classes, dtype=str)
    if args.embed:
        np.savez(whole := io.BytesIO(), **result)
        common.save_whole(whole.getvalue(), args.embed)
        print(f"{args.embed}: {features}, {h.shape[1]}-d, of {what}")
    if args.map and images.share()[0] == 0:
        draw_map(h, pictures, labels, data.classes, config.image_size, args.map)
    if args.classify:
        result["probabilities"] = classifier.to(h.device)(h).softmax(1)  # (N, classes)
        table = csv.writer(text := io.StringIO(), lineterminator="\n")
        table.writerow(["path", "class", "probability"])
        for path, row in zip(paths, result["probabilities"].tolist(), strict=True):
            table.writerow([path, known[row.index(max(row))], f"{max(row):.9g}"])
        common.save_whole(text.getvalue(), args.predictions)
        print(f"{args.predictions}: one of {len(known)} classes for each of {what}")
    return result


def setting_of(args: argparse.Namespace, method: str, n: int) -> Published:
    """The setting of `--protocol paper` or `finetune`: as published, fitted to n images where they are few, and with
    what is given by hand."""
    world, tune = images.share()[1], args.protocol == "finetune"
    table = FINETUNING if tune else PUBLISHED
    method = method if method in table else "simclr"  # whose recipe the others, such as pairwise.py, take
    how = table[method]
    if tune:
        how = how._replace(**{"epochs": FEW_EPOCHS[method]} if args.label_fraction < 0.1 else {})
    fitted = common.fitted_batch(n, how.batch_size)
    fitted -= fitted % world if tune else 0
    by_hand = {name: getattr(args, name) for name in BY_HAND if getattr(args, name) is not None}
    batch = by_hand.get("batch_size", fitted)
    ensure(batch <= n, f"--batch-size {batch}: there are only {n:,} labelled images")
    fits = batch and (not tune or batch % world == 0)
    ensure(fits, f"--batch-size {batch}: give a multiple of {world}, the number of processes")
    small = f"; fitted to {n:,} images" * (batch < how.batch_size and not args.batch_size)
    small += "; changed by hand" * bool(by_hand)
    how = how._replace(**{"batch_size": batch, "lr": how.lr * batch / how.batch_size} | by_hand)
    words = f"{how.optimizer}, batch {batch}, lr {how.lr:g}, {how.epochs} epochs ({how.source}{small})"
    print(f"protocol {args.protocol}: {words}", flush=True)
    if (steps := how.epochs * n // batch) < 2000:
        print(f"note: only about {steps:,} steps in all, the published ones are thousands; --epochs makes more")
    return how


def class_of(args: argparse.Namespace, config: RunConfig, model: nn.Module, data: Data) -> dict[str, Any]:
    """`--probe class`: how well a linear classifier and kNN tell the classes."""
    ensure(data.labelled, f"--data {config.data}: no class sub-folders with held-out images; give a set with labels")
    device, features, tune = next(model.parameters()).device, args.features or "h", args.protocol == "finetune"
    network = {"h": model.backbone, "z": model.embed, "pixels": common.pixels}[features]
    fingerprint = digest(model)
    chosen = pick_labels(data.train.labels, args.label_fraction, args.seed)
    train_labels, count = data.train.labels[chosen].to(device), len(data.classes)
    torch.manual_seed(args.seed)
    if args.shuffle_labels:
        train_labels = train_labels[torch.randperm(len(train_labels)).to(device)]
    print(f"features {features}, {len(chosen):,} labels used" + ", SHUFFLED" * args.shuffle_labels)

    if args.protocol != "features":
        how = setting_of(args, config.method(), len(chosen))
        classifier = fit_as_published(network, data, config, chosen, train_labels, how, tune)
    train, rows = embed(network, data.train, config, chosen)
    test, asked = embed(network, data.test, config, torch.arange(len(data.test)))
    train_labels, labels = train_labels[rows.to(device)], data.test.labels[asked].to(device)
    if args.protocol == "features":
        print(f"protocol features: L-BFGS on cached features, l2 {args.l2:g}", flush=True)
        classifier = fit_linear(train, train_labels, count, args.l2)
    logits, mean = classifier(test), train.mean(0) if features == "pixels" else 0  # as in the line that ends a run
    result = scores(logits, labels, count) | {"logits": logits}
    result["knn_top1"] = common.knn_accuracy(train - mean, train_labels, test - mean, labels)

    print(f"  a guess       {data.guess:.4f}  (the largest class)\n  linear top-1  {result['linear_top1']:.4f}")
    if count > 5:
        print(f"  linear top-5  {result['linear_top5']:.4f}")
    print(f"  kNN top-1     {result['knn_top1']:.4f}  (k = {common.knn_k(train_labels)})")
    worst = sorted((a, c) for a, c in zip(result["per_class"], data.classes, strict=True) if not math.isnan(a))[:10]
    print(f"  per class     {', '.join(f'{c} {a:.3f}' for a, c in worst)}" + f" (worst 10 of {count})" * (count > 10))
    if args.confusion and images.share()[0] == 0:
        draw_confusion(result["confusion"], data.classes, args.confusion)
    if args.save:
        state = classifier.state_dict() | {"classes": data.classes, "features": features, "run": fingerprint}
        common.save_whole(state | {"backbone": model.backbone.state_dict() if tune else None}, args.save)
        print(f"{args.save}: the classifier" + ", with its backbone" * tune)
    return result


if __name__ == "__main__":
    with common.exit_status():
        main()
