"""Contrastive losses of pairs, from the first to InfoNCE, as one family.

Tian, Understanding Deep Contrastive Learning via Coordinate-wise Optimization, NeurIPS 2022,
https://arxiv.org/abs/2201.12680

Two views of each of N images are drawn, as in SimCLR. The distance of two views is d = |z - z'|^2 / 2, which for unit
vectors is 1 minus their cosine. A view i has the distance d_i+ to the other view of its image, and d_ij- to a view j of
another image:

    L = mean over i of phi( sum over j of psi( d_i+ - d_ij- ) )       phi, psi increasing

Its gradient is that of mean over i of sum over j of alpha_ij (d_i+ - d_ij-), where the weights alpha_ij = phi'(...)
psi'(...) are held fixed: a loss is a weighting of negatives. A run draws the weights of every loss in family.png.

    --loss            phi(x)                 psi(x)                    paper
    infonce           tau log(epsilon + x)   exp(x / tau)              van den Oord et al. 2018
    mine              log x                  exp x                     Belghazi et al. 2018
    triplet           x                      max(x + m, 0)             Schroff et al. 2015
    soft-triplet      tau log(1 + x)         exp(x / tau + m)          Tian et al. 2020
    n-pair            log(1 + x)             exp x                     Sohn 2016
    lifted            max(log x, 0)^2        exp(x + m)                Oh Song et al. 2016 (there also j's negatives)
    sigmoid-triplet   x                      sigmoid(c x)              Coria et al. 2020
    linear            x                      x                         Ji et al. 2021

    three losses are outside the family, since they do not compare d_i+ with d_ij-:
    margin            d_i+ + mean over j of max(0, m - |z_i - z_j|)^2 / 2      Hadsell, Chopra, LeCun 2006
    hinge             d_i+ + mean over j of max(0, m - d_ij-)                  linear, of d
    nce               positive or not, by logistic regression                 Gutmann, Hyvarinen 2010, 2012

    f, g, z           model.backbone, model.projector, z          as in simclr.py
    tau, epsilon      temperature, epsilon                        --temperature, --epsilon
    m, c              margin, slope                               --margin, --slope
    j, the negatives  distances                                   --negatives, --normalize

    python pairwise.py                                     the demo, by infonce: built-in data, two CPU cores
    python pairwise.py --data /my/photos                   your own pictures

The demo ends at a kNN of 0.729 to 0.780; --loss linear ends at 0.397 to 0.442; raw pixels reach 0.690 (three seeds;
an EPYC with AVX2).
"""

import importlib.util
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunConfig, cosine_lr, gather, set_lr
from images import color_jitter, ensure, flip, grey, normalize, sometimes


def distances(z1: Tensor, z2: Tensor, labels: Tensor | None = None, unit: bool = True) -> tuple[Tensor, Tensor]:
    """d_i+ (M, 1) and d_ij- (M, 2N) of the views z1, z2 (N, d), infinite where j is no negative of i.

    A negative has another label (`labels`, (N,); by default every image has its own). The M anchors are the views
    that have a negative. `unit` scales z to length 1.
    """
    z = torch.cat([z1, z2])  # (2N, d)
    z = F.normalize(z, dim=1) if unit else z
    square = z.square().sum(1)
    d = (square[:, None] + square) / 2 - z @ z.T  # (2N, 2N): |z_i - z_j|^2 / 2
    y = (torch.arange(len(z1)) if labels is None else labels).repeat(2).to(z.device)
    negative = y[:, None] != y
    anchors, d_pos = negative.any(1), d.diagonal(len(z1)).repeat(2)[:, None]  # d of i and i + N
    return d_pos[anchors], d.masked_fill(~negative, math.inf)[anchors]


def mean(each: Tensor, d_neg: Tensor | None = None) -> Tensor:
    """The mean over the anchors. With `d_neg`, `each` (M, n) is first averaged over each anchor's negatives."""
    each = each if d_neg is None else each.sum(1) / d_neg.isfinite().sum(1)
    return each.sum() / max(1, len(each))


def log_sum(x: Tensor, epsilon: float = 0.0) -> Tensor:
    """log(epsilon + sum over j of exp x_ij), (M,), of x (M, n). A shift by the largest x_ij prevents an overflow."""
    first = x.new_full((len(x), 1), math.log(epsilon) if epsilon else -math.inf)
    return torch.cat([first, x], 1).logsumexp(1)


def info_nce(d_pos: Tensor, d_neg: Tensor, temperature: float = 0.1, epsilon: float = 1.0) -> Tensor:
    """tau log(epsilon + sum of exp((d+ - d-) / tau)); epsilon 1: tau times the cross-entropy of SimCLR and MoCo."""
    return temperature * mean(log_sum((d_pos - d_neg) / temperature, epsilon))


