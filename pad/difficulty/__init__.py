"""How hard each real image is: scores, orderings, and the ranking of every class that PAD's curriculum filters by."""
