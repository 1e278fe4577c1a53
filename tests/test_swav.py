"""The paper's codes, loss, prototypes, multi-crop and queue, and whole runs of the script."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import images
import swav
from tests.helpers import (
    at_each_step,
    moved_by,
    one_step,
    refusal,
    resumes_bit_for_bit,
    saved,
    train,
    trains_in_pieces,
)

SMALL = {"hidden_dim": 32, "projection_dim": 16, "prototypes": 24, "freeze_prototypes_epochs": 0.0}
QUICK = SMALL | {"image_size": 16, "crops": "2x16,1x8", "queue_size": 64, "queue_start_epoch": 1.0}


def config(**given):
    return swav.Config.preset("demo", **given)


def scores_of(b, k, d=8, seed=0):
    """Cosines of b images and k prototypes (b, k), float64."""
    torch.manual_seed(seed)
    return F.normalize(torch.randn(b, d, dtype=torch.float64), dim=1) @ F.normalize(torch.randn(d, k).double(), dim=0)


# ----------------------------------------------------------------------------------------------------- the codes


def plain_sinkhorn(scores, epsilon, iterations):
    """Q (K, B) of equation 5 by multiplications: rows to 1/K, then columns to 1/B."""
    q = torch.exp(scores.T / epsilon)
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b, k", [(7, 3), (64, 24), (24, 64), (257, 100)])
def test_three_iterations_equal_a_plain_implementation(b, k, dtype):
    scores = scores_of(b, k).to(dtype)
    ours = swav.sinkhorn(scores, 0.05, 3)
    theirs = plain_sinkhorn(scores.double(), 0.05, 3)
    assert ours.dtype == torch.float32 and ours.shape == (b, k)
    assert (ours - b * theirs.T).abs().max() < 1e-6


@pytest.mark.parametrize("b, k", [(6, 4), (32, 32), (20, 50)])
def test_after_many_iterations_every_image_and_every_prototype_has_its_share(b, k):
    q = swav.sinkhorn(scores_of(b, k), 0.05, 500).T / b  # the paper's (K, B)
    assert (q.sum(1) - 1 / k).abs().max() < 1e-3 / k and (q.sum(0) - 1 / b).abs().max() < 1e-3 / b
    three = swav.sinkhorn(scores_of(b, k), 0.05, 3)
    assert torch.allclose(three.sum(1), torch.ones(b))  # whatever their number, a code is a distribution


def objective(q, scores, epsilon):
    """Equation 3 of Q (K, B)."""
    return (q * scores.T).sum() + epsilon * torch.special.entr(q).sum()


def test_codes_are_the_optimum_of_the_entropic_problem():
    """No other point of the polytope has a larger objective, and a long iteration in float64 is the same one."""
    scores, epsilon = scores_of(6, 4), 0.1
    best = plain_sinkhorn(scores, epsilon, 10_000)
    ours = swav.sinkhorn(scores, epsilon, 1000).double().T / 6
    assert (ours - best).abs().max() < 1e-6
    for seed in range(100):  # a step within the polytope: rows and columns of the change sum to 0
        torch.manual_seed(seed)
        change = torch.randn(4, 6, dtype=torch.float64)
        change -= change.mean(0)
        change -= change.mean(1, keepdim=True)
        other = best + 1e-3 * best.min() * change
        assert other.min() > 0 and objective(other, scores, epsilon) < objective(best, scores, epsilon)


def test_with_epsilon_to_0_codes_are_the_best_assignment():
    """Of linear programming over the polytope of B = K = 5, whose corners are the permutations (Birkhoff)."""
    scores = scores_of(5, 5, seed=3)
    best = max(itertools.permutations(range(5)), key=lambda p: sum(scores[i, p[i]] for i in range(5)))
    assert list(best) != scores.argmax(1).tolist()  # equal shares change it
    for epsilon in (1e-2, 1e-3):
        codes = swav.sinkhorn(scores, epsilon, 20_000)
        value = (codes.double() * scores).sum()
        assert abs(value - sum(scores[i, best[i]] for i in range(5))) < 5 * epsilon * math.log(5)
    assert codes.argmax(1).tolist() == list(best) and codes.amax(1).min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epsilon", [1e-40, 1e-6, 1e-3, 0.05, 10.0, 1e30])
@pytest.mark.parametrize("b, k", [(1, 1), (1, 9), (9, 1), (33, 7)])
def test_codes_are_safe_for_any_epsilon_and_size(b, k, epsilon, dtype):
    codes = swav.sinkhorn(scores_of(b, k).to(dtype), epsilon, 3)
    assert torch.isfinite(codes).all() and torch.allclose(codes.sum(1), torch.ones(b))


def test_without_iterations_codes_are_softmaxes():
    scores = scores_of(8, 5)
    assert torch.allclose(swav.sinkhorn(scores, 0.05, 0), (scores / 0.05).softmax(1).float(), atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the loss


def test_swapped_prediction_is_equation_2():
    scores, codes, tau = scores_of(6, 4).requires_grad_(), torch.rand(6, 4).double().softmax(1), 0.1
    loss = swav.swapped_prediction(scores, codes, tau)
    total = 0
    for b in range(6):
        p = torch.exp(scores[b] / tau) / torch.exp(scores[b] / tau).sum()
        total += -sum(codes[b, k] * torch.log(p[k]) for k in range(4))
    assert torch.allclose(loss, total / 6, rtol=1e-12)
    (grad,) = torch.autograd.grad(loss, scores)
    assert torch.allclose(grad, ((scores / tau).softmax(1) - codes) / tau / 6, rtol=1e-9, atol=1e-15)


def test_closed_forms():
    """Equal scores know nothing: log K, whatever the code; its own one-hot code costs next to nothing."""
    codes = swav.sinkhorn(scores_of(10, 6), 0.05, 3)
    assert math.isclose(swav.swapped_prediction(torch.zeros(10, 6), codes).item(), math.log(6), rel_tol=1e-6)
    assert swav.swapped_prediction(10 * torch.eye(6), torch.eye(6)).item() < 1e-6


def test_no_gradient_flows_into_codes():
    scores = scores_of(6, 4).requires_grad_()
    assert not swav.sinkhorn(scores, 0.05, 3).requires_grad
    codes = torch.rand(6, 4).requires_grad_()
    swav.swapped_prediction(scores, codes, 0.1).backward()
    assert codes.grad is None and scores.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------- steps of a run


def by_hand(model, views, large, epsilon=0.05, tau=0.1):
    """Equation 6, written out."""
    sizes = sorted({x.shape[-1] for x in views}, reverse=True)
    h = torch.cat([model.backbone(torch.cat([x for x in views if x.shape[-1] == size])) for size in sizes])
    z = model.projector(h)
    scores = (z / z.norm(dim=1, keepdim=True) @ model.prototypes.weight.T).chunk(len(views))
    total = 0
    for i in range(large):
        q = (len(views[0]) * plain_sinkhorn(scores[i].detach().double(), epsilon, 3).T).float()
        for v in range(len(views)):
            if v != i:
                total = total - (q * torch.log_softmax(scores[v] / tau, 1)).sum(1).mean()
    return total


@pytest.mark.parametrize(
    "crops, large, pairs", [("2x32", 2, 2), ("2x32,3x16", 2, 8), ("1x32,2x16", 1, 2), ("3x32,1x24,2x16", 3, 15)]
)
def test_a_step_is_sgd_on_equation_6(crops, large, pairs, tmp_path, monkeypatch, capsys):
    """Weight decay on everything, BN and biases too; prototypes go back to length 1."""
    given = SMALL | {"optimizer": "sgd", "lr": 0.4, "crops": crops, "epsilon": 0.05}
    metrics, start, views = one_step(swav, given, tmp_path, monkeypatch)
    assert f"a guess has the loss {pairs * math.log(24):.3f}" in capsys.readouterr().out
    sizes = [int(kind.split("x")[1]) for kind in crops.split(",") for _ in range(int(kind.split("x")[0]))]
    assert [x.shape[-1] for x in views] == sizes
    loss = by_hand(start["model"], views, large)
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    model, after = start["model"], saved(tmp_path)
    c = model.prototypes.weight
    (grad,) = torch.autograd.grad(loss, c, retain_graph=True)
    stepped = F.normalize(c.detach() - 0.4 * (grad + 0.1 * c.detach()), dim=1)
    assert torch.allclose(after["prototypes.weight"], stepped, rtol=1e-4, atol=2e-6)
    c.requires_grad_(False)
    moved_by(loss, model, after | {"prototypes.weight": c}, 0.4, lambda p: 0.1)  # all else is plain SGD


def test_lars_adapts_every_tensor_with_the_rate_outside_the_momentum(tmp_path, monkeypatch):
    """As apex's LARC around SGD, which the authors use: BN and biases are no exception."""
    given = SMALL | {"optimizer": "lars", "lr": 4.0, "weight_decay": 0.01}
    _, start, views = one_step(swav, given, tmp_path, monkeypatch)
    by_hand(start["model"], views, 2, config().epsilon).backward()
    after = saved(tmp_path)
    assert not saved(tmp_path, "optimizer")["param_groups"][0]["lr_in_momentum"]
    for name, p in start["model"].named_parameters():
        if name == "projector.0.bias":  # BN takes it off: its gradient is rounding
            continue
        grad = p.grad + 0.01 * p.detach()
        rate = 0.001 * p.norm() / grad.norm() if p.norm() > 0 and grad.norm() > 0 else 1.0
        expected = p.detach() - 4.0 * rate * grad
        expected = F.normalize(expected, dim=1) if name.startswith("prototypes") else expected
        assert torch.allclose(after[name], expected, rtol=1e-3, atol=1e-5), name


