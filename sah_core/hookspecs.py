"""The hooks: what a plugin implements, kind by kind, and what an observer may listen to.

A plugin is a module (or an instance) that an entry point names. It implements the one hook of its
kind:

    from sah_core import hookimpl

    @hookimpl
    def sah_masker():
        return Quest

The hook of a kind is called once per registry, when the plugin's name is first used, and never to
list names. The registry calls the implementation of the one plugin that was asked for, so results
of different plugins never mix. The hook must not register, patch, print or read files, and should
be instant: the work belongs into the class that it returns.

Observer hooks are the opposite: every observer of a run is called, in the order in which they were
given, and results are ignored. Their arguments are public contract: an implementation may take any
subset of them, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from .backend import Backend
    from .benchmark import Benchmark
    from .inputs import Inputs
    from .mask import Mask
    from .masker import Masker
    from .pipeline import Pipeline
    from .requests import Request, Response
    from .scorer import Scorer

__all__ = [
    "PROJECT",
    "AdapterSpec",
    "BackendSpec",
    "BenchmarkSpec",
    "MaskerSpec",
    "MetricSpec",
    "ModelSpec",
    "ObjectiveSpec",
    "ObserverSpec",
    "ScorerSpec",
    "hookimpl",
    "hookspec",
]

F = TypeVar("F", bound=Callable[..., Any])

PROJECT = "sah"

hookspec = pluggy.HookspecMarker(PROJECT)
"""Marks a method as the specification of the hook of its name."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function or method as the implementation of the hook of its name."""


def _first(function: F) -> F:
    """Marks a specification whose first result is the result."""
    return hookspec(firstresult=True)(function)


class MaskerSpec:
    """The hook of the entry-point group ``sah.maskers``."""

    @_first
    def sah_masker(self) -> type[Masker] | None:
        """Names the masker class of this plugin.

        Called once, when ``registry.maskers[name]`` or a pipeline first uses the name.

        Must not make an instance: parameters come from the pipeline.

        Returns:
            An attrs-frozen subclass of `Masker` whose ``name`` is the registered name. Exactly one
            plugin is asked; its result is the result.

        Raises:
            BrokenPluginError: by the registry, if the hook is missing, raises, or returns what is
                no subclass of `Masker`, a class without ``add_mask`` or one with another name.

        Example:
            @hookimpl
            def sah_masker():
                return Quest
        """


class AdapterSpec:
    """The hook of the entry-point group ``sah.adapters``."""

    @_first
    def sah_adapter(self) -> type[Any] | None:
        """Names the adapter class of this plugin: a family of models behind one interface.

        Called once, when ``registry.adapters[name]`` is first used.

        Must not load a model: the class does when it is made from a model name.

        Returns:
            A class made as ``cls(model_name, pipeline=..., model_kwargs=..., tokenizer_kwargs=...,
            device=..., dtype=...)`` whose ``name`` is the registered name, with
            ``process_request``, ``prefill``, ``answer`` and ``identity``; class methods
            ``check_model(model_name)`` and ``check_generation(generation_kwargs)``, if it has them,
            find mistakes before anything is loaded, and ``plain_generation(generation_kwargs)``
            gives generation options with the content of the files that they name. Exactly one
            plugin is asked; its result is the result.

        Raises:
            BrokenPluginError: by the registry, if the hook is missing, raises, returns no class,
                one that lacks a method, or one with another name.

        Example:
            @hookimpl
            def sah_adapter():
                return HuggingFaceAdapter
        """


class BackendSpec:
    """The hook of the entry-point group ``sah.backends``."""

    @_first
    def sah_backend(self) -> type[Backend] | None:
        """Names the backend class of this plugin: one way to execute a mask.

        Called once, when a pipeline first asks for the backend or ``auto`` considers it.

        Must not compile kernels or touch a device: `Backend.refuses` says what cannot run here.

        Returns:
            A subclass of `Backend`, made without arguments, whose ``name`` is the registered name.
            Exactly one plugin is asked; its result is the result.

        Raises:
            BrokenPluginError: by the registry, if the hook is missing, raises, or returns what is
                no subclass of `Backend`, a class without ``refuses`` or ``attend``, or one with
                another name.

        Example:
            @hookimpl
            def sah_backend():
                return Gather
        """


