"""Bad input: one clear line on stderr, the exit status of the contract, no traceback, nothing lost."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import linear_eval
import simclr
from tests.helpers import python

TINY = ["--data", "shapes", "--epochs", "1", "--batch-size", "64", "--knn-every", "0", "--preset", "demo"]

FEW_SHAPES = 400


def outcome(capsys, argv, main=None):
    """(exit status, stderr) of `python simclr.py ARGV`, without the price of a new process."""
    status = 0
    try:
        with common.exit_status():
            (main or (lambda a: simclr.train(common.parse_args(simclr.Config, a))))([str(a) for a in argv])
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


def photos(root, n=40, size=(40, 32), classes=("a", "b")):
    rng = np.random.default_rng(0)
    for i in range(n):
        path = root / classes[i % len(classes)] / f"{i:03}.png" if classes else root / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return root


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--epoch", "3"], "unknown flag --epoch; did you mean --epochs?"),
        ([""], "unexpected word ''; give its flag first"),
        (
            ["--compile", "on"],
            "unexpected word on; give its flag first, as in --data PATH (an on/off flag takes no word)",
        ),
        (["--zzz"], "unknown flag --zzz; see --help"),
        (["--epochs", "0"], "--epochs 0: must be >= 1"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--temperature", "0"], "--temperature 0.0: must be > 0"),
        (["--temperature", "nan"], "--temperature nan: must be > 0"),
        (["--lr", "-0.1"], "--lr -0.1: must be > 0"),
        (["--lr", "inf"], "--lr inf: must be > 0"),
        (["--weight-decay", "-1"], "--weight-decay -1.0: must be >= 0"),
        (["--crop-min-scale", "1.5"], "--crop-min-scale 1.5: must be > 0, <= 1"),
        (["--flip-probability", "2"], "--flip-probability 2.0: must be 0 to 1"),
        (["--batch-size", "100000"], "--batch-size 100000: only 400 training images; give 400 or less"),
        (["--batch-size", "1"], "there are no negatives"),
        (["--micro-batch-size", "48"], "--micro-batch-size 48: must divide the batch size"),
        (["--backbone", "resnet19"], "--backbone resnet19: unknown; did you mean resnet"),
        (["--optimizer", "adam"], "argument --optimizer: invalid choice: 'adam'"),
        (["--augment", "crop,colour"], "--augment crop,colour: no 'colour'; take some of crop"),
        (["--jitter-strength", "9"], "--jitter-strength 9.0: at most 2.5"),
        (["--data", "/no/such/folder"], "--data /no/such/folder: no such folder"),
        (["--preset", "nice"], "argument --preset: invalid choice: 'nice'"),
        (["--image-size", "4"], "--image-size 4: must be >= 8"),
        (["--loss-backend", "triton"], "--loss-backend triton:"),
        (["--seed", "-1"], "--seed -1: must be >= 0"),
        (["--resume"], "--resume: no run in"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_flags(argv, words, few_shapes, tmp_path, capsys):
    status, err = outcome(capsys, [*TINY, "--out", tmp_path / "run", *argv])
    assert status == 2
    assert err.startswith("error: ") and words in err and err.count("\n") == 1, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_gpu(tmp_path, capsys):
    status, err = outcome(capsys, [*TINY, "--out", tmp_path, "--device", "cuda"])
    assert status == 2 and err.startswith("error: --device cuda:") and err.count("\n") == 1


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, err = outcome(capsys, [*TINY, "--out", tmp_path / "file" / "run"])
    assert status == 2 and "cannot be written" in err and err.count("\n") == 1


def test_torchrun_is_refused_for_now(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, err = outcome(capsys, [*TINY, "--out", tmp_path])
    assert status == 2 and "not supported yet" in err


def test_empty_folder_and_folder_of_text(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for _ in range(2):
        status, err = outcome(capsys, ["--data", tmp_path / "photos", "--out", tmp_path / "run"])
        assert status == 2 and "no images in it" in err and err.count("\n") == 1
        (tmp_path / "photos" / "notes.txt").write_text("no picture")


def test_folder_where_nothing_can_be_decoded(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("no picture")
    status, err = outcome(capsys, ["--data", tmp_path / "photos", "--out", tmp_path / "run"])
    assert status == 2 and "error: " in err.splitlines()[-1] and "none of its 1 images can be decoded" in err


@pytest.mark.parametrize("resident", ["4", "0"])
def test_damaged_files_are_named_skipped_and_counted(resident, tmp_path, capsys):
    root = photos(tmp_path / "photos")
    good = (root / "a" / "000.png").read_bytes()
    (root / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is not a JPEG")
    (root / "a" / "notes.txt").write_text("text among images")
    (root / "b" / "empty.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(root / "b" / "dot.png")
    if resident == "4":  # streamed pictures are only decoded later: the next one then stands in
        (root / "b" / "cut.png").write_bytes(good[: len(good) // 2])
    c = simclr.Config(data=str(root), image_size=32, resident_gb=float(resident), workers=1)
    data = common.load_data(c, torch.device("cpu"))
    err = capsys.readouterr().err
    names = ["broken.jpg", "empty.png", "dot.png"] + ["cut.png"] * (resident == "4")
    assert sorted(Path(p).name for p, _ in data.skipped) == sorted(names)
    for name in names:
        assert err.count(name) == 1
    assert f"{len(names)} skipped" in data.describe() and len(data.train) + len(data.test) == 40


def test_checkpoint_of_another_method_truncated_or_missing(few_shapes, tmp_path, capsys):
    run = tmp_path / "run"
    argv = [*TINY, "--out", run]
    assert outcome(capsys, argv)[0] == 0
    whole = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    for main, arguments in ((None, [*argv, "--resume"]), (linear_eval.main, [run])):
        status, err = outcome(capsys, arguments, main)
        assert status == 2 and "is not a whole checkpoint" in err and err.count("\n") == 1
    torch.save({"method": "other"}, run / "checkpoint.pt")
    status, err = outcome(capsys, [*argv, "--resume"])
    assert status == 2 and "a checkpoint of other, not of simclr" in err
    (run / "checkpoint.pt").unlink()
    status, err = outcome(capsys, [run], linear_eval.main)
    assert status == 2 and "no checkpoint" in err
    (run / "config.json").write_text('{"method": "moco"}')
    status, err = outcome(capsys, [*argv, "--resume"])
    assert status == 2 and "another method" in err
    (run / "config.json").write_text("{")
    status, err = outcome(capsys, [*argv, "--resume"])
    assert status == 2 and "cannot be read" in err


def test_a_value_of_the_wrong_type(few_shapes, tmp_path, capsys):
    """As an edited config.json may hold."""
    assert outcome(capsys, [*TINY, "--out", tmp_path])[0] == 0
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"epochs": 1', '"epochs": "1"'))
    status, err = outcome(capsys, ["--out", tmp_path, "--resume"])
    assert status == 2 and "--epochs 1: must be int" in err


def test_one_picture_is_too_few(tmp_path, capsys):
    argv = ["--data", photos(tmp_path / "one", n=1, classes=None), "--out", tmp_path / "run", "--backbone", "resnet8"]
    status, err = outcome(capsys, argv)
    assert status == 2 and "only 1 image to train on" in err


def test_pieces_that_do_not_divide_a_lowered_batch(tmp_path, capsys):
    argv = ["--data", photos(tmp_path / "few", classes=None), "--out", tmp_path / "run", "--backbone", "resnet8"]
    status, err = outcome(capsys, [*argv, "--micro-batch-size", "256"])
    assert status == 2 and "--micro-batch-size 256: must divide the batch size 16" in err


def test_resume_with_another_network(few_shapes, tmp_path, capsys):
    assert outcome(capsys, [*TINY, "--out", tmp_path])[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for flags in (["--projection-dim", "32"], ["--optimizer", "lars"], ["--batch-size", "32"], ["--batch-size", "60"]):
        status, err = outcome(capsys, ["--out", tmp_path, "--resume", "--epochs", "2", *flags])
        assert status == 2 and err.startswith("error: --resume:") and err.count("\n") == 1, err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(few_shapes, tmp_path, capsys):
    argv = [*TINY, "--out", tmp_path, "--warmup-epochs", "0"]
    status, err = outcome(capsys, [*argv, "--lr", "1e30"])
    assert status == 1 and "--lr is likely too high" in err and "none was written yet" in err and err.count("\n") == 1
    assert outcome(capsys, argv)[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    status, err = outcome(capsys, [*argv, "--resume", "--epochs", "3", "--lr", "1e30"])
    assert status == 1 and "last good one is kept" in err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    common.load_checkpoint(tmp_path / "checkpoint.pt", "simclr")


def test_a_full_disk_keeps_the_last_checkpoint(few_shapes, tmp_path, capsys, monkeypatch):
    resource = pytest.importorskip("resource")
    assert outcome(capsys, [*TINY, "--out", tmp_path])[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may grow beyond 100 kB
    try:
        status, err = outcome(capsys, [*TINY, "--out", tmp_path, "--resume", "--epochs", "2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert status == 1 and "cannot write" in err and "is kept" in err and err.count("\n") == 1
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_in_a_fresh_run(few_shapes, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))  # not even views.png
    try:
        status, err = outcome(capsys, [*TINY, "--out", tmp_path])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1


def test_a_download_that_fails_says_so(tmp_path, capsys, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    argv = ["--data", "cifar10", "--data-dir", tmp_path / "none", "--out", tmp_path / "run"]
    status, err = outcome(capsys, argv)
    assert status == 2 and "the download failed" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--label-fraction", "0"], "--label-fraction 0.0: must be > 0"),
        (["--l2", "-1"], "--l2 -1.0: must be >= 0"),
        (["--feature", "z"], "unknown flag --feature; did you mean --features?"),
        (["--data", "/no/such"], "no such folder"),
    ],
)
def test_bad_flags_of_linear_eval(argv, words, few_shapes, tmp_path, capsys):
    simclr.train(common.parse_args(simclr.Config, [*TINY, "--out", str(tmp_path)]))
    capsys.readouterr()
    status, err = outcome(capsys, [tmp_path, *argv], linear_eval.main)
    assert status == 2 and words in err and err.count("\n") == 1


def test_linear_eval_needs_labels(few_shapes, tmp_path, capsys):
    simclr.train(common.parse_args(simclr.Config, [*TINY, "--out", str(tmp_path / "run")]))
    flat = photos(tmp_path / "flat", classes=None)
    status, err = outcome(capsys, [tmp_path / "run", "--data", flat], linear_eval.main)
    assert status == 2 and "give a set with labels" in err


def test_the_script_itself_exits_with_one_line():
    """In a process of its own, for the exit status that a shell sees."""
    done = python("simclr.py", "--epochs", "0")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: --epochs 0: must be >= 1\n")
