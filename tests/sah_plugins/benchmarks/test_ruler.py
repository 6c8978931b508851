import hashlib
import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from sah_core import MissingLibraryError, ParameterError, registry
from sah_core.errors import DataError
from sah_core.parameters import from_plain, to_plain

pytestmark = pytest.mark.unit

Ruler = registry.benchmarks["ruler"]
TASKS = Ruler().include
INPUTS = Path(__file__).parents[2] / "golden" / "metrics" / "ruler_inputs"
GOLDEN = INPUTS.parent / "ruler_generation.json"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Words:
    """A token per word and sign."""

    bos_token_id = None
    pattern = re.compile(r"\w+|[^\w\s]")

    def __call__(self, text, *, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": [0] * sum(1 for _ in self.pattern.finditer(text))}


class Spaces:
    bos_token_id = None

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": text.split()}


class Fours:
    """A token per four letters, and a BOS."""

    bos_token_id = 1

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": range(-(-len(text) // 4))}


class Chat(Words):
    chat_template = "yes"

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt):
        return "system : be kind ; user : " + turns[0]["content"] + " ; assistant : "


def ruler(task=None, **parameters):
    parameters = {"lengths": (1024,), "essay_path": str(INPUTS / "essay.txt"), **parameters}
    if task is not None:
        parameters["include"] = (task,)
    return Ruler(**parameters)


def examples(task, count=3, tokenizer=None, seed=0, **parameters):
    benchmark = ruler(task, **parameters)
    [name] = benchmark.tasks()
    return list(islice(benchmark.examples(name, tokenizer or Words(), seed), count))


def official(task, count=3, seed=42, **parameters):
    return examples(task, count, seed=seed, mode="official", splitter="simple", **parameters)


def prompt(example):
    return example.context + example.question + example.answer_prefix


def tokens(example, tokenizer):
    return len(tokenizer(prompt(example), add_special_tokens=False)["input_ids"])


# Names of tasks.


def test_there_is_a_task_per_length_and_name_and_globs_choose_among_them():
    tasks = Ruler(lengths=(2048, 4096)).tasks()
    assert len(tasks) == 26
    assert tasks[:2] == ("niah_single_1-2048", "niah_single_2-2048")
    assert tasks[-1] == "qa_2-4096"
    assert all(re.fullmatch(r"[a-z0-9_]+-\d+", task) for task in tasks)


def test_a_benchmark_for_one_task_makes_the_same_examples_and_does_not_depend_on_the_others():
    whole = ruler(lengths=(1024, 2048))
    alone = whole.for_task("vt-2048")
    assert alone == ruler("vt", lengths=(2048,))
    assert alone.revision() == ruler("vt", lengths=(2048,)).revision()
    made = whole.examples_at("vt-2048", Words(), 0, [1])
    assert list(made) == list(alone.examples_at("vt-2048", Words(), 0, [1]))


# What every sample has to be, in both ways to draw it.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mode", ["portable", "official"])
def test_a_sample_fits_its_length_holds_its_answers_and_scores_as_it_should(task, mode):
    found = examples(task, mode=mode, lengths=(4096,))
    benchmark = ruler(task, mode=mode, lengths=(4096,))
    assert len({e.id for e in found}) == len({prompt(e) for e in found}) == 3
    for example in found:
        assert tokens(example, Words()) + example.max_new_tokens <= 4096
        assert example.context_id == example.id
        assert all(reference in example.context for reference in example.references)
        assert benchmark.score(example, benchmark.gold(example)) == {"string_match": 100.0}
        assert benchmark.score(example, "") == {"string_match": 0.0}


@pytest.mark.parametrize(
    ("task", "question", "prefix"),
    [
        ("niah_single_1", r"What is the special magic number for \S+ mentioned", " The special"),
        ("niah_multivalue", "What are all the special magic numbers for", " The special"),
        ("vt", r"Question: Find all variables that are assigned the value \d{5} in", " Answer:"),
        ("cwe", "Question: What are the 10 most common words", " Answer: The top 10"),
        ("fwe", "Question: Do not provide any explanation", " Answer: According"),
        (
            "qa_1",
            r"\nAnswer the question based on the given documents[^?]*\n\nQuestion: ",
            " Answer:",
        ),
    ],
)
def test_the_question_and_the_prefix_are_apart_from_the_context(task, question, prefix):
    for example in examples(task) + official(task):
        assert re.match(question, example.question)
        assert example.answer_prefix.startswith(prefix)
        assert example.context.endswith("\n")


