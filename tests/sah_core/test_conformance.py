"""Conformance checks: every registered masker passes, and each check catches what it is for.

The wrong maskers implement no paper.
"""

import functools
import pkgutil
import re
import subprocess
import sys
import types
import unittest
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch

from sah_core import Capabilities, KeyRange, Mask, Masker, param, registry
from sah_core.errors import MissingParameterError, UnsupportedError
from sah_core.parameters import Size, specs
from sah_core.selection import sample
from sah_core.state import GrowingBuffer, reorder_first
from sah_core.testing import CHECKS, MODEL, CheckResult, CheckSkipped, run_checks
from sah_core.testing import conformance as module

pytestmark = pytest.mark.unit


IN_THIS_PROCESS = [check for check in CHECKS if check is not module.check_import_weight]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Makes the example of a masker, each once."""
    return functools.cache(
        lambda name: registry.maskers[name].example(tmp_path_factory.mktemp(name))
    )


@pytest.mark.parametrize("name", registry.maskers.names())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_example_of_every_registered_masker_conforms(check, name, example):
    check(example(name))


@pytest.mark.parametrize("name", registry.maskers.names())
def test_every_masker_that_has_defaults_conforms_with_them(name):
    masker = registry.maskers[name]
    required = [spec.name for spec in specs(masker) if spec.required]
    if required:
        pytest.skip(f"{', '.join(required)} must be given")
    assert [result for result in run_checks(masker(), IN_THIS_PROCESS) if result.failed] == []


def test_every_check_of_the_modules_is_run():
    parts = [f"{module.__name__}.{part.name}" for part in pkgutil.iter_modules(module.__path__)]
    names = {n for part in parts for n in vars(import_module(part)) if n.startswith("check_")}
    assert {check.__name__ for check in CHECKS} == names
    assert all(check.__doc__ for check in CHECKS)


def test_results_name_the_check_and_say_whether_it_passed():
    results = run_checks(registry.maskers["sink"](sink_size=3))
    assert [r.name for r in results] == [c.__name__.removeprefix("check_") for c in CHECKS]
    assert results[0] == CheckResult(name="docstring", status="passed")


def test_a_check_that_cannot_apply_says_why_and_is_a_skipped_test():
    [result] = run_checks(Right(), [module.check_position_only])
    assert result == CheckResult(
        name="position_only",
        status="skipped",
        message="wrong: it does not declare position_only",
    )
    assert not result.passed
    assert not result.failed
    assert issubclass(CheckSkipped, unittest.SkipTest)


def test_a_masker_of_one_model_is_checked_with_that_model():
    results = {result.name: result for result in run_checks(OfOneModel(), IN_THIS_PROCESS)}
    assert results["kv_groups"].status == "skipped"
    assert "fits 4 heads on 2 only" in results["kv_groups"].message
    assert results["shape"].passed
    assert not [result for result in results.values() if result.failed]


class TestExamples:
    def test_an_example_has_no_size_of_more_than_eight_tokens(self, tmp_path):
        assert Sized.example(tmp_path) == Sized(large=8, small=3, share=0.5, least=20)

    def test_a_masker_without_defaults_makes_its_own(self, tmp_path):
        with pytest.raises(MissingParameterError, match="demanding: file is missing"):
            Demanding.example(tmp_path)


def test_the_checks_are_loaded_on_first_use():
    code = (
        "import sys, sah_core.testing as t; assert {'CHECKS', 'run_checks'} <= set(dir(t)); "
        "assert not {'torch', 'sah_core.testing.conformance'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sys.modules["sah_core.testing"].nothing


# Maskers that are wrong


@attrs.frozen(kw_only=True)
class Wrong(Masker):
    """Base of maskers with one mistake each; without it they select the key norms' top four."""

    name: ClassVar[str] = "wrong"

    def select(self, inputs):
        scores = inputs.key.norm(dim=-1).repeat_interleave(inputs.group, dim=1)
        scores = scores[:, :, None].expand(-1, -1, inputs.query_len, -1)
        if inputs.allowed.keep is not None:
            scores = scores.masked_fill(~inputs.allowed.keep, float("-inf"))
        indices, _ = inputs.ops.masked_topk(
            scores, 4, start=inputs.allowed.start, stop=inputs.allowed.stop
        )
        return Mask.from_indices(inputs.shape, indices)

    def add_mask(self, inputs, previous):
        return previous | self.select(inputs)