def pair_loss(d_pos: Tensor, d_neg: Tensor, margin: float = 1.0) -> Tensor:
    """Mean D^2 / 2 of the positive pairs, plus mean max(0, m - D)^2 / 2 of the negative pairs; D = |z - z'|."""
    distance = (2 * d_neg).clamp(min=1e-12).sqrt()
    return mean(d_pos) + mean((margin - distance).clamp(min=0).square() / 2, d_neg)


def nce(d_pos: Tensor, d_neg: Tensor, temperature: float = 0.1) -> Tensor:
    """Logistic regression of the positive against K negatives by s - log K. The score is s = (1 - d) / tau, for unit
    vectors the cosine over tau. The best s is the log density ratio."""
    log_k = d_neg.isfinite().sum(1, keepdim=True).to(d_neg).log()
    positive, negative = (1 - d_pos) / temperature - log_k, (1 - d_neg) / temperature - log_k
    return mean(F.softplus(-positive).squeeze(1) + F.softplus(negative).sum(1))


LOSSES = {  # the table above; the arguments after d_neg are flags
    "infonce": info_nce,
    "mine": lambda d_pos, d_neg: mean(log_sum(d_pos - d_neg)),
    "triplet": lambda d_pos, d_neg, margin: mean((d_pos - d_neg + margin).clamp(min=0).sum(1)),
    "soft-triplet": lambda d_pos, d_neg, temperature, margin: info_nce(
        d_pos + temperature * margin, d_neg, temperature
    ),
    "n-pair": lambda d_pos, d_neg: mean(log_sum(d_pos - d_neg, 1.0)),
    "lifted": lambda d_pos, d_neg, margin: mean(log_sum(d_pos - d_neg + margin).clamp(min=0).square()),
    "sigmoid-triplet": lambda d_pos, d_neg, slope: mean((slope * (d_pos - d_neg)).sigmoid().sum(1)),
    "linear": lambda d_pos, d_neg: mean((d_pos - d_neg).masked_fill(d_neg.isinf(), 0).sum(1)),
    "margin": pair_loss,
    "hinge": lambda d_pos, d_neg, margin: mean(d_pos) + mean((margin - d_neg).clamp(min=0), d_neg),
    "nce": nce,
}
CONSTANTS = {name: list(inspect.signature(loss).parameters)[2:] for name, loss in LOSSES.items()}

CIFAR = dict(data="cifar10", image_size=32, backbone="resnet18", stem="cifar", temperature=0.5)
PHOTOS = dict(  # ours: for your own pictures, hundreds or more
    image_size=128, backbone="resnet18", epochs=100, batch_size=128, temperature=0.2,
)  # fmt: skip
DEMO = dict(  # ours: the shapes set at 16 pixels, for many short runs on two CPU cores
    data="shapes", image_size=16, backbone="resnet8", epochs=5, batch_size=128, lr=0.01, warmup_epochs=1.0,
    temperature=0.2, projection_dim=64, crop_min_scale=0.35,
)  # fmt: skip


@dataclass(kw_only=True)
class Config(RunConfig):
    """Which loss, and its constants. No paper has one recipe for all losses, so the other defaults are ours."""

    PRESETS = {"paper": {}, "cifar": CIFAR, "photos": PHOTOS, "demo": DEMO}

    loss: Literal[*LOSSES] = "infonce"  # phi and psi; the table at the top of pairwise.py has them
    negatives: Literal["batch", "other-class"] = "batch"  # views of other images, or only those of another label
    normalize: bool = True  # scale z to length 1; without it, choose tau and m for the lengths that z has
    temperature: float = 0.1  # tau of infonce, soft-triplet and nce (SimCLR, section 5.1)
    epsilon: float = 1.0  # infonce: 1, the positive is in the denominator (SimCLR, MoCo); 0, it is not
    margin: float = 1.0  # m of triplet, lifted, margin, hinge (ours; distances: 0 to 2), soft-triplet (in tau)
    slope: float = 10.0  # c of sigmoid-triplet (ours)
    lr: float = 1e-3  # learning rate (ours; Adam, since the losses differ in the size of their gradients)
    projection_dim: int = 128  # width of z
    crop_min_scale: float = 0.2  # least area of a crop; the most is 1
    jitter_strength: float = 0.5  # s: brightness, contrast, saturation 0.8 s, hue 0.2 s
    out: str = "runs/pairwise"  # folder of the run; if it holds a run, a new one beside it, such as runs/pairwise-2

    def check(self) -> None:
        super().check()
        self.need("batch_size > 1", "lr > 0", "temperature > 0", "projection_dim > 0", "0 < crop_min_scale <= 1")
        self.need("slope > 0", "jitter_strength <= 2.5")  # at 2.5 the hue turns by half a circle
        for name in ("temperature", "epsilon", "margin", "slope"):
            recipes = {preset.get(name, getattr(Config, name)) for preset in self.PRESETS.values()}
            used = name in CONSTANTS[self.loss] or getattr(self, name) in recipes  # a preset may have set it
            ensure(used, f"{common.dashed(name)}: --loss {self.loss} does not use it; leave it out")


