"""BYOL and SimSiam: the predictor's eigenspace aligns with that of the correlation matrix of its input.

    python benchmarks/eigenspaces.py                                        both, by their demos' recipes
    python benchmarks/eigenspaces.py --methods byol --predictors linear --seeds 0 1 2 --epochs 5     any flag of both

Tian, Chen, Ganguli, ICML 2021, https://arxiv.org/abs/2102.06810. With f the predictor's input and F = E[f f^T], they
prove of a linear network with a symmetric linear predictor W_p that W_p and F come to commute, and measure of real
networks how near the eigenvectors v_j of F are to eigenvectors of W_p:

    cos(v_j, W_p v_j), 1 if v_j is one, about 1/sqrt(d) in size if W_p is random

Here that is cos(v_j, E[p f^T] v_j), with p the predictor's output: of a linear predictor the same, since then
E[p f^T] v_j = W_p F v_j, and of the papers' mlp its linear part. F and E[p f^T] are moving means over some ten steps.
Prints the mean cosine over the v_j that hold 99% of the trace of F, and how many they are; draws the cosines of the
first seed: eigenvectors from the largest eigenvalue on are rows, steps are columns, a line tells how many hold 99%.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import byol
import common
import simsiam
from benchmarks import table

METHODS = {"byol": byol, "simsiam": simsiam}
UNUSED = ("predictor", "symmetric", "stop_gradient", "similarity")
POINTS, SHOWN = 60, 64  # steps that are looked at, and eigenvectors in the picture


def cosines(correlation: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """cos(v_j, C v_j) of the eigenvectors of F (d, d), C = E[p f^T], and their eigenvalues, the largest first: (d,)."""
    values, vectors = torch.linalg.eigh(correlation.double())
    values, vectors = values.flip(0), vectors.flip(1)
    moved = cross.double() @ vectors
    return (vectors * moved).sum(0) / moved.norm(dim=0).clamp(min=1e-30), values


def aligned(cosine: Tensor, values: Tensor) -> tuple[float, int]:
    """The mean cosine of the eigenvectors that hold 99% of the trace, and how many they are."""
    count = int((values.cumsum(0) < 0.99 * values.sum()).sum()) + 1
    return float(cosine[:count].mean()), count


def byol_step(config: byol.Config, network: nn.Module, v1: Tensor, v2: Tensor) -> tuple[Tensor, ...]:
    """The loss of byol.py, q(z) of the first view, and the views."""
    v1 = byol.augment(v1, config, config.blur_1, config.solarize_1)
    v2 = byol.augment(v2, config, config.blur_2, config.solarize_2)
    (q1, z2), (q2, z1) = network(v1, v2), network(v2, v1)
    return byol.byol_loss(q1, z2) + byol.byol_loss(q2, z1), q1, v1, v2


def simsiam_step(config: simsiam.Config, network: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
    """The loss of simsiam.py, z of the first view, and the views."""
    x1, x2 = simsiam.augment(x1, config), simsiam.augment(x2, config)
    p1, p2, z1, z2 = network(x1, x2)
    return simsiam.negative_cosine(p1, z2) / 2 + simsiam.negative_cosine(p2, z1) / 2, z1, x1, x2


def traced(method: str, predictor: str, config: Any) -> list[tuple[int, Tensor, Tensor]]:
    """Train, with the method's own predictor or a linear one. At POINTS steps: the step, cosines, F's eigenvalues."""
    run, means, seen, of_byol = common.Run(config), [], [], method == "byol"
    model = byol.BYOL(config) if of_byol else simsiam.SimSiam(config)
    if predictor == "linear":
        model.predictor = nn.Linear(model.dim, model.dim, bias=False)
    model = model.to(run.device, memory_format=torch.channels_last)

    def note(_: nn.Module, inputs: tuple[Tensor], p: Tensor) -> None:
        f, p = inputs[0].detach(), p.detach()
        now = torch.stack([f.T @ f, p.T @ f]) / len(f)
        means[:] = [means[0].lerp(now, 0.05) if means else now]

    model.predictor.register_forward_hook(note)
    lr, decay = config.lr * config.batch_size / 256, config.weight_decay
    if of_byol and config.optimizer == "lars":
        optimizer = common.LARS(common.parameter_groups(model, decay), lr, lr_in_momentum=False)
    elif of_byol:
        optimizer = torch.optim.SGD(common.parameter_groups(model, decay), lr, momentum=0.9)
    else:
        f = {"params": [*model.backbone.parameters(), *model.projector.parameters()]}
        h = {"params": list(model.predictor.parameters()), "constant": config.predictor_lr == "constant"}
        optimizer = torch.optim.SGD([f, h], lr, momentum=0.9, weight_decay=decay)

    def losses(network: nn.Module) -> Iterator:
        for _, views in run.batches(views=2, scale=(config.crop_min_scale, 1.0)):
            yield (byol_step if of_byol else simsiam_step)(config, network, *views)
            if of_byol:
                model.update_target(byol.tau_at(run.step, run.total, config.momentum))
            if run.step % max(1, run.total // POINTS) == 0 or run.step + 1 == run.total:
                seen.append((run.step, *cosines(*means[0].cpu())))

    figures = table.learn(run, model, optimizer, lr, losses, f"{predictor} predictor")
    print(f"{method}, {predictor}, seed {config.seed}: kNN top-1 {table.over_seeds([figures['knn_top1']])}")
    return seen


def draw(runs: dict[str, list], path: Path) -> None:
    """The cosines by step and eigenvector, a panel a method and predictor."""

    def panels(figure: Any) -> None:
        for axes, (title, seen) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
            rows = torch.stack([cosine[:SHOWN] for _, cosine, _ in seen], 1).tolist()
            shown = {"extent": (0, seen[-1][0], len(rows), 0), "aspect": "auto", "interpolation": "nearest"}
            image = axes.imshow(rows, **shown, vmin=-1, vmax=1, cmap="RdBu_r")
            axes.plot([step for step, *_ in seen], [aligned(c, v)[1] for _, c, v in seen], "k", linewidth=1)
            axes.set(title=title, xlabel="step", ylabel="eigenvector of F", ylim=(len(rows), 0))
        figure.colorbar(image, label="cos(v, W v)")

    table.figure(1 + 4 * len(runs), 3.4, path, panels)


def main(argv: list[str] | None = None) -> str:
    parser = table.parser(__doc__, "eigenspaces")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    kinds = ["own", "linear"]
    parser.add_argument(
        "--predictors", nargs="+", choices=kinds, default=kinds, help="default: the method's, and linear"
    )
    args, rest = parser.parse_known_args(argv)
    lines, first = [], {}
    for method in args.methods:
        base = table.base_config(METHODS[method].Config, rest, UNUSED)
        for predictor in args.predictors:
            outs = [(seed, f"{args.out}/{method}-{predictor}-seed-{seed}") for seed in args.seeds]
            runs = [traced(method, predictor, dataclasses.replace(base, seed=seed, out=out)) for seed, out in outs]
            first[f"{method}, {predictor} predictor"] = runs[0]
            for at in (0, 0.1, 0.25, 0.5, 1):
                points = [seen[round(at * (len(seen) - 1))] for seen in runs]
                found = [aligned(cosine, values) for _, cosine, values in points]
                cells = [table.over_seeds([mean for mean, _ in found], 2)]
                cells += [table.over_seeds([float(count) for _, count in found], 0)]
                lines.append([method, predictor, str(points[0][0] + 1), *cells])
    text = table.markdown(["method", "predictor", "step", "mean cosine", "eigenvectors with 99% of the trace"], lines)
    print(text)
    draw(first, Path(args.out) / "eigenspaces.png")
    return text


if __name__ == "__main__":
    with common.exit_status():
        main()
