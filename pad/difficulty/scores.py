"""Per-image difficulty as numbers, low = easy: the formulas. Which end is easy, and why, stands with each.

They take what one trained network says (:mod:`pad.difficulty.evidence`), except DeepFool, which asks the network
itself, and Forgetting and Loss, which watch it being trained. Costs are for n images, K classes and D features,
beside the forward pass that all share. Everything is computed in float64, and small differences are never taken from
large numbers: of the easiest images, which the curriculum adds first, most have a p_y that rounds to 1.
"""

import torch
from torch import Tensor

from pad.nn.networks import AnyNetwork

# --------------------------------------------------------------------------- of the label and what is predicted


def error_vectors(logits: Tensor, labels: Tensor) -> Tensor:
    """p - y, ``[n, K]`` in the logits' type; logits ``[n, K]``, labels ``[n]`` int64; p is the softmax, y one-hot."""
    # 1 - p_y is the sum of the other probabilities; a difference would round the easiest images to the same zero
    wrong = logits.softmax(dim=1).scatter(1, labels[:, None], 0.0)
    return wrong.scatter(1, labels[:, None], -wrong.sum(dim=1, keepdim=True))


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """EL2N, the length of the error vector, ||p - y|| (arXiv 2107.07075, section 2.2). Low is easy: it is learned.

    logits ``[n, K]``, labels ``[n]`` int64 -> ``[n]`` float64 in [0, sqrt(2)]; p is the softmax, y the one-hot label.
    Cost n K.
    """
    return error_vectors(logits.double(), labels).norm(dim=1)


