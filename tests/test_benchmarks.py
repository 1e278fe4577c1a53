"""The experiments of benchmarks/: their formulas, and each on a few images."""

import math
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.ops import box_iou
from torchvision.transforms import functional as TF

import common
import images
import pairwise
import recordings
import simclr
import simsiam
import supcon
from benchmarks import (
    ablations,
    augmentations,
    detection,
    eigenspaces,
    neural,
    simsiam_section5,
    supervised,
    table,
    theory,
)
from recordings import make_track
from tests.helpers import ROOT, equal, saved

TINY = ["--epochs", "1", "--batch-size", "40", "--knn-every", "0"]


def simsiam_config(out, **given):
    given = {"epochs": 2, "batch_size": 32, "knn_every": 0, "seed": 0} | given
    return simsiam.Config.preset("demo", **given, out=str(out))


# ----------------------------------------------------------------------------------------------- simsiam_section5


@pytest.mark.parametrize("k, starts", [(4, [0, 4, 6, 10]), (0, [0, 6])])
def test_targets_are_computed_before_k_steps(k, starts, few_shapes, tmp_path, monkeypatch):
    """Six steps an epoch, two epochs. All views of an image are the same here, so that its target can be told."""
    done, fills, predicted = [0], [], []
    eta_of, log = simsiam_section5.eta_of, common.Run.log

    def spy_eta(model, config, views):
        if not fills or fills[-1][0] != done[0]:
            fills.append((done[0], []))
        fills[-1][1].append(eta_of(model, config, views))
        return fills[-1][1][-1]

    def spy_distance(p, z):
        assert p.requires_grad and not z.requires_grad
        predicted.append(z)
        return simsiam.negative_cosine(p, z)

    def spy_log(run, loss, z, *views):
        done[0] += 1
        predicted.append(z.detach())
        log(run, loss, z, *views)

    monkeypatch.setattr(simsiam_section5, "eta_of", spy_eta)
    monkeypatch.setattr(simsiam_section5, "negative_cosine", spy_distance)
    monkeypatch.setattr(common.Run, "log", spy_log)
    monkeypatch.setattr(simsiam_section5, "augment", lambda x, config: x)
    monkeypatch.setattr(
        images, "crop_boxes", lambda sizes, *rest: torch.tensor([[0.0, 0, 32, 32]]).repeat(len(sizes), 1)
    )
    simsiam_section5.steps_ahead(simsiam_config(tmp_path, lr=1.0), k)
    assert [start for start, _ in fills] == starts and done[0] == 12
    for (start, filled), end in zip(fills, [*starts[1:], 12], strict=True):
        assert len(filled) == end - start  # no target is computed for nothing
        for i, (eta1, eta2) in enumerate(filled):
            for_1, for_2, z1 = predicted[3 * (start + i) : 3 * (start + i) + 3]
            assert for_1 is eta2 and for_2 is eta1  # the other view's
            assert torch.allclose(eta1, z1, atol=1e-3) == (i == 0)  # the network moves on, its targets do not


@pytest.mark.parametrize("streamed", [False, True])
def test_targets_ahead_have_views_of_their_own_and_leave_the_statistics(streamed, photos, tmp_path, monkeypatch):
    """Without augmentation: streamed crops are drawn from the seed and the image."""
    seen, counts, eta_of = [], [], simsiam_section5.eta_of
    monkeypatch.setattr(common.Run, "curves", lambda self: None)
    monkeypatch.setattr(simsiam_section5, "augment", lambda x, c: seen.append(x) or x)

    def spy_eta(model, config, views):
        before = {name: v.clone() for name, v in model.state_dict().items()}
        result = eta_of(model, config, views)
        counts.append(all(torch.equal(v, before[name]) for name, v in model.state_dict().items()))
        assert model.training
        return result

    monkeypatch.setattr(simsiam_section5, "eta_of", spy_eta)
    given = {"data": str(photos), "epochs": 1, "batch_size": 100, "workers": 1, "resident_gb": 0.0 if streamed else 4.0}
    simsiam_section5.steps_ahead(simsiam_config(tmp_path, **given), 2)
    assert counts == [True, True]
    assert len(seen) == 8 and not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_the_moving_average():
    torch.manual_seed(0)
    eta = F.normalize(torch.randn(6, 4), dim=1)
    start, index, (a, b) = eta.clone(), torch.tensor([4, 1]), torch.randn(2, 2, 4)
    one, two = simsiam_section5.moving_average(eta, index, a.requires_grad_(), b)
    assert torch.allclose(one, 0.8 * start[index] + 0.2 * F.normalize(a, dim=1)) and not one.requires_grad
    assert torch.allclose(two, 0.8 * start[index] + 0.2 * F.normalize(b, dim=1))
    assert torch.allclose(eta[index], (one + two) / 2) and torch.equal(eta[[0, 2, 3, 5]], start[[0, 2, 3, 5]])


