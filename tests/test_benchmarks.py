"""The experiments of benchmarks/: their formulas, and each on a few images."""

import functools
import inspect
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
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
    gpu,
    neural,
    probes,
    simsiam_section5,
    small_sets,
    supervised,
    table,
    theory,
)
from recordings import make_track
from tests.helpers import equal

SMALL = ["--preset", "demo", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "40", "--knn-every", "0"]
SMALL += ["--image-size", "16", "--workers", "0"]


@pytest.fixture(scope="module")
def few(photos):
    """Flags of a run of five steps."""
    return ["--data", str(photos), *SMALL]


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch, request):
    """Drawing a picture takes longer than the run that it shows."""
    if "slow" not in request.keywords:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


class FakeRun:
    """Counts 12 steps, 6 an epoch, of 8 images each."""

    def __init__(self):
        pixels, labels = images.make_shapes(50, 0, 32)
        self.data = SimpleNamespace(train=images.Images(labels, torch.device("cpu"), pixels))
        self.config = simsiam.Config.preset("demo", batch_size=8)
        self.steps = 6

    def batches(self):
        for self.step in range(12):
            yield None


@pytest.mark.parametrize("k, starts", [(4, [0, 4, 6, 10]), (0, [0, 6])])
def test_targets_are_of_the_network_before_k_steps_and_leave_its_statistics(k, starts, monkeypatch):
    run, filled, seen = FakeRun(), [], []
    model, eta_of = simsiam.SimSiam(run.config), simsiam_section5.eta_of
    monkeypatch.setattr(simsiam_section5, "augment", lambda x, config: seen.append(x) or x)

    def spy(network, config, views):
        filled.append((run.step, network.backbone.conv1.weight.clone(), eta_of(network, config, views)))
        return filled[-1][-1]

    monkeypatch.setattr(simsiam_section5, "eta_of", spy)
    before, moved = {}, 0
    for step, (loss, z1, x1, x2) in enumerate(simsiam_section5.ahead(run, model, k)):
        before[step], moved = model.backbone.conv1.weight.clone(), step + 1
        p1, p2, _, _ = model(x1, x2)
        _, weight, (eta1, eta2) = filled[step]
        expected = simsiam.negative_cosine(p1, eta2) / 2 + simsiam.negative_cosine(p2, eta1) / 2  # the other view's
        assert torch.allclose(loss, expected, atol=1e-6) and z1.shape == eta1.shape and not eta1.requires_grad
        assert torch.equal(weight, before[max(s for s in starts if s <= step)])
        model.backbone.conv1.weight.data.add_(0.1)
    assert moved == 12 and sorted({start for start, *_ in filled}) == starts and len(filled) == 12
    assert model.backbone.bn1.num_batches_tracked == 4 * 12  # two views in the loop, and two of this test
    assert len(seen) == 48 and not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("row", ["average", pytest.param("twice the pairs", marks=pytest.mark.slow)])
def test_rows_of_simsiam_section5_over_two_seeds(row, few, tmp_path):
    argv = ["--rows", row, "--seeds", "0", "1", "--out", str(tmp_path), *few]
    module = simsiam_section5
    result = table.compare(table.parser("", "x"), module.Config, module.ROWS, module.COLUMNS, module.UNUSED, argv)
    head, _, line = result.split("\n")
    assert head == "|  | kNN of h | loss | std | rank | s | the paper |"
    assert line.startswith(f"| {row} |  | ") and line.count(" to ") == 4
    folders = {path.parent.name for path in tmp_path.glob("*/checkpoint.pt")}
    assert folders == {f"{row.replace(' ', '-')}-seed-{seed}" for seed in (0, 1)}


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


def test_the_loss_without_length_is_equation_2():
    torch.manual_seed(0)
    z, y, total = 2 * torch.randn(12, 5), torch.randint(3, (6,)).repeat(2), 0
    for i in range(12):
        s = z @ z[i] / 3
        below = torch.exp(torch.cat([s[:i], s[i + 1 :]])).sum()
        positives = [p for p in range(12) if p != i and y[p] == y[i]]
        total -= sum(s[p] - torch.log(below) for p in positives) / len(positives)
    assert torch.allclose(supervised.of_any_length(z, y, 3.0), total / 12, rtol=1e-5)
    unit = F.normalize(z, dim=1)
    torch.testing.assert_close(supervised.of_any_length(unit, y, 0.5), supcon.sup_con(z, y, 0.5))


