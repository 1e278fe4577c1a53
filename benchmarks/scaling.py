"""What do several processes on one machine (gloo) send and store as their number W grows, and how fast are two?

    python benchmarks/scaling.py                  the loss: 1, 2, 4 and 8 processes of 512 images, d = 128
    python benchmarks/scaling.py --methods        a whole step of each method's demo, with two processes
    python benchmarks/scaling.py --counts         SimCLR's ResNet-50 at 224 pixels: parameters, and bytes a view keeps
    python benchmarks/scaling.py --speed          images/s of the training loop: two processes against one, on two cores

Bytes are those that the loopback device carries, averaged over steps and divided by W. Memory is the peak beyond the
inputs, in the process with the highest peak. "all-gather with gradient" is what libraries do: they gather z by a
function whose backward pass sums the gradient of all rows over all processes, and they build the 2n x 2N logits.
"""

import argparse
import importlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import images
import simclr
from benchmarks.loss import status
from benchmarks.table import markdown
from kernels import nt_xent

STEPS = 10
METHODS = ["simclr", "moco", "byol", "simsiam", "swav", "supcon"]


class Gather(torch.autograd.Function):
    """Gather the rows (n, d) of all processes, rank by rank, to (W n, d). The backward pass sums the gradients of all
    processes, as in other libraries; that of `common.gather` exchanges nothing."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient := gradient.contiguous())
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def usual(z1, z2, t=0.5):
    """nt_xent by an all-gather with gradient: this process's 2n rows against all 2N rows."""
    z, n = F.normalize(torch.cat([z1, z2]), dim=1), len(z1)
    first = dist.get_rank() * 2 * n
    own = first + torch.arange(2 * n)
    s = (z @ Gather.apply(z).T / t).index_put((torch.arange(2 * n), own), torch.tensor(-torch.inf))
    return F.cross_entropy(s, first + torch.arange(2 * n).roll(n))


def sent():
    """Bytes that the loopback device has carried so far."""
    dist.barrier()
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def measure_loss(rank, processes, folder, n, d):
    join(rank, processes, folder)
    losses = {"ours": lambda a, b: nt_xent(a, b, group=dist.group.WORLD), "all-gather with gradient": usual}
    for name, loss in losses.items():
        torch.manual_seed(rank)
        z = [torch.randn(n, d, requires_grad=True) for _ in range(2)]
        loss(z[0][:40], z[1][:40]).backward()  # loads the libraries
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        dist.barrier()
        before = status("VmRSS")
        loss(*z).backward()
        peak = int(common.gather(torch.tensor([status("VmHWM") - before])).max())
        start = sent()
        for _ in range(STEPS):
            loss(*z).backward()
        bytes_each = (sent() - start) / STEPS / processes
        torch.save((bytes_each, peak), f"{folder}/{name}.pt")
    dist.destroy_process_group()


class Counted(images.Images):
    """A split that notes how many bytes have been sent, each time that one of the first steps asks for its views."""

    def views(self, *asked, **named):
        for views in super().views(*asked, **named):
            self.counts += [sent()] if len(self.counts) < STEPS else []
            yield views


def measure_method(rank, processes, folder, name):
    join(rank, processes, folder)
    method, (pictures, labels) = importlib.import_module(name), images.make_shapes(STEPS * 128, 0)
    split = Counted(labels, torch.device("cpu"), pictures)
    split.counts = []
    given = {"warmup_epochs": 0.0, "batch_size": 128, "knn_every": 0, "device": "cpu", "out": f"{folder}/run"}
    data = images.Data("shapes", split, None, [*images.SHAPES])
    with open(os.devnull, "w") as sys.stdout:
        method.train(method.Config.preset("demo", epochs=1, **given), data)
    each = [b - a for a, b in itertools.pairwise(split.counts[2:])]
    torch.save(statistics.median(each) / processes, f"{folder}/{name}.pt")
    dist.destroy_process_group()


def join(rank, processes, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    torch.set_num_threads(1)


def in_processes(work, processes, *rest):
    """Run `work` in new processes; return what they saved in the folder, by file name."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (processes, folder, *rest), nprocs=processes)
        return {path.stem: torch.load(path) for path in Path(folder).glob("*.pt")}


def counts():
    """SimCLR's model: M parameters, BN layers, and the MB that a view's graph keeps, without and with bf16."""
    model = simclr.SimCLR(simclr.Config()).to(memory_format=torch.channels_last)
    layers = sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    row = [f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}", str(layers)]
    for amp in (False, True):
        kept = []
        for views in (2, 4):
            sizes = {}

            def keep(x, sizes=sizes):
                if not isinstance(x, torch.nn.Parameter):
                    sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            x = torch.randn(views, 3, 224, 224).to(memory_format=torch.channels_last)
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
                graph = model.embed(x)  # noqa: F841  kept, so that no storage is used again
            kept.append(sum(sizes.values()))
        row.append(f"{(kept[1] - kept[0]) / 2 / 1e6:.1f}")
    return row


def speed(rounds):
    """Images/s of a demo's second epoch: two processes of one thread, one process of two threads, one of one thread."""
    root = Path(__file__).resolve().parent.parent
    flags = ["simclr.py", "--epochs", "2", "--knn-every", "0", "--out"]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = {"two processes": [], "one process, two threads": [], "one process, one thread": []}
    for _ in range(rounds):
        for name, command, threads in zip(found, (many, [], []), (1, 2, 1), strict=True):
            with tempfile.TemporaryDirectory() as out:
                env = os.environ | {"OMP_NUM_THREADS": str(threads)}
                command = [sys.executable, *command, *flags, out]
                subprocess.run(command, cwd=root, env=env, check=True, stdout=subprocess.DEVNULL)
                found[name].append(float((Path(out) / "log.csv").read_text().split(",")[-1]))
    rates = {name: statistics.median(values) for name, values in found.items()}
    base = rates["one process, two threads"]
    return [[name, f"{rate:,.0f}", f"{rate / base:.2f}"] for name, rate in rates.items()]


def main():
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--methods", action="store_true", help="measure a step of each method, with two processes")
    parser.add_argument("--counts", action="store_true", help="count parameters and memory of ResNet-50")
    parser.add_argument("--speed", action="store_true", help="measure images/s of the training loop")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8], help="values of W (default 1 2 4 8)")
    parser.add_argument("--n", type=int, default=512, help="images of each process (default 512)")
    parser.add_argument("--d", type=int, default=128, help="width of z (default 128)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of --speed (default 3)")
    args = parser.parse_args()
    if args.speed:
        print(markdown(["", "images/s", "over one process, two threads"], speed(args.rounds)))
    elif args.counts:
        print(markdown(["M parameters", "BN layers", "MB a view", "MB a view, bf16"], [counts()]))
    elif args.methods:
        rows = [[m, f"{in_processes(measure_method, 2, m)[m] / 1e6:.2f}"] for m in METHODS]
        print(markdown(["", "MB sent a step by each of 2"], rows))
    else:
        rows = []
        for processes in args.processes:
            for name, (size, peak) in sorted(
                in_processes(measure_loss, processes, args.n, args.d).items(), reverse=True
            ):
                rows.append([str(processes), name, f"{size / 1e6:.2f}", f"{peak / 1e6:.1f}"])
                print(*rows[-1], flush=True)
        print(markdown(["W", "loss", "MB sent a step by each", "peak MB of each"], rows))


if __name__ == "__main__":
    main()
