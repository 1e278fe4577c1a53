"""results.py: the protocol, its rule, stopping and going on."""

import json
import re
from pathlib import Path

import pytest
import torch

import common
import images
import simclr
from benchmarks import results

ROOT = Path(__file__).resolve().parent.parent


def settings(*words):
    return results.parser().parse_args(["--data", "cifar10", *words])


def test_a_tenth_to_train_on_and_another_to_judge_by():
    pixels, labels = images.make_shapes(1_000, 0, 16)
    everything = images.from_arrays(pixels, labels, torch.device("cpu"))
    part, whole = results.tenth(everything), everything.train
    kept = [{x.numpy().tobytes() for x in split.pixels} for split in (part.train, part.test, everything.test)]
    assert len(set.union(*kept)) == sum(map(len, kept))  # no picture is in two of them
    for split in (part.train, part.test):
        assert ((split.labels.bincount() - whole.labels.bincount() / 10).abs() < 1).all()


@pytest.mark.parametrize(
    "row, lr",  # three times the preset's for N = 64: SimCLR, BYOL and SimSiam scale theirs by N themselves
    [("SimCLR", 3.0), ("BYOL", 0.3), ("SimSiam", 0.09), ("MoCo v2", 0.18 / 8), ("SwAV", 1.2 / 2), ("SupCon", 1.5 / 16)],
)
def test_a_row_is_the_preset_except_for_the_protocol(row, lr):
    args = settings("--batch-size", "64", "--backbone", "resnet18")
    words = results.words_of(row, args, ["--amp", "bf16"], 5, rate=3, epochs=20)
    kind = __import__(results.ROWS[row][0]).Config
    config = common.parse_args(kind, words)
    assert config.lr == pytest.approx(lr, rel=0.01)
    given = {"backbone": "resnet18", "epochs": 20, "batch_size": 64, "warmup_epochs": 2.0, "seed": 5, "amp": "bf16"}
    given |= {"knn_every": 20, "lr": config.lr} | ({"projection_head": "mlp"} if row == "MoCo v2" else {})
    assert config == kind.preset("cifar", **given)


def test_the_rate_is_the_best_of_the_short_runs_and_what_is_done_is_not_made_again(monkeypatch, tmp_path):
    made = []

    def train(config, data):
        made.append((config.lr, config.epochs, config.seed, len(data.train)))
        folder = Path(config.resume)
        folder.mkdir(parents=True)
        (folder / "log.csv").write_text("epoch,images_per_second\n1,200\n2,100\n3,400\n")
        if config.lr == 10:
            raise common.RunFailure("the loss is nan")
        return {"knn_top1": {1.0: 0.4, 3.0: 0.5}[config.lr]}

    pixels, labels = images.make_shapes(220, 0, 16)
    whole = images.from_arrays(pixels, labels, torch.device("cpu"))
    monkeypatch.setattr(simclr, "train", train)
    monkeypatch.setattr(images, "load", lambda *_: whole)
    monkeypatch.setattr(common, "load_run", lambda out: (None, torch.nn.Identity()))
    monkeypatch.setattr(results.linear_eval, "evaluate", lambda *_: {"linear_top1": 0.6})
    monkeypatch.chdir(tmp_path)
    args = settings("--data", "shapes", "--epochs", "6", "--batch-size", "10", "--out", "out")
    for _ in range(2):  # the second finds all done
        results.one_row("SimCLR", 0, args, [])
    assert made == [(1, 2, 0, 20), (3, 2, 0, 20), (10, 2, 0, 20), (3, 6, 0, 200)]
    results.one_row("SimCLR", 7, args, [])
    assert made[4:] == [(3, 6, 7, 200)]  # by the rule's choice of the first seed
    found = json.loads((tmp_path / "out/SimCLR/seed-0/result.json").read_text())
    assert found["images_per_second"] == 200 and found["linear_top1"] == 0.6
    assert found["minutes"] == pytest.approx(200 * (1 / 100 + 1 / 400 + 1 / 200) / 60)
    assert "| SimCLR, 1 of 3 seeds | 3 | 0.500 |" in results.report(settings("--rows", "SimCLR", "--out", "out"))
    said = results.report(settings("--rows", "SimCLR", "--seeds", "0", "7", "--out", "out"))
    _, first, tried, commands = said.split("\n\n")
    assert re.search(r"\| SimCLR \| 3 \| 0.500 \(0.500 to 0.500\) \| 0.600 \(.*\) \| 200 \(", first)
    assert "| SimCLR | 0.400 (1) | 0.500 (3) | diverged (10) |" in tried
    assert len(commands.split("\n")) == 2 and "python simclr.py --preset cifar --data shapes " in commands


@pytest.mark.parametrize("words, refused", [
    ("--lr 1", "--lr: not for this experiment"), ("--seed=1", "--seed: not for this experiment"),
    ("--jobs 0", "give more than 0"), ("--seeds 0 -1", "--seed -1: give a whole number"),
])  # fmt: skip
def test_what_no_table_can_have_is_refused_before_any_run(words, refused, tmp_path):
    with pytest.raises(images.InputError, match=re.escape(refused)):
        results.main(["--data", "cifar10", "--rows", "untrained", "--out", str(tmp_path / "out"), *words.split()])
    assert not (tmp_path / "out").exists()
