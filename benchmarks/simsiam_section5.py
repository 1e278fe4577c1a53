"""SimSiam's section 5, and the doubled pairs of section 4.6: experiments that replace a part of simsiam.py's loop.

    python benchmarks/simsiam_section5.py                               every row, with the demo's recipe
    python benchmarks/simsiam_section5.py --rows "k = 10" --seeds 0 1 2 --epochs 8
    python benchmarks/simsiam_section5.py --data /my/photos --backbone resnet18      any flag of simsiam.py

The hypothesis (5.1): SimSiam alternately minimises, over theta and over a vector eta_x for each image x,

    L(theta, eta) = E_{x, T} | F_theta(T(x)) - eta_x |^2                                            (equation 5)
    theta_t <- argmin over theta of L(theta, eta_{t-1})       by SGD                                (equation 7)
    eta_t <- argmin over eta of L(theta_t, eta), so eta_x = E_T F_theta(T(x)); SimSiam takes a single sample T'(x)
                                                                                                    (equations 8 to 10)
The rows k = 10, k = 100 and k = an epoch are 5.2's multi-step alternation: eta of the next k steps' images is computed
from separate views, then equation 7 takes k steps of SGD. SimSiam itself has k = 1. The row average is 5.2's
expectation over augmentations. 5.2 supposes that the predictor stands for this expectation, so this row has no
predictor, and eta_x <- m eta_x + (1 - m) F(T'(x)) averages over T. Twice the pairs (4.6) trains on two pairs of views
of an image, in one direction each. The paper's figures are for ImageNet: linear evaluation after 100 epochs.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import simsiam
from benchmarks.table import compare, learn, parser
from images import seed_of
from simsiam import Config, SimSiam, augment, negative_cosine

M = 0.8  # m of the moving average (5.2)


def train(config: Config, losses: Callable[[common.Run, SimSiam], Iterator], note: str) -> dict[str, Any]:
    """Train as `simsiam.train`, but `losses(run, model)` yields the loss of each step, as in `table.learn`."""
    run = common.Run(config)
    model = SimSiam(config).to(run.device, memory_format=torch.channels_last)
    lr = config.lr * config.batch_size / 256
    f = {"params": [*model.backbone.parameters(), *model.projector.parameters()]}
    h = {"params": list(model.predictor.parameters()), "constant": config.predictor_lr == "constant"}
    optimizer = torch.optim.SGD([f, h], lr=lr, momentum=0.9, weight_decay=config.weight_decay)
    return learn(run, model, optimizer, lr, lambda _: losses(run, model), note)


@torch.no_grad()
def eta_of(model: SimSiam, config: Config, views: list[Tensor]) -> list[Tensor]:
    """F_theta(T'(x)) of each view, (N, d)."""
    return [model.embed(augment(x, config)) for x in views]


def ahead(run: common.Run, model: SimSiam, k: int) -> Iterator:
    """Equation 7 by k steps of SGD, or by a whole epoch if k is 0. The targets are computed before the first step."""
    c, train = run.config, run.data.train
    crops, order = [(c.image_size, (c.crop_min_scale, 1.0))] * 2, torch.Generator().manual_seed(seed_of(c.seed))
    for _ in run.batches():  # counts steps, draws no images: those of k steps must be known here
        at = run.step % run.steps
        if at == 0:
            epoch = torch.randperm(len(train), generator=order).split(c.batch_size)[: run.steps]
        if at % (k or run.steps) == 0:
            block = epoch[at : at + (k or run.steps)]
            frozen = copy.deepcopy(model)  # a copy, so that the model's BN statistics stay
            others = train.views(block, crops, (c.seed, run.step, 1), c.workers)
            etas = iter([eta_of(frozen, c, pair) for pair in others])
            pairs = train.views(block, crops, (c.seed, run.step, 0), c.workers)
        (eta1, eta2), (x1, x2) = next(etas), (augment(x, c) for x in next(pairs))
        p1, p2, z1, _ = model(x1, x2)
        yield negative_cosine(p1, eta2) / 2 + negative_cosine(p2, eta1) / 2, z1, x1, x2


def moving_average(eta: Tensor, index: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """eta_x <- m eta_x + (1 - m) z / |z| for the images index (N,), once with z1 and once with z2, (N, d). Both results
    are returned, and their mean is stored in eta (M, d). A view's target is the result of the other view, so it does
    not contain the view itself.
    """
    index = index.to(eta.device)
    eta1, eta2 = (M * eta[index] + (1 - M) * F.normalize(z.detach(), dim=1) for z in (z1, z2))
    eta[index] = (eta1 + eta2) / 2
    return eta1, eta2


def average(run: common.Run, model: SimSiam) -> Iterator:
    """Predict a moving average that starts at random unit vectors. From zeros, epoch 1 would predict z itself."""
    c, eta = run.config, F.normalize(torch.randn(len(run.data.train), model.dim), dim=1).to(run.device)  # (M, d)
    for index, views in run.batches(views=2, scale=(c.crop_min_scale, 1.0)):
        x1, x2 = (augment(x, c) for x in views)
        z1, z2 = model.embed(x1), model.embed(x2)
        eta1, eta2 = moving_average(eta, index, z1, z2)
        yield negative_cosine(z1, eta2) / 2 + negative_cosine(z2, eta1) / 2, z1, x1, x2


def twice(run: common.Run, model: SimSiam) -> Iterator:
    """With four views, the first predicts the second, and the third predicts the fourth."""
    for _, views in run.batches(views=4, scale=(run.config.crop_min_scale, 1.0)):
        x1, x2, x3, x4 = (augment(x, run.config) for x in views)
        (p1, _, z1, z2), (p3, _, _, z4) = model(x1, x2), model(x3, x4)
        yield negative_cosine(p1, z2) / 2 + negative_cosine(p3, z4) / 2, z1, x1, x2, x3, x4


def steps_ahead(config: Config, k: int) -> dict[str, Any]:
    return train(config, partial(ahead, k=k), f"targets for {k or 'all'} steps, made before the first of them")


def plain(config: Config, **given: Any) -> dict[str, Any]:
    return simsiam.train(dataclasses.replace(config, **given))


def averaged(config: Config) -> dict[str, Any]:
    config = dataclasses.replace(config, predictor="none")
    return train(config, average, f"the targets are a moving average, m = {M}; no predictor")


ROWS = {
    "simsiam": (plain, "68.1"),
    "k = 10": (partial(steps_ahead, k=10), "68.7"),
    "k = 100": (partial(steps_ahead, k=100), "68.9"),
    "k = an epoch": (partial(steps_ahead, k=0), "67.0"),
    "no predictor": (partial(plain, predictor="none"), "0.1"),
    "average": (averaged, "55.0"),
    "one direction": (partial(plain, symmetric=False), "64.8"),
    "twice the pairs": (partial(train, losses=twice, note="two pairs of views of each image"), "67.3"),
}
UNUSED = ("stop_gradient", "predictor", "similarity", "symmetric")
COLUMNS = {"kNN of h": "knn_top1", "loss": "loss", "std": "feature_std", "rank": "effective_rank", "s": "seconds"}


if __name__ == "__main__":
    with common.exit_status():
        compare(parser(__doc__, "simsiam_section5"), Config, ROWS, COLUMNS, UNUSED)
