"""The hooks of observers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .markers import hookspec

if TYPE_CHECKING:
    from torch import Tensor

    from ..inputs import Inputs
    from ..mask import Mask
    from ..pipeline import Pipeline
    from ..requests import Request, Response


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
