"""Requests: what is refused before a model sees it."""

import pytest

from sah_core import Request, Turn
from sah_core.errors import RequestError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": None}, "the context is None; expected a text"),
        ({"questions": 5}, "expected a text or a list of texts, not 5"),
        ({"questions": []}, "at least one question"),
        ({"questions": ["a?", " "]}, "question 1 is empty"),
        ({"answer_prefix": None}, "expected a text or a list of texts, not None"),
        ({"system": 3}, "the system message is 3; expected a text"),
        ({"separator": None}, "the separator is None; expected a text"),
        ({"chat": "no"}, "chat is 'no'; expected True, False or None"),
        ({"turns": "hello"}, "expected a list of turns, not 'hello'"),
        ({"turns": 3}, "expected a list of turns, not 3"),
        ({"turns": ["hello"]}, "'hello' is no turn; expected a role and a content"),
        ({"turns": [{"role": "user"}]}, "is no turn; expected a role and a content"),
        ({"turns": [("system", "x")]}, "role 'system' is not known; use one of user, assistant"),
        ({"turns": [("user", "")]}, "a turn of the user says ''; expected some text"),
        ({"turns": [("assistant", "x")]}, "turn 0 is the assistant's; expected the user's"),
        ({"turns": [("user", "x"), ("user", "y")]}, "turn 1 is the user's; expected the assistant"),
        ({"turns": [("user", "x")]}, "the last turn is the user's; expected the assistant's"),
    ],
)
def test_what_no_model_can_be_asked_is_refused(values, message):
    with pytest.raises(RequestError, match=message):
        Request(**{"context": "c", "questions": "q?"} | values)


def test_turns_are_given_as_themselves_as_pairs_or_as_chat_templates_take_them():
    pairs = [("user", "a"), ("assistant", "b")]
    forms = (
        [Turn(*pair) for pair in pairs],
        pairs,
        [{"role": role, "content": content} for role, content in pairs],
    )
    for form in forms:
        request = Request(context="c", questions="q?", turns=form)
        assert request.turns == (Turn("user", "a"), Turn("assistant", "b"))
