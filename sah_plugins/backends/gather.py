"""Gather: pure torch, reads the selected keys and nothing else.

Ranges are read as slices of the cache, selected keys by row index; logits, weights and temporaries
have the size of the selection. On a GPU, where reading the ends of a range would wait for the
device, ranges become indices of a capacity that the host knows.
"""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from sah_core import Allowed, Backend, Inputs, KeyRange, Mask, Problem, Selected, hookimpl

ROW_BYTES = 64 * 2**20
"""Gathered keys and values held at once: more query rows than fit run in blocks."""
ROWS = 128
"""Query rows per block where their ranges differ: a block reads the union of its rows' ranges."""


@attrs.frozen(eq=False)
class Piece:
    """A part of the selection, ready for the softmax.

    Attributes:
        logits: ``(batch, heads, query_len, count)`` with ``-log p`` added and -inf at what is not
            selected.
        value: ``(batch, selections, 1 | query_len, count, value_dim)``: the values that belong to
            the logits.
    """

    logits: Tensor
    value: Tensor

    def weighted(self, weights: Tensor) -> Tensor:
        """``weights @ value`` as ``(batch, heads, query_len, value_dim)``."""
        batch, heads, query_len, count = weights.shape
        selections, rows = self.value.shape[1], self.value.shape[2]
        group = heads // selections
        weights = weights.view(batch, selections, group, query_len, count)
        if rows == 1:
            flat = weights.reshape(batch, selections, group * query_len, count)
            return (flat @ self.value[:, :, 0]).view(batch, heads, query_len, -1)
        output = weights.transpose(2, 3) @ self.value
        return output.transpose(2, 3).reshape(batch, heads, query_len, -1)


class Gather(Backend):
    """Sparse attention whose cost follows the selection."""

    name: ClassVar[str] = "gather"
    rank: ClassVar[int] = 20
    realised: ClassVar[bool] = True

    def refuses(self, problem: Problem) -> str | None:
        """Accept every mask but dense tensors inside a graph capture."""
        if problem.has_dense and problem.captured:
            return "a dense mask needs a host sync to become indices"
        return None

    def attend(self, inputs: Inputs, mask: Mask) -> tuple[Tensor, Tensor]:
        """Attend the selected keys, in blocks of sequences and query rows."""
        mask = mask.to_selected()
        if mask.is_full:
            limits = KeyRange(inputs.allowed.start, inputs.allowed.stop, inputs.capacity)
            mask = Mask.from_ranges(inputs.shape, [limits])
        by_slices = inputs.device.type == "cpu" and inputs.key_len is not None
        outputs, lses = [], []
        for part, part_mask in sequences(inputs, mask) if by_slices else ((inputs, mask),):
            blocks = [
                attend_block(block, block_mask, by_slices)
                for block, block_mask in row_blocks(part, part_mask, by_slices)
            ]
            outputs.append(join([b[0] for b in blocks], 2))
            lses.append(join([b[1] for b in blocks], 2))
        output = join(outputs, 0).transpose(1, 2)
        return output.to(inputs.query.dtype).contiguous(), join(lses, 0)


