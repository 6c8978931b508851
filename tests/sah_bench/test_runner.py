"""Running experiments: shared prefills, faults, resuming."""

import hashlib
import json
import signal
import time

import attrs
import pytest
import torch
from click.testing import CliRunner

from sah_bench.cli import main
from sah_bench.experiment import resolve
from sah_bench.identity import cell_identity
from sah_bench.plan import planned_cells
from sah_bench.progress import Silent
from sah_bench.runner import exit_code, run_experiment
from sah_core import Protocol, registry
from sah_core.errors import ArtifactError, ModelNotFoundError

pytestmark = pytest.mark.unit

SPARSE = "sink(4) | local(8)"
SPARSE_PREFILL = "sink(5) @ prefill=sparse"
FAULTY = "sink(13)"
MASKER = """
import attrs
from sah_core import Masker, hookimpl

@attrs.frozen(kw_only=True)
class Mine(Masker):
    name = "mine"

    def add_mask(self, inputs, previous):
        return previous

@hookimpl
def sah_masker():
    return Mine
"""
INTERRUPTED = "sink(14)"


@pytest.fixture
def experiment(fakes, tmp_path):
    def experiment(**changes):
        document = {
            "adapter": "fake",
            "models": ["m"],
            "pipelines": ["dense", SPARSE],
            "benchmarks": ["quiz(contexts=2)"],
            "tasks": ["easy"],
            "metrics": ["asked", "density"],
            "timed_samples": 0,
            "output": str(tmp_path / "results"),
            **changes,
        }
        return resolve(document, path="e.yaml")

    return experiment


class Recorder(Silent):
    def __init__(self):
        self.expected, self.advanced, self.notes = [], 0, []

    def expect(self, samples):
        self.expected.append(samples)

    def advance(self):
        self.advanced += 1

    def note(self, text):
        self.notes.append(text)


def run(experiment, **options):
    return run_experiment(experiment, Recorder(), **options)


def calls(fakes, kind):
    return [call for call in fakes.FakeAdapter.calls if call[0].removeprefix("watched ") == kind]


def rows(result, name="samples.jsonl"):
    return [json.loads(line) for line in (result.folder / name).read_text().splitlines()]


def kept_bytes(folder):
    names = ("samples.jsonl", "micro_metrics.jsonl", "metrics.json", "asked.jsonl")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for name in names
        for path in folder.rglob(name)
    }


def test_every_pipeline_answers_every_example(experiment):
    dense, sparse = run(experiment())
    assert (dense.score, sparse.score) == (100.0, 0.0)
    assert (dense.samples, sparse.samples) == (4, 4)
    assert (dense.saving, sparse.saving) == ("none", "realised")
    assert dense.prefill_seconds == 1.5
    assert exit_code([dense, sparse]) == 0
    assert [row["question"] for row in rows(dense)] == [row["question"] for row in rows(sparse)]


def test_samples_hold_what_reading_and_scoring_them_needs(experiment):
    dense, _ = run(experiment(seed=3))
    first = rows(dense)[0]
    assert first == {
        "id": "0-0",
        "context_id": "0",
        "question": "question 0 of 0 seed 3",
        "prediction": "3 dees 0 fo 0 noitseuq",
        "references": ["3 dees 0 fo 0 noitseuq"],
        "scores": {"accuracy": 100.0},
        "facts": {"seed": 3},
        "prompt_tokens": 12,
        "context_tokens": 10,
        "new_tokens": 2,
        "finished": "eos",
    }
    assert rows(dense, "micro_metrics.jsonl")[0]["metrics"]["asked"] == {"questions": 1}
    assert rows(dense, "timings.jsonl")[0]["prefill"] == 1.5


def test_metrics_name_the_protocol_and_hold_no_timings(experiment):
    _, sparse = run(experiment(max_context_length=100))
    metrics = json.loads((sparse.folder / "metrics.json").read_text())
    assert metrics["n"] == 4
    assert metrics["scores"] == {"accuracy": 0.0}
    assert metrics["micro_metrics"]["asked"] == {"questions": 1.0}
    assert metrics["protocol"] == {
        "chat": False,
        "truncation": "none",
        "prefix": "assistant",
        "version": "1",
        "sparse_phases": ["decode", "question"],
        "max_context_length": 100,
        "max_new_tokens": None,
    }
    assert "seconds" not in json.dumps(metrics)


