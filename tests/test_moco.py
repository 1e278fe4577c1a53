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
    equal,
    follows_the_schedule,
    moved_by,
    one_step,
    recipe,
    resumes_bit_for_bit,
    saved,
    trains_in_pieces,
)

SMALL = {"image_size": 16, "projection_dim": 16, "queue_size": 90, "bn_splits": 2, "momentum": 0.9}
TINY = SMALL | {"epochs": 1, "batch_size": 64, "knn_every": 0, "warmup_epochs": 0.0}


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
    assert torch.allclose(moco.info_nce_in_batch(q, k, 0.2), torch.stack(others).mean(), rtol=1e-12)


def test_no_gradient_reaches_keys_or_queue_but_end_to_end_reaches_its_keys():
    torch.manual_seed(0)
    q, k, queue = (torch.randn(n, 5, requires_grad=True) for n in (4, 4, 7))
    moco.info_nce(q, k, queue).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None and queue.grad is None
    moco.info_nce_in_batch(q, k).backward()
    assert k.grad.abs().sum() > 0


# -------------------------------------------------------------------------------------------------------- a step


def by_hand(start, negatives, x_q, x_k, tau=0.3, mechanism="queue"):
    """Equation 1 of figure 2's three dictionaries, written out, with the keys that follow from it."""
    model = start["model"]
    q, k = (F.normalize(model.projector(model.backbone(x)), dim=1) for x in (x_q, x_k))
    if mechanism == "queue":
        k, negatives = F.normalize(model.key_encoder(x_k), dim=1).detach(), model.queue
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
        {"mechanism": "end-to-end"},  # here the gradient reaches the keys' encoder
        {"mechanism": "end-to-end", "symmetric": True},
        {"mechanism": "memory-bank", "loss_backend": "naive"},
        {"mechanism": "memory-bank", "loss_backend": "blocked"},
    ],
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_a_step_is_sgd_on_equation_1(flags, few_shapes, tmp_path, monkeypatch):
    """Of the method's file or of kernels/, with weight decay on everything; then the keys go into the dictionary."""
    used, drawn, fused, sample = [], [], kernels.info_nce, moco.MemoryBank.sample
    monkeypatch.setattr(kernels, "info_nce", lambda *a, **k: used.append(k["backend"]) or fused(*a, **k))
    monkeypatch.setattr(moco.MemoryBank, "sample", lambda *a: drawn.append(sample(*a)) or drawn[-1])
    mechanism, symmetric = flags.get("mechanism", "queue"), flags.get("symmetric", False)
    n = 150 if mechanism == "memory-bank" else 200  # a bank needs images that are not in the batch
    given = {"batch_size": n, "lr": 0.3, "temperature": 0.3, "bn_splits": 1, "queue_size": 450, "bank_momentum": 0.8}
    given["shuffle_bn"] = False  # one group: another order of its rows is other rounding alone
    metrics, start, views = one_step(moco, SMALL | given | flags, tmp_path, monkeypatch)
    assert used == ["blocked"] * (1 + symmetric) * (flags.get("loss_backend") == "blocked")
    bank = copy_of(start["bank"].vectors) if drawn else None
    queue = copy_of(start["model"].queue) if mechanism == "queue" else None

    loss, q, k = by_hand(start, *drawn or [None], *views, mechanism=mechanism)
    keys = [k]
    if symmetric:
        other, _, other_k = by_hand(start, None, *views[::-1], mechanism=mechanism)
        loss, keys = loss + other, [other_k, k]
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    after = saved(tmp_path)
    moved_by(loss, start["model"], after, 0.3, lambda p: 0.1)

    if mechanism == "queue":
        rows = len(keys) * n
        assert after["pointer"] == rows and torch.equal(after["queue"][rows:], queue[rows:])
        assert torch.allclose(after["queue"][:rows], torch.cat(keys), atol=1e-5)
    if mechanism == "memory-bank":
        assert drawn[0].shape == (450, 16)
        bank[start["index"]] = F.normalize(0.8 * bank[start["index"]] + 0.2 * q.detach(), dim=1)
        assert torch.allclose(saved(tmp_path, "bank")["vectors"], bank, atol=1e-5)


