#!/usr/bin/env python
"""PAD on CIFAR-10 by the paper's values, in the time that is given: published_scale.py --minutes 60. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import at_published_scale  # noqa: E402

if __name__ == "__main__":
    sys.exit(at_published_scale())
