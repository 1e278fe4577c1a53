"""The copying promise: a method file runs in an empty folder with common.py alone, and with kernels/."""

import shutil

import pytest

from tests.helpers import ROOT, python

HEADER = {  # what the first lines of a run must say
    "simclr": ["peak lr 0.09375", "nt_xent", "mean over 2N = 120 anchors"],
    "moco": ["peak lr 0.03 (not scaled", "mean over N = 60 queries", "version 2", "queue-size 180"],
    "byol": ["peak lr 0.1875", "mean over N = 60 images", "moving average, tau from", "solarize-2"],
    "simsiam": ["peak lr 0.1875", "mean over N = 60 images", "no gradient", "stop-gradient True"],
    "supcon": ["peak lr 2 (not scaled", "mean over 2N = 120 anchors", "stage     both", "stage 2, linear classifier"],
}
CONTRASTIVE = ["simclr", "moco", "supcon"]


@pytest.mark.parametrize(
    "method, along", [(m, "") for m in HEADER] + [(m, "kernels") for m in CONTRASTIVE], ids=lambda v: v or "alone"
)
def test_a_copied_method_file_runs(method, along, photos, tmp_path):
    for name in (f"{method}.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    if along:
        shutil.copytree(ROOT / along, tmp_path / along)
    flags = f"--preset demo --data {photos} --epochs 1 --batch-size 60 --knn-every 0"
    if method == "moco":
        flags += " --queue-size 180"
    done = python(f"{method}.py", *flags.split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("preset demo", "next: python linear_eval.py", *HEADER[method]):
        assert words in done.stdout
    assert ("kernels/ is not here" in done.stdout) == (method in CONTRASTIVE and not along)
    assert (tmp_path / "runs" / method / "backbone.pt").exists()
