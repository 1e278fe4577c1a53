"""The loss, the two networks, the moving average, the two kinds of views, and whole runs."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import byol
import common
import linear_eval
from tests.helpers import follows_the_schedule, refusal, resumes_bit_for_bit, saved, trains_in_pieces


def config(**given):
    small = {"preset": "demo", "image_size": 16, "hidden_dim": 32, "projection_dim": 16, "warmup_epochs": 0.0}
    return byol.Config(**byol.Config.PRESETS["demo"] | small | given)


def start_of(c):
    """The model that a run of `c` starts from."""
    torch.manual_seed(c.seed)
    return byol.BYOL(c).to(memory_format=torch.channels_last)


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
    assert math.isclose(byol.byol_loss(q, z).item(), (unit[0] - unit[1]).square().sum(1).mean().item(), rel_tol=1e-12)


def test_no_gradient_reaches_the_target():
    torch.manual_seed(0)
    q, z = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    byol.byol_loss(q, z).backward()
    assert q.grad.abs().sum() > 0 and z.grad is None


# --------------------------------------------------------------------------------------------- the moving average


@pytest.mark.parametrize("base", [0.5, 0.99, 0.996])
def test_the_schedule_of_tau(base):
    assert math.isclose(byol.tau_at(0, 1000, base), base)
    assert math.isclose(byol.tau_at(500, 1000, base), (1 + base) / 2)
    assert byol.tau_at(1000, 1000, base) == 1 and base < byol.tau_at(999, 1000, base) < 1
    taus = [byol.tau_at(k, 1000, base) for k in range(1001)]
    assert taus == sorted(taus)


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
    theta = {f"0.{k}": v for k, v in model.backbone.state_dict().items()}
    theta |= {f"1.{k}": v for k, v in model.projector.state_dict().items()}
    before = {name: v.clone() for name, v in model.target.state_dict().items()}
    model.update_target(tau)
    parameters = dict(model.target.named_parameters())
    for name, value in model.target.state_dict().items():
        if name in parameters:
            assert torch.allclose(value, tau * before[name] + (1 - tau) * theta[name], rtol=1e-12, atol=1e-14), name
            assert tau != 0 or torch.equal(value, theta[name])
        else:
            assert torch.equal(value, before[name]), name  # buffers are the target's own


def test_the_order_of_a_step(few_shapes, tmp_path, monkeypatch):
    """Online on each view, then the target, in train mode and without a gradient; then SGD, then the EMA."""
    events, init = [], byol.BYOL.__init__

    def spy(owner, name, note=lambda *a: ()):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (events.append((name, *note(*a))), original(*a, **k))[1])

    def init_with_a_hook(self, c):
        init(self, c)
        self.target.register_forward_pre_hook(
            lambda m, x: events.append(("target", len(x[0]), m[0].training, torch.is_grad_enabled()))
        )

    monkeypatch.setattr(byol.BYOL, "__init__", init_with_a_hook)
    spy(byol.BYOL, "update_target", lambda model, tau: (tau,))
    spy(byol.BYOL, "forward", lambda model, x: (len(x), model.training, torch.is_grad_enabled()))
    spy(torch.optim.SGD, "step")
    byol.train(config(epochs=1, batch_size=64, knn_every=0, momentum=0.9, out=str(tmp_path)))
    views = [("forward", 64, True, True)] * 2 + [("target", 64, True, False)] * 2
    steps = [[*views, ("step",), ("update_target", byol.tau_at(k, 3, 0.9))] for k in range(3)]
    assert events == sum(steps, [])


def by_hand(model, v1, v2, c):
    """Equation 2 and its mirror image, written out."""

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    q1, q2 = model.predictor(model.projector(model.backbone(v1))), model.predictor(model(v2))
    with torch.no_grad():
        t1, t2 = model.target(v1), model.target(v2)
    one = (unit(q1) - unit(t2)).square().sum(1).mean()
    return one + (unit(q2) - unit(t1)).square().sum(1).mean() if c.symmetric else one


@pytest.mark.parametrize(
    "flags",
    [{}, {"symmetric": False}, {"predictor": False}, {"momentum": 0.0}, {"momentum": 1.0}],
    ids=lambda f: "-".join(f"{k}-{v}" for k, v in f.items()) or "default",
)
def test_a_step_is_sgd_on_equation_2_then_the_moving_average(flags, few_shapes, tmp_path, monkeypatch):
    seen, augment = [], byol.augment
    monkeypatch.setattr(byol, "augment", lambda *a: seen.append(augment(*a)) or seen[-1])
    c = config(epochs=1, batch_size=200, knn_every=0, weight_decay=0.1, out=str(tmp_path), **flags)
    metrics = byol.train(c)
    v1, v2 = seen
    model = start_of(c)
    loss = by_hand(model, v1, v2, c)
    loss.backward()
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    after, theta = saved(tmp_path), {}
    for name, p in model.named_parameters():
        if not name.startswith("target."):
            decay = c.weight_decay if p.ndim > 1 else 0.0  # not on BN and biases
            theta[name] = (p - c.peak_lr() * (p.grad + decay * p)).detach()
            assert torch.allclose(after[name], theta[name], rtol=1e-4, atol=2e-6), name
    for name, p in model.target.named_parameters():
        source = theta[name.replace("0.", "backbone.", 1) if name[0] == "0" else name.replace("1.", "projector.", 1)]
        expected = torch.lerp(p.detach(), source, 1 - c.momentum)  # tau at step 0
        assert torch.allclose(after[f"target.{name}"], expected, rtol=1e-4, atol=2e-6), name
        assert c.momentum != 1 or torch.equal(after[f"target.{name}"], p)


def test_the_target_has_statistics_of_its_own(few_shapes, tmp_path):
    byol.train(config(epochs=1, batch_size=64, knn_every=0, momentum=0.9, out=str(tmp_path)))
    state = saved(tmp_path)
    ours, theirs = (state[prefix + "bn1.running_mean"] for prefix in ("backbone.", "target.0."))
    assert theirs.abs().sum() > 0 and not torch.equal(ours, theirs)
    counts = {name.split(".")[0]: int(v) for name, v in state.items() if name.endswith("num_batches_tracked")}
    assert counts == {"backbone": 6, "projector": 6, "predictor": 6, "target": 6}  # three steps, two views apart


def test_where_the_target_starts():
    own = byol.BYOL(config())
    pairs = list(zip(own.backbone.parameters(), own.target[0].parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)  # at random
    assert not any(p.requires_grad for p in own.target.parameters()) and all(a.requires_grad for a, _ in pairs)
    same = byol.BYOL(config(momentum=0.0))
    theta = [*same.backbone.parameters(), *same.projector.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(theta, same.target.parameters(), strict=True))


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_of_momentum(momentum, few_shapes, tmp_path):
    c = config(epochs=2, batch_size=64, knn_every=0, momentum=momentum, out=str(tmp_path))
    byol.train(c)
    state, start = saved(tmp_path), start_of(c)
    for name, p in start.target[0].named_parameters():
        assert torch.equal(state[f"target.0.{name}"], state[f"backbone.{name}"]) == (momentum == 0), name
        assert torch.equal(state[f"target.0.{name}"], p) == (momentum == 1), name


# ------------------------------------------------------------------------------------- the network and the recipe


def test_heads_layer_by_layer():
    model = byol.BYOL(byol.Config(backbone="resnet18"))
    for head, inputs in ((model.projector, 512), (model.predictor, 256), (model.target[1], 512)):
        assert [type(m) for m in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]  # no BN on the output
        first, bn, _, last = head
        assert (first.in_features, first.out_features, last.in_features, last.out_features) == (inputs, 4096, 4096, 256)
        assert first.bias is not None and bn.affine and last.bias is None
    assert model.dim == 256
    none = byol.BYOL(config(predictor=False))
    assert isinstance(none.predictor, nn.Identity) and len(none.target) == 2


def test_defaults_are_the_papers():
    c = byol.Config()
    assert (c.lr, c.momentum, c.weight_decay, c.epochs) == (0.2, 0.996, 1.5e-6, 1000)
    assert (c.batch_size, c.optimizer, c.warmup_epochs, c.peak_lr()) == (4096, "lars", 10.0, 3.2)
    assert (c.hidden_dim, c.projection_dim, c.predictor, c.symmetric) == (4096, 256, True, True)
    assert (c.blur_1, c.blur_2, c.solarize_1, c.solarize_2, c.crop_min_scale) == (1.0, 0.1, 0.0, 0.2, 0.08)
    for epochs, lr in ((100, 0.45), (300, 0.3)):
        c = common.parse_args(byol.Config, ["--preset", f"paper-{epochs}", "--data", "x"])
        assert (c.epochs, c.lr, c.momentum, c.weight_decay, c.batch_size) == (epochs, lr, 0.99, 1e-6, 4096)
    assert common.parse_args(byol.Config, ["--data", "x"]).preset == "paper"


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_the_optimizer(optimizer, few_shapes, tmp_path):
    c = config(epochs=1, batch_size=64, knn_every=0, optimizer=optimizer, weight_decay=1e-3, out=str(tmp_path))
    byol.train(c)
    weights, rest = saved(tmp_path, "optimizer")["param_groups"]
    assert (weights["weight_decay"], rest["weight_decay"], weights["momentum"]) == (1e-3, 0.0, 0.9)
    if optimizer == "lars":
        assert weights["adapt"] and not rest["adapt"] and not weights["lr_in_momentum"]
    model = byol.BYOL(c)
    assert len(weights["params"]) == sum(p.ndim > 1 for p in model.parameters() if p.requires_grad)


def test_the_schedule_and_the_crops(few_shapes, tmp_path, monkeypatch):
    qs, init = [], byol.BYOL.__init__

    def keep(self, c):
        init(self, c)
        self.predictor.register_forward_hook(lambda m, x, q: qs.append(q))

    monkeypatch.setattr(byol.BYOL, "__init__", keep)
    views = follows_the_schedule(byol, config, tmp_path, monkeypatch)
    assert all(z is q for (z, *_), q in zip(views, qs[::2], strict=True))  # what enters the loss is what is watched


def test_the_two_views_differ_in_blur_and_solarization(monkeypatch, few_shapes, tmp_path):
    calls = []

    def spy(name):
        original = getattr(common, name)
        monkeypatch.setattr(common, name, lambda *a: calls.append((name, a)) or original(*a))

    for name in ("flip", "rotate", "random_jitter", "color_jitter", "to_grey", "gaussian_blur", "solarize"):
        spy(name)
    views = {"blur_1": 1.0, "blur_2": 0.1, "solarize_2": 0.2, "rotate": False}
    views |= {"jitter_strength": 1.0, "grey_probability": 0.2}
    c = config(epochs=1, batch_size=200, knn_every=0, out=str(tmp_path), **views)
    byol.train(c)
    first = ["flip", "random_jitter", "color_jitter", "to_grey", "gaussian_blur"]
    assert [name for name, _ in calls] == [*first, *first, "solarize"]
    assert all(a == (200, 0.4, 0.4, 0.2, 0.1, 0.8) for name, a in calls if name == "random_jitter")
    counts = [len(a[0]) for name, a in calls if name in ("gaussian_blur", "solarize")]
    assert counts[0] == 200 and 5 <= counts[1] <= 40 and 20 <= counts[2] <= 65
    greys = [len(a[0]) for name, a in calls if name == "to_grey"]
    assert all(20 <= n <= 65 for n in greys)
    calls.clear()
    c = byol.Config(image_size=32, rotate=True, jitter_strength=2.0, grey_probability=1.0)
    byol.augment(torch.rand(64, 3, 32, 32), c, blur=0.0, solarize=1.0)
    assert [name for name, _ in calls] == ["flip", "rotate", "random_jitter", "color_jitter", "to_grey", "solarize"]
    assert calls[2][1] == (64, 0.8, 0.8, 0.4, 0.2, 0.8) and set(calls[1][1][1].tolist()) == {0, 1, 2, 3}


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "flags",
    [
        {"amp": "bf16", "blur_1": 1.0, "solarize_2": 0.2},
        {"optimizer": "lars", "symmetric": False},
        {"predictor": False, "momentum": 0.0},
        {"momentum": 1.0},
    ],
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_options_run_and_can_be_evaluated(flags, few_shapes, tmp_path):
    metrics = byol.train(config(epochs=1, batch_size=64, knn_every=0, out=str(tmp_path), **flags))
    assert math.isfinite(metrics["loss"])
    _, model = linear_eval.load_run(str(tmp_path))
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in backbone.items())


def test_pieces(few_shapes, tmp_path):
    trains_in_pieces(byol, config, {}, tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_an_interrupted_run_resumes_bit_for_bit(optimizer, few_shapes, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch; both networks, tau and the optimizer end where a whole run ends."""
    given = {"epochs": 3, "batch_size": 32, "knn_every": 0, "momentum": 0.9, "optimizer": optimizer}
    resumes_bit_for_bit(byol, config, given, [], tmp_path, monkeypatch)


