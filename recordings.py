"""Recordings of neurons over time, with behaviour: what cebra.py trains on, and how well its z tells behaviour.

Sections: data | decoding. cebra.py needs this file beside it, and this file needs images.py.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from images import InputError, ensure

# ---------------------------------------------------------------------------------------------------------- data


READ = ("spikes", "behavior", "labels")  # the arrays that are read from a file or a dictionary


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
        said = (f"{name} {tuple(x.shape)}" for name, x in zip(READ, self, strict=False) if x is not None)
        return ", ".join(said)


def make_track(seconds: float = 600, neurons: int = 120, rate: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """A rat that runs to and fro on a track of 1.6 m. behavior is its position in metres, and a label is its direction.

    The neurons are place cells, whose rate is a Gaussian of the position times a gain of the direction. Peak rates are
    lognormal, as in the hippocampus (Mizuseki, Buzsaki 2013). Spikes are Poisson counts. `rate`: samples a second.
    """
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


def load(data: str | dict[str, Any]) -> Recording:
    """`track`, an .npz file, or a dictionary of arrays. Raises `InputError` for anything that is no recording."""
    name, given = f"--data {data}", make_track() if data == "track" else data
    if isinstance(data, dict):
        name = "data"
    elif data != "track":
        try:
            given = dict(np.load(data, allow_pickle=False))
        except Exception as error:  # NumPy raises many kinds
            why = getattr(error, "strerror", None) or "no .npz file of arrays, or a damaged one"
            raise InputError(f"{name}: {why}; give track, or a file that np.savez(file, spikes=...) wrote") from None
    ensure("spikes" in given, f"{name}: has {', '.join(given) or 'nothing'}, but no spikes; give spikes (T, n)")
    if rest := sorted(given.keys() - set(READ)):
        print(f"note: {name}: {', '.join(rest)} left out; only {', '.join(READ)} are read")
    found = {}
    for key, shape in zip(READ, ("(T, n)", "(T, k)", "(T,)"), strict=True):
        if given.get(key) is None:
            continue
        try:
            x = np.asarray(given[key])
            x = x.astype(str) if x.dtype == object and {*map(type, x.flat)} == {str} else x  # pandas has words so
        except (ValueError, TypeError) as error:  # rows of several lengths, or a tensor on a GPU
            raise InputError(f"{name}: {key} is no array {shape} ({error})") from None
        x = x[:, None] if key == "behavior" and x.ndim == 1 else x
        fits = x.ndim == len(shape.split(", ")) and x.size and len(x) == len(found.get("spikes", x))
        ensure(fits, f"{name}: {key} must be {shape}, with the T of spikes, got {x.shape}")
        kinds, what = ("biufUS", "numbers or words") if key == "labels" else ("biuf", "numbers")
        ensure(x.dtype.kind in kinds, f"{name}: {key} must be {what}, got {x.dtype}")
        x = x.astype({"spikes": np.float32, "behavior": np.float64}.get(key, x.dtype))
        finite = not np.ma.is_masked(given[key]) and (x.dtype.kind != "f" or np.isfinite(x).all())
        ensure(finite, f"{name}: {key} has values that are masked or not finite; drop their samples")
        found[key] = x
    samples = len(found["spikes"])
    ensure(samples >= 200, f"{name}: only {samples} samples; give 200 or more")
    if "labels" in found:
        found["values"], found["labels"] = np.unique(found["labels"], return_inverse=True)
        many = len(found["values"])
        ensure(2 * many <= samples, f"{name}: labels are {many} different values; give them as behavior")
    return Recording(**{key: x if key == "values" else torch.from_numpy(x) for key, x in found.items()})


# ---------------------------------------------------------------------------------------------------------- decoding


def pad(spikes: Tensor, field: int) -> Tensor:
    """(T + field - 1, n) of spikes (T, n): rows t to t + field - 1 are around time t. The first and last row repeat."""
    return torch.cat([spikes[:1].expand(field // 2, -1), spikes, spikes[-1:].expand((field - 1) // 2, -1)])


def compare(z: list[Tensor], parts: tuple[Recording, ...], field: int) -> dict[str, float]:
    """`decode` from z, from PCA of as many dimensions, from the spikes and from a guess; z has (T, d) for each part.

    The table is printed, and returned under names such as "median error of z, 3-d". PCA and spikes are taken from one
    sample, and from the sum of as many samples as the encoder sees (`field`).
    """
    d = z[0].shape[1]
    table = {f"z, {d}-d": z}
    for width in sorted({1, field}):
        of = f"{width} sample{'s' * (width > 1)}"
        counts = [pad(part.spikes, width).unfold(0, width, 1).sum(2) for part in parts]
        axes = torch.linalg.eigh(torch.cov(counts[0].T).view(counts[0].shape[1], -1)).eigenvectors[:, -d:]
        table |= {f"PCA of {of}, {axes.shape[1]}-d": [x @ axes for x in counts], f"spikes of {of}": counts}
    table["a guess"] = [torch.rand(len(part.spikes), 1) for part in parts]
    few = [slice(None, None, -(-len(x) // most)) for x, most in zip(z, (20_000, 5_000, 5_000), strict=True)]
    kept = [part.at(rows) for part, rows in zip(parts, few, strict=True)]
    found = {name: decode([x[rows] for x, rows in zip(xs, few, strict=True)], kept) for name, xs in table.items()}
    if found["a guess"]:
        said = f"kNN, held out: the last {len(z[2]):,} samples"
        print(f"{said:44}" + "".join(f"{column:>14}" for column in found["a guess"]))
        for name, values in found.items():
            print(f"  {name:42}" + "".join(f"{value:14.3f}" for value in values.values()))
    return {f"{column} of {name}": value for name, values in found.items() for column, value in values.items()}


def decode(z: list[Tensor], parts: Sequence[Recording]) -> dict[str, float]:
    """kNN from z: the first part's samples (T, d) are the neighbours, and the last part is decoded.

    Returns the median absolute error and R2 of behavior, and the accuracy of labels. The middle part chooses k among
    squares. Figures of behavior are means over its columns; R2 leaves out columns that do not change in the last part.
    """
    (bank, *queries), centre = z, z[0].mean(0)  # far from 0, distances would lose their digits
    ks, (_, behavior, labels, _), errors, right = [k * k for k in range(1, 21) if k * k <= len(bank)], parts[0], [], []
    for part, q in zip(parts[1:], queries, strict=True):
        for rows in torch.arange(len(q)).split(256):
            near = torch.cdist(q[rows] - centre, bank - centre).topk(ks[-1], largest=False).indices
            if behavior is not None:
                means = torch.stack([behavior[near[:, :k]].mean(1) for k in ks])  # (len(ks), rows, k)
                errors.append((means - part.behavior[rows]).abs())
            if labels is not None:
                right.append(torch.stack([labels[near[:, :k]].mode(1).values for k in ks]) == part.labels[rows])
    middle, found = len(queries[0]), {}
    if behavior is not None:
        errors, truth = torch.cat(errors, 1), parts[2].behavior
        best = errors[:, :middle].median(1).values.mean(1).argmin()
        error, spread = errors[best, middle:], (truth - truth.mean(0)).square().sum(0)
        found["median error"] = error.median(0).values.mean().item()
        found["R2"] = (1 - error.square().sum(0) / spread)[spread > 0].mean().item()
    if labels is not None:
        right = torch.cat(right, 1).double()
        found["labels"] = right[right[:, :middle].mean(1).argmax(), middle:].mean().item()
    return found


def picture(z: Tensor, recording: Recording, path: Path) -> None:
    """Draw the first three dimensions of z (T, d) from two sides. Colour is the first column of behavior, or time; each
    of up to four labels has a colour map of its own."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return
    few = slice(None, None, -(-len(z) // 5000))
    _, behavior, labels, values = recording.at(few)
    value = torch.arange(len(z))[few] if behavior is None else behavior[:, 0]
    z = F.pad(z[few, :3], (0, 3 - min(3, z.shape[1])))
    if labels is None or len(values) > 4:
        labels, values = torch.zeros(len(z)), ["any"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for place, angle in ((121, 30), (122, 120)):
        axes = figure.add_subplot(place, projection="3d")
        axes.view_init(25, angle)
        axes.locator_params(nbins=5)
        for i, label in enumerate(values):
            rows, shades = labels == i, ("winter", "autumn", "summer", "cool")[i]
            points = axes.scatter(*z[rows].T, c=value[rows], cmap=shades, s=2, vmin=value.min(), vmax=value.max())
            if place == 122:
                name = f"{'sample' if behavior is None else 'behavior'}, label {label}"
                figure.colorbar(points, ax=axes, shrink=0.6, label=name)
    figure.savefig(path, dpi=110)
