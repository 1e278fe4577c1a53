"""Each batched op against torchvision's functional op, each sampler against torchvision's sampler."""

import pytest
import torch
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as TF

import common


@pytest.fixture
def images():
    return torch.rand(12, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def largest_difference(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("size", [24, 32, 64])
@pytest.mark.parametrize("shape", [(32, 32), (57, 40), (256, 200)])
def test_crop_resize_equals_resized_crop(shape, size):
    """Up- and downsampling, antialiased: at most 2e-6 from torchvision for floats."""
    torch.manual_seed(0)
    x = torch.rand(16, 3, *shape)
    boxes = common.random_crop_boxes(torch.tensor(shape).expand(16, 2), (0.08, 1.0))
    theirs = [
        TF.resized_crop(y, *(int(v) for v in b), [size, size], antialias=True) for y, b in zip(x, boxes, strict=True)
    ]
    assert largest_difference(common.crop_resize(x, boxes, size), torch.stack(theirs)) < 2e-6


def test_crop_resize_of_uint8_divides_by_255(images):
    x = (images * 255).to(torch.uint8)
    boxes = common.whole_boxes(torch.tensor([40, 40]).expand(12, 2))
    assert largest_difference(common.crop_resize(x, boxes, 40), x.float() / 255) < 1e-6


def test_crop_of_a_squeezed_copy_is_the_crop_of_the_picture():
    """A photo kept as a square copy: boxes in original pixels pick the same region (a smooth picture, so to 1%)."""
    h, w = 300, 120
    ramp = torch.stack(
        [torch.linspace(0, 1, h)[:, None].expand(h, w), torch.linspace(0, 1, w).expand(h, w), torch.zeros(h, w)]
    )
    copy = (TF.resize(ramp, [64, 64], antialias=True) * 255).round().to(torch.uint8)[None]
    images = common.Images(copy, (), torch.tensor([[h, w]]), torch.tensor([0]), torch.device("cpu"))
    box = torch.tensor([[100.0, 30.0, 90.0, 60.0]])
    ours = common.crop_resize(copy, images.stored(box, images.sizes), 32)[0]
    assert largest_difference(ours, TF.resized_crop(ramp, 100, 30, 90, 60, [32, 32], antialias=True)) < 0.02


def neutral(n, **given):
    one, zero = torch.ones(n), torch.zeros(n)
    order = torch.arange(4).expand(n, 4)
    return common.Jitter(
        **({"brightness": one, "contrast": one, "saturation": one, "hue": zero, "order": order} | given)
    )


@pytest.mark.parametrize("op", ["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_op_equals_torchvision(images, op):
    """At most 5e-6 (the hue goes to HSV and back)."""
    values = torch.rand(12) - 0.5 if op == "hue" else torch.rand(12) * 2
    theirs = [getattr(TF, f"adjust_{op}")(x, v.item()) for x, v in zip(images, values, strict=True)]
    ours = common.color_jitter(images.clone(), neutral(12, **{op: values}))
    assert largest_difference(ours, torch.stack(theirs)) < 5e-6


def test_jitter_order_is_each_images_own(images):
    torch.manual_seed(2)
    jitter = common.random_jitter(12, 0.8, 0.8, 0.8, 0.2, 0.8)
    ops = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    theirs = images.clone()
    for i, order in enumerate(jitter.order.tolist()):
        values = (jitter.brightness[i], jitter.contrast[i], jitter.saturation[i], jitter.hue[i])
        for kind in order:
            theirs[i] = ops[kind](theirs[i], values[kind].item())
    assert len({tuple(o) for o in jitter.order.tolist()}) > 6
    assert largest_difference(common.color_jitter(images.clone(), jitter), theirs) < 2e-5


def test_hue_of_grey_and_of_saturated_pixels():
    x = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    x = x.T.reshape(1, 3, 8, 1).repeat(5, 1, 1, 1)
    turns = torch.tensor([-0.5, -0.3, 0.1, 0.33, 0.5])
    theirs = torch.stack([TF.adjust_hue(y, t.item()) for y, t in zip(x, turns, strict=True)])
    assert largest_difference(common.shift_hue(x, turns), theirs) < 5e-6


@pytest.mark.parametrize("kernel", [3, 5, 9])
def test_blur_equals_torchvision(images, kernel):
    sigma = torch.linspace(0.1, 2.0, 12)
    theirs = [TF.gaussian_blur(x, kernel, s.item()) for x, s in zip(images, sigma, strict=True)]
    assert largest_difference(common.gaussian_blur(images, sigma, kernel), torch.stack(theirs)) < 2e-6


def test_flip_grey_and_solarize_equal_torchvision(images):
    assert torch.equal(common.flip(images), TF.hflip(images))
    assert largest_difference(common.to_grey(images), TF.rgb_to_grayscale(images, 3)) < 1e-6
    assert torch.equal(common.solarize(images), TF.solarize(images, 0.5))


def test_rotate_and_cutout_equal_torchvision(images):
    quarters = torch.arange(12) % 4
    theirs = torch.stack([TF.rotate(x, 90.0 * int(k)) for x, k in zip(images, quarters, strict=True)])
    assert largest_difference(common.rotate(images.clone(), quarters), theirs) < 1e-6
    ours = common.cutout(images, torch.full((12, 2), 0.5), 0.5)
    assert torch.equal(ours, TF.erase(images, 10, 10, 20, 20, torch.tensor(0.0)))


def test_cutout_is_cut_at_the_border(images):
    ours = common.cutout(images, torch.zeros(12, 2), 0.5)
    assert torch.equal(ours, TF.erase(images, 0, 0, 10, 10, torch.tensor(0.0)))


def test_sobel_against_its_definition(images):
    ours = common.sobel(images)[:, 0]
    y = images[:, 0] * 0.2989 + images[:, 1] * 0.587 + images[:, 2] * 0.114
    i, j = 7, 9
    dx = y[:, i - 1 : i + 2, j + 1] - y[:, i - 1 : i + 2, j - 1]
    dy = y[:, i + 1, j - 1 : j + 2] - y[:, i - 1, j - 1 : j + 2]
    weight = torch.tensor([1.0, 2.0, 1.0])
    expected = ((dx @ weight) ** 2 + (dy @ weight) ** 2).sqrt().clamp(max=1)
    assert largest_difference(ours[:, i, j], expected) < 1e-5


def test_noise_has_the_asked_spread():
    torch.manual_seed(0)
    x = torch.full((2, 3, 64, 64), 0.5)
    noisy = common.gaussian_noise(x, torch.tensor([0.01, 0.1])) - x
    assert torch.allclose(noisy.flatten(1).std(1), torch.tensor([0.01, 0.1]), rtol=0.05)


def kolmogorov_smirnov(a, b):
    """Largest distance of two empirical distribution functions, over its 0.1% critical value."""
    both = torch.cat([a, b]).sort().values
    cdf = [torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (a, b)]
    return ((cdf[0] - cdf[1]).abs().max() / (1.95 * (1 / len(a) + 1 / len(b)) ** 0.5)).item()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 32), (375, 500), (60, 500)])
def test_crop_boxes_are_distributed_as_torchvisions(shape):
    torch.manual_seed(0)
    n = 4000
    ours = common.random_crop_boxes(torch.tensor(shape).expand(n, 2), (0.08, 1.0))
    picture = torch.empty(3, *shape)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    ).float()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= torch.tensor(shape)).all()
    for column in range(4):
        assert kolmogorov_smirnov(ours[:, column], theirs[:, column]) < 1
    assert kolmogorov_smirnov(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]) < 1


