"""``sah-bench profile`` on tiny shapes: tables, JSON, plot and bad input."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from click.testing import CliRunner

from sah_bench import cli
from sah_bench.profiling import (
    attention,
    decode,
    forms,
    made_up,
    plot,
    shapes,
    tables,
    timing,
    traffic,
)
from sah_bench.profiling.rows import Row
from sah_core import Allowed, Inputs, Mask, Pipeline, registry
from sah_core.errors import UnsupportedError

pytestmark = pytest.mark.unit

SIZES = ("--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--rounds", "2", "--warmup", "0")
ENDS = "sink(8) | local(8)"
CPU = torch.device("cpu")
SPEED = Path(__file__).parents[1] / "speed"


def invoke(*arguments):
    return CliRunner().invoke(cli.main, ["profile", *arguments, "--device", "cpu"])


@pytest.fixture(autouse=True)
def _small_copy(monkeypatch):
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**20)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The JSON of one run over two shapes and two backends, and what it printed."""
    folder = tmp_path_factory.mktemp("profile") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.COPY_BYTES, "cpu", 2**20)
        result = invoke(
            *("--pipeline", ENDS, "--pipeline", f"{ENDS} | quest(0.25, page_size=4)"),
            *("--pipeline", f"{ENDS} | oracle-top-k(5)", "--pipeline", "dense"),
            *("--keys", "64", "--batch", "1,2", "--backend", "gather", "--backend", "eager"),
            *SIZES,
            *("--output", str(folder)),
        )
    assert result.exit_code == 0, result.output
    return json.loads((folder / "profile.json").read_text()), result.stdout, folder


def rows_of(content, name, **shape):
    found = [row for row in content["rows"] if row["name"] == name]
    return [row for row in found if all(row["shape"][k] == v for k, v in shape.items())]


def test_every_pipeline_is_measured_on_every_backend_at_every_shape(profiled):
    content, _, _ = profiled
    assert content["kind"] == "attention"
    for batch in (1, 2):
        rows = rows_of(content, ENDS, batch=batch)
        assert [row["backend"] for row in rows] == ["gather", "eager"]
        assert [row["saving"] for row in rows] == ["realised", "simulated"]
        assert all(len(row["times"]["wall"]["rounds_us"]) == 2 for row in rows)


@pytest.mark.parametrize("batch", [1, 2])
def test_bytes_are_those_of_the_selected_keys(profiled, batch):
    row = rows_of(profiled[0], ENDS, batch=batch)[0]
    kv = batch * 2 * 16 * (16 + 16) * 4  # batch, KV heads, sink + local, channels of k and v
    assert row["bytes"] == {"selection": 0, "attention": kv, "requested": kv, "total": kv}
    assert row["density"] == pytest.approx(16 / 64)
    bandwidth = profiled[0]["copy"]["bytes_per_second"]
    assert row["floor_us"] == pytest.approx(1e6 * kv / bandwidth)
    least = row["times"]["wall"]["min_us"]
    assert row["limit_fraction"] == pytest.approx(row["floor_us"] / least)


def test_selections_read_what_their_maskers_say(profiled):
    content, _, _ = profiled
    quest = rows_of(content, f"{ENDS} | quest(0.25, page_size=4)", batch=1)[0]
    assert quest["bytes"]["selection"] == 2 * 16 * 2 * 16 * 4  # KV heads, pages, min and max
    oracle = rows_of(content, f"{ENDS} | oracle-top-k(5)", batch=1)[0]
    assert oracle["bytes"]["selection"] == 2 * 64 * 16 * 4  # every key


def test_speedup_is_against_the_fastest_dense_form(profiled):
    content, _, _ = profiled
    rows = [row for row in content["rows"] if row["shape"]["batch"] == 1]
    dense = [row for row in rows if row["pipeline"] is None and row["status"] == "ok"]
    fastest = min(row["times"]["wall"]["min_us"] for row in dense)
    assert max(row["speedup"]["wall"] for row in dense) == pytest.approx(1.0)
    for row in rows:
        if row["status"] == "ok":
            expected = fastest / row["times"]["wall"]["min_us"]
            assert row["speedup"]["wall"] == pytest.approx(expected)


