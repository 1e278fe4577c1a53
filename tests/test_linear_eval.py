"""The evaluation, its controls, the published protocols, and the classifier that torchvision loads."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import byol
import cebra
import common
import images
import linear_eval
import moco
import simclr
import simsiam
import supcon
import swav
from tests.helpers import ROOT, equal, saved, train

CPU = torch.device("cpu")
TUNED = "--protocol finetune --epochs 3 --batch-size 10 --lr 0.02"


def write(folder, n, seed=0, side=32, classes=10):
    """n pictures of shapes as PNG files, in a sub-folder for each class."""
    for i, (picture, label) in enumerate(zip(*images.make_shapes(n, seed), strict=True)):
        if label < classes:
            path = folder / list(images.SHAPES)[label] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side, side)).save(path)


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """500 pictures of 32 pixels to train on, and 200 held out, in ten classes."""
    root = tmp_path_factory.mktemp("album")
    write(root / "train", 500)
    write(root / "test", 200, seed=1)
    return root


def run_on(folder, out, **given):
    """A run of few steps on a folder of pictures. Returns its figures."""
    config = simclr.Config(data=str(folder), image_size=given.get("image_size", 32), workers=0)
    return train(simclr, out, images.load(config, CPU), **{"batch_size": 32, "lr": 0.1, "image_size": 32} | given)


@pytest.fixture(scope="module")
def run(album, tmp_path_factory):
    return run_on(album, tmp_path_factory.mktemp("run") / "simclr", epochs=2, knn_every=2)


@pytest.fixture
def evaluate(run):
    return lambda *flags: linear_eval.main([run["out"], *map(str, flags)])


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A run of resnet18 at 70 pixels, trained a little on 40 squares of 96 pixels; 40 more are held out."""
    root = tmp_path_factory.mktemp("squares")
    write(root / "data/train", 100, side=96, classes=4)
    write(root / "data/test", 100, seed=1, side=96, classes=4)
    run_on(root / "data", root / "run", backbone="resnet18", image_size=70, batch_size=10, epochs=2)
    return root


def little_data(n=60):
    """n pictures of three colours, whose left half is dark."""
    labels, pixels = torch.arange(n) % 3, torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    pixels[torch.arange(n), labels, :, 8:] = 200
    return images.Images(labels, CPU, pixels)


def test_fit_linear_is_at_the_optimum():
    """The gradient of the objective on standardised features is 0, and the layer returned takes the features as is."""
    torch.manual_seed(0)
    x, y = 3 * torch.randn(300, 8) + 5, torch.randint(4, (300,))
    classifier = linear_eval.fit_linear(x, y, 4, l2=0.01)
    w = (classifier.weight * x.std(0)).requires_grad_()
    b = (classifier.bias + classifier.weight @ x.mean(0)).requires_grad_()
    logits = (x - x.mean(0)) / x.std(0) @ w.T + b
    objective = F.cross_entropy(logits, y) + 0.005 * w.square().sum()
    assert all(g.abs().max() < 1e-4 for g in torch.autograd.grad(objective, (w, b)))
    torch.testing.assert_close(classifier(x), logits, atol=1e-4, rtol=1e-4)


def test_a_separable_set_is_learned_and_shuffled_labels_give_chance():
    torch.manual_seed(0)
    labels = torch.arange(2000) % 10
    x = F.one_hot(labels, 10).float() + 0.1 * torch.randn(2000, 10)

    def accuracy(labels):
        guessed = linear_eval.fit_linear(x[:1000], labels[:1000], 10)(x[1000:]).argmax(1)
        return (guessed == labels[1000:]).float().mean()

    assert accuracy(labels) > 0.98
    assert abs(accuracy(labels[torch.randperm(2000)]) - 0.1) < 0.04


