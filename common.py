"""What every method shares: flags, network, optimiser, kNN and a run's loop and files. Copy it and images.py along."""

import argparse
import dataclasses
import importlib
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

import images
from images import Data, Images, InputError, ensure, explain, reason, seed_of

# PyPI has a package of this name too: only the folder beside this file is ours
kernels = importlib.import_module("kernels") if Path(__file__).with_name("kernels").is_dir() else None


class RunFailure(RuntimeError):
    """The run itself failed: its loss or its weights are not finite, or a file cannot be written."""


class Stopped(KeyboardInterrupt):
    """A signal has stopped the run. The arguments are the line to print and the signal's number."""


@contextmanager
def exit_status() -> Iterator[None]:
    """End a script by what happened: 0 done, 1 the run failed, 2 bad input, 128 + a signal's number. An expected
    failure prints one line, `error: what is wrong, and what to give`. Another one is a bug and keeps its traceback."""
    if rank := int(os.environ.get("RANK", "0")):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
        if share()[1] > 1:
            dist.destroy_process_group()
        return
    except KeyboardInterrupt as stop:
        line, number = stop.args or ("stopped", signal.SIGINT)
        status, line = 128 + number, "" if rank else line  # a signal reaches all processes: rank 0 says so
    except (InputError, RunFailure, OSError) as error:
        line, status = f"error: {error}", 2 if isinstance(error, InputError) else 1
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        line, status = "error: out of memory; give a smaller --batch-size, or a --micro-batch-size", 1
    with suppress(OSError):
        sys.stdout.flush()
    if line:
        time.sleep(10 * (rank > 0))  # torchrun ends this process meanwhile, if rank 0 says the same
        print("\r\x1b[K" * sys.stderr.isatty() + line, file=sys.stderr, flush=True)  # over the progress line
    sys.exit(status)


def share() -> tuple[int, int]:
    """Which of torchrun's processes this is: (rank, W). Each takes `batch[rank::W]`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(x: Tensor) -> Tensor:
    """The rows x (n, ...) of all processes in the order of the batch, (W n, ...). If each process computes the loss of
    all rows, the gradient of its own rows is W times as large here, because DDP then takes the mean over processes."""
    rank, world = share()
    if world == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank] = x + (world - 1) * (x - x.detach()) if x.requires_grad else x
    return torch.stack(parts, 1).flatten(0, 1)


def over_all(x: Tensor, op: str = "SUM") -> Tensor:
    """The sum, or another reduction, of all processes' x, in place."""
    if share()[1] > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def pick_device(name: str) -> torch.device:
    """The device of that name. Each of torchrun's processes takes its own GPU, and the process group starts here."""
    several, name = "RANK" in os.environ, name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with explain(f"--device {name}", "give cpu or auto; torchrun sets RANK, and needs a GPU for each process"):
        device = torch.device(name, int(os.environ["LOCAL_RANK"])) if several and name == "cuda" else torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # Triton launches on the current one
        torch.ones(1, device=device).item()
        if several and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


@dataclass(kw_only=True)
class Flags:
    """A script's flags: a line of a `Config` that inherits this class is a flag, and the comment beside it is its help.
    `Config()` is the paper's recipe; `Config.preset("demo", epochs=2)` is what `--preset demo --epochs 2` gives."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}}
    PRESET_OF: ClassVar[dict[str, str]] = {"shapes": "demo", "cifar10": "cifar", "cifar100": "cifar", "stl10": "paper"}
    MAY_CHANGE: ClassVar[Sequence[str]] = ()  # flags that a resumed run may be given anew

    def __post_init__(self) -> None:
        for name, kind in flags(type(self)).items():
            value, choices = getattr(self, name), get_args(kind)
            ok, rule = value in choices if choices else isinstance(value, kind), " or ".join(choices) or kind.__name__
            if kind in (int, float):  # NumPy's numbers are `Real`, and become Python's
                ok = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
                ok, rule = ok and kind(value) == value, f"a {'whole ' * (kind is int)}number, 0 or more"
            ensure(ok, f"{dashed(name)} {value}: give {rule}")
            setattr(self, name, value if choices else kind(value))
        self.check()

    def check(self) -> None:
        """Refuse values that no run can have. A method adds what its paper asks for."""

    def need(self, *rules: str) -> None:
        """Refuse values that break a rule such as "0 < blur <= 1". The rule is its own message."""
        for rule in rules:
            given = " ".join(f"{dashed(name)} {value}" for name, value in vars(self).items() if name in rule.split())
            ensure(eval(rule, {}, vars(self)), f"{given}: give {rule}")

    @classmethod
    def preset(cls, name: str, **given: Any) -> Self:
        """The recipe of that name; what is given beside it wins."""
        ensure(name in cls.PRESETS, f"--preset {name}: give one of {', '.join(cls.PRESETS)}")
        return cls(**cls.PRESETS[name] | given)

    @classmethod
    def method(cls) -> str:
        """The name of the method's file."""
        return Path(inspect.getfile(cls)).stem


