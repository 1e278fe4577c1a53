"""The queue, the momentum encoder, the three mechanisms, shuffling BN, and whole runs."""

import collections
import csv
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import linear_eval
import moco
from tests.helpers import equal, refusal, resumes_bit_for_bit, saved, trains_in_pieces


def config(**given):
    return moco.Config(**moco.Config.PRESETS["demo"] | {"preset": "demo", "hidden_dim": 32} | given)


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
    # the loss sees directions only: any norm of q gives the same value
    assert torch.allclose(moco.info_nce(3 * q, 5 * keys, 0.1 * queue, tau), ours, rtol=1e-12)


def test_info_nce_closed_forms():
    same = torch.ones(4, 3, dtype=torch.float64)
    assert math.isclose(moco.info_nce(same, same, same.repeat(5, 1), 0.2).item(), math.log(21))
    eye = torch.eye(8, dtype=torch.float64)  # positives at cosine 1, the queue's keys at 0
    assert math.isclose(moco.info_nce(eye[:3], eye[:3], eye[3:], 0.5).item(), math.log(math.exp(2) + 5) - 2)


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


@pytest.mark.parametrize("mechanism", ["queue", "end-to-end"])
@pytest.mark.parametrize("n, k", [(1, 3), (8, 8), (33, 700)])
def test_naive_and_fused_losses_agree(mechanism, n, k):
    pytest.importorskip("kernels")
    torch.manual_seed(0)
    given = (n, 20) if mechanism == "end-to-end" else (k, 20)
    start = [torch.randn(n, 20, dtype=torch.float64), torch.randn(n, 20, dtype=torch.float64)]
    start += [torch.randn(given, dtype=torch.float64)] if mechanism == "queue" else []
    found = []
    for backend in ("naive", "blocked"):
        c = config(mechanism=mechanism, batch_size=max(n, 2), queue_size=k, loss_backend=backend, temperature=0.1)
        inputs = [x.clone().requires_grad_() for x in start]
        loss_of, name = moco.choose_loss(c, torch.device("cpu"))
        assert name == backend
        loss = loss_of(*inputs)
        loss.backward()
        found.append([loss.detach(), *(torch.zeros(()) if x.grad is None else x.grad for x in inputs)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)


# ------------------------------------------------------------------------------------------- queue and encoders


@pytest.mark.parametrize("size, batches", [(10, [4, 4, 4, 4]), (7, [3] * 9), (5, [8, 8, 3, 12]), (6, [4, 4, 1, 4, 2])])
def test_the_queue_is_a_fifo(size, batches):
    """K not a multiple of N, N > K, a short last batch: the same keys in the same order as a deque."""
    torch.manual_seed(0)
    model = moco.MoCo(config(queue_size=size, projection_dim=4))
    expected = collections.deque(model.queue.clone(), maxlen=size)
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
    query = {**prefixed(model.backbone, "0."), **prefixed(model.projector, "1.")}
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


def prefixed(module, prefix):
    return {prefix + name: value for name, value in module.state_dict().items()}


def test_the_order_of_a_step(few_shapes, tmp_path, monkeypatch):
    """The key encoder moves before it encodes, in train mode; keys enter the queue after the loss, once a step."""
    events = []

    def spy(owner, name, note=lambda *a: None):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (events.append((name, note(*a))), original(*a, **k))[1])

    spy(moco.MoCo, "update_key_encoder")
    spy(moco.MoCo, "enqueue", lambda model, k: len(k))
    spy(moco, "encode", lambda network, *rest: (type(network).__name__, network.training, torch.is_grad_enabled()))
    spy(moco, "info_nce")
    moco.train(config(epochs=1, batch_size=64, knn_every=0, loss_backend="naive", out=str(tmp_path)))
    assert len(events) == 3 * 5  # 200 images: three steps of five events
    for step in (events[:5], events[5:10], events[10:]):
        assert step == [
            ("update_key_encoder", None),
            ("encode", ("MoCo", True, True)),
            ("encode", ("Sequential", True, False)),
            ("info_nce", None),
            ("enqueue", 64),
        ]


