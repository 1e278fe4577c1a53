"""All checks that need a GPU, in one command of about eight minutes. It writes one Markdown file, row by row.

    python benchmarks/gpu.py                            on a CUDA machine; writes gpu.md
    python benchmarks/gpu.py --pictures pictures.pt     trains on these pictures, not on the shapes
    python benchmarks/gpu.py --pack FOLDER              makes pictures.pt, at most 48 MiB, from a folder of JPEG files
    python benchmarks/gpu.py --device cpu --quick       a small version of every table on a CPU, to test the script
                                                        (with TRITON_INTERPRET=1 also the Triton kernels)

(a) The errors of each loss's value and gradient against float64, beside the naive loss in the same precision. The rows
are random, as after training (pairs at a cosine of 0.9 and 0.99), clustered or collapsed. (b) Whether 200 repeats are
equal to the bit. (c) The GPU tests. (d) Time by events and in a CUDA graph, launches, and memory; then the time of
several kernel configurations. (e) SimCLR with ResNet-18 and `--amp bf16`, for the time that is left. A separate process
makes the rows. If a row raises or takes too long, only this row is lost: a new process replaces the old one, and the
row shows what the old one printed.
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import images
import kernels
import moco
import simclr
import supcon
from benchmarks import loss

ROOT = Path(__file__).resolve().parent.parent
OURS = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "auto"
KINDS = "random", "cosine 0.9", "cosine 0.99", "clustered", "collapsed"


def pairs(kind: str, n: int, d: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw n pairs of rows (n, d), as training makes them, from a fixed seed."""
    draw = torch.Generator().manual_seed(n + d)
    base, one, two = torch.randn(3, n, d, generator=draw).to(device)
    if kind == "random":
        return one, two
    if kind.startswith("cosine"):
        cosine, base = float(kind.split()[1]), F.normalize(base, dim=1)
        away = F.normalize(one - (one * base).sum(1, keepdim=True) * base, dim=1)
        return base, cosine * base + math.sqrt(1 - cosine**2) * away
    centres, noise = (base[: max(1, n // 32)], 0.05) if kind == "clustered" else (base[:1], 1e-3)
    near = centres[torch.arange(n, device=device) % len(centres)]
    return near + noise * one, near + noise * two


def losses(n: int, t: float, device: str, backend: str = OURS) -> dict:
    """Name -> (our loss, the naive loss), both functions of z1 and z2 (n, d)."""
    labels = torch.arange(n, device=device).remainder(max(1, n // 16)).repeat(2)

    def naive_towers(a, b):
        return (moco.info_nce(a, b, None, t) + moco.info_nce(b, a, None, t)) / 2

    def queue(b):
        return torch.cat([b.roll(1, 0), b.flip(0)])

    found = {
        "nt_xent": (lambda a, b: kernels.nt_xent(a, b, t, backend=backend), lambda a, b: simclr.nt_xent(a, b, t)),
        "info_nce": (
            lambda a, b: kernels.info_nce(a, b, queue(b), t, backend=backend),
            lambda a, b: moco.info_nce(a, b, queue(b), t),
        ),
        "two towers": (
            lambda a, b: kernels.info_nce(a, b, temperature=t, symmetric=True, backend=backend),
            naive_towers,
        ),
    }
    for kind in ("out", "in"):
        found[f"sup_con {kind}"] = (
            lambda a, b, k=kind: kernels.sup_con(torch.cat([a, b]), labels, t, loss=k, backend=backend),
            lambda a, b, k=kind: supcon.sup_con(torch.cat([a, b]), labels, t, loss=k),
        )
    return found


def gradient(function, a, b):
    """The value and its gradient by a. The backward pass starts from 2^12, as with a loss scaler for float16."""
    a = a.detach().requires_grad_()
    value = function(a, b)
    return value.detach().double(), torch.autograd.grad(2**12 * value, a)[0].double() / 2**12


def precision(name: str, kind: str, n: int, d: int, t: float, dtype: str, device: str) -> list[str]:
    """Relative errors of our and of the naive loss in `dtype`. In half precision the naive loss is under autocast."""
    to = getattr(torch, dtype)
    a, b = (x.to(to) for x in pairs(kind, n, d, device))
    # At large sizes the reference is the blocked loss in float64; the small rows test that loss against the formula.
    large = n > 4096 and device == "cuda"
    exact = losses(n, t, device, "blocked")[name][0] if large else losses(n, t, device)[name][1]
    value, reference = gradient(exact, a.double(), b.double())
    ours, naive = losses(n, t, device)[name]
    half = to != torch.float32

    def plain(x, y):
        with torch.autocast(device, to if half else torch.bfloat16, enabled=half):
            return naive(x.float(), y.float())

    found = []
    for function, take in ((ours, to), (plain, torch.float32)):
        if function is plain and large:
            found.append("-")
            continue
        v, g = gradient(function, a.to(take), b.to(take))
        found.append(f"{(v - value).abs() / value.abs():.1e}, {(g - reference).norm() / reference.norm():.1e}")
    return [name, kind, f"{2 * n:,}", str(d), f"{t:g}", dtype, *found]


def repeats(name: str, n: int, dtype: str, count: int, device: str) -> list[str]:
    a, b = (x.to(getattr(torch, dtype)) for x in pairs("cosine 0.9", n, 128, device))
    function, equal = losses(n, 0.1, device)[name][0], 0
    first = gradient(function, a, b)
    for _ in range(count):
        equal += all(torch.equal(x, y) for x, y in zip(first, gradient(function, a, b), strict=True))
    return [name, f"{2 * n:,}", dtype, f"{equal} of {count} equal"]


def tests(seconds: int) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_kernels.py"]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        return [" ".join(command[1:]), (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]]
    except subprocess.TimeoutExpired as late:
        return [" ".join(command[1:]), f"not finished after {seconds} s: {(late.stdout or b'').decode()[-200:]!r}"]


def milliseconds(step, device: str, limit: float = 1.5) -> float:
    """The median time of a step, measured for about `limit` seconds; on a GPU by events."""
    times, end = [], time.perf_counter() + limit
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 50):
        if device == "cpu":
            times.append(1e3 * loss.seconds(step))
        else:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            step()
            ended.record()
            ended.synchronize()
            times.append(begun.elapsed_time(ended))
    return statistics.median(times)


def graphed(step):
    """Record the step as a CUDA graph; returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def launches(step) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def speed(problem: str, size: int, dtype: str, device: str) -> list[str]:
    """Forward and backward: our time by events and in a graph, our launches, the others' times, extra memory."""
    cells, table = [problem, f"{size:,}", dtype], loss.NT_XENT if problem == "nt_xent" else loss.MOCO
    arguments = loss.inputs(problem, size, 128, device, getattr(torch, dtype))
    moving, memory = [x for x in arguments if x.requires_grad], []
    for name in ("ours", "naive", "compile(naive)", next((n for n in table if n.startswith("lightly")), None)):
        if name not in table:
            cells.append("-")
            continue
        step = functools.partial(lambda f: torch.autograd.grad(f(*arguments), moving), table[name])
        try:
            step()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                memory.append(f"{(torch.cuda.max_memory_allocated() - before) / 1e6:,.0f}")
            cells.append(f"{milliseconds(step, device):.3f}")
            if name == "ours":
                on_gpu = device == "cuda"
                cells += [f"{milliseconds(graphed(step), device):.3f}", str(launches(step))] if on_gpu else ["-", "-"]
        except Exception as problem:  # if a baseline fails, our figures stay
            cells += [type(problem).__name__] + ["-", "-"] * (name == "ours")
            torch.cuda.empty_cache()
    return [*cells, " / ".join(memory) or "-"]


def configured(name: str, tile: tuple, size: int, dtype: str, device: str) -> list[str]:
    """Time of nt_xent when its "forward" or its "backward" walk takes the given BM, BN, BD, warps and stages."""
    from kernels import fused

    usual, arguments = fused.configuration, loss.inputs("nt_xent", size, 128, device, getattr(torch, dtype))
    fused.configuration = lambda product, *rest: tile if product == (name == "backward") else usual(product, *rest)
    try:
        step = lambda: torch.autograd.grad(kernels.nt_xent(*arguments, backend="triton"), arguments)  # noqa: E731
        step()
        return [name, "x".join(map(str, tile)), f"{size:,}", dtype, f"{milliseconds(graphed(step), device):.3f}"]
    finally:
        fused.configuration = usual


def pack(folder: str, path: str, most: int = 48 * 2**20) -> None:
    """Write the JPEG files of train/, then of test/, and their labels to one file of at most `most` bytes."""
    root, data, total = Path(folder), {"train": [], "test": []}, 0
    names = sorted(place.name for place in (root / "train").iterdir())
    for split, held in data.items():
        columns = [sorted((root / split / name).iterdir()) for name in names]
        for row in zip(*columns, strict=False):  # a picture of each class, so that all classes are cut equally
            files = [torch.frombuffer(bytearray(place.read_bytes()), dtype=torch.uint8) for place in row]
            total += sum(len(x) for x in files)
            if total > most - 2**20:
                break
            held += [(x, label) for label, x in enumerate(files)]
    whole = {"classes": names}
    for split, held in data.items():
        whole[split] = torch.cat([x for x, _ in held])
        whole[f"{split} lengths"] = torch.tensor([len(x) for x, _ in held])
        whole[f"{split} labels"] = torch.tensor([label for _, label in held])
    torch.save(whole, path)
    counts = ", ".join(f"{len(held):,} of {split}" for split, held in data.items())
    print(f"{path}: {counts}, {Path(path).stat().st_size / 2**20:.1f} MiB")


@functools.cache
def training_data(pictures: str, device: str) -> images.Data:
    """The pictures that `pack` wrote, or else the shapes, on the device."""
    if not pictures:
        config = simclr.Config(data="shapes", image_size=32, device=device)
        return images.load(config, torch.device(device))
    whole, splits = torch.load(pictures, weights_only=True), []
    for split in ("train", "test"):
        files = whole[split].split(whole[f"{split} lengths"].tolist())
        pixels = torch.stack([torchvision.io.decode_jpeg(x, torchvision.io.ImageReadMode.RGB) for x in files])
        splits.append(images.Images(whole[f"{split} labels"], torch.device(device), pixels.to(device)))
    return images.Data(pictures, *splits, whole["classes"])


def training(backend: str, pictures: str, device: str, quick: bool, seconds: float) -> list[str]:
    """SimCLR by its CIFAR recipe: images/s of the second 20 steps, or kNN after the epochs that fit in the seconds."""
    data, begun = training_data(pictures, device), time.perf_counter()
    size = dict(backbone="resnet8", image_size=16, batch_size=16) if quick else dict(amp="bf16", batch_size=512)
    few = images.Data(
        data.name, data.train.at(torch.arange(20 * size["batch_size"]) % len(data.train)), data.test, data.classes
    )

    def run(on, epochs, **more):
        with tempfile.TemporaryDirectory() as folder:
            given = dict(size, device=device, loss_backend=backend, out=f"{folder}/run", epochs=epochs, **more)
            return simclr.train(simclr.Config.preset("cifar", **given), on)

    rate = run(few, 2, knn_every=0, warmup_epochs=0.0)["images_per_second"]
    if not seconds:
        return [f"20 steps, --loss-backend {backend}", f"{rate:,.0f} images/s"]
    epochs = max(1, int(0.9 * (seconds - (time.perf_counter() - begun)) * rate / len(data.train)) * (not quick))
    last = run(few if quick else data, epochs, knn_every=epochs, warmup_epochs=min(10.0, epochs / 10))
    return [f"{epochs} epochs", f"{last['images_per_second']:,.0f} images/s", f"{last['knn_top1']:.3f}"]


class Table(NamedTuple):
    title: str
    headers: list[str]
    seconds: float  # the most for a row; 0: all that are left
    rows: list[functools.partial]  # each returns its cells


def plan(device: str, quick: bool, pictures: str) -> list[Table]:
    call, names = functools.partial, list(losses(1, 1.0, device))
    half = ("float16", "bfloat16") if device == "cuda" or OURS == "triton" else ("bfloat16",)
    both, wide = (half[0], "float32"), (32, 64, 256, 512)
    exact = [
        ("nt_xent", kind, 256, 128, t, to) for kind in KINDS for t in (0.05, 0.1, 0.5) for to in (*half, "float32")
    ]
    exact += [(name, kind, 256, 128, 0.1, to) for name in names[1:] for kind in KINDS for to in both]
    exact += [("nt_xent", "cosine 0.9", 1024, d, 0.1, to) for d in wide for to in both]
    exact += [("nt_xent", kind, n, 128, 0.02, to) for kind in KINDS for n in (1024, 32768) for to in both]
    bitwise = [(name, 2048, to, 200, device) for name in names for to in both]
    timed = [("nt_xent", size, to) for size in (1024, 8192, 65536) for to in both[::-1]]
    timed += [("info_nce", 65536, to) for to in both[::-1]]
    tiles = [("forward", (128, 128, 128, 8, 2)), ("forward", (128, 64, 128, 4, 3)), ("forward", (64, 128, 128, 4, 3))]
    tiles += [("backward", (64, 128, 128, 4, 2)), ("backward", (64, 64, 128, 4, 3)), ("backward", (128, 64, 128, 8, 2))]
    if quick:
        exact = [row for row in exact if row[2] == 256][::9]
        bitwise, timed = [(name, 100, "float32", 3, device) for name in names[::2]], [("nt_xent", 512, "float32")]
    tiles = [call(configured, name, tile, 8192, "float16", device) for name, tile in tiles if device == "cuda"]
    backends = ("triton", "blocked", "naive")[device == "cpu" :]
    others = ["naive", "torch.compile(naive)", "lightly's formula", "MB: ours / naive / compile / lightly"]
    return [
        Table("Relative error of value and gradient, against float64",
              ["loss", "rows", "2N", "d", "t", "dtype", "ours", "naive"], 40,
              [call(precision, *row, device) for row in exact]),
        Table("Repeats", ["loss", "2N", "dtype", "bits"], 60, [call(repeats, *row) for row in bitwise]),
        Table("The GPU tests", ["command", "last line of its output"], 160, [] if quick else [call(tests, 150)]),
        Table("Forward and backward, ms, d = 128",
              ["loss", "size", "dtype", "ours", "in a graph", "launches", *others], 90,
              [call(speed, *row, device) for row in timed]),
        Table("Configurations: BM, BN, BD, warps, stages", ["walk", "tile", "2N", "dtype", "ms"], 40, tiles),
        Table("SimCLR, 32 pixels, 20 steps", ["run", "speed"], 60,
              [call(training, backend, pictures, device, quick, 0) for backend in backends]),
        Table("SimCLR for the time that is left", ["run", "speed", "kNN"], 0,
              [call(training, "auto", pictures, device, quick)]),
    ]  # fmt: skip


def work(pipe, log: str) -> None:
    """The work of the process: make the rows that come through the pipe. Its output goes to the file `log`."""
    os.setsid()  # a group of its own, so that its children are stopped with it
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    pipe.send("ready")  # sent after the imports, so that their time is not a row's
    while True:
        row = pipe.recv()
        try:
            pipe.send((True, row()))
        except BaseException as problem:
            words = " ".join(f"{type(problem).__name__}: {problem}".split())
            pipe.send((False, words[:200]))


class Worker:
    """The process that makes rows. If it dies or takes too long, a new process replaces it."""

    def __init__(self) -> None:
        self.process, self.log = None, tempfile.mkstemp()[1]

    def cells(self, row: functools.partial, seconds: float) -> tuple[bool, list[str]]:
        """Return whether the row could be made, and its cells."""
        if fresh := self.process is None or not self.process.is_alive():
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs, self.log))
            self.process.start()
            theirs.close()  # so that the pipe closes here when the process ends
        try:
            if fresh:
                self.pipe.recv()
            self.pipe.send(row)
            if self.pipe.poll(seconds):
                good, cells = self.pipe.recv()
                if not good:  # after a CUDA error the process cannot use the GPU any more
                    self.stop()
                return good, cells if good else [named(row), cells.replace("|", "/")]
            problem = f"no result within {seconds:.0f} s"
        except (EOFError, OSError):
            problem = "its process died"
        self.stop()
        return False, [named(row), f"{problem}; it printed: {' '.join(Path(self.log).read_text().split())[-200:]!r}"]

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()


def named(row: functools.partial) -> str:
    return " ".join(map(str, (row.func.__name__, *row.args)))


def fill(tables: list[Table], out: Path, seconds: float) -> None:
    """Write the tables, row by row, to `out` and to the screen. All tables but the last share 0.7 of the seconds."""
    worker, summary, start = Worker(), [], time.monotonic()

    def say(*lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        with out.open("a") as file:
            print(*lines, sep="\n", file=file)

    for title, headers, most, rows in tables:
        begun, bad, share = time.monotonic(), 0, 0.7 if most else 1.0
        say("", f"## {title}", "", f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}")
        for row in rows:
            left = start + share * seconds - time.monotonic()
            if not most:  # the row is told how long it has, and may take half a minute more
                row, left = functools.partial(row.func, *row.args, max(1, left - 15)), max(left, 1) + 30
            good, cells = (
                worker.cells(row, min(left, most or left)) if left > 0 else (False, [named(row), "no time left"])
            )
            bad += not good
            say(f"| {' | '.join(cells)} |")
        summary.append(f"| {title} | {len(rows)} | {bad} | {time.monotonic() - begun:.0f} |")
    worker.stop()
    say("", "## Summary", "", "| table | rows | without a result | seconds |", "|---|---|---|---|", *summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="make few and small rows")
    parser.add_argument("--pictures", default="", help="a file that --pack made")
    parser.add_argument("--pack", default="", help="make pictures.pt from this folder of train/ and test/, and end")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all tables together (default 8)")
    parser.add_argument("--out", default="gpu.md", help="the file to write (default gpu.md)")
    args = parser.parse_args()
    if args.pack:
        return pack(args.pack, "pictures.pt")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device; --device cpu --quick tests the script")
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, no GPU"
    command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    head = f"# {name}\n\ntorch {torch.__version__}, {time.strftime('%Y-%m-%d')}, `{command}`\n"
    Path(args.out).write_text(head)
    print(head)
    tables = plan(args.device, args.quick, args.pictures)
    fill(tables, Path(args.out), 60 * args.minutes)


if __name__ == "__main__":
    main()
