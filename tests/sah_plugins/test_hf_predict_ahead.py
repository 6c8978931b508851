"""Drafts by layers for multi-token prediction: they start from the whole prompt, run dense, and
change no token.
"""

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from sah_core import Request, attach
from sah_core.errors import ParameterError, RequestError, UnsupportedError
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
QUESTIONS = ("who is in the tin?", "where is the hen?")
LENGTH = 12
KINDS = (("deepseek-v3", 1), ("glm4-moe", 2), ("deepseek-v3", 2), ("glm4-moe", 1))
PIPELINES = (
    "dense",
    "sink(2) | local(4)",
    "sink(2) | quest(8, page_size=4)",
    "random-sampling(0.3)",
    "oracle-top-k(6) @ prefill=sparse",
)


class Repeating(LogitsProcessor):
    """Favours a repeating text, for model and drafts alike, so that many drafts are right."""

    def __init__(self, strength=8.0):
        self.strength = strength

    def __call__(self, input_ids, scores):
        scores[:, input_ids[:, -9]] += self.strength
        return scores


def save_with_draft_layers(model, count, folder):
    """Write a checkpoint in which layers for drafts stand behind those of the model."""
    torch.manual_seed(5)
    layers = MtpModel(model, count)
    for weight in layers.layers.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    for name, weight in layers.layers.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(weight)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    behind = model.config.num_hidden_layers
    for name, weight in layers.state_dict().items():
        if not name.startswith("layers."):
            continue
        _, number, rest = name.split(".", 2)
        place = f"model.layers.{behind + int(number)}.{rest.replace('mtp_block.', '')}"
        weights.update(as_released(place, weight))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def as_released(name, weight):
    """A weight under the names that checkpoints have: each expert by itself."""
    if name.endswith("experts.gate_up_proj"):
        for number, expert in enumerate(weight):
            gate, up = expert.chunk(2)
            yield name.replace("gate_up_proj", f"{number}.gate_proj.weight"), gate.contiguous()
            yield name.replace("gate_up_proj", f"{number}.up_proj.weight"), up.contiguous()
    elif name.endswith("experts.down_proj"):
        for number, expert in enumerate(weight):
            yield name.replace("down_proj", f"{number}.down_proj.weight"), expert.contiguous()
    else:
        yield name.replace("post_norm", "shared_head.norm"), weight


