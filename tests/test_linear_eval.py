"""The evaluation, and its controls: shuffled labels, an untrained backbone, raw pixels, few labels."""

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
import simclr

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
    x, y = torch.randn(300, 8), torch.randint(4, (300,))
    w, b = (t.requires_grad_() for t in linear_eval.fit_linear(x, y, 4, l2=0.01))
    objective = F.cross_entropy(x @ w + b, y) + 0.005 * w.square().sum()
    for g in torch.autograd.grad(objective, (w, b)):
        assert g.abs().max() < 1e-4


def test_a_separable_set_is_learned_and_shuffled_labels_give_chance():
    torch.manual_seed(0)
    labels = torch.arange(2000) % 10
    x = F.one_hot(labels, 10).float() + 0.1 * torch.randn(2000, 10)
    good = linear_eval.evaluate(x[:1000], labels[:1000], x[1000:], labels[1000:], 10, 1e-3)
    assert good["linear_top1"] > 0.98 and good["linear_top5"] >= good["linear_top1"] and good["knn_top1"] > 0.98
    for c in range(10):  # which images are asked about together changes nothing
        mine = labels[1000:] == c
        alone = linear_eval.evaluate(x[:1000], labels[:1000], x[1000:][mine], labels[1000:][mine], 10, 1e-3)
        assert alone["linear_top1"] == pytest.approx(good["per_class"][c])
    shuffled = labels[torch.randperm(2000)]
    chance = linear_eval.evaluate(x[:1000], shuffled[:1000], x[1000:], shuffled[1000:], 10, 1e-3)
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
    assert ("note: only 2 steps in all" in out) == ("paper" in flags)
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
    return linear_eval.fit_as_published(network, data, config, chosen, data.train.labels[chosen], 3, how)


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
    assert [len(x) for x in network.shown] == [25, 5] * 4  # all of the chosen every epoch, the last short batch too
    x = torch.cat(network.shown)
    dark = images.normalize(torch.zeros(1, 3, 1, 1))
    assert torch.allclose(x.amin((0, 2, 3)), dark.flatten(), atol=1e-5)  # torchvision's range, not [0, 1]
    left, right = (denormalize(x)[..., i].amax((1, 2)) for i in (0, -1))
    assert 20 < (left > right + 0.2).sum() < 100 and 20 < (right > left + 0.2).sum() < 100  # the bright half
    assert len(x.flatten(1).unique(dim=0)) > 60  # and a crop of its own for each
    few = fit(Recorder(), data, chosen, how._replace(batch_size=300))
    same = fit(Recorder(), data, chosen, how._replace(batch_size=30, lr=0.01))  # the lr goes with the batch
    assert torch.allclose(few.weight, same.weight)


