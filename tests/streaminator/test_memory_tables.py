# SPDX-License-Identifier: Apache-2.0
"""Tests of the memory's hash tables at their limits."""

import numpy as np

from streaminator.speculative.arena import Arena
from streaminator.speculative.memory_tables import (
    CLOCK,
    NUM_BUCKETS,
    NUM_ROWS,
    START,
    USED_ROWS,
    enter,
    find,
)

BUCKETS, FIRST = 4, 64
LAST = 0xC0000000
"""The first of the keys whose place is the last of the four buckets."""


def make_table(num_rows: int) -> np.ndarray:
    """Record of an empty table behind the arena's first rows."""
    table = np.zeros(CLOCK + 1, np.int64)
    table[START], table[NUM_BUCKETS] = FIRST, BUCKETS
    table[NUM_ROWS], table[USED_ROWS] = num_rows, 2 * BUCKETS
    return table


def test_full_buckets_send_contexts_on_and_none_is_lost():
    arena, table = Arena(1 << 12), make_table(64)
    rows: dict[int, int] = {}
    for key in range(LAST, LAST + 100):
        row = enter(arena.rows, table, np.int32(np.uint32(key)))
        if row < 0:
            break
        rows[key] = row
    # Behind the last bucket comes the first; look-ups need free places to end at.
    assert list(rows.values()) == [FIRST + 2 * BUCKETS + n for n in range(7 * BUCKETS)]
    for key, row in rows.items():
        assert find(arena.rows, table, np.uint64(key)) == row
    for key in (1, LAST - 1, LAST + 1000):
        assert find(arena.rows, table, np.uint64(key)) == -1


def test_a_table_without_rows_takes_no_more_contexts():
    arena, table = Arena(1 << 12), make_table(10)
    entered = [enter(arena.rows, table, np.int32(key)) for key in (5, 6, 7)]
    assert entered == [FIRST + 8, FIRST + 9, -1]
    assert find(arena.rows, table, np.uint64(7)) == -1
