"""Several processes on a CPU (gloo) against one: four steps of each method, shared work, torchrun, sudden ends."""

import importlib
import re
import signal
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

import common
import images
import simclr
import swav
from tests.helpers import METHODS, python, same_run, saved, train

CPU = torch.device("cpu")
CLASSES = dict(zip(METHODS, ("SimCLR", "MoCo", "BYOL", "SimSiam", "SupCon", "SwAV", "Pairwise"), strict=True))
CASES = {
    "simclr": dict(optimizer="lars", lr=1.0),
    "simclr sgd": dict(optimizer="sgd"),
    "moco": dict(bn_splits=4, queue_size=40),
    "moco symmetric": dict(bn_splits=4, queue_size=40, symmetric=True, shuffle_bn=False),
    "moco bn-splits 1": dict(bn_splits=1, queue_size=40),
    "moco end-to-end": dict(mechanism="end-to-end", bn_splits=4),
    "moco memory-bank": dict(mechanism="memory-bank", bn_splits=4, queue_size=30),
    "byol": {},
    "simsiam": {},
    "swav": dict(queue_size=32, queue_start_epoch=0.0, freeze_prototypes_epochs=0.3, epsilon=0.1, crops="2x16,2x8"),
    "supcon": dict(optimizer="lars", lr=1.0),
    "supcon in": dict(loss="in", optimizer="sgd"),
    "supcon cross-entropy": dict(loss="cross-entropy", optimizer="sgd"),
    "pairwise": dict(negatives="other-class"),
}
BASE = {case: given for case, given in CASES.items() if case in METHODS}  # each method, without its variants
FEW = {case: CASES[case] for case in ("simclr", "moco")}


@dataclass
class Noise(images.Images):
    """Pictures of noise. A view depends on the epoch, the image and the crop alone, not on the process."""

    def views(self, batches, crops, seed=(0,), workers=0):
        for index in batches:
            yield [torch.stack([self.draw(size, *seed, k, i) for i in index]) for k, (size, _) in enumerate(crops)]

    def draw(self, size, *seed):
        generator = torch.Generator().manual_seed(images.seed_of(*map(int, seed)))
        return torch.randn(3, size, size, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())


class SynchronisedBatchNorm(_BatchNorm):
    """BN over the rows of all processes, as nn.SyncBatchNorm is on GPUs."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.ndim) if d != 1], [1, -1, 1, 1][: x.ndim]
        n = common.share()[1] * x.numel() / x.shape[1]
        mean = all_reduce(x.sum(dims)) / n
        x = x - mean.view(shape)
        var = all_reduce(x.square().sum(dims)) / n
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)
        self.num_batches_tracked.add_(1)
        x = x * (var + self.eps).rsqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x


def synchronised(kind, made):
    """The model's class, whose BN spans the processes. The list `made` takes every instance."""

    class Model(kind):
        def __init__(self, config):
            super().__init__(config)
            made.append(self)
            for module in self.modules() if common.share()[1] > 1 and getattr(config, "bn_splits", 1) == 1 else ():
                module.__class__ = SynchronisedBatchNorm if isinstance(module, _BatchNorm) else module.__class__

    Model.__name__ = kind.__name__
    return Model


def train_all(folder, dtype, cases):
    """Four steps of each case; each run's files in a folder of its own."""
    labels, made = torch.arange(70) % 5, []
    data = images.Data("noise", Noise(labels, CPU), None, list("abcde"))
    with pytest.MonkeyPatch.context() as patch:
        torch.set_default_dtype(dtype)
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the loops ask for float32
        for case, given in cases.items():
            method = importlib.import_module(case.split()[0])
            patch.setattr(method, "augment", lambda x, *rest: x)
            patch.setattr(
                method, CLASSES[method.__name__], synchronised(getattr(method, CLASSES[method.__name__]), made)
            )
            given = {"batch_size": 16, "image_size": 16, "lr": 0.1} | given
            if dtype == torch.float32:  # where the rounding of an activation near 0 decides, the steps must be short
                given["lr"] /= 100
            train(method, folder / case, data, **given)
            weights = torch.cat([p.detach().flatten() for p in made[-1].parameters()])
            for other in common.gather(weights[None]):  # every process ends with the same weights
                assert torch.equal(other, weights)
    torch.set_default_dtype(torch.float32)


def flat(folder, statistics):
    """Weights, queue, prototypes, target, and the BN statistics if asked for, as one vector."""
    parts = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]
    states = [state for name, (_, state) in parts.items() if name != "optimizer"]
    named = [(name, x) for state in states for name, x in state.items() if x.is_floating_point()]
    return torch.cat([x.double().flatten() for name, x in named if statistics or ".running_" not in name])


def process(rank, processes, store, work, *rest):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    work(*rest)
    dist.destroy_process_group()


