"""PAD: dataset distillation by trajectory matching, with difficulty and depth filters (arXiv 2408.03360)."""

from pad.allocator import let_waiting_threads_sleep

__version__ = "0.1.0"

let_waiting_threads_sleep()
