"""The ablations of the papers, in short runs on the embedded data: a row is the demo at 16 pixels, some flags changed.

    python benchmarks/ablations.py                     every table
    python benchmarks/ablations.py moco                the tables of one method
    python benchmarks/ablations.py moco.momentum       one table
    python benchmarks/ablations.py --seeds 0 1 2       each row three times: the mean, and from ... to of kNN
    python benchmarks/ablations.py moco --jobs 2       two runs at a time, one core each
    python benchmarks/ablations.py demos --seeds 0 1 2 3 4 --threads 1 2     the demos as they are: worst and best
    python benchmarks/ablations.py demos.byol --threads 2                    one of them

Prints each table as it is done and writes it to --out as CSV, the tables of collapses as a picture too (of the first
seed); exits 1 when a run failed. kNN is that of h on the held-out images after the last epoch; loss, std, rank and
cos2 are the last epoch's: std over its healthy value 1/sqrt(d), cos2 the mean squared cosine of the outputs of two
images, which is 1 when all lie on one line. A row that an earlier table had, such as the default, is not run again.
What takes more than a flag is a script of its own: augmentations.py, supervised.py, simsiam_section5.py, ...
"""

import argparse
import csv
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERY = 8  # steps between two points of a picture
SMALL = "--image-size 16"  # but SwAV, whose crops say their own size: a third of the time, and kNN is not near 1
COLUMNS = ("flags", "kNN", "kNN of g(h)", "loss", "std", "rank", "cos2", "seconds")
LOSSES = ("infonce", "mine", "triplet", "soft-triplet", "n-pair", "lifted", "sigmoid-triplet", "linear")
LOSSES += ("margin", "hinge", "nce")  # of pairwise.py
DEMOS = ("simclr", "moco", "byol", "simsiam", "supcon", "swav")

