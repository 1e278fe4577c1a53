"""Time and memory of the contrastive losses: ours, the naive loss, that loss compiled, and other libraries' formulas.

    python benchmarks/loss.py                         2N = 512 to 8192, and MoCo's 256 x 65,536; d = 128
    python benchmarks/loss.py --large                 2N = 2048 to 65,536, our loss only: the memory table
    python benchmarks/loss.py --sizes --queue --towers 8192         two towers, symmetric; N = 8192 pairs
    python benchmarks/loss.py --device cuda --dtype float16
    python benchmarks/loss.py --before ../other       also times the kernels/ of another checkout

A time is the median of forward and backward, over runs that alternate in random order. Memory is the peak beyond the
inputs; each loss has its own process for this. `efficiency` is the rate of two products (2 x 2 M^2 d operations, or
2 x 2 N K d) over the rate of a large matrix product on the same machine, timed between the runs. lightly and
pytorch-metric-learning are the installed packages (`pip install lightly pytorch-metric-learning`). SupContrast and
solo-learn cannot be installed, so their formulas stand here, written from their papers and documents; lightly's formula
stands in if lightly is not installed. naive is the loss of simclr.py; for MoCo it is that of moco.py, with a queue
whose rows already have length 1. Each loss must give our value before it is timed.
"""

import argparse
import importlib.util
import multiprocessing
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import blocked, info_nce, nt_xent  # noqa: F401  blocked: its loading is not to count as memory
from simclr import nt_xent as naive


def lightly(z1, z2, t=0.5):
    """As lightly does it: four N x N blocks, their diagonals removed by a boolean index, and one cross-entropy."""
    n, (z1, z2) = len(z1), (F.normalize(z1, dim=1), F.normalize(z2, dim=1))
    off = ~torch.eye(n, dtype=torch.bool, device=z1.device)
    s00, s01, s10, s11 = (torch.einsum("nc,mc->nm", a, b) / t for a, b in ((z1, z1), (z1, z2), (z2, z1), (z2, z2)))
    s00, s11 = s00[off].view(n, -1), s11[off].view(n, -1)
    logits = torch.cat([torch.cat([s01, s00], 1), torch.cat([s10, s11], 1)], 0)
    return F.cross_entropy(logits, torch.arange(n, device=z1.device).repeat(2))


def supcontrast(z1, z2, t=0.5):
    """As SupContrast does it: a shift by the row maximum, and masks of the full size for positives and for logits."""
    n, z = len(z1), torch.cat([F.normalize(z1, dim=1), F.normalize(z2, dim=1)])
    s = z @ z.T / t
    s = s - s.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(2 * n, device=z.device)
    positive = torch.eye(n, device=z.device).repeat(2, 2) * others
    log_p = s - (s.exp() * others).sum(1, keepdim=True).log()
    return -((positive * log_p).sum(1) / positive.sum(1)).mean()


def solo_learn(z1, z2, t=0.5):
    """As solo-learn does it: exponentials, a mask of positives, a mask of negatives, and the log of the ratio."""
    n, z = len(z1), F.normalize(torch.cat([z1, z2]), dim=1)
    e = torch.exp(torch.einsum("if,jf->ij", z, z) / t)
    ids = torch.arange(n, device=z.device).repeat(2)
    positive = (ids[:, None] == ids).float()
    positive.fill_diagonal_(0)
    negative = (ids[:, None] != ids).float()
    p = (e * positive).sum(1)
    return -torch.log(p / (p + (e * negative).sum(1))).mean()


def naive_moco(q, k, queue, t=0.2):
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)  # the queue holds unit rows
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / t
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def naive_towers(q, k, t=0.2):
    s, target = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / t, torch.arange(len(q), device=q.device)
    return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2


def compiled(function):
    return torch.compile(function, dynamic=False)


