"""Several processes on a CPU (gloo) against one: ten steps of each method, BN, shared work, torchrun, sudden ends."""

import copy
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from torch import nn

import byol
import common
import images
import linear_eval
import moco
import pairwise
import simclr
import simsiam
import supcon
import swav
from tests.helpers import ROOT, equal, python, same_run, saved

METHODS = {module.__name__: module for module in (byol, moco, pairwise, simclr, simsiam, supcon, swav)}
CASES = {
    "simclr": {"optimizer": "lars", "lr": 1.0},
    "simclr sgd": {},
    "moco": {"bn_splits": 4, "queue_size": 40},
    "moco symmetric": {"bn_splits": 4, "queue_size": 40, "symmetric": True, "shuffle_bn": False},
    "moco bn-splits 1": {"bn_splits": 1, "queue_size": 40},
    "moco end-to-end": {"mechanism": "end-to-end", "bn_splits": 4},
    "moco memory-bank": {"mechanism": "memory-bank", "bn_splits": 4, "queue_size": 30},
    "byol": {},
    "simsiam": {},
    "swav": {
        "queue_size": 32,
        "queue_start_epoch": 0.0,
        "freeze_prototypes_epochs": 0.3,
        "epsilon": 0.1,
        "crops": "2x16,2x8",
    },
    "supcon": {"optimizer": "lars", "lr": 1.0},
    "supcon in": {"loss": "in", "optimizer": "sgd"},
    "supcon cross-entropy": {"loss": "cross-entropy", "optimizer": "sgd"},
    "pairwise": {"loss": "nce", "negatives": "other-class"},
    "fine-tuning": {},
}


def fixed_batches(run, views=0, scale=None, crops=()):
    """What Run.batches yields, but of views that depend on the step alone, each process's block of the batch."""
    run.started = run.saved = run.shown = 0.0
    sizes = [size for size, _ in crops] or [run.config.image_size] * views
    while run.step < run.total:
        generator, n = torch.Generator().manual_seed(run.step), run.config.batch_size
        index = torch.randperm(len(run.data.train), generator=generator)[:n]
        drawn = [torch.randn(n, 3, s, s, generator=generator, dtype=torch.float64) for s in sizes]
        yield common.mine(index), [common.mine(x).to(torch.get_default_dtype()) for x in drawn]


def train_all(folder, dtype, cases):
    """Ten steps of each case; each run's files in a folder of its own."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (180, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.arange(180) % 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "batches", fixed_batches)
        patch.setattr(common.Run, "curves", lambda run: None)
        patch.setattr(common.Run, "neighbours", lambda run: None)
        torch.set_default_dtype(dtype)
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the loops ask for float32
        for case, given in cases.items():
            if case == "fine-tuning":
                fine_tune(folder / case, images.from_tensors(pictures, labels, torch.device("cpu")), patch)
                continue
            method = METHODS[case.split()[0]]
            patch.setattr(method, "augment", lambda x, *rest: x)
            given = {"epochs": 1, "batch_size": 16, "image_size": 16, "lr": 0.1, "warmup_epochs": 0.0} | given
            if dtype == torch.float32:  # where the rounding of an activation near 0 decides, the steps must be short
                given["lr"] /= 100
            config = method.Config.preset("demo", **given, knn_every=0, out=str(folder / case))
            method.train(config, data=(pictures, labels))
            states = [None] * common.share()[1]
            if len(states) > 1:  # every process ends with the same weights and statistics
                dist.all_gather_object(states, LAST["model"].state_dict())
                for state in states:
                    assert all(torch.equal(a, b) for a, b in zip(state.values(), states[0].values(), strict=True))


def fine_tune(folder, data, patch):
    """Ten steps of linear_eval's fine-tuning, on views without chance."""
    torch.manual_seed(0)
    model, views = simclr.SimCLR(simclr.Config.preset("demo", image_size=16)), data.train.views
    patch.setattr(images, "sometimes", lambda x, *rest: x)
    patch.setattr(data.train, "views", lambda batches, *rest: views(batches, [(16, None)]))
    how = linear_eval.FINETUNING["simclr"]._replace(batch_size=16, epochs=1, lr=0.1)
    rows, labels = torch.arange(len(data.train)), data.train.labels
    given = model.backbone, data, simclr.Config(workers=1, image_size=16), rows, labels, how
    state = linear_eval.fit_as_published(*given, tune=True).state_dict() | model.backbone.state_dict()
    if common.share()[0] == 0:
        folder.mkdir(parents=True)
        torch.save({"parts": {"model": ("SimCLR", state)}}, folder / "checkpoint.pt")


