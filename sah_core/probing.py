"""Whether a model can be patched, found out by running it.

Declarations of a model class say little: some models that use the attention interface do not
declare it, and some that declare it add something to their attention that neither mask nor cache
shows. So every model is tried once on a few tokens before its first sparse pass: reading them in
one go with its own attention, and in pieces (prefill, question, decode steps) on a cache of ours
through our attention with nothing left out. Both must give the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import attrs
import torch
from torch import Tensor

from sah_core import compat
from sah_core.allowed import Allowed
from sah_core.attention import Session, cannot_reorder, check_layers
from sah_core.errors import PipelineError, SahError, UnsupportedError, one_line
from sah_core.origin import check_origin
from sah_core.patching import use
from sah_core.pipeline import Pipeline
from sah_core.randomness import Random
from sah_core.state import LayerInfo

PIECES = (7, 4, 1, 1, 1)
"""Tokens of prefill, question and decode steps in a trial."""
PHASES = (7, 4, 3)
"""The same tokens by phase, each of which must be right."""
FIRST_TOKEN = 10
"""Low token ids, none of which stands for an image."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4}
"""Relative error of the logits of a token that rounding may cause; `TOLERANCE_16` for types of 16
bits.
"""
TOLERANCE_16 = 0.1

PADDING = 3
"""Leading tokens of padding in a trial."""
GIVEN = frozenset({"lse", "window_queries"})
"""Optional inputs that a session gives to maskers that declare the need."""

_passed: WeakKeyDictionary[Any, dict[int, LayerInfo]] = WeakKeyDictionary()
_read: WeakSet[Any] = WeakSet()
_padded: WeakSet[Any] = WeakSet()


class _ForgetfulCacheError(UnsupportedError):
    """A cache drops keys that attention may read, however the model is run."""


def check_model(model: Any) -> None:
    """Try a model once; later calls for it return at once.

    Args:
        model: A transformers causal language model.

    Raises:
        UnsupportedError: If its attention cannot be patched, with what is in the way.
    """
    if model in _passed:
        return
    compat.check_supported(model)
    types = compat.layer_types(model)
    ids = _tokens(model, sum(PIECES))
    with torch.no_grad(), evaluating(model):
        with _foreign(model, "a forward pass of token ids alone"), compat.own_attention(model):
            dense = model(input_ids=ids, use_cache=False).logits[0]
        session = Trial(types)
        with use(model, session, always=True):
            pieces = _in_pieces(
                model, ids, "a forward pass through our attention and a cache", session
            )
    if _differ(pieces, dense):
        raise _refused(
            model,
            "its logits change when its attention goes through the interface and a cache, so it "
            "does something there that is not known",
        )
    _passed[model] = session.layer_infos


def check_reading(model: Any) -> None:
    """Try a model that is to run dense: whether it reads a text in pieces, on a cache, as at once.

    What `check_model` accepts is fine; of any other model its own attention is tried.

    Args:
        model: A transformers causal language model.

    Raises:
        UnsupportedError: If it does not, or its cache is not known.
    """
    if model in _passed or model in _read:
        return
    try:
        check_model(model)
    except _ForgetfulCacheError:
        raise
    except UnsupportedError:
        ids = _tokens(model, sum(PIECES))
        with torch.no_grad(), evaluating(model), compat.own_attention(model):
            with _foreign(model, "a forward pass of token ids alone"):
                dense = model(input_ids=ids, use_cache=False).logits[0]
            pieces = _in_pieces(model, ids, "a forward pass with a cache")
        if _differ(pieces, dense):
            raise _refused(
                model,
                "its logits change when a text is read in pieces on a cache, as context, question "
                "and answer are",
            ) from None
        _read.add(model)


def _in_pieces(model: Any, ids: Tensor, what: str, trial: Trial | None = None) -> Tensor:
    """Logits of tokens that come piece by piece on a cache of ours."""
    kv_cache = compat.make_cache(model, sum(PIECES))
    argument = compat.cache_argument(type(model).forward)
    parts = []
    for piece in ids.split(PIECES, dim=1):
        if trial is not None:
            trial.start_pass()
        with _foreign(model, what):
            output = model(input_ids=piece, use_cache=True, **{argument: kv_cache})
        parts.append(output.logits[0])
        if trial is not None:
            trial.check_pass(model, kv_cache)
    return torch.cat(parts)


