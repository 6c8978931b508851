"""Every option of ``generate`` and of a generation config: works, or is refused before any work."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.utils import GenerationMixin

from sah_core import Request
from sah_core.errors import ContextTooLongError, ParameterError, RequestError
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded
from sah_plugins.adapters.hf.options import REFUSED, config_settings

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
QUESTIONS = ("who is in the tin?", "where is the hen?", "is the rat on it?")
STATEFUL, EVERYTHING = "sink(2) | quest(8, page_size=4)", "local(1.0)"
DOCUMENT = Path(__file__).parents[2] / "docs" / "requests.md"


@pytest.fixture(scope="module")
def make(models):
    built = {}

    def adapter(pipeline="dense", family="llama"):
        if family not in built:
            wide = {"of": models.config("llama", vocab_size=140)} if family == "wide" else {}
            built[family] = models.build(family, **wide)
        loaded = Loaded(
            model=built[family],
            tokenizer=models.tokenizer(),
            source=ModelSource(kind="folder", location="tiny", label="tiny"),
            weights_hash="0",
        )
        return HuggingFaceAdapter.of(loaded, pipeline)

    return adapter


def answers(adapter, options, questions=QUESTIONS, context=CONTEXT):
    return adapter.process_request(Request(context=context, questions=questions), options).details


def tokens(adapter, options, **request):
    return [detail.token_ids for detail in answers(adapter, options, **request)]


def alone(adapter, question, options):
    """The new tokens that transformers alone makes of the same prompt."""
    ids = torch.tensor([adapter.tokenizer(f"{CONTEXT}\n{question}").input_ids])
    given = {"pad_token_id": 0, "eos_token_id": [2], "tokenizer": adapter.tokenizer, **options}
    return tuple(adapter.model.generate(ids, **given)[0, ids.shape[1] :].tolist())


# The table


def table():
    """Option and kind of every row of the table."""
    text = DOCUMENT.read_text().partition("## Every option")[2]
    rows = re.findall(r"^\| (`.+?`) \| (\w+) \|", text, re.MULTILINE)
    return [(name, kind) for names, kind in rows for name in re.findall(r"`(\w+)`", names)]


def test_every_option_of_the_installed_transformers_stands_in_the_table_once():
    names = [name for name, _ in table()]
    assert len(set(names)) == len(names)
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    missing = (arguments | config_settings()) - set(names)
    assert not missing, f"what do {sorted(missing)} mean here? say so in docs/requests.md"
    assert {kind for _, kind in table()} == {"works", "here", "idle", "refused"}


def test_the_table_says_refused_of_what_is_refused():
    assert {name for name, kind in table() if kind == "refused"} == set(REFUSED)


SAMPLES = {
    "continuous_batching_config": ({},),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_refused_before_anything_runs_and_none_asks_for_nothing(make, name):
    adapter, passes = make(), []
    hook = adapter.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        for value in SAMPLES.get(name, (True if name != "attention_mask" else torch.ones(1),)):
            for given in ({name: value}, {"generation_config": {name: value}}):
                with pytest.raises(RequestError, match=f"{name!r} is not supported: ") as caught:
                    answers(adapter, given)
                assert "\n" not in str(caught.value)
    finally:
        hook.remove()
    assert not passes
    adapter.check_generation({name: None})


@pytest.mark.parametrize(
    "neutral",
    [
        {"use_cache": True, "cache_implementation": "dynamic", "token_healing": False},
        {"num_beam_groups": 1, "diversity_penalty": 0.0, "penalty_alpha": 0.0, "low_memory": None},
    ],
)
def test_a_refused_option_that_asks_for_nothing_changes_nothing(make, neutral):
    options = {"max_new_tokens": 5}
    assert tokens(make(), {**options, **neutral}) == tokens(make(), options)


# What the other tests of generation do not reach, token for token

WORKS = (
    {"encoder_repetition_penalty": 1.9},
    {"encoder_no_repeat_ngram_size": 1},
    {"watermarking_config": {"bias": 9.0, "seeding_scheme": "selfhash"}},
    {"do_sample": True, "top_h": 0.5},
    {"prefix_allowed_tokens_fn": lambda row, ids: [5 + int(ids.shape[0]) % 90, 7, 9]},
    {"max_time": 0.0},
    {"forced_bos_token_id": 9, "decoder_start_token_id": 3, "bos_token_id": 1},
    {"remove_invalid_values": True, "disable_compile": True},
)


@pytest.mark.parametrize("pipeline", ["dense", EVERYTHING])
@pytest.mark.parametrize("option", WORKS, ids=lambda option: next(iter(option)))
def test_an_option_gives_what_transformers_alone_gives(make, option, pipeline):
    adapter, options = make(pipeline), {"max_new_tokens": 8, **option}
    for question in QUESTIONS:
        seeded = {**options, "seed": 3} if option.get("do_sample") else options
        found = tokens(adapter, seeded, questions=[question])
        torch.manual_seed(3)
        plain = copy.deepcopy(options)
        if "watermarking_config" in plain:
            plain = vars(GenerationConfig(**plain))
            plain = {k: v for k, v in plain.items() if v is not None and k[0] != "_"}
            plain.pop("transformers_version", None)
        assert found == [alone(adapter, question, plain)]


# Lengths of the whole prompt


@pytest.mark.parametrize("pipeline", ["dense", EVERYTHING])
def test_max_length_counts_context_question_and_answer(make, pipeline):
    adapter = make(pipeline)
    for question in QUESTIONS:
        prompt = len(adapter.tokenizer(f"{CONTEXT}\n{question}").input_ids)
        [found] = answers(adapter, {"max_length": prompt + 5}, questions=[question])
        assert found.token_ids == alone(adapter, question, {"max_length": prompt + 5})
        assert (found.new_tokens, found.finished) == (5, "length")


@pytest.mark.parametrize("pipeline", ["dense", EVERYTHING])
def test_min_length_counts_them_too(make, pipeline):
    adapter = make(pipeline)
    ends = {"max_new_tokens": 30, "eos_token_id": list(range(100))}
    for question in QUESTIONS:
        prompt = len(adapter.tokenizer(f"{CONTEXT}\n{question}").input_ids)
        options = {**ends, "min_length": prompt + 6}
        [found] = tokens(adapter, options, questions=[question])
        assert found == alone(adapter, question, options)
        assert len(found) > 6 > len(tokens(adapter, ends, questions=[question])[0])


def test_in_a_batch_every_row_has_the_length_that_it_has_alone(make):
    adapter = make(STATEFUL)
    requests = [
        Request(context=context, questions=QUESTIONS[:2])
        for context in (CONTEXT, CONTEXT[:60], CONTEXT[:71])
    ]
    for options in (
        {"max_length": 78},
        {"min_length": 75, "max_new_tokens": 25, "eos_token_id": list(range(60))},
    ):
        single = [adapter.process_request(r, options) for r in requests]
        together = adapter.process_requests(requests, options)
        assert [r.responses for r in together] == [r.responses for r in single]
        lengths = {d.new_tokens for r in single for d in r.details}
        assert len(lengths) > 1


def test_new_tokens_take_precedence_over_lengths_as_in_transformers(make, caplog):
    caplog.set_level("WARNING", logger="sah_plugins")
    options = {"max_length": 80, "max_new_tokens": 3}
    assert [len(t) for t in tokens(make(), options)] == [3, 3, 3]
    assert "max_new_tokens takes precedence over max_length=80" in caplog.text
    ends = {"eos_token_id": list(range(100)), "max_new_tokens": 20}
    both = tokens(make(), {**ends, "min_length": 200, "min_new_tokens": 2})
    assert both == tokens(make(), {**ends, "min_new_tokens": 2})


def test_a_prompt_that_leaves_no_room_is_an_error_before_anything_is_read(make):
    adapter, wide, passes = make(), make("dense", "wide").model, []
    hook = adapter.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(RequestError, match="'max_length' is 20"):
            answers(adapter, {"max_length": 20})
        with pytest.raises(RequestError, match="another vocabulary"):
            answers(adapter, {"assistant_model": wide})
    finally:
        hook.remove()
    assert not passes
    with pytest.raises(RequestError, match=r"'max_length' is 20, which the prompt of \d+ tokens"):
        answers(make(), {"max_length": 20})
    with pytest.raises(ContextTooLongError):
        answers(make(), {"max_length": 600})
    for name, value in (("max_length", 0), ("min_length", -1), ("prompt_lookup_num_tokens", 0)):
        with pytest.raises(ParameterError, match=f"generation: {name} = {value}"):
            HuggingFaceAdapter.check_generation({name: value})


# A generation config

SETTINGS = {"max_new_tokens": 7, "do_sample": True, "temperature": 2.0, "top_k": 20}


def test_a_generation_config_may_be_an_object_a_mapping_a_file_or_a_folder(make, tmp_path):
    adapter, question = make(STATEFUL), QUESTIONS[:1]
    expected = tokens(adapter, {**SETTINGS, "seed": 2}, questions=question)
    config = GenerationConfig(**SETTINGS)
    config.save_pretrained(tmp_path)
    (tmp_path / "other.json").write_text((tmp_path / "generation_config.json").read_text())
    forms = (config, SETTINGS, str(tmp_path), str(tmp_path / "other.json"), tmp_path / "other.json")
    for form in forms:
        given = {"generation_config": form, "seed": 2}
        assert tokens(adapter, given, questions=question) == expected


def test_options_beside_a_generation_config_come_first_and_both_are_left_as_they_were(make):
    config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.9, eos_token_id=[2])
    options = {"generation_config": config, "max_new_tokens": 4}
    before = config.to_dict(), dict(options)
    for question in QUESTIONS:
        [found] = tokens(make(), options, questions=[question])
        ids = torch.tensor([make().tokenizer(f"{CONTEXT}\n{question}").input_ids])
        plain = make().model.generate(
            ids, generation_config=config, max_new_tokens=4, pad_token_id=0
        )
        assert found == tuple(plain[0, ids.shape[1] :].tolist())
    assert (config.to_dict(), dict(options)) == before


def test_what_a_generation_config_does_not_say_comes_from_the_checkpoint(models, make):
    adapter = HuggingFaceAdapter.of(
        Loaded(
            model=models.build("llama"),
            tokenizer=models.tokenizer(),
            source=ModelSource(kind="folder", location="tiny", label="tiny"),
            weights_hash="0",
        )
    )
    adapter.model.generation_config.no_repeat_ngram_size = 1
    config = GenerationConfig(max_new_tokens=6)
    found = tokens(adapter, {"generation_config": config})
    assert found == tokens(make(), {"max_new_tokens": 6, "no_repeat_ngram_size": 1})
    assert found != tokens(make(), {"max_new_tokens": 6})


def test_foreign_entries_of_a_file_are_named_and_those_of_a_mapping_refused(tmp_path, caplog):
    caplog.set_level("WARNING", logger="sah_plugins")
    (tmp_path / "generation_config.json").write_text('{"chat_format": "x", "top_k": 3}')
    plain = HuggingFaceAdapter.plain_generation({"generation_config": str(tmp_path)})
    assert plain == {"top_k": 3}
    assert "generation_config has 'chat_format'" in caplog.text
    with pytest.raises(RequestError, match="'temp' is not known; did you mean 'temperature'"):
        HuggingFaceAdapter.check_generation({"generation_config": {"temp": 1.0}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (7, "'generation_config' is 7; expected a GenerationConfig, a mapping, or the name"),
        ("no-such-file.json", "names 'no-such-file.json', which cannot be read: "),
        ({"generation_config": {}}, "stands inside itself"),
    ],
)
def test_what_is_no_generation_config_is_said(config, message):
    with pytest.raises(RequestError, match=message) as caught:
        HuggingFaceAdapter.check_generation({"generation_config": config})
    assert "\n" not in str(caught.value)


# Guidance


@pytest.mark.parametrize("pipeline", ["dense", EVERYTHING])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-next"])
@pytest.mark.parametrize("negative", [None, [1, 30, 40, 50, 33, 22, 11, 60, 61, 62]])
def test_guidance_gives_what_transformers_alone_gives(make, pipeline, family, negative):
    adapter, options = make(pipeline, family), {"guidance_scale": 1.8, "max_new_tokens": 9}
    if negative is not None:
        options["negative_prompt_ids"] = torch.tensor([negative])
    for question, found in zip(QUESTIONS, tokens(adapter, options), strict=True):
        assert found == alone(adapter, question, options)
    assert tokens(adapter, {**options, "guidance_scale": 1}) != tokens(adapter, options)


def test_both_branches_of_guidance_run_sparse_each_with_its_own_states(make):
    adapter, scale, count = make(STATEFUL), 1.8, 8
    negative = [1, *range(30, 60)]
    options = {"guidance_scale": scale, "negative_prompt_ids": negative, "max_new_tokens": count}
    [found] = tokens(adapter, options, questions=QUESTIONS[:1])

    # the definition: two requests side by side, of which each gets the tokens of their mixture
    class Mixed(LogitsProcessor):
        def __init__(self, scores):
            self.scores, self.own = iter(scores), []

        def __call__(self, input_ids, scores):
            self.own.append(scores.log_softmax(-1))
            forced = torch.full_like(scores, -1e4)
            forced[:, next(self.scores)] = 0
            return forced

    made = []
    for index in range(count):
        rows = []
        for prompt in (f"{CONTEXT}\n{QUESTIONS[0]}", None):
            mixed = Mixed([*made, 5])
            given = {"logits_processor": LogitsProcessorList([mixed]), "eos_token_id": [127]}
            given["max_new_tokens"] = index + 1
            if prompt is None:
                rows.append(unconditional(adapter, negative, made))
            else:
                tokens(adapter, given, questions=QUESTIONS[:1])
                rows.append(mixed.own[-1])
        conditional, free = rows
        made.append(int((scale * (conditional - free) + free).argmax()))
    assert found == tuple(made)


def unconditional(adapter, negative, made):
    """Scores behind a prompt that is a prefill, and tokens that are decoded one by one."""
    from sah_core.patching import attach

    with torch.no_grad(), attach(adapter.model, adapter.pipeline):
        output = adapter.model(torch.tensor([negative]), use_cache=True)
        for token in made:
            held = output.get("cache", output.get("past_key_values"))
            output = adapter.model(
                torch.tensor([[token]]), use_cache=True, **{adapter._cache_argument: held}
            )
    return output.logits[:, -1].log_softmax(-1)


def test_guidance_in_a_batch_is_that_of_each_request_alone(make):
    adapter = make(STATEFUL)
    requests = [Request(context=c, questions=QUESTIONS[0]) for c in (CONTEXT, CONTEXT[:41])]
    options = {"guidance_scale": 1.8, "negative_prompt_ids": [1, 30, 40], "max_new_tokens": 8}
    single = [adapter.process_request(r, options).responses for r in requests]
    together = adapter.process_requests(requests, options)
    assert [r.responses for r in together] == single


def test_a_negative_prompt_is_one_sequence(make):
    for wrong in ([[1, 2], [3, 4]], []):
        with pytest.raises(RequestError, match="'negative_prompt_ids' has shape"):
            answers(make(), {"guidance_scale": 2.0, "negative_prompt_ids": wrong})


# More than tokens


@pytest.mark.parametrize("pipeline", ["dense", STATEFUL])
def test_scores_logits_and_hidden_states_are_those_of_the_question(make, pipeline):
    adapter, count = make(pipeline), 5
    asked = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    options = {"max_new_tokens": count, "return_dict_in_generate": True, **asked}
    options["temperature"], options["do_sample"], options["seed"] = 2.0, True, 1
    requests = [Request(context=c, questions=QUESTIONS[:2]) for c in (CONTEXT, CONTEXT[:41])]
    single = [adapter.process_request(r, options).details for r in requests]
    for details in single:
        for detail in details:
            [output] = detail.outputs
            assert output.sequences[0, -detail.new_tokens :].tolist() == list(detail.token_ids)
            assert len(output.scores) == len(output.logits) == detail.new_tokens
            assert len(output.hidden_states) == detail.new_tokens
            for scores, logits in zip(output.scores, output.logits, strict=True):
                assert scores.shape == (1, 128)
                kept = scores > -torch.inf
                torch.testing.assert_close(scores[kept], (logits / 2)[kept])
            assert output.get("cache", output.get("past_key_values")) is None
    greedy = {**options, "do_sample": False, "temperature": None}
    [[first, *_], [second, *_]] = [adapter.process_request(r, greedy).details for r in requests]
    together = adapter.process_requests(requests, greedy)
    for alone_, batched in zip((first, second), together, strict=True):
        [output] = batched.details[0].outputs
        assert output.logits[0].shape == (1, 128)
        torch.testing.assert_close(output.logits[0], alone_.outputs[0].logits[0], atol=1e-4, rtol=0)


def test_without_asking_there_are_no_outputs_and_what_needs_asking_says_so(make):
    assert answers(make(), {"max_new_tokens": 2})[0].outputs == ()
    with pytest.raises(RequestError, match="output_scores needs return_dict_in_generate=True"):
        answers(make(), {"output_scores": True})


def test_several_sequences_have_an_output_each(make):
    options = {"do_sample": True, "num_return_sequences": 3, "return_dict_in_generate": True}
    detail = answers(make(STATEFUL), {**options, "max_new_tokens": 4, "temperature": 3.0})[0]
    made = [detail.token_ids, *(other.token_ids for other in detail.others)]
    for output, ids in zip(detail.outputs, made, strict=True):
        assert output.sequences[0, -len(ids) :].tolist() == list(ids)


WEIGHTS = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 4}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pipeline", ["dense", "sink(2) | local(4)", STATEFUL])
def test_attention_weights_are_to_be_had_of_question_and_answer(models, implementation, pipeline):
    model = models.build("llama", attn_implementation=implementation)
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    loaded = Loaded(model=model, tokenizer=models.tokenizer(), source=source, weights_hash="0")
    adapter = HuggingFaceAdapter.of(loaded, pipeline)
    expected = tokens(adapter, {"max_new_tokens": 4})
    for detail, answer in zip(answers(adapter, WEIGHTS), expected, strict=True):
        assert detail.token_ids == answer
        asked = detail.prompt_tokens - detail.context_tokens
        for number, layers in enumerate(detail.outputs[0].attentions):
            assert len(layers) == 2
            for weights in layers:
                rows = 1 if number else asked
                assert weights.shape == (1, 4, rows, detail.prompt_tokens + number)
                torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, rows))
                if pipeline == "sink(2) | local(4)":
                    assert (weights > 0).sum(-1).unique().tolist() == [6]


def test_dense_attention_weights_are_those_of_transformers_alone(models):
    model, source = models.build("llama"), ModelSource(kind="folder", location="x", label="x")
    loaded = Loaded(model=model, tokenizer=models.tokenizer(), source=source, weights_hash="0")
    details = answers(HuggingFaceAdapter.of(loaded), WEIGHTS)
    model.set_attn_implementation("eager")
    for question, detail in zip(QUESTIONS, details, strict=True):
        ids = torch.tensor([models.tokenizer()(f"{CONTEXT}\n{question}").input_ids])
        alone = model.generate(ids, pad_token_id=0, eos_token_id=[2], **WEIGHTS).attentions
        for mine, its in zip(detail.outputs[0].attentions, alone, strict=True):
            for one, other in zip(mine, its, strict=True):
                torch.testing.assert_close(one, other[:, :, -one.shape[2] :])


def test_attention_weights_of_verified_proposals_come_token_by_token(make):
    adapter = make("sink(2) | local(4)")
    plain = answers(adapter, {**WEIGHTS, "max_new_tokens": 8})
    options = {**WEIGHTS, "max_new_tokens": 8, "prompt_lookup_num_tokens": 3}
    for detail, other in zip(answers(adapter, options), plain, strict=True):
        assert detail.token_ids == other.token_ids
        steps, expected = detail.outputs[0].attentions, other.outputs[0].attentions
        assert len(steps) == len(expected) == detail.new_tokens
        for mine, its in zip(steps[-2:], expected[-2:], strict=True):
            for one, two in zip(mine, its, strict=True):
                torch.testing.assert_close(one, two)


def test_in_a_batch_each_row_has_its_attention_weights_behind_its_padding(make):
    adapter = make("sink(2) | local(4)")
    requests = [Request(context=c, questions="who?") for c in (CONTEXT, CONTEXT[:30])]
    together = adapter.process_requests(requests, WEIGHTS)
    longest = together[0].details[0].prompt_tokens
    for request, response in zip(requests, together, strict=True):
        [alone] = adapter.process_request(request, WEIGHTS).details
        [detail] = response.details
        padding = longest - detail.prompt_tokens
        for mine, its in zip(
            detail.outputs[0].attentions, alone.outputs[0].attentions, strict=True
        ):
            for one, other in zip(mine, its, strict=True):
                assert not one[..., :padding].any()
                torch.testing.assert_close(one[..., padding:], other)


# Functions and objects of the caller


def test_a_streamer_gets_the_prompt_and_the_tokens_of_every_question(make):
    class Kept(TextStreamer):
        def __init__(self, tokenizer):
            super().__init__(tokenizer, skip_prompt=True)
            self.texts = []

        def on_finalized_text(self, text, stream_end=False):
            self.texts.append(text)

    adapter = make(STATEFUL)
    streamer = Kept(adapter.tokenizer)
    made = answers(adapter, {"max_new_tokens": 6, "streamer": streamer})
    expected = "".join(adapter.tokenizer.decode(detail.token_ids) for detail in made)
    assert "".join(streamer.texts) == expected
    with pytest.raises(RequestError, match="streamer does not go together with num_beams"):
        answers(make(), {"streamer": streamer, "num_beams": 2})


def test_a_loop_of_the_caller_runs_where_no_masker_keeps_a_state(make):
    def second_best(model, input_ids, logits_processor, stopping_criteria, rank=1, **arguments):
        generation_config = arguments.pop("generation_config")
        for name in ("streamer", "synced_gpus"):
            arguments.pop(name, None)
        cached = arguments[next(n for n in ("cache", "past_key_values") if n in arguments)]
        name = "cache" if "cache" in arguments else "past_key_values"
        while input_ids.shape[1] < generation_config.max_length:
            new = input_ids[:, cached.get_seq_length() :]
            logits = model(new, use_cache=True, **{name: cached}).logits[:, -1]
            chosen = logits.topk(rank + 1).indices[:, -1:]
            input_ids = torch.cat([input_ids, chosen], dim=1)
            if stopping_criteria(input_ids, None).all():
                break
        return input_ids

    options = {"custom_generate": second_best, "max_new_tokens": 5}
    best = tokens(make("local(4)"), {"max_new_tokens": 5})
    assert tokens(make("local(4)"), {**options, "rank": 0}) == best
    assert tokens(make("local(4)"), options) != best
    with pytest.raises(RequestError, match="'custom_generate' is not supported with masker 'ques"):
        answers(make(STATEFUL), options)
    with pytest.raises(RequestError, match="the decoding loop returned 3; expected the token ids"):
        answers(make(), {"custom_generate": lambda model, input_ids, **others: 3})
    with pytest.raises(RequestError, match="'rank' is not known"):
        answers(make(), {"rank": 1})


def test_criteria_and_processors_are_asked_once_per_token(make):
    asked = []

    def stop(input_ids, scores, **others):
        asked.append(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    [detail] = answers(
        make(STATEFUL),
        {"max_new_tokens": 4, "stopping_criteria": StoppingCriteriaList([stop])},
        questions=QUESTIONS[:1],
    )
    assert asked == [detail.prompt_tokens + n for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, "does not go together with num_beams=2"),
        ({"prompt_lookup_num_tokens": 3, "guidance_scale": 2.0}, "the unconditional branch"),
        ({"prompt_lookup_num_tokens": 3, "assistant_early_exit": 1}, "exclude each other"),
        ({"num_assistant_tokens": 3}, "num_assistant_tokens needs an assistant_model"),
        ({"assistant_tokenizer": object()}, "assistant_tokenizer needs an assistant_model"),
    ],
)
def test_what_does_not_go_together_is_said_without_a_model(options, message):
    with pytest.raises(RequestError, match=message) as caught:
        HuggingFaceAdapter.check_generation(options)
    assert "\n" not in str(caught.value)
