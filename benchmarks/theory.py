"""What does InfoNCE estimate, and which negatives does a loss push away? Three tables, and a picture of each.

    python benchmarks/theory.py mutual-information             log K - L beside the true information, on Gaussians
    python benchmarks/theory.py density-ratio                  a critic's scores beside the log density ratio
    python benchmarks/theory.py weights runs/pairwise          alpha_ij of each loss of pairwise.py, in a trained run

Van den Oord, Li, Vinyals 2018, https://arxiv.org/abs/1807.03748, section 2.3: one candidate y belongs to x, and K - 1
others do not. The best critic s(x, y) is log p(y|x) / p(y), up to a function of x, and

    I(x; y) >= log K - L,       L = E[ -log( exp s(x, y) / sum over the K of exp s(x, y_j) ) ]

Here x and y are Gaussian, with the correlation rho in each of D dimensions. Then I = -D/2 log(1 - rho^2) nats, and the
density ratio is known. The best critic of NCE (Gutmann, Hyvarinen 2010) has no free function of x.
Tian 2022, arXiv:2201.12680: a loss of the family pushes on d_ij- with the weight alpha_ij = phi'(...) psi'(...).
Each command prints a table and writes a picture to --out.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import images
import pairwise
from benchmarks.table import figure, markdown, over_seeds, parser

BATCH, HELD_OUT = 1024, 65_536  # pairs in a training step, and pairs in an estimate


def correlated(n: int, dim: int, rho: float) -> tuple[Tensor, Tensor]:
    """n pairs x, y (n, D) of standard normal numbers, correlated by rho."""
    x, noise = torch.randn(2, n, dim)
    return x, rho * x + math.sqrt(1 - rho * rho) * noise


def rho_of(information: float, dim: int) -> float:
    """The correlation with which D dimensions share `information` nats."""
    return math.sqrt(1 - math.exp(-2 * information / dim))


def log_ratio(x: Tensor, y: Tensor, rho: float) -> Tensor:
    """log p(y|x) / p(y), summed over the last dimension."""
    square = rho * rho * (x * x + y * y) - 2 * rho * x * y
    return (-square / (2 - 2 * rho * rho) - math.log(1 - rho * rho) / 2).sum(-1)


class Critic(nn.Module):
    """s(x, y) = u(x) . v(y): from x (..., A, D) and y (..., B, D) to (..., A, B)."""

    def __init__(self, dim: int, width: int = 128, embedding: int = 64):
        super().__init__()
        u, v = (
            nn.Sequential(
                nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embedding)
            )
            for _ in range(2)
        )
        self.u, self.v = u, v

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.u(x) @ self.v(y).mT


def split_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Split scores (G, K, K) of groups of K pairs: the pairs' (G K, 1), and the others' (G K, K), -inf at the pair."""
    own = torch.eye(scores.shape[1], dtype=torch.bool)
    return scores.diagonal(dim1=1, dim2=2).reshape(-1, 1), scores.masked_fill(own, -math.inf).flatten(0, 1)


def info_nce(scores: Tensor) -> Tensor:
    """L of the scores (G, K, K): InfoNCE of pairwise.py, with -s as the distance."""
    own, others = split_scores(scores)
    return pairwise.info_nce(-own, -others, 1.0)


def nce(scores: Tensor) -> Tensor:
    own, others = split_scores(scores)
    return pairwise.nce(1 - own, 1 - others, 1.0)


def train(dim: int, rho: float, k: int, steps: int, loss: Any = info_nce, look: Any = None) -> Critic:
    """Train a critic with K = k candidates; `look(step, critic)` is called before each step."""
    critic = Critic(dim)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    for step in range(steps):
        if look:
            look(step, critic)
        common.set_lr(optimizer, common.cosine_lr(step, steps, 0, 1e-3))
        x, y = (t.view(-1, k, dim) for t in correlated(BATCH, dim, rho))
        value = loss(critic(x, y))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return critic


