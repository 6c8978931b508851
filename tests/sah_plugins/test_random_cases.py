"""Random golden cases of maskers, in the file format of `sah-bench verify maskers`.

The expected selections come from the definitions, row by row in float64. Shapes and parameters are
drawn: no keys in a fraction, fewer keys than any budget, odd pages and head groups, one bit per
label, padding, more channels in a group than in a head.
"""

import json
import math
import random

import pytest
import torch
from safetensors.torch import save_file

from sah_core.testing.golden import run_maskers

pytestmark = pytest.mark.unit

FRACTIONS = (0.001, 0.05, 0.1, 0.29, 0.57, 0.9, 1.0)
TOKENS = (1, 3, 8, 16, 64)
SHARES = (1e-6, 0.1, 0.5, 0.9, 0.9999, 1.0)
REDUCTIONS = ("none", "sum", "mean", "max")
GAP = 2e-5
"""Cases in which float32 could choose otherwise are drawn again."""


def count(size, keys):
    return math.floor(size * keys) if isinstance(size, float) else size


def rounded(vector, bits):
    low, high = vector.min(), vector.max()
    step = (high - low) / (2**bits - 1)
    if bits == 16 or step == 0:
        return vector
    return torch.round((vector - low) / step) * step + low


def grouped(scores, group, reduction):
    """One score per KV head for all of its query heads; scores are ``[heads][candidates]``."""
    if reduction == "none":
        return scores
    joined = scores.unflatten(0, (-1, group))
    joined = joined.amax(1) if reduction == "max" else getattr(joined, reduction)(1)
    return joined.repeat_interleave(group, 0)


