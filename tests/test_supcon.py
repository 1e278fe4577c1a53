"""The paper's losses, the cross-entropy baseline, the recipe, and whole runs."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import common
import images
import kernels
import linear_eval
import simclr
import supcon
from tests.helpers import (
    WARM_UP_AND_COSINE,
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

SMALL = {"hidden_dim": 32, "projection_dim": 16}


def config(**given):
    return supcon.Config.preset("demo", **given)


def pictures(folder, **given):
    return images.load(config(data=str(folder), **given), torch.device("cpu"))


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
    "odd ids": [10**12, -2, -2, 10**12, -7, -7, 4, -2],
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
    labels = torch.randperm(9).repeat(2) * 13 - 42
    ours = supcon.sup_con(torch.cat([z1, z2]), labels, 0.2, loss=loss)
    assert torch.allclose(ours, simclr.nt_xent(z1, z2, 0.2), rtol=1e-12)


@pytest.mark.parametrize("loss", ["out", "in"])
def test_a_row_without_a_label_is_a_negative_without_positives(loss):
    torch.manual_seed(0)
    z = torch.randn(6, 5, dtype=torch.float64)
    ours, alone = (supcon.sup_con(z, torch.tensor([1, 1, *ids, 2, 2]), 0.2, loss=loss) for ids in ([-1, -1], [7, 8]))
    assert torch.equal(ours, alone)


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
def test_the_fused_loss_agrees(loss):
    torch.manual_seed(0)
    labels = torch.randint(-3, 12, (70,))
    labels[:4] = torch.tensor([100, 200, -300, 400])
    results = []
    for function in (supcon.sup_con, lambda *a, **k: kernels.sup_con(*a, backend="blocked", **k)):
        z = torch.randn(70, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        value = function(z, labels, 0.1, loss=loss)
        results.append((value, *torch.autograd.grad(value, z)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("flags", [
    {}, {"loss": "in"}, {"loss_backend": "blocked"}, {"loss": "in", "loss_backend": "blocked"},
    {"base_temperature": 0.07}, {"base_temperature": 0.07, "loss_backend": "blocked"}, {"loss": "cross-entropy"},
], ids=lambda f: "-".join(map(str, f.values())) or "default")  # fmt: skip
def test_a_step_is_sgd_on_equation_2_or_3(flags, tmp_path, monkeypatch):
    """Times tau over its base (section 4.5); of the method's file or of kernels/; the weight decay is on everything."""
    fused, used = kernels.sup_con, []
    monkeypatch.setattr(kernels, "sup_con", lambda *a, **k: used.append(k["backend"]) or fused(*a, **k))
    c = SMALL | {"optimizer": "sgd", "lr": 0.3, "temperature": 0.2, "base_temperature": 1.0, "loss_backend": "naive"}
    c |= flags
    metrics, start, views = one_step(supcon, c, tmp_path, monkeypatch)
    assert used == ["blocked"] * (c["loss_backend"] == "blocked")
    z, y = start["model"].embed(torch.cat(views)), start["labels"].repeat(2)  # BN over both views
    if c.get("loss") == "cross-entropy":
        loss = F.cross_entropy(start["classifier"](z), y)
    else:
        loss = 0.2 / c["base_temperature"] * supcon.sup_con(z, y, 0.2, loss=c.get("loss", "out"))
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-5)
    trained = torch.nn.ModuleDict({name: start[name] for name in ("model", "classifier") if name in start})
    after = {f"{part}.{name}": value for part in trained for name, value in saved(tmp_path, part).items()}
    moved_by(loss, trained, after, 0.3, lambda p: 0.1)


# ------------------------------------------------------------------------------------------ the model, the recipe


def test_the_head_is_the_papers():
    head = supcon.SupCon(config(hidden_dim=0, projection_dim=128)).projector
    assert [type(m).__name__ for m in head] == ["Linear", "ReLU", "Linear"]
    assert head[0].out_features == 128 and head[0].bias is not None and head[2].bias is not None
    linear = supcon.SupCon(config(projection_head="linear", projection_dim=17)).projector
    assert type(linear).__name__ == "Linear" and (linear.in_features, linear.out_features) == (128, 17)
    assert linear.bias is None
    model = supcon.SupCon(config(loss="cross-entropy")).eval()
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(torch.cat(model(x[:2], x[2:])), model.backbone(x)) and model.dim == 128
    deep = supcon.SupCon(config(backbone="resnet18")).backbone
    assert all((block.bn2.weight == 1).all() for block in [*deep.layer1, *deep.layer4])  # as the authors start it


