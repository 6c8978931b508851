import copy
import time

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from sah_core import Request, compat, hookimpl
from sah_core.errors import (
    ContextTooLongError,
    ParameterError,
    RequestError,
    SahError,
    UnsupportedError,
)
from sah_core.models import ModelSource
from sah_core.probing import check_reading
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded
from sah_plugins.metrics.density import Density

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

FAMILIES = ("llama", "gemma2", "gemma3", "gpt-oss")
PIPELINES = (
    "dense",
    "sink(4) | local(4)",
    "sink(2) | local(2) | oracle-top-k(0.1)",
    "sink(2) | quest(8, page_size=4)",
)
CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
QUESTIONS = ("who is in the tin?", "where is the hen?", "is the rat on it?")
NEW = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def make(models):
    """Makes adapters; a model is built once per family."""
    built = {}

    def adapter(family="llama", pipeline="dense", **tokenizer):
        if family not in built:
            built[family] = models.build(family)
        return wrap(built[family], models.tokenizer(**tokenizer), pipeline)

    return adapter


def wrap(model, tokenizer, pipeline="dense"):
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    loaded = Loaded(model=model, tokenizer=tokenizer, source=source, weights_hash="0")
    return HuggingFaceAdapter.of(loaded, pipeline)


class Passes:
    """Counts the tokens of every forward pass through a model."""

    def __init__(self, model):
        check_reading(model)  # a model is tried once, before its first context
        self.tokens = []
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.tokens.append(ids.shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.handle.remove()


def plain_answer(adapter, prompt, new_tokens=6):
    """What transformers alone generates for a text."""
    ids = torch.tensor([adapter.tokenizer(prompt).input_ids])
    out = adapter.model.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=[2]
    )
    return tuple(out[0, ids.shape[1] :].tolist())


# Many questions, one prefill


def test_the_questions_of_a_context_cost_one_prefill(make):
    adapter = make()
    with Passes(adapter.model) as passes:
        response = adapter.process_request(Request(context=CONTEXT, questions=QUESTIONS), NEW)
    details = response.details
    context = details[0].context_tokens
    assert [d.context_tokens for d in details] == [context] * 3
    expected = [context]
    for detail in details:
        expected.append(detail.prompt_tokens - context)
        expected += [1] * (detail.new_tokens - 1)
    assert passes.tokens == expected


