"""SupCon's choices, and its two baselines in table 2: cross-entropy, and the large-margin softmax of Liu et al. 2016.

    python benchmarks/supervised.py                                     every row, with the demo's recipe of supcon.py
    python benchmarks/supervised.py --rows supcon "max-margin, m = 4" --seeds 0 1 2 --epochs 5
    python benchmarks/supervised.py --data /my/photos --backbone resnet18            any flag of supcon.py

Khosla et al., NeurIPS 2020, https://arxiv.org/abs/2004.11362, table 2. The rows vary SupCon's choices: whether the
sum over positives is outside (L_out) or inside (L_in) the logarithm, whether the head has one layer or two, and whether
z has length 1. A row that does not normalise z names its tau.

Liu, Wen, Yu, Yang, ICML 2016, https://arxiv.org/abs/1612.02295. A linear classifier W without bias gives h (N, d) the
logit |w_y| |h| cos(a) for its true class y, where a is the angle between h and w_y. The paper makes this logit smaller,
so that h has to come much nearer to w_y than to the other w:

    |w_y| |h| (lam cos(a) + psi(a)) / (lam + 1)                                                     (equation 9)
    psi(a) = (-1)^k cos(m a) - 2k    on k pi / m <= a <= (k + 1) pi / m                              (equation 6)

The baselines have no projection head. They see both views, so an epoch costs the same. All rows are judged by kNN and
by linear_eval.py's linear classifier, on the frozen h. The paper's figures are for CIFAR-10, ResNet-50, 1000 epochs.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import supcon
from benchmarks.table import compare, learn, linear, parser
from images import ensure
from supcon import Config, augment


def large_margin(h: Tensor, w: Tensor, labels: Tensor, m: int, lam: float) -> Tensor:
    """Logits (N, C) of h (N, d) and w (C, d), with equation 9 for the true class; labels (N,). m = 1: no margin."""
    logits = h @ w.T
    norm = (h.norm(dim=1) * w.norm(dim=1)[labels]).clamp(min=1e-12)  # (N,)
    true = logits.gather(1, labels[:, None]).squeeze(1)
    cos = (true / norm).clamp(-1, 1)
    # cos(m a) is the Chebyshev polynomial T_m of cos(a): T_{m+1} = 2 cos(a) T_m - T_{m-1}
    before, chebyshev = torch.ones_like(cos), cos
    for _ in range(m - 1):
        before, chebyshev = chebyshev, 2 * cos * chebyshev - before
    k = (m * cos.detach().acos() / math.pi).floor().clamp(max=m - 1)
    psi = (1 - 2 * (k % 2)) * chebyshev - 2 * k
    return logits.scatter(1, labels[:, None], ((lam * true + norm * psi) / (lam + 1))[:, None])


def margin_loss(h: Tensor, w: Tensor, labels: Tensor, m: int, progress: float) -> Tensor:
    """Cross-entropy of `large_margin`. lam falls from 1000 to 0.001 as `progress` goes from 0 to 1. The paper says only
    that lam falls gradually; the pace is ours."""
    return F.cross_entropy(large_margin(h, w, labels, m, 10 ** (3 - 6 * progress)), labels)


def of_any_length(z: Tensor, labels: Tensor, tau: float) -> Tensor:
    """L_out (equation 2) of z (M, d), which `supcon.sup_con` would normalise. Each label has to occur twice or more."""
    s, itself = z @ z.T / tau, torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~itself  # (M, M): p in P(i)
    log_p = s - s.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return -((log_p * positive).sum(1) / positive.sum(1)).mean()


def train(config: Config, loss_of: Callable, note: str) -> dict[str, Any]:
    """Train as `supcon.train`, but with the loss `loss_of(z (2N, d), w (C, d), labels (2N,), progress)`. w is the
    classifier's weight. If the config has the loss cross-entropy, z is h."""
    run = common.Run(config)
    labels = run.data.train.labels.to(run.device)
    words = f"--data {run.data.name}: give a set with held-out images, in which every image has a label"
    ensure(run.data.labelled and labels.min() >= 0, words)
    model = supcon.SupCon(config).to(run.device, memory_format=torch.channels_last)
    classifier = nn.Linear(model.dim, len(run.data.classes), bias=False).to(run.device)
    parts = nn.ModuleDict({"model": model, "classifier": classifier})
    if config.optimizer == "lars":
        optimizer = common.LARS(common.parameter_groups(parts, config.weight_decay), lr=config.lr)
    else:
        optimizer = torch.optim.SGD(parts.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)

    def losses(network: nn.Module) -> Iterator:
        for index, (x1, x2) in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):
            x1, x2 = augment(x1, config), augment(x2, config)
            z, y = torch.cat(network(x1, x2)), labels[index.to(run.device)].repeat(2)  # (2N, d), (2N,)
            yield loss_of(z, classifier.weight, y, run.step / run.total), z, x1, x2

    return learn(run, model, optimizer, config.lr, losses, note, classifier=classifier)


def judged(config: Config, work: Callable = supcon.train, **given: Any) -> dict[str, Any]:
    """Train with the flags `given`; return the figures, with linear top-1 of the frozen h."""
    found = work(dataclasses.replace(config, **given))
    return found | linear(found["out"])


def max_margin(config: Config, m: int) -> dict[str, Any]:
    loss = lambda h, w, labels, progress: margin_loss(h, w, labels, m, progress)  # noqa: E731
    return judged(config, partial(train, loss_of=loss, note=f"large margin, m = {m}"), loss="cross-entropy")


def not_normalized(config: Config, tau: float) -> dict[str, Any]:
    loss = lambda z, w, labels, progress: of_any_length(z, labels, tau)  # noqa: E731
    return judged(config, partial(train, loss_of=loss, note=f"L_out of z of any length, tau = {tau:g}"))


ROWS = {
    "supcon": (judged, "96.0"),
    "L_in": (partial(judged, loss="in"), ""),
    "linear head": (partial(judged, projection_head="linear"), ""),
    "not normalised, tau = 1": (partial(not_normalized, tau=1.0), ""),
    "not normalised, tau = 10": (partial(not_normalized, tau=10.0), ""),
    "cross-entropy": (partial(judged, loss="cross-entropy"), "95.0"),
    "max-margin, m = 2": (partial(max_margin, m=2), ""),
    "max-margin, m = 4": (partial(max_margin, m=4), "92.4"),
}
COLUMNS = {"linear top-1 of h": "linear_top1", "kNN of h": "knn_top1", "rank": "effective_rank", "s": "seconds"}


if __name__ == "__main__":
    with common.exit_status():
        compare(parser(__doc__, "supervised"), Config, ROWS, COLUMNS, ["loss", "projection_head"])
