"""The metrics of InfiniteBench: ``compute_scores.py`` of OpenBMB/InfiniteBench.

Each task has its own. ``label_is_list`` says whether the official label is a list, as
``references`` is, or the bare first of them; by default it is what the data set has. Three tasks
are scored otherwise by kvpress and what derives from it: `KVPRESS` has these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sah_core import hookimpl
from sah_core.scorer import Scorer
from sah_plugins.scoring.rouge_score import rouge_score
from sah_plugins.scoring.text import (
    best,
    normalize_zh_answer,
    qa_f1,
    token_f1,
    whole_number,
)

SOURCE = "OpenBMB/InfiniteBench@88b3daa:src/compute_scores.py"

_WORD_SIGNS = "\n:\"'.,?!{}"
_RUN_SIGNS = "\n.`'\":"
_CHOICE_SIGNS = "\n\"'.,?!{}"
_DEBUG_MARKS = (*"\n`'\"-*", "Option", "option")
_DEBUG_CUES = ("answer is:", "is:", "answer:", "correct option is:")
_CHOICE_CUES = ("answer is:", "answer:", "answer is", "option is")
_LETTERS = "ABCD"


def _label(references: Sequence[Any], label_is_list: bool) -> Any:
    return list(references) if label_is_list else references[0]


def _first(references: Sequence[Any]) -> Any:
    label = references[0]
    return label[0] if isinstance(label, list) else label


def _spaced(text: str, signs: Sequence[str]) -> str:
    for sign in signs:
        text = text.replace(sign, " ")
    return text


def _single_spaced(text: str, signs: Sequence[str]) -> str:
    return re.sub(" {2,}", " ", _spaced(text, signs))


def _after_cue(text: str, cues: Sequence[str]) -> str | None:
    """The text behind the first of the cues that occurs, less a character; None if none does."""
    for cue in cues:
        found = text.find(cue)
        if found >= 0:
            return text[found + len(cue) + 1 :]
    return None


def _number(prediction: str, references: Sequence[Any], label_is_list: bool = False) -> float:
    found = re.search("[0-9]+", prediction)
    return float(_first(references) == (found[0] if found else ""))


def _kv_retrieval(prediction: str, references: Sequence[Any], label_is_list: bool = False) -> float:
    words = _spaced(prediction, _WORD_SIGNS).split()
    return float(_label(references, label_is_list) in words)


def _code_run(prediction: str, references: Sequence[Any], label_is_list: bool = False) -> float:
    words = _spaced(prediction.strip(), _RUN_SIGNS).split()
    try:
        return float(bool(words) and int(words[-1]) == _first(references))
    except ValueError:
        return 0.0


def _code_debug(prediction: str, references: Sequence[Any], label_is_list: bool = True) -> float:
    label = _label(references, label_is_list)
    name, letter = label[0], label[1]
    text = prediction.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    rest = _after_cue(_single_spaced(text, _DEBUG_MARKS), _DEBUG_CUES)
    return float(bool(rest) and str(rest).startswith((letter, name)))


def _math_find(
    prediction: str,
    references: Sequence[Any],
    label_is_list: bool = False,
    official_raises: bool = False,
) -> float:
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return 0.0
    label = _first(references)
    if isinstance(label, float):
        return float(float(found[0]) == label)
    # The official code raises on a decimal fraction where the label is an integer.
    return float("." not in found[0] and whole_number(found[0]) == label)


def _math_calc(
    prediction: str,
    references: Sequence[Any],
    label_is_list: bool = True,
    model_name: str = "",
) -> float:
    label = references[0] if isinstance(references[0], list) else references
    numbers = [whole_number(digits) for digits in re.findall("[0-9]+", prediction)]
    if model_name == "gpt4":
        numbers = numbers[1:]
    right = 0
    for number, expected in zip(numbers, label, strict=False):
        if number != expected:
            break
        right += 1
    return right / len(label)


def _dialogue(prediction: str, references: Sequence[Any], label_is_list: bool = True) -> float:
    words = _spaced(prediction.strip(), _WORD_SIGNS).split()
    return float(_label(references, label_is_list)[0] in [word.upper() for word in words])


def _choice(prediction: str, references: Sequence[Any], label_is_list: bool = True) -> float:
    label = _label(references, label_is_list)
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in _LETTERS:
        return float(text[0] in label)
    if text in label:
        return 1.0
    text = _single_spaced(text, _CHOICE_SIGNS)
    rest = _after_cue(text, _CHOICE_CUES)
    if rest is not None:
        return float(bool(rest) and rest.startswith(tuple(label)))
    # Any piece of "ABCD" counts as a letter here, "BC" as well.
    named = next((word for word in text.split() if word in _LETTERS), None)
    return float(named is not None and named in label)


def _kvpress_code_debug(
    prediction: str, references: Sequence[Any], label_is_list: bool = True
) -> float:
    label = _label(references, label_is_list)
    text = prediction.strip()
    if _last_capital(text, "J") == label[1]:
        return 1.0
    text = _single_spaced(text, _DEBUG_MARKS)
    rest = _after_cue(text, _DEBUG_CUES)
    answers = (label[1], label[0])
    return float(text.startswith(answers) or (bool(rest) and str(rest).startswith(answers)))


def _kvpress_choice(
    prediction: str, references: Sequence[Any], label_is_list: bool = True
) -> float:
    letter = _last_capital(prediction.strip(), "D")
    if letter is not None and letter in _label(references, label_is_list):
        return 1.0
    return _choice(prediction, references, label_is_list)


def _kvpress_dialogue(
    prediction: str, references: Sequence[Any], label_is_list: bool = True
) -> float:
    text = prediction.strip().upper()
    return float(any(name.upper() in text for name in _label(references, label_is_list)))


def _last_capital(text: str, last: str) -> str | None:
    """The first letter from A to ``last`` that no other such letter of its line follows."""
    found = re.search(rf"\b[A-{last}]\b(?!.*\b[A-{last}]\b)", text)
    return found[0] if found else None


def _qa_eng(prediction: str, references: Sequence[str]) -> float:
    return best(qa_f1(prediction, reference) for reference in references)


def _qa_chn(prediction: str, references: Sequence[str]) -> float:
    answer = normalize_zh_answer(prediction)
    return best(token_f1(answer, normalize_zh_answer(reference)) for reference in references)


def _sum_eng(prediction: str, references: Sequence[str]) -> float:
    return best(rouge_score(prediction, reference, "rougeLsum").f for reference in references)


_make = partial(Scorer, source=SOURCE)

SCORERS: Mapping[str, Scorer] = {
    "infinitebench_passkey": _make(
        function=_number, description="1 if the first run of digits is the key"
    ),
    "infinitebench_number_string": _make(
        function=_number, description="1 if the first run of digits is the number"
    ),
    "infinitebench_kv_retrieval": _make(
        function=_kv_retrieval, description="1 if the value is among the words of the answer"
    ),
    "infinitebench_longbook_sum_eng": _make(
        function=_sum_eng, description="ROUGE-Lsum F of the package rouge-score, without stemmer"
    ),
    "infinitebench_longbook_qa_eng": _make(
        function=_qa_eng, description="token F1 of normalised English text"
    ),
    "infinitebench_longbook_choice_eng": _make(
        function=_choice, description="1 if the answer names the right letter or option"
    ),
    "infinitebench_longdialogue_qa_eng": _make(
        function=_dialogue, description="1 if the first name is among the words of the answer"
    ),
    "infinitebench_longbook_qa_chn": _make(
        function=_qa_chn, description="F1 of the characters of normalised Chinese text"
    ),
    "infinitebench_math_find": _make(
        function=_math_find, description="1 if the first number of the answer is right"
    ),
    "infinitebench_math_calc": _make(
        function=_math_calc, description="share of the values before the first wrong one"
    ),
    "infinitebench_code_run": _make(
        function=_code_run, description="1 if the last word of the answer is the return value"
    ),
    "infinitebench_code_debug": _make(
        function=_code_debug, description="1 if the answer names the right letter or function"
    ),
}
"""By ``infinitebench_`` and the name of the task."""

_make_kvpress = partial(
    Scorer, source="NVIDIA/kvpress@8bb29b9:evaluation/benchmarks/infinite_bench"
)

KVPRESS: Mapping[str, Scorer] = {
    "infinitebench_kvpress_longbook_choice_eng": _make_kvpress(
        function=_kvpress_choice,
        description="1 if the last letter from A to D is right, or else the official score",
    ),
    "infinitebench_kvpress_longdialogue_qa_eng": _make_kvpress(
        function=_kvpress_dialogue, description="1 if any of the names is part of the answer"
    ),
    "infinitebench_kvpress_code_debug": _make_kvpress(
        function=_kvpress_code_debug,
        description="1 if the last letter from A to J is right, or else the official score",
    ),
}
"""The metrics of the peers' variant that differ from the official ones."""


def scorer_of(task: str, variant: str) -> Scorer:
    """Return the metric of a task, as the official code or as ``kvpress`` has it."""
    official = SCORERS[f"infinitebench_{task}"]
    return KVPRESS.get(f"infinitebench_{variant}_{task}", official)


@hookimpl
def sah_scorer() -> Mapping[str, Scorer]:
    """Provide the metrics of InfiniteBench."""
    return {**SCORERS, **KVPRESS}
