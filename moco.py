"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning, versions 1 and 2.

v1: He, Fan, Wu, Xie, Girshick, CVPR 2020, https://arxiv.org/abs/1911.05722
v2: Chen, Fan, Girshick, He, 2020, https://arxiv.org/abs/2003.04297

Contrastive learning as looking up a dictionary. Of an image two views are drawn, a query and a key; the query has to
find its own key k+ among K others, which are the keys of earlier batches, kept in a queue:

    q = f_q(x_q)    k = f_k(x_k), no gradient    both scaled to length 1 by the loss               (algorithm 1)
    L_q = -log( exp(q . k+ / tau) / (exp(q . k+ / tau) + sum over the queue of exp(q . k_i / tau)) )  (equation 1)
    theta_k <- m theta_k + (1 - m) theta_q: the keys of a queue must come from nearly one encoder     (equation 2)

The loss is asymmetric: only the query's view is trained on. f_q without its head is kept: h is the representation.

    paper                      here                        flag
    f_q                        model.backbone, .projector  --backbone, --projection-head
    f_k                        model.key_encoder           --momentum
    the queue, K               model.queue                 --queue-size
    end-to-end, memory bank    contrast, MemoryBank        --mechanism (figure 2 a, b)
    shuffling BN               encode                      --bn-splits, --shuffle-bn
    tau                        temperature                 --temperature
    MLP, aug+, cos (v2)        .projector, augment, lr_at  --projection-head, --augmentation, --blur, --schedule

    python moco.py                                         the demo: embedded data, two CPU cores
    python moco.py --data /my/photos --backbone resnet18   any folder of images
    python moco.py --preset paper-v1 --data /imagenet      version 1; --preset paper is version 2

The demo ends at a kNN of 0.853 to 0.937, raw pixels at 0.726 (five seeds; an EPYC with AVX-512).

Unlike the authors' code, the learning rate of the cosine moves at every step (theirs at every epoch), and the blur's
kernel is a tenth of the side (that of Pillow, which they take, has no bound: at 32 pixels it blurs visibly more). Their
CIFAR notebook takes off CIFAR-10's mean and deviation, here they are torchvision's. The memory bank's negatives are
drawn once a batch, from the images outside it (Wu et al.: for each query, from all).
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunConfig, cosine_lr, set_lr
from images import color_jitter, flip, gaussian_blur, grey, normalize, sometimes

try:
    import kernels
except ModuleNotFoundError as error:  # the folder was not copied along: the naive losses below run
    if error.name != "kernels":
        raise
    kernels = None

V1 = {"projection_head": "linear", "augmentation": "v1", "blur": 0.0, "schedule": "steps", "temperature": 0.07}
CIFAR = {  # the authors' notebook moco_cifar10_demo: v1's head with v2's colours and schedule
    **{"data": "cifar10", "image_size": 32, "backbone": "resnet18", "stem": "cifar", "batch_size": 512, "lr": 0.06},
    **{"weight_decay": 5e-4, "projection_head": "linear", "blur": 0.0, "crop_min_scale": 0.08, "temperature": 0.1},
    **{"momentum": 0.99, "queue_size": 4096},
}
DEMO = {  # ours: learns the shapes set on two CPU cores in about two minutes
    **{"data": "shapes", "image_size": 32, "backbone": "resnet8", "epochs": 10, "batch_size": 64, "lr": 0.2},
    **{"warmup_epochs": 1.0, "projection_head": "linear", "projection_dim": 64, "momentum": 0.998, "queue_size": 1024},
    **{"crop_min_scale": 0.35, "blur": 0.0, "bn_splits": 2, "knn_every": 2},
}