@pytest.mark.parametrize("row", ["max-margin, m = 4", "not normalised, tau = 1"])
def test_supervised_trains_and_is_judged(row, few, tmp_path, monkeypatch):
    monkeypatch.setattr(table.linear_eval, "main", lambda argv: {"linear_top1": argv})
    config = table.base_config(supcon.Config, [*few, "--optimizer", "sgd", "--lr", "0.05", "--out", str(tmp_path)])
    figures = supervised.ROWS[row][0](config)
    assert figures["linear_top1"] == [str(tmp_path)] and math.isfinite(figures["loss"])
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    margin = row.startswith("max")
    assert state["config"]["loss"] == ("cross-entropy" if margin else "out")
    assert set(state["parts"]) == {"model", "classifier", "optimizer"}


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


@pytest.mark.slowest
def test_theory_prints_its_tables_and_pictures(few, tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "HELD_OUT", 2048)
    flags = ["--steps", "40", "--out", str(tmp_path)]
    ratio = theory.main(["density-ratio", *flags, "--seeds", "0", "1"]).split("\n")[2:]
    assert [line.split(" | ")[0] for line in ratio] == ["| 0", "| 30", "| 40"]
    for column in (1, 2):
        first, last = (float(ratio[i].split(" | ")[column].split()[0]) for i in (0, -1))
        assert last < first / 2 and ratio[-1].count(" to ") == 2
    lines = theory.main(["mutual-information", *flags, "--steps", "4"]).split("\n")[2:]
    assert len(lines) == 18 and all(float(line.split(" | ")[3]) < float(line.split(" | ")[2]) + 0.01 for line in lines)
    figures = pairwise.train(common.parse_args(pairwise.Config, [*few, "--out", str(tmp_path / "run")]))
    found = theory.main(["weights", figures["out"], *flags])
    assert all(f"| {name} |" in found for name in pairwise.LOSSES)
    assert {"density_ratio.png", "mutual_information.png", "weights.png"} <= {p.name for p in tmp_path.iterdir()}


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


def test_augmentations_prints_the_matrix(few, tmp_path, monkeypatch):
    trained = []
    linear = lambda out: trained.append(out.split("/")[-1]) or {"linear_top1": len(trained) / 10}  # noqa: E731
    monkeypatch.setattr(table, "linear", linear)
    matrix = augmentations.main(["--ops", "cutout", "color", "--out", str(tmp_path), *few]).split("\n")
    assert matrix[0] == "| first, then | cutout | color |"
    assert trained == [f"{ops}-seed-0" for ops in ("cutout", "cutout-color", "color-cutout", "color")]
    assert matrix[2:] == ["| cutout | 0.100 | 0.200 |", "| color | 0.300 | 0.400 |"]


def test_probes_alter_the_pictures_of_their_kind_alone():
    x, kind = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    turned = probes.alter(x.clone(), "rotation", kind)
    assert torch.equal(turned, torch.stack([a.rot90(int(k), (1, 2)) for a, k in zip(x, kind, strict=True)]))
    for probe in ("grayscale", "corrupted", "sobel"):
        same = (probes.alter(x.clone(), probe, kind % 2) == x).flatten(1).all(1)
        assert torch.equal(same, kind % 2 == 0)
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 0.1  # a step of 0.1 has a gradient of 4 times that
    assert probes.sobel(edge)[0, 0, 4].tolist() == pytest.approx([0, 0, 0, 0.4, 0.4, 0, 0, 0], abs=1e-3)


