"""The log-sum-exp over tiles of the similarity matrix, in plain PyTorch: the CPU twin of the Triton kernels.

A tile of similarities stays in the cache from its product to its last use. Tiles are large because each operation on
one starts all threads. Where the columns are the rows, a tile serves its rows and, transposed, its columns. The forward
pass keeps the first tiles of E, up to KEEP bytes, for the backward pass. The equations are those of `logsumexp`.
"""

import functools
import math
import threading
from collections import namedtuple

import torch
import torch.nn.functional as F

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
TILE = 768  # rows and columns of a tile
NARROW = 384  # rows of a tile on the diagonal of a triangle of more than 512: it computes its lower half for nothing
KEEP = 32 * 2**20  # bytes of E that a call keeps from its forward to its backward pass; 0: none

# What travels together, of M rows or columns: unit vectors z (M, d), times the root of `scaling`; class numbers (M,);
# m, a and b (M,), the shifts and weights of equations 2, 4 and 5.
Rows = namedtuple("Rows", "z label m a b", defaults=(None,) * 4)
# Which columns a row meets. Columns are the first parts of all processes' rows, then their second parts. n: rows of
# this process's first part; whole: columns of the first part; first: the column of row 0, or -1 if the columns are not
# the rows; pair: leave out the partner, the row of the other part with the same number; cross: meet the other part
# only; classes: 1 to meet the row's class only, -1 to meet the other classes only, 0 to meet all.
Layout = namedtuple("Layout", "n whole first pair cross classes")


def scaling(scale):
    """Return the factor of unit rows, c of equation 1, and whether 2^s needs a shift.

    Without a shift, rows are stored times the root of c, perhaps in float16, so c must not be tiny. A scale on a GPU is
    not read back, because that would wait for the GPU: its c is a tensor.
    """
    if scale.is_cuda:
        return 1.0, scale * LOG2E, True
    c = scale.item() * LOG2E
    return (math.sqrt(c), 1.0, False) if 0.25 <= c <= 64 * LOG2E else (1.0, c, True)


@functools.lru_cache(maxsize=16)
def scratch(thread, dtype):
    """Memory of two tiles. All calls of a thread share it, because the system clears new memory."""
    with torch.inference_mode(False):  # so that calls outside that mode can write to it
        return torch.empty(2, TILE * TILE, dtype=dtype, device="cpu")


