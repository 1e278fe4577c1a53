"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, NeurIPS 2020, https://arxiv.org/abs/2006.09882

SwAV is contrastive learning by online clustering. It compares each view with K prototypes c_k, the cluster centres, and
not with the views of other images. The output z_t of one view predicts the code q_s of the other view, and the other
way round. The codes give all prototypes nearly equal shares of a batch. Without this rule a single prototype would get
every image:

    z_t = g(f(x_t)) / |g(f(x_t))|       p_t = softmax(C^T z_t / tau) over the K prototypes, |c_k| = 1  (section 3.1)
    L = l(z_t, q_s) + l(z_s, q_t)       l(z_t, q_s) = -sum over k of q_s^(k) log p_t^(k)         (equations 1 and 2)
    Q = argmax of Tr(Q^T C^T Z) + epsilon H(Q), where rows sum to 1/K and columns to 1/B         (equations 3 and 4)
      = Diag(u) exp(C^T Z / epsilon) Diag(v), nearly, after three Sinkhorn-Knopp iterations             (equation 5)
    L = sum over the large crops i and all crops j != i of l(z_j, q_i)                     (multi-crop, equation 6)

Here C = [c_1 ... c_K] holds the prototypes, and Z = [z_1 ... z_B] holds the outputs of one crop. The columns of B Q are
the codes q of this crop, and no gradient flows through the codes. H is the entropy. Only the backbone f is kept: its
output h = f(x) is the representation.

    paper                      here                        flag
    f; g                       model.backbone; .projector  --backbone; --hidden-dim, --projection-dim
    C, K                       model.prototypes            --prototypes, --freeze-prototypes-epochs
    B                          config.batch_size           --batch-size
    Q, epsilon                 SwAV.codes, sinkhorn        --epsilon, --sinkhorn-iterations
    views t, s; V + 2 crops    views (V here: all crops)   --crops, --crop-min-scale, --small-crop-min-scale
    the queue (small batches)  model.queue                 --queue-size, --queue-start-epoch
    tau                        temperature                 --temperature

    python swav.py                                         the demo: built-in data, two CPU cores
    python swav.py --data /my/photos                       your own pictures

The demo ends at a kNN accuracy of 0.962 to 0.990; raw pixels reach 0.726 (seeds 0 to 4; an EPYC with AVX2).

