"""Any set of pictures in: the embedded set, torchvision's, arrays and folders of every layout; decoding; streaming."""

import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import images
from tests.helpers import kolmogorov_smirnov, largest_difference

CPU = torch.device("cpu")


def load(name, image_size=32, **given):
    """The set of that name, resident and read in this process, unless `given` says otherwise."""
    config = {"data": str(name), "image_size": image_size, "data_dir": "none", "resident_gb": 4.0, "workers": 0}
    return images.load(SimpleNamespace(**config | {"span": None} | given), CPU)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def noise(h, w, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (h, w, *channels), dtype=np.uint8)


def plain(value, h=32, w=32):
    return np.full((h, w, 3), value, np.uint8)


def ramp(h, w):
    """A picture whose red tells the row and whose green tells the column."""
    y, x = (np.mgrid[:h, :w] + 0.5) / np.array([h, w]).reshape(2, 1, 1)
    return (np.stack([y, x, 0 * x], 2) * 255).round().astype(np.uint8)


def classed(root, n=40):
    """n pictures in the classes a and b in turn. Each has a grey level of its own, its number."""
    for i in range(n):
        write(root / "ab"[i % 2] / f"{i:03}.png", plain(i % 256))
    return root


def numbers(split):
    return [int(Path(path).stem) for path in split.paths]


def view_of(split, rows, size=32, **how):
    """The central view of these images."""
    (view,) = next(split.views([torch.as_tensor(rows)], [(size, None)], **{"workers": 0} | how))
    return view


def levels(split):
    """The grey level of each picture of `classed`."""
    return view_of(split, range(len(split))).mul(255).round().mean((1, 2, 3)).long().tolist()


# ------------------------------------------------------------------------------------------------- sets and arrays


def test_shapes_are_the_same_for_a_seed_balanced_and_drawn_as_labelled():
    (a, la), (again, _), (b, lb) = (images.make_shapes(n, seed) for n, seed in ((1000, 0), (1000, 0), (200, 1)))
    assert torch.equal(a, again) and a.dtype == torch.uint8 and la.bincount().tolist() == [100] * 10
    nearest = torch.cdist(b.float().flatten(1), a.float().flatten(1)).argmin(1)
    assert (la[nearest] == lb).float().mean() > 0.2  # chance: 0.1


