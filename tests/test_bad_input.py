"""What users give wrong: one clear line on stderr, the exit status of the contract, no traceback, nothing lost."""

import importlib
import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import simclr
from tests.helpers import METHODS, at_each_step, equal, few_shapes, flags, python, refusal, saved, train

TINY = ["--preset", "demo", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "64", "--image-size", "16"]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """To draw curves.png takes longer than a run does here."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def outcome(capsys, *argv, method=simclr, data=None):
    """(exit status, stderr) of a script called with these flags, without the price of a new process."""
    status = 0
    try:
        with common.exit_status():
            method.train(common.parse_args(method.Config, [str(a) for a in argv]), data or few_shapes())
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- flags

REFUSED = """
simclr    --epoch 3                                           unrecognized arguments: --epoch 3; --help lists
simclr    --temperatur 0.3                                    unrecognized arguments: --temperatur 0.3
simclr    --compile on                                        unrecognized arguments: on
simclr    --epochs                                            argument --epochs: expected one argument
simclr    --epochs 1.5                                        argument --epochs: invalid int value: '1.5'
simclr    --epochs -1                                         --epochs -1: give a whole number, 0 or more
simclr    --epochs 1 --warmup-epochs 2                        --warmup-epochs 2.0: give --warmup-epochs <= --epochs
simclr    --temperature 0                                     --temperature 0.0: give --temperature > 0
simclr    --lr 0                                              --lr 0.0: give --lr > 0
simclr    --crop-min-scale 1.5                                --crop-min-scale 1.5: give 0 < --crop-min-scale <= 1
simclr    --crop-min-scale 0                                  --crop-min-scale 0.0: give 0 < --crop-min-scale <= 1
simclr    --blur 2                                            --blur 2.0: give --blur <= 1
simclr    --jitter-strength 9                                 --jitter-strength 9.0: give --jitter-strength <= 2.5
simclr    --batch-size 0                                      --batch-size 0: give --batch-size > 0
simclr    --batch-size 1                                      --batch-size 1: give --batch-size > 1
simclr    --batch-size 201                                    --batch-size 201: there are 200 training images; give
simclr    --micro-batch-size 1                                --micro-batch-size 1: give --micro-batch-size != 1
simclr    --micro-batch-size 48                               --micro-batch-size 48: give a divisor of 128
simclr    --image-size 4                                      --image-size 4: give --image-size >= 8
simclr    --backbone resnet19                                 --backbone resnet19: Unknown model resnet19; give resnet8
simclr    --backbone vgg11                                    --backbone vgg11
simclr    --init nowhere.pt                                   --init nowhere.pt: No such file
simclr    --optimizer adam                                    argument --optimizer: invalid choice: 'adam'
simclr    --amp fp16                                          argument --amp: invalid choice: 'fp16'
simclr    --preset nice                                       argument --preset: invalid choice: 'nice'
simclr    --loss-backend triton                               --loss-backend triton
simclr    --device gpu                                        --device gpu
simclr    --device meta                                       --device meta
simclr    --device cuda:77                                    --device cuda:77
simclr    --out /dev/null/run                                 --out /dev/null/run: Not a directory
moco      --momentum 1.5                                      --momentum 1.5: give --momentum <= 1
moco      --queue-size 0                                      --queue-size 0: give --queue-size > 0
moco      --queue-size 201                                    --queue-size 201: give at most 200
moco      --bn-splits 40                                      --batch-size 64 --bn-splits 40: give
moco      --mechanism memory-bank --symmetric                 --symmetric: not with memory-bank
moco      --mechanism memory-bank --batch-size 200            --batch-size 200: give less than 200
moco      --mechanism list                                    argument --mechanism: invalid choice: 'list'
pairwise  --loss best                                         argument --loss: invalid choice: 'best'
pairwise  --negatives hard                                    argument --negatives: invalid choice: 'hard'
pairwise  --loss infonce --margin 7                           --margin: --loss infonce does not use it
byol      --momentum 1.5                                      --momentum 1.5: give --momentum <= 1
byol      --blur-1 2                                          --blur-1 2.0: give --blur-1 <= 1
byol      --batch-size 1                                      --batch-size 1: give --batch-size > 1
byol      --loss-backend naive                                unrecognized arguments: --loss-backend naive
simsiam   --projector-layers 0                                --projector-layers 0: give --projector-layers > 0
simsiam   --predictor none --head-bn all                      --head-bn all: --predictor none has no BN
supcon    --loss cross-entropy --loss-backend blocked         --loss-backend blocked: cross-entropy has no kernel
supcon    --base-temperature 0                                --base-temperature 0.0: give --base-temperature > 0
swav      --image-size 48                                     --image-size 48: --crops 2x32 begins with another side
swav      --crops 1x32                                        --crops 1x32: give two crops or more
swav      --crops 2x32,1x16 --small-crop-min-scale 0.9        --small-crop-min-scale 0.9
swav      --queue-size 10                                     --queue-size 10: give --queue-size >= --batch-size
swav      --queue-size 201 --queue-start-epoch 0              --queue-size 201: there are 200 training images
swav      --queue-size 128 --queue-start-epoch 5              --queue-start-epoch 5: --epochs 1 is over by then
swav      --prototypes 1                                      --prototypes 1: give --prototypes > 1
swav      --epsilon 0                                         --epsilon 0.0: give --epsilon > 0
swav      --final-lr-scale 2                                  --final-lr-scale 2.0: give --final-lr-scale <= 1
"""
REFUSED = [re.split("  +", line) for line in REFUSED.strip().splitlines()]


@pytest.mark.parametrize("method, flags, words", REFUSED, ids=[f"{method} {flags}" for method, flags, _ in REFUSED])
def test_what_cannot_run_is_one_line_with_advice(method, flags, words, tmp_path, capsys, monkeypatch):
    if {"triton", "cuda:77"} & {*flags.split()} and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # on a CPU the kernels run in the interpreter alone
    line = refusal(importlib.import_module(method), flags.split(), tmp_path / "run", capsys)
    assert line.startswith("error: ") and words in line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_every_method_is_finite_and_at_least_0(method):
    config = importlib.import_module(method).Config
    for name, kind in flags(config).items():
        for value in {int: (-1, 1.5, True, "1", None), float: (-0.1, np.inf, np.nan, "1", None)}.get(kind, (3, None)):
            with pytest.raises(common.InputError, match=f"^{re.escape(f'{common.dashed(name)} {value}: give ')}"):
                config.preset("demo", **{name: value})


def test_numbers_of_numpy_and_whole_numbers_for_others_are_taken():
    c = simclr.Config(lr=1, epochs=np.int64(20), temperature=np.float32(0.5), batch_size=64.0)
    kinds = [type(value) for value in (c.lr, c.epochs, c.temperature, c.batch_size)]
    assert kinds == [float, int, float, int]
    with pytest.raises(common.InputError, match="--preset nice: give one of paper, cifar, demo, photos"):
        simclr.Config.preset("nice")


def test_an_empty_word_and_the_script_itself(tmp_path, capsys):
    """In a process of its own, for the exit status that a shell sees."""
    assert outcome(capsys, *TINY, "--out", tmp_path, "")[0] == 2
    done = python("simclr.py", "--batch-size", "0")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: --batch-size 0: give --batch-size > 0\n")


def test_weights_that_do_not_fit_are_refused_with_the_key(tmp_path):
    c, path = simclr.Config.preset("demo"), tmp_path / "w.pth"
    good = common.build_backbone(c).state_dict()
    for state, words in (
        (good | {"layer9.x": good["bn1.bias"]}, "layer9.x"),
        ({n: v for n, v in good.items() if n != "layer1.conv2.weight"}, "layer1.conv2.weight"),
        (good | {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "conv1.weight"),
        ([1], ""),
    ):
        torch.save(state, path)
        with pytest.raises(common.InputError, match=f"^--init {path}: .*{words}") as error:
            common.build_backbone(simclr.Config.preset("demo", init=str(path)))
        assert "\n" not in str(error.value)
    with pytest.raises(common.InputError, match="^--init imagenet: .*give random, imagenet, or a file"):
        common.build_backbone(simclr.Config.preset("demo", init="imagenet"))  # torchvision has none of resnet8


# ------------------------------------------------------------------------------------------- a run that was there


class Trap:
    """What a pickle may hold: a call of any function."""

    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_a_checkpoint_or_weights_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"method": Trap(), "span": None}, "checkpoint.pt")
    reads = [lambda: common.load_checkpoint("."), lambda: common.load_run(".")]
    reads.append(lambda: common.build_backbone(simclr.Config.preset("demo", init="checkpoint.pt")))
    for read in reads:
        with pytest.raises(common.InputError, match="checkpoint.pt"):
            read()
    assert not Path("trapped").exists()


def test_resume_of_what_cannot_be_resumed(tmp_path, capsys):
    """Whatever is wrong, the checkpoint that is there stays."""
    run, path = tmp_path / "run", tmp_path / "run" / "checkpoint.pt"
    resume = ["--resume", run]
    assert "Not a directory" in outcome(capsys, *TINY, "--resume", "/dev/null/run")[1]
    assert outcome(capsys, *TINY, *resume)[0] == 0  # a script that restarts need not know whether there is a run
    whole, config = path.read_bytes(), (run / "config.json").read_text()
    texts = {
        "": "config.json",
        "{": "config.json",
        "[]": "config.json",
        '{"method": "simclr", "zzz": 1}': "config.json",
    }
    texts |= {
        config.replace('"simclr"', '"moco"', 1): "a run of moco.py",
        config.replace("64", '"64"', 1): "--batch-size",
    }
    texts[config.replace("16", "-1", 1)] = "--image-size -1"
    for text, words in texts.items():
        (run / "config.json").write_text(text)
        status, err = outcome(capsys, *resume)
        assert status == 2 and err.count("\n") == 1 and words in err, err
    (run / "config.json").write_text(config)
    for given, words in (
        ("--projection-dim 32", "--projection-dim was 64"),
        ("--seed 1", "--seed was 0"),
        ("--preset cifar", "was"),
        ("--out elsewhere", "--out"),
    ):
        status, err = outcome(capsys, *resume, *given.split())
        assert status == 2 and err.count("\n") == 1 and words in err, err
    assert path.read_bytes() == whole
    for content in (whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        status, err = outcome(capsys, *resume)
        assert status == 2 and err.count("\n") == 1 and str(path) in err


# ----------------------------------------------------------------------------------------------- a run that fails


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, capsys):
    out = train(simclr, tmp_path / "run")["out"]
    before = saved(out)
    status, err = outcome(capsys, "--resume", out, "--epochs", "3", "--lr", "1e18")
    assert status == 1 and err.count("\n") == 1
    assert re.match(rf"error: .* is not finite at step [456]; give a lower --lr; {out} has the last save", err)
    assert saved(out, "step") == 3 and equal(saved(out), before)


@pytest.mark.parametrize("where", ["projector.0.weight", "backbone.bn1.running_var"])
def test_a_weight_that_is_not_finite_is_never_saved(where, tmp_path, capsys, monkeypatch):
    """The loss of the last step says nothing about the weights after it."""
    out = train(simclr, tmp_path)["out"]

    def spoil(run, *_):
        if run.step == 5:
            run.model.state_dict()[where].flatten()[3] = float("inf")

    at_each_step(monkeypatch, spoil)
    status, err = outcome(capsys, "--resume", out, "--epochs", "2")
    assert status == 1 and err.startswith(f"error: {where} is not finite at step 6;") and err.count("\n") == 1
    assert saved(tmp_path, "step") == 3 and all(torch.isfinite(value).all() for value in saved(tmp_path).values())


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


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, capsys):
    out = train(simclr, tmp_path / "run")["out"]
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with a_full_disk(100_000):
        status, err = outcome(capsys, "--resume", out, "--epochs", "2")
        assert status == 1 and "checkpoint.pt" in err and "File too large" in err and err.count("\n") == 1
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before and not [*tmp_path.glob("run/*.part")]
    with a_full_disk(8_000):  # not even views.png
        status, err = outcome(capsys, *TINY, "--out", tmp_path / "new")
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert outcome(capsys, "--resume", out, "--epochs", "2")[0] == 0 and saved(out, "step") == 6


DAEMONIC = """
import multiprocessing, sys
import common, simclr

