"""Both maskers keep the hub's rules and select what their papers say."""

import subprocess
import sys

import pytest
import torch
from sah_strided.dilated import Dilated
from sah_strided.strided import Strided

from sah_core import Pipeline, registry
from sah_core.allowed import Allowed
from sah_core.attention import build_mask
from sah_core.inputs import Inputs
from sah_core.testing import CHECKS


def dilated(row, key, size, dilation):
    return (row - key) % dilation == 0 and (row - key) // dilation < size


def strided(row, key, stride):
    return row - key < stride or (row - key) % stride == 0


def selected(masker, rows, keys, first=(0,)):
    """What a masker selects, bool ``(batch, rows, keys)``, of the allowed keys."""
    batch = len(first)
    allowed = Allowed.causal(rows, keys, first=torch.tensor(first))
    inputs = Inputs(
        query=torch.zeros(batch, 4, rows, 8),
        key=torch.zeros(batch, 2, keys, 8),
        value=torch.zeros(batch, 2, keys, 8),
        allowed=allowed,
        scaling=1.0,
        key_len=keys,
    )
    mask = build_mask([masker], inputs)
    dense = mask.to_dense() * allowed.to_dense(keys)
    assert bool((dense == dense[:, :1]).all()), "all heads share the pattern"
    assert mask.heads == 1
    return dense[:, 0] > 0


def expected(rule, rows, keys, first=(0,)):
    """The same by a loop over rows and keys."""
    found = torch.zeros(len(first), rows, keys, dtype=torch.bool)
    for sequence, start in enumerate(first):
        for row in range(rows):
            position = keys - rows + row
            for key in range(start, position + 1):
                found[sequence, row, key] = rule(position, key)
    return found


@pytest.mark.parametrize("masker", [Dilated, Strided])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, masker, tmp_path):
    check(masker.example(tmp_path))


@pytest.mark.parametrize("name", ["dilated", "strided"])
def test_the_hub_finds_them_by_name(name):
    entry = registry.maskers.entry(name)
    assert (entry.distribution, entry.state) == ("sah-strided", "ok")
    assert registry.maskers[name] in (Dilated, Strided)


@pytest.mark.parametrize("call", [(1, 50), (7, 50), (23, 23), (1, 3)])
@pytest.mark.parametrize("first", [(0,), (0, 2)])
@pytest.mark.parametrize(("size", "dilation"), [(6, 1), (6, 2), (5, 7), (100, 3)])
def test_a_dilated_window_holds_the_keys_of_its_definition(call, first, size, dilation):
    found = selected(Dilated(window_size=size, dilation=dilation), *call, first)
    torch.testing.assert_close(
        found, expected(lambda row, key: dilated(row, key, size, dilation), *call, first)
    )


@pytest.mark.parametrize("call", [(1, 50), (7, 50), (23, 23), (1, 3), (1, 1)])
@pytest.mark.parametrize("first", [(0,), (0, 2)])
@pytest.mark.parametrize("stride", [1, 4, 7, 64])
def test_strided_attention_holds_the_keys_of_its_definition(call, first, stride):
    if max(first) >= call[1]:
        pytest.skip("more padding than keys")
    found = selected(Strided(stride=stride), *call, first)
    torch.testing.assert_close(
        found, expected(lambda row, key: strided(row, key, stride), *call, first)
    )


def test_a_fraction_is_one_of_the_real_keys():
    found = selected(Dilated(window_size=0.1, dilation=2), 1, 60, (0, 20))
    assert found.sum(-1).flatten().tolist() == [6, 4]


def test_dilation_one_is_the_window_of_the_hub():
    local = registry.maskers["local"](window_size=9)
    torch.testing.assert_close(
        selected(Dilated(window_size=9, dilation=1), 5, 40), selected(local, 5, 40)
    )


def test_they_stand_in_pipelines_with_the_hub_s_own():
    text = "sink(4) | dilated(window_size=8, dilation=3) | strided(16)"
    pipeline = Pipeline.parse(text)
    assert Pipeline.parse(pipeline.text) == pipeline
    assert [type(step) for step in pipeline.steps[1:]] == [Dilated, Strided]


def test_nothing_of_the_hub_s_plugins_is_imported():
    code = (
        "import sys, sah_strided.dilated, sah_strided.strided; "
        "sys.exit(any(name.startswith('sah_plugins') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
