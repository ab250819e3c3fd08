"""Every tensor is made on the device of its inputs (shown on the meta device), and CUDA gives what the CPU gives."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import slow
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pad import evaluation
from pad.allocator import HOW_THREADS_WAIT
from pad.commands import bench as workbench
from pad.commands.bench import use_tf32
from pad.commands.evaluate import EvaluationSettings
from pad.commands.record import BufferSettings
from pad.commands.trajectory import DistillSettings
from pad.config import parse
from pad.data.augment import _KINDS, DC, DSA, Draw, NoAugmentation, augment
from pad.data.placement import HostImages, full_precision, place, to_device
from pad.data.preprocessing import ZCA, MeanStd
from pad.difficulty import scores as scores_of
from pad.difficulty.evidence import collect_evidence
from pad.difficulty.methods import METHODS
from pad.difficulty.training import ScoringSettings, ScoringTraining
from pad.distributed import ALONE
from pad.experts.gsam import GSAM
from pad.experts.trainer import ExpertTraining
from pad.matching.loss import loss_by_layer, matching_loss
from pad.matching.trajectory import SegmentSampler, TrajectoryObjective, layers_of
from pad.matching.unroll import adjoint, inner_steps, unroll
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.rng import generator

NETWORK, CLASSES, SIZE, N = "ConvNetD1W8", 3, (8, 8), 24
EPOCH = torch.arange(N)
MOVING = ("aten._to_copy", "aten.copy_")  # what brings a tensor from one device to another
DRAWING = ("aten.rand", "aten.randn", "aten.randint", "aten.randperm")  # random numbers are drawn on the CPU


class OneDevice(TorchDispatchMode):
    """Raises when an operation mixes CPU tensors with meta ones, or makes one on the CPU that was not drawn there.

    Meta operations alone would let some pass, such as matrix products and indexing. Single numbers on the CPU may mix:
    they travel with an operation.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.replace("::", ".")
        devices = [
            {x.device.type for x in tree_leaves(part) if isinstance(x, torch.Tensor) and x.dim()}
            for part in ((args, kwargs), out)
        ]
        if name not in MOVING and len(devices[0]) > 1:
            raise AssertionError(f"{name} mixes {devices[0]}")
        if name not in DRAWING and "cpu" in devices[1] - devices[0]:
            raise AssertionError(f"{name} makes a tensor on the CPU")
        return out


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def network(seed=0):
    return build(NETWORK, 3, CLASSES, SIZE, seed)


@pytest.fixture(scope="module")
def model():
    return FlatModel(network())


def is_meta(*tensors):
    return all(tensor.device.type == "meta" for tensor in tensors)


# ------------------------------------------------------------------------------------------ no tensor elsewhere


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x @ torch.ones(8, 8),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x + torch.ones(8),
        lambda x: x * torch.arange(8).to("meta"),
    ],
)
def test_the_guard_notices_a_tensor_on_the_wrong_device(wrong):
    complaints = "mixes|makes a tensor|not on the expected device"
    with OneDevice(), pytest.raises((AssertionError, RuntimeError), match=complaints):
        wrong(meta(8, 8))


@pytest.mark.parametrize("siamese", [False, True])
@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_augmentation_and_its_gradient(kind, siamese):
    x = meta(5, 3, *SIZE).requires_grad_()
    u = torch.rand(1 if siamese else 5, 3)
    with OneDevice():
        y = augment(x, Draw(kind, u))
        (g,) = torch.autograd.grad(y, x, meta(5, 3, *SIZE))
    assert y.shape == g.shape == x.shape and is_meta(y, g)


@pytest.mark.parametrize("ratios", [slow((0.0, 0.0)), slow((0.3, 0.0)), (0.3, 0.2)])
@pytest.mark.parametrize("augmentation", [NoAugmentation(), DSA("crop"), DSA("rotate", siamese=True)])
def test_a_matching_iteration(model, augmentation, ratios):
    theta, target = meta(model.num_parameters), meta(model.num_parameters)
    images, labels, lr = meta(N, 3, *SIZE), meta(N, CLASSES), meta()
    with OneDevice():
        steps = inner_steps(N, 7, 4, augmentation, generator(0, "test"))
        path = unroll(model, theta, images, labels, lr, steps)
        loss, lam = matching_loss(path[-1], theta, target, *ratios, match_to=0.9)
        layers = loss_by_layer(path[-1], theta, target, list(layers_of(model).values()), *ratios, match_to=0.9)
        gradients = adjoint(model, path, images, labels, lr, steps, lam=lam)
    assert [g.shape for g in gradients] == [images.shape, labels.shape, lr.shape]
    assert is_meta(path, loss, lam, layers, *gradients) and path.shape == (5, model.num_parameters)


