"""What the tests share: small sets, small runs, and checks that every method's file passes."""

import copy
import dataclasses
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import images

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["simclr", "moco", "byol", "simsiam", "supcon", "swav", "pairwise"]
FEW = {"moco": {"queue_size": 128}, "swav": {"image_size": 32}}  # flags a method needs beside `few_shapes`
WARM_UP_AND_COSINE = [1 / 3, 2 / 3, 1, 1, 0.75, 0.25]  # of the peak, in the six steps of `follows_the_schedule`


def python(*arguments, folder=ROOT, **options):
    """Run Python in `folder` as from a shell there, on one thread, without what this process can import."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, **options)


@functools.cache
def few_shapes(n=200, size=32):
    """The set `shapes` with n training and 40 held-out images: an epoch of it takes about a second."""
    parts = [images.make_shapes(count, seed, size) for seed, count in enumerate((n, 40))]
    train, test = (images.Images(labels, torch.device("cpu"), pixels) for pixels, labels in parts)
    return images.Data("shapes", train, test, list(images.SHAPES))


def train(method, out, data=None, **given):
    """Train the demo for an epoch of three steps on few shapes, or as given, without curves.png, whose drawing takes
    longer than that. Returns the figures."""
    small = {"epochs": 1, "batch_size": 64, "image_size": 16, "warmup_epochs": 0.0, "knn_every": 0, "workers": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        config = method.Config.preset("demo", **small | FEW.get(method.__name__, {}) | {"out": str(out)} | given)
        return method.train(config, few_shapes() if data is None else data)


def flags(config):
    """The name and the type of each flag."""
    return {field.name: field.type for field in dataclasses.fields(config)}


def saved(folder, part="model"):
    """A part's state, or another entry, of the checkpoint in `folder`."""
    state = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return state["parts"][part][1] if part in state["parts"] else state[part]


def equal(a, b):
    """Equal to the bit: tensors, and dictionaries and lists of them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_run(a, b):
    """The checkpoints of two folders are equal to the bit, except for the speeds in the log."""
    a, b = (torch.load(Path(folder) / "checkpoint.pt", weights_only=True) for folder in (a, b))
    rows = [[{**row, "images_per_second": 0} for row in state["rows"]] for state in (a, b)]
    return equal(*rows) and all(equal(a[name], b[name]) for name in ("parts", "step", "loss_sum", "data"))


def at_each_step(monkeypatch, act):
    """Call `act(run, z, *views)` when a run logs a step; `run.step` counts the steps before it."""
    log = common.Run.log
    monkeypatch.setattr(common.Run, "log", lambda run, loss, *rest: (act(run, *rest), log(run, loss, *rest)))


def resumes_bit_for_bit(method, given, tmp_path, monkeypatch, data=None):
    """Stop a run of 3 epochs of 6 steps by SIGTERM after step 9, and resume it: its checkpoint must equal that of a
    whole run. Returns the figures of both."""
    given = {"epochs": 3, "batch_size": 32} | given
    whole = train(method, tmp_path / "whole", data, **given)
    with monkeypatch.context() as patch:
        at_each_step(patch, lambda run, *_: run.step == 8 and os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt, match="stopped after step 9;"):
            train(method, tmp_path / "cut", data, **given)
    assert saved(tmp_path / "cut", "step") == 9
    torch.manual_seed(99)
    resumed = train(method, tmp_path / "cut", data, **given, resume=str(tmp_path / "cut"))
    assert same_run(tmp_path / "whole", tmp_path / "cut")
    return whole, resumed


def follows_the_schedule(method, given, tmp_path, monkeypatch):
    """Train 6 steps, 3 of them warm-up, without augmentation. Returns the learning rates of each, (6, groups), and what
    each logged, (z, *views). The crops must be of the areas asked for, and the two views of an image differ."""
    rates, scales, logged, batches = [], [], [], common.Run.batches

    def look(run, z, *views):
        logged.append((z.detach(), *views))
        rates.append([group["lr"] for group in run.parts["optimizer"].param_groups])

    with monkeypatch.context() as patch:
        at_each_step(patch, look)
        patch.setattr(
            common.Run, "batches", lambda run, **asked: scales.append(asked["scale"]) or batches(run, **asked)
        )
        patch.setattr(method, "augment", lambda x, *rest: x)
        train(method, tmp_path, **{"epochs": 2, "warmup_epochs": 1.0, "crop_min_scale": 0.3} | given)
    assert len(rates) == 6 and scales == [(0.3, 1.0)]
    assert all(not torch.equal(v1, v2) for _, v1, v2 in logged)
    return rates, logged


def trains_in_pieces(method, given, tmp_path):
    """--micro-batch-size: one piece of N images changes nothing, to the bit; of four pieces, each network's BN sees
    more batches."""
    for micro in (0, 32, 8):
        train(method, tmp_path / str(micro), **{"batch_size": 32, "micro_batch_size": micro} | given)
    whole, one, four = (saved(tmp_path / str(micro)) for micro in (0, 32, 8))
    assert equal(whole, one) and not equal(whole, four)
    seen = [name for name in whole if name.endswith("num_batches_tracked") and not name.startswith("predictor.")]
    assert seen and all(four[name] > whole[name] > 0 for name in seen)


def refusal(method, flags, tmp_path, capsys, data=None):
    """The one line that answers flags which the method cannot run, on few shapes or on `data`."""
    few = [word for name, value in FEW.get(method.__name__, {}).items() for word in (common.dashed(name), value)]
    argv = ["--preset", "demo", "--epochs", 1, "--warmup-epochs", 0, *few, "--out", tmp_path, *flags]
    with pytest.raises(SystemExit) as stop, common.exit_status():
        method.train(common.parse_args(method.Config, [str(word) for word in argv]), data or few_shapes())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    return err


def one_step(method, given, tmp_path, monkeypatch, data=None):
    """Train one step of SGD on all 200 images, with a weight decay. Returns the figures, a dictionary of the modules
    that it started from (model, ...), the images' `index` and their `labels`, and a list of the views it was fed."""
    start, seen = {}, []
    augment, begin, batches = method.augment, common.Run.begin, common.Run.batches

    def spy_begin(run, model, *rest, **named):
        modules = {"model": model} | named
        start.update({name: copy.deepcopy(m) for name, m in modules.items() if isinstance(m, torch.nn.Module)})
        return begin(run, model, *rest, **named)

    def spy_batches(run, **asked):
        for index, views in batches(run, **asked):
            start["index"], start["labels"] = index, run.data.train.labels[index]
            yield index, views

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "begin", spy_begin)
        patch.setattr(common.Run, "batches", spy_batches)
        patch.setattr(method, "augment", lambda *given: seen.append(augment(*given)) or seen[-1])
        figures = train(method, tmp_path, data, **{"batch_size": 200, "weight_decay": 0.1} | given)
    assert len(seen) == 1 or not torch.equal(*seen[:2])
    return figures, start, seen


