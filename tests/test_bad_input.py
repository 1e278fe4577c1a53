"""What users give wrong: one clear line on stderr, the exit status of the contract, no traceback, nothing lost."""

import re
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import byol
import common
import moco
import pairwise
import simclr
import simsiam
import supcon
import swav
from tests.helpers import equal, python, refusal

TINY = ["--preset", "demo", "--epochs", "1", "--batch-size", "64", "--knn-every", "0"]


def outcome(capsys, *argv):
    """(exit status, stderr) of `python simclr.py ARGV`, without the price of a new process."""
    status = 0
    try:
        with common.exit_status():
            simclr.train(common.parse_args(simclr.Config, [str(a) for a in argv]))
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


def refused(capsys, *argv):
    """The one line with which bad input is answered."""
    status, err = outcome(capsys, *argv)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def photos(root, n=40, size=(40, 32), classes=("a", "b")):
    rng = np.random.default_rng(0)
    for i in range(n):
        path = root / classes[i % len(classes)] / f"{i:03}.png" if classes else root / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return root


# --------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--epoch 3", "unknown --epoch 3; did you mean --epochs?"),
        ("--epoch=3", "unknown --epoch=3; did you mean --epochs?"),
        ("--zzz", "unknown --zzz; see --help"),
        ("--compile on", "unknown on; see --help"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--epochs -1", "--epochs -1: must be a whole number at least 0"),
        ("--epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
        ("--temperature 0", "--temperature 0.0: must be a number above 0"),
        ("--temperature nan", "--temperature nan: must be a number above 0"),
        ("--lr -0.1", "--lr -0.1: must be a number above 0"),
        ("--lr inf", "--lr inf: must be a number above 0"),
        ("--weight-decay -1", "--weight-decay -1.0: must be a number at least 0"),
        ("--warmup-epochs nan", "--warmup-epochs nan: must be a number at least 0"),
        ("--save-minutes -1", "--save-minutes -1.0: must be a number at least 0"),
        ("--crop-min-scale 1.5", "--crop-min-scale 1.5: must be a number above 0 and at most 1"),
        ("--crop-min-scale 0", "--crop-min-scale 0.0: must be a number above 0 and at most 1"),
        ("--blur 2", "--blur 2.0: must be a number at least 0 and at most 1"),
        ("--workers 0", "--workers 0: must be a whole number above 0"),
        ("--batch-size 1", "there are no negatives"),
        ("--batch-size 201", "--batch-size 201: only 200 training images; give 200 or less"),
        ("--micro-batch-size 48", "--micro-batch-size 48: must divide the batch size 64"),
        ("--micro-batch-size 1", "--micro-batch-size 1: BN has nothing to compare"),
        ("--backbone resnet19", "--backbone resnet19: choose one of resnet8, resnet101"),
        ("--optimizer adam", "argument --optimizer: invalid choice: 'adam'"),
        ("--amp fp8", "argument --amp: invalid choice: 'fp8'"),
        ("--jitter-strength 9", "--jitter-strength: at most 2.5"),
        ("--data /no/such/folder", "--data /no/such/folder: no such folder"),
        ("--preset nice", "argument --preset: invalid choice: 'nice'"),
        ("--image-size 4", "--image-size 4: must be at least 8"),
        ("--loss-backend triton", "--loss-backend triton:"),
        ("--device gpu", "--device gpu: not to be had here; give cpu or auto"),
        ("--device meta", "--device meta: not to be had here"),
        ("--device meta:x", "--device meta:x: not to be had here"),
        ("--seed -1", "--seed -1: must be a whole number at least 0"),
        ("--seed 18446744073709551616", "--seed 18446744073709551616: must be a whole number at least 0 and at most 2"),
        ("--lr 1e308", "--lr 1e+308: must be a number above 0 and at most 1e+30"),
        (f"--epochs 1{30 * '0'}", "0000: must be a whole number at least 0 and at most 2147483647"),
    ],
)
def test_bad_flags(argv, words, few_shapes, tmp_path, capsys):
    assert words in refused(capsys, *TINY, "--out", tmp_path, *argv.split())


