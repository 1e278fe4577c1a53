"""What every method file shares.

Sections: errors and exit status | flags | one process or torchrun | network | optimisation | evaluation | a run and its
files.
Copy this file and images.py along with a method file.
"""

import argparse
import dataclasses
import difflib
import errno
import functools
import importlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import typing
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

import images
from images import Data, Images, InputError, ensure, share

# ---------------------------------------------------------------------------------------- errors and exit status

OUT_OF_MEMORY = "DefaultCPUAllocator|Storage size calculation overflowed|Cannot allocate memory"  # plain RuntimeErrors
LOST = "(?i)connection (closed|reset|refused)|broken pipe|remote process exited"  # of another process's end: these, too


class RunFailure(RuntimeError):
    """The run itself failed (a non-finite loss, a full disk): one line, exit status 1."""


class Diverged(RunFailure):
    """The loss or the weights are not finite."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP, as a rule after the checkpoint was saved: one line, and the signal's number."""


@contextmanager
def exit_status() -> Iterator[None]:
    """Turn the outcome of a script into its exit status: 0 done, 1 failed, 2 bad input, 128 + the number of a signal
    (130 Ctrl-C, 143 SIGTERM), 141 as SIGPIPE's when nobody reads what it prints (`| head`).

    Every expected failure prints exactly one line, `error: what is wrong, and what to do`; anything else is a bug
    and keeps its traceback. Of several processes rank 0 speaks; another one if rank 0 has nothing to say.
    """
    if rank := int(os.environ.get("RANK", "0")) if several() else 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    lost = False
    try:
        yield
        sys.stdout.flush()
        if share()[1] > 1:
            dist.destroy_process_group()
        return
    except InputError as error:
        status, line = 2, f"error: {error}"
    except RunFailure as error:
        status, line = 1, f"error: {error}"
    except Stopped as error:
        status, line = 128 + error.args[1], error.args[0]
    except KeyboardInterrupt:
        status, line = 130, "stopped"
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(OUT_OF_MEMORY, str(error)):
            line = "error: out of memory; give a smaller --batch-size, or pieces of it by --micro-batch-size"
        elif isinstance(error, OSError):
            full = "; is the disk full?" * (error.errno in (errno.ENOSPC, errno.EDQUOT))
            line = f"error: {error.filename or 'a file'}: {error.strerror or error}{full}"
        elif share()[1] > 1 and (isinstance(error, dist.DistError) or re.search(LOST, str(error))):
            lost, line = True, "error: another process of the job has ended; --resume goes on from the last checkpoint"
        else:
            raise
        status = 1
        try:
            print(flush=True)
        except OSError:  # it is stdout: a closed pipe; the interpreter flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
    if rank and (lost or status > 2):  # rank 0 says it
        sys.exit(status)
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)  # if rank 0 says the same, torchrun ends this process
        line = f"rank {rank}: {line}"
    print("\r\x1b[K" * sys.stderr.isatty() + line, file=sys.stderr, flush=True)  # over the progress line
    sys.exit(status)


# --------------------------------------------------------------------------------------------------------- flags

SHARES = r"(.*_)?(momentum|scale)|(blur|solarize)(_\d)?"  # flags from 0 to 1, by their names
MAY_BE_0 = r"seed|weight_decay|(.*_)?epochs?|.*_(every|minutes|iterations|strength|gb)|(micro_batch|queue)_size"
MAY_BE_0 += "|hidden_dim|epsilon"
MAY_CHANGE = r"data|epochs|lr|weight_decay|warmup_epochs|micro_batch_size|bn_splits"  # on --resume, which says so
# of no matter to the weights:
NO_MATTER = r"out|resume|data_dir|resident_gb|device|workers|compile|loss_backend|tensorboard|.*_every|save_minutes"


@dataclass(kw_only=True)
class Flags:
    """A script's flags. A line of a `Config` that inherits it is a flag, the comment beside it is its help.

    `Config()` is the paper's recipe, `Config.preset("demo", epochs=2)` what `--preset demo --epochs 2` gives. A value
    out of range raises `InputError`.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    embedded: ClassVar[str] = "shapes"  # the data of the demo
    recipe: ClassVar[str] = "paper"  # the preset's name, and the flags given by hand: set on each object
    given: ClassVar[set[str]] = set()

    def __post_init__(self) -> None:
        self.given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        self.check()

    @classmethod
    def preset(cls, name: str, **given: Any) -> typing.Self:
        """The recipe of that name; what is given beside it wins."""
        ensure(name in cls.PRESETS, f"--preset {name}: choose one of {', '.join(cls.PRESETS)}")
        config = cls(**cls.PRESETS[name] | given)
        config.recipe, config.given = name, set(given)
        return config

    def check(self) -> None:
        """Refuse values that no run can have. A method adds what its paper asks for."""
        for name, kind in flags(type(self)).items():
            value, choices = getattr(self, name), typing.get_args(kind)
            if choices:
                ok, rule = value in choices, f"choose one of {', '.join(choices)}"
            elif kind in (str, bool):
                ok, rule = isinstance(value, kind), f"must be {kind.__name__}"
            else:
                fraction = re.fullmatch(SHARES, name)
                zero = re.fullmatch(MAY_BE_0, name) or fraction and not name.endswith("crop_min_scale")
                most = 1 if fraction else 2**31 - 1 if kind is int else 1e30  # more overflows
                number = isinstance(value, (int, kind)) and not isinstance(value, bool)
                ok = number and (0 < value <= most or zero and value == 0)
                rule = f"must be {'a whole number' if kind is int else 'a number'} {'at least' if zero else 'above'} 0"
                rule += f" and at most {most}" * bool(fraction or number and value > most)
            ensure(ok, f"{dashed(name)} {value}: {rule}")

    @classmethod
    def method(cls) -> str:
        """The name of the method's file."""
        return Path(inspect.getfile(cls)).stem


@dataclass(kw_only=True)
class RunConfig(Flags):
    """The flags of every method for images, whose `Config` inherits them, adds its own and sets `PRESETS`."""

    lr_of_preset_batch: ClassVar[bool] = False  # whether `lr` is that of the preset's N, as is; else it is scaled by N

    data: str = "imagenet"  # shapes (made on the spot), cifar10, cifar100, stl10 (downloaded), or a folder of images
    data_dir: str = "data"  # where downloaded data sets are kept
    resident_gb: float = 4.0  # hold a folder's decoded images in memory up to this size, stream above it
    epochs: int = 100  # passes over the training images; 0 = none: what a run writes, of the weights it starts from
    batch_size: int = 256  # N, images in a step, of all processes together
    micro_batch_size: int = 0  # embed a process's batch in pieces of so many, for less memory; BN sees a piece; 0 = off
    backbone: str = "resnet50"  # a torchvision ResNet name (resnet18, resnet50, ...) or resnet8, small and quick
    stem: Literal["imagenet", "cifar"] = "imagenet"  # 7x7 stride 2 and max-pool, or 3x3 without it; resnet8 has its own
    init: str = "random"  # random, imagenet (torchvision's), or a file: a state_dict (fc left out), a backbone.pt
    image_size: int = 224  # side of a view in pixels
    lr: float = 0.1  # the highest learning rate; a cosine leads to 0
    weight_decay: float = 0.0  # weight decay, in the gradient (L2)
    warmup_epochs: float = 0.0  # epochs of linear warm-up of the learning rate
    seed: int = 0  # seed of everything random: weights, data order, views
    device: str = "auto"  # any torch device; auto = cuda where there is one, else cpu
    workers: int = 4  # threads that decode, or processes that stream, images; at most as many as there are cores
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision of the network
    compile: bool = False  # torch.compile the network (slow start, faster steps)
    knn_every: int = 1  # epochs between kNN checks on the held-out images; 0 = never, nor at the end
    save_minutes: float = 10.0  # minutes between checkpoints within an epoch; 0 = only at its end
    tensorboard: bool = False  # write the log's columns, views and neighbours for TensorBoard too
    out: str = "runs/run"  # folder of the run's files
    resume: bool = False  # continue the run in --out at the step it had reached; flags left out keep its values

    def check(self) -> None:
        super().check()
        ensure(self.image_size >= 8, f"--image-size {self.image_size}: must be at least 8")
        ensure(self.micro_batch_size != 1, "--micro-batch-size 1: BN has nothing to compare then; give 2 or more")
        piece = self.micro_batch_size or self.batch_size
        whole = piece >= self.batch_size or self.batch_size % piece == 0
        ensure(whole, f"--micro-batch-size {self.micro_batch_size}: must divide the batch size {self.batch_size}")


