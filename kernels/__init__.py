"""Contrastive losses that never build the similarity matrix.

    nt_xent            SimCLR          l_i = lse_i - z_i . z_pos(i) / t           lse over the other 2N - 1 views
    info_nce           MoCo            l_i = logaddexp(s_i+, lse_i) - s_i+        lse over the queue
    sup_con (out)      SupCon, L_out   l_i = lse_i - z_i . mean of its positives / t
    sup_con (in)       SupCon, L_in    l_i = lse_i - lse over its positives + log |P(i)|
    cosine_logsumexp   the lse_i of all of them

z normalised, t the temperature. On a GPU the log-sum-exp is a fused Triton kernel, on a CPU the same algorithm over
tiles in plain PyTorch; memory grows with M d, not with M^2. Inputs need not be normalised or contiguous; they are
float32, float16, bfloat16 or (not with Triton on a GPU) float64. The result is float32, or float64 for float64 inputs,
and repeats to the bit. The folder works when copied alone: it needs torch, and triton for CUDA tensors.
"""

from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .logsumexp import Contrast, check_shares, kind, positive_mean, resolve_backend, row_dtype, several

SMALLEST, LARGEST = 1e-37, 1e37  # temperature: twice it, or its reciprocal, is still a float32
Temperature = float | Tensor  # a tensor receives a gradient

__all__ = ["cosine_logsumexp", "info_nce", "nt_xent", "resolve_backend", "sup_con"]


def nt_xent(z1: Tensor, z2: Tensor, temperature: Temperature = 0.5, *, backend: str = "auto", group=None) -> Tensor:
    """Mean over the 2N views of SimCLR's loss (Chen et al. 2020, arXiv:2002.05709, equation 1).

    z1, z2: (N, d), the two views; row i of one is the positive of row i of the other. `group`: a process group; the
    negatives are then the views of all its processes (of unequal shapes, all raise), the value is the mean over this
    process's 2N anchors, and the gradient is that of the sum of all processes' values, so that DDP's average is exact.
    Raises ValueError for shapes, dtypes, devices, a temperature or a backend that do not fit; RuntimeError when
    differentiated twice.
    """
    check_shares(group, z1, z2)
    _check_rows(same=True, z1=z1, z2=z2)
    z1, z2 = (z.to(torch.promote_types(z1.dtype, z2.dtype)) for z in (z1, z2))
    call = _Call(z1, 2 * len(z1), 2 * len(z2), temperature, backend, group)
    if call.backend == "naive":
        s = call.similarities(torch.cat([z1, z2]))
        return F.cross_entropy(s, torch.arange(len(s), device=s.device).roll(len(z1)))
    return call.contrast(z1, z2, sides=2)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: Temperature = 0.2, *, backend: str = "auto") -> Tensor:
    """Mean over the N queries of MoCo's loss (He et al. 2020, arXiv:1911.05722, equation 1).

    q, k: (N, d), row i of k the positive key of row i of q; queue: (K, d), the negatives. Neither k nor queue receives
    a gradient. Raises as `nt_xent` does.
    """
    _check_rows(same=True, q=q, k=k)
    _check_rows(q=q, queue=queue)
    call, k, queue = _Call(q, len(q), len(queue), temperature, backend), k.detach(), queue.detach()
    if call.backend != "naive":
        return call.contrast(q, k, queue, sides=1)
    positive = (call.unit(q) * call.unit(k)).sum(1) * call.scale
    return -F.logsigmoid(positive - call.logsumexp(q, queue)).mean()  # logaddexp - positive, without the cancellation


def sup_con(
    z: Tensor, labels: Tensor, temperature: Temperature = 0.1, *, loss: str = "out", backend: str = "auto", group=None
) -> Tensor:
    """Mean over the M anchors of the supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362).

    z: (M, d); labels: (M,) integers; the positives of an anchor are the other rows with its label. A label of -1 means
    none: its row is a negative of the others, without positives. An anchor without positives adds 0. loss="out" is
    equation 2 (the mean over positives outside the logarithm), "in" equation 3. `group`, errors: as for `nt_xent`.
    """
    check_shares(group, z, labels)
    _check_rows(z=z)
    fits = isinstance(labels, Tensor) and labels.shape == z.shape[:1] and labels.device == z.device
    if not fits or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers (M,), one a row of z, got {kind(labels)} for z {kind(z)}")
    if loss not in ("out", "in"):
        raise ValueError(f"loss must be 'out' or 'in', got {loss!r}")
    labels = labels.long().contiguous()
    call = _Call(z, len(z), len(z), temperature, backend, group)
    lse = call.logsumexp(z)
    positives, count = positive_mean(call.unit(z), labels, call.group)
    each = lse - (positives * call.scale if loss == "out" else call.logsumexp(z, labels=labels) - count.log())
    return torch.where((count > 0) & (labels != -1), each, 0).mean()