def copy_of(x):
    return x.detach().clone()


# ------------------------------------------------------------------------------------------- queue and encoders


@pytest.mark.parametrize("size, batches", [(10, [4, 4, 4, 4]), (7, [3] * 9), (5, [8, 8, 3, 12]), (6, [4, 4, 1, 4, 2])])
def test_the_queue_is_a_fifo(size, batches):
    """K not a multiple of N, N > K, a short last batch: the same keys in the same order as a deque."""
    torch.manual_seed(0)
    model = moco.MoCo(config(queue_size=size, projection_dim=4))
    expected = collections.deque(model.queue.clone(), maxlen=size)
    assert model.queue.shape == (size, 4) and torch.allclose(model.queue.norm(dim=1), torch.ones(size))
    for n in batches:
        k = F.normalize(torch.randn(n, 4), dim=1)
        model.enqueue(3 * k)
        expected.extend(k)
        oldest_first = model.queue.roll(-int(model.pointer), 0)
        assert torch.allclose(oldest_first, torch.stack(list(expected)), atol=1e-6)
    assert model.queue.is_contiguous() and 0 <= model.pointer < size


@pytest.mark.parametrize("m", [0.0, 0.9, 0.999, 1.0])
def test_the_key_encoder_moves_by_equation_2_on_parameters_only(m):
    torch.manual_seed(0)
    model = moco.MoCo(config(momentum=m)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        for b in model.backbone.buffers():
            b.add_(1)
    query = nn.Sequential(model.backbone, model.projector).state_dict()
    before = {name: p.clone() for name, p in model.key_encoder.state_dict().items()}
    model.update_key_encoder()
    parameters = dict(model.key_encoder.named_parameters())
    assert set(parameters) <= set(query)
    for name, value in model.key_encoder.state_dict().items():
        if name in parameters:
            assert torch.allclose(value, m * before[name] + (1 - m) * query[name], rtol=1e-12, atol=1e-14), name
            assert (m == 0) == torch.equal(value, query[name])
        else:
            assert torch.equal(value, before[name]), name  # buffers are the key network's own


@pytest.mark.parametrize("given", [{}, {"symmetric": True}, {"momentum": 0.0}, {"momentum": 1.0}], ids=str)
def test_the_key_encoder_moves_before_the_keys_and_they_are_queued_after_the_step(
    given, few_shapes, tmp_path, monkeypatch
):
    """Over three steps: f_k, in train mode and without a gradient, has moved once toward the f_q of this step."""
    m, ks, expected, encode, enqueue = given.get("momentum", 0.9), [], [], moco.encode, moco.MoCo.enqueue
    losses, step, events = moco.info_nce, torch.optim.SGD.step, []

    def spy(network, x, c, shuffle=False):
        key = not next(network.parameters()).requires_grad
        assert network[0].training and network[1].training and torch.is_grad_enabled() != key
        events.append("k" if key else "q")
        if key:
            ks.append([copy_of(p) for p in network.parameters()])
        else:
            expected.append([copy_of(p) for p in network.parameters()])
        return encode(network, x, c, shuffle)

    monkeypatch.setattr(moco, "encode", spy)
    monkeypatch.setattr(moco, "info_nce", lambda *a: events.append("loss") or losses(*a))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: events.append("step") or step(*a, **k))
    monkeypatch.setattr(moco.MoCo, "enqueue", lambda self, k: events.append(len(k)) or enqueue(self, k))
    moco.train(config(**TINY | given, loss_backend="naive", out=str(tmp_path)))
    passes = 1 + given.get("symmetric", False)
    assert events == 3 * (passes * ["q", "k", "loss"] + ["step", passes * 64])
    theta_k = expected[0]  # f_k starts as f_q
    for step in range(0, 3 * passes, passes):
        theta_k = [m * old + (1 - m) * new for old, new in zip(theta_k, expected[step], strict=True)]
        for found in ks[step : step + passes]:
            assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, theta_k, strict=True))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(expected[0], expected[-1], strict=True))  # f_q moved