@pytest.mark.parametrize(
    "pipeline", [*PIPELINES, *(f"{pipeline} @ prefill=sparse" for pipeline in PIPELINES[1:])]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_those_of_separate_requests(models, make, family, pipeline):
    adapter = make(family, pipeline, chat=models.PLAIN_CHAT if family == "llama" else None)
    together = adapter.process_request(Request(context=CONTEXT, questions=QUESTIONS), NEW)
    separate = [
        adapter.process_request(Request(context=CONTEXT, questions=q), NEW) for q in QUESTIONS
    ]
    assert together.responses == [response.responses for response in separate]
    assert [d.token_ids for d in together.details] == [r.details[0].token_ids for r in separate]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_depend_on_the_question_and_on_the_context(make, family):
    # the tests above and below would pass if they did not
    adapter = make(family)
    answers = set()
    for context in (CONTEXT, CONTEXT.replace("hen", "ant")):
        request = Request(context=context, questions=QUESTIONS)
        answers.update(adapter.process_request(request, NEW).responses)
    assert len(answers) >= (6 if family == "llama" else 3)


@pytest.mark.parametrize("pipeline", ["dense", "local(1.0)", "oracle-top-k(1.0) @ prefill=sparse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_those_of_transformers_alone(make, family, pipeline):
    adapter = make(family, pipeline)
    response = adapter.process_request(Request(context=CONTEXT, questions=QUESTIONS), NEW)
    for question, detail in zip(QUESTIONS, response.details, strict=True):
        assert detail.token_ids == plain_answer(adapter, f"{CONTEXT}\n{question}")


@pytest.mark.parametrize("pipeline", [*PIPELINES, f"{PIPELINES[3]} @ prefill=sparse"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_contexts_that_end_differently_for_each_question_give_the_same_answers(
    make, family, pipeline
):
    # without a separator, ". " or "\n\n" reach from the context into some questions only
    adapter = make(family, pipeline)
    questions = ("\nwho is there?", " then who?", "who is it?")
    request = {"context": "an ant and a hen.\nthe rat is red.", "separator": ""}
    together = adapter.process_request(Request(questions=questions, **request), NEW)
    assert len({d.context_tokens for d in together.details}) > 1
    for index, question in enumerate(questions):
        alone = adapter.process_request(Request(questions=question, **request), NEW)
        assert alone.details[0].token_ids == together.details[index].token_ids
    again = adapter.process_request(Request(questions=questions[::-1], **request), NEW)
    assert again.responses == together.responses[::-1]


@pytest.mark.parametrize(
    ("pipeline", "options"),
    [
        ("quest(8, page_size=4) @ prefill=sparse", {"prefill_chunk_size": 9}),
        ("sink(1) | oracle-top-k(30%) @ prefill=sparse", {}),
    ],
)
def test_a_question_whose_context_ends_elsewhere_has_the_sparse_prefill_that_it_has_alone(
    make, pipeline, options
):
    # pages are judged by the keys of a pass, and a fraction counts them
    adapter = make(pipeline=pipeline)
    context = "ant. the an and ant? an\nq? ink\nink\nan? an\nand."
    request, questions = {"context": context, "separator": ""}, (" b", "\nwho is?", "the")
    together = adapter.process_request(Request(questions=questions, **request), NEW, options)
    assert len({d.context_tokens for d in together.details}) > 1
    for question, detail in zip(questions, together.details, strict=True):
        alone = adapter.process_request(Request(questions=question, **request), NEW, options)
        assert alone.details[0].token_ids == detail.token_ids


@pytest.mark.parametrize(
    "pipeline",
    ["sink(1) | local(0.3) @ prefill=sparse, decode=dense", "quest(0.3) @ prefill=sparse"],
)
def test_a_sparse_prefill_that_one_question_reads_again_is_as_before_for_the_next(make, pipeline):
    adapter = make(pipeline=pipeline)
    context = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is here."
    questions = ("\nwho is in the tin?", "where is the hen?")
    request = Request(context=context, questions=questions, separator="")
    prefilled = adapter.prefill(request, {"prefill_chunk_size": 16}, pipeline)
    first, second = prefilled.prompts
    assert first.context_tokens == prefilled.shared < second.context_tokens
    before = adapter.answer(prefilled, pipeline, NEW, indices=[0]).responses
    keys = [layer.keys.clone() for layer in prefilled.cache.layers]
    adapter.answer(prefilled, pipeline, NEW, indices=[1])
    assert adapter.answer(prefilled, pipeline, NEW, indices=[0]).responses == before
    compat.restore_cache(prefilled.cache, prefilled.base)
    for layer, was in zip(prefilled.cache.layers, keys, strict=True):
        assert torch.equal(layer.keys, was[:, :, : prefilled.shared])


def test_some_of_the_questions_can_be_asked(make):
    adapter = make()
    prefilled = adapter.prefill(Request(context=CONTEXT, questions=QUESTIONS))
    everything = adapter.answer(prefilled, "dense", NEW)
    some = adapter.answer(prefilled, "dense", NEW, indices=[2, 0])
    assert some.responses == [everything.responses[2], everything.responses[0]]


# Many pipelines, one prefill


@pytest.mark.parametrize("family", FAMILIES)
def test_pipelines_on_one_dense_prefill_equal_their_own_runs_in_any_order(make, family):
    request = Request(context=CONTEXT, questions=QUESTIONS)
    own = {
        pipeline: make(family, pipeline).process_request(request, NEW).responses
        for pipeline in PIPELINES
    }
    adapter = make(family)
    with Passes(adapter.model) as passes:
        prefilled = adapter.prefill(request)
        for pipeline in (*PIPELINES, *reversed(PIPELINES), PIPELINES[2]):
            assert adapter.answer(prefilled, pipeline, NEW).responses == own[pipeline]
    assert passes.tokens.count(prefilled.shared) == 1


def test_a_sparse_prefill_serves_its_own_pipeline_only(make):
    adapter = make()
    sparse = "sink(2) | local(4) @ prefill=sparse"
    request = Request(context=CONTEXT, questions=QUESTIONS)
    prefilled = adapter.prefill(request, pipeline=sparse)
    assert adapter.answer(prefilled, sparse, NEW).responses
    for other in ("dense", "sink(2) | local(4)", "sink(2) | local(5) @ prefill=sparse"):
        with pytest.raises(RequestError, match="needs its own"):
            adapter.answer(prefilled, other, NEW)
    with pytest.raises(RequestError, match="cannot answer from a dense prefill"):
        adapter.answer(adapter.prefill(request), sparse, NEW)


def test_a_sparse_prefill_differs_from_a_dense_one(make):
    request = Request(context=CONTEXT, questions=QUESTIONS)
    window = "sink(1) | local(2) @ question=dense"
    pipelines = (
        "dense",
        window,
        f"{window}, prefill=sparse",
        f"{window}, prefill=sparse, decode=dense",
    )
    answers = {str(make("llama", p).process_request(request, NEW).responses) for p in pipelines}
    assert len(answers) == 4


def test_adapters_on_one_configuration_do_not_affect_each_other(models):
    config = models.config("llama")
    request = Request(context=CONTEXT, questions=QUESTIONS)
    one, other = (
        wrap(models.build("llama", seed, of=config), models.tokenizer(), "sink(2) | local(4)")
        for seed in (0, 1)
    )
    expected = one.process_request(request, NEW).responses
    prefilled = other.prefill(request)
    assert one.process_request(request, NEW).responses == expected
    assert (
        other.answer(prefilled, None, NEW).responses
        == other.process_request(request, NEW).responses
    )


# Where a pipeline applies


class Seen:
    """Records where masks are built, and which events come in which order."""

    def __init__(self):
        self.masks, self.events = [], []

    @hookimpl
    def sah_mask_built(self, inputs, mask):
        if not mask.is_full:
            self.masks.append((inputs.phase, inputs.layer, inputs.query_len))

    @hookimpl
    def sah_request_begin(self, request, pipeline):
        self.events.append("request_begin")

    @hookimpl
    def sah_prefill_end(self, layer_count, context_tokens):
        self.events.append(("prefill_end", layer_count, context_tokens))

    @hookimpl
    def sah_request_end(self, response):
        self.events.append("request_end")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {("question", 0), ("question", 1), ("decode", 0), ("decode", 1)}),
        ("question=dense", {("decode", 0), ("decode", 1)}),
        ("decode=dense", {("question", 0), ("question", 1)}),
        ("dense_layers=[0]", {("question", 1), ("decode", 1)}),
        ("layers=[0]", {("question", 0), ("decode", 0)}),
        (
            "prefill=sparse, layers=[1]",
            {("prefill", 1), ("question", 1), ("decode", 1)},
        ),
    ],
)
def test_phases_and_layers_say_where_a_pipeline_is_sparse(make, options, expected):
    adapter = make("llama", "sink(2) | local(2)" + (f" @ {options}" if options else ""))
    seen = Seen()
    request = Request(context=CONTEXT, questions=QUESTIONS[0])
    response = adapter.process_request(request, NEW, observers=[seen])
    assert {(phase, layer) for phase, layer, _ in seen.masks} == expected
    detail = response.details[0]
    rows = {"prefill": detail.context_tokens, "decode": 1}
    rows["question"] = detail.prompt_tokens - detail.context_tokens
    assert all(count == rows[phase] for phase, _, count in seen.masks)


def test_layer_types_choose_among_the_layers_of_gemma_3(make):
    for types, layers in (("full_attention", {1}), ("sliding_attention", {0})):
        seen = Seen()
        adapter = make("gemma3", f"sink(1) | local(2) @ layer_types=[{types}]")
        request = Request(context=CONTEXT, questions=QUESTIONS)
        adapter.process_request(request, NEW, observers=[seen])
        assert {layer for _, layer, _ in seen.masks} == layers


def test_a_stateful_masker_is_refused_where_the_cache_slides(make):
    adapter = make("gemma3", "quest(8, page_size=4) @ layer_types=[sliding_attention]")
    with pytest.raises(UnsupportedError, match="dropped keys"):
        adapter.process_request(Request(context=CONTEXT, questions=QUESTIONS[0]), NEW)


def test_a_question_of_one_token_is_a_question(make):
    seen, adapter = Seen(), make("llama", "sink(2) | local(2)")
    request = Request(context=CONTEXT, questions="?", separator="")
    detail = adapter.process_request(request, NEW, observers=[seen]).details[0]
    assert detail.prompt_tokens - detail.context_tokens <= 2
    assert [phase for phase, layer, _ in seen.masks if layer == 0] == (
        ["question"] + ["decode"] * (detail.new_tokens - 1)
    )


# Observers


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_observers_are_told_of_requests_in_order(make, pipeline):
    adapter, seen = make("llama", pipeline), Seen()
    request = Request(context=CONTEXT, questions=QUESTIONS)
    watched = adapter.process_request(request, NEW, observers=[seen])
    context = watched.details[0].context_tokens
    assert seen.events == ["request_begin", ("prefill_end", 2, context), "request_end"]
    assert watched.responses == adapter.process_request(request, NEW).responses


@pytest.mark.parametrize("pipeline", ["dense", "local(1.0)", "sink(1000)"])
def test_the_density_of_everything_is_one(make, pipeline):
    adapter, density = make("llama", pipeline), Density()
    request = Request(context=CONTEXT, questions=QUESTIONS)
    adapter.process_request(request, NEW, observers=[density])
    result = density.result()
    assert result["density"] == 1.0
    assert result["selected"] == result["allowed"] > 0


@pytest.mark.parametrize("phases", ["prefill=dense", "prefill=sparse"])
def test_the_density_of_a_window_is_what_counting_gives(make, phases):
    adapter, density = make("llama", f"local(3) @ {phases}"), Density()
    request = Request(context=CONTEXT, questions=QUESTIONS[0])
    detail = adapter.process_request(request, NEW, observers=[density]).details[0]
    first = 0 if phases == "prefill=sparse" else detail.context_tokens
    rows = range(first, detail.prompt_tokens + detail.new_tokens - 1)
    assert density.result()["allowed"] == sum(8 * (row + 1) for row in rows)
    assert density.result()["selected"] == sum(8 * min(3, row + 1) for row in rows)


# Prompts

TEMPLATES = ("none", "plain", "bos", "trimming")


@pytest.fixture
def chat_template(models):
    return {
        "none": None,
        "plain": models.PLAIN_CHAT,
        "bos": models.BOS_CHAT,
        "trimming": models.TRIMMING_CHAT,
    }


@pytest.mark.parametrize("chat", [None, False])
@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("context", [CONTEXT, f"  {CONTEXT}\n\n", "x", ""])
def test_a_prompt_has_one_bos_and_no_eos(
    make, chat_template, template, adds_bos, adds_eos, chat, context
):
    adapter = make(adds_bos=adds_bos, adds_eos=adds_eos, chat=chat_template[template])
    request = Request(context=context, questions=QUESTIONS, answer_prefix="it is", chat=chat)
    from_template = template == "bos" and chat is None
    for prompt in adapter.prefill(request).prompts:
        assert prompt.ids.count(1) == (1 if adds_bos or from_template else 0)
        assert prompt.ids[0] == 1 or not (adds_bos or from_template)
        assert 2 not in prompt.ids


@pytest.mark.parametrize("prefix", ["", "it is"])
@pytest.mark.parametrize("separator", ["\n", "", " ", "\n\n"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "context", [CONTEXT, "the hen.", "the hen.\n", "the ant th", "a\n", "\n\n a", "x", "  x  "]
)
def test_the_context_ends_at_the_last_token_inside_it(
    make, chat_template, context, template, separator, prefix
):
    adapter = make(chat=chat_template[template])
    request = Request(
        context=context,
        questions=("\nhere?", "e hen?", "b?"),
        answer_prefix=prefix,
        separator=separator,
    )
    for question, prompt in zip(request.questions, adapter.prefill(request).prompts, strict=True):
        body = context + separator + question
        if template == "none":
            text = body + (separator + prefix if prefix else "")
            begin = ""
        else:
            shown = body.strip() if template == "trimming" else body
            begin = ("<s>" if template == "bos" else "") + "[user]\n"
            text = f"{begin}{shown}\n[assistant]\n{prefix}"
        joint = adapter.tokenizer(text, add_special_tokens=template != "bos")
        assert list(prompt.ids) == joint.input_ids
        inside = context.lstrip() if template == "trimming" else context
        # the definition: decode ever more tokens until the text leaves the context
        count = len(begin) + len(inside)
        expected = 0
        for index in range(1, len(prompt.ids) + 1):
            so_far = adapter.tokenizer.decode(prompt.ids[:index])
            if template != "bos":
                so_far = so_far.removeprefix("<s>")
            if len(so_far) > count:
                break
            expected = index
        assert prompt.context_tokens == expected


def test_an_answer_prefix_follows_the_question_or_the_assistant_header(models, make):
    request = Request(context="x", questions=("a?", "b?"), answer_prefix=("one", "two"))
    plain, chat = make(), make(chat=models.PLAIN_CHAT)
    decoded = [plain.tokenizer.decode(p.ids) for p in plain.prefill(request).prompts]
    assert decoded == ["<s>x\na?\none", "<s>x\nb?\ntwo"]
    decoded = [chat.tokenizer.decode(p.ids) for p in chat.prefill(request).prompts]
    assert decoded[1] == "<s>[user]\nx\nb?\n[assistant]\ntwo"


def test_a_system_message_goes_through_the_template(models, make):
    request = Request(context="x", questions="a?", system="be brief")
    prompt = make(chat=models.PLAIN_CHAT).prefill(request).prompts[0]
    assert make().tokenizer.decode(prompt.ids).startswith("<s>[system]\nbe brief\n[user]\nx\na?")
    with pytest.raises(RequestError, match="system message needs a chat template"):
        make().prefill(request)


def test_chat_without_a_template_is_an_error(make):
    with pytest.raises(RequestError, match="no chat template"):
        make().prefill(Request(context="x", questions="a?", chat=True))
    with pytest.raises(RequestError, match="no chat template"):
        make().prefill(Request(context="x", questions="a?"), {"chat": True})


def test_a_template_that_changes_the_context_is_an_error(models, make):
    adapter = make(chat=models.PLAIN_CHAT.replace("m['content']", "m['content'] | upper"))
    with pytest.raises(RequestError, match="template changes the context"):
        adapter.prefill(Request(context="x", questions="a?"))


def test_a_request_without_context_works(make):
    for pipeline in PIPELINES:
        for family in ("llama", "gemma3"):
            adapter = make(family, pipeline)
            response = adapter.process_request(Request(context="", questions=QUESTIONS), NEW)
            assert response.details[0].context_tokens == 0
            if pipeline == "dense":
                assert response.details[1].token_ids == plain_answer(adapter, QUESTIONS[1])


# Ends


class Force(LogitsProcessor):
    """Makes the token of each step certain."""

    def __init__(self, *tokens):
        self.tokens = iter(tokens)

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -1e4)
        forced[:, next(self.tokens)] = 0
        return forced


def forced(*tokens):
    return {**NEW, "logits_processor": LogitsProcessorList([Force(*tokens)])}


@pytest.fixture
def several_ends(models):
    """Token 2 ends by the tokenizer, 3 by the generation config, 7 by the model's config."""
    model = models.build("llama", eos_token_id=7)
    model.generation_config.eos_token_id = [3]
    return wrap(model, models.tokenizer(), "sink(2) | local(4)")


@pytest.mark.parametrize("end", [2, 3, 7])
@pytest.mark.parametrize("before", [(), (10,), (10, 11, 12)])
def test_every_eos_ends_the_answer_also_as_the_first_token(several_ends, end, before):
    request = Request(context=CONTEXT, questions=QUESTIONS[:1])
    detail = several_ends.process_request(request, forced(*before, end, 20, 21, 22)).details[0]
    assert detail.token_ids == (*before, end)
    assert detail.finished == "eos"
    assert detail.new_tokens == len(before) + 1
    if end != 7:  # the others are special tokens, which text leaves out
        assert detail.text == several_ends.tokenizer.decode(list(before))


def test_an_answer_without_eos_ends_at_its_length(several_ends):
    request = Request(context=CONTEXT, questions=QUESTIONS[0])
    detail = several_ends.process_request(request, forced(*range(10, 16), 20)).details[0]
    assert detail.token_ids == (10, 11, 12, 13, 14, 15)
    assert detail.finished == "length"


def test_an_eos_can_be_chosen(several_ends):
    request = Request(context=CONTEXT, questions=QUESTIONS[0])
    options = {**forced(2, 10, 11, 20), "eos_token_id": 11}
    detail = several_ends.process_request(request, options).details[0]
    assert detail.token_ids == (2, 10, 11)
    assert detail.finished == "eos"


def test_generation_ends_at_a_stop_string(make):
    adapter = make()
    ids = adapter.tokenizer("ab.cd", add_special_tokens=False).input_ids
    detail = adapter.process_request(
        Request(context=CONTEXT, questions=QUESTIONS[0]), {**forced(*ids), "stop_strings": ["."]}
    ).details[0]
    assert detail.text == "ab."
    assert detail.finished == "stop"


def test_a_least_number_of_tokens_is_kept(make):
    adapter = make()
    request = Request(context=CONTEXT, questions=QUESTIONS)
    ends = {"eos_token_id": list(range(64)), "max_new_tokens": 12}
    assert min(d.new_tokens for d in adapter.process_request(request, ends).details) < 5
    longer = adapter.process_request(request, {**ends, "min_new_tokens": 5})
    assert min(d.new_tokens for d in longer.details) >= 5


def test_sampling_is_reproducible_from_torchs_seed(make):
    adapter = make("llama", "sink(2) | local(4)")
    request = Request(context=CONTEXT, questions=QUESTIONS)
    options = {**NEW, "do_sample": True, "temperature": 2.0, "top_k": 50}

    def sample(seed):
        torch.manual_seed(seed)
        return adapter.process_request(request, options).responses

    assert sample(1) == sample(1) != sample(2)


def test_settings_of_the_checkpoint_do_not_make_the_default_sample(models, make):
    model = models.build("llama")
    expected = wrap(model, models.tokenizer()).process_request(
        Request(context=CONTEXT, questions=QUESTIONS), NEW
    )
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.top_p = 0.9
    again = wrap(model, models.tokenizer()).process_request(
        Request(context=CONTEXT, questions=QUESTIONS), NEW
    )
    assert again.responses == expected.responses


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2},
        {"cache_config": {"nbits": 4}},
        {"output_scores": True},
        {"is_assistant": True},
        {"attention_mask": torch.ones(1, 3)},
        {"maxnewtokens": 3},
        {"max_new_token": 3},
        {"nonsense": 1},
    ],
)
def test_generation_options_that_have_no_place_are_errors_before_any_work(make, options):
    adapter = make()
    with Passes(adapter.model) as passes, pytest.raises(RequestError) as caught:
        adapter.process_request(Request(context=CONTEXT, questions=QUESTIONS), options)
    assert next(iter(options)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert passes.tokens == []


def test_a_slip_in_a_generation_option_is_named(make):
    with pytest.raises(RequestError, match="did you mean 'max_new_tokens'"):
        make().process_request(Request(context="x", questions="a?"), {"max_new_token": 3})


def test_neutral_values_of_unsupported_options_are_fine(make):
    options = {**NEW, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    options["return_dict_in_generate"] = False
    request = Request(context=CONTEXT, questions=QUESTIONS)
    plain = make().process_request(request, NEW)
    assert make().process_request(request, options).responses == plain.responses


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "8"])
def test_a_length_that_is_no_count_is_an_error(make, value):
    with pytest.raises(ParameterError, match="max_new_tokens"):
        make().process_request(Request(context="x", questions="a?"), {"max_new_tokens": value})


