"""How messages are written: on one line, cut where long, with a guess at what was meant."""

from collections.abc import Iterable

_LONGEST_VALUE = 80

SHORTEST_ABBREVIATION = 3
"""Letters from which on the start of a name is taken for the name cut short."""


def one_line(text: str) -> str:
    """Joins the lines of `text` with single spaces."""
    return " ".join(text.split())


def short_repr(value: object) -> str:
    """The repr of `value` on one line, cut in the middle past 80 characters."""
    text = one_line(repr(value))
    if len(text) <= _LONGEST_VALUE:
        return text
    half = (_LONGEST_VALUE - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def nearest_names(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The at most three of `names` that a slip could have turned into `name`, nearest first; those
    that it begins, as an abbreviation does, stand behind.
    """
    from difflib import get_close_matches

    known = sorted(names)
    found = get_close_matches(name, known, n=3, cutoff=0.6)
    if len(name) >= SHORTEST_ABBREVIATION:
        found += [other for other in known if other.startswith(name) and other not in found]
    return tuple(found[:3])


def did_you_mean(nearest: tuple[str, ...]) -> str:
    """The question that offers some names, with a space before it; empty without any."""
    return f" did you mean {' or '.join(repr(name) for name in nearest)}?" if nearest else ""


def see_plugin(owner: str) -> str:
    """The end of a sentence about a parameter, with the command that shows what is declared."""
    # No command shows a class without a registered name, which shows up under its class name, nor
    # the options of a call.
    is_plugin = owner == owner.lower() and owner not in ("request", "generation")
    return f". see 'sah-bench plugins show {owner}'." if is_plugin else "."
