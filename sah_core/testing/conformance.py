"""Conformance checks: what every masker must do, whatever its method.

Each check is a function of a masker that raises `AssertionError`, saying what is wrong and what to
change, or `CheckSkipped`, saying why it cannot apply, which pytest reports as a skipped test. A
plugin's test suite runs them all:

    @pytest.mark.parametrize("check", CHECKS)
    def test_conformance(check, tmp_path):
        check(MyMasker.example(tmp_path))

A masker is checked with the parameters that it is given; small budgets say more than large ones.
Small random tensors go through the same `Session` that a model goes through, without a backend.
"""

from __future__ import annotations

import json
import pickle
import unittest
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, Literal, NoReturn

import attrs
import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.attention import Session
from sah_core.errors import UnsupportedError, one_line
from sah_core.inputs import Inputs, Phase
from sah_core.mask import KeyRange, Mask
from sah_core.masker import Masker
from sah_core.parameters import from_plain, to_plain
from sah_core.pipeline import Pipeline
from sah_core.pipeline_text import format_call, parse_text


@attrs.frozen(kw_only=True)
class Model:
    """The numbers of a model, which an artefact must fit.

    Attributes:
        layers: Layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Channels of a query, a key and a value.
        hidden: Channels of a layer's input.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int


MODEL = Model(layers=4, heads=4, kv_heads=2, head_dim=16, hidden=24)
"""What most calls of the checks look like; some have other numbers of heads."""

SEED = 5
LAST_QUERIES = 32
TOLERANCE = 1e-6


@attrs.frozen(kw_only=True)
class CheckResult:
    """How one check went.

    Attributes:
        name: The check, without ``check_``.
        status: ``passed``, ``failed`` or ``skipped``.
        message: What is wrong and what to change, or why the check cannot apply; empty if it
            passed.
    """

    name: str
    status: Literal["passed", "failed", "skipped"]
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether the masker does what it must."""
        return self.status == "passed"

    @property
    def failed(self) -> bool:
        """Whether the masker does something that it must not."""
        return self.status == "failed"


class CheckSkipped(unittest.SkipTest):
    """A check cannot apply to this masker; the message says why.

    As a `unittest.SkipTest` it makes a skipped test under pytest too.
    """


Check = Callable[[Masker], None]


def run_checks(masker: Masker, checks: Iterable[Check] | None = None) -> list[CheckResult]:
    """Run the checks over a masker, all of them by default.

    Whatever a masker raises fails the check during which it did.
    """
    results = []
    for check in CHECKS if checks is None else checks:
        status: Literal["passed", "failed", "skipped"] = "failed"
        message = ""
        try:
            check(masker)
        except AssertionError as error:
            message = str(error) or "an assertion without a message failed"
        except CheckSkipped as error:
            status, message = "skipped", str(error)
        except Exception as error:  # a masker under test may raise anything
            message = f"{masker.name}: raised {type(error).__name__}: {one_line(str(error))}"
        else:
            status = "passed"
        name = check.__name__.removeprefix("check_")
        results.append(CheckResult(name=name, status=status, message=message))
    return results


# Material


@attrs.frozen(kw_only=True)
class _Given(Masker):
    """Stands for earlier steps: a literal mask, cut to the call."""

    name: ClassVar[str] = "given"

    make: Callable[[Inputs], Mask]

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        return self.make(inputs)


