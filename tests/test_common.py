"""The shared module: exit status, flags, network, optimiser, evaluation, and a run and its files."""

import csv
import dataclasses
import errno
import importlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types
import typing
from pathlib import Path
from subprocess import PIPE
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
import moco
import simclr
from tests.helpers import ROOT, equal, python, same_run, saved

CPU = torch.device("cpu")
METHODS = ["simclr", "moco", "byol", "simsiam", "supcon", "swav", "pairwise"]
PICTURES, LABELS = images.make_shapes(110, 0, 16)  # 100 to train on: 3 steps of 30, and 10 held out


def config(out=".", **given):
    """Of a run that takes a tenth of a second."""
    small = {"image_size": 16, "epochs": 2, "batch_size": 30, "hidden_dim": 16, "projection_dim": 8, "workers": 1}
    return simclr.Config.preset("demo", **small | {"knn_every": 0, "warmup_epochs": 0.0, "out": str(out)} | given)


def train(out, data=(PICTURES, LABELS), **given):
    return simclr.train(config(out, **given), data)


def a_run(out, **given):
    """A run that has not begun."""
    c = config(out, **given)
    _, data = common.start(c, (PICTURES, LABELS))
    model = simclr.SimCLR(c)
    optimizer = torch.optim.SGD(common.parameter_groups(model, c.weight_decay), lr=0.1, momentum=0.9)
    return common.Run(c, data, CPU, model=model, optimizer=optimizer)


@pytest.fixture
def no_curves(monkeypatch):
    monkeypatch.setattr(common.Run, "curves", lambda run: None)
    monkeypatch.setattr(common.Run, "neighbours", lambda run: None)


# --------------------------------------------------------------------------------------------------- exit status


OUT_OF_MEMORY = "error: out of memory; give a smaller --batch-size, or pieces of it by --micro-batch-size\n"


@pytest.mark.parametrize(
    "error, status, line",
    [
        (common.InputError("no"), 2, "error: no\n"),
        (common.RunFailure("no"), 1, "error: no\n"),
        (common.Stopped("stopped", signal.SIGINT), 130, "stopped\n"),
        (common.Stopped("stopped", signal.SIGTERM), 143, "stopped\n"),
        (common.Stopped("stopped", signal.SIGHUP), 129, "stopped\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (MemoryError(), 1, OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA"), 1, OUT_OF_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, OUT_OF_MEMORY),  # a fork
        (OSError(errno.ENOSPC, "No space", "x.png"), 1, "error: x.png: No space; is the disk full?\n"),
        (OSError(errno.EDQUOT, "Quota exceeded"), 1, "error: a file: Quota exceeded; is the disk full?\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x.png"), 1, "error: x.png: Permission denied\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.png"), 1, "error: x.png: No such file\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "error: a file: Broken pipe\n"),  # a worker's, not stdout
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
def test_exit_status(error, status, line, capsys):
    with pytest.raises(SystemExit) as end, common.exit_status():
        raise error
    assert end.value.code == status and capsys.readouterr().err == line


@pytest.mark.parametrize("shape", [(2**50,), (2**31, 2**31)])
def test_an_allocation_that_fails_on_a_cpu_is_out_of_memory(shape, capsys):
    with pytest.raises(SystemExit) as end, common.exit_status():
        torch.empty(shape)
    assert end.value.code == 1 and capsys.readouterr().err == OUT_OF_MEMORY


@pytest.mark.parametrize("flush", [True, False])
def test_a_closed_pipe_ends_quietly_as_by_sigpipe(flush, monkeypatch):
    """`python simclr.py | head`, noticed by a line that is flushed, or when all is done."""
    script = f"import common, sys\nwith common.exit_status():\n sys.stdin.read()\n print(1, flush={flush})"
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd=ROOT, text=True) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_bug_keeps_its_traceback():
    for error in (ValueError("a bug"), RuntimeError("a bug")):
        with pytest.raises(type(error)), common.exit_status():
            raise error
    with common.exit_status():
        pass


