"""The ablations of the papers, in short runs on the embedded data: a row is the demo with some flags changed.

    python benchmarks/ablations.py                     every table
    python benchmarks/ablations.py moco                the tables of one method
    python benchmarks/ablations.py moco.momentum       one table
    python benchmarks/ablations.py moco --jobs 2       two runs at a time, one core each

Prints each table as it is done and writes it to --out as CSV. kNN is that of h on the held-out images after the last
epoch; loss, std and rank are the last epoch's, std over its healthy value 1/sqrt(d).
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
            "--epochs 6",
            [
                "--bn-splits 1",
                "--bn-splits 8 --no-shuffle-bn",
                "--bn-splits 8 --shuffle-bn",
            ],
        ),
        "mechanism": (
            "where keys come from (MoCo, figure 3: the queue is ahead at equal K, end-to-end ends at K = N)",
            "--epochs 6",
            ["--mechanism queue", "--mechanism end-to-end", "--mechanism memory-bank"],
        ),
    },
}


def measure(method: str, flags: str, out: Path, threads: int) -> list[str]:
    """Run the script once; the cells of its row. A run that fails gives a row that says so."""
    command = [sys.executable, f"{method}.py", "--knn-every", "1000000", *shlex.split(flags), "--out", str(out)]
    env, started = os.environ | {"OMP_NUM_THREADS": str(threads)}, time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    seconds = f"{time.monotonic() - started:.0f}"
    if done.returncode:
        return [flags, "failed", done.stderr.strip().split("\n")[-1], "", "", seconds]
    row = list(csv.DictReader((out / "log.csv").open()))[-1]
    dim = json.loads((out / "config.json").read_text())["projection_dim"]
    knn, loss, std, rank = (float(row[c]) for c in ("knn_top1", "loss", "feature_std", "effective_rank"))
    return [flags, f"{knn:.3f}", f"{loss:.3f}", f"{std * dim**0.5:.2f}", f"{rank:.1f}", seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", nargs="*", help="method or method.table (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    parser.add_argument("--more", default="", help='flags added to every row, such as --more "--seed 1"')
    parser.add_argument("--out", default="runs/ablations", help="folder of the runs and the CSV files")
    args = parser.parse_args()
    known = [f"{method}.{name}" for method, tables in TABLES.items() for name in tables]
    wanted = [full for full in known if not args.table or {full, full.split(".")[0]} & set(args.table)]
    if not wanted:
        parser.error(f"no such table; take some of {', '.join([*TABLES, *known])}")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    for full in wanted:
        method, name = full.split(".")
        question, shared, rows = TABLES[method][name]
        out, started = Path(args.out).resolve() / full, time.monotonic()
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [
                pool.submit(measure, method, f"{row} {shared} {args.more}".strip(), out / str(i), threads)
                for i, row in enumerate(rows)
            ]
            found = [job.result() for job in jobs]
        with open(out.with_suffix(out.suffix + ".csv"), "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *found])
        print(f"\n{full}: {question}\nevery row: python {method}.py {shared} {args.more}\n")
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
        for row, cells in zip(rows, found, strict=True):
            print("| " + " | ".join([f"`{row}`", *cells[1:]]) + " |")
        print(
            f"\n{time.monotonic() - started:.0f} s, {args.jobs} at a time, {threads} thread(s) each; "
            f"{os.cpu_count()} cores",
            flush=True,
        )


if __name__ == "__main__":
    main()
