"""The loss, the heads, the stop-gradient, every ablation of the paper, and whole runs."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import linear_eval
import simsiam
from tests.helpers import follows_the_schedule, python, refusal, resumes_bit_for_bit, saved, trains_in_pieces

SMALL = {"image_size": 16, "hidden_dim": 32, "projection_dim": 16, "predictor_dim": 8}


def config(**given):
    return simsiam.Config(**simsiam.Config.PRESETS["demo"] | {"preset": "demo", "warmup_epochs": 0.0} | SMALL | given)


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


def by_hand(model, x, c):
    """Equation 4 and its ablations, written out, with everything in float32 as in a run."""
    z = [model(view) for view in x]
    p = [model.predictor(value) for value in z]
    stop = torch.Tensor.detach if c.stop_gradient else (lambda value: value)

    def d(p, z):
        if c.similarity == "cosine":
            return -(p / p.norm(dim=1, keepdim=True) * z / z.norm(dim=1, keepdim=True)).sum(1).mean()
        return -(F.softmax(z, 1) * F.log_softmax(p, 1)).sum(1).mean()

    if c.symmetry == "symmetric":
        return d(p[0], stop(z[1])) / 2 + d(p[1], stop(z[0])) / 2
    if c.symmetry == "asymmetric":
        return d(p[0], stop(z[1]))
    return d(p[0], stop(z[1])) / 2 + d(p[2], stop(z[3])) / 2


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"stop_gradient": False},
        {"symmetry": "asymmetric"},
        {"symmetry": "asymmetric", "stop_gradient": False},
        {"symmetry": "asymmetric-2x"},
        {"similarity": "cross-entropy"},
        {"predictor": "fixed"},
        {"predictor": "none", "head_bn": "hidden"},
    ],
    ids=lambda f: "-".join(map(str, f.values())) or "default",
)
def test_a_step_is_sgd_on_equation_4(flags, few_shapes, tmp_path, monkeypatch):
    seen, augment = [], simsiam.augment
    monkeypatch.setattr(simsiam, "augment", lambda x, c: seen.append(augment(x, c)) or seen[-1])
    c = config(epochs=1, batch_size=200, knn_every=0, weight_decay=0.1, out=str(tmp_path), **flags)
    metrics = simsiam.train(c)
    assert len(seen) == (4 if c.symmetry == "asymmetric-2x" else 2) and not torch.equal(seen[0], seen[1])

    torch.manual_seed(c.seed)
    model = simsiam.SimSiam(c).to(memory_format=torch.channels_last)
    loss = by_hand(model, seen, c)
    loss.backward()
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    after, moved = saved(tmp_path), 0
    for name, p in model.named_parameters():
        # momentum 0.9 starts with the gradient; the weight decay is on everything, BN and biases too
        step = c.peak_lr() * (p.grad + c.weight_decay * p) if p.requires_grad else torch.zeros(())
        expected = p.detach() - step.detach()
        assert torch.allclose(after[name], expected, rtol=1e-4, atol=2e-6), name
        moved += not torch.equal(after[name], p.detach())
        if name.startswith("predictor.") and c.predictor == "fixed":
            assert torch.equal(after[name], p.detach()), name  # not even by weight decay
    assert moved > 10


def test_a_fixed_predictor_does_not_move_and_the_other_does(few_shapes, tmp_path):
    for predictor in ("fixed", "mlp"):
        c = config(epochs=2, batch_size=64, knn_every=0, predictor=predictor, out=str(tmp_path / predictor))
        simsiam.train(c)
        torch.manual_seed(c.seed)
        start = dict(simsiam.SimSiam(c).predictor.named_parameters())
        end = saved(tmp_path / predictor)
        assert start
        for name, value in start.items():
            assert torch.equal(value.detach(), end[f"predictor.{name}"]) == (predictor == "fixed"), name


def test_bn_statistics_are_of_one_view_at_a_time(few_shapes, tmp_path, monkeypatch):
    sizes, forward = [], simsiam.SimSiam.forward
    monkeypatch.setattr(simsiam.SimSiam, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    simsiam.train(config(epochs=1, batch_size=64, knn_every=0, out=str(tmp_path)))
    assert sizes == [64] * 6  # 200 images: three steps of two views
    counts = {name: int(v) for name, v in saved(tmp_path).items() if name.endswith("num_batches_tracked")}
    assert set(counts.values()) == {6} and any(n.startswith("projector") for n in counts)


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
    model = simsiam.SimSiam(simsiam.Config(backbone="resnet18", head_bn=head_bn, predictor="mlp"))
    assert spelled(model.projector) == projector and spelled(model.predictor) == predictor
    widths = [(m.in_features, m.out_features) for m in model.projector if isinstance(m, nn.Linear)]
    assert widths == [(512, 2048), (2048, 2048), (2048, 2048)]
    widths = [(m.in_features, m.out_features) for m in model.predictor if isinstance(m, nn.Linear)]
    assert widths == [(2048, 512), (512, 2048)]
    assert model.dim == 2048 and all(p.requires_grad for p in model.parameters())


def test_heads_of_other_depths_and_without_a_predictor():
    two = simsiam.SimSiam(config(projector_layers=2))
    assert spelled(two.projector) == "lBRlb"
    assert spelled(simsiam.SimSiam(config(projector_layers=1)).projector) == "lb"
    none = simsiam.SimSiam(config(predictor="none"))
    assert isinstance(none.predictor, nn.Identity)
    fixed = simsiam.SimSiam(config(predictor="fixed"))
    assert spelled(fixed.predictor) == "lBRL" and not any(p.requires_grad for p in fixed.predictor.parameters())
    assert all(p.requires_grad for p in fixed.projector.parameters())


def test_the_last_bn_of_a_block_starts_at_zero():
    model = simsiam.SimSiam(config(backbone="resnet18"))
    assert all(
        (block.bn2.weight == 0).all() for layer in (model.backbone.layer1, model.backbone.layer4) for block in layer
    )


# ---------------------------------------------------------------------------------------------------- the recipe


def test_defaults_are_the_papers():
    c = simsiam.Config()
    assert (c.lr, c.batch_size, c.epochs, c.weight_decay, c.warmup_epochs) == (0.05, 512, 100, 1e-4, 0.0)
    assert (c.projection_dim, c.hidden_dim, c.predictor_dim, c.projector_layers) == (2048, 2048, 512, 3)
    assert (c.stop_gradient, c.predictor, c.predictor_lr, c.head_bn) == (True, "mlp", "decayed", "default")
    assert (c.similarity, c.symmetry, c.alternate_every, c.target) == ("cosine", "symmetric", 1, "batch")
    assert c.peak_lr() == 0.1 and c.crop_min_scale == 0.2
    assert simsiam.Config(batch_size=1024).warmup_epochs == 10 and simsiam.Config(batch_size=512).warmup_epochs == 0
    assert simsiam.Config(batch_size=4096, warmup_epochs=0.0).warmup_epochs == 0
    assert simsiam.Config(head_bn="none").warmup_epochs == 10  # section 4.4
    cifar = common.parse_args(simsiam.Config, ["--data", "cifar10"])
    assert (cifar.lr, cifar.weight_decay, cifar.epochs, cifar.batch_size) == (0.03, 5e-4, 800, 512)
    assert (cifar.projector_layers, cifar.blur, cifar.backbone) == (2, False, "resnet18")
    assert simsiam.Config(target="moving-average").predictor == "none"


def test_the_schedule_and_the_crops(few_shapes, tmp_path, monkeypatch):
    zs, forward = [], simsiam.SimSiam.forward
    monkeypatch.setattr(simsiam.SimSiam, "forward", lambda self, x: zs.append(forward(self, x)) or zs[-1])
    views = follows_the_schedule(simsiam, config, tmp_path, monkeypatch)
    assert all(torch.equal(z, z1) for (z, *_), z1 in zip(views, zs[:12:2], strict=True))  # z_1 is what is watched
    groups = saved(tmp_path, "optimizer")["param_groups"]
    assert all((g["momentum"], g["weight_decay"]) == (0.9, 1e-4) for g in groups)  # on BN and biases too
    model = simsiam.SimSiam(config())
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("which", ["decayed", "constant"])
def test_the_predictors_learning_rate(which, few_shapes, tmp_path):
    c = config(epochs=2, batch_size=64, knn_every=0, predictor_lr=which, out=str(tmp_path))
    simsiam.train(c)
    rest, predictor = (group["lr"] for group in saved(tmp_path, "optimizer")["param_groups"])
    last = common.cosine_lr(5, 6, 0, c.peak_lr())
    assert rest == last < 0.1 * c.peak_lr() and predictor == (c.peak_lr() if which == "constant" else last)


def test_augmentation_is_moco_v2s(monkeypatch):
    calls = []

    def spy(name):
        original = getattr(common, name)
        monkeypatch.setattr(common, name, lambda *a: calls.append((name, a)) or original(*a))

    for name in ("random_jitter", "color_jitter", "to_grey", "gaussian_blur", "rotate", "flip"):
        spy(name)
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32)
    out = simsiam.augment(x.clone(), simsiam.Config(image_size=32))
    assert out.shape == x.shape and out.min() >= -1e-6 and out.max() <= 1 + 1e-6
    assert [name for name, _ in calls] == ["random_jitter", "color_jitter", "to_grey", "gaussian_blur", "flip"]
    assert calls[0][1] == (64, 0.4, 0.4, 0.4, 0.1, 0.8)
    counts = {name: len(a[0]) for name, a in calls[2:]}
    assert 4 <= counts["to_grey"] <= 24 and 20 <= counts["gaussian_blur"] <= 44 and 20 <= counts["flip"] <= 44
    calls.clear()
    c = simsiam.Config(image_size=32, blur=False, rotate=True, jitter_strength=2.0, grey_probability=1.0)
    simsiam.augment(x.clone(), c)
    assert [name for name, _ in calls] == ["random_jitter", "color_jitter", "to_grey", "rotate", "flip"]
    assert calls[0][1] == (64, 0.8, 0.8, 0.8, 0.2, 0.8) and len(calls[2][1][0]) == 64
    assert set(calls[3][1][1].tolist()) == {0, 1, 2, 3}


# ------------------------------------------------------------------------------------------------ the EM reading


@pytest.mark.parametrize("k, starts", [(3, [0, 3, 6, 9]), (4, [0, 4, 6, 10]), (0, [0, 6]), (99, [0, 6])])
def test_targets_are_computed_before_k_steps(k, starts, few_shapes, tmp_path, monkeypatch):
    """Six steps an epoch, two epochs. All views of an image are the same here, so that its target can be told."""
    steps, fills, inputs = [], [], []
    forward, fill = simsiam.SimSiam.forward, simsiam.Cache.fill

    def spy_forward(self, x):
        z = forward(self, x)
        if self.training:
            inputs.append((x.clone(), z.detach().clone()))
        return z

    def spy_fill(self, *rest):
        inputs.clear()
        fill(self, *rest)
        fills.append((len(steps), list(inputs)))
        inputs.clear()

    def spy_distance(p, z, stop):
        assert not z.requires_grad and p.requires_grad
        steps.append((*inputs[len(steps) % 2], z.clone())) if len(inputs) == 2 else None
        if len(steps) % 2 == 0:
            inputs.clear()
        return simsiam.negative_cosine(p, z, stop)

    monkeypatch.setattr(simsiam.SimSiam, "forward", spy_forward)
    monkeypatch.setattr(simsiam.Cache, "fill", spy_fill)
    monkeypatch.setitem(simsiam.DISTANCES, "cosine", spy_distance)
    monkeypatch.setattr(simsiam, "augment", lambda x, c: x)
    c = config(epochs=2, batch_size=32, knn_every=0, alternate_every=k, crop_min_scale=1.0, lr=1.0, out=str(tmp_path))
    simsiam.train(c)
    assert [step // 2 for step, _ in fills] == starts and len(steps) == 2 * 12
    for (start, filled), end in zip(fills, [*starts[1:], 12], strict=True):
        assert len(filled) == 2 * (end - start // 2)  # no target is computed for nothing
        for i, (x, z, target) in enumerate(steps[start : 2 * end]):
            assert torch.equal(x, filled[i][0]) and torch.equal(target, filled[i][1])
            assert torch.allclose(target, z, atol=1e-3) == (i < 2)  # the network moves on, its targets do not


def test_targets_ahead_have_views_of_their_own_and_leave_the_statistics(few_shapes, tmp_path, monkeypatch):
    seen, augment, asked, crops = [], simsiam.augment, [], common.Images.crops
    monkeypatch.setattr(simsiam, "augment", lambda x, c: seen.append(augment(x, c)) or seen[-1])
    monkeypatch.setattr(common.Images, "crops", lambda *a: asked.append(a[3:6]) or crops(*a))
    c = config(epochs=1, batch_size=100, knn_every=0, alternate_every=2, out=str(tmp_path))
    simsiam.train(c)
    (views, scale, seed), (views_ahead, scale_ahead, seed_ahead) = asked
    assert (views, scale) == (views_ahead, scale_ahead) == (2, (0.5, 1.0)) and seed != seed_ahead
    assert len(seen) == 8 and not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    torch.manual_seed(c.seed)
    start = simsiam.SimSiam(c)
    simsiam.train(config(epochs=1, batch_size=100, knn_every=0, lr=1e-9, out=str(tmp_path / "plain")))
    simsiam.train(config(epochs=1, batch_size=100, knn_every=0, lr=1e-9, alternate_every=2, out=str(tmp_path / "k")))
    means = [saved(tmp_path / d)["backbone.bn1.running_mean"] for d in ("plain", "k")]
    assert torch.allclose(*means, rtol=0.2, atol=1e-3) and not torch.allclose(means[0], start.backbone.bn1.running_mean)


def test_targets_end_with_their_epoch_and_ctrl_c_is_heard_before_them(few_shapes, tmp_path, monkeypatch):
    after = common.Run.after_epoch

    def stop_later(self, **rest):
        after(self, **rest)
        self.stop = True

    monkeypatch.setattr(common.Run, "after_epoch", stop_later)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 6; the last checkpoint is kept"):
        simsiam.train(config(epochs=2, batch_size=64, knn_every=0, alternate_every=0, out=str(tmp_path)))
    assert saved(tmp_path, "epoch") == 1 and saved(tmp_path, "step_in_epoch") == 0
    assert saved(tmp_path, "cache") == {"waiting": []}
    with pytest.raises(ValueError, match="pairs"):
        simsiam.Cache(2, 2, (1,), lambda x: x).load_state_dict({"waiting": [torch.zeros(4, 2, 8)]})


def test_the_bank_is_a_moving_average():
    torch.manual_seed(0)
    bank, z, later = simsiam.Bank(6, 4, 0.8), torch.randn(2, 4), torch.randn(2, 4)
    start, unit = bank.eta.clone(), lambda x: F.normalize(x.detach(), dim=1)
    assert torch.allclose(start.norm(dim=1), torch.ones(6)) and start.unique(dim=0).shape == (6, 4)
    (first,) = bank.update(torch.tensor([4, 1]), [z.requires_grad_()])
    assert torch.allclose(first, 0.8 * start[[4, 1]] + 0.2 * unit(z)) and not first.requires_grad
    (second,) = bank.update(torch.tensor([4, 1]), [later])
    assert torch.allclose(second, 0.8 * first + 0.2 * unit(later))
    assert torch.equal(bank.eta[[4, 1]], second) and torch.equal(bank.eta[[0, 2, 3, 5]], start[[0, 2, 3, 5]])
    before, (a, b) = bank.eta[[1]].clone(), torch.randn(2, 1, 4)  # two views: each target holds its own view alone
    one, two = bank.update(torch.tensor([1]), [a, b])
    assert torch.allclose(one, 0.8 * before + 0.2 * unit(a)) and torch.allclose(two, 0.8 * before + 0.2 * unit(b))
    assert torch.allclose(bank.eta[[1]], (one + two) / 2)


def test_a_run_predicts_the_moving_average_of_the_other_view(few_shapes, tmp_path, monkeypatch):
    pairs, zs, forward, starts, update = [], [], simsiam.SimSiam.forward, [], simsiam.Bank.update
    monkeypatch.setattr(simsiam.SimSiam, "forward", lambda self, x: zs.append(forward(self, x)) or zs[-1])
    monkeypatch.setattr(simsiam.Bank, "update", lambda bank, *a: (starts.append(bank.eta.clone()), update(bank, *a))[1])
    monkeypatch.setitem(
        simsiam.DISTANCES, "cosine", lambda p, z, stop: pairs.append((p, z)) or simsiam.negative_cosine(p, z, stop)
    )
    c = config(epochs=1, batch_size=120, knn_every=0, target="moving-average", out=str(tmp_path))
    simsiam.train(c)
    (z1, z2), ((p1, t1), (p2, t2)) = zs[:2], pairs
    assert torch.equal(p1, z1) and torch.equal(p2, z2)  # no predictor
    order, eta = torch.randperm(200, generator=torch.Generator().manual_seed(0)), saved(tmp_path, "bank")["eta"]
    old, u1, u2 = 0.8 * starts[0][order[:120]], *(0.2 * F.normalize(z.detach(), dim=1) for z in (z1, z2))
    assert torch.allclose(t1, old + u2, atol=1e-6) and torch.allclose(t2, old + u1, atol=1e-6)
    assert torch.allclose(eta[order[:120]], old + (u1 + u2) / 2, atol=1e-6)
    assert torch.equal(eta[order[120:]], starts[0][order[120:]])


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "flags",
    [
        {"amp": "bf16", "blur": True},
        {"head_bn": "none", "similarity": "cross-entropy"},
        {"head_bn": "all", "predictor_lr": "constant"},
        {"symmetry": "asymmetric-2x", "alternate_every": 2},
        {"symmetry": "asymmetric", "target": "moving-average", "target_momentum": 0.5},
        {"target": "moving-average", "predictor": "mlp"},
        {"amp": "bf16", "alternate_every": 0},
    ],
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_options_run_and_can_be_evaluated(flags, few_shapes, tmp_path):
    metrics = simsiam.train(config(epochs=1, batch_size=64, knn_every=0, out=str(tmp_path), **flags))
    assert math.isfinite(metrics["loss"])
    _, model = linear_eval.load_run(str(tmp_path))
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in backbone.items())


@pytest.mark.parametrize("flags", [{}, {"alternate_every": 2}, {"stop_gradient": False}], ids=str)
def test_pieces(flags, few_shapes, tmp_path):
    trains_in_pieces(simsiam, config, flags, tmp_path)


@pytest.mark.parametrize("flags", [{"predictor_lr": "constant"}, {"alternate_every": 4}, {"target": "moving-average"}])
def test_an_interrupted_run_resumes_bit_for_bit(flags, few_shapes, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch, and of a block of k steps; network, optimizer, cache and bank end where a
    whole run ends."""
    given = {"epochs": 3, "batch_size": 32, "knn_every": 0} | flags
    parts = ["cache"] * ("alternate_every" in flags) + ["bank"] * ("target" in flags)
    resumes_bit_for_bit(simsiam, config, given, parts, tmp_path, monkeypatch)


