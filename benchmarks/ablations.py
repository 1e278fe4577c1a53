"""The ablations of the papers, in short runs on the embedded data: a row is the demo with some flags changed.

    python benchmarks/ablations.py                     every table
    python benchmarks/ablations.py moco                the tables of one method
    python benchmarks/ablations.py moco.momentum       one table
    python benchmarks/ablations.py moco --jobs 2       two runs at a time, one core each

Prints each table as it is done and writes it to --out as CSV, the tables of collapses as a picture too; exits 1 when a
run failed. kNN is that of h on the held-out images after the last epoch; loss, std and rank are the last epoch's, std
over its healthy value 1/sqrt(d).
"""

import argparse
import csv
import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERY = 8  # steps between two points of a picture
COLUMNS = ("flags", "kNN", "loss", "std", "rank", "seconds")

# method -> table -> (what it asks, flags of every row, rows)
TABLES = {
    "moco": {
        "momentum": (
            "m of the key encoder (MoCo, section 4.1: 0 fails; 0.9 55.2, 0.99 57.8, 0.999 59.0, 0.9999 58.9)",
            "--epochs 6",
            ["--momentum 0", "--momentum 0.9", "--momentum 0.99", "--momentum 0.999"],
        ),
        "shuffling": (
            "what BN gives away (MoCo, section 3.3: without shuffling the pretext task is solved early, and h suffers)",
            "--epochs 20",
            [
                "--bn-splits 1",
                "--bn-splits 8 --no-shuffle-bn",
                "--bn-splits 8 --shuffle-bn",
            ],
        ),
        "mechanism": (
            "where keys come from (MoCo, figure 3: the queue is ahead at equal K, end-to-end ends at K = N)",
            "--epochs 20",
            ["--mechanism queue", "--mechanism end-to-end", "--mechanism memory-bank"],
        ),
    },
    "byol": {
        "collapse": (
            "what keeps the output from collapsing (BYOL, table 5, 300 epochs: momentum 0.9 68.4, 0.99 72.5, 0 0.3, "
            "1 18.8; no predictor 0.2)",
            "--epochs 4 --knn-every 1",
            ["", "--momentum 0", "--momentum 0.99", "--momentum 1", "--no-predictor"],
        ),
        "symmetry": ("both directions or one, at equal epochs", "--epochs 4", ["", "--no-symmetric"]),
    },
    "simsiam": {
        "collapse": (
            "what it needs (SimSiam, figure 2 and table 1: 67.7; no stop-gradient 0.1; predictor none 0.1, fixed 1.5; "
            "table 3, where the default has 68.1: BN in the heads none 34.6, hidden 67.4, all: unstable)",
            "--epochs 4 --knn-every 1",
            [
                *["", "--no-stop-gradient", "--predictor none", "--predictor fixed"],
                *["--head-bn none", "--head-bn hidden", "--head-bn all"],
            ],
        ),
        "predictor-lr": (
            "the predictor's learning rate (SimSiam, table 1: decayed 67.7, constant 68.1)",
            "--epochs 4",
            ["--predictor-lr decayed", "--predictor-lr constant"],
        ),
        "batch-size": (
            "N, the learning rate scaled with it (SimSiam, table 2: 64 66.1, 128 67.3, 256 68.1, 512 68.1, 1024 68.0, "
            "2048 67.9, 4096 64.0)",
            "--epochs 4",
            [f"--batch-size {n}" for n in (32, 64, 128, 256, 512)],
        ),
        "similarity": (
            "D (SimSiam, section 4.5: cosine 68.1, cross-entropy 63.2)",
            "--epochs 4",
            ["--similarity cosine", "--similarity cross-entropy"],
        ),
        "symmetry": (
            "which views are predicted (SimSiam, section 4.6: 68.1, asymmetric 64.8, with twice the pairs 67.3)",
            "--epochs 4",
            ["--symmetry symmetric", "--symmetry asymmetric", "--symmetry asymmetric-2x"],
        ),
        "alternation": (
            "targets of k steps computed before them (SimSiam, section 5.3: 1 68.1, 10 68.7, 100 68.9, an epoch 67.0)",
            "--epochs 4",
            [f"--alternate-every {k}" for k in (1, 10, 100, 0)],
        ),
        "expectation": (
            "a moving average of each image's z in place of the predictor (SimSiam, section 5.3: 55.0; neither: 0.1)",
            "--epochs 4",
            ["--target moving-average", "--predictor none"],
        ),
    },
}
PICTURES = ("byol.collapse", "simsiam.collapse")  # tables whose runs are drawn, too


