# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled tables of counted contexts: look up and count.

A table is a range of 32-byte rows of one arena. The first part is a hash table: a bucket is a cache
line of two rows, the second has the rows' numbers of up to eight contexts, the first what tells them
apart. All other rows are handed out one after another.

    bucket         check, check, check, check, check, check, check, check
                   row, row, row, row, row, row, row, row
    context row    -, total, token, weight, token, weight, first overflow row, last touched
    overflow row   token, weight, token, weight, token, weight, next overflow row, -

A weight is SCALE for each time the token followed, a total SCALE for each time anything did; its
low bits hold how many different continuations there are. From the first distribution on a context's
row has cells instead (`memory_records`). Row numbers inside a table count from its start, so a
table can be moved.

Used by: `memory_growth` (moves them), all other loops of the memory, `memory`.
"""

import numpy as np
from numpy.typing import NDArray

from streaminator.compiled import jit, jit_inline
from streaminator.speculative.memory_records import (
    EMPTY,
    RECORDS,
    Ints,
    Rows,
    mass_in_cell,
    match,
    nth,
    peek,
    prefetch,
    push_cell,
    share_in_cells,
    write_record,
)

TAIL = 24
"""Tokens that contexts are made of: at least 12, and in some of them a number may be long."""
NUM_CONTEXTS = 10
"""Before each token, most telling first: the last 12, 8, 6, 4 tokens, three with gaps (the last 6
words and numbers, whatever the numbers are; tokens 2, 3, 4 from the end; the last 3 words and
numbers), the last 3, 2, 1 tokens."""
FIRST_SHARED = 3
"""Contexts from here on are kept across prompts; longer ones gain nothing there."""
NUM_SHARED_CONTEXTS = NUM_CONTEXTS - FIRST_SHARED
GAPPED, LAST_GAPPED = 4, 6
"""Those with gaps."""
_NUMBER = 1 << 40  # stands for any number
SCALE = 1024
MAX_OVERFLOW = 5
"""Overflow rows per context: 2 + 5 * 3 = 17 continuations; the least makes room for a new one."""
ROW_BYTES = 32
_FORETOLD = 0.25  # of a distribution: such a token was known

# Columns of a table's record.
START, NUM_BUCKETS, NUM_ROWS, USED_CONTEXTS, USED_ROWS, CLOCK = range(6)
PER_BUCKET = 8
"""Contexts. A bucket that is full sends more to the next one."""

_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_SHIFT30, _SHIFT27, _SHIFT31, _SHIFT32 = (np.uint64(n) for n in (30, 27, 31, 32))
_ONE = np.uint64(1)


@jit_inline
def mix64(x: int) -> int:
    """SplitMix64's finaliser, on unsigned 64-bit integers."""
    x = (x ^ (x >> _SHIFT30)) * _MIX1
    x = (x ^ (x >> _SHIFT27)) * _MIX2
    return x ^ (x >> _SHIFT31)


@jit_inline
def is_number(numbers: NDArray[np.bool_], token: int) -> bool:
    """Whether a token is part of a number, by the marks that the memory was given."""
    return token < len(numbers) and numbers[token]


@jit_inline
def hash_contexts(
    text: Ints, end: int, known: int, numbers: NDArray[np.bool_], keys: NDArray
) -> None:
    """Keys of the contexts before `text[end]`, `known` tokens of which are there; 0: no such.

    Others of the TAIL tokens before it are anything.
    """
    one = _extend(_ONE, text[nth(end - 1)])
    two = _extend(one, text[nth(end - 2)])
    three = _extend(two, text[nth(end - 3)])
    four = _extend(three, text[nth(end - 4)])
    six = _extend(_extend(four, text[nth(end - 5)]), text[nth(end - 6)])
    eight = _extend(_extend(six, text[nth(end - 7)]), text[nth(end - 8)])
    ten = _extend(_extend(eight, text[nth(end - 9)]), text[nth(end - 10)])
    twelve = _extend(_extend(ten, text[nth(end - 11)]), text[nth(end - 12)])
    none = np.uint64(0)
    keys[0] = _digest(twelve) if known >= 12 else none
    keys[1] = _digest(eight) if known >= 8 else none
    keys[2] = _digest(six) if known >= 6 else none
    keys[3] = _digest(four) if known >= 4 else none
    key = _extend(_extend(_ONE, text[nth(end - 4)]), text[nth(end - 3)])
    keys[GAPPED + 1] = _digest(~_extend(key, text[nth(end - 2)])) if known >= 4 else none
    keys[GAPPED] = keys[LAST_GAPPED] = none
    keys[7] = _digest(three) if known >= 3 else none
    keys[8] = _digest(two) if known >= 2 else none
    keys[9] = _digest(one) if known >= 1 else none
    key, words, index = _ONE, 0, end - 1
    while words < 6 and index >= end - known:
        token = text[nth(index)]
        index -= 1
        if is_number(numbers, token):
            token = _NUMBER
            while index >= end - known and is_number(numbers, text[index]):
                index -= 1
        key = _extend(key, token)
        words += 1
        if words == 3:
            keys[LAST_GAPPED] = _digest(key ^ _MIX1)
    if words == 6:
        keys[GAPPED] = _digest(key ^ _MIX2)


