"""BYOL and SimSiam with a linear predictor: its eigenspace aligns with that of the correlation matrix of its input.

    python benchmarks/eigenspaces.py                               both, by their demos' recipes
    python benchmarks/eigenspaces.py --methods byol --seeds 0 1 2 --epochs 5        any flag that both take

Tian, Chen, Ganguli, ICML 2021, https://arxiv.org/abs/2102.06810. With the predictor W_p a matrix, f its input and
F = E[f f^T], the paper proves of a linear network, with a symmetric W_p, that W_p and F come to commute (theorem 3),
and measures, with real networks, how near the eigenvectors v_j of F are to eigenvectors of W_p: 1 if they are,

    cos(v_j, W_p v_j) = v_j . W_p v_j / |W_p v_j|

about 1/sqrt(d) in size for a random W_p. F is a moving mean over the views of some ten steps. Prints the mean of this
cosine over the v_j that hold 99% of the trace of F, and draws the cosines of the first seed: eigenvectors of F from the
largest eigenvalue on are rows, steps are columns, and a line tells how many hold 99%.
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

METHODS = {"byol": (byol, "BYOL"), "simsiam": (simsiam, "SimSiam")}
POINTS, SHOWN = 60, 64  # steps that are looked at, and eigenvectors in the picture


def cosines(correlation: Tensor, predictor: Tensor) -> tuple[Tensor, Tensor]:
    """cos(v_j, W_p v_j) of the eigenvectors of F (d, d), and their eigenvalues, from the largest on: (d,) each."""
    values, vectors = torch.linalg.eigh(correlation.double())
    values, vectors = values.flip(0), vectors.flip(1)
    moved = predictor.double() @ vectors
    return (vectors * moved).sum(0) / moved.norm(dim=0).clamp(min=1e-30), values


def traced(method: str, config: Any) -> list[tuple[int, Tensor, Tensor, float]]:
    """Train; at POINTS steps: the step, the cosines, F's eigenvalues, and |W_p - W_p^T| / |W_p + W_p^T|."""
    script, name = METHODS[method]
    seen, log = [], common.Run.log

    class Linear(getattr(script, name)):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.predictor = nn.Linear(self.dim, self.dim, bias=False)
            self.register_buffer("correlation", torch.zeros(self.dim, self.dim))
            self.predictor.register_forward_pre_hook(self.note)

        def note(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
            f = inputs[0].detach().float()
            self.correlation.lerp_(f.T @ f / len(f), 0.05)

    def look(run: common.Run, *args: Tensor) -> None:
        if run.step % max(1, run.total // POINTS) == 0 or run.step + 1 == run.total:
            w = run.model.predictor.weight.detach().cpu()
            found = cosines(run.model.correlation.cpu(), w)
            seen.append((run.step, *found, float((w - w.T).norm() / (w + w.T).norm())))
        log(run, *args)

    with mock.patch.object(script, name, Linear), mock.patch.object(common.Run, "log", look):
        metrics = script.train(config)
    print(f"{method}, seed {config.seed}: kNN top-1 {table.over_seeds([metrics['knn_top1']])}")
    return seen


def aligned(cosine: Tensor, values: Tensor) -> tuple[float, int]:
    """The mean cosine of the eigenvectors that hold 99% of the trace, and how many they are."""
    count = int((values.cumsum(0) < 0.99 * values.sum()).sum()) + 1
    return float(cosine[:count].mean()), count


def draw(runs: dict[str, list], path: Path) -> None:
    """The cosines by step and eigenvector, a panel a method."""

    def panels(figure: Any) -> None:
        for axes, (method, seen) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
            rows = torch.stack([cosine[:SHOWN] for _, cosine, *_ in seen], 1).tolist()
            shown = {"extent": (0, seen[-1][0], len(rows), 0), "aspect": "auto", "interpolation": "nearest"}
            image = axes.imshow(rows, **shown, vmin=-1, vmax=1, cmap="RdBu_r")
            axes.plot([step for step, *_ in seen], [aligned(c, v)[1] for _, c, v, _ in seen], "k", linewidth=1)
            axes.set(title=method, xlabel="step", ylabel="eigenvector of F", ylim=(len(rows), 0))
        figure.colorbar(image, label="cos(v, W v)")

    table.figure(1 + 5 * len(runs), 3.6, path, panels)


def main(argv: list[str] | None = None) -> str:
    parser = table.parser(__doc__, "eigenspaces")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    args, rest = parser.parse_known_args(argv)
    lines, first = [], {}
    for method in args.methods:
        base = table.base_config(METHODS[method][0].Config, rest, ("predictor", "predictor_dim"))
        runs = []
        for seed in args.seeds:
            config = table.changed(base, seed=seed, out=f"{args.out}/{method}-seed-{seed}")
            runs.append(traced(method, config))
        first[method] = runs[0]
        for at in (0, 0.1, 0.25, 0.5, 1):
            points = [seen[round(at * (len(seen) - 1))] for seen in runs]
            found = [aligned(cosine, values) for _, cosine, values, _ in points]
            line = [method, str(points[0][0] + 1), table.over_seeds([mean for mean, _ in found], 2)]
            line += [table.over_seeds([float(count) for _, count in found], 0)]
            lines.append([*line, table.over_seeds([asymmetry for *_, asymmetry in points], 2)])
    head = ["method", "step", "mean cosine", "eigenvectors with 99% of the trace", "asymmetry of W"]
    text = table.markdown(head, lines)
    print(text)
    draw(first, Path(args.out) / "eigenspaces.png")
    return text


if __name__ == "__main__":
    with common.exit_status():
        main()
