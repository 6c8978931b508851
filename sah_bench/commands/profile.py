"""``sah-bench profile``: time, bytes and memory of pipelines beside every dense form of torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..options import PIPELINE_HELP, debug_option, plugin_names, plugin_option

if TYPE_CHECKING:
    import torch

    from ..profiling.attention import Plan
    from ..profiling.decode import DecodePlan

_ARGUMENTS = "sah_bench.profile.arguments"
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "dtype": ("bfloat16",),
        "backend": ("triton", "gather"),
        "batch": (1, 4),
        "keys": (32768, 131072),
        "rounds": 7,
    },
    "cpu": {
        "dtype": ("float32",),
        "backend": ("gather",),
        "batch": (1,),
        "keys": (32768,),
        "rounds": 15,
    },
}
_COMMON = {"heads": (32,), "kv_heads": (8,), "head_dim": (128,), "query_len": (1,)}
_COUNTS = ("batch", "heads", "kv_heads", "keys", "head_dim", "query_len")


class _Remembering(click.Command):
    """Keeps the arguments as they were typed, for the record."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


class _Listed(click.ParamType):  # type: ignore[type-arg]
    """Numbers or names separated by commas."""

    def __init__(self, item: type) -> None:
        self.item = item
        self.name = "integers" if item is int else "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.item(part.strip()) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.name} such as 1,4", param, ctx)


def _default(option: str) -> str:
    """What an option that depends on the device is if it is not given, for its help."""
    on = {device: known[option] for device, known in _DEFAULTS.items()}
    texts = {
        device: ",".join(map(str, value)) if isinstance(value, tuple) else value
        for device, value in on.items()
    }
    return f"if not given {texts['cuda']} on CUDA, {texts['cpu']} on a CPU"


_INTEGERS, _NAMES = _Listed(int), _Listed(str)


@click.command(cls=_Remembering)
@click.option("--pipeline", "pipelines", multiple=True, help=f"{PIPELINE_HELP} May be repeated.")
@click.option(
    "--backend",
    type=_NAMES,
    multiple=True,
    help=f"Backends to compare; {_default('backend')}.",
    shell_complete=plugin_names("backends"),
)
@click.option("--batch", type=_INTEGERS, multiple=True, help=f"Sequences; {_default('batch')}.")
@click.option("--heads", type=_INTEGERS, multiple=True, help="Query heads; 32 if not given.")
@click.option("--kv-heads", type=_INTEGERS, multiple=True, help="KV heads; 8 if not given.")
@click.option("--keys", type=_INTEGERS, multiple=True, help=f"Keys; {_default('keys')}.")
@click.option(
    "--head-dim", type=_INTEGERS, multiple=True, help="Channels per head; 128 if not given."
)
@click.option("--query-len", type=_INTEGERS, multiple=True, help="Query rows; 1 if not given.")
@click.option(
    "--dtype",
    type=_NAMES,
    multiple=True,
    help=f"bfloat16, float16 or float32; {_default('dtype')}.",
)
@click.option("--device", help="Such as cpu or cuda; CUDA if there is one.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help=f"Interleaved rounds that count; {_default('rounds')}.",
)
@click.option(
    "--warmup", type=click.IntRange(min=0), default=2, help="Rounds before these that do not."
)
@click.option("--cold/--no-cold", default=True, help="On a GPU, also with a swept L2 cache.")
@click.option(
    "--model",
    help="Measure whole decode steps of this model.",
    shell_complete=plugin_names("models"),
)
@click.option("--model-shape", help="The same with random weights, such as llama-3.1-8b.")
@click.option(
    "--layers", type=click.IntRange(min=1), help="Layers to keep of --model-shape; else all."
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=4096,
    help="Tokens in the cache before whole decode steps.",
)
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=32, help="Decode steps per round."
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for JSON and plot; else none."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
@click.option("--no-plot", is_flag=True, help="Draw no plot.")
@plugin_option
@debug_option
def profile(
    pipelines: tuple[str, ...],
    device: str | None,
    rounds: int | None,
    warmup: int,
    output: Path | None,
    as_json: bool,
    no_plot: bool,
    **options: Any,
) -> None:
    """Measure selection and attention of pipelines beside every dense form of torch.

    Every combination of the sizes is measured in one process, in interleaved rounds: GPU time under
    CUDA-graph replay and wall time, the bytes that must move, the share of the bandwidth limit,
    peak memory. With --model or --model-shape, tokens per second of whole decode steps.
    """
    from ..profiling import plot, report, tables
    from ..profiling.timing import measure_copy

    plan = _plan(pipelines, _device(device), rounds, warmup, options)
    if output is not None:
        report.prepare(output)

    def begin(what: str) -> None:
        click.echo(what, err=True)

    copy = measure_copy(plan.device, plan.rounds)
    rows = list(plan.measure(copy, begin))
    setting = report.Setting(
        command=shlex.join(["sah-bench", "profile", *click.get_current_context().meta[_ARGUMENTS]]),
        device=plan.device,
        copy=copy,
        rounds=plan.rounds,
        warmup=plan.warmup,
    )
    content = report.document(setting, rows, plan.to_plain())
    if as_json:
        click.echo(json.dumps(content, indent=1))
    else:
        tables.show(setting, rows, str(plan))
    if output is not None:
        written = report.write(output, content)
        click.echo(f"profile: {written}", err=as_json)
        if not no_plot:
            click.echo(plot.plot(output, setting, rows), err=as_json)
    if any(row.status in ("failed", "out of memory") for row in rows):
        raise click.exceptions.Exit(1)


