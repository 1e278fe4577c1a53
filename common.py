"""What every method shares: flags, network, optimiser, kNN and a run's loop and files. Copy it and images.py along."""

import argparse
import importlib.util
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import images
from images import Data, Images, InputError, ensure, explain, seed_of

kernels = importlib.import_module("kernels") if Path(__file__).with_name("kernels").is_dir() else None  # ours only
COLUMNS = ("epoch", "loss", "lr", "feature_std", "effective_rank", "knn_top1", "images_per_second")  # of log.csv
pixels = nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten())  # a picture as 32 x 32 pixels, which h has to beat


class RunFailure(RuntimeError):
    """The run itself failed: its loss or its weights are not finite, or a file cannot be written."""


@contextmanager
def exit_status() -> Iterator[None]:
    """End a script with status 0 (done), 1 (the run failed), 2 (bad input) or 128 + a signal; a line says why."""
    rank = int(os.environ.get("RANK", "0"))
    sys.stdout = open(os.devnull, "w") if rank else sys.stdout  # noqa: SIM115
    try:
        yield
        if share()[1] > 1:
            dist.destroy_process_group()
        return
    except KeyboardInterrupt as stop:  # `Run` gives it the line and the status; Python's own has no arguments
        line, status = stop.args or ("stopped", 128 + signal.SIGINT)
    except (InputError, RunFailure, OSError) as error:
        line, status = f"error: {error}", 2 if isinstance(error, InputError) else 1
    except (RuntimeError, MemoryError) as error:
        if not re.search("MemoryError|DefaultCPUAllocator|size calculation overflowed", repr(error)):
            raise
        line, status = "error: out of memory; give a smaller --batch-size, or a --micro-batch-size", 1
    if rank == 0 or status < 128:  # a signal reaches every process
        time.sleep(10 * (rank > 0))  # rank 0 speaks first; torchrun then ends this process
        print("\r\x1b[K" * sys.stderr.isatty() + line, file=sys.stderr, flush=True)  # over the progress line
    sys.exit(status)


def share() -> tuple[int, int]:
    """Which of torchrun's processes this is: (rank, W). Each takes `batch[rank::W]`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(x: Tensor) -> Tensor:
    """The rows x (n, ...) of all processes in the order of the batch, (W n, ...): each then takes the whole loss."""
    rank, world = share()
    if world == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank] = x + (world - 1) * (x - x.detach()) if x.requires_grad else x  # gradient x W: DDP divides by W
    return torch.stack(parts, 1).flatten(0, 1)


def pick_device(name: str) -> torch.device:
    """The device of that name. Each of torchrun's processes takes its own GPU, and the process group starts here."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with explain(f"--device {name}", "give cpu or auto; torchrun sets RANK, and needs a GPU for each process"):
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "RANK" in os.environ else name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # Triton launches on the current one
        torch.ones(1, device=device).item()
        if "RANK" in os.environ and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store, rank, world = next(dist.rendezvous("env://"))  # the store may hold the addresses of a try that died
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return device


