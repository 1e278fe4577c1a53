"""What the features of a run are worth: a linear classifier, kNN, few labels, fine-tuning.

    python linear_eval.py runs/simclr                            top-1, top-5, kNN and each class, on the run's own data
    python linear_eval.py runs/simclr --data /other/photos       on another data set with class sub-folders
    python linear_eval.py runs/simclr --features z               on z = g(h) instead of h
    python linear_eval.py runs/simclr --label-fraction 0.01      with the labels of 1% of the training images
    python linear_eval.py runs/simclr --protocol paper           SGD on crops and flips, as the method's paper does it
    python linear_eval.py runs/simclr --protocol finetune --label-fraction 0.1        the whole network, 10% of labels
    python linear_eval.py runs/simclr --save classifier.pt       keeps the network and its classifier for torchvision

The backbone stays frozen, its BN in eval mode, except with `--protocol finetune`. By default the network embeds the
central view of each full-size picture once, and L-BFGS fits a linear classifier to these features: it has no learning
rate. `--protocol paper` trains the classifier as the method's authors do; for SupCon it is the second stage. The
controls are --untrained, --features pixels and --shuffle-labels (this one must end at a guess's accuracy).
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import common
import images
from common import RunConfig, dashed
from images import Data, Images, ensure, seed_of


class Published(NamedTuple):
    """How a paper trains its classifier: optimizer, batch, epochs, the learning rate, and how that falls."""

    optimizer: str  # each has momentum 0.9
    batch_size: int
    epochs: int
    lr: float
    steps: tuple[float, ...]  # after these parts of the run, lr is multiplied by `factor`; () = a cosine to 0
    factor: float
    crop: float  # least area of a training crop
    source: str
    weight_decay: float = 0.0
    head: float = 1.0  # the classifier's lr, in units of lr
    warmup: float = 0.0  # part of the run in which lr rises linearly
    smoothing: float = 0.0  # label smoothing


HALF_EPOCHS = tuple(half / 180 for half in range(25, 180))  # the ends of half epochs after 12 of 90 epochs
PUBLISHED = {  # a method without an entry takes SimCLR's
    "simclr": Published("nesterov", 4096, 90, 1.6, (), 0, 0.08, "SimCLR appendix B.6: 0.1 B/256, no warm-up"),
    "moco": Published("sgd", 256, 100, 30.0, (0.6, 0.8), 0.1, 0.08, "MoCo v1 section 4.1, the same in v2"),
    "byol": Published("nesterov", 1024, 80, 0.8, (), 0, 0.08, "BYOL appendix C.1, one of its rates: 0.2 B/256"),
    "simsiam": Published("larc", 4096, 90, 1.6, (), 0, 0.08, "the authors' code: 0.1 B/256 (SimSiam's appendix: 0.02)"),
    "swav": Published("sgd", 256, 100, 0.3, (), 0, 0.08, "the authors' code; its weight decay is 1e-6", 1e-6),
    "supcon, unit h": Published("rmsprop", 6144, 90, 1.2, HALF_EPOCHS, 0.97, 0.08, "Google's supcon/: 0.05 B/256",
        1e-6, warmup=12 / 90, smoothing=0.05),
    "supcon": Published("sgd", 512, 100, 5.0, (0.6, 0.75, 0.9), 0.2, 0.2, "HobbitLong/SupContrast, for CIFAR"),
}  # fmt: skip
FINETUNING = {  # "10%": --label-fraction 0.1 or more; "1%": less. A method without an entry takes SimCLR's
    "simclr 10%": Published("nesterov", 4096, 30, 0.8, (), 0, 0.08, "SimCLR appendix B.5: 0.05 B/256"),
    "simclr 1%": Published("nesterov", 4096, 60, 0.8, (), 0, 0.08, "SimCLR appendix B.5: 0.05 B/256"),
    "byol 10%": Published("nesterov", 1024, 30, 0.2, (), 0, 0.08, "BYOL appendix C.1, one of its rates: 0.05 B/256"),
    "byol 1%": Published("nesterov", 1024, 50, 0.2, (), 0, 0.08, "BYOL appendix C.1, one of its rates: 0.05 B/256"),
    "swav 10%": Published("sgd", 256, 20, 0.01, (0.6, 0.8), 0.2, 0.08, "SwAV appendix A.4", head=20),
    "swav 1%": Published("sgd", 256, 20, 0.02, (0.6, 0.8), 0.2, 0.08, "SwAV appendix A.4", head=250),
}
BY_HAND = ("epochs", "batch_size", "lr")  # the flags that change a published setting


def open_run(args: argparse.Namespace) -> tuple[RunConfig, nn.Module]:
    """The config and the model of the run `args.run`; --data, --data-dir and --workers replace the run's own."""
    ensure((args.workers or 0) >= 0, f"--workers {args.workers}: give 0 or more")
    config, model = common.load_run(args.run)
    ensure(isinstance(config, RunConfig), f"{args.run}: a run of {config.method()} has no pictures; give another run")
    ensure(args.data or config.data != "arrays", f"{args.run}: its pictures came from Python; give a folder by --data")
    for name in ("data", "data_dir", "workers"):
        if (given := getattr(args, name, None)) is not None:
            setattr(config, name, given)
    headless = isinstance(model.projector, nn.Identity)
    ensure(args.features != "z" or not headless, "--features z: the network has no projection head; give --features h")
    run = os.path.normpath(args.run)  # a run that finds runs/simclr taken writes to runs/simclr-2
    if later := [n for n in range(2, 1000) if Path(f"{run}-{n}", "checkpoint.pt").exists()]:
        print(f"note: {run}-{later[-1]} beside it is a newer run")
    return config, model