# Lengths


@pytest.mark.parametrize("tokens", [4, 11, 12])
def test_a_long_context_is_cut_to_exactly_so_many_tokens(make, tokens):
    adapter = make()
    # one token per character, whatever its neighbours
    context = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

    def kept(**options):
        request = Request(context=context, questions="a?", separator="|")
        prompt = adapter.prefill(request, {"max_context_length": tokens, **options}).prompts[0]
        assert prompt.context_tokens == tokens + 1
        return adapter.tokenizer.decode(prompt.ids[1:]).removesuffix("|a?")

    head, tail = context[: tokens // 2], context[len(context) - (tokens - tokens // 2) :]
    assert kept() == kept(truncation="middle") == head + tail
    assert kept(truncation="head") == context[:tokens]


def test_a_context_that_fits_is_left_whole(make):
    request = Request(context="0123456789", questions="a?", truncation="none")
    prompt = make().prefill(request, {"max_context_length": 10}).prompts[0]
    assert prompt.context_tokens == 11
    with pytest.raises(ContextTooLongError) as caught:
        make().prefill(request, {"max_context_length": 9})
    assert (caught.value.tokens, caught.value.limit) == (10, 9)


def test_the_truncation_of_the_call_goes_before_that_of_the_request(make):
    request = Request(context="0123456789", questions="a?", truncation="none")
    prompt = make().prefill(request, {"max_context_length": 4, "truncation": "head"}).prompts[0]
    assert make().tokenizer.decode(prompt.ids) == "<s>0123\na?"


def test_a_context_longer_than_the_model_allows_is_an_error(make):
    adapter = make()
    with Passes(adapter.model) as passes, pytest.raises(ContextTooLongError) as caught:
        adapter.process_request(Request(context="0" * 600, questions="a?"), NEW)
    assert caught.value.tokens > caught.value.limit == 512
    assert "\n" not in str(caught.value)
    assert passes.tokens == []


def test_an_answer_that_does_not_fit_is_an_error(make):
    adapter = make()
    request = Request(context="0" * 500, questions="a?")
    assert adapter.process_request(request, {"max_new_tokens": 3}).details[0].new_tokens
    with Passes(adapter.model) as passes, pytest.raises(ContextTooLongError, match="new tokens"):
        adapter.process_request(request, {"max_new_tokens": 30})
    assert passes.tokens == []


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize(
    "pipeline", [*PIPELINES, "sink(2) | local(2) | oracle-top-k(5) @ prefill=sparse"]
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prefill_in_chunks_equals_one_pass(make, family, pipeline, chunk):
    # sizes in tokens: a fraction counts the keys that are there, fewer in an early chunk
    adapter = make(family, pipeline)
    request = Request(context=CONTEXT, questions=QUESTIONS)
    whole = adapter.process_request(request, NEW)
    with Passes(adapter.model) as passes:
        parts = adapter.process_request(request, NEW, {"prefill_chunk_size": chunk})
    assert parts.responses == whole.responses
    assert max(passes.tokens) <= max(chunk, 25)


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "8"])
@pytest.mark.parametrize("option", ["prefill_chunk_size", "max_context_length"])
def test_request_options_that_are_no_counts_are_errors(make, option, value):
    with pytest.raises(ParameterError, match=option):
        make().process_request(Request(context="x", questions="a?"), NEW, {option: value})