LAST = {}  # the parts of the last run of this process


def keep_parts(patch):
    init = common.Run.__init__

    def spy(run, *rest, **parts):
        LAST.update(parts)
        init(run, *rest, **parts)

    patch.setattr(common.Run, "__init__", spy)


def run_process(rank, processes, store, work, *rest):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        keep_parts(patch)
        work(*rest)
    dist.destroy_process_group()


def in_processes(processes, folder, work, *rest):
    """`work(*rest)` in as many processes of one group."""
    mp.spawn(run_process, (processes, str(folder / f"store{processes}"), work, *rest), nprocs=processes)


BASE = {case: given for case, given in CASES.items() if case in METHODS}  # each method, without its variants


@pytest.mark.parametrize(
    "processes, dtype, tolerance, cases",
    [
        (2, torch.float64, 1e-10, CASES),
        pytest.param(4, torch.float64, 1e-10, BASE, marks=pytest.mark.slowest),
        pytest.param(2, torch.float32, 1e-5, BASE, marks=pytest.mark.slowest),
    ],
    ids=["two", "four", "two-float32"],
)
def test_processes_take_the_steps_of_one_process(processes, dtype, tolerance, cases, tmp_path):
    in_processes(processes, tmp_path, train_all, tmp_path / "many", dtype, cases)
    try:
        train_all(tmp_path / "one", dtype, cases)
    finally:
        torch.set_default_dtype(torch.float32)
    for case in cases:
        one, many = (flat(tmp_path / name / case) for name in ("one", "many"))
        assert (one - many).norm() < tolerance * one.norm(), case


def flat(folder):
    """Weights, BN statistics, queue, prototypes and target of a run, as one vector."""
    parts = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]
    states = [parts[name][1] for name in ("model", "classifier", "bank") if name in parts]
    return torch.cat([x.double().flatten() for state in states for x in state.values() if x.is_floating_point()])


# ------------------------------------------------------------------------------------- BN, mixed precision, shared work


def check_batch_norm():
    """SyncBatchNorm against nn.BatchNorm on the whole batch: output, gradients and statistics."""
    kinds = ((24, 5, 3, 4), (24, 5)), (torch.float64, torch.float32), (True, False)
    for shape, dtype, affine in itertools.product(*kinds):
        generator = torch.Generator().manual_seed(0)
        x, upstream = torch.randn(2, *shape, generator=generator, dtype=dtype) * 3 + 5
        kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
        whole = kind(5, affine=affine, momentum=0.3, dtype=dtype)
        for p in whole.parameters():
            nn.init.normal_(p, generator=generator)
        ours = copy.deepcopy(whole)
        ours.__class__ = common.SyncBatchNorm
        a, b = x.clone().requires_grad_(), common.mine(x).clone().requires_grad_()
        y, z = whole(a), ours(b)
        (y * upstream).sum().backward()
        (z * common.mine(upstream)).sum().backward()
        pairs = [(z, common.mine(y)), (b.grad, common.mine(a.grad))]
        pairs += [(getattr(ours, name), getattr(whole, name)) for name in ("running_mean", "running_var")]
        pairs += [(common.over_all(p.grad), q.grad) for p, q in zip(ours.parameters(), whole.parameters(), strict=True)]
        pairs.append((ours.eval()(x), whole.eval()(x)))
        for found, expected in pairs:
            assert (found - expected).norm() <= (1e-12 if dtype == torch.float64 else 1e-5) * expected.norm()


def check_an_overflow_on_one_process(folder):
    """A gradient of rank 1 that is not finite: no process takes the step, and all halve the scale."""
    seen = []
    scale, log = torch.amp.GradScaler.scale, common.Run.log

    def too_much(scaler, loss):
        big = common.share()[0] == 1 and len(seen) == 2
        return scale(scaler, loss) * (1e30 if big else 1)

    def spy(run, *rest):
        weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
        seen.append((weights, run.parts["scaler"].get_scale()))
        log(run, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp.GradScaler, "scale", too_much)
        patch.setattr(common.Run, "log", spy)
        patch.setattr(common.Run, "curves", lambda run: None)
        given = {"epochs": 1, "batch_size": 18, "image_size": 16, "amp": "fp16", "knn_every": 0}
        pictures = torch.randint(256, (100, 3, 16, 16), generator=torch.Generator(), dtype=torch.uint8)
        simclr.train(simclr.Config.preset("demo", **given, out=str(folder / "fp16")), data=pictures)
    (w1, s1), (w2, s2), (w3, s3) = seen[1:4]
    assert torch.equal(w1, w2) and s2 == s1 / 2 and s3 == s2 and not torch.equal(w2, w3)
    for weights, _ in seen:
        assert torch.equal(common.gather(weights[None])[0], weights)


