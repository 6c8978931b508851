"""Assistants that draft from within the model: blocks from its hidden states, or by its keys."""

import inspect

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4TextConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MuseGlimmerAssistantConfig,
)
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from sah_core import Request
from sah_core.errors import ModelNotFoundError, ParameterError, RequestError
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
QUESTIONS = ("who is in the tin?", "where is the hen?")
LENGTH = 12
PIPELINES = (
    "dense",
    "sink(2) | local(4)",
    "sink(2) | quest(8, page_size=4)",
    "oracle-top-k(6) @ prefill=sparse",
)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Repeating(LogitsProcessor):
    """Favours a repeating text, for model and drafts alike, so that many drafts are right."""

    def __call__(self, input_ids, scores):
        scores[:, input_ids[:, -9]] += 30.0
        return scores


def block_drafter(**options):
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "sliding_window": 8,
        "block_size": 4,
        "mask_token_id": 5,
        "target_layer_ids": [0, 1],
        **HEADS,
        **SPECIALS,
        **options,
    }
    torch.manual_seed(1)
    model = AutoModel.from_config(MuseGlimmerAssistantConfig(**settings)).eval()
    for weight in model.layers.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def drafter():
    return block_drafter()


@pytest.fixture
def drafted(drafter):
    """What the assistant was given and what it made of it, in order."""
    seen = []

    def note(module, arguments, named, output):
        names = ("noise_embeds", "context_hidden_states", "position_ids")
        seen.append([*(named[name].clone() for name in names), output.last_hidden_state.clone()])

    hook = drafter.register_forward_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


