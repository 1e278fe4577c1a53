"""The primitive under every loss: the log-sum-exp of cosine similarities, and its exact gradient.

    lse_i = log sum_j exp(cos(x_i, y_j) / t)

`blocked` (plain PyTorch) and `fused` (Triton) hold the arithmetic, in four functions of the same names. Here are the
autograd functions over them, the collectives for more than one process, and the choice of a backend.
"""

import importlib.util
import math
import os

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # It keeps the process group of the moment it is imported: by torch._dynamo, at the first call of an operator below.
    # That group would outlive destroy_process_group, and may abort at exit: import this before init_process_group.
    import torch.distributed.nn

UNIT = {"triton": math.log(2), "blocked": 1.0}  # the kernels count in powers of two: their m is a logarithm to base 2
INSTALLED = importlib.util.find_spec("triton") is not None
NAIVE_BELOW = 512 * 512  # on a CPU the naive loss is as fast up to this many similarities


def resolve_backend(backend: str, rows: int, columns: int, device, dtype, group=None) -> str:
    """Name the backend ("triton", "blocked" or "naive") that `backend` stands for at this shape.

    Raises ValueError for an unknown name, and where the one asked for cannot run.
    """
    device, interpreted = torch.device(device), os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        if device.type == "cuda" and dtype != torch.float64 and INSTALLED:
            return "triton"
        small = device.type == "cpu" and rows * columns <= NAIVE_BELOW
        return "naive" if small and not several(group) else "blocked"
    if backend not in ("triton", "blocked", "naive"):
        raise ValueError(f"backend must be auto, triton, blocked or naive, got {backend!r}")
    if backend == "naive" and several(group):
        raise ValueError("backend='naive' is for one process: with a group take 'auto', 'blocked' or 'triton'")
    if backend == "triton" and not INSTALLED:
        raise ValueError("backend='triton' needs the package triton: install it, or take backend='auto'")
    if backend == "triton" and not interpreted and (device.type != "cuda" or dtype == torch.float64):
        raise ValueError(f"backend='triton' takes float32, float16 or bfloat16 on a GPU, got {dtype} on {device}")
    return backend


def row_dtype(x, backend):
    """Name the dtype the products take; unit rows have |z| <= 1, so float16 rounds eight times finer than bfloat16."""
    autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
    if backend == "triton" and (x.dtype in (torch.float16, torch.bfloat16) or (autocast and x.dtype == torch.float32)):
        return torch.float16
    return torch.promote_types(torch.float32, x.dtype)


# Four operators that torch.compile does not look into.


def _run(backend, name, first, *others):
    if backend == "triton":
        from . import fused as module
    else:
        from . import blocked as module
    # on the tensors' own device, and in the precision that was chosen for the call
    with torch.cuda.device_of(first), torch.autocast(first.device.type, enabled=False):
        return getattr(module, name)(first, *others)


@torch.library.custom_op("contrastive::unit_rows", mutates_args=())
def unit_rows(x: Tensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    """Return z = x / |x| (M, d) in `dtype` and 1 / |x| (M,), |x| no smaller than 1e-12."""
    return _run(backend, "unit_rows", x, dtype)


@torch.library.custom_op("contrastive::unit_rows_backward", mutates_args=())
def unit_rows_backward(dz: Tensor, z: Tensor, inverse: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Return dL/dx (M, d) in `dtype` from dL/dz, z and 1 / |x|."""
    return _run(backend, "unit_rows_backward", dz, z, inverse, dtype)


@torch.library.custom_op("contrastive::forward", mutates_args=())
def forward(
    rows: Tensor, cols: Tensor | None, scale: Tensor, offset: int,
    row_labels: Tensor | None, col_labels: Tensor | None, emit: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return m and total (M,), where lse = m + log(total), and d lse / d rows over the scale when `emit`.

    `cols` None: the rows themselves. Row i leaves out column i + offset (none if offset < 0), and with labels every
    column with another label. With `emit` the blocked backend takes columns of any length, and normalises its tiles.
    """
    return _run(backend, "forward", rows, cols, scale, offset, row_labels, col_labels, emit)


@torch.library.custom_op("contrastive::backward", mutates_args=())
def backward(
    rows: Tensor, cols: Tensor | None, scale: Tensor, offset: int, row_labels: Tensor | None, col_labels: Tensor | None,
    row_m: Tensor, row_a: Tensor, col_m: Tensor, col_a: Tensor, backend: str,
) -> Tensor:  # fmt: skip
    """Return sum_j (exp(s_ij - row_m_i) row_a_i + exp(s_ij - col_m_j) col_a_j) cols_j (M, d)."""
    return _run(backend, "backward", rows, cols, scale, offset, row_labels, col_labels, row_m, row_a, col_m, col_a)


@unit_rows.register_fake
def _(x, dtype, backend):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), dtype=torch.promote_types(torch.float32, dtype))


