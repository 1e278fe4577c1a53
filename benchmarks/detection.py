"""Transfer to detection: is a backbone learned without labels a better start for a detector than random weights?

    python simclr.py && python benchmarks/detection.py                  runs/simclr/backbone.pt against random weights
    python benchmarks/detection.py --init runs/swav/backbone.pt --images 50 --seeds 0 1 2 3 4

Each canvas of 96 x 96 pixels holds one to four of the ten shapes of images.py, which the detector has to find and name.
The detector is torchvision's Faster R-CNN, with its FPN on layer2 and layer3 of `resnet8`. All layers are trained. Both
starts get the same canvases, number of steps and learning rate: 0.001 was the best of 0.0005, 0.001 and 0.004 for both
(400 canvases, 200 steps, a seed that is not among the defaults). torchvision freezes the BN of a pretrained backbone,
and a frozen BN would never fit random weights. So we train BN from both starts, and the FPN has BN too, as in MoCo (He
et al., CVPR 2020, https://arxiv.org/abs/1911.05722, section 4.2). Few steps favour the trained backbone; --steps takes
more. A cell is AP at IoU 0.5 on 300 held-out canvases: the mean over the seeds (lowest to highest). A seed draws the
training canvases, the weights of the new layers and the batches.
"""

import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import box_iou

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmarks import table
from images import SHAPES, ensure

SIDE, HELD_OUT, BATCH = 96, 300, 8
Boxes = dict[str, Tensor]  # one canvas's boxes, labels and scores, as torchvision's detectors use them


def draw_canvases(n: int, seed: int) -> tuple[Tensor, list[Boxes]]:
    """Draw `n` canvases, uint8 (n, 3, SIDE, SIDE); each has boxes (K, 4), x1 y1 x2 y2, and labels (K,), 1 to 10.

    Colours, noise and nuisances are those of `images.make_shapes`. A box bounds the shape's outline. Boxes do not
    overlap: a shape that finds no room in twenty tries is left out.
    """
    rng, names, fine = np.random.default_rng(seed), list(SHAPES), 4  # drawn 4 times finer, for smooth edges
    colours = np.array([[0.2, 0.3, 0.45], [0.85, 0.65, 0.3]])  # of the ground and the shapes, before brightness varies
    pixels, truths = np.empty((n, 3, SIDE, SIDE), np.uint8), []
    for i in range(n):
        canvas = np.ones((SIDE, SIDE, 3)) * colours[0] * rng.uniform(0.9, 1.1)
        boxes, labels = np.empty((0, 4)), []
        for label in rng.integers(len(names), size=rng.integers(1, 5)):
            angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(8, 12)
            turn = radius * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
            outline = np.array(SHAPES[names[label]]) @ turn
            low, high = outline.min(0), outline.max(0)
            for _ in range(20):
                centre = rng.uniform(-low, SIDE - high)
                box = np.concatenate([centre + low, centre + high])
                if ((box[2:] <= boxes[:, :2]) | (boxes[:, 2:] <= box[:2])).any(1).all():
                    break
            else:
                continue
            mask = Image.new("L", (fine * SIDE, fine * SIDE))
            for scale, ink in ((1.0, 255), (0.6, 0)) if names[label] == "ring" else ((1.0, 255),):
                ImageDraw.Draw(mask).polygon((fine * (centre + scale * outline)).flatten().tolist(), fill=ink)
            cover = np.asarray(mask.reduce(fine))[..., None] / 255  # how much of a pixel the shape covers
            canvas += (colours[1] * rng.uniform(0.9, 1.1) - canvas) * cover
            boxes, labels = np.vstack([boxes, box]), [*labels, label + 1]
        canvas += 0.12 * rng.standard_normal(canvas.shape)
        pixels[i] = (canvas.clip(0, 1) * 255).round().transpose(2, 0, 1)
        truths.append({"boxes": torch.from_numpy(boxes).float(), "labels": torch.tensor(labels)})
    return torch.from_numpy(pixels), truths


def average_precision(detections: list[Boxes], truths: list[Boxes], classes: Iterable[int], iou: float = 0.5) -> float:
    """COCO's AP at one IoU: the mean over the `classes` that have a true box; NaN if no class has one.

    For each picture, `detections` holds boxes (D, 4), scores (D,) and labels (D,); `truths` holds boxes (T, 4) and
    labels (T,). Detections come in order of falling score. Each takes the true box that it overlaps most, among the
    boxes of its picture and class that are not taken yet; if their IoU is below `iou`, the detection is false. The
    precision at a recall is the best precision at that recall or above it, and 0 beyond the last. The AP of a class is
    its mean precision over the recalls 0, 0.01, ..., 1.
    """
    result = []
    for c in classes:
        scores, hits, total = [], [], 0
        for found, truth in zip(detections, truths, strict=True):
            mine = found["labels"] == c
            ranked, order = found["scores"][mine].sort(descending=True, stable=True)
            overlap = box_iou(found["boxes"][mine][order], truth["boxes"][truth["labels"] == c])  # (D, T)
            total += overlap.shape[1]
            for row in overlap:
                hits.append(bool((row >= iou).any()))
                if hits[-1]:
                    overlap[:, row.argmax()] = -1  # taken
            scores.append(ranked)
        if total:
            order = torch.cat(scores).argsort(descending=True, stable=True)
            right = torch.tensor(hits, dtype=torch.float64)[order].cumsum(0)  # (all D,)
            precision = right / torch.arange(1, len(right) + 1)
            best = torch.cat([precision.flip(0).cummax(0).values.flip(0), torch.zeros(1)])  # 0: never reached
            at = torch.searchsorted(right / total, torch.from_numpy(np.linspace(0, 1, 101)))
            result.append(best[at].mean().item())
    return sum(result) / len(result) if result else math.nan


