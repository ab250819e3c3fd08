import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from pad.data.augment import DC, DC_STRATEGIES, DSA, DSA_STRATEGY, Draw, NoAugmentation, augment
from pad.errors import InputError
from pad.rng import generator

SIZES = [(28, 28), (32, 32), (15, 17)]
DSA_KINDS = ["color", "crop", "cutout", "flip", "scale", "rotate"]
LARGEST = 1 - 2**-24  # the largest number below 1 that torch.rand gives
CORNERS = list(itertools.product([0.0, LARGEST], repeat=3))


def images(n, height, width, channels=3, dtype=torch.float64):
    return torch.randn(n, channels, height, width, dtype=dtype, generator=torch.Generator().manual_seed(height + width))


def uniform(n, seed=0):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed))


# The formulas again, one image and one pixel at a time, in float64


def pick(u, count):
    return min(math.floor(u * count), count - 1)


def sample(image, matrix, outside=0.0):
    """Bilinear, corners aligned: pixel centres 0..side-1 lie at -1..1; what is not in the image is ``outside`` [C]."""
    channels, height, width = image.shape
    out = np.empty_like(image)
    for r in range(height):
        for c in range(width):
            there = np.array([2 * c / (width - 1) - 1, 2 * r / (height - 1) - 1, 1.0])
            x, y = np.asarray(matrix) @ there
            x, y = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
            left, top = math.floor(x), math.floor(y)
            value = np.zeros(channels)
            for row, column in itertools.product((top, top + 1), (left, left + 1)):
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                inside = 0 <= row < height and 0 <= column < width
                value = value + weight * (image[:, row, column] if inside else outside)
            out[:, r, c] = value
    return out


def color(image, u):
    image = image + (u[0] - 0.5)
    out = np.empty_like(image)
    for r, c in np.ndindex(image.shape[1:]):
        grey = sum(image[:, r, c]) / len(image)
        out[:, r, c] = (image[:, r, c] - grey) * (2 * u[1]) + grey
    mean = sum(out.flat) / out.size
    return (out - mean) * (u[2] + 0.5) + mean


def crop(image, u):
    _, height, width = image.shape
    reach = int(0.125 * height + 0.5), int(0.125 * width + 0.5)
    down, right = (pick(u[axis], 2 * reach[axis] + 1) - reach[axis] for axis in (0, 1))
    out = np.zeros_like(image)
    for r, c in np.ndindex(height, width):
        if 0 <= r + down < height and 0 <= c + right < width:
            out[:, r, c] = image[:, r + down, c + right]
    return out


