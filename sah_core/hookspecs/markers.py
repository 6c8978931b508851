"""The marks that a hook and its implementations carry."""

import pluggy

PROJECT = "sah"

hookspec = pluggy.HookspecMarker(PROJECT)
"""Marks a method as the specification of the hook of its name."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function or method as the implementation of the hook of its name."""