@attrs.frozen(kw_only=True, eq=False)
class _Tokens:
    """Random queries, keys and values of whole sequences.

    Attributes:
        query: ``(batch, heads, length, head_dim)``.
        key: ``(batch, kv_heads, length, head_dim)``.
        value: Likewise.
        hidden: ``(batch, length, channels)``.
        first: First real key per sequence, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    first: Tensor | None = None

    @classmethod
    def random(
        cls,
        length: int,
        *,
        batch: int = 1,
        heads: int = MODEL.heads,
        kv_heads: int = MODEL.kv_heads,
        seed: int = 0,
    ) -> _Tokens:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return cls(
            query=draw(batch, heads, length, MODEL.head_dim) * 2,
            key=draw(batch, kv_heads, length, MODEL.head_dim),
            value=draw(batch, kv_heads, length, MODEL.head_dim),
            hidden=draw(batch, length, MODEL.hidden),
        )

    @property
    def length(self) -> int:
        return self.key.shape[2]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.hidden

    def followed_by(self, other: _Tokens, length: int, factor: float = 1.0) -> _Tokens:
        """The first ``length`` tokens, then those of another sequence, times a factor."""
        query, key, value, hidden = (
            torch.cat(
                [a.narrow(d, 0, length), b.narrow(d, length, b.shape[d] - length) * factor], d
            )
            for a, b, d in zip(self.tensors(), other.tensors(), (2, 2, 2, 1), strict=True)
        )
        return attrs.evolve(self, query=query, key=key, value=value, hidden=hidden)

    def sequence(self, index: int, padding: int) -> _Tokens:
        """One sequence of the batch without its padding."""
        query, key, value, hidden = (
            t[index : index + 1].narrow(d, padding, self.length - padding)
            for t, d in zip(self.tensors(), (2, 2, 2, 1), strict=True)
        )
        return _Tokens(query=query, key=key, value=value, hidden=hidden)


def _nothing(inputs: Inputs) -> Mask:
    return Mask.empty(inputs.shape)


class _Run:
    """A masker in a running request, its mask the only thing that is looked at."""

    def __init__(
        self, masker: Masker, tokens: _Tokens, previous: Callable[[Inputs], Mask] = _nothing
    ) -> None:
        self.masker = masker
        self.tokens = tokens
        steps = (_Given(make=previous), masker)
        pipeline = Pipeline.of(*steps, prefill="sparse", seed=SEED)
        self.session = Session(pipeline, ["full_attention"] * MODEL.layers)

    def inputs(
        self, begin: int, end: int, phase: Phase, layer: int, allowed: Allowed | None
    ) -> Inputs:
        """The call of query rows ``begin`` to ``end`` over the keys before ``end``."""
        tokens, needs = self.tokens, self.masker.capabilities.needs
        rows = tokens.query[:, :, begin:end]
        limits = Allowed.causal(end - begin, end, first=tokens.first)

        def needed(name: str, tensor: Tensor) -> Tensor | None:
            return tensor if name in needs else None

        return Inputs(
            query=rows,
            key=tokens.key[:, :, :end],
            value=tokens.value[:, :, :end],
            allowed=limits if allowed is None else allowed,
            scaling=0.25,
            key_len=end,
            layer=layer,
            layer_count=MODEL.layers,
            phase=phase,
            request_state=self.session.request_state,
            hidden_states=needed("hidden_states", tokens.hidden[:, begin:end]),
            query_pre_rope=needed("query_pre_rope", rows),
            key_pre_rope=needed("key_pre_rope", tokens.key[:, :, :end]),
            window_queries=needed(
                "window_queries", tokens.query[:, :, max(0, end - LAST_QUERIES) : end]
            ),
        )

    def call(
        self,
        begin: int,
        end: int,
        phase: Phase,
        *,
        layer: int = 0,
        allowed: Allowed | None = None,
    ) -> tuple[Mask, Inputs]:
        """One attention call, up to its mask."""
        inputs = self.inputs(begin, end, phase, layer, allowed)
        states = self.session.advance(inputs)
        return self.session.mask_for(inputs, states), inputs

    def context(self, end: int, chunks: Sequence[int] = (), *, layer: int = 0) -> None:
        """Show the masker a context, at once or in chunks of keys."""
        begin = 0
        for size in chunks or (end,):
            if size:
                self.session.advance(self.inputs(begin, begin + size, "prefill", layer, None))
            begin += size

    def question(self, begin: int, end: int, *, layer: int = 0) -> tuple[Mask, Inputs]:
        """The call of a question, or of a generated token, after its context."""
        return self.call(begin, end, "question" if end > begin + 1 else "decode", layer=layer)


@attrs.frozen(kw_only=True)
class _Shape:
    """A kind of call."""

    title: str
    length: int
    rows: int
    batch: int = 1
    heads: int = MODEL.heads
    kv_heads: int = MODEL.kv_heads
    first: tuple[int, ...] | None = None

    def tokens(self) -> _Tokens:
        tokens = _Tokens.random(
            self.length, batch=self.batch, heads=self.heads, kv_heads=self.kv_heads
        )
        if self.first is None:
            return tokens
        return attrs.evolve(tokens, first=torch.tensor(self.first, dtype=torch.int32))

    def run(
        self, masker: Masker, previous: Callable[[Inputs], Mask] = _nothing
    ) -> tuple[Mask, Inputs]:
        """The mask of the call after its context, and the call."""
        run = _Run(masker, self.tokens(), previous)
        begin = self.length - self.rows
        if not begin:
            return run.call(0, self.length, "prefill")
        run.context(begin)
        return run.question(begin, self.length)


SHAPES = (
    _Shape(title="one query row", length=203, rows=1),
    _Shape(title="several query rows", length=203, rows=5),
    _Shape(title="a prefill", length=61, rows=61),
    _Shape(title="as many KV heads as query heads", length=203, rows=2, kv_heads=4),
    _Shape(title="one KV head", length=203, rows=1, heads=6, kv_heads=1),
    _Shape(title="a left-padded batch", length=203, rows=3, batch=2, first=(0, 58)),
    _Shape(
        title="a sequence that is nearly all padding", length=90, rows=1, batch=2, first=(88, 0)
    ),
)
SHORT = (
    _Shape(title="one key", length=1, rows=1),
    _Shape(title="two keys", length=2, rows=1),
    _Shape(title="three keys and two rows", length=3, rows=2),
    _Shape(title="seven keys", length=7, rows=1, batch=2, first=(0, 5)),
)


def _fits(masker: Masker, heads: int, kv_heads: int) -> bool:
    """Whether the masker takes calls with these numbers of heads: an artefact fits one model."""
    if (heads, kv_heads) == (MODEL.heads, MODEL.kv_heads):
        return True
    try:
        _Shape(title="a try", length=40, rows=1, heads=heads, kv_heads=kv_heads).run(masker)
    except UnsupportedError:
        return False
    except Exception:  # the check proper reports what a masker under test raises
        return True
    return True


def _shapes(masker: Masker) -> tuple[_Shape, ...]:
    """The kinds of calls that the masker takes."""
    return tuple(shape for shape in SHAPES if _fits(masker, shape.heads, shape.kv_heads))


def _skip(masker: Masker, why: str) -> NoReturn:
    raise CheckSkipped(f"{masker.name}: {why}")


def _effective(mask: Mask, inputs: Inputs) -> Tensor:
    """The probability of every key that may be attended."""
    return mask.to_dense() * inputs.allowed.to_dense(inputs.capacity)


def _fail(masker: Masker, what: str, change: str) -> NoReturn:
    raise AssertionError(f"{masker.name}: {what}; {change}")


def _require(holds: object, masker: Masker, what: str, change: str) -> None:
    if not holds:
        _fail(masker, what, change)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= TOLERANCE).all())


def _earlier() -> Iterator[tuple[str, Callable[[Inputs], Mask]]]:
    """Selections that earlier steps may have made, in every form."""

    def indices(inputs: Inputs) -> Tensor:
        first = inputs.allowed.first.view(-1, 1, 1, 1)
        steps = torch.arange(0, 9, 4, dtype=torch.int32)
        return (first + steps).clamp(max=inputs.capacity - 1)[..., : inputs.capacity]

    def ranges(inputs: Inputs) -> Mask:
        position = inputs.query_position.unsqueeze(1)
        window = KeyRange(position, position, 3, start_offset=-2, stop_offset=1)
        return Mask.from_ranges(inputs.shape, [window])

    def keys(inputs: Inputs) -> Mask:
        chosen = indices(inputs)
        chosen = chosen.expand(-1, inputs.kv_heads, inputs.query_len, -1)
        first_of_each = torch.ones_like(chosen, dtype=torch.bool)
        first_of_each[..., 1:] = chosen[..., 1:] != chosen[..., :-1]
        return Mask.from_indices(inputs.shape, chosen.masked_fill(~first_of_each, -1))

    def sampled(inputs: Inputs) -> Mask:
        mask = keys(inputs)
        assert mask.selected is not None
        chance = torch.full(mask.selected.indices.shape, 0.25)
        return Mask.from_indices(inputs.shape, mask.selected.indices, probability=chance)

    def dense(inputs: Inputs) -> Mask:
        return Mask.from_dense(keys(inputs).to_dense() * 0.5, inputs.shape)

    yield "a range", ranges
    yield "keys by index", keys
    yield "sampled keys", sampled
    yield "a range and sampled keys", lambda inputs: ranges(inputs) | sampled(inputs)
    yield "a dense mask", dense


# Checks


def check_docstring(masker: Masker) -> None:
    """The class says what it selects."""
    _require(
        (type(masker).__doc__ or "").strip(),
        masker,
        f"class {type(masker).__name__} has no docstring",
        "say in one line what it selects",
    )


def check_frozen(masker: Masker) -> None:
    """The masker is its parameters: nothing can be assigned to it."""
    change = "declare the class with @attrs.frozen(kw_only=True) and keep what changes in its state"
    # without the decorator, what looks like a field is none
    decorated = "__attrs_attrs__" in vars(type(masker))
    _require(decorated, masker, f"{type(masker).__name__} is no attrs class of its own", change)
    try:
        masker.anything = 1  # type: ignore[attr-defined]
    except AttributeError:
        pass
    else:
        _fail(masker, "attributes can be set on it", change)
    try:
        hash(masker)
    except TypeError as error:
        raise AssertionError(f"{masker.name}: cannot be hashed ({error}); {change}") from error


def check_parameters_round_trip(masker: Masker) -> None:
    """Plain data, JSON and pipeline text give an equal masker back."""
    change = "declare every field with sah_core.param"
    plain = to_plain(masker)
    again = from_plain(type(masker), plain)
    _require(again == masker, masker, f"its plain form {plain} gives {again}", change)
    from_json = from_plain(type(masker), json.loads(json.dumps(plain)))
    _require(from_json == masker, masker, f"through JSON {plain} gives {from_json}", change)
    text = format_call(masker.name, plain)
    [step] = parse_text(text).steps
    from_text = from_plain(type(masker), step.arguments)
    _require(from_text == masker, masker, f"the text '{text}' gives {from_text}", change)


def check_pickling(masker: Masker) -> None:
    """A worker process gets the same masker."""
    change = "define the class at the top of a module and keep its fields to plain values"
    try:
        again = pickle.loads(pickle.dumps(masker))
    except Exception as error:  # whatever the fields of a foreign class raise
        raise AssertionError(f"{masker.name}: cannot be pickled ({error}); {change}") from error
    _require(again == masker, masker, "its pickled copy is not equal to it", change)


def check_shape(masker: Masker) -> None:
    """The mask is well formed for every kind of call."""
    for shape in _shapes(masker):
        mask, inputs = shape.run(masker)
        _check_well_formed(masker, mask, inputs, shape.title)


def _check_well_formed(masker: Masker, mask: Mask, inputs: Inputs, where: str) -> None:
    """Shape, types, probabilities in [0, 1], and no key twice."""
    _require(
        isinstance(mask, Mask) and mask.shape == inputs.shape,
        masker,
        f"with {where} the mask has shape {getattr(mask, 'shape', None)}, not {inputs.shape}",
        "build it with inputs.shape",
    )
    dense = mask.to_dense()
    _require(
        bool(((dense >= 0) & (dense <= 1)).all()),
        masker,
        f"with {where} probabilities lie outside [0, 1]",
        "give the inclusion probability of each key, not a score or a weight",
    )
    _require(
        masker.capabilities.stochastic or bool(((dense == 0) | (dense == 1)).all()),
        masker,
        f"with {where} keys have probabilities between 0 and 1",
        "declare capabilities = Capabilities(stochastic=True), or select with probability 1",
    )
    if mask.selected is None:
        return
    keys, _ = mask.selected.tokens(inputs.capacity)
    ordered = keys.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    _require(
        not bool(twice.any()),
        masker,
        f"with {where} a key is selected twice in a row of indices",
        "keep indices distinct: backends add every entry to the softmax",
    )


def check_allowed_only(masker: Masker) -> None:
    """What may not be attended is never attended, whatever the limits look like."""
    change = "choose among inputs.allowed; what it forbids is taken out again and must not cost"
    kinds: list[tuple[str, Callable[[int, int], Allowed]]] = [
        ("causal limits", lambda rows, keys: Allowed.causal(rows, keys)),
        ("a sliding window", lambda rows, keys: Allowed.causal(rows, keys, window=9)),
        ("a foreign mask", _foreign),
    ]
    for title, limits in kinds:
        for begin, end in ((96, 97), (90, 97)):
            run = _Run(masker, _Tokens.random(end))
            run.context(begin)
            allowed = limits(end - begin, end)
            mask, inputs = run.call(begin, end, "question", allowed=allowed)
            _check_well_formed(masker, mask, inputs, title)
            keep = allowed.to_dense(end).expand(inputs.shape)
            dense = (mask & allowed).to_dense()
            _require(not bool(dense[~keep].any()), masker, f"{title} are not respected", change)
            chosen, total = (t.expand(inputs.shape[:3]) for t in mask.counts(allowed))
            _require(
                torch.equal(chosen, (dense > 0).sum(-1)) and bool((chosen <= total).all()),
                masker,
                f"with {title} the mask counts {int(chosen.sum())} keys and has "
                f"{int((dense > 0).sum())}",
                "keep indices distinct and inside the keys",
            )


def _foreign(rows: int, keys: int) -> Allowed:
    """Limits that are no interval: every third key is hidden."""
    keep = Allowed.causal(rows, keys).to_dense(keys).clone()
    keep[..., 1::3] = False
    return Allowed.from_dense(keep)


def check_no_readmission(masker: Masker) -> None:
    """A restricting step only removes; after an intersection nothing forbidden comes back."""

    def clipped(inputs: Inputs) -> Mask:
        return Mask.full(inputs.shape) & inputs.allowed

    for shape in _shapes(masker):
        mask, inputs = shape.run(masker, clipped)
        forbidden = ~inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape)
        dense = (mask & inputs.allowed).to_dense()
        _require(
            not bool(dense[forbidden].any()),
            masker,
            f"with {shape.title} forbidden keys are back after the intersection",
            "leave inputs.allowed as it is",
        )
        if masker.capabilities.restricts:
            _require(
                not bool(mask.to_dense()[forbidden].any()),
                masker,
                f"with {shape.title} a step that restricts admits keys",
                "return previous & inputs.allowed, or less",
            )


def check_causality(masker: Masker) -> None:
    """Later tokens change nothing in earlier rows, in one forward pass or in chunks.

    A page-granular masker may judge a page by all its keys, so for it the change begins with a
    page.
    """
    page = int(getattr(masker, "page_size", 1)) if masker.capabilities.page_granular else 1
    cut = -(-37 // page) * page
    length = cut + 24
    tokens = _Tokens.random(length)
    changed = tokens.followed_by(_Tokens.random(length, seed=1), cut, factor=3.0)
    for title, chunks in (("a prefill", (length,)), ("chunks", (cut - 9, 20, 13))):
        masks = []
        for sequence in (tokens, changed):
            run = _Run(masker, sequence)
            begin, parts = 0, []
            for size in chunks:
                mask, inputs = run.call(begin, begin + size, "prefill")
                dense = _effective(mask, inputs)
                parts.append(torch.nn.functional.pad(dense, (0, length - begin - size)))
                begin += size
            masks.append(torch.cat(parts, dim=2))
        rows = [t[:, :, :cut] for t in masks]
        wrong = ((rows[0] - rows[1]).abs() > TOLERANCE).any(-1).flatten(0, 1).any(0)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            _fail(
                masker,
                f"in {title}, tokens from position {cut} on change what row {row} attends",
                "let a query row depend on the keys up to its own position only",
            )


def check_previous_respected(masker: Masker) -> None:
    """What earlier steps selected stays, with at least its probability, unless the step prunes."""
    if masker.capabilities.prunes:
        _skip(masker, "a step that declares prunes may remove what was selected")
    for title, earlier in _earlier():
        for shape in _shapes(masker):
            mask, inputs = shape.run(masker, earlier)
            before = _effective(earlier(inputs), inputs)
            after = _effective(mask, inputs)
            _require(
                bool((after >= before - TOLERANCE).all()),
                masker,
                f"with {shape.title} it loses keys that were selected before ({title})",
                "return previous | selection, or declare Capabilities(prunes=True)",
            )
            if masker.capabilities.restricts:
                _require(
                    _same(after, before),
                    masker,
                    f"with {shape.title} a step that restricts selects keys (before: {title})",
                    "return previous & inputs.allowed, or less",
                )


def check_previous_empty_and_full(masker: Masker) -> None:
    """Nothing selected before is a mask like any other, and so is everything."""
    for shape in (*_shapes(masker), *SHORT):
        mask, inputs = shape.run(masker, lambda inputs: Mask.full(inputs.shape))
        _require(
            mask.shape == inputs.shape, masker, "a full mask loses its shape", "use inputs.shape"
        )
        everything = inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape).float()
        _require(
            masker.capabilities.prunes or _same(_effective(mask, inputs), everything),
            masker,
            f"with {shape.title} a full mask does not stay full",
            "return previous when previous.is_full",
        )
        mask, inputs = shape.run(masker)
        if masker.capabilities.prunes or masker.capabilities.restricts:
            _require(
                not bool(_effective(mask, inputs).any()),
                masker,
                f"with {shape.title} it selects keys where nothing was selected",
                "an empty mask means that nothing is attended; return it",
            )


def check_kv_groups(masker: Masker) -> None:
    """Each query head uses the keys of its own KV group."""
    counts = [k for k in (1, 2) if _fits(masker, 4, k)] if _fits(masker, 4, 4) else []
    if not counts:
        _skip(masker, f"what it was given fits {MODEL.heads} heads on {MODEL.kv_heads} only")
    for kv_heads in counts:
        grouped = _Tokens.random(150, kv_heads=kv_heads)
        group = 4 // kv_heads
        single = attrs.evolve(
            grouped,
            key=grouped.key.repeat_interleave(group, dim=1),
            value=grouped.value.repeat_interleave(group, dim=1),
        )
        found = []
        for tokens in (grouped, single):
            run = _Run(masker, tokens)
            run.context(147)
            found.append(run.question(147, 150))
        (mask, inputs), (alone, other) = found
        _require(
            4 % mask.heads == 0,
            masker,
            f"with {kv_heads} KV heads and 4 query heads the mask has {mask.heads} selections",
            "select per query head, per KV head, or once",
        )
        if mask.heads == 4:
            _require(
                _same(_effective(mask, inputs), _effective(alone, other)),
                masker,
                f"with {kv_heads} KV heads it differs from the same keys repeated for 4 heads",
                "query head h belongs to KV head h // inputs.group",
            )


def check_left_padding(masker: Masker) -> None:
    """A left-padded batch selects for each sequence what the sequence alone selects."""
    length, first = 211, (0, 77, 140)
    batch = attrs.evolve(
        _Tokens.random(length, batch=3), first=torch.tensor(first, dtype=torch.int32)
    )
    for rows in (1, 4):
        begin = length - rows
        run = _Run(masker, batch)
        run.context(begin)
        together = _effective(*run.question(begin, length))
        for index, padding in enumerate(first):
            run = _Run(masker, batch.sequence(index, padding))
            run.context(begin - padding)
            expected = _effective(*run.question(begin - padding, length - padding))
            _require(
                _same(together[index : index + 1, :, :, padding:], expected),
                masker,
                f"a sequence with {padding} keys of padding selects other keys than it does alone",
                "count from inputs.allowed.first, take sizes from inputs.budget, and give the "
                "state LayerInfo.first",
            )


def check_short_keys(masker: Masker) -> None:
    """Fewer keys than any budget are no problem."""
    for shape in SHORT:
        mask, inputs = shape.run(masker)
        _check_well_formed(masker, mask, inputs, shape.title)
        run = _Run(masker, shape.tokens())
        for end in range(1, shape.length + 1):
            mask, inputs = run.call(end - 1, end, "prefill")
            _check_well_formed(masker, mask, inputs, f"{shape.title}, token by token")


def check_nothing_is_edited(masker: Masker) -> None:
    """Inputs, limits, the previous mask and the masker itself stay as they are."""
    for title, earlier in _earlier():
        for shape in SHAPES[1:2] + SHAPES[5:6]:
            tokens = shape.tokens()
            kept: list[tuple[Mask, list[Tensor]]] = []

            def remember(
                inputs: Inputs,
                earlier: Callable[[Inputs], Mask] = earlier,
                kept: list[tuple[Mask, list[Tensor]]] = kept,
            ) -> Mask:
                mask = earlier(inputs)
                kept.append((mask, [t.clone() for t in _tensors(mask)]))
                return mask

            run = _Run(masker, tokens, remember)
            before = [t.clone() for t in tokens.tensors()]
            plain = to_plain(masker)
            run.context(shape.length - shape.rows)
            _, inputs = run.question(shape.length - shape.rows, shape.length)
            fresh = Allowed.causal(shape.rows, shape.length, first=tokens.first)
            edited = [
                name
                for name, a, b in zip(
                    ("query", "key", "value", "hidden_states"),
                    before,
                    tokens.tensors(),
                    strict=True,
                )
                if not torch.equal(a, b)
            ]
            if not torch.equal(fresh.start, inputs.allowed.start) or not torch.equal(
                fresh.stop, inputs.allowed.stop
            ):
                edited.append("allowed")
            for mask, tensors in kept:
                if not all(torch.equal(a, b) for a, b in zip(_tensors(mask), tensors, strict=True)):
                    edited.append(f"previous ({title})")
            if to_plain(masker) != plain:
                edited.append("the masker")
            _require(
                not edited,
                masker,
                f"it edits {', '.join(edited)}",
                "write to new tensors only: key and value are the cache itself",
            )


def _tensors(mask: Mask) -> list[Tensor]:
    tensors = [t for part in mask.ranges for t in (part.start_base, part.stop_base)]
    if mask.selected is not None:
        selected = mask.selected
        parts = (selected.indices, selected.count, selected.probability, selected.origin)
        tensors += [t for t in parts if t is not None]
    return tensors if mask.dense is None else [*tensors, mask.dense]


def check_determinism(masker: Masker) -> None:
    """The same call gives the same mask, and nobody else's random numbers are used up."""
    change = "take random numbers from inputs.random, which depend on their place alone"
    state = torch.get_rng_state()
    try:
        for shape in SHAPES[:2]:
            masks = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                before = torch.get_rng_state()
                masks.append(_effective(*shape.run(masker)))
                _require(
                    torch.equal(before, torch.get_rng_state()),
                    masker,
                    "it draws from torch's global generator",
                    change,
                )
            _require(_same(*masks), masker, f"with {shape.title} two runs differ", change)
    finally:
        torch.set_rng_state(state)