def dashed(name: str) -> str:
    """The flag of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def flags(config: type[Flags]) -> dict[str, Any]:
    """Field name -> type of every flag of a config class."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaint is one line, with a suggestion for a mistyped flag."""

    def error(self, message: str) -> typing.NoReturn:
        if wrong := message.partition("unrecognized arguments: ")[2]:
            near = difflib.get_close_matches(re.split("[ =]", wrong)[0], self._option_string_actions, n=1)
            message = f"unknown {wrong}; " + (f"did you mean {near[0]}?" if near else "see --help")
        raise InputError(message)


def parse_args(config: type[Flags], argv: Sequence[str] | None = None) -> Any:
    """Read the command line into a config: a flag given by hand wins over the preset, the preset over the paper.

    The preset left out is demo for the embedded set, cifar for cifar10 and cifar100 if there is one, else paper. With
    `--resume`, the values of the run in `--out`, if there is one, stand where the preset would. Raises `InputError`.
    """
    doc = (sys.modules[config.__module__].__doc__ or "").strip().split("\n")
    examples = "\n".join(["examples:", *(line for line in doc if line.startswith("    python "))])
    shape = {"formatter_class": argparse.RawDescriptionHelpFormatter, "argument_default": argparse.SUPPRESS}
    parser = OneLineParser(description=doc[0], epilog=examples, **shape, allow_abbrev=False)
    own, shared = (parser.add_argument_group(title) for title in (f"the flags of {config.method()}", "the run"))
    small = {config.embedded: "demo", **dict.fromkeys(("cifar10", "cifar100"), "cifar")}
    small = {data: preset for data, preset in small.items() if preset in config.PRESETS}
    left_out = ", ".join(f"{preset} for {data}" for data, preset in small.items())
    own.add_argument(
        "--preset", choices=config.PRESETS, help=f"sets the defaults below (left out: {left_out}, else paper)"
    )
    kinds, defaults = flags(config), {field.name: field.default for field in dataclasses.fields(config)}
    for group, owner in ((own, config), (shared, RunConfig)):
        for name, text in re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(owner), re.M):
            if (kind := kinds.pop(name, None)) is None:  # no flag, or the method has a line of its own for it
                continue
            presets = {p: v[name] for p, v in config.PRESETS.items() if v.get(name, defaults[name]) != defaults[name]}
            shown = "; ".join([f"default {defaults[name]}", *(f"{p}: {value}" for p, value in presets.items())])
            options = {"type": kind, "metavar": getattr(kind, "__name__", "").upper()}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif choices := typing.get_args(kind):
                options = {"choices": choices}
            group.add_argument(dashed(name), help=f"{text} ({shown})".replace("%", "%%"), **options)
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        path = Path(given.get("out", config.out)) / "config.json"
        if path.exists():
            return resumed(config, given, path)
        print(f"note: --resume: no run in {path.parent} yet; starting one")
    return config.preset(given.pop("preset", small.get(given.get("data", config.embedded), "paper")), **given)


def resumed(config: type[Flags], given: dict[str, Any], path: Path) -> Any:
    """The config of the run whose config.json is `path`, with what is given by hand."""
    try:
        stored = json.loads(path.read_text())
        by_hand, recipe, method = set(stored["given"]), stored["preset"], stored["method"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--resume: {path} cannot be read; start again without --resume") from None
    ensure(method == config.method(), f"--resume: {path.parent} holds a run of {method}")
    asked = given.pop("preset", recipe)
    ensure(asked == recipe, f"--preset {asked}: the run in {path.parent} keeps its preset, {recipe}; leave it out")
    stored = {k: v for k, v in stored.items() if k in flags(config)}
    result = config(**stored | given | {"out": str(path.parent)})  # the folder may have moved
    result.recipe, result.given = recipe, by_hand | given.keys()
    return result


# --------------------------------------------------------------------------------------- one process or torchrun
#
# W processes compute what one would: each takes its share of a batch, BN and the losses reach over all of them, and
# DistributedDataParallel averages the gradients. With W = 1 gather, mine, same and over_all return what they are given.


def several() -> bool:
    """Whether torchrun, or the like, has started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def pick_device(name: str) -> torch.device:
    """The device of that name; of several processes, each has its own, and they meet here.

    Raises `InputError` where it cannot hold a number.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if several():
        words = f"--device {name}: several processes are on the CPU, or have a GPU each; give cuda, cpu or auto"
        ensure(name in ("cuda", "cpu"), words)
        asked, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        ensure(name == "cpu" or asked <= there, f"{asked} processes, but {there} GPUs; start one for each GPU")
        name += f":{os.environ.get('LOCAL_RANK', '0')}" * (name == "cuda")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # Triton launches on the current one
        torch.ones(1, device=device).item()
    except Exception:  # of many kinds for what is not there
        raise InputError(f"--device {name}: not to be had here; give cpu or auto") from None
    if several() and not dist.is_initialized():
        try:
            store, rank, world = next(dist.rendezvous("env://"))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(attempt, store)  # torchrun's may hold the addresses of an attempt that has died
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        except ValueError:  # a variable is missing
            raise InputError("WORLD_SIZE is set, but not by torchrun; start by torchrun, or unset it") from None
    return device


def group() -> Any:
    """The process group that the losses take: of all processes, or None for one."""
    return dist.group.WORLD if share()[1] > 1 else None


class Gather(torch.autograd.Function):
    """The rows x (n, ...) of all processes, (W n, ...), rank by rank. The gradient is that of the sum of all processes'
    losses."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(share()[1])]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return mine(over_all(grad.clone(memory_format=torch.contiguous_format)))


def gather(x: Tensor) -> Tensor:
    """x (n, ...) of all processes, (W n, ...), rank by rank."""
    return Gather.apply(x) if share()[1] > 1 else x


def mine(x: Tensor) -> Tensor:
    """This process's block of the rows x (M, ...): what it gave to `gather`."""
    rank, world = share()
    return x.tensor_split(world)[rank]


def same(x: Tensor) -> Tensor:
    """x as rank 0 has it, in place."""
    if share()[1] > 1:
        dist.broadcast(x, 0)
    return x


def over_all(x: Tensor, op: str = "SUM") -> Tensor:
    """The sum (or another reduction) of all processes' x, in place."""
    if share()[1] > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def draw_apart() -> None:
    """From here on each process has random numbers of its own; rank 0 goes on with those of one process."""
    if rank := share()[0]:
        torch.manual_seed((torch.initial_seed() + 1_000_003 * rank) % 2**63)


class SyncBatchNorm(_BatchNorm):
    """nn.SyncBatchNorm for a CPU, which that one refuses: BN with the statistics of all processes' equal batches."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, var = NormalizeAll.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() // x.shape[1] * share()[1]
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return y


class NormalizeAll(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) w + b, channel by channel, with mean and (biased) var over all processes; both of
    these, too. With g the gradient and x^ = (x - mean) / sqrt(var + eps), that of x is
    w / sqrt(var + eps) (g - mean of g - x^ mean of g x^), the means again over all."""

    @staticmethod
    def forward(ctx, x, w, b, eps):
        zero = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        w, b = zero + 1 if w is None else w, zero if b is None else b
        own = torch.batch_norm_update_stats(x, zero, zero + 1, 0.0)  # mean and variance, (C,) each
        means, variances = gather(torch.stack(own)[None]).unbind(1)  # (W, C)
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, w, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, w, b, eps=eps), mean, var

    @staticmethod
    def backward(ctx, g, *_):
        x, w, mean, var = ctx.saved_tensors
        still = torch.ops.aten.native_batch_norm_backward  # as if mean and var were constants
        dx, dw, db = still(g, x, w, mean, var, None, None, False, ctx.eps, [True] * 3)
        count, inverse = x.numel() // x.shape[1] * share()[1], (var + ctx.eps).rsqrt()
        gx, g = over_all(torch.stack([dw, db])) / count  # the means of g x^ and of g
        scale, shift = w * inverse * inverse * gx, w * inverse * (g - mean * inverse * gx)
        dx = dx - F.batch_norm(x, torch.zeros_like(mean), torch.ones_like(var), scale, shift, eps=0.0)
        return dx, *(d if needed else None for d, needed in zip((dw, db), ctx.needs_input_grad[1:3], strict=True)), None


