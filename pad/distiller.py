"""The outer loop: match, update, evaluate, save; the objective is whatever gives gradients of a synthetic set."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from pad.checkpoint import SMALLEST_LR, State
from pad.distributed import ALONE, Ranks
from pad.errors import Stopped
from pad.limit import TimeLimit
from pad.matching.objective import Gradients, Objective
from pad.peak import measure_peak
from pad.show.figures import draw_figure
from pad.show.layers import plot_layers
from pad.show.pictures import before_after, image_grid, unless_it_fails
from pad.store.run import Run
from pad.synthetic import SyntheticSet

log = logging.getLogger("pad")

IMAGE_MOMENTUM = LR_MOMENTUM = 0.5  # as published


class _Interrupted(KeyboardInterrupt):
    """A signal in a place where it need not wait."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When things happen, and how far a step goes (settings of the same names)."""

    iterations: int  # outer iterations 0..iterations
    eval_it: int  # iterations between evaluations
    skip_first_eva: bool  # none before iteration 0
    save_it: int  # iterations between saved sets
    checkpoint_every: int  # iterations between checkpoints
    threshold: float  # a step of a larger loss changes nothing
    max_bad_iterations: int  # so many in a row without a finite gradient end the run
    rates: list[float]  # learning rates of images, labels, lr
    momentum_y: float = 0.0  # of the labels
    ema_decay: float = 0.0  # of the moving average of the images, where one is kept
    adamw: float | None = None  # weight decay of the images by AdamW; None: they learn by SGD

    def evaluates(self, it: int) -> bool:
        """Whether the set is evaluated before iteration ``it``."""
        return it % self.eval_it == 0 and not (it == 0 and self.skip_first_eva)