def check_shared_work(photos):
    """A folder that is read, and images that are embedded, by all are as one process has them."""
    few = images.load(str(photos), 32, torch.device("cpu"))
    config = simclr.Config.preset("demo")
    network = common.build_backbone(config).eval()
    index = torch.arange(0, 2 * 37, 2)  # an odd number
    features = common.embed(network, few.train, config, index)
    accuracy = common.knn_of(network, few, config)
    with pytest.MonkeyPatch.context() as patch:
        for module in (images, common):
            patch.setattr(module, "share", lambda: (0, 1))
        alone = images.load(str(photos), 32, torch.device("cpu"))
        assert torch.equal(alone.train.images, few.train.images) and equal(alone.skipped, few.skipped)
        assert len(few.skipped) == 1 and alone.classes == few.classes and alone.train.paths == few.train.paths
        assert torch.equal(common.embed(network, alone.train, config, index), features)
        assert common.knn_of(network, alone, config) == accuracy


def check_a_download(folder):
    """One process downloads, the others then find the files."""
    rank, path = common.share()[0], folder / "cifar"

    def dataset(root, download, train):
        assert rank == 0 or path.exists()
        time.sleep(0.3)
        path.touch()
        return SimpleNamespace(data=np.full((4, 32, 32, 3), train, np.uint8), targets=[0, 1, 0, 1], classes=["a", "b"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets, "CIFAR10", dataset)
        data = images.load("cifar10", 32, torch.device("cpu"), str(folder))
    assert (data.train.images == 1).all() and (data.test.images == 0).all()


def check_codes():
    """Sinkhorn over processes with unequal numbers of images."""
    scores = torch.rand(37, 11, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, own = swav.sinkhorn(scores, 0.05, 3), swav.sinkhorn(common.mine(scores), 0.05, 3, common.group())
    assert (own - common.mine(whole)).abs().max() < 1e-6


def check_unshared_batches():
    """What the processes cannot share out, or do not agree on, is one line on each."""
    processes = common.share()[1]
    for given, words in (
        ({"batch_size": 31}, f"--batch-size 31: must be a multiple of {processes}, the number of processes; try 30"),
        ({"batch_size": 12, "micro_batch_size": 4}, f"--micro-batch-size 4: must divide the {12 // processes} images"),
        ({"seed": common.share()[0]}, "the processes have other flags"),
    ):
        with pytest.raises(images.InputError, match=words):
            common.share_out(simclr.Config.preset("demo", **{"batch_size": 30, **given}))


def check_the_gradient_of_gather():
    world = common.share()[1]
    x, other = torch.ones(2, requires_grad=True), torch.ones(2 * world, requires_grad=True)
    h = other * 1  # its gradient is the tensor that gather's backward pass is given
    ((common.gather(x) + h) * 1).sum().backward()
    assert (x.grad == world).all() and (other.grad == 1).all()


def check(folder, photos):
    check_codes()
    check_unshared_batches()
    check_the_gradient_of_gather()
    check_a_download(folder)
    check_batch_norm()
    check_an_overflow_on_one_process(folder)
    torch.manual_seed(0)
    check_shared_work(photos)


def test_layers_and_shared_work(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "0" / "damaged.png").write_bytes(b"no picture")
    in_processes(2, tmp_path, check, tmp_path, folder)


# ----------------------------------------------------------------------------------------------------------- torchrun


def torchrun(*arguments, processes=2):
    """The command line of a job of so many processes, on a port of its own."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *arguments]


def tiny(photos, out, *more):
    """220 pictures, 6 steps an epoch of 32."""
    flags = ("--preset", "demo", "--data", photos, "--batch-size", "32", "--lr", "0.1", "--out", out)
    return tuple(map(str, ("simclr.py", *flags, *more)))


def test_two_processes_by_torchrun_and_on_with_one(photos, tmp_path):
    run = python(*torchrun(*tiny(photos, tmp_path, "--epochs", "2")))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\nsimclr  ") == 1 and "2 processes, 16 images of a batch each" in run.stdout
    assert "Traceback" not in run.stderr and "arning: " not in run.stderr
    run = python(*tiny(photos, tmp_path, "--epochs", "3", "--resume"))
    assert run.returncode == 0, run.stderr
    assert "note: --resume: the run was of 2 processes, now of 1: its views from here on are others" in run.stdout
    rows = (tmp_path / "log.csv").read_text().splitlines()[1:]
    losses = [float(row.split(",")[1]) for row in rows]
    assert len(losses) == 3 and losses[2] < losses[1]


class Job:
    """A job of two processes that is met while it trains."""

    def __init__(self, out, *command):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self.out, self.log = Path(out), open(f"{out}.txt", "w")  # noqa: SIM115
        streams = {"stdout": self.log, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **streams)

    def wait_for(self, there):
        end = time.monotonic() + 90
        while not there() and time.monotonic() < end:
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)
        assert there(), self.text()

    def ranks(self):
        """The process of each rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                mine = str(self.out).encode() in (path / "cmdline").read_bytes().split(b"\0")
                environment = dict(x.split(b"=", 1) for x in (path / "environ").read_bytes().split(b"\0") if b"=" in x)
            except OSError:  # it has ended
                continue
            if mine and b"RANK" in environment:
                found[int(environment[b"RANK"])] = int(path.name)
        return found

    def end(self):
        """The seconds until it ends."""
        start = time.monotonic()
        self.process.wait(60)
        return time.monotonic() - start

    def text(self):
        return Path(self.log.name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slowest)])
