"""The paper's loss, heads and recipe, and whole runs of the script."""

import csv
import json
import math

import pytest
import torch
import torchvision

import common
import kernels
import simclr
from tests.helpers import (
    WARM_UP_AND_COSINE,
    equal,
    follows_the_schedule,
    moved_by,
    one_step,
    recipe,
    resumes_bit_for_bit,
    same_run,
    saved,
    train,
    trains_in_pieces,
)

TINY = {"hidden_dim": 32, "projection_dim": 16}


def config(**given):
    return simclr.Config.preset("demo", **given)


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


@pytest.mark.parametrize("backend", ["naive", "blocked"])
def test_a_step_is_sgd_on_equation_1(backend, tmp_path, monkeypatch):
    """Of the method's file or of kernels/, at the run's temperature; no weight decay on BN and biases."""
    fused, used = kernels.nt_xent, []
    monkeypatch.setattr(kernels, "nt_xent", lambda *a, **k: used.append(k["backend"]) or fused(*a, **k))
    given = {"optimizer": "sgd", "lr": 0.3, "temperature": 0.3, "hidden_dim": 32, "loss_backend": backend}
    metrics, start, (x1, x2) = one_step(simclr, given, tmp_path, monkeypatch)
    assert used == ([backend] if backend == "blocked" else [])
    z1, z2 = start["model"].embed(torch.cat([x1, x2])).chunk(2)  # BN over both views
    loss = simclr.nt_xent(z1, z2, 0.3)
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    moved_by(loss, start["model"], saved(tmp_path), 0.3 * 200 / 256, lambda p: 0.1 if p.ndim > 1 else 0.0)


# ------------------------------------------------------------------------------------------ the model, the recipe


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
    assert linear[0].bias is None and not linear[1].bias.requires_grad
    model = simclr.SimCLR(config(projection_head="none")).eval()
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(torch.cat(model(x[:2], x[2:])), model.backbone(x))
    deep = simclr.SimCLR(config(backbone="resnet18")).backbone
    assert all((block.bn2.weight == 0).all() for block in [*deep.layer1, *deep.layer4])


PAPER = {
    **{"epochs": 100, "batch_size": 4096, "lr": 0.3, "lr_scaling": "linear", "optimizer": "lars"},
    **{"weight_decay": 1e-6, "warmup_epochs": 10.0, "temperature": 0.1, "projection_head": "mlp", "hidden_dim": 0},
    **{"projection_dim": 128, "crop_min_scale": 0.08, "jitter_strength": 1.0, "blur": 0.5},
    **{"backbone": "resnet50", "image_size": 224, "stem": "imagenet"},
}
CIFAR = PAPER | {
    **{"data": "cifar10", "backbone": "resnet18", "image_size": 32, "stem": "cifar", "epochs": 1000},
    **{"batch_size": 512, "lr": 1.0, "temperature": 0.5, "jitter_strength": 0.5, "blur": 0.0},
}


@pytest.mark.parametrize("preset, published", [("paper", PAPER), ("cifar", CIFAR)])
def test_presets_are_as_published(preset, published):
    c = simclr.Config.preset(preset)
    assert {name: getattr(c, name) for name in published} == published


def test_the_views_are_the_papers(monkeypatch):
    jitter = ("color_jitter", 0.8, 0.8, 0.8, 0.8, 0.2)
    assert recipe(simclr, monkeypatch, simclr.Config()) == [
        ("hflip", 0.5), jitter, ("grey", 0.2), ("gaussian_blur", 0.5)
    ]  # fmt: skip
    half = recipe(simclr, monkeypatch, simclr.Config.preset("cifar"))
    assert half[1] == ("color_jitter", 0.8, 0.4, 0.4, 0.4, 0.1) and half[3] == ("gaussian_blur", 0.0)


