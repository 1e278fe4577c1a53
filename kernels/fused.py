"""The log-sum-exp, and the losses made of it, in four Triton kernels; the equations are those of `logsumexp`.

A program owns a block of rows and walks over the columns, so a tile of s lives in registers only; nothing of size
M x K is stored, nothing is added atomically. When there are few rows, the columns are split over programs and the
parts added in a fixed order; how many depends on the shape alone. Rows too wide for one tile are taken in CHUNKS of
BD: s is their sum, and each chunk of an output has its own program.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import blocked

LOG2E, LN2, WEIGHT = tl.constexpr(blocked.LOG2E), tl.constexpr(blocked.LN2), tl.constexpr(blocked.WEIGHT)
SUM_TYPE = {torch.float16: tl.float32, torch.float64: tl.float64}
PROGRAMS = 264  # to make when the rows are few: two on each of the 132 processors of an H100


@triton.jit
def unit_rows_kernel(
    X1, X2, X3, Z, Inverse, root, n, n2, d, row1, col1, row2, col2, row3, col3,
    WIDTH: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i, c = tl.program_id(0).to(tl.int64), tl.arange(0, BD).to(tl.int64)
    if i < n:
        x = tl.load(X1 + i * row1 + c * col1, mask=c < d, other=0.0).to(ACC)
    elif i < n + n2:
        x = tl.load(X2 + (i - n) * row2 + c * col2, mask=c < d, other=0.0).to(ACC)
    else:
        x = tl.load(X3 + (i - n - n2) * row3 + c * col3, mask=c < d, other=0.0).to(ACC)
    largest = tl.maximum(tl.max(tl.abs(x), 0), 1e-12)
    x = x / largest  # at most 1: the square of 2e19 overflows
    inverse = 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1.0)
    tl.store(Inverse + i, inverse / largest)
    z = x * (inverse * root)  # (5)
    high, at = z.to(Z.dtype.element_ty), Z + i * (PARTS * WIDTH) + c
    tl.store(at, high, mask=c < WIDTH)
    if PARTS == 2:
        tl.store(at + WIDTH, (z - high.to(ACC)).to(Z.dtype.element_ty), mask=c < WIDTH)


@triton.jit
def load_row(Z, i, d, WIDTH: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    at, inside = Z + i * (PARTS * WIDTH) + tl.arange(0, BD), tl.arange(0, BD) < d
    z = tl.load(at, mask=inside, other=0.0).to(ACC)
    return z + tl.load(at + WIDTH, mask=inside, other=0.0).to(ACC) if PARTS == 2 else z


@triton.jit
def load_tile(Z, i0, M, width, chunk, B: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """B rows from i0 and columns chunk BD, ... of Z, zero outside. Z: a tensor's descriptor (TMA) or a pointer."""
    if TMA:
        return Z.load([i0, chunk * BD])
    else:
        i, c = i0 + tl.arange(0, B), chunk * BD + tl.arange(0, BD)
        inside = (i[:, None] < M) & (c[None, :] < width)
        return tl.load(Z + i.to(tl.int64)[:, None] * width + c[None, :], mask=inside, other=0.0)


@triton.jit
def product(x, x_low, y, y_low, sums, PARTS: tl.constexpr, ACC: tl.constexpr):
    """sums + x y; of two parts each, all but the product of the low ones, which a float32 would round away."""
    sums = tl.dot(x, y, sums, out_dtype=ACC)
    if PARTS == 2:
        sums = tl.dot(x, y_low, tl.dot(x_low, y, sums, out_dtype=ACC), out_dtype=ACC)
    return sums


