"""Several ranks: what they tell each other, that matching shared by them is exact, what a rank that ends leaves behind.

Ranks are forked from the test process, which stands in for torchrun: it keeps their store.
"""

import dataclasses
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pad import evaluation
from pad.data.augment import DSA, NoAugmentation
from pad.data.preprocessing import MeanStd
from pad.difficulty.methods import score_images
from pad.difficulty.training import ScoringSettings, ScoringTraining
from pad.distributed import ALONE, PeerLost, join
from pad.errors import InputError
from pad.matching.loss import matching_loss
from pad.matching.trajectory import SegmentSampler, TrajectoryObjective
from pad.matching.unroll import inner_steps, unrolled_gradients
from pad.nn import networks
from pad.nn.flat import FlatModel
from pad.rng import generator

FORK = multiprocessing.get_context("fork")


def launch(size, work, *, timeout=60, attempts=3):
    """``work(ranks)`` on ``size`` ranks: what each returned, and the exit codes of the processes."""
    with tempfile.TemporaryDirectory() as folder:
        port = Path(folder, "port")

        def rank(number):
            Path(folder, f"{number} began").touch()
            faulthandler.dump_traceback_later(timeout - 5, file=sys.__stderr__)  # where it hangs
            wait_for(port.exists, timeout)
            os.environ.update(
                RANK=str(number),
                LOCAL_RANK=str(number),
                WORLD_SIZE=str(size),
                LOCAL_WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port.read_text(),
                TORCHELASTIC_USE_AGENT_STORE="True",
            )
            ranks = join()
            Path(folder, str(number)).write_bytes(pickle.dumps(work(ranks)))
            ranks.leave(0)

        def wait_for(condition, seconds):
            deadline = time.monotonic() + seconds
            while not condition() and time.monotonic() < deadline:
                time.sleep(0.02)

        processes = [FORK.Process(target=rank, args=(number,), daemon=True) for number in range(size)]
        for process in processes:
            process.start()
        wait_for(lambda: len(list(Path(folder).glob("* began"))) == size, 10)
        began = len(list(Path(folder).glob("* began"))) == size
        if began:
            # After the forks: it has threads, and a fork can inherit a lock of theirs that nobody will release.
            seconds = timedelta(seconds=timeout)
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=seconds)
            Path(folder, "port of the store").write_text(str(store.port))
            os.replace(Path(folder, "port of the store"), port)  # whole
            wait_for(lambda: all(process.exitcode is not None for process in processes), timeout)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        if not began and attempts > 1:  # forked while a thread of this process held a lock: such a child hangs for good
            return launch(size, work, timeout=timeout, attempts=attempts - 1)
        files = [Path(folder, str(number)) for number in range(size)]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files], codes


def on_ranks(size, work):
    """What ``work(ranks)`` returns on each of ``size`` ranks."""
    values, codes = launch(size, work)
    assert codes == [0] * size
    return values


# ------------------------------------------------------------------------------------------------ what they tell


def test_one_process_is_alone_and_asks_nobody():
    assert join() is ALONE
    assert (ALONE.rank, ALONE.size, ALONE.is_main) == (0, 1, True)
    x = torch.tensor([1.0, 2.0])
    ALONE.all_reduce_(x)
    assert x.tolist() == [1, 2]
    assert ALONE.gather("mine") == ["mine"] and ALONE.deal(range(3)) == range(3)
    assert ALONE.on_main(lambda: x) is x and ALONE.node_first(lambda: x) is x
    assert ALONE.place(torch.device("meta")) == torch.device("meta")
    ALONE.same(lambda: pytest.fail("nobody to compare with"), "nothing")
    ALONE.barrier()
    ALONE.leave(3)


@dataclasses.dataclass
class Found:
    name: str
    tensors: dict[str, torch.Tensor]
    preprocessing: MeanStd


