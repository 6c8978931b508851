import sys

import pytest

from sah_core import MissingLibraryError, ParameterError
from sah_plugins.text.draws import Draws
from sah_plugins.text.essays import essay_sentences, essay_text
from sah_plugins.text.fitting import PromptMeter, largest_near, largest_size
from sah_plugins.text.splitting import find_splitter

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("answer", [0, 1, 2, 31, 100])
@pytest.mark.parametrize("guess", [0, 1, 30, 31, 32, 99, 1000])
@pytest.mark.parametrize("search", [largest_near, largest_size])
def test_the_largest_size_is_found_from_any_guess(search, answer, guess):
    assert search(lambda size: size <= answer, guess) == answer


def test_a_right_guess_takes_two_trials():
    tried = []
    largest_near(lambda size: tried.append(size) or size <= 40, 40)
    assert tried == [40, 41]


class Letters:
    bos_token_id = 0

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": list(text)}


def test_a_bos_counts_unless_it_is_not_wanted():
    assert PromptMeter(Letters(), chat=False).prompt_tokens("abc", " d") == 6
    assert PromptMeter(Letters(), chat=False, bos=False).prompt_tokens("abc", " d") == 5


def test_a_longer_stream_begins_with_the_shorter_one_and_labels_are_apart():
    draws = Draws(3, "x")
    long = draws.stream("a", 50)
    assert draws.stream("a", 20) == long[:20]
    assert set(draws.stream("b", 50)).isdisjoint(long)
    assert set(Draws(4, "x").stream("a", 50)).isdisjoint(long)
    assert all(0 <= value < 2**64 for value in long)


def test_a_stream_leaves_the_single_draws_as_they_are():
    draws, other = Draws(3), Draws(3)
    draws.stream("a", 10)
    assert [draws.below(100) for _ in range(9)] == [other.below(100) for _ in range(9)]


def test_a_text_is_kept_as_it_is_and_markdown_loses_its_marks(tmp_path):
    (tmp_path / "a.txt").write_text("# One\n  two *three*.\n")
    (tmp_path / "b.md").write_text("# Title\n\nfour *five*.\n")
    assert essay_text("x", str(tmp_path)) == "# One\n  two *three*.\n\nfour five."
    assert essay_sentences("x", str(tmp_path)) == ("two three.", "four five.")


def test_an_essay_in_json_is_its_text(tmp_path):
    path = tmp_path / "essays.json"
    path.write_text('{"text": "One. Two."}')
    assert essay_text("x", str(path)) == "One. Two."
    assert essay_sentences("x", str(path)) == ("One.", "Two.")


@pytest.mark.parametrize("content", ['{"words": 1}', "[]", "no", '{"text": " "}'])
def test_json_without_a_text_is_no_essay(content, tmp_path):
    path = tmp_path / "essays.json"
    path.write_text(content)
    for read in (essay_text, essay_sentences):
        with pytest.raises(ParameterError, match="x: essay_path = .* at least one sentence"):
            read("x", str(path))


def test_the_simple_splitter_cuts_behind_every_mark_and_punkt_knows_abbreviations():
    text = "Dr. Smith went home. He was tired!  Was he?"
    assert find_splitter("simple", "x")[1](text) == [
        "Dr.",
        "Smith went home.",
        "He was tired!",
        "Was he?",
    ]
    pytest.importorskip("punkt", reason="the extra 'benchmarks' is not installed")
    for name in ("punkt", "auto"):
        found, split = find_splitter(name, "x")
        assert found == "punkt"
        assert split(text) == ["Dr. Smith went home.", "He was tired!", "Was he?"]


def test_without_punkt_auto_is_simple_and_punkt_is_missed(monkeypatch):
    module = sys.modules["sah_plugins.text.splitting"]
    monkeypatch.setattr(module, "_nltk_punkt", lambda: None)
    monkeypatch.setattr(module, "_packaged_punkt", lambda owner: None)
    assert find_splitter("auto", "x")[0] == "simple"
    with pytest.raises(MissingLibraryError, match="x with splitter=punkt .* pip install") as error:
        find_splitter("punkt", "x")
    assert "\n" not in str(error.value)
