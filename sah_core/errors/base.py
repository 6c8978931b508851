"""The base of all errors."""


class SahError(Exception):
    """The base of every error that this project raises on purpose."""