def pick_labels(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of `fraction` of the labelled images, drawn by a seed: the same share of each class, and at least one."""
    rng, chosen = torch.Generator().manual_seed(seed), []
    for label in labels[labels >= 0].unique():
        mine = (labels == label).nonzero().squeeze(1)
        mine = mine[torch.randperm(len(mine), generator=rng)]
        chosen.append(mine[: max(1, round(len(mine) * fraction))])
    return torch.cat(chosen).sort().values


def embed_readable(network: Callable, split: Images, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Features (M, d) of the images of a split whose files can be read, and their rows (M,) in the split."""
    if split.paths:  # read in full size: in memory, a picture's size depends on the others
        split = dataclasses.replace(split, pixels=None, sizes=None)
    features, damaged = common.embed(network, split, config), torch.zeros(len(split), dtype=torch.int32)
    damaged[list(split.bad)] = 1
    rows = (common.gather(damaged[None]).amax(0) == 0).nonzero().squeeze(1)
    if len(rows) < len(split):
        print(f"note: damaged pictures left out: {len(split) - len(rows):,}")
    return features[rows.to(features.device)], rows


def fit_linear(x: Tensor, y: Tensor, classes: int, l2: float = 1e-3, steps: int = 200) -> nn.Linear:
    """Multinomial logistic regression of standardised features: the least mean cross-entropy + l2/2 |W|^2.
    x: (N, d), y: (N,) in 0..classes-1. L-BFGS starts from zero; the problem is convex, so there is one solution. The
    logits W (x - mean) / std + b are returned as one layer of x itself: weight W / std, bias b - (W / std) mean."""
    mean, std = x.mean(0), x.std(0).nan_to_num()  # NaN for a single row
    std[std <= 1e-3 * x.abs().amax(0)] = 1  # a feature that is nearly constant here may move later
    unit, classifier = (x - mean) / std, nn.Linear(x.shape[1], classes).to(x.device)
    weight, bias = (nn.init.zeros_(p) for p in classifier.parameters())
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(classifier(unit), y) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    classifier.requires_grad_(False)
    scaled = weight.cpu().double() / std.cpu()
    bias.copy_(bias.cpu() - scaled @ mean.cpu().double())
    weight.copy_(scaled)
    return classifier


def rate_of(how: Published, step: int, total: int) -> float:
    """The learning rate of a step."""
    if not how.steps:
        return common.cosine_lr(step, total, how.warmup * total, how.lr)
    drops = sum(step / total >= at for at in how.steps)
    return how.lr * how.factor**drops * min(1.0, (step + 1) / max(1.0, how.warmup * total))


def fit_as_published(
    network: Any, train: Images, classes: int, how: Published, config: RunConfig, *, seed: int = 0, tune: bool = False
) -> nn.Linear:
    """A linear classifier of `network`'s features, trained on crops (area `how.crop` to 1) and flips of `train`.
    With `tune` the network trains too: its BN then needs whole batches, so an epoch's last short batch is left out.
    Several processes share each batch. Raises `RunFailure` when the loss is no longer finite."""
    (rank, world), device, size = common.share(), train.device, config.image_size
    with torch.no_grad():
        width = network(torch.zeros(2, 3, size, size, device=device)).shape[1]
    classifier = nn.Linear(width, classes).to(device)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    learner = nn.Sequential(network, classifier).train() if tune else classifier
    if world > 1:
        learner = nn.SyncBatchNorm.convert_sync_batchnorm(learner) if device.type == "cuda" else learner
        learner = DistributedDataParallel(learner)
    groups = [{"params": list(part.parameters())} for part in ((network, classifier) if tune else (classifier,))]
    settings = {"lr": how.lr, "momentum": 0.9, "weight_decay": how.weight_decay}
    if how.optimizer == "larc":  # the rate multiplies the momentum; the bias is rescaled too
        optimizer = common.LARS(groups, **settings, lr_in_momentum=False)
    elif how.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(groups, **settings, alpha=0.9, eps=0.001**0.5)  # Google: sqrt(v + 0.001)
    else:
        optimizer = torch.optim.SGD(groups, **settings, nesterov=how.optimizer == "nesterov")
    least = how.batch_size if tune else world  # each process needs an image of every batch
    for epoch in range(how.epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
        batches = [rows for rows in order.split(how.batch_size) if len(rows) >= least]
        torch.manual_seed(seed_of(seed, epoch, rank + 1))
        mine, losses = [rows[rank::world] for rows in batches], []
        views = train.views(mine, [(size, (how.crop, 1.0))], (seed, epoch), config.workers)
        for i, (x,) in enumerate(views):
            x = images.normalize(images.sometimes(x, 0.5, images.flip))
            common.set_lr(optimizer, rate := rate_of(how, epoch * len(batches) + i, how.epochs * len(batches)))
            optimizer.param_groups[-1]["lr"] = rate * how.head
            with torch.autocast(device.type, torch.bfloat16, enabled=tune and config.amp == "bf16"):
                if not tune:
                    with torch.no_grad():
                        x = torch.cat([network(part) for part in x.split(512)])  # h: (batch, width)
                logits = learner(x).float()
            # DistributedDataParallel averages over processes, whose shares may differ by an image
            y = train.labels[mine[i]].to(device)
            loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=how.smoothing) * world / len(batches[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        last = common.gather(torch.stack(losses).mean()[None]).mean().item()
        if not math.isfinite(last):
            raise common.RunFailure(f"the loss is {last} in epoch {epoch + 1}; give a lower --lr than {how.lr:g}")
        print(f"  epoch {epoch + 1}/{how.epochs}  loss {last:.4f}", flush=True)
    for statistic in [b for b in learner.eval().buffers() if b.is_floating_point()]:
        statistic.copy_(common.gather(statistic[None]).mean(0))  # on CPUs each process has BN statistics of its own
    return classifier.requires_grad_(False)


def save_for_torchvision(fc: nn.Linear, backbone: nn.Module, names: list[str], config: RunConfig, path: Path) -> None:
    """Write a torchvision ResNet's state_dict with its `fc`, and a .txt with the class names and how to load it."""
    state = backbone.state_dict() | {"fc.weight": fc.weight, "fc.bias": fc.bias}
    common.save_whole({name: value.detach().cpu() for name, value in state.items()}, path)
    size, text = config.image_size, path.with_suffix(".txt")
    short = round(size * 8 / 7) if size > 64 else size  # the central view, see `images.crop_boxes`
    mean, std = ([round(v, 3) for v in x.flatten().tolist()] for x in (images.MEAN, images.STD))
    stem = ["model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)", "model.maxpool = torch.nn.Identity()"]
    lines = [
        *[" ".join(name.splitlines()) for name in names],
        "",
        "import torch, torchvision",
        "from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor",
        f'model = torchvision.models.get_model("{config.backbone}", num_classes={len(names)}).eval()',
        *(stem if config.stem == "cifar" else []),
        f"model.load_state_dict(torch.load({path.name!r}))",
        f"resize = lambda picture: Resize({short} if min(picture.size) > {size} else {size})(picture)",
        f"view = Compose([resize, CenterCrop({size}), ToTensor(), Normalize({mean}, {std})])",
    ]
    common.save_whole("\n".join([*lines, ""]).encode(), text)
    print(f"{path}: the network with its classifier; {text}: class names, and how torchvision loads it")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises `InputError` for values out of range, and for flags that would do nothing."""
    how = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser, home = common.OneLineParser(usage="python linear_eval.py RUN [flags]", **how), os.path.expanduser
    add = parser.add_argument
    add("run", type=home, help="a run's folder, such as runs/simclr")
    add("--data", type=home, help="another data set: a name or a folder (default: the run's own)")
    add("--data-dir", type=home, help="the folder for downloaded data sets (default: the run's own)")
    add("--features", choices=("h", "z", "pixels"), default="h", help="backbone, projection head, or a control")
    add("--protocol", choices=("features", "paper", "finetune"), default="features",
        help="a classifier on cached features | by SGD as published | together with the whole network")  # fmt: skip
    add("--epochs", type=int, help="passes over the labelled images, for paper and finetune (default: as published)")
    add("--batch-size", type=int, help="images in a step, for paper and finetune (default: as published)")
    add("--lr", type=float, help="the highest learning rate, for paper and finetune (default: as published)")
    add("--label-fraction", type=float, default=1.0, help="share of the training labels (default 1)")
    add("--l2", type=float, default=1e-3, help="weight penalty of the classifier on cached features (default 0.001)")
    add("--untrained", action="store_true", help="the same network before training, as a control")
    add("--shuffle-labels", action="store_true", help="a control: must end at the accuracy of a guess")
    add("--save", type=lambda p: Path(p).expanduser(), metavar="PT", help="write the whole network for torchvision")
    add("--seed", type=int, default=0, help="seed of --label-fraction's draw and of everything else random")
    add("--device", default="auto", help="any torch device; auto is cuda where there is a GPU, else cpu")
    add("--workers", type=int, help="processes that decode pictures (default: the run's own)")
    args = parser.parse_args(argv)
    ensure(0 < args.label_fraction <= 1, f"--label-fraction {args.label_fraction}: give more than 0, and at most 1")
    ensure(args.lr is None or 0 < args.lr < math.inf, f"--lr {args.lr}: give more than 0")
    ensure(0 <= args.l2 < math.inf, f"--l2 {args.l2}: give 0 or more")
    ensure(args.epochs is None or args.epochs >= 1, f"--epochs {args.epochs}: give 1 or more")
    ensure(0 <= args.seed < 2**31, f"--seed {args.seed}: give 0 or more, below 2^31")
    sgd, useless = args.protocol != "features", "does nothing with --protocol"
    for name in BY_HAND:
        ensure(sgd or getattr(args, name) is None, f"{dashed(name)} {useless} features; add --protocol paper")
    ensure(not sgd or args.l2 == 1e-3, f"--l2 {useless} {args.protocol}; leave it out")
    ensure(args.protocol != "finetune" or args.features == "h", "--protocol finetune trains h; leave --features out")
    ensure(not args.untrained or args.features != "pixels", "--untrained does nothing with --features pixels")
    if path := args.save:
        ensure(path.suffix in (".pt", ".pth"), f"--save {path}: give a name that ends in .pt")
        ensure(path.absolute().parent.is_dir(), f"--save {path}: no folder {path.parent}; make it first")
        ensure(args.features == "h", f"--save: torchvision cannot compute {args.features}; leave --features out")
    return args


def setting_of(args: argparse.Namespace, config: RunConfig, n: int) -> Published:
    """The setting of `--protocol paper` or `finetune` for n labelled images: as published, but for the flags given."""
    method, world, tune = config.method(), common.share()[1], args.protocol == "finetune"
    unit = args.features == "h" and getattr(config, "normalize_h", False) and config.loss != "cross-entropy"  # SupCon
    kind = (" 1%" if args.label_fraction < 0.1 else " 10%") if tune else ", unit h" * unit
    table = FINETUNING if tune else PUBLISHED
    how = table.get(method + kind) or table["simclr" + kind]
    by_hand = {name: getattr(args, name) for name in BY_HAND if getattr(args, name) is not None}
    rate, batch = how.lr / how.batch_size, by_hand.get("batch_size", how.batch_size)
    smaller = max(2 * world, 2 ** int(math.log2(max(2, n / 8))))  # 8 steps or more an epoch
    advice = f"give --batch-size {smaller} --lr {rate * smaller:.3g}"
    ensure(batch <= n, f"--protocol {args.protocol}: a batch of {batch:,}, but {n:,} labelled images; {advice}")
    ensure(batch >= 2 * world, f"--batch-size {batch}: give {2 * world} or more, two images for each process")
    if batch != how.batch_size and "lr" not in by_hand:
        print(f"note: lr {how.lr:g} is for a batch of {how.batch_size:,}; for {batch:,} try --lr {rate * batch:.3g}")
    how = how._replace(**by_hand)
    words = f"{how.optimizer}, batch {how.batch_size}, lr {how.lr:g}, {how.epochs} epochs ({how.source})"
    words += f"; lr {how.lr * how.head:g} for the classifier" * (how.head != 1)
    print(f"protocol {args.protocol}: {words}", flush=True)
    if (steps := how.epochs * n // batch) < 2000:
        print(f"note: these are about {steps:,} steps, which may be too few; --epochs makes more")
    return how


def evaluate(args: argparse.Namespace, config: RunConfig, model: nn.Module, data: Data) -> dict[str, Any]:
    """Fit the classifier that the flags ask for on the training images, and print how well it does on the held-out."""
    ensure(data.labelled, f"--data {config.data}: no class sub-folders with held-out images; give a set with labels")
    device, names, tune = data.train.device, list(data.classes), args.protocol == "finetune"
    network = {"h": model.backbone, "z": model.embed, "pixels": common.pixels}[args.features]
    train = data.train.at(pick_labels(data.train.labels, args.label_fraction, args.seed))
    torch.manual_seed(seed_of(args.seed))
    if args.shuffle_labels:
        train.labels = train.labels[torch.randperm(len(train))]
    print(f"features {args.features}, {len(train):,} labels used" + ", SHUFFLED" * args.shuffle_labels)
    if tune:  # a fresh ResNet: the run's may differ, as by MoCo's BN
        network = common.build_backbone(dataclasses.replace(config, init="random", resume=""))
        network.load_state_dict(model.backbone.state_dict())
        network.fc = getattr(model.backbone, "fc", nn.Identity())
        network = network.to(device, memory_format=torch.channels_last).eval()
    if args.protocol != "features":
        how = setting_of(args, config, len(train))
        classifier = fit_as_published(network, train, len(names), how, config, seed=args.seed, tune=tune)
    bank, rows = embed_readable(network, train, config)
    queries, asked = embed_readable(network, data.test, config)
    bank_labels, labels = train.labels[rows].to(device), data.test.labels[asked].to(device)
    if args.protocol == "features":
        print(f"protocol features: L-BFGS on cached features, l2 {args.l2:g}", flush=True)
        classifier = fit_linear(bank, bank_labels, len(names), args.l2)
    loss, guess = F.cross_entropy(classifier(bank), bank_labels).item(), math.log(len(names))
    if not loss < guess + 1e-4:  # 1e-4 for rounding
        print(f"warning: the classifier's loss {loss:.2f} on the training images is worse than a guess's {guess:.2f}")
    logits = classifier(queries)  # (M, classes)
    hit = logits.topk(min(5, len(names)), dim=1).indices == labels[:, None]  # (M, 5)
    right, count = (x.bincount(minlength=len(names)) for x in (labels[hit[:, 0]], labels))
    result = {"linear_top1": hit[:, 0].float().mean().item(), "linear_top5": hit.any(1).float().mean().item()}
    result |= {"per_class": (right / count).tolist(), "logits": logits}  # NaN for a class without a held-out image
    mean = bank.mean(0) if args.features == "pixels" else 0  # as in the kNN of raw pixels that a run prints
    result["knn_top1"] = common.knn_accuracy(bank - mean, bank_labels, queries - mean, labels)
    if args.protocol == "paper" and result["linear_top1"] < result["knn_top1"]:
        print("warning: the classifier ends below kNN and may need more steps; give more --epochs")
    if data.test.paths:
        print("note: pictures are read in full size here; a run that holds them in memory squeezes them into squares")
    result["a guess"] = (count.max() / len(labels)).item()  # always name the largest class
    for key in ("a guess", "linear_top1", *["linear_top5"] * (len(names) > 5), "knn_top1"):
        print(f"  {key.replace('_top', ' top-').replace('knn', 'kNN'):14}{result[key]:.4f}")
    worst = sorted((a, c) for a, c in zip(result["per_class"], names, strict=True) if not math.isnan(a))[:10]
    words = ", ".join(f"{c} {a:.3f}" for a, c in worst) + f" (the worst 10 of {len(names)})" * (len(names) > 10)
    print(f"  {'per class':14}{words}")
    if args.save and common.share()[0] == 0:
        save_for_torchvision(classifier, network, names, config, args.save)
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Do what the command line asks for. Prints a table; returns its figures, and the logits of the held-out images."""
    args = parse(argv)
    config, model = open_run(args)
    usual = isinstance(getattr(model.backbone, "fc", None), nn.Identity)  # neither resnet8 nor h of length 1
    ensure(usual or not args.save, f"--save: this {config.backbone}'s h is not a torchvision ResNet's; leave it out")
    if args.untrained:
        torch.manual_seed(seed_of(config.seed))
        model = type(model)(dataclasses.replace(config, resume="")).eval()
    if args.protocol == "features":
        config.resident_gb = 0.0  # a folder is streamed: each picture is read once, in full size
    data = images.load(config, common.pick_device(args.device))
    model = model.to(data.train.device, memory_format=torch.channels_last)
    state = f"before training ({config.init} weights)" if args.untrained else "trained"
    print(f"{config.method()}, {config.backbone} {state}" + ", frozen" * (args.protocol != "finetune"))
    print(data.describe(), flush=True)
    return evaluate(args, config, model, data)


if __name__ == "__main__":
    with common.exit_status():
        main()