def moved_by(loss, part, after, lr, decay):
    """Every parameter of `part` went once down the gradient of `loss`, plus its weight decay `decay(p)`, to `after`."""
    loss.backward()
    moved = 0
    for name, p in part.named_parameters():
        expected = p.detach() - (lr * (p.grad + decay(p) * p.detach()) if p.requires_grad else 0)
        assert torch.allclose(after[name], expected, rtol=1e-4, atol=2e-6), name
        moved += not torch.equal(after[name], p.detach())
    assert moved == sum(p.requires_grad for p in part.parameters())


def recipe(method, monkeypatch, *given):
    """The operations that `augment(x, *given)` asks for, each as (its name, its probability, *its settings)."""
    asked, sometimes = [], method.sometimes

    def spy(x, p, op, *settings):
        asked.append((op.__name__, p, *(round(s, 9) for s in settings)))
        return sometimes(x, p, op, *settings)

    x = torch.rand(32, 3, 32, 32)
    with monkeypatch.context() as patch:
        patch.setattr(method, "sometimes", spy)
        out = method.augment(x.clone(), *given)
    assert out.shape == x.shape and torch.isfinite(out).all() and out.min() < -1  # as torchvision's weights are fed
    return asked


def largest_difference(ours, theirs):
    theirs = theirs if isinstance(theirs, torch.Tensor) else torch.stack(theirs)
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def kolmogorov_smirnov(a, b):
    """Largest distance of two empirical distribution functions, over its 0.1% critical value."""
    a, b = (torch.as_tensor(v).float().flatten() for v in (a, b))
    both = torch.cat([a, b]).sort().values
    cdf = [torch.searchsorted(v.sort().values, both, right=True) / len(v) for v in (a, b)]
    return ((cdf[0] - cdf[1]).abs().max() / (1.95 * (1 / len(a) + 1 / len(b)) ** 0.5)).item()
