"""What the tests of the method files share."""

import copy
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


def python(*arguments, folder=ROOT, **options):
    """Run Python in `folder` as from a shell there, on one thread, without what this process can import."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, **options)


def saved(folder, part="model"):
    """A part's state, or another entry, of the checkpoint in `folder`."""
    state = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return state["parts"][part][1] if part in state["parts"] else state.get(part)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_run(a, b):
    """The checkpoints of two folders are equal to the bit, but for the speeds in the log."""
    a, b = (torch.load(Path(folder) / "checkpoint.pt", weights_only=True) for folder in (a, b))
    rows = [[row[:-1] for row in state["progress"]["rows"]] for state in (a, b)]
    return equal(a["parts"], b["parts"]) and equal(a["rng"], b["rng"]) and equal(*rows)


def resumes_bit_for_bit(method, given, tmp_path, monkeypatch):
    """Stop a run by SIGTERM in the middle of an epoch of 6 steps and resume it: its checkpoint must equal that of a
    whole run. Returns the metrics of both."""
    whole = method.train(method.Config.preset("demo", **given, out=str(tmp_path / "whole")))
    log = common.Run.log

    def stop_at_step_9(run, *rest):
        if run.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        log(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", stop_at_step_9)
        with pytest.raises(common.Stopped, match="stopped after step 9 of .* is saved"):
            method.train(method.Config.preset("demo", **given, out=str(tmp_path / "cut")))
    assert saved(tmp_path / "cut", "progress")["step"] == 9
    torch.manual_seed(99)
    resumed = method.train(method.Config.preset("demo", **given, resume=True, out=str(tmp_path / "cut")))
    assert same_run(tmp_path / "whole", tmp_path / "cut")
    return whole, resumed


def follows_the_schedule(method, given, tmp_path, monkeypatch):
    """Train 6 steps, 3 of them warm-up. Returns the learning rates of each, (6, groups), and what each logged, with the
    scales of the crops asked for."""
    rates, scales, logged = [], [], []
    views, log = images.Images.views, common.Run.log

    def spy_views(split, batches, crops, *rest, **named):
        scales.extend(scale for _, scale in crops if scale)
        return views(split, batches, crops, *rest, **named)

    def spy_log(run, loss, z, *seen):
        logged.append((z.detach(), *seen))
        rates.append([group["lr"] for group in run.parts["optimizer"].param_groups])
        log(run, loss, z, *seen)

    monkeypatch.setattr(images.Images, "views", spy_views)
    monkeypatch.setattr(common.Run, "log", spy_log)
    monkeypatch.setattr(method, "augment", lambda x, *rest: x)
    given = {"epochs": 2, "warmup_epochs": 1.0, "batch_size": 64, "crop_min_scale": 0.3, "knn_every": 0} | given
    method.train(method.Config.preset("demo", **given, out=str(tmp_path)))
    assert len(rates) == 6 and set(scales) == {(0.3, 1.0)}
    assert all(not torch.equal(v1, v2) for _, v1, v2 in logged)
    return rates, logged


def trains_in_pieces(method, given, tmp_path):
    """One piece of N images changes nothing, to the bit; of pieces of N / 4, each network's BN sees more."""
    given = {"epochs": 1, "batch_size": 32, "knn_every": 0} | given
    for micro in (0, 32, 8):
        method.train(method.Config.preset("demo", **given, micro_batch_size=micro, out=str(tmp_path / str(micro))))
    whole, one, four = (saved(tmp_path / str(micro)) for micro in (0, 32, 8))
    assert equal(whole, one) and not equal(whole, four)
    seen = [name for name in whole if name.endswith("num_batches_tracked") and not name.startswith("predictor.")]
    assert seen and all(four[name] > whole[name] > 0 for name in seen)


def refusal(method, flags, tmp_path, capsys):
    """The one line that flags which cannot be run are answered with."""
    with pytest.raises(SystemExit) as stop, common.exit_status():
        method.train(common.parse_args(method.Config, [*flags, "--epochs", "1", "--out", str(tmp_path)]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    return err


def one_step(method, given, tmp_path, monkeypatch):
    """Train one step of SGD on all 200 images, with a weight decay. Returns the metrics, the parts it started from
    (model and, where the method has one, classifier), the images' indices and the views that it was fed."""
    start, seen, augment, batches = {}, [], method.augment, common.Run.batches

    def spy_run(run, *args, init=common.Run.__init__, **parts):
        start.update({n: copy.deepcopy(p) for n, p in parts.items() if isinstance(p, torch.nn.Module)})
        init(run, *args, **parts)

    def spy_batches(run, **asked):
        for index, views in batches(run, **asked):
            start["index"], start["labels"] = index, run.data.train.labels[index]
            yield index, views

    given = {"epochs": 1, "batch_size": 200, "warmup_epochs": 0.0, "weight_decay": 0.1, "knn_every": 0} | given
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "__init__", spy_run)
        patch.setattr(common.Run, "batches", spy_batches)
        patch.setattr(method, "augment", lambda *a: seen.append(augment(*a)) or seen[-1])
        metrics = method.train(method.Config.preset("demo", **given, out=str(tmp_path)))
    assert len(seen) >= 2 and not torch.equal(*seen[:2])
    return metrics, start, seen


def moved_by(loss, part, after, lr, decay):
    """Every parameter went down the gradient of `loss`, and of the weight decay `decay(p)`, once."""
    loss.backward()
    moved = 0
    for name, p in part.named_parameters():
        expected = p.detach() - (lr * (p.grad + decay(p) * p.detach()) if p.requires_grad else 0)
        assert torch.allclose(after[name], expected, rtol=1e-4, atol=2e-6), name
        moved += not torch.equal(after[name], p.detach())
    assert moved == sum(p.requires_grad for p in part.parameters())


def recipe(method, monkeypatch, *given):
    """The operations that `augment` asks for, each as (its name, its probability, its settings)."""
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


WARM_UP_AND_COSINE = [1 / 3, 2 / 3, 1, 1, 0.75, 0.25]  # of the peak, in the six steps of `follows_the_schedule`


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
