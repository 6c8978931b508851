"""The backend: executes a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sah_core.inputs import Inputs
    from sah_core.mask import Mask
    from sah_core.ops import Ops


@attrs.frozen(kw_only=True)
class Problem:
    """The static facts of an attention call, on which a backend accepts or refuses it.

    Attributes:
        device: Device type, ``cpu`` or ``cuda``.
        dtype: Type of query, key and value.
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key/value heads.
        query_len: Query rows.
        head_dim: Channels of a key.
        value_dim: Channels of a value.
        is_full: The mask selects every allowed key.
        has_ranges: The mask has key ranges.
        has_selected: The mask has selected keys or pages.
        has_dense: The mask has a dense part.
        is_weighted: Probabilities below 1 may occur.
        mask_heads: Distinct selections along the head dimension.
        page_size: Keys per selected entry.
        has_keep: What may be attended is not an interval per row.
        softcap: Logits are capped.
        sinks: Learned sinks join the denominator.
        captured: Inside a graph capture: no host sync, no Python length.
        needs_lse: The log-sum-exp of each row is wanted.
        range_count: Key ranges of the mask.
    """

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    query_len: int
    head_dim: int
    value_dim: int
    is_full: bool
    has_ranges: bool
    has_selected: bool
    has_dense: bool
    is_weighted: bool
    mask_heads: int
    page_size: int
    has_keep: bool
    softcap: bool
    sinks: bool
    captured: bool
    needs_lse: bool
    range_count: int = 0

    @classmethod
    def of(cls, inputs: Inputs, mask: Mask, *, needs_lse: bool = False) -> Problem:
        """The facts of a call."""
        return cls(
            device=inputs.query.device.type,
            dtype=inputs.query.dtype,
            batch=inputs.batch,
            heads=inputs.heads,
            kv_heads=inputs.kv_heads,
            query_len=inputs.query_len,
            head_dim=inputs.query.shape[3],
            value_dim=inputs.value.shape[3],
            is_full=mask.is_full,
            has_ranges=bool(mask.ranges),
            has_selected=mask.selected is not None,
            has_dense=mask.dense is not None,
            is_weighted=mask.is_weighted,
            mask_heads=mask.heads,
            page_size=1 if mask.selected is None else mask.selected.page_size,
            has_keep=inputs.allowed.keep is not None,
            softcap=inputs.softcap is not None,
            sinks=inputs.sinks is not None,
            captured=inputs.key_len is None,
            needs_lse=needs_lse,
            range_count=len(mask.ranges),
        )


class Backend:
    """Base of all backends.

    ``output = sum_i (e^{l_i} / p_i) v_i / sum_i (e^{l_i} / p_i)`` over the selected and allowed
    keys, with logits ``l_i = scaling * q . k_i`` (softcap applied), probabilities ``p_i`` and
    softmax statistics in float32; learned sinks join the denominator; a row that selects nothing
    gives 0, never NaN.

    Attributes:
        name: Registered name.
        rank: ``auto`` takes the capable backend of the highest rank.
        realised: Unselected keys are really not read; False means that the saving is simulated.
    """

    name: ClassVar[str]
    rank: ClassVar[int] = 0
    realised: ClassVar[bool] = True

    @property
    def ops(self) -> Ops:
        """The scoring primitives that maskers get when this backend runs; the reference forms by
        default.
        """
        from sah_core.ops import REFERENCE

        return REFERENCE

    def refuses(self, problem: Problem) -> str | None:
        """Why this backend cannot take such a call, in a few words; None if it can. Must be cheap
        and static.
        """
        raise NotImplementedError

    def attend(self, inputs: Inputs, mask: Mask) -> tuple[Tensor, Tensor | None]:
        """Compute the attention.

        Returns:
            Output ``(batch, query_len, heads, value_dim)`` in the type of the query, and the
            log-sum-exp of each row, float32 ``(batch, heads, query_len)`` (None from kernels that
            do not give it, which then refuse problems that need it).
        """
        raise NotImplementedError