@pytest.mark.slow
def test_jitter_is_distributed_as_torchvisions():
    torch.manual_seed(0)
    n = 4000
    ours = common.random_jitter(n, 0.8, 0.8, 0.8, 0.2, 1.0)
    sampler = ColorJitter(0.8, 0.8, 0.8, 0.2)
    drawn = [
        sampler.get_params(sampler.brightness, sampler.contrast, sampler.saturation, sampler.hue) for _ in range(n)
    ]
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue"), 1):
        assert kolmogorov_smirnov(getattr(ours, name), torch.tensor([d[k] for d in drawn])) < 1
    counts = torch.zeros(4, 4).index_put(
        (torch.arange(4).repeat(n), ours.order.flatten()), torch.ones(4 * n), accumulate=True
    )
    assert ((counts / n - 0.25).abs() < 0.03).all()


def test_jitter_leaves_the_given_share_alone():
    torch.manual_seed(0)
    jitter = common.random_jitter(4000, 0.8, 0.8, 0.8, 0.2, 0.8)
    for value, neutral_value in ((jitter.brightness, 1), (jitter.hue, 0)):
        assert abs((value == neutral_value).float().mean().item() - 0.2) < 0.02


def test_every_image_has_a_draw_of_its_own():
    """One picture 64 times: with one draw for the whole batch all views would be the same."""
    import simclr

    torch.manual_seed(0)
    config = simclr.Config(image_size=32, blur_probability=0.5, solarize_probability=0.2)
    same = torch.rand(1, 3, 32, 32).repeat(64, 1, 1, 1)
    boxes = common.random_crop_boxes(torch.tensor([32, 32]).expand(64, 2), (0.08, 1.0))
    for x in (common.crop_resize(same, boxes, 32), simclr.augment(same.clone(), config, ["color"])):
        distinct = {tuple(v.flatten()[::97].tolist()) for v in x}
        assert len(distinct) > 45
