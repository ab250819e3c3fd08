from collections import Counter

import pytest
import torch

from pad.data.augment import DSA, NoAugmentation, augment
from pad.errors import InputError
from pad.matching.trajectory import SegmentSampler, TrajectoryObjective
from pad.matching.unroll import inner_steps
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.rng import generator
from pad.store.trajectories import TrajectoryStore, describe, write_expert


def sampler(**changes):
    defaults = dict(
        experts=[0, 1, 2, 3, 4],
        expert_epochs=2,
        min_start_epoch=0,
        max_start_epoch=20,
        sequential=True,
        current_max_start_epoch=10,
        expansion_end_epoch=1000,
        seed=0,
    )
    return SegmentSampler(**(defaults | changes))


# ------------------------------------------------------------------------------------------------ the start epoch


@pytest.mark.parametrize("first, last, end", [(10, 20, 1000), (20, 40, 2000), (60, 70, 2000), (1, 4, 3), (5, 5, 10)])
def test_the_upper_bound_grows_linearly_and_stays(first, last, end):
    ours = sampler(current_max_start_epoch=first, max_start_epoch=last, expansion_end_epoch=end)
    bounds = [ours.upper_bound(it) for it in range(2 * end + 2)]
    assert bounds == [min(last, first + int((last - first) * it / end)) for it in range(2 * end + 2)]
    assert bounds[0] == first and bounds[end] == bounds[-1] == last
    assert all(a <= b for a, b in zip(bounds, bounds[1:]))


def test_a_first_bound_beyond_the_last_means_the_last_at_any_iteration():
    ours = sampler(current_max_start_epoch=20, max_start_epoch=4, expansion_end_epoch=3000)
    assert {ours.upper_bound(it) for it in (0, 1, 2999, 3000, 3200, 4000, 10**6)} == {4}
    assert ours.segment(4000).start < 4


def test_without_sequential_generation_the_bound_is_the_last():
    ours = sampler(sequential=False, current_max_start_epoch=1, max_start_epoch=7)
    assert {ours.upper_bound(it) for it in (0, 1, 500, 10**6)} == {7}


def test_start_epochs_are_uniform_from_the_first_to_below_the_bound():
    ours = sampler(min_start_epoch=3, max_start_epoch=11, sequential=False)
    n = 4000
    counts = Counter(ours.segment(it).start for it in range(n))
    assert sorted(counts) == list(range(3, 11))
    chi_squared = sum((count - n / 8) ** 2 / (n / 8) for count in counts.values())
    assert chi_squared < 24.3  # 7 degrees of freedom: 0.1 %


def test_start_epochs_follow_the_bound_of_their_iteration():
    ours = sampler(min_start_epoch=1, current_max_start_epoch=3, max_start_epoch=6, expansion_end_epoch=900)
    by_bound = {}
    for it in range(1200):
        segment = ours.segment(it)
        assert segment.end == segment.start + 2
        by_bound.setdefault(ours.upper_bound(it), set()).add(segment.start)
    assert by_bound == {3: {1, 2}, 4: {1, 2, 3}, 5: {1, 2, 3, 4}, 6: {1, 2, 3, 4, 5}}


def test_on_convexified_trajectories_start_epochs_are_real_numbers_below_the_bound():
    ours = sampler(
        min_start_epoch=1, current_max_start_epoch=3, max_start_epoch=6, expansion_end_epoch=900, convexified=True
    )
    shares = []
    for it in range(2000):
        segment, bound = ours.segment(it), ours.upper_bound(it)
        assert segment.end == segment.start + 2
        shares.append((segment.start - 1) / (bound - 1))
    shares = torch.tensor(shares, dtype=torch.float64).sort().values
    assert 0 <= shares[0] and shares[-1] < 1 and len(shares.unique()) == 2000
    distance = (shares - torch.linspace(0, 1, 2000, dtype=torch.float64)).abs().max().item()
    assert distance < 1.95 / 2000**0.5  # Kolmogorov's, at 0.1 %


# ---------------------------------------------------------------------------------------------------- the experts


