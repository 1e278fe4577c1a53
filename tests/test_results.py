"""results.py, pipeline.py and peers.py: the protocol, its rule, stopping and going on; and what the races compare."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from torchvision.transforms import functional as TF

import common
import images
import simclr
from benchmarks import loss, peers, pipeline, results, table
from tests.helpers import ROOT, python

CPU = torch.device("cpu")


def settings(*words):
    return results.parser().parse_args(["--data", "cifar10", *words])


def test_a_tenth_to_train_on_and_another_to_judge_by():
    pixels, labels = images.make_shapes(1_000, 0, 16)
    everything = images.from_tensors(pixels, labels, CPU)
    part = results.tenth(everything)
    rows, judged = set(part.train.rows.tolist()), set(part.test.rows.tolist())
    assert not rows & judged and not (rows | judged) & set(everything.test.rows.tolist())
    assert part.name == everything.name and part.classes == everything.classes
    for split in (part.train, part.test):
        assert torch.equal(split.labels, labels[split.rows])
        counts, whole = split.labels.bincount(), everything.train.labels.bincount()
        assert ((counts - whole / 10).abs() < 1).all()
    (x,) = next(part.train.views([torch.arange(3)], [(16, None)]))
    assert torch.equal((x * 255).round().byte(), pixels[part.train.rows[:3]])


@pytest.mark.parametrize(
    "row, lr",  # three times the preset's for N = 64: SimCLR, BYOL and SimSiam scale theirs by N themselves
    [("SimCLR", 3.0), ("BYOL", 0.3), ("SimSiam", 0.09), ("MoCo v2", 0.18 / 8), ("SwAV", 1.2 / 2), ("SupCon", 1.5 / 16)],
)
def test_a_row_is_the_preset_but_for_the_protocol(row, lr):
    args = settings("--batch-size", "64", "--backbone", "resnet18")
    config = results.config_of(row, args, ["--amp", "bf16"], 5, rate=3, epochs=20, out="runs/x")
    assert config.lr == pytest.approx(lr, rel=0.01)
    assert (config.epochs, config.warmup_epochs, config.seed, config.amp) == (20, 2.0, 5, "bf16")
    ours = {"data", "backbone", "epochs", "batch_size", "warmup_epochs", "lr", "seed", "knn_every", "out", "amp"}
    assert config.given == ours | ({"projection_head"} if row == "MoCo v2" else set())
    train, judge = results.command(config).split(" && ")
    words, method = train.split(), config.method()
    assert words[:2] == ["python", f"{method}.py"] and judge == f"python linear_eval.py runs/{method}"
    same = common.parse_args(type(config), [*words[2:], "--out", "runs/x"])
    assert same == config and "--out" not in words


def test_the_rate_is_the_best_of_the_short_runs_and_is_used_once(monkeypatch, tmp_path, few_shapes):
    made = []

    def train(config, data):
        made.append((config.lr, config.epochs, config.seed, len(data.train)))
        (tmp_path / config.out).mkdir(parents=True)
        (tmp_path / config.out / "log.csv").write_text("epoch,images_per_second\n1,200\n2,100\n3,400\n")
        if config.lr == 10:
            raise common.Diverged("the loss is nan")
        if config.seed == 8:
            raise common.RunFailure("cannot write: the disk is full")
        return {"knn_top1": {1.0: 0.4, 3.0: 0.5}[config.lr]}

    monkeypatch.setattr(simclr, "train", train)
    monkeypatch.setattr(common, "load_run", lambda out: (None, torch.nn.Identity()))
    monkeypatch.setattr(results.linear_eval, "class_of", lambda *rest: {"linear_top1": 0.6})
    monkeypatch.chdir(tmp_path)
    args = settings("--data", "shapes", "--epochs", "6", "--batch-size", "10", "--out", "out")
    for _ in range(2):  # the second finds all done
        results.one_row("SimCLR", 0, args, [])
    assert [m[:3] for m in made] == [(1, 2, 0), (3, 2, 0), (10, 2, 0), (3, 6, 0)]
    assert [m[3] for m in made] == [20, 20, 20, 200]
    results.one_row("SimCLR", 7, args, [])
    assert made[4:] == [(3, 6, 7, 200)]  # by the rule's choice of the first seed
    found = json.loads((tmp_path / "out/SimCLR/seed-0/result.json").read_text())
    assert found["images_per_second"] == 200 and found["linear_top1"] == 0.6
    assert found["minutes"] == pytest.approx(200 * (1 / 100 + 1 / 400 + 1 / 200) / 60)
    args.out, made[:] = "another", []
    results.one_row("SimCLR", 7, args, [])  # first, of two at a time
    assert [m[:3] for m in made] == [(1, 2, 0), (3, 2, 0), (10, 2, 0), (3, 6, 7)]
    args.out = "out"
    with pytest.raises(common.RunFailure, match="disk is full"):
        results.one_row("SimCLR", 8, args, [])
    assert not (tmp_path / "out/SimCLR/seed-8/result.json").exists()  # to be made again
    setting, some, *_ = results.report(settings("--rows", "SimCLR", "--out", "out")).split("\n\n")
    assert "| SimCLR, 1 of 3 seeds | 3 | 0.500 |" in some and f"code {results.code()}" in setting
    said = results.report(settings("--rows", "SimCLR", "--seeds", "0", "7", "--out", "out"))
    _, first, tried, commands = said.split("\n\n")
    assert re.search(r"\| SimCLR \| 3 \| 0.500 \(0.500 to 0.500\) \| 0.600 \(.*\) \| 200 \(", first)
    assert "| SimCLR | 0.400 (1) | 0.500 (3) | diverged (10) |" in tried
    assert len(commands.split("\n")) == 2 and "--lr 3.0 " in commands


@pytest.mark.parametrize(
    "words, refused",
    [
        ("--lr 1", "--lr: the protocol sets it"),
        ("--seed=1", "--seed: the protocol sets it"),
        ("--loss cross-entropy", "--loss: the protocol sets it"),
        ("--bogus 1", "unknown --bogus"),
        ("--jobs 0", "--jobs, --threads: give 1 or more"),
        ("--epochs 0", "--epochs 0: give 1 or more"),
        ("--rates 1 0", "--rates 0: give multiples"),
        ("--rates 1 1.0", "--rates 1 1: give each once"),
        ("--seeds 0 0", "--seeds 0 0: give each once"),
        ("--seeds 0 -1", "--seed -1: must be"),
        ("--backbone resnet9", "--backbone resnet9: choose one of"),
        ("--device nope", "--device nope"),
        ("--data /no/such", "--data /no/such: no such folder"),
    ],
)
def test_what_no_table_can_have_is_refused_before_any_run(words, refused, split_photos, tmp_path, monkeypatch):
    monkeypatch.setattr(results.subprocess, "Popen", lambda *a, **b: pytest.fail("nothing is to be run"))
    given = ["--data", str(split_photos), "--rows", "untrained", "--out", str(tmp_path / "out")]
    with pytest.raises(images.InputError, match=re.escape(refused)):
        results.main([*given, *words.split()])
    assert not (tmp_path / "out").exists()


def test_another_protocol_in_the_same_folder_is_refused(split_photos, tmp_path, monkeypatch):
    monkeypatch.setattr(results.subprocess, "Popen", lambda *a, **b: Mock(wait=lambda: 0))
    given = ["--data", str(split_photos), "--rows", "untrained", "--out", str(tmp_path)]
    results.main(given)
    results.main([*given, "--jobs", "2"])
    for change in ("--epochs 3", "--seeds 1", "--amp bf16"):
        with pytest.raises(images.InputError, match="of another protocol"):
            results.main([*given, *change.split()])


def test_a_row_that_fails_is_named_and_the_status_says_so(tmp_path):
    (tmp_path / "flat").mkdir()
    for i, picture in enumerate(images.make_shapes(40, 0, 32)[0]):
        TF.to_pil_image(picture).save(tmp_path / "flat" / f"{i}.png")
    command = ["benchmarks/results.py", "--data", tmp_path / "flat", "--rows", "SimCLR", "--seeds", "0", "--threads", 1]
    done = python(*command, "--out", tmp_path / "out")
    assert done.returncode == 1 and "error: SimCLR, seed 0: see the files" in done.stderr, done.stderr
    assert "exit status 2: error: --data" in done.stdout and "give images that all have a label" in done.stdout


@pytest.fixture(scope="module")
def split_photos(tmp_path_factory):
    """600 pictures in train/, 100 in test/."""
    root = tmp_path_factory.mktemp("split")
    for part, count, seed in (("train", 600, 0), ("test", 100, 1)):
        for i, (picture, label) in enumerate(zip(*images.make_shapes(count, seed, 32), strict=True)):
            path = root / part / str(label.item()) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(picture).save(path)
    return root


@pytest.mark.slow
def test_quick_makes_every_row(split_photos, tmp_path):
    command = ["benchmarks/results.py", "--quick", "--data", split_photos, "--out", tmp_path, "--jobs", "2"]
    command += ["--batch-size", "20"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    setting, table, quick = (tmp_path / "results.md").read_text().split("\n\n")
    assert "1 threads" in setting and "nothing to compare with" in quick
    table = table.split("\n")
    assert [line.split("|")[1].strip() for line in table[2:]] == list(results.ROWS), done.stdout
    for line in table[2:]:
        assert re.match(r"\| [\w -]+ \| [\d.e-]* \| 0\.\d{3} \| 0\.\d{3} \| ", line), line


@pytest.mark.slow
def test_a_stopped_table_goes_on(split_photos, tmp_path):
    command = ["benchmarks/results.py", "--data", split_photos, "--out", tmp_path, "--rows", "SimCLR", "--rates", "1"]
    command = [sys.executable, *map(str, command), "--batch-size", "20", "--epochs", "8", "--seeds", "0"]
    command += ["--threads", "1"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log, began = tmp_path / "SimCLR/seed-0/log.csv", time.monotonic()
    while not (log.exists() and len(log.read_text().split()) > 2) and time.monotonic() - began < 120:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=120)[0]
    assert child.returncode == 143 and "the same command goes on" in said, said
    before = log.read_text().split()
    assert 2 < len(before) < 9 and not (tmp_path / "SimCLR/seed-0/result.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "SimCLR, seed 0: done" in done.stdout, done.stdout + done.stderr
    rows = log.read_text().split()
    assert rows[: len(before)] == before and len(rows) == 9


# ---------------------------------------------------------------------------------------------------------- races


def test_a_race_takes_turns_and_gives_the_lead_within_a_round(capsys):
    rates = {"ours": iter([1, 20, 30, 90]), "theirs": iter([1, 10, 10, 10])}
    said = table.race("views", {name: lambda r=r: next(r) for name, r in rates.items()}, 3)
    assert said.split("\n")[2:] == ["| ours | 30 | 1 |", "| theirs | 10 | 3.00 (2.00 to 9.00) |"]
    assert said in capsys.readouterr().out
    assert torch.__version__ in table.machine() and "cores" in table.machine()


def test_pipeline_compares_both(monkeypatch, capsys):
    monkeypatch.setattr(common.Run, "curves", lambda self: None)
    monkeypatch.setattr(common.Run, "neighbours", lambda self: None)
    pipeline.loop("resnet8", 16, 2, 1, "cpu")
    assert re.search(r"\| train \| [\d,]+ \| 1 \|\n\| bare network \| ", capsys.readouterr().out)


@pytest.mark.slowest
def test_the_start_adds_up(capsys):
    pipeline.start(1)
    said = capsys.readouterr().out
    seconds = {name: float(s) for name, s in re.findall(r"^\| ([^|]+) \| ([\d.]+) \|", said, re.M)}
    everything = seconds.pop("all")
    assert sum(seconds.values()) == pytest.approx(everything, abs=0.05) and seconds["the data"] > 0.1
    due = seconds["the interpreter"] + seconds[pipeline.LIBRARIES] + seconds["the data"]
    assert float(re.search(r"and data: ([\d.]+)", said)[1]) == pytest.approx(everything / due, abs=0.02)


@pytest.mark.parametrize("size, s, blur", [(32, 0.5, None), (224, 1.0, 23)])
def test_contenders_take_the_recipe_of_the_method(size, s, blur):
    config = peers.config_for(size)
    crop, flip, some, grey, *rest = peers.of_torchvision(size, config).transforms
    assert (
        crop.size == (size, size) and crop.scale == (0.08, 1.0) and crop.antialias and flip.p == 0.5 and grey.p == 0.2
    )
    (colour,), wide = some.transforms, pytest.approx((1 - 0.8 * s, 1 + 0.8 * s))
    assert some.p == 0.8 and colour.hue == pytest.approx((-0.2 * s, 0.2 * s))
    assert colour.brightness == wide and colour.contrast == wide and colour.saturation == wide
    assert [type(op).__name__ for op in rest] == ["RandomApply"] * bool(blur) + ["ToImage", "ToDtype", "Normalize"]
    if blur:
        (gaussian,) = rest[0].transforms
        assert rest[0].p == 0.5 and list(gaussian.kernel_size) == [blur, blur] and list(gaussian.sigma) == [0.1, 2.0]
    pixels, _ = images.make_shapes(2, 3, size)
    views = [torch.stack([peers.of_torchvision(size, config)(p) for p in pixels])]
    with contextlib.suppress(ImportError):
        views.append(peers.of_kornia(size, config)(pixels / 255))
    for view in views:
        assert view.shape == (2, 3, size, size) and view.dtype == torch.float32 and view.amin() < -0.5


def test_streaming_contenders_make_the_same_batches(monkeypatch):
    made = {}

    def shapes(batches, total):  # ImageFolder adds the labels
        assert total == 4
        return [[tuple(v.shape) for v in (b[0] if isinstance(b[0], list) else b)] for b in batches]

    monkeypatch.setattr(peers, "rate", shapes)
    monkeypatch.setattr(table, "race", lambda title, work, rounds: made.update({k: f() for k, f in work.items()}))
    peers.stream(5, 2, 1, 1)
    assert len(made) == 3 and all(found == [[(2, 3, 224, 224)] * 2] * 2 for found in made.values()), made


def test_lightlys_example_runs_where_it_is_installed():
    pytest.importorskip("lightly")
    assert peers.of_lightly("resnet8", 8, 3, 0, "cpu") > 0


def test_the_losses_that_are_timed_are_one_loss():
    arguments = loss.inputs("nt_xent", 32, 8, "cpu", torch.float32)
    values = {name: f(*arguments).item() for name, f in loss.NT_XENT.items() if not name.startswith("compile")}
    assert len(values) >= 5 and all(v == pytest.approx(values["naive"], rel=1e-5) for v in values.values()), values


@pytest.mark.parametrize(
    "wrong", [lambda z1, z2: 2 * loss.naive(z1, z2), lambda z1, z2: loss.naive(z1, z2) * torch.nan]
)
def test_another_loss_is_not_timed(wrong, monkeypatch):
    monkeypatch.setattr(loss, "NT_XENT", {"ours": loss.nt_xent, "wrong": wrong})
    monkeypatch.setattr(sys, "argv", ["loss.py", "--sizes", "64", "--queue", "--runs", "1", "--no-memory"])
    with pytest.raises(SystemExit, match="wrong gives .* not the same loss"):
        loss.main()
