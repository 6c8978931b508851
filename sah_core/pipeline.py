"""Pipelines: an ordered list of maskers, and where it applies.

A pipeline has three equal forms, which round-trip:

    Pipeline.parse("sink(128) | quest(heavy_size=0.05) @ dense_layers=[0,1], prefill=sparse")
    Pipeline.parse({"steps": [{"masker": "sink", "sink_size": 128}, ...], "dense_layers": [0, 1],
                    "prefill": "sparse"})
    Pipeline.of(Sink(sink_size=128), Quest(heavy_size=0.05), dense_layers=[0, 1], prefill="sparse")

The canonical text names every parameter, and every option that is not at its default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from .errors import (
    ParameterError,
    PipelineError,
    UnknownParameterError,
    nearest_names,
    short_repr,
)
from .masker import Masker
from .parameters import from_plain, param, specs, to_plain
from .pipeline_text import ParsedStep, format_call, format_options, parse_text

if TYPE_CHECKING:
    from .registry import Registry

__all__ = ["DENSE", "OPTIONS", "PHASES", "Pipeline"]

DENSE = "dense"
PHASES = ("prefill", "question", "decode")
OPTIONS = ("dense_layers", "layers", "layer_types", *PHASES, "seed", "backend")

_DEFAULT_PHASES = frozenset({"question", "decode"})
_NEEDS_STEPS = (
    "a pipeline needs at least one masker; "
    "write 'dense' for attention as the model computes it by itself"
)


def _to_steps(value: Iterable[Masker]) -> tuple[Masker, ...]:
    return tuple(value)


def _to_phases(value: Iterable[str]) -> frozenset[str]:
    phases = frozenset([value] if isinstance(value, str) else value)
    if not phases <= set(PHASES):
        raise ParameterError("Pipeline", "phases", value, f"some of {', '.join(PHASES)}")
    return phases


@attrs.frozen(repr=False)
class Pipeline:
    """An ordered list of maskers, at most one of them a sampler, and where it applies.

    Attributes:
        steps: the maskers, in the order in which they add to the mask; empty for `dense`.
        dense_layers: layers that stay dense, by index.
        layers: the only layers that are sparse; None for all that `dense_layers` leaves.
        layer_types: the types of layers that are sparse; sliding-window layers are not by default.
        phases: the phases that are sparse, of ``prefill``, ``question`` and ``decode``.
        seed: the seed of the random numbers of all steps.
        backend: the registered name of the backend; ``auto`` takes the fastest that can do it.
        name: a label for tables; no part of what the pipeline is.
    """

    steps: tuple[Masker, ...] = attrs.field(converter=_to_steps)
    dense_layers: tuple[int, ...] = param(
        (), type=tuple[int, ...], minimum=0, help="layers that stay dense"
    )
    layers: tuple[int, ...] | None = param(
        None, type=tuple[int, ...], minimum=0, help="the only layers that are sparse"
    )
    layer_types: tuple[str, ...] = param(
        ("full_attention",), type=tuple[str, ...], help="the types of layers that are sparse"
    )
    phases: frozenset[str] = attrs.field(default=_DEFAULT_PHASES, converter=_to_phases)
    seed: int = param(0, minimum=0, help="seed of the random numbers of all steps")
    backend: str = param("auto", help="registered name of the backend")
    name: str | None = attrs.field(default=None, eq=False)

    def __attrs_post_init__(self) -> None:
        for step in self.steps:
            if not isinstance(step, Masker):
                hint = f"; write {step.__name__}()" if isinstance(step, type) else ""
                raise PipelineError(f"a step must be a masker, not {short_repr(step)}{hint}")
        if not isinstance(self.name, str | None):
            raise ParameterError("Pipeline", "name", self.name, "a string, or none")
        for field in ("dense_layers", "layers", "layer_types"):
            values = getattr(self, field)
            if values is not None:
                object.__setattr__(self, field, tuple(sorted(set(values))))
        for field in ("layers", "layer_types", "phases"):
            if getattr(self, field) is not None and not getattr(self, field):
                raise PipelineError(f"a pipeline with no {field} is never sparse; write 'dense'")
        if self.is_dense and self._options():
            options = format_options(self._options())
            raise PipelineError(f"'dense' takes no options, but {options} was given")
        samplers = [step.name for step in self.steps if step.capabilities.stochastic]
        if len(samplers) > 1:
            names = " and ".join(repr(name) for name in samplers)
            raise PipelineError(f"a pipeline has at most one sampler, but {names} both sample")

    @classmethod
    def dense(cls, name: str | None = None) -> Pipeline:
        """The pipeline that leaves the model as it is."""
        return cls((), name=name)

    @classmethod
    def of(cls, *maskers: Masker, **options: Any) -> Pipeline:
        """Makes a pipeline of maskers.

        Args:
            *maskers: the steps, in order.
            **options: the options of the text form (``prefill="sparse"``, ``dense_layers=[0]``,
                ...), ``phases`` and ``name``.

        Raises:
            PipelineError: if there is no masker, or more than one sampler.
            ParameterError: for an option that does not exist or a value that is not allowed.
        """
        if not maskers:
            raise PipelineError(_NEEDS_STEPS)
        phases = {"phases": options.pop("phases")} if "phases" in options else {}
        return cls(maskers, **_read_options(options, phases))

    @classmethod
    def parse(cls, source: object, registry: Registry | None = None) -> Pipeline:
        """Reads a pipeline in any of its forms.

        Args:
            source: a text; a list of steps; a mapping with ``steps``, options and ``name``; a
                masker; or a pipeline. A step is a text such as ``sink(128)``, a mapping such as
                ``{"masker": "sink", "sink_size": 128}``, or a masker.
            registry: where names are looked up; the global one by default.

        Raises:
            PipelineSyntaxError: a text does not parse.
            PipelineError: the pipeline makes no sense.
            ParameterError: a parameter or option does not exist, or its value is not allowed.
            UnknownPluginError: no masker or backend has this name; likewise the other errors of
                ``registry.maskers[name]``.
        """
        if isinstance(source, Pipeline):
            return source
        if isinstance(source, Masker):
            return cls.of(source)
        names = _global_registry() if registry is None else registry
        if isinstance(source, str):
            pipeline = _from_text(source, names)
        elif isinstance(source, Mapping):
            pipeline = _from_mapping(source, names)
        elif isinstance(source, Sequence):
            pipeline = _from_mapping({"steps": source}, names)
        else:
            raise PipelineError(
                f"a pipeline is a text, a list or a mapping, not {short_repr(source)}"
            )
        if pipeline.backend != "auto" and pipeline.backend not in names.backends:
            names.backends.entry(pipeline.backend)  # raises what is wrong with the name
        return pipeline

    @property
    def is_dense(self) -> bool:
        """Whether the model is left as it is."""
        return not self.steps

    @property
    def prefills(self) -> bool:
        """Whether its prefill is sparse, so that no other pipeline can answer from it."""
        return not self.is_dense and "prefill" in self.phases

    def check_artifacts(self) -> None:
        """Find files of the steps that are missing or damaged before a model is loaded.

        Raises:
            ArtifactError: The first that there is.
        """
        for step in self.steps:
            step.check_artifacts()

    @property
    def text(self) -> str:
        """The canonical text, which names every parameter."""
        if self.is_dense:
            return DENSE
        names = _global_registry().maskers
        calls = [format_call(names.name_of(type(step)), to_plain(step)) for step in self.steps]
        options = format_options(self._options())
        return " | ".join(calls) + (f" @ {options}" if options else "")

    @property
    def label(self) -> str:
        """The name if there is one, else the text."""
        return self.name or self.text

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Pipeline.parse({self.text!r})"

    def to_plain(self) -> str | dict[str, Any]:
        """The pipeline as plain data, its label left out: what `parse` reads back exactly.

        Returns:
            ``"dense"``, or the steps with all their parameters and the options that are not at
            their default.
        """
        if self.is_dense:
            return DENSE
        names = _global_registry().maskers
        steps = [{"masker": names.name_of(type(step)), **to_plain(step)} for step in self.steps]
        return {"steps": steps, **self._options()}

    def is_sparse(self, layer: int, layer_type: str | None, phase: str) -> bool:
        """Whether the pipeline selects keys in this layer and phase, rather than leave it dense.

        Args:
            layer: the index of the layer.
            layer_type: such as ``sliding_attention``; None if the model names no types.
            phase: ``prefill``, ``question`` or ``decode``.
        """
        return (
            not self.is_dense
            and phase in self.phases
            and layer not in self.dense_layers
            and (self.layers is None or layer in self.layers)
            and (layer_type is None or layer_type in self.layer_types)
        )

    def __or__(self, other: Masker | Pipeline) -> Pipeline:
        """Appends steps; the options are those of the side that has any.

        Raises:
            PipelineError: if one side is dense, or both have options and they differ.
        """
        if isinstance(other, Masker):
            return attrs.evolve(self, steps=(*self.steps, other), name=None)
        if not isinstance(other, Pipeline):
            return NotImplemented
        if self.is_dense or other.is_dense:
            raise PipelineError("'dense' is a whole pipeline: it cannot be joined with maskers")
        if self._options() and other._options() and self._options() != other._options():
            raise PipelineError("two pipelines with different options cannot be joined")
        base = self if self._options() else other
        return attrs.evolve(base, steps=self.steps + other.steps, name=None)

    def _options(self) -> dict[str, Any]:
        """The options that are not at their default, in their plain form and canonical order."""
        found = {
            spec.name: spec.to_plain(getattr(self, spec.name))
            for spec in specs(Pipeline)
            if getattr(self, spec.name) != spec.default
        }
        for phase in self.phases ^ _DEFAULT_PHASES:
            found[phase] = "sparse" if phase in self.phases else "dense"
        return {name: found[name] for name in OPTIONS if name in found}


def _global_registry() -> Registry:
    from .registry import registry

    return registry


def _read_options(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Pipeline` that options in their plain form stand for."""
    arguments = dict(given)
    phases = set(arguments.get("phases", _DEFAULT_PHASES))
    for name, value in options.items():
        if name not in (*OPTIONS, "name"):
            expected = f"one of {', '.join(OPTIONS)}"
            nearest = nearest_names(str(name), OPTIONS)
            raise UnknownParameterError("Pipeline", name, value, expected, nearest)
        if name not in PHASES:
            arguments[name] = value
        elif value == "sparse":
            phases.add(name)
        elif value == "dense":
            phases.discard(name)
        else:
            raise ParameterError("Pipeline", name, value, "sparse or dense")
    if phases != _DEFAULT_PHASES:
        arguments["phases"] = phases
    return arguments


