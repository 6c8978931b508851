import sys

import pytest

from sah_core.errors import MissingLibraryError
from sah_plugins.scoring.text import (
    cut_words,
    first_line,
    normalize_answer,
    normalize_zh_answer,
    qa_f1,
    token_f1,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  cat, an Owl", "cat owl"),
        ("it's co-operate", "its cooperate"),
        ("the-cat", "thecat"),
        ("“quoted”", "“quoted”"),
        ("a.n the", "n"),
    ],
)
def test_punctuation_goes_before_articles(text, expected):
    assert normalize_answer(text.replace("a.n", "a. n")) == expected


def test_chinese_normalisation_keeps_the_one_bracket_that_the_official_set_lacks():
    assert normalize_zh_answer("《论语》 ABC。") == "《论语abc"


def test_token_f1_counts_tokens_as_often_as_they_occur():
    assert token_f1(["x", "x", "y"], ["x", "z"]) == pytest.approx(2 * (1 / 3) * (1 / 2) / (5 / 6))
    assert token_f1([], ["x"]) == token_f1([], []) == 0.0
    assert qa_f1("The cat", "a cat!") == 1.0


def test_the_first_line_is_that_after_leading_newlines_and_keeps_its_spaces():
    assert first_line("\n\n  a \nb") == "  a "
    assert first_line(" \n b") == " "


def test_a_missing_library_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(MissingLibraryError) as caught:
        cut_words("北京")
    assert str(caught.value) == (
        "scoring Chinese text needs the package jieba: "
        "pip install 'sparse-attention-hub[benchmarks]'"
    )