@triton.jit
def similarity(
    z, z_low, k, k_low, Z, Y, RowLabel, ColLabel, i0, j0, M, K, width, offset,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, LOW: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, LABELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The product of equation 1 for one tile; -inf where the sum leaves a column out."""
    i, j, s = i0 + tl.arange(0, BM), j0 + tl.arange(0, BN), tl.zeros((BM, BN), ACC)
    if CHUNKS == 1:
        s = product(z, z_low, tl.trans(k), tl.trans(k_low), s, PARTS, ACC)
    else:
        for c in range(CHUNKS):
            zc, zl = load_tile(Z, i0, M, width, c, BM, BD, TMA), load_tile(Z, i0, M, width, c + LOW, BM, BD, TMA)
            kc, kl = load_tile(Y, j0, K, width, c, BN, BD, TMA), load_tile(Y, j0, K, width, c + LOW, BN, BD, TMA)
            s = product(zc, zl, tl.trans(kc), tl.trans(kl), s, PARTS, ACC)
    own = i0 + offset  # where the first row meets itself
    if (i0 + BM > M) | (j0 + BN > K) | ((offset >= 0) & (j0 < own + BM) & (own < j0 + BN)):
        inside = (i[:, None] < M) & (j[None, :] < K)
        s = tl.where(inside & ((offset < 0) | (i[:, None] + offset != j[None, :])), s, float("-inf"))
    if LABELS:
        row_label = tl.load(RowLabel + i, mask=i < M, other=0)
        col_label = tl.load(ColLabel + j, mask=j < K, other=0)
        s = tl.where(row_label[:, None] == col_label[None, :], s, float("-inf"))
    return s


@triton.jit
def walk_kernel(
    Z, Y, C, RowLabel, ColLabel, RowM, RowA, ColM, ColA, Max, Total, Sums, M, K, d, offset, columns_per_split,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, POINTER: tl.constexpr, LABELS: tl.constexpr, SHIFT: tl.constexpr,
    TOTAL: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Equation 2 (TOTAL), 3 (PRODUCT), or 2 and 4 (both) over the columns of a split."""
    i0, split, chunk, width = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2), PARTS * d
    LOW: tl.constexpr = CHUNKS * (PARTS - 1)  # from a chunk to its low part
    i = i0 + tl.arange(0, BM)
    c = tl.load(C).to(ACC) if POINTER else C  # a temperature on the GPU
    z, z_low = load_tile(Z, i0, M, width, 0, BM, BD, TMA), load_tile(Z, i0, M, width, LOW, BM, BD, TMA)
    total, m, sums = tl.zeros((BM,), ACC), tl.zeros((BM,), ACC), tl.zeros((BM, BD), ACC)
    if TOTAL:
        m -= 3e38 if SHIFT else 0.0  # below every s, and finite
    else:
        a = tl.load(RowA + i, mask=i < M, other=0.0)
        m = tl.load(RowM + i, mask=i < M, other=float("inf")) if SHIFT else m
    low = split * columns_per_split
    for j0 in tl.range(low, tl.minimum(low + columns_per_split, K), BN, warp_specialize=SPECIALIZE):
        j = j0 + tl.arange(0, BN)
        k = load_tile(Y, j0, K, width, chunk, BN, BD, TMA)
        k_low = load_tile(Y, j0, K, width, chunk + LOW, BN, BD, TMA)
        s = similarity(
            z, z_low, k, k_low, Z, Y, RowLabel, ColLabel, i0, j0, M, K, width, offset,
            BM, BN, BD, CHUNKS, LOW, PARTS, TMA, LABELS, ACC,
        )  # fmt: skip
        if TOTAL:
            if SHIFT:
                m_new = tl.maximum(m, tl.max(s, 1) * c)
                shrink = tl.exp2(m - m_new)
                total, m, sums = total * shrink, m_new, sums * shrink[:, None]
            w = tl.exp2(s * c - m[:, None]) if SHIFT else tl.exp2(s)
            total += tl.sum(w, 1)  # (2)
        else:
            b = tl.load(ColA + j, mask=j < K, other=0.0)
            if SHIFT:  # two maxima, so two exponentials
                col_m = tl.load(ColM + j, mask=j < K, other=float("inf"))
                w = tl.exp2(s * c - m[:, None]) * a[:, None] + tl.exp2(s * c - col_m[None, :]) * b[None, :]
            else:
                w = tl.exp2(s) * (a[:, None] + b[None, :])
        if PRODUCT:
            high = w.to(k.dtype)
            sums = product(high, (w - high.to(ACC)).to(k.dtype), k, k_low, sums, PARTS, ACC)  # (3), (4)
    row, col = split.to(tl.int64) * M + i, chunk * BD + tl.arange(0, BD)
    if TOTAL and chunk == 0:
        tl.store(Max + row, m, mask=i < M)
        tl.store(Total + row, total, mask=i < M)
    if PRODUCT:
        tl.store(Sums + row[:, None] * d + col[None, :], sums, mask=(i[:, None] < M) & (col[None, :] < d))


