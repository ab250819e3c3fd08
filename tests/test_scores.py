"""Each score against an independent computation from its formula, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pad.difficulty import scores
from pad.difficulty.evidence import Evidence, collect_evidence
from pad.difficulty.scores import ForgettingEvents, cal, deepfool, deepfool_perturbation, el2n, grand
from pad.nn.networks import build


def random_task(n=40, classes=3, size=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=rng), torch.randint(classes, (n,), generator=rng)


# --------------------------------------------------------------------------------------------------- evidence


@pytest.mark.parametrize("name", ["ConvNetD2W8", "ConvNetD2W8BN"])
def test_evidence_is_what_the_network_says_in_whatever_batches(name):
    network = build(name, 3, 5, (8, 8), seed=1).double().eval()
    images, labels = random_task(n=20, classes=5)
    images = images.double()
    evidence = collect_evidence(network, images, labels, batch=7)
    with torch.no_grad():
        assert (evidence.features - network.features(images)).abs().max() < 1e-12
        assert (evidence.logits - network(images)).abs().max() < 1e-12
    assert torch.equal(evidence.labels, labels) and len(evidence) == 20
    some = evidence.of(torch.tensor([3, 0]))
    for part, whole in ((some.features, evidence.features), (some.logits, evidence.logits), (some.labels, labels)):
        assert torch.equal(part, torch.stack([whole[3], whole[0]]))


def test_inner_products_of_last_layer_gradients():
    """What :class:`Evidence` promises of its errors: <e_i, e_j> (1 + <h_i, h_j>)."""
    network = build("ConvNetD1W8", 3, 4, (8, 8), seed=1).double().eval()
    images, labels = random_task(n=5, classes=4)
    images = images.double()
    gradients = []
    for i in range(5):
        loss = F.cross_entropy(network(images[i : i + 1]), labels[i : i + 1])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, network.classifier.parameters())]))
    gradients = torch.stack(gradients)
    evidence = collect_evidence(network, images, labels)
    products = (evidence.errors @ evidence.errors.T) * (1 + evidence.features @ evidence.features.T)
    torch.testing.assert_close(products, gradients @ gradients.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        evidence.errors, evidence.logits.softmax(dim=1) - F.one_hot(labels, 4), rtol=1e-12, atol=1e-15
    )


def test_errors_of_the_easiest_images_are_not_rounded_to_zero():
    evidence = Evidence(torch.zeros(1, 2), torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([0]))
    q = math.exp(-60)
    torch.testing.assert_close(evidence.errors, torch.tensor([[-2 * q, q, q]]), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------- GraNd and EL2N


@pytest.mark.parametrize("name", ["ConvNetD2W8", "ConvNetD2W8BN", "LeNet"])
def test_grand_is_the_gradient_norm_of_the_last_layer(name):
    network = build(name, 3, 5, (32, 32), seed=1).double().eval()
    images, labels = random_task(n=6, classes=5, size=32)
    images = images.double() * 3
    with torch.no_grad():
        features = network.features(images)
        closed = grand(network.classifier(features), features, labels)
    for i in range(len(images)):
        loss = F.cross_entropy(network(images[i : i + 1]), labels[i : i + 1])
        weight, bias = torch.autograd.grad(loss, (network.classifier.weight, network.classifier.bias))
        expected = math.sqrt(weight.square().sum().item() + bias.square().sum().item())
        assert closed[i].item() == pytest.approx(expected, rel=1e-12)


def test_el2n_is_the_norm_of_the_error():
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(20, 4, dtype=torch.float64, generator=rng) * 3, torch.arange(20) % 4
    expected = torch.empty(20, dtype=torch.float64)
    for i in range(20):
        p = logits[i].exp() / logits[i].exp().sum()
        expected[i] = sum((p[k] - float(k == labels[i])) ** 2 for k in range(4)) ** 0.5
    torch.testing.assert_close(el2n(logits, labels), expected, rtol=1e-12, atol=0)


def test_easiest_images_are_still_told_apart():
    """p_y rounds to 1 for all of these in float32, for the last in float64 too; the other probabilities do not."""
    margins = torch.tensor([20.0, 30.0, 50.0])
    logits = torch.stack([margins, torch.zeros(3), torch.zeros(3)], dim=1)
    expected = (-margins.double()).exp() * math.sqrt(6)  # errors -2 q, q, q with q = exp(-margin)
    torch.testing.assert_close(el2n(logits, torch.zeros(3, dtype=torch.int64)), expected, rtol=1e-7, atol=0)


# ------------------------------------------------------------------------------------------------ uncertainty


def by_hand(logits):
    """Least confidence, entropy and margin of one image, with exact fractions of exponentials."""
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    weights = [Decimal(value).exp() for value in logits]
    p = sorted((weight / sum(weights) for weight in weights), reverse=True)
    return float(1 - p[0]), float(-sum(q * q.ln() for q in p)), float(1 - p[0] + p[1])


def test_uncertainties_are_their_formulas_to_the_last_digits():
    """Also where p_max rounds to 1, and where two or all classes are equally probable."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, dtype=torch.float64, generator=rng) * torch.linspace(0.1, 40, 30)[:, None]
    exact = [[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [-7.0, 3.0, 3.0, -90.0], [0.0, 120.0, 119.0, 0.0]]
    logits = torch.cat([logits, torch.tensor(exact, dtype=torch.float64)])
    expected = torch.tensor([by_hand(row) for row in logits.tolist()], dtype=torch.float64).unbind(1)
    for score, values in zip((scores.least_confidence, scores.entropy, scores.margin), expected):
        torch.testing.assert_close(score(logits), values, rtol=1e-13, atol=0)


def test_a_sure_network_finds_images_easy_whatever_their_label():
    logits = torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    for score in (scores.least_confidence, scores.entropy, scores.margin):
        values = score(logits)
        assert values.dtype == torch.float64 and (values.diff() > 0).all()


# -------------------------------------------------------------------------------------------------------- CAL


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_cal_is_the_mean_divergence_from_the_nearest_neighbours(n):
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(n, 6, dtype=torch.float64, generator=rng)
    logits = torch.randn(n, 4, dtype=torch.float64, generator=rng) * 2
    p = logits.softmax(dim=1)
    expected = []
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: math.dist(features[i], features[j]))[:5]
        divergences = [
            (F.kl_div(p[j].log(), p[i], reduction="sum") + F.kl_div(p[i].log(), p[j], reduction="sum")) / 2
            for j in others
        ]
        expected.append(sum(float(d) for d in divergences) / len(others) if others else 0.0)
    found = cal(features, logits, neighbours=5)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def test_cal_looks_for_neighbours_in_parts_of_a_class():
    """More images than are handled at once, far from the origin, where float32 distances would cancel."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(1500, 30, generator=rng) + 1000
    logits = torch.randn(1500, 3, generator=rng)
    distances = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    near = distances.fill_diagonal_(torch.inf).argsort(dim=1)[:, :10]
    log_p = logits.double().log_softmax(dim=1)
    p = log_p.exp()
    expected = ((p[near] - p[:, None]) * (log_p[near] - log_p[:, None])).sum(dim=2).mean(dim=1) / 2
    torch.testing.assert_close(cal(features, logits), expected, rtol=1e-10, atol=1e-14)


# --------------------------------------------------------------------------------------------------- DeepFool


class Affine(nn.Module):
    """A linear classifier of flattened images."""

    def __init__(self, weight, bias):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
        self.linear.weight.data, self.linear.bias.data = weight, bias

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_deepfool_is_the_exact_signed_distance_of_an_affine_classifier():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 12, dtype=torch.float64, generator=rng)
    network = Affine(weight, torch.randn(4, dtype=torch.float64, generator=rng))
    images = torch.randn(50, 3, 2, 2, dtype=torch.float64, generator=rng)
    labels = torch.randint(4, (50,), generator=rng)
    expected = []
    with torch.no_grad():
        for logits, label in zip(network(images), labels):
            own = int(logits.argmax())
            nearest = min(
                float((logits[own] - logits[k]) / (weight[own] - weight[k]).norm()) for k in range(4) if k != own
            )
            expected.append(-nearest if own == label else nearest)
    found = deepfool(network, images, labels)
    assert 5 < (found < 0).sum() < 45, "both signs are there"
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ConvNetD2W8", "ConvNetD1W8BN", "MLP"])
def test_deepfools_perturbation_reaches_the_boundary_and_not_more(name):
    network = build(name, 3, 5, (8, 8), seed=1).double().eval()
    images = random_task(n=30)[0].double()
    perturbation, predicted = deepfool_perturbation(network, images)
    with torch.no_grad():
        assert torch.equal(predicted, network(images).argmax(dim=1))
        behind = network(images + 1.02 * perturbation)
        assert (behind.argmax(dim=1) != predicted).all()
        # on the boundary: what its class is ahead by is almost gone
        before, at = (
            (logits.gather(1, predicted[:, None])[:, 0] - logits.scatter(1, predicted[:, None], -torch.inf).amax(dim=1))
            for logits in (network(images), network(images + perturbation))
        )
        assert (at.abs() < 0.1 * before).all()
        random = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        length = perturbation.flatten(1).norm(dim=1) / random.flatten(1).norm(dim=1)
        there = network(images + 1.02 * length[:, None, None, None] * random).argmax(dim=1)
        assert (there == predicted).double().mean() > 0.8, "no direction at random does"


def test_deepfool_does_not_depend_on_the_batch_and_leaves_no_gradients():
    network = build("ConvNetD1W8", 3, 5, (8, 8), seed=1).double().eval()
    images, labels = random_task(n=10, classes=5)
    images = images.double()
    together = deepfool(network, images, labels)
    alone = torch.cat([deepfool(network, images[i : i + 1], labels[i : i + 1]) for i in range(10)])
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-10)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_deepfool_gives_up_where_there_is_no_boundary():
    """A network that says the same everywhere, and one of a single class."""
    images, labels = torch.randn(3, 3, 2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    zero = torch.zeros(1, dtype=torch.float64)
    constant = Affine(torch.zeros(2, 12, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert deepfool(constant, images, labels).tolist() == [0, 0, 0]
    assert deepfool(Affine(torch.randn(1, 12, dtype=torch.float64), zero), images, labels).tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------- Forgetting


def test_forgetting_counts_what_was_right_and_then_wrong():
    rows = ["0111", "1010", "0000", "1000", "0101", "1101"]  # right (1) or wrong in four epochs
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    events = ForgettingEvents(labels)
    orders = [[0, 1], [2, 3], [4, 5]], [[5, 4, 3], [2, 1, 0]], [[3, 0, 5, 1], [2, 4]], [[0, 1, 2, 3, 4, 5]]
    for epoch, order in enumerate(orders):
        for batch in order:
            right = torch.tensor([int(rows[i][epoch]) for i in batch])
            predicted = torch.where(right == 1, labels[batch], 1 - labels[batch])
            events(torch.tensor(batch), F.one_hot(predicted, 2).float())
    assert events.scores(4).tolist() == [0, 2, 4, 1, 1, 1]


# ------------------------------------------------------------------------------------------------------- Loss


def test_the_cross_entropy_is_its_formula_to_the_last_digits():
    """Also where p_y rounds to 1, to 0, and where there is one class."""
    from decimal import Decimal, localcontext

    logits = torch.tensor([[1.0, 2.0, -3.0], [60.0, 0.0, 0.0], [0.0, 900.0, 5.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([1, 0, 2, 0])
    with localcontext() as context:
        context.prec = 60
        for row, label, found in zip(logits.tolist(), labels.tolist(), scores.cross_entropy(logits, labels).tolist()):
            weights = [Decimal(value).exp() for value in row]
            assert found == pytest.approx(float(-(weights[label] / sum(weights)).ln()), rel=1e-13)
    assert scores.cross_entropy(torch.tensor([[3.0]]), torch.tensor([0])).tolist() == [0]


def test_the_loss_is_the_mean_over_the_epochs_whatever_the_order_of_the_images():
    labels, generator = torch.tensor([0, 1, 1, 0]), torch.Generator().manual_seed(0)
    losses = scores.TrainingLosses(labels)
    expected = torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        order, logits = torch.randperm(4, generator=generator), torch.randn(4, 2, generator=generator)
        expected[order] += F.cross_entropy(logits.double(), labels[order], reduction="none") / 3
        for batch, said in zip(order.split(3), logits.split(3)):
            losses(batch, said)
    torch.testing.assert_close(losses.scores(3), expected, rtol=1e-12, atol=0)
    assert scores.TrainingLosses(labels).scores(0).tolist() == [0] * 4
