"""CEBRA: its loss, the draws of positives and negatives, the encoder, recordings, and whole runs."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import cebra
import common
import linear_eval
import recordings
from images import InputError
from recordings import Recording, make_track

DRAWS = 40_000


@pytest.fixture(scope="module")
def track():
    return make_track(seconds=80, neurons=12)


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """A picture takes longer than a run does here."""
    if request.node.originalname not in ("test_a_run", "test_without_matplotlib_there_is_no_picture"):
        monkeypatch.setattr(cebra, "picture", lambda *_: None)


def config(**given):
    return cebra.Config.preset("demo", **given)


def sampler(behavior=None, labels=None, samples=300, **given):
    behavior = None if behavior is None else torch.as_tensor(behavior, dtype=torch.float64)
    labels = None if labels is None else torch.as_tensor(labels)
    return cebra.Sampler(config(**given), Recording(torch.zeros(samples, 1), behavior, labels, labels))


def follows(drawn, probability):
    """The times drawn pass a chi-squared test of `probability`, and times of probability 0 are never drawn."""
    count = torch.as_tensor(drawn).bincount(minlength=len(probability)).double()
    expected = torch.as_tensor(probability, dtype=torch.float64) * len(drawn)
    assert not count[expected == 0].any()
    count, expected = count[expected > 0], expected[expected > 0]
    excess = ((count - expected).square() / expected).sum() - (len(count) - 1)
    assert excess < 5 * math.sqrt(2 * len(count))


# ---------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_the_loss_is_that_of_the_paper(similarity):
    torch.manual_seed(0)
    z, positive, negatives = torch.randn(5, 3).double(), torch.randn(5, 3).double(), torch.randn(7, 3).double()
    if similarity == "cosine":
        z, positive, negatives = (torch.nn.functional.normalize(x, dim=1) for x in (z, positive, negatives))
    psi = (lambda a, b: a @ b / 0.3) if similarity == "cosine" else (lambda a, b: -((a - b) ** 2).sum() / 0.3)
    each = [
        -psi(x, y) + math.log(sum(math.exp(psi(x, other)) for other in negatives))
        for x, y in zip(z, positive, strict=True)
    ]
    found = cebra.info_nce(z, positive, negatives, 0.3, similarity == "cosine")
    assert found.item() == pytest.approx(sum(each).item() / 5, abs=1e-12)


@pytest.mark.parametrize("mode", ["time", "behavior", "hybrid"])
def test_the_kernels_give_the_same_loss_and_gradients(mode, track):
    recording = recordings.load(track)
    c = config(mode=mode, learn_temperature=True)
    torch.manual_seed(0)
    model, drawn = cebra.CEBRA(c, 12).double(), cebra.Sampler(c, recording).draw(200)
    s, found = recordings.pad(recording.spikes.double(), model.field), []
    for backend in ("naive", "blocked"):
        model.zero_grad()
        loss = cebra.loss_of(model, s, drawn, backend)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    z, negatives, *positives = (model(s.unfold(0, 10, 1)[times].mT).squeeze(1) for times in drawn)
    each = [cebra.info_nce(z, positive, negatives, model.temperature) for positive in positives]
    torch.testing.assert_close(found[0][0], sum(each).detach() / (2 if mode == "hybrid" else 1))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert model.log_scale.grad.abs() > 0


def test_a_temperature_is_learnt_down_to_its_floor():
    model = cebra.CEBRA(config(learn_temperature=True, temperature=0.2, min_temperature=0.1), 4)
    assert model.temperature.item() == pytest.approx(0.2)
    model.log_scale.data.fill_(math.log(50))
    assert model.temperature.item() == pytest.approx(0.1)
    model = cebra.CEBRA(config(temperature=0.01), 4)
    assert model.temperature.item() == pytest.approx(0.01) and not model.log_scale.requires_grad


# ------------------------------------------------------------------------------------------- what is drawn


def test_time_positives_and_uniform_times():
    torch.manual_seed(0)
    t, negatives, positives = sampler(mode="time", time_offset=7).draw(DRAWS)
    assert torch.equal(positives, t + 7)
    follows(t, [1 / 293] * 293 + [0] * 7)
    follows(negatives, [1 / 293] * 293 + [0] * 7)  # as in the authors' TimeContrastive: [0, T - offset)
    assert abs(torch.corrcoef(torch.stack([t, negatives]).double())[0, 1]) < 0.03


def by_the_definition(t, behavior, labels, offset):
    """Of every t' the nearest of the same label to c_t + c_t'+offset - c_t', a draw among equals."""
    probability, changes = np.zeros(len(behavior)), behavior[offset:] - behavior[:-offset]
    for change in changes:
        distance = np.linalg.norm(behavior - behavior[t] - change, axis=1)
        distance[labels != labels[t]] = np.inf
        nearest = np.abs(distance - distance.min()) < 1e-9
        probability += nearest / nearest.sum() / len(changes)
    return probability


