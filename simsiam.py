"""SimSiam: Exploring Simple Siamese Representation Learning.

Chen, He, CVPR 2021, https://arxiv.org/abs/2011.10566

Two views of each image are drawn. A predictor has to say from one view's output what the other's is, and no gradient
flows through the other. There are no negatives, no momentum encoder and no large batch; without the stop-gradient
all outputs collapse to one:

    z_i = f(x_i)    p_i = h(z_i)    f is the backbone and a projection MLP                            (section 3)
    D(p, z) = -(p / |p|) . (z / |z|)                                                                  (equation 1)
    L = 1/2 D(p_1, stopgrad(z_2)) + 1/2 D(p_2, stopgrad(z_1))      a mean over N images, -1 to 1      (equation 4)

The projection MLP is thrown away: the backbone's output is the representation (the other files' h; not the predictor).

    paper                      here                                flag
    f                          model.backbone, .projector          --backbone, --projection-dim, --projector-layers
    h, its absence (table 1)   model.predictor                     --predictor, --predictor-lr, --predictor-dim
    stopgrad (figure 2)        stop_gradient                       --no-stop-gradient
    D (section 4.5)            DISTANCES                           --similarity
    N (table 2)                config.batch_size                   --batch-size
    BN in the heads (table 3)  layer                               --head-bn
    symmetry (section 4.6)     PAIRS                               --symmetry
    eta_x, k SGD steps (5.2)   Cache                               --alternate-every
    eta_x, its mean (5.2)      Bank                                --target moving-average, --target-momentum

    python simsiam.py                                       the demo: embedded data, two CPU cores, three minutes
    python simsiam.py --data /my/photos --backbone resnet18 --batch-size 256

Measured: `python simsiam.py`, two EPYC cores, torch 2.14.1, 1 min 29 s: kNN on held-out images 0.916, linear 0.981
(raw pixels 0.390, untrained backbone 0.203).

Unlike the authors' code, pictures stay in [0, 1] (theirs have the data set's mean and deviation taken off), and the
learning rate moves at every step (theirs at every epoch).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunConfig, coin, where_drawn

PAIRS = {  # (the view that predicts, the view that is predicted), counted from 0 (section 4.6)
    "symmetric": [(0, 1), (1, 0)],
    "asymmetric": [(0, 1)],
    "asymmetric-2x": [(0, 1), (2, 3)],
}


@dataclass(kw_only=True)
class Config(RunConfig):
    """SimSiam's flags. The defaults are the paper's ImageNet recipe; section and table numbers are the paper's."""

    METHOD: ClassVar[str] = "simsiam"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"data": "imagenet"},  # not downloadable: --data says where it is
        "cifar": {  # appendix D
            **{"data": "cifar10", "image_size": 32, "backbone": "resnet18", "epochs": 800, "lr": 0.03},
            **{"weight_decay": 5e-4, "projector_layers": 2, "blur": False},
        },
        "demo": {  # ours: learns the shapes set on two CPU cores in about three minutes
            **{"data": "shapes", "image_size": 32, "backbone": "resnet8", "epochs": 12, "batch_size": 64, "lr": 0.8},
            **{"warmup_epochs": 1.0, "hidden_dim": 256, "projection_dim": 256, "predictor_dim": 64},
            # grey and turned: else tint and place, which are easier to predict than the shape, are all it learns
            **{"projector_layers": 2, "crop_min_scale": 0.5, "grey_probability": 1.0, "rotate": True, "blur": False},
        },
    }

    stop_gradient: Annotated[bool, "no gradient through the predicted view; without it all collapses (4.1)"] = True
    predictor: Annotated[
        Literal["auto", "mlp", "none", "fixed"],
        "h (table 1); fixed = at its random start; auto = mlp, or none with --target moving-average",
    ] = "auto"
    predictor_lr: Annotated[
        Literal["decayed", "constant"],
        "of h: decayed like the rest, or not (table 1: 67.7 and 68.1; constant in the paper's other tables)",
    ] = "decayed"
    predictor_dim: Annotated[int, "width of h's hidden layer (section 3); nothing with --predictor none", ">= 1"] = 512
    projection_dim: Annotated[int, "d, width of z and p (section 3)", ">= 1"] = 2048
    hidden_dim: Annotated[int, "width of the projector's hidden layers (section 3)", ">= 1"] = 2048
    projector_layers: Annotated[int, "Linear layers of the projector (section 3; CIFAR, appendix D: 2)", ">= 1"] = 3
    head_bn: Annotated[
        Literal["none", "hidden", "default", "all"],
        "BN in the heads: none; after hidden layers; default = those and z; all = those, z and p (table 3)",
    ] = "default"
    similarity: Annotated[Literal["cosine", "cross-entropy"], "D (section 4.5)"] = "cosine"
    symmetry: Annotated[
        Literal["symmetric", "asymmetric", "asymmetric-2x"],
        "each view predicts the other; the first predicts the second; the same for two pairs of views (section 4.6)",
    ] = "symmetric"
    alternate_every: Annotated[
        int,
        "k: compute the targets of k steps at once, before them; 1 = of each step, 0 = of an epoch (section 5.2)",
        ">= 0",
    ] = 1
    target: Annotated[
        Literal["batch", "moving-average"], "z of the other view, or each image's moving average of it (section 5.2)"
    ] = "batch"
    target_momentum: Annotated[float, "m of the moving average (section 5.2)", "0 to 1"] = 0.8
    crop_min_scale: Annotated[float, "least area of a crop; the most is 1 (appendix A)", "> 0, <= 1"] = 0.2
    jitter_strength: Annotated[float, "times the colour jitter of 0.4, 0.4, 0.4, 0.1 (appendix A: 1)", ">= 0"] = 1.0
    grey_probability: Annotated[float, "drop the colours, after the jitter (appendix A)", "0 to 1"] = 0.2
    rotate: Annotated[bool, "random quarter turns (not in the paper; for pictures that have no upright)"] = False
    blur: Annotated[bool, "blur with probability 0.5 (appendix A; CIFAR: none)"] = True
    epochs: Annotated[int, "passes over the training images (section 4: 100; best 800)", ">= 1"] = 100
    batch_size: Annotated[int, "N, images in a step (section 3)", ">= 1"] = 512
    lr: Annotated[float, "learning rate for N = 256; it is scaled by N/256 (section 3)", "> 0"] = 0.05
    weight_decay: Annotated[float, "weight decay, on everything (section 3)", ">= 0"] = 1e-4
    warmup_epochs: Annotated[
        float,
        "epochs of linear warm-up, then a cosine to 0; nan, when left out: 10 for N >= 1024 (section 4.3) and for "
        "--head-bn none (section 4.4), else 0",
        ">= 0",
    ] = math.nan
    out: Annotated[str, "folder of the run's files"] = "runs/simsiam"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs is math.nan:  # (this very nan: another one is an error)
            self.warmup_epochs = 10.0 if self.batch_size >= 1024 or self.head_bn == "none" else 0.0
        if self.predictor == "auto":
            self.predictor = "none" if self.target == "moving-average" else "mlp"
        if self.jitter_strength > 5:
            raise common.InputError(f"--jitter-strength {self.jitter_strength}: at most 5 (a hue shift of half a turn)")
        average, ahead, learns = self.target == "moving-average", self.alternate_every != 1, self.predictor == "mlp"
        stored, constant, ce = average or ahead, self.predictor_lr == "constant", self.similarity == "cross-entropy"
        for wrong, message in (
            (self.batch_size == 1, "--batch-size 1: BN has nothing to compare then; give 2 or more"),
            (constant and not learns, "--predictor-lr constant: there is no predictor that learns; leave it out"),
            (self.head_bn == "all" and self.predictor == "none", "--head-bn all: there is no predictor; take default"),
            (
                not average and self.target_momentum != 0.8,
                "--target-momentum: add --target moving-average, or leave it out",
            ),
            (average and ce, "--similarity cross-entropy: the moving average is of unit vectors; take cosine"),
            (average and ahead, "--alternate-every and --target moving-average: leave one of the two out"),
            (stored and not self.stop_gradient, "--no-stop-gradient: no gradient reaches stored targets; leave it out"),
        ):
            if wrong:
                raise common.InputError(message)

    def peak_lr(self) -> float:
        return self.lr * self.batch_size / 256

    def culprits(self) -> str:
        """What the warning of a collapse says: the flags that cause one (figure 2, table 1, the README)."""
        flags = {
            "--no-stop-gradient": not self.stop_gradient,
            "--predictor none": self.predictor == "none" and self.target == "batch",
            "--head-bn none": self.head_bn == "none",
            "--target moving-average": self.predictor == "none" and self.target != "batch",
        }
        found = [flag for flag, given in flags.items() if given]
        return "caused by " + " and ".join(found) if found else "try a lower --lr or a larger --batch-size"