def test_the_key_network_has_statistics_of_its_own(few_shapes, tmp_path):
    moco.train(config(**TINY, out=str(tmp_path)))
    ours, theirs = (saved(tmp_path)[prefix + "bn1.running_mean"] for prefix in ("backbone.", "key_encoder.0."))
    assert theirs.abs().sum() > 0 and not torch.equal(ours, theirs)


# -------------------------------------------------------------------------------------------------- shuffling BN


class PerRow(nn.Module):
    """Without BN: row by row."""

    def forward(self, x):
        return x.flatten(1)[:, :4] * 2 + 1


class GroupMean(nn.Module):
    """What BN can betray: who was in the group."""

    def forward(self, x):
        return x.flatten(1).mean(0, keepdim=True).expand(len(x), -1)


@pytest.mark.parametrize("n, splits", [(16, 4), (13, 4), (7, 3)])
def test_shuffling_is_undone_exactly(n, splits):
    torch.manual_seed(0)
    x, c = torch.rand(n, 3, 2, 2), config(bn_splits=splits)
    for shuffle in (False, True):
        assert torch.equal(moco.encode(PerRow(), x, c, shuffle), PerRow()(x))


def test_groups_have_statistics_of_their_own_and_shuffling_mixes_them():
    torch.manual_seed(0)
    x, c = torch.rand(16, 3, 2, 2), config(bn_splits=4)
    plain = moco.encode(GroupMean(), x, c)
    assert torch.allclose(plain, torch.cat([GroupMean()(part) for part in x.split(4)]))
    shuffled = moco.encode(GroupMean(), x, c, shuffle=True)
    assert len(shuffled.unique(dim=0)) == 4  # four groups again, but not of neighbours
    assert not any(torch.equal(part[0], part[1]) and torch.equal(part[1], part[2]) for part in shuffled.split(4))
    assert torch.equal(moco.encode(GroupMean(), x, config(bn_splits=1)), GroupMean()(x))


