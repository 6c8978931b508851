"""The hooks of plugins: one for each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .markers import hookspec

if TYPE_CHECKING:
    from ..backend import Backend
    from ..benchmark import Benchmark
    from ..masker import Masker
    from ..scorer import Scorer

F = TypeVar("F", bound=Callable[..., Any])


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
            ``process_request``, ``prefill``, ``answer`` and ``identity``. Runners read a context
            with ``prefill(request, request_kwargs, pipeline=..., observers=...,
            generation_kwargs=...)``, the last for options that say how it is kept, and ask with
            ``answer(prefilled, pipeline, generation_kwargs, observers=..., indices=...)``. Class
            methods ``check_model(model_name)`` and ``check_generation(generation_kwargs)``, if it
            has them, find mistakes before anything is loaded, ``check_pipeline(pipeline)`` finds
            those of a pipeline on the loaded model before anything is read, and
            ``plain_generation(generation_kwargs)`` gives generation options with the content of
            the files that they name, and ``generation_identity(generation_kwargs)`` with a hash of
            the code that they name, as results record them. Exactly one plugin is asked; its
            result is the result.

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
