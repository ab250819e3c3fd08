"""Greedy selections of coresets (arXiv 2204.08499), continued to the last image: the order of selection is a ranking.

An ordering takes the evidence of one class, and a random generator that only :func:`uniform` uses, and returns all
positions 0..n-1 in order of selection, ``[n]`` int64 on the CPU. Ties go to the lowest position. Selection knows no
difficulty: what is selected first comes first, where the easy images are in a ranking by scores, so each docstring says
what that is. The first k images are the method's coreset of size k, for every k.

Costs are operations for a class of n images with D features and K logits; memory is at most three [n, n] float64
matrices, except for Uniform. N images in C equal classes cost C times that with n = N / C, so what goes with n^2 falls
with C. Computation is in float64, on the device of the evidence, and draws are made on the CPU.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pad.difficulty.evidence import Evidence
from pad.difficulty.submodular import FacilityLocation, GraphCut, GrowingFactor, LogDeterminant, maximise

# ---------------------------------------------------------------------------------------------- between two images


def gradient_products(evidence: Evidence) -> Tensor:
    """Inner products of the last layer's gradients, ``[n, n]`` float64: <e_i, e_j> (1 + <h_i, h_j>)."""
    errors, features = evidence.errors.double(), evidence.features.double()
    return (features @ features.T).add_(1).mul_(errors @ errors.T)


def gradient_similarities(evidence: Evidence) -> Tensor:
    """(1 + cosine) / 2 of the last layer's gradients, ``[n, n]`` float64 in [0, 1]; the cosine of a zero gradient is 0.

    As DeepCore has it. No entry is negative, so graph cut is submodular, and the matrix is positive semi-definite.
    """
    features = evidence.features.double()
    inputs = torch.cat([features, features.new_ones(len(features), 1)], dim=1)  # of weight and bias
    errors = _directions(evidence.errors.double())
    inputs = _directions(inputs)
    similarities = (inputs @ inputs.T).mul_(errors @ errors.T).add_(1).div_(2).clamp_(0, 1)
    similarities.diagonal().copy_((1 + errors.any(dim=1)) / 2)  # exactly, as log-determinants begin with a tie of all
    return similarities


def gradient_distances(evidence: Evidence) -> Tensor:
    """Euclidean distances between the last layer's gradients, ``[n, n]`` float64."""
    return _squared_distances(gradient_products(evidence)).sqrt_()


def prediction_divergences(evidence: Evidence) -> Tensor:
    """(KL(p_i || p_j) + KL(p_j || p_i)) / 2 of the predictions, ``[n, n]`` float64, at least 0."""
    logs = evidence.logits.double().log_softmax(dim=1)
    p = logs.exp()
    cross = p @ logs.T
    own = cross.diagonal().clone()
    return (own[:, None] + own).sub_(cross).sub_(cross.T).div_(2).clamp_(min=0)


def _directions(vectors: Tensor) -> Tensor:
    lengths = vectors.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths, 0.0)


def _squared_distances(products: Tensor) -> Tensor:
    """Squared distances from inner products, in place."""
    squares = products.diagonal().clone()
    return products.mul_(-2).add_(squares).add_(squares[:, None]).clamp_(min=0).fill_diagonal_(0)


def _centred(features: Tensor) -> Tensor:
    features = features.double()
    return features - features.mean(dim=0)


# ------------------------------------------------------------------------------------------------------- orderings


def herding(evidence: Evidence, rng: torch.Generator | None = None) -> Tensor:
    """Herding (Welling 2009): the next image brings the mean feature of those selected closest to that of the class.

    argmin_j ||(sum of h_i, i in S) + h_j - (|S| + 1) mean||. First: an image near the mean, then images that balance
    each other; any beginning of the order has nearly the mean of the class. DeepCore takes the farthest image instead
    of the closest. n^2 D, then n per pick.
    """
    features = _centred(evidence.features)
    products = features @ features.T
    squares = products.diagonal().clone()
    sums = products.new_zeros(len(products))  # <h_j, sum over S>

    def step(pick: Tensor | None) -> Tensor:
        if pick is not None:
            sums.add_(products[pick][0], alpha=2)
        return -(sums + squares)

    return _greedy(len(products), step)


