"""What the tests of the method files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments, folder=ROOT, **options):
    """Run Python in `folder` as from a shell there, on one thread, without what this process can import."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, **options)


def saved(folder, part="model"):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)[part]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def resumes_bit_for_bit(method, config, given, parts, tmp_path, monkeypatch):
    """Stop a run in the middle of an epoch of 6 steps and resume it: these parts of its checkpoint must equal those of
    a whole run. Returns the metrics of both."""
    whole = method.train(config(**given, out=str(tmp_path / "whole")))
    after = common.Run.after_step

    def stop_at_step_9(self, *rest):
        self.stop = self.step == 8
        after(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "after_step", stop_at_step_9)
        with pytest.raises(KeyboardInterrupt):
            method.train(config(**given, out=str(tmp_path / "cut")))
    assert saved(tmp_path / "cut", "step_in_epoch") == 3
    torch.manual_seed(99)
    resumed = method.train(config(**given, resume=True, out=str(tmp_path / "cut")))
    for part in ("model", "optimizer", "rng", *parts):
        assert equal(saved(tmp_path / "whole", part), saved(tmp_path / "cut", part)), part
    return whole, resumed


def follows_the_schedule(method, config, tmp_path, monkeypatch):
    """The learning rate of each of 6 steps, 3 of them warm-up, and the area of a run's crops, two of an image."""
    rates, scales, views = [], [], []
    step, crops, after = torch.optim.SGD.step, common.Images.crops, common.Run.after_step

    def spy_crops(images, batches, size, count, scale, *rest):
        scales.append(scale)
        return crops(images, batches, size, count, scale, *rest)

    def spy_after(run, loss, z, lr, *seen):
        views.append((z, lr, *seen))
        after(run, loss, z, lr, *seen)

    monkeypatch.setattr(torch.optim.SGD, "step", lambda o: rates.append([g["lr"] for g in o.param_groups]) or step(o))
    monkeypatch.setattr(common.Images, "crops", spy_crops)
    monkeypatch.setattr(common.Run, "after_step", spy_after)
    monkeypatch.setattr(method, "augment", lambda x, *rest: x)
    given = {"epochs": 2, "warmup_epochs": 1.0, "batch_size": 64, "crop_min_scale": 0.3, "knn_every": 0}
    c = config(**given, out=str(tmp_path))
    method.train(c)
    assert rates == [[common.cosine_lr(k, 6, 3, c.peak_lr())] * 2 for k in range(6)]
    assert [lr for _, lr, *_ in views] == [first for first, _ in rates] and set(scales) == {(0.3, 1.0)}
    assert all(z.shape == (64, c.projection_dim) and not torch.equal(v1, v2) for z, _, v1, v2 in views)
    return views


def trains_in_pieces(method, config, given, tmp_path):
    """One piece of N images changes nothing, to the bit; of pieces of N / 4, each network's BN sees more."""
    given = {"epochs": 1, "batch_size": 32, "knn_every": 0} | given
    for micro in (0, 32, 8):
        method.train(config(**given, micro_batch_size=micro, out=str(tmp_path / str(micro))))
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
