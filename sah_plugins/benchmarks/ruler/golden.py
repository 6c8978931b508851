"""Golden samples of the official generator."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sah_core.benchmark import Benchmark, Example

from .tasks import TASKS

_INPUTS = "ruler_inputs"
_CASE = {"task", "max_seq_length", "random_seed", "num_samples", "samples"}
_TOKEN = re.compile(r"\w+|[^\w\s]")


class WordsAndSigns:
    """The tokenizer of the golden samples: a token per run of word characters and per sign."""

    bos_token_id = None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Return one id per token; only their number means anything."""
        return {"input_ids": [0] * sum(1 for _ in _TOKEN.finditer(text))}


def check_samples(
    content: Mapping[str, Any], folder: Path, make: Callable[..., Benchmark]
) -> Iterable[tuple[str, str]] | None:
    """Make the samples of a golden file again.

    Args:
        content: lists of cases, each with the settings of a run of the generator and the samples
            that it wrote.
        folder: where ``ruler_inputs`` lies, with the texts that the generator read.
        make: makes the benchmark from its parameters.

    Returns:
        Per sample its name and what differs; None if there are no such cases.
    """
    cases = [
        case
        for value in content.values()
        if isinstance(value, list)
        for case in value
        if isinstance(case, dict) and case.keys() >= _CASE and case["task"] in TASKS
    ]
    return _check_cases(cases, folder / _INPUTS, make) if cases else None


def _check_cases(
    cases: list[dict[str, Any]], inputs: Path, make: Callable[..., Benchmark]
) -> Iterator[tuple[str, str]]:
    tokenizer = WordsAndSigns()
    for case in cases:
        benchmark = make(
            lengths=(case["max_seq_length"],),
            include=(case["task"],),
            samples=case["num_samples"],
            essay_path=str(inputs / "essay.txt"),
            squad_path=str(inputs / "squad_mini.json"),
            hotpot_path=str(inputs / "hotpot_mini.json"),
        )
        [task] = benchmark.tasks()
        made = benchmark.examples(task, tokenizer, case["random_seed"])
        for number, (example, sample) in enumerate(zip_longest(made, case["samples"])):
            yield f"{task} sample {number}", _difference(example, sample, tokenizer)


def _difference(
    example: Example | None, sample: Mapping[str, Any] | None, tokenizer: WordsAndSigns
) -> str:
    if example is None or sample is None:
        return "no sample was made" if example is None else "no such sample was expected"
    text = example.context + example.question
    tokens = tokenizer(text + example.answer_prefix, add_special_tokens=False)["input_ids"]
    made = {
        "input": text,
        "input_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "input_chars": len(text),
        "answer_prefix": example.answer_prefix,
        "outputs": list(example.references),
        "length": len(tokens) + example.max_new_tokens,
    }
    wrong = [name for name in made if name in sample and made[name] != sample[name]]
    return f"{', '.join(wrong)} differ" if wrong else ""
