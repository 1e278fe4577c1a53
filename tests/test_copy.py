"""The copying promise: a method file runs in an empty folder with common.py and images.py, and with kernels/."""

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
    "supcon": ("--lr 2", ["peak lr 2 (not scaled by N)", "mean over 2N = 120 anchors"]),
}
CONTRASTIVE = ["simclr", "moco", "supcon"]


@pytest.mark.parametrize(
    "method, along", [(m, "") for m in HEADER] + [("simclr", "kernels")], ids=lambda v: v or "alone"
)
def test_a_copied_method_file_runs(method, along, photos, tmp_path):
    for name in (f"{method}.py", "common.py", "images.py"):
        shutil.copy(ROOT / name, tmp_path)
    flags, words = HEADER[method]
    if along:
        shutil.copytree(ROOT / along, tmp_path / along)
        flags += " --loss-backend blocked"
    done = python(f"{method}.py", "--data", photos, *SMALL.split(), *flags.split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for expected in (f"{method} --preset demo", "next: python linear_eval.py", *words):
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
