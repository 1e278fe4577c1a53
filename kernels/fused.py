"""The log-sum-exp in four Triton kernels. Nothing of size M x K is ever stored, nothing is added atomically.

Unit rows z_i (M, d), unit columns k_j (K, d), beta = 1/temperature, and c = beta log2(e): exp as a power of two.

    (1)  s_ij = c z_i . k_j                          E_ij = 2^(s_ij - m_i)
    (2)  total_i = sum_j E_ij                        lse_i = m_i log(2) + log total_i
    (3)  dL/dz_i = beta sum_j W_ij k_j               W_ij = E_ij a_i (+ E_ji b_j),   a_i = (dL/dlse_i) / total_i
    (4)  out_i = sum_j E_ij k_j / total_i            the gradient of lse_i by z_i, over beta
    (5)  z = x / |x|                                 dx = (dz - z <z, dz>) / |x|

A program owns a block of rows and walks over the columns, so a tile of s lives in registers only. For beta <= 64 no
shift is needed (SHIFT false: m = 0), E is symmetric when the columns are the rows, and one exponential serves both
terms of W: W_ij = E_ij (a_i + b_j). With SHIFT, m is the running maximum, as in online softmax. When there are few
rows, the columns are split over programs and the parts added in a fixed order; how many depends on the shape alone.
Rows too wide for one tile are taken in CHUNKS of BD: s is their sum, and each chunk of an output has its own program.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .blocked import needs_shift

LOG2E = tl.constexpr(1.4426950408889634)
SUM_TYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def unit_rows_kernel(X, Z, Inverse, d, stride_m, stride_d, BD: tl.constexpr, ACC: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BD)
    x = tl.load(X + i * stride_m + c * stride_d, mask=c < d, other=0.0).to(ACC)
    largest = tl.maximum(tl.max(tl.abs(x), 0), 1e-12)
    x = x / largest  # at most 1: the square of 2e19 overflows
    inverse = 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1.0)
    tl.store(Inverse + i, inverse / largest)
    tl.store(Z + i * d + c, (x * inverse).to(Z.dtype.element_ty), mask=c < d)  # (5)


@triton.jit
def unit_rows_backward_kernel(DZ, Z, Inverse, DX, d, BD: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BD)
    dz = tl.load(DZ + i * d + c, mask=c < d, other=0.0)
    z = tl.load(Z + i * d + c, mask=c < d, other=0.0)
    inverse = tl.load(Inverse + i)
    along = tl.where(inverse < 1e12, tl.sum(z * dz, 0), 0.0)  # a row shorter than 1e-12 is divided by a constant
    tl.store(DX + i * d + c, ((dz - z * along) * inverse).to(DX.dtype.element_ty), mask=c < d)  # (5)


@triton.jit
def load_tile(Z, i, M, d, chunk, BD: tl.constexpr):
    """Rows i and columns chunk BD, ... of Z, zero outside."""
    c = chunk * BD + tl.arange(0, BD)
    return tl.load(Z + i.to(tl.int64)[:, None] * d + c[None, :], mask=(i[:, None] < M) & (c[None, :] < d), other=0.0)


@triton.jit
def similarity(
    z, k, Z, C, RowLabel, ColLabel, i0, j0, M, K, d, c, offset,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, LABELS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Equation 1 for one tile; -inf where the sum leaves a column out."""
    i, j = i0 + tl.arange(0, BM), j0 + tl.arange(0, BN)
    if CHUNKS == 1:
        s = tl.dot(z, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    else:
        s = tl.zeros((BM, BN), ACC)
        for chunk in range(CHUNKS):
            zc, kc = load_tile(Z, i, M, d, chunk, BD), load_tile(C, j, K, d, chunk, BD)
            s += tl.dot(zc, tl.trans(kc), input_precision=PRECISION, out_dtype=ACC)
    s = s * c  # (1)
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
def forward_kernel(
    Z, C, Scale, RowLabel, ColLabel, Max, Total, Out, M, K, d, offset, columns_per_split,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, LABELS: tl.constexpr,
    SHIFT: tl.constexpr, EMIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i0, split, chunk = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    i = i0 + tl.arange(0, BM)
    c = tl.load(Scale) * LOG2E
    z = load_tile(Z, i, M, d, 0, BD)
    total = tl.zeros((BM,), ACC)
    m = tl.zeros((BM,), ACC)
    if SHIFT:
        m -= 2 * c  # below every s, and finite
    if EMIT:
        out = tl.zeros((BM, BD), ACC)
    low = split * columns_per_split
    for j0 in range(low, tl.minimum(low + columns_per_split, K), BN):
        k = load_tile(C, j0 + tl.arange(0, BN), K, d, chunk, BD)
        s = similarity(
            z, k, Z, C, RowLabel, ColLabel, i0, j0, M, K, d, c, offset, BM, BN, BD, CHUNKS, LABELS, ACC, PRECISION
        )
        if SHIFT:
            m_new = tl.maximum(m, tl.max(s, 1))
            shrink = tl.exp2(m - m_new)
            e = tl.exp2(s - m_new[:, None])
            total, m = total * shrink, m_new
            if EMIT:
                out = out * shrink[:, None]
        else:
            e = tl.exp2(s)
        total += tl.sum(e, 1)  # (2)
        if EMIT:
            out = tl.dot(e.to(k.dtype), k, out, input_precision=PRECISION, out_dtype=ACC)  # (4)
    row = split.to(tl.int64) * M + i
    if chunk == 0:
        tl.store(Max + row, m, mask=i < M)
        tl.store(Total + row, total, mask=i < M)
    if EMIT:
        col = chunk * BD + tl.arange(0, BD)
        tl.store(Out + row[:, None] * d + col[None, :], out, mask=(i[:, None] < M) & (col[None, :] < d))


@triton.jit
def backward_kernel(
    Z, C, Scale, RowLabel, ColLabel, RowM, RowA, ColM, ColA, DZ, M, K, d, offset, columns_per_split,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, LABELS: tl.constexpr,
    SHIFT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i0, split, chunk = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    i = i0 + tl.arange(0, BM)
    c = tl.load(Scale) * LOG2E
    z = load_tile(Z, i, M, d, 0, BD)
    a = tl.load(RowA + i, mask=i < M, other=0.0)
    if SHIFT:
        row_m = tl.load(RowM + i, mask=i < M, other=float("inf"))
    dz = tl.zeros((BM, BD), ACC)
    low = split * columns_per_split
    for j0 in range(low, tl.minimum(low + columns_per_split, K), BN):
        j = j0 + tl.arange(0, BN)
        k = load_tile(C, j, K, d, chunk, BD)
        s = similarity(
            z, k, Z, C, RowLabel, ColLabel, i0, j0, M, K, d, c, offset, BM, BN, BD, CHUNKS, LABELS, ACC, PRECISION
        )
        b = tl.load(ColA + j, mask=j < K, other=0.0)
        if SHIFT:  # two maxima, so two exponentials
            col_m = tl.load(ColM + j, mask=j < K, other=float("inf"))
            w = tl.exp2(s - row_m[:, None]) * a[:, None] + tl.exp2(s - col_m[None, :]) * b[None, :]
        else:
            w = tl.exp2(s) * (a[:, None] + b[None, :])  # (3)
        dz = tl.dot(w.to(k.dtype), k, dz, input_precision=PRECISION, out_dtype=ACC)  # (3)
    row, col = split.to(tl.int64) * M + i, chunk * BD + tl.arange(0, BD)
    tl.store(DZ + row[:, None] * d + col[None, :], dz, mask=(i[:, None] < M) & (col[None, :] < d))


def configuration(d, dtype, precision, target):
    """Return BM, BN, BD, warps and stages: what registers and shared memory of the target hold without a spill.

    `precision` of the products as in tl.dot; `target`: "sm_80", "sm_90", "sm_100", or "small" for any other.
    """
    bd = max(16, triton.next_power_of_2(d))
    if precision == "tf32x3":  # the parts of each operand live in registers
        return 64, 32, min(bd, 32), 8, 2
    half, small, blackwell = dtype == torch.float16, target == "small", target == "sm_100"
    bd = min(bd, (128 if half else 64) if small else 256 if half and blackwell else 512)
    if half:
        wide = {512: (64, 32, 2), 256: (128 if d <= 256 else 64, 32 if blackwell else 64, 2)}
        bm, bn, stages = wide.get(bd, (64, 32, 2) if small else (128, 64, 3))
        return bm, bn, bd, 8, stages
    bm, bn, stages = {512: (32, 16, 1), 256: (64, 16 if blackwell else 32, 2)}.get(bd, (64, 32, 2))
    return bm, bn, bd, 8 if bd >= 256 or (bd >= 64 and (blackwell or small)) else 4, stages


def _launch(rows, cols, scale):
    """Return what both directions share: the accumulator's dtype, scale, grid, columns a split, other arguments."""
    (m, d), k, device = rows.shape, len(cols), rows.device
    acc, precision, target = torch.float64 if rows.dtype == torch.float64 else torch.float32, "ieee", "sm_90"
    if device.type == "cuda":
        target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        if torch.version.hip or target not in ("sm_80", "sm_90", "sm_100"):
            target = "small"
        if not torch.version.hip and rows.dtype == torch.float32:
            precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    bm, bn, bd, warps, stages = configuration(d, rows.dtype, precision, target)
    blocks, tiles, chunks = triton.cdiv(m, bm), triton.cdiv(k, bn), triton.cdiv(d, bd)
    splits = max(1, min(256 // blocks, tiles // 4, 32))  # few rows: more programs, each with four tiles or more
    per_split = triton.cdiv(tiles, splits)
    if not scale.is_cuda:  # to the device without a copy, which would synchronise
        scale = torch.full((), scale.item(), dtype=acc, device=device)
    meta = dict(
        BM=bm, BN=bn, BD=bd, CHUNKS=chunks, ACC=SUM_TYPE[acc], PRECISION=precision, num_warps=warps, num_stages=stages
    )  # fmt: skip
    return acc, scale.to(acc), (blocks, triton.cdiv(tiles, per_split), chunks), per_split * bn, meta


def _padded(rows, cols):
    """Both with zeros up to a width of 16: of any other one the loads are narrow, and registers spill."""
    short = -rows.shape[1] % 16
    rows, cols = (F.pad(x, (0, short)) if short and x is not None else x for x in (rows, cols))
    return rows, rows if cols is None else cols


def forward(rows, cols, scale, offset, row_labels, col_labels, emit):
    """Return m (M,), total (M,) of equation 2, and out (M, d) of equation 4 when `emit`, else (0, d)."""
    shift = needs_shift(scale) or emit  # float16 holds E only when it is at most 1
    width, rows, cols = rows.shape[1], *_padded(rows, cols)
    acc, scale, grid, per_split, meta = _launch(rows, cols, scale)
    m, d = rows.shape
    new = dict(dtype=acc, device=rows.device)
    top, total = torch.empty(grid[1], m, **new), torch.empty(grid[1], m, **new)
    out = torch.empty(grid[1], m if emit else 0, d, **new)
    forward_kernel[grid if emit else (*grid[:2], 1)](
        rows, cols, scale, row_labels, col_labels, top, total, out, m, len(cols), d, offset, per_split,
        LABELS=row_labels is not None, SHIFT=shift, EMIT=emit, **meta,
    )  # fmt: skip
    out = out[..., :width]
    highest = top.amax(0)
    shrink = torch.exp2(top - highest)
    total = (total * shrink).sum(0)
    return highest, total, (out * shrink[:, :, None]).sum(0) / total[:, None] if emit else out[0]


def backward(rows, cols, scale, offset, row_labels, col_labels, row_m, row_a, col_m, col_a):
    """Return sum_j W_ij k_j (M, d) of equation 3."""
    shift = needs_shift(scale)
    width, rows, cols = rows.shape[1], *_padded(rows, cols)
    acc, scale, grid, per_split, meta = _launch(rows, cols, scale)
    dz = torch.empty(grid[1], *rows.shape, dtype=acc, device=rows.device)
    backward_kernel[grid](
        rows, cols, scale, row_labels, col_labels, row_m, row_a, col_m, col_a, dz,
        *rows.shape[:1], len(cols), rows.shape[1], offset, per_split,
        LABELS=row_labels is not None, SHIFT=shift, **meta,
    )  # fmt: skip
    return dz.sum(0)[:, :width].contiguous() if grid[1] > 1 else dz[0, :, :width].contiguous()


def unit_rows(x, dtype):
    """Return x / |x| (M, d) in `dtype` and 1 / |x| (M,), |x| no smaller than 1e-12."""
    (m, d), acc = x.shape, torch.promote_types(torch.float32, dtype)
    z, inverse = torch.empty(m, d, dtype=dtype, device=x.device), torch.empty(m, dtype=acc, device=x.device)
    unit_rows_kernel[(m,)](x, z, inverse, d, *x.stride(), triton.next_power_of_2(d), SUM_TYPE[acc])
    return z, inverse


def unit_rows_backward(dz, z, inverse, dtype):
    """Return dL/dx (M, d) of equation 5 in `dtype`."""
    dx = torch.empty(dz.shape, dtype=dtype, device=dz.device)
    unit_rows_backward_kernel[(len(dz),)](dz, z, inverse, dx, dz.shape[1], triton.next_power_of_2(dz.shape[1]))
    return dx