def test_a_symmetric_step_is_both_directions_with_one_update(few_shapes, tmp_path, monkeypatch):
    seen, updates = [], []
    original, update = moco.contrast, moco.MoCo.update_key_encoder

    def spy(model, bank, x_q, x_k, *rest):
        out = original(model, bank, x_q, x_k, *rest)
        seen.append((x_q, x_k, out, model.queue.clone()))
        return out

    monkeypatch.setattr(moco, "contrast", spy)
    monkeypatch.setattr(moco.MoCo, "update_key_encoder", lambda self: (updates.append(1), update(self)))
    c = config(epochs=1, batch_size=200, queue_size=450, knn_every=0, symmetric=True, bn_splits=1, out=str(tmp_path))
    metrics = moco.train(c)
    (a, b, first, queue), (b2, a2, second, same_queue) = seen
    assert len(updates) == 1 and torch.equal(queue, same_queue)
    assert torch.equal(a, a2) and torch.equal(b, b2) and not torch.equal(a, b)
    assert math.isclose(metrics["loss"], float(first[0].detach() + second[0].detach()), rel_tol=1e-6)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert saved["pointer"] == 400
    assert torch.allclose(saved["queue"][:400], F.normalize(torch.cat([second[2], first[2]]), dim=1), atol=1e-6)


def test_the_key_network_has_statistics_of_its_own(few_shapes, tmp_path):
    torch.manual_seed(0)
    model = moco.MoCo(config())
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.parameters(), model.key_encoder[0].parameters()))  # noqa: B905
    assert not any(p.requires_grad for p in model.key_encoder.parameters())
    moco.train(config(epochs=1, batch_size=64, knn_every=0, out=str(tmp_path)))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    ours, theirs = (state[prefix + "bn1.running_mean"] for prefix in ("backbone.", "key_encoder.0."))
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


@pytest.mark.parametrize("given, shuffled", [({}, True), ({"shuffle_bn": False}, False), ({"bn_splits": 1}, False)])
def test_only_keys_are_shuffled(given, shuffled, monkeypatch):
    asked = []
    monkeypatch.setattr(moco, "encode", lambda network, x, c, s=False: asked.append(s) or x.flatten(1))
    x, c = torch.rand(4, 3, 2, 2), config(**given)
    for mechanism in ("queue", "end-to-end"):
        c.mechanism = mechanism
        model = moco.MoCo(config(projection_dim=12))
        moco.contrast(model, None, x, x, torch.arange(4), c, lambda *a: 0)
    assert asked == [False, shuffled] * 2


def test_running_statistics_move_as_far_as_those_of_one_bn():
    torch.manual_seed(0)
    x = torch.rand(32, 3, 32, 32).repeat(2, 1, 1, 1)  # two groups of the same pictures
    means = []
    for splits in (1, 2):
        torch.manual_seed(1)
        model = moco.MoCo(config(bn_splits=splits))
        for _ in range(3):
            moco.encode(model, x, config(bn_splits=splits))
        means.append(model.backbone.bn1.running_mean)
    assert torch.allclose(*means, rtol=0.05)


# --------------------------------------------------------------------------------------------------- memory bank


def test_the_bank_draws_every_image_but_the_given_ones():
    torch.manual_seed(0)
    bank = moco.MemoryBank(9, 3)
    for index in ([0], [8], [3, 1, 8], [0, 1, 2, 3, 4, 5, 6, 7]):
        drawn = bank.sample(torch.tensor(index), 2000)
        rows = {int((bank.vectors == row).all(1).nonzero()) for row in drawn.unique(dim=0)}
        assert rows == set(range(9)) - set(index)
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


def test_the_flag_reaches_the_bank_and_the_loss_sees_the_precision_of_amp(few_shapes, tmp_path, monkeypatch):
    seen, update, contrast = [], moco.MemoryBank.update, moco.contrast
    monkeypatch.setattr(moco.MemoryBank, "update", lambda *a: (seen.append(a[3]), update(*a))[1])

    def spy(*arguments):
        loss_of = arguments[-1]
        return contrast(*arguments[:-1], lambda q, *rest: (seen.append(q.dtype), loss_of(q, *rest))[1])

    monkeypatch.setattr(moco, "contrast", spy)
    given = {"mechanism": "memory-bank", "bank_momentum": 0.8, "amp": "bf16", "queue_size": 64, "batch_size": 100}
    moco.train(config(epochs=1, knn_every=0, out=str(tmp_path), **given))
    assert seen == [torch.bfloat16, 0.8] * 2