class BenchmarkSpec:
    """The hook of the entry-point group ``sah.benchmarks``."""

    @_first
    def sah_benchmark(self) -> type[Benchmark] | None:
        """Names the benchmark class of this plugin.

        Called once, when ``registry.benchmarks[name]`` or an experiment first uses the name.

        Must not load or generate data: `Benchmark.examples` does.

        Returns:
            An attrs-frozen subclass of `Benchmark` whose ``name`` is the registered name. Exactly
            one plugin is asked; its result is the result.

        Raises:
            BrokenPluginError: by the registry, if the hook is missing, raises, returns what is no
                subclass of `Benchmark`, or returns a class with another name.

        Example:
            @hookimpl
            def sah_benchmark():
                return Needle
        """


class ScorerSpec:
    """The hook of the entry-point group ``sah.scorers``."""

    @_first
    def sah_scorer(self) -> Mapping[str, Scorer] | None:
        """Names the metrics of one family, such as those of a benchmark.

        Called once, when ``registry.scorers[name]`` is first used, or when a metric whose name
        begins with the family's is looked for.

        Must not import optional libraries: a scorer does when it is first called.

        Returns:
            A mapping from the name of a metric, as golden files and `TaskInfo.metric` have it, to
            its `Scorer`. Exactly one plugin is asked; its result is the result.

        Raises:
            BrokenPluginError: by the registry, if the hook is missing, raises, or returns anything
                but a mapping from texts to at least one `Scorer`.

        Example:
            @hookimpl
            def sah_scorer():
                return {"longbench_qa_f1": QA_F1, "longbench_rouge": ROUGE}
        """


class MetricSpec:
    """The hook of the entry-point group ``sah.metrics``."""

    @_first
    def sah_metric(self) -> type[Any] | None:
        """Names the metric class of this plugin: an observer that adds up a result.

        Called once, when an experiment or ``--metric`` first uses the name.

        Must not start to measure: every run makes its own instances.

        Returns:
            A class whose instances implement hooks of `ObserverSpec` and have ``result() -> dict``
            and ``reset()``, a subclass of `Metric` as a rule; its ``name`` is the registered name.
            It is made without arguments, or with those parameters that it declares by `param`.
            Exactly one plugin is asked; its result is the result.

        Raises:
            BrokenPluginError: by the registry, if the hook is missing, raises, returns no class,
                one without ``result`` or ``reset``, one that implements an observer hook which does
                not exist, or one with another name.

        Example:
            @hookimpl
            def sah_metric():
                return Density
        """


class ModelSpec:
    """The hook of the entry-point group ``sah.models``."""

    @_first
    def sah_model(self) -> Callable[[], Any] | None:
        """Names a function that finds the files of a model alias.

        Called once, when a model of this name is first asked for.

        Must not look for the files itself, nor fetch them: the returned function looks.

        Returns:
            A function without arguments that returns a `ModelSource`, or raises
            `ModelNotFoundError` with the exact command that would help. Exactly one plugin is
            asked; its result is the result.

        Raises:
            BrokenPluginError: by the registry, if the hook is missing, raises, or returns what
                cannot be called or needs arguments.

        Example:
            @hookimpl
            def sah_model():
                return find_smollm2
        """


class ObjectiveSpec:
    """The hook of the entry-point group ``sah.objectives``."""

    @_first
    def sah_objective(self) -> Callable[..., Any] | None:
        """Names what a tuning run optimises.

        Called once, when a search first uses the name.

        Must not run anything: the returned function is called with the results of each trial.

        Returns:
            A class or function that turns the metrics of a finished trial into a number. Exactly
            one plugin is asked; its result is the result.

        Raises:
            BrokenPluginError: by the registry, if the hook is missing, raises, or returns what
                cannot be called.

        Example:
            @hookimpl
            def sah_objective():
                return error_at_density
        """


