"""Attaching a pipeline to a transformers model, and taking it off again.

Attention and mask function are registered once, under one name. Attaching switches the model to
that name and notes which session its attention modules belong to; leaving the context restores
both, whatever happened inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from sah_core import compat
from sah_core.attention import Session
from sah_core.pipeline import Pipeline

if TYPE_CHECKING:
    from torch import Tensor


@attrs.define
class Switched:
    """A configuration object that is set to our attention, by one block or several.

    Attributes:
        config: The configuration; several models may share it.
        before: The implementation that it had before the first block.
        blocks: Blocks that need it.
    """

    config: Any
    before: str
    blocks: int = 0


_sessions: dict[int, Session] = {}
_switched: dict[int, Switched] = {}
_bystander: list[Session] = []


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function behind transformers' attention interface.

    A model that merely shares its configuration object with an attached one ends up here too; it
    runs dense.
    """
    session = _sessions.get(id(module))
    if session is None:
        if not _bystander:
            _bystander.append(Session(Pipeline.dense(), ()))
        session = _bystander[0]
    return compat.run_attention(session, module, query, key, value, attention_mask, scaling, kwargs)


@contextmanager
def attach(
    model: Any,
    pipeline: Pipeline | str,
    *,
    backend: str | None = None,
    observers: Sequence[object] = (),
) -> Iterator[Session]:
    """Run a model's attention through a pipeline for the duration of a ``with`` block.

    The model is restored on every exit, errors and Ctrl-C included. Blocks may be nested; the
    innermost one of a model counts. For the pipeline ``dense`` nothing is patched. A pass with
    ``output_attentions=True`` returns the weights with which the pipeline attended; they are
    computed beside it.

    Args:
        model: A transformers causal language model.
        pipeline: The pipeline, or its text.
        backend: Backend for sparse calls; the pipeline's when None.
        observers: Objects with observer hooks.

    Yields:
        The session, whose ``phase`` may be set where shapes do not tell it (a prefill in chunks).

    Raises:
        UnsupportedError: If the model's attention does not go through the attention interface; it
            is tried once, on a few tokens (`sah_core.probing`); or if a masker needs an input that
            is not given.
        ArtifactError: If an artefact is not there, or was made from other weights.
        PipelineError: If the pipeline applies to no layer of the model.
    """
    from sah_core.probing import check_fit

    parsed = Pipeline.parse(pipeline)
    check_fit(model, parsed)
    session = Session(parsed, compat.layer_types(model), backend=backend, observers=observers)
    with use(model, session), _checked_caches(model, session):
        yield session


@contextmanager
def _checked_caches(model: Any, session: Session) -> Iterator[None]:
    """Look at the caches that a caller runs a model with, each before its first pass: one that is
    not known is refused, and what maskers keep follows the sequences of the others where they
    change places (beam search).
    """
    if session.pipeline.is_dense:
        yield
        return
    argument = compat.cache_argument(type(model).forward)
    latest: list[Any] = []  # one at most: the caches of earlier texts are not to be kept alive

    with ExitStack() as guard:

        def before(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            given = named.get(argument)
            if given is None or (latest and latest[0] is given):
                return
            compat.check_cache(given)
            latest[:] = [given]
            guard.close()
            guard.enter_context(compat.followed(given, session.reorder))

        hook = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def use(model: Any, session: Session, *, always: bool = False) -> Iterator[Session]:
    """Attach an existing session, which keeps its state from block to block.

    Args:
        model: The model.
        session: The session.
        always: Patch for a dense pipeline too.
    """
    modules = [id(module) for module in compat.attention_modules(model)]
    previous = {module: _sessions.get(module) for module in modules}
    idle = session.pipeline.is_dense and session.hook is None and not always
    if idle and not any(previous.values()):
        yield session
        return
    compat.check_supported(model)
    compat.register(attention)
    taken = []
    try:
        for config in compat.attention_configs(model):
            before = compat.implementation_of(config)
            _switched.setdefault(id(config), Switched(config, before)).blocks += 1
            taken.append(config)
            compat.set_implementation(config, compat.IMPLEMENTATION)
        _sessions.update(dict.fromkeys(modules, session))
        yield session
    finally:
        for module, earlier in previous.items():
            if earlier is None:
                _sessions.pop(module, None)
            else:
                _sessions[module] = earlier
        for config in taken:
            entry = _switched[id(config)]
            entry.blocks -= 1
            if not entry.blocks:
                compat.set_implementation(config, _switched.pop(id(config)).before)


@contextmanager
def set_apart(model: Any, kv_cache: Any, fresh: Callable[[], Session]) -> Iterator[None]:
    """Keep passes over another cache than ``kv_cache`` away from the session that is attached.

    During generation a model may run over other texts too: the unconditional branch of guidance,
    drafts of the model's own first layers. Each gets a session of its own, which begins with the
    pass that begins the cache.

    Args:
        model: The model.
        kv_cache: The cache of the attached session.
        fresh: Makes a session for another cache.
    """
    argument = compat.cache_argument(type(model).forward)
    others: list[Session] = []
    passes: list[ExitStack] = []

    def before(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        passes.append(ExitStack())
        given = named.get(argument)
        if given is kv_cache:
            return
        if not others or given is None or not given.get_seq_length():
            others[:] = [fresh()]
        passes[-1].enter_context(use(model, others[0]))
        passes[-1].enter_context(compat.left_padding(()))

    def after(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        passes.pop().close()

    with compat.hooked(model, before, after, always=True):
        yield
