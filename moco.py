"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning, versions 1 and 2.

v1: He, Fan, Wu, Xie, Girshick, CVPR 2020, https://arxiv.org/abs/1911.05722
v2: Chen, Fan, Girshick, He, 2020, https://arxiv.org/abs/2003.04297

MoCo treats contrastive learning as a dictionary look-up. It draws two views of an image, a query and a key. The query
has to find its own key k+ among K other keys. A queue keeps these K keys from earlier batches:

    q = f_q(x_q)    k = f_k(x_k), no gradient    the loss scales both to length 1                  (algorithm 1)
    L_q = -log( exp(q . k+ / tau) / (exp(q . k+ / tau) + sum over the queue of exp(q . k_i / tau)) )  (equation 1)
    theta_k <- m theta_k + (1 - m) theta_q                                                         (equation 2)

m is near 1, so that all keys in the queue come from nearly the same encoder. The loss is asymmetric: a gradient reaches
only the query. Only the backbone of f_q is kept: its output h is the representation.

    paper                      here                        flag
    f_q                        model.backbone, .projector  --backbone, --projection-head
    f_k                        model.key_encoder           --momentum
    the queue, K               Queue                       --queue-size
    end-to-end, memory bank    info_nce, MemoryBank        --mechanism (figure 2 a, b)
    shuffling BN               SplitBatchNorm, order       --bn-splits, --shuffle-bn
    tau                        temperature                 --temperature
    MLP, aug+, cos (v2)        .projector, augment, lr_at  --projection-head, --augmentation, --blur, --schedule

    python moco.py                                         the demo: built-in data, two CPU cores
    python moco.py --data /my/photos                       your own pictures
    python moco.py --preset paper-v1 --data /imagenet      version 1; --preset paper is version 2

The demo ends at a kNN accuracy of 0.836 to 0.955; raw pixels reach 0.726 (seeds 0 to 4; an EPYC with AVX2).