def test_a_run_predicts_the_moving_average_of_the_other_view(few_shapes, tmp_path, monkeypatch):
    zs, etas, asked, update = [], [], [], simsiam_section5.moving_average

    def spy_update(eta, index, z1, z2):
        zs.append((z1, z2))
        etas.append((eta, *update(eta, index, z1, z2)))
        return etas[-1][1:]

    spy_distance = lambda p, z: asked.append((p, z)) or simsiam.negative_cosine(p, z)  # noqa: E731
    monkeypatch.setattr(simsiam_section5, "moving_average", spy_update)
    monkeypatch.setattr(simsiam_section5, "negative_cosine", spy_distance)
    simsiam_section5.average(simsiam_config(tmp_path))
    assert len(zs) == 12 and all(eta is etas[0][0] for eta, *_ in etas)  # one memory for all epochs
    for (z1, z2), (_, eta1, eta2), first, second in zip(zs, etas, asked[::2], asked[1::2], strict=True):
        assert first[0] is z1 and first[1] is eta2 and second[0] is z2 and second[1] is eta1  # no predictor


def test_twice_the_pairs_is_the_mean_of_two_directions():
    torch.manual_seed(0)
    config = simsiam_config("unused")
    model, views = simsiam.SimSiam(config), list(torch.rand(4, 8, 3, 32, 32))
    run = SimpleNamespace(config=config, batches=lambda **asked: [(None, [v.clone() for v in views[: asked["views"]]])])
    torch.manual_seed(1)
    ((loss, z, *seen),) = simsiam_section5.twice(run, model)
    (p1, _, z1, z2), (p3, _, _, z4) = model(*seen[:2]), model(*seen[2:])
    expected = simsiam.negative_cosine(p1, z2) / 2 + simsiam.negative_cosine(p3, z4) / 2
    assert torch.allclose(loss, expected) and torch.equal(z, z1) and len(seen) == 4


# ----------------------------------------------------------------------------------------------------- supervised


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_large_margin_is_the_published_formula(m, lam):
    def psi(angle):  # equation 6, literally
        k = min(int(angle * m / math.pi), m - 1)
        return (-1) ** k * math.cos(m * angle) - 2 * k

    torch.manual_seed(m)
    h, w, labels = torch.randn(30, 6).double(), torch.randn(4, 6).double(), torch.randint(4, (30,))
    h[0], h[1] = w[labels[0]], -2 * w[labels[1]]  # angles 0 and pi
    logits = supervised.large_margin(h, w, labels, m, lam)
    for i, y in enumerate(labels):
        for c in range(4):
            norm = (h[i].norm() * w[c].norm()).item()
            cos = max(-1.0, min(1.0, torch.dot(h[i], w[c]).item() / norm))
            value = norm * (lam * cos + psi(math.acos(cos))) / (1 + lam) if c == y else norm * cos
            assert math.isclose(logits[i, c].item(), value, rel_tol=1e-6, abs_tol=1e-6)


def test_large_margin_falls_with_the_angle_and_has_a_gradient():
    angle = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    h = torch.stack([angle.cos(), angle.sin()], 1).requires_grad_()
    logits = supervised.large_margin(h, torch.eye(2).double(), torch.zeros(200, dtype=torch.int64), 4, 0.0)
    assert (logits[1:, 0] < logits[:-1, 0]).all() and (logits[:, 0] <= angle.cos() + 1e-12).all()
    logits[:, 0].sum().backward()
    assert torch.isfinite(h.grad).all()
    w = torch.randn(3, 5, requires_grad=True)  # a feature of length 0: no NaN
    supervised.large_margin(torch.zeros(2, 5), w, torch.tensor([0, 1]), 4, 0.0).sum().backward()
    assert torch.isfinite(w.grad).all()


def test_the_margin_comes_gradually():
    torch.manual_seed(0)
    h, w, y = torch.randn(10, 6), torch.randn(3, 6), torch.randint(3, (10,))
    without, whole = (F.cross_entropy(supervised.large_margin(h, w, y, m, 0.0), y) for m in (1, 4))
    first, last = (supervised.margin_loss(h, w, y, 4, progress) for progress in (0.0, 1.0))
    assert torch.allclose(without, F.cross_entropy(h @ w.T, y)) and whole > 1.5 * without
    assert abs(first - without) < 0.02 * without  # lam 1000
    torch.testing.assert_close(last, whole, rtol=0.01, atol=0.01)


def by_equation_2(z, y, tau):
    """SupCon's loss of z (M, d) as it is, of any length, with loops."""
    total = 0
    for i in range(len(z)):
        s = z @ z[i] / tau
        below = torch.exp(torch.cat([s[:i], s[i + 1 :]])).sum()
        positives = [p for p in range(len(z)) if p != i and y[p] == y[i]]
        total -= sum(s[p] - torch.log(below) for p in positives) / len(positives)
    return total / len(z)


