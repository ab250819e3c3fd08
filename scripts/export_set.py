#!/usr/bin/env python
"""Write a synthetic set in a form that other tools read. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import export_set  # noqa: E402

if __name__ == "__main__":
    sys.exit(export_set())