class Keys:
    """A state that remembers keys."""

    def __init__(self):
        self.keys = GrowingBuffer()
        self.appends = 0

    def snapshot(self):
        return self.keys.snapshot(), self.appends

    def restore(self, token):
        self.keys.restore(token[0])
        self.appends = token[1]


@attrs.frozen(kw_only=True)
class Right(Wrong):
    """Nothing is wrong with this one."""


@attrs.frozen(kw_only=True)
class OfOneModel(Wrong):
    """Has an artefact that fits the model of the checks."""

    def select(self, inputs):
        if (inputs.heads, inputs.kv_heads) != (MODEL.heads, MODEL.kv_heads):
            raise UnsupportedError("one-model", "its artefact is that of another model")
        return super().select(inputs)


@attrs.frozen(kw_only=True)
class Sized(Wrong):
    """Has sizes of all sorts."""

    large: Size = param(128, type=Size, help="Cut.")
    small: Size = param(3, type=Size, help="Kept.")
    share: Size = param(0.5, type=Size, help="Kept.")
    least: Size = param(64, type=Size, minimum=20, help="Cut as far as is allowed.")


@attrs.frozen(kw_only=True)
class Demanding(Wrong):
    """Has a parameter without a default."""

    name: ClassVar[str] = "demanding"

    file: str = param(type=str, help="Must be given.")


@attrs.frozen(kw_only=True)
class LooksAhead(Wrong):
    """The number of sinks depends on all keys, those after the query included."""

    def select(self, inputs):
        count = int(inputs.key.norm(dim=-1).argmax(-1)[0, 0]) % 9
        first = inputs.allowed.first.view(-1, 1, 1)
        return Mask.from_ranges(inputs.shape, [KeyRange(first, first, 9, stop_offset=count)])


@attrs.frozen(kw_only=True)
class Forgets(Wrong):
    """Drops what earlier steps selected."""

    def add_mask(self, inputs, previous):
        return self.select(inputs)


@attrs.frozen(kw_only=True)
class DropsFull(Wrong):
    """Takes a full mask for an empty one."""

    def add_mask(self, inputs, previous):
        return self.select(inputs) if previous.is_full else previous | self.select(inputs)


@attrs.frozen(kw_only=True)
class FillsEmpty(Wrong):
    """A restriction that takes an empty mask for a full one."""

    capabilities: ClassVar[Capabilities] = Capabilities(restricts=True)

    def add_mask(self, inputs, previous):
        return Mask.full(inputs.shape) if previous.is_empty else previous


@attrs.frozen(kw_only=True)
class EditsPrevious(Wrong):
    """Writes into the mask of the step before."""

    def add_mask(self, inputs, previous):
        if previous.dense is not None:
            previous.dense[..., 0] = 1.0
        return previous | self.select(inputs)


@attrs.frozen(kw_only=True)
class EditsKeys(Wrong):
    """Normalises the cache in place."""

    def add_mask(self, inputs, previous):
        inputs.key.div_(2)
        return previous | self.select(inputs)


@attrs.frozen(kw_only=True)
class GlobalRandom(Wrong):
    """Draws from the global generator."""

    def select(self, inputs):
        return Mask.from_indices(inputs.shape, torch.randint(0, inputs.capacity, (1, 1, 1, 1)))


@attrs.frozen(kw_only=True)
class IgnoresPadding(Wrong):
    """Sinks at the start of the buffer instead of the sequence."""

    def select(self, inputs):
        zero = torch.zeros(1, 1, 1, dtype=torch.int32)
        return Mask.from_ranges(inputs.shape, [KeyRange(zero, zero, 80, stop_offset=80)])


@attrs.frozen(kw_only=True)
class OtherShape(Wrong):
    """Leaves the heads out of the shape."""

    def add_mask(self, inputs, previous):
        return Mask.full((inputs.batch, 1, inputs.query_len, inputs.capacity))


@attrs.frozen(kw_only=True)
class Repeats(Wrong):
    """Names a key twice."""

    def select(self, inputs):
        return Mask.from_indices(inputs.shape, torch.zeros(1, 1, 1, 2))


@attrs.frozen(kw_only=True)
class HiddenWeights(Wrong):
    """Weighted, but not declared as a sampler."""

    def select(self, inputs):
        return Mask.from_indices(
            inputs.shape, torch.zeros(1, 1, 1, 1), probability=torch.full((1, 1, 1, 1), 0.5)
        )


