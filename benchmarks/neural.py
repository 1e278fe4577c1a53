"""CEBRA on the rat's track: how well each mode decodes, how alike two seeds are, and the package cebra for comparison.

    python benchmarks/neural.py --seeds 0 1 2 3 4             all modes, and shuffled behaviour as a control
    python benchmarks/neural.py --peer --seeds 0 1 2          our file and the package (pip install cebra), in turns

Other flags of cebra.py go to every row. `recordings.decode` decodes the last tenth of the samples. Consistency is R2 of
the best linear map from one seed's z to another seed's, over all samples; it is averaged over ordered pairs of seeds.
"""

import csv
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cebra
import common
import recordings
from benchmarks import table
from images import ensure

ROWS = {
    "behavior": {},
    "time": {"mode": "time"},
    "hybrid": {"mode": "hybrid"},
    "behavior, shuffled": {"shuffle": True},
}
PACKAGE = """
import json, sys, time
import numpy as np, torch
import cebra

arrays, settings = np.load(sys.argv[1]), json.loads(sys.argv[3])
torch.manual_seed(settings.pop("seed"))
model = cebra.CEBRA(model_architecture="offset10-model", distance="cosine", verbose=False, **settings)
context = [] if settings["conditional"] == "time" else [arrays["behavior"], arrays["labels"]]
started = time.perf_counter()
model.fit(arrays["first"], *context)
seconds = time.perf_counter() - started
z = {part: model.transform(arrays[part]) for part in ("first", "middle", "last")}
np.savez(sys.argv[2], seconds=seconds, version=cebra.__version__, **z)
"""


def consistency(embeddings: list[Tensor]) -> float | None:
    """R2 of the best linear map between two embeddings (T, d), averaged over ordered pairs; None for one embedding."""
    found = []
    for a, b in itertools.permutations([z.double() for z in embeddings], 2):
        a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
        left = (b - a @ torch.linalg.lstsq(a, b).solution).square().sum(0)
        found.append((1 - left / (b - b.mean(0)).square().sum(0)).mean().item())
    return sum(found) / len(found) if found else None


def ours(config: cebra.Config) -> dict[str, Any]:
    """Run cebra.py; return the metrics of the table's columns, z (T, d), and the seconds of the epochs."""
    metrics = cebra.train(config)
    found = {name: metrics[f"{name} of z, {config.embedding_dim}-d"] for name in ("median error", "R2", "labels")}
    found["fit"] = metrics.get("goodness of fit, held out")
    with np.load(Path(metrics["out"]) / "embedding.npz") as file:
        found["z"] = torch.from_numpy(file["z"])
    with open(Path(metrics["out"]) / "log.csv") as file:
        speeds = [float(row["samples_per_second"]) for row in csv.DictReader(file)]
    found["training"] = sum(samples(config) / speed for speed in speeds)
    return found | {"others": metrics}


