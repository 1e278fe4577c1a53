"""SimCLR's figure 5: which augmentations, alone or in pairs, make a task from which a network learns useful features?

    python benchmarks/augmentations.py                             the whole matrix of seven augmentations: 49 demos
    python benchmarks/augmentations.py --ops crop color            four runs: each alone, and both in each order
    python benchmarks/augmentations.py --data /my/photos --backbone resnet18    any flag of simclr.py

Chen et al., ICML 2020, https://arxiv.org/abs/2002.05709, section 3.1. Both views of an image are the same random crop.
The cell's operations augment one of them further; the other stays as it is. A cell shows linear top-1 of the frozen h.
Its row names the first operation and its column the second; a cell on the diagonal has only one. The paper finds that
no operation suffices alone, and that crop with colour stands out. It gives no strengths for cutout, noise and rotation.
Ours are a square of half the side, sigma up to 0.1, and quarter turns (figure 4).
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import simclr
from benchmarks import table
from benchmarks.probes import gaussian_noise, rotate, sobel
from images import color_jitter, crop_boxes, crop_resize, ensure, gaussian_blur, grey, normalize, sometimes
from simclr import Config


def crop(x: Tensor, config: Config) -> Tensor:
    """Crop the crop x again at random."""
    sizes = torch.tensor(x.shape[2:]).expand(len(x), 2)
    return crop_resize(x, crop_boxes(sizes, config.image_size, (config.crop_min_scale, 1.0)), config.image_size)


def cutout(x: Tensor, centre: Tensor, side: float = 0.5) -> Tensor:
    """Black out a square around `centre` (N, 2), in [0, 1]: `side` times the picture's side, cut off at the borders."""
    inside = []
    for axis, n in enumerate(x.shape[2:]):
        start = (centre[:, axis] * n).floor() - round(n * side) // 2
        here = torch.arange(n)
        inside.append((here >= start[:, None]) & (here < start[:, None] + round(n * side)))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x * ~hole.to(x.device)


def color(x: Tensor, config: Config) -> Tensor:
    """Jitter the colours, then sometimes drop them (appendix A)."""
    s = config.jitter_strength
    return sometimes(sometimes(x, 0.8, color_jitter, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s), 0.2, grey)


OPS = {  # each takes x (N, 3, S, S) in [0, 1], draws anew for every image, and may change x in place
    "crop": crop,
    "cutout": lambda x, _: cutout(x, torch.rand(len(x), 2)),
    "color": color,
    "sobel": lambda x, _: sobel(x).contiguous(),  # a copy, so that x may be changed in place
    "noise": lambda x, _: gaussian_noise(x, torch.empty(len(x), 1, 1, 1).uniform_(0, 0.1).to(x.device)),
    "blur": lambda x, _: sometimes(x, 0.5, gaussian_blur),  # appendix A
    "rotate": lambda x, _: rotate(x, torch.randint(4, (len(x),))),
}


def one_branch(x: Tensor, ops: list[str], config: Config) -> tuple[Tensor, Tensor]:
    """Return t(x) and x, both normalised. x: the shared crop (N, 3, S, S) in [0, 1]; t: the operations in order."""
    t = x.clone()
    for op in ops:
        t = OPS[op](t, config)
    return normalize(t), normalize(x)


def train(config: Config, ops: list[str]) -> dict[str, Any]:
    """Train as `simclr.train`, on the views of `one_branch`; return the figures, and linear top-1 of the frozen h."""
    run = common.Run(config)
    ensure(run.data.labelled, f"--data {run.data.name}: has no held-out images with labels; give a set that does")
    model = simclr.SimCLR(config).to(run.device, memory_format=torch.channels_last)
    lr, weights = config.lr * config.batch_size / 256, common.parameter_groups(model, config.weight_decay)
    optimizer = (common.LARS if config.optimizer == "lars" else torch.optim.SGD)(weights, lr=lr, momentum=0.9)
    loss_of = run.loss(simclr.nt_xent)

    def losses(network: nn.Module) -> Iterator:
        for _, (x,) in run.batches(views=1, scale=(config.crop_min_scale, 1.0)):
            x1, x2 = one_branch(x, ops, config)
            z1, z2 = network(x1, x2)
            yield loss_of(z1, z2, config.temperature), z1, x1, x2

    found = table.learn(run, model, optimizer, lr, losses, f"one crop; one view gets {', then '.join(ops)}")
    return found | table.linear(found["out"])


def main(argv: list[str] | None = None) -> str:
    """Run the cells that the command line asks for; print and return the matrix."""
    flags = table.parser(__doc__, "augmentations")
    flags.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="what to combine (default: all seven)")
    args, rest = flags.parse_known_args(argv)
    base, lines, means = table.base_config(Config, rest, ("blur", "lr_scaling")), [], []
    for first in args.ops:
        cells = [[first] if first == second else [first, second] for second in args.ops]
        line = []
        means.append([])
        for ops in cells:
            name, found = ", ".join(ops), []
            for seed in args.seeds:
                config = dataclasses.replace(base, seed=seed, out=f"{args.out}/{'-'.join(ops)}-seed-{seed}")
                found.append(table.run(f"{name}, seed {seed}", lambda c=config, ops=ops: train(c, ops))["linear_top1"])
            line.append(table.over_seeds(found))
            means[-1].append(sum(found) / len(found))
        lines.append([first, *line])
    matrix = table.markdown(["first, then", *args.ops], lines)
    print(f"\npython simclr.py {' '.join(rest)}, one view augmented, seeds {', '.join(map(str, args.seeds))}\n")
    print(matrix)
    draw(means, args.ops, Path(args.out) / "augmentations.png")
    return matrix


def draw(means: list[list[float]], ops: list[str], path: Path) -> None:
    """The matrix as a heat map: rows are the first operation, columns the second."""

    def heat_map(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(means, cmap="viridis")
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for i, row in enumerate(means):
            for j, value in enumerate(row):
                ink = "white" if value < middle else "black"
                axes.text(j, i, f"{100 * value:.1f}", ha="center", va="center", color=ink)
        axes.set(xticks=range(len(ops)), yticks=range(len(ops)), xticklabels=ops, yticklabels=ops)
        axes.set(xlabel="second", ylabel="first", title="linear top-1 of h, %")
        figure.colorbar(image, shrink=0.8)

    table.figure(1.5 + 0.75 * len(ops), 1 + 0.65 * len(ops), path, heat_map)


if __name__ == "__main__":
    with common.exit_status():
        main()
