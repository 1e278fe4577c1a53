"""The primitive under every loss: the log-sum-exp of cosine similarities, and its exact gradient.

Unit rows z_i (M, d), unit columns k_j (K, d), beta = 1/temperature, exponentials as powers of two. For beta from 0.17
to 64, rows and columns are stored times the root of beta log2(e), so that a product is the exponent (c = 1); else as
they are, and c = beta log2(e):

    (1)  s_ij = c z_i . k_j                          E_ij = 2^(s_ij - m_i)
    (2)  total_i = sum_j E_ij                        lse_i = m_i log(2) + log total_i
    (3)  dL/dz_i = beta sum_j W_ij k_j               W_ij = E_ij a_i + E_ji b_j,   a_i = (dL/dlse_i) / total_i
    (4)  out_i = sum_j E_ij k_j / total_i            the gradient of lse_i by z_i, over beta
    (5)  z = x / |x|                                 dx = (dz - z <z, dz>) / |x|

In the former case no shift is needed (m = 0: 2^s neither overflows nor underflows), so E is symmetric when the columns
are the rows, and one exponential serves both terms of W: W_ij = E_ij (a_i + b_j). In the latter m is the running
maximum.

`blocked` (plain PyTorch) and `fused` (Triton) hold the arithmetic, in functions of the same names. Here are the
autograd function over them, the collectives for more than one process, and the choice of a backend.
"""

import importlib.util
import os

import torch
import torch.distributed as dist
from torch import Tensor

from . import blocked

if dist.is_available():
    # It keeps the process group of the moment it is imported: by torch._dynamo, at the first call of an operator below.
    # That group would outlive destroy_process_group, and may abort at exit: import this before init_process_group.
    import torch.distributed.nn

NAMESPACE = __package__.replace(".", "_")  # of the operators: two copies of the folder may be loaded
INSTALLED = importlib.util.find_spec("triton") is not None
NAIVE_BELOW = 128 * 128  # on a CPU the naive loss is as fast up to this many similarities


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


def _module(backend):
    if backend == "triton":
        from . import fused
    return fused if backend == "triton" else blocked


def _operator(function):
    """A function of the backend that is its last argument, which torch.compile does not look into.

    What is decorated gives the shapes of what is returned. Eager calls spare the way through the operator.
    """
    name, schema = function.__name__, torch.library.infer_schema(function, mutates_args=())

    def run(first, *others):
        call, device = getattr(_module(others[-1]), name), first.device.type
        if device == "cpu" and not torch.is_autocast_enabled(device):
            return call(first, *others[:-1])
        # on the tensors' own device, and in the precision that was chosen for the call
        with torch.cuda.device_of(first), torch.autocast(device, enabled=False):
            return call(first, *others[:-1])

    operator = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(function)
    return lambda *given: (operator if torch.compiler.is_compiling() else run)(*given)