# ------------------------------------------------------------------------------------------------------- network


def resnet8() -> nn.Module:
    """A quarter-scale ResNet for small images on a CPU: a stride-2 3x3 stem, three basic blocks (32, 64, 128).

    The last BN of a block starts at 1 here: with so few blocks, 0 only delays a short run.
    """
    network = nn.Sequential()
    network.conv1, network.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
    network.relu, network.layer1 = nn.ReLU(inplace=True), BasicBlock(32, 32)
    for i, width in ((2, 32), (3, 64)):
        shortcut = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width))
        network.add_module(f"layer{i}", BasicBlock(width, 2 * width, 2, shortcut))
    network.avgpool, network.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    for module in network.modules():  # as torchvision initialises its ResNets
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    network.feature_dim = 128
    return network


def build_backbone(config: RunConfig, zero_init_residual: bool = True) -> nn.Module:
    """The network f: images (N, 3, H, W) -> features h (N, `feature_dim`), started as `--init` says. The last BN of a
    block starts at 0 if `zero_init_residual`.

    A torchvision ResNet without its `fc`, so that its state_dict loads back into the torchvision model; with the
    "cifar" stem `conv1` is 3x3 and there is no max-pool. Raises `InputError` for an unknown name, and for weights that
    cannot be had or do not fit.
    """
    name = config.backbone
    if name == "resnet8":
        network = resnet8()
    else:
        known = [n for n in torchvision.models.list_models(module=torchvision.models) if "resne" in n]
        ensure(name in known, f"--backbone {name}: choose one of resnet8, {', '.join(known)}")
        network = torchvision.models.get_model(name, weights=None, zero_init_residual=zero_init_residual)
        if config.stem == "cifar":
            network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
        network.feature_dim = network.fc.in_features
        network.fc = nn.Identity()
    if config.init != "random" and not (config.resume and (Path(config.out) / "checkpoint.pt").exists()):
        given, own = weights_of(config.init, name), network.state_dict()
        # old files lack BN's counts
        counts = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
        given = counts | {key: value for key, value in given.items() if not key.startswith("fc.")}
        for key in [*own, *given]:
            shapes = [str(tuple(state[key].shape)) if key in state else "absent" for state in (given, own)]
            words = f"{key} is {shapes[0]} there, and {shapes[1]} in {name} with --stem {config.stem}"
            ensure(shapes[0] == shapes[1], f"--init {config.init}: {words}; give weights of this network")
        network.load_state_dict(given)
    return network


def weights_of(init: str, backbone: str) -> dict[str, Tensor]:
    """The state_dict that `--init` names: torchvision's best for this backbone, downloaded, or that of a file."""
    if init == "imagenet":
        ensure(backbone != "resnet8", "--init imagenet: there is none for resnet8; give a --backbone of torchvision")
        try:
            best = torchvision.models.get_model_weights(backbone).DEFAULT
            return best.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        except Exception as error:  # URLError, OSError, RuntimeError, ...
            words = f"the download failed ({images.reason(error)}); check the network, or give a file of weights"
            raise InputError(f"--init imagenet: {words}") from None
    try:
        state = torch.load(init, map_location="cpu", weights_only=True)
        bad = [key for key, value in state.items() if not torch.isfinite(value).all()]
    except FileNotFoundError:
        raise InputError(f"--init {init}: no such file; give random, imagenet, or a file of weights") from None
    except Exception as error:  # of many kinds for what is no state_dict
        if isinstance(error, (PermissionError, MemoryError)) or re.search(OUT_OF_MEMORY, str(error)):
            raise
        raise InputError(f"--init {init}: no whole state_dict; give torchvision's, or a run's backbone.pt") from None
    ensure(not bad, f"--init {init}: {bad[:1]} is not finite; give other weights")
    return state


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics of every BN layer as they are, for a forward pass that is not to count."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def in_pieces(network: nn.Module, pieces: int, *views: Tensor, again: bool = True) -> Any:
    """`network(*views)`, whose outputs have a row an image, of so many pieces of the batch, one after the other.

    `again`: no piece's graph is kept; the backward pass builds each anew, from the gradient of the whole batch's loss,
    and frees it before the next. That is GradCache (Gao et al. 2021, arXiv:2101.06983) by activation checkpoints;
    exact, but that BN sees pieces.
    """
    if pieces == 1:
        return network(*views)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), still_statistics(network)  # the second time is for the graph alone

    call = functools.partial(checkpoint, network, use_reentrant=False, context_fn=contexts) if again else network
    out = [call(*piece) for piece in zip(*(x.tensor_split(pieces) for x in views), strict=True)]
    return torch.cat(out) if isinstance(out[0], Tensor) else tuple(torch.cat(rows) for rows in zip(*out, strict=True))


