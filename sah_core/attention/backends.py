"""Which backend executes a call."""

from __future__ import annotations

import logging
from typing import Any

import attrs

from sah_core.backend import Backend, Problem
from sah_core.errors import UnsupportedError
from sah_core.inputs import Inputs
from sah_core.mask import Mask
from sah_core.ops import Ops

log = logging.getLogger(__name__)


@attrs.frozen
class Fallback:
    """A backend that was asked for and refused.

    Attributes:
        requested: The backend that refused.
        reason: Why.
        used: The backend that ran instead.
    """

    requested: str
    reason: str
    used: str


class Choice:
    """The choice of backends of a session, made once per kind of call.

    Args:
        needs_lse: A masker of the pipeline reads the log-sum-exp.

    Attributes:
        fallbacks: Backends that refused, each reason once.
    """

    def __init__(self, *, needs_lse: bool = False) -> None:
        self.fallbacks: list[Fallback] = []
        self._needs_lse = needs_lse
        self._known: dict[tuple[str, Problem, bool], Backend] = {}
        self._ops: dict[Any, Ops] = {}
        self._made: dict[str, Backend | None] = {}

    def forget(self) -> None:
        """Choose anew from now on; refusals are noted again."""
        self._known.clear()
        self.fallbacks.clear()

    def ops_for(self, inputs: Inputs, requested: str) -> Ops:
        """The scoring primitives of the backend that is expected to run, asked once per kind of
        call: layers and steps differ in the number of keys alone.
        """
        facts = (
            requested,
            inputs.query.shape,
            inputs.query.dtype,
            inputs.query.device,
            inputs.key.shape[1],
            inputs.value.shape[3],
            inputs.allowed.keep is None,
            inputs.softcap is None,
            inputs.sinks is None,
            inputs.key_len is None,
        )
        if facts not in self._ops:
            nothing = Mask.empty(inputs.shape)
            backend = self.backend_for(inputs, nothing, requested=requested, quiet=True)
            self._ops[facts] = backend.ops
        return self._ops[facts]

    def backend_for(
        self,
        inputs: Inputs,
        mask: Mask,
        *,
        requested: str,
        quiet: bool = False,
        feedback: bool = True,
    ) -> Backend:
        """The backend for a call.

        Args:
            inputs: The call.
            mask: What it selects.
            requested: The backend to take if it accepts, else the capable one of the highest rank
                runs; ``auto`` has no preference.
            quiet: Do not note a fallback.
            feedback: The log-sum-exp is wanted where a masker of the pipeline needs it.

        Raises:
            UnsupportedError: If no backend accepts.
        """
        problem = Problem.of(inputs, mask, needs_lse=self._needs_lse and feedback)
        known = self._known.get((requested, problem, quiet))
        if known is not None:
            return known
        reasons: list[str] = []
        for name in candidates(requested, self._made):
            backend = self._made[name]
            if backend is None:
                continue
            reason = backend.refuses(problem)
            if reason is None:
                if requested not in ("auto", name) and not quiet:
                    self._note(Fallback(requested, reasons[0], name))
                self._known[requested, problem, quiet] = backend
                return backend
            reasons.append(f"{name}: {reason}" if name != requested else reason)
        raise UnsupportedError(
            what=f"attention of layer {inputs.layer} on {problem.device}",
            reason="; ".join(reasons) or "no backend is installed",
        )

    def _note(self, fallback: Fallback) -> None:
        if fallback not in self.fallbacks:
            self.fallbacks.append(fallback)
            log.warning(
                "backend %s refuses (%s); %s runs instead",
                fallback.requested,
                fallback.reason,
                fallback.used,
            )


def candidates(requested: str, made: dict[str, Backend | None]) -> list[str]:
    """Backend names in the order to try.

    Args:
        requested: The name of the first, or ``auto``.
        made: Takes an instance of each backend, None for one that cannot be made.

    Returns:
        The names of the backends that could be made.
    """
    from sah_core import registry

    if requested != "auto" and made.get(requested) is None:
        made[requested] = registry.backends[requested]()
    for name in registry.backends.names():
        if name not in made:
            try:
                made[name] = registry.backends[name]()
            except Exception as error:  # a foreign class may raise anything
                made[name] = None
                log.warning("backend %s is left out: %s", name, error)
    usable = {name: backend.rank for name, backend in made.items() if backend is not None}
    ranked = sorted(usable, key=lambda name: (-usable[name], name))
    if requested == "auto":
        return ranked
    return [requested, *(n for n in ranked if n != requested)]