# method -> table -> (what it asks, flags of every row, rows)
TABLES = {
    "pairwise": {
        "loss": (
            "the losses of the family, and the three outside",
            "",
            [f"--loss {loss}" for loss in LOSSES],
        ),
        "choices": (
            "InfoNCE without the positive in the denominator, and negatives of other classes alone",
            "",
            ["", "--epsilon 0", "--negatives other-class", "--loss linear", "--loss linear --negatives other-class"],
        ),
        "length": (
            "z of any length: what has no bound on its pull",
            "--no-normalize",
            [f"--loss {loss}" for loss in ("n-pair", "triplet", "margin", "linear")],
        ),
    },
    "simclr": {
        "head": (
            "g, and h against g(h) (SimCLR, section 4.2 and figure 8: no head is more than 10 points behind the mlp, a "
            "linear one 3; the width of z matters little; h is more than 10 ahead of g(h))",
            "",
            [
                *["", "--projection-head none", "--projection-head linear"],
                *["--projection-dim 8", "--projection-dim 256", "--projection-head linear --projection-dim 256"],
            ],
        ),
        "temperature": (
            "tau, 0.2 by default (SimCLR, table 5, linear: 0.05 59.7, 0.1 64.4, 0.5 60.7, 1 58.0)",
            "",
            ["", *(f"--temperature {tau}" for tau in (0.05, 0.1, 0.5, 1))],
        ),
        "batch-size": (
            "N against epochs, the rate scaled with N (SimCLR, figure 9: with few epochs large batches are far ahead, "
            "with many the gap closes)",
            "",
            [f"--batch-size {n} --epochs {epochs}" for epochs in (2, 5, 10) for n in (32, 128, 512)],
        ),
    },
    "moco": {
        "queue-size": (
            "K, 1024 by default (MoCo, figure 3: more is better, up to 65536)",
            "",
            [f"--queue-size {k}" for k in (64, 256, 1024, 4096)],
        ),
        "v1-to-v2": (
            "from v1 to v2 by steps, all at one tau (MoCo v2, table 1, 200 epochs, linear: 60.6, at tau 0.07; mlp 66.2 "
            "at 0.2; v2's views 63.4; both 67.3; and cosine 67.5)",
            "",
            [
                "--augmentation v1 --schedule steps",
                "--augmentation v1 --schedule steps --projection-head mlp",
                "--augmentation v2 --blur 0.5 --schedule steps",
                "--augmentation v2 --blur 0.5 --schedule steps --projection-head mlp",
                "--augmentation v2 --blur 0.5 --schedule cosine --projection-head mlp",
            ],
        ),
        "momentum": (
            "m of the key encoder (MoCo, section 4.1: 0 fails; 0.9 55.2, 0.99 57.8, 0.999 59.0, 0.9999 58.9)",
            "",
            ["--momentum 0", "--momentum 0.9", "--momentum 0.99", "--momentum 0.999"],
        ),
        "shuffling": (
            "what BN gives away (MoCo, section 3.3: without shuffling the pretext task is solved early, and h suffers)",
            "",
            ["--bn-splits 1", "--bn-splits 8 --no-shuffle-bn", "--bn-splits 8 --shuffle-bn"],
        ),
        "mechanism": (
            "where keys come from (MoCo, figure 3: the queue is ahead at equal K, end-to-end ends at K = N)",
            "",
            ["--mechanism queue", "--mechanism end-to-end", "--mechanism memory-bank"],
        ),
    },
    "byol": {
        "collapse": (
            "what keeps the output from collapsing (BYOL, table 5, 300 epochs: momentum 0.9 68.4, 0.99 72.5, 0 0.3, "
            "1 18.8; no predictor 0.2)",
            "--knn-every 1",
            ["", "--momentum 0", "--momentum 0.99", "--momentum 1", "--no-predictor"],
        ),
        "symmetry": ("both directions or one, at equal epochs", "", ["", "--no-symmetric"]),
        "batch-size": (
            "N, the rate scaled with it, beside simclr.batch-size at 10 epochs; tau stays (BYOL, figure 3, which adds "
            "up gradients of small batches: from 4096 to 256 it loses 0.7 points, SimCLR more)",
            "--epochs 10",
            [f"--batch-size {n}" for n in (32, 128, 512)],
        ),
    },
    "simsiam": {
        "collapse": (
            "what it needs (SimSiam, figure 2 and table 1: 67.7; no stop-gradient 0.1; predictor none 0.1, fixed 1.5; "
            "table 3, where the default has 68.1: BN in the heads none 34.6, hidden 67.4, all: unstable)",
            "--knn-every 1",
            [
                *["", "--no-stop-gradient", "--predictor none", "--predictor fixed"],
                *["--head-bn none", "--head-bn hidden", "--head-bn all"],
            ],
        ),
        "predictor-lr": (
            "the predictor's learning rate (SimSiam, table 1: decayed 67.7, constant 68.1)",
            "",
            ["", "--predictor-lr decayed"],
        ),
        "batch-size": (
            "N, 64 by default, the learning rate scaled with it (SimSiam, table 2: 64 66.1, 128 67.3, 256 68.1, 512 "
            "68.1, 1024 68.0, 2048 67.9, 4096 64.0)",
            "",
            ["", *(f"--batch-size {n}" for n in (32, 128, 256, 512))],
        ),
        "similarity": (
            "D (SimSiam, section 4.5: cosine 68.1, cross-entropy 63.2)",
            "",
            ["", "--similarity cross-entropy"],
        ),
        "symmetry": (
            "which views are predicted (SimSiam, section 4.6: 68.1, one direction 64.8)",
            "",
            ["", "--no-symmetric"],
        ),
    },
    "swav": {
        "equal-shares": (
            "what keeps codes from becoming one (SwAV, section 3.1): iterations of Sinkhorn-Knopp, 0 = softmaxes",
            "--knn-every 1",
            ["", "--sinkhorn-iterations 1", "--sinkhorn-iterations 0"],
        ),
        "prototypes": (
            "K (SwAV, appendix: 300 72.8, 1000 73.6, 3000 73.9, 10000 74.1, 100000 73.8)",
            "",
            ["", "--prototypes 10", "--prototypes 256"],
        ),
        "queue": (
            "z of past batches that share the prototypes with a small one (SwAV, section 4.3, takes 15 batches of 256)",
            "--batch-size 32 --lr 0.1",
            ["", "--queue-size 480 --queue-start-epoch 1"],
        ),
        "multi-crop": (
            "small crops that predict the codes of the large ones (SwAV, 400 epochs: 2x224 70.1, 2x224,6x96 74.6); the "
            "loss is then a sum of 10 pairs in place of 2, so that a fifth of the rate is the same one",
            "",
            ["", "--crops 2x32,4x16", "--crops 2x32,4x16 --lr 0.08"],
        ),
    },
}
PICTURES = ("byol.collapse", "simsiam.collapse", "swav.equal-shares")  # tables whose runs are drawn, too


