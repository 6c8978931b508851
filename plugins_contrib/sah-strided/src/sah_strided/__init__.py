"""Dilated windows and strided attention as plugins of the Sparse Attention Hub."""
