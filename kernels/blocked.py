"""The log-sum-exp over tiles of the similarity matrix, in plain PyTorch: the CPU twin of the Triton kernels.

A tile of similarities stays in the cache from its product to its last use. It is large because each operation on it
starts all threads: few and long ones also suffer least on a busy machine. Where E is symmetric, the tiles on and above
the diagonal serve their rows and, transposed, the rows below. The first tiles of E, up to KEEP bytes, are kept for the
backward pass, which then spares their product and exponentials. The equations are those of `logsumexp`.
"""

import math
import threading

import torch
import torch.nn.functional as F

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
TILE = 768  # rows and columns
NARROW = 384  # rows of a tile of a triangle, where those on the diagonal compute what they need not
WEIGHT = 8192  # W is at most twice that, where float16 is precise
THREAD = threading.local()  # of its scratch memory
KEEP = 32 * 2**20  # bytes of E that a call keeps from its forward to its backward pass; 0: none


def scaling(scale):
    """Return the factor of unit rows, c of equation 1, and whether 2^s needs a shift.

    Without one, rows are stored times the root of c, in float16 if they are, so not for a c that is tiny. A scale on a
    GPU is not read back, to spare a synchronisation: its c is a tensor.
    """
    if scale.is_cuda:
        return 1.0, scale * LOG2E, True
    c = scale.item() * LOG2E
    return (math.sqrt(c), 1.0, False) if 0.25 <= c <= 64 * LOG2E else (1.0, c, True)


def stored(m, d, dtype):
    """Return shape and dtype of M unit rows."""
    return (m, d), dtype


