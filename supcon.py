"""SupCon: Supervised Contrastive Learning.

Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu, Krishnan, NeurIPS 2020, https://arxiv.org/abs/2004.11362

SupCon is SimCLR with labels. It draws two views of each of N images. A(i) are all views but view i. The positives P(i)
are the views in A(i) whose class is the class of view i. This file is stage 1, which learns the encoder. Stage 2, a
linear classifier on the frozen encoder, is `python linear_eval.py runs/supcon --protocol paper`:

    z_i = Proj(Enc(x_i)), which the loss scales to length 1                                         (section 3.1)
    r_ip = exp(z_i . z_p / tau) / sum over a in A(i) of exp(z_i . z_a / tau)
    L_out = sum over i of -1/|P(i)| sum over p in P(i) of log r_ip                                  (equation 2)
    L_in  = sum over i of -log( 1/|P(i)| sum over p in P(i) of r_ip )                               (equation 3)

This file takes the mean over the 2N anchors i and not their sum, times tau over the base temperature (section 4.5). An
anchor without positives adds 0. If each image is a class of its own, both losses are SimCLR's. Jensen's inequality
gives L_in <= L_out; the paper's text prints L_out <= L_in. Section 3.2.2 finds L_out better.

    paper                       here                       flag
    Aug(x)                      augment                    --crop-min-scale, --jitter-strength, --blur
    Enc; r = Enc(x)             model.backbone; h          --backbone, --stem, --normalize-h
    Proj, z                     model.projector, z         --projection-head, --hidden-dim, --projection-dim
    tau                         temperature                --temperature, --base-temperature
    L_out, L_in                 sup_con                    --loss out, --loss in
    the cross-entropy baseline  classifier                 --loss cross-entropy

    python supcon.py                                       the demo: built-in data, two CPU cores
    python supcon.py --loss cross-entropy                  the one-stage baseline in the same budget
    python supcon.py --data /my/photos                     your own pictures, in a sub-folder for each class

The demo ends at a kNN accuracy of 0.975 to 0.984; raw pixels reach 0.726 (seeds 0 to 4; an EPYC with AVX2).

The authors published two programs. The paper's ImageNet figures come from google-research/google-research, `supcon/`
("Google" below), and our defaults are its recipe. The preset `cifar` is the recipe of HobbitLong/SupContrast.

This file has three main differences. Google augments by AutoAugment, which this file does not have; our defaults
augment as Google's SimCLR does. Our baseline uses SupCon's recipe; both programs give the baseline a learning rate of
its own. In SupContrast the learning rate moves at every epoch, down to a thousandth; here it moves at every step, down
to 0. The paper's other baseline, max-margin, is in benchmarks/supervised.py.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunConfig, cosine_lr, gather, set_lr
from images import color_jitter, ensure, flip, gaussian_blur, grey, normalize, sometimes

SUPCONTRAST = dict(projection_head="mlp", normalize_h=False, zero_init=False, jitter_strength=0.5, blur=0.0)
CIFAR = dict(  # the README and the defaults of SupContrast
    SUPCONTRAST, data="cifar10", image_size=32, stem="cifar", epochs=1000, batch_size=1024, optimizer="sgd", lr=0.5,
    weight_decay=1e-4, warmup_epochs=10.0, base_temperature=0.07, crop_min_scale=0.2,
)  # fmt: skip
PHOTOS = dict(  # ours: for your own pictures, hundreds or more
    SUPCONTRAST, image_size=128, backbone="resnet18", epochs=100, batch_size=128, optimizer="sgd", lr=0.1,
    weight_decay=1e-4, warmup_epochs=0.0, base_temperature=0.1, crop_min_scale=0.2,
)  # fmt: skip
DEMO = dict(  # ours: learns the shapes set on two CPU cores in about a minute
    SUPCONTRAST, data="shapes", image_size=32, backbone="resnet8", epochs=5, batch_size=128, lr=2.0, weight_decay=1e-4,
    warmup_epochs=1.0, base_temperature=0.1, hidden_dim=256, projection_dim=64, crop_min_scale=0.35,
)  # fmt: skip


@dataclass(kw_only=True)
class Config(RunConfig):
    """SupCon's flags. The defaults are Google's for ImageNet: `supcon_imagenet_resnet50.sh`, with `configs.sh`."""

    PRESETS = {"paper": {}, "cifar": CIFAR, "photos": PHOTOS, "demo": DEMO}

    loss: Literal["out", "in", "cross-entropy"] = "out"  # L_out, L_in, or the one-stage baseline (equations 2 and 3)
    temperature: float = 0.1  # tau: smaller puts more weight on the nearest views (section 4)
    base_temperature: float = 1.0  # the loss is multiplied by tau / base (1: section 4.5, Google; 0.07: SupContrast)
    epochs: int = 350  # passes over the training images (section 4.5; Google)
    batch_size: int = 6144  # images in a step, N, with two views each (section 4.5; Google)
    optimizer: Literal["lars", "sgd"] = "lars"  # lars (section 4.5, Google) or sgd (SupContrast), with momentum 0.9
    lr: float = 9.6  # learning rate, not scaled by the batch size (Google: 0.4 for 256 images, so 9.6 for 6144)
    weight_decay: float = 1e-3  # weight decay; lars spares BN (as Google) and biases (ours), sgd nothing
    warmup_epochs: float = 12.0  # epochs of linear warm-up, then a cosine to 0 (Google; SupContrast: 10, for N > 256)
    normalize_h: bool = True  # scale the backbone's output to length 1 (section 3.1; Google; SupContrast does not)
    zero_init: bool = True  # start the last BN of each residual block at 0 (Google), and not at 1 (SupContrast)
    projection_head: Literal["linear", "mlp"] = "linear"  # head: one layer without a bias (Google) or two (SupContrast)
    hidden_dim: int = 0  # hidden width of an mlp head; 0 = the backbone's (section 3.1: 2048)
    projection_dim: int = 128  # width of z, the projection head's output (section 3.1)
    crop_min_scale: float = 0.08  # least share of the picture in a crop; the most is 1 (Google; SupContrast: 0.2)
    jitter_strength: float = 1.0  # colour jitter: 0.8 times this, hue 0.2 times (Google's SimCLR; SupContrast: 0.5)
    blur: float = 0.5  # probability of a blur (Google's SimCLR; SupContrast: none)
    loss_backend: Literal["auto", "triton", "blocked", "naive"] = "auto"  # naive: this file's loss; others: kernels/
    out: str = "runs/supcon"  # folder of the run; if it holds a run, a new one beside it, such as runs/supcon-2

    def check(self) -> None:
        super().check()
        self.need("batch_size > 1 or loss == 'cross-entropy'", "lr > 0", "temperature > 0", "base_temperature > 0")
        self.need("projection_dim > 0", "0 < crop_min_scale <= 1", "blur <= 1")
        self.need("jitter_strength <= 2.5")  # at 2.5 the hue turns by half a circle
        baseline, backend = self.loss == "cross-entropy", self.loss_backend
        no_kernel = baseline and backend not in ("auto", "naive")
        ensure(not no_kernel, f"--loss-backend {backend}: cross-entropy has no kernel; leave the flag out")


def augment(x: Tensor, config: Config) -> Tensor:
    """Aug(x) after the crop, drawn anew for every image. x: (N, 3, H, W) in [0, 1]."""
    s = config.jitter_strength
    x = sometimes(x.clone(), 0.5, flip)
    x = sometimes(x, 0.8, color_jitter, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    x = sometimes(x, 0.2, grey)
    x = sometimes(x, config.blur, gaussian_blur)
    return normalize(x)


class UnitLength(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.normalize(h, dim=1)


class SupCon(nn.Module):
    """Enc and Proj. `model(x1, x2)` is z of both views, `model.backbone(x)` is h, `model.embed(x)` is z.

    The baseline has no Proj: z is h, of any length, and the baseline's classifier reads it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = common.build_backbone(config, zero_init_residual=config.zero_init)
        d = self.dim = self.backbone.feature_dim
        self.projector = nn.Identity()
        if config.loss != "cross-entropy":
            if config.normalize_h:
                self.backbone.fc = UnitLength()  # the last layer, where a torchvision ResNet has its classifier
            hidden, self.dim = config.hidden_dim or d, config.projection_dim
            if config.projection_head == "linear":
                self.projector = nn.Linear(d, self.dim, bias=False)
            else:
                self.projector = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, self.dim))

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(torch.cat([x1, x2])).chunk(2)  # (N, d) each; BN over both views


