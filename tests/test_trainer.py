import functools
import hashlib
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import Clock

from pad.commands import bench as workbench
from pad.commands import record as recording
from pad.commands.record import BufferSettings, expert_training
from pad.data.augment import DC, DSA, NoAugmentation, augment
from pad.data.images import ImageData
from pad.difficulty.ranking import Ranking
from pad.errors import InputError, Stopped
from pad.experts.curriculum import Curriculum
from pad.experts.gsam import GSAM
from pad.experts.trainer import ExpertTraining
from pad.limit import TimeLimit
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.store.foreign import save_pt
from pad.store.trajectories import TrajectoryStore, expert_path, recorded

NETWORK, CLASSES, SIZE = "ConvNetD1W8", 3, (8, 8)


class Recorder:
    """A model that remembers the batches its gradient was asked for."""

    def __init__(self, model):
        self.model = model
        self.calls = []

    def grad(self, at, x, p):
        self.calls.append((at.clone(), x.clone(), p.clone()))
        return self.model.grad(at, x, p)


def make_task(n=23, dtype=torch.float32, model=None, **changes):
    rng = torch.Generator().manual_seed(5)
    settings = dict(
        model=model or FlatModel(build(NETWORK, 3, CLASSES, SIZE, 0)),
        images=torch.randn(n, 3, *SIZE, dtype=dtype, generator=rng),
        labels=torch.randint(CLASSES, (n,), generator=rng),
        num_classes=CLASSES,
        epoch_indices=lambda epoch: torch.arange(n),
        optimiser=GSAM(0.1, momentum=0.5, l2=1e-3, rho=0.5, alpha=0.4),
        augmentation=DSA(),
        batch_size=5,
        epochs=3,
        seed=0,
    )
    return ExpertTraining(**(settings | changes))


def start_of(expert, dtype=torch.float32):
    network = build(NETWORK, 3, CLASSES, SIZE, 0, "expert", expert).to(dtype)
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def same(left, right):
    return len(left) == len(right) and all(a.equal(b) for a, b in zip(left, right))


# An expert


@pytest.mark.parametrize("augmentation", [DSA(), DC(), NoAugmentation()])
def test_an_expert_does_not_depend_on_the_others(augmentation):
    task = make_task(augmentation=augmentation)
    alone = list(task.train(2, start_of(2)))
    torch.manual_seed(99)
    [list(task.train(k, start_of(k))) for k in (0, 1)]
    assert same(list(task.train(2, start_of(2))), alone)
    interleaved = list(zip(task.train(2, start_of(2)), task.train(7, start_of(7))))
    assert same([two for two, _ in interleaved], alone)


def test_training_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    list(make_task().train(0, start_of(0)))
    assert torch.get_rng_state().equal(state)


def test_experts_and_seeds_differ_in_more_than_their_start():
    ends = [list(make_task(seed=seed).train(expert, start_of(0)))[-1] for seed in (0, 1) for expert in (0, 1)]
    assert all((a - b).norm() > 1e-4 for i, a in enumerate(ends) for b in ends[:i])


def test_a_trajectory_begins_with_the_start_and_its_snapshots_are_no_aliases():
    start = start_of(0)
    kept, copies = [], []
    for theta in make_task(epochs=4).train(0, start):
        kept.append(theta)
        copies.append(theta.clone())
    assert len(kept) == 5 and kept[0].equal(start) and start.equal(start_of(0))
    assert same(kept, copies) and len({theta.data_ptr() for theta in kept}) == 5
    assert all((a - b).norm() > 1e-4 for a, b in zip(copies, copies[1:]))


# An epoch