def _from_text(text: str, registry: Registry) -> Pipeline:
    if not text.strip():
        raise PipelineError(_NEEDS_STEPS)
    parsed = parse_text(text)
    if [step.name for step in parsed.steps] == [DENSE]:
        [step] = parsed.steps
        if step.arguments or step.positional is not attrs.NOTHING:
            raise PipelineError("'dense' takes no parameters; maskers do, such as 'sink(128)'")
        return Pipeline((), **_read_options(parsed.options, {}))
    steps = [_from_call(step, registry) for step in parsed.steps]
    return Pipeline.of(*steps, **parsed.options)


def _from_call(step: ParsedStep, registry: Registry) -> Masker:
    cls = _masker_class(step.name, registry)
    arguments = dict(step.arguments)
    if step.positional is not attrs.NOTHING:
        declared = specs(cls)
        if not declared:
            raise PipelineError(
                f"{step.name} takes no parameters, but {step.positional!r} was given"
            )
        first = declared[0].name
        if first in arguments:
            raise PipelineError(f"{step.name}: {first} is given twice")
        arguments = {first: step.positional, **arguments}
    return from_plain(cls, arguments)


def _from_mapping(source: Mapping[str, Any], registry: Registry) -> Pipeline:
    options = {key: value for key, value in source.items() if key != "steps"}
    steps = source.get("steps")
    if isinstance(steps, str):
        inner = Pipeline.parse(steps, registry)
        if inner._options():
            raise PipelineError("options go beside 'steps', not into its text after an '@'")
        return Pipeline(inner.steps, **_read_options(options, {}))
    if not isinstance(steps, Sequence) or not steps:
        raise PipelineError(_NEEDS_STEPS)
    return Pipeline.of(*(_from_step(step, registry) for step in steps), **options)


def _from_step(step: object, registry: Registry) -> Masker:
    if isinstance(step, Masker):
        return step
    if isinstance(step, str):
        parsed = parse_text(step)
        if len(parsed.steps) > 1 or parsed.options:
            raise PipelineError(f"a step is one masker, not {short_repr(step)}")
        return _from_call(parsed.steps[0], registry)
    if isinstance(step, Mapping) and isinstance(step.get("masker"), str):
        values = {key: value for key, value in step.items() if key != "masker"}
        return from_plain(_masker_class(step["masker"], registry), values)
    raise PipelineError(
        "a step is a text such as 'sink(128)' or a mapping such as "
        f"{{masker: sink, sink_size: 128}}, not {short_repr(step)}"
    )


def _masker_class(name: str, registry: Registry) -> type[Masker]:
    if name == DENSE:
        raise PipelineError("'dense' is a whole pipeline: it cannot be joined with maskers")
    return registry.maskers[name]
