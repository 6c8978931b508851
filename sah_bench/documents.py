"""Experiment files as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sah_core.errors import ExperimentError

from .experiment import KEYS


def load_document(path: str | Path) -> dict[str, Any]:
    """Read an experiment file as plain data.

    Raises:
        ExperimentError: There is no such file, it is no YAML, or no mapping.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExperimentError(str(path), "", f"cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ExperimentError(str(path), where, f"not valid YAML: {problem}") from error
    if not isinstance(document, dict):
        raise ExperimentError(
            str(path), "", f"an experiment is a mapping with keys such as {', '.join([*KEYS][:3])}"
        )
    return document


def _refuse_repeated_keys(root: Any) -> None:
    """Raise for a key that stands twice in a mapping: the loader would keep the last one."""
    import yaml

    waiting, visited = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in visited:  # an alias, perhaps of what it stands in
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                waiting.append(value)
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                    problem = f"key {key.value!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
