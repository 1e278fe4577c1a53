"""Several processes against one process on the concatenated batch (gloo): loss and gradients."""

import contextlib
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kernels import blocked, cosine_logsumexp, info_nce, nt_xent, sup_con

N, D = 24, 20  # pairs in all, width


def batch(dtype):
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, N, D, generator=generator, dtype=torch.float64).to(dtype)
    return z1, z2, torch.randint(-1, 6, (N,), generator=generator)  # -1: without a label


def cases(group, t, backend):
    """Return name -> function of (z1, z2, labels): the value of this process's anchors."""
    return {
        "nt_xent": lambda a, b, y: nt_xent(a, b, t, group=group, backend=backend),
        "sup_con out": lambda a, b, y: sup_con(torch.cat([a, b]), y.repeat(2), t, group=group, backend=backend),
        "sup_con in": lambda a, b, y: sup_con(
            torch.cat([a, b]), y.repeat(2), t, loss="in", group=group, backend=backend
        ),
        "towers": lambda a, b, y: info_nce(a, b, temperature=t, group=group, backend=backend),
        "symmetric towers": lambda a, b, y: info_nce(a, b, temperature=t, symmetric=True, group=group, backend=backend),
        "rectangular": lambda a, b, y: cosine_logsumexp(a, b, temperature=t, group=group, backend=backend).mean(),
    }


def run(rank, processes, backend, port_file, results):
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    torch.save(values_and_gradients(rank, processes, backend), f"{results}/{rank}.pt")
    dist.destroy_process_group()
    end = time.monotonic() + 5  # a thread that has ended may be listed for a moment
    while (left := list(gloo_threads())) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left, f"something holds on to the process group: {left}"


def gloo_threads():
    for thread in Path("/proc/self/task").glob("*/comm"):  # none where there is no /proc
        with contextlib.suppress(OSError):
            if "gloo" in (name := thread.read_text().strip()):
                yield name


def values_and_gradients(rank, processes, backend):
    own = slice(rank * N // processes, (rank + 1) * N // processes)
    found, blocked.TILE = {}, 16  # so that a tile can have rows of one of the two parts alone
    for dtype in (torch.float64, torch.float32):
        for t in (0.2, 0.005):  # without and with a running maximum
            for name, function in cases(dist.group.WORLD, t, backend).items():
                z1, z2, labels = (x[own] for x in batch(dtype))
                a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
                value = function(a, b, labels)
                (value * (rank + 1)).backward()  # uneven upstream gradients
                found[name, dtype, t] = value.detach(), a.grad, b.grad
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes, backend", [(2, "blocked"), (4, "blocked"), (2, "triton")])
def test_processes_equal_one_process(processes, backend, tmp_path, monkeypatch):
    if backend == "triton":  # in the processes' interpreter
        pytest.importorskip("triton", reason="triton is not installed")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    mp.spawn(run, (processes, backend, str(tmp_path / "store"), str(tmp_path)), nprocs=processes)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for name, dtype, t in found[0]:
        # One process, all anchors; the weights are those of the processes' values in their sum.
        z1, z2, labels = batch(dtype)
        a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
        share = N // processes
        total = 0
        for rank in range(processes):
            value = one_process(name, a, b, labels, t, slice(rank * share, (rank + 1) * share))
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            assert (found[rank][name, dtype, t][0] - value).abs() <= tolerance * value.abs().clamp_min(1), (name, t)
            total = total + (rank + 1) * value
        total.backward()
        for index, whole in ((1, a.grad), (2, b.grad)):
            parts = torch.cat([each[name, dtype, t][index] for each in found])
            assert (parts - whole).norm() <= tolerance * whole.norm(), (name, dtype, t, index)


def one_process(name, a, b, labels, t, anchors):
    """The mean over the given anchors' views, by plain autograd over the whole matrix."""
    s = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T / t
    if name == "rectangular":
        return s[anchors].logsumexp(1).mean()
    if name.endswith("towers"):
        other, target = s.T if name.startswith("symmetric") else s, torch.arange(len(a))[anchors]
        return sum(torch.nn.functional.cross_entropy(x[anchors], target) for x in (s, other)) / 2
    z, y = torch.nn.functional.normalize(torch.cat([a, b]), dim=1), labels.repeat(2)
    s = (z @ z.T / t).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    if name == "nt_xent":
        y = torch.arange(len(a)).repeat(2)
    positive = (y[:, None] == y) & (y != -1) & ~torch.eye(len(z), dtype=torch.bool)
    if name == "sup_con in":
        pull = s.masked_fill(~positive, -torch.inf).logsumexp(1) - positive.sum(1).to(s).log()
    else:
        pull = s.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)
    each = torch.where(positive.any(1), s.logsumexp(1) - pull, 0).unflatten(0, (2, len(a)))
    return each[:, anchors].mean()


def run_unequal(rank, processes, port_file, results):
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    group, last, z, y = dist.group.WORLD, rank == processes - 1, torch.randn(6, D), torch.arange(6)
    fewer = 5 if last else 6
    unequal = [
        lambda: nt_xent(z[:fewer], z[:fewer], group=group),
        lambda: nt_xent(z[: 6 * (not last)], z[: 6 * (not last)], group=group),  # nothing is left for the last
        lambda: nt_xent(z, z[:fewer], group=group),
        lambda: nt_xent(z[:, :fewer], z[:, :fewer], group=group),
        lambda: nt_xent(z.double() if last else z, z, group=group),
        lambda: nt_xent(z.numpy() if last else z, z, group=group),
        lambda: sup_con(z[:fewer], y[:fewer], group=group),
        lambda: sup_con(z, y[:fewer], group=group),
        lambda: cosine_logsumexp(z[:fewer], temperature=1.0, group=group),
        lambda: cosine_logsumexp(z, z[:fewer], temperature=1.0, group=group),
    ]
    lines = []
    for call in unequal:
        with pytest.raises(ValueError, match="each process of a group") as refused:
            call()
        lines.append(str(refused.value))
        nt_xent(z, z, group=group)  # the group is still of use
    torch.save(lines, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_unequal_shares_are_named_on_every_process(tmp_path):
    mp.spawn(run_unequal, (3, str(tmp_path / "store"), str(tmp_path)), nprocs=3)
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    assert all(lines == first for lines in others) and not any("\n" in line for line in first)
    assert "(5, 20)" in first[0] and "(6, 20)" in first[0] and "ndarray" in first[5]
