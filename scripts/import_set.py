#!/usr/bin/env python
"""Turn a synthetic set of others into a file that stage 3 reads. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, from any working directory

from pad.cli import import_set  # noqa: E402

if __name__ == "__main__":
    sys.exit(import_set())