def test_a_chat_option_that_is_no_truth_value_is_an_error(make):
    with pytest.raises(ParameterError, match="chat = 'no' is not allowed: expected true, false"):
        make().process_request(Request(context="x", questions="a?"), NEW, {"chat": "no"})


def test_what_is_no_request_is_an_error(make):
    with pytest.raises(RequestError, match="'x' is no request; expected a Request"):
        make().process_request("x", NEW)
    with pytest.raises(RequestError, match="'y' is no request; expected a Request"):
        make().process_requests([Request(context="x", questions="a?"), "y"], NEW)


def test_request_options_that_do_not_exist_are_errors(make):
    with pytest.raises(RequestError, match="'max_context_lenght' is not known"):
        make().process_request(Request(context="x", questions="a?"), NEW, {"max_context_lenght": 3})
    with pytest.raises(RequestError, match="truncation 'tail' is not known"):
        make().process_request(Request(context="x", questions="a?"), NEW, {"truncation": "tail"})


# Form


def test_a_question_gives_a_string_and_a_list_gives_a_list(make):
    adapter = make()
    one = adapter.process_request(Request(context=CONTEXT, questions=QUESTIONS[0]), NEW)
    many = adapter.process_request(Request(context=CONTEXT, questions=[QUESTIONS[0]]), NEW)
    assert isinstance(one.responses, str)
    assert many.responses == [one.responses]


