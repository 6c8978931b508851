"""The command line as a whole: start-up, errors, exit codes."""

import json
import logging
import re
import signal
import subprocess
import sys
import time

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from sah_bench import cli
from sah_core import registry
from sah_core.errors import ModelNotFoundError
from sah_core.testing import CHECKS

pytestmark = pytest.mark.unit

HEAVY = ("torch", "transformers", "ray", "datasets")


def invoke(*arguments):
    return CliRunner().invoke(cli.main, arguments)


@pytest.mark.integration
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["plugins", "list"], ["plugins", "list", "--json"], ["run", "-h"]],
)
def test_quick_commands_import_nothing_heavy(arguments):
    code = (
        "import sys, atexit\n"
        "from sah_bench.cli import main\n"
        f"atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules],"
        " file=sys.stderr))\n"
        f"main({arguments})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout
    assert done.stderr == "[]\n"


def test_help_shows_the_help_of_every_command():
    text = invoke("--help").output
    for name, (_, line) in cli.COMMANDS.items():
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command.name == name
        assert re.search(rf"^  {name} +{re.escape(line)}$", text, re.MULTILINE)


def commands(command=cli.main, path=()):
    """Every command below the main one, with the words that call it."""
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        yield (*path, name), found
        if isinstance(found, click.Group):
            yield from commands(found, (*path, name))


def test_every_option_has_a_help_text_and_says_what_it_is_if_not_given(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words, command in commands():
        for option in command.params:
            if not isinstance(option, click.Option):
                continue
            where = f"{' '.join(words)} {option.opts[0]}"
            assert option.help, f"{where} has no help"
            assert option.help.endswith("."), f"{where}: {option.help}"
    text = invoke("ask", "--help").output
    assert re.search(r"--seed INTEGER RANGE +Seed of sampled answers. +\[default: 0; x>=0\]", text)


def test_lines_about_subcommands_are_whole_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words, command in commands():
        if isinstance(command, click.Group):
            text = invoke(*words, "--help").output
            assert "..." not in text.partition("Commands:")[2], f"{' '.join(words)}:\n{text}"


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ([], "pr", ["profile"]),
        (["run"], "--bench", ["--benchmark"]),
        (["run", "--benchmark"], "longb", ["longbench", "longbench-v2"]),
        (["run", "--model"], "smol", ["smollm2-135m"]),
        (["ask", "--backend"], "ea", ["eager"]),
        (["run", "--metric"], "out", ["output-error"]),
        (["plugins", "show"], "oracle", ["oracle-top-k", "oracle-top-p"]),
        (["plugins", "check"], "ga", []),
        (["plugins", "list"], "m", ["maskers", "metrics", "models"]),
        (["data", "fetch"], "zero", ["zeroscrolls"]),
        (["verify", "maskers", "--backend"], "g", ["gather"]),
    ],
)
def test_a_tab_completes_commands_options_and_names_of_plugins(words, incomplete, expected):
    completion = ShellComplete(cli.main, {}, "sah-bench", "_SAH_BENCH_COMPLETE")
    found = [item.value for item in completion.get_completions(words, incomplete)]
    assert found == expected


@pytest.mark.integration
def test_a_tab_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from click.shell_completion import ShellComplete\n"
        "from sah_bench.cli import main\n"
        "completion = ShellComplete(main, {}, 'sah-bench', '_SAH_BENCH_COMPLETE')\n"
        "for words in (['plugins', 'show'], ['run', '--model'], ['profile', '--backend']):\n"
        "    assert completion.get_completions(words, '')\n"
        f"print([m for m in {HEAVY} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_nothing_is_coloured_where_no_color_is_set(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = CliRunner().invoke(cli.main, ["plugins", "check", "sink"], color=True)
    assert "\x1b[32mpassed" in shown.output
    monkeypatch.setenv("NO_COLOR", "1")
    shown = CliRunner().invoke(cli.main, ["plugins", "check", "sink"], color=True)
    assert "\x1b" not in shown.output
    assert "passed" in shown.output


def test_version_is_that_of_the_distribution():
    assert re.fullmatch(r"sah-bench \d+\.\d+\.\d+\S*\n", invoke("--version").output)


def test_unknown_command_suggests_the_nearest():
    result = invoke("pluggins")
    assert result.exit_code == 2
    assert "no command named 'pluggins'. did you mean 'plugins'?" in result.stderr


