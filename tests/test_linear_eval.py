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
import linear_eval
import simclr


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    make = common.make_shapes
    common.make_shapes = lambda n, seed, size: make(n // 10, seed, size)
    config = simclr.Config(**simclr.Config.PRESETS["demo"] | {"epochs": 2, "batch_size": 32, "out": str(out)})
    simclr.train(config)
    yield out
    common.make_shapes = make


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
def test_a_run_is_evaluated(run_folder, flags, capsys):
    result = linear_eval.main([str(run_folder), *flags])
    assert 0.05 <= result["linear_top1"] <= result["linear_top5"] <= 1 and math.isfinite(result["knn_top1"])
    out = capsys.readouterr().out
    assert f"linear top-1  {result['linear_top1']:.4f}" in out and "per class" in out
    assert f"{100 if '0.1' in flags else 1000:,} labels used" in out
    assert result["confusion"].sum() == 200 and result["confusion"].sum(1).tolist() == [20] * 10
    assert math.isclose(sum(result["per_class"]) / 10, result["linear_top1"], rel_tol=1e-5)
    assert ("note: 2 steps in all" in out) == ("paper" in flags)
    if "paper" in flags:
        config, model = linear_eval.load_run(str(run_folder))
        data = common.load_data(config, torch.device("cpu"))
        assert result["knn_top1"] == common.knn_of(model.eval().backbone, data, config)


def test_controls(run_folder):
    """Shuffled labels give chance, by both protocols; the pixels and the untrained backbone are worth something."""
    value = lambda *flags: linear_eval.main([str(run_folder), *flags])  # noqa: E731
    for flags in ([], ["--protocol", "paper", "--epochs", "10"]):
        shuffled = value("--shuffle-labels", *flags)
        for key in ("linear_top1", "knn_top1"):
            assert abs(shuffled[key] - 0.1) < 0.09, (flags, key)  # 4 sigma of 200 images
        assert abs(shuffled["linear_top5"] - 0.5) < 0.15
    assert value("--untrained")["linear_top1"] > 0.2


def test_untrained_is_the_network_before_training(run_folder, monkeypatch):
    seen = []
    embed = common.embed
    monkeypatch.setattr(common, "embed", lambda network, *rest: seen.append(network) or embed(network, *rest))
    linear_eval.main([str(run_folder), "--untrained"])
    config, trained = linear_eval.load_run(str(run_folder))
    torch.manual_seed(config.seed)
    before = simclr.SimCLR(config).backbone.state_dict()
    assert not seen[0].training and all(torch.equal(v, before[k]) for k, v in seen[0].state_dict().items())
    assert not torch.equal(before["conv1.weight"], trained.backbone.conv1.weight)


def test_pixels_are_the_pixels(run_folder):
    config, model = linear_eval.load_run(str(run_folder))
    result = linear_eval.main([str(run_folder), "--features", "pixels", "--l2", "10"])
    data = common.load_data(config, torch.device("cpu"))
    assert result["knn_top1"] == common.knn_of(common.pixels, data, config) > 0.25
    assert 0.1 < result["linear_top1"] < 0.3


# --------------------------------------------------------------------------------------- the published protocols


def test_every_method_has_a_published_setting():
    assert set(linear_eval.PUBLISHED) == {"simclr", "moco", "byol", "simsiam", "supcon"} >= set(linear_eval.MODELS)
    lr = {name: how.lr for name, how in linear_eval.PUBLISHED.items()}
    assert lr == {"simclr": 1.6, "moco": 30, "byol": 0.8, "simsiam": 1.6, "supcon": 5}
    for how in linear_eval.PUBLISHED.values():
        assert how.source and how.optimizer in ("sgd", "nesterov", "lars") and (how.factor > 0) == bool(how.steps)


class Recorder(torch.nn.Module):
    """Twice the mean colour as features; keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, x):
        self.shown.append(x)
        return 2 * x.mean((2, 3))


def little_data(n=60):
    """n pictures of three colours, whose left half is dark."""
    labels = torch.arange(n) % 3
    images = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    images[torch.arange(n), labels, :, 8:] = 200
    split = common.whole(images, labels, torch.device("cpu"))
    return common.Data("colours", split, split, ["red", "green", "blue"], [])


@pytest.mark.parametrize("method", sorted(linear_eval.PUBLISHED))
def test_the_published_protocol_learns_and_follows_its_schedule(method, monkeypatch):
    torch.manual_seed(0)
    how = linear_eval.PUBLISHED[method]._replace(batch_size=30, epochs=20)  # two steps an epoch
    if method == "simsiam":
        how = how._replace(batch_size=60, lr=40.0)  # one step; the published 1.6 is for 28,000 steps, not 20
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
    data, network = little_data(), Recorder()
    config = simclr.Config(data="shapes", image_size=16, workers=1)
    chosen, scales, crops = torch.arange(0, 60), set(), data.train.crops
    data.train.crops = lambda *a: (scales.add(a[3][0]), crops(*a))[1]
    classifier = linear_eval.fit_as_published(network, data, config, chosen, data.train.labels, how)
    assert linear_eval.PUBLISHED[method].crop == scales.pop() == (0.2 if method == "supcon" else 0.08) and not scales
    h = common.embed(Recorder(), data.test, config)
    assert (classifier(h).argmax(1) == data.test.labels).float().mean() > 0.95
    name, flags = made[0]
    assert name == ("LARS" if method == "simsiam" else "SGD") and flags.get("weight_decay", 0) == 0
    assert flags.get("nesterov", False) == (method in ("simclr", "byol"))
    if method in ("moco", "supcon"):
        drops = [0.6, 0.8] if method == "moco" else [0.6, 0.75, 0.9]
        factor = 0.1 if method == "moco" else 0.2
        expected = [how.lr * factor ** sum(step // 2 >= 20 * at for at in drops) for step in range(total)]
    else:
        expected = [how.lr * 0.5 * (1 + math.cos(math.pi * step / total)) for step in range(total)]
    assert all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(rates, expected, strict=True))


def test_a_classifier_that_blows_up_is_no_result(capsys):
    how, data = linear_eval.PUBLISHED["moco"]._replace(batch_size=30, epochs=20, lr=3e38), little_data()
    config = simclr.Config(data="shapes", image_size=16, workers=1)
    with pytest.raises(common.RunFailure, match="lower --lr"):
        linear_eval.fit_as_published(Recorder(), data, config, torch.arange(60), data.train.labels, how)
    slow = how._replace(lr=1e3, epochs=1, steps=())
    linear_eval.fit_as_published(Recorder(), data, config, torch.arange(60), data.train.labels, slow)
    assert "worse than a guess" in capsys.readouterr().out


def test_z_needs_a_projection_head(run_folder, tmp_path):
    config = simclr.Config(**simclr.Config.PRESETS["demo"] | {"projection_head": "none", "out": str(tmp_path)})
    state = {"method": "simclr", "config": dataclasses.asdict(config), "model": simclr.SimCLR(config).state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    for flags in (["--features", "z"], ["--probe", "all"], ["--probe", "sobel", "--features", "z"]):
        with pytest.raises(common.InputError, match="no projection head"):
            linear_eval.main([str(tmp_path), *flags])


def test_the_published_protocol_shows_crops_and_flips():
    torch.manual_seed(0)
    how = linear_eval.PUBLISHED["moco"]._replace(batch_size=25, epochs=4, lr=0.1)
    data, network = little_data(), Recorder()
    chosen = torch.arange(0, 60, 2)
    linear_eval.fit_as_published(network, data, simclr.Config(image_size=16), chosen, data.train.labels[chosen], how)
    shown = network.shown[1:]  # after the one that asks for the width
    assert [len(x) for x in shown] == [25, 5] * 4  # all of the chosen in every epoch, the last short batch too
    x = torch.cat(shown)
    left, right = x[..., 0].amax((1, 2)), x[..., -1].amax((1, 2))
    assert 20 < (left > right + 0.2).sum() < 100 and 20 < (right > left + 0.2).sum() < 100  # the bright half
    assert len(x.flatten(1).unique(dim=0)) > 60  # and a crop of its own for each
    few = how._replace(batch_size=300)
    torch.manual_seed(0)
    a = linear_eval.fit_as_published(
        Recorder(), data, simclr.Config(image_size=16), chosen, data.train.labels[chosen], few
    )
    torch.manual_seed(0)
    same = how._replace(batch_size=30, lr=0.01)  # the lr goes with the batch
    b = linear_eval.fit_as_published(
        Recorder(), data, simclr.Config(image_size=16), chosen, data.train.labels[chosen], same
    )
    assert torch.allclose(a.weight, b.weight)


def test_the_published_protocol_leaves_the_backbone_alone(run_folder):
    config, model = linear_eval.load_run(str(run_folder))
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = common.load_data(config, torch.device("cpu"))
    how = linear_eval.PUBLISHED["moco"]._replace(epochs=1)
    linear_eval.fit_as_published(model.backbone, data, config, torch.arange(500), data.train.labels[:500], how)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------- what h keeps


def test_the_probes_alter_what_they_say():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 16, 16)
    kind = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    on, off = kind == 1, kind == 0
    altered = {probe: linear_eval.alter(x.clone(), probe, kind) for probe in linear_eval.PROBES}
    for y in altered.values():
        assert torch.equal(y[off], x[off]) and not any(torch.equal(a, b) for a, b in zip(y[on], x[on], strict=True))
    assert torch.equal(altered["grayscale"][on], common.to_grey(x[on]))
    assert torch.equal(altered["sobel"][on], common.sobel(x[on]))
    assert abs((altered["corrupted"] - x)[on].std() - 0.1) < 0.02
    turned = linear_eval.alter(x.clone(), "rotation", torch.arange(8) % 4)
    assert all(torch.equal(turned[i], x[i].rot90(i % 4, (1, 2))) for i in range(8))


def test_altered_features_match_their_pictures(run_folder):
    config, model = linear_eval.load_run(str(run_folder))
    model.eval()
    data = common.load_data(config, torch.device("cpu"))
    both, kind = linear_eval.embed_altered(model, data.test, config, "rotation", seed=3)
    assert kind.bincount().tolist() == [50] * 4
    index = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    x = common.rotate(torch.cat(list(data.test.centered([index], 32))), kind)
    with torch.no_grad():
        assert torch.allclose(both["h"], model.backbone(x), atol=1e-5) and torch.allclose(
            both["z"], model(x), atol=1e-5
        )
    _, kind = linear_eval.embed_altered(model, data.test, config, "grayscale", seed=3)
    assert kind.bincount().tolist() == [160, 40]
    assert not model.backbone._forward_hooks


def test_fit_mlp_learns_what_no_linear_classifier_can():
    torch.manual_seed(0)
    x = torch.randn(3000, 16)
    y = (x[:, 0].abs() > 0.67).long()
    network = linear_eval.fit_mlp(x, y, 2, 16, seed=0)
    assert (network(x).argmax(1) == y).float().mean() > 0.9
    again = linear_eval.fit_mlp(x, y, 2, 16, seed=0)
    assert torch.equal(network(x), again(x))


class ColourBlind(torch.nn.Module):
    """h keeps the colours, g(h) only the brightness."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
        self.backbone.feature_dim = 48

    def forward(self, x):
        return common.grey(self.backbone(x).view(-1, 3, 4, 4)).flatten(1)


def test_a_probe_finds_what_was_lost(run_folder):
    images, labels = common.make_shapes(8000, 5, 32)  # 800: see run_folder
    split = common.whole(images, labels, torch.device("cpu"))
    split.images[:, 0] //= 2  # all tinted, so that grey pictures differ
    data = common.Data("shapes", split, split, [], [])
    config = simclr.Config(image_size=32)
    table = linear_eval.run_probes(ColourBlind(), data, config, ["grayscale"], ["h", "z"], 0)["grayscale"]
    assert math.isclose(table["chance"], 0.8, rel_tol=1e-6)
    assert table["h"] > 0.97 and table["z"] < 0.9


def test_probe_all_prints_the_table(run_folder, capsys):
    result = linear_eval.main([str(run_folder), "--probe", "all"])
    out = capsys.readouterr().out
    assert list(result) == ["grayscale", "rotation", "corrupted", "sobel"]
    for probe, row in result.items():
        assert list(row) == ["chance", "h", "z"] and f"{100 * row['h']:.1f}" in out and probe in out
    assert "25 / 67.6 / 25.6" in out
    one = linear_eval.main([str(run_folder), "--probe", "sobel", "--features", "z"])
    assert one == {"sobel": {"chance": 0.5, "z": result["sobel"]["z"]}}


# ------------------------------------------------------------------------------------- export, transfer, pictures


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_exported_backbones_load_into_torchvision(name, tmp_path, capsys):
    config = simclr.Config(backbone=name, stem="imagenet", projection_dim=8, out=str(tmp_path))
    model = simclr.SimCLR(config)
    for layer in model.modules():  # as if trained
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.weight.data.fill_(0.7)
    torch.save(
        {"method": "simclr", "config": dataclasses.asdict(config), "model": model.state_dict()},
        tmp_path / "checkpoint.pt",
    )
    assert linear_eval.main([str(tmp_path), "--export", str(tmp_path / "backbone.pth")]) == {}
    assert f"torchvision.models.{name}()" in capsys.readouterr().out
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)
    network = torchvision.models.get_model(name)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    x = torch.rand(2, 3, 64, 64)
    classes = network.eval()(x)
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        assert classes.shape == (2, 1000) and torch.equal(network(x), model.eval().backbone(x))
    if name == "resnet50":
        detector = torchvision.models.detection.maskrcnn_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=3,
            min_size=64,
            max_size=64,
            image_mean=[0, 0, 0],
            image_std=[1, 1, 1],
        )
        detector.backbone.body.load_state_dict(state)  # strictly
        with torch.no_grad():
            levels = detector.eval().backbone.body(x)
            found = detector([x[0]])
        assert torch.equal(levels["3"].mean((2, 3)), model.backbone(x)) and "masks" in found[0]