@dataclass(kw_only=True)
class RunConfig(Flags):
    """The flags of every method for images, whose `Config` inherits them, adds its own and sets `PRESETS`."""

    MAY_CHANGE = ("epochs", "lr", "data", "data_dir", "resident_gb", "device", "workers", "compile", "loss_backend")
    MAY_CHANGE += ("micro_batch_size", "knn_every", "save_minutes", "tensorboard")
    span: ClassVar[Any] = None  # what 16-bit pictures show as black and white; a run measures it, see `images.Images`

    data: str = "imagenet"  # shapes (made on the spot), cifar10, cifar100, stl10 (downloaded), or a folder of pictures
    data_dir: str = "data"  # the folder for downloaded data sets
    resident_gb: float = 4.0  # keep a folder's decoded pictures in memory up to this size, and stream a larger set
    epochs: int = 100  # passes over the training images; 0 writes the weights that the run starts from
    batch_size: int = 256  # N, images in a step, of all processes together
    micro_batch_size: int = 0  # embed a batch in pieces of this size, to save memory; BN sees a piece; 0 = whole
    backbone: str = "resnet50"  # a torchvision ResNet (resnet18, resnet50, ...), or resnet8, which is small and quick
    stem: Literal["imagenet", "cifar"] = "imagenet"  # 7x7 stride 2 and max-pool; or 3x3 for pictures of 32 pixels
    init: str = "random"  # random, imagenet (torchvision's weights), or a file: a state_dict such as a backbone.pt
    image_size: int = 224  # side of a view in pixels
    lr: float = 0.1  # the highest learning rate; a cosine leads to 0
    weight_decay: float = 0.0  # weight decay, in the gradient (L2)
    warmup_epochs: float = 0.0  # epochs of linear warm-up of the learning rate
    seed: int = 0  # seed of everything random: weights, order, views
    device: str = "auto"  # any torch device; auto is cuda where there is a GPU, else cpu
    workers: int = 4  # processes that decode pictures, at most one a core; 0 decodes in this process
    amp: Literal["off", "bf16"] = "off"  # mixed precision of the network
    compile: bool = False  # torch.compile the network: slow start, faster steps
    knn_every: int = 1  # epochs between kNN checks on the held-out images; 0 = never
    save_minutes: float = 10.0  # minutes between checkpoints within an epoch; 0 = only at its end
    tensorboard: bool = False  # write the log's columns for TensorBoard too
    out: str = "runs/run"  # folder of the run; if it holds a run, a new one beside it, such as runs/run-2
    resume: str = ""  # a run's folder: go on there with its flags, or start there if it holds no run yet

    def check(self) -> None:
        self.need("batch_size > 0", "image_size >= 8")
        ensure(self.micro_batch_size != 1, "--micro-batch-size 1: BN compares images; give 2 or more")
        long = f"--warmup-epochs {self.warmup_epochs:g}: give at most --epochs {self.epochs}"
        ensure(self.warmup_epochs <= self.epochs or self.epochs == 0, long)


def dashed(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def flags(config: type[Flags]) -> dict[str, Any]:
    """Field name -> type of every flag of a config class."""
    return {field.name: field.type for field in dataclasses.fields(config)}


class OneLineParser(argparse.ArgumentParser):
    """argparse, whose complaint is an `InputError`."""

    def error(self, message: str) -> None:
        raise InputError(f"{message}; --help lists what can be given")


def parse_args(config: type[Flags], argv: Sequence[str] | None = None) -> Any:
    """The command line's config: a given flag wins over the preset, and the preset over the paper. A preset that is not
    given follows from --data, or with --resume of a run from that run's flags. Raises `InputError`."""
    method, words = config.method(), sys.modules[config.__module__].__doc__.split("\n")[0]
    parser = OneLineParser(usage=f"python {method}.py [flags]", description=words, allow_abbrev=False)
    parser.add_argument("--preset", choices=config.PRESETS, help="a recipe that sets the defaults (default: by --data)")
    options = {kind: {"type": kind, "metavar": ""} for kind in (int, float, str)}
    options, kinds = options | {bool: {"action": argparse.BooleanOptionalAction}}, flags(config)
    for title, owner in ((f"the flags of {method}", config), ("the run", RunConfig)):
        group = parser.add_argument_group(title)
        for name, text in re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(owner), re.M):
            if kind := kinds.pop(name, None):  # a method may have a line of its own for a shared flag
                presets = "".join(f"; {p}: {values[name]}" for p, values in config.PRESETS.items() if name in values)
                text = f"{text} (default {getattr(config, name)}{presets})".replace("%", "%%")
                group.add_argument(dashed(name), help=text, **options.get(kind) or {"choices": get_args(kind)})
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    ensure(not {"out", "resume"} <= given.keys(), "--out: with --resume a run stays in that folder; leave it out")
    preset, by_data = given.pop("preset", ""), config.PRESET_OF.get(given.get("data", [*config.PRESET_OF][0]), "photos")
    if stored := stored_flags(config, given.get("resume", "")):
        return config(**stored | config.PRESETS.get(preset, {}) | given)
    return config.preset(preset or (by_data if by_data in config.PRESETS else "paper"), **given)


