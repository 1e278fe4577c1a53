"""The papers' ablations in short runs on the built-in data. Each row is the demo at 16 pixels with some flags changed.

    python benchmarks/ablations.py                     every table
    python benchmarks/ablations.py moco                the tables of one method
    python benchmarks/ablations.py moco.momentum       one table
    python benchmarks/ablations.py --seeds 0 1 2       each row three times: the mean, and the lowest to the highest kNN
    python benchmarks/ablations.py moco --jobs 2       two runs at a time, one core each
    python benchmarks/ablations.py demos --seeds 0 1 2 3 4 --threads 2       the demos as they are: worst and best

Each table is printed when it is done. The tables on collapse also get a picture, from the first seed's log.csv. kNN is
the accuracy of h on the held-out images after the last epoch. Loss, std and rank are those of the last epoch; std is
divided by its healthy value, 1/sqrt(d). cos2 is the mean squared cosine between the g(h) of two held-out images; it is
1 when all g(h) lie on one line. A row that an earlier table had, such as the default, is not run again. The exit status
is 1 if a run failed. Experiments that change more than flags are separate scripts: augmentations.py, supervised.py and
simsiam_section5.py.
"""

import contextlib
import csv
import importlib
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import images
from benchmarks import table

LOSSES = ("infonce", "mine", "triplet", "soft-triplet", "n-pair", "lifted", "sigmoid-triplet", "linear")
LOSSES += ("margin", "hinge", "nce")  # of pairwise.py
DEMOS = ("simclr", "moco", "byol", "simsiam", "swav", "supcon")
DIGITS = {"kNN": 3, "kNN of g(h)": 3, "loss": 3, "std": 2, "rank": 1, "cos2": 2, "seconds": 0}


def each(flag: str, *values: Any) -> list[str]:
    return [f"{flag} {value}" for value in values]


