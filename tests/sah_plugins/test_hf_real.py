"""The quick start and a needle, on SmolLM2."""

import pytest
import torch

from sah_core import Pipeline, Request, registry
from sah_plugins.adapters.hf import HuggingFaceAdapter

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def adapter():
    return HuggingFaceAdapter("smollm2-135m", device="cpu", dtype="float32")


@pytest.mark.usefixtures("real_model")
def test_the_quick_start_answers():
    sink, local = registry.maskers["sink"], registry.maskers["local"]
    model_kwargs = {"torch_dtype": torch.float32}
    adapter = HuggingFaceAdapter(
        "smollm2-135m",
        pipeline=sink(sink_size=128) | local(window_size=256),
        model_kwargs=model_kwargs,
        tokenizer_kwargs={"padding_side": "left"},
        device="cpu",
    )
    assert model_kwargs == {"torch_dtype": torch.float32}
    assert adapter.model.dtype == torch.float32
    response = adapter.process_request(
        request=Request(
            context="The capital of France is Paris. It is known for the Eiffel Tower.",
            questions="What is the capital of France?",
            answer_prefix="The capital of France is",
        ),
        generation_kwargs={"max_new_tokens": 12},
        request_kwargs={"max_context_length": 1024},
    )
    assert "Paris" in response.responses


@pytest.mark.usefixtures("real_model")
def test_the_context_is_read_with_smollm2s_own_template_and_without_bos(adapter):
    request = Request(context="A cat sat.", questions="Who sat?", answer_prefix="The")
    ids = adapter.prefill(request).prompts[0].ids
    text = adapter.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("A cat sat.\nWho sat?<|im_end|>\n<|im_start|>assistant\nThe")
    assert list(ids) == adapter.tokenizer(text).input_ids


@pytest.mark.usefixtures("real_model")
@pytest.mark.parametrize(
    ("context", "question"),
    [
        ('The link is <a href="http', ":"),
        ("I read a book", " about \n"),
        ("The capital of", " France is Par"),
        ("x = [1, 2, 3", "]."),
        ("", "print("),
        ("def main", "():\n"),
        ("He said:", ' "I am hap'),
        ("<ul><li", ">a</"),
    ],
)
def test_prompts_are_healed_as_by_transformers_alone(adapter, context, question):
    tokenizer, text = adapter.tokenizer, context + question
    options = {"max_new_tokens": 5, "token_healing": True}
    request = Request(context=context, questions=question, separator="", chat=False)
    [detail] = adapter.process_request(request, options).details
    ids = tokenizer(text, return_tensors="pt").input_ids
    [whole] = adapter.model.generate(ids, tokenizer=tokenizer, pad_token_id=2, **options).tolist()
    assert detail.token_ids == tuple(whole[-detail.new_tokens :])
    assert detail.prompt_tokens == len(whole) - detail.new_tokens
    assert tokenizer.decode(whole) == text.rstrip() + detail.text
    assert (detail.healed_token is not None) == (question == ":")


@pytest.mark.usefixtures("real_model")
def test_a_needle_is_found_densely_and_by_the_oracle_but_not_in_a_window(adapter):
    niah = registry.benchmarks["niah"](lengths=[1024], depths=[40], max_new_tokens=12)
    example = next(niah.examples(niah.tasks()[0], adapter.tokenizer, 0))
    request = Request(
        context=example.context,
        questions=example.question,
        answer_prefix=example.answer_prefix,
        separator="",
        chat=False,
    )
    prefilled = adapter.prefill(request)
    assert 800 < prefilled.context_tokens < 1100
    window = "sink(32) | local(32)"
    found = {}
    for pipeline in ("dense", window, f"{window} | oracle-top-k(0.1)"):
        answer = adapter.answer(
            prefilled, Pipeline.parse(pipeline), {"max_new_tokens": example.max_new_tokens}
        )
        found[pipeline] = example.references[0] in answer.responses
    assert list(found.values()) == [True, False, True]


@pytest.mark.usefixtures("real_model")
@pytest.mark.parametrize("pipeline", ["dense", "sink(4) | local(8) | quest(32, page_size=4)"])
def test_assisted_answers_are_those_without_assistance_and_take_fewer_passes(adapter, pipeline):
    adapter = HuggingFaceAdapter.of(adapter.loaded, pipeline)
    request = Request(
        context="Ann has a red ball, a blue box and a green key. Ben has a red box and a blue key.",
        questions="Repeat these two sentences word for word.",
    )

    def run(options):
        passes = []
        embeddings = adapter.model.get_input_embeddings()
        hook = embeddings.register_forward_pre_hook(lambda *call: passes.append(1))
        try:
            [detail] = adapter.process_request(request, {"max_new_tokens": 24, **options}).details
        finally:
            hook.remove()
        return detail.token_ids, len(passes)

    plain, alone = run({})
    found, passes = run({"prompt_lookup_num_tokens": 5})
    assert found == plain
    if pipeline == "dense":  # it does repeat the sentences, which can be looked up
        assert passes < alone
    assert run({"assistant_model": "smollm2-135m"})[0] == plain