@pytest.fixture(scope="module")
def predicting(models, tmp_path_factory):
    """Makes adapters around models with layers for drafts, which are loaded once per kind."""
    loaded = {}

    def adapter(pipeline="dense", kind=KINDS[0]):
        family, count = kind
        if kind not in loaded:
            folder = tmp_path_factory.mktemp(family)
            built = models.build(family, num_nextn_predict_layers=count)
            save_with_draft_layers(built, count, folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            behind = model.config.num_hidden_layers
            # released checkpoints have another number of layers, which their classes name
            model._keys_to_ignore_on_load_unexpected = [
                rf"model\.layers\.{behind + number}\." for number in range(count)
            ]
            source = ModelSource(kind="folder", location="tiny", label="tiny")
            loaded[kind] = Loaded(
                model=model, tokenizer=models.tokenizer(), source=source, weights_hash="0"
            )
        return HuggingFaceAdapter.of(loaded[kind], pipeline)

    return adapter


def answers(adapter, options=(), questions=QUESTIONS, **request_options):
    request = Request(context=CONTEXT, questions=questions)
    given = {"max_new_tokens": LENGTH, **dict(options)}
    return adapter.process_request(request, given, request_options).details


def tokens(*arguments, **options):
    return [detail.token_ids for detail in answers(*arguments, **options)]


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


@pytest.fixture
def drafted(monkeypatch):
    """What the layers for drafts were given and what they proposed, in order."""
    seen, forward = [], MtpModel.forward

    def noted(self, **arguments):
        made = forward(self, **arguments)
        names = ("input_ids", "last_hidden_states", "position_ids")
        seen.append([*(arguments[name].clone() for name in names), made[0].clone()])
        return made

    monkeypatch.setattr(MtpModel, "forward", noted)
    return seen


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_drafts_change_no_token(predicting, kind, pipeline):
    adapter = predicting(pipeline, kind)
    options = {"logits_processor": LogitsProcessorList([Repeating()])}
    assert tokens(adapter, {**options, "use_mtp": True}) == tokens(adapter, options)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_drafts_that_are_right_save_passes(predicting, kind):
    adapter = predicting("sink(2) | quest(8, page_size=4)", kind)
    options = {"logits_processor": LogitsProcessorList([Repeating(30.0)])}
    with Passes(adapter.model) as plain:
        expected = answers(adapter, options)
    with Passes(adapter.model) as fewer:
        found = answers(adapter, {**options, "use_mtp": True})
    assert [d.token_ids for d in found] == [d.token_ids for d in expected]
    each = 1 + kind[1]
    assert max(fewer.rows[2:]) > 1
    assert len(fewer.rows) <= 1 + 2 * (1 + -(-LENGTH // each)) < len(plain.rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_draft_what_they_draft_in_transformers_alone(predicting, kind, drafted):
    adapter = predicting("dense", kind)
    options = {"max_new_tokens": LENGTH, "use_mtp": True}
    tokens(adapter, options)
    found = list(drafted)
    drafted.clear()
    for question in QUESTIONS:
        generated(adapter, question, do_sample=False, **options)
    assert found[0][1].shape[1] > len(CONTEXT) // 2
    assert_same(found, drafted)


def generated(adapter, question, **options):
    """What transformers alone makes of a question."""
    ids = torch.tensor([adapter.tokenizer(f"{CONTEXT}\n{question}").input_ids])
    made = adapter.model.generate(ids, pad_token_id=0, eos_token_id=[2], **options)
    return tuple(made[0, ids.shape[1] :].tolist())


def assert_same(found, expected):
    assert len(found) == len(expected)
    for mine, its in zip(found, expected, strict=True):
        for one, other in zip(mine, its, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_sampling_draws_what_transformers_alone_draws(predicting):
    adapter = predicting("dense", KINDS[1])
    options = {"max_new_tokens": 10, "use_mtp": True, "do_sample": True, "temperature": 0.8}
    for question in QUESTIONS:
        draws = {**options, "seed": 4, "num_return_sequences": 2}
        [detail] = answers(adapter, draws, [question])
        torch.manual_seed(4)
        expected = [generated(adapter, question, **options) for _ in range(2)]
        assert [detail.token_ids, *(other.token_ids for other in detail.others)] == expected


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("pipeline", ["dense", "oracle-top-k(6) @ prefill=sparse"])
def test_a_context_that_was_read_without_thought_of_drafts_is_read_once_more(
    predicting, drafted, pipeline, chunk
):
    adapter = predicting(pipeline)
    options = {"max_new_tokens": LENGTH, "use_mtp": True}
    request = Request(context=CONTEXT, questions=QUESTIONS)
    with Passes(adapter.model) as passes:
        expected = adapter.process_request(request, options, {"prefill_chunk_size": chunk})
    kept = list(drafted)
    drafted.clear()
    prefilled = adapter.prefill(request, {"prefill_chunk_size": chunk}, pipeline)
    with Passes(adapter.model) as later:
        found = adapter.answer(prefilled, pipeline, options)
    assert later.rows == passes.rows
    assert found.responses == expected.responses
    assert_same(drafted, kept)
    drafted.clear()
    with Passes(adapter.model) as again:
        adapter.answer(prefilled, pipeline, options)
    assert sum(passes.rows) - sum(again.rows) == prefilled.shared
    assert_same(drafted, kept)


def test_questions_that_share_less_than_the_context_start_from_their_own(predicting, drafted):
    for pipeline in ("dense", "oracle-top-k(6) @ prefill=sparse"):
        adapter = predicting(pipeline)
        # the context's last token is another one where a question begins with "e"
        request = Request(context="a red hen is in th", questions=["e box", "at"], separator="")
        options = {"max_new_tokens": 4, "use_mtp": True}
        prefilled = adapter.prefill(request, pipeline=pipeline)
        drafted.clear()
        together = adapter.answer(prefilled, pipeline, options).responses
        found = list(drafted)
        drafted.clear()
        alone = [
            adapter.process_request(attrs.evolve(request, questions=question), options).responses
            for question in request.questions
        ]
        assert together == alone
        assert_same(found, drafted)


def test_the_layers_for_drafts_run_dense_and_are_read_once(predicting, drafted, monkeypatch):
    adapter = predicting("local(2)", KINDS[1])
    reads, read = [], MtpModel.from_pretrained.__func__

    def counted(cls, *arguments, **named):
        reads.append(1)
        return read(cls, *arguments, **named)

    monkeypatch.setattr(MtpModel, "from_pretrained", classmethod(counted))
    tokens(adapter, {"use_mtp": True})
    tokens(adapter, {"use_mtp": True})
    assert reads == [1]
    layers = MtpModel.from_pretrained(adapter.model)
    layers.set_attn_implementation("eager")
    [ids, states, position, proposed] = drafted[0]
    with torch.no_grad():
        made, _, _ = layers(
            input_ids=ids,
            last_hidden_states=states,
            attention_mask=torch.ones_like(ids),
            position_ids=position,
            mtp_cache=MtpCache(config=layers.config),
        )
    assert made.tolist() == proposed.tolist()


def test_requests_are_read_one_at_a_time(predicting):
    adapter = predicting("sink(2) | quest(8, page_size=4)")
    requests = [Request(context=CONTEXT, questions=question) for question in QUESTIONS]
    plain = adapter.process_requests(requests, {"max_new_tokens": LENGTH})
    options = {"max_new_tokens": LENGTH, "use_mtp": True}
    found = adapter.process_requests(requests, options)
    assert [r.responses for r in found] == [r.responses for r in plain]
    with pytest.raises(RequestError, match="takes one context at a time, not 2"):
        adapter.answer_batch(adapter.prefill_batch(requests), generation_kwargs=options)


def test_a_checkpoint_may_ask_for_drafts(predicting):
    adapter = predicting("sink(2) | local(4)")
    options = {"logits_processor": LogitsProcessorList([Repeating(30.0)])}
    with Passes(adapter.model) as plain:
        expected = tokens(adapter, options)
    adapter.model.generation_config.use_mtp = True
    try:
        with Passes(adapter.model) as fewer:
            assert tokens(adapter, options) == expected
        assert tokens(adapter, {**options, "prompt_lookup_num_tokens": 3}) == expected
        assert tokens(adapter, {**options, "use_mtp": False}) == expected
    finally:
        adapter.model.generation_config.use_mtp = None
    assert len(fewer.rows) < len(plain.rows)


def test_a_model_without_such_layers_is_refused_before_anything_is_read(make, models):
    adapter = make()
    with Passes(adapter.model) as passes, pytest.raises(RequestError) as caught:
        tokens(adapter, {"use_mtp": True})
    assert str(caught.value) == (
        "generation option 'use_mtp' is not supported with LlamaForCausalLM: its configuration has "
        "no layers for multi-token prediction (num_mtp_layers)"
    )
    assert not passes.rows


def test_a_checkpoint_that_lacks_their_weights_is_refused_before_anything_is_read(
    make, models, tmp_path
):
    models.build("deepseek-v3").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for lacking in (model, models.build("deepseek-v3")):
        adapter = make(family="deepseek-v3")
        source = ModelSource(kind="folder", location="tiny", label="tiny")
        loaded = attrs.evolve(adapter.loaded, model=lacking, source=source)
        adapter = HuggingFaceAdapter.of(loaded)
        with Passes(lacking) as passes, pytest.raises(UnsupportedError) as caught:
            tokens(adapter, {"use_mtp": True})
        found = str(caught.value)
        assert found.startswith(
            "multi-token prediction with DeepseekV3ForCausalLM is not supported: its layers for "
            f"drafts cannot be read from the checkpoint '{lacking.config.name_or_path}': "
        )
        assert "\n" not in found
        assert not passes.rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt_lookup_num_tokens": 3},
            "prompt_lookup_num_tokens and use_mtp exclude each",
        ),
        ({"num_beams": 2}, "use_mtp does not go together with num_beams=2"),
        ({"guidance_scale": 2.0}, "use_mtp does not go together with guidance_scale"),
        ({"num_assistant_tokens": 2}, "num_assistant_tokens needs an assistant_model"),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "use_mtp does not go together with output_hidden_states",
        ),
        ({"use_mtp": "yes"}, "use_mtp = 'yes' is not allowed: expected true or false"),
    ],
)
def test_what_does_not_go_together_with_drafts_is_found_without_a_model(options, message):
    with pytest.raises((RequestError, ParameterError), match=message):
        HuggingFaceAdapter.check_generation({"use_mtp": True, **options})
    HuggingFaceAdapter.check_generation({"use_mtp": False, "num_beams": 2})


