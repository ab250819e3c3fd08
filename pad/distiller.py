"""The outer loop: match, update, evaluate, save; the objective is whatever gives gradients of a synthetic set."""

import logging
import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from pad import kernels
from pad.distributed import ALONE, Ranks
from pad.errors import InputError, Stopped
from pad.files import load_tensors, save_tensors
from pad.matching.base import Objective
from pad.synthetic import SyntheticSet
from pad.tracking import Run, before_after, image_grid

log = logging.getLogger("pad")

IMAGE_MOMENTUM = LR_MOMENTUM = 0.5  # as published
SMALLEST_LR = 1e-6  # the learned learning rate is kept above it: training with a negative one is of no use
_FORMAT = 1


class _Interrupted(KeyboardInterrupt):
    """A signal in a place where it need not wait."""


@dataclass
class State:
    """Everything that an outer iteration changes.

    ``average``: the exponential moving average of the images (FTD, arXiv 2211.11004), where one is kept.
    """

    images: Tensor
    labels: Tensor
    lr: Tensor
    momentum: list[Tensor] = field(default_factory=list)
    average: Tensor | None = None
    iteration: int = 0  # the next one
    best: float = -1.0
    skipped: int = 0
    bad_in_a_row: int = 0

    def __post_init__(self):
        self.momentum = self.momentum or [torch.zeros_like(t) for t in self.variables]

    @property
    def variables(self) -> list[Tensor]:
        return [self.images, self.labels, self.lr]

    def step(self, gradients: list[Tensor], rates: list[float], momenta: list[float], ema_decay: float = 0.0) -> None:
        """One SGD step with momentum on images, labels and learning rate; then one of the average, with ``ema_decay``."""
        for variable, buffer, gradient, rate, momentum in zip(
            self.variables, self.momentum, gradients, rates, momenta, strict=True
        ):
            buffer.mul_(momentum).add_(gradient)
            variable.sub_(buffer, alpha=rate)
        self.lr.clamp_(min=SMALLEST_LR)
        if self.average is not None:
            self.average.mul_(ema_decay).add_(self.images, alpha=1 - ema_decay)

    _COUNTERS = ("iteration", "best", "skipped", "bad_in_a_row")
    _TENSORS = ("images", "labels", "lr")

    def save(self, path: Path, processes: int = 1, identity: dict | None = None) -> None:
        """Write a checkpoint, atomically. ``processes``: how many share the matching; ``identity``: see :meth:`load`."""
        counters = {name: getattr(self, name) for name in self._COUNTERS}
        metadata = {"kind": "checkpoint", "format": _FORMAT, "arithmetic": _arithmetic(self.images, processes)}
        save_tensors(path, self._named(), metadata | counters | {"identity": identity or {}})

    @classmethod
    def load(cls, path: Path, like: "State", processes: int = 1, identity: dict | None = None) -> "State":
        """Read a checkpoint of the same shapes as ``like``, onto its device. Raises InputError on anything else.

        ``identity``: nested plain values that say what the run is of; where those of the checkpoint are others, the
        first difference is named. Logs one line when it was written where sums may round otherwise: the end may then
        differ in the last bits.
        """
        tensors, metadata = load_tensors(path, "remove it, and --resume starts the run anew")
        if metadata.get("kind") != "checkpoint":
            raise InputError(f"{path} is not a checkpoint")
        if metadata.get("format") != _FORMAT:
            raise InputError(f"{path} has format {metadata.get('format')!r}; this version reads format {_FORMAT}")
        counters = {name: metadata.get(name) for name in cls._COUNTERS}
        before, made_with = metadata.get("arithmetic"), metadata.get("identity", {})
        usual = all(type(value) is int and value >= 0 for name, value in counters.items() if name != "best")
        if not (usual and type(counters["best"]) is float and isinstance(before, dict) and isinstance(made_with, dict)):
            raise InputError(f"{path} is damaged: what it says is not what a checkpoint says")
        if made_with and (difference := first_difference(made_with, identity or {})):
            where, there, here = difference
            raise InputError(
                f"{path}: {where}: {there} in the checkpoint, {here} in the config; --overwrite starts the run anew"
            )
        wanted = like._named()
        for name, tensor in wanted.items():
            found = tensors.get(name)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise InputError(f"{path}: {name} in the checkpoint is not of this run's shape {list(tensor.shape)}")
        now = _arithmetic(like.images, processes)
        before = {"tf32": False, "kernels": now["kernels"], **before}  # an older checkpoint does not say
        if before != now:
            log.warning("%s was written with %s, this is %s: results may differ by rounding", path, before, now)
        moved = {name: tensors[name].to(like.images.device) for name in wanted}
        variables, momentum = ([moved[f"{kind}{name}"] for name in cls._TENSORS] for kind in ("", "momentum_"))
        return cls(*variables, momentum, moved.get("average"), **counters)

    def _named(self) -> dict[str, Tensor]:
        """All tensors, as a checkpoint names them."""
        momentum = {f"momentum_{name}": buffer for name, buffer in zip(self._TENSORS, self.momentum)}
        average = {} if self.average is None else {"average": self.average}
        return dict(zip(self._TENSORS, self.variables)) | momentum | average


def first_difference(there: dict, here: dict) -> tuple[str, object, object] | None:
    """Where nested plain values first differ, and what each has there. What ``there`` does not name is not compared."""
    for key, theirs in there.items():
        ours = here.get(key, "nothing")
        if isinstance(theirs, dict) and isinstance(ours, dict):
            if inner := first_difference(theirs, ours):
                return f"{key} {inner[0]}", *inner[1:]
        elif theirs != ours:
            return key, theirs, ours
    return None


