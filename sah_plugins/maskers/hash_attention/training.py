"""Training of the hash functions on the model's own attention.

As in the paper's section 4.2: for every query the keys of its highest logits are positives, and
binary cross-entropy on ``sigmoid(f_q(q) . f_k(k))`` over all causal pairs teaches the MLPs, with
positives counted ``positive_weight`` times. All layers learn at once, each by its own Adam, from
windows of text that the model reads once; a step takes a chunk of the window's queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core import Inputs, Size, param
from sah_core.artifacts import Material, ModelTool, Progress, watch_attention
from sah_core.errors import RequestError
from sah_core.ops import REFERENCE, apply_mlp
from sah_plugins.artifacts.texts import check_length, token_windows

from .weights import HashFunctions, Linear, write_weights

HELD_OUT = 0.1
"""Share of the text, at its end, that is kept from training and measures the result."""

MEASURED = 4
"""Windows of held-out text."""

RELAXATIONS = ("none", "tanh")


@attrs.frozen(kw_only=True)
class HashTraining(ModelTool):
    """Learn the hash functions of every layer and head of a model from text."""

    steps: int = param(400, minimum=1, help="Steps of the optimiser.")
    lr: float = param(1e-3, minimum=0, exclusive_minimum=True, help="Learning rate of Adam.")
    positive_weight: float = param(
        20.0, minimum=0, exclusive_minimum=True, help="How often a positive pair counts."
    )
    top: Size = param(
        0.1, type=Size, help="Keys of the highest logits that are positives, for every query."
    )
    length: int = param(1024, minimum=2, help="Tokens of a window.", unit="tokens")
    chunk: int = param(256, minimum=1, help="Queries of a step.", unit="queries")
    bits: int = param(32, minimum=1, help="Bits of a signature.", unit="bits")
    hidden: int = param(128, minimum=1, help="Width of the two hidden layers.")
    per_kv_head: bool = param(
        False, help="One key MLP per KV head, so that keys have one signature per KV head."
    )
    relaxation: str = param(
        "none",
        choices=RELAXATIONS,
        help="What stands for the signs while learning: none, the outputs as they are; or tanh.",
    )
    seed: int = param(0, minimum=0, help="Seed of the first weights.")

    def make(self, material: Material, output: Path, progress: Progress) -> Mapping[str, Any]:
        """Train, measure on held-out text, write the weights."""
        check_length(material.model, self.length)
        chunks = -(-self.length // self.chunk)
        count = -(-self.steps // chunks)
        model, read = material.model, (material.tokenizer, material.texts, self.length)
        windows = token_windows(*read, count, end=1 - HELD_OUT)
        held_out = token_windows(*read, MEASURED, begin=1 - HELD_OUT)
        layers: dict[int, LayerTraining] = {}
        first: dict[int, HashFunctions] = {}
        done = 0
        while done < self.steps:
            calls = attention_calls(model, windows[done // chunks % len(windows)])
            for layer, (query, key) in calls.items():
                if layer not in layers:
                    layers[layer] = LayerTraining(self, layer, query, key)
                    first[layer] = layers[layer].functions()
            for begin in range(0, self.length, self.chunk):
                if done == self.steps:
                    break
                rows = slice(begin, min(begin + self.chunk, self.length))
                losses = [
                    layers[layer].step(query[:, rows], key[:, : rows.stop])
                    for layer, (query, key) in calls.items()
                ]
                done += 1
                loss = sum(losses) / len(losses)
                if not math.isfinite(loss):
                    raise RequestError(
                        f"the loss is no longer finite at step {done}; set lr below {self.lr:g}"
                    )
                progress(done, self.steps, f"loss {loss:.3f}")
        trained = {layer: part.functions() for layer, part in layers.items()}
        recalls = {"recall": 0.0, "recall_untrained": 0.0}
        for window in held_out:
            calls = attention_calls(model, window)
            for name, functions in (("recall", trained), ("recall_untrained", first)):
                each = [recall(functions[i], q, k, self.top) for i, (q, k) in calls.items()]
                recalls[name] += sum(each) / len(each) / len(held_out)
        facts = {
            **material.metadata,
            "steps": str(self.steps),
            "length": str(self.length),
            "top": str(self.top),
            "relaxation": self.relaxation,
            "seed": str(self.seed),
            **{what: f"{value:.3f}" for what, value in recalls.items()},
        }
        return write_weights(output, trained, facts)


def attention_calls(model: Any, window: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Queries ``(heads, tokens, head_dim)`` and keys ``(kv_heads, ...)`` by layer, float32."""
    calls: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(inputs: Inputs) -> None:
        calls[inputs.layer] = (inputs.query[0].float(), inputs.key[0].float())

    watch_attention(model, window.to(model.device), watch)
    return calls


