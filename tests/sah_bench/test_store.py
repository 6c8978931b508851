"""The folders of results: identity, resuming, repair."""

import json

import attrs
import pytest

from sah_bench.json_files import write_json
from sah_bench.store import Cell, Sample, canonical, content_id, find_folder, slug
from sah_core.errors import OutputFolderError

pytestmark = pytest.mark.unit

IDENTITY = {"pipeline": "dense", "seed": 0}
ABOUT = {"model": "org/Model", "benchmark": "quiz", "task": "easy", "pipeline": "sink(sink_size=4)"}
HERE = {"device": "cpu", "torch": "1", "limit": None}


def sample(name, score=100.0):
    return Sample(
        id=name,
        record={"prediction": f"{name}\u2028é\n", "scores": {"accuracy": score}},
        micro={"metrics": {}},
        timing={"prefill": 1.0, "decode": 2.0},
    )


@pytest.fixture
def start(tmp_path):
    cells = []

    def start(identity=IDENTITY, environment=HERE, about=ABOUT):
        for cell in cells:
            cell.close()
        cells.append(Cell.open(tmp_path, identity, about, environment))
        return cells[-1]

    yield start
    for cell in cells:
        cell.close()


def test_id_depends_on_content_and_not_on_order():
    assert content_id({"a": 1, "b": [2]}) == content_id({"b": [2], "a": 1})
    assert content_id({"a": 1}) != content_id({"a": 2})
    assert content_id({"a": 1}) != content_id({"a": 1.0})
    assert canonical({"b": 1, "a": "é"}) == '{"a":"\\u00e9","b":1}'


def test_nan_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_id({"a": float("nan")})


def test_folder_name_is_readable_and_ends_in_the_id(start, tmp_path):
    cell = start()
    assert cell.folder.relative_to(tmp_path).as_posix() == (
        f"org-model/quiz-easy/sink-sink-size-4-{content_id(IDENTITY)[:12]}"
    )


@pytest.mark.parametrize(("text", "expected"), [("..", "x"), ("A/b C", "a-b-c"), ("é" * 3, "x")])
def test_slugs_are_safe_file_names(text, expected):
    assert slug(text) == expected
    assert len(slug("a" * 500)) <= 80


def test_a_cell_is_found_under_another_readable_name(start):
    first = start()
    assert start(about={**ABOUT, "model": "alias"}).folder == first.folder


def test_samples_are_on_the_disk_after_each_append(start):
    cell = start()
    cell.append(sample("a"))
    text = (cell.folder / "samples.jsonl").read_text(encoding="utf-8")
    assert json.loads(text)["prediction"] == "a\u2028é\n"
    assert text.endswith("\n")
    for name in ("micro_metrics.jsonl", "timings.jsonl"):
        assert json.loads((cell.folder / name).read_text())["id"] == "a"


def test_a_sample_with_nan_is_refused_and_leaves_nothing(start):
    cell = start()
    with pytest.raises(ValueError, match="not JSON compliant"):
        cell.append(sample("a", float("nan")))
    assert sorted(path.name for path in cell.folder.iterdir()) == [".lock", "config.json"]


def test_metrics_mean_done_and_new_samples_take_that_back(start):
    cell = start()
    cell.append(sample("a"))
    assert not cell.is_done(limit=1)
    cell.finish({"complete": False})
    assert cell.is_done(limit=1)
    assert not cell.is_done(limit=2)
    assert not cell.is_done(limit=None)
    cell.append(sample("b"))
    assert not (cell.folder / "metrics.json").exists()
    cell.finish({"complete": True})
    assert cell.is_done(limit=None)


def test_reopened_cell_knows_its_samples(start):
    cell = start()
    cell.append(sample("a"))
    cell.append(sample("b"))
    again = start()
    assert again.ids == {"a", "b"}
    assert [row["id"] for row in again.timings] == ["a", "b"]


@pytest.mark.parametrize("torn", [b'{"id": "c", "pre', b"\x00\x00\n", b"[]\n", b'{"no": 1}\n'])
def test_torn_end_of_samples_is_cut_off(start, torn):
    cell = start()
    cell.append(sample("a"))
    path = cell.folder / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert start().ids == {"a"}
    assert path.read_bytes() == whole


def test_a_line_that_lacks_its_end_alone_is_torn(start):
    cell = start()
    cell.append(sample("a"))
    cell.append(sample("b"))
    path = cell.folder / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    again = start()
    assert again.ids == {"a"}
    again.append(sample("b"))
    assert path.read_bytes() == whole


def test_lines_of_a_sample_that_was_not_kept_are_cut_off(start):
    cell = start()
    cell.append(sample("a"))
    kept = {path.name: path.read_bytes() for path in cell.folder.glob("*.jsonl")}
    cell.append(sample("b"))
    (cell.folder / "samples.jsonl").write_bytes(kept["samples.jsonl"])
    assert start().ids == {"a"}
    assert {path.name: path.read_bytes() for path in cell.folder.glob("*.jsonl")} == kept


def test_a_sample_without_its_micro_metrics_is_made_again(start):
    cell = start()
    cell.append(sample("a"))
    (cell.folder / "micro_metrics.jsonl").unlink()
    assert start().ids == set()


def observed(name, *numbers, metric="output-error"):
    rows = [{"layer": number, "value": number / 7} for number in numbers]
    return attrs.evolve(sample(name), observed={metric: rows})