@torch.no_grad()
def estimate(scores: Any, dim: int, rho: float, k: int) -> float:
    """log K - L, on new pairs."""
    losses = []
    for _ in range(HELD_OUT // BATCH):
        x, y = (t.view(-1, k, dim) for t in correlated(BATCH, dim, rho))
        losses.append(info_nce(scores(x, y)).item())
    return math.log(k) - sum(losses) / len(losses)


def mutual_information(args: argparse.Namespace) -> str:
    """Estimates of I(x; y) for each K, by trained critics and by the best critic."""
    lines, curves, ks = [], {}, (2, 4, 16, 64, 256, 1024)
    for truth in (2.0, 4.0, 8.0):
        rho = rho_of(truth, args.dim)
        best = lambda x, y, rho=rho: log_ratio(x[..., :, None, :], y[..., None, :, :], rho)  # noqa: E731
        for k in ks:
            found, ideal = [], []
            for seed in args.seeds:
                torch.manual_seed(seed)
                found.append(estimate(train(args.dim, rho, k, args.steps), args.dim, rho, k))
                ideal.append(estimate(best, args.dim, rho, k))
            curves.setdefault(truth, []).append((sum(found) / len(found), sum(ideal) / len(ideal)))
            lines.append([f"{truth:g}", str(k), f"{math.log(k):.2f}", over_seeds(found, 2), over_seeds(ideal, 2)])
            print(" | ".join(lines[-1]), file=sys.stderr, flush=True)

    def draw(sheet: Any) -> None:
        axes = sheet.subplots()
        axes.plot(ks, [math.log(k) for k in ks], "k:", label="log K, the most it can be")
        for i, (truth, points) in enumerate(curves.items()):
            trained, ideal = zip(*points, strict=True)
            axes.axhline(truth, color=f"C{i}", linewidth=0.8, linestyle="--")
            axes.plot(ks, trained, f"C{i}o-", label=f"trained critic, truth {truth:g} (dashed)")
            axes.plot(ks, ideal, "k+", label=None if i else "the best critic", zorder=3)
        axes.set(xscale="log", xlabel="K", ylabel="log K - L, nats")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)

    figure(6, 4, args.out / "mutual_information.png", draw)
    return markdown(["I(x; y), nats", "K", "log K", "log K - L, trained", "log K - L, best critic"], lines)


def density_ratio(args: argparse.Namespace) -> str:
    """How far a one-dimensional critic is from the log density ratio, by steps, over p(x) p(y) on [-2, 2]."""
    rho, k, grid = 0.8, 64, torch.linspace(-2, 2, 41)[:, None]
    truth = log_ratio(grid[:, None], grid[None], rho)  # (x, y)
    density = (-(grid.square() + grid.square().T) / 2).exp()  # p(x) p(y), the density of what is no pair
    at = [step for step in (0, 30, 100, 300, 1000) if step < args.steps] + [args.steps]
    errors, last = {}, {}
    for name, loss in (("infonce", info_nce), ("nce", nce)):
        for seed in args.seeds:

            @torch.no_grad()
            def look(step, critic, name=name):
                if step in at:
                    difference = critic(grid, grid) - truth
                    if name == "infonce":
                        free = (density * difference).sum(1, keepdim=True) / density.sum(1, keepdim=True)
                        difference = difference - free  # the free function of x
                    mean = (density * difference.square()).sum() / density.sum()
                    errors.setdefault((name, step), []).append(mean.sqrt().item())
                    last[name] = truth + difference

            torch.manual_seed(seed)
            look(args.steps, train(1, rho, k, args.steps, loss, look))
    shown = {"log p(y|x) / p(y)": truth, "InfoNCE's critic, less a function of x": last["infonce"]}
    shown |= {"NCE's critic": last["nce"]}

    def draw(sheet: Any) -> None:
        for axes, (title, values) in zip(sheet.subplots(1, 3), shown.items(), strict=True):
            image = axes.imshow(values.T.tolist(), origin="lower", extent=(-2, 2, -2, 2), vmin=-8, vmax=2)
            axes.contour(values.T.tolist(), levels=[0], extent=(-2, 2, -2, 2), colors="white", linewidths=0.8)
            axes.set(title=title, xlabel="x", ylabel="y")
        sheet.colorbar(image)

    figure(11, 3.4, args.out / "density_ratio.png", draw)
    rows = [[str(step), over_seeds(errors["infonce", step]), over_seeds(errors["nce", step])] for step in at]
    return markdown(["steps", "InfoNCE: RMS error, up to a function of x", "NCE: RMS error"], rows)


