import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from pad import evaluation
from pad.commands import evaluate as evaluating
from pad.commands.bench import Workbench
from pad.commands.evaluate import EvaluationSettings
from pad.data.augment import DSA, DSA_STRATEGY, NoAugmentation, augment
from pad.evaluation import Accuracies, Case, Evaluation, Protocol, Score, accuracy
from pad.nn.derivatives import COMPILE_CALLS, Compiled, compiler_available
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.rng import generator

K, SHAPE = 3, (3, 8, 8)


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
        return evaluating._plain(bench.protocol(settings, 100), settings, pool)

    alone = plain(["ConvNet"])
    assert alone.keys() == {field.name for field in fields(Protocol)} - {"own"}, "earlier versions had the same"
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
