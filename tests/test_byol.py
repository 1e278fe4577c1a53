"""The loss, the two networks, the moving average, the two kinds of views, and whole runs."""

import math

import pytest
import torch
from torch import nn

import byol
import common
from tests.helpers import (
    WARM_UP_AND_COSINE,
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

SMALL = {"image_size": 16, "hidden_dim": 32, "projection_dim": 16, "momentum": 0.9}


def config(**given):
    return byol.Config.preset("demo", **SMALL | given)


# ------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("degrees", [0, 30, 60, 90, 180])
def test_the_loss_at_known_angles(degrees):
    angle = math.radians(degrees)
    q = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    z = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    assert math.isclose(byol.byol_loss(q, 7 * z).item(), 2 - 2 * math.cos(angle), abs_tol=1e-14)


def test_the_loss_is_the_squared_distance_of_unit_vectors():
    torch.manual_seed(0)
    q, z = torch.randn(2, 6, 5, dtype=torch.float64)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (q, z)]
    expected = (unit[0] - unit[1]).square().sum(1).mean().item()
    assert math.isclose(byol.byol_loss(q, z).item(), expected, rel_tol=1e-12)
    assert math.isclose(byol.byol_loss(q.float(), z.float()).item(), expected, rel_tol=1e-6)


def test_no_gradient_reaches_the_target():
    torch.manual_seed(0)
    q, z = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    byol.byol_loss(q, z).backward()
    assert q.grad.abs().sum() > 0 and z.grad is None


# --------------------------------------------------------------------------------------------- the moving average


@pytest.mark.parametrize("base", [0.5, 0.99, 0.996])
def test_the_schedule_of_tau(base):
    assert math.isclose(byol.tau_at(0, 1000, base), base)
    assert math.isclose(byol.tau_at(250, 1000, base), 1 - (1 - base) * (math.sqrt(0.5) + 1) / 2)
    assert math.isclose(byol.tau_at(500, 1000, base), (1 + base) / 2)
    assert byol.tau_at(1000, 1000, base) == 1 and base < byol.tau_at(999, 1000, base) < 1


@pytest.mark.parametrize("base", [0.0, 1.0])
def test_tau_stays_at_its_ends(base):
    assert all(byol.tau_at(k, 10, base) == base for k in range(11))


@pytest.mark.parametrize("tau", [0.0, 0.9, 1.0])
def test_the_target_moves_on_parameters_only(tau):
    torch.manual_seed(0)
    model = byol.BYOL(config()).double()
    with torch.no_grad():
        for value in (*model.parameters(), *model.backbone.buffers()):
            value.add_(1)
    theta = nn.Sequential(model.backbone, model.projector).state_dict()
    before = {name: v.clone() for name, v in model.target.state_dict().items()}
    model.update_target(tau)
    parameters = dict(model.target.named_parameters())
    for name, value in model.target.state_dict().items():
        if name in parameters:
            assert torch.allclose(value, tau * before[name] + (1 - tau) * theta[name], rtol=1e-12, atol=1e-14), name
            assert tau != 0 or torch.equal(value, theta[name])
        else:
            assert torch.equal(value, before[name]), name  # buffers are the target's own


def test_where_the_target_starts():
    own = byol.BYOL(config())
    pairs = list(zip(own.backbone.parameters(), own.target[0].parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)  # at random
    assert not any(p.requires_grad for p in own.target.parameters()) and all(a.requires_grad for a, _ in pairs)
    same = byol.BYOL(config(momentum=0.0))
    theta = [*same.backbone.parameters(), *same.projector.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(theta, same.target.parameters(), strict=True))


# -------------------------------------------------------------------------------------------------------- a step


def by_hand(model, v1, v2, symmetric):
    """Equation 2 and its mirror image, written out."""

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    q1, q2 = (model.predictor(model.projector(model.backbone(v))) for v in (v1, v2))
    with torch.no_grad():
        t1, t2 = model.target(v1), model.target(v2)
    one = (unit(q1) - unit(t2)).square().sum(1).mean()
    return one + (unit(q2) - unit(t1)).square().sum(1).mean() if symmetric else one


@pytest.mark.parametrize("flags", [
    {}, {"symmetric": False}, {"predictor": False}, {"momentum": 0.0}, {"momentum": 1.0},
], ids=lambda f: "-".join(f"{k}-{v}" for k, v in f.items()) or "default")  # fmt: skip
def test_a_step_is_sgd_on_equation_2_then_the_moving_average(flags, tmp_path, monkeypatch):
    """With the learning rate scaled by N/256, no weight decay on BN and biases, and the target after theta's step."""
    given = SMALL | {"momentum": 0.5, "lr": 0.4, "optimizer": "sgd"} | flags
    metrics, start, views = one_step(byol, given, tmp_path, monkeypatch)
    model, after = start["model"], saved(tmp_path)
    loss = by_hand(model, *views, flags.get("symmetric", True))
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    online = nn.ModuleDict({name: getattr(model, name) for name in ("backbone", "projector", "predictor")})
    moved_by(loss, online, after, 0.4 * 200 / 256, lambda p: 0.1 if p.ndim > 1 else 0.0)
    tau = given["momentum"]  # that of step 0
    for name, p in model.target.named_parameters():
        theta = after[name.replace("0.", "backbone.", 1) if name[0] == "0" else name.replace("1.", "projector.", 1)]
        assert torch.allclose(after[f"target.{name}"], tau * p + (1 - tau) * theta, rtol=1e-6, atol=1e-7), name
        assert tau != 1 or torch.equal(after[f"target.{name}"], p)
        assert tau != 0 or torch.equal(after[f"target.{name}"], theta)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_order_of_a_step(symmetric, tmp_path, monkeypatch):
    """One view at a time, through the online network and, in train mode and without a gradient, the target; then SGD,
    then the moving average by the tau of this step."""
    events, embed, step, update = [], byol.BYOL.embed, torch.optim.SGD.step, byol.BYOL.update_target

    def online(self, v):
        events.append(("online", len(v), self.backbone.training, torch.is_grad_enabled()))
        return embed(self, v)

    def moved(self, tau):
        events.append(("moved", tau))
        update(self, tau)

    def init(self, c, original=byol.BYOL.__init__):
        original(self, c)
        self.target.register_forward_pre_hook(
            lambda m, v: events.append(("target", len(v[0]), m[0].training, torch.is_grad_enabled()))
        )

    monkeypatch.setattr(byol.BYOL, "__init__", init)
    monkeypatch.setattr(byol.BYOL, "embed", online)
    monkeypatch.setattr(byol.BYOL, "update_target", moved)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: events.append("step") or step(*a, **k))
    train(byol, tmp_path, **SMALL, optimizer="sgd", symmetric=symmetric)
    pair = [("online", 64, True, True), ("target", 64, True, False)]
    passes = pair * 2 if symmetric else pair
    assert events == sum([[*passes, "step", ("moved", byol.tau_at(k, 3, 0.9))] for k in range(3)], [])


