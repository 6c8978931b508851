"""The backend `triton`: fused sparse attention and scoring primitives on the GPU."""
