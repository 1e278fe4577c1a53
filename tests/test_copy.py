"""The copying promise: a method file runs in an empty folder with common.py and images.py, and with kernels/."""

import re
import shutil

import pytest

from tests.helpers import ROOT, python

SMALL = "--preset demo --epochs 1 --batch-size 60 --knn-every 0"
HEADER = {  # flags, and what the first lines of a run must say
    "simclr": ("--lr 0.4", ["peak lr 0.09375 (--lr 0.4, linear scaling, N = 60)", "mean over 2N = 120 anchors"]),
    "moco": ("--queue-size 180", ["(not scaled by N)", "mean over N = 60 queries", "queue-size 180"]),
    "byol": ("--lr 0.8", ["peak lr 0.1875 (--lr 0.8 x 60 / 256)", "mean over N = 60 images", "moving average, tau"]),
    "simsiam": ("--lr 0.8", ["peak lr 0.1875", "mean over N = 60 images"]),
    "swav": ("--lr 0.3", ["peak lr 0.3 (not scaled by B)", "mean over B = 60 images", "60 images share"]),
    "pairwise": ("--lr 0.01", ["adam, peak lr 0.01 (not scaled by N)", "mean over 2N = 120 anchors"]),
    "supcon": ("--lr 2", ["peak lr 2 (not scaled by N)", "mean over 2N = 120 anchors"]),
}
CONTRASTIVE = ["simclr", "moco", "supcon"]


ALL = """
import runpy, sys

for command in sys.argv[1:]:
    sys.argv = command.split()
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("methods, along", [(list(HEADER), ""), (["simclr"], "kernels")], ids=["alone", "kernels"])
def test_copied_method_files_run(methods, along, photos, tmp_path):
    """One after the other in one process, for the time that a start takes; that none needs another is read."""
    for name in (*methods, "common", "images"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
        assert not re.search(rf"^\s*(import|from) ({'|'.join(HEADER)})\b", (tmp_path / f"{name}.py").read_text(), re.M)
    if along:
        shutil.copytree(ROOT / along, tmp_path / along)
    more = " --loss-backend blocked" * bool(along)
    commands = [f"{m}.py --data {photos} {SMALL} {HEADER[m][0]}{more}" for m in methods]
    done = python("-c", ALL, *commands, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = re.findall(r"\n(\w+ +--preset demo.*?next: python linear_eval\.py)", done.stdout, re.S)
    assert len(runs) == len(methods)
    for method, run in zip(methods, runs, strict=True):
        said = " ".join(run.split())
        for expected in (f"{method} --preset demo", *HEADER[method][1]):
            assert expected in said
        assert method not in CONTRASTIVE or (", blocked;" if along else ", naive;") in said
        assert (tmp_path / "runs" / method / "backbone.pt").exists()


BROKEN = """
import sys
from pathlib import Path

sys.dont_write_bytecode = True
for method in sys.argv[1:]:
    for broken in ("import no_such_package", "from . import no_such_part"):
        sys.modules.pop("kernels", None)
        Path("kernels/__init__.py").write_text(broken)
        try:
            __import__(method)
        except ImportError as error:
            assert "no_such" in str(error)
        else:
            sys.exit(f"{method} took kernels/ with {broken} for absent")
"""


def test_kernels_that_are_broken_are_not_taken_for_absent(tmp_path):
    """An import that fails inside the package is a bug to see; the naive loss must not hide it."""
    (tmp_path / "kernels").mkdir()
    for name in (*CONTRASTIVE, "common", "images"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = python("-c", BROKEN, *CONTRASTIVE, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_cebra_copied_with_its_three_modules_runs(tmp_path):
    for name in ("cebra", "recordings", "common", "images"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    spikes = "np.random.default_rng(0).poisson(1, (300, 4))"
    code = f"import numpy as np; np.savez('mine.npz', spikes={spikes}, behavior=np.arange(300.0))"
    done = python("-c", f"{code}\n{ALL}", "cebra.py --data mine.npz --epochs 1 --batch-size 60", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "info_nce, naive" in done.stdout and (tmp_path / "runs" / "cebra" / "embedding.npz").exists()
