"""What generated benchmarks share: running text, random draws, fitting to a number of tokens.

A library; it holds no plugins.
"""
