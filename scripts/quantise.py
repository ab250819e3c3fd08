#!/usr/bin/env python
"""Store a synthetic set in fewer bits. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import quantise  # noqa: E402

if __name__ == "__main__":
    sys.exit(quantise())