This file has four main differences from the authors' code. Our cosine moves at every step, theirs at every epoch. Our
blur's kernel is a tenth of the side; the authors' blur (Pillow's) has no bound and blurs visibly more at 32 pixels.
We normalise by torchvision's mean and deviation; the authors' CIFAR notebook takes CIFAR-10's. The memory bank's
negatives are drawn once a batch, from the images outside it; Wu et al. draw them for each query, from all images."""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunConfig, cosine_lr, gather, set_lr
from images import color_jitter, ensure, flip, gaussian_blur, grey, normalize, sometimes

V1 = dict(projection_head="linear", augmentation="v1", blur=0.0, schedule="steps", temperature=0.07)
CIFAR = dict(  # the authors' notebook moco_cifar10_demo: v1's head with v2's colours and schedule
    data="cifar10", image_size=32, backbone="resnet18", stem="cifar", batch_size=512, lr=0.06, weight_decay=5e-4,
    projection_head="linear", blur=0.0, crop_min_scale=0.08, temperature=0.1, momentum=0.99, queue_size=4096,
)  # fmt: skip
# ours: for your own pictures, hundreds or more
PHOTOS = dict(image_size=128, backbone="resnet18", epochs=100, batch_size=128, lr=0.06, momentum=0.99, queue_size=256)
DEMO = dict(  # ours: learns the shapes set on two CPU cores in about two minutes
    data="shapes", image_size=32, backbone="resnet8", epochs=10, batch_size=64, lr=0.2, warmup_epochs=1.0,
    projection_head="linear", projection_dim=64, momentum=0.998, queue_size=1024,
    crop_min_scale=0.35, blur=0.0, bn_splits=2, knn_every=2,
)  # fmt: skip


@dataclass(kw_only=True)
class Config(RunConfig):
    """MoCo's flags. The defaults are v2's ImageNet recipe; sections are those of v1's paper unless marked v2."""

    PRESETS = {"paper": {}, "paper-v1": V1, "cifar": CIFAR, "photos": PHOTOS, "demo": DEMO}

    mechanism: Literal["queue", "end-to-end", "memory-bank"] = "queue"  # where the keys come from (figure 2: c, a, b)
    symmetric: bool = False  # add the loss with the views exchanged; like twice the epochs (authors' notebook)
    momentum: float = 0.999  # share m that the key encoder keeps in a step; short runs need less (section 4.1)
    queue_size: int = 65536  # number of keys K in the queue, or of negatives from the memory bank (section 4.1)
    temperature: float = 0.2  # tau: smaller puts more weight on the nearest keys (v2, table 1)
    bank_momentum: float = 0.5  # m: each vector of the memory bank keeps this share in an update (Wu et al. 2018)
    bn_splits: int = 8  # groups of a batch that BN normalises apart, like the paper's 8 GPUs; 1 = ordinary BN
    shuffle_bn: bool = True  # shuffle keys over the BN groups; else BN betrays a query's key (section 3.3)
    projection_head: Literal["linear", "mlp"] = "mlp"  # linear in v1, mlp in v2 (v2, section 2)
    hidden_dim: int = 0  # width of the mlp head's hidden layer; 0 = the backbone's width, 2048 in v2
    projection_dim: int = 128  # width of queries and keys (section 3.3)
    augmentation: Literal["v1", "v2"] = "v2"  # v1: grey, then always strong jitter; v2: SimCLR's order, but weaker
    crop_min_scale: float = 0.2  # least share of the picture that a crop covers; the most is 1 (the authors' code)
    blur: float = 0.5  # probability of v2's blur; v1 has no blur
    schedule: Literal["steps", "cosine"] = "cosine"  # steps: lr / 10 at 60% and 80% (v1, section 4); cosine: v2
    epochs: int = 200  # passes over the training images (section 4)
    batch_size: int = 256  # queries in a step, N (section 4)
    lr: float = 0.03  # learning rate, not scaled by the batch size (section 4: for 256)
    weight_decay: float = 1e-4  # weight decay, also on BN and biases (section 4)
    loss_backend: Literal["auto", "triton", "blocked", "naive"] = "auto"  # naive: this file's loss; others: kernels/
    out: str = "runs/moco"  # folder of the run; if it holds a run, a new one beside it, such as runs/moco-2

    def check(self) -> None:
        super().check()
        self.need("lr > 0", "temperature > 0", "queue_size > 0", "projection_dim > 0", "bn_splits > 0", "blur <= 1")
        self.need("momentum <= 1", "bank_momentum <= 1", "0 < crop_min_scale <= 1")
        ensure(not self.symmetric or self.mechanism != "memory-bank", "--symmetric: not with memory-bank; leave it out")
        self.need("batch_size % bn_splits == 0", "batch_size >= 2 * bn_splits")


def augment(x: Tensor, config: Config) -> Tensor:
    """The augmentation after the crop, drawn anew for every image. x: (N, 3, H, W) in [0, 1]."""
    if config.augmentation == "v1":  # v1, section 3.3, and the authors' code
        x = sometimes(x.clone(), 0.2, grey)
        x = color_jitter(x, 0.4, 0.4, 0.4, 0.4)
    else:  # v2, section 2
        x = sometimes(x.clone(), 0.8, color_jitter, 0.4, 0.4, 0.4, 0.1)
        x = sometimes(x, 0.2, grey)
    x = sometimes(x, config.blur, gaussian_blur)
    x = sometimes(x, 0.5, flip)
    return normalize(x)


class SplitBatchNorm(nn.BatchNorm2d):
    """BN that normalises `splits` equal groups of a batch apart, as so many GPUs would; see `MoCo.split_batch_norm`. A
    step moves the running statistics once, by the mean over the groups. In eval mode this is BatchNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, var = self.running_mean.repeat(self.splits, 1), self.running_var.repeat(self.splits, 1)  # (splits, C)
        groups, same = zip(x.chunk(self.splits), mean, var, strict=True), (self.weight, self.bias, True)
        x = torch.cat([F.batch_norm(*group, *same, self.momentum, self.eps) for group in groups])  # moves mean, var
        self.running_mean.copy_(mean.mean(0))
        self.running_var.copy_(var.mean(0))
        self.num_batches_tracked.add_(1)
        return x


class MoCo(nn.Module):
    """f_q and f_k. `model(x_q, x_k)` is q and k, (N, d) each; with a memory bank `model(x_q)` is (q,).
    `model.backbone(x)` is h, which is kept; `model.embed(x)` is f_q(x)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = common.build_backbone(config, zero_init_residual=False)  # as in the authors' code
        d, self.dim, self.mechanism, self.splits = self.backbone.feature_dim, config.projection_dim, config.mechanism, 1
        if config.projection_head == "linear":
            self.projector = nn.Linear(d, self.dim)
        else:
            hidden = config.hidden_dim or d
            self.projector = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, self.dim))
        if self.mechanism == "queue":
            self.key_encoder = copy.deepcopy(nn.Sequential(self.backbone, self.projector)).requires_grad_(False)

    def split_batch_norm(self, splits: int) -> None:
        """From now on BN normalises so many groups of a batch apart. Its parameters and buffers stay the same."""
        self.splits = splits
        for module in self.modules() if splits > 1 else ():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__, module.splits = SplitBatchNorm, splits

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    def in_groups(self, network: Any, x: Tensor) -> Tensor:
        """network(x), with image n in BN group n mod `splits`. W processes then form the same groups as one process."""
        z = network(torch.cat([x[i :: self.splits] for i in range(self.splits)]))  # (N, d), group by group
        return torch.stack(z.chunk(self.splits), 1).flatten(0, 1)

    def forward(self, x_q: Tensor, x_k: Tensor | None = None) -> tuple[Tensor, ...]:
        q = self.in_groups(self.embed, x_q)
        if self.mechanism == "memory-bank":  # figure 2b: the keys are in the bank
            return (q,)
        if self.mechanism == "end-to-end":  # figure 2a: f_q makes the keys too, and learns from them
            return q, self.in_groups(self.embed, x_k)
        with torch.no_grad():  # figure 2c: a slow encoder makes the keys
            return q, self.in_groups(self.key_encoder, x_k)


