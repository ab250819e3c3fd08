#!/usr/bin/env python
"""Write one HTML page of a run or a study: report.py logged_files/CIFAR10/10/ConvNet/IPC10-seed0. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import report  # noqa: E402

if __name__ == "__main__":
    sys.exit(report())