def test_streamed_images_without_labels(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "flat").mkdir()
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    c = config(data=str(tmp_path / "flat"), resident_gb=0.0, workers=1, epochs=1, batch_size=4)
    c.out = str(tmp_path / "run")
    metrics = byol.train(c)
    assert math.isfinite(metrics["loss"]) and metrics["knn_top1"] is None
    assert f"linear_eval.py {tmp_path / 'run'} --data LABELLED_IMAGES" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--momentum", "1.5"], "--momentum 1.5: must be 0 to 1"),
        (["--blur-1", "-1"], "--blur-1 -1.0: must be 0 to 1"),
        (["--batch-size", "1"], "--batch-size 1:"),
        (["--jitter-strength", "6"], "--jitter-strength 6.0: at most 5"),
        (["--optimizer", "adam"], "--optimizer"),
        (["--preset", "paper-200"], "--preset"),
        (["--loss-backend", "naive"], "unknown flag --loss-backend"),
    ],
    ids=lambda f: "-".join(f).strip("-") if isinstance(f, list) else "",
)
def test_bad_input_is_one_line(flags, words, few_shapes, tmp_path, capsys):
    assert words in refusal(byol, flags, tmp_path, capsys)


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"momentum": 0.0}, "caused by --momentum 0"),
        ({"predictor": False}, "caused by --no-predictor"),
        ({"predictor": False, "momentum": 0.0}, "caused by --momentum 0 and --no-predictor"),
        ({}, ": try a lower --lr"),
    ],
    ids=str,
)
def test_the_warning_of_a_collapse_names_its_flag(flags, named, few_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "likeness", lambda z: 1.0)
    monkeypatch.setattr(common.Run, "SETTLED", 0)
    byol.train(config(epochs=1, batch_size=100, knn_every=0, out=str(tmp_path), **flags))
    out = capsys.readouterr().out
    assert "warning: the output has collapsed" in out and named in out
