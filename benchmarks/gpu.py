"""Everything that a GPU must show, in one command of ten minutes, written to one Markdown file.

    python benchmarks/gpu.py                  any CUDA machine; writes gpu.md
    python benchmarks/gpu.py --device cpu     its CPU parts, to see that the script works

The GPU tests; how many kernels a call launches; time and memory of the loss (ours, naive, torch.compile of it, lightly
where it is installed) in fp16 and fp32, 2N from 1024 to 131,072, and MoCo's; the fraction of the floor of the
hardware; images/s of SimCLR with a ResNet-18 at 32 pixels. What runs out of memory or time is '-'.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import loss
from kernels import info_nce, nt_xent

ROOT = Path(__file__).resolve().parent.parent
# Published dense 16-bit tensor rates (operations/s), and exponentials/s: 16 a processor and clock.
CARDS = {
    "A100": (312e12, 16 * 108 * 1.41e9),
    "H100": (989e12, 16 * 132 * 1.83e9),
    "H200": (989e12, 16 * 132 * 1.83e9),
    "B200": (2250e12, 16 * 148 * 1.85e9),
}


def floor(card, similarities, d, products, exponentials):
    """Seconds below which no kernel can be: its products or its exponentials, whichever takes longer."""
    if card is None:
        return None
    return max(products * 2 * similarities * d / CARDS[card][0], exponentials * similarities / CARDS[card][1])


def seconds(function, arguments, limit=2.0):
    """Return the median time of a forward and backward pass, within about `limit` seconds; None out of memory."""
    cuda = arguments[0].is_cuda
    try:
        loss.step(function, arguments)  # compiles
        loss.step(function, arguments)
        times, end = [], time.perf_counter() + limit
        while len(times) < 3 or (time.perf_counter() < end and len(times) < 50):
            start = time.perf_counter()
            loss.step(function, arguments)  # ends with a synchronisation
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    except torch.OutOfMemoryError:
        return None
    finally:
        for x in arguments:
            x.grad = None
        if cuda:
            torch.cuda.empty_cache()


def peak(function, arguments):
    """Return the bytes beyond the inputs."""
    if not arguments[0].is_cuda:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        loss.step(function, arguments)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def loss_table(device, card, end):
    yield "| loss | dtype | size | ours ms | of the floor | naive | torch.compile | lightly | MB, ours / naive |"
    yield "|---|---|---|---|---|---|---|---|---|"
    lightly = next(name for name in loss.NT_XENT if name.startswith("lightly"))
    sizes = [1024, 2048] if device == "cpu" else [1024, 4096, 8192, 16384, 32768, 65536, 131072]
    rows = [("nt_xent", size, dtype) for dtype in ("float16", "float32") for size in sizes]
    rows += [("info_nce", 65536, dtype) for dtype in ("float16", "float32")]
    for problem, size, dtype in rows:
        if device == "cpu" and dtype == "float16":
            continue
        torch._dynamo.reset()  # else it stops compiling after some shapes, in silence
        arguments = loss.inputs(problem, size, 128, device, getattr(torch, dtype))
        table = loss.NT_XENT if problem == "nt_xent" else loss.MOCO
        times = {}
        for name in ("ours", "naive", "compile(naive)", lightly):
            if name in table and time.time() < end:
                times[name] = seconds(table[name], arguments)
        memory = [peak(table[name], arguments) if times.get(name) else None for name in ("ours", "naive")]
        ours, parts = times.get("ours"), 3 if dtype == "float32" else 1  # float32: three products of float16 parts each
        if ours is None:
            yield f"| {problem} | {dtype} | {size} | - | - | - | - | - | - |"
            continue
        similarities, work = (size**2, (3, 2)) if problem == "nt_xent" else (256 * size, (2, 1))
        least = floor(card, similarities, 128, work[0] * parts, work[1])
        ratios = [
            "-" if times.get(n) is None else f"{times[n] / ours:.1f}x" for n in ("naive", "compile(naive)", lightly)
        ]
        megabytes = " / ".join("-" if m is None else f"{m / 1e6:.0f}" for m in memory)
        share = "-" if least is None else f"{least / ours:.2f}"
        yield f"| {problem} | {dtype} | {size:,} | {ours * 1e3:.3f} | {share} | {' | '.join(ratios)} | {megabytes} |"


def launches(device):
    """Lines that say how many kernels a forward and a backward pass launch, as the profiler counts them."""
    if device == "cpu":
        return ["Launches are counted on a GPU; without one, by `tests/test_triton_interpreter.py`."]
    lines = []
    for name, function, problem, size in (
        ("nt_xent", nt_xent, "nt_xent", 1024),
        ("info_nce", info_nce, "info_nce", 4096),
    ):
        arguments, counts, value = loss.inputs(problem, size, 128, device, torch.float16), [], []
        loss.step(function, arguments)
        gradient = torch.ones((), device=device)
        of = arguments[:1] if name == "info_nce" else arguments
        for work in (lambda: value.append(function(*arguments)), lambda: torch.autograd.grad(value[0], of, gradient)):  # noqa: B023
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                work()
                torch.cuda.synchronize()
            counts.append(sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events()))
        lines.append(f"`{name}`: {counts[0]} launches forward, {counts[1]} backward (at most 4 and 3 are meant).")
    return lines


def run(*command, timeout):
    """Return the output of a command of this Python, or what went wrong, and never more than `timeout` seconds."""
    try:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        return done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        return f"not finished after {timeout} s"


def simclr_speed(device):
    """Return the command, and the images/s of its second epoch as log.csv has them."""
    name = "demo" if device == "cpu" else "cifar"  # a ResNet-18 takes minutes an epoch on a CPU
    command = ["--data", "shapes", "--preset", name, "--epochs", "2", "--warmup-epochs", "1", "--knn-every", "0"]
    with tempfile.TemporaryDirectory() as folder:
        output = run("simclr.py", *command, "--device", device, "--out", folder, timeout=150)
        log = Path(folder) / "log.csv"
        rows = log.read_text().split() if log.exists() else []
    speed = f"{float(rows[2].split(',')[-1]):,.0f} images/s" if len(rows) > 2 else f"failed: {output.strip()[-200:]}"
    return " ".join(command), speed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", default="gpu.md")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: --device cpu runs the parts that a CPU can")
    start, device = time.time(), args.device
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or 'a CPU'}, no GPU"
    card = next((card for card in CARDS if device == "cuda" and card in name), None)
    lines = [f"# {name}", "", f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, `python benchmarks/gpu.py`", ""]

    def add(*more):
        lines.extend(more)
        print("\n".join(more), flush=True)
        Path(args.out).write_text("\n".join(lines) + "\n")

    add("## Tests", "")
    output = run("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_kernels.py", timeout=150)
    add(f"`python -m pytest -m gpu tests/test_kernels.py`: {output.strip().splitlines()[-1]}", "")
    add("## Launches", "", *launches(device), "")
    add("## SimCLR, images/s", "")
    command, speed = simclr_speed(device)
    add(f"`python simclr.py {command}`: {speed}", "")
    add("## Losses", "", "Forward and backward, d = 128; the others as multiples of our time.", "")
    for line in loss_table(device, card, start + 540):
        add(line)
    add("", f"{time.time() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