def in_processes(processes, folder, work, *rest):
    """`work(*rest)` in as many processes of one group."""
    mp.spawn(process, (processes, str(folder / f"store{processes}"), work, *rest), nprocs=processes)


@pytest.mark.parametrize(
    "processes, dtype, tolerance, cases",
    [
        (2, torch.float64, 1e-10, FEW),
        pytest.param(2, torch.float64, 1e-10, {c: CASES[c] for c in CASES if c not in FEW}, marks=pytest.mark.slow),
        pytest.param(4, torch.float64, 1e-10, BASE, marks=pytest.mark.slowest),  # two show the same
        pytest.param(2, torch.float32, 1e-5, BASE, marks=pytest.mark.slowest),  # float64 shows more
    ],
    ids=["two", "two-others", "four", "two-float32"],
)
def test_processes_take_the_steps_of_one_process(processes, dtype, tolerance, cases, tmp_path):
    """With the tests' own synchronised BN, or MoCo's groups of the batch, whose statistics stay each process's own."""
    in_processes(processes, tmp_path, train_all, tmp_path / "many", dtype, cases)
    try:
        train_all(tmp_path / "one", dtype, cases)
    finally:
        torch.set_default_dtype(torch.float32)
    for case, given in cases.items():
        one, many = (flat(tmp_path / name / case, given.get("bn_splits", 1) == 1) for name in ("one", "many"))
        assert (one - many).norm() < tolerance * one.norm(), case


# ----------------------------------------------------------------------------------------------------- shared work


def check_gather():
    """Rows come in the order of the batch; the gradient is that of the sum of all processes' losses."""
    rank, world = common.share()
    rows = torch.arange(6.0).view(6, 1)
    x = rows[rank::world].clone().requires_grad_()
    every = common.gather(x)
    assert torch.equal(every.detach(), rows)
    (every * torch.arange(1.0, 7)[:, None]).sum().backward()
    assert torch.equal(x.grad, world * torch.arange(1.0, 7)[rank::world, None])


def check_codes():
    """Sinkhorn over processes with unequal numbers of images."""
    rank, world = common.share()
    scores = torch.rand(37, 11, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, own = swav.sinkhorn(scores, 0.05, 3), swav.sinkhorn(scores[rank::world], 0.05, 3, dist.group.WORLD)
    assert (own - whole[rank::world]).abs().max() < 1e-6


def check_embedding():
    """Features are those of one process, also of a number of images that cannot be shared equally."""
    config = simclr.Config.preset("demo", image_size=16)
    torch.manual_seed(0)
    network, split = common.build_backbone(config).eval(), Noise(torch.arange(60) % 5, CPU)
    index = torch.arange(0, 59, 2)[:29]
    (view,) = next(split.views([index], [(16, None)]))
    alone = network(images.normalize(view)).detach()
    assert torch.allclose(common.embed(network, split, config, index), alone, rtol=1e-4, atol=1e-5)


def check_refusals():
    """What the processes cannot share out is an error on each, before any folder is made."""
    data = images.Data("noise", Noise(torch.zeros(60).long(), CPU))
    for given, words in (
        ({"batch_size": 31}, "--batch-size 31: give a multiple of 2, the number of processes"),
        ({"batch_size": 12, "micro_batch_size": 4}, "--micro-batch-size 4: give a divisor of 6"),
    ):
        with pytest.raises(images.InputError, match=words):
            common.Run(simclr.Config.preset("demo", **given), data)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(images.InputError, match="copy it along"):
        patch.setattr(common, "kernels", None)  # negatives would be those of one process, in silence
        common.Run(simclr.Config.preset("demo", batch_size=30), data).loss(simclr.nt_xent)


def check_a_download(folder):
    """One process downloads; the others then find the files."""
    rank, path = common.share()[0], folder / "cifar"

    def dataset(root, download, train):
        assert rank == 0 or path.exists()
        time.sleep(0.3)
        path.touch()
        return SimpleNamespace(data=np.full((4, 32, 32, 3), train, np.uint8), targets=[0, 1, 0, 1], classes=["a", "b"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank))
        patch.setattr(torchvision.datasets, "CIFAR10", dataset)
        data = images.load(simclr.Config.preset("cifar", data_dir=str(folder)), CPU)
    assert (data.train.pixels == 1).all() and (data.test.pixels == 0).all()


def check(folder):
    check_gather()
    check_codes()
    check_embedding()
    check_refusals()
    check_a_download(folder)


def test_shared_work(tmp_path):
    in_processes(2, tmp_path, check, tmp_path)


# ----------------------------------------------------------------------------------------------------------- torchrun

STOP = """
import os, runpy, sys
import pytest
sys.path.insert(0, os.getcwd())
from tests.helpers import at_each_step

def stop(run, *_):
    if (run.step, run.rank) == (step, rank) and not os.path.exists(once):
        open(once, "w").close()
        os.kill(os.getpid() if number == 9 else os.getppid(), number)  # this process, or torchrun itself

number, step, rank = map(int, sys.argv[1:4])
once = sys.argv[4]
sys.argv[:5] = ["simclr.py"]
sys.modules["matplotlib"] = None
at_each_step(pytest.MonkeyPatch(), stop)
runpy.run_path("simclr.py", run_name="__main__")
"""


def torchrun(*arguments, how=("--standalone",), **options):
    """A job of two processes, on a port of its own."""
    return python("-m", "torch.distributed.run", *how, "--nproc-per-node=2", *arguments, timeout=300, **options)


def tiny(photos, *more):
    """220 pictures, 6 steps an epoch of 32."""
    flags = f"--preset demo --data {photos} --batch-size 32 --image-size 16 --lr 0.1 --knn-every 0 --workers 0".split()
    return [*flags, *map(str, more)]


def stopped(number, step, rank, photos, tmp_path, *more, **options):
    """A job of 8 epochs that saves at every step, and in which this signal arrives at a step of a rank."""
    (tmp_path / "stop.py").write_text(STOP)
    flags = tiny(photos, "--epochs", 8, "--save-minutes", 1e-9, "--resume", tmp_path / "run", *more)
    return torchrun(tmp_path / "stop.py", int(number), step, rank, tmp_path / "once", *flags, **options)


@pytest.mark.slow  # a job of two processes takes about ten seconds to start
def test_two_processes_by_torchrun_and_on_with_one(photos, tmp_path, capsys):
    run = torchrun("simclr.py", *tiny(photos, "--epochs", 2, "--out", tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("simclr on 2 x cpu; BN is each process's own; the paper's recipe with ") == 1
    assert "Traceback" not in run.stderr and "arning: " not in run.stderr
    simclr.train(common.parse_args(simclr.Config, ["--resume", str(tmp_path), "--epochs", "3"]))
    assert "simclr on 1 x cpu;" in capsys.readouterr().out
    losses = [row["loss"] for row in saved(tmp_path, "rows")]
    assert len(losses) == 3 and losses[2] < losses[1]


@pytest.mark.slow  # as above
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slowest)])
def test_a_job_that_lost_a_process_is_finished_by_one_process(victim, photos, tmp_path):
    job = stopped(signal.SIGKILL, 20, victim, photos, tmp_path)
    assert job.returncode == 1 and "Signal 9 (SIGKILL)" in job.stderr  # torchrun's report
    assert saved(tmp_path / "run", "step") == 20
    run = python("simclr.py", "--resume", tmp_path / "run")
    assert run.returncode == 0 and saved(tmp_path / "run", "step") == 48, run.stderr


