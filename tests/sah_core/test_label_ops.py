"""Labels, signatures and packed codes against loops."""

import pytest
import torch

from sah_core import ops
from sah_core.ops import REFERENCE

pytestmark = pytest.mark.unit

HEADS = [(4, 4, 4), (4, 2, 4), (4, 2, 2), (6, 1, 1), (6, 1, 6)]
"""Query heads, KV heads, and heads that have labels or signatures of their own."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [1, 5, 8, 32, 33])
def test_packed_codes_come_back_and_lie_where_they_are_said_to(bits, count):
    width = ops.code_width(bits)
    assert width >= bits
    codes = torch.randint(0, 2**bits, (2, 3, count), generator=generator(), dtype=torch.int32)
    words = ops.pack_codes(codes, width)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, ops.code_words(count, width))
    assert torch.equal(ops.unpack_codes(words, width, count), codes)
    flat = 0
    for j in range(count):
        flat |= int(codes[1, 2, j]) << (j * width)
    for w, word in enumerate(words[1, 2].tolist()):
        assert word % 2**32 == (flat >> (32 * w)) % 2**32


def test_set_bits_are_counted():
    words = [0, 1, -1, -(2**31), 2**31 - 1, 0x0F0F0F0F, -0x12345678]
    counted = ops.popcount(torch.tensor(words, dtype=torch.int32))
    assert counted.tolist() == [bin(word % 2**32).count("1") for word in words]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 4, 7])
def test_codes_stand_for_the_nearest_level(bits, dtype):
    vectors = torch.randn(5, 6, generator=generator()).to(dtype)
    vectors[0] = 3.0
    codes, affine = ops.quantise(vectors, bits)
    assert affine.dtype == dtype
    for vector, code, (step, least) in zip(vectors, codes, affine, strict=True):
        levels = torch.arange(2**bits) * step.float() + least.float()
        for x, c in zip(vector.float(), code.tolist(), strict=True):
            assert abs(levels[c] - x) <= (levels - x).abs().min() + 1e-6
    assert codes[0].eq(0).all()


def labels_of(key, channels, bits, heads, *, chunks=None, on_device=False, capacity=None):
    batch, _, key_len, _ = key.shape
    lists, count = channels.shape
    room = (batch, lists, capacity or key_len)
    if bits == 16:
        labels, affine = torch.zeros(*room, count, dtype=key.dtype), None
    else:
        words = ops.code_words(count, ops.code_width(bits))
        labels = torch.full((*room, words), 7, dtype=torch.int32)
        affine = torch.zeros(*room, 2, dtype=key.dtype)
    start = 0
    for size in chunks or [key_len]:
        at = torch.tensor([start], dtype=torch.int32) if on_device else start
        part = key[:, :, start : start + size]
        REFERENCE.label_update(labels, affine, part, channels, at, bits)
        start += size
    return labels, affine


def rounded(vector, bits):
    if bits == 16:
        return vector
    low, high = vector.min(), vector.max()
    step = (high - low) / (2**bits - 1) if high > low else 1.0
    return torch.round((vector - low) / step) * step + low


def joined(scores, kv_heads, reduction):
    if reduction == "none":
        return scores
    groups = scores.unflatten(1, (kv_heads, -1))
    return {"sum": groups.sum(2), "mean": groups.mean(2), "max": groups.amax(2)}[reduction]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("bits", [16, 4, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "lists"), HEADS)
def test_label_scores_are_dot_products_of_rounded_channels(heads, kv_heads, lists, bits, reduction):
    query = torch.randn(2, heads, 3, 10, generator=generator())
    key = torch.randn(2, kv_heads, 7, 10, generator=generator(1))
    channels = torch.rand(lists, 10, generator=generator(2)).argsort(1)[:, :5]
    labels, affine = labels_of(key, channels, bits, heads)
    scores = REFERENCE.label_scores(query, channels, labels, affine, bits, 0.5, kv_heads, reduction)
    assert scores.dtype == torch.float32
    expected = torch.zeros(2, heads, 3, 7)
    for b in range(2):
        for h in range(heads):
            chosen = channels[h * lists // heads]
            for i in range(3):
                for j in range(7):
                    q = rounded(query[b, h, i, chosen].double(), bits)
                    k = rounded(key[b, h * kv_heads // heads, j, chosen].double(), bits)
                    expected[b, h, i, j] = 0.5 * (q @ k)
    assert torch.allclose(scores, joined(expected, kv_heads, reduction), atol=1e-5)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("on_device", [False, True])
def test_labels_written_in_any_chunking_are_the_same(bits, on_device):
    key = torch.randn(2, 2, 13, 10, generator=generator()).to(torch.bfloat16)
    channels = torch.rand(4, 10, generator=generator(2)).argsort(1)[:, :5]
    whole = labels_of(key, channels, bits, 4, capacity=20)
    chunks = [1] * 13 if on_device else [4, 1, 8]
    parts = labels_of(key, channels, bits, 4, chunks=chunks, on_device=on_device, capacity=20)
    for a, b in zip(whole, parts, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_a_signature_has_a_bit_where_a_value_is_above_zero():
    values = torch.tensor([[0.5, -1.0, 0.0, -0.0, 3.0]])
    assert REFERENCE.pack_signs(values).tolist() == [[0b10001]]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("bits", [5, 32, 70])
@pytest.mark.parametrize(("heads", "kv_heads", "own"), HEADS)
def test_hamming_scores_count_the_bits_that_agree(heads, kv_heads, own, bits, reduction):
    query = torch.randn(2, heads, 3, bits, generator=generator())
    key = torch.randn(2, own, 7, bits, generator=generator(1))
    scores = REFERENCE.hamming_scores(
        REFERENCE.pack_signs(query), REFERENCE.pack_signs(key), bits, kv_heads, reduction
    )
    expected = torch.zeros(2, heads, 3, 7)
    for h in range(heads):
        agree = (query[:, h, :, None] > 0) == (key[:, h * own // heads, None] > 0)
        expected[:, h] = agree.sum(-1).float()
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, joined(expected, kv_heads, reduction))
