"""The loss, the queue, the key encoder, the three mechanisms, shuffling BN, and whole runs."""

import collections
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import kernels
import moco
from tests.helpers import (
    WARM_UP_AND_COSINE,
    at_each_step,
    follows_the_schedule,
    moved_by,
    one_step,
    recipe,
    refusal,
    resumes_bit_for_bit,
    saved,
    train,
    trains_in_pieces,
)

SMALL = {"image_size": 16, "projection_dim": 16, "queue_size": 90, "bn_splits": 2, "momentum": 0.9}


def config(**given):
    return moco.Config.preset("demo", **SMALL | given)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# ------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("tau", [0.07, 0.2, 3.0])
@pytest.mark.parametrize("n, k", [(1, 1), (3, 7), (5, 2)])
def test_info_nce_is_equation_1(n, k, tau):
    torch.manual_seed(n)
    q, keys, queue = unit(n, 6).requires_grad_(), unit(n, 6), unit(k, 6)
    total = 0
    for i in range(n):
        positive = torch.exp(torch.dot(q[i], keys[i]) / tau)
        total = total - torch.log(positive / (positive + sum(torch.exp(torch.dot(q[i], c) / tau) for c in queue)))
    ours = moco.info_nce(q, keys, queue, tau)
    assert torch.allclose(ours, total / n, rtol=1e-12)
    assert torch.allclose(moco.info_nce(3 * q, 5 * keys, 0.1 * queue, tau), ours, rtol=1e-12)  # directions alone


def test_info_nce_closed_forms():
    same = torch.ones(4, 3, dtype=torch.float64)
    assert math.isclose(moco.info_nce(same, same, same.repeat(5, 1), 0.2).item(), math.log(21))
    eye = torch.eye(8, dtype=torch.float64)  # positives at cosine 1, the queue's keys at 0
    assert math.isclose(moco.info_nce(eye[:3], eye[:3], eye[3:], 0.5).item(), math.log(math.exp(2) + 5) - 2)


@pytest.mark.parametrize("tau", [1e-4, 0.01, 100.0])
def test_info_nce_is_finite_at_any_temperature(tau):
    torch.manual_seed(0)
    q, k, queue = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8), torch.randn(40, 8)
    loss = moco.info_nce(q, k, queue, tau)
    loss.backward()
    assert torch.isfinite(q.grad).all()
    assert abs(loss.item() - moco.info_nce(q.double(), k.double(), queue.double(), tau).item()) <= 1e-4 * max(1, loss)


def test_a_queue_of_the_other_keys_of_the_batch_is_end_to_end():
    torch.manual_seed(0)
    q, k = unit(2, 9, 5)
    others = [moco.info_nce(q[i : i + 1], k[i : i + 1], torch.cat([k[:i], k[i + 1 :]]), 0.2) for i in range(9)]
    assert torch.allclose(moco.info_nce(q, k, None, 0.2), torch.stack(others).mean(), rtol=1e-12)


def test_no_gradient_reaches_keys_or_queue_but_end_to_end_reaches_its_keys():
    torch.manual_seed(0)
    q, k, queue = (torch.randn(n, 5, requires_grad=True) for n in (4, 4, 7))
    moco.info_nce(q, k, queue).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None and queue.grad is None
    moco.info_nce(q, k).backward()
    assert k.grad.abs().sum() > 0


# -------------------------------------------------------------------------------------------------------- a step


def by_hand(start, negatives, x_q, x_k=None, tau=0.3, mechanism="queue"):
    """Equation 1 of figure 2's three dictionaries, written out, with the keys that follow from it. With a memory bank
    only one view is made."""
    model = start["model"]
    q, k = (None if x is None else F.normalize(model.embed(x), dim=1) for x in (x_q, x_k))
    if mechanism == "queue":
        k, negatives = F.normalize(model.key_encoder(x_k), dim=1).detach(), start["queue"].keys
    if mechanism == "memory-bank":
        k = start["bank"].vectors[start["index"]]
    positive = torch.exp((q * k).sum(1) / tau)
    if mechanism == "end-to-end":
        others = torch.exp(q @ k.T / tau).sum(1) - positive
    else:
        others = torch.exp(q @ negatives.T / tau).sum(1)
    return -torch.log(positive / (positive + others)).mean(), q, k