def test_one_prefill_per_context_serves_all_dense_prefills(experiment, fakes):
    run(experiment(pipelines=["dense", SPARSE, "sink(6)", SPARSE_PREFILL]))
    prefills = calls(fakes, "prefill")
    assert [call[2] is None for call in prefills].count(True) == 2
    own = [call[2] for call in prefills if call[2] is not None]
    assert own == ["sink(sink_size=5) @ prefill=sparse"] * 2
    assert len(calls(fakes, "load")) == 1


def test_limit_counts_examples_and_more_go_on_in_the_same_cell(experiment, fakes):
    first = run(experiment(limit=1))
    assert [result.samples for result in first] == [1, 1]
    fakes.FakeAdapter.calls.clear()
    second = run(experiment(limit=3))
    assert [result.folder for result in second] == [result.folder for result in first]
    assert [row["id"] for row in rows(second[0])] == ["0-1", "1-0", "1-1"]
    assert len(calls(fakes, "answer")) == 4
    fakes.FakeAdapter.calls.clear()
    assert [result.samples for result in run(experiment(limit=2))] == [3, 3]
    assert not calls(fakes, "answer")


def test_results_do_not_depend_on_the_way_to_them(experiment, tmp_path):
    run(experiment(output=str(tmp_path / "at-once")))
    run(experiment(output=str(tmp_path / "by-and-by"), limit=1))
    run(experiment(output=str(tmp_path / "by-and-by"), limit=3, pipelines=[SPARSE]))
    run(experiment(output=str(tmp_path / "by-and-by")))
    assert kept_bytes(tmp_path / "at-once") == kept_bytes(tmp_path / "by-and-by")


def test_examples_are_made_one_context_at_a_time(experiment, fakes, monkeypatch):
    made = []
    examples = fakes.Quiz.examples

    def counted(self, task, tokenizer, seed):
        for example in examples(self, task, tokenizer, seed):
            made.append(example.id)
            yield example

    monkeypatch.setattr(fakes.Quiz, "examples", counted)
    prefill, seen = fakes.FakeAdapter.prefill, []
    monkeypatch.setattr(
        fakes.FakeAdapter,
        "prefill",
        lambda self, *a, **k: seen.append(len(made)) or prefill(self, *a, **k),
    )
    run(experiment(benchmarks=["quiz(contexts=6)"], pipelines=["dense"]))
    assert seen == [3, 5, 7, 9, 11, 12]


def test_a_benchmark_that_does_not_know_its_size_is_sampled_all_the_same(
    experiment, fakes, monkeypatch
):
    monkeypatch.setattr(fakes.Quiz, "count", lambda self, task: None)
    recorder = Recorder()
    [result] = run_experiment(experiment(pipelines=["dense"], limit=3), recorder)
    assert [row["id"] for row in rows(result)] == ["0-1", "1-0", "1-1"]
    [result] = run_experiment(experiment(pipelines=["dense"]), recorder)
    assert result.metrics["complete"]
    assert recorder.expected == [3, None, 1]


@pytest.mark.parametrize(("limit", "complete"), [(3, False), (4, True), (5, True)])
def test_independent_examples_are_taken_from_the_start(
    experiment, fakes, monkeypatch, limit, complete
):
    monkeypatch.setattr(fakes.Quiz, "independent", True)
    monkeypatch.setattr(fakes.Quiz, "count", lambda self, task: None)
    [result] = run(experiment(pipelines=["dense"], limit=limit))
    assert [row["id"] for row in rows(result)] == ["0-0", "0-1", "1-0", "1-1"][:limit]
    assert result.metrics["complete"] is complete


def test_a_task_without_examples_is_bad_input(experiment, fakes, monkeypatch):
    monkeypatch.setattr(fakes.Quiz, "examples", lambda *_: iter(()))
    [result] = run(experiment(pipelines=["dense"]))
    assert (result.status, result.bad_input) == ("failed", True)
    assert result.message == "quiz: task easy: it has no examples"


