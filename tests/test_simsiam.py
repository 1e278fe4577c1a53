"""The loss, the heads, the stop-gradient, every ablation that stayed a flag, and whole runs."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import simsiam
from tests.helpers import (
    WARM_UP_AND_COSINE,
    at_each_step,
    follows_the_schedule,
    moved_by,
    one_step,
    python,
    recipe,
    resumes_bit_for_bit,
    saved,
    train,
    trains_in_pieces,
)

SMALL = {"image_size": 16, "hidden_dim": 32, "projection_dim": 16, "predictor_dim": 8}


def config(**given):
    return simsiam.Config.preset("demo", **given)


# ------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("degrees", [0, 30, 60, 90, 180])
def test_negative_cosine_at_known_angles(degrees):
    angle = math.radians(degrees)
    p = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    z = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    assert math.isclose(simsiam.negative_cosine(p, 7 * z).item(), -math.cos(angle), abs_tol=1e-15)


def test_negative_cosine_is_a_mean_over_rows():
    p, z = torch.eye(4, dtype=torch.float64)[:2], torch.eye(4, dtype=torch.float64)[[0, 2]]
    assert simsiam.negative_cosine(p, z).item() == -0.5  # -1 and 0


def test_cross_entropy_is_that_of_softmaxes():
    torch.manual_seed(0)
    p, z = torch.randn(2, 5, 7, dtype=torch.float64)
    total = 0.0
    for a, b in zip(p, z, strict=True):
        target, guess = b.exp() / b.exp().sum(), a.exp() / a.exp().sum()
        total -= float((target * guess.log()).sum())
    assert math.isclose(simsiam.softmax_cross_entropy(p, z).item(), total / 5, rel_tol=1e-12)
    flat = torch.zeros(3, 8, dtype=torch.float64)
    assert math.isclose(simsiam.softmax_cross_entropy(flat, flat).item(), math.log(8))


@pytest.mark.parametrize("distance", simsiam.DISTANCES.values(), ids=simsiam.DISTANCES)
def test_only_without_stop_gradient_does_a_gradient_reach_the_target(distance):
    torch.manual_seed(0)
    for stop in (True, False):
        p, z = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
        distance(p, z, stop).backward()
        assert p.grad.abs().sum() > 0 and (z.grad is None) == stop


def by_hand(model, views, symmetric=True, stop_gradient=True, similarity="cosine", **_):
    """Equation 4 and its ablations, written out."""
    z1, z2 = (model.projector(model.backbone(x)) for x in views)
    p1, p2 = model.predictor(z1), model.predictor(z2)
    stop = torch.Tensor.detach if stop_gradient else (lambda value: value)

    def d(p, z):
        if similarity == "cosine":
            return -(p / p.norm(dim=1, keepdim=True) * z / z.norm(dim=1, keepdim=True)).sum(1).mean()
        return -(F.softmax(z, 1) * F.log_softmax(p, 1)).sum(1).mean()

    return d(p1, stop(z2)) / 2 + d(p2, stop(z1)) / 2 if symmetric else d(p1, stop(z2))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"stop_gradient": False},
        {"symmetric": False},
        {"symmetric": False, "stop_gradient": False},
        {"similarity": "cross-entropy"},
        {"predictor": "fixed"},  # not moved, by weight decay either
        {"predictor": "none", "head_bn": "hidden"},
    ],
    ids=lambda f: "-".join(map(str, f.values())) or "default",
)
def test_a_step_is_sgd_on_equation_4(flags, tmp_path, monkeypatch):
    """With the learning rate scaled by N/256, and weight decay on everything that is trained, BN and biases too."""
    metrics, start, views = one_step(simsiam, SMALL | {"lr": 0.4} | flags, tmp_path, monkeypatch)
    loss = by_hand(start["model"], views, **flags)
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    moved_by(loss, start["model"], saved(tmp_path), 0.4 * 200 / 256, lambda p: 0.1)


def test_bn_statistics_are_of_one_view_at_a_time(tmp_path, monkeypatch):
    sizes, embed = [], simsiam.SimSiam.embed
    monkeypatch.setattr(simsiam.SimSiam, "embed", lambda self, x: sizes.append(len(x)) or embed(self, x))
    train(simsiam, tmp_path, **SMALL)
    assert sizes == [64] * 6  # 200 images: three steps of two views
    counts = {name: int(v) for name, v in saved(tmp_path).items() if name.endswith("num_batches_tracked")}
    assert set(counts.values()) == {6}
    assert {name.split(".")[0] for name in counts} == {"backbone", "projector", "predictor"}


# --------------------------------------------------------------------------------------------------- the network


def spelled(head):
    """A letter a layer: L, l = Linear with and without bias; B, b = BN with and without scale and shift; R = ReLU."""
    letters = {nn.ReLU: lambda m: "R", nn.Linear: lambda m: "lL"[m.bias is not None]}
    letters[nn.BatchNorm1d] = lambda m: "bB"[m.affine]
    return "".join(letters[type(m)](m) for m in head)


@pytest.mark.parametrize(
    "head_bn, projector, predictor",
    [
        ("default", "lBRlBRlb", "lBRL"),  # section 3 and the authors' code
        ("hidden", "lBRlBRL", "lBRL"),
        ("none", "LRLRL", "LRL"),
        ("all", "lBRlBRlb", "lBRlB"),
    ],
)
def test_heads_layer_by_layer(head_bn, projector, predictor):
    model = simsiam.SimSiam(simsiam.Config(backbone="resnet18", head_bn=head_bn))
    assert spelled(model.projector) == projector and spelled(model.predictor) == predictor
    widths = [(m.in_features, m.out_features) for m in model.projector if isinstance(m, nn.Linear)]
    assert widths == [(512, 2048), (2048, 2048), (2048, 2048)]
    widths = [(m.in_features, m.out_features) for m in model.predictor if isinstance(m, nn.Linear)]
    assert widths == [(2048, 512), (512, 2048)]
    assert model.dim == 2048 and all(p.requires_grad for p in model.parameters())
    assert all((block.bn2.weight == 0).all() for block in [*model.backbone.layer1, *model.backbone.layer4])


def test_heads_of_other_depths_and_predictors():
    assert spelled(simsiam.SimSiam(config(projector_layers=2)).projector) == "lBRlb"
    assert spelled(simsiam.SimSiam(config(projector_layers=1)).projector) == "lb"
    none = simsiam.SimSiam(config(predictor="none"))
    x1, x2 = torch.rand(2, 4, 3, 32, 32)
    p1, p2, z1, z2 = none(x1, x2)
    assert isinstance(none.predictor, nn.Identity) and torch.equal(p1, z1) and torch.equal(p2, z2)
    fixed = simsiam.SimSiam(config(predictor="fixed"))
    assert spelled(fixed.predictor) == "lBRL" and not any(p.requires_grad for p in fixed.predictor.parameters())
    assert all(p.requires_grad for p in fixed.projector.parameters())


# ---------------------------------------------------------------------------------------------------- the recipe


PAPER = dict(
    epochs=100, batch_size=512, lr=0.05, weight_decay=1e-4, warmup_epochs=0.0, stop_gradient=True, predictor="mlp",
    predictor_lr="constant", predictor_dim=512, projection_dim=2048, hidden_dim=2048, projector_layers=3,
    head_bn="default", similarity="cosine", symmetric=True, crop_min_scale=0.2, jitter_strength=1.0, blur=0.5,
    backbone="resnet50", image_size=224, stem="imagenet",
)  # fmt: skip
CIFAR = PAPER | dict(
    data="cifar10", backbone="resnet18", image_size=32, stem="cifar", epochs=800, lr=0.03, weight_decay=5e-4,
    projector_layers=2, blur=0.0,
)  # fmt: skip
PHOTOS = {"backbone": "resnet18", "image_size": 128}  # ours


@pytest.mark.parametrize("preset, published", [("paper", PAPER), ("cifar", CIFAR), ("photos", PHOTOS)])
def test_presets_are_as_published(preset, published):
    c = simsiam.Config.preset(preset)
    assert {name: getattr(c, name) for name in published} == published


@pytest.mark.parametrize("which", ["constant", "decayed"])
def test_the_schedule_and_the_crops(which, tmp_path, monkeypatch, capsys):
    rates, logged = follows_the_schedule(simsiam, SMALL | {"lr": 0.4, "predictor_lr": which}, tmp_path, monkeypatch)
    expected = [(0.1 * share, 0.1 if which == "constant" else 0.1 * share) for share in WARM_UP_AND_COSINE]
    assert rates == [pytest.approx(both) for both in expected]
    model, groups = simsiam.SimSiam(config(**SMALL)), saved(tmp_path, "optimizer")["param_groups"]
    assert [len(g["params"]) for g in groups][1] == len(list(model.predictor.parameters()))
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert all(g["momentum"] == 0.9 for g in groups)
    assert all(z.shape == (64, 16) for z, _, _ in logged)
    out = capsys.readouterr().out
    assert "peak lr 0.1\n" in out and f"the predictor's learning rate is {which}" in out
    assert "negative_cosine, the mean of both directions" in out


def test_what_is_watched_is_z1(tmp_path, monkeypatch):
    seen, logged, forward = [], [], simsiam.SimSiam.forward
    monkeypatch.setattr(simsiam.SimSiam, "forward", lambda self, *x: seen.append(forward(self, *x)) or seen[-1])
    at_each_step(monkeypatch, lambda run, z, *views: logged.append(z))
    train(simsiam, tmp_path, **SMALL)
    assert len(logged) == 3 and all(torch.equal(z, z1) for z, (_, _, z1, _) in zip(logged, seen, strict=True))


def test_the_views_are_moco_v2s(monkeypatch):
    jitter = ("color_jitter", 0.8, 0.4, 0.4, 0.4, 0.1)
    assert recipe(simsiam, monkeypatch, simsiam.Config()) == [
        jitter, ("grey", 0.2), ("gaussian_blur", 0.5), ("hflip", 0.5)
    ]  # fmt: skip
    other = recipe(simsiam, monkeypatch, simsiam.Config(jitter_strength=2.0, blur=0.0))
    assert other[0] == ("color_jitter", 0.8, 0.8, 0.8, 0.8, 0.2) and other[2] == ("gaussian_blur", 0.0)


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("flags", [
    {"amp": "bf16", "blur": 0.5}, {"head_bn": "none", "similarity": "cross-entropy"},
    {"head_bn": "all", "symmetric": False}, {"predictor": "fixed"}, {"predictor": "none"},
], ids=lambda f: "-".join(map(str, f.values())))  # fmt: skip
def test_options_run_and_load_back(flags, tmp_path):
    assert math.isfinite(train(simsiam, tmp_path, **SMALL | flags)["loss"])
    c, model = common.load_run(tmp_path)
    assert {name: getattr(c, name) for name in flags} == flags
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in backbone.items())


@pytest.mark.parametrize("flags", [{}, {"stop_gradient": False}], ids=str)
def test_pieces(flags, tmp_path):
    trains_in_pieces(simsiam, SMALL | flags, tmp_path)


@pytest.mark.parametrize("which", ["constant", "decayed"])
def test_an_interrupted_run_resumes_bit_for_bit(which, tmp_path, monkeypatch):
    given = SMALL | {"warmup_epochs": 1.0, "predictor_lr": which}
    whole, resumed = resumes_bit_for_bit(simsiam, given, tmp_path, monkeypatch)
    assert whole["loss"] == resumed["loss"]


DEMO = """--preset demo --epochs 2 --batch-size 64 --lr 0.4 --warmup-epochs 1 --image-size 16 --hidden-dim 256
--projection-dim 256 --predictor-dim 64 --projector-layers 2 --crop-min-scale 0.5 --knn-every 0"""


@pytest.mark.slowest
@pytest.mark.parametrize("flag", ["--stop-gradient", "--no-stop-gradient"])
def test_without_stop_gradient_the_script_collapses_and_says_so(flag, tmp_path):
    """The same 312 steps with and without it (figure 2). No std here: that of two opposite points is healthy."""
    done = python("simsiam.py", *DEMO.split(), flag, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    collapsed = flag == "--no-stop-gradient"
    assert ("warning: the output has collapsed" in done.stdout) == collapsed, done.stdout
    loss = float(list(csv.DictReader((tmp_path / "log.csv").open()))[-1]["loss"])
    assert (loss < -0.75) == collapsed  # -0.94 and -0.57; -1 when all outputs are one
    assert (tmp_path / "curves.png").exists() or "matplotlib" in done.stdout