@attrs.frozen(kw_only=True)
class NeedsManyKeys(Wrong):
    """Cannot do with fewer keys than its budget."""

    def select(self, inputs):
        scores = inputs.key.norm(dim=-1)[:, :, None].topk(4, dim=-1)
        return Mask.from_indices(inputs.shape, scores.indices)


@attrs.frozen(kw_only=True)
class WrongGroup(Wrong):
    """Deals query heads out to KV heads in turn."""

    def select(self, inputs):
        key = inputs.key.repeat(1, inputs.group, 1, 1)
        scores = (inputs.query @ key.transpose(2, 3)).float()
        indices, _ = inputs.ops.masked_topk(
            scores, 4, start=inputs.allowed.start, stop=inputs.allowed.stop
        )
        return Mask.from_indices(inputs.shape, indices)


@attrs.frozen(kw_only=True)
class CountsAppends(Wrong):
    """Its state depends on how the keys come."""

    def init_state(self, layer):
        return Keys()

    def append(self, state, key, value, start):
        state.appends += 1

    def select(self, inputs):
        index = torch.full((1, 1, 1, 1), min(inputs.state.appends, inputs.capacity) - 1)
        return Mask.from_indices(inputs.shape, index)


@attrs.frozen(kw_only=True)
class PrunesByAppends(CountsAppends):
    """What it leaves depends on how the keys come."""

    capabilities: ClassVar[Capabilities] = Capabilities(prunes=True)

    def add_mask(self, inputs, previous):
        return previous if previous.is_empty else self.select(inputs)


@attrs.frozen(kw_only=True)
class NeverForgets(CountsAppends):
    """Keeps the keys of an answer that was taken back."""

    def append(self, state, key, value, start):
        state.appends = max(state.appends, start + int(key[0, 0, 0, 0] > 0))

    def init_state(self, layer):
        state = Keys()
        state.restore = lambda token: None
        return state


class Norms:
    """A state that remembers the norms of keys, and where sequences begin."""

    def __init__(self, layer):
        self.first = layer.first
        self.norms = GrowingBuffer()

    def reorder(self, rows):
        self.norms.reorder(rows)
        self.first = reorder_first(self.first, rows)

    def snapshot(self):
        return self.norms.snapshot()

    def restore(self, token):
        self.norms.restore(token)


@attrs.frozen(kw_only=True)
class Remembers(Wrong):
    """Nothing is wrong with this one either: the longest keys, and the first two."""

    def init_state(self, layer):
        return Norms(layer)

    def append(self, state, key, value, start):
        state.norms.append(key.norm(dim=-1, dtype=torch.float32))

    def select(self, inputs):
        state = inputs.state
        scores = state.norms.view[:, :, None, : inputs.capacity]
        scores = scores.repeat_interleave(inputs.group, dim=1)
        first = inputs.allowed.first if state.first is None else state.first
        allowed = inputs.allowed
        indices, _ = inputs.ops.masked_topk(
            scores.expand(-1, -1, inputs.query_len, -1).contiguous(),
            4,
            start=allowed.start,
            stop=allowed.stop,
        )
        first = first.view(-1, 1, 1)
        sink = KeyRange(first, first, 2, stop_offset=2)
        return Mask.from_indices(inputs.shape, indices) | Mask.from_ranges(inputs.shape, [sink])


class NormsInPlace(Norms):
    """Its first keys stay where they are."""

    def reorder(self, rows):
        self.norms.reorder(rows)
        if self.first is not None:  # as many, so that nothing else notices
            self.first = self.first[torch.arange(len(rows)) % len(self.first)]


@attrs.frozen(kw_only=True)
class LeavesPaddingBehind(Remembers):
    """Of beams that change places, the keys follow and the padding does not."""

    def init_state(self, layer):
        return NormsInPlace(layer)


class NormsSent(Norms):
    """Sends each sequence to a place, in place of fetching one for each place."""

    def reorder(self, rows):
        if len(rows) == len(rows.unique()) == self.norms.data.shape[0]:
            rows = rows.argsort()
        super().reorder(rows)


@attrs.frozen(kw_only=True)
class SendsSequences(Remembers):
    """Takes rows to say where the sequences go."""

    def init_state(self, layer):
        return NormsSent(layer)


class NormsOfBatch(Norms):
    """Takes a batch to be as large as ever."""

    def reorder(self, rows):
        if len(rows) == self.norms.data.shape[0]:
            super().reorder(rows)