@dataclass(kw_only=True)
class Config(RunConfig):
    """MoCo's flags. The defaults are v2's ImageNet recipe; sections are those of the paper of v1 unless marked."""

    PRESETS = {"paper": {}, "paper-v1": V1, "cifar": CIFAR, "demo": DEMO}
    lr_of_preset_batch = True

    mechanism: Literal["queue", "end-to-end", "memory-bank"] = "queue"  # where keys come from (figure 2 c, a, b)
    symmetric: bool = False  # add the loss with the views exchanged (the notebook's option; as if at twice the lr)
    momentum: float = 0.999  # m of the key encoder, of the queue alone (section 4.1); smaller for short runs
    queue_size: int = 65536  # K, keys in the queue, or drawn from the memory bank (section 4.1)
    temperature: float = 0.2  # tau (v2, table 1)
    bank_momentum: float = 0.5  # of the memory bank's vectors (Wu et al. 2018)
    bn_splits: int = 8  # BN groups of a batch, as the paper's 8 GPUs; 1 = ordinary BN; micro-batches add to them
    shuffle_bn: bool = True  # shuffle the keys over the groups, so that BN cannot betray them (section 3.3)
    projection_head: Literal["linear", "mlp"] = "mlp"  # v1: linear; v2, section 2: mlp
    hidden_dim: int = 0  # width of the mlp's hidden layer; 0 = the width of h, 2048 in v2
    projection_dim: int = 128  # width of q and k (section 3.3)
    augmentation: Literal["v1", "v2"] = "v2"  # v1: grey, then strong jitter, always; v2: SimCLR's order, weaker
    crop_min_scale: float = 0.2  # least area of a crop; the most is 1 (the authors' code)
    blur: float = 0.5  # probability of v2's blur; v1 has none
    schedule: Literal["steps", "cosine"] = "cosine"  # v1: lr / 10 after 60% and 80% (section 4.1); v2: cosine
    epochs: int = 200  # passes over the training images (section 4.1)
    batch_size: int = 256  # N, queries in a step (section 4.1)
    lr: float = 0.03  # learning rate, not scaled by N (section 4.1: for 256)
    weight_decay: float = 1e-4  # weight decay, on everything (section 4.1)
    loss_backend: Literal["auto", "triton", "blocked", "naive"] = "auto"  # naive: this file's; else that of kernels/
    out: str = "runs/moco"  # folder of the run's files

    def check(self) -> None:
        super().check()
        one, bank = self.batch_size == 1, self.mechanism == "memory-bank"
        common.ensure(self.queue_size > 0, "--queue-size 0: there are no negatives; give 1 or more")
        common.ensure(not (bank and self.symmetric), "--symmetric: a memory bank has one vector an image; take queue")
        common.ensure(not (one and self.mechanism == "end-to-end"), "--batch-size 1: no negatives; give 2 or more")
        fused = self.loss_backend in ("triton", "blocked") and self.mechanism == "end-to-end"
        common.ensure(not fused, f"--loss-backend {self.loss_backend}: end-to-end has N x N logits only; leave it out")


def augment(x: Tensor, config: Config) -> Tensor:
    """The papers' augmentations after the crop, a draw of its own for every image. x: (N, 3, H, W) in [0, 1].

    v1: "technical details" and the authors' code. v2: section 2.
    """
    if config.augmentation == "v1":
        x = sometimes(x, 0.2, grey)
        x = color_jitter(x, 0.4, 0.4, 0.4, 0.4)
    else:
        x = sometimes(x, 0.8, color_jitter, 0.4, 0.4, 0.4, 0.1)
        x = sometimes(x, 0.2, grey)
    x = sometimes(x, config.blur, gaussian_blur)
    x = sometimes(x, 0.5, flip)
    return normalize(x)


class MoCo(nn.Module):
    """f_q, f_k and the queue. `model(x_q, x_k)` is q and k, `model.backbone(x)` is h, `model.embed(x)` is f_q(x).

    `queue` (K, d) holds unit keys, the oldest at row `pointer`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = common.build_backbone(config, zero_init_residual=False)  # as in the authors' code
        d, self.dim = self.backbone.feature_dim, config.projection_dim
        self.config = config
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum /= config.bn_splits  # a forward pass moves the running statistics once per group
        if config.projection_head == "linear":
            self.projector = nn.Linear(d, self.dim)
        else:
            hidden = config.hidden_dim or d
            self.projector = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, self.dim))
        if config.mechanism == "queue":
            self.key_encoder = nn.Sequential(copy.deepcopy(self.backbone), copy.deepcopy(self.projector))
            self.key_encoder.requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, self.dim), dim=1))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    def forward(self, x_q: Tensor, x_k: Tensor) -> tuple[Tensor, Tensor]:
        f_q, shuffle = nn.Sequential(self.backbone, self.projector), self.config.shuffle_bn
        q = encode(f_q, x_q, self.config)  # (N, d)
        if self.config.mechanism == "queue":  # figure 2c: keys of the last batches, by a slow encoder
            with torch.no_grad():
                return q, encode(self.key_encoder, x_k, self.config, shuffle)
        if self.config.mechanism == "end-to-end":  # figure 2a: keys of this batch, by f_q itself, with a gradient
            return q, encode(f_q, x_k, self.config, shuffle)
        return q, q.detach()  # figure 2b: the bank has the keys, the second view and this k are not used

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Equation 2, on the parameters alone: the BN statistics of f_k are its own."""
        theta_q = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(list(self.key_encoder.parameters()), theta_q, 1 - self.config.momentum)

    @torch.no_grad()
    def enqueue(self, k: Tensor) -> None:
        """Put the keys k (N, d) in the places of the N oldest; of more than K keys the last K stay."""
        k = F.normalize(k.to(self.queue), dim=1)[-len(self.queue) :]
        rows = (self.pointer + torch.arange(len(k), device=k.device)) % len(self.queue)
        self.queue.index_copy_(0, rows, k)
        self.pointer.add_(len(k)).remainder_(len(self.queue))


