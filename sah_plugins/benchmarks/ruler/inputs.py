"""What the tasks are made from and fitted with, whichever way their samples are drawn."""

from collections.abc import Callable, Sequence

import attrs

from sah_plugins.text.fitting import PromptMeter

from .questions import QuestionSet
from .tasks import Prompt


@attrs.frozen
class Counter:
    """Counts tokens."""

    meter: PromptMeter

    def __call__(self, prompt: Prompt) -> int:
        """Return the tokens of a prompt as the model gets it, its answer prefix included."""
        return self.meter.prompt_tokens(prompt.input, prompt.answer_prefix)

    def text(self, text: str) -> int:
        """Return the tokens of a text by itself."""
        return self.meter.text_tokens(text)


@attrs.frozen(kw_only=True)
class Inputs:
    """The texts that the tasks draw on; each is asked for by the tasks that need it alone.

    Attributes:
        keys: the words of niah, sorted.
        words: the words of cwe, sorted.
        more_words: the list that cwe turns to when it needs more than ``words``, given how many.
        essay: the words of the essay.
        split: cuts a text into sentences.
        sentences: the sentences of the essay.
        questions: the documents and questions of qa.
    """

    keys: Callable[[], Sequence[str]]
    words: Callable[[], Sequence[str]]
    more_words: Callable[[int], Sequence[str]]
    essay: Callable[[], list[str]]
    split: Callable[[str], list[str]]
    sentences: Callable[[], Sequence[str]]
    questions: Callable[[], QuestionSet]