def plan(m, k, triangle):
    """Yield the slices of rows and columns of each tile, and of its place when they follow one another."""
    end, high = 0, min(TILE, m)
    for i in range(0, m, high):
        i1 = min(i + high, m)
        if triangle:  # the square on the diagonal, then what is right of it
            tiles = [(r, min(r + NARROW, i1), r, i1) for r in range(i, i1, NARROW)]
            tiles += [(i, i1, j, min(j + TILE, k)) for j in range(i1, k, TILE)]
        else:
            wide = min(TILE * TILE // high, 4 * TILE)
            tiles = [(i, i1, j, min(j + wide, k)) for j in range(0, k, wide)]
        for r0, r1, j0, j1 in tiles:
            start, end = end, end + (r1 - r0) * (j1 - j0)
            yield slice(r0, r1), slice(j0, j1), slice(start, end)


def room(m, k, triangle, dtype):
    """Return how many elements of E are kept: those of the first tiles, up to KEEP bytes."""
    kept = 0
    for *_, at in plan(m, k, triangle):
        if at.stop * dtype.itemsize > KEEP:
            break
        kept = at.stop
    return kept


def unit_rows(x1, x2, x3, scale, dtype):
    """As `logsumexp.unit_rows`."""
    given = [x.to(dtype) for x in (x1, x2, x3) if x is not None]
    return normalized(torch.cat(given) if len(given) > 1 else given[0].contiguous(), scaling(scale)[0])


def normalized(x, root):
    """Return root x / |x| and 1 / |x|, |x| no smaller than 1e-12."""
    inverse = inverse_lengths(x)
    if inverse is not None:
        return x * (inverse * root).unsqueeze(1), inverse
    largest = torch.maximum(x.amax(1), -x.amin(1)).clamp_min_(1e-12)
    z = x / largest.unsqueeze(1)  # at most 1
    inverse = torch.linalg.vector_norm(z, dim=1).clamp_min_(1).reciprocal_()
    return z.mul_((inverse * root).unsqueeze(1)), inverse / largest


def inverse_lengths(x):
    """Return 1 / |x|, or None where the square of an element could overflow or vanish, or a GPU be waited for."""
    norm = torch.linalg.vector_norm(x, dim=1)
    low, high = (0, 0) if x.is_cuda else (extreme.item() for extreme in norm.aminmax())
    return norm.reciprocal_() if low >= 1e-12 and high < 1e18 else None


def scratch(like, name):
    """Memory of a tile; on a CPU the same at each call of a thread, since the system has to zero new memory."""
    memory = getattr(THREAD, name, None)
    if like.is_cuda or memory is None or memory.dtype != like.dtype:
        with torch.inference_mode(False):
            memory = torch.empty(TILE * TILE, dtype=like.dtype, device=like.device)
        if not like.is_cuda:
            setattr(THREAD, name, memory)
    return memory


def _tiles(rows, k, triangle, kept):
    """Yield the slices of rows and columns of each tile, its memory, and whether that is kept."""
    for i, j, at in plan(rows.shape[0], k, triangle):
        held, size = at.stop <= kept.shape[0], at.stop - at.start
        yield i, j, (kept[at] if held else scratch(rows, "s")[:size]).view(i.stop - i.start, -1), held


def _similarity(s, zi, zj, i, j, c, shift, offset, row_labels, col_labels):
    """Equation 1 for one tile, into s; -inf where the sum leaves a column out."""
    torch.mm(zi, zj.T, out=s)
    if shift:
        s *= c
    diagonal = i.start + offset - j.start  # where row i meets itself among the columns
    if offset >= 0 and i.start - i.stop < diagonal < j.stop - j.start:
        s.diagonal(diagonal).fill_(-torch.inf)
    if row_labels is not None:
        s.masked_fill_(row_labels[i, None] != col_labels[j], -torch.inf)


def forward(rows, cols, pairs, sides, scale, offset, row_labels, col_labels, emit, room):
    """As `logsumexp.forward`."""
    root, c, shift = scaling(scale)
    triangle = cols is None and not shift
    (n, d), k = rows.shape, (rows if cols is None else cols).shape[0]
    total, kept, out = rows.new_zeros(n), rows.new_empty(room), rows.new_zeros(n if emit else 0, d)
    m = rows.new_full((n,), -3e38 if shift else 0)  # below every s, and finite
    inverse = inverse_lengths(cols) if emit else None
    for i, j, s, _ in _tiles(rows, k, triangle, kept[:0] if shift else kept):
        zj = (rows if cols is None else cols)[j]
        if emit:
            zj = normalized(zj, root)[0] if inverse is None else zj * (inverse[j] * root).unsqueeze(1)
        _similarity(s, rows[i], zj, i, j, c, shift, offset, row_labels, col_labels)
        if shift:  # keep the running maximum
            m_new = torch.maximum(m[i], s.amax(1))
            shrink = torch.exp2(m[i] - m_new)
            total[i].mul_(shrink)
            m[i] = m_new
            s -= m_new.unsqueeze(1)
            if emit:
                out[i].mul_(shrink.unsqueeze(1))
        e = s.exp2_()
        total[i].add_(e.sum(1))  # (2)
        mirror = max(i.stop, j.start)  # from here on a column is no row of the tile
        if triangle and mirror < j.stop:  # the same tile, seen from its columns
            total[mirror : j.stop].add_(e[:, mirror - j.start :].sum(0))
        if emit:
            out[i].addmm_(e, zj)  # (4)
    each, w = total.log(), total.new_empty(0)
    if shift:
        each += m * LN2
    if sides:
        cosine = torch.linalg.vecdot(*pairs.view(2, -1, d))
        each.view(sides, -1).sub_(cosine * (c * LN2))
        w = torch.sigmoid(each) * WEIGHT if sides == 1 else torch.full_like(each, WEIGHT)
        each = -F.logsigmoid(-each) if sides == 1 else each  # softplus, without its threshold
    a = (w if sides else WEIGHT) / total
    if k == 1 or row_labels is not None:  # a row without columns has no gradient
        a.masked_fill_(total == 0, 0)
    return each, w, m, a, out.div_(total.unsqueeze(1)) if emit else out, kept


def backward(
    rows, cols, scale, offset, row_labels, col_labels, row_m, row_a, col_m, col_a, out, kept,
    pairs, sides, w, unit, inverse, d, dtype,
):  # fmt: skip
    """As `logsumexp.backward`."""
    root, c, shift = scaling(scale)
    triangle = cols is None and not shift
    if out is None:
        dz, cols = torch.zeros_like(rows), rows if cols is None else cols
        for i, j, s, held in _tiles(rows, cols.shape[0], triangle, kept[:0] if shift else kept):
            zi, zj, tile = rows[i], cols[j], scratch(rows, "w")[: s.numel()].view(s.shape)
            if not held:
                _similarity(s, zi, zj, i, j, c, shift, offset, row_labels, col_labels)
            if shift:  # two maxima, so two exponentials
                torch.sub(s, row_m[i, None], out=tile).exp2_().mul_(row_a[i, None])
                tile.addcmul_(s.sub_(col_m[j]).exp2_(), col_a[j])
            else:
                torch.add(row_a[i, None], col_a[j], out=tile).mul_(s if held else s.exp2_())
            dz[i].addmm_(tile, zj)  # (3)
            mirror = max(i.stop, j.start)
            if triangle and mirror < j.stop:
                dz[mirror : j.stop].addmm_(tile[:, mirror - j.start :].T, zi)
    else:
        dz = out * w.unsqueeze(1)
    if sides:  # the other row of the pair, which meets it as anchor and, if both are anchors, as positive
        other = pairs.view(2, -1, d).flip(0)[:sides].reshape(-1, d)
        dz.addcmul_(other, w.unsqueeze(1), value=-sides)
    along = torch.linalg.vecdot(rows, dz)
    inside = (along / root**2).masked_fill_(inverse >= 1e12, 0)  # a row shorter than 1e-12 is divided by a constant
    factor = (unit if unit.is_cuda else unit.item()) * (c * LN2 * root)
    dx = dz.addcmul_(rows, inside.unsqueeze(1), value=-1).mul_(factor).mul_(inverse.unsqueeze(1))  # (5)
    return dx.to(dtype), along.mul_(factor / root)