class Network(nn.Module):
    """What a training step calls: the model, under autocast to `dtype` (None: off), in so many pieces."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None, pieces: int):
        super().__init__()
        self.model, self.pieces, self.cast = model, pieces, (device.type, dtype, dtype is not None)

    def forward(self, *views: Tensor) -> Any:
        with torch.autocast(*self.cast):
            return in_pieces(self.model, self.pieces, *views)


def network_for(
    model: nn.Module, config: RunConfig, device: torch.device, pieces: int = 0, global_bn: bool = True
) -> nn.Module:
    """What a training step calls: the model, under `--amp`, by `--compile`, and in so many pieces (0: those of
    `--micro-batch-size`); of several processes, with the mean of their gradients, and BN over all of them unless
    `global_bn` is False."""
    world = share()[1]
    pieces = pieces or max(1, config.batch_size // world // (config.micro_batch_size or config.batch_size))
    if world > 1 and global_bn and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world > 1 and global_bn:
        for module in (m for m in model.modules() if isinstance(m, _BatchNorm)):
            module.__class__ = SyncBatchNorm  # the same parameters and buffers
    if config.compile:
        for part in model.children():
            part.compile()
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.amp]
    return average_gradients(Network(model, device, dtype, pieces).train())


def average_gradients(network: nn.Module) -> nn.Module:
    """The network, whose gradients are the mean of all processes'."""
    if share()[1] > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
        network.broadcast_buffers = False  # once, just now, was enough; the argument of this name warns
    return network


def loss_backend(kernels: Any, config: Flags, rows: int, columns: int, device: torch.device, group: Any = None) -> str:
    """What `--loss-backend` stands for at this shape: "naive", the loss of the method's own file, or one of `kernels`.

    `kernels` is the package, or None where it was not copied along; `group` that of a loss over several processes.
    Raises `InputError` for what cannot run.
    """
    asked = config.loss_backend
    if kernels is None:
        ensure(group is None, "of several processes the loss needs the folder kernels/; copy it along")
        ensure(asked in ("auto", "naive"), f"--loss-backend {asked}: the folder kernels/ is not here; copy it along")
        return "naive"
    try:
        return kernels.resolve_backend(asked, rows, columns, device, torch.float32, group)
    except ValueError as error:
        raise InputError(f"--loss-backend {asked}: {error}") from None


# -------------------------------------------------------------------------------------------------- optimisation


def cosine_lr(step: int, total: int, warmup: float, peak: float, first: float = 0.0, last: float = 0.0) -> float:
    """Learning rate of step 0 <= step < total: over `warmup` steps a line from `first` to `peak`, then half a cosine to
    `last`."""
    if step < warmup:
        return first + (peak - first) * min(1.0, (step + 1) / warmup)
    return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the coming step, for every group but those marked `constant`."""
    for group in optimizer.param_groups:
        if not group.get("constant"):
            group["lr"] = lr


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights, and the BN parameters and biases, which get neither weight decay nor LARS adaptation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888), as SimCLR and BYOL use it.

    For each tensor w with gradient g:  g <- g + weight_decay w;  rate = trust |w| / |g| (1 where either is 0, or
    where the group has `adapt` False);  with the lr inside the momentum buffer (SimCLR):  v <- momentum v +
    lr rate g, w <- w - v;  outside it (BYOL, `lr_in_momentum=False`):  v <- momentum v + rate g, w <- w - lr v.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001, lr_in_momentum=True):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, adapt=True)
        super().__init__(params, defaults | {"lr_in_momentum": lr_in_momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads = [p.grad for p in weights]
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
            if group["adapt"]:
                norms = zip(torch._foreach_norm(weights), torch._foreach_norm(grads), strict=True)
                rates = [torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0) for w, g in norms]
                grads = torch._foreach_mul(grads, rates)
            for p in weights:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            velocity = [self.state[p]["momentum"] for p in weights]
            torch._foreach_mul_(velocity, group["momentum"])
            inside = group["lr_in_momentum"]
            torch._foreach_add_(velocity, grads, alpha=group["lr"] if inside else 1.0)
            torch._foreach_add_(weights, velocity, alpha=-1.0 if inside else -group["lr"])


# ---------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def embed(
    network: Callable, split: Images, config: RunConfig, index: Tensor | None = None, alter: Callable | None = None
) -> Tensor:
    """`network`, its BN in eval mode, of the central views of a split (or of its images `index`): (N, d) float32.

    `alter(x, rows)`, if given, changes the views x of these rows of the result. Several processes each embed a part.
    """
    (rank, world), index = share(), torch.arange(len(split)) if index is None else index
    own = config.micro_batch_size or max(1, config.batch_size // world)
    piece = min(512, max(16, 2 * own))  # no more memory than a training step
    rows = torch.arange(max(8, -(-len(index) // world)))  # as many for each process, and some: few pictures take
    rows = (rows * world + rank) % len(index)  # other convolutions and products, whose rounding differs
    batches = rows.tensor_split(-(-len(rows) // piece))
    was = isinstance(network, nn.Module) and network.training
    if was:
        network.eval()
    views = split.views([index[part] for part in batches], [(config.image_size, None)], workers=config.workers)
    altered = (alter(x, part) if alter else x for (x,), part in zip(views, batches, strict=True))
    out = gather(torch.cat([network(images.normalize(x)).float() for x in altered]))
    if was:
        network.train()
    return out.view(world, -1, out.shape[1]).transpose(0, 1).flatten(0, 1)[: len(index)]


def knn_k(labels: Tensor) -> int:
    """k of the kNN classifier for a bank of these labels: 200, or the mean number of images of a class if that is
    less."""
    return max(1, min(200, len(labels) // len(labels.unique())))


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int | None = None, temperature: float = 0.1
) -> float:
    """Top-1 of the weighted kNN classifier (Wu et al. 2018, arXiv:1805.01978): votes exp(cosine / temperature).

    `bank` (N, d) with `bank_labels` (N,), `queries` (M, d) with `labels` (M,); k, at most N, is that of `knn_k`.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    bank_labels, labels = bank_labels.to(bank.device), labels.to(bank.device)
    k, classes, right = min(k or knn_k(bank_labels), len(bank)), int(bank_labels.max()) + 1, 0
    for rows, truth in zip(queries.split(1024), labels.split(1024), strict=True):
        similarity, index = (rows @ bank.T).topk(k, dim=1)  # (m, k)
        votes = torch.zeros(len(rows), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[index], ((similarity - 1) / temperature).exp())
        right += int((votes.argmax(1) == truth).sum())
    return right / len(queries)


def warn_of_guess(loss: float, classes: int) -> None:
    """Say so when the last loss of a classifier is worse than that of equal shares."""
    if not loss <= math.log(classes) + 1e-4:  # of rounding
        print(f"warning: the classifier's last loss, {loss:.2f}, is worse than a guess's, {math.log(classes):.2f}")


BANK = 100_000  # training images that kNN compares with, at most, drawn by a seed


def knn_of(network: Callable, data: Data, config: RunConfig) -> float | None:
    """kNN top-1 on the held-out images, with the labelled training images as the bank; None without labels."""
    if not data.labelled:
        return None
    bank = known = (data.train.labels >= 0).nonzero().squeeze(1)
    if len(bank) > BANK:
        bank = bank[torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:BANK]]
    features, queries = embed(network, data.train, config, bank), embed(network, data.test, config)
    mean, k = features.mean(0) if network is pixels else 0, knn_k(data.train.labels[known])
    queries, labels, right = mine(queries - mean), mine(data.test.labels), 0
    if len(queries):
        right = round(len(queries) * knn_accuracy(features - mean, data.train.labels[bank], queries, labels, k))
    return int(over_all(torch.tensor(right))) / len(data.test)


def pixels(x: Tensor) -> Tensor:
    """Raw pixels, at most 32x32, as features (the mean picture is then taken off): what h has to beat."""
    return (F.adaptive_avg_pool2d(x, 32) if x.shape[-1] > 32 else x).flatten(1)


