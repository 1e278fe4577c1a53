"""What a small set of pictures can teach: SimCLR on N images, from scratch and from the backbone of another run.

    python benchmarks/small_sets.py --data /path/of/cifar10             resnet8, 2,000 steps a run
    python benchmarks/small_sets.py --data /path/of/cifar10 --sizes 200 --steps 20

5,000 of the training images, drawn by a fixed seed, are the pool; a set of N images is the first N of it. One run
trains on the others, "the rest"; the rows "from the rest's backbone" start from its backbone. (For your own photos,
`simclr.py --init imagenet` starts from ImageNet's.) Every run makes about --steps steps, so a smaller set is seen in
more epochs. All rows are judged on all held-out images. Their linear classifier and kNN know only the labels of the
row's N images. Other flags go to every run. The recipe is the preset cifar with resnet8, batches of 128, SGD without a
warm-up, and a tau of 0.2.
"""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import images
import linear_eval
import simclr
from benchmarks import table
from images import Data, ensure

RECIPE = "--preset cifar --backbone resnet8 --batch-size 128 --optimizer sgd --lr 0.4 --temperature 0.2"
RECIPE += " --warmup-epochs 0 --workers 0 --out runs/small"
SET = ("preset", "epochs", "warmup_epochs", "knn_every", "init", "resume")  # set by the experiment
POOL = 5_000


def judge(out: str, data: Data, *flags: str) -> list[str]:
    """Linear top-1 and kNN on the held-out images, of the run in the folder `out`."""
    config, model = common.load_run(out)
    model = model.to(data.train.device, memory_format=torch.channels_last)
    found = linear_eval.evaluate(linear_eval.parse([out, *flags]), config, model, data)
    return [f"{found['linear_top1']:.3f}", f"{found['knn_top1']:.3f}"]


def rows_of(base: simclr.Config, data: Data, steps: int, start: str = "") -> tuple[list[list[str]], str]:
    """The table's rows of one set, and the folder of its run from scratch. With `start`, the folder of another run,
    there are also rows of that run's backbone as it is and trained further."""
    name, epochs = f"{len(data.train):,}", -(-steps // (len(data.train) // base.batch_size))
    runs = [("from scratch", base.init, epochs)]
    if start:
        init = f"{start}/backbone.pt"
        runs += [("the rest's backbone as it is", init, 0), ("from the rest's backbone", init, epochs)]
    rows, folders = [], []
    for what, init, length in runs:
        print(f"\n=== {name} images, {what}", flush=True)
        config = dataclasses.replace(base, init=init, epochs=length, knn_every=max(length, 1))
        folders.append(simclr.train(config, data)["out"])
        rows.append([name, what, str(length or ""), *judge(folders[-1], data)])
    rows.append([name, "raw pixels", "", *judge(folders[0], data, "--features", "pixels")])
    return rows, folders[0]


def main(argv: list[str] | None = None) -> str:
    flags = table.parser(__doc__)
    flags.add_argument("--data", default="cifar10", help="a folder with train/ and test/, or cifar10 (default cifar10)")
    flags.add_argument("--sizes", type=int, nargs="+", default=[700, 5_000], help="sizes N (default 700 5000)")
    flags.add_argument("--steps", type=int, default=2_000, help="steps of each run (default 2000)")
    args, rest = flags.parse_known_args(argv)
    table.refuse(rest, SET)
    base = common.parse_args(simclr.Config, [*RECIPE.split(), "--data", args.data, *rest])
    low, high = base.batch_size, POOL
    ensure(all(low <= size <= high for size in args.sizes), f"--sizes: give {low} (the batch size) to {high}")

    data = images.load(base, common.pick_device(base.device))
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    words = f"--data {args.data}: give a set with labels and {2 * POOL:,} training images or more"
    ensure(data.labelled and len(order) >= 2 * POOL, words)
    take = lambda rows: Data(data.name, data.train.at(rows), data.test, data.classes)  # noqa: E731
    lines, start = rows_of(base, take(order[POOL:]), args.steps)
    for size in args.sizes:
        lines += rows_of(base, take(order[:size]), args.steps, start)[0]
    said = table.markdown(["images", "SimCLR", "epochs", "linear on h", "kNN of h"], lines)
    print(f"\n{table.machine(base.device)}\n\n{said}")
    return said


if __name__ == "__main__":
    with common.exit_status():
        main()
