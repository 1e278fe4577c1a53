"""CEBRA: Learnable latent embeddings for joint behavioural and neural analysis.

Schneider, Lee, Mathis, Nature 2023, https://arxiv.org/abs/2204.00673

CEBRA is SimCLR's idea on a time series. s_t is the activity of n neurons around time t, and c_t is the behaviour at t.
A step draws N times t, a positive t+ for each t, and N negatives t_j that all t share. The negatives are uniform over
the times that t can have. (With positives by time, t + offset has to be in the recording.)

    x = f(s_t)    y+ = f(s_t+)    y_j = f(s_tj)
    psi(x, y) = x . y / tau, or -|x - y|^2 / tau, where |x| = |y| = 1; the second works at any length, too
    L = mean over t of [ -psi(x, y+) + log sum over j of exp psi(x, y_j) ]         (Methods, generalised InfoNCE)

    --mode        t+, the positive of t
    time          t + offset
    behavior      the time whose c is nearest to c_t + (c_(t'+offset) - c_t'), the change at a uniform time t'
                  (with labels, t+ has the label of t; with labels alone, t+ is any time that has the label of t)
    hybrid        one positive of each kind; L is the mean of their two losses

    paper                      here                        flag
    f                          model.backbone              --encoder, --hidden-dim, --embedding-dim
    s_t, c_t                   spikes, behavior, labels    --data
    psi, tau                   info_nce                    --similarity, --sphere, --temperature, --learn-temperature
    q, p                       Sampler                     --negatives, --mode

    python cebra.py                                        the demo: a rat on a track, two CPU cores
    python cebra.py --data FILE.npz --mode time --embedding-dim 8

FILE.npz needs `spikes`; the modes behavior and hybrid also need `behavior`, `labels` or both. The demo decodes the
rat's position on 160 cm of track. The median error is 2.5 to 2.7 cm from z, 7.2 cm from PCA with as many dimensions,
and 53 cm for a guess (five seeds; EPYC).

The authors' code differs in two ways. With labels, it draws t and t_j balanced over the labels. In hybrid mode, it adds
the two losses, and its loss for behaviour sees only the first three dimensions of z.
"""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import Flags
from images import InputError, ensure, explain, seed_of
from recordings import Recording, as_array, compare, load, pad, picture

DEMO = dict(epochs=20, lr=0.01, temperature=0.2)  # ours: 740 steps, a minute on two CPU cores


