"""Values of an experiment with the place where each stands, so that errors can name it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import attrs

from sah_core.errors import ExperimentError, SahError, nearest_names, short_repr

T = TypeVar("T")


@attrs.frozen
class Place:
    """Where a value stands, for errors.

    Attributes:
        path: The file, or the flag.
        where: The place in the file, such as ``pipelines[1]``.
    """

    path: str
    where: str = ""

    def at(self, step: str | int) -> Place:
        """The place of an item or of a key inside the value that stands here."""
        if isinstance(step, int):
            return Place(self.path, f"{self.where}[{step}]" if self.where else "")
        return Place(self.path, f"{self.where}.{step}" if self.where else step)

    def error(self, message: str) -> ExperimentError:
        """The error that names this place; the caller raises it."""
        return ExperimentError(self.path, self.where, message)

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Give this place to whatever error comes from inside."""
        try:
            yield
        except ExperimentError:
            raise
        except SahError as error:
            raise ExperimentError(self.path, self.where, str(error)) from error


@attrs.frozen
class Values:
    """The values of an experiment by key, flags before the file, each with its place.

    Attributes:
        document: The file's values.
        path: The name of the file.
        flags: The flags' values, by the key that means the same; None where a flag was not given.
        keys: All keys, with the name of the flag.
    """

    document: Mapping[str, Any]
    path: str
    flags: Mapping[str, Any]
    keys: Mapping[str, str | None]

    def check_keys(self) -> None:
        """Refuse a file with a key that means nothing."""
        for key in self.document:
            if key not in self.keys:
                nearest = nearest_names(str(key), self.keys)
                known = f"the keys are {', '.join(self.keys)}."
                hint = f"did you mean {nearest[0]!r}?" if nearest else known
                raise Place(self.path).error(f"unknown key {short_repr(key)}. {hint}")

    def get(self, key: str) -> tuple[Any, Place]:
        """The value of a key, None if it has none, and its place."""
        if self.flags.get(key) is not None:
            return self.flags[key], Place(self.keys[key] or key)
        return self.document.get(key), Place(self.path, key)

    def items(self, key: str) -> Iterator[tuple[Any, Place]]:
        """The items of a list, or the one item that stands there without a list."""
        value, place = self.get(key)
        if not isinstance(value, list | tuple):
            if value is not None:
                yield value, place
            return
        for index, item in enumerate(value):
            yield item, place.at(index)

    def needed(self, key: str, what: str) -> list[tuple[Any, Place]]:
        """The items of a list that must have one; `what` says of what it is."""
        found = list(self.items(key))
        if not found:
            flag = self.keys[key]
            where = f"{self.path} needs" if self.path else "give"
            raise ExperimentError(
                self.path or "sah-bench run",
                key if self.path else "",
                f"{where} at least one {what}: set {key!r} in the file or give {flag}.",
            )
        return found

    def number(self, key: str, *, minimum: int) -> int | None:
        """An integer from `minimum` up, or None if there is no value."""
        value, place = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise place.error(
                f"{short_repr(value)} is not allowed: expected an integer >= {minimum}."
            )
        return value

    def text(self, key: str) -> str | None:
        """A text that is not empty, or None if there is no value."""
        value, place = self.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            raise place.error(f"{short_repr(value)} is not allowed: expected a text.")
        return value


def distinct(found: Sequence[tuple[T, Place]], key: Callable[[T], str]) -> tuple[T, ...]:
    """The values, of which no two may have the same key."""
    seen: dict[str, Place] = {}
    for value, place in found:
        earlier = seen.setdefault(key(value), place)
        if earlier is not place:
            where = f": it stands at {earlier.where} too" if earlier.where else ""
            raise place.error(f"{short_repr(key(value))} is given twice{where}.")
    return tuple(value for value, _ in found)