def test_an_answer_leads_to_the_next_question_of_a_chain(experiment, fakes, monkeypatch):
    def follow_up(self, example, prediction):
        if example.id.endswith("'"):
            return None
        return attrs.evolve(
            example,
            id=f"{example.id}'",
            context=f"after {prediction}",
            question="x",
            max_new_tokens=3,
        )

    monkeypatch.setattr(fakes.Quiz, "follow_up", follow_up)
    monkeypatch.setattr(
        fakes.Quiz,
        "score",
        lambda self, example, prediction: {"accuracy": 100.0 * (prediction == "x")},
    )
    dense, sparse = run(experiment(pipelines=["dense", SPARSE_PREFILL]))
    assert (dense.score, sparse.score) == (100.0, 0.0)
    [first, *_] = rows(dense)
    assert (first["id"], first["prediction"]) == ("0-0", "x")
    [turn] = first["turns"]
    assert turn["prediction"] == first["question"][::-1]
    assert {call[3]["max_new_tokens"] for call in calls(fakes, "answer")} == {8, 9, 3}
    contexts = [(call[1], call[2]) for call in calls(fakes, "prefill")]
    assert (f"after {turn['prediction']}", None) in contexts
    assert ("after no", "sink(sink_size=5) @ prefill=sparse") in contexts
    # a prefill that runs sparse is observed, that of a later question too
    kinds = {call[0] for call in fakes.FakeAdapter.calls if call[1:2] == ("after no",)}
    assert "watched prefill" in kinds


def test_what_a_task_prescribes_for_generation_gives_way_to_the_experiment(
    experiment, fakes, monkeypatch
):
    prescribed = {"do_sample": True, "temperature": 0.6}
    monkeypatch.setattr(fakes.Quiz, "generation_for", lambda self, task: prescribed)
    [first] = run(experiment(pipelines=["dense"]))
    assert calls(fakes, "answer")[0][3] == {**prescribed, "max_new_tokens": 8}
    fakes.FakeAdapter.calls.clear()
    [second] = run(experiment(pipelines=["dense"], generation={"temperature": 0.9}))
    assert calls(fakes, "answer")[0][3]["temperature"] == 0.9
    assert first.folder != second.folder
    assert prescribed == {"do_sample": True, "temperature": 0.6}


