"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations.

Chen, Kornblith, Norouzi, Hinton, ICML 2020, https://arxiv.org/abs/2002.05709

Of each of N images two augmented views are drawn. Among the 2N views, the other view of the same image is the
positive and the remaining 2N - 2 are negatives:

    h_i = f(x_i)    z_i = g(h_i)    s_ij = z_i . z_j / (|z_i| |z_j|)                              (section 2.1)
    l(i, j) = -log( exp(s_ij / tau) / sum over k != i of exp(s_ik / tau) )                         (equation 1)
    L = 1/(2N) sum over the N positive pairs of [ l(2k-1, 2k) + l(2k, 2k-1) ]                      (algorithm 1)

f is kept and g is thrown away: h is the representation.

    paper                      here                        flag
    f, the base encoder        model.backbone              --backbone, --stem
    g, the projection head     model.projector             --projection-head, --hidden-dim, --projection-dim
    t ~ T, an augmentation     augment                     --augment, --jitter-strength, --crop-min-scale, ...
    N                          config.batch_size           --batch-size, --micro-batch-size
    tau                        temperature                 --temperature

    python simclr.py                                       the demo: embedded data, two CPU cores, three minutes
    python simclr.py --data /my/photos --backbone resnet18 --batch-size 256 --temperature 0.2

Measured: `python simclr.py`, two Xeon cores, torch 2.14.1, 2 min 34 s: kNN on held-out images 0.841 (raw
pixels 0.390, untrained backbone 0.203). Ten epochs of CIFAR-10 with resnet8: kNN 0.567, linear probe 0.601 (README).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunConfig, coin, where_drawn

try:
    from kernels import nt_xent as fused_nt_xent
    from kernels import resolve_backend
except ImportError as error:  # the folder was not copied along: the naive loss below runs
    if error.name != "kernels":
        raise
    fused_nt_xent = None

OPS = ("crop", "flip", "color", "blur", "solarize", "cutout", "sobel", "noise", "rotate")


