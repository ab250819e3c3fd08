import math

import pytest
import torch

from pad.matching.loss import loss_by_layer, matching_loss
from pad.nn.flat import FlatModel
from pad.nn.networks import build

PUBLISHED = [
    (0.0, 0.0),
    (0.5, 0.0),
    (0.25, 0.0),
    (0.0, 0.5),
    (0.0, 0.3),
    (0.5, 0.5),
    (0.3, 0.6),
    (0.8, 0.8),
    (0.999, 0.0),
]
SPANS = [(0.0, 0.0, 0.5), (0.25, 0.0, 0.75), (0.3, 0.4, 0.9), (0.5, 0.0, 0.52)]  # from, loss_ratio, to
RATIOS = [(*ratios, 1.0) for ratios in PUBLISHED] + SPANS


def randn(count, seed, dtype=torch.float64):
    return torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def kept_coordinates(theta, target, match_from, loss_ratio, match_to=1.0):
    """Which coordinates count, one at a time."""
    count = len(theta)
    squares = [(theta[i].item() - target[i].item()) ** 2 for i in range(count)]
    inside = range(math.floor(match_from * count), math.floor(match_to * count))
    smallest = set(sorted(range(count), key=lambda i: (squares[i], i))[: math.floor(loss_ratio * count)])
    return [i for i in range(count) if i in inside and i not in smallest]


@pytest.mark.parametrize("match_from, loss_ratio, match_to", RATIOS)
@pytest.mark.parametrize("count", [101, 64])
def test_loss_and_gradient_equal_the_formula(count, match_from, loss_ratio, match_to):
    theta, start, target = (randn(count, seed) for seed in range(3))
    kept = kept_coordinates(theta, target, match_from, loss_ratio, match_to)
    assert kept
    leaf = theta.clone().requires_grad_()
    loss = sum((leaf[i] - target[i]) ** 2 for i in kept) / sum((start[i] - target[i]) ** 2 for i in kept)
    (gradient,) = torch.autograd.grad(loss, leaf)

    ours, ours_gradient = matching_loss(theta, start, target, match_from, loss_ratio, match_to=match_to)
    assert ours.shape == () and ours_gradient.shape == theta.shape
    assert ours.item() == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(ours_gradient, gradient, rtol=1e-13, atol=0)
    assert [i for i in range(count) if ours_gradient[i] != 0] == kept


def test_gradient_equals_finite_differences():
    theta, start, target, along = (randn(40, seed) for seed in range(4))
    _, gradient = matching_loss(theta, start, target, 0.3, 0.4, match_to=0.9)
    eps = 1e-6
    plus, minus = (matching_loss(theta + e * along, start, target, 0.3, 0.4, match_to=0.9)[0] for e in (eps, -eps))
    assert (gradient @ along).item() == pytest.approx(((plus - minus) / (2 * eps)).item(), rel=1e-7)


def test_at_the_start_the_loss_is_one_and_at_the_target_nothing_is_left():
    start, target = randn(30, 0), randn(30, 1)
    for ratios in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.3), (0.5, 0.5)):
        assert matching_loss(start, start, target, *ratios)[0].item() == pytest.approx(1, rel=1e-14)
    loss, gradient = matching_loss(target, start, target, 0.5)
    assert loss == 0 and not gradient.any()


def test_the_depth_cut_is_made_in_flat_order_and_may_fall_inside_a_tensor():
    module = build("ConvNetD2W8", 3, 4, (8, 8), 0)
    model = FlatModel(module)
    theta = model.flatten(module).double()
    start, target = theta + randn(len(theta), 0), theta + randn(len(theta), 1)
    cut = math.floor(0.55 * len(theta))
    _, gradient = matching_loss(theta, start, target, 0.55)
    named = model.unflatten(gradient)
    sizes = torch.tensor([tensor.numel() for tensor in named.values()])
    ends = sizes.cumsum(0)
    inside = [name for name, size, end in zip(named, sizes, ends) if end - size < cut < end]
    assert inside == ["body.1.0.weight"]  # the second convolution is cut in two
    for (name, tensor), size, end in zip(named.items(), sizes, ends):
        nonzero = tensor.flatten() != 0
        first_kept = min(max(cut - (end - size), 0), size)
        assert not nonzero[:first_kept].any() and nonzero[first_kept:].all(), name


