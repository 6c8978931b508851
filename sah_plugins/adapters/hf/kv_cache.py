"""How a context is to be read and kept: the options of ``generate`` that concern its cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from sah_core import RequestError, compat

IMPLEMENTATIONS = {
    "dynamic": "preallocated",
    "static": "preallocated",
    "sliding_window": "preallocated",
    "hybrid": "preallocated",
    "hybrid_chunked": "preallocated",
    "offloaded": "offloaded",
    "offloaded_static": "offloaded",
    "offloaded_hybrid": "offloaded",
    "offloaded_hybrid_chunked": "offloaded",
    "quantized": "quantised",
}
"""What keeps the context for every ``cache_implementation``: dynamic and static ones hold the same
keys, and differ in how they take memory.
"""


@attrs.frozen
class Keeping:
    """How a context is to be read and kept.

    Attributes:
        kind: ``preallocated``, ``offloaded`` or ``quantised``; None leaves it open.
        room: Tokens to take room for, at least.
        config: Options of a quantised cache.
        chunk: Tokens per pass while the context is read; None leaves it open.
    """

    kind: str | None = None
    room: int = 0
    config: dict[str, Any] = attrs.field(factory=dict)
    chunk: int | None = None

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Keeping:
        """Take these options out of others, which `check_options` has seen."""
        found = {
            name: options.pop(name, None)
            for name in ("cache_implementation", "cache_config", "max_cache_len")
        }
        implementation = found["cache_implementation"]
        return cls(
            kind=None if implementation is None else IMPLEMENTATIONS[implementation],
            room=found["max_cache_len"] or 0,
            config=dict(found["cache_config"] or {}),
            chunk=options.pop("prefill_chunk_size", None),
        )

    @property
    def reads_alone(self) -> bool:
        """Whether sequences have to be read one by one: scales of a quantised cache may be shared
        by the sequences of a batch, and by keys and padding.
        """
        return self.kind == "quantised"

    def new_cache(self, model: Any, tokens: int) -> Any:
        """An empty cache of this kind.

        Args:
            model: The model.
            tokens: Tokens to take room for.

        Raises:
            UnsupportedError: If the model's layers cannot be kept so.
        """
        if self.kind == "quantised":
            return compat.make_quantised_cache(model, self.config)
        room = max(tokens, self.room)
        return compat.make_cache(model, room, offloaded=self.kind == "offloaded")

    def check_answered(self, asked: Keeping) -> None:
        """Refuse to answer from a context that was kept otherwise than asked for.

        Args:
            asked: What the options of an answer say.

        Raises:
            RequestError: If they say something else than those of the prefill.
        """
        same = asked.kind in (None, self.kind or "preallocated") and (
            asked.kind != "quantised" or asked.config == self.config
        )
        if not same:
            raise RequestError(
                f"this context was read into a {self.kind or 'preallocated'} cache, and the answer "
                f"asks for another ({asked.kind}); give the same generation_kwargs to prefill"
            )


def check_keeping(options: Mapping[str, Any]) -> None:
    """Refuse combinations of these options that make no sense.

    Raises:
        RequestError: With the options.
    """
    implementation, config = options.get("cache_implementation"), options.get("cache_config")
    if config is not None and implementation != "quantized":
        raise RequestError("cache_config needs cache_implementation='quantized'")
    if implementation != "quantized":
        return
    wrong = compat.check_quantised(config or {}, beams=options.get("num_beams", 1) > 1)
    if wrong:
        raise RequestError(f"cache_implementation='quantized' cannot be used so: {wrong}")
