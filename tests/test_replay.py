"""Captured steps are the steps: by an emulation of CUDA graphs on the CPU, and on CUDA where there is one.

The emulation records the operations of the work and the very tensors they used. A replay does the operations again on
these tensors, as a graph does: what the host computed stays as it was, what lies elsewhere by now is not seen, and
memory of the graph holds nothing until it is written.
"""

import contextlib
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pad import protocols
from pad.data.augment import DC, DSA, NoAugmentation
from pad.data.placement import HostImages
from pad.data.preprocessing import MeanStd
from pad.experts.gsam import GSAM
from pad.experts.trainer import ExpertTraining
from pad.matching.loss import matching_loss
from pad.matching.unroll import inner_steps, unrolled_gradients
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.nn.replay import AT_ONCE, Captured, replay_on
from pad.protocols import Protocol
from pad.rng import generator

K, SIZE = 3, (8, 8)


def poison(tensor):
    """Numbers that show wherever they are read."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(1 if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max // 2)


def places(*values):
    return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, torch.Tensor)}


class Recorder(TorchDispatchMode):
    """Notes operations, and undoes what they do to memory that was there before."""

    def __init__(self):
        super().__init__()
        self.operations, self.own, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        named = [*zip(function._schema.arguments, args)]
        named += [
            (argument, kwargs[argument.name]) for argument in function._schema.arguments if argument.name in kwargs
        ]
        changed = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
        for tensor in tree_leaves(changed):
            if not places(tensor) <= self.own and id(tensor) not in self.before:
                self.before[id(tensor)] = tensor, tensor.clone()
        out = function(*args, **kwargs)
        views = places(args, kwargs)
        fresh = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not places(t) <= views]
        self.own |= places(fresh)
        if changed or fresh:
            self.operations.append((function, args, kwargs, None if changed else out))
        self.kept = [*getattr(self, "kept", []), out]  # no memory is used twice
        return out


class Emulated:
    """In place of pad.nn.replay.Graphs."""

    def __init__(self):
        self.captures = self.replays = 0

    warming = contextlib.nullcontext

    def capture(self, work):
        self.captures += 1
        with Recorder() as recorder:
            work()
        with torch.no_grad():
            for tensor, before in recorder.before.values():
                tensor.copy_(before)

        @torch.no_grad()
        def replay():
            self.replays += 1
            results = [t for *_, out in recorder.operations for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            for tensor in results:
                poison(tensor)
            for function, args, kwargs, out in recorder.operations:
                if "empty" in str(function):
                    continue
                again = function(*args, **kwargs)
                if out is not None:
                    for then, now in zip(tree_leaves(out), tree_leaves(again), strict=True):
                        if isinstance(then, torch.Tensor):
                            then.copy_(now)

        return replay


class EmulatedReplay(Captured):
    """On the CPU; a new buffer holds nothing."""

    def __init__(self, graphs=None):
        super().__init__(torch.device("cpu"), graphs or Emulated())

    def buffer(self, name, like, *shape):
        count = len(self._buffers)
        found = super().buffer(name, like, *shape)
        if len(self._buffers) > count:
            poison(found)
        return found


# ---- the emulation sees what a graph would do


def test_the_emulation_replays_what_was_captured_and_nothing_else():
    x, y, seen = torch.zeros(3), torch.zeros(3), []

    def work():
        seen.append(len(seen))
        y.copy_((x + 1).exp() * len(seen))

    replay = Emulated().capture(work)
    assert torch.equal(y, torch.zeros(3)) and seen == [0], "capturing does nothing"
    x.fill_(2)
    replay()
    assert torch.equal(y, torch.full((3,), 3.0).exp()) and seen == [0], "tensors move, the host's numbers do not"


def test_the_emulation_shows_memory_that_is_read_before_it_is_written():
    out = torch.zeros(2)
    Emulated().capture(lambda: out.copy_(torch.empty(2)))()
    assert out.isnan().all()
    replay = EmulatedReplay()
    replay.run(("read",), lambda: out.copy_(replay.buffer("new", out)))
    assert out.isnan().all()


def test_what_waits_for_the_device_cannot_be_captured():
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="capturing"):
        Emulated().capture(lambda: x.mul_(x.sum().item()))


# ---- the runner


def test_work_is_done_once_for_each_call():
    graphs = Emulated()
    replay = EmulatedReplay(graphs)
    total, at = torch.zeros(4), replay.row("at")
    at.start(0)

    def work():
        at.put(total, at.of(total) + 1)
        at.move(1)

    for _ in range(4):
        replay.run(("one more",), work)
    assert total.tolist() == [1, 1, 1, 1] and (graphs.captures, graphs.replays) == (1, 3)


def test_what_has_moved_is_seen():
    graphs = Emulated()
    replay, out = EmulatedReplay(graphs), torch.zeros(())
    for value in (1, 1, 1, 5, 5, 5):
        read = torch.full((), float(value)) if value != out else read  # noqa: F821
        replay.run(("copy",), lambda read=read: out.copy_(read), reads=(read,))
        assert out == value
    assert graphs.captures == 2


def test_of_numbers_that_are_given_the_last_are_kept():
    graphs = Emulated()
    replay, out = EmulatedReplay(graphs), torch.zeros(())
    for value in (1, 1, 1, 5, 5, 5):
        replay.run(("set",), lambda value=value: out.fill_(value), given=value)
        assert out == value
    assert graphs.captures == 2 and len(replay._captured) == 1


def test_other_work_has_another_graph():
    graphs = Emulated()
    replay, out = EmulatedReplay(graphs), torch.zeros(5)
    for n in (2, 3, 2, 3, 2, 3):
        replay.run(("first", n), lambda n=n: out[:n].add_(1))
    assert out.tolist() == [6, 6, 3, 0, 0] and graphs.captures == 2


def test_work_that_cannot_be_captured_is_done_as_it_comes_and_said_once(caplog):
    graphs = Emulated()
    replay, x = EmulatedReplay(graphs), torch.ones(2)
    for _ in range(3):
        replay.run(("waits",), lambda: x.add_(x[0].item()))
        replay.run(("others",), lambda: x.mul_(2))
    assert x.tolist() == [64, 64] and graphs.captures == 1 and graphs.replays == 0
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("steps are launched kernel by kernel: ")


def test_an_error_of_the_work_is_the_works(caplog):
    replay = EmulatedReplay()

    def work():
        raise ValueError("its own")

    for _ in range(2):
        with pytest.raises(ValueError, match="its own"):
            replay.run(("bad",), work)


def test_without_cuda_work_is_done_at_once():
    assert replay_on(torch.device("cpu")) is AT_ONCE


# ---- the three loops

AUGMENTATIONS = [NoAugmentation(), *map(DSA, "color crop cutout flip scale rotate".split()), DSA(), DSA(siamese=True)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def captured(device):
    return EmulatedReplay() if device == "cpu" else replay_on(torch.device(device))


def randn(seed, *shape, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def model_of(name="ConvNetD2W8", compile="off"):
    module = build(name, 3, K, SIZE, 0)
    model = FlatModel(module, compile)
    return model, model.flatten(module)


def same(device, ours, theirs):
    if device == "cpu":
        assert torch.equal(ours, theirs)
    else:  # sums that are atomic there
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def iterations(replay, device, n, batch, augmentation, *, name="ConvNetD2W8", truncated=False, fail=None, masks=(0, 0)):
    """Gradients of some outer iterations, after each of which the set moves in place."""
    model, theta = model_of(name)
    images, labels = randn(1, n, 3, *SIZE, device=device), randn(2, n, K, device=device)
    lr, found = torch.tensor(0.05, device=device), []
    for it in range(4):
        start = theta.to(device) + 0.01 * randn(3 + it, len(theta), device=device)
        target = start + 0.05 * randn(9 + it, len(theta), device=device)

        def objective(end, it=it, start=start, target=target):
            if it == fail:
                raise ArithmeticError
            return matching_loss(end, start, target, *masks)

        steps = inner_steps(n, batch, 5, augmentation, generator(0, "steps", it))
        with contextlib.suppress(ArithmeticError):
            gradients = unrolled_gradients(
                model, start, images, labels, lr, steps, objective=objective, truncated=truncated, replay=replay
            )
            found.append(gradients)
            images.sub_(gradients.images), labels.sub_(gradients.labels), lr.sub_(0.01 * gradients.lr)
    return [tensor for each in found for tensor in (each.loss, each.images, each.labels, each.lr)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [4, 7], ids=["ragged", "whole"])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda a: "-".join(getattr(a, "kinds", ["none"])))
def test_matching(device, augmentation, batch):
    plain = iterations(AT_ONCE, device, 7, batch, augmentation)
    replay = captured(device)
    for ours, theirs in zip(iterations(replay, device, 7, batch, augmentation), plain, strict=True):
        same(device, ours, theirs)
    if device == "cpu":
        assert replay._graphs.replays > replay._graphs.captures > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "how",
    [{"truncated": True}, {"masks": (0.4, 0.0)}, {"masks": (0.4, 0.3)}, {"fail": 2}, {"name": "ConvNetD2W8BN"}],
    ids=str,
)
def test_matching_in_other_ways(device, how):
    plain = iterations(AT_ONCE, device, 6, 4, DSA(), **how)
    for ours, theirs in zip(iterations(captured(device), device, 6, 4, DSA(), **how), plain, strict=True):
        same(device, ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_two_sets_in_turn(device):
    """Of two sizes, by one runner: each has its own graphs and memory."""
    plain = [iterations(AT_ONCE, device, n, 4, DSA()) for n in (6, 9, 6)]
    replay = captured(device)
    for expected, n in zip(plain, (6, 9, 6), strict=True):
        for ours, theirs in zip(iterations(replay, device, n, 4, DSA()), expected, strict=True):
            same(device, ours, theirs)


def epochs_of(replay, device, *, augmentation, host=False, momentum=0.9, batch=5, sizes=(9, 10, 11, 12)):
    model, theta = model_of()
    preprocessing = MeanStd.of((0.5,) * 3, (0.3,) * 3, device)
    pixels = torch.randint(0, 256, (13, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = HostImages(pixels, preprocessing)
    task = ExpertTraining(
        model=model,
        images=images if host else images[:],
        labels=(torch.arange(13) % K).to(device),
        num_classes=K,
        epoch_indices=lambda epoch: torch.arange(sizes[epoch]),  # a curriculum that grows
        optimiser=GSAM(lr=0.05, momentum=momentum, l2=1e-3, rho=0.1, alpha=0.3),
        augmentation=augmentation,
        batch_size=batch,
        epochs=4,
        seed=0,
        replay=replay,
    )
    return [*task.train(0, theta), *task.train(1, theta)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("augmentation", [NoAugmentation(), DSA(), DC()])
def test_experts(device, augmentation, momentum, host):
    how = {"augmentation": augmentation, "momentum": momentum, "host": host}
    replay = captured(device)
    for ours, theirs in zip(epochs_of(replay, device, **how), epochs_of(AT_ONCE, device, **how), strict=True):
        same(device, ours, theirs)
    if device == "cpu":
        assert replay._graphs.replays > replay._graphs.captures > 0


@pytest.mark.parametrize("device", DEVICES)
def test_epochs_of_fewer_images_than_a_batch(device):
    """They have other memory than the rest of an epoch that is as large."""
    how = {"augmentation": DSA("color"), "sizes": (3, 3, 8, 8)}
    plain = epochs_of(AT_ONCE, device, **how)
    for ours, theirs in zip(epochs_of(captured(device), device, **how), plain, strict=True):
        same(device, ours, theirs)


def trained(replay, device, together, augmentation, *, count=6, batch=4, **how):
    protocol = Protocol(augmentation, epochs=6, batch_size=batch, compile="off", **how)
    model, _ = model_of()
    model.compile = "on"  # by flat parameters
    nets = [build("ConvNetD2W8", 3, K, SIZE, j).to(device) for j in range(together)]
    images = [randn(s, count, 3, *SIZE, device=device) for s in range(together)]
    sets = [(each, randn(s + 9, count, K, device=device).softmax(dim=1)) for s, each in enumerate(images)]
    rngs = [generator(0, "net", j) for j in range(together)]
    protocol.train(model, nets, sets, 0.05, rngs, replay=replay)
    return [torch.nn.utils.parameters_to_vector(net.parameters()).detach() for net in nets]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("augmentation", [NoAugmentation(), DSA(), DSA(siamese=True), DC()])
def test_evaluation_networks(device, together, augmentation):
    replay = captured(device)
    expected = trained(AT_ONCE, device, together, augmentation)
    for _ in range(2):  # the second time with other tensors of the same sizes
        for ours, theirs in zip(trained(replay, device, together, augmentation), expected, strict=True):
            same(device, ours, theirs)
    if device == "cpu":
        assert replay._graphs.replays > 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("held", [False, True])
def test_evaluation_networks_on_mixed_images_and_on_large_sets(device, together, held, monkeypatch):
    """Their batches are gathered as they come."""
    monkeypatch.setattr(protocols, "_HELD", 2**20 if held else 0)
    replay, how = captured(device), {"augmentation": DSA(), "cutmix": 0.5, "check_every": 2, "restart": False}
    expected = trained(AT_ONCE, device, together, **how)
    for ours, theirs in zip(trained(replay, device, together, **how), expected, strict=True):
        same(device, ours, theirs)
    if device == "cpu":
        assert replay._graphs.replays > 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("then", [(1, 8, 4), (2, 12, 4), (2, 12, 8)], ids=["fewer networks", "more images", "batches"])
def test_evaluation_networks_of_other_sizes_in_turn(device, then):
    """Some batches have the size of those before, in memory that has not."""
    replay = captured(device)
    for together, count, batch in ((2, 8, 4), then, (2, 8, 4)):
        how = {"together": together, "augmentation": DSA(), "count": count, "batch": batch}
        for ours, theirs in zip(trained(replay, device, **how), trained(AT_ONCE, device, **how), strict=True):
            same(device, ours, theirs)


@pytest.mark.cuda
@pytest.mark.parametrize("compile", ["off", "on"])
def test_on_cuda_an_iteration_is_captured_and_waits_for_nothing(compile, caplog):
    model, theta = model_of(compile=compile)
    images, labels = randn(1, 6, 3, *SIZE, device="cuda"), randn(2, 6, K, device="cuda")
    lr, start = torch.tensor(0.05, device="cuda"), theta.cuda()
    target, replay = start + 0.05 * randn(3, len(theta), device="cuda"), replay_on(torch.device("cuda"))
    with caplog.at_level(logging.WARNING, "pad"):
        for it in range(4):
            torch.cuda.set_sync_debug_mode("error" if it == 3 else "default")
            try:
                unrolled_gradients(
                    model,
                    start,
                    images,
                    labels,
                    lr,
                    inner_steps(6, 6, 3, DSA("crop"), generator(0, "steps", it)),
                    objective=lambda end: matching_loss(end, start, target),
                    replay=replay,
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert not caplog.records, "nothing fell back"