@pytest.mark.parametrize("questions", ["", "  ", [], ["a?", ""], ["a?", None], [3]])
def test_an_empty_question_is_an_error(questions):
    with pytest.raises(RequestError) as caught:
        Request(context="x", questions=questions)
    assert "\n" not in str(caught.value)


def test_answer_prefixes_are_one_for_all_or_one_for_each():
    with pytest.raises(RequestError, match="2 answer prefixes for 3 questions"):
        Request(context="x", questions=QUESTIONS, answer_prefix=["a", "b"])


def test_the_callers_dicts_and_the_model_are_never_changed(make):
    adapter = make("llama", "sink(2) | local(4)")
    generation = {"max_new_tokens": 4, "eos_token_id": [3, 2], "stop_strings": ["zz"]}
    options = {"max_context_length": 20, "prefill_chunk_size": 8}
    before = copy.deepcopy((generation, options))
    weights = {name: p.clone() for name, p in adapter.model.named_parameters()}
    config, settings = str(adapter.model.config), str(adapter.model.generation_config)
    adapter.process_request(Request(context=CONTEXT, questions=QUESTIONS), generation, options)
    assert (generation, options) == before
    assert (str(adapter.model.config), str(adapter.model.generation_config)) == (config, settings)
    assert all(torch.equal(p, weights[name]) for name, p in adapter.model.named_parameters())


