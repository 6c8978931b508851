"""The adapter for Hugging Face transformers causal language models."""