def traced(method: str, argv: list[str]) -> None:
    """`python METHOD.py ARGV`, which also writes trace.csv: what the loss and the output are every EVERY steps."""
    sys.path.insert(0, str(ROOT))
    import common

    script, log, rows = importlib.import_module(method), common.Run.log, []

    def traced_log(run, loss, z, *views):
        if run.step % EVERY == 0 or run.step + 1 == run.total:
            std, _, cos2 = common.health(z)
            rows.append((run.step, loss.item(), std * math.sqrt(run.dim), cos2))
        log(run, loss, z, *views)

    common.Run.log = traced_log
    with common.exit_status():
        config = common.parse_args(script.Config, argv)
        metrics = script.train(config)
        (Path(config.out) / "metrics.json").write_text(json.dumps(metrics))
        with (Path(config.out) / "trace.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss", "std", "cos2"), *rows])


def last_row(path: Path) -> dict[str, float]:
    """The last row of a CSV file; NaN where it is empty."""
    return {name: float(value or "nan") for name, value in list(csv.DictReader(path.open()))[-1].items()}


def measure(command: list[str], said: str, out: Path, threads: int) -> dict[str, float] | str:
    """Run a method's script once, into `out`; the figures of COLUMNS that it has, or why it failed."""
    env, started = os.environ | {"OMP_NUM_THREADS": str(threads)}, time.monotonic()
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    seconds = time.monotonic() - started
    print(f"{seconds:4.0f} s  {said}" + "  failed" * bool(done.returncode), file=sys.stderr)
    if done.returncode:
        return (done.stderr.strip() or "killed").split("\n")[-1]
    row = last_row(out / "log.csv")
    found = {"kNN": row["knn_top1"], "loss": row["loss"], "rank": row["effective_rank"], "seconds": seconds}
    if (out / "metrics.json").exists():
        found["kNN of g(h)"] = json.loads((out / "metrics.json").read_text()).get("knn g(h)", math.nan)
    return found | (last_row(out / "trace.csv") if (out / "trace.csv").exists() else {})


def demos(methods: list[str], seeds: list[int], threads: list[int], out: Path) -> int:
    """Each demo by its own command, one at a time: a row a run as it ends, and the table. Returns how many failed."""
    found = {}
    for method in methods:
        for count in threads:
            for seed in seeds:
                command, folder = f"{method}.py --seed {seed}", out / f"{method}-{count}-threads-seed-{seed}"
                figures = measure(shlex.split(command), f"{command}, {count} thread(s)", folder, count)
                found.setdefault((method, count), []).append(figures)
                whole = isinstance(figures, dict)
                said = f"{figures['kNN']:.3f} | {figures['seconds']:.0f}" if whole else f"failed | {figures}"
                print(f"{method} | {count} | {seed} | {said}", flush=True)
    seeds_said = f"seeds {', '.join(map(str, seeds))}"
    print(f"\ndemos: `python METHOD.py --seed S`, {seeds_said}; {os.cpu_count()} cores\n")
    print("| method | threads | worst kNN | best kNN | seconds |\n|---|---|---|---|---|")
    for (method, count), runs in found.items():
        whole = [figures for figures in runs if isinstance(figures, dict)]
        line = [f"{pick(f['kNN'] for f in whole):.3f}" for pick in (min, max)] if whole else ["", ""]
        line += [" to ".join(f"{pick(f['seconds'] for f in whole):.0f}" for pick in (min, max))] if whole else [""]
        line[0] += f" ({len(runs) - len(whole)} failed)" * (len(whole) < len(runs))
        print(f"| {method} | {count} | " + " | ".join(line) + " |", flush=True)
    return sum(isinstance(figures, str) for runs in found.values() for figures in runs)


def cells(row: str, found: list[dict[str, float] | str]) -> list[str]:
    """A line of a table: the mean over seeds, and the range of kNN."""
    whole = [figures for figures in found if isinstance(figures, dict)]
    if len(whole) < len(found):
        return [row, "failed", next(why for why in found if isinstance(why, str)), *[""] * (len(COLUMNS) - 3)]
    mean = {name: sum(figures[name] for figures in whole) / len(whole) for name in COLUMNS[1:]}
    low, high = (pick(figures["kNN"] for figures in whole) for pick in (min, max))
    knn = f"{mean['kNN']:.3f}" + f" ({low:.3f} to {high:.3f})" * (len(whole) > 1)
    form = {"kNN of g(h)": ".3f", "loss": ".3f", "std": ".2f", "rank": ".1f", "cos2": ".2f", "seconds": ".0f"}
    return [row, knn, *(f"{mean[name]:{places}}" for name, places in form.items())]