def test_the_published_protocol_leaves_the_backbone_alone(run_folder):
    config, model, data = trained(run_folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    how, labels = linear_eval.PUBLISHED["moco"]._replace(epochs=1), data.train.labels[:500]
    linear_eval.fit_as_published(model.backbone, data, config, torch.arange(500), labels, 128, how)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_epochs_and_lr_change_the_published_setting(evaluate, monkeypatch, capsys):
    seen, original = [], linear_eval.fit_as_published
    monkeypatch.setattr(linear_eval, "fit_as_published", lambda *a: seen.append(a[-1]) or original(*a))
    evaluate("--protocol", "paper", "--epochs", 1, "--lr", 0.5)
    assert seen == [linear_eval.PUBLISHED["simclr"]._replace(epochs=1, lr=0.5)]
    out = capsys.readouterr().out
    assert "changed by hand" in out and "lowered to the 1000 images" in out


# ------------------------------------------------------------------------------------------------- what h keeps


def test_sobel_is_its_definition():
    """|(Gx * y, Gy * y)| of the grey picture y, by the two kernels written out, at most 1; borders reflected."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 11, 13)
    ours = linear_eval.sobel(x)
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
    noise = linear_eval.gaussian_noise(x, torch.tensor([0.01, 0.1]).view(2, 1, 1, 1)) - x
    assert torch.allclose(noise.flatten(1).std(1), torch.tensor([0.01, 0.1]), rtol=0.05)
    assert noise.mean().abs() < 0.003 and len(noise.unique()) > 10_000  # a draw of its own for every value
    assert (x == 0.5).all()
    y = torch.rand(2, 3, 8, 8)
    torch.manual_seed(1)
    ours = linear_eval.gaussian_noise(y, 0.7)
    torch.manual_seed(1)
    assert torch.equal(ours, (y + 0.7 * torch.randn(y.shape)).clamp(0, 1)) and ours.min() == 0 and ours.max() == 1


def test_the_probes_alter_what_they_say():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 16, 16)
    kind = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    on, off = kind == 1, kind == 0
    altered = {probe: linear_eval.alter(x.clone(), probe, kind) for probe in linear_eval.PROBES}
    for y in altered.values():
        assert torch.equal(y[off], x[off]) and not any(torch.equal(a, b) for a, b in zip(y[on], x[on], strict=True))
    assert torch.equal(altered["grayscale"][on], images.grey(x[on]))
    assert torch.equal(altered["sobel"][on], linear_eval.sobel(x[on]))
    assert abs((altered["corrupted"] - x)[on].std() - 0.1) < 0.02
    turned = linear_eval.alter(x.clone(), "rotation", torch.arange(8) % 4)
    assert all(torch.equal(turned[i], x[i].rot90(i % 4, (1, 2))) for i in range(8))


@pytest.mark.parametrize("probe", linear_eval.PROBES)
def test_altered_features_match_their_pictures(run_folder, probe):
    """The network is shown what was altered in [0, 1], then normalised; the kinds have exactly their shares."""
    config, model, data = trained(run_folder)
    h, kind = linear_eval.embed_altered(model.backbone, data.test, config, probe, seed=3)
    z, again = linear_eval.embed_altered(model.embed, data.test, config, probe, seed=3)
    assert torch.equal(kind, again) and kind.bincount().tolist() == [200 * s for s in linear_eval.PROBES[probe][1]]
    index = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    (x,) = next(data.test.views([index], [(32, None)]))
    x = images.normalize(linear_eval.alter(x, probe, kind))
    with torch.no_grad():
        torch.testing.assert_close(h, model.backbone(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(z, model.embed(x), atol=1e-4, rtol=1e-4)


def test_fit_mlp_learns_what_no_linear_classifier_can():
    torch.manual_seed(0)
    x = torch.randn(3000, 16)
    y = (x[:, 0].abs() > 0.67).long()
    network = linear_eval.fit_mlp(x, y, 2, 16, seed=0)
    assert (network(x).argmax(1) == y).float().mean() > 0.9
    again = linear_eval.fit_mlp(x, y, 2, 16, seed=0)
    assert torch.equal(network(x), again(x))


def test_a_probe_finds_what_was_lost():
    pictures, labels = images.make_shapes(800, 5, 32)
    split = images.resident(pictures, labels, CPU)
    data = images.Data("shapes", split, split)
    small = lambda x: F.adaptive_avg_pool2d(denormalize(x), 4)  # noqa: E731
    networks = {"h": lambda x: small(x).flatten(1), "z": lambda x: images.luma(small(x)).flatten(1)}  # z: no colours
    config = simclr.Config(image_size=32)
    table = linear_eval.run_probes(networks, data, config, ["grayscale"], 48, 0)["grayscale"]
    assert math.isclose(table["chance"], 0.8, rel_tol=1e-6)
    assert table["h"] > 0.97 and table["z"] < 0.9


def test_probe_all_prints_the_table(evaluate, capsys, monkeypatch):
    monkeypatch.setattr(linear_eval, "PROBE_IMAGES", 100)
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
        ("--epochs 3", "--epochs does nothing without --protocol paper"),
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
