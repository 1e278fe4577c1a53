"""CEBRA: Learnable latent embeddings for joint behavioural and neural analysis.

Schneider, Lee, Mathis, Nature 2023, https://arxiv.org/abs/2204.00673

SimCLR's idea on a time series. s_t is the activity of n neurons around time t, c_t the behaviour. Of each of N times t
one positive t+ is drawn, and for all of them N negatives t_j, uniform in time:

    x = f(s_t)    y+ = f(s_t+)    y_j = f(s_tj)    psi(x, y) = x . y / tau, of unit vectors; or -|x - y|^2 / tau
    L = mean over t of [ -psi(x, y+) + log sum over j of exp psi(x, y_j) ]         (Methods, generalised InfoNCE)

    --mode        t+, the positive of t
    time          t + offset
    behavior      the time at which c is nearest to c_t + c_(t'+offset) - c_t', t' uniform: a change that happens
                  (of the same label, if there are labels; of labels alone: any time of the same label)
    hybrid        one of each: the mean of the two losses

    paper                      here                        flag
    f                          model.backbone              --encoder, --hidden-dim, --embedding-dim
    s_t, c_t                   spikes, behavior, labels    --data
    psi, tau                   info_nce                    --similarity, --temperature, --learn-temperature
    q, of the negatives        Sampler                     --negatives

    python cebra.py                                        the demo: a rat on a track, two CPU cores
    python cebra.py --data FILE.npz --mode time --embedding-dim 8

FILE.npz holds `spikes` (T, n), and `behavior` (T, k), `labels` (T,) or both.

The demo's z errs by 2.5 to 2.7 cm of 160, PCA of as many dimensions by 7.2, a guess by 53 (five seeds; EPYC).

Not as in the authors' code: hybrid's losses are averaged, and both of the whole z (theirs: added, behaviour's of its
first three dimensions); t and t_j are uniform in time also with behaviour and labels (theirs: balanced over labels).
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import Flags, InputError, ensure
from recordings import Recording, compare, load, pad, picture

try:
    import kernels
except ModuleNotFoundError as error:  # the folder was not copied along: the naive loss below runs
    if error.name != "kernels":
        raise
    kernels = None

DEMO = {"epochs": 20, "lr": 0.01, "temperature": 0.2}  # ours: 740 steps, a minute on two CPU cores


@dataclass(kw_only=True)
class Config(Flags):
    """CEBRA's flags. The defaults are the authors' for the rat's hippocampus (Methods; their demo notebooks)."""

    PRESETS = {"paper": {}, "demo": DEMO}
    embedded = "track"

    data: str = "track"  # track (a rat on a linear track, made on the spot), or an .npz of spikes, behavior, labels
    mode: Literal["time", "behavior", "hybrid"] = "behavior"  # what a positive shares: time, behaviour, or one of each
    time_offset: int = 10  # samples from t to its positive (time), and of a change of behaviour (behavior)
    negatives: Literal["uniform", "label"] = "uniform"  # in time; label: t and t_j of a step are all of one label
    shuffle: bool = False  # the control: t+ is drawn by behaviour and labels in another order; decoding is not
    encoder: Literal["conv", "mlp"] = "conv"  # of ten samples (the package's offset10-model), or of one (offset1-model)
    hidden_dim: int = 32  # width of the hidden layers (the notebooks)
    embedding_dim: int = 3  # d, width of z (3 to 32)
    similarity: Literal["cosine", "euclidean"] = "cosine"  # of z on the sphere, or anywhere: minus the squared distance
    temperature: float = 1.0  # tau (the package); where it starts, if learnt
    learn_temperature: bool = False  # train tau, by its logarithm, down to --min-temperature
    min_temperature: float = 0.1  # the least tau that is learnt (the package)
    epochs: int = 667  # of T / N steps (10,000 for the rat's 10,178 samples, of which 0.8 train)
    batch_size: int = 512  # N times, and as many negatives
    lr: float = 3e-4  # of Adam, constant
    loss_backend: Literal["auto", "triton", "blocked", "naive"] = "auto"  # naive: this file's; else that of kernels/
    seed: int = 0  # seed of the weights and of the times drawn; the track's own is fixed
    device: str = "auto"  # any torch device; auto = cuda where there is one, else cpu
    out: str = "runs/cebra"  # folder of the run's files

    def check(self) -> None:
        super().check()
        fits = self.embedding_dim > 1 or self.similarity == "euclidean"
        ensure(fits, "--embedding-dim 1: the sphere has two points then; give 2 or more")
        ensure(self.hidden_dim > 1, f"--hidden-dim {self.hidden_dim}: give 2 or more")
        floor = not self.learn_temperature or self.temperature >= self.min_temperature
        ensure(floor, f"--temperature {self.temperature}: must be at least --min-temperature {self.min_temperature}")
        fits = self.similarity == "cosine" or self.loss_backend in ("auto", "naive")
        ensure(fits, f"--loss-backend {self.loss_backend}: is for --similarity cosine; take naive")