def test_export_says_what_the_small_stem_needs_and_refuses_resnet8(run_folder, tmp_path, capsys):
    config = simclr.Config(backbone="resnet18", image_size=32, out=str(tmp_path))
    state = {"method": "simclr", "config": dataclasses.asdict(config), "model": simclr.SimCLR(config).state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    linear_eval.main([str(tmp_path), "--export", str(tmp_path / "small.pth")])
    assert "torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)" in capsys.readouterr().out
    network = torchvision.models.resnet18()
    network.conv1, network.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    state = torch.load(tmp_path / "small.pth", weights_only=True)
    assert network.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    with pytest.raises(common.InputError, match="resnet8 is not a torchvision network"):
        linear_eval.main([str(run_folder), "--export", str(tmp_path / "x.pth")])


def test_transfer_to_other_data_and_the_confusion_matrix(run_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for i, image in enumerate(little_data().train.images):
        path = tmp_path / "photos" / "rgb"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    flags = ["--data", str(tmp_path / "photos"), "--confusion", str(tmp_path / "c.png")]
    result = linear_eval.main([str(run_folder), *flags])
    assert result["linear_top1"] == 1 and result["confusion"].tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 2]]
    assert "linear top-5" not in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "c.png")).std() > 10


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--epochs 3", "--epochs does nothing without --protocol paper"),
        ("--lr 0", "--lr 0.0: must be > 0"),
        ("--lr 3", "--lr does nothing without --protocol paper"),
        ("--protocol paper --l2 1", "--l2 does nothing with --protocol paper"),
        ("--protocol paper --epochs 0", "--epochs 0: must be >= 1"),
        ("--probe sobel --label-fraction 0.1", "--label-fraction does nothing with --probe sobel"),
        ("--probe all --features z", "--features z: --probe all reads h and z"),
        ("--probe rotation --features pixels", "--features pixels: --probe rotation reads h and z"),
        ("--probe colour", "argument --probe: invalid choice: 'colour'"),
        ("--features pixels --untrained", "--untrained does nothing with --features pixels"),
        ("--export x.pth --data shapes", "--data does nothing with --export"),
        ("--export /no/such/x.pth", "resnet8 is not a torchvision network"),
        ("--confusion /no/such/x.png", "no folder /no/such"),
        ("--confusion .", "a folder; give the name of a file"),
        ("--confusion x.jpeg9", "must end in .png"),
        ("--export .", "a folder; give the name of a file"),
        ("--seed -1", "--seed -1: must be >= 0"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, words, run_folder, capsys):
    with pytest.raises(SystemExit) as stop, common.exit_status():
        linear_eval.main([str(run_folder), *flags.split()])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1, err


def test_probes_need_no_labels_but_held_out_images(run_folder, tmp_path):
    for i, image in enumerate(little_data().train.images):
        path = tmp_path / ("train" if i % 3 else "test") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    row = linear_eval.main([str(run_folder), "--data", str(tmp_path), "--probe", "rotation"])["rotation"]
    assert row["chance"] == 0.25 and "h" in row
    with pytest.raises(common.InputError, match="no held-out images"):
        linear_eval.main([str(run_folder), "--data", str(tmp_path / "test"), "--probe", "rotation"])


def test_z_and_h_are_what_they_say(run_folder):
    config, model = linear_eval.load_run(str(run_folder))
    x = torch.rand(3, 3, 32, 32)
    model.eval()
    assert model.backbone(x).shape == (3, 128) and model(x).shape == (3, config.projection_dim)


def test_evaluation_changes_nothing_in_the_run(run_folder):
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    linear_eval.main([str(run_folder)])
    assert before == {p.name: p.read_bytes() for p in run_folder.iterdir()}