def test_probes_tell_a_turn_from_pixels_and_print_the_table(few, photos, tmp_path):
    rows = torch.zeros(200, 3, 16, 16, dtype=torch.uint8)
    rows[:, :, :8] = 255  # a bright half: its place tells the turn
    split = images.Images(torch.zeros(200).long(), torch.device("cpu"), rows)
    config, data = simclr.Config.preset("demo", image_size=16), images.Data("halves", split, split)
    assert probes.accuracy(common.pixels, data, config, "rotation", 32, 0) == 1
    assert probes.accuracy(lambda x: x.mean((2, 3)), data, config, "rotation", 32, 0) < 0.4
    figures = simclr.train(common.parse_args(simclr.Config, [*few, "--out", str(tmp_path)]))
    lines = probes.main([figures["out"], "--data", str(photos), "--device", "cpu", "--seed", "1"]).split("\n")
    assert lines[0] == "|  | told apart | chance | h | g(h) | the paper's |" and len(lines) == 6
    assert re.fullmatch(r"\| rotation \| .* \| 25.0 \| [\d.]+ \| [\d.]+ \| 25 / 67.6 / 25.6 \|", lines[3])


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
        ([[(*A, 1, 0.9), (*A, 1, 0.8)]], [[(*A, 1), (*NEAR_A, 1)]], 1.0),  # the second takes the one that is free
        ([[(*A, 1, 0.9)]], [[(*NEAR_A, 1), (*A, 1), (*B, 1), (*B, 1)]], 26 / 101),  # one of four
        ([[(*NEAR_A, 1, 0.9), (*A, 1, 0.8)]], [[(*A, 1), (-1, 3, 10, 13, 1)]], 1.0),  # each the one it overlaps most
        ([[(*A, 2, 0.9)]], [[(*A, 1)]], 0.0),  # another class; the 2 has no true box and is left out
        ([[(*A, 1, 0.9)], [(*A, 1, 0.8)]], [[], [(*A, 1)]], 0.5),  # on another picture; and it comes first
        ([[(0, 0, 10, 5, 1, 0.9)]], [[(*A, 1)]], 1.0),  # IoU 0.5
        ([[(0, 0, 10, 4.99, 1, 0.9)]], [[(*A, 1)]], 0.0),  # 0.499
        ([[]], [[]], math.nan),
    ],
)
def test_average_precision_in_closed_form(detections, truths, expected):
    found, true = [on_picture(*rows) for rows in detections], [on_picture(*rows) for rows in truths]
    assert detection.average_precision(found, true, range(1, 4)) == pytest.approx(expected, nan_ok=True)


def test_boxes_are_tight_around_the_shapes_and_apart():
    pixels, truths = detection.draw_canvases(20, 3)
    again, other = detection.draw_canvases(20, 3), detection.draw_canvases(2, 4)[0]
    assert torch.equal(pixels, again[0]) and equal(truths, again[1]) and not torch.equal(pixels[:2], other)
    labels = torch.cat([truth["labels"] for truth in truths])
    assert pixels.dtype == torch.uint8 and pixels.shape == (20, 3, 96, 96) and set(labels.tolist()) == set(range(1, 11))
    inside = TF.gaussian_blur(pixels[:, :1].float(), 3)[:, 0] > 135  # red is 51 on the ground and 217 in a shape
    for seen, truth in zip(inside, truths, strict=True):
        apart = box_iou(truth["boxes"], truth["boxes"])
        assert apart.sum() == pytest.approx(len(truth["labels"])) and 0 <= truth["boxes"].min() <= 96
        for box in truth["boxes"]:
            left, top, right, bottom = (int(v) for v in (*(box[:2].floor() - 1).clamp(min=0), *(box[2:].ceil() + 1)))
            rows, columns = seen[top:bottom, left:right].nonzero().T
            reach = [left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1]
            assert (torch.stack(reach) - box).abs().max() <= 3.5  # thin corners blur away
            seen[top:bottom, left:right] = False
        assert seen.sum() <= 2