@jit_inline
def _extend(key: int, token: int) -> int:
    # A polynomial: one multiplication per token. It is mixed where it is used.
    return (key + np.uint64(token) + _ONE) * _STEP


@jit_inline
def _digest(key: int) -> int:
    """32 bits that give both place and identity, so that a table can be rebuilt from itself.

    Of a million contexts one look-up in 4000 errs, which can only spoil a draft. 0: empty.
    """
    return max(mix64(key) >> _SHIFT32, _ONE)


@jit_inline
def bucket_of(check: int, table: Ints) -> int:
    """First row of the bucket where a context is looked for first."""
    bucket = (np.uint64(np.uint32(check)) * np.uint64(table[NUM_BUCKETS])) >> _SHIFT32
    return table[START] + 2 * np.int64(bucket)


@jit_inline
def _bucket_after(bucket: int, table: Ints) -> int:
    bucket += 2
    return bucket if bucket < table[START] + 2 * table[NUM_BUCKETS] else table[START]


@jit_inline
def find(rows: Rows, table: Ints, key: int) -> int:
    """Row of a context; -1: not there."""
    check = np.int64(np.int32(key))
    bucket = bucket_of(check, table)
    column = match(rows, bucket, check)
    # Not there, and the bucket full: one condition, as whether it is there cannot be guessed.
    while column >= PER_BUCKET + np.int64(peek(rows, bucket, PER_BUCKET - 1) == 0):
        bucket = _bucket_after(bucket, table)
        column = match(rows, bucket, check)
    row = table[START] + peek(rows, bucket + 1, column & (PER_BUCKET - 1))
    return row if column < PER_BUCKET else -1


@jit_inline
def enter(rows: Rows, table: Ints, check: int) -> int:
    """A row for a context that is not there yet; -1: there is no room."""
    free = table[USED_ROWS]
    # Look-ups end at a bucket that is not full: some must stay.
    if free == table[NUM_ROWS] or table[USED_CONTEXTS] >= 7 * table[NUM_BUCKETS]:
        return -1
    bucket = bucket_of(check, table)
    column = match(rows, bucket, 0)
    while column == PER_BUCKET:
        bucket = _bucket_after(bucket, table)
        column = match(rows, bucket, 0)
    rows[nth(bucket), nth(column)] = check
    rows[nth(bucket + 1), nth(column)] = free
    table[USED_ROWS] += 1
    table[USED_CONTEXTS] += 1
    return table[START] + free


@jit_inline
def fetch_buckets(
    rows: Rows, own: Ints, shared: Ints, keys: NDArray, first: int, use_shared: bool
) -> None:
    """Have the processor fetch the buckets where contexts are looked up soon."""
    for place in range(first if own[NUM_BUCKETS] > 0 else NUM_CONTEXTS, NUM_CONTEXTS):
        prefetch(rows, bucket_of(np.int32(keys[place]), own))
    for place in range(FIRST_SHARED if use_shared else NUM_CONTEXTS, NUM_CONTEXTS):
        prefetch(rows, bucket_of(np.int32(keys[place]), shared))


@jit_inline
def find_rows(
    rows: Rows, own: Ints, shared: Ints, keys: NDArray, first: int, use_shared: bool, found: Ints
) -> None:
    """Look contexts up, `first` the longest of the own table, and have their rows fetched.

    `found` [2, NUM_CONTEXTS] becomes the rows in either table, -1 where there is none.
    """
    for place in range(NUM_CONTEXTS):
        found[0, place] = found[1, place] = -1
    for place in range(first if own[NUM_BUCKETS] > 0 else NUM_CONTEXTS, NUM_CONTEXTS):
        row = find(rows, own, keys[place]) if keys[place] else -1
        found[0, place] = row
        prefetch(rows, max(row, 0))
    for place in range(FIRST_SHARED if use_shared else NUM_CONTEXTS, NUM_CONTEXTS):
        row = find(rows, shared, keys[place]) if keys[place] else -1
        found[1, place] = row
        prefetch(rows, max(row, 0))


@jit
def find_all(rows: Rows, table: Ints, keys: NDArray, first: int, found: Ints) -> None:
    """Rows of the contexts from `first` on, -1 where not there.

    What was never seen after fewer tokens was not after more: longer ones are not looked up.
    """
    found[:] = -1
    misses = False
    for place in range(NUM_CONTEXTS - 1, first - 1 if table[NUM_BUCKETS] > 0 else NUM_CONTEXTS, -1):
        is_gapped = GAPPED <= place <= LAST_GAPPED
        if keys[place] == 0 or (misses and not is_gapped):
            continue
        found[place] = find(rows, table, keys[place])
        misses |= found[place] < 0 and not is_gapped


