"""The evaluation, and its controls: shuffled labels, an untrained backbone, raw pixels, few labels."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
import images
import linear_eval
import moco
import simclr
from benchmarks import probes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few():
    """`shapes` of 1,000 training and 200 held-out images."""
    with pytest.MonkeyPatch.context() as patch:
        make = images.make_shapes
        patch.setattr(images, "make_shapes", lambda n, seed, size: make(n // 10, seed, size))
        yield


@pytest.fixture(scope="module")
def run_folder(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    simclr.train(simclr.Config.preset("demo", epochs=1, batch_size=32, knn_every=0, out=str(out)))
    return out


@pytest.fixture
def evaluate(run_folder):
    return lambda *flags: linear_eval.main([str(run_folder), *map(str, flags)])


def trained(run_folder):
    """The run's config, its model in eval mode and its data."""
    config, model = common.load_run(run_folder)
    return config, model.eval(), images.load(config.data, config.image_size, CPU)


def fresh_run(out, **given):
    """A run's folder whose network was never trained."""
    config = simclr.Config(**given, out=str(out))
    model = simclr.SimCLR(config)
    state = {
        "method": "simclr",
        "config": dataclasses.asdict(config),
        "parts": {"model": ("SimCLR", model.state_dict())},
    }
    state |= {"progress": {}, "steps": 0, "rng": torch.get_rng_state()}
    torch.save(state, out / "checkpoint.pt")
    return model


def denormalize(x):
    """`normalize` undone: pictures in [0, 1]."""
    return x * images.STD + images.MEAN


def little_data(n=60):
    """n pictures of three colours, whose left half is dark."""
    labels = torch.arange(n) % 3
    pictures = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    pictures[torch.arange(n), labels, :, 8:] = 200
    split = images.resident(pictures, labels, CPU)
    return images.Data("colours", split, split, ["red", "green", "blue"])


