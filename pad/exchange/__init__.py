"""Synthetic sets from and to the files of others."""