def test_the_two_derivatives(model):
    theta, lam, x, p = meta(model.num_parameters), meta(model.num_parameters), meta(5, 3, *SIZE), meta(5, CLASSES)
    with OneDevice():
        results = model.grad(theta, x, p), *model.hvp(theta, x, p, lam)
    assert [r.shape for r in results] == [theta.shape, (), theta.shape, x.shape, p.shape] and is_meta(*results)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_of_gsam(adaptive):
    w = meta(11)
    with OneDevice():
        optimiser = GSAM(0.1, momentum=0.5, l2=1e-3, rho=0.5, alpha=0.4, adaptive=adaptive)
        for _ in range(2):
            w, buffer = optimiser.step(w, None, lambda at: 2 * at)
    assert is_meta(w, buffer)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("augmentation", [DSA(), DC()])
def test_training_an_expert(model, augmentation, on_host):
    images = HostImages(torch.zeros(N, 3, *SIZE, dtype=torch.uint8), mean_std("meta")) if on_host else meta(N, 3, *SIZE)
    task = ExpertTraining(
        model=model,
        images=images,
        labels=meta(N, dtype=torch.int64),
        num_classes=CLASSES,
        epoch_indices=lambda epoch: EPOCH,
        optimiser=GSAM(0.1, momentum=0.5, rho=0.5, alpha=0.4),
        augmentation=augmentation,
        batch_size=7,
        epochs=2,
        seed=0,
    )
    start = model.flatten(network())
    with OneDevice():
        trajectory = list(task.train(0, start))
    assert len(trajectory) == 3 and is_meta(*trajectory)


def mean_std(device):
    return MeanStd.of((0.5,) * 3, (0.2,) * 3, device)


def zca(device):
    dimensions = 3 * 8 * 8
    whiten = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(3))
    tensors = {"mean": torch.zeros(dimensions), "unwhiten": whiten, "whiten": whiten}
    identity = {"kind": "zca", "shape": [3, *SIZE], "digest": "none"}
    return ZCA(identity, {name: t.to(device) for name, t in tensors.items()})


@pytest.mark.parametrize("make", [mean_std, zca])
def test_preprocessing(make):
    preprocessing = make("meta")
    on_host = HostImages(torch.zeros(N, 3, *SIZE, dtype=torch.uint8), preprocessing)
    with OneDevice():
        x = preprocessing.apply(meta(5, 3, *SIZE, dtype=torch.uint8))
        pixels = preprocessing.invert(x)
        batch = on_host[EPOCH[:7]]
    assert is_meta(x, pixels, batch) and batch.shape == (7, 3, *SIZE)


@pytest.mark.parametrize("name, count", [(NETWORK, 1), (NETWORK, 2), ("ConvNetD1W8BN", 2)])
def test_training_evaluation_networks(name, count):
    protocol = evaluation.Protocol(DSA(), epochs=2, batch_size=7, together=count)
    nets = [build(name, 3, CLASSES, SIZE, j).to("meta") for j in range(count)]
    sets = [(meta(N, 3, *SIZE), meta(N, CLASSES))] * count
    structure = FlatModel(build(name, 3, CLASSES, SIZE, 0))
    with OneDevice():
        protocol.train(structure, nets, sets, 0.01, [generator(0, "test", j) for j in range(count)])
    assert all(is_meta(*net.parameters(), *net.buffers()) for net in nets)


def test_training_and_asking_a_scoring_network():
    images, labels = meta(N, 3, *SIZE), meta(N, dtype=torch.int64)
    scoring = ScoringSettings(NETWORK, epochs=1, batch=7, augmentation="crop_flip")
    observers = [method.compute(labels) for method in METHODS.values() if method.needs == "training"]
    trained = ScoringTraining(images, labels, CLASSES, scoring, 0).train(0, observers=observers)
    assert is_meta(*trained.parameters())
    of_evidence = [method for method in METHODS.values() if (method.kind, method.needs) == ("score", "evidence")]
    assert of_evidence
    with OneDevice():
        evidence = collect_evidence(trained, images, labels, batch=7)
        scores = [method.compute(evidence) for method in of_evidence]
        step = scores_of._to_boundary(trained, images, labels)  # how many more there are hangs on the numbers
        assert is_meta(evidence.features, evidence.logits, evidence.errors, *scores, step)
    assert observers and is_meta(*(observer.scores(1) for observer in observers))


