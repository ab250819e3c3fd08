#!/usr/bin/env python
"""Match the influence that real images have on experts (Inf-Match). See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import match_influence  # noqa: E402

if __name__ == "__main__":
    sys.exit(match_influence())