def test_sums_shares_and_what_the_main_rank_found():
    def work(ranks):
        matrix = torch.full((2, 3), float(ranks.rank + 1))
        scalar, column = torch.tensor(10.0**ranks.rank), matrix.clone()[:, :1]
        ranks.all_reduce_(matrix)
        ranks.all_reduce_(scalar, column)
        lone = torch.arange(6.0).view(2, 3).T * (ranks.rank + 1)  # not contiguous
        ranks.all_reduce_(lone)
        found = ranks.on_main(
            lambda: Found(
                "zca",
                {"empty": torch.empty(0, 3), "ints": torch.arange(4), "view": torch.eye(3)[:, 1]},
                MeanStd.of((0.5,), (0.25,), "cpu"),
            )
        )
        nothing = ranks.on_main(lambda: None)
        return (
            matrix.tolist(),
            scalar.item(),
            column.tolist(),
            lone.tolist(),
            list(ranks.deal(range(7))),
            ranks.gather((ranks.rank, ranks.is_main)),
            found.name,
            [t.tolist() for t in found.tensors.values()],
            found.preprocessing.apply(torch.ones(1, 1, 1, 1)).item(),
            found.preprocessing.identity["kind"],
            nothing,
        )

    results = on_ranks(3, work)
    expected = (
        [[6.0] * 3] * 2,
        111.0,
        [[6.0]] * 2,
        (torch.arange(6.0).view(2, 3).T * 6).tolist(),
        None,
        [(0, True), (1, False), (2, False)],
        "zca",
        [[], [0, 1, 2, 3], [0.0, 1.0, 0.0]],
        2.0,
        "meanstd",
        None,
    )
    assert [result[:4] + (None,) + result[5:] for result in results] == [expected] * 3
    assert [result[4] for result in results] == [[0, 3, 6], [1, 4], [2, 5]]


def test_only_the_main_rank_works_and_one_of_each_machine_goes_first(tmp_path):
    def work(ranks):
        ranks.on_main(lambda: (tmp_path / f"main {ranks.rank}").touch())
        ranks.local_rank = ranks.rank % 2  # two machines of two
        seen = ranks.node_first(lambda: (sorted(path.name for path in tmp_path.glob("first*")), touch(ranks.rank))[0])
        return seen

    def touch(rank):
        (tmp_path / f"first {rank}").touch()

    seen = on_ranks(4, work)
    assert [path.name for path in tmp_path.glob("main*")] == ["main 0"]
    assert all({"first 0", "first 2"} <= set(seen[rank]) for rank in (1, 3))
    assert not any({"first 1", "first 3"} & set(seen[rank]) for rank in (0, 2))


def refusal(work):
    try:
        work()
    except InputError as error:
        return str(error)
    return None


def test_what_ranks_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def work(ranks):
        return (
            ranks.place(torch.device("cpu")).type,
            refusal(lambda: ranks.place(torch.device("cuda", 0))),
            refusal(lambda: ranks.place(torch.device("cuda" if ranks.rank else "cpu"))),
            refusal(lambda: ranks.same(lambda: ["digest", 3], "the images")),
            refusal(lambda: ranks.same(lambda: ["digest", ranks.rank], "the images")),
        )

    for device, many, mixed, same, different in on_ranks(2, work):
        assert device == "cpu" and same is None
        assert many.startswith("2 processes") and "1 CUDA device" in many and "--nproc_per_node=1" in many
        assert "--device cpu" in mixed
        assert (
            different == "the images are not the same for all processes of this run; give all machines the same files"
        )


# -------------------------------------------------------------------------------------------------- exactness

SHAPE, CLASSES = (3, 8, 8), 4


def flat_model(name):
    return FlatModel(networks.build(name, SHAPE[0], CLASSES, SHAPE[1:], 0))


