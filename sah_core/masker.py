"""The masker: one method of choosing keys, which is nothing but its parameters and a function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import attrs

from sah_core.parameters import Size, check_names, from_plain, specs

if TYPE_CHECKING:
    from torch import Tensor

    from sah_core.artifacts import ConvertTool, ModelTool
    from sah_core.inputs import Inputs
    from sah_core.mask import Mask
    from sah_core.pipeline import Pipeline
    from sah_core.state import LayerInfo, State

_EXAMPLE_TOKENS = 8


@attrs.frozen(kw_only=True)
class Capabilities:
    """What a masker declares about itself.

    Attributes:
        stochastic: It samples; a pipeline has at most one such step.
        prunes: It may remove keys that earlier steps selected (Twilight).
        restricts: It removes only what may not be attended anyway (an AND, such as `causal`).
        position_only: Its choice depends on positions alone, not on query, key, value or layer; the
            core then computes it once per forward pass instead of once per layer.
        shares_layers: It hands choices from layer to layer through ``request_state``.
        page_granular: It selects whole pages.
        unbounded: Its budget depends on the content (top-p, adaptive), so that the capacity is not
            known to the host unless its parameter ``max_size`` is given.
        keys_only: `Masker.append` never looks at the values, so that under graph capture they need
            not be gathered; it gets none there.
        needs: Optional inputs that it reads: ``window_queries`` of `Inputs`, and ``lse`` in
            `Masker.after_attention`. The names ``hidden_states``, ``query_pre_rope`` and
            ``key_pre_rope`` are reserved; a masker that needs them is refused on a model.
    """

    stochastic: bool = False
    prunes: bool = False
    restricts: bool = False
    position_only: bool = False
    shares_layers: bool = False
    page_granular: bool = False
    unbounded: bool = False
    keys_only: bool = False
    needs: frozenset[str] = frozenset()


@attrs.frozen(kw_only=True)
class Masker:
    """Base of all maskers.

    Subclasses are attrs-frozen classes whose fields are their parameters (`sah_core.param`), carry
    the registered ``name`` and override `add_mask`. Whatever changes from call to call is an
    argument, never an attribute.

    The state hooks are optional. ``append`` sees every key once, in order, in any chunking, before
    `add_mask` sees it; ``end_prefill`` is called once, when the context is complete.

    Attributes:
        name: The registered name.
        capabilities: What the method declares about itself.
        artifact_tools: What makes the files that the method needs, by the verb of
            ``sah-bench artifacts`` (``calibrate``, ``train``, ``convert``).
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    artifact_tools: ClassVar[Mapping[str, type[ModelTool] | type[ConvertTool]]] = MappingProxyType(
        {}
    )

    def __new__(cls, *args: object, **parameters: object) -> Self:
        """Refuse a parameter that is not declared, before attrs does so without a hint."""
        if parameters:
            check_names(cls, parameters)
        return super().__new__(cls)

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add what this method selects to what is already selected.

        Args:
            inputs: The attention call; not to be written to.
            previous: What earlier steps selected; not to be edited.

        Returns:
            ``previous`` united with this method's selection (less for steps that declare
            ``prunes``).
        """
        raise NotImplementedError

    def init_state(self, layer: LayerInfo) -> State | None:
        """Create this step's state for one layer of a request; None (the default) for stateless
        maskers.
        """
        return None

    def append(self, state: Any, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Take note of new keys.

        Args:
            state: What `init_state` returned.
            key: New keys ``(batch, kv_heads, new, head_dim)``.
            value: New values ``(batch, kv_heads, new, value_dim)``.
            start: Key index of the first of them; an int32 tensor ``(1,)`` under graph capture,
                where ``new`` is 1 and nothing may depend on a Python length.
        """

    def end_prefill(self, state: Any, inputs: Inputs) -> None:
        """The context is complete: ``inputs`` holds its keys and values, no query rows, and its
        last ones in ``window_queries`` if the need is declared.
        """

    def bytes_read(self, inputs: Inputs) -> int:
        """Bytes that choosing must read from memory in this call, attention itself not counted.

        A fact about the method, not about an implementation of it: the keys for one that scores
        every key, the labels for one that keeps labels, 0 (the default) for one that chooses by
        position. ``sah-bench profile`` takes it as the floor of the selection's time.

        Args:
            inputs: The attention call, with this step's state.
        """
        return 0

    def artifacts(self) -> Mapping[str, Path]:
        """The files that the selection depends on, by a name that says what each is.

        Their content is part of what a result is. The default names every parameter that is
        declared with ``param(artifact=True)`` and set; a masker that holds other maskers adds
        theirs.
        """
        values = {s.name: getattr(self, s.name) for s in specs(type(self)) if s.artifact}
        return {name: Path(value).expanduser() for name, value in values.items() if value}

    def check_artifacts(self) -> None:
        """Raise what is wrong with the files, as far as it shows without a model.

        Called before a run starts. The default requires that each can be opened; a masker that
        reads more of them says more.

        Raises:
            ArtifactError: If a file is missing or damaged.
        """
        from sah_core.artifacts import require_file

        for path in self.artifacts().values():
            require_file(path)

    def after_attention(self, state: Any, inputs: Inputs, mask: Mask, lse: Tensor | None) -> None:
        """Feedback after the attention of a sparse call was computed, layer by layer.

        Args:
            state: What `init_state` returned.
            inputs: The call, with its queries; ``state`` and random numbers are not set in it.
            mask: What the whole pipeline selected.
            lse: Log-sum-exp of each row, float32 ``(batch, heads, query_len)``, with which
                ``e^(l - lse)`` is the weight of a key; sure to be there only if ``needs`` names it.
        """

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Make an instance that the conformance checks can run on their small tensors.

        This one has the defaults of all parameters, but no size of more than 8 tokens: budgets
        that leave most of two hundred keys out say most. Override it where a parameter has no
        default, where an artefact (learned weights, a channel order) must be there, or where other
        parameters should be small as well.

        An artefact belongs to one model. `sah_core.testing.MODEL` is the one of the checks: its
        layers, heads, KV heads and channels. In a call with other numbers of heads the masker
        raises `UnsupportedError`, and the checks leave those calls out.

        Args:
            folder: An empty folder for small artefacts; it outlives the instance.
        """
        small = {
            spec.name: max(_EXAMPLE_TOKENS, int(spec.minimum or 0))
            for spec in specs(cls)
            if isinstance(spec.default, Size) and (spec.default.tokens or 0) > _EXAMPLE_TOKENS
        }
        return from_plain(cls, small)

    @classmethod
    def is_stateful(cls) -> bool:
        """Whether the class overrides `init_state`."""
        return cls.init_state is not Masker.init_state

    def __or__(self, other: Masker | Pipeline) -> Pipeline:
        from sah_core.pipeline import Pipeline

        return Pipeline.of(self) | other
