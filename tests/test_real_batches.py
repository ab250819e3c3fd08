from fractions import Fraction

import pytest
import torch

from pad.errors import InputError
from pad.matching.real import RealBatches, without_ends
from pad.rng import generator

IMAGES = torch.arange(30.0).view(30, 1, 1, 1)  # each says where it stands


def draw(batches, c, seed=0, size=None):
    return [int(image) for image in batches.draw(c, generator(seed, "x"), size).flatten()]


# ----------------------------------------------------------------------------------------------- leaving images out


@pytest.mark.parametrize("n", [10, 30, 70, 5000])
def test_shares_are_those_that_were_typed(n):
    """0.29 * 100 is 28.999... in binary; one image must not hang on that."""
    row = torch.randperm(n, generator=generator(0, "row"))
    for hundredths in range(0, 96):
        text = f"0.{hundredths:02d}"
        easy, hard = int(Fraction(text) * n), int(Fraction("0.04") * n)
        (found,) = without_ends([row], float(text), 0.04)
        assert found.tolist() == row.tolist()[easy : n - hard], text


def test_nothing_is_left_out_unless_asked_and_rows_may_differ_in_length():
    rows = [torch.tensor([4, 2, 9]), torch.arange(10, 20), torch.tensor([7])]
    assert all(torch.equal(a, b) for a, b in zip(without_ends(rows, 0, 0), rows, strict=True))
    assert [row.tolist() for row in without_ends(rows, 0.4, 0.2)] == [[2, 9], [14, 15, 16, 17], [7]]
    assert [row.tolist() for row in rows] == [[4, 2, 9], list(range(10, 20)), [7]]


@pytest.mark.parametrize("shares, c", [((0.5, 0.5), 0), ((0.75, 0.5), 0), ((0.9, 0.1), 1), ((0.5, 0.4), None)])
def test_a_class_of_which_nothing_is_left_is_refused_by_number(shares, c):
    rows = [torch.arange(12 if c else 4), torch.arange(10)]
    if c is None:
        assert [len(row) for row in without_ends(rows, *shares)] == [1, 1]
        return
    with pytest.raises(
        InputError, match=f"drop_easy: {shares[0]} and drop_hard: {shares[1]} leave no image of class {c}"
    ):
        without_ends(rows, *shares)


# ------------------------------------------------------------------------------------------------------ the batches


def test_a_batch_has_images_of_its_row_each_at_most_once():
    batches = RealBatches(IMAGES, [torch.arange(0, 10), torch.arange(15, 30)], 6)
    seen = set()
    for seed in range(40):
        found = draw(batches, 1, seed)
        assert len(found) == len(set(found)) == 6
        seen |= set(found)
    assert seen == set(range(15, 30)), "some are never drawn, or others are"


def test_of_a_class_that_is_smaller_than_a_batch_all_are_drawn():
    batches = RealBatches(IMAGES, [torch.tensor([3, 5, 8])], 6)
    assert sorted(draw(batches, 0)) == [3, 5, 8]
    assert batches.draw(0, generator(0, "x")).shape == (3, 1, 1, 1)


def test_another_size_may_be_asked_for():
    batches = RealBatches(IMAGES, [torch.arange(30)], 6)
    assert len(draw(batches, 0, size=16)) == 16 and len(draw(batches, 0, size=2)) == 2


def test_a_batch_is_a_function_of_the_generator():
    batches = RealBatches(IMAGES, [torch.arange(0, 15), torch.arange(15, 30)], 8)
    state = torch.get_rng_state()
    assert draw(batches, 0, 1) == draw(batches, 0, 1) != draw(batches, 0, 2)
    rng = generator(1, "x")
    first, second = batches.draw(0, rng), batches.draw(0, rng)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_of_one_class_are_as_likely_as_one_another():
    batches, n = RealBatches(IMAGES, [torch.arange(10)], 3), 2000
    rng, counts = generator(0, "x"), torch.zeros(30)
    for _ in range(n):
        counts[batches.draw(0, rng).flatten().long()] += 1
    expected = 3 * n / 10
    assert ((counts[:10] - expected) ** 2 / expected).sum() < 27.9  # 9 degrees of freedom: 0.1 %