Main differences from the authors' code: our loss is the sum over pairs, theirs the mean (LARS makes both nearly the
same, but with the sum weight decay counts for less); our blur's kernel is bounded; our queue fills from the start,
theirs from the epoch of its first use.
"""

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunConfig, cosine_lr, set_lr
from images import color_jitter, ensure, flip, gaussian_blur, grey, normalize, sometimes

# the authors' script for batches of 256
SMALL_BATCH = dict(batch_size=256, epochs=200, lr=0.6, warmup_epochs=0.0, queue_size=3840)
CIFAR = dict(  # ours, since the paper does not train on CIFAR-10; only ten epochs of resnet8 have been tried
    data="cifar10", image_size=32, backbone="resnet18", stem="cifar", crops="2x32", epochs=800, batch_size=128,
    optimizer="sgd", lr=0.4, weight_decay=1e-4, prototypes=512, epsilon=0.01, crop_min_scale=0.2, blur=0.0,
)  # fmt: skip
PHOTOS = dict(  # ours: for your own pictures, hundreds or more
    image_size=128, backbone="resnet18", crops="2x128", epochs=100, batch_size=128, optimizer="sgd", lr=0.1,
    weight_decay=1e-4, warmup_epochs=0.0, prototypes=256, epsilon=0.01, crop_min_scale=0.2,
)  # fmt: skip
DEMO = dict(  # ours: learns the shapes set on two CPU cores in one and a half to three minutes
    data="shapes", image_size=32, backbone="resnet8", crops="2x32", epochs=6, batch_size=128, optimizer="sgd",
    lr=0.2, weight_decay=1e-4, warmup_epochs=1.0, prototypes=64,
    epsilon=0.01,  # with softer codes the predictions p stay uniform for long
    small_crop_min_scale=0.2, hidden_dim=256, projection_dim=64, crop_min_scale=0.35, jitter_strength=0.5, blur=0.0,
)  # fmt: skip


@dataclass(kw_only=True)
class Config(RunConfig):
    """SwAV's flags. The defaults are the paper's ImageNet recipe of 800 epochs; its recipes of 100, 200 and 400 epochs
    differ in --epochs alone. Sections, appendices and equations are the paper's; scripts are the authors'."""

    PRESETS = {
        "paper": {},
        "paper-2x224": dict(crops="2x224", epochs=400, crop_min_scale=0.08),
        "paper-256": SMALL_BATCH,
        "cifar": CIFAR,
        "photos": PHOTOS,
        "demo": DEMO,
    }

    crops: str = "2x224,6x96"  # number x side; only crops of the first side, --image-size, give codes (equation 6)
    prototypes: int = 3000  # number of prototypes K, the cluster centres (appendix A)
    epsilon: float = 0.05  # softness of the codes: smaller is harder; try 0.03 if predictions stay uniform (appendix A)
    sinkhorn_iterations: int = 3  # rounds that even out the prototypes' shares; 0: codes collapse (appendix A)
    temperature: float = 0.1  # tau: smaller makes the predicted shares of the prototypes sharper (appendix A)
    freeze_prototypes_epochs: float = 1.0  # epochs at the start in which the prototypes do not move (appendix A)
    queue_size: int = 0  # past outputs z that join the batch in Sinkhorn; 0 = none (scripts: 15 batches)
    queue_start_epoch: float = 15.0  # epoch from which a full queue is used (authors' scripts)
    hidden_dim: int = 0  # hidden width of the projection head; 0 = the backbone's (scripts: 2048)
    projection_dim: int = 128  # width of z, the projection head's output (appendix A)
    crop_min_scale: float = 0.14  # least share of the picture in a large crop; the most is 1 (authors' scripts)
    small_crop_min_scale: float = 0.05  # least share of the picture in a small crop, to --crop-min-scale (scripts)
    jitter_strength: float = 1.0  # colour jitter: 0.8 times this, hue 0.2 times this (authors' scripts)
    blur: float = 0.5  # probability of a blur; 0 for 32-pixel pictures (scripts)
    epochs: int = 800  # passes over the training images (authors' scripts: 100, 200, 400 or 800)
    batch_size: int = 4096  # images in a step, B (appendix A)
    optimizer: Literal["lars", "sgd"] = "lars"  # lars (appendix A) or sgd; sgd's steps grow with the number of pairs
    lr: float = 4.8  # learning rate, not scaled by the batch size (appendix A: for 4096; scripts: 0.6 for 256)
    warmup_start_scale: float = 0.0625  # share of --lr at which the warm-up starts (authors' scripts: 0.3 of 4.8)
    final_lr_scale: float = 0.001  # share of --lr at which the cosine ends (appendix A: 0.0048 of 4.8)
    weight_decay: float = 1e-6  # L2 on all parameters (appendix A)
    warmup_epochs: float = 10.0  # epochs of linear warm-up (appendix A)
    out: str = "runs/swav"  # folder of the run; if it holds a run, a new one beside it, such as runs/swav-2

    def check(self) -> None:
        super().check()
        self.need("batch_size > 1", "lr > 0", "prototypes > 1", "epsilon > 0", "temperature > 0", "projection_dim > 0")
        self.need("warmup_start_scale <= 1", "final_lr_scale <= 1", "blur <= 1")
        self.need("0 < crop_min_scale <= 1", "0 < small_crop_min_scale")
        self.need("jitter_strength <= 2.5")  # at 2.5 the hue turns by half a circle
        (number, side), *small = crop_kinds(self.crops)
        sides = f"--image-size {self.image_size}: --crops {self.crops} begins with another side"
        ensure(side == self.image_size, f"{sides}; give both, such as --crops {number}x{self.image_size}")
        if small:  # the area of a small crop is at most --crop-min-scale
            self.need("small_crop_min_scale <= crop_min_scale")
        if self.queue_size:
            self.need("queue_size >= batch_size")
            late = f"--queue-start-epoch {self.queue_start_epoch:g}: --epochs {self.epochs} is over by then"
            ensure(self.queue_start_epoch < max(1, self.epochs), f"{late}; give a smaller one, or --queue-size 0")


def crop_kinds(text: str) -> list[tuple[int, int]]:
    """Number and side of each kind of crop: "2x224,6x96" is [(2, 224), (6, 96)]. Raises `InputError`."""
    kinds = [(int(number), int(side)) for number, side in re.findall(r"([1-9]\d?)x([1-9]\d*)", text)]
    ok = ",".join(f"{number}x{side}" for number, side in kinds) == text and all(side >= 8 for _, side in kinds)
    ok = ok and len({side for _, side in kinds}) == len(kinds) and sum(number for number, _ in kinds) > 1
    ensure(ok, f"--crops {text}: give two crops or more as number x side, each side once and at least 8: 2x224,6x96")
    return kinds


def augment(x: Tensor, config: Config) -> Tensor:
    """t(x) after the crop, as in SimCLR (authors' code), drawn anew for every image. x: (B, 3, S, S)."""
    s = config.jitter_strength
    x = sometimes(x.clone(), 0.5, flip)
    x = sometimes(x, 0.8, color_jitter, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    x = sometimes(x, 0.2, grey)
    x = sometimes(x, config.blur, gaussian_blur)
    return normalize(x)


class SwAV(nn.Module):
    """f, g, the prototypes and the queue. `model(*views)` is z and the scores z C, both of every view.
    `model.backbone(x)` is h, and `model.embed(x)` is g(h).

    `prototypes.weight` (K, d) is C transposed; its rows have length 1. `queue` (large crops, L, d) holds past z.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dim = config, config.projection_dim
        self.backbone = common.build_backbone(config, zero_init_residual=False)  # as in the authors' code
        hidden = config.hidden_dim or self.backbone.feature_dim
        first = [nn.Linear(self.backbone.feature_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*first, nn.Linear(hidden, self.dim))
        self.prototypes = nn.Linear(self.dim, config.prototypes, bias=False)
        self.prototypes.weight.data = F.normalize(self.prototypes.weight.data, dim=1)
        if config.queue_size:
            self.register_buffer("queue", torch.zeros(crop_kinds(config.crops)[0][0], config.queue_size, self.dim))

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        kinds = itertools.groupby(views, key=lambda x: x.shape[-1])
        h = torch.cat([self.backbone(torch.cat(list(x))) for _, x in kinds])  # f's BN sees the crops of one side
        z = F.normalize(self.projector(h).float(), dim=1).view(len(views), -1, self.dim)  # (V, B, d); g's BN sees all
        with torch.autocast(z.device.type, enabled=False):  # 16 bits are too coarse for a code
            return z.transpose(0, 1), self.prototypes(z).transpose(0, 1)  # (B, V, d), (B, V, K): a row per image

    @torch.no_grad()
    def codes(self, scores: Tensor, crop: int, with_queue: bool) -> Tensor:
        """The codes q (B, K) of a large crop, from its scores (B, K). With the queue, past z join in the Sinkhorn.

        Each of W processes brings its own images, and every W-th row of the queue.
        """
        c, (rank, world) = self.config, common.share()
        past = [self.prototypes(self.queue[crop, rank::world])] if with_queue else []  # (L / W, K)
        group = torch.distributed.group.WORLD if world > 1 else None
        return sinkhorn(torch.cat([scores, *past]), c.epsilon, c.sinkhorn_iterations, group)[: len(scores)]

    @torch.no_grad()
    def update(self, z: Tensor, step: int) -> None:
        """Scale the prototypes to length 1. In the queue, z (B, V, d) of the large crops replaces the oldest z."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        if self.config.queue_size:
            z = common.gather(z[:, : len(self.queue)])  # of all processes
            rows = (step * len(z) + torch.arange(len(z), device=z.device)) % self.config.queue_size
            self.queue.index_copy_(1, rows, z.transpose(0, 1).to(self.queue))


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3, group: Any = None) -> Tensor:
    """Codes (B, K), float32, from scores z C (B, K): equation 5's Q, transposed and times B, so that a row sums to 1.

    An iteration gives equal shares first to the prototypes, then to the images. Without an iteration the codes are
    softmax(scores / epsilon). With a process group, the images of all its processes share the prototypes, and each
    process gets the codes of its own images. Logarithms make any epsilon > 0 safe.
    """

    def log_share(log_q: Tensor) -> Tensor:  # the share of each prototype, over all images: (K,)
        share = log_q.logsumexp(0)
        if group is None:
            return share
        shares = [torch.empty_like(share) for _ in range(group.size())]
        torch.distributed.all_gather(shares, share, group)
        return torch.stack(shares).logsumexp(0)

    log_q = scores.float() / max(epsilon, 1e-30)  # a smaller epsilon would overflow
    for _ in range(iterations):
        log_q = log_q - log_share(log_q)  # u scales Q's rows: every prototype gets the same share
        log_q = log_q.log_softmax(1)  # v scales Q's columns: every image gets the same share
    return log_q.softmax(1)  # after an iteration, this is exp alone


def swapped_prediction(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    """l(z_t, q_s) of equation 2, the mean over B images: the scores z_t C (B, K) of one view predict the codes q_s
    (B, K) of another view. No gradient reaches the codes."""
    log_p = F.log_softmax(scores / temperature, dim=1)  # (B, K)
    return -(codes.detach() * log_p).sum(1).mean()


def train(config: Config, data: Any = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data` (see `common.Run`). Returns the final figures; `out` is the run's folder."""
    run = common.Run(config, data)
    n, there, queue, tau = config.batch_size, len(run.data.train), config.queue_size, config.temperature
    ensure(queue <= there, f"--queue-size {queue}: there are {there:,} training images; give 0, or {n} to {there}")
    (large, side), *small = crop_kinds(config.crops)
    crops = [(side, (config.crop_min_scale, 1.0))] * large
    for number, side in small:
        crops += [(side, (config.small_crop_min_scale, config.crop_min_scale))] * number
    pairs = [(i, j) for i in range(large) for j in range(len(crops)) if j != i]

    model = SwAV(config).to(run.device, memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.requires_grad]
    lr, first_lr, last_lr = (config.lr * scale for scale in (1, config.warmup_start_scale, config.final_lr_scale))
    if config.optimizer == "lars":
        optimizer = common.LARS(weights, lr=lr, weight_decay=config.weight_decay, lr_in_momentum=False)
    else:
        optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=config.weight_decay)
    frozen_until = math.ceil(config.freeze_prototypes_epochs * run.steps)
    queue_from = math.ceil(max(config.queue_start_epoch * run.steps, queue / n))
    note = f"swapped_prediction, the sum over {len(pairs)} pairs of crops {config.crops}; the {config.prototypes:,} "
    note += f"prototypes stand still for {frozen_until:,} steps"
    note += f"; from step {queue_from:,} on {queue:,} past outputs join the batch" if queue else ""
    guess = len(pairs) * math.log(config.prototypes)  # the loss of a uniform p
    network = run.begin(model, optimizer=optimizer, guess=guess, note=note)

    for _, views in run.batches(crops=crops):
        views = [augment(x, config) for x in views]  # V views of (B, 3, S, S), the large crops first
        set_lr(optimizer, cosine_lr(run.step, run.total, config.warmup_epochs * run.steps, lr, first_lr, last_lr))

        z, scores = network(*views)  # (B, V, d), (B, V, K)
        with_queue = queue > 0 and run.step >= queue_from
        q = [model.codes(scores[:, i], i, with_queue) for i in range(large)]  # (B, K) each, no gradient
        loss = sum(swapped_prediction(scores[:, j], q[i], tau) for i, j in pairs)  # equation 6

        optimizer.zero_grad()
        loss.backward()
        if run.step < frozen_until:
            model.prototypes.weight.grad = None
        optimizer.step()
        model.update(z, run.step)
        run.log(loss, z[:, 0], *views)
    return run.finish()


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
