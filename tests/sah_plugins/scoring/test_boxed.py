"""Boxed answers, whose braces may be nested."""

import pytest

from sah_plugins.scoring.boxed import as_integer, last_boxed, last_integer

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{33}.", "33"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{a {b} c}}", r"\text{a {b} c}"),
        (r"\boxed{12} and then \boxed{34", "12"),
        (r"\boxed{}", ""),
        (r"boxed{3}", None),
        (r"\boxed 3", None),
        ("", None),
    ],
)
def test_the_last_complete_box_counts(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("content", "number"),
    [
        ("33", 33),
        ("033", 33),
        (r"\text{73}", 73),
        (" 7 3 ", 73),
        ("1,024", 1024),
        (r"1{,}024", 1024),
        (r"$\mathbf{5}$", 5),
        ("73.", 73),
        (r"73\%", 73),
        ("{73}", 73),
        ("-12", None),
        (r"\frac{1}{2}", None),
        (r"33 = 11\cdot 3", None),
        ("m+n=73", None),
        ("12.5", None),
        ("", None),
        ("２", None),
    ],
)
def test_a_box_holds_an_integer_or_it_does_not(content, number):
    assert as_integer(content) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Using 3 cases we get 12.", 12),
        ("7\nso it is 1,024\n\n", 1024),
        ("7\nno number", None),
        ("", None),
    ],
)
def test_without_a_box_the_last_integer_of_the_last_line_counts(text, number):
    assert last_integer(text) == number
