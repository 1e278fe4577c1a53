"""results.py, pipeline.py and peers.py: the protocol, its rule, stopping and going on; and what the races compare."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
import images
import simclr
from benchmarks import loss, peers, pipeline, results, table
from tests.helpers import ROOT

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
    words = results.command(config).split(" && ")[0].split()
    same = common.parse_args(type(config), words[2:])
    assert same == config and words[:2] == ["python", f"{config.method()}.py"]


def test_the_rate_is_the_best_of_the_short_runs_and_is_used_once(monkeypatch, tmp_path, few_shapes):
    made = []

    def train(config, data):
        made.append((config.lr, config.epochs, config.seed, len(data.train)))
        (tmp_path / config.out).mkdir(parents=True)
        (tmp_path / config.out / "log.csv").write_text("epoch,images_per_second\n1,100\n2,300\n3,200\n")
        if config.lr == 10:
            raise common.RunFailure("the loss is nan")
        return {"knn_top1": {1.0: 0.4, 3.0: 0.5}.get(config.lr, 0), "knn untrained h": 0.1}

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
    assert found["minutes"] == pytest.approx(200 * (1 / 100 + 1 / 300 + 1 / 200) / 60)
    said = results.report(settings("--rows", "SimCLR", "--seeds", "0", "7", "--out", "out"))
    first, tried, commands = said.split("\n\n")
    assert re.search(r"\| SimCLR \| 3 \| 0.500 \(0.500 to 0.500\) \| 0.600 \(.*\) \| 200 \(", first)
    assert "| SimCLR | 0.400 (1) | 0.500 (3) | failed (10) |" in tried
    assert len(commands.split("\n")) == 2 and "--lr 3.0 " in commands


def test_other_settings_in_the_same_folder_are_refused(tmp_path, monkeypatch):
    given = ["--data", "shapes", "--rows", "untrained", "--out", str(tmp_path)]
    monkeypatch.setattr(results.subprocess, "Popen", lambda *a, **b: pytest.fail("nothing is to be run"))
    (tmp_path / "protocol.json").write_text("{}\n")
    with pytest.raises(images.InputError, match="of another protocol"):
        results.main(given)
    with pytest.raises(images.InputError, match="--lr: the protocol sets it"):
        results.main([*given, "--lr", "1"])
    with pytest.raises(images.InputError, match="unknown --bogus"):
        results.main([*given, "--bogus", "1"])


@pytest.fixture(scope="module")
def split_photos(tmp_path_factory):
    """600 pictures in train/, 100 in test/."""
    from torchvision.transforms import functional as TF

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
    table = (tmp_path / "results.md").read_text().split("\n\n")[0].split("\n")
    assert [line.split("|")[1].strip() for line in table[2:]] == list(results.ROWS), done.stdout
    for line in table[2:]:
        assert re.match(r"\| [\w -]+ \| [\d.e-]* \| 0\.\d{3} \| 0\.\d{3} \| ", line), line


@pytest.mark.slow
def test_a_stopped_table_goes_on(split_photos, tmp_path):
    command = ["benchmarks/results.py", "--data", split_photos, "--out", tmp_path, "--rows", "SimCLR", "--rates", "1"]
    command = [sys.executable, *map(str, command), "--batch-size", "20", "--epochs", "6", "--seeds", "0"]
    command += ["--threads", "1"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log, began = tmp_path / "SimCLR/seed-0/log.csv", time.monotonic()
    while not (log.exists() and len(log.read_text().split()) > 2) and time.monotonic() - began < 120:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 143 and "the same command goes on" in said, said
    before = log.read_text().split()
    assert 2 < len(before) < 7 and not (tmp_path / "SimCLR/seed-0/result.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "SimCLR, seed 0: done" in done.stdout, done.stdout + done.stderr
    rows = log.read_text().split()
    assert rows[: len(before)] == before and len(rows) == 7


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


@pytest.mark.parametrize("size", [32, 96])
def test_contenders_make_the_same_kind_of_view(size):
    """Mean and spread over many draws of one picture are ours."""
    config, (pixels, labels) = peers.config_for(size), images.make_shapes(1, 3, size)
    pixels, n = pixels.expand(400, -1, -1, -1), 400
    split = images.resident(pixels, labels.expand(n), CPU)
    torch.manual_seed(0)
    (x,) = next(split.views([torch.arange(n)], [(size, (config.crop_min_scale, 1.0))]))
    ours, recipe = simclr.augment(x, config), peers.of_torchvision(size, config)
    views = {"torchvision": torch.stack([recipe(p) for p in pixels])}
    with contextlib.suppress(ImportError):
        views["kornia"] = peers.of_kornia(size, config)(pixels / 255)
    for name, theirs in views.items():
        assert theirs.shape == ours.shape, name
        for of in (lambda v: v.mean((1, 2, 3)), lambda v: v.std((1, 2, 3)), lambda v: v.diff(dim=-1).abs().mean()):
            a, b = of(ours), of(theirs)
            assert a.mean() == pytest.approx(b.mean().item(), abs=0.12), name


def test_streaming_contenders_read_the_same_files(monkeypatch):
    made = {}

    def shapes(batches, size):  # ImageFolder adds the labels
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
