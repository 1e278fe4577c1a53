"""What a frozen backbone is worth: linear classifiers, weighted kNN, and what its features keep.

    python linear_eval.py runs/simclr                            linear top-1 and top-5, kNN, on the run's own data
    python linear_eval.py runs/simclr --protocol paper           SGD on crops and flips, as the method's paper does it
    python linear_eval.py runs/simclr --label-fraction 0.01      with the labels of 1% of the training images
    python linear_eval.py runs/simclr --features z               on z = g(h) instead of h
    python linear_eval.py runs/simclr --data /other/photos       on another data set (transfer)
    python linear_eval.py runs/simclr --probe all                what h keeps and g(h) loses (SimCLR, table 3)
    python linear_eval.py runs/simclr --export backbone.pth      the backbone alone, for torchvision

The backbone stays frozen, its BN in eval mode. `--protocol features`, the default: every image passes it once, as a
central view; a linear classifier is then fitted to the cached features to convergence (L-BFGS), so there is no learning
rate. The reported figures are those of the held-out images after the fit: no epoch is chosen on them.

Controls: --untrained (the same network before training), --features pixels, --shuffle-labels (must give chance).
"""

import argparse
import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import InputError, RunConfig

MODELS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam", "supcon": "SupCon"}  # file -> model


class Published(NamedTuple):
    """How a paper trains its linear classifier: batch, epochs, the lr at that batch, and how the lr falls."""

    optimizer: str  # all with momentum 0.9 and no weight decay
    batch_size: int
    epochs: int
    lr: float
    steps: tuple[float, ...]  # the parts of the run after which lr is multiplied by `factor`; () = cosine to 0
    factor: float
    crop: float  # least area of a training crop
    source: str


PUBLISHED = {
    "simclr": Published("nesterov", 4096, 90, 1.6, (), 0, 0.08, "SimCLR appendix B.6: 0.1 B/256, no warm-up"),
    "moco": Published("sgd", 256, 100, 30.0, (0.6, 0.8), 0.1, 0.08, "MoCo v1 section 4.1, the same in v2"),
    "byol": Published("nesterov", 1024, 80, 0.8, (), 0, 0.08, "BYOL appendix C.1; 0.2 B/256 of the lr it chooses from"),
    "simsiam": Published("lars", 4096, 90, 1.6, (), 0, 0.08, "the authors' code: 0.1 B/256 (SimSiam's appendix: 0.02)"),
    "supcon": Published("sgd", 512, 100, 5.0, (0.6, 0.75, 0.9), 0.2, 0.2, "the authors' code for SupCon on CIFAR"),
}
PROBES = {  # probe -> kinds of pictures and the share of each; SimCLR, table 3
    "grayscale": ("colour against grey", (0.8, 0.2)),  # grey with the probability that the augmentation has
    "rotation": ("0, 90, 180, 270 degrees", (0.25,) * 4),
    "corrupted": ("original against noise", (0.5, 0.5)),
    "sobel": ("original against Sobel", (0.5, 0.5)),
}
PAPER = {"grayscale": (80.0, 99.3, 97.4), "rotation": (25.0, 67.6, 25.6)}  # chance, h, g(h): ImageNet, ResNet-50
PAPER |= {"corrupted": (50.0, 99.5, 59.6), "sobel": (50.0, 96.6, 56.3)}
PROBE_IMAGES = 10_000  # of each split, at most


def load_run(folder: str) -> tuple[RunConfig, nn.Module]:
    """The config and the trained model of a run's folder. Raises `InputError` for anything that is not one."""
    path = Path(folder) / "checkpoint.pt"
    state = common.load_checkpoint(path)
    name = state["method"]
    if name not in MODELS or importlib.util.find_spec(name) is None:
        raise InputError(f"{path}: a run of {name}; put {name}.py beside linear_eval.py")
    method = importlib.import_module(name)
    known = common.flags(method.Config)
    try:
        config = method.Config(**{k: v for k, v in state["config"].items() if k in known})
        model = getattr(method, MODELS[state["method"]])(config)
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError):
        raise InputError(f"{path} is not a whole checkpoint of {state['method']}; train again") from None
    return config, model


