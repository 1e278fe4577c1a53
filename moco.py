"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning, versions 1 and 2.

v1: He, Fan, Wu, Xie, Girshick, CVPR 2020, https://arxiv.org/abs/1911.05722
v2: Chen, Fan, Girshick, He, 2020, https://arxiv.org/abs/2003.04297

Contrastive learning as looking up a dictionary. Of an image two views are drawn, a query and a key; the query has to
find its own key k+ among K others, which are the keys of earlier batches, kept in a queue:

    q = f_q(x_q)    k = f_k(x_k), no gradient    both of length 1                                  (algorithm 1)
    L_q = -log( exp(q . k+ / tau) / (exp(q . k+ / tau) + sum over the queue of exp(q . k_i / tau)) )  (equation 1)
    theta_k <- m theta_k + (1 - m) theta_q: the keys of a queue must come from nearly one encoder     (equation 2)

The loss is asymmetric: only the query's view is trained on. f_q without its head is kept: h is the representation.

    paper                      here                        flag
    f_q                        model.backbone, .projector  --backbone, --projection-head
    f_k                        model.key_encoder           --momentum
    the queue, K               model.queue                 --queue-size
    end-to-end, memory bank    contrast                    --mechanism (figure 2 a, b)
    shuffling BN               encode                      --bn-splits, --shuffle-bn
    tau                        temperature                 --temperature
    MLP, aug+, cos (v2)        head, augment, lr_at        --version, or --projection-head, --augment, --schedule

    python moco.py                                         the demo: embedded data, two CPU cores, three minutes
    python moco.py --data /my/photos                       any folder of images

Measured: `python moco.py`, two Xeon cores, torch 2.14.1, 3 min 27 s: kNN on held-out images 0.732 (raw pixels 0.390,
untrained backbone 0.203).