def k_center_greedy(evidence: Evidence, rng: torch.Generator | None = None) -> Tensor:
    """k-Center Greedy (arXiv 1708.00489): the next image is farthest, in the features, from those selected.

    argmax_j min_{i in S} ||h_j - h_i||. First: the image nearest to the mean of the class, where the paper begins with
    given images and DeepCore with a random one, so that the order is the same for every seed; then outliers, which are
    often hard, and last images that have a near neighbour. n^2 D, then n per pick.
    """
    features = _centred(evidence.features)
    return _k_center(_squared_distances(features @ features.T))


def contextual_diversity(evidence: Evidence, rng: torch.Generator | None = None) -> Tensor:
    """Contextual Diversity (arXiv 2008.05723): k-Center Greedy by what is predicted.

    argmax_j min_{i in S} (KL(p_i || p_j) + KL(p_j || p_i)) / 2 with softmax predictions p. First: the image whose sum
    of divergences to the others is least; then predictions unlike all before, and last images predicted as others are.
    n^2 K, then n per pick.
    """
    return _k_center(prediction_divergences(evidence))


def craig(evidence: Evidence, rng: torch.Generator | None = None) -> Tensor:
    """Craig (arXiv 1906.01827): images whose last-layer gradients are near to those of all.

    Facility location of (largest distance) - ||g_i - g_j||: argmax_j of how much nearer the images come to the nearest
    selected one, in sum. First: typical gradients of large groups; last: images for which others stand already.
    n^2 (D + K), then n per gain; lazy greedy computes some 20 n of the n^2 gains.
    """
    distances = gradient_distances(evidence)
    largest = distances.max()
    similarity = 1 - torch.where(largest > 0, distances / largest, 0.0)  # the scale changes no choice
    return maximise(FacilityLocation(similarity))


def grad_match(evidence: Evidence, rng: torch.Generator | None = None, ridge: float = 1.0) -> Tensor:
    """GradMatch (arXiv 2103.00123): orthogonal matching pursuit of the class's mean last-layer gradient g.

    argmax_j <g_j, g - sum of w_i g_i over S>, weights w that minimise ||g - sum of w_i g_i||^2 + ``ridge`` ||w||^2,
    anew for each pick. As in DeepCore the weights within the pursuit are unconstrained and the ridge is 1; but DeepCore
    divides the gradients by the batch size and has no ridge at the first pick. The largest product is taken, not the
    largest absolute one, as weights should become positive. First: images of large gradients along the mean one,
    usually misclassified; last: what the residual has nothing of. Where all gradients are zero the order is that of the
    data. The ridge keeps the factor regular however many images are selected.
    n^2 (D + K), then 2 n^3 in matrix products for all picks.
    """
    products = gradient_products(evidence)
    residual = products.mean(dim=1)  # <g_j, what is left of g>
    factor = GrowingFactor(products, ridge)

    def step(pick: Tensor | None) -> Tensor:
        if pick is not None:
            explained = residual[pick]
            column, scale = factor.add(pick)
            residual.addcmul_(column, explained * scale, value=-1)
        return residual

    return _greedy(len(residual), step)


