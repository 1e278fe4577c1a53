"""Crops and batched operations equal torchvision's, as do their draws, and each method applies its paper's list."""

import pytest
import torch
from torchvision.models import ResNet50_Weights
from torchvision.transforms import GaussianBlur, RandomResizedCrop
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

TORCHVISION = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)  # ColorJitter's
CPU = torch.device("cpu")


@pytest.fixture
def x():
    return torch.rand(12, 3, 40, 32, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("size", [24, 32, 64])
@pytest.mark.parametrize("shape", [(32, 32), (57, 40), (256, 200)])
def test_crop_resize_equals_resized_crop(shape, size):
    """Up- and downsampling, antialiased: at most 2e-6 from torchvision for floats."""
    torch.manual_seed(0)
    x = torch.randint(256, (16, 3, *shape)).to(torch.uint8)
    boxes = images.crop_boxes(torch.tensor(shape).expand(16, 2), size, (0.08, 1.0))
    theirs = [TF.resized_crop(y / 255, *map(int, b), [size, size]) for y, b in zip(x, boxes, strict=True)]
    assert largest_difference(images.crop_resize(x, boxes, size), theirs) < 2e-6


def test_a_crop_of_a_squeezed_copy_is_the_crop_of_the_picture():
    """A photo of 300x120 that is kept as a square copy: boxes in original pixels pick the same regions, to 2%."""
    rows, columns = torch.linspace(0, 1, 300)[:, None].expand(300, 120), torch.linspace(0, 1, 120).expand(300, 120)
    ramp = torch.stack([rows, columns, torch.zeros(300, 120)])
    copy = (TF.resize(ramp, [64, 64]) * 255).round().to(torch.uint8)[None]
    split = images.Images(torch.tensor([0]), CPU, copy, torch.tensor([[300, 120]]))
    square, tall = next(split.views([torch.tensor([0])], [(32, None), (24, (1.0, 1.0))]))  # the second fits nowhere
    assert largest_difference(square[0], TF.resized_crop(ramp, 90, 0, 120, 120, [32, 32])) < 0.02
    assert largest_difference(tall[0], TF.resized_crop(ramp, 70, 0, 160, 120, [24, 24])) < 0.02


def test_the_central_view_is_the_evaluation_crop():
    """Of 7/8 of the short side, as torchvision's 224 of 256; the whole short side of small pictures, or small views."""
    sizes = torch.tensor([[256, 320], [500, 400], [224, 300], [32, 32], [40, 20]])
    expected = [[16, 48, 224, 224], [75, 25, 350, 350], [0, 38, 224, 224], [0, 0, 32, 32], [10, 0, 20, 20]]
    assert images.crop_boxes(sizes, 224, None).tolist() == expected
    assert images.crop_boxes(sizes[:2], 64, None).tolist() == [[0, 32, 256, 256], [50, 0, 400, 400]]


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
    theirs = torch.tensor([RandomResizedCrop.get_params(picture, [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours, theirs = ([*b.float().T, b[:, 2] / b[:, 3], b[:, 2] * b[:, 3]] for b in (ours, theirs))
    assert all(kolmogorov_smirnov(*pair) < 1 for pair in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------ operations


@pytest.mark.parametrize("strength", [(0.8, 0.8, 0.8, 0.2), (2.0, 1.2, 0.8, 0.5), (0.4, 0.0, 0.0, 0.0)])
def test_color_jitter_equals_torchvision(strength, x):
    """Brightness, contrast, saturation and hue: drawn as ColorJitter does for each image, in an order of its own."""
    torch.manual_seed(2)
    ours = images.color_jitter(x.clone(), *strength)
    torch.manual_seed(2)
    values = [torch.empty(12).uniform_(max(0.0, 1 - width), 1 + width) for width in strength[:3]]
    values.append(torch.empty(12).uniform_(-strength[3], strength[3]))
    orders, theirs = torch.rand(12, 4).argsort(1), list(x)
    for i, order in enumerate(orders.tolist()):
        for kind in order:
            theirs[i] = TORCHVISION[kind](theirs[i], values[kind][i].item())
    assert largest_difference(ours, theirs) < 2e-5 and len({*map(tuple, orders.tolist())}) > 6


def test_hue_of_grey_and_of_saturated_pixels():
    x = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    x = x.T.reshape(1, 3, 8, 1).repeat(5, 1, 1, 1)
    turns = torch.tensor([-0.5, -0.3, 0.1, 0.33, 0.5])
    theirs = [TF.adjust_hue(y, t.item()) for y, t in zip(x, turns, strict=True)]
    assert largest_difference(images.hue(x, turns.view(-1, 1, 1, 1)), theirs) < 5e-6


@pytest.mark.parametrize("side, kernel", [(16, 3), (32, 3), (96, 9), (224, 23)])
def test_gaussian_blur_equals_torchvision_with_a_kernel_of_a_tenth_of_the_side(side, kernel):
    x = torch.rand(2, 3, side, side)
    for sigma in (0.1, 0.7, 2.0):
        assert largest_difference(images.gaussian_blur(x, sigma, sigma), TF.gaussian_blur(x, kernel, sigma)) < 2e-6


def test_the_sigma_of_gaussian_blur_is_distributed_as_torchvisions():
    torch.manual_seed(0)
    x = torch.zeros(3000, 3, 9, 9)
    x[..., 4, 4] = 1
    centre, beside = images.gaussian_blur(x)[:, 0, 4, 4:6].double().unbind(1)  # their ratio is exp(1 / 2 sigma^2)
    theirs = [GaussianBlur.get_params(0.1, 2.0) for _ in range(3000)]
    assert kolmogorov_smirnov((0.5 / (centre / beside).log()).sqrt(), theirs) < 1


def test_flip_grey_and_solarize_equal_torchvision(x):
    assert torch.equal(images.flip(x), TF.hflip(x))
    assert largest_difference(images.grey(x), TF.rgb_to_grayscale(x, 3)) < 1e-6
    assert torch.equal(byol.solarize(x), TF.solarize(x, 0.5))


def test_normalize_is_what_torchvisions_weights_are_fed(x):
    preset = ResNet50_Weights.IMAGENET1K_V2.transforms()
    ours = images.normalize(x.clone())
    assert largest_difference(ours, TF.normalize(x, preset.mean, preset.std)) < 1e-6


# ----------------------------------------------------------------------------------------------------------- draws


def test_where_changes_the_masked_images_alone_each_by_its_own_parameter(x):
    mask, factor = torch.arange(12) % 3 == 1, torch.linspace(0.1, 0.9, 12)
    out = images.where(x.clone(), mask, torch.mul, factor)
    for i in range(12):
        assert torch.equal(out[i], x[i] * factor[i] if mask[i] else x[i])
    assert torch.equal(images.where(x.clone(), mask & ~mask, torch.mul, factor), x)


def test_sometimes_draws_for_each_image(x):
    torch.manual_seed(0)
    assert torch.equal(images.sometimes(x.clone(), 0.0, images.flip), x)
    assert torch.equal(images.sometimes(x.clone(), 1.0, images.flip), x.flip(-1))
    ones = torch.ones(4000, 3, 2, 2)
    changed = images.sometimes(ones, 0.3, lambda y, f: y * f, 0.5)[:, 0, 0, 0]
    assert set(changed.tolist()) == {0.5, 1.0} and abs((changed == 0.5).float().mean() - 0.3) < 0.04


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
    "moco v1": (
        moco,
        {"augmentation": "v1", "blur": 0.0},
        (),
        [("grey", 0.2), ("color_jitter", 1.0, 0.4, 0.4, 0.4, 0.4), ("flip", 0.5)],
    ),
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
    "supcon": (supcon, {}, (), [("flip", 0.5), ("color_jitter", 0.8, *FULL), ("grey", 0.2), ("gaussian_blur", 0.5)]),
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
def test_augment_draws_for_each_image(name):
    """One picture 64 times: with one draw for the whole batch all views would be the same."""
    method, given, beside, _ = RECIPES[name]
    torch.manual_seed(0)
    same = torch.rand(1, 3, 32, 32).repeat(64, 1, 1, 1)
    before = same.clone()
    views = method.augment(same, method.Config(**given), *beside)
    assert torch.equal(same, before)  # the input is left alone
    assert len({tuple(v.flatten()[::97].tolist()) for v in views}) > 40


def test_random_resized_crops_are_those_of_a_run():
    pictures = torch.randint(256, (5, 3, 40, 60)).to(torch.uint8)
    for size, scale in ((32, (0.08, 1.0)), (16, (0.5, 0.5))):
        torch.manual_seed(0)
        ours = images.random_resized_crop(pictures, size, scale)
        torch.manual_seed(0)
        (views,) = next(images.Images(torch.zeros(5), CPU, pictures).views([torch.arange(5)], [(size, scale)]))
        assert ours.shape == (5, 3, size, size) and torch.equal(ours, views)


def test_every_crop_has_a_draw_of_its_own():
    torch.manual_seed(0)
    pictures = torch.randint(256, (1, 3, 40, 40)).to(torch.uint8).expand(64, 3, 40, 40)
    split = images.Images(torch.zeros(64), CPU, pictures)
    views = next(split.views([torch.arange(64)], [(32, (0.08, 1.0))] * 2))
    assert len({tuple(v.flatten()[::97].tolist()) for v in torch.cat(views)}) > 120