def _plan(
    pipelines: tuple[str, ...],
    device: torch.device,
    rounds: int | None,
    warmup: int,
    options: dict[str, Any],
) -> Plan | DecodePlan:
    """What the options ask for, checked."""
    from sah_core import Pipeline, registry

    from ..profiling.shapes import bad_option

    if not pipelines:
        raise bad_option("--pipeline", "give at least one, such as 'sink(128) | local(128)'")
    parsed = tuple((text, Pipeline.parse(text)) for text in pipelines)
    for _, pipeline in parsed:
        pipeline.check_artifacts()
    defaults = {**_COMMON, **_DEFAULTS[device.type]}
    sizes = {name: _flat(options[name]) or defaults[name] for name in (*_COUNTS, "dtype")}
    backends = _flat(options["backend"]) or _installed(defaults["backend"])
    for name in (*backends, *(p.backend for _, p in parsed)):
        if name != "auto":
            registry.backends[name]
    _check_dtypes(sizes["dtype"])
    make_plan = _decode_plan if _model_given(options) else _attention_plan
    return make_plan(
        pipelines=parsed,
        backends=backends,
        device=device,
        rounds=rounds or defaults["rounds"],
        warmup=warmup,
        sizes=sizes,
        options=options,
    )


def _flat(values: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
    return tuple(item for value in values for item in value)


def _installed(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the default backends that are there."""
    from sah_core import registry

    return tuple(name for name in names if name in registry.backends)


def _device(name: str | None) -> torch.device:
    import torch

    from ..profiling.shapes import bad_option

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise bad_option("--device", f"{name!r} is not a device; try cpu or cuda") from error
    if device.type not in _DEFAULTS:
        raise bad_option("--device", f"{name!r} cannot be measured; cpu and cuda can")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise bad_option("--device", f"there is no {name}; {count} CUDA devices are visible")
        torch.cuda.set_device(device.index or 0)
    return device


def _check_dtypes(names: tuple[str, ...]) -> None:
    from ..profiling.shapes import DTYPES, bad_option

    for name in names:
        if name not in DTYPES:
            raise bad_option("--dtype", f"{name!r} is not one of {', '.join(DTYPES)}")


def _model_given(options: dict[str, Any]) -> bool:
    from ..profiling.shapes import bad_option

    if options["model"] and options["model_shape"]:
        raise bad_option("--model-shape", "give either it or --model")
    if options["layers"] is not None and not options["model_shape"]:
        raise bad_option("--layers", "it goes with --model-shape only")
    return bool(options["model"] or options["model_shape"])


def _attention_plan(*, sizes: dict[str, Any], options: dict[str, Any], **given: Any) -> Plan:
    from sah_core.attention import check_layers

    from ..profiling.attention import Plan
    from ..profiling.forms import LAYERS
    from ..profiling.shapes import shapes

    for _, pipeline in given["pipelines"]:
        check_layers(pipeline, LAYERS)
    return Plan(shapes=tuple(shapes(sizes)), cold=options["cold"], **given)


def _decode_plan(*, sizes: dict[str, Any], options: dict[str, Any], **given: Any) -> DecodePlan:
    from ..profiling.decode import DecodePlan
    from ..profiling.made_up import MODEL_SHAPES
    from ..profiling.shapes import bad_option

    shape = options["model_shape"]
    if shape and shape not in MODEL_SHAPES:
        raise bad_option("--model-shape", f"{shape!r} is not known: {', '.join(MODEL_SHAPES)}")
    for name in _COUNTS[1:]:
        if options[name]:
            raise bad_option(f"--{name.replace('_', '-')}", "the model decides it")
    for name in ("batch", "dtype"):
        if len(options[name]) and len(_flat(options[name])) > 1:
            raise bad_option(f"--{name}", "whole decode steps take one value")
    if sizes["batch"][0] < 1:
        raise bad_option("--batch", f"{sizes['batch'][0]} is not positive")
    return DecodePlan(
        model=options["model"],
        shape=shape,
        layers=options["layers"],
        context=options["context"],
        new_tokens=options["new_tokens"],
        batch=sizes["batch"][0],
        dtype=sizes["dtype"][0],
        **given,
    )
