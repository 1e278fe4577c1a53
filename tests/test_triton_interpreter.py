"""The Triton kernels in Triton's interpreter: the host code of a GPU run, with CPU tensors.

TRITON_INTERPRET=1 must be set before Triton is imported, so these tests run in a process of their own: without it this
file starts that process, and in it this file holds the tests themselves.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import cosine_logsumexp, nt_xent, sup_con
from tests.test_kernels import (
    NAMES,
    assert_close,
    check_rows_of_any_length,
    check_rows_of_training,
    check_what_is_not_finite,
    error,
    gradients,
    losses,
    naive_logsumexp,
    naive_nt_xent,
    naive_sup_con,
)

pytest.importorskip("triton", reason="triton is not installed")
from kernels import blocked, fused  # noqa: E402  triton is here

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_a_process_of_its_own starts")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]


# Odd shapes, more and fewer rows than a block, more columns than a block, d beyond one tile, t on both sides of 1/64.
SHAPES = [(1, 1, 0.5), (3, 5, 10.0), (64, 96, 0.001), (35, 700, 0.07)]
FLOAT64, FLOAT32 = (torch.float64, 1e-10), (torch.float32, 1e-5)  # and the largest error
CASES = [(*shape, *FLOAT64) for shape in SHAPES] + [(*SHAPES[-1], *FLOAT32)]
CASES += [pytest.param(*shape, *FLOAT32, marks=pytest.mark.slowest) for shape in SHAPES[:-1]]


@interpreted
@pytest.mark.parametrize("m, d, t, dtype, bound", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_paper(name, m, d, t, dtype, bound):
    torch.manual_seed(m)
    z1, z2, labels = torch.randn(m, d), torch.randn(m, d), torch.randint(0, m, (2 * m,))
    ours, naive = losses("triton", labels)[name]
    assert_close(ours, naive, [z1, z2, torch.tensor(t)], dtype, bound, temperature=t)


@interpreted
def test_labels_need_not_be_contiguous():
    torch.manual_seed(0)
    z, pairs = torch.randn(33, 20), torch.randint(4, (33, 2))
    ours = [sup_con(z, labels, 0.2, loss="in", backend="triton") for labels in (pairs[:, 0], pairs[:, 0].contiguous())]
    assert torch.equal(*ours) and torch.allclose(ours[0], naive_sup_con(z, pairs[:, 0], 0.2, "in"))


@interpreted
@pytest.mark.parametrize("loss", ["out", "in"])
def test_a_label_of_minus_one_is_none(loss):
    torch.manual_seed(0)
    z, labels = torch.randn(40, 8), torch.randint(-2, 3, (40,))
    alone = torch.where(labels == -1, 9 + torch.arange(40), labels)
    ours = lambda z: sup_con(z, labels, 0.2, loss=loss, backend="triton")  # noqa: E731
    assert_close(ours, lambda z: naive_sup_con(z, alone, 0.2, loss), [z], torch.float64, 1e-10)


@interpreted
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_length(name):
    check_rows_of_any_length(name, "triton")


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about inf - inf
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slowest] * (n not in ("nt_xent", "sup_con in"))) for n in NAMES]
)
def test_what_is_not_finite(name):
    check_what_is_not_finite(name, "triton")


@interpreted
@pytest.mark.parametrize("m, k", [(1, 130), (129, 3), (5, 1025)])
def test_rectangular_shapes_and_split_columns(m, k):
    torch.manual_seed(0)
    q, keys, weight = torch.randn(m, 24), torch.randn(k, 24), torch.rand(m)
    for kept in (lambda x: x, lambda x: x.detach())[: 2 - (k > 1000)]:  # with and without a gradient to the keys
        assert_close(
            lambda q, keys, f=kept: cosine_logsumexp(q, f(keys), temperature=0.1, backend="triton"),
            lambda q, keys, f=kept: naive_logsumexp(q, f(keys), 0.1),
            [q, keys],
            temperature=0.1,
            weight=weight,
        )


@interpreted
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    torch.manual_seed(0)
    z1, z2 = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    if name == "info_nce":
        z2 = z2.detach()
    ours, _ = losses("triton", torch.tensor([0, 1, 0, 0]))[name]
    assert torch.autograd.gradcheck(ours, (z1, z2, t), fast_mode=True)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "kind, t", [("cosine 0.9", 0.05), ("cosine 0.99", 0.1), ("clustered", 0.1), ("collapsed", 0.5)]
)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_training(name, kind, t, dtype):
    check_rows_of_training(name, kind, t, "triton", dtype)


@interpreted
def test_a_row_of_zeros_in_float16():
    z1, z2 = torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(0)).half().float()
    z1[0] = 0
    exact = gradients(lambda a, b: naive_nt_xent(a, b, 0.1), z1, z2)
    value, a, b = gradients(lambda a, b: nt_xent(a, b, 0.1, backend="triton"), z1, z2, dtype=torch.float16)
    assert error(value, exact[0]) <= 1e-3 * exact[0] and error(b, exact[2]) <= 2e-3 * exact[2].norm()
    assert error(a[1:], exact[1][1:]) <= 2e-3 * exact[1][1:].norm()
    assert not torch.isfinite(a[0]).all()  # the gradient of a row of zeros is 1e12 dz, which is beyond float16


@interpreted
def test_bfloat16_rows_are_kept_in_float16():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 40, 32).bfloat16().float()
    exact = gradients(lambda a, b: naive_nt_xent(a, b, 0.5), z1, z2)
    ours = gradients(lambda a, b: nt_xent(a, b, backend="triton"), z1, z2, dtype=torch.bfloat16)
    assert error(ours[0], exact[0]) <= 1e-4 * exact[0]
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert a.dtype == torch.bfloat16 and error(a, b) <= torch.finfo(torch.bfloat16).eps * b.norm()


@interpreted
def test_tiny_upstream_gradients_survive_float16(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")  # one float16 a number
    torch.manual_seed(0)
    z = torch.randn(50, 32).half()
    one, tiny = (
        gradients(lambda z, g=g: cosine_logsumexp(z, temperature=0.1, backend="triton") * g, z, dtype=torch.float32)
        for g in (1.0, 1e-20)
    )
    torch.testing.assert_close(one[1], tiny[1] * 1e20)


@interpreted
def test_repeats_to_the_bit():
    z1, z2 = torch.randn(2, 30, 16)
    first = gradients(lambda a, b: nt_xent(a, b, backend="triton"), z1, z2, dtype=torch.float32)
    for _ in range(4):
        again = gradients(lambda a, b: nt_xent(a, b, backend="triton"), z1, z2, dtype=torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of what would be launched on a GPU: Triton kernels, and operators that neither view nor allocate."""

    HOST = ("promote_types", "slice", "view", "split", "detach", "empty", "new_empty", "empty_like", "expand",
            "unsqueeze", "lift_fresh", "unbind")  # fmt: skip

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        for name in [name for name in vars(fused) if name.endswith("_kernel")]:
            monkeypatch.setattr(fused, name, Counted(name, getattr(fused, name), self.names))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.").split(".")[0]
        of_number = name in ("_local_scalar_dense", "reciprocal") and args[0].dtype == torch.float64  # t, on the host
        if not of_number and name not in self.HOST and not name.startswith("prim"):
            self.names.append(name)
        return function(*args, **kwargs or {})


