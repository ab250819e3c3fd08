"""PAD: dataset distillation by trajectory matching, with difficulty and depth filters (arXiv 2408.03360)."""

import os
import sys

from pad.allocator import let_waiting_threads_sleep

try:
    os.getcwd()
except FileNotFoundError:  # torch's mathematics would end the process when it is imported, with another sentence
    print("error: the current folder was removed; change to one that is there", file=sys.stderr)
    sys.exit(2)

__version__ = "0.1.0"

let_waiting_threads_sleep()
