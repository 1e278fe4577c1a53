"""What does h keep that g(h) loses? An MLP has to tell, from the features of a picture, how the picture was altered.

    python benchmarks/probes.py runs/simclr                 h and g(h) on four questions; needs no labels
    python benchmarks/probes.py runs/simclr --data /my/photos

Chen et al., ICML 2020, https://arxiv.org/abs/2002.05709, section 4.2, table 3. A figure is the percentage of held-out
pictures that the MLP gets right. The paper's networks (ImageNet, ResNet-50, h and g(h) 2048-d) had rotation, noise or
Sobel among their augmentations in the row of that name, so that g(h) learned to lose it; benchmarks/augmentations.py
trains networks with these augmentations.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import images
from benchmarks import table
from common import RunConfig
from images import Images, ensure

PROBES = {  # probe -> (what the MLP tells apart, the share of each kind, the paper's chance, h and g(h))
    "grayscale": ("colour against grey", (0.8, 0.2), (80.0, 99.3, 97.4)),  # the augmentation's share
    "rotation": ("0, 90, 180, 270 degrees", (0.25,) * 4, (25.0, 67.6, 25.6)),
    "corrupted": ("original against noise", (0.5, 0.5), (50.0, 99.5, 59.6)),
    "sobel": ("original against Sobel", (0.5, 0.5), (50.0, 96.6, 56.3)),
}
MOST = 10_000  # the most pictures to take from each split


def fit_mlp(x: Tensor, y: Tensor, classes: int, width: int, seed: int, epochs: int = 20) -> nn.Module:
    """Fit a classifier of x (N, d) with one hidden layer. SimCLR's probes are MLPs; the paper gives no size."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, classes)).to(x.device)
    optimizer, total, step = torch.optim.Adam(network.parameters(), lr=2e-3), epochs * -(-len(x) // 128), 0
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(128):
            common.set_lr(optimizer, common.cosine_lr(step, total, 0, 2e-3))
            optimizer.zero_grad()
            F.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
            step += 1
    return network


def rotate(x: Tensor, quarters: Tensor) -> Tensor:
    """Turn each picture counter-clockwise by `quarters` (N,) times 90 degrees; changes x (N, 3, S, S) in place."""
    for k in (1, 2, 3):
        x = images.where(x, quarters == k, lambda y, k=k: y.rot90(k, (2, 3)))
    return x


def gaussian_noise(x: Tensor, sigma: float | Tensor = 0.1) -> Tensor:
    """Add normal noise of deviation `sigma`, a number or (N, 1, 1, 1); clamp to [0, 1]. SimCLR gives no strength."""
    return (x + sigma * torch.randn(x.shape).to(x.device)).clamp_(0, 1)


def sobel(x: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient of the grey picture, in three equal channels, clamped to 1."""
    edge = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device)
    both = F.conv2d(F.pad(images.luma(x), (1, 1, 1, 1), mode="reflect"), torch.stack([edge, edge.T])[:, None])
    return both.norm(dim=1, keepdim=True).clamp_(max=1).expand_as(x)


def alter(x: Tensor, probe: str, kind: Tensor) -> Tensor:
    """Alter the pictures x (N, 3, H, W), in [0, 1], whose `kind` (N,) is not 0. The probe has to tell the kind."""
    if probe == "rotation":
        return rotate(x, kind)
    op = {"grayscale": images.grey, "corrupted": gaussian_noise, "sobel": sobel}[probe]
    return images.where(x, kind == 1, op)


@torch.no_grad()
def embed_altered(network: Callable, split: Images, config: RunConfig, probe: str, seed: int) -> tuple[Tensor, Tensor]:
    """Features (M, d) of the altered central views of up to MOST images, and the kind of each image, (M,)."""
    torch.manual_seed(seed)
    index = torch.randperm(len(split))[:MOST]
    ends = torch.tensor(PROBES[probe][1]).cumsum(0)[:-1]  # exact shares, so that chance is what the table says
    kind = torch.searchsorted(ends, torch.randperm(len(index)) / len(index), right=True)
    views = split.views(index.split(256), [(config.image_size, None)], workers=config.workers)
    altered = (alter(x, probe, part) for (x,), part in zip(views, kind.split(256), strict=True))
    return torch.cat([network(images.normalize(x)).float() for x in altered]), kind.to(split.device)


def accuracy(network: Callable, data: images.Data, config: RunConfig, probe: str, width: int, seed: int) -> float:
    """The accuracy of an MLP, `width` wide, that tells from features how held-out pictures were altered."""
    known, kind = embed_altered(network, data.train, config, probe, seed)
    asked, truth = embed_altered(network, data.test, config, probe, seed + 1)
    mean, std = known.mean(0), known.std(0).clamp(min=1e-6)
    mlp = fit_mlp((known - mean) / std, kind, len(PROBES[probe][1]), width, seed)
    with torch.no_grad():
        return (mlp((asked - mean) / std).argmax(1) == truth).float().mean().item()


def main(argv: list[str] | None = None) -> str:
    """Ask the four questions about a run; print and return the table."""
    parser = table.parser(__doc__)
    parser.add_argument("run", help="a run's folder, such as runs/simclr")
    parser.add_argument("--data", help="another data set: a name or a folder (default: the run's own)")
    parser.add_argument("--device", default="auto", help="any torch device; auto is cuda if there is a GPU, else cpu")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures, of the alterations and of the MLPs")
    args = parser.parse_args(argv)
    config, model = common.load_run(args.run)
    ensure(isinstance(config, RunConfig), f"{args.run}: this run has no pictures; give the run of another method")
    config.data = args.data or config.data
    device = common.pick_device(args.device)
    data, model = images.load(config, device), model.to(device)
    ensure(data.test, f"--data {config.data}: no held-out images; give a set with a test/, or with class sub-folders")
    used = [min(MOST, len(split)) for split in (data.train, data.test)]
    print(f"{data.describe()}\nan MLP is fitted to {used[0]:,} pictures and asked about {used[1]:,}", flush=True)
    if min(used) < 2000:
        print("warning: these figures mean little with fewer than about 2,000 images in each split")
    rows, width = [], model.backbone.feature_dim
    for probe, (what, shares, paper) in PROBES.items():
        found = [accuracy(f, data, config, probe, width, args.seed) for f in (model.backbone, model.embed)]
        percent = [f"{100 * value:.1f}" for value in (max(shares), *found)]
        rows.append([probe, what, *percent, " / ".join(f"{value:g}" for value in paper)])
    result = table.markdown(["", "told apart", "chance", "h", "g(h)", "the paper's"], rows)
    print(f"\n{result}")
    return result


if __name__ == "__main__":
    with common.exit_status():
        main()