def plan(m, k, layout, mirror):
    """Yield the slices of rows and columns of each tile, and of its place when tiles follow one another.

    `mirror`: the columns are the rows, and a tile also serves its columns, so half of the tiles will do.
    """
    blocks = [(0, m, 0, k)]
    if layout.cross:
        blocks = [(0, min(m, layout.n), layout.whole, k), (layout.n, 0 if mirror else m, 0, layout.whole)]
    end = 0
    for low, high, left, right in blocks:
        size = max(1, min(TILE, high - low))
        for i in range(low, high, size):
            i1 = min(i + size, high)
            if mirror and not layout.cross:  # the square on the diagonal, then what is right of it
                narrow = NARROW if size > 512 else size
                tiles = [(r, min(r + narrow, i1), r, i1) for r in range(i, i1, narrow)]
                tiles += [(i, i1, j, min(j + TILE, k)) for j in range(i1, k, TILE)]
            else:
                wide = min(TILE * TILE // size, 4 * TILE)
                tiles = [(i, i1, j, min(j + wide, right)) for j in range(left, right, wide)]
            for r0, r1, j0, j1 in tiles:
                start, end = end, end + (r1 - r0) * (j1 - j0)
                yield slice(r0, r1), slice(j0, j1), slice(start, end)


def unit_rows(x1, x2, x3, scale, dtype):
    """Return the unit rows of all (M, d) times the root of `scaling`, and 1 / |x| (M,), |x| no smaller than 1e-12."""
    given = [x.to(dtype) for x in (x1, x2, x3) if x is not None]
    x = torch.cat(given)  # a copy, which takes the result
    return normalized(x, scaling(scale)[0], x)


def normalized(x, root, out=None):
    """Return root x / |x|, in `out` if it is given, and 1 / |x|, |x| no smaller than 1e-12."""
    norm = torch.linalg.vector_norm(x, dim=1)
    low, high = (0, 0) if x.is_cuda else (each.item() for each in norm.aminmax())  # a GPU would have to be waited for
    if low >= 1e-12 and high < 1e18:
        inverse = norm.reciprocal_()
        return torch.mul(x, (inverse * root).unsqueeze(1), out=out), inverse
    largest = torch.maximum(x.amax(1), -x.amin(1)).clamp_min_(1e-12)
    z = torch.div(x, largest.unsqueeze(1), out=out)  # at most 1: a square can neither overflow nor vanish
    inverse = torch.linalg.vector_norm(z, dim=1).clamp_min_(1).reciprocal_()
    return z.mul_((inverse * root).unsqueeze(1)), inverse / largest


def diagonals(x, i, j, layout):
    """Yield the diagonals of a tile x, rows i and columns j, at which a row meets itself or its partner."""
    n, whole, first, pair, *_ = layout
    own = [(0, 2 * n, first)] if whole == n else [(0, n, first), (n, 2 * n, first + whole - n)]
    partner = [(0, n, first + whole), (n, 2 * n, first - n)] * pair
    for low, high, at in own + partner if first >= 0 else ():  # the rows low to high leave out column row + at
        low, high = max(i.start, low), min(i.stop, high)
        if low < high and low - high < low + at - j.start < j.stop - j.start:
            yield x[low - i.start : high - i.start].diagonal(low + at - j.start)


def _tiles(rows, cols, layout, mirror, kept, filled, c, shift, root=None):
    """Yield the slices of rows and columns of each tile, its columns, its E (s where that needs a shift), and memory.

    What the sum leaves out is 0 in E and -inf in s. `filled`: the kept tiles hold their E. `root`: that of `scaling`,
    if the columns are not of length 1 yet.
    """
    z = rows.z
    memory, more = scratch(threading.get_ident(), z.dtype) if z.is_cpu else z.new_empty(2, TILE * TILE)
    for i, j, at in plan(len(z), len(cols.z), layout, mirror):
        held, zj = at.stop <= len(kept), cols.z[j] if root is None else normalized(cols.z[j], root)[0]
        s = (kept[at] if held else memory[: at.stop - at.start]).view(i.stop - i.start, -1)
        if not (held and filled):
            torch.mm(z[i], zj.T, out=s)
            if shift:
                s *= c
            for diagonal in diagonals(s, i, j, layout):
                diagonal.fill_(-torch.inf)
            if layout.classes:
                same = rows.label[i, None] == cols.label[j]
                s.masked_fill_(~same if layout.classes > 0 else same, -torch.inf)
            if not shift:
                s.exp2_()
        yield i, j, zj, s, more[: s.numel()].view(s.shape)


def forward(z, label, y_label, y, anchors, layout, scale, emit, keep):
    """Return l, q (of pairs), m and a = q / total of the first rows of z, (anchors,) each, out (anchors, d), and E.

    `y` None: the columns are the rows. Without a pair l is lse, and q, not returned, is 1. With `emit`, out_i is the
    gradient of lse_i by z_i over beta, sum_j E_ij k_j / total_i, and y has rows of any length. `keep` some tiles of E.
    """
    root, c, shift = scaling(scale)
    rows, cols = Rows(z[:anchors], label), Rows(z, label) if y is None else Rows(y, y_label)
    mirror = y is None and not shift and anchors == len(z)
    total, out = z.new_zeros(anchors), z.new_zeros(anchors if emit else 0, z.shape[1])
    ends = (at.stop for *_, at in plan(anchors, len(cols.z), layout, mirror)) if keep and not emit and not shift else ()
    kept = z.new_empty(max((end for end in ends if end * z.itemsize <= KEEP), default=0))
    m = z.new_full((anchors,), -3e38 if shift else 0)  # below every s, and finite
    for i, j, zj, e, _ in _tiles(rows, cols, layout, mirror, kept, False, c, shift, root if emit else None):
        if shift:  # keep the running maximum
            m_new = torch.maximum(m[i], e.amax(1))
            shrink = torch.exp2(m[i] - m_new)
            total[i].mul_(shrink)
            if emit:
                out[i].mul_(shrink.unsqueeze(1))
            m[i] = m_new
            e.sub_(m_new.unsqueeze(1)).exp2_()
        total[i].add_(e.sum(1))  # (2)
        start = max(i.stop, j.start)  # from here on a column is no row of the tile
        if mirror and start < j.stop:  # the same tile, seen from its columns
            total[start : j.stop].add_(e[:, start - j.start :].sum(0))
        if emit:
            out[i].addmm_(e, zj)
    each, q = total.log(), total.new_empty(0)
    if shift:
        each += m * LN2
    if layout.pair:  # (3)
        n = layout.n
        each.view(-1, n).sub_(torch.linalg.vecdot(z[:n], z[n : 2 * n]) * (c * LN2))
        q, each = torch.sigmoid(each), F.softplus(each, threshold=40)  # beyond it float64 rounds to x as well
    a = ((q if layout.pair else 1) / total).masked_fill_(total == 0, 0)  # a row without columns has no gradient
    return each, q, m, a, out.div_(total.unsqueeze(1)) if emit else out, kept


def backward(rows, cols, pairs, w, top, unit, layout, scale, out, kept, inverse, d, dtype):
    """Return dL/dx (M, d) in `dtype`, and <z, dL/dz> (M,), for a loss whose (4) and (5) are times `unit`.

    `out`, if it is given, takes the place of the sum over columns. `pairs`: unit rows (2n, d), whose halves are
    partners. `w` (M,). `top`, the largest |w| of all processes, is what float16 needs.
    """
    (root, c, shift), mirror = scaling(scale), cols is rows
    if out is None:
        dz = torch.zeros_like(rows.z)
        for i, j, zj, e, tile in _tiles(rows, cols, layout, mirror, kept, True, c, shift):
            if shift:  # two maxima, so two exponentials
                torch.sub(e, rows.m[i, None], out=tile).exp2_().mul_(rows.a[i, None])
                tile.addcmul_(e.sub_(cols.m[j]).exp2_(), cols.a[j])
            else:
                torch.add(rows.a[i, None], cols.a[j], out=tile).mul_(e)  # (4)
            if rows.b is not None:  # (5)
                same = rows.label[i, None] == cols.label[j]
                for diagonal in diagonals(same, i, j, layout):
                    diagonal.fill_(False)
                tile.sub_((rows.b[i, None] + cols.b[j]).mul_(same))
            dz[i].addmm_(tile, zj)
            start = max(i.stop, j.start)
            if mirror and start < j.stop:
                dz[start : j.stop].addmm_(tile[:, start - j.start :].T, rows.z[i])
    else:
        dz = out * w.unsqueeze(1)
    if layout.pair:
        n = layout.n
        both = w if len(w) == n else w + w.roll(n)  # the partner meets this row as its positive, if it is an anchor
        dz.addcmul_(pairs[: 2 * n].roll(n, 0)[: len(dz)], both.unsqueeze(1), value=-1)
    along = torch.linalg.vecdot(rows.z, dz)
    inside = (along / root**2).masked_fill_(inverse >= 1e12, 0)  # a row shorter than 1e-12 is divided by a constant
    factor = (unit if unit.is_cuda else unit.item()) * (c * LN2 * root)
    dx = dz.addcmul_(rows.z, inside.unsqueeze(1), value=-1).mul_(factor).mul_(inverse.unsqueeze(1))  # (6)
    return dx.to(dtype), along.mul_(factor / root)