def test_unknown_option_exits_with_2():
    assert invoke("run", "--modle", "x").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["plugins", "show", "snk"], "error: no plugin named 'snk'. did you mean 'sink'?"),
        (["run", "absent.yaml"], "error: absent.yaml: cannot be read: No such file"),
        (["run"], "error: sah-bench run: give at least one pipeline"),
        (["verify", "maskers", "absent"], "error: 'absent' is no golden case"),
        (["run", "--limit", "0", "--pipeline", "dense"], "error: sah-bench run: give at least one"),
        (["run", "/"], "error: /: cannot be read: Is a directory"),
        (["rnu"], "error: no command named 'rnu'. did you mean 'run'?"),
        (["--bogus"], "error: No such option '--bogus'. see '"),
        (
            ["run", "--limit", "x"],
            "error: Invalid value for '--limit': 'x' is not a valid integer.",
        ),
        (
            ["plugins", "--plugins"],
            "error: No such option '--plugins'. Did you mean one of '--plugin', "
            "'--strict-plugins'? see '",
        ),
        (["plugins", "show"], "error: Missing argument 'NAME'. see '"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, line):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(line)


class Failing(click.Command):
    def __init__(self, error):
        super().__init__("env")
        self.error = error

    def invoke(self, ctx):
        raise self.error


@pytest.fixture
def failing(monkeypatch):
    def replace(error):
        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: Failing(error))

    return replace


def test_fault_is_one_line_and_exit_code_1(failing):
    failing(ZeroDivisionError("division\nby zero"))
    result = invoke("env")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: ZeroDivisionError: division by zero. run it with --debug for the traceback.\n"
    )


class Warns(click.Command):
    """Warns as a backend does that refuses, sample by sample."""

    def invoke(self, ctx):
        for sample in range(3):
            logging.getLogger("sah_core.attention").warning("%s refuses", "triton")
            logging.getLogger("anyone").warning("sample %d", sample)
            logging.getLogger("sah_core.attention").info("nothing of note")


def test_a_warning_is_shown_once_per_command(monkeypatch):
    before = list(logging.getLogger().handlers)
    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: Warns("env"))
    for _ in range(2):
        result = invoke("env")
        assert result.stderr == "triton refuses\nsample 0\nsample 1\nsample 2\n"
    assert logging.getLogger().handlers == before


def test_debug_lets_the_traceback_through(failing):
    failing(ModelNotFoundError("x", "why"))
    result = invoke("--debug", "env")
    assert isinstance(result.exception, ModelNotFoundError)


def test_debug_may_stand_behind_the_command():
    result = invoke("run", "absent.yaml", "--debug")
    assert type(result.exception).__name__ == "ExperimentError"


@pytest.mark.parametrize("name", ["run", "ask", "profile"])
def test_interrupt_exits_with_130_and_says_whether_anything_is_kept(failing, name):
    failing(KeyboardInterrupt())
    result = invoke(name)
    assert result.exit_code == 130
    kept = " finished samples are kept: the same command goes on from there."
    assert result.stderr == f"\ninterrupted.{kept if name == 'run' else ''}\n"


@pytest.mark.integration
def test_interrupt_of_a_run_keeps_its_samples(command, tmp_path):
    arguments = ["run", "--adapter", "fake", "--model", "m", "--pipeline", "dense"]
    arguments += ["--benchmark", "quiz(contexts=50)", "--task", "easy"]
    process = command(*arguments, FAKE_SECONDS="0.05")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("results/*/*/*/samples.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "finished samples are kept" in stderr
    assert "Traceback" not in stderr
    [samples] = tmp_path.glob("results/*/*/*/samples.jsonl")
    assert samples.read_text().endswith("\n")


def test_list_shows_kinds_names_states_and_distributions():
    text = invoke("plugins", "list").output
    assert "maskers\n" in text
    assert re.search(r"^  sink +ok +sparse-attention-hub ", text, re.MULTILINE)


def test_list_can_be_restricted_to_a_kind():
    entries = json.loads(invoke("plugins", "list", "backends", "--json").output)
    assert {entry["kind"] for entry in entries} == {"backend"}
    assert invoke("plugins", "list", "masker").output.startswith("maskers\n")


def test_unknown_kind_suggests_the_nearest():
    result = invoke("plugins", "list", "maskrs")
    assert result.exit_code == 2
    assert "did you mean 'maskers'?" in result.stderr


@pytest.mark.integration
def test_check_shows_what_is_broken_and_the_rest_goes_on(command, tmp_path):
    info = tmp_path / "site" / "bad-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[sah.maskers]\nworse = bad_module_absent\n")
    listed = command("plugins", "list", "maskers")
    text, _ = listed.communicate(timeout=60)
    assert listed.returncode == 0
    assert re.search(r"^  worse +ok +bad 2.0$", text, re.MULTILINE)
    checked = command("plugins", "list", "maskers", "--check")
    text, _ = checked.communicate(timeout=60)
    assert checked.returncode == 1
    assert re.search(r"^  worse +broken +bad 2.0 +ModuleNotFoundError", text, re.MULTILINE)
    assert re.search(r"^  sink +ok", text, re.MULTILINE)
    strict = command("--strict-plugins", "env")
    _, stderr = strict.communicate(timeout=60)
    assert strict.returncode == 2
    assert stderr.startswith(
        "error: not all plugins can be used: masker bad:worse is broken (ModuleNotFoundError"
    )
    assert stderr.count("\n") == 1
    after = command("plugins", "list", "--strict-plugins")
    assert after.communicate(timeout=60)[1] == stderr
    assert after.returncode == 2
    used = command("run", "--pipeline", "worse", "--model", "m", "--benchmark", "quiz")
    _, stderr = used.communicate(timeout=60)
    assert used.returncode == 2
    assert stderr.startswith("error: --pipeline: masker 'worse' of distribution 'bad'")
    assert stderr.count("\n") == 1