class ObserverSpec:
    """What metrics and other observers may listen to; every hook is optional."""

    @hookspec
    def sah_run_begin(self, config: Mapping[str, Any]) -> None:
        """A cell of an experiment begins: one model, pipeline, benchmark and task.

        Called once per cell by the runner, before its first request; never by a lone adapter.

        Must not change `config`.

        Args:
            config: what identifies the cell, as written to its ``config.json``.

        Returns:
            Nothing; results of observers are ignored.

        Raises:
            Exception: whatever an observer raises fails the cell, and the other cells go on.

        Example:
            @hookimpl
            def sah_run_begin(self, config):
                self.pipeline = config["pipeline"]
        """

    @hookspec
    def sah_run_end(self, results: Mapping[str, Any]) -> None:
        """A cell of an experiment is complete.

        Called once per cell that finished, after its last request; not for a cell that failed.

        Must not change `results`.

        Args:
            results: the aggregated metrics, as written to the cell's ``metrics.json``.

        Returns:
            Nothing; results of observers are ignored.

        Raises:
            Exception: whatever an observer raises fails the cell, and the other cells go on.

        Example:
            @hookimpl
            def sah_run_end(self, results):
                self.log.write(json.dumps(results))
        """

    @hookspec
    def sah_request_begin(self, request: Request, pipeline: Pipeline) -> None:
        """A pipeline starts to work on a request.

        Called once per request and pipeline, before the first answer; the prefill may have been
        done before, for several pipelines at once.

        Must not call the model.

        Args:
            request: the context and its questions.
            pipeline: the pipeline that will answer.

        Returns:
            Nothing; results of observers are ignored.

        Raises:
            Exception: whatever an observer raises ends the request, with the model restored.

        Example:
            @hookimpl
            def sah_request_begin(self, request):
                self.questions += len(request.questions)
        """

    @hookspec
    def sah_request_end(self, request: Request, response: Response) -> None:
        """All questions of a request are answered.

        Called once per request and pipeline; not if answering failed.

        Must not change the response.

        Args:
            request: the context and its questions.
            response: the answers and their details.

        Returns:
            Nothing; results of observers are ignored.

        Raises:
            Exception: whatever an observer raises ends the request, with the model restored.

        Example:
            @hookimpl
            def sah_request_end(self, response):
                self.tokens += sum(detail.new_tokens for detail in response.details)
        """

    @hookspec
    def sah_prefill_end(self, layer_count: int, context_tokens: int) -> None:
        """The context of a request is in the cache, and the state of every masker is built.

        Called once per request and pipeline, after the last layer and before the first question;
        also when the pipeline starts from a prefill that another one shares.

        Must not run the model or touch the cache.

        Args:
            layer_count: the attention layers of the model.
            context_tokens: the tokens of the context, without padding.

        Returns:
            Nothing; results of observers are ignored.

        Raises:
            Exception: whatever an observer raises ends the request, with the model restored.

        Example:
            @hookimpl
            def sah_prefill_end(self, context_tokens):
                self.contexts.append(context_tokens)
        """

    @hookspec
    def sah_mask_built(self, inputs: Inputs, mask: Mask) -> None:
        """A pipeline has selected the keys of one layer for the current queries.

        Called once per forward pass and layer in the phases in which the pipeline is sparse, before
        attention; layers that stay dense, and question and decoding of `dense`, come with a full
        mask. Graph capture refuses observers.

        Must not change tensors, nor keep `inputs` beyond the call: its key and value are the cache.

        Args:
            inputs: what the maskers saw; ``inputs.layer``, ``.phase`` and ``.allowed`` say where.
            mask: the selection, before the allowed set is applied.

        Returns:
            Nothing; results of observers are ignored.

        Raises:
            Exception: whatever an observer raises ends the request, with the model restored.

        Example:
            @hookimpl
            def sah_mask_built(self, inputs, mask):
                self.density[inputs.layer] = mask.density(inputs.allowed)
        """

    @hookspec
    def sah_attention_computed(
        self, inputs: Inputs, mask: Mask, output: Tensor, lse: Tensor, backend: str
    ) -> None:
        """The attention of one layer in which the pipeline is sparse has been computed.

        Called once per forward pass and layer in the phases in which the pipeline is sparse, after
        attention. Graph capture refuses observers.

        Must not change tensors, nor keep them beyond the call without copying.

        Args:
            inputs: what the maskers and the backend saw.
            mask: the selection that was executed.
            output: ``(batch, query_len, heads, head_dim)`` in the dtype of the model.
            lse: log of the softmax denominator, float32 ``(batch, heads, query_len)``; ``-inf``
                where nothing was selected.
            backend: the registered name of the backend that computed it.

        Returns:
            Nothing; results of observers are ignored.

        Raises:
            Exception: whatever an observer raises ends the request, with the model restored.

        Example:
            @hookimpl
            def sah_attention_computed(self, output, backend):
                self.largest[backend] = float(output.abs().max())
        """