def test_figures_over_tasks_stand_below_the_table(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(
        fakes.Quiz,
        "summary",
        classmethod(lambda cls, tasks: {"all tasks": tasks["easy"]["scores"]["accuracy"] / 4}),
    )
    result = CliRunner().invoke(main, arguments(tmp_path / "r", "--pipeline", "dense"))
    assert "all tasks %" in result.stdout
    assert "25.0" in result.stdout


def test_a_figure_with_a_unit_is_no_percentage(fakes, tmp_path, monkeypatch):
    figures = {"reach": 4096.0, "gap": None}
    monkeypatch.setattr(fakes.Quiz, "units", {"reach": "tokens", "gap": "tokens"})
    monkeypatch.setattr(fakes.Quiz, "summary", classmethod(lambda cls, tasks: figures))
    result = CliRunner().invoke(main, arguments(tmp_path / "r", "--pipeline", "dense"))
    table = result.stdout.splitlines()
    [head] = [line for line in table if "reach (tokens)" in line]
    assert "%" not in head
    assert table[table.index(head) + 2].split() == ["m", "quiz", "dense", "4096", "-"]


def test_many_figures_are_a_row_each(fakes, tmp_path, monkeypatch):
    figures = {f"figure {i}": float(i) for i in range(5)}
    monkeypatch.setattr(fakes.Quiz, "summary", classmethod(lambda cls, tasks: figures))
    result = CliRunner().invoke(main, arguments(tmp_path / "r", "--pipeline", "dense"))
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["m", "quiz", "dense", "figure", "0", "%", "0.0"] in lines
    assert ["figure", "4", "%", "4.0"] in lines


def test_a_main_score_with_a_unit_is_no_percentage(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(fakes.Quiz, "units", {"accuracy": "nats per token"})
    result = CliRunner().invoke(main, arguments(tmp_path / "r", "--pipeline", "dense"))
    assert "accuracy (nats per token)" in result.stdout
    assert "%" not in result.stdout


def test_tasks_of_one_setting_make_a_summary_whatever_chose_them():
    from sah_bench.results import setting_of

    niah = registry.benchmarks["niah"]
    assert setting_of(niah(lengths=(512,))) == setting_of(niah(lengths=(512, 1024)))
    assert setting_of(niah(lengths=(512,))) != setting_of(niah(lengths=(512,), chat=True))


def test_a_later_model_that_is_not_there_is_found_before_the_first_is_loaded(
    experiment, fakes, monkeypatch
):
    def check_model(name):
        if name == "missing":
            raise ModelNotFoundError(name, "it is only a test")

    monkeypatch.setattr(fakes.FakeAdapter, "check_model", check_model, raising=False)
    with pytest.raises(ModelNotFoundError):
        run(experiment(models=["m", "missing"]))
    assert fakes.FakeAdapter.calls == []


@pytest.mark.parametrize("pipelines", [["local(3)"], ["local(3)", "sink(4)"]])
def test_a_pipeline_that_does_not_fit_the_model_fails_before_anything_is_read_for_it(
    experiment, fakes, monkeypatch, pipelines
):
    def check_pipeline(self, pipeline):
        if "local" in pipeline.text:
            raise ArtifactError("w", "it was made from other weights")

    monkeypatch.setattr(fakes.FakeAdapter, "check_pipeline", check_pipeline, raising=False)
    results = run(experiment(pipelines=pipelines))
    assert "made from other weights" in results[0].message
    assert [result.status for result in results] == ["failed", "done"][: len(pipelines)]
    assert bool(calls(fakes, "prefill")) == (len(pipelines) > 1)
    assert {call[1] for call in calls(fakes, "answer")} <= {"sink(sink_size=4)"}


def test_only_pipelines_that_miss_samples_answer(experiment, fakes):
    run(experiment(pipelines=["dense"]))
    fakes.FakeAdapter.calls.clear()
    run(experiment())
    assert {call[1] for call in calls(fakes, "answer")} == {
        "sink(sink_size=4) | local(window_size=8)"
    }
    fakes.FakeAdapter.calls.clear()
    run(experiment())
    assert not calls(fakes, "prefill")


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"limit": 1}, True),
        ({"device": "cuda"}, True),
        ({"pipelines": [{"name": "label", "steps": "sink(4) | local(8)"}]}, True),
        ({"models": ["another name of the same weights"]}, True),
        ({"seed": 1}, False),
        ({"dtype": "bfloat16"}, False),
        ({"max_new_tokens": 3}, False),
        ({"max_context_length": 3}, False),
        ({"backend": "gather"}, False),
        ({"generation": {"do_sample": True}}, False),
        ({"benchmarks": ["quiz(contexts=3)"]}, False),
        ({"metrics": ["asked"]}, False),
        ({"benchmarks": ["quiz(contexts=2, folder='elsewhere')"]}, True),
    ],
)
def test_what_makes_another_cell(experiment, change, is_same):
    [first] = run(experiment(pipelines=[SPARSE]))
    [second] = run(experiment(**{"pipelines": [SPARSE], **change}))
    assert (first.folder == second.folder) is is_same


@pytest.mark.parametrize(
    ("what", "name", "value"),
    [
        ("Quiz", "revision", lambda self: "2"),
        ("Quiz", "protocol", Protocol(chat=False, version="2")),
        ("Quiz", "generation_for", lambda self, task: {"repetition_penalty": 2.0}),
        ("FakeAdapter", "identity", lambda self: {"weights": "v" * 8, "dtype": self.dtype}),
    ],
)
def test_what_a_plugin_says_otherwise_than_before_makes_another_cell(
    experiment, fakes, monkeypatch, what, name, value
):
    [first] = run(experiment(pipelines=[SPARSE]))
    monkeypatch.setattr(getattr(fakes, what), name, value)
    [second] = run(experiment(pipelines=[SPARSE]))
    assert first.folder != second.folder