Unlike the authors' code, pictures stay in [0, 1] (theirs have the data set's mean and deviation taken off), and the
learning rate of the cosine moves at every step (theirs at every epoch).
"""

import copy
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
    from kernels import cosine_logsumexp, resolve_backend
    from kernels import info_nce as fused_info_nce
except ImportError as error:  # the folder was not copied along: the naive losses below run
    if error.name != "kernels":
        raise
    fused_info_nce = None

VERSIONS = {  # what --version sets where the flag is left at auto (v1: section 3.3, 4.1; v2: section 2, table 1)
    1: {"projection_head": "linear", "augment": "v1", "schedule": "steps", "temperature": 0.07},
    2: {"projection_head": "mlp", "augment": "v2", "schedule": "cosine", "temperature": 0.2},
}


@dataclass(kw_only=True)
class Config(RunConfig):
    """MoCo's flags. The defaults are the papers' ImageNet recipe; sections are those of v1 unless marked."""

    METHOD: ClassVar[str] = "moco"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"data": "imagenet"},  # not downloadable: --data says where it is
        "cifar": {  # the authors' notebook moco_cifar10_demo: v1's head with v2's colours and schedule
            **{"data": "cifar10", "image_size": 32, "backbone": "resnet18", "batch_size": 512, "lr": 0.06},
            **{"weight_decay": 5e-4, "version": 1, "augment": "v2", "blur": False, "schedule": "cosine"},
            **{"crop_min_scale": 0.08, "temperature": 0.1, "momentum": 0.99, "queue_size": 4096},
        },
        "demo": {  # ours: learns the shapes set on two CPU cores in about three minutes
            **{"data": "shapes", "image_size": 32, "backbone": "resnet8", "epochs": 20, "batch_size": 64, "lr": 0.03},
            **{"warmup_epochs": 1.0, "hidden_dim": 256, "projection_dim": 64, "momentum": 0.99, "queue_size": 1024},
            **{"crop_min_scale": 0.35, "blur": False, "bn_splits": 2, "knn_every": 4},
        },
    }

    version: Annotated[Literal[1, 2], "head, augmentation, schedule and temperature as published, where left open"] = 2
    mechanism: Annotated[
        Literal["queue", "end-to-end", "memory-bank"],
        "where keys come from: the queue (figure 2c); the batch, gradient through both (2a); a vector an image (2b)",
    ] = "queue"
    symmetric: Annotated[bool, "add the loss with the views exchanged (the authors' notebook; near twice the lr)"] = (
        False
    )
    momentum: Annotated[float, "m of the key encoder (section 4.1); smaller for short runs", "0 to 1"] = 0.999
    queue_size: Annotated[int, "K, keys in the queue, or drawn from the memory bank (section 4.1)", ">= 1"] = 65536
    temperature: Annotated[float, "tau; nan = the version's, 0.07 (section 3.1) or 0.2 (v2, table 1)", "> 0"] = math.nan
    bank_momentum: Annotated[float, "of the memory bank's vectors (Wu et al. 2018)", "0 to 1"] = 0.5
    bn_splits: Annotated[int, "groups of a batch with BN statistics of their own, the paper's 8 GPUs", ">= 1"] = 8
    shuffle_bn: Annotated[bool, "shuffle the keys over the groups, so that BN cannot betray them (section 3.3)"] = True
    projection_head: Annotated[Literal["auto", "linear", "mlp"], "auto = the version's (mlp: v2, section 2)"] = "auto"
    hidden_dim: Annotated[int, "width of the mlp's hidden layer; 0 = that of h, 2048 in v2", ">= 0"] = 0
    projection_dim: Annotated[int, "width of q and k (section 3.3)", ">= 1"] = 128
    augment: Annotated[Literal["auto", "v1", "v2"], "auto = the version's; v2 has blur and less jitter"] = "auto"
    crop_min_scale: Annotated[float, "least area of a crop; the most is 1 (the authors' code)", "> 0, <= 1"] = 0.2
    blur: Annotated[bool, "v2's blur, probability 0.5; v1 has none"] = True
    schedule: Annotated[Literal["auto", "steps", "cosine"], "steps: lr / 10 after 60% and 80% (section 4.1)"] = "auto"
    epochs: Annotated[int, "passes over the training images (section 4.1)", ">= 1"] = 200
    batch_size: Annotated[int, "N, queries in a step (section 4.1)", ">= 1"] = 256
    lr: Annotated[float, "learning rate, not scaled by N (section 4.1: 0.03 for 256)", "> 0"] = 0.03
    weight_decay: Annotated[float, "weight decay, on everything (section 4.1)", ">= 0"] = 1e-4
    loss_backend: Annotated[
        Literal["auto", "triton", "blocked", "naive"],
        "auto = what is fastest here: triton on a GPU, blocked on a CPU, naive (the loss of this file) when small",
    ] = "auto"
    out: Annotated[str, "folder of the run's files"] = "runs/moco"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in VERSIONS[self.version].items():
            if getattr(self, name) in ("auto", math.nan):  # (this very nan: another one is an error)
                setattr(self, name, value)
        if self.symmetric and self.mechanism == "memory-bank":
            raise common.InputError("--symmetric: a memory bank has one vector an image; take queue or end-to-end")
        if self.mechanism == "end-to-end" and self.batch_size == 1:
            raise common.InputError("--batch-size 1: end-to-end has no negatives then; give 2 or more")

    def lr_at(self, step: int, total: int, warmup: int) -> float:
        """The learning rate of a step, 0 <= step < total, after `warmup` steps of a linear rise (papers: 0)."""
        if self.schedule == "cosine" or step < warmup:
            return common.cosine_lr(step, total, warmup, self.lr)
        return self.lr * 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))  # epochs 120 and 160 of 200


def augment(x: Tensor, config: Config) -> Tensor:
    """The papers' augmentations after the crop, a draw of its own for every image. x: (N, 3, H, W) in [0, 1].

    v1, "technical details" and the authors' code: grey, then jitter, always on. v2, section 2: SimCLR's order and
    blur, with weaker colours. The blur's kernel is a tenth of the side, as SimCLR's.
    """
    n = len(x)
    if config.augment == "v1":
        x = where_drawn(x, coin(n, 0.2), common.to_grey)
        x = common.color_jitter(x, common.random_jitter(n, 0.4, 0.4, 0.4, 0.4, 1.0))
    else:
        x = common.color_jitter(x, common.random_jitter(n, 0.4, 0.4, 0.4, 0.1, 0.8))
        x = where_drawn(x, coin(n, 0.2), common.to_grey)
        if config.blur:
            kernel, sigma = max(3, config.image_size // 10 // 2 * 2 + 1), torch.empty(n).uniform_(0.1, 2.0)
            x = where_drawn(x, coin(n, 0.5), lambda y, sigma: common.gaussian_blur(y, sigma, kernel), sigma)
    return where_drawn(x, coin(n, 0.5), common.flip)


class MoCo(nn.Module):
    """f_q, f_k and the queue. `model(x)` is q (N, `projection_dim`), `model.backbone(x)` is h.

    `queue` (K, d) holds unit keys, the oldest at row `pointer`. Raises `InputError` for an unknown backbone.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = common.build_backbone(config)
        d, self.dim = self.backbone.feature_dim, config.projection_dim
        hidden = config.hidden_dim or d
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # as in the authors' code, the last of a block too
                module.momentum /= config.bn_splits  # a step moves the running statistics once per group
        if config.projection_head == "linear":
            self.projector = nn.Linear(d, self.dim)
        else:
            self.projector = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, self.dim))
        if config.mechanism == "queue":
            self.key_encoder = nn.Sequential(copy.deepcopy(self.backbone), copy.deepcopy(self.projector))
            self.key_encoder.requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, self.dim), dim=1))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.momentum = config.momentum

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Equation 2, on the parameters alone: the BN statistics of f_k are its own."""
        theta_q = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(list(self.key_encoder.parameters()), theta_q, 1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, k: Tensor) -> None:
        """Put the keys k (N, d) in the places of the N oldest; of more than K keys the last K stay."""
        k = F.normalize(k.to(self.queue), dim=1)[-len(self.queue) :]
        rows = (self.pointer + torch.arange(len(k), device=k.device)) % len(self.queue)
        self.queue.index_copy_(0, rows, k)
        self.pointer.add_(len(k)).remainder_(len(self.queue))


class MemoryBank(nn.Module):
    """One unit vector for each of M images, (M, d): the dictionary of figure 2b (Wu et al. 2018, arXiv:1805.01978)."""

    def __init__(self, images: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(images, dim), dim=1))

    def sample(self, index: Tensor, count: int) -> Tensor:
        """`count` vectors (count, d) drawn at random, with replacement, from the images that are not in index (N,)."""
        draw = torch.randint(len(self.vectors) - len(index), (count,))  # places in the list without `index`
        before = index.sort().values - torch.arange(len(index))  # how many such places each of `index` has before it
        return self.vectors[(draw + torch.searchsorted(before, draw, right=True)).to(self.vectors.device)]

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


def info_nce_in_batch(q: Tensor, k: Tensor, temperature: float | Tensor = 0.2) -> Tensor:
    """Equation 1 with the other N - 1 keys of the batch as the negatives; the gradient reaches q and k, (N, d)."""
    logits = torch.einsum("nc,kc->nk", F.normalize(q, dim=1), F.normalize(k, dim=1)) / temperature  # (N, N)
    return F.cross_entropy(logits, torch.arange(len(q), device=q.device))


def choose_loss(config: Config, device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """The loss that runs, of (q, k, queue), or of (q, k) for end-to-end, and its name for the header."""
    asked, tau, in_batch = config.loss_backend, config.temperature, config.mechanism == "end-to-end"

    def naive(*qk: Tensor) -> Tensor:  # in float32 under --amp too
        return (info_nce_in_batch if in_batch else info_nce)(*map(at_least_float32, qk), tau)

    if fused_info_nce is None:
        if asked not in ("auto", "naive"):
            raise common.InputError(f"--loss-backend {asked}: the folder kernels/ is not here; copy it along")
        return naive, "naive (kernels/ is not here)"
    columns = config.batch_size if in_batch else config.queue_size
    try:
        name = resolve_backend(asked, config.batch_size, columns, device, torch.float32)
    except ValueError as error:
        raise common.InputError(f"--loss-backend {asked}: {error}") from None
    if name == "naive":
        return naive, name
    if not in_batch:
        return lambda q, k, queue: fused_info_nce(q, k, queue, tau, backend=name), name

    def fused_in_batch(q: Tensor, k: Tensor) -> Tensor:
        lse = cosine_logsumexp(q, k, temperature=tau, backend=name)  # (N,): over the positive too
        return (lse - F.cosine_similarity(at_least_float32(q), at_least_float32(k), eps=1e-12) / tau).mean()

    return fused_in_batch, name


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def encode(network: nn.Module, x: Tensor, config: Config, shuffle: bool = False) -> Tensor:
    """network(x), (N, d), with BN statistics over `bn_splits` groups of the batch x (N, 3, S, S).

    Shuffled (section 3.3), an image meets other companions than its other view does, so that the statistics tell
    nothing about which key belongs to which query. The groups stand for GPUs. With several processes `x` is what all
    of them gather, `order` the same draw in each, and each encodes its own slice of `x[order]` before all gather again.
    """
    order = torch.randperm(len(x)).to(x.device) if shuffle else torch.arange(len(x), device=x.device)
    with common.autocast(config, x.device):
        groups = x[order].tensor_split(config.bn_splits)
        out = torch.cat([common.embed_in_pieces(network, config.micro_batch_size, group) for group in groups])
    return out[order.argsort()]


def contrast(
    model: MoCo, bank: MemoryBank | None, x_q: Tensor, x_k: Tensor, index: Tensor, config: Config, loss_of: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the queries x_q (N, 3, S, S) by the chosen mechanism, with q and k (N, d). index (N,): the images."""
    shuffle = config.shuffle_bn and config.bn_splits > 1
    q = encode(model, x_q, config)  # (N, d)
    if config.mechanism == "queue":  # figure 2c: keys of the last batches, by a slow encoder
        with torch.no_grad():
            k = encode(model.key_encoder, x_k, config, shuffle)
        return loss_of(q, k, model.queue), q, k
    if config.mechanism == "memory-bank":  # figure 2b: keys of the last epoch, by the encoder as it was then
        k = bank.vectors[index.to(q.device)]
        return loss_of(q, k, bank.sample(index, config.queue_size)), q, k
    k = encode(model, x_k, config, shuffle)  # figure 2a: keys of this batch, with a gradient
    return loss_of(q, k), q, k