class LayerTraining:
    """The hash functions of one layer while they learn.

    Args:
        options: What was asked for.
        layer: Layer index, for the first weights.
        query: Queries of a call, for the numbers of heads and channels.
        key: Keys of it.
    """

    def __init__(self, options: HashTraining, layer: int, query: Tensor, key: Tensor) -> None:
        self.options = options
        draw = torch.Generator().manual_seed(options.seed * 100_003 + layer)
        widths = [query.shape[2], options.hidden, options.hidden, options.bits]
        key_heads = key.shape[0] if options.per_kv_head else query.shape[0]
        first = random_functions(query.shape[0], key_heads, widths, draw).to(query.device)
        self.query, self.key = (
            tuple((weight.requires_grad_(), bias.requires_grad_()) for weight, bias in side)
            for side in (first.query, first.key)
        )
        parameters = [t for side in (self.query, self.key) for linear in side for t in linear]
        self.optimiser = torch.optim.Adam(parameters, lr=options.lr)

    @torch.enable_grad()
    def step(self, query: Tensor, key: Tensor) -> float:
        """Learn from some query rows, the last of which is at the last key.

        Args:
            query: ``(heads, rows, head_dim)``.
            key: ``(kv_heads, keys, head_dim)``.

        Returns:
            The loss before the step.
        """
        open_pairs, positive = best_pairs(query, key, self.options.top)
        hashed, keys = apply_mlp(self.query, query), self._keys(key, query.shape[0])
        if self.options.relaxation == "tanh":
            hashed, keys = hashed.tanh(), keys.tanh()
        logits = torch.matmul(hashed, keys.transpose(1, 2))
        weight = torch.where(positive, self.options.positive_weight, 1.0) * open_pairs
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, positive.float(), weight, reduction="sum"
        )
        loss = loss / (open_pairs.sum() * query.shape[0])
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def _keys(self, key: Tensor, heads: int) -> Tensor:
        own = self.key[0][0].shape[0]
        hashed = apply_mlp(self.key, key.repeat_interleave(own // key.shape[0], dim=0))
        return hashed.repeat_interleave(heads // own, dim=0)

    def functions(self) -> HashFunctions:
        """The hash functions as they are now, a copy."""

        def copied(side: Sequence[Linear]) -> tuple[Linear, ...]:
            return tuple((weight.detach().clone(), bias.detach().clone()) for weight, bias in side)

        return HashFunctions(copied(self.query), copied(self.key))


def random_functions(
    heads: int, key_heads: int, widths: Sequence[int], draw: torch.Generator
) -> HashFunctions:
    """Untrained hash functions, drawn as torch draws those of linear layers.

    Args:
        heads: Query heads.
        key_heads: Heads that keys have signatures for.
        widths: Channels, hidden values and bits.
        draw: Where the numbers come from.
    """

    def mlp(count: int) -> tuple[Linear, ...]:
        made = []
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            bound = inputs**-0.5
            weight, bias = (
                (torch.rand(count, rows, outputs, generator=draw) * 2 - 1) * bound
                for rows in (inputs, 1)
            )
            made.append((weight, bias))
        return tuple(made)

    return HashFunctions(mlp(heads), mlp(key_heads))


def best_pairs(query: Tensor, key: Tensor, top: Size) -> tuple[Tensor, Tensor]:
    """Which pairs are causal, bool ``(rows, keys)``, and which are among the best of their query,
    bool ``(heads, rows, keys)``.
    """
    logits = REFERENCE.logits(query.unsqueeze(0), key.unsqueeze(0), 1.0)[0]
    rows, keys = logits.shape[1:]
    open_pairs = torch.ones(rows, keys, dtype=torch.bool, device=logits.device).tril(keys - rows)
    return open_pairs, best_keys(logits, top)


def best_keys(scores: Tensor, top: Size) -> Tensor:
    """The best keys of each row among those up to its position, as many as ``top`` says of these,
    at least one; of equal ones the first.

    Args:
        scores: float32 ``(heads, rows, keys)``, the last row being at the last key.
        top: How many.

    Returns:
        bool ``(heads, rows, keys)``.
    """
    rows, keys = scores.shape[1:]
    stops = range(keys - rows + 1, keys + 1)
    counts = [min(stop, max(1, top.resolve(stop))) for stop in stops]
    count, stop = (
        torch.tensor(numbers, dtype=torch.int32, device=scores.device).view(1, 1, -1)
        for numbers in (counts, list(stops))
    )
    chosen, _ = REFERENCE.masked_topk(scores[None], max(counts), count=count, stop=stop)
    best = torch.zeros(*scores.shape[:2], keys + 1, dtype=torch.bool, device=scores.device)
    # entries that were not needed are -1: they go into a column that is cut off
    slots = chosen[0].long()
    return best.scatter_(-1, torch.where(slots < 0, keys, slots), True)[..., :keys]


def recall(functions: HashFunctions, query: Tensor, key: Tensor, top: Size) -> float:
    """The share of the best keys that signatures find, at equal size, over a window's second half.

    Early queries have few keys to choose from, and finding the best of them says little.
    """
    half = query.shape[1] // 2
    query = query[:, half:]
    _, best = best_pairs(query, key, top)
    own = functions.key_heads
    keys = apply_mlp(functions.key, key.repeat_interleave(own // key.shape[0], dim=0))
    asked = REFERENCE.pack_signs(apply_mlp(functions.query, query))
    held = REFERENCE.pack_signs(keys)
    scores = REFERENCE.hamming_scores(asked[None], held[None], functions.bits, key.shape[0])[0]
    found = best_keys(scores, top)
    return float((found & best).sum() / best.sum())