# --------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("method", METHODS)
def test_help_names_every_flag_in_two_groups_with_examples(method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    module = importlib.import_module(method)
    with pytest.raises(SystemExit) as end:
        common.parse_args(module.Config, ["--help"])
    text = capsys.readouterr().out
    _, own, shared, examples = re.split(f"the flags of {method}:|the run:|examples:", text)
    assert end.value.code == 0 and examples.count(f"python {method}.py") >= 2
    mine = re.findall(r"^    (\w+):.*  # ", re.split(r"\nclass Config\b", Path(module.__file__).read_text())[1], re.M)
    for name, kind in common.flags(module.Config).items():
        here, other = (own, shared) if name in mine else (shared, own)
        assert re.search(rf"^  {common.dashed(name)}\b", here, re.M), name
        assert not re.search(rf"^  {common.dashed(name)}\b", other, re.M), name
        assert kind is not bool or "--no-" + name.replace("_", "-") in here
    assert text.count("(default ") == len(common.flags(module.Config))  # each has its help


def test_help_shows_the_default_of_every_preset(capsys):
    with pytest.raises(SystemExit):
        common.parse_args(simclr.Config, ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    demo = simclr.DEMO["temperature"]
    assert f"small batches and few epochs like it larger (default 0.1; cifar: 0.5; demo: {demo})" in words
    assert "--optimizer {lars,sgd}" in words and "--preset {paper,cifar,demo}" in words


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line_and_python_agree(method):
    config = importlib.import_module(method).Config
    for name, values in config.PRESETS.items():
        shell = common.parse_args(config, ["--preset", name, "--epochs", "2", "--warmup-epochs", "1"])
        here = config.preset(name, epochs=2, warmup_epochs=1.0)
        assert shell == here and shell.epochs == 2 and shell.recipe == here.recipe == name
        assert shell.given == here.given == {"epochs", "warmup_epochs"}
        assert all(getattr(here, k) == v for k, v in values.items() if k not in here.given)
    assert common.parse_args(config, ["--preset", "paper"]) == config.preset("paper") == config()
    assert config() != config.preset("demo") and config().method() == method


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_is_read_with_its_type(method):
    """All flags of one preset, given by hand over another, are the first."""
    config = importlib.import_module(method).Config
    for preset, other in (("paper", "demo"), ("demo", "paper")):
        values, argv = dataclasses.asdict(config.preset(preset)), ["--preset", other]
        for name, kind in common.flags(config).items():
            flag, value = common.dashed(name), values[name]
            argv += [flag, str(value)] if kind is not bool else [flag if value else "--no-" + flag[2:]]
        read = common.parse_args(config, argv)
        assert read == config.preset(preset) and read.given == values.keys()
        assert all(type(value) is type(values[name]) for name, value in dataclasses.asdict(read).items())


@pytest.mark.parametrize(
    "argv, preset",
    [
        ("", "demo"),
        ("--data shapes", "demo"),
        ("--data cifar10", "cifar"),
        ("--data cifar100", "cifar"),
        ("--data stl10", "paper"),
        ("--data /my/photos", "paper"),
        ("--data /my/photos --preset demo", "demo"),
    ],
)
def test_the_preset_follows_the_data(argv, preset):
    c = common.parse_args(simclr.Config, argv.split())
    assert c.recipe == preset and c.data == dict(zip(*[iter(argv.split())] * 2, strict=True)).get("--data", "shapes")


def test_booleans_and_no_abbreviations():
    assert common.parse_args(simclr.Config, ["--compile"]).compile
    assert not common.parse_args(simclr.Config, ["--no-compile"]).compile
    with pytest.raises(common.InputError, match="unknown --temperatur 0.3; did you mean --temperature"):
        common.parse_args(simclr.Config, ["--temperatur", "0.3"])


def test_a_value_given_wins_over_the_stored_one_and_that_over_the_preset(tmp_path):
    a_run(tmp_path, temperature=0.33, epochs=7)
    c = common.parse_args(simclr.Config, ["--resume", "--out", str(tmp_path), "--epochs", "9", "--lr", "0.7"])
    assert c == config(tmp_path, data="a tensor", temperature=0.33, epochs=9, lr=0.7, resume=True)
    assert c.recipe == "demo" and {"temperature", "epochs", "lr"} < c.given and "weight_decay" not in c.given
    assert c.weight_decay == simclr.DEMO["weight_decay"]
    assert not json.loads((tmp_path / "config.json").read_text())["resume"]


def test_a_run_that_was_moved_to_the_usual_folder_resumes_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "here")
    os.renames("here", "runs/simclr")
    assert common.parse_args(simclr.Config, ["--resume"]).out == "runs/simclr"


# ------------------------------------------------------------------------------------------------ the preset fits


@pytest.mark.parametrize(
    "n, batch", [(40_000, 4096), (16_384, 4096), (5000, 256), (300, 16), (40, 16), (31, 31), (9, 9), (2, 2)]
)
def test_a_presets_batch_is_fitted_to_the_data(n, batch, capsys):
    c = simclr.Config.preset("paper")
    common.fit_to(c, n)
    assert c.batch_size == batch
    note = f"note: for {n:,} images and 100 epochs, --batch-size 4096 becomes {batch}\n" * (batch < 4096)
    assert capsys.readouterr().out.startswith(note or "") and (note or c.given == set())
    common.fit_to(c, n)  # as a resumed run does
    assert c.batch_size == batch and "becomes" not in capsys.readouterr().out


def test_a_rate_that_is_not_scaled_with_the_batch_follows_it(capsys):
    c, given, scaled = moco.Config.preset("paper"), moco.Config.preset("paper", lr=0.1), simclr.Config.preset("paper")
    for each in (c, given, scaled):
        common.fit_to(each, 1000)
    assert (c.batch_size, c.lr) == (32, 0.03 / 8) and (given.lr, scaled.lr) == (0.1, 0.3)
    assert "--batch-size 256 becomes 32, --lr 0.03 becomes 0.00375" in capsys.readouterr().out


def test_what_was_given_by_hand_is_not_fitted_and_a_short_run_is_told(capsys):
    c = simclr.Config.preset("paper", batch_size=512, epochs=100, warmup_epochs=100.0)
    common.fit_to(c, 600)
    assert (c.batch_size, c.warmup_epochs) == (512, 100)
    assert capsys.readouterr().out == "note: 100 steps in all are too few to learn much; --epochs 1000 makes 1,000\n"


def test_a_presets_warm_up_is_lowered_and_a_given_one_is_not(tmp_path, capsys):
    c = simclr.Config.preset("cifar", epochs=10)
    common.fit_to(c, 50_000)
    assert c.warmup_epochs == 1.0 and "--warmup-epochs 10 becomes 1\n" in capsys.readouterr().out
    a_run(tmp_path, epochs=2, warmup_epochs=2.0)
    resumed = common.parse_args(simclr.Config, ["--resume", "--out", str(tmp_path)])
    common.fit_to(resumed, 100)
    assert resumed.warmup_epochs == 2 and "becomes" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("name, last, width", [("resnet18", "bn2", 512), ("resnet50", "bn3", 2048)])
def test_backbones_are_torchvisions(name, last, width, stem):
    for zero in (True, False):
        ours = common.build_backbone(simclr.Config(backbone=name, stem=stem), zero_init_residual=zero)
        scales = [getattr(block, last).weight for layer in (ours.layer1, ours.layer4) for block in layer]
        assert all((scale == 1 - zero).all() for scale in scales)
    assert ours.conv1.kernel_size == ((3, 3) if stem == "cifar" else (7, 7))
    assert isinstance(ours.maxpool, nn.Identity) == (stem == "cifar") and ours.feature_dim == width
    theirs = torchvision.models.get_model(name)
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys
    theirs.fc, x = nn.Identity(), torch.rand(2, 3, 32, 32)
    assert torch.equal(theirs.eval()(x), ours.eval()(x)) and ours(x).shape == (2, width)


def test_resnet8_is_small_and_takes_any_size():
    network = common.build_backbone(simclr.Config(backbone="resnet8"))
    for side in (8, 33):
        assert network(torch.rand(2, 3, side, side)).shape == (2, network.feature_dim)
    assert sum(p.numel() for p in network.parameters()) < 400_000
    assert all((m.weight == 1).all() for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("pieces", [3, 4, 16])
def test_pieces_give_the_gradient_of_the_whole_batch(pieces, views):
    """Without BN they change nothing, whatever mixes the rows: equal to float64 rounding."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(27, 12), nn.Tanh(), nn.Linear(12, 6)).double()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, *views):
            return self.body(torch.cat(views)).chunk(len(views)) if len(views) > 1 else self.body(*views)

    x, w = torch.rand(views, 16, 3, 3, 3, dtype=torch.float64), torch.rand(6, 16 * views, dtype=torch.float64)
    found = []
    for count in (1, pieces):
        body.zero_grad()
        z = common.in_pieces(Model(), count, *x)
        z = torch.cat(z) if views > 1 else z
        (z @ w).logsumexp(0).square().mean().backward()
        found.append([z, *(p.grad.clone() for p in body.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(*found, strict=True))


def test_pieces_hold_no_graph_and_move_bn_statistics_once():
    torch.manual_seed(0)
    model, twin = simclr.SimCLR(config()), simclr.SimCLR(config())
    twin.load_state_dict(model.state_dict())
    x1, x2 = torch.rand(2, 8, 3, 32, 32)
    held = []

    def graph(network, pieces):
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z1, z2 = common.in_pieces(network, pieces, x1, x2)
        held.append(kept)
        return z1.square().sum() + z2.square().sum()

    graph(model, 2).backward()
    graph(model, 1)
    assert held[0] == x1.nbytes + x2.nbytes < held[1] / 20  # the pieces' pictures alone
    model.load_state_dict(twin.state_dict())
    model.zero_grad()
    sum(z.square().sum() for z in common.in_pieces(model, 2, x1, x2)).backward()
    for piece in (slice(0, 4), slice(4, 8)):
        sum(z.square().sum() for z in twin(x1[piece], x2[piece])).backward()
    assert equal(model.state_dict(), twin.state_dict())  # the running statistics moved once a piece
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_still_statistics():
    """The output is that of training mode; the buffers stay to the bit; and afterwards they move as before."""
    model, x = simclr.SimCLR(config()), torch.rand(2, 4, 3, 16, 16)
    before, settings = (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.__dict__.copy() for m in model.modules()],
    )
    with pytest.raises(RuntimeError, match="inside"), common.still_statistics(model):
        still = model(*x)
        raise RuntimeError("inside")
    assert equal(model.state_dict(), before)
    assert all(m.__dict__.get("momentum") == s.get("momentum") for m, s in zip(model.modules(), settings, strict=True))
    assert equal(model(*x), still) and not equal(model.state_dict(), before)
    assert model.backbone.bn1.num_batches_tracked == 1


def test_network_for_casts_and_cuts():
    model, x = simclr.SimCLR(config()).eval(), torch.rand(2, 30, 3, 16, 16)
    assert common.network_for(model, config(amp="bf16"), CPU)(*x)[0].dtype == torch.bfloat16 and model.training
    assert common.network_for(model, config(), CPU)(*x)[0].dtype == torch.float32
    rows = []
    model.backbone.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    for given, pieces, seen in (({}, 0, [60]), ({"micro_batch_size": 10}, 0, [20] * 3), ({}, 2, [30] * 2)):
        rows.clear()
        common.network_for(model, config(**given), CPU, pieces)(*x)
        assert rows == seen


def test_loss_backend():
    kernels = pytest.importorskip("kernels")
    for asked in ("naive", "blocked"):
        assert common.loss_backend(kernels, config(loss_backend=asked), 40, 40, CPU) == asked
    assert common.loss_backend(kernels, config(), 40, 40, CPU) in ("naive", "blocked")
    assert common.loss_backend(None, config(), 40, 40, CPU) == "naive"
    for given, package in (("blocked", None), ("triton", None), ("triton", kernels)):
        with pytest.raises(common.InputError, match=f"^--loss-backend {given}: "):
            common.loss_backend(package, config(loss_backend=given), 40, 40, CPU)


# -------------------------------------------------------------------------------------------------- optimisation


def test_cosine_lr():
    values = [common.cosine_lr(s, 100, 10, 2.0) for s in range(100)]
    assert math.isclose(values[0], 0.2) and math.isclose(values[9], 2.0) and math.isclose(values[10], 2.0)
    assert math.isclose(values[55], 1.0) and 0 < values[99] < 0.01
    assert values[:10] == sorted(values[:10]) and values[10:] == sorted(values[10:], reverse=True)
    assert common.cosine_lr(0, 1, 0, 2.0) == 2.0 and common.cosine_lr(0, 4, 2.5, 1.0) == 0.4


def test_set_lr_leaves_constant_groups():
    p = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "constant": True}], lr=0.5)
    common.set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_parameter_groups():
    model = simclr.SimCLR(config())
    weights, rest = common.parameter_groups(model, 0.3)
    assert (weights["weight_decay"], weights["adapt"], rest["weight_decay"], rest["adapt"]) == (0.3, True, 0.0, False)
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {id(p): type(m) for m in model.modules() for p in m.parameters(recurse=False)}
    assert {kinds[id(p)] for p in weights["params"]} == {nn.Conv2d, nn.Linear}
    assert all(p.ndim == 1 for p in rest["params"])
    both = {names[id(p)] for p in weights["params"] + rest["params"]}
    assert both == {name for name, p in model.named_parameters() if p.requires_grad} < set(names.values())


@pytest.mark.parametrize("inside", [True, False])
def test_lars_against_the_written_rule(inside):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    optimizer = common.LARS(common.parameter_groups(model, 0.1), lr=0.3, lr_in_momentum=inside)
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in w.items()}
    for step in range(4):
        lr = 0.3 / (step + 1)
        common.set_lr(optimizer, lr)
        model.zero_grad()
        model(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
        for name, p in model.named_parameters():
            g, rate = p.grad.clone(), 1.0
            if p.ndim > 1:  # a weight: decay and adaptation
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
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(p.detach(), -torch.ones(2, 2))
    p.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2, 2), -1.9))  # the momentum alone


# ---------------------------------------------------------------------------------------------------- evaluation


def test_knn_against_a_plain_loop():
    torch.manual_seed(0)
    bank, queries = torch.randn(50, 6), torch.randn(60, 6)
    bank_labels, labels = torch.randint(3, (50,)), torch.randint(3, (60,))
    right = []
    for q, label in zip(queries, labels, strict=True):
        s = torch.cosine_similarity(q[None], bank)
        votes = [0.0] * 3
        for i in s.argsort(descending=True)[:7]:
            votes[bank_labels[i]] += math.exp(s[i].item() / 0.1)
        right.append(votes.index(max(votes)) == label)
        assert common.knn_accuracy(bank, bank_labels, q[None], label[None], k=7) == right[-1]
    assert common.knn_accuracy(bank, bank_labels, queries, labels, k=7) == sum(right) / 60
    assert common.knn_accuracy(bank, bank_labels, bank, bank_labels, k=1) == 1.0
    assert 0 <= common.knn_accuracy(bank, bank_labels, queries, labels, k=200) <= 1  # k is capped
    assert [common.knn_k(torch.arange(n) % 10) for n in (10_000, 180, 7)] == [200, 18, 1]
    by_default = common.knn_accuracy(bank, bank_labels, queries, labels)
    assert by_default == common.knn_accuracy(bank, bank_labels, queries, labels, k=16)


def test_a_classifier_no_better_than_a_guess_is_told(capsys):
    for loss, told in ((2.0, False), (2.4, True), (math.nan, True)):
        common.warn_of_guess(loss, 10)
        assert ("is worse than a guess's, 2.30" in capsys.readouterr().out) == told


def test_the_bank_is_the_labelled_training_images(monkeypatch):
    """Unlabelled ones have no vote, and of many a part is drawn."""
    labels, banks = LABELS.clone(), []
    labels[::2] = -1
    data = images.from_tensors(PICTURES, labels, CPU)
    data.test = images.resident(PICTURES[:9], LABELS[:9], CPU)
    monkeypatch.setattr(common, "knn_accuracy", lambda bank, known, *rest: banks.append(known) or 0.5)
    common.knn_of(common.pixels, data, config())
    assert len(banks[-1]) == (data.train.labels >= 0).sum() and (banks[-1] >= 0).all()
    monkeypatch.setattr(common, "BANK", 10)
    common.knn_of(common.pixels, data, config())
    assert len(banks[-1]) == 10 and (banks[-1] >= 0).all()
    assert common.knn_of(common.pixels, images.from_tensors(PICTURES, None, CPU), config()) is None


def test_embed_is_in_eval_mode_and_gives_the_mode_back():
    model = simclr.SimCLR(config())
    split = images.resident(*images.make_shapes(600, 0, 16), CPU)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole, part = (common.embed(model.backbone, split, config(), i) for i in (None, torch.arange(3)))
    assert torch.allclose(whole[:3], part, atol=1e-5) and model.backbone.training  # the batch does not matter
    assert equal(model.state_dict(), before)
    seen = common.embed(lambda x: x.flatten(1), split, config(), torch.tensor([5, 2]))  # what the network is fed
    theirs = torchvision.transforms.functional.normalize(
        split.images[[5, 2]].float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    assert torch.allclose(seen, theirs.flatten(1), atol=1e-5)


def test_feature_std_and_effective_rank():
    torch.manual_seed(0)
    z = torch.randn(20_000, 16)
    (std, rank, _), scaled = common.health(z), common.health(7 * z)
    assert abs(std - 1 / 4) < 0.002 and abs(rank - 16) < 0.1
    assert math.isclose(scaled[0], std, rel_tol=1e-5)
    flat, two = torch.ones(100, 16), torch.eye(16)[torch.arange(100) % 2]
    assert common.health(flat)[0] < 1e-6 and abs(common.health(flat)[1] - 1) < 1e-3
    assert abs(common.health(two)[1] - 2) < 1e-3
    z = torch.randn(9, 30)  # fewer rows than channels
    s = torch.linalg.svdvals(F.normalize(z.double(), dim=1))
    p = s / s.sum()
    assert math.isclose(common.health(z)[1], (-(p * p.log()).sum()).exp(), rel_tol=1e-4)


def test_cos2_is_the_mean_squared_cosine_of_pairs():
    torch.manual_seed(0)
    for n, d in ((7, 4), (4, 7), (64, 256)):
        z = torch.randn(n, d) * torch.rand(n, 1)
        pairs = [F.cosine_similarity(z[i], z[j], dim=0).item() ** 2 for i in range(n) for j in range(n) if i != j]
        assert math.isclose(common.health(z)[2], sum(pairs) / len(pairs), rel_tol=1e-4)
    line = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [0.5, 1.0]])  # two opposite points: std is not 0, but this is 1
    assert math.isclose(common.health(line)[2], 1, rel_tol=1e-6) and common.health(line)[0] > 0.5
    dead = torch.zeros(5, 3)
    assert common.health(dead)[1:] == (1, 1)
    assert abs(common.health(torch.eye(5))[2]) < 1e-6 and math.isfinite(common.health(torch.ones(1, 3))[2])


# ------------------------------------------------------------------------------------------------- start and data


def test_start_takes_a_tensor_a_pair_or_data(tmp_path):
    _, alone = common.start(config(tmp_path / "a"), PICTURES)
    assert len(alone.train) == 110 and alone.test is None and not alone.labelled
    device, pair = common.start(config(tmp_path / "b"), (PICTURES, LABELS))
    assert (len(pair.train), len(pair.test), len(pair.classes)) == (100, 10, 10) and pair.labelled
    _, same = common.start(config(tmp_path / "c"), pair)
    assert same is pair and device == CPU and (tmp_path / "c").is_dir()
    assert torch.initial_seed() == 0
    common.start(config(tmp_path / "d", seed=5), pair)
    assert torch.initial_seed() == 5


# ----------------------------------------------------------------------------------------- a run and its files


def test_a_run_and_its_files(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    metrics = train(tmp_path, epochs=3, knn_every=2)
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert list(rows[0]) == ["epoch", "loss", "lr", "feature_std", "effective_rank", "knn_top1", "images_per_second"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [bool(row["knn_top1"]) for row in rows] == [False, True, True]  # every second, and the last
    assert all(float(value) >= 0 for row in rows for key, value in row.items() if key != "knn_top1")
    for key, value in rows[-1].items():
        assert math.isclose(metrics[key], float(value), rel_tol=1e-5)

    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state.keys() == {"method", "config", "parts", "progress", "seen", "rng"}
    assert state["parts"].keys() == {"model", "optimizer", "scaler"}
    assert (state["method"], state["progress"]["step"]) == ("simclr", 9)
    assert torch.load(tmp_path / "checkpoint.previous.pt", weights_only=True)["progress"]["step"] == 6
    assert json.loads((tmp_path / "config.json").read_text())["preset"] == "demo"
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    simclr.SimCLR(config()).backbone.load_state_dict(backbone)
    assert all(torch.equal(state["parts"]["model"][1]["backbone." + name], value) for name, value in backbone.items())
    assert Image.open(tmp_path / "views.png").width > 8 * 90  # eight small pictures, enlarged
    assert Image.open(tmp_path / "curves.png").width == 14 * 110

    for words in (
        "simclr    --preset demo --epochs 3",
        "100 images, 10 held out",
        "10 classes: 0, 1",
        "3 of batch 30 an epoch, 9 in all",
    ):
        assert words in out
    beside = ", ".join(f"{metrics[f'knn {name}']:.3f} of {name}" for name in ("g(h)", "untrained h", "raw pixels"))
    beside += ", 0.100 of a guess"
    assert f"\nkNN top-1 {metrics['knn_top1']:.3f} of h on 10 held-out images (k = 10); {beside}\n" in out
    assert f"next: python linear_eval.py {tmp_path} --data PICTURES\n" in out
    assert not list(tmp_path.glob("*.part"))


def test_every_start_keeps_the_checkpoints_of_the_runs_before(tmp_path, capsys, no_curves):
    names, kept = ("checkpoint.pt", "checkpoint.previous.pt"), {}
    for start in (1, 2, 3):
        train(tmp_path)
        kept |= {name.replace("checkpoint", f"checkpoint.run{start}"): (tmp_path / name).read_bytes() for name in names}
        said = f"note: {tmp_path} held a run; its checkpoint is kept as checkpoint.run{start - 1}.pt, the rest goes\n"
        assert (said in capsys.readouterr().out) == (start > 1)
    a_run(tmp_path)
    assert kept == {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint*.pt")} and len(kept) == 6


def test_without_labels(tmp_path, capsys, no_curves):
    metrics = train(tmp_path, PICTURES, knn_every=1)
    assert metrics["knn_top1"] is None and not any(name.startswith("knn ") for name in metrics)
    assert (tmp_path / "log.csv").read_text().splitlines()[1].split(",")[5] == ""
    out = capsys.readouterr().out
    assert "110 images, none held out; no labels" in out and f"{tmp_path} --embed out.npz --map map.png" in out


def test_the_header_fits_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    a_run(tmp_path).header(loss="a word " * 40)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 8 and all(len(line) <= 80 for line in lines)


def test_progress_is_a_line_in_a_terminal_and_a_line_an_epoch_in_a_file(tmp_path, capsys, monkeypatch, no_curves):
    monkeypatch.setenv("COLUMNS", "80")
    train(tmp_path)
    out = capsys.readouterr().out
    assert "\r" not in out and "min left" not in out
    assert len(re.findall(r"^epoch +[12]/2 .*images/s  loss \d.*rank [\d.]+$", out, re.M)) == out.count("epoch  ") == 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train(tmp_path)
    shown = re.findall(r"\r\x1b\[K(epoch +\d/2  3/3, [^\r\n]*)", capsys.readouterr().out)
    assert len(shown) == 2 and all(len(line) < 80 for line in shown)
    assert all(re.search(r"min left  [\d,]+ images/s  loss \d.* std [\d.]+", line) for line in shown)


@pytest.mark.parametrize("minutes, steps", [(1e-9, [1, 2, 3, 4, 5, 6]), (0.0, [3, 6]), (10.0, [3, 6])])
def test_save_minutes(minutes, steps, tmp_path, monkeypatch, no_curves):
    written, save = [], common.Run.save
    monkeypatch.setattr(common.Run, "save", lambda run: written.append(run.step) or save(run))
    train(tmp_path, save_minutes=minutes)
    assert written == steps


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own(tmp_path):
    run = a_run(tmp_path)
    orders = []
    for _ in range(2):
        batches = [index for index, _ in run.batches(views=1, scale=(0.5, 1.0))]
        assert [len(index) for index in batches] == [30] * 3
        orders.append(torch.cat(batches))
        run.progress["step"] += 3
    assert all(len(order.unique()) == 90 for order in orders) and not torch.equal(*orders)
    run.progress["step"] = 4  # the second of the second epoch
    rest = torch.cat([index for index, _ in run.batches(views=1, scale=(0.5, 1.0))])
    assert torch.equal(rest, orders[1][30:])


@pytest.mark.parametrize(
    "z, settled, collapsed",
    [
        (torch.ones(8, 8), 3, True),
        (torch.ones(8, 8) * torch.tensor([1.0, -1, 1, 1, 1, 1, 1, -1])[:, None], 3, True),
        (torch.eye(8, 8), 3, False),
        (torch.ones(4, 8), 3, False),
        (torch.ones(8, 8), 4, False),
    ],
    ids=["a point", "a line", "healthy", "few rows", "early"],
)
def test_a_collapse_is_told_once_and_names_cos2(z, settled, collapsed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common.Run, "SETTLED", settled)
    run, view = a_run(tmp_path), torch.zeros(2, 3, 16, 16)
    for epoch in (1, 2):
        for _ in run.batches(views=1, scale=(0.5, 1.0)):
            run.log(torch.tensor(1.0), z, view)
        run.end_epoch()
        assert ("warning: the output has collapsed" in (out := capsys.readouterr().out)) == (collapsed and epoch == 1)
        assert ("cos2, the mean squared cosine of two images, is 1.000; 0.125 when spread out" in out) == (
            collapsed and epoch == 1
        )
        run.warned |= not collapsed  # 6 steps would be settled


@pytest.mark.parametrize("rows", [[], [[1, 2.0, 0.1, 0.3, 9.0, None, 5.0]]])
def test_curves_of_any_length(rows, tmp_path):
    """None after Ctrl-C in the first epoch; without labels the panel of kNN is empty."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = a_run(tmp_path)
    run.progress["rows"] = rows
    run.curves()
    assert (tmp_path / "curves.png").exists() == bool(rows)
    assert not rows or Image.open(tmp_path / "curves.png").width == 14 * 110


def test_without_matplotlib_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = a_run(tmp_path)
    run.progress["rows"] = [[1, 1.0, 0.1, 0.1, 3.0, None, 5.0]]
    capsys.readouterr()
    run.curves()
    assert capsys.readouterr().out == "no curves.png: matplotlib is not installed (pip install matplotlib)\n"
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("given", [{"amp": "bf16"}, pytest.param({"compile": True}, marks=pytest.mark.slowest)])
def test_a_run_in_mixed_precision_or_compiled(given, tmp_path, no_curves):
    plain, other = (train(tmp_path, epochs=1, **flags)["loss"] for flags in ({}, given))
    assert math.isclose(plain, other, rel_tol=0.1)
    assert all(value.dtype != torch.bfloat16 for value in saved(tmp_path).values())
    simclr.SimCLR(config()).load_state_dict(saved(tmp_path))  # the same names


# -------------------------------------------------------------------------------------- files, whole and read back


@pytest.mark.parametrize(
    "error, seen, words",
    [
        (OSError(28, "No space left on device"), common.RunFailure, "No space left on device.*is kept"),
        (RuntimeError("DefaultCPUAllocator: can't"), RuntimeError, "DefaultCPUAllocator"),
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
    ],
)
def test_a_save_that_fails_leaves_the_old_file(error, seen, words, tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    common.save_whole({"a": 1}, path)
    for module, name in ((torch, "save"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: (_ for _ in ()).throw(error))
            with pytest.raises(seen, match=words):
                common.save_whole({"a": 2}, path)
        assert torch.load(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    """kill -9 between any two of its steps leaves the one or the other."""
    path, before, steps, parts, replace, fsync = tmp_path / "x.txt", tmp_path / "y", [], set(), os.replace, os.fsync
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda number: steps.append(path.read_text()) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda a, b: steps.append(Path(a).read_text()) or parts.add(a) or replace(a, b))
    common.save_whole("new", path)
    assert steps == ["old", "new"] and path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1
    copyfile = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: steps.append(path.read_text()) or copyfile(a, b))
    common.save_whole("newer", path, before)
    assert steps[2:] == ["new", "new", "newer"] and (path.read_text(), before.read_text()) == ("newer", "new")
    assert len(parts) == 2  # no two writers have the same name aside


def test_what_a_killed_save_left_goes_and_nothing_else(tmp_path):
    for name in ("checkpoint.pt.1234abcd.part", "film.part"):
        (tmp_path / name).touch()
    a_run(tmp_path)
    assert [path.name for path in tmp_path.glob("*.part")] == ["film.part"]


HOLDS = """
import os, sys
from pathlib import Path
import common
held = common.lock(Path(sys.argv[1]))
if worker := os.fork():
    print(worker, flush=True)
sys.stdin.read()
"""


def test_two_runs_in_one_folder_are_refused_until_the_first_is_killed(tmp_path, monkeypatch, no_curves):
    pytest.importorskip("fcntl")
    first = [sys.executable, "-c", HOLDS, tmp_path]
    with subprocess.Popen(first, stdin=PIPE, stdout=PIPE, cwd=ROOT, text=True) as process:
        worker = int(process.stdout.readline())
        line = f"^--out {tmp_path}: another run is writing there; choose another folder, or wait$"
        with monkeypatch.context() as patch, pytest.raises(common.InputError, match=line):
            patch.setattr(images, "load", None)  # it is not come to that
            train(tmp_path, data=None)
        c = config(tmp_path)
        with pytest.raises(common.InputError, match="another run is writing there"):
            common.Run(c, images.from_tensors(PICTURES, LABELS, CPU), CPU, model=simclr.SimCLR(c))
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        process.kill()
        process.wait()
        os.kill(worker, 0)  # still there, as one may be for seconds
        train(tmp_path)


def test_a_run_lets_go_of_its_folder_when_it_ends(tmp_path, no_curves):
    fcntl = pytest.importorskip("fcntl")
    run, held = a_run(tmp_path), []
    for _ in run.epochs():
        held.append(run.lock.closed)
        break
    train(tmp_path / "again"), train(tmp_path / "again")
    assert held == [False] and run.lock.closed
    assert python("-c", "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), 6)", tmp_path / ".lock").returncode == 0
    assert fcntl.LOCK_EX | fcntl.LOCK_NB == 6


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    a_run(tmp_path)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(tmp_path, no_curves):
    """torch.load checks no checksum; what is not refused must be the same to the bit."""
    train(tmp_path)
    path, before, rng = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt", random.Random(0)
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    start = rng.randrange(len(whole) // 4, len(whole) // 2)
    wrong, refused = [whole[:start] + bytes(2000) + whole[start + 2000 :], whole[:start], b""], 0
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        wrong.append(bytes(flipped))
    for content in wrong:
        path.write_bytes(content)
        for read in (common.load_checkpoint, lambda path: common.load_run(path.parent)):
            try:
                assert equal(read(path), state) or read is not common.load_checkpoint
            except common.InputError as error:
                refused += 1
                advice = "checkpoint.previous.pt beside it is the one before: rename it to checkpoint.pt to go on"
                assert f"{path} is not a whole checkpoint" in str(error) and advice in str(error)
    assert refused > 2 * 30
    for spoil in (lambda: path.write_bytes(wrong[0]), path.unlink):
        spoil()
        with pytest.raises(common.InputError, match="rename it to checkpoint.pt"):
            train(tmp_path, resume=True)
    os.rename(before, path)
    assert saved(tmp_path, "progress")["step"] == 3
    train(tmp_path, resume=True)
    assert saved(tmp_path, "progress")["step"] == 6
    before.write_bytes(wrong[0])
    with pytest.raises(common.InputError, match="checkpoint.previous.pt is not .*; train first"):
        common.load_checkpoint(before)


@pytest.mark.parametrize("error", [PermissionError(13, "no"), MemoryError(), RuntimeError("DefaultCPUAllocator: not")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(error, tmp_path, monkeypatch):
    a_run(tmp_path).save()
    monkeypatch.setattr(torch, "load", lambda *_, **named: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        common.load_checkpoint(tmp_path / "checkpoint.pt")


def test_load_run(tmp_path, no_curves):
    train(tmp_path / "run", projection_head="linear")
    c, model = common.load_run(tmp_path / "run")
    assert isinstance(model, simclr.SimCLR) and dataclasses.asdict(c)["projection_head"] == "linear"
    assert (
        not model.training
        and c == config(tmp_path / "run", data="a tensor", projection_head="linear")
        and equal(model.state_dict(), saved(tmp_path / "run"))
    )
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for change, words in (
        ({"method": "os"}, "a run of os; put os.py beside common.py"),
        ({"method": "../simclr"}, "put ../simclr.py beside"),
        ({"parts": {"model": ("Nothing", {})}}, "is not a whole checkpoint of simclr"),
        ({"config": {"unknown": 1}}, "is not a whole checkpoint of simclr"),
        ({"parts": {"model": ("SimCLR", {})}}, "is not a whole checkpoint of simclr"),
    ):
        torch.save(state | change, tmp_path / "checkpoint.pt")
        with pytest.raises(common.InputError, match=re.escape(words)):
            common.load_run(tmp_path)
    with pytest.raises(common.InputError, match="no checkpoint .*train first"):
        common.load_run(tmp_path / "nowhere")
    state["parts"]["model"][1]["projector.0.weight"][0, 0] = math.nan
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(common.InputError, match="checkpoint.pt: projector.0.weight is not finite; train again"):
        common.load_run(tmp_path)


# ------------------------------------------------------------------------------------------------- given weights


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_given_weights(method, tmp_path, few_shapes, capsys):
    """After no step the backbone is the given one to the bit, and so are MoCo's and BYOL's second encoders."""
    weights, module = common.resnet8().state_dict(), importlib.import_module(method)
    torch.save({**weights, "fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}, tmp_path / "w.pth")
    given = {"init": str(tmp_path / "w.pth"), "epochs": 0, "out": str(tmp_path / "run")}
    metrics = module.train(module.Config.preset("demo", **given))
    line = f"resnet8 from the weights of {tmp_path / 'w.pth'}, 0.31 M"
    assert line.replace(" ", "") in "".join(capsys.readouterr().out.split())  # the terminal breaks it anywhere
    assert metrics["epoch"] == 0 and metrics["knn_top1"] == metrics["knn h of --init"]
    assert equal(torch.load(tmp_path / "run" / "backbone.pt", weights_only=True), weights)
    (tmp_path / "w.pth").unlink()  # a run stands for itself
    config, model = common.load_run(tmp_path / "run")
    assert config.init == given["init"] and equal(model.backbone.state_dict(), weights)
    second = {"moco": "key_encoder.0.", "byol": "target.0."}.get(method)
    found = {n.removeprefix(second): v for n, v in model.state_dict().items() if n.startswith(second)} if second else {}
    assert not second or equal(found, weights)


def test_torchvisions_weights_go_round_to_the_bit(tmp_path):
    network = torchvision.models.resnet18()
    with torch.no_grad():
        for p in network.state_dict().values():
            p.copy_(p + 1 if p.dtype == torch.int64 else torch.rand_like(p))
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    given = {"backbone": "resnet18", "image_size": 32, "hidden_dim": 0}
    simclr.train(config(tmp_path / "run", init=str(tmp_path / "r18.pth"), epochs=0, **given), (PICTURES, LABELS))
    import linear_eval

    linear_eval.main([str(tmp_path / "run"), "--export", str(tmp_path / "out.pth")])
    out = torch.load(tmp_path / "out.pth", weights_only=True)
    assert equal(dict(out), {n: v for n, v in network.state_dict().items() if not n.startswith("fc.")})


def test_weights_that_do_not_fit_are_refused_by_their_first_key(tmp_path, monkeypatch):
    good = common.resnet8().state_dict()
    old = {n: v for n, v in good.items() if not n.endswith("num_batches_tracked")}  # torchvision's first files
    common.build_backbone(saved_as(old, tmp_path))
    without = {n: v for n, v in good.items() if n != "layer1.conv2.weight"}
    wide = good | {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    for state, words in (
        (good | {"layer9.x": good["bn1.bias"]}, "layer9.x is (32,) there, and absent in resnet8"),
        (without, "layer1.conv2.weight is absent there, and (32, 32, 3, 3)"),
        (wide, "conv1.weight is (64, 3, 7, 7) there, and (32, 3, 3, 3) in resnet8 with --stem imagenet"),
        (good | {"bn1.bias": good["bn1.bias"] / 0}, "['bn1.bias'] is not finite"),
        ({"parts": {"model": 1}}, "no whole state_dict"),
        ({}, "conv1.weight is absent there"),
        ([1], "no whole state_dict"),
    ):
        with pytest.raises(common.InputError, match=re.escape(words)):
            common.build_backbone(saved_as(state, tmp_path))
    with pytest.raises(common.InputError, match="no/such.pth: no such file; give random, imagenet, or a file"):
        common.build_backbone(config(init="no/such.pth"))
    with pytest.raises(common.InputError, match="there is none for resnet8"):
        common.build_backbone(config(init="imagenet"))
    with pytest.raises(common.InputError, match="this run would overwrite it; choose another --out"):
        train(tmp_path, init=f"{tmp_path}/../{tmp_path.name}/backbone.pt")


def saved_as(state, folder):
    """A config that starts from this state."""
    path = folder / f"{os.urandom(4).hex()}.pth"
    torch.save(state, path)
    return config(init=str(path))


def test_imagenet_is_torchvisions_best_and_without_a_network_one_line(monkeypatch, capsys):
    asked, weights = [], torchvision.models.resnet18().state_dict()

    def download(url, *, progress, check_hash):
        asked.append((url, check_hash))
        if len(asked) > 2:
            raise URLError("Name or service not known")
        return weights

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    network = common.build_backbone(config(init="imagenet", backbone="resnet18"))
    assert asked == [(torchvision.models.ResNet18_Weights.DEFAULT.url, True)]
    assert equal(network.state_dict(), {n: v for n, v in weights.items() if not n.startswith("fc.")})
    with pytest.raises(common.InputError, match="conv1.weight is .64, 3, 7, 7. there, and .64, 3, 3, 3. in resnet18"):
        common.build_backbone(config(init="imagenet", backbone="resnet18", stem="cifar"))
    with pytest.raises(common.InputError, match="--init imagenet: the download failed .*not known.*check the network"):
        common.build_backbone(config(init="imagenet", backbone="resnet18"))


def test_a_run_goes_on_without_the_file_that_it_started_from(tmp_path, capsys):
    torch.save(common.resnet8().state_dict(), tmp_path / "w.pth")
    given = {"init": str(tmp_path / "w.pth"), "knn_every": 1}
    assert "knn h of --init" in train(tmp_path / "run", epochs=1, **given)
    (tmp_path / "w.pth").unlink()
    metrics = train(tmp_path / "run", resume=True, **given)
    assert metrics["epoch"] == 2 and "knn h of --init" not in metrics and "knn g(h)" in metrics


def test_a_run_from_before_a_flag_goes_on(tmp_path, no_curves):
    train(tmp_path, epochs=1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name in ("init", "tensorboard"):
        del state["config"][name]
    torch.save(state, tmp_path / "checkpoint.pt")
    train(tmp_path, resume=True)
    assert saved(tmp_path, "progress")["step"] == 6


def test_no_epoch_writes_what_a_run_writes(tmp_path, capsys):
    metrics = train(tmp_path, epochs=0, knn_every=1)
    out = capsys.readouterr().out
    assert "0 in all" in out and "too few" not in out and "the run is done" not in out
    assert metrics["knn_top1"] == metrics["knn untrained h"] and metrics["loss"] is None
    there = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "log.csv", "checkpoint.pt", "backbone.pt", "neighbours.png"} <= there
    assert equal(common.load_run(tmp_path)[1].state_dict(), saved(tmp_path))
    train(tmp_path, epochs=1, resume=True)
    assert saved(tmp_path, "progress")["step"] == 3
    train(tmp_path, epochs=0, resume=True)
    assert (
        saved(tmp_path, "progress")["step"] == 3 and "the run is done, and nothing changes" in capsys.readouterr().out
    )


# ------------------------------------------------------------------------------------- neighbours and TensorBoard


@pytest.mark.parametrize("held_out", [True, False])
def test_neighbours_are_the_nearest_in_h_and_never_the_picture_itself(held_out, tmp_path):
    """Pictures of one grey level; h is the direction (cos, sin) of an angle that the level gives."""
    n = 20
    level = (torch.arange(n) * 12).to(torch.uint8)
    data = images.from_tensors(level.view(n, 1, 1, 1).expand(n, 3, 16, 16), torch.arange(n) // 10, CPU)
    if not held_out:
        data = images.Data("none held out", data.train, None, data.classes)
    seen = lambda x: (x * images.STD + images.MEAN).mean((1, 2, 3))  # noqa: E731
    angle = lambda x: torch.stack([seen(x).cos(), seen(x).sin()], 1) * (1 + 5 * seen(x)[:, None])  # noqa: E731
    sheet = np.asarray(common.draw_neighbours(angle, data, config(), rows=4, nearest=3)).astype(int)
    asked = data.test or data.train
    rows = torch.linspace(0, len(asked) - 1, min(4, len(asked))).long().tolist()
    assert sheet.shape == (152 * len(rows), 152 + 3 * 136, 3)
    train = [int(data.train.images[i, 0, 0, 0]) for i in data.train.rows.tolist()]
    for row, i in enumerate(rows):
        mine = int(asked.images[asked.rows[i], 0, 0, 0])
        found = [sheet[152 * row + 64, 152 + 136 * k + 64, 0] for k in range(3)]
        others = train if held_out else [v for v in train if v != mine]
        best = sorted(abs(v - mine) for v in others)[:3]
        assert abs(sheet[152 * row + 64, 64, 0] - mine) <= 1
        assert [abs(v - mine) for v in found] == pytest.approx(best, abs=1)
        for k, v in enumerate(found):  # below it, its class: green where it is the same
            caption = sheet[152 * row + 129 : 152 * row + 150, 152 + 136 * k : 152 + 136 * k + 100]
            r, g, _ = (255 - caption).reshape(-1, 3).sum(0)
            same = (v > 114) == (mine > 114)  # classes 0 and 1: levels up to 108, and from 120
            assert r > g if same else g > r


def test_neighbours_of_few_pictures_and_odd_names(tmp_path):
    data = images.from_tensors(PICTURES[:2], None, CPU)
    assert common.draw_neighbours(common.pixels, data, config()).size == (288, 304)
    data = images.Data("names of no class", images.resident(PICTURES, LABELS, CPU))
    assert common.draw_neighbours(common.pixels, data, config()).size == (968, 1216)
    data = images.from_tensors(PICTURES, LABELS, CPU)
    data.classes = ["\udcff", "猫", "a" * 300, *data.classes[3:]]
    assert common.draw_neighbours(common.pixels, data, config()).size == (968, 1216)


def test_tensorboard_gets_the_columns_the_views_and_the_neighbours(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append(("from", str(folder), purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def add_image(self, name, picture, step, dataformats="CHW"):
            picture = torch.as_tensor(np.array(picture))
            assert picture.shape[dataformats.index("C")] == 3 and (picture.dtype == torch.uint8 or picture.max() <= 1)
            written.append((name, picture.shape, step))

        def flush(self):
            written.append(("flushed", None, None))

        def close(self):
            written.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    metrics = train(tmp_path, tensorboard=True, knn_every=2)
    assert written[0] == ("from", str(tmp_path / "tensorboard"), 1) and written[-1] == "closed"
    scalars = {(name, step): value for name, value, step in written[1:-1] if name != "flushed"}
    rows = saved(tmp_path, "progress")["rows"]
    for row in rows:
        for name, value in zip(common.Run.COLUMNS[1:], row[1:], strict=True):
            assert scalars.pop((name, row[0]), None) == value
    assert metrics["knn_top1"] is not None and {("views", 1), ("neighbours", 2)} == scalars.keys()
    written.clear()
    train(tmp_path, tensorboard=True, epochs=3, resume=True)
    assert written[0][2] == 3 and ("loss", 3) in {(w[0], w[2]) for w in written[:-1]}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(common.InputError, match="--tensorboard: it is not installed; pip install tensorboard"):
        train(tmp_path, tensorboard=True)


@pytest.mark.parametrize(
    "name, line", [("cuda:77", "not to be had"), ("meta", "not to be had"), ("mps:x", "not to be"), ("hpu", "not to")]
)
def test_a_device_that_cannot_hold_a_number_is_refused(name, line):
    with pytest.raises(common.InputError, match=f"--device {name}: {line}"):
        common.pick_device(name)


# -------------------------------------------------------------------------------------------------------- resume


def interrupted(number, step, monkeypatch, **given):
    """Train, with this signal sent in the middle of a step."""
    with monkeypatch.context() as patch:
        usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
        usual |= {signal.SIGINT: signal.default_int_handler}
        before = {n: signal.signal(n, handler) for n, handler in usual.items()}
        calls, cross_entropy = [], F.cross_entropy

        def loss(*rest, **named):
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), number)
            return cross_entropy(*rest, **named)

        patch.setattr(F, "cross_entropy", loss)
        try:
            with pytest.raises(SystemExit) as end, common.exit_status():
                train(**given, loss_backend="naive")
            assert {n: signal.getsignal(n) for n in usual} == usual
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)
    return end.value.code


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("step", [2, 5, 6])
def test_a_signal_saves_at_the_end_of_its_step_and_resume_is_exact(
    number, status, step, tmp_path, capsys, monkeypatch, no_curves
):
    """Within the first epoch, within the second, and at the end of one; with the optimiser and the log."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, epochs=3, knn_every=1, loss_backend="naive")
    assert interrupted(number, step, monkeypatch, out=cut, epochs=3, knn_every=1) == status
    err = capsys.readouterr().err
    assert err == f"stopped after step {step} of 9; {cut}/checkpoint.pt is saved, --resume continues from there\n"
    assert saved(cut, "progress")["step"] == step
    torch.manual_seed(99)
    c = common.parse_args(simclr.Config, ["--resume", "--out", str(cut)])  # all flags come from the run's config.json
    simclr.train(c, (PICTURES, LABELS))
    assert same_run(whole, cut)
    rows = [[row[:6] for row in csv.reader((folder / "log.csv").open())] for folder in (whole, cut)]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    simclr.train(c, (PICTURES, LABELS))  # a finished run has nothing left to do
    assert same_run(whole, cut)


def test_a_second_signal_stops_at_once(tmp_path):
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run = a_run(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            for _ in run.epochs():
                signal.raise_signal(signal.SIGINT)
                assert run.signal == signal.SIGINT
                signal.raise_signal(signal.SIGINT)
                break
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)


def test_only_a_second_ctrl_c_is_impatient_and_nohup_is_respected(tmp_path):
    """A terminal that is closed sends SIGHUP twice."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_IGN}
    usual = {number: signal.signal(number, handler) for number, handler in usual.items()}
    try:
        run = a_run(tmp_path)
        for _ in run.epochs():
            for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
                signal.raise_signal(number)
            assert run.signal == signal.SIGHUP and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            break
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def test_a_second_ctrl_c_does_not_break_a_save(tmp_path, capsys, monkeypatch, no_curves):
    save = torch.save

    def pressed(state, file):
        os.kill(os.getpid(), signal.SIGINT)
        save(state, file)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", pressed)
        assert interrupted(signal.SIGINT, 2, monkeypatch, out=tmp_path) == 130
    done = f"stopped after step 2 of 6; {tmp_path}/checkpoint.pt is saved, --resume continues from there\n"
    assert capsys.readouterr().err == done and not list(tmp_path.glob("*.part"))
    assert saved(tmp_path, "progress")["step"] == 2 and (tmp_path / "backbone.pt").exists()


def test_a_terminal_that_was_closed_does_not_keep_a_run_from_saving(tmp_path, capsys, monkeypatch, no_curves):
    class Closed(io.StringIO):
        isatty = lambda self: True  # noqa: E731

        def flush(self):
            if "min left" in self.getvalue():  # since the first step
                raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert interrupted(signal.SIGHUP, 2, monkeypatch, out=tmp_path) == 129
    assert saved(tmp_path, "progress")["step"] == 2


KILLED = """
import multiprocessing, os, runpy, sys, time
import common
from signal import SIG_DFL, SIGHUP, SIGINT, default_int_handler, signal as handle
handle(SIGINT, default_int_handler)  # which the background job of a shell does not have
handle(SIGHUP, SIG_DFL)  # nor one of nohup this

number, step, start = sys.argv[1:4]
sys.argv[:4] = ["simclr.py"]
log = common.Run.log

def killed(run, *rest):
    if run.step == int(step):
        os.killpg(0, int(number))  # as a terminal does: this process and its workers
        time.sleep(1)
    log(run, *rest)

common.Run.log = killed
multiprocessing.set_start_method(start)
runpy.run_path("simclr.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    "how, resident_gb, start",
    [
        (signal.SIGKILL, 4, "fork"),
        pytest.param(signal.SIGKILL, 0, "fork", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 0, "fork", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 0, "fork", marks=pytest.mark.slow),
        pytest.param(
            signal.SIGINT, 0, "spawn", marks=pytest.mark.slowest
        ),  # of macOS; Python 3.14 has forkserver, as bare
    ],
)
def test_a_killed_process_resumes_bit_for_bit(how, resident_gb, start, photos, tmp_path, no_curves):
    """In the middle of an epoch of 6 steps, with images in memory or streamed by a worker process. kill -9 loses the
    steps since the last checkpoint, here one."""
    flags = (
        f"--preset demo --data {photos} --epochs 2 --batch-size 32 --knn-every 0 --resident-gb {resident_gb}".split()
    )
    flags += [
        "--workers",
        "1",
        "--image-size",
        "16",
        "--hidden-dim",
        "32",
        "--save-minutes",
        "1e-9" if how == signal.SIGKILL else "0",
    ]
    simclr.train(common.parse_args(simclr.Config, [*flags, "--out", str(tmp_path / "whole")]))
    killed = ["-c", KILLED, int(how), 8, start, *flags, "--out", tmp_path / "cut"]
    done = python(*killed, timeout=120, start_new_session=True)
    assert done.returncode == (-9 if how == signal.SIGKILL else 128 + how), done.stderr
    assert len(done.stderr.split("\n")) == (1 if how == signal.SIGKILL else 2), done.stderr
    assert saved(tmp_path / "cut", "progress")["step"] == (8 if how == signal.SIGKILL else 9)
    simclr.train(common.parse_args(simclr.Config, ["--resume", "--out", str(tmp_path / "cut")]))
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_before_the_first_checkpoint_starts_anew(tmp_path, capsys, no_curves):
    a_run(tmp_path / "cut")  # killed in its first epoch
    train(tmp_path / "cut", resume=True)
    assert "no checkpoint was written yet: starting from the beginning" in capsys.readouterr().out
    train(tmp_path / "whole")
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_takes_new_settings_of_the_optimiser_and_says_so(tmp_path, capsys):
    a_run(tmp_path, weight_decay=0.1).save()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["config"]["data"] = "there"
    torch.save(state, tmp_path / "checkpoint.pt")
    run = a_run(tmp_path, weight_decay=0.2, lr=0.3, epochs=9, micro_batch_size=10, resume=True)
    assert [group["weight_decay"] for group in run.parts["optimizer"].param_groups] == [0.2, 0.0]
    changes = "data was there, now it is a tensor|epochs was 2, now it is 9|micro-batch-size was 0, now it is 10"
    changes += "|lr was 0.4, now it is 0.3|weight-decay was 0.1, now it is 0.2"
    said = [line for line in capsys.readouterr().out.splitlines() if "too few to learn" not in line]
    assert said == [f"note: --resume: --{change}" for change in changes.split("|")]


def test_resume_passes_over_what_changes_no_weight(tmp_path, capsys):
    a_run(tmp_path / "here").save()
    os.rename(tmp_path / "here", tmp_path / "there")
    given = {"data_dir": "x", "resident_gb": 1.0, "workers": 2, "knn_every": 3, "save_minutes": 1.0}
    a_run(tmp_path / "there", **given, loss_backend="naive", resume=True)
    assert "--resume" not in capsys.readouterr().out


def changed(name, value):
    """Another value that the flag can have."""
    if choices := typing.get_args(common.flags(simclr.Config)[name]):
        return next(choice for choice in choices if choice != value)
    return "resnet18" if name == "backbone" else value / 2 if isinstance(value, float) else 2 * (value or 4)


OTHERS = [n for n in common.flags(simclr.Config) if not re.fullmatch(f"{common.NO_MATTER}|{common.MAY_CHANGE}", n)]


@pytest.mark.parametrize("name", OTHERS)
def test_resume_refuses_any_other_change(name, tmp_path):
    c = a_run(tmp_path, blur=0.5).config
    common.Run(c, images.from_tensors(PICTURES, LABELS, CPU), CPU, model=simclr.SimCLR(c)).save()
    before, was = (tmp_path / "config.json").read_bytes(), getattr(c, name)
    now = changed(name, was) if name != "init" else str(tmp_path / "weights.pt")
    torch.save(common.resnet8().state_dict(), tmp_path / "weights.pt")
    line = f"--resume: {common.dashed(name)} was {was}, now it is {now}; give what it was, or choose another --out"
    with pytest.raises(common.InputError, match=f"^{re.escape(line)}$"):
        a_run(tmp_path, **{"blur": 0.5, name: now}, resume=True)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "data, words",
    [
        ((PICTURES[:80], LABELS[:80]), "--data (training images) was 100, now it is 70"),
        (PICTURES[:100], "--data (classes) was ['0', '1', "),
        ((PICTURES, LABELS % 5), "now it is ['0', '1', '2', '3', '4'];"),
    ],
)
def test_resume_refuses_other_data(data, words, tmp_path, no_curves):
    train(tmp_path)
    with pytest.raises(common.InputError, match=re.escape(words)):
        train(tmp_path, data, epochs=3, resume=True)


def test_a_finished_run_keeps_its_config(tmp_path, capsys, no_curves):
    train(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    train(tmp_path, resume=True, lr=0.01, knn_every=2)
    assert (tmp_path / "config.json").read_bytes() == before
    assert "note: the run is done, and nothing changes; a larger --epochs would go on" in capsys.readouterr().out
    train(tmp_path, resume=True, lr=0.01, epochs=3)
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.01


@pytest.mark.parametrize("warmup", [0.0, 0.4, 1.0, 2.5])
def test_a_warm_up_of_part_of_a_step_never_passes_the_peak(warmup):
    rates = [common.cosine_lr(k, 8, warmup, 0.2) for k in range(8)]
    assert min(rates) > 0 and max(rates) <= 0.2 and rates[-1] < 0.05