@dataclasses.dataclass(kw_only=True)
class Config(Flags):
    """CEBRA's flags. The defaults are the authors' for the rat's hippocampus (Methods; their demo notebooks)."""

    PRESETS = {"paper": {}, "demo": DEMO}
    PRESET_OF = {"track": "demo"}

    data: str = "track"  # track (a simulated rat), or an .npz file of spikes (T, n), behavior (T, k), labels (T,)
    mode: Literal["time", "behavior", "hybrid"] = "behavior"  # what makes a positive: time, behaviour, or one of each
    time_offset: int = 10  # samples from a time to its positive; for behavior, from the start to the end of a change
    negatives: Literal["uniform", "label"] = "uniform"  # uniform: any time; label: all times of a step share one label
    shuffle: bool = False  # a control: train with behaviour and labels shuffled; decoding keeps their true order
    encoder: Literal["conv", "mlp"] = "conv"  # conv sees 10 samples (offset10-model), mlp sees 1 (offset1-model)
    hidden_dim: int = 32  # width of the hidden layers (the authors' notebooks)
    embedding_dim: int = 3  # d, the width of an embedding z (the paper: 3 to 32)
    similarity: Literal["cosine", "euclidean"] = "cosine"  # the cosine, or minus the squared distance
    sphere: bool = True  # scale z to length 1; euclidean may do without (the authors' models *-mse)
    temperature: float = 1.0  # tau, or where a learnt tau starts (the package's default; a notebook for time: 1.12)
    learn_temperature: bool = False  # train the temperature, too, by its logarithm
    min_temperature: float = 0.1  # a learnt temperature stays at or above this (the package's default)
    epochs: int = 667  # passes over the training samples; 667 are 10,000 steps on the paper's rat; 0: no training
    batch_size: int = 512  # time points in a step, N, and as many negatives
    lr: float = 3e-4  # Adam's learning rate, constant
    loss_backend: Literal["auto", "triton", "blocked", "naive"] = "auto"  # naive: this file's loss; others: kernels/
    seed: int = 0  # seed of the weights and of the times drawn; the track has a fixed seed of its own
    device: str = "auto"  # any torch device; auto is cuda where there is a GPU, else cpu
    out: str = "runs/cebra"  # folder of the run; if it holds a run, a new one beside it, such as runs/cebra-2

    def check(self) -> None:
        self.need("time_offset > 0", "hidden_dim > 1", "embedding_dim > 0", "batch_size > 0", "lr > 0")
        self.need("temperature > 0", "min_temperature > 0", "temperature >= min_temperature or not learn_temperature")
        self.need("embedding_dim > 1 or not sphere")  # the sphere in one dimension is two points
        self.need("sphere or similarity == 'euclidean'")
        self.need("loss_backend in ('auto', 'naive') or similarity == 'cosine'")
        used = self.learn_temperature or self.min_temperature == Config.min_temperature
        ensure(used, "--min-temperature: needs --learn-temperature; else leave it out")
        ensure(not self.shuffle or self.mode != "time", "--shuffle: --mode time uses no behavior; leave it out")


class Groups:
    """The times 0 to T - 1, each in the group that `group` (T,) names."""

    def __init__(self, group: Tensor) -> None:
        self.order, self.count = group.argsort(), group.bincount()
        self.first = self.count.cumsum(0) - self.count

    def draw(self, g: Tensor) -> Tensor:
        """One time, drawn uniformly, from each of the groups g (N,)."""
        return self.order[self.first[g] + (torch.rand(len(g), dtype=torch.float64) * self.count[g]).long()]


class Sampler:
    """Draws the times of a step. `draw(n)` returns t, the negatives t_j, and the positives t+ of each loss, (n,) each.
    Raises `InputError` if the recording lacks what the config asks for."""

    def __init__(self, config: Config, recording: Recording) -> None:
        (spikes, behavior, labels, _), self.mode, self.offset = recording, config.mode, config.time_offset
        samples, several = len(spikes), labels is not None and bool((labels != labels[0]).any())
        changes = behavior is not None and bool((behavior != behavior[0]).any())
        uniform, by_time = config.negatives == "uniform", config.mode == "time"
        ensure(self.offset < samples, f"--time-offset {self.offset}: there are {samples} samples; give less")
        ensure(by_time or several or changes, f"--mode {self.mode}: behavior and labels never change; give time")
        ensure(uniform or several, "--negatives label: there are no two labels; give uniform")
        ensure(uniform or by_time or changes, "--negatives label: needs behavior that changes; give uniform")

        label = torch.zeros(samples, dtype=torch.long) if labels is None else labels
        behavior = torch.zeros(samples, 0, dtype=torch.float64) if behavior is None else behavior
        if config.shuffle:
            order = torch.randperm(samples)
            label, behavior = label[order], behavior[order]
        self.pool = torch.zeros_like(label) if uniform else label
        self.last = samples - self.offset * (self.mode != "behavior")  # times from here on have no positive by time
        self.times = Groups(self.pool[: self.last])  # the times that t and t_j can have
        if by_time:
            return
        far = 1 + 4 * (behavior.amax(0) - behavior.amin(0)).norm()  # above any change, so the same label is nearer
        context = torch.cat([far * label[:, None], behavior], 1)  # (T, 1 + k)
        self.contexts, self.context_of = context.unique(dim=0, return_inverse=True)  # sorted
        self.alike = Groups(self.context_of)
        self.change = context[self.offset :] - context[: -self.offset]  # (T - offset, 1 + k)
        self.change[:, 0] = 0  # a change never leads to another label

    def draw(self, n: int) -> list[Tensor]:
        g = self.pool[torch.randint(self.last, (1,))].expand(n)  # a label is drawn as often as it occurs
        t = self.times.draw(g)
        by_behavior = [self.by_behavior(t)] if self.mode != "time" else []
        by_time = [t + self.offset] if self.mode != "behavior" else []
        return [t, self.times.draw(g), *by_behavior, *by_time]

    def by_behavior(self, t: Tensor) -> Tensor:
        wanted = self.contexts[self.context_of[t]] + self.change[torch.randint(len(self.change), t.shape)]
        return self.alike.draw(self.nearest(wanted))

    def nearest(self, wanted: Tensor) -> Tensor:
        """For each wanted context (N, 1 + k), the index (N,) of the nearest context that occurs."""
        if wanted.shape[1] > 2:
            exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
            return torch.cat([torch.cdist(w, self.contexts, **exact).argmin(1) for w in wanted.split(64)])
        key, wanted = self.contexts.sum(1), wanted.sum(1)  # one column of behaviour: a line, labels far apart
        right = torch.searchsorted(key, wanted).clamp(1, len(key) - 1)
        return right - (wanted - key[right - 1] < key[right] - wanted).long()


