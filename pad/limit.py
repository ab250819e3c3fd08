"""How long work may take."""

import math
import time
from collections.abc import Callable


class TimeLimit:
    """So many ``seconds`` from now on, by a ``clock`` in seconds. None, which the attribute has as inf, is no limit."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.seconds = math.inf if seconds is None else seconds
        self._clock, self._began = clock, clock()

    @property
    def used(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._began

    @property
    def left(self) -> float:
        """Seconds that are left; negative when it is over."""
        return self.seconds - self.used

    @property
    def is_over(self) -> bool:
        return self.left <= 0
