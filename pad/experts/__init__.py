"""Expert networks: which images they see when, and how they are trained."""
