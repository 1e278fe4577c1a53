"""BYOL: Bootstrap Your Own Latent, A New Approach to Self-Supervised Learning.

Grill, Strub, Altché, Tallec, Richemond and others, NeurIPS 2020, https://arxiv.org/abs/2006.07733

BYOL draws two views of each image, v = t(x) and v' = t'(x), with different strengths of augmentation. From one view the
online network has to predict the target network's output for the other view. The target network is a slow average of
the online network. There are no negatives:

    y = f(v)    z = g(y)    q(z)           online, with parameters theta
    y' = f'(v')    z' = g'(y')             target, with parameters xi, no gradient
    L = | q(z)/|q(z)| - z'/|z'| |^2 = 2 - 2 cos(q(z), z')                                         (equation 2)
    loss = L + L with the views exchanged             a mean over N images, a sum over both, 0 to 8
    xi <- tau xi + (1 - tau) theta                    after each step of theta                    (equations 1, 4)
    tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2  at step k of K                              (section 3.2)

Only f is kept: its output y, which the other files call h, is the representation.

    paper                      here                            flag
    f, g, q                    model.backbone, .projector,     --backbone, --hidden-dim, --projection-dim,
                               .predictor                      --no-predictor
    f', g', xi                 model.target                    --momentum
    T, T'                      augment                         --blur-1, --blur-2, --solarize-1, --solarize-2
    tau_base, tau              config.momentum, tau_at         --momentum: 0 = theta itself, 1 = a fixed random target
    N                          config.batch_size               --batch-size

    python byol.py                                             the demo: built-in data, two CPU cores
    python byol.py --data /my/photos                           your own pictures
    python byol.py --preset paper-100 --data /imagenet         the published 100 epochs; paper-300; paper (1000)

The demo ends at a kNN accuracy of 0.838 to 0.924; raw pixels reach 0.726 (seeds 0 to 4; an EPYC with AVX2).

This file differs from the authors' code mainly in two points. We resize crops bilinearly; the authors resize them
bicubically (appendix B). Our colour jitter is torchvision's, which multiplies by factors. The authors' jitter adds to
the brightness, changes the contrast channel by channel, and changes the saturation in HSV.
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

SHORT = dict(weight_decay=1e-6, momentum=0.99)  # for 100 and for 300 epochs (the authors' code)
CIFAR = dict(  # ours, since the paper does not pretrain on CIFAR-10: the paper's views without the blur
    data="cifar10", image_size=32, backbone="resnet18", stem="cifar", epochs=800, batch_size=256,
    optimizer="sgd", lr=0.1, weight_decay=5e-4, momentum=0.99, hidden_dim=2048, blur_1=0.0, blur_2=0.0,
)  # fmt: skip
PHOTOS = dict(  # ours: for your own pictures, hundreds or more
    image_size=128, backbone="resnet18", epochs=100, batch_size=128, optimizer="sgd", lr=0.2, weight_decay=1e-4,
    warmup_epochs=0.0, momentum=0.99, hidden_dim=1024,
)  # fmt: skip
DEMO = dict(  # ours: learns the shapes set on two CPU cores in about three minutes
    data="shapes", image_size=32, backbone="resnet8", epochs=11, batch_size=64, optimizer="sgd", lr=0.8,
    weight_decay=1e-4, warmup_epochs=1.0, hidden_dim=256, projection_dim=256,
    momentum=0.9,  # at 0.99 the target would be too far behind in so short a run
    crop_min_scale=0.35, blur_1=0.0, blur_2=0.0, solarize_2=0.0,
)  # fmt: skip


@dataclass(kw_only=True)
class Config(RunConfig):
    """BYOL's flags. The defaults are the paper's ImageNet recipe; section and appendix numbers are the paper's."""

    PRESETS = {
        "paper": {},
        "paper-300": dict(SHORT, epochs=300, lr=0.3),
        "paper-100": dict(SHORT, epochs=100, lr=0.45),
        "cifar": CIFAR,
        "photos": PHOTOS,
        "demo": DEMO,
    }

    momentum: float = 0.996  # share that the target keeps, rising to 1; 0: the online network, 1: fixed (table 5a)
    predictor: bool = True  # the predictor q; without it all outputs collapse to one (table 5b)
    symmetric: bool = True  # add the loss with the views exchanged (section 3.1)
    hidden_dim: int = 4096  # width of the hidden layers of projection head and predictor (section 3.2)
    projection_dim: int = 256  # width of the outputs of projection head and predictor (section 3.2)
    crop_min_scale: float = 0.08  # least share of the picture that a crop covers; the most is 1 (appendix B)
    jitter_strength: float = 1.0  # factor on colour jitter: brightness, contrast 0.4, saturation 0.2, hue 0.1 (table 6)
    blur_1: float = 1.0  # probability that the first view is blurred (table 6)
    blur_2: float = 0.1  # probability that the second view is blurred (table 6)
    solarize_1: float = 0.0  # probability that the first view is solarized (table 6)
    solarize_2: float = 0.2  # probability that the second view is solarized (table 6)
    epochs: int = 1000  # passes over the training images (section 3.2)
    batch_size: int = 4096  # images in a step, N (section 3.2)
    optimizer: Literal["lars", "sgd"] = "lars"  # lars (section 3.2) or sgd, both with momentum 0.9
    lr: float = 0.2  # learning rate, which the run multiplies by --batch-size / 256 (section 3.2)
    weight_decay: float = 1.5e-6  # weight decay, except on BN and biases (section 3.2)
    warmup_epochs: float = 10.0  # epochs of linear warm-up, then a cosine to 0 (section 3.2)
    out: str = "runs/byol"  # folder of the run; if it holds a run, a new one beside it, such as runs/byol-2

    def check(self) -> None:
        super().check()
        self.need("batch_size > 1", "lr > 0", "hidden_dim > 0", "projection_dim > 0", "momentum <= 1")
        self.need("blur_1 <= 1", "blur_2 <= 1", "solarize_1 <= 1", "solarize_2 <= 1")
        self.need("0 < crop_min_scale <= 1", "jitter_strength <= 5")  # at 5 the hue turns by half a circle


