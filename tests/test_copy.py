"""The copying promise: a method file runs in an empty folder with common.py alone, and with kernels/."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["simclr", "moco"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("along", [(), ("kernels",)], ids=["alone", "kernels"])
def test_a_copied_method_file_runs(method, along, tmp_path):
    for name in (f"{method}.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in along:
        if not (ROOT / name).is_dir():
            pytest.skip(f"{name}/ is not here")
        shutil.copytree(ROOT / name, tmp_path / name)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"{method}.py", "--epochs", "1", "--batch-size", "500", "--knn-every", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("kernels/ is not here" in done.stdout) == (not along)
    assert (tmp_path / "runs" / method / "backbone.pt").exists()