class Row:
    """One query row of one sequence: what each head has selected so far, step by step.

    Attributes:
        gap: The smallest distance from a choice that would have been another one.
    """

    def __init__(self, case, query, key, value, position, first):
        self.case, self.query, self.key, self.value = case, query, key, value
        self.group = query.shape[0] // key.shape[0]
        self.position, self.first, self.keys = position, first, key.shape[1] - first
        self.open = range(first, position + 1)
        self.chosen = [set() for _ in query]
        self.gap = math.inf

    def add(self, name, params):
        getattr(self, name)(**params)

    def sink(self, sink_size):
        for chosen in self.chosen:
            chosen |= {i for i in self.open if i < self.first + count(sink_size, self.keys)}

    def local(self, window_size):
        width = count(window_size, self.keys)
        for chosen in self.chosen:
            chosen |= {i for i in self.open if i > self.position - width}

    def logits(self):
        key = self.key.repeat_interleave(self.group, 0)
        return torch.einsum("hd,hkd->hk", self.query, key) * self.case["scaling"]

    def best(self, scores, candidates, number):
        order = sorted(candidates, key=lambda i: (-float(scores[i]), i))
        if 0 < number < len(order):
            gap = float(scores[order[number - 1]] - scores[order[number]])
            self.gap = min(self.gap, gap)
        return order[:number]

    def oracle_top_k(self, heavy_size):
        for scores, chosen in zip(self.logits(), self.chosen, strict=True):
            left = set(self.open) - chosen
            chosen |= set(self.best(scores, left, count(heavy_size, self.keys)))

    def value_aware_top_k(self, heavy_size):
        norms = self.value.norm(dim=-1).repeat_interleave(self.group, 0)
        for scores, chosen in zip(self.logits() + norms.log(), self.chosen, strict=True):
            left = set(self.open) - chosen
            chosen |= set(self.best(scores, left, count(heavy_size, self.keys)))

    def twilight(self, top_p, label_bits):
        for head, chosen in enumerate(self.chosen):
            keys = self.key[head // self.group]
            exact = torch.stack([rounded(key, label_bits) for key in keys])
            scores = exact @ self.query[head] * self.case["scaling"]
            order = self.best(scores, chosen, len(chosen))
            mass = torch.softmax(scores[order], 0).cumsum(0) if order else torch.ones(0)
            if top_p < 1 and order:
                self.gap = min(self.gap, float((mass - top_p).abs().min()))
            number = len(order) if top_p == 1 else int((mass < top_p).sum()) + 1
            for left, right in zip(order[:number][-1:], order[number:][:1], strict=False):
                self.gap = min(self.gap, float(scores[left] - scores[right]))
            chosen.intersection_update(order[:number])

    def oracle_top_p(self, top_p):
        for scores, chosen in zip(self.logits(), self.chosen, strict=True):
            order = self.best(scores, set(self.open) - chosen, len(self.open))
            mass = torch.softmax(scores[order], 0).cumsum(0) if order else torch.ones(0)
            if top_p < 1 and order:
                self.gap = min(self.gap, float((mass - top_p).abs().min()))
            number = len(order) if top_p == 1 else int((mass < top_p).sum()) + 1
            chosen |= set(order[:number])

    def double_sparsity(
        self, heavy_size, group_factor, channel_selection, label_bits=16, group_reduction="none"
    ):
        layer = self.case["channels"][f"model.layers.2.self_attn.{channel_selection}"]
        width = max(1, self.query.shape[1] // group_factor)
        scores = torch.zeros(len(self.query), self.key.shape[1], dtype=torch.float64)
        for head, query in enumerate(self.query):
            channels = layer[head if len(layer) == len(self.query) else head // self.group][:width]
            label = rounded(query[channels], label_bits)
            for i in self.open:
                key = self.key[head // self.group, i][channels]
                scores[head, i] = label @ rounded(key, label_bits) / width**0.5
        scores = grouped(scores, self.group, group_reduction)
        before = [set(chosen) for chosen in self.chosen]
        for head, chosen in enumerate(self.chosen):
            begin = head // self.group * self.group
            peers = [before[head]]
            if group_reduction != "none":
                peers = before[begin : begin + self.group]
            left = set(self.open) - set.intersection(*peers)
            chosen |= set(self.best(scores[head], left, count(heavy_size, self.keys)))

    def quest(self, heavy_size, page_size, label_bits=16, group_reduction="none"):
        origins = range(self.first, self.key.shape[1], page_size)
        scores = torch.zeros(len(self.query), len(origins), dtype=torch.float64)
        for head, query in enumerate(self.query):
            for page, begin in enumerate(origins):
                rows = self.key[head // self.group, begin : begin + page_size]
                ends = [rounded(rows.amin(0), label_bits), rounded(rows.amax(0), label_bits)]
                scores[head, page] = torch.maximum(query * ends[0], query * ends[1]).sum()
        scores = grouped(scores, self.group, group_reduction)
        there = [p for p, begin in enumerate(origins) if begin <= self.position]
        pages = max(3, count(heavy_size, self.keys) // page_size)
        for head, chosen in enumerate(self.chosen):
            for page in self.best(scores[head], there, pages):
                run = range(origins[page], origins[page] + page_size)
                chosen |= set(run) & set(self.open)


def size(draw):
    return draw.choice(draw.choice((FRACTIONS, TOKENS)))


def steps(kind, draw):
    """A pipeline of the kind with drawn parameters."""
    both = [("sink", {"sink_size": size(draw)}), ("local", {"window_size": size(draw)})]
    if kind in ("sink", "local", "streaming"):
        return {"sink": both[:1], "local": both[1:], "streaming": both}[kind]
    name = {"topk": "oracle_top_k", "topp": "oracle_top_p"}.get(kind, kind)
    params = {"heavy_size": size(draw)} if kind != "topp" else {"top_p": draw.choice(SHARES)}
    if kind == "twilight":
        params = {"top_p": draw.choice(SHARES), "label_bits": draw.choice((2, 4, 8, 16))}
        both += [("oracle_top_k", {"heavy_size": size(draw)})]
        return [*both, (name, params)]
    if kind in ("quest", "double_sparsity"):
        params["label_bits"] = draw.choice((1, 2, 3, 4, 8, 15, 16))
        params["group_reduction"] = draw.choice(REDUCTIONS)
    if kind == "quest":
        params["page_size"] = draw.choice((2, 3, 5, 8, 16))
    if kind == "double_sparsity":
        params["group_factor"] = draw.choice((1, 3, 4, 8, 40))
        params["channel_selection"] = draw.choice(("qk_proj", "q_proj", "k_proj"))
    return [*(both if draw.random() < 0.5 else []), (name, params)]


def write(path, kind, seed):
    """Draw a case and write its file; another one where float32 might choose otherwise."""
    draw, generator = random.Random(f"{kind} {seed}"), torch.Generator().manual_seed(seed)
    gap = 0.0
    while gap < GAP:
        pipeline = steps(kind, draw)
        key_len, head_dim = draw.randint(1, 40), draw.choice((4, 6, 16, 20))
        query_len = draw.choice((1, min(5, key_len), key_len))
        batch, kv_heads, group = draw.randint(1, 2), draw.randint(1, 2), draw.randint(1, 4)
        heads = kv_heads * group
        firsts = [draw.choice((0, draw.randrange(key_len))) for _ in range(batch)]
        shapes = ((heads, query_len), (kv_heads, key_len), (kv_heads, key_len))
        query, key, value = (
            torch.randn(batch, *shape, head_dim, generator=generator) for shape in shapes
        )
        channels = {
            f"model.layers.{layer}.self_attn.{selection}": [
                draw.sample(range(head_dim), head_dim) for _ in range(number)
            ]
            for layer in range(4)
            for selection, number in (("qk_proj", heads), ("q_proj", heads), ("k_proj", kv_heads))
        }
        case = {"scaling": draw.choice((0.3, head_dim**-0.5)), "channels": channels}
        probability = torch.zeros(batch, heads, query_len, key_len)
        output = torch.zeros(batch, heads, query_len, head_dim)
        keep = torch.zeros(batch, 1, query_len, key_len, dtype=torch.bool)
        gap = math.inf
        for b, first in enumerate(firsts):
            for r in range(query_len):
                position = key_len - query_len + r
                keep[b, 0, r, first : position + 1] = True
                sequence = query[b, :, r].double(), key[b].double(), value[b].double()
                row = Row(case, *sequence, position, first)
                for name, params in pipeline:
                    row.add(name, params)
                gap = min(gap, row.gap)
                for h, chosen in enumerate(row.chosen):
                    found = sorted(chosen)
                    probability[b, h, r, found] = 1.0
                    weights = torch.softmax(row.logits()[h, found], 0)
                    output[b, h, r] = weights @ value[b, h // group, found].double()
    metadata = {
        "pipeline": json.dumps([{"masker": name, "params": params} for name, params in pipeline]),
        "scaling": repr(case["scaling"]),
        "layer_idx": "2",
        "case": path.stem,
    }
    if kind == "double_sparsity":
        metadata["sorted_channels"] = json.dumps(channels)
    tensors = {"query": query, "key": key, "value": value, "keep": keep}
    save_file({**tensors, "probability": probability, "output": output}, path, metadata)


@pytest.mark.parametrize(
    "kind",
    [
        "sink",
        "local",
        "streaming",
        "topk",
        "topp",
        "quest",
        "double_sparsity",
        "value_aware_top_k",
        "twilight",
    ],
)
def test_random_cases_of_every_kind_agree_with_their_definition(kind, tmp_path):
    for seed in range(12):
        write(tmp_path / f"{kind}.{seed}.safetensors", kind, seed)
    results = list(run_maskers([tmp_path], ["eager", "gather"]))
    assert len(results) == 24
    wrong = [r for r in results if r.status != "passed"]
    assert not wrong, "\n".join(f"{r.case} {r.backend}: {r.reason}" for r in wrong)