@attrs.frozen(kw_only=True)
class KeepsItsBatch(Remembers):
    """Does not become more or fewer sequences."""

    def init_state(self, layer):
        return NormsOfBatch(layer)


@attrs.frozen(kw_only=True)
class SharesSecretly(Wrong):
    """Keeps the choice of whichever layer came first."""

    def select(self, inputs):
        index = inputs.request_state.setdefault("index", int(inputs.key[0, 0, :, 0].argmax()))
        return Mask.from_indices(inputs.shape, torch.full((1, 1, 1, 1), index))


@attrs.frozen(kw_only=True)
class ClaimsPositions(Wrong):
    """Says that it reads positions alone, and reads keys."""

    capabilities: ClassVar[Capabilities] = Capabilities(position_only=True)


@attrs.frozen(kw_only=True)
class LosesParameter(Wrong):
    """One of its fields is not declared as a parameter."""

    size: int = param(3, type=int, help="Declared.")
    more: int = 4


class Undecorated(Wrong):
    """Not declared with attrs, so that its parameter is none."""

    size: int = 3


@attrs.frozen(kw_only=True)
class Mutable(Wrong):
    """Holds a list that anybody can change."""

    seen: list = attrs.field(factory=list)


@attrs.frozen(kw_only=True)
class Undocumented(Wrong):
    pass


@attrs.frozen(kw_only=True)
class Unpicklable(Wrong):
    """Holds a function."""

    act: object = attrs.field(factory=lambda: lambda: None)


@attrs.frozen(kw_only=True)
class Admits(Wrong):
    """A restriction that selects."""

    capabilities: ClassVar[Capabilities] = Capabilities(restricts=True)

    def select(self, inputs):
        return Mask.full(inputs.shape)


@attrs.frozen(kw_only=True)
class CutsInTwo(Wrong):
    """Cannot take limits that are no interval."""

    def select(self, inputs):
        if inputs.allowed.keep is not None:
            raise NotImplementedError("no foreign masks")
        return super().select(inputs)


@attrs.frozen(kw_only=True)
class Overflows(Wrong):
    """Squares large numbers in the type of the keys."""

    def select(self, inputs):
        scores = (inputs.key * 300).square().sum(-1).repeat_interleave(inputs.group, dim=1)
        scores = scores.float()[:, :, None].expand(-1, -1, inputs.query_len, -1)
        indices, _ = inputs.ops.masked_topk(
            scores, 4, start=inputs.allowed.start, stop=inputs.allowed.stop
        )
        return Mask.from_indices(inputs.shape, indices)


@attrs.frozen(kw_only=True)
class SharedByTwo(Wrong):
    """Counts its calls where all steps of a request can."""

    def select(self, inputs):
        calls = inputs.request_state["calls"] = inputs.request_state.get("calls", 0) + 1
        return Mask.from_indices(inputs.shape, torch.full((1, 1, 1, 1), calls % inputs.capacity))


@attrs.frozen(kw_only=True)
class SharedByAll(Wrong):
    """Counts the calls of whatever request it serves."""

    calls: ClassVar[list] = []

    def select(self, inputs):
        self.calls.append(inputs.layer)
        index = len(self.calls) % inputs.capacity
        return Mask.from_indices(inputs.shape, torch.full((1, 1, 1, 1), index))


@attrs.frozen(kw_only=True)
class CountsOnTheHost(Wrong):
    """Reads the length from the device."""

    def select(self, inputs):
        count = min(4, int(inputs.length))
        indices = torch.arange(count, device=inputs.device).view(1, 1, 1, -1)
        return Mask.from_indices(inputs.shape, indices)


@attrs.frozen(kw_only=True)
class ListsOnTheHost(CountsOnTheHost):
    """Makes its indices of a list in every call."""

    def select(self, inputs):
        return Mask.from_indices(inputs.shape, torch.tensor([[[[0]]]], device=inputs.device))


@attrs.frozen(kw_only=True)
class IgnoresItsBound(CountsOnTheHost):
    """Declares the bound of an unbounded selection and does not keep to it."""

    capabilities: ClassVar[Capabilities] = Capabilities(unbounded=True)
    max_size: Size | None = param(None, type=Size, help="Most keys.")

    def select(self, inputs):
        if self.max_size is None:
            return Mask.full(inputs.shape)
        return super().select(inputs)


