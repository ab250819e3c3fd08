"""Training the networks of an evaluation's table, each score kept under all that it hangs on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pad.commands.bench import Workbench, progress_bar
from pad.commands.kept import Kept
from pad.commands.rows import Row
from pad.data.augment import DC
from pad.evaluation import Accuracies, Case, Protocol, Score
from pad.store.identity import digest
from pad.store.locks import in_turn
from pad.synthetic import SyntheticSet

if TYPE_CHECKING:
    from pad.commands.evaluate import EvaluationSettings

log = logging.getLogger("pad")

_FORMAT = 1  # of how networks are trained on the whole set: what another one scored is trained anew


@dataclass(frozen=True)
class Job:
    """Networks of one architecture, trained on one row at one learning rate."""

    network: str
    row: Row
    lr: float


class RowTraining:
    """Trains the networks of a table. What each scores is kept: until the table is written, or for good."""

    def __init__(self, settings: EvaluationSettings, bench: Workbench, synthetic: SyntheticSet, rows: int, kept: Kept):
        self._settings, self._bench, self._kept = settings, bench, kept
        self._pool = settings.pool
        self._protocol = bench.protocol(settings, len(synthetic.images), rows)
        self._lr = synthetic.lr.item() if self._protocol.lr is None else self._protocol.lr
        self._draw = functools.lru_cache(maxsize=self._protocol.together)(lambda row, j: row.sets(j))
        self._digests: dict[tuple[Row, int], str] = {}

    def tune(self, rows: Sequence[Row], tried: Tensor) -> dict[tuple[str, str], float]:
        """The learning rate, by network and row, with which a network gets most of the images ``tried`` right."""
        settings, bench = self._settings, self._bench
        jobs = [Job(network, row, lr) for network in settings.pool for row in rows for lr in settings.grid]
        tested = bench.images[tried.to(bench.device)], bench.labels[tried.to(bench.device)]
        found = self._run(jobs, 1, tested, {"tested": digest(tried.tolist())}, "tuning")
        best: dict[tuple[str, str], tuple[float, float]] = {}
        for job, accuracies in zip(jobs, found):  # the smaller of equal ones
            best[job.network, job.row.name] = max(
                best.get((job.network, job.row.name), (-1.0, 0.0)), (accuracies.mean, job.lr), key=lambda pair: pair[0]
            )
        return {key: lr for key, (_, lr) in best.items()}

    def score(self, rows: Sequence[Row], tuned: Mapping[tuple[str, str], float]) -> list[dict]:
        """The table's entries, for JSON: each network on each row, at the learning rate it has and at a tuned one."""
        bench = self._bench
        own = {row: self._settings.full_lr if row.whole else self._lr for row in rows}
        entries = [
            (Job(network, row, lr), chosen)
            for network in self._pool
            for row in rows
            for lr, chosen in ((own[row], False), (tuned.get((network, row.name)), True))
            if lr is not None
        ]
        jobs = list(dict.fromkeys(job for job, _ in entries))
        found = self._run(jobs, self._settings.num_eval, (bench.test_images, bench.test_labels), {}, "evaluating")
        scored = dict(zip(jobs, found))
        return [
            {
                "set": job.row.title,
                "row": job.row.name,
                "augmented": job.row.augmented and self._settings.dsa,
                "lr": job.lr,
                "tuned": chosen,
                **scored[job].as_dict(),
            }
            for job, chosen in entries
        ]

    def _run(self, jobs: Sequence[Job], count: int, tested: tuple, about: dict, doing: str) -> list[Accuracies]:
        """``count`` networks for each job. Those on the whole set first; no other process trains them meanwhile."""
        bench, ranks, folder = self._bench, self._bench.ranks, self._settings.whole_folder
        lasting = [job for job in jobs if job.row.whole]
        found: dict[Job, Accuracies] = {}
        if lasting:
            kept = Kept(folder / "accuracies-", ranks, bench.data.test_fingerprint)
            name = digest([bench.data.identity, bench.data.test_fingerprint, self._settings.seed], 8)
            lock = in_turn(folder / f".{name}.lock", "networks on the whole training set")
            some_missing = len(self._known(lasting, count, about, kept)) < len(lasting) * count
            with lock if some_missing and ranks.is_main else contextlib.nullcontext():
                ranks.barrier()
                found |= zip(lasting, self._train(lasting, count, tested, about, kept, f"{doing}, whole set"))
        others = [job for job in jobs if not job.row.whole]
        found |= zip(others, self._train(others, count, tested, about, self._kept, doing))
        return [found[job] for job in jobs]

    def _known(self, jobs: Sequence[Job], count: int, about: dict, kept: Kept) -> dict[tuple[int, int], Score]:
        """What is kept of networks (job, j)."""
        every = list(itertools.product(range(len(jobs)), range(count)))
        return kept.read(every, lambda which: self._key(jobs[which[0]], which[1], about))

    def _train(self, jobs, count: int, tested: tuple, about: dict, kept: Kept, doing: str) -> list[Accuracies]:
        bench, ranks = self._bench, self._bench.ranks

        def key(which: tuple[int, int]) -> str:
            case, j = which
            return self._key(jobs[case], j, about)

        def state(case: int, j: int) -> Path:
            return self._settings.whole_folder / f"{key((case, j))[:32]}.training.safetensors"

        cases = [
            Case(
                network=job.network,
                training_set=functools.partial(self._draw, job.row),
                lr=job.lr,
                augmented=job.row.augmented,
                epochs=self._settings.full_epochs if job.row.whole else None,
                checkpoint=functools.partial(state, case) if job.row.whole else None,
            )
            for case, job in enumerate(jobs)
        ]
        known = self._known(jobs, count, about, kept)
        if known:
            log.info("going on with %d networks that were trained before", len(known))
        evaluation = dataclasses.replace(bench.evaluation(self._protocol), test_images=tested[0], test_labels=tested[1])
        total = math.ceil((len(jobs) * count - len(known)) / ranks.size)
        with progress_bar(ranks, total, doing, "network") as bar:

            def progress(case: int, j: int, so_far: Accuracies) -> None:
                kept.keep(key((case, j)), so_far.scores[-1])
                if jobs[case].row.whole:
                    state(case, j).unlink(missing_ok=True)
                shown = {"set": jobs[case].row.title, "network": jobs[case].network, "lr": f"{jobs[case].lr:.3g}"}
                bar.set_postfix(**shown, accuracy=f"{100 * so_far.mean:.2f}%", refresh=False)
                bar.update()

            return evaluation.run(cases, count, progress=progress, known=known)

    def _key(self, job: Job, j: int, about: dict) -> str:
        """Of all that the score of network j hangs on."""
        settings, bench, row = self._settings, self._bench, job.row
        protocol = _plain(self._protocol, settings, self._pool)
        more = dict(about)
        if row.whole:  # which settings of the set's evaluation do not change
            protocol |= {"epochs": settings.full_epochs, "compile": "", "together": 0}
            # Kept for good, whatever becomes of the folder of images and of the code
            more |= {"test": bench.data.test_fingerprint, "code": _FORMAT, "built": self._built(job.network)}
        if not row.augmented:
            more["augmented"] = False
        fixed = {
            "protocol": protocol,
            "lr": job.lr,
            "data": bench.data.identity,
            "preprocessing": bench.preprocessing.identity,
            "torch": torch.__version__,
            "device": bench.device.type,
            "tf32": settings.tf32,
        }
        return digest({**fixed, **more, "network": job.network, "index": j, "set": self._set_digest(row, j)}, 64)

    @functools.cache  # noqa: B019
    def _built(self, network: str) -> str:
        """Tells networks of one name apart: what they are made of, and their first numbers."""
        built = self._bench.network(network, self._settings.seed)
        return digest([repr(built), _digest_of([*built.state_dict().values()])])

    def _set_digest(self, row: Row, j: int) -> str:
        one = row, 0 if row.one else j
        if one not in self._digests:
            self._digests[one] = row.about if row.whole else _digest_of(self._draw(row, j))
        return self._digests[one]


def _plain(protocol: Protocol, settings: EvaluationSettings, pool: Sequence[str]) -> dict:
    """How the networks of a pool are trained, as plain values."""
    drawn = [protocol.of(network).augmentation for network in pool]
    of_dc = sorted({augmentation.strategy for augmentation in drawn if isinstance(augmentation, DC)})
    return protocol.plain | {"augmentation": [settings.dsa, settings.dsa_strategy, settings.siamese, *of_dc]}


def _digest_of(tensors: Sequence[Tensor]) -> str:
    """Hexadecimal SHA-256 of the shapes and numbers of tensors."""
    numbers = hashlib.sha256()
    for tensor in tensors:
        numbers.update(f"{tuple(tensor.shape)}".encode())
        numbers.update(tensor.cpu().contiguous().numpy().data)
    return numbers.hexdigest()