def test_the_target_has_statistics_of_its_own(tmp_path):
    train(byol, tmp_path, **SMALL)
    state = saved(tmp_path)
    ours, theirs = (state[prefix + "bn1.running_mean"] for prefix in ("backbone.", "target.0."))
    assert theirs.abs().sum() > 0 and not torch.equal(ours, theirs)
    counts = {name.split(".")[0]: int(v) for name, v in state.items() if name.endswith("num_batches_tracked")}
    assert counts == {"backbone": 6, "projector": 6, "predictor": 6, "target": 6}  # three steps, two views apart


# ------------------------------------------------------------------------------------- the network and the recipe


def test_heads_layer_by_layer():
    model = byol.BYOL(byol.Config(backbone="resnet18"))
    for head, inputs in ((model.projector, 512), (model.predictor, 256), (model.target[1], 512)):
        assert [type(m) for m in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]  # no BN on the output
        first, bn, _, last = head
        assert (first.in_features, first.out_features, last.in_features, last.out_features) == (inputs, 4096, 4096, 256)
        assert first.bias is not None and bn.affine and last.bias is None
    assert model.dim == 256
    for network in (model.backbone, model.target[0]):
        assert all((block.bn2.weight == 0).all() for block in [*network.layer1, *network.layer4])
    none = byol.BYOL(config(predictor=False))
    assert isinstance(none.predictor, nn.Identity) and len(none.target) == 2


PAPER = dict(
    epochs=1000, batch_size=4096, lr=0.2, optimizer="lars", weight_decay=1.5e-6, warmup_epochs=10.0, momentum=0.996,
    predictor=True, symmetric=True, hidden_dim=4096, projection_dim=256, crop_min_scale=0.08, jitter_strength=1.0,
    blur_1=1.0, blur_2=0.1, solarize_1=0.0, solarize_2=0.2, backbone="resnet50", image_size=224, stem="imagenet",
)  # fmt: skip
PAPER_300 = PAPER | {"epochs": 300, "lr": 0.3, "momentum": 0.99, "weight_decay": 1e-6}
PAPER_100 = PAPER | {"epochs": 100, "lr": 0.45, "momentum": 0.99, "weight_decay": 1e-6}
CIFAR = PAPER | dict(  # ours
    data="cifar10", backbone="resnet18", image_size=32, stem="cifar", epochs=800, batch_size=256, optimizer="sgd",
    lr=0.1, weight_decay=5e-4, momentum=0.99, hidden_dim=2048, blur_1=0.0, blur_2=0.0,
)  # fmt: skip
PHOTOS = {"backbone": "resnet18", "image_size": 128}  # ours
PRESETS = {"paper": PAPER, "paper-300": PAPER_300, "paper-100": PAPER_100, "cifar": CIFAR, "photos": PHOTOS}


@pytest.mark.parametrize("preset, published", PRESETS.items(), ids=PRESETS)
def test_presets_are_as_published(preset, published):
    c = byol.Config.preset(preset)
    assert {name: getattr(c, name) for name in published} == published


