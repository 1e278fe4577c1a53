"""The shared module: flags, data of every kind, the optimiser, the schedule, kNN and the checkpoint."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import simclr

CPU = torch.device("cpu")


def write(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path) if mode else Image.fromarray(array).save(path)


def noise(h, w, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (h, w, *channels), dtype=np.uint8)


# --------------------------------------------------------------------------------------------------------- flags


def test_every_flag_has_help_with_its_default_and_can_be_given(capsys):
    with pytest.raises(SystemExit):
        common.parse_args(simclr.Config, ["--help"])
    text = capsys.readouterr().out
    for name, (kind, *_) in common.flags(simclr.Config).items():
        assert common.dashed(name) in text
        if kind is bool:
            assert "--no-" + name.replace("_", "-") in text
    words = " ".join(text.split())
    assert "default 0.1; cifar: 0.5; demo: 0.2" in words  # the temperature in every preset


def test_booleans_and_no_abbreviations():
    assert common.parse_args(simclr.Config, ["--compile"]).compile
    assert not common.parse_args(simclr.Config, ["--no-compile"]).compile
    with pytest.raises(common.InputError, match="did you mean --temperature"):
        common.parse_args(simclr.Config, ["--temp", "0.3"])


def test_resume_takes_the_runs_flags_unless_given(tmp_path):
    stored = {"method": "simclr", "temperature": 0.33, "epochs": 7, "backbone": "resnet8", "image_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    c = common.parse_args(simclr.Config, ["--resume", "--out", str(tmp_path), "--epochs", "9"])
    assert (c.temperature, c.epochs, c.backbone, c.resume) == (0.33, 9, "resnet8", True)


def test_resume_keeps_a_warm_up_that_was_given_by_hand(tmp_path, capsys):
    given = simclr.Config(epochs=2, warmup_epochs=2.0, out=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"method": "simclr"} | dataclasses.asdict(given)))
    resume = ["--resume", "--out", str(tmp_path)]
    assert common.parse_args(simclr.Config, resume).warmup_epochs == 2 and not capsys.readouterr().out
    assert common.parse_args(simclr.Config, [*resume, "--epochs", "1"]).warmup_epochs == 0.1


# ---------------------------------------------------------------------------------------------------------- data


def test_shapes_are_the_same_for_a_seed_and_balanced():
    a, la = common.make_shapes(200, 0)
    b, lb = common.make_shapes(200, 0)
    assert torch.equal(a, b) and torch.equal(la, lb) and not torch.equal(a, common.make_shapes(200, 1)[0])
    assert a.shape == (200, 3, 32, 32) and a.dtype == torch.uint8 and la.bincount().tolist() == [20] * 10


def test_the_label_is_the_shape_drawn():
    (a, la), (b, lb) = common.make_shapes(3000, 0), common.make_shapes(300, 1)
    a, b = (x.float().flatten(1) for x in (a, b))
    assert common.knn_accuracy(a - a.mean(0), la, b - a.mean(0), lb, k=1) > 0.3


def test_shapes_have_one_area_whatever_the_class():
    outer, inner = common.shape_outlines()
    assert torch.allclose((outer**2 - inner**2).mean(1), torch.tensor(0.5), atol=1e-4)


def test_every_kind_of_picture_is_decoded(tmp_path):
    """Grey, palette, RGBA, 16-bit, CMYK, EXIF-turned: uint8 RGB of the right pixels."""
    rgb = noise(12, 9, 3)
    write(tmp_path / "rgb.png", rgb)
    assert np.array_equal(common.decode(tmp_path / "rgb.png")[0], rgb)
    write(tmp_path / "rgba.png", np.concatenate([rgb, noise(12, 9, 1)], 2))
    assert np.array_equal(common.decode(tmp_path / "rgba.png")[0], rgb)
    grey = noise(12, 9)
    write(tmp_path / "grey.png", grey)
    assert np.array_equal(common.decode(tmp_path / "grey.png")[0], np.stack([grey] * 3, 2))
    write(tmp_path / "deep.png", grey.astype(np.uint16) * 257)
    assert np.array_equal(common.decode(tmp_path / "deep.png")[0], np.stack([grey] * 3, 2))
    Image.fromarray(rgb).quantize(255).save(tmp_path / "palette.png")
    assert np.abs(common.decode(tmp_path / "palette.png")[0].astype(int) - rgb).mean() < 30
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert common.decode(tmp_path / "cmyk.jpg")[0].shape == (12, 9, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    pixels, size = common.decode(tmp_path / "turned.png")
    assert size == (9, 12) and np.array_equal(pixels, np.rot90(rgb, -1))
    pixels, size = common.decode(tmp_path / "turned.png", (16, 16))
    assert size == (9, 12) and pixels.shape == (16, 16, 3)


def config(root, **given):
    return simclr.Config(**{"data": str(root), "image_size": 32, "workers": 2} | given)


def test_a_folder_of_classes_holds_out_every_tenth_image(tmp_path):
    for i in range(40):
        write(tmp_path / "ab"[i % 2] / f"{i:02}.png", noise(32, 32, 3, seed=i))
    data = common.load_data(config(tmp_path), CPU)
    assert data.classes == ["a", "b"] and (len(data.train), len(data.test)) == (36, 4)
    assert data.test.labels.bincount().tolist() == [2, 2]
    assert data.train.images.shape == (36, 3, 32, 32)
    stored = torch.cat([data.train.images, data.test.images]).flatten(1).float().mean(1).sort().values
    files = torch.tensor([noise(32, 32, 3, seed=i).mean() for i in range(40)]).float().sort().values
    assert torch.allclose(stored, files, atol=1e-3)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_train_and_test_folders(tmp_path, held_out):
    for split, n in (("train", 6), (held_out, 4)):
        for i in range(n):
            write(tmp_path / split / "xy"[i % 2] / f"{i}.JPG", noise(20, 30, 3, seed=i))
    write(tmp_path / held_out / "unseen" / "0.jpg", noise(20, 30, 3))
    data = common.load_data(config(tmp_path), CPU)
    assert (len(data.train), len(data.test)) == (6, 4) and data.classes == ["x", "y"]
    assert data.train.images.shape[2:] == (20, 30)  # small pictures of one size are kept as they are


def test_a_flat_folder_has_no_labels_and_no_knn(tmp_path, capsys):
    for i in range(8):
        write(tmp_path / "photos" / f"{i}.png", noise(40, 30 + i, 3, seed=i))
    c = config(tmp_path / "photos", backbone="resnet8", epochs=1, batch_size=4, out=str(tmp_path / "run"))
    metrics = simclr.train(c)
    assert metrics["knn_top1"] is None and not any(k.startswith("knn h") for k in metrics)
    assert "no labels" in capsys.readouterr().out
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[1].split(",")[5] == ""


def test_links_hidden_folders_and_stray_pictures(tmp_path):
    """Linked class folders count, hidden ones do not, and a picture beside the classes is one without a label."""
    for i in range(20):
        write(tmp_path / "elsewhere" / "b" / f"{i:02}.png", noise(32, 32, 3, seed=i))
        write(tmp_path / "photos" / "a" / f"{i:02}.png", noise(32, 32, 3, seed=100 + i))
    (tmp_path / "photos" / "b").symlink_to(tmp_path / "elsewhere" / "b", target_is_directory=True)
    write(tmp_path / "photos" / ".thumbnails" / "x.png", noise(32, 32, 3))
    write(tmp_path / "photos" / "cover.png", noise(32, 32, 3))
    data = common.load_data(config(tmp_path / "photos"), CPU)
    assert data.classes == ["a", "b"] and len(data.test) == 4
    assert sorted(data.train.labels.tolist()) == [-1] + [0] * 18 + [1] * 18


def test_a_long_warm_up_of_a_preset_is_shortened(capsys):
    c = common.parse_args(simclr.Config, ["--preset", "cifar", "--epochs", "10"])
    assert c.warmup_epochs == 1.0 and "is lowered" in capsys.readouterr().out
    assert common.parse_args(simclr.Config, ["--epochs", "3", "--warmup-epochs", "3"]).warmup_epochs == 3


def test_resume_takes_a_new_weight_decay(tmp_path):
    c = simclr.Config(data="shapes", backbone="resnet8", image_size=32, epochs=1, batch_size=4, out=str(tmp_path))
    images, labels = common.make_shapes(8, 0)
    data = common.Data("x", common.whole(images, labels, CPU), None, [], [])
    for decay, resume in ((0.1, False), (0.2, True)):
        c.resume, model = resume, simclr.SimCLR(c)
        optimizer = torch.optim.SGD(common.parameter_groups(model, decay), lr=0.1, momentum=0.9)
        run = common.Run(c, data, CPU, model=model, optimizer=optimizer)
        run.save()
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]


def test_a_presets_batch_is_lowered_to_the_data(tmp_path, capsys, monkeypatch):
    for i in range(40):
        write(tmp_path / "photos" / f"{i}.png", noise(40, 30 + i, 3, seed=i))
    flags = ["--data", str(tmp_path / "photos"), "--epochs", "1", "--backbone", "resnet8", "--image-size", "16"]
    simclr.train(common.parse_args(simclr.Config, [*flags, "--out", str(tmp_path / "run")]))
    assert "batch of 4096 is lowered to 16," in capsys.readouterr().out


def test_streamed_views_are_the_resident_ones(tmp_path):
    """--resident-gb 0 streams: the same central views, and crops that depend neither on workers nor on order."""
    for i in range(20):
        write(tmp_path / "ab"[i % 2] / f"{i:02}.png", noise(32, 32, 3, seed=i))
    resident = common.load_data(config(tmp_path), CPU)
    streamed = common.load_data(config(tmp_path, resident_gb=0.0), CPU)
    assert streamed.train.images is None and "streamed" in streamed.describe()
    index = [torch.arange(18)]
    a, b = (next(iter(d.train.centered(index, 32))) for d in (resident, streamed))
    assert torch.allclose(a, b, atol=1e-6)

    def crops(batches, workers, seed):
        return torch.cat([torch.stack(v, 1) for v in streamed.train.crops(batches, 24, 2, (0.2, 1.0), seed, workers)])

    one = crops(torch.arange(18).split(6), 1, 5)
    assert one.shape == (18, 2, 3, 24, 24) and not torch.equal(one[:, 0], one[:, 1])
    assert torch.equal(one, crops(torch.arange(18).split(9), 2, 5))
    assert torch.equal(one.flip(0), crops(torch.arange(18).flip(0).split(6), 1, 5))
    assert not torch.equal(one, crops(torch.arange(18).split(6), 1, 6))


def test_a_streamed_run_trains(tmp_path):
    for i in range(20):
        write(tmp_path / "photos" / "ab"[i % 2] / f"{i:02}.png", noise(50 + i, 40, 3, seed=i))
    flags = {"resident_gb": 0.0, "backbone": "resnet8", "epochs": 2, "batch_size": 6, "out": str(tmp_path / "run")}
    assert math.isfinite(simclr.train(config(tmp_path / "photos", **flags))["loss"])


def test_named_sets_come_from_torchvision(tmp_path, monkeypatch):
    """The layout that torchvision's classes have, without their download."""

    class Fake:
        def __init__(self, root, download, **split):
            n = 10 if split in ({"train": True}, {"split": "train+unlabeled"}) else 4
            self.classes, self.targets = ["cat", "dog"], [i % 2 for i in range(n)]
            self.data = noise(32, 32, n, 3).transpose(2, 0, 1, 3)

    class FakeSTL(Fake):
        def __init__(self, root, download, **split):
            super().__init__(root, download, **split)
            self.labels = np.array([-1 if i > 5 else i % 2 for i in range(len(self.targets))])
            self.data = self.data.transpose(0, 3, 1, 2)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    monkeypatch.setattr("torchvision.datasets.STL10", FakeSTL)
    for name in ("cifar10", "stl10"):
        data = common.load_data(config(name, data_dir=str(tmp_path)), CPU)
        assert data.train.images.shape == (10, 3, 32, 32) and len(data.test) == 4 and data.labelled()
    assert common.knn_of(common.pixels, data, config("stl10")) is not None  # unlabelled images are not in the bank


