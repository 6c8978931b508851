"""Our ROUGE against the package whose numbers it gives, and where it must differ."""

import random

import pytest

from sah_plugins.scoring.rouge import PathTooLongError, rouge_l, rouge_n

pytestmark = pytest.mark.unit
WORDS = ["a", "b", "The", "the", "x,", "...", ".", ". ", "  ", "\n", "3.5", "c"]


def texts(count, length):
    draw = random.Random(4)
    for _ in range(count):
        yield tuple(" ".join(draw.choices(WORDS, k=draw.randint(1, length))) for _ in range(2))


@pytest.mark.parametrize("pair", list(texts(60, 25)))
def test_scores_are_those_of_the_package(pair):
    package = pytest.importorskip("rouge")
    try:
        [expected] = package.Rouge().get_scores(*pair)
    except ValueError:
        with pytest.raises(ValueError, match="without a sentence"):
            rouge_l(*pair)
        return
    found = {"rouge-1": rouge_n(*pair, 1), "rouge-2": rouge_n(*pair, 2), "rouge-l": rouge_l(*pair)}
    for name, score in found.items():
        assert (score.recall, score.precision, score.f) == (
            expected[name]["r"],
            expected[name]["p"],
            expected[name]["f"],
        )


def test_long_sentences_score_where_the_package_hits_the_recursion_limit():
    text = " ".join(f"w{i}" for i in range(1200))
    assert rouge_l(text, text).f == pytest.approx(1.0)
    with pytest.raises(PathTooLongError):
        rouge_l(text, text, longest_path=900)