def train(config: Config) -> dict[str, Any]:
    """Train, write the run's files to `config.out`, and return the final metrics."""
    device = common.prepare(config)
    data = common.load_data(config, device)
    asked = config.batch_size
    common.fit_batch_size(config, len(data.train))
    queue, memory_bank = config.mechanism == "queue", config.mechanism == "memory-bank"
    if config.batch_size < min(asked, 2 * config.bn_splits):  # a preset's batch was lowered: so are its groups
        config.bn_splits = max(1, config.batch_size // 2)
        print(f"note: --bn-splits is lowered to {config.bn_splits}, for a batch of {config.batch_size}")
    pieces = config.batch_size // (config.micro_batch_size or config.batch_size)
    if pieces > config.bn_splits:  # a piece is a BN group: else ShuffleBN would not know of it
        config.bn_splits = pieces
        print(f"note: --bn-splits is raised to {pieces}, the pieces of a batch")
    n, groups = config.batch_size, config.bn_splits
    if groups > 1 and n < 2 * groups:
        raise common.InputError(f"--bn-splits {groups}: for a batch of {n} give {max(1, n // 2)} or less")
    if memory_bank and n == len(data.train):
        raise common.InputError(f"--batch-size {n}: all the images; the memory bank's negatives are the others")

    model = MoCo(config).to(device, memory_format=torch.channels_last)
    bank = MemoryBank(len(data.train), model.dim).to(device) if memory_bank else None
    if config.compile:
        for network in (model, model.key_encoder) if queue else (model,):
            network.compile()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    loss_of, backend = choose_loss(config, device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler} | ({"bank": bank} if memory_bank else {})
    run = common.Run(config, data, device, **parts)
    run.header(
        optimizer=f"sgd, momentum 0.9, peak lr {config.lr:g} (not scaled by N), {config.schedule}, "
        f"weight decay {config.weight_decay:g} on everything",
        loss=f"info_nce, {backend}; mean over N = {n} queries" + "; the sum of both directions" * config.symmetric,
        keys=f"{config.mechanism}; BN statistics over groups of {n // groups} images"
        + ", keys shuffled" * (config.shuffle_bn and groups > 1 and not memory_bank),
    )

    model.train()  # f_k too
    with run:
        while run.epoch < config.epochs:
            for index, crops in run.batches(views=1 if memory_bank else 2, scale=(config.crop_min_scale, 1.0)):
                views = [augment(x, config) for x in crops]
                x_q, x_k = views[0], views[-1]  # a memory bank's keys need no view of their own
                now = config.lr_at(run.step, run.total, round(config.warmup_epochs * run.steps))
                for group in optimizer.param_groups:
                    group["lr"] = now
                if queue:
                    model.update_key_encoder()  # before the keys, as in the authors' code
                optimizer.zero_grad()
                loss, q, k = contrast(model, bank, x_q, x_k, index, config, loss_of)
                if config.symmetric:
                    other, _, other_k = contrast(model, bank, x_k, x_q, index, config, loss_of)
                    loss, k = loss + other, torch.cat([other_k, k])
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if queue:
                    model.enqueue(k)  # after the loss: no query meets its own key among the negatives
                if memory_bank:
                    bank.update(index, q, config.bank_momentum)
                run.after_step(loss, q, now, *views)
            run.after_epoch(
                knn=lambda: common.knn_of(model.backbone, data, config),
                collapse_hint="try a larger --momentum, a lower --lr, or --shuffle-bn",
            )
    torch.manual_seed(config.seed)
    return run.finish(untrained=MoCo(config).to(device, memory_format=torch.channels_last))


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
