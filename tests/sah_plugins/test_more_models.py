"""Families beside those of `test_models`: each equals dense attention when everything is selected,
and looks at no later token.
"""

import pytest
import torch

from sah_core import attach, compat
from sah_core.probing import check_padding

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet", "no_grad")]

FAMILIES = (
    "apertus",
    "bitnet",
    "cohere",
    "cohere2-moe",
    "deepseek-v2",
    "dots1",
    "ernie4.5",
    "exaone4",
    "gemma",
    "glm",
    "glm4-moe",
    "gpt2",
    "gptj",
    "gpt-neox",
    "granite",
    "helium",
    "hunyuan",
    "lfm2",
    "llama4",
    "minimax-m2",
    "ministral",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "qwen2-moe",
    "qwen3.5",
    "seed-oss",
    "stablelm",
    "starcoder2",
)
LENGTH, CUTS, CHANGED = 33, (0, 24, 29, 30, 31, 32, 33), 21


def everywhere(model):
    known = ("full_attention", "sliding_attention", "chunked_attention")
    kinds = [kind for kind in dict.fromkeys(compat.layer_types(model)) if kind in known]
    return f"layer_types=[{', '.join(kinds)}]"


def forward(model, ids, kv_cache=None):
    options = {}
    if kv_cache is not None:
        options[compat.cache_argument(type(model).forward)] = kv_cache
    return model(ids, use_cache=kv_cache is not None, **options).logits


def through(model, ids):
    """Logits of prefill, question and decoded tokens, on a cache of ours."""
    kv_cache = compat.make_cache(model, LENGTH)
    pieces = zip(CUTS[:-1], CUTS[1:], strict=True)
    return torch.cat([forward(model, ids[:, begin:end], kv_cache) for begin, end in pieces], 1)


def error(found, expected):
    """The greatest relative error of a token's logits."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def test_all_families_are_tried(models):
    assert set(FAMILIES) == set(models.MORE)


@pytest.mark.parametrize("family", FAMILIES)
def test_selecting_everything_equals_dense_and_a_selection_looks_at_nothing_later(models, family):
    model, ids = models.build(family), models.tokens(1, LENGTH)
    dense, where = forward(model, ids), everywhere(model)
    for backend in ("eager", "gather"):
        with attach(model, f"oracle-top-k(1.0) @ prefill=sparse, backend={backend}, {where}"):
            assert error(forward(model, ids), dense) < 2e-4
            assert error(through(model, ids), dense) < 2e-4
    changed = ids.clone()
    changed[0, CHANGED] = (changed[0, CHANGED] + 1 - 5) % 100 + 5
    with attach(model, f"sink(1) | local(2) | oracle-top-k(3) @ prefill=sparse, {where}"):
        one, other, stepwise = forward(model, ids), forward(model, changed), through(model, ids)
    assert error(one[:, :CHANGED], other[:, :CHANGED]) < 1e-4
    assert error(one[:, CHANGED:], other[:, CHANGED:]) > 1e-3
    # the first two would hold if nothing were patched
    assert error(stepwise, dense) > 1e-3
    check_padding(model)
