"""One training for all methods: what it is, that sharing it changes nothing, and that an interrupted one goes on."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from test_distributed import on_ranks

from pad.data.augment import DSA, augment
from pad.data.images import ImageData
from pad.difficulty.evidence import collect_evidence
from pad.difficulty.methods import METHODS, Kept, Method, RankingSource, compute_rankings, score_images, score_network
from pad.difficulty.scores import el2n
from pad.difficulty.training import ScoringSettings, ScoringTraining
from pad.errors import InputError
from pad.nn.networks import build
from pad.rng import generator
from pad.store.tensors import load_tensors, save_tensors

SMALL = ScoringSettings("ConvNetD1W8", repeats=2, epochs=3, lr=0.05, batch=16)
SCORES = [name for name, method in METHODS.items() if method.kind == "score"]
AT_THE_END = [name for name in SCORES if METHODS[name].needs != "training"]
MEANSTD = {"kind": "meanstd", "digest": "d"}


def random_task(n=40, classes=3, size=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=rng), torch.randint(classes, (n,), generator=rng)


def make_data(sizes=(12, 1, 9), seed=0):
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    rng = torch.Generator().manual_seed(seed)
    labels = labels[torch.randperm(len(labels), generator=rng)]
    images = torch.randint(256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=rng)
    classes = tuple(f"c{c}" for c in range(len(sizes)))
    return ImageData(
        name="CIFAR10",
        train_images=images,
        train_labels=labels,
        test_images=images[:1],
        test_labels=labels[:1],
        class_names=classes,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )


def make_source(data, settings=SMALL, seed=0, preprocessing=MEANSTD, device="cpu"):
    return RankingSource(
        data=data,
        images=(data.train_images.float() / 255 - 0.5).to(device),
        labels=data.train_labels.to(device),
        preprocessing=preprocessing,
        scoring=settings,
        seed=seed,
    )


def rank(names, data, settings=SMALL, seed=0, preprocessing=MEANSTD, device="cpu", **options):
    return compute_rankings(names, make_source(data, settings, seed, preprocessing, device), **options)


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name in expected:
        assert [row.tolist() for row in ours[name].rows] == [row.tolist() for row in expected[name].rows], name
        assert ours[name].metadata == expected[name].metadata
        if expected[name].scores is None:
            assert ours[name].scores is None
        else:
            assert torch.equal(ours[name].scores, expected[name].scores), name


# --------------------------------------------------------------------------------------------------- one network


def test_training_is_sgd_with_nesterov_momentum_and_weight_decay():
    images, labels = random_task()
    settings = ScoringSettings(
        "ConvNetD1W8", epochs=2, lr=0.1, momentum=0.7, weight_decay=0.01, batch=16, augmentation="flip_crop"
    )
    trained = ScoringTraining(images, labels, 3, settings, 2).train(1)
    assert not trained.training

    network = build("ConvNetD1W8", 3, 3, (8, 8), 2, "score", 1)
    parameters = list(network.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for epoch in range(2):
        rng = generator(2, "score", 1, epoch)
        order = torch.randperm(40, generator=rng)
        for first in range(0, 40, 16):
            batch = order[first : first + 16]
            x = augment(images[batch], DSA("flip_crop").draw(len(batch), rng))
            gradients = torch.autograd.grad(F.cross_entropy(network(x), labels[batch]), parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients):
                    g = g + 0.01 * p
                    v.mul_(0.7).add_(g)
                    p -= 0.1 * (g + 0.7 * v)
    for ours, expected in zip(trained.parameters(), parameters):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_observers_see_every_image_once_an_epoch_and_change_nothing():
    images, labels = random_task()
    seen = []
    task = ScoringTraining(images, labels, 3, SMALL, 0)
    watched = task.train(0, observers=[lambda indices, logits: seen.append((indices, logits))])
    alone = task.train(0)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters()))
    assert [len(indices) for indices, _ in seen] == [16, 16, 8] * 3
    for epoch in range(3):
        indices = torch.cat([indices for indices, _ in seen[3 * epoch : 3 * epoch + 3]])
        assert indices.sort().values.tolist() == list(range(40))
    with torch.no_grad():
        network = build("ConvNetD1W8", 3, 3, (8, 8), 0, "score", 0)
        torch.testing.assert_close(seen[0][1], network(images[seen[0][0]]))
    assert not any(logits.requires_grad for _, logits in seen)


def test_forgetting_and_loss_are_those_of_a_training_simulated_with_a_pass_before_every_step():
    images, labels = random_task(n=40)
    settings = ScoringSettings("ConvNetD1W8BN", repeats=1, epochs=8, lr=0.3, batch=16, augmentation="flip")
    network = build(settings.model, 3, 3, (8, 8), 5, "score", 0)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.9, weight_decay=5e-4, nesterov=True)
    history, losses = [[] for _ in range(40)], [[] for _ in range(40)]
    for epoch in range(8):
        rng = generator(5, "score", 0, epoch)
        order = torch.randperm(40, generator=rng)
        for batch in order.split(16):
            x = augment(images[batch], DSA("flip").draw(len(batch), rng))
            optimiser.zero_grad()
            logits = network(x)
            for i, prediction in zip(batch.tolist(), logits.argmax(dim=1).tolist()):
                history[i].append(prediction == int(labels[i]))
            for i, p in zip(batch.tolist(), logits.detach().double().softmax(dim=1)):
                losses[i].append(-math.log(p[labels[i]]))
            F.cross_entropy(logits, labels[batch]).backward()
            optimiser.step()
    expected = [sum(now and not then for now, then in zip(seen, seen[1:])) if any(seen) else 8 for seen in history]
    assert len(set(expected)) > 2
    found = score_images(["Forgetting", "Loss"], ScoringTraining(images, labels, 3, settings, 5)).scores
    assert found["Forgetting"].tolist() == expected
    means = torch.tensor([sum(seen) / 8 for seen in losses], dtype=torch.float64)
    torch.testing.assert_close(found["Loss"], means, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("model", ["ConvNetD1W8", "ConvNetD1W8BN"])
def test_scores_do_not_depend_on_the_batch_they_are_computed_in(model):
    images, labels = random_task()
    settings = ScoringSettings(model, repeats=1, epochs=1, lr=0.05, batch=16)
    network = ScoringTraining(images, labels, 3, settings, 0).train(0)
    whole = score_network(AT_THE_END, network, images, labels, batch=1000).scores
    parts = score_network(AT_THE_END, network, images, labels, batch=7).scores
    for name in AT_THE_END:
        assert whole[name].shape == (40,) and whole[name].dtype == torch.float64 and len(whole[name].unique()) > 30
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_neighbours_are_those_of_a_class():
    images, labels = random_task()
    network = build("ConvNetD1W8", 3, 3, (8, 8), 0).eval()
    scores = score_network(["CAL"], network, images, labels).scores["CAL"]
    evidence = collect_evidence(network, images, labels)
    for c in range(3):
        alone = METHODS["CAL"].compute(evidence.of(labels == c))
        torch.testing.assert_close(scores[labels == c], alone)


def test_no_epochs_scores_networks_as_initialised():
    images, labels = random_task()
    settings = ScoringSettings("ConvNetD1W8", repeats=1, epochs=0)
    network = build("ConvNetD1W8", 3, 3, (8, 8), 0, "score", 0).eval()
    with torch.no_grad():
        expected = el2n(network(images), labels)
    torch.testing.assert_close(
        score_images(["EL2N"], ScoringTraining(images, labels, 3, settings, 0)).scores["EL2N"], expected
    )


def test_wrongly_labelled_images_are_hardest():
    rng = torch.Generator().manual_seed(0)
    true = torch.arange(400) % 4
    patterns = torch.randn(4, 3, 8, 8, generator=rng)
    images = patterns[true] + 0.8 * torch.randn(400, 3, 8, 8, generator=rng)
    labels = true.clone()
    flipped = torch.randperm(400, generator=rng)[:40]
    labels[flipped] = (labels[flipped] + 1 + torch.randint(3, (40,), generator=rng)) % 4
    settings = ScoringSettings("ConvNetD1W16", repeats=2, epochs=4, lr=0.02, batch=50)
    names = ["GraNd", "EL2N", "Forgetting", "Loss", "CAL", "DeepFool"]
    for method, values in score_images(names, ScoringTraining(images, labels, 4, settings, 0)).scores.items():
        hardest = values.argsort(descending=True)[:40]
        found = torch.isin(hardest, flipped).double().mean().item()
        assert found >= 0.9, (method, found)  # chance is 0.1


# ---------------------------------------------------------------------------------------------- several, shared


def test_scores_are_the_mean_over_networks_each_of_which_depends_on_its_number_only():
    images, labels = random_task()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    together = score_images(["GraNd", "DeepFool"], ScoringTraining(images, labels, 3, SMALL, 3)).scores
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    alone = {}
    for repeat in (1, 0):  # the second network before the first: neither needs the other
        network = ScoringTraining(images, labels, 3, SMALL, 3).train(repeat)
        alone[repeat] = score_network(["GraNd", "DeepFool"], network, images, labels).scores
    for method in ("GraNd", "DeepFool"):
        assert not torch.equal(alone[0][method], alone[1][method])
        expected = (alone[0][method] + alone[1][method]) / 2
        torch.testing.assert_close(together[method], expected, rtol=1e-14, atol=0)
    assert not torch.equal(
        score_images(["GraNd"], ScoringTraining(images, labels, 3, SMALL, 4)).scores["GraNd"], together["GraNd"]
    )


@pytest.fixture(scope="module")
def everything():
    return rank(list(METHODS), make_data())


def test_every_method_ranks_each_class(everything):
    data = make_data()
    assert list(everything) == list(METHODS) and len(METHODS) == 19
    for name, ranking in everything.items():
        ranking.validate(data.train_labels, 3, name)
        assert ranking.metadata["method"] == name and ranking.metadata["ranked_by"] == METHODS[name].kind
        assert (ranking.scores is not None) == (METHODS[name].kind == "score")
        assert METHODS[name].summary


def test_rankings_from_one_training_are_those_of_a_training_each(everything):
    data = make_data()
    for name in ("EL2N", "Forgetting", "CAL", "DeepFool", "Herding", "Glister", "Uniform"):
        assert_same(rank([name], data), {name: everything[name]})


def test_several_methods_train_each_network_once():
    trained = []
    rank(list(METHODS), make_data(), progress=lambda *at: trained.append(at))
    assert trained == [(repeat, epoch) for repeat in range(2) for epoch in range(3)]
    trained.clear()
    rank(["Herding", "Craig", "Uniform"], make_data(), progress=lambda *at: trained.append(at))
    assert trained == [(0, epoch) for epoch in range(3)], "orders need one network"
    trained.clear()
    rank(["Uniform"], make_data(), progress=lambda *at: trained.append(at))
    assert trained == []


def test_orders_are_of_network_0_class_by_class_with_a_stream_for_each(monkeypatch):
    data = make_data()
    asked = []

    def order(evidence, rng):
        asked.append((evidence, torch.rand(3, generator=rng).tolist()))
        return torch.arange(len(evidence)).flip(0)

    monkeypatch.setitem(METHODS, "Herding", Method(kind="order", summary="", needs="evidence", compute=order))
    ranking = rank(["EL2N", "Herding"], data, seed=4)["Herding"]
    images = data.train_images.float() / 255 - 0.5
    network = ScoringTraining(images, data.train_labels, 3, SMALL, 4).train(0)
    everyone = collect_evidence(network, images, data.train_labels)
    for c, (evidence, drawn) in enumerate(asked):
        row = (data.train_labels == c).nonzero().flatten()
        assert torch.equal(evidence.features, everyone.features[row])
        assert torch.equal(evidence.logits, everyone.logits[row])
        assert evidence.labels.tolist() == [c] * len(row)
        assert drawn == torch.rand(3, generator=generator(4, "order", "Herding", c)).tolist()
        assert ranking.rows[c].tolist() == row.flip(0).tolist()
    assert "repeats" not in ranking.metadata["settings"] and ranking.metadata["settings"]["epochs"] == 3


def test_uniform_is_a_random_order_that_depends_on_the_seed_only():
    data = make_data((30, 40, 30))
    one, other = (rank(["Uniform"], data, seed=seed)["Uniform"] for seed in (0, 1))
    assert one.rows[0].tolist() != sorted(one.rows[0].tolist()) and one.rows[0].tolist() != other.rows[0].tolist()
    assert one.metadata["settings"] == {"seed": 0}
    assert_same(rank(["Uniform"], data, ScoringSettings("MLP", epochs=1)), {"Uniform": one})


def test_ranks_share_networks_and_classes(tmp_path, everything):
    names = ["GraNd", "Forgetting", "DeepFool", "Herding", "Uniform"]
    expected = {name: everything[name] for name in names}

    def work(ranks, kept):
        trained, keep = [], tmp_path / str(kept)
        rankings = rank(names, make_data(), progress=lambda *at: trained.append(at), ranks=ranks, keep=keep)
        orders = rank(["Herding", "Craig"], make_data(), ranks=ranks)
        return rankings, orders, trained

    for size in (2, 3):
        for number, (rankings, orders, trained) in enumerate(on_ranks(size, lambda ranks: work(ranks, size))):
            assert_same(rankings, expected)
            assert_same(orders, {name: everything[name] for name in ("Herding", "Craig")})
            assert trained == [(repeat, epoch) for repeat in range(2)[number::size] for epoch in range(3)]
        # what is kept is found by another number of ranks too
        for rankings, _, trained in on_ranks(5 - size, lambda ranks: work(ranks, size)):
            assert trained == []
            assert_same(rankings, expected)


# -------------------------------------------------------------------------------------------------- interrupted


class Stop(Exception):
    pass


def stop_at(*where):
    def progress(*at):
        if at == where:
            raise Stop

    return progress


def test_an_interrupted_run_goes_on_after_the_networks_it_finished(tmp_path, everything):
    with pytest.raises(Stop):
        rank(list(METHODS), make_data(), keep=tmp_path, progress=stop_at(1, 1))
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["network_0000"]
    trained = []
    rankings = rank(list(METHODS), make_data(), keep=tmp_path, progress=lambda *at: trained.append(at))
    assert trained == [(1, epoch) for epoch in range(3)]
    assert_same(rankings, everything)
    trained.clear()
    assert_same(rank(list(METHODS), make_data(), keep=tmp_path, progress=lambda *at: trained.append(at)), everything)
    fewer = rank(["Craig", "CAL"], make_data(), keep=tmp_path, progress=lambda *at: trained.append(at))
    assert_same(fewer, {name: everything[name] for name in ("Craig", "CAL")})
    assert trained == []
    # more repeats go on too: a network does not depend on how many there are
    more = ScoringSettings(**{**vars(SMALL), "repeats": 3})
    rank(["GraNd"], make_data(), more, keep=tmp_path, progress=lambda *at: trained.append(at))
    assert trained == [(2, epoch) for epoch in range(3)]


@pytest.mark.parametrize("what", ["settings", "seed", "images", "preprocessing", "methods", "cut off", "damage"])
def test_what_was_kept_of_something_else_is_not_used(tmp_path, caplog, what):
    """Nor is it lost: only a damaged file is replaced."""
    caplog.set_level(logging.WARNING, "pad")
    settings = ScoringSettings("ConvNetD1W8", repeats=1, epochs=1)
    first = dict(names=["EL2N"], data=make_data(), settings=settings)
    rank(**first, keep=tmp_path)
    arguments = dict(first)
    (path,) = tmp_path.iterdir()
    if what == "settings":
        arguments["settings"] = ScoringSettings("ConvNetD1W8", repeats=1, epochs=1, lr=0.01)
    elif what == "seed":
        arguments["seed"] = 1
    elif what == "images":
        arguments["data"] = make_data(seed=1)
    elif what == "preprocessing":
        arguments["preprocessing"] = {"kind": "meanstd", "digest": "e"}
    elif what == "methods":
        arguments["names"] = ["GraNd", "Herding"]
    elif what == "cut off":
        path.write_bytes(path.read_bytes()[:-9])
    elif what == "damage":
        path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    trained = []
    expected = rank(**arguments)
    assert_same(rank(**arguments, keep=tmp_path, progress=lambda *at: trained.append(at)), expected)
    assert trained == [(0, 0)]
    said = what in ("methods", "cut off", "damage")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * said
    assert not said or (str(path) in caplog.text and "trained again" in caplog.text)
    for each in (first, arguments):
        rank(**each, keep=tmp_path, progress=lambda *at: trained.append(at))
    assert trained == [(0, 0)]


def test_networks_that_an_earlier_version_kept_are_used_and_removed(tmp_path, everything):
    """Its files bear no digest, and do not say for which methods they are."""
    kept = tmp_path / "kept"
    rank(["GraNd", "EL2N"], make_data(), keep=kept)
    for path in [*kept.iterdir()]:
        tensors, about = load_tensors(path)
        del about["methods"]
        save_tensors(kept / f"{path.name.split('-')[0]}.safetensors", tensors, about)
        path.unlink()
    assert_same(rank(["GraNd"], make_data(), keep=kept, progress=refuse), {"GraNd": everything["GraNd"]})
    keeping = Kept(kept, make_source(make_data()))
    keeping.remove({"GraNd", "Uniform"})
    assert len([*kept.iterdir()]) == 2
    keeping.remove({"GraNd", "EL2N"})
    assert not kept.exists()


# ---------------------------------------------------------------------------------------------------- bad input


def test_divergence_is_named():
    images, labels = random_task()
    settings = ScoringSettings("ConvNetD1W8", repeats=1, epochs=2, lr=1e30, batch=16)
    for names in (["GraNd"], ["Forgetting"], ["DeepFool"], []):
        message = r"scoring network 0 \(ConvNetD1W8\) diverged, its .* not finite.*below 1e\+30"
        with pytest.raises(InputError, match=message):
            score_images(names, ScoringTraining(images, labels, 3, settings, 0), evidence=True)


def test_a_diverged_network_is_not_kept(tmp_path):
    settings = ScoringSettings("ConvNetD1W8", repeats=1, epochs=2, lr=1e30, batch=16)
    with pytest.raises(InputError, match="diverged"):
        rank(["EL2N", "Herding"], make_data(), settings, keep=tmp_path)
    assert list(tmp_path.iterdir()) == []


def refuse(*args):
    raise AssertionError("work began before the input was checked")


@pytest.mark.parametrize(
    "names, settings, message",
    [
        (["EL2N", "grnd"], SMALL, "there is no difficulty method 'grnd'; the nearest name is GraNd"),
        (["GraphCut"], SMALL, "nearest name is Submodular-GraphCut"),
        (["EL2N"], ScoringSettings("ConvNett"), "nearest name is ConvNet"),
        (["Herding"], ScoringSettings("ConvNetD5"), "ConvNetD5 does not fit"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(names, settings, message):
    with pytest.raises(InputError, match=message):
        rank(names, make_data(), settings, progress=refuse)


def test_a_class_without_images_is_refused_before_any_work():
    data = make_data((3, 0, 4))
    with pytest.raises(InputError, match="class 1 has no images to rank"):
        rank(["EL2N"], data, progress=refuse)


def test_an_order_must_have_each_image_once_and_a_class_it_cannot_do_is_named(monkeypatch):
    def give(positions):
        always = Method(kind="order", summary="", needs="nothing", compute=lambda evidence, rng: positions)
        monkeypatch.setitem(METHODS, "Herding", always)

    data = make_data((3, 3))
    for wrong in ([0, 1], [0, 1, 1], [0, 1, 3]):
        give(torch.tensor(wrong))
        with pytest.raises(RuntimeError, match="Herding did not select each of the 3 images of class 0 once"):
            rank(["Herding"], data)

    def cannot(evidence, rng):
        raise InputError("no")

    unable = Method(kind="order", summary="", needs="nothing", compute=cannot)
    monkeypatch.setitem(METHODS, "Herding", unable)
    with pytest.raises(InputError, match="Herding cannot order class 0: no"):
        rank(["Herding"], data)


# --------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.cuda
def test_every_method_on_cuda_and_counting_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    data = make_data((60, 1, 30))
    settings = ScoringSettings("ConvNetD1W8", repeats=1, epochs=0)
    names = [name for name in METHODS if METHODS[name].needs != "training"]
    found = rank(names, data, settings, device="cuda")
    expected = rank(names, data, settings)
    for name in names:
        found[name].validate(data.train_labels, 3, name)
        if METHODS[name].kind == "score":
            assert (found[name].scores - expected[name].scores).norm() < 0.02 * expected[name].scores.norm(), name
    observers = [METHODS[name].compute(data.train_labels.cuda()) for name in METHODS if name not in names]
    indices, logits = torch.arange(0, 90, 2).cuda(), torch.randn(45, 3).cuda()
    for observer in observers:
        observer(indices, logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for observer in observers:
            observer(indices, logits)
            count = observer.scores(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count.is_cuda and count.cpu().tolist().count(5) > 45