@pytest.mark.parametrize("count, ratio, dropped", [(7, 0.5, 3), (5, 0.3, 1), (10, 0.09, 0), (10, 0.1, 1), (3, 0.99, 2)])
def test_shares_are_rounded_down(count, ratio, dropped):
    theta, start, target = torch.arange(1.0, count + 1), torch.zeros(count), torch.zeros(count)
    start += 1
    for ratios in ((ratio, 0.0), (0.0, ratio)):  # the shallowest are here those with the smallest error
        _, gradient = matching_loss(theta, start, target, *ratios)
        assert (gradient != 0).tolist() == [False] * dropped + [True] * (count - dropped)


def test_both_filters_count_over_all_parameters_and_keep_the_intersection():
    target, start = torch.zeros(10), torch.ones(10)
    theta = torch.tensor([9.0, 1.0, 8.0, 2.0, 7.0, 6.0, 3.0, 5.0, 4.0, 10.0])
    # Depth drops coordinates 0 to 4. The five smallest errors of all are at 1, 3, 6, 8 and 7, two of them among those.
    loss, gradient = matching_loss(theta, start, target, 0.5, 0.5)
    assert (gradient != 0).nonzero().flatten().tolist() == [5, 9]
    assert loss.item() == pytest.approx((36 + 100) / 2)


def test_of_equal_errors_the_shallower_are_dropped_first():
    theta, start, target = torch.tensor([2.0, -1.0, 1.0, 3.0, -1.0, 1.0]), torch.full((6,), 5.0), torch.zeros(6)
    _, gradient = matching_loss(theta, start, target, 0.0, 0.5)
    assert (gradient != 0).tolist() == [True, False, False, True, False, True]
    many = torch.ones(1000)
    _, gradient = matching_loss(many, 2 * many, 0 * many, 0.0, 0.25)
    assert (gradient != 0).tolist() == [False] * 250 + [True] * 750


def test_the_arguments_are_left_as_they_are_and_the_type_is_kept():
    arguments = [randn(50, seed, torch.float32).requires_grad_() for seed in range(3)]
    before = [tensor.clone() for tensor in arguments]
    loss, gradient = matching_loss(*arguments, 0.5, 0.25)
    assert loss.dtype == gradient.dtype == torch.float32 and not loss.requires_grad and not gradient.requires_grad
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(arguments, before))


def test_an_expert_that_did_not_move_gives_no_finite_loss():
    # The outer loop skips such an iteration: it must not pass for a perfect match.
    start = randn(10, 0)
    loss, _ = matching_loss(start + 1, start, start)
    assert not loss.isfinite()
    loss, _ = matching_loss(start, start, start)
    assert not loss.isfinite()


@pytest.mark.parametrize("match_from, loss_ratio, match_to", RATIOS)
def test_the_loss_by_layer_is_that_of_its_coordinates_and_adds_up(match_from, loss_ratio, match_to):
    theta, start, target = (randn(101, seed) for seed in range(3))
    sizes = [40, 1, 7, 53]
    kept = kept_coordinates(theta, target, match_from, loss_ratio, match_to)
    whole = sum((start[i] - target[i]).item() ** 2 for i in kept)
    expected, at = [], 0
    for size in sizes:
        mine = [i for i in kept if at <= i < at + size]
        expected.append([sum((end[i] - target[i]).item() ** 2 for i in mine) / whole for end in (theta, start)])
        at += size
    found = loss_by_layer(theta, start, target, sizes, match_from, loss_ratio, match_to=match_to)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    loss, _ = matching_loss(theta, start, target, match_from, loss_ratio, match_to=match_to)
    torch.testing.assert_close(found.sum(dim=0), torch.stack([loss, torch.ones_like(loss)]), rtol=1e-12, atol=0)
