"""Rows of a small invented data set, from local files of every kind and from a stand-in hub."""

import csv
import json
import tracemalloc
import zipfile
from typing import ClassVar

import attrs
import pyarrow
import pyarrow.parquet
import pytest

from sah_core.benchmark import DataSource, Example, Protocol, TaskInfo
from sah_core.errors import DataError, ParameterError
from sah_plugins.data import hub
from sah_plugins.data.benchmark import TableBenchmark, texts
from sah_plugins.data.table import LOCK

pytestmark = pytest.mark.unit

ROWS = [
    {"_id": f"r{i}", "context": f'text "{i}",\nand more', "answers": [f"a{i}", "b"], "extra": None}
    for i in range(5)
]
COLUMNS = ("_id", "context", "answers")


@attrs.frozen(kw_only=True, slots=False)
class Quiz(TableBenchmark):
    """Invented."""

    name: ClassVar[str] = "quiz"
    main_score: ClassVar[str] = "accuracy"
    protocol: ClassVar[Protocol] = Protocol(chat=False)

    def tasks(self):
        return ("easy", "hard")

    def info(self, task):
        source = DataSource(
            hub="someone/quiz",
            config=task,
            split="test",
            columns=COLUMNS,
            nested=("answers",),
        )
        return TaskInfo(metric="quiz", max_new_tokens=4, examples=5, source=source)

    def row_examples(self, task, index, row):
        yield Example(
            id=row["_id"],
            context_id=row["_id"],
            context=row["context"],
            question="?",
            references=texts(row["answers"]),
            max_new_tokens=4,
            task=task,
        )


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows({**row, "answers": json.dumps(row["answers"])} for row in rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        path.write_text(json.dumps(rows, indent=1))
    return path


def load(folder, task="easy"):
    return list(Quiz(data_dir=str(folder)).examples(task, None, 0))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
@pytest.mark.parametrize(
    "name", ["easy", "easy/test", "quiz/easy", "quiz/easy/test-00000-of-00001", "data/easy"]
)
def test_rows_are_the_same_whatever_holds_them(tmp_path, suffix, name):
    write(tmp_path / f"{name}.{suffix}")
    examples = load(tmp_path)
    assert [example.context for example in examples] == [row["context"] for row in ROWS]
    assert [list(example.references) for example in examples] == [row["answers"] for row in ROWS]
    quiz = Quiz(data_dir=str(tmp_path))
    assert quiz.count("easy") == 5
    picked = quiz.examples_at("easy", None, 0, [1, 4])
    assert [example.id for example in picked] == ["r1", "r4"]


def test_shards_are_read_in_order(tmp_path):
    write(tmp_path / "easy" / "test-00001-of-00002.jsonl", ROWS[3:])
    write(tmp_path / "easy" / "test-00000-of-00002.jsonl", ROWS[:3])
    assert [example.id for example in load(tmp_path)] == ["r0", "r1", "r2", "r3", "r4"]
    assert Quiz(data_dir=str(tmp_path)).count("easy") == 5


def test_json_that_does_not_fit_a_chunk_and_objects_without_a_list_are_read(tmp_path):
    long = [{**row, "context": "x" * 700_000} for row in ROWS]
    write(tmp_path / "easy.json", long)
    assert len(load(tmp_path)) == 5
    (tmp_path / "hard.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert len(load(tmp_path, "hard")) == 5


def test_rows_are_read_one_at_a_time(tmp_path):
    write(tmp_path / "easy.jsonl")
    with (tmp_path / "easy.jsonl").open("a") as file:
        file.write("not JSON")
    examples = Quiz(data_dir=str(tmp_path)).examples("easy", None, 0)
    assert next(examples).id == "r0"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_memory_stays_flat_over_a_large_file(tmp_path, suffix):
    rows = [{**ROWS[0], "_id": str(number), "context": "word " * 20_000} for number in range(200)]
    write(tmp_path / f"easy.{suffix}", rows)
    del rows
    examples = Quiz(data_dir=str(tmp_path)).examples("easy", None, 0)
    next(examples)
    tracemalloc.start()
    assert sum(1 for _ in examples) == 199
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / f"easy.{suffix}").stat().st_size > 18e6
    assert peak < 8e6


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
def test_a_missing_column_is_named_with_what_was_expected(tmp_path, suffix):
    path = write(tmp_path / f"easy.{suffix}", [{"_id": "1", "answers": []}])
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"quiz easy: {path}: row 0 has no column 'context': expected rows with the columns "
        "_id, context, answers; it has ['_id', 'answers']"
    )


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_an_empty_file_is_an_error(tmp_path, suffix):
    path = tmp_path / f"easy.{suffix}"
    path.write_text("[]" if suffix == "json" else "")
    with pytest.raises(DataError, match=r"easy\..*: it holds no rows: expected rows with"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_a_file_that_is_not_what_its_suffix_says_is_an_error(tmp_path, suffix):
    (tmp_path / f"easy.{suffix}").write_text("{x")
    with pytest.raises(DataError, match="cannot be read as"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["3", "[3]"])
def test_a_row_that_is_no_mapping_is_an_error(tmp_path, text):
    (tmp_path / "easy.json").write_text(text)
    with pytest.raises(DataError, match="item 0 is no mapping"):
        load(tmp_path)


def test_a_folder_without_the_file_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert "looked for easy/test.*, easy.*" in str(caught.value)
    assert "as .parquet, .jsonl, .json, .csv there and in quiz/" in str(caught.value)
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_an_unknown_task_gets_a_suggestion(tmp_path):
    with pytest.raises(ParameterError, match="did you mean 'easy'"):
        load(tmp_path, "eazy")


def test_the_content_and_not_the_place_is_the_revision(tmp_path):
    write(tmp_path / "a" / "easy.jsonl")
    write(tmp_path / "b" / "quiz" / "easy.jsonl")
    write(tmp_path / "c" / "easy.jsonl", ROWS[:4])
    a, b, c = (
        Quiz(data_dir=str(tmp_path / name)).for_task("easy").revision() for name in ("a", "b", "c")
    )
    assert a == b
    assert a.startswith("sha256:")
    assert a != c


def test_without_hub_and_folder_the_error_says_what_to_do():
    with pytest.raises(DataError) as caught:
        Quiz().for_task("easy").revision()
    assert str(caught.value).startswith(
        "quiz easy: hub data set someone/quiz: offline mode is on (HF_HUB_OFFLINE) and the cache "
        "does not have it: put the rows into a folder and name it with --data-dir"
    )


class TestHub:
    @pytest.fixture
    def online(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(hub, "commit_of", lambda source, owner: "c0ffee")
        data = datasets.Dataset.from_list(ROWS)
        monkeypatch.setattr(hub, "load", lambda source, commit, owner: data)

    def test_rows_come_from_the_hub(self, online):
        assert [example.id for example in Quiz().examples("easy", None, 0)] == [
            row["_id"] for row in ROWS
        ]
        assert Quiz().count("easy") == 5
        assert [e.id for e in Quiz().examples_at("easy", None, 0, [2, 3])] == ["r2", "r3"]
        assert Quiz().for_task("easy").revision() == "someone/quiz@c0ffee"

    def test_fetched_rows_are_the_same_data_as_on_the_hub(self, online, tmp_path):
        path = Quiz().fetch_data("easy", tmp_path)
        assert path == tmp_path / "quiz" / "easy" / "test.parquet"
        local = Quiz(data_dir=str(tmp_path))
        assert list(local.examples("easy", None, 0)) == list(Quiz().examples("easy", None, 0))
        assert local.for_task("easy").revision() == "someone/quiz@c0ffee"
        noted = json.loads((tmp_path / "quiz" / LOCK).read_text())["files"]["easy/test.parquet"]
        assert (noted["rows"], noted["revision"]) == (5, "c0ffee")
        write(path, ROWS[:2])
        assert local.for_task("easy").revision().startswith("sha256:")

    def test_a_commit_that_the_user_pins_counts_before_the_benchmark_s(self):
        pinned = Quiz(hub_revision="pinned").for_task("easy")
        assert pinned.source("easy").revision == "pinned"
        assert pinned.revision() == "someone/quiz@pinned"

    def test_what_the_hub_lacks_is_one_line(self, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def refuse(*args, **kwargs):
            raise ConnectionError("no\nnetwork")

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        source = attrs.evolve(Quiz().source("easy"), revision="abc")
        with pytest.raises(DataError, match=r"at abc: cannot be loaded \(ConnectionError: no net"):
            hub.load(source, "abc", "quiz easy")

    @pytest.mark.parametrize("files", ["data/easy.jsonl", "data.zip::data/easy.jsonl"])
    def test_a_file_of_a_data_set_is_loaded_at_the_commit(self, tmp_path, monkeypatch, files):
        datasets = pytest.importorskip("datasets")
        import huggingface_hub

        path = write(tmp_path / "data" / "easy.jsonl")
        if "::" in files:
            with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
                archive.write(path, "data/easy.jsonl")
            path.unlink()
        asked = []

        def download(repo, name, *, repo_type, revision):
            asked.append((repo, name, repo_type, revision))
            return str(tmp_path / name)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        source = attrs.evolve(Quiz().source("easy"), files=files)
        data = hub.load(source, "abc", "quiz easy")
        assert [row["answers"] for row in data] == [row["answers"] for row in ROWS]
        assert asked == [("someone/quiz", files.partition("::")[0], "dataset", "abc")]

    def test_a_data_set_is_asked_for_at_the_commit(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        calls = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)))
        hub.load(Quiz().source("easy"), "abc", "quiz easy")
        assert calls == [(("someone/quiz", "easy"), {"split": "test", "revision": "abc"})]

    def test_the_commit_of_the_cache_counts_where_the_hub_is_out_of_reach(
        self, tmp_path, monkeypatch
    ):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        refs = tmp_path / "datasets--someone--quiz" / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text("c0ffee")
        source = Quiz().source("easy")
        assert hub.commit_of(source, "quiz easy") == "c0ffee"
        assert hub.commit_of(attrs.evolve(source, revision="pinned"), "quiz easy") == "pinned"
