"""What ways of matching ask and assemble alike that follow experts: which trajectories, and from where on."""

import math
from dataclasses import dataclass

from pad.commands.bench import Workbench
from pad.commands.distil import Distilling
from pad.config import PLACE, RECIPE, FilePath, setting
from pad.errors import InputError
from pad.matching.trajectory import SegmentSampler
from pad.nn.flat import FlatModel
from pad.store.identity import digest
from pad.store.trajectories import TrajectoryStore


@dataclass(frozen=True)
class Followed:
    """The experts of a run."""

    store: TrajectoryStore
    experts: list[int]

    @property
    def headers(self) -> list[dict]:
        return [self.store.header(k) for k in self.experts]

    @property
    def recipe(self) -> dict:
        """The settings that they were recorded with."""
        return {key: value for key, value in self.headers[0]["settings"].items() if key != "attempt"}

    @property
    def made_from(self) -> dict:
        """What is made along them comes from this."""
        made_from = {**self.store.metadata, "buffer": self.recipe, "experts": digest(self.headers)}
        del made_from["parameters"]  # the model's, of which there can be hundreds
        return made_from


@dataclass(frozen=True, kw_only=True)
class Following(Distilling):
    """What all of them ask."""

    buffer_path: FilePath = setting("../buffer_storage/", "folder of the trajectories", PLACE, by_study=True)
    max_files: int | None = setting(None, "use the first files only, of save_interval experts each", RECIPE, low=1)
    max_experts: int | None = setting(None, "use the first experts of each file only", RECIPE, low=1)
    save_interval: int = setting(10, "experts a file, for max_files and max_experts", RECIPE, low=1)

    recorded_beside = frozenset({"experts"})

    def followed(self, bench: Workbench, model: FlatModel, before: dict, lines: bool = False) -> Followed:
        """The experts of ``model``; of a resumed run those it began with.

        ``lines``: two epochs of each will do. Raises InputError as :meth:`Workbench.open_experts` does.
        """
        store = bench.open_experts(bench.experts_folder(self.buffer_path, self.model), self.model, model)
        followed = Followed(store, self._selected(store, before))
        if not lines and any(store.is_line(k) for k in followed.experts):
            give = "--convexified True, or " if "convexified" in self.fields() else ""
            raise InputError(
                f"{store.folder} has experts as lines, two epochs of each: give {give}the buffer that they were made of"
            )
        bench.ranks.same(lambda: followed.headers, f"the experts in {store.folder}")
        return followed

    def _selected(self, store: TrajectoryStore, before: dict) -> list[int]:
        """The experts that max_files and max_experts leave, in files of ``save_interval`` as published.

        A buffer may have grown since a run began: the run goes on with the experts of then.
        """
        if "experts" not in before:
            files, within, size = self.max_files or math.inf, self.max_experts or math.inf, self.save_interval
            return [k for i, k in enumerate(store.experts) if i // size < files and i % size < within]
        experts = before["experts"]
        if not (isinstance(experts, list) and all(isinstance(k, int) for k in experts)):
            raise InputError("the run's config.yaml is damaged; --overwrite starts the run anew")
        if gone := sorted(set(experts) - set(store.experts)):
            raise InputError(f"the run was started with expert {gone[0]}, which is not in {store.folder} any more")
        return experts


@dataclass(frozen=True, kw_only=True)
class FromEpochs(Following):
    """What those ask that begin an iteration at an epoch of an expert."""

    min_start_epoch: int = setting(0, "first start epoch", RECIPE, low=0)
    max_start_epoch: int = setting(25, "start epochs lie below this one", RECIPE, low=1)
    Sequential_Generation: bool = setting(True, "widen the range of start epochs gradually", RECIPE)
    current_max_start_epoch: int = setting(20, "upper bound of the start epochs at iteration 0", RECIPE, low=1)
    expansion_end_epoch: int = setting(3000, "iteration at which the bound reaches max_start_epoch", RECIPE, low=1)

    def check(self) -> None:
        super().check()
        first, last, now = self.min_start_epoch, self.max_start_epoch, self.current_max_start_epoch
        if last is not None and last <= first:
            raise InputError(f"max_start_epoch: {last} leaves no start epoch from min_start_epoch: {first}")
        if self.Sequential_Generation and now <= first:
            raise InputError(
                f"current_max_start_epoch: {now} leaves no start epoch from min_start_epoch: {first} at iteration 0; "
                "raise it or set Sequential_Generation: False"
            )

    def refuse_short(self, epochs: int) -> None:
        """Raise InputError for what :meth:`sampler` would refuse of experts of so many epochs, before there are any."""
        last = self.max_start_epoch or 1 + epochs  # where none is given the experts say it
        sampler = self.fill(SegmentSampler, experts=[], sequential=self.Sequential_Generation, max_start_epoch=last)
        sampler.refuse_shorter(epochs, "an expert of its buffer")

    def sampler(self, followed: Followed, **others) -> SegmentSampler:
        """Draws expert and start epoch. Raises InputError where a trajectory is too short."""
        others = {"experts": followed.experts, "sequential": self.Sequential_Generation, **others}
        sampler = self.fill(SegmentSampler, **others)
        if sampler.max_start_epoch <= sampler.min_start_epoch:
            raise InputError(
                f"min_start_epoch: {sampler.min_start_epoch} leaves no start epoch: trajectories in "
                f"{followed.store.folder} have {sampler.max_start_epoch - 1} epochs"
            )
        sampler.refuse_short(followed.store)
        return sampler