def test_prototypes_stand_still_in_the_first_epochs_and_stay_on_the_sphere(tmp_path, monkeypatch):
    seen = []
    at_each_step(monkeypatch, lambda run, *_: seen.append(run.model.prototypes.weight.detach().clone()))
    given = SMALL | {"freeze_prototypes_epochs": 1.0, "weight_decay": 0.1}
    train(swav, tmp_path, **given, epochs=3)
    torch.manual_seed(images.seed_of(0))
    seen.insert(0, swav.SwAV(config(**given)).prototypes.weight.detach())
    assert len(seen) == 10 and all(torch.allclose(c.norm(dim=1), torch.ones(24), atol=1e-6) for c in seen)
    same = [torch.allclose(a, b, atol=1e-6) for a, b in itertools.pairwise(seen)]
    assert same == [True, True, True, False, False, False, False, False, False]  # 3 steps an epoch


def test_the_queue_holds_the_last_z_of_each_large_crop_and_takes_part_in_time(tmp_path, monkeypatch):
    asked, logged, sinkhorn = [], [], swav.sinkhorn

    def spy_sinkhorn(scores, *settings):
        asked.append(scores.clone())
        return sinkhorn(scores, *settings)

    monkeypatch.setattr(swav, "sinkhorn", spy_sinkhorn)
    queues, prototypes = [], []
    forward = swav.SwAV.forward
    monkeypatch.setattr(swav.SwAV, "forward", lambda m, *x: logged.append(forward(m, *x)) or logged[-1])

    def look(run, *_):
        queues.append(run.model.queue.clone())
        prototypes.append(run.model.prototypes.weight.detach().clone())

    at_each_step(monkeypatch, look)
    given = SMALL | {"queue_size": 100, "queue_start_epoch": 1.0, "crops": "2x32,1x16"}
    train(swav, tmp_path, **given, epochs=2)
    assert [len(scores) for scores in asked] == [64] * 6 + [164] * 6  # 3 steps an epoch, two large crops
    past = torch.cat([z[:, :2] for z, _ in logged[:3]]).transpose(0, 1)[:, -100:].detach()  # of the first epoch
    for crop in range(2):
        held = {tuple(row) for row in queues[2][crop].tolist()}
        assert held == {tuple(row) for row in past[crop].tolist()}
        z, scores = logged[3]
        assert torch.equal(asked[6 + crop][:64], scores[:, crop])  # this batch, whose codes are taken
        assert torch.allclose(asked[6 + crop][64:], queues[2][crop] @ prototypes[2].T, atol=1e-5)
    model = swav.SwAV(config(**given, batch_size=64))
    model.queue.copy_(queues[2])
    scores = torch.rand(9, 24)
    expected = sinkhorn(torch.cat([scores, model.queue[1] @ model.prototypes.weight.T]), 0.05, 3)[:9]
    model.config.epsilon = 0.05
    assert torch.allclose(model.codes(scores, 1, True), expected, atol=1e-6)


