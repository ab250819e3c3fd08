import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from pad.difficulty.evidence import Evidence
from pad.difficulty.methods import METHODS
from pad.difficulty.orderings import glister, grad_match

CLASSES, FEATURES = 4, 6
ORDERINGS = {name: method.compute for name, method in METHODS.items() if method.kind == "order"}


class Case:
    """A class of images, in float64, the last layer they are seen by, and all that follows from them, plainly."""

    def __init__(self, n=15, seed=0, dtype=torch.float64):
        rng = torch.Generator().manual_seed(seed)
        features = torch.randn(n, FEATURES, generator=rng, dtype=torch.float64) + 0.5
        self.weight = torch.randn(CLASSES, FEATURES, generator=rng, dtype=torch.float64)
        self.bias = torch.randn(CLASSES, generator=rng, dtype=torch.float64)
        labels = torch.full((n,), 2)
        logits = features @ self.weight.T + self.bias
        self.evidence = Evidence(features.to(dtype), logits.to(dtype), labels)
        self.features, self.labels = features, labels
        self.gradients = np.stack([self.gradient(i, self.weight, self.bias) for i in range(n)])

    def gradient(self, i, weight, bias):
        """Of image i's loss, in weight and bias, by autograd."""
        parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        loss = F.cross_entropy(F.linear(self.features[i : i + 1], *parameters), self.labels[i : i + 1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).numpy()

    def similarities(self):
        lengths = np.linalg.norm(self.gradients, axis=1)
        return 0.5 + 0.5 * (self.gradients @ self.gradients.T) / np.outer(lengths, lengths)

    def distances(self):
        return np.linalg.norm(self.gradients[:, None] - self.gradients, axis=2)


def brute_force(n, value):
    """Greedy: ``value(selected, candidate)`` of every candidate each time, from scratch; the first of the best.

    There are exact ties: of two images that are each other's nearest, each may add to facility location as much.
    """
    chosen = []
    for _ in range(n):
        left = [j for j in range(n) if j not in chosen]
        chosen.append(left[int(np.argmax(np.round([value(chosen, j) for j in left], 9)))])
    return chosen


def plain_herding(case):
    h = case.features.numpy()
    return lambda chosen, j: -np.linalg.norm(h[[*chosen, j]].mean(axis=0) - h.mean(axis=0))


def plain_k_center(case):
    h = case.features.numpy()

    def value(chosen, j):
        if not chosen:
            return -np.linalg.norm(h[j] - h.mean(axis=0))
        return min(np.linalg.norm(h[j] - h[i]) for i in chosen)

    return value


def plain_contextual_diversity(case):
    p = case.evidence.logits.softmax(dim=1).numpy()
    between = np.array([[(entropy(a, b) + entropy(b, a)) / 2 for a in p] for b in p])
    return lambda chosen, j: between[j, chosen].min() if chosen else -between[j].sum()


def plain_craig(case):
    d = case.distances()
    return lambda chosen, j: (d.max() - d[:, [*chosen, j]]).max(axis=1).sum()


def plain_grad_match(case, ridge=1.0):
    g = case.gradients

    def value(chosen, j):
        residual = g.mean(axis=0)
        if chosen:  # ridge regression as least squares with rows for the penalty
            design = np.vstack([g[chosen].T, np.sqrt(ridge) * np.eye(len(chosen))])
            weights = np.linalg.lstsq(design, np.append(residual, np.zeros(len(chosen))), rcond=None)[0]
            residual = residual - g[chosen].T @ weights
        return g[j] @ residual

    return value


def plain_glister(case, eta=0.1, at_once=1):
    def value(chosen, j):
        chosen = chosen[: len(chosen) // at_once * at_once]
        step = torch.from_numpy(case.gradients[chosen].mean(axis=0) if chosen else np.zeros(CLASSES * (FEATURES + 1)))
        weight = case.weight - eta * step[: CLASSES * FEATURES].view(CLASSES, FEATURES)
        bias = case.bias - eta * step[CLASSES * FEATURES :]
        return case.gradients[j] @ np.mean([case.gradient(i, weight, bias) for i in range(len(case.labels))], axis=0)

    return value


def plain_facility_location(case):
    s = case.similarities()
    return lambda chosen, j: s[:, [*chosen, j]].max(axis=1).sum()


def plain_graph_cut(case):
    s = case.similarities()

    def value(chosen, j):
        chosen = [*chosen, j]
        return s[:, chosen].sum() - s[np.ix_(chosen, chosen)].sum()

    return value


def plain_log_determinant(case):
    s = case.similarities()
    return lambda chosen, j: np.linalg.slogdet(s[np.ix_([*chosen, j], [*chosen, j])])[1]


PLAIN = {
    "Herding": plain_herding,
    "kCenterGreedy": plain_k_center,
    "ContextualDiversity": plain_contextual_diversity,
    "Craig": plain_craig,
    "GradMatch": plain_grad_match,
    "Glister": plain_glister,
    "Submodular-FacilityLocation": plain_facility_location,
    "Submodular-GraphCut": plain_graph_cut,
    "Submodular-LogDeterminant": plain_log_determinant,
}


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PLAIN)
def test_the_order_is_that_of_brute_force(name, seed):
    case = Case(seed=seed)
    order = ORDERINGS[name](case.evidence, draw())
    assert order.dtype == torch.int64
    assert order.tolist() == brute_force(15, PLAIN[name](case))


@pytest.mark.parametrize("name", PLAIN)
def test_single_precision_evidence_gives_the_same_order(name):
    case = Case(dtype=torch.float32)
    assert ORDERINGS[name](case.evidence, draw()).tolist() == brute_force(15, PLAIN[name](case))


def test_grad_match_with_another_ridge():
    case = Case(n=12)
    weak, strong = (grad_match(case.evidence, ridge=ridge).tolist() for ridge in (0.01, 30.0))
    assert weak == brute_force(12, plain_grad_match(case, 0.01))
    assert strong == brute_force(12, plain_grad_match(case, 30.0)) != weak


@pytest.mark.parametrize("eta, at_once", [(1.0, 1), (1.0, 4), (5.0, 3)])
def test_glister_with_another_step_and_several_picks_at_once(eta, at_once):
    case = Case(n=14)
    order = glister(case.evidence, eta=eta, at_once=at_once).tolist()
    assert order == brute_force(14, plain_glister(case, eta, at_once))
    assert order != glister(case.evidence).tolist()


def test_glister_updates_after_each_hundredth_of_the_class():
    evidence = Case(n=420).evidence
    assert torch.equal(glister(evidence, eta=2.0), glister(evidence, eta=2.0, at_once=4))
    assert not torch.equal(glister(evidence, eta=2.0), glister(evidence, eta=2.0, at_once=1))


def test_uniform_depends_on_the_generator_only():
    first = ORDERINGS["Uniform"](Case(n=50).evidence, draw(1))
    assert torch.equal(first, ORDERINGS["Uniform"](Case(n=50, seed=1).evidence, draw(1)))
    assert not torch.equal(first, ORDERINGS["Uniform"](Case(n=50).evidence, draw(2)))


def evidence_of(features, logits):
    return Evidence(features.float(), logits.float(), torch.zeros(len(features), dtype=torch.int64))


def degenerate(n, kind):
    rng = draw()
    features, logits = torch.randn(n, 5, generator=rng), torch.randn(n, 3, generator=rng)
    if kind == "equal":
        features[:], logits[:] = features[0].clone(), logits[0].clone()
    elif kind == "copies":
        features[n // 2 :], logits[n // 2 :] = features[: n - n // 2].clone(), logits[: n - n // 2].clone()
    elif kind == "no gradient":
        logits[:, 0] = 1e4
    elif kind == "some without gradient":
        logits[::3, 0] = 1e4
    elif kind == "no features":
        features.zero_()
    elif kind == "large":
        features, logits = 1e4 * features, 1e3 * logits
    return evidence_of(features, logits)


@pytest.mark.parametrize("kind", ["equal", "copies", "no gradient", "some without gradient", "no features", "large"])
@pytest.mark.parametrize("name", ORDERINGS)
def test_degenerate_classes_are_ordered_too(name, kind):
    for n in (1, 2, 30, 150):
        order = ORDERINGS[name](degenerate(n, kind), draw())
        assert torch.equal(order.sort().values, torch.arange(n))


@pytest.mark.parametrize("name", ["Craig", "GradMatch", "Glister", "Submodular-FacilityLocation"])
def test_without_gradients_the_order_is_that_of_the_data(name):
    assert ORDERINGS[name](degenerate(40, "no gradient"), draw()).tolist() == list(range(40))


@pytest.mark.parametrize("name", ["Craig", "Submodular-FacilityLocation", "Submodular-LogDeterminant"])
def test_copies_come_last_in_order(name):
    order = ORDERINGS[name](degenerate(20, "copies"), draw()).tolist()
    assert order[10:] == sorted(order[10:])
    assert sorted(j % 10 for j in order[:10]) == list(range(10))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from(list(ORDERINGS)))
def test_every_order_is_a_permutation(n, levels, seed, name):
    """With features and logits of few values, so that there are ties and copies."""
    rng = draw(seed)
    features, logits = (torch.randint(levels, (n, size), generator=rng).float() for size in (3, 4))
    order = ORDERINGS[name](evidence_of(features, logits), draw())
    assert torch.equal(order.sort().values, torch.arange(n))