# method.name -> (the table's question, the flags of every row, the rows); a row "" is the default
TABLES = {
    "pairwise.loss": ("the losses of the family, and the three outside it", "", each("--loss", *LOSSES)),
    "pairwise.choices": (
        "InfoNCE without the positive in the denominator, and negatives from other classes only", "",
        ["", "--epsilon 0", "--negatives other-class", "--loss linear", "--loss linear --negatives other-class"],
    ),
    "pairwise.length": (
        "z of any length: which losses push without end", "--no-normalize",
        each("--loss", "n-pair", "triplet", "margin", "linear"),
    ),
    "simclr.head": (
        "the projection head g, and h against g(h) (SimCLR, section 4.2 and figure 8: without a head accuracy is over "
        "10 points below the mlp's, with a linear head 3; the width of z matters little; h is over 10 above g(h))", "",
        ["", "--projection-head none", "--projection-head linear", "--projection-dim 8", "--projection-dim 256",
         "--projection-head linear --projection-dim 256"],
    ),
    "simclr.temperature": (
        "tau, 0.2 by default (SimCLR, table 5, linear: 0.05 59.7, 0.1 64.4, 0.5 60.7, 1 58.0)", "",
        ["", *each("--temperature", 0.05, 0.1, 0.5, 1)],
    ),
    "simclr.batch-size": (
        "batch size N and epochs, the learning rate scaled with N (SimCLR, figure 9: with few epochs large batches are "
        "far ahead, with many epochs the gap closes)", "",
        [row for epochs in (2, 5, 10) for row in each(f"--epochs {epochs} --batch-size", 32, 128, 512)],
    ),
    "moco.queue-size": (
        "queue size K, 1024 by default (MoCo, figure 3: larger is better, up to 65536)", "",
        each("--queue-size", 64, 256, 1024, 4096),
    ),
    "moco.v1-to-v2": (
        "from v1 to v2 by steps, all with one tau (MoCo v2, table 1, 200 epochs, linear: v1 60.6 with tau 0.07; mlp "
        "66.2 with tau 0.2; v2's views 63.4; both 67.3; both and the cosine schedule 67.5)", "",
        ["--augmentation v1 --schedule steps", "--augmentation v1 --schedule steps --projection-head mlp",
         "--augmentation v2 --blur 0.5 --schedule steps",
         *each("--augmentation v2 --blur 0.5 --projection-head mlp --schedule", "steps", "cosine")],
    ),
    "moco.momentum": (
        "momentum m of the key encoder (MoCo, section 4.1: 0 fails; 0.9 55.2, 0.99 57.8, 0.999 59.0, 0.9999 58.9)", "",
        each("--momentum", 0, 0.9, 0.99, 0.999),
    ),
    "moco.shuffling": (
        "what BN gives away (MoCo, section 3.3: without shuffling the pretext task is solved early, and h suffers)", "",
        ["--bn-splits 1", "--bn-splits 8 --no-shuffle-bn", "--bn-splits 8 --shuffle-bn"],
    ),
    "moco.mechanism": (
        "where keys come from (MoCo, figure 3: the queue is ahead at equal K; end-to-end cannot exceed K = N)", "",
        each("--mechanism", "queue", "end-to-end", "memory-bank"),
    ),
    "byol.collapse": (
        "what keeps the output from collapsing (BYOL, table 5, 300 epochs: momentum 0.9 68.4, 0.99 72.5, 0 0.3, 1 "
        "18.8; no predictor 0.2)", "--knn-every 1",
        ["", *each("--momentum", 0, 0.99, 1), "--no-predictor"],
    ),
    "byol.symmetry": ("both directions or one, for equally many epochs", "", ["", "--no-symmetric"]),
    "byol.batch-size": (
        "batch size N, the learning rate scaled with N, tau fixed; compare simclr.batch-size at 10 epochs (BYOL, "
        "figure 3, where gradients of small batches are added up: from 4096 to 256 BYOL loses 0.7 points, SimCLR more)",
        "--epochs 10",
        each("--batch-size", 32, 128, 512),
    ),
    "simsiam.collapse": (
        "what SimSiam needs (figure 2 and table 1: 67.7; no stop-gradient 0.1; no predictor 0.1, a fixed one 1.5; "
        "table 3, where the default has 68.1: BN in the heads none 34.6, hidden 67.4, all unstable)", "--knn-every 1",
        ["", "--no-stop-gradient", *each("--predictor", "none", "fixed"), *each("--head-bn", "none", "hidden", "all")],
    ),
    "simsiam.predictor-lr": (
        "the predictor's learning rate (SimSiam, table 1: decayed 67.7, constant 68.1)", "",
        ["", "--predictor-lr decayed"],
    ),
    "simsiam.batch-size": (
        "batch size N, 64 by default, the learning rate scaled with N (SimSiam, table 2: 64 66.1, 128 67.3, 256 68.1, "
        "512 68.1, 1024 68.0, 2048 67.9, 4096 64.0)", "",
        ["", *each("--batch-size", 32, 128, 256, 512)],
    ),
    "simsiam.similarity": (
        "the similarity D (SimSiam, section 4.5: cosine 68.1, cross-entropy 63.2)", "",
        ["", "--similarity cross-entropy"],
    ),
    "simsiam.symmetry": (
        "which views are predicted (SimSiam, section 4.6: 68.1, one direction 64.8)", "", ["", "--no-symmetric"],
    ),
    "swav.equal-shares": (
        "what keeps all codes from becoming equal (SwAV, section 3.1): iterations of Sinkhorn-Knopp; 0 takes softmaxes",
        "--knn-every 1", ["", *each("--sinkhorn-iterations", 1, 0)],
    ),
    "swav.prototypes": (
        "the number K of prototypes (SwAV, appendix: 300 72.8, 1000 73.6, 3000 73.9, 10000 74.1, 100000 73.8)", "",
        ["", *each("--prototypes", 10, 256)],
    ),
    "swav.queue": (
        "a small batch shares the prototypes with z of past batches (SwAV, section 4.3, keeps 15 batches of 256)",
        "--batch-size 32 --lr 0.05", ["", "--queue-size 480 --queue-start-epoch 1"],
    ),
    "swav.multi-crop": (
        "small crops predict the codes of the large ones (SwAV, 400 epochs: 2x224 70.1, 2x224,6x96 74.6). The loss "
        "then sums 10 pairs, not 2, so --lr 0.04 takes steps as large as the default's", "",
        ["", "--crops 2x32,4x16", "--crops 2x32,4x16 --lr 0.04"],
    ),
    "demos": ("the demos as they are", "", DEMOS),
}  # fmt: skip


def command(name: str, row: str, more: str = "") -> str:
    """The command that makes a row of a table, without `python`."""
    if name == "demos":
        return f"{row}.py"
    method, shared = name.split(".")[0], TABLES[name][1]
    small = "" if method == "swav" else "--image-size 16"  # takes a third of the time, and kNN is not near 1
    return " ".join(f"{method}.py {row} {small} {shared} {more}".split())


def measure(words: list[str], out: str) -> dict[str, Any]:
    """The work of a process: train, printing to `out`.txt. Returns the figures of DIGITS, and the folder."""
    method, started = importlib.import_module(words[0].removesuffix(".py")), time.monotonic()
    with open(f"{out}.txt", "w") as file, contextlib.redirect_stdout(file):
        config = common.parse_args(method.Config, [*words[1:], "--out", out])
        data = images.load(config, common.pick_device(config.device))
        found = method.train(config, data)
    seconds, (_, model) = time.monotonic() - started, common.load_run(found["out"])
    cos2 = common.health(common.embed(model.to(data.train.device).embed, data.test or data.train, config))[2]
    std = found["feature_std"] * math.sqrt(model.dim)
    figures = {"kNN": found.get("knn h", math.nan), "kNN of g(h)": found.get("knn g(h)", math.nan), "std": std}
    figures |= {"loss": found["loss"], "rank": found["effective_rank"], "cos2": cos2, "seconds": seconds}
    return figures | {"out": found["out"]}