def test_a_piece_larger_than_a_batch_that_was_lowered(tmp_path, capsys):
    flags = ["--data", photos(tmp_path / "photos", 60), "--preset", "paper", "--backbone", "resnet8", "--epochs", "1"]
    assert outcome(capsys, *flags, "--image-size", 16, "--micro-batch-size", 256, "--out", tmp_path / "run")[0] == 0


def test_an_empty_word(tmp_path, capsys):
    assert refused(capsys, *TINY, "--out", tmp_path, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_gpu(tmp_path, capsys):
    assert "--device cuda: not to be had here" in refused(capsys, *TINY, "--out", tmp_path, "--device", "cuda")


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in refused(capsys, *TINY, "--out", tmp_path / "file" / "run")
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # the superuser may write anywhere
    assert "cannot be written (Is a directory)" in refused(capsys, *TINY, "--out", tmp_path / "run")


def test_half_a_torchrun(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is set, but not by torchrun" in refused(capsys, *TINY, "--out", tmp_path)
    assert "--device cuda:1: several processes are on the CPU" in refused(capsys, *TINY, "--device", "cuda:1")


@pytest.mark.parametrize(
    "given, words",
    [
        ({"epochs": 2.0}, "--epochs 2.0: must be a whole number at least 0"),
        ({"epochs": True}, "--epochs True: must be a whole number at least 0"),
        ({"compile": 1}, "--compile 1: must be bool"),
        ({"lr": "0.1"}, "--lr 0.1: must be a number above 0"),
        ({"lr": None}, "--lr None: must be a number above 0"),
        ({"out": 3}, "--out 3: must be str"),
        ({"optimizer": "adam"}, "--optimizer adam: choose one of lars, sgd"),
    ],
)
def test_from_python_a_wrong_value_is_an_input_error(given, words):
    for make in (simclr.Config, lambda **given: simclr.Config.preset("demo", **given)):
        with pytest.raises(common.InputError, match=f"^{re.escape(words)}$"):
            make(**given)
    with pytest.raises(common.InputError, match="--preset nice: choose one of paper, cifar, demo"):
        simclr.Config.preset("nice")
    assert simclr.Config(lr=1).lr == 1  # a whole number is a float, too


def test_the_script_itself_exits_with_one_line():
    """In a process of its own, for the exit status that a shell sees."""
    done = python("simclr.py", "--batch-size", "0")
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: --batch-size 0: must be a whole number above 0\n",
    )


# ---------------------------------------------------------------------------------------------------------- data


def test_folders_without_a_picture(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    flags = ["--data", tmp_path / "photos", "--out", tmp_path / "run"]
    assert "no image to train on: it is empty" in refused(capsys, *flags)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    assert "no image to train on: 1 of type .txt" in refused(capsys, *flags)
    (tmp_path / "photos" / "a.jpg").write_text("no picture")
    status, err = outcome(capsys, *flags)  # a line names the file
    assert status == 2 and err.count("\n") == 2 and f"warning: skipped {tmp_path / 'photos' / 'a.jpg'}" in err
    assert err.splitlines()[-1].startswith("error: ") and "no image to train on: 1 of type .txt, 1 not an image" in err


def test_one_picture_is_too_few(tmp_path, capsys):
    flags = ["--data", photos(tmp_path / "one", 1, classes=None), "--out", tmp_path / "run", "--backbone", "resnet8"]
    assert "only 1 image to train on" in refused(capsys, *flags)


# ------------------------------------------------------------------------------------------- a run that was there


def edited(folder, old, new):
    path = folder / "config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_resume_of_what_cannot_be_resumed(few_shapes, tmp_path, capsys):
    resume = ["--out", tmp_path / "run", "--resume"]
    assert outcome(capsys, *TINY, *resume)[0] == 0  # a script that restarts need not know whether there is a run
    assert outcome(capsys, "--preset", "demo", *resume)[0] == 0
    words = "--preset cifar: the run in"
    assert words in refused(capsys, "--preset", "cifar", *resume)
    path, whole = tmp_path / "run" / "checkpoint.pt", (tmp_path / "run" / "checkpoint.pt").read_bytes()

    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a whole checkpoint" in refused(capsys, *resume)
    torch.save({"method": "simclr"}, path)
    assert "is not a whole checkpoint" in refused(capsys, *resume)
    path.write_bytes(whole)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"method": "other"}, path)
    assert "a checkpoint of other, not of simclr" in refused(capsys, *resume)
    path.write_bytes(whole)

    edited(tmp_path / "run", '"epochs": 1', '"epochs": "1"')
    assert "--epochs 1: must be a whole number at least 0" in refused(capsys, *resume)
    edited(tmp_path / "run", '"method": "simclr"', '"method": "moco"')
    assert "holds a run of moco" in refused(capsys, *resume)
    (tmp_path / "run" / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(capsys, *resume)
    assert path.read_bytes() == whole


class Trap:
    """What a pickle may hold: a call of any function."""

    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"method": Trap()}, "checkpoint.pt")
    for read in (lambda: common.load_checkpoint(Path("checkpoint.pt")), lambda: common.load_run(".")):
        with pytest.raises(common.InputError, match="is not a whole checkpoint"):
            read()
    assert not Path("trapped").exists()


