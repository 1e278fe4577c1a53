"""BYOL: Bootstrap Your Own Latent, A New Approach to Self-Supervised Learning.

Grill, Strub, Altché, Tallec, Richemond and others, NeurIPS 2020, https://arxiv.org/abs/2006.07733

Two views of each image are drawn, v = t(x) and v' = t'(x), with different strengths. The online network has to predict
from one view what the target network, a slow average of itself, makes of the other. There are no negatives:

    y = f(v)    z = g(y)    q(z)           online, with parameters theta
    y' = f'(v')    z' = g'(y')             target, with parameters xi, no gradient
    L = | q(z)/|q(z)| - z'/|z'| |^2 = 2 - 2 cos(q(z), z')                                         (equation 2)
    loss = L + the same with the views exchanged      a mean over N images, a sum over both, 0 to 8
    xi <- tau xi + (1 - tau) theta                    after each step of theta                    (equations 1, 4)
    tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2  at step k of K                              (section 3.2)

f is kept and all else is thrown away: y, called h in the other files, is the representation.

    paper                      here                            flag
    f, g, q                    model.backbone, .projector,     --backbone, --hidden-dim, --projection-dim,
                               .predictor                      --no-predictor
    f', g', xi                 model.target                    --momentum
    T, T'                      augment                         --blur-1, --blur-2, --solarize-1, --solarize-2
    tau_base, tau              config.momentum, tau_at         --momentum: 0 = theta itself, 1 = a fixed random target
    N                          config.batch_size               --batch-size

    python byol.py                                             the demo: embedded data, two CPU cores, two minutes
    python byol.py --data /my/photos --backbone resnet18 --batch-size 256 --optimizer sgd --lr 0.05
    python byol.py --preset paper-100 --data /imagenet         the published 100 epochs; paper-300; paper (1000)

Measured: `python byol.py`, two EPYC cores, torch 2.14.1, 1 min 55 s: kNN on held-out images 0.847, linear 0.932 (raw
pixels 0.390, untrained backbone 0.203).

Unlike the paper's (appendix B), pictures stay in [0, 1] (there, the data set's mean and deviation are taken off), and
crops are resized bilinearly (there bicubically).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunConfig, coin, where_drawn

SHORT = {"data": "imagenet", "weight_decay": 1e-6, "momentum": 0.99}  # of both 100 and 300 epochs (the authors' code)


@dataclass(kw_only=True)
class Config(RunConfig):
    """BYOL's flags. The defaults are the paper's ImageNet recipe; section and appendix numbers are the paper's."""

    METHOD: ClassVar[str] = "byol"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"data": "imagenet"},  # not downloadable: --data says where it is
        "paper-300": SHORT | {"epochs": 300, "lr": 0.3},
        "paper-100": SHORT | {"epochs": 100, "lr": 0.45},
        "cifar": {  # ours, since the paper does not pretrain on CIFAR-10: its views without the blur
            **{"data": "cifar10", "image_size": 32, "backbone": "resnet18", "epochs": 800, "batch_size": 256},
            **{"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "momentum": 0.99, "hidden_dim": 2048},
            **{"blur_1": 0.0, "blur_2": 0.0},
        },
        "demo": {  # ours: learns the shapes set on two CPU cores in about two minutes
            **{"data": "shapes", "image_size": 32, "backbone": "resnet8", "epochs": 12, "batch_size": 64},
            **{"optimizer": "sgd", "lr": 0.8, "weight_decay": 1e-4, "warmup_epochs": 1.0, "hidden_dim": 256},
            # a target that is 100 steps behind (0.99), and more as tau rises, is too slow for so short a run (README)
            **{"momentum": 0.9, "projection_dim": 256, "crop_min_scale": 0.5},
            # grey and turned: else tint and place, which are easier to predict than the shape, are all it learns
            **{"grey_probability": 1.0, "rotate": True, "blur_1": 0.0, "blur_2": 0.0, "solarize_2": 0.0},
        },
    }

    preset: Annotated[
        Literal["paper", "paper-300", "paper-100", "cifar", "demo"],
        "recipe that sets the defaults of the flags below; when left out: demo for shapes, cifar for cifar10 and "
        "cifar100, paper (1000 epochs) for anything else",
    ] = "paper"
    momentum: Annotated[
        float,
        "tau_base, raised to 1 by a cosine; 0 = the target is the online network, 1 = a fixed random one (table 5a)",
        "0 to 1",
    ] = 0.996
    predictor: Annotated[bool, "q; without it all collapses (table 5b)"] = True
    symmetric: Annotated[bool, "add the loss with the views exchanged (section 3.1)"] = True
    hidden_dim: Annotated[int, "width of the hidden layers of g and q (section 3.2)", ">= 1"] = 4096
    projection_dim: Annotated[int, "width of z and q(z) (section 3.2)", ">= 1"] = 256
    crop_min_scale: Annotated[float, "least area of a crop; the most is 1 (appendix B)", "> 0, <= 1"] = 0.08
    jitter_strength: Annotated[float, "times the colour jitter of 0.4, 0.4, 0.2, 0.1 (table 6: 1)", ">= 0"] = 1.0
    grey_probability: Annotated[float, "drop the colours, after the jitter (table 6)", "0 to 1"] = 0.2
    rotate: Annotated[bool, "random quarter turns (not in the paper; for pictures that have no upright)"] = False
    blur_1: Annotated[float, "probability that the first view is blurred (table 6)", "0 to 1"] = 1.0
    blur_2: Annotated[float, "the same for the second view", "0 to 1"] = 0.1
    solarize_1: Annotated[float, "probability that the first view is solarized (table 6)", "0 to 1"] = 0.0
    solarize_2: Annotated[float, "the same for the second view", "0 to 1"] = 0.2
    epochs: Annotated[int, "passes over the training images (section 3.2)", ">= 1"] = 1000
    batch_size: Annotated[int, "N, images in a step (section 3.2)", ">= 1"] = 4096
    optimizer: Annotated[Literal["lars", "sgd"], "lars (section 3.2) or sgd, both with momentum 0.9"] = "lars"
    lr: Annotated[float, "learning rate for N = 256; it is scaled by N/256 (section 3.2)", "> 0"] = 0.2
    weight_decay: Annotated[float, "weight decay, not on BN and biases (section 3.2)", ">= 0"] = 1.5e-6
    warmup_epochs: Annotated[float, "epochs of linear warm-up, then a cosine to 0 (section 3.2)", ">= 0"] = 10.0
    out: Annotated[str, "folder of the run's files"] = "runs/byol"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jitter_strength > 5:
            raise common.InputError(f"--jitter-strength {self.jitter_strength}: at most 5 (a hue shift of half a turn)")
        if self.batch_size == 1:
            raise common.InputError("--batch-size 1: BN has nothing to compare then; give 2 or more")

    def peak_lr(self) -> float:
        return self.lr * self.batch_size / 256

    def culprits(self) -> str:
        """What the warning of a collapse says: the flags that cause one (table 5)."""
        flags = {"--momentum 0": self.momentum == 0, "--no-predictor": not self.predictor}
        found = [flag for flag, given in flags.items() if given]
        return "caused by " + " and ".join(found) if found else "try a lower --lr"


