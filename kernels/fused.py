"""The log-sum-exp, and the losses made of it, in four Triton kernels. Equations are those of `logsumexp`.

A program owns a block of rows and walks over their columns, so a tile of s lives in registers only. Nothing of size
M x K is stored, and no addition is atomic. If there are few rows, several programs share a block's columns; their parts
are added in a fixed order, and the number of parts depends on the shape alone. A row too wide for one tile is cut into
chunks of width BD: s is the sum over the chunks, and each chunk of an output has its own program. Tensor cores truncate
as they accumulate, so each tile starts with a fresh accumulator, and ordinary float32 additions sum the tiles.
"""

import itertools
from collections import namedtuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import blocked
from .blocked import Rows

LN2 = tl.constexpr(blocked.LN2)
WEIGHT = tl.constexpr(8192)  # the largest weight after scaling; an element of W, at most twice as large, fits float16
PROGRAMS = 264  # the number to aim for if there are few rows: two on each of the 132 multiprocessors of an H100
# What a kernel is compiled for. A tile has BM rows and BN columns, a row `chunks` chunks of width BD, a number `parts`
# float16. pointer: c is in memory; total: compute (2), else (4); emit: with (2), also sum E k; meet: the columns are
# the rows; both: all rows are anchors. The other fields are as in `Layout` and `scaling`.
How = namedtuple(
    "How", "BM BN BD chunks parts descriptors pointer shift total emit meet pair both cross classes",
    defaults=(0, 0, 0, 1, 1, *(False,) * 10),
)  # fmt: skip


@triton.jit
def load_rows(Z, i, M, width, how: tl.constexpr, ACC: tl.constexpr):
    """Load the rows i of the unit rows Z, (len(i), BD)."""
    col = tl.arange(0, how.BD)
    at, inside = Z + i[:, None] * (how.parts * width) + col, (i < M)[:, None] & (col < width)
    z = tl.load(at, mask=inside, other=0.0).to(ACC)
    return z + tl.load(at + width, mask=inside, other=0.0).to(ACC) if how.parts == 2 else z


@triton.jit
def unit_rows_kernel(X, strides, starts, Z, Inverse, root, d, width, how: tl.constexpr):
    ACC: tl.constexpr = Inverse.dtype.element_ty
    i, col = tl.program_id(0).to(tl.int64) * how.BM + tl.arange(0, how.BM), tl.arange(0, how.BD).to(tl.int64)
    r, x, M = i[:, None], tl.zeros_like(i[:, None] * col).to(ACC), starts[3]
    for k in tl.static_range(3):
        if X[k] is not None:
            at, inside = X[k] + (r - starts[k]) * strides[2 * k] + col * strides[2 * k + 1], col < d
            x += tl.load(at, mask=(r >= starts[k]) & (r < starts[k + 1]) & inside, other=0.0).to(ACC)
    largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-12)
    x = x / largest[:, None]  # entries of at most 1: the square of 2e19 would overflow
    inverse = 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1.0)
    tl.store(Inverse + i, inverse / largest, mask=i < M)
    z, at, inside = x * (inverse * root)[:, None], Z + r * (how.parts * width) + col, (r < M) & (col < width)  # (6)
    high = z.to(Z.dtype.element_ty)
    tl.store(at, high, mask=inside)
    if how.parts == 2:
        tl.store(at + width, (z - high.to(ACC)).to(high.dtype), mask=inside)


@triton.jit
def load_tile(Z, i0, M, d, chunk, B: tl.constexpr, how: tl.constexpr):
    """Load a chunk of B rows of Z from row i0 on: its high part, and its low part if there is one. Zero outside Z."""
    BD: tl.constexpr = how.BD
    if how.descriptors:
        high = Z.load([i0, chunk * BD])
        low = Z.load([i0, (chunk + how.chunks) * BD]) if how.parts == 2 else high
    else:
        i, col, width = i0 + tl.arange(0, B)[:, None], chunk * BD + tl.arange(0, BD)[None, :], how.parts * d
        at = Z + i.to(tl.int64) * width + col
        high = tl.load(at, mask=(i < M) & (col < d), other=0.0)
        low = tl.load(at + d, mask=(i < M) & (col < d), other=0.0) if how.parts == 2 else high
    return high, low


