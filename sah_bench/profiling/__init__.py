"""What ``sah-bench profile`` measures: attention calls and whole decode steps."""
