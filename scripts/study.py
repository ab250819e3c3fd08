#!/usr/bin/env python
"""Run a study, a grid of methods, sizes and seeds: study.py configs/studies/cifar10.yaml. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import study  # noqa: E402

if __name__ == "__main__":
    sys.exit(study())
