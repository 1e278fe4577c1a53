"""The primitive under every loss: a log-sum-exp of cosine similarities, and its exact gradient.

Unit rows z_i (M, d) meet unit columns k_j (K, d); beta = 1 / temperature, and exponentials are powers of two. For beta
from 0.17 to 64, rows and columns are stored times the root of beta log2(e), so that a product is the exponent (c = 1);
otherwise they are stored as they are, and c = beta log2(e).

    (1)  s_ij = c z_i . k_j                          E_ij = 2^(s_ij - m_i)
    (2)  total_i = sum_j E_ij                        lse_i = m_i log(2) + log total_i
    (3)  l_i = softplus(lse_i - s_i+)                q_i = dl_i / dlse_i = sigmoid(lse_i - s_i+)
    (4)  dL/dz_i = beta (sum_j W_ij k_j - (w_i + w_i+) k_i+),   W_ij = E_ij a_i + E_ji a_j
                                                     w_i = q_i dL/dl_i,   a_i = w_i / total_i
    (5)  W_ij - [j positive of i] (b_i + b_j)        b_i = dL/dl_i / |P(i)|
    (6)  z = x / |x|                                 dx = (dz - z <z, dz>) / |x|

Loss (3) has one positive, i+, and the sum (2) leaves it out. Late in training exp(s_i+) is nearly the whole sum of a
softmax, and the gradient consists of 1 - p: as a difference of rounded numbers it would be noise. So every row adds its
positive in (3) and (4), in float32. SupCon's L_out has many positives: its difference (5) is taken in the tile, before
anything is rounded to float16. For lse itself q_i = 1, and (4) has no positive.

For the usual beta no shift is needed (m = 0: 2^s neither overflows nor underflows), so E is symmetric where the columns
are the rows, and one exponential serves both terms of W. Otherwise m is the running maximum.

`blocked` (plain PyTorch) and `fused` (Triton) hold the arithmetic, in functions of the same names. Here are the
autograd function over them, the collectives for more than one process, and the choice of a backend.
"""

import importlib.util
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import blocked
from .blocked import Layout, Rows

if dist.is_available():  # torch._dynamo imports it at the first call, and it keeps the process group of that moment
    import torch.distributed.nn

INSTALLED = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: str, device, dtype) -> str:
    """Name what `backend` stands for, "triton" or "blocked". Raises ValueError where that is unknown or cannot run."""
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
    """Concatenate the first n (None: all) rows of the x of all processes, then the others, as `Layout` has columns."""
    if group is None or x is None:
        return x
    parts, n = [torch.empty_like(x) for _ in range(dist.get_world_size(group))], len(x) if n is None else n
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat([part[:n] for part in parts] + [part[n:] for part in parts])


def largest(x, group):
    top = torch.linalg.vector_norm(x, torch.inf)  # the largest |x|; with a group, of all its processes
    return top if group is None else gather(top[None], group).amax()


def kind(x):
    """The dtype, shape and device of x, in words; the type of what is no tensor."""
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def check_shares(group, *given):
    """Return the group, or None for a group of one process. Raise ValueError on every process unless all pass equal
    shapes and dtypes: `gather` would abort, or hang. torch.compile leaves the check out.
    It goes by way of the CPU if the group has a backend there, else it waits for a GPU."""
    if group is None or dist.get_world_size(group) == 1:
        return None
    if not torch.compiler.is_compiling():  # the GPU's number is left out: each process has its own
        here = given[0].device if isinstance(given[0], Tensor) else "cuda"
        device, text = "cpu" if "cpu" in dist.get_backend_config(group) else here, " and ".join(map(kind, given))
        own = torch.tensor([list(text.replace(f" on {here}", "").encode().ljust(128)[:128])], dtype=torch.uint8)
        every = {bytes(each).decode().strip() for each in gather(own.to(device), group).tolist()}
        if len(every) > 1:
            raise ValueError(f"each process of a group must pass equal shapes, got {', '.join(sorted(every))}")
    return group


def class_numbers(labels, group):
    """Return the class numbers of this process's rows and of all rows, and |P(i)|; a label of -1 is a class of its own.

    A number is where the class starts among all sorted labels, so it is below the number of all rows.
    """
    every, first = gather(labels, group), 0 if group is None else dist.get_rank(group) * len(labels)
    own = slice(first, first + len(labels))
    ordered, none = every.sort().values, every == -1
    number = torch.searchsorted(ordered, every) + none * (none.cumsum(0) - 1)
    count = torch.searchsorted(ordered, labels, right=True) - number[own] - 1  # the others with its label
    return number[own], number, count.masked_fill(none[own], 0)