@pytest.mark.parametrize("kind", ["a line", "ties", "labels", "plane", "plane with labels", "plane far from 0"])
def test_behavior_positives_follow_the_definition(kind):
    draw = np.random.default_rng(0)
    behavior = np.cumsum(draw.normal(size=(300, 2 if "plane" in kind else 1)), 0)
    behavior = np.round(behavior) if kind == "ties" else behavior + 1e9 * ("far from 0" in kind)
    labels = draw.integers(0, 3, 300) if "labels" in kind else np.zeros(300, int)
    torch.manual_seed(0)
    s = sampler(behavior, labels if "labels" in kind else None, time_offset=5)
    for t in (0, 57, 299):
        probability = by_the_definition(t, behavior, labels, 5)
        follows(s.by_behavior(torch.full((DRAWS,), t)), probability)
    t, _, positives = s.draw(1000)
    assert torch.equal(torch.from_numpy(labels)[t], torch.from_numpy(labels)[positives])


def test_positives_of_labels_alone():
    labels = np.repeat([0, 1, 2], [50, 100, 150])
    torch.manual_seed(0)
    s = sampler(labels=labels)
    for t in (0, 60, 299):
        same = labels == labels[t]
        follows(s.by_behavior(torch.full((DRAWS,), t)), same / same.sum())


def test_negatives_of_a_label():
    """Every step's times are of one label, as often as the label is; uniform within it."""
    labels = np.repeat([0, 1], [100, 200])
    torch.manual_seed(0)
    s = sampler(np.arange(300.0)[:, None], labels, negatives="label")
    steps = [s.draw(50) for _ in range(1000)]
    for t, negatives, positives in steps:
        assert len(np.unique(labels[torch.cat([t, negatives, positives])])) == 1
    share = np.mean([labels[step[0][0]] for step in steps])
    assert abs(share - 2 / 3) < 5 * math.sqrt(2 / 9 / 1000)
    of_1 = torch.cat([step[1] for step in steps if labels[step[0][0]] == 1])
    follows(of_1, [0] * 100 + [1 / 200] * 200)


def test_negatives_of_a_label_with_positives_by_time():
    labels = np.repeat([0, 1, 2], [100, 190, 10])  # of the last label no time has a positive
    torch.manual_seed(0)
    s = sampler(labels=labels, mode="time", negatives="label", time_offset=10)
    steps = [s.draw(50) for _ in range(300)]
    for t, negatives, positives in steps:
        assert torch.equal(positives, t + 10) and positives.max() < 300
        assert len(np.unique(labels[torch.cat([t, negatives])])) == 1
    assert {int(labels[t[0]]) for t, _, _ in steps} == {0, 1}


def test_hybrid_draws_both():
    torch.manual_seed(0)
    _, negatives, by_behavior, by_time = sampler(np.arange(300.0)[:, None], mode="hybrid", time_offset=3).draw(100)
    t = by_time - 3
    assert (t >= 0).all() and (by_time < 300).all() and (negatives < 297).all()
    assert ((by_behavior - t == 3) | (by_behavior == 299)).all()  # every change is 3 here


