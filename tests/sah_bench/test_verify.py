"""The golden runner and `sah-bench verify maskers`."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from sah_bench.cli import main
from sah_core import registry
from sah_core.errors import RequestError, UnknownPluginError
from sah_core.testing.golden import run_maskers

pytestmark = pytest.mark.unit


def case_tensors(rows=3, keys=8):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, rows, 4, generator=generator)
    key = torch.randn(1, 1, keys, 4, generator=generator)
    value = torch.randn(1, 1, keys, 4, generator=generator)
    position = torch.arange(keys - rows, keys).view(-1, 1)
    keep = torch.arange(keys) <= position
    return query, key, value, keep.view(1, 1, rows, keys)


def attention(query, key, value, probability, scaling):
    """The weighted attention of every row, from the definition."""
    _, heads, rows, _ = query.shape
    output = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(heads):
        for row in range(rows):
            logits = key[0, 0].double() @ query[0, head, row].double() * scaling
            chance = probability[0, head, row].double()
            weights = torch.where(chance > 0, logits.exp() / chance.clamp(min=1e-30), 0.0)
            if weights.sum() > 0:
                output[0, head, row] = weights @ value[0, 0].double() / weights.sum()
    return output.float()


@pytest.fixture
def write(tmp_path):
    def write(name="a", masker="sink", params=None, given=None, change=None, metadata=()):
        query, key, value, keep = case_tensors()
        probability = torch.zeros(1, 2, 3, 8)
        probability[..., :2] = 1.0
        if given is not None:
            probability = given * keep
        tensors = {"query": query, "key": key, "value": value, "keep": keep}
        tensors["probability"] = probability
        tensors["output"] = attention(query, key, value, probability * keep, 0.5)
        if given is not None:
            tensors["given"] = given
        if change is not None:
            change(tensors)
        steps = [{"masker": masker, "params": {"sink_size": 2} if params is None else params}]
        facts = {"pipeline": json.dumps(steps), "scaling": "0.5", "layer_idx": "1", "case": name}
        facts.update(metadata)
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, facts)
        return path

    return write


def run(path, *backends):
    [result] = run_maskers([path], backends or ["eager"])
    return result


@pytest.mark.parametrize("backend", ["eager", "gather"])
def test_a_selection_and_output_that_agree_pass(write, backend):
    assert run(write(), backend).status == "passed"


@pytest.mark.parametrize("backend", ["eager", "gather"])
def test_given_is_a_literal_mask(write, backend):
    given = torch.rand(1, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    given[given < 0.5] = 0.0
    given[0, 0, 1] = 0.0
    assert run(write(masker="given", params={}, given=given), backend).status == "passed"


def test_a_key_too_many_fails(write):
    result = run(write(params={"sink_size": 3}))
    assert result.status == "failed"
    assert result.reason == (
        "selection: 6 keys too many, 0 missing in 6 rows, first at sequence 0, head 0, row 0"
    )


def test_another_probability_fails(write):
    def halve(tensors):
        tensors["probability"] = tensors["probability"] / 2

    result = run(write(change=halve))
    assert result.status == "failed"
    assert result.reason.startswith("probability: off by up to 0.5")


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_another_output_fails(write, wrong):
    def shift(tensors):
        tensors["output"][0, 1, 2, 0] += wrong

    result = run(write(change=shift))
    assert result.status == "failed"
    assert result.reason.endswith("first at sequence 0, head 1, row 2")


def test_a_parameter_that_a_masker_lacks_fails(write):
    result = run(write(params={"sink_size": 2, "depth": 3}))
    assert result.status == "failed"
    assert "no parameter named 'depth'" in result.reason


def test_a_default_of_the_format_need_not_be_declared(write):
    assert run(write(params={"sink_size": 2, "label_bits": 16})).status == "passed"


def test_a_masker_that_is_not_installed_is_skipped(write):
    result = run(write(masker="best_of_all", params={}))
    assert result.status == "skipped"
    assert result.reason == "masker best-of-all is not installed"


def test_a_backend_that_refuses_is_skipped_with_its_reason(write):
    result = run(write(), "sdpa")
    assert result.status == "skipped"
    assert result.reason == "backend sdpa refuses: only dense attention"


def test_an_unknown_backend_is_an_error(write):
    with pytest.raises(UnknownPluginError, match="did you mean 'eager'"):
        run(write(), "eagr")


def test_a_folder_stands_for_its_files_in_order(write, tmp_path):
    write("b")
    write("a")
    assert [result.case for result in run_maskers([tmp_path], ["eager"])] == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"no safetensors"])
def test_what_is_no_case_has_failed_and_the_others_still_run(write, tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    write("b")
    bad, good = run_maskers([tmp_path], ["eager"])
    assert (bad.case, bad.backend, bad.status) == ("a", "-", "failed")
    assert "is no golden case" in bad.reason
    assert (good.case, good.status) == ("b", "passed")


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(RequestError, match="there is no such file"):
        list(run_maskers([tmp_path / "x.safetensors"]))


def test_a_device_that_is_not_there_is_an_error(write):
    with pytest.raises(RequestError, match="device 'warp' cannot be used"):
        list(run_maskers([write()], ["eager"], device="warp"))


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(RequestError, match="holds no .safetensors file"):
        list(run_maskers([tmp_path]))


def test_a_file_that_lacks_a_tensor_is_no_case(write):
    result = run(write(change=lambda tensors: tensors.pop("output")))
    assert result.status == "failed"
    assert "it lacks output" in result.reason


NOT_CASES = {
    "no masker": ({"pipeline": "[]"}, "its pipeline is '[]', no list of maskers"),
    "text": ({"pipeline": "sink(2)"}, "its pipeline is no JSON"),
    "number": ({"pipeline": '[{"masker": 3}]'}, 'the step {"masker": 3}, without a masker'),
    "list": (
        {"pipeline": '[{"masker": "sink", "params": [1]}]'},
        "without a masker and its params",
    ),
    "given": ({"pipeline": '[{"masker": "given"}]'}, "it lacks given"),
    "scaling": ({"scaling": "wide"}, "its scaling is 'wide', no number >= 0"),
    "layer": ({"layer_idx": "-1"}, "its layer_idx is '-1', no number >= 0"),
}


@pytest.mark.parametrize(("change", "reason"), NOT_CASES.values(), ids=NOT_CASES)
def test_metadata_that_says_nothing_is_no_case(write, change, reason):
    """And the cases after it still run."""
    write("b")
    path = write("a", metadata=change)
    bad, good = run_maskers([path.parent], ["eager"])
    assert (bad.case, bad.status, good.status) == ("a", "failed", "passed")
    assert reason in bad.reason


def test_metadata_without_a_pipeline_is_no_case(tmp_path):
    save_file({"query": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert "its metadata lacks pipeline and scaling" in run(tmp_path).reason


SHAPES = {
    "query": (lambda t: t.long(), "query is torch.int64 (1, 2, 3, 4), expected float of 4"),
    "key": (lambda t: t[..., :3], "key is of shape (1, 1, 8, 3), which does not fit"),
    "value": (lambda t: t[:, :, :7], "value is of shape (1, 1, 7, 4), which does not fit"),
    "keep": (lambda t: t.float(), "keep is torch.float32 (1, 1, 3, 8), expected bool"),
    "probability": (lambda t: t[:, :1], "probability is of shape (1, 1, 3, 8), which does not"),
    "output": (lambda t: t[:, :, :0], "output is torch.float32 (1, 2, 0, 4), expected float"),
}


@pytest.mark.parametrize(("name", "change", "reason"), [(n, *s) for n, s in SHAPES.items()])
def test_tensors_that_do_not_fit_together_are_no_case(write, name, change, reason):
    """What would broadcast could pass by chance."""
    result = run(write(change=lambda tensors: tensors.update({name: change(tensors[name])})))
    assert result.status == "failed"
    assert f"is no golden case: {reason}" in result.reason


def test_heads_that_are_no_multiple_are_no_case(write):
    def third(tensors):
        tensors["key"] = tensors["key"].expand(-1, 3, -1, -1)

    assert "2 query heads on 3 KV heads" in run(write(change=third)).reason


def test_a_literal_mask_may_be_one_step_of_several(write):
    given = torch.zeros(1, 2, 3, 8)
    given[..., 3] = 0.25
    given[0, 1, 2] = 0.0
    united = given.clone()
    united[..., :2] = 1.0
    steps = [{"masker": "given"}, {"masker": "sink", "params": {"sink_size": 2}}]

    def both(tensors):
        tensors["probability"] = united * tensors["keep"]
        tensors["output"] = attention(
            *(tensors[name] for name in ("query", "key", "value", "probability")), 0.5
        )

    path = write(given=given, change=both, metadata={"pipeline": json.dumps(steps)})
    assert run(path).status == "passed"


def test_results_as_json(write, tmp_path):
    write("bad", params={"sink_size": 3})
    write("good")
    command = ["verify", "maskers", str(tmp_path), "--backend", "eager", "--json"]
    result = CliRunner().invoke(main, command)
    bad, good = json.loads(result.output)
    assert result.exit_code == 1
    assert bad["reason"].startswith("selection: 6 keys too many")
    assert good == {
        "path": str(tmp_path / "good.safetensors"),
        "case": "good",
        "backend": "eager",
        "status": "passed",
        "reason": "",
    }
    command[2] = good["path"]
    assert CliRunner().invoke(main, command).exit_code == 0


def test_the_command_prints_a_line_each_and_totals(write, tmp_path):
    write("good")
    write("unknown", masker="nothing", params={})
    result = CliRunner().invoke(main, ["verify", "maskers", str(tmp_path), "--backend", "eager"])
    assert result.exit_code == 0
    assert result.output == (
        "passed   good  eager\n"
        "skipped  unknown  eager  masker nothing is not installed\n"
        "1 passed, 0 failed, 1 skipped\n"
    )


def test_the_command_exits_with_1_if_any_failed(write, tmp_path):
    write("bad", params={"sink_size": 3})
    result = CliRunner().invoke(main, ["verify", "maskers", str(tmp_path)])
    assert result.exit_code == 1
    assert "0 passed" in result.output


class TestMetrics:
    @pytest.fixture
    def case_file(self, tmp_path):
        def write(name="a", metric="longbench_qa_f1", **case):
            full = {"id": "1", "prediction": "x", "references": ["x"], "expected": 1.0, **case}
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps({"metric": metric, "tolerance": 1e-6, "public": [full]}))
            return path

        return write

    def run(self, *arguments):
        return CliRunner().invoke(main, ["verify", "metrics", *map(str, arguments)])

    def test_a_line_per_file_and_totals(self, case_file, tmp_path):
        case_file("good")
        case_file("unknown", metric="best_of_all")
        (tmp_path / "other.json").write_text("[1]")
        result = self.run(tmp_path)
        assert result.exit_code == 0
        assert result.output == (
            "passed   good.json  1 of 1 cases\n"
            "skipped  unknown.json  0 of 1 cases, 1 skipped: metric best_of_all is not installed\n"
            "files: 1 passed, 0 failed, 1 skipped. cases: 1 passed, 1 skipped.\n"
        )

    def test_results_as_json(self, case_file):
        path = case_file(expected=0.5)
        result = self.run(path, "--json")
        assert result.exit_code == 1
        [found] = json.loads(result.output)
        assert (found["path"], found["status"], found["failed"]) == (str(path), "failed", 1)

    def test_a_difference_fails_and_is_shown_when_asked(self, case_file):
        path = case_file(expected=0.5)
        assert self.run(path).exit_code == 1
        assert "expected 0.5" not in self.run(path).output
        assert "1: expected 0.5, got 1.0 for 'x'" in self.run("-v", path).output

    def test_what_a_metric_raises_fails_the_case(self, case_file):
        assert "raised AttributeError" in self.run("-v", case_file(prediction=3)).output

    def test_a_listed_difference_passes_with_its_reason(self, case_file):
        text = " ".join(f"w{i}" for i in range(1200))
        path = case_file(metric="longbench_rouge", prediction=text, references=[text], expected=0.0)
        result = self.run(path)
        assert result.exit_code == 0
        assert "1 differ for a listed reason: the official ROUGE hits" in result.output
        worse = case_file(
            metric="longbench_rouge", prediction=text, references=[text], expected=0.5
        )
        assert self.run(worse).exit_code == 1

    def test_a_score_of_many_answers_may_differ_for_the_listed_reason_too(self, case_file):
        text = " ".join(f"w{i}" for i in range(1200))
        many = {"prediction": [text, "a"], "references": [[text], ["a"]]}
        for metric, more in (
            ("longbench_scorer", {}),
            ("longbench_e_scorer", {"lengths": [1, 2], "bucket": "0-4k"}),
        ):
            kwargs = {"dataset": "gov_report", "all_classes": None, **more}
            path = case_file(metric=metric, kwargs=kwargs, expected=50.0, **many)
            assert "1 differ for a listed reason" in self.run(path).output
            assert self.run(path).exit_code == 0
            path = case_file(metric=metric, kwargs=kwargs, expected=40.0, **many)
            assert self.run(path).exit_code == 1

    def test_a_missing_library_skips_with_the_command(self, case_file, monkeypatch):
        monkeypatch.setitem(sys.modules, "jieba", None)
        path = case_file(metric="longbench_qa_f1_zh", prediction="北京", references=["北京"])
        result = self.run(path)
        assert result.exit_code == 0
        assert "needs the package jieba: pip install" in result.output

    @pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"metric": "x"}'])
    def test_what_is_no_golden_file_is_one_line(self, tmp_path, content):
        path = tmp_path / "x.json"
        if content is not None:
            path.write_text(content)
        result = self.run(path)
        assert result.exit_code == 2
        assert "is no golden metric file" in result.output
        assert "holds no golden metric file" in self.run(tmp_path).output

    def test_a_file_that_a_broken_benchmark_may_know_says_so(self, case_file, tmp_path):
        path = tmp_path / "samples.json"
        path.write_text('{"hidden": []}')
        case_file("good")
        registry.benchmarks.register("bad", object())
        try:
            alone, folder = self.run(path), self.run(tmp_path)
        finally:
            registry.benchmarks.unregister("bad")
        assert alone.exit_code == 2
        assert "benchmark 'bad' of distribution 'local'" in alone.output
        assert "skipped  samples.json  0 of 0 cases: benchmark 'bad'" in folder.output
        assert folder.exit_code == 0

    def test_a_case_without_an_expected_number_is_skipped(self, case_file):
        result = self.run(case_file(expected=None))
        assert result.exit_code == 0
        assert "1 skipped: None is expected, which is no score" in result.output