@triton.jit
def product(x, x_low, y, y_low, how: tl.constexpr, ACC: tl.constexpr):
    """Return x y. If numbers have two parts, low times low is left out: float32 would round it away."""
    sums = tl.dot(x, y, out_dtype=ACC)
    if how.parts == 2:
        sums = tl.dot(x, y_low, tl.dot(x_low, y, sums, out_dtype=ACC), out_dtype=ACC)
    return sums


@triton.jit
def walk_kernel(Z, Y, row, col, Top, C, Max, Total, Sums, M, K, d, n, whole, first, per_split, how: tl.constexpr):
    """Over one split's columns, sum (2), or (4), minus (5) if there is a b. row, col: `Rows` without z."""
    RowLabel, RowM, RowA, RowB = row
    ColLabel, ColM, ColA, ColB = col
    BM: tl.constexpr = how.BM
    BN: tl.constexpr = how.BN
    BD: tl.constexpr = how.BD
    ACC: tl.constexpr = Sums.dtype.element_ty
    block, split, chunk, blocks = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.cdiv(n, BM)
    part = (block >= blocks).to(tl.int32)  # no block holds rows of both parts
    i0 = block * BM - part * (blocks * BM - n)
    own, partner = i0 - part * n + first + part * whole, i0 - part * n + first + (1 - part) * whole
    low, high = 0, K
    if how.cross:
        low, high = (1 - part) * whole, K - part * (K - whole)
    low += split * per_split
    high = tl.minimum(high, low + per_split)

    i, r = i0 + tl.arange(0, BM), tl.arange(0, BM)[:, None]
    c = tl.load(C).to(ACC) if how.pointer else C
    z, z_low = load_tile(Z, i0, M, d, 0, BM, how)
    total, m, sums = tl.zeros((BM,), ACC), tl.zeros((BM,), ACC), tl.zeros((BM, BD), ACC)
    if RowLabel is not None:
        row_label = tl.load(RowLabel + i, mask=i < M, other=-1)[:, None]
    if how.total:
        m -= 3e38 if how.shift else 0.0  # below every s, and finite
    else:
        gain = WEIGHT / tl.maximum(tl.load(Top).to(ACC), 1e-30)  # W then fills the range of float16
        row_a = tl.load(RowA + i, mask=i < M, other=0.0) * gain
        m = tl.load(RowM + i, mask=i < M, other=float("inf")) if how.shift else m
        if RowB is not None:
            row_b = tl.load(RowB + i, mask=i < M, other=0.0) * gain
    for j0 in range(low, high, BN):
        j = j0 + tl.arange(0, BN)
        k, k_low = load_tile(Y, j0, K, d, chunk, BN, how)
        if how.chunks == 1:
            s = product(z, z_low, tl.trans(k), tl.trans(k_low), how, ACC)
        else:
            s = tl.zeros((BM, BN), ACC)
            for each in range(how.chunks):
                zc, zc_low = load_tile(Z, i0, M, d, each, BM, how)
                kc, kc_low = load_tile(Y, j0, K, d, each, BN, how)
                s += product(zc, zc_low, tl.trans(kc), tl.trans(kc_low), how, ACC)  # (1)
        at_own, at_partner = (j0 < own + BM) & (own < j0 + BN), (j0 < partner + BM) & (partner < j0 + BN)
        if (j0 + BN > high) | (how.meet & at_own) | (how.meet & how.pair & at_partner):
            inside = (j < high)[None, :] & (r < BM)  # masks in every tile would cost as much as its exponentials
            if how.meet:
                inside &= j[None, :] - own != r
                if how.pair:
                    inside &= j[None, :] - partner != r
            s = tl.where(inside, s, float("-inf"))
        if RowLabel is not None:
            same = row_label == tl.load(ColLabel + j, mask=j < K, other=-1)[None, :]
            if how.classes != 0:
                s = tl.where(same if how.classes > 0 else ~same, s, float("-inf"))
        if how.total:
            if how.shift:
                m_new = tl.maximum(m, tl.max(s, 1) * c)
                shrink = tl.exp2(m - m_new)
                total, m, sums = total * shrink, m_new, sums * shrink[:, None]
            w = tl.exp2(s * c - m[:, None]) if how.shift else tl.exp2(s)
            total += tl.sum(w, 1)  # (2)
        else:
            col_a = tl.load(ColA + j, mask=j < K, other=0.0) * gain
            if how.shift:  # two shifts, so two exponentials
                col_m = tl.load(ColM + j, mask=j < K, other=float("inf"))
                w = tl.exp2(s * c - m[:, None]) * row_a[:, None] + tl.exp2(s * c - col_m[None, :]) * col_a[None, :]
            else:
                w = tl.exp2(s) * (row_a[:, None] + col_a[None, :])  # (4)
            if RowB is not None:  # (5)
                b = row_b[:, None] + (tl.load(ColB + j, mask=j < K, other=0.0) * gain)[None, :]
                w -= tl.where(same & (j[None, :] - own != r), b, 0.0)
        if how.emit or not how.total:
            w_high = w.to(k.dtype)
            sums += product(w_high, (w - w_high.to(ACC)).to(k.dtype), k, k_low, how, ACC)

    at, feature, there = split.to(tl.int64) * M + i, chunk * BD + tl.arange(0, BD)[None, :], i < (n if i0 < n else M)
    if how.total and chunk == 0:
        tl.store(Max + at, m, mask=there)
        tl.store(Total + at, total, mask=there)
    if how.emit or not how.total:
        tl.store(Sums + at[:, None] * d + feature, sums, mask=there[:, None] & (feature < d))


