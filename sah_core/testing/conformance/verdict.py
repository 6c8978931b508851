"""How a check says what it found."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Literal, NoReturn

import attrs

from sah_core.masker import Masker


@attrs.frozen(kw_only=True)
class CheckResult:
    """How one check went.

    Attributes:
        name: The check, without ``check_``.
        status: ``passed``, ``failed`` or ``skipped``.
        message: What is wrong and what to change, or why the check cannot apply; empty if it
            passed.
    """

    name: str
    status: Literal["passed", "failed", "skipped"]
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether the masker does what it must."""
        return self.status == "passed"

    @property
    def failed(self) -> bool:
        """Whether the masker does something that it must not."""
        return self.status == "failed"


class CheckSkipped(unittest.SkipTest):
    """A check cannot apply to this masker; the message says why.

    As a `unittest.SkipTest` it makes a skipped test under pytest too.
    """


Check = Callable[[Masker], None]


def fail(masker: Masker, what: str, change: str) -> NoReturn:
    """Say what is wrong and what to change."""
    raise AssertionError(f"{masker.name}: {what}; {change}")


def require(holds: object, masker: Masker, what: str, change: str) -> None:
    """Fail unless something holds."""
    if not holds:
        fail(masker, what, change)


def skip(masker: Masker, why: str) -> NoReturn:
    """Say why a check cannot apply."""
    raise CheckSkipped(f"{masker.name}: {why}")