def test_shuffled_positives_have_nothing_to_do_with_t():
    c = torch.arange(300.0)[:, None]
    torch.manual_seed(0)
    for shuffle, bounds in ((False, (0.99, 1)), (True, (-0.05, 0.05))):
        t, _, positives = sampler(c, shuffle=shuffle).draw(DRAWS)
        assert bounds[0] <= torch.corrcoef(torch.stack([t, positives]).double())[0, 1] <= bounds[1]
    labels = np.repeat([0, 1], 150)
    t, _, positives = sampler(labels=labels, shuffle=True).draw(DRAWS)
    assert abs((labels[t] == labels[positives]).mean() - 0.5) < 0.1  # exactly 0.5 but for the one permutation
    s = sampler(c, labels, shuffle=True)  # behaviour goes with its label
    assert len(s.contexts) == 300 and all((behavior > 149) == (label > 0) for label, behavior in s.contexts)


# ---------------------------------------------------------------------------------------------- encoder and data


@pytest.mark.parametrize("encoder, before, after", [("conv", 5, 4), ("mlp", 0, 0)])
def test_what_the_encoder_sees(encoder, before, after):
    torch.manual_seed(0)
    model, spikes = cebra.CEBRA(config(encoder=encoder), 6), torch.rand(40, 6)
    z = model.embed(spikes)
    assert z.shape == (40, 3)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(40))
    changed = spikes.clone()
    changed[20] += 1
    moved = (model.embed(changed) - z).abs().amax(1) > 1e-7
    assert moved.nonzero().squeeze(1).tolist() == list(range(20 - after, 20 + before + 1))
    padded = recordings.pad(spikes, model.field)
    assert torch.equal(padded[20 : 20 + model.field], spikes[20 - before : 21 + after])
    assert torch.equal(padded[:before], spikes[:1].expand(before, -1)) and len(padded) == 40 + before + after
    torch.testing.assert_close(model(padded[None])[0], z)
    long = torch.rand(9000, 6)
    torch.testing.assert_close(model(recordings.pad(long, model.field)[None])[0], model.embed(long))


def test_a_convolution_is_torch_s():
    torch.manual_seed(0)
    conv, s = cebra.Conv(5, 4, 3), torch.randn(2, 9, 5)
    weight = conv.product.weight.view(4, 3, 5).transpose(1, 2)
    expected = torch.nn.functional.conv1d(s.mT, weight, conv.product.bias).mT
    torch.testing.assert_close(conv(s), expected)
    assert conv.product.weight.abs().max() <= 15**-0.5 and conv.product.weight.std() > 0.5 * (15 * 3) ** -0.5


def test_what_a_skip_adds_to():
    skip, x = cebra.Skip(4, 4, 3), torch.randn(2, 9, 4)
    torch.nn.init.zeros_(skip.product.weight)
    torch.nn.init.zeros_(skip.product.bias)
    assert torch.equal(skip(x), x[:, 1:-1])