# The official streams.


@pytest.mark.parametrize("task", TASKS)
def test_official_samples_are_those_of_the_official_generator(task):
    content = json.loads(GOLDEN.read_text())
    content["public"] = [case for case in content["public"] if case["task"] == task]
    results = list(Ruler.check_golden(content, GOLDEN.parent))
    assert len(results) == 6
    assert not [difference for _, difference in results if difference]


def test_a_golden_file_with_another_input_fails_and_foreign_files_are_left_alone():
    case = json.loads(GOLDEN.read_text())["public"][0]
    case["samples"][1]["input_sha256"] = "0"
    case["samples"].append(case["samples"][0])
    results = dict(Ruler.check_golden({"hidden": [case]}, GOLDEN.parent))
    assert results == {
        "niah_single_1-1024 sample 0": "",
        "niah_single_1-1024 sample 1": "input_sha256 differ",
        "niah_single_1-1024 sample 2": "",
        "niah_single_1-1024 sample 3": "no sample was made",
    }
    assert Ruler.check_golden({"metric": "x", "public": [{"expected": 1}]}, GOLDEN.parent) is None


def test_global_random_state_is_neither_read_nor_moved():
    import numpy

    random.seed(1)
    numpy.random.seed(1)
    first = official("vt"), random.random(), numpy.random.rand()
    random.seed(1)
    numpy.random.seed(1)
    assert (random.random(), numpy.random.rand()) == first[1:]
    assert official("vt") == first[0]


def test_the_official_seed_is_that_of_the_run_unless_it_is_given():
    assert official("cwe", seed=42) == official("cwe", seed=7, random_seed=42)
    assert official("cwe", seed=42) != official("cwe", seed=7)


def frequent_places(found):
    """Where the words stand that are asked for."""
    return {tuple(i for i, word in enumerate(main_list(e)) if word in e.references) for e in found}


def main_list(example):
    listed = example.context.rpartition("ones that appear most often.\n")[2]
    # Some words are of two words.
    return re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", listed)


def test_official_shuffles_are_alike_unless_positions_vary():
    same, varied = official("cwe"), official("cwe", vary_positions=True)
    assert len(frequent_places(same)) == 1
    assert len(frequent_places(varied)) == 3
    assert [e.references for e in same] == [e.references for e in varied]


@pytest.mark.parametrize("task", [t for t in TASKS if t != "fwe"])
def test_official_sizes_that_would_never_end_raise(task):
    with pytest.raises(ParameterError, match=rf"lengths = 130 .* {task} .*never end") as error:
        official(task, lengths=(130,))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [60, 100])
def test_the_official_fwe_raises_where_nothing_fits(length):
    with pytest.raises(ParameterError, match="never end"):
        official("fwe", lengths=(length,))


# Our own streams.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokenizer", [Words(), Spaces(), Fours()], ids=["words", "spaces", "4"])
@pytest.mark.parametrize("length", [512, 2048, 32768])
def test_portable_samples_fit_and_nearly_fill_any_length(task, tokenizer, length):
    [example] = examples(task, 1, tokenizer, lengths=(length,))
    used = tokens(example, tokenizer) + example.max_new_tokens
    used += tokenizer.bos_token_id is not None
    assert used <= length
    assert used > length * (0.8 if length < 1024 else 0.9)


@pytest.mark.parametrize("length", [131072, 1048576])
def test_very_long_samples_are_made_in_flat_memory(length):
    [example] = examples("niah_single_1", 1, Spaces(), lengths=(length,))
    assert 0.93 * length < tokens(example, Spaces()) + 128 <= length


@pytest.mark.parametrize("task", TASKS)
def test_the_tokenizer_changes_the_size_and_nothing_else(task):
    for one, other in zip(
        examples(task, 3, Words(), lengths=(2048,)),
        examples(task, 3, Fours(), lengths=(3000,)),
        strict=True,
    ):
        assert one.references == other.references
        assert (one.question, one.answer_prefix) == (other.question, other.answer_prefix)


