"""Recordings of neurons and behaviour, which cebra.py trains on, and tests of how well z tells behaviour.

cebra.py needs this file beside it, and this file needs images.py.
"""

import importlib.util
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from images import ensure, explain

# the arrays that are read, with their shapes and dtypes
READ = {"spikes": ("(T, n)", np.float32), "behavior": ("(T, k)", np.float64), "labels": ("(T,)", None)}


class Recording(NamedTuple):
    """T samples at equal steps of time. A label is the index of its name in `values`."""

    spikes: Tensor  # (T, n) float32
    behavior: Tensor | None = None  # (T, k) float64
    labels: Tensor | None = None  # (T,) int64
    values: np.ndarray | None = None  # the labels' names, numbers or words

    def at(self, samples: slice) -> "Recording":
        return Recording(*(x if x is None else x[samples] for x in self[:3]), self.values)

    def split(self) -> tuple["Recording", "Recording", "Recording"]:
        """The first 0.8 train, the next 0.1 choose the k of the kNN, and the last 0.1 are held out."""
        a, b = int(0.8 * len(self.spikes)), int(0.9 * len(self.spikes))
        return self.at(slice(a)), self.at(slice(a, b)), self.at(slice(b, None))

    def archive(self, z: Tensor) -> bytes:
        """An .npz file of z (T, d), with behavior and labels as they were given."""
        labels = None if self.labels is None else self.values[self.labels]
        known, file = {"z": z, "behavior": self.behavior, "labels": labels}, io.BytesIO()
        np.savez(file, **{name: np.asarray(x) for name, x in known.items() if x is not None})
        return file.getvalue()

    def describe(self) -> str:
        return ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(READ, self, strict=False) if x is not None)


