"""The paper's losses, the baselines, the two stages, and whole runs."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import linear_eval
import simclr
import supcon
from tests.helpers import python, refusal, resumes_bit_for_bit, trains_in_pieces

FEW_SHAPES = 400


def config(**given):
    return supcon.Config(**supcon.Config.PRESETS["demo"] | {"preset": "demo"} | given)


# ------------------------------------------------------------------------------------------------------ the loss


def by_the_formula(z, labels, tau, loss):
    """Equations 2 and 3, written with loops."""
    z = [v / v.norm() for v in z]
    total, n = 0.0, len(z)
    for i in range(n):
        others = [a for a in range(n) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if not positives:
            continue
        below = sum(torch.exp(torch.dot(z[i], z[a]) / tau) for a in others)
        ratios = [torch.exp(torch.dot(z[i], z[p]) / tau) / below for p in positives]
        if loss == "out":
            total = total - sum(torch.log(r) for r in ratios) / len(positives)
        else:
            total = total - torch.log(sum(ratios) / len(positives))
    return total / n


IDS = {
    "views": [0, 1, 2, 3, 0, 1, 2, 3],  # unique labels: SimCLR's case
    "mixed": [0, 0, 1, 1, 2, 2, 2, 0],
    "singletons": [5, 0, 5, 1, 7, 5, 2, 9],
    "one class": [3] * 8,
    "odd ids": [10**12, -1, -1, 10**12, -7, -7, 4, -1],
    "pair": [1, 1],
}


@pytest.mark.parametrize("tau", [0.1, 0.7])
@pytest.mark.parametrize("loss", ["out", "in"])
@pytest.mark.parametrize("ids", IDS)
def test_sup_con_is_equation_2_and_3(ids, loss, tau):
    torch.manual_seed(0)
    labels = torch.tensor(IDS[ids])
    z = torch.randn(len(labels), 5, dtype=torch.float64, requires_grad=True)
    ours, theirs = supcon.sup_con(z, labels, tau, loss=loss), by_the_formula(z, labels, tau, loss)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    (a,), (b,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("loss", ["out", "in"])
def test_with_unique_labels_it_is_nt_xent(loss):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 9, 6, dtype=torch.float64)
    labels = torch.randperm(9).repeat(2) * 13 - 40
    ours = supcon.sup_con(torch.cat([z1, z2]), labels, 0.2, loss=loss)
    assert torch.allclose(ours, simclr.nt_xent(z1, z2, 0.2), rtol=1e-12)


@pytest.mark.parametrize("loss", ["out", "in"])
def test_only_who_shares_a_label_matters(loss):
    torch.manual_seed(0)
    z, labels = torch.randn(12, 6), torch.randint(4, (12,))
    value = supcon.sup_con(z, labels, loss=loss)
    renamed = torch.tensor([70, -3, 10**10, 0])[labels]
    assert torch.equal(value, supcon.sup_con(z, renamed, loss=loss))
    for kind in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(value, supcon.sup_con(z, labels.to(kind), loss=loss))
    strided = torch.stack([labels, labels + 9], 1)[:, 0]
    assert not strided.is_contiguous() and torch.equal(value, supcon.sup_con(z, strided, loss=loss))
    order = torch.randperm(12)  # and the order of the rows does not
    torch.testing.assert_close(value, supcon.sup_con(z[order], labels[order], loss=loss))


def test_there_is_no_third_loss():
    with pytest.raises(ValueError, match="'out' or 'in'"):
        supcon.sup_con(torch.randn(4, 3), torch.zeros(4), loss="sum")


def test_in_is_never_above_out():
    """Jensen: the log of a mean is at least the mean of the logs; equal where all positives are equally near."""
    torch.manual_seed(0)
    for classes in (1, 2, 5, 30):
        z, labels = torch.randn(40, 3, dtype=torch.float64), torch.randint(classes, (40,))
        outside, inside = (supcon.sup_con(z, labels, 0.1, loss=loss) for loss in ("out", "in"))
        assert inside < outside
    same = torch.eye(4, dtype=torch.float64).repeat_interleave(3, 0)
    labels = torch.arange(4).repeat_interleave(3)
    outside, inside = (supcon.sup_con(same, labels, 0.1, loss=loss) for loss in ("out", "in"))
    assert torch.allclose(outside, inside, rtol=1e-12)


@pytest.mark.parametrize("loss", ["out", "in"])
def test_closed_forms_and_edges(loss):
    m = 12
    same = torch.ones(m, 4, dtype=torch.float64)
    for labels in (torch.zeros(m), torch.arange(m) % 4):  # identical rows: log(M - 1) whatever the labels
        value = supcon.sup_con(same, labels.long(), 0.1, loss=loss)
        assert math.isclose(value.item(), math.log(m - 1), rel_tol=1e-12)
    for labels in (torch.arange(5), torch.zeros(1, dtype=torch.int64)):  # no anchor has a positive
        z = torch.randn(len(labels), 8, requires_grad=True)
        value = supcon.sup_con(z, labels, loss=loss)
        value.backward()
        assert value == 0 and torch.equal(z.grad, torch.zeros_like(z))
    for tau in (1e-4, 100.0):  # one class only, at any temperature
        z = torch.randn(16, 8, requires_grad=True)
        value = supcon.sup_con(z, torch.zeros(16, dtype=torch.int64), tau, loss=loss)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(z.grad).all()


def test_anchors_without_positives_count_in_the_mean_and_as_negatives():
    torch.manual_seed(0)
    z = torch.randn(5, 8, dtype=torch.float64)
    pair = supcon.sup_con(z[:2], torch.tensor([0, 0]))
    assert pair == 0  # one positive, no negative
    with_negatives = supcon.sup_con(z, torch.tensor([0, 0, 1, 2, 3]))
    s = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / 0.1
    by_hand = (s[0, 1:].logsumexp(0) - s[0, 1]) + (s[1, [0, 2, 3, 4]].logsumexp(0) - s[0, 1])
    assert torch.allclose(with_negatives, by_hand / 5)


@pytest.mark.parametrize("loss", ["out", "in"])
@pytest.mark.parametrize("backend", ["blocked", "naive"])
def test_the_fused_loss_agrees(loss, backend):
    kernels = pytest.importorskip("kernels")
    torch.manual_seed(0)
    labels = torch.randint(-3, 12, (70,))
    labels[:4] = torch.tensor([100, 200, -300, 400])
    results = []
    for function in (supcon.sup_con, lambda *a, **k: kernels.sup_con(*a, backend=backend, **k)):
        z = torch.randn(70, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        value = function(z, labels, 0.1, loss=loss)
        results.append((value, *torch.autograd.grad(value, z)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


# -------------------------------------------------------------------------------------------------- the baselines


def psi(angle, m):
    """Liu et al., equation 6, literally."""
    k = min(int(angle * m / math.pi), m - 1)
    return (-1) ** k * math.cos(m * angle) - 2 * k


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_large_margin_is_the_published_formula(m, lam):
    torch.manual_seed(m)
    h, w, labels = torch.randn(30, 6).double(), torch.randn(4, 6).double(), torch.randint(4, (30,))
    h[0], h[1] = w[labels[0]], -2 * w[labels[1]]  # angles 0 and pi
    logits = supcon.large_margin(h, w, labels, m, lam)
    for i, y in enumerate(labels):
        for c in range(4):
            norm = (h[i].norm() * w[c].norm()).item()
            cos = max(-1.0, min(1.0, torch.dot(h[i], w[c]).item() / norm))
            value = norm * cos
            if c == y:
                value = norm * (lam * cos + psi(math.acos(cos), m)) / (1 + lam)
            assert math.isclose(logits[i, c].item(), value, rel_tol=1e-6, abs_tol=1e-6)


def test_large_margin_falls_with_the_angle_and_has_a_gradient():
    angle = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    h = torch.stack([angle.cos(), angle.sin()], 1).requires_grad_()
    logits = supcon.large_margin(h, torch.eye(2).double(), torch.zeros(200, dtype=torch.int64), 4, 0.0)
    assert (logits[1:, 0] < logits[:-1, 0]).all() and (logits[:, 0] <= angle.cos() + 1e-12).all()
    logits[:, 0].sum().backward()
    assert torch.isfinite(h.grad).all()
    w = torch.randn(3, 5, requires_grad=True)  # a feature of length 0: no NaN
    supcon.large_margin(torch.zeros(2, 5), w, torch.tensor([0, 1]), 4, 0.0).sum().backward()
    assert torch.isfinite(w.grad).all()


# ------------------------------------------------------------------------------------------- model and whole runs


def test_the_head_is_the_papers_and_the_presets_are_published():
    head = supcon.SupCon(config(hidden_dim=0, projection_dim=128)).projector
    assert [type(m).__name__ for m in head] == ["Linear", "ReLU", "Linear"]
    assert head[0].out_features == 128 and head[0].bias is not None and head[2].bias is not None
    model = supcon.SupCon(config(loss="cross-entropy")).eval()
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(model(x), model.backbone(x))
    c = supcon.Config()
    assert (c.batch_size, c.temperature, c.epochs, c.optimizer, c.base_temperature) == (6144, 0.1, 350, "lars", 0)
    cifar = common.parse_args(supcon.Config, ["--data", "cifar10"])
    assert (cifar.lr, cifar.batch_size, cifar.backbone, cifar.weight_decay) == (0.5, 1024, "resnet50", 1e-4)
    assert (cifar.linear_lr, cifar.linear_batch_size, cifar.linear_epochs) == (5, 512, 100)


def test_the_views_are_the_authors(monkeypatch):
    calls = []
    for name in ("random_jitter", "color_jitter", "to_grey", "gaussian_blur", "flip"):
        original = getattr(common, name)
        monkeypatch.setattr(common, name, lambda *a, f=original, n=name: calls.append((n, a)) or f(*a))
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32)
    out = supcon.augment(x.clone(), config(blur_probability=0.5))
    assert [name for name, _ in calls] == ["flip", "random_jitter", "color_jitter", "to_grey", "gaussian_blur"]
    assert calls[1][1] == (64, 0.4, 0.4, 0.4, 0.1, 0.8)
    assert out.shape == x.shape and out.min() >= -1e-6 and out.max() <= 1 + 1e-6


TINY = {"epochs": 1, "batch_size": 64, "knn_every": 0, "linear_epochs": 2}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"loss": "in", "loss_backend": "blocked"},
        {"loss": "cross-entropy", "amp": "bf16"},
        {"loss": "max-margin", "optimizer": "lars"},
        {"base_temperature": 0.07, "amp": "bf16", "blur_probability": 0.5},
        {"hidden_dim": 0, "linear_batch_size": 90, "optimizer": "lars"},
    ],
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_options_run_and_can_be_evaluated(flags, few_shapes, tmp_path, capsys):
    metrics = supcon.train(config(**TINY, out=str(tmp_path), **flags))
    assert math.isfinite(metrics["loss"]) and 0 <= metrics["linear_top1"] <= metrics["linear_top5"] <= 1
    assert torch.load(tmp_path / "classifier.pt", weights_only=True)["weight"].shape == (10, 128)
    assert f"top-1 {metrics['linear_top1']:.4f}" in capsys.readouterr().out
    _, model = linear_eval.load_run(str(tmp_path))
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in backbone.items())


def test_base_temperature_scales_the_loss(monkeypatch):
    z, labels = torch.randn(8, 4), torch.arange(8) % 3
    for given in ({}, {"loss": "in"}):
        plain, name = supcon.choose_loss(config(**given), torch.device("cpu"), None)
        scaled, said = supcon.choose_loss(config(base_temperature=0.07, **given), torch.device("cpu"), None)
        torch.testing.assert_close(scaled(z, labels, 0.0), plain(z, labels, 0.0) / 0.7)
        assert "times 1.42857" in said and "times" not in name


@pytest.mark.parametrize("loss", ["out", "in"])
def test_every_backend_runs_the_loss_that_was_asked_for(loss):
    pytest.importorskip("kernels")
    torch.manual_seed(0)
    z, labels = torch.randn(24, 4), torch.arange(24) % 3
    expected = by_the_formula(z, labels, 0.1, loss)
    for backend in ("blocked", "naive", "auto"):
        run, name = supcon.choose_loss(config(loss=loss, loss_backend=backend), torch.device("cpu"), None)
        torch.testing.assert_close(run(z, labels, 0.0), expected)
        assert f"sup_con {loss}" in name and (backend == "auto" or backend in name)


def test_the_baselines_losses():
    classifier = torch.nn.Linear(6, 3)
    h, y = torch.randn(10, 6), torch.randint(3, (10,))
    cross_entropy, _ = supcon.choose_loss(config(loss="cross-entropy"), torch.device("cpu"), classifier)
    assert torch.equal(cross_entropy(h, y, 0.3), F.cross_entropy(classifier(h), y))
    classifier = torch.nn.Linear(6, 3, bias=False)
    margin, name = supcon.choose_loss(config(loss="max-margin"), torch.device("cpu"), classifier)
    assert "m = 4" in name
    without = F.cross_entropy(classifier(h), y)
    assert abs(margin(h, y, 0.0) - without) < 0.01 * without  # lam 1000: nearly no margin yet
    late = F.cross_entropy(supcon.large_margin(h, classifier.weight, y, 4, 0.0), y)
    torch.testing.assert_close(margin(h, y, 1.0), late, rtol=0.01, atol=0.01)


def test_stage_1_then_stage_2_is_both(few_shapes, tmp_path):
    both = supcon.train(config(**TINY, out=str(tmp_path / "both")))
    apart = supcon.train(config(**TINY, out=str(tmp_path / "apart"), stage="1"))
    assert "linear_top1" not in apart and not (tmp_path / "apart" / "classifier.pt").exists()
    before = (tmp_path / "apart" / "backbone.pt").read_bytes()
    torch.manual_seed(99)
    second = supcon.train(config(**TINY, out=str(tmp_path / "apart"), stage="2", resume=True))
    assert second["linear_top1"] == both["linear_top1"] and before == (tmp_path / "apart" / "backbone.pt").read_bytes()
    a, b = (torch.load(tmp_path / run / "classifier.pt", weights_only=True) for run in ("both", "apart"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_classifier_is_never_that_of_another_encoder(few_shapes, tmp_path):
    supcon.train(config(**TINY, out=str(tmp_path)))
    saved_config = (tmp_path / "config.json").read_text()
    for flag, given in {"--loss out": {"loss": "in"}, "--temperature 0.1": {"temperature": 0.2}}.items():
        with pytest.raises(common.InputError, match=f"stage 1 had {flag}; give that"):
            supcon.train(config(**TINY, out=str(tmp_path), stage="2", resume=True, **given))
    assert (tmp_path / "config.json").read_text() == saved_config
    with pytest.raises(common.RunFailure, match="lower --linear-lr"):
        supcon.train(config(**TINY, out=str(tmp_path), stage="2", resume=True, linear_lr=1e38))
    assert (tmp_path / "classifier.pt").exists()
    supcon.train(config(**TINY, out=str(tmp_path), stage="1"))
    assert not (tmp_path / "classifier.pt").exists()


def test_stage_2_leaves_the_encoder_as_it_is(few_shapes, tmp_path):
    c = config(**TINY, out=str(tmp_path))
    device = common.prepare(c)
    model, data = supcon.SupCon(c), common.load_data(c, device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classifier = supcon.fit_classifier(model.train(), data, c, device)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())  # BN statistics too
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert classifier.weight.shape == (10, 128)


@pytest.mark.parametrize("loss", ["out", "cross-entropy"])
def test_pieces(loss, few_shapes, tmp_path):
    trains_in_pieces(supcon, config, {"loss": loss, "linear_epochs": 1}, tmp_path)


@pytest.mark.parametrize(
    "given",
    [{}, {"resident_gb": 0.0, "workers": 1}, {"loss": "max-margin"}],
    ids=["resident", "streamed", "max-margin"],
)
def test_an_interrupted_run_resumes_bit_for_bit(given, photos, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch; stage 1, and stage 2 or the baseline's classifier, end as in a whole run."""
    given = TINY | {"epochs": 2, "batch_size": 32, "data": str(photos)} | given
    parts = ["classifier"] * ("loss" in given)
    whole, resumed = resumes_bit_for_bit(supcon, config, given, parts, tmp_path, monkeypatch)
    assert resumed["linear_top1"] == whole["linear_top1"]


