"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations.

Chen, Kornblith, Norouzi, Hinton, ICML 2020, https://arxiv.org/abs/2002.05709

SimCLR draws two augmented views of each of N images. For each of the 2N views, the other view of the same image is the
positive, and the remaining 2N - 2 views are the negatives:

    h_i = f(x_i)    z_i = g(h_i)    s_ij = z_i . z_j / (|z_i| |z_j|)                              (section 2.1)
    l(i, j) = -log( exp(s_ij / tau) / sum over k != i of exp(s_ik / tau) )                         (equation 1)
    L = 1/(2N) sum over the N positive pairs of [ l(2k-1, 2k) + l(2k, 2k-1) ]                      (algorithm 1)

After training, f is kept and g is thrown away: h is the representation.

    paper                      here                        flag
    f, the base encoder        model.backbone              --backbone, --stem
    g, the projection head     model.projector             --projection-head, --hidden-dim, --projection-dim
    t ~ T, an augmentation     run.batches crops, augment  --crop-min-scale, --jitter-strength, --blur
    N                          config.batch_size           --batch-size
    tau                        temperature                 --temperature

    python simclr.py                                       the demo: built-in data, two CPU cores
    python simclr.py --data /my/photos                     your own pictures, with the preset photos

The demo ends at a kNN accuracy of 0.970 to 0.983; raw pixels reach 0.726 (seeds 0 to 4; an EPYC with AVX2).

The main differences from the authors' code: our crops are bilinear, theirs bicubic; we normalise pictures, they feed
values in [0, 1]; our sgd has no Nesterov momentum; our loss is the mean of both directions, theirs the sum.
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

CIFAR = dict(  # appendix B.9, except that the network, N and lr are those of the authors' README
    data="cifar10", image_size=32, backbone="resnet18", stem="cifar", epochs=1000, batch_size=512,
    lr=1.0, temperature=0.5, jitter_strength=0.5, blur=0.0,
)  # fmt: skip
DEMO = dict(  # ours: learns the shapes set on two CPU cores in about a minute
    data="shapes", image_size=32, backbone="resnet8", epochs=5, batch_size=128,
    optimizer="sgd", lr=0.4, weight_decay=1e-4, warmup_epochs=1.0, temperature=0.2,
    hidden_dim=256, projection_dim=64, crop_min_scale=0.35, jitter_strength=0.5, blur=0.0,
)  # fmt: skip
PHOTOS = dict(  # ours: for your own pictures, hundreds to tens of thousands
    image_size=128, backbone="resnet18", epochs=100, batch_size=128,
    optimizer="sgd", lr=0.1, weight_decay=1e-4, warmup_epochs=0.0, temperature=0.2, crop_min_scale=0.2,
)  # fmt: skip


@dataclass(kw_only=True)
class Config(RunConfig):
    """SimCLR's flags. The defaults are the paper's ImageNet recipe; section and appendix numbers are the paper's."""

    PRESETS = {"paper": {}, "cifar": CIFAR, "demo": DEMO, "photos": PHOTOS}

    epochs: int = 100  # passes over the training images; the best results take 1000 (section 6)
    batch_size: int = 4096  # images in a step, N, with two views each (section 2.3)
    lr: float = 0.3  # learning rate before --lr-scaling (section 2.3; sqrt: 0.075 sqrt(N), appendix B.1)
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"  # lr times N/256, sqrt(N)/4 or 1; N is --batch-size
    optimizer: Literal["lars", "sgd"] = "lars"  # lars (section 2.3) or sgd, both with momentum 0.9
    weight_decay: float = 1e-6  # weight decay, except on BN and biases (section 2.3)
    warmup_epochs: float = 10.0  # epochs of linear warm-up, then a cosine to 0 (section 2.3)
    temperature: float = 0.1  # tau: smaller stresses near views; larger for small batches (section 5.1, appendix B.9)
    projection_head: Literal["none", "linear", "mlp"] = "mlp"  # the head g, used in training only (figure 8)
    hidden_dim: int = 0  # width of the projection head's hidden layer; 0 = the backbone's width, as in the paper
    projection_dim: int = 128  # width of z, the projection head's output (section 2.3)
    crop_min_scale: float = 0.08  # least share of the picture that a crop covers; the most is 1 (appendix A)
    jitter_strength: float = 1.0  # colour jitter s: brightness, contrast, saturation 0.8 s, hue 0.2 s (appendix A)
    blur: float = 0.5  # probability of a blur; give 0 for pictures of 32 pixels (appendix A)
    loss_backend: Literal["auto", "triton", "blocked", "naive"] = "auto"  # naive: this file's loss; others: kernels/
    out: str = "runs/simclr"  # folder of the run; if it holds a run, a new one beside it, such as runs/simclr-2

    def check(self) -> None:
        super().check()
        self.need("batch_size > 1", "lr > 0", "temperature > 0", "projection_dim > 0", "blur <= 1")
        self.need("0 < crop_min_scale <= 1", "jitter_strength <= 2.5")  # at 2.5 the hue turns by half a circle


