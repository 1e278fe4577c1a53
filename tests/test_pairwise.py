"""Each loss against its paper's formula, its weights of negatives, and runs of the script."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

import images
import pairwise
import simclr
from tests.helpers import (
    WARM_UP_AND_COSINE,
    follows_the_schedule,
    moved_by,
    one_step,
    resumes_bit_for_bit,
    saved,
    train,
    trains_in_pieces,
)

TINY = {"projection_dim": 16}
TAU, EPSILON, MARGIN, SLOPE = 0.3, 0.7, 1.1, 4.0
GIVEN = {"temperature": TAU, "epsilon": EPSILON, "margin": MARGIN, "slope": SLOPE}
STEP = lambda x: (x > 0).to(x)  # noqa: E731
FAMILY = {  # phi, phi', psi, psi', as the overview of the family has them
    "infonce": (
        *(lambda x: TAU * torch.log(EPSILON + x), lambda x: TAU / (EPSILON + x)),
        *(lambda x: torch.exp(x / TAU), lambda x: torch.exp(x / TAU) / TAU),
    ),
    "mine": (torch.log, lambda x: 1 / x, torch.exp, torch.exp),
    "triplet": (lambda x: x, torch.ones_like, lambda x: F.relu(x + MARGIN), lambda x: STEP(x + MARGIN)),
    "soft-triplet": (
        *(lambda x: TAU * torch.log(1 + x), lambda x: TAU / (1 + x)),
        *(lambda x: torch.exp(x / TAU + MARGIN), lambda x: torch.exp(x / TAU + MARGIN) / TAU),
    ),
    "n-pair": (lambda x: torch.log(1 + x), lambda x: 1 / (1 + x), torch.exp, torch.exp),
    "lifted": (
        *(lambda x: F.relu(torch.log(x)) ** 2, lambda x: 2 * F.relu(torch.log(x)) / x),
        *(lambda x: torch.exp(x + MARGIN), lambda x: torch.exp(x + MARGIN)),
    ),
    "sigmoid-triplet": (
        *(lambda x: x, torch.ones_like, lambda x: torch.sigmoid(SLOPE * x)),
        lambda x: SLOPE * torch.sigmoid(SLOPE * x) * torch.sigmoid(-SLOPE * x),
    ),
    "linear": (lambda x: x, torch.ones_like, lambda x: x, torch.ones_like),
}


def config(**given):
    return pairwise.Config.preset("demo", **given)


def loss_of(name, d_pos, d_neg, **given):
    given = GIVEN | given
    return pairwise.LOSSES[name](d_pos, d_neg, **{constant: given[constant] for constant in pairwise.CONSTANTS[name]})


def views(n=6, d=5, seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, n, d, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("normalized", [True, False])
def test_distances_are_those_of_every_pair(normalized):
    z1, z2 = views()
    p, n = pairwise.distances(z1, z2, unit=normalized)
    z = torch.cat([z1, z2])
    z = z / z.norm(dim=1, keepdim=True) if normalized else z
    for i in range(12):
        for j in range(12):
            expected = ((z[i] - z[j]) ** 2).sum() / 2
            if j % 6 == i % 6:
                assert n[i, j] == math.inf and (i == j or torch.allclose(p[i, 0], expected))
            else:
                assert torch.allclose(n[i, j], expected)
    assert p.shape == (12, 1) and n.shape == (12, 12)


def test_negatives_of_other_classes_and_anchors_without_any():
    z1, z2 = views(4)
    p, n = pairwise.distances(z1, z2, torch.tensor([3, 1, 3, 2]))
    everything = pairwise.distances(z1, z2)
    assert torch.equal(p, everything[0])  # the other view stays the positive
    same = [{0, 2, 4, 6}, {1, 5}, {0, 2, 4, 6}, {3, 7}] * 2
    for i in range(8):
        assert set(n[i].isinf().nonzero().flatten().tolist()) == same[i]
        assert torch.equal(n[i][n[i].isfinite()], everything[1][i][n[i].isfinite()])
    z1.requires_grad_()
    p, n = pairwise.distances(z1, z2, torch.zeros(4))
    assert p.shape == (0, 1) and n.shape == (0, 8)
    for name in pairwise.LOSSES:
        assert loss_of(name, p, n).item() == 0


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_phi_of_the_sum_of_psi(name):
    """And the gradient is that of the pairs, weighted by alpha_ij = phi' psi'."""
    phi, dphi, psi, dpsi = FAMILY[name]
    p, n = (t.detach().requires_grad_() for t in pairwise.distances(*views(), torch.tensor([0, 1, 2, 2, 1, 0])))
    loss = loss_of(name, p, n)
    value = 0
    grad_p, grad_n = torch.autograd.grad(loss, (p, n))
    for i in range(12):
        x = p[i, 0] - n[i][n[i].isfinite()]
        value += phi(psi(x).sum()) / 12
        alpha = dphi(psi(x).sum()) * dpsi(x) / 12
        assert torch.allclose(grad_n[i][n[i].isfinite()], -alpha, rtol=1e-9)
        assert (grad_n[i][n[i].isinf()] == 0).all() and torch.allclose(grad_p[i, 0], alpha.sum(), rtol=1e-9)
    assert torch.allclose(loss, value, rtol=1e-12)


def by_the_papers(name, z, k):
    """The loss of anchor 0 of unit vectors z as its paper writes it: 1 is its positive, the k others its negatives."""
    a, p, n = z[0], z[1], z[2:]
    similar, others = a @ p, n @ a
    euclid, distances = (a - p).norm(), (n - a).norm(dim=1)
    if name == "infonce":  # van den Oord et al. 2018, with f = exp(cosine / tau)
        f, g = torch.exp(similar / TAU), torch.exp(others / TAU)
        return -torch.log(f / (f + g.sum())) * TAU
    if name == "mine":  # Belghazi et al. 2018: -(E T - log E exp T), T = -d
        return euclid**2 / 2 + torch.log(torch.exp(-(distances**2) / 2).mean()) + math.log(k)
    if name == "triplet":  # Schroff et al. 2015, of squared distances, at twice our margin: twice ours
        return F.relu(euclid**2 - distances**2 + 2 * MARGIN).sum() / 2
    if name == "n-pair":  # Sohn 2016
        return torch.log(1 + torch.exp(others - similar).sum())
    if name == "lifted":  # Oh Song et al. 2016, with d for their distance, of one of the pair's two ends
        return F.relu(torch.log(torch.exp(MARGIN - distances**2 / 2).sum()) + euclid**2 / 2) ** 2
    if name == "margin":  # Hadsell et al. 2006: similar and dissimilar pairs
        return euclid**2 / 2 + (F.relu(MARGIN - distances) ** 2 / 2).mean()
    if name == "hinge":
        return euclid**2 / 2 + F.relu(MARGIN - distances**2 / 2).mean()
    right = torch.sigmoid(similar / TAU - math.log(k)), torch.sigmoid(others / TAU - math.log(k))
    return -torch.log(right[0]) - torch.log(1 - right[1]).sum()  # Gutmann, Hyvarinen 2012: nu = k


@pytest.mark.parametrize("name", ["infonce", "mine", "triplet", "n-pair", "lifted", "margin", "hinge", "nce"])
def test_the_losses_are_those_of_their_papers(name):
    """Drawn negatives, of float64, with the gradient."""
    torch.manual_seed(1)
    z = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    unit = F.normalize(z, dim=1)
    d = (1 - unit @ unit[0])[None]
    ours = loss_of(name, d[:, 1:2], d[:, 2:], epsilon=1.0)
    theirs = by_the_papers(name, F.normalize(z, dim=1), 7)
    assert torch.allclose(ours, theirs, rtol=1e-12) and theirs > 0
    (a,), (b,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)


def test_infonce_is_simclrs_loss_times_tau():
    z1, z2 = views(9)
    p, n = pairwise.distances(z1, z2)
    for tau in (0.02, 0.5):
        assert torch.allclose(pairwise.info_nce(p, n, tau), tau * simclr.nt_xent(z1, z2, tau), rtol=1e-10)
    without = torch.stack([torch.logsumexp((p[i] - n[i])[n[i].isfinite()] / 0.5, 0) for i in range(18)])
    assert torch.allclose(pairwise.info_nce(p, n, 0.5, epsilon=0.0), 0.5 * without.mean())


@pytest.mark.parametrize("name", pairwise.LOSSES)
def test_finite_far_apart_and_at_one_point(name):
    """Without normalisation z may be long: no exp overflows; equal z have a distance of 0, whose root has no slope."""
    for z in (300 * torch.randn(2, 8, 4), torch.ones(2, 8, 4), torch.zeros(2, 8, 4)):
        z = z.requires_grad_()
        for normalized in (True, False):
            loss = loss_of(name, *pairwise.distances(*z, unit=normalized), temperature=0.01)
            (grad,) = torch.autograd.grad(loss, z)
            assert torch.isfinite(loss) and torch.isfinite(grad).all()


# ------------------------------------------------------------------------------------------- the model, the recipe


def test_the_table_of_the_docstring_has_a_row_for_each_loss():
    table = pairwise.__doc__.split("paper\n")[1].split("    f, g, z ")[0]
    rows = [line.split()[0] for line in table.split("\n") if re.match(r"    \S+  ", line)]
    assert rows == list(pairwise.LOSSES)


def test_a_constant_that_a_loss_does_not_take_is_refused():
    takes = {"infonce": {"temperature", "epsilon"}, "triplet": {"margin"}, "soft-triplet": {"temperature", "margin"}}
    takes |= {"lifted": {"margin"}, "sigmoid-triplet": {"slope"}, "margin": {"margin"}, "hinge": {"margin"}}
    takes |= {"nce": {"temperature"}}
    for name in pairwise.LOSSES:
        assert set(pairwise.CONSTANTS[name]) == takes.get(name, set())
    for name, constant in (("linear", "margin"), ("triplet", "epsilon"), ("n-pair", "temperature"), ("nce", "slope")):
        with pytest.raises(images.InputError, match=f"^--{constant}.*--loss {name}"):
            config(loss=name, **{constant: 0.3})


def test_the_head_leaves_the_length_of_z_free():
    model = pairwise.Pairwise(config(**TINY))
    assert [type(m).__name__ for m in model.projector] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    x = torch.rand(4, 3, 32, 32)
    z1, z2 = model(x[:2], x[2:])
    assert torch.equal(torch.cat([z1, z2]), model.embed(x)) and z1.shape == (2, 16)


def test_the_schedule(tmp_path, monkeypatch):
    rates, _ = follows_the_schedule(pairwise, {"lr": 0.01, **TINY}, tmp_path, monkeypatch)
    assert [r[0] for r in rates] == pytest.approx([0.01 * f for f in WARM_UP_AND_COSINE])


# ---------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("given", [
    {"loss": "infonce", "temperature": 0.4, "epsilon": 0.0},
    {"loss": "triplet", "margin": 0.3, "negatives": "other-class"},
    {"loss": "margin", "normalize": False, "margin": 2.0},
], ids=lambda given: given["loss"])  # fmt: skip
def test_a_step_is_the_optimisers_on_the_loss(given, tmp_path, monkeypatch):
    """With SGD in Adam's place, to see the gradient."""
    sgd = lambda groups, lr: torch.optim.SGD(groups, lr=lr)  # noqa: E731
    monkeypatch.setattr(torch.optim, "Adam", sgd)
    metrics, start, (x1, x2) = one_step(pairwise, {"lr": 0.3, **TINY, **given}, tmp_path, monkeypatch)
    z1, z2 = start["model"].embed(torch.cat([x1, x2])).chunk(2)
    labels = start["labels"] if given.get("negatives") else None
    d = pairwise.distances(z1, z2, labels, given.get("normalize", True))
    assert d[1].isinf().sum() > 2 * 400 if labels is not None else d[1].isinf().sum() == 2 * 400
    loss = loss_of(given["loss"], *d, **given)
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    moved_by(loss, start["model"], saved(tmp_path), 0.3, lambda p: 0.1 if p.ndim > 1 else 0.0)


