"""Attention weights that a forward pass returns when it is asked for them."""

import pytest
import torch
from transformers import DynamicCache

from sah_core import (
    Allowed,
    Inputs,
    Mask,
    Pipeline,
    attach,
    compat,
    hookimpl,
    registry,
    weights,
)
from sah_core.attention import Session
from sah_core.patching import attention
from sah_core.testing import MODEL

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet", "no_grad")]

ALL_LAYERS = "layer_types=[full_attention, sliding_attention]"
EXACT = "sink(2) | local(3) | oracle-top-k(3)"
PADDING = (5, 0)


@pytest.fixture(scope="module")
def built(models):
    made = {}

    def get(family):
        if family not in made:
            made[family] = models.build(family)
            made[family].set_attn_implementation("eager")
        return made[family]

    return get


class Computed:
    """What was computed, by call: key and value, mask and output."""

    def __init__(self):
        self.calls = []

    @hookimpl
    def sah_attention_computed(self, inputs, mask, output):
        self.calls.append((inputs, mask, output))


def padded(models, length=24):
    ids = models.tokens(len(PADDING), length)
    real = torch.ones_like(ids)
    for row, count in enumerate(PADDING):
        real[row, :count] = 0
    return ids, real


def attended(matrix, value):
    """Weights times values, ``(batch, query_len, heads, value_dim)``."""
    spread = value.repeat_interleave(matrix.shape[1] // value.shape[1], dim=1)
    return (matrix @ spread).transpose(1, 2)


@pytest.mark.parametrize("pipeline", [EXACT, "random-sampling(0.3)", "sink(2) | quest(8)"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss", "deepseek-v3", "gpt2"])
def test_they_are_those_with_which_the_output_was_computed(models, built, family, pipeline):
    model, computed = built(family), Computed()
    ids, real = padded(models)
    text = f"{pipeline} @ prefill=sparse, {ALL_LAYERS}"
    with attach(model, text, observers=[computed]):
        found = model(ids, attention_mask=real, output_attentions=True).attentions
    assert len(found) == len(computed.calls) == model.config.num_hidden_layers
    for matrix, (inputs, mask, output) in zip(found, computed.calls, strict=True):
        assert matrix.shape == inputs.shape
        torch.testing.assert_close(attended(matrix, inputs.value), output, atol=1e-5, rtol=1e-4)
        chosen = (mask.to_dense() > 0) & inputs.allowed.to_dense(inputs.key_len)
        assert ((matrix > 0) <= chosen).all()
        assert 0 < (matrix > 0).float().mean() < 0.7
        if pipeline == EXACT and family != "gpt-oss":  # sinks take their share
            ends = chosen.any(-1).float()
            torch.testing.assert_close(matrix.sum(-1), ends)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss", "deepseek-v3", "opt"])
def test_dense_ones_are_those_of_transformers(models, built, family):
    model = built(family)
    ids, real = padded(models)
    expected = model(ids, attention_mask=real, output_attentions=True).attentions
    with attach(model, f"local(1.0) @ {ALL_LAYERS}"):
        found = model(ids, attention_mask=real, output_attentions=True).attentions
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        for row, count in enumerate(PADDING):  # in rows of padding transformers attends to padding
            torch.testing.assert_close(
                one[row, :, count:], other[row, :, count:], atol=1e-5, rtol=1e-4
            )


def test_they_have_the_type_of_the_model(models):
    model = models.build("llama").to(torch.bfloat16)
    with attach(model, EXACT):
        found = model(models.tokens(1, 9), output_attentions=True).attentions
    assert {matrix.dtype for matrix in found} == {torch.bfloat16}


def test_a_plain_generate_returns_them_for_every_step(models, built):
    model, ids = built("llama"), models.tokens(1, 20)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 999}
    options |= {"output_attentions": True, "return_dict_in_generate": True}
    with attach(model, "sink(2) | local(4)"):
        steps = model.generate(ids, **options).attentions
    assert [layers[0].shape[2:] for layers in steps] == [(20, 20), (1, 21), (1, 22), (1, 23)]
    for layers in steps[1:]:
        for matrix in layers:
            assert (matrix > 0).sum(-1).unique().tolist() == [6]
            torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 4, 1))


