import logging
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from helpers import Clock, events_in
from PIL import Image
from test_distributed import on_ranks

from pad.checkpoint import SMALLEST_LR, State
from pad.data.preprocessing import MeanStd
from pad.distiller import Distiller, Schedule
from pad.errors import InputError, Stopped
from pad.limit import TimeLimit
from pad.matching.objective import Gradients, Objective
from pad.store.foreign import load_pt
from pad.store.run import Place, Run, run_state
from pad.store.tensors import load_tensors, save_tensors
from pad.synthetic import SyntheticSet

K, IPC, SHAPE = 2, 2, (3, 4, 4)
N = K * IPC
MEANSTD = MeanStd.of((0.4, 0.5, 0.6), (0.2, 0.2, 0.3), "cpu")
GOAL = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in ((N, *SHAPE), (N, K)))
GOAL_LR = 0.2


def initial_state():
    rng = torch.Generator().manual_seed(0)
    return State(torch.randn(N, *SHAPE, generator=rng), torch.randn(N, K, generator=rng), torch.tensor(0.05))


class Quadratic(Objective):
    """L = scale_it / 2 * squared distance from a goal. ``change(it, gradients)`` may return other gradients, or act."""

    def __init__(self, change=None):
        self.change = change
        self.iterations = []

    def gradients(self, it, images, labels, lr):
        self.iterations.append(it)
        scale = 1 + 0.5 * math.sin(it)
        d = images - GOAL[0], labels - GOAL[1], lr - GOAL_LR
        found = Gradients(scale / 2 * sum(part.square().sum() for part in d), *(scale * part for part in d))
        return (self.change and self.change(it, found)) or found


def broken(found, **values):
    """``found`` with one number of each named tensor replaced."""
    tensors = {name: getattr(found, name).clone() for name in ("loss", "images", "labels", "lr")}
    for name, value in values.items():
        tensors[name].view(-1)[-1] = value
    return Gradients(**tensors)


def closeness(current):
    """A score that rises as the set nears its goal."""
    return math.exp(-(current.images - GOAL[0]).square().mean().item())


def distiller(folder, objective, *, resume=False, accuracies=None, **changes):
    """A run in ``folder``. ``accuracies``: what evaluation finds, by iteration, in place of :func:`closeness`."""
    settings = dict(
        iterations=11,
        eval_it=4,
        skip_first_eva=False,
        save_it=5,
        checkpoint_every=3,
        threshold=math.inf,
        max_bad_iterations=3,
        rates=[0.3, 0.2, 0.1],
        momentum_y=0.9,
    )

    def wrap(images, labels, lr, iteration):
        metadata = {"class_names": ["cat", "dog"], "iteration": iteration}
        return SyntheticSet(images, labels, lr, torch.arange(K).repeat_interleave(IPC), metadata, preprocessing=MEANSTD)

    evaluated = []

    def evaluate(current):
        it = current.metadata["iteration"]
        evaluated.append((it, current.images, current.labels, current.lr))
        return {"ConvNet": (accuracies[it] if accuracies else closeness(current), 0.01, 5), "MLP": (0.9, 0.0, 1)}

    run = Run.start(Place(folder=folder, resume=resume), {"name": folder.name})
    state = initial_state()
    if changes.get("ema_decay"):
        state.average = state.images.clone()
    ours = Distiller(
        run=run,
        state=state,
        objective=objective,
        schedule=Schedule(**(settings | changes)),
        synthetic=wrap,
        evaluate=evaluate,
    )
    ours.evaluated = evaluated
    if resume:
        ours.resume()
    return ours


def same(state, other):
    tensors = zip((*state.variables, *state.momentum), (*other.variables, *other.momentum), strict=True)
    return all(torch.equal(a, b) for a, b in tensors)


# ------------------------------------------------------------------------------------------------------- updates


