"""Scorers, one module per family of metrics, named as registered."""
