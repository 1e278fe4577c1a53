"""SimSiam: Exploring Simple Siamese Representation Learning.

Chen, He, CVPR 2021, https://arxiv.org/abs/2011.10566

SimSiam draws two views of each image. From the output of one view a predictor has to predict the output of the other
view, and no gradient flows through the other view. SimSiam needs no negatives, no momentum encoder and no large batch.
Without this stop-gradient all outputs collapse to one:

    z_i = f(x_i)    p_i = h(z_i)    f is the backbone and a projection MLP                            (section 3)
    D(p, z) = -(p / |p|) . (z / |z|)                                                                  (equation 1)
    L = 1/2 D(p_1, stopgrad(z_2)) + 1/2 D(p_2, stopgrad(z_1))      a mean over N images, -1 to 1      (equation 4)

Only the backbone is kept: its output, which the other files call h, is the representation. (Here h is the predictor.)

    paper                      here                                flag
    f                          model.backbone, .projector          --backbone, --projection-dim, --projector-layers
    h, its absence (table 1)   model.predictor                     --predictor, --predictor-lr, --predictor-dim
    stopgrad (figure 2)        stop_gradient                       --no-stop-gradient
    D (section 4.5)            DISTANCES                           --similarity
    N (table 2)                config.batch_size                   --batch-size
    BN in the heads (table 3)  layer                               --head-bn
    symmetry (section 4.6)     train                               --no-symmetric

    python simsiam.py                                       the demo: built-in data, two CPU cores
    python simsiam.py --data /my/photos                     your own pictures
    python simsiam.py --no-stop-gradient                    the collapse of figure 2

The demo ends at a kNN accuracy of 0.852 to 0.925; raw pixels reach 0.726 (seeds 0 to 4; an EPYC with AVX2).

Section 5's alternation and moving average are in benchmarks/simsiam_section5.py. This file differs from the authors'
code in two points. Our learning rate moves at every step, the authors' at every epoch. Our blur's kernel is a tenth of
the side; the authors' blur (Pillow's) has no bound and blurs visibly more at 32 pixels.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunConfig, cosine_lr, set_lr
from images import color_jitter, ensure, flip, gaussian_blur, grey, normalize, sometimes

CIFAR = dict(  # appendix D
    data="cifar10", image_size=32, backbone="resnet18", stem="cifar", epochs=800, lr=0.03, weight_decay=5e-4,
    projector_layers=2, blur=0.0,
)  # fmt: skip
PHOTOS = dict(  # ours: for your own pictures, hundreds or more; sgd without a warm-up, as in the paper
    image_size=128, backbone="resnet18", epochs=100, batch_size=128, lr=0.1,
)  # fmt: skip
DEMO = dict(  # ours: learns the shapes set on two CPU cores in about two minutes
    data="shapes", image_size=32, backbone="resnet8", epochs=8, batch_size=64, lr=0.8, warmup_epochs=2.0,
    hidden_dim=256, projection_dim=256, predictor_dim=64, projector_layers=2, crop_min_scale=0.35, blur=0.0,
)  # fmt: skip


@dataclass(kw_only=True)
class Config(RunConfig):
    """SimSiam's flags. The defaults are the paper's ImageNet recipe; section and table numbers are the paper's."""

    PRESETS = {"paper": {}, "cifar": CIFAR, "photos": PHOTOS, "demo": DEMO}

    stop_gradient: bool = True  # no gradient through the predicted view; with one, outputs collapse (section 4.1)
    predictor: Literal["mlp", "none", "fixed"] = "mlp"  # mlp, none, or fixed at its random first weights (table 1)
    predictor_lr: Literal["constant", "decayed"] = "constant"  # lr of the predictor (table 1: 68.1; decayed: 67.7)
    predictor_dim: int = 512  # width of the predictor's hidden layer (section 3)
    projection_dim: int = 2048  # width of the outputs of projector and predictor (section 3)
    hidden_dim: int = 2048  # width of the projector's hidden layers (section 3)
    projector_layers: int = 3  # Linear layers of the projector (section 3; appendix D, CIFAR: 2)
    head_bn: Literal["none", "hidden", "default", "all"] = "default"  # default: no BN on predictor's output (table 3)
    similarity: Literal["cosine", "cross-entropy"] = "cosine"  # how the loss compares two outputs (section 4.5)
    symmetric: bool = True  # each view predicts the other; if off, only the first view predicts (section 4.6)
    crop_min_scale: float = 0.2  # least share of the picture that a crop covers; the most is 1 (appendix A)
    jitter_strength: float = 1.0  # factor on colour jitter: brightness, contrast, saturation 0.4, hue 0.1 (appendix A)
    blur: float = 0.5  # probability of a blur (appendix A; CIFAR: none)
    epochs: int = 100  # passes over the training images; the best results take 800 (section 4)
    batch_size: int = 512  # images in a step, N (section 3)
    lr: float = 0.05  # learning rate, which the run multiplies by --batch-size / 256 (section 3)
    weight_decay: float = 1e-4  # weight decay, also on BN and biases (section 3)
    warmup_epochs: float = 0.0  # epochs of warm-up, then a cosine to 0; 10 if N >= 1024 (section 4.3) or no BN (4.4)
    out: str = "runs/simsiam"  # folder of the run; if it holds a run, a new one beside it, such as runs/simsiam-2

    def check(self) -> None:
        super().check()
        self.need("batch_size > 1", "lr > 0", "projector_layers > 0", "hidden_dim > 0", "projection_dim > 0")
        self.need("predictor_dim > 0", "blur <= 1")
        self.need("0 < crop_min_scale <= 1", "jitter_strength <= 5")  # at 5 the hue turns by half a circle
        heads = self.predictor != "none" or self.head_bn != "all"
        ensure(heads, "--head-bn all: --predictor none has no BN on p; give --head-bn default")