def test_more_tasks_leave_the_results_of_the_others(experiment, fakes, monkeypatch):
    monkeypatch.setattr(fakes.FakeAdapter, "prefill", lambda *_, **__: 1 / 0)
    first = run(experiment(benchmarks=["niah(lengths=[600])"], tasks=None))
    both = run(experiment(benchmarks=["niah(lengths=[600, 700])"], tasks=None))
    assert [result.folder for result in both[:2]] == [result.folder for result in first]


def test_versions_of_plugins_are_part_of_the_cell(experiment):
    made = experiment(pipelines=[SPARSE], metrics=["density"], backend="gather")
    [plan], [pipeline] = made.benchmarks, made.pipelines
    versions = cell_identity(made, plan, "easy", pipeline, {})["plugins"]
    ours = f"sparse-attention-hub {registry.maskers.entry('sink').version}"
    for plugin in ("masker:sink", "masker:local", "metric:density", "backend:gather"):
        assert versions[plugin] == ours
    assert {"adapter:fake", "benchmark:quiz"} < versions.keys()


def test_source_of_a_plugin_file_is_part_of_the_cell(experiment, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MASKER)
    registry.load_file(path)
    try:
        made = experiment(pipelines=["mine"])
        [plan], [pipeline] = made.benchmarks, made.pipelines
        identity = cell_identity(made, plan, "easy", pipeline, {})
        digest = hashlib.sha256(MASKER.encode()).hexdigest()
        assert identity["plugins"]["masker:mine"] == f"mine.py source {digest}"
    finally:
        registry.unload_file(path)


def test_source_of_an_unpackaged_plugin_is_part_of_the_cell(experiment, monkeypatch):
    [first] = run(experiment(pipelines=[SPARSE]))
    monkeypatch.setattr("sah_bench.identity._source_hash", lambda plugin: "changed")
    [second] = run(experiment(pipelines=[SPARSE]))
    assert first.folder != second.folder


def test_new_tokens_are_those_of_each_example_unless_a_flag_replaces_them(experiment, fakes):
    run(experiment(pipelines=["dense"]))
    assert [call[3]["max_new_tokens"] for call in calls(fakes, "answer")] == [8, 9, 8, 9]
    fakes.FakeAdapter.calls.clear()
    generation = {"num_beams": 1}
    plan = experiment(pipelines=["dense"], max_new_tokens=20, generation=generation)
    run(plan)
    assert {call[3]["max_new_tokens"] for call in calls(fakes, "answer")} == {20}
    assert plan.generation == {"num_beams": 1}


def test_max_context_length_reaches_the_adapter(experiment, fakes):
    run(experiment(max_context_length=77))
    assert calls(fakes, "prefill")[0][3] == {"max_context_length": 77}


def test_a_fault_of_one_cell_is_recorded_and_does_not_stop_the_others(experiment):
    faulty, dense = run(experiment(pipelines=[FAULTY, "dense"]))
    assert (faulty.status, dense.status) == ("failed", "done")
    assert faulty.message == "RuntimeError: boom"
    recorded = json.loads((faulty.folder / "error.json").read_text())
    assert recorded["kind"] == "fault"
    assert 'raise RuntimeError("boom")' in recorded["traceback"]
    assert exit_code([faulty, dense]) == 1


def test_a_cell_that_failed_is_tried_again_on_demand(experiment, fakes):
    run(experiment(pipelines=[FAULTY]))
    fakes.FakeAdapter.calls.clear()
    [result] = run(experiment(pipelines=[FAULTY]))
    assert result.message.endswith("(earlier run; --rerun-failed tries again)")
    assert not calls(fakes, "prefill")
    [result] = run(experiment(pipelines=[FAULTY]), rerun_failed=True)
    assert result.message == "RuntimeError: boom"
    assert len(calls(fakes, "answer")) == 1


def test_examples_that_cannot_be_made_fail_their_task_only(experiment):
    results = run(experiment(tasks=["easy", "broken"]))
    assert [result.status for result in results] == ["done", "done", "failed", "failed"]
    assert results[2].message == "RuntimeError: no data"