@unit_rows_backward.register_fake
def _(dz, z, inverse, dtype, backend):
    return dz.new_empty(dz.shape, dtype=dtype)


@forward.register_fake
def _(rows, cols, scale, offset, row_labels, col_labels, emit, backend):
    total = rows.new_empty(len(rows), dtype=torch.promote_types(torch.float32, rows.dtype))
    return total, torch.empty_like(total), total.new_empty((len(rows) if emit else 0, rows.shape[1]))


@backward.register_fake
def _(rows, cols, scale, offset, row_labels, col_labels, row_m, row_a, col_m, col_a, backend):
    return rows.new_empty(rows.shape, dtype=torch.promote_types(torch.float32, rows.dtype))


def several(group):
    """Whether the group has more than one process."""
    return group is not None and dist.get_world_size(group) > 1


def gather(x, group):
    """Concatenate the x of all processes (each the same shape); without a group, x itself."""
    if group is None or x is None:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def kind(x):
    """The dtype, shape and device of x, in words; the type of what is no tensor."""
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def check_shares(group, *given):
    """Raise ValueError on every process unless all pass equal shapes and dtypes: `gather` would abort, or hang.

    By way of the CPU if the group has a backend there, else a GPU waits for it; torch.compile leaves it out.
    """
    if several(group) and not torch.compiler.is_compiling():
        device = getattr(given[0], "device", "cpu")
        own = " and ".join(map(kind, given)).replace(f" on {device}", "").encode().ljust(128)[:128]
        device = "cpu" if "cpu" in dist.get_backend_config(group) else device
        every = gather(torch.tensor([list(own)], dtype=torch.uint8, device=device), group).tolist()
        every = sorted({bytes(each).decode().strip() for each in every})
        if len(every) > 1:
            raise ValueError(f"each process of a group must pass the same shapes and dtypes, got {', '.join(every)}")


def first_row(x, group):
    """Where this process's rows begin among those of all."""
    return 0 if group is None else dist.get_rank(group) * len(x)