def augment(x: Tensor, config: Config) -> Tensor:
    """T(x) after the crop: MoCo v2's (appendix A), drawn anew for every image. x: (N, 3, H, W)."""
    s = config.jitter_strength
    x = sometimes(x.clone(), 0.8, color_jitter, 0.4 * s, 0.4 * s, 0.4 * s, 0.1 * s)
    x = sometimes(x, 0.2, grey)
    x = sometimes(x, config.blur, gaussian_blur)
    x = sometimes(x, 0.5, flip)
    return normalize(x)


def layer(inputs: int, outputs: int, bn: bool, relu: bool = True, affine: bool = True) -> list[nn.Module]:
    """A Linear layer, then BN and ReLU. With BN the Linear layer has no bias, which would have no effect."""
    parts = [nn.Linear(inputs, outputs, bias=not bn)]
    parts += [nn.BatchNorm1d(outputs, affine=affine)] if bn else []
    return parts + ([nn.ReLU(inplace=True)] if relu else [])


class SimSiam(nn.Module):
    """f and h. `model(x1, x2)` is p1, p2, z1, z2, (N, d) each. `model.backbone(x)` is kept, `model.embed(x)` is z.

    The last BN of the projector has no scale and shift (the authors' code).
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

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z1, z2 = self.embed(x1), self.embed(x2)  # one view at a time, so each BN sees one view
        return self.predictor(z1), self.predictor(z2), z1, z2


def negative_cosine(p: Tensor, z: Tensor, stop_gradient: bool = True) -> Tensor:
    """D(p, stopgrad(z)), equation 1, the mean over the N rows of p and z, (N, d), of any norm: -1 to 1."""
    z = z.detach() if stop_gradient else z
    return -(F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1).mean()


def softmax_cross_entropy(p: Tensor, z: Tensor, stop_gradient: bool = True) -> Tensor:
    """D(p, stopgrad(z)) = -softmax(z) . log softmax(p), over d pseudo-categories, the mean over rows (section 4.5)."""
    z = z.detach() if stop_gradient else z
    return -(z.softmax(1) * p.log_softmax(1)).sum(1).mean()


DISTANCES = {"cosine": negative_cosine, "cross-entropy": softmax_cross_entropy}


def train(config: Config, data: Any = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data` (see `common.Run`). Returns the final figures; `out` is the run's folder."""
    run = common.Run(config, data)
    model = SimSiam(config).to(run.device, memory_format=torch.channels_last)
    lr, D = config.lr * config.batch_size / 256, DISTANCES[config.similarity]
    f = {"params": [*model.backbone.parameters(), *model.projector.parameters()]}
    h = {"params": list(model.predictor.parameters()), "constant": config.predictor_lr == "constant"}
    optimizer = torch.optim.SGD([f, h], lr=lr, momentum=0.9, weight_decay=config.weight_decay)
    note = f"{D.__name__}, {'the mean of both directions' if config.symmetric else 'of one direction'}; "
    note += f"the predictor's learning rate is {config.predictor_lr}"
    network = run.begin(model, optimizer=optimizer, note=note)
    optimizer.param_groups[1]["lr"] = lr  # --resume may come with another --lr

    for _, (x1, x2) in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):
        x1, x2 = augment(x1, config), augment(x2, config)  # (N, 3, S, S)
        set_lr(optimizer, cosine_lr(run.step, run.total, config.warmup_epochs * run.steps, lr))

        p1, p2, z1, z2 = network(x1, x2)  # (N, d) each
        loss = D(p1, z2, config.stop_gradient)
        if config.symmetric:
            loss = loss / 2 + D(p2, z1, config.stop_gradient) / 2  # equation 4

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss, z1, x1, x2)
    return run.finish()


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