# ------------------------------------------------------------------------------------------- versions and recipe


def test_defaults_are_the_papers_and_versions_select_the_recipe():
    v1, v2 = moco.Config(version=1), moco.Config()
    for c in (v1, v2):
        assert (c.queue_size, c.momentum, c.lr, c.batch_size, c.epochs) == (65536, 0.999, 0.03, 256, 200)
        assert (c.weight_decay, c.projection_dim, c.crop_min_scale, c.symmetric) == (1e-4, 128, 0.2, False)
    assert (v1.temperature, v1.projection_head, v1.augment, v1.schedule) == (0.07, "linear", "v1", "steps")
    assert (v2.temperature, v2.projection_head, v2.augment, v2.schedule) == (0.2, "mlp", "v2", "cosine")
    by_hand = moco.Config(version=1, temperature=0.3, schedule="cosine")
    assert (by_hand.temperature, by_hand.schedule, by_hand.projection_head) == (0.3, "cosine", "linear")
    parse = lambda *a: common.parse_args(moco.Config, a)  # noqa: E731
    assert parse("--version", "1").temperature == 0.07 and parse("--version", "1").preset == "demo"
    cifar = parse("--data", "cifar10")
    assert (cifar.queue_size, cifar.momentum, cifar.temperature, cifar.lr) == (4096, 0.99, 0.1, 0.06)


def test_the_schedules():
    c = moco.Config(version=1, epochs=200)
    assert [round(c.lr_at(epoch * 10, 2000, 0), 6) for epoch in (0, 119, 120, 159, 160, 199)] == [
        *[0.03, 0.03],
        *[0.003, 0.003],
        *[0.0003, 0.0003],
    ]
    v2 = moco.Config()
    assert [round(v2.lr_at(s, 100, 0), 6) for s in (0, 50)] == [0.03, 0.015] and v2.lr_at(99, 100, 0) < 1e-4
    assert moco.Config(version=1).lr_at(0, 100, 10) == pytest.approx(0.003)


def test_heads_are_the_papers():
    mlp = moco.MoCo(config(hidden_dim=0)).projector
    assert [type(m).__name__ for m in mlp] == ["Linear", "ReLU", "Linear"]  # no BN
    assert mlp[0].out_features == 128 and mlp[0].bias is not None and mlp[2].bias is not None
    linear = moco.MoCo(config(projection_head="linear", projection_dim=17)).projector
    assert isinstance(linear, nn.Linear) and linear.out_features == 17
    model = moco.MoCo(config(backbone="resnet18"))
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("version", [1, 2])
def test_augmentation_order_and_strength(version, monkeypatch):
    calls = []

    def spy(name):
        original = getattr(common, name)
        monkeypatch.setattr(common, name, lambda *a: calls.append((name, a)) or original(*a))

    for name in ("color_jitter", "to_grey", "flip", "gaussian_blur", "random_jitter"):
        spy(name)
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32)
    out = moco.augment(x.clone(), config(version=version, blur=True))
    assert out.shape == x.shape and out.min() >= -1e-6 and out.max() <= 1 + 1e-6
    names = [name for name, _ in calls]
    strength = next(a for name, a in calls if name == "random_jitter")
    if version == 1:
        assert names == ["to_grey", "random_jitter", "color_jitter", "flip"]
        assert strength == (64, 0.4, 0.4, 0.4, 0.4, 1.0)
    else:
        assert names == ["random_jitter", "color_jitter", "to_grey", "gaussian_blur", "flip"]
        assert strength == (64, 0.4, 0.4, 0.4, 0.1, 0.8)
    greys = sum(len(a[0]) for name, a in calls if name == "to_grey")
    assert 4 <= greys <= 24  # p 0.2 of 64


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "flags",
    [
        {"version": 1},
        {"mechanism": "end-to-end"},
        {"mechanism": "end-to-end", "symmetric": True, "loss_backend": "blocked"},
        {"mechanism": "memory-bank", "queue_size": 64},
        {"amp": "bf16", "blur": True},
        {"queue_size": 50, "loss_backend": "blocked"},
    ],
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_options_run_and_can_be_evaluated(flags, few_shapes, tmp_path):
    metrics = moco.train(config(epochs=1, batch_size=64, knn_every=0, out=str(tmp_path), **flags))
    assert math.isfinite(metrics["loss"])
    _, model = linear_eval.load_run(str(tmp_path))
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in backbone.items())