def grand(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """GraNd of the last linear layer: the norm of each image's cross-entropy gradient in its weight and bias.

    That gradient is (p - y) h^T and p - y for an input h, so its norm is ||p - y|| sqrt(1 + ||h||^2) (arXiv 2107.07075,
    section 2.1). Low is easy: training has nothing left to do for the image. Cost n (K + D).
    logits ``[n, K]``, features h ``[n, D]``, labels ``[n]`` int64 -> ``[n]`` float64, at least 0.
    """
    return el2n(logits, labels) * (1 + features.double().square().sum(dim=1)).sqrt()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y of each image: logits ``[n, K]``, labels ``[n]`` int64 -> ``[n]`` float64, at least 0. Cost n K."""
    gaps = logits.double() - logits.double().gather(1, labels[:, None])
    rest = gaps.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1)  # log of (1 - p_y) / p_y
    return rest.logaddexp(torch.zeros_like(rest))


# ------------------------------------------------------------------------------- of what is predicted, label or not


def _odds(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p_k / p_max for all classes but the most probable, which gets 0, ``[n, K]`` float64; and their logarithms."""
    logits = logits.double()
    top, best = logits.max(dim=1, keepdim=True)
    logarithms = logits - top
    return logarithms.exp().scatter(1, best, 0.0), logarithms


def least_confidence(logits: Tensor) -> Tensor:
    """Uncertainty-LeastConfidence, 1 - max_k p_k (Coleman et al., arXiv 1906.11829).

    Low is easy: the network is sure. An image with a wrong label that it is sure of counts as easy. Cost n K.
    logits ``[n, K]`` -> ``[n]`` float64 in [0, 1).
    """
    rest = _odds(logits)[0].sum(dim=1)
    return rest / (1 + rest)


def entropy(logits: Tensor) -> Tensor:
    """Uncertainty-Entropy, -sum_k p_k log p_k (arXiv 1906.11829). Low is easy: the network is sure.

    logits ``[n, K]`` -> ``[n]`` float64 in [0, log K]. Cost n K.
    """
    odds, logarithms = _odds(logits)
    rest = odds.sum(dim=1)  # log p_k = logarithm_k - log(1 + rest)
    return rest.log1p() - (odds * logarithms).sum(dim=1) / (1 + rest)


def margin(logits: Tensor) -> Tensor:
    """Uncertainty-Margin, 1 - (p_max - p_second), of the two most probable classes (arXiv 2204.08499).

    Low is easy: a wide margin. logits ``[n, K]`` -> ``[n]`` float64 in [0, 1]. Cost n K.
    """
    odds = _odds(logits)[0]
    rest = odds.sum(dim=1)
    return (rest + odds.amax(dim=1)) / (1 + rest)


def cal(features: Tensor, logits: Tensor, neighbours: int = 10) -> Tensor:
    """CAL: how much predictions differ between an image and its nearest neighbours (arXiv 2109.03764, algorithm 1).

    The mean over the ``neighbours`` images j nearest to image i, by Euclidean distance of features, of
    (KL(p_i || p_j) + KL(p_j || p_i)) / 2: both directions, as DeepCore (arXiv 2204.08499) has it, the paper has the
    second. Neighbours are looked for among the images given, which are those of one class. Low is easy: around the
    image, the network says the same. Where n <= ``neighbours`` all others are neighbours. A single image scores 0.
    Cost n^2 D, exact search; memory 1024 n.

    features ``[n, D]``, logits ``[n, K]`` -> ``[n]`` float64, at least 0.
    """
    k = min(neighbours, len(features) - 1)
    if k == 0:
        return torch.zeros(1, dtype=torch.float64, device=logits.device)
    log_p = logits.double().log_softmax(dim=1)
    p = log_p.exp()
    features = features - features.mean(dim=0)  # distances stay, and are rounded less
    scores = []
    for rows in torch.arange(len(features), device=features.device).split(1024):
        distances = torch.cdist(features[rows], features).scatter_(1, rows[:, None], torch.inf)
        near = distances.topk(k, largest=False).indices
        divergence = (p[near] - p[rows, None]) * (log_p[near] - log_p[rows, None]) / 2
        scores.append(divergence.sum(dim=2).mean(dim=1))
    return torch.cat(scores)


# ------------------------------------------------------------------------------------ of the network at the image

_OVERSHOOT = 1.02  # the paper's: a step to the linearised boundary is carried on a little, to come out behind it


def deepfool(network: AnyNetwork, images: Tensor, labels: Tensor, max_steps: int = 50) -> Tensor:
    """DeepFool: the distance to the decision boundary, signed (arXiv 1511.04599, algorithm 2).

    ``-||r||`` for an image that the network classifies as its label says, with r from :func:`deepfool_perturbation`:
    low is easy, since much has to change to make it another class. ``+||r||`` for one that is misclassified: the
    further inside a wrong class, the harder. (DeepCore looks at the length only, and so takes that for easy.)
    Distances are those between preprocessed images. Cost n (K + 2) forward and backward passes a step, of which an
    image takes some 2 to 4: by far the dearest score.

    The network is in eval mode; images ``[n, C, H, W]``, labels ``[n]`` int64 -> ``[n]`` float64.
    """
    perturbation, predicted = deepfool_perturbation(network, images, max_steps)
    length = perturbation.flatten(1).double().norm(dim=1)
    return torch.where(predicted == labels, -length, length)


def deepfool_perturbation(network: AnyNetwork, images: Tensor, max_steps: int = 50) -> tuple[Tensor, Tensor]:
    """A small r ``[n, C, H, W]`` that takes each image to the boundary of its predicted class ``[n]`` int64; both.

    Each step goes to the nearest boundary of the network linearised where the image is: to class k of the least
    |f_k - f_own| / ||grad(f_k - f_own)||. An image stops when 1.02 r changes its class, or after ``max_steps``.
    The first step is exact for an affine classifier. Gradients of one class are taken for all images at once, and only
    the nearest boundary is kept, so memory is that of a training step on these images, whatever K.
    """
    with torch.no_grad():
        predicted = network(images).argmax(dim=1)
    total = torch.zeros_like(images)
    moving = torch.arange(len(images), device=images.device)
    for _ in range(max_steps):
        own = predicted[moving]
        total[moving] += _to_boundary(network, images[moving] + _OVERSHOOT * total[moving], own)
        with torch.no_grad():
            moving = moving[network(images[moving] + _OVERSHOOT * total[moving]).argmax(dim=1) == own]
        if not len(moving):
            break
    return total, predicted


@torch.enable_grad()
def _to_boundary(network: AnyNetwork, x: Tensor, own: Tensor) -> Tensor:
    """The step from ``x [n, C, H, W]`` to the nearest boundary of class ``own [n]``, by the gradients at x."""
    x = x.detach().requires_grad_()
    logits = network(x)
    gaps = (logits - logits.gather(1, own[:, None])).unbind(1)
    nearest = torch.full_like(gaps[0], torch.inf)
    step = torch.zeros_like(x)
    for k, gap in enumerate(gaps):
        (slope,) = torch.autograd.grad(gap.sum(), x, retain_graph=k + 1 < len(gaps))
        length = slope.flatten(1).norm(dim=1)
        distance = gap.detach().abs() / length
        nearer = distance < nearest  # not so for its own class, 0 / 0, and where the gradient is zero, infinite
        nearest = torch.where(nearer, distance, nearest)
        onto = slope * (distance / length)[:, None, None, None]
        step = torch.where(nearer[:, None, None, None], onto, step)
    return step


# --------------------------------------------------------------------------------------------- of the training


class ForgettingEvents:
    """Forgetting: how often an image was classified rightly, and the next time not (arXiv 1812.05159, section 3).

    Counted over the times that training meets the image, from the logits of the step itself, so it costs n K an epoch
    and no pass of its own. Few is easy. An image that was never learned was never forgotten, but is the hardest: it
    scores the number of epochs, which no count reaches. Counts are whole numbers, so there are many ties, the fewer
    the more networks are averaged.

    An observer of :class:`pad.difficulty.training.ScoringTraining`. labels: ``[n]`` int64, on the device.
    """

    def __init__(self, labels: Tensor):
        self._labels = labels
        self._right = torch.zeros_like(labels)  # 0 or 1, when last met
        self._learned = torch.zeros_like(labels)  # 0 or 1, ever
        self._events = torch.zeros_like(labels)

    def __call__(self, indices: Tensor, logits: Tensor) -> None:
        """Note what a training step says, ``logits [B, K]``, of the images ``indices [B]``, each at most once."""
        # integers rather than masks: a mask as an index would make the host wait for the device
        right = (logits.argmax(dim=1) == self._labels[indices]).long()
        self._events[indices] += self._right[indices] * (1 - right)
        self._learned[indices] |= right
        self._right[indices] = right

    def scores(self, epochs: int) -> Tensor:
        """``[n]`` float64 after training for ``epochs``: the number of events, or ``epochs`` if never learned."""
        return torch.where(self._learned == 1, self._events, epochs).double()


class TrainingLosses:
    """Loss: the mean over the epochs of training of the image's cross-entropy (a scorer of arXiv 2408.03360, table 4a).

    Taken when training meets the image, from the logits of the step itself, so it costs n K an epoch and no pass of its
    own. Low is easy: it was learned early, and is known well. What the paper calls Loss it does not say; this is ours.

    An observer of :class:`pad.difficulty.training.ScoringTraining`. labels: ``[n]`` int64, on the device.
    """

    def __init__(self, labels: Tensor):
        self._labels = labels
        self._total = torch.zeros_like(labels, dtype=torch.float64)

    def __call__(self, indices: Tensor, logits: Tensor) -> None:
        """Add what a training step says, ``logits [B, K]``, of the images ``indices [B]``, each at most once."""
        self._total[indices] += cross_entropy(logits, self._labels[indices])

    def scores(self, epochs: int) -> Tensor:
        """``[n]`` float64 after training for ``epochs``; 0 for all, where there were none."""
        return self._total / max(1, epochs)
