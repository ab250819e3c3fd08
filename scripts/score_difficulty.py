#!/usr/bin/env python
"""Rank the training images of a data set by difficulty, by one method or many. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import score  # noqa: E402

if __name__ == "__main__":
    sys.exit(score())
