import logging
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from pad import evaluation, protocols
from pad.commands import training
from pad.commands.bench import Workbench
from pad.commands.evaluate import EvaluationSettings
from pad.data.augment import DSA, DSA_STRATEGY, CutMix, NoAugmentation, augment, cutmix
from pad.data.placement import HostImages
from pad.evaluation import Accuracies, Case, Evaluation, Score, accuracy
from pad.nn.derivatives import COMPILE_CALLS, Compiled, compiler_available
from pad.nn.flat import FlatModel
from pad.nn.networks import FAMILIES, build
from pad.nn.replay import replay_on
from pad.protocols import PROTOCOLS, Protocol, Schedule
from pad.rng import generator

K, SHAPE = 3, (3, 8, 8)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def randn(seed, shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def training_set(n=10, seed=0, hard=False):
    logits = 2 * randn(seed + 1, (n, K))
    return randn(seed, (n, *SHAPE)), F.one_hot(logits.argmax(dim=1), K).double() if hard else logits.softmax(dim=1)


def network(name="ConvNetD1W8", seed=0):
    return build(name, SHAPE[0], K, SHAPE[1:], seed).double()


def train(protocol, nets, sets, lr, rngs, flat=True):
    """Train networks by the gradient of their structure; returns how often it was formed, of one and of several."""
    calls = {"grad": 0, "grads": 0}

    class Counted(FlatModel):
        def grad(self, *args):
            calls["grad"] += 1
            return super().grad(*args)

        def grads(self, *args):
            calls["grads"] += 1
            return super().grads(*args)

    with pytest.MonkeyPatch.context() as patch:
        if flat and protocol.compile == "off":  # takes the way of compiled code, by functions that are not
            patch.setattr(torch, "compile", lambda f, **options: f)
            model = Counted(nets[0], Compiled)
        else:
            model = Counted(nets[0], protocol.compile)
    protocol.train(model, nets, sets, lr, rngs)
    return calls["grad"], calls["grads"]


def assert_same_state(ours, theirs):
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-10, atol=1e-12)


class Recorded:
    """An augmentation that notes how many images each batch has."""

    def __init__(self, inner=NoAugmentation()):
        self.inner, self.sizes = inner, []

    def draw(self, n, rng):
        self.sizes.append(n)
        return self.inner.draw(n, rng)