@dataclass(kw_only=True)
class Flags:
    """A script's flags: each line of a `Config` that inherits this class is a flag, and its comment is the help."""

    PRESET_OF: ClassVar[dict[str, str]] = {"shapes": "demo", "cifar10": "cifar", "cifar100": "cifar", "stl10": "paper"}

    def __post_init__(self) -> None:
        for name, kind in ((field.name, field.type) for field in fields(self)):
            value, choices = getattr(self, name), get_args(kind)
            ok, rule = value in choices if choices else isinstance(value, kind), " or ".join(choices) or kind.__name__
            if kind in (int, float):  # NumPy's numbers are `Real`, and become Python's
                ok = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= sys.maxsize
                ok, rule = ok and kind(value) == value, f"a {'whole ' * (kind is int)}number, 0 or more, below 2^63"
            ensure(ok, f"{dashed(name)} {value}: give {rule}")
            setattr(self, name, value if choices else os.path.expanduser(value) if kind is str else kind(value))
        self.check()

    def need(self, *rules: str) -> None:
        """For `check`: refuse values that break a rule such as "0 < blur <= 1". The message is the rule, as typed."""
        for rule in rules:
            given = " ".join(dashed(name, value) for name, value in vars(self).items() if name in rule.split())
            typed = " ".join(dashed(word) if word in vars(self) else word for word in rule.split())
            ensure(eval(rule, {}, vars(self)), f"{given}: give {typed}")

    @classmethod
    def preset(cls, name: str, **given: Any) -> Self:
        """`Config.preset("demo", epochs=2)` is what `--preset demo --epochs 2` gives. `Config()` is the paper's."""
        ensure(name in cls.PRESETS, f"--preset {name}: give one of {', '.join(cls.PRESETS)}")
        return cls(**cls.PRESETS[name] | given)

    @classmethod
    def method(cls) -> str:
        return Path(inspect.getfile(cls)).stem  # the name of the method's file


@dataclass(kw_only=True)
class RunConfig(Flags):
    """The flags that all methods for images share; a `Config` adds its own. --resume may change those in MAY_CHANGE."""

    MAY_CHANGE = ("epochs", "lr", "data", "data_dir", "resident_gb", "device", "workers", "compile", "loss_backend")
    MAY_CHANGE += ("micro_batch_size", "knn_every", "save_minutes", "tensorboard")
    span: ClassVar[Any] = None  # what 16-bit pictures show as black and white; a run measures it, see `images.Images`
    data: str = "imagenet"  # shapes (made on the spot), cifar10, cifar100, stl10 (downloaded), or the path of a folder
    data_dir: str = "data"  # the folder for downloaded data sets
    resident_gb: float = 4.0  # keep a folder's decoded pictures in memory up to this size, and stream a larger set
    epochs: int = 100  # passes over the training images; 0 writes the weights that the run starts from
    batch_size: int = 256  # N, images in a step, of all processes together
    micro_batch_size: int = 0  # embed in pieces of this size, to save memory; BN sees each piece, twice; 0 = whole
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
    resume: str = ""  # a run's folder: go on with its flags, or start there if it holds no checkpoint yet

    def check(self) -> None:
        self.need("batch_size > 0", "image_size >= 8", "micro_batch_size != 1", "warmup_epochs <= epochs or epochs < 1")


def dashed(name: str, value: Any = True) -> str:
    """A flag as it is typed: `--batch-size 64`, `--symmetric`, `--no-symmetric`."""
    return f"--{'no-' * (value is False)}{name.replace('_', '-')}" + f" {value}" * (not isinstance(value, bool))


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message}; --help lists what can be given")


