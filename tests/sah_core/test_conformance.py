"""Conformance checks: every registered masker passes, and each check catches what it is for."""

import functools
import subprocess
import sys
import unittest
from typing import ClassVar

import attrs
import pytest
import torch

from sah_core import Capabilities, KeyRange, Mask, Masker, param, registry
from sah_core.errors import MissingParameterError, UnsupportedError
from sah_core.parameters import Size, specs
from sah_core.state import GrowingBuffer
from sah_core.testing import CHECKS, MODEL, CheckResult, CheckSkipped, run_checks
from sah_core.testing import conformance as module

pytestmark = pytest.mark.unit


def by_defaults(name):
    """The masker with its defaults; None if a parameter has none."""
    masker = registry.maskers[name]
    return None if any(spec.required for spec in specs(masker)) else masker()


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


@pytest.mark.parametrize(
    "masker",
    [pytest.param(m, id=m.name) for m in map(by_defaults, registry.maskers.names()) if m],
)
def test_every_masker_that_has_defaults_conforms_with_them(masker):
    assert [result for result in run_checks(masker) if result.failed] == []


def test_every_check_of_the_module_is_run():
    names = {name for name in vars(module) if name.startswith("check_")}
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
    results = {result.name: result for result in run_checks(OfOneModel())}
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
class NeverForgets(CountsAppends):
    """Keeps the keys of an answer that was taken back."""

    def append(self, state, key, value, start):
        state.appends = max(state.appends, start + int(key[0, 0, 0, 0] > 0))

    def init_state(self, layer):
        state = Keys()
        state.restore = lambda token: None
        return state


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
    (NeverForgets(), "snapshot_and_restore", "restore"),
    (SharesSecretly(), "layers_are_independent", "inputs.state"),
    (ClaimsPositions(), "position_only", "drop position_only"),
    (LosesParameter(more=5), "parameters_round_trip", "sah_core.param"),
    (Undecorated(), "frozen", "attrs.frozen"),
    (Mutable(), "frozen", "cannot be hashed.*in its state"),
    (Undocumented(), "docstring", "what it selects"),
    (Unpicklable(), "pickling", "top of a module"),
    (Admits(), "no_readmission", "previous & inputs.allowed"),
    (CutsInTwo(), "allowed_only", "no foreign masks"),
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


def test_without_the_mistake_they_pass():
    assert [r for r in run_checks(Right()) if r.failed] == []


def test_every_check_catches_some_mistake():
    assert {check for _, check, _ in MISTAKES} == {
        check.__name__.removeprefix("check_") for check in CHECKS
    }
