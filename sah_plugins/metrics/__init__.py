"""Metrics: observers that a run attaches by name."""
