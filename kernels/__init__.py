"""Contrastive losses that never build the similarity matrix.

    nt_xent            SimCLR          l_i = lse_i - z_i . z_pos(i) / t           lse over the other 2N - 1 views
    info_nce           MoCo            l_i = logaddexp(s_i+, lse_i) - s_i+        lse over the queue
    sup_con (out)      SupCon, L_out   l_i = lse_i - z_i . mean of its positives / t
    sup_con (in)       SupCon, L_in    l_i = lse_i - lse over its positives + log |P(i)|
    cosine_logsumexp   the lse_i of all of them

Here z is normalised, and t is the temperature. On a GPU a fused Triton kernel computes the log-sum-exp; on a CPU plain
PyTorch runs the same algorithm over tiles. Memory grows with M d, not with M^2. Inputs are float32, float16, bfloat16
or (not with Triton) float64, and need not be normalised or contiguous. The result is float32, or float64 for float64
inputs, and repeats to the bit. The folder works when copied alone: it needs torch, and triton for CUDA tensors.
"""

import functools
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .logsumexp import Contrast, check_shares, class_numbers, kind, resolve_backend

SMALLEST, LARGEST = 1e-37, 1e37  # of a temperature: float32 holds its double and its reciprocal
Temperature = float | Tensor  # a tensor receives a gradient

__all__ = ["cosine_logsumexp", "info_nce", "nt_xent", "resolve_backend", "sup_con"]


def nt_xent(z1: Tensor, z2: Tensor, temperature: Temperature = 0.5, *, backend: str = "auto", group=None) -> Tensor:
    """Mean over the 2N views of SimCLR's loss (Chen et al. 2020, arXiv:2002.05709, equation 1).

    z1, z2: (N, d), the two views; row i of z1 and row i of z2 are each other's positive. With a process `group`, the
    negatives are the views of all its processes, and the value is the mean over this process's 2N anchors. The gradient
    is then that of the sum of all processes' values, so that DDP's average is exact. Raises ValueError if an
    argument does not fit, on every process if their shapes differ. Raises RuntimeError if differentiated twice.
    """
    group = check_shares(group, z1, z2)
    _check_rows(same=True, z1=z1, z2=z2)
    return _contrast(z1, z2, None, temperature, backend, group, pair=True, both=True)


def info_nce(
    q: Tensor, k: Tensor, queue: Tensor | None = None, temperature: Temperature = 0.2, *, symmetric: bool = False,
    backend: str = "auto", group=None,
) -> Tensor:  # fmt: skip
    """Mean over the N queries of MoCo's loss (He et al. 2020, arXiv:1911.05722, equation 1).

    q, k: (N, d); row i of k is the positive of row i of q. queue: (K, d), the negatives. With a queue only q receives a
    gradient. Without one, the negatives are the other keys (MoCo's end-to-end mechanism; CLIP's two towers,
    arXiv:2103.00020), and q and k both receive gradients. `symmetric`: the mean of this loss and the loss in which keys
    and queries change places. `group` and errors are as for `nt_xent`; a queue refuses `symmetric` and `group`.
    """
    if queue is not None and (symmetric or group is not None):
        raise ValueError("a queue takes neither symmetric nor group: add two calls, and put all processes' keys in it")
    group = check_shares(group, q, k)
    _check_rows(same=True, q=q, k=k)
    if queue is None:
        return _contrast(q, k, None, temperature, backend, group, pair=True, cross=True, both=symmetric)
    _check_rows(q=q, queue=queue)
    return _contrast(q, k.detach(), queue.detach(), temperature, backend, pair=True)