def test_an_epoch_uses_each_image_of_the_curriculum_once():
    """The pixels of image i are i, so that a batch says which images it holds."""
    n, epochs = 40, 9
    labels = torch.arange(n) % 7 % CLASSES  # classes of unequal size
    rng = torch.Generator().manual_seed(0)
    rows = [(labels == c).nonzero().flatten() for c in range(CLASSES)]
    rows = [row[torch.randperm(len(row), generator=rng)] for row in rows]
    curriculum = Curriculum(0.5, 3, 4, 6, 0.2, 0.4)
    recorder = Recorder(make_task().model)
    task = make_task(
        images=torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 3, *SIZE).contiguous(),
        labels=labels,
        model=recorder,
        epoch_indices=lambda epoch: curriculum.indices(epoch, rows),
        augmentation=NoAugmentation(),
        optimiser=GSAM(1e-6),
        batch_size=6,
        epochs=epochs,
    )
    orders = []
    for epoch, _ in enumerate(task.train(0, start_of(0))):
        batches = [x[:, 0, 0, 0].long() for _, x, _ in recorder.calls]
        targets = [p for _, _, p in recorder.calls]
        recorder.calls.clear()
        if epoch == 0:  # before training
            assert not batches
            continue
        expected = []
        for row in rows:
            first, last = curriculum.window(epoch - 1, len(row))
            expected += row[first:last].tolist()
        used = torch.cat(batches)
        assert Counter(used.tolist()) == Counter(expected) and len(used) == len(set(used.tolist()))
        assert [len(b) for b in batches] == [6] * (len(used) // 6) + [len(used) % 6] * bool(len(used) % 6)
        assert torch.cat(targets).equal(F.one_hot(labels[used], CLASSES).float())
        orders.append(used.tolist())
    assert len({len(order) for order in orders}) > 3  # the curriculum had something to say
    assert all(order != sorted(order) for order in orders)
    same_images = [order for order in orders if len(order) == n]
    assert len(same_images) == 2 and same_images[0] != same_images[1]  # epochs are shuffled anew


def test_without_radius_and_augmentation_it_is_an_ordinary_training_loop():
    dtype = torch.float64
    recorder = Recorder(make_task().model)
    optimiser = GSAM(0.1, momentum=0.9, l2=1e-2)
    task = make_task(dtype=dtype, model=recorder, augmentation=NoAugmentation(), optimiser=optimiser, batch_size=6)
    trajectory, batches = [], []
    for theta in task.train(4, start_of(4, dtype)):
        trajectory.append(theta)
        batches.append([(x, p) for _, x, p in recorder.calls])
        recorder.calls.clear()

    network = build(NETWORK, 3, CLASSES, SIZE, 0, "expert", 4).to(dtype)
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for theta, epoch in zip(trajectory, batches, strict=True):
        for x, p in epoch:
            sgd.zero_grad()
            F.cross_entropy(network(x), p.argmax(dim=1)).backward()
            sgd.step()
        expected = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        torch.testing.assert_close(theta, expected, rtol=1e-10, atol=1e-12)
    assert [len(epoch) for epoch in batches] == [0, 4, 4, 4]


def test_both_gradients_of_a_step_see_the_same_augmented_batch():
    recorder = Recorder(make_task().model)
    list(make_task(model=recorder).train(0, start_of(0)))
    assert len(recorder.calls) == 2 * 3 * 5  # two gradients, three epochs, five batches
    pairs = list(zip(recorder.calls[::2], recorder.calls[1::2]))
    for (w, x, p), (perturbed, x_again, p_again) in pairs:
        assert x.equal(x_again) and p.equal(p_again)
        assert not w.equal(perturbed)
    recorder.calls.clear()
    list(make_task(model=recorder, optimiser=GSAM(0.1)).train(0, start_of(0)))
    assert len(recorder.calls) == 3 * 5


def test_batches_are_augmented_with_fresh_draws():
    class Noted(DSA):
        def draw(self, n, rng):
            draws.append(super().draw(n, rng))
            return draws[-1]

    draws, recorder = [], Recorder(make_task().model)
    ramp = torch.linspace(0, 0.5, SIZE[1])
    images = torch.arange(23.0).view(-1, 1, 1, 1).add(ramp).expand(23, 3, *SIZE).contiguous()
    task = make_task(images=images, model=recorder, augmentation=Noted("flip"), optimiser=GSAM(1e-6))
    before = images.clone()
    list(task.train(0, start_of(0)))
    for draw, (_, x, p) in zip(draws, recorder.calls, strict=True):
        index = x[:, 0].flatten(1).amin(dim=1).long()  # a flip leaves the smallest pixel of an image what it was
        assert x.equal(augment(images[index], draw)) and len(draw.u) == len(x)
        assert p.equal(F.one_hot(task.labels[index], CLASSES).float())
    numbers = torch.cat([draw.u.flatten() for draw in draws])
    assert len(numbers.unique()) == len(numbers) and images.equal(before)


# Stage 1: the buffer


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """30 images of 3 classes, 12, 10 and 8 of them, in place of a data set; and settings that fit them."""
    rng = torch.Generator().manual_seed(1)
    labels = torch.tensor([0] * 12 + [1] * 10 + [2] * 8)[torch.randperm(30, generator=rng)]

    def pixels(n):
        return torch.randint(256, (n, 3, *SIZE), dtype=torch.uint8, generator=rng)

    data = ImageData(
        name="CIFAR10",
        train_images=pixels(30),
        train_labels=labels,
        test_images=pixels(9),
        test_labels=torch.arange(9) % 3,
        class_names=("a", "b", "c"),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )
    monkeypatch.setattr(workbench, "load_data", lambda *_, **__: data)
    monkeypatch.setenv("PAD_CACHE", str(tmp_path / "cache"))
    settings = dict(
        dataset="CIFAR10",
        model=NETWORK,
        num_experts=3,
        train_epochs=2,
        batch_train=8,
        lr_teacher=0.05,
        mom=0.5,
        buffer_path=str(tmp_path / "buffers"),
        ranking_path=str(tmp_path / "rankings"),
        device="cpu",
        compile="off",
        score_repeats=1,
        score_epochs=1,
    )
    return SimpleNamespace(
        data=data,
        folder=tmp_path / "buffers" / "CIFAR10_NO_ZCA" / NETWORK,
        rankings=tmp_path / "rankings",
        record=lambda **changes: recording.record_experts(BufferSettings(**(settings | changes))),
    )


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_a_buffer_that_grew_is_the_one_made_at_once(bench, tmp_path):
    assert bench.record(num_experts=1) == bench.folder
    first = digests(bench.folder)
    bench.record(num_experts=3)
    grown = digests(bench.folder)
    assert first.items() < grown.items() and recorded(bench.folder) == [0, 1, 2]
    stamps = [path.stat().st_mtime_ns for path in sorted(bench.folder.iterdir())]
    bench.record(num_experts=2)  # all there: nothing to do
    assert stamps == [path.stat().st_mtime_ns for path in sorted(bench.folder.iterdir())]
    whole = bench.record(num_experts=3, buffer_path=str(tmp_path / "other"))
    assert digests(whole) == grown and len(set(grown.values())) == 3


def test_an_expert_that_was_interrupted_is_trained_anew(bench, tmp_path, monkeypatch):
    whole = digests(bench.record(buffer_path=str(tmp_path / "other")))
    train = ExpertTraining.train

    def interrupted(self, expert, start, attempt):
        for epoch, theta in enumerate(train(self, expert, start, attempt)):
            if (expert, epoch) == (1, 2):
                raise KeyboardInterrupt
            yield theta

    monkeypatch.setattr(ExpertTraining, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.record()
    assert set(digests(bench.folder)) == {expert_path("", 0).name}
    monkeypatch.undo()
    monkeypatch.setattr(workbench, "load_data", lambda *_, **__: bench.data)
    monkeypatch.setenv("PAD_CACHE", str(tmp_path / "cache"))
    bench.record()
    assert digests(bench.folder) == whole


def test_an_expert_that_would_not_end_in_time_is_not_begun(bench, tmp_path, monkeypatch, caplog):
    """Each takes ten seconds. Every call trains one at least, and all of them make the buffer of one call."""
    whole, clock, train = digests(bench.record(buffer_path=str(tmp_path / "other"))), Clock(), ExpertTraining.train

    def passing(self, *of):
        clock.now += 10
        return train(self, *of)

    monkeypatch.setattr(ExpertTraining, "train", passing)
    monkeypatch.setattr(recording, "TimeLimit", functools.partial(TimeLimit, clock=clock))
    caplog.set_level("INFO", "pad")
    for seconds, expected in ((1, [0]), (19, [0, 1]), (1, [0, 1, 2])):
        bench.record(time_limit=seconds, given=frozenset({"time_limit"}))
        assert recorded(bench.folder) == expected
        assert ("time_limit: the same command goes on" in caplog.text) == (len(expected) < 3)
        caplog.clear()
    assert digests(bench.folder) == whole
    for seconds, expected in ((20, 2), (29.9, 2), (30, 3)):
        folder = bench.record(time_limit=seconds, buffer_path=str(tmp_path / f"{seconds}"))
        assert len(recorded(folder)) == expected


def test_what_a_buffer_holds(bench):
    bench.record(eval_every=2, train_epochs=3)
    store = TrajectoryStore.open(bench.folder)
    assert store.experts == [0, 1, 2] and [store.epochs(k) for k in store.experts] == [3, 3, 3]
    x = (bench.data.test_images / 255 - 0.5) / 0.2
    for k in store.experts:
        network = build(NETWORK, 3, CLASSES, SIZE, 0, "expert", k)
        rows = store.rows(k, range(4))
        assert rows[0].equal(torch.cat([p.detach().flatten() for p in network.parameters()]))
        accuracy = store.figures(k)["test_accuracy"]
        assert accuracy.isnan().tolist() == [False, True, False, False]  # every second epoch, and the last
        for epoch in (0, 2, 3):
            torch.nn.utils.vector_to_parameters(rows[epoch], network.parameters())
            hits = (network(x).argmax(dim=1) == bench.data.test_labels).float().mean()
            torch.testing.assert_close(accuracy[epoch], hits)


@pytest.mark.parametrize(
    "change",
    [
        {"lr_teacher": 0.1},
        {"seed": 1},
        {"train_epochs": 3},
        {"init_ratio": 0.5},
        {"alpha": 0.0},
        {"dsa": False},
        {"adaptive": False},
        {"batch_train": 9},
        {"drop_easy": 0.1},
    ],
    ids=str,
)
def test_experts_of_another_recipe_are_not_added(bench, change):
    bench.record(num_experts=1)
    before = digests(bench.folder)
    (key,) = change
    with pytest.raises(InputError, match=f"{key}: .* in the buffer, {change[key]} in the config"):
        bench.record(**change)
    assert digests(bench.folder) == before and not bench.rankings.exists()


def test_settings_that_leave_the_expert_as_it_is_may_change(bench):
    bench.record(num_experts=1)
    bench.record(eval_every=0, num_experts=2)
    assert recorded(bench.folder) == [0, 1]


def test_a_batch_larger_than_the_data_is_refused(bench):
    with pytest.raises(InputError, match="batch_train: 31 .* 30 training images"):
        bench.record(batch_train=31)
    assert not bench.folder.exists()


def test_an_epoch_without_images_is_refused_before_any_work(bench, monkeypatch):
    monkeypatch.setattr(workbench, "obtain_rankings", lambda *_, **__: pytest.fail("a ranking was computed"))
    with pytest.raises(InputError, match="epoch without images"):
        bench.record(init_ratio=0.08)  # 0.08 of 12 images is less than one
    assert not bench.folder.exists()


def test_the_settings_reach_the_task(bench, monkeypatch):
    tasks = []
    monkeypatch.setattr(recording, "expert_training", lambda *given: tasks.append(expert_training(*given)) or tasks[-1])
    bench.record(
        num_experts=1,
        train_epochs=1,
        lr_teacher=0.02,
        mom=0.3,
        l2=1e-3,
        rho_max=0.7,
        rho_min=0.7,
        alpha=0.6,
        adaptive=False,
        batch_train=7,
        seed=5,
        dsa_strategy="flip_crop",
        siamese=True,
    )
    bench.record(num_experts=1, train_epochs=1, dsa=False, buffer_path=str(bench.folder / "other"))
    first, second = tasks
    assert first.optimiser == GSAM(lr=0.02, momentum=0.3, l2=1e-3, rho=0.7, alpha=0.6, adaptive=False)
    assert (first.batch_size, first.epochs, first.seed, first.num_classes) == (7, 1, 5, 3)
    assert first.augmentation.kinds == ["flip", "crop"] and first.augmentation.siamese
    assert isinstance(second.augmentation, DC)
    torch.testing.assert_close(first.images, (bench.data.train_images / 255 - 0.5) / 0.2)
    assert first.labels.equal(bench.data.train_labels)


def test_the_curriculum_follows_the_ranking(bench, monkeypatch):
    tasks = []
    monkeypatch.setattr(recording, "expert_training", lambda *given: tasks.append(expert_training(*given)) or tasks[-1])
    bench.record(num_experts=1, init_ratio=0.5, add_end_epoch=1)
    assert [path.name for path in bench.rankings.iterdir()] == ["CIFAR10_GraNd.safetensors"]
    scored = Ranking.load(bench.rankings / "CIFAR10_GraNd.safetensors").scores
    easiest = set()
    for c in range(CLASSES):
        members = sorted((bench.data.train_labels == c).nonzero().flatten().tolist(), key=lambda i: (scored[i], i))
        easiest |= set(members[: len(members) // 2])
    (task,) = tasks
    assert set(task.epoch_indices(0).tolist()) == easiest and len(task.epoch_indices(0)) == len(easiest)
    assert sorted(task.epoch_indices(1).tolist()) == list(range(30))


@pytest.mark.parametrize("easy, hard", [(0.2, 0.0), (0.0, 0.5), (0.25, 0.3)])
def test_a_window_of_difficulty_holds_in_every_epoch(bench, monkeypatch, easy, hard):
    """Against a selection by counting, for each image, how many of its class are easier and how many harder."""
    tasks = []
    monkeypatch.setattr(recording, "expert_training", lambda *given: tasks.append(expert_training(*given)) or tasks[-1])
    bench.record(num_experts=1, drop_easy=easy, drop_hard=hard)
    scored = Ranking.load(bench.rankings / "CIFAR10_GraNd.safetensors").scores.tolist()
    labels = bench.data.train_labels.tolist()
    expected = []
    for i, label in enumerate(labels):
        of_class = [(scored[j], j) for j in range(len(labels)) if labels[j] == label]
        easier, harder = (
            sum(test(each) for each in of_class) for test in ((scored[i], i).__gt__, (scored[i], i).__lt__)
        )
        if easier >= int(easy * len(of_class)) and harder >= int(hard * len(of_class)):
            expected.append(i)
    assert 0 < len(expected) < len(labels)
    for epoch in range(2):
        assert sorted(tasks[0].epoch_indices(epoch).tolist()) == expected


def test_a_window_comes_before_the_curriculum_and_experts_of_another_do_not_join(bench, monkeypatch):
    tasks = []
    monkeypatch.setattr(recording, "expert_training", lambda *given: tasks.append(expert_training(*given)) or tasks[-1])
    bench.record(num_experts=1, drop_hard=0.5, init_ratio=0.5, add_end_epoch=1)
    sizes = bench.data.train_labels.bincount().tolist()
    kept = [size - size // 2 for size in sizes]
    assert len(tasks[0].epoch_indices(0)) == sum(size // 2 for size in kept)
    assert len(tasks[0].epoch_indices(1)) == sum(kept)
    with pytest.raises(InputError, match="drop_hard: 0.5 in the buffer, 0.0 in the config"):
        bench.record(init_ratio=0.5, add_end_epoch=1)
    with pytest.raises(InputError, match="drop_hard: 0.5 in the buffer, 0.25 in the config"):
        bench.record(init_ratio=0.5, add_end_epoch=1, drop_hard=0.25)
    bench.record(num_experts=2, drop_hard=0.5, init_ratio=0.5, add_end_epoch=1)
    assert recorded(bench.folder) == [0, 1]


def test_a_window_that_leaves_nothing_is_refused_before_any_work(bench, monkeypatch):
    monkeypatch.setattr(workbench, "obtain_rankings", lambda *_, **__: pytest.fail("a ranking was computed"))
    with pytest.raises(InputError, match="drop_easy: 0.6 and drop_hard: 0.5 leave no image of class 0"):
        bench.record(drop_easy=0.6, drop_hard=0.5)
    assert not bench.folder.exists()


def test_a_published_ranking_is_used(bench, monkeypatch):
    labels = torch.arange(30) % 3
    data = ImageData(**{**vars(bench.data), "train_labels": labels})
    monkeypatch.setattr(workbench, "load_data", lambda *_, **__: data)
    rows = torch.arange(30).view(10, 3).T.flip(1)  # row c: 27 + c first, c last
    save_pt(bench.rankings / "CIFAR10_Mine.pt", rows.contiguous())
    tasks = []
    monkeypatch.setattr(recording, "expert_training", lambda *given: tasks.append(expert_training(*given)) or tasks[-1])
    bench.record(num_experts=1, init_ratio=0.2, sort_method="CIFAR10_Mine")
    assert sorted(tasks[0].epoch_indices(0).tolist()) == [24, 25, 26, 27, 28, 29]


def test_no_ranking_is_made_where_every_epoch_uses_all_images(bench, monkeypatch):
    monkeypatch.setattr(workbench, "obtain_rankings", lambda *_, **__: pytest.fail("a ranking was computed"))
    bench.record(num_experts=1)
    assert recorded(bench.folder) == [0]


def test_whether_to_compile_does_not_depend_on_the_number_of_experts(bench, monkeypatch):
    """Compiled code rounds differently, and an expert is the same however many are trained."""
    asked = []
    monkeypatch.setattr(recording, "how_to_compile", lambda *arguments: asked.append(arguments) or "off")
    for number in (1, 2, 3):
        bench.record(num_experts=number)
    assert asked == asked[:1] * 3


# Numbers that go wrong


def diverge(monkeypatch, *when):
    """Experts whose parameters become other than finite in their second epoch: (expert, attempt) in ``when``."""
    train = ExpertTraining.train

    def diverging(self, expert, start, attempt):
        for epoch, theta in enumerate(train(self, expert, start, attempt)):
            yield (
                theta.index_fill(0, torch.tensor([5]), math.nan) if (expert, attempt) in when and epoch == 2 else theta
            )

    monkeypatch.setattr(ExpertTraining, "train", diverging)


def test_an_expert_that_diverges_is_trained_again_with_other_random_numbers(bench, tmp_path, monkeypatch, caplog):
    whole = digests(bench.record(buffer_path=str(tmp_path / "other")))
    diverge(monkeypatch, (1, 0), (1, 1))
    with caplog.at_level("WARNING", logger="pad"):
        bench.record()
    said = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert said == ["expert 1 is not finite after epoch 2: trained again with other random numbers"] * 2
    store, found = TrajectoryStore.open(bench.folder), digests(bench.folder)
    assert [store.header(k)["settings"]["attempt"] for k in store.experts] == [0, 2, 0]
    name = expert_path("", 1).name
    assert found.pop(name) != whole.pop(name) and found == whole
    network = build(NETWORK, 3, CLASSES, SIZE, 0, "expert", 1, "attempt", 2)
    assert store.rows(1, [0])[0].equal(torch.cat([p.detach().flatten() for p in network.parameters()]))
    diverge(monkeypatch, (1, 0), (1, 1))
    again = digests(bench.record(buffer_path=str(tmp_path / "again")))
    assert again == digests(bench.folder), "a function of (seed, expert, attempt)"


def test_attempts_draw_other_batches():
    task = make_task()
    start = start_of(0)
    first, second, third = (list(task.train(0, start, attempt))[-1] for attempt in (0, 1, 1))
    assert second.equal(third) and not second.equal(first)
    assert first.equal(list(task.train(0, start))[-1])


def test_an_expert_that_diverges_every_time_stops_the_run_and_what_is_finished_is_kept(bench, monkeypatch):
    with pytest.raises(Stopped, match=r"expert 0 diverged 4 times; .* Lower lr_teacher \(1e\+30\)") as stop:
        bench.record(lr_teacher=1e30)
    assert stop.value.code == 1 and not bench.folder.exists()
    diverge(monkeypatch, *((1, attempt) for attempt in range(4)))
    with pytest.raises(Stopped, match="expert 1 diverged 4 times"):
        bench.record()
    assert set(digests(bench.folder)) == {expert_path("", 0).name}


# Buffers of another make


def test_every_expert_of_a_buffer_must_be_of_the_recipe(bench, tmp_path):
    bench.record(num_experts=1)
    other = bench.record(num_experts=2, lr_teacher=0.1, buffer_path=str(tmp_path / "other"))
    shutil.copy(expert_path(other, 1), bench.folder)
    with pytest.raises(InputError, match=r"expert_0001.safetensors: lr_teacher: 0.1 in the buffer, 0.05 in the config"):
        bench.record()
    assert recorded(bench.folder) == [0, 1]


def test_another_ranking_is_another_recipe(bench):
    curriculum = dict(init_ratio=0.5, add_end_epoch=1)
    bench.record(num_experts=1, **curriculum)
    (path,) = bench.rankings.iterdir()
    ranking = Ranking.load(path)
    Ranking([row.flip(0) for row in ranking.rows], -ranking.scores, ranking.metadata).save(path)
    with pytest.raises(InputError, match=r"expert_0000.safetensors: ranking: \w+ in the buffer, \w+ in the config"):
        bench.record(num_experts=2, **curriculum)
    assert recorded(bench.folder) == [0]
    ranking.save(path)
    bench.record(num_experts=2, **curriculum)


def test_a_setting_that_is_younger_than_a_buffer_had_its_default(bench, monkeypatch):
    with monkeypatch.context() as patch:
        of = BufferSettings.of
        patch.setattr(BufferSettings, "of", lambda *args: {k: v for k, v in of(*args).items() if k != "adaptive"})
        bench.record(num_experts=1)
    with pytest.raises(InputError, match="adaptive: True in the buffer, False in the config"):
        bench.record(adaptive=False)
    bench.record()
    assert recorded(bench.folder) == [0, 1, 2]


def test_two_runs_with_other_settings_at_once_do_not_mix_their_experts(bench, tmp_path, monkeypatch):
    other = bench.record(num_experts=2, lr_teacher=0.1, buffer_path=str(tmp_path / "other"))
    train = ExpertTraining.train

    def meanwhile(self, expert, start, attempt):
        yield from train(self, expert, start, attempt)
        shutil.copy(expert_path(other, 1), bench.folder)  # what the other run stores

    monkeypatch.setattr(ExpertTraining, "train", meanwhile)
    with pytest.raises(InputError, match="lr_teacher: 0.1 in the buffer, 0.05 in the config"):
        bench.record()
    assert set(digests(bench.folder)) == {expert_path("", 1).name}