def test_single_observations_have_a_file_per_metric(start):
    cell = start()
    cell.append(observed("a", 1, 2))
    cell.append(observed("b"))
    cell.append(observed("c", 3, metric="other:recall"))
    lines = (cell.folder / "records" / "output-error.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": "a", "layer": 1, "value": 1 / 7},
        {"id": "a", "layer": 2, "value": 2 / 7},
    ]
    assert cell.records_path("other:recall").read_text().startswith('{"id": "c"')


@pytest.mark.parametrize("torn", [b"", b'{"id": "b", "lay', b'{"id": "b", "layer": 3}\n'])
def test_observations_of_samples_that_were_not_kept_are_cut_off(start, torn):
    cell = start()
    cell.append(observed("a", 1, 2))
    kept = {path: path.read_bytes() for path in cell.folder.rglob("*.jsonl")}
    cell.append(observed("b", 3))
    (cell.folder / "samples.jsonl").write_bytes(kept[cell.folder / "samples.jsonl"])
    with cell.records_path("output-error").open("ab") as file:
        file.write(torn)
    assert start().ids == {"a"}
    assert {path: path.read_bytes() for path in cell.folder.rglob("*.jsonl")} == kept


def test_a_sample_without_its_observations_is_made_again(start):
    cell = start()
    cell.append(observed("a", 1))
    kept = {path: path.read_bytes() for path in cell.folder.rglob("*.jsonl")}
    cell.append(observed("b", 3))
    path = cell.records_path("output-error")
    path.write_bytes(path.read_bytes()[:-4])
    assert start().ids == {"a"}
    assert {path: path.read_bytes() for path in cell.folder.rglob("*.jsonl")} == kept


def test_a_file_of_observations_without_samples_is_emptied(start):
    cell = start()
    path = cell.records_path("output-error")
    path.parent.mkdir()
    path.write_text("{}\n")
    assert start().ids == set()
    assert path.read_bytes() == b""


def test_an_error_stays_until_the_cell_is_done(start):
    cell = start()
    cell.fail({"kind": "fault", "message": "boom"})
    assert start().error == {"kind": "fault", "message": "boom"}
    start().finish({"complete": True})
    assert cell.error is None


def test_going_on_elsewhere_is_recorded_and_noted(start):
    start().append(sample("a"))
    assert start().notes == []
    assert start(environment={**HERE, "limit": 3}).notes == []
    cell = start(environment={**HERE, "torch": "2"})
    assert cell.notes == ["goes on elsewhere than it began: torch was 1, is 2"]
    config = json.loads((cell.folder / "config.json").read_text())
    assert [one["torch"] for one in config["environments"]] == ["1", "1", "2"]


def test_a_cell_without_samples_did_not_begin_anywhere(start):
    start()
    assert start(environment={**HERE, "torch": "2"}).notes == []


def test_config_says_what_the_cell_is(start):
    config = json.loads((start().folder / "config.json").read_text())
    assert config["id"] == content_id(IDENTITY)
    assert config["identity"] == IDENTITY
    assert config["model"] == "org/Model"


def test_two_runs_do_not_write_to_one_cell(start, tmp_path):
    start()
    with pytest.raises(OutputFolderError, match="another run is writing to it"):
        Cell.open(tmp_path, IDENTITY, ABOUT, HERE)


def test_a_folder_that_holds_another_cell_is_refused(start):
    cell = start()
    path = cell.folder / "config.json"
    path.write_text(json.dumps({"id": "0" * 64}))
    with pytest.raises(OutputFolderError, match="it holds the cell 000"):
        start()


def test_json_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("inf")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_no_folder_is_found_where_there_is_none(tmp_path):
    assert find_folder(tmp_path / "absent", "0" * 64) is None


def test_samples_are_put_into_the_order_of_the_task_with_all_their_lines(start):
    cell = start()
    for sample_id in ("c", "a", "d", "b"):
        cell.append(sample(sample_id))
    cell.arrange(["a", "b", "c"])
    cell.close()
    for name in ("samples.jsonl", "micro_metrics.jsonl", "timings.jsonl"):
        lines = (cell.folder / name).read_bytes().splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["a", "b", "c", "d"]
    again = start()
    for kept in (again.records, again.micro, again.timings):
        assert [row["id"] for row in kept] == ["a", "b", "c", "d"]


def test_single_observations_are_put_in_order_with_their_samples(start):
    cell = start()
    for sample_id in ("c", "a", "b"):
        rows = [] if sample_id == "a" else [{"n": sample_id}, {"n": 2}]
        cell.append(attrs.evolve(sample(sample_id), observed={"seen": rows}))
    cell.arrange(["a", "b", "c"])
    lines = cell.records_path("seen").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["b", "b", "c", "c"]
    assert [row["id"] for row in start().records] == ["a", "b", "c"]


def test_a_kill_while_samples_are_put_in_order_loses_nothing(start, monkeypatch):
    cell = start()
    for sample_id in ("c", "a", "b"):
        cell.append(sample(sample_id))
    with monkeypatch.context() as patch:
        patch.setattr(Cell, "_match", lambda self: None)  # killed after the first file
        cell.arrange(["a", "b", "c"])
    cell.close()
    again = start()
    for kept in (again.records, again.micro, again.timings):
        assert [row["id"] for row in kept] == ["a", "b", "c"]