def test_label_fraction_takes_the_same_share_of_each_class():
    labels = torch.cat([torch.arange(1000) % 10, torch.full((50,), -1)])
    picked = linear_eval.pick_labels(labels, 0.05, 0)
    assert labels[picked].bincount().tolist() == [5] * 10
    assert torch.equal(picked, linear_eval.pick_labels(labels, 0.05, 0))
    assert not torch.equal(picked, linear_eval.pick_labels(labels, 0.05, 1))
    assert len(linear_eval.pick_labels(labels, 1e-6, 0)) == 10  # at least one of each class
    assert len(linear_eval.pick_labels(labels, 1.0, 0)) == 1000  # and no image without a label


@pytest.mark.parametrize(
    "flags, knn", [("", "h"), ("--features z", "g(h)"), ("--features pixels --l2 10", "raw pixels"),
    ("--untrained", "h before training"), ("--label-fraction 0.1", None)],
)  # fmt: skip
def test_what_is_printed_is_the_accuracy_on_the_held_out_images(flags, knn, run, album, evaluate, capsys):
    result = evaluate(*flags.split())
    out, names = capsys.readouterr().out, sorted(images.SHAPES)
    labels = torch.tensor([names.index(path.parent.name) for path in sorted(album.glob("test/*/*.png"))])
    best = result["logits"].topk(5, dim=1).indices
    hit = (best[:, 0] == labels).float()
    assert math.isclose(result["linear_top1"], hit.mean(), rel_tol=1e-6) and result["linear_top1"] > 0.15
    assert math.isclose(result["linear_top5"], (best == labels[:, None]).sum() / 200, rel_tol=1e-6)
    assert torch.allclose(torch.tensor(result["per_class"]), torch.stack([hit[labels == c].mean() for c in range(10)]))
    for name, key in (("a guess", "a guess"), ("linear top-1", "linear_top1"), ("linear top-5", "linear_top5")):
        assert f"  {name:14}{result[key]:.4f}\n" in out
    assert result["a guess"] == pytest.approx(0.1) and f"kNN top-1     {result['knn_top1']:.4f}" in out
    worst = min(zip(result["per_class"], names, strict=True))
    assert f"per class     {worst[1]} {worst[0]:.3f}, " in out
    assert f"{50 if '0.1' in flags else 500} labels used" in out
    if knn:  # that of the run itself, within a picture, for rounding
        assert result["knn_top1"] == pytest.approx(run[f"knn {knn}"], abs=0.0051)


@pytest.mark.parametrize("flags", ["", "--protocol paper --epochs 3 --batch-size 32 --lr 0.1"])
def test_shuffled_labels_give_chance(flags, evaluate, capsys):
    shuffled = evaluate("--shuffle-labels", *flags.split())
    for key in ("linear_top1", "knn_top1"):
        assert abs(shuffled[key] - 0.1) < 0.09, key  # 4 sigma of 200 images
    assert abs(shuffled["linear_top5"] - 0.5) < 0.15 and "SHUFFLED" in capsys.readouterr().out


def test_untrained_is_the_network_before_training(run, album, evaluate, tmp_path, monkeypatch):
    seen, embed = [], common.embed
    monkeypatch.setattr(common, "embed", lambda network, *rest: seen.append(network) or embed(network, *rest))
    evaluate("--untrained")
    run_on(album, tmp_path / "start", epochs=0)
    before = torch.load(tmp_path / "start/backbone.pt", weights_only=True)
    assert not seen[0].training and equal(dict(seen[0].state_dict()), before)


def test_evaluation_leaves_the_run_alone_and_names_a_newer_one(run, evaluate, capsys):
    newer = Path(run["out"] + "-2/checkpoint.pt")
    newer.parent.mkdir()
    newer.touch()
    before = {path.name: path.read_bytes() for path in Path(run["out"]).iterdir()}
    evaluate()
    evaluate("--protocol", "finetune", "--epochs", 1, "--batch-size", 64, "--label-fraction", 0.2)
    assert before == {path.name: path.read_bytes() for path in Path(run["out"]).iterdir()}
    assert f"note: {newer.parent} beside it is a newer run" in capsys.readouterr().out