def test_logits(model):
    with OneDevice():
        logits = model.logits(meta(model.num_parameters), meta(N, 3, *SIZE), batch=7)
    assert is_meta(logits) and logits.shape == (N, CLASSES)


# ------------------------------------------------------------------------------------------ settings and the cache


@pytest.fixture()
def precision():
    """The process's switches for TF32, put back afterwards."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    yield switches
    for switch, value in zip(switches, before):
        switch.allow_tf32 = value


@pytest.mark.parametrize("settings", [BufferSettings, DistillSettings, EvaluationSettings])
def test_tf32_is_on_where_networks_run_on_cuda_and_is_noted_down(settings, monkeypatch):
    needed = {"synthetic": "set"} if settings is EvaluationSettings else {}
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        for asked, device, expected in (
            ({}, "auto", cuda),
            ({"tf32": "auto"}, "cuda", cuda),
            ({"tf32": "auto"}, "cpu", False),
            ({"tf32": "off"}, "auto", False),
            ({"tf32": "on"}, "auto", True),
            ({"tf32": False}, "auto", False),  # as it was recorded when it was no more than this
        ):
            assert settings.resolve({**needed, **asked, "device": device}).as_dict()["tf32"] is expected


@pytest.mark.parametrize("words, wanted", [(["--tf32"], True), (["--tf32", "off"], False), (["--tf32=on"], True)])
def test_tf32_is_a_flag_that_needs_no_word(words, wanted):
    assert parse(DistillSettings, [*words, "--zca"], "PAD.py").tf32 is wanted


def test_full_precision_is_for_a_while(precision):
    for switch in precision:
        switch.allow_tf32 = True
    with pytest.raises(ArithmeticError), full_precision():
        assert not any(switch.allow_tf32 for switch in precision)
        raise ArithmeticError
    assert all(switch.allow_tf32 for switch in precision)


def test_rankings_do_not_heed_tf32(precision, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(workbench, "obtain_rankings", lambda *_, **__: seen.extend(s.allow_tf32 for s in precision))
    settings = BufferSettings.resolve({"dataset": "FashionMNISTMini", "model": NETWORK, "ranking_path": str(tmp_path)})
    bench = workbench.set_up(settings, ALONE)
    for switch in precision:
        switch.allow_tf32 = True
    bench.rankings(settings, ["GraNd"])
    assert seen == [False, False] and all(switch.allow_tf32 for switch in precision)


@pytest.mark.parametrize("wanted", [True, False])
def test_tf32_sets_matrix_products_and_convolutions_on_cuda(precision, wanted, caplog):
    for switch in precision:
        switch.allow_tf32 = not wanted
    use_tf32(wanted, torch.device("cuda", 0))
    assert [switch.allow_tf32 for switch in precision] == [wanted, wanted]
    assert not caplog.records


def test_tf32_on_a_cpu_changes_nothing_and_says_so(precision, caplog):
    before = [switch.allow_tf32 for switch in precision]
    with caplog.at_level("INFO", logger="pad"):
        use_tf32(True, torch.device("cpu"))
        use_tf32(False, torch.device("cpu"))
    assert [switch.allow_tf32 for switch in precision] == before
    assert [record.message for record in caplog.records] == ["tf32 does nothing on a CPU"]


def test_every_stage_sets_it_up(monkeypatch):
    asked = []
    monkeypatch.setattr(workbench, "use_tf32", lambda *arguments: asked.append(arguments))
    settings = DistillSettings(dataset="FashionMNISTMini", model=NETWORK, device="cpu", tf32=True, images_on="host")
    assert workbench.set_up(settings, ALONE).images_on == "host"
    assert asked == [(True, torch.device("cpu"))]


# ------------------------------------------------------------------------------------------ waiting threads


def what_openmp_was_told(*command, **environment):
    """How threads wait, as GNU's OpenMP says itself when torch loads it; of several processes the last."""
    kept = {name: value for name, value in os.environ.items() if name not in HOW_THREADS_WAIT}
    said = subprocess.run(
        [sys.executable, *command],
        env=kept | {"OMP_DISPLAY_ENV": "VERBOSE"} | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    if "GOMP_" not in said:
        pytest.skip("torch has another OpenMP here")
    return dict(re.findall(r"(OMP_WAIT_POLICY|GOMP_SPINCOUNT) = '(\w+)'", said))


TWO_RANKS = "-m torch.distributed.run --standalone --nproc_per_node=2".split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import pad, torch"],
        ["buffer/buffer_CL.py", "--help"],
        [*TWO_RANKS, "distill/PAD.py", "--help"],
        ["scripts/benchmarks/matching.py", "--help"],
    ],
    ids=["library", "command", "ranks", "benchmark"],
)
def test_threads_that_wait_sleep_before_long(command):
    assert what_openmp_was_told(*command) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}


