"""Contrastive losses of pairs, from the first to InfoNCE, as one family.

Tian, Understanding Deep Contrastive Learning via Coordinate-wise Optimization, NeurIPS 2022,
https://arxiv.org/abs/2201.12680

Two views of each of N images are drawn, as SimCLR does. With d = |z - z'|^2 / 2, for unit vectors 1 - cos, d_i+ the
distance of a view i to the other view of its image and d_ij- that to a view j of another:

    L = mean over i of phi( sum over j of psi( d_i+ - d_ij- ) )       phi, psi increasing          (equation 1)

Its gradient is that of sum over i, j of alpha_ij (d_i+ - d_ij-), with the weights alpha_ij = phi'(...) psi'(...) held
fixed: a loss is how much each negative counts. d_i+ - d_ij- is at most 2; of z of any length it has no bound, and
--no-normalize shows what becomes of a loss whose pull on d_ij- does not end.

    --loss             phi(x)                 psi(x)                 paper
    infonce            tau log(epsilon + x)   exp(x / tau)           van den Oord et al. 2018; SimCLR's is 1/tau of it
    mine               log x                  exp x                  Belghazi et al. 2018
    triplet            x                      max(x + epsilon, 0)    Schroff et al. 2015
    soft-triplet       tau log(1 + x)         exp(x / tau + epsilon) Tian et al. 2020
    n-pair             log(1 + x)             exp x                  Sohn 2016
    lifted             max(log x, 0)^2        exp(x + epsilon)       Oh Song et al. 2016
    sigmoid-triplet    x                      sigmoid(c x)           Coria et al. 2020
    linear             x                      x                      Ji et al. 2021

    outside the family, as they do not compare d_i+ with d_ij-:
    margin             d_i+ + mean over j of max(0, m - |z_i - z_j|)^2 / 2                Hadsell, Chopra, LeCun 2006
    hinge              d_i+ + mean over j of max(0, m - d_ij-)                            the same, of d itself
    nce                positive or not, by logistic regression on (1 - d) / tau           Gutmann, Hyvarinen 2010

    python pairwise.py --loss triplet                      the demo: embedded data, two CPU cores
    python pairwise.py --loss linear --negatives other-class
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunConfig, cosine_lr, set_lr
from images import color_jitter, flip, gaussian_blur, grey, normalize, sometimes


def distances(z1: Tensor, z2: Tensor, labels: Tensor | None = None, unit: bool = True) -> tuple[Tensor, Tensor]:
    """d_i+ (M, 1) and d_ij- (M, 2N) of the views z1, z2 (N, d), infinite where j is no negative of i.

    Negatives are the views of another label (N,), by default of any other image. The M anchors are those of the 2N
    views that have any. `unit`: z is brought to length 1.
    """
    z = torch.cat([z1, z2])  # (2N, d)
    z = F.normalize(z, dim=1) if unit else z
    square = z.square().sum(1)
    d = ((square[:, None] + square) / 2 - z @ z.T).clamp(min=0)  # (2N, 2N): |z_i - z_j|^2 / 2
    y = (torch.arange(len(z1)) if labels is None else labels).repeat(2).to(z.device)
    negative = y[:, None] != y
    anchors, positive = negative.any(1), d.diagonal(len(z1)).repeat(2)[:, None]  # d of i and i + N
    return positive[anchors], d.masked_fill(~negative, math.inf)[anchors]


# The losses: of distances p = d_i+ (M, 1) and n = d_ij- (M, n), infinite where there is none, from `distances` or drawn
# in another way, the mean over the M anchors.


def mean(each: Tensor) -> Tensor:
    return each.sum() / max(1, len(each))


def share(each: Tensor, n: Tensor) -> Tensor:
    """The mean over the negatives."""
    return each.sum(1) / n.isfinite().sum(1)


def log_sum(x: Tensor, epsilon: float = 0.0) -> Tensor:
    """log(epsilon + sum over j of exp x_ij), (M,), of x (M, n); shifted by the largest, so that none overflows."""
    first = x.new_full((len(x), 1), math.log(epsilon) if epsilon else -math.inf)
    return torch.cat([first, x], 1).logsumexp(1)


def info_nce(p: Tensor, n: Tensor, temperature: float = 0.1, epsilon: float = 1.0) -> Tensor:
    """tau log(epsilon + sum of exp((d+ - d-) / tau)); epsilon 1: tau times the cross-entropy of SimCLR and MoCo."""
    return temperature * mean(log_sum((p - n) / temperature, epsilon))


def triplet(p: Tensor, n: Tensor, epsilon: float = 1.0) -> Tensor:
    """Sum of max(d+ - d- + epsilon, 0): Schroff et al. 2015, equation 2, over all negatives."""
    return mean((p - n + epsilon).clamp(min=0).sum(1))


def n_pair(p: Tensor, n: Tensor) -> Tensor:
    """log(1 + sum of exp(d+ - d-)): the (N+1)-tuplet loss of Sohn 2016, equation 4."""
    return mean(log_sum(p - n, 1.0))


def pair_loss(p: Tensor, n: Tensor, margin: float = 1.0) -> Tensor:
    """D^2 / 2 of a positive pair, max(0, m - D)^2 / 2 of a negative one, as many of either, with D = |z - z'| (Hadsell,
    Chopra, LeCun 2006, equation 4)."""
    return mean(p.squeeze(1) + share((margin - (2 * n).clamp(min=1e-12).sqrt()).clamp(min=0).square() / 2, n))


def nce(p: Tensor, n: Tensor, temperature: float = 0.1) -> Tensor:
    """Logistic regression of positive against K negatives, by s - log K with the score s = (1 - d) / tau, for unit
    vectors the cosine over tau; the best s is the log density ratio (Gutmann, Hyvarinen 2010, equations 3 to 5)."""
    k = n.isfinite().sum(1, keepdim=True).to(n).log()
    return mean(F.softplus(k - (1 - p) / temperature).squeeze(1) + F.softplus((1 - n) / temperature - k).sum(1))


LOSSES = {  # the table above
    "infonce": lambda p, n, c: info_nce(p, n, c.temperature, c.epsilon),
    "mine": lambda p, n, c: mean(log_sum(p - n)),
    "triplet": lambda p, n, c: triplet(p, n, c.epsilon),
    "soft-triplet": lambda p, n, c: c.temperature * mean(log_sum((p - n) / c.temperature + c.epsilon, 1.0)),
    "n-pair": lambda p, n, c: n_pair(p, n),
    "lifted": lambda p, n, c: mean(log_sum(p - n + c.epsilon).clamp(min=0).square()),
    "sigmoid-triplet": lambda p, n, c: mean((c.slope * (p - n)).sigmoid().sum(1)),
    "linear": lambda p, n, c: mean((p - n).masked_fill(n.isinf(), 0).sum(1)),
    "margin": lambda p, n, c: pair_loss(p, n, c.margin),
    "hinge": lambda p, n, c: mean(p.squeeze(1) + share((c.margin - n).clamp(min=0), n)),
    "nce": lambda p, n, c: nce(p, n, c.temperature),
}


CIFAR = {  # SimCLR's
    **{"data": "cifar10", "image_size": 32, "backbone": "resnet18", "stem": "cifar", "epochs": 1000, "batch_size": 512},
    **{"temperature": 0.5, "jitter_strength": 0.5, "blur": 0.0},
}
DEMO = {  # ours: the shapes set at 16 pixels, for many short runs on two CPU cores
    **{"data": "shapes", "image_size": 16, "backbone": "resnet8", "epochs": 5, "batch_size": 128, "lr": 0.01},
    **{"warmup_epochs": 1.0, "temperature": 0.2, "hidden_dim": 256, "projection_dim": 64},
    **{"crop_min_scale": 0.35, "jitter_strength": 0.5, "blur": 0.0},
}


@dataclass(kw_only=True)
class Config(RunConfig):
    """Which loss, and its constants. Views, head, N and epochs are SimCLR's (arXiv:2002.05709)."""

    PRESETS = {"paper": {}, "cifar": CIFAR, "demo": DEMO}

    loss: Literal[*LOSSES] = "infonce"  # a row of the table above
    negatives: Literal["batch", "other-class"] = "batch"  # views of all other images, or of those with another label
    normalize: bool = True  # z of length 1; else of any, and the temperatures and margins are on its scale
    temperature: float = 0.1  # tau of infonce, soft-triplet and nce (SimCLR, section 4.1)
    epsilon: float = 1.0  # infonce: 1, the positive is in the denominator, 0, it is not; *triplet, lifted: the margin
    margin: float = 1.0  # m of margin and hinge
    slope: float = 10.0  # c of sigmoid-triplet
    epochs: int = 100  # passes over the training images
    batch_size: int = 4096  # N, images in a step; 2N - 2 negatives
    lr: float = 1e-3  # of AdamW (ours: it does not mind the size of a gradient, which is another in every loss)
    weight_decay: float = 1e-4  # weight decay, not on BN and biases
    warmup_epochs: float = 10.0  # epochs of linear warm-up, then a cosine to 0
    hidden_dim: int = 0  # width of g's hidden layer; 0 = the width of h
    projection_dim: int = 128  # d, width of z
    crop_min_scale: float = 0.08  # least area of a crop; the most is 1
    jitter_strength: float = 1.0  # s: brightness, contrast, saturation 0.8 s, hue 0.2 s
    blur: float = 0.5  # probability of a blur; pictures of 32 pixels like none
    out: str = "runs/pairwise"  # folder of the run's files

    def check(self) -> None:
        super().check()
        common.ensure(self.batch_size > 1, "--batch-size 1: there are no negatives; give 2 or more")
        common.ensure(
            self.jitter_strength <= 2.5, "--jitter-strength: at most 2.5, where the hue turns by half a circle"
        )