def test_a_queue_waits_until_it_is_full(tmp_path, monkeypatch):
    asked, sinkhorn = [], swav.sinkhorn
    monkeypatch.setattr(swav, "sinkhorn", lambda scores, *rest: asked.append(len(scores)) or sinkhorn(scores, *rest))
    train(swav, tmp_path, **SMALL, epochs=2, queue_size=128, queue_start_epoch=0.0)
    assert asked == [64] * 4 + [192] * 8


def test_the_rate_starts_and_ends_where_the_paper_says(tmp_path, monkeypatch):
    rates = []
    at_each_step(monkeypatch, lambda run, *_: rates.append(run.parts["optimizer"].param_groups[0]["lr"]))
    given = {"warmup_epochs": 1.0, "lr": 4.8, "warmup_start_scale": 0.0625, "final_lr_scale": 0.001}
    train(swav, tmp_path, **SMALL | given, epochs=2, optimizer="lars")
    half = [0.0048 + (4.8 - 0.0048) * (1 + math.cos(math.pi * t / 3)) / 2 for t in range(3)]
    assert rates == pytest.approx([0.3 + 4.5 / 3, 0.3 + 9 / 3, 4.8, *half])


def test_a_run_resumes_bit_for_bit_with_its_queue(tmp_path, monkeypatch):
    resumes_bit_for_bit(swav, QUICK, tmp_path, monkeypatch)


