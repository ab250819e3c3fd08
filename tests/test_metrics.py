"""DD-Ranking's scores against values worked out from its definitions."""

import math
import statistics

import pytest
import torch

from pad.metrics import NEEDS, Estimate, scores

ACCURACIES = {"full": 0.8, "syn_hard": 0.6, "syn": 0.65, "random": 0.55, "syn_plain": 0.5, "random_plain": 0.46}


def of(**accuracies) -> dict[str, Estimate]:
    return {name: Estimate(value, 0.0) for name, value in accuracies.items()}


def test_scores_by_hand():
    """HLR 20 points and IOR 10: alpha = -0.05. Gaps 10 and 4: beta = 0.07."""
    found = {name: each.mean for name, each in scores(of(**ACCURACIES)).items()}
    low, high = math.exp(-1), math.exp(1)
    assert found["hlr"] == pytest.approx(0.2, abs=1e-15) and found["ior"] == pytest.approx(0.1, abs=1e-15)
    assert found["lrs"] == pytest.approx((math.exp(-0.05) - low) / (high - low), abs=1e-15)
    assert found["lrs"] == pytest.approx(0.248, abs=5e-4)
    assert found["ars"] == pytest.approx((math.exp(0.07) - low) / (high - low), abs=1e-15)


def test_ends_of_the_scale():
    """From the worst to the best; a set that is worth what random images are, and loses nothing, has .269."""
    best = scores(of(full=0, syn_hard=1, syn=1, random=0, syn_plain=1, random_plain=0))
    worst = scores(of(full=1, syn_hard=0, syn=0, random=1, syn_plain=0, random_plain=1))
    equal = scores(of(full=0.7, syn_hard=0.7, syn=0.4, random=0.4))
    assert best["lrs"].mean == best["ars"].mean == pytest.approx(1) and worst["lrs"].mean == worst["ars"].mean == 0
    assert equal["lrs"].mean == pytest.approx(0.2689, abs=1e-4) and "ars" not in equal


@pytest.mark.parametrize("name", NEEDS)
def test_a_score_is_there_when_its_accuracies_are(name):
    have = {need: ACCURACIES[need] for need in NEEDS[name]}
    assert name in scores(of(**have))
    for need in have:
        assert name not in scores(of(**{key: value for key, value in have.items() if key != need}))


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_standard_errors_are_those_of_many_draws(weight):
    """The spread of scores of accuracies that are drawn with these errors: 1 % of it is chance."""
    errors = dict(zip(ACCURACIES, (0.002, 0.011, 0.004, 0.007, 0.013, 0.009)))
    rng = torch.Generator().manual_seed(0)
    draws = {
        name: mean + errors[name] * torch.randn(20_000, generator=rng, dtype=torch.float64)
        for name, mean in ACCURACIES.items()
    }
    each = [
        scores({name: Estimate(values[i].item(), 0.0) for name, values in draws.items()}, weight) for i in range(20_000)
    ]
    found = scores({name: Estimate(mean, errors[name]) for name, mean in ACCURACIES.items()}, weight)
    for name, estimate in found.items():
        assert estimate.se == pytest.approx(statistics.stdev(one[name].mean for one in each), rel=0.03)


def test_an_accuracy_that_counts_twice_is_one():
    """Of a set with hard labels: in alpha, half of its accuracy and half of it again."""
    few = {"syn": Estimate(0.65, 0.02), "random": Estimate(0.5, 0.0), "full": Estimate(0.8, 0.0)}
    span = math.e - math.exp(-1)
    found = scores(few, same={"syn_hard": "syn"})
    assert found["lrs"].se == pytest.approx(math.exp(found["ior"].mean / 2 - found["hlr"].mean / 2) / span * 0.02)
    assert found["hlr"].se == found["ior"].se == 0.02


def test_one_network_has_no_standard_error():
    lone = {name: Estimate(value, float("nan")) for name, value in ACCURACIES.items()}
    assert scores(lone)["lrs"].as_dict()["se"] is None
