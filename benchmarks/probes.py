"""What h keeps and g(h) loses. An MLP is asked, from the features of a picture, what was done to it.

    python linear_eval.py runs/simclr --probe all                h and g(h) on all four questions
    python linear_eval.py runs/simclr --probe rotation --features z

Chen et al., ICML 2020, https://arxiv.org/abs/2002.05709, section 4.2, table 3.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import images
from common import RunConfig
from images import Data, Images, ensure

PROBES = {  # probe -> what is told apart, the share of each kind, and the paper's chance, h and g(h)
    "grayscale": ("colour against grey", (0.8, 0.2), (80.0, 99.3, 97.4)),  # grey as often as the augmentation makes it
    "rotation": ("0, 90, 180, 270 degrees", (0.25,) * 4, (25.0, 67.6, 25.6)),
    "corrupted": ("original against noise", (0.5, 0.5), (50.0, 99.5, 59.6)),
    "sobel": ("original against Sobel", (0.5, 0.5), (50.0, 96.6, 56.3)),
}
PROBE_IMAGES = 10_000  # of each split, at most


def fit_mlp(x: Tensor, y: Tensor, classes: int, width: int, seed: int, epochs: int = 20) -> nn.Module:
    """A classifier of x (N, d) with one hidden layer: SimCLR's probes are MLPs, of a size it does not give."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, classes)).to(x.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    steps = epochs * -(-len(x) // 128)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
            decay.step()
    with torch.no_grad():
        common.warn_of_guess(F.cross_entropy(network(x), y).item(), classes)
    return network


def gaussian_noise(x: Tensor, sigma: float | Tensor = 0.1) -> Tensor:
    """Add normal noise of deviation `sigma`, a number or (N, 1, 1, 1), clamped to [0, 1]. SimCLR gives no strength."""
    return (x + sigma * torch.randn(x.shape).to(x.device)).clamp_(0, 1)


def sobel(x: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient of the grey picture, in three equal channels, clamped to 1."""
    edge = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device)
    both = F.conv2d(F.pad(images.luma(x), (1, 1, 1, 1), mode="reflect"), torch.stack([edge, edge.T])[:, None])
    return both.norm(dim=1, keepdim=True).clamp_(max=1).expand_as(x)


def alter(x: Tensor, probe: str, kind: Tensor) -> Tensor:
    """The pictures x (N, 3, H, W) in [0, 1], those whose `kind` (N,) is not 0 altered: what the probe has to tell."""
    if probe == "rotation":
        return images.rotate(x, kind)
    op = {"grayscale": images.grey, "corrupted": gaussian_noise, "sobel": sobel}[probe]
    return images.where(x, kind == 1, op)


@torch.no_grad()
def embed_altered(network: Callable, split: Images, config: RunConfig, probe: str, seed: int) -> tuple[Tensor, Tensor]:
    """Features of altered central views of up to PROBE_IMAGES images, and which kind each is, (N,)."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for the noise
    common.draw_apart()
    index = torch.randperm(len(split), generator=rng)[:PROBE_IMAGES]
    ends = torch.tensor(PROBES[probe][1]).cumsum(0)[:-1]  # exact shares, so that chance is what the table says
    kind = torch.searchsorted(ends, torch.randperm(len(index), generator=rng) / len(index), right=True)
    return common.embed(network, split, config, index, lambda x, rows: alter(x, probe, kind[rows])), kind


def run_probes(
    networks: dict[str, Callable], data: Data, config: RunConfig, probes: list[str], width: int, seed: int
) -> dict[str, dict[str, float]]:
    """Held-out accuracy of an MLP of this `width` that tells from the features of each network which kind of picture it
    was; and of always guessing the most frequent."""
    result = {}
    for probe in probes:
        for name, network in networks.items():
            known, kind = embed_altered(network, data.train, config, probe, seed)
            asked, truth = embed_altered(network, data.test, config, probe, seed + 1)
            mean, std = known.mean(0), known.std(0).clamp(min=1e-6)
            mlp = fit_mlp((known - mean) / std, kind.to(mean.device), len(PROBES[probe][1]), width, seed)
            with torch.no_grad():
                guess = mlp((asked - mean) / std).argmax(1).cpu()
            row = result.setdefault(probe, {"chance": (truth.bincount().max() / len(truth)).item()})
            row[name] = (guess == truth).float().mean().item()
    return result


def kinds_of(args: argparse.Namespace, config: RunConfig, model: nn.Module, data: Data) -> dict[str, Any]:
    """`--probe grayscale` and the like: what h keeps and g(h) loses. Needs held-out images, but no labels."""
    ensure(data.test, f"--data {config.data}: no held-out images; add a test folder, or class sub-folders")
    networks = {"h": model.backbone, "z": model.embed}
    probes = list(PROBES)
    if args.probe != "all":
        probes, asked = [args.probe], args.features or "h"
        networks = {asked: networks[asked]}
    used = [min(PROBE_IMAGES, len(split)) for split in (data.train, data.test)]
    print(f"an MLP is fitted to {used[0]:,} and asked about {used[1]:,}", flush=True)
    if min(used) < 2000:
        print("warning: an MLP needs some 2,000 images of each split before these figures mean something")
    result = run_probes(networks, data, config, probes, model.backbone.feature_dim, args.seed)
    heads = "".join(f"{'g(h)' if name == 'z' else name:>8}" for name in networks)
    print(f"\n  {'':34}{'chance':>8}{heads}     the paper's")
    for probe, row in result.items():
        what, _, paper = PROBES[probe]
        values = "".join(f"{100 * v:8.1f}" for v in row.values())
        print(f"  {probe:10}{what:24}{values}     {' / '.join(f'{v:g}' for v in paper)}")
    print("\nThe paper's networks (ImageNet, ResNet-50, h and g(h) 2048-d) had rotation, noise or Sobel among their")
    print("augmentations in those rows, so that g(h) learned to lose it, as benchmarks/augmentations.py can.")
    return result
