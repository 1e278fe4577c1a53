"""The shared module: exit status, flags, network, optimiser, evaluation, and a run, its files and how it goes on."""

import csv
import dataclasses
import errno
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import types
import typing
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import common
import images
import simclr
from tests import helpers
from tests.helpers import METHODS, at_each_step, equal, flags, python, same_run, saved

CPU = torch.device("cpu")
DATA = PICTURES, LABELS = images.make_shapes(110, 0, 16)  # 100 to train on: 3 steps of 30 an epoch; 10 are held out
SMALL = {"epochs": 2, "batch_size": 30, "image_size": 16, "hidden_dim": 16, "projection_dim": 8}


def config(out="unused", **given):
    return simclr.Config.preset("demo", **SMALL | {"warmup_epochs": 0.0, "knn_every": 0} | given, out=str(out))


def train(out, data=DATA, **given):
    """Six steps of SimCLR, in a tenth of a second."""
    return helpers.train(simclr, out, data, **SMALL | given)


class Linear(nn.Module):
    """The least that a run trains: h is a linear map of the pixels, and so is the output."""

    def __init__(self, config):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * config.image_size**2, 6))
        self.projector, self.backbone.feature_dim, self.dim = nn.Linear(6, 4), 6, 4

    def embed(self, x):
        return self.projector(self.backbone(x))

    def forward(self, *views):
        return tuple(self.embed(x) for x in views)