class Conv(nn.Module):
    """A convolution over time, (N, L, n) to (N, L - width + 1, m), as one product: nn.Conv1d takes twice the time."""

    def __init__(self, n: int, m: int, width: int) -> None:
        super().__init__()
        self.product, self.width = nn.Linear(width * n, m), width

    def forward(self, s: Tensor) -> Tensor:
        length = s.shape[1] - self.width + 1
        return self.product(torch.cat([s[:, i : i + length] for i in range(self.width)], 2))


class Skip(Conv):
    """x + GELU(conv(x)), shorter than x by width - 1 samples; the width is 3."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:-1] + F.gelu(super().forward(x))


class CEBRA(nn.Module):
    """The encoder f, and tau. Each z (d,) sees `field` samples: 10, or 1 for the mlp. `model(s)` is z (N, L + 1 -
    field, d) of spikes (N, L, n). `model.embed(spikes)` is z (T, d) of a recording (T, n), or raises `InputError`."""

    def __init__(self, config: Config, neurons: int) -> None:
        super().__init__()
        h, d = config.hidden_dim, config.embedding_dim
        if config.encoder == "conv":
            skips = [Skip(h, h, 3) for _ in range(3)]
            layers = [Conv(neurons, h, 2), nn.GELU(), *skips, Conv(h, d, 3)]
        else:
            layers = [nn.Linear(neurons, h), nn.GELU(), nn.Linear(h, h), nn.GELU()]
            layers += [nn.Linear(h, h // 2), nn.GELU(), nn.Linear(h // 2, d)]
        self.neurons = neurons
        self.backbone, self.field = nn.Sequential(*layers), 10 if config.encoder == "conv" else 1
        self.sphere, self.cosine = config.sphere, config.similarity == "cosine"
        self.most = 1 / config.min_temperature
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)), config.learn_temperature)

    @property
    def temperature(self) -> Tensor:
        scale = self.log_scale.exp()
        return 1 / (scale.clamp(max=self.most) if self.log_scale.requires_grad else scale)

    def forward(self, s: Tensor) -> Tensor:
        z = self.backbone(s)
        return F.normalize(z, dim=2) if self.sphere else z

    @torch.no_grad()
    def embed(self, spikes: Any) -> Tensor:
        spikes, piece = torch.as_tensor(as_array(spikes, "spikes", "embed")).to(self.log_scale), 4096
        ensure(spikes.shape[1] == self.neurons, f"embed: spikes must be (T, {self.neurons}), got {tuple(spikes.shape)}")
        s = pad(spikes, self.field)[None]
        return torch.cat([self(s[:, i : i + piece + self.field - 1])[0] for i in range(0, len(spikes), piece)])


def info_nce(z: Tensor, positive: Tensor, negatives: Tensor, tau: float | Tensor, cosine: bool = True) -> Tensor:
    """Mean over t of -psi(x, y+) + log sum over j of exp psi(x, y_j). The sum leaves the positive out.

    z, positive: (N, d); negatives: (M, d); `cosine` needs unit length. This naive loss builds the N x M matrix.
    """
    if cosine:
        s_pos, s_neg = (z * positive).sum(1), z @ negatives.T  # (N,), (N, M)
    else:
        s_pos = -(z - positive).square().sum(1)
        s_neg = 2 * z @ negatives.T - z.square().sum(1, keepdim=True) - negatives.square().sum(1)
    return ((s_neg / tau).logsumexp(1) - s_pos / tau).mean()


def loss_of(model: CEBRA, s: Tensor, drawn: list[Tensor], backend: str) -> Tensor:
    """The loss at the times that a `Sampler` has drawn; s holds the padded spikes. In hybrid mode, the mean of two."""
    around = torch.cat(drawn)[:, None] + torch.arange(model.field)  # (3 N, field), or (4 N, field)
    windows = s.index_select(0, around.flatten().to(s.device)).view(*around.shape, -1)
    z, negatives, *positives = model(windows).squeeze(1).chunk(len(drawn))  # (N, d) each
    tau = model.temperature
    if backend == "naive":
        each = [info_nce(z, positive, negatives, tau, model.cosine) for positive in positives]
    else:  # without the N x N matrix
        lse = common.kernels.cosine_logsumexp(z, negatives, temperature=tau, backend=backend)
        each = [(lse - (z * positive).sum(1) / tau).mean() for positive in positives]
    return sum(each) / len(each)


def backend_of(config: Config, device: torch.device) -> str:
    """What computes the loss: "naive" is `info_nce` of this file, and another name is a backend of kernels/."""
    asked = config.loss_backend
    if asked == "naive" or config.similarity == "euclidean" or (asked == "auto" and common.kernels is None):
        return "naive"
    ensure(common.kernels, f"--loss-backend {asked}: the folder kernels/ is not beside common.py; give naive")
    with explain(f"--loss-backend {asked}", "give auto"):
        return common.kernels.resolve_backend(asked, device, torch.float32)


def train(config: Config, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train on `config.data`, or on `data`, a dictionary of arrays. Returns the last metrics; "out" is the folder."""
    ensure(os.environ.get("WORLD_SIZE", "1") == "1", "torchrun: cebra.py runs as one process; give python cebra.py")
    config = dataclasses.replace(config, data=config.data if data is None else "arrays")
    device, recording = common.pick_device(config.device), load(config.data if data is None else data)
    first, n = recording.split()[0], config.batch_size
    torch.manual_seed(seed_of(config.seed))
    sampler, model = Sampler(config, first), CEBRA(config, first.spikes.shape[1]).to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    backend, steps, guess = backend_of(config, device), max(1, len(first.spikes) // n), math.log(n)
    flags = [f"{common.dashed(k)} {v}" for k, v in dataclasses.asdict(config).items() if v != getattr(Config, k)]
    config.out, rows = str(common.new_folder(config.out)), []
    save(config, model, rows)

    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{config.out}: cebra; the paper's recipe with {' '.join(flags) or 'no changes'}")
    print(f"data      {config.data}: {recording.describe()}; training uses the first {len(first.spikes):,} samples")
    print(f"steps     {steps:,} of batch size {n} an epoch, {steps * config.epochs:,} in all, on {device}")
    print(f"network   {config.encoder}, {size:,} parameters, z {config.embedding_dim}-d; Adam, lr {config.lr:g}")
    print(f"loss      info_nce, {backend}; the loss of a guess log N = {guess:.3f}", flush=True)
    s = pad(first.spikes.to(device), model.field)
    for epoch in range(1, config.epochs + 1):
        started, total = time.monotonic(), torch.zeros((), device=device)
        for step in range((epoch - 1) * steps, epoch * steps):
            torch.manual_seed(seed_of(config.seed, step))
            loss = loss_of(model, s, sampler.draw(n), backend)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        mean, tau, speed = total.item() / steps, model.temperature.item(), steps * n / (time.monotonic() - started)
        rows.append((epoch, mean, (guess - mean) / math.log(2), tau, speed))
        if epoch % max(1, config.epochs // 10) == 0 or epoch == config.epochs or not math.isfinite(mean):
            save(config, model, rows)
            told = f"epoch {epoch:3d}/{config.epochs}  {speed:,.0f} samples/s  loss {mean:.4f}  tau {tau:.3f}"
            print(told, flush=True)
    return finish(config, recording, model, backend, rows)


def save(config: Config, model: CEBRA, rows: list[tuple]) -> None:
    """Write checkpoint.pt for `common.load_run`, config.json, log.csv; raise `RunFailure` if a number is not finite."""
    out, weights = Path(config.out), model.state_dict()
    if not all(math.isfinite(row[1]) for row in rows) or not all(x.isfinite().all() for x in weights.values()):
        kept = f"give a smaller --lr; {out} keeps the last good checkpoint"
        raise common.RunFailure(f"epoch {len(rows)}: the loss or a weight is not finite; {kept}")
    about = {"method": "cebra", "config": dataclasses.asdict(config), "span": None, "inputs": [model.neurons]}
    common.save_whole(about | {"parts": {"model": ("CEBRA", weights)}, "rows": rows}, out / "checkpoint.pt")
    common.save_whole(json.dumps({"method": "cebra"} | about["config"], indent=1).encode(), out / "config.json")
    lines = ["epoch,loss,goodness_of_fit,temperature,samples_per_second"]
    lines += [",".join(f"{v:.6g}" for v in row) for row in rows]
    common.save_whole("\n".join([*lines, ""]).encode(), out / "log.csv")


def finish(config: Config, recording: Recording, model: CEBRA, backend: str, rows: list[tuple]) -> dict[str, Any]:
    """Measure the loss and the decoding on the held-out samples; write embedding.npz and embedding.png."""
    n, out, parts, guess = config.batch_size, Path(config.out), recording.split(), math.log(config.batch_size)
    last, metrics = parts[2], {"loss": rows[-1][1], "goodness of fit": rows[-1][2]} if rows else {}
    try:
        sampler, s = Sampler(config, last), pad(last.spikes.to(model.log_scale.device), model.field)
        with torch.no_grad():
            mean = sum(loss_of(model, s, sampler.draw(n), backend).item() for _ in range(50)) / 50
        metrics["goodness of fit, held out"] = (guess - mean) / math.log(2)
    except InputError as error:  # the last samples may be too few, or have one label only
        print(f"note: no goodness of fit on the last {len(last.spikes)} samples: {error}")
    fits = {name: value for name, value in metrics.items() if name != "loss"}
    for name, value in fits.items():
        print(f"{name}: {value:.2f} bits (log2 N - loss)")
    if rows and min(fits.values()) < 0.002 * math.log2(n):  # less is noise
        print(f"warning: {min(fits.values()):.2f} bits is no better than a guess, whose loss is log N = {guess:.3f}")
    metrics |= compare([model.embed(part.spikes).cpu() for part in parts], parts, model.field)
    z = model.embed(recording.spikes).cpu()
    common.save_whole(recording.archive(z), out / "embedding.npz")
    picture(z, recording, out / "embedding.png")
    print(f"{out}: checkpoint.pt, embedding.npz, log.csv, ...", flush=True)
    return metrics | {"out": config.out}


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse_args(Config))
