#!/usr/bin/env python
"""Match characteristic functions (NCFM): amplitude and phase of the features of real images. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import match_characteristics  # noqa: E402

if __name__ == "__main__":
    sys.exit(match_characteristics())