@triton.jit
def finish_kernel(Max, Total, Sums, Pairs, C, Loss, Q, M_, A, Out, M, n, width, splits, how: tl.constexpr):
    """Add the splits' parts, and store what `forward` returns."""
    ACC: tl.constexpr = A.dtype.element_ty
    i, col = tl.program_id(0).to(tl.int64) * how.BM + tl.arange(0, how.BM), tl.arange(0, how.BD)[None, :]
    there, inside, partner = i < M, (i < M)[:, None] & (col < width), tl.where(i < n, i + n, i - n)
    total, out = tl.zeros_like(i).to(ACC), tl.zeros_like(i[:, None] * col).to(ACC)
    m = tl.load(Max + i, mask=there, other=0.0)
    for part in range(1, splits):
        m = tl.maximum(m, tl.load(Max + part * M + i, mask=there, other=0.0))
    for part in range(splits):
        shrink = tl.exp2(tl.load(Max + part * M + i, mask=there, other=0.0) - m)
        total += tl.load(Total + part * M + i, mask=there, other=1.0) * shrink
        if how.emit:
            out += tl.load(Sums + (part * M + i)[:, None] * width + col, mask=inside, other=0.0) * shrink[:, None]
    loss, q = m * LN2 + tl.log(total), total * 0 + 1
    if how.pair:  # (3): softplus and its derivative
        cosine = load_rows(Pairs, i, M, width, how, ACC) * load_rows(Pairs, partner, 2 * n, width, how, ACC)
        loss -= tl.sum(cosine, 1) * ((tl.load(C).to(ACC) if how.pointer else C) * LN2)
        y = tl.exp(-tl.abs(loss))
        u = 1 + y
        q = tl.where(loss > 0, 1.0, y) / u
        log_u = tl.where(u == 1, y, tl.log(u) * (y / tl.where(u == 1, 1.0, u - 1)))  # log(1 + y), with y as it was
        loss = tl.maximum(loss, 0.0) + log_u
        tl.store(Q + i, q, mask=there)
    tl.store(Loss + i, loss, mask=there)
    tl.store(M_ + i, m, mask=there)
    tl.store(A + i, tl.where(total == 0, 0.0, q / total), mask=there)  # no columns: no gradient
    if how.emit:
        tl.store(Out + i[:, None] * width + col, out / total[:, None], mask=inside)