def test_updates_are_those_of_torchs_sgd_with_momentum(tmp_path):
    ours = distiller(tmp_path / "run", Quadratic(), iterations=24)
    final = ours.distill()

    reference = initial_state()
    variables = [variable.requires_grad_() for variable in reference.variables]
    groups = [
        {"params": [v], "lr": rate, "momentum": momentum}
        for v, rate, momentum in zip(variables, (0.3, 0.2, 0.1), (0.5, 0.9, 0.5))
    ]
    sgd = torch.optim.SGD(groups)
    for it in range(25):
        sgd.zero_grad()
        squares = [(v - goal).square().sum() for v, goal in zip(variables, (*GOAL, GOAL_LR))]
        loss = (1 + 0.5 * math.sin(it)) / 2 * sum(squares)
        loss.backward()
        sgd.step()
        assert events_in(tmp_path / "run", "match")[it]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for found, expected in zip((final.images, final.labels, final.lr), variables, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert ours.objective.iterations == list(range(25)), "iterations run from 0 to Iteration"
    last = events_in(tmp_path / "run", "match")[-1]
    assert last.pop("loss") > 0
    assert last == {"event": "match", "iteration": 24, "lr": final.lr.item(), "updated": True, "skipped": 0}


def test_the_learning_rate_stays_positive(tmp_path):
    final = distiller(tmp_path / "run", Quadratic(lambda it, found: broken(found, lr=5.0))).distill()
    assert final.lr.item() == pytest.approx(SMALLEST_LR) and final.lr > 0


@pytest.mark.parametrize(
    "name, value",
    [
        ("loss", 2.0),
        ("loss", math.nan),
        ("loss", math.inf),
        ("loss", -math.inf),
        ("images", math.nan),
        ("labels", -math.inf),
        ("lr", math.inf),
    ],
)
def test_an_iteration_over_the_threshold_or_not_finite_changes_nothing(tmp_path, name, value):
    """Iteration 2 is bad; the others' losses are below the threshold."""
    states = {}

    def change(it, found):
        states[it] = [tensor.clone() for tensor in (*ours.state.variables, *ours.state.momentum)]
        return broken(found, **({"loss": 0.5} | ({name: value} if it == 2 else {})))

    ours = distiller(tmp_path / "run", Quadratic(change), iterations=4, threshold=1.0)
    ours.distill()
    for it in range(4):
        moved = [not torch.equal(a, b) for a, b in zip(states[it], states[it + 1], strict=True)]
        assert moved == [it != 2] * 6, it
    metrics = events_in(tmp_path / "run", "match")
    assert [entry["updated"] for entry in metrics] == [True, True, False, True, True]
    assert [entry["skipped"] for entry in metrics] == [0, 0, 1, 1, 1] and ours.state.skipped == 1
    assert [entry.get("bad") for entry in metrics] == [None, None, None if value == 2.0 else True, None, None]
    loss = value if name == "loss" else 0.5
    assert metrics[2]["loss"] == (loss if math.isfinite(loss) else None)


def test_a_loss_equal_to_the_threshold_counts(tmp_path):
    ours = distiller(tmp_path / "run", Quadratic(lambda it, found: broken(found, loss=1.0)), threshold=1.0)
    ours.distill()
    assert ours.state.skipped == 0


def test_too_many_bad_iterations_in_a_row_stop_the_run_with_its_state_saved(tmp_path):
    bad = {1, 2, 4, 5, 6}  # three in a row at iteration 6

    def change(it, found):
        return broken(found, labels=math.nan) if it in bad else None

    ours = distiller(tmp_path / "run", Quadratic(change))
    with pytest.raises(Stopped, match="3 iterations in a row .*state is saved") as stop:
        ours.distill()
    assert stop.value.code == 1
    saved = State.load(ours.checkpoint, initial_state())
    assert same(saved, ours.state) and saved.iteration == 7 and saved.skipped == 5
    assert [entry["iteration"] for entry in events_in(tmp_path / "run", "match")] == list(range(7))

    again = distiller(tmp_path / "run", Quadratic(), resume=True)
    again.distill()
    assert again.objective.iterations == [7, 8, 9, 10, 11]


def test_losses_over_the_threshold_are_not_bad_iterations(tmp_path):
    ours = distiller(tmp_path / "run", Quadratic(), threshold=0.0)
    ours.distill()
    assert ours.state.skipped == 12 and same(ours.state, initial_state())


# ---------------------------------------------------------------------------------- several steps an iteration


class Stepped(Objective):
    """``count`` steps of an iteration, each towards the goal from where the set then is; loss 1, 2, 3, ..."""

    def __init__(self, count, change=None):
        self.count, self.change, self.seen = count, change, []

    def steps(self, it, images, labels, lr):
        for step in range(self.count):
            self.seen.append((it, step, images.clone()))
            found = Gradients(torch.tensor(1.0 + step), images - GOAL[0], labels - GOAL[1], lr - GOAL_LR)
            yield (self.change and self.change(it, step, found)) or found


def test_the_set_moves_between_the_steps_of_an_iteration(tmp_path):
    ours = distiller(tmp_path / "run", Stepped(3), iterations=2)
    final = ours.distill()
    assert [(it, step) for it, step, _ in ours.objective.seen] == [(it, step) for it in range(3) for step in range(3)]
    at, velocity = initial_state().images, torch.zeros_like(GOAL[0])
    for _, _, seen in ours.objective.seen:
        torch.testing.assert_close(seen, at)
        velocity = 0.5 * velocity + (at - GOAL[0])
        at = at - 0.3 * velocity
    torch.testing.assert_close(final.images, at)
    assert [(entry["loss"], entry["updated"]) for entry in events_in(tmp_path / "run", "match")] == [(2.0, True)] * 3


@pytest.mark.parametrize(
    "bad, recorded", [({"images": math.nan}, 1.5), ({"loss": math.inf}, None), ({"loss": 4.0}, 2.5)]
)
def test_a_bad_step_ends_its_iteration_and_changes_nothing(tmp_path, bad, recorded):
    def change(it, step, found):
        return broken(found, **bad) if (it, step) == (1, 1) else None

    ours = distiller(tmp_path / "run", Stepped(3, change), iterations=2, threshold=3.5)
    ours.distill()
    seen = {(it, step): x for it, step, x in ours.objective.seen}
    assert sorted(seen) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert not torch.equal(seen[1, 0], seen[1, 1]), "the step before it counts"
    assert torch.equal(seen[1, 1], seen[2, 0])
    metrics = events_in(tmp_path / "run", "match")
    assert [entry["loss"] for entry in metrics] == [2.0, recorded, 2.0]
    assert [entry["updated"] for entry in metrics] == [True, False, True] and ours.state.skipped == 1
    assert [entry.get("bad") for entry in metrics] == [None, None if bad == {"loss": 4.0} else True, None]


def test_iterations_that_end_in_a_bad_step_are_counted_once_each(tmp_path):
    ours = distiller(
        tmp_path / "run", Stepped(3, lambda it, step, found: broken(found, images=math.nan) if step else None)
    )
    with pytest.raises(Stopped, match="3 iterations in a row"):
        ours.distill()
    assert [(it, step) for it, step, _ in ours.objective.seen] == [(it, step) for it in range(3) for step in range(2)]


def test_the_layers_of_a_loss_are_recorded_as_means_over_the_steps_and_drawn(tmp_path):
    def change(it, step, found):
        whole = torch.tensor([1.0 + step, 1.0]) * (math.nan if (it, step) == (2, 1) else 1)
        return replace(found, layers={"body.0": whole / 4, "classifier": 3 * whole / 4})

    distiller(tmp_path / "run", Stepped(2, change), iterations=2, threshold=9).distill()
    first, _, third = events_in(tmp_path / "run", "match")
    assert first["loss"] == 1.5 and first["layers"] == {"body.0": [0.375, 0.25], "classifier": [1.125, 0.75]}
    assert third["layers"]["body.0"] == [None, None]
    with Image.open(tmp_path / "run" / "pictures" / "layers_000003.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    distiller(tmp_path / "other", Stepped(2), iterations=2).distill()
    assert "layers" not in events_in(tmp_path / "other", "match")[0]
    assert not list((tmp_path / "other" / "pictures").glob("layers*"))


def test_an_objective_that_gives_nothing_is_an_error():
    class Nothing(Objective):
        pass

    with pytest.raises(TypeError, match="Nothing defines neither"):
        next(Nothing().steps(0, *initial_state().variables))


# ------------------------------------------------------------------------------------------------------- AdamW


def test_the_images_learn_by_adamw_where_that_is_asked_for():
    """Beside torch's own, with iterations in between that change nothing; labels and lr learn by SGD as ever."""
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((4, 1, 3, 3), (4, 2), ())]
    start[2] = start[2].abs() + 1
    state, plain = (State(*(tensor.clone() for tensor in start)) for _ in range(2))
    state.squares = torch.zeros_like(start[0])
    theirs = start[0].clone().requires_grad_()
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.3)
    for it in range(8):
        gradients = [torch.randn(tensor.shape, generator=rng, dtype=torch.float64) for tensor in start]
        if it in (0, 3):
            state.skipped += 1
        else:
            state.step(gradients, [0.01, 0.2, 0.1], [0.5, 0.9, 0.5], adamw=0.3)
            plain.step(gradients, [0.01, 0.2, 0.1], [0.5, 0.9, 0.5])
            theirs.grad = gradients[0]
            adamw.step()
        state.iteration += 1
        torch.testing.assert_close(state.images, theirs.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(state.labels, plain.labels) and torch.equal(state.lr, plain.lr)
    assert not torch.equal(state.images, plain.images) and plain.squares is None


# ------------------------------------------------------------------------------------------- the moving average


def closed_form(path, decay):
    """The average of a path of images x_0, ..., x_k: decay^k x_0 + (1 - decay) sum_i decay^(k - i) x_i."""
    weights = [decay ** (len(path) - 1), *((1 - decay) * decay ** (len(path) - 1 - i) for i in range(1, len(path)))]
    assert sum(weights) == pytest.approx(1)
    return sum(weight * x.double() for weight, x in zip(weights, path, strict=True))


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_of_the_images_is_its_closed_form(decay):
    state = initial_state()
    state.average = state.images.clone()
    path = [state.images.clone()]
    for k in range(12):
        state.step([torch.sin(v + k) for v in state.variables], [0.3, 0.2, 0.1], [0.5, 0.9, 0.5], decay)
        path.append(state.images.clone())
        torch.testing.assert_close(state.average.double(), closed_form(path, decay), rtol=1e-5, atol=1e-6)
    plain = initial_state()
    for k in range(12):
        plain.step([torch.sin(v + k) for v in plain.variables], [0.3, 0.2, 0.1], [0.5, 0.9, 0.5])
    assert same(state, plain) and plain.average is None, "the images themselves do not follow it"


def test_the_average_is_what_is_scored_and_saved(tmp_path):
    folder, averages = tmp_path / "run", {}

    def change(it, found):
        averages[it] = ours.state.average.clone()

    ours = distiller(folder, Quadratic(change), ema_decay=0.9)
    final = ours.distill()
    averages[12] = ours.state.average
    assert torch.equal(final.images, averages[12]) and not torch.equal(final.images, ours.state.images)
    assert [it for it, *_ in ours.evaluated] == [0, 4, 8, 12]
    assert all(torch.equal(images, averages[it]) for it, images, *_ in ours.evaluated)
    for tag, it in ((0, 0), (5, 5), (10, 10), ("last", 12)):
        assert torch.equal(load_pt(folder / "Normal" / f"images_{tag}.pt"), averages[it])
    best = SyntheticSet.load(folder / "Normal" / "synthetic_best.safetensors")
    assert torch.equal(best.images, averages[best.metadata["iteration"]])


def test_an_iteration_that_is_skipped_does_not_move_the_average(tmp_path):
    averages = {}

    def change(it, found):
        averages[it] = ours.state.average.clone()
        return broken(found, loss=2.0 if it == 2 else math.nan if it == 4 else 0.5)

    ours = distiller(tmp_path / "run", Quadratic(change), iterations=6, threshold=1.0, ema_decay=0.5)
    ours.distill()
    assert [torch.equal(averages[it], averages[it + 1]) for it in range(6)] == [it in (2, 4) for it in range(6)]


def test_the_average_moves_with_every_step(tmp_path):
    ours = distiller(tmp_path / "run", Stepped(3), iterations=1, ema_decay=0.5)
    ours.distill()
    path = [x for *_, x in ours.objective.seen] + [ours.state.images]
    torch.testing.assert_close(ours.state.average.double(), closed_form(path, 0.5), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_keeps_the_average(tmp_path):
    path, state, averaged = tmp_path / "checkpoint.safetensors", initial_state(), initial_state()
    state.average = 2 * state.images
    averaged.average = torch.zeros_like(state.images)
    state.save(path)
    loaded = State.load(path, averaged)
    assert same(loaded, state) and torch.equal(loaded.average, state.average)
    initial_state().save(path)
    with pytest.raises(InputError, match="average in the checkpoint"):
        State.load(path, averaged)
    assert State.load(path, initial_state()).average is None


@pytest.mark.parametrize("at", [1, 5, 8])
def test_a_run_with_an_average_goes_on_from_it_bit_for_bit(tmp_path, at):
    def kill(it, found):
        if it == at:
            raise Killed
        return rough(it, found)

    settings = dict(threshold=1.0, ema_decay=0.8)
    distiller(tmp_path / "whole" / "run", Quadratic(rough), **settings).distill()
    with pytest.raises(Killed):
        distiller(tmp_path / "run", Quadratic(kill), **settings).distill()
    distiller(tmp_path / "run", Quadratic(rough), resume=True, **settings).distill()
    assert files(tmp_path / "run") == files(tmp_path / "whole" / "run")


# ------------------------------------------------------------------------------------- evaluation and artifacts


@pytest.mark.parametrize("skip_first_eva, expected", [(False, [0, 4, 8, 12]), (True, [4, 8, 12])])
def test_evaluation_comes_before_the_update_of_its_iteration_and_after_the_last(tmp_path, skip_first_eva, expected):
    before = {}

    def change(it, found):
        before[it] = [tensor.clone() for tensor in ours.state.variables]

    ours = distiller(tmp_path / "run", Quadratic(change), skip_first_eva=skip_first_eva)
    ours.distill()
    before[12] = ours.state.variables
    assert [it for it, *_ in ours.evaluated] == expected
    for it, *tensors in ours.evaluated:
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[it], strict=True)), it

    found = events_in(tmp_path / "run", "evaluation")
    assert [(entry["iteration"], entry["network"]) for entry in found] == [
        (it, network) for it in expected for network in ("ConvNet", "MLP")
    ]
    assert {key: found[1][key] for key in ("accuracy", "std", "n")} == {"accuracy": 0.9, "std": 0.0, "n": 1}
    everything = [(e["iteration"], e["event"]) for e in events_in(tmp_path / "run")]
    assert everything == sorted(everything, key=lambda entry: entry[0])
    assert everything.index((4, "evaluation")) < everything.index((4, "match"))
    pictures = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert pictures == sorted(["before_after_000012.png", *(f"synthetic_{it:06d}.png" for it in expected)])


