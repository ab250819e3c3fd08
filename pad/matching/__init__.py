"""What is matched: each objective gives gradients of a synthetic set, and knows no settings."""
