"""Features of experts' snapshots (TGDD, NCFM): loss and gradient beside the formula, and which an iteration has."""

from collections import Counter

import pytest
import torch
from test_distributed import on_ranks
from test_distribution_matching import IMAGES, LABELS, LR, REAL, ROWS, SEED, assert_is, network, objective, plain
from test_trajectory_matching import sampler

from pad.data.augment import DSA, NoAugmentation
from pad.distributed import ALONE
from pad.matching.characteristic import SamplingNetwork, ToCharacteristic, characteristic, difference
from pad.matching.distribution import DistributionObjective
from pad.matching.real import RealBatches
from pad.matching.snapshots import Mixtures, Stages, networks_at
from pad.matching.trajectory import expert_of
from pad.store.trajectories import TrajectoryStore, describe, write_expert

NETWORKS = ("ConvNetD3W8", "ConvNetD2W8BN")
EPOCHS = 4


def wanderers(folder, name):
    """Two experts, 1 and 4, that move at random."""
    module = network(name, 0)
    named = [(key, parameter.shape) for key, parameter in module.named_parameters()]
    rng = torch.Generator().manual_seed(0)
    for expert in (1, 4):
        description = describe({"dataset": "toy"}, name, named, {"kind": "none"})
        with write_expert(folder, expert, description, epochs=EPOCHS, seed=0, settings={}) as record:
            theta = torch.nn.utils.parameters_to_vector(module.parameters())
            for _ in range(EPOCHS + 1):
                record(theta)
                theta = theta + 0.1 * torch.randn(len(theta), generator=rng)
    return TrajectoryStore.open(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """By network."""
    return {name: wanderers(tmp_path_factory.mktemp(name), name) for name in NETWORKS}


def stages(store, last=EPOCHS, length=3, **changes):
    settings = dict(experts=[1, 4], max_start_epoch=last + 1, sequential=False, expert_epochs=0, seed=SEED)
    return Stages(store=store, sampler=sampler(**settings | changes), stage_epochs=length, seed=SEED)


def tgdd(name, store, blocks=1, augmentation=NoAugmentation(), weight=2.5, rows=ROWS, ranks=ALONE, **changes):
    ours = stages(store, **changes)
    return DistributionObjective(
        network=networks_at(ours.first, network(name, 7)),
        classifier=networks_at(ours.later, network(name, 8)) if weight else None,
        ce_weight=weight,
        real=RealBatches(REAL, rows, 10),
        augmentation=augmentation,
        blocks=blocks,
        separable="BN" not in name,
        seed=SEED,
        ranks=ranks,
    )


def module_at(name, theta):
    """An ordinary module of these parameters."""
    module, at = network(name, 9), 0
    for parameter in module.parameters():
        parameter.copy_(theta[at : at + parameter.numel()].view_as(parameter))
        at += parameter.numel()
    return module.train()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("blocks, augmentation, rows", [(1, DSA(siamese=True), ROWS), (2, NoAugmentation(), None)])
@pytest.mark.parametrize("it", [0, 5])
def test_loss_and_gradient_are_those_of_the_formula(stores, name, blocks, augmentation, rows, it):
    """With and without filters: ``rows`` of images that are left, and two blocks."""
    rows = rows or [row[4:18] for row in ROWS]
    store = stores[name]
    expert, first, later = stages(store).epochs(it)
    whole = store.params(expert)
    modules = [module_at(name, whole[epoch].double()) for epoch in (first, later)]
    found = tgdd(name, store, blocks, augmentation, rows=rows).gradients(it, IMAGES, LABELS, LR)
    assert_is(found, *plain(name, it, blocks, augmentation, rows, module=modules[0], classifier=modules[1], weight=2.5))


def test_of_untrained_experts_without_the_second_term_it_is_dm(stores):
    """At epoch 0 alone, beside DM under that one network."""
    name = NETWORKS[0]
    ours = tgdd(name, stores[name], weight=0, last=0, augmentation=DSA(siamese=True))
    theirs = objective(name, augmentation=DSA(siamese=True))
    fixed = module_at(name, stores[name].rows(1, [0])[0].double())
    object.__setattr__(theirs, "network", lambda it: fixed)
    for it in range(2):
        found, expected = (each.gradients(it, IMAGES, LABELS, LR) for each in (ours, theirs))
        assert torch.equal(found.loss, expected.loss) and torch.equal(found.images, expected.images)


def test_the_second_snapshot_is_of_the_same_stage(stores):
    ours = stages(stores[NETWORKS[0]])
    found = [ours.epochs(it) for it in range(3000)]
    pairs = Counter((first, later) for _, first, later in found)
    allowed = {(j, k) for j in range(EPOCHS + 1) for k in range(j, min(j + 3, EPOCHS + 1))}
    assert set(pairs) == allowed
    for j in range(EPOCHS + 1):
        of_stage = [pairs[pair] for pair in allowed if pair[0] == j]
        total, share = sum(of_stage), sum(of_stage) / len(of_stage)
        assert abs(total - 600) < 4 * (600 * 0.8) ** 0.5
        assert sum((count - share) ** 2 / share for count in of_stage) < 13.9  # 2 degrees of freedom: 0.1 %
    assert {expert for expert, *_ in found} == {1, 4}
    alone = stages(stores[NETWORKS[0]], length=1)
    assert all(first == later for _, first, later in map(alone.epochs, range(50)))


def test_stages_move_along_the_trajectory_where_that_is_asked_for(stores):
    ours = stages(stores[NETWORKS[0]], sequential=True, current_max_start_epoch=1, expansion_end_epoch=800)
    firsts = [{ours.epochs(it)[1] for it in range(begin, begin + 200)} for begin in range(0, 1000, 200)]
    assert firsts == [set(range(n + 1)) for n in range(EPOCHS + 1)]


def test_gradients_are_a_function_of_seed_iteration_and_set(stores):
    name = NETWORKS[0]
    ours = tgdd(name, stores[name], augmentation=DSA(siamese=True))
    first = ours.gradients(3, IMAGES, LABELS, LR)
    ours.gradients(4, IMAGES, LABELS, LR)
    again = tgdd(name, stores[name], augmentation=DSA(siamese=True)).gradients(3, IMAGES, LABELS, LR)
    assert torch.equal(first.loss, again.loss) and torch.equal(first.images, again.images)


# ---- characteristic functions (NCFM)

FREQUENCIES = 40


def ncfm(
    name,
    store,
    blocks=1,
    augmentation=NoAugmentation(),
    weight=2.0,
    rows=ROWS,
    amplitude=0.5,
    ranks=ALONE,
    sampling=None,
):
    ours = Mixtures(store=store, experts=[1, 4], seed=SEED)
    return DistributionObjective(
        network=networks_at(ours.mixed, network(name, 7)),
        classifier=networks_at(ours.trained, network(name, 8)) if weight else None,
        ce_weight=weight,
        distance_to=ToCharacteristic(FREQUENCIES, amplitude, sampling),
        opponent=sampling,
        real=RealBatches(REAL, rows, 10),
        augmentation=augmentation,
        blocks=blocks,
        separable="BN" not in name,
        seed=SEED,
        ranks=ranks,
    )


def normal(rng, n, features):
    return torch.randn(n, features, generator=rng, dtype=torch.float64)


def of_functions(amplitude, frequencies=lambda rng, features: normal(rng, FREQUENCIES, features)):
    """The distance by complex numbers and angles."""

    def distance(found, real, rng):
        t = frequencies(rng, real.shape[1])
        phi, target = (
            torch.stack([torch.exp(1j * (t @ (row / row.square().sum().sqrt()))) for row in each]).mean(dim=0)
            for each in (found, real)
        )
        amplitudes = (phi.abs() - target.abs()) ** 2
        phases = 2 * phi.abs() * target.abs() * (1 - torch.cos(phi.angle() - target.angle()))
        return 300 * torch.sqrt(amplitude * amplitudes + (1 - amplitude) * phases).mean()

    return distance


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "blocks, augmentation, rows, amplitude",
    [(1, DSA(siamese=True), ROWS, 0.5), (2, NoAugmentation(), None, 0.8), (1, NoAugmentation(), ROWS, 0.0)],
)
def test_loss_and_gradient_of_characteristic_functions(stores, name, blocks, augmentation, rows, amplitude):
    """With and without filters: ``rows`` of images that are left, and two blocks."""
    rows = rows or [row[4:18] for row in ROWS]
    store, it = stores[name], 5
    mixtures = Mixtures(store=store, experts=[1, 4], seed=SEED)
    mixed, trained = (module_at(name, theta(it).double()) for theta in (mixtures.mixed, mixtures.trained))
    found = ncfm(name, store, blocks, augmentation, rows=rows, amplitude=amplitude).gradients(it, IMAGES, LABELS, LR)
    others = {"module": mixed, "distance": of_functions(amplitude), "classifier": trained, "weight": 2.0}
    assert_is(found, *plain(name, it, blocks, augmentation, rows, **others))