def encode(network: nn.Module, x: Tensor, config: Config, shuffle: bool = False) -> Tensor:
    """network(x), (N, d), with BN statistics over `bn_splits` groups of the batch x (N, 3, S, S), which stand for GPUs.

    Shuffled (section 3.3), an image meets other companions than its other view does, so that the statistics tell
    nothing about which key belongs to which query.
    """
    world = common.share()[1]
    if shuffle:  # a permutation of the images of all processes
        order = common.same(torch.randperm(world * len(x))).to(x.device)
        x = common.gather(x)[common.mine(order)]
    with joint_statistics(network, config.bn_splits):
        out = common.in_pieces(network, max(1, config.bn_splits // world), x, again=config.micro_batch_size > 0)
    return common.gather(out)[common.mine(order.argsort())] if shuffle else out


@contextmanager
def joint_statistics(network: nn.Module, splits: int) -> Iterator[None]:
    """Running BN statistics as of one process that goes through the groups of all, rank by rank."""
    world = common.share()[1]
    statistics = [buffer for buffer in network.buffers() if buffer.ndim] if min(world, splits) > 1 else []
    old = torch.cat(statistics) if statistics else None
    yield
    if statistics:
        momentum = next(m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d))
        kept = (1 - momentum) ** (splits // world)  # of the old ones, after the groups of one process
        for moved in common.gather((torch.cat(statistics) - kept * old)[None]):
            old = kept * old + moved
        for buffer, value in zip(statistics, old.split([len(buffer) for buffer in statistics]), strict=True):
            buffer.data.copy_(value)  # not seen by autograd, which has saved it though a training pass needs it not


class MemoryBank(nn.Module):
    """One unit vector for each of M images, (M, d): the dictionary of figure 2b (Wu et al. 2018, arXiv:1805.01978)."""

    def __init__(self, images: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(images, dim), dim=1))

    def sample(self, index: Tensor, count: int) -> Tensor:
        """`count` vectors (count, d) drawn at random, with replacement, from the images that are not in index (N,)."""
        others = torch.ones(len(self.vectors), dtype=torch.bool).index_fill(0, index, False).nonzero().squeeze(1)
        return self.vectors[others[common.same(torch.randint(len(others), (count,)))].to(self.vectors.device)]

    def update(self, index: Tensor, q: Tensor, momentum: float) -> None:
        """v <- m v + (1 - m) q, and back to length 1: the momentum is on the vector, not on the encoder."""
        q, index = F.normalize(q.detach().to(self.vectors), dim=1), index.to(q.device)
        self.vectors[index] = F.normalize(momentum * self.vectors[index] + (1 - momentum) * q, dim=1)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float | Tensor = 0.2) -> Tensor:
    """Equation 1, the mean over N queries. q, k: (N, d), row i of k the key of query i; queue: (K, d); any norm.

    The naive loss, as in algorithm 1: it builds the N x (1 + K) logits. No gradient reaches k or the queue.
    """
    q, k, queue = F.normalize(q, dim=1), F.normalize(k.detach(), dim=1), F.normalize(queue.detach(), dim=1)
    l_pos = torch.einsum("nc,nc->n", q, k)[:, None]  # (N, 1)
    l_neg = torch.einsum("nc,kc->nk", q, queue)  # (N, K)
    logits = torch.cat([l_pos, l_neg], dim=1) / temperature  # (N, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))  # the positive is the 0th


def info_nce_in_batch(q: Tensor, k: Tensor, temperature: float | Tensor = 0.2, first: int = 0) -> Tensor:
    """Equation 1 with the other N - 1 keys k (N, d) of the batch as the negatives; the gradient reaches q and k.

    q (N, d), or the queries of the keys from row `first` on.
    """
    logits = torch.einsum("nc,kc->nk", F.normalize(q, dim=1), F.normalize(k, dim=1)) / temperature  # (N, N)
    return F.cross_entropy(logits, first + torch.arange(len(q), device=q.device))