def test_experts_come_in_shuffled_passes():
    experts = [3, 4, 8, 11, 12, 13]
    ours = sampler(experts=experts)
    order = [ours.segment(it).expert for it in range(6 * 50)]
    passes = [tuple(order[i : i + 6]) for i in range(0, len(order), 6)]
    assert all(sorted(one) == experts for one in passes)
    assert len(set(passes)) > 40
    assert {one[0] for one in passes} == set(experts)


def test_a_segment_is_a_function_of_seed_and_iteration():
    iterations = [0, 1, 7, 999, 5000]
    expected = [sampler().segment(it) for it in iterations]
    ours = sampler()
    state = torch.get_rng_state()
    assert [ours.segment(it) for it in reversed(iterations)] == expected[::-1]
    assert torch.equal(torch.get_rng_state(), state)
    one, other = ([sampler(seed=seed).segment(it) for it in range(30)] for seed in (0, 1))
    assert [s.expert for s in one] != [s.expert for s in other]
    assert [s.start for s in one] != [s.start for s in other]
    # the experts' order does not hang on how start epochs are drawn, nor the reverse
    assert [s.expert for s in one] == [sampler(max_start_epoch=11).segment(it).expert for it in range(30)]
    assert [s.start for s in one] == [sampler(experts=[5]).segment(it).start for it in range(30)]


class FakeStore:
    folder = "buffers/CIFAR10/ConvNet"

    def __init__(self, epochs):
        self._epochs = epochs

    def epochs(self, expert):
        return self._epochs[expert]


def test_a_trajectory_that_is_too_short_is_refused_by_name():
    ours = sampler(experts=[0, 2], max_start_epoch=20, expert_epochs=3)  # the last segment goes from 19 to 22
    ours.refuse_short(FakeStore({0: 22, 1: 1, 2: 30}))
    message = "max_start_epoch 20 and expert_epochs 3 need .* 22 epochs.*expert 2 .*has 21"
    with pytest.raises(InputError, match=message) as error:
        ours.refuse_short(FakeStore({0: 22, 1: 1, 2: 21}))
    assert FakeStore.folder in str(error.value)
    with pytest.raises(InputError, match="need .* 23 epochs"):  # any start below 20
        sampler(experts=[0], expert_epochs=3, convexified=True).refuse_short(FakeStore({0: 22}))


# ------------------------------------------------------------------------------------------------- the objective

CLASSES, SHAPE = 3, (1, 8, 8)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    module = build("ConvNetD1W8", SHAPE[0], CLASSES, SHAPE[1:], 0)
    model = FlatModel(module)
    description = describe({"dataset": "toy"}, "ConvNetD1W8", zip(model.names, model.shapes), {"kind": "none"})
    rng = torch.Generator().manual_seed(0)
    for expert in range(3):
        theta = model.flatten(module)
        with write_expert(folder, expert, description, epochs=6, seed=0, settings={}) as record:
            for _ in range(7):
                record(theta)
                theta = theta + 0.05 * torch.randn(len(theta), generator=rng)
    return TrajectoryStore.open(folder)


def objective(store, convexified=False, **changes):
    model = FlatModel(build("ConvNetD1W8", SHAPE[0], CLASSES, SHAPE[1:], 0))
    small = sampler(
        experts=[0, 1, 2],
        max_start_epoch=4 if convexified else 5,
        current_max_start_epoch=2,
        expansion_end_epoch=4,
        seed=3,
        convexified=convexified,
    )
    settings = dict(augmentation=DSA(), syn_steps=5, batch_syn=4, depth=(0.5, 1.0), loss_ratio=0.25, seed=3)
    return TrajectoryObjective(model=model, store=store, sampler=small, **(settings | changes))