def _differ(found: Tensor, expected: Tensor) -> bool:
    """Whether the logits of some phase are others."""
    pairs = zip(found.split(PHASES), expected.split(PHASES), strict=True)
    return max(relative_error(*pair) for pair in pairs) > _tolerance(expected)


def check_padding(model: Any) -> None:
    """Try once whether a model reads a text behind left padding as it reads it alone; later calls
    for it return at once.

    Args:
        model: A transformers causal language model.

    Raises:
        UnsupportedError: If it does not: some models count positions whatever they are told.
    """
    if model in _padded:
        return
    ids = _tokens(model, PIECES[0])
    padding = torch.zeros(1, PADDING, dtype=torch.long, device=ids.device)
    real = torch.cat([padding, torch.ones_like(ids)], 1)
    with (
        torch.no_grad(),
        evaluating(model),
        compat.own_attention(model),
        _foreign(model, "a forward pass of left-padded token ids"),
    ):
        alone = model(input_ids=ids, use_cache=False).logits[0]
        padded = model(
            input_ids=torch.cat([padding, ids], 1),
            attention_mask=real,
            position_ids=(real.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).logits[0, PADDING:]
    if relative_error(padded, alone) > _tolerance(alone):
        raise UnsupportedError(
            what=f"a left-padded batch with model class {type(model).__name__}",
            reason="its logits change with the padding; ask one request at a time (batch size 1)",
        )
    _padded.add(model)


def _tokens(model: Any, count: int) -> Tensor:
    """Token ids for a trial, ``(1, count)``, where the model takes them."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(FIRST_TOKEN, FIRST_TOKEN + count, device=compat.input_device(model))
    return ids.remainder(int(vocabulary)).view(1, -1)


def _tolerance(logits: Tensor) -> float:
    return TOLERANCE.get(logits.dtype, TOLERANCE_16)


def check_fit(model: Any, pipeline: Pipeline) -> None:
    """Refuse to run a pipeline on a model where it would go wrong, or do nothing, unnoticed.

    Args:
        model: A transformers causal language model.
        pipeline: What is to run; a dense one fits every model.

    Raises:
        UnsupportedError: If the model's attention cannot be patched, or a masker needs an input
            that is not given.
        PipelineError: If the pipeline applies to no layer.
        ArtifactError: If an artefact is not there, or was made from other weights.
    """
    compat.check_is_model(model)
    if not pipeline.is_dense:
        types = compat.layer_types(model)
        check_layers(pipeline, len(types))
        check_model(model)
        check_applies(pipeline, types)
        check_needs(pipeline)
        check_origin(pipeline, model)


def check_applies(pipeline: Pipeline, layer_types: Sequence[str]) -> None:
    """Refuse a pipeline that would leave a whole model dense without a word.

    Raises:
        PipelineError: If it applies to no layer.
    """
    if any(
        pipeline.is_sparse(layer, kind, phase)
        for layer, kind in enumerate(layer_types)
        for phase in pipeline.phases
    ):
        return
    kinds = ", ".join(dict.fromkeys(layer_types))
    raise PipelineError(
        f"pipeline '{pipeline.text}' applies to no layer of the model, whose layers are of type "
        f"{kinds}; choose them by layer_types (such as layer_types=[{kinds}]), layers and "
        "dense_layers."
    )


def check_needs(pipeline: Pipeline) -> None:
    """Refuse a masker that needs an input which a session does not give.

    Raises:
        UnsupportedError: With the input's name.
    """
    for step in pipeline.steps:
        for need in sorted(step.capabilities.needs - GIVEN):
            raise UnsupportedError(
                what=f"masker {step.name!r}",
                reason=f"it needs {need}, and of the optional inputs only "
                f"{' and '.join(sorted(GIVEN))} are given on a model",
            )


def refuses_order(model: Any, pipeline: Pipeline) -> tuple[str, str] | None:
    """The first masker whose state cannot follow sequences that change places, and why; None if all
    can.

    Nothing is read: a state of each is made for one layer, such as one sequence would have.

    Args:
        model: A transformers causal language model.
        pipeline: What is to run.

    Raises:
        UnsupportedError: As `check_fit`, or as a masker does that does not fit the model.
        PipelineError: As `check_fit`.
        ArtifactError: As `check_fit`.
    """
    check_fit(model, pipeline)
    if pipeline.is_dense:
        return None
    types = compat.layer_types(model)
    sparse = (
        info
        for layer, info in sorted(_passed[model].items())
        if any(pipeline.is_sparse(layer, types[layer], phase) for phase in pipeline.phases)
    )
    info = next(sparse, None)
    for index, step in enumerate(pipeline.steps):
        state = None
        if info is not None and step.is_stateful():
            random = Random(seed=pipeline.seed, step=index, layer=info.index)
            state = step.init_state(attrs.evolve(info, random=random))
        reason = cannot_reorder(step, state)
        if reason:
            return step.name, reason
    return None


class Trial(Session):
    """A dense session that notes which layers reach it, and what a masker may know of them."""

    def __init__(self, layer_types: tuple[str, ...]) -> None:
        super().__init__(Pipeline.dense(), layer_types)
        self.calls: list[int] = []
        self.windows: dict[int, int | None] = {}
        self.layer_infos: dict[int, LayerInfo] = {}

    def start_pass(self) -> None:
        """Forget the layers of the last forward pass."""
        self.calls.clear()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Allowed,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As of any session."""
        self.calls.append(layer)
        self.windows[layer] = allowed.window
        self.layer_infos[layer] = LayerInfo(
            index=layer,
            count=len(self.layer_types),
            batch=1,
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=key.shape[3],
            value_dim=value.shape[3],
            capacity=key.shape[2],
            first=None,
            dtype=key.dtype,
            device=key.device,
        )
        return super().attend(layer, query, key, value, allowed, *args, **kwargs)

    def check_pass(self, model: Any, kv_cache: Any) -> None:
        """Refuse a model some layers of which did not attend, or did so twice, or forget keys that
        they may attend, which the few tokens of a trial do not show.
        """
        for layer, layer_type in enumerate(self.layer_types):
            count = self.calls.count(layer)
            if count > 1:
                raise _refused(model, f"its layer {layer} attends {count} times in one pass")
            if not count and layer_type.endswith("_attention") and "linear" not in layer_type:
                raise _refused(
                    model,
                    f"its layer {layer} ({layer_type}) does not reach transformers' attention "
                    "interface",
                )
            kept = compat.window_of(kv_cache.layers[layer]) if count else None
            window = self.windows.get(layer)
            if kept is not None and (window is None or window > kept):
                limit = "no window" if window is None else f"a window of {window}"
                raise _ForgetfulCacheError(
                    what=_model_class(model),
                    reason=f"its configuration lets the cache of layer {layer} ({layer_type}) "
                    f"forget all but {kept} tokens, but its attention has {limit}; correct the "
                    "configuration (sliding_window, attention_chunk_size, layer_types)",
                )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The median over tokens of the relative error of their logits: in types of 16 bits a router
    may send a token to another expert.
    """
    difference = (found.double() - expected.double()).norm(dim=-1)
    return float((difference / expected.double().norm(dim=-1).clamp(min=1e-12)).median())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _foreign(model: Any, what: str) -> Iterator[None]:
    """Turn whatever a model raises when it is tried into one line, but for a lack of memory."""
    try:
        yield
    except (SahError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the code of a foreign model raises what it likes
        text = one_line(f"{type(error).__name__}: {error}")
        raise _refused(model, f"{what} fails ({text})") from error


def _refused(model: Any, reason: str) -> UnsupportedError:
    return UnsupportedError(what=_model_class(model), reason=reason)


def _model_class(model: Any) -> str:
    return f"model class {type(model).__name__}"