def test_another_set_whose_damaged_pictures_are_left_out(evaluate, tmp_path, capfd):
    """Three classes; the held-out images have two of them, one image of which is cut short, like one to train on."""
    write(tmp_path / "train", 60, classes=3)
    write(tmp_path / "test", 60, seed=1, classes=2)
    for path in ("train/ring/001.png", "test/disc/000.png"):
        (tmp_path / path).write_bytes((tmp_path / path).read_bytes()[:400])
    result = evaluate("--data", tmp_path)
    out, err = capfd.readouterr()
    assert out.count("note: damaged pictures left out: 1\n") == 2 and err.count("ring/001.png") == 1
    assert len(result["logits"]) == 11 and result["a guess"] == pytest.approx(6 / 11) and "top-5" not in out
    assert [math.isnan(value) for value in result["per_class"]] == [False, True, False]  # disc, half-disc, ring


def test_runs_and_sets_that_cannot_be_evaluated(run, album, tmp_path, monkeypatch):
    def refuses(words, *argv):
        with pytest.raises(common.InputError, match=re.escape(words)):
            linear_eval.main([str(word) for word in argv])

    refuses("no class sub-folders with held-out images", run["out"], "--data", album / "test/disc")
    run_on(album / "test", tmp_path / "headless", epochs=0, projection_head="none")
    refuses("--features z: the network has no projection head", tmp_path / "headless", "--features", "z")
    train(simclr, tmp_path / "arrays", images.from_arrays(*images.make_shapes(80, 0), CPU), epochs=0)
    refuses("its pictures came from Python; give a folder by --data", tmp_path / "arrays")
    refuses("give the folder of a whole run", tmp_path)
    monkeypatch.setattr(common, "load_run", lambda folder: (cebra.Config.preset("demo"), None))
    refuses("a run of cebra has no pictures", "a/run")