@pytest.mark.parametrize(
    "flags",
    [
        {"loss_backend": "naive"},
        {"loss_backend": "blocked"},
        {"loss_backend": "blocked", "symmetric": True},
        {"mechanism": "end-to-end", "loss_backend": "naive"},  # here the gradient reaches the keys' encoder
        {"mechanism": "end-to-end", "loss_backend": "blocked"},
        {"mechanism": "end-to-end", "symmetric": True, "loss_backend": "naive"},
        {"mechanism": "memory-bank", "loss_backend": "naive"},
        {"mechanism": "memory-bank", "loss_backend": "blocked"},
    ],
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_a_step_is_sgd_on_equation_1(flags, tmp_path, monkeypatch):
    """Of the method's file or of kernels/, with weight decay on everything; then the keys go into the dictionary."""
    used, drawn, fused, sample = [], [], kernels.info_nce, moco.MemoryBank.sample
    monkeypatch.setattr(common.kernels, "info_nce", lambda *a, **k: used.append(k["backend"]) or fused(*a, **k))
    monkeypatch.setattr(moco.MemoryBank, "sample", lambda *a: drawn.append(sample(*a)) or drawn[-1])
    mechanism, symmetric = flags.get("mechanism", "queue"), flags.get("symmetric", False)
    n = 150 if mechanism == "memory-bank" else 200  # a bank needs images that are not in the batch
    given = {"batch_size": n, "lr": 0.3, "temperature": 0.3, "bn_splits": 1, "queue_size": 180, "bank_momentum": 0.8}
    metrics, start, views = one_step(moco, SMALL | given | flags, tmp_path, monkeypatch)
    assert used == ["blocked"] * (1 + symmetric) * (flags.get("loss_backend") == "blocked")
    bank = copy_of(start["bank"].vectors) if drawn else None

    loss, q, k = by_hand(start, *drawn or [None], *views, mechanism=mechanism)
    keys = [k]
    if symmetric:
        other, _, other_k = by_hand(start, None, *views[::-1], mechanism=mechanism)
        loss, keys = loss + other, [other_k, k]
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    after = saved(tmp_path)
    moved_by(loss, start["model"], after, 0.3, lambda p: 0.1)

    if mechanism == "queue":
        after, kept = saved(tmp_path, "queue"), torch.cat(keys)[-180:]
        assert after["pointer"] == 0 and torch.allclose(after["keys"], kept, atol=1e-5)
    if mechanism == "memory-bank":
        assert drawn[0].shape == (180, 16)
        bank[start["index"]] = F.normalize(0.8 * bank[start["index"]] + 0.2 * q.detach(), dim=1)
        assert torch.allclose(saved(tmp_path, "bank")["vectors"], bank, atol=1e-5)


def copy_of(x):
    return x.detach().clone()


# ------------------------------------------------------------------------------------------- queue and encoders


@pytest.mark.parametrize("size, batches", [(10, [4, 4, 4, 4]), (7, [3] * 9), (5, [8, 8, 3, 12]), (6, [4, 4, 1, 4, 2])])
def test_the_queue_is_a_fifo(size, batches):
    """K not a multiple of N, N > K, a short last batch: the same keys in the same order as a deque."""
    torch.manual_seed(0)
    queue = moco.Queue(size, 4)
    expected = collections.deque(queue.keys.clone(), maxlen=size)
    assert queue.keys.shape == (size, 4) and torch.allclose(queue.keys.norm(dim=1), torch.ones(size))
    for n in batches:
        k = F.normalize(torch.randn(n, 4), dim=1)
        queue.enqueue(3 * k)
        expected.extend(k)
        oldest_first = queue.keys.roll(-int(queue.pointer), 0)
        assert torch.allclose(oldest_first, torch.stack(list(expected)), atol=1e-6)
    assert queue.keys.is_contiguous() and 0 <= queue.pointer < size


@pytest.mark.parametrize("m", [0.0, 0.9, 0.999, 1.0])
def test_the_key_encoder_moves_by_equation_2_on_parameters_only(m):
    torch.manual_seed(0)
    model = moco.MoCo(config()).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        for b in model.backbone.buffers():
            b.add_(1)
    f_q = nn.Sequential(model.backbone, model.projector)
    query = f_q.state_dict()
    before = {name: p.clone() for name, p in model.key_encoder.state_dict().items()}
    moco.update_key_encoder(f_q, model.key_encoder, m)
    parameters = dict(model.key_encoder.named_parameters())
    assert set(parameters) <= set(query)
    for name, value in model.key_encoder.state_dict().items():
        if name in parameters:
            assert torch.allclose(value, m * before[name] + (1 - m) * query[name], rtol=1e-12, atol=1e-14), name
            assert (m == 0) == torch.equal(value, query[name])
        else:
            assert torch.equal(value, before[name]), name  # buffers are the key network's own


@pytest.mark.parametrize("given", [{}, {"symmetric": True}, {"momentum": 0.0}, {"momentum": 1.0}], ids=str)
def test_the_key_encoder_moves_before_the_keys_and_they_are_queued_after_the_step(given, tmp_path, monkeypatch):
    """Over three steps: f_k, in train mode and without a gradient, has moved once toward the f_q of this step."""
    m, ks, qs, forward, enqueue = given.get("momentum", 0.9), [], [], moco.MoCo.forward, moco.Queue.enqueue
    losses, step, events = moco.info_nce, torch.optim.SGD.step, []

    def spy(model, *views):
        assert model.key_encoder.training and model.backbone.training
        ks.append([copy_of(p) for p in model.key_encoder.parameters()])
        qs.append([copy_of(p) for p in (*model.backbone.parameters(), *model.projector.parameters())])
        q, k = forward(model, *views)
        assert q.requires_grad and not k.requires_grad
        events.append("q, k")
        return q, k

    monkeypatch.setattr(moco.MoCo, "forward", spy)
    monkeypatch.setattr(moco, "info_nce", lambda *a: events.append("loss") or losses(*a))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: events.append("step") or step(*a, **k))
    monkeypatch.setattr(moco.Queue, "enqueue", lambda self, k: events.append(len(k)) or enqueue(self, k))
    train(moco, tmp_path, **SMALL | given, loss_backend="naive")
    passes = 1 + given.get("symmetric", False)
    assert events == 3 * (passes * ["q, k", "loss"] + ["step", passes * 64])
    theta_k = qs[0]  # f_k starts as f_q
    for step in range(0, 3 * passes, passes):
        theta_k = [m * old + (1 - m) * new for old, new in zip(theta_k, qs[step], strict=True)]
        for found in ks[step : step + passes]:
            assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, theta_k, strict=True))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(qs[0], qs[-1], strict=True))  # f_q moved


