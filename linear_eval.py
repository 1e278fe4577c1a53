"""What a frozen backbone is worth: a linear classifier and weighted kNN on its features.

    python linear_eval.py runs/simclr                            linear top-1 and top-5, kNN, on the run's own data
    python linear_eval.py runs/simclr --label-fraction 0.01      with the labels of 1% of the training images
    python linear_eval.py runs/simclr --features z               on z = g(h) instead of h
    python linear_eval.py runs/simclr --data /other/photos       on another data set (transfer)

The backbone stays frozen, its BN in eval mode. Every image passes it once, as a central view; a linear classifier is
then fitted to the cached features to convergence (L-BFGS), so there is no learning rate, and no choice of an epoch
on the test images. The reported figures are those of the held-out images, after the fit.
"""

import argparse
import importlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import InputError, RunConfig

MODELS = {"simclr": "SimCLR", "moco": "MoCo", "supcon": "SupCon"}  # method file -> its model


def load_run(folder: str) -> tuple[RunConfig, nn.Module]:
    """The config and the trained model of a run's folder. Raises `InputError` for anything that is not one."""
    path = Path(folder) / "checkpoint.pt"
    state = common.load_checkpoint(path)
    method = importlib.import_module(state["method"]) if state["method"] in MODELS else None
    if method is None:
        raise InputError(f"{path}: unknown method {state['method']}")
    known = common.flags(method.Config)
    try:
        config = method.Config(**{k: v for k, v in state["config"].items() if k in known})
        model = getattr(method, MODELS[state["method"]])(config)
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError):
        raise InputError(f"{path} is not a whole checkpoint of {state['method']}; train again") from None
    return config, model


def pick_labels(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of `fraction` of the labelled images, the same share of every class and at least one, by a seed."""
    rng = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        if label >= 0:
            mine = (labels == label).nonzero().squeeze(1)
            count = max(1, round(len(mine) * fraction))
            chosen.append(mine[torch.randperm(len(mine), generator=rng)[:count]])
    return torch.cat(chosen).sort().values


def fit_linear(x: Tensor, y: Tensor, classes: int, l2: float = 1e-3, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: minimise mean cross-entropy + l2/2 |W|^2 by L-BFGS from zero.

    x: (N, d), y: (N,) in 0..classes-1. Returns W (d, classes) and b (classes,). Convex, so the result is unique.
    """
    w = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    b = torch.zeros(classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([w, b], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ w + b, y) + l2 / 2 * w.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return w.detach(), b.detach()


def evaluate(train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor, classes: int, l2: float) -> dict:
    """Linear top-1 and top-5 and kNN top-1 on features (N, d) and (M, d), each a fraction of the M test images."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)  # of the training features
    w, b = fit_linear((train - mean) / std, train_labels, classes, l2)
    ranked = ((test - mean) / std @ w + b).topk(min(5, classes), dim=1).indices  # (M, 5)
    hit = ranked == labels[:, None]
    return {
        "linear_top1": hit[:, 0].float().mean().item(),
        "linear_top5": hit.any(1).float().mean().item(),
        "knn_top1": common.knn_accuracy(train, train_labels, test, labels),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="a run's folder, such as runs/simclr")
    parser.add_argument("--data", help="another data set: a name or a folder (default: the run's own)")
    parser.add_argument("--data-dir", help="where downloads are kept (default: the run's own)")
    parser.add_argument("--features", choices=("h", "z"), default="h", help="h = backbone, z = g(h) (default h)")
    parser.add_argument("--label-fraction", type=float, default=1.0, help="share of the training labels (default 1)")
    parser.add_argument("--l2", type=float, default=1e-3, help="weight penalty of the classifier (default 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="which labels --label-fraction takes (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--untrained", action="store_true", help="the same network before training, as a control")
    args = parser.parse_args(argv)
    if not 0 < args.label_fraction <= 1:
        raise InputError(f"--label-fraction {args.label_fraction}: must be > 0 and at most 1")
    if not (math.isfinite(args.l2) and args.l2 >= 0):
        raise InputError(f"--l2 {args.l2}: must be >= 0")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the evaluation that the command line asks for; prints a table and returns its figures."""
    args = parse(argv)
    config, model = load_run(args.run)
    if args.untrained:
        torch.manual_seed(config.seed)
        model = type(model)(config)
    given = {k: v for k, v in (("data", args.data), ("data_dir", args.data_dir)) if v is not None}
    config = type(config)(**(asdict(config) | given | {"device": args.device}))
    device = common.pick_device(config)
    data = common.load_data(config, device)
    if not data.labelled():
        raise InputError(f"--data {config.data}: no class sub-folders with held-out images; give a set with labels")
    model = model.to(device, memory_format=torch.channels_last).eval()
    network = model.backbone if args.features == "h" else model

    chosen = pick_labels(data.train.labels, args.label_fraction, args.seed)
    train = common.embed(network, data.train, config, chosen)
    test = common.embed(network, data.test, config)
    train_labels, labels = data.train.labels[chosen].to(device), data.test.labels.to(device)
    result = evaluate(train, train_labels, test, labels, len(data.classes), args.l2)

    name = "untrained" if args.untrained else "trained"
    print(f"{config.METHOD}, {name} {config.backbone}, features {args.features} ({train.shape[1]}-d), frozen")
    print(f"{data.describe()}; {len(chosen):,} labels used")
    print(f"  linear top-1  {result['linear_top1']:.4f}")
    if len(data.classes) > 5:
        print(f"  linear top-5  {result['linear_top5']:.4f}")
    print(f"  kNN top-1     {result['knn_top1']:.4f}")
    return result


if __name__ == "__main__":
    with common.exit_status():
        main()