def augment(x: Tensor, config: Config, blur: float, solarize: float) -> Tensor:
    """t(x) after the crop (appendix B, table 6), a draw of its own for every image. x: (N, 3, H, W) in [0, 1].

    T and T' differ in the probabilities of `blur` and `solarize` alone. The blur's kernel is a tenth of the side: 23
    of 224 in the paper.
    """
    n, s = len(x), config.jitter_strength
    x = where_drawn(x, coin(n, 0.5), common.flip)
    if config.rotate:
        x = common.rotate(x, torch.randint(4, (n,)))
    x = common.color_jitter(x, common.random_jitter(n, 0.4 * s, 0.4 * s, 0.2 * s, 0.1 * s, 0.8))
    x = where_drawn(x, coin(n, config.grey_probability), common.to_grey)
    if blur > 0:
        kernel, sigma = max(3, config.image_size // 10 // 2 * 2 + 1), torch.empty(n).uniform_(0.1, 2.0)
        x = where_drawn(x, coin(n, blur), lambda y, sigma: common.gaussian_blur(y, sigma, kernel), sigma)
    return where_drawn(x, coin(n, solarize), common.solarize) if solarize > 0 else x


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """g and q (section 3.2): no BN on the output, and only the first layer has a bias (the authors' code)."""
    first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), last)