def make_track(seconds: float = 600, neurons: int = 120, rate: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """A rat that runs to and fro on a track of 1.6 m. behavior is its position in metres, and a label is its direction.
    The neurons are place cells, whose rate is a Gaussian of the position times a gain of the direction. Peak rates are
    lognormal, as in the hippocampus (Mizuseki, Buzsaki 2013). Spikes are Poisson counts. `rate`: samples a second."""
    draw, runs, samples = np.random.default_rng(seed), [], int(seconds * rate)
    while sum(map(len, runs)) < samples:
        steps = int(1.6 / draw.uniform(0.25, 0.6) * rate)  # a run's mean speed is 0.25 to 0.6 m/s
        way, back = 0.8 - 0.8 * np.cos(np.pi * np.arange(steps) / steps), len(runs) % 2
        runs.append(np.stack([1.6 - way if back else way, np.full(steps, back)], 1))
    position, direction = np.concatenate(runs)[:samples].T
    centre, width = draw.uniform(0, 1.6, neurons), draw.uniform(0.03, 0.08, neurons)  # m
    peak = np.minimum(draw.lognormal(np.log(4), 1, neurons), 40)  # Hz
    gain = draw.permuted(np.stack([np.ones(neurons), draw.uniform(0, 0.3, neurons)]), axis=0)  # (2, n)
    field = np.exp(-(((position[:, None] - centre) / width) ** 2) / 2)  # (T, n)
    hertz = 0.2 + peak * field * gain[direction.astype(int)]
    return {"spikes": draw.poisson(hertz / rate), "behavior": position[:, None], "labels": direction.astype(int)}


def as_array(given: Any, key: str, name: str) -> np.ndarray:
    """`given` as the array `key` of READ. It may be what NumPy or PyTorch reads; only labels may be words. Raises
    `InputError` for another shape, and for values that are masked or not finite. `name` begins the messages."""
    shape, kind = READ[key]
    what, kinds = ("numbers", "biuf") if kind else ("numbers or words", "biufUS")
    with explain(f"{name}: {key}", f"give {what} {shape}"):  # for example, rows of unequal length
        x = given = np.ma.array(given.detach().cpu() if isinstance(given, Tensor) else given)
        if x.dtype == object and len({isinstance(value, str) for value in x.data.flat}) == 1:
            x = np.array(x.data.tolist())  # pandas stores words, and its own whole numbers, as objects
    x = x[:, None] if key == "behavior" and x.ndim == 1 else x
    ensure(x.ndim == len(shape.split(", ")) and x.size, f"{name}: {key} must be {shape}, got {x.shape}")
    ensure(x.dtype.kind in kinds, f"{name}: {key} must be {what}, got {x.dtype}")
    x = np.asarray(x).astype(kind or x.dtype)
    finite = not np.ma.is_masked(given) and (x.dtype.kind != "f" or np.isfinite(x).all())
    ensure(finite, f"{name}: {key} has values that are masked or not finite; drop their samples")
    return x


def load(data: str | dict[str, Any]) -> Recording:
    """`track`, an .npz file, or a dictionary of arrays. Raises `InputError` for anything that is no recording."""
    name = "data" if isinstance(data, dict) else f"--data {data}"
    given = make_track() if data == "track" else data
    if not isinstance(given, dict):
        advice = "give track, or an .npz of plain arrays: np.savez(file, spikes=..., labels=words.astype(str))"
        whole = Path(data).is_file() and zipfile.is_zipfile(data)
        ensure(whole, f"{name}: no such file, or no .npz file; {advice}")
        with explain(name, advice), np.load(data, allow_pickle=False) as file:
            given = {key: file[key] if key in READ else None for key in file.files}
    ensure(given.get("spikes") is not None, f"{name}: has {', '.join(given) or 'nothing'}, but no spikes; give them")
    if rest := sorted(given.keys() - READ.keys()):
        print(f"note: {name}: {', '.join(rest)} left out; only {', '.join(READ)} are read")
    found = {key: as_array(given[key], key, name) for key in READ if given.get(key) is not None}
    (samples, neurons), turned = found["spikes"].shape, "; if time is the second axis, give spikes.T"
    ensure(samples >= 200, f"{name}: spikes (T, n) have only {samples} samples; give 200 or more{turned}")
    for key, x in found.items():
        ensure(len(x) == samples, f"{name}: {key} must be {READ[key][0]}, with the T of spikes, got {x.shape}{turned}")
    if neurons > samples:
        print(f"note: {name}: spikes (T, n) are {samples:,} samples of {neurons:,} neurons{turned}")
    mean, std = found["spikes"].mean(dtype=float), found["spikes"].std(dtype=float)
    if abs(mean) > 10 * std or not 0.01 < std < 100:
        print(f"note: {name}: spikes have mean {mean:.3g}, deviation {std:.3g}; bring them near 0 and 1 to learn well")
    ranges = np.ptp(found.get("behavior", np.ones((1, 1))), 0)
    if ranges.max() > 100 * ranges[ranges > 0].min(initial=np.inf):
        print(f"note: {name}: the ranges of behavior are {ranges.round(3).tolist()}; bring its columns to one scale")
    if "labels" in found:
        found["values"], found["labels"] = np.unique(found["labels"], return_inverse=True)
        ensure(2 * len(found["values"]) <= samples, f"{name}: labels have more than T/2 values; give fewer")
    return Recording(**{key: x if key == "values" else torch.from_numpy(x) for key, x in found.items()})


def pad(spikes: Tensor, field: int) -> Tensor:
    """Spikes (T, n) as (T + field - 1, n), the first and last row repeated; rows t to t + field - 1 surround time t."""
    return torch.cat([spikes[:1].expand(field // 2, -1), spikes, spikes[-1:].expand((field - 1) // 2, -1)])


def compare(z: list[Tensor], parts: tuple[Recording, ...], field: int) -> dict[str, float]:
    """`decode` from z, from PCA of as many dimensions, from the spikes and from a guess; z has (T, d) for each part.
    The table is printed, and returned under names such as "median error of z, 3-d". PCA and spikes come twice: of one
    sample, and of the sum of the `field` samples that the encoder sees."""
    d = z[0].shape[1]
    table = {f"z, {d}-d": z}
    for width in sorted({1, field}):
        of = f"{width} sample{'s' * (width > 1)}"
        counts = [pad(part.spikes, width).unfold(0, width, 1).sum(2) for part in parts]
        axes = torch.linalg.eigh(torch.cov(counts[0].T).view(counts[0].shape[1], -1)).eigenvectors[:, -d:]
        table |= {f"PCA of {of}, {axes.shape[1]}-d": [x @ axes for x in counts], f"spikes of {of}": counts}
    table["a guess"] = [torch.rand(len(part.spikes), 1) for part in parts]
    if parts[2].labels is not None and len(unseen := np.setdiff1d(parts[2].labels, parts[0].labels)):
        print(f"note: training has not seen label {parts[2].values[unseen].tolist()} of the held-out part")
    few = [slice(None, None, -(-len(x) // most)) for x, most in zip(z, (20_000, 5_000, 5_000), strict=True)]
    kept = [part.at(rows) for part, rows in zip(parts, few, strict=True)]
    if kept[2].behavior is not None:
        first, last = (kept[i].behavior.amax(0) - kept[i].behavior.amin(0) for i in (0, 2))
        if (still := last <= 1e-6 * torch.maximum(first, kept[2].behavior.abs().amax(0))).any():
            print(f"note: behavior column {still.nonzero()[:, 0].tolist()} left out: constant in the held-out part")
            kept = [p._replace(behavior=None if still.all() else p.behavior[:, ~still]) for p in kept]
    found = {name: decode([x[rows] for x, rows in zip(xs, few, strict=True)], kept) for name, xs in table.items()}
    if found["a guess"]:
        said = f"kNN, held out: the last {len(z[2]):,} samples"
        print(f"{said:44}" + "".join(f"{column:>14}" for column in found["a guess"]))
        for name, values in found.items():
            print(f"  {name:42}" + "".join(f"{value:14.3f}" for value in values.values()))
    return {f"{column} of {name}": value for name, values in found.items() for column, value in values.items()}


def decode(z: list[Tensor], parts: Sequence[Recording]) -> dict[str, float]:
    """kNN from z: the first part's samples (T, d) are the neighbours, and the last part is decoded. Returns the median
    absolute error and R2 of behavior, means over its columns, and the accuracy of labels. The middle part chooses k."""
    (bank, *queries), centre = z, z[0].mean(0)  # distances far from 0 would lose digits
    ks, (_, behavior, labels, _), errors, right = [k * k for k in range(1, 21) if k * k <= len(bank)], parts[0], [], []
    for part, q in zip(parts[1:], queries, strict=True):
        for rows in torch.arange(len(q)).split(256):
            near = torch.cdist(q[rows] - centre, bank - centre).topk(ks[-1], largest=False).indices
            if behavior is not None:
                means = torch.stack([behavior[near[:, :k]].mean(1) for k in ks])  # (ks, rows, columns)
                errors.append((means - part.behavior[rows]).abs())
            if labels is not None:
                right.append(torch.stack([labels[near[:, :k]].mode(1).values for k in ks]) == part.labels[rows])
    middle, found = len(queries[0]), {}
    if behavior is not None:
        errors, truth = torch.cat(errors, 1), parts[2].behavior
        best = errors[:, :middle].median(1).values.mean(1).argmin()
        error, spread = errors[best, middle:], (truth - truth.mean(0)).square().sum(0)
        found["median error"] = error.median(0).values.mean().item()
        found["R2"] = (1 - error.square().sum(0) / spread).mean().item()
    if labels is not None:
        right = torch.cat(right, 1).double()
        found["labels"] = right[right[:, :middle].mean(1).argmax(), middle:].mean().item()
    return found


def picture(z: Tensor, recording: Recording, path: Path) -> None:
    """Draw the first three dimensions of z (T, d) from two sides: behavior or time is the shade, label the palette."""
    if not importlib.util.find_spec("matplotlib"):
        return print(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
    few = slice(None, None, -(-len(z) // 5000))
    _, behavior, labels, values = recording.at(few)
    value, what = (torch.arange(len(z))[few], "sample") if behavior is None else (behavior[:, 0], "behavior")
    z = F.pad(z[few, :3], (0, 3 - min(3, z.shape[1])))
    if labels is None or len(values) > 4:
        labels, values = torch.zeros(len(z)), ["any"]
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(11, 4.5), layout="constrained")
    for place, angle in ((121, 30), (122, 120)):
        axes = figure.add_subplot(place, projection="3d", xlabel="z 1", ylabel="z 2", zlabel="z 3")
        axes.view_init(25, angle)
        axes.locator_params(nbins=5)
        for i, label in enumerate(values):
            rows, shades = labels == i, ("winter", "autumn", "summer", "cool")[i]
            points = axes.scatter(*z[rows].T, c=value[rows], cmap=shades, s=2, vmin=value.min(), vmax=value.max())
            if place == 122:
                figure.colorbar(points, ax=axes, shrink=0.6, label=f"{what}, label {label}")
    figure.savefig(path, dpi=110)
