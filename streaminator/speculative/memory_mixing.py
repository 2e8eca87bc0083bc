# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled mixture of the contexts' estimates; see `memory_kernels` for what it is.

Contexts of one place point to the same records: the parts of each are added up, then it is read
once. Records with little to say are not read at all.

Used by: `memory_kernels`, `memory_learning`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.speculative.memory_rates import NUM_AGES, Floats, age_of, kind_of, part_of
from streaminator.speculative.memory_records import (
    EMPTY,
    NUM_CELLS,
    ONE,
    RECORDS,
    Ints,
    Rows,
    entry_of,
    jit,
    jit_inline,
    prefetch,
)
from streaminator.speculative.memory_tables import (
    GAPPED,
    LAST_GAPPED,
    NUM_CONTEXTS,
    NUM_SLOTS,
    SCALE,
    START,
    find,
    total_of,
)

MAX_CANDIDATES = MAX_REFS = 64
ENOUGH = 0.02
"""Of the mass may stay unexplained: what is left hardly changes the draft."""
_LITTLE = 0.01  # mass of a context whose records are not looked at
_LIGHT = 0.03  # a record that gets less of the mass is not read, unless none gets more
_FAINT = 0.002  # mass of a record's entry that is not looked at
_LEAST = 0.001  # mass that makes a candidate
_MIXTURES = 512
NUM_HINTS = _MIXTURES + 2
"""Scratch: for cells and for tokens 256 hints each, and the number of the mixture they are of."""


class Scratch(NamedTuple):
    """Arrays that the loops work in: a mixture's candidates, the records it reads, what was found."""

    tokens: Ints
    masses: Floats
    ages: Ints
    refs: Ints
    parts: Floats
    hints: Ints
    near: Ints
    scores: Floats
    keys: NDArray[np.uint64]
    found: Ints
    places: Ints
    estimates: Floats
    gradient: Floats
    own_masses: Floats


def new_scratch() -> Scratch:
    """Arrays for one memory."""
    return Scratch(
        tokens=np.empty(MAX_CANDIDATES, np.int64),
        masses=np.empty(MAX_CANDIDATES),
        ages=np.empty(MAX_CANDIDATES, np.int64),
        refs=np.empty(MAX_REFS, np.int64),
        parts=np.empty(MAX_REFS),
        hints=np.zeros(NUM_HINTS, np.int64),
        near=np.empty((2, MAX_CANDIDATES), np.int64),
        scores=np.empty((2, MAX_CANDIDATES)),
        keys=np.empty(NUM_CONTEXTS, np.uint64),
        found=np.empty((2, NUM_CONTEXTS), np.int64),
        places=np.empty((2 * NUM_CONTEXTS, 4), np.int64),
        estimates=np.empty((3, 2 * NUM_CONTEXTS + 1)),
        gradient=np.empty(NUM_AGES),
        own_masses=np.empty(MAX_CANDIDATES),
    )