def test_stage_2_of_a_finished_run_from_the_command_line(photos, tmp_path, capsys):
    """Its flags come from the run, and its classifier is that of the run."""
    supcon.train(config(**TINY | {"data": str(photos)}, out=str(tmp_path)))
    first = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage 2")]
    again = python("supcon.py", "--stage", "2", "--resume", "--out", tmp_path)
    assert again.returncode == 0, again.stderr
    assert len(first) == 3 and first == [line for line in again.stdout.splitlines() if line.startswith("stage 2")]


def test_images_without_a_label_are_classes_of_their_own(photos, tmp_path, monkeypatch, capsys):
    photos = shutil.copytree(photos, tmp_path / "photos")
    for i in range(3):
        (photos / f"extra{i}.png").write_bytes(next((photos / "0").iterdir()).read_bytes())
    seen = []
    original = supcon.sup_con
    monkeypatch.setattr(supcon, "fused_sup_con", None)
    monkeypatch.setattr(supcon, "sup_con", lambda z, y, *a, **k: seen.append(y) or original(z, y, *a, **k))
    batches, original_batches = [], common.Run.batches

    def watched(self, **given):
        for index, views in original_batches(self, **given):
            batches.append((index, self.data.train.labels))
            yield index, views

    monkeypatch.setattr(common.Run, "batches", watched)
    given = TINY | {"data": str(photos), "batch_size": 223, "out": str(tmp_path / "run")}  # all images in one step
    supcon.train(config(**given))
    assert "3 unlabelled images" in capsys.readouterr().out
    ids, counts = seen[0].unique(return_counts=True)
    assert (ids < 0).sum() == 3 and counts[ids < 0].tolist() == [2, 2, 2]  # the two views
    index, labels = batches[0]
    named = labels[index] >= 0
    assert torch.equal(seen[0][:223], seen[0][223:]) and torch.equal(seen[0][:223][named], labels[index][named])
    with pytest.raises(common.InputError, match="3 images have no label"):
        supcon.train(config(**given, loss="cross-entropy"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--loss", "triplet"], "--loss"),
        (["--stage", "3"], "--stage"),
        (["--stage", "2"], "--stage 2: it needs a finished stage 1"),
        (["--loss", "cross-entropy", "--stage", "1"], "has one stage"),
        (["--margin", "2"], "only --loss max-margin"),
        (["--loss", "max-margin", "--base-temperature", "0.07"], "has no temperature"),
        (["--loss", "cross-entropy", "--loss-backend", "blocked"], "has no kernel"),
        (["--temperature", "-1"], "--temperature"),
        (["--base-temperature", "-1"], "--base-temperature"),
        (["--margin", "0"], "--margin"),
        (["--jitter-strength", "9"], "at most 2.5"),
        (["--batch-size", "1"], "there are no negatives"),
        (["--loss-backend", "triton"], "--loss-backend"),
        (["--linear-epochs", "0"], "--linear-epochs"),
    ],
    ids=lambda f: "-".join(f).strip("-") if isinstance(f, list) else "",
)
def test_bad_input_is_one_line(flags, words, few_shapes, tmp_path, capsys, monkeypatch):
    if words == "--loss-backend" and torch.cuda.is_available():
        pytest.skip("triton runs here")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert words in refusal(supcon, flags, tmp_path, capsys)


