"""Work that is done again and again on one row after another: on CUDA captured once, and then one launch each.

A training step launches some 250 kernels, and a card is done with them sooner than the host has launched them. A CUDA
graph is launched as a whole, but it always reads and writes the same memory, and what the host computed while it was
captured stays as it was. So work is written once for both ways: its tensors are :meth:`Replay.buffer`, it finds its
row by a :class:`Row`, and what else it depends on is in its key, or in what it ``reads``. The mathematics in it does
not know of this. :class:`Replay` does all work at once; :class:`Captured` captures it.

Source: CUDA graphs (torch.cuda.graphs; Ng et al., Accelerating PyTorch with CUDA Graphs, 2021).
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

log = logging.getLogger("pad")

Work = Callable[[], None]


class Row:
    """The row of tensors that repeated work is at."""

    def __init__(self) -> None:
        self._at = 0

    def start(self, at: int) -> None:
        """Begin at row ``at``."""
        self._at = at

    def of(self, rows: Tensor) -> Tensor:
        """That row of ``rows [N, ...]``."""
        return rows[self._at]

    def put(self, rows: Tensor, value: Tensor, ahead: int = 0) -> None:
        """Write ``value`` to the row that is ``ahead`` of this one."""
        rows[self._at + ahead] = value

    def move(self, by: int) -> None:
        """Go to another row: the last thing that repeated work does."""
        self._at += by


class _RowOnDevice(Row):
    """Its number lies on the device, where captured work finds it and changes it."""

    def __init__(self, device: torch.device) -> None:
        self._number = torch.zeros(1, dtype=torch.int64, device=device)

    def start(self, at: int) -> None:
        self._number.fill_(at)

    def of(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self._number)[0]

    def put(self, rows: Tensor, value: Tensor, ahead: int = 0) -> None:
        rows.index_copy_(0, self._number + ahead, value[None])

    def move(self, by: int) -> None:
        self._number.add_(by)


class Replay:
    """Does work as it comes."""

    captures = False

    def row(self, name: str) -> Row:
        """A row, to be started. Captured work has one of each name."""
        return Row()

    def buffer(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Memory of ``like``'s type, of its shape if no other is given, with anything in it.

        Captured work has one of each name and shape, the same each time.
        """
        return like.new_empty(shape or like.shape)

    def hold(self, name: str, value: Tensor) -> Tensor:
        """``value`` where captured work finds it, whatever tensor it comes in."""
        return value

    def run(self, key: tuple[Hashable, ...], work: Work, reads: Sequence[Tensor] = (), given: Hashable = None) -> None:
        """Do ``work``.

        key: which work it is: all that its kernels depend on and that is not in tensors, as kinds and sizes. reads:
        tensors it looks at that are neither buffers nor its own; they may have moved since. given: numbers of the host
        that it depends on, too; of several only the last are kept.
        """
        work()


AT_ONCE = Replay()


@functools.cache
def _pool(device: torch.device):
    """Memory of all graphs of a process: work writes its results to buffers, and is never done side by side."""
    return torch.cuda.graph_pool_handle()


class Graphs:
    """Captures by CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = _pool(device)
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def warming(self):
        """Work that is to be captured next: libraries set themselves up, on the stream that captures."""
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            yield
        here.wait_stream(self._stream)

    def capture(self, work: Work) -> Work:
        """What does ``work``, which is not done now, in one launch. Raises RuntimeError where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay


class Captured(Replay):
    """Does work as it comes the first time, captures it the second, and replays it from then on.

    Work that reads what has moved since, or is given other numbers, is captured anew. Work that cannot be captured is
    done as it comes, after a line that says why.
    """

    captures = True

    def __init__(self, device: torch.device, graphs: Graphs | None = None) -> None:
        self._device = device
        self._graphs = graphs or Graphs(device)
        self._buffers: dict[tuple, Tensor] = {}
        self._rows: dict[str, Row] = {}
        # By key: what was given, where lay what was read, and what replays, from the second time on.
        self._captured: dict[tuple, tuple[tuple, Work | None]] = {}
        self._possible = True

    def row(self, name: str) -> Row:
        return self._rows.setdefault(name, _RowOnDevice(self._device))

    def buffer(self, name: str, like: Tensor, *shape: int) -> Tensor:
        size = tuple(shape or like.shape)
        key = name, size, like.dtype
        if key not in self._buffers:
            self._buffers[key] = like.new_empty(size)
        return self._buffers[key]

    def hold(self, name: str, value: Tensor) -> Tensor:
        return self.buffer(name, value).copy_(value)

    def run(self, key: tuple[Hashable, ...], work: Work, reads: Sequence[Tensor] = (), given: Hashable = None) -> None:
        if not self._possible:
            return work()
        now = given, *((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in reads)
        before, replay = self._captured.get(key, (None, None))
        if before != now:
            self._captured[key] = now, None
            with self._graphs.warming():
                return work()
        if replay is None:
            try:
                replay = self._graphs.capture(work)
            except Exception as error:  # whatever it is: nothing was done yet, and what is wrong with the work shows
                self._possible = False
                self._captured.clear()
                why = (str(error).splitlines() or [type(error).__name__])[0]
                log.warning("steps are launched kernel by kernel: %s", why)
                return work()
            self._captured[key] = now, replay
        replay()


def replay_on(device: torch.device) -> Replay:
    """The faster way there is on ``device``."""
    return Captured(device) if device.type == "cuda" else AT_ONCE
