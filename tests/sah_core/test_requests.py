"""Requests: what is refused before a model sees it."""

import pytest

from sah_core import Request
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
    ],
)
def test_what_no_model_can_be_asked_is_refused(values, message):
    with pytest.raises(RequestError, match=message):
        Request(**{"context": "c", "questions": "q?"} | values)
