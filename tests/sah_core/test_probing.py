"""What is refused because a trial shows that it would run wrong."""

import pytest
import torch
import transformers
from transformers import StaticCache
from transformers.cache_utils import DynamicCache

from sah_core import Pipeline, attach, compat
from sah_core.errors import PipelineError, UnsupportedError
from sah_core.probing import (
    check_model,
    check_padding,
    check_reading,
    refuses_order,
    relative_error,
)

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet", "no_grad")]

SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def other(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def refusal(model):
    with pytest.raises(UnsupportedError) as caught, attach(model, "local(2)"):
        pass
    message = str(caught.value)
    assert "\n" not in message
    assert type(model).__name__ in message
    return message


# Architectures that are not known


def test_attention_that_does_not_go_through_the_interface_is_refused():
    for model in (
        other("BloomConfig", hidden_size=16, n_layer=1, n_head=2),  # ALiBi
        other("MptConfig", d_model=16, n_layers=1, n_heads=2, expansion_ratio=1),
        other("MambaConfig", hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2),
    ):
        assert "does not go through" in refusal(model)


def test_an_encoder_decoder_is_refused():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        **SMALL,
    )
    assert "it has an encoder" in refusal(transformers.BartForConditionalGeneration(config).eval())


def test_cross_attention_is_refused():
    model = other(
        "GPT2Config", n_embd=16, n_layer=1, n_head=2, add_cross_attention=True, is_decoder=True
    )
    assert "something else than its own text" in refusal(model)


def test_a_model_that_attends_to_later_tokens_is_refused():
    model = other(
        "BertConfig",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.3,
    )
    assert "its logits change" in refusal(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "deepseek-v3", "qwen3-next"])
def test_known_families_pass_and_are_tried_once(models, family):
    model, passes = models.build(family), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    check_model(model)
    tried = len(passes)
    check_model(model)
    assert len(passes) == tried == 6


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("llama", torch.float64),
        ("qwen3-moe", torch.bfloat16),
    ],
)
def test_rounding_is_no_reason_to_refuse(models, family, dtype):
    check_model(models.build(family).to(dtype))


def test_a_trial_leaves_dropout_and_modes_as_they_were(models):
    model = models.build("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_model(model)
    assert [module.training for module in model.modules()] == modes


# Models that look known and are not


def biased(module, query, key, value, mask, **kwargs):
    return original[0](module, query, key * 1.5, value, mask, **kwargs)


original = []


def test_attention_that_does_more_than_the_interface_shows_is_refused(models, monkeypatch):
    from transformers.models.llama import modeling_llama

    original[:] = [modeling_llama.eager_attention_forward]
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", biased)
    model = models.build("llama", attn_implementation="eager")
    assert "its logits change" in refusal(model)


def test_a_layer_that_does_not_reach_the_interface_is_refused(models, monkeypatch):
    model = models.build("llama")

    def own(hidden_states, **kwargs):
        return torch.zeros_like(hidden_states), None

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", own)
    assert "layer 1 (full_attention) does not reach" in refusal(model)


def test_attention_modules_that_do_not_know_their_layer_are_refused(models):
    model = models.build("llama")
    layer = model.model.layers[1].self_attn
    layer_forward = layer.forward

    def without_cache(**kwargs):
        kwargs.pop("cache", None)
        kwargs.pop("past_key_values", None)
        kwargs["attention_mask"] = None
        return layer_forward(**kwargs)

    layer.forward = without_cache
    del layer.layer_idx
    with (
        pytest.raises(UnsupportedError, match="LlamaAttention is not supported: it does not know"),
        attach(model, "local(2)"),
    ):
        pass


def test_a_layer_that_attends_twice_is_refused(models):
    model = models.build("llama")
    layer = model.model.layers[1].self_attn
    original_forward = layer.forward

    def twice(*args, **kwargs):
        without = {k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")}
        original_forward(*args, **without)
        return original_forward(*args, **kwargs)

    layer.forward = twice
    assert "its layer 1 attends 2 times in one pass" in refusal(model)


def test_a_model_that_takes_no_token_ids_is_refused(models):
    model = models.build("llama")
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("needs pixels")))
    assert "needs pixels" in refusal(model)


@pytest.mark.parametrize("window", [4, 64])
@pytest.mark.parametrize("setting", ["sliding_window", "attention_chunk_size"])
def test_a_cache_that_forgets_what_attention_may_read_is_refused(models, setting, window):
    # such as a Llama made from a Mistral, whose configuration kept the window: 12 tokens fit into
    # most windows, so that the logits of a trial do not show it
    message = refusal(models.build("llama", **{setting: window}))
    assert f"forget all but {window} tokens, but its attention has no window" in message
    assert "correct the configuration" in message


@pytest.mark.parametrize("tokens", [4, 1])
def test_one_phase_that_goes_wrong_is_enough_to_refuse(models, tokens):
    model = models.build("llama")
    layer = model.model.layers[1].self_attn
    own = layer.forward

    def forward(hidden_states, **kwargs):
        output, weights = own(hidden_states, **kwargs)
        return (output * 1.5 if hidden_states.shape[1] == tokens else output), weights

    layer.forward = forward
    assert "its logits change" in refusal(model)


def test_code_that_needs_a_mask_of_another_form_is_refused():
    message = refusal(
        other(
            "DogeConfig",
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
        )
    )
    assert "through our attention and a cache fails (AttributeError: 'Allowed'" in message