def test_data_without_labels_and_an_unfinished_stage_1(photos, few_shapes, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((photos / "0").iterdir())):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    with pytest.raises(common.InputError, match="SupCon learns from labels"):
        supcon.train(config(**TINY, data=str(flat), out=str(tmp_path / "run")))
    few = tmp_path / "few"
    for label in "01":
        (few / label).mkdir(parents=True)
        for i, path in enumerate(sorted((photos / label).iterdir())[:4]):
            (few / label / f"{i}.png").write_bytes(path.read_bytes())
    with pytest.raises(common.InputError, match="no held-out images"):  # fewer than ten of a class
        supcon.train(config(**TINY | {"batch_size": 4}, data=str(few), out=str(tmp_path / "run")))
    supcon.train(config(**TINY | {"batch_size": 4}, data=str(few), stage="1", out=str(tmp_path / "run")))
    supcon.train(config(**TINY, stage="1", out=str(tmp_path / "half")))
    with pytest.raises(common.InputError, match="has done 1 of 2 epochs"):
        supcon.train(config(**TINY | {"epochs": 2}, stage="2", resume=True, out=str(tmp_path / "half")))


@pytest.mark.parametrize("loss, said", [("out", True), ("cross-entropy", False)])
def test_two_classes_at_two_points_are_no_failure(loss, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "likeness", lambda z: 1.0)
    monkeypatch.setattr(common.Run, "SETTLED", 0)
    for i, picture in enumerate(common.make_shapes(24, 0, 32)[0]):  # ten of a class and more: one is held out
        path = tmp_path / "two" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    c = config(
        data=str(tmp_path / "two"), loss=loss, stage="1" if said else "both", epochs=1, batch_size=8, knn_every=0
    )
    c.out = str(tmp_path / "run")
    supcon.train(c)
    out = capsys.readouterr().out
    assert "the output has collapsed" in out and ("two classes do so when learnt" in out) == said