def glister(
    evidence: Evidence, rng: torch.Generator | None = None, eta: float = 0.1, at_once: int | None = None
) -> Tensor:
    """Glister (arXiv 2012.10630): the next image's gradient step lowers a validation loss most; here, the class's own.

    argmax_j <g_j, mean over the class of the last layer's gradients at the weights that a step along S leads to>, the
    first-order gain. As in DeepCore the step is ``eta``, the learning rate, times the mean gradient of S (the paper has
    the sum, which leads anywhere when S is large), and the logits follow it exactly, the last layer being linear.
    The weights are updated after every ``at_once`` picks, 1% of the class if not given, at least 1; the paper, too,
    takes several between updates. (DeepCore's code never does, by a misspelled argument: it sorts by the first gains.)
    First: images of large gradients that agree with the class's; last: those already right, or opposed to the class.
    n^2 (D + K), then 2 n^2 K per update.
    """
    n = len(evidence)
    features = evidence.features.double()
    errors = evidence.errors.double()
    products = (features @ features.T).add_(1)
    logits = evidence.logits.double()
    step = torch.zeros_like(errors)  # of the logits, times |S|
    at_once = at_once or max(1, n // 100)
    picked = torch.zeros(n, dtype=torch.bool, device=errors.device)
    picks = []
    for done in range(0, n, at_once):
        moved = Evidence(evidence.features, logits - eta / max(1, done) * step, evidence.labels)
        gains = (errors * (products @ moved.errors)).sum(dim=1)
        best = gains.masked_fill_(picked, -math.inf).argsort(descending=True, stable=True)[: min(at_once, n - done)]
        step.addmm_(products[:, best], errors[best])
        picked[best] = True
        picks.append(best)
    return torch.cat(picks).cpu()


def facility_location(evidence: Evidence, rng: torch.Generator | None = None) -> Tensor:
    """Facility location (DeepCore): argmax_j of the sum over i of max(0, s_ij - max_{l in S} s_il).

    s is (1 + cosine) / 2 of the last layer's gradients. First: images like many; last: images for which others stand.
    n^2 (D + K), then n per gain; lazy greedy computes some 20 n of the n^2 gains.
    """
    return maximise(FacilityLocation(gradient_similarities(evidence)))


def graph_cut(evidence: Evidence, rng: torch.Generator | None = None) -> Tensor:
    """Graph cut (DeepCore): argmax_j (sum of s_ij over all i) - 2 (sum of s_ij over i in S) - s_jj.

    s is (1 + cosine) / 2 of the last layer's gradients. First: an image like many, then images unlike those selected;
    from about half the class on gains are negative, and the last are images like many. n^2 (D + K), then n per pick.
    """
    return maximise(GraphCut(gradient_similarities(evidence)))


def log_determinant(evidence: Evidence, rng: torch.Generator | None = None) -> Tensor:
    """Log-determinant (arXiv 1709.05135): argmax_j log det of s over S and j, the volume that the selected span.

    s is (1 + cosine) / 2 of the last layer's gradients. First: images unlike each other, beginning with the first of
    the class; last: images that the selected can be combined to, such as copies, in the order of the data. DeepCore
    takes the most explained image instead of the least. n^2 (D + K), then 2 n^3 in matrix products for all picks.
    """
    return maximise(LogDeterminant(gradient_similarities(evidence)))


def uniform(evidence: Evidence, rng: torch.Generator | None = None) -> Tensor:
    """A random order drawn by ``rng``: what any other should be compared with. First means nothing. n."""
    return torch.randperm(len(evidence), generator=rng)


def _k_center(distances: Tensor) -> Tensor:
    """k-center greedy, beginning with the image of the least sum of distances (of squares: nearest to the mean)."""
    nearest = torch.full_like(distances[0], math.inf)

    def step(pick: Tensor | None) -> Tensor:
        if pick is None:
            return -distances.sum(dim=1)
        return torch.minimum(nearest, distances[pick][0], out=nearest)

    return _greedy(len(distances), step)


def _greedy(n: int, step: Callable[[Tensor | None], Tensor]) -> Tensor:
    """Pick all of 0..n-1: always the highest of the values ``[n]`` that ``step(last pick [1], or None)`` gives."""
    picks = []
    values = step(None)
    picked = torch.zeros_like(values, dtype=torch.bool)
    for _ in range(n):
        pick = values.masked_fill(picked, -math.inf).argmax(keepdim=True)  # nothing waits for the device
        picked.index_fill_(0, pick, True)
        picks.append(pick)
        values = step(pick)
    return torch.cat(picks).cpu()
