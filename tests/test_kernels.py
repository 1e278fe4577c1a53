"""The fused losses on a CPU, against the losses written out in float64 as in the papers."""

import concurrent.futures
import shutil

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu import pairs
from kernels import blocked, cosine_logsumexp, info_nce, nt_xent, resolve_backend, sup_con
from tests.helpers import ROOT, python

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# The losses as the papers write them, with the whole matrix.


def naive_nt_xent(z1, z2, t):
    n, z = len(z1), F.normalize(torch.cat([z1, z2]), dim=1)
    s = (z @ z.T / t).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)  # (2N, 2N)
    return F.cross_entropy(s, (torch.arange(2 * n) + n) % (2 * n))


def naive_info_nce(q, k, queue, t):
    q, k, queue = F.normalize(q, dim=1), F.normalize(k.detach(), dim=1), F.normalize(queue.detach(), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / t  # (N, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def naive_towers(q, k, t, symmetric=False):
    s, target = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / t, torch.arange(len(q))
    return (F.cross_entropy(s, target) + F.cross_entropy(s.T if symmetric else s, target)) / 2


def naive_sup_con(z, labels, t, loss="out"):
    s = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / t
    itself = torch.eye(len(z), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~itself
    kept = positive.any(1)  # the other anchors add 0
    lse = s.masked_fill(itself, -torch.inf)[kept].logsumexp(1)
    s, positive = s[kept], positive[kept]
    if loss == "out":
        each = lse - s.masked_fill(~positive, 0).sum(1) / positive.sum(1)
    else:
        each = lse - s.masked_fill(~positive, -torch.inf).logsumexp(1) + positive.sum(1).to(s).log()
    return each.sum() / len(z)


def naive_logsumexp(queries, keys, t):
    s = F.normalize(queries, dim=1) @ F.normalize(queries if keys is None else keys, dim=1).T / t
    if keys is None:
        s = s.masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf)
    return s.logsumexp(1)


def gradients(function, *inputs, dtype=torch.float64, weight=None):
    """Return the value and the gradients of function at the inputs in dtype; 0 for an input it does not depend on."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    value = function(*inputs)
    total = value.sum() if weight is None else (value * weight.to(value)).sum()
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True))]


def error(value, reference):
    return (value.double() - reference).norm().item()


def assert_close(function, naive, inputs, dtype=torch.float32, bound=1e-5, temperature=1.0, weight=None, ulps=4):
    """Value and gradients err at most `bound` relatively where the naive loss does, else twice what that errs.

    How the naive loss rounds is a matter of luck: it is drawn twice, with the columns reversed the second time. Where
    the result vanishes (identical or opposite rows, one pair), it is what rounding leaves of terms of the size
    1 / temperature (or 1, of a logarithm), and the naive loss may leave exactly nothing: `ulps` units in the last place
    of those are allowed. In a gradient it is 1 / temperature units if that is more, which exceeds `bound` below a
    temperature of 0.012: the backward pass takes the cosines again, whether they round as in the forward pass depends
    on the CPU, and exp(cos / temperature) multiplies the difference. (The naive loss keeps its softmax.)
    """
    exact = gradients(naive, *inputs, weight=weight)
    ours = gradients(function, *inputs, dtype=dtype, weight=weight)
    theirs = gradients(naive, *inputs, dtype=dtype, weight=weight)
    flipped = gradients(naive, *(x.flip(-1) if x.ndim else x for x in inputs), dtype=dtype, weight=weight)
    share = 1 if ours[0].ndim else 1 / len(inputs[0])  # of a row in the sum that is differentiated
    for index, (a, b, c, reference) in enumerate(zip(ours, theirs, flipped, exact, strict=True)):
        assert torch.isfinite(a).all() or not torch.isfinite(reference).all()
        terms = len(inputs[0]) ** 0.5 * share / temperature
        if index and a.ndim:  # times the length of its row: rows of different lengths have gradients of different sizes
            lengths = inputs[index - 1].double().norm(dim=1, keepdim=True).clamp_min(1e-12)
            a, b, c, reference = (x.double() * lengths for x in (a, b, c.flip(-1), reference))
        elif not a.ndim:
            terms = max(1.0, 1 / temperature) if index == 0 else max(1.0, 1 / temperature**2)
        limit, usual = bound * reference.norm().item(), max(error(b, reference), error(c, reference))
        units = max(ulps, 1 / temperature) if index else ulps
        limit = max(limit if usual <= limit else 2 * usual, units * torch.finfo(dtype).eps * terms)
        assert error(a, reference) <= limit, (index, error(a, reference), limit, usual, reference.norm())


def losses(backend, labels, k=None, queue=None):
    """Return name -> (ours, naive, number of matrices it takes) of two arguments z1, z2 of one shape and t."""
    return {
        "nt_xent": (lambda a, b, t: nt_xent(a, b, t, backend=backend), naive_nt_xent),
        "info_nce": (lambda a, b, t: info_nce(a, b, b, t, backend=backend), lambda a, b, t: naive_info_nce(a, b, b, t)),
        "sup_con out": (
            lambda a, b, t: sup_con(torch.cat([a, b]), labels, t, backend=backend),
            lambda a, b, t: naive_sup_con(torch.cat([a, b]), labels, t),
        ),
        "sup_con in": (
            lambda a, b, t: sup_con(torch.cat([a, b]), labels, t, loss="in", backend=backend),
            lambda a, b, t: naive_sup_con(torch.cat([a, b]), labels, t, "in"),
        ),
        "towers": (lambda a, b, t: info_nce(a, b, temperature=t, backend=backend), naive_towers),
        "symmetric towers": (
            lambda a, b, t: info_nce(a, b, temperature=t, symmetric=True, backend=backend),
            lambda a, b, t: naive_towers(a, b, t, symmetric=True),
        ),
        "rectangular": (lambda a, b, t: cosine_logsumexp(a, b, temperature=t, backend=backend), naive_logsumexp),
    }


NAMES = list(losses("auto", None))


def check_rows_of_training(name, kind, t, backend, dtype):
    """Rows such as training makes them: value and gradients err at most twice as much as the naive loss in `dtype`
    (under autocast, if that is half precision), or as rounding the exact result does.

    In float32 sup_con "in" may err by rounding its two log-sum-exps, whose gradients cancel where all rows are near.
    """
    z1, z2 = (x.to(dtype).float() for x in pairs(kind, 96, 64, "cpu"))
    ours, naive = losses(backend, torch.arange(96).remainder(12).repeat(2))[name]

    def low(a, b):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return naive(a.float(), b.float(), t)

    scale = torch.tensor(2.0**6 if name == "rectangular" else 2.0**12)  # as a loss scaler's, so that float16 holds it
    value, *exact = gradients(lambda a, b: naive(a, b, t), z1, z2, weight=scale)
    found = gradients(lambda a, b: ours(a, b, t), z1, z2, dtype=dtype, weight=scale)
    theirs = gradients(low, z1, z2, dtype=dtype, weight=scale)
    again = gradients(lambda a, b: low(a.flip(1), b.flip(1)), z1, z2, dtype=dtype, weight=scale)  # luck, so 2.2
    unit = torch.finfo(dtype).eps * len(value) ** 0.5 if value.ndim else 4 * torch.finfo(torch.float32).eps
    assert error(found[0], value) <= max(2 * error(theirs[0], value), unit / t)
    for a, b, c, reference in zip(found[1:], theirs[1:], again[1:], exact, strict=True):
        floor = torch.finfo(dtype).eps * reference.norm()
        if name == "sup_con in" and dtype == torch.float32:
            floor = scale * torch.finfo(dtype).eps / t / z1.norm(dim=1).mean()
        assert error(a, reference) <= max(2.2 * error(b, reference), 2.2 * error(c, reference), floor)


TRAINED = [("random", 0.1), ("cosine 0.9", 0.05), ("cosine 0.99", 0.1), ("clustered", 0.1), ("collapsed", 0.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind, t", TRAINED)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_training(name, kind, t, dtype):
    check_rows_of_training(name, kind, t, "blocked", dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m, d, t", [(1, 1, 0.5), (3, 5, 0.1), (129, 96, 0.07), (300, 128, 0.5), (65, 700, 0.01)])
def test_equals_the_paper_in_float64(name, m, d, t):
    torch.manual_seed(m)
    z1, z2, labels = torch.randn(m, d), torch.randn(m, d), torch.randint(0, m, (2 * m,))
    ours, naive = losses("blocked", labels)[name]
    assert_close(ours, naive, [z1, z2, torch.tensor(t)], torch.float64, bound=1e-10, temperature=t)


@pytest.mark.parametrize("m, k", [(1, 1), (1, 600), (257, 3), (600, 1500), (3, 2049)])
@pytest.mark.parametrize("t", [0.002, 0.2])
def test_rectangular_shapes_and_uneven_gradients(m, k, t):
    torch.manual_seed(0)
    q, keys, weight = torch.randn(m, 40), torch.randn(k, 40), torch.rand(m)
    for kept in (lambda x: x, lambda x: x.detach()):  # with and without a gradient to the keys
        assert_close(
            lambda q, keys, f=kept: cosine_logsumexp(q, f(keys), temperature=t, backend="blocked"),
            lambda q, keys, f=kept: naive_logsumexp(q, f(keys), t),
            [q, keys],
            temperature=t,
            weight=weight,
        )


@pytest.mark.parametrize("m", [1, 2, 513, 2700])
@pytest.mark.parametrize("t", [0.002, 0.2])
def test_self_similarity_with_uneven_gradients(m, t):
    torch.manual_seed(0)
    z, weight = torch.randn(m, 40), torch.rand(m)
    value = cosine_logsumexp(z, temperature=t, backend="blocked")
    if m == 1:
        assert value.item() == -torch.inf  # the sum over no column
        return
    assert_close(
        lambda z: cosine_logsumexp(z, temperature=t, backend="blocked"),
        lambda z: naive_logsumexp(z, None, t),
        [z],
        temperature=t,
        weight=weight,
    )


def test_rounds_as_the_naive_loss_does_on_average():
    """Only if s_ij and s_ji round alike (else it errs 1.7 times as much): `assert_close` cannot tell."""
    squares = torch.zeros(2)
    for seed in range(20):
        z1, z2 = torch.randn(2, 129, 70, generator=torch.Generator().manual_seed(seed))
        exact = gradients(lambda a, b: naive_nt_xent(a, b, 0.005), z1, z2)
        ours = gradients(lambda a, b: nt_xent(a, b, 0.005, backend="blocked"), z1, z2, dtype=torch.float32)
        theirs = gradients(lambda a, b: naive_nt_xent(a, b, 0.005), z1, z2, dtype=torch.float32)
        for i in (1, 2):
            squares += torch.tensor([error(ours[i], exact[i]) ** 2, error(theirs[i], exact[i]) ** 2])
    assert squares[0].sqrt() <= 1.4 * squares[1].sqrt(), squares


def test_closed_forms(backend="blocked"):
    z = torch.randn(1, 16).expand(12, 16)
    value = nt_xent(z[:6], z[:6] * 3, 0.1, backend=backend)
    torch.testing.assert_close(value, torch.tensor(11.0).log())  # identical rows: log(2N - 1)
    assert nt_xent(z[:1], -z[:1], 0.1, backend=backend).abs() < 1e-5  # one pair has no negatives
    value = info_nce(z, z, z[:7], 0.1, backend=backend)
    torch.testing.assert_close(value, torch.tensor(8.0).log())
    labels = torch.arange(6).repeat(2)  # unique labels, two views each: SupCon is NT-Xent
    z1, z2 = torch.randn(2, 6, 16)
    for loss in ("out", "in"):
        value = sup_con(torch.cat([z1, z2]), labels, 0.3, loss=loss, backend=backend)
        torch.testing.assert_close(value, nt_xent(z1, z2, 0.3, backend=backend))


@pytest.mark.parametrize("loss", ["out", "in"])
def test_anchors_without_positives_add_nothing(loss, backend="blocked"):
    z = torch.randn(5, 8, requires_grad=True)
    value = sup_con(z, torch.arange(5), loss=loss, backend=backend)
    value.backward()
    assert value == 0 and torch.equal(z.grad, torch.zeros_like(z))
    z = torch.randn(5, 8, requires_grad=True)
    sup_con(z, torch.tensor([7, -3, 7, 10**12, 9]), loss=loss, backend=backend).backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("loss", ["out", "in"])
def test_a_label_of_minus_one_is_none(loss, backend="blocked"):
    """Its row is a negative of the others, as if alone in a class; another negative number is a class."""
    torch.manual_seed(0)
    z, labels = torch.randn(60, 8), torch.randint(-2, 3, (60,))
    alone = torch.where(labels == -1, 9 + torch.arange(60), labels)
    ours = lambda z, t: sup_con(z, labels, t, loss=loss, backend=backend)  # noqa: E731
    assert_close(ours, lambda z, t: naive_sup_con(z, alone, t, loss), [z, torch.tensor(0.2)], torch.float64, 1e-10)
    z.requires_grad_()
    value = sup_con(z, torch.full((60,), -1, dtype=torch.int16), loss=loss, backend=backend)
    value.backward()
    assert value == 0 and torch.equal(z.grad, torch.zeros_like(z))


def check_rows_of_any_length(name, backend):
    """Against rows of at most length 1, which have the same cosines, in float64."""
    torch.manual_seed(0)
    ours, naive = losses(backend, torch.randint(0, 5, (24,)))[name]
    for dtype, longest in ((torch.float32, 38.5), (torch.float64, 308)):
        lengths = torch.logspace(-30, longest, 12, dtype=torch.float64)[:, None]
        short = lengths.clamp(max=1)
        z1, z2 = ((F.normalize(torch.randn(12, 20), dim=1).double() * lengths).to(dtype) for _ in range(2))
        value, *found = gradients(lambda a, b: ours(a, b, 0.2), z1, z2, dtype=dtype)
        exact, *reference = gradients(lambda a, b: naive(a, b, 0.2), *(z.double() / lengths * short for z in (z1, z2)))
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
        for a, b in zip(found, reference, strict=True):  # shorter than 1e-12, a row is divided by 1e-12
            a, b = a.double() * lengths.clamp(min=1e-12), b * short.clamp(min=1e-12)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_length(name, backend="blocked"):
    check_rows_of_any_length(name, backend)


def check_what_is_not_finite(name, backend):
    torch.manual_seed(0)
    ours, _ = losses(backend, torch.randint(0, 5, (24,)))[name]
    for dtype in (torch.float32, torch.float16):
        for row in ([torch.inf], [-torch.inf], [torch.nan], [torch.inf] * 8, [torch.nan] * 8, [torch.inf, -torch.inf]):
            z1, z2 = torch.randn(2, 12, 8)
            z1[3, : len(row)] = torch.tensor(row)
            value, gradient, _ = gradients(lambda a, b: ours(a, b, 0.2), z1, z2, dtype=dtype)
            assert not torch.isfinite(value).all() and not torch.isfinite(gradient[3]).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_gives_nothing_finite(name, backend="blocked"):
    check_what_is_not_finite(name, backend)


@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3, requires_grad=True)])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, t):
    torch.manual_seed(0)
    z1, z2 = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, _ = losses("blocked", torch.tensor([0, 1, 2, 0, 0, 1, 3, 4, 1, 5]))[name]
    if isinstance(t, torch.Tensor):
        t = t.detach().double().requires_grad_()
    if name == "info_nce":
        z2 = z2.detach()
    assert torch.autograd.gradcheck(lambda a, b, t: ours(a, b, t), (z1, z2, t))


@pytest.mark.parametrize("name", NAMES)
def test_repeats_to_the_bit(name):
    torch.manual_seed(0)
    z1, z2, labels = torch.randn(400, 64), torch.randn(400, 64), torch.randint(0, 20, (800,))
    ours, _ = losses("blocked", labels)[name]
    first = gradients(ours, z1, z2, torch.tensor(0.1), dtype=torch.float32)
    for _ in range(49):
        again = gradients(ours, z1, z2, torch.tensor(0.1), dtype=torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strided_inputs_and_partial_requires_grad():
    torch.manual_seed(0)
    z1, z2 = torch.randn(96, 130).T, torch.randn(130, 192)[:, ::2]
    plain = nt_xent(z1.contiguous(), z2.contiguous(), backend="blocked")
    torch.testing.assert_close(nt_xent(z1, z2, backend="blocked"), plain)
    for needs in ((True, False), (False, True)):
        inputs = [z.clone().requires_grad_(n) for z, n in zip((z1, z2), needs, strict=True)]
        nt_xent(*inputs, backend="blocked").backward()
        both = gradients(lambda a, b: nt_xent(a, b, backend="blocked"), z1, z2, dtype=torch.float32)
        for z, gradient in zip(inputs, both[1:], strict=True):
            if z.grad is not None:
                torch.testing.assert_close(z.grad, gradient)


def test_neither_key_nor_queue_receives_a_gradient():
    q, k, queue = (torch.randn(6, 8, requires_grad=True) for _ in range(3))
    info_nce(q, k, queue, backend="blocked").backward()
    assert q.grad is not None and k.grad is None and queue.grad is None


def test_arguments_of_different_dtypes(backend="blocked"):
    torch.manual_seed(0)
    a, b, queue = torch.randn(3, 20, 8).half()
    exact = nt_xent(a.double(), b.double(), backend=backend), info_nce(a.double(), b.double(), queue.double())
    for x, y in ((torch.float32, torch.float16), (torch.float16, torch.float64), (torch.bfloat16, torch.float32)):
        assert nt_xent(a.to(x), b.to(y), backend=backend).dtype == (
            torch.float64 if torch.float64 in (x, y) else torch.float32
        )
        for value, reference in (
            (nt_xent(a.to(x), b.to(y), backend=backend), exact[0]),
            (nt_xent(a.to(y), b.to(x), backend=backend), exact[0]),
            (info_nce(a.to(x).requires_grad_(), b.to(y), queue.to(y), backend=backend), exact[1]),
        ):
            torch.testing.assert_close(value.double(), reference, rtol=1e-2 if x == torch.bfloat16 else 1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs(name, dtype):
    torch.manual_seed(0)
    z1, z2, labels = torch.randn(60, 64), torch.randn(60, 64), torch.randint(0, 20, (120,))
    z1, z2 = z1.to(dtype).float(), z2.to(dtype).float()
    ours, naive = losses("blocked", labels)[name]
    value, *found = gradients(lambda a, b: ours(a, b, 0.2), z1, z2, dtype=dtype)
    exact, *reference = gradients(lambda a, b: naive(a, b, 0.2), z1, z2)
    assert value.dtype == torch.float32 and error(value, exact) < 1e-5  # only the gradient has the input's type
    for a, b in zip(found, reference, strict=True):
        assert a.dtype == dtype and error(a, b) <= torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    torch.manual_seed(0)
    z1, z2, labels = torch.randn(300, 64), torch.randn(300, 64), torch.randint(0, 20, (600,))
    ours, _ = losses("blocked", labels)[name]

    plain = gradients(lambda a, b: ours(a, b, 0.2), z1, z2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):  # the backward pass as well
        cast = gradients(lambda a, b: ours(a, b, 0.2), z1, z2, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_leaves_it_as_it_is(name):
    torch.manual_seed(0)
    z1, z2, labels = torch.randn(40, 16), torch.randn(40, 16), torch.randint(0, 20, (80,))
    ours, _ = losses("blocked", labels)[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: ours(a * 2, b * 2, 0.2), backend="aot_eager")
    plain = gradients(lambda a, b: ours(a * 2, b * 2, 0.2), z1, z2, dtype=torch.float32)
    for a, b in zip(gradients(compiled, z1, z2, dtype=torch.float32), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing():
    z1, z2 = torch.randn(30, 8), torch.randn(30, 8)
    plain = gradients(lambda a, b: nt_xent(a, b, backend="blocked"), z1, z2)
    again = gradients(
        lambda a, b: torch.utils.checkpoint.checkpoint(nt_xent, a, b, backend="blocked", use_reentrant=False), z1, z2
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_differentiating_twice_raises():
    z = torch.randn(6, 4, requires_grad=True)
    value = cosine_logsumexp(z, temperature=0.5, backend="blocked").sum()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(value, z, create_graph=True)


def test_bad_input_is_named():
    z = torch.randn(6, 4)
    cases = [
        (lambda: nt_xent(z, z[:5]), r"z1 and z2 .* one shape .*\(6, 4\).*\(5, 4\)"),
        (lambda: nt_xent(z[0], z[0]), r"z1 .*\(4,\)"),
        (lambda: nt_xent(z[:0], z[:0]), r"z1 .*\(0, 4\)"),
        (lambda: nt_xent(z[:, :0], z[:, :0]), r"z1 .*\(6, 0\)"),
        (lambda: nt_xent(z.long(), z.long()), "z1 .*int64"),
        (lambda: nt_xent(z, z.to(torch.float8_e4m3fn)), "z2 .*float8"),
        (lambda: nt_xent(z.numpy(), z.numpy()), "z1 .*ndarray"),
        (lambda: nt_xent(z, z.to("meta")), "cpu.*meta"),
        (lambda: nt_xent(z, z, 0.0), "temperature"),
        (lambda: nt_xent(z, z, float("nan")), "temperature"),
        (lambda: nt_xent(z, z, torch.tensor(-0.5)), "temperature"),
        (lambda: nt_xent(z, z, torch.ones(2)), r"temperature.*\(2,\)"),
        (lambda: nt_xent(z, z, torch.tensor(1)), r"temperature.*int64"),
        (lambda: nt_xent(z, z, "0.1"), "temperature.*str"),
        (lambda: nt_xent(z, z, backend="cuda"), "backend must be"),
        (lambda: info_nce(z, z, torch.randn(7, 3)), r"\(6, 4\).*\(7, 3\)"),
        (lambda: info_nce(z, z[:5], z), r"q and k .*\(6, 4\).*\(5, 4\)"),
        (lambda: info_nce(z, z, 0.2), "queue .*float"),
        (lambda: info_nce(z, z, z, symmetric=True), "neither symmetric nor group"),
        (lambda: info_nce(z, z, z.to("meta")), "q and queue .*cpu.*meta"),
        (lambda: sup_con(z, torch.arange(6).numpy()), "labels .*ndarray"),
        (lambda: sup_con(z, torch.arange(6)[:, None]), r"labels .*\(6, 1\)"),
        (lambda: sup_con(z, torch.arange(6, device="meta")), "labels .*meta.*cpu"),
        (lambda: sup_con(z, torch.arange(5)), r"labels .*\(5,\).*\(6, 4\)"),
        (lambda: sup_con(z, torch.rand(6)), "float32"),
        (lambda: sup_con(z, torch.arange(6), loss="both"), "loss must be"),
        (lambda: cosine_logsumexp(z, z[:, :3], temperature=1.0), r"\(6, 4\).*\(6, 3\)"),
        (lambda: cosine_logsumexp(z.tolist(), temperature=1.0), "queries .*list"),
        (lambda: cosine_logsumexp(z, z[0], temperature=1.0), r"keys .*\(4,\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="on a GPU"):
            nt_xent(z, z, backend="triton")


def test_auto_takes_triton_on_a_gpu():
    assert resolve_backend("auto", "cpu", torch.float32) == resolve_backend("auto", "cuda", torch.float64) == "blocked"
    assert resolve_backend("auto", "cuda", torch.float32) == "triton"


def test_folder_works_alone_and_does_not_load_the_triton_kernels(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    code = (
        "import sys, torch; from kernels import nt_xent; z = torch.randn(600, 8, requires_grad=True);"
        "nt_xent(z, z.flip(0)).backward(); assert 'kernels.fused' not in sys.modules"
    )
    done = python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_memory_grows_linearly():
    code = (
        "import resource, sys, torch; from kernels import nt_xent; torch.set_num_threads(1);"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "z = torch.randn(2 * 256, 64, requires_grad=True); nt_xent(*z.chunk(2), backend='blocked').backward();"
        "z = torch.randn(16384, 64, requires_grad=True); before = peak();"
        "nt_xent(*z.chunk(2), backend='blocked').backward(); print(peak() - before)"
    )
    assert int(python("-c", code).stdout) < 100 * 1024  # KB; the matrix alone would take 1024 MB


@pytest.mark.parametrize("name", [name for name in NAMES if name != "info_nce"])  # whose columns are constants
def test_kept_tiles_change_nothing(name, monkeypatch):
    """All of E, some tiles of it, or none; a second backward pass finds them as they were."""
    torch.manual_seed(0)
    z1, z2, labels = torch.randn(700, 16), torch.randn(700, 16), torch.randint(0, 30, (1400,))
    ours, _ = losses("blocked", labels)[name]
    found = []
    for kept in (32 * 2**20, 3 * 2**20, 0):
        monkeypatch.setattr(blocked, "KEEP", kept)
        a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
        value = ours(a, b, 0.2).sum()
        for _ in range(2):
            gradient = torch.autograd.grad(value, a, retain_graph=True)[0]
            found.append((value.detach(), gradient))
    assert all(torch.equal(x, y) for one in found[1:] for x, y in zip(one, found[0], strict=True))


def saved_bytes(function):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel() * x.itemsize) or x, lambda x: x):
        function()
    return max(sizes, default=0)


def test_what_is_kept_stays_in_its_budget(monkeypatch):
    z = torch.randn(1500, 8, requires_grad=True)
    call = lambda z: nt_xent(*z.chunk(2), backend="blocked")  # noqa: E731
    e = 1500 * 1501 // 2 * 4
    assert e < saved_bytes(lambda: call(z)) < 1.4 * e
    with torch.no_grad(), monkeypatch.context() as patch:
        rooms, forward = [], blocked.forward
        patch.setattr(blocked, "forward", lambda *given: rooms.append(given[-1]) or forward(*given))
        call(z)
        assert rooms == [0]
    assert saved_bytes(lambda: call(z.detach())) == 0
    assert saved_bytes(lambda: nt_xent(*z.chunk(2), 0.005, backend="blocked")) <= z.numel() * 4  # E is of no use
    monkeypatch.setattr(blocked, "KEEP", 3 * 2**20)
    assert 2**20 < saved_bytes(lambda: call(z)) <= 3 * 2**20
    monkeypatch.setattr(blocked, "KEEP", 0)
    assert saved_bytes(lambda: call(z)) <= z.numel() * 4


def test_threads_and_inference_mode_do_not_disturb_each_other():
    """A tile's memory is used again by the next call of a thread."""
    z1, z2 = torch.randn(2, 900, 32)

    def then_without():
        with torch.inference_mode():
            value = nt_xent(z1, z2, backend="blocked")
        return value, nt_xent(z1, z2, backend="blocked")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a thread without memory of earlier calls
        value, again = pool.submit(then_without).result()
    assert torch.equal(value, again)
    run = lambda _: gradients(lambda a, b: nt_xent(a, b, backend="blocked"), z1, z2, dtype=torch.float32)  # noqa: E731
    first = run(0)
    assert torch.equal(first[0], value)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for again in pool.map(run, range(16)):
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "m, d, t", [(1, 1, 0.5), (129, 96, 0.07), (1000, 128, 0.001), (300, 512, 0.1), (300, 700, 0.1)]
)
@pytest.mark.parametrize("name", NAMES)
def test_triton_on_a_gpu(name, m, d, t, dtype):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, m, d).to(dtype).float()
    labels = torch.randint(0, m, (2 * m,))
    ours, _ = losses("triton", labels.cuda())[name]
    _, naive = losses("triton", labels)[name]
    found = gradients(lambda a, b: ours(a, b, t), z1.cuda(), z2.cuda(), dtype=dtype)
    for _ in range(49):  # bitwise repeatable
        again = gradients(lambda a, b: ours(a, b, t), z1.cuda(), z2.cuda(), dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    bound = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(torch.float16).eps
    exact = gradients(lambda a, b: naive(a, b, t), z1, z2)
    limit = max(bound, 16 * torch.finfo(torch.float16 if dtype != torch.float32 else dtype).eps / t)
    for a, b in zip(found, exact, strict=True):
        extra = torch.finfo(dtype).eps if dtype != torch.float32 else 0
        assert error(a.cpu(), b) <= (limit + extra) * max(b.norm().item(), 1e-3 / t)


@gpu
@needs_gpu
def test_triton_memory_and_streams_on_a_gpu():
    z = torch.randn(65536, 128, device="cuda", dtype=torch.float16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nt_xent(*z.chunk(2), 0.1).backward()
    assert torch.cuda.max_memory_allocated() - before < 400e6  # the matrix alone would take 8.6 GB


@gpu
@needs_gpu
def test_a_temperature_on_the_gpu():
    z1, z2, t = torch.randn(300, 64), torch.randn(300, 64), torch.tensor(0.2)
    exact = gradients(naive_nt_xent, z1, z2, t)
    found = gradients(
        lambda *given: nt_xent(*given, backend="triton"), z1.cuda(), z2.cuda(), t.cuda(), dtype=torch.float32
    )
    for a, b in zip(found, exact, strict=True):
        assert error(a.cpu(), b) <= 1e-5 * b.norm()


@gpu
@needs_gpu
def test_triton_in_a_cuda_graph():
    z1, z2 = (torch.randn(256, 64, device="cuda", requires_grad=True) for _ in range(2))
    step = lambda: (value := nt_xent(z1, z2, 0.1), *torch.autograd.grad(value, (z1, z2)))  # noqa: E731
    with torch.cuda.stream(torch.cuda.Stream()):
        step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        z1.copy_(torch.randn_like(z1))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


def test_a_tiny_upstream_gradient_is_not_lost():
    """Just above t = 1/64 a row's total reaches e^64 M: g / total must not fall into the subnormals."""
    torch.manual_seed(0)
    z = torch.randn(1, 64) + 0.01 * torch.randn(1200, 64)
    gradients = []
    for upstream in (1.0, 1e-12):
        x = z.clone().requires_grad_()
        (cosine_logsumexp(x, temperature=0.0157, backend="blocked").mean() * upstream).backward()
        gradients.append(x.grad / upstream)
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_a_temperature_or_labels_that_do_not_fit():
    z = torch.randn(4, 3)
    for t in (torch.tensor(float("inf")), 1e-38, 1e300, 10**400):  # of the others, t or its reciprocal is no float32
        with pytest.raises(ValueError, match="at least 1e-37"):
            cosine_logsumexp(z, temperature=t)
    with pytest.raises(ValueError, match="temperature .* on meta"):
        cosine_logsumexp(z, temperature=torch.tensor(0.1, device="meta"))
    with pytest.raises(ValueError, match="labels must be integers"):
        sup_con(z, torch.zeros(4, dtype=torch.complex64))