def test_a_killed_process_ends_the_job_and_the_next_one_finishes_it(victim, photos, tmp_path):
    out = tmp_path / "run"
    flags = ("--epochs", "8", "--knn-every", "0", "--save-minutes", "0.005", "--resume")
    job = Job(out, *torchrun(*tiny(photos, out, *flags)))
    job.wait_for((out / "checkpoint.previous.pt").exists)
    os.kill(job.ranks()[victim], signal.SIGKILL)
    assert job.end() < 10
    lines = [line for line in job.text().splitlines() if "error: " in line]
    words = "error: another process of the job has ended; --resume goes on from the last checkpoint"
    assert lines == [words] * victim, job.text()  # rank 0's
    assert f"rank      : {victim} " in job.text() and "Signal 9 (SIGKILL)" in job.text()  # torchrun's report
    assert 0 < saved(out, "progress")["step"] < 48
    for folder in (out, tmp_path / "whole") if victim else ():
        run = python(*torchrun(*tiny(photos, folder, *flags)))
        assert run.returncode == 0, run.stderr
    assert not victim or same_run(out, tmp_path / "whole")  # two processes add in one order: to the bit


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process(photos, tmp_path):
    out = tmp_path / "run"
    command = torchrun(*tiny(photos, out, "--epochs", "8", "--knn-every", "0", "--save-minutes", "0.005", "--resume"))
    command = [word for word in command if word != "--standalone"]  # one store for both starts, with the old addresses
    job = Job(out, *command[:2], f"--master-port={20000 + os.getpid() % 10000}", "--max-restarts=1", *command[2:])
    job.wait_for((out / "checkpoint.previous.pt").exists)
    os.kill(job.ranks()[1], signal.SIGKILL)
    job.end()
    assert job.process.returncode == 0, job.text()
    assert saved(out, "progress")["step"] == 48


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_the_job_saves(photos, tmp_path):
    out = tmp_path / "run"
    job = Job(out, *torchrun(*tiny(photos, out, "--epochs", "50", "--knn-every", "0")))
    job.wait_for((out / "checkpoint.pt").exists)
    job.process.terminate()
    assert job.end() < 10
    step = saved(out, "progress")["step"]
    assert f"stopped after step {step} of 300; {out}/checkpoint.pt is saved" in job.text()
    assert job.text().count("stopped after") == 1


@pytest.mark.slowest
def test_linear_eval_by_torchrun(photos, tmp_path):
    assert python(*tiny(photos, tmp_path, "--epochs", "3")).returncode == 0
    arguments = ("linear_eval.py", str(tmp_path), "--protocol", "paper", "--epochs", "2", "--lr", "0.3")
    one, two = python(*arguments), python(*torchrun(*arguments))
    assert one.returncode == two.returncode == 0, two.stderr
    one, two = (run.stdout.splitlines() for run in (one, two))
    assert one[:4] == two[:4] and [x for x in one if "kNN" in x] == [x for x in two if "kNN" in x] != []
