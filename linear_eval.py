"""What a frozen backbone is worth: linear top-1 and top-5, weighted kNN, each class, and what its features keep.

    python linear_eval.py runs/simclr                            top-1, top-5, kNN, per class, on the run's own data
    python linear_eval.py runs/simclr --protocol paper           SGD on crops and flips, as the method's paper does it
    python linear_eval.py runs/simclr --label-fraction 0.01      with the labels of 1% of the training images
    python linear_eval.py runs/simclr --features z               on z = g(h) instead of h
    python linear_eval.py runs/simclr --data /other/photos       on another data set (transfer)
    python linear_eval.py runs/simclr --probe all                what h keeps and g(h) loses (SimCLR, table 3)
    python linear_eval.py runs/simclr --export backbone.pth      the backbone alone, for torchvision

The backbone stays frozen, its BN in eval mode. `--protocol features`, the default: every image passes it once, as a
central view; a linear classifier is then fitted to the cached features to convergence (L-BFGS), so there is no learning
rate. `--protocol paper` is how the method's authors train it; for SupCon it is the second stage of the method. The
reported figures are those of the held-out images after the fit: no epoch is chosen on them.

Controls: --untrained (the same network before training), --features pixels, --shuffle-labels (must give chance).
"""

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import images
from common import RunConfig, dashed
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
PROBES = {  # probe -> what is told apart, the share of each kind, and the paper's chance, h and g(h)
    "grayscale": ("colour against grey", (0.8, 0.2), (80.0, 99.3, 97.4)),  # grey as often as the augmentation makes it
    "rotation": ("0, 90, 180, 270 degrees", (0.25,) * 4, (25.0, 67.6, 25.6)),
    "corrupted": ("original against noise", (0.5, 0.5), (50.0, 99.5, 59.6)),
    "sobel": ("original against Sobel", (0.5, 0.5), (50.0, 96.6, 56.3)),
}
PROBE_IMAGES = 10_000  # of each split, at most


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
    common.warn_of_guess(F.cross_entropy(x @ w.detach() + b.detach(), y).item(), classes)
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
    with torch.no_grad():
        common.warn_of_guess(F.cross_entropy(network(x), y).item(), classes)
    return network


def fit_as_published(
    network: Callable, data: Data, config: RunConfig, chosen: Tensor, labels: Tensor, width: int, how: Published
) -> nn.Linear:
    """A linear classifier by SGD on random crops (area `how.crop` to 1) and flips of the images `chosen` (N,).

    `labels` (N,) are theirs, on the device; `network` gives features of this `width`. The lr is scaled when fewer than
    `how.batch_size` images are there. Several processes share each batch. Raises `RunFailure` when the loss is no
    longer finite.
    """
    rank, world = images.share()
    batch = min(how.batch_size, len(chosen))
    lr, total, step = how.lr * batch / how.batch_size, how.epochs * -(-len(chosen) // batch), 0
    classifier = nn.Linear(width, len(data.classes)).to(labels.device)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    classify = common.average_gradients(classifier)
    common.draw_apart()
    if how.optimizer == "lars":
        optimizer = common.LARS(classifier.parameters(), lr=lr)  # the bias too
    else:
        more = {"weight_decay": how.weight_decay, "nesterov": how.optimizer == "nesterov"}
        optimizer = torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9, **more)
    for epoch in range(how.epochs):
        order = common.same(torch.randperm(len(chosen))).split(batch)
        weights = [len(rows[rank::world]) * world / len(rows) for rows in order]  # of its mean among the processes'
        order = [rows[min(rank, len(rows) - 1) :: world] for rows in order]  # a process without a row has one, weight 0
        seed, crop = int(torch.randint(2**31, ())), [(config.image_size, (how.crop, 1.0))]  # the workers' seed
        crops = data.train.views([chosen[i] for i in order], crop, seed, config.workers)
        for index, weight, (x,) in zip(order, weights, crops, strict=True):
            x = images.normalize(images.sometimes(x, 0.5, images.flip))
            with torch.no_grad():
                h = torch.cat([network(part).float() for part in x.split(512)])  # (batch, width)
            loss = F.cross_entropy(classify(h), labels[index.to(labels.device)]) * weight
            optimizer.zero_grad()
            loss.backward()
            drops = sum(epoch >= round(at * how.epochs) for at in how.steps)  # by the epoch; the cosine is by the step
            common.set_lr(optimizer, lr * how.factor**drops if how.steps else common.cosine_lr(step, total, 0, lr))
            optimizer.step()
            step += 1
        last, where = common.over_all(loss.detach()).item() / world, f"epoch {epoch + 1}/{how.epochs}"
        if not math.isfinite(last):
            raise common.RunFailure(f"the classifier's loss is {last} in {where}; give a lower --lr than {lr:g}")
        print(f"  {where}  loss {last:.4f}", flush=True)
    common.warn_of_guess(last, len(data.classes))
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