class Slightly(Words):
    """Nearly the same number of tokens."""

    def __call__(self, text, *, add_special_tokens):
        ids = super().__call__(text, add_special_tokens=add_special_tokens)["input_ids"]
        return {"input_ids": ids[: len(ids) - len(ids) // 500]}


def test_tokenizers_of_similar_length_mostly_get_the_same_bytes():
    pairs = [
        (one, other)
        for task in TASKS
        for one, other in zip(
            examples(task, 4, Words(), lengths=(3000,)),
            examples(task, 4, Slightly(), lengths=(3000,)),
            strict=True,
        )
    ]
    same = sum(one == other for one, other in pairs)
    assert same / len(pairs) > 0.85


@pytest.mark.parametrize("task", TASKS)
def test_a_portable_sample_depends_on_its_number_alone(task):
    benchmark = ruler(task)
    [name] = benchmark.tasks()
    whole = examples(task, 5)
    assert list(benchmark.examples_at(name, Words(), 0, [1, 4])) == [whole[1], whole[4]]
    assert {e.references for e in examples(task, 5, seed=1)} != {e.references for e in whole}
    longer = examples(task, 5, lengths=(2000,))
    assert [e.references for e in longer] == [e.references for e in whole]


def digest():
    found = [e for task in TASKS for e in examples(task, 2, seed=5) + official(task, 2, seed=5)]
    text = json.dumps([[e.id, prompt(e), e.references] for e in found])
    return hashlib.sha256(text.encode()).hexdigest()


def test_other_processes_make_the_same_bytes():
    code = (
        "import importlib.util as u; s = u.spec_from_file_location('t', 'test_ruler.py'); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.digest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == digest(), result.stderr


@pytest.mark.parametrize(
    ("task", "length"), [("niah_single_1", 100), ("cwe", 200), ("qa_2", 150), ("fwe", 100)]
)
def test_a_length_that_holds_nothing_says_how_much_it_takes(task, length):
    with pytest.raises(ParameterError, match=r"at least \d+ tokens for " + task) as error:
        examples(task, lengths=(length,))
    least = int(re.search(r"at least (\d+) tokens", str(error.value))[1])
    assert examples(task, 1, lengths=(least,))
    assert "\n" not in str(error.value)


def test_the_chat_template_counts_where_it_is_used():
    for mode in ("portable", "official"):
        for example in examples("niah_multikey_2", 3, Chat(), chat=True, mode=mode):
            turn = [{"role": "user", "content": example.context + example.question}]
            text = Chat().apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids = Chat()(text + example.answer_prefix, add_special_tokens=False)["input_ids"]
            assert len(ids) + example.max_new_tokens <= 1024
    assert ruler(chat=True).protocol_for("vt-1024").chat


# What the tasks are about.


@pytest.mark.parametrize(
    ("task", "keys", "values"),
    [("niah_single_3", 1, 1), ("niah_multikey_1", 4, 1), ("niah_multivalue", 1, 4)],
)
def test_needles_lie_in_the_essay(task, keys, values):
    for example in examples(task):
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", example.context)
        assert len(found) == keys * values
        assert len({key for key, _ in found}) == keys
        asked = [value for key, value in found if f" for {key} " in example.question]
        assert sorted(asked) == sorted(example.references)


def test_several_keys_are_asked_for_at_once():
    for example in examples("niah_multiquery"):
        listed = re.search(r" for (.*) mentioned", example.question)[1]
        assert re.fullmatch(r"\S+, \S+, \S+, and \S+", listed)
        keys = re.split(r", (?:and )?", listed)
        needles = dict(re.findall(r"numbers for (\S+) is: (\d+)\.", example.context))
        assert [needles[key] for key in keys] == list(example.references)


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_distractors_never_share_the_key(task):
    for example in examples(task, lengths=(8192,)):
        lines = example.context.split("\n")[1:-1]
        key = re.search(r" for (\S+) mentioned", example.question)[1]
        assert len(lines) > 50
        assert sum(f" for {key} is: " in line for line in lines) == 1


def test_places_are_spread_over_the_whole_haystack():
    found = examples("niah_single_1", 200)
    depths = [e.context.index("One of") / len(e.context) for e in found]
    quarters = Counter(int(4 * depth) for depth in depths)
    assert all(30 < quarters[quarter] < 70 for quarter in range(4))


def test_a_chain_is_followed_from_its_value_behind_a_solved_example():
    for example in examples("vt", lengths=(4096,)):
        shown, _, main = example.context.rpartition("Memorize and track")
        value = re.search(r"value (\d{5})", example.question)[1]
        chain = [re.search(rf"VAR (\w+) = {value}", main)[1]]
        while found := re.search(rf"VAR (\w+) = VAR {chain[-1]}\b", main):
            chain.append(found[1])
        assert tuple(chain) == example.references
        assert shown.count("VAR ") == 9
        assert shown.count(NOISE) == 12
        assert value not in shown


@pytest.mark.parametrize(("length", "common", "rare"), [(800, 3, 1), (2048, 6, 1), (4096, 30, 3)])
def test_common_words_come_more_often_than_all_others(length, common, rare):
    for example in examples("cwe", lengths=(length,)):
        counts = Counter(main_list(example))
        assert {counts[word] for word in example.references} == {common}
        assert {n for word, n in counts.items() if word not in example.references} == {rare}


@pytest.fixture
def few_words(monkeypatch):
    """The package's words, as if there were 4,200 of them."""
    words = sys.modules[Ruler.__module__ + ".words"]
    kept = words.list_words()[:4200]
    monkeypatch.setattr(words, "list_words", lambda: kept)
    return set(kept)


@pytest.mark.parametrize("mode", ["portable", "official"])
def test_a_list_longer_than_the_words_takes_hyphenated_pairs(few_words, mode):
    [example] = examples("cwe", 1, Spaces(), lengths=(40_000,), mode=mode)
    counts = Counter(main_list(example))
    more = [word for word in counts if word not in few_words]
    assert len(counts) > 4200
    assert len(more) > 500
    assert all("-" in word for word in more)
    assert set(counts.values()) == {30, 3}


def test_the_three_words_asked_for_are_the_most_frequent_ones():
    for length in (512, 700, 4096):
        for example in examples("fwe", lengths=(length,)):
            text = example.context.partition("coded words. ")[2]
            counts = Counter(text.split())
            ranked = [word for word, _ in counts.most_common()]
            assert ranked[0] == "..."
            assert set(ranked[1:4]) == set(example.references)
            assert counts[ranked[3]] > counts.get(ranked[4], 0) if len(ranked) > 4 else True


# Questions.


def test_our_own_questions_are_said_to_be_our_own():
    for task in ("qa_1", "qa_2"):
        [example] = examples(task, 1)
        assert example.facts["questions"] == "own"
        assert f"{task}-own-" in ruler(task).revision()
        assert "own questions" in ruler(task).info(f"{task}-1024").licence
        assert ruler(task).info(f"{task}-1024").source is None
    assert ruler("qa_1").count("qa_1-1024") == 54
    assert ruler("qa_2", samples=10).count("qa_2-1024") == 10


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_every_own_question_can_be_answered_from_its_documents_at_any_length(task):
    for length in (700, 16384):
        found = examples(task, 100, lengths=(length,))
        assert len(found) == len({e.question for e in found}) == (54 if task == "qa_1" else 44)
        for example in found:
            assert any(answer in example.context for answer in example.references)


def test_questions_of_a_file_say_so_and_its_content_is_in_the_revision(tmp_path):
    path = tmp_path / "squad.json"
    path.write_text((INPUTS / "squad_mini.json").read_text())
    benchmark = ruler("qa_1", squad_path=str(path))
    assert "qa_1-official-" in benchmark.revision()
    assert next(benchmark.examples("qa_1-1024", Words(), 0)).facts["questions"] == "official"
    before = benchmark.revision()
    path.write_text(path.read_text().replace("Bramford", "Bramfort"))
    assert ruler("qa_1", squad_path=str(path)).revision() != before


def rows_of_squad():
    content = json.loads((INPUTS / "squad_mini.json").read_text())
    return [
        {
            "id": f"{i}-{j}-{k}",
            "title": article["title"],
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {
                "text": [] if qa["is_impossible"] else [a["text"] for a in qa["answers"]],
                "answer_start": [],
            },
        }
        for i, article in enumerate(content["data"])
        for j, paragraph in enumerate(article["paragraphs"])
        for k, qa in enumerate(paragraph["qas"])
    ]


def rows_of_hotpot():
    content = json.loads((INPUTS / "hotpot_mini.json").read_text())
    return [
        {
            "question": entry["question"],
            "answer": entry["answer"],
            "supporting_facts": {"title": [entry["context"][0][0]], "sent_id": [0]},
            "context": {
                "title": [title for title, _ in entry["context"]],
                "sentences": [sentences for _, sentences in entry["context"]],
            },
        }
        for entry in content
    ]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_in_the_hub_s_schema_give_the_samples_of_the_official_file(form, tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name, rows in (("squad_v2", rows_of_squad()), ("distractor", rows_of_hotpot())):
        (tmp_path / name).mkdir()
        path = tmp_path / name / f"validation.{form}"
        if form == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task, parameter, file in (
        ("qa_1", "squad_path", "squad_mini.json"),
        ("qa_2", "hotpot_path", "hotpot_mini.json"),
    ):
        expected = official(task, **{parameter: str(INPUTS / file)})
        assert official(task, questions="official", data_dir=str(tmp_path)) == expected
        benchmark = ruler(task, questions="official", data_dir=str(tmp_path))
        facts = benchmark.data_of(f"{task}-1024")
        assert facts["revision"].startswith("sha256:")
        assert facts["revision"] in benchmark.revision()
        assert facts["rows"] == len(rows_of_squad() if task == "qa_1" else rows_of_hotpot())


@pytest.mark.parametrize("mode", ["portable", "official"])
@pytest.mark.parametrize("task", ["niah_single_2", "qa_1", "cwe"])
def test_a_benchmark_that_has_been_used_still_goes_to_a_worker(task, mode, tmp_path):
    folder = tmp_path / "squad_v2"
    folder.mkdir()
    (folder / "validation.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows_of_squad()))
    given = {"questions": "official", "data_dir": str(tmp_path)} if task == "qa_1" else {}
    benchmark = ruler(task, mode=mode, **given)
    first = list(islice(benchmark.examples(f"{task}-1024", Words(), 1), 2))
    copy = pickle.loads(pickle.dumps(benchmark))
    assert copy.revision() == benchmark.revision()
    assert list(islice(copy.examples(f"{task}-1024", Words(), 1), 2)) == first


def test_a_needed_document_is_always_there_and_the_others_as_they_fit(tmp_path):
    rows = json.loads((INPUTS / "hotpot_mini.json").read_text())
    for row in rows:
        row["supporting_facts"] = [[row["context"][0][0], 0], [row["context"][6][0], 0]]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(rows))
    for length, least in ((300, 2), (4096, 10)):
        for example in examples("qa_2", hotpot_path=str(path), lengths=(length,)):
            assert example.context.count("Document ") >= least
            [row] = [row for row in rows if example.question.endswith(row["question"])]
            for title, sentences in (row["context"][0], row["context"][6]):
                assert f"{title}\n{''.join(sentences)}" in example.context


def test_tasks_without_rows_have_no_data_to_fetch(tmp_path):
    for task, given in (
        ("vt", {"questions": "official"}),
        ("qa_1", {}),
        ("qa_1", {"questions": "official", "squad_path": str(INPUTS / "squad_mini.json")}),
    ):
        benchmark = ruler(task, **given)
        assert benchmark.data_of(f"{task}-1024") is None
        assert benchmark.fetch_data(f"{task}-1024", tmp_path) is None


def test_rows_that_the_hub_does_not_give_say_where_else_they_can_be(tmp_path):
    benchmark = ruler("qa_2", questions="official")
    with pytest.raises(DataError, match=r"ruler qa_2: hub data set hotpotqa/hotpot_qa.*data-dir"):
        benchmark.fetch_data("qa_2-1024", tmp_path)


def test_the_example_for_the_conformance_checks_makes_every_task(tmp_path):
    benchmark = Ruler.example(tmp_path)
    for task in benchmark.tasks():
        assert len(list(benchmark.examples(task, Words(), 0))) == benchmark.count(task) == 4


# Scores over several tasks.


def metrics_of(length, scores):
    return {
        f"{task}-{length}": {"scores": {"string_match": score}}
        for task, score in zip(TASKS, scores, strict=False)
    }


def test_the_summary_has_the_mean_of_each_length_and_the_longest_one_above_the_threshold():
    tasks = {
        **metrics_of(8192, [85.6] * 13),
        **metrics_of(1024, [100.0] * 12 + [87.0]),
        **metrics_of(2048, [86.0] * 13),
    }
    assert Ruler.summary(tasks) == {
        "mean of 1024": 99.0,
        "mean of 2048": 86.0,
        "mean of 8192": pytest.approx(85.6),
        "effective length": 2048.0,
    }


def test_a_length_that_lacks_tasks_says_so_and_is_not_effective():
    tasks = {**metrics_of(1024, [50.0] * 13), **metrics_of(2048, [100.0, 90.0])}
    assert Ruler.summary(tasks) == {
        "mean of 1024": 50.0,
        "2-task mean of 2048": 95.0,
        "effective length": None,
    }
    assert Ruler.summary(metrics_of(2048, [100.0])) == {"1-task mean of 2048": 100.0}
    tasks["vt-1024"] = {"scores": {"string_match": None}}
    assert "12-task mean of 1024" in Ruler.summary(tasks)


def test_the_threshold_of_the_effective_length_can_be_given():
    module = sys.modules[Ruler.__module__]
    means = {1024: 90.0, 2048: 70.0, 4096: 75.0, 8192: None}
    assert module.effective_length(means) == 1024
    assert module.effective_length(means, 72.0) == 4096
    assert module.effective_length(means, 95.0) is None


# Bad input.


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lengths": ()}, "lengths = .* at least one value"),
        ({"lengths": (512, 512)}, "lengths = .* none twice"),
        ({"include": ("vt", "vt")}, "include = .* none twice"),
        ({"include": ("vtt",)}, "include = .*'vt'"),
        ({"mode": "exact"}, "mode = 'exact' .* 'portable', 'official'"),
    ],
)
def test_bad_parameters_say_what_is_allowed(parameters, message):
    with pytest.raises(ParameterError, match=message):
        Ruler(**parameters)


def test_an_unknown_task_says_which_there_are():
    with pytest.raises(ParameterError, match="did you mean 'vt-1024'") as error:
        list(Ruler(lengths=(1024,)).examples("vt-1204", Words(), 0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["no json", "[]", "{}", '{"data": [{}]}'])
def test_a_file_of_another_schema_says_what_was_expected(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ParameterError, match=r"squad_path = .* schema of SQuAD") as error:
        examples("qa_1", squad_path=str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(ParameterError, match=r"hotpot_path = .* schema of HotpotQA"):
        examples("qa_2", hotpot_path=str(path))
    with pytest.raises(ParameterError, match=r"squad_path = .* \(No such file"):
        examples("qa_1", squad_path=str(tmp_path / "none.json"))


def test_a_folder_without_the_rows_says_which_were_looked_for(tmp_path):
    with pytest.raises(DataError, match="squad_v2/validation"):
        examples("qa_1", questions="official", data_dir=str(tmp_path))
    (tmp_path / "squad_v2.jsonl").write_text('{"title": "x"}\n')
    with pytest.raises(DataError, match="no column 'context'"):
        examples("qa_1", questions="official", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        examples("qa_1", questions="official", data_dir=str(tmp_path / "none"))


def test_missing_words_are_missed_by_the_tasks_alone_that_need_them(monkeypatch):
    words = sys.modules[Ruler.__module__ + ".words"]
    for function in (words.key_words, words.list_words, words.words_digest):
        function.cache_clear()
    monkeypatch.setattr(words, "find_spec", lambda name: None)
    assert examples("vt", 1)
    assert examples("niah_multikey_3", 1)
    assert examples("niah_multikey_3", 1, mode="official")
    assert ruler("fwe").revision()
    for task in ("niah_single_1", "cwe"):
        with pytest.raises(MissingLibraryError, match="wonderwords: pip install") as error:
            examples(task, 1)
        assert "\n" not in str(error.value)


def test_words_beyond_those_of_the_package_can_be_given(few_words, tmp_path):
    path = tmp_path / "english_words.json"
    path.write_text(json.dumps({str(i): f"word{i}" for i in range(20_000)}))
    given = {"lengths": (40_000,), "words_path": str(path), "tokenizer": Spaces()}
    [example] = official("cwe", 1, **given)
    assert all(word.startswith("word") for word in main_list(example))
    revision = ruler("cwe", words_path=str(path)).revision()
    assert "more-words-" in revision
    path = tmp_path / "words.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(ParameterError, match="words_path .* at least"):
        official("cwe", 1, **{**given, "words_path": str(path)})
    assert ruler("cwe", words_path=str(path)).revision() != revision


def test_parameters_round_trip_as_plain_data():
    benchmark = Ruler(lengths=(512,), include=("vt",), mode="official", random_seed=42)
    assert from_plain(Ruler, json.loads(json.dumps(to_plain(benchmark)))) == benchmark


def test_every_task_declares_metric_and_room():
    benchmark = Ruler(lengths=(4096,))
    infos = {task.partition("-")[0]: benchmark.info(task) for task in benchmark.tasks()}
    assert {n: i.max_new_tokens for n, i in infos.items() if not n.startswith("niah")} == {
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
        "qa_1": 32,
        "qa_2": 32,
    }
    assert infos["niah_single_1"].official_max_new_tokens == 128
    assert infos["qa_1"].metric == "ruler_string_match_part"
    assert infos["vt"].metric == "ruler_string_match_all"