def detector(seed: int, init: str) -> FasterRCNN:
    """Faster R-CNN on resnet8. `init`: a file of weights, or random weights, which depend on the seed alone.

    It takes pictures in [0, 1] and normalises them by torchvision's mean and std, as our networks' inputs are, too.
    """
    torch.manual_seed(seed)
    body, d, hidden = common.build_backbone(common.RunConfig(backbone="resnet8", init=init)), 64, 128
    fpn = BackboneWithFPN(body, {"layer2": "0", "layer3": "1"}, [64, 128], d, norm_layer=nn.BatchNorm2d)
    anchors = AnchorGenerator(((14,), (20,), (28,)), ((0.5, 1.0, 2.0),) * 3)  # one size for each of strides 4, 8, 16
    head = {"box_head": TwoMLPHead(d * 7**2, hidden), "box_predictor": FastRCNNPredictor(hidden, len(SHAPES) + 1)}
    few = {f"rpn_{when}_nms_top_n_{mode}": n for mode in ("train", "test") for when, n in (("pre", 300), ("post", 100))}
    return FasterRCNN(fpn, None, SIDE, SIDE, rpn_anchor_generator=anchors, box_batch_size_per_image=32, **head, **few)


def train(model: FasterRCNN, pixels: Tensor, truths: list[Boxes], seed: int, steps: int, lr: float) -> None:
    """Train by AdamW on `steps` batches of the canvases, uint8 (N, 3, S, S): a tenth is warm-up, then half a cosine."""
    torch.manual_seed(seed)
    epochs = -(-steps * BATCH // len(pixels))
    order = torch.cat([torch.randperm(len(pixels)) for _ in range(epochs)]).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    model.train()
    for step in range(steps):
        common.set_lr(optimizer, common.cosine_lr(step, steps, steps / 10, lr))
        batch = order[step * BATCH : (step + 1) * BATCH]
        losses = model([pixels[i] / 255 for i in batch], [truths[i] for i in batch])  # RPN and head
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: FasterRCNN, pixels: Tensor, truths: list[Boxes]) -> float:
    """AP at IoU 0.5 on the canvases, uint8 (N, 3, S, S)."""
    model.eval()
    found = [boxes for part in pixels.split(50) for boxes in model(list(part / 255))]
    return average_precision(found, truths, range(1, len(SHAPES) + 1))


def main(argv: list[str] | None = None) -> str:
    """Train and judge a detector for each cell and seed; print and return the table."""
    flags = table.parser(__doc__)
    add = flags.add_argument
    add("--init", default="runs/simclr/backbone.pt", help="a run's backbone.pt (default runs/simclr/backbone.pt)")
    add("--images", type=int, nargs="+", default=[100, 400], help="labelled training canvases (default 100 400)")
    add("--steps", type=int, default=300, help=f"training steps, of {BATCH} canvases each (default 300)")
    add("--lr", type=float, default=0.001, help="peak learning rate for both starts (default 0.001)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="run each cell with each of these (default 0 1 2)")
    args = flags.parse_args(argv)
    ensure(min(args.images) >= 1 and args.steps >= 1, "--images, --steps: must be at least 1")
    ensure(min(args.seeds) >= 0 and 0 < args.lr < math.inf, "--seeds must be at least 0, --lr above 0")
    starts, lines = {args.init: args.init, "random weights": "random"}, []
    held_out = draw_canvases(HELD_OUT, 0)
    for n in args.images:
        found = {name: [] for name in starts}
        for seed in args.seeds:
            canvases = draw_canvases(n, seed + 1)  # seed 0 drew the held-out canvases
            for name, init in starts.items():
                started = time.monotonic()
                model = detector(seed, init)
                train(model, *canvases, seed, args.steps, args.lr)
                found[name].append(evaluate(model, *held_out))
                told = f"{found[name][-1]:.3f}, {time.monotonic() - started:.0f} s"
                print(f"{n:,} canvases, seed {seed}, {name}: AP50 {told}", flush=True)
        lines.append([f"{n:,}", *map(table.over_seeds, found.values())])
    shown = table.markdown(["training canvases", *(f"AP50 from {name}" for name in starts)], lines)
    print(f"\n{args.steps} steps, lr {args.lr:g}, seeds {', '.join(map(str, args.seeds))}\n\n{shown}")
    return shown


if __name__ == "__main__":
    with common.exit_status():
        main()
