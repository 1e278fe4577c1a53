"""The primitive under every loss: a log-sum-exp of cosine similarities, and its exact gradient.

Each unit row z_i (M, d) meets each unit column k_j (K, d). beta is 1 / temperature; exponentials are powers of two. For
beta from 0.17 to 64, rows and columns are stored times the root of beta log2(e): their product is the exponent, and
c = 1. For other beta, and for a temperature on a GPU, they are stored unscaled, and c = beta log2(e).

    (1)  s_ij = c z_i . k_j                          E_ij = 2^(s_ij - m_i)
    (2)  total_i = sum_j E_ij                        lse_i = m_i log(2) + log total_i
    (3)  l_i = softplus(lse_i - s_i+)                q_i = dl_i / dlse_i = sigmoid(lse_i - s_i+)
    (4)  dL/dz_i = beta (sum_j W_ij k_j - (w_i + w_i+) k_i+),   W_ij = E_ij a_i + E_ji a_j
                                                     w_i = q_i dL/dl_i,   a_i = w_i / total_i
    (5)  W_ij - [j positive of i] (b_i + b_j)        b_i = dL/dl_i / |P(i)|
    (6)  z = x / |x|                                 dx = (dz - z <z, dz>) / |x|

Loss (3) has one positive, i+, which the sum (2) leaves out. Late in training the positive's share p of the softmax is
nearly 1, and the gradient consists of 1 - p. A difference of rounded numbers would turn 1 - p into noise, so each row
adds its positive in (3) and (4), in float32. SupCon's L_out has many positives: each tile subtracts them (5) before it
is rounded to float16. For lse itself, q_i = 1 and (4) has no positive.

For beta from 0.17 to 64, 2^s neither overflows nor underflows, and m is 0. If the columns are the rows, E is then
symmetric, and one exponential serves both terms of W. Otherwise m is the running maximum.

`blocked` (plain PyTorch) and `fused` (Triton) do the arithmetic, in functions of the same names. This module has the
autograd function that calls them, the collectives for more than one process, and the choice of a backend.
"""

import importlib.util
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import blocked
from .blocked import Layout, Rows

if dist.is_available():  # else torch._dynamo imports it later, and it keeps that moment's process group
    import torch.distributed.nn

INSTALLED = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: str, device, dtype) -> str:
    """Return the backend to use, "triton" or "blocked". Raises ValueError if `backend` is unknown or cannot run."""
    device, interpreted = torch.device(device), os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        return "triton" if device.type == "cuda" and dtype != torch.float64 and INSTALLED else "blocked"
    if backend not in ("triton", "blocked"):
        raise ValueError(f"backend must be auto, triton or blocked, got {backend!r}")
    if backend == "triton" and not INSTALLED:
        raise ValueError("backend='triton' needs the package triton: install it, or take backend='auto'")
    if backend == "triton" and not interpreted and (device.type != "cuda" or dtype == torch.float64):
        raise ValueError(f"backend='triton' takes float32, float16 or bfloat16 on a GPU, got {dtype} on {device}")
    return backend


def gather(x, group, n=None):
    """Concatenate the first n rows (None: all) of each process's x, then their other rows: the columns of `Layout`."""
    if group is None or x is None:
        return x
    parts, n = [torch.empty_like(x) for _ in range(dist.get_world_size(group))], len(x) if n is None else n
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat([part[:n] for part in parts] + [part[n:] for part in parts])


def largest(x, group):
    own = torch.linalg.vector_norm(x, torch.inf)  # the largest |x| of this process
    return own if group is None else gather(own[None], group).amax()


def kind(x):
    """Describe x in words: the dtype, shape and device of a tensor, or the type of anything else."""
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def check_shares(group, *given):
    """Return the group, or None if it has one process. Raise ValueError on every process if the processes pass unequal
    shapes or dtypes, with which `gather` would abort or hang. The check uses the CPU if the group has a backend for it,
    and otherwise waits for the GPU. Under torch.compile there is no check."""
    if group is None or dist.get_world_size(group) == 1:
        return None
    if not torch.compiler.is_compiling():  # without the GPU's number: each process has its own
        here = given[0].device if isinstance(given[0], Tensor) else "cuda"
        device, text = "cpu" if "cpu" in dist.get_backend_config(group) else here, " and ".join(map(kind, given))
        own = torch.tensor([list(text.replace(f" on {here}", "").encode().ljust(128)[:128])], dtype=torch.uint8)
        every = {bytes(each).decode().strip() for each in gather(own.to(device), group).tolist()}
        if len(every) > 1:
            raise ValueError(f"each process of a group must pass equal shapes, got {', '.join(sorted(every))}")
    return group


