"""SupCon: Supervised Contrastive Learning.

Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu, Krishnan, NeurIPS 2020, https://arxiv.org/abs/2004.11362

SimCLR with labels. Of each of N images two views are drawn; the positives P(i) of a view i are all other views of its
class, A(i) are all other views. Stage 1 learns the encoder, stage 2 a linear classifier on the frozen encoder:

    z_i = Proj(Enc(x_i)), of length 1                                                              (section 3.1)
    r_ip = exp(z_i . z_p / tau) / sum over a in A(i) of exp(z_i . z_a / tau)
    L_out = sum over i of -1/|P(i)| sum over p in P(i) of log r_ip                                  (equation 2)
    L_in  = sum over i of -log( 1/|P(i)| sum over p in P(i) of r_ip )                               (equation 3)

Here both are the mean over the 2N anchors i; an anchor without positives adds 0. With a class for every image both
are SimCLR's loss. Jensen's inequality puts L_in below L_out; L_out learns better (section 3.2.2).

    paper                       here                       flag
    Aug(x)                      augment                    --crop-min-scale, --jitter-strength, --blur-probability
    Enc, r                      model.backbone, h          --backbone, --stem
    Proj, z                     model.projector, z         --hidden-dim, --projection-dim
    tau                         temperature                --temperature, --base-temperature
    L_out, L_in                 sup_con                    --loss out, --loss in
    stage 2, linear classifier  fit_classifier             --stage, --linear-epochs, --linear-lr, --linear-batch-size
    cross-entropy, max-margin   large_margin (below)       --loss cross-entropy, --loss max-margin

    python supcon.py                                       the demo: embedded data, two CPU cores, three minutes
    python supcon.py --loss cross-entropy                  the one-stage baseline in the same budget
    python supcon.py --data /my/photos                     class sub-folders

Measured: `python supcon.py`, two Xeon cores, torch 2.14.1, 2 min 1 s: linear top-1 on held-out images 0.984, kNN 0.989
(raw pixels 0.390, untrained backbone 0.203).

Not as in the paper: its best augmentation, AutoAugment, is not here (the views are those of the authors' code for
CIFAR), stage 2 runs SGD as that code does, where the paper takes RMSProp on ImageNet, and pictures stay in [0, 1]. The
baselines run by SupCon's recipe; the authors' code trains cross-entropy at lr 0.8 with one view, cropped and flipped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import InputError, RunConfig, coin, where_drawn

try:
    from kernels import resolve_backend
    from kernels import sup_con as fused_sup_con
except ImportError as error:  # the folder was not copied along: the naive loss below runs
    if error.name != "kernels":
        raise
    fused_sup_con = None

STAGE_1 = (  # flags that stage 2 cannot change
    *("loss", "temperature", "base_temperature", "margin", "epochs", "batch_size", "micro_batch_size", "optimizer"),
    *("lr", "weight_decay", "warmup_epochs", "jitter_strength", "blur_probability"),
)


@dataclass(kw_only=True)
class Config(RunConfig):
    """SupCon's flags. The defaults are for ImageNet; "code" is the authors' github.com/HobbitLong/SupContrast."""

    METHOD: ClassVar[str] = "supcon"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"data": "imagenet"},  # not downloadable: --data says where it is
        "cifar": {  # the code's README and defaults
            **{"data": "cifar10", "image_size": 32, "backbone": "resnet50", "epochs": 1000, "batch_size": 1024},
            **{"optimizer": "sgd", "lr": 0.5, "weight_decay": 1e-4},
        },
        "demo": {  # ours: learns the shapes set on two CPU cores in about three minutes
            **{"data": "shapes", "image_size": 32, "backbone": "resnet8", "epochs": 9, "batch_size": 128},
            **{"lr": 2.0, "weight_decay": 1e-4, "warmup_epochs": 1.0, "crop_min_scale": 0.35},
            **{"hidden_dim": 256, "projection_dim": 64, "linear_epochs": 8, "linear_lr": 0.5, "linear_batch_size": 128},
        },
    }

    loss: Annotated[
        Literal["out", "in", "cross-entropy", "max-margin"],
        "equation 2, equation 3, or a one-stage baseline: cross-entropy, or Liu et al.'s large-margin softmax",
    ] = "out"
    stage: Annotated[
        Literal["both", "1", "2"],
        "1: the encoder; 2: the linear classifier of the finished run in --out (with --resume)",
    ] = "both"
    temperature: Annotated[float, "tau (section 4)", "> 0"] = 0.1
    base_temperature: Annotated[
        float,
        "multiply the loss by tau over this: 0.07 in the code, which is lr x 1.43 with sgd (lars passes it to BN and "
        "biases alone); 0 = off, the paper",
        ">= 0",
    ] = 0.0
    margin: Annotated[int, "m of --loss max-margin; 1 = no margin (Liu et al.: 2 to 4)", ">= 1"] = 4
    epochs: Annotated[int, "passes over the training images in stage 1 (section 4.4, ResNet-50)", ">= 1"] = 350
    batch_size: Annotated[int, "N, images in a step; 2N views (section 4.4)", ">= 1"] = 6144
    optimizer: Annotated[Literal["lars", "sgd"], "lars (section 4.4: ImageNet) or sgd (CIFAR), momentum 0.9"] = "lars"
    lr: Annotated[float, "learning rate, not scaled by N (ours: 0.3 N / 256, which is SimCLR's)", "> 0"] = 7.2
    weight_decay: Annotated[float, "weight decay; with lars not on BN and biases (SimCLR's)", ">= 0"] = 1e-6
    warmup_epochs: Annotated[float, "epochs of linear warm-up, then a cosine to 0 (code: for N > 256)", ">= 0"] = 10.0
    hidden_dim: Annotated[int, "width of Proj's hidden layer; 0 = the width of h (code; section 3.1: 2048)", ">= 0"] = 0
    projection_dim: Annotated[int, "width of z (section 3.1)", ">= 1"] = 128
    crop_min_scale: Annotated[float, "least area of a crop; the most is 1 (code)", "> 0, <= 1"] = 0.2
    jitter_strength: Annotated[float, "s: brightness, contrast, saturation 0.8 s, hue 0.2 s (code)", ">= 0"] = 0.5
    blur_probability: Annotated[float, "blur: kernel a tenth of the side, sigma 0.1 to 2 (code: none)", "0 to 1"] = 0.0
    linear_epochs: Annotated[int, "passes of stage 2 (code)", ">= 1"] = 100
    linear_lr: Annotated[float, "learning rate of stage 2, x 0.2 after 60, 75 and 90% (code's README)", "> 0"] = 5.0
    linear_batch_size: Annotated[int, "images in a step of stage 2 (code's README)", ">= 1"] = 512
    loss_backend: Annotated[
        Literal["auto", "triton", "blocked", "naive"],
        "auto = what is fastest here: triton on a GPU, blocked on a CPU, naive (the loss of this file) when small",
    ] = "auto"
    out: Annotated[str, "folder of the run's files"] = "runs/supcon"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jitter_strength > 2.5:
            raise InputError(f"--jitter-strength {self.jitter_strength}: at most 2.5 (a hue shift of half a turn)")
        if self.stage == "2" and not self.resume:
            raise InputError("--stage 2: it needs a finished stage 1; give that run's --out, and --resume")
        if not self.contrastive():
            if self.stage != "both":
                raise InputError(f"--stage {self.stage}: --loss {self.loss} has one stage; leave out --stage")
            if self.base_temperature:
                raise InputError(f"--base-temperature: --loss {self.loss} has no temperature; leave it out")
            if self.loss_backend not in ("auto", "naive"):
                raise InputError(f"--loss-backend {self.loss_backend}: --loss {self.loss} has no kernel; leave it out")
        if self.margin != 4 and self.loss != "max-margin":
            raise InputError(f"--margin {self.margin}: only --loss max-margin has one; leave it out")
        if self.contrastive() and self.batch_size == 1:
            raise InputError("--batch-size 1: there are no negatives; give 2 or more")

    def contrastive(self) -> bool:
        return self.loss in ("out", "in")


def augment(x: Tensor, config: Config) -> Tensor:
    """Aug(x) after the crop, as in the authors' code, a draw of its own for every image. x: (N, 3, H, W) in [0, 1]."""
    n, s = len(x), config.jitter_strength
    x = where_drawn(x, coin(n, 0.5), common.flip)
    x = common.color_jitter(x, common.random_jitter(n, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, 0.8))
    x = where_drawn(x, coin(n, 0.2), common.to_grey)
    if config.blur_probability > 0:
        kernel, sigma = max(3, config.image_size // 10 // 2 * 2 + 1), torch.empty(n).uniform_(0.1, 2.0)
        blur = coin(n, config.blur_probability)
        x = where_drawn(x, blur, lambda y, sigma: common.gaussian_blur(y, sigma, kernel), sigma)
    return x


class SupCon(nn.Module):
    """Enc and Proj. `model(x)` is z (N, `projection_dim`), `model.backbone(x)` is h.

    The baselines have no Proj: their z is h, which the classifier reads. Raises `InputError` for an unknown backbone.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = common.build_backbone(config)
        d = self.dim = self.backbone.feature_dim
        self.projector = nn.Identity()
        if config.contrastive():
            hidden, self.dim = config.hidden_dim or d, config.projection_dim
            self.projector = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, self.dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


def sup_con(z: Tensor, labels: Tensor, temperature: float | Tensor = 0.1, *, loss: str = "out") -> Tensor:
    """Equation 2 ("out") or 3 ("in"), the mean over the M anchors. z: (M, d), any norm; labels: (M,), any integers.

    The naive loss: it builds the M x M matrix. An anchor without positives adds 0, and counts in the mean.
    """
    if loss not in ("out", "in"):
        raise ValueError(f"loss must be 'out' or 'in', got {loss!r}")
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~itself  # (M, M): p in P(i)
    count = positive.sum(1)  # |P(i)|
    kept = count > 0
    s, positive, count = (z @ z.T / temperature)[kept], positive[kept], count[kept]
    log_p = s - s.masked_fill(itself[kept], -torch.inf).logsumexp(1, keepdim=True)  # the log(...) of equation 2
    if loss == "out":
        each = -log_p.masked_fill(~positive, 0).sum(1) / count
    else:
        each = count.to(s).log() - log_p.masked_fill(~positive, -torch.inf).logsumexp(1)
    return each.sum() / len(z)


def large_margin(h: Tensor, w: Tensor, labels: Tensor, m: int, lam: float) -> Tensor:
    """Logits (M, C) of h (M, d) under w (C, d) with a margin for the true class: Liu et al. 2016, arXiv:1612.02295.

    |w_y| |h| cos(a) becomes |w_y| |h| (lam cos(a) + psi(a)) / (lam + 1), where a is the angle between h and w_y and
    psi(a) = (-1)^k cos(m a) - 2k on [k pi / m, (k + 1) pi / m]; their equations 6 and 9, without a bias.
    """
    logits = h @ w.T
    norm = (h.norm(dim=1) * w.norm(dim=1)[labels]).clamp(min=1e-12)  # (M,)
    true = logits.gather(1, labels[:, None]).squeeze(1)
    cos = (true / norm).clamp(-1, 1)
    before, chebyshev = torch.ones_like(cos), cos  # cos(m a) as a polynomial in cos(a)
    for _ in range(m - 1):
        before, chebyshev = chebyshev, 2 * cos * chebyshev - before
    k = (m * cos.detach().acos() / math.pi).floor().clamp(max=m - 1)
    psi = (1 - 2 * (k % 2)) * chebyshev - 2 * k
    return logits.scatter(1, labels[:, None], ((lam * true + norm * psi) / (lam + 1))[:, None])


def choose_loss(config: Config, device: torch.device, classifier: nn.Linear | None) -> tuple[Callable, str]:
    """The loss that runs, of (z, labels, progress from 0 to 1), and its name for the header."""
    tau, kind, views = config.temperature, config.loss, 2 * config.batch_size
    if kind == "cross-entropy":
        return lambda h, y, _: F.cross_entropy(classifier(h.float()), y), "cross-entropy"
    if kind == "max-margin":  # lam falls from 1000 to 0.001: their "gradually"; the pace is ours

        def margin_loss(h: Tensor, y: Tensor, progress: float) -> Tensor:
            return F.cross_entropy(
                large_margin(h.float(), classifier.weight, y, config.margin, 10 ** (3 - 6 * progress)), y
            )

        return margin_loss, f"large-margin softmax, m = {config.margin}"
    scale = tau / config.base_temperature if config.base_temperature else 1.0
    said = f"sup_con {kind}, mean over 2N = {views} anchors" + f", times {scale:g}" * (scale != 1) + "; "
    name = config.loss_backend
    if fused_sup_con is None:
        if name not in ("auto", "naive"):
            raise InputError(f"--loss-backend {name}: the folder kernels/ is not here; copy it along")
        return lambda z, y, _: scale * sup_con(z.float(), y, tau, loss=kind), said + "naive (kernels/ is not here)"
    try:
        name = resolve_backend(name, views, views, device, common.PRECISIONS[config.amp] or torch.float32)
    except ValueError as error:
        raise InputError(f"--loss-backend {name}: {error}") from None
    if name == "naive":
        return lambda z, y, _: scale * sup_con(z.float(), y, tau, loss=kind), said + name
    return lambda z, y, _: scale * fused_sup_con(z, y, tau, loss=kind, backend=name), said + name


def fit_classifier(model: SupCon, data: common.Data, config: Config, device: torch.device) -> nn.Linear:
    """Stage 2: a linear classifier on h of the frozen encoder (BN in eval mode); crop and flip, SGD, momentum 0.9."""
    torch.manual_seed(config.seed)  # a stage that was cut off is simply done again, to the same bits
    classifier = nn.Linear(model.backbone.feature_dim, len(data.classes)).to(device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=config.linear_lr, momentum=0.9)
    labelled = (data.train.labels >= 0).nonzero().squeeze(1)
    model.eval()
    for epoch in range(config.linear_epochs):
        done = epoch / config.linear_epochs
        optimizer.param_groups[0]["lr"] = config.linear_lr * 0.2 ** sum(done >= at for at in (0.6, 0.75, 0.9))
        batches = labelled[torch.randperm(len(labelled))].split(config.linear_batch_size)
        seed = config.seed * 1_000_003 + epoch
        crops = data.train.crops(batches, config.image_size, 1, (config.crop_min_scale, 1.0), seed, config.workers)
        for index, (x,) in zip(batches, crops, strict=True):
            x = where_drawn(x, coin(len(x), 0.5), common.flip)
            with torch.no_grad(), common.autocast(config, device):
                h = model.backbone(x)
            optimizer.zero_grad()
            loss = F.cross_entropy(classifier(h.float()), data.train.labels[index].to(device))
            loss.backward()
            optimizer.step()
        if not math.isfinite(loss.item()):
            raise common.RunFailure(
                f"stage 2: the loss is {loss.item()} in epoch {epoch + 1}; --stage 2 --resume with a lower --linear-lr"
            )
        print(f"stage 2, epoch {epoch + 1}/{config.linear_epochs}  loss {loss.item():.4f}", flush=True)
    return classifier


@torch.no_grad()
def report(model: SupCon, classifier: nn.Linear, data: common.Data, config: Config, what: str) -> dict[str, float]:
    """Print and return top-1 and top-5 of the classifier on the held-out images' central views."""
    h = common.embed(model.backbone, data.test, config)
    hit = classifier(h).topk(min(5, len(data.classes))).indices == data.test.labels.to(h.device)[:, None]
    result = {"linear_top1": hit[:, 0].float().mean().item(), "linear_top5": hit.any(1).float().mean().item()}
    top5 = f", top-5 {result['linear_top5']:.4f}" * (len(data.classes) > 5)
    print(f"\n{what}: top-1 {result['linear_top1']:.4f}{top5} on {len(data.test):,} held-out images")
    return result


def train(config: Config) -> dict[str, Any]:
    """Train, write the run's files to `config.out`, and return the final metrics."""
    device = common.prepare(config)
    model = SupCon(config).to(device, memory_format=torch.channels_last)
    data = common.load_data(config, device)
    unlabelled = int((data.train.labels < 0).sum())
    if not (data.train.labels >= 0).any():
        raise InputError(
            f"--data {config.data}: no two class sub-folders with images; SupCon learns from labels, SimCLR needs none"
        )
    if unlabelled and not config.contrastive():
        raise InputError(f"--loss {config.loss}: {unlabelled:,} images have no label; take --loss out, or remove them")
    if config.stage != "1" and not data.labelled():
        instead = ", or --stage 1" * config.contrastive()
        raise InputError(f"--data {config.data}: no held-out images to report on; add a test folder{instead}")
    common.fit_batch_size(config, len(data.train))
    if config.stage == "2":
        state = common.load_checkpoint(Path(config.out) / "checkpoint.pt", config.METHOD)
        if (done := state["epoch"]) < config.epochs:
            raise InputError(f"--stage 2: stage 1 has done {done} of {config.epochs} epochs; give --stage both")
        for name in STAGE_1:
            if (was := state["config"][name]) != getattr(config, name):
                raise InputError(f"--stage 2: stage 1 had {common.dashed(name)} {was}; give that, or leave it out")
    # an image without a label is a class of its own, whose one positive is its other view: SimCLR's case
    labels = torch.where(data.train.labels < 0, -1 - torch.arange(len(data.train)), data.train.labels).to(device)

    lars, precision = config.optimizer == "lars", common.autocast(config, device)
    contrastive, two_stages = config.contrastive(), config.contrastive() and config.stage != "1"
    network = torch.compile(model) if config.compile else model
    classifier = None
    if not contrastive:
        classifier = nn.Linear(model.dim, len(data.classes), bias=config.loss == "cross-entropy").to(device)
    both = nn.ModuleDict({"model": model} | ({} if contrastive else {"classifier": classifier}))
    groups = common.parameter_groups(both, config.weight_decay) if lars else [{"params": list(both.parameters())}]
    make = common.LARS if lars else torch.optim.SGD
    optimizer = make(groups, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    loss_of, loss_name = choose_loss(config, device, classifier)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = common.Run(config, data, device, **parts | ({} if contrastive else {"classifier": classifier}))
    if not config.resume:
        (run.out / "classifier.pt").unlink(missing_ok=True)  # of another encoder
    stage_2 = f"{config.linear_epochs} epochs of batch {config.linear_batch_size}, lr {config.linear_lr:g}"
    run.header(
        optimizer=f"{config.optimizer}, momentum 0.9, peak lr {config.lr:g} (not scaled by N), "
        f"weight decay {config.weight_decay:g}" + " on everything" * (not lars),
        loss=loss_name + f"; {unlabelled:,} unlabelled images, each a class of its own" * (unlabelled > 0),
        stage=f"{config.stage}; classifier: {stage_2}" if two_stages else "1 alone; --linear-... unused"
        if contrastive else "one; the temperature, the projection head and --linear-... are unused",
    )  # fmt: skip

    model.train()
    with run:
        while run.epoch < config.epochs:
            for index, (x1, x2) in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):
                x1, x2 = augment(x1, config), augment(x2, config)
                now = common.cosine_lr(run.step, run.total, round(config.warmup_epochs * run.steps), config.lr)
                for group in optimizer.param_groups:
                    group["lr"] = now
                optimizer.zero_grad()
                with precision:
                    z = common.embed_in_pieces(network, config.micro_batch_size, x1, x2)  # (2N, d): BN over both views
                loss = loss_of(z, labels[index.to(device)].repeat(2), run.step / run.total)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                run.after_step(loss, z, now, x1, x2)
            run.after_epoch(
                knn=lambda: common.knn_of(model.backbone, data, config),
                collapse_hint="two classes do so when learnt, to opposite points; else "
                * (contrastive and len(data.classes) == 2)
                + "try a lower --lr"
                + " or another --temperature" * contrastive,
            )
    metrics = {}
    if config.stage != "2":
        torch.manual_seed(config.seed)
        metrics = run.finish(untrained=SupCon(config).to(device, memory_format=torch.channels_last))
    if two_stages:
        classifier = fit_classifier(model, data, config, device)
        common.save_whole(classifier.state_dict(), run.out / "classifier.pt")
        metrics |= report(model, classifier, data, config, f"stage 2, linear classifier on frozen h ({config.loss})")
    elif not contrastive:
        common.save_whole(classifier.state_dict(), run.out / "classifier.pt")
        metrics |= report(model, classifier, data, config, f"{config.loss}, one stage")
    return metrics


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
