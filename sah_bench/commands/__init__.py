"""The subcommands of ``sah-bench``, one module each, imported when called."""