def matching_gradients(model, augmentation, n, batch, depth_ratio, loss_ratio, ranks):
    rng = generator(0, "numbers", n)
    images, labels, start, target = (
        torch.randn(shape, generator=rng, dtype=torch.float64)
        for shape in ((n, *SHAPE), (n, CLASSES), (model.num_parameters,), (model.num_parameters,))
    )
    steps = inner_steps(n, batch, 3, augmentation, generator(0, "steps", n))
    start = 0.1 * start
    found = unrolled_gradients(
        model,
        start,
        images,
        labels,
        torch.tensor(0.05, dtype=torch.float64),
        steps,
        objective=lambda theta: matching_loss(theta, start, start + 0.01 * target, depth_ratio, loss_ratio),
        ranks=ranks,
    )
    return [found.loss, found.images, found.labels, found.lr]


CASES = [
    ("MLP", DSA(kind, siamese), 7, 5, 0.0, 0.0)  # steps of 2 and 5 images
    for kind in ("color", "crop", "cutout", "flip", "scale", "rotate")
    for siamese in (False, True)
] + [
    ("MLP", NoAugmentation(), 6, 6, 0.3, 0.0),
    ("MLP", DSA(), 8, 3, 0.0, 0.4),
    ("ConvNetD1W8", DSA(), 8, 8, 0.25, 0.25),
    ("ConvNetD1W8", DSA("scale"), 3, 1, 0.0, 0.0),  # less than one image for each rank
    ("MLP", DSA("rotate", siamese=True), 3, 1, 0.0, 0.0),
]


@pytest.mark.parametrize("size", [2, 3])
def test_matching_shared_by_ranks_is_exact(size):
    models = {name: flat_model(name) for name in ("MLP", "ConvNetD1W8")}

    def work(ranks):
        return [[t.numpy() for t in matching_gradients(models[name], *case, ranks)] for name, *case in CASES]

    results = on_ranks(size, work)
    alone = work(ALONE)
    for case, expected, *found in zip(CASES, alone, *results, strict=True):
        for rank in found:
            for name, ours, one, main in zip(("loss", "images", "labels", "lr"), rank, expected, found[0], strict=True):
                ours, one = torch.as_tensor(ours), torch.as_tensor(one)
                assert one.abs().max() > 0, (case, name)
                assert (ours - one).norm() <= 1e-12 * one.norm(), (case, name)
                assert torch.equal(ours, torch.as_tensor(main)), f"{case} {name}: the ranks differ"


class Rows:
    """Stands in for a store: expert k's parameters after epoch e."""

    def __init__(self, model):
        self.model = model

    def rows(self, expert, epochs):
        return torch.stack(
            [0.1 * torch.randn(self.model.num_parameters, generator=generator(expert, "rows", e)) for e in epochs]
        )


def test_an_objective_shares_its_batches_or_leaves_those_of_batchnorm_to_the_main_rank():
    """Calls of the derivatives are counted: BatchNorm's statistics are those of a whole batch, so it does not split."""
    sampler = SegmentSampler(
        experts=[0, 1],
        expert_epochs=1,
        min_start_epoch=0,
        max_start_epoch=2,
        sequential=False,
        current_max_start_epoch=1,
        expansion_end_epoch=1,
        seed=0,
    )
    rng = generator(0, "set")
    images, labels = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((6, *SHAPE), (6, CLASSES)))

    def work(ranks):
        out = []
        for name in ("ConvNetD1W8", "ConvNetD1W8BN"):
            model, sizes = flat_model(name), []
            grad = model.grad
            model.grad = lambda theta, x, p: (sizes.append(len(x)), grad(theta, x, p))[1]
            objective = TrajectoryObjective(
                model=model,
                store=Rows(model),
                sampler=sampler,
                augmentation=DSA("flip"),
                syn_steps=2,
                batch_syn=6,
                depth=(0.0, 1.0),
                loss_ratio=0.0,
                seed=0,
                ranks=ranks,
            )
            found = objective.gradients(3, images, labels, torch.tensor(0.01, dtype=torch.float64))
            out.append(([getattr(found, field).numpy() for field in ("loss", "images", "labels", "lr")], sizes))
        return out

    alone = work(ALONE)
    shared = on_ranks(2, work)
    assert [sizes for _, sizes in alone] == [[6, 6], [6, 6]]
    assert [[sizes for _, sizes in rank] for rank in shared] == [[[3, 3], [6, 6]], [[3, 3], []]]
    for rank in shared:
        for (found, _), (expected, _) in zip(rank, alone, strict=True):
            for ours, one in zip(found, expected, strict=True):
                torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(one), rtol=1e-11, atol=1e-14)