def test_the_key_network_has_statistics_of_its_own(tmp_path):
    train(moco, tmp_path, **SMALL)
    ours, theirs = (saved(tmp_path)[prefix + "bn1.running_mean"] for prefix in ("backbone.", "key_encoder.0."))
    assert theirs.abs().sum() > 0 and not torch.equal(ours, theirs)


# -------------------------------------------------------------------------------------------------- shuffling BN


@pytest.mark.parametrize("splits", [2, 4])
def test_a_split_bn_takes_statistics_of_each_group_and_moves_the_running_ones_once(splits):
    """The groups lie one after the other. Evaluation, parameters and buffers are those of BatchNorm2d."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    bn, plain = nn.Sequential(moco.SplitBatchNorm(3)), nn.BatchNorm2d(3)
    bn[0].splits = splits
    y, expected, means, variances = bn(x), [], [], []
    for group in x.chunk(splits):
        one = nn.BatchNorm2d(3)
        expected.append(one(group))
        means.append(one.running_mean)
        variances.append(one.running_var)
    expected = torch.cat(expected)
    assert torch.allclose(y, expected, atol=1e-5)
    for ours, theirs in ((bn[0].running_mean, means), (bn[0].running_var, variances)):
        assert torch.allclose(ours, torch.stack(theirs).mean(0), atol=1e-6)
    assert bn[0].state_dict().keys() == plain.state_dict().keys()
    weights = torch.randn(8, 3, 4, 4)
    (ours,), (theirs,) = (torch.autograd.grad((out * weights).sum(), x) for out in (bn(x), expected))
    assert torch.allclose(ours, theirs, atol=1e-5)
    plain.load_state_dict(bn[0].state_dict())
    assert torch.allclose(bn.eval()(x), plain.eval()(x))


def test_image_n_is_in_group_n_mod_splits():
    torch.manual_seed(0)
    model, x = moco.MoCo(config()), torch.rand(8, 3, 16, 16)
    model.split_batch_norm(4)
    q, _ = model(x, x)
    parts = moco.MoCo(config())
    parts.load_state_dict(model.state_dict())
    expected = torch.stack([parts.embed(x[i::4]) for i in range(4)], 1).flatten(0, 1)
    assert torch.allclose(q, expected, atol=1e-5)


@pytest.mark.parametrize("mechanism, shuffle", [("queue", True), ("queue", False), ("end-to-end", True)])
def test_keys_meet_other_images_than_their_queries_and_come_back_in_order(mechanism, shuffle, tmp_path, monkeypatch):
    """The network's outputs are replaced by the mean of each image, which tells which row is which."""
    fed, losses = [], []

    def means(model, x_q, x_k):
        fed.append((x_q.mean((1, 2, 3)), x_k.mean((1, 2, 3))))
        q, k = (x.mean((1, 2, 3))[:, None] * torch.ones(16) for x in (x_q, x_k))
        return q + 0 * model.embed(x_q), k + 0 * model.embed(x_k) if mechanism == "end-to-end" else k

    monkeypatch.setattr(moco.MoCo, "forward", means)
    monkeypatch.setattr(moco, "augment", lambda x, config: x)
    monkeypatch.setattr(moco, "info_nce", lambda q, k, *rest: losses.append((q, k)) or (q - k).square().mean())
    given = {"crop_min_scale": 1.0, "shuffle_bn": shuffle, "loss_backend": "naive", "bn_splits": 4}
    flat = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 3, 16, 16)  # any crop is the picture
    train(moco, tmp_path, flat, **SMALL | given, mechanism=mechanism)
    (x_q, x_k), (q, k) = fed[0], losses[0]
    assert torch.allclose(q, k, atol=1e-4) and torch.allclose(x_q.sort().values, x_k.sort().values, atol=1e-5)
    assert torch.allclose(x_q, x_k) != shuffle


