"""Every message of `sah_core.errors`, word for word."""

import pickle

import pytest

from sah_core import errors

pytestmark = pytest.mark.unit

MESSAGES = {
    errors.UnknownPluginError("masker", "quset", ("quest",)): (
        "no masker named 'quset'. did you mean 'quest'? see 'sah-bench plugins list'."
    ),
    errors.UnknownPluginError("benchmark", "zzz"): (
        "no benchmark named 'zzz'. see 'sah-bench plugins list'."
    ),
    errors.BrokenPluginError("masker", "bad", "bad-pkg", "bad.mod", ImportError("no\nxyz")): (
        "masker 'bad' of distribution 'bad-pkg' (entry point 'bad.mod') is broken: "
        "ImportError: no xyz. repair or uninstall it, or set SAH_DISABLE_PLUGINS=bad."
    ),
    errors.PluginConflictError("masker", "sink", ("a", "b")): (
        "masker 'sink' is registered by 'a' and 'b'. choose one: 'a:sink' or 'b:sink'."
    ),
    errors.PluginDisabledError("masker", "sink"): (
        "masker 'sink' is disabled: the environment variable SAH_DISABLE_PLUGINS names it. "
        "change the variable to use it."
    ),
    errors.PluginDisabledError("masker", "sink", "SAH_LOAD_PLUGINS does not name it"): (
        "masker 'sink' is disabled: the environment variable SAH_LOAD_PLUGINS does not name it. "
        "change the variable to use it."
    ),
    errors.PluginConflictError("masker", "sink", ("a", "b.py"), "/x/b.py"): (
        "/x/b.py: masker 'sink' is registered by 'a' already. rename the class, or set "
        "SAH_DISABLE_PLUGINS=a:sink."
    ),
    errors.IncompatiblePluginError(
        "masker", "zig", "zig-pkg", "1.2", "it requires sparse-attention-hub>=9, but 0.1.0 is there"
    ): (
        "masker 'zig' of distribution 'zig-pkg' 1.2 cannot be used: it requires "
        "sparse-attention-hub>=9, but 0.1.0 is there. upgrade the one or the other."
    ),
    errors.PluginFileError("/x/b.py", "there is no such file"): (
        "cannot load the plugin file '/x/b.py': there is no such file."
    ),
    errors.UnusablePluginsError(
        (("masker", "a:x", "broken", "ImportError: y"), ("masker", "b:z", "conflict", "twice"))
    ): (
        "not all plugins can be used: masker a:x is broken (ImportError: y); "
        "masker b:z is in conflict (twice). see 'sah-bench plugins list'."
    ),
    errors.ParameterError(
        "sink", "sink_size", -3, "an integer >= 0 (tokens) or a fraction in (0, 1]"
    ): (
        "sink: sink_size = -3 is not allowed: expected an integer >= 0 (tokens) or a fraction in "
        "(0, 1]. see 'sah-bench plugins show sink'."
    ),
    errors.ParameterError("Size", "value", True, "a number"): (
        "Size: value = True is not allowed: expected a number."
    ),
    errors.UnknownParameterError("sink", "size", 3, "one of sink_size", ("sink_size",)): (
        "sink: no parameter named 'size'. did you mean 'sink_size'? "
        "see 'sah-bench plugins show sink'."
    ),
    errors.UnknownParameterError("sink", "top", 3, "one of sink_size"): (
        "sink: no parameter named 'top'. expected one of sink_size. "
        "see 'sah-bench plugins show sink'."
    ),
    errors.MissingParameterError("quest", "page_size", None, "an integer >= 1"): (
        "quest: page_size is missing: expected an integer >= 1. see 'sah-bench plugins show quest'."
    ),
    errors.PipelineSyntaxError("sink(128 | local", 9, "',' or ')'"): (
        "pipeline 'sink(128 | local': found '|' at column 10, expected ',' or ')'."
    ),
    errors.PipelineSyntaxError("sink(", 5, "a value"): (
        "pipeline 'sink(': found the end of the text at column 6, expected a value."
    ),
    errors.PipelineError("two\nlines"): "two lines",
    errors.MissingLibraryError("metric x", "jieba", "benchmarks"): (
        "metric x needs the package jieba: pip install 'sparse-attention-hub[benchmarks]'"
    ),
    errors.MissingLibraryError("metric x", "rare"): (
        "metric x needs the package rare: pip install rare"
    ),
    errors.DataError("longbench trec", "a.jsonl", "no column 'input'.\nit has x"): (
        "longbench trec: a.jsonl: no column 'input'. it has x"
    ),
    errors.ExperimentError("a.yaml", "models[0]", "unknown key 'x'"): (
        "a.yaml: models[0]: unknown key 'x'"
    ),
    errors.ExperimentError("a.yaml", "", "empty file"): "a.yaml: empty file",
    errors.ArtifactError("w.pkl", "it is cut short.\nmake it again."): (
        "artefact 'w.pkl': it is cut short. make it again."
    ),
    errors.ModelNotFoundError("m", "no such folder", "pip install m"): (
        "model 'm' not found: no such folder. pip install m"
    ),
    errors.ContextTooLongError(9000, 8192, "model 'm'"): (
        "the prompt is too long: 9000 tokens, but model 'm' allows 8192. shorten the question, "
        "ask for fewer new tokens, or cut the context with a max_context_length and "
        "truncation='middle'."
    ),
    errors.ContextTooLongError(10, 9, "max_context_length"): (
        "the context is too long: 10 tokens, but max_context_length allows 9 and truncation is "
        "'none'. raise max_context_length, or let truncation be 'middle' or 'head'."
    ),
    errors.RequestError("the question is empty"): "the question is empty",
    errors.UnsupportedError("backend 'triton'", "it needs a GPU"): (
        "backend 'triton' is not supported: it needs a GPU"
    ),
    errors.OutputFolderError("/out", "permission denied"): (
        "cannot write to '/out': permission denied. choose another folder."
    ),
}