def plain_training(net, images, p, lr, epochs, batch_size, augmentation, rng):
    """The published protocol with the update of each parameter written out; returns the learning rate of each epoch."""
    velocity, rates = {}, []
    net.train()
    for epoch in range(0, epochs + 1):
        rates.append(lr)
        order = torch.randperm(len(images), generator=rng)
        for first in range(0, len(images), batch_size):
            batch = order[first : first + batch_size]
            x = augment(images[batch], augmentation.draw(len(batch), rng))
            losses = [-(p[i] * torch.log_softmax(logits, dim=0)).sum() for i, logits in zip(batch, net(x))]
            named = dict(net.named_parameters())
            gradients = torch.autograd.grad(sum(losses) / len(batch), list(named.values()))
            with torch.no_grad():
                for (name, w), g in zip(named.items(), gradients):
                    g = g + 5e-4 * w
                    velocity[name] = 0.9 * velocity[name] + g if name in velocity else g
                    w -= lr * velocity[name]
        if epoch == epochs // 2 + 1:
            lr = lr * 0.1
            velocity = {}
    return rates


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("name", ["ConvNetW8", "MLP", "ConvNetD1W8BN"])
@pytest.mark.parametrize(
    "epochs, batch_size, augmentation, hard",
    [
        (5, 4, NoAugmentation(), False),
        (4, 10, NoAugmentation(), True),
        (3, 64, DSA(), False),
        (6, 3, DSA(siamese=True), False),
        (1, 4, DSA(), True),
        (0, 4, DSA(), False),
    ],
)
def test_training_is_the_published_protocol(name, epochs, batch_size, augmentation, hard, flat):
    images, p = training_set(hard=hard)
    ours, theirs = network(name), network(name)
    calls = train(
        Protocol(augmentation, epochs=epochs, batch_size=batch_size),
        [ours],
        [(images, p)],
        0.05,
        [generator(1, "x")],
        flat,
    )
    rates = plain_training(theirs, images, p, 0.05, epochs, batch_size, augmentation, generator(1, "x"))
    dropped = epochs - (epochs // 2 + 1) if epochs > 1 else 0
    assert [math.isclose(rate, 0.05) for rate in rates] == [True] * (epochs + 1 - dropped) + [False] * dropped
    assert_same_state(ours, theirs)
    steps = (epochs + 1) * math.ceil(10 / batch_size)
    modules = "BN" in name or not flat  # running statistics are no part of flat parameters
    assert calls == ((0, 0) if modules else (steps, 0))


# ---- other published protocols, by a loop of its own


def sgd(w, g, state, rate):
    g = g + 5e-4 * w
    state["velocity"] = 0.9 * state.get("velocity", 0) + g
    w -= rate * state["velocity"]


def adamw(w, g, state, rate):
    state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    w -= rate * 0.01 * w
    w -= rate * state["m"] / (1 - 0.9 ** state["t"]) / ((state["v"] / (1 - 0.999 ** state["t"])).sqrt() + 1e-8)


def mixed_by_hand(x, p, mix):
    """Pixel by pixel."""
    area, down, across = mix.u
    height, width = x.shape[2:]
    near = [
        (int(down * height), int(height * math.sqrt(area)) // 2),
        (int(across * width), int(width * math.sqrt(area)) // 2),
    ]
    mixed, targets = x.clone(), torch.zeros_like(p)
    for i, other in enumerate(mix.partner.tolist()):
        for row in range(height):
            for column in range(width):
                inside = all(middle - half <= at < middle + half for at, (middle, half) in zip((row, column), near))
                of = other if inside else i
                mixed[i, :, row, column] = x[of, :, row, column]
                targets[i] += p[of] / (height * width)
    return mixed, targets


def by_hand(net, images, p, *, rates, update, augmentation, rng, batch=4, forget=(), cutmix=0.0):
    """Train for an epoch at each of the rates; yields the parameters' sum after each."""
    state = {}
    for epoch, rate in enumerate(rates):
        net.train()
        state = {} if epoch in forget else state
        batches = torch.randperm(len(images), generator=rng).split(batch)
        draws = [augmentation.draw(len(some), rng) for some in batches]
        mixes = [CutMix(cutmix).draw(len(some), rng) if cutmix else None for some in batches]
        for some, draw, mix in zip(batches, draws, mixes):
            x, targets = augment(images[some], draw), p[some]
            x, targets = mixed_by_hand(x, targets, mix) if mix else (x, targets)
            loss = -(targets * torch.log_softmax(net(x), dim=1)).sum() / len(some)
            named = dict(net.named_parameters())
            with torch.no_grad():
                for (name, w), g in zip(named.items(), torch.autograd.grad(loss, list(named.values()))):
                    update(w, g, state.setdefault(name, {}), rate)
        yield sum_of(net)


def sum_of(net):
    return sum(w.sum().item() for w in net.parameters())


def published(name, epochs, **how):
    said = {each.name: getattr(PROTOCOLS[name], each.name) for each in fields(Schedule)}
    return Protocol(DSA(), **said | {"epochs": epochs, "batch_size": 4} | how)


AS_PUBLISHED = {  # epochs, what is trained at which multiple of the rate, where the optimiser begins anew, checks after
    "mtt": (5, [1, 1, 1, 1, 0.1, 0.1], {4}, [6], sgd),
    "dm": (4, [1, 1, 1, 1, 0.1], {4}, [5], sgd),
    "ncfm": (10, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625], (), [4, 8, 10], adamw),
    "ddranking": (6, [1, 1, 1, 0.1, 0.1, 0.1], (), [4, 6], sgd),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network_name, together", [("ConvNetD1W8", 1), ("ConvNetD1W8", 2), ("ConvNetD1W8BN", 1)])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_training_by_a_published_protocol(name, network_name, together, device):
    epochs, shares, forget, checked, update = AS_PUBLISHED[name]
    protocol = published(name, epochs, **{"check_every": 4} if PROTOCOLS[name].check_every else {})
    nets = [network(network_name, j).to(device) for j in range(together)]
    sets = [tuple(each.to(device) for each in training_set(seed=j)) for j in range(together)]
    checks = protocol.train(
        FlatModel(nets[0]),
        nets,
        sets,
        0.03,
        [generator(j, "x") for j in range(together)],
        replay=replay_on(torch.device(device)),
        test=sum_of,
    )
    for j, net in enumerate(nets):
        theirs = network(network_name, j)
        how = {"rates": [0.03 * share for share in shares], "forget": forget, "cutmix": protocol.cutmix}
        how |= {"update": update, "augmentation": DSA(), "rng": generator(j, "x")}
        sums = list(by_hand(theirs, *training_set(seed=j), **how))
        for key, value in net.cpu().state_dict().items():
            # AdamW makes steps of gradients that are zero but for rounding.
            torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-7, atol=1e-7)
        assert checks[j] == pytest.approx([sums[done - 1] for done in checked], rel=1e-6)


def test_what_the_published_protocols_say():
    """The learning rate of every hundredth epoch, and what settings do not say."""
    said = {
        name: (each.length, each.lr, each.batch_size, each.check_every, [each.falls(e) for e in range(0, 2000, 100)])
        for name, each in PROTOCOLS.items()
    }
    halved = [e // 4 for e in range(20)]
    once = [0] * 6 + [1] * 14
    assert said == {
        "mtt": (1001, None, 256, None, once),
        "dm": (1001, 0.01, 256, None, once),
        "ncfm": (2000, 1e-3, 128, 100, halved),
        "ddranking": (1000, None, 256, 20, [0] * 5 + [1] * 15),
    }
    assert [PROTOCOLS["mtt"].falls(epoch) for epoch in (501, 502)] == [0, 1]
    assert [PROTOCOLS["ddranking"].falls(epoch) for epoch in (499, 500)] == [0, 1]


@pytest.mark.parametrize("side", [7, 8])
def test_cutmix_is_the_formula(side):
    x, p = randn(0, (6, 3, side, side + 2)), training_set(6)[1]
    shares = set()
    for seed in range(30):
        mix = CutMix(1.0).draw(6, generator(seed, "mix"))
        ours, theirs = cutmix(x, p, mix), mixed_by_hand(x, p, mix)
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-12)
        shares.add((ours[0] != x)[0].sum().item())
    assert len(shares) > 10
    assert cutmix(x, p, None) == (x, p)


def test_cutmix_draws():
    rng, again = generator(0, "mix"), generator(0, "mix")
    mixes = [CutMix(0.5).draw(5, rng) for _ in range(1000)]
    drawn = [mix for mix in mixes if mix]
    assert 440 < len(drawn) < 560
    assert all(sorted(mix.partner.tolist()) == list(range(5)) for mix in drawn)
    assert any(mix.partner.tolist() != list(range(5)) for mix in drawn)
    numbers = torch.tensor([mix.u for mix in drawn])
    assert (numbers.mean(dim=0) - 0.5).abs().max() < 0.05 and (numbers.std(dim=0) - 12**-0.5).abs().max() < 0.03
    for mix in mixes:
        same = CutMix(0.5).draw(5, again)
        assert (mix is None) == (same is None) and (mix is None or mix.u == same.u)
    assert not any(CutMix(0.0).draw(5, rng) for _ in range(50))


# ---- several networks


@pytest.mark.parametrize("name", ["ConvNetW8", "ConvNetD2W8ASLN", "LeNet", "MLP", "ConvNetD1W8BN"])
def test_networks_trained_together_are_those_trained_alone(name):
    """Each has its own start, training set, order and augmentation; the last batch of an epoch is a short one."""
    shape = (3, 16, 16)
    sets = [(randn(j, (10, *shape)), training_set(10, 10 * j, hard=j == 1)[1]) for j in range(3)]
    together, alone = ([build(name, 3, K, shape[1:], j).double() for j in range(3)] for _ in range(2))
    protocol = Protocol(DSA(), epochs=4, batch_size=4)
    assert train(protocol, together, sets, 0.05, [generator(j, "x") for j in range(3)]) == (
        0,
        0 if "BN" in name else 15,
    )
    for j, net in enumerate(alone):
        start = {key: value.clone() for key, value in net.state_dict().items()}
        train(protocol, [net], [sets[j]], 0.05, [generator(j, "x")])
        assert any((value != start[key]).any() for key, value in net.state_dict().items())
        assert_same_state(together[j], net)


@pytest.mark.slow
@pytest.mark.skipif(not compiler_available(), reason="no compiler")
@pytest.mark.parametrize("together", [1, 2])
def test_compiled_training_is_the_same_by_few_graphs(together, monkeypatch):
    """The graphs are those of a real compilation, which would take long; tests/test_flat.py has one."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="eager", **options))
    graphs = []
    for compiled in (True, False):
        nets = [network("ConvNetD1W8", seed) for seed in range(together)]
        before = counters["stats"]["unique_graphs"]
        protocol = Protocol(DSA(), epochs=3, batch_size=4, compile="on" if compiled else "off")
        sets, rngs = [training_set()] * together, [generator(j, "x") for j in range(together)]
        train(protocol, nets, sets, 0.05, rngs)
        graphs.append((counters["stats"]["unique_graphs"] - before, nets))
    (count, ours), (none, theirs) = graphs
    assert none == 0 and 1 <= count <= together, "a short last batch of one network has a graph of its own"
    for net, same in zip(ours, theirs):
        assert_same_state(net, same)


def test_every_epoch_takes_all_images_in_batches_in_another_order():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(K))

        def forward(self, x):
            seen.append(x.flatten().long().tolist())
            return x.new_ones(len(x), 1) * self.weight

    augmentation = Recorded()
    images = torch.arange(10.0).view(10, 1, 1, 1)
    p = torch.full((10, K), 1 / 3)
    train(Protocol(augmentation, epochs=3, batch_size=4), [Net()], [(images, p)], 0.1, [generator(0, "x")], flat=False)
    assert augmentation.sizes == [4, 4, 2] * 4 == [len(batch) for batch in seen]
    passes = [sum(seen[i : i + 3], []) for i in range(0, 12, 3)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_accuracy_is_the_share_of_right_answers_and_uses_running_statistics():
    net = network("ConvNetD1W8BN")
    train(Protocol(NoAugmentation(), epochs=2, batch_size=6), [net], [training_set(12)], 0.05, [generator(0, "x")])
    test_images = randn(9, (23, *SHAPE)) + 1
    net.eval()
    alone = torch.cat([net(image[None]) for image in test_images]).argmax(dim=1)
    labels = alone.clone()
    labels[::4] = (labels[::4] + 1) % K
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for batch in (1, 5, 512):  # with batch statistics the answers would depend on the batch
        net.train()
        assert accuracy(net, test_images, labels, batch) == pytest.approx(17 / 23)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net.train()
    assert (net(test_images).argmax(dim=1) != alone).any(), "the test cannot tell batch from running statistics"


def accuracies(*numbers, **more):
    return Accuracies("ConvNet", [Score(each, each - 0.1, each / 2) for each in numbers], **more)


def test_means_and_deviations():
    result = accuracies(0.5, 0.6, 0.9)
    mean = 2.0 / 3
    squares = (0.5 - mean) ** 2 + (0.6 - mean) ** 2 + (0.9 - mean) ** 2
    assert result.n == 3 and result.mean == pytest.approx(mean) and result.std == pytest.approx(math.sqrt(squares / 3))
    assert result.se == pytest.approx(math.sqrt(squares / 2) / math.sqrt(3))
    said = {
        "network": "ConvNet",
        "mean": result.mean,
        "std": result.std,
        "se": result.se,
        "n": 3,
        "accuracies": [0.5, 0.6, 0.9],
        "train": pytest.approx(mean / 2),
    }
    assert result.as_dict() == said
    last = {"mean": pytest.approx(mean - 0.1), "std": pytest.approx(result.std), "se": pytest.approx(result.se)}
    assert accuracies(0.5, 0.6, 0.9, best=True).as_dict() == said | {"last": last}


def test_of_one_network_nothing_is_known_of_the_error():
    result = accuracies(0.4)
    assert result.std == 0 and math.isnan(result.se) and result.as_dict()["se"] is None
    result.scores.append(Score(0.4, 0.4, None))
    assert result.se == 0 and result.train is None and result.as_dict()["train"] is None


TEST_IMAGES = randn(20, (400, *SHAPE)).float()
TEST_LABELS = torch.randint(K, (400,), generator=torch.Generator().manual_seed(0))


def evaluation_by(protocol):
    return Evaluation(protocol=protocol, test_images=TEST_IMAGES, test_labels=TEST_LABELS)


def case_of(name, sets, lr=0.1, **how):
    return Case(network=name, training_set=sets, lr=lr, **how)


def scores(name="ConvNetD1W8", indices=range(3), seed=0, sets=None, **how):
    protocol = Protocol(DSA(), epochs=3, batch_size=4, seed=seed, **how)
    images, p = training_set()
    sets = sets or (lambda j: (images.float(), p.float()))
    *_, last = evaluation_by(protocol).train(case_of(name, sets), indices)
    return last.scores


@pytest.mark.parametrize("name, together", [("ConvNetD1W8BN", 1), ("ConvNetD1W8", 1), ("ConvNetD1W8", 2)])
def test_an_accuracy_is_yielded_after_each_network_and_trains_fresh_ones_on_the_jth_set(name, together):
    asked, indices = [], [0, 1, 4]

    def sets(j):
        asked.append(j)
        images, p = training_set(seed=10 * j)
        return images.float(), p.float()

    protocol = Protocol(DSA(), epochs=3, batch_size=4, seed=5, together=together)
    progress = [
        (s.network, s.n, list(s.scores), list(asked))
        for s in evaluation_by(protocol).train(case_of(name, sets), indices)
    ]
    expected = []
    for at, j in enumerate(indices):
        net = build(name, SHAPE[0], K, SHAPE[1:], 5, "evaluation", j)
        images, p = (tensor.float() for tensor in training_set(seed=10 * j))
        plain_training(net, images, p, 0.1, 3, 4, DSA(), generator(5, "evaluation", name, j))
        tested, own = (
            sum(int(net.eval()(image[None]).argmax() == label) for image, label in zip(*of)) / len(of[1])
            for of in ((TEST_IMAGES, TEST_LABELS), (images, p.argmax(dim=1)))
        )
        expected.append(Score(pytest.approx(tested), pytest.approx(tested), pytest.approx(own)))
        begun = math.ceil((at + 1) / together) * together
        assert progress[at] == (name, at + 1, expected, indices[:begun])
    assert len(progress) == 3 and len({score.train for score in progress[-1][2]}) > 1


def test_a_network_depends_on_seed_name_and_number_only():
    three = scores()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert scores(indices=[2, 0]) == [three[2], three[0]]
    assert scores(together=2) == scores(together=3) == three
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(three)) > 1 and scores(seed=1) != three

    images, p = (tensor.float() for tensor in training_set())
    other_first = scores(sets=lambda j: (images, p) if j else (-images, p))
    assert other_first[0] != three[0] and other_first[1:] == three[1:], "what network 0 saw changed the others"


def test_a_network_with_an_augmentation_of_its_own_is_trained_with_it():
    general, own = Recorded(), Recorded()
    protocol = Protocol(general, own={"ConvNetD1W8BN": own}, epochs=1, batch_size=4)
    images, p = (tensor.float() for tensor in training_set(6))
    evaluation_by(protocol).run([case_of("ConvNetD1W8", lambda j: (images, p))], 1)
    assert general.sizes == [4, 2] * 2 and own.sizes == []
    evaluation_by(protocol).run([case_of("ConvNetD1W8BN", lambda j: (images, p))], 1)
    assert general.sizes == own.sizes == [4, 2] * 2
    plain = [case_of(name, lambda j: (images, p), augmented=False) for name in ("ConvNetD1W8", "ConvNetD1W8BN")]
    evaluation_by(protocol).run(plain, 1)
    assert general.sizes == own.sizes == [4, 2] * 2
    evaluation_by(protocol).run([case_of("ConvNetD1W8", lambda j: (images, p), epochs=2)], 1)
    assert general.sizes == [4, 2] * 5


@pytest.mark.parametrize(
    "dataset, network, expected",
    [
        ("CIFAR10", "ConvNet", NoAugmentation),
        ("CIFAR10", "ResNet18BN", NoAugmentation),
        ("FashionMNIST", "ConvNet", NoAugmentation),
        ("CIFAR10", "ConvNetBN", "crop_noise"),
        ("MNIST", "ConvNetBN", "crop_noise"),
        ("MNIST", "ConvNet", "crop_scale_rotate"),
    ],
)
def test_without_dsa_networks_are_augmented_as_in_the_code_of_dc(dataset, network, expected):
    bench = Workbench(data=None, device=torch.device("cpu"), zca=False)
    for dsa in (False, True):
        settings = EvaluationSettings(dataset=dataset, dsa=dsa)
        found = bench.protocol(settings, 100).of(network).augmentation
        assert getattr(found, "strategy", type(found)) == (DSA if dsa else expected)


def test_what_a_stopped_evaluation_goes_on_with_was_augmented_alike():
    bench = Workbench(data=None, device=torch.device("cpu"), zca=False)

    def plain(pool, **given):
        settings = EvaluationSettings(dsa=False, **given)
        return training._plain(bench.protocol(settings, 100), settings, pool)

    alone = plain(["ConvNet"])
    earlier = ("epochs", "batch_size", "momentum", "weight_decay", "seed", "compile", "together", "augmentation")
    assert alone.keys() == set(earlier), "earlier versions had the same"
    assert alone["augmentation"] == [False, DSA_STRATEGY, False], "earlier versions had the same"
    assert plain(["ConvNet", "ConvNetBN"])["augmentation"] == [*alone["augmentation"], "crop_noise"]
    assert plain(["ConvNet"], dataset="MNIST")["augmentation"] == [*alone["augmentation"], "crop_scale_rotate"]


def test_two_training_sets_are_compared_on_the_same_networks():
    """At a learning rate of zero a network stays what it was drawn as, whatever the set."""
    protocol = Protocol(DSA(), epochs=1, batch_size=4)
    a, b = training_set(10, 0), training_set(17, 5)
    accuracies = []
    for images, p in (a, b):
        sets = images.float(), p.float()
        *_, last = evaluation_by(protocol).train(case_of("ConvNetD1W8", lambda j: sets, 0.0), range(3))
        accuracies.append(last.accuracies)
    assert accuracies[0] == accuracies[1] and len(set(accuracies[0])) > 1


def test_all_networks_of_one_architecture_and_image_size_share_one_structure(monkeypatch):
    built, made = [], evaluation.FlatModel

    def recorded(module, compile):
        built.append((type(module.body[0]).__name__, module.classifier.in_features, compile))
        return made(module)  # nothing compiled

    monkeypatch.setattr(evaluation, "FlatModel", recorded)
    evaluation._workplace.cache_clear()
    try:
        for _ in range(2):
            scores(), scores(together=2), scores("MLP"), scores(compile="on")
        assert built == [("Sequential", 128, "off"), ("Sequential", 128, "off"), ("Sequential", 128, "on")]
        assert evaluation._workplace.cache_info().currsize == 3
    finally:
        evaluation._workplace.cache_clear()


@pytest.mark.parametrize(
    "mode, device, num_sets, expected",
    [
        ("auto", "cpu", 1, "fused"),
        ("auto", "cpu", 2, "auto"),
        ("auto", "cuda", 1, "on"),
        ("off", "cuda", 2, "off"),
        ("on", "cpu", 1, "on"),
    ],
)
def test_what_is_compiled_is_decided_by_all_steps_of_an_architecture(mode, device, num_sets, expected):
    """Ten networks a set, two batches an epoch."""
    epochs = COMPILE_CALLS // (10 * 2) - 2  # and epoch 0
    bench = Workbench(data=None, device=torch.device(device), zca=False)

    def chosen(epochs: int) -> str:
        settings = EvaluationSettings(num_eval=10, epoch_eval_train=epochs, batch_train=64, compile=mode)
        return bench.protocol(settings, 100, num_sets).compile

    assert chosen(epochs) == expected
    assert chosen(epochs + 1) == {"fused": "auto"}.get(expected, expected)


# ---- which check counts, and on what


@pytest.mark.parametrize("check_every", [None, 1, 2])
@pytest.mark.parametrize("together", [1, 2])
def test_the_best_check_counts_where_the_protocol_says_so(monkeypatch, check_every, together):
    found, tell = [], evaluation.accuracy

    def told(net, images, labels):
        share = tell(net, images, labels)
        if images is TEST_IMAGES:
            found.append(share)
        return share

    monkeypatch.setattr(evaluation, "accuracy", told)
    protocol = Protocol(DSA(), epochs=4, batch_size=4, check_every=check_every, together=together)
    images, p = (each.float() for each in training_set())
    [result] = evaluation_by(protocol).run([case_of("ConvNetD1W8", lambda j: (images, p), lr=0.3)], 2)
    checks = {None: 1, 1: 5, 2: 3}[check_every]
    by_network = [found[j::2] for j in range(2)] if together == 2 else [found[:checks], found[checks:]]
    assert [len(each) for each in by_network] == [checks, checks]
    assert [(score.accuracy, score.last) for score in result.scores] == [(max(each), each[-1]) for each in by_network]
    assert ("last" in result.as_dict()) == (check_every is not None)
    if check_every == 1:
        assert result.mean > result.last.mean, "the test cannot tell the best from the last"


@pytest.mark.parametrize("together", [1, 2])
def test_what_is_not_augmented_is_neither_transformed_nor_mixed(trained, together):
    images, p = (each.float() for each in training_set())
    protocol = Protocol(DSA(), epochs=2, batch_size=4, cutmix=1.0, together=together)
    evaluation_by(protocol).run([case_of("ConvNetD1W8", lambda j: (images, p), augmented=False)], 2)
    for j, state in enumerate(trained):
        net = build("ConvNetD1W8", SHAPE[0], K, SHAPE[1:], 0, "evaluation", j)
        plain_training(net, images, p, 0.1, 2, 4, NoAugmentation(), generator(0, "evaluation", "ConvNetD1W8", j))
        for key, value in net.state_dict().items():
            torch.testing.assert_close(state[key], value)
    assert len(trained) == 2


class Shifted:
    """Stands in for preprocessing."""

    device = torch.device("cpu")

    def apply(self, pixels):
        return pixels / 255 - 0.5


@pytest.mark.parametrize("name, together", [("ConvNetD1W8", 1), ("ConvNetD1W8", 2), ("ConvNetD1W8BN", 1)])
def test_images_in_host_memory_train_the_same_networks(trained, name, together):
    pixels = torch.randint(256, (10, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    host, p = HostImages(pixels, Shifted()), training_set()[1].float()
    protocol = Protocol(DSA(), epochs=2, batch_size=4, cutmix=0.5, together=together)
    found = [
        evaluation_by(protocol).run([case_of(name, lambda j: (images, p))], 2)[0].scores for images in (host[:], host)
    ]
    assert found[0] == found[1] and len(trained) == 4
    for one, other in zip(trained[:2], trained[2:]):
        assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.cuda
@pytest.mark.parametrize("name, together", [("ConvNetD1W8", 2), ("ConvNetD1W8BN", 1)])
def test_images_in_host_memory_train_the_same_networks_on_cuda(name, together):
    class There(Shifted):
        device = torch.device("cuda")

    pixels = torch.randint(256, (10, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    host, p = HostImages(pixels, There()), training_set()[1].float().cuda()
    protocol = Protocol(DSA(), epochs=4, batch_size=4, cutmix=0.5, together=together)
    by = Evaluation(protocol=protocol, test_images=TEST_IMAGES.cuda(), test_labels=TEST_LABELS.cuda())
    device, kept = (by.run([case_of(name, lambda j: (images, p))], 2)[0] for images in (host[:], host))
    assert device.accuracies == pytest.approx(kept.accuracies, abs=0.02)


@pytest.mark.parametrize("name, again", [("ConvNetD1W8", [0, 1, 2, 3]), ("ConvNetD1W8BN", [1, 3])])
def test_a_known_network_is_trained_again_only_where_that_is_how_others_are(name, again):
    images, p = (each.float() for each in training_set())
    protocol, case = Protocol(DSA(), epochs=1, batch_size=4, together=4), case_of(name, lambda j: (images, p))
    [whole] = evaluation_by(protocol).run([case], 4)
    known, seen = {(0, j): whole.scores[j] for j in (0, 2)}, []
    [result] = evaluation_by(protocol).run([case], 4, known=known, progress=lambda at, j, so_far: seen.append((at, j)))
    assert seen == [(0, j) for j in again] and result.scores == whole.scores


# ---- networks that are no function of flat parameters


@pytest.fixture
def dropping(monkeypatch):
    """The name of a network with dropout."""

    def layers(name, channels, size):
        return [nn.Sequential(nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.Dropout(0.4))]

    monkeypatch.setitem(FAMILIES, "Dropping", layers)
    evaluation._workplace.cache_clear()
    return "Dropping"


@pytest.mark.parametrize("together", [1, 3])
def test_a_network_with_dropout_is_trained_as_a_module_and_drops_the_same_each_time(dropping, together):
    state = torch.get_rng_state()
    first = scores(dropping, together=together)
    torch.manual_seed(99)
    assert scores(dropping, together=together) == first
    assert scores(dropping, indices=[0]) + scores(dropping, indices=[1, 2]) == first
    torch.set_rng_state(state)
    scores(dropping)
    assert torch.equal(torch.get_rng_state(), state)


# ---- a long training goes on


@pytest.fixture
def trained(monkeypatch):
    """The states of the networks that were tested last, on the training set."""
    states, tell = [], evaluation.accuracy

    def told(net, images, labels):
        if images is not TEST_IMAGES:
            states.append({key: value.clone() for key, value in net.state_dict().items()})
        return tell(net, images, labels)

    monkeypatch.setattr(evaluation, "accuracy", told)
    return states


class Stopped(Exception):
    pass


def stop_after(monkeypatch, epochs, torn=False):
    """Training is stopped after so many epochs, once the state is kept, or before it is; None: never.

    Notes the epochs that are done.
    """
    kept, keep = [], protocols.StateFile.write

    def write(self, training, done, checks):
        kept.append(done)
        if torn and len(kept) == epochs:
            raise Stopped
        keep(self, training, done, checks)
        if len(kept) == epochs:
            raise Stopped

    monkeypatch.setattr(protocols.StateFile, "write", write)
    return kept


LONG = {
    "module": ("ConvNetD1W8", {}),
    "together": ("ConvNetD1W8", {"together": 2}),
    "batch norm": ("ConvNetD1W8BN", {"together": 2}),
    "AdamW, mixed, best": ("ConvNetD1W8", {"optimiser": "adamw", "cutmix": 0.5, "check_every": 2, "restart": False}),
    "together, mixed, best": ("ConvNetD1W8", {"together": 2, "cutmix": 0.5, "check_every": 2}),
    "dropout": ("Dropping", {}),
}


def long_training(tmp_path, name, how, lr=0.1, seed=0):
    images, p = (each.float() for each in training_set(seed=seed))
    protocol = Protocol(DSA(), epochs=5, batch_size=4, **how)
    case = case_of(name, lambda j: (images, p), lr=lr, checkpoint=lambda j: tmp_path / f"{j}.safetensors")
    return evaluation_by(protocol).run([case], 2)[0].scores


@pytest.mark.parametrize("name, how", LONG.values(), ids=LONG)
@pytest.mark.parametrize("epochs, torn", [(1, False), (4, False), (5, False), (5, True), (6, False)])
def test_a_training_that_was_stopped_goes_on_to_the_same_network(
    monkeypatch, tmp_path, dropping, trained, name, how, epochs, torn
):
    expected = long_training(tmp_path, name, how)
    assert not list(tmp_path.iterdir()), "nothing is kept of a training of less than a minute"
    whole = trained[:]
    trained.clear()
    monkeypatch.setattr(protocols, "_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, epochs, torn)
        long_training(tmp_path, name, how)
    kept = stop_after(monkeypatch, None)
    assert long_training(tmp_path, name, how) == expected
    assert kept[: 6 - epochs + torn] == list(range(epochs + 1 - torn, 7)), "it began anew"
    assert len(trained) == len(whole) == 2
    for one, other in zip(whole, trained):
        assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("name, how", [LONG["module"], LONG["together"]])
@pytest.mark.parametrize("change", ["damaged", "not ours", "lr", "set", "protocol", "network"])
def test_a_state_that_is_damaged_or_of_another_training_is_passed_over(
    monkeypatch, tmp_path, caplog, name, how, change
):
    monkeypatch.setattr(protocols, "_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        long_training(tmp_path, name, how)
    path = tmp_path / "0.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    if change in ("damaged", "not ours"):
        path.write_bytes(data if change == "damaged" else b"notes")
    other = {
        "lr": {"lr": 0.2},
        "set": {"seed": 1},
        "protocol": {"how": how | {"momentum": 0.5}},
        "network": {"name": "ConvNetD1W16"},
    }.get(change, {})
    asked = {"name": name, "how": how} | other
    (tmp_path / "elsewhere").mkdir()
    expected = long_training(tmp_path / "elsewhere", **asked)
    kept = stop_after(monkeypatch, None)
    with caplog.at_level(logging.INFO, "pad"):
        assert long_training(tmp_path, **asked) == expected
    assert kept[0] == 1 and "begin" in caplog.text and str(path) in caplog.text


def test_a_state_is_kept_every_minute(monkeypatch, tmp_path):
    now, written = [0.0], []
    monkeypatch.setattr(protocols.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(protocols, "save_tensors", lambda path, tensors, said: written.append((now[0], said["done"])))

    class Slow(NoAugmentation):
        def draw(self, n, rng):
            now[0] += 10.0  # three batches an epoch

    images, p = (each.float() for each in training_set())
    case = case_of("MLP", lambda j: (images, p), checkpoint=lambda j: tmp_path / "state")
    evaluation_by(Protocol(Slow(), epochs=8, batch_size=4)).run([case], 1)
    assert written == [(60.0, 2), (120.0, 4), (180.0, 6), (240.0, 8)]


# ---- settings


def test_what_a_named_protocol_says_holds_where_nobody_says_otherwise():
    bench = Workbench(data=None, device=torch.device("cpu"), zca=False)

    def made(**given):
        settings = EvaluationSettings.resolve({"synthetic": "x", **given})
        protocol = bench.protocol(settings, 100)
        return settings, protocol, (protocol.epochs, protocol.batch_size, protocol.lr, settings.dsa_strategy)

    everything, without = DSA_STRATEGY, "color_crop_flip_scale_rotate"
    assert made()[2] == made(protocol="MTT")[2] == (1000, 128, None, everything)
    assert made(protocol="dm")[2] == (1000, 256, 0.01, everything)
    assert made(protocol="ddranking")[2] == (1000, 256, None, everything)
    assert made(protocol="ncfm")[2] == (2000, 128, 1e-3, without)
    own = {"epoch_eval_train": 3, "batch_train": 7, "dsa_strategy": "flip"}
    assert made(protocol="ncfm", **own)[2] == (3, 7, 1e-3, "flip")
    assert made(**own)[2] == (3, 7, None, "flip")

    settings, protocol, _ = made(protocol="ncfm")
    assert (protocol.optimiser, protocol.cutmix, protocol.augmentation.kinds) == ("adamw", 0.5, without.split("_"))
    adopted = settings.adopting({"dsa": False, "dsa_strategy": "flip", "siamese": True})
    assert (adopted.dsa, adopted.dsa_strategy, adopted.siamese) == (True, without, True)
    assert made(protocol="ncfm", dsa=False)[0].dsa is False
    assert EvaluationSettings.resolve({"synthetic": "x"}).adopting({"dsa": False, "dsa_strategy": "flip"}).dsa is False
