#!/usr/bin/env python
"""Write expert trajectories as lines, two epochs of each (MCT). See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import convexify_buffer  # noqa: E402

if __name__ == "__main__":
    sys.exit(convexify_buffer())