def join(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenate, sparing the copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def sequences(inputs: Inputs, mask: Mask) -> Iterator[tuple[Inputs, Mask]]:
    """The call as it is if all sequences share their limits and ranges, else one sequence at a
    time.
    """
    limits = [inputs.allowed.start, inputs.allowed.stop]
    limits += [t for r in mask.ranges for t in (r.start_base, r.stop_base)]
    if all(t.shape[0] == 1 for t in limits):
        yield inputs, mask
        return

    def cut(tensor: Tensor, index: int) -> Tensor:
        return tensor if tensor.shape[0] == 1 else tensor[index : index + 1]

    for index in range(inputs.batch):
        allowed = inputs.allowed
        one = Allowed(
            start=cut(allowed.start, index),
            stop=cut(allowed.stop, index),
            first=cut(allowed.first, index),
            keep=None if allowed.keep is None else cut(allowed.keep, index),
        )
        ranges = tuple(
            attrs.evolve(r, start_base=cut(r.start_base, index), stop_base=cut(r.stop_base, index))
            for r in mask.ranges
        )
        selected = mask.selected
        if selected is not None:
            selected = attrs.evolve(
                selected,
                indices=cut(selected.indices, index),
                count=None if selected.count is None else cut(selected.count, index),
                probability=(
                    None if selected.probability is None else cut(selected.probability, index)
                ),
                origin=None if selected.origin is None else cut(selected.origin, index),
            )
        part = attrs.evolve(
            inputs,
            query=inputs.query[index : index + 1],
            key=inputs.key[index : index + 1],
            value=inputs.value[index : index + 1],
            allowed=one,
        )
        yield part, Mask((1, *mask.shape[1:]), ranges, selected)


def row_blocks(inputs: Inputs, mask: Mask, by_slices: bool) -> Iterator[tuple[Inputs, Mask]]:
    """Blocks of query rows small enough for what they gather."""
    query_len = inputs.query_len
    step = query_len
    if by_slices and any(r.start.shape[2] > 1 or r.stop.shape[2] > 1 for r in mask.ranges):
        step = min(step, ROWS)
    count = 0
    if mask.selected is not None and mask.selected.indices.shape[2] > 1:
        count = mask.selected.capacity * mask.selected.page_size
    if not by_slices:
        count += sum(r.capacity for r in mask.ranges)
    if count:
        selections = max(mask.heads, inputs.kv_heads)
        channels = inputs.query.shape[3] + inputs.value.shape[3]
        per_row = 4 * inputs.batch * selections * count * channels
        step = min(step, max(1, ROW_BYTES // per_row))
    if step >= query_len:
        yield inputs, mask
        return
    for begin in range(0, query_len, step):
        end = min(begin + step, query_len)
        yield inputs.rows(begin, end), mask.rows(begin, end)


def attend_block(inputs: Inputs, mask: Mask, by_slices: bool) -> tuple[Tensor, Tensor]:
    """Output ``(batch, heads, query_len, value_dim)`` and log-sum-exp of one block."""
    exact = torch.promote_types(inputs.query.dtype, torch.float32)
    query = inputs.query.to(exact) * inputs.scaling
    pieces: list[Piece] = []
    if by_slices:
        pieces += slice_pieces(inputs, mask, query)
    else:
        pieces += index_pieces(inputs, mask, query)
    if mask.selected is not None and mask.selected.capacity:
        pieces.append(selected_piece(inputs, mask, mask.selected, query))
    if inputs.sinks is not None:
        sinks = inputs.sinks.to(exact).view(1, -1, 1, 1).expand(*inputs.shape[:3], 1)
        nothing = inputs.value.new_zeros((inputs.batch, inputs.kv_heads, 1, 1, 1))
        nothing = nothing.expand(-1, -1, -1, -1, inputs.value.shape[3]).to(exact)
        pieces.append(Piece(sinks, nothing))
    pieces = [piece for piece in pieces if piece.logits.shape[3]]
    if not pieces:
        shape = (*inputs.shape[:3], inputs.value.shape[3])
        output = torch.zeros(shape, dtype=exact, device=inputs.device)
        return output, torch.full(shape[:3], float("-inf"), device=inputs.device)
    logits = join([p.logits for p in pieces], 3)
    # a row without keys has the top -inf; any finite one makes its weights exp(-inf) = 0
    top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(exact).min)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + top).squeeze(-1).float()
    output = pieces[0].weighted(weights[..., : pieces[0].logits.shape[3]])
    begin = pieces[0].logits.shape[3]
    for piece in pieces[1:]:
        end = begin + piece.logits.shape[3]
        output += piece.weighted(weights[..., begin:end])
        begin = end
    # the best key of a row weighs 1, so that only rows without keys have a total below that
    return output.div_(total.clamp_(min=1.0)), lse


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Gemma 2's soft cap."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def slice_pieces(inputs: Inputs, mask: Mask, query: Tensor) -> Iterator[Piece]:
    """Ranges as slices of the cache: no index, no copy. Host ends, so CPU only."""
    if not mask.ranges:
        return
    batch, heads, query_len, _ = inputs.shape
    kv_heads = inputs.kv_heads
    rows = query.reshape(batch, kv_heads, inputs.group * query_len, -1)
    spans = row_spans(inputs.allowed, mask.ranges, query_len)
    for low, high in merged(s for row in spans for s in row):
        key = inputs.key[:, :, low:high].to(query.dtype)
        logits = (rows @ key.transpose(2, 3)).view(batch, heads, query_len, high - low)
        logits = capped(logits, inputs.softcap)
        if any(not covered(row, low, high) for row in spans):
            position = torch.arange(low, high, dtype=torch.int32).view(1, 1, 1, -1)
            keep = mask.covers(position) & inputs.allowed.contains(position)
            logits = logits.masked_fill(~keep, float("-inf"))
        elif inputs.allowed.keep is not None:
            logits = logits.masked_fill(~inputs.allowed.keep[..., low:high], float("-inf"))
        value = inputs.value[:, :, low:high].to(query.dtype)
        yield Piece(logits, value.unsqueeze(2))


def row_spans(
    allowed: Allowed, ranges: tuple[KeyRange, ...], query_len: int
) -> list[list[tuple[int, int]]]:
    """The disjoint, allowed key spans of every row; one list if all rows agree."""
    bounds = [allowed.bounds, *(r.bounds for r in ranges)]
    sides = [(starts[0], stops[0]) for starts, stops in bounds]
    if all(len(side) == 1 for pair in sides for side in pair):
        query_len = 1

    def at(side: list[int], row: int) -> int:
        return side[row] if len(side) > 1 else side[0]

    spans = []
    for row in range(query_len):
        first, last = max(0, at(sides[0][0], row)), at(sides[0][1], row)
        clipped = (
            (max(first, at(starts, row)), min(last, at(stops, row))) for starts, stops in sides[1:]
        )
        spans.append(list(merged(clipped)))
    return spans


def merged(spans: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Disjoint, ordered spans with the same members; empty ones vanish."""
    low = high = None
    for start, stop in sorted(s for s in spans if s[0] < s[1]):
        if high is not None and low is not None and start <= high:
            high = max(high, stop)
            continue
        if low is not None and high is not None:
            yield low, high
        low, high = start, stop
    if low is not None and high is not None:
        yield low, high


def covered(row: list[tuple[int, int]], low: int, high: int) -> bool:
    """Whether one span of the row holds the whole run."""
    return any(start <= low and high <= stop for start, stop in row)


def index_pieces(inputs: Inputs, mask: Mask, query: Tensor) -> Iterator[Piece]:
    """Ranges as indices of a host-known capacity: nothing waits for the device."""
    before: list[KeyRange] = []
    for part in mask.ranges:
        capacity = min(part.capacity, inputs.capacity)
        slot = torch.arange(capacity, dtype=torch.int32, device=inputs.device)
        start = torch.maximum(part.start, inputs.allowed.start).unsqueeze(-1)
        keys = start + slot
        keep = part.contains(keys) & inputs.allowed.contains(keys)
        for other in before:
            keep = keep & ~other.contains(keys)
        before.append(part)
        yield entry_piece(inputs, query, keys, keep, None)


def selected_piece(inputs: Inputs, mask: Mask, selected: Selected, query: Tensor) -> Piece:
    """The selected keys of a mask by index; entries inside a range count there."""
    keys, probability = selected.tokens(inputs.capacity)
    if inputs.allowed.heads > keys.shape[1]:
        keys = keys.repeat_interleave(inputs.allowed.heads // keys.shape[1], dim=1)
    keep = (keys >= 0) & inputs.allowed.contains(keys)
    if mask.ranges:
        keep = keep & ~mask.covers(keys)
    return entry_piece(inputs, query, keys, keep, probability)


def entry_piece(
    inputs: Inputs, query: Tensor, keys: Tensor, keep: Tensor, probability: Tensor | None
) -> Piece:
    """Keys by index ``(batch | 1, heads', query_len | 1, count)`` and which of them count."""
    batch, heads, query_len, _ = inputs.shape
    kv_heads = inputs.kv_heads
    selections = max(kv_heads, keys.shape[1])
    if keys.shape[1] < selections:
        keys = keys.repeat_interleave(selections // keys.shape[1], dim=1)
    count, rows = keys.shape[3], keys.shape[2]
    keys = keys.clamp(0, inputs.capacity - 1).expand(batch, -1, -1, -1)
    key = take_rows(inputs.key, keys).to(query.dtype)
    value = take_rows(inputs.value, keys).to(query.dtype)
    group = heads // selections
    if rows == 1:
        flat = query.reshape(batch, selections, group * query_len, -1)
        logits = flat @ key[:, :, 0].transpose(2, 3)
    else:
        grouped = query.view(batch, selections, group, query_len, -1).transpose(2, 3)
        logits = (grouped @ key.transpose(3, 4)).transpose(2, 3)
    logits = capped(logits.reshape(batch, heads, query_len, count), inputs.softcap)
    keep = per_head(keep, heads)
    if probability is not None:
        chance = per_head(probability, heads)
        logits = logits - chance.log()
        # a probability that a sampler rounded to 0 must not weigh infinitely
        keep = keep & (chance > 0)
    logits = logits.masked_fill(~keep, float("-inf"))
    return Piece(logits, value)


def per_head(tensor: Tensor, heads: int) -> Tensor:
    """Repeat a shared selection for the query heads that share it; one head broadcasts."""
    own = tensor.shape[1]
    return tensor if own in (1, heads) else tensor.repeat_interleave(heads // own, dim=1)


def take_rows(source: Tensor, keys: Tensor) -> Tensor:
    """Rows of the cache by index.

    Args:
        source: ``(batch, kv_heads, key_len, channels)``.
        keys: int ``(batch, selections, query_len, count)`` with ``kv_heads | selections``.

    Returns:
        ``(batch, selections, query_len, count, channels)``.
    """
    batch, kv_heads, key_len, channels = source.shape
    selections = keys.shape[1]
    device = source.device
    head = torch.arange(selections, device=device) // (selections // kv_heads)
    sequence = torch.arange(batch, device=device)
    steps = source.stride()
    if steps[3] != 1 or any(step % channels for step in steps[:2]) or steps[2] != channels:
        return source[sequence.view(-1, 1, 1, 1), head.view(1, -1, 1, 1), keys.long()]
    # every cached vector is a row of one long matrix, and whole rows copy fastest
    per_sequence, per_head_ = steps[0] // channels, steps[1] // channels
    length = (batch - 1) * per_sequence + (kv_heads - 1) * per_head_ + key_len
    matrix = source.as_strided((length, channels), (channels, 1))
    base = sequence.view(-1, 1, 1, 1) * per_sequence + head.view(1, -1, 1, 1) * per_head_
    index = (base + keys).view(-1)
    return matrix.index_select(0, index).view(*keys.shape, channels)


@hookimpl
def sah_backend() -> type[Backend]:
    """Register the backend."""
    return Gather