@pytest.mark.parametrize(
    ("error", "message"), MESSAGES.items(), ids=[type(error).__name__ for error in MESSAGES]
)
class TestEveryError:
    def test_says_what_is_wrong_on_one_line(self, error, message):
        assert str(error) == message

    def test_survives_a_trip_to_another_process(self, error, message):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == message

    def test_belongs_to_the_family(self, error, message):
        assert isinstance(error, errors.SahError)


def test_no_error_class_lacks_a_message_test():
    public = {getattr(errors, name) for name in errors.__all__}
    classes = {item for item in public if isinstance(item, type)} - {errors.SahError}
    assert classes == {type(error) for error in MESSAGES}


def test_facts_are_attributes():
    error = errors.ParameterError("sink", "sink_size", -3, "an integer")
    assert (error.owner, error.parameter, error.value, error.expected) == (
        "sink",
        "sink_size",
        -3,
        "an integer",
    )


def test_errors_can_be_raised_and_chained():
    with pytest.raises(errors.RequestError) as caught:
        raise errors.RequestError("bad") from ValueError("why")
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_long_value_is_cut_in_the_middle():
    assert len(errors.short_repr("x" * 1000)) <= 80


def test_nearest_names_come_nearest_first():
    assert errors.nearest_names("quset", ["sink", "quest", "local"]) == ("quest",)


def test_a_name_cut_short_is_near_to_what_it_begins():
    names = ["temperature", "tokens", "top_p", "temper"]
    assert errors.nearest_names("temp", names) == ("temper", "temperature")
    assert errors.nearest_names("te", names) == ()


def test_options_of_a_call_are_not_taken_for_a_plugin():
    text = str(errors.ParameterError("request", "max_context_length", 0, "an integer >= 1"))
    assert text == "request: max_context_length = 0 is not allowed: expected an integer >= 1."