def class_numbers(labels, group):
    """Return the class numbers of this process's rows, those of all processes' rows, and |P(i)| of this process's rows.

    A class's number is its first position among all sorted labels. Each row with the label -1 is a class by itself.
    """
    every, first = gather(labels, group), 0 if group is None else dist.get_rank(group) * len(labels)
    own = slice(first, first + len(labels))
    ordered, none = every.sort().values, every == -1
    number = torch.searchsorted(ordered, every) + none * (none.cumsum(0) - 1)
    count = torch.searchsorted(ordered, labels, right=True) - number[own] - 1  # other rows with this label
    return number[own], number, count.masked_fill(none[own], 0)


def positive_mean(z, label, every, count, group):
    """Return z_i . (sum over the class of i - z_i) / |P(i)|, (M,), in O(M d). z: rows as they are stored, (M, ...)."""
    z = z.double() if z.ndim == 2 else z.double().sum(1)  # float64: sums may be large, and lse - sum small
    sums = z.new_zeros(len(every), z.shape[1])
    sums = sums.index_put_((label,), z, True) if z.is_cuda else sums.index_add_(0, label, z)  # both deterministic
    if group is not None:
        dist.all_reduce(sums, group=group)
    return (z * (sums[label] - z)).sum(1) / count.clamp(min=1)


class Contrast(torch.autograd.Function):
    """The mean over the anchors of loss (3) if `pair`, else the log-sum-exp (M,) of each anchor.

    The rows are those of x1 (n, d) and of x2. The anchors are the rows of x1 and, with `both`, of x2. An anchor meets
    the constants y (K, d) if y is given; with `cross`, the rows of the other of x1 and x2; otherwise all rows.
    `classes`: as in `Layout`; `groups`: what `class_numbers` returns. With groups but no classes, the result is L_out:
    lse minus the mean over the positives. With a process group, the columns are the rows of all processes. The gradient
    is that of the sum of all processes' outputs; m, a and b of the other processes' anchors are gathered for it.
    """

    @staticmethod
    def forward(ctx, x1, x2, y, scale, groups, pair, cross, both, classes, grad, dtype, backend, group):
        n, m, needs = len(x1), len(x1) + (0 if x2 is None else len(x2)), grad and any(ctx.needs_input_grad)
        ops, emit = blocked, needs and y is not None  # emit: constant columns need no backward pass of tiles
        if backend == "triton":
            from . import fused as ops
        by_tile = emit and ops is blocked
        z, inverse = ops.unit_rows(x1, x2, None if by_tile else y, scale, dtype)
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        layout = Layout(n, world * n, rank * n if y is None else -1, pair, cross, classes)
        rows, (label, every, count) = z[:m], groups or (None, None, None)
        cols = (None if group is None else gather(rows, group, n)) if y is None else y.to(dtype) if by_tile else z[m:]
        masks = (label, every) if classes else (None, None)
        each, q, maxima, a, out, kept = ops.forward(rows, *masks, cols, m if both else n, layout, scale, emit, needs)
        if groups and not classes:
            each = each - positive_mean(rows, *groups, group).to(each) * (blocked.scaling(scale)[1] * blocked.LN2)
        cols, out = (None, out) if emit else (cols, None)
        ctx.save_for_backward(rows, inverse[:m], cols, q, maxima, a, out, kept, scale, label, every, count)
        ctx.options = layout, x1.shape[1], x1.dtype, ops, group
        return each.mean() if pair else each

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # this backward pass has no derivative of its own
            raise RuntimeError("the contrastive losses cannot be differentiated twice (create_graph=True)")
        z, inverse, cols, w, m, a, out, kept, scale, label, every, count = ctx.saved_tensors
        layout, d, dtype, ops, group = ctx.options
        n, anchors, rows, unit = layout.n, len(a), len(z) if out is None else layout.n, g
        if g.ndim or group is not None:  # over its largest, so that w and a are no subnormals
            unit = largest(g, group).clamp(min=1e-30)
            w, a = (w if layout.pair else 1) * (g / unit), a * (g / unit)
        b = None if count is None or layout.classes else w / count.clamp(min=1)
        top = None if ops is blocked else largest(w, group)
        if anchors < rows:  # the other rows are no anchors: their weights are 0
            m, a, w = (F.pad(x, (0, rows - anchors), value=torch.inf if x is m else 0) for x in (m, a, w))
        own = Rows(z[:rows], label, m, a, b)
        others = own if cols is None else Rows(cols, every, *(gather(x, group, n) for x in own[2:]))
        unit = unit / anchors if layout.pair else unit
        with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
            dx, along = ops.backward(own, others, z, w, top, unit, layout, scale, out, kept, inverse[:rows], d, dtype)
        dscale = None
        if ctx.needs_input_grad[3]:  # rows that meet rows of their own part count each s_ij twice, from i and j
            along = along[:n].sum() if layout.cross or out is not None else along.sum() / 2
            dscale = (along / scale).to(scale)
        dx1, dx2 = (x if need else None for x, need in zip((dx[:n], dx[n:]), ctx.needs_input_grad, strict=False))
        return dx1, dx2, None, dscale, *(None,) * 9
