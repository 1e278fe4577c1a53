"""SimSiam's section 5, and twice the pairs of section 4.6: experiments that replace a part of simsiam.py's loop.

    python benchmarks/simsiam_section5.py                               every row, by the demo's recipe
    python benchmarks/simsiam_section5.py --rows "k = 10" --seeds 0 1 2 --epochs 8
    python benchmarks/simsiam_section5.py --data /my/photos --backbone resnet18      any flag of simsiam.py

The hypothesis (5.1): SimSiam lowers, over theta and over a vector eta_x for each image x in turn,

    L(theta, eta) = E_{x, T} | F_theta(T(x)) - eta_x |^2                                            (equation 5)
    theta_t <- argmin over theta of L(theta, eta_{t-1})       by SGD                                (equation 7)
    eta_t <- argmin over eta of L(theta_t, eta), so eta_x = E_T F_theta(T(x)), of which SimSiam takes one sample T'(x)
                                                                                                    (equations 8 to 10)
k = 10, 100, an epoch (5.2, multi-step alternation): eta of the images of k steps is computed before them, from views of
its own, and equation 7 takes k steps of SGD; SimSiam itself is k = 1. Average (5.2, expectation over augmentations):
eta_x <- m eta_x + (1 - m) F(T'(x)), a mean over T, in place of the predictor, which 5.2 takes to stand for it.
Twice the pairs (4.6): one direction each of two pairs of views. The paper's figures: ImageNet, linear, 100 epochs.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import simsiam
from benchmarks.table import changed, compare, parser
from simsiam import Config, augment, negative_cosine

M = 0.8  # m of the moving average (5.2)


def train(config: Config, losses: Callable[..., Iterator], said: str) -> dict[str, Any]:
    """`simsiam.train`, with the loss of each step from `losses(run, model)`: an iterator, for an epoch, over the loss,
    the output z (N, d) to look at, and the views."""
    device, data = common.start(config)
    model = simsiam.SimSiam(config).to(device, memory_format=torch.channels_last)
    model.train()
    lr = config.lr * config.batch_size / 256
    f = {"params": [*model.backbone.parameters(), *model.projector.parameters()]}
    h = {"params": list(model.predictor.parameters()), "constant": config.predictor_lr == "constant"}
    optimizer = torch.optim.SGD([f, h], lr=lr, momentum=0.9, weight_decay=config.weight_decay)
    run = common.Run(config, data, device, model=model, optimizer=optimizer)
    run.header(targets=said)
    for _ in run.epochs():
        for loss, z, *views in losses(run, model):
            common.set_lr(optimizer, common.cosine_lr(run.step, run.total, config.warmup_epochs * run.steps, lr))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, z, *views)
        run.end_epoch()
    return run.finish()


def crops(run: common.Run, views: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    return run.batches(views=views, scale=(run.config.crop_min_scale, 1.0))


@torch.no_grad()
def eta_of(model: simsiam.SimSiam, config: Config, views: list[Tensor]) -> list[Tensor]:
    """F_theta(T'(x)) of each view, (N, d); the BN statistics stay as they are."""
    with common.still_statistics(model):
        return [model.embed(augment(x, config)) for x in views]


def ahead(run: common.Run, model: simsiam.SimSiam, k: int = 0) -> Iterator:
    """Equation 7 by k steps of SGD, 0 = an epoch's, towards targets from before the first of them."""
    coming, waiting = crops(run, 4), deque()  # the same images in the same order; two of the four views are other ones
    for _, (x1, x2) in crops(run, 2):
        if not waiting:
            waiting.extend(eta_of(model, run.config, views[2:]) for _, views in islice(coming, k or run.steps))
        eta1, eta2 = waiting.popleft()
        x1, x2 = augment(x1, run.config), augment(x2, run.config)
        p1, p2, z1, _ = model(x1, x2)
        yield negative_cosine(p1, eta2) / 2 + negative_cosine(p2, eta1) / 2, z1, x1, x2


def moving_average(eta: Tensor, index: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """eta_x <- m eta_x + (1 - m) z / |z| of the images index (N,), once by z of either view, (N, d): both are returned,
    and their mean stays in eta (M, d). So a view's target, the other view's, does not contain the view itself.
    """
    index = index.to(eta.device)
    eta1, eta2 = (M * eta[index] + (1 - M) * F.normalize(z.detach(), dim=1) for z in (z1, z2))
    eta[index] = (eta1 + eta2) / 2
    return eta1, eta2


def average(config: Config) -> dict[str, Any]:
    """The moving average, which starts at random unit vectors: from zeros, the first epoch would predict z itself."""
    config, eta = changed(config, predictor="none"), None

    def losses(run: common.Run, model: simsiam.SimSiam) -> Iterator:
        nonlocal eta
        if eta is None:
            eta = F.normalize(torch.randn(len(run.data.train), model.dim), dim=1).to(run.device)  # (M, d)
        for index, (x1, x2) in crops(run, 2):
            x1, x2 = augment(x1, config), augment(x2, config)
            z1, z2 = model.embed(x1), model.embed(x2)
            eta1, eta2 = moving_average(eta, index, z1, z2)
            yield negative_cosine(z1, eta2) / 2 + negative_cosine(z2, eta1) / 2, z1, x1, x2

    return train(config, losses, f"moving average, m = {M}, no predictor")


def twice(run: common.Run, model: simsiam.SimSiam) -> Iterator:
    """Of four views the first predicts the second, the third the fourth."""
    for _, views in crops(run, 4):
        x1, x2, x3, x4 = (augment(x, run.config) for x in views)
        (p1, _, z1, z2), (p3, _, _, z4) = model(x1, x2), model(x3, x4)
        yield negative_cosine(p1, z2) / 2 + negative_cosine(p3, z4) / 2, z1, x1, x2, x3, x4


def steps_ahead(config: Config, k: int) -> dict[str, Any]:
    return train(config, partial(ahead, k=k), f"of {k or 'all the epoch'} steps, from before the first of them")


ROWS = {
    "simsiam": (simsiam.train, "68.1"),
    "k = 10": (lambda config: steps_ahead(config, 10), "68.7"),
    "k = 100": (lambda config: steps_ahead(config, 100), "68.9"),
    "k = an epoch": (lambda config: steps_ahead(config, 0), "67.0"),
    "no predictor": (lambda config: simsiam.train(changed(config, predictor="none")), "0.1"),
    "average": (average, "55.0"),
    "one direction": (lambda config: simsiam.train(changed(config, symmetric=False)), "64.8"),
    "twice the pairs": (lambda config: train(config, twice, "z of the same step, twice the pairs"), "67.3"),
}
UNUSED = ("stop_gradient", "predictor", "similarity", "symmetric")
COLUMNS = {"kNN of h": "knn_top1", "loss": "loss", "std": "feature_std", "rank": "effective_rank", "s": "seconds"}


if __name__ == "__main__":
    with common.exit_status():
        compare(parser(__doc__, "simsiam_section5"), Config, ROWS, COLUMNS, UNUSED)
