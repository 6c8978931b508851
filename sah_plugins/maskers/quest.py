"""Quest: pages of keys, ranked by an upper bound of their attention logits.

Jiaming Tang, Yilong Zhao, Kan Zhu, Guangxuan Xiao, Baris Kasikci, Song Han: Quest: Query-Aware
Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774, section 3.

Of every page the element-wise minimum and maximum of its keys are kept;
``sum_d max(q_d min_d, q_d max_d)`` bounds every logit inside the page, and the pages of the highest
bounds are attended.

Differs from the paper in paging generated tokens too, in ranking the last page like any other, in
choosing per query head unless ``group_reduction`` says otherwise, and in ``label_bits``, which
rounds the bounds as Twilight does. Reads ``2 / page_size`` of the keys per query and keeps as much.

The bounds of a page are those of all its keys that have come, so that with several sparse rows
(questions, or a sparse prefill) a row may rank the page that it stands in, and no other, by keys
behind its own; a sparse prefill in other chunks may then choose other pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor

from sah_core import Capabilities, Inputs, Mask, Masker, Search, Size, hookimpl, param
from sah_core.ops import GROUP_REDUCTIONS, Ops
from sah_core.state import LayerInfo, reorder_first

MIN_PAGES = 3
"""Pages chosen however small the budget is (section 3.3 of the paper's code)."""

SCORE_BYTES = 64 * 2**20
"""Scores held at once: more query rows than fit are scored in pieces."""


class PageBounds:
    """The state of one layer: minimum and maximum of the keys of every page.

    Attributes:
        low: Minima ``(batch, kv_heads, pages, head_dim)`` with room for keys to come.
        high: Maxima, likewise.
        length: Keys taken in, as far as the host knows.
    """

    def __init__(self, layer: LayerInfo, page_size: int) -> None:
        self.page_size = page_size
        self.first = layer.first
        self.ops: Ops = layer.ops
        self.length = 0
        pages = max(1, -(-layer.capacity // page_size))
        shape = (layer.batch, layer.kv_heads, pages, layer.head_dim)
        self.low = torch.zeros(shape, dtype=layer.dtype, device=layer.device)
        self.high = torch.zeros(shape, dtype=layer.dtype, device=layer.device)

    def append(self, key: Tensor, start: int | Tensor) -> None:
        """Take in new keys; a start on the device never grows the buffers."""
        if isinstance(start, int):
            self.length = start + key.shape[2]
            self.reserve(self.length)
        self.ops.page_bounds_update(self.low, self.high, key, start, self.page_size, self.first)

    def reserve(self, keys: int) -> None:
        """Make sure that the pages of so many keys fit, copying at most once per doubling."""
        pages, room = -(-keys // self.page_size), self.low.shape[2]
        if pages > room:
            more = max(pages, 2 * room) - room
            self.low, self.high = (
                torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (self.low, self.high)
            )

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order."""
        self.low, self.high = (t.index_select(0, rows) for t in (self.low, self.high))
        self.first = reorder_first(self.first, rows)

    def snapshot(self) -> tuple[int, Tensor, Tensor, Tensor]:
        """The length and a copy of the page that the next key falls into."""
        page = torch.full((1,), self.length, device=self.low.device)
        if self.first is not None:
            page = page - self.first.long()
        page = page.clamp(min=0).div(self.page_size, rounding_mode="floor")
        page = page.clamp(max=self.low.shape[2] - 1).view(-1, 1, 1, 1)
        batch, kv_heads, _, head_dim = self.low.shape
        page = page.expand(batch, kv_heads, 1, head_dim)
        return self.length, page, self.low.gather(2, page), self.high.gather(2, page)

    def restore(self, token: tuple[int, Tensor, Tensor, Tensor]) -> None:
        """Cut back to the snapshot; pages after it are overwritten by the keys that come."""
        self.length, page, low, high = token
        self.low.scatter_(2, page, low)
        self.high.scatter_(2, page, high)


@attrs.frozen(kw_only=True)
class Quest(Masker):
    """Select the pages with the highest upper bounds of ``q . k``."""

    name: ClassVar[str] = "quest"
    capabilities: ClassVar[Capabilities] = Capabilities(page_granular=True, keys_only=True)

    heavy_size: Size = param(
        0.05,
        type=Size,
        help="Budget in keys; the pages chosen are the budget over the page size, at least 3.",
        unit="tokens or fraction of the keys",
        search=Search.choice([0.02, 0.05, 0.1, 0.2]),
    )
    page_size: int = param(
        16, type=int, minimum=2, help="Keys per page.", unit="keys", search=Search.choice([16, 32])
    )
    label_bits: int = param(
        16,
        type=int,
        minimum=1,
        maximum=16,
        help="Bits that a page's bounds are rounded to; 16 keeps them as they are.",
        unit="bits",
    )
    group_reduction: str = param(
        "none",
        type=str,
        choices=GROUP_REDUCTIONS,
        help="How query heads share a choice in their KV group: none (own choice), sum, mean, max.",
    )

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Small pages, of which the checks' calls hold many."""
        return cls(heavy_size=Size(tokens=16), page_size=4)

    def init_state(self, layer: LayerInfo) -> PageBounds:
        """Room for the bounds of every page of the key buffer."""
        return PageBounds(layer, self.page_size)

    def append(self, state: Any, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Widen the bounds of the pages that the new keys fall into."""
        state.append(key, start)

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the best pages, whether ``previous`` has them or not."""
        if previous.is_full:
            return previous
        pages, count = self.page_budget(inputs)
        heads = inputs.heads if self.group_reduction == "none" else inputs.kv_heads
        row_bytes = 4 * inputs.batch * inputs.heads * -(-inputs.capacity // self.page_size)
        step = max(1, SCORE_BYTES // row_bytes)
        parts = []
        for begin in range(0, inputs.query_len, step):
            part = inputs
            if step < inputs.query_len:
                part = inputs.rows(begin, min(begin + step, inputs.query_len))
            parts.append(self.choose(part, pages, count, heads))
        indices, chosen = parts[0]
        if len(parts) > 1:
            indices = torch.cat([p[0] for p in parts], dim=2)
            chosen = torch.cat([p[1] for p in parts], dim=2)
        mask = Mask.from_indices(
            inputs.shape,
            indices,
            count=chosen,
            page_size=self.page_size,
            origin=inputs.allowed.first,
        )
        return previous | mask

    def page_budget(self, inputs: Inputs) -> tuple[int, Tensor | None]:
        """Pages per row: a host bound, and the number per sequence where it differs from that."""
        budget = inputs.budget(self.heavy_size, unit=self.page_size, minimum=MIN_PAGES)
        return budget.capacity, budget.count

    def choose(
        self, inputs: Inputs, pages: int, count: Tensor | None, heads: int
    ) -> tuple[Tensor, Tensor]:
        """The best pages of each row among those with a key that the row may attend."""
        state: PageBounds = inputs.state
        there = -(-inputs.capacity // self.page_size)
        low, high = state.low[:, :, :there], state.high[:, :, :there]
        scores = inputs.ops.page_scores(
            inputs.query, low, high, self.group_reduction, self.label_bits
        )
        allowed = inputs.allowed
        if allowed.keep is not None:
            open_pages = pages_with_a_key(allowed.keep, allowed.first, self.page_size, there)
            if open_pages.shape[1] not in (1, heads):
                batch, _, query_len, _ = open_pages.shape
                open_pages = open_pages.reshape(batch, heads, -1, query_len, there).any(dim=2)
            scores = scores.masked_fill(~open_pages, float("-inf"))
        return inputs.ops.masked_topk(
            scores,
            pages,
            count=count,
            start=allowed.start,
            stop=allowed.stop,
            page_size=self.page_size,
            origin=allowed.first,
        )

    def bytes_read(self, inputs: Inputs) -> int:
        """The bounds of every page."""
        pages = -(-inputs.capacity // self.page_size)
        per_page = 2 * inputs.key.shape[3] * inputs.key.element_size()
        return inputs.batch * inputs.kv_heads * pages * per_page


def pages_with_a_key(keep: Tensor, first: Tensor, page_size: int, pages: int) -> Tensor:
    """Whether a page has a key to attend, bool ``(batch, heads | 1, query_len, pages)``."""
    key_len = keep.shape[-1]
    key = torch.arange(pages * page_size, device=keep.device) + first.long().view(-1, 1)
    lead = (max(keep.shape[0], key.shape[0]), *keep.shape[1:3])
    index = key.clamp(max=key_len - 1)[:, None, None].expand(*lead, -1)
    inside = keep.expand(*lead, key_len).gather(-1, index) & (key < key_len)[:, None, None]
    return inside.view(*lead, pages, page_size).any(dim=-1)


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return Quest
