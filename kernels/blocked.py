"""The log-sum-exp over tiles of the similarity matrix, in plain PyTorch: the CPU twin of the Triton kernels.

A tile of similarities stays in the cache from its matrix product to its last use. Tiles are large because each
operation on a tile starts all threads. If the columns are the rows, a tile serves its rows and, transposed, its
columns. The forward pass keeps the first tiles of E for the backward pass. Equations are those of `logsumexp`.
"""

import functools
import math
import threading
from collections import namedtuple

import torch
import torch.nn.functional as F

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
TILE = 768  # rows and columns of a tile
NARROW = 384  # rows of a tile on the diagonal, in blocks of more than 512 rows: the half below the diagonal is wasted
KEEP = 32 * 2**20  # the most bytes of E that a forward pass keeps for its backward pass; 0 keeps none

# What belongs to M rows or columns. z: unit vectors times the root that `scaling` returns, (M, d); label: class numbers
# (M,); m, a, b: the shifts and weights of equations 2, 4 and 5, (M,).
Rows = namedtuple("Rows", "z label m a b", defaults=(None,) * 4)
# Which columns a row meets. The rows of a process have two parts, x1 and x2. The columns are the first parts of all
# processes, then their second parts. n: rows of this process's first part; whole: columns of all first parts; first:
# the column of row 0, or -1 if the columns are not the rows; pair: a row skips its partner, its twin in the other part;
# cross: a row meets the other part only; classes: 1 to meet the row's class only, -1 the other classes only, 0 all.
Layout = namedtuple("Layout", "n whole first pair cross classes")


def scaling(scale):
    """Return the factor of the stored unit rows, c of equation 1, and whether 2^s needs a shift. `scale`: beta.

    Without a shift, rows are stored times the root of c, perhaps in float16, so c must not be tiny. A scale on a GPU is
    not read, because that would wait for the GPU; c is then a tensor.
    """
    if scale.is_cuda:
        return 1.0, scale * LOG2E, True
    c = scale.item() * LOG2E
    return (math.sqrt(c), 1.0, False) if 0.25 <= c <= 64 * LOG2E else (1.0, c, True)


@functools.lru_cache(maxsize=16)
def scratch(thread, dtype):
    """Return memory for two tiles. All calls of a thread share it, because the system would clear new memory first."""
    with torch.inference_mode(False):  # so that calls outside inference mode can write to it
        return torch.empty(2, TILE * TILE, dtype=dtype, device="cpu")


def plan(m, k, layout, mirror):
    """Yield three slices for each tile: its rows, its columns, and its place in a memory that holds all tiles in turn.

    `mirror`: the columns are the rows, and a tile also serves its columns, so half of the tiles are enough.
    """
    blocks = [(0, m, 0, k)]
    if layout.cross:
        blocks = [(0, min(m, layout.n), layout.whole, k), (layout.n, 0 if mirror else m, 0, layout.whole)]
    end = 0
    for low, high, left, right in blocks:
        size = max(1, min(TILE, high - low))
        for i in range(low, high, size):
            i1 = min(i + size, high)
            if mirror and not layout.cross:  # the square on the diagonal, then the tiles to its right
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
    """Stack x1, x2, x3; return their unit rows times the root of `scaling`, (M, d), and 1 / max(|x|, 1e-12), (M,)."""
    given = [x.to(dtype) for x in (x1, x2, x3) if x is not None]
    x = torch.cat(given)  # a copy, so the result may overwrite it
    return normalized(x, scaling(scale)[0], x)