def cells(runs: list[dict[str, Any]]) -> list[str]:
    """A line of a table: means over the seeds; kNN and seconds also have their range."""
    columns = {name: table.over_seeds([run[name] for run in runs], places) for name, places in DIGITS.items()}
    return [text if name in ("kNN", "seconds") else text.split()[0] for name, text in columns.items()]


def draw(folders: dict[str, str], path: Path) -> None:
    """Draw each run's loss, std, rank and kNN by epoch, from its log.csv."""
    texts = {name: Path(out, "log.csv").read_text().splitlines() for name, out in folders.items()}
    logs = {name: list(csv.DictReader(lines)) for name, lines in texts.items()}

    def panels(figure: Any) -> None:
        columns = ("loss", "feature_std", "effective_rank", "knn_top1")
        for axes, column in zip(figure.subplots(1, 4), columns, strict=True):
            for i, (name, rows) in enumerate(logs.items()):
                points = [(int(row["epoch"]), float(row[column])) for row in rows if row[column]]
                axes.plot(*zip(*points, strict=True), marker=".", linestyle=("-", "--", ":", "-.")[i % 4], label=name)
            axes.set(title=column, xlabel="epoch")
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")

    table.figure(14, 3.2, path, panels)


def main(argv: list[str] | None = None) -> None:
    parser, cores = table.parser(f"{__doc__}\ntables: {', '.join(TABLES)}", "ablations"), os.cpu_count() or 1
    add = parser.add_argument
    add("table", nargs="*", help="a method, a table such as moco.momentum, or demos (default: all tables)")
    add("--jobs", type=int, default=1, help="how many runs go on at a time (default 1)")
    add("--threads", type=int, help="threads of each run (default: the number of cores divided by --jobs)")
    add("--more", default="", help='flags for every row except the demos, such as --more "--epochs 8"')
    args = parser.parse_args(argv)
    wanted = [name for name in TABLES if not args.table or {name, name.split(".")[0]} & {*args.table}]
    wrong = {*args.table} - {*TABLES, *(name.split(".")[0] for name in TABLES)}
    images.ensure(not wrong, f"no table is called {', '.join(wrong)}; give some of {', '.join(TABLES)}")
    table.refuse(args.more.split(), ("seed", "out"))
    threads = args.threads or max(1, cores // args.jobs)
    images.ensure(args.jobs > 0 and threads > 0, "--jobs and --threads: give 1 or more")
    made, failed = {}, []  # (command, seed) -> its task: many tables have the default row
    with table.processes(args.jobs, threads) as pool:
        for name in wanted:
            question, _, rows = TABLES[name]
            folder, lines, first = Path(args.out, name), [], {}
            folder.mkdir(parents=True, exist_ok=True)
            keys = {row: [(command(name, row, args.more), seed) for seed in args.seeds] for row in rows}
            for i, row in enumerate(rows):
                for key in keys[row]:
                    if key not in made:
                        script, *flags = key[0].split()
                        seldom = [] if name == "demos" else ["--knn-every", "1000000"]  # the table's own flag wins
                        words = [script, *seldom, *flags, "--seed", str(key[1])]
                        made[key] = pool.submit(measure, words, str(folder / f"{i}-seed-{key[1]}"))
            for row in rows:
                if wrong := [error for key in keys[row] if (error := made[key].exception())]:
                    failed.append(f"python {keys[row][0][0]}")
                    lines.append([row, f"failed: {wrong[0]}", *[""] * (len(DIGITS) - 1)])
                    continue
                runs = [made[key].result() for key in keys[row]]
                first[row or "default"] = runs[0]["out"]
                lines.append([f"`{row}`" if row else "default", *cells(runs)])
            shown = command(name, "METHOD" if name == "demos" else "", args.more)
            print(f"\n{name}: {question}\n\n    python {shown}\n\nseeds {', '.join(map(str, args.seeds))}; ", end="")
            print(f"{args.jobs} runs at a time, {threads} thread(s) each, {cores} cores\n")
            print(table.markdown(["flags", *DIGITS], lines), flush=True)
            if "--knn-every" in TABLES[name][1]:  # a table of collapses
                draw(first, Path(args.out, f"{name}.png"))
    if failed:
        raise common.RunFailure(f"these failed: {'; '.join(failed)}")


if __name__ == "__main__":
    with common.exit_status():
        main()