def check_layers_are_independent(masker: Masker) -> None:
    """What one layer sees does not change what another selects, unless choices are shared."""
    if masker.capabilities.shares_layers:
        _skip(masker, "it declares shares_layers")
    tokens, others = _Tokens.random(120), _Tokens.random(120, seed=3)
    alone = _Run(masker, tokens)
    alone.context(115, layer=2)
    expected = _effective(*alone.question(115, 120, layer=2))
    run = _Run(masker, others)
    run.context(115, layer=1)
    run.question(115, 120, layer=1)
    run.tokens = tokens
    run.context(115, layer=2)
    run.tokens = others
    run.question(115, 120, layer=3)
    run.tokens = tokens
    _require(
        _same(_effective(*run.question(115, 120, layer=2)), expected),
        masker,
        "other layers change what layer 2 selects",
        "keep everything in inputs.state, or declare Capabilities(shares_layers=True)",
    )


def check_chunked_append(masker: Masker) -> None:
    """Keys that come in chunks of any size give the mask that they give at once."""
    tokens = _Tokens.random(131)
    for rows in (1, 5):
        end = 126
        whole = _Run(masker, tokens)
        whole.context(end)
        expected = _effective(*whole.question(end, end + rows))
        for chunks in ((1,) * end, (50, 1, 1, 17, 57), (125, 1)):
            run = _Run(masker, tokens)
            run.context(end, chunks)
            _require(
                _same(_effective(*run.question(end, end + rows)), expected),
                masker,
                f"a context in chunks of {', '.join(map(str, chunks[:5]))}, ... keys gives another "
                "mask than the context at once",
                "let append depend on the keys and their positions, not on how they come",
            )
    # after the context keys come as a question, then one by one
    question, single = _Run(masker, tokens), _Run(masker, tokens)
    for run in (question, single):
        run.context(120)
    question.question(120, 130)
    for position in range(120, 130):
        single.question(position, position + 1)
    _require(
        _same(_effective(*question.question(130, 131)), _effective(*single.question(130, 131))),
        masker,
        "ten keys of a question give another mask afterwards than ten single tokens",
        "let append depend on the keys and their positions, not on how they come",
    )