@jit
def mix_tier(
    rows: Rows,
    table: Ints,
    tier: int,
    keys: NDArray,
    first: int,
    mixing: Floats,
    seen: Rows,
    clock: int,
    recency: Floats,
    scratch: Scratch,
    size: int,
    rest: float,
    factor: float,
) -> tuple[int, float, bool, int, int]:
    """Add a table's contexts from `first` on to the mixture, until the rest cannot matter.

    The first `size` tokens and masses in `scratch` are the mixture so far.

    Returns: the number of candidates, the mass left, whether that matters, the longest match's
    place and count.
    """
    tokens, masses, ages, refs, parts, hints = scratch[:6]
    longest, count = NUM_CONTEXTS, 0
    if table[NUM_SLOTS] == 0:
        return size, rest, True, longest, count
    num_refs = 0
    hints[_MIXTURES] += 1
    hints[_MIXTURES + 1] += size == 0
    for place in range(first, NUM_CONTEXTS):
        if keys[place] == 0:
            continue
        row = find(rows, table, keys[place])
        if row < 0:
            continue
        total, distinct = total_of(rows, row)
        if longest == NUM_CONTEXTS and not GAPPED <= place <= LAST_GAPPED:
            longest, count = place, total // SCALE
        part = part_of(mixing, tier, place, kind_of(total, distinct))
        here = rest * part
        rest *= 1 - part
        if np.int64(rows[row, 1]) & RECORDS:
            if here < _LITTLE:
                continue
            num = 0
            while num < NUM_CELLS and rows[row, 2 + num] != EMPTY:
                num += 1
            for index in range(num):
                cell = np.int64(rows[row, 2 + index])
                # Contexts of one place point to the same records, which are read once.
                slot = _seat(hints, cell & 255, refs, cell, num_refs)
                if slot < MAX_REFS:
                    if slot == num_refs:
                        num_refs += 1
                        refs[slot], parts[slot] = cell, 0.0
                        prefetch(rows, table[START] - 2 - min(cell, -2))
                    parts[slot] += here / num
        else:
            size = _mix_list(
                rows,
                table,
                row,
                here / total,
                seen,
                clock,
                recency,
                tokens,
                masses,
                ages,
                size,
                hints,
            )
        if rest < ENOUGH:
            break
        if rest > 0.5 or num_refs > 0:
            continue
        top = second = 0.0
        for slot in range(size):
            if masses[slot] > top:
                top, second = masses[slot], top
            elif masses[slot] > second:
                second = masses[slot]
        if top - second > factor * rest:
            return size, rest, False, longest, count
    heaviest = 0.0
    for slot in range(num_refs):
        heaviest = max(heaviest, parts[slot])
    for slot in range(num_refs):
        cell, mass = refs[slot], parts[slot]
        if mass < min(_LIGHT, heaviest):
            continue
        if cell >= 0:
            size = _mix_in(cell, mass, seen, clock, recency, tokens, masses, ages, size, hints)
            continue
        record = table[START] - 2 - cell
        for index in range(rows[record, 0]):
            token, share = entry_of(rows, record, index)
            here = mass * (share / ONE)
            if here < _FAINT:
                continue
            size = _mix_in(token, here, seen, clock, recency, tokens, masses, ages, size, hints)
    return size, rest, rest >= ENOUGH, longest, count


@jit_inline
def _seat(hints: Ints, place: int, values: Ints, value: int, size: int) -> int:
    """Where a value is among the first `size`, or `size`: then it will be there.

    A hint is where the first value with these low bits went, and in which mixture that was.
    """
    mixture = hints[_MIXTURES + (place >> 8)]
    hint = hints[place]
    if hint >> 8 != mixture:
        hints[place] = mixture << 8 | size
        return size
    slot = hint & 255
    if values[slot] == value:
        return slot
    slot = 0
    while slot < size and values[slot] != value:
        slot += 1
    return slot


@jit_inline
def _mix_list(
    rows: Rows,
    table: Ints,
    row: int,
    scale: float,
    seen: Rows,
    clock: int,
    recency: Floats,
    tokens: Ints,
    masses: Floats,
    ages: Ints,
    size: int,
    hints: Ints,
) -> int:
    """Add the continuations that a context counted; returns the number of candidates."""
    at, column, num = row, 2, 2
    while True:
        for index in range(num):
            token = np.int64(rows[at, column + 2 * index])
            if token == EMPTY:
                return size
            mass = scale * rows[at, column + 2 * index + 1]
            # Lists are short: what is there already is soon found.
            slot = 0
            while slot < size and tokens[slot] != token:
                slot += 1
            if slot < size:
                masses[slot] += mass * recency[ages[slot], 2]
            elif size < MAX_CANDIDATES and mass >= _LEAST:
                size = _mix_in(token, mass, seen, clock, recency, tokens, masses, ages, size, hints)
        if rows[at, 6] < 0:
            return size
        at = table[START] + rows[at, 6]
        column, num = 0, 3


@jit_inline
def _mix_in(
    token: int,
    mass: float,
    seen: Rows,
    clock: int,
    recency: Floats,
    tokens: Ints,
    masses: Floats,
    ages: Ints,
    size: int,
    hints: Ints,
) -> int:
    """Add mass to a candidate; returns the number of candidates."""
    slot = _seat(hints, 256 + (token & 255), tokens, token, size)
    if slot == size:
        if size == MAX_CANDIDATES or mass < _LEAST:
            hints[256 + (token & 255)] = 0
            return size
        size += 1
        tokens[slot] = token
        masses[slot] = 0.0
        ages[slot] = age_of(seen, clock, token)
    masses[slot] += mass * recency[ages[slot], 2]
    return size