def refuse_twice():
    """Raise in a backward pass that is recorded, so that no second derivative is silently left out."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the contrastive losses cannot be differentiated twice (create_graph=True)")


class UnitRows(torch.autograd.Function):
    """z = x / |x| (M, d), rounded to `dtype` but held in at least float32, so that its gradient is not rounded."""

    @staticmethod
    def forward(ctx, x, dtype, backend):
        z, inverse = unit_rows(x, dtype, backend)
        z = z.to(inverse.dtype)
        ctx.save_for_backward(z, inverse)
        ctx.options = x.dtype, backend
        return z

    @staticmethod
    def backward(ctx, dz):
        refuse_twice()
        return unit_rows_backward(dz.contiguous(), *ctx.saved_tensors, *ctx.options), None, None


class LogSumExp(torch.autograd.Function):
    """lse (M,) of unit rows z (M, d) over columns y (K, d), unit rows if they need a gradient; y None: the other rows.

    With a group, the columns are those of all processes, and the gradients are those of the sum of all processes'
    outputs: what other processes' rows add to it is computed here, from their (m, a), not sent as a gradient.
    """

    @staticmethod
    def forward(ctx, z, y, scale, labels, dtype, backend, group):
        needs_z, needs_y, needs_scale = ctx.needs_input_grad[:3]
        emit = y is not None and (needs_z or needs_scale) and not needs_y  # the columns are constants: no second pass
        if y is not None:
            y = y.to(dtype) if needs_y or (emit and backend == "blocked") else unit_rows(y, dtype, backend)[0]
        rows = z.to(dtype)
        cols = gather(rows if y is None and group is not None else y, group)  # None: the rows themselves
        offset = -1 if y is not None else first_row(z, group)
        shape = scale, offset, labels, gather(labels, group)
        m, total, out = forward(rows, cols, *shape, emit, backend)
        ctx.save_for_backward(rows, *((None, None, out) if emit else (y, cols, None)), m, total, *shape[2:], scale)
        ctx.options = offset, emit, backend, group
        return m * UNIT[backend] + total.log()

    @staticmethod
    def backward(ctx, g):
        refuse_twice()
        rows, y, cols, out, m, total, *labels, scale = ctx.saved_tensors
        offset, emit, backend, group = ctx.options
        # Keep W, at most 2 max|g|, in the range where float16 is precise, and a small g / total out of the subnormals;
        # a power of two, so that nothing is rounded.
        largest = gather(g.abs().amax().clamp(min=1e-30)[None], group).amax()
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 14)
        a = torch.where(total > 0, g / unit / total, 0)  # a row without columns has no gradient
        every = () if emit else (gather(m, group), gather(a, group))
        absent = lambda x: (torch.full_like(x, torch.inf), torch.zeros_like(x))  # noqa: E731  (m, a) that add nothing
        needs_z, needs_y, needs_scale = ctx.needs_input_grad[:3]
        dz = dy = dscale = None
        if emit:
            dz = out * (g * scale)[:, None]
        elif y is None:
            dz = backward(rows, cols, scale, offset, *labels, m, a, *every, backend) * (unit * scale)
        elif needs_z or needs_scale:
            none = absent(cols[:, 0].to(m))
            dz = backward(rows, cols, scale, offset, *labels, m, a, *none, backend) * (unit * scale)
        if needs_y:
            none = absent(y[:, 0].to(m))
            dy = backward(y, gather(rows, group), scale, -1, None, None, *none, *every, backend) * (unit * scale)
        if needs_scale:  # in self-similarity each s_ij is seen twice, from row i and from row j
            dscale = ((rows * dz).sum() / scale * (0.5 if y is None and not emit else 1)).to(scale)
        return dz, dy, dscale, None, None, None, None


class PositiveMean(torch.autograd.Function):
    """v_i = z_i . (sum of class y_i - z_i) / |P(i)| for unit rows z (M, d) and labels y (M,); also |P(i)|.

    The class sums cost M d, and are those of all processes when there is a group; the gradient is then that of the sum
    of all processes' v. Nothing here adds in an order that changes from run to run.
    """

    @staticmethod
    def forward(ctx, z, labels, group):
        own = slice(first_row(z, group), first_row(z, group) + len(z))
        every, every_label = gather(z, group), gather(labels, group)
        ordered = every_label.sort().values
        class_id = torch.searchsorted(ordered, every_label)  # where the class starts when sorted: below M
        count = torch.searchsorted(ordered, labels, right=True) - class_id[own] - 1  # |P(i)|
        others = _class_sums(every, class_id)[class_id[own]] - z
        weight = 1 / count.clamp(min=1).to(z)
        ctx.save_for_backward(z, every, class_id, others, weight)
        ctx.own, ctx.group = own, group
        count = count.to(z)
        ctx.mark_non_differentiable(count)
        return (z * others).sum(dim=1) * weight, count

    @staticmethod
    def backward(ctx, g, _):
        refuse_twice()
        z, every, class_id, others, weight = ctx.saved_tensors
        w = g * weight
        # Row i is an anchor (others) and a positive of the other anchors of its class, with their weights.
        weighted = _class_sums(gather(w, ctx.group)[:, None] * every, class_id)[class_id[ctx.own]]
        return w[:, None] * (others - z) + weighted, None, None


def _class_sums(x, class_id):
    sums = torch.zeros_like(x, dtype=torch.float64)  # a class may be large, and its sum cancel against lse
    if x.is_cuda:  # of the two, each is the one that is deterministic on its device
        return sums.index_put_((class_id,), x.double(), accumulate=True).to(x)
    return sums.index_add_(0, class_id, x.double()).to(x)
