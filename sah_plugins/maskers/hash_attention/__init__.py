"""HashAttention: keys whose learned bit signature agrees with that of the query.

Aditya Desai, Shuo Yang, Alejandro Cuadron, Matei Zaharia, Joseph E. Gonzalez, Ion Stoica:
HashAttention: Semantic Sparsity for Faster Inference, arXiv 2412.14468, section 4.

Two small MLPs per layer and query head, learned from the model's own attention, map queries and
keys to ``hat_bits`` signs; the number of signs that agree ranks the keys, and the best are
attended. Signatures are packed into 32-bit words and compared by XOR and a count of bits.

Differs from the paper in ``group_reduction`` and in key MLPs that a KV group may share. An output
of exactly 0 counts as a negative sign; of keys that agree equally, which are many with so few
levels, the earlier wins. Reads ``hat_bits / 8`` bytes per key and signature head, and the weights
of the query's MLPs, per query; keeps ``hat_bits / 8`` bytes per key and signature head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor

from sah_core import Capabilities, Inputs, Mask, Masker, Search, Size, hookimpl, param
from sah_core.artifacts import read_once
from sah_core.ops import GROUP_REDUCTIONS, Ops, code_words
from sah_core.selection import add_best
from sah_core.state import LayerInfo

from .pickled import PickleConversion
from .training import HashTraining, random_functions
from .weights import HashFunctions, read_weights, write_weights

HIDDEN_BYTES = 64 * 2**20
"""Hidden values of the MLPs held at once: more keys than fit are hashed in pieces."""


class Signatures:
    """The state of one layer: the signature of every key.

    Attributes:
        functions: Hash functions of the layer.
        words: Packed signs, int32 ``(batch, key_heads, capacity, words)``.
        length: Keys taken in, as far as the host knows.
    """

    def __init__(self, layer: LayerInfo, functions: HashFunctions) -> None:
        self.functions = functions
        self.ops: Ops = layer.ops
        self.length = 0
        heads, words = functions.key_heads, code_words(functions.bits, 1)
        shape = (layer.batch, heads, max(1, layer.capacity), words)
        self.words = torch.zeros(shape, dtype=torch.int32, device=layer.device)

    def append(self, key: Tensor, start: int | Tensor) -> None:
        """Hash new keys; a start on the device never grows the buffer."""
        if not isinstance(start, int):
            self.ops.signature_update(self.words, key, self.functions.key, start)
            return
        new = key.shape[2]
        self.length = start + new
        self.reserve(self.length)
        widest = max(weight.shape[2] for weight, _ in self.functions.key)
        step = max(1, HIDDEN_BYTES // (4 * widest * key.shape[0] * self.functions.key_heads))
        for begin in range(0, new, step):
            piece = key[:, :, begin : begin + step]
            self.ops.signature_update(self.words, piece, self.functions.key, start + begin)

    def reserve(self, keys: int) -> None:
        """Make sure that so many keys fit, copying at most once per doubling."""
        room = self.words.shape[2]
        if keys > room:
            more = max(keys, 2 * room) - room
            self.words = torch.nn.functional.pad(self.words, (0, 0, 0, more))

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order."""
        self.words = self.words.index_select(0, rows)

    def snapshot(self) -> int:
        """The length; signatures before it are not written again."""
        return self.length

    def restore(self, token: int) -> None:
        """Cut back to the length of the snapshot."""
        self.length = token


@attrs.frozen(kw_only=True)
class HashAttention(Masker):
    """Select the keys whose learned signatures agree with the query's in the most bits."""

    name: ClassVar[str] = "hash-attention"
    capabilities: ClassVar[Capabilities] = Capabilities(keys_only=True)
    artifact_tools = {"train": HashTraining, "convert": PickleConversion}

    heavy_size: Size = param(
        0.05,
        type=Size,
        help="Keys selected, on top of what earlier steps selected.",
        unit="tokens or fraction of the keys",
        search=Search.choice([0.02, 0.05, 0.1, 0.2]),
    )
    hat_weight_file: str = param(
        type=str,
        artifact=True,
        help="Weights of the hash functions of every layer and head, safetensors.",
    )
    hat_bits: int = param(
        32, type=int, minimum=1, help="Bits of a signature, as the weights have them.", unit="bits"
    )
    group_reduction: str = param(
        "none",
        type=str,
        choices=GROUP_REDUCTIONS,
        help="How query heads share a choice in their KV group: none (own choice), sum, mean, max.",
    )

    @classmethod
    def example(cls, folder: Path) -> Self:
        """One with random weights for the model of the checks."""
        from sah_core.testing import MODEL

        draw = torch.Generator().manual_seed(0)
        layers = {
            layer: random_functions(MODEL.heads, MODEL.heads, [MODEL.head_dim, 12, 12, 32], draw)
            for layer in range(MODEL.layers)
        }
        path = folder / "weights.safetensors"
        write_weights(path, layers, {"model": "random"})
        return cls(heavy_size=Size(tokens=8), hat_weight_file=str(path))

    def check_artifacts(self) -> None:
        """The weights can be read and have the bits that are said."""
        read_once(self.hat_weight_file, read_weights).require_bits(self.hat_bits)

    def init_state(self, layer: LayerInfo) -> Signatures:
        """Room for the signatures of all keys of the buffer."""
        weights = read_once(self.hat_weight_file, read_weights)
        weights.require_bits(self.hat_bits)
        return Signatures(layer, weights.functions(layer))

    def append(self, state: Any, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Hash the new keys."""
        state.append(key, start)

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the keys that agree best among those that ``previous`` does not hold yet."""
        state: Signatures = inputs.state
        words = state.words[:, :, : inputs.capacity]

        def score(part: Inputs) -> Tensor:
            return inputs.ops.hamming_scores(
                inputs.ops.signatures(part.query, state.functions.query),
                words,
                self.hat_bits,
                inputs.kv_heads,
                self.group_reduction,
            )

        levels = self.hat_bits * (inputs.group if self.group_reduction == "sum" else 1) + 1
        whole = self.group_reduction != "mean"
        return add_best(inputs, previous, self.heavy_size, score, levels=levels if whole else None)

    def bytes_read(self, inputs: Inputs) -> int:
        """The signature of every key, and the weights that hash the query."""
        state: Signatures = inputs.state
        words = state.words[:, :, : inputs.capacity]
        weights = [t for linear in state.functions.query for t in linear]
        return sum(t.numel() * t.element_size() for t in (words, *weights))


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return HashAttention
