# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled: which of the memory's tables are full, and moving one to another range of rows.

Used by: `memory_space`.
"""

import numpy as np

from streaminator.compiled import jit_allocating, jit_inline
from streaminator.speculative.memory_rates import TABLE
from streaminator.speculative.memory_records import (
    EMPTY,
    NUM_CELLS,
    RECORDS,
    Ints,
    Rows,
    nth,
    num_rows_of,
)
from streaminator.speculative.memory_tables import (
    CLOCK,
    NUM_BUCKETS,
    NUM_CONTEXTS,
    NUM_ROWS,
    NUM_SHARED_CONTEXTS,
    PER_BUCKET,
    START,
    USED_CONTEXTS,
    USED_ROWS,
    enter,
)

PER_BUCKET_AT_MOST = 5.5
"""Contexts in the mean: with more, too many buckets would be full."""


@jit_allocating
def find_full(
    tables: Ints,
    running: Ints,
    handles: Ints,
    lengths: Ints,
    rows_per_context: float,
    use_shared: bool,
) -> tuple[Ints, Ints]:
    """Tables that might not hold `lengths[i]` more tokens of sequence `handles[i]`, each.

    Returns: the prompts' tables in order, then 0, the shared one; and how many contexts each is to get.
    """
    coming = np.zeros(len(tables), np.int64)
    for index in range(len(handles)):
        coming[running[handles[index], TABLE]] += lengths[index] * NUM_CONTEXTS
        if use_shared:
            coming[0] += lengths[index] * NUM_SHARED_CONTEXTS
    full = np.empty(len(tables), np.int64)
    size = 0
    for index in range(1, len(tables) + 1):
        number = index % len(tables)
        table, num = tables[number], coming[number]
        is_full = table[USED_CONTEXTS] + num > PER_BUCKET_AT_MOST * table[NUM_BUCKETS]
        is_full |= table[USED_ROWS] + num * rows_per_context > table[NUM_ROWS]
        if is_full and num > 0 and table[NUM_BUCKETS] > 0:
            full[size] = number
            size += 1
    return full[:size], coming[full[:size]]


@jit_allocating
def rebuild(rows: Rows, old: Ints, new: Ints, oldest: int) -> None:
    """Copy the contexts touched at `oldest` or later into an empty, zeroed table."""
    new[CLOCK] = old[CLOCK]
    moved = np.full(old[USED_ROWS], -1)
    for place in range(PER_BUCKET * old[NUM_BUCKETS]):
        bucket, index = old[START] + 2 * (place // PER_BUCKET), place % PER_BUCKET
        check, source = rows[bucket, index], old[START] + rows[bucket + 1, index]
        if check == 0 or rows[source, 7] < oldest:
            continue
        target = enter(rows, new, check)
        if target < 0:
            break
        _copy(rows, source, target)
        if np.int64(rows[source, 1]) & RECORDS:
            _move_records(rows, old, new, target, moved)
            continue
        at = np.int64(rows[source, 6])
        while at >= 0:
            free = new[USED_ROWS]
            if free == new[NUM_ROWS]:
                rows[target, 6] = -1  # its number of continuations stays as it was: near enough
                break
            new[USED_ROWS] += 1
            rows[target, 6] = free
            target = new[START] + free
            _copy(rows, old[START] + at, target)
            at = np.int64(rows[target, 6])


@jit_inline
def _copy(rows: Rows, source: int, target: int) -> None:
    # A slice is assigned by way of a temporary one, in case both overlap.
    for column in range(rows.shape[1]):
        rows[nth(target), nth(column)] = rows[nth(source), nth(column)]


@jit_allocating
def _move_records(rows: Rows, old: Ints, new: Ints, row: int, moved: Ints) -> None:
    """Copy what a row's cells point to, unless another row's did before."""
    for column in range(2, 2 + NUM_CELLS):
        cell = np.int64(rows[row, column])
        if cell >= EMPTY:
            continue
        index = -2 - cell
        if moved[index] < 0:
            source = old[START] - 2 - cell
            num_rows = num_rows_of(rows[source, 0])
            free = new[USED_ROWS]
            if free + num_rows > new[NUM_ROWS]:
                rows[row, column] = np.int64(np.uint32(rows[source, 1])) >> 12
                continue
            new[USED_ROWS] += num_rows
            for n in range(num_rows):
                _copy(rows, source + n, new[START] + free + n)
            moved[index] = free
        rows[row, column] = -2 - moved[index]
