"""Peak memory is that of the work alone."""

from pathlib import Path

import pytest
import torch

from pad import peak
from pad.allocator import keep_freed_memory
from pad.peak import measure_peak

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


@linux
def test_what_was_freed_before_does_not_count():
    size = 64_000_000
    keep_freed_memory()  # as commands do
    measured = measure_peak(CPU)
    idle = measured()
    torch.ones(size, dtype=torch.uint8)
    assert 0.9 * size < measured() - idle < 1.5 * size
    assert measure_peak(CPU)() < idle + 0.5 * size


def test_where_it_cannot_be_measured_it_is_not_known(monkeypatch):
    def refused():
        raise PermissionError

    monkeypatch.setattr(peak, "forget_peak", refused)
    assert measure_peak(CPU)() is None
