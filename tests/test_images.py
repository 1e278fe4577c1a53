"""Any set of pictures in: the embedded set, torchvision's, tensors and folders of every layout; decoding; streaming."""

import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import common
import images
from tests.helpers import kolmogorov_smirnov, largest_difference, python

CPU = torch.device("cpu")


def load(name, image_size=32, **given):
    return images.load(str(name), image_size, CPU, **{"workers": 2} | given)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def noise(h, w, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (h, w, *channels), dtype=np.uint8)


def plain(value, h=32, w=32):
    return np.full((h, w, 3), value, np.uint8)


def classed(root, n=40, classes="ab"):
    """n pictures, each of one grey level of its own, its index; the class goes round."""
    for i in range(n):
        write(root / classes[i % len(classes)] / f"{i:03}.png", plain(i % 256))
    return root


def levels(split):
    """The grey level of each resident picture of `classed`."""
    return split.images[split.rows].flatten(1).float().mean(1).long().tolist()


# ----------------------------------------------------------------------------------------------------------- sets


def test_shapes_are_the_same_for_a_seed_and_balanced():
    (a, la), (b, lb) = (images.make_shapes(200, 0) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(la, lb) and not torch.equal(a, images.make_shapes(200, 1)[0])
    assert a.shape == (200, 3, 32, 32) and a.dtype == torch.uint8 and la.bincount().tolist() == [20] * 10
    assert images.make_shapes(10, 0, 48)[0].shape == (10, 3, 48, 48)


def test_the_label_of_a_shape_is_the_one_drawn():
    (a, la), (b, lb) = images.make_shapes(1000, 0), images.make_shapes(200, 1)
    a, b = (x.float().flatten(1) for x in (a, b))
    assert common.knn_accuracy(a - a.mean(0), la, b - a.mean(0), lb, k=1) > 0.25  # chance: 0.1


def test_the_embedded_set_has_held_out_pictures_of_its_own(few_shapes):
    data = load("shapes")
    assert (len(data.train), len(data.test)) == (200, 40) and data.labelled and data.classes == list(images.SHAPES)
    assert not torch.equal(data.train.images[:40], data.test.images)
    assert "shapes: 200 images, 40 held out; 10 classes: disc, ring" in data.describe()


class FakeCIFAR:
    """The layout of torchvision's class, without its download."""

    def __init__(self, root, download, train):
        n = 10 if train else 4
        self.classes, self.targets = ["cat", "dog"], [i % 2 for i in range(n)]
        self.data = np.stack([plain([i, 2 * i, 3 * i], 32, 30) for i in range(n)])  # (N, H, W, 3)


class FakeSTL(FakeCIFAR):
    def __init__(self, root, download, split):
        super().__init__(root, download, train=split == "train+unlabeled")
        assert split in ("train+unlabeled", "test")
        self.labels = np.array([-1 if i > 5 else y for i, y in enumerate(self.targets)])
        self.data = self.data.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("name, fake", [("cifar10", FakeCIFAR), ("cifar100", FakeCIFAR), ("stl10", FakeSTL)])
def test_named_sets_come_from_torchvision(name, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(f"torchvision.datasets.{name.upper()}", fake)
    data = load(name, data_dir=str(tmp_path))
    assert data.train.images.shape == (10, 3, 32, 30) and len(data.test) == 4 and data.labelled
    assert data.train.images[:, :, 5, 5].tolist() == [[i, 2 * i, 3 * i] for i in range(10)]
    expected = [i % 2 for i in range(10)] if fake is FakeCIFAR else [0, 1] * 3 + [-1] * 4
    assert data.train.labels.tolist() == expected and data.test.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_a_download_that_fails_is_one_line(name, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(images.InputError, match=f"--data {name}: no files in .*the download failed .*Network") as found:
        load(name, data_dir=str(tmp_path / "none"))
    assert "\n" not in str(found.value)


def test_tensors_of_ones_own():
    pictures, labels = (
        torch.from_numpy(np.stack([plain(i).transpose(2, 0, 1) for i in range(45)])),
        torch.arange(45) % 2,
    )
    labels[40:] = -1
    data = images.from_tensors(pictures, labels, CPU)
    assert (len(data.train), len(data.test)) == (41, 4) and data.labelled and data.classes == ["0", "1"]
    assert levels(data.test) == [18, 19, 38, 39]  # every tenth of each class; none without a label
    assert levels(data.train) == [i for i in range(45) if i not in (18, 19, 38, 39)]
    for split in (data.train, data.test):
        assert split.labels.tolist() == [i % 2 if i < 40 else -1 for i in levels(split)]
    data = images.from_tensors(pictures, None, CPU)
    assert (len(data.train), data.test, data.labelled) == (45, None, False) and (data.train.labels == -1).all()
    assert levels(images.from_tensors(pictures[:6], labels[:6], CPU).test) == [4, 5]  # at least one of a class
    assert images.from_tensors(pictures[:2], labels[:2], CPU).test is None  # but none of one


@pytest.mark.parametrize(
    "pictures, labels, words",
    [
        (torch.zeros(4, 3, 8, 8), None, "uint8"),
        (torch.zeros(4, 8, 8, 3, dtype=torch.uint8), None, r"\(4, 8, 8, 3\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), None, r"\(3, 8, 8\)"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(3), r"labels must be \(4,\).*got \(3,\)"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 1), r"labels must be \(4,\).*got \(4, 1\)"),
    ],
)
def test_tensors_of_the_wrong_kind(pictures, labels, words):
    with pytest.raises(images.InputError, match=words):
        images.from_tensors(pictures, labels, CPU)


# -------------------------------------------------------------------------------------------------------- folders


def test_a_folder_of_classes_holds_out_every_tenth_image(tmp_path):
    data = load(classed(tmp_path))
    assert data.classes == ["a", "b"] and (len(data.train), len(data.test)) == (36, 4)
    assert levels(data.test) == [18, 38, 19, 39] and data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.train.labels.tolist() == [i % 2 for i in levels(data.train)]
    assert sorted(levels(data.train) + levels(data.test)) == list(range(40))
    assert "36 images, 4 held out; 2 classes: a, b; 32x32, resident on cpu" in data.describe()


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_train_and_test_folders(tmp_path, held_out):
    for split, n in (("train", 20), (held_out, 4)):
        for i in range(n):
            write(tmp_path / split / "xy"[i % 2] / f"{i}.JPG", plain(i, 20, 30))
    write(tmp_path / held_out / "unseen" / "0.jpg", plain(0, 20, 30))
    write(tmp_path / "elsewhere" / "x" / "0.jpg", plain(0, 20, 30))
    data = load(tmp_path)
    assert (len(data.train), len(data.test)) == (20, 4) and data.classes == ["x", "y"]  # none of train/ is held out
    assert data.train.images.shape[2:] == (20, 30)  # small pictures of one size are kept as they are
    assert data.test.labels.tolist() == [i % 2 for i in levels(data.test)]


def test_a_test_folder_wins_over_val_and_its_absence_holds_out_of_train(tmp_path):
    classed(tmp_path / "train", 40)
    assert (len((data := load(tmp_path)).train), len(data.test)) == (36, 4)
    classed(tmp_path / "val", 6)
    assert (len((data := load(tmp_path)).train), len(data.test)) == (40, 6)
    classed(tmp_path / "test", 2)
    assert (len((data := load(tmp_path)).train), len(data.test)) == (40, 2)


@pytest.mark.parametrize("layout", ["flat", "one class", "train and test without classes"])
def test_pictures_without_classes_have_no_labels(tmp_path, layout):
    below = {"flat": "", "one class": "holiday", "train and test without classes": "train"}[layout]
    for i in range(20):
        write(tmp_path / below / f"{i}.png", noise(40, 30 + i, 3, seed=i))
    if below == "train":
        write(tmp_path / "test" / "0.png", noise(40, 30, 3))
    data = load(tmp_path)
    assert len(data.train) == 20 and (data.train.labels == -1).all() and data.classes == [] and not data.labelled
    assert (len(data.test) if data.test else 0) == (below == "train") and "; no labels; 37x37" in data.describe()
    assert data.train.sizes.tolist() == [[40, int(30 + i)] for i in sorted(range(20), key=str)]


def test_links_hidden_folders_and_stray_pictures(tmp_path):
    """Linked class folders count, hidden ones do not, and a picture beside the classes is one without a label."""
    for i in range(20):
        write(tmp_path / "elsewhere" / "b" / f"{i:02}.png", plain(i))
        write(tmp_path / "photos" / "a" / "deeper" / f"{i:02}.png", plain(100 + i))
    (tmp_path / "photos" / "b").symlink_to(tmp_path / "elsewhere" / "b", target_is_directory=True)
    write(tmp_path / "photos" / ".thumbnails" / "x.png", plain(0))
    write(tmp_path / "photos" / "a" / "._00.png", plain(0))
    write(tmp_path / "photos" / "cover.png", plain(0))
    data = load(tmp_path / "photos")
    assert data.classes == ["a", "b"] and len(data.test) == 4
    assert sorted(data.train.labels.tolist()) == [-1] + [0] * 18 + [1] * 18


@pytest.mark.parametrize("resident_gb", [4, 0])
def test_damaged_files_are_named_skipped_and_counted(resident_gb, tmp_path, capsys, monkeypatch):
    root = classed(tmp_path)
    write(root / "a" / "cut.png", noise(32, 32, 3))
    whole = (root / "a" / "cut.png").read_bytes()
    (root / "a" / "cut.png").unlink()
    (root / "a" / "000broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is not a JPEG")
    (root / "a" / "script.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n"
    )  # no Ghostscript for it
    (root / "b" / "empty.png").write_bytes(b"")
    write(root / "b" / "dot.png", plain(0, 40, images.SMALLEST_SIDE - 1))
    monkeypatch.setattr(images, "MOST_PIXELS", 32 * 32)
    write(root / "b" / "huge.png", plain(0, 32, 33))
    why = {
        "000broken.jpg": "damaged: Truncated",
        "script.jpg": "not an image",
        "empty.png": "not an image",
        "dot.png": "too small: 7x40 pixels",
        "huge.png": "too large: 33x32 pixels, more than 1,024",
    }
    if resident_gb:  # streamed pictures are only decoded later
        (root / "a" / "000cut.png").write_bytes(whole[: len(whole) // 2])
        why["000cut.png"] = "damaged: "
    data = load(root, resident_gb=resident_gb)
    err = capsys.readouterr().err
    assert sorted(os.path.basename(path) for path, _ in data.skipped) == sorted(why)
    assert err.count("\n") == len(why) and all(err.count(f"/{name}: {words}") == 1 for name, words in why.items())
    for said in ("2 not an image", "1 too small", "1 too large", f"{1 + bool(resident_gb)} damaged"):
        assert said in data.describe()
    assert len(data.train) + len(data.test) == 40
    if resident_gb:  # and the rest kept their labels
        assert levels(data.test) == [18, 38, 19, 39]
        assert all(split.labels.tolist() == [i % 2 for i in levels(split)] for split in (data.train, data.test))


TWENTY = {f"{name}/{i}.png": 1 for name in "ab" for i in range(10)}  # path -> a whole picture, or a damaged one
LAYOUTS = {  # files -> (images to train on, held out, classes, what is left out)
    "other names": (
        {f"Training/{p}": 1 for p in TWENTY} | {"Testing/a/1.png": 1, "Testing/b/1.png": 1},
        (20, 2, "ab", {}),
    ),
    "a flat val": ({f"train/{p}": 1 for p in TWENTY} | {"val/1.png": 1}, (18, 2, "ab", {"in no class of train": 1})),
    "classes of one split": (
        {f"train/{p}": 1 for p in TWENTY} | {"train/c/1.png": 1, "valid/a/1.png": 1, "valid/d/1.png": 1},
        (21, 1, "abc", {"in no class of train": 1}),
    ),
    "val beside test": (
        {f"train/{p}": 1 for p in TWENTY} | {"val/a/1.png": 1, "test/b/1.png": 1, "more.png": 1},
        (20, 1, "ab", {"in neither train nor test": 2}),
    ),
    "no picture in a class": (
        TWENTY | {"c/notes.txt": 1, "d/1.png": 0},
        (18, 2, "ab", {"of type .txt": 1, "damaged": 1}),
    ),
    "few pictures": ({"a/1.png": 1, "a/2.png": 1, "b/1.png": 1, "c/1.png": 1, "c/2.png": 1}, (3, 2, "abc", {})),
    "trains among classes": (
        {f"{name}/{i}.png": 1 for name in ("bus", "train") for i in range(4)},
        (6, 2, ["bus", "train"], {}),
    ),
    "one class": ({f"Train/a/{i}.png": 1 for i in range(3)} | {"test/b/1.png": 1}, (3, 1, [], {})),
    "hidden": (TWENTY | {".thumbs/1.png": 1, "a/._1.png": 1}, (18, 2, "ab", {"hidden": 2})),
    "a flat test beside val": (
        {f"train/{p}": 1 for p in TWENTY} | {"val/a/1.png": 1, "test/1.png": 1, "test/2.png": 1},
        (20, 1, "ab", {"in neither train nor test": 2}),
    ),
    "names with more": (
        {f"set/training_set/{p}": 1 for p in TWENTY} | {"set/test_set/a/1.png": 1, "set/val2017/a/1.png": 1},
        (20, 1, "ab", {"in neither train nor test": 1}),
    ),
    "trains among loose pictures": (
        {f"{i}.png": 1 for i in range(5)} | {"Train/1.png": 1, "Train/2.png": 1, "bus/1.png": 1, "bus/2.png": 1},
        (7, 2, ["Train", "bus"], {}),
    ),
    "thumbnails": (TWENTY | {"a/@eaDir/1.png": 1, "__MACOSX/a/1.png": 1}, (18, 2, "ab", {"hidden": 2})),
    "a run's pictures": (
        TWENTY
        | {f"runs/old/{name}": 1 for name in ("views.png", "log.csv", "config.json")}
        | {"runs/new/views.png": 1},
        (18, 2, "ab", {"a run's folder": 2}),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_is_understood_or_what_was_not_is_told(name, tmp_path):
    files, (train, test, classes, left_out) = LAYOUTS[name]
    write(tmp_path / "whole.png", noise(16, 16, 3))
    whole = (tmp_path / "whole.png").read_bytes()
    for path, good in files.items():
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / path).write_bytes(whole if good else whole[:200])
    data = load(tmp_path / "photos", 16, out=str(tmp_path / "photos" / "runs" / "new"))
    assert (len(data.train), len(data.test), data.classes) == (train, test, list(classes))
    assert dict((why, n) for n, why in images.reasons(data.skipped)) == left_out
    assert all(f"{n} {why}" in data.describe() for why, n in left_out.items())
    named = {
        path: label for split in (data.train, data.test) for path, label in zip(split.paths, split.labels, strict=True)
    }
    for path, label in named.items():
        assert (data.classes[label] if label >= 0 else "") in (path.parent.name, "")
    assert (name == "one class") == all(label < 0 for label in named.values())


def test_each_real_folder_and_file_is_visited_once(tmp_path):
    for i in range(10):
        write(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", plain(i))
    write(tmp_path / "elsewhere" / "c" / "1.png", plain(50))
    links = {"a/back": "..", "a/out": "../..", "b/again": "../a", "b/same.png": "9.png", "c": "../elsewhere/c"}
    for name, target in links.items():
        (tmp_path / "photos" / name).symlink_to(target)
    (tmp_path / "photos" / "a" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "photos" / "a" / "pipe.png")  # opening it would wait for ever
    data = load(tmp_path / "photos")
    both = levels(data.train) + levels(data.test)
    assert sorted(both) == [*range(10), 50] and len(data.classes) == 3
    again = [path for path, why in data.skipped if why == "there already, by another name"]
    assert {os.path.relpath(path, tmp_path / "photos") for path in again} >= {"a/back", "b/same.png"}
    assert dict((why, n) for n, why in images.reasons(data.skipped))["no regular file"] == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_told(tmp_path):
    root = classed(tmp_path, 20)
    (root / "c").mkdir(mode=0)
    assert "unreadable: Permission denied" in str(load(root).skipped)


def test_more_than_twenty_damaged_files_are_counted(tmp_path, capsys):
    for i in range(25):
        (tmp_path / f"{i}.jpg").write_text("no picture")
    write(tmp_path / "good.png", plain(0, images.SMALLEST_SIDE, images.SMALLEST_SIDE))
    assert len(load(tmp_path).train) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 21 and err[-1] == "warning: skipped 5 more like these"


def nothing(tmp_path, what):
    root = tmp_path / "photos"
    if what == "a file":
        root.write_text("")
    elif what != "nowhere":
        root.mkdir()
    if what == "text":
        (root / "notes.txt").write_text("no picture")
    if what == "damaged":
        (root / "a.jpg").write_text("no picture")
    if what == "no train":
        (root / "train").mkdir()
        write(root / "test" / "0.png", plain(0))
    return root


@pytest.mark.parametrize("resident_gb", [4, 0])
@pytest.mark.parametrize(
    "what, words",
    [
        ("nowhere", "no such folder; give a folder of images or one of shapes, cifar10, cifar100, stl10"),
        ("a file", "no such folder"),
        ("empty", "no image to train on: it is empty; looked for .bmp"),
        ("text", "no image to train on: 1 of type .txt"),
        ("damaged", "no image to train on: 1 not an image"),
        ("no train", "no image to train on: "),
    ],
)
def test_where_nothing_is_usable_one_line_says_so(what, words, resident_gb, tmp_path):
    root = nothing(tmp_path, what)
    with pytest.raises(images.InputError, match=f"^--data {root}: {words}") as found:
        load(root, resident_gb=resident_gb)
    assert "\n" not in str(found.value)


# ------------------------------------------------------------------------------------------------------- decoding


def test_every_kind_of_picture_is_decoded(tmp_path):
    """Colour, transparent, grey, palette, 1-bit, 16-bit, float, CMYK: uint8 RGB of the right pixels."""
    on_white = lambda alpha: np.round(alpha / 255.0 * rgb + 255 - alpha)  # noqa: E731
    rgb, grey = noise(12, 9, 3), noise(12, 9)
    grey3 = np.stack([grey] * 3, 2)
    black = grey > 127
    made = {
        "rgb.png": (Image.fromarray(rgb), rgb),
        "rgba.png": (Image.fromarray(np.concatenate([rgb, noise(12, 9, 1)], 2)), on_white(noise(12, 9, 1))),
        "grey.png": (Image.fromarray(grey), grey3),
        "grey-alpha.png": (Image.fromarray(np.stack([grey, 255 - 0 * grey], 2)), grey3),
        "bits.png": (Image.fromarray(black), np.stack([black * np.uint8(255)] * 3, 2)),
        "16-bit.png": (Image.fromarray(grey.astype(np.uint16) * 257), grey3),
        "16-bit.tif": (Image.fromarray(grey.astype(np.uint16) * 256 + 255), grey3),
        "32-bit.tif": (Image.fromarray(grey.astype(np.int32) * 257), grey3),
        "large.tif": (Image.fromarray(grey.astype(np.int32) * 70_000), grey3 * (255 / grey.max())),
        "dark.pgm": (Image.fromarray(grey.astype(np.uint16)), grey3 * 0),
        "palette.gif": (few := Image.fromarray(rgb).quantize(64), np.asarray(few.convert("RGB"))),
        "float.tif": (Image.fromarray(grey.astype(np.float32) / 255), grey3),
        "float-passing-1.tif": (Image.fromarray(grey.astype(np.float32) / 255 * 1.03), np.minimum(grey3 * 1.03, 255)),
        "12-bit.tif": (Image.fromarray(grey.astype(np.int32) * 16), grey3 * (255 / grey.max())),
        "float-255.tif": (Image.fromarray(grey.astype(np.float32)), grey3),
        "negative.tif": (Image.fromarray(grey.astype(np.float32) - grey.max()), grey3 * (255 / grey.max())),
        "cmyk.tif": (ink := Image.fromarray(rgb).convert("CMYK"), np.asarray(ink.convert("RGB"))),
    }
    for name, (picture, expected) in made.items():
        picture.save(tmp_path / name)
        pixels, size = images.decode(tmp_path / name)
        assert size == (12, 9) and pixels.shape == (12, 9, 3) and pixels.dtype == np.uint8, name
        assert np.abs(pixels - expected).max() <= 1, name
        assert images.decode(tmp_path / name, (16, 16))[0].shape == (16, 16, 3), name
    Image.fromarray(np.full((12, 9), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="not all finite"):
        images.decode(tmp_path / "nan.tif")
    ink.save(tmp_path / "cmyk.jpg", quality=95)
    assert images.decode(tmp_path / "cmyk.jpg")[0].shape == (12, 9, 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation, turned", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_pictures_are_turned_upright_as_exif_says(orientation, turned, suffix, tmp_path):
    rgb, exif = np.kron(noise(3, 2, 3), np.ones((60, 60, 1))).astype(np.uint8), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / f"x.{suffix}", exif=exif, quality=100, lossless=True)
    pixels, size = images.decode(tmp_path / f"x.{suffix}")
    assert (
        size == pixels.shape[:2]
        and np.abs(pixels - np.rot90(rgb, turned).astype(int)).mean() < 6 * (suffix == "jpg") + 0.1
    )
    pixels, again = images.decode(tmp_path / f"x.{suffix}", (16, 20))  # of a JPEG, at a reduced scale
    assert again == size and pixels.shape == (16, 20, 3)


def test_a_large_jpeg_is_decoded_at_a_reduced_scale_to_the_same_picture(tmp_path):
    y, x = np.mgrid[:600, :800] / 800
    smooth = (np.stack([x, y, 1 - x], 2) * 255).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "x.jpg", quality=95)
    pixels, size = images.decode(tmp_path / "x.jpg", (37, 37))
    expected = np.asarray(Image.fromarray(smooth).resize((37, 37), Image.Resampling.BILINEAR))
    assert size == (600, 800) and np.abs(pixels.astype(int) - expected).max() <= 3


# ------------------------------------------------------------------------------------------------------ streaming


def test_the_pictures_are_resident_up_to_resident_gb_and_streamed_above(tmp_path):
    root, taken = classed(tmp_path, 20), 20 * 3 * 37 * 37 / 1e9  # GB, at 8/7 of the view's side
    assert load(root, resident_gb=taken).train.images is not None
    data = load(root, resident_gb=taken * 0.999)
    assert data.train.images is None and data.test.images is None and "; streamed by workers" in data.describe()


def test_streamed_views_are_the_resident_ones_whatever_the_workers_and_the_order(tmp_path):
    for i in range(20):
        write(tmp_path / "ab"[i % 2] / f"{i:02}.png", noise(32, 32, 3, seed=i // 2))
    resident, streamed = load(tmp_path), load(tmp_path, resident_gb=0)
    assert torch.equal(resident.train.labels, streamed.train.labels)
    (a,), (b,) = (next(iter(data.train.views([torch.arange(18)], [(32, None)]))) for data in (resident, streamed))
    assert torch.allclose(a, b, atol=1e-6)

    def crops(batches, workers, seed):
        views = streamed.train.views(batches, [(24, (0.2, 1.0))] * 2, seed, workers)
        return torch.cat([torch.stack(v, 1) for v in views])

    before = torch.get_rng_state()
    one = crops(torch.arange(18).split(6), 1, 5)
    assert torch.equal(torch.get_rng_state(), before)  # else a resumed run would go on differently
    assert one.shape == (18, 2, 3, 24, 24) and not torch.equal(one[:, 0], one[:, 1])
    assert not torch.equal(one[0], one[9])  # the same picture, but draws of their own
    assert torch.equal(one, crops(torch.arange(18).split(9), 2, 5))
    assert torch.equal(one.flip(0), crops(torch.arange(18).flip(0).split(6), 1, 5))
    assert not torch.equal(one, crops(torch.arange(18).split(6), 1, 6))


def test_large_batches_are_streamed_in_pieces(tmp_path):
    data = load(classed(tmp_path, 40), resident_gb=0)
    index = torch.arange(36).repeat(9)  # 324: a piece of 256 and one of 68
    one, other, small = next(data.train.views([index], [(16, None), (16, (0.5, 1.0)), (8, None)], workers=2))
    assert one.shape == other.shape == (324, 3, 16, 16) and torch.equal(one[:36], one[288:])
    assert small.shape == (324, 3, 8, 8) and torch.equal(small[:36], small[288:])


@pytest.mark.parametrize("gb", [4, 0], ids=["resident", "streamed"])
def test_crops_of_several_kinds_are_each_of_its_own_size_and_range(gb, tmp_path):
    """Of a picture whose value is its column, the spread of a crop is its width."""
    for i in range(100):
        Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (128, 1))).save(tmp_path / f"{i}.png")
    split = load(tmp_path, 128, resident_gb=gb).train
    large, small = next(split.views([torch.arange(100)], [(32, (0.5, 1.0)), (16, (0.05, 0.1))], workers=1))
    assert large.shape[-1] == 32 and small.shape[-1] == 16
    widths = [(x.amax((1, 2, 3)) - x.amin((1, 2, 3))) * 255 / 128 * s / (s - 1) for x, s in ((large, 32), (small, 16))]
    assert widths[0].min() > (0.5 * 3 / 4) ** 0.5 - 0.05 and widths[1].max() < (0.1 * 4 / 3) ** 0.5 + 0.05


def test_a_file_that_is_damaged_later_is_told_once_and_replaced_by_any_of_its_class(tmp_path, capfd):
    data = load(classed(tmp_path), resident_gb=0)
    broken = data.train.paths[3]
    broken.write_bytes(broken.read_bytes()[:40])
    alike = {round(level / 255, 4) for level in range(0, 40, 2)}  # the grey levels of its class
    seen = set()
    for seed in range(8):
        (view,) = next(data.train.views([torch.tensor([3, 4])], [(32, (0.9, 1.0))], seed=seed, workers=1))
        seen.add(round(view[0].mean().item(), 4))
    assert len(seen) > 2 and seen <= alike
    assert capfd.readouterr().err.count(f"warning: skipped {broken}: ") == 1


def test_a_damaged_file_that_is_the_last_of_its_class_has_a_stand_in_too(tmp_path):
    classed(tmp_path, 40)
    write(tmp_path / "c" / "0.png", plain(0))
    write(tmp_path / "c" / "1.png", plain(0))
    data = load(tmp_path, resident_gb=0)
    alone = int((data.test.labels == 2).nonzero())
    data.test.paths[alone].write_bytes(b"no picture")
    (view,) = next(data.test.views([torch.tensor([alone])], [(32, None)], workers=1))
    assert view.shape == (1, 3, 32, 32)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_format_that_pillow_can_write_is_decoded(mode, tmp_path):
    """A bright half beside a dark one, in whatever mode, is one when it is read."""
    picture = np.zeros((20, 30), np.uint8)
    picture[:, 15:] = 200
    grey = Image.fromarray(picture)
    if mode[0] == "I":
        deep = picture.astype(np.uint16) * 256
        made = Image.frombytes(mode, grey.size, deep.astype({"I": "i4", "I;16": "<u2", "I;16B": ">u2"}[mode]).tobytes())
    elif mode == "PA":
        made = grey.convert("LA").convert("PA")
    elif mode == "LAB":
        made = Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2])
    else:
        made = grey.convert("RGB").convert(mode) if mode in ("HSV", "YCbCr", "CMYK", "RGBX") else grey.convert(mode)
    written = 0
    for suffix in sorted(images.SUFFIXES):
        path = tmp_path / f"x{suffix}"
        try:
            made.save(path)
        except (OSError, KeyError, ValueError, AttributeError):  # not in this format
            continue
        written += 1
        try:
            pixels, size = images.decode(path)
        except ValueError as error:  # a mode that Pillow cannot convert is named
            assert mode == "LAB" and "conversion" in images.reason(error)
            continue
        assert size == (20, 30) and pixels.shape == (20, 30, 3) and pixels.dtype == np.uint8, suffix
        dark, bright = pixels[:, 2:12].mean(), pixels[:, 18:28].mean()
        assert dark < 30 and 180 < bright <= 255, (suffix, dark, bright)
    assert written


def test_odd_metadata_leave_a_picture_whole(tmp_path):
    rgb = noise(20, 30, 3)
    Image.fromarray(rgb).save(tmp_path / "x.png", exif=b"Exif\0\0no such thing")
    assert np.array_equal(images.decode(tmp_path / "x.png")[0], rgb)


def test_a_name_that_is_no_utf_8(tmp_path):
    classed(tmp_path / "photos", 20)
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "photos" / f"{name}.txt").write_text("")
    write(tmp_path / "photos" / name / "1.png", plain(3))
    data = load(tmp_path / "photos")
    assert len(data.classes) == 3 and data.describe().encode()
    common.save_whole(data.skipped[0][0], tmp_path / "skipped.txt")


def test_the_runs_folder_is_not_the_folder_of_images(tmp_path):
    with pytest.raises(images.InputError, match="--out .*: this is the folder of images; choose another"):
        load(classed(tmp_path), out=f"{tmp_path}/.")


def test_a_folder_that_vanishes_is_one_line(tmp_path):
    data = load(classed(tmp_path), resident_gb=0)
    for path in data.train.paths:
        path.unlink()
    with pytest.raises(images.InputError) as found:
        next(data.train.views([torch.tensor([0])], [(32, None)], workers=1))
    assert str(found.value) == "a hundred images in a row cannot be decoded; is the folder still there?"


def ramp(h, w):
    """A picture whose red tells the row and whose green the column."""
    y, x = (np.mgrid[:h, :w] + 0.5) / np.array([h, w]).reshape(2, 1, 1)
    return (np.stack([y, x, 0 * x], 2) * 255).round().astype(np.uint8)


def test_the_central_view_of_a_photo_is_the_same_resident_and_streamed(tmp_path):
    for i, shape in enumerate([(240, 160), (100, 300), (128, 128)]):
        write(tmp_path / f"{i}.png", ramp(*shape))
    crop = [(96, None)]
    (a,), (b,) = (
        next(load(tmp_path, 96, resident_gb=gb).train.views([torch.arange(3)], crop, workers=1)) for gb in (4, 0)
    )
    assert largest_difference(a, b) < 0.02


def test_a_streamed_view_is_cut_from_the_whole_picture_and_antialiased(tmp_path):
    write(tmp_path / "0.png", picture := noise(128, 200, 3))
    (view,) = next(load(tmp_path, resident_gb=0).train.views([torch.tensor([0])], [(32, None)], workers=1))
    whole = torch.from_numpy(picture[:, 36:164]).permute(2, 0, 1)[None] / 255
    assert largest_difference(view, TF.resize(whole, [32, 32], antialias=True)) < 2 / 255


@pytest.mark.slow
def test_resident_and_streamed_crops_are_of_one_distribution(tmp_path):
    """Of a photo that is kept squeezed: the edges of the crop, read off a ramp, its area and its shape."""
    n = 1500
    write(tmp_path / "one.png", ramp(90, 160))
    (tmp_path / "links").mkdir()
    for i in range(n):
        os.link(tmp_path / "one.png", tmp_path / "links" / f"{i}.png")
    torch.manual_seed(0)
    found = []
    for gb in (4, 0):
        split = load(tmp_path / "links", resident_gb=gb).train
        x = torch.cat([v for (v,) in split.views(torch.arange(n).split(250), [(32, (0.08, 1.0))], workers=2)])
        edges = [x[:, 0, 0].mean(1), x[:, 0, -1].mean(1), x[:, 1, :, 0].mean(1), x[:, 1, :, -1].mean(1)]
        height, width = edges[1] - edges[0], edges[3] - edges[2]
        found.append([*edges, height * width, height / width])
    for resident, streamed in zip(*found, strict=True):  # the squeezed copy's borders are read off by 1% of the side
        blurred = (values + 0.06 * torch.rand(n) for values in (resident, streamed))
        assert kolmogorov_smirnov(*blurred) < 1


# --------------------------------------------------------------------------------------------------- real pictures


def test_real_pictures_load_resident_and_streamed(cifar10_folder, tmp_path):
    """Some of CIFAR-10's JPEG files, as the folder has them."""
    for split, n in (("train", 12), ("test", 3)):
        for folder in (cifar10_folder / split).iterdir():
            (tmp_path / split / folder.name).mkdir(parents=True)
            for path in itertools.islice(sorted(folder.iterdir()), n):
                (tmp_path / split / folder.name / path.name).symlink_to(path)
    resident, streamed = load(tmp_path), load(tmp_path, resident_gb=0)
    assert (len(resident.train), len(resident.test)) == (120, 30) and len(resident.classes) == 10
    assert resident.train.images.shape[1:] == (3, 32, 32) and not resident.skipped and resident.labelled
    assert resident.train.labels.bincount().tolist() == [12] * 10
    index = torch.arange(0, 120, 7)
    (a,), (b,) = (next(iter(data.train.views([index], [(32, None)], workers=1))) for data in (resident, streamed))
    assert torch.allclose(a, b, atol=1e-6)
    first = sorted((tmp_path / "train" / resident.classes[0]).iterdir())[0]
    pixels = torch.from_numpy(np.array(Image.open(first).convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(resident.train.images[resident.train.rows[0]], pixels)


def test_arrays_and_lists_will_do():
    pictures = np.zeros((20, 3, 8, 8), np.uint8)
    data = images.from_tensors(pictures, [0.0, 1.0] * 10, torch.device("cpu"))
    assert (len(data.train), len(data.test), data.train.labels.dtype) == (18, 2, torch.int64)
    with pytest.raises(images.InputError, match="data must be uint8"):
        images.from_tensors(pictures[:0], None, torch.device("cpu"))


GROWTH = """
import re, sys
import torch, images
peak = lambda: 1024 * int(re.search(r"VmHWM: *\\t? *(\\d+)", open("/proc/self/status").read())[1])
few, many = (images.load(name, 224, torch.device("cpu"), workers=2) if name else peak() for name in (sys.argv[1], ""))
data = images.load(sys.argv[2], 224, torch.device("cpu"), workers=2)
print((peak() - many) / data.train.images.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of the memory is read off /proc")
def test_a_resident_set_takes_its_size_in_memory_once(tmp_path):
    for name, n in (("few", 4), ("many", 1000)):
        classed(tmp_path / name, n - 2)
        for i in range(2):
            (tmp_path / name / "a" / f"damaged{i}.png").write_bytes(b"no picture")
        write(tmp_path / name / "b" / "large.png", plain(0, 600, 700))  # not all of one size, so all are squares of 256
    done = python("-c", GROWTH, tmp_path / "few", tmp_path / "many")
    assert 0.9 < float(done.stdout.split()[-1]) < 1.2, done.stdout + done.stderr
