# SPDX-License-Identifier: Apache-2.0
"""One piece of memory cut into ranges of rows whose lengths are powers of two.

A buddy allocator (Knowlton 1965): a free range joins its neighbour of the same length, so that
memory given back is whole again. The operating system backs rows only once they are written to.

Used by: `memory_space`.
"""

import heapq

import numpy as np

from streaminator.speculative.memory_tables import ROW_BYTES, Rows

CACHE_LINE = 64
"""Bytes."""


class Arena:
    """Rows of 32 bytes; `allocate` gives zeroed ranges."""

    def __init__(self, max_bytes: int) -> None:
        self._top = max(max_bytes // ROW_BYTES, 1).bit_length() - 1
        # No row, and no pair of them, lies across two cache lines. NumPy asks for huge pages.
        room = np.zeros((ROW_BYTES << self._top) + CACHE_LINE, dtype=np.uint8)
        room = room[-room.ctypes.data % CACHE_LINE :][: ROW_BYTES << self._top]
        self.rows: Rows = room.view(np.int32).reshape(-1, ROW_BYTES // 4)
        # Per level a heap of free starts (low addresses first) and the set of those that are valid.
        self._heaps: list[list[int]] = [[] for _ in range(self._top + 1)]
        self._free: list[set[int]] = [set() for _ in range(self._top + 1)]
        self._put(self._top, 0)
        self._dirty = 0
        self.num_used = 0
        """Rows handed out."""

    def allocate(self, num_rows: int) -> int | None:
        """Start of `num_rows` zeroed rows (a power of two), None if there is no such range."""
        level = num_rows.bit_length() - 1
        at = next((n for n in range(level, self._top + 1) if self._free[n]), None)
        if at is None:
            return None
        start = self._pop(at)
        while at > level:
            at -= 1
            self._put(at, start + (1 << at))
        # Rows never handed out are zero already.
        end = start + num_rows
        self.rows[start : min(end, self._dirty)] = 0
        self._dirty = max(self._dirty, end)
        self.num_used += num_rows
        return start

    def free(self, start: int, num_rows: int) -> None:
        """Give a range back."""
        self.num_used -= num_rows
        level = num_rows.bit_length() - 1
        while level < self._top and (buddy := start ^ (1 << level)) in self._free[level]:
            self._free[level].remove(buddy)
            start = min(start, buddy)
            level += 1
        self._put(level, start)

    def _put(self, level: int, start: int) -> None:
        self._free[level].add(start)
        heapq.heappush(self._heaps[level], start)

    def _pop(self, level: int) -> int:
        while True:
            start = heapq.heappop(self._heaps[level])
            if start in self._free[level]:
                self._free[level].remove(start)
                return start