@pytest.mark.slow
@pytest.mark.parametrize("name, value", [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_where_the_user_says_how_threads_wait_they_do(name, value):
    plain, ours = (what_openmp_was_told("-c", f"import {what}", **{name: value}) for what in ("torch", "pad, torch"))
    assert ours == plain and ours[name] == value


# ------------------------------------------------------------------------------------------ CUDA


@contextlib.contextmanager
def unsynchronised():
    """An operation that makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def matching_task(model, dtype, ratios=(0.3, 0.2)):
    """An objective over a trajectory of two epochs, and (images, labels, lr) to ask it about, on the CPU."""
    rng = torch.Generator().manual_seed(0)
    start = model.flatten(network())
    rows = torch.stack([start, start + 0.01 * torch.randn(len(start), generator=rng)])
    objective = TrajectoryObjective(
        model=model,
        store=SimpleNamespace(rows=lambda expert, epochs: rows[epochs]),
        sampler=SegmentSampler(
            experts=[0],
            expert_epochs=1,
            min_start_epoch=0,
            max_start_epoch=1,
            sequential=False,
            current_max_start_epoch=1,
            expansion_end_epoch=1,
            seed=0,
        ),
        augmentation=DSA(),
        syn_steps=6,
        batch_syn=7,
        depth=(ratios[0], 1.0),
        loss_ratio=ratios[1],
        seed=0,
    )
    images, labels = torch.randn(N, 3, *SIZE, generator=rng), torch.randn(N, CLASSES, generator=rng)
    return objective, [t.to(dtype) for t in (images, labels, torch.tensor(0.02))]


def test_the_objective_of_the_cuda_tests_gives_finite_gradients(model):
    objective, state = matching_task(model, torch.float64)
    g = objective.gradients(0, *state)
    assert all(t.isfinite().all() and t.abs().sum() > 0 for t in (g.loss, g.images, g.labels, g.lr))


def assert_close(on_cuda, on_cpu, tolerance):
    assert on_cuda.device.type == "cuda" and on_cuda.dtype == on_cpu.dtype
    assert (on_cuda.cpu() - on_cpu).norm() <= tolerance * on_cpu.norm()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_cuda_gradients_are_those_of_the_cpu(model, precision, dtype, tolerance):
    use_tf32(False, torch.device("cuda"))
    rng = torch.Generator().manual_seed(1)
    theta = model.flatten(network()).to(dtype)
    x, p = torch.randn(5, 3, *SIZE, dtype=dtype, generator=rng), torch.rand(5, CLASSES, dtype=dtype, generator=rng)
    lam = torch.randn(len(theta), dtype=dtype, generator=rng)
    there = [t.cuda() for t in (theta, x, p, lam)]
    assert_close(model.grad(*there[:3]), model.grad(theta, x, p), tolerance)
    for on_cuda, on_cpu in zip(model.hvp(*there), model.hvp(theta, x, p, lam), strict=True):
        assert_close(on_cuda, on_cpu, tolerance)
    objective, state = matching_task(model, dtype)
    on_cuda, on_cpu = (objective.gradients(0, *(t.to(device) for t in state)) for device in ("cuda", "cpu"))
    for name in ("loss", "images", "labels", "lr"):
        assert_close(getattr(on_cuda, name), getattr(on_cpu, name), tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_cuda_augmentation_is_that_of_the_cpu(kind):
    x = torch.rand(5, 3, *SIZE, dtype=torch.float64)
    draw = Draw(kind, torch.rand(5, 3))
    assert_close(augment(x.cuda(), draw), augment(x, draw), 1e-10)


@pytest.mark.cuda
def test_without_tf32_cuda_computes_in_float32(precision):
    a, b = torch.randn(256, 512), torch.randn(512, 256)
    exact = a.double() @ b.double()

    def error():
        return ((a.cuda() @ b.cuda()).cpu().double() - exact).norm() / exact.norm()

    use_tf32(False, torch.device("cuda"))
    assert error() < 1e-6
    use_tf32(True, torch.device("cuda"))
    if torch.cuda.get_device_capability() >= (8, 0):
        assert error() > 1e-5


@pytest.mark.cuda
def test_whitening_does_not_heed_tf32(precision):
    pixels = torch.randint(256, (300, 3, *SIZE), dtype=torch.uint8)
    found = []
    for wanted in (False, True):
        use_tf32(wanted, torch.device("cuda"))
        found.append(place(pixels, zca("cuda"), "device"))
        assert torch.backends.cuda.matmul.allow_tf32 is wanted
    assert torch.equal(*found)


@pytest.mark.cuda
def test_to_device_does_not_wait():
    x = torch.randn(1000)
    to_device(x, "cuda")
    with unsynchronised():
        there = to_device(x, "cuda")
    assert torch.equal(there.cpu(), x)


@pytest.mark.cuda
@pytest.mark.parametrize("make", ["meanstd", "zca"])
def test_batches_from_host_memory_are_whole_though_nothing_waits_for_them(make):
    pixels = torch.randint(256, (5000, 3, *SIZE), dtype=torch.uint8)
    preprocessing = mean_std("cuda") if make == "meanstd" else zca("cuda")
    on_device, on_host = (place(pixels, preprocessing, where) for where in ("device", "host"))
    order = [torch.randint(5000, (n,)) for n in (1, 256, 257, 1024, 3000, 100, 100, 100, 100, 100)]
    slow = torch.randn(4096, 4096, device="cuda")
    slow @ slow
    with unsynchronised():
        found = []
        for indices in order:
            slow @ slow  # the device lags behind the host, so that buffers are asked for while they are in flight
            found.append(on_host[indices])
    for indices, images in zip(order, found):
        assert torch.equal(images, on_device[indices.cuda()])


@pytest.mark.cuda
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("augmentation", [DSA(), DC()])
def test_the_host_never_waits_while_an_expert_trains(model, augmentation, on_host):
    pixels = torch.randint(256, (N, 3, *SIZE), dtype=torch.uint8)
    images = place(pixels, mean_std("cuda"), "host" if on_host else "device")
    task = ExpertTraining(
        model=model,
        images=images,
        labels=torch.randint(CLASSES, (N,)).cuda(),
        num_classes=CLASSES,
        epoch_indices=lambda epoch: EPOCH,
        optimiser=GSAM(0.01, momentum=0.5, l2=1e-3, rho=0.5, alpha=0.4),
        augmentation=augmentation,
        batch_size=3,
        epochs=4,
        seed=0,
    )
    start = model.flatten(network())
    before = list(task.train(0, start))  # handles and workspaces of libraries are made
    with unsynchronised():
        trajectory = list(task.train(0, start))
    assert_close(trajectory[-1], before[-1].cpu(), 1e-3)  # sums of CUDA may differ from one time to the next


@pytest.mark.cuda
def test_the_host_never_waits_in_a_matching_iteration(model):
    objective, state = matching_task(model, torch.float32)
    state = [t.cuda() for t in state]
    before = objective.gradients(0, *state)
    with unsynchronised():
        gradients = objective.gradients(0, *state)
    assert_close(gradients.images, before.images.cpu(), 1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("count", [1, 2])
def test_the_host_never_waits_while_evaluation_networks_train(count):
    protocol = evaluation.Protocol(DSA(), epochs=3, batch_size=7, together=count)
    nets = [build(NETWORK, 3, CLASSES, SIZE, j).cuda() for j in range(count)]
    sets = [(torch.randn(N, 3, *SIZE).cuda(), torch.rand(N, CLASSES).cuda())] * count

    def train():
        protocol.train(FlatModel(network()), nets, sets, 0.01, [generator(0, "test", j) for j in range(count)])

    train()
    with unsynchronised():
        train()
