"""Runs an experiment: models x benchmarks x tasks, all pipelines on shared prefills."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from sah_core import registry
from sah_core.benchmark import Example
from sah_core.pipeline import Pipeline

from .answer import Answer
from .cell_run import CellRun, TaskRun, failing
from .experiment import Experiment
from .identity import cell_identity, environment
from .json_files import read_json
from .progress import Reporter
from .results import CellResult, metrics_of, result_of
from .samples import detail_of, request_of, sample_of, scores_of, timing_of
from .selection import Selection
from .store import CONFIG, Cell

if TYPE_CHECKING:
    from sah_core.requests import AnswerDetail


def run_experiment(
    experiment: Experiment, reporter: Reporter, *, rerun_failed: bool = False
) -> list[CellResult]:
    """Run all cells of an experiment that are not done yet.

    A fault of one cell is recorded in its folder and does not stop the others.

    Args:
        experiment: What to run.
        reporter: Is told of the progress.
        rerun_failed: Try cells again that failed in an earlier run.

    Returns:
        The results of all cells, those of earlier runs included, in the order of the experiment.

    Raises:
        SahError: What was asked for cannot be had at all: no such model, or no folder to write to.
    """
    results: list[CellResult] = []
    # The first model is loaded at once; that a later one is not there must not be found hours on.
    check = getattr(registry.adapters[experiment.adapter], "check_model", None)
    if check is not None:
        for model in experiment.models[1:]:
            check(model)
    for index, model in enumerate(experiment.models):
        left = len(experiment.models) - index - 1
        results += ModelRun(experiment, model, reporter, rerun_failed, models_left=left).run()
        gc.collect()
    return results


class ModelRun:
    """All cells of one model, which is loaded once.

    Args:
        experiment: What to run.
        model: The name of the model.
        reporter: Is told of the progress.
        rerun_failed: Try cells again that failed in an earlier run.
        models_left: Models that come after this one, for the time left.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: str,
        reporter: Reporter,
        rerun_failed: bool = False,
        *,
        models_left: int = 0,
    ) -> None:
        self.experiment = experiment
        self.model = model
        self.reporter = reporter
        self.rerun_failed = rerun_failed
        self.models_left = models_left
        self.made = 0
        self.adapter: Any = None

    def run(self) -> list[CellResult]:
        """Load the model, run what is missing, and return the results of all cells."""
        self.reporter.working_on(f"loading {self.model}")
        adapter_class = registry.adapters[self.experiment.adapter]
        self.adapter = adapter_class(
            self.model, device=self.experiment.device, dtype=self.experiment.dtype
        )
        tasks: list[TaskRun] = []
        try:
            for benchmark in self.experiment.benchmarks:
                for task, plan in benchmark.by_task():
                    tasks.append(TaskRun(plan=plan, task=task, cells=[]))
                    self._open_cells(tasks[-1])
            for task_run in tasks:
                self._run_task(task_run, tasks)
            return [self._result(task_run, run) for task_run in tasks for run in task_run.cells]
        finally:
            for task_run in tasks:
                for run in task_run.cells:
                    run.cell.close()
            self.adapter = None

    def _open_cells(self, task_run: TaskRun) -> None:
        identity = dict(self.adapter.identity())
        device = str(getattr(self.adapter, "device", "unknown"))
        where = environment(self.experiment, device)
        for pipeline in self.experiment.pipelines:
            about = {
                "model": self.model,
                "benchmark": task_run.plan.benchmark.name,
                "task": task_run.task,
                "pipeline": pipeline.text,
                "label": pipeline.label,
            }
            cell = Cell.open(
                self.experiment.output,
                cell_identity(self.experiment, task_run.plan, task_run.task, pipeline, identity),
                about,
                where,
            )
            run = CellRun(pipeline=pipeline, cell=cell, done=cell.is_done(self.experiment.limit))
            task_run.cells.append(run)
            for note in cell.notes:
                self.reporter.note(f"{task_run.label}, {pipeline.label}: {note}")
            earlier = cell.error
            # Bad input is mended outside the cell, so it is always tried again.
            sticky = earlier is not None and earlier.get("kind") == "fault" and not run.done
            if earlier is not None and sticky and not self.rerun_failed:
                message = f"{earlier.get('message')} (earlier run; --rerun-failed tries again)"
                run.error = {**earlier, "message": message}

    def _run_task(self, task_run: TaskRun, tasks: Sequence[TaskRun]) -> None:
        pending = task_run.pending
        if not pending:
            return
        self.reporter.working_on(f"{self.model}, {task_run.label}: making examples")
        with failing(pending):
            chosen = Selection(
                task_run.plan.benchmark,
                task_run.task,
                self.adapter.tokenizer,
                self.experiment.seed,
                self.experiment.limit,
            )
            task_run.count = chosen.count
            self.reporter.expect(self._expected(tasks))
            check = getattr(self.adapter, "check_pipeline", None)
            for run in pending:
                with failing([run]):
                    if check is not None:
                        check(run.pipeline)
                    self._observe(run)
            for group in _contexts(chosen):
                task_run.order.extend(example.id for example in group)
                self._run_context(task_run, group)
                if not task_run.pending:
                    return
            if task_run.count is None:
                task_run.count = chosen.count
                self.reporter.expect(self._expected(tasks))
            for run in task_run.pending:
                with failing([run]):
                    self._finish(task_run, run, complete=chosen.is_whole)

    def _observe(self, run: CellRun) -> None:
        run.observers = {call.name: call.make() for call in self.experiment.metrics}
        run.tell("sah_run_begin", config=_config(run.cell))

    def _run_context(self, task_run: TaskRun, group: Sequence[Example]) -> None:
        """Answer the questions about one context, in every cell that has not answered them."""
        waiting = [run for run in task_run.pending if run.missing(group)]
        shared = [run for run in waiting if not run.prefills_itself]
        with failing(shared):
            prefilled = self._prefill(task_run, group) if shared else None
            for run in shared:
                with failing([run]):
                    timed = self._timed(task_run, run, prefilled, group)
                    self._answer(task_run, run, prefilled, group, timed)
            del prefilled
        for run in waiting:
            if run.prefills_itself:
                with failing([run]):
                    self._run_alone(task_run, run, group)

    def _run_alone(self, task_run: TaskRun, run: CellRun, group: Sequence[Example]) -> None:
        """Answer the questions about one context in a cell whose prefill is sparse.

        The prefill belongs to the question of its context that is answered first: what observers
        see of it counts there, however often a run is begun again.
        """
        missing = run.missing(group)
        is_watched = bool(run.observers) and not run.knows(group[0].context_id)
        prefilled: Any = None
        timed: dict[int, Answer] = {}
        if not is_watched or run.to_time(missing, self.experiment.timed_samples):
            prefilled = self._prefill(task_run, group, run.pipeline)
            timed = self._timed(task_run, run, prefilled, group)
        if is_watched:
            prefilled = None  # one cache at a time
            run.reset()
            prefilled = self._prefill(
                task_run, group, run.pipeline, observers=list(run.observers.values())
            )
        self._answer(task_run, run, prefilled, group, timed, prefill_watched=is_watched)

    def _prefill(
        self,
        task_run: TaskRun,
        group: Sequence[Example],
        pipeline: Pipeline | None = None,
        observers: Sequence[object] = (),
    ) -> Any:
        what = "prefill" if pipeline is None else f"prefill of {pipeline.label}"
        self.reporter.working_on(f"{self.model}, {task_run.label}: {what}")
        length = self.experiment.max_context_length
        request_kwargs = {} if length is None else {"max_context_length": length}
        request = request_of(task_run.plan, task_run.task, group)
        return self.adapter.prefill(
            request,
            request_kwargs,
            pipeline=pipeline,
            observers=list(observers),
            generation_kwargs=self._generation(task_run),
        )

    def _generation(self, task_run: TaskRun) -> dict[str, Any]:
        """Generation options of a task: those of the benchmark, with the experiment's over them."""
        prescribed = task_run.plan.benchmark.generation_for(task_run.task)
        return {**prescribed, **self.experiment.generation}

    def _timed(
        self, task_run: TaskRun, run: CellRun, prefilled: Any, group: Sequence[Example]
    ) -> dict[int, Answer]:
        """Answer the first samples of a cell without observers: their seconds are what counts."""
        indices = run.to_time(run.missing(group), self.experiment.timed_samples)
        if indices:
            label = run.pipeline.label
            self.reporter.working_on(f"{self.model}, {task_run.label}: {label}, timed")
        return {index: self._ask(task_run, run, prefilled, group, index) for index in indices}

    def _answer(
        self,
        task_run: TaskRun,
        run: CellRun,
        prefilled: Any,
        group: Sequence[Example],
        timed: Mapping[int, Answer],
        *,
        prefill_watched: bool = False,
    ) -> None:
        """Answer what a cell misses, under its observers, and keep it."""
        self.reporter.working_on(f"{self.model}, {task_run.label}: {run.pipeline.label}")
        missing = run.missing(group)
        for index in missing:
            if index != missing[0] or not prefill_watched:
                run.reset()
            observers = list(run.observers.values())
            answer = self._ask(task_run, run, prefilled, group, index, observers)
            apart = timed.get(index) if observers else answer
            timing = timing_of(
                answer.detail,
                None if apart is None else apart.detail,
                prefill_is_timed=not prefill_watched,
            )
            scores = scores_of(task_run.plan.benchmark, group[index], answer.detail)
            run.keep(
                sample_of(group[index], answer.detail, scores, run.observers, timing, answer.turns)
            )
            self.made += 1
            self.reporter.advance()

    def _ask(
        self,
        task_run: TaskRun,
        run: CellRun,
        prefilled: Any,
        group: Sequence[Example],
        index: int,
        observers: Sequence[object] = (),
    ) -> Answer:
        """Answer a question, and those that its answer leads to."""
        example, benchmark = group[index], task_run.plan.benchmark
        answer = Answer.of(
            example, self._reply(task_run, run, prefilled, example, index, observers)
        )
        while (further := benchmark.follow_up(example, answer.detail.text)) is not None:
            own = run.pipeline if run.prefills_itself else None
            seen = observers if own is not None else ()
            prefilled = self._prefill(task_run, [further], own, seen)
            reply = self._reply(task_run, run, prefilled, further, 0, observers)
            answer, example = answer.followed_by(further, reply), further
        return answer

    def _reply(
        self,
        task_run: TaskRun,
        run: CellRun,
        prefilled: Any,
        example: Example,
        index: int,
        observers: Sequence[object],
    ) -> AnswerDetail:
        if example.predicted is not None:
            return self._predicted(run, prefilled, example, index, observers)
        generation = self._generation(task_run)
        generation["max_new_tokens"] = self.experiment.max_new_tokens or example.max_new_tokens
        if generation.get("do_sample"):
            _seed_sampling(self.experiment.seed, example.id)
        response = self.adapter.answer(
            prefilled,
            run.pipeline,
            generation,
            observers=list(observers),
            indices=[index],
        )
        detail: AnswerDetail
        [detail] = response.details
        return detail

    def _predicted(
        self,
        run: CellRun,
        prefilled: Any,
        example: Example,
        index: int,
        observers: Sequence[object],
    ) -> AnswerDetail:
        """A text that is given and predicted, in the place of an answer."""
        [likelihood] = self.adapter.loglikelihood(
            prefilled,
            run.pipeline,
            observers=list(observers),
            indices=[index],
            step=None if example.predicted == "question" else 1,
        )
        return detail_of(likelihood, prefilled.seconds)

    def _finish(self, task_run: TaskRun, run: CellRun, *, complete: bool) -> None:
        run.cell.arrange(task_run.order)
        metrics = metrics_of(
            run.cell,
            self.experiment,
            task_run.plan,
            task_run.task,
            run.pipeline,
            complete=complete and len(run.cell.records) >= (task_run.count or 0),
        )
        run.tell("sah_run_end", results=metrics)
        run.cell.finish(metrics)
        run.done = True

    def _expected(self, tasks: Sequence[TaskRun]) -> int | None:
        """How many samples are to be made in all; a guess for tasks that have not begun."""
        limit = self.experiment.limit
        known = [task_run.count for task_run in tasks if task_run.count is not None]
        if limit is None and not known:
            return None
        guess = limit if limit is not None else sum(known) // len(known)
        missing = whole = 0
        for task_run in tasks:
            count = guess if task_run.count is None else task_run.count
            whole += count * len(task_run.cells)
            missing += sum(max(0, count - len(run.cell.records)) for run in task_run.pending)
        return self.made + missing + whole * self.models_left

    def _result(self, task_run: TaskRun, run: CellRun) -> CellResult:
        return result_of(
            run.cell, self.model, task_run.plan, task_run.task, run.pipeline, run.error
        )


def exit_code(results: Sequence[CellResult]) -> Literal[0, 1, 2]:
    """0 if all cells are done; 1 if one failed for a fault; 2 if only for bad input."""
    failed = [result for result in results if result.status == "failed"]
    if not failed:
        return 0
    return 2 if all(result.bad_input for result in failed) else 1


def _contexts(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples in groups that share a context."""
    for _, group in groupby(examples, key=attrgetter("context_id", "context")):
        yield list(group)


def _config(cell: Cell) -> dict[str, Any]:
    return read_json(cell.folder / CONFIG) or {}


def _seed_sampling(seed: int, example_id: str) -> None:
    """Give each example a seed of its own, so that sampled generation resumes as it went."""
    import torch

    digest = hashlib.sha256(f"{seed}:{example_id}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7]))