# --------------------------------------------------------------------------------------------------- memory bank


def test_the_bank_draws_every_image_but_the_given_ones():
    torch.manual_seed(0)
    bank = moco.MemoryBank(9, 3)
    for index in ([0], [8], [3, 1, 8], [0, 1, 2, 3, 4, 5, 6, 7]):
        drawn = bank.sample(torch.tensor(index), 2000)
        rows = {int((bank.vectors == row).all(1).nonzero()) for row in drawn.unique(dim=0)}
        assert len(drawn) == 2000 and rows == set(range(9)) - set(index)
        counts = drawn.unique(dim=0, return_counts=True)[1]
        assert counts.max() < 1.4 * 2000 / len(rows)  # evenly


def test_the_bank_moves_the_vectors_of_the_batch_only():
    torch.manual_seed(0)
    bank = moco.MemoryBank(6, 4)
    old, q = bank.vectors.clone(), torch.randn(2, 4, requires_grad=True)
    bank.update(torch.tensor([4, 1]), q, 0.8)
    mean = F.normalize(0.8 * old[[4, 1]] + 0.2 * F.normalize(q.detach(), dim=1), dim=1)
    assert torch.allclose(bank.vectors[[4, 1]], mean) and not bank.vectors.requires_grad
    assert torch.equal(bank.vectors[[0, 2, 3, 5]], old[[0, 2, 3, 5]])


# ------------------------------------------------------------------------------------------- versions and recipe


V2 = dict(
    epochs=200, batch_size=256, lr=0.03, weight_decay=1e-4, warmup_epochs=0.0,
    mechanism="queue", symmetric=False, momentum=0.999, queue_size=65536, temperature=0.2,
    bn_splits=8, shuffle_bn=True, projection_head="mlp", hidden_dim=0, projection_dim=128,
    augmentation="v2", crop_min_scale=0.2, blur=0.5, schedule="cosine",
    backbone="resnet50", image_size=224, stem="imagenet",
)  # fmt: skip
V1 = V2 | {"temperature": 0.07, "projection_head": "linear", "augmentation": "v1", "blur": 0.0, "schedule": "steps"}
CIFAR = V2 | dict(
    data="cifar10", backbone="resnet18", image_size=32, stem="cifar", batch_size=512, lr=0.06,
    weight_decay=5e-4, momentum=0.99, queue_size=4096, temperature=0.1, projection_head="linear",
    crop_min_scale=0.08, blur=0.0,
)  # fmt: skip


