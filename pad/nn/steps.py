"""Training steps as data: which images each is on and how they are augmented, where repeated work finds it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pad.data.augment import Augmentation, Draw
from pad.data.placement import to_device
from pad.distributed import Ranks
from pad.nn.replay import Replay, Row


@dataclass(frozen=True)
class Step:
    """One step: which images ``indices [B]`` it trains on and how they are augmented."""

    indices: Tensor
    draw: Draw | None

    def share(self, ranks: Ranks) -> tuple["Step", float]:
        """What this rank takes of the mini-batch, and how much of it that is, in 0..1 (0 where images are too few)."""
        n = len(self.indices)
        part = slice(n * ranks.rank // ranks.size, n * (ranks.rank + 1) // ranks.size)
        indices, draw = self.indices[part], self.draw
        if draw is not None and len(draw.u) == n:  # otherwise all images share one row
            draw = Draw(draw.kind, draw.u[part])
        return Step(indices, draw), len(indices) / n


def epoch_steps(order: Tensor, batch: int, augmentation: Augmentation, rng: torch.Generator) -> list[Step]:
    """The steps of an epoch: ``batch`` at a time of the indices ``order``, each with its draw."""
    return [Step(some, augmentation.draw(len(some), rng)) for some in order.split(batch)]


class Plan:
    """Steps, which lie on the CPU, for a device: by row, all of them sent there at once.

    ``name``: of their memory, where work is captured; ``most``: steps that it is for. On a CPU, where nothing is
    captured, they stay as they are.
    """

    def __init__(
        self, steps: list[Step], replay: Replay, device: torch.device, name: str = "", most: int | None = None
    ) -> None:
        self._steps = steps
        self._rows: list[Tensor] = []
        if replay.captures or device.type != "cpu":
            columns = {
                "indices": [step.indices for step in steps],
                "u": [step.draw.u for step in steps if step.draw and not step.draw.on_host],
            }
            for what, column in columns.items():
                if column:
                    rows = column[0].new_zeros(len(column), max(map(len, column)), *column[0].shape[1:])
                    for row, each in zip(rows, column):
                        row[: len(each)] = each
                    size = most or len(rows), *rows.shape[1:]
                    buffer = replay.buffer(f"{what} {name}", rows.new_empty(0, device=device), *size)
                    buffer[: len(rows)] = to_device(rows, device)
                    self._rows.append(buffer)

    def key(self, i: int) -> tuple:
        """What the kernels of step ``i`` depend on: its sizes and kind, and the sizes of the memory it is read from."""
        indices, draw = self._steps[i].indices, self._steps[i].draw
        return len(indices), draw and (draw.kind, len(draw.u)), *(rows.shape for rows in self._rows)

    def step(self, i: int, at: Row) -> Step:
        """Step ``i``, at whose row ``at`` is, on the device."""
        step = self._steps[i]
        if not self._rows:
            return step
        indices, *u = (at.of(rows) for rows in self._rows)
        draw = Draw(step.draw.kind, u[0][: len(step.draw.u)]) if step.draw and u else step.draw
        return Step(indices[: len(step.indices)], draw)