def test_the_best_the_last_and_every_so_manieth_set_are_saved(tmp_path):
    folder = tmp_path / "run"
    kept = {}

    def change(it, found):
        kept[it] = [tensor.clone() for tensor in ours.state.variables]

    ours = distiller(folder, Quadratic(change), accuracies={0: 0.3, 4: 0.5, 8: 0.5, 12: 0.4})
    final = ours.distill()
    kept["last"] = [final.images, final.labels, final.lr]
    kept["best"] = kept[4]  # the first of the two that are best
    tags = [0, 5, 10, "best", "last"]
    for tag in tags:
        loaded = SyntheticSet.load(folder / "Normal" / f"synthetic_{tag}.safetensors")
        assert loaded.metadata["iteration"] == {"best": 4, "last": 12}.get(tag, tag)
        for name, expected in zip(("images", "labels", "lr"), kept[tag], strict=True):
            assert torch.equal(getattr(loaded, name), expected), (tag, name)
            assert torch.equal(load_pt(folder / "Normal" / f"{name}_{tag}.pt"), expected), (tag, name)
    published = {f"{name}_{tag}.pt" for tag in tags for name in ("images", "labels", "lr")}
    ours_too = {f"synthetic_{tag}.safetensors" for tag in tags}
    assert {path.name for path in (folder / "Normal").iterdir()} == published | ours_too
    assert ours.state.best == 0.5 and torch.equal(ours.state.images, final.images)