def test_a_rat_on_a_track():
    track = make_track()
    spikes, position, direction = (track[name] for name in ("spikes", "behavior", "labels"))
    assert spikes.shape == (24_000, 120) and position.shape == (24_000, 1)
    assert position.min() >= 0 and position.max() <= 1.6
    step = np.diff(position[:, 0])
    assert (step[direction[1:] == 0] >= 0).mean() > 0.98 and (step[direction[1:] == 1] <= 0).mean() > 0.98
    assert 0.2 < 40 * spikes.mean() < 2  # Hz
    same = make_track()
    assert all(np.array_equal(track[name], same[name]) for name in track)
    assert not np.array_equal(spikes, make_track(seed=1)["spikes"])
    # one place, both directions: the gain; over the places: the field
    bins, (busy,) = (position[:, 0] // 0.1).astype(int), np.where(spikes.mean(0) > 0.02)
    rates = np.stack([[spikes[(bins == b) & (direction == d)].mean(0) for b in range(16)] for d in (0, 1)])[..., busy]
    assert (rates.max((0, 1)) > 4 * np.median(rates, (0, 1))).mean() > 0.9
    peaks = rates.max(1)
    assert (np.sort(peaks, 0)[1] > 2 * np.sort(peaks, 0)[0]).mean() > 0.7


def test_decoding():
    recording = recordings.load(make_track(seconds=60, neurons=5))
    parts = recording.split()
    assert [len(part.spikes) for part in parts] == [1920, 240, 240]
    perfect = recordings.decode([torch.cat([p.behavior, 9.0 * p.labels[:, None]], 1) for p in parts], parts)
    assert perfect["median error"] < 0.01 and perfect["R2"] > 0.99 and perfect["labels"] > 0.98
    torch.manual_seed(0)
    nothing = recordings.decode([torch.rand(len(p.spikes), 3) for p in parts], parts)
    assert nothing["median error"] > 0.3 and nothing["R2"] < 0.1 and nothing["labels"] < 0.7


def test_decoding_by_hand():
    """k = 1 is best: the middle part repeats the first. Medians of |error| over the last part, R2, accuracy."""
    first = Recording(torch.zeros(4, 1), torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([0, 0, 1, 1]))
    last = Recording(torch.zeros(3, 1), torch.tensor([[0.5], [1], [4]]), torch.tensor([0, 1, 1]))
    z = torch.tensor([[0.0], [10], [20], [30]])
    found = recordings.decode([z, z, torch.tensor([[1.0], [11], [29]])], [first, first, last])
    assert found["median error"] == pytest.approx(0.5)
    truth = np.array([0.5, 1, 4])
    assert found["R2"] == pytest.approx(1 - (0.5**2 + 0 + 1) / ((truth - truth.mean()) ** 2).sum())
    assert found["labels"] == pytest.approx(2 / 3)


BAD = {
    "no_such.npz": (None, "no such file"),
    "text.npz": ("hello", "no .npz file"),
    "other.npz": ({"rates": np.zeros((300, 2))}, "has rates, but no spikes"),
    "flat.npz": ({"spikes": np.zeros(300)}, "spikes must be"),
    "short.npz": ({"spikes": np.zeros((50, 2))}, "only 50 samples"),
    "uneven.npz": ({"spikes": np.zeros((300, 2)), "behavior": np.zeros((299, 1))}, "behavior must be"),
    "nan.npz": ({"spikes": np.zeros((300, 2)), "behavior": np.full((300, 1), np.nan)}, "not finite"),
    "words.npz": ({"spikes": np.full((300, 2), "a")}, "must be numbers"),
    "unique.npz": (
        {"spikes": np.zeros((300, 2)), "labels": np.arange(300)},
        "labels have more than T/2 values; give fewer",
    ),
    "still.npz": ({"spikes": np.zeros((300, 2)), "behavior": np.zeros((300, 1))}, "behavior and labels never change"),
    "words_as_objects.npz": (
        {"spikes": np.zeros((300, 2)), "labels": np.array(["a", "b"] * 150, object)},
        "labels=words.astype",
    ),
    "turned.npz": ({"spikes": np.zeros((2, 300))}, r"only 2 samples; .* give spikes.T"),
    "half_turned.npz": (
        {"spikes": np.zeros((300, 250)), "behavior": np.zeros((2, 300))},
        r"behavior must be .*spikes.T",
    ),
    "complex.npz": ({"spikes": np.zeros((300, 2), complex)}, "must be numbers, got complex"),
    "dates.npz": ({"spikes": np.zeros((300, 2)), "labels": np.zeros(300, "datetime64[D]")}, "must be numbers or words"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(name, tmp_path):
    content, words = BAD[name]
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(InputError, match=words) as error:
        cebra.train(config(data=str(path), out=str(tmp_path / "run")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given, words", [
    ({"embedding_dim": 1}, "--embedding-dim 1"), ({"sphere": False}, "--no-sphere"),
    ({"min_temperature": 0.2}, "needs --learn-temperature"),
    ({"learn_temperature": True, "temperature": 0.05}, "give --temperature >= --min-temperature"),
    ({"temperature": 0.0}, "--temperature 0.0"),
    ({"embedding_dim": 0, "similarity": "euclidean", "sphere": False}, "--embedding-dim 0"),
    ({"similarity": "euclidean", "loss_backend": "blocked"}, "--loss-backend blocked"),
    ({"mode": "time", "shuffle": True}, "--shuffle"), ({"hidden_dim": 0}, "--hidden-dim 0"),
    ({"time_offset": 10_000}, "--time-offset 10000"), ({"time_offset": 0}, "--time-offset 0"),
    ({"mode": "places"}, "--mode places"),
])  # fmt: skip
def test_bad_flags_are_one_line(given, words, track, tmp_path):
    with pytest.raises(InputError, match=words):
        cebra.train(config(**given, out=str(tmp_path)), data=track)


@pytest.mark.parametrize("left, given, words", [
    (["labels"], {"negatives": "label"}, "no two labels; give uniform"),
    (["behavior"], {"negatives": "label"}, "needs behavior that changes; give uniform"),
    (["labels", "behavior"], {}, "never change; give time"),
])  # fmt: skip
def test_what_the_data_cannot_give(left, given, words, track, tmp_path):
    with pytest.raises(InputError, match=words):
        cebra.train(config(**given, out=str(tmp_path)), {name: x for name, x in track.items() if name not in left})


# ---------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("given, left", [
    ({}, []), ({"mode": "time"}, ["behavior", "labels"]), ({"mode": "hybrid", "encoder": "mlp"}, ["labels"]),
    ({"similarity": "euclidean", "sphere": False, "embedding_dim": 1}, ["behavior"]),
    ({"negatives": "label", "learn_temperature": True}, []),
])  # fmt: skip
def test_a_run(given, left, track, tmp_path, capsys):
    data = {name: x for name, x in track.items() if name not in left} | {"more": np.zeros(3)}
    metrics = cebra.train(config(**given, epochs=3, batch_size=64, out=str(tmp_path)), data)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "more left out" in lines[0] and "spikes (3200, 12)" in said
    assert lines[1].startswith(f"{tmp_path}: cebra") and lines[-1].startswith(f"{tmp_path}: checkpoint.pt")
    assert metrics["out"] == str(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["method"] == "cebra"
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    last = rows[-1]
    assert float(last["loss"]) == pytest.approx(metrics["loss"], rel=1e-5)
    assert float(last["goodness_of_fit"]) == pytest.approx((math.log(64) - metrics["loss"]) / math.log(2), abs=1e-4)
    assert (float(last["temperature"]) != 0.2) == ("learn_temperature" in given)
    d = given.get("embedding_dim", 3)
    for column, name in (("median error", "behavior"), ("R2", "behavior"), ("labels", "labels")):
        assert (f"{column} of z, {d}-d" in metrics) == (name not in left)
    c, model = common.load_run(tmp_path)
    assert isinstance(c, cebra.Config) and c.batch_size == 64
    part = recordings.load({name: x for name, x in track.items() if name not in left}).split()[2]
    drawing, s = cebra.Sampler(c, part), recordings.pad(part.spikes, model.field)
    with torch.no_grad():
        mean = sum(cebra.loss_of(model, s, drawing.draw(64), "naive").item() for _ in range(50)) / 50
    assert metrics["goodness of fit, held out"] == pytest.approx((math.log(64) - mean) / math.log(2), abs=0.1)
    with np.load(tmp_path / "embedding.npz") as file:
        assert set(file) == {"z", "behavior", "labels"} - set(left)
        assert all(np.array_equal(file[name], track[name]) for name in {"behavior", "labels"} - set(left))
        torch.testing.assert_close(torch.from_numpy(file["z"]), model.embed(torch.from_numpy(track["spikes"]).float()))
    assert (tmp_path / "embedding.png").stat().st_size > 10_000


def test_labels_are_told_as_they_were_given(track, tmp_path, capsys):
    """Training does not meet one of the labels, and the held-out part has that label only."""
    labels = np.where(np.arange(3200) < 1600, "left", "right")
    labels[-320:] = "home"
    cebra.train(config(epochs=1, batch_size=64, negatives="label", out=str(tmp_path)), track | {"labels": labels})
    assert "note: no goodness of fit on the last 320 samples: --negatives label" in capsys.readouterr().out
    with np.load(tmp_path / "embedding.npz") as file:
        assert np.array_equal(file["labels"], labels)


MASK = np.ma.masked_array(np.ones((300, 2)), mask=np.arange(600).reshape(300, 2) == 7)


@pytest.mark.parametrize("key, given", [
    ("spikes", MASK), ("spikes", [*MASK]), ("behavior", MASK[:, 1]), ("labels", MASK[:, 1].astype(int)),
    ("spikes", np.full((300, 2), 1e39)), ("behavior", torch.full((300,), torch.nan)), ("spikes", None),
    ("labels", [None, "a"] * 150),
])  # fmt: skip
@np.errstate(all="ignore")
def test_what_is_masked_missing_or_too_large_is_one_line(key, given):
    with pytest.raises(InputError, match="masked or not finite|but no spikes|must be numbers or words"):
        recordings.load({"spikes": np.ones((300, 2)), key: given})
    words = [np.str_(w) for w in "ab" * 150]
    for labels in (np.array(words, object), np.array([1, 2] * 150, object), torch.arange(300) % 2):
        assert len(recordings.load({"spikes": np.eye(300, 2), "labels": labels}).values) == 2


@pytest.mark.parametrize("still", [[1], [0, 1], [2]])
def test_behavior_that_stands_still_at_the_end_is_left_out_and_named(still, tmp_path, capsys):
    """At numbers such as 0.1, whose mean is rounded: their variance is not exactly 0."""
    t = np.arange(400.0)
    behavior = np.stack([t % 20, np.sin(t / 9), np.cos(t)], 1)
    behavior[300:, still] = 0.1 + 1e-9 * (t[300:, None] % 2)
    if still == [2]:  # and in training, too
        behavior[:300, still] = 0.3
    metrics = cebra.train(config(epochs=1, out=str(tmp_path)), {"spikes": behavior, "behavior": behavior})
    assert -50 < metrics["R2 of z, 3-d"] <= 1 and "R2 of PCA of 1 sample, 3-d" in metrics
    assert f"note: behavior column {still} left out: constant in the held-out part" in capsys.readouterr().out
    alone = {"spikes": behavior, "behavior": behavior[:, still]}
    assert "R2 of z, 3-d" not in cebra.train(config(epochs=1, mode="time", out=str(tmp_path)), alone)


@pytest.mark.parametrize("labels, unseen", [(["a", "b"], ["home"]), ([3, 5], [9]), ([0.5, 1.5], [2.5])])
def test_labels_of_the_held_out_part_that_training_never_saw_are_named(labels, unseen, tmp_path, capsys):
    labels = np.array([*labels * 100, *unseen * 10])
    given = {"spikes": np.random.default_rng(0).normal(size=(210, 4)), "labels": labels}
    cebra.train(config(epochs=1, batch_size=64, out=str(tmp_path)), given)
    assert f"note: training has not seen label {unseen} of the held-out part" in capsys.readouterr().out


@pytest.mark.parametrize("scale, shift, told", [(1, 0, 0), (1e-3, 0, 1), (1e4, 0, 1), (1, 100, 1), (9, 9, 0)])
def test_spikes_in_other_units_are_told(scale, shift, told, track, capsys):
    recordings.load(track | {"spikes": scale * track["spikes"] + shift})
    assert ("note: data: spikes have mean" in capsys.readouterr().out) == told


@pytest.mark.parametrize("scales, told", [([1, 1], 0), ([1, 360], 1), ([1e-6, 1], 1), ([0, 1], 0), ([5], 0)])
def test_behavior_in_unlike_units_is_told(scales, told, track, capsys):
    behavior = np.random.default_rng(0).random((3200, len(scales))) * scales
    recordings.load({"spikes": track["spikes"], "behavior": behavior})
    assert ("bring its columns to one scale" in capsys.readouterr().out) == told


def test_more_neurons_than_samples_are_told(capsys):
    for wide, deep in ((300, 200), (200, 300), (201, 200)):
        recordings.load({"spikes": np.random.default_rng(0).normal(size=(deep, wide))})
        assert ("if time is the second axis, give spikes.T" in capsys.readouterr().out) == (wide > deep)


@pytest.mark.parametrize("spikes, words", [
    (np.zeros((50, 4)), r"must be \(T, 5\), got \(50, 4\)"),
    (np.zeros(50), r"must be \(T, n\), got \(50,\)"),
    (np.full((50, 5), np.nan), "not finite"),
    (torch.full((50, 5), torch.inf), "not finite"),
    (np.ma.masked_less(np.arange(250).reshape(50, 5), 3), "masked"),
    ([["a"] * 5] * 50, "must be numbers"),
    ([[0.0] * 5, [0.0] * 4], "give numbers"),
])  # fmt: skip
def test_embed_takes_only_spikes_of_the_neurons_it_was_trained_on(spikes, words):
    with pytest.raises(InputError, match=words):
        cebra.CEBRA(config(), 5).embed(spikes)


def test_on_the_sphere_the_squared_distance_is_two_minus_twice_the_cosine():
    """The authors' euclidean distance with offset10-model, whose z has length 1: psi = (2 x . y - 2) / tau."""
    torch.manual_seed(0)
    for sphere in (True, False):
        model = cebra.CEBRA(config(similarity="euclidean", sphere=sphere), 6)
        z = model(torch.rand(20, 10, 6)).squeeze(1)
        assert torch.allclose(z.norm(dim=1), torch.ones(20)) == sphere
        if sphere:
            ours, theirs = cebra.info_nce(z, z[:1], z[5:], 0.3, False), cebra.info_nce(z, z[:1], z[5:], 0.15)
            torch.testing.assert_close(ours, theirs)


def test_words_may_come_as_objects_and_missing_labels_are_refused():
    spikes, words = np.ones((200, 2)), np.array(["left", "right"] * 100, dtype=object)
    assert recordings.load({"spikes": spikes, "labels": words}).values.tolist() == ["left", "right"]
    words[3] = math.nan
    with pytest.raises(InputError, match="labels must be numbers or words, got object"):
        recordings.load({"spikes": spikes, "labels": words})
    with pytest.raises(InputError, match="labels has values that are masked"):
        recordings.load({"spikes": spikes, "labels": np.ma.array(np.arange(200) % 2, mask=np.arange(200) == 5)})


def test_a_second_run_takes_a_folder_of_its_own(track, tmp_path, capsys):
    c = config(epochs=0, out=str(tmp_path / "run"))
    outs = [cebra.train(c, track)["out"] for _ in range(2)]
    assert outs == [str(tmp_path / "run"), str(tmp_path / "run-2")]
    assert f"{tmp_path / 'run-2'}: cebra" in capsys.readouterr().out
    assert c == config(epochs=0, out=str(tmp_path / "run"))  # train never changes its config
    stored = common.load_run(tmp_path / "run-2")[0]
    assert stored.out == outs[1] and stored.data == "arrays"


def test_the_same_seed_is_the_same_run(track, tmp_path):
    first, again, other = (
        cebra.train(config(epochs=2, batch_size=64, seed=seed, out=str(tmp_path / str(i))), track)
        for i, seed in enumerate((0, 0, 1))
    )
    assert first | {"out": ""} == again | {"out": ""} and first["loss"] != other["loss"]


def test_training_lowers_the_loss_below_a_guess(track, tmp_path, capsys):
    metrics = cebra.train(config(epochs=6, batch_size=128, out=str(tmp_path / "6")), track)
    assert metrics["goodness of fit"] > 0.1
    said = capsys.readouterr().out
    assert "of a guess log N = 4.852" in said
    untrained = cebra.train(config(epochs=0, out=str(tmp_path / "0")), track)
    assert "loss" not in untrained and untrained["goodness of fit, held out"] < 0.05


def test_a_run_that_learns_nothing_says_so(track, tmp_path, capsys):
    cebra.train(config(epochs=2, batch_size=64, lr=1e-9, out=str(tmp_path)), track)
    assert capsys.readouterr().out.count("no better than a guess, whose loss is log N = 4.159") == 1


def test_numbers_that_are_not_finite_stop_the_run_and_are_not_saved(track, tmp_path):
    given = {"lr": 1e18, "similarity": "euclidean", "sphere": False, "epochs": 3, "batch_size": 64}
    with pytest.raises(common.RunFailure, match="is not finite; give a smaller --lr; .* keeps the last good"):
        cebra.train(config(**given, out=str(tmp_path)), track)
    model = common.load_run(tmp_path)[1]
    assert all(x.isfinite().all() for x in model.state_dict().values())
    assert "nan" not in (tmp_path / "log.csv").read_text() and not (tmp_path / "embedding.npz").exists()


def test_several_processes_are_one_line(track, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="cebra.py runs as one process"):
        cebra.train(config(out=str(tmp_path)), track)


def test_without_kernels_the_loss_is_that_of_the_file(track, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "kernels", None)
    cebra.train(config(epochs=1, out=str(tmp_path / "auto")), track)
    assert "info_nce, naive" in capsys.readouterr().out
    with pytest.raises(InputError, match="--loss-backend blocked: the folder kernels/ is not beside common.py"):
        cebra.train(config(loss_backend="blocked", out=str(tmp_path / "blocked")), track)
    assert not (tmp_path / "blocked").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs there")
def test_triton_without_a_gpu_is_one_line(track, tmp_path):
    with pytest.raises(InputError, match="--loss-backend triton: .*; give auto"):
        cebra.train(config(loss_backend="triton", out=str(tmp_path)), track)


def test_without_matplotlib_there_is_no_picture(track, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recordings.importlib.util, "find_spec", lambda name: None)
    cebra.train(config(epochs=1, out=str(tmp_path)), track)
    assert "no embedding.png: matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "embedding.npz").exists()


def test_linear_eval_says_that_there_are_no_images(track, tmp_path):
    cebra.train(config(epochs=0, out=str(tmp_path)), track)
    with pytest.raises(InputError, match="a run of cebra"):
        linear_eval.main([str(tmp_path)])


def test_presets_and_help(capsys):
    assert cebra.Config().lr == 3e-4 and cebra.Config().temperature == 1
    assert common.parse_args(cebra.Config, []).lr == config().lr
    assert common.parse_args(cebra.Config, ["--data", "mine.npz"]) == cebra.Config(data="mine.npz")
    with pytest.raises(SystemExit):
        common.parse_args(cebra.Config, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--image-size" not in said and "--resume" not in said and "--time-offset" in said


@pytest.mark.slow
def test_the_demo_decodes_position(tmp_path):
    """z is twice as good as PCA; trained by time, it is better than PCA; trained on shuffled labels, it is at chance.
    The runs have half the demo's track and a quarter of its steps."""
    part = make_track(seconds=300)
    metrics = cebra.train(config(epochs=10, out=str(tmp_path / "demo")), part)
    assert 2 * metrics["median error of z, 3-d"] < metrics["median error of PCA of 10 samples, 3-d"]
    assert metrics["labels of z, 3-d"] > 0.8
    time = cebra.train(config(mode="time", epochs=4, out=str(tmp_path / "time")), part)
    assert time["median error of z, 3-d"] < time["median error of PCA of 10 samples, 3-d"]
    shuffled = cebra.train(config(shuffle=True, epochs=3, out=str(tmp_path / "shuffled")), part)
    assert shuffled["R2 of z, 3-d"] < 0.1
    assert shuffled["median error of z, 3-d"] > 0.8 * shuffled["median error of a guess"]
    assert shuffled["labels of z, 3-d"] < 0.65