def cosine_logsumexp(
    queries: Tensor, keys: Tensor | None = None, *, temperature: Temperature, backend: str = "auto", group=None
) -> Tensor:
    """Log of the sum over the keys j of exp(cos(q_i, k_j) / temperature), (M,).

    queries: (M, d); keys: (K, d), or None for the queries themselves without the pair of a row with itself (M = 1
    then gives -inf). A row shorter than 1e-12 is divided by 1e-12. `group`, and what is raised: as for `nt_xent`.
    A temperature that is a tensor receives a gradient; one on a GPU is not checked, since that would synchronise.
    """
    columns = queries if keys is None else keys
    check_shares(group, queries, columns)
    _check_rows(queries=queries, keys=columns)
    return _Call(queries, len(queries), len(columns), temperature, backend, group).logsumexp(queries, keys)


class _Call:
    """What one call of a loss settles once: scale = 1 / temperature, group, backend, dtype of the products."""

    def __init__(self, x, rows, columns, t, backend, group=None):
        if isinstance(t, Real):
            value = t
        elif _floats(t) and t.numel() == 1 and t.device in (torch.device("cpu"), x.device):
            value = t.item() if t.device.type == "cpu" and not torch.compiler.is_compiling() else 1.0  # or not known
        else:
            raise ValueError(f"temperature must be a number, or one float on {x.device} or cpu, got {kind(t)}")
        if not SMALLEST <= value <= LARGEST:
            raise ValueError(f"temperature must be a number of at least {SMALLEST}, at most {LARGEST}, got {value}")
        if isinstance(t, Tensor):
            self.scale = t.reshape(()).to(torch.promote_types(torch.float32, t.dtype)).reciprocal()
        else:
            self.scale = torch.tensor(1 / t, dtype=torch.float64)
        self.group = group if several(group) else None
        self.backend = resolve_backend(backend, rows, columns, x.device, x.dtype, self.group)
        self.dtype = row_dtype(x, self.backend)

    def contrast(self, x1, x2=None, y=None, labels=None, sides=0):
        given = x1, x2, y, self.scale
        if not torch.is_grad_enabled():  # so that nothing is kept for a backward pass
            given = (x if x is None else x.detach() for x in given)
        return Contrast.apply(*given, labels, sides, self.dtype, self.backend, self.group)

    def logsumexp(self, x, keys=None, labels=None):
        """Over the keys, or over the other rows of x: all, or those of the same label."""
        if self.backend != "naive":
            return self.contrast(x, None, keys, labels)
        return self.similarities(x, keys, labels).logsumexp(dim=1)

    def unit(self, x):
        """Rows of length 1, in at least float32."""
        x = x.to(torch.promote_types(torch.float32, self.dtype))
        largest = x.detach().abs().amax(1, keepdim=True).clamp_min(1e-12)
        z = x / largest
        return z / z.norm(dim=1, keepdim=True).clamp_min(1e-12 / largest)

    def similarities(self, x, keys=None, labels=None):
        """The whole matrix (M, K), -inf where the sum leaves a key out."""
        with torch.autocast(x.device.type, enabled=False):
            z = self.unit(x)
            s = z @ (z if keys is None else self.unit(keys)).T * self.scale
            if keys is None:
                s = s.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
            return s if labels is None else s.masked_fill(labels[:, None] != labels, -torch.inf)


def _floats(x):
    return isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check_rows(same=False, **given):
    first, *_ = given.values()
    for name, x in given.items():
        if not _floats(x) or x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"{name} must be a float matrix (a tensor) with at least one row, got {kind(x)}")
        if x.shape[same ^ 1 :] != first.shape[same ^ 1 :] or x.device != first.device:
            names, shape = " and ".join(given), "shape" if same else "width"
            raise ValueError(f"{names} must have one {shape} and device, got {kind(first)} and {kind(x)}")