def test_bad_input_of_a_task_is_no_fault(experiment, fakes):
    results = run(experiment(tasks=["long"]))
    assert exit_code(results) == 2
    assert all(result.message.startswith("the prompt is too long") for result in results)
    assert len(calls(fakes, "prefill")) == 1
    fakes.FakeAdapter.calls.clear()
    run(experiment(tasks=["long"]))
    assert len(calls(fakes, "prefill")) == 1


def test_a_model_that_is_not_found_ends_the_run(experiment):
    with pytest.raises(ModelNotFoundError):
        run(experiment(models=["missing"]))


def test_an_interrupt_is_no_fault_and_the_run_goes_on_later(experiment, monkeypatch, fakes):
    plan = experiment(pipelines=[INTERRUPTED])
    with pytest.raises(KeyboardInterrupt):
        run(plan)
    assert planned_cells(plan)[0].state.strip() == "begun, 2 samples"
    answer = fakes.FakeAdapter.answer

    def patient(self, prefilled, pipeline, *arguments, **options):
        return answer(self, prefilled, attrs.evolve(pipeline, steps=()), *arguments, **options)

    monkeypatch.setattr(fakes.FakeAdapter, "answer", patient)
    [result] = run(plan)
    assert result.samples == 4


def test_observers_are_told_when_a_cell_begins(experiment, monkeypatch, fakes):
    seen = []
    init = fakes.Asked.__init__

    def remember(self, **options):
        init(self, **options)
        seen.append(self)

    monkeypatch.setattr(fakes.Asked, "__init__", remember)
    run(experiment())
    assert [observer.begun for observer in seen if observer.begun] == [1, 1]


def timings(result):
    return rows(result, "timings.jsonl")


def test_seconds_come_from_answers_without_observers_to_the_first_samples(experiment, fakes):
    dense, sparse = run(experiment(timed_samples=3))
    for result in (dense, sparse):
        assert [row["decode"] for row in timings(result)] == [2.0, 2.0, 2.0, None]
        assert [row["first_token"] for row in timings(result)] == [0.5, 0.5, 0.5, None]
        assert [row["prefill"] for row in timings(result)] == [1.5] * 4
        assert (result.decode_seconds, result.timed) == (2.0, 3)
    assert [call[0] for call in calls(fakes, "answer")].count("watched answer") == 8
    assert [call[0] for call in calls(fakes, "answer")].count("answer") == 6


def test_without_metrics_every_answer_is_timed_and_given_once(experiment, fakes):
    dense, sparse = run(experiment(metrics=[], timed_samples=1))
    assert {call[0] for call in calls(fakes, "answer")} == {"answer"}
    assert len(calls(fakes, "answer")) == 8
    assert (dense.timed, sparse.timed) == (4, 4)
    assert all("same_tokens" not in row for row in timings(dense))


def test_a_sparse_prefill_is_timed_apart_from_the_one_that_is_observed(experiment, fakes):
    [result] = run(experiment(pipelines=[SPARSE_PREFILL], timed_samples=2))
    kinds = [call[0] for call in fakes.FakeAdapter.calls[1:]]
    first = ["prefill", "answer", "answer", "watched prefill", "watched answer", "watched answer"]
    assert kinds == [*first, "watched prefill", "watched answer", "watched answer"]
    assert [row["prefill"] for row in timings(result)] == [1.5, 1.5, None, None]
    assert result.prefill_seconds == 1.5


def test_what_is_seen_of_a_sparse_prefill_counts_with_the_first_question(experiment, fakes):
    [result] = run(experiment(pipelines=[SPARSE_PREFILL]))
    seen = [(row["id"], row["what"]) for row in rows(result, "records/asked.jsonl")]
    once = [("0-0", "prefill"), ("0-0", "answer"), ("0-1", "answer")]
    assert seen[:3] == once
    assert [what for _, what in seen[3:]] == [what for _, what in once]


