"""Times and memory of a function on one device.

On a GPU a time is that of a CUDA graph of several calls, replayed: once back to back, so that what
fits into the L2 cache is read from it, and once with the cache swept before every call by reading a
buffer larger than it, whose own time is taken off. Wall time is that of eager calls, the last of
which is waited for.
"""

from __future__ import annotations

import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sah_core.errors import UnsupportedError

Function = Callable[[], object]

GRAPH_CALLS = 20
COLD_CALLS = 10
EAGER_CALLS = 10
ROUND_SECONDS = 0.005
"""Replays of a short graph are repeated within a round until it takes this long."""
MIN_SWEEP = 128 * 2**20
COPY_BYTES = {"cuda": 2**30, "cpu": 256 * 2**20}


@attrs.frozen
class Times:
    """Seconds per call, one entry per round."""

    rounds: tuple[float, ...]

    @property
    def least(self) -> float:
        """The minimum over the rounds."""
        return min(self.rounds)

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds)

    def to_plain(self) -> dict[str, Any]:
        """Numbers for a report, in microseconds."""
        return {
            "min_us": 1e6 * self.least,
            "median_us": 1e6 * self.median,
            "rounds_us": [1e6 * seconds for seconds in self.rounds],
        }


def interleaved(timers: Mapping[Any, Function], rounds: int, warmup: int) -> dict[Any, Times]:
    """Run every timer once per round, one after the other.

    Args:
        timers: Functions that return the seconds of one call.
        rounds: Rounds that count.
        warmup: Rounds before them that do not.
    """
    seconds: dict[Any, list[float]] = {key: [] for key in timers}
    for round_ in range(warmup + rounds):
        for key, timer in timers.items():
            taken = timer()
            assert isinstance(taken, float)
            if round_ >= warmup:
                seconds[key].append(taken)
    return {key: Times(tuple(values)) for key, values in seconds.items()}


def wall_timer(function: Function, device: torch.device) -> Callable[[], float]:
    """A timer of eager calls."""
    if device.type != "cuda":

        def once() -> float:
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin

        return once

    def several() -> float:
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(EAGER_CALLS):
            function()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / EAGER_CALLS

    return several


def graph_of(function: Function, calls: int, before: Function | None = None) -> Any:
    """A CUDA graph of several calls.

    Args:
        function: What to capture.
        calls: How often.
        before: What to run ahead of every call.

    Raises:
        UnsupportedError: If the function waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
        # a capture that meets a wait would leave the process in a bad state
        with waits_refused():
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            if before is not None:
                before()
            function()
    return graph


@contextmanager
def waits_refused() -> Iterator[None]:
    """Turn a call that waits for the device into an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise UnsupportedError("graph capture", "the call waits for the device") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def graph_timer(graph: Any, calls: int) -> Callable[[], float]:
    """A timer of graph replays: seconds per captured call, by events on the device."""

    def replay(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / count

    replay(1)
    replays = min(50, max(1, int(ROUND_SECONDS / replay(1))))
    return lambda: replay(replays) / calls


class Sweep:
    """Empties the L2 cache by reading a buffer that is larger.

    Reading leaves nothing in the cache that would have to be written back later, in the time of the
    call that is measured.
    """

    def __init__(self, device: torch.device) -> None:
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.buffer = torch.zeros(max(MIN_SWEEP, 4 * l2) // 4, device=device)
        self.alone = graph_timer(graph_of(self.run, COLD_CALLS), COLD_CALLS)

    def run(self) -> Tensor:
        """Read the buffer."""
        return self.buffer.sum()

    def timer(self, function: Function) -> Callable[[], float]:
        """A timer of calls that find the cache swept."""
        both = graph_timer(graph_of(function, COLD_CALLS, self.run), COLD_CALLS)
        return lambda: max(0.0, both() - self.alone())


@attrs.frozen
class Copy:
    """A large copy inside the memory of the device.

    Attributes:
        nbytes: Bytes copied; twice as many move.
        times: Seconds per copy.
    """

    nbytes: int
    times: Times

    @property
    def bandwidth(self) -> float:
        """Bytes read and written per second, by the fastest round."""
        return 2 * self.nbytes / self.times.least

    def to_plain(self) -> dict[str, Any]:
        """Numbers for a report."""
        return {
            "bytes": self.nbytes,
            "bytes_per_second": self.bandwidth,
            **self.times.to_plain(),
        }


def measure_copy(device: torch.device, rounds: int, nbytes: int | None = None) -> Copy:
    """Measure the bandwidth that nothing on this device exceeds by much.

    The copy is an element-wise kernel: on a GPU it is faster than the driver's own copies.
    """
    nbytes = COPY_BYTES[device.type] if nbytes is None else nbytes
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return torch.mul(source, 1.0, out=target)

    if device.type == "cuda":
        timer = graph_timer(graph_of(copy, COLD_CALLS), COLD_CALLS)
    else:
        timer = wall_timer(copy, device)
    return Copy(source.nbytes, interleaved({"copy": timer}, rounds, 2)["copy"])


def peak_memory(function: Function, device: torch.device) -> int:
    """Bytes that a call takes at most beyond what was there before, its result included.

    On the CPU these are the tensors that live at once; what a kernel takes inside is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    with LiveTensors() as live:
        result = function()
    del result
    return int(live.peak)


class LiveTensors(TorchDispatchMode):
    """Sums the storage of the tensors that operations make, while they live.

    Attributes:
        peak: The largest sum.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages that it made."""
        kwargs = kwargs or {}
        given = {id(s) for s in storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in storages(result):
            key = id(storage)
            if key in given or key in self._sizes:
                continue
            self._sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._free, key)
            self._now += self._sizes[key]
        self.peak = max(self.peak, self._now)
        return result

    def _free(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """The storages of all tensors in a structure."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