def _arithmetic(images: Tensor, processes: int) -> dict:
    """What the last bits of a result hang on."""
    device = images.device.type
    return {
        "torch": torch.__version__, "device": device, "threads": torch.get_num_threads(), "processes": processes,
        "tf32": device == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        "kernels": device == "cpu" and kernels.library() is not None,
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
    momentum_y: float = 0.0
    ema_decay: float = 0.0


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
        identity: what the run is of (settings, data, experts), as plain values: a checkpoint of another is refused.
    """

    run: Run
    state: State
    objective: Objective
    schedule: Schedule
    synthetic: Callable[[Tensor, Tensor, Tensor, int], SyntheticSet]
    evaluate: Callable[[SyntheticSet], dict[str, tuple[float, float, int]]]
    ranks: Ranks = ALONE
    identity: dict = field(default_factory=dict)

    def __post_init__(self):
        self._first_pixels = self._set().pixels() if self.ranks.is_main else None
        self._signal = 0  # that this process was sent
        self._stop = 0  # the signal that stops the run
        self._saved = -1  # the iteration that the checkpoint goes on with
        self._at_once = False  # a signal need not wait

    @property
    def checkpoint(self) -> Path:
        return self.run.folder / "checkpoint.safetensors"

    def resume(self) -> None:
        """Go on from the checkpoint, if the run got as far as writing one."""
        ranks = self.ranks
        there = self.checkpoint.exists
        state = ranks.on_main(
            lambda: State.load(self.checkpoint, self.state, ranks.size, self.identity) if there() else None
        )
        if state is not None:
            self.state = state
            self._saved = state.iteration
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
            self._evaluate(state.iteration)
            final = self._save("last")
            self._pictures(final, state.iteration)
            return final
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _remember(self, number, frame) -> None:
        if self._at_once:
            self._at_once, self._signal = False, number
            raise _Interrupted
        if self.ranks.size > 1:  # torchrun passes on what a terminal has sent to all processes already
            log.warning("finishing the iteration, then saving")
        elif self._signal:
            raise KeyboardInterrupt
        else:
            log.warning("finishing the iteration, then saving (once more: stop at once)")
        self._signal = number

    def _iterate(self, it: int) -> float:
        """The steps of an iteration: match and, when the loss is good enough, update. Returns their mean loss.

        A step that changes nothing ends the iteration, which then counts as skipped.
        """
        state, schedule = self.state, self.schedule
        losses, all_finite, updates = [], True, 0
        for g in self.objective.steps(it, state.images, state.labels, state.lr):
            gradients = [g.images, g.labels, g.lr]
            # One synchronisation a step: everything that decides comes over together.
            found = torch.stack([g.loss, *(t.isfinite().all().to(g.loss) for t in gradients)]).tolist()
            # Of several ranks the main one decides, even if their machines should round differently, and all stop together.
            reports = self.ranks.gather((found, self._signal))
            (loss, *finite), self._stop = reports[0][0], max(sent for _, sent in reports)
            finite = all(finite) and math.isfinite(loss)
            losses.append(loss)
            all_finite = all_finite and finite
            if finite and loss <= schedule.threshold:
                updates += 1
                state.step(gradients, schedule.rates, [IMAGE_MOMENTUM, schedule.momentum_y, LR_MOMENTUM], schedule.ema_decay)
            else:
                break
        updated, loss = updates == len(losses), sum(losses) / len(losses)
        state.skipped += not updated
        state.bad_in_a_row = 0 if all_finite else state.bad_in_a_row + 1
        bad = {} if all_finite else {"bad": True}
        self.run.record("match", it, loss=loss, lr=state.lr.item(), updated=updated, skipped=state.skipped, **bad)
        if state.bad_in_a_row >= schedule.max_bad_iterations:
            count, state.bad_in_a_row = state.bad_in_a_row, 0
            state.iteration += 1
            self._checkpoint()
            self.ranks.barrier()
            raise Stopped(
                f"{count} iterations in a row gave no finite gradient; the state is saved. "
                "Start another run (--name, or --overwrite) with a lower lr_lr or lr_img, or earlier start epochs",
                1,
            )
        return loss

    def _checkpoint(self) -> None:
        if self.ranks.is_main and self._saved != self.state.iteration:
            self.state.save(self.checkpoint, self.ranks.size, self.identity)
        self._saved = self.state.iteration

    def _set(self) -> SyntheticSet:
        state = self.state
        images = state.images if state.average is None else state.average
        return self.synthetic(images.clone(), state.labels.clone(), state.lr.clone(), state.iteration)

    def _evaluate(self, it: int) -> str:
        """Score the set as it is before iteration ``it``; keep it when it is the best so far.

        It can take as long as hundreds of iterations, so a signal ends it: the state is saved before, without the
        evaluation, which a resumed run begins with.
        """
        self._checkpoint()
        self.ranks.barrier()
        started = time.perf_counter()
        current = self._set()
        try:
            self._at_once = True
            if self._signal:
                raise _Interrupted
            scores = self.evaluate(current)
            self._at_once = False
        except _Interrupted:
            where = f"in the evaluation before iteration {it}"
            raise Stopped(f"stopped {where}; the state is saved", 128 + self._signal) from None
        finally:
            self._at_once = False
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