def test_the_row_without_length_trains_by_it_and_is_judged(few_shapes, tmp_path, monkeypatch):
    asked, loss, F = [], supcon.sup_con, supcon.F
    spy = lambda z, y, tau, **k: asked.append((z, y, tau, loss(z, y, tau, **k))) or asked[-1][-1]  # noqa: E731
    monkeypatch.setattr(supcon, "sup_con", spy)
    config = supcon.Config.preset("demo", epochs=1, batch_size=50, knn_every=0, image_size=16, out=str(tmp_path))
    metrics = supervised.ROWS["not normalised, tau = 1"][0](config)
    assert len(asked) == 4 and 0 < metrics["linear_top1"] <= 1 and supcon.F is F
    for z, y, tau, found in asked:
        assert tau == 1 and torch.allclose(found, by_equation_2(z, y, 1.0), rtol=1e-5)
        assert not torch.allclose(found, loss(z, y, 1.0), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- eigenspaces


def test_cosines_are_1_where_the_eigenspaces_are_one():
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(6, 6).double())[0]
    of_f, of_w = torch.tensor([5.0, 3, 2, 1, 0.5, 0.1]).double(), torch.tensor([0.2, 2, 1, -1, 3, 1]).double()
    f, w = (vectors @ torch.diag(values) @ vectors.T for values in (of_f, of_w))
    found, values = eigenspaces.cosines(f, w @ f)
    assert torch.allclose(values, of_f) and torch.allclose(found, of_w.sign())
    assert eigenspaces.aligned(found, values) == (pytest.approx(0.6), 5)  # the five largest hold 99% of 11.6
    w = torch.randn(6, 6).double()
    moved = w @ vectors
    expected = [F.cosine_similarity(v, m, dim=0) for v, m in zip(vectors.T, moved.T, strict=True)]
    assert torch.allclose(eigenspaces.cosines(f, w @ f)[0], torch.stack(expected))
    turned = vectors.roll(1, 1)  # every eigenvector of F is moved to the next
    assert eigenspaces.cosines(f, vectors @ turned.T @ f)[0].abs().max() < 1e-12