def test_dealt_networks_are_those_of_one_process():
    rng = generator(0, "images")
    images, labels = torch.randn(12, *SHAPE, generator=rng), torch.arange(12) % CLASSES
    settings = ScoringSettings("MLP", repeats=3, epochs=1)
    probabilities = torch.randn(12, CLASSES, generator=rng).softmax(dim=1)
    sets = [
        ("MLP", lambda j: (images, probabilities)),
        ("ConvNetD1W8", lambda j: (images.roll(j, 0), probabilities)),
        ("ConvNetD1W8BN", lambda j: (images, probabilities)),
    ]
    cases = [evaluation.Case(network=network, training_set=training_set, lr=0.05) for network, training_set in sets]

    def work(ranks):
        epochs, seen = [], []
        task = ScoringTraining(images, labels, CLASSES, settings, 0)
        found = score_images(["GraNd"], task, lambda *at: epochs.append(at), ranks)
        together = {}
        for count in (1, 2):
            protocol = evaluation.Protocol(DSA("flip"), epochs=2, batch_size=5, together=count)
            tested = {"test_images": images, "test_labels": labels, "ranks": ranks}
            evaluated = evaluation.Evaluation(protocol=protocol, **tested)
            results = evaluated.run(cases, 3, progress=lambda *at: seen.append(at))
            together[count] = [(each.network, each.scores) for each in results]
        return found.scores["GraNd"].tolist(), together, epochs, len(seen)

    ranking, together, epochs, seen = work(ALONE)
    assert len(set(ranking)) == 12 and epochs == [(0, 0), (1, 0), (2, 0)] and seen == 18
    assert [network for network, _ in together[1]] == ["MLP", "ConvNetD1W8", "ConvNetD1W8BN"]
    for size in (2, 3):
        results = on_ranks(size, work)
        assert [result[:2] for result in results] == [(ranking, together)] * size
        assert [result[2] for result in results] == [[(r, 0) for r in range(rank, 3, size)] for rank in range(size)]
        assert sum(result[3] for result in results) == 18, "each network is trained once"


# ----------------------------------------------------------------------------------------------------- endings


def test_a_killed_rank_is_noticed_by_the_others_at_once():
    def work(ranks):
        ranks.barrier()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        started, lost = time.monotonic(), []
        for operation in (
            lambda: ranks.all_reduce_(torch.ones(3)),
            lambda: ranks.gather(1),
            lambda: ranks.on_main(dict),
        ):
            try:
                operation()
            except PeerLost as error:
                lost.append(str(error))
        sys.stdout.flush()
        os.write(results, f"{lost}\n{time.monotonic() - started < 20}\n".encode())
        os._exit(7)

    reader, results = os.pipe()
    _, codes = launch(3, work)
    os.close(results)
    text = os.fdopen(reader).read()
    assert codes == [7, -signal.SIGKILL, 7]
    assert text.count("another process of this run ended, so this one cannot go on (") == 6
    assert text.count("True") == 2


def test_one_rank_says_how_the_run_ends_and_all_end_with_its_code(capfd):
    def work(ranks):
        if ranks.rank == 1:
            code = ranks.say("error: the disk is full", 1)
            ranks.barrier()
        else:
            ranks.barrier()
            code = ranks.say("another process ended", 5)
        ranks.leave(10 + code)

    _, codes = launch(3, work)
    assert codes == [11, 11, 11]
    assert capfd.readouterr().err == "error: the disk is full\n"


def test_processes_that_do_not_come_are_said(monkeypatch):
    monkeypatch.setattr("pad.distributed._MEETING", timedelta(seconds=1))

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in dict(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    ).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="do not find each other"):
        join()
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(InputError, match="do not find each other.*MASTER_ADDR"):
        join()
