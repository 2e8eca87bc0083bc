# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled tables of counted contexts: look up and count.

A table is a range of 32-byte rows of one arena. The first part is an open-addressing hash table
of contexts, the second holds overflow rows, and records of distributions.

    context row    check, total, token, weight, token, weight, first overflow row, last touched
    overflow row   token, weight, token, weight, token, weight, next overflow row, -

A weight is SCALE for each time the token followed, a total SCALE for each time anything did; its
low bits hold how many different continuations there are. From the first distribution on a context's
row has cells instead (`memory_records`). Row numbers inside a table count from its start, so a
table can be moved.

Used by: `memory_growth` (moves them), all other loops of the memory, `memory`.
"""

import numpy as np
from numpy.typing import NDArray

from streaminator.speculative.memory_records import (
    EMPTY,
    RECORDS,
    Ints,
    Rows,
    jit,
    jit_inline,
    mass_in_cell,
    prefetch,
    push_cell,
    share_in_cells,
    write_record,
)

MAX_ORDER = 12
TAIL = 24
"""Tokens that contexts are made of: in some of them a number may be long."""
NUM_CONTEXTS = 10
"""Before each token, most telling first: the last 12, 8, 6, 4 tokens, three with gaps (the last 6
words and numbers, whatever the numbers are; tokens 2, 3, 4 from the end; the last 3 words and
numbers), the last 3, 2, 1 tokens."""
FIRST_SHARED = 3
"""Contexts from here on are kept across prompts; longer ones gain nothing there."""
NUM_SHARED_CONTEXTS = NUM_CONTEXTS - FIRST_SHARED
_PLACE = np.full(MAX_ORDER + 1, -1)
_PLACE[[1, 2, 3, 4, 6, 8, 12]] = [9, 8, 7, 3, 2, 1, 0]
"""Place of the last n tokens among the contexts."""
GAPPED, LAST_GAPPED = 4, 6
"""Those with gaps."""
_NUMBER = 1 << 40  # stands for any number
SCALE = 1024
MAX_OVERFLOW = 5
"""Overflow rows per context: 2 + 5 * 3 = 17 continuations; the least makes room for a new one."""
ROW_BYTES = 32
_FORETOLD = 0.25  # of a distribution: such a token was known

# Columns of a table's record.
START, NUM_SLOTS, NUM_ROWS, USED_SLOTS, USED_OVERFLOW, CLOCK = range(6)

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
    """Keys of the contexts before `text[end]`, `known` tokens of which are there; 0: no such."""
    keys[:] = 0
    key = _ONE
    for n in range(1, min(known, MAX_ORDER) + 1):
        key = _extend(key, text[end - n])
        if _PLACE[n] >= 0:
            keys[_PLACE[n]] = _digest(key)
    if known >= 4:
        key = _extend(_extend(_ONE, text[end - 4]), text[end - 3])
        keys[GAPPED + 1] = _digest(~_extend(key, text[end - 2]))
    key, words, index = _ONE, 0, end - 1
    while words < 6 and index >= end - known:
        token = text[index]
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
def home_of(check: int, table: Ints) -> int:
    """Where a context's row is looked for first."""
    return np.int64((np.uint64(np.uint32(check)) * np.uint64(table[NUM_SLOTS])) >> _SHIFT32)


@jit_inline
def find(rows: Rows, table: Ints, key: int) -> int:
    """Row of a context; -1 - row of the empty slot where it would go."""
    check = np.int32(key)
    slot = home_of(check, table)
    while True:
        row = table[START] + slot
        there = rows[row, 0]
        if there == check:
            return row
        if there == 0:
            return -1 - row
        slot += 1
        if slot == table[NUM_SLOTS]:
            slot = 0


@jit_inline
def fetch_rows(
    rows: Rows, own: Ints, shared: Ints, keys: NDArray, first: int, use_shared: bool
) -> None:
    """Have the processor fetch the rows where contexts are looked up soon."""
    for place in range(first if own[NUM_SLOTS] > 0 else NUM_CONTEXTS, NUM_CONTEXTS):
        prefetch(rows, own[START] + home_of(np.int32(keys[place]), own))
    for place in range(FIRST_SHARED if use_shared else NUM_CONTEXTS, NUM_CONTEXTS):
        prefetch(rows, shared[START] + home_of(np.int32(keys[place]), shared))


@jit
def find_all(rows: Rows, table: Ints, keys: NDArray, first: int, found: Ints) -> int:
    """Rows of the contexts from `first` on, -1 where not there; returns the longest's place.

    What was never seen after fewer tokens was not after more: longer ones are not looked up.
    """
    found[:] = -1
    longest = NUM_CONTEXTS
    if table[NUM_SLOTS] == 0:
        return longest
    misses = False
    for place in range(NUM_CONTEXTS - 1, first - 1, -1):
        is_gapped = GAPPED <= place <= LAST_GAPPED
        if keys[place] == 0 or (misses and not is_gapped):
            continue
        row = find(rows, table, keys[place])
        if row >= 0:
            found[place] = row
            longest = longest if is_gapped else place
        elif not is_gapped:
            misses = True
    return longest


@jit_inline
def total_of(rows: Rows, row: int) -> tuple[int, int]:
    """Weight of a context and how many different continuations it has."""
    packed = np.int64(rows[row, 1])
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
    free = table[NUM_SLOTS] + table[USED_OVERFLOW]
    if length < MAX_OVERFLOW and free < table[NUM_ROWS]:
        table[USED_OVERFLOW] += 1
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
    first: int,
    excluded_after: int,
    token: int,
    top_ids: Ints,
    top_probs: NDArray[np.float32],
) -> int:
    """Count a token, or the distribution it was drawn from, in the contexts from `first` on.

    Longest first; once `excluded_after` contexts knew the token the shorter ones are left alone
    (update exclusion, Moffat 1990): they are asked when longer ones fail, and should not repeat
    them.

    Returns: the place of the longest that knew it.
    """
    table[CLOCK] += 1
    has_record = len(top_ids) > 0
    cell, num_entries = np.int64(token), 1
    if has_record:
        free = table[NUM_SLOTS] + table[USED_OVERFLOW]
        cell, num_entries, num_rows = write_record(
            rows, table[START], free, table[NUM_ROWS], token, top_ids, top_probs
        )
        table[USED_OVERFLOW] += num_rows
    num_knew, knew = 0, NUM_CONTEXTS
    for place in range(first, NUM_CONTEXTS):
        is_gapped = GAPPED <= place <= LAST_GAPPED
        if keys[place] == 0 or (num_knew >= excluded_after and not is_gapped):
            continue
        row = find(rows, table, keys[place])
        if row < 0:
            # Look-ups end at an empty slot: some must stay, whatever was asked for.
            if table[USED_SLOTS] * 10 >= table[NUM_SLOTS] * 9:
                continue
            row = -1 - row
            table[USED_SLOTS] += 1
            rows[row, 0] = np.int32(keys[place])
            rows[row, 1] = RECORDS if has_record else 0
            rows[row, 2:7] = EMPTY
            rows[row, 3] = EMPTY if has_record else 0
            rows[row, 5] = EMPTY if has_record else 0
        elif not is_gapped and _knows(rows, table, row, token):
            num_knew += 1
            knew = min(knew, place)
        rows[row, 7] = table[CLOCK]
        if has_record or np.int64(rows[row, 1]) & RECORDS:
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