def weights(args: argparse.Namespace) -> str:
    """The weight -dL/dd_ij- (in the family alpha_ij) over its mean, by d_i+ - d_ij-, for 256 held-out pictures."""
    config, model = common.load_run(args.run)
    ours = isinstance(config, pairwise.Config) and config.normalize and config.negatives == "batch"
    images.ensure(ours, f"{args.run}: give a run of pairwise.py with z of length 1 and negatives from the batch")
    torch.manual_seed(0)
    data = images.load(config, torch.device("cpu"))
    split, crop = data.test or data.train, (config.image_size, (config.crop_min_scale, 1.0))
    x1, x2 = next(split.views([torch.arange(min(256, len(split)))], [crop] * 2))
    with torch.no_grad():
        z1, z2 = model(pairwise.augment(x1, config), pairwise.augment(x2, config))
    positive, negatives = pairwise.distances(z1, z2)
    there = negatives.isfinite()
    x = (positive - negatives)[there]
    edges = torch.linspace(float(x.min()), float(x.max()), 25)
    middle, bins = (edges[1:] + edges[:-1]) / 2, torch.bucketize(x, edges) - 1
    lines, curves = [], {}
    for name, loss in pairwise.LOSSES.items():
        n = negatives.clone().requires_grad_()
        constants = {constant: getattr(config, constant) for constant in pairwise.CONSTANTS[name]}
        (gradient,) = torch.autograd.grad(loss(positive, n, **constants), n)
        alpha = -gradient[there]
        alpha = alpha / alpha.mean().clamp(min=1e-30)
        curves[name] = [
            alpha[bins == i].mean().item() if (bins == i).sum() > 20 else math.nan for i in range(len(middle))
        ]
        hardest = x >= x.quantile(0.99)
        lines.append([name, f"{alpha[hardest].sum() / alpha.sum():.0%}", f"{(alpha == 0).float().mean():.0%}"])

    def draw(sheet: Any) -> None:
        axes = sheet.subplots()
        share, width = torch.histc(x, len(middle)), 0.8 * float(edges[1] - edges[0])
        axes.bar(middle.tolist(), (share / share.max()).tolist(), width, color="lightgrey", label="number of pairs")
        for i, (name, curve) in enumerate(curves.items()):
            style = {"color": f"C{i}" if i < 10 else "black", "linestyle": ("-", "--", ":", "-.")[i % 4]}
            axes.plot(
                middle.tolist(), curve, label=name, linewidth=3.2 - 0.2 * i, **style
            )  # thinner and thinner, since some curves coincide
        axes.set(yscale="log", ylim=(0.01, 100), xlabel="d+ - d-: right is harder", ylabel="weight over its mean")
        sheet.legend(loc="outside right center", fontsize="small")

    figure(9, 4.6, args.out / "weights.png", draw)
    return markdown(["loss", "weight on the hardest 1% of the pairs", "pairs without weight"], lines)


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__)
    add = flags.add_argument
    what = {"mutual-information": mutual_information, "density-ratio": density_ratio, "weights": weights}
    add("what", choices=what)
    add("run", nargs="?", default="runs/pairwise", help="the run's folder, for weights (default runs/pairwise)")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of the critics (default 0); weights takes none")
    add("--steps", type=int, default=1500, help="training steps of a critic (default 1500)")
    add("--dim", type=int, default=10, help="dimensions D for mutual-information (default 10)")
    add("--out", type=Path, default=Path("runs/theory"), help="folder of the pictures (default runs/theory)")
    args = flags.parse_args(argv)
    images.ensure(min(args.steps, args.dim) > 0, "--steps and --dim: give 1 or more")
    table = what[args.what](args)
    print(table)
    return table


if __name__ == "__main__":
    with common.exit_status():
        main()