def test_the_two_kinds_of_views_are_table_6(tmp_path, monkeypatch):
    def views(c, blur, solarized):
        return recipe(byol, monkeypatch, c, blur, solarized)

    jitter = ("color_jitter", 0.8, 0.4, 0.4, 0.2, 0.1)
    assert views(byol.Config(), 0.1, 0.2) == [
        ("hflip", 0.5), jitter, ("grey", 0.2), ("gaussian_blur", 0.1), ("solarize", 0.2)
    ]  # fmt: skip
    assert views(byol.Config(jitter_strength=2.0), 1.0, 0.0)[1:] == [
        ("color_jitter", 0.8, 0.8, 0.8, 0.4, 0.2), ("grey", 0.2), ("gaussian_blur", 1.0), ("solarize", 0.0)
    ]  # fmt: skip
    asked, augment = [], byol.augment
    monkeypatch.setattr(byol, "augment", lambda x, c, *p: asked.append(p) or augment(x, c, *p))
    given = {"blur_1": 1.0, "blur_2": 0.1, "solarize_1": 0.05, "solarize_2": 0.2}
    train(byol, tmp_path, **SMALL | given, batch_size=200)
    assert asked == [(1.0, 0.05), (0.1, 0.2)]


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_the_optimizer(optimizer, tmp_path):
    train(byol, tmp_path, **SMALL, optimizer=optimizer, weight_decay=1e-3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["optimizer"][0].lower() == optimizer
    weights, rest = saved(tmp_path, "optimizer")["param_groups"]
    assert (weights["weight_decay"], rest["weight_decay"], weights["momentum"]) == (1e-3, 0.0, 0.9)
    assert weights["adapt"] and not rest["adapt"] and not weights.get("lr_in_momentum", False)
    trained = [p for p in byol.BYOL(config()).parameters() if p.requires_grad]
    assert len(weights["params"]) == sum(p.ndim > 1 for p in trained)
    assert len(rest["params"]) == sum(p.ndim == 1 for p in trained)


def test_the_schedule_and_the_crops(tmp_path, monkeypatch, capsys):
    qs, init = [], byol.BYOL.__init__

    def keep(self, c):
        init(self, c)
        self.predictor.register_forward_hook(lambda m, x, q: qs.append(q))

    monkeypatch.setattr(byol.BYOL, "__init__", keep)
    rates, logged = follows_the_schedule(byol, SMALL | {"lr": 0.4}, tmp_path, monkeypatch)
    assert rates == [pytest.approx([0.1 * share] * 2) for share in WARM_UP_AND_COSINE]
    assert len(qs) == 12 and all(torch.equal(z, q) for (z, *_), q in zip(logged, qs[::2], strict=True))  # q(z) of v1
    out = capsys.readouterr().out
    assert "peak lr 0.1\n" in out and "byol_loss, the sum of both directions, 0 to 8" in out
    assert "the target is a moving average, tau from 0.9 to 1" in out


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("flags, target", [
    ({"amp": "bf16", "blur_1": 1.0, "solarize_2": 0.2}, "a moving average, tau from 0.9"),
    ({"optimizer": "lars", "symmetric": False, "momentum": 0.0}, "the online network itself"),
    ({"predictor": False, "momentum": 1.0}, "fixed at its first weights"),
], ids=lambda f: "-".join(map(str, f.values())) if isinstance(f, dict) else "")  # fmt: skip
def test_options_run_and_load_back(flags, target, tmp_path, capsys):
    assert math.isfinite(train(byol, tmp_path, **SMALL | flags)["loss"])
    out = capsys.readouterr().out
    assert f"the target is {target}" in out and ("both directions" in out) == flags.get("symmetric", True)
    c, model = common.load_run(tmp_path)
    assert {name: getattr(c, name) for name in flags} == flags
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in backbone.items())


def test_pieces(tmp_path):
    trains_in_pieces(byol, SMALL, tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_an_interrupted_run_resumes_bit_for_bit(optimizer, tmp_path, monkeypatch):
    """Both networks, tau and the optimizer end where a whole run ends."""
    whole, resumed = resumes_bit_for_bit(byol, SMALL | {"optimizer": optimizer}, tmp_path, monkeypatch)
    assert whole["loss"] == resumed["loss"] and any(name.startswith("target.") for name in saved(tmp_path / "cut"))


DEMO = """--preset demo --epochs 2 --batch-size 64 --optimizer sgd --lr 0.8 --warmup-epochs 1 --image-size 16
--momentum 0.9 --hidden-dim 64 --projection-dim 64 --crop-min-scale 0.35 --knn-every 0"""


@pytest.mark.slowest
@pytest.mark.parametrize("flag", ["--predictor", "--no-predictor"])
def test_without_predictor_the_script_collapses_and_says_so(flag, tmp_path):
    """The same 312 steps with and without it (table 5b)."""
    done = python("byol.py", *DEMO.split(), flag, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    collapsed = flag == "--no-predictor"
    assert ("warning: the output has collapsed" in done.stdout) == collapsed, done.stdout
    loss = float((tmp_path / "log.csv").read_text().split("\n")[2].split(",")[1])
    assert (loss < 0.2) == collapsed  # 0.001 and 1.3; 0 when all outputs are one
