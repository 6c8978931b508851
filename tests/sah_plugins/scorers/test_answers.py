"""Scorers of short answers where the golden files do not look."""

import sys

import pytest

from sah_core.errors import MissingLibraryError
from sah_core.scorer import find_scorer
from sah_plugins.scoring.math_answer import NoNormalFormError, is_equiv, normal_form
from sah_plugins.scoring.rouge_score import rouge_score

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("text", ["\\frac", "a\\sqrt", "1\\text{ a}\\text{ b}"])
def test_what_the_rules_do_not_cover_equals_itself_only(text):
    with pytest.raises(NoNormalFormError):
        normal_form(text)
    assert is_equiv(text, text)
    assert not is_equiv(text, text + " ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-3/4", "\\frac{-3}{4}"),
        ("03/4", "03/4"),
        ("\\frac12x", "\\frac{1}{2}x"),
        ("x = .5", "\\frac{1}{2}"),
        ("5\\text{ cm}", "5"),
    ],
)
def test_a_normal_form(text, expected):
    assert normal_form(text) == expected


def test_of_several_labels_all_must_be_named_and_no_other():
    score = find_scorer("babilong_accuracy")
    known = {"question": "What is Bill carrying?", "labels": ["apple", "milk", "football"]}
    assert score("milk and the apple. football", ["apple,milk"], **known) == 1.0
    assert score("milk", ["apple,milk"], **known) == 0.0
    assert score("apple milk football", ["apple,milk"], **known) == 0.0


def test_rouge_of_nothing_is_0_and_a_stem_counts_when_asked():
    assert rouge_score("", "word", "rougeL").f == 0.0
    assert rouge_score("walked", "walking", "rouge1").f == 0.0
    assert rouge_score("walked", "walking", "rouge1", stemmer=True).f == 1.0


def test_a_missing_library_is_needed_by_the_one_metric_only(monkeypatch):
    from sah_plugins.scoring import rouge_score as module

    module._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    helmet = find_scorer("helmet_metrics")
    assert helmet("a b", ["b"], key="f1") > 0
    with pytest.raises(MissingLibraryError, match="needs the package rouge-score: pip install"):
        helmet("a b", ["b"], key="rougeL_f1")


@pytest.mark.parametrize(
    ("metric", "references", "score"),
    [
        ("infinitebench_math_find", [7], 0.0),
        ("infinitebench_math_calc", [7, 8], 0.0),
        ("infinitebench_code_run", [7], 0.0),
        ("zeroscrolls_concordance_index", ["2, 1, 3"], 0.0),
        ("zeroscrolls_exp_similarity", ["50%"], 0.0),
        ("aime_integer", ["7"], 0.0),
        ("aime_lm_eval", ["7"], 0.0),
        ("longbench_count", ["7"], 0.0),
        ("gsm8k_lm_eval", ["#### 7"], 0.0),
    ],
)
@pytest.mark.parametrize("text", ["9" * 20_000, "\\boxed{" + "9" * 20_000 + "}"])
def test_a_number_of_any_length_is_a_wrong_answer_and_no_fault(metric, references, score, text):
    assert find_scorer(metric)(text, references) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [("50%", 1.0), ("1.2.50%", 0.5**4.75), ("x50.%", 1.0), ("50.0.0%", 0.5**5), ("5 0%", 0.5**5)],
)
def test_the_first_percentage_counts(text, score):
    assert find_scorer("zeroscrolls_exp_similarity")(text, ["50%"]) == pytest.approx(100 * score)


def test_percentages_of_ruler_are_rounded_after_the_official_division():
    answers, right = ["yes"] + ["no"] * 159, [["yes"]] * 160
    score = find_scorer("ruler_string_match_part")(answers, right)
    assert score == round(1 / 160 * 100, 2)