def sup_con(z: Tensor, labels: Tensor, temperature: float | Tensor = 0.1, *, loss: str = "out") -> Tensor:
    """Equation 2 ("out") or 3 ("in"), the mean over the M anchors. z: (M, d), any norm; labels: (M,), -1 for none.

    This naive loss builds the M x M matrix. An anchor without positives adds 0 and counts in the mean.
    """
    if loss not in ("out", "in"):
        raise ValueError(f"loss must be 'out' or 'in', got {loss!r}")
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & (labels != -1) & ~itself  # (M, M): p in P(i)
    count = positive.sum(1)  # |P(i)|
    kept = count > 0
    s, positive, count = (z @ z.T / temperature)[kept], positive[kept], count[kept]
    log_r = s - s.masked_fill(itself[kept], -torch.inf).logsumexp(1, keepdim=True)  # log r_ip
    if loss == "out":
        each = -log_r.masked_fill(~positive, 0).sum(1) / count
    else:
        each = count.to(s).log() - log_r.masked_fill(~positive, -torch.inf).logsumexp(1)
    return each.sum() / len(z)


def train(config: Config, data: Any = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data` (see `common.Run`). Returns the final figures; `out` is the run's folder."""
    run = common.Run(config, data)
    labels, name, baseline = run.data.train.labels, run.data.name, config.loss == "cross-entropy"
    bare = labels < 0  # (number of images,)
    ensure(not bare.all(), f"--data {name}: no image has a label; give two class sub-folders or more")
    missing = f"--loss cross-entropy: {int(bare.sum()):,} images have no label; give --loss out, or remove the images"
    ensure(not (baseline and bare.any()), missing)
    # an image without a label gets a class of its own: its only positive is its other view, as in SimCLR
    labels = torch.where(bare, -2 - torch.arange(len(labels)), labels).to(run.device)

    model = SupCon(config).to(run.device, memory_format=torch.channels_last)
    tau, scale = config.temperature, config.temperature / config.base_temperature
    parts = nn.ModuleDict({"model": model})
    if baseline:
        classes = len(run.data.classes)
        classifier = parts["classifier"] = nn.Linear(model.dim, classes).to(run.device)
        guess, note = math.log(classes), "cross-entropy; temperature, projection head and --normalize-h are unused"
    else:
        loss_of = run.loss(sup_con)  # sup_con above or a kernel of kernels/, as --loss-backend says
        guess = scale * math.log(2 * config.batch_size - 1)
        note = f"sup_con {config.loss}, times tau over its base: {tau:g} / {config.base_temperature:g} = {scale:g}"
    if config.optimizer == "lars":
        optimizer = common.LARS(common.parameter_groups(parts, config.weight_decay), lr=config.lr, momentum=0.9)
    else:
        optimizer = torch.optim.SGD(parts.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    network = run.begin(**parts, optimizer=optimizer, guess=guess, note=note)

    for index, (x1, x2) in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):
        x1, x2 = augment(x1, config), augment(x2, config)  # (N, 3, S, S)
        set_lr(optimizer, cosine_lr(run.step, run.total, config.warmup_epochs * run.steps, config.lr))

        z, y = torch.cat(network(x1, x2)), labels[index.to(run.device)].repeat(2)  # (2N, d), (2N,)
        if baseline:  # not in DDP: from all processes' views, each gets the same gradients
            loss = F.cross_entropy(classifier(gather(z)), gather(y))
        else:
            loss = scale * loss_of(z, y, tau, loss=config.loss)  # equation 2 or 3

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss, z, x1, x2)
    return run.finish()


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