@pytest.mark.slow  # as above
def test_torchrun_restarts_a_killed_process_and_two_processes_resume_bit_for_bit(photos, tmp_path):
    job = stopped(signal.SIGKILL, 20, 1, photos, tmp_path, how=("--standalone", "--max-restarts=1"))
    assert job.returncode == 0, job.stderr
    assert torchrun("simclr.py", *tiny(photos, "--epochs", 8, "--out", tmp_path / "whole")).returncode == 0
    assert same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow  # as above
def test_torchrun_passes_sigterm_on_and_the_job_saves(photos, tmp_path):
    job = stopped(signal.SIGTERM, 20, 0, photos, tmp_path, "--save-minutes", 0)
    assert job.returncode != 0 and job.stderr.count("stopped after step") == 1, job.stderr
    step = saved(tmp_path / "run", "step")
    assert 20 < step < 48 and f"stopped after step {step}; --resume {tmp_path}/run goes on" in job.stderr


@pytest.mark.slow  # as above
def test_a_batch_that_cannot_be_shared_is_one_line(photos, tmp_path):
    job = torchrun("simclr.py", *tiny(photos, "--batch-size", 31, "--out", tmp_path))
    assert job.returncode == 1 and "exitcode  : 2" in job.stderr
    assert len(re.findall("^error: --batch-size 31: give a multiple of 2", job.stderr, re.M)) == 1
    assert "Traceback" not in job.stderr.split("torch/distributed")[0]  # torchrun has one of its own


@pytest.mark.slowest  # three jobs, which test_linear_eval.py covers in one process
def test_linear_eval_by_torchrun(photos, tmp_path):
    assert python("simclr.py", *tiny(photos, "--epochs", 3, "--out", tmp_path)).returncode == 0
    arguments = ("linear_eval.py", tmp_path, "--protocol", "paper", "--epochs", 2, "--lr", 0.3)
    one, two = python(*arguments), torchrun(*arguments)
    assert one.returncode == two.returncode == 0, two.stderr
    one, two = (run.stdout.splitlines() for run in (one, two))
    assert [x for x in one if "kNN" in x] == [x for x in two if "kNN" in x] != [] and len(one) == len(two)