def test_nobody_pays_for_them_who_does_not_ask(models, built, monkeypatch):
    model, ids = built("llama"), models.tokens(1, 20)

    def refuse(*arguments, **named):
        raise AssertionError("weights were made")

    monkeypatch.setattr("sah_core.attention.session.attention_weights", refuse)
    kv_cache = DynamicCache(config=model.config)
    given = {compat.cache_argument(type(model).forward): kv_cache}
    with attach(model, "sink(2) | local(4) @ backend=gather"):
        model(ids, **given)
        model(ids[:, :1], output_hidden_states=True, **given)
        with pytest.raises(AssertionError, match="weights were made"):
            model(ids[:, :1], output_attentions=True, **given)


def test_a_model_that_hands_its_arguments_on_gets_them_too(models):
    module = models.build("llama").model.layers[1].self_attn
    query, key, value = torch.randn(1, 4, 3, 16), *torch.randn(2, 1, 2, 3, 16)
    for asks in (False, True):
        output, matrix = attention(module, query, key, value, None, output_attentions=asks)
        assert (matrix is not None) == asks
    torch.testing.assert_close(attended(matrix, value), output)


@pytest.mark.parametrize("name", registry.maskers.names())
def test_rows_that_are_verified_have_those_of_rows_that_are_decoded(name, tmp_path):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(1, MODEL.heads, 60, MODEL.head_dim, generator=generator)
    cache = [
        torch.randn(1, MODEL.kv_heads, 60, MODEL.head_dim, generator=generator) for _ in range(2)
    ]
    pipeline = Pipeline.of(registry.maskers[name].example(tmp_path))

    def run(verified, passes):
        session, made = Session(pipeline, ("full_attention",) * MODEL.layers), []
        session.start_question(verified)
        for begin, end in passes:
            given = [tensor[:, :, :end] for tensor in cache]
            taken = []
            output = session.attend(
                0,
                query[:, :, begin:end],
                *given,
                Allowed.causal(end - begin, end),
                0.3,
                weights=taken,
            )
            [matrix] = taken
            assert matrix.shape == (1, MODEL.heads, end - begin, end)
            torch.testing.assert_close(attended(matrix, given[1]), output, atol=1e-5, rtol=1e-4)
            made.append(torch.nn.functional.pad(matrix, (0, 60 - end)))
        return torch.cat(made, dim=2)

    found = run(4, [(40, 46), (46, 50)])
    expected = run(None, [(40, 44), *((i, i + 1) for i in range(44, 50))])
    torch.testing.assert_close(found, expected)


def test_in_a_layer_with_a_window_they_stand_at_the_keys_that_the_call_was_given():
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, MODEL.heads, 5, MODEL.head_dim, generator=generator)
    key, value = (
        torch.randn(1, MODEL.kv_heads, 16, MODEL.head_dim, generator=generator) for _ in range(2)
    )
    pipeline = Pipeline.parse("sink(2) | local(3) @ layer_types=[sliding_attention]")
    session, taken = Session(pipeline, ("sliding_attention",) * MODEL.layers), []
    session.start_question(1)
    output = session.attend(
        0, query, key, value, Allowed.causal(5, 16, window=12), 0.3, weights=taken
    )
    torch.testing.assert_close(attended(taken[0], value), output)
    assert (taken[0][0, 0, -1] > 0).nonzero().flatten().tolist() == [4, 5, 13, 14, 15]


def test_a_key_that_may_not_be_attended_weighs_nothing_whatever_its_probability():
    generator = torch.Generator().manual_seed(4)
    inputs = Inputs(
        query=torch.randn(1, 2, 3, 8, generator=generator),
        key=torch.randn(1, 1, 6, 8, generator=generator),
        value=torch.randn(1, 1, 6, 8, generator=generator),
        allowed=Allowed.causal(3, 6),
        scaling=0.3,
        key_len=6,
    )
    probability = torch.rand(inputs.shape, generator=generator).round(decimals=1)
    mask = Mask.from_dense(probability)
    found, lse = weights.attention_weights(inputs, mask)
    for head in range(2):
        for row in range(3):
            parts = {
                k: (inputs.query[0, head, row] @ inputs.key[0, 0, k] * 0.3).exp()
                / probability[0, head, row, k]
                for k in range(4 + row)
                if probability[0, head, row, k] > 0
            }
            total = sum(parts.values())
            expected = torch.tensor([float(parts.get(k, 0.0) / total) for k in range(6)])
            torch.testing.assert_close(found[0, head, row], expected)
            torch.testing.assert_close(lse[0, head, row], total.log())
