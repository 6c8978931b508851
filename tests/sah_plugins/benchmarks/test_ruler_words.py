import sys

import pytest

from sah_core import ParameterError, registry

pytestmark = pytest.mark.unit

words = sys.modules[registry.benchmarks["ruler"].__module__ + ".words"]


@pytest.mark.parametrize(
    ("firsts", "seconds"),
    [
        (["red", "blue"], ["cat", "dog"]),
        # "red-" begins "red-hot-", so that their strings are mixed in sorted order.
        (["red-hot", "red", "redder", "a"], ["cat", "iron", "hot-cat", "z"]),
        # Two ways to one string.
        (["a", "a-b"], ["b-c", "c"]),
        (["x", "x", "x-y", "x-y-z"], ["y-z-q", "q", "z-q", "q"]),
        ([], ["cat"]),
    ],
)
def test_pairs_are_the_sorted_distinct_strings(firsts, seconds):
    pairs = words.HyphenatedPairs(firsts, seconds)
    expected = sorted({f"{a}-{b}" for a in firsts for b in seconds})
    assert list(pairs) == expected
    assert len(pairs) == len(expected)
    assert pairs[:3] == expected[:3]
    if expected:
        assert pairs[-1] == expected[-1]
    with pytest.raises(IndexError):
        pairs[len(expected)]


def test_the_package_gives_as_many_words_as_ruler_has():
    pytest.importorskip("wonderwords", reason="the extra 'benchmarks' is not installed")
    assert len(words.key_words()) == 6_171_620
    assert len(words.list_words()) == 8_166


def test_more_words_begin_with_the_package_s_own_and_are_distinct():
    pytest.importorskip("wonderwords", reason="the extra 'benchmarks' is not installed")
    found = words.more_words(None, 9_000)
    assert len(found) == len(set(found)) >= 9_000
    assert found[:8_166] == words.list_words()


def test_a_list_of_words_is_read_from_text_and_json(tmp_path):
    for name, content in (
        ("a.txt", "one\n\n two \n"),
        ("a.json", '{"0": "one", "1": "two"}'),
        ("b.json", '["one", "two"]'),
    ):
        (tmp_path / name).write_text(content)
        assert words.extra_words(str(tmp_path / name)) == ("one", "two")


@pytest.mark.parametrize("content", ["", "3", "[1]", '{"0": 1}'])
def test_anything_else_is_no_list_of_words(content, tmp_path):
    path = tmp_path / "words.json"
    path.write_text(content)
    with pytest.raises(ParameterError, match="words_path = .* one word a line"):
        words.extra_words(str(path))