@triton.jit
def input_gradient_kernel(
    Sums, Z, Pairs, Inverse, W, Top, Unit, C, DX, Along, root, M, n, d, width, splits, how: tl.constexpr
):
    """Add the splits' parts and the partner's term, and store what `backward` returns."""
    ACC: tl.constexpr = Sums.dtype.element_ty
    i, col = tl.program_id(0).to(tl.int64) * how.BM + tl.arange(0, how.BM), tl.arange(0, how.BD)[None, :]
    there, inside, partner = i < M, (i < M)[:, None] & (col < width), tl.where(i < n, i + n, i - n)
    dz = tl.zeros_like(i[:, None] * col).to(ACC)
    for part in range(splits):
        dz += tl.load(Sums + (part * M + i)[:, None] * width + col, mask=inside, other=0.0)
    top, w = tl.load(Top).to(ACC), tl.load(W + i, mask=there, other=0.0)
    gain = WEIGHT / tl.maximum(top, 1e-30)
    if how.emit:
        dz *= (w * gain)[:, None]
    if how.pair:
        if how.both:  # the partner, an anchor too, has this row as its positive
            w += tl.load(W + partner, mask=there, other=0.0)
        dz -= load_rows(Pairs, partner, 2 * n, width, how, ACC) * (w * gain)[:, None]
    dz *= tl.load(Unit) * top / WEIGHT * ((tl.load(C).to(ACC) if how.pointer else C) * LN2 * root)
    z, inverse = load_rows(Z, i, M, width, how, ACC) / root, tl.load(Inverse + i, mask=there, other=0.0)
    along = tl.sum(z * dz, 1)
    tl.store(Along + i, along, mask=there)
    dx = dz - z * tl.where(inverse < 0.9999e12, along, 0.0)[:, None]  # no such term if |x| counts as 1e-12
    tl.store(DX + i[:, None] * d + col, (dx * inverse[:, None]).to(DX.dtype.element_ty), mask=inside & (col < d))  # (6)


def target_of(device):
    """Return the target of `configuration`: "sm_80", "sm_90" or "small". The interpreter takes "sm_90"."""
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm_90"
    return name if name in ("sm_80", "sm_90") and not torch.version.hip else "small"


def power_of_two(x):
    return max(16, 1 << (x - 1).bit_length())  # the smallest power that is at least x and at least 16


def stored(m, d, dtype):
    """Return the shape and dtype of M unit rows as they are stored: usually (M, width), each number one float16.

    For float32 with torch.get_float32_matmul_precision() "highest" they are (M, 2, width), each number two float16,
    high + low, so that products are as exact as in float32. Other settings allow tf32, whose mantissa float16 has."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return (m, 2, power_of_two(d) if d <= 512 else -(-d // 512) * 512), torch.float16
    return (m, -(-d // 16) * 16), dtype if dtype == torch.float64 else torch.float16


def configuration(product, classes, d, parts, target):
    """Return BM, BN, BD, warps and stages that fit the target's registers and shared memory without a spill."""
    bd = power_of_two(d)
    if parts == 2:
        return (64, 64, min(bd, 128), 4, 2) if target == "sm_90" else (64, 32, min(bd, 64), 8 if bd > 64 else 4, 2)
    bd = min(bd, 128 if target == "small" else 512)
    if bd <= 128 and target == "sm_90":
        return (64, 64 if classes else 128, bd, 4, 2) if product else (128, 128, bd, 8, 2)
    wide = {512: (64, 32, bd, 8, 2), 256: (128 if target == "sm_90" and d <= 256 and not classes else 64, 64, bd, 8, 2)}
    return wide.get(bd, (64, 32, bd, 8, 2) if target == "small" else (128, 64, bd, 8, 3))


def _scaling(z, scale):
    """As `blocked.scaling`. For a scale on the GPU, or in float64, c is a tensor which kernels read by a pointer."""
    root, c, shift = blocked.scaling(scale)
    return root, torch.tensor(c, dtype=z.dtype) if z.dtype == torch.float64 else c, shift