@pytest.mark.parametrize("pipeline", PIPELINES[:3])
def test_drafts_start_from_a_healed_prompt(predicting, pipeline):
    adapter, questions = predicting(pipeline), ("so a", "Ia", "b a", "is it so. \n")
    healed = answers(adapter, {"token_healing": True}, questions)
    drafting = answers(adapter, {"token_healing": True, "use_mtp": True}, questions)
    for one, other in zip(healed, drafting, strict=True):
        assert (one.healed_token, one.token_ids) == (other.healed_token, other.token_ids)
    assert any(detail.healed_token is not None for detail in healed)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_under_attach_the_layers_run_dense_beside_a_plain_generate(predicting, drafted, kind):
    adapter, options = predicting("dense", kind), {"max_new_tokens": LENGTH, "do_sample": False}
    expected = generated(adapter, QUESTIONS[0], use_mtp=True, **options)
    alone = list(drafted)
    drafted.clear()
    with attach(adapter.model, "local(1.0) @ prefill=sparse"):
        assert generated(adapter, QUESTIONS[0], use_mtp=True, **options) == expected
        assert_same(drafted, alone)
    drafted.clear()
    other = HuggingFaceAdapter.of(adapter.loaded)
    with attach(adapter.model, "local(2)"):
        request = Request(context=CONTEXT, questions=QUESTIONS[0])
        [detail] = other.process_request(request, {**options, "use_mtp": True}).details
    assert detail.token_ids == expected
    assert_same(drafted, alone)