def augment(x: Tensor, config: Config) -> Tensor:
    """t(x) after the crop (appendix A), drawn anew for every image. x: (N, 3, H, W) in [0, 1]."""
    s = config.jitter_strength
    x = sometimes(x.clone(), 0.5, flip)
    x = sometimes(x, 0.8, color_jitter, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    x = sometimes(x, 0.2, grey)
    x = sometimes(x, config.blur, gaussian_blur)
    return normalize(x)  # ours: the paper feeds values in [0, 1]


class SimCLR(nn.Module):
    """f and g. `model(x1, x2)` is z of both views, `model.backbone(x)` is h, `model.embed(x)` is g(h).

    The mlp head is the authors': neither Linear layer has a bias, since BN follows; the last BN has no shift.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = common.build_backbone(config)
        d, self.dim = self.backbone.feature_dim, config.projection_dim
        hidden = config.hidden_dim or d
        if config.projection_head == "none":
            self.projector, self.dim = nn.Identity(), d
        elif config.projection_head == "linear":
            self.projector = nn.Sequential(nn.Linear(d, self.dim, bias=False), bn_without_shift(self.dim))
        else:  # g(h) = W2 relu(W1 h)
            first = [nn.Linear(d, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
            last = [nn.Linear(hidden, self.dim, bias=False), bn_without_shift(self.dim)]
            self.projector = nn.Sequential(*first, *last)

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(torch.cat([x1, x2])).chunk(2)  # (N, d) each; BN over both views


def bn_without_shift(width: int) -> nn.BatchNorm1d:
    bn = nn.BatchNorm1d(width)
    bn.bias.requires_grad_(False)  # stays 0
    return bn


def nt_xent(z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5) -> Tensor:
    """Equation 1 averaged over the 2N anchors. z1, z2: (N, d), row i of image i, any norm; temperature > 0.

    This naive loss builds the 2N x 2N matrix. cross_entropy shifts by the row maximum, so any temperature is safe.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, d)
    s = z @ z.T / temperature  # (2N, 2N)
    s.fill_diagonal_(float("-inf"))  # k != i: view i itself drops out of the sum
    n = len(z1)
    positive = torch.arange(2 * n, device=z.device).roll(n)  # the positive of i is i + N, modulo 2N
    return F.cross_entropy(s, positive)


def train(config: Config, data: Any = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data` (see `common.Run`). Writes a run's folder and returns the final figures."""
    run = common.Run(config, data)
    model = SimCLR(config).to(run.device, memory_format=torch.channels_last)
    n, tau = config.batch_size, config.temperature
    lr = config.lr * {"linear": n / 256, "sqrt": math.sqrt(n) / 4, "none": 1.0}[config.lr_scaling]
    weights = common.parameter_groups(model, config.weight_decay)
    optimizer = (common.LARS if config.optimizer == "lars" else torch.optim.SGD)(weights, lr=lr, momentum=0.9)
    loss_of = run.loss(nt_xent)  # nt_xent above or a kernel of kernels/, as --loss-backend says
    network = run.begin(model, optimizer=optimizer, guess=math.log(2 * n - 1))  # f and g

    for _, (x1, x2) in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):  # also saves and measures
        x1, x2 = augment(x1, config), augment(x2, config)  # t(x), t'(x): (n, 3, S, S)
        set_lr(optimizer, cosine_lr(run.step, run.total, config.warmup_epochs * run.steps, lr))

        z1, z2 = network(x1, x2)  # (n, d) each
        loss = loss_of(z1, z2, tau)  # equation 1; a kernel computes it without the matrix

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss, z1, x1, x2)
    return run.finish()


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
