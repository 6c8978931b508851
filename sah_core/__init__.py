"""The core of Sparse Attention Hub."""