@dataclass(kw_only=True)
class Distiller:
    """Runs the outer loop in a run folder.

    Args:
        objective: gives the gradients.
        synthetic: wraps tensors as a SyntheticSet, for files and pictures.
        evaluate: trains networks on a synthetic set: network name -> (mean accuracy, std, n). The first network's mean
            picks the best.
        ranks: the processes that run this together. All of them have the same state and take the same steps; rank 0
            writes the files.
        identity: what the run is of (settings, data, experts), as plain values: a checkpoint of another is refused.
        limit: no iteration but the first begins when it is over.
    """

    run: Run
    state: State
    objective: Objective
    schedule: Schedule
    synthetic: Callable[[Tensor, Tensor, Tensor, int], SyntheticSet]
    evaluate: Callable[[SyntheticSet], dict[str, tuple[float, float, int]]]
    ranks: Ranks = ALONE
    identity: dict = field(default_factory=dict)
    limit: TimeLimit = field(default_factory=TimeLimit)

    def __post_init__(self):
        self._first_pixels = self._set().pixels() if self.ranks.is_main else torch.empty(0)
        self._signal = 0  # that this process was sent
        self._stop = 0  # the signal that stops the run
        self._out_of_time = False
        self._saved = -1  # the iteration that the checkpoint goes on with
        self._at_once = False  # a signal need not wait
        self._peak = measure_peak(self.state.images.device)

    @property
    def checkpoint(self) -> Path:
        return self.run.folder / "checkpoint.safetensors"

    def resume(self) -> None:
        """Go on from the checkpoint, if the run got as far as writing one."""

        def load() -> State | None:
            if not self.checkpoint.exists():
                return None
            return State.load(self.checkpoint, self.state, processes=self.ranks.size, identity=self.identity)

        if state := self.ranks.on_main(load):
            for name, tensor in self.objective.memory.items():
                tensor.copy_(state.memory[name])
            state.memory = self.state.memory
            self.state = state
            self._saved = state.iteration
            log.info("going on from iteration %d", state.iteration)
        self.run.truncate_metrics(self.state.iteration - 1)

    @property
    def is_finished(self) -> bool:
        """Whether all iterations are done, with time to spare for what follows the last."""
        return self.state.iteration > self.schedule.iterations and not self._out_of_time

    def distill(self) -> SyntheticSet:
        """Run to the end, or until the time is over; returns the set. Nothing is evaluated any more when time is over.

        Raises Stopped on SIGINT or SIGTERM, or when the numbers go wrong.
        """
        with self._signals():
            self._loop()
            if not self.is_finished:
                self._checkpoint()
                return self._save("last")
            it = self.state.iteration
            self._evaluate(it)
            final = self._save("last")
            if self.ranks.is_main:
                with unless_it_fails("before_after"):
                    shown = final.pixels(), final.classes, final.class_names
                    self.run.save_picture("before_after", before_after(self._first_pixels, *shown, it), it)
                if found := [each for each in self.run.recorded("match") if "layers" in each]:
                    draw_figure(self.run.folder / "pictures" / f"layers_{it:06d}.png", plot_layers, found)
                self._say_what_was_not_learned()
        return final

    def _say_what_was_not_learned(self) -> None:
        """Warn when the set is hardly other, or no better, than the one that the run began with."""
        state, schedule = self.state, self.schedule
        if 2 * state.skipped >= state.iteration:
            limited = math.isfinite(schedule.threshold)
            above = f"above threshold: {schedule.threshold:g}, or " if limited else ""
            log.warning(
                "%d of %d iterations changed nothing, their loss was %snot finite%s",
                *(state.skipped, state.iteration, above, "; raise threshold, or none for no limit" * limited),
            )
        if schedule.rates[2] and state.lr <= SMALLEST_LR:
            log.warning(
                "the learning rate has come down to its floor, %g, at which networks learn nothing; lower lr_lr",
                SMALLEST_LR,
            )
        found = self.run.recorded("evaluation")
        if found and found[0]["iteration"] == 0:
            first, last = found[0], [each for each in found if each["network"] == found[0]["network"]][-1]
            if last["iteration"] and last["accuracy"] <= first["accuracy"]:
                before, after = 100 * first["accuracy"], 100 * last["accuracy"]
                log.warning("the set scores no better than at iteration 0: %.2f %% then, %.2f %% now", before, after)

    def _loop(self) -> None:
        state, schedule = self.state, self.schedule
        accuracy = "-"
        with tqdm(
            total=schedule.iterations + 1,
            initial=state.iteration,
            desc="distilling",
            unit="it",
            dynamic_ncols=True,
            disable=not self.ranks.is_main,
        ) as bar:
            while not (self.is_finished or self._out_of_time):
                it = state.iteration
                if schedule.evaluates(it):
                    accuracy = self._evaluate(it)
                if it % schedule.save_it == 0:
                    self._save(it)
                started = time.perf_counter()
                loss = self._iterate(it)
                state.iteration += 1
                self._stop_when_diverged()
                self.run.record_time("match", it, time.perf_counter() - started)
                shown = {"loss": f"{loss:.4f}", "lr": f"{state.lr.item():.4g}", "accuracy": accuracy}
                bar.set_postfix(**shown, skipped=state.skipped, refresh=False)
                bar.update()
                if self._stop:
                    self._save_and_stop(f"stopped after iteration {it}; the state is saved", 128 + self._stop)
                if state.iteration % schedule.checkpoint_every == 0:
                    self._checkpoint()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM are noted, and wait for the end of an iteration."""
        handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
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
        momenta = [IMAGE_MOMENTUM, schedule.momentum_y, LR_MOMENTUM]
        losses: list[float] = []
        layers: list[dict[str, list[float]]] = []
        updated = finite = True
        for found in self.objective.steps(it, state.images, state.labels, state.lr):
            loss, finite, of_layers = self._judge(found)
            losses.append(loss)
            layers.append(of_layers)
            updated = finite and loss <= schedule.threshold
            if not updated:
                break
            gradients = [found.images, found.labels, found.lr]
            state.step(gradients, schedule.rates, momenta, schedule.ema_decay, schedule.adamw)
        mean = sum(losses) / len(losses)
        state.skipped += not updated
        state.bad_in_a_row = 0 if finite else state.bad_in_a_row + 1
        more: dict = {} if finite else {"bad": True}
        if layers[0]:
            columns = {name: zip(*(each[name] for each in layers)) for name in layers[0]}
            more["layers"] = {name: [sum(numbers) / len(layers) for numbers in columns[name]] for name in columns}
        self.run.record("match", it, loss=mean, lr=state.lr.item(), updated=updated, skipped=state.skipped, **more)
        return mean

    def _judge(self, gradients: Gradients) -> tuple[float, bool, dict[str, list[float]]]:
        """The loss, whether it and all gradients are finite, and the layers, by one synchronisation with the device.

        Of several ranks the main one decides, even if their machines should round differently. All stop together.
        """
        tensors = (gradients.images, gradients.labels, gradients.lr)
        flags = [tensor.isfinite().all().to(gradients.loss) for tensor in tensors]
        of_layers = [number for pair in gradients.layers.values() for number in pair]
        found = torch.stack([gradients.loss, *flags, *of_layers]).tolist()
        reports = self.ranks.gather((found, self._signal, self.limit.is_over))
        self._stop = max(sent for _, sent, _ in reports)
        (loss, *others), _, self._out_of_time = reports[0]
        finite, numbers = others[: len(flags)], iter(others[len(flags) :])
        return loss, all(finite) and math.isfinite(loss), dict(zip(gradients.layers, map(list, zip(numbers, numbers))))

    def _stop_when_diverged(self) -> None:
        """Raise Stopped after too many iterations in a row without a finite gradient; a resumed run counts anew."""
        count = self.state.bad_in_a_row
        if count >= self.schedule.max_bad_iterations:
            self.state.bad_in_a_row = 0
            lower = "lr_lr or lr_img, or earlier start epochs" if self.schedule.rates[2] else "lr_img"
            self._save_and_stop(
                f"{count} iterations in a row gave no finite gradient; the state is saved. "
                f"Start another run (--name, or --overwrite) with a lower {lower}",
                1,
            )

    def _save_and_stop(self, message: str, code: int) -> NoReturn:
        self._checkpoint()
        self.ranks.barrier()  # torchrun ends the others when one has left
        raise Stopped(message, code)

    def _checkpoint(self) -> None:
        if self.ranks.is_main and self._saved != self.state.iteration:
            self.run.record_peak(self.state.iteration, self._peak())
            self.state.save(self.checkpoint, processes=self.ranks.size, identity=self.identity)
        self._saved = self.state.iteration

    def _set(self) -> SyntheticSet:
        state = self.state
        images = state.images if state.average is None else state.average
        return self.synthetic(images.clone(), state.labels.clone(), state.lr.clone(), state.iteration)

    def _evaluate(self, it: int) -> str:
        """Evaluate the set before iteration ``it``; keep it when it is the best so far. Returns the accuracy."""
        self._checkpoint()
        self.ranks.barrier()
        started = time.perf_counter()
        current = self._set()
        accuracies = self._accuracies(current, it)
        for network, (mean, std, n) in accuracies.items():
            self.run.record("evaluation", it, network=network, accuracy=mean, std=std, n=n)
        self.run.record_time("evaluation", it, time.perf_counter() - started)
        network, (mean, std, n) = next(iter(accuracies.items()))
        if mean > self.state.best:
            self.state.best = mean
            self._save("best")
        if self.ranks.is_main:
            tqdm.write(f"iteration {it}: {network} {100 * mean:.2f} +- {100 * std:.2f} % (n = {n})")
            with unless_it_fails("synthetic"):
                shown = current.pixels(), current.classes, current.class_names
                self.run.save_picture("synthetic", image_grid(*shown, caption=f"iteration {it}"), it)
        return f"{100 * mean:.2f}%"

    def _accuracies(self, current: SyntheticSet, it: int) -> dict[str, tuple[float, float, int]]:
        """What ``evaluate`` finds. It can take as long as hundreds of iterations, so a signal ends it.

        The state was saved before, without the evaluation, which a resumed run begins with.
        """
        try:
            self._at_once = True
            if self._signal:
                raise _Interrupted
            accuracies = self.evaluate(current)
            self._at_once = False
            return accuracies
        except _Interrupted:
            where = f"in the evaluation before iteration {it}"
            raise Stopped(f"stopped {where}; the state is saved", 128 + self._signal) from None
        finally:
            self._at_once = False

    def _save(self, tag: int | str) -> SyntheticSet:
        current = self._set()
        if self.ranks.is_main:
            current.save(self.run.artifacts / f"synthetic_{tag}.safetensors")
            current.export_published(self.run.artifacts, tag)
        return current
