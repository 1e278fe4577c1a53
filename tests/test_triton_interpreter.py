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
    check_what_is_not_finite,
    error,
    gradients,
    losses,
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
    assert torch.equal(*ours) and torch.allclose(ours[0], sup_con(z, pairs[:, 0], 0.2, loss="in", backend="naive"))


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
            lambda q, keys, f=kept: cosine_logsumexp(q, f(keys), temperature=0.1, backend="naive"),
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
@pytest.mark.parametrize("kind", ["random", "identical", "clustered", "zero row"])
@pytest.mark.parametrize("t", [0.05, pytest.param(0.5, marks=pytest.mark.slowest)])
def test_float16_errs_at_most_twice_what_the_naive_loss_errs(kind, t):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 70, 64).half().float()
    if kind == "identical":
        z2 = z1
    elif kind == "clustered":
        z1, z2 = (z1[:3].repeat(24, 1)[:70] + 0.05 * z.half() for z in (z1, z2))
        z1, z2 = z1.half().float(), z2.half().float()
    elif kind == "zero row":
        z1[0] = 0

    def autocast(a, b):  # what float16 autocast does to the naive loss: products in float16, softmax in float32
        z = torch.nn.functional.normalize(torch.cat([a, b]).float(), dim=1).half()
        s = ((z @ z.T) / t).float().masked_fill(torch.eye(140, dtype=torch.bool), -torch.inf)
        return torch.nn.functional.cross_entropy(s, (torch.arange(140) + 70) % 140)

    exact = gradients(lambda a, b: nt_xent(a, b, t, backend="naive"), z1, z2)
    ours = gradients(lambda a, b: nt_xent(a, b, t, backend="triton"), z1, z2, dtype=torch.float16)
    theirs = gradients(autocast, z1, z2, dtype=torch.float16)
    allowed = max(1e-5 * exact[0], 4 * torch.finfo(torch.float32).eps / t)  # what float32 is allowed
    assert error(ours[0], exact[0]) <= max(2 * error(theirs[0], exact[0]), allowed)
    for z, a, b, reference in zip((z1, z2), ours[1:], theirs[1:], exact[1:], strict=True):
        kept = z.norm(dim=1) > 0  # the gradient of a zero row, 1e12 dz, is beyond float16
        assert kept.all() or not torch.isfinite(a[~kept]).all()
        assert error(a[kept], reference[kept]) <= 2 * error(b[kept], reference[kept])


@interpreted
def test_bfloat16_rows_are_kept_in_float16():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 40, 32).bfloat16().float()
    exact = gradients(lambda a, b: nt_xent(a, b, backend="naive"), z1, z2)
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

    HOST = (
        "promote_types",
        "slice",
        "view",
        "split",
        "detach",
        "empty",
        "new_empty",
        "empty_like",
        "expand",
        "unsqueeze",
        "lift_fresh",
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        for name in [name for name in vars(fused) if name.endswith("_kernel")]:
            monkeypatch.setattr(fused, name, Counted(name, getattr(fused, name), self.names))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.").split(".")[0]
        of_number = name == "_local_scalar_dense" and args[0].dtype == torch.float64  # the temperature, on the host
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
@pytest.mark.parametrize("name, backward", [("nt_xent", 3), ("info_nce", 2)])
def test_a_call_is_four_launches_forward_and_three_backward(name, backward, monkeypatch):
    z1, z2 = torch.randn(2, 20, 16)
    ours, one = losses("triton", None)[name][0], torch.tensor(1.0)
    z1.requires_grad_()
    with Launches(monkeypatch) as counted:
        value = ours(z1, z2.requires_grad_(name == "nt_xent"), 0.3)
        forward = list(counted.names)
        torch.autograd.grad(value, [z for z in (z1, z2) if z.requires_grad], one)
    assert forward == ["unit_rows_kernel", "walk_kernel", "finish_kernel", "mean"]
    assert counted.names[4:] == ["div", "walk_kernel", "input_gradient_kernel"][:: 1 if backward == 3 else 2]


@interpreted
@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_100", marks=pytest.mark.slowest), "small"])
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
        exact = gradients(lambda a, b: nt_xent(a, b, 0.1, backend="naive"), z1, z2)
        for index, backend in enumerate(("triton", "naive")):
            found = gradients(lambda a, b, k=backend: nt_xent(a, b, 0.1, backend=k), z1, z2, dtype=torch.float32)
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
    exact = gradients(lambda a, b: nt_xent(a, b, backend="naive"), z1, z2)
    ours = gradients(lambda a, b: nt_xent(a, b, backend="triton"), z1, z2, dtype=torch.float32)
    assert fused.stored(60, 24, torch.float32) == ((60, 32), torch.float16)
    for a, b in zip(ours, exact, strict=True):
        assert 1e-6 * b.norm() < error(a, b) < 2 * torch.finfo(torch.float16).eps * b.norm()


@interpreted
def test_operators_pass_opcheck_and_compile():
    operators, z, scale = torch.ops.kernels, torch.randn(6, 4), torch.tensor(5.0)
    rows, inverse = operators.unit_rows(z[:3], z[3:], None, scale, torch.float32, "triton")
    _, w, m, a, _, none = operators.forward(rows, None, rows, 2, scale, 0, None, None, False, 0, "triton")
    end = (none, rows, 2, w, scale, inverse, 4, torch.float32, "triton")
    cases = [
        (operators.unit_rows, (z[:3], z[3:], z[:2], scale, torch.float32, "triton")),
        (operators.forward, (rows[:3], rows, rows, 1, scale, -1, None, None, True, 0, "triton")),
        (operators.backward, (rows, None, scale, 0, None, None, m, a, m, a, None, *end)),
        (operators.backward, (rows, None, scale, -1, None, None, m, a, None, None, rows[None], *end)),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator.default, arguments)
    compiled = torch.compile(lambda a, b: nt_xent(a, b, backend="triton"), fullgraph=True, backend="aot_eager")
    ours = gradients(compiled, z, z.flip(0), dtype=torch.float32)
    plain = gradients(lambda a, b: nt_xent(a, b, backend="triton"), z, z.flip(0), dtype=torch.float32)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