def test_a_lack_of_memory_is_no_reason_to_refuse(models):
    model = models.build("llama")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError), attach(model, "local(2)"):
        pass


# Models that run dense


def test_a_model_that_cannot_be_patched_may_still_run_dense():
    model = other("BloomConfig", hidden_size=16, n_layer=1, n_head=2)
    check_reading(model)
    assert "does not go through" in refusal(model)


def test_a_model_that_reads_pieces_otherwise_is_refused_even_dense():
    model = other(
        "RecurrentGemmaConfig",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        lru_width=16,
        initializer_range=0.3,
    )
    with pytest.raises(UnsupportedError, match="change when a text is read in pieces on a cache"):
        check_reading(model)


def test_a_model_that_wants_a_cache_of_its_own_is_refused_in_one_line():
    model = other(
        "MiniMaxConfig",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    with pytest.raises(UnsupportedError, match="with a cache fails .ValueError: MiniMax uses"):
        check_reading(model)


def test_a_cache_that_forgets_is_refused_dense_too(models):
    with pytest.raises(UnsupportedError, match="forget all but 64 tokens"):
        check_reading(models.build("llama", sliding_window=64))


def test_one_trial_serves_dense_and_sparse_runs(models):
    model, passes = models.build("llama"), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    check_reading(model)
    check_model(model)
    check_reading(model)
    assert len(passes) == 6


# Padding


def test_a_model_that_counts_positions_over_padding_is_refused_in_batches():
    model = other(
        "BartConfig",
        d_model=16,
        decoder_layers=1,
        encoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        init_std=0.3,
    )
    check_model(model)
    with pytest.raises(UnsupportedError) as caught:
        check_padding(model)
    assert str(caught.value) == (
        "a left-padded batch with model class BartForCausalLM is not supported: its logits change "
        "with the padding; ask one request at a time (batch size 1)"
    )


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "gpt-oss", "deepseek-v3", "qwen3-next", "qwen3-moe"]
)
def test_known_families_are_tried_with_padding_once(models, family):
    model, passes = models.build(family), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    check_padding(model)
    check_padding(model)
    assert len(passes) == 2


# Pipelines that would do nothing


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("mistral", "local(2)"),
        ("gemma3", "local(2) @ layers=[0]"),
        ("llama", "local(2) @ dense_layers=[0, 1]"),
    ],
)
def test_a_pipeline_that_applies_to_no_layer_is_refused(models, family, pipeline):
    with (
        pytest.raises(PipelineError, match="applies to no layer of the model") as caught,
        attach(models.build(family), pipeline),
    ):
        pass
    assert "\n" not in str(caught.value)


# Caches that are not known


def test_a_static_cache_is_refused(models):
    model, ids = models.build("llama"), models.tokens(1, 6)
    argument = compat.cache_argument(type(model).forward)
    for length in (6, 1):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with (
            attach(model, "local(2)"),
            pytest.raises(UnsupportedError, match="KV cache of fixed length"),
        ):
            model(ids[:, :length], use_cache=True, **{argument: cache})


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_the_dynamic_cache_of_transformers_is_fine(models, family):
    model, ids = models.build(family), models.tokens(1, 24)
    argument = compat.cache_argument(type(model).forward)
    cache = DynamicCache(config=model.config)
    with attach(model, "local(2)"):
        for begin, end in ((0, 20), (20, 23), (23, 24)):
            model(ids[:, begin:end], use_cache=True, **{argument: cache})


def test_the_error_of_most_tokens_counts():
    expected = torch.ones(5, 4)
    found = expected.clone()
    found[:2] = 9
    assert relative_error(found, expected) == 0
    found[2] = 2
    assert relative_error(found, expected) == pytest.approx(1.0)


# States that cannot follow beams


def test_the_states_of_a_pipeline_are_asked_whether_they_can_follow(models, monkeypatch):
    from sah_plugins.maskers.quest import PageBounds

    model = models.build("gemma3")
    made = []
    init = PageBounds.__init__
    monkeypatch.setattr(
        PageBounds, "__init__", lambda s, layer, n: made.append(layer) or init(s, layer, n)
    )
    assert refuses_order(model, Pipeline.parse("sink(2) | quest(8)")) is None
    [layer] = made
    # the first layer with full attention, as the model has it
    assert (layer.index, layer.count, layer.batch, layer.first) == (1, 2, 1, None)
    assert (layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim) == (4, 2, 16, 16)
    assert (layer.dtype, layer.device.type) == (torch.float32, "cpu")
    assert layer.random.step == 1
    monkeypatch.delattr(PageBounds, "reorder")
    name, reason = refuses_order(model, Pipeline.parse("sink(2) | quest(8)"))
    assert (name, "PageBounds" in reason) == ("quest", True)


def test_what_keeps_no_state_follows_any_order(models, monkeypatch):
    from sah_plugins.maskers.twilight import RoundedKeys

    monkeypatch.delattr(RoundedKeys, "reorder")
    model = models.build("llama")
    for text in ("dense", "sink(2) | local(4)", "oracle-top-k(8) | twilight(label_bits=16)"):
        assert refuses_order(model, Pipeline.parse(text)) is None
    assert refuses_order(model, Pipeline.parse("oracle-top-k(8) | twilight"))[0] == "twilight"