PAPER = dict(  # google-research/supcon: scripts/supcon_imagenet_resnet50.sh, configs.sh, hparams_flags.py
    loss="out", temperature=0.1, base_temperature=1.0, epochs=350, batch_size=6144, optimizer="lars",
    lr=9.6, weight_decay=1e-3, warmup_epochs=12.0, normalize_h=True, zero_init=True,
    projection_head="linear", projection_dim=128, crop_min_scale=0.08, jitter_strength=1.0, blur=0.5,
    backbone="resnet50", image_size=224, stem="imagenet",
)  # fmt: skip
CIFAR = PAPER | dict(  # HobbitLong/SupContrast
    data="cifar10", image_size=32, stem="cifar", epochs=1000, batch_size=1024, optimizer="sgd", lr=0.5,
    weight_decay=1e-4, base_temperature=0.07, warmup_epochs=10.0, normalize_h=False, zero_init=False,
    projection_head="mlp", hidden_dim=0, crop_min_scale=0.2, jitter_strength=0.5, blur=0.0,
)  # fmt: skip
PHOTOS = {"backbone": "resnet18", "image_size": 128}  # ours


@pytest.mark.parametrize("preset, published", [("paper", PAPER), ("cifar", CIFAR), ("photos", PHOTOS)])
def test_presets_are_as_published(preset, published):
    c = supcon.Config.preset(preset)
    assert {name: getattr(c, name) for name in published} == published


def test_the_views_are_the_authors(monkeypatch):
    for preset, s, blur in (("cifar", 0.5, 0.0), ("paper", 1.0, 0.5)):
        jitter = ("color_jitter", 0.8, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
        assert recipe(supcon, monkeypatch, supcon.Config.preset(preset)) == [
            ("hflip", 0.5), jitter, ("grey", 0.2), ("gaussian_blur", blur)]  # fmt: skip


@pytest.mark.parametrize("backbone", ["resnet8", "resnet18"])
def test_h_of_length_1_is_what_the_head_the_classifier_and_knn_get(backbone, photos, tmp_path):
    """Section 3.1. The baseline's h has any length; backbone.pt is the same with and without."""
    given = SMALL | {"normalize_h": True, "zero_init": True, "backbone": backbone}
    out = train(supcon, tmp_path / "run", pictures(photos), **given, epochs=1)["out"]
    model, x = common.load_run(out)[1], torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(model.backbone(x).norm(dim=1), torch.ones(4))
    assert torch.equal(model.embed(x), model.projector(model.backbone(x)))
    for flags in ("", "--protocol finetune --batch-size 32 --epochs 1"):
        with torch.random.fork_rng():
            linear_eval.main([out, "--data", str(photos), *flags.split()])
    with pytest.raises(common.InputError, match="is not a torchvision ResNet's"):
        linear_eval.main([out, "--save", str(tmp_path / "c.pt")])
    state = torch.load(f"{out}/backbone.pt", weights_only=True)
    assert not [name for name in state if name.startswith("fc")]
    baseline = supcon.SupCon(config(**given, loss="cross-entropy")).eval()
    assert not torch.allclose(baseline.backbone(x).norm(dim=1), torch.ones(4), atol=0.1)
    last = [m.weight for name, m in supcon.SupCon(config(**given)).named_modules() if name.endswith(".bn2")]
    assert last and all((weight == 0).all() == (backbone == "resnet18") for weight in last)


@pytest.mark.parametrize("loss", ["out", "in", "cross-entropy"])
def test_the_schedule_and_the_crops(loss, tmp_path, monkeypatch, capsys):
    given = SMALL | {"lr": 0.3, "loss": loss, "temperature": 0.1, "base_temperature": 0.07}
    rates, logged = follows_the_schedule(supcon, given, tmp_path, monkeypatch)
    assert rates == [pytest.approx([0.3 * share] * len(rates[0])) for share in WARM_UP_AND_COSINE]
    baseline = loss == "cross-entropy"
    assert all(z.shape == (128, 128 if baseline else 16) for z, _, _ in logged)
    out, guess = capsys.readouterr().out, math.log(10) if baseline else 0.1 / 0.07 * math.log(127)
    assert "peak lr 0.3\n" in out and f"a guess has the loss {guess:.3f}" in out  # not scaled by N
    said = f"sup_con {loss}, times tau over its base: 0.1 / 0.07 = 1.42857"
    assert ("cross-entropy; temperature, projection head and --normalize-h are unused" if baseline else said) in out


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("loss", ["out", "cross-entropy"])
def test_the_optimizer(loss, optimizer, tmp_path):
    """LARS as SimCLR's, which spares BN and biases; SGD decays everything. The classifier is trained with the rest."""
    train(supcon, tmp_path, **SMALL, loss=loss, optimizer=optimizer, weight_decay=1e-3)
    groups = saved(tmp_path, "optimizer")["param_groups"]
    assert all(g["momentum"] == 0.9 for g in groups)
    assert [g["weight_decay"] for g in groups] == ([1e-3, 0.0] if optimizer == "lars" else [1e-3])
    model = supcon.SupCon(config(**SMALL, loss=loss))
    weights = sum(p.ndim > 1 for p in model.parameters()) + (loss == "cross-entropy")
    everything = len(list(model.parameters())) + 2 * (loss == "cross-entropy")
    sizes = [weights, everything - weights] if optimizer == "lars" else [everything]
    assert [len(g["params"]) for g in groups] == sizes
    if optimizer == "lars":
        assert groups[0]["adapt"] and not groups[1]["adapt"] and groups[0]["lr_in_momentum"]


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("flags", [
    {"loss": "in", "loss_backend": "blocked", "amp": "bf16"}, {"loss": "cross-entropy", "amp": "bf16"},
    {"optimizer": "lars", "amp": "bf16"},
], ids=lambda f: "-".join(map(str, f.values())))  # fmt: skip
def test_options_run_and_the_next_command_evaluates_them(flags, photos, tmp_path, capsys):
    assert math.isfinite(train(supcon, tmp_path, pictures(photos), **SMALL | flags)["loss"])
    _, model = common.load_run(tmp_path)
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in backbone.items())
    script, *words = capsys.readouterr().out.split("next: python ")[1].split()
    assert script == "linear_eval.py" and words[0] == str(tmp_path)
    assert 0 <= linear_eval.main(words)["linear_top1"] <= 1


