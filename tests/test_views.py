"""Each batched op against torchvision's functional op, each draw against torchvision's sampler, each method's list."""

import pytest
import torch
from torchvision.models import ResNet50_Weights
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop
from torchvision.transforms import functional as TF

import byol
import images
import moco
import pairwise
import simclr
import simsiam
import supcon
import swav
from tests.helpers import kolmogorov_smirnov, largest_difference

TORCHVISION = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}


@pytest.fixture
def x():
    return torch.rand(12, 3, 40, 32, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("size", [24, 32, 64])
@pytest.mark.parametrize("shape", [(32, 32), (57, 40), (256, 200)])
def test_crop_resize_equals_resized_crop(shape, size):
    """Up- and downsampling, antialiased: at most 2e-6 from torchvision for floats."""
    torch.manual_seed(0)
    x = torch.rand(16, 3, *shape)
    boxes = images.crop_boxes(torch.tensor(shape).expand(16, 2), size, (0.08, 1.0))
    theirs = [
        TF.resized_crop(y, *(int(v) for v in b), [size, size], antialias=True) for y, b in zip(x, boxes, strict=True)
    ]
    assert largest_difference(images.crop_resize(x, boxes, size), theirs) < 2e-6


def test_crop_resize_of_uint8_divides_by_255(x):
    x = (x * 255).to(torch.uint8)
    boxes = torch.tensor([4.0, 0.0, 32.0, 32.0]).expand(12, 4)
    assert largest_difference(images.crop_resize(x, boxes, 32), x[:, :, 4:36].float() / 255) < 1e-6


def test_a_crop_of_a_squeezed_copy_is_the_crop_of_the_picture(monkeypatch):
    """A photo kept as a square copy: a box in original pixels picks the same region (a smooth picture, so to 2%)."""
    h, w = 300, 120
    rows, columns = torch.linspace(0, 1, h)[:, None].expand(h, w), torch.linspace(0, 1, w).expand(h, w)
    ramp = torch.stack([rows, columns, torch.zeros(h, w)])
    copy = (TF.resize(ramp, [64, 64], antialias=True) * 255).round().to(torch.uint8)[None]
    split = images.Images(copy, (), torch.tensor([[h, w]]), torch.tensor([0]), torch.device("cpu"))
    monkeypatch.setattr(images, "crop_boxes", lambda *_: torch.tensor([[100.0, 30.0, 90.0, 60.0]]))
    (ours,) = next(split.views([torch.tensor([0])], [(32, (0.08, 1.0))]))
    assert largest_difference(ours[0], TF.resized_crop(ramp, 100, 30, 90, 60, [32, 32], antialias=True)) < 0.02


def test_the_central_view_is_the_evaluation_crop():
    """Of 7/8 of the short side, as torchvision's 224 of 256; the whole short side of small pictures, or small views."""
    sizes = torch.tensor([[256, 320], [500, 400], [224, 300], [32, 32], [40, 20]])
    expected = [[16, 48, 224, 224], [75, 25, 350, 350], [0, 38, 224, 224], [0, 0, 32, 32], [10, 0, 20, 20]]
    assert images.crop_boxes(sizes, 224, None).tolist() == expected
    assert images.crop_boxes(sizes[:2], 64, None).tolist() == [[0, 32, 256, 256], [50, 0, 400, 400]]
    x = torch.rand(1, 3, 256, 320)
    ours = images.crop_resize(x, images.crop_boxes(sizes[:1], 224, None), 224)
    assert largest_difference(ours, TF.center_crop(x, [224, 224])) < 1e-6


def test_crop_boxes_lie_within_pictures_of_any_size():
    torch.manual_seed(0)
    sizes = torch.randint(8, 400, (4000, 2))
    boxes = images.crop_boxes(sizes, 32, (0.08, 1.0))
    assert (boxes == boxes.round()).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


@pytest.mark.parametrize("shape", [(60, 500), (500, 60), (37, 333)])
def test_where_no_box_fits_the_crop_is_torchvisions_central_one(shape):
    theirs = RandomResizedCrop.get_params(torch.empty(3, *shape), [1.0, 1.0], [3 / 4, 4 / 3])
    ours = images.crop_boxes(torch.tensor([shape] * 3), 32, (1.0, 1.0))
    assert ours.tolist() == [list(map(float, theirs))] * 3


@pytest.mark.slow
@pytest.mark.parametrize("shape, scale", [((32, 32), 0.08), ((375, 500), 0.2), ((60, 500), 0.08), ((40, 30), 0.8)])
def test_crop_boxes_are_distributed_as_torchvisions(shape, scale):
    torch.manual_seed(0)
    n = 4000
    ours = images.crop_boxes(torch.tensor(shape).expand(n, 2), 32, (scale, 1.0))
    picture = torch.empty(3, *shape)
    theirs = [RandomResizedCrop.get_params(picture, [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    theirs = torch.tensor(theirs).float()
    for of in (*(lambda b, k=k: b[:, k] for k in range(4)), lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 2] * b[:, 3]):
        assert kolmogorov_smirnov(of(ours), of(theirs)) < 1


# ------------------------------------------------------------------------------------------------------ operations


@pytest.mark.parametrize("op", TORCHVISION)
def test_each_jitter_op_equals_torchvision(op, x):
    """At most 5e-6 (the hue goes to HSV and back)."""
    values = torch.rand(12) - 0.5 if op == "hue" else torch.rand(12) * 2
    theirs = [TORCHVISION[op](y, v.item()) for y, v in zip(x, values, strict=True)]
    assert largest_difference(getattr(images, op)(x, values.view(-1, 1, 1, 1)), theirs) < 5e-6


def test_hue_of_grey_and_of_saturated_pixels():
    x = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    x = x.T.reshape(1, 3, 8, 1).repeat(5, 1, 1, 1)
    turns = torch.tensor([-0.5, -0.3, 0.1, 0.33, 0.5])
    theirs = [TF.adjust_hue(y, t.item()) for y, t in zip(x, turns, strict=True)]
    assert largest_difference(images.hue(x, turns.view(-1, 1, 1, 1)), theirs) < 5e-6


@pytest.mark.parametrize("kernel", [3, 5, 9, 23])
def test_blur_equals_torchvision(kernel, x):
    sigma = torch.linspace(0.1, 2.0, 12)
    theirs = [TF.gaussian_blur(y, kernel, s.item()) for y, s in zip(x, sigma, strict=True)]
    assert largest_difference(images.blur(x, sigma, kernel), theirs) < 2e-6


@pytest.mark.parametrize("side, kernel", [(16, 3), (32, 3), (96, 9), (224, 23)])
def test_the_kernel_of_gaussian_blur_is_a_tenth_of_the_side(side, kernel):
    x = torch.rand(2, 3, side, side)
    assert largest_difference(images.gaussian_blur(x, 1.5, 1.5), TF.gaussian_blur(x, kernel, 1.5)) < 2e-6


def test_flip_grey_and_solarize_equal_torchvision(x):
    assert torch.equal(images.flip(x), TF.hflip(x))
    assert largest_difference(images.grey(x), TF.rgb_to_grayscale(x, 3)) < 1e-6
    assert torch.equal(byol.solarize(x), TF.solarize(x, 0.5))


def test_rotate_equals_torchvision():
    x, quarters = torch.rand(12, 3, 20, 20), torch.arange(12) % 4
    theirs = [TF.rotate(y, 90.0 * int(k)) for y, k in zip(x, quarters, strict=True)]
    assert largest_difference(images.rotate(x.clone(), quarters), theirs) < 1e-6
    turned = images.rotate(torch.arange(4.0).view(1, 1, 2, 2).expand(400, 3, 2, 2).clone())[:, 0, 0, 0].long()
    assert turned.bincount(minlength=4).min() > 60  # a random quarter for each image


def test_normalize_is_what_torchvisions_weights_are_fed(x):
    preset = ResNet50_Weights.IMAGENET1K_V2.transforms()
    ours = images.normalize(x.clone())
    assert largest_difference(ours, TF.normalize(x, preset.mean, preset.std)) < 1e-6


# ----------------------------------------------------------------------------------------------------------- draws


def test_where_changes_the_masked_images_alone_each_by_its_own_parameter(x):
    mask, factor = torch.arange(12) % 3 == 1, torch.linspace(0.1, 0.9, 12)
    out = images.where(x.clone(), mask, images.brightness, factor)
    for i in range(12):
        assert torch.equal(out[i], x[i] * factor[i] if mask[i] else x[i])
    assert torch.equal(images.where(x.clone(), mask & ~mask, images.brightness, factor), x)


def test_sometimes_draws_for_each_image(x):
    torch.manual_seed(0)
    assert torch.equal(images.sometimes(x.clone(), 0.0, images.flip), x)
    assert torch.equal(images.sometimes(x.clone(), 1.0, images.flip), x.flip(-1))
    ones = torch.ones(4000, 3, 2, 2)
    changed = images.sometimes(ones, 0.3, lambda y, f: y * f, 0.5)[:, 0, 0, 0]
    assert set(changed.tolist()) == {0.5, 1.0} and abs((changed == 0.5).float().mean() - 0.3) < 0.04


def jitter_draws(n, seed, settings, monkeypatch):
    """What `color_jitter` draws for each of n images, in the order of application: (name, value) four times."""
    drawn = [[] for _ in range(n)]
    with monkeypatch.context() as patch:
        for name in TORCHVISION:

            def spy(y, values, name=name):
                for i, value in zip(y[:, 0, 0, 0].long().tolist(), values.flatten().tolist(), strict=True):
                    drawn[i].append((name, value))
                return y

            patch.setattr(images, name, spy)
        torch.manual_seed(seed)
        images.color_jitter(torch.arange(float(n)).view(n, 1, 1, 1).repeat(1, 3, 1, 1), *settings)
    return drawn


def test_color_jitter_applies_what_it_drew_in_an_order_of_each_images_own(x, monkeypatch):
    drawn = jitter_draws(12, 2, (0.8, 0.8, 0.8, 0.2), monkeypatch)
    assert all(sorted(name for name, _ in ops) == sorted(TORCHVISION) for ops in drawn)
    assert len({tuple(name for name, _ in ops) for ops in drawn}) > 6
    theirs = list(x.clone())
    for i, ops in enumerate(drawn):
        for name, value in ops:
            theirs[i] = TORCHVISION[name](theirs[i], value)
    torch.manual_seed(2)
    assert largest_difference(images.color_jitter(x, 0.8, 0.8, 0.8, 0.2), theirs) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(0.8, 0.4, 0.2, 0.1), (2.0, 1.2, 0.8, 0.5)])
def test_jitter_is_distributed_as_torchvisions(settings, monkeypatch):
    """Also of strengths above 1, where no factor may be negative."""
    n, sampler = 4000, ColorJitter(*settings)
    drawn = jitter_draws(n, 0, settings, monkeypatch)
    ranges = (sampler.brightness, sampler.contrast, sampler.saturation, sampler.hue)
    theirs = [sampler.get_params(*ranges) for _ in range(n)]
    for k, name in enumerate(TORCHVISION, 1):
        assert kolmogorov_smirnov([dict(ops)[name] for ops in drawn], [d[k] for d in theirs]) < 1
    orders = [tuple(name for name, _ in ops) for ops in drawn]
    assert len(set(orders)) == 24 and all(100 < orders.count(order) < 235 for order in set(orders))  # 167 +- 5 sigma


@pytest.mark.slow
def test_blur_is_distributed_as_torchvisions(monkeypatch):
    sigmas = []
    monkeypatch.setattr(images, "blur", lambda x, sigma, size: sigmas.append(sigma))
    torch.manual_seed(0)
    images.gaussian_blur(torch.zeros(4000, 3, 8, 8))
    assert kolmogorov_smirnov(sigmas[0], [GaussianBlur.get_params(0.1, 2.0) for _ in range(4000)]) < 1


# --------------------------------------------------------------------------------------------- the methods' lists

FULL, WEAK = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.4, 0.1)
RECIPES = {  # flags of `Config`, what `augment` takes beside it, and each (operation, probability, its settings)
    "simclr": (simclr, {}, (), [("flip", 0.5), ("color_jitter", 0.8, *FULL), ("grey", 0.2), ("gaussian_blur", 0.5)]),
    "pairwise": (pairwise, {}, (), [("flip", 0.5), ("color_jitter", 0.8, *WEAK), ("grey", 0.2)]),
    "simclr at half": (
        *(simclr, {"jitter_strength": 0.5, "blur": 0.0}, ()),
        [("flip", 0.5), ("color_jitter", 0.8, *WEAK), ("grey", 0.2)],
    ),
    "moco v2": (moco, {}, (), [("color_jitter", 0.8, *WEAK), ("grey", 0.2), ("gaussian_blur", 0.5), ("flip", 0.5)]),
    "moco v1": (moco, moco.V1, (), [("grey", 0.2), ("color_jitter", 1.0, 0.4, 0.4, 0.4, 0.4), ("flip", 0.5)]),
    "byol, T": (
        *(byol, {}, (1.0, 0.0)),
        [("flip", 0.5), ("color_jitter", 0.8, 0.4, 0.4, 0.2, 0.1), ("grey", 0.2), ("gaussian_blur", 1.0)],
    ),
    "byol, T'": (
        *(byol, {"jitter_strength": 2.0}, (0.1, 0.2)),
        [("flip", 0.5), ("color_jitter", 0.8, 0.8, 0.8, 0.4, 0.2), ("grey", 0.2)]
        + [("gaussian_blur", 0.1), ("solarize", 0.2)],
    ),
    "simsiam": (simsiam, {}, (), [("color_jitter", 0.8, *WEAK), ("grey", 0.2), ("gaussian_blur", 0.5), ("flip", 0.5)]),
    "swav": (swav, {}, (), [("flip", 0.5), ("color_jitter", 0.8, *FULL), ("grey", 0.2), ("gaussian_blur", 0.5)]),
    "supcon": (supcon, {}, (), [("flip", 0.5), ("color_jitter", 0.8, *WEAK), ("grey", 0.2)]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_augment_is_the_papers_list(name, monkeypatch):
    """Each operation, spied on, is asked for in the paper's order, at its strength, and of its share of the images."""
    method, given, beside, listed = RECIPES[name]
    n, asked = 3000, []
    for op in ("flip", "color_jitter", "grey", "gaussian_blur", "solarize"):

        def spy(y, *settings, op=op):
            asked.append((op, len(y) / n, *settings))
            return y

        if hasattr(method, op):
            monkeypatch.setattr(method, op, spy)
    x = torch.rand(n, 3, 4, 4)
    torch.manual_seed(0)
    out = method.augment(x.clone(), method.Config(**given), *beside)
    assert torch.equal(out, images.normalize(x.clone()))  # nothing else is done to a picture
    assert [op for op, *_ in asked] == [op for op, *_ in listed]
    for (_, share, *settings), (_, p, *expected) in zip(asked, listed, strict=True):
        assert settings == pytest.approx(expected)
        assert share == p if p == 1 else abs(share - p) < 0.045  # 5 sigma at one half


@pytest.mark.parametrize("name", RECIPES)
def test_every_image_has_a_draw_of_its_own(name):
    """One picture 64 times: with one draw for the whole batch all views would be the same."""
    method, given, beside, _ = RECIPES[name]
    torch.manual_seed(0)
    same = torch.rand(1, 3, 32, 32).repeat(64, 1, 1, 1)
    views = method.augment(same, method.Config(**given), *beside)
    assert len({tuple(v.flatten()[::97].tolist()) for v in views}) > 40


def test_every_crop_has_a_draw_of_its_own():
    torch.manual_seed(0)
    pictures = torch.randint(256, (1, 3, 40, 40)).to(torch.uint8).expand(64, 3, 40, 40)
    split = images.resident(pictures, torch.zeros(64), torch.device("cpu"))
    views = next(split.views([torch.arange(64)], [(32, (0.08, 1.0))] * 2))
    assert len({tuple(v.flatten()[::97].tolist()) for v in torch.cat(views)}) > 120