# ----------------------------------------------------------------------------------------- network and optimiser


@pytest.mark.parametrize(
    "name, stem, size", [("resnet18", "auto", 32), ("resnet50", "auto", 224), ("resnet18", "imagenet", 32)]
)
def test_stems_and_zero_initialised_residuals(name, stem, size):
    network = common.build_backbone(simclr.Config(backbone=name, stem=stem, image_size=size))
    small = stem == "auto" and size <= 64
    assert network.conv1.kernel_size == ((3, 3) if small else (7, 7))
    assert isinstance(network.maxpool, nn.Identity) == small
    last = "bn2" if name == "resnet18" else "bn3"
    assert all((getattr(b, last).weight == 0).all() for layer in (network.layer1, network.layer4) for b in layer)
    assert network.feature_dim == (512 if name == "resnet18" else 2048)


@pytest.mark.parametrize("inside", [True, False])
def test_lars_against_the_written_rule(inside):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    optimizer = common.LARS(common.parameter_groups(model, 0.1), lr=0.3, lr_in_momentum=inside)
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in w.items()}
    for step in range(4):
        lr = optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.3 / (step + 1)
        model.zero_grad()
        model(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
        for name, p in model.named_parameters():
            g, rate = p.grad.clone(), 1.0
            if p.ndim > 1:  # a weight: decay and adaptation
                g = g + 0.1 * w[name]
                rate = 0.001 * w[name].norm() / g.norm()
            v[name] = 0.9 * v[name] + (lr if inside else 1.0) * rate * g
            w[name] = w[name] - (1.0 if inside else lr) * v[name]
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.allclose(p, w[name], rtol=1e-12, atol=1e-14), name


def test_lars_leaves_a_zero_weight_or_gradient_unscaled():
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = common.LARS([p], lr=1.0)
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(p.detach(), -torch.ones(2, 2))


def test_cosine_lr():
    values = [common.cosine_lr(s, 100, 10, 2.0) for s in range(100)]
    assert math.isclose(values[0], 0.2) and math.isclose(values[9], 2.0) and math.isclose(values[10], 2.0)
    assert math.isclose(values[55], 1.0) and 0 < values[99] < 0.01
    assert values[:10] == sorted(values[:10]) and values[10:] == sorted(values[10:], reverse=True)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("micro", [4, 5, 16])
def test_pieces_give_the_gradient_of_the_whole_batch(micro, views):
    """Without BN they change nothing, whatever mixes the rows: equal to float64 rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 12), nn.Tanh(), nn.Linear(12, 6)).double()
    x, w = torch.rand(views, 16, 3, 3, 3, dtype=torch.float64), torch.rand(6, 16 * views, dtype=torch.float64)
    found = []
    for size in (0, micro):
        model.zero_grad()
        z = common.embed_in_pieces(model, size, *x)
        (z @ w).logsumexp(0).square().mean().backward()
        found.append([z, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(*found, strict=True))


def test_pieces_hold_no_graph_and_move_bn_statistics_once():
    torch.manual_seed(0)
    model = simclr.SimCLR(simclr.Config(**simclr.Config.PRESETS["demo"]))
    twin = simclr.SimCLR(simclr.Config(**simclr.Config.PRESETS["demo"]))
    twin.load_state_dict(model.state_dict())
    x1, x2 = torch.rand(2, 8, 3, 32, 32)
    held = []

    def graph(network, micro):
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z = common.embed_in_pieces(network, micro, x1, x2)
        held.append(kept)
        return z

    graph(model, 4).square().sum().backward()
    graph(model, 0)
    assert held[0] == x1.nbytes + x2.nbytes < held[1] / 20  # the pieces' pictures alone
    model.load_state_dict(twin.state_dict())
    common.embed_in_pieces(model, 4, x1, x2).square().sum().backward()
    for piece in range(2):
        twin(torch.cat([x1[4 * piece :][:4], x2[4 * piece :][:4]]))
    for name, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


# ---------------------------------------------------------------------------------------------------- evaluation


def test_knn_against_a_plain_loop():
    torch.manual_seed(0)
    bank, queries = torch.randn(50, 6), torch.randn(30, 6)
    bank_labels, labels = torch.randint(3, (50,)), torch.randint(3, (30,))
    right = 0
    for q, label in zip(queries, labels, strict=True):
        s = torch.cosine_similarity(q[None], bank)
        votes = [0.0] * 3
        for i in s.argsort(descending=True)[:7]:
            votes[bank_labels[i]] += math.exp(s[i].item() / 0.1)
        right += votes.index(max(votes)) == label
    assert common.knn_accuracy(bank, bank_labels, queries, labels, k=7) == right / 30
    assert common.knn_accuracy(bank, bank_labels, bank, bank_labels, k=1) == 1.0
    assert 0 <= common.knn_accuracy(bank, bank_labels, queries, labels, k=200) <= 1  # k is capped


def test_feature_std_and_effective_rank():
    torch.manual_seed(0)
    z = torch.randn(20_000, 16)
    assert abs(common.feature_std(z).item() - 1 / 4) < 0.002
    assert abs(common.effective_rank(z) - 16) < 0.1
    flat = torch.ones(100, 16)
    assert common.feature_std(flat) < 1e-6 and abs(common.effective_rank(flat) - 1) < 1e-3
    two = torch.eye(16)[torch.arange(100) % 2]
    assert abs(common.effective_rank(two) - 2) < 1e-3


def test_embed_is_in_eval_mode_and_gives_the_mode_back():
    model = simclr.SimCLR(simclr.Config(backbone="resnet8", image_size=32))
    images, labels = common.make_shapes(600, 0)
    data = common.whole(images, labels, CPU)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    c = simclr.Config(image_size=32)
    whole, part = common.embed(model, data, c), common.embed(model, data, c, torch.arange(3))
    assert torch.allclose(whole[:3], part, atol=1e-5) and model.training  # no image's features depend on the batch
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_likeness_is_the_mean_squared_cosine_of_pairs():
    torch.manual_seed(0)
    for n, d in ((7, 4), (4, 7), (64, 256)):
        z = torch.randn(n, d) * torch.rand(n, 1)
        pairs = [F.cosine_similarity(z[i], z[j], dim=0).item() ** 2 for i in range(n) for j in range(n) if i != j]
        assert math.isclose(common.likeness(z), sum(pairs) / len(pairs), rel_tol=1e-4)
    line = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [0.5, 1.0]])  # two opposite points: std is not 0, but this is 1
    assert math.isclose(common.likeness(line), 1, rel_tol=1e-6) and common.feature_std(line) > 0.5
    dead = torch.zeros(5, 3)
    assert common.likeness(dead) == 1 and common.effective_rank(dead) == 1
    assert abs(common.likeness(torch.eye(5))) < 1e-6 and math.isfinite(common.likeness(torch.ones(1, 3)))


@pytest.mark.parametrize(
    "z, settled, collapsed",
    [
        (torch.ones(8, 128), 2, True),
        (torch.ones(8, 128) * torch.tensor([1.0, -1, 1, 1, 1, 1, 1, -1])[:, None], 2, True),
        (torch.eye(8, 128), 2, False),
        (torch.ones(4, 128), 2, False),
        (torch.ones(8, 128), 3, False),
    ],
    ids=["a point", "a line", "healthy", "few rows", "early"],
)
def test_collapse_is_named(z, settled, collapsed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common.Run, "SETTLED", settled)
    c = simclr.Config(
        data="shapes", backbone="resnet8", image_size=32, epochs=1, batch_size=4, out=str(tmp_path), knn_every=0
    )
    images, labels = common.make_shapes(8, 0)
    data = common.Data("x", common.whole(images, labels, CPU), None, [], [])
    run = common.Run(c, data, CPU, model=simclr.SimCLR(c))
    for _ in run.batches(2, None):
        run.after_step(torch.tensor(1.0), z, 0.1, images[:2].float(), images[:2].float())
    run.after_epoch(lambda: None, "look at --lr")
    assert ("collapsed to a point or a line (mean squared cosine" in (out := capsys.readouterr().out)) == collapsed
    assert (": look at --lr" in out) == collapsed


# ---------------------------------------------------------------------------------------------------- checkpoint


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    common.save_whole({"a": 1}, path)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(common.RunFailure, match="No space left on device.*is kept"):
        common.save_whole({"a": 2}, path)
    assert torch.load(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("rows", [[], [[1, 2.0, 0.1, 0.3, 9.0, None, 5.0]]])
def test_curves_of_any_length(rows, tmp_path):
    """None after Ctrl-C in the first epoch; without labels, no panel for kNN."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = common.Run.__new__(common.Run)
    run.out, run.rows, run.dim = tmp_path, rows, 4
    run.curves()
    assert (tmp_path / "curves.png").exists() == bool(rows)
    assert not rows or Image.open(tmp_path / "curves.png").width == 3 * 3.5 * 110


def test_curves_without_matplotlib_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run = common.Run.__new__(common.Run)
    run.out, run.rows, run.dim = Path(tmp_path), [[1, 1.0, 0.1, 0.1, 3.0, None, 5.0]], 4
    run.curves()
    assert capsys.readouterr().out.count("\n") == 1 and not list(tmp_path.iterdir())