@pytest.mark.integration
def test_a_plugin_that_can_be_used_is_shown_beside_one_of_its_name_that_cannot(command, tmp_path):
    info = tmp_path / "site" / "bad-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[sah.benchmarks]\nsink = bad_module_absent\n")
    shown = command("plugins", "show", "sink")
    assert shown.communicate(timeout=60)[0].startswith("sink (masker, sparse-attention-hub")
    assert shown.returncode == 0
    alone = command("plugins", "show", "sink", "--kind", "benchmarks")
    assert "benchmark 'sink' of distribution 'bad'" in alone.communicate(timeout=60)[1]
    assert alone.returncode == 2


def test_a_distribution_that_lacks_a_plugin_gets_the_nearest_name():
    result = invoke("plugins", "show", "nobody:quset")
    assert result.exit_code == 2
    assert "no plugin named 'nobody:quset'. did you mean 'quest'?" in result.stderr


def test_list_says_that_nothing_was_imported():
    assert "nothing was imported to tell these states" in invoke("plugins", "list").output
    [entry] = [
        entry
        for entry in json.loads(invoke("plugins", "list", "maskers", "--json").output)
        if entry["name"] == "sink"
    ]
    assert (entry["state"], entry["checked"]) == ("ok", False)


@pytest.mark.integration
def test_an_incompatible_package_is_listed_and_refused(command, tmp_path):
    info = tmp_path / "site" / "old-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: old\nVersion: 2.0\n"
        "Requires-Dist: sparse-attention-hub<0.0.1\n"
    )
    (info / "entry_points.txt").write_text("[sah.maskers]\nancient = old_module_absent\n")
    listed = command("plugins", "list", "maskers")
    text, _ = listed.communicate(timeout=60)
    line = r"^  ancient +incompatible +old 2.0 +it requires sparse-attention-hub<0.0.1, but"
    assert re.search(line, text, re.MULTILINE)
    used = command("run", "--pipeline", "ancient", "--model", "m", "--benchmark", "quiz")
    _, stderr = used.communicate(timeout=60)
    assert used.returncode == 2
    assert "'ancient' of distribution 'old' 2.0 cannot be used: it requires" in stderr
    assert stderr.count("\n") == 1


PLUGIN = """
'''Takes every key, see arXiv 1234.56789.'''
import attrs
from sah_core import Mask, Masker, hookimpl, param

@attrs.frozen(kw_only=True)
class Everything(Masker):
    '''Select all keys.'''
    name = "everything"
    size: int = param(3, minimum=1, help="Nothing.")

    def add_mask(self, inputs, previous):
        return Mask.full(inputs.shape)

@hookimpl
def sah_masker():
    return Everything
"""


@pytest.fixture
def plugin_file(tmp_path):
    """A file with the masker ``everything``, gone from the registry afterwards."""
    path = tmp_path / "every.py"
    path.write_text(PLUGIN)
    yield path
    if path in registry.files:
        registry.unload_file(path)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_plugin_file_is_loaded_before_and_behind_the_command(plugin_file, place):
    option = ["--plugin", str(plugin_file)]
    words = ["plugins", "show", "everything"]
    result = invoke(*option, *words) if place == "before" else invoke(*words, *option)
    assert result.exit_code == 0, result.stderr
    assert f"everything (masker, every.py, {plugin_file})" in result.output
    assert "Papers: arXiv 1234.56789." in result.output
    assert "size (int, default 3)" in result.output
    assert "Select all keys." in result.output