@attrs.frozen(kw_only=True)
class ForgetsItsBound(Wrong):
    """Bounded, it takes the keys at the end of the buffer."""

    capabilities: ClassVar[Capabilities] = Capabilities(unbounded=True)
    max_size: Size | None = param(None, type=Size, help="Most keys.")

    def select(self, inputs):
        if self.max_size is None:
            return Mask.full(inputs.shape)
        last = torch.full((1, 1, 1, 1), inputs.capacity - 1, device=inputs.device)
        return Mask.from_indices(inputs.shape, last)


@attrs.frozen(kw_only=True)
class PicksByFlags(Wrong):
    """Picks the rows of a boolean mask."""

    def select(self, inputs):
        position = torch.arange(inputs.capacity, device=inputs.device)
        return Mask.from_indices(inputs.shape, position[position < 4].view(1, 1, 1, -1))


@attrs.frozen(kw_only=True)
class OnTheHost(Wrong):
    """Makes its tensors where torch makes them by default."""

    def select(self, inputs):
        return Mask.from_indices(
            inputs.shape, torch.arange(min(4, inputs.capacity))[None, None, None]
        )


@attrs.frozen(kw_only=True)
class ScoresOnTheHost(Wrong):
    """Adds a bias that lives on the host."""

    def select(self, inputs):
        scores = inputs.key.norm(dim=-1)[:, :, None] + torch.zeros(inputs.capacity)
        indices = scores.argmax(-1, keepdim=True).expand(-1, -1, inputs.query_len, -1)
        return Mask.from_indices(inputs.shape, indices)


@attrs.frozen(kw_only=True)
class EndsWithTheBuffer(Wrong):
    """Takes the last key of the buffer for the last key."""

    def select(self, inputs):
        last = torch.full((1, 1, 1, 1), inputs.capacity - 1, device=inputs.device)
        return Mask.from_indices(inputs.shape, last)


@attrs.frozen(kw_only=True)
class AllProbabilities(Wrong):
    """Gives a probability for each key."""

    def select(self, inputs):
        chance = torch.zeros(1, 1, 1, inputs.capacity, device=inputs.device)
        chance[..., 0] = 1.0
        return Mask.from_dense(chance, inputs.shape)


@attrs.frozen(kw_only=True)
class ComparesAllKeys(Wrong):
    """Compares every key with every key."""

    def select(self, inputs):
        alike = inputs.key.float() @ inputs.key.float().transpose(2, 3)
        index = alike.sum(-1).argmax(-1).amax(1).view(-1, 1, 1, 1) * 0
        return Mask.from_indices(inputs.shape, index)


@attrs.frozen(kw_only=True)
class FlagsEveryPosition(Wrong):
    """Goes through all positions to find the first."""

    capabilities: ClassVar[Capabilities] = Capabilities(position_only=True)

    def select(self, inputs):
        position = torch.arange(inputs.capacity, device=inputs.device).view(1, 1, 1, -1)
        return Mask.from_indices(inputs.shape, position[..., :4])


@attrs.frozen(kw_only=True)
class Greedy(Wrong):
    """Selects twice what its size says."""

    heavy_size: Size = param(8, type=Size, help="Keys.")

    def select(self, inputs):
        count = min(inputs.budget(self.heavy_size).capacity * 2, inputs.capacity)
        indices = torch.arange(count, device=inputs.device).view(1, 1, 1, -1)
        return Mask.from_indices(inputs.shape, indices)


@attrs.frozen(kw_only=True)
class Stingy(Greedy):
    """Selects one key whatever its size says."""

    def select(self, inputs):
        return Mask.from_indices(inputs.shape, torch.zeros(1, 1, 1, 1, device=inputs.device))


@attrs.frozen(kw_only=True)
class LongRange(Wrong):
    """A range that is longer than it says."""

    def select(self, inputs):
        first = inputs.allowed.first.view(-1, 1, 1)
        return Mask.from_ranges(inputs.shape, [KeyRange(first, first, 2, stop_offset=5)])


@attrs.frozen(kw_only=True)
class RanksHiddenKeys(Wrong):
    """Ranks keys that a foreign mask hides, which then take the places of others."""

    def select(self, inputs):
        return super().select(attrs.evolve(inputs, allowed=attrs.evolve(inputs.allowed, keep=None)))


@attrs.frozen(kw_only=True)
class AddsValues(Wrong):
    """Takes values to be as long as keys."""

    def select(self, inputs):
        return super().select(attrs.evolve(inputs, key=inputs.key + 0 * inputs.value))


