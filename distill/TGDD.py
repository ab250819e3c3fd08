#!/usr/bin/env python
"""Match distributions along trajectories (TGDD): mean features under snapshots of experts. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import match_along_trajectories  # noqa: E402

if __name__ == "__main__":
    sys.exit(match_along_trajectories())
