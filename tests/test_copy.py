"""The copying promise: a method file runs in an empty folder with common.py and images.py, and with kernels/."""

import re
import shutil

import pytest

from tests.helpers import FEW, METHODS, ROOT, python

SMALL = "--preset demo --epochs 1 --warmup-epochs 0 --batch-size 60 --knn-every 0 --workers 0"
RUN = """
import runpy, sys

sys.modules["matplotlib"] = None  # a picture takes longer than a run here
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print("exit status", end.code)
"""


def copied(folder, *names):
    """An empty folder with these scripts, and the shared modules."""
    folder.mkdir()
    for name in (*names, "common", "images"):
        shutil.copy(ROOT / f"{name}.py", folder)
    return folder


@pytest.mark.slow  # these start processes, whose imports take seconds
@pytest.mark.parametrize("methods, kernels", [(METHODS, False), (["simclr"], True)], ids=["alone", "with kernels"])
def test_copied_method_files_run(methods, kernels, photos, tmp_path):
    """One after the other in one process, to start Python once. That no method needs another is read."""
    folder = copied(tmp_path / "elsewhere", *methods)
    for path in folder.glob("*.py"):
        assert not re.search(rf"^\s*(import|from) ({'|'.join(METHODS)})\b", path.read_text(), re.M)
    if kernels:
        shutil.copytree(ROOT / "kernels", folder / "kernels")
    more = {name: " ".join(f"--{key.replace('_', '-')} {n}" for key, n in few.items()) for name, few in FEW.items()}
    commands = [f"{method}.py --data {photos} {SMALL} {more.get(method, '')}" for method in methods]
    done = python("-c", RUN, *commands, f"simclr.py --data {photos} {SMALL} --loss-backend blocked", folder=folder)
    assert done.returncode == 0, done.stderr
    for method in methods:
        assert f"runs/{method}: {method} on 1 x cpu; the paper's recipe with --data {photos}" in done.stdout
        assert (folder / "runs" / method / "backbone.pt").exists()
    assert done.stdout.count("exit status 2") == (not kernels)  # of the last command, and none of another
    assert kernels or done.stderr == "error: --loss-backend blocked: kernels/ is not beside common.py; copy it along\n"


OTHERS = """
import pathlib, sys

sys.path.append("site")
import common
assert common.kernels is None
pathlib.Path("kernels").mkdir()
pathlib.Path("kernels/__init__.py").write_text("import no_such_package")
del sys.modules["common"]
import common
"""


def test_another_package_of_the_name_kernels_is_not_taken_for_ours(tmp_path):
    """PyPI has one. Ours that is broken is a bug to see, which the naive loss must not hide."""
    folder = copied(tmp_path / "elsewhere")
    (folder / "site" / "kernels").mkdir(parents=True)
    (folder / "site" / "kernels" / "__init__.py").write_text("raise SystemExit('taken')")
    assert python("-c", OTHERS, folder=folder).stderr.endswith("No module named 'no_such_package'\n")


@pytest.mark.slow  # as above
def test_cebra_copied_with_its_three_modules_runs(tmp_path):
    folder = copied(tmp_path / "elsewhere", "cebra", "recordings")
    spikes = "np.random.default_rng(0).poisson(1, (300, 4))"
    code = f"import numpy as np; np.savez('mine.npz', spikes={spikes}, behavior=np.arange(300.0))"
    done = python("-c", f"{code}\n{RUN}", "cebra.py --data mine.npz --epochs 1 --batch-size 60", folder=folder)
    assert done.returncode == 0 and "exit status" not in done.stdout, done.stderr
    assert (folder / "runs" / "cebra" / "embedding.npz").exists()
