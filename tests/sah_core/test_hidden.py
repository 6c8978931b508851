"""Hidden states of what a cache holds: kept while it is read, handed out with the first pass."""

import pytest
import torch

from sah_core import compat

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet", "no_grad")]

FAMILIES = ("llama", "gemma3", "gpt2")
LAYERS = (0, 1, compat.LAST)


def run(model, ids, kv_cache, **options):
    given = {compat.cache_argument(type(model).forward): kv_cache, "use_cache": True}
    return model(ids, **given, **options)


def expected(model, ids):
    """Outputs of the first layer, of the last, which stands behind the final norm, and again."""
    states = model(ids, output_hidden_states=True).hidden_states
    return states[1], states[2], states[-1]


def assert_are(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_all_tokens_however_these_were_read(models, family):
    model, ids = models.build(family), models.tokens(1, 20)
    kv_cache, hidden = compat.make_cache(model, 64), compat.HiddenStates(LAYERS)
    with hidden.recorded(model, kv_cache):
        for piece in ids.split(7, dim=1):
            run(model, piece, kv_cache)
        run(model, ids[:, :3], compat.make_cache(model, 64))  # another text
    assert_are(hidden.kept, expected(model, ids))


def test_tokens_that_the_cache_has_dropped_are_forgotten(models):
    model, ids, others = models.build("llama"), models.tokens(1, 20), models.tokens(1, 6, seed=3)
    kv_cache, hidden = compat.make_cache(model, 64), compat.HiddenStates(LAYERS)
    with hidden.recorded(model, kv_cache):
        run(model, ids, kv_cache)
        compat.shorten_cache(kv_cache, 8)
        run(model, others, kv_cache)
    assert_are(hidden.kept, expected(model, torch.cat([ids[:, :8], others], dim=1)))


@pytest.mark.parametrize("dropped", [0, 5])
@pytest.mark.parametrize("family", FAMILIES[::2])
def test_the_first_pass_that_asks_gets_those_of_the_whole_text(models, family, dropped):
    model, ids, others = models.build(family), models.tokens(1, 20), models.tokens(1, 6, seed=3)
    kv_cache, hidden = compat.make_cache(model, 64), compat.HiddenStates(LAYERS)
    with hidden.recorded(model, kv_cache):
        run(model, ids, kv_cache)
    compat.shorten_cache(kv_cache, 20 - dropped)
    with hidden.handed_out(model, kv_cache):
        run(model, ids[:, :3], compat.make_cache(model, 64))
        first = run(model, others, kv_cache, output_hidden_states=True).hidden_states
        second = run(model, others[:, :1], kv_cache, output_hidden_states=True).hidden_states
    whole = torch.cat([ids[:, : 20 - dropped], others], dim=1)
    assert_are((first[1], first[2], first[-1]), expected(model, whole))
    assert {state.shape[1] for state in second} == {1}
    assert run(model, others[:, :1], kv_cache).hidden_states is None