class Counted:
    def __init__(self, name, kernel, names):
        self.name, self.kernel, self.names = name, kernel, names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.names.append(self.name)
            with torch.utils._python_dispatch._disable_current_modes():
                return self.kernel[grid](*args, **kwargs)

        return launch


@interpreted
@pytest.mark.parametrize("name", ["nt_xent", "symmetric towers", "info_nce"])
def test_a_call_is_four_launches_forward_and_four_backward(name, monkeypatch):
    z1, z2 = torch.randn(2, 20, 16)
    ours, one = losses("triton", None)[name][0], torch.tensor(1.0)
    z1.requires_grad_()
    with Launches(monkeypatch) as counted:
        value = ours(z1, z2.requires_grad_(name != "info_nce"), 0.3)
        forward = list(counted.names)
        torch.autograd.grad(value, [z for z in (z1, z2) if z.requires_grad], one)
    assert forward == ["unit_rows_kernel", "walk_kernel", "finish_kernel", "mean"]
    walk = ["walk_kernel"] * (name != "info_nce")  # whose forward pass has summed the gradient as well
    assert counted.names[4:] == ["linalg_vector_norm", "div", *walk, "input_gradient_kernel"]


@interpreted
@pytest.mark.parametrize("target", ["sm_80", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_tables_of_other_cards(name, target, monkeypatch):
    """sm_80 and small load by pointers, not by descriptors; small takes 300 columns in chunks."""
    monkeypatch.setattr(fused, "target_of", lambda device: target)
    torch.manual_seed(0)
    z1, z2, labels = torch.randn(9, 300), torch.randn(9, 300), torch.randint(0, 5, (18,))
    ours, naive = losses("triton", labels)[name]
    assert_close(lambda a, b: ours(a, b, 0.2), lambda a, b: naive(a, b, 0.2), [z1, z2], torch.float32)


@interpreted
def test_float32_in_two_float16_parts_errs_as_float32_does():
    squares = torch.zeros(2)
    for seed in range(4):
        z1, z2 = torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(seed))
        exact = gradients(lambda a, b: naive_nt_xent(a, b, 0.1), z1, z2)
        ours, naive = losses("triton", None)["nt_xent"]
        for index, f in enumerate((ours, naive)):
            found = gradients(lambda a, b, f=f: f(a, b, 0.1), z1, z2, dtype=torch.float32)
            squares[index] += sum(error(a, b) ** 2 for a, b in zip(found[1:], exact[1:], strict=True))
    assert squares[0].sqrt() <= 1.4 * squares[1].sqrt(), squares


@interpreted
@pytest.mark.parametrize("t", [1e-6, 3.0, 1e4, 1e30])
def test_temperatures_of_any_size_in_float32(t):
    z1, z2 = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    assert_close(lambda a, b: nt_xent(a, b, t, backend="triton"), lambda a, b: naive_nt_xent(a, b, t), [z1, z2],
                 temperature=t)  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", NAMES)
def test_a_temperature_on_the_gpu(name, monkeypatch):
    """It is not read back, so the kernels take it by a pointer, and shift."""
    monkeypatch.setattr(blocked, "scaling", lambda scale: (1.0, scale.float() * blocked.LOG2E, True))
    torch.manual_seed(0)
    z1, z2, labels = torch.randn(20, 24), torch.randn(20, 24), torch.randint(0, 9, (40,))
    ours, naive = losses("triton", labels)[name]
    assert_close(ours, naive, [z1, z2, torch.tensor(0.3)], temperature=0.3)


@interpreted
@pytest.mark.parametrize("loss", ["out", "in"])
@pytest.mark.parametrize("dtype, length", [(torch.float16, 1.0), (torch.bfloat16, 1e5)])
def test_sup_con_in_half_precision(dtype, length, loss):
    torch.manual_seed(0)
    z, labels = (torch.randn(40, 16) * length).to(dtype).float(), torch.randint(0, 5, (40,))
    z[3] = 0
    ours = sup_con(z.to(dtype).requires_grad_(), labels, 0.2, loss=loss, backend="triton")
    exact = naive_sup_con(z.double(), labels, 0.2, loss)
    assert ours.dtype == torch.float32 and error(ours, exact) < 1e-3 * exact


@interpreted
def test_float32_at_high_precision_is_one_float16(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    z1, z2 = torch.randn(2, 30, 24)
    exact = gradients(lambda a, b: naive_nt_xent(a, b, 0.5), z1, z2)
    ours = gradients(lambda a, b: nt_xent(a, b, backend="triton"), z1, z2, dtype=torch.float32)
    assert fused.stored(60, 24, torch.float32) == ((60, 32), torch.float16)
    for a, b in zip(ours, exact, strict=True):
        assert 1e-6 * b.norm() < error(a, b) < 2 * torch.finfo(torch.float16).eps * b.norm()