@pytest.mark.parametrize("loss", ["out", "cross-entropy"])
def test_pieces(loss, tmp_path):
    trains_in_pieces(supcon, SMALL | {"loss": loss}, tmp_path)


@pytest.mark.parametrize("given", [
    {}, {"loss": "cross-entropy", "optimizer": "sgd"}, {"resident_gb": 0.0, "workers": 1},
], ids=["resident", "cross-entropy", "streamed"])  # fmt: skip
def test_an_interrupted_run_resumes_bit_for_bit(given, photos, tmp_path, monkeypatch):
    """The baseline's classifier too."""
    whole, resumed = resumes_bit_for_bit(supcon, SMALL | given, tmp_path, monkeypatch, pictures(photos, **given))
    assert whole["loss"] == resumed["loss"]
    assert ("classifier" in torch.load(tmp_path / "cut" / "checkpoint.pt")["parts"]) == ("loss" in given)
    again = supcon.train(common.parse_args(supcon.Config, ["--resume", str(tmp_path / "cut")]))  # all is done
    assert again["loss"] == whole["loss"]


@pytest.mark.parametrize("backend", ["naive", "blocked"])
def test_images_without_a_label_are_classes_of_their_own(backend, photos, tmp_path, monkeypatch, capsys):
    photos = shutil.copytree(photos, tmp_path / "photos")
    for i in range(3):
        shutil.copy(next((photos / "0").iterdir()), photos / f"extra{i}.png")
    data = pictures(photos)
    given = SMALL | {"batch_size": 223, "optimizer": "sgd", "loss_backend": backend}  # all images in one step
    metrics, start, views = one_step(supcon, given, tmp_path / "run", monkeypatch, data)
    y = start["labels"]
    assert (y < 0).sum() == 3
    y = torch.where(y < 0, 1000 + torch.arange(223), y).repeat(2)
    z = start["model"].embed(torch.cat(views))
    assert math.isclose(metrics["loss"], supcon.sup_con(z, y, 0.1).item(), rel_tol=1e-5)
    assert "3 images have no label" in refusal(supcon, ["--loss", "cross-entropy"], tmp_path / "run", capsys, data)


def test_data_without_labels_is_one_line(photos, tmp_path, capsys):
    flat = shutil.copytree(photos / "0", tmp_path / "flat")
    line = refusal(supcon, ["--batch-size", 8], tmp_path / "run", capsys, pictures(flat))
    assert f"--data {flat}: no image has a label; give two class sub-folders or more" in line
    with pytest.raises(common.InputError, match="no image has a label"):
        train(supcon, tmp_path / "run", torch.zeros(80, 3, 32, 32, dtype=torch.uint8))