def solarize(x: Tensor) -> Tensor:
    """Invert every value of at least one half."""
    return torch.where(x >= 0.5, 1 - x, x)


def augment(x: Tensor, config: Config, blur: float, solarized: float) -> Tensor:
    """t(x) after the crop (appendix B, table 6), drawn anew for every image. x: (N, 3, H, W) in [0, 1].

    T and T' differ only in `blur` and `solarized`, the probabilities of these two operations.
    """
    s = config.jitter_strength
    x = sometimes(x.clone(), 0.5, flip)
    x = sometimes(x, 0.8, color_jitter, 0.4 * s, 0.4 * s, 0.2 * s, 0.1 * s)
    x = sometimes(x, 0.2, grey)
    x = sometimes(x, blur, gaussian_blur)
    x = sometimes(x, solarized, solarize)
    return normalize(x)  # as the authors do


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """g and q (section 3.2): no BN on the output, and only the first layer has a bias (the authors' code)."""
    first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), last)


class BYOL(nn.Module):
    """Online and target network. `model(v, other)` is q(z) of v and z' of the other view, (N, d) each.

    `model.backbone(x)` is the representation, which is kept; `model.embed(x)` is z.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dim, hidden = config.projection_dim, config.hidden_dim
        self.backbone = common.build_backbone(config)
        self.projector = mlp(self.backbone.feature_dim, hidden, self.dim)
        self.predictor = mlp(self.dim, hidden, self.dim) if config.predictor else nn.Identity()
        # The target starts from random weights of its own (the authors' code), and --momentum 1 keeps them. With --init
        # its backbone starts from the same weights as f.
        self.target = nn.Sequential(common.build_backbone(config), mlp(self.backbone.feature_dim, hidden, self.dim))
        self.target.requires_grad_(False)
        if config.momentum == 0:
            self.update_target(0.0)

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    def forward(self, v: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        q = self.predictor(self.embed(v))
        with torch.no_grad():
            return q, self.target(other)

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """xi <- tau xi + (1 - tau) theta, for parameters only: the target has BN statistics of its own."""
        theta = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(list(self.target.parameters()), theta, 1 - tau)


def tau_at(step: int, total: int, base: float) -> float:
    """tau at `step` k of `total` K, 0 <= k <= K: from `base` to 1 (section 3.2)."""
    if base == 0:
        return 0.0  # the target stays the online network (table 5a)
    return 1 - (1 - base) * (math.cos(math.pi * step / total) + 1) / 2


def byol_loss(q: Tensor, z: Tensor) -> Tensor:
    """Equation 2, the mean over N rows: q = q(z_theta), z = z'_xi, (N, d), of any norm. No gradient reaches z."""
    q, z = F.normalize(q, dim=1), F.normalize(z.detach(), dim=1)
    return (2 - 2 * (q * z).sum(1)).mean()


def train(config: Config, data: Any = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data` (see `common.Run`). Returns the final figures; `out` is the run's folder."""
    run = common.Run(config, data)
    model = BYOL(config).to(run.device, memory_format=torch.channels_last)
    lr, weights = config.lr * config.batch_size / 256, common.parameter_groups(model, config.weight_decay)
    if config.optimizer == "lars":
        optimizer = common.LARS(weights, lr=lr, momentum=0.9, lr_in_momentum=False)
    else:
        optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9)
    note = f"byol_loss, {'the sum of both directions, 0 to 8' if config.symmetric else 'of one direction, 0 to 4'}; "
    target = {0: "the online network itself", 1: "fixed at its first weights"}
    note += "the target is " + target.get(config.momentum, f"a moving average, tau from {config.momentum:g} to 1")
    note += "; std and rank are of q(z), which has no BN: a std far below healthy is normal"
    network = run.begin(model, optimizer=optimizer, note=note)

    for _, (v1, v2) in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):
        v1 = augment(v1, config, config.blur_1, config.solarize_1)  # t(x): (N, 3, S, S)
        v2 = augment(v2, config, config.blur_2, config.solarize_2)  # t'(x)
        set_lr(optimizer, cosine_lr(run.step, run.total, config.warmup_epochs * run.steps, lr))

        q1, z2 = network(v1, v2)  # q(z) of v1, z' of v2: (N, d); one view at a time, so each BN sees one view
        loss = byol_loss(q1, z2)
        if config.symmetric:
            q2, z1 = network(v2, v1)
            loss = loss + byol_loss(q2, z1)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(tau_at(run.step, run.total, config.momentum))  # after the step (section 3.2)
        run.log(loss, q1, v1, v2)
    return run.finish()


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