def stored_flags(config: type[Flags], folder: str) -> dict[str, Any]:
    """The flags of the run in `folder`, none if no run is there. Raises `InputError` for a run of another method."""
    if not folder or not Path(folder, "checkpoint.pt").exists():
        return {}
    with explain(f"--resume {folder}: config.json", "start another run"):
        stored = json.loads(Path(folder, "config.json").read_text()) | {"out": folder, "resume": folder}
        method = stored.pop("method")
        ensure(method == config.method(), f"--resume {folder}: a run of {method}.py; give it to that script")
        config(**stored)  # raises if another version wrote it
    return stored


def resnet8() -> nn.Module:
    """A quarter-scale ResNet for small images on a CPU. A block's last BN starts at 1: 0 would delay a short run."""
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
    """The network f: images (N, 3, H, W) -> features h (N, `feature_dim`), started as `--init` says: a ResNet without
    its `fc`, whose state_dict torchvision loads. `zero_init_residual`: the last BN of a block starts at 0."""
    name, init, models = config.backbone, config.init, torchvision.models
    with explain(f"--backbone {name}", "give resnet8 or a ResNet of torchvision, such as resnet18"):
        network = resnet8() if name == "resnet8" else models.get_model(name, zero_init_residual=zero_init_residual)
    if name != "resnet8":
        network.feature_dim, network.fc = network.fc.in_features, nn.Identity()
    if name != "resnet8" and config.stem == "cifar":
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if init != "random" and not stored_flags(type(config), config.resume):
        with explain(f"--init {init}", f"give random, imagenet, or a file with weights of {name} --stem {config.stem}"):
            best = models.get_model_weights(name).DEFAULT if init == "imagenet" else None
            state = best.get_state_dict() if best else torch.load(init, map_location="cpu", weights_only=True)
            network.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    return network


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics of every BN layer as they are, for a forward pass that is not to count."""
    kept = [(b, b.clone()) for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
    try:
        yield
    finally:  # the checkpoint leaves by an exception as soon as it has what it needs
        for buffer, value in kept:
            buffer.copy_(value)


class Network(nn.Module):
    """The model under autocast, in pieces of --micro-batch-size, whose graphs the backward pass builds again one by one
    (GradCache, arXiv:2101.06983, by activation checkpoints): the gradient is exact, except that BN sees pieces."""

    def __init__(self, model: nn.Module, config: RunConfig, device: torch.device) -> None:
        super().__init__()
        self.model, self.piece = model, config.micro_batch_size
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, config.amp == "bf16")

    def forward(self, *views: Tensor) -> Any:
        with self.autocast():
            if not 0 < self.piece < len(views[0]):
                return self.model(*views)
            again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), still_statistics(self.model))}
            pieces = zip(*(x.split(self.piece) for x in views), strict=True)
            out = [checkpoint(self.model, *piece, **again) for piece in pieces]
        return torch.cat(out) if isinstance(out[0], Tensor) else tuple(map(torch.cat, zip(*out, strict=True)))


def cosine_lr(step: int, total: int, warmup: float, peak: float, first: float = 0.0, last: float = 0.0) -> float:
    """The rate of a step below `total`: a line from `first` to `peak` over `warmup` steps, then a cosine to `last`."""
    if step < warmup:
        return first + (peak - first) * min(1.0, (step + 1) / warmup)
    return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the coming step, for every group but those marked `constant`."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if group.get("constant") else lr


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights, and the BN parameters and biases, which get neither weight decay nor LARS adaptation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "adapt": True}
    return [weights, {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False}]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888), as SimCLR and BYOL use it. For each w, g:
    g <- g + weight_decay w;  rate = trust |w| / |g| (1 where either is 0, or where the group has `adapt` False);
    SimCLR:  v <- momentum v + lr rate g, w <- w - v;  BYOL (`lr_in_momentum=False`):  v <- momentum v + rate g,
    w <- w - lr v."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001, lr_in_momentum=True):
        settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, adapt=True)
        super().__init__(params, settings | {"lr_in_momentum": lr_in_momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not (weights := [p for p in group["params"] if p.grad is not None]):
                continue
            grads = torch._foreach_add([p.grad for p in weights], weights, alpha=group["weight_decay"])
            if group["adapt"]:
                norms = zip(torch._foreach_norm(weights), torch._foreach_norm(grads), strict=True)
                rates = [torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0) for w, g in norms]
                torch._foreach_mul_(grads, rates)
            velocity = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in weights]
            inside, outside = (group["lr"], 1.0) if group["lr_in_momentum"] else (1.0, group["lr"])
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, grads, alpha=inside)
            torch._foreach_add_(weights, velocity, alpha=-outside)


@torch.no_grad()
def embed(network: Callable, split: Images, config: RunConfig, index: Tensor | None = None) -> Tensor:
    """`network`, in eval mode, of the central views of a split, or of its images `index`: (N, d) float32. Each process
    embeds its share, and all get the whole."""
    (rank, world), index = share(), torch.arange(len(split)) if index is None else index
    mine = index[(torch.arange(-(-len(index) // world)) * world + rank) % len(index)]  # as many rows for each process
    mine = mine.split(min(512, 2 * (config.micro_batch_size or max(8, config.batch_size // world))))  # a step's memory
    views = split.views(mine, [(config.image_size, None)], workers=config.workers)
    return gather(torch.cat([network(images.normalize(x)).float() for (x,) in views]))[: len(index)]


@torch.no_grad()
def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, temperature: float = 0.1) -> float:
    """Top-1 of the weighted kNN classifier (Wu et al. 2018, arXiv:1805.01978): votes exp(cosine / temperature) of 200
    neighbours, or the mean size of a class. `bank` (N, d), its labels (N,), `queries` (M, d), their `labels` (M,)."""
    bank, queries, bank_labels = F.normalize(bank, dim=1), F.normalize(queries, dim=1), bank_labels.to(bank.device)
    right, k = 0, max(1, min(200, len(bank) // len(bank_labels.unique())))
    for rows, truth in zip(queries.split(1024), labels.to(bank.device).split(1024), strict=True):
        cosine, near = (rows @ bank.T).topk(k, dim=1)  # (m, k)
        votes = torch.zeros(len(rows), int(bank_labels.max()) + 1, device=bank.device)
        votes.scatter_add_(1, bank_labels[near], ((cosine - 1) / temperature).exp())
        right += int((votes.argmax(1) == truth).sum())
    return right / len(queries)


def pixels(x: Tensor) -> Tensor:
    """Raw pixels, at most 32x32, as features; kNN takes the mean picture off. h has to beat them."""
    return F.adaptive_avg_pool2d(x, min(32, x.shape[-1])).flatten(1)


@torch.no_grad()
def health(z: Tensor) -> tuple[float, float, float]:
    """Of the rows of z (N, d) at length 1: the mean std of a channel, 1/sqrt(d) when healthy; the effective rank,
    exp of the singular values' entropy (Roy & Vetterli 2007); two rows' mean squared cosine, 1 on a line."""
    z, n = F.normalize(z.cpu().double(), dim=1), len(z)  # squared, a float32 would lose the small singular values
    squares = torch.linalg.eigvalsh(z.T @ z if z.shape[1] < n else z @ z.T).clamp(min=0)
    part = squares.sqrt() / squares.sqrt().sum().clamp(min=1e-12)
    cos2 = (squares.square().sum() - n) / max(1, n * (n - 1)) if z.any() else 1.0  # a row with itself adds n
    return float(z.std(0, correction=0).mean()), float(torch.special.entr(part).sum().exp()), float(cos2)


def new_folder(out: str, again: bool = False) -> str:
    """Make the folder `out`, or `out-2`, ... where a run is that does not go on `again`. No two runs share one."""
    for name in (str(Path(out)), *(f"{Path(out)}-{number}" for number in range(2, 10_000))):
        with explain(f"{'--resume' if again else '--out'} {name}", "give another folder"):
            Path(name).mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                Path(name, "config.json").touch(exist_ok=again)
                return name
    raise InputError(f"--out {out}: ten thousand runs are there; give another folder")


def save_whole(state: Any, path: Path) -> None:
    """Write text, bytes, or a state by torch.save. `path` is whole at any moment: it is written aside, then renamed."""
    part, whole = path.with_name(f"{path.name}.part"), io.BytesIO()  # into a file, torch.save would hide why it fails
    state = state.encode() if isinstance(state, str) else state
    whole.write(state) if isinstance(state, bytes) else torch.save(state, whole)
    try:
        part.write_bytes(whole.getbuffer())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunFailure(f"{path} cannot be written: {reason(error)}; what was there before is whole") from None


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Read a run's checkpoint, weights only. Raises `InputError` if there is none, or none that is whole."""
    path = Path(folder, "checkpoint.pt")
    with explain(str(path), "give the folder of a whole run"), zipfile.ZipFile(path) as parts:
        ensure(parts.testzip() is None, f"{path}: damaged; train again")  # torch.load checks no checksum
        state = torch.load(path, map_location="cpu", weights_only=True)
        ensure("span" in state, f"{path}: of an older version of this project; train again")
    return state