@attrs.frozen(kw_only=True)
class MergesHeads(Wrong):
    """Takes queries to lie in memory as their shape says."""

    def select(self, inputs):
        inputs.query.view(inputs.batch * inputs.heads, -1)
        return super().select(inputs)


@attrs.frozen(kw_only=True)
class FalseProbability(Wrong):
    """Draws keys and says of each that it was nearly certain to be drawn."""

    capabilities: ClassVar[Capabilities] = Capabilities(stochastic=True)
    probability: float = param(0.9, help="What it says.")
    skipped: int = param(0, help="First keys that are never drawn.")

    def add_mask(self, inputs, previous):
        start = (inputs.allowed.start + self.skipped).minimum(inputs.allowed.stop)
        allowed = attrs.evolve(inputs.allowed, start=start, known_bounds=None)
        inputs = attrs.evolve(inputs, allowed=allowed)
        left = allowed.stop - allowed.start
        count = left.clamp(max=6).to(torch.int32).expand(inputs.batch, 1, inputs.query_len)
        keys = sample(inputs, previous, count, 6)
        chance = torch.full(keys.shape, self.probability, device=inputs.device)
        return previous | Mask.from_indices(inputs.shape, keys, probability=chance)


class Heat:
    """Counts that are remembered, or not."""

    def __init__(self, forgets):
        self.forgets = forgets
        self.counts = None

    def snapshot(self):
        return None if self.counts is None else self.counts.clone()

    def restore(self, token):
        if self.forgets:
            self.counts = token if token is None else token.clone()


@attrs.frozen(kw_only=True)
class Heats(Wrong):
    """Selects the keys that had most attention so far, of equal ones the first."""

    forgets: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = Capabilities(needs=frozenset({"lse"}))

    def init_state(self, layer):
        return Heat(self.forgets)

    def append(self, state, key, value, start):
        if state.counts is None:
            state.counts = key.new_zeros((*key.shape[:2], 400), dtype=torch.float32)

    def after_attention(self, state, inputs, mask, lse):
        key = inputs.key.float()[:, :, None]
        rows = inputs.query.float().unflatten(1, (inputs.kv_heads, inputs.group))
        logits = (rows @ key.mT * inputs.scaling).flatten(1, 2)
        weights = (logits - lse.unsqueeze(-1)).exp() * (mask & inputs.allowed).to_dense()
        heat = weights.unflatten(1, (inputs.kv_heads, inputs.group)).sum((2, 3))
        state.counts[:, :, : inputs.capacity] += heat

    def select(self, inputs):
        heat = inputs.state.counts[:, :, None, : inputs.capacity]
        heat = heat.repeat_interleave(inputs.group, dim=1).expand(-1, -1, inputs.query_len, -1)
        allowed = inputs.allowed
        new = KeyRange(allowed.stop, allowed.stop, 8, start_offset=-8)
        indices, _ = inputs.ops.masked_topk(
            heat.contiguous(), 4, start=allowed.start, stop=allowed.stop
        )
        return Mask.from_ranges(inputs.shape, [new]) | Mask.from_indices(inputs.shape, indices)


@attrs.frozen(kw_only=True)
class HeatsForever(Heats):
    """What attention told it stays when the state goes back."""

    forgets: ClassVar[bool] = False


@attrs.frozen(kw_only=True)
class OwnSeed(Wrong):
    """Samples by a seed of its own."""

    capabilities: ClassVar[Capabilities] = Capabilities(stochastic=True)

    def select(self, inputs):
        draws = torch.rand(inputs.capacity, generator=torch.Generator().manual_seed(0))
        index = draws.argmax().view(1, 1, 1, 1)
        return Mask.from_indices(inputs.shape, index, probability=torch.full((1, 1, 1, 1), 0.5))


@attrs.frozen(kw_only=True)
class HidesParameter(Wrong):
    """Has a field that no pipeline can set."""

    more: int = 5