def sup_con(
    z: Tensor, labels: Tensor, temperature: Temperature = 0.1, *, loss: str = "out", backend: str = "auto", group=None
) -> Tensor:
    """Mean over the M anchors of the supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362).

    z: (M, d); labels: (M,) integers. The positives of an anchor are the other rows with its label. A row with the label
    -1 has no positives and is a negative of all other rows. An anchor without positives adds 0. loss="out" is equation
    2 (the mean over positives is outside the logarithm), "in" is equation 3. `group` and errors are as for `nt_xent`.
    """
    group = check_shares(group, z, labels)
    _check_rows(z=z)
    fits = isinstance(labels, Tensor) and labels.shape == z.shape[:1] and labels.device == z.device
    if not fits or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers (M,), one for each row of z, got {kind(labels)} for z {kind(z)}")
    if loss not in ("out", "in"):
        raise ValueError(f"loss must be 'out' or 'in', got {loss!r}")
    groups = _, _, count = class_numbers(labels.long(), group)
    call = functools.partial(_contrast, z, None, None, temperature, backend, group, groups=groups)
    if loss == "out":
        each = call()
    else:  # -log(sum of the positives / sum of all) = softplus(lse of the negatives - lse of the positives)
        gap = torch.where(count > 0, call(classes=1) - call(classes=-1), 0)
        each = count.clamp(min=1).to(gap).log() - F.logsigmoid(gap)
    return torch.where(count > 0, each, 0).mean()


def cosine_logsumexp(
    queries: Tensor, keys: Tensor | None = None, *, temperature: Temperature, backend: str = "auto", group=None
) -> Tensor:
    """Return log(sum over the keys j of exp(cos(q_i, k_j) / temperature)) for each query i, (M,).

    queries: (M, d); keys: (K, d), or None: each query then meets the other queries (and M = 1 gives -inf). A row
    shorter than 1e-12 is divided by 1e-12. `group` and errors are as for `nt_xent`. A temperature that is a tensor
    receives a gradient. The value of one on a GPU is not checked, because that would wait for the GPU.
    """
    columns = queries if keys is None else keys
    group = check_shares(group, queries, columns)
    _check_rows(queries=queries, keys=columns)
    if keys is None or keys.requires_grad or group is not None:
        return _contrast(queries, keys, None, temperature, backend, group, cross=keys is not None)
    return _contrast(queries, None, keys, temperature, backend, group)


@torch._disable_dynamo  # torch.compile runs it uncompiled
def _contrast(x1, x2, y, t, backend, group=None, groups=None, pair=False, cross=False, both=False, classes=0):
    """Check the temperature, choose a backend and the dtype of the products, and call `Contrast`."""
    if isinstance(t, Real):
        value = t
    elif _floats(t) and t.numel() == 1 and t.device in (torch.device("cpu"), x1.device):
        value = t.item() if t.device.type == "cpu" else 1.0  # on a GPU it is not read
    else:
        raise ValueError(f"temperature must be a number, or a tensor of one float on {x1.device} or cpu, got {kind(t)}")
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"temperature must be at least {SMALLEST} and at most {LARGEST}, got {value}")
    kept = torch.promote_types(torch.float32, t.dtype) if isinstance(t, Tensor) else torch.float64
    scale = torch.as_tensor(t, dtype=kept, device=getattr(t, "device", "cpu")).reshape(()).reciprocal()
    if x2 is not None:
        x1, x2 = (x.to(torch.promote_types(x1.dtype, x2.dtype)) for x in (x1, x2))
    autocast, grad = x1.is_cuda and torch.is_autocast_enabled("cuda"), torch.is_grad_enabled()
    backend, dtype = resolve_backend(backend, x1.device, x1.dtype), torch.promote_types(torch.float32, x1.dtype)
    if backend == "triton" and x1.dtype != torch.float64 and (x1.dtype != torch.float32 or autocast):
        dtype = torch.float16  # unit rows have |z| <= 1, so float16 rounds eight times finer than bfloat16
    with torch.autocast(x1.device.type, enabled=False), torch.cuda.device_of(x1):
        return Contrast.apply(x1, x2, y, scale, groups, pair, cross, both, classes, grad, dtype, backend, group)


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
