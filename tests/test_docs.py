"""The documentation names what exists."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from sah_core import registry

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parent.parent


def test_the_plugin_table_of_the_readme_names_what_the_distribution_registers() -> None:
    """A masker is added by its own files and its entry point: the table may do without it."""
    rows = re.findall(r"^\| (\w+) \| `([\w.-]+)` \|", (ROOT / "README.md").read_text(), re.M)
    registered = [
        (kind.singular, entry.name)
        for kind in registry.kinds()
        for entry in kind.entries()
        if entry.distribution == "sparse-attention-hub"
    ]
    assert len(rows) == len(set(rows))
    assert set(rows) <= set(registered)
    assert all(kind == "masker" for kind, _ in set(registered) - set(rows))


MASKERS = [e.name for e in registry.maskers.entries() if e.distribution == "sparse-attention-hub"]


@pytest.mark.parametrize("name", MASKERS)
def test_every_masker_has_a_page_with_its_parameters_and_their_defaults(name: str) -> None:
    from sah_core.parameters import specs

    pages = ROOT / "docs" / "maskers"
    text = (pages / f"{name}.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.M)
    shown = {parameter: default.strip(" `").lower() for parameter, default in rows}
    declared = {
        spec.name: "required" if spec.required else str(spec.to_plain(spec.default)).lower()
        for spec in specs(registry.maskers[name])
    }
    assert shown == declared


@pytest.mark.parametrize("name", MASKERS)
def test_every_masker_says_what_differs_from_the_paper(name: str) -> None:
    page = (ROOT / "docs" / "maskers" / f"{name}.md").read_text()
    docstring = inspect.getdoc(inspect.getmodule(registry.maskers[name])) or ""
    for text in (page, " ".join(docstring.split())):
        assert re.search(r"Differs from (the|no) papers?", text)


def prose_of(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors_of(page: Path) -> set[str]:
    """What links to the headings of a page end in."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "plugins_contrib").rglob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_documentation_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", prose_of(page)):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors_of(linked), f"{page.name} links to {target}#{anchor}"


def test_every_hook_and_its_arguments_are_documented() -> None:
    from sah_core import hookspecs

    text = (ROOT / "docs" / "hooks.md").read_text()
    for name, spec in vars(hookspecs).items():
        if not name.endswith("Spec") or not inspect.isclass(spec):
            continue
        for hook, function in vars(spec).items():
            if hook.startswith("sah_"):
                arguments = [a for a in inspect.signature(function).parameters if a != "self"]
                assert f"`{hook}({', '.join(arguments)})`" in text


def test_every_name_of_the_core_is_documented() -> None:
    import sah_core

    text = (ROOT / "docs" / "python.md").read_text()
    tables, _, errors = text.partition("## Errors")
    named = re.findall(r"^\| (`[^|]+`) \|", tables, re.M)
    shown = [name for cell in named for name in re.findall(r"`(\w+)`", cell)]
    shown += [name for name in re.findall(r"`(\w+)`", errors) if name != "SahError"]
    assert sorted([*shown, "SahError"]) == sorted(sah_core.__all__)


def test_every_error_can_be_imported_from_the_core() -> None:
    import sah_core
    from sah_core import errors

    known = {name for name in errors.__all__ if name.endswith("Error")}
    assert known == {name for name in sah_core.__all__ if name.endswith("Error")}


def test_every_scoring_primitive_is_listed_with_who_makes_it_fast() -> None:
    from sah_core.ops import Ops

    page = (ROOT / "docs" / "ops.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (yes|) *\|$", page, re.M)
    assert len(rows) == len(dict(rows))
    assert set(dict(rows)) == {name for name in dir(Ops) if not name.startswith("_")}
    if not importlib.util.find_spec("triton"):
        pytest.skip("which of them have a kernel is seen with triton only")
    fast = vars(type(registry.backends["triton"]().ops))
    assert {name for name, kernel in rows if kernel} == {n for n in fast if not n.startswith("_")}


def test_every_error_has_a_section_with_an_example() -> None:
    from sah_core import errors

    known = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SahError)
    } - {"SahError"}
    text = (ROOT / "docs" / "errors.md").read_text()
    sections = re.split(r"^### `(\w+)`$", text, flags=re.M)
    described = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert set(described) == known
    for name, section in described.items():
        assert "```python" in section, f"{name} has no example"
        assert "```text" in section, f"the example of {name} shows no message"
        assert name in section.split("```", 1)[1], f"the example of {name} is of something else"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_runner", ROOT / ".ci" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a  b\n\nc", "a b\nc  ", True),
        ("took … s", "took 1.25 s", True),
        ("took … s", "took 1.25 m", False),
        ("…\nlast", "one\ntwo\nlast", True),
        ("first\n…", "first", True),
        ("first\n…\nlast", "first\nlast", True),
        ("first\n…\nlast", "first\nlast\nmore", False),
        ("a…", "b", False),
        ("───", "────────", True),
        ("(a|b)", "a", False),
    ],
)
def test_shown_output_may_leave_out_what_changes(
    runner: ModuleType, shown: str, printed: str, same: bool
) -> None:
    assert runner.matches(shown, printed) is same


PAGE = """
<!-- file: sub/name.txt -->
```text
hello
```

```bash
cat sub/name.txt; echo careful >&2
```

```text
hello
```

<!-- exits: 3 -->
```bash
echo gone >&2; exit 3
```

```text
gone
```

```bash
exit 1
```

Words in between.

```text
not the output of the block above
```

<!-- skip: needs a card -->
```python
raise SystemExit
```

```python
from pathlib import Path

print(Path("sub/name.txt").read_text() * 2)
```

```text
hello
…
```
"""


def test_the_blocks_of_a_page_run_in_one_folder(runner: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert runner.Page(page, tmp_path / "work").run() == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hello\n```\n\n<!-- exits", "hallo\n```\n\n<!-- exits", "page.md:7 printed"),
        ("exits: 3", "exits: 2", "ended with exit code 3, not 2"),
        ("echo careful >&2", "false", "ended with exit code 1, not 0"),
        (" * 2", ".upper()", r"page.md:\d+ printed"),
    ],
)
def test_a_page_that_shows_something_else_stops_the_run(
    runner: ModuleType, tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in PAGE
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace(old, new))
    with pytest.raises(SystemExit, match=message):
        runner.Page(page, tmp_path / "work").run()