def augment(x: Tensor, config: Config) -> Tensor:
    """T(x) after the crop (appendix A, which is MoCo v2's), a draw of its own for every image. x: (N, 3, H, W)."""
    n, s = len(x), config.jitter_strength
    x = common.color_jitter(x, common.random_jitter(n, 0.4 * s, 0.4 * s, 0.4 * s, 0.1 * s, 0.8))
    x = where_drawn(x, coin(n, config.grey_probability), common.to_grey)
    if config.blur:
        kernel, sigma = max(3, config.image_size // 10 // 2 * 2 + 1), torch.empty(n).uniform_(0.1, 2.0)
        x = where_drawn(x, coin(n, 0.5), lambda y, sigma: common.gaussian_blur(y, sigma, kernel), sigma)
    if config.rotate:
        x = common.rotate(x, torch.randint(4, (n,)))
    return where_drawn(x, coin(n, 0.5), common.flip)


def layer(inputs: int, outputs: int, bn: bool, relu: bool = True, affine: bool = True) -> list[nn.Module]:
    """A Linear layer with what follows it. Before a BN a bias would be without effect, so there is none."""
    parts = [nn.Linear(inputs, outputs, bias=not bn)]
    parts += [nn.BatchNorm1d(outputs, affine=affine)] if bn else []
    return parts + ([nn.ReLU(inplace=True)] if relu else [])


class SimSiam(nn.Module):
    """f and h. `model(x)` is z (N, `projection_dim`), `model.predictor(z)` is p, `model.backbone(x)` is kept.

    The last BN of the projector has no scale and shift (the authors' code). Raises `InputError` for an unknown
    backbone.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = common.build_backbone(config)
        self.dim, hidden = config.projection_dim, config.hidden_dim
        widths = [self.backbone.feature_dim] + [hidden] * (config.projector_layers - 1)
        hidden_bn, z_bn = config.head_bn != "none", config.head_bn in ("default", "all")
        layers = [layer(i, o, hidden_bn) for i, o in pairwise(widths)]
        layers += [layer(widths[-1], self.dim, z_bn, relu=False, affine=False)]
        self.projector = nn.Sequential(*sum(layers, []))
        self.predictor = nn.Identity()
        if config.predictor != "none":  # a bottleneck (section 3)
            first = layer(self.dim, config.predictor_dim, hidden_bn)
            last = layer(config.predictor_dim, self.dim, config.head_bn == "all", relu=False)
            self.predictor = nn.Sequential(*first, *last)
        self.predictor.requires_grad_(config.predictor != "fixed")

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


def negative_cosine(p: Tensor, z: Tensor, stop_gradient: bool = True) -> Tensor:
    """D(p, stopgrad(z)), equation 1, the mean over the N rows of p and z, (N, d), of any norm: -1 to 1."""
    z = z.detach() if stop_gradient else z
    return -(F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1).mean()


def softmax_cross_entropy(p: Tensor, z: Tensor, stop_gradient: bool = True) -> Tensor:
    """D(p, stopgrad(z)) = -softmax(z) . log softmax(p), over d pseudo-categories; else as `negative_cosine` (4.5)."""
    z = z.detach() if stop_gradient else z
    return -(z.softmax(1) * p.log_softmax(1)).sum(1).mean()


DISTANCES = {"cosine": negative_cosine, "cross-entropy": softmax_cross_entropy}


class Cache:
    """eta_x of the images of the coming steps, at most k, from the network as it was before the first of them (5.2).

    The solver of theta (equation 7) takes k SGD steps towards them, with views T(x) of its own. `embed` makes z of
    crops, `views` are drawn of an image, and those in `predicted` are targets. `waiting` holds an (N, len(predicted),
    d) for each step that has not been taken yet; at the end of an epoch none is left.
    """

    def __init__(self, k: int, views: int, predicted: list[int], embed: Callable[[Tensor], Tensor]) -> None:
        self.k, self.views, self.predicted, self.embed = k, views, predicted, embed
        self.waiting, self.ahead = [], None

    def next(self, run: common.Run) -> list[Tensor]:
        """The targets of the coming step of `run`, (N, d) each."""
        if not self.waiting:
            self.fill(run)
        return list(self.waiting.pop(0).to(run.device).unbind(1))

    @torch.no_grad()
    def fill(self, run: common.Run) -> None:
        """Embed the images of the next k steps; with a sign of life, and an end on Ctrl-C at the start of an epoch."""
        c = run.config
        if self.ahead is None or run.step_in_epoch == 0:
            seed, scale = run.view_seed() + 2**40, (c.crop_min_scale, 1.0)  # other crops than the steps will see
            self.ahead = run.data.train.crops(run.order(), c.image_size, self.views, scale, seed, c.workers)
        for i, crops in enumerate(islice(self.ahead, self.k), 1):
            if run.stop and run.step_in_epoch == 0:
                kept = "the last checkpoint is kept" if run.checkpoint.exists() else "no checkpoint was written yet"
                raise KeyboardInterrupt(f"\nstopped after step {run.step} of {run.total}; {kept}")
            if run.live:
                print(f"\r\x1b[Kepoch {run.epoch + 1}/{c.epochs} targets {i}/{self.k}", end="", flush=True)
            self.waiting.append(torch.stack([self.embed(crops[j]) for j in self.predicted], dim=1))

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if any(eta.shape[1] != len(self.predicted) for eta in state["waiting"]):
            raise ValueError("other pairs of views")
        self.waiting = state["waiting"]


class Bank(nn.Module):
    """eta_x of each of M images, (M, d): the moving average of its z / |z|, in place of the predictor (section 5.2).

    It starts at random unit vectors, as a memory bank does: from zeros, the first epoch would predict z itself, which
    collapses.
    """

    def __init__(self, images: int, dim: int, momentum: float) -> None:
        super().__init__()
        self.register_buffer("eta", F.normalize(torch.randn(images, dim), dim=1))
        self.momentum = momentum

    def update(self, index: Tensor, targets: list[Tensor]) -> list[Tensor]:
        """eta_x <- m eta_x + (1 - m) z/|z| for the images index (N,): the mean over `targets` is stored, each returned.

        So a view's target does not contain that view.
        """
        index = index.to(self.eta.device, non_blocking=True)
        m, old = self.momentum, self.eta[index]
        moved = [m * old + (1 - m) * F.normalize(z.detach(), dim=1) for z in targets]
        self.eta[index] = torch.stack(moved).mean(0)
        return moved


def train(config: Config) -> dict[str, Any]:
    """Train, write the run's files to `config.out`, and return the final metrics."""
    device = common.prepare(config)
    data = common.load_data(config, device)
    common.fit_batch_size(config, len(data.train))
    model = SimSiam(config).to(device, memory_format=torch.channels_last)
    if config.compile:
        for network in (model, model.predictor):
            network.compile()
    n, lr, micro = config.batch_size, config.peak_lr(), config.micro_batch_size
    distance, pairs = DISTANCES[config.similarity], PAIRS[config.symmetry]
    online, views = [i for i, _ in pairs], 1 + max(map(max, pairs))  # the views that predict; those drawn of an image

    def embed(x: Tensor) -> Tensor:
        with common.autocast(config, device), common.still_statistics(model):
            return common.embed_in_pieces(model, micro, augment(x, config)).float()

    steps = len(data.train) // n
    k = min(config.alternate_every or steps, steps)
    cache = Cache(k, views, [j for _, j in pairs], embed) if config.alternate_every != 1 else None
    embedded = online if cache else range(views)  # the views whose z a step computes
    bank = Bank(len(data.train), model.dim, config.target_momentum).to(device) if config.target != "batch" else None

    groups = [
        {"params": [*model.backbone.parameters(), *model.projector.parameters()], "constant": False},
        {"params": list(model.predictor.parameters()), "constant": config.predictor_lr == "constant"},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "cache": cache, "bank": bank}
    run = common.Run(config, data, device, **{name: part for name, part in parts.items() if part is not None})
    source = "z of the same step"
    if cache:
        source = f"z from before each {k} steps, {4e-6 * k * n * len(pairs) * model.dim:,.0f} MB"
    if bank:
        source = f"moving average of z / |z|, m {config.target_momentum:g}, {4e-6 * bank.eta.numel():,.0f} MB"
    predictors = {"mlp": f"mlp, its lr {config.predictor_lr}", "fixed": "fixed at its start", "none": "none, p = z"}
    run.header(
        optimizer=f"sgd, momentum 0.9, peak lr {lr:g} (--lr {config.lr:g} x {n} / 256), weight decay "
        f"{config.weight_decay:g} on everything",
        loss=f"{config.similarity}, {config.symmetry}; mean over N = {n} images and their predictions"
        + ", -1 to 1" * (config.similarity == "cosine"),
        predictor=predictors[config.predictor],
        targets=source + ("; no gradient" if config.stop_gradient else "; with a gradient (--no-stop-gradient)"),
    )

    model.train()
    with run:
        while run.epoch < config.epochs:
            for index, crops in run.batches(views=views, scale=(config.crop_min_scale, 1.0)):
                targets = cache.next(run) if cache else None  # from before the first of k steps (5.2)
                x = [augment(crop, config) for crop in crops]
                now = common.cosine_lr(run.step, run.total, round(config.warmup_epochs * run.steps), lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr if group["constant"] else now
                optimizer.zero_grad()
                with common.autocast(config, device):
                    z = {}  # (N, d) each, one view after the other: BN statistics are of one view
                    for i in embedded:
                        with torch.set_grad_enabled(i in online or not config.stop_gradient):
                            z[i] = common.embed_in_pieces(model, micro, x[i])
                    p = [model.predictor(z[i]).float() for i in online]
                targets = targets or [z[j].float() for _, j in pairs]
                if bank:
                    targets = bank.update(index, targets)
                losses = [distance(p_i, z_j, config.stop_gradient) for p_i, z_j in zip(p, targets, strict=True)]
                loss = sum(losses) / len(losses)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                run.after_step(loss, z[0], now, *x)
            run.after_epoch(knn=lambda: common.knn_of(model.backbone, data, config), collapse_hint=config.culprits())
    torch.manual_seed(config.seed)
    return run.finish(untrained=SimSiam(config).to(device, memory_format=torch.channels_last))


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