def test_a_mixture_lies_on_the_line_between_the_ends(stores):
    store = stores[NETWORKS[0]]
    ours, shares, seen = Mixtures(store=store, experts=[1, 4], seed=SEED), [], set()
    for it in range(300):
        theta = ours.mixed(it).double()
        first, last = store.rows(expert_of(it, [1, 4], SEED), [0, EPOCHS]).double()
        assert torch.equal(last, ours.trained(it).double())
        share = ((theta - last) @ (first - last) / (first - last).square().sum()).item()
        torch.testing.assert_close(theta, share * first + (1 - share) * last, rtol=0, atol=1e-6)
        shares.append(share)
        seen.add(last[0].item())
    ordered = torch.tensor(shares).sort().values
    assert len(seen) == 2 and 0 <= ordered[0] and ordered[-1] < 1.000001
    assert (ordered - torch.linspace(0, 1, 300)).abs().max() < 1.95 / 300**0.5  # Kolmogorov's, at 0.1 %


def test_what_amplitude_and_phase_see():
    """Equal sets are as far as the clamp; one half is the distance in the plane; a common shift has no amplitude."""
    rng = torch.Generator().manual_seed(0)
    t, real, other = (torch.randn(n, 6, generator=rng, dtype=torch.float64) for n in (9, 20, 5))
    phi, target = characteristic(other, t), characteristic(real, t)
    assert difference(target, target, 0.5).item() == pytest.approx(300 * 0.5e-12**0.5, rel=1e-2)
    plane = torch.complex(*phi) - torch.complex(*target)
    assert difference(phi, target, 0.5).item() == pytest.approx(300 * (plane.abs() / 2**0.5).mean().item(), rel=1e-12)
    turned = torch.complex(*target) * torch.exp(1j * (t @ torch.ones(6, dtype=torch.float64)))
    turned = turned.real, turned.imag
    assert difference(turned, target, 1.0).item() == pytest.approx(0, abs=1e-10)
    assert difference(turned, target, 0.0).item() > 1