def test_resume_with_another_network_or_other_steps(few_shapes, tmp_path, capsys):
    assert outcome(capsys, *TINY, "--out", tmp_path)[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for flags, words in (
        ("--projection-dim 32", "--projection-dim was 64, now it is 32"),
        ("--optimizer lars", "--optimizer was sgd, now it is lars"),
        ("--batch-size 32", "--batch-size was 64, now it is 32"),
        ("--seed 1", "--seed was 0, now it is 1"),
    ):
        err = refused(capsys, "--out", tmp_path, "--resume", "--epochs", "2", *flags.split())
        assert err.startswith("error: --resume:") and words in err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# ----------------------------------------------------------------------------------------------- a run that fails


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(few_shapes, tmp_path, capsys):
    flags = [*TINY, "--out", tmp_path, "--warmup-epochs", "0"]
    status, err = outcome(capsys, *flags, "--lr", "1e30")
    assert status == 1 and err.count("\n") == 1 and "none was written yet" in err
    assert re.match(r"error: .* at step [123] of 3; --lr is likely too high; ", err)
    assert outcome(capsys, *flags)[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    status, err = outcome(capsys, "--out", tmp_path, "--resume", "--epochs", "3", "--lr", "1e30")
    assert status == 1 and err.count("\n") == 1 and "the last good one is kept in" in err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("where", ["projector.0.weight", "backbone.bn1.running_var"])
def test_a_weight_that_is_not_finite_is_never_saved(where, few_shapes, tmp_path, capsys, monkeypatch):
    """The loss of the last step says nothing about the weights after it."""
    assert outcome(capsys, *TINY, "--out", tmp_path)[0] == 0
    before, log = (tmp_path / "checkpoint.pt").read_bytes(), common.Run.log

    def spoil(run, *rest):
        if run.step == 5:
            run.model.state_dict()[where].flatten()[3] = float("inf")
        log(run, *rest)

    monkeypatch.setattr(common.Run, "log", spoil)
    status, err = outcome(capsys, "--out", tmp_path, "--resume", "--epochs", "2")
    assert status == 1 and err.startswith(f"error: {where} is not finite at step 6 of 6") and err.count("\n") == 1
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@contextmanager
def a_full_disk(size):
    """No file can grow beyond so many bytes."""
    resource = pytest.importorskip("resource")
    usual, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, usual)


def test_a_full_disk_keeps_the_last_checkpoint(few_shapes, tmp_path, capsys):
    assert outcome(capsys, *TINY, "--out", tmp_path)[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with a_full_disk(100_000):
        status, err = outcome(capsys, "--out", tmp_path, "--resume", "--epochs", "2")
    assert status == 1 and "cannot write" in err and "is kept" in err and err.count("\n") == 1
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and not list(tmp_path.glob("*.part"))
    assert outcome(capsys, "--out", tmp_path, "--resume", "--epochs", "2")[0] == 0
    assert not equal(before, (tmp_path / "checkpoint.pt").read_bytes())


def test_a_folder_that_goes_away_is_not_a_full_disk(few_shapes, tmp_path, capsys, monkeypatch):
    save = common.Run.save
    monkeypatch.setattr(common.Run, "save", lambda run: shutil.rmtree(run.out) or save(run))
    status, err = outcome(capsys, *TINY, "--out", tmp_path / "run")
    assert status == 1 and err.count("\n") == 1 and "disk" not in err
    assert err.startswith(f"error: cannot write {tmp_path}/run/checkpoint.pt (No such file or directory); none was")


def test_a_full_disk_in_a_fresh_run(few_shapes, tmp_path, capsys):
    with a_full_disk(8_000):  # not even views.png
        status, err = outcome(capsys, *TINY, "--out", tmp_path)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1


# --------------------------------------------------------------------------------------- what each method refuses

REFUSED = {
    simclr: [
        (["--batch-size", "1"], "--batch-size 1: there are no negatives; give 2 or more"),
        (["--temperature", "0"], "--temperature 0.0: must be a number above 0"),
        (["--jitter-strength", "9"], "--jitter-strength: at most 2.5"),
        (["--projection-head", "conv"], "argument --projection-head: invalid choice: 'conv'"),
        (["--loss-backend", "triton"], "--loss-backend triton: backend='triton' takes"),
    ],
    moco: [
        (["--momentum", "1.5"], "--momentum 1.5: must be a number at least 0 and at most 1"),
        (["--temperature", "-1"], "--temperature -1.0: must be a number above 0"),
        (["--version", "1"], "unknown --version"),
        (["--preset", "paper-v3"], "argument --preset: invalid choice: 'paper-v3'"),
        (["--queue-size", "0"], "--queue-size 0: there are no negatives"),
        (["--mechanism", "list"], "argument --mechanism: invalid choice: 'list'"),
        (["--bn-splits", "40", "--batch-size", "64"], "--bn-splits 40: for a batch of 64 give 32 or less"),
        (["--mechanism", "memory-bank", "--symmetric"], "--symmetric: a memory bank has one vector an image"),
        (["--mechanism", "memory-bank", "--batch-size", "200"], "--batch-size 200: leaves no other image"),
        (["--mechanism", "end-to-end", "--batch-size", "1"], "--batch-size 1: no negatives"),
        (["--mechanism", "end-to-end", "--loss-backend", "blocked"], "--loss-backend blocked: end-to-end has"),
        (["--loss-backend", "triton"], "--loss-backend triton: backend='triton' takes"),
    ],
    pairwise: [
        (["--loss", "best"], "argument --loss: invalid choice: 'best'"),
        (["--margin", "0"], "--margin 0.0: must be a number above 0"),
        (["--epsilon", "-1"], "--epsilon -1.0: must be a number at least 0"),
        (["--negatives", "hard"], "argument --negatives: invalid choice: 'hard'"),
        (["--batch-size", "1"], "--batch-size 1: there are no negatives; give 2 or more"),
        (["--jitter-strength", "9"], "--jitter-strength: at most 2.5"),
    ],
    byol: [
        (["--momentum", "1.5"], "--momentum 1.5: must be a number at least 0 and at most 1"),
        (["--blur-1", "-1"], "--blur-1 -1.0: must be a number at least 0 and at most 1"),
        (["--batch-size", "1"], "--batch-size 1: BN has nothing to compare then"),
        (["--jitter-strength", "6"], "--jitter-strength: at most 5"),
        (["--optimizer", "adam"], "argument --optimizer: invalid choice: 'adam'"),
        (["--preset", "paper-200"], "argument --preset: invalid choice: 'paper-200'"),
        (["--loss-backend", "naive"], "unknown --loss-backend"),
    ],
    simsiam: [
        (["--predictor", "linear"], "argument --predictor: invalid choice: 'linear'"),
        (["--batch-size", "1"], "--batch-size 1: BN has nothing to compare then"),
        (["--jitter-strength", "6"], "--jitter-strength: at most 5"),
        (["--warmup-epochs", "nan"], "--warmup-epochs nan: must be a number at least 0"),
        (["--projector-layers", "0"], "--projector-layers 0: must be a whole number above 0"),
        (["--predictor", "none", "--head-bn", "all"], "--head-bn all: there is no predictor"),
        (["--loss-backend", "naive"], "unknown --loss-backend"),
    ],
    supcon: [
        (["--loss", "triplet"], "argument --loss: invalid choice: 'triplet'"),
        (
            ["--loss", "cross-entropy", "--loss-backend", "blocked"],
            "--loss-backend blocked: cross-entropy has no kernel",
        ),
        (["--temperature", "-1"], "--temperature -1.0: must be a number above 0"),
        (["--base-temperature", "0"], "--base-temperature 0.0: must be a number above 0"),
        (["--jitter-strength", "9"], "--jitter-strength: at most 2.5"),
        (["--batch-size", "1"], "--batch-size 1: there are no negatives"),
        (["--loss-backend", "triton"], "--loss-backend triton: backend='triton' takes"),
        (["--stage", "2"], "unknown --stage"),
    ],
    swav: [
        (
            ["--image-size", "48"],
            "--image-size 48: the first of --crops 2x32 must be of that side; give both, such as --crops 2x48",
        ),
        (["--crops", "1x32"], "--crops 1x32: give two or more"),
        (["--batch-size", "1"], "--batch-size 1: one image has no clusters"),
        (
            ["--crops", "2x32,1x16", "--small-crop-min-scale", "0.9"],
            "--small-crop-min-scale: at most --crop-min-scale",
        ),
        (["--small-crop-min-scale", "0"], "--small-crop-min-scale 0.0: must be a number above 0 and at most 1"),
        (["--queue-size", "100", "--batch-size", "128"], "--queue-size 100: give 0, or at least the batch's 128"),
        (["--epsilon", "0"], "--epsilon 0.0: must be a number above 0"),
        (["--prototypes", "1"], "--prototypes 1: there is nothing to tell apart"),
        (["--prototypes", "0"], "--prototypes 0: must be a whole number above 0"),
        (["--final-lr-scale", "2"], "--final-lr-scale 2.0: must be a number at least 0 and at most 1"),
        (["--jitter-strength", "9"], "--jitter-strength: at most 2.5"),
        (["--loss-backend", "naive"], "unknown --loss-backend"),
    ],
}


@pytest.mark.parametrize(
    "method, flags, words",
    [pytest.param(m, *row, id=" ".join([m.__name__, *row[0]])) for m, rows in REFUSED.items() for row in rows],
)
def test_what_a_method_cannot_run_is_one_line(method, flags, words, few_shapes, tmp_path, capsys, monkeypatch):
    if "triton" in flags and torch.cuda.is_available():
        pytest.skip("triton runs here")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert words in refusal(method, flags, tmp_path, capsys)


@pytest.mark.parametrize("method, loss", [(simclr, "nt_xent"), (supcon, "sup_con out"), (moco, "info_nce")])
def test_without_kernels_the_naive_loss_runs_and_another_is_refused(
    method, loss, few_shapes, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(method, "kernels", None)
    given = {"epochs": 1, "batch_size": 64, "knn_every": 0, "hidden_dim": 32, "projection_dim": 16}
    method.train(method.Config.preset("demo", **given, out=str(tmp_path)))
    assert f"{loss}, naive;" in capsys.readouterr().out
    assert "the folder kernels/ is not here" in refusal(method, ["--loss-backend", "blocked"], tmp_path, capsys)