def _walk(rows, cols, top, c, layout, shift, total, emit):
    """Launch `walk_kernel`; return each split's maxima (splits, M), totals (splits, M) and sums (splits, M, d)."""
    (m, *_, d), k, parts, n = rows.z.shape, len(cols.z), rows.z.ndim - 1, min(layout.n, len(rows.z))
    target, product = target_of(rows.z.device), emit or not total
    bm, bn, bd, warps, stages = configuration(product, rows.label is not None, d, parts, target)
    blocks, met = -(-n // bm) + -(-(m - n) // bm), max(layout.whole, k - layout.whole) if layout.cross else k
    tiles, chunks = -(-met // bn), -(-d // bd)
    per_split = -(-tiles // max(1, min(PROGRAMS // blocks, tiles // 4)))  # at least four tiles a program
    splits = -(-tiles // per_split)
    how = How(
        bm, bn, bd, chunks, parts, target == "sm_90" and bd <= 256, isinstance(c, torch.Tensor), shift, total, emit,
        layout.first >= 0, layout.pair, False, layout.cross, layout.classes,
    )  # fmt: skip
    z, y = rows.z.flatten(1), cols.z.flatten(1)
    if how.descriptors:
        z, y = TensorDescriptor.from_tensor(z, [bm, bd]), TensorDescriptor.from_tensor(y, [bn, bd])
    acc, shapes = torch.promote_types(rows.z.dtype, torch.float32), ((m * total,), (m * total,), (m * product, d))
    found = [rows.z.new_empty(splits, *shape, dtype=acc) for shape in shapes]
    walk_kernel[blocks, splits, chunks if product else 1](
        z, y, rows[1:], cols[1:], top, c, *found, m, k, d, n, layout.whole, layout.first, per_split * bn, how,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return found


def _rows(z, c=None, **how):
    """Return `How` and the grid for a kernel that works on whole rows."""
    bd, bm = power_of_two(z.shape[-1]), max(1, 2048 // power_of_two(z.shape[-1]))
    return How(bm, BD=bd, parts=z.ndim - 1, pointer=isinstance(c, torch.Tensor), **how), (-(-len(z) // bm),)


def unit_rows(x1, x2, x3, scale, dtype):
    """As `blocked.unit_rows`."""
    xs, d = (x1, x2, x3), x1.shape[1]
    starts = tuple(itertools.accumulate((0 if x is None else len(x) for x in xs), initial=0))
    strides = tuple(s for x in xs for s in (x1 if x is None else x).stride())
    shape, to = stored(starts[3], d, dtype)
    z, inverse = x1.new_empty(shape, dtype=to), x1.new_empty(shape[0], dtype=torch.promote_types(torch.float32, dtype))
    (how, grid), root = _rows(z), blocked.scaling(scale)[0]
    unit_rows_kernel[grid](xs, strides, starts, z, inverse, root, d, shape[-1], how)
    return z, inverse


def forward(z, label, col_label, cols, anchors, layout, scale, emit, keep):
    """As `blocked.forward`, but no E is kept."""
    (_, c, shift), width = _scaling(z, scale), z.shape[-1]
    rows, cols = Rows(z[:anchors], label), Rows(z if cols is None else cols, col_label)
    maxima, total, sums = _walk(rows, cols, None, c, layout, shift or emit, True, emit)  # emit: E <= 1 for float16
    shapes = (anchors,), (anchors * layout.pair,), (anchors,), (anchors,), (anchors * emit, width)
    found = [maxima.new_empty(shape) for shape in shapes]
    how, grid = _rows(rows.z, c, pair=layout.pair, emit=emit)
    finish_kernel[grid](maxima, total, sums, z, c, *found, anchors, layout.n, width, len(maxima), how)
    return *found, maxima.new_empty(0)


def backward(rows, cols, pairs, w, top, unit, layout, scale, out, kept, inverse, d, dtype):
    """As `blocked.backward`."""
    (root, c, shift), emit = _scaling(rows.z, scale), out is not None
    if not emit:
        out = _walk(rows, cols, top, c, layout, shift, False, False)[2]
    (m, *_, width), splits = rows.z.shape, 1 if emit else len(out)
    dx, along = rows.z.new_empty(m, d, dtype=dtype), torch.empty_like(inverse)
    how, grid = _rows(rows.z, c, pair=layout.pair, both=len(w) > layout.n, emit=emit)
    input_gradient_kernel[grid](
        out, rows.z, pairs, inverse, w, top, unit, c, dx, along, root, m, layout.n, d, width, splits, how
    )
    return dx, along