MISTAKES = [
    (LooksAhead(), "causality", "keys up to its own position"),
    (Forgets(), "previous_respected", "previous | selection"),
    (DropsFull(), "previous_empty_and_full", "previous.is_full"),
    (FillsEmpty(), "previous_empty_and_full", "nothing is attended"),
    (EditsPrevious(), "nothing_is_edited", r"edits previous \(a dense mask\)"),
    (EditsKeys(), "nothing_is_edited", "edits key"),
    (GlobalRandom(), "determinism", "inputs.random"),
    (IgnoresPadding(), "left_padding", "inputs.allowed.first"),
    (OtherShape(), "shape", "inputs.shape"),
    (Repeats(), "shape", "distinct"),
    (HiddenWeights(), "shape", "stochastic=True"),
    (NeedsManyKeys(), "short_keys", "RuntimeError"),
    (WrongGroup(), "kv_groups", "h // inputs.group"),
    (CountsAppends(), "chunked_append", "not on how they come"),
    (PrunesByAppends(), "chunked_append", "not on how they come"),
    (NeverForgets(), "snapshot_and_restore", "restore"),
    (LeavesPaddingBehind(), "reorder", r"reorder\(\[1, 2, 0\]\), with padding.*index_select"),
    (SendsSequences(), "reorder", r"reorder\(\[1, 2, 0\]\), with no padding"),
    (KeepsItsBatch(), "reorder", "RuntimeError"),
    (SharesSecretly(), "layers_are_independent", "inputs.state"),
    (ClaimsPositions(), "position_only", "drop position_only"),
    (LosesParameter(more=5), "parameters_round_trip", "sah_core.param"),
    (HidesParameter(), "parameters_round_trip", "field more is no parameter.*sah_core.param"),
    (Undecorated(), "frozen", "attrs.frozen"),
    (Mutable(), "frozen", "cannot be hashed.*in its state"),
    (Undocumented(), "docstring", "what it selects"),
    (Unpicklable(), "pickling", "top of a module"),
    (Admits(), "no_readmission", "previous & inputs.allowed"),
    (CutsInTwo(), "allowed_only", "no foreign masks"),
    (RanksHiddenKeys(), "allowed_only", "a foreign mask.*choose among inputs.allowed"),
    (AddsValues(), "shape", "RuntimeError.*size of tensor"),
    (MergesHeads(), "shape", "RuntimeError.*view"),
    (
        FalseProbability(),
        "probabilities",
        "often, weighted.* counts 0.*over all seeds",
    ),
    (FalseProbability(probability=0.05), "probabilities", "often, weighted.* counts [5-9]"),
    (HeatsForever(), "snapshot_and_restore", "restore"),
    (LongRange(), "shape", "KeyRange a capacity"),
    (OwnSeed(), "determinism", "another seed.*inputs.random"),
    (Overflows(), "dtypes", "float16.*query.float()"),
    (SharedByTwo(), "same_masker_twice", "second of two.*for itself"),
    (SharedByAll(), "same_masker_twice", "two requests at a time"),
    (CountsOnTheHost(), "no_host_sync", r"reads a number from the device.*inputs.budget"),
    (IgnoresItsBound(), "no_host_sync", "reads a number from the device"),
    (ForgetsItsBound(), "captured_decode", "read inputs.length"),
    (ListsOnTheHost(), "no_host_sync", "copies host data to the device"),
    (PicksByFlags(), "no_host_sync", "indexes by a boolean mask"),
    (OnTheHost(), "device", "its mask holds a tensor on cpu.*device=inputs.device"),
    (ScoresOnTheHost(), "device", r"mixes tensors .*in add\).*device=inputs.device"),
    (EndsWithTheBuffer(), "captured_decode", "read inputs.length"),
    (AllProbabilities(), "memory", "return ranges or indices"),
    (ComparesAllKeys(), "memory", "grows from .*one score per key"),
    (FlagsEveryPosition(), "memory", "compute the positions that it selects"),
    (Greedy(), "density", "16 of 203 keys, where heavy_size allows 8"),
    (Stingy(), "density", "1 of 203 keys, where heavy_size asks for 8"),
]


@pytest.mark.parametrize(
    ("masker", "check", "advice"), MISTAKES, ids=[type(m).__name__ for m, *_ in MISTAKES]
)
def test_a_mistake_is_caught_by_its_check_which_says_what_to_change(masker, check, advice):
    [result] = run_checks(masker, [getattr(module, f"check_{check}")])
    assert result.name == check
    assert result.failed
    assert result.message.startswith("wrong: ")
    assert "\n" not in result.message
    with pytest.raises(AssertionError, match=advice):
        raise AssertionError(result.message)