def load_run(folder: str | Path) -> tuple[Any, nn.Module]:
    """The config and the trained model, in eval mode, of a run's folder. Raises `InputError` for anything else."""
    state = load_checkpoint(folder)
    name, (kind, weights) = state["method"], state["parts"]["model"]
    with explain(f"{folder}: no whole run of {name}", "train again"):
        ensure(Path(__file__).with_name(f"{name}.py").is_file(), f"{folder}: put {name}.py beside common.py")
        method = importlib.import_module(name)
        config = method.Config(**state["config"])
        fresh = dataclasses.replace(config, init="random") if isinstance(config, RunConfig) else config
        model = getattr(method, kind)(fresh, *state.get("inputs", ()))
        model.load_state_dict(weights)
    config.span = state["span"]
    return config, model.eval()


COLUMNS = ("epoch", "loss", "lr", "feature_std", "effective_rank", "knn_top1", "images_per_second")  # of log.csv


class Run:
    """A run: `begin`, then a step for each of `batches`, ended by `log`, then `finish`. Between two steps `batches`
    measures, prints, saves and answers signals. A step draws by (seed, step): a run goes on to the same bits."""

    def __init__(self, config: RunConfig, data: Any = None) -> None:
        """`data`: `images.Data`, pictures, or (pictures, labels) for `images.from_arrays`; None loads `config.data`."""
        self.config = c = dataclasses.replace(config)  # a copy: `train` never changes what it was given
        self.device, (self.rank, self.world), c.out = pick_device(c.device), share(), c.resume or c.out
        if data is not None and not isinstance(data, Data):
            data = images.from_arrays(*(data if isinstance(data, tuple) else (data, None)), self.device)
        stored, c.data = stored_flags(type(c), c.resume), data.name if data else c.data
        for name in (name for name, was in stored.items() if was != getattr(c, name)):
            change = f"{dashed(name)} was {stored[name]}, now it is {getattr(c, name)}"
            ensure(name in c.MAY_CHANGE, f"--resume: {change}; leave it out")
            print(f"note: {change}")
        start = {"span": None, "data": None, "step": 0, "rows": [], "loss_sum": 0.0, "parts": {}}
        state = load_checkpoint(c.resume) if stored else start
        c.span, self.kept = state["span"], state["parts"]
        self.data = data or images.load(c, self.device)
        c.data, c.span, n, labels = self.data.name, self.data.train.span, c.batch_size, self.data.train.labels
        there, own, piece = len(labels), n // self.world, c.micro_batch_size or n
        ensure(n <= there, f"--batch-size {n}: there are {there:,} training images; give --batch-size {there} or less")
        ensure(n % self.world == 0, f"--batch-size {n}: give a multiple of {self.world}, the number of processes")
        ensure(piece >= own or own % piece == 0, f"--micro-batch-size {piece}: give a divisor of {own}")
        bank = (labels >= min(0, labels.max())).nonzero().squeeze(1)  # labelled images, or all if no image has a label
        self.bank = bank[torch.linspace(0, len(bank) - 1, min(len(bank), 100_000)).long()]  # for kNN and neighbours
        self.about = [there, list(self.data.classes)]
        ensure(
            state["data"] in (None, self.about), f"--resume: --data {c.data} is not the set of that run; give the same"
        )
        self.step, self.rows, self.loss_sum, self.losses = state["step"], state["rows"], state["loss_sum"], []
        self.steps, self.total = there // n, there // n * c.epochs
        self.shared = torch.Generator()  # all processes draw the same from it
        self.signal, self.warned = 0, False
        self.clear = "\r\x1b[K" if sys.stdout.isatty() else ""  # empties a terminal's line, which shows the progress
        torch.manual_seed(seed_of(c.seed))

    def loss(self, naive: Callable, across: bool = True) -> Callable:
        """`naive`, or the loss of its name in kernels/, by --loss-backend; `across`: over the rows of all processes."""
        asked, group = self.config.loss_backend, {"group": dist.group.WORLD} if across and self.world > 1 else {}
        if not group and (asked == "naive" or kernels is None and asked == "auto"):

            def in_float32(*rows: Any, **more: Any) -> Tensor:  # --amp bf16 makes rows of 16 bits
                return naive(*(x.float() if getattr(x, "dtype", 0) == torch.bfloat16 else x for x in rows), **more)

            return in_float32
        ensure(kernels, f"--loss-backend {asked}: kernels/ is not beside common.py; copy it along")
        with explain(f"--loss-backend {asked}", "give auto"):
            kernels.resolve_backend(asked, 1, 1, self.device, torch.float32, group.get("group"))
        return partial(getattr(kernels, naive.__name__), backend=asked, **group)

    def begin(self, model: nn.Module, guess: float = 0, sync_bn: bool = True, note: str = "", **parts: Any) -> Any:
        """Make the run's folder, or go on in --resume's; print the header; return what a step calls. `parts` are
        saved with the model, `guess` is the loss of a guess (0: none), BN spans the GPUs if `sync_bn`."""
        c, self.model, self.guess, self.parts = self.config, model, guess, {"model": model, **parts}
        with explain(f"--resume {c.resume}", "start another run"):
            for name, (_, kept) in self.kept.items():  # --lr may change: an optimizer keeps its new groups
                groups = {k: v for k, v in self.parts[name].state_dict().items() if k == "param_groups"}
                self.parts[name].load_state_dict(kept | groups)
        self.kept = {}
        if c.tensorboard:
            with explain("--tensorboard", "pip install tensorboard"):
                importlib.import_module("torch.utils.tensorboard")
        names = [new_folder(c.out, again=bool(c.resume)) if self.rank == 0 else ""]
        if self.world > 1:
            dist.broadcast_object_list(names)
        c.out = names[0]
        self.save()
        given = dataclasses.asdict(c) | {"out": type(c).out, "resume": ""}
        given = {k: v for k, v in given.items() if v != getattr(type(c), k)}
        given = [dashed(k if v else f"no_{k}") if isinstance(v, bool) else f"{dashed(k)} {v}" for k, v in given.items()]
        size, lr = sum(p.numel() for p in model.parameters()), parts["optimizer"].param_groups[0]["lr"]
        alone = "; BN is each process's own" * (self.world > 1 and self.device.type != "cuda")
        words = f"{note and '; '}{note}" + f"; a guess has the loss {guess:.3f}" * bool(guess)
        print(f"{c.out}: {c.method()}, the paper's recipe with {' '.join(given)}\ndata: {self.data.describe()}")
        print(f"network: {size / 1e6:.2f} M weights, h {model.backbone.feature_dim}-d, output {model.dim}-d{words}")
        print(f"steps: {self.steps:,} an epoch, {self.total:,} in all, {self.step:,} done; peak learning rate {lr:g}")
        print(f"device: {self.world} x {self.device}, {torch.get_num_threads()} threads{alone}", flush=True)
        if self.world > 1 and sync_bn and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for part in model.children() if c.compile else ():
            part.compile()
        network = Network(model, c, self.device).train()
        if self.world > 1:
            network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
            network.broadcast_buffers = False  # from now on: the constructor has sent rank 0's buffers to all
        return network

    def save(self) -> None:
        """Write config.json, log.csv, checkpoint.pt and backbone.pt; raise `RunFailure` if anything is not finite."""
        c, out, self.saved = self.config, Path(self.config.out), time.monotonic()
        for name, value in (self.model.state_dict() | {"the loss": torch.tensor(self.loss_sum)}).items():
            words = f"{name} is not finite at step {self.step} of {self.total}; give a lower --lr"
            if not torch.isfinite(value).all():
                raise RunFailure(f"{words}; {out}/checkpoint.pt is the last good one")
        if self.rank:
            return
        state = {"span": c.span, "data": self.about, "step": self.step, "rows": self.rows, "loss_sum": self.loss_sum}
        state |= {"method": c.method(), "config": dataclasses.asdict(c) | {"resume": ""}}
        state |= {"parts": {name: (type(part).__name__, part.state_dict()) for name, part in self.parts.items()}}
        lines = [",".join("" if value is None else f"{value:.6g}" for value in row.values()) for row in self.rows]
        save_whole(json.dumps({"method": c.method()} | state["config"], indent=1), out / "config.json")
        save_whole("\n".join([",".join(COLUMNS), *lines, ""]), out / "log.csv")
        save_whole(state, out / "checkpoint.pt")
        save_whole(self.model.backbone.state_dict(), out / "backbone.pt")

    def batches(self, views: int = 0, scale: tuple[float, float] = (1.0, 1.0), crops: Sequence = ()) -> Iterator:
        """For each step that is left: the indices (n,) of this process's images, and a list of crops (n, 3, S, S):
        `views` random ones of an area in `scale`, a range of fractions, or the given `crops` (see `Images.views`)."""
        c, crops = self.config, crops or [(self.config.image_size, scale)] * views

        def request(number: int, _: Any) -> None:
            if not self.signal:
                os.write(2, b"\nstopping after this step; again to stop now\n")
                self.signal, self.asked = number, time.monotonic()
            elif time.monotonic() - self.asked > 1:  # a closed terminal and torchrun send theirs twice
                raise Stopped("stopped at once", number)

        main, names = threading.current_thread() is threading.main_thread(), ("SIGINT", "SIGTERM", "SIGHUP")
        heard = [n for n in signal.Signals if main and n.name in names and signal.getsignal(n) != signal.SIG_IGN]
        usual = {number: signal.signal(number, request) for number in heard}  # nohup has a signal ignored
        try:
            while self.step < self.total:
                epoch, done = divmod(self.step, self.steps)
                order = torch.Generator().manual_seed(seed_of(c.seed, epoch))
                order = torch.randperm(len(self.data.train), generator=order)[: self.steps * c.batch_size]
                mine = [batch[self.rank :: self.world] for batch in order.split(c.batch_size)[done:]]
                arriving = self.data.train.views(mine, crops, (c.seed, epoch), c.workers)
                self.shown = self.started = time.monotonic()
                for count, index in enumerate(mine, 1):
                    self.shared.manual_seed(seed_of(c.seed, self.step))
                    torch.manual_seed(seed_of(c.seed, self.step, self.rank))
                    yield index, next(arriving)
                    self.step += 1
                    self.between_steps(epoch + 1, count * c.batch_size)
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def log(self, loss: Tensor, z: Tensor, *views: Tensor) -> None:
        """Take the loss of a step, the output z (n, d) that enters it, and what the network was fed."""
        if self.step == 0 and self.rank == 0:  # views.png: a column is an image
            side = max(v.shape[-1] for v in views)
            shown = [v[:8].float().cpu() * images.STD + images.MEAN for v in views]
            rows = [F.pad(v, (0, side - v.shape[-1]) * 2, value=1) for v in shown]  # white around a small crop
            grid = F.interpolate(torch.cat(rows), scale_factor=max(1, 96 // side))
            torchvision.utils.save_image(grid, Path(self.config.out, "views.png"), nrow=len(rows[0]), pad_value=1)
        self.losses.append(loss.detach())  # to read it now would wait for the device
        self.z = z.detach()

    def between_steps(self, epoch: int, count: int) -> None:
        """Read the losses about once a second, measure at the end of an epoch, save when it is time, stop if asked."""
        c, now, end = self.config, time.monotonic(), self.step % self.steps == 0
        save = end or self.signal or 0 < 60 * c.save_minutes < now - self.saved
        wanted = torch.tensor([save or now - self.shown > 1, save, self.signal]).int()
        look, save, stop = over_all(wanted, "MAX").tolist()  # all processes do the same
        if not look:
            return
        for value in (over_all(torch.stack(self.losses).cpu().double()) / self.world).tolist():
            self.loss_sum += value
        if not math.isfinite(self.loss_sum):
            self.save()  # raises `RunFailure`
        self.losses, self.shown = [], time.monotonic()
        loss, speed = self.loss_sum / (self.step - (epoch - 1) * self.steps), count / (self.shown - self.started)
        if end:
            self.end_epoch(epoch, loss, speed)
        elif self.clear:
            left = (self.total - self.step) * c.batch_size / speed / 60
            words = f"step {self.step:,} of {self.total:,}  loss {loss:.4f}  {speed:,.0f} images/s  {left:.1f} min left"
            print(f"{self.clear}{words}", end="", flush=True)
        if save:
            self.save()
        if stop:
            raise Stopped(f"stopped after step {self.step} of {self.total}; --resume {c.out} goes on", stop)

    def end_epoch(self, epoch: int, loss: float, speed: float) -> None:
        """Measure h and the output, add a row to the log, print it, and say so once if the output has collapsed."""
        c, z, lr = self.config, gather(self.z), self.parts["optimizer"].param_groups[0]["lr"]
        (std, rank, cos2), knn = health(z), None
        if c.knn_every and self.data.labelled and (epoch % c.knn_every == 0 or epoch == c.epochs):
            self.model.eval()
            knn = self.knn(self.model.backbone)
            self.model.train()
        row = dict(zip(COLUMNS, (epoch, loss, lr, std, rank, knn, speed), strict=True))
        self.rows, self.loss_sum = [*self.rows, row], 0.0
        words = f"{self.clear}epoch {epoch:3}/{c.epochs}" + (f"  kNN {knn:.3f}" if knn is not None else "")
        words += f"  loss {loss:.4f}  std {std:.4f} (healthy {self.model.dim**-0.5:.4f})  rank {rank:.1f}"
        print(f"{words}  {speed:,.0f} images/s", flush=True)
        if cos2 > 0.98 and self.step >= 200 and len(z) >= 8 and not self.warned:  # runs that learn reach 0.94
            self.warned = True
            print(f"warning: the output has collapsed: two images have a mean squared cosine of {cos2:.3f}", flush=True)
        if c.tensorboard and self.rank == 0:
            with torch.utils.tensorboard.SummaryWriter(Path(c.out, "tensorboard")) as board:
                for name in (name for name, value in row.items() if value is not None):
                    board.add_scalar(name, row[name], epoch)

    def knn(self, network: Callable) -> float:
        """kNN top-1 on the held-out images, by the bank of training images. The model is in eval mode."""
        train, test = self.data.train, self.data.test
        keys, queries = embed(network, train, self.config, self.bank), embed(network, test, self.config)
        mean = keys.mean(0) if network is pixels else 0
        return knn_accuracy(keys - mean, train.labels[self.bank], queries - mean, test.labels)

    def finish(self) -> dict[str, Any]:
        """Compare kNN with its controls, draw the pictures, say what comes next; return the figures."""
        c, test = self.config, self.data.test
        last = self.rows[-1] if self.rows else dict.fromkeys(COLUMNS) | {"epoch": 0}
        self.model.eval()
        if c.knn_every and self.data.labelled:
            networks = {"h": self.model.backbone, "g(h)": self.model.embed, "raw pixels": pixels}
            torch.manual_seed(seed_of(c.seed))
            with suppress(InputError):  # the file of --init may have gone
                fresh = type(self.model)(dataclasses.replace(c, resume="")).eval()
                networks["h before training"] = fresh.backbone.to(self.device)
            knn = {name: self.knn(network) for name, network in networks.items()}
            knn["a guess"] = test.labels.bincount().max().item() / len(test)
            words = ", ".join(f"{name} {value:.3f}" for name, value in knn.items())
            print(f"kNN top-1 on {len(test):,} held-out images: {words}")
            if knn["h"] <= knn["raw pixels"]:
                print("warning: h is no better than raw pixels; more epochs, or --init imagenet, may help")
            last = last | {f"knn {name}": value for name, value in knn.items()} | {"knn_top1": knn["h"]}
        if self.rows and 0 < self.guess <= last["loss"]:
            print(f"warning: the loss ended at {last['loss']:.3f}, no lower than a guess's {self.guess:.3f}")
        self.draw_neighbours()
        if self.rank == 0:
            self.draw_curves()
        print(f"{c.out}: backbone.pt, neighbours.png, ...; next: python linear_eval.py {c.out}", flush=True)
        return last | {"out": c.out}

    def draw_neighbours(self) -> None:
        """neighbours.png: a row is a held-out picture, or one to train on if none is held out, and its six nearest
        training pictures by the cosine of h. A frame is green for the same class, red for another, white if unknown."""
        c, train, asked, size = self.config, self.data.train, self.data.test or self.data.train, self.config.image_size
        index = torch.linspace(0, len(asked) - 1, min(8, len(asked))).long()
        h, keys = embed(self.model.backbone, asked, c, index), embed(self.model.backbone, train, c, self.bank)
        cosine = (F.normalize(h, dim=1) @ F.normalize(keys, dim=1).T).cpu()
        cosine[(index[:, None] == self.bank) & (asked is train)] = -2  # a picture is not its own neighbour
        near = self.bank[cosine.topk(min(6, len(self.bank) - 1)).indices]  # (8, 6)
        if self.rank:
            return
        parts = ((asked, index[:, None]), (train, near))
        (x,), (others,) = (next(part.views([i.flatten()], [(size, None)], workers=0)) for part, i in parts)
        tiles = [x[:, None], others.unflatten(0, near.shape)]
        tiles = F.interpolate(torch.cat(tiles, 1).flatten(0, 1).cpu(), scale_factor=max(1, 112 // size))
        labels = torch.cat([part.labels[i] for part, i in parts], 1)  # (8, 7)
        colour = torch.where(labels[:, :1] < 0, 2, (labels == labels[:, :1]).long()).flatten()
        colour = torch.tensor([[1.0, 0, 0], [0, 0.8, 0], [1, 1, 1]])[colour]  # another class, the same, unknown
        framed = colour[..., None, None].repeat(1, 1, tiles.shape[2] + 8, tiles.shape[3] + 8)
        framed[..., 4:-4, 4:-4] = tiles
        torchvision.utils.save_image(framed, Path(c.out, "neighbours.png"), nrow=labels.shape[1], pad_value=1)

    def draw_curves(self) -> None:
        """curves.png: the columns of the log by epoch; needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return print("no curves.png: matplotlib is not installed (pip install matplotlib)")
        figure = Figure(figsize=(20, 3), layout="constrained")
        for axes, name in zip(figure.subplots(1, 6), COLUMNS[1:], strict=True):
            axes.plot([row["epoch"] for row in self.rows], [row[name] for row in self.rows], marker=".")
            axes.set(title=name, xlabel="epoch")
        figure.savefig(Path(self.config.out, "curves.png"), dpi=110)