@pytest.mark.parametrize("flags, words", [
    ("--epochs 3", "--epochs does nothing with --protocol features; add --protocol paper"),
    ("--lr 0", "--lr 0.0: give more than 0"),
    ("--lr nan", "--lr nan: give more than 0"),
    ("--protocol paper --l2 1", "--l2 does nothing with --protocol paper"),
    ("--protocol paper --epochs 0", "--epochs 0: give 1 or more"),
    ("--protocol paper", "a batch of 4,096, but 500 labelled images; give --batch-size 32 --lr 0.0125"),
    ("--protocol finetune --label-fraction 0.1", "but 50 labelled images; give --batch-size 4 --lr 0.000781"),
    ("--protocol paper --batch-size 1", "--batch-size 1: give 2 or more"),
    ("--protocol finetune --features z", "--protocol finetune trains h"),
    ("--l2 -1", "--l2 -1.0: give 0 or more"),
    ("--label-fraction 1.5", "--label-fraction 1.5: give more than 0, and at most 1"),
    ("--features pixels --untrained", "--untrained does nothing with --features pixels"),
    ("--seed 18446744073709551616", "give 0 or more, below 2^31"),
    ("--seed -1", "--seed -1: give 0 or more"),
    ("--workers -1", "--workers -1: give 0 or more"),
    ("--device nonsense", "--device nonsense: "),
    ("--labelfraction 0.1", "--labelfraction"),
    ("--save x.txt", "--save x.txt: give a name that ends in .pt"),
    ("--save /no/such/x.pt", "no folder /no/such"),
    ("--save x.pt", "--save: this resnet8's h is not a torchvision ResNet's"),
    ("--save x.pt --features z", "--save: torchvision cannot compute z"),
    ("--save x.pt --features pixels", "--save: torchvision cannot compute pixels"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, words, evaluate, capsys):
    with pytest.raises(SystemExit) as stop, common.exit_status():
        evaluate(*flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1, err
    assert not Path("x.pt").exists()


# --------------------------------------------------------------------------------------- the published protocols


def setting(config, *flags, n=10**6):
    return linear_eval.setting_of(linear_eval.parse(["run", *flags]), config, n)


def test_every_method_has_a_published_setting():
    lr = {name: how.lr for name, how in linear_eval.PUBLISHED.items()}
    assert lr == {"simclr": 1.6, "moco": 30, "byol": 0.8, "simsiam": 1.6, "swav": 0.3, "supcon": 5,
        "supcon, unit h": 1.2}  # fmt: skip
    size = {name: (how.batch_size, how.epochs) for name, how in linear_eval.PUBLISHED.items()}
    assert size == {"simclr": (4096, 90), "moco": (256, 100), "byol": (1024, 80), "simsiam": (4096, 90),
        "swav": (256, 100), "supcon": (512, 100), "supcon, unit h": (6144, 90)}  # fmt: skip
    for how in linear_eval.PUBLISHED.values():
        assert how.source and (how.factor > 0) == bool(how.steps)
        assert how.optimizer in ("sgd", "nesterov", "larc", "rmsprop")


def test_the_second_stage_of_supcon_is_that_of_the_repository_of_its_first():
    paper, cifar = (setting(supcon.Config.preset(p), "--protocol", "paper") for p in ("paper", "cifar"))
    assert (cifar.optimizer, cifar.batch_size, cifar.lr, cifar.smoothing) == ("sgd", 512, 5.0, 0.0)
    for given, features in (({"loss": "cross-entropy"}, "h"), ({}, "z")):  # which have any length
        config = supcon.Config.preset("paper", **given)
        assert setting(config, "--protocol", "paper", "--features", features) == cifar
    assert (paper.optimizer, paper.weight_decay, paper.smoothing, paper.crop) == ("rmsprop", 1e-6, 0.05, 0.08)
    # google's hparams_flags.py: 12 epochs of warm-up to 0.05 N / 256; then times 0.97 every half epoch, up to epoch 90
    at = {0.5: 1.2 / 24, 6: 0.6, 12.25: 1.2, 12.5: 1.2 * 0.97, 13: 1.2 * 0.97**2, 89.9: 1.2 * 0.97**155}
    for epoch, lr in at.items():
        assert linear_eval.rate_of(paper, round(epoch * 1000), 90_000) == pytest.approx(lr, rel=3e-3), epoch


def test_fine_tuning_is_published_for_few_and_for_many_labels():
    """SwAV's appendix A.4, eval_semisup.py; BYOL's schedules.py, which multiplies 0.05 by N / 256; SimCLR's B.5."""
    for module in (simclr, moco, byol, simsiam, supcon, swav):
        flags = [("--protocol", "finetune", "--label-fraction", fraction) for fraction in ("0.01", "0.1")]
        few, tenth = (setting(module.Config(), *f) for f in flags)
        if module is swav:
            assert [(h.lr, h.lr * h.head) for h in (few, tenth)] == [(0.02, 5.0), (0.01, 0.2)]
            rates = [linear_eval.rate_of(few, epoch * 50, 1000) for epoch in (0, 11, 12, 15, 16, 19)]
            assert rates == pytest.approx([0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])
            kinds = {(h.optimizer, h.batch_size, h.epochs, h.weight_decay) for h in (few, tenth)}
            assert kinds == {("sgd", 256, 20, 0)}
            continue
        own = module is byol
        assert (few.epochs, tenth.epochs) == ((50, 30) if own else (60, 30))
        assert few.batch_size == (1024 if own else 4096) and few.lr == tenth.lr == (0.2 if own else 0.8)
        assert few.optimizer == "nesterov" and few.weight_decay == 0 and not few.steps and few.crop == 0.08
        assert few.head == 1 and ("BYOL" if own else "B.5") in few.source


def test_larc_has_the_rate_outside_the_momentum():
    """apex's LARC, clip=False, around SGD: g' = 0.001 |w| / |g| g; v <- 0.9 v + g'; w <- w - lr v."""
    how = linear_eval.PUBLISHED["simsiam"]._replace(batch_size=60, epochs=3, lr=100.0)
    network, made = Recorder(), []
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 3)
    torch.nn.init.normal_(linear.weight, std=0.01)
    torch.nn.init.zeros_(linear.bias)
    made = fit(network, little_data(), how)
    velocity = [torch.zeros_like(p) for p in linear.parameters()]
    for step, x in enumerate(network.shown[1:]):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(images.seed_of(0, step)))
        loss = F.cross_entropy(linear(x.mean((2, 3))), little_data().labels[order])
        gradients = torch.autograd.grad(loss, [*linear.parameters()])
        for p, v, g in zip(linear.parameters(), velocity, gradients, strict=True):
            v.mul_(0.9).add_(g * (0.001 * p.norm() / g.norm() if p.norm() > 0 else 1))
            p.data -= 100 * 0.5 * (1 + math.cos(math.pi * step / 3)) * v
    for ours, theirs in zip(made.parameters(), linear.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.7, -1e-4, 1e6])
