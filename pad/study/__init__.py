"""Studies: a grid of whole pipelines, and its report."""
