"""Maskers, one module per registered name."""