@pytest.mark.parametrize("words", [["run"], ["profile"], ["verify"], ["verify", "maskers"]])
@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_plugin_file_that_is_absent_is_bad_input(words, place):
    option = ["--plugin", "absent.py"]
    result = invoke(*option, *words, "x") if place == "before" else invoke(*words, *option, "x")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot load the plugin file")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("what", ["sink", "sparse-attention-hub:sink", "sink(2)"])
def test_check_says_how_every_check_went(what):
    result = invoke("plugins", "check", what)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"sink(sink_size={2 if '(' in what else 8})"
    assert re.fullmatch(r"  passed +docstring", lines[1])
    assert len(lines) == 2 + len(CHECKS)
    [skipped] = [line for line in lines if line.startswith("  skipped")]
    assert re.fullmatch(r"  skipped +reorder +it keeps no state", skipped)
    assert lines[-1] == f"{len(CHECKS) - 1} passed, 0 failed, 1 skipped"


def test_check_of_a_file_says_what_to_change_and_exits_with_1(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
        PLUGIN.replace("Mask.full(inputs.shape)", "Mask.empty(inputs.shape)").replace(
            "everything", "forgets"
        )
    )
    try:
        result = invoke("plugins", "check", str(path))
        assert result.exit_code == 1
        assert re.search(
            r"^  failed +previous_respected +with one query row it loses keys .* previous \| sel",
            result.output,
            re.MULTILINE,
        )
        assert re.search(r"^  skipped +position_only +it does not declare", result.output, re.M)
        found = json.loads(invoke("plugins", "check", str(path), "--json").output)
        assert {"masker", "name", "status", "message"} == set(found[0])
    finally:
        registry.unload_file(path)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("snik", "error: no masker named 'snik'. did you mean 'sink'?"),
        ("sink(3", "error: pipeline 'sink(3': found the end"),
        ("absent.py", "error: cannot load the plugin file"),
        ("/", "error: cannot load the plugin file '/': it is a folder"),
        ("./absent", "error: cannot load the plugin file"),
        ("gather", "error: checking the backend 'gather' is not supported: there are checks for"),
        (
            "double-sparsity(sorted_channel_file=absent.json)",
            "error: artefact 'absent.json': there is no such file",
        ),
    ],
)
def test_check_of_what_is_no_masker_is_bad_input(what, line):
    result = invoke("plugins", "check", what)
    assert result.exit_code == 2
    assert result.stderr.startswith(line)


def test_a_name_in_the_environment_that_fits_nothing_is_a_warning(monkeypatch):
    monkeypatch.setenv("SAH_DISABLE_PLUGINS", "snik,quest")
    result = invoke("plugins", "list", "maskers")
    assert result.stderr == "warning: SAH_DISABLE_PLUGINS names 'snik', which fits no plugin.\n"
    assert result.exit_code == 0


def test_show_prints_parameters_and_paper():
    text = invoke("plugins", "show", "sink").output
    assert "arXiv 2309.17453" in text
    assert "sink_size (size" in text
    assert "default 128" in text
    assert "search: one of 4, 16" in text


def test_show_prints_json_with_a_schema():
    facts = json.loads(invoke("plugins", "show", "sink", "--json").output)
    assert facts["kind"] == "masker"
    assert facts["parameters"][0]["name"] == "sink_size"
    assert facts["schema"]["properties"]["sink_size"]["default"] == 128
    assert facts["capabilities"] == ["position only"]


def test_show_takes_the_kind_where_a_name_is_of_several(fakes):
    assert invoke("plugins", "show", "quiz", "--kind", "benchmark").exit_code == 0
    assert invoke("plugins", "show", "quiz", "--kind", "maskers").exit_code == 2


def test_show_takes_a_distribution_in_any_spelling():
    facts = json.loads(invoke("plugins", "show", "Sparse_Attention_Hub:sink", "--json").output)
    assert facts["id"] == "sparse-attention-hub:sink"


def test_env_names_versions_devices_and_models(monkeypatch, tmp_path):
    monkeypatch.setenv("SAH_CACHE_DIR", str(tmp_path))
    facts = json.loads(invoke("env", "--json").output)
    assert facts["libraries"]["torch"]
    assert facts["devices"][0].startswith("cpu")
    assert "smollm2-135m" in facts["models"]
    assert facts["cache_folder"] == str(tmp_path)
    text = invoke("env").output
    assert "torch: " in text
    assert "cache folder: " in text