def test_a_run_learns_to_tell_images_from_the_queue(few_shapes, tmp_path):
    """The loss first rises, as keys of the network's own displace the random ones, and then falls below chance."""
    given = {"epochs": 20, "batch_size": 32, "queue_size": 96, "crop_min_scale": 0.8, "hidden_dim": 256}
    moco.train(config(**given, knn_every=0, out=str(tmp_path)))
    loss = [float(row["loss"]) for row in csv.DictReader((tmp_path / "log.csv").open())]
    assert loss[-1] < 0.9 * math.log(96 + 1) < loss[3]


@pytest.mark.parametrize("mechanism", ["queue", "end-to-end"])
def test_pieces(mechanism, few_shapes, tmp_path):
    trains_in_pieces(moco, config, {"mechanism": mechanism, "queue_size": 90}, tmp_path)


def test_pieces_are_bn_groups_whose_keys_are_shuffled(few_shapes, tmp_path, capsys):
    given = {"epochs": 1, "batch_size": 32, "knn_every": 0, "bn_splits": 1}
    moco.train(config(**given, micro_batch_size=8, out=str(tmp_path / "pieces")))
    assert "BN statistics over groups of 8 images, keys shuffled" in capsys.readouterr().out
    moco.train(config(**given | {"bn_splits": 4}, out=str(tmp_path / "groups")))
    assert equal(saved(tmp_path / "pieces"), saved(tmp_path / "groups"))


@pytest.mark.parametrize("mechanism", ["queue", "memory-bank"])
def test_an_interrupted_run_resumes_bit_for_bit(mechanism, few_shapes, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch; queue, pointer, key encoder, memory bank and optimizer end where a whole
    run ends."""
    given = {"epochs": 3, "batch_size": 32, "knn_every": 0, "queue_size": 90, "mechanism": mechanism}
    resumes_bit_for_bit(moco, config, given, ["bank"] * (mechanism == "memory-bank"), tmp_path, monkeypatch)
    if mechanism == "queue":
        whole = saved(tmp_path / "whole")
        assert whole["pointer"] == 18 * 32 % 90
        assert any(name.startswith("key_encoder.") for name in whole)


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--queue-size", "0"], "--queue-size"),
        (["--momentum", "1.5"], "--momentum"),
        (["--temperature", "-1"], "--temperature"),
        (["--version", "3"], "--version"),
        (["--mechanism", "list"], "--mechanism"),
        (["--bn-splits", "100"], "--bn-splits"),
        (["--mechanism", "memory-bank", "--symmetric"], "--symmetric"),
        (["--loss-backend", "triton"], "--loss-backend"),
    ],
    ids=lambda f: "-".join(f).strip("-") if isinstance(f, list) else "",
)
def test_bad_input_is_one_line(flags, word, few_shapes, tmp_path, capsys, monkeypatch):
    if word == "--loss-backend" and torch.cuda.is_available():
        pytest.skip("triton runs here")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert word in refusal(moco, flags, tmp_path, capsys)


def test_a_lowered_batch_lowers_its_groups(few_shapes, tmp_path, capsys):
    few = common.make_shapes  # 10 images for a preset's batch of 256
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "make_shapes", lambda n, seed, size: few(500, seed, size))
        c = moco.Config(data="shapes", image_size=32, backbone="resnet8", epochs=1, queue_size=64, out=str(tmp_path))
        c.batch_size_by_hand = False
        moco.train(c)
    out = capsys.readouterr().out
    assert "batch of 256 is lowered" in out and "--bn-splits is lowered" in out