def test_a_request_that_fails_leaves_model_and_prefill_usable(make):
    adapter = make()
    before = adapter.model.config._attn_implementation
    prefilled = adapter.prefill(Request(context=CONTEXT, questions=QUESTIONS))
    expected = adapter.answer(prefilled, PIPELINES[3], NEW).responses

    class Stop(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyboardInterrupt

    broken = {**NEW, "logits_processor": LogitsProcessorList([Stop()])}
    with pytest.raises(KeyboardInterrupt):
        adapter.answer(prefilled, PIPELINES[3], broken)
    assert adapter.model.config._attn_implementation == before
    assert adapter.answer(prefilled, PIPELINES[3], NEW).responses == expected


def test_details_say_how_an_answer_came_about(make):
    adapter = make("llama", "sink(2) | local(4) @ backend=gather")
    response = adapter.process_request(Request(context=CONTEXT, questions=QUESTIONS), NEW)
    for text, detail in zip(response.responses, response.details, strict=True):
        assert detail.text == text
        assert detail.new_tokens == len(detail.token_ids)
        assert detail.seconds_prefill > 0
        assert detail.seconds_decode > 0
        assert detail.backends == ("gather",)
    assert len({d.seconds_prefill for d in response.details}) == 1


class Slow(LogitsProcessor):
    """Takes its time before the choice of some tokens."""

    def __init__(self, *steps):
        self.steps, self.step = steps, -1

    def __call__(self, input_ids, scores):
        self.step += 1
        if self.step in self.steps:
            time.sleep(0.2)
        return scores


@pytest.mark.parametrize(("steps", "first"), [((0,), True), ((1,), False), ((4,), False)])
def test_the_time_to_the_first_token_ends_with_the_first_token(make, steps, first):
    adapter = make("llama", "sink(2) | local(4)")
    options = {**NEW, "logits_processor": LogitsProcessorList([Slow(*steps)]), "eos_token_id": 1}
    detail = adapter.process_request(Request(context=CONTEXT, questions="a?"), options).details[0]
    assert detail.new_tokens == 6
    assert detail.seconds_decode > 0.2
    assert 0 < detail.seconds_first_token < detail.seconds_decode
    assert (detail.seconds_first_token > 0.2) is first
    rest = detail.seconds_decode - detail.seconds_first_token
    assert detail.tokens_per_second == 5 / rest
    assert detail.time_to_first_token == (
        detail.seconds_prefill + detail.seconds_index + detail.seconds_first_token
    )


def test_time_of_observers_is_not_in_the_time_to_the_first_token(make):
    class Sleepy:
        @hookimpl
        def sah_mask_built(self):
            time.sleep(0.05)

    adapter = make("llama", "sink(2) | local(4)")
    request = Request(context=CONTEXT, questions="a?")
    detail = adapter.process_request(request, NEW, observers=[Sleepy()]).details[0]
    assert detail.seconds_decode < 0.1


def test_maskers_that_take_note_of_the_context_are_timed(make):
    request = Request(context=CONTEXT, questions=QUESTIONS)
    for pipeline, keeps in ((PIPELINES[1], False), (PIPELINES[3], True)):
        details = make("llama", pipeline).process_request(request, NEW).details
        assert (details[0].seconds_index > 0) is keeps
        assert len({d.seconds_index for d in details}) == 1


def test_an_answer_of_one_token_has_no_speed(make):
    request = Request(context=CONTEXT, questions="a?")
    detail = make().process_request(request, {"max_new_tokens": 1}).details[0]
    assert detail.tokens_per_second is None
    assert 0 < detail.seconds_first_token <= detail.seconds_decode


def test_stopping_criteria_of_the_caller_are_kept(make):
    stops = StoppingCriteriaList([lambda ids, scores: torch.tensor([ids.shape[1] >= 16])])
    options = {**NEW, "max_new_tokens": 40, "stopping_criteria": stops, "eos_token_id": 1}
    detail = make().process_request(Request(context="x", questions="a?"), options).details[0]
    assert detail.prompt_tokens + detail.new_tokens == 16
    assert detail.finished == "stop"
    assert len(stops) == 1


def test_capped_logits_are_never_left_to_sdpa(models):
    adapter = wrap(models.build("gemma2"), models.tokenizer())
    assert adapter.model.config._attn_implementation == "eager"


def test_every_error_is_a_sah_error():
    for error in (ContextTooLongError, ParameterError, RequestError, UnsupportedError):
        assert issubclass(error, SahError)


def test_rows_that_want_more_keys_than_they_get_are_counted_per_answer(make):
    adapter = make()
    request = Request(context=CONTEXT, questions=QUESTIONS, chat=False)
    capped, free = "oracle-top-p(0.99, max_size=2)", "oracle-top-p(0.99)"
    prefilled = adapter.prefill(request)
    first = adapter.answer(prefilled, capped, NEW).details
    assert all(detail.overflow_rows > 0 for detail in first)
    # every answer starts from the context: an earlier one leaves nothing behind
    again = adapter.answer(prefilled, capped, NEW, indices=[2]).details
    assert again[0].overflow_rows == first[2].overflow_rows
    assert all(d.overflow_rows == 0 for d in adapter.answer(prefilled, free, NEW).details)
