"""The `sah-bench` command: assembles pipelines and benchmark matrices from registered names."""
