"""States of the maskers whose sequences change places, as beams do."""

import attrs
import pytest
import torch

from sah_core import Pipeline, registry
from sah_core.errors import UnsupportedError
from sah_core.testing import conformance as kit
from sah_core.testing import run_checks
from sah_core.testing.conformance.calls import Run, Tokens

pytestmark = pytest.mark.unit

ROWS = torch.tensor([1, 2, 0])
OTHERS = {  # what the examples do not show
    "double-sparsity": {"label_bits": 16},
    "magicpig": {"center": False},
    "pq-cache": {"metric": "ip", "pq_bits": 4, "init_offset": 2},
    "random-at-budget": {"pipeline": "quest(8, page_size=4) | twilight(0.9)"},
    "socket": {"value_aware": False},
}

UNREAD = (  # the number of keys is the same whatever the states say; norms that nothing reads
    ("random-at-budget", {}),
    ("socket", {"value_aware": False}),
)


def stateful():
    found = [name for name in registry.maskers.names() if registry.maskers[name].is_stateful()]
    return [(name, {}) for name in found] + list(OTHERS.items())


def each(parameters):
    return pytest.mark.parametrize(
        parameters, [pytest.param(*case, id=f"{case[0]}{case[1] or ''}") for case in stateful()]
    )


def leaves(held, path=()):
    """The tensors that a state holds, by the attributes that lead to them."""
    if isinstance(held, torch.Tensor):
        yield path, held
        return
    if isinstance(held, dict):
        inside = held.items()
    elif attrs.has(type(held)):
        inside = [(field.name, getattr(held, field.name)) for field in attrs.fields(type(held))]
    elif hasattr(held, "__dict__") and type(held).__module__.startswith("sah_"):
        inside = vars(held).items()
    else:
        return
    for name, value in inside:
        yield from leaves(value, (*path, name))


def held_at(state, path):
    for name in path:
        state = state[name] if isinstance(state, dict) else getattr(state, name)
    return state


def run_of(masker, tokens, decoded):
    """A request up to so many decoded tokens."""
    run = Run(masker, tokens)
    run.context(101)
    for begin in range(101, 101 + decoded):
        run.question(begin, begin + 1)
    return run


def state_of(run):
    return run.session.layers[0].states[1]


@each(("name", "parameters"))
@pytest.mark.parametrize("first", [None, (0, 41, 9)])
def test_a_reordered_state_is_bit_for_bit_a_fresh_one_of_the_sequences(
    name, parameters, first, tmp_path
):
    masker = attrs.evolve(registry.maskers[name].example(tmp_path), **parameters)
    tokens = Tokens.random(140, batch=3, first=first)
    for rows in (ROWS, torch.tensor([2, 2, 0, 1, 2])):
        run = run_of(masker, tokens, 3)
        run.session.reorder(rows)
        run.tokens = tokens.taken(rows)
        fresh = run_of(masker, run.tokens, 20)
        for begin in range(104, 121):
            run.question(begin, begin + 1)
        found, expected = dict(leaves(state_of(run))), dict(leaves(state_of(fresh)))
        assert found.keys() == expected.keys()
        for path, tensor in expected.items():
            if path[-1] == "centroids":  # the last belongs to nobody
                tensor, found[path] = tensor[..., :-1, :], found[path][..., :-1, :]
            assert torch.equal(found[path], tensor), path
            assert found[path].dtype == tensor.dtype


def tensors_of_sequences(tmp_path_factory):
    for name, parameters in stateful():
        if (name, parameters) in UNREAD:
            continue
        folder = tmp_path_factory(name)
        masker = attrs.evolve(registry.maskers[name].example(folder), **parameters)
        run = run_of(masker, Tokens.random(140, batch=3, first=(0, 41, 9)), 1)
        for path, tensor in leaves(state_of(run)):
            if tensor.shape[0] == 3 and not torch.equal(tensor, tensor[ROWS]):
                yield masker, path


def test_the_check_notices_each_tensor_that_is_left_out(tmp_path_factory, monkeypatch):
    cases = list(tensors_of_sequences(tmp_path_factory.mktemp))
    assert len(cases) >= 20
    for masker, path in cases:
        kind = type(masker.init_state(_layer(masker)))
        with monkeypatch.context() as patch:
            patch.setattr(kind, "reorder", forgetting(kind.reorder, path))
            [result] = run_checks(masker, [kit.check_reorder])
        assert result.failed, (masker, path)
        assert "reorder(rows)" in result.message or "Error" in result.message


def _layer(masker):
    from sah_core.attention import layer_info

    run = Run(masker, Tokens.random(8, batch=3))
    return layer_info(run.inputs(7, 8, "decode", 0, None))


def forgetting(reorder, path):
    """A method that leaves one tensor as it was, where its shape allows it."""

    def forgets(self, rows):
        before = held_at(self, path)
        reorder(self, rows)
        holder = held_at(self, path[:-1])
        if before.shape == held_at(self, path).shape:
            object.__setattr__(holder, path[-1], before)

    return forgets


@each(("name", "parameters"))
def test_room_that_was_taken_stays(name, parameters, tmp_path):
    masker = attrs.evolve(registry.maskers[name].example(tmp_path), **parameters)
    run = run_of(masker, Tokens.random(140, batch=3), 2)
    before = {path: tensor.shape for path, tensor in leaves(state_of(run))}
    run.session.reorder(torch.tensor([0, 1, 1, 2]))
    for path, tensor in leaves(state_of(run)):
        expected = before[path]
        assert tensor.shape == (expected if expected[0] != 3 else (4, *expected[1:])), path


@each(("name", "parameters"))
def test_a_reordered_copy_leaves_the_state_alone(name, parameters, tmp_path):
    masker = attrs.evolve(registry.maskers[name].example(tmp_path), **parameters)
    tokens = Tokens.random(140, batch=3, first=(0, 41, 9))
    run = run_of(masker, tokens, 2)
    before = {path: tensor.clone() for path, tensor in leaves(state_of(run))}
    token, own = run.session.snapshot(), run.session.layers
    run.session.layers = run.session.branched(ROWS)
    run.tokens = tokens.taken(ROWS)
    for begin in range(103, 120):
        run.question(begin, begin + 1)
    run.session.layers, run.tokens = own, tokens
    run.session.restore(token)
    after = dict(leaves(state_of(run)))
    assert all(torch.equal(after[path], tensor) for path, tensor in before.items())


def test_copies_share_what_belongs_to_no_sequence(tmp_path):
    masker = registry.maskers["hash-attention"].example(tmp_path)
    run = run_of(masker, Tokens.random(140, batch=2), 1)
    [copied] = (kept.states[1] for kept in run.session.branched(torch.tensor([0, 0])).values())
    assert copied.functions is state_of(run).functions
    assert copied.ops is state_of(run).ops
    assert copied.words is not state_of(run).words


def test_the_control_follows_only_if_what_it_counts_does(monkeypatch):
    from sah_plugins.maskers.quest import PageBounds

    monkeypatch.delattr(PageBounds, "reorder")
    masker = Pipeline.parse("random-at-budget('quest(8, page_size=4)')").steps[0]
    run = run_of(masker, Tokens.random(140, batch=3), 1)
    with pytest.raises(UnsupportedError, match=r"'random-at-budget'.*no method reorder\(rows\)"):
        run.session.reorder(ROWS)
