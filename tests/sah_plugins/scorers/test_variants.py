"""Scorers where the golden files do not look, or where two codes differ."""

import json
from pathlib import Path

import pytest

from sah_core.scorer import find_scorer
from sah_plugins.scorers.aime import answer_of
from sah_plugins.scorers.infinitebench import scorer_of
from sah_plugins.scorers.loogle import DEVIATIONS, parse_mapping
from sah_plugins.scorers.zeroscrolls import ROUGE_KINDS, geometric_mean, rouge_parts

pytestmark = pytest.mark.unit
GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"


@pytest.mark.parametrize("task", ["code_debug", "longbook_choice_eng", "longdialogue_qa_eng"])
def test_the_variant_of_the_peers_gives_their_numbers(task):
    cases = json.loads((GOLDEN / f"infinitebench_{task}.json").read_text())["public"]
    differ = 0
    for case in cases:
        peers, official = (scorer_of(task, name) for name in ("kvpress", "official"))
        if case["expected_kvpress"] is not None:
            score = peers(case["prediction"], case["references"], **case["kwargs"])
            assert score == case["expected_kvpress"], case
            differ += score != official(case["prediction"], case["references"], **case["kwargs"])
    assert differ


def test_the_variant_differs_in_three_tasks_only():
    assert scorer_of("passkey", "kvpress") is scorer_of("passkey", "official")


def test_the_first_value_is_dropped_for_gpt4_as_the_official_code_does():
    score = find_scorer("infinitebench_math_calc")
    assert score("1, 4, 8", [4, 8]) == 0.0
    assert score("1, 4, 8", [4, 8], model_name="gpt4") == 1.0
    assert score("4, 8", [[4, 8]]) == 1.0


def test_a_fraction_is_no_integer_where_the_official_code_raises():
    score = find_scorer("infinitebench_math_find")
    assert score("12.5", [12]) == 0.0
    assert score("12.5", [12.5]) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd()",
        "{'a': open('x')}",
        "{" * 500,
        "{[]: 1}",
        "[1]",
        "1",
        "",
        "{'a'}",
    ],
)
def test_what_is_no_literal_dictionary_is_not_run(text):
    assert parse_mapping(text) is None


def test_a_name_that_is_no_text_fills_no_mask():
    score = find_scorer("loogle_cloze_partial")
    assert score("{'<mask-0>': 7}", [{"<mask-0>": "7"}]) == 0.0


@pytest.mark.parametrize("fn", DEVIATIONS)
def test_similarity_of_orders_goes_from_0_to_1(fn):
    score = find_scorer("loogle_reorder_similarity")
    assert score("I, II, III", ["I,II,III"], fn=fn) == 1.0
    assert 0.0 < score("II, I, III", ["I,II,III"], fn=fn) < 1.0
    assert score("no order", ["I,II,III"], fn=fn) == 0.0
    assert score("I", ["I"], fn=fn) == 1.0


def test_the_worst_order_has_no_similarity():
    score = find_scorer("loogle_reorder_similarity")
    for fn in ("location_square_deviation", "location_mean_deviation", "swap_distance_deviation"):
        assert score("IV, III, II, I", ["I,II,III,IV"], fn=fn) == pytest.approx(0.0)
    assert score("II, III, IV, I", ["I,II,III,IV"], fn="swap_deviation") == 0.0


def test_an_empty_answer_is_the_word_none_in_loogle():
    assert find_scorer("loogle_bleu")("", ["None"]) == 1.0
    assert find_scorer("loogle_rouge_recall")("", ["None at all"], key="rouge-1") > 0


def test_rouge_of_dots_is_0():
    assert find_scorer("loogle_rouge_recall")("...", ["..."], key="rouge-2") == 0.0


@pytest.mark.parametrize(
    ("prediction", "number", "boxed"),
    [
        (r"\boxed{033}", 33, True),
        (r"\boxed{\text{73}}", 73, True),
        (r"\boxed{1000}", None, False),
        (r"\boxed{\frac{1}{2}}", None, False),
        ("Using 3 cases we get 12.", 12, False),
        ("", None, False),
    ],
)
def test_an_answer_to_aime_is_an_integer_in_range(prediction, number, boxed):
    assert answer_of(prediction) == (number, boxed)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (r"\boxed{73%}", "73", 0.0),
        (r"\boxed{73%}", "73%", 1.0),
        (r"\boxed{a/b }", "a/b", 0.0),
        (r"\boxed{1/2}", r"\frac12", 1.0),
        (r"\fbox{73}", "73", 0.0),
        (r"\boxed 73$ done", "73", 1.0),
        (r"\boxed{73", "73", 0.0),
        ("costs $ 73", "73", 0.0),
    ],
)
def test_the_harness_has_rules_of_its_own(prediction, reference, expected):
    assert find_scorer("aime_lm_eval")(prediction, [reference]) == expected


def test_a_geometric_mean_is_of_means_and_each_part_takes_its_own_best_reference():
    parts = rouge_parts("a b c", ["a b", "b c d e"])
    assert set(parts) == set(ROUGE_KINDS)
    assert parts["rouge1"] == pytest.approx(80.0)
    assert geometric_mean({"rouge1": 8.0, "rouge2": 27.0, "rougeL": 64.0}) == pytest.approx(24.0)
    score = find_scorer("zeroscrolls_rouge")
    both = score(["a b", "c d"], [["a b"], ["x"]], key="geometric_mean", corpus=True)
    assert both == pytest.approx(50.0)


def test_letters_beyond_ascii_are_spelt_in_ascii():
    assert find_scorer("zeroscrolls_f1")("Señor Núñez", ["senor nunez"]) == 100.0
