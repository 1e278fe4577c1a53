"""Features of any pictures, and the map of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import embed
import images
import simclr
from tests.helpers import few_shapes, train

CPU = torch.device("cpu")
PLACES = ["train/red/{}", "train/red/deep/er/{}", "test/red/{}", "green/{}", "blue/{}", "blue/{}"]  # of picture i


def album(root):
    """12 pictures of three colours and many sizes, in sub-folders of all kinds; two damaged ones; and other files."""
    for i in range(12):
        pixels = np.zeros((40 + 5 * i, 60 - 2 * i, 3), np.uint8)
        pixels[:, 10:, i % 6 // 2 if i % 6 > 2 else 0] = 100 + 10 * i
        path = root / PLACES[i % 6].format(f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    whole = (root / "blue/11.png").read_bytes()
    (root / "blue/05-cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "green/empty.jpg").write_bytes(b"")
    (root / "green/notes.txt").write_text("no picture")
    (root / "_hidden").mkdir()
    (root / "_hidden/x.png").write_bytes(whole)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(simclr, tmp_path_factory.mktemp("run") / "simclr")["out"]


@pytest.fixture
def features(run):
    return lambda *flags: embed.main([run, *map(str, flags)])


def test_every_picture_below_a_folder_has_a_row(run, features, tmp_path, capfd):
    root = album(tmp_path / "photos")
    result = features("--data", root, "--out", tmp_path / "f.npz")
    out, err = capfd.readouterr()
    assert "14 pictures, 3 classes; left out: 1 .txt" in out and "12 pictures, h 128-d" in out
    assert "note: damaged pictures left out: 2\n" in out and "05-cut.png" in err and "empty.jpg" in err
    with np.load(tmp_path / "f.npz") as file:
        found = dict(file)
    assert found.keys() == result.keys() and all(np.array_equal(found[key], result[key]) for key in found)
    paths, words = found["paths"].tolist(), ["blue", "green", "red"]
    assert sorted(paths) == sorted(str(root / PLACES[i % 6].format(f"{i:02}.png")) for i in range(12))
    folders = [path.rsplit("/", 1)[0] for path in paths]
    assert all(a < b for a, b, x, y in zip(paths, paths[1:], folders, folders[1:], strict=False) if x == y)
    assert found["classes"].tolist() == words
    assert [words[label] in path for label, path in zip(found["labels"], paths, strict=True)] == [True] * 12

    config, model = common.load_run(run)
    split = images.Images(torch.full((12,), -1), CPU, paths=paths)
    assert found["features"].dtype == np.float32
    h = common.embed(model.backbone, split, config)
    torch.testing.assert_close(torch.from_numpy(found["features"]), h, atol=1e-5, rtol=1e-5)
    for i in (0, 7):  # a row is its picture's central square, whatever else the folder holds
        with Image.open(paths[i]) as picture:
            view = torchvision.transforms.functional.center_crop(picture, min(picture.size))
            view = torchvision.transforms.functional.to_tensor(view.resize((16, 16), Image.Resampling.BILINEAR))
        with torch.no_grad():
            expected = model.backbone(images.normalize(view[None]))[0]
        assert torch.allclose(expected, h[i], atol=0.05 * expected.abs().max())
        alone = tmp_path / f"alone{i}"
        alone.mkdir()
        (alone / "x.png").write_bytes(Path(paths[i]).read_bytes())
        one = features("--data", alone, "--out", tmp_path / "one.npz")
        assert one.keys() == {"features", "paths"}  # no class sub-folders
        assert np.allclose(one["features"][0], found["features"][i], atol=1e-5)
    (root / "green").rename(root / "None")
    assert features("--data", root, "--out", tmp_path / "f.npz")["classes"].tolist() == ["None", "blue", "red"]


def test_the_runs_own_pictures_and_z(run, features, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "load", lambda config, device: few_shapes())
    result = features("--out", tmp_path / "z.npz", "--features", "z")
    config, model = common.load_run(run)
    assert "240 pictures, z 64-d" in capsys.readouterr().out
    assert result["paths"][[0, 199, 200, -1]].tolist() == ["train/000000", "train/000199", "test/000000", "test/000039"]
    both = [common.embed(model.embed, part, config) for part in (few_shapes().train, few_shapes().test)]
    torch.testing.assert_close(torch.from_numpy(result["features"]), torch.cat(both), atol=1e-5, rtol=1e-5)
    assert result["labels"].tolist() == [*few_shapes().train.labels.tolist(), *few_shapes().test.labels.tolist()]
    assert result["classes"].tolist() == list(images.SHAPES)


def test_the_map_sorts_the_pictures_by_their_principal_components(features, tmp_path):
    """12 pictures in 4 columns of 4: a column has the next ones by the first component, sorted by the second."""
    found = features("--data", album(tmp_path / "photos"), "--map", tmp_path / "map.png")
    x = found["features"].astype(np.float64)
    at = (x - x.mean(0)) @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T
    sheet = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
    assert sheet.shape == (1224, 1400, 3)
    shown = [[sheet[1200 - 300 * up - 290 :][:280, 300 * c + 10 :][:, :280] for up in range(4)] for c in range(4)]
    assert [[(tile < 250).any() for tile in column] for column in shown] == [[True] * 4] * 3 + [[False] * 4]
    colours = [[tile.mean((0, 1)).argmax() for tile in column] for column in shown[:3]]
    wanted = [int(np.argmax([f"/{c}/" in path for c in ("red", "green", "blue")])) for path in found["paths"]]
    matches = []
    for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):  # the sign of a component means nothing
        columns = np.split(np.argsort(a * at[:, 0]), 3)
        matches.append([[wanted[i] for i in sorted(column, key=lambda i: b * at[i, 1])] for column in columns])
    assert colours in matches


def test_similar_pictures_come_with_their_cosine_the_most_similar_first(features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = album(tmp_path / "photos")
    (root / "green/again.png").write_bytes((root / "blue/10.png").read_bytes())
    found = features("--data", root, "--similar", 2)
    lines = [line.split("\t") for line in Path("similar.txt").read_text().splitlines()]
    assert len(lines) == 2 * 13 and not Path("f.npz").exists()
    assert {*lines[0][1:]} == {str(root / "green/again.png"), str(root / "blue/10.png")} and lines[0][0] == "1.0000"
    assert [float(line[0]) for line in lines] == sorted((float(line[0]) for line in lines), reverse=True)
    h = torch.nn.functional.normalize(torch.from_numpy(found["features"]), dim=1)
    cosine, paths = h @ h.T - 3 * torch.eye(13), found["paths"].tolist()
    for i, path in enumerate(paths):
        mine = [(float(value), paths.index(other)) for value, one, other in lines if one == path]
        assert [value for value, _ in mine] == pytest.approx(cosine[i].topk(2).values.tolist(), abs=1e-4)
        assert all(value == pytest.approx(cosine[i, j].item(), abs=1e-4) for value, j in mine)
    assert features("--data", root, "--similar", 99)["paths"].shape == (13,)  # all others
    assert len(Path("similar.txt").read_text().splitlines()) == 13 * 12
    assert embed.most_similar(torch.rand(1025, 3), np.arange(1025).astype(str), 1).count(b"\n") == 1025


@pytest.mark.parametrize("x", [torch.zeros(1, 4), torch.arange(5.0)[:, None], torch.eye(3)], ids=["one", "1-d", "few"])
def test_the_map_of_little_variety(x):
    config, split = (
        simclr.Config.preset("demo", workers=0),
        images.from_arrays(images.make_shapes(5, 0)[0], None, CPU).train,
    )
    sheet = np.asarray(embed.draw_map(x, split, torch.arange(len(x)), [], config))
    assert sheet.shape == (1224, 1200, 3) and (sheet[:1200].min(2) < 255).sum() > 500 * len(x)


@pytest.mark.parametrize("flags, words", [
    ("", "nothing to write; give --out features.npz, --map map.png or --similar 3"),
    ("--similar -1", "nothing to write; "),
    ("--out x.csv", "--out x.csv: give a name that ends in .npz"),
    ("--map x.gif", "--map x.gif: give a name that ends in .png or .jpg"),
    ("--out /no/such/x.npz", "no folder /no/such; make it first"),
    ("--out {}/x.npz --data {}", "no picture (left out: 1 .md); give a folder"),
    ("--out {}/x.npz --data {}/none", "/none: "),
    ("--out {}/x.npz --features pixels", "argument --features: invalid choice: 'pixels'"),
    ("--out {}/x.npz --workers -1", "--workers -1: give 0 or more"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, words, features, tmp_path, capsys):
    (tmp_path / "readme.md").write_text("no picture")
    with pytest.raises(SystemExit) as stop, common.exit_status():
        features(*flags.format(*[tmp_path] * 2).split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["readme.md"]