def gaussian_noise(x: Tensor, sigma: float | Tensor = 0.1) -> Tensor:
    """Add normal noise of deviation `sigma`, a number or (N, 1, 1, 1), clamped to [0, 1]. SimCLR gives no strength."""
    return (x + sigma * torch.randn(x.shape).to(x.device)).clamp_(0, 1)


def sobel(x: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient of the grey picture, in three equal channels, clamped to 1."""
    edge = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device)
    both = F.conv2d(F.pad(images.luma(x), (1, 1, 1, 1), mode="reflect"), torch.stack([edge, edge.T])[:, None])
    return both.norm(dim=1, keepdim=True).clamp_(max=1).expand_as(x)


def alter(x: Tensor, probe: str, kind: Tensor) -> Tensor:
    """The pictures x (N, 3, H, W) in [0, 1], those whose `kind` (N,) is not 0 altered: what the probe has to tell."""
    if probe == "rotation":
        return images.rotate(x, kind)
    op = {"grayscale": images.grey, "corrupted": gaussian_noise, "sobel": sobel}[probe]
    return images.where(x, kind == 1, op)


@torch.no_grad()
def embed_altered(network: Callable, split: Images, config: RunConfig, probe: str, seed: int) -> tuple[Tensor, Tensor]:
    """Features of altered central views of up to PROBE_IMAGES images, and which kind each is, (N,)."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for the noise
    common.draw_apart()
    index = torch.randperm(len(split), generator=rng)[:PROBE_IMAGES]
    ends = torch.tensor(PROBES[probe][1]).cumsum(0)[:-1]  # exact shares, so that chance is what the table says
    kind = torch.searchsorted(ends, torch.randperm(len(index), generator=rng) / len(index), right=True)
    return common.embed(network, split, config, index, lambda x, rows: alter(x, probe, kind[rows])), kind


def run_probes(
    networks: dict[str, Callable], data: Data, config: RunConfig, probes: list[str], width: int, seed: int
) -> dict[str, dict[str, float]]:
    """Held-out accuracy of an MLP of this `width` that tells from the features of each network which kind of picture it
    was; and of always guessing the most frequent."""
    result = {}
    for probe in probes:
        for name, network in networks.items():
            known, kind = embed_altered(network, data.train, config, probe, seed)
            asked, truth = embed_altered(network, data.test, config, probe, seed + 1)
            mean, std = known.mean(0), known.std(0).clamp(min=1e-6)
            mlp = fit_mlp((known - mean) / std, kind.to(mean.device), len(PROBES[probe][1]), width, seed)
            with torch.no_grad():
                guess = mlp((asked - mean) / std).argmax(1).cpu()
            row = result.setdefault(probe, {"chance": (truth.bincount().max() / len(truth)).item()})
            row[name] = (guess == truth).float().mean().item()
    return result


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
    add("--l2", type=float, default=1e-3, help="weight penalty of the classifier on cached features (default 0.001)")
    add("--probe", choices=("class", *PROBES, "all"), default="class", help="what is read from the features; all: but "
        "class, from h and from z")  # fmt: skip
    add("--shuffle-labels", action="store_true", help="a control: must give chance")
    add("--untrained", action="store_true", help="the same network before training, as a control")
    add("--confusion", type=Path, metavar="PNG", help="write the confusion matrix as a picture")
    add("--export", type=Path, metavar="PATH", help="write the backbone for torchvision, and stop")
    add("--seed", type=int, default=0, help="which labels --label-fraction takes, and all else that is random")
    add("--device", default="auto", help="any torch device; auto = cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    for name, ok, words in (
        ("label_fraction", 0 < args.label_fraction <= 1, "above 0 and at most 1"),
        ("lr", args.lr is None or 0 < args.lr < math.inf, "above 0"),
        ("l2", 0 <= args.l2 < math.inf, "at least 0"),
        ("epochs", args.epochs is None or args.epochs >= 1, "at least 1"),
        ("seed", 0 <= args.seed < 2**31, "at least 0 and below 2^31"),
    ):
        ensure(ok, f"{dashed(name)} {getattr(args, name)}: must be {words}")

    classifier, published = ["label_fraction", "shuffle_labels", "confusion"], ["epochs", "lr"]
    useless = [  # flags that would do nothing, and where
        (args.export, vars(args).keys() - {"run", "untrained", "export"}, "with --export, which evaluates nothing"),
        (args.probe != "class", [*classifier, *published, "protocol", "l2"], f"with --probe {args.probe}"),
        (args.probe == "all", ["features"], "with --probe all, which reads h and z"),
        (args.protocol == "paper", ["l2"], "with --protocol paper"),
        (args.protocol != "paper", published, "without --protocol paper"),
        (args.features == "pixels", ["untrained"], "with --features pixels"),
    ]
    for active, names, where in useless:
        for name in sorted(names) if active else ():
            unset = getattr(args, name) == parser.get_default(name)
            ensure(unset, f"{dashed(name)} does nothing {where}; leave it out")
    ensure(args.probe == "class" or args.features != "pixels", f"--features pixels: --probe {args.probe} reads h or z")
    for name in ("confusion", "export"):
        if path := getattr(args, name):
            ensure(not path.is_dir(), f"--{name} {path}: a folder; give the name of a file")
            ensure(path.absolute().parent.is_dir(), f"--{name} {path}: no folder {path.parent}")
    if path := args.confusion:
        ensure(path.suffix in (".png", ".pdf", ".svg"), f"--confusion {path}: must end in .png, .pdf or .svg")
        ensure(importlib.util.find_spec("matplotlib"), "--confusion: matplotlib is not there; pip install it")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the evaluation that the command line asks for; prints a table and returns its figures."""
    args = parse(argv)
    config, model = common.load_run(args.run)
    if args.untrained:
        torch.manual_seed(config.seed)
        model = type(model)(config)
    model.eval()
    if args.export:
        export(config, model, args.export)
        return {}
    headless = isinstance(model.projector, nn.Identity) and (args.probe == "all" or args.features == "z")
    ensure(not headless, "z: this network has no projection head, so z is h; ask for h alone")
    config.data, config.data_dir = args.data or config.data, args.data_dir or config.data_dir
    device = common.pick_device(args.device)
    data = common.load_data(config, device)
    model = model.to(device, memory_format=torch.channels_last)
    print(f"{config.method()}, {'untrained' if args.untrained else 'trained'} {config.backbone}, frozen")
    print(data.describe(), flush=True)
    return (class_of if args.probe == "class" else kinds_of)(args, config, model, data)


def class_of(args: argparse.Namespace, config: RunConfig, model: nn.Module, data: Data) -> dict[str, Any]:
    """`--probe class`: how well a linear classifier and kNN tell the classes."""
    ensure(data.labelled, f"--data {config.data}: no class sub-folders with held-out images; give a set with labels")
    features = args.features or "h"
    network = {"h": model.backbone, "z": model.embed, "pixels": common.pixels}[features]
    chosen = pick_labels(data.train.labels, args.label_fraction, args.seed)
    device = next(model.parameters()).device
    train_labels, labels, count = data.train.labels[chosen].to(device), data.test.labels.to(device), len(data.classes)
    torch.manual_seed(args.seed)
    if args.shuffle_labels:
        train_labels = train_labels[torch.randperm(len(train_labels)).to(device)]

    train, test = common.embed(network, data.train, config, chosen), common.embed(network, data.test, config)
    mean = train.mean(0) if features == "pixels" else 0  # taken off, as in the line that ends a run
    known, asked, width = train - mean, test - mean, train.shape[1]
    print(f"features {features} ({width}-d), {len(chosen):,} labels used" + ", SHUFFLED" * args.shuffle_labels)
    if args.protocol == "features":
        print(f"protocol features: L-BFGS on cached features, l2 {args.l2:g}", flush=True)
        result = evaluate(known, train_labels, asked, labels, count, args.l2)
    else:
        changes = {k: getattr(args, k) for k in ("epochs", "lr") if getattr(args, k) is not None}
        setting = PUBLISHED[config.method()]._replace(**changes)
        how = f"{setting.optimizer}, batch {setting.batch_size}, lr {setting.lr:g}, {setting.epochs} epochs"
        how += f" ({setting.source}{'; changed by hand' * bool(changes)})"
        how += f"; batch and lr lowered to the {len(chosen)} images" * (len(chosen) < setting.batch_size)
        print(f"protocol paper: {how}", flush=True)
        if (steps := setting.epochs * -(-len(chosen) // setting.batch_size)) < 2000:
            print(f"note: only {steps:,} steps in all, the published ones are thousands; --protocol features has none")
        classifier = fit_as_published(network, data, config, chosen, train_labels, width, setting)
        with torch.no_grad():
            result = scores(classifier(test), labels, count)
        result["knn_top1"] = common.knn_accuracy(known, train_labels, asked, labels)

    print(f"  a guess       {data.guess:.4f}  (the largest class)\n  linear top-1  {result['linear_top1']:.4f}")
    if count > 5:
        print(f"  linear top-5  {result['linear_top5']:.4f}")
    print(f"  kNN top-1     {result['knn_top1']:.4f}  (k = {common.knn_k(train_labels)})")
    worst = sorted((a, c) for a, c in zip(result["per_class"], data.classes, strict=True) if not math.isnan(a))[:10]
    print(f"  per class     {', '.join(f'{c} {a:.3f}' for a, c in worst)}" + f" (worst 10 of {count})" * (count > 10))
    if args.confusion and images.share()[0] == 0:
        draw_confusion(result["confusion"], data.classes, args.confusion)
    return result


def kinds_of(args: argparse.Namespace, config: RunConfig, model: nn.Module, data: Data) -> dict[str, Any]:
    """`--probe grayscale` and the like: what h keeps and g(h) loses. Needs held-out images, but no labels."""
    ensure(data.test, f"--data {config.data}: no held-out images; add a test folder, or class sub-folders")
    networks = {"h": model.backbone, "z": model.embed}
    probes = list(PROBES)
    if args.probe != "all":
        probes, asked = [args.probe], args.features or "h"
        networks = {asked: networks[asked]}
    used = [min(PROBE_IMAGES, len(split)) for split in (data.train, data.test)]
    print(f"an MLP is fitted to {used[0]:,} and asked about {used[1]:,}", flush=True)
    if min(used) < 2000:
        print("warning: an MLP needs some 2,000 images of each split before these figures mean something")
    result = run_probes(networks, data, config, probes, model.backbone.feature_dim, args.seed)
    heads = "".join(f"{'g(h)' if name == 'z' else name:>8}" for name in networks)
    print(f"\n  {'':34}{'chance':>8}{heads}     the paper's")
    for probe, row in result.items():
        what, _, paper = PROBES[probe]
        values = "".join(f"{100 * v:8.1f}" for v in row.values())
        print(f"  {probe:10}{what:24}{values}     {' / '.join(f'{v:g}' for v in paper)}")
    print("\nThe paper's networks (ImageNet, ResNet-50, h and g(h) 2048-d) had rotation, noise or Sobel among their")
    print("augmentations in those rows, so that g(h) learned to lose it, as benchmarks/augmentations.py can.")
    return result


if __name__ == "__main__":
    with common.exit_status():
        main()
