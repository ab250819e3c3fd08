#!/usr/bin/env python
"""Take the first images of each class in a difficulty ranking as a training set. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import coreset  # noqa: E402

if __name__ == "__main__":
    sys.exit(coreset())
