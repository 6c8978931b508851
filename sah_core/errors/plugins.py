"""Errors of plugins that cannot be found, chosen or used."""

import attrs

from sah_core.errors.base import SahError
from sah_core.errors.text import did_you_mean, one_line, short_repr


@attrs.define
class UnknownPluginError(SahError, LookupError):
    """No plugin of this kind has this name.

    Attributes:
        kind: the kind in the singular, such as ``masker``.
        name: the name that was asked for.
        nearest: registered names that look like it, nearest first.
    """

    kind: str
    name: str
    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"no {self.kind} named {short_repr(self.name)}.{did_you_mean(self.nearest)}"
            " see 'sah-bench plugins list'."
        )


@attrs.define
class BrokenPluginError(SahError):
    """A plugin is installed but cannot be used.

    Attributes:
        kind: the kind in the singular.
        name: the registered name.
        distribution: the distribution that ships it.
        entry_point: the entry point's value, ``module`` or ``module:attribute``.
        cause: the exception that loading it raised, or a text that says what is wrong with it.
    """

    kind: str
    name: str
    distribution: str
    entry_point: str
    cause: BaseException | str

    @property
    def reason(self) -> str:
        """The cause on one line, without the plugin's name."""
        if isinstance(self.cause, str):
            return one_line(self.cause)
        return one_line(f"{type(self.cause).__name__}: {self.cause}")

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.name!r} of distribution {self.distribution!r} "
            f"(entry point {self.entry_point!r}) is broken: {self.reason}. "
            f"repair or uninstall it, or set SAH_DISABLE_PLUGINS={self.name}."
        )


@attrs.define
class PluginConflictError(SahError):
    """Several distributions register one name, and the name alone was asked for.

    Attributes:
        kind: the kind in the singular.
        name: the registered name.
        distributions: the distributions that register it, sorted.
        path: the file that was being loaded, if it was one.
    """

    kind: str
    name: str
    distributions: tuple[str, ...]
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return (
                f"{self.path}: {self.kind} {self.name!r} is registered by "
                f"{self.distributions[0]!r} already. rename the class, or set "
                f"SAH_DISABLE_PLUGINS={self.distributions[0]}:{self.name}."
            )
        owners = " and ".join(repr(owner) for owner in self.distributions)
        choices = " or ".join(repr(f"{owner}:{self.name}") for owner in self.distributions)
        return f"{self.kind} {self.name!r} is registered by {owners}. choose one: {choices}."


@attrs.define
class PluginDisabledError(SahError):
    """The environment keeps the plugin out: ``SAH_DISABLE_PLUGINS`` or ``SAH_LOAD_PLUGINS``.

    Attributes:
        kind: the kind in the singular.
        name: the registered name.
        reason: which variable, and how.
    """

    kind: str
    name: str
    reason: str = "SAH_DISABLE_PLUGINS names it"

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.name!r} is disabled: the environment variable {self.reason}. "
            "change the variable to use it."
        )


@attrs.define
class IncompatiblePluginError(SahError):
    """The distribution of a plugin requires another version of this project.

    Attributes:
        kind: the kind in the singular.
        name: the registered name.
        distribution: the distribution that ships it.
        version: its version.
        reason: what it requires and what is installed.
    """

    kind: str
    name: str
    distribution: str
    version: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.name!r} of distribution {self.distribution!r} {self.version} "
            f"cannot be used: {self.reason}. upgrade the one or the other."
        )


@attrs.define
class PluginFileError(SahError):
    """A file cannot be loaded as a plugin.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"cannot load the plugin file {self.path!r}: {self.reason.rstrip('.')}.")


@attrs.define
class UnusablePluginsError(SahError):
    """Plugins are installed that cannot be used, and that is not to be.

    Attributes:
        plugins: per plugin its kind, its qualified name, its state and the reason.
    """

    plugins: tuple[tuple[str, str, str, str], ...]

    def __str__(self) -> str:
        listed = "; ".join(
            f"{kind} {name} is {'in ' if state == 'conflict' else ''}{state} ({reason})"
            for kind, name, state, reason in self.plugins
        )
        return one_line(f"not all plugins can be used: {listed}. see 'sah-bench plugins list'.")