def pick_labels(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of `fraction` of the labelled images, the same share of every class and at least one, by a seed."""
    rng = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        if label >= 0:
            mine = (labels == label).nonzero().squeeze(1)
            count = max(1, round(len(mine) * fraction))
            chosen.append(mine[torch.randperm(len(mine), generator=rng)[:count]])
    if not chosen:
        raise InputError("no training image has a label; give a set with class sub-folders")
    return torch.cat(chosen).sort().values


# ------------------------------------------------------------------------------------------------ the classifiers


def fit_linear(x: Tensor, y: Tensor, classes: int, l2: float = 1e-3, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: minimise mean cross-entropy + l2/2 |W|^2 by L-BFGS from zero.

    x: (N, d), y: (N,) in 0..classes-1. Returns W (d, classes) and b (classes,). Convex, so the result is unique.
    """
    w = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    b = torch.zeros(classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([w, b], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ w + b, y) + l2 / 2 * w.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return w.detach(), b.detach()


def fit_mlp(x: Tensor, y: Tensor, classes: int, width: int, seed: int, epochs: int = 20) -> nn.Module:
    """A classifier of x (N, d) with one hidden layer: SimCLR's probes are MLPs, of a size it does not give."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, classes)).to(x.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    steps = epochs * -(-len(x) // 128)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
            decay.step()
    return network


def fit_as_published(
    network: Callable, data: common.Data, config: RunConfig, chosen: Tensor, labels: Tensor, how: Published
) -> nn.Linear:
    """A linear classifier by SGD on random crops (area `how.crop` to 1) and flips of the images `chosen` (N,).

    `labels` (N,) are theirs, on the device. The lr is scaled when fewer than `how.batch_size` images are there. Raises
    `RunFailure` when the loss is no longer finite.
    """
    batch = min(how.batch_size, len(chosen))
    lr, total = how.lr * batch / how.batch_size, how.epochs * -(-len(chosen) // batch)
    with torch.no_grad():
        width = network(torch.zeros(2, 3, config.image_size, config.image_size, device=labels.device)).shape[1]
    classifier = nn.Linear(width, len(data.classes)).to(labels.device)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    if how.optimizer == "lars":
        optimizer = common.LARS(classifier.parameters(), lr=lr)  # the bias too
    else:
        optimizer = torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9, nesterov=how.optimizer == "nesterov")
    step = 0
    for epoch in range(how.epochs):
        order = torch.randperm(len(chosen)).split(batch)
        seed = int(torch.randint(2**31, ()))  # of the workers that stream
        crops = data.train.crops(
            [chosen[i] for i in order], config.image_size, 1, (how.crop, 1.0), seed, config.workers
        )
        for index, (x,) in zip(order, crops, strict=True):
            x = common.where_drawn(x, common.coin(len(x), 0.5), common.flip)
            with torch.no_grad():
                h = torch.cat([network(part).float() for part in x.split(512)])
            for group in optimizer.param_groups:  # steps are by the epoch, the cosine is by the step
                group["lr"] = common.cosine_lr(step, total, 0, lr)
                if how.steps:
                    group["lr"] = lr * how.factor ** sum(epoch >= round(at * how.epochs) for at in how.steps)
            optimizer.zero_grad()
            loss = F.cross_entropy(classifier(h), labels[index.to(labels.device)])
            loss.backward()
            optimizer.step()
            step += 1
        last = loss.item()
        if not math.isfinite(last):
            raise common.RunFailure(
                f"the classifier's loss is {last} in epoch {epoch + 1}; give a lower --lr than {lr:g}"
            )
        print(f"  epoch {epoch + 1}/{how.epochs}  loss {last:.4f}", flush=True)
    if last > math.log(len(data.classes)):
        print(f"warning: the last loss is worse than a guess's, {math.log(len(data.classes)):.2f}; give a lower --lr")
    return classifier


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


def evaluate(train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor, classes: int, l2: float) -> dict:
    """`scores` of a linear classifier, and kNN top-1, on features (N, d) and (M, d), each over the M test images."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)  # of the training features
    w, b = fit_linear((train - mean) / std, train_labels, classes, l2)
    result = scores((test - mean) / std @ w + b, labels, classes)
    return result | {"knn_top1": common.knn_accuracy(train, train_labels, test, labels)}


# ------------------------------------------------------------------------------------------------- what h keeps


def alter(x: Tensor, probe: str, kind: Tensor) -> Tensor:
    """The pictures x (N, 3, H, W), those whose `kind` (N,) is not 0 altered: what the probe has to tell."""
    if probe == "rotation":
        return common.rotate(x, kind)
    noise = lambda y: common.gaussian_noise(y, torch.full((len(y),), 0.1))  # noqa: E731  (its strength is ours)
    op = {"grayscale": common.to_grey, "corrupted": noise, "sobel": common.sobel}[probe]
    return common.where_drawn(x, kind == 1, op)


@torch.no_grad()
def embed_altered(
    model: nn.Module, images: common.Images, config: RunConfig, probe: str, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """h and z = g(h) of altered central views of up to PROBE_IMAGES images, and which kind each is, (N,)."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for the noise
    index = torch.randperm(len(images), generator=rng)[:PROBE_IMAGES]
    ends = torch.tensor(PROBES[probe][1]).cumsum(0)[:-1]  # exact shares, so that chance is what the table says
    kind = torch.searchsorted(ends, torch.randperm(len(index), generator=rng) / len(index), right=True)
    pairs, kept = index.split(256), []
    hook = model.backbone.register_forward_hook(lambda _, __, h: kept.append(h.float()))
    views = images.centered(pairs, config.image_size, config.workers)
    z = torch.cat([model(alter(x, probe, k)).float() for x, k in zip(views, kind.split(256), strict=True)])
    hook.remove()
    return {"h": torch.cat(kept), "z": z}, kind


def run_probes(
    model: nn.Module, data: common.Data, config: RunConfig, probes: list[str], features: list[str], seed: int
) -> dict[str, dict[str, float]]:
    """Held-out accuracy of an MLP that tells which kind of picture it was, from h or z; and of always guessing."""
    result = {}
    for probe in probes:
        known, kind = embed_altered(model, data.train, config, probe, seed)
        asked, truth = embed_altered(model, data.test, config, probe, seed + 1)
        row = {"chance": (truth.bincount().max() / len(truth)).item()}
        for name in features:
            mean, std = known[name].mean(0), known[name].std(0).clamp(min=1e-6)
            y = kind.to(mean.device)
            mlp = fit_mlp((known[name] - mean) / std, y, len(PROBES[probe][1]), model.backbone.feature_dim, seed)
            with torch.no_grad():
                guess = mlp((asked[name] - mean) / std).argmax(1).cpu()
            row[name] = (guess == truth).float().mean().item()
        result[probe] = row
    return result


# --------------------------------------------------------------------------------------------------- the script


def export(config: RunConfig, model: nn.Module, path: Path) -> None:
    """Write the backbone as a torchvision state_dict (no `fc`). Raises `InputError` for our own resnet8."""
    if config.backbone == "resnet8":
        raise InputError("--export: resnet8 is not a torchvision network; runs/.../backbone.pt holds its weights")
    if not path.parent.is_dir():
        raise InputError(f"--export {path}: no folder {path.parent}")
    common.save_whole(model.backbone.state_dict(), path)
    print(f"{path}: {config.backbone} of {config.METHOD}, for torchvision.models.{config.backbone}() without its fc;")
    print("it takes pictures in [0, 1], without torchvision's usual mean and std taken off")
    if model.backbone.conv1.kernel_size == (3, 3):
        print("its first layers are the small ones: set model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)")
        print("and model.maxpool = torch.nn.Identity() before loading it; for a detector train with --stem imagenet")


def draw_confusion(confusion: Tensor, names: list[str], path: Path) -> None:
    """The confusion matrix as a picture; each row sums to 1."""
    from matplotlib.figure import Figure

    side = min(16, 3 + 0.3 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 40:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="taken for", ylabel="class")
    figure.savefig(path, dpi=110)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", help="a run's folder, such as runs/simclr")
    add("--data", help="another data set: a name or a folder (default: the run's own)")
    add("--data-dir", help="where downloads are kept (default: the run's own)")
    add("--features", choices=("h", "z", "pixels"), help="h = backbone, z = g(h), pixels = a control (default h)")
    add("--protocol", choices=("features", "paper"), default="features", help="on cached features | SGD as published")
    add("--epochs", type=int, help="of --protocol paper (default: the method's published setting)")
    add("--lr", type=float, help="of --protocol paper (default: as published)")
    add("--label-fraction", type=float, default=1.0, help="share of the training labels (default 1)")
    add("--l2", type=float, help="weight penalty of the classifier on cached features (default 0.001)")
    add("--probe", choices=("class", *PROBES, "all"), default="class", help="what is read from the features; all: but "
        "class, from h and from z")  # fmt: skip
    add("--shuffle-labels", action="store_true", help="a control: must give chance")
    add("--untrained", action="store_true", help="the same network before training, as a control")
    add("--confusion", type=Path, metavar="PNG", help="write the confusion matrix as a picture")
    add("--export", type=Path, metavar="PATH", help="write the backbone for torchvision, and stop")
    add("--seed", type=int, default=0, help="which labels --label-fraction takes, and all else that is random")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if not 0 < args.label_fraction <= 1:
        raise InputError(f"--label-fraction {args.label_fraction}: must be > 0 and at most 1")
    for name, bound in (("l2", ">= 0"), ("lr", "> 0"), ("epochs", ">= 1"), ("seed", ">= 0")):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and common.BOUNDS[bound](value)):
            raise InputError(f"{common.dashed(name)} {value}: must be {bound}")

    def refuse(names: list[str], where: str) -> None:  # a flag that would do nothing
        for name in names:
            if getattr(args, name) != parser.get_default(name):
                raise InputError(f"{common.dashed(name)} does nothing {where}; leave it out")

    classifier, published = ["label_fraction", "shuffle_labels", "confusion"], ["epochs", "lr"]
    if args.export:
        others = ["data", "data_dir", "features", "protocol", "probe", "l2", "seed", "device"]
        refuse([*others, *classifier, *published], "with --export, which evaluates nothing")
    if args.probe != "class":
        refuse([*classifier, *published, "protocol", "l2"], f"with --probe {args.probe}")
        if args.features == "pixels" or (args.features and args.probe == "all"):
            raise InputError(f"--features {args.features}: --probe {args.probe} reads h and z")
    if args.protocol == "paper":
        refuse(["l2"], "with --protocol paper")
    else:
        refuse(published, "without --protocol paper")
    if args.features == "pixels":
        refuse(["untrained"], "with --features pixels")
    for name in ("confusion", "export"):
        if getattr(args, name) and getattr(args, name).is_dir():
            raise InputError(f"--{name} {getattr(args, name)}: a folder; give the name of a file")
    if args.confusion:
        if args.confusion.suffix not in (".png", ".pdf", ".svg"):
            raise InputError(f"--confusion {args.confusion}: must end in .png, .pdf or .svg")
        if not args.confusion.absolute().parent.is_dir():
            raise InputError(f"--confusion {args.confusion}: no folder {args.confusion.parent}")
        if not importlib.util.find_spec("matplotlib"):
            raise InputError("--confusion: matplotlib is not installed (pip install matplotlib)")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the evaluation that the command line asks for; prints a table and returns its figures."""
    args = parse(argv)
    config, model = load_run(args.run)
    if args.untrained:
        torch.manual_seed(config.seed)
        model = type(model)(config)
    model.eval()
    if args.export:
        export(config, model, args.export)
        return {}
    given = {k: v for k, v in (("data", args.data), ("data_dir", args.data_dir)) if v is not None}
    config = type(config)(**(asdict(config) | given | {"device": args.device}))
    device = common.pick_device(config)
    data = common.load_data(config, device)
    model = model.to(device, memory_format=torch.channels_last)
    name = f"{config.METHOD}, {'untrained' if args.untrained else 'trained'} {config.backbone}, frozen"
    return (class_of if args.probe == "class" else kinds_of)(args, config, model, data, name)


def need_head(model: nn.Module, features: str) -> None:
    if features == "z" and isinstance(model.projector, nn.Identity):
        raise InputError("--features z: this network has no projection head, so z is h; leave it out")


def class_of(args: argparse.Namespace, config: RunConfig, model: nn.Module, data: common.Data, name: str) -> dict:
    """`--probe class`: how well a linear classifier and kNN tell the classes."""
    if not data.labelled():
        raise InputError(f"--data {config.data}: no class sub-folders with held-out images; give a set with labels")
    features = args.features or "h"
    need_head(model, features)
    network = {"h": model.backbone, "z": model, "pixels": common.pixels}[features]
    chosen = pick_labels(data.train.labels, args.label_fraction, args.seed)
    device = next(model.parameters()).device
    train_labels, labels = data.train.labels[chosen].to(device), data.test.labels.to(device)
    torch.manual_seed(args.seed)
    if args.shuffle_labels:
        train_labels = train_labels[torch.randperm(len(train_labels)).to(device)]

    print(f"{name}, features {features}\n{data.describe()}; {len(chosen):,} labels used", flush=True)
    train, test = common.embed(network, data.train, config, chosen), common.embed(network, data.test, config)
    mean = train.mean(0) if features == "pixels" else 0  # taken off, as in the table that ends a run
    known, asked, shuffled = train - mean, test - mean, "; LABELS SHUFFLED" * args.shuffle_labels
    if args.protocol == "features":
        l2 = 1e-3 if args.l2 is None else args.l2
        print(f"protocol features: L-BFGS on cached features ({train.shape[1]}-d), l2 {l2:g}{shuffled}")
        result = evaluate(known, train_labels, asked, labels, len(data.classes), l2)
    else:
        changes = {k: getattr(args, k) for k in ("epochs", "lr") if getattr(args, k) is not None}
        setting = PUBLISHED[config.METHOD]._replace(**changes)
        how = f"{setting.optimizer}, batch {setting.batch_size}, lr {setting.lr:g}, {setting.epochs} epochs"
        how += f" ({setting.source}{'; changed by hand' * bool(changes)})"
        how += f"; batch and lr lowered to the {len(chosen)} images" * (len(chosen) < setting.batch_size)
        print(f"protocol paper: {how}{shuffled}", flush=True)
        if (steps := setting.epochs * -(-len(chosen) // setting.batch_size)) < 2000:
            few = "where the published ones take thousands, so that the classifier may stop short of its best"
            print(f"note: {steps:,} steps in all, {few}; --protocol features has no steps", flush=True)
        classifier = fit_as_published(network, data, config, chosen, train_labels, setting)
        with torch.no_grad():
            result = scores(classifier(test), labels, len(data.classes))
        result["knn_top1"] = common.knn_accuracy(known, train_labels, asked, labels)

    print(f"  linear top-1  {result['linear_top1']:.4f}")
    if len(data.classes) > 5:
        print(f"  linear top-5  {result['linear_top5']:.4f}")
    print(f"  kNN top-1     {result['knn_top1']:.4f}")
    worst = sorted((a, c) for a, c in zip(result["per_class"], data.classes, strict=True) if not math.isnan(a))[:10]
    of = f" (the worst 10 of {len(data.classes)})" * (len(data.classes) > 10)
    print(f"  per class     {', '.join(f'{c} {a:.3f}' for a, c in worst)}{of}")
    if args.confusion:
        draw_confusion(result["confusion"], data.classes, args.confusion)
    return result


def kinds_of(args: argparse.Namespace, config: RunConfig, model: nn.Module, data: common.Data, name: str) -> dict:
    """`--probe grayscale` and the like: what h keeps and g(h) loses. Needs held-out images, but no labels."""
    if data.test is None:
        raise InputError(f"--data {config.data}: no held-out images; add a test folder, or class sub-folders")
    probes = list(PROBES) if args.probe == "all" else [args.probe]
    features = ["h", "z"] if args.probe == "all" else [args.features or "h"]
    need_head(model, features[-1])
    result = run_probes(model, data, config, probes, features, args.seed)
    used = [min(PROBE_IMAGES, len(images)) for images in (data.train, data.test)]
    print(f"{name}\n{data.describe()}; an MLP is fitted to {used[0]:,} and asked about {used[1]:,}")
    if min(used) < 2000:
        print("warning: an MLP needs some 2,000 images of each split before these figures mean something")
    print()
    head = {"h": "h", "z": "g(h)"}
    print(f"  {'':34}{'chance':>8}" + "".join(f"{head[f]:>8}" for f in features) + "     the paper's")
    for probe, row in result.items():
        paper = " / ".join(f"{v:g}" for v in PAPER[probe])
        values = "".join(f"{100 * v:8.1f}" for v in row.values())
        print(f"  {probe:10}{PROBES[probe][0]:24}{values}     {paper}")
    print(
        "\nThe paper's networks (ImageNet, ResNet-50, h and g(h) both 2048-d) had rotation, noise or Sobel among their"
    )
    print("training augmentations in those rows, so that g(h) learned to lose it; with SimCLR see --augment.")
    return result


if __name__ == "__main__":
    with common.exit_status():
        main()