@torch.no_grad()
def draw_neighbours(network: Callable, data: Data, config: RunConfig, rows: int = 8, nearest: int = 6) -> Image.Image:
    """A row for each of eight held-out pictures, or of the training set if none are, spread evenly over the set: the
    picture and its six nearest training pictures by the cosine of h. Below each is its class, green where it is that of
    the first."""
    asked, side, rng = data.test or data.train, 128, torch.Generator().manual_seed(0)
    bank = torch.randperm(len(data.train), generator=rng)[:BANK].sort().values
    index = torch.linspace(0, len(asked) - 1, min(rows, len(asked))).long()
    h, keys = embed(network, asked, config, index), embed(network, data.train, config, bank)
    cosine = (F.normalize(h, dim=1) @ F.normalize(keys, dim=1).T).cpu()
    itself = index[:, None] == bank if asked is data.train else torch.zeros_like(cosine, dtype=torch.bool)
    near = bank[cosine.masked_fill_(itself, -2).topk(min(nearest, len(bank) - int(itself.any()))).indices]  # (rows, 6)
    sheet = Image.new("RGB", (side + 24 + (side + 8) * near.shape[1], (side + 24) * len(index)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    columns = [(asked, index), *((data.train, column) for column in near.T)]
    for i, (split, column) in enumerate(columns):
        x = i * (side + 8) + 16 * (i > 0)
        for row, picture in enumerate(images.thumbnails(split, column, config.image_size, side)):
            y, label, truth = row * (side + 24), split.labels[column[row]], asked.labels[index[row]]
            sheet.paste(picture, (x, y))
            if data.classes and label >= 0:
                name = data.classes[label].encode(errors="replace").decode()[:18]
                ink = "black" if i == 0 or truth < 0 else "green" if label == truth else "red"
                pen.text((x, y + side + 2), name, ink, font)
    return sheet


@torch.no_grad()
def health(z: Tensor) -> tuple[float, float, float]:
    """Three figures of an output z (N, d), from its l2-normalised rows:

    feature_std     the mean over channels of the std: near 1/sqrt(d) when healthy, 0 collapsed
    effective_rank  exp of the entropy of the normalised singular values (Roy & Vetterli 2007): 1 to d
    cos2            the mean squared cosine of two rows: 1/d when healthy, 1 when all lie on one line
    """
    if not torch.isfinite(z).all():
        return math.nan, math.nan, math.nan
    z, n = F.normalize(z.cpu().double(), dim=1), len(z)  # squared, a float32 would lose the small singular values
    squares = torch.linalg.eigvalsh(z.T @ z if z.shape[1] < n else z @ z.T).clamp(min=0)
    share = squares.sqrt() / squares.sqrt().sum().clamp(min=1e-12)
    cos2 = (squares.square().sum() - n) / max(1, n * (n - 1)) if z.any() else 1.0  # n of the sum is from i = j
    return float(z.std(0, correction=0).mean()), float(torch.special.entr(share).sum().exp()), float(cos2)


# ----------------------------------------------------------------------------------------- a run and its files


def load_data(config: RunConfig, device: torch.device) -> Data:
    """The data set that a config asks for. Raises `InputError` when there is nothing usable."""
    folder = {"resident_gb": config.resident_gb, "workers": config.workers, "out": config.out}
    return images.load(config.data, config.image_size, device, config.data_dir, **folder)


def start(config: RunConfig, data: Any = None) -> tuple[torch.device, Data]:
    """Pick the device, seed everything, make the run's folder, load the data and fit the preset to its size.

    `data`: `Data`, a uint8 tensor (N, 3, H, W), or a pair of one and labels (N,); None loads `config.data`.
    Raises `InputError` for what cannot be had.
    """
    device, out = pick_device(config.device), Path(config.out)
    share_out(config)
    apart = Path(config.init).resolve() != (out / "backbone.pt").resolve()
    ensure(apart, f"--init {config.init}: this run would overwrite it; choose another --out")
    make(out).close()  # the run takes it again
    if data is None:
        data = load_data(config, device)
    else:
        if not isinstance(data, Data):
            data = images.from_tensors(*(data if isinstance(data, tuple) else (data, None)), device)
        config.data = data.name
    save_whole("".join(f"{path}: {why}\n" for path, why in data.skipped), out / "skipped.txt")
    fit_to(config, len(data.train))
    share_out(config)
    torch.manual_seed(config.seed)
    return device, data


def name_of(device: torch.device) -> str:
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"{device}, {torch.get_num_threads()} threads"


def say(config: Flags, about: dict[str, str]) -> None:
    """Print what runs: the method with the flags given, then a line, or as many as the terminal needs, of each."""
    words = [f"--preset {config.recipe}"]
    for name in (name for name in flags(type(config)) if name in config.given):
        value = getattr(config, name)
        words.append(dashed(f"no_{name}" if value is False else name) + f" {value}" * (not isinstance(value, bool)))
    width = min(116, shutil.get_terminal_size((116, 24)).columns)
    for name, text in {config.method(): " ".join(words), **about}.items():
        text = textwrap.fill(f"{name:10}{text}", width, subsequent_indent=" " * 10, break_on_hyphens=False)
        print(text, flush=True)


def share_out(config: RunConfig) -> None:
    """Refuse a batch that the processes cannot share equally, in whole pieces, and processes that do not agree."""
    n, world = config.batch_size, share()[1]
    every = [dataclasses.asdict(config)] * world
    if world > 1:
        dist.all_gather_object(every, every[0])
    words = (
        f"--out {config.out}: the processes have other flags, or another run there; give them one folder, and the same"
    )
    ensure(all(other == every[0] for other in every), words)
    near = n - n % world or world
    ensure(n % world == 0, f"--batch-size {n}: must be a multiple of {world}, the number of processes; try {near}")
    own, piece = n // world, config.micro_batch_size or n
    words = f"--micro-batch-size {piece}: must divide the {own} images of each process"
    ensure(piece >= own or own % piece == 0, words)


def fit_to(config: RunConfig, n: int) -> None:
    """Fit what was not given by hand to `n` training images, and say so in a line.

    The batch becomes that of `fitted_batch`; a learning rate that is not scaled with N follows it; a warm-up and the
    like as long as the run become a tenth of it.
    """
    ensure(n >= 2, f"--data {config.data}: only {n} image to train on; give 2 or more")
    fits = config.batch_size <= n or "batch_size" not in config.given
    ensure(fits, f"--batch-size {config.batch_size}: only {n} training images; give {n} or less")
    lower, fitted = fitted_batch(n, config.batch_size), {}
    if lower < config.batch_size and "batch_size" not in config.given:
        fitted["batch_size"] = lower
        if config.lr_of_preset_batch:
            fitted["lr"] = config.lr * lower / config.batch_size
    spans = [name for name in flags(type(config)) if name.endswith("_epochs")]
    long = [name for name in spans if 0 < config.epochs <= getattr(config, name)]
    fit(config, f"{n:,} images and {config.epochs} epochs", fitted | dict.fromkeys(long, config.epochs / 10))
    steps = n // config.batch_size
    if 0 < steps * config.epochs < 300:
        enough = f"--epochs {-(-1000 // steps)} makes 1,000"
        print(f"note: {steps * config.epochs} steps in all are too few to learn much; {enough}")


def fitted_batch(n: int, batch: int) -> int:
    """The batch for n images: one that makes fewer than 4 steps an epoch becomes the power of two that makes at least
    16, but no lower than 16, or all of less than 32 images (BN needs some)."""
    lower = n if n < 32 else 2 ** int(math.log2(max(n / 16, 16)))
    return min(batch, lower) if n < 4 * batch else batch


def fit(config: RunConfig, what: str, fitted: dict[str, float]) -> None:
    """Set the flags in `fitted` that were not given by hand, and say so in a line."""
    fitted = {k: v for k, v in fitted.items() if k not in config.given and v != getattr(config, k)}
    if fitted:
        changes = ", ".join(f"{dashed(name)} {getattr(config, name):g} becomes {fitted[name]:g}" for name in fitted)
        print(f"note: for {what}, {changes}")
    for name, value in fitted.items():
        setattr(config, name, value)
    config.check()


def make(folder: Path) -> Any:
    """The folder of a run, if need be a new one, and its `lock`. Raises `InputError` where none can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock(folder)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from None


def lock(folder: Path) -> Any:
    """An open file; until it is closed, or this process ends in whatever way, no other one trains in this folder.

    Of several processes rank 0 takes it, and alone writes there."""
    if share()[0]:
        return io.StringIO()
    file = open(folder / ".lock", "w")  # noqa: SIM115
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in worker processes
    except BlockingIOError:
        raise InputError(f"--out {folder}: another run is writing there; choose another folder, or wait") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    for part in folder.glob("*.pt.*.part"):  # of a process that was killed while it wrote
        part.unlink()
    return file


def keep_aside(folder: Path) -> None:
    """Rename the checkpoints of a run that the folder holds, if any, and say so."""
    there = [path for name in ("checkpoint.pt", "checkpoint.previous.pt") if (path := folder / name).exists()]
    kept = next(n for n in itertools.count(1) if not [*folder.glob(f"checkpoint.run{n}.*")])
    for path in there:
        os.replace(path, path.with_name(path.name.replace("checkpoint", f"checkpoint.run{kept}")))
    if there:
        print(f"note: {folder} held a run; its checkpoint is kept as checkpoint.run{kept}.pt, the rest goes")


def save_whole(state: Any, path: Path, before: Path | None = None) -> None:
    """Write with torch.save, text and bytes as they are, so that `path` is always whole: aside, flushed, renamed.
    `before` is where the one that it replaces is kept. Of several processes rank 0 writes."""
    if share()[0]:
        return
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
    try:
        whole = io.BytesIO()  # into a file, torch.save would hide why it cannot write
        state = state.encode(errors="surrogateescape") if isinstance(state, str) else state
        whole.write(state) if isinstance(state, bytes) else torch.save(state, whole)
        with open(part, "wb") as file:
            file.write(whole.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            shutil.copyfile(path, before)
        os.replace(part, path)
    except OSError as error:
        kept = f"the one from before is kept in {path}" if path.exists() else "none was written before"
        raise RunFailure(f"cannot write {path} ({error.strerror}); {kept}") from None
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path: Path, method: str | None = None) -> dict[str, Any]:
    """Read a checkpoint, weights only. Raises `InputError` for a missing, a damaged, or another method's one."""
    before, advice = path.with_name("checkpoint.previous.pt"), "train first, or give the run's folder"
    if before != path and before.exists():
        advice = f"{before.name} beside it is the one before: rename it to {path.name} to go on from there"
    try:
        with zipfile.ZipFile(path) as parts:  # torch.load checks no checksum
            ensure(parts.testzip() is None, "damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        _ = [state[key] for key in ("method", "config", "parts", "progress", "rng")]
    except FileNotFoundError:
        raise InputError(f"no checkpoint {path}; {advice}") from None
    except Exception as error:  # of many kinds for a damaged file
        if isinstance(error, (PermissionError, MemoryError)) or re.search(OUT_OF_MEMORY, str(error)):
            raise
        raise InputError(f"{path} is not a whole checkpoint of this project; {advice}") from None
    found = state["method"]
    ensure(method in (None, found), f"{path} is a checkpoint of {found}, not of {method}; choose another --out")
    return state


def load_run(folder: str | Path) -> tuple[Flags, nn.Module]:
    """The config and the trained model, in eval mode, of a run's folder. Raises `InputError` for anything else."""
    path = Path(folder) / "checkpoint.pt"
    state = load_checkpoint(path)
    name = state["method"]
    beside = re.fullmatch(r"\w+", name) and (Path(__file__).parent / f"{name}.py").is_file()
    ensure(beside, f"{path}: a run of {name}; put {name}.py beside common.py")
    method = importlib.import_module(name)
    ours = Path(inspect.getfile(method)).resolve().parent == Path(__file__).resolve().parent
    ensure(ours, f"{path}: another {name} is imported, {inspect.getfile(method)}; put this folder first on the path")
    try:
        config = method.Config(**state["config"])
        kind, weights = state["parts"]["model"]
        fresh = dataclasses.replace(config, init="random") if isinstance(config, RunConfig) else config
        model = getattr(method, kind)(fresh, *state.get("inputs", ()))
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path} is not a whole checkpoint of {name}; train again") from None
    for part, value in weights.items():
        ensure(torch.isfinite(value).all(), f"{path}: {part} is not finite; train again, with a lower --lr")
    return config, model.eval()


class Run:
    """What counts and writes: the loop's counters, the progress line, log.csv, checkpoint.pt, backbone.pt, pictures.

    `parts` (model, optimizer, ...) are the objects whose state_dict a resumed run needs; `progress` is all else.
    Ctrl-C, SIGTERM and SIGHUP wait for the end of the step, save, and stop; a second Ctrl-C stops all but a save.
    """

    SETTLED = 200  # steps before a collapse is told: a healthy run may be close to one for its first 100
    COLUMNS = ("epoch", "loss", "lr", "feature_std", "effective_rank", "knn_top1", "images_per_second")

    def __init__(self, config: RunConfig, data: Data, device: torch.device, **parts: Any):
        self.config, self.data, self.device, self.parts, self.model = config, data, device, parts, parts["model"]
        self.rank, self.world = share()
        self.out, self.lock = Path(config.out), lock(Path(config.out))
        self.checkpoint, self.before = self.out / "checkpoint.pt", self.out / "checkpoint.previous.pt"
        self.steps = len(data.train) // config.batch_size  # an epoch; the last short batch is left out
        self.total, self.dim = self.steps * config.epochs, self.model.dim
        self.progress = {"step": 0, "loss_sum": 0.0, "seconds": 0.0, "rows": []}  # of the epoch, but for step and rows
        self.losses: list[Tensor] = []  # since the last look at them
        self.next_look = 0  # step
        self.signal, self.saving, self.warned, self.live = 0, False, False, sys.stdout.isatty()
        self.seen = {"data (training images)": len(data.train), "data (classes)": data.classes}
        there = self.checkpoint.exists() or self.before.exists()
        self.board = None
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("--tensorboard: it is not installed; pip install tensorboard") from None
        draw_apart()
        if config.resume and there:
            self.load()
        elif config.resume:
            print("no checkpoint was written yet: starting from the beginning")
        elif self.rank == 0:
            keep_aside(self.out)
        steps = gather(torch.tensor([self.step]))
        ensure(
            (steps == self.step).all(), f"--out {self.out}: all processes must see the same; give a folder they share"
        )
        if config.tensorboard and not self.rank:  # what an earlier run here wrote from this epoch on is hidden
            self.board = SummaryWriter(self.out / "tensorboard", purge_step=len(self.progress["rows"]) + 1)
        if self.step < self.total or not self.step:
            saved = {"method": config.method(), "preset": config.recipe, "given": sorted(config.given)}
            saved |= dataclasses.asdict(config) | {"resume": False}
            save_whole(json.dumps(saved, indent=1) + "\n", self.out / "config.json")
        else:
            print("note: the run is done, and nothing changes; a larger --epochs would go on")
        self.write_log()

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.progress["step"]

    def header(self, **lines: str) -> None:
        """Say what runs: the command, data, steps, network, device, and the method's own lines."""
        c, backbone = self.config, sum(p.numel() for p in self.model.backbone.parameters()) / 1e6
        heads = sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6 - backbone
        on = name_of(self.device)
        own = c.batch_size // self.world
        start = f" from the weights of {c.init}" * (c.init != "random")
        pieces = f" in pieces of {c.micro_batch_size}" * (0 < c.micro_batch_size < own)
        on = f"{self.world} processes, {own} images of a batch each; {on}" if self.world > 1 else on
        about = {
            "data": self.data.describe(),
            "steps": f"{self.steps:,} of batch {c.batch_size}{pieces} an epoch, {self.total:,} in all",
            "network": f"{c.backbone}{start}, {backbone:.2f} M parameters, h {self.model.backbone.feature_dim}-d; "
            f"heads {heads:.2f} M, output {self.dim}-d; {c.image_size}x{c.image_size} views",
            "device": f"{on}; mixed precision {c.amp}; torch.compile {'on' if c.compile else 'off'}",
            **lines,
        }
        say(c, about)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, as `log` counts. While they run, a signal to stop waits for the end of a step."""

        def request(number: int, _: Any) -> None:
            if self.signal and number == signal.SIGINT and not self.saving:  # a closed terminal sends SIGHUP twice
                raise Stopped("stopped at once", number)
            self.signal = number

        main = threading.current_thread() is threading.main_thread()  # no other may set handlers
        stops = [n for n in signal.Signals if main and n.name in ("SIGINT", "SIGTERM", "SIGHUP")]
        stops = [n for n in stops if signal.getsignal(n) not in (signal.SIG_IGN, None)]  # not what nohup ignores
        usual = {n: signal.signal(n, request) for n in stops}
        try:
            while self.step < self.total:
                yield self.step // self.steps
        except GeneratorExit:  # the loop was left; another process's end may be why, then torchrun sends SIGTERM
            if self.world > 1:
                usual.pop(signal.SIGTERM, None)
            raise
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)
            self.lock.close()

    def batches(
        self, views: int = 0, scale: tuple[float, float] = (1.0, 1.0), crops: images.Crops = ()
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The rest of this epoch: for each batch its image indices (N,) and `views` random crops (N, 3, S, S) of them.

        Of several processes each gets its share, N / W.

        A crop's area is in `scale`, a range of fractions; `crops` lists crops of several kinds (see `Images.views`).
        The order depends on the seed and the epoch alone, so a resumed run sees the same batches.
        """
        c, n, self.started = self.config, self.config.batch_size, time.monotonic() - self.progress["seconds"]
        self.saved = self.shown = time.monotonic()
        seed = c.seed * 1_000_003 + self.step // self.steps
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed))
        left = order[self.step % self.steps * n : self.steps * n].split(n)
        left = [batch[self.rank :: self.world] for batch in left]
        crops = crops or [(c.image_size, scale)] * views
        yield from zip(left, self.data.train.views(left, crops, seed, c.workers), strict=True)

    def log(self, loss: Tensor, z: Tensor, *views: Tensor) -> None:
        """Count a step; about once a second check the loss (the only wait for the device) and show where we are.

        `z` (N, d): the output that enters the loss. `views`: what the network was fed.
        """
        if self.step == 0 and self.rank == 0:
            self.draw_views(views)
        self.losses.append(loss.detach())
        self.progress["step"] += 1
        now, done = time.monotonic(), (self.step - 1) % self.steps + 1  # of this epoch
        save = bool(self.signal or 0 < 60 * self.config.save_minutes < now - self.saved)
        look = done == self.steps or (save or now - self.shown > 1 if self.world == 1 else self.step >= self.next_look)
        if not look:
            return
        if self.world > 1:  # all look at the same steps, and save if one wants to
            a_second = min(2 * len(self.losses), int(len(self.losses) / max(1e-3, now - self.shown)))
            save, steps = over_all(torch.tensor([save, a_second]), "MAX").tolist()
            self.next_look = self.step + max(1, steps)
        self.look(z.detach(), done)
        if save and done < self.steps:
            self.save()
            self.saved = now
            self.stop_if_asked()

    def look(self, z: Tensor, done: int) -> None:
        """Check the losses since the last look, and show where we are, `done` steps into the epoch."""
        for i, value in enumerate((over_all(torch.stack(self.losses).float()) / self.world).tolist(), 1):
            if not math.isfinite(value):
                self.fail(f"the loss is {value}", self.step - len(self.losses) + i)
            self.progress["loss_sum"] += value
        self.losses.clear()
        self.z = gather(z) if done == self.steps else z
        self.shown = time.monotonic()  # when the device has done it
        self.progress["seconds"] = self.shown - self.started
        self.loss = self.progress["loss_sum"] / done
        self.speed = done * self.config.batch_size / max(1e-9, self.progress["seconds"])  # images a second
        if self.live:
            left = (self.total - self.step) * self.config.batch_size / self.speed / 60
            line = self.line(f"{done}/{self.steps}, {left:.1f} min left", *health(self.z[:512])[:2])
            with suppress(OSError):  # of a terminal that was closed: SIGHUP's save is to come
                print("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    def line(self, what: str, std: float, rank: float) -> str:
        """Where the run is: the progress line of a terminal, and the line that an epoch leaves."""
        healthy = f"std {std:.4f} (healthy {1 / math.sqrt(self.dim):.4f})"
        epoch = f"epoch {(self.step - 1) // self.steps + 1:3d}/{self.config.epochs}"
        return f"{epoch}  {what}  {self.speed:,.0f} images/s  loss {self.loss:.4f}  {healthy}  rank {rank:.1f}"

    def stop_if_asked(self) -> None:
        if number := int(over_all(torch.tensor(int(self.signal)), "MAX")):
            self.curves()
            done = f"stopped after step {self.step} of {self.total}"
            raise Stopped(f"{done}; {self.checkpoint} is saved, --resume continues from there", number)

    def fail(self, what: str, step: int) -> typing.NoReturn:
        last = f"the last good one is kept in {self.checkpoint}" if self.checkpoint.exists() else "none was written yet"
        raise Diverged(f"{what} at step {step} of {self.total}; --lr is likely too high; checkpoint: {last}")

    def end_epoch(self) -> None:
        """Measure, write log and checkpoint, and say so when the output has collapsed."""
        c, epoch = self.config, self.step // self.steps
        due = c.knn_every and (epoch % c.knn_every == 0 or epoch == c.epochs)
        accuracy = knn_of(self.model.backbone, self.data, c) if due else None
        (std, rank, cos2), lr = health(self.z), self.parts["optimizer"].param_groups[0]["lr"]
        row = [epoch, self.loss, lr, std, rank, accuracy, self.speed]
        self.progress["rows"].append(row)
        self.progress.update(loss_sum=0.0, seconds=0.0)
        self.save()
        self.write_log()
        if self.board:
            for name, value in zip(self.COLUMNS[1:], row[1:], strict=True):
                if value is not None:
                    self.board.add_scalar(name, value, epoch)
            self.board.flush()
        knn = "" if accuracy is None else f"kNN {accuracy:.3f} (guess {self.data.guess:.3f})"
        print("\r\x1b[K" * self.live + self.line(knn, std, rank), flush=True)
        settled = self.step >= self.SETTLED and len(self.z) >= 8  # two images, after a BN, are always opposite
        # runs that learn were seen up to 0.94, collapsed ones above 0.999
        if settled and not self.warned and cos2 > 0.98:
            self.warned = True
            line = f"cos2, the mean squared cosine of two images, is {cos2:.3f}; {1 / self.dim:.3f} when spread out"
            print(f"warning: the output has collapsed to a point or a line: {line}", flush=True)
        self.stop_if_asked()

    def finish(self, evaluate: str = "") -> dict[str, Any]:
        """Draw the curves, print kNN beside its controls and the next command (with the flags `evaluate`); return the
        last figures."""
        self.curves()
        if not self.progress["rows"]:  # --epochs 0
            if not self.step:
                self.save()
            accuracy = knn_of(self.model.backbone, self.data, self.config) if self.config.knn_every else None
            metrics = dict.fromkeys(self.COLUMNS) | {"epoch": 0, "knn_top1": accuracy}
        else:
            metrics = dict(zip(self.COLUMNS, self.progress["rows"][-1], strict=True))
        self.neighbours()
        if metrics["knn_top1"] is not None:
            self.model.eval()
            torch.manual_seed(self.config.seed)
            networks = {"g(h)": self.model.embed, "raw pixels": pixels}
            with suppress(InputError):  # the file of --init has gone
                before = "untrained h" if self.config.init == "random" else "h of --init"
                untrained = type(self.model)(dataclasses.replace(self.config, resume=False)).to(self.device)
                networks = {"g(h)": self.model.embed, before: untrained.backbone, "raw pixels": pixels}
            metrics |= {f"knn {name}": knn_of(network, self.data, self.config) for name, network in networks.items()}
            beside = ", ".join(f"{metrics[f'knn {name}']:.3f} of {name}" for name in networks)
            k, asked = knn_k(self.data.train.labels[self.data.train.labels >= 0]), f"{len(self.data.test):,} held-out"
            beside += f", {self.data.guess:.3f} of a guess"
            print(f"kNN top-1 {metrics['knn_top1']:.3f} of h on {asked} images (k = {k}); {beside}")
        evaluate = evaluate if self.data.labelled else " --embed out.npz --map map.png"
        evaluate += " --data PICTURES" * (self.data.name == "a tensor")
        print(f"{self.out}: backbone.pt, neighbours.png, ...; next: python linear_eval.py {self.out}{evaluate}")
        return metrics

    def save(self) -> None:
        """Write checkpoint.pt and backbone.pt; refuses a model with a value that is not finite."""
        for name, value in (state := self.model.state_dict()).items():
            if not torch.isfinite(value).all():
                self.fail(f"{name} is not finite", self.step)
        self.saving = True
        saved = {"method": self.config.method(), "config": dataclasses.asdict(self.config)}
        saved |= {"parts": {name: (type(part).__name__, part.state_dict()) for name, part in self.parts.items()}}
        saved |= {"progress": self.progress, "seen": self.seen}
        saved |= {"rng": gather(torch.get_rng_state()[None])}  # everything random is drawn on the CPU; (W, bytes)
        save_whole(saved, self.checkpoint, self.before)
        backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        save_whole(backbone, self.out / "backbone.pt")
        self.saving = False

    def load(self) -> None:
        """Go on from checkpoint.pt. Raises `InputError` where a flag or the data would make another run of it."""
        state = load_checkpoint(self.checkpoint, self.config.method())
        newer = {field.name: field.default for field in dataclasses.fields(self.config)}  # flags since that run
        was, now = newer | state["config"] | state.get("seen", {}), dataclasses.asdict(self.config) | self.seen
        for name in now:
            if was.get(name) != now[name] and not re.fullmatch(NO_MATTER, name):
                change = f"--resume: {dashed(name)} was {was.get(name)!s:.200}, now it is {now[name]!s:.200}"
                ensure(re.fullmatch(MAY_CHANGE, name), f"{change}; give what it was, or choose another --out")
                print(f"note: {change}")
        for name, part in self.parts.items():
            try:
                _, saved = state["parts"][name]
                if "param_groups" in saved:  # an optimiser's flags may change
                    saved = saved | {"param_groups": part.state_dict()["param_groups"]}
                part.load_state_dict(saved)
            except (RuntimeError, ValueError, KeyError):
                raise InputError(f"--resume: {self.checkpoint} has another {name}; give that run's flags") from None
        self.progress = state["progress"]
        if len(state["rng"]) == self.world:
            torch.set_rng_state(state["rng"][self.rank].clone())
        else:
            before = f"{len(state['rng'])} process{'es' * (len(state['rng']) > 1)}"
            print(f"note: --resume: the run was of {before}, now of {self.world}: its views from here on are others")
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            draw_apart()

    def write_log(self) -> None:
        rows = [["" if v is None else f"{v:.6g}" for v in row] for row in self.progress["rows"]]
        save_whole("".join(",".join(row) + "\n" for row in [self.COLUMNS, *rows]), self.out / "log.csv")

    def draw_views(self, views: Sequence[Tensor], count: int = 8) -> None:
        """views.png: a column is an image, its views one above the other."""
        side, rows = max(v.shape[-1] for v in views), []
        for v in views:  # a small crop stands in the corner of a white square
            v = v[:count].float().cpu() * images.STD + images.MEAN
            rows.append(F.pad(v, (0, side - v.shape[-1]) * 2, value=1.0))
        grid = F.interpolate(torch.cat(rows), scale_factor=max(1, 96 // side), mode="nearest")
        grid = torchvision.utils.make_grid(grid, nrow=len(rows[0]), pad_value=1)
        torchvision.utils.save_image(grid, self.out / "views.png")
        if self.board:
            self.board.add_image("views", grid.clamp(0, 1), 1)

    def neighbours(self) -> None:
        """neighbours.png: see `draw_neighbours`."""
        sheet = draw_neighbours(self.model.backbone, self.data, self.config)
        if not self.rank:
            sheet.save(self.out / "neighbours.png")
        if self.board:
            self.board.add_image("neighbours", np.asarray(sheet), len(self.progress["rows"]), dataformats="HWC")
            self.board.close()

    def curves(self) -> None:
        """curves.png: loss, kNN, feature std against 1/sqrt(d), and effective rank, by epoch; needs matplotlib."""
        if self.rank or not (rows := self.progress["rows"]):
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("no curves.png: matplotlib is not installed (pip install matplotlib)")
            return
        figure = Figure(figsize=(14, 3.2), layout="constrained")
        panels = {"loss": 1, "kNN top-1 of h": 5, "feature std; dashed: healthy": 3, "effective rank": 4}
        for axes, (title, column) in zip(figure.subplots(1, 4), panels.items(), strict=True):
            points = [(row[0], row[column]) for row in rows if row[column] is not None]
            axes.plot(*zip(*points, strict=True), marker=".")  # none without labels
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(title=title, xlabel="epoch")
            axes.grid(alpha=0.3)
            if column == 3:
                axes.axhline(1 / math.sqrt(self.dim), color="grey", linestyle="--")
                axes.set_ylim(0, 1.1 / math.sqrt(self.dim))
        figure.savefig(self.out / "curves.png", dpi=110)