class BYOL(nn.Module):
    """Online and target network. `model(x)` is z (N, `projection_dim`), `model.predictor(z)` is q(z),
    `model.target(x)` is z', `model.backbone(x)` is kept. Raises `InputError` for an unknown backbone.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dim, hidden = config.projection_dim, config.hidden_dim
        self.backbone = common.build_backbone(config)
        self.projector = mlp(self.backbone.feature_dim, hidden, self.dim)
        self.predictor = mlp(self.dim, hidden, self.dim) if config.predictor else nn.Identity()
        # starts at random weights of its own (the authors' code), where --momentum 1 leaves it
        self.target = nn.Sequential(common.build_backbone(config), mlp(self.backbone.feature_dim, hidden, self.dim))
        self.target.requires_grad_(False)
        if config.momentum == 0:
            self.update_target(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """xi <- tau xi + (1 - tau) theta, on the parameters alone: the target's BN statistics are its own."""
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


def train(config: Config) -> dict[str, Any]:
    """Train, write the run's files to `config.out`, and return the final metrics."""
    device = common.prepare(config)
    data = common.load_data(config, device)
    common.fit_batch_size(config, len(data.train))
    model = BYOL(config).to(device, memory_format=torch.channels_last)
    if config.compile:
        for network in (model, model.predictor, model.target):
            network.compile()
    n, lr, micro = config.batch_size, config.peak_lr(), config.micro_batch_size
    weights = common.parameter_groups(model, config.weight_decay)
    if config.optimizer == "lars":
        optimizer = common.LARS(weights, lr=lr, momentum=0.9, lr_in_momentum=False)
    else:
        optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    run = common.Run(config, data, device, model=model, optimizer=optimizer, scaler=scaler)
    target = f"moving average, tau from {config.momentum:g} to 1 by a cosine"
    if config.momentum in (0, 1):
        target = "the online network itself (--momentum 0)" if config.momentum == 0 else "random, fixed (--momentum 1)"
    run.header(
        optimizer=f"{config.optimizer}, peak lr {lr:g} (--lr {config.lr:g} x {n} / 256), weight decay "
        f"{config.weight_decay:g}, not on BN and biases",
        loss=f"byol_loss, mean over N = {n} images" + "; the sum of both directions, 0 to 8" * config.symmetric,
        predictor="mlp" if config.predictor else "none, q(z) = z (--no-predictor)",
        target=target,
        watched="std and rank are those of q(z); it ends without a BN, so well below healthy is usual",
    )

    model.train()  # the target too: its BN takes the statistics of the batch
    with run:
        while run.epoch < config.epochs:
            for _, crops in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):
                v1 = augment(crops[0], config, config.blur_1, config.solarize_1)  # t(x)
                v2 = augment(crops[1], config, config.blur_2, config.solarize_2)  # t'(x)
                now = common.cosine_lr(run.step, run.total, round(config.warmup_epochs * run.steps), lr)
                for group in optimizer.param_groups:
                    group["lr"] = now
                optimizer.zero_grad()
                pairs = [(v1, v2), (v2, v1)] if config.symmetric else [(v1, v2)]
                with common.autocast(config, device):  # one view after the other: BN statistics are of one view
                    q = [model.predictor(common.embed_in_pieces(model, micro, v)) for v, _ in pairs]  # (N, d) each
                    with torch.no_grad():
                        z = [common.embed_in_pieces(model.target, micro, v) for _, v in pairs]
                loss = sum(byol_loss(q_i.float(), z_i.float()) for q_i, z_i in zip(q, z, strict=True))
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                model.update_target(tau_at(run.step, run.total, config.momentum))  # after the step (section 3.2)
                run.after_step(loss, q[0], now, v1, v2)
            run.after_epoch(knn=lambda: common.knn_of(model.backbone, data, config), collapse_hint=config.culprits())
    torch.manual_seed(config.seed)
    return run.finish(untrained=BYOL(config).to(device, memory_format=torch.channels_last))


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