def synthetic(dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(6, *SHAPE, generator=rng).to(dtype)
    return images, torch.randn(6, CLASSES, generator=rng).to(dtype), torch.tensor(0.05, dtype=dtype)


@pytest.mark.parametrize("convexified", [False, True])
@pytest.mark.parametrize(
    "it, begin, end", [(0, 0.5, 1.0), (3, 0.5, 1.0), (11, 0.5, 1.0), (2, 0.0, 0.5), (5, 0.25, 0.6)]
)
def test_gradients_of_an_iteration_equal_autograd_along_its_segment(store, it, begin, end, convexified):
    ours = objective(store, depth=(begin, end), convexified=convexified)
    images, labels, lr = (tensor.requires_grad_() for tensor in synthetic())
    segment = ours.sampler.segment(it)
    of = store.between if convexified else store.rows
    start, target = (of(segment.expert, [epoch])[0].double() for epoch in (segment.start, segment.start + 2))
    module = build("ConvNetD1W8", SHAPE[0], CLASSES, SHAPE[1:], 9).double()
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    theta = start.clone().requires_grad_()
    for step in inner_steps(6, 4, 5, DSA(), generator(3, "inner steps", it)):
        named = {name: part.view(shapes[name]) for name, part in zip(shapes, theta.split(sizes))}
        logits = torch.func.functional_call(module, named, (augment(images[step.indices], step.draw),))
        loss = torch.nn.functional.cross_entropy(logits, labels[step.indices].softmax(dim=1))
        theta = theta - lr * torch.autograd.grad(loss, theta, create_graph=True)[0]
    count = len(start)
    kept = torch.zeros(count, dtype=torch.bool)
    kept[int(begin * count) : int(end * count)] = True
    kept[(theta - target).detach().abs().argsort()[: count // 4]] = False
    loss = (theta - target)[kept].square().sum() / (start - target)[kept].square().sum()
    expected = torch.autograd.grad(loss, (images, labels, lr))

    found = ours.gradients(it, *(tensor.detach() for tensor in (images, labels, lr)))
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for ours_gradient, theirs in zip((found.images, found.labels, found.lr), expected, strict=True):
        assert theirs.norm() > 0 and (ours_gradient - theirs).norm() < 1e-10 * theirs.norm()


def test_gradients_are_a_function_of_seed_iteration_and_set(store):
    ours, arguments = objective(store), synthetic(torch.float32)
    first = ours.gradients(4, *arguments)
    ours.gradients(5, *arguments)
    again = objective(store).gradients(4, *arguments)
    for name in ("loss", "images", "labels", "lr"):
        assert torch.equal(getattr(first, name), getattr(again, name)) and getattr(first, name).dtype == torch.float32
    others = [ours.gradients(5, *arguments), objective(store, seed=4).gradients(4, *arguments)]
    assert all(not torch.equal(first.images, other.images) for other in others)


def test_the_settings_arrive(store):
    plain = dict(augmentation=NoAugmentation(), syn_steps=2, batch_syn=3, depth=(0.0, 1.0), loss_ratio=0.0)
    losses = {
        name: objective(store, **(plain | change)).gradients(1, *synthetic()).loss.item()
        for name, change in {
            "plain": {},
            "DSA": {"augmentation": DSA()},
            "steps": {"syn_steps": 3},
            "batch": {"batch_syn": 2},
            "depth": {"depth": (0.5, 1.0)},
            "shallow": {"depth": (0.0, 0.5)},
            "loss": {"loss_ratio": 0.5},
        }.items()
    }
    assert len(set(losses.values())) == len(losses)


# ------------------------------------------------------------------------------------------------ layer by layer


def test_layers_are_the_modules_with_parameters_and_what_they_add_is_the_loss(store):
    plain, asked = (objective(store, layer_losses=wanted).gradients(3, *synthetic()) for wanted in (False, True))
    assert plain.layers == {}
    for name in ("loss", "images", "labels", "lr"):
        assert torch.equal(getattr(plain, name), getattr(asked, name))
    modules = build("ConvNetD1W8", SHAPE[0], CLASSES, SHAPE[1:], 0).named_modules()
    assert list(asked.layers) == [name for name, module in modules if list(module.parameters(recurse=False))]
    added, at_start = torch.stack(list(asked.layers.values())).sum(dim=0).tolist()
    assert added == pytest.approx(asked.loss.item(), rel=1e-12) and at_start == pytest.approx(1, rel=1e-12)
    first, *_, last = asked.layers.values()
    assert first.tolist() == [0, 0] and last.min() > 0  # the deeper half counts
