"""The log-sum-exp over tiles of the similarity matrix, in plain PyTorch: the CPU twin of the Triton kernels.

With unit rows z_i (M, d), unit columns k_j (K, d) and beta = 1/temperature:

    (1)  s_ij = beta z_i . k_j                       E_ij = exp(s_ij - m_i)
    (2)  total_i = sum_j E_ij                        lse_i = m_i + log total_i
    (3)  dL/dz_i = beta sum_j W_ij k_j               W_ij = E_ij a_i + E_ji b_j,   a_i = (dL/dlse_i) / total_i
    (4)  out_i = sum_j E_ij k_j / total_i            the gradient of lse_i by z_i, over beta

A tile of HIGH x WIDE similarities stays in the cache from its product to its last use; nothing larger is ever stored.
It is large because each operation on it starts all threads: few and long ones also suffer least on a busy machine.
For |s| <= 64 no shift is needed (m = 0: exp neither overflows nor underflows), so E is symmetric when the columns are
the rows: then the tiles on and above the diagonal serve their rows and, transposed, the rows below, and
W_ij = E_ij (a_i + a_j).
"""

import torch

HIGH, WIDE = 768, 768


def _tiles(rows, cols, scale, shift, offset, row_labels, col_labels, normalize=False):
    """Yield (row slice, column slice, s of equation 1, its two factors); s, -inf where left out, is used again."""
    triangle = cols is None and not shift
    if triangle:
        rows = rows * scale.sqrt()  # half of the scale on either side: s_ij and s_ji round alike
    cols = rows if cols is None else cols
    high = min(HIGH, len(rows))
    wide = min(HIGH * WIDE // high, 4 * WIDE, len(cols))
    buffer = rows.new_empty(high * wide)
    for i in range(0, len(rows), high):
        zi = rows[i : i + high] if shift or triangle else rows[i : i + high] * scale
        for j in range(i if triangle else 0, len(cols), wide):
            zj = unit_rows(cols[j : j + wide], rows.dtype)[0] if normalize else cols[j : j + wide]
            s = torch.mm(zi, zj.T, out=buffer[: len(zi) * len(zj)].view(len(zi), len(zj)))  # (1)
            if shift:  # scaled afterwards, s_ij and s_ji round alike: at tiny temperatures that tells
                s *= scale
            diagonal = i + offset - j  # where row i meets itself among the columns
            if offset >= 0 and -len(zi) < diagonal < len(zj):
                s.diagonal(diagonal).fill_(-torch.inf)
            if row_labels is not None:
                s.masked_fill_(row_labels[i : i + high, None] != col_labels[j : j + wide], -torch.inf)
            yield slice(i, i + len(zi)), slice(j, j + len(zj)), s, zi, zj


def needs_shift(scale):
    """Whether exp(s) may overflow; a scale on a GPU is not read back, to spare a synchronisation."""
    return scale.is_cuda or scale.item() > 64


def forward(rows, cols, scale, offset, row_labels, col_labels, emit):
    """Return m (M,), total (M,) of equation 2, and out (M, d) of equation 4 when `emit`, else (0, d)."""
    shift = needs_shift(scale)
    triangle = cols is None and not shift
    total = rows.new_zeros(len(rows))
    out = torch.zeros_like(rows if emit else rows[:0])
    m = torch.zeros_like(total)
    if shift:
        m = m - 2 * scale.to(m)  # below every s, and finite
    for i, j, s, _, zj in _tiles(rows, cols, scale, shift, offset, row_labels, col_labels, normalize=emit):
        if shift:  # keep the running maximum
            m_new = torch.maximum(m[i], s.amax(1))
            shrink = torch.exp(m[i] - m_new)
            total[i] *= shrink
            m[i] = m_new
            s -= m_new[:, None]
            if emit:
                out[i] *= shrink[:, None]
        e = s.exp_()
        total[i] += e.sum(1)  # (2)
        below = max(i.stop - j.start, 0)  # the columns of the tile's own rows
        if triangle and below < len(zj):
            total[j.start + below : j.stop] += e[:, below:].sum(0)  # the same tile, seen from its columns
        if emit:
            out[i].addmm_(e, zj)  # (4)
    return m, total, out.div_(total[:, None]) if emit else out


def backward(rows, cols, scale, offset, row_labels, col_labels, row_m, row_a, col_m, col_a):
    """Return sum_j W_ij k_j (M, d) of equation 3."""
    shift = needs_shift(scale)
    triangle = cols is None and not shift
    dz = torch.zeros_like(rows)
    buffer = None
    for i, j, s, zi, zj in _tiles(rows, cols, scale, shift, offset, row_labels, col_labels):
        buffer = rows.new_empty(s.numel()) if buffer is None else buffer  # the first tile is the largest
        w = buffer[: s.numel()].view(s.shape)
        if shift:  # two maxima, so two exponentials
            torch.sub(s, row_m[i, None], out=w).exp_().mul_(row_a[i, None])
            w.addcmul_(s.sub_(col_m[j]).exp_(), col_a[j])
        else:
            torch.add(row_a[i, None], col_a[j], out=w).mul_(s.exp_())  # (3)
        dz[i].addmm_(w, zj)
        below = max(i.stop - j.start, 0)
        if triangle and below < len(zj):
            dz[j.start + below : j.stop].addmm_(w[:, below:].T, zi)
    return dz.div_(scale.sqrt()) if triangle else dz


def unit_rows(x, dtype):
    """Return z = x / |x| (M, d) in `dtype` and 1 / |x| (M,), |x| no smaller than 1e-12."""
    x = x.to(dtype).contiguous()
    largest = torch.maximum(x.amax(1), -x.amin(1)).clamp_min_(1e-12)  # no copy of |x|
    z = x / largest[:, None]  # at most 1: the square of 2e19 overflows
    inverse = torch.linalg.vector_norm(z, dim=1).clamp_min_(1).reciprocal_()
    return z.mul_(inverse[:, None]), inverse / largest


def unit_rows_backward(dz, z, inverse, dtype):
    """Return dL/dx = (dz - z <z, dz>) / |x| in `dtype`; a row shorter than 1e-12 is divided by a constant."""
    along = torch.where(inverse < 1e12, torch.linalg.vecdot(z, dz), 0)
    return torch.addcmul(dz, z, along[:, None], value=-1).mul_(inverse[:, None]).to(dtype)
