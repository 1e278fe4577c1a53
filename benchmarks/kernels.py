"""Compile every configuration of the Triton kernels ahead of time, without a GPU, and inspect the machine code.

    python benchmarks/kernels.py                            all targets and widths; takes minutes
    python benchmarks/kernels.py --target sm_90 --d 128

For each kernel it prints registers, spills, shared memory, CTAs per SM and tensor-core instructions. It also prints how
many matrix products, exponentials and other instructions the inner loop executes per similarity, in a tile without edge
masks. From these counts and the card's published rates it derives a fraction: the card's least possible time over the
loop's time. That column is derived, not measured. The exit status is 1 if a kernel spills, uses local memory or an
atomic, needs more shared memory than the card has, multiplies outside the tensor cores, or was meant to load through
descriptors and does not.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import fused

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),  # stands for every other NVIDIA card, with the "small" configurations
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 164, "sm_89": 100, "sm_90": 228, "sm_100": 228, "gfx942": 64}  # KB per SM, as published
# RATES: 16-bit multiply-adds of the tensor cores per SM and clock, from the published dense rates: A100 312e12 / 2 /
# (108 x 1.41e9), H100 SXM 989e12 / 2 / (132 x 1.83e9), B200 2250e12 / 2 / (148 x 1.85e9). Each card makes 16
# exponentials per SM and clock, and has 128 lanes for all other instructions.
TENSOR = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}  # at 16 bits
RATES = {"sm_80": 1024, "sm_90": 2048, "sm_100": 4096}
DTYPES = "fp16", "fp16x2"  # how rows are stored; fp16x2 is for float32 at full precision


def variants(width, dtype, target):
    """Yield (name, kernel, How, warps, stages, absent) for every launch that is possible at this width.

    `absent` says, for labels, shifts m, weights a and weights b in turn, whether this launch goes without them.
    """
    parts, named = 2 if dtype == "fp16x2" else 1, target if target in ("sm_80", "sm_90") else "small"
    kinds = {  # name -> (fields of How, whether it has labels, whether it has b)
        "forward": (dict(total=True, meet=True, pair=True), False, False),
        "forward, towers": (dict(total=True, meet=True, pair=True, cross=True), False, False),
        "forward, class": (dict(total=True, meet=True, classes=1), True, False),
        "queue": (dict(total=True, emit=True), False, False),
        "backward": (dict(meet=True, pair=True), False, False),
        "backward, towers": (dict(meet=True, pair=True, cross=True), False, False),
        "backward, class": (dict(meet=True, classes=-1), True, False),
        "backward, positives": (dict(meet=True), True, True),
    }
    for kind, (given, labels, b) in kinds.items():
        total = given.get("total", False)
        bm, bn, bd, warps, stages = fused.configuration(kind == "queue" or not total, labels, width, parts, named)
        tile = fused.How(bm, bn, bd, -(-width // bd), parts, named == "sm_90" and bd <= 256)._replace(**given)
        for shift in (False, True)[kind == "queue" :]:
            absent = [not labels, total or not shift, total, not b]
            how, name = tile._replace(shift=shift), kind + ", shift" * shift
            yield name, fused.walk_kernel, how, warps, stages, absent
            if shift and not labels:  # a temperature on the GPU
                yield f"{name}, pointer", fused.walk_kernel, how._replace(pointer=True), warps, stages, absent
    bd = fused.power_of_two(width)
    row = fused.How(max(1, 2048 // bd), BD=bd, parts=parts)
    yield "unit_rows", fused.unit_rows_kernel, row, 4, 3, []
    yield "finish", fused.finish_kernel, row._replace(pair=True), 4, 3, []
    yield "finish, queue", fused.finish_kernel, row._replace(pair=True, emit=True), 4, 3, []
    yield "input_gradient", fused.input_gradient_kernel, row._replace(pair=True, both=True), 4, 3, []
    yield "input_gradient, queue", fused.input_gradient_kernel, row._replace(pair=True, emit=True), 4, 3, []


def compile_one(task):
    target, width, dtype, name = task
    _, kernel, how, warps, stages, absent = next(v for v in variants(width, dtype, target) if v[0] == name)
    names, elements = kernel.arg_names, how.BM * how.BN
    kinds = {"root": "fp32", "C": "*fp32" if how.pointer else "fp32", "how": "constexpr"}  # all others point to float32
    kinds |= dict.fromkeys(("M", "K", "n", "d", "width", "whole", "first", "per_split", "splits"), "i32")
    kinds |= dict.fromkeys(("Z", "Y", "Pairs"), "*fp16") | {"strides": ("i32",) * 6, "starts": ("i32",) * 4}
    kinds["DX"] = given = "*fp16" if dtype == "fp16" else "*fp32"
    kinds["X"] = (given,) * 3
    if how.descriptors:
        kinds |= {p: f"tensordesc<fp16[{b},{how.BD}]>" for p, b in (("Z", how.BM), ("Y", how.BN))}
    constants = {(names.index("how"),): how}
    if absent:
        side = zip(("*i64", "*fp32", "*fp32", "*fp32"), absent, strict=True)
        kinds["row"] = kinds["col"] = tuple("constexpr" if gone else kind for kind, gone in side)
        constants |= {(names.index(p), i): None for p in ("row", "col") for i, gone in enumerate(absent) if gone}
        if how.total:
            kinds["Top"], constants[names.index("Top"),] = "constexpr", None
    signature = {p: kinds.get(p, "*fp32") for p in names}
    whole = ("d", "per_split") if elements else ("width",)  # multiples of 16
    aligned = [p for p in names if p in whole or (isinstance(signature[p], str) and signature[p].startswith("*"))]
    attributes = {(names.index(p),): [["tt.divisibility", 16]] for p in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "num_stages": stages})
    row = dict(target=target, d=width, dtype=dtype, kernel=name, warps=warps, shared=compiled.metadata.shared)
    row["tile"] = f"{how.BM}x{how.BN}" if elements else f"{how.BM} rows"
    (read_amd if target == "gfx942" else read_sass)(compiled, row, elements, how)
    row["bad"] = bool(
        row["shared"] > 1024 * (SHARED[target] - (target != "gfx942"))
        or row["spill"]
        or row["atomics"]
        or (bool(elements) and TENSOR[target] not in row["tensor"].split())
        or (how.descriptors and "UTMALDG" not in row["tensor"].split())
    )
    return row


def read_sass(compiled, row, elements, how):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    row["registers"], row["spill"] = int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])
    row["spill"] += len(re.findall(r"\b(?:STL|LDL)\b", code))
    row["atomics"] = len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG)\.", code))
    row["tensor"] = " ".join(sorted(set(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA|UTMALDG)\b", code))))
    by_registers = 65536 // (-(-row["registers"] // 8) * 8 * 32 * row["warps"])
    by_shared = SHARED[row["target"]] * 1024 // (row["shared"] + 1024)
    row["ctas"] = min(by_registers, by_shared, 64 // row["warps"])
    if not elements:
        return
    chunks = how.chunks
    loop = inner_loop(code, chunks, elements * how.BD * (3 if how.parts == 2 else 1) / row["warps"])
    # Each program makes one chunk of the output. Forward without emit has no output of chunks: one program does all.
    programs = chunks if how.emit or not how.total else 1
    each = 32 * row["warps"] * programs / elements  # per similarity, over all programs that compute it
    row["exp"] = sum(times for line, times in loop if "MUFU.EX2" in line) * each
    done = sum(times * multiply_adds(line) for line, times in loop) / 32  # per thread
    row["products"] = done * each / (how.BD * chunks) or "-"  # the name has no shape on sm_100
    row["other"] = sum(times for _, times in loop) * each - row["exp"]


def multiply_adds(line):
    """The multiply-adds of a warp in one tensor-core instruction."""
    if match := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", line):
        return int(match[1]) * int(match[2]) * int(match[3]) / 4  # four warps share the instruction
    match = re.search(r"HMMA\.(16)(8)(16|8|4)\.", line)
    return 16 * 8 * int(match[3]) if match else 0


def inner_loop(code, chunks, chunk_multiply_adds):
    """Return (instruction, times executed) for one round of the loop with the most exponentials.

    A loop goes from a label to the last jump back to it. The round takes the shortest way through an exponential, which
    leaves out the masks of edge tiles, since a branch skips them. A loop inside it goes over the chunks of a row; it
    may be unrolled, and then holds several times the multiply-adds of a chunk.
    """
    lines, labels, loops = [], {}, []
    for line in code.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line):
            lines.append(line)
            if (jump := jump_of(line)) in labels:
                loops.append(range(labels[jump], len(lines)))
    best = max(loops, key=lambda loop: sum("EX2" in lines[n] for n in loop), default=range(0))
    within = {n for loop in loops if best.start < loop.start and loop.stop < best.stop for n in loop}
    unrolled = max(1, round(sum(multiply_adds(lines[n]) for n in within) / chunk_multiply_adds))
    ways = {n: [] for n in best}
    for n in best:
        jump, predicated = labels.get(jump_of(lines[n])), re.search(r"@!?U?P", lines[n])
        ways[n] += [jump] * (jump in best) + [n + 1] * ((jump is None or bool(predicated)) and n + 1 in best)
    back = {n: [] for n in best}
    for n in best:
        for way in ways[n]:
            back[way].append(n)
    to, fro = (shortest(edges, n) if best else {} for edges, n in ((ways, best.start), (back, best.stop - 1)))
    through = [n for n in best if "EX2" in lines[n] and n in to and n in fro]
    middle = min(through, key=lambda n: len(to[n]) + len(fro[n]), default=None)
    path = best if middle is None else to[middle] + fro[middle][-2::-1]
    return [(lines[n], chunks / unrolled if n in within else 1) for n in path]


def shortest(edges, start):
    """Return the shortest path from start to each node that can be reached."""
    paths, front = {start: [start]}, [start]
    while front:
        n = front.pop(0)
        for way in edges[n]:
            if way not in paths:
                paths[way] = [*paths[n], way]
                front.append(way)
    return paths


def jump_of(line):
    match = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
    return match and match[1]


def read_amd(compiled, row, elements, how):
    code = compiled.asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", code)[1])  # noqa: E731
    row["registers"], row["spill"] = (
        number("vgpr_count"),
        number("vgpr_spill_count") + number("private_segment_fixed_size"),
    )
    row["atomics"] = len(re.findall(r"\b(?:global|buffer|flat|ds)_atomic", code))
    row["tensor"] = "MFMA" if "v_mfma" in code else ""


def fraction_of_floor(row):
    """Return the range of the least possible time over the loop's time, both derived from the published rates. The
    least time overlaps products and exponentials perfectly. At the low end of the range the loop overlaps nothing:
    products, exponentials and other instructions follow one another. At the high end it overlaps all of them."""
    if row["target"] not in RATES or row.get("products", "-") == "-" or row["dtype"] != "fp16":
        return "-"
    products = row["d"] / RATES[row["target"]]  # an SM's clocks for one similarity
    floor = max((2 if row["kernel"].startswith(("backward", "queue")) else 1) * products, 1 / 16)
    own = row["products"] * products, row["exp"] / 16, row["other"] / 128
    return f"{floor / sum(own):.2f}-{floor / max(own):.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="(default: all)")
    parser.add_argument("--d", nargs="+", type=int, default=[16, 32, 64, 128, 256, 512], help="widths of the rows")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="(default: both)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels at a time (default: the cores)")
    args = parser.parse_args()
    tasks = [
        (target, d, dtype, name)
        for target in args.target
        for dtype in args.dtype
        for d in args.d
        for name, *_ in variants(d, dtype, target)
    ]
    columns = "target d dtype kernel tile warps registers spill shared ctas tensor products exp other atomics".split()  # noqa: SIM905
    widths = [7, 4, 7, 24, 8, 6, 10, 6, 7, 5, 16, 9, 6, 7, 8]
    print("".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)), "floor (derived)")
    failures = 0
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(compile_one, tasks):
            cells = [row.get(c, "-") for c in columns]
            cells = [f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells]
            failures += row["bad"]
            print("".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)), fraction_of_floor(row),
                  "  FAILED" if row["bad"] else "", flush=True)  # fmt: skip
    if "sm_100" in args.target:
        print(
            "sm_100: tensor-core instructions do not name their shape, so products are not counted ('-'). The compiler"
        )
        print("keeps more than one copy of the loop's body, so exp and other may be counted twice.")
    print("Registers, spills, shared memory, instructions and counts come from the machine code. The floor column is")
    print("derived from the counts and published rates. Nothing ran on a GPU.")
    print(f"{len(tasks)} kernels, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