def augment(x: Tensor, config: Config) -> Tensor:
    """SimCLR's (appendix A) without the blur, drawn anew for every image. x: (N, 3, H, W) in [0, 1]."""
    s = config.jitter_strength
    x = sometimes(x.clone(), 0.5, flip)
    x = sometimes(x, 0.8, color_jitter, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    x = sometimes(x, 0.2, grey)
    return normalize(x)


class Pairwise(nn.Module):
    """f and g. `model(x1, x2)` is z of both views, `model.backbone(x)` is h, `model.embed(x)` is g(h).

    Unlike SimCLR's g, this one ends without a BN, so that the length of z is free.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = common.build_backbone(config)
        d, self.dim = self.backbone.feature_dim, config.projection_dim
        first = nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(inplace=True)
        self.projector = nn.Sequential(*first, nn.Linear(d, self.dim))

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(torch.cat([x1, x2])).chunk(2)  # (N, d) each; BN over both views


def train(config: Config, data: Any = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data` (see `common.Run`). Returns the final figures and, as `out`, the folder."""
    run = common.Run(config, data)
    labels = torch.arange(len(run.data.train))  # all other images are negatives
    if config.negatives == "other-class":  # an image without a label is a class of its own
        labels = torch.where(run.data.train.labels < 0, -2 - labels, run.data.train.labels)
        words = f"--negatives other-class: --data {run.data.name} has no classes; give batch"
        ensure(len(run.data.train.labels.unique()) > 1, words)
    model = Pairwise(config).to(run.device, memory_format=torch.channels_last)
    constants = {name: getattr(config, name) for name in CONSTANTS[config.loss]}
    optimizer = torch.optim.Adam(common.parameter_groups(model, config.weight_decay), lr=config.lr)
    softmax = config.loss == "infonce" and config.epsilon == 1 and config.negatives == "batch"
    guess = config.temperature * math.log(2 * config.batch_size - 1) if softmax else 0
    note = ", ".join([config.loss, *(f"{k} {v:g}" for k, v in constants.items()), f"negatives {config.negatives}"])
    network = run.begin(model, optimizer=optimizer, guess=guess, note=note)

    for index, (x1, x2) in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):
        x1, x2 = augment(x1, config), augment(x2, config)  # (N, 3, S, S)
        set_lr(optimizer, cosine_lr(run.step, run.total, config.warmup_epochs * run.steps, config.lr))

        z1, z2 = network(x1, x2)  # (N, d) each
        every = [gather(x) for x in (z1, z2, labels[index].to(run.device))]  # of all processes
        loss = LOSSES[config.loss](*distances(*every, config.normalize), **constants)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss, z1, x1, x2)
    found = run.finish()
    if run.rank == 0 and importlib.util.find_spec("matplotlib"):
        draw_family(config, Path(found["out"], "family.png"))
    return found


def draw_family(config: Config, path: Path) -> None:
    """Draw -dL/dd_ij- of each loss over its mean, for one anchor with d_i+ = 0.5 and 200 negatives, against d_ij-."""
    axes = importlib.import_module("matplotlib.figure").Figure(layout="constrained").add_subplot(yscale="log")
    d_pos, d_neg = torch.full((1, 1), 0.5), torch.linspace(0, 2, 200)[None].requires_grad_()  # (1, 1), (1, 200)
    for i, (name, loss) in enumerate(LOSSES.items()):
        value = loss(d_pos, d_neg, **{constant: getattr(config, constant) for constant in CONSTANTS[name]})
        (gradient,) = torch.autograd.grad(value, d_neg)
        weight, style = (gradient / gradient.mean())[0].tolist(), dict(linestyle="-" if i < 6 else "--", label=name)
        axes.plot(d_neg[0].tolist(), weight, linewidth=5 - 0.4 * i, **style)  # thinner, as some coincide
    axes.set(xlabel="d- (d+ = 0.5)", ylabel="weight of a negative, over the mean", ylim=(0.01, 100))
    axes.figure.legend(loc="outside right")
    axes.figure.savefig(path)


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
