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
    naive_sup_con,
)

pytest.importorskip("triton", reason="triton is not installed")
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


@interpreted
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("m, d, t", SHAPES)
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
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about inf - inf
@pytest.mark.parametrize("check", [check_rows_of_any_length, check_what_is_not_finite])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_length(name, check):
    check(name, "triton")


@interpreted
@pytest.mark.parametrize("m, k", [(1, 130), (129, 3), (5, 1025)])
def test_rectangular_shapes_and_split_columns(m, k):
    torch.manual_seed(0)
    q, keys, weight = torch.randn(m, 24), torch.randn(k, 24), torch.rand(m)
    for kept in (lambda x: x, lambda x: x.detach()):  # with and without a gradient to the keys
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
@pytest.mark.parametrize("t", [0.05, 0.5])
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
def test_tiny_upstream_gradients_survive_float16():
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


@interpreted
def test_operators_pass_opcheck_and_compile():
    operators, z, scale = torch.ops.contrastive, torch.randn(6, 4), torch.tensor(5.0)
    m, total, _ = operators.forward(z, None, scale, 0, None, None, False, "triton")
    cases = [
        (operators.unit_rows, (z, torch.float32, "triton")),
        (operators.unit_rows_backward, (z, z, total, torch.float32, "triton")),
        (operators.forward, (z, z, scale, -1, None, None, True, "triton")),
        (operators.backward, (z, None, scale, 0, None, None, m, 1 / total, m, 1 / total, "triton")),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator.default, arguments)
    compiled = torch.compile(lambda a, b: nt_xent(a, b, backend="triton"), fullgraph=True, backend="aot_eager")
    ours = gradients(compiled, z, z.flip(0), dtype=torch.float32)
    plain = gradients(lambda a, b: nt_xent(a, b, backend="triton"), z, z.flip(0), dtype=torch.float32)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
