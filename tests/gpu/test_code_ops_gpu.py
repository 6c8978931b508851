"""The primitives over codes, and the maskers that stand on them, on the GPU as on the CPU."""

from __future__ import annotations

import attrs
import pytest
import torch

from sah_core import Allowed, Inputs, registry
from sah_core.attention import build_mask
from sah_core.code_ops import hyperplanes
from sah_core.ops import REFERENCE
from sah_core.randomness import Random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_integer_primitives_agree_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(0, 9, (2, 2, 40, 5000), generator=generator).to(torch.int16)
    queries = torch.randint(0, 9, (2, 4, 40, 3), generator=generator).to(torch.int16)
    counts = REFERENCE.collisions(queries, keys)
    assert torch.equal(REFERENCE.collisions(queries.cuda(), keys.cuda()).cpu(), counts)
    chosen, at = counts >= 7, torch.rand(2, 4, 3, 1, generator=generator)
    for capacity in (16, 5000):
        host = REFERENCE.pick(chosen, capacity, None, at)
        device = REFERENCE.pick(chosen.cuda(), capacity, None, at.cuda())
        width = host[0].shape[3]
        assert torch.equal(device[0][..., :width].cpu(), host[0])
        assert (device[0][..., width:] == -1).all()
        for a, b in zip(host[1:], device[1:], strict=True):
            assert torch.equal(a, b.cpu())


def test_hash_codes_agree_but_for_vectors_on_a_hyperplane() -> None:
    vectors = draw(1, 4, 3000, 64)
    planes = hyperplanes(Random(seed=3), 10, 50, 64, "cpu")
    on_device = hyperplanes(Random(seed=3), 10, 50, 64, "cuda")
    torch.testing.assert_close(on_device.cpu(), planes, atol=1e-5, rtol=1e-5)
    host = REFERENCE.lsh_codes(vectors, planes)
    device = REFERENCE.lsh_codes(vectors.cuda(), planes.cuda()).cpu()
    assert (host != device).float().mean() < 1e-4


def test_float_primitives_agree() -> None:
    codes = torch.randint(0, 64, (2, 2, 8, 2000), dtype=torch.uint8)
    tables, gains = draw(2, 4, 3, 8, 64), draw(2, 4, 3, 8, 6)
    for method, argument in ((REFERENCE.table_scores, tables), (REFERENCE.soft_collisions, gains)):
        host, device = method(argument, codes), method(argument.cuda(), codes.cuda())
        torch.testing.assert_close(device.cpu(), host, atol=1e-5, rtol=1e-5)
    vectors, centroids = draw(2, 3, 4000, 32), draw(2, 3, 64, 32, seed=1)
    same = REFERENCE.nearest(vectors.cuda(), centroids.cuda()).cpu()
    assert (same != REFERENCE.nearest(vectors, centroids)).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("magicpig", {"lsh_l": 40, "lsh_k": 6}),
        ("magicpig", {"lsh_l": 40, "lsh_k": 2, "max_size": 100}),
        ("socket", {"lsh_l": 30, "lsh_k": 8}),
        ("pq-cache", {"pq_bits": 6}),
        ("pq-cache", {"pq_bits": 8, "metric": "ip"}),
    ],
)
def test_maskers_are_reproducible_on_the_device_and_choose_nearly_as_on_the_cpu(
    name: str, values: dict[str, object], dtype: torch.dtype
) -> None:
    masker = registry.maskers[name](**values)
    first = torch.tensor([0, 700], dtype=torch.int32)
    call = Inputs(
        query=draw(2, 8, 3, 64).to(dtype),
        key=draw(2, 2, 3000, 64, seed=1).to(dtype),
        value=draw(2, 2, 3000, 64, seed=2).to(dtype),
        allowed=Allowed.causal(3, 3000, first=first),
        scaling=0.125,
        key_len=3000,
    )
    moved = attrs.evolve(
        call,
        query=call.query.cuda(),
        key=call.key.cuda(),
        value=call.value.cuda(),
        allowed=call.allowed.to("cuda"),
        length=None,
        query_position=None,
        request_state={},
    )
    host = build_mask((masker,), call).to_dense()
    masks = [build_mask((masker,), moved) for _ in range(2)]
    device, again = (mask.to_dense().cpu() for mask in masks)
    assert torch.equal(device, again)
    both = ((device > 0) & (host > 0)).sum()
    assert both / (host > 0).sum() > 0.9
