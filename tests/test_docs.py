"""The documentation names what exists."""

import re
from pathlib import Path

import pytest

from sah_core import registry

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parent.parent


def test_the_plugin_table_of_the_readme_is_what_the_distribution_registers() -> None:
    rows = re.findall(r"^\| (\w+) \| `([\w.-]+)` \|", (ROOT / "README.md").read_text(), re.M)
    registered = [
        (kind.singular, entry.name)
        for kind in registry.kinds()
        for entry in kind.entries()
        if entry.distribution == "sparse-attention-hub"
    ]
    assert sorted(rows) == sorted(registered)


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_hook_and_its_arguments_are_documented() -> None:
    import inspect

    from sah_core import hookspecs

    text = (ROOT / "docs" / "hooks.md").read_text()
    for name, spec in vars(hookspecs).items():
        if not name.endswith("Spec") or not inspect.isclass(spec):
            continue
        for hook, function in vars(spec).items():
            if hook.startswith("sah_"):
                arguments = [a for a in inspect.signature(function).parameters if a != "self"]
                assert f"`{hook}({', '.join(arguments)})`" in text
