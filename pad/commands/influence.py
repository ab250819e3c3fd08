"""``distill/InfMatch.py``: influence matching, assembled from its settings.

python distill/InfMatch.py --cfg configs/CIFAR-10/InfMatch-IPC10.yaml
"""

from dataclasses import dataclass

import torch

from pad.commands.bench import Workbench, experts_at
from pad.commands.distil import OfDepth, Task, first_set
from pad.commands.following import FromEpochs
from pad.commands.real import RealMatching
from pad.config import DETAIL, PACE, RECIPE, FilePath, setting
from pad.errors import InputError, is_of_memory
from pad.initialisation import INITIAL_IMAGES
from pad.matching.influence import Checkpoints, InfluenceObjective
from pad.nn.flat import FlatModel


@dataclass(frozen=True, kw_only=True)
class InfluenceSettings(RealMatching, OfDepth, FromEpochs):
    """``distill/InfMatch.py``: match the influence of real images on experts (Inf-Match, 2607.16859)."""

    Iteration: int = setting(10000, "outer iterations 0..Iteration", PACE, low=0)
    lr_img: float = setting(50.0, "learning rate of the images", RECIPE, low=0)
    batch_real: int = setting(50, "real images of a class per iteration", RECIPE, low=1, memory=True)
    checkpoints: int = setting(2, "epochs of an expert per iteration", RECIPE, low=1)
    micro_batch: int | None = setting(
        None, "compute on so many images at a time: less memory, same result", DETAIL, low=1, memory=True
    )

    labels: str = setting("soft", "soft: learned; hard: one-hot, and so they stay", RECIPE, choices=("soft", "hard"))
    lr_y: float = setting(7.0, "learning rate of the labels", RECIPE, low=0)
    Momentum_y: float = setting(0.9, "momentum of the labels", RECIPE, low=0, below=1)
    pix_init: FilePath = setting("real", "initial images; or the path of a set", RECIPE, choices=INITIAL_IMAGES)

    refused = {
        key: why
        for key, why in RealMatching.refused.items()
        if key not in {*FromEpochs.fields(), "labels", "lr_y", "Momentum_y"}
    } | dict.fromkeys(("outer_loop", "inner_loop"), "it belongs to gradient matching, distill/DC.py")
    program = "infmatch"

    @property
    def derivatives(self) -> int:
        return self.Iteration * self.checkpoints * 7

    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        """Match the influence of real images. A resumed run follows the experts it began with."""
        depth = self.matched_span(model)
        followed = self.followed(bench, model, before)
        store = followed.store
        sampler = self.sampler(followed, expert_epochs=0)
        labellers = experts_at(store, model, followed.experts, -1, bench.device)
        real, made_from = self.real_batches(bench, model)
        store.refuse_other(bench.describe(self.model, model))
        images, labels, begun_with = first_set(self, bench, self.pix_init, labellers, hard=self.labels == "hard")
        self._refuse_without_third(model, store.rows(followed.experts[0], [0])[0].to(images), images[:2])
        objective = self.fill(
            InfluenceObjective,
            model=model,
            checkpoints=self.fill(Checkpoints, store=store, sampler=sampler, count=self.checkpoints),
            real=real,
            augmentation=self.matching_augmentation,
            depth=depth,
            ranks=bench.ranks,
            real_model=bench.flat_model(self.model, self.compile, self.micro_batch),
        )
        made_from = {**followed.made_from, **made_from, **begun_with}
        kept = {key: value for key, value in made_from.items() if key in ("ranking", "start")}
        return Task(
            objective=objective,
            images=images,
            labels=labels,
            lr=self.lr_net,
            rates=[self.lr_img, self.lr_y, 0.0],
            made_from=made_from,
            provenance={"buffer": followed.recipe, **kept},
            momentum_y=self.Momentum_y,
            recorded={"experts": followed.experts},
        )

    def _refuse_without_third(self, model: FlatModel, theta: torch.Tensor, x: torch.Tensor) -> None:
        """Raise InputError for a network that cannot be differentiated three times."""
        p = x.new_ones(len(x), model(theta, x).shape[1])
        try:
            model.third(theta, x, p, theta, theta)
        except RuntimeError as error:
            if is_of_memory(error):
                raise
            raise InputError(f"model: {self.model} has no third derivatives ({str(error).splitlines()[0]})") from None
