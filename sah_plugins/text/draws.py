"""Random numbers that depend on their identity alone: no state, no process, no library version."""

import hashlib
import json
import struct


class Draws:
    """Random integers that depend on their identity alone.

    Each draw is a SHA-256 hash of the identity and a counter, so equal identities give equal draws
    on every Python version, in every process and in any order of use.
    """

    def __init__(self, *identity: int | float | str) -> None:
        self._identity = json.dumps(identity)
        self._count = 0

    def below(self, limit: int) -> int:
        """Return an integer in ``[0, limit)``, uniform up to one part in 2**100 or so."""
        digest = hashlib.sha256(f"{self._identity}/{self._count}".encode()).digest()
        self._count += 1
        return int.from_bytes(digest[:20], "big") % limit

    def sample(self, population: int, size: int) -> list[int]:
        """Return ``size`` distinct integers of ``[0, population)``, in random order."""
        moved: dict[int, int] = {}
        picked = []
        for i in range(size):
            j = i + self.below(population - i)
            picked.append(moved.get(j, j))
            moved[j] = moved.get(i, i)
        return picked

    def stream(self, label: str, size: int) -> tuple[int, ...]:
        """Return the first ``size`` 64-bit integers of the stream named ``label``.

        A longer stream begins with the shorter one. Streams and :meth:`below` do not disturb each
        other. Sorting by a stream is a shuffle in which items keep their order as more join.
        """
        digest = hashlib.shake_256(f"{self._identity}/{label}".encode()).digest(8 * size)
        return struct.unpack(f"<{size}Q", digest)
