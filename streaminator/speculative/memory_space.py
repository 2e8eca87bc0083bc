# SPDX-License-Identifier: Apache-2.0
"""The tables of all prompts, and the one they share, within a stated memory.

Tables double as they fill. A prompt's stops at 1/8 of the whole, the shared one at 1/4; then the half of
its contexts that was not touched longest goes. When the arena is full, the table of the prompt that was
started longest ago goes.

Used by: `memory`.
"""

import numpy as np

from streaminator.speculative.arena import Arena
from streaminator.speculative.memory_growth import PER_BUCKET_AT_MOST, find_full, rebuild
from streaminator.speculative.memory_tables import (
    CLOCK,
    NUM_BUCKETS,
    NUM_ROWS,
    PER_BUCKET,
    ROW_BYTES,
    START,
    USED_CONTEXTS,
    USED_ROWS,
    Ints,
)

_MIN_ROWS = 256
_SHARED = 0


class Tables:
    """Who has which rows of the arena.

    Args:
        max_bytes: of all tables; rounded down to a power of two.
        shared: whether there is a table that prompts share.
    """

    def __init__(self, max_bytes: int, *, shared: bool) -> None:
        self._arena = Arena(max_bytes)
        self.rows = self._arena.rows
        """Of all tables."""
        self.max_rows = max(len(self.rows) // 8, _MIN_ROWS)
        """Of a prompt's table."""
        self._shared_max_rows = max(len(self.rows) // 4, _MIN_ROWS)
        self._shared = shared
        self.records = np.zeros((8, 6), np.int64)
        """[tables, 6] where each lies and how full it is; the shared one is the first."""
        self._free_tables = list(range(7, 0, -1))
        self.of: dict[str, int] = {}
        """Table of each open prompt, the least recently started first."""
        if shared:
            self._allocate(_SHARED, _MIN_ROWS)

    @property
    def num_bytes(self) -> int:
        """Memory of all tables."""
        return self._arena.num_used * ROW_BYTES

    def open(self, prompt_id: str) -> None:
        """Give a new prompt a table."""
        if not self._free_tables:
            size = len(self.records)
            self.records = np.concatenate([self.records, np.zeros_like(self.records)])
            self._free_tables = list(range(2 * size - 1, size - 1, -1))
        self.of[prompt_id] = self._free_tables.pop()
        self._revive(prompt_id)

    def close(self, prompt_id: str) -> None:
        """Take a prompt's table."""
        table = self.of.pop(prompt_id)
        self._drop(table)
        self.records[table] = 0
        self._free_tables.append(table)

    def start(self, prompt_id: str) -> None:
        """The prompt is drawn from: it has a table, and is the last to lose it."""
        self.of[prompt_id] = self.of.pop(prompt_id)
        self._revive(prompt_id)

    def has_table(self, prompt_id: str) -> bool:
        """Whether an open prompt's table has not given way to another."""
        return bool(self.records[self.of[prompt_id], NUM_BUCKETS])

    def make_room(
        self, running: Ints, handles: Ints, lengths: Ints, rows_per_context: float
    ) -> None:
        """Grow the tables that might not hold the `lengths` [n] contexts that come next.

        Args:
            running: integers of running sequences, of which `handles` [n] are meant.
            rows_per_context: that a new one takes.
        """
        full, num_contexts = find_full(
            self.records, running, handles, lengths, rows_per_context, self._shared
        )
        for table, num in zip(full.tolist(), num_contexts.tolist(), strict=True):
            self._grow(table, num, rows_per_context)

    def _grow(self, table: int, num_contexts: int, rows_per_context: float) -> None:
        """Double a table until it has room; one that may not double drops its oldest half."""
        old = self.records[table].copy()
        if old[NUM_ROWS] == 0:
            return  # it gave way to another one that had to grow
        limit = self._shared_max_rows if table == _SHARED else self.max_rows
        used = int(old[USED_ROWS] - 2 * old[NUM_BUCKETS])
        wanted = used + int(num_contexts * rows_per_context)
        wanted += int(2 * (old[USED_CONTEXTS] + num_contexts) / PER_BUCKET_AT_MOST) + 2
        num_rows = int(old[NUM_ROWS])
        while num_rows < min(limit, wanted):
            num_rows *= 2
        if num_rows == old[NUM_ROWS] and num_rows * 2 <= limit:
            num_rows *= 2
        oldest = 0
        if old[USED_CONTEXTS] and (num_rows < wanted or num_rows == old[NUM_ROWS]):
            rows = self.rows[old[START] : old[START] + old[NUM_ROWS]]
            buckets = rows[: 2 * old[NUM_BUCKETS]].reshape(-1, 2, PER_BUCKET)
            contexts = buckets[:, 1][buckets[:, 0] != 0]
            oldest = int(np.median(rows[contexts, 7])) + 1
        # Of the rows in use as many as before are contexts, which need room in buckets.
        share = (old[USED_CONTEXTS] + num_contexts) / (used + num_contexts * rows_per_context)
        if not self._allocate(table, num_rows, share):
            self._drop(table, old)
            return
        rebuild(self.rows, old, self.records[table], oldest)
        self._arena.free(int(old[START]), int(old[NUM_ROWS]))

    def _allocate(self, table: int, num_rows: int, share: float = 1.0) -> bool:
        """Give a table an empty range, at the cost of other prompts if need be.

        Of the rows in use a `share` will be contexts.
        """
        start = self._arena.allocate(num_rows)
        others = list(self.of.values())
        victims = (n for n in others if n != table and self.records[n, NUM_ROWS])
        while start is None:
            victim = next(victims, None)
            if victim is None:
                return False
            self._drop(victim)
            start = self._arena.allocate(num_rows)
        buckets = max(int(num_rows * share / (PER_BUCKET_AT_MOST + 2 * share)), 1)
        self.records[table] = (start, buckets, num_rows, 0, 2 * buckets, self.records[table, CLOCK])
        return True

    def _revive(self, prompt_id: str) -> None:
        table = self.of[prompt_id]
        if self.records[table, NUM_BUCKETS] == 0:
            self._allocate(table, _MIN_ROWS)

    def _drop(self, table: int, record: Ints | None = None) -> None:
        held: Ints = self.records[table] if record is None else record
        if held[NUM_ROWS]:
            self._arena.free(int(held[START]), int(held[NUM_ROWS]))
        self.records[table, :CLOCK] = 0