def cutout(image, u):
    out, hidden = image.copy(), []
    for axis, side in enumerate(image.shape[1:]):
        size = int(0.5 * side + 0.5)
        centre = pick(u[axis], side if size % 2 else side + 1)
        hidden.append([i for i in range(centre - size // 2, centre - size // 2 + size) if 0 <= i < side])
    for r, c in itertools.product(*hidden):
        out[:, r, c] = 0
    return out


def flip(image, u):
    return image[:, :, ::-1] if u[0] < 0.5 else image


def scale(image, u):
    sx, sy = (1 / 1.2 + (1.2 - 1 / 1.2) * u[i] for i in (0, 1))
    return sample(image, [[sx, 0, 0], [0, sy, 0]])


def rotate(image, u):
    angle = math.pi / 180 * (-15 + 30 * u[0])
    return sample(image, [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", DSA_KINDS)
def test_a_transformation_is_its_formula(kind, size):
    u = torch.cat([uniform(4), torch.tensor(CORNERS)])
    if kind in ("scale", "rotate", "color"):  # slow to compute by hand
        u = u[[0, 1, 4, 6, 9, 11]]
    x = images(len(u), *size)
    result = augment(x, Draw(kind, u))
    for i in range(len(u)):
        expected = globals()[kind](x[i].numpy(), u[i].double().tolist())
        np.testing.assert_allclose(result[i].numpy(), expected, rtol=0, atol=1e-11)


def test_the_middle_of_the_range_changes_nothing():
    x = images(1, 15, 17)
    # Colour: brightness + 0, saturation 1, contrast 1. The scale 1 lies at (1 - 1/1.2) / (1.2 - 1/1.2) = 5/11.
    neutral = {"color": [0.5] * 3, "crop": [0.5] * 3, "flip": [0.5] * 3, "rotate": [0.5] * 3, "scale": [5 / 11] * 3}
    neutral["crop_scale_rotate"] = [0.5] * 3  # rescale by 1
    for kind, u in neutral.items():
        torch.testing.assert_close(augment(x, Draw(kind, torch.tensor([u]))), x, rtol=0, atol=1e-6)


def test_a_scale_above_one_shrinks_the_image():
    ones = torch.ones(1, 1, 33, 33, dtype=torch.float64)
    assert augment(ones, Draw("scale", torch.tensor([[LARGEST, LARGEST, 0.0]])))[0, 0, 0, 16] == 0
    assert augment(ones, Draw("scale", torch.zeros(1, 3))).allclose(ones)


@pytest.mark.parametrize("kind", [*DSA_KINDS, *DC_STRATEGIES])
def test_float32_follows_float64(kind):
    x, u = images(64, 32, 32), uniform(64)
    result = augment(x.float(), Draw(kind, u))
    assert result.dtype == torch.float32 and result.shape == x.shape
    torch.testing.assert_close(result.double(), augment(x, Draw(kind, u)), rtol=0, atol=2e-5)


# DC's augmentation, of one image, by ordinary slices, torch's resizing and scipy's rotation


def dc_crop(image, mean, down, right):
    wide = np.empty([len(image), image.shape[1] + 8, image.shape[2] + 8])
    wide[:] = mean[:, None, None]
    wide[:, 4:-4, 4:-4] = image
    return wide[:, 4 + down :, 4 + right :][:, : image.shape[1], : image.shape[2]]


def dc_scale(image, height, width):
    for axis, side in ((1, height), (2, width)):
        numbers = F.interpolate(torch.arange(float(image.shape[axis]))[None, None], side)  # nearest; in float32
        image = image.take(numbers.flatten().int().numpy(), axis)
    return image


def middle(image, size, frame):
    """``size`` pixels of the image's middle as it lies in the middle of a frame of zeros."""
    canvas = np.zeros([len(image), frame, frame])
    top, left = ((frame - side) // 2 for side in image.shape[1:])
    canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    top, left = ((frame - side) // 2 for side in size)
    return canvas[:, top : top + size[0], left : left + size[1]]


def dc_rotate(image, mean, degrees):
    turned = ndimage.rotate(image, degrees, axes=(1, 2), order=3, mode="constant", cval=mean.mean())
    top, left = ((turned.shape[axis] - image.shape[axis]) // 2 for axis in (1, 2))
    return turned[:, top : top + image.shape[1], left : left + image.shape[2]]


def dc(image, mean, u):
    kind, size = pick(u[0], 3), image.shape[1:]
    if kind == 0:
        return dc_crop(image, mean, pick(u[1], 8) - 4, pick(u[2], 8) - 4)
    if kind == 1:
        height, width = (int((0.8 + 0.4 * number) * side) for number, side in zip(u[1:], size))
        return middle(dc_scale(image, height, width), size, max(height, width, *size))
    return dc_rotate(image, mean, pick(u[1], 90) - 45)


def all_of_dc(size):
    """Numbers that give every shift, every size of either side beside two of the other's, and every angle."""
    eighths, ninetieths = (torch.arange(8) + 0.5) / 8, (torch.arange(90) + 0.5) / 90
    crops = torch.cartesian_prod(torch.tensor([0.1]), eighths, eighths)
    sides = torch.linspace(0, LARGEST, max(size))
    scales = torch.cartesian_prod(torch.tensor([0.5]), sides, torch.tensor([0.0, 0.6, LARGEST]))
    rotations = torch.cartesian_prod(torch.tensor([LARGEST]), ninetieths, torch.tensor([0.5]))
    return torch.cat([crops, scales, scales[:, [0, 2, 1]], rotations])


@pytest.mark.parametrize("size", [*SIZES, (64, 64)], ids=str)
def test_dc_augmentation_is_that_of_slices_torch_and_scipy(size):
    u = all_of_dc(size)
    x = images(len(u), *size) + torch.tensor([0.5, 0.0, -2.0])[:, None, None]
    mean = np.array([sum(x[:, c].flatten().tolist()) / x[:, c].numel() for c in range(3)])
    expected = np.stack([dc(image, mean, numbers) for image, numbers in zip(x.numpy(), u.double().tolist())])
    np.testing.assert_allclose(augment(x, Draw(DC_STRATEGIES[0], u)).numpy(), expected, rtol=0, atol=1e-11)
    in_float32 = augment(x.float(), Draw(DC_STRATEGIES[0], u)).numpy()
    np.testing.assert_allclose(in_float32, expected, rtol=0, atol=1e-5)


def test_dc_noise_is_gaussian_and_the_others_are_shifted():
    x, u = images(600, 16, 16), uniform(600)
    result, noisy = augment(x, Draw("crop_noise", u)), u[:, 0] >= 0.5
    mean = x.mean(dim=(0, 2, 3)).numpy()
    for i in range(600):
        if not noisy[i]:
            down, right = (pick(number, 8) - 4 for number in u[i, 1:].double().tolist())
            np.testing.assert_allclose(result[i].numpy(), dc_crop(x[i].numpy(), mean, down, right), rtol=0, atol=1e-12)
    noise = ((result - x)[noisy] / 0.001).flatten()
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5 and abs(noise.std() - 1) < 5 / (2 * len(noise)) ** 0.5
    assert abs((noise.abs() < 1).double().mean() - 0.6827) < 0.005 and (result - x)[noisy].std(dim=0).min() > 5e-4
    again, other = (augment(x, Draw("crop_noise", numbers)) for numbers in (u, uniform(600, seed=1)))
    assert again.equal(result) and not (other[noisy] - result[noisy]).abs().max() < 1e-6


# The distribution of the draws, on an even grid of [0, 1)

GRID = torch.arange(4096) / 4096


def evenly(counts, values):
    share = len(GRID) / len(values)
    return set(counts) == set(values) and all(abs(count - share) <= 1 for count in counts.values())


def test_the_largest_number_stays_in_range():
    """Times a count of integers, it must not round to the count."""
    u = torch.full((1, 3), LARGEST)
    for side in (*range(4, 300), 512, 1000):
        column = torch.ones(1, 1, side, 1)
        assert augment(column, Draw("crop", u)).sum().item() == side - int(0.125 * side + 0.5)
        size = int(0.5 * side + 0.5)
        assert augment(column, Draw("cutout", u)).sum().item() == side - (size + 1) // 2


@pytest.mark.parametrize("axis,side", list(itertools.product((0, 1), (28, 15, 17))))
def test_crop_shifts_evenly_over_its_range(axis, side):
    shape = (side, 1) if axis == 0 else (1, side)
    u = torch.full((len(GRID), 3), 0.5)
    u[:, axis] = GRID
    ramp = torch.arange(side).add(100.0).view(1, 1, *shape).expand(len(GRID), -1, -1, -1)
    middle = augment(ramp, Draw("crop", u)).flatten(1)[:, side // 2]
    reach = {28: 4, 15: 2, 17: 2}[side]
    assert evenly(Counter((middle - 100 - side // 2).long().tolist()), range(-reach, reach + 1))


@pytest.mark.parametrize("axis,side", list(itertools.product((0, 1), (28, 32, 15, 17))))
def test_cutout_squares_lie_evenly(axis, side):
    shape = (side, 1) if axis == 0 else (1, side)
    u = torch.full((len(GRID), 3), 0.0)
    u[:, axis] = GRID
    kept = augment(torch.ones(len(GRID), 1, *shape), Draw("cutout", u)).flatten(1)
    size = {28: 14, 32: 16, 15: 8, 17: 9}[side]
    centres = range(side + 1) if size % 2 == 0 else range(side)
    hidden = [tuple(i for i in range(c - size // 2, c - size // 2 + size) if 0 <= i < side) for c in centres]
    assert evenly(Counter(tuple((row == 0).nonzero().flatten().tolist()) for row in kept), hidden)


def test_half_of_the_images_are_flipped():
    u = torch.full((len(GRID), 3), 0.9)
    u[:, 0] = GRID
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(len(GRID), -1, -1, -1)
    assert (augment(ramp, Draw("flip", u))[:, 0, 0, 0] == 3).sum() == len(GRID) // 2


def test_dc_numbers_are_even():
    """Those of shifts, angles and kinds, seen by what becomes of a ramp."""
    column = torch.arange(17.0).view(1, 1, 17, 1).expand(len(GRID), 1, 17, 17).double()
    u = torch.full((len(GRID), 3), 0.5)
    for number, x in ((1, column), (2, column.mT)):
        u[:, 0], u[:, 1:], u[:, number] = 0.0, 0.5, GRID
        centre = augment(x, Draw(DC_STRATEGIES[0], u))[:, 0, 8, 8]
        assert evenly(Counter((centre - 8).round().long().tolist()), range(-4, 4))
    u[:, 0], u[:, 1] = 0.9, GRID
    turned = augment(column, Draw(DC_STRATEGIES[0], u))
    slope = torch.stack([turned[:, 0, 9, 8] - turned[:, 0, 7, 8], turned[:, 0, 8, 9] - turned[:, 0, 8, 7]])
    degrees = torch.atan2(slope[1], slope[0]).rad2deg()
    assert (degrees - degrees.round()).abs().max() < 0.05
    assert evenly(Counter(degrees.round().long().tolist()), range(-45, 45))
    u[:, 0], u[:, 1:] = GRID, 0.1
    became = augment(column, Draw(DC_STRATEGIES[0], u))[:, 0, 10, 10].mul(1e6).round().tolist()
    kinds = {became[0], became[len(GRID) // 2], became[-1]}
    assert len(kinds) == 3 and evenly(Counter(became), kinds)


# Derivatives


@pytest.mark.parametrize("siamese", [False, True])
@pytest.mark.parametrize("kind", [*DSA_KINDS, *DC_STRATEGIES])
def test_the_gradient_in_the_images(kind, siamese):
    x = images(3, 5, 6, channels=2).requires_grad_()
    u = uniform(1 if siamese else 3, seed=4)
    if not siamese:
        u[:, 0] = torch.tensor([0.1, 0.45, 0.8])  # all three kinds of crop_scale_rotate, flipped and not
    assert torch.autograd.gradcheck(lambda x: augment(x, Draw(kind, u)), (x,))


# What an augmentation depends on


@pytest.mark.parametrize("kind", DSA_KINDS)
def test_siamese_images_share_the_numbers(kind):
    x, u = images(5, 15, 17), uniform(1, seed=2)
    together = augment(x, Draw(kind, u))
    torch.testing.assert_close(together, augment(x, Draw(kind, u.repeat(5, 1))), rtol=0, atol=0)
    alone = augment(x[3:4], Draw(kind, u))
    torch.testing.assert_close(together[3:4], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", DSA_KINDS)
def test_an_image_does_not_depend_on_its_batch(kind):
    x, u = images(5, 15, 17), uniform(5)
    together = augment(x, Draw(kind, u))
    for i in range(5):
        alone = augment(x[i : i + 1], Draw(kind, u[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [*DSA_KINDS, *DC_STRATEGIES])
def test_a_draw_can_be_replayed(kind):
    x, u = images(6, 16, 16, dtype=torch.float32), uniform(6)
    x_before, u_before = x.clone(), u.clone()
    draw = Draw(kind, u)
    first, second = augment(x, draw), augment(x, draw)
    assert first.equal(second) and x.equal(x_before) and u.equal(u_before)


def test_no_augmentation_leaves_images_alone():
    x = images(2, 5, 6)
    assert augment(x, NoAugmentation().draw(2, generator(0, "a"))) is x


# Drawing


def test_the_kind_is_uniform_over_the_strategy():
    for strategy in (DSA_STRATEGY, "flip_color", "rotate"):
        rng, draws = generator(0, "kinds", strategy), 6000
        counts = Counter(DSA(strategy).draw(1, rng).kind for _ in range(draws))
        share = 1 / len(strategy.split("_"))
        assert set(counts) == set(strategy.split("_"))
        for count in counts.values():
            assert abs(count - draws * share) <= 4.5 * math.sqrt(draws * share * (1 - share))


def test_the_numbers_are_uniform():
    u = DSA().draw(20000, generator(0, "numbers")).u
    assert u.shape == (20000, 3) and u.dtype == torch.float32 and u.device.type == "cpu"
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert (column * 20).long().bincount(minlength=20).sub(1000).abs().max() < 5 * math.sqrt(950)
    assert (torch.corrcoef(u.T) - torch.eye(3)).abs().max() < 0.03


def test_siamese_draws_one_row():
    assert DSA(siamese=True).draw(7, generator(0, "a")).u.shape == (1, 3)
    assert DSA(siamese=False).draw(7, generator(0, "a")).u.shape == (7, 3)


@pytest.mark.parametrize("augmentation", [DSA(), DSA(siamese=True), DC(), DC("crop_noise")])
def test_a_draw_depends_on_the_generator_only(augmentation):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [augmentation.draw(4, rng) for rng in [generator(0, "draw")] for _ in range(5)]
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    second = [augmentation.draw(4, rng) for rng in [generator(0, "draw")] for _ in range(5)]
    other = [augmentation.draw(4, rng) for rng in [generator(1, "draw")] for _ in range(5)]
    assert all(a.kind == b.kind and a.u.equal(b.u) for a, b in zip(first, second))
    assert not any(a.u.equal(b.u) for a, b in zip(first, other))
    assert not first[0].u.equal(first[1].u)


@pytest.mark.parametrize("strategy,name", [("color_shear", "shear"), ("", ""), ("Flip", "Flip"), ("flip__crop", "")])
def test_an_unknown_transformation_is_refused(strategy, name):
    with pytest.raises(InputError, match="dsa_strategy") as error:
        DSA(strategy)
    assert repr(name) in str(error.value) and all(kind in str(error.value) for kind in DSA_KINDS)