class Passes:
    """Counts the passes of a model by their rows."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(
            lambda module, arguments, named: self.rows.append(named["input_ids"].shape[1]),
            with_kwargs=True,
        )
        return self

    def __exit__(self, *error):
        self.hook.remove()


def tokens(adapter, options=(), questions=QUESTIONS, **request_options):
    request = Request(context=CONTEXT, questions=questions)
    given = {"max_new_tokens": LENGTH, **dict(options)}
    details = adapter.process_request(request, given, request_options).details
    return [detail.token_ids for detail in details]


def generated(adapter, question, **options):
    """What transformers alone makes of a question."""
    ids = torch.tensor([adapter.tokenizer(f"{CONTEXT}\n{question}").input_ids])
    made = adapter.model.generate(ids, pad_token_id=0, eos_token_id=[2], **options)
    return tuple(made[0, ids.shape[1] :].tolist())


def assert_same(found, expected):
    assert found
    assert len(found) == len(expected)
    for mine, its in zip(found, expected, strict=True):
        for one, other in zip(mine, its, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def by_blocks(assistant, **options):
    return {"assistant_model": assistant, "speculation_type": "dflash", **options}


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("family", ["llama", "deepseek-v3", "gemma3"])
def test_blocks_change_no_token_and_save_passes_where_they_are_right(
    make, drafter, pipeline, family
):
    adapter = make(pipeline, family)
    assert tokens(adapter, by_blocks(drafter)) == tokens(adapter)
    options = {"logits_processor": LogitsProcessorList([Repeating()])}
    with Passes(adapter.model) as plain:
        expected = tokens(adapter, options)
    with Passes(adapter.model) as fewer:
        assert tokens(adapter, by_blocks(drafter, **options)) == expected
    assert max(fewer.rows[2:]) > 1
    assert len(fewer.rows) < len(plain.rows) / 2


@pytest.mark.parametrize("layers", [[0, 1], [0], [1]])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_blocks_start_from_what_they_start_from_in_transformers_alone(make, family, layers):
    adapter, assistant, seen = make("dense", family), block_drafter(target_layer_ids=layers), []
    assistant.register_forward_hook(
        lambda module, arguments, named, output: seen.append(
            [named["context_hidden_states"], named["position_ids"], output.last_hidden_state]
        ),
        with_kwargs=True,
    )
    options = {"max_new_tokens": LENGTH, **by_blocks(assistant)}
    tokens(adapter, options)
    found, seen[:] = list(seen), []
    for question in QUESTIONS:
        generated(adapter, question, do_sample=False, **options)
    assert found[0][0].shape[1] > len(CONTEXT) // 2
    assert_same(found, seen)


def test_sampling_draws_what_transformers_alone_draws(make, drafter):
    adapter = make()
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.8, **by_blocks(drafter)}
    for question in QUESTIONS:
        draws = {**options, "seed": 4, "num_return_sequences": 2}
        request = Request(context=CONTEXT, questions=[question])
        [detail] = adapter.process_request(request, draws).details
        torch.manual_seed(4)
        expected = [generated(adapter, question, **options) for _ in range(2)]
        assert [detail.token_ids, *(other.token_ids for other in detail.others)] == expected


@pytest.mark.parametrize("pipeline", ["dense", "oracle-top-k(6) @ prefill=sparse"])
def test_a_context_that_was_read_without_thought_of_drafts_is_read_once_more(
    make, drafter, drafted, pipeline
):
    adapter, chunks = make(pipeline), {"prefill_chunk_size": 7}
    options = {"max_new_tokens": LENGTH, **by_blocks(drafter)}
    request = Request(context=CONTEXT, questions=QUESTIONS)
    expected = adapter.process_request(request, options, chunks)
    kept = list(drafted)
    prefilled = adapter.prefill(request, chunks, pipeline)
    for _ in range(2):
        drafted.clear()
        assert adapter.answer(prefilled, pipeline, options).responses == expected.responses
        assert_same(drafted, kept)


def test_one_context_serves_assistants_that_start_from_different_layers(make, drafter):
    adapter = make("sink(2) | local(4)")
    request = Request(context=CONTEXT, questions=QUESTIONS)
    prefilled = adapter.prefill(request)
    plain = {"max_new_tokens": LENGTH}
    expected = adapter.answer(prefilled, generation_kwargs=plain).responses
    for assistant in (drafter, block_drafter(target_layer_ids=[1]), drafter):
        options = {**plain, **by_blocks(assistant)}
        assert adapter.answer(prefilled, generation_kwargs=options).responses == expected


def test_such_an_assistant_may_be_named_and_needs_no_tokenizer(make, drafter, drafted, tmp_path):
    drafter.save_pretrained(tmp_path)
    adapter = make("local(4)")
    expected = tokens(adapter)
    assert tokens(adapter, by_blocks(str(tmp_path))) == expected
    assert tokens(adapter, by_blocks(str(tmp_path))) == expected
    with pytest.raises(ModelNotFoundError, match="there is no such file or folder"):
        tokens(adapter, by_blocks(str(tmp_path / "none")))
    (tmp_path / "model.safetensors").unlink()
    other = HuggingFaceAdapter.of(adapter.loaded)
    with pytest.raises(ModelNotFoundError, match="model.safetensors"):
        tokens(other, by_blocks(str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden_size": 32}, "its hidden states have 32 numbers, those of LlamaForCausalLM 64"),
        ({"target_layer_ids": [0, 2]}, "it reads layer 2, and LlamaForCausalLM has 2 layers"),
        (
            {"mask_token_id": 128},
            "its mask token 128 is none of the 128 tokens of LlamaForCausalLM",
        ),
    ],
)
def test_an_assistant_made_for_another_model_is_refused_before_anything_is_read(
    make, options, reason
):
    adapter = make()
    with Passes(adapter.model) as passes, pytest.raises(RequestError) as caught:
        tokens(adapter, by_blocks(block_drafter(**options)))
    assert str(caught.value) == (
        "MuseGlimmerAssistantModel cannot be an assistant_model with speculation_type='dflash': "
        + reason
    )
    assert not passes.rows


def test_a_plain_assistant_drafts_no_blocks_and_one_for_blocks_nothing_else(make, models, drafter):
    adapter = make()
    with Passes(adapter.model) as passes:
        with pytest.raises(RequestError, match=r"LlamaForCausalLM .* has no target_layer_ids"):
            tokens(adapter, by_blocks(models.build("llama")))
        with pytest.raises(RequestError, match="drafts blocks; give speculation_type='dflash'"):
            tokens(adapter, {"assistant_model": drafter})
    assert not passes.rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": None}, "speculation_type needs an assistant_model"),
        ({"speculation_type": "eagle"}, "speculation_type = 'eagle' .* expected 'dflash'"),
        ({"use_mtp": True}, "assistant_model and use_mtp exclude each other"),
        ({"num_beams": 2}, "assistant_model does not go together with num_beams=2"),
        ({"guidance_scale": 2.0}, "assistant_model does not go together with guidance_scale"),
        ({"num_assistant_tokens": 3}, "num_assistant_tokens does not go together with speculation"),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "speculation_type does not go together with output_hidden_states",
        ),
    ],
)
def test_what_does_not_go_together_with_blocks_is_found_without_a_model(options, message):
    with pytest.raises((RequestError, ParameterError), match=message):
        HuggingFaceAdapter.check_generation({**by_blocks("a-model"), **options})


# Assistants that attend to the keys of the model


def gemma4(**options):
    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "global_head_dim": 16,
        "num_global_key_value_heads": 2,
        "max_position_embeddings": 512,
        "sliding_window": 8,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **HEADS,
        **SPECIALS,
        **options,
    }
    return Gemma4TextConfig(**settings)


@pytest.fixture(scope="module")
def shares(models):
    """An adapter's model, and an assistant that attends to its keys."""
    types = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = gemma4(num_hidden_layers=4, layer_types=types * 2, num_kv_shared_layers=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    own = gemma4(num_hidden_layers=2, layer_types=types, num_kv_shared_layers=2)
    assistant = Gemma4AssistantForCausalLM(
        Gemma4AssistantConfig(text_config=own, backbone_hidden_size=64)
    ).eval()
    assistant.generation_config.num_assistant_tokens = 3
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    loaded = Loaded(model=model, tokenizer=models.tokenizer(), source=source, weights_hash="0")
    return loaded, assistant


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_drafts_by_the_models_keys_change_no_token(shares, pipeline):
    loaded, assistant = shares
    adapter = HuggingFaceAdapter.of(loaded, pipeline)
    with Passes(adapter.model) as passes:
        found = tokens(adapter, {"assistant_model": assistant, "num_assistant_tokens": 2})
    assert passes.rows.count(3) > 2
    assert found == tokens(adapter)


def test_they_are_what_transformers_alone_drafts(shares):
    generator = SinglePositionMultiTokenCandidateGenerator
    if "is_main_model_prefill" not in inspect.getsource(generator):
        pytest.skip("this transformers drafts first from the hidden state of the first token")
    loaded, assistant = shares
    adapter, seen = HuggingFaceAdapter.of(loaded), []
    hook = assistant.register_forward_hook(
        lambda module, arguments, named, output: seen.append(
            [named["inputs_embeds"], named["position_ids"], output.logits]
        ),
        with_kwargs=True,
    )
    options = {"max_new_tokens": LENGTH, "assistant_model": assistant}
    try:
        tokens(adapter, options)
        found, seen[:] = list(seen), []
        for question in QUESTIONS:
            generated(adapter, question, do_sample=False, **options)
    finally:
        hook.remove()
    assert_same(found, seen)


def test_right_drafts_by_the_models_keys_save_passes(shares, monkeypatch):
    loaded, assistant = shares
    adapter = HuggingFaceAdapter.of(loaded, "sink(2) | quest(8, page_size=4)")
    expected = tokens(adapter)
    forward, drafts = type(assistant).forward, {}

    def foreseen(self, **arguments):
        made = forward(self, **arguments)
        last = int(arguments["position_ids"])
        drafts[last] = drafts.get(last, 0) + 1
        place = min(last - foreseen.begin + drafts[last], len(foreseen.answer) - 1)
        made.logits[..., foreseen.answer[place]] += 1e4
        return made

    monkeypatch.setattr(type(assistant), "forward", foreseen)
    for answer, question in zip(expected, QUESTIONS, strict=True):
        prompt = adapter.prefill(Request(context=CONTEXT, questions=question)).prompts[0]
        foreseen.answer, foreseen.begin = answer, len(prompt.ids)
        drafts.clear()
        with Passes(adapter.model) as passes:
            assert tokens(adapter, {"assistant_model": assistant}, [question]) == [answer]
        assert len(passes.rows) <= 2 + -(-len(answer) // 4)


def test_such_an_assistant_is_refused_where_it_cannot_assist_before_anything_is_read(make, shares):
    loaded, assistant = shares
    adapter, config = HuggingFaceAdapter.of(loaded), assistant.config
    cases = [
        (make(), {}, "it attends to the keys of Gemma 4, which LlamaForCausalLM is not"),
        (adapter, {"backbone_hidden_size": 32}, "it is made for hidden states of 32 numbers, and"),
    ]
    for one, changed, reason in cases:
        before = {name: getattr(config, name) for name in changed}
        config.update(changed)
        try:
            with (
                Passes(one.model) as passes,
                pytest.raises(RequestError, match=f"cannot be the assistant_model: {reason}"),
            ):
                tokens(one, {"assistant_model": assistant})
        finally:
            config.update(before)
        assert not passes.rows
    assistant.generation_config.num_assistant_tokens = None
    try:
        with pytest.raises(RequestError, match="how many tokens it drafts; give num_assistant_tok"):
            tokens(adapter, {"assistant_model": assistant})
        assert tokens(adapter, {"assistant_model": assistant, "num_assistant_tokens": 3})
    finally:
        assistant.generation_config.num_assistant_tokens = 3