@_operator
def unit_rows(
    x1: Tensor, x2: Tensor | None, x3: Tensor | None, scale: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the unit rows of all (M, d) in `dtype`, and 1 / |x| (M,), |x| no smaller than 1e-12.

    Unit rows are times the root of `blocked.scaling`, and have the shape and dtype of the backend's `stored`.
    """
    m, d = sum(len(x) for x in (x1, x2, x3) if x is not None), x1.shape[1]
    shape, to = _module(backend).stored(m, d, dtype)
    return x1.new_empty(shape, dtype=to), x1.new_empty(m, dtype=torch.promote_types(torch.float32, dtype))


@_operator
def forward(
    rows: Tensor, cols: Tensor | None, pairs: Tensor, sides: int, scale: Tensor, offset: int,
    row_labels: Tensor | None, col_labels: Tensor | None, emit: bool, room: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return l (M,), w = WEIGHT dl/dlse (M,) of pairs, m and a = w / total (M,), out (M, d) when `emit`, and E.

    `cols` None: the rows themselves. Row i leaves out column i + offset (none if offset < 0), and with labels every
    column with another label. `sides`, how many of a pair's two rows are anchors: 0, l = lse, and w, not returned, is
    WEIGHT; 1, l = softplus(lse - s) where s is of the pair; 2, l = lse - s. With `emit` the blocked backend takes
    columns of any length, and normalises its tiles. E: the first `room` elements of its tiles.
    """
    m, sums = len(rows), torch.promote_types(torch.float32, rows.dtype)
    lengths = m, m if sides else 0, m, m, (m if emit else 0, rows.shape[-1]), room if backend == "blocked" else 0
    return tuple(rows.new_empty(n, dtype=sums) for n in lengths)


@_operator
def backward(
    rows: Tensor, cols: Tensor | None, scale: Tensor, offset: int, row_labels: Tensor | None, col_labels: Tensor | None,
    row_m: Tensor, row_a: Tensor, col_m: Tensor | None, col_a: Tensor | None, out: Tensor | None, kept: Tensor,
    pairs: Tensor, sides: int, w: Tensor, unit: Tensor, inverse: Tensor, d: int, dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dL/dx (M, d) in `dtype`, and <z, dL/dz> (M,).

    dL/dz over beta is unit times: sum_j (2^(s_ij - row_m_i) row_a_i + 2^(s_ij - col_m_j) col_a_j) k_j, or w out where
    `out` is given; less, where sides > 0, sides w times the other row of the pair.
    """
    return rows.new_empty((len(rows), d), dtype=dtype), torch.empty_like(inverse)


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


class Contrast(torch.autograd.Function):
    """The log-sum-exp (M,) of each row of x1 over the rows of y, or, without y, over the other rows; sides > 0: the
    mean of a loss of pairs (x1_i, x2_i) that is made of it, as in `forward` above.

    With a group, the columns are those of all processes, and the gradients are those of the sum of all processes'
    outputs: what other processes' rows add to it is computed here, from their (m, a), not sent as a gradient.
    """

    @staticmethod
    def forward(ctx, x1, x2, y, scale, labels, sides, dtype, backend, group):
        needs_x, needs_y, needs_scale = any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4]
        emit = y is not None and (needs_x or needs_scale) and not needs_y  # the columns are constants: no second pass
        by_tile = emit and backend == "blocked"
        z, inverse = unit_rows(x1, x2, None if by_tile else y, scale, dtype, backend)
        m, offset, pairs = len(x1) * max(1, sides), -1, z[: 2 * len(x1) if sides else 0]
        if y is None:
            cols, offset = None if group is None else z, first_row(z, group)  # None: the rows themselves
        else:
            cols = y.to(dtype) if by_tile else z[-len(y) :]
        cols, every_label = gather(cols, group), gather(labels, group)
        keep = backend == "blocked" and not emit and (needs_x or needs_scale)
        keep = keep and (torch.compiler.is_compiling() or not blocked.scaling(scale)[2])
        room = blocked.room(m, m if cols is None else len(cols), cols is None, dtype) if keep else 0
        shape = scale, offset, labels, every_label
        each, w, top, a, out, kept = forward(z[:m], cols, pairs, sides, *shape, emit, room, backend)
        cols, out = (None, out) if emit else (cols, None)
        ctx.save_for_backward(z, inverse, cols, w, top, a, out, kept, scale, labels, every_label)
        of_y = (0, None) if y is None else (len(y), y.dtype)
        ctx.options = offset, sides, x1.shape[1], x1.dtype, *of_y, backend, group
        return each.mean() if sides else each

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # else a second derivative were left out
            raise RuntimeError("the contrastive losses cannot be differentiated twice (create_graph=True)")
        z, inverse, cols, w, m, a, out, kept, scale, *labels = ctx.saved_tensors
        offset, sides, d, dtype, n_y, y_dtype, backend, group = ctx.options
        needs_x, needs_y, needs_scale = any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4]
        if not sides or group is not None:  # the largest is left out of a, for float16 and against subnormals
            largest = gather(torch.linalg.vector_norm(g, torch.inf).clamp(min=1e-30)[None], group).amax()
            a, w, g = a * (g / largest), (w if sides else blocked.WEIGHT) * (g / largest), largest
        rows, unit = z[: len(m)], g / (blocked.WEIGHT * (len(m) if sides else 1))
        every = (None, None) if out is not None else (gather(m, group), gather(a, group))
        none = lambda x: (a.new_full((len(x),), torch.inf), a.new_zeros(len(x)))  # noqa: E731  adds 0
        dx = dy = dscale = None
        if needs_x or needs_scale:
            others = none(cols) if n_y and out is None else every
            pairs = z[: 2 * len(m) // sides if sides else 0]
            dx, along = backward(
                rows, cols, scale, offset, *labels, m, a, *others, out, kept, pairs, sides, w, unit,
                inverse[: len(m)], d, dtype, backend,
            )  # fmt: skip
        if needs_y:
            y, inverse = z[-n_y:], inverse[-n_y:]
            dy, _ = backward(
                y, gather(rows, group), scale, -1, None, None, *none(y), *every, None, kept[:0], y, 0, w, unit, inverse,
                d, y_dtype, backend,
            )  # fmt: skip
        if needs_scale:  # in self-similarity each s_ij is seen twice, from row i and from row j
            dscale = (along.sum() / scale * (1 if n_y else 0.5)).to(scale)
        halves = dx.chunk(2) if sides == 2 and needs_x else (dx, None)
        return *halves, dy, dscale, None, None, None, None, None


def positive_mean(z, labels, group):
    """Return z_i . (sum of class y_i - z_i) / |P(i)| for unit rows z (M, d) and labels y (M,); also |P(i)|.

    The class sums cost M d, and are those of all processes when there is a group; the gradient is then that of the sum
    of all processes' values. Nothing here adds in an order that changes from run to run.
    """
    ordered = gather(labels, group).sort().values
    class_id = torch.searchsorted(ordered, labels)  # where the class starts when sorted
    count = torch.searchsorted(ordered, labels, right=True) - class_id - 1  # |P(i)|
    sums = z.new_zeros(len(ordered), z.shape[1], dtype=torch.float64)  # a class may be large, and cancel against lse
    # of two ways, each is the one that is deterministic on its device, in its backward pass as well
    sums = sums.index_put((class_id,), z.double(), True) if z.is_cuda else sums.index_add(0, class_id, z.double())
    sums = sums if group is None else dist.nn.functional.all_reduce(sums.to(z), group=group)
    others = (sums[class_id] if z.is_cuda else sums.index_select(0, class_id)) - z
    return (z * others.to(z)).sum(1) / count.clamp(min=1), count.to(z)