def test_each_kind_of_crop_has_its_range_of_areas(tmp_path, monkeypatch):
    asked, views = [], images.Images.views

    def spy(split, batches, crops, *rest, **named):
        asked.append(list(crops))
        return views(split, batches, crops, *rest, **named)

    monkeypatch.setattr(images.Images, "views", spy)
    given = SMALL | {"crops": "2x32,2x16,1x24", "crop_min_scale": 0.3, "small_crop_min_scale": 0.1}
    train(swav, tmp_path, **given)
    assert asked[:1] == [[(32, (0.3, 1.0))] * 2 + [(16, (0.1, 0.3))] * 2 + [(24, (0.1, 0.3))]]


def test_micro_batches(tmp_path):
    trains_in_pieces(swav, QUICK | {"epochs": 2}, tmp_path)


def test_pieces_have_the_rows_of_the_whole():
    """The outputs have a row an image, so that a batch in pieces is that batch (BN in eval mode)."""
    torch.manual_seed(0)
    model, views = swav.SwAV(config(**SMALL)).eval(), [torch.rand(8, 3, s, s) for s in (32, 32, 16)]
    z, scores = whole = model(*views)
    pieces = [
        torch.cat(rows) for rows in zip(*(model(*(x[i : i + 2] for x in views)) for i in range(0, 8, 2)), strict=True)
    ]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, pieces, strict=True))
    assert z.shape == (8, 3, 16) and scores.shape == (8, 3, 24)
    for v, x in enumerate(views):
        assert torch.allclose(z[:, v], F.normalize(model.embed(x), dim=1), atol=1e-5)
    assert torch.allclose(scores, z @ model.prototypes.weight.T, atol=1e-5)


def test_bn_of_f_sees_the_crops_of_a_size_and_that_of_g_sees_all():
    model = swav.SwAV(config(**SMALL))
    seen = []
    model.backbone.register_forward_pre_hook(lambda m, x: seen.append(tuple(x[0].shape[::3])))
    model.projector.register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    model(*(torch.rand(4, 3, s, s) for s in (32, 32, 16, 16, 16)))
    assert seen == [(8, 32), (12, 16), 20]