@pytest.mark.parametrize("check", ["no_host_sync", "captured_decode"])
def test_a_masker_that_no_parameter_bounds_skips_what_needs_a_bound(check):
    class Unbounded(Right):
        capabilities: ClassVar[Capabilities] = Capabilities(unbounded=True)

    [result] = run_checks(Unbounded(), [getattr(module, f"check_{check}")])
    assert result.status == "skipped"
    assert "unbounded" in result.message


def test_without_the_mistake_they_pass():
    assert [r for r in run_checks(Right(), IN_THIS_PROCESS) if r.failed] == []


@pytest.mark.parametrize(
    "masker", [LeavesPaddingBehind(), SendsSequences(), KeepsItsBatch()], ids=lambda m: type(m)
)
def test_states_that_follow_wrongly_are_caught_by_no_other_check(masker):
    results = run_checks(masker, IN_THIS_PROCESS)
    assert [result.name for result in results if result.failed] == ["reorder"]


def test_without_the_mistake_the_same_state_follows():
    results = {result.name: result for result in run_checks(Remembers(), IN_THIS_PROCESS)}
    assert [result for result in results.values() if result.failed] == []
    assert results["reorder"].passed


def test_a_state_that_says_nothing_of_order_is_not_held_to_any():
    kept, none = CountsAppends(), Right()
    for masker, reason in ((none, "it keeps no state"), (kept, r"its state (Keys) has no method")):
        [result] = run_checks(masker, [module.check_reorder])
        assert result.status == "skipped"
        assert reason in result.message


def test_what_attention_tells_is_taken_back_with_the_state():
    checks = [module.check_chunked_append, module.check_snapshot_and_restore]
    assert [r.message for r in run_checks(Heats(), checks) if r.failed] == []


@pytest.mark.parametrize("skipped", [0, 9])
def test_a_true_probability_passes(skipped):
    masker = FalseProbability(probability=6 / (24 - skipped), skipped=skipped)
    [result] = run_checks(masker, [module.check_probabilities])
    assert result.passed, result.message


def test_a_module_without_a_source_is_caught(monkeypatch):
    monkeypatch.setitem(sys.modules, "sourceless", types.ModuleType("sourceless", "Says nothing."))
    monkeypatch.setattr(Undocumented, "__module__", "sourceless")
    monkeypatch.setattr(Undocumented, "__doc__", "Selects.")
    [result] = run_checks(Undocumented(), [module.check_docstring])
    assert result.failed
    assert "module sourceless names no source; name the paper by its arXiv id" in result.message
    for text in ("See arXiv 2309.17453.", "doi 10.1145/3600006", "No paper: a control."):
        sys.modules["sourceless"].__doc__ = text
        [result] = run_checks(Undocumented(), [module.check_docstring])
        assert result.passed


def test_a_file_without_a_source_is_called_by_its_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE.format(module="math").replace("No paper", "Nothing"))
    from sah_core import Registry

    registry = Registry()
    registry.load_file(file)
    [result] = run_checks(registry.maskers["heavy"](), [module.check_docstring])
    assert "the docstring of mine.py names no source" in result.message


FILE = """
'No paper: it imports what it does not need.'
import {module}
import attrs
from sah_core import Masker, hookimpl

@attrs.frozen(kw_only=True)
class Heavy(Masker):
    "Selects nothing."
    name = "heavy"

    def add_mask(self, inputs, previous):
        return previous

@hookimpl
def sah_masker():
    return Heavy
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("imported", "advice"),
    [
        ("sah_bench", "imports sah_bench; import it inside"),
        ("sah_plugins.maskers.sink", "another masker, sah_plugins.maskers.sink; move"),
        ("nothing_of_this_name", "in a fresh process fails: ModuleNotFoundError"),
    ],
)
def test_a_module_that_imports_too_much_is_caught(tmp_path, monkeypatch, imported, advice):
    path = tmp_path / "heavy.py"
    path.write_text(FILE.format(module=imported))
    monkeypatch.setitem(sys.modules, imported, types.ModuleType(imported))
    registry.load_file(path)
    try:
        [result] = run_checks(registry.maskers["heavy"](), [module.check_import_weight])
        assert result.failed
        assert advice in result.message
    finally:
        registry.unload_file(path)


def test_every_check_catches_some_mistake():
    caught = {check for _, check, _ in MISTAKES} | {"import_weight"}
    assert caught == {check.__name__.removeprefix("check_") for check in CHECKS}


def test_every_check_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert rows == [check.__name__.removeprefix("check_") for check in CHECKS]
