"""How a check says what it found."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterable
from typing import Literal, NoReturn, TypeVar

import attrs

from sah_core.benchmark import Benchmark
from sah_core.errors import one_line
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
        """Whether the plugin does what it must."""
        return self.status == "passed"

    @property
    def failed(self) -> bool:
        """Whether the plugin does something that it must not."""
        return self.status == "failed"


class CheckSkipped(unittest.SkipTest):
    """A check cannot apply to this plugin; the message says why.

    As a `unittest.SkipTest` it makes a skipped test under pytest too.
    """


Check = Callable[[Masker], None]

Subject = TypeVar("Subject", Masker, Benchmark)


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


def run_each(subject: Subject, checks: Iterable[Callable[[Subject], None]]) -> list[CheckResult]:
    """Run checks over a plugin; whatever it raises fails the check during which it did."""
    results = []
    for check in checks:
        status: Literal["passed", "failed", "skipped"] = "failed"
        message = ""
        try:
            check(subject)
        except AssertionError as error:
            message = str(error) or "an assertion without a message failed"
        except CheckSkipped as error:
            status, message = "skipped", str(error)
        except Exception as error:  # a plugin under test may raise anything
            message = f"{subject.name}: raised {type(error).__name__}: {one_line(str(error))}"
        else:
            status = "passed"
        name = check.__name__.removeprefix("check_")
        results.append(CheckResult(name=name, status=status, message=message))
    return results
