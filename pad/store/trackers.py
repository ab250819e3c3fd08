"""What follows a run from outside: TensorBoard, Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pad.errors import InputError

TRACKERS = ("none", "tensorboard", "wandb")


class Tracker:
    """Takes everything and does nothing with it; the trackers proper override what they know."""

    def numbers(self, values: dict[str, float], iteration: int) -> None: ...

    def picture(self, name: str, picture: np.ndarray, iteration: int) -> None: ...

    def rewind(self, iteration: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard(Tracker):
    def __init__(self, folder: Path):
        self._folder = str(folder / "tensorboard")
        self._open(None)

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=purge_step)

    def numbers(self, values: dict[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        self._writer.add_image(name, picture, iteration, dataformats="HWC")

    def rewind(self, iteration: int) -> None:
        self._writer.close()
        self._open(iteration + 1)

    def close(self) -> None:
        self._writer.close()


class _WandB(Tracker):
    """Each start or resumption is a W&B run of its own, in the group of its folder: W&B's steps cannot go back."""

    def __init__(self, folder: Path, settings: Mapping):
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=settings.get("project", "PAD"),
            name=folder.name,
            group=folder.as_posix()[-128:],
            dir=str(folder),
            config=dict(settings),
        )

    def numbers(self, values: dict[str, float], iteration: int) -> None:
        self._run.log(values, step=iteration)

    def picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        self._run.log({name: self._image(picture)}, step=iteration)

    def close(self) -> None:
        self._run.finish()


def refuse_tracker(tracker: str) -> None:
    """Raise InputError for a tracker that is unknown or not installed."""
    if tracker not in TRACKERS:
        raise InputError(f"the tracker {tracker!r} is not one of {', '.join(TRACKERS)}")
    try:
        if tracker == "tensorboard":
            import torch.utils.tensorboard  # noqa: F401
        if tracker == "wandb":
            import wandb  # noqa: F401
    except ImportError:
        raise InputError(f"tracker {tracker} is not installed; pip install -e '.[tracking]'") from None


def open_tracker(tracker: str, folder: Path, settings: Mapping) -> Tracker:
    """The tracker of that name, for the run in ``folder``."""
    if tracker == "tensorboard":
        return _TensorBoard(folder)
    return _WandB(folder, settings) if tracker == "wandb" else Tracker()