# --------------------------------------------------------------------------------------------------------- resuming


def rough(it, found):
    """Iterations over the threshold, and such without finite gradients, in between."""
    if it in (2, 7):
        return broken(found, images=math.nan)
    return broken(found, loss=99.0 if it == 9 else 0.5)


def files(folder):
    """Name -> bytes of all that does not depend on the clock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.jsonl"
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a") / "run"
    distiller(folder, Quadratic(rough), threshold=1.0).distill()
    return files(folder)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 1, 3, 5, 8, 11])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, uninterrupted, at):
    folder = tmp_path / "run"

    def kill(it, found):
        if it == at:
            raise Killed
        return rough(it, found)

    with pytest.raises(Killed):
        distiller(folder, Quadratic(kill), threshold=1.0).distill()
    assert run_state(folder) == "unfinished"
    ours = distiller(folder, Quadratic(rough), resume=True, threshold=1.0)
    assert ours.state.iteration == max(at // 3 * 3, at // 4 * 4)  # the last checkpoint before, or the last evaluation
    ours.distill()
    found = files(folder)
    assert found.keys() == uninterrupted.keys()
    assert [name for name in found if found[name] != uninterrupted[name]] == []
    assert {"metrics.jsonl", "checkpoint.safetensors", "Normal/images_best.pt"} <= found.keys()
    assert "pictures/before_after_000012.png" in found


def passing(clock, change):
    """A second passes in every iteration."""

    def later(it, found):
        clock.now += 1
        return change(it, found)

    return later


@pytest.mark.parametrize("seconds, per_call", [(0.5, 1), (2, 2), (2.5, 3), (4, 4), (12, 12)])
def test_a_run_out_of_time_stops_between_iterations_and_goes_on(tmp_path, uninterrupted, seconds, per_call):
    """In as many calls as it takes, of one iteration at least; the files are those of one call."""
    folder, clock, done = tmp_path / "run", Clock(), 0
    for call in range(13):
        ours = distiller(folder, Quadratic(passing(clock, rough)), resume=call > 0, threshold=1.0)
        ours.limit = TimeLimit(seconds, clock)
        last = ours.distill()
        assert ours.objective.iterations == list(range(done, min(done + per_call, 12)))
        done += per_call
        saved = State.load(ours.checkpoint, initial_state())
        assert same(saved, ours.state) and torch.equal(last.images, saved.images)
        written = SyntheticSet.load(ours.run.artifacts / "synthetic_last.safetensors")
        assert torch.equal(written.images, last.images) and written.metadata["iteration"] == saved.iteration
        if ours.is_finished:
            break
        assert saved.iteration == done and done not in [it for it, *_ in ours.evaluated], "it would take too long"
    assert done >= 12 and files(folder) == uninterrupted


def test_time_has_no_limit_unless_there_is_one():
    clock = Clock()
    without, limit = TimeLimit(clock=clock), TimeLimit(3, clock)
    clock.now += 2
    assert (limit.used, limit.left, limit.is_over) == (2, 1, False)
    clock.now += 1
    assert limit.is_over and not without.is_over
    assert without.left == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("others", [0.5, 100])
def test_ranks_run_out_of_time_together(tmp_path, others):
    """By the main rank's clock."""

    def work(ranks):
        clock = Clock()
        ours = distiller(tmp_path / f"{others} {ranks.rank}", Quadratic(passing(clock, rough)), threshold=1.0)
        ours.ranks, ours.limit = ranks, TimeLimit(others if ranks.rank else 2.5, clock)
        ours.distill()
        return ours.objective.iterations

    assert on_ranks(2, work) == [[0, 1, 2]] * 2


