"""Recall: the share of the true top keys that are selected.

Per query row and head, of the k allowed keys with the highest logits, the share that the mask
selects. k is the number of keys that the row selects itself, so that 1 means that no better choice
of this size exists, or a fixed size. Keys that tie with the k-th highest logit count as top keys,
up to k of them.

Cost per measured row and layer: the logits of all keys in float32, and their order.
"""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from sah_core import AttentionMetric, Inputs, Mask, Size, hookimpl, param
from sah_core.measure import dense_logits


@attrs.frozen(kw_only=True, eq=False)
class Recall(AttentionMetric):
    """Share of the true top keys that are selected, per layer, query row and head."""

    name: ClassVar[str] = "recall"
    value_of_full: ClassVar[float] = 1.0

    k: Size | None = param(
        None,
        type=Size,
        minimum=1,
        help="how many top keys; none takes as many as the row selects",
    )

    def measure(self, inputs: Inputs, mask: Mask, output: Tensor) -> Tensor:
        """Share of the top keys as ``(batch, heads, query_len)``."""
        logits = dense_logits(inputs)
        selected = (mask.to_dense().to(inputs.device) > 0) & (logits > float("-inf"))
        available = (logits > float("-inf")).sum(-1)
        wanted = self._wanted(selected.sum(-1), available)
        lowest = logits.sort(-1, descending=True).values.gather(-1, wanted.unsqueeze(-1) - 1)
        hits = (selected & (logits >= lowest)).sum(-1)
        return torch.minimum(hits, wanted) / wanted

    def _wanted(self, selected: Tensor, available: Tensor) -> Tensor:
        """How many top keys each row has: at least one, at most those that it may attend."""
        if self.k is None:
            wanted = selected
        elif self.k.tokens is not None:
            wanted = torch.full_like(available, self.k.tokens)
        else:
            wanted = (available.double() * (self.k.fraction or 1.0)).long()
        return torch.minimum(wanted, available).clamp(min=1)


@hookimpl
def sah_metric() -> type[Recall]:
    """Register the metric."""
    return Recall