@dataclass(kw_only=True)
class Config(RunConfig):
    """SimCLR's flags. The defaults are the paper's ImageNet recipe; section and appendix numbers are the paper's."""

    METHOD: ClassVar[str] = "simclr"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"data": "imagenet"},  # not downloadable: --data says where it is
        "cifar": {  # appendix B.9; N, network as the authors' README (its weight decay: 1e-4)
            **{"data": "cifar10", "image_size": 32, "backbone": "resnet18", "epochs": 1000, "batch_size": 512},
            **{"lr": 1.0, "temperature": 0.5, "jitter_strength": 0.5, "blur_probability": 0.0},
        },
        "demo": {  # ours: learns the shapes set on two CPU cores in under three minutes
            **{"data": "shapes", "image_size": 32, "backbone": "resnet8", "epochs": 13, "batch_size": 128},
            **{"optimizer": "sgd", "lr": 0.4, "weight_decay": 1e-4, "warmup_epochs": 1.0, "temperature": 0.2},
            **{
                "hidden_dim": 256,
                "projection_dim": 64,
                "crop_min_scale": 0.35,
                "jitter_strength": 0.5,
                "blur_probability": 0.0,
            },
        },
    }

    epochs: Annotated[int, "passes over the training images (section 4.1: 100; best 1000)", ">= 1"] = 100
    batch_size: Annotated[int, "N, images in a step; 2N views (section 2.2)", ">= 1"] = 4096
    lr: Annotated[float, "learning rate before --lr-scaling (section 2.2: 0.3 N / 256)", "> 0"] = 0.3
    lr_scaling: Annotated[
        Literal["linear", "sqrt", "none"], "linear: lr N/256; sqrt: lr sqrt(N)/4, which is the paper's 0.075 sqrt(N)"
    ] = "linear"
    optimizer: Annotated[Literal["lars", "sgd"], "lars (section 2.2) or sgd, both with momentum 0.9"] = "lars"
    weight_decay: Annotated[float, "weight decay, not on BN and biases (section 2.2)", ">= 0"] = 1e-6
    warmup_epochs: Annotated[float, "epochs of linear warm-up, then a cosine to 0 (section 2.2)", ">= 0"] = 10.0
    temperature: Annotated[float, "tau (section 4.1, ImageNet); small batches and few epochs like it larger", "> 0"] = (
        0.1
    )
    projection_head: Annotated[Literal["none", "linear", "mlp"], "g (figure 8)"] = "mlp"
    hidden_dim: Annotated[int, "width of g's hidden layer; 0 = the width of h, as in the paper", ">= 0"] = 0
    projection_dim: Annotated[int, "width of z (section 4.1)", ">= 1"] = 128
    augment: Annotated[str, f"augmentations in this order, of {', '.join(OPS)} (figure 5)"] = (
        "crop,flip,color,blur,solarize"
    )
    augment_one_branch: Annotated[
        bool, "both views share one random crop, and only the first is augmented further (figure 5's protocol)"
    ] = False
    crop_min_scale: Annotated[float, "least area of a crop; the most is 1 (appendix A)", "> 0, <= 1"] = 0.08
    flip_probability: Annotated[float, "mirror left and right (appendix A)", "0 to 1"] = 0.5
    jitter_strength: Annotated[float, "s: brightness, contrast, saturation 0.8 s, hue 0.2 s (appendix A)", ">= 0"] = 1.0
    jitter_probability: Annotated[float, "jitter the colours (appendix A)", "0 to 1"] = 0.8
    grey_probability: Annotated[float, "drop the colours, after the jitter (appendix A)", "0 to 1"] = 0.2
    blur_probability: Annotated[float, "blur: kernel a tenth of the side, sigma 0.1 to 2 (appendix A)", "0 to 1"] = 0.5
    solarize_probability: Annotated[float, "invert bright pixels (not in the paper; BYOL's)", "0 to 1"] = 0.0
    loss_backend: Annotated[
        Literal["auto", "triton", "blocked", "naive"],
        "auto = what is fastest here: triton on a GPU, blocked on a CPU, naive (the loss of this file) when small",
    ] = "auto"
    out: Annotated[str, "folder of the run's files"] = "runs/simclr"

    def __post_init__(self) -> None:
        super().__post_init__()
        for op in self.ops():
            if op not in OPS:
                raise common.InputError(f"--augment {self.augment}: no {op!r}; take some of {', '.join(OPS)}")
        if self.jitter_strength > 2.5:
            raise common.InputError(
                f"--jitter-strength {self.jitter_strength}: at most 2.5 (a hue shift of half a turn)"
            )
        if self.batch_size == 1:
            raise common.InputError("--batch-size 1: there are no negatives; give 2 or more")

    def ops(self) -> list[str]:
        return [op for op in self.augment.split(",") if op]

    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up (section 2.2 and appendix B.1)."""
        n = self.batch_size
        return self.lr * {"linear": n / 256, "sqrt": math.sqrt(n) / 4, "none": 1.0}[self.lr_scaling]


def augment(x: Tensor, config: Config, ops: list[str]) -> Tensor:
    """t(x): the augmentations `ops` in order, a draw of its own for every image. x: (N, 3, H, W) in [0, 1].

    The crop, where it comes first, has been done by the data loader. The strengths of cutout, noise and rotation
    are not in the paper; here a square of half the side, sigma up to 0.1, and quarter turns (figure 4).
    """
    n, size, s = len(x), config.image_size, config.jitter_strength
    for op in ops:
        if op == "crop":
            whole = torch.tensor(x.shape[2:]).expand(n, 2)
            x = common.crop_resize(x, common.random_crop_boxes(whole, (config.crop_min_scale, 1.0)), size)
        elif op == "flip":
            x = where_drawn(x, coin(n, config.flip_probability), common.flip)
        elif op == "color":  # appendix A: jitter, then drop the colours
            x = common.color_jitter(
                x, common.random_jitter(n, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, config.jitter_probability)
            )
            x = where_drawn(x, coin(n, config.grey_probability), common.to_grey)
        elif op == "blur" and config.blur_probability > 0:
            kernel = max(3, size // 10 // 2 * 2 + 1)  # a tenth of the side, odd
            sigma = torch.empty(n).uniform_(0.1, 2.0)
            x = where_drawn(
                x, coin(n, config.blur_probability), lambda y, s, k=kernel: common.gaussian_blur(y, s, k), sigma
            )
        elif op == "solarize" and config.solarize_probability > 0:
            x = where_drawn(x, coin(n, config.solarize_probability), common.solarize)
        elif op == "cutout":
            x = common.cutout(x, torch.rand(n, 2))
        elif op == "sobel":
            x = common.sobel(x)
        elif op == "noise":
            x = common.gaussian_noise(x, torch.empty(n).uniform_(0, 0.1))
        elif op == "rotate":
            x = common.rotate(x, torch.randint(4, (n,)))
    return x


class SimCLR(nn.Module):
    """f and g. `model(x)` is z (N, `projection_dim`), `model.backbone(x)` is h.

    The mlp head is the authors': BN after both layers, so Linears without bias, and no shift in the last BN.
    Raises `InputError` for an unknown backbone.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = common.build_backbone(config)
        d, out = self.backbone.feature_dim, config.projection_dim
        hidden = config.hidden_dim or d
        if config.projection_head == "none":
            self.projector = nn.Identity()
        elif config.projection_head == "linear":
            self.projector = nn.Sequential(nn.Linear(d, out, bias=False), bn_without_shift(out))
        else:  # g(h) = W2 relu(W1 h)
            self.projector = nn.Sequential(
                nn.Linear(d, hidden, bias=False),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
                nn.Linear(hidden, out, bias=False),
                bn_without_shift(out),
            )
        self.dim = d if config.projection_head == "none" else out

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