def test_a_run_killed_in_its_last_evaluation_goes_on_there(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    ours = distiller(folder, Quadratic(rough), threshold=1.0)
    evaluate = ours.evaluate

    def killing(current):
        if current.metadata["iteration"] == 12:
            raise Killed
        return evaluate(current)

    ours.evaluate = killing
    with pytest.raises(Killed):
        ours.distill()
    again = distiller(folder, Quadratic(rough), resume=True, threshold=1.0)
    again.distill()
    assert again.objective.iterations == [] and files(folder) == uninterrupted


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_iteration_and_it_can_be_resumed(tmp_path, uninterrupted, number, code):
    folder = tmp_path / "run"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(it, found):
        if it == 4:
            os.kill(os.getpid(), number)
        return rough(it, found)

    ours = distiller(folder, Quadratic(interrupt), threshold=1.0)
    with pytest.raises(Stopped, match="stopped after iteration 4; the state is saved") as stop:
        ours.distill()
    assert stop.value.code == code
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert ours.objective.iterations == [0, 1, 2, 3, 4]
    saved = State.load(ours.checkpoint, initial_state())
    assert saved.iteration == 5 and same(saved, ours.state)
    distiller(folder, Quadratic(rough), resume=True, threshold=1.0).distill()
    assert files(folder) == uninterrupted


@pytest.mark.parametrize("at", [0, 4, 12])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_an_evaluation_ends_it_with_the_state_saved_before_it(tmp_path, uninterrupted, at, number, code):
    folder = tmp_path / "run"
    ours = distiller(folder, Quadratic(rough), threshold=1.0)
    evaluate, handlers = ours.evaluate, [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(current):
        if current.metadata["iteration"] == at:
            os.kill(os.getpid(), number)
            pytest.fail("went on")
        return evaluate(current)

    ours.evaluate = interrupted
    with pytest.raises(Stopped, match=f"stopped in the evaluation before iteration {at}; the state is saved") as stop:
        ours.distill()
    assert stop.value.code == code
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    again = distiller(folder, Quadratic(rough), resume=True, threshold=1.0)
    again.distill()
    assert again.objective.iterations == list(range(at, 12)) and files(folder) == uninterrupted


def test_a_signal_between_iteration_and_evaluation_is_not_lost(tmp_path, monkeypatch):
    save = State.save

    def interrupted(self, path, **more):
        save(self, path, **more)
        if self.iteration == 12:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(State, "save", interrupted)
    with pytest.raises(Stopped, match="in the evaluation before iteration 12"):
        distiller(tmp_path / "run", Quadratic()).distill()


def test_a_second_signal_stops_at_once(tmp_path):
    def interrupt(it, found):
        if it == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("went on")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        distiller(tmp_path / "run", Quadratic(interrupt)).distill()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_may_be_resumed_to_run_longer(tmp_path):
    distiller(tmp_path / "long", Quadratic(), iterations=11).distill()
    short = distiller(tmp_path / "run", Quadratic(), iterations=5)
    short.distill()
    again = distiller(tmp_path / "run", Quadratic(), resume=True, iterations=11)
    again.distill()
    assert again.objective.iterations == [6, 7, 8, 9, 10, 11]
    name = "Normal/synthetic_last.safetensors"
    assert files(tmp_path / "run")[name] == files(tmp_path / "long")[name]


def test_a_checkpoint_comes_back_whole_and_another_file_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    state = initial_state()
    state.step([torch.full_like(v, 0.1) for v in state.variables], [0.3, 0.2, 0.1], [0.5, 0.9, 0.5])
    state.iteration, state.best, state.skipped, state.bad_in_a_row = 17, 0.1 + 0.2, 4, 2
    state.save(path)
    loaded = State.load(path, initial_state())
    assert same(loaded, state)
    assert (loaded.iteration, loaded.best, loaded.skipped, loaded.bad_in_a_row) == (17, 0.1 + 0.2, 4, 2)

    larger = initial_state()
    larger.images = torch.zeros(2 * N, *SHAPE)
    with pytest.raises(InputError, match=r"checkpoint.safetensors: images .*\[8, 3, 4, 4\]"):
        State.load(path, larger)
    tensors, metadata = load_tensors(path)
    del tensors["momentum_labels"]
    save_tensors(path, tensors, metadata)
    with pytest.raises(InputError, match="labels"):
        State.load(path, initial_state())
    save_tensors(path, tensors, {"kind": "synthetic set", "format": 1})
    with pytest.raises(InputError, match="checkpoint.safetensors is not a checkpoint"):
        State.load(path, initial_state())


def test_a_checkpoint_of_other_arithmetic_is_used_with_one_line_said(tmp_path, caplog, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    initial_state().save(path)
    with caplog.at_level(logging.WARNING, logger="pad"):
        State.load(path, initial_state())
        assert not caplog.records
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        assert same(State.load(path, initial_state()), initial_state())
    assert len(caplog.records) == 1 and "77" in caplog.text and str(path) in caplog.text


def test_a_checkpoint_of_another_run_is_refused_with_the_first_difference_named(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    identity = {"model": "ConvNet", "data": {"dataset": "CIFAR10", "size": [32, 32]}, "settings": {"ipc": 1}}
    initial_state().save(path, identity=identity)
    assert same(State.load(path, initial_state(), processes=1, identity=identity | {"newer": 1}), initial_state())
    for change, words in (
        ({"model": "ConvNetD4"}, "model: ConvNet in the checkpoint, ConvNetD4 in the config"),
        ({"data": {"dataset": "CIFAR10", "size": [64, 64]}}, r"data size: \[32, 32\] in the checkpoint, \[64, 64\] in"),
        ({"settings": {}, "model": "ConvNet"}, "settings ipc: 1 in the checkpoint, nothing in the config"),
    ):
        with pytest.raises(InputError, match=f"checkpoint.safetensors: {words}"):
            State.load(path, initial_state(), processes=1, identity=identity | change)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"iteration": -1},
        {"iteration": "3"},
        {"iteration": 2.0},
        {"best": None},
        {"skipped": None},
        {"arithmetic": 3},
        {"identity": []},
    ],
    ids=str,
)
def test_a_checkpoint_that_says_something_else_than_a_checkpoint_is_refused(tmp_path, change):
    path = tmp_path / "checkpoint.safetensors"
    initial_state().save(path)
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, metadata | change)
    with pytest.raises(InputError, match="checkpoint.safetensors (is damaged|has format 2)"):
        State.load(path, initial_state())