@pytest.mark.parametrize("mechanism", ["queue", "end-to-end", "memory-bank"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_only_keys_are_shuffled(mechanism, shuffle, monkeypatch):
    asked = []
    monkeypatch.setattr(moco, "encode", lambda network, x, c, s=False: asked.append(s) or x.flatten(1))
    model = moco.MoCo(config(mechanism=mechanism, shuffle_bn=shuffle))
    model(*torch.rand(2, 4, 3, 2, 2))
    assert asked == ([False] if mechanism == "memory-bank" else [False, shuffle])


def test_running_statistics_move_as_far_as_those_of_one_bn():
    torch.manual_seed(0)
    x = torch.rand(32, 3, 32, 32).repeat(2, 1, 1, 1)  # two groups of the same pictures
    means = []
    for splits in (1, 2):
        torch.manual_seed(1)
        c = config(bn_splits=splits)
        model = moco.MoCo(c)
        for _ in range(3):
            moco.encode(model.backbone, x, c)
        means.append(model.backbone.bn1.running_mean)
    assert torch.allclose(*means, rtol=0.05)


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


V2 = {
    **{"epochs": 200, "batch_size": 256, "lr": 0.03, "weight_decay": 1e-4, "warmup_epochs": 0.0},
    **{"mechanism": "queue", "symmetric": False, "momentum": 0.999, "queue_size": 65536, "temperature": 0.2},
    **{"bn_splits": 8, "shuffle_bn": True, "projection_head": "mlp", "hidden_dim": 0, "projection_dim": 128},
    **{"augmentation": "v2", "crop_min_scale": 0.2, "blur": 0.5, "schedule": "cosine"},
    **{"backbone": "resnet50", "image_size": 224, "stem": "imagenet"},
}
V1 = V2 | {"temperature": 0.07, "projection_head": "linear", "augmentation": "v1", "blur": 0.0, "schedule": "steps"}
CIFAR = V2 | {
    **{"data": "cifar10", "backbone": "resnet18", "image_size": 32, "stem": "cifar", "batch_size": 512, "lr": 0.06},
    **{"weight_decay": 5e-4, "momentum": 0.99, "queue_size": 4096, "temperature": 0.1, "projection_head": "linear"},
    **{"crop_min_scale": 0.08, "blur": 0.0},
}


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
def test_the_schedule_and_the_crops(schedule, shares, few_shapes, tmp_path, monkeypatch, capsys):
    given = SMALL | {"lr": 0.3, "schedule": schedule, "symmetric": True, "loss_backend": "naive"}
    rates, logged = follows_the_schedule(moco, given, tmp_path, monkeypatch)
    assert rates == [pytest.approx([0.3 * share]) for share in shares]
    assert all(z.shape == (64, 16) for z, _, _ in logged)
    optimizer = saved(tmp_path, "optimizer")["param_groups"][0]
    assert optimizer["momentum"] == 0.9 and not optimizer["nesterov"]
    out = " ".join(capsys.readouterr().out.split())
    assert f"sgd, peak lr 0.3 (not scaled by N), {schedule}" in out
    assert "info_nce, naive; mean over N = 64 queries; the sum of both directions" in out
    assert "queue; BN statistics over groups of 32 images, keys shuffled" in out


def test_what_is_watched_is_q(few_shapes, tmp_path, monkeypatch):
    seen, logged, forward, log = [], [], moco.MoCo.forward, common.Run.log
    monkeypatch.setattr(moco.MoCo, "forward", lambda self, *x: seen.append(forward(self, *x)) or seen[-1])
    monkeypatch.setattr(common.Run, "log", lambda run, loss, z, *x: logged.append(z) or log(run, loss, z, *x))
    moco.train(config(**TINY, symmetric=True, out=str(tmp_path)))
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
        ("color_jitter", 0.8, 0.4, 0.4, 0.4, 0.1), ("grey", 0.2), ("gaussian_blur", 0.5), ("flip", 0.5)
    ]  # fmt: skip
    asked, jitter = [], moco.color_jitter
    monkeypatch.setattr(moco, "sometimes", lambda x, p, op: asked.append((op.__name__, p)) or x)
    monkeypatch.setattr(moco, "color_jitter", lambda x, *s: asked.append(("color_jitter", *s)) or jitter(x, *s))
    out = moco.augment(torch.rand(64, 3, 8, 8), moco.Config.preset("paper-v1"))
    assert asked == [("grey", 0.2), ("color_jitter", 0.4, 0.4, 0.4, 0.4), ("gaussian_blur", 0.0), ("flip", 0.5)]
    assert out.min() < -1  # as torchvision's weights are fed


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "flags",
    [
        {"augmentation": "v1", "schedule": "steps", "projection_head": "mlp"},
        {"mechanism": "end-to-end"},
        {"mechanism": "memory-bank", "amp": "bf16"},
        {"queue_size": 50, "loss_backend": "blocked", "amp": "bf16", "blur": 0.5},
    ],
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_options_run_and_load_back(flags, few_shapes, tmp_path):
    metrics = moco.train(config(**TINY | flags, out=str(tmp_path)))
    assert math.isfinite(metrics["loss"])
    c, model = common.load_run(tmp_path)
    assert {name: getattr(c, name) for name in flags} == flags
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in backbone.items())