class Groups:
    """Times by their group (T,). `draw(g)` is for each of the groups g (N,) one of its times, uniformly."""

    def __init__(self, group: Tensor) -> None:
        self.order, self.count = group.argsort(), group.bincount()
        self.first = self.count.cumsum(0) - self.count

    def draw(self, g: Tensor) -> Tensor:
        return self.order[self.first[g] + (torch.rand(len(g), dtype=torch.float64) * self.count[g]).long()]


class Sampler:
    """What is drawn for a step: `draw(n)` is t, the negatives t_j, and t+ of each loss, (n,) times each.

    Raises `InputError` where the recording has not what the mode asks for.
    """

    def __init__(self, config: Config, recording: Recording) -> None:
        (spikes, behavior, labels, _), self.mode, self.offset = recording, config.mode, config.time_offset
        samples, several = len(spikes), labels is not None and bool((labels != labels[0]).any())
        changes = behavior is not None and bool((behavior != behavior[0]).any())
        ensure(self.offset < samples, f"--time-offset {self.offset}: must be less than the {samples} samples there are")
        why = f"--mode {self.mode}: the {samples} samples have no behavior that changes, and no two labels; take time"
        ensure(self.mode == "time" or several or changes, why)
        ensure(not config.shuffle or self.mode != "time", "--shuffle: --mode time uses no behavior; leave it out")
        uniform = config.negatives == "uniform"
        ensure(uniform or several, f"--negatives label: the {samples} samples have no two labels; take uniform")
        why = "--negatives label: without behavior positives are of one label, too; take uniform"
        ensure(uniform or self.mode == "time" or changes, why)
        label = torch.zeros(samples, dtype=torch.long) if labels is None else labels
        behavior = torch.zeros(samples, 0, dtype=torch.float64) if behavior is None else behavior
        if config.shuffle:
            order = torch.randperm(samples)
            label, behavior = label[order], behavior[order]
        self.pool = label if config.negatives == "label" else torch.zeros_like(label)
        self.last = samples - self.offset * (self.mode != "behavior")  # later ones have no positive by time
        self.times, self.negatives = Groups(self.pool[: self.last]), Groups(self.pool)
        if self.mode == "time":
            return
        far = 1 + 4 * (behavior.amax(0) - behavior.amin(0)).norm()  # no change leads so far: the same label is nearer
        context = torch.cat([far * label[:, None], behavior], 1)  # (T, 1 + k)
        self.contexts, self.context_of = context.unique(dim=0, return_inverse=True)  # sorted
        self.alike = Groups(self.context_of)
        self.change = context[self.offset :] - context[: -self.offset]  # (T - offset, 1 + k)
        self.change[:, 0] = 0

    def draw(self, n: int) -> list[Tensor]:
        g = self.pool[torch.randint(self.last, (1,))].expand(n)
        t = self.times.draw(g)
        drawn = [t, self.negatives.draw(g)]
        if self.mode != "time":
            drawn.append(self.by_behavior(t))
        if self.mode != "behavior":
            drawn.append(t + self.offset)
        return drawn

    def by_behavior(self, t: Tensor) -> Tensor:
        wanted = self.contexts[self.context_of[t]] + self.change[torch.randint(len(self.change), t.shape)]
        return self.alike.draw(self.nearest(wanted))

    def nearest(self, wanted: Tensor) -> Tensor:
        """The context (N,) next to each of the wanted ones (N, 1 + k)."""
        if wanted.shape[1] > 2:
            exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
            return torch.cat([torch.cdist(w, self.contexts, **exact).argmin(1) for w in wanted.split(64)])
        key, wanted = self.contexts.sum(1), wanted.sum(1)
        right = torch.searchsorted(key, wanted).clamp(1, len(key) - 1)
        return right - (wanted - key[right - 1] < key[right] - wanted).long()