def test_amplitudes_that_agree_have_no_slope():
    """With the phases left out the root can be of zero: its gradient is that of the other frequencies."""
    rng = torch.Generator().manual_seed(0)
    t, real, other = (torch.randn(n, 6, generator=rng, dtype=torch.float64) for n in (9, 20, 5))
    other.requires_grad_()
    re, im = characteristic(other, t)
    target = [part.detach().clone() for part in characteristic(real, t)]
    agreeing = torch.tensor([2, 5])
    for part, own in zip(target, (re, im)):
        part[agreeing] = own[agreeing].detach()
    (ours,) = torch.autograd.grad(difference((re, im), tuple(target), 1.0), other, retain_graph=True)
    sizes = (re.square() + im.square()).sqrt(), (target[0].square() + target[1].square()).sqrt()
    off = torch.tensor([i for i in range(9) if i not in agreeing])
    (expected,) = torch.autograd.grad(300 / 9 * (sizes[0] - sizes[1])[off].abs().sum(), other)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


def test_ranks_give_what_one_gives(stores):
    def work(ranks):
        both = [make(name, stores[name], 2, ranks=ranks) for make in (tgdd, ncfm) for name in NETWORKS]
        both += [ncfm(name, stores[name], ranks=ranks, sampling=sampling_for(name)) for name in NETWORKS]
        found = [(ours.gradients(1, IMAGES, LABELS, LR), ours.memory.values()) for ours in both]
        return [[tensor.numpy() for tensor in (g.loss, g.images, *memory)] for g, memory in found]

    alone = work(ALONE)
    for shared in on_ranks(2, work):
        for found, expected in zip(shared, alone, strict=True):
            for ours, one in zip(map(torch.as_tensor, found), map(torch.as_tensor, expected), strict=True):
                assert (ours - one).norm() <= 1e-12 * one.norm()


