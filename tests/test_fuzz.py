"""What users may type, and what may befall their files: always an exit status and one line, no traceback, no hang.

All is drawn from FUZZ_SEED (0 if the variable is not set), so that a failure can be repeated.
"""

import importlib
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import images
import linear_eval
import simclr
from tests.helpers import METHODS, equal, few_shapes, flags, saved

SEED = int(os.environ.get("FUZZ_SEED", "0"))
TINY = ["--preset", "demo", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "16", "--image-size", "16"]
TINY += ["--workers", "1"]
pytestmark = pytest.mark.slow  # hundreds of small runs


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """To draw curves.png takes longer than a run does here."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def outcome(run, capsys):
    """(status, stderr) of a script that is called; anything but an expected end is raised. One line tells a failure."""
    status = 0
    try:
        with common.exit_status():
            run()
    except SystemExit as end:
        status = end.code
    err = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("warning: ")]
    assert status in (0, 1, 2) and len(err) == bool(status), (status, err)
    assert not status or err[0].startswith("error: ") and len(err[0]) < 1500, err
    return status


def value(kind, choices, rng):
    """Something that a user may write after a flag."""
    if choices:
        return rng.choice([*choices, "nonsense"])
    numbers = ["-1", "0", "1", "2", "3", "16", "64", "0.5", "1e-30", "1e308", "nan", "inf", "", "many"]
    return rng.choice(numbers[:7] if rng.random() < 0.7 else numbers)


STRINGS = {  # what a flag of words may be given
    "data": ["shapes", "cifar10", "/no/such/folder", "FOLDER", ""],
    "backbone": ["resnet8", "resnet18", "resnet19", ""],
    "crops": ["2x16", "1x16,2x8", "2x32", "x", ""],
    "device": ["cpu", "auto", "cuda:7", "meta", ""],
    "init": ["random", "imagenet", "/no/such/file", __file__, ""],
}
TOO_LONG = {"epochs", "compile", "out", "resume", "data_dir", "backbone"}  # epochs: base; a compilation takes a minute


@pytest.mark.parametrize("part", range(2))
def test_flags_at_random(part, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, statuses = random.Random(1000 * SEED + part), []

    def train():
        config = common.parse_args(method.Config, argv)
        method.train(config, few_shapes(200, 16) if config.data == "shapes" else None)

    for i in range(40):
        method = importlib.import_module(METHODS[i % len(METHODS)])
        kinds, few = flags(method.Config), {"swav": ["--crops", "2x16"], "moco": ["--queue-size", "64"]}
        argv = [*TINY, *few.get(method.__name__, []), "--out", f"run{i}", "--data-dir", "nowhere"]
        for name in rng.sample(sorted(kinds.keys() - TOO_LONG), rng.randint(1, 4)):
            choices, flag = getattr(kinds[name], "__args__", ()), common.dashed(name)
            if kinds[name] is bool:
                argv.append(rng.choice([flag, flag.replace("--", "--no-", 1)]))
            elif kinds[name] is str:
                word = rng.choice(STRINGS[name])
                argv += [flag, str(photos) if word == "FOLDER" else word]
            else:
                argv += [flag, value(kinds[name], choices, rng)]
        if rng.random() < 0.1:
            argv.insert(rng.randrange(len(argv)), rng.choice(["--nonsense", "word", "--", "-x", "--lr"]))
        print(method.__name__, *argv)
        statuses.append(outcome(train, capsys))
    assert statuses.count(0) > 4 and statuses.count(2) > 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos):
    """The folder of a run of an epoch on the photos."""
    out = tmp_path_factory.mktemp("trained") / "run"
    simclr.train(common.parse_args(simclr.Config, [*TINY, "--data", str(photos), "--out", str(out)]))
    return out


def test_flags_of_linear_eval_at_random(trained, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, statuses = random.Random(1000 * SEED + 10), []
    pool = {
        "--features": ["h", "z", "pixels", "x"],
        "--protocol": ["features", "paper", "finetune", "x"],
        "--batch-size": ["0", "16", "1000", "x"],
        "--epochs": ["0", "1", "-1", "x"],
        "--lr": ["0", "1", "nan", "1e308"],
        "--label-fraction": ["0", "0.1", "1", "2", "nan"],
        "--l2": ["0", "1", "-1", "inf"],
        "--data": ["shapes", str(photos), "/no/such/folder", ""],
        "--device": ["cpu", "cuda:7", "x"],
        "--seed": ["0", "-1", str(2**64)],
        "--save": ["c.pt", ".", "c.txt", "/no/such/c.pt"],
        "--workers": ["0", "1", "-1", "x"],
    }
    for _ in range(40):
        argv = [str(trained), "--data", str(photos)]
        for flag in rng.sample(sorted(pool), rng.randint(0, 3)):
            argv += [flag, rng.choice(pool[flag])]
        argv += [f for f in ("--untrained", "--shuffle-labels") if rng.random() < 0.1]
        if {"paper", "finetune"} & {*argv} and "--epochs" not in argv:
            argv += ["--epochs", "1"]
        print(*argv)
        statuses.append(outcome(lambda a=argv: linear_eval.main(a), capsys))
    assert statuses.count(0) > 4 and statuses.count(2) > 4


def corrupted(path, rng):
    """Damage the file at random."""
    data = bytearray(path.read_bytes())
    kind, at = rng.choice(["bits", "zeros", "cut", "grown", "empty"]), rng.randrange(len(data))
    if kind == "bits":
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[at : at + 2000] = bytes(min(2000, len(data) - at))
    elif kind == "grown":
        data[at:at] = rng.randbytes(50)
    else:
        del data[at if kind == "cut" else 0 :]
    path.write_bytes(data)


def odd(path, rng):
    """Put an odd value into the JSON file at random."""
    stored = json.loads(path.read_text())
    for name in rng.sample(sorted(stored), rng.randint(1, 2)):
        if rng.random() < 0.3:
            del stored[name]
        else:
            stored[name] = rng.choice([None, -1, 0, 10**30, math.nan, "x", "", [], {}, True, dict(stored)])
    path.write_text(json.dumps(rng.choice([stored, stored, stored, [stored], None, "x"])))


@pytest.mark.parametrize("part", range(4))
def test_runs_that_were_damaged(part, trained, tmp_path, capsys):
    """Resumed or evaluated, a damaged run is refused, or gives what a whole one gives."""
    rng, refused = random.Random(1000 * SEED + 20 + part), 0
    whole = saved(trained)
    for i in range(50):
        shutil.copytree(trained, out := tmp_path / str(i))
        damage, name = rng.choice([(corrupted, "checkpoint.pt"), (corrupted, "config.json"), (odd, "config.json")])
        damage(out / name, rng)
        if name == "checkpoint.pt" and rng.random() < 0.5:
            found = []
            status = outcome(lambda o=out, f=found: f.append(common.load_run(o)), capsys)
            assert status == 2 or equal(found[0][1].state_dict(), whole)
        else:
            argv = ["--resume", str(out)]
            status = outcome(lambda a=argv: simclr.train(common.parse_args(simclr.Config, a)), capsys)
            assert status == 2 or equal(saved(out), whole)
        refused += status == 2
        shutil.rmtree(out)
    assert refused > 25


FILES = ["x.png"] * 8 + ["x.jpg", "x.tif", "x.GIF", "x.webp", "float.tiff", "cut.png", "pipe.png"]
FILES += ["text.jpg", "text.txt", "text.db", ".text.png"]


def plant(root, rng):
    """A folder such as users have: splits, classes, links, and every kind of file in them."""
    picture = np.random.default_rng(rng.randrange(1000)).integers(0, 255, (20, 24, 3), np.uint8)
    splits = [rng.choice(["train", "Training", "", "val"]), *rng.sample(["test", "Validation", ""], rng.randint(0, 2))]
    for split in splits:
        for name in rng.sample(["cat", "dog", "cat/deeper", "Train", "test", ".git", ""], rng.randint(1, 4)):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i, kind in enumerate(rng.choices(FILES, k=rng.randint(0, 9))):
                path = root / split / name / (kind if kind[0] == "." else f"{i}-{kind}")
                if "text" in kind:
                    path.write_text("text")
                elif kind == "pipe.png":
                    path.exists() or os.mkfifo(path)
                else:
                    Image.fromarray(picture[..., 0].astype(np.float32) if kind == "float.tiff" else picture).save(path)
                if kind == "cut.png":
                    corrupted(path, rng)
    for i in range(rng.randint(0, 3)):
        folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
        link = rng.choice(folders) / f"link{i}{rng.choice(['', '.png'])}"
        link.symlink_to(rng.choice([*folders, root.parent / "gone", *root.rglob("*.png")]))


def read_folder(config):
    """Load the folder and look at every picture. Each is a file below it and has the label of its class."""
    data = images.load(config, torch.device("cpu"))
    for split in filter(None, (data.train, data.test)):
        (view,) = next(split.views([torch.arange(len(split))], [(16, None)], workers=config.workers))
        assert view.shape == (len(split), 3, 16, 16)
        for path, label in zip(split.paths, split.labels.tolist(), strict=True):
            parts = Path(path).relative_to(config.data).parts
            assert Path(path).is_file() and not any(name[0] in "._@" for name in parts)
            assert label < 0 or data.classes[label] in parts[:2]


@pytest.mark.parametrize("part", range(2))
def test_folders_at_random(part, tmp_path, capsys):
    """A folder is read, or refused in one line."""
    rng, statuses = random.Random(1000 * SEED + 30 + part), []
    for i in range(50):
        (root := tmp_path / str(i) / "photos").mkdir(parents=True)
        plant(root, rng)
        gb, workers = rng.choice([0.0, 4.0]), rng.choice([0, 0, 1])
        config = simclr.Config(data=str(root), image_size=16, resident_gb=gb, workers=workers)
        statuses.append(outcome(lambda c=config: read_folder(c), capsys))
    assert statuses.count(0) > 20