def test_a_context_that_is_taken_up_again_observes_its_prefill_once(experiment, fakes):
    run(experiment(pipelines=[SPARSE_PREFILL], limit=1))
    fakes.FakeAdapter.calls.clear()
    [result] = run(experiment(pipelines=[SPARSE_PREFILL]))
    assert [call[0] for call in calls(fakes, "prefill")] == ["prefill", "watched prefill"]
    seen = [(row["id"], row["what"]) for row in rows(result, "records/asked.jsonl")]
    assert seen[:3] == [("0-0", "answer"), ("0-1", "prefill"), ("0-1", "answer")]
    assert [what for _, what in seen[3:]] == ["prefill", "answer", "answer"]
    assert timings(result)[0]["prefill"] == 1.5


def test_a_timed_answer_that_differs_from_the_observed_one_is_recorded(experiment):
    [result] = run(experiment(pipelines=["sink(15)"], timed_samples=1))
    assert timings(result)[0]["same_tokens"] is False
    assert "same_tokens" not in timings(result)[1]
    assert result.differing == 1
    [result] = run(experiment(pipelines=[SPARSE], timed_samples=1))
    assert timings(result)[0]["same_tokens"] is True
    assert result.differing == 0


def test_sampled_answers_have_one_seed_in_both_passes(experiment, monkeypatch, fakes):
    drawn = []
    answer = fakes.FakeAdapter.answer

    def sample(self, *arguments, **options):
        drawn.append(torch.rand(1).item())
        return answer(self, *arguments, **options)

    monkeypatch.setattr(fakes.FakeAdapter, "answer", sample)
    plan = {"pipelines": [SPARSE], "generation": {"do_sample": True}, "limit": 1}
    run(experiment(**plan, timed_samples=1))
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]


def test_how_many_samples_are_timed_changes_timings_only(experiment, tmp_path):
    for count in (0, 3):
        run(experiment(output=str(tmp_path / str(count)), timed_samples=count))
    assert kept_bytes(tmp_path / "0") == kept_bytes(tmp_path / "3")


def test_parameters_of_metrics_reach_them_and_make_another_cell(experiment):
    [few] = run(experiment(pipelines=[SPARSE_PREFILL], metrics=["asked(1)"]))
    [many] = run(experiment(pipelines=[SPARSE_PREFILL], metrics=[{"asked": {"most": 5}}]))
    assert few.folder != many.folder
    assert len(rows(few, "records/asked.jsonl")) == 4
    assert len(rows(many, "records/asked.jsonl")) == 6
    [again] = run(experiment(pipelines=[SPARSE_PREFILL], metrics=["asked(most=1)"]))
    assert again.folder == few.folder


def test_command_says_how_many_answers_the_seconds_are_of(fakes, tmp_path):
    options = ["--pipeline", "dense", "--pipeline", "sink(15)", "--timed-samples", "3"]
    result = CliRunner().invoke(main, arguments(tmp_path / "r", *options))
    assert "seconds are of the first 3 questions, answered without observers" in " ".join(
        result.stdout.split()
    )
    assert "sink(15): 3 of 3 timed answers differ" in result.stdout


def test_progress_expects_what_is_missing_and_counts_it(experiment):
    recorder = Recorder()
    run(experiment(pipelines=["dense"], limit=1))
    run_experiment(experiment(tasks=["easy"]), recorder)
    assert recorder.expected == [7]
    assert recorder.advanced == 7


def test_plan_says_what_is_done_without_loading_a_model(experiment, fakes):
    assert [cell.state.strip() for cell in planned_cells(experiment())] == ["new", "new"]
    run(experiment(pipelines=["dense"]))
    fakes.FakeAdapter.calls.clear()
    cells = planned_cells(experiment())
    assert [cell.state.strip() for cell in cells] == ["done, 4 samples", "new"]
    assert [cell.is_done for cell in cells] == [True, False]
    assert not fakes.FakeAdapter.calls


def arguments(output, *more, task="easy"):
    fixed = f"run --adapter fake --model m --benchmark quiz(contexts=4) --task {task}"
    return [*fixed.split(), "--metric", "asked", "--output", str(output), *more]


