"""The paper's loss, heads and options, and whole runs of the script."""

import csv
import json
import math
import signal

import pytest
import torch
import torchvision

import common
import simclr
from tests.helpers import equal, python, saved, trains_in_pieces

FEW_SHAPES = 400


def config(**given):
    return simclr.Config(**simclr.Config.PRESETS["demo"] | {"preset": "demo"} | given)


# ------------------------------------------------------------------------------------------------------ the loss


def by_the_formula(z1, z2, tau):
    """Equation 1 and algorithm 1, written with loops."""
    z = [v for pair in zip(z1, z2, strict=True) for v in pair]  # views 2k, 2k + 1 of image k
    s = [[torch.dot(a, b) / (a.norm() * b.norm()) for b in z] for a in z]

    def pair_loss(i, j):
        return -torch.log(torch.exp(s[i][j] / tau) / sum(torch.exp(s[i][k] / tau) for k in range(len(z)) if k != i))

    n = len(z1)
    return sum(pair_loss(2 * k, 2 * k + 1) + pair_loss(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


@pytest.mark.parametrize("tau", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_nt_xent_is_equation_1(n, tau):
    torch.manual_seed(n)
    z1, z2 = torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True)
    ours, theirs = simclr.nt_xent(z1, z2, tau), by_the_formula(z1, z2, tau)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (z1, z2)), torch.autograd.grad(theirs, (z1, z2)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_nt_xent_closed_forms():
    n = 9
    same = torch.ones(n, 4, dtype=torch.float64)
    assert math.isclose(simclr.nt_xent(same, same, 0.5).item(), math.log(2 * n - 1))
    eye = torch.eye(n, dtype=torch.float64)  # positives at cosine 1, negatives at 0
    assert math.isclose(simclr.nt_xent(eye, eye, 0.5).item(), math.log(math.exp(2) + 2 * n - 2) - 2)


@pytest.mark.parametrize("tau", [1e-4, 0.01, 100.0])
def test_nt_xent_is_finite_at_any_temperature(tau):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 16, 8, requires_grad=True)
    loss = simclr.nt_xent(z1, z2, tau)
    loss.backward()
    assert torch.isfinite(loss)
    assert abs(loss.item() - simclr.nt_xent(z1.double(), z2.double(), tau).item()) <= 1e-4 * max(1, loss.item())


# ----------------------------------------------------------------------------------------------------- the model


def layers(head):
    return [type(m).__name__ for m in head]


def test_the_heads_are_the_papers():
    mlp = simclr.SimCLR(config(hidden_dim=0)).projector
    assert layers(mlp) == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert mlp[0].bias is None and mlp[3].bias is None
    assert mlp[1].bias.requires_grad and not mlp[4].bias.requires_grad and mlp[4].weight.requires_grad
    assert mlp[0].out_features == 128  # the width of h
    linear = simclr.SimCLR(config(projection_head="linear", projection_dim=17)).projector
    assert layers(linear) == ["Linear", "BatchNorm1d"] and linear[0].out_features == 17
    model = simclr.SimCLR(config(projection_head="none"))
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(model.eval()(x), model.backbone(x))


def test_defaults_are_the_papers_and_presets_override_them():
    c = simclr.Config()
    assert (c.batch_size, c.temperature, c.weight_decay, c.optimizer, c.projection_dim) == (
        4096,
        0.1,
        1e-6,
        "lars",
        128,
    )
    assert math.isclose(c.peak_lr(), 4.8)
    assert math.isclose(simclr.Config(lr_scaling="sqrt", batch_size=1024).peak_lr(), 0.075 * 32)
    assert simclr.Config(lr_scaling="none").peak_lr() == 0.3
    parse = lambda *a: common.parse_args(simclr.Config, a)  # noqa: E731
    assert parse().preset == "demo" and parse().backbone == "resnet8"
    assert parse("--data", "cifar10").preset == "cifar"
    assert parse("--data", "/my/photos").preset == "paper"
    assert parse("--preset", "cifar").data == "cifar10"
    by_hand = parse("--preset", "cifar", "--temperature", "0.7", "--epochs", "3")
    assert (by_hand.temperature, by_hand.epochs, by_hand.lr) == (0.7, 3, 1.0)


def test_one_branch_leaves_the_second_view_as_the_shared_crop(few_shapes, tmp_path, monkeypatch):
    seen = []
    original = simclr.augment
    monkeypatch.setattr(simclr, "augment", lambda x, c, ops: seen.append((x.clone(), ops)) or original(x, c, ops))
    pairs = []
    monkeypatch.setattr(common.Run, "draw_views", lambda self, views: pairs.append(views))
    simclr.train(
        config(epochs=1, batch_size=64, knn_every=0, augment="sobel,color", augment_one_branch=True, out=str(tmp_path))
    )
    assert all(ops == ["sobel", "color"] for _, ops in seen)
    assert torch.equal(pairs[0][1], seen[0][0]) and not torch.equal(pairs[0][0], pairs[0][1])


@pytest.mark.parametrize("first", ["crop", "cutout", "color", "sobel", "noise", "blur", "rotate"])
def test_every_cell_of_figure_5_runs_in_the_given_order(first):
    torch.manual_seed(0)
    c = config(blur_probability=1.0)
    x = torch.rand(6, 3, 32, 32)
    for second in ("crop", "cutout", "color", "sobel", "noise", "blur", "rotate"):
        out = simclr.augment(x.clone(), c, [first, second])
        assert out.shape == x.shape and torch.isfinite(out).all() and out.min() >= -1e-6 and out.max() <= 1 + 1e-6
        assert not torch.equal(out, x)


# ---------------------------------------------------------------------------------------------------- whole runs


def test_a_run_learns_and_writes_its_files(few_shapes, tmp_path, capsys):
    metrics = simclr.train(config(epochs=3, batch_size=32, out=str(tmp_path)))
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert list(rows[0]) == ["epoch", "loss", "lr", "feature_std", "effective_rank", "knn_top1", "images_per_second"]
    assert [r["epoch"] for r in rows] == ["1", "2", "3"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) < 1.2 * math.log(63)
    assert 0 < float(rows[-1]["feature_std"]) < 0.2 and 1 < float(rows[-1]["effective_rank"]) <= 64
    assert math.isclose(metrics["knn_top1"], float(rows[-1]["knn_top1"]), rel_tol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["temperature"] == 0.2
    for name in ("views.png", "backbone.pt", "checkpoint.pt"):
        assert (tmp_path / name).stat().st_size > 1000
    out = capsys.readouterr().out
    for words in ("preset demo", "mean over 2N", "h, trained backbone", "raw pixels", "peak lr"):
        assert words in out


def test_backbone_loads_into_torchvision(tmp_path, few_shapes):
    c = config(backbone="resnet18", stem="imagenet", epochs=1, batch_size=64, knn_every=0, out=str(tmp_path))
    simclr.train(c)
    network = torchvision.models.resnet18()
    result = network.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True), strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys
    network.fc = torch.nn.Identity()
    model = simclr.SimCLR(c)
    model.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(network.eval()(x), model.eval().backbone(x))


KILLED = """
import multiprocessing, os, runpy, sys, time
import common

signal, step, start = sys.argv[1:4]
sys.argv[:4] = ["simclr.py"]
after_step = common.Run.after_step

def killed(run, *rest):
    after_step(run, *rest)
    if run.step == int(step):
        os.killpg(0, int(signal))  # as a terminal does: this process and its workers
        time.sleep(1)

common.Run.after_step = killed
multiprocessing.set_start_method(start)
runpy.run_path("simclr.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, memory, start",
    [
        (signal.SIGKILL, "4", "fork"),
        (signal.SIGINT, "4", "fork"),
        (signal.SIGINT, "0", "fork"),
        (signal.SIGINT, "0", "spawn"),  # of macOS; Python 3.14 has forkserver, which is as bare
    ],
)
def test_a_killed_run_resumes_bit_for_bit(photos, tmp_path, how, memory, start):
    """SIGKILL loses the epoch it hits, Ctrl-C saves at the step it hits; both end where the whole run ends.

    With images held in memory, and streamed by a worker process (`--resident-gb 0`).
    """
    flags = f"--preset demo --data {photos} --epochs 2 --batch-size 32 --knn-every 0 --resident-gb {memory}".split()
    flags += ["--workers", "1", "--hidden-dim", "32"]
    simclr.train(common.parse_args(simclr.Config, [*flags, "--out", str(tmp_path / "whole")]))
    killed = [KILLED, int(how), 8, start, *flags, "--out", tmp_path / "cut"]  # two steps into the second epoch
    done = python("-c", *killed, timeout=120, start_new_session=True)
    assert done.returncode == (130 if how == signal.SIGINT else -9), done.stderr
    assert len(done.stderr.split("\n")) == (3 if how == signal.SIGINT else 1), done.stderr  # an empty line and another
    assert saved(tmp_path / "cut", "epoch") == 1
    assert saved(tmp_path / "cut", "step_in_epoch") == (3 if how == signal.SIGINT else 0)
    assert not equal(saved(tmp_path / "cut"), saved(tmp_path / "whole"))
    resumed = python("simclr.py", "--resume", "--out", tmp_path / "cut")  # other flags come from the run's config.json
    assert resumed.returncode == 0, resumed.stderr
    assert equal(saved(tmp_path / "cut"), saved(tmp_path / "whole"))
    logs = [[r[:6] for r in csv.reader((tmp_path / d / "log.csv").open())] for d in ("cut", "whole")]
    assert logs[0] == logs[1]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(few_shapes, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        simclr.train(config(epochs=1, batch_size=64, knn_every=0, seed=seed, out=str(tmp_path / name)))
    assert equal(saved(tmp_path / "a"), saved(tmp_path / "b"))
    assert not equal(saved(tmp_path / "a"), saved(tmp_path / "c"))


def test_a_fresh_run_keeps_the_old_checkpoint(few_shapes, tmp_path):
    c = config(epochs=1, batch_size=64, knn_every=0, out=str(tmp_path))
    simclr.train(c)
    old = (tmp_path / "checkpoint.pt").read_bytes()
    simclr.train(c)
    assert (tmp_path / "checkpoint.previous.pt").read_bytes() == old


@pytest.mark.parametrize(
    "flags",
    [
        {"amp": "bf16"},
        {"optimizer": "lars", "lr_scaling": "sqrt"},
        {"projection_head": "none"},
        {"projection_head": "linear"},
        {"augment": "color,crop,rotate,cutout"},
        {"blur_probability": 0.5, "solarize_probability": 0.5},
        {"loss_backend": "naive"},
        {"image_size": 40},
    ],
    ids=lambda f: "-".join(f),
)
def test_options_run(flags, few_shapes, tmp_path):
    metrics = simclr.train(config(epochs=1, batch_size=64, knn_every=0, out=str(tmp_path), **flags))
    assert math.isfinite(metrics["loss"])


def test_pieces(few_shapes, tmp_path):
    trains_in_pieces(simclr, config, {"projection_dim": 16}, tmp_path)


@pytest.mark.slow
def test_real_images_beat_the_untrained_network(cifar10_folder, tmp_path):
    """A short run on 2,000 JPEG files, of which 1,000 are held out."""
    small = tmp_path / "small"
    for path in sorted(cifar10_folder.glob("t*/*/00*.jpg")):
        copy = small / path.relative_to(cifar10_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    metrics = simclr.train(config(data=str(small), epochs=6, out=str(tmp_path / "run")))
    assert metrics["knn h, trained backbone"] > metrics["knn h, untrained backbone"] + 0.02


def test_losses_agree_between_the_method_file_and_kernels():
    kernels = pytest.importorskip("kernels")
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 33, 20, dtype=torch.float64)
    assert torch.allclose(simclr.nt_xent(z1, z2, 0.3), kernels.nt_xent(z1, z2, 0.3, backend="blocked"), rtol=1e-12)
