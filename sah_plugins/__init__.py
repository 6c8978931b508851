"""Plugins that ship with Sparse Attention Hub, each found through its entry point."""