def samples(config: cebra.Config) -> int:
    """The number of reference times in an epoch."""
    first = len(recordings.load(config.data).split()[0].spikes)
    return max(1, first // config.batch_size) * config.batch_size


def package(config: cebra.Config) -> dict[str, Any]:
    """Run the package on the same arrays with the same flags and steps, where Python does not find our cebra.py."""
    parts = recordings.load(config.data).split()
    settings = {"batch_size": config.batch_size, "learning_rate": config.lr, "temperature": config.temperature}
    settings |= {"output_dimension": config.embedding_dim, "num_hidden_units": config.hidden_dim, "seed": config.seed}
    settings |= {"time_offsets": config.time_offset, "conditional": "time" if config.mode == "time" else "time_delta"}
    settings["device"] = common.pick_device(config.device).type
    settings["max_iterations"] = config.epochs * samples(config) // config.batch_size
    with tempfile.TemporaryDirectory() as folder:
        arrays = {name: part.spikes.numpy() for name, part in zip(("first", "middle", "last"), parts, strict=True)}
        arrays |= {"behavior": parts[0].behavior.float().numpy(), "labels": parts[0].labels.numpy()}
        np.savez(f"{folder}/in.npz", **arrays)
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-P", "-c", PACKAGE, "in.npz", "out.npz", json.dumps(settings)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        absent = re.search("ModuleNotFoundError.*cebra", done.stderr)
        ensure(not absent, "--peer: the package cebra is not installed; pip install cebra")
        if done.returncode:
            raise common.RunFailure(f"the package failed: {done.stderr.strip().splitlines()[-1]}")
        with np.load(f"{folder}/out.npz") as file:
            z = [torch.from_numpy(file[name]) for name in ("first", "middle", "last")]
            found = {"training": float(file["seconds"]), "version": str(file["version"])}
    return recordings.decode(z, list(parts)) | found


def line(name: str, found: list[dict[str, Any]]) -> list[str]:
    """A row of the table: the median error in cm, R2, and the accuracy of the direction, each over the seeds."""
    errors = [100 * f["median error"] for f in found]
    return [name, table.over_seeds(errors, 1), *(table.over_seeds([f[k] for f in found]) for k in ("R2", "labels"))]


def main(argv: list[str] | None = None) -> str:
    """Run what the command line asks for; print and return the table."""
    flags = table.parser(__doc__, "neural")
    flags.add_argument("--rows", nargs="+", choices=ROWS, default=None, help="some of the rows (default: all)")
    flags.add_argument("--peer", action="store_true", help="compare the rows behavior and time with the package cebra")
    args, rest = flags.parse_known_args(argv)
    peerless = ("encoder", "similarity", "negatives", "learn_temperature") * args.peer
    base = table.base_config(cebra.Config, rest, ("data", "mode", "shuffle", *peerless))
    ensure(base.epochs, "--epochs 0: nothing would be trained; give 1 or more")
    rows, lines = args.rows or (["behavior", "time"] if args.peer else list(ROWS)), []
    ensure(not args.peer or {*rows} <= {"behavior", "time"}, "--peer: only the rows behavior and time can be compared")
    for row in rows:
        configs = [dataclasses.replace(base, seed=s, out=f"{args.out}/{row}-seed-{s}", **ROWS[row]) for s in args.seeds]
        found, theirs = [], []
        for config in configs:
            if args.peer:  # the package first, since it may not be installed
                theirs.append(table.run(f"{row}, the package, seed {config.seed}", lambda c=config: package(c)))
            found.append(table.run(f"{row}, seed {config.seed}", lambda c=config: ours(c)))
        if args.peer:
            ratio = table.over_seeds([b["training"] / a["training"] for a, b in zip(found, theirs, strict=True)], 2)
            names = (row, found, "1"), (f"{row}, cebra {theirs[0]['version']}", theirs, ratio)
            lines += [[*line(n, f), table.over_seeds([x["training"] for x in f], 1), r] for n, f, r in names]
        else:
            alike = consistency([f["z"] for f in found])
            fit, seconds = (table.over_seeds([f[key] for f in found], 2) for key in ("fit", "training"))
            lines.append([*line(row, found), fit, "" if alike is None else f"{alike:.3f}", seconds])
    if not args.peer:
        for name in [key.removeprefix("R2 of ") for key in found[0]["others"] if key.startswith("R2 of ")][1:]:
            other = [{key: f["others"][f"{key} of {name}"] for key in ("median error", "R2", "labels")} for f in found]
            lines.append([*line(name, other), "", "", ""])
    last = ["s", "times ours"] if args.peer else ["fit, bits", "consistency", "s"]
    result = table.markdown(["", "median error, cm", "R2", "direction", *last], lines)
    print(f"\npython cebra.py {' '.join(rest)}, seeds {', '.join(map(str, args.seeds))}\n\n{result}")
    return result


if __name__ == "__main__":
    with common.exit_status():
        main()
