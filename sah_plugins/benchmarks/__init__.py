"""Benchmarks, one module or folder per registered name."""