def test_views_png_shows_all_crops_at_one_size(tmp_path):
    train(swav, tmp_path, **SMALL, crops="2x32,2x16")
    assert Image.open(tmp_path / "views.png").size == (8 * 98 + 2, 4 * 98 + 2)


# --------------------------------------------------------------------------------------------------- the network


def test_the_network_is_the_authors():
    model = swav.SwAV(swav.Config(backbone="resnet18"))
    kinds = [type(m) for m in model.projector]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert all(m.bias is not None for m in model.projector if isinstance(m, nn.Linear))
    assert model.projector[0].out_features == 512 and model.projector[3].out_features == 128
    assert model.prototypes.weight.shape == (3000, 128) and model.prototypes.bias is None
    assert all(block.bn2.weight.min() == 1 for block in model.backbone.layer1)
    assert not hasattr(model, "queue")


def test_presets_are_the_authors_scripts():
    paper = swav.Config()
    assert (paper.crops, paper.prototypes, paper.epsilon, paper.sinkhorn_iterations) == ("2x224,6x96", 3000, 0.05, 3)
    assert (paper.temperature, paper.lr, paper.batch_size, paper.weight_decay) == (0.1, 4.8, 4096, 1e-6)
    assert math.isclose(paper.lr * paper.warmup_start_scale, 0.3)
    assert math.isclose(paper.lr * paper.final_lr_scale, 0.0048)
    assert (paper.crop_min_scale, paper.small_crop_min_scale) == (0.14, 0.05)
    small = swav.Config.preset("paper-256")
    assert (small.lr, small.queue_size, small.queue_start_epoch, small.warmup_epochs) == (0.6, 3840, 15, 0)
    assert swav.Config.preset("paper-2x224").crop_min_scale == 0.08


def test_crops_are_read():
    assert swav.crop_kinds("2x224,6x96") == [(2, 224), (6, 96)]
    assert swav.crop_kinds("1x8,12x10,2x9") == [(1, 8), (12, 10), (2, 9)] and swav.crop_kinds("2x32") == [(2, 32)]


@pytest.mark.parametrize(
    "text",
    ["", "2", "2x", "x32", "2x32,", "2x32;1x16", "2x32 ,1x16", "0x32", "2x4", "-2x32", "1x32", "2x32,1x7", "100x32"]
    + ["2x32,1x16,1x32", "2x32,2x32", "02x32"],
)
def test_other_crops_are_refused(text, tmp_path, capsys):
    assert f"--crops {text}: give two crops or more" in refusal(swav, [f"--crops={text}"], tmp_path, capsys)


def test_without_equal_shares_a_few_prototypes_take_all():
    torch.manual_seed(0)
    z = F.normalize(torch.randn(64, 8) + 3, dim=1)  # outputs that lean one way, as those of a young network
    scores = z @ F.normalize(torch.randn(8, 16), dim=0)
    used = {n: len(swav.sinkhorn(scores, 0.02, n).argmax(1).unique()) for n in (0, 3)}
    assert used[0] < 6 and used[3] > 12


def test_a_queue_that_no_run_can_have_is_refused(tmp_path, capsys):
    for flags, words in ((["--queue-size", 40], "--queue-size 40"), (["--queue-size", 9999], "--queue-size 9999")):
        assert words in refusal(swav, [*flags, "--queue-start-epoch", 0], tmp_path, capsys)


def test_in_mixed_precision_scores_and_codes_are_float32(tmp_path, monkeypatch):
    """A bfloat16 cosine is known to 0.004, which epsilon would blow up; and the loss is near that of float32."""
    found, dtypes, sinkhorn = {}, set(), swav.sinkhorn
    monkeypatch.setattr(swav, "sinkhorn", lambda s, *rest: dtypes.add(s.dtype) or sinkhorn(s, *rest))
    for amp in ("off", "bf16"):
        found[amp] = train(swav, tmp_path / amp, **QUICK | {"epochs": 2}, amp=amp)["loss"]
    assert dtypes == {torch.float32} and math.isclose(found["off"], found["bf16"], rel_tol=0.05)