# ---- the network that makes the frequencies


def sampling_for(name, seed=3):
    features = network(name, 0).classifier.in_features
    return SamplingNetwork(features, rate=0.02, seed=seed, like=torch.empty(0, dtype=torch.float64))


def by_hand(psi):
    """The frequencies of parameters psi [Q], layer by layer."""

    def frequencies(rng, d):
        parts = psi.split([d * d, d, d, d] * 3)
        h = normal(rng, 3, d)  # of 40 frequencies: 16, 16, 8
        for i, last in enumerate((torch.nn.functional.leaky_relu,) * 2 + (torch.tanh,)):
            weight, bias, gain, shift = parts[4 * i : 4 * i + 4]
            h = h @ weight.view(d, d).T + bias
            h = (h - h.mean(dim=0)) / (h.var(dim=0, unbiased=False) + 1e-5).sqrt() * gain + shift
            h = last(h, 0.2) if i < 2 else last(h)
        return torch.cat([h[0].expand(16, d), h[1].expand(16, d), h[2].expand(8, d)]) * normal(rng, 40, d)

    return frequencies


@pytest.mark.parametrize("name", NETWORKS)
def test_the_set_goes_down_and_the_sampling_network_up(stores, name):
    """Three iterations, beside the formula and torch's AdamW."""
    store, sampling = stores[name], sampling_for(name)
    ours = ncfm(name, store, augmentation=DSA(siamese=True), sampling=sampling)
    mixtures = Mixtures(store=store, experts=[1, 4], seed=SEED)
    psi = sampling.parameters.detach().clone().requires_grad_()
    adamw = torch.optim.AdamW([psi], lr=0.02, weight_decay=0, maximize=True)
    learn, seen = sampling.learn, []
    sampling.learn = lambda gradient: (seen.append(gradient), learn(gradient))
    for it in range(3):
        mixed, trained = (module_at(name, theta(it).double()) for theta in (mixtures.mixed, mixtures.trained))
        others = {"module": mixed, "classifier": trained, "weight": 2.0, "learned": [psi]}
        distance = of_functions(0.5, by_hand(psi))
        loss, gradient, psi.grad = plain(name, it, 1, DSA(siamese=True), distance=distance, **others)
        assert_is(ours.gradients(it, IMAGES, LABELS, LR), loss, gradient)
        assert psi.grad.norm() > 0 and (seen[it] - psi.grad).norm() < 1e-10 * psi.grad.norm()
        adamw.step()
        # a bias before a BatchNorm has no gradient but the rounding, of which AdamW makes more
        assert (sampling.parameters - psi).norm() < 1e-6 * psi.norm()


def test_what_the_sampling_network_is_made_of_goes_on(stores):
    """From the memory of another; a gradient that is not finite changes nothing."""
    name = NETWORKS[0]
    whole, begun, other = (sampling_for(name, seed) for seed in (3, 3, 4))
    of = {sampling: ncfm(name, stores[name], sampling=sampling) for sampling in (whole, begun, other)}
    expected = [of[whole].gradients(it, IMAGES, LABELS, LR) for it in range(3)]
    of[begun].gradients(0, IMAGES, LABELS, LR)
    for key, tensor in other.memory.items():
        tensor.copy_(begun.memory[key])
    other.learn(torch.full_like(whole.parameters.detach(), torch.inf))
    for it in (1, 2):
        found = of[other].gradients(it, IMAGES, LABELS, LR)
        assert torch.equal(found.loss, expected[it].loss) and torch.equal(found.images, expected[it].images)
    assert all(torch.equal(tensor, whole.memory[key]) for key, tensor in other.memory.items())
    assert of[whole].memory.keys() == whole.memory.keys() and other.updates == 3