@triton.jit
def finish_kernel(
    Max, Total, Sums, Pairs, C, Each, W, M_, A, Out, M, n, d, splits,
    WIDTH: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, POINTER: tl.constexpr, SIDES: tl.constexpr,
    EMIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add the splits' parts; what `logsumexp.forward` returns."""
    i, col = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    m, total, out = tl.load(Max + i), tl.full((), 0.0, ACC), tl.zeros((BD,), ACC)
    for part in tl.range(1, splits, loop_unroll_factor=8):
        m = tl.maximum(m, tl.load(Max + part * M + i))
    for part in tl.range(0, splits, loop_unroll_factor=8):
        shrink = tl.exp2(tl.load(Max + part * M + i) - m)
        total += tl.load(Total + part * M + i) * shrink
        if EMIT:
            out += tl.load(Sums + (part * M + i) * WIDTH + col, mask=col < d, other=0.0) * shrink
    each, w = m * LN2 + tl.log(total), tl.full((), WEIGHT, ACC)
    if SIDES > 0:
        v = load_row(Pairs, (i + n) % (2 * n), d, WIDTH, BD, PARTS, ACC)
        cosine = tl.sum(load_row(Pairs, i, d, WIDTH, BD, PARTS, ACC) * v, 0)
        each -= cosine * ((tl.load(C).to(ACC) if POINTER else C) * LN2)
        if SIDES == 1:  # softplus, and its derivative
            y = tl.exp(-tl.abs(each))
            u = 1 + y
            w *= tl.where(each > 0, 1.0, y) / u
            log_u = tl.where(u == 1, y, tl.log(u) * (y / tl.where(u == 1, 1.0, u - 1)))  # as if u were not rounded
            each = tl.maximum(each, 0.0) + log_u
        tl.store(W + i, w)
    tl.store(Each + i, each)
    tl.store(M_ + i, m)
    tl.store(A + i, tl.where(total > 0, w / total, 0.0))  # without columns, no gradient
    if EMIT:
        tl.store(Out + i * WIDTH + col, out / total, mask=col < WIDTH)


@triton.jit
def input_gradient_kernel(
    Sums, Z, Pairs, Inverse, W, Unit, C, DX, Along, root, M, n, d, splits,
    WIDTH: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, POINTER: tl.constexpr, SIDES: tl.constexpr,
    EMIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add the splits' parts, and the other row of the pair; what `logsumexp.backward` returns."""
    i, col, dz = tl.program_id(0).to(tl.int64), tl.arange(0, BD), tl.zeros((BD,), ACC)
    for part in range(splits):
        dz += tl.load(Sums + (part * M + i) * WIDTH + col, mask=col < d, other=0.0)
    if EMIT:
        dz *= tl.load(W + i)
    if SIDES > 0:  # the other row meets this one as anchor and, if both are anchors, as positive
        dz -= load_row(Pairs, (i + n) % (2 * n), d, WIDTH, BD, PARTS, ACC) * (tl.load(W + i) * SIDES)
    dz *= tl.load(Unit) * ((tl.load(C).to(ACC) if POINTER else C) * LN2 * root)
    z, inverse = load_row(Z, i, d, WIDTH, BD, PARTS, ACC) / root, tl.load(Inverse + i)
    along = tl.sum(z * dz, 0)
    tl.store(Along + i, along)
    dx = (dz - z * tl.where(inverse < 0.9999e12, along, 0.0)) * inverse  # shorter than 1e-12: divided by a constant
    tl.store(DX + i * d + col, dx.to(DX.dtype.element_ty), mask=col < d)  # (5)


def target_of(device):
    """Name the table of a device: "sm_80", "sm_90", "sm_100", or "small"; the interpreter runs that of sm_90."""
    if device.type != "cuda":
        return "sm_90"
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return "small" if torch.version.hip or name not in ("sm_80", "sm_90", "sm_100") else name


def stored(m, d, dtype):
    """Return shape and dtype of M unit rows: (M, a width that 16 divides), or (M, 2, a width that all tiles divide).

    The latter for float32 at torch.get_float32_matmul_precision() "highest": two float16 parts, high + low, whose
    products err as those of float32. Else one float16, which has the mantissa of tf32; float64 in the interpreter.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return (m, 2, max(16, triton.next_power_of_2(d)) if d <= 512 else triton.cdiv(d, 512) * 512), torch.float16
    return (m, triton.cdiv(d, 16) * 16), dtype if dtype == torch.float64 else torch.float16


def configuration(total, product, d, parts, target):
    """Return BM, BN, BD, warps and stages: what registers and shared memory of the target hold without a spill."""
    bd, blackwell, most = max(16, triton.next_power_of_2(d)), target == "sm_100", 64 if target == "small" else 128
    if parts == 2:
        if d > most and target in ("sm_80", "small"):
            return 64, 32, 64, 4, 2
        return 64, 64, min(bd, 128), *((4, 2) if not blackwell else (4, 1) if d <= 128 else (8, 2))
    bd = min(bd, {"small": 128, "sm_100": 256}.get(target, 512))
    if bd <= 128 and blackwell:
        return 64, 64, bd, 8 if total and product else 4, 2
    if bd <= 128 and target == "sm_90":
        return (64, 128, bd, 4, 2) if product else (128, 128, bd, 8, 2)
    wide = {512: (64, 32, 2), 256: (128 if d <= 256 else 64, 32 if blackwell else 64, 2)}
    bm, bn, stages = wide.get(bd, (64, 32, 2) if target == "small" else (128, 64, 3))
    return bm, bn, bd, 8, stages


def features(bd, parts, shift, target):
    """Return whether descriptors load the tiles, and whether some warps only load and multiply: without a spill."""
    return target in ("sm_90", "sm_100") and bd <= 256, target == "sm_100" and parts == 1 and bd <= 128 and not shift


def _scaling(scale, dtype):
    """As `blocked.scaling`; c is a tensor, read by way of a pointer, for a scale on the GPU, and in float64."""
    root, c, shift = blocked.scaling(scale)
    return root, torch.tensor(c, dtype=dtype) if dtype == torch.float64 else c, shift


def _walk(rows, cols, c, offset, row_labels, col_labels, *of_rows_and_columns, shift, total, product):
    """Launch the kernel; return the splits' maxima, totals and sums (splits, M, d)."""
    (m, *_, d), parts, cols = rows.shape, rows.ndim - 1, rows if cols is None else cols
    acc, target = torch.promote_types(rows.dtype, torch.float32), target_of(rows.device)
    bm, bn, bd, warps, stages = configuration(total, product, d, parts, target)
    blocks, tiles = triton.cdiv(m, bm), triton.cdiv(len(cols), bn)
    per_split = triton.cdiv(tiles, max(1, min(PROGRAMS // blocks, tiles // 4)))  # at least four tiles for a program
    chunks, splits = triton.cdiv(d, bd), triton.cdiv(tiles, per_split)
    tma, specialize = features(bd, parts, shift, target)
    z, y = rows.flatten(1), cols.flatten(1)
    if tma:
        z, y = TensorDescriptor.from_tensor(z, [bm, bd]), TensorDescriptor.from_tensor(y, [bn, bd])
    new = lambda *shape: torch.empty(splits, *shape, dtype=acc, device=rows.device)  # noqa: E731
    maxima, totals, sums = new(m * total), new(m * total), new(m * product, d)
    walk_kernel[blocks, splits, chunks if product else 1](
        z, y, c, row_labels, col_labels, *of_rows_and_columns, maxima, totals, sums, m, len(cols), d, offset,
        per_split * bn, BM=bm, BN=bn, BD=bd, CHUNKS=chunks, PARTS=parts, TMA=tma, ACC=SUM_TYPE[rows.dtype],
        SPECIALIZE=specialize, POINTER=isinstance(c, torch.Tensor),
        LABELS=row_labels is not None, SHIFT=shift, TOTAL=total, PRODUCT=product, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return maxima, totals, sums


def unit_rows(x1, x2, x3, scale, dtype):
    """As `logsumexp.unit_rows`."""
    given, acc = [x1 if x is None else x for x in (x1, x2, x3)], torch.promote_types(torch.float32, dtype)
    lengths, d = [0 if x is None else len(x) for x in (x1, x2, x3)], x1.shape[1]
    shape, dtype = stored(sum(lengths), d, dtype)
    z, inverse = torch.empty(shape, dtype=dtype, device=x1.device), x1.new_empty(shape[0], dtype=acc)
    unit_rows_kernel[shape[:1]](
        *given, z, inverse, blocked.scaling(scale)[0], *lengths[:2], d, *(s for x in given for s in x.stride()),
        WIDTH=shape[-1], BD=triton.next_power_of_2(shape[-1]), PARTS=z.ndim - 1, ACC=SUM_TYPE[dtype],
    )  # fmt: skip
    return z, inverse


def forward(rows, cols, pairs, sides, scale, offset, row_labels, col_labels, emit, room):
    """As `logsumexp.forward`; no E is kept."""
    m, *_, d = rows.shape
    _, c, shift = _scaling(scale, rows.dtype)
    shape, none, shift = (offset, row_labels, col_labels), (None,) * 4, shift or emit  # float16 holds E up to 1 only
    maxima, totals, sums = _walk(rows, cols, c, *shape, *none, shift=shift, total=True, product=emit)
    each, w, top, a, out = (totals.new_empty(n) for n in (m, m * (sides > 0), m, m, (m * emit, d)))
    finish_kernel[(m,)](
        maxima, totals, sums, pairs, c, each, w, top, a, out, m, len(pairs) // 2, d, len(totals), WIDTH=d,
        BD=triton.next_power_of_2(d), PARTS=rows.ndim - 1, POINTER=isinstance(c, torch.Tensor), SIDES=sides,
        EMIT=emit, ACC=SUM_TYPE[rows.dtype],
    )  # fmt: skip
    return each, w, top, a, out, a.new_empty(0)


def backward(
    rows, cols, scale, offset, row_labels, col_labels, row_m, row_a, col_m, col_a, out, kept,
    pairs, sides, w, unit, inverse, d, dtype,
):  # fmt: skip
    """As `logsumexp.backward`."""
    (m, *_, width), emit = rows.shape, out is not None
    root, c, shift = _scaling(scale, rows.dtype)
    if not emit:
        given = rows, cols, c, offset, row_labels, col_labels, row_m, row_a, col_m, col_a
        out = _walk(*given, shift=shift, total=False, product=True)[2]
    dx, along = torch.empty(m, d, dtype=dtype, device=rows.device), torch.empty_like(inverse)
    input_gradient_kernel[(m,)](
        out, rows, pairs, inverse, w, unit, c, dx, along, root, m, len(pairs) // 2, d, 1 if emit else len(out),
        WIDTH=width, BD=triton.next_power_of_2(d), PARTS=rows.ndim - 1, POINTER=isinstance(c, torch.Tensor),
        SIDES=sides, EMIT=emit, ACC=SUM_TYPE[rows.dtype],
    )  # fmt: skip
    return dx, along
