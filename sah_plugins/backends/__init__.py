"""Attention backends, one module per registered name."""
