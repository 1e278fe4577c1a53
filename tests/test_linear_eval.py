"""The evaluation, and its controls: shuffled labels, an untrained backbone, few labels."""

import math

import pytest
import torch
import torch.nn.functional as F

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


@pytest.mark.parametrize("flags", [[], ["--features", "z"], ["--label-fraction", "0.1"], ["--untrained"]])
def test_a_run_is_evaluated(run_folder, flags, capsys):
    result = linear_eval.main([str(run_folder), *flags])
    assert 0.1 <= result["linear_top1"] <= result["linear_top5"] <= 1 and math.isfinite(result["knn_top1"])
    assert f"linear top-1  {result['linear_top1']:.4f}" in capsys.readouterr().out


def test_z_and_h_are_what_they_say(run_folder):
    config, model = linear_eval.load_run(str(run_folder))
    x = torch.rand(3, 3, 32, 32)
    model.eval()
    assert model.backbone(x).shape == (3, 128) and model(x).shape == (3, config.projection_dim)


def test_evaluation_changes_nothing_in_the_run(run_folder):
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    linear_eval.main([str(run_folder)])
    assert before == {p.name: p.read_bytes() for p in run_folder.iterdir()}
