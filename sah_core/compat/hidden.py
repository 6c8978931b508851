"""What drafts of the next tokens start from: hidden states of the whole text, and the layers for
drafts that a checkpoint may hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core.compat.models import cache_argument, hooked, text_config
from sah_core.errors import UnsupportedError, one_line

LAST = -1
"""The last layer, behind the final norm."""


@attrs.define(eq=False)
class HiddenStates:
    """Hidden states of the tokens that a cache holds, kept while they are read and handed to a
    generation that reads only what follows them.

    Attributes:
        layers: Layers whose output is kept, counted from 0; `LAST` is the last one.
        kept: Per layer ``(batch, tokens, hidden)``; nothing before the first pass.
    """

    layers: tuple[int, ...]
    kept: tuple[Tensor, ...] = ()

    @contextmanager
    def recorded(self, model: Any, kv_cache: Any) -> Iterator[None]:
        """Keep those of every pass over a cache, in the place of what was kept from there on."""
        argument = cache_argument(type(model).forward)
        asked = [asked_as(layer, model) for layer in self.layers]
        held: list[int] = []

        def before(module: Any, arguments: Any, named: dict[str, Any]) -> Any:
            if named.get(argument) is not kv_cache:
                return None
            held[:] = [int(named[argument].get_seq_length())]
            return arguments, {**named, "output_hidden_states": asked}

        def after(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
            if named.get(argument) is kv_cache:
                states = output.hidden_states
                new = tuple(states[place] for place in self._places(model, states))
                self.kept = self._joined(held[0], new)

        with hooked(model, before, after):
            yield

    @contextmanager
    def handed_out(self, model: Any, kv_cache: Any) -> Iterator[None]:
        """The first pass over a cache, if it is asked for hidden states, also returns those of the
        tokens that the cache holds.
        """
        argument = cache_argument(type(model).forward)
        held: list[int] = []
        done: list[Any] = []

        def before(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            if not held and named.get(argument) is kv_cache:
                held.append(int(named[argument].get_seq_length()))

        def after(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> Any:
            if done or named.get(argument) is not kv_cache:
                return None
            done.append(True)
            if getattr(output, "hidden_states", None) is None:
                return None
            states = list(output.hidden_states)
            places = self._places(model, states)
            whole = self._joined(held[0], tuple(states[place] for place in places))
            for place, state in zip(places, whole, strict=True):
                states[place] = state
            output.hidden_states = tuple(states)
            return output

        with hooked(model, before, after):
            yield

    def _places(self, model: Any, states: Sequence[Any]) -> tuple[int, ...]:
        """Where the layers' outputs stand in what a model returns."""
        before = len(states) - int(text_config(model).num_hidden_layers)
        return tuple(layer if layer == LAST else layer + before for layer in self.layers)

    def _joined(self, held: int, new: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if not held:
            return tuple(new)
        return tuple(
            torch.cat([old[:, :held], more], dim=1)
            for old, more in zip(self.kept, new, strict=True)
        )


def asked_as(layer: int, model: Any) -> int:
    """The number by which a forward pass is asked for the output of a layer."""
    from transformers.utils import output_capturing

    if hasattr(output_capturing, "selected_hidden_states"):
        return layer if layer == LAST else layer + 1  # the embeddings are counted
    return int(text_config(model).num_hidden_layers) - 1 if layer == LAST else layer


def draft_layer_count(model: Any) -> int:
    """Layers for multi-token prediction that the configuration of a model promises."""
    return int(getattr(text_config(model), "num_mtp_layers", None) or 0)


def read_draft_layers(model: Any) -> Any:
    """The layers for multi-token prediction of a model, read from its checkpoint.

    Raises:
        UnsupportedError: If they cannot be read.
    """
    from transformers.modeling_layers import MtpModel

    device = next(model.get_decoder().layers[-1].parameters()).device
    try:
        return MtpModel.from_pretrained(model, device_map={"": device}).eval()
    except Exception as error:  # files of any kind, read by transformers
        raise UnsupportedError(
            what=f"multi-token prediction with {type(model).__name__}",
            reason="its layers for drafts cannot be read from the checkpoint "
            f"{text_config(model).name_or_path!r}: {one_line(str(error))}",
        ) from error


@contextmanager
def using_draft_layers(model: Any, layers: Any) -> Iterator[None]:
    """Let ``generate`` take layers for drafts that have been read, which it would otherwise read
    from the checkpoint anew every time.
    """
    from transformers.modeling_layers import MtpModel

    read = MtpModel.from_pretrained

    def from_pretrained(main_model: Any, *arguments: Any, **named: Any) -> Any:
        return layers if main_model is model else read(main_model, *arguments, **named)

    own = vars(MtpModel)["from_pretrained"]
    MtpModel.from_pretrained = staticmethod(from_pretrained)
    try:
        yield
    finally:
        MtpModel.from_pretrained = own