@pytest.mark.parametrize("method", eigenspaces.METHODS)
@pytest.mark.parametrize("predictor", ["own", "linear"])
def test_eigenspaces_are_of_what_the_predictor_makes_of_its_input(
    method, predictor, few_shapes, tmp_path, monkeypatch, capsys
):
    given = ["--epochs", "2", "--batch-size", "50", "--knn-every", "2", "--image-size", "16"]
    seen, passed, predictors, cosines = [], [], [], eigenspaces.cosines

    def spy_run(run, *args, init=common.Run.__init__, **parts):
        init(run, *args, **parts)
        predictors.append(run.model.predictor)
        predictors[0].register_forward_hook(lambda _, f, p: passed.append((f[0].detach(), p.detach())))

    monkeypatch.setattr(common.Run, "__init__", spy_run)
    monkeypatch.setattr(eigenspaces, "cosines", lambda f, c: seen.append((f.clone(), c.clone())) or cosines(f, c))
    flags = ["--methods", method, "--predictors", predictor, "--seeds", "3", "--out", str(tmp_path), *given]
    text = eigenspaces.main(flags)
    said = capsys.readouterr().out
    assert text.count(f"| {method} | {predictor} |") == 5 and f"{method}, {predictor}, seed 3: kNN top-1 0." in said
    assert len(seen) == 8 and len(passed) == 16 and (tmp_path / "eigenspaces.png").exists()
    assert isinstance(predictors[0], torch.nn.Linear) == (predictor == "linear")
    mean = None  # two views a step
    for i, (f, p) in enumerate(passed):
        now = torch.stack([f.T @ f, p.T @ f]) / 50
        mean = now if mean is None else 0.95 * mean + 0.05 * now
        assert i % 2 == 0 or torch.allclose(torch.stack(seen[i // 2]), mean, rtol=1e-3, atol=1e-6)
    with pytest.raises(common.InputError, match="--predictor"):
        eigenspaces.main([*flags, "--no-predictor" if method == "byol" else "--predictor=none"])


# --------------------------------------------------------------------------------------------------------- theory


def test_the_gaussians_have_the_information_and_the_ratio_that_is_said():
    torch.manual_seed(0)
    rho = theory.rho_of(3.0, 4)
    assert -4 / 2 * math.log(1 - rho**2) == pytest.approx(3.0)
    x, y = theory.correlated(200_000, 4, rho)
    assert (x * y).mean().item() == pytest.approx(rho, abs=0.01) and y.var().item() == pytest.approx(1, abs=0.01)
    x, y = x[:50].double(), y[:50].double()
    joint = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.tensor([[1, rho], [rho, 1]]).double())
    one = torch.distributions.Normal(0.0, 1.0)
    expected = joint.log_prob(torch.stack([x, y], -1)) - one.log_prob(x) - one.log_prob(y)
    assert torch.allclose(theory.log_ratio(x, y, rho), expected.sum(1))


def test_the_estimate_is_the_published_one_and_below_the_truth(monkeypatch):
    monkeypatch.setattr(theory, "HELD_OUT", 16_384)
    torch.manual_seed(0)
    scores = torch.randn(5, 4, 4).double()
    expected = [-torch.log(torch.exp(g[i, i]) / torch.exp(g[i]).sum()) for g in scores for i in range(4)]
    assert torch.allclose(theory.info_nce(scores), torch.stack(expected).mean())
    rho = theory.rho_of(2.0, 10)
    best = lambda x, y: theory.log_ratio(x[..., :, None, :], y[..., None, :, :], rho)  # noqa: E731
    found = [theory.estimate(best, 10, rho, k) for k in (2, 16, 256)]
    assert found[0] < found[1] < found[2] < 2.05 and found[0] < math.log(2) and found[2] > 1.9
    assert theory.estimate(lambda x, y: torch.zeros(1024 // 4, 4, 4), 10, rho, 4) == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_theory_prints_its_tables_and_pictures(few_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, "HELD_OUT", 2048)
    flags = ["--steps", "40", "--out", str(tmp_path)]
    ratio = theory.main(["density-ratio", *flags, "--seeds", "0", "1"]).split("\n")[2:]
    assert [line.split(" | ")[0] for line in ratio] == ["| 0", "| 30", "| 40"]
    for column in (1, 2):
        first, last = (float(ratio[i].split(" | ")[column].split()[0]) for i in (0, -1))
        assert last < first / 2 and ratio[-1].count(" to ") == 2
    critic = theory.train(10, theory.rho_of(4.0, 10), 16, 150)
    with torch.no_grad():
        assert 1.2 < theory.estimate(critic, 10, theory.rho_of(4.0, 10), 16) < math.log(16)
    lines = theory.main(["mutual-information", *flags, "--steps", "4"]).split("\n")[2:]
    assert len(lines) == 18 and all(float(line.split(" | ")[3]) < float(line.split(" | ")[2]) + 0.01 for line in lines)
    run = tmp_path / "run"
    pairwise.train(pairwise.Config.preset("demo", epochs=1, batch_size=50, knn_every=0, out=str(run)))
    found = theory.main(["weights", str(run), *flags])
    assert all(f"| {name} |" in found for name in pairwise.LOSSES) and "| linear | 1% | 0% |" in found
    assert {"density_ratio.png", "mutual_information.png", "weights.png"} <= {p.name for p in tmp_path.iterdir()}


# -------------------------------------------------------------------------------------------------- augmentations


def test_cutout_equals_torchvision_and_is_cut_off_at_the_border():
    x = torch.rand(12, 3, 40, 40)
    middle = augmentations.cutout(x, torch.full((12, 2), 0.5))
    assert torch.equal(middle, TF.erase(x, 10, 10, 20, 20, torch.tensor(0.0)))
    assert torch.equal(augmentations.cutout(x, torch.zeros(12, 2)), TF.erase(x, 0, 0, 10, 10, torch.tensor(0.0)))
    drawn = augmentations.OPS["cutout"](x, None)
    area = (drawn == 0).all(1).float().mean((1, 2))  # a quarter, less what is outside
    assert (area <= 0.25).all() and (area >= 1 / 16).all() and len(area.unique()) > 6


def test_every_cell_of_figure_5_augments_one_branch_in_the_given_order(monkeypatch):
    torch.manual_seed(0)
    config, x = simclr.Config.preset("demo"), torch.rand(6, 3, 32, 32)
    called = []
    for name, op in augmentations.OPS.items():
        spy = lambda y, c, name=name, op=op: called.append(name) or op(y, c)  # noqa: E731
        monkeypatch.setitem(augmentations.OPS, name, spy)
    for first in augmentations.OPS:
        for second in augmentations.OPS:
            ops = [first] if first == second else [first, second]
            called.clear()
            t, same = augmentations.one_branch(x.clone(), ops, config)
            assert called == ops and torch.equal(same, images.normalize(x.clone()))
            y = t * images.STD + images.MEAN
            assert y.shape == x.shape and torch.isfinite(y).all() and y.min() >= -1e-5 and y.max() <= 1 + 1e-5
            assert not torch.equal(t, same)


# ------------------------------------------------------------------------------------------------------ detection


def on_picture(*rows):
    """Of one picture, the boxes that the rows say: x1, y1, x2, y2, label, and the score of a detection."""
    rows = torch.tensor(rows, dtype=torch.float32) if rows else torch.empty(0, 6)
    named = {"boxes": rows[:, :4], "labels": rows[:, 4].long()}
    return named | ({"scores": rows[:, 5]} if rows.shape[1] > 5 else {})


A, B = (0, 0, 10, 10), (20, 20, 30, 30)
NEAR_A = (0, 2, 10, 12)  # IoU 2/3
HALF = 51 / 101  # of the recalls 0, 0.01, ..., 1 those up to a half


@pytest.mark.parametrize(
    "detections, truths, expected",
    [
        ([[(*A, 1, 0.9), (*B, 2, 0.1)], [(*B, 1, 0.2)]], [[(*A, 1), (*B, 2)], [(*B, 1)]], 1.0),  # perfect
        ([[(*A, 1, 0.9), (*A, 1, 0.8), (*B, 1, 0.7)]], [[(*A, 1), (*B, 1)]], HALF + (1 - HALF) * 2 / 3),  # one twice
        ([[(*A, 1, 0.7), (*B, 1, 0.8), (*A, 1, 0.9)]], [[(*A, 1), (*B, 1)]], 1.0),  # twice, but after all are found
        ([[(*A, 1, 0.9), (*A, 1, 0.8)]], [[(*A, 1), (*NEAR_A, 1)]], 1.0),  # the second takes the one that is free
        ([[(*A, 1, 0.9)]], [[(*NEAR_A, 1), (*A, 1), (*B, 1), (*B, 1)]], 26 / 101),  # one of four
        ([[(*NEAR_A, 1, 0.9), (*A, 1, 0.8)]], [[(*A, 1), (-1, 3, 10, 13, 1)]], 1.0),  # each the one it overlaps most
        ([[(*A, 2, 0.9)]], [[(*A, 1)]], 0.0),  # another class; the 2 has no true box and is left out
        ([[(*A, 2, 0.9), (*B, 3, 0.9)]], [[(*A, 1), (*B, 3)]], 0.5),
        ([[(*A, 1, 0.9)], [(*A, 1, 0.8)]], [[], [(*A, 1)]], 0.5),  # on another picture; and it comes first
        ([[(*A, 1, 0.8)], [(*A, 1, 0.9)]], [[], [(*A, 1)]], 1.0),
        ([[(0, 0, 10, 5, 1, 0.9)]], [[(*A, 1)]], 1.0),  # IoU 0.5
        ([[(0, 0, 10, 4.99, 1, 0.9)]], [[(*A, 1)]], 0.0),  # 0.499
        ([[], []], [[(*A, 1)], []], 0.0),  # nothing found
        ([[]], [[]], math.nan),
        ([[(*A, 1, 0.9)]], [[]], math.nan),
    ],
)
def test_average_precision_in_closed_form(detections, truths, expected):
    found, true = [on_picture(*rows) for rows in detections], [on_picture(*rows) for rows in truths]
    assert detection.average_precision(found, true, range(1, 4)) == pytest.approx(expected, nan_ok=True)


def test_average_precision_follows_the_scores_and_takes_the_best_precision_to_come():
    """Of three true boxes, by falling score: wrong, right, right, wrong, right: precision 0, 1/2, 2/3, 1/2, 3/5."""
    true = [on_picture((*A, 1), (*B, 1)), on_picture((*A, 1))]
    found = [
        on_picture((*B, 1, 0.1), (50, 50, 60, 60, 1, 0.9), (*A, 1, 0.5)),
        on_picture((50, 50, 60, 60, 1, 0.2), (*A, 1, 0.8)),
    ]
    assert detection.average_precision(found, true, [1]) == pytest.approx((67 * 2 / 3 + 34 * 3 / 5) / 101)
    assert detection.average_precision(found, true, [1], iou=1.1) == 0


@pytest.fixture(scope="module")
def canvases():
    """Forty without noise: how much of each pixel a shape covers, (40, 96, 96), and the boxes."""

    class Quiet(np.random.Generator):
        def standard_normal(self, size):
            return np.zeros(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: Quiet(np.random.PCG64(seed)))
        pixels, truths = detection.draw_canvases(40, 3)
    red = pixels[:, 0].double()
    ground = red.flatten(1).median(1).values[:, None, None]
    return (red - ground) / (red.flatten(1).amax(1)[:, None, None] - ground), truths


def test_boxes_are_tight_around_the_shapes_and_apart(canvases):
    counts = []
    for cover, truth in zip(*canvases, strict=True):
        counts.append(len(truth["labels"]))
        apart = box_iou(truth["boxes"], truth["boxes"])
        assert truth["boxes"].min() >= 0 and truth["boxes"].max() <= 96 and apart.sum() == pytest.approx(counts[-1])
        outside = cover > 0.02
        for x1, y1, x2, y2 in truth["boxes"].tolist():
            left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
            rows, columns = (cover[top:bottom, left:right] > 0.02).nonzero().T
            reach = [left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1]
            assert max(abs(a - b) for a, b in zip(reach, (x1, y1, x2, y2), strict=True)) <= 1.25
            outside[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = False
        assert not outside.any()
    assert set(counts) == {1, 2, 3, 4}


def test_labels_name_the_shapes(canvases):
    """The outline that fits a box best, of all shapes in 90 turns, is the one its label names."""
    side, outlines, looks, ratios = 24, list(images.SHAPES.items()), [], []
    for name, corners in outlines:
        for angle in torch.arange(90) * 4 * math.pi / 180:
            c, s = math.cos(angle), math.sin(angle)
            turned = torch.tensor(corners, dtype=torch.float64) @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
            low, extent = turned.amin(0), turned.amax(0) - turned.amin(0)
            look = Image.new("L", (side, side))
            for scale, ink in ((1.0, 1), (0.6, 0)) if name == "ring" else ((1.0, 1),):
                placed = (scale * turned - low) / extent * side
                ImageDraw.Draw(look).polygon(placed.flatten().tolist(), fill=ink)
            looks.append(torch.from_numpy(np.array(look)).double())
            ratios.append(math.log(extent[0] / extent[1]))
    looks, ratios, right = torch.stack(looks), torch.tensor(ratios), []
    for cover, truth in zip(*canvases, strict=True):
        for (x1, y1, x2, y2), label in zip(truth["boxes"].tolist(), truth["labels"].tolist(), strict=True):
            at_y, at_x = (lo + (torch.arange(side) + 0.5) * (hi - lo) / side for lo, hi in ((y1, y2), (x1, x2)))
            seen = cover[at_y.long()][:, at_x.long()] > 0.5
            off = (looks - seen.double()).abs().mean((1, 2)) + (ratios - math.log((x2 - x1) / (y2 - y1))).abs()
            right.append(off.argmin().item() // 90 + 1 == label)
    assert len(right) > 80 and sum(right) > 0.95 * len(right)
    assert {label for truth in canvases[1] for label in truth["labels"].tolist()} == set(range(1, 11))


def test_canvases_are_the_same_for_the_same_seed():
    pixels, truths = detection.draw_canvases(3, 7)
    again, (other, _) = detection.draw_canvases(3, 7), detection.draw_canvases(3, 8)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 3, 96, 96) and truths[0]["labels"].dtype == torch.int64
    assert torch.equal(pixels, again[0]) and equal(truths, again[1]) and not torch.equal(pixels, other)


def saved_backbone(path):
    torch.manual_seed(5)
    state = common.resnet8().state_dict()
    torch.save(state, path)
    return state


def test_detection_starts_both_alike_but_for_the_backbone(tmp_path, monkeypatch):
    """A run of two steps, as the command line starts it."""
    state, started, train = saved_backbone(tmp_path / "backbone.pt"), [], detection.train

    def spy(model, pixels, truths, *rest):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(model, pixels, truths, *rest)
        started.append((before, pixels, truths, rest, model.state_dict()))

    for name, value in (("train", spy), ("HELD_OUT", 4), ("BATCH", 3)):
        monkeypatch.setattr(detection, name, value)
    flags = ["--images", "4", "--steps", "2", "--seeds", "3"]
    lines = detection.main(["--init", str(tmp_path / "backbone.pt"), *flags]).split("\n")
    assert len(lines) == 3 and lines[2].startswith("| 4 | 0.") and lines[0].endswith("| AP50 from random weights |")
    (ours, *given, end), (random, *same, other_end) = started
    assert equal(given, same) and given[2] == (3, 2, 0.001)
    body = "backbone.body."
    inside = {name.removeprefix(body): value for name, value in ours.items() if name.startswith(body)}
    assert inside and all(torch.equal(value, state[name]) for name, value in inside.items())
    for name, value in ours.items():
        alike = torch.equal(value, random[name])
        assert alike or name.startswith(body), name
        if name.startswith(body) and "conv" in name:
            assert not alike
        moved = [not torch.equal(after[name], before[name]) for before, after in ((ours, end), (random, other_end))]
        assert all(moved) or "running" not in name  # BN is trained in both
    assert all(not torch.equal(end[f"{body}conv1.weight"], after) for after in (state["conv1.weight"],))


def test_detection_prints_the_range_over_seeds(tmp_path, monkeypatch):
    state, asked, told = saved_backbone(tmp_path / "backbone.pt"), [], iter([0.9, 0.2, 0.7, 0.4, 1.0, 0.0, 1.0, 0.0])

    def spy(model, pixels, truths, seed, steps, lr):
        ours = torch.equal(model.backbone.body.conv1.weight, state["conv1.weight"])
        asked.append((ours, len(pixels), len(truths), seed, steps, lr))

    monkeypatch.setattr(detection, "train", spy)
    monkeypatch.setattr(detection, "HELD_OUT", 1)
    monkeypatch.setattr(detection, "evaluate", lambda *_: next(told))
    path = str(tmp_path / "backbone.pt")
    flags = ["--images", "3", "2", "--seeds", "0", "4", "--steps", "7", "--lr", "0.1"]
    shown = detection.main(["--init", path, *flags]).split("\n")
    assert shown[0] == f"| training canvases | AP50 from {path} | AP50 from random weights |"
    assert shown[2] == "| 3 | 0.800 (0.700 to 0.900) | 0.300 (0.200 to 0.400) |"
    assert shown[3] == "| 2 | 1.000 (1.000 to 1.000) | 0.000 (0.000 to 0.000) |"
    assert asked == [(ours, n, n, seed, 7, 0.1) for n in (3, 2) for seed in (0, 4) for ours in (True, False)]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--init", "nowhere/backbone.pt"], "--init nowhere/backbone.pt: no such file"),
        (["--init", __file__], "no whole state_dict"),
        (["--images", "10", "0"], "must be at least 1"),
        (["--steps", "0"], "must be at least 1"),
        (["--lr", "nan"], "--lr above 0"),
        (["--seed", "3"], "did you mean --seeds?"),
    ],
)
def test_detection_refuses_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop, common.exit_status():
        detection.main(flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err


# --------------------------------------------------------------------------------------------- whole scripts, small


def test_a_row_of_simsiam_section5_over_two_seeds(few_shapes, tmp_path):
    module = simsiam_section5
    argv = ["--rows", "twice the pairs", "--seeds", "0", "1", "--out", str(tmp_path), *TINY]
    result = table.compare(module.parser("", "x"), module.Config, module.ROWS, module.COLUMNS, module.UNUSED, argv)
    head, _, line = result.split("\n")
    assert head == "|  | kNN of h | loss | std | rank | s | the paper |"
    assert line.startswith("| twice the pairs |  | ") and line.endswith(" | 67.3 |") and line.count(" to ") == 4
    folders = {path.parent.name for path in tmp_path.glob("*/checkpoint.pt")}
    assert folders == {"twice-the-pairs-seed-0", "twice-the-pairs-seed-1"}


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_supervised_runs_and_is_judged(optimizer, few_shapes, tmp_path, monkeypatch):
    given = {"epochs": 1, "batch_size": 40, "optimizer": optimizer, "lr": 0.05, "knn_every": 0, "out": str(tmp_path)}
    progress, loss = [], supervised.margin_loss
    monkeypatch.setattr(supervised, "margin_loss", lambda *a: progress.append(a[-1]) or loss(*a))
    metrics = supervised.ROWS["max-margin, m = 4"][0](supcon.Config.preset("demo", **given))
    assert 0 < metrics["linear_top1"] <= 1 and progress == [0.0, 0.2, 0.4, 0.6, 0.8]
    classifier = saved(tmp_path, "classifier")
    assert set(classifier) == {"weight"} and classifier["weight"].shape == (10, 128)
    assert saved(tmp_path, "config")["loss"] == "cross-entropy"


def test_augmentations_prints_the_matrix(few_shapes, tmp_path, monkeypatch):
    figures = {"cutout": 0.1, "cutout-color": 0.2, "color-cutout": 0.3, "color": 0.4}
    trained = []

    def linear(config):
        trained.append(config.out.split("/")[-1].removesuffix("-seed-0"))
        return {"linear_top1": figures[trained[-1]]}

    monkeypatch.setattr(table, "linear", linear)
    matrix = augmentations.main(["--ops", "cutout", "color", "--out", str(tmp_path), *TINY]).split("\n")
    assert matrix[0] == "| first, then | cutout | color |" and trained == list(figures)
    assert matrix[2:] == ["| cutout | 0.100 | 0.200 |", "| color | 0.300 | 0.400 |"]


def test_an_experiment_refuses_flags_it_would_not_follow():
    for flag in (["--amp", "bf16"], ["--seed", "3"], ["--no-symmetric"], ["--bogus", "1"]):
        with pytest.raises(common.InputError, match=flag[0].replace("no-", "")):
            table.base_config(simsiam.Config, flag, simsiam_section5.UNUSED)
    base = table.base_config(simsiam.Config, ["--epochs", "3"])
    config = table.changed(base, seed=4)
    assert (config.epochs, config.seed, config.recipe) == (3, 4, "demo") and config.given == {"epochs", "seed"}


def test_every_row_of_the_ablations_is_a_command_that_its_script_takes():
    assert list(ablations.LOSSES) == list(pairwise.LOSSES)
    for method, tables in ablations.TABLES.items():
        config = sys.modules.get(method) or __import__(method)
        small = ablations.SMALL * (method != "swav")
        for _, shared, rows in tables.values():
            for row in rows:
                common.parse_args(config.Config, f"{row} {small} {shared}".split())


def test_the_demos_table_names_worst_and_best(monkeypatch, capsys, tmp_path):
    kept = {0: (0.9, 50.0), 1: (0.8, 61.0), 2: (0.85, 40.0)}

    def measure(command, said, out, threads):
        knn, seconds = kept[int(command[-1])]
        return "error: no" if threads == 2 and knn == 0.85 else {"kNN": knn, "seconds": seconds}

    monkeypatch.setattr(ablations, "measure", measure)
    assert ablations.demos(["byol"], [0, 1, 2], [1, 2], tmp_path) == 1
    out = capsys.readouterr().out
    assert "byol | 1 | 2 | 0.850 | 40\n" in out and "byol | 2 | 2 | failed | error: no\n" in out
    assert "| byol | 1 | 0.800 | 0.900 | 40 to 61 |\n| byol | 2 | 0.800 (1 failed) | 0.900 | 50 to 61 |" in out


@pytest.mark.slow
def test_ablations_run_a_table(tmp_path):
    more = "--epochs 1 --data " + str(tmp_path / "photos")
    for i, (picture, label) in enumerate(zip(*images.make_shapes(120, 0, 32), strict=True)):
        path = tmp_path / "photos" / str(label.item()) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(picture).save(path)
    command = ["benchmarks/ablations.py", "byol.symmetry", "--out", str(tmp_path / "runs")]
    command += ["--more", more + " --preset demo --batch-size 16", "--threads", "1"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "| flags | kNN | kNN of g(h) | loss | std | rank | cos2 | seconds |" in done.stdout
        and "| default | 0." in done.stdout
    )


# ----------------------------------------------------------------------------------------------------------- neural


def test_consistency_is_one_for_what_a_linear_map_leads_to():
    torch.manual_seed(0)
    z, other = torch.randn(500, 3), torch.randn(500, 3)
    assert neural.consistency([z]) is None
    assert neural.consistency([z, z @ torch.randn(3, 3) + 1]) == pytest.approx(1, abs=1e-9)
    assert neural.consistency([z, other]) < 0.03
    a, b = z[:, :1], torch.cat([z[:, :1], other[:, :1]], 1)  # a from b whole, b from a the half
    assert neural.consistency([a, b]) == pytest.approx((1 + (1 + 0) / 2) / 2, abs=0.01)


def test_neural_table(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "make_track", lambda: make_track(seconds=15, neurons=8))
    small = ["--epochs", "2", "--batch-size", "64", "--out", str(tmp_path)]
    found = neural.main([*small, "--seeds", "0", "1", "--rows", "time", "behavior, shuffled"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()]
    assert rows[0] == ["", "median error, cm", "R2", "direction", "fit, bits", "consistency", "s"]
    names = ["time", "behavior, shuffled", "PCA of 1 sample, 3-d", "spikes of 1 sample", "PCA of 10 samples, 3-d"]
    assert [row[0] for row in rows[2:]] == [*names, "spikes of 10 samples", "a guess"]
    for row, mode in zip(rows[2:4], ("time", "behavior, shuffled"), strict=True):
        assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", row[1]) and 0 < float(row[5]) <= 1
        with np.load(tmp_path / f"{mode}-seed-1" / "embedding.npz") as file:
            assert file["z"].shape == (600, 3)
    with pytest.raises(images.InputError, match="--mode: not for this experiment"):
        neural.main([*small, "--mode", "time"])


def test_neural_beside_a_package(tmp_path, monkeypatch):
    """A stand-in for the package, on the path of the process of its own: it must get the arrays, flags and steps."""
    monkeypatch.setattr(recordings, "make_track", lambda: make_track(seconds=15, neurons=8))
    small = ["--epochs", "2", "--batch-size", "64", "--out", str(tmp_path / "runs"), "--peer", "--rows", "behavior"]
    code = """
        import numpy as np
        __version__ = "0.0"
        class CEBRA:
            def __init__(self, **given):
                assert given["max_iterations"] == 14 and given["conditional"] == "time_delta", given
                assert given["time_offsets"] == 10 and given["batch_size"] == 64 and given["device"] == "cpu"
            def fit(self, spikes, behavior, labels):
                assert spikes.shape == (480, 8) and behavior.shape == (480, 1) and labels.shape == (480,)
            def transform(self, spikes):
                return spikes[:, :3]
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "cebra.py").write_text(textwrap.dedent(code))
    run = subprocess.run

    def with_the_package(command, **given):
        start = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        return run([*command[:3], start + command[3], *command[4:]], **given)

    with monkeypatch.context() as patch:
        patch.setattr(neural.subprocess, "run", with_the_package)
        lines = neural.main(small).splitlines()
    assert lines[3].startswith("| behavior, cebra 0.0 |") and len(lines) == 4
    absent = "import sys; sys.modules['cebra'] = None\n"
    with monkeypatch.context() as patch, pytest.raises(images.InputError, match="pip install cebra"):
        patch.setattr(neural.subprocess, "run", lambda c, **given: run([*c[:3], absent + c[3], *c[4:]], **given))
        neural.main(small)