def other_kernels(folder):
    """Import the package kernels/ of another checkout under another name."""
    place = Path(folder) / "kernels"
    spec = importlib.util.spec_from_file_location(
        "before", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    sys.modules["before"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NT_XENT = {
    "ours": nt_xent, "naive": naive, "compile(naive)": compiled(naive), "lightly": lightly, "SupContrast": supcontrast,
    "solo-learn": solo_learn,
}  # fmt: skip
try:
    from lightly import __version__ as version
    from lightly.loss import NTXentLoss

    NT_XENT[f"lightly {version}"] = NTXentLoss(temperature=0.5)
    del NT_XENT["lightly"]
except ImportError:
    pass
try:
    from pytorch_metric_learning import __version__ as version
    from pytorch_metric_learning.losses import NTXentLoss as PairsLoss
    from pytorch_metric_learning.losses import SelfSupervisedLoss

    NT_XENT[f"metric-learning {version}"] = SelfSupervisedLoss(PairsLoss(temperature=0.5))
except ImportError:
    pass
MOCO = {
    "ours": lambda q, k, queue: info_nce(q, k, queue), "naive": naive_moco, "compile(naive)": compiled(naive_moco)
}  # fmt: skip
TOWERS = {
    "ours": lambda q, k: info_nce(q, k, symmetric=True), "naive": naive_towers, "compile(naive)": compiled(naive_towers)
}  # fmt: skip
PROBLEMS = {"nt_xent": NT_XENT, "info_nce": MOCO, "towers": TOWERS}


def inputs(problem, size, d, device, dtype):
    torch.manual_seed(0)
    if problem != "info_nce":
        n = size // 2 if problem == "nt_xent" else size
        return [torch.randn(n, d, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    q = torch.randn(256, d, device=device, dtype=dtype, requires_grad=True)
    queue = F.normalize(torch.randn(size, d, device=device, dtype=dtype), dim=1)
    return [q, torch.randn(256, d, device=device, dtype=dtype), queue]


def step(function, arguments):
    function(*arguments).backward()
    for x in arguments:
        x.grad = None
    if arguments[0].is_cuda:
        torch.cuda.synchronize()


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_memory(problem, name, size, d, device, dtype):
    """Return the bytes that one step takes beyond its inputs. A small step loads the libraries first."""
    function = PROBLEMS[problem][name]
    arguments = inputs(problem, size, d, device, dtype)
    small = [x[:40].detach().requires_grad_(x.requires_grad) for x in arguments]
    if name.startswith("compile"):
        small = arguments  # the step that compiles must not be the one measured
    if device == "cuda":
        step(function, small)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(function, arguments)
        return torch.cuda.max_memory_allocated() - before
    torch.mm(torch.randn(600, 600), torch.randn(600, 600))
    step(function, small)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    step(function, arguments)
    return status("VmHWM") - before


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def in_process(*arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--d", type=int, default=128, help="width of the rows (default 128)")
    parser.add_argument("--runs", type=int, default=7, help="runs of each loss (default 7)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192], help="2N of NT-Xent")
    parser.add_argument("--queue", type=int, nargs="*", default=[65536], help="MoCo's K at N = 256")
    parser.add_argument("--towers", type=int, nargs="*", default=[], help="N pairs of rows, for two towers")
    parser.add_argument("--large", action="store_true", help="our loss alone, with 2N up to 65,536")
    parser.add_argument("--before", help="folder of another checkout, whose kernels/ is timed too")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    sizes, queue = ([2048 * 2**i for i in range(6)], []) if args.large else (args.sizes, args.queue)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.dtype}, d = {args.d}")
    print(f"{'problem':8} {'size':>6} {'loss':22} {'ms':>9} {'x ours':>7} {'extra MB':>9} {'efficiency':>10}")
    before = args.before and other_kernels(args.before)
    big = [torch.randn(4096, 4096, device=args.device, dtype=dtype) for _ in range(3)]
    asked = {"nt_xent": sizes, "info_nce": queue, "towers": args.towers}
    for problem, size in [(problem, size) for problem, sizes in asked.items() for size in sizes]:
        functions = dict(PROBLEMS[problem])
        if args.large:
            functions = {"ours": functions["ours"]}
        for name in [name for name in functions if name.startswith("metric-learning") and 4 * size**3 > 1e9]:
            print(f"{problem:8} {size:6} {name}: left out, it holds arrays of (2N)^3 numbers, {4e-9 * size**3:,.0f} GB")
            del functions[name]
        if before and problem != "towers":
            functions["before"] = before.nt_xent if problem == "nt_xent" else lambda q, k, y: before.info_nce(q, k, y)
        arguments = inputs(problem, size, args.d, args.device, dtype)
        product = lambda: (torch.mm(big[0], big[1], out=big[2]), big[2][0, 0].item())  # noqa: E731
        work = {name: (lambda f=f, a=arguments: step(f, a)) for name, f in functions.items()} | {"product": product}
        times, value = {name: [] for name in work}, functions["ours"](*arguments).item()
        for name, f in functions.items():
            found, most = f(*arguments).item(), 1e-4 if dtype == torch.float32 else 1e-2
            if not abs(found - value) <= most * value:  # NaN, too
                sys.exit(f"{name} gives {found} and ours {value}, so they are not the same loss")
        big_one = [name for name in work if name.startswith("metric-learning")]  # alone: it empties caches and heap
        turns = [work.keys() - big_one] * (args.runs * (5 if size <= 1024 else 1) + 1) + [big_one] * 4
        for run, those in enumerate(turns):  # the first turn warms up and compiles
            for name in random.Random(run).sample(sorted(those), len(those)):
                if name != "product" or run <= args.runs:
                    took = seconds(work[name])
                    times[name] += [took] if run else []
        median = {name: statistics.median(each) for name, each in times.items()}
        rate = 2 * 4096**3 / median.pop("product")
        operations = 4 * args.d * size * (256 if problem == "info_nce" else size)
        for name, took in median.items():
            shape = problem, name, size, args.d, args.device, dtype
            memory = None if args.no_memory or name == "before" else in_process(*shape)
            shown = "-" if memory is None else f"{memory / 1e6:.1f}"
            print(f"{problem:8} {size:6} {name:22} {took * 1e3:9.2f} {took / median['ours']:7.2f} {shown:>9} "
                  f"{operations / took / rate:10.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