def normalized(x, root, out=None):
    """Return root x / |x|, written to `out` if it is given, and 1 / |x|. A norm |x| below 1e-12 counts as 1e-12."""
    norm = torch.linalg.vector_norm(x, dim=1)
    low, high = (0, 0) if x.is_cuda else (each.item() for each in norm.aminmax())  # reading would wait for the GPU
    if low >= 1e-12 and high < 1e18:
        inverse = norm.reciprocal_()
        return torch.mul(x, (inverse * root).unsqueeze(1), out=out), inverse
    largest = torch.maximum(x.amax(1), -x.amin(1)).clamp_min_(1e-12)
    z = torch.div(x, largest.unsqueeze(1), out=out)  # entries of at most 1: no square overflows
    inverse = torch.linalg.vector_norm(z, dim=1).clamp_min_(1).reciprocal_()
    return z.mul_((inverse * root).unsqueeze(1)), inverse / largest


def diagonals(x, i, j, layout):
    """Yield the diagonals of tile x, rows i and columns j, on which a row meets itself or, with `pair`, its partner."""
    n, whole, first, pair, *_ = layout
    own = [(0, 2 * n, first)] if whole == n else [(0, n, first), (n, 2 * n, first + whole - n)]
    partner = [(0, n, first + whole), (n, 2 * n, first - n)] * pair
    for low, high, at in own + partner if first >= 0 else ():  # row r of these skips column r + at
        low, high = max(i.start, low), min(i.stop, high)
        if low < high and low - high < low + at - j.start < j.stop - j.start:
            yield x[low - i.start : high - i.start].diagonal(low + at - j.start)


def _tiles(rows, cols, layout, mirror, kept, filled, c, shift, root=None):
    """Yield the slices of each tile, its columns, its E (or s, if there is a shift), and spare memory of its shape.

    Entries that the sum leaves out are 0 in E and -inf in s. `filled`: the kept tiles already hold E. `root`: the root
    of `scaling` if the columns have yet to be normalised, else None.
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
    """Return l, q, m and a = q / total of the anchors, the first rows of z, (anchors,) each; then out, and kept tiles.

    If y is None, the columns are the rows. Without `layout.pair`, l is lse, and q is 1 and comes back empty. `emit`:
    out_i is sum_j E_ij k_j / total_i (anchors, d), and rows of y may have any length. `keep`: keep some tiles of E.
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
        start = max(i.stop, j.start)  # columns from here on are not among the tile's rows
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
        q, each = torch.sigmoid(each), F.softplus(each, threshold=40)  # above 40 even float64 rounds it to x
    a = ((q if layout.pair else 1) / total).masked_fill_(total == 0, 0)  # a row without columns has no gradient
    return each, q, m, a, out.div_(total.unsqueeze(1)) if emit else out, kept


def backward(rows, cols, pairs, w, top, unit, layout, scale, out, kept, inverse, d, dtype):
    """Return dL/dx (M, d) in `dtype`, and <z, dL/dz> (M,). The true weights w, a and b are the given ones times `unit`.

    `out`: the sum over the columns, if `forward` has made it. `pairs`: unit rows (2n, d); its halves are partners.
    `top`: the largest |w| of all processes, which only `fused` needs, for float16.
    """
    (root, c, shift), mirror = scaling(scale), cols is rows
    if out is None:
        dz = torch.zeros_like(rows.z)
        for i, j, zj, e, tile in _tiles(rows, cols, layout, mirror, kept, True, c, shift):
            if shift:  # E_ij and E_ji have two shifts: two exponentials
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
        both = w if len(w) == n else w + w.roll(n)  # if the partner is an anchor, this row is its positive
        dz.addcmul_(pairs[: 2 * n].roll(n, 0)[: len(dz)], both.unsqueeze(1), value=-1)
    along = torch.linalg.vecdot(rows.z, dz)
    inside = (along / root**2).masked_fill_(inverse >= 1e12, 0)  # a row shorter than 1e-12 is divided by a constant
    factor = (unit if unit.is_cuda else unit.item()) * (c * LN2 * root)
    dx = dz.addcmul_(rows.z, inside.unsqueeze(1), value=-1).mul_(factor).mul_(inverse.unsqueeze(1))  # (6)
    return dx.to(dtype), along.mul_(factor / root)