def augment(x: Tensor, config: Config) -> Tensor:
    """t(x) after the crop (SimCLR, appendix A), a draw of its own for every image. x: (N, 3, H, W) in [0, 1]."""
    s = config.jitter_strength
    x = sometimes(x, 0.5, flip)
    x = sometimes(x, 0.8, color_jitter, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    x = sometimes(x, 0.2, grey)
    x = sometimes(x, config.blur, gaussian_blur)
    return normalize(x)


class Pairwise(nn.Module):
    """f and g. `model(x1, x2)` is z of both views, `model.backbone(x)` is h, `model.embed(x)` is g(h).

    Unlike SimCLR's, g ends without a BN, so that the length of z is free.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = common.build_backbone(config)
        d, self.dim = self.backbone.feature_dim, config.projection_dim
        hidden = config.hidden_dim or d
        first = [nn.Linear(d, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*first, nn.Linear(hidden, self.dim))

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(torch.cat([x1, x2])).chunk(2)  # (N, d) each; BN over both views


def train(config: Config, data: Any = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data` (see `common.start`); write to `config.out`, return the final metrics."""
    device, data = common.start(config, data)
    labels = torch.arange(len(data.train))  # all other images are negatives
    if config.negatives == "other-class":  # an image without a label is a class of its own
        labels = torch.where(data.train.labels < 0, -2 - labels, data.train.labels)
        words = f"--negatives other-class: --data {data.name} has no two classes; take batch"
        common.ensure(len(data.train.labels.unique()) > 1, words)
    model = Pairwise(config).to(device, memory_format=torch.channels_last)
    network = common.network_for(model, config, device)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, config.weight_decay), lr=config.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    run = common.Run(config, data, device, model=model, optimizer=optimizer, scaler=scaler)
    run.header(
        optimizer=f"adamw, peak lr {config.lr:g} (not scaled by N)",
        loss=f"{config.loss}, mean over 2N = {2 * config.batch_size} anchors, negatives: {config.negatives}",
    )

    for _ in run.epochs():
        for index, (x1, x2) in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):
            x1, x2 = augment(x1, config), augment(x2, config)  # (N, 3, S, S)
            set_lr(optimizer, cosine_lr(run.step, run.total, config.warmup_epochs * run.steps, config.lr))

            z1, z2 = network(x1, x2)  # (N, d) each
            every = [common.gather(t) for t in (z1.float(), z2.float(), labels[index].to(device))]  # all processes'
            loss = LOSSES[config.loss](*distances(*every, config.normalize), config)

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, z1, x1, x2)
        run.end_epoch()
    return run.finish()


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