def test_a_run_learns_to_tell_images_from_the_queue(tmp_path, monkeypatch):
    """The loss first rises, as keys of the network's own displace the random ones, and then falls: crops of noise."""
    loss, end_epoch = [], common.Run.end_epoch
    monkeypatch.setattr(common.Run, "end_epoch", lambda run: (end_epoch(run), loss.append(run.progress["rows"][-1][1])))
    monkeypatch.setattr(moco, "augment", lambda x, c: moco.normalize(x))
    noise = torch.randint(256, (200, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = {"epochs": 6, "batch_size": 32, "queue_size": 96, "crop_min_scale": 0.9, "lr": 0.06, "temperature": 0.1}
    given |= {"momentum": 0.99, "projection_dim": 64}
    moco.train(config(**TINY | given, out=str(tmp_path)), data=noise.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert loss[-1] < loss[1] / 2 and loss[0] < loss[1] < math.log(96 + 1)


@pytest.mark.parametrize("mechanism", ["queue", "end-to-end", "memory-bank"])
def test_pieces(mechanism, few_shapes, tmp_path):
    trains_in_pieces(moco, SMALL | {"mechanism": mechanism}, tmp_path)


def test_pieces_are_bn_groups_whose_keys_are_shuffled(few_shapes, tmp_path, capsys):
    given = TINY | {"batch_size": 32, "bn_splits": 1}
    moco.train(config(**given, micro_batch_size=8, out=str(tmp_path / "pieces")))
    said = " ".join(capsys.readouterr().out.split())
    assert "BN statistics over groups of 8 images, keys shuffled" in said and "--bn-splits 1 becomes 4" in said
    moco.train(config(**given | {"bn_splits": 4}, out=str(tmp_path / "groups")))
    assert equal(saved(tmp_path / "pieces"), saved(tmp_path / "groups"))


@pytest.mark.parametrize("mechanism", ["queue", "memory-bank"])
def test_an_interrupted_run_resumes_bit_for_bit(mechanism, few_shapes, tmp_path, monkeypatch):
    """Queue, pointer, key encoder, memory bank and optimizer end where a whole run ends."""
    given = TINY | {"epochs": 3, "batch_size": 32, "mechanism": mechanism}
    whole, resumed = resumes_bit_for_bit(moco, given, tmp_path, monkeypatch)
    assert whole["loss"] == resumed["loss"]
    if mechanism == "queue":
        state = saved(tmp_path / "cut")
        assert state["pointer"] == 18 * 32 % 90 and any(name.startswith("key_encoder.") for name in state)
    else:
        assert saved(tmp_path / "cut", "bank")["vectors"].shape == (200, 16)


def test_a_lowered_batch_lowers_a_presets_groups(tmp_path, capsys):
    given = {"image_size": 16, "backbone": "resnet8", "epochs": 1, "out": str(tmp_path)}
    moco.train(moco.Config.preset("paper", **given), data=torch.randint(256, (10, 3, 16, 16), dtype=torch.uint8))
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "--batch-size 256 becomes 10, --lr 0.03 becomes 0.00117187" in out
        and "--bn-splits 8 becomes 1" in out
        and "BN statistics over groups of 10 images" in out
    )
    assert "--queue-size 65536 becomes 8" in out


@pytest.mark.parametrize(
    "mechanism, runs, shuffled", [("end-to-end", "naive", True), ("memory-bank", "blocked", False)]
)
def test_the_header_names_what_runs(mechanism, runs, shuffled, few_shapes, tmp_path, capsys):
    """end-to-end has this file's loss alone, whatever K is; a memory bank's keys are not encoded, so not shuffled."""
    moco.train(config(**TINY | {"queue_size": 65536}, mechanism=mechanism, out=str(tmp_path)))
    out = " ".join(capsys.readouterr().out.split())
    assert f"info_nce, {runs}; mean" in out and f"{mechanism}; BN statistics over groups of 32 images" in out
    assert ("keys shuffled" in out) == shuffled
