"""The simulated device computes what the CPU computes, and sees what a device would mind."""

import pytest
import torch

from sah_core.testing.conformance.simulated import DEVICE, Simulated, far, near

pytestmark = pytest.mark.unit


@pytest.fixture
def device():
    with Simulated() as simulated:
        yield simulated


def test_tensors_say_that_they_are_elsewhere_and_have_their_values(device):
    tensor = far(torch.arange(6.0))
    made = torch.arange(6, device=tensor.device) * 2
    assert tensor.device == made.device == (tensor + made).device == DEVICE
    assert near(tensor + made).tolist() == [0, 3, 6, 9, 12, 15]
    assert near(tensor.view(2, 3) @ tensor.view(3, 2)).tolist() == [[10, 13], [28, 40]]
    assert near(torch.topk(tensor, 2).indices).tolist() == [5, 4]


def test_writes_through_views_reach_the_tensor(device):
    tensor = far(torch.zeros(4))
    tensor[1:3].copy_(torch.ones(2, device=DEVICE))
    tensor.narrow(0, 3, 1).fill_(7)
    assert near(tensor).tolist() == [0, 1, 1, 7]
    assert tensor.add_(1) is tensor


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda t: t[0].item(), "reads a number"),
        (lambda t: int(t.sum()), "reads a number"),
        (lambda t: bool((t > 3).any()), "reads a number"),
        (lambda t: t[: t.max().long()], "reads a number"),
        (lambda t: t.tolist(), "copies a tensor to the host"),
        (lambda t: t.numpy(), "copies a tensor to the host"),
        (lambda t: t.cpu(), "copies a tensor to the host"),
        (lambda t: t[t > 3], "boolean mask"),
        (lambda t: t.masked_select(t > 3), "boolean mask"),
        (lambda t: (t > 3).nonzero(), "not zero"),
        (lambda t: torch.where(t > 3), "not zero"),
        (lambda t: t.unique(), "distinct"),
        (lambda t: torch.equal(t, t), "compares tensors"),
        (lambda t: t.repeat_interleave(t.long()), "output_size"),
        (lambda t: torch.tensor([1, 2], device=t.device), "host data"),
        (lambda t: torch.ones(2).to(t.device), "a tensor of the host"),
    ],
)
def test_what_waits_is_noted_while_it_is_watched(device, act, words):
    act(far(torch.arange(6.0)))
    assert device.waits == []
    with device.watch():
        act(far(torch.arange(6.0)))
    assert any(words in wait for wait in device.waits)


@pytest.mark.parametrize(
    "act",
    [
        lambda t: t[torch.arange(2, device=t.device)],
        lambda t: torch.where(t > 3, t, -1),
        lambda t: t.masked_fill(t > 3, 0).clamp(max=2),
        lambda t: t.__setitem__(t > 3, 0),
        lambda t: t.gather(0, t.long().argsort()).cumsum(0),
        lambda t: torch.full((3,), 2.0, device=t.device) + torch.scalar_tensor(2.0),
        lambda t: t.repeat_interleave(2).unsqueeze(0).expand(3, -1).contiguous(),
    ],
)
def test_what_does_not_wait_is_not_noted(device, act):
    with device.watch():
        act(far(torch.arange(6.0)))
    assert device.waits == []
    assert device.strays == []


def test_the_ops_of_the_device_are_excused(device):
    scores = far(torch.ones(1, 1, 1, 6))
    with device.watch():
        indices, _ = device.ops.masked_topk(scores, 2)
    assert near(indices).tolist() == [[[[0, 1]]]]
    assert device.waits == []


def test_tensors_of_two_places_are_noted(device):
    tensor = far(torch.arange(6.0))
    with device.watch():
        tensor + torch.ones(6)
        tensor + torch.scalar_tensor(1.0)
    assert device.strays == ["add"]


def test_the_largest_new_tensor_is_noted_and_views_are_free(device):
    tensor = far(torch.arange(6.0))
    with device.watch():
        tensor.view(2, 3).t().expand(5, 3, 2)
        assert device.largest == 0
        tensor[:, None] * tensor
        tensor + 1
    assert device.largest == 36 * 4


def test_a_shape_that_changes_in_place_is_refused(device):
    with pytest.raises(NotImplementedError, match="unsqueeze_ changes a shape in place"):
        far(torch.arange(6.0)).unsqueeze_(0)