def test_a_feature_that_is_constant_in_training_and_moves_later_does_no_harm(constant):
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    x = torch.cat([F.one_hot(labels, 4) + 0.1 * torch.randn(400, 4), torch.full((400, 1), constant)], 1)
    x[0, 4] *= 1.001  # in all images but one
    classifier = linear_eval.fit_linear(x, labels, 4)
    x[:, 4] += 0.5 * torch.randn(400)
    assert (classifier(x).argmax(1) == labels).float().mean() > 0.98
    small = linear_eval.fit_linear(1e-9 * x, labels, 4)  # a small scale is no constant
    assert (small(1e-9 * x).argmax(1) == labels).float().mean() > 0.98


def test_flags_change_the_published_setting_and_nothing_else_does(capsys):
    paper = linear_eval.PUBLISHED["simclr"]

    def of(*flags):
        return setting(CONFIG, "--protocol", "paper", *flags, n=5000)

    assert of() == paper and "batch 4096, lr 1.6, 90 epochs (SimCLR appendix B.6" in capsys.readouterr().out
    assert of("--epochs", "1", "--lr", "0.5") == paper._replace(epochs=1, lr=0.5)
    assert "note: these are about 1 steps" in capsys.readouterr().out
    assert of("--batch-size", "512") == paper._replace(batch_size=512)
    assert "note: lr 1.6 is for a batch of 4,096; for 512 try --lr 0.2\n" in capsys.readouterr().out