def test_streamed_images_without_labels(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "flat").mkdir()
    for i in range(14):
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    c = config(data=str(tmp_path / "flat"), resident_gb=0.0, workers=1, epochs=1, batch_size=4, alternate_every=2)
    c.out = str(tmp_path / "run")
    metrics = simsiam.train(c)
    assert math.isfinite(metrics["loss"]) and metrics["knn_top1"] is None


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--predictor", "linear"], "--predictor"),
        (["--alternate-every", "-1"], "--alternate-every -1: must be >= 0"),
        (["--target-momentum", "2"], "--target-momentum 2.0: must be 0 to 1"),
        (["--batch-size", "1"], "--batch-size 1:"),
        (["--jitter-strength", "6"], "--jitter-strength 6.0: at most 5"),
        (["--warmup-epochs", "nan"], "--warmup-epochs nan: must be >= 0"),
        (["--predictor", "none", "--predictor-lr", "constant"], "--predictor-lr constant:"),
        (["--predictor", "fixed", "--predictor-lr", "constant"], "--predictor-lr constant:"),
        (["--predictor", "none", "--head-bn", "all"], "--head-bn all:"),
        (["--target-momentum", "0.5"], "--target-momentum: add --target moving-average"),
        (["--target", "moving-average", "--alternate-every", "2"], "--alternate-every and --target moving-average:"),
        (["--target", "moving-average", "--similarity", "cross-entropy"], "--similarity cross-entropy:"),
        (
            ["--target", "moving-average", "--no-stop-gradient"],
            "--no-stop-gradient: no gradient reaches stored targets",
        ),
        (["--alternate-every", "0", "--no-stop-gradient"], "--no-stop-gradient:"),
    ],
    ids=lambda f: "-".join(f).strip("-") if isinstance(f, list) else "",
)
def test_bad_input_is_one_line(flags, words, few_shapes, tmp_path, capsys):
    assert words in refusal(simsiam, flags, tmp_path, capsys)


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"stop_gradient": False}, "caused by --no-stop-gradient"),
        ({"predictor": "none", "head_bn": "none"}, "caused by --predictor none and --head-bn none"),
        ({"predictor": "fixed"}, "try a lower --lr"),
        ({"target": "moving-average"}, "caused by --target moving-average"),
        ({"target": "moving-average", "predictor": "mlp"}, "try a lower --lr"),
        ({}, "try a lower --lr"),
    ],
    ids=str,
)
def test_the_warning_of_a_collapse_names_its_flag(flags, named, few_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "likeness", lambda z: 1.0)
    monkeypatch.setattr(common.Run, "SETTLED", 0)
    simsiam.train(config(epochs=1, batch_size=100, knn_every=0, out=str(tmp_path), **flags))
    out = capsys.readouterr().out
    assert "warning: the output has collapsed" in out and named in out


@pytest.mark.slow
def test_without_stop_gradient_the_script_collapses_and_says_why(tmp_path):
    flags = "--epochs 2 --no-stop-gradient --image-size 16 --knn-every 0"
    done = python("simsiam.py", *flags.split(), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the output has collapsed" in done.stdout and "caused by --no-stop-gradient" in done.stdout
    for words in ("preset demo", "peak lr", "with a gradient (--no-stop-gradient)", "stop-gradient False"):
        assert words in done.stdout
    assert (tmp_path / "curves.png").exists() or "matplotlib" in done.stdout