def traced(method: str, argv: list[str]) -> None:
    """`python METHOD.py ARGV`, which also writes trace.csv: the loss and the output's std, every EVERY steps."""
    sys.path.insert(0, str(ROOT))
    import common

    script, after, rows = importlib.import_module(method), common.Run.after_step, []

    def after_step(run, loss, z, lr, *views):
        if run.step % EVERY == 0:
            rows.append((run.step, loss.item(), float(common.feature_std(z))))
        after(run, loss, z, lr, *views)

    common.Run.after_step = after_step
    with common.exit_status():
        config = common.parse_args(script.Config, argv)
        script.train(config)
        with (Path(config.out) / "trace.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss", "feature_std"), *rows])


def measure(method: str, flags: str, out: Path, threads: int) -> list[str]:
    """Run the script once; the cells of its row. A run that fails gives a row that says so."""
    command = [sys.executable, __file__, "--traced", method, "--knn-every", "1000000", *shlex.split(flags)]
    env, started = os.environ | {"OMP_NUM_THREADS": str(threads)}, time.monotonic()
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    seconds = f"{time.monotonic() - started:.0f}"
    if done.returncode:
        return [flags, "failed", done.stderr.strip().split("\n")[-1], "", "", seconds]
    row = list(csv.DictReader((out / "log.csv").open()))[-1]
    dim = json.loads((out / "config.json").read_text())["projection_dim"]
    loss, std, rank = (float(row[c]) for c in ("loss", "feature_std", "effective_rank"))
    knn = f"{float(row['knn_top1']):.3f}" if row["knn_top1"] else ""
    return [flags, knn, f"{loss:.3f}", f"{std * dim**0.5:.2f}", f"{rank:.1f}", seconds]


def draw(runs: list[Path], names: list[str], path: Path) -> None:
    """Loss and std over its healthy value by step, and kNN by epoch, of each run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: matplotlib is not installed")
        return
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = {"loss": ("trace.csv", "loss"), "std / healthy": ("trace.csv", "feature_std")}
    panels |= {"kNN top-1 of h": ("log.csv", "knn_top1")}
    for axes, (title, (file, column)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            rows = [row for row in csv.DictReader((run / file).open()) if row[column]]
            config = json.loads((run / "config.json").read_text())
            scale = config["projection_dim"] ** 0.5 if column == "feature_std" else 1.0
            x, y = [int(next(iter(row.values()))) for row in rows], [float(row[column]) * scale for row in rows]
            style = "-" if i == 0 else ("--", ":", "-.")[i % 3]
            axes.plot(x, y, marker="." * (file == "log.csv"), linestyle=style, label=name or "default", linewidth=1.2)
        axes.set(title=title, xlabel="epoch" if file == "log.csv" else "step")
        axes.grid(alpha=0.3)
        if column == "feature_std":
            axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", nargs="*", help="method or method.table (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    parser.add_argument("--more", default="", help='flags added to every row, such as --more "--seed 1"')
    parser.add_argument("--out", default="runs/ablations", help="folder of the runs and the CSV files")
    args = parser.parse_args()
    known = [f"{method}.{name}" for method, tables in TABLES.items() for name in tables]
    wanted = [full for full in known if not args.table or {full, full.split(".")[0]} & set(args.table)]
    if set(args.table) - {*known, *TABLES}:
        parser.error(f"no such table; take some of {', '.join([*TABLES, *known])}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give 1 or more")
    threads, failed = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // args.jobs)), 0
    for full in wanted:
        method, name = full.split(".")
        question, shared, rows = TABLES[method][name]
        out, started = Path(args.out).resolve() / full, time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [
                pool.submit(measure, method, f"{row} {shared} {args.more}".strip(), out / str(i), threads)
                for i, row in enumerate(rows)
            ]
            found = [job.result() for job in jobs]
        failed += sum(cells[1] == "failed" for cells in found)
        with open(out.with_suffix(out.suffix + ".csv"), "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *found])
        print(f"\n{full}: {question}\nevery row: python {method}.py {shared} {args.more}\n")
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
        for row, cells in zip(rows, found, strict=True):
            print("| " + " | ".join([f"`{row}`" if row else "default", *cells[1:]]) + " |")
        if full in PICTURES:
            whole = [i for i, cells in enumerate(found) if cells[1] != "failed"]
            draw([out / str(i) for i in whole], [rows[i] for i in whole], Path(args.out).resolve() / f"{full}.png")
        print(
            f"\n{time.monotonic() - started:.0f} s, {args.jobs} at a time, {threads} thread(s) each; "
            f"{os.cpu_count()} cores",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--traced"]:
        traced(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