@pytest.mark.parametrize("preset, published", [("paper", V2), ("paper-v1", V1), ("cifar", CIFAR)])
def test_presets_are_as_published(preset, published):
    c = moco.Config.preset(preset)
    assert {name: getattr(c, name) for name in published} == published


def test_the_schedules():
    c = moco.Config.preset("paper-v1")
    rates = [moco.lr_at(c, epoch * 10, 2000, 0) for epoch in (0, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    c = moco.Config()
    assert [moco.lr_at(c, s, 100, 0) for s in (0, 50)] == pytest.approx([0.03, 0.015]) and moco.lr_at(c, 99, 100, 0) > 0


@pytest.mark.parametrize(
    "schedule, shares", [("cosine", WARM_UP_AND_COSINE), ("steps", [1 / 3, 2 / 3, 1, 1, 0.1, 0.01])]
)
def test_the_schedule_and_the_crops(schedule, shares, tmp_path, monkeypatch, capsys):
    given = SMALL | {"lr": 0.3, "schedule": schedule, "symmetric": True, "loss_backend": "naive"}
    rates, logged = follows_the_schedule(moco, given, tmp_path, monkeypatch)
    assert rates == [pytest.approx([0.3 * share]) for share in shares]
    assert all(z.shape == (64, 16) for z, _, _ in logged)
    optimizer = saved(tmp_path, "optimizer")["param_groups"][0]
    assert optimizer["momentum"] == 0.9 and not optimizer["nesterov"]
    out = capsys.readouterr().out
    assert "peak lr 0.3" in out and f"a guess has the loss {2 * math.log(91):.3f}" in out
    assert "the sum of both directions; queue; BN over groups of 32 images, keys shuffled" in out


def test_what_is_watched_is_q(tmp_path, monkeypatch):
    seen, logged, forward = [], [], moco.MoCo.forward
    monkeypatch.setattr(moco.MoCo, "forward", lambda self, *x: seen.append(forward(self, *x)) or seen[-1])
    at_each_step(monkeypatch, lambda run, z, *_: logged.append(z))
    train(moco, tmp_path, **SMALL, symmetric=True)
    assert len(logged) == 3 and all(torch.equal(z, q) for z, (q, _) in zip(logged, seen[::2], strict=True))


def test_heads_are_the_papers():
    mlp = moco.MoCo(config(projection_head="mlp", hidden_dim=0)).projector
    assert [type(m).__name__ for m in mlp] == ["Linear", "ReLU", "Linear"]  # no BN
    assert mlp[0].out_features == 128 and mlp[0].bias is not None and mlp[2].bias is not None
    assert moco.MoCo(config(projection_head="mlp", hidden_dim=33)).projector[0].out_features == 33
    model = moco.MoCo(config(backbone="resnet18", projection_head="linear", projection_dim=17))
    assert isinstance(model.projector, nn.Linear) and model.projector.bias is not None
    assert model.projector.out_features == model.dim == 17
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(p.requires_grad for p in model.key_encoder.parameters())


def test_the_views_are_those_of_their_version(monkeypatch):
    assert recipe(moco, monkeypatch, moco.Config()) == [
        ("color_jitter", 0.8, 0.4, 0.4, 0.4, 0.1), ("grey", 0.2), ("gaussian_blur", 0.5), ("hflip", 0.5)
    ]  # fmt: skip
    asked, jitter = [], moco.color_jitter
    monkeypatch.setattr(moco, "sometimes", lambda x, p, op: asked.append((op.__name__, p)) or x)
    monkeypatch.setattr(moco, "color_jitter", lambda x, *s: asked.append(("color_jitter", *s)) or jitter(x, *s))
    out = moco.augment(torch.rand(64, 3, 8, 8), moco.Config.preset("paper-v1"))
    assert asked == [("grey", 0.2), ("color_jitter", 0.4, 0.4, 0.4, 0.4), ("gaussian_blur", 0.0), ("hflip", 0.5)]
    assert out.min() < -1  # as torchvision's weights are fed


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("flags", [
    {"augmentation": "v1", "schedule": "steps", "projection_head": "mlp"}, {"mechanism": "end-to-end"},
    {"mechanism": "memory-bank", "amp": "bf16"},
    {"queue_size": 50, "loss_backend": "blocked", "amp": "bf16", "blur": 0.5},
], ids=lambda f: "-".join(map(str, f.values())))  # fmt: skip
def test_options_run_and_load_back(flags, tmp_path):
    metrics = train(moco, tmp_path, **SMALL | flags)
    assert math.isfinite(metrics["loss"])
    c, model = common.load_run(tmp_path)
    assert {name: getattr(c, name) for name in flags} == flags
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in backbone.items())


def test_a_run_learns_to_tell_images_from_the_queue(tmp_path, monkeypatch):
    """The loss first rises, as keys of the network's own displace the random ones, and then falls: crops of noise."""
    monkeypatch.setattr(moco, "augment", lambda x, c: moco.normalize(x))
    noise = torch.randint(256, (200, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = {"epochs": 6, "batch_size": 32, "queue_size": 96, "crop_min_scale": 0.9, "lr": 0.06, "temperature": 0.1}
    given |= {"momentum": 0.99, "projection_dim": 64}
    train(moco, tmp_path, noise.repeat_interleave(4, 2).repeat_interleave(4, 3), **SMALL | given)
    loss = [row["loss"] for row in saved(tmp_path, "rows")]
    assert loss[-1] < loss[1] / 2 and loss[0] < loss[1] < math.log(96 + 1)


@pytest.mark.parametrize("mechanism", ["queue", "end-to-end", "memory-bank"])
def test_pieces(mechanism, tmp_path):
    trains_in_pieces(moco, SMALL | {"mechanism": mechanism, "bn_splits": 1}, tmp_path)


def test_each_piece_has_its_groups_and_keys_are_shuffled_over_the_batch(tmp_path, capsys):
    train(moco, tmp_path, **SMALL, batch_size=32, micro_batch_size=16)
    assert "BN over groups of 8 images, keys shuffled" in capsys.readouterr().out


@pytest.mark.parametrize("mechanism", ["queue", "memory-bank"])
def test_an_interrupted_run_resumes_bit_for_bit(mechanism, tmp_path, monkeypatch):
    """Queue, pointer, key encoder, memory bank and optimizer end where a whole run ends."""
    given = SMALL | {"mechanism": mechanism}
    whole, resumed = resumes_bit_for_bit(moco, given, tmp_path, monkeypatch)
    assert whole["loss"] == resumed["loss"]
    if mechanism == "queue":
        assert saved(tmp_path / "cut", "queue")["pointer"] == 18 * 32 % 90
        assert any(name.startswith("key_encoder.") for name in saved(tmp_path / "cut"))
    else:
        assert saved(tmp_path / "cut", "bank")["vectors"].shape == (200, 16)


@pytest.mark.parametrize("flags, words", [
    (["--queue-size", 300], "--queue-size 300: give at most 200"),
    (["--bn-splits", 3], "--batch-size 64 --bn-splits 3: give --batch-size % --bn-splits == 0"),
    (["--micro-batch-size", 2], "--bn-splits 2: give 2 * --bn-splits <= 2"),
    (["--mechanism", "memory-bank", "--symmetric"], "--symmetric: not with memory-bank; leave it out"),
    (["--mechanism", "memory-bank", "--batch-size", 200], "--batch-size 200: give less than 200"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_what_cannot_work_is_one_line(flags, words, tmp_path, capsys):
    assert words in refusal(moco, ["--batch-size", 64, *flags], tmp_path, capsys)


@pytest.mark.parametrize("mechanism, shuffled", [("end-to-end", True), ("memory-bank", False)])
def test_the_header_names_what_runs(mechanism, shuffled, tmp_path, capsys):
    """A memory bank's keys are not encoded, so they are not shuffled."""
    train(moco, tmp_path, **SMALL, mechanism=mechanism)
    out = capsys.readouterr().out
    assert f"{mechanism}; BN over groups of 32 images" in out and ("keys shuffled" in out) == shuffled