def draw(runs: list[Path], names: list[str], path: Path) -> None:
    """Loss, std over its healthy value and cos2 by step, and kNN by epoch, of each run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: matplotlib is not installed")
        return
    figure = Figure(figsize=(14, 3.2), layout="constrained")
    panels = {"loss": ("trace.csv", "loss"), "std / healthy": ("trace.csv", "std")}
    panels |= {"squared cosine of two images": ("trace.csv", "cos2"), "kNN top-1 of h": ("log.csv", "knn_top1")}
    for axes, (title, (file, column)) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            rows = [row for row in csv.DictReader((run / file).open()) if row[column]]
            x, y = [int(next(iter(row.values()))) for row in rows], [float(row[column]) for row in rows]
            style = "-" if i == 0 else ("--", ":", "-.")[i % 3]
            axes.plot(x, y, marker="." * (file == "log.csv"), linestyle=style, label=name or "default", linewidth=1.2)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=title, xlabel="epoch" if file == "log.csv" else "step")
        axes.grid(alpha=0.3)
        if column in ("std", "cos2"):
            axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=80)


def main() -> int:
    names = [f"{method}.{name}" for method, tables in TABLES.items() for name in tables]
    names += [f"demos.{method}" for method in DEMOS]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="tables: " + ", ".join(names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("table", nargs="*", help="method, method.table, demos or demos.method (default: all)")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1; demos: always 1)")
    add("--seeds", type=int, nargs="+", default=[0], help="run each row with each of these (default 0)")
    add("--threads", type=int, nargs="+", help="of a run (default: the cores over --jobs); demos: with each of these")
    add("--more", default="", help='flags added to every row but the demos, such as --more "--epochs 8"')
    add("--out", default="runs/ablations", help="folder of the runs and the CSV files")
    args = parser.parse_args()
    wanted = [full for full in names if not args.table or {full, full.split(".")[0]} & set(args.table)]
    if wrong := set(args.table) - {*names, *TABLES, "demos"}:
        parser.error(f"no table {', '.join(sorted(wrong))}; take some of {', '.join([*TABLES, 'demos', *names])}")
    if "--seed" in args.more:
        parser.error('--more "--seed ...": give --seeds')
    if min(args.jobs, *(args.threads or [1])) < 1:
        parser.error("--jobs and --threads: give 1 or more")
    many = args.threads or [int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // args.jobs))]
    threads, failed = many[0], 0
    known = {}  # (method, flags) -> (folder, figures): the default stands in many tables
    for full in wanted:
        method, name = full.split(".")
        if method == "demos":
            continue
        question, shared, rows = TABLES[method][name]
        shared, started = " ".join(f"{SMALL * (method != 'swav')} {shared} {args.more}".split()), time.monotonic()
        out = Path(args.out).resolve() / full
        out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            for i, row in enumerate(rows):
                for seed in args.seeds:
                    key, folder = (method, f"{row} {shared} --seed {seed}"), out / f"{i}-seed-{seed}"
                    if key not in known:
                        command = ["benchmarks/ablations.py", "--traced", method, "--knn-every", "1000000"]
                        command += shlex.split(key[1])
                        known[key] = folder, pool.submit(measure, command, f"{method}.py {key[1]}", folder, threads)
        runs = [[known[method, f"{row} {shared} --seed {seed}"] for seed in args.seeds] for row in rows]
        table = [cells(row, [job.result() for _, job in run]) for row, run in zip(rows, runs, strict=True)]
        failed += sum(line[1] == "failed" for line in table)
        with open(out.with_suffix(out.suffix + ".csv"), "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *table])
        seeds = f"seed {args.seeds[0]}" if len(args.seeds) == 1 else f"seeds {', '.join(map(str, args.seeds))}"
        print(f"\n{full}: {question}\nevery row: {f'python {method}.py {shared}'.strip()}; {seeds}\n")
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
        for row, *line in table:
            print("| " + " | ".join([f"`{row}`" if row else "default", *line]) + " |")
        if full in PICTURES:
            first = {row: run[0][0] for row, run, line in zip(rows, runs, table, strict=True) if line[1] != "failed"}
            draw(list(first.values()), list(first), Path(args.out).resolve() / f"{full}.png")
        print(
            f"\n{time.monotonic() - started:.0f} s, {args.jobs} at a time, {threads} thread(s) each; "
            f"{os.cpu_count()} cores",
            flush=True,
        )
    if chosen := [full.split(".")[1] for full in wanted if full.startswith("demos.")]:
        failed += demos(chosen, args.seeds, many, Path(args.out).resolve() / "demos")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--traced"]:
        traced(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