def check_snapshot_and_restore(masker: Masker) -> None:
    """A state that went back to the end of the context answers as a fresh one."""
    context = _Tokens.random(140)
    run = _Run(masker, context)
    run.context(101)
    run.question(101, 102)
    base = run.session.snapshot()
    for seed in (1, 2, 1):
        tokens = context.followed_by(_Tokens.random(140, seed=seed), 102)
        fresh = _Run(masker, tokens)
        fresh.context(101)
        fresh.question(101, 102)
        run.session.restore(base)
        run.tokens = tokens
        for begin, end in ((102, 120), *((n, n + 1) for n in range(120, 140))):
            _require(
                _same(
                    _effective(*run.question(begin, end)), _effective(*fresh.question(begin, end))
                ),
                masker,
                f"after restore, key {begin} on, it selects other keys than a fresh state",
                "let restore(snapshot()) bring back everything that the snapshot saw",
            )


def check_position_only(masker: Masker) -> None:
    """A step that declares `position_only` selects the same for any tensors and in any layer."""
    if not masker.capabilities.position_only:
        _skip(masker, "it does not declare position_only")
    change = "drop position_only from its capabilities, or read neither tensors nor the layer"
    _require(not masker.is_stateful(), masker, "position_only and yet a state", change)
    for title, earlier in (("nothing", _nothing), *_earlier()):
        masks = []
        for seed, layer in ((0, 0), (1, 0), (0, 3)):
            run = _Run(masker, _Tokens.random(97, seed=seed), earlier)
            masks.append(_effective(*run.question(90, 97, layer=layer)))
        for other in masks[1:]:
            _require(
                _same(masks[0], other),
                masker,
                f"it declares position_only and selects otherwise for other tensors or in another "
                f"layer (before: {title})",
                change,
            )


CHECKS: tuple[Check, ...] = (
    check_docstring,
    check_frozen,
    check_parameters_round_trip,
    check_pickling,
    check_shape,
    check_short_keys,
    check_allowed_only,
    check_no_readmission,
    check_causality,
    check_previous_respected,
    check_previous_empty_and_full,
    check_kv_groups,
    check_left_padding,
    check_nothing_is_edited,
    check_determinism,
    check_layers_are_independent,
    check_chunked_append,
    check_snapshot_and_restore,
    check_position_only,
)