def test_an_experiment_refuses_flags_it_would_not_follow():
    for flag in (["--amp", "bf16"], ["--seed", "3"], ["--no-symmetric"], ["--bogus", "1"]):
        with pytest.raises(common.InputError, match=flag[0].replace("no-", "")):
            table.base_config(simsiam.Config, flag, simsiam_section5.UNUSED)
    base = table.base_config(simsiam.Config, ["--epochs", "3"])
    assert base == simsiam.Config.preset("demo", epochs=3)


def test_every_row_of_the_ablations_is_a_command_that_its_script_takes(monkeypatch):
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))  # parses a file each time
    assert list(ablations.LOSSES) == list(pairwise.LOSSES)
    for name, (_, _, rows) in ablations.TABLES.items():
        for row in rows:
            script, *flags = ablations.command(name, row, "--knn-every 1").split()
            method = __import__(script.removesuffix(".py"))
            config = common.parse_args(method.Config, flags)
            assert name != "demos" or config == method.Config.preset("demo")


def test_a_row_of_the_ablations_is_measured(few, tmp_path):
    found = ablations.measure(["simclr.py", *few, "--projection-head", "none"], str(tmp_path / "run"))
    assert found["out"] == str(tmp_path / "run") and "data: " in (tmp_path / "run.txt").read_text()
    assert 0 < found["std"] <= 1.01 and 0 < found["cos2"] <= 1 and found["rank"] > 1
    line = ablations.cells([found | {"kNN": 0.5, "seconds": 2.0}, found | {"kNN": 0.7, "seconds": 4.0}])
    assert line[0] == "0.600 (0.500 to 0.700)" and line[-1] == "3 (2 to 4)" and " " not in "".join(line[1:-1])


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


@pytest.mark.slow
def test_small_sets(tmp_path):
    """The third run is the first one's backbone as it is."""
    flags = ["--data", "shapes", "--sizes", "130", "--steps", "1", "--image-size", "16"]
    lines = small_sets.main([*flags, "--out", str(tmp_path / "small")]).splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    whats = ["from scratch", "the rest's backbone as it is", "from the rest's backbone", "raw pixels"]
    rows, expected = [row[:2] for row in rows], [["5,000", whats[0]], ["5,000", whats[3]]]
    assert rows == expected + [["130", what] for what in whats]
    assert equal(*(torch.load(tmp_path / name / "backbone.pt") for name in ("small", "small-3")))


# --------------------------------------------------------------------------------------------------------------- gpu


@pytest.mark.slowest
def test_a_row_that_fails_hangs_or_ends_its_process_costs_that_row_alone(tmp_path):
    split, out = functools.partial(str.split, "one two"), tmp_path / "gpu.md"
    rows = [split, functools.partial(int, "x"), split, functools.partial(time.sleep, 60), split]
    rows += [functools.partial(os._exit, 3), split]
    gpu.fill([gpu.Table("Rows", ["a", "b"], 2, rows)], out, 300)
    lines = [line for line in out.read_text().splitlines() if line.startswith("|")][2:]
    assert [line == "| one | two |" for line in lines[:7]] == [True, False] * 3 + [True]
    assert "ValueError: invalid literal" in lines[1] and "no result within 2 s" in lines[3] and "died" in lines[5]
    assert lines[9].startswith("| Rows | 7 | 3 |")


@pytest.mark.slowest
def test_gpu_quick_on_a_cpu_fills_every_row(tmp_path):
    """Also with pictures that --pack made of JPEG files."""
    for split, count in (("train", 160), ("test", 10)):
        for label in range(2):
            (tmp_path / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
                torchvision.io.write_jpeg(picture, str(tmp_path / split / f"class{label}" / f"{i}.jpg"))
    script = [sys.executable, gpu.__file__]
    subprocess.run([*script, "--pack", tmp_path], cwd=tmp_path, check=True)
    flags = ["--device", "cpu", "--quick", "--minutes", "5", "--pictures", "pictures.pt"]
    subprocess.run([*script, *flags], cwd=tmp_path, check=True)
    text = (tmp_path / "gpu.md").read_text()
    summary = text[text.index("## Summary") :].splitlines()[4:]
    assert len(summary) == 7 and all(line.split(" | ")[2] == "0" for line in summary), text
    assert "| 1 epochs |" in text