def write(pictures, paths):
    for picture, path in zip(pictures, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


# ------------------------------------------------------------------------------------------------ the classifiers


def test_fit_linear_is_at_the_optimum():
    torch.manual_seed(0)
    x, y = 3 * torch.randn(300, 8) + 5, torch.randint(4, (300,))
    classifier = linear_eval.fit_linear(x, y, 4, l2=0.01)
    w, b = classifier.weight.requires_grad_(), classifier.bias.requires_grad_()
    logits = (x - x.mean(0)) / x.std(0) @ w.T + b
    objective = F.cross_entropy(logits, y) + 0.005 * w.square().sum()
    for g in torch.autograd.grad(objective, (w, b)):
        assert g.abs().max() < 1e-4
    torch.testing.assert_close(classifier(x), logits)


def test_a_separable_set_is_learned_and_shuffled_labels_give_chance():
    torch.manual_seed(0)
    labels = torch.arange(2000) % 10
    x = F.one_hot(labels, 10).float() + 0.1 * torch.randn(2000, 10)

    def evaluate(labels, mine=slice(None)):
        logits = linear_eval.fit_linear(x[:1000], labels[:1000], 10)(x[1000:])
        return linear_eval.scores(logits[mine], labels[1000:][mine], 10)

    good = evaluate(labels)
    assert good["linear_top1"] > 0.98 and good["linear_top5"] >= good["linear_top1"]
    for c in range(10):  # which images are asked about together changes nothing
        assert evaluate(labels, labels[1000:] == c)["linear_top1"] == pytest.approx(good["per_class"][c])
    chance = evaluate(labels[torch.randperm(2000)])
    assert abs(chance["linear_top1"] - 0.1) < 0.04 and abs(chance["linear_top5"] - 0.5) < 0.06


def test_labels_are_picked_evenly_and_by_seed():
    labels = torch.cat([torch.arange(1000) % 10, torch.full((50,), -1)])
    picked = linear_eval.pick_labels(labels, 0.05, 0)
    assert labels[picked].bincount().tolist() == [5] * 10
    assert torch.equal(picked, linear_eval.pick_labels(labels, 0.05, 0))
    assert not torch.equal(picked, linear_eval.pick_labels(labels, 0.05, 1))
    assert len(linear_eval.pick_labels(labels, 1e-6, 0)) == 10  # at least one of each class
    assert len(linear_eval.pick_labels(labels, 1.0, 0)) == 1000  # and none without a label
    with pytest.raises(common.InputError, match="no training image has a label"):
        linear_eval.pick_labels(labels[-50:], 1.0, 0)


def test_scores():
    logits = torch.eye(4)[[0, 0, 1, 2, 3, 3]] + 0.1 * torch.arange(4)
    labels = torch.tensor([0, 0, 1, 1, 3, 1])
    result = linear_eval.scores(logits, labels, 4)
    assert math.isclose(result["linear_top1"], 4 / 6, rel_tol=1e-6) and result["linear_top5"] == 1
    assert result["confusion"].tolist() == [[2, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert [round(v, 4) for v in result["per_class"]][:2] == [1.0, 0.3333] and math.isnan(result["per_class"][2])
    logits = torch.arange(7.0).repeat(2, 1)  # class 6 first, 2 fifth, 1 sixth
    assert linear_eval.scores(logits, torch.tensor([2, 1]), 7)["linear_top5"] == 0.5


@pytest.mark.parametrize(
    "flags",
    [[], ["--features", "z"], ["--label-fraction", "0.1"], ["--untrained"], ["--protocol", "paper", "--epochs", "2"]],
    ids=" ".join,
)
def test_a_run_is_evaluated(run_folder, evaluate, flags, capsys):
    result = evaluate(*flags)
    assert 0.05 <= result["linear_top1"] <= result["linear_top5"] <= 1 and math.isfinite(result["knn_top1"])
    out = capsys.readouterr().out
    assert all(f"{name}  {result[key]:.4f}" in out for name, key in (
        ("linear top-1", "linear_top1"), ("linear top-5", "linear_top5"), ("kNN top-1   ", "knn_top1")))  # fmt: skip
    worst = min(range(10), key=lambda c: (result["per_class"][c], list(images.SHAPES)[c]))
    assert f"per class     {list(images.SHAPES)[worst]} {result['per_class'][worst]:.3f}, " in out
    assert f"{100 if '0.1' in flags else 1000:,} labels used" in out
    assert result["confusion"].sum() == 200 and result["confusion"].sum(1).tolist() == [20] * 10
    assert math.isclose(sum(result["per_class"]) / 10, result["linear_top1"], rel_tol=1e-5)
    assert ("note: only about 62 steps in all" in out) == ("paper" in flags)  # two epochs of 1,000 images, 32 a batch
    config, model, data = trained(run_folder)
    if "paper" in flags:
        assert result["knn_top1"] == common.knn_of(model.backbone, data, config)
    if "z" in flags:
        assert result["knn_top1"] == common.knn_of(model.embed, data, config)


def test_controls(evaluate):
    """Shuffled labels give chance, by both protocols; the untrained backbone is worth something."""
    for flags in ([], ["--protocol", "paper", "--epochs", "3"]):
        shuffled = evaluate("--shuffle-labels", *flags)
        for key in ("linear_top1", "knn_top1"):
            assert abs(shuffled[key] - 0.1) < 0.09, (flags, key)  # 4 sigma of 200 images
        assert abs(shuffled["linear_top5"] - 0.5) < 0.15
    assert evaluate("--untrained")["linear_top1"] > 0.2


def test_untrained_is_the_network_before_training(run_folder, evaluate, monkeypatch):
    seen = []
    embed = common.embed
    monkeypatch.setattr(common, "embed", lambda network, *rest: seen.append(network) or embed(network, *rest))
    evaluate("--untrained")
    config, model = common.load_run(run_folder)
    torch.manual_seed(config.seed)
    before = simclr.SimCLR(config).backbone.state_dict()
    assert not seen[0].training and all(torch.equal(v, before[k]) for k, v in seen[0].state_dict().items())
    assert not torch.equal(before["conv1.weight"], model.backbone.conv1.weight)


def test_pixels_are_the_pixels(run_folder, evaluate):
    config, _, data = trained(run_folder)
    result = evaluate("--features", "pixels", "--l2", "10")
    assert result["knn_top1"] == common.knn_of(common.pixels, data, config) > 0.15
    assert 0.1 < result["linear_top1"] < 0.5


def test_evaluation_changes_nothing_in_the_run(run_folder, evaluate):
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    evaluate()
    assert before == {p.name: p.read_bytes() for p in run_folder.iterdir()}


# --------------------------------------------------------------------------------------- the published protocols


def test_every_method_has_a_published_setting():
    lr = {name: how.lr for name, how in linear_eval.PUBLISHED.items()}
    assert lr == {"simclr": 1.6, "moco": 30, "byol": 0.8, "simsiam": 1.6, "swav": 0.3, "supcon": 5}
    size = {name: (how.batch_size, how.epochs) for name, how in linear_eval.PUBLISHED.items()}
    assert size["supcon"] == (512, 100) and size["moco"] == (256, 100) and size["simsiam"] == (4096, 90)
    for how in linear_eval.PUBLISHED.values():
        assert how.source and how.optimizer in ("sgd", "nesterov", "lars") and (how.factor > 0) == bool(how.steps)


class Recorder(torch.nn.Module):
    """The mean colour as features; keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, x):
        self.shown.append(x.clone())
        return x.mean((2, 3))


def fit(network, data, chosen, how):
    config = simclr.Config(data="shapes", image_size=16, workers=1)
    torch.manual_seed(0)
    return linear_eval.fit_as_published(network, data, config, chosen, data.train.labels[chosen], how)


@pytest.mark.parametrize("method", sorted(linear_eval.PUBLISHED))
def test_the_published_protocol_learns_and_follows_its_schedule(method, monkeypatch):
    how = linear_eval.PUBLISHED[method]._replace(batch_size=30, epochs=20)  # two steps an epoch
    if method == "simsiam":
        how = how._replace(batch_size=60, lr=200.0)  # one step; the published 1.6 is for 28,000 steps, not 20
    total = 20 * 60 // how.batch_size
    rates, made = [], []
    for owner, name in ((torch.optim, "SGD"), (common, "LARS")):
        kind = getattr(owner, name)

        class Watched(kind):
            def __init__(self, params, **flags):
                super().__init__(params, **flags)
                made.append((type(self).__mro__[1].__name__, flags))

            def step(self):
                rates.append(self.param_groups[0]["lr"])
                super().step()

        monkeypatch.setattr(owner, name, Watched)
    data, scales = little_data(), set()
    views = data.train.views
    data.train.views = lambda *a, **k: (scales.update(scale for _, scale in a[1]), views(*a, **k))[1]
    classifier = fit(Recorder(), data, torch.arange(60), how)
    assert scales == {(0.2 if method == "supcon" else 0.08, 1.0)}
    h = common.embed(Recorder(), data.test, simclr.Config(image_size=16, workers=1))
    assert (classifier(h).argmax(1) == data.test.labels).float().mean() > 0.95
    name, flags = made[0]
    assert name == ("LARS" if method == "simsiam" else "SGD") and flags.get("weight_decay", 0) == how.weight_decay
    assert flags.get("momentum", 0.9) == 0.9 and flags.get("nesterov", False) == (method in ("simclr", "byol"))
    if method in ("moco", "supcon"):
        drops = [0.6, 0.8] if method == "moco" else [0.6, 0.75, 0.9]
        factor = 0.1 if method == "moco" else 0.2
        expected = [how.lr * factor ** sum(step // 2 >= 20 * at for at in drops) for step in range(total)]
    else:
        expected = [how.lr * 0.5 * (1 + math.cos(math.pi * step / total)) for step in range(total)]
    assert all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(rates, expected, strict=True))


def test_a_classifier_that_blows_up_is_no_result(capsys):
    how, data = linear_eval.PUBLISHED["moco"]._replace(batch_size=30, epochs=20, lr=3e38), little_data()
    with pytest.raises(common.RunFailure, match="lower --lr"):
        fit(Recorder(), data, torch.arange(60), how)
    fit(Recorder(), data, torch.arange(60), how._replace(lr=1e3, epochs=1, steps=()))
    assert "worse than a guess" in capsys.readouterr().out


def test_the_published_protocol_shows_crops_and_flips():
    how = linear_eval.PUBLISHED["moco"]._replace(batch_size=25, epochs=4, lr=0.1)
    data, network, chosen = little_data(), Recorder(), torch.arange(0, 60, 2)
    fit(network, data, chosen, how)
    assert [len(x) for x in network.shown] == [2, *[25, 5] * 4]  # all of the chosen every epoch, the short batch too
    x = torch.cat(network.shown[1:])
    dark = images.normalize(torch.zeros(1, 3, 1, 1))
    assert torch.allclose(x.amin((0, 2, 3)), dark.flatten(), atol=1e-5)  # torchvision's range, not [0, 1]
    left, right = (denormalize(x)[..., i].amax((1, 2)) for i in (0, -1))
    assert 20 < (left > right + 0.2).sum() < 100 and 20 < (right > left + 0.2).sum() < 100  # the bright half
    assert len(x.flatten(1).unique(dim=0)) > 60  # and a crop of its own for each


def test_the_published_protocol_leaves_the_backbone_alone(run_folder):
    config, model, data = trained(run_folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    how, labels = linear_eval.PUBLISHED["moco"]._replace(epochs=1), data.train.labels[:500]
    linear_eval.fit_as_published(model.backbone, data, config, torch.arange(500), labels, how)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_epochs_and_lr_change_the_published_setting(evaluate, monkeypatch, capsys):
    seen, original = [], linear_eval.fit_as_published
    monkeypatch.setattr(linear_eval, "fit_as_published", lambda *a: seen.append(a[5]) or original(*a))
    paper = linear_eval.PUBLISHED["simclr"]
    evaluate("--protocol", "paper", "--epochs", 1, "--lr", 0.5)
    assert seen.pop() == paper._replace(epochs=1, lr=0.5, batch_size=32)
    out = capsys.readouterr().out
    assert "changed by hand" in out and "fitted to 1,000 images" in out
    evaluate("--protocol", "paper", "--epochs", 1, "--batch-size", 512)
    assert seen.pop() == paper._replace(epochs=1, lr=1.6 / 8, batch_size=512)
    assert "fitted" not in capsys.readouterr().out
    with pytest.raises(common.InputError, match="--batch-size 1001: there are only 1,000 labelled images"):
        evaluate("--protocol", "paper", "--batch-size", 1001)


# ------------------------------------------------------------------------------------------------- what h keeps


def test_sobel_is_its_definition():
    """|(Gx * y, Gy * y)| of the grey picture y, by the two kernels written out, at most 1; borders reflected."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 11, 13)
    ours = probes.sobel(x)
    assert ours.shape == x.shape and torch.equal(ours[:, 0], ours[:, 1]) and torch.equal(ours[:, 0], ours[:, 2])
    y = F.pad(x[:, 0] * 0.2989 + x[:, 1] * 0.587 + x[:, 2] * 0.114, (1, 1, 1, 1), mode="reflect")
    weight = torch.tensor([1.0, 2.0, 1.0])
    for i in range(11):
        for j in range(13):
            dx = (y[:, i : i + 3, j + 2] - y[:, i : i + 3, j]) @ weight
            dy = (y[:, i + 2, j : j + 3] - y[:, i, j : j + 3]) @ weight
            expected = (dx**2 + dy**2).sqrt().clamp(max=1)
            torch.testing.assert_close(ours[:, 0, i, j], expected, atol=1e-5, rtol=1e-5)


def test_gaussian_noise_is_its_definition():
    torch.manual_seed(0)
    x = torch.full((2, 3, 64, 64), 0.5)
    noise = probes.gaussian_noise(x, torch.tensor([0.01, 0.1]).view(2, 1, 1, 1)) - x
    assert torch.allclose(noise.flatten(1).std(1), torch.tensor([0.01, 0.1]), rtol=0.05)
    assert noise.mean().abs() < 0.003 and len(noise.unique()) > 10_000  # a draw of its own for every value
    assert (x == 0.5).all()
    y = torch.rand(2, 3, 8, 8)
    torch.manual_seed(1)
    ours = probes.gaussian_noise(y, 0.7)
    torch.manual_seed(1)
    assert torch.equal(ours, (y + 0.7 * torch.randn(y.shape)).clamp(0, 1)) and ours.min() == 0 and ours.max() == 1


def test_the_probes_alter_what_they_say():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 16, 16)
    kind = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    on, off = kind == 1, kind == 0
    altered = {probe: probes.alter(x.clone(), probe, kind) for probe in probes.PROBES}
    for y in altered.values():
        assert torch.equal(y[off], x[off]) and not any(torch.equal(a, b) for a, b in zip(y[on], x[on], strict=True))
    assert torch.equal(altered["grayscale"][on], images.grey(x[on]))
    assert torch.equal(altered["sobel"][on], probes.sobel(x[on]))
    assert abs((altered["corrupted"] - x)[on].std() - 0.1) < 0.02
    turned = probes.alter(x.clone(), "rotation", torch.arange(8) % 4)
    assert all(torch.equal(turned[i], x[i].rot90(i % 4, (1, 2))) for i in range(8))


@pytest.mark.parametrize("probe", probes.PROBES)
def test_altered_features_match_their_pictures(run_folder, probe):
    """The network is shown what was altered in [0, 1], then normalised; the kinds have exactly their shares."""
    config, model, data = trained(run_folder)
    h, kind = probes.embed_altered(model.backbone, data.test, config, probe, seed=3)
    z, again = probes.embed_altered(model.embed, data.test, config, probe, seed=3)
    assert torch.equal(kind, again) and kind.bincount().tolist() == [200 * s for s in probes.PROBES[probe][1]]
    index = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    (x,) = next(data.test.views([index], [(32, None)]))
    x = images.normalize(probes.alter(x, probe, kind))
    with torch.no_grad():
        torch.testing.assert_close(h, model.backbone(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(z, model.embed(x), atol=1e-4, rtol=1e-4)


def test_fit_mlp_learns_what_no_linear_classifier_can():
    torch.manual_seed(0)
    x = torch.randn(3000, 16)
    y = (x[:, 0].abs() > 0.67).long()
    network = probes.fit_mlp(x, y, 2, 16, seed=0)
    assert (network(x).argmax(1) == y).float().mean() > 0.9
    again = probes.fit_mlp(x, y, 2, 16, seed=0)
    assert torch.equal(network(x), again(x))


def test_a_probe_finds_what_was_lost():
    pictures, labels = images.make_shapes(800, 5, 32)
    split = images.resident(pictures, labels, CPU)
    data = images.Data("shapes", split, split)
    small = lambda x: F.adaptive_avg_pool2d(denormalize(x), 4)  # noqa: E731
    networks = {"h": lambda x: small(x).flatten(1), "z": lambda x: images.luma(small(x)).flatten(1)}  # z: no colours
    config = simclr.Config(image_size=32)
    table = probes.run_probes(networks, data, config, ["grayscale"], 48, 0)["grayscale"]
    assert math.isclose(table["chance"], 0.8, rel_tol=1e-6)
    assert table["h"] > 0.97 and table["z"] < 0.9


def test_probe_all_prints_the_table(evaluate, capsys, monkeypatch):
    monkeypatch.setattr(probes, "PROBE_IMAGES", 100)
    result = evaluate("--probe", "all")
    out = capsys.readouterr().out
    assert list(result) == ["grayscale", "rotation", "corrupted", "sobel"]
    for probe, row in result.items():
        assert list(row) == ["chance", "h", "z"] and f"{100 * row['h']:.1f}" in out and probe in out
    assert "25 / 67.6 / 25.6" in out
    assert evaluate("--probe", "sobel", "--features", "z") == {"sobel": {"chance": 0.5, "z": result["sobel"]["z"]}}


def test_probes_need_no_labels_but_held_out_images(evaluate, tmp_path):
    write(little_data().train.images, [tmp_path / ("train" if i % 3 else "test") / f"{i}.png" for i in range(60)])
    row = evaluate("--data", tmp_path, "--probe", "rotation")["rotation"]
    assert row["chance"] == 0.25 and "h" in row
    with pytest.raises(common.InputError, match="no held-out images"):
        evaluate("--data", tmp_path / "test", "--probe", "rotation")
    with pytest.raises(common.InputError, match="give a set with labels"):
        evaluate("--data", tmp_path)


def test_z_needs_a_projection_head(tmp_path):
    fresh_run(tmp_path, backbone="resnet8", projection_head="none")
    for flags in (["--features", "z"], ["--probe", "all"], ["--probe", "sobel", "--features", "z"]):
        with pytest.raises(common.InputError, match="no projection head"):
            linear_eval.main([str(tmp_path), *flags])


# ------------------------------------------------------------------------------------- export, transfer, pictures


def test_an_exported_backbone_loads_into_torchvision_and_its_detector(tmp_path, capsys):
    model = fresh_run(tmp_path, backbone="resnet50", projection_dim=8)
    assert linear_eval.main([str(tmp_path), "--export", str(tmp_path / "backbone.pth")]) == {}
    assert "torchvision.models.resnet50()" in capsys.readouterr().out
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)
    network = torchvision.models.resnet50()
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    network.fc = torch.nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.eval()(x), model.eval().backbone(x))
        detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        detector.backbone.body.load_state_dict(state)  # strictly
        levels = detector.eval().backbone.body(x)
        assert torch.equal(levels["3"].mean((2, 3)), model.backbone(x))


def test_export_says_what_the_small_stem_needs_and_refuses_resnet8(evaluate, tmp_path, capsys):
    fresh_run(tmp_path, backbone="resnet18", stem="cifar", image_size=32)
    linear_eval.main([str(tmp_path), "--export", str(tmp_path / "small.pth")])
    assert "torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)" in capsys.readouterr().out
    network = torchvision.models.resnet18()
    network.conv1, network.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    state = torch.load(tmp_path / "small.pth", weights_only=True)
    assert network.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    with pytest.raises(common.InputError, match="resnet8 is not a torchvision network"):
        evaluate("--export", tmp_path / "x.pth")


def test_transfer_to_other_data_and_the_confusion_matrix(evaluate, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    photos = tmp_path / "photos"
    write(little_data().train.images, [photos / "rgb"[i % 3] / f"{i}.png" for i in range(60)])
    result = evaluate("--data", photos, "--confusion", tmp_path / "c.png")
    assert result["linear_top1"] == 1 and result["confusion"].tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 2]]
    assert "linear top-5" not in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "c.png")).std() > 10


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--epochs 3", "--epochs does nothing without --protocol paper or finetune"),
        ("--lr 0", "--lr 0.0: must be above 0"),
        ("--lr nan", "--lr nan: must be above 0"),
        ("--lr 3", "--lr does nothing without --protocol paper"),
        ("--protocol paper --l2 1", "--l2 does nothing with --protocol paper"),
        ("--protocol paper --epochs 0", "--epochs 0: must be at least 1"),
        ("--l2 -1", "--l2 -1.0: must be at least 0"),
        ("--label-fraction 1.5", "--label-fraction 1.5: must be above 0 and at most 1"),
        ("--probe sobel --label-fraction 0.1", "--label-fraction does nothing with --probe sobel"),
        ("--probe sobel --protocol paper", "--protocol does nothing with --probe sobel"),
        ("--probe all --features z", "--features does nothing with --probe all, which reads h and z"),
        ("--probe rotation --features pixels", "--features pixels: --probe rotation reads h or z"),
        ("--probe colour", "argument --probe: invalid choice: 'colour'"),
        ("--features pixels --untrained", "--untrained does nothing with --features pixels"),
        ("--export x.pth --data shapes", "--data does nothing with --export"),
        ("--export x.pth --shuffle-labels", "--shuffle-labels does nothing with --export"),
        ("--export /no/such/x.pth", "no folder /no/such"),
        ("--confusion /no/such/x.png", "no folder /no/such"),
        ("--confusion .", "a folder; give the name of a file"),
        ("--confusion x.jpeg9", "must end in .png"),
        ("--export .", "a folder; give the name of a file"),
        ("--seed 18446744073709551616", "must be at least 0 and below 2^31"),
        ("--seed -1", "--seed -1: must be at least 0"),
        ("--device nonsense", "--device nonsense: not to be had here"),
        ("--labelfraction 0.1", "unknown --labelfraction 0.1; did you mean --label-fraction?"),
    ],
)
def test_bad_flags_and_flags_that_would_do_nothing_are_one_line(flags, words, evaluate, capsys):
    with pytest.raises(SystemExit) as stop, common.exit_status():
        evaluate(*flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1, err


# ---------------------------------------------------------------------------------------------------- fine-tuning


def test_fine_tuning_is_published_for_few_and_for_many_labels():
    for method in linear_eval.PUBLISHED:
        given = [["run", "--protocol", "finetune", "--label-fraction", fraction] for fraction in ("0.01", "0.1")]
        few, tenth = (linear_eval.setting_of(linear_eval.parse(argv), method, 10**6) for argv in given)
        byol = method == "byol"
        assert (few.epochs, tenth.epochs) == ((50, 30) if byol else (60, 30)), method
        assert few.batch_size == (1024 if byol else 4096) and few.lr == (0.05 if byol else 0.05 * 4096 / 256)
        assert few.optimizer == "nesterov" and few.weight_decay == 0 and not few.steps and few.crop == 0.08
        assert ("BYOL" if byol else "B.5") in few.source


def test_fine_tuning_trains_the_whole_network_and_the_same_from_random_weights(run_folder, evaluate, tmp_path, capsys):
    flags = ["--protocol", "finetune", "--label-fraction", 0.09, "--epochs", 2, "--lr", 0.1]
    result = evaluate(*flags, "--save", tmp_path / "tuned.pt")
    out = capsys.readouterr().out
    words = (
        "nesterov, batch 16, lr 0.1, 2 epochs (SimCLR appendix B.5: 0.05 B/256; 60 epochs of 1%; fitted to 90 images"
    )
    assert words in out
    assert "frozen" not in out and "finetune" in out
    _, model, _ = trained(run_folder)
    before, after = model.backbone.state_dict(), torch.load(tmp_path / "tuned.pt", weights_only=True)["backbone"]
    assert all(not torch.equal(before[name], after[name]) for name in before)  # BN's statistics, too
    assert after["bn1.num_batches_tracked"] - before["bn1.num_batches_tracked"] == 2 * (90 // 16)
    control = evaluate("--untrained", *flags)
    assert not torch.allclose(control["logits"], result["logits"], atol=0.1) and 0 < control["linear_top1"] < 1
    assert "before training (random weights)" in capsys.readouterr().out
    again = evaluate("--classify", tmp_path / "tuned.pt", "--predictions", tmp_path / "p.csv")
    test = [path.startswith("test") for path in again["paths"]]
    assert torch.equal(again["probabilities"][test], result["logits"].softmax(1))


def test_fine_tuning_is_sgd_on_every_weight():
    """One step at all images moves each weight of network and classifier by lr (1 + 0.9) times its gradient."""
    torch.manual_seed(0)
    data, config = little_data(), simclr.Config(data="shapes", image_size=16, workers=1)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    before, seen = [p.detach().clone() for p in network.parameters()], []
    views = data.train.views
    data.train.views = lambda *a, **k: (seen.append(x) or x for x in views(*a, **k))
    how = linear_eval.FINETUNING["simclr"]._replace(epochs=1, lr=0.5, batch_size=60)
    rows, labels = torch.arange(60), data.train.labels
    linear_eval.fit_as_published(network, data, config, rows, labels, how, tune=True)
    ((x,),) = seen  # flipped and normalised in place
    moved = [b - p.detach() for b, p in zip(before, network.parameters(), strict=True)]
    assert x.min() < -1 and all(m.abs().max() > 0 for m in moved)
    how = how._replace(batch_size=25)
    count, data = [], little_data()
    views = data.train.views
    data.train.views = lambda batches, *a: (count.extend(map(len, batches)), views(batches, *a))[1]
    linear_eval.fit_as_published(network, data, config, rows, labels, how, tune=True)
    assert count == [25, 25]  # BN wants no batch of 10


# -------------------------------------------------------------------------- pictures in, features and classes out


def album(folder, classes=False):
    """12 pictures of three colours and many sizes, one cut short after its header, and files that are none."""
    for i in range(12):
        pixels = np.zeros((40 + 5 * i, 60 - 2 * i, 3), np.uint8)
        pixels[:, 10:, i % 3] = 100 + 10 * i
        path = folder / ("rgb"[i % 3] if classes else ".") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path.with_name("05-cut.png"))
    cut = path.with_name("05-cut.png").read_bytes()
    path.with_name("05-cut.png").write_bytes(cut[: len(cut) // 2])
    (folder / "notes.txt").write_text("no picture")
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def test_embedding_any_folder(run_folder, evaluate, tmp_path, capfd):
    folder = album(tmp_path / "photos")
    evaluate("--data", folder, "--embed", tmp_path / "out.npz")
    out, err = capfd.readouterr()
    assert "h, 128-d, of 12 pictures" in out and "05-cut.png" in err
    assert "note: 1 damaged images are left out, and nothing stands in" in out
    with np.load(tmp_path / "out.npz") as file:
        found = dict(file)
    assert found["features"].shape == (12, 128) and found["features"].dtype == np.float32
    assert found["paths"].tolist() == [str(folder / f"{i:02}.png") for i in range(12)]
    assert found["labels"].tolist() == [-1] * 12 and found["classes"].tolist() == []
    # a row is its picture's, whatever else the folder holds
    config, model, _ = trained(run_folder)
    for i in (0, 7):
        alone = tmp_path / f"alone{i}"
        alone.mkdir()
        (alone / "x.png").write_bytes((folder / f"{i:02}.png").read_bytes())
        one = evaluate("--data", alone, "--embed", tmp_path / "one.npz")
        assert np.array_equal(one["features"][0], found["features"][i])
        z = evaluate("--data", alone, "--embed", tmp_path / "z.npz", "--features", "z")["features"][0]
        assert np.array_equal(
            z, evaluate("--data", folder, "--map", tmp_path / "z.png", "--features", "z")["features"][i]
        )
        with Image.open(folder / f"{i:02}.png") as picture:
            view = torchvision.transforms.functional.center_crop(picture, min(picture.size))
            view = torchvision.transforms.functional.to_tensor(view.resize((32, 32), Image.Resampling.BILINEAR))
        with torch.no_grad():
            h = model.backbone(images.normalize(view[None]))[0]
        assert torch.allclose(h, torch.from_numpy(found["features"][i]), atol=0.05 * h.abs().max())


def test_embedding_keeps_labels_held_out_pictures_and_the_asked_features(run_folder, evaluate, tmp_path):
    folder = album(tmp_path / "photos", classes=True)
    found = evaluate("--data", folder, "--embed", tmp_path / "out.npz", "--features", "z")
    assert found["paths"].tolist() == sorted(str(p) for p in folder.glob("?/??.png"))
    assert found["classes"].tolist() == ["b", "g", "r"] and found["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    config, model, data = trained(run_folder)
    found = evaluate("--embed", tmp_path / "own.npz", "--features", "z")
    assert found["paths"][[0, 200]].tolist() == ["test/000000", "train/000000"] and len(found["paths"]) == 1200
    torch.testing.assert_close(torch.from_numpy(found["features"][200:]), common.embed(model.embed, data.train, config))
    assert found["labels"].tolist() == [*data.test.labels.tolist(), *data.train.labels.tolist()]


def test_a_saved_classifier_tells_the_same_to_the_bit(evaluate, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted = evaluate("--save", "classifier.pt")
    saved = torch.load("classifier.pt", weights_only=True)
    assert saved["weight"].shape == (10, 128) and saved["bias"].shape == (10,) and saved["mean"].shape == (128,)
    assert saved["classes"] == list(images.SHAPES) and saved["features"] == "h" and saved["backbone"] is None
    told = evaluate("--classify", "classifier.pt")
    p = fitted["logits"].softmax(1)
    assert torch.equal(told["probabilities"][:200], p)  # the held-out ones come first: test/, train/
    rows = [line.split(",") for line in (tmp_path / "predictions.csv").read_text().splitlines()]
    assert rows[0] == ["path", "class", "probability"] and len(rows) == 1201
    expected = [[f"test/{i:06}", list(images.SHAPES)[c]] for i, c in enumerate(p.argmax(1).tolist())]
    assert [row[:2] for row in rows[1:201]] == expected
    assert torch.equal(torch.tensor([float(row[2]) for row in rows[1:201]]), p.amax(1))


@pytest.mark.parametrize("protocol", ["features", "paper", "finetune"])
def test_a_saved_classifier_tells_the_same_of_photos_of_many_sizes(protocol, evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    album(tmp_path / "photos", classes=True)
    given = [] if protocol == "features" else ["--epochs", 2, "--lr", 0.1]
    fitted = evaluate("--data", "photos", "--save", "c.pt", "--protocol", protocol, *given)
    told = evaluate("--data", "photos", "--classify", "c.pt")
    held_out = [
        i for i, name in enumerate(told["paths"]) if name in ("photos/b/11.png", "photos/g/10.png", "photos/r/09.png")
    ]
    assert torch.equal(told["probabilities"][held_out], fitted["logits"].softmax(1)) and len(held_out) == 3


def test_fine_tuning_gives_mocos_batch_norms_their_usual_momentum(tmp_path):
    config = moco.Config.preset("demo", image_size=16, out=str(tmp_path))
    network, data = moco.MoCo(config).backbone, little_data()
    assert network.bn1.momentum == 0.05
    how = linear_eval.FINETUNING["simclr"]._replace(epochs=1, batch_size=30)
    linear_eval.fit_as_published(network, data, config, torch.arange(60), data.train.labels, how, tune=True)
    assert {m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


def test_a_run_on_a_tensor_asks_for_data(tmp_path, capsys):
    simclr.train(simclr.Config.preset("demo", epochs=0, out=str(tmp_path)), images.make_shapes(50, 0, 32)[0])
    assert f"linear_eval.py {tmp_path} --embed out.npz --map map.png --data PICTURES" in capsys.readouterr().out
    with pytest.raises(common.InputError, match="--data a tensor: no such folder; give a folder"):
        linear_eval.main([str(tmp_path), "--embed", str(tmp_path / "out.npz")])


def test_new_photos_are_classified(evaluate, tmp_path, capsys):
    folder = album(tmp_path / "known", classes=True)
    evaluate("--data", folder, "--save", tmp_path / "c.pt")
    new = album(tmp_path / "new, or so")
    evaluate("--data", new, "--classify", tmp_path / "c.pt", "--predictions", tmp_path / "p.csv")
    assert "p.csv: one of 3 classes for each of 12 pictures" in capsys.readouterr().out
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(new / f"{i:02}.png") for i in range(12)]
    assert [row["class"] for row in rows] == list("rgb") * 4
    assert all(1 / 3 < float(row["probability"]) <= 1 for row in rows)


def test_a_classifier_of_other_weights_is_refused(evaluate, tmp_path):
    evaluate("--save", tmp_path / "c.pt")
    fresh_run(tmp_path, backbone="resnet8", image_size=32, data="shapes")
    with pytest.raises(common.InputError, match="c.pt: it was fitted to other weights"):
        linear_eval.main([str(tmp_path), "--classify", str(tmp_path / "c.pt")])
    (tmp_path / "d.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:500])
    for name, why in (("d.pt", "no whole file of a classifier"), ("e.pt", "no such file")):
        with pytest.raises(common.InputError, match=why):
            evaluate("--classify", tmp_path / name)


def test_the_map_puts_each_picture_at_its_principal_components(evaluate, tmp_path, capsys):
    folder = album(tmp_path / "photos", classes=True)
    found = evaluate("--data", folder, "--map", tmp_path / "map.png")
    x = found["features"].astype(np.float64)
    x -= x.mean(0)
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    share = s**2 / (s**2).sum()
    out = capsys.readouterr().out
    assert f"first principal component, {share[0]:.0%} of the variance; up: second, {share[1]:.0%}" in out
    sheet = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
    assert sheet.shape == (1224, 1400, 3)
    at = x @ vt[:2].T
    at = (at - at.min(0)) / (at.max(0) - at.min(0)) * 29
    right = 0
    for flip in ((1, 1), (1, -1), (-1, 1), (-1, -1)):  # the sign of a component means nothing
        cells = [[c if f > 0 else 29 - c for c, f in zip(row, flip, strict=True)] for row in np.round(at).astype(int)]
        centres = [sheet[1200 - (up + 1) * 40 + 20, across * 40 + 20] for across, up in cells]
        right = max(
            right, sum(c.argmax() == "rgb".index("bgr"[k]) for c, k in zip(centres, found["labels"], strict=True))
        )
    assert right == 12 and (sheet[:1200, :1200] == 255).all(2).mean() > 0.9


@pytest.mark.parametrize("x", [torch.zeros(1, 4), torch.arange(5.0)[:, None], torch.eye(3)], ids=["one", "1-d", "few"])
def test_the_map_of_little_variety(x, tmp_path):
    pictures = [(little_data().train, i) for i in range(len(x))]
    linear_eval.draw_map(x, pictures, [-1] * len(x), [], 16, tmp_path / "map.png")
    sheet = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))
    assert sheet.shape == (1224, 1200, 3) and (sheet[:1200].min(2) < 255).sum() > 500 * len(x)