def test_command_ends_in_a_table_that_cuts_no_text(fakes, tmp_path):
    long = "sink(1) | sink(2) | sink(3) | sink(4) | sink(5) | sink(6) | sink(7) | sink(8) | sink(9)"
    layers = "sink(1) @ dense_layers=[0,1]"
    options = ["--pipeline", "dense", "--pipeline", long, "--pipeline", layers]
    result = CliRunner().invoke(main, arguments(tmp_path / "r", *options))
    assert result.exit_code == 0
    text = result.stdout
    assert "m, quiz easy" in text
    for word in ("accuracy %", "prefill s", "decode s", "100.0", layers, str(tmp_path / "r")):
        assert word in text
    cells = "".join(line[:60].strip() for line in text.splitlines())
    assert long.replace(" ", "") in cells.replace(" ", "")
    assert max(len(line) for line in text.splitlines() if "─" in line) <= 120
    assert "[24/24 samples" in result.stderr


def test_command_exits_with_2_and_one_line_for_bad_input(fakes, tmp_path):
    options = ["--pipeline", "dense", "--pipeline", "sink(1)", "--no-progress"]
    result = CliRunner().invoke(main, arguments(tmp_path / "r", *options, task="long"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the prompt is too long: 9000 tokens")
    assert result.stderr.count("\n") == 1


def test_command_exits_with_1_and_names_the_traceback(fakes, tmp_path):
    options = ["--pipeline", FAULTY, "--no-progress"]
    result = CliRunner().invoke(main, arguments(tmp_path / "r", *options))
    assert result.exit_code == 1
    assert "RuntimeError: boom (traceback: " in result.stdout
    assert "error.json" in result.stdout
    assert "Traceback" not in result.output


def test_dry_run_writes_nothing(fakes, tmp_path):
    options = ["--pipeline", "dense", "--dry-run"]
    result = CliRunner().invoke(main, arguments(tmp_path / "r", *options))
    assert result.exit_code == 0
    assert result.stdout.startswith("new ")
    assert not (tmp_path / "r").exists()


@pytest.mark.integration
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(command, tmp_path):
    options = ["--pipeline", "dense", "--pipeline", SPARSE, "--pipeline", SPARSE_PREFILL]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = command(*arguments(whole, *options))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr

    for kept in (3, 9):
        process = command(*arguments(killed, *options), FAKE_SECONDS="0.05")
        deadline = time.monotonic() + 60
        while count(killed) < kept and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert kept <= count(killed) < 24
        assert not list(killed.rglob("metrics.json"))
    # The worst that a kill can leave: half a line in the file that counts.
    torn = next(iter(killed.rglob("samples.jsonl")))
    with torn.open("ab") as file:
        file.write(b'{"id": "3-1", "context_id": "3", "quest')

    process = command(*arguments(killed, *options))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "/24 samples" not in stderr
    assert len(kept_bytes(whole)) == 12
    assert kept_bytes(killed) == kept_bytes(whole)
    timings = [path.read_text().splitlines() for path in killed.rglob("timings.jsonl")]
    assert [len(lines) for lines in timings] == [8, 8, 8]


def count(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("samples.jsonl"))


def test_texts_are_predicted_in_place_of_answers(fakes, experiment):
    results = run(experiment(tasks=["prose"], benchmarks=["quiz(contexts=1)"], timed_samples=1))
    asked = calls(fakes, "loglikelihood")
    assert calls(fakes, "answer") == []
    # at once for the first text of the task, which is also timed, token by token for the second
    for is_dense in (True, False):
        steps = [call[2:] for call in asked if (call[1] == "dense") == is_dense]
        assert steps == [((0,), None), ((0,), None), ((1,), 1)]
    dense, sparse = results
    assert dense.metrics["scores"] == {"accuracy": 50.0, "loss": 2.0}
    assert sparse.metrics["scores"] == {"accuracy": 50.0, "loss": 4.0}
    assert dense.decode_seconds == 2.0
    row = json.loads((dense.folder / "samples.jsonl").read_text().splitlines()[0])
    assert (row["prediction"], row["losses"], row["finished"]) == ("", [1.0, 3.0], "predicted")