@jit_inline
def total_of(rows: Rows, row: int) -> tuple[int, int]:
    """Weight of a context and how many different continuations it has."""
    packed = peek(rows, row, 1)
    return packed & -SCALE, packed & (RECORDS - 1)


@jit
def share_of(rows: Rows, table: Ints, row: int, token: int) -> float:
    """Share of a continuation in what a context was told."""
    packed = np.int64(rows[row, 1])
    if packed & RECORDS:
        return share_in_cells(rows, table[START], row, token)
    return _weight_of(rows, table, row, token) / (packed & -SCALE)


@jit
def _weight_of(rows: Rows, table: Ints, row: int, token: int) -> int:
    """Weight of a continuation, 0 if it is not there."""
    at, first, num = row, 2, 2
    while True:
        for index in range(num):
            there = rows[at, first + 2 * index]
            if there == token:
                return np.int64(rows[at, first + 2 * index + 1])
            if there == EMPTY:
                return 0
        at = np.int64(rows[at, 6])
        if at < 0:
            return 0
        at += table[START]
        first, num = 0, 3


@jit
def add(rows: Rows, table: Ints, row: int, token: int) -> None:
    """Count a continuation once more; of a full list the least makes room."""
    least_at, least_column, least = row, 2, 2**31 - 1
    at, first, num, length = row, 2, 2, 0
    while True:
        for index in range(num):
            column = first + 2 * index
            if rows[at, column] == token:
                rows[at, column + 1] += SCALE
                return
            if rows[at, column] == EMPTY:
                rows[at, column], rows[at, column + 1] = token, SCALE
                rows[row, 1] += 1
                return
            # Among equals the first, so that the newest is not the one to go.
            if rows[at, column + 1] < least:
                least_at, least_column, least = at, column, rows[at, column + 1]
        if rows[at, 6] < 0:
            break
        at = table[START] + rows[at, 6]
        first, num = 0, 3
        length += 1
    free = table[USED_ROWS]
    if length < MAX_OVERFLOW and free < table[NUM_ROWS]:
        table[USED_ROWS] += 1
        rows[at, 6] = free
        at = table[START] + free
        rows[at, 0], rows[at, 2], rows[at, 4] = token, EMPTY, EMPTY
        rows[at, 1], rows[at, 3], rows[at, 5] = SCALE, 0, 0
        rows[at, 6] = -1
        rows[row, 1] += 1
    else:
        rows[least_at, least_column], rows[least_at, least_column + 1] = token, SCALE


@jit
def count_token(
    rows: Rows,
    table: Ints,
    keys: NDArray,
    found: Ints,
    first: int,
    excluded_after: int,
    token: int,
    is_told: bool,
    cell: int,
    record: Rows,
) -> int:
    """Count a token, or the distribution it was drawn from, in the contexts from `first` on.

    Longest first; once `excluded_after` contexts knew the token the shorter ones are left alone
    (update exclusion, Moffat 1990): they are asked when longer ones fail, and should not repeat
    them. `found` has their rows, -1 where one is not known to be there. Where a distribution
    `is_told`, `cell` and `record` are what `pack_record` made of it.

    Returns: the place of the longest that knew it.
    """
    table[CLOCK] += 1
    num_entries = 1
    if is_told and record[0] > 0:
        cell, num_entries, num_rows = write_record(
            rows, table[START], table[USED_ROWS], table[NUM_ROWS], token, record
        )
        table[USED_ROWS] += num_rows
    num_knew, knew = 0, NUM_CONTEXTS
    for place in range(first, NUM_CONTEXTS):
        is_gapped = GAPPED <= place <= LAST_GAPPED
        if keys[place] == 0 or (num_knew >= excluded_after and not is_gapped):
            continue
        # One that was not there has perhaps been entered since.
        row = found[place] if found[place] >= 0 else find(rows, table, keys[place])
        if row < 0:
            row = enter(rows, table, np.int32(keys[place]))
            if row < 0:
                continue
            rows[row, 1] = RECORDS if is_told else 0
            rows[row, 2:7] = EMPTY
            rows[row, 3] = EMPTY if is_told else 0
            rows[row, 5] = EMPTY if is_told else 0
        elif not is_gapped and _knows(rows, table, row, token):
            num_knew += 1
            knew = min(knew, place)
        rows[row, 7] = table[CLOCK]
        if is_told or np.int64(rows[row, 1]) & RECORDS:
            push_cell(rows, row, cell, num_entries)
            rows[row, 1] += SCALE
        else:
            rows[row, 1] += SCALE
            add(rows, table, row, token)
    return knew


@jit
def _knows(rows: Rows, table: Ints, row: int, token: int) -> bool:
    """Whether a context foretold a token; of distributions the newest one decides."""
    if np.int64(rows[row, 1]) & RECORDS:
        return mass_in_cell(rows, table[START], np.int64(rows[row, 2]), token) >= _FORETOLD
    return _weight_of(rows, table, row, token) > 0
