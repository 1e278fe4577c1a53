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

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import byol
import common
import simsiam
from benchmarks import table

METHODS = {"byol": (byol, byol.BYOL), "simsiam": (simsiam, simsiam.SimSiam)}
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


def traced(method: str, predictor: str, config: Any) -> list[tuple[int, Tensor, Tensor]]:
    """Train, with the method's own predictor or a linear one. At POINTS steps: the step, cosines, F's eigenvalues."""
    script, model = METHODS[method]
    means, seen, log = [], [], common.Run.log

    def note(_: nn.Module, inputs: tuple[Tensor], p: Tensor) -> None:
        f, p = inputs[0].detach().float(), p.detach().float()
        now = torch.stack([f.T @ f, p.T @ f]) / len(f)
        means[:] = [means[0].lerp(now, 0.05) if means else now]

    def watched(config: Any) -> nn.Module:
        result = model(config)
        if predictor == "linear":
            result.predictor = nn.Linear(result.dim, result.dim, bias=False)
        result.predictor.register_forward_hook(note)
        return result

    def look(run: common.Run, *args: Tensor) -> None:
        if run.step % max(1, run.total // POINTS) == 0 or run.step + 1 == run.total:
            seen.append((run.step, *cosines(*means[0].cpu())))
        log(run, *args)

    with mock.patch.object(script, model.__name__, watched), mock.patch.object(common.Run, "log", look):
        metrics = script.train(config)
    print(f"{method}, {predictor}, seed {config.seed}: kNN top-1 {table.over_seeds([metrics['knn_top1']])}")
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
        base = table.base_config(METHODS[method][0].Config, rest, ("predictor",))
        for predictor in args.predictors:
            outs = [(seed, f"{args.out}/{method}-{predictor}-seed-{seed}") for seed in args.seeds]
            runs = [traced(method, predictor, table.changed(base, seed=seed, out=out)) for seed, out in outs]
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