def lr_at(config: Config, step: int, total: int, warmup: float) -> float:
    """The learning rate of a step, 0 <= step < total, after `warmup` steps of a linear rise (papers: 0)."""
    if config.schedule == "cosine" or step < warmup:
        return cosine_lr(step, total, warmup, config.lr)
    return config.lr * 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))  # epochs 120 and 160 of 200


def train(config: Config, data: Any = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data` (see `common.start`); write to `config.out`, return the final metrics."""
    device, data = common.start(config, data)
    n, tau, mechanism = config.batch_size, config.temperature, config.mechanism
    # groups for a batch that was lowered; a queue for a small set, in which most negatives would be an image's own keys
    rank, world = common.share()
    fitted = {"bn_splits": -(-min(config.bn_splits, max(1, n // 8)) // world) * world}  # as many for each process
    fitted["queue_size"] = min(config.queue_size, 2 ** int(math.log2(max(n, len(data.train) // 4))))
    on = f" on {world} processes" * (world > 1)
    common.fit(config, f"{len(data.train):,} images in batches of {n}{on}", fitted)
    pieces = n // (config.micro_batch_size or n)
    if pieces > config.bn_splits:  # a piece is a BN group: else ShuffleBN would not know of it
        print(f"note: in pieces of {config.micro_batch_size} images, --bn-splits {config.bn_splits} becomes {pieces}")
        config.bn_splits = pieces
    groups, fits = config.bn_splits, n >= 2 * config.bn_splits or config.bn_splits == 1
    common.ensure(fits, f"--bn-splits {groups}: for a batch of {n} give {max(1, n // 2)} or less")
    whole = groups == 1 or groups % world == 0
    common.ensure(whole, f"--bn-splits {groups}: must be 1, or a multiple of {world}, the number of processes")
    common.ensure(
        mechanism != "memory-bank" or n < len(data.train),
        f"--batch-size {n}: leaves no other image for the memory bank's negatives; give less than {len(data.train)}",
    )

    model = MoCo(config).to(device, memory_format=torch.channels_last)
    network = common.network_for(model, config, device, pieces=1, global_bn=groups == 1)  # pieces are its BN groups
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    naive = mechanism == "end-to-end"  # N x N logits only
    backend = "naive" if naive else common.loss_backend(kernels, config, n, config.queue_size, device)
    bank = MemoryBank(len(data.train), model.dim).to(device) if mechanism == "memory-bank" else None
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler} | ({"bank": bank} if bank is not None else {})
    run = common.Run(config, data, device, **parts)
    run.header(
        optimizer=f"sgd, peak lr {config.lr:g} (not scaled by N), {config.schedule}",
        loss=f"info_nce, {backend}; mean over N = {n} queries" + "; the sum of both directions" * config.symmetric,
        keys=f"{mechanism}; BN statistics over groups of {n // groups} images"
        + ", keys shuffled" * (config.shuffle_bn and groups > 1 and bank is None),
    )

    def contrast(x_q: Tensor, x_k: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Equation 1 of the queries x_q (N, 3, S, S), with q and k (N, d). index (N,): the images."""
        q, k = network(x_q, x_k)
        if mechanism == "end-to-end":
            return info_nce_in_batch(q.float(), common.gather(k.float()), tau, first=rank * len(q)), q, k
        if mechanism == "memory-bank":
            k, negatives = bank.vectors[index.to(device)], bank.sample(common.gather(index), config.queue_size)
        else:
            negatives = model.queue  # (K, d)
        if backend == "naive":
            loss = info_nce(q.float(), k.float(), negatives, tau)
        else:
            loss = kernels.info_nce(q, k, negatives, tau, backend=backend)  # the same, without the N x K matrix
        return loss, q, common.gather(k)

    for _ in run.epochs():
        for index, (x_q, x_k) in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):
            x_q, x_k = augment(x_q, config), augment(x_k, config)
            set_lr(optimizer, lr_at(config, run.step, run.total, config.warmup_epochs * run.steps))

            if mechanism == "queue":
                model.update_key_encoder()  # before the keys, as in the authors' code
            loss, q, k = contrast(x_q, x_k, index)
            if config.symmetric:
                other, _, other_k = contrast(x_k, x_q, index)
                loss, k = loss + other, torch.cat([other_k, k])

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if mechanism == "queue":
                model.enqueue(k)  # after the loss: no query meets its key of this step among the negatives
            if mechanism == "memory-bank":
                bank.update(common.gather(index), common.gather(q.detach()), config.bank_momentum)
            run.log(loss, q, x_q, x_k)
        run.end_epoch()
    return run.finish()


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