def bn_without_shift(width: int) -> nn.BatchNorm1d:
    bn = nn.BatchNorm1d(width)
    bn.bias.requires_grad_(False)  # stays 0
    return bn


def nt_xent(z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5) -> Tensor:
    """Equation 1 averaged over the 2N anchors. z1, z2: (N, d), rows of the same image, any norm; temperature > 0.

    The naive loss: it builds the 2N x 2N matrix. cross_entropy shifts by the row maximum, so any temperature is safe.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, d)
    s = z @ z.T / temperature  # (2N, 2N)
    s.fill_diagonal_(float("-inf"))  # k != i: masked, not subtracted
    n = len(z1)
    positive = torch.arange(2 * n, device=z.device).roll(n)  # i's positive is i + N, modulo 2N
    return F.cross_entropy(s, positive)


def choose_loss(config: Config, device: torch.device) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """The loss that runs, and its name for the header."""
    asked, tau, views = config.loss_backend, config.temperature, 2 * config.batch_size
    if fused_nt_xent is None:
        if asked not in ("auto", "naive"):
            raise common.InputError(f"--loss-backend {asked}: the folder kernels/ is not here; copy it along")
        return lambda z1, z2: nt_xent(z1.float(), z2.float(), tau), "naive (kernels/ is not here)"
    dtype = common.PRECISIONS[config.amp] or torch.float32
    try:
        name = resolve_backend(asked, views, views, device, dtype)
    except ValueError as error:
        raise common.InputError(f"--loss-backend {asked}: {error}") from None
    if name == "naive":
        return lambda z1, z2: nt_xent(z1.float(), z2.float(), tau), name
    return lambda z1, z2: fused_nt_xent(z1, z2, tau, backend=name), name


def train(config: Config) -> dict[str, Any]:
    """Train, write the run's files to `config.out`, and return the final metrics."""
    device = common.prepare(config)
    model = SimCLR(config).to(device, memory_format=torch.channels_last)
    data = common.load_data(config, device)
    common.fit_batch_size(config, len(data.train))
    n, lr, precision = config.batch_size, config.peak_lr(), common.autocast(config, device)

    network = torch.compile(model) if config.compile else model
    make = common.LARS if config.optimizer == "lars" else torch.optim.SGD
    optimizer = make(common.parameter_groups(model, config.weight_decay), lr=lr, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    loss_of, backend = choose_loss(config, device)
    run = common.Run(config, data, device, model=model, optimizer=optimizer, scaler=scaler)
    run.header(
        optimizer=f"{config.optimizer}, peak lr {lr:g} (--lr {config.lr:g}, {config.lr_scaling} scaling, N = {n}), "
        f"weight decay {config.weight_decay:g}",
        loss=f"nt_xent, {backend}; mean over 2N = {2 * n} anchors (the authors' code adds two means: twice this)",
    )

    ops, one_branch = config.ops(), config.augment_one_branch
    scale = (config.crop_min_scale, 1.0) if ops[:1] == ["crop"] or one_branch else None  # the loader's crop
    if ops[:1] == ["crop"] and not one_branch:
        ops = ops[1:]
    model.train()
    with run:
        while run.epoch < config.epochs:
            for _, crops in run.batches(views=1 if one_branch else 2, scale=scale):
                x1 = augment(
                    crops[0].clone() if one_branch else crops[0], config, ops
                )  # t(x); one draw for every image
                x2 = crops[-1] if one_branch else augment(crops[-1], config, ops)  # t'(x)
                now = common.cosine_lr(run.step, run.total, round(config.warmup_epochs * run.steps), lr)
                for group in optimizer.param_groups:
                    group["lr"] = now
                optimizer.zero_grad()
                with precision:
                    z = common.embed_in_pieces(network, config.micro_batch_size, x1, x2)  # (2N, d): BN over both views
                loss = loss_of(*z.chunk(2))
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                run.after_step(loss, z, now, x1, x2)
            run.after_epoch(
                knn=lambda: common.knn_of(model.backbone, data, config),
                collapse_hint="try a lower --lr or --temperature, or more of --augment",
            )
    torch.manual_seed(config.seed)
    return run.finish(untrained=SimCLR(config).to(device, memory_format=torch.channels_last))


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