def work():
    with common.exit_status():
        simclr.train(common.parse_args(simclr.Config, sys.argv[1:]))

process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
process.start()
process.join()
sys.exit(process.exitcode)
"""


@pytest.mark.slow  # a process takes seconds to start
def test_a_daemonic_process_which_cannot_start_workers_decodes_itself(photos, tmp_path):
    """A worker of multiprocessing.Pool is one."""
    flags = ["--data", photos, "--resident-gb", "0", "--batch-size", "110", "--workers", "1", "--out", tmp_path]
    done = python("-c", DAEMONIC, *TINY, *flags)
    assert done.returncode == 0 and saved(tmp_path, "step") == 2, done.stderr


def test_a_folder_without_two_pictures(tmp_path, capsys):
    """Every other folder is tested in test_images.py."""
    (tmp_path / "photos").mkdir()
    flags = ["--data", tmp_path / "photos", "--out", tmp_path / "run"]
    for found in ("0 picture", "1 picture"):
        with pytest.raises(SystemExit) as end, common.exit_status():
            simclr.train(common.parse_args(simclr.Config, [str(flag) for flag in flags]))
        err = capsys.readouterr().err
        assert end.value.code == 2 and f"--data {tmp_path}/photos: {found}" in err and err.count("\n") == 1
        Image.fromarray(np.zeros((40, 32, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
