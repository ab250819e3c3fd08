"""The outer loop: match, update, evaluate, save; the objective is whatever gives gradients of a synthetic set."""

import logging
import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.files import load_tensors, save_tensors
from pad.matching.unroll import Gradients
from pad.synthetic import SyntheticSet
from pad.tracking import Run, before_after, image_grid

log = logging.getLogger("pad")

IMAGE_MOMENTUM = LR_MOMENTUM = 0.5  # as published
SMALLEST_LR = 1e-6  # the learned learning rate is kept above it: training with a negative one is of no use
_FORMAT = 1


class Objective(Protocol):
    """What an outer iteration asks: a pure function of (iteration, synthetic set)."""

    def gradients(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Gradients: ...


class Stopped(Exception):
    """The run stopped early with its state saved. ``code`` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass
class State:
    """Everything that an outer iteration changes."""

    images: Tensor
    labels: Tensor
    lr: Tensor
    momentum: list[Tensor] = field(default_factory=list)
    iteration: int = 0  # the next one
    best: float = -1.0
    skipped: int = 0
    bad_in_a_row: int = 0

    def __post_init__(self):
        self.momentum = self.momentum or [torch.zeros_like(t) for t in self.variables]

    @property
    def variables(self) -> list[Tensor]:
        return [self.images, self.labels, self.lr]

    def step(self, gradients: list[Tensor], rates: list[float], momenta: list[float]) -> None:
        """One SGD step with momentum on images, labels and learning rate."""
        for variable, buffer, gradient, rate, momentum in zip(
            self.variables, self.momentum, gradients, rates, momenta, strict=True
        ):
            buffer.mul_(momentum).add_(gradient)
            variable.sub_(buffer, alpha=rate)
        self.lr.clamp_(min=SMALLEST_LR)

    _COUNTERS = ("iteration", "best", "skipped", "bad_in_a_row")
    _TENSORS = ("images", "labels", "lr")

    def save(self, path: Path, processes: int = 1) -> None:
        """Write a checkpoint, atomically. ``processes``: how many share the matching."""
        tensors = dict(zip(self._TENSORS, self.variables)) | {
            f"momentum_{name}": buffer for name, buffer in zip(self._TENSORS, self.momentum)
        }
        counters = {name: getattr(self, name) for name in self._COUNTERS}
        metadata = {"kind": "checkpoint", "format": _FORMAT, "arithmetic": _arithmetic(self.images, processes)}
        save_tensors(path, tensors, metadata | counters)

    @classmethod
    def load(cls, path: Path, like: "State", processes: int = 1) -> "State":
        """Read a checkpoint of the same shapes as ``like``, onto its device. Raises InputError on anything else.

        Logs one line when it was written where sums may round otherwise: the end may then differ in the last bits.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("kind") != "checkpoint" or metadata.get("format") != _FORMAT:
            raise InputError(f"{path} is not a checkpoint of this version")
        variables = [tensors.get(name) for name in cls._TENSORS]
        momentum = [tensors.get(f"momentum_{name}") for name in cls._TENSORS]
        for name, found, wanted in zip(cls._TENSORS * 2, variables + momentum, like.variables * 2):
            if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
                raise InputError(f"{path}: {name} in the checkpoint is not of this run's shape {list(wanted.shape)}")
        before, now = metadata["arithmetic"], _arithmetic(like.images, processes)
        if before != now:
            log.warning("%s was written with %s, this is %s: results may differ by rounding", path, before, now)
        moved = [tensor.to(like.images.device) for tensor in (*variables, *momentum)]
        return cls(*moved[:3], moved[3:], **{name: metadata[name] for name in cls._COUNTERS})


def _arithmetic(images: Tensor, processes: int) -> dict:
    """What the last bits of a result hang on."""
    return {
        "torch": torch.__version__, "device": images.device.type, "threads": torch.get_num_threads(), "processes": processes
    }  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """When things happen, and how far a step goes (settings of the same names)."""

    iterations: int  # outer iterations 0..iterations
    eval_it: int
    skip_first_eva: bool
    save_it: int
    checkpoint_every: int
    threshold: float
    max_bad_iterations: int
    rates: list[float]  # of images, labels, lr
    momentum_y: float


@dataclass
class Distiller:
    """Runs the outer loop in a run folder.

    Args:
        objective: gives the gradients.
        synthetic: wraps tensors as a SyntheticSet, for files and pictures.
        evaluate: scores a synthetic set: network name -> (mean accuracy, std, n); the first network's mean picks the
            best.
        ranks: the processes that run this together. All of them have the same state and take the same steps; rank 0
            writes the files.
    """

    run: Run
    state: State
    objective: Objective
    schedule: Schedule
    synthetic: Callable[[Tensor, Tensor, Tensor, int], SyntheticSet]
    evaluate: Callable[[SyntheticSet], dict[str, tuple[float, float, int]]]
    ranks: Ranks = ALONE

    def __post_init__(self):
        self._first_pixels = self._set().pixels() if self.ranks.is_main else None
        self._signal = 0  # that this process was sent
        self._stop = 0  # the signal that stops the run

    @property
    def checkpoint(self) -> Path:
        return self.run.folder / "checkpoint.safetensors"

    def resume(self) -> None:
        """Go on from the checkpoint, if the run got as far as writing one."""
        ranks = self.ranks
        state = ranks.on_main(
            lambda: State.load(self.checkpoint, self.state, ranks.size) if self.checkpoint.exists() else None
        )
        if state is not None:
            self.state = state
            log.info("going on from iteration %d", self.state.iteration)
        self.run.truncate_metrics(self.state.iteration - 1)

    def distill(self) -> SyntheticSet:
        """Run to the end; returns the final set. Raises Stopped on SIGINT or SIGTERM, or when the numbers go wrong."""
        state, schedule = self.state, self.schedule
        handlers = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        last = "-"
        try:
            with tqdm(
                total=schedule.iterations + 1, initial=state.iteration, desc="distilling", unit="it", dynamic_ncols=True,
                disable=not self.ranks.is_main,
            ) as bar:  # fmt: skip
                while state.iteration <= schedule.iterations:
                    it = state.iteration
                    if it % schedule.eval_it == 0 and not (it == 0 and schedule.skip_first_eva):
                        last = self._evaluate(it)
                    if it % schedule.save_it == 0:
                        self._save(it)
                    started = time.perf_counter()
                    loss = self._iterate(it)
                    self.run.record_time("match", it, time.perf_counter() - started)
                    state.iteration += 1
                    lr = f"{state.lr.item():.4g}"
                    bar.set_postfix(loss=f"{loss:.4f}", lr=lr, accuracy=last, skipped=state.skipped, refresh=False)
                    bar.update()
                    if self._stop:
                        self._checkpoint()
                        self.ranks.barrier()  # torchrun ends the others when one has left
                        raise Stopped(f"stopped after iteration {it}; the state is saved", 128 + self._stop)
                    if state.iteration % schedule.checkpoint_every == 0:
                        self._checkpoint()
            self._checkpoint()  # without the last evaluation, which a run that is extended later does not have
            self._evaluate(state.iteration)
            final = self._save("last")
            self._pictures(final, state.iteration)
            return final
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _remember(self, number, frame) -> None:
        if self.ranks.size > 1:  # torchrun passes on what a terminal has sent to all processes already
            log.warning("finishing the iteration, then saving")
        elif self._signal:
            raise KeyboardInterrupt
        else:
            log.warning("finishing the iteration, then saving (once more: stop at once)")
        self._signal = number

    def _iterate(self, it: int) -> float:
        """Match and, when the loss is good enough, update. Returns the loss."""
        state, schedule = self.state, self.schedule
        g = self.objective.gradients(it, state.images, state.labels, state.lr)
        gradients = [g.images, g.labels, g.lr]
        # One synchronisation an iteration: everything that decides comes over together.
        found = torch.stack([g.loss, *(t.isfinite().all().to(g.loss) for t in gradients)]).tolist()
        # Of several ranks the main one decides, even if their machines should round differently, and all stop together.
        reports = self.ranks.gather((found, self._signal))
        (loss, *finite), self._stop = reports[0][0], max(sent for _, sent in reports)
        finite = all(finite) and math.isfinite(loss)
        updated = finite and loss <= schedule.threshold
        if updated:
            state.step(gradients, schedule.rates, [IMAGE_MOMENTUM, schedule.momentum_y, LR_MOMENTUM])
        else:
            state.skipped += 1
        state.bad_in_a_row = 0 if finite else state.bad_in_a_row + 1
        self.run.record("match", it, loss=loss, lr=state.lr.item(), updated=updated, skipped=state.skipped)
        if state.bad_in_a_row >= schedule.max_bad_iterations:
            bad, state.bad_in_a_row = state.bad_in_a_row, 0
            state.iteration += 1
            self._checkpoint()
            self.ranks.barrier()
            raise Stopped(
                f"{bad} iterations in a row gave no finite gradient; the state is saved. "
                "Start another run (--name, or --overwrite) with a lower lr_lr or lr_img, or earlier start epochs",
                1,
            )
        return loss

    def _checkpoint(self) -> None:
        if self.ranks.is_main:
            self.state.save(self.checkpoint, self.ranks.size)

    def _set(self) -> SyntheticSet:
        state = self.state
        return self.synthetic(state.images.clone(), state.labels.clone(), state.lr.clone(), state.iteration)

    def _evaluate(self, it: int) -> str:
        """Score the set as it is before iteration ``it``; keep it when it is the best so far."""
        started = time.perf_counter()
        current = self._set()
        scores = self.evaluate(current)
        for network, (mean, std, n) in scores.items():
            self.run.record("evaluation", it, network=network, accuracy=mean, std=std, n=n)
        self.run.record_time("evaluation", it, time.perf_counter() - started)
        network, (mean, std, n) = next(iter(scores.items()))
        if mean > self.state.best:
            self.state.best = mean
            self._save("best")
        if self.ranks.is_main:
            tqdm.write(f"iteration {it}: {network} {100 * mean:.2f} +- {100 * std:.2f} % (n = {n})")
            self.run.save_picture("synthetic", image_grid(
                current.pixels(), current.classes, current.class_names, caption=f"iteration {it}"), it)  # fmt: skip
        return f"{100 * mean:.2f}%"

    def _save(self, tag: int | str) -> SyntheticSet:
        current = self._set()
        if self.ranks.is_main:
            current.save(self.run.artifacts / f"synthetic_{tag}.safetensors")
            current.export_published(self.run.artifacts, tag)
        return current

    def _pictures(self, final: SyntheticSet, it: int) -> None:
        if self.ranks.is_main:
            self.run.save_picture("before_after", before_after(
                self._first_pixels, final.pixels(), final.classes, final.class_names, it), it)  # fmt: skip