def parse_args(config: type[Flags], argv: Sequence[str] | None = None) -> Any:
    """The command line's config: a given flag wins over the preset, and the preset over the paper or a resumed run."""
    method, words = config.method(), sys.modules[config.__module__].__doc__.split("\n")[0]
    parser = OneLineParser(usage=f"python {method}.py [flags]", description=words, allow_abbrev=False)
    parser.add_argument("--preset", choices=config.PRESETS, help="a recipe that sets the defaults (default: by --data)")
    how = {kind: {"type": kind, "metavar": ""} for kind in (int, float, str)}
    how[bool] = {"action": argparse.BooleanOptionalAction}
    kinds = {field.name: field.type for field in fields(config)}
    for title, owner in ((f"the flags of {method}", config), ("the run", RunConfig)):
        group = parser.add_argument_group(title)
        for name, text in re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(owner), re.M):
            if kind := kinds.pop(name, None):  # a method may have a line of its own for a shared flag
                presets = "".join(f"; {p}: {values[name]}" for p, values in config.PRESETS.items() if name in values)
                text = f"{text} (default {getattr(config, name)}{presets})".replace("%", "%%")
                group.add_argument(dashed(name), help=text, **how.get(kind) or {"choices": get_args(kind)})
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
    network.relu, network.layer1 = nn.ReLU(inplace=True), torchvision.models.resnet.BasicBlock(32, 32)
    for i, width in ((2, 32), (3, 64)):
        shortcut = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width))
        network.add_module(f"layer{i}", torchvision.models.resnet.BasicBlock(width, 2 * width, 2, shortcut))
    network.avgpool, network.flatten, network.feature_dim = nn.AdaptiveAvgPool2d(1), nn.Flatten(), 128
    for module in network.modules():  # as torchvision initialises its ResNets
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def build_backbone(config: RunConfig, zero_init_residual: bool = True) -> nn.Module:
    """The network f: images (N, 3, H, W) -> h (N, `feature_dim`), a torchvision ResNet without `fc`, from `--init`."""
    name, init, models = config.backbone, config.init, torchvision.models
    with explain(f"--backbone {name}", "give resnet8 or a ResNet of torchvision, such as resnet18"):
        network = resnet8() if name == "resnet8" else models.get_model(name, zero_init_residual=zero_init_residual)
    if name != "resnet8":
        network.feature_dim, network.fc = network.fc.in_features, nn.Identity()
        if config.stem == "cifar":
            network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if init != "random" and not stored_flags(type(config), config.resume):
        with explain(f"--init {init}", f"give random, imagenet, or a file with weights of {name} --stem {config.stem}"):
            best = models.get_model_weights(name).DEFAULT if init == "imagenet" else None
            state = best.get_state_dict() if best else torch.load(init, map_location="cpu", weights_only=True)
            network.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    return network


