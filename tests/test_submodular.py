import itertools

import numpy as np
import pytest
import torch

from pad.difficulty.submodular import FacilityLocation, GraphCut, GrowingFactor, LogDeterminant, maximise


def kernel(n, rank, seed=0):
    """Positive semi-definite, entries in [0, 1]."""
    vectors = torch.rand(n, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return vectors @ vectors.T


def steps(n, levels, seed):
    """Symmetric, with so few different entries that most choices are between tied images."""
    rng = torch.Generator().manual_seed(seed)
    half = torch.randint(levels, (n, n), generator=rng).triu().double()
    return torch.maximum(half, half.T).fill_diagonal_(levels - 1) / (levels - 1)


def facility(s, chosen):
    return s[:, chosen].max(axis=1).sum()


def cut(s, chosen):
    return s[:, chosen].sum() - s[np.ix_(chosen, chosen)].sum()


def volume(s, chosen):
    return np.linalg.slogdet(s[np.ix_(chosen, chosen)])[1]


def brute_force(s, value):
    """Greedy by computing the function of every set from scratch; the first of the best."""
    chosen = []
    for _ in range(len(s)):
        left = [j for j in range(len(s)) if j not in chosen]
        values = [value(s, [*chosen, j]) for j in left]
        chosen.append(left[int(np.argmax(values))])
    return chosen


def every_gain_each_time(function):
    """Greedy that evaluates every image for each pick; the first of the best."""
    chosen = []
    for _ in range(function.n):
        gains = function.gains(torch.arange(function.n))
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
        function.add(torch.tensor(chosen[-1:]))
    return chosen


FUNCTIONS = [(FacilityLocation, facility), (GraphCut, cut), (LogDeterminant, volume)]


@pytest.mark.parametrize("function, value", FUNCTIONS)
def test_greedy_picks_what_brute_force_picks(function, value):
    for seed in range(3):
        s = kernel(16, 16, seed)
        assert maximise(function(s.clone())).tolist() == brute_force(s.numpy(), value)


@pytest.mark.parametrize("function, value", FUNCTIONS[:2])
def test_ties_go_to_the_lowest(function, value):
    for seed, levels in itertools.product(range(3), (2, 3, 5)):
        s = steps(15, levels, seed)
        assert maximise(function(s)).tolist() == brute_force(s.numpy(), value)


@pytest.mark.parametrize("seed", range(4))
def test_lazy_picks_what_brute_force_picks_on_more_images_than_a_block_ties_or_not(seed):
    twice = kernel(75, 6, seed).repeat(2, 2)  # every image is there twice
    for s in (kernel(150, 4, seed), steps(150, 4, seed), twice):
        assert maximise(FacilityLocation(s)).tolist() == every_gain_each_time(FacilityLocation(s))


def test_lazy_evaluates_few():
    class Counting(FacilityLocation):
        evaluated = 0

        def gains(self, candidates):
            self.evaluated += len(candidates)
            return super().gains(candidates)

    lazy, brute = Counting(kernel(400, 5)), Counting(kernel(400, 5))
    assert maximise(lazy).tolist() == every_gain_each_time(brute)
    assert brute.evaluated == 400**2
    assert lazy.evaluated < brute.evaluated / 5


def test_facility_location_gains_are_exact_and_never_grow():
    """Exact sums of multiples of 2^-24 do not depend on the company in which a gain is computed."""
    function = FacilityLocation(kernel(600, 7))
    everything, before = torch.arange(600), torch.full((600,), torch.inf)
    for pick in maximise(FacilityLocation(kernel(600, 7)))[:300:15]:
        gains = function.gains(everything)
        assert torch.equal(gains, torch.cat([function.gains(some) for some in everything.split(7)]))
        exact = np.maximum(function.similarity.double().numpy() - function.covered.double().numpy(), 0)
        assert (gains * 2**24).long().tolist() == (exact * 2**24).astype(np.int64).sum(axis=1).tolist()
        assert (gains <= before).all()
        function.add(pick[None])
        before = gains


def test_log_determinant_gains_add_up_to_slogdet_over_panels():
    s = kernel(300, 300) + 0.01 * torch.eye(300, dtype=torch.float64)
    function, total = LogDeterminant(s.clone()), 0.0
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for k, pick in enumerate(order, 1):
        total += function.gains(pick[None]).item()
        function.add(pick[None])
        if k % 50 == 0 or k in (127, 128, 129):
            chosen = order[:k]
            assert total == pytest.approx(torch.linalg.slogdet(s[chosen][:, chosen])[1].item(), rel=1e-9)


def test_images_that_would_make_the_determinant_zero_come_last_in_order():
    s = kernel(200, 140)
    order = maximise(LogDeterminant(s.clone())).tolist()
    inside = order[:140]
    assert torch.linalg.matrix_rank(s[inside][:, inside], hermitian=True) == 140
    assert order[140:] == sorted(order[140:])


def test_the_factor_is_the_cholesky_factor():
    s, ridge = kernel(150, 20), 0.3
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.cholesky(s[order][:, order] + ridge * torch.eye(150, dtype=torch.float64))
    factor = GrowingFactor(s.clone(), ridge)
    for t, pick in enumerate(order):
        column, scale = factor.add(pick[None])
        assert 1 / scale.item() == pytest.approx(expected[t, t].item(), rel=1e-10)
        torch.testing.assert_close(column[order[t + 1 :]], expected[t + 1 :, t], rtol=1e-8, atol=1e-10)
