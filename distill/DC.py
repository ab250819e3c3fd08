#!/usr/bin/env python
"""Match gradients (DC, DSA): optimise synthetic images whose gradients are those of real ones. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import match_gradients  # noqa: E402

if __name__ == "__main__":
    sys.exit(match_gradients())