class Conv(nn.Module):
    """A convolution over time, (N, L, n) to (N, L - width + 1, m), as one product: nn.Conv1d took twice the time."""

    def __init__(self, n: int, m: int, width: int) -> None:
        super().__init__()
        self.product, self.width = nn.Linear(width * n, m), width

    def forward(self, s: Tensor) -> Tensor:
        length = s.shape[1] - self.width + 1
        return self.product(torch.cat([s[:, i : i + length] for i in range(self.width)], 2))


class Skip(nn.Module):
    """x + GELU(conv(x)); two samples shorter than x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:-1] + F.gelu(self.conv(x))


class CEBRA(nn.Module):
    """f and tau. `model(s)` of spikes (N, L, n) is z (N, L - `field` + 1, d), of the `field` samples around each time;
    `model.embed(spikes)` of a recording (T, n) is z (T, d)."""

    def __init__(self, config: Config, neurons: int) -> None:
        super().__init__()
        h, d = config.hidden_dim, config.embedding_dim
        if config.encoder == "conv":
            skips = [Skip(h) for _ in range(3)]
            layers = [Conv(neurons, h, 2), nn.GELU(), *skips, Conv(h, d, 3)]
        else:
            layers = [nn.Linear(neurons, h), nn.GELU(), nn.Linear(h, h), nn.GELU()]
            layers += [nn.Linear(h, h // 2), nn.GELU(), nn.Linear(h // 2, d)]
        self.neurons = neurons
        self.backbone, self.field = nn.Sequential(*layers), 10 if config.encoder == "conv" else 1
        self.sphere, self.most = config.similarity == "cosine", 1 / config.min_temperature
        log_scale = torch.tensor(-math.log(config.temperature))
        self.log_scale = nn.Parameter(log_scale, requires_grad=config.learn_temperature)

    @property
    def temperature(self) -> Tensor:
        scale = self.log_scale.exp()
        return 1 / (scale.clamp(max=self.most) if self.log_scale.requires_grad else scale)

    def forward(self, s: Tensor) -> Tensor:
        z = self.backbone(s)
        return F.normalize(z, dim=2) if self.sphere else z

    @torch.no_grad()
    def embed(self, spikes: Tensor | np.ndarray) -> Tensor:
        spikes, piece = torch.as_tensor(spikes, dtype=self.log_scale.dtype, device=self.log_scale.device), 4096
        s = pad(spikes, self.field)[None]
        pieces = [self(s[:, i : i + piece + self.field - 1])[0] for i in range(0, len(spikes), piece)]
        return torch.cat(pieces)


def info_nce(
    z: Tensor, positive: Tensor, negatives: Tensor, temperature: float | Tensor = 1.0, similarity: str = "cosine"
) -> Tensor:
    """Mean over t of -psi(x, y+) + log sum over j of exp psi(x, y_j); the positive is not in the sum.

    z, positive: (N, d), negatives: (M, d), of length 1 if cosine. The naive loss: it builds the N x M matrix.
    """
    if similarity == "cosine":
        s_pos, s_neg = (z * positive).sum(1), z @ negatives.T  # (N,), (N, M)
    else:
        s_pos = -(z - positive).square().sum(1)
        s_neg = 2 * z @ negatives.T - z.square().sum(1, keepdim=True) - negatives.square().sum(1)
    return ((s_neg / temperature).logsumexp(1) - s_pos / temperature).mean()


def loss_of(model: CEBRA, s: Tensor, drawn: list[Tensor], config: Config, backend: str) -> Tensor:
    """The loss at the times that a `Sampler` has drawn, s being the padded spikes; of hybrid, the mean of its two."""
    around = torch.cat(drawn)[:, None] + torch.arange(model.field)  # (3 N, field), or (4 N, field)
    windows = s.index_select(0, around.flatten().to(s.device)).view(*around.shape, -1)
    z, negatives, *positives = model(windows).squeeze(1).chunk(len(drawn))  # (N, d) each
    tau = model.temperature
    if backend == "naive":
        each = [info_nce(z, positive, negatives, tau, config.similarity) for positive in positives]
    else:
        lse = kernels.cosine_logsumexp(z, negatives, temperature=tau, backend=backend)  # without the N x N matrix
        each = [(lse - (z * positive).sum(1) / tau).mean() for positive in positives]
    return sum(each) / len(each)


def train(config: Config, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data`, a dictionary of arrays; write to `config.out`, return the final metrics."""
    ensure(not common.several(), "cebra.py runs as one process; start it without torchrun")
    floor = config.learn_temperature or "min_temperature" not in config.given
    ensure(floor, "--min-temperature: needs --learn-temperature; else leave it out")
    device, n, out = common.pick_device(config.device), config.batch_size, Path(config.out)
    recording = load(config.data if data is None else data)
    config.data = config.data if data is None else "arrays"
    first, _, last = parts = recording.split()
    samples, neurons = first.spikes.shape
    torch.manual_seed(config.seed)
    sampler, model = Sampler(config, first), CEBRA(config, neurons).to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    backend = "naive" if config.similarity == "euclidean" else common.loss_backend(kernels, config, n, n, device)
    steps, size, chance, rows = max(1, samples // n), sum(p.numel() for p in model.parameters()), math.log(n), []
    about = {
        "data": f"{config.data}: {recording.describe()}; the first {samples:,} samples train",
        "steps": f"{steps:,} of batch {n} an epoch, {steps * config.epochs:,} in all",
        "network": f"{config.encoder}, {size:,} parameters, z {config.embedding_dim}-d",
        "device": common.name_of(device),
        "optimizer": f"adam, lr {config.lr:g} (constant, not scaled by N)",
        "loss": f"info_nce, {backend}; mean over N = {n} times; of a guess log N = {chance:.3f}",
    }
    with common.make(out):
        common.keep_aside(out)
        for name in ("embedding.npz", "embedding.png"):  # of that run
            (out / name).unlink(missing_ok=True)
        common.say(config, about)
        if n > samples:
            print(f"note: --batch-size {n}: there are {samples} samples, so that times come more than once in a step")
        s = pad(first.spikes.to(device), model.field)
        for epoch in range(1, config.epochs + 1):
            started, total = time.monotonic(), torch.zeros((), device=device)
            for _ in range(steps):
                loss = loss_of(model, s, sampler.draw(n), config, backend)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
            mean, tau = total.item() / steps, model.temperature.item()
            rows.append([epoch, mean, (chance - mean) / math.log(2), tau, steps * n / (time.monotonic() - started)])
            if epoch % max(1, config.epochs // 10) == 0 or not math.isfinite(mean):
                save(config, model, rows)
                told = f"{rows[-1][-1]:,.0f} samples/s  loss {mean:.4f}  tau {tau:.3f}"
                print(f"epoch {epoch:3d}/{config.epochs}  {told}", flush=True)
        save(config, model, rows)

        metrics = {"loss": rows[-1][1], "goodness of fit": rows[-1][2]} if rows else {}
        try:
            sampler, s = Sampler(config, last), pad(last.spikes.to(device), model.field)
            with torch.no_grad():
                mean = sum(loss_of(model, s, sampler.draw(n), config, backend).item() for _ in range(50)) / 50
            metrics["goodness of fit, held out"] = (chance - mean) / math.log(2)
        except InputError as error:  # of one label only, or short
            print(f"note: no goodness of fit on the last {len(last.spikes)} samples: {error}")
        for name in [name for name in metrics if name != "loss"]:
            print(f"{name}: {metrics[name]:.2f} bits (log2 N - loss)")
        metrics |= compare([model.embed(part.spikes).cpu() for part in parts], parts, model.field)
        z = model.embed(recording.spikes).cpu()
        common.save_whole(recording.archive(z), out / "embedding.npz")
        picture(z, recording, out / "embedding.png")
        print(f"{out}: checkpoint.pt, embedding.npz, log.csv, ...")
    return metrics


def save(config: Config, model: CEBRA, rows: list[list[float]]) -> None:
    """checkpoint.pt, for `common.load_run`; config.json; log.csv. Refuses what is not finite."""
    out, weights = Path(config.out), model.state_dict()
    if not all(math.isfinite(row[1]) for row in rows) or not all(torch.isfinite(x).all() for x in weights.values()):
        kept = f"the last good one is kept in {out}" if (out / "checkpoint.pt").exists() else "none was written yet"
        raise common.RunFailure(f"not finite in epoch {len(rows)}; --lr is likely too high; checkpoint: {kept}")
    saved = {"method": "cebra", "config": dataclasses.asdict(config), "inputs": [model.neurons], "progress": rows}
    saved |= {"parts": {"model": ("CEBRA", weights)}, "rng": torch.get_rng_state()}
    common.save_whole(saved, out / "checkpoint.pt")
    told = {"method": "cebra", "preset": config.recipe, "given": sorted(config.given)} | saved["config"]
    common.save_whole(json.dumps(told, indent=1) + "\n", out / "config.json")
    columns = "epoch,loss,goodness_of_fit,temperature,samples_per_second\n"
    common.save_whole(columns + "".join(",".join(f"{v:.6g}" for v in row) + "\n" for row in rows), out / "log.csv")


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