def test_dense_forms_move_the_whole_cache_and_are_the_baseline(profiled):
    content, _, _ = profiled
    for row in content["rows"]:
        if row["pipeline"] in (None, "dense") and row["status"] == "ok":
            assert row["bytes"]["total"] == row["shape"]["batch"] * 2 * 64 * 32 * 4
            assert row["saving"] == "baseline"
    assert {row["backend"] for row in rows_of(content, "dense")} == {"sdpa"}


def test_the_profile_says_where_it_comes_from(profiled):
    content, _, _ = profiled
    assert content["command"].startswith("sah-bench profile --pipeline 'sink(8) | local(8)'")
    assert content["versions"]["torch"] == torch.__version__
    assert content["device"].startswith("cpu")
    assert content["copy"]["bytes"] == 2**20


def test_the_table_says_realised_or_simulated_beside_every_number(profiled):
    numbers = [line for line in profiled[1].splitlines() if re.search(r"\d\.\d\dx ", line)]
    lines = [line for line in numbers if " gather " in line or " eager " in line]
    assert len(lines) >= 12
    assert all("realised" in line or "simulated" in line for line in lines)
    assert "refused by torch: sdpa" in profiled[1]


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
def test_the_plot_is_a_png(profiled):
    assert (profiled[2] / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("--pipeline", ENDS, "--keys", "32", *SIZES, "--output", str(tmp_path))
    assert result.exit_code == 0
    assert "no plot: matplotlib is not installed" in result.stdout
    assert (tmp_path / "profile.json").exists()


def test_json_goes_to_standard_output(tmp_path):
    result = invoke("--pipeline", ENDS, "--keys", "32", *SIZES, "--json", "--no-plot")
    assert json.loads(result.stdout)["rows"]


def test_a_question_of_several_rows_counts_each_key_once(tmp_path):
    result = invoke("--pipeline", "local(4)", "--keys", "32", "--query-len", "3", *SIZES, "--json")
    row = rows_of(json.loads(result.stdout), "local(4)")[0]
    assert row["bytes"]["attention"] == 2 * 6 * 32 * 4  # rows 29, 30, 31: keys 26 to 31
    assert row["bytes"]["requested"] == 2 * 12 * 32 * 4


def test_own_choices_count_as_their_union_and_each_on_its_own():
    call = shapes.Call.random(shape(keys=8), CPU)
    inputs = Inputs(
        query=call.query,
        key=call.key,
        value=call.value,
        allowed=Allowed.causal(1, 8),
        scaling=1.0,
        key_len=8,
    )
    indices = torch.tensor([[0, 1], [1, 2], [3, 4], [3, 4]]).view(1, 4, 1, 2)
    found = traffic.traffic_of(inputs, Mask.from_indices(inputs.shape, indices), [])
    per_key = 2 * 16 * 4
    assert found == traffic.Traffic(0, (3 + 2) * per_key, (4 + 4) * per_key)


def shape(**sizes):
    given = {"batch": 1, "heads": 4, "kv_heads": 2, "keys": 33, "head_dim": 16, "query_len": 1}
    return shapes.Shape(**{**given, "dtype": "float32", **sizes})


@pytest.mark.parametrize("text", [ENDS, "sink(4) | quest(8, page_size=4)", "oracle-top-k(6)"])
def test_what_a_graph_captures_computes_the_same(text):
    call = shapes.Call.random(shape(), CPU)
    form = forms.PipelineForm(text, Pipeline.parse(text), "gather", call)
    expected = form.eager()
    torch.testing.assert_close(form.captured(), expected)
    torch.testing.assert_close(form.captured(), expected)
    torch.testing.assert_close(form.eager(), expected)


def test_peak_memory_is_that_of_the_tensors_that_live_at_once():
    given = torch.ones(256)

    def call():
        first = given + 1
        second = first + 1
        del first
        return second.view(16, 16) + 1

    assert timing.peak_memory(call, CPU) == 2 * 1024


def test_a_shape_that_does_not_fit_into_memory_leaves_the_others_alone(monkeypatch):
    real = shapes.Call.random

    def random(shape, device):
        if shape.keys == 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 PiB")
        return real(shape, device)

    monkeypatch.setattr(attention.Call, "random", random)
    result = invoke("--pipeline", ENDS, "--keys", "64,32", *SIZES)
    assert result.exit_code == 1
    assert "out of memory: all forms: CUDA out of memory. Tried to allocate 2 PiB" in result.stdout
    assert "32 keys" in result.stdout
    assert "realised" in result.stdout


def test_a_form_that_fails_leaves_the_others_alone(monkeypatch):
    def eager(self, session=None):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(forms.PipelineForm, "eager", eager)
    result = invoke("--pipeline", ENDS, "--keys", "32", *SIZES, "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    row = rows_of(content, ENDS)[0]
    assert row["status"] == "failed"
    assert row["reason"] == "ZeroDivisionError: no luck"
    assert "Traceback" in row["traceback"]
    assert any(row["times"] for row in content["rows"])


def test_a_refused_pipeline_is_no_fault(monkeypatch):
    def eager(self, session=None):
        raise UnsupportedError("this", "never")

    monkeypatch.setattr(forms.PipelineForm, "eager", eager)
    result = invoke("--pipeline", ENDS, "--keys", "32", *SIZES)
    assert result.exit_code == 0
    assert f"refused: {ENDS} on gather: this is not supported: never" in result.stdout
    [line] = [line for line in result.stdout.splitlines() if line.startswith(ENDS)]
    assert re.search(r" gather +refused ", line)
    assert not re.search(r"torch|baseline|realised|simulated", line)


def test_a_call_plays_the_first_layer_that_the_pipeline_runs_sparse():
    texts = [f"{ENDS} @ dense_layers=[0,1]", f"{ENDS} @ layers=[3]"]
    result = invoke(
        *(x for t in texts for x in ("--pipeline", t)), "--keys", "64", *SIZES, "--json"
    )
    assert result.exit_code == 0
    rows = [row for text in texts for row in rows_of(json.loads(result.stdout), text)]
    assert [row["density"] for row in rows] == pytest.approx([0.25, 0.25])
    assert [row["backend"] for row in rows] == ["gather", "gather"]


def test_a_pipeline_that_runs_no_call_sparse_is_refused():
    text = f"{ENDS} @ question=dense"
    result = invoke("--pipeline", text, "--keys", "64", "--query-len", "3", *SIZES)
    assert result.exit_code == 0
    assert f"refused: {text} on gather" in result.stdout
    assert "it runs no layer of full attention sparse in a question call" in result.stdout


def test_an_artefact_of_a_whole_model_is_taken(tmp_path):
    names = (f"model.layers.{layer}.self_attn.qk_proj" for layer in range(40))
    file = tmp_path / "channels.json"
    file.write_text(json.dumps({name: [list(range(16))] * 4 for name in names}))
    text = f"double-sparsity(8, sorted_channel_file={file})"
    result = invoke("--pipeline", text, "--keys", "64", *SIZES, "--json")
    [row] = rows_of(json.loads(result.stdout), text)
    assert (row["status"], row["density"]) == ("ok", pytest.approx(8 / 64))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "sah-bench profile: --pipeline: give at least one"),
        (["--pipeline", ENDS, "--backend", "gahter"], "no backend named 'gahter'."),
        (["--pipeline", "snik(8)"], "no masker named 'snik'."),
        (
            ["--pipeline", "hash-attention(64, hat_weight_file='a.pt')"],
            "artefact 'a.pt': there is no such",
        ),
        (
            ["--pipeline", ENDS, "--heads", "6", "--kv-heads", "4"],
            "sah-bench profile: --heads: 6 is not a multiple of 4, the KV heads",
        ),
        (["--pipeline", ENDS, "--batch", "0"], "sah-bench profile: --batch: 0 is not positive"),
        (["--pipeline", ENDS, "--dtype", "int8"], "sah-bench profile: --dtype: 'int8' is not one"),
        (["--pipeline", ENDS, "--query-len", "9", "--keys", "9"], "sah-bench profile: --query-len"),
        (["--pipeline", f"{ENDS} @ layers=[3000]"], "Pipeline: layers = 3000 is not allowed"),
        (["--pipeline", ENDS, "--layers", "2"], "sah-bench profile: --layers: it goes with"),
        (["--pipeline", ENDS, "--model", "a", "--model-shape", "b"], "sah-bench profile: --model-"),
        (["--pipeline", ENDS, "--model-shape", "b"], "sah-bench profile: --model-shape: 'b' is"),
        (["--pipeline", ENDS, "--model", "a", "--keys", "4"], "sah-bench profile: --keys: the"),
        (["--pipeline", ENDS, "--model", "./absent"], "model './absent' not found"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, line):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    (error,) = [
        text for text in result.stderr.splitlines() if not text.startswith(("measuring", "loading"))
    ]
    assert error.startswith(f"error: {line}")
    assert not result.stdout


@pytest.mark.parametrize("device", ["cuda:99", "mps", "nonsense"])
def test_a_device_that_is_not_there_is_named(device):
    result = CliRunner().invoke(cli.main, ["profile", "--pipeline", ENDS, "--device", device])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: sah-bench profile: --device: ")
    assert device in result.stderr


def test_numbers_that_are_none_are_refused():
    result = invoke("--pipeline", ENDS, "--keys", "12,x")
    assert result.exit_code == 2
    assert "'12,x' is not a list of integers" in result.stderr


def test_a_profile_is_not_overwritten(profiled):
    result = invoke("--pipeline", ENDS, "--keys", "32", *SIZES, "--output", str(profiled[2]))
    assert result.exit_code == 2
    assert "it holds a profile.json already. choose another folder." in result.stderr


@pytest.fixture(scope="module")
def model_folder(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.build("llama").save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


def test_whole_decode_steps_of_a_model(model_folder, tmp_path):
    result = invoke(
        *("--model", str(model_folder), "--pipeline", f"{ENDS} | quest(0.1, page_size=4)"),
        *("--backend", "gather,eager", "--context", "64", "--batch", "2", "--new-tokens", "3"),
        *("--rounds", "2", "--warmup", "1", "--output", str(tmp_path)),
    )
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["kind"] == "decode"
    assert (content["context"], content["batch"], content["new_tokens"]) == (64, 2, 3)
    dense, by_rows, *fixed, gather, eager = content["rows"]
    savings = [row["saving"] for row in content["rows"]]
    assert savings == ["baseline"] * 4 + ["realised", "simulated"]
    assert (dense["backend"], by_rows["backend"]) == ("torch", "sdpa")
    assert [row["times"] for row in fixed] == [{}, {}]
    assert (gather["backend"], eager["backend"]) == ("gather", "eager")
    assert dense["bytes"]["total"] == 2 * 2 * 2 * 64 * 32 * 4  # layers, batch, KV heads
    assert dense["step_bytes"] == dense["weight_bytes"] + dense["bytes"]["total"]
    assert 0 < gather["density"] < 1
    median = dense["times"]["eager"]["median_us"]
    assert dense["tokens_per_second"]["eager"] == pytest.approx(2e6 / median)
    fastest = min(median, by_rows["times"]["eager"]["median_us"])
    speedup = fastest / gather["times"]["eager"]["median_us"]
    assert gather["speedup"]["eager"] == pytest.approx(speedup)
    assert gather["no_graph"] == "CUDA graphs need a CUDA device"
    assert "eager tok/s" in result.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
def test_the_plot_leaves_out_what_could_not_be_timed(model_folder, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plot, "draw_group", lambda axis, title, rows: drawn.extend(rows))
    result = invoke(
        *("--model", str(model_folder), "--pipeline", ENDS, "--context", "16"),
        *("--new-tokens", "1", "--rounds", "1", "--warmup", "0", "--output", str(tmp_path)),
    )
    assert result.exit_code == 0, result.output
    assert "group as rows, fixed length" in result.stdout
    names = [row.name for row in drawn]
    assert names == ["dense: the model's own attention", "dense: group as rows", ENDS]


def test_a_model_shape_has_random_weights(monkeypatch):
    tiny = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    monkeypatch.setitem(made_up.MODEL_SHAPES, "tiny", tiny)
    result = invoke(
        *("--model-shape", "tiny", "--layers", "2", "--pipeline", "sink(2) | local(2)"),
        *("--context", "16", "--new-tokens", "2", "--rounds", "1", "--warmup", "0", "--json"),
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert (content["shape"], content["layers"]) == ("tiny", 2)
    dense = content["rows"][0]
    assert dense["bytes"]["total"] == 2 * 2 * 16 * (8 + 8) * 4  # layers, KV heads, keys


def test_a_context_beyond_the_model_is_refused(model_folder):
    result = invoke("--model", str(model_folder), "--pipeline", ENDS, "--context", "4096")
    assert result.exit_code == 2
    assert "the prompt is too long: " in result.stderr


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pipeline", ["dense", "sink(2) | local(4) | quest(8, page_size=4)"])
def test_the_adapter_captures_decode_steps_over_a_made_up_context(model_folder, batch, pipeline):
    plan = decode.DecodePlan(
        model=str(model_folder),
        shape=None,
        layers=None,
        pipelines=(),
        backends=(),
        context=16,
        batch=batch,
        new_tokens=4,
        device=CPU,
        dtype="float32",
        rounds=2,
        warmup=0,
    )
    adapter = made_up.load(plan)
    context = made_up.make_context(adapter, plan)
    loop = adapter.capture_decode(context, Pipeline.parse(pipeline), room=3)
    loop.step()
    assert loop.made.shape == (batch, 3)


def test_captured_steps_come_from_the_adapter(monkeypatch, model_folder):
    class Decoder:
        steps = 0

        def step(self):
            type(self).steps += 1

    def capture(prefilled, pipeline, max_new_tokens):
        assert prefilled.context_tokens == 16
        assert max_new_tokens == 6
        if pipeline.is_dense:
            raise UnsupportedError("captured decoding", "not today")
        return Decoder()

    plan = decode.DecodePlan(
        model=str(model_folder),
        shape=None,
        layers=None,
        pipelines=(),
        backends=(),
        context=16,
        batch=1,
        new_tokens=4,
        device=CPU,
        dtype="float32",
        rounds=2,
        warmup=0,
    )
    adapter = made_up.load(plan)
    monkeypatch.setattr(adapter, "capture_decode", capture, raising=False)
    context = made_up.make_context(adapter, plan)
    on_gpu = attrs.evolve(plan, device=torch.device("cuda"))
    monkeypatch.setattr(decode, "now", lambda device: 1.0)
    row = decode.DecodeRow(name="x", batch=1)
    decode.time_captured(row, Pipeline.parse(ENDS), adapter, on_gpu, context)
    assert Decoder.steps == 1 + 4
    assert len(row.times["captured"].rounds) == 2
    decode.time_captured(row, Pipeline.dense(), adapter, on_gpu, context)
    assert row.no_graph == "UnsupportedError: captured decoding is not supported: not today"


def test_maskers_read_nothing_unless_they_say_so():
    call = shapes.Call.random(shape(), CPU)
    inputs = Inputs(
        query=call.query,
        key=call.key,
        value=call.value,
        allowed=Allowed.causal(1, 33),
        scaling=1.0,
        key_len=33,
    )
    assert registry.maskers["sink"]().bytes_read(inputs) == 0
    assert registry.maskers["oracle-top-k"]().bytes_read(inputs) == 2 * 33 * 16 * 4
    assert registry.maskers["quest"](page_size=16).bytes_read(inputs) == 2 * 3 * 2 * 16 * 4


def test_the_report_module_names_what_runs_in_place_of_what():
    row = Row(shape=shape(), name=ENDS, requested="triton", backend="gather", fallback="no")
    assert tables.ran(row) == "gather for triton"


@pytest.mark.integration
def test_the_command_runs_from_the_source_tree_alone(tmp_path):
    # the interpreter sees the packages that are installed, but not this project among them
    code = (
        "import importlib.metadata as m, runpy, sys\n"
        "real = m.distribution\n"
        "def distribution(name):\n"
        "    made = any('entry-points-' in path for path in sys.path)\n"
        "    if name == 'sparse-attention-hub' and not made:\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.distribution = distribution\n"
        f"sys.path.insert(0, {str(SPEED)!r})\n"
        "sys.argv = ['x', 'plugins', 'list']\n"
        f"runpy.run_path({str(SPEED / 'profile_gpu.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  oracle-top-k +ok +sparse-attention-hub", done.stdout, re.MULTILINE)
    assert "conflict" not in done.stdout
