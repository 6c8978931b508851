"""Double Sparsity: keys ranked by a few important channels, held in few bits.

Shuo Yang, Ying Sheng, Joseph E. Gonzalez, Ion Stoica, Lianmin Zheng: Post-Training Sparse Attention
with Double Sparsity, arXiv 2408.07092, section 3.

A calibration run ranks the channels of every head by ``E |q_j k_j|``. Of each key the first
``head_dim / group_factor`` channels are kept beside the cache as its label, rounded to
``label_bits`` bits; ``Q(q_C) . Q(k_C)`` ranks the keys, and the best are attended.

Differs from the paper in choosing among the keys that earlier steps left, in which layers stay
dense (all are sparse unless the pipeline says otherwise), and in ``group_reduction``. Reads ``r b /
8`` bytes of codes and two numbers per key and label head, with r channels of b bits, and keeps as
much.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor

from sah_core import Capabilities, Inputs, Mask, Masker, Search, Size, hookimpl, param
from sah_core.artifacts import read_once
from sah_core.ops import GROUP_REDUCTIONS, Ops, code_width, code_words
from sah_core.selection import add_best
from sah_core.state import LayerInfo

from .calibration import ChannelCalibration
from .channels import SELECTIONS, read_channels, write_channels


class LabelCache:
    """The state of one layer: the label of every key.

    Attributes:
        channels: Channels that a label holds, int64 ``(label_heads, channels)``.
        labels: Codes, or the channels themselves with 16 bits, ``(batch, label_heads, capacity,
            ...)``; see `sah_core.ops.Ops.label_update`.
        affine: Step and minimum of each label, or None with 16 bits.
        length: Keys taken in, as far as the host knows.
    """

    def __init__(self, layer: LayerInfo, channels: Tensor, bits: int) -> None:
        self.channels = channels.to(layer.device)
        self.bits = bits
        self.ops: Ops = layer.ops
        self.length = 0
        heads, count = channels.shape
        lead = (layer.batch, heads, max(1, layer.capacity))
        self.affine: Tensor | None = None
        if bits == 16:
            self.labels = torch.zeros((*lead, count), dtype=layer.dtype, device=layer.device)
            return
        words = code_words(count, code_width(bits))
        self.labels = torch.zeros((*lead, words), dtype=torch.int32, device=layer.device)
        self.affine = torch.zeros((*lead, 2), dtype=layer.dtype, device=layer.device)

    def append(self, key: Tensor, start: int | Tensor) -> None:
        """Take in new keys; a start on the device never grows the buffers."""
        if isinstance(start, int):
            self.length = start + key.shape[2]
            self.reserve(self.length)
        self.ops.label_update(self.labels, self.affine, key, self.channels, start, self.bits)

    def reserve(self, keys: int) -> None:
        """Make sure that so many keys fit, copying at most once per doubling."""
        room = self.labels.shape[2]
        if keys > room:
            more = (0, 0, 0, max(keys, 2 * room) - room)
            self.labels = torch.nn.functional.pad(self.labels, more)
            if self.affine is not None:
                self.affine = torch.nn.functional.pad(self.affine, more)

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order."""
        self.labels = self.labels.index_select(0, rows)
        self.affine = None if self.affine is None else self.affine.index_select(0, rows)

    def snapshot(self) -> int:
        """The length; labels before it are not written again."""
        return self.length

    def restore(self, token: int) -> None:
        """Cut back to the length of the snapshot."""
        self.length = token


@attrs.frozen(kw_only=True)
class DoubleSparsity(Masker):
    """Select the keys whose labels, a few channels in a few bits, promise the highest logits."""

    name: ClassVar[str] = "double-sparsity"
    capabilities: ClassVar[Capabilities] = Capabilities(keys_only=True)
    artifact_tools = {"calibrate": ChannelCalibration}

    heavy_size: Size = param(
        0.05,
        type=Size,
        help="Keys selected, on top of what earlier steps selected.",
        unit="tokens or fraction of the keys",
        search=Search.choice([0.02, 0.05, 0.1, 0.2]),
    )
    sorted_channel_file: str = param(
        type=str,
        artifact=True,
        help="Channels of every layer and head by importance: the authors' JSON, or safetensors.",
    )
    group_factor: int = param(
        8,
        type=int,
        minimum=1,
        help="Channels of a head per channel of its label, rounded down to at least one channel.",
        search=Search.choice([2, 4, 8, 16]),
    )
    label_bits: int = param(
        4,
        type=int,
        minimum=1,
        maximum=16,
        help="Bits per channel of labels and of queries; 16 keeps them as they are.",
        unit="bits",
        search=Search.choice([2, 4, 8, 16]),
    )
    channel_selection: str = param(
        "qk_proj",
        type=str,
        choices=SELECTIONS,
        help="What channels are ranked by: the product of query and key, or one of them.",
        search=Search.choice(SELECTIONS),
    )
    group_reduction: str = param(
        "none",
        type=str,
        choices=GROUP_REDUCTIONS,
        help="How query heads share a choice in their KV group: none (own choice), sum, mean, max.",
    )

    @classmethod
    def example(cls, folder: Path) -> Self:
        """One with a random channel file for the model of the checks."""
        from sah_core.testing import MODEL

        path = folder / "channels.json"
        draw = torch.Generator().manual_seed(0)
        orders = {
            layer: torch.rand(MODEL.heads, MODEL.head_dim, generator=draw).argsort(dim=1)
            for layer in range(MODEL.layers)
        }
        write_channels(path, {"qk_proj": orders}, {})
        return cls(heavy_size=Size(tokens=8), sorted_channel_file=str(path), group_factor=4)

    def check_artifacts(self) -> None:
        """The channel file can be read and holds channels of the selection."""
        read_once(self.sorted_channel_file, read_channels).require(self.channel_selection)

    def init_state(self, layer: LayerInfo) -> LabelCache:
        """Room for the labels of all keys of the buffer."""
        file = read_once(self.sorted_channel_file, read_channels)
        order = file.order(self.channel_selection, layer)
        count = max(1, layer.head_dim // self.group_factor)
        return LabelCache(layer, order[:, :count].contiguous(), self.label_bits)

    def append(self, state: Any, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Label the new keys."""
        state.append(key, start)

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the keys of the best labels among those that ``previous`` does not hold yet."""
        state: LabelCache = inputs.state
        labels = state.labels[:, :, : inputs.capacity]
        affine = None if state.affine is None else state.affine[:, :, : inputs.capacity]

        def score(part: Inputs) -> Tensor:
            return inputs.ops.label_scores(
                part.query,
                state.channels,
                labels,
                affine,
                self.label_bits,
                state.channels.shape[1] ** -0.5,
                inputs.kv_heads,
                self.group_reduction,
            )

        return add_best(inputs, previous, self.heavy_size, score)

    def bytes_read(self, inputs: Inputs) -> int:
        """The label of every key."""
        state: LabelCache = inputs.state
        parts = [state.labels] if state.affine is None else [state.labels, state.affine]
        return sum(t[:, :, : inputs.capacity].numel() * t.element_size() for t in parts)


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return DoubleSparsity