class Recorder(torch.nn.Module):
    """The mean colour as features; keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, x):
        self.shown.append(x.clone())
        return x.mean((2, 3))


CONFIG = simclr.Config(data="shapes", image_size=16, workers=0)


def fit(network, data, how, **more):
    torch.manual_seed(0)
    return linear_eval.fit_as_published(network, data, 3, how, CONFIG, **more)


@pytest.mark.parametrize("method", sorted(linear_eval.PUBLISHED))
def test_the_published_protocol_learns_and_follows_its_schedule(method, monkeypatch):
    how = linear_eval.PUBLISHED[method]._replace(batch_size=30, epochs=20)  # two steps an epoch
    if method == "simsiam":
        how = how._replace(batch_size=60, lr=200.0)  # one step; the published 1.6 is for 28,000 steps, not 20
    how = how._replace(lr=0.01) if how.optimizer == "rmsprop" else how
    total, rates, made = 20 * 60 // how.batch_size, [], []
    for owner, name in ((torch.optim, "SGD"), (torch.optim, "RMSprop"), (common, "LARS")):

        class Watched(getattr(owner, name)):
            def __init__(self, params, **flags):
                super().__init__(params, **flags)
                made.append((type(self).__mro__[1].__name__, flags))

            def step(self):
                rates.append(self.param_groups[0]["lr"])
                super().step()

        monkeypatch.setattr(owner, name, Watched)
    data, scales = little_data(), set()
    views = data.views
    data.views = lambda *a: (scales.update(scale for _, scale in a[1]), views(*a))[1]
    classifier = fit(Recorder(), data, how)
    assert scales == {(how.crop, 1.0)}
    h = common.embed(Recorder(), little_data(), CONFIG)
    assert (classifier(h).argmax(1) == data.labels).float().mean() > 0.95
    name, flags = made[0]
    kinds = {"sgd": "SGD", "nesterov": "SGD", "larc": "LARS", "rmsprop": "RMSprop"}
    assert name == kinds[how.optimizer] and flags["weight_decay"] == how.weight_decay and flags["momentum"] == 0.9
    assert flags.get("nesterov", False) == (method in ("simclr", "byol"))
    if method in ("moco", "supcon"):
        drops, factor = ([0.6, 0.8], 0.1) if method == "moco" else ([0.6, 0.75, 0.9], 0.2)
        expected = [how.lr * factor ** sum(step // 2 >= 20 * at for at in drops) for step in range(total)]
    elif method == "supcon, unit h":  # 40 steps stand for 90 epochs
        at = [90 * step / total for step in range(total)]
        expected = [how.lr * min(1, (e + 90 / total) / 12) * 0.97 ** max(0, int(2 * e - 24)) for e in at]
    else:
        expected = [how.lr * 0.5 * (1 + math.cos(math.pi * step / total)) for step in range(total)]
    assert all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(rates, expected, strict=True))


def test_a_classifier_that_blows_up_is_no_result(evaluate, capsys):
    how = linear_eval.PUBLISHED["moco"]._replace(batch_size=30, epochs=20, lr=3e38)
    with pytest.raises(common.RunFailure, match="give a lower --lr than 3e"):
        fit(Recorder(), little_data(), how)
    evaluate("--protocol", "paper", "--epochs", 1, "--batch-size", 500, "--lr", 1e5)
    assert "warning: the classifier's loss" in (out := capsys.readouterr().out) and "worse than a guess's 2.30" in out


def test_the_published_protocol_shows_crops_and_flips():
    how = linear_eval.PUBLISHED["moco"]._replace(batch_size=25, epochs=4, lr=0.1)
    network = Recorder()
    fit(network, little_data().at(torch.arange(0, 60, 2)), how)
    assert [len(x) for x in network.shown] == [2, *[25, 5] * 4]  # all images every epoch, the short batch too
    x = torch.cat(network.shown[1:])
    assert torch.allclose(x.amin((0, 2, 3)), (-images.MEAN / images.STD).flatten(), atol=1e-5)  # not [0, 1]
    left, right = ((x * images.STD + images.MEAN)[..., i].amax((1, 2)) for i in (0, -1))
    assert 20 < (left > right + 0.2).sum() < 100 and 20 < (right > left + 0.2).sum() < 100  # the bright half
    assert len(x.flatten(1).unique(dim=0)) > 60  # and a crop of its own for each


def test_fine_tuning_is_sgd_on_every_weight():
    """One step on all images moves a weight by lr (1 + 0.9) times its gradient; the classifier has 3 times the lr."""
    record = Recorder()
    record.forward = lambda x: record.shown.append(x.clone()) or x
    conv = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network, start = torch.nn.Sequential(record, conv), copy.deepcopy(conv)
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 3)  # as the fit draws its own
    torch.nn.init.normal_(linear.weight, std=0.01)
    torch.nn.init.zeros_(linear.bias)
    how = linear_eval.FINETUNING["simclr 10%"]._replace(epochs=1, lr=0.5, batch_size=60, head=3.0, smoothing=0.2)
    tuned = fit(network, little_data(), how, tune=True)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(images.seed_of(0, 0)))
    F.cross_entropy(linear(start(record.shown[-1])), little_data().labels[order], label_smoothing=0.2).backward()
    before, after = [*start.parameters(), *linear.parameters()], [*conv.parameters(), *tuned.parameters()]
    for a, p, lr in zip(after, before, (0.5, 0.5, 1.5, 1.5), strict=True):
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(a.detach(), (p - lr * 1.9 * p.grad).detach(), atol=1e-6, rtol=1e-4)
    record.shown.clear()
    fit(network, little_data(), how._replace(batch_size=25), tune=True)
    assert [len(x) for x in record.shown] == [2, 25, 25]  # BN wants no batch of 10


def test_fine_tuning_starts_from_the_trained_weights_or_from_random_ones(evaluate, capsys):
    flags = ["--protocol", "finetune", "--label-fraction", 0.1, "--epochs", 2, "--batch-size", 16, "--lr", 0.1]
    tuned, control = evaluate(*flags), evaluate(*flags, "--untrained")
    out = capsys.readouterr().out
    assert not torch.allclose(control["logits"], tuned["logits"], atol=0.1) and 0 < control["linear_top1"] < 1
    assert "nesterov, batch 16, lr 0.1, 2 epochs (SimCLR appendix B.5" in out and "frozen" not in out
    assert out.count("before training (random weights)") == 1 and out.count("note: these are about 6 steps") == 2


def test_fine_tuning_gives_mocos_batch_norms_their_usual_momentum(tmp_path, monkeypatch, album):
    train(moco, tmp_path / "moco", epochs=0)
    seen, untrained = [], torch.nn.Linear(128, 10).requires_grad_(False)
    monkeypatch.setattr(linear_eval, "fit_as_published", lambda network, *_, **__: seen.append(network) or untrained)
    linear_eval.main([str(tmp_path / "moco"), "--data", str(album), *TUNED.split()])
    assert {m.momentum for m in seen[0].modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize(
    "flags", ["", "--protocol paper --epochs 1 --batch-size 10 --lr 0.1", pytest.param(TUNED, marks=pytest.mark.slow)]
)
def test_torchvision_computes_the_printed_accuracy(flags, resnet18, tmp_path, monkeypatch, capsys):
    """By the lines of the README, with the names and the view that classifier.txt gives."""
    monkeypatch.chdir(tmp_path)
    result = linear_eval.main([str(resnet18 / "run"), *flags.split(), "--save", "classifier.pt"])
    printed = float(re.search(r"linear top-1\s+(\S+)", capsys.readouterr().out)[1])
    head, code = Path("classifier.txt").read_text().split("\n\n")
    names, by_the_file = head.split("\n"), {}
    exec(code, by_the_file)
    assert names == sorted(list(images.SHAPES)[:4])
    paths = sorted((resnet18 / "data/test").glob("*/*.png"))
    pictures = torch.stack([by_the_file["view"](Image.open(path)) for path in paths])
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    (lines,) = re.findall(r"```python\n([^`]*classifier\.pt[^`]*)```", (ROOT / "README.md").read_text())
    by_readme = {"torch": torch, "torchvision": torchvision, "names": names, "pictures": pictures}
    with torch.no_grad():
        exec(lines, by_readme)
        probabilities, same = by_readme["probabilities"], by_the_file["model"](pictures).softmax(1)
    assert torch.equal(probabilities, same) and len(paths) == 40
    away = (probabilities - result["logits"].softmax(1)).abs()  # Pillow and torchvision resize a little differently
    assert away.mean() < 0.03 and away.max() < 0.2
    assert abs((probabilities.argmax(1) == labels).float().mean() - printed) < 1.01 / 40
    before, after = saved(resnet18 / "run"), torch.load("classifier.pt", weights_only=True)
    kept = [torch.equal(before[f"backbone.{name}"], v) for name, v in after.items() if not name.startswith("fc.")]
    assert not any(kept) if flags == TUNED else all(kept)  # BN's statistics, too
    steps = after["bn1.num_batches_tracked"] - before["backbone.bn1.num_batches_tracked"]
    assert steps == (3 * (40 // 10) if flags == TUNED else 0)


def test_the_small_stem_and_odd_class_names_are_in_classifier_txt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = simclr.Config(backbone="resnet18", stem="cifar", image_size=96)
    backbone, fc = common.build_backbone(config).eval(), torch.nn.Linear(512, 2)
    linear_eval.save_for_torchvision(fc, backbone, ["a cat", "é\nb"], config, Path("my.pth"))
    assert Path("my.txt").read_text().startswith("a cat\né b\n\n")
    exec(Path("my.txt").read_text().split("\n\n")[1], found := {})
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(found["model"](x), fc(backbone(x)))
    small = found["view"](Image.linear_gradient("L").resize((40, 40)).convert("RGB"))
    assert small.shape == (3, 96, 96) and small[0, 0, 0] < -2  # a small picture is seen whole: its top row is black