def begun(out, data=DATA, kind=Linear, guess=0.0, **given):
    """A run that has begun, and what its step calls."""
    run = common.Run(config(out, **given), data)
    model = kind(run.config)
    return run, run.begin(model, guess=guess, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def steps(run, z=None, loss=1.0):
    """Take all steps that are left, without training. Yields the index and the views of each."""
    for index, views in run.batches(views=2, scale=(0.5, 1.0)):
        yield index, views
        run.log(torch.tensor(loss), torch.eye(8) if z is None else z, *views)


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """To draw curves.png takes longer than a run does here."""
    if "curves" not in request.node.name:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


# --------------------------------------------------------------------------------------------------- exit status


FULL, DENIED = OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied")
ENDS = [
    (common.InputError("no"), 2, "error: no"),
    (common.RunFailure("no"), 1, "error: no"),
    (FULL, 1, "No space left"),
]
ENDS += [
    (MemoryError(), 1, "out of memory"),
    (torch.OutOfMemoryError("CUDA"), 1, "out of memory; give a smaller --batch"),
]
ENDS += [(DENIED, 1, "Permission denied"), (KeyboardInterrupt(), 130, "stopped"), (None, 1, "error: out of memory")]


@pytest.mark.parametrize("error, status, words", ENDS, ids=[f"{type(error).__name__}" for error, *_ in ENDS])
def test_a_script_ends_with_a_status_and_one_line(error, status, words, capsys):
    with pytest.raises(SystemExit) as end, common.exit_status():
        if error is None:  # an allocation that fails on a CPU
            torch.empty(2**50)
        raise error
    err = capsys.readouterr().err
    assert end.value.code == status and words in err and err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    for error in (ValueError("a bug"), RuntimeError("a bug")):
        with pytest.raises(type(error)), common.exit_status():
            raise error
    with common.exit_status():
        pass


# --------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("method", METHODS)
def test_help_names_every_flag_once_with_its_comment_and_defaults_and_fits(method, capsys, monkeypatch):
    """A screen and a half is 75 lines of 120 columns. A flag without a comment would have no line there."""
    monkeypatch.setenv("COLUMNS", "120")
    config = importlib.import_module(method).Config
    with pytest.raises(SystemExit) as end:
        common.parse_args(config, ["--help"])
    text = capsys.readouterr().out
    _, own, shared = re.split(f"the flags of {method}:|the run:", text)
    assert end.value.code == 0 and text.startswith(f"usage: python {method}.py ") and text.count("\n") <= 75
    for name in flags(config):
        here, other = (own, shared) if name in vars(config)["__annotations__"] else (shared, own)
        (words,) = re.findall(rf"^  {common.dashed(name)}\b(.*?)^  --|\Z", here + "\n  --", re.M | re.S)[:1]
        assert not re.search(rf"^  {common.dashed(name)}\b", other, re.M), name
        presets = [f"{preset}: {values[name]}" for preset, values in config.PRESETS.items() if name in values]
        assert f"(default {'; '.join([str(getattr(config, name)), *presets])})" in " ".join(words.split()), name


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line_and_python_agree(method):
    config = importlib.import_module(method).Config
    for name, values in config.PRESETS.items():
        shell = common.parse_args(config, ["--preset", name, "--epochs", "50", "--warmup-epochs", "1"])
        assert shell == config.preset(name, epochs=50, warmup_epochs=1.0) and shell.epochs == 50
        assert all(getattr(shell, k) == v for k, v in values.items() if k not in ("epochs", "warmup_epochs"))
    assert common.parse_args(config, ["--preset", "paper"]) == config() != config.preset("demo")
    for argv, preset in (
        ("", "demo"),
        ("shapes", "demo"),
        ("cifar100", "cifar"),
        ("stl10", "paper"),
        ("/my", "photos"),
    ):
        given = {"data": argv} if argv else {}
        preset = preset if preset in config.PRESETS else "paper"
        assert common.parse_args(config, ["--data", argv] * bool(argv)) == config.preset(preset, **given)
    assert common.parse_args(config, ["--data", "/my", "--preset", "demo"]) == config.preset("demo", data="/my")
    assert {"paper", "demo", "photos"} <= config.PRESETS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_is_read_with_its_type(method):
    """All flags of one preset, given by hand over another, are the first."""
    config = importlib.import_module(method).Config
    for preset, other in (("paper", "demo"), ("demo", "paper")):
        values, argv = dataclasses.asdict(config.preset(preset)), ["--preset", other]
        for name, kind in flags(config).items():
            flag, value = common.dashed(name), values[name]
            given = [flag, str(value)] if kind is not bool else [flag if value else "--no-" + flag[2:]]
            argv += given if name != "resume" else []  # a resumed run takes no --out
        read = common.parse_args(config, argv)
        assert read == config.preset(preset)
        assert all(type(value) is type(values[name]) for name, value in dataclasses.asdict(read).items())


def test_a_resumed_command_line_takes_the_runs_flags(tmp_path):
    train(tmp_path / "run", temperature=0.33)
    c = common.parse_args(simclr.Config, ["--resume", f"{tmp_path}/run", "--epochs", "9", "--lr", "0.7"])
    stored = {"data": "arrays", "temperature": 0.33, "workers": 0, "resume": c.out}
    assert c == config(tmp_path / "run", **stored, epochs=9, lr=0.7)
    os.rename(tmp_path / "run", tmp_path / "moved")
    assert common.parse_args(simclr.Config, ["--resume", f"{tmp_path}/moved"]).out == f"{tmp_path}/moved"
    fresh = common.parse_args(simclr.Config, ["--resume", f"{tmp_path}/none", "--epochs", "3"])
    assert fresh == simclr.Config.preset("demo", epochs=3, resume=f"{tmp_path}/none")


# ------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("name, last, width", [("resnet18", "bn2", 512), ("resnet50", "bn3", 2048)])
def test_backbones_are_torchvisions(name, last, width, stem):
    for zero in (True, False):
        ours = common.build_backbone(simclr.Config(backbone=name, stem=stem), zero_init_residual=zero)
        scales = [getattr(block, last).weight for layer in (ours.layer1, ours.layer4) for block in layer]
        assert all((scale == 1 - zero).all() for scale in scales)
    theirs = torchvision.models.get_model(name)
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys
    theirs.fc, x = nn.Identity(), torch.rand(2, 3, 32, 32)
    assert torch.equal(theirs.eval()(x), ours.eval()(x)) and ours(x).shape == (2, width) == (2, ours.feature_dim)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_given_weights(method, tmp_path):
    """After no step the backbone is the given one to the bit, and so are MoCo's and BYOL's second encoders."""
    weights, module = common.build_backbone(config()).state_dict(), importlib.import_module(method)
    torch.save({**weights, "fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}, tmp_path / "w.pth")
    given = {"init": str(tmp_path / "w.pth"), "epochs": 0, "knn_every": 1}
    figures = helpers.train(module, tmp_path / "run", **given)
    assert figures["epoch"] == 0 and figures["knn_top1"] == figures["knn h before training"]
    assert equal(torch.load(tmp_path / "run" / "backbone.pt", weights_only=True), weights)
    (tmp_path / "w.pth").unlink()  # a run stands for itself
    c, model = common.load_run(tmp_path / "run")
    second = {"moco": "key_encoder.0.", "byol": "target.0."}.get(method, "backbone.")
    found = {n.removeprefix(second): v for n, v in model.state_dict().items() if n.startswith(second)}
    assert c.init == given["init"] and equal(found, weights)
    figures = helpers.train(module, tmp_path / "run", **given | {"epochs": 1}, resume=str(tmp_path / "run"))
    assert figures["epoch"] == 1 and "knn h before training" not in figures


def test_imagenet_is_torchvisions_best_and_without_a_network_one_line(monkeypatch):
    asked, weights = [], torchvision.models.resnet18().state_dict()

    def download(url, **rest):
        asked.append(url)
        if len(asked) > 1:
            raise URLError("Name or service not known")
        return weights

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    network = common.build_backbone(config(init="imagenet", backbone="resnet18"))
    assert asked == [torchvision.models.ResNet18_Weights.DEFAULT.url]
    assert equal(network.state_dict(), {n: v for n, v in weights.items() if not n.startswith("fc.")})
    with pytest.raises(common.InputError, match="--init imagenet: .*not known"):
        common.build_backbone(config(init="imagenet", backbone="resnet18"))


@pytest.mark.parametrize("pieces", [2, 3, 6])
def test_micro_batches_give_the_gradient_of_the_whole_batch(pieces, tmp_path):
    """Where there is no BN they change nothing, to float64 rounding, and hold no graph but the pieces' pictures."""
    torch.manual_seed(0)
    x, w, found, state = torch.rand(2, 30, 3, 16, 16, dtype=torch.float64), torch.rand(4, 60).double(), [], None
    for size in (0, 30 // pieces):
        run, network = begun(tmp_path / str(size), micro_batch_size=size)
        run.model.double().load_state_dict(state := state or run.model.state_dict())
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            z = torch.cat(network(*x))
        (z @ w).logsumexp(0).square().mean().backward()
        found.append([z, *(p.grad for p in run.model.parameters())])
        assert size == 0 or sum(held) == x.nbytes
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(*found, strict=True))


def test_micro_batches_are_what_bn_sees(tmp_path):
    """Output and gradients are those of the pieces fed one after the other."""
    run, network = begun(tmp_path, kind=simclr.SimCLR, micro_batch_size=10)
    twin, (x1, x2) = simclr.SimCLR(run.config), torch.rand(2, 30, 3, 16, 16)
    twin.load_state_dict(run.model.state_dict())
    sum(z.square().sum() for z in network(x1, x2)).backward()
    sum(z.square().sum() for a, b in zip(x1.split(10), x2.split(10), strict=True) for z in twin(a, b)).backward()
    for p, q in zip(run.model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def test_outputs_are_float32_under_amp(tmp_path):
    run, network = begun(tmp_path, kind=simclr.SimCLR, amp="bf16")
    dtypes = []
    run.model.projector[0].register_forward_hook(lambda layer, x, out: dtypes.append(out.dtype))
    assert [z.dtype for z in network(*torch.rand(2, 30, 3, 16, 16))] == [torch.float32] * 2
    assert dtypes == [torch.bfloat16]


def test_the_loss_is_that_of_the_backend():
    z1, z2 = torch.randn(2, 30, 8)
    expected = simclr.nt_xent(z1, z2, 0.5)
    for backend in ("naive", "blocked", "auto"):
        found = common.Run(config(loss_backend=backend), DATA).loss(simclr.nt_xent)(z1, z2, 0.5)
        assert torch.allclose(found, expected, rtol=1e-5)


# -------------------------------------------------------------------------------------------------- optimisation


def test_cosine_lr_and_set_lr():
    values = [common.cosine_lr(s, 100, 10, 2.0) for s in range(100)]
    assert values[:12] == pytest.approx([0.2 * k for k in range(1, 11)] + [2.0] + values[11:12])
    assert math.isclose(values[55], 1.0) and values[10:] == sorted(values[10:], reverse=True) and 0 < values[99] < 0.01
    for warmup in (0.0, 0.4, 1.0, 2.5):  # a warm-up of part of a step never passes the peak
        rates = [common.cosine_lr(k, 8, warmup, 0.2) for k in range(8)]
        assert min(rates) > 0 and max(rates) <= 0.2 and rates[-1] < 0.05
    assert [common.cosine_lr(s, 4, 2, 1.0, 0.2, 0.1) for s in range(4)] == pytest.approx([0.6, 1, 1, 0.55])
    p = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "constant": True}], lr=0.5)
    common.set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


@pytest.mark.parametrize("inside", [True, False])
def test_lars_against_the_written_rule(inside):
    """Weights decay and adapt; BN parameters and biases do neither."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    model[1].bias.requires_grad_(False)
    optimizer = common.LARS(common.parameter_groups(model, 0.1), lr=0.3, lr_in_momentum=inside)
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in w.items()}
    for step in range(4):
        lr = 0.3 / (step + 1)
        common.set_lr(optimizer, lr)
        model.zero_grad()
        model(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
        for name, p in model.named_parameters():
            g, rate = p.grad.clone() if p.requires_grad else torch.zeros_like(p), 1.0
            if p.ndim > 1:
                g = g + 0.1 * w[name]
                rate = 0.001 * w[name].norm() / g.norm()
            v[name] = 0.9 * v[name] + (lr if inside else 1.0) * rate * g
            w[name] = w[name] - (1.0 if inside else lr) * v[name]
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.allclose(p, w[name], rtol=1e-12, atol=1e-14), name


def test_lars_leaves_a_zero_weight_or_gradient_unscaled():
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = common.LARS([p], lr=1.0)
    for p.grad, expected in ((torch.ones(2, 2), -1.0), (torch.zeros(2, 2), -1.9)):  # then the momentum alone
        optimizer.step()
        assert torch.equal(p.detach(), torch.full((2, 2), expected))


# ---------------------------------------------------------------------------------------------------- evaluation


def test_knn_against_a_plain_loop():
    """k is the mean size of a class, 16 of 50 here."""
    torch.manual_seed(0)
    bank, queries = torch.randn(50, 60), torch.randn(60, 60)  # of so many channels all cosines are small, and k matters
    bank_labels, labels, right = torch.arange(50) % 3, torch.randint(3, (60,)), []
    for q, label in zip(queries, labels, strict=True):
        s = torch.cosine_similarity(q[None], bank)
        votes = [0.0] * 3
        for i in s.argsort(descending=True)[:16]:
            votes[bank_labels[i]] += math.exp(s[i].item() / 0.1)
        right.append(votes.index(max(votes)) == label)
        assert common.knn_accuracy(bank, bank_labels, q[None], label[None]) == right[-1]
    assert common.knn_accuracy(bank, bank_labels, queries, labels) == sum(right) / 60
    assert common.knn_accuracy(bank, torch.arange(50), bank, torch.arange(50)) == 1.0  # k = 1


def test_embed_feeds_central_views_and_leaves_the_network_alone():
    split, few, network = images.from_arrays(*DATA, CPU).train, torch.tensor([5, 2]), common.build_backbone(config())
    before = {k: v.clone() for k, v in network.eval().state_dict().items()}
    whole, part = (common.embed(network, split, config(), index) for index in (None, few))
    assert whole.shape == (100, 128) and torch.allclose(whole[few], part, atol=1e-5)
    assert equal(network.state_dict(), before)
    seen = common.embed(lambda x: x.flatten(1), split, config(), few)  # what the network is fed
    theirs = split.pixels[few].float() / 255
    theirs = torchvision.transforms.functional.normalize(theirs, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.allclose(seen, theirs.flatten(1), atol=1e-5)


def test_health_of_spread_out_and_of_collapsed_features():
    torch.manual_seed(0)
    std, rank, cos2 = common.health(7 * torch.randn(20_000, 16))
    assert abs(std - 1 / 4) < 0.002 and abs(rank - 16) < 0.1 and abs(cos2 - 1 / 16) < 1e-3
    two, line = torch.eye(16)[torch.arange(100) % 2], torch.tensor([[1.0, 2.0], [-2.0, -4.0], [0.5, 1.0]])
    assert common.health(torch.ones(100, 16)) == pytest.approx((0, 1, 1), abs=1e-3)
    assert abs(common.health(two)[1] - 2) < 1e-3
    assert common.health(line)[0] > 0.5 and math.isclose(common.health(line)[2], 1)  # opposite points have a std
    assert common.health(torch.zeros(5, 3))[1:] == (1, 1) and math.isfinite(common.health(torch.ones(1, 3))[2])


def test_health_against_plain_formulas():
    torch.manual_seed(0)
    for n, d in ((7, 4), (4, 7), (64, 256)):
        z = torch.randn(n, d) * torch.rand(n, 1)
        pairs = [F.cosine_similarity(z[i], z[j], dim=0).item() ** 2 for i in range(n) for j in range(n) if i != j]
        unit = F.normalize(z.double(), dim=1)
        p = F.normalize(torch.linalg.svdvals(unit), p=1, dim=0)
        expected = (unit.var(0, correction=0).sqrt().mean(), (-(p * p.log()).sum()).exp(), sum(pairs) / len(pairs))
        assert common.health(z) == pytest.approx([float(x) for x in expected], rel=1e-4)


class Corner(Linear):
    """h is the class, which the pictures of `in_the_corner` show in one pixel."""

    def __init__(self, config):
        super().__init__(config)
        self.backbone.forward = lambda x: F.one_hot((x[:, 0, 0, 0] > 0).long(), 6).float() + 0 * x.mean()


def in_the_corner(n=100, bare=0):
    """Pictures of noise in two classes, the last `bare` of them without a label."""
    pictures = torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(n) % 2
    pictures[:, 0, 0, 0] = labels * 255
    return pictures, torch.where(torch.arange(n) < n - bare, labels, -1)


def test_knn_stands_beside_its_controls_and_h_that_does_not_beat_pixels_is_told(tmp_path, capsys):
    """The bank is the labelled training images: others have no vote, and every query finds its class in h."""
    for kind, good in ((Corner, True), (Linear, False)):
        run, _ = begun(tmp_path / kind.__name__, in_the_corner(200, bare=100), kind, epochs=0, knn_every=1)
        if not good:
            run.model.backbone[1].weight.data.zero_()
        figures = run.finish()
        out = capsys.readouterr().out
        assert figures["knn_top1"] == figures["knn h"] and (figures["knn h"] == 1) == good
        for name in ("h", "g(h)", "raw pixels", "h before training"):
            assert f"{name} {figures[f'knn {name}']:.3f}" in out
        assert "a guess 0.500" in out
        assert ("no better than raw pixels" in out) == (not good)


# ----------------------------------------------------------------------------------------- a run and its files


def test_a_run_and_its_files(tmp_path, capsys):
    figures = train(tmp_path / "run", epochs=3, knn_every=2)
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert list(rows[0]) == ["epoch", "loss", "lr", "feature_std", "effective_rank", "knn_top1", "images_per_second"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [bool(row["knn_top1"]) for row in rows] == [False, True, True]  # every second, and the last
    for key, value in rows[-1].items():
        assert math.isclose(figures[key], float(value), rel_tol=1e-5)
    assert figures["out"] == str(tmp_path / "run") and saved(tmp_path / "run", "step") == 9

    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["method"] == "simclr" and stored["data"] == "arrays" and not stored["resume"]
    backbone = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    simclr.SimCLR(config()).backbone.load_state_dict(backbone)
    assert all(torch.equal(saved(tmp_path / "run")["backbone." + name], value) for name, value in backbone.items())
    names = {"config.json", "log.csv", "checkpoint.pt", "backbone.pt", "views.png", "neighbours.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names  # no file that was written aside

    first, *_, last = (line for line in out.splitlines() if line)
    assert first.startswith(f"{tmp_path}/run: simclr") and last.startswith(f"{tmp_path}/run: ")
    assert f"python linear_eval.py {tmp_path}/run" in last
    guess = f"{math.log(59):.3f}"  # log(2N - 1)
    for words in ("100 images, 10 held out", "10 classes", "3 an epoch, 9 in all", "peak lr", guess):
        assert words in out


def test_without_labels_and_without_an_epoch(tmp_path, capsys):
    figures = train(tmp_path / "bare", PICTURES, knn_every=1)
    assert figures["knn_top1"] is None and not any(name.startswith("knn ") for name in figures)
    assert (tmp_path / "bare" / "log.csv").read_text().splitlines()[1].split(",")[5] == ""
    assert "110 images, 0 held out" in capsys.readouterr().out
    figures = train(tmp_path / "none", epochs=0, knn_every=1)
    assert figures["knn_top1"] == figures["knn h before training"] and figures["loss"] is None
    assert equal(common.load_run(tmp_path / "none")[1].state_dict(), saved(tmp_path / "none"))
    train(tmp_path / "none", epochs=1, resume=str(tmp_path / "none"), knn_every=1)
    assert saved(tmp_path / "none", "step") == 3


def test_every_run_has_a_folder_of_its_own_and_train_leaves_its_config_alone(tmp_path):
    c = config(tmp_path / "run", epochs=0)
    before, kept = dataclasses.asdict(c), []
    for name in ("run", "run-2", "run-3"):
        assert simclr.train(c, DATA)["out"] == str(tmp_path / name)
        assert dataclasses.asdict(c) == before and common.load_run(tmp_path / name)[0].out == str(tmp_path / name)
        kept.append((tmp_path / name / "checkpoint.pt").read_bytes())
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == kept[0]


def test_of_runs_that_start_at_once_each_gets_a_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(common.new_folder, [f"{tmp_path}/run/"] * 8))
    assert sorted(found) == sorted([f"{tmp_path}/run", *(f"{tmp_path}/run-{n}" for n in range(2, 9))])


def test_progress_is_told_after_the_first_step_and_then_each_second_or_in_a_file_each_minute(
    tmp_path, capsys, monkeypatch
):
    wanted = r"step %d/6  loss \d.* images/s  [\d.]+ min an epoch, [\d.]+ min left"
    at_each_step(monkeypatch, lambda run, *_: run.step == 1 and time.sleep(1.1))
    train(tmp_path)
    out = capsys.readouterr().out
    assert "\r" not in out and len(re.findall(f"^{wanted % 1}$", out, re.M)) == out.count("min left") == 1
    assert len(re.findall(r"^epoch +[12]\b.*loss \d.*images/s$", out, re.M)) == 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train(tmp_path)
    shown = re.findall(r"\r\x1b\[K(step [^\r\n]*)", capsys.readouterr().out)
    assert [bool(re.fullmatch(wanted % n, words)) for n, words in enumerate(shown, 1)] == [True, True]


@pytest.mark.parametrize("minutes, written", [(1e-9, [0, 1, 2, 3, 4, 5, 6]), (0.0, [0, 3, 6]), (10.0, [0, 3, 6])])
def test_save_minutes(minutes, written, tmp_path):
    """What a kill -9 at any step would find."""
    run, found = begun(tmp_path, save_minutes=minutes)[0], []
    for _ in steps(run):
        found.append(saved(tmp_path, "step"))
    assert sorted({*found, saved(tmp_path, "step")}) == written


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own(tmp_path):
    index = torch.cat([index for index, _ in steps(begun(tmp_path)[0])]).view(2, 90)
    assert all(len(order.unique()) == 90 for order in index) and not torch.equal(*index)


LINE = torch.ones(8, 8) * torch.tensor([1.0, -1, 1, 1, 1, 1, 1, -1])[:, None]


@pytest.mark.parametrize("z, epochs, collapsed", [
    (LINE.abs(), 20, True), (LINE, 20, True), (torch.eye(8), 20, False), (LINE[:4], 20, False), (LINE, 19, False),
], ids=["a point", "a line", "healthy", "few rows", "before step 200"])  # fmt: skip
def test_an_output_that_has_collapsed_is_told(z, epochs, collapsed, tmp_path, capsys):
    for _ in steps(begun(tmp_path, batch_size=10, epochs=epochs)[0], z):
        pass
    assert ("warning: the output has collapsed" in capsys.readouterr().out) == collapsed


@pytest.mark.parametrize("loss, guess, told", [
    (2.0, 2.1, False), (2.0, 2.0, True), (2.0, 0.0, False), (66.49, 66.5, True), (0.4, 0.3, True), (11.0, 11.1, False)
])  # fmt: skip
def test_a_loss_no_better_than_a_guess_is_told(loss, guess, told, tmp_path, capsys):
    run, _ = begun(tmp_path, guess=guess, epochs=1)
    for _ in steps(run, loss=loss):
        pass
    run.finish()
    assert (f"no better than a guess's {guess:.3f}" in capsys.readouterr().out) == told


def test_views_png_shows_what_the_network_was_fed(tmp_path):
    (_, views), *_ = steps(begun(tmp_path, epochs=1)[0])
    sheet = np.asarray(Image.open(tmp_path / "views.png")).astype(float)
    high, wide = sheet.shape[0] / 2, sheet.shape[1] / 8  # a row for each view, a column for each image
    assert wide > 90
    for row, view in enumerate(views):
        seen = ((view * images.STD + images.MEAN) * 255)[:8, :, 8, 8].clamp(0, 255)
        shown = [sheet[int((row + 0.53) * high), int((column + 0.53) * wide)] for column in range(8)]
        assert np.abs(np.stack(shown) - seen.numpy()).max() < 2


class Angle(Linear):
    """h is the direction of an angle that the grey level of a picture gives."""

    def __init__(self, config):
        super().__init__(config)
        level = lambda x: (x * images.STD + images.MEAN).mean((1, 2, 3))  # noqa: E731
        self.backbone.forward = lambda x: torch.stack([level(x).cos(), level(x).sin()], 1) * 9 + 0 * x.mean()


@pytest.mark.parametrize("held_out", [True, False])
def test_neighbours_are_the_nearest_in_h_and_never_the_picture_itself(held_out, tmp_path):
    """Their frame is green where the class is that of the picture, and red where it is not."""
    level = torch.arange(0, 240, 8).to(torch.uint8)  # 30 grey pictures in two classes
    pictures, labels = level.view(30, 1, 1, 1).expand(30, 3, 16, 16), torch.arange(30) // 15
    data = images.from_arrays(pictures, labels, CPU)
    data = data if held_out else images.Data("all", data.train, None, data.classes)
    begun(tmp_path, data, Angle, batch_size=2, epochs=0)[0].finish()
    sheet = np.asarray(Image.open(tmp_path / "neighbours.png")).astype(int)
    train, asked = ([int(x) for x in split.pixels[:, 0, 0, 0]] for split in (data.train, data.test or data.train))
    for row in np.array_split(sheet, min(8, len(asked))):
        row = np.array_split(row, 7, axis=1)
        mine, *found = [int(cell[cell.shape[0] // 2, cell.shape[1] // 2, 0]) for cell in row]
        assert min(abs(mine - v) for v in asked) <= 1
        others = sorted(abs(v - mine) for v in train if held_out or abs(v - mine) > 1)[:6]
        assert [abs(v - mine) for v in found] == pytest.approx(others, abs=2)
        for v, cell in zip(found, row[1:], strict=True):
            edge = cell[cell.shape[0] // 2]  # a line through the picture, its frame at both ends
            green, red = (edge[:, 1] - edge[:, 0] > 100).any(), (edge[:, 0] - edge[:, 1] > 100).any()
            assert (green, red) == ((True, False) if (v < 116) == (mine < 116) else (False, True))


def test_curves_need_matplotlib(tmp_path, capsys):
    assert "curves.png" not in {path.name for path in Path(train(tmp_path / "without")["out"]).iterdir()}
    assert "matplotlib is not installed (pip install matplotlib)\n" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for epochs in (0, 1):
        simclr.train(config(tmp_path / str(epochs), epochs=epochs), DATA)
        assert Image.open(tmp_path / str(epochs) / "curves.png").width > 1000


def test_tensorboard_gets_the_columns_of_the_log(tmp_path, monkeypatch):
    written = {}

    class Writer(nullcontext):
        def __init__(self, folder, **rest):
            assert Path(folder).parent == tmp_path

        def add_scalar(self, name, value, step):
            written[name, step] = value

        __enter__ = lambda self: self  # noqa: E731
        close = flush = lambda self: None  # noqa: E731

    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setattr(torch.utils, "tensorboard", fake, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    for epochs, more in ((2, {}), (3, {"resume": str(tmp_path)})):
        train(tmp_path, tensorboard=True, knn_every=2, epochs=epochs, **more)
        rows = saved(tmp_path, "rows")
        expected = {(name, row["epoch"]): value for row in rows for name, value in row.items() if value is not None}
        assert {("epoch", row["epoch"]): row["epoch"] for row in rows} | written == expected
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(common.InputError, match="--tensorboard: .*; pip install tensorboard"):
        train(tmp_path, tensorboard=True)


@pytest.mark.parametrize("given", [{"amp": "bf16"}, pytest.param({"compile": True}, marks=pytest.mark.slowest)])
def test_a_run_in_mixed_precision_or_compiled(given, tmp_path):
    plain, other = (train(tmp_path / str(len(flags)), epochs=1, **flags)["loss"] for flags in ({}, given))
    assert math.isclose(plain, other, rel_tol=0.1) and plain != other
    simclr.SimCLR(config()).load_state_dict(saved(tmp_path / "1"))  # the same names
    assert all(value.dtype != torch.bfloat16 for value in saved(tmp_path / "1").values())


# -------------------------------------------------------------------------------------- files, whole and read back


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    """kill -9 between any two steps of a save leaves the old file or the new one; a save that fails leaves the old."""
    path, seen, replace = tmp_path / "x.txt", [], os.replace
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *both: seen.extend(Path(x).read_text() for x in both) or replace(*both))
    common.save_whole(b"new", path)
    assert seen == ["new", "old"] and path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1
    for error, raised in ((OSError(28, "No space left"), common.RunFailure), (KeyboardInterrupt(), KeyboardInterrupt)):
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(error))  # noqa: B023
        with pytest.raises(raised):
            common.save_whole(b"newer", path)
        assert path.read_text() == "new"


def test_a_damaged_checkpoint_is_refused(tmp_path):
    """What is not refused must be the same to the bit, though torch.load checks no checksum."""
    train(tmp_path)
    path, rng, refused = tmp_path / "checkpoint.pt", random.Random(0), 0
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    start = rng.randrange(len(whole) // 4, len(whole) // 2)
    wrong = [whole[:start] + bytes(2000) + whole[start + 2000 :], whole[:start], b""]
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        wrong.append(bytes(flipped))
    for content in wrong:
        path.write_bytes(content)
        try:
            assert equal(common.load_checkpoint(tmp_path), state)
            assert equal(common.load_run(tmp_path)[1].state_dict(), state["parts"]["model"][1])
        except common.InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 30
    path.write_bytes(wrong[0])
    with pytest.raises(common.InputError, match="checkpoint.pt"):
        train(tmp_path, resume=str(tmp_path))


def test_load_run(tmp_path):
    train(tmp_path, projection_head="linear")
    c, model = common.load_run(tmp_path)
    assert c == config(tmp_path, data="arrays", projection_head="linear", workers=0)
    assert type(model) is simclr.SimCLR and not model.training and equal(model.state_dict(), saved(tmp_path))
    with pytest.raises(common.InputError, match="nowhere"):
        common.load_run(tmp_path / "nowhere")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for change, words in (
        ({"method": "os"}, "put os.py beside common.py"),
        ({"method": "../simclr"}, "../simclr"),
        ({"parts": {"model": ("Nothing", {})}}, "no whole run of simclr"),
        ({"config": {"unknown": 1}}, "no whole run of simclr"),
        ({"parts": {"model": ("SimCLR", {})}}, "no whole run of simclr"),
    ):
        torch.save(state | change, tmp_path / "checkpoint.pt")
        with pytest.raises(common.InputError, match=f"^[^\n]*{re.escape(words)}[^\n]*$"):
            common.load_run(tmp_path)


def test_a_checkpoint_of_before_this_design_is_refused_in_one_line(tmp_path):
    train(tmp_path)
    old = {name: saved(tmp_path, name) for name in ("method", "config")} | {"parts": {}, "progress": {"step": 6}}
    torch.save(old, tmp_path / "checkpoint.pt")
    for read in (lambda: common.load_run(tmp_path), lambda: train(tmp_path, resume=str(tmp_path))):
        with pytest.raises(common.InputError, match="^[^\n]*older version of this project; train again$"):
            read()


# -------------------------------------------------------------------------------------------------------- resume


@contextmanager
def usual_handlers(**other):
    """The handlers of a shell's foreground job, and of `other`. They must be in place at the end, too."""
    usual = {"SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL, "SIGINT": signal.default_int_handler} | other
    usual = {getattr(signal, name): how for name, how in usual.items()}
    before = {number: signal.signal(number, how) for number, how in usual.items()}
    yield
    after = {number: signal.signal(number, how) for number, how in before.items()}
    assert after == usual


def interrupted(out, act, monkeypatch):
    """The exit status of a run of three epochs in which `act(run)` is called in every step."""
    with usual_handlers(), monkeypatch.context() as patch:
        at_each_step(patch, lambda run, *_: act(run))
        with pytest.raises(SystemExit) as end, common.exit_status():
            train(out, epochs=3, knn_every=1)
    return end.value.code


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of three epochs that nothing interrupted."""
    return train(tmp_path_factory.mktemp("whole") / "run", epochs=3, knn_every=1)["out"]


def resume(folder):
    """`python simclr.py --resume FOLDER`: all flags are those of the run."""
    torch.manual_seed(99)
    return simclr.train(common.parse_args(simclr.Config, ["--resume", str(folder)]), DATA)


@pytest.mark.parametrize("name, step", [("SIGINT", 2), ("SIGTERM", 5), ("SIGHUP", 5), ("SIGINT", 6)])
def test_a_signal_saves_at_the_end_of_its_step_and_resume_is_exact(name, step, whole, tmp_path, capfd, monkeypatch):
    """Within the first epoch, within the second, and at the end of one; with the optimiser and the log."""
    number, cut = getattr(signal, name), tmp_path / "cut"
    stop = lambda run: run.step == step - 1 and os.kill(os.getpid(), number)  # noqa: E731
    assert interrupted(cut, stop, monkeypatch) == 128 + number
    said, stopped = capfd.readouterr().err.strip().splitlines()
    assert "stopping after this step" in said and stopped == f"stopped after step {step}; --resume {cut} goes on"
    assert saved(cut, "step") == step
    resume(cut)
    assert same_run(whole, cut)
    rows = [[line.split(",")[:6] for line in Path(at, "log.csv").read_text().splitlines()] for at in (whole, cut)]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_a_finished_run_has_nothing_left_to_do(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "again")
    assert resume(tmp_path / "again")["epoch"] == 3 and equal(saved(whole), saved(tmp_path / "again"))


def test_a_second_signal_stops_at_once_unless_it_is_the_first_one_sent_twice(whole, tmp_path, monkeypatch):
    """A closed terminal sends SIGHUP twice within a moment; a person who presses Ctrl-C again has waited a second."""
    for name, wait, step in (("a", 0, 5), ("b", 1.2, 3)):  # b stops within step 5, and was saved at the epoch's end

        def twice(run, wait=wait):
            for _ in range(2 * (run.step == 4)):
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(wait)

        assert interrupted(tmp_path / name, twice, monkeypatch) == 128 + signal.SIGHUP
        assert saved(tmp_path / name, "step") == step
        resume(tmp_path / name)
        assert same_run(whole, tmp_path / name)


def test_nohup_is_respected(tmp_path):
    with usual_handlers(SIGHUP=signal.SIG_IGN):
        for _ in steps(begun(tmp_path)[0]):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert saved(tmp_path, "step") == 6


KILLED = """
import os, runpy, signal, sys, time, pytest
from tests.helpers import at_each_step

def kill(run, *_):
    if run.step == step:
        os.killpg(0, number)  # as a terminal does: this process and its workers
        time.sleep(1)

number, step = map(int, sys.argv[1:3])
sys.argv[:3] = ["simclr.py"]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
at_each_step(pytest.MonkeyPatch(), kill)
runpy.run_path("simclr.py", run_name="__main__")
"""


@pytest.mark.slow  # a process takes seconds to start
@pytest.mark.parametrize("how, resident_gb", [(signal.SIGKILL, 0), (signal.SIGKILL, 4), (signal.SIGINT, 0)])
def test_a_killed_process_resumes_bit_for_bit(how, resident_gb, photos, tmp_path):
    """In the middle of an epoch of 6 steps, with images in memory or streamed by a worker process. kill -9 loses the
    steps since the last checkpoint, here one."""
    flags = f"--preset demo --data {photos} --epochs 2 --batch-size 32 --knn-every 0 --resident-gb {resident_gb}"
    flags += f" --workers 1 --image-size 16 --hidden-dim 32 --save-minutes {1e-9 if how == signal.SIGKILL else 0}"
    simclr.train(common.parse_args(simclr.Config, f"{flags} --out {tmp_path}/whole".split()))
    killed = ["-c", KILLED, int(how), 8, *flags.split(), "--out", tmp_path / "cut"]
    done = python(*killed, timeout=120, start_new_session=True)
    assert done.returncode == (-9 if how == signal.SIGKILL else 128 + how), done.stderr
    assert "Traceback" not in done.stderr
    assert saved(tmp_path / "cut", "step") == (8 if how == signal.SIGKILL else 9)
    os.symlink(photos, tmp_path / "moved")
    torch.manual_seed(99)
    moved = ["--resume", f"{tmp_path}/cut", "--data", f"{tmp_path}/moved"]
    simclr.train(common.parse_args(simclr.Config, moved))
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_where_no_run_is_starts_there(whole, tmp_path):
    """One command serves for start and restart. A run is there if its checkpoint is."""
    (tmp_path / "config.json").write_text("")
    figures = train(tmp_path, epochs=3, knn_every=1, resume=str(tmp_path))
    assert figures["out"] == str(tmp_path) and same_run(whole, tmp_path)


def test_flags_that_may_change_are_printed(tmp_path, capsys):
    begun(tmp_path / "here")
    os.rename(tmp_path / "here", tmp_path / "there")
    given = dict(epochs=9, lr=0.3, data_dir="x", resident_gb=1.0, workers=2, compile=True, loss_backend="naive")
    given |= dict(micro_batch_size=10, knn_every=3, save_minutes=1.0, tensorboard=True, device="cpu")
    capsys.readouterr()
    run = common.Run(config(resume=f"{tmp_path}/there", **given), DATA)
    said = capsys.readouterr().out.splitlines()
    for name, value in given.items():
        assert any(re.search(rf"{common.dashed(name)} was \S+, now it is {value}", line) for line in said), name
    assert len(said) == len(given) and run.total == 27


def changed(name, value):
    """Another value that the flag can have."""
    if choices := typing.get_args(flags(simclr.Config)[name]):
        return next(choice for choice in choices if choice != value)
    others = {"backbone": "resnet18", "init": "other.pt", "blur": 0.1}
    return others.get(name) or (value / 2 or 0.5 if isinstance(value, float) else 2 * (value or 1))


def test_resume_refuses_any_other_change_and_another_set(tmp_path):
    train(tmp_path)
    kept, resume = (tmp_path / "checkpoint.pt").read_bytes(), str(tmp_path)
    may = {*simclr.Config.MAY_CHANGE, "out", "resume"}
    for name in flags(simclr.Config).keys() - may:
        was = getattr(config(), name)
        with pytest.raises(common.InputError) as error:
            common.Run(config(resume=resume, **{name: changed(name, was)}), DATA)
        words = f"--resume: {common.dashed(name)} was {was}; leave it out"
        assert str(error.value).startswith(words), name
    for data in ((PICTURES[:80], LABELS[:80]), PICTURES[:100], (PICTURES, LABELS % 5)):
        with pytest.raises(common.InputError, match="^--resume.* --data arrays is not the set of that run"):
            train(tmp_path, data, resume=resume)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