def test_the_embedded_set_has_held_out_pictures_of_its_own(monkeypatch):
    make = images.make_shapes
    monkeypatch.setattr(images, "make_shapes", lambda n, seed, size: make(n // 50, seed, size))
    data = load("shapes", 16)
    assert (len(data.train), len(data.test)) == (200, 40) and data.labelled and data.classes == list(images.SHAPES)
    assert data.train.pixels.shape[2:] == (16, 16) and not torch.equal(data.train.pixels[:40], data.test.pixels)
    assert "shapes: 200 images, 40 held out; 10 classes disc, ring" in data.describe()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_named_sets_come_from_torchvision(name, monkeypatch):
    def fake(root, download, train=None, split=None):
        assert split in (("train+unlabeled", "test") if name == "stl10" else (None,))
        n = 10 if train or split == "train+unlabeled" else 4
        data = np.stack([plain([i, 2 * i, 3 * i], 32, 30) for i in range(n)])  # (N, H, W, 3)
        kept = {"labels": np.array([0, 1, 0, 1, 0, 1, -1, -1, -1, -1][:n])} if split else {"targets": [0, 1] * (n // 2)}
        return SimpleNamespace(data=data.transpose(0, 3, 1, 2) if split else data, classes=["cat", "dog"], **kept)

    monkeypatch.setattr(f"torchvision.datasets.{name.upper()}", fake)
    data = load(name)
    assert data.train.pixels.shape == (10, 3, 32, 30) and data.labelled and data.classes == ["cat", "dog"]
    assert data.train.pixels[:, :, 5, 5].tolist() == [[i, 2 * i, 3 * i] for i in range(10)]
    assert data.train.labels.tolist() == ([0, 1] * 3 + [-1] * 4 if name == "stl10" else [0, 1] * 5)
    assert data.test.labels.tolist() == [0, 1, 0, 1] and len(data.test.pixels) == 4


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(images.InputError, match=f"^--data cifar10: .*{tmp_path}.* Network is unreachable; [^\n]*$"):
        load("cifar10", data_dir=str(tmp_path))


def test_a_set_of_ones_own_holds_out_a_tenth_of_each_class():
    pictures = torch.from_numpy(np.stack([plain(i, 8, 8).transpose(2, 0, 1) for i in range(45)]))
    labels = [-1 if i >= 40 else "cat" if i % 2 else "dog" for i in range(45)]
    data = images.from_arrays(pictures, labels, CPU)
    assert (len(data.train), len(data.test)) == (41, 4) and data.labelled and data.classes == ["cat", "dog"]
    assert sorted(levels(data.train) + levels(data.test)) == list(range(45))
    assert data.test.labels.bincount().tolist() == [2, 2]
    for split in (data.train, data.test):
        assert split.labels.tolist() == [-1 if i >= 40 else 1 - i % 2 for i in levels(split)]
    assert len(images.from_arrays(pictures[:6], labels[:6], CPU).test) == 2  # at least one of a class of two or more
    assert len(images.from_arrays(pictures[2:4], labels[2:4], CPU).train) == 2  # but not the only one of a class
    data = images.from_arrays(pictures, None, CPU)
    assert (len(data.train), bool(data.test), data.labelled) == (45, False, False) and (data.train.labels == -1).all()


def test_pictures_come_from_any_array():
    pictures = noise(4, 3, 8, 9)
    many = np.repeat(pictures, 2, 0)
    forms = [pictures, list(pictures), many[::2], np.asfortranarray(pictures), np.ma.array(pictures)]
    forms += [torch.from_numpy(many)[::2], [torch.from_numpy(p) for p in pictures], pictures[::-1].copy()[::-1]]
    assert all(torch.equal(images.as_pictures(form), torch.from_numpy(pictures)) for form in forms)


LABELS = {  # labels -> (class names, index of each)
    "a tensor": (torch.tensor([3, 1, 3], dtype=torch.uint8), ["1", "3"], [1, 0, 1]),
    "strided and big-endian": (np.array([3, 0, 1, 0, 3, 0], ">i8")[::2], ["1", "3"], [1, 0, 1]),
    "in numerical order": ([10, 9, 100], ["9", "10", "100"], [1, 0, 2]),
    "of eight digits": (np.array([20261231, 20261230, 20261231]), ["20261230", "20261231"], [1, 0, 1]),
    "whole floats": (torch.tensor([3.0, 1.0, -1.0, np.nan]), ["1", "3"], [1, 0, -1, -1]),
    "words": (("dog", "a cat", None, "dog"), ["a cat", "dog"], [1, 0, -1, 1]),
    "objects": (np.array(["dog", "cat", np.nan], object), ["cat", "dog"], [1, 0, -1]),
    "numbers and None": ([4, None, 2, -1], ["2", "4"], [1, -1, 0, -1]),
    "masked": (np.ma.array([5, 7, 6], mask=[0, 0, 1]), ["5", "7"], [0, 1, -1]),
    "truth values": ([True, False], ["False", "True"], [1, 0]),
    "one class, which says nothing": ([2, 2, 2], [], [-1, -1, -1]),
    "none at all": ([np.nan, np.nan], [], [-1, -1]),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_whole_numbers_or_words_of_any_array(name):
    given, names, expected = LABELS[name]
    index, classes = images.as_labels(given, len(expected))
    assert (classes, index.tolist(), index.dtype) == (names, expected, torch.int64)


def test_labels_come_from_pandas():
    pandas = pytest.importorskip("pandas")
    words, numbers = ["dog", "cat", None], [2, 1, None]
    for values, kind in ((words, None), (words, "category"), (numbers, "Int64"), (numbers, None)):
        column = pandas.Series(values, dtype=kind, index=[7, 8, 9])
        index, classes = images.as_labels(column, 3)
        assert classes in (["cat", "dog"], ["1", "2"]) and index.tolist() == [1, 0, -1]


BLACK = np.zeros((4, 3, 8, 8), np.uint8)
REFUSED = [
    ("pictures", x) for x in (BLACK / 1, BLACK.reshape(4, 8, 8, 3), torch.zeros(3, 8, 8).byte(), BLACK[:1], BLACK + 1)
]
REFUSED += [("pictures", x) for x in (np.ma.array(BLACK, mask=True), [BLACK[0], BLACK[0, :, :4]], "photos/", None)]
REFUSED += [("labels", x) for x in ([0.5, 1], [1, 2, 3], torch.zeros(2, 1), [[1], [1, 2]], None, 7, "ab", [1j, 2])]
REFUSED += [("labels", x) for x in ([{}, 1], [1, 1e300], [1, np.inf])]


@pytest.mark.parametrize("what, given", REFUSED)
def test_what_is_no_picture_or_no_label_is_one_line(what, given):
    with pytest.raises(images.InputError, match=f"^{what}: .*; give [^\n]*$"):
        images.as_pictures(given) if what == "pictures" else images.as_labels(given, 2)


# -------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("gb", [4, 0], ids=["resident", "streamed"])
def test_a_tenth_of_each_class_is_held_out_by_a_draw_that_is_always_the_same(gb, tmp_path):
    root, found = classed(tmp_path, 200), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        data = load(root, resident_gb=gb)
        assert sorted(numbers(data.train) + numbers(data.test)) == list(range(200))
        for split in (data.train, data.test):
            assert levels(split) == numbers(split) and split.labels.tolist() == [i % 2 for i in numbers(split)]
        found.append(numbers(data.test))
    assert found[0] == found[1] and data.test.labels.bincount().tolist() == [10, 10]
    places = [[i // 2 for i in found[0] if i % 2 == k] for k in (0, 1)]  # within the class
    assert places[0] != places[1] and all(len({*np.diff(p)}) > 3 for p in places)  # not by position


TWENTY = [f"{name}{i}.{suffix}" for name, suffix in (("a/", "png"), ("b/x/y", "JPEG")) for i in range(10)]
TRAIN = [f"train/{path}" for path in TWENTY]
LAYOUTS = {  # files -> (images to train on, held out, classes, what is left out)
    "classes": (TWENTY, 18, 2, "ab", {}),
    "few pictures": (["a/1.png", "a/2.png", "b/1.png", "c/1.png", "c/2.png"], 3, 2, "abc", {}),
    "a picture beside the classes": ([*TWENTY, "cover.png"], 19, 2, "ab", {}),
    "other files": ([*TWENTY, "c/notes.txt", "d/README", "x.TXT"], 18, 2, "ab", {".txt": 2, "without a suffix": 1}),
    "skipped names": ([*TWENTY, ".git/1.png", "a/._1.png", "a/@eaDir/1.png", "_old/1.png"], 18, 2, "ab", {}),
    "test": ([*TRAIN, "test/a/1.png", "test/b/1.png"], 20, 2, "ab", {}),
    "val": ([*TRAIN, "val/a/1.png"], 20, 1, "ab", {}),
    "testing": ([f"Training/{path}" for path in TWENTY] + ["Testing/b/1.png"], 20, 1, "ab", {}),
    "validation": ([f"TRAIN/{path}" for path in TWENTY] + ["Validation/b/1.png"], 20, 1, "ab", {}),
    "valid beside test": ([*TRAIN, "valid/a/1.png", "valid/b/1.png", "test/b/1.png"], 20, 1, "ab", {}),
    "valid beside a test without classes": ([*TRAIN, "valid/a/1.png", "test/1.png", "test/2.png"], 20, 1, "ab", {}),
    "a val without classes": ([*TRAIN, "val/1.png"], 18, 2, "ab", {"in no class of train/": 1}),
    "a class of test alone": ([*TRAIN, "test/a/1.png", "test/d/1.png"], 20, 1, "ab", {"in no class of train/": 1}),
    "no classes": ([path.replace("/", "") for path in TWENTY], 20, 0, "", {}),
    "one class": ([f"holiday/{i}.png" for i in range(3)], 3, 0, "", {}),
    "train and test without classes": (["train/1.png", "train/2.png", "test/3.png"], 2, 1, "", {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_is_read_by_torchvisions_conventions(name, tmp_path):
    files, train, test, classes, left_out = LAYOUTS[name]
    write(tmp_path / "whole.png", noise(16, 16, 3))
    for path in files:
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "whole.png", tmp_path / "photos" / path)
    data = load(tmp_path / "photos", 16)
    assert (len(data.train), len(data.test), data.classes) == (train, test, list(classes))
    assert +data.left_out == left_out and data.labelled == bool(classes)
    assert all(f"{n} left out ({kind})" in data.describe() for kind, n in left_out.items())
    for split in (data.train, data.test):
        for path, label in zip(split.paths, split.labels.tolist(), strict=True):
            parts = os.path.relpath(path, tmp_path / "photos").split("/")
            *folders, _ = parts[1:] if parts[0].lower()[:2] in ("tr", "te", "va") else parts
            assert (data.classes[label] if label >= 0 else None) == (folders[0] if folders and classes else None)


def test_folders_and_files_may_be_links_or_no_files_at_all(tmp_path):
    """A linked class counts. A FIFO, a broken link, a folder named like a picture and a loop of links do no harm."""
    root = classed(tmp_path / "photos", 20)
    write(tmp_path / "elsewhere" / "1.png", plain(50))
    links = {"c": tmp_path / "elsewhere", "a/back": "..", "a/loop": "loop", "a/gone.png": "nowhere.png"}
    for link, target in links.items():
        (root / link).symlink_to(target)
    (root / "a" / "folder.png").mkdir()
    os.mkfifo(root / "a" / "pipe.png")  # to open it would mean to wait for ever
    data = load(root)
    assert data.classes == ["a", "b", "c"] and sorted(levels(data.train) + levels(data.test)) == [*range(20), 50]


@pytest.mark.parametrize("gb", [4, 0], ids=["resident", "streamed"])
def test_damaged_files_are_named_and_left_out(gb, tmp_path, capfd, monkeypatch):
    """A resident set counts them. A streamed set shows another picture of the class in the place of each."""
    root = classed(tmp_path)
    (root / "a" / "900.png").write_bytes((root / "a" / "002.png").read_bytes()[:-30])
    (root / "a" / "901.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is not a JPEG")
    (root / "a" / "902.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n")  # Ghostscript's
    (root / "b" / "903.png").write_bytes(b"")
    write(root / "b" / "904.png", plain(0, 40, images.SMALLEST_SIDE - 1))
    monkeypatch.setattr(images, "MOST_PIXELS", 32 * 32)
    write(root / "b" / "905.png", plain(0, 32, 33))
    data = load(root, resident_gb=gb)
    for split in (data.train, data.test):
        shown = levels(split)
        assert [level % 2 for level in shown] == split.labels.tolist() and max(shown) < 40
        assert all(number in (level, *range(900, 906)) for level, number in zip(shown, numbers(split), strict=True))
    if gb:
        assert len(data.train) + len(data.test) == 40 and "6 left out (damaged)" in data.describe()
    else:
        assert len(data.train.bad) + len(data.test.bad) == 6
    said = capfd.readouterr().err
    assert [said.count(f"/{name}.") > 0 for name in range(900, 906)] == [True] * 6 == said.count("warning: ") * [True]
    assert "7x40 pixels" in said and "33x32 pixels" in said


def test_more_damaged_files_than_whole_ones_are_left_out_and_the_first_are_named(tmp_path, capfd):
    classed(tmp_path, 20)
    for i in range(400):
        (tmp_path / "a" / f"{500 + i}.jpg").write_text("no picture")
    data = load(tmp_path)
    assert sorted(levels(data.train) + levels(data.test)) == list(range(20)) and data.left_out["damaged"] == 400
    assert capfd.readouterr().err.count("warning: ") == 40  # the first 20 of each split


NOTHING = {"nowhere": "no such folder; give a folder, shapes, ", "empty": "0 picture", "notes.txt": "0 picture.*1 .txt"}
NOTHING |= {"1.png": "1 picture", "test/a/1.png": "test/ or val/ without train/", "damaged": "can be read"}


@pytest.mark.parametrize("gb", [4, 0], ids=["resident", "streamed"])
@pytest.mark.parametrize("what", NOTHING)
def test_where_nothing_is_usable_one_line_says_so(what, gb, tmp_path):
    root = tmp_path / "photos"
    for name in [f"{i}.jpg" for i in range(5)] if what == "damaged" else [what] * ("." in what):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("no picture")
    if what == "empty":
        root.mkdir()
    with pytest.raises(images.InputError, match=NOTHING[what]) as found:
        view_of(load(root, resident_gb=gb, workers=1).train, [0], workers=1)
    assert str(root) in str(found.value) and "\n" not in str(found.value)


def test_a_name_that_is_no_utf_8_can_be_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    classed(tmp_path / name, 20)
    write(tmp_path / name / name / "1.png", plain(3))
    (tmp_path / name / f"x.{name}").write_text("")
    data = load(tmp_path / name)
    assert len(data.classes) == 3 and data.describe().encode() and data.classes[2].encode()


# ------------------------------------------------------------------------------------------------------- decoding


def test_transparency_is_white(tmp_path):
    for shape in ((12, 9, 3), (12, 9)):
        colours, alpha = noise(*shape), noise(12, 9, 1, seed=1)
        Image.fromarray(np.concatenate([colours.reshape(12, 9, -1), alpha], 2)).save(tmp_path / "x.png")
        expected = alpha / 255.0 * colours.reshape(12, 9, -1) + 255 - alpha
        assert np.abs(images.decode(str(tmp_path / "x.png")) - expected).max() <= 1


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_format_that_pillow_can_write_is_decoded(mode, tmp_path):
    """A bright half beside a dark half is read as that."""
    picture, written = np.zeros((20, 30), np.uint8), []
    picture[:, 15:] = 200
    grey = Image.fromarray(picture)
    if mode[0] == "I":
        made = Image.fromarray((picture * 256.0).astype({"I": "i4", "I;16": "<u2", "I;16B": ">u2"}[mode]))
    elif mode == "LAB":
        made = Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2])
    else:
        made = grey.convert("LA" if mode == "PA" else "RGB").convert(mode)
    for path in (tmp_path / f"x{suffix}" for suffix in images.SUFFIXES):
        with suppress(OSError, KeyError, ValueError, AttributeError):  # not in this format
            made.save(path)
            written.append(path)
    for path in written:
        pixels = images.decode(str(path), (0, 255) if mode == "F" else (0, 65535))
        dark, bright = pixels[:, 2:12].mean(), pixels[:, 18:28].mean()
        assert pixels.shape == (20, 30, 3) and dark < 30 and 180 < bright <= 255, (path.suffix, dark, bright)
    assert written and made.mode == mode


@pytest.mark.parametrize("kind", ["16-bit.png", "16-bit.tif", ">16-bit.tif", "32-bit.tif", "float.tif", "white.tif"])
def test_16_bit_and_float_pictures_share_one_range_from_black_to_white(kind, tmp_path):
    """The range is measured, said, and used for every split. A range that is given is used instead."""
    for i in range(21):
        values = np.full((16, 16), 1000 + 100 * i, {"3": "i4", "f": "f4", ">": ">u2"}.get(kind[0], "u2"))
        if kind == "float.tif":
            values[0, 0], values[5, 5] = np.nan, np.inf  # which say nothing about the range
        write(path := tmp_path / "ab"[i % 2] / f"{i:02}{kind[-4:]}", values)
        if kind == "white.tif":  # tag 262 says that zero is white
            tag = b"\6\1\3\0\1\0\0\0%c\0\0\0"
            path.write_bytes(path.read_bytes().replace(tag % 1, tag % 0))
    data = load(tmp_path, 16)
    assert data.train.span == data.test.span == (1000, 3000) and "from 1000 to 3000" in data.describe()
    for span, gb in ((None, 4), (None, 0), ((0, 4000), 4), ((0, 2000), 0)):
        low, high = span or (1000, 3000)
        data = load(tmp_path, 16, resident_gb=gb, span=span)
        for split in (data.train, data.test):
            assert tuple(split.span) == (low, high)
            shown = view_of(split, range(len(split)), 16)[:, :, 10, 10].mean(1)
            expected = ((1000 + 100 * torch.tensor(numbers(split)) - low) / (high - low)).clamp(max=1)
            assert torch.allclose(shown, 1 - expected if kind == "white.tif" else expected, atol=0.003)


@pytest.mark.parametrize("bits, mode, told", [(16, "RGB", 1), (16, "LA", 1), (16, "RGBA", 1), (8, "RGB", 0)])
def test_colours_of_16_bits_are_told_since_pillow_keeps_eight(bits, mode, told, tmp_path, capfd):
    for i in range(6):
        values = np.full((16, 16, len(mode)), 2 ** (bits - 4) - 1, ">u2" if bits == 16 else "u1")  # of 12 bits, or 4
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        head = struct.pack(">IIBBBBB", 16, 16, bits, {"RGB": 2, "LA": 4, "RGBA": 6}[mode], 0, 0, 0)
        parts = (b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
        chunks = (struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in parts)
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    load(tmp_path, 16)
    assert capfd.readouterr().err.count("warning: of 16-bit colours") == told


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_pictures_are_turned_upright_as_exif_says_and_odd_metadata_do_no_harm(suffix, tmp_path):
    rgb, path = np.kron(noise(3, 2, 3), np.ones((60, 60, 1))).astype(np.uint8), str(tmp_path / f"x.{suffix}")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(rgb).save(path, exif=exif, quality=100, lossless=True)
        rows, columns = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
        upright = (rgb if orientation < 5 else rgb.transpose(1, 0, 2))[::rows, ::columns].astype(int)
        assert (pixels := images.decode(path)).shape == upright.shape
        assert np.abs(pixels - upright).mean() < (6 if suffix == "jpg" else 0.1)
    Image.fromarray(rgb).save(tmp_path / "odd.png", exif=b"Exif\0\0no such thing")
    assert np.array_equal(images.decode(str(tmp_path / "odd.png")), rgb)


def test_a_large_jpeg_is_decoded_at_a_reduced_scale_to_the_same_picture(tmp_path):
    picture = Image.fromarray(ramp(200, 260))
    for i in range(2):
        picture.save(tmp_path / f"{i}.jpg", quality=95)
    path, small = str(tmp_path / "0.jpg"), np.asarray(picture.resize((37, 37), Image.Resampling.BILINEAR), int)
    assert images.decode(path, crops=[(37, "all")]).shape == (100, 130, 3)  # by 2, but not below 74 pixels
    assert images.decode(path, crops=[(37, (0.1, 1.0))]).shape == images.decode(path).shape == (200, 260, 3)
    assert np.abs(load(tmp_path).train.pixels[0].permute(1, 2, 0).numpy() - small).max() <= 3


# ------------------------------------------------------------------------------------------------------ streaming


def test_the_pictures_are_resident_up_to_resident_gb_and_streamed_above(tmp_path):
    assert load(classed(tmp_path, 20)).train.pixels.shape[2:] == (32, 32)  # small pictures keep their size
    write(tmp_path / "a" / "100.png", plain(0, 20, 50))
    taken = 21 * 3 * 37 * 37 / 1e9  # GB, at 8/7 of the view's side
    data = load(tmp_path, resident_gb=taken)
    assert data.train.pixels.shape[2:] == (37, 37) and "in memory, 37x37" in data.describe()
    data = load(tmp_path, resident_gb=taken * 0.999)
    assert data.train.pixels is None and data.test.pixels is None and "; streamed by workers" in data.describe()


def test_a_streamed_view_is_a_function_of_seed_epoch_and_image(tmp_path):
    """The number of workers, the order and the batches change nothing."""
    for i in range(18):
        write(tmp_path / f"{i:02}.png", noise(32, 32, 3, seed=i // 2))
    split = load(tmp_path, resident_gb=0).train

    def crops(batches, workers, *seed):
        views = split.views(batches, [(24, (0.2, 1.0))] * 2, seed, workers)
        return torch.cat([torch.stack(v, 1) for v in views])

    everything, before = torch.arange(18), torch.get_rng_state()
    one = crops(everything.split(6), 1, 5, 0)
    assert torch.equal(torch.get_rng_state(), before)  # otherwise the number of workers would change a run
    assert one.shape == (18, 2, 3, 24, 24) and not torch.equal(one[:, 0], one[:, 1])
    assert not torch.equal(one[0], one[1])  # the same picture, but draws of their own
    assert torch.equal(one, crops(everything.split(9), 2, 5, 0)) and torch.equal(one, crops([everything], 0, 5, 0))
    assert torch.equal(one.flip(0), crops(everything.flip(0).split(6), 0, 5, 0))
    assert torch.equal(one.repeat(18, 1, 1, 1, 1), crops([everything.repeat(18)], 2, 5, 0))
    assert not any(torch.equal(one, crops([everything], 0, *seed)) for seed in ((5, 1), (6, 0), (5 + 2**32, 0)))


@pytest.mark.parametrize("gb", [4, 0], ids=["resident", "streamed"])
def test_crops_of_several_kinds_are_each_of_its_own_size_and_range(gb, tmp_path):
    """In a picture whose value is its column the spread of a crop is its width."""
    for i in range(60):
        Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (128, 1))).save(tmp_path / f"{i}.png")
    split, asked = load(tmp_path, 128, resident_gb=gb).train, [(32, (0.5, 1.0)), (16, (0.05, 0.1))]
    for view, (size, (low, high)) in zip(next(split.views([torch.arange(60)], asked, workers=0)), asked, strict=True):
        width = (view.amax((1, 2, 3)) - view.amin((1, 2, 3))) * 255 / 128 * size / (size - 1)
        assert view.shape == (60, 3, size, size) and width.std() > 0.01
        assert width.min() > (low * 3 / 4) ** 0.5 - 0.05 and width.max() < (high * 4 / 3) ** 0.5 + 0.05


def test_for_a_damaged_file_any_of_its_class_stands_in_or_else_any_other(tmp_path, capfd):
    classed(tmp_path)
    for i in (100, 101):
        write(tmp_path / "c" / f"{i}.png", plain(i))
    data = load(tmp_path, resident_gb=0)

    def shown_for(split, row):
        Path(split.paths[row]).write_bytes(b"no picture")
        return {round(255 * view_of(split, [row], seed=(seed,)).mean().item()) for seed in range(8)}

    _, *others = (number for number in numbers(data.train) if number < 40 and number % 2 == 0)
    assert len(seen := shown_for(data.train, 0)) > 2 and seen <= {*others}
    assert capfd.readouterr().err.count(f"warning: {data.train.paths[0]}: ") == 1
    assert len(seen := shown_for(data.test, data.test.labels.tolist().index(2))) > 1 and seen <= {*numbers(data.test)}


def test_a_view_is_cut_from_the_whole_picture_and_antialiased_streamed_or_nearly_so_resident(tmp_path):
    write(tmp_path / "0.png", picture := noise(128, 200, 3))
    for i, shape in enumerate([(240, 160), (100, 300), (128, 128)], 1):
        write(tmp_path / f"{i}.png", ramp(*shape))
    resident, streamed = (load(tmp_path, 96, resident_gb=gb).train for gb in (4, 0))
    whole = torch.from_numpy(picture[:, 36:164]).permute(2, 0, 1)[None] / 255
    assert largest_difference(view_of(streamed, [0]), TF.resize(whole, [32, 32], antialias=True)) < 2 / 255
    assert largest_difference(view_of(resident, [1, 2, 3], 96), view_of(streamed, [1, 2, 3], 96)) < 0.02


@pytest.mark.slow
def test_resident_and_streamed_crops_are_of_one_distribution(tmp_path):
    """Of a photo that is kept squeezed: the edges of the crop, read off a ramp, its area and its shape."""
    for i in range(2):
        write(tmp_path / f"{i}.png", ramp(90, 160))
    torch.manual_seed(0)
    found = []
    for gb in (4, 0):
        split = load(tmp_path, resident_gb=gb).train.at(torch.zeros(1500).long())
        (x,) = next(split.views([torch.arange(1500)], [(32, (0.08, 1.0))], workers=2))
        edges = [x[:, 0, 0].mean(1), x[:, 0, -1].mean(1), x[:, 1, :, 0].mean(1), x[:, 1, :, -1].mean(1)]
        height, width = edges[1] - edges[0], edges[3] - edges[2]
        found.append([*edges, height * width, height / width])
    for resident, streamed in zip(*found, strict=True):  # the squeezed copy's borders are read off by 1% of the side
        blurred = (values + 0.06 * torch.rand(1500) for values in (resident, streamed))
        assert kolmogorov_smirnov(*blurred) < 1