def test_pieces(tmp_path):
    trains_in_pieces(pairwise, TINY, tmp_path)


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole, resumed = resumes_bit_for_bit(pairwise, {"loss": "nce"}, tmp_path, monkeypatch)
    assert whole["loss"] == resumed["loss"]


def test_the_picture_of_the_family_has_each_losss_weights(monkeypatch):
    module, drawn = pytest.importorskip("matplotlib.figure"), []
    monkeypatch.setattr(module.Figure, "savefig", lambda figure, path: drawn.append(figure))
    pairwise.draw_family(pairwise.Config.preset("demo"), "family.png")
    curves = {line.get_label(): torch.tensor(line.get_xydata()).T for line in drawn[0].axes[0].lines}
    assert [*curves] == [*pairwise.LOSSES]
    weights = {"infonce": lambda d: (-d / 0.2).exp(), "linear": torch.ones_like, "triplet": lambda d: (d < 1.5) * d**0}
    for name, weight in weights.items():
        d, y = curves[name]
        torch.testing.assert_close(y, weight(d) / weight(d).mean(), rtol=1e-3, atol=1e-6)


def test_other_classes_need_labels(tmp_path, monkeypatch):
    x = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    given = {"negatives": "other-class", "image_size": 16, "batch_size": 36}
    for data in (x, (x, torch.zeros(40))):
        with pytest.raises(images.InputError, match="--negatives other-class: .* no classes"):
            train(pairwise, tmp_path, data, **given)
    labels, asked, distances = torch.arange(40) % 3 - 1, [], pairwise.distances  # a third has none
    monkeypatch.setattr(pairwise, "distances", lambda z1, z2, y, unit: asked.append(y) or distances(z1, z2, y, unit))
    assert math.isfinite(train(pairwise, tmp_path, (x, labels), **given)["loss"])
    (y,) = asked
    assert len(y[y < 0].unique()) == (y < 0).sum() > 8  # each of these is a class of its own
    assert set(y[y >= 0].tolist()) == {0, 1}