def test_tf32_is_part_of_the_arithmetic_and_off_where_a_checkpoint_does_not_say(tmp_path, caplog):
    path = tmp_path / "checkpoint.safetensors"
    initial_state().save(path)
    tensors, metadata = load_tensors(path)
    assert metadata["arithmetic"].pop("tf32") is False
    save_tensors(path, tensors, metadata)
    with caplog.at_level(logging.WARNING, logger="pad"):
        State.load(path, initial_state())
        assert not caplog.records
        save_tensors(path, tensors, metadata | {"arithmetic": metadata["arithmetic"] | {"tf32": True}})
        State.load(path, initial_state())
    assert "'tf32': True" in caplog.text


# ------------------------------------------------------------------------------------------- what was not learned


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_run_that_learns_says_nothing(tmp_path, caplog):
    distiller(tmp_path / "run", Quadratic()).distill()
    assert warnings_of(caplog) == []


def test_iterations_that_changed_nothing_are_counted_at_the_end(tmp_path, caplog):
    distiller(tmp_path / "run", Quadratic(), threshold=1e-9, skip_first_eva=True).distill()
    (said,) = warnings_of(caplog)
    assert said.startswith("12 of 12 iterations changed nothing") and "threshold: 1e-09" in said


def test_without_a_threshold_none_is_named(tmp_path, caplog):
    bad = Quadratic(lambda it, found: broken(found, loss=math.nan) if it % 2 else found)
    distiller(tmp_path / "run", bad, accuracies={it: it / 100 for it in range(20)}).distill()
    (said,) = warnings_of(caplog)
    assert said == "6 of 12 iterations changed nothing, their loss was not finite"


def test_a_learning_rate_at_its_floor_is_said(tmp_path, caplog):
    steep = Quadratic(lambda it, found: broken(found, lr=1.0))
    ours = distiller(tmp_path / "run", steep)
    ours.distill()
    (said,) = warnings_of(caplog)
    assert ours.state.lr == torch.tensor(SMALLEST_LR) and "floor, 1e-06" in said and "lr_lr" in said


@pytest.mark.parametrize("last, said", [(0.5, 1), (0.4, 1), (0.51, 0)])
def test_a_set_no_better_than_the_first_is_said(tmp_path, caplog, last, said):
    """Also when the first was scored before the run was interrupted."""
    accuracies = {0: 0.5, 4: 0.7, 8: 0.3, 12: last}
    stopping = Quadratic(lambda it, found: os.kill(os.getpid(), signal.SIGINT) if it == 6 else None)
    with pytest.raises(Stopped):
        distiller(tmp_path / "run", stopping, accuracies=accuracies).distill()
    caplog.clear()
    distiller(tmp_path / "run", Quadratic(), resume=True, accuracies=accuracies).distill()
    assert len(warnings_of(caplog)) == said
    if said:
        assert f"50.00 % then, {100 * last:.2f} % now" in caplog.text