@pytest.mark.parametrize("scaling, peak", [("linear", 64 / 256), ("sqrt", 8 / 4), ("none", 1.0)])
def test_the_schedule_and_the_crops(scaling, peak, tmp_path, monkeypatch, capsys):
    given = {"lr": 0.3, "lr_scaling": scaling} | TINY
    rates, logged = follows_the_schedule(simclr, given, tmp_path, monkeypatch)
    assert rates == [pytest.approx([0.3 * peak * share] * 2) for share in WARM_UP_AND_COSINE]
    assert all(z.shape == (64, 16) for z, _, _ in logged)
    out = capsys.readouterr().out
    assert f"peak lr {0.3 * peak:g}" in out and f"a guess has the loss {math.log(127):.3f}" in out


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_the_optimizer(optimizer, tmp_path):
    train(simclr, tmp_path, **TINY, optimizer=optimizer, weight_decay=1e-3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["optimizer"][0].lower() == optimizer
    weights, rest = saved(tmp_path, "optimizer")["param_groups"]
    assert (weights["weight_decay"], rest["weight_decay"], weights["momentum"]) == (1e-3, 0.0, 0.9)
    assert weights["adapt"] and not rest["adapt"] and weights.get("lr_in_momentum", True)
    trained = [p for p in simclr.SimCLR(config(**TINY)).parameters() if p.requires_grad]
    assert len(weights["params"]) == sum(p.ndim > 1 for p in trained)
    assert len(rest["params"]) == sum(p.ndim == 1 for p in trained)


# ---------------------------------------------------------------------------------------------------- whole runs


def test_a_run_learns_and_writes_its_files(tmp_path, capsys):
    metrics = train(simclr, tmp_path, epochs=12, batch_size=32, knn_every=12, warmup_epochs=1.0)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert list(rows[0]) == ["epoch", "loss", "lr", "feature_std", "effective_rank", "knn_top1", "images_per_second"]
    assert [r["epoch"] for r in rows] == [str(i + 1) for i in range(12)]
    assert float(rows[-1]["loss"]) < math.log(63) < float(rows[0]["loss"]) < 1.25 * math.log(63)
    assert 0 < float(rows[-1]["feature_std"]) < 0.2 and 1 < float(rows[-1]["effective_rank"]) <= 64
    assert math.isclose(metrics["knn_top1"], float(rows[-1]["knn_top1"]), rel_tol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["temperature"] == 0.2
    for name in ("views.png", "backbone.pt", "checkpoint.pt"):
        assert (tmp_path / name).stat().st_size > 1000
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}: simclr") and f"next: python linear_eval.py {tmp_path}" in out
    assert "kNN top-1 on 40 held-out images: h 0." in out and "raw pixels 0." in out


def test_backbone_loads_into_torchvision(tmp_path):
    train(simclr, tmp_path, **TINY, backbone="resnet18", stem="imagenet")
    network = torchvision.models.resnet18()
    result = network.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True), strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys
    network.fc = torch.nn.Identity()
    _, model = common.load_run(tmp_path)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(network.eval()(x), model.eval().backbone(x))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(simclr, tmp_path / name, **TINY, seed=seed)
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert not equal(saved(tmp_path / "a"), saved(tmp_path / "c"))


@pytest.mark.parametrize("flags", [
    {"amp": "bf16", "blur": 0.5}, {"optimizer": "lars", "loss_backend": "blocked", "amp": "bf16"},
    {"projection_head": "none"}, {"projection_head": "linear", "image_size": 40},
], ids=lambda f: "-".join(f))  # fmt: skip
def test_options_run(flags, tmp_path):
    assert math.isfinite(train(simclr, tmp_path, **TINY | flags)["loss"])


def test_pieces(tmp_path):
    trains_in_pieces(simclr, TINY, tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_an_interrupted_run_resumes_bit_for_bit(optimizer, tmp_path, monkeypatch):
    whole, resumed = resumes_bit_for_bit(simclr, TINY | {"optimizer": optimizer}, tmp_path, monkeypatch)
    assert whole["loss"] == resumed["loss"]


@pytest.mark.slow
def test_real_images_beat_the_untrained_network(cifar10_folder, tmp_path):
    """A short run on 2,000 JPEG files, of which 1,000 are held out."""
    small = tmp_path / "small"
    for path in sorted(cifar10_folder.glob("t*/*/00*.jpg")):
        copy = small / path.relative_to(cifar10_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    metrics = simclr.train(config(data=str(small), epochs=12, knn_every=12, out=str(tmp_path / "run")))
    assert metrics["knn_top1"] > metrics["knn h before training"] + 0.02