class Network(nn.Module):
    """The model under autocast; outputs are float32. The backward pass runs each piece again (arXiv:2101.06983)."""

    def __init__(self, model: nn.Module, config: RunConfig, device: torch.device) -> None:
        super().__init__()
        self.model, self.config, self.device = model, config, device.type

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        pieces = list(zip(*(x.split(self.config.micro_batch_size or len(x)) for x in views), strict=True))
        again = partial(torch.utils.checkpoint.checkpoint, self.model, use_reentrant=False)
        with torch.autocast(self.device, torch.bfloat16, self.config.amp == "bf16"):
            out = [again(*piece) if len(pieces) > 1 else self.model(*piece) for piece in pieces]
        return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in map(torch.cat, zip(*out, strict=True)))


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
    """LARS (You et al. 2017, arXiv:1708.03888): g <- g + weight_decay w; rate = trust |w| / |g|, or 1 if either is 0 or
    `adapt` False; v <- momentum v + lr rate g, w <- w - v; `lr_in_momentum` False: lr leaves v; w <- w - lr v."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001, lr_in_momentum=True):
        settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, adapt=True)
        super().__init__(params, settings | {"lr_in_momentum": lr_in_momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            inside, outside = (group["lr"], 1.0) if group["lr_in_momentum"] else (1.0, group["lr"])
            for w in (p for p in group["params"] if p.grad is not None):
                g = w.grad.add(w, alpha=group["weight_decay"])
                if group["adapt"]:
                    w_norm, g_norm = w.norm(), g.norm()
                    g *= torch.where((w_norm > 0) & (g_norm > 0), group["trust"] * w_norm / g_norm, 1.0)
                v = self.state[w].setdefault("momentum", torch.zeros_like(w))
                v.mul_(group["momentum"]).add_(g, alpha=inside)
                w.sub_(v, alpha=outside)


@torch.no_grad()
def embed(network: Callable, split: Images, config: RunConfig, index: Tensor | None = None) -> Tensor:
    """Features (N, d) of a split's central views, or of its images `index`, by a `network` in eval mode."""
    (rank, world), index = share(), torch.arange(len(split)) if index is None else index
    mine = index[(torch.arange(-(-len(index) // world)) * world + rank) % len(index)]  # equally many in each process
    mine = mine.split(min(512, 2 * (config.micro_batch_size or max(8, config.batch_size // world))))  # a step's memory
    views = split.views(mine, [(config.image_size, None)], workers=config.workers)
    return gather(torch.cat([network(images.normalize(x)).float() for (x,) in views]))[: len(index)]


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, temperature: float = 0.1) -> float:
    """Top-1 of queries (M, d), `labels` (M,), by weighted kNN in a bank (N, d) (Wu et al. 2018, arXiv:1805.01978)."""
    bank, queries, bank_labels = F.normalize(bank, dim=1), F.normalize(queries, dim=1), bank_labels.to(bank.device)
    right, k = 0, max(1, min(200, len(bank) // len(bank_labels.unique())))  # a class's mean size, 200 at most
    for rows, truth in zip(queries.split(1024), labels.to(bank.device).split(1024), strict=True):
        cosine, near = (rows @ bank.T).topk(k)  # (m, k) each
        votes = torch.zeros(len(rows), int(bank_labels.max()) + 1, device=bank.device)
        votes.scatter_add_(1, bank_labels[near], ((cosine - 1) / temperature).exp())
        right += (votes.argmax(1) == truth).sum().item()
    return right / len(queries)


def health(z: Tensor) -> tuple[float, float, float]:
    """Of z (N, d), scaled to length 1: mean std of a channel, effective rank (Roy, Vetterli 2007), mean cosine^2."""
    z, n = F.normalize(z.cpu().double(), dim=1), len(z)  # squared, a float32 would lose the small singular values
    squares = torch.linalg.eigvalsh(z.T @ z if z.shape[1] < n else z @ z.T).clamp(min=0)
    part = squares.sqrt() / squares.sqrt().sum().clamp(min=1e-12)
    cos2 = (squares.square().sum() - n) / max(1, n * (n - 1)) if z.any() else 1.0  # a row with itself adds n
    return float(z.std(0, correction=0).mean()), float(torch.special.entr(part).sum().exp()), float(cos2)


def new_folder(out: str, again: bool = False) -> str:
    """Make and return `out`, or `out-2`, `out-3`, ... if a run is there. With `again` the run goes on in `out`."""
    for number in range(1, sys.maxsize):
        name = str(Path(out)) + f"-{number}" * (number > 1)
        with explain(f"{'--resume' if again else '--out'} {name}", "give another folder"):
            Path(name).mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                Path(name, "config.json").touch(exist_ok=again)
                return name


def save_whole(content: Any, path: Path) -> None:
    """Write bytes, or a state by torch.save. `path` is whole at any moment: it is written aside, then renamed."""
    part, whole = path.with_name(f"{path.name}.part"), io.BytesIO()  # into a file, torch.save would hide why it fails
    whole.write(content) if isinstance(content, bytes) else torch.save(content, whole)
    with explain(f"{path} cannot be written", "what was there before is whole", RunFailure), ExitStack() as after:
        after.callback(part.unlink, missing_ok=True)  # half a file would keep a full disk full
        part.write_bytes(whole.getbuffer())
        os.replace(part, path)


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
        fresh = replace(config, init="random") if isinstance(config, RunConfig) else config
        model = getattr(method, kind)(fresh, *state.get("inputs", ()))
        model.load_state_dict(weights)
    config.span = state["span"]
    return config, model.eval()


class Run:
    """A run: `begin`, then a step for each of `batches`, ended by `log`, then `finish`. Resumed, it draws as if
    never stopped. `data`: `images.Data`, pictures, (pictures, labels), or None, which loads --data."""

    def __init__(self, config: RunConfig, data: Any = None) -> None:
        self.config = c = replace(config)  # a copy: `train` never changes what it was given
        self.device, (self.rank, self.world), c.out = pick_device(c.device), share(), c.resume or c.out
        if data is not None and not isinstance(data, Data):
            data = images.from_arrays(*(data if isinstance(data, tuple) else (data, None)), self.device)
        stored, c.data = stored_flags(type(c), c.resume), data.name if data else c.data
        for name in (name for name, was in stored.items() if was != getattr(c, name)):
            ensure(name in c.MAY_CHANGE, f"--resume: {dashed(name)} was {stored[name]}; leave it out")
            print(f"note: {dashed(name)} was {stored[name]}, now it is {getattr(c, name)}", flush=True)
        state = load_checkpoint(c.resume) if stored else {}
        c.span, self.kept = state.get("span"), state.get("parts", {})
        self.step, self.rows = state.get("step", 0), state.get("rows", [])
        self.loss_sum = torch.as_tensor(state.get("loss_sum", 0.0), device=self.device)
        self.data = data or images.load(c, self.device)
        c.data, c.span, labels = self.data.name, self.data.train.span, self.data.train.labels
        self.about = [len(labels), list(self.data.classes)]
        ensure(state.get("data", self.about) == self.about, f"--resume: --data {c.data} is not the set of that run")
        there, n, own, piece = len(labels), c.batch_size, c.batch_size // self.world, c.micro_batch_size
        ensure(n <= there, f"--batch-size {n}: there are {there:,} training images; give --batch-size {there} or less")
        ensure(n % self.world == 0, f"--batch-size {n}: give a multiple of {self.world}, the number of processes")
        ensure(own % min(own, piece or own) == 0, f"--micro-batch-size {piece}: give a divisor of {own}")
        bank = (labels >= min(0, labels.max())).nonzero().squeeze(1)  # labelled images, or all if no image has a label
        self.bank = bank[torch.linspace(0, len(bank) - 1, min(len(bank), 100_000)).long()]  # for kNN and neighbours
        self.steps, self.total, self.shared = there // n, there // n * c.epochs, torch.Generator()  # equal on all ranks
        self.signal, self.shown, self.clear = 0, -math.inf, "\r\x1b[K" * sys.stdout.isatty()  # empties a line
        torch.manual_seed(seed_of(c.seed))

    def loss(self, naive: Callable, across: bool = True) -> Callable:
        """`naive`, or the loss of its name in kernels/, as --loss-backend says. `across`: over all processes' rows."""
        asked, group = self.config.loss_backend, {"group": dist.group.WORLD} if across and self.world > 1 else {}
        if not group and (asked == "naive" or kernels is None and asked == "auto"):
            return naive
        ensure(kernels, f"--loss-backend {asked}: kernels/ is not beside common.py; copy it along")
        with explain(f"--loss-backend {asked}", "give auto"):
            kernels.resolve_backend(asked, self.device, torch.float32)
        return partial(getattr(kernels, naive.__name__), backend=asked, **group)

    def begin(self, model: nn.Module, guess: float = 0, sync_bn: bool = True, note: str = "", **parts: Any) -> Any:
        """Make the folder, print the header, return the network. `parts` are saved; `guess` is the loss of a guess."""
        c, self.model, self.guess, self.parts = self.config, model, guess, {"model": model, **parts}
        lr = parts["optimizer"].param_groups[0]["lr"]
        with explain(f"--resume {c.resume}", "start another run"):
            for name, (_, kept) in self.kept.items():
                self.parts[name].load_state_dict(kept)
        with explain("--tensorboard", "pip install tensorboard"):
            self.board = importlib.import_module("torch.utils.tensorboard").SummaryWriter if c.tensorboard else None
        names = [new_folder(c.out, again=bool(c.resume)) if self.rank == 0 else ""]
        if self.world > 1:
            dist.broadcast_object_list(names)
        c.out = names[0]
        self.save()
        given = [dashed(k, v) for k, v in asdict(c).items() if v != getattr(type(c), k) and k not in ("out", "resume")]
        bn = "; BN is each process's own" * (self.world > 1 and self.device.type != "cuda")
        words = f"{note and '; '}{note}" + f"; a guess has the loss {guess:.3f}" * bool(guess)
        print(f"{c.out}: {c.method()} on {self.world} x {self.device}{bn}; the paper's recipe with {' '.join(given)}")
        print(f"data: {self.data.describe()}\nnetwork: h {model.backbone.feature_dim}-d, output {model.dim}-d{words}")
        print(f"steps: {self.steps:,} an epoch, {self.total:,} in all, {self.step:,} done; peak lr {lr:g}", flush=True)
        if self.world > 1 and sync_bn and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for part in model.children() if c.compile else ():
            part.compile()
        network = Network(model, c, self.device)
        if self.world > 1:
            network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
            network.broadcast_buffers = False  # from now on: the constructor has sent rank 0's buffers to all
        return network

    def save(self) -> None:
        """Write config.json, log.csv, checkpoint.pt and backbone.pt; raise `RunFailure` if anything is not finite."""
        c, out, self.saved = self.config, Path(self.config.out), time.monotonic()
        bad = [k for k, v in (self.model.state_dict() | {"the loss": self.loss_sum}).items() if not v.isfinite().all()]
        if bad:
            raise RunFailure(f"{bad[0]} is not finite at step {self.step}; give a lower --lr; {out} has the last save")
        state = {"method": c.method(), "config": asdict(c) | {"resume": ""}, "span": c.span, "data": self.about}
        state |= {"step": self.step, "rows": self.rows, "loss_sum": self.loss_sum}
        state |= {"parts": {name: (type(part).__name__, part.state_dict()) for name, part in self.parts.items()}}
        lines = [",".join("" if value is None else f"{value:.6g}" for value in row.values()) for row in self.rows]
        if self.rank == 0:
            save_whole(json.dumps({"method": c.method()} | state["config"], indent=1).encode(), out / "config.json")
            save_whole("\n".join([",".join(COLUMNS), *lines, ""]).encode(), out / "log.csv")
            save_whole(state, out / "checkpoint.pt")
            save_whole(self.model.backbone.state_dict(), out / "backbone.pt")

    def batches(self, views: int = 0, scale: tuple[float, float] = (1.0, 1.0), crops: Sequence = ()) -> Iterator:
        """Yield for each step that is left the indices (n,) of this process's images and their views (n, 3, S, S):
        `views` random crops with a share of the area in the range `scale`, or the `crops` (see `Images.views`)."""
        c, n, crops = self.config, self.config.batch_size, crops or [(self.config.image_size, scale)] * views
        heard, usual = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")], {}
        with suppress(ValueError):  # only the main thread can set one; what nohup ignores stays
            usual = {s: signal.signal(s, self.on_signal) for s in heard if signal.getsignal(s) != signal.SIG_IGN}
        try:
            while self.step < self.total:
                self.model.train()
                epoch, done = divmod(self.step, self.steps)
                order = torch.randperm(len(self.data.train), generator=self.shared.manual_seed(seed_of(c.seed, epoch)))
                mine = order[: self.steps * n].view(-1, n)[done:, self.rank :: self.world]  # a row is a step
                arriving = self.data.train.views(mine, crops, (c.seed, epoch), c.workers)
                self.started = time.monotonic()
                for count, index in enumerate(mine, 1):
                    self.shared.manual_seed(seed_of(c.seed, self.step))
                    torch.manual_seed(seed_of(c.seed, self.step, self.rank))
                    yield index, next(arriving)
                    self.step += 1
                    self.between_steps(epoch + 1, count * n)
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def on_signal(self, number: int, _: Any) -> None:  # the first one stops the run after a step, another one at once
        if not self.signal:
            self.signal, self.asked = number, time.monotonic()
            with suppress(OSError):  # a closed terminal
                os.write(2, b"\nstopping after this step; again to stop now\n")
        elif time.monotonic() - self.asked > 1:  # a terminal and torchrun both send it
            raise KeyboardInterrupt("stopped at once", 128 + number)

    def log(self, loss: Tensor, z: Tensor, *views: Tensor) -> None:
        """Take the loss of a step, the output z (n, d) that enters it, and what the network was fed."""
        self.z, side = z.detach(), self.config.image_size * max(1, 96 // self.config.image_size)
        self.loss_sum += gather(loss.detach()[None]).mean(0)  # to read it now would wait for the device
        if self.step == 0 and self.rank == 0:  # views.png: a column is an image
            views = [F.interpolate(v[:8].float().cpu() * images.STD + images.MEAN, side) for v in views]
            path = Path(self.config.out, "views.png")
            torchvision.utils.save_image(torch.cat(views), path, nrow=len(views[0]), pad_value=1)

    def between_steps(self, epoch: int, count: int) -> None:
        """Print the progress (on a terminal each second, else each minute), measure, save and stop when it is time."""
        c, now, end = self.config, time.monotonic(), self.step % self.steps == 0
        look = now - self.shown > (1 if self.clear else 60)
        asked = [[self.signal, 0 < 60 * c.save_minutes < now - self.saved, look]]
        stop, save, look = gather(torch.tensor(asked)).amax(0).tolist()  # all processes do the same
        if not (end or stop or save or look):
            return
        loss, self.shown = self.loss_sum.item() / (self.step - (epoch - 1) * self.steps), time.monotonic()
        speed, finite = count / (self.shown - self.started), math.isfinite(loss)
        if end and finite:
            self.end_epoch(epoch, loss, speed)
        if end or stop or save or not finite:
            self.save()
        if stop:
            raise KeyboardInterrupt(f"stopped after step {self.step}; --resume {c.out} goes on", 128 + stop)
        if not end:
            whole, left = (steps * c.batch_size / speed / 60 for steps in (self.steps, self.total - self.step))
            words = f"loss {loss:.4f}  {speed:,.0f} images/s  {whole:.1f} min an epoch, {left:.1f} min left"
            print(f"{self.clear}step {self.step:,}/{self.total:,}  {words}", end="" if self.clear else "\n", flush=True)

    def end_epoch(self, epoch: int, loss: float, speed: float) -> None:
        """Measure h and the output, add a row to the log, print it, and say so if the output has collapsed."""
        c, z, lr = self.config, gather(self.z), self.parts["optimizer"].param_groups[0]["lr"]
        (std, effective, cos2), self.loss_sum = health(z), torch.zeros_like(self.loss_sum)
        due = c.knn_every and self.data.labelled and (epoch % c.knn_every == 0 or epoch == c.epochs)
        knn = self.knn(self.model.backbone) if due else None
        self.rows.append(dict(zip(COLUMNS, (epoch, loss, lr, std, effective, knn, speed), strict=True)))
        words = f"{self.clear}epoch {epoch:3}/{c.epochs}" + (f"  kNN {knn:.3f}" if due else "")
        words += f"  loss {loss:.4f}  std {std:.4f} (healthy {self.model.dim**-0.5:.4f})  rank {effective:.1f}"
        print(f"{words}  {speed:,.0f} images/s", flush=True)
        if cos2 > 0.98 and self.step >= 200 and len(z) >= 8:  # healthy runs reach 0.94
            print(f"warning: the output has collapsed: two images have a mean squared cosine of {cos2:.3f}", flush=True)
        if self.board and self.rank == 0:
            with self.board(Path(c.out, "tensorboard")) as board:
                for name in (name for name, value in self.rows[-1].items() if value is not None):
                    board.add_scalar(name, self.rows[-1][name], epoch)

    def knn(self, network: Callable) -> float:
        """kNN top-1 on the held-out images, by the bank of training images. Leaves the model in eval mode."""
        self.model.eval()
        keys = embed(network, self.data.train, self.config, self.bank)
        queries = embed(network, self.data.test, self.config)
        mean = keys.mean(0) if network is pixels else 0  # the mean picture says nothing
        return knn_accuracy(keys - mean, self.data.train.labels[self.bank], queries - mean, self.data.test.labels)

    def finish(self) -> dict[str, Any]:
        """Compare kNN with its controls, draw the pictures, say what comes next; return the figures."""
        c, test = self.config, self.data.test
        last = self.rows[-1] if self.rows else dict.fromkeys(COLUMNS) | {"epoch": 0}
        if c.knn_every and self.data.labelled:
            networks = {"h": self.model.backbone, "g(h)": self.model.embed, "raw pixels": pixels}
            torch.manual_seed(seed_of(c.seed))
            with suppress(InputError):  # the file of --init may have gone
                networks["h before training"] = type(self.model)(replace(c, resume="")).backbone.to(self.device).eval()
            knn = {name: self.knn(network) for name, network in networks.items()}
            knn["a guess"] = test.labels.bincount().max().item() / len(test)
            print(f"kNN top-1 on {len(test):,} held-out images:", ", ".join(f"{k} {v:.3f}" for k, v in knn.items()))
            if knn["h"] <= knn["raw pixels"]:
                print("warning: h is no better than raw pixels; train for 2,000 steps or more, or from --init imagenet")
            last = last | {f"knn {name}": value for name, value in knn.items()} | {"knn_top1": knn["h"]}
        if self.rows and 0 < 0.998 * self.guess <= last["loss"]:  # 0.2% is noise
            print(f"warning: the loss ended at {last['loss']:.3f}, no better than a guess's {self.guess:.3f}")
        self.draw()
        print(f"{c.out}: backbone.pt, neighbours.png, ...; next: python linear_eval.py {c.out}", flush=True)
        return last | {"out": c.out}

    def draw(self) -> None:
        """Draw curves.png, and neighbours.png: a row is a picture and its six nearest training pictures in h."""
        c, train, asked, backbone = self.config, self.data.train, self.data.test or self.data.train, self.model.backbone
        index = torch.linspace(0, len(asked) - 1, min(8, len(asked))).long()
        h, keys = embed(backbone.eval(), asked, c, index), embed(backbone, train, c, self.bank)
        cosine = (F.normalize(h, dim=1) @ F.normalize(keys, dim=1).T).cpu()
        cosine[(index[:, None] == self.bank) & (asked is train)] = -2  # a picture is not its own neighbour
        near = self.bank[cosine.topk(min(6, len(self.bank) - 1)).indices]  # (8, 6)
        if self.rank:
            return
        shown, crops = ((asked, index[:, None]), (train, near)), [(c.image_size, None)]
        tiles = [next(split.views([i.flatten()], crops, workers=0))[0].unflatten(0, i.shape) for split, i in shown]
        tiles = F.interpolate(torch.cat(tiles, 1).flatten(0, 1).cpu(), scale_factor=max(1, 112 // c.image_size))
        tiles = F.pad(tiles, (4, 4, 4, 4), value=-1)
        labels = torch.cat([split.labels[i] for split, i in shown], 1)  # (8, 7)
        colour = torch.where(labels[:, :1] < 0, 2, (labels == labels[:, :1]).long()).flatten()
        colour = torch.tensor([[1.0, 0, 0], [0, 0.8, 0], [1, 1, 1]])[colour]  # of another class, of the same, unknown
        tiles = torch.where(tiles < 0, colour[..., None, None], tiles)
        torchvision.utils.save_image(tiles, Path(c.out, "neighbours.png"), nrow=labels.shape[1], pad_value=1)
        if not importlib.util.find_spec("matplotlib"):
            return print("no curves.png: matplotlib is not installed (pip install matplotlib)")
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(20, 3), layout="constrained")
        for axes, name in zip(figure.subplots(1, 6), COLUMNS[1:], strict=True):
            axes.plot([row["epoch"] for row in self.rows], [row[name] for row in self.rows], marker=".")
            axes.set(title=name, xlabel="epoch")
        figure.savefig(Path(c.out, "curves.png"), dpi=110)