@torch.no_grad()
def update_key_encoder(f_q: nn.Module, f_k: nn.Module, m: float) -> None:
    """Equation 2, in place: each parameter of f_k moves towards f_q's. f_k keeps BN statistics of its own."""
    torch._foreach_lerp_(list(f_k.parameters()), list(f_q.parameters()), 1 - m)


class Queue(nn.Module):
    """`keys` (K, d): the newest K keys, of length 1; row `pointer` is the oldest. The first keys are random."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by these, (N, d). Of more than K keys the last K stay. Each process must give the
        keys of all processes, in the same order, so that all queues stay equal."""
        keys = F.normalize(keys.to(self.keys), dim=1)[-len(self.keys) :]
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys.index_copy_(0, rows, keys)
        self.pointer.add_(len(keys)).remainder_(len(self.keys))


class MemoryBank(nn.Module):
    """One vector of length 1 for each of M images, (M, d): the dictionary of figure 2b (Wu et al. 2018,
    arXiv:1805.01978). Each process must give the rows of all processes, so that all banks stay equal."""

    def __init__(self, images: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(images, dim), dim=1))

    def sample(self, index: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` vectors (count, d), drawn with replacement from the images outside index (N,)."""
        others = torch.ones(len(self.vectors), dtype=torch.bool).index_fill(0, index, False).nonzero().squeeze(1)
        return self.vectors[others[torch.randint(len(others), (count,), generator=generator)]]

    @torch.no_grad()
    def update(self, index: Tensor, q: Tensor, momentum: float) -> None:
        """v <- m v + (1 - m) q, scaled to length 1: here the momentum is on the vector, not on the encoder."""
        old, q = self.vectors[index], F.normalize(q.to(self.vectors), dim=1)
        self.vectors[index] = F.normalize(momentum * old + (1 - momentum) * q, dim=1)


def info_nce(q: Tensor, k: Tensor, queue: Tensor | None = None, temperature: float | Tensor = 0.2) -> Tensor:
    """Equation 1, the mean over N queries. q, k: (N, d), any norm; row i of k is the key of query i; temperature > 0.

    With a queue (K, d), the queue's keys are the negatives, and no gradient reaches k or the queue. Without one, the
    negatives are the other N - 1 keys of the batch, and the gradient reaches q and k. This loss builds all logits.
    """
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    if queue is None:
        logits = torch.einsum("nc,kc->nk", q, k) / temperature  # (N, N)
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device))  # positives are on the diagonal
    k, queue = k.detach(), F.normalize(queue.detach(), dim=1)
    l_pos = torch.einsum("nc,nc->n", q, k)[:, None]  # (N, 1)
    l_neg = torch.einsum("nc,kc->nk", q, queue)  # (N, K)
    logits = torch.cat([l_pos, l_neg], dim=1) / temperature  # (N, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))  # the positive is the 0th


def lr_at(config: Config, step: int, total: int, warmup: float) -> float:
    """The learning rate of a step, 0 <= step < total, after `warmup` steps of a linear rise (papers: 0)."""
    if config.schedule == "cosine" or step < warmup:
        return cosine_lr(step, total, warmup, config.lr)
    return config.lr * 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))  # epochs 120 and 160 of 200


def train(config: Config, data: Any = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data` (see `common.Run`). Returns the final figures; `out` is the run's folder."""
    run = common.Run(config, data)
    rank, world, there, n, mechanism = run.rank, run.world, len(run.data.train), config.batch_size, config.mechanism
    K, tau, seen = config.queue_size, config.temperature, world * min(config.micro_batch_size or n, n // world)
    ensure(there >= K or mechanism == "end-to-end", f"--queue-size {K}: give at most {there}, the number of images")
    ensure(there > n or mechanism != "memory-bank", f"--batch-size {n}: give less than {there}, the number of images")
    config.need(f"bn_splits == 1 or bn_splits % {world} == 0", f"{seen} % bn_splits == 0", f"2 * bn_splits <= {seen}")
    groups = config.bn_splits * n // seen  # BN groups in a batch: each `seen` images, of all processes, have bn_splits
    shuffled = config.shuffle_bn and groups > 1 and mechanism != "memory-bank"

    model = MoCo(config).to(run.device, memory_format=torch.channels_last)
    model.split_batch_norm(max(1, config.bn_splits // world))
    f_q = nn.Sequential(model.backbone, model.projector)
    optimizer = torch.optim.SGD(f_q.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay)
    queue = Queue(K if mechanism == "queue" else 0, model.dim).to(run.device)
    bank = MemoryBank(there if mechanism == "memory-bank" else 0, model.dim).to(run.device)
    loss_of = run.loss(info_nce, across=False)
    guess = math.log(n if mechanism == "end-to-end" else K + 1) * (1 + config.symmetric)
    note = f"info_nce{', the sum of both directions' * config.symmetric}; {mechanism}; BN over groups of {n // groups}"
    note += " images" + ", keys shuffled" * shuffled
    network = run.begin(model, guess, config.bn_splits == 1, note, optimizer=optimizer, queue=queue, bank=bank)

    def contrast(index, x_q, x_k=None):
        """Equation 1's loss, q (N / W, d), all processes' keys (N, d); for own views x_q, x_k (N / W, 3, S, S)."""
        if mechanism == "memory-bank":
            (q,), negatives = network(x_q), bank.sample(gather(index), K, run.shared)
            return loss_of(q, bank.vectors[index], negatives, tau), q, None
        if shuffled:  # a key meets other images in its BN group than its query does (section 3.3)
            order = torch.randperm(n, generator=run.shared)
            x_k = gather(x_k)[order][rank::world]
        q, k = network(x_q, x_k)
        k = gather(k)[order.argsort()] if shuffled else gather(k)
        if mechanism == "end-to-end":  # every process computes the whole loss
            return loss_of(gather(q), k, None, tau), q, k
        return loss_of(q, k[rank::world], queue.keys, tau), q, k

    for index, views in run.batches(views=1 if mechanism == "memory-bank" else 2, scale=(config.crop_min_scale, 1.0)):
        views = [augment(x, config) for x in views]  # x_q, x_k: (n, 3, S, S)
        set_lr(optimizer, lr_at(config, run.step, run.total, config.warmup_epochs * run.steps))

        if mechanism == "queue":
            update_key_encoder(f_q, model.key_encoder, config.momentum)  # before the keys, as in the authors' code
        loss, q, k = contrast(index, *views)
        if config.symmetric:
            other, _, other_k = contrast(index, *views[::-1])
            loss, k = loss + other, torch.cat([other_k, k])

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if mechanism == "queue":
            queue.enqueue(k)  # after the loss: no query meets its key of this step among the negatives
        if mechanism == "memory-bank":
            bank.update(gather(index), gather(q.detach()), config.bank_momentum)
        run.log(loss, q, *views)
    return run.finish()


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