def positive_mean(z, label, every, count, group):
    """Return z_i . (sum of the class of i - z_i) / |P(i)| (M,), for stored rows z (M, ...): O(M d)."""
    z = z.double() if z.ndim == 2 else z.double().sum(1)  # a class may be large, and its sum cancels against lse
    sums = z.new_zeros(len(every), z.shape[1])
    sums = sums.index_put_((label,), z, True) if z.is_cuda else sums.index_add_(0, label, z)  # each is deterministic
    if group is not None:
        dist.all_reduce(sums, group=group)
    return (z * (sums[label] - z)).sum(1) / count.clamp(min=1)


class Contrast(torch.autograd.Function):
    """The mean over the anchors of loss (3) if `pair`, else the log-sum-exp (M,) of each anchor.

    The rows are x1 (n, d) and x2; the anchors are x1's, with `both` x2's too. They meet all rows, or, with `cross`, the
    rows of the other of x1 and x2, or, where y is given, the constants y (K, d). `classes`: as in `Layout`; `groups`:
    what `class_numbers` returns. With groups but no classes it is L_out: lse less the mean over the positives. With a
    process group, the columns are those of all processes, and the gradients are those of the sum of all processes'
    outputs: what other processes' anchors add is computed here, from their m, a and b.
    """

    @staticmethod
    def forward(ctx, x1, x2, y, scale, groups, pair, cross, both, classes, grad, dtype, backend, group):
        n, m, needs = len(x1), len(x1) + (0 if x2 is None else len(x2)), grad and any(ctx.needs_input_grad)
        of, emit = blocked, needs and y is not None  # with emit the columns are constants, and need no second pass
        if backend == "triton":
            from . import fused as of
        by_tile = emit and of is blocked
        z, inverse = of.unit_rows(x1, x2, None if by_tile else y, scale, dtype)
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        layout = Layout(n, world * n, rank * n if y is None else -1, pair, cross, classes)
        rows, (label, every, count) = z[:m], groups or (None, None, None)
        cols = (None if group is None else gather(rows, group, n)) if y is None else y.to(dtype) if by_tile else z[m:]
        masks = (label, every) if classes else (None, None)
        each, q, top, a, out, kept = of.forward(rows, *masks, cols, m if both else n, layout, scale, emit, needs)
        if groups and not classes:
            each = each - positive_mean(rows, *groups, group).to(each) * (blocked.scaling(scale)[1] * blocked.LN2)
        cols, out = (None, out) if emit else (cols, None)
        ctx.save_for_backward(rows, inverse[:m], cols, q, top, a, out, kept, scale, label, every, count)
        ctx.options = layout, x1.shape[1], x1.dtype, of, group
        return each.mean() if pair else each

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # else a second derivative were left out
            raise RuntimeError("the contrastive losses cannot be differentiated twice (create_graph=True)")
        z, inverse, cols, w, m, a, out, kept, scale, label, every, count = ctx.saved_tensors
        layout, d, dtype, of, group = ctx.options
        n, anchors, rows, unit = layout.n, len(a), len(z) if out is None else layout.n, g
        if g.ndim or group is not None:  # the largest is left out of a, against subnormals
            unit = largest(g, group).clamp(min=1e-30)
            w, a = (w if layout.pair else 1) * (g / unit), a * (g / unit)
        b = None if count is None or layout.classes else w / count.clamp(min=1)
        top = None if of is blocked else largest(w, group)
        if anchors < rows:  # the others have no loss of their own
            m, a, w = (F.pad(x, (0, rows - anchors), value=torch.inf if x is m else 0) for x in (m, a, w))
        own = Rows(z[:rows], label, m, a, b)
        others = own if cols is None else Rows(cols, every, *(gather(x, group, n) for x in own[2:]))
        unit = unit / anchors if layout.pair else unit
        with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
            dx, along = of.backward(own, others, z, w, top, unit, layout, scale, out, kept, inverse[:rows], d, dtype)
        dscale = None
        if ctx.needs_input_grad[3]:  # where rows meet rows of their own part, each s_ij is seen from i and from j
            along = along[:n].sum() if layout.cross or out is not None else along.sum() / 2
            dscale = (along / scale).to(scale)
        dx1, dx2 = (x if need else None for x, need in zip((dx[:n], dx[n:]), ctx.needs_input_grad, strict=False))
        return dx1, dx2, None, dscale, *(None,) * 9
