# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled mixture of the contexts' estimates; see `memory_kernels` for what it is.

Contexts of one place point to the same records: the parts of each are added up, then it is read
once. Records with little to say are not read at all.

What is stored cannot be guessed, and to guess wrong costs the processor more than the work: so the
loops add to a place beyond the last one, and count it or do not, instead of asking first.

Used by: `memory_kernels`; its arrays also by `memory`, `memory_learning`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.compiled import jit_inline
from streaminator.speculative.memory_features import TRAITS_SHAPE
from streaminator.speculative.memory_math import LANES
from streaminator.speculative.memory_rates import Floats, kind_of, part_of
from streaminator.speculative.memory_records import (
    EMPTY,
    MAX_ENTRIES,
    NUM_CELLS,
    ONE,
    RECORDS,
    Ints,
    Rows,
    entry_of,
    nth,
    peek,
    prefetch,
)
from streaminator.speculative.memory_tables import (
    FIRST_SHARED,
    GAPPED,
    LAST_GAPPED,
    NUM_CONTEXTS,
    SCALE,
    START,
    total_of,
)

MAX_CANDIDATES = 64
_MAX_REFS = NUM_CONTEXTS * NUM_CELLS
ENOUGH = 0.05
"""Of the mass may stay unexplained: what is left hardly changes the draft."""
_LITTLE = 0.02  # mass of a context that is not looked at
_LIGHT = 0.03  # a record that gets less of the mass is not read, unless none gets more
_FAINT = 0.002  # mass of a record's entry that is not looked at
_LEAST = 0.001  # mass that makes a candidate
_NOWHERE = 255


class Scratch(NamedTuple):
    """Arrays that the loops work in: a mixture's candidates, the records it reads, what was found."""

    tokens: Ints
    masses: Floats
    refs: Ints
    parts: Floats
    hints: NDArray[np.uint8]
    """[2, 256] where tokens, and cells, with these low bits are among those so far."""
    own_masses: Floats
    contexts: Ints
    """[2, contexts] of those to mix in the row, and before that the place."""
    heres: Floats
    """[2, contexts] the mass each takes, and what it leaves."""
    scores: Floats
    traits: Rows
    target: NDArray[np.float32]
    record: Rows
    found: Ints
    places: Ints
    estimates: Floats


def new_scratch() -> Scratch:
    """Arrays for one memory."""
    return Scratch(
        tokens=np.zeros(MAX_CANDIDATES + 1, np.int64),
        masses=np.empty(MAX_CANDIDATES + 1),
        refs=np.zeros(_MAX_REFS + 1, np.int64),
        parts=np.zeros(_MAX_REFS + 1),
        hints=np.empty((2, 256), np.uint8),
        own_masses=np.empty(MAX_CANDIDATES + 1),
        contexts=np.empty((2, NUM_CONTEXTS + 1), np.int64),
        heres=np.empty((2, NUM_CONTEXTS + 1)),
        scores=np.empty((2, LANES)),
        traits=np.zeros(TRAITS_SHAPE, np.int32),
        target=np.empty(LANES, np.float32),
        record=np.empty(MAX_ENTRIES + 1, np.int32),
        found=np.empty((2, NUM_CONTEXTS), np.int64),
        places=np.empty((2 * NUM_CONTEXTS, 4), np.int64),
        estimates=np.empty((3, 2 * NUM_CONTEXTS + 1)),
    )


@jit_inline
def mix(
    rows: Rows,
    own: Ints,
    shared: Ints,
    use_shared: bool,
    found: Ints,
    first: int,
    mixing: Floats,
    scratch: Scratch,
    factor: float,
) -> tuple[int, float, int, int, int]:
    """Mix the contexts found in a prompt's table from `first` on, then in the shared one, until the
    rest cannot matter: until one candidate leads by `factor` times what is left.

    Returns: the number of candidates, the mass left, the own longest match's place and count, the
    shared one's place.
    """
    tokens, masses, refs, parts, hints, own_masses, contexts, heres = scratch[:8]
    longest = shared_longest = NUM_CONTEXTS
    size = count = 0
    rest = 1.0
    hints[0] = _NOWHERE
    for tier in range(2 if use_shared else 1):
        table = shared if tier else own
        start, matters = table[START], True
        num = 0
        for place in range(FIRST_SHARED if tier else first, NUM_CONTEXTS):
            contexts[0, nth(num)], contexts[1, nth(num)] = found[tier, place], place
            num += found[tier, place] >= 0
        num_told = 0
        for index in range(num):
            row, place = contexts[0, index], contexts[1, index]
            total, distinct = total_of(rows, row)
            is_longest = not GAPPED <= place <= LAST_GAPPED
            if tier:
                shared_longest = min(shared_longest, place) if is_longest else shared_longest
            else:
                is_longest &= longest == NUM_CONTEXTS
                longest = place if is_longest else longest
                count = total // SCALE if is_longest else count
            part = part_of(mixing, tier, place, kind_of(total, distinct))
            contexts[0, nth(num_told)] = row
            heres[0, nth(num_told)] = here = rest * part
            rest *= 1 - part
            heres[1, nth(num_told)] = rest
            num_told += here >= _LITTLE
        num_refs = 0
        hints[1] = _NOWHERE
        for index in range(num_told):
            row, here, left = contexts[0, index], heres[0, index], heres[1, index]
            total, _ = total_of(rows, row)
            if peek(rows, row, 1) & RECORDS:
                num_refs = _refer(rows, row, start, here, refs, parts, hints, num_refs)
                continue
            size = _mix_list(rows, start, row, here / total, tokens, masses, size, hints)
            if left > 0.5 or num_refs > 0:
                continue
            top = second = 0.0
            for slot in range(size):
                if masses[slot] > top:
                    top, second = masses[slot], top
                elif masses[slot] > second:
                    second = masses[slot]
            if top - second > factor * left:
                matters, rest = False, left
                break
        heaviest = 0.0
        for slot in range(num_refs):
            heaviest = max(heaviest, parts[slot])
        least = min(_LIGHT, heaviest)
        num = 0
        for slot in range(num_refs):
            cell, mass = refs[slot], parts[slot]
            refs[nth(num)], parts[nth(num)] = cell, mass
            num += mass >= least
        for slot in range(num):
            cell, mass = refs[slot], parts[slot]
            if cell >= 0:
                size = _mix_in(cell, mass, tokens, masses, size, hints)
            else:
                size = _mix_record(rows, -2 - cell, mass, tokens, masses, size, hints)
        if tier == 0:
            for slot in range(len(own_masses)):
                own_masses[slot] = masses[slot] if slot < size else 0.0
            if rest < ENOUGH or not matters:
                break
    return size, rest, longest, count, shared_longest


@jit_inline
def _mix_record(
    rows: Rows,
    record: int,
    mass: float,
    tokens: Ints,
    masses: Floats,
    size: int,
    hints: NDArray[np.uint8],
) -> int:
    """Add a record's entries; returns the number of candidates."""
    mass *= 1 / ONE
    # Of more candidates than there is room for, the last are left out.
    for index in range(min(peek(rows, record, 0), MAX_CANDIDATES - size)):
        token, share = entry_of(rows, record, index)
        here = mass * share
        # Likeliest first.
        if here < _FAINT:
            break
        place = token & 255
        tokens[nth(size)], masses[nth(size)] = token, 0.0
        slot = min(np.int64(hints[0, place]), size)
        if tokens[nth(slot)] != token:  # seldom: another token has its place
            slot = _search(tokens, token, size)
        masses[nth(slot)] += here
        hints[0, place] = slot
        size = max(size, slot + 1)
    return size


@jit_inline
def _search(values: Ints, value: int, size: int) -> int:
    slot = 0
    while slot < size and values[nth(slot)] != value:
        slot += 1
    return slot


@jit_inline
def _refer(
    rows: Rows,
    row: int,
    start: int,
    mass: float,
    refs: Ints,
    parts: Floats,
    hints: NDArray[np.uint8],
    num_refs: int,
) -> int:
    """Share a context's mass out to its cells; returns the number of different ones so far.

    Contexts of one place point to the same records, which are read once.
    """
    num = 0
    for index in range(NUM_CELLS):
        num += peek(rows, row, 2 + index) != EMPTY
    mass /= num
    for index in range(num):
        cell = peek(rows, row, 2 + index)
        cell -= start & ((cell + 1) >> 63)
        place = cell & 255
        refs[nth(num_refs)], parts[nth(num_refs)] = cell, 0.0
        slot = min(np.int64(hints[1, place]), num_refs)
        if refs[nth(slot)] != cell:  # seldom: another cell has its place
            slot = _search(refs, cell, num_refs)
        parts[nth(slot)] += mass
        hints[1, place] = slot
        num_refs = max(num_refs, slot + 1)
        prefetch(rows, max(-2 - cell, 0))
    return num_refs


@jit_inline
def _seat(hints: NDArray[np.uint8], tokens: Ints, token: int, size: int) -> int:
    """Where a token is among the first `size`, or `size`: then it will be there."""
    slot = np.int64(hints[0, token & 255])
    if slot >= size:
        hints[0, token & 255] = size
        return size
    return slot if tokens[slot] == token else _search(tokens, token, size)


@jit_inline
def _mix_list(
    rows: Rows,
    start: int,
    row: int,
    scale: float,
    tokens: Ints,
    masses: Floats,
    size: int,
    hints: NDArray[np.uint8],
) -> int:
    """Add the continuations that a context counted; returns the number of candidates."""
    at, column, num = row, 2, 2
    while True:
        for index in range(num):
            token = np.int64(rows[at, column + 2 * index])
            if token == EMPTY:
                return size
            mass = scale * rows[at, column + 2 * index + 1]
            size = _mix_in(token, mass, tokens, masses, size, hints)
        if rows[at, 6] < 0:
            return size
        at = start + rows[at, 6]
        column, num = 0, 3


@jit_inline
def _mix_in(
    token: int,
    mass: float,
    tokens: Ints,
    masses: Floats,
    size: int,
    hints: NDArray[np.uint8],
) -> int:
    """Add mass to a candidate; returns the number of candidates."""
    slot = _seat(hints, tokens, token, size)
    if slot == size:
        if size == MAX_CANDIDATES or mass < _LEAST:
            return size
        size += 1
        tokens[slot] = token
        masses[slot] = 0.0
    masses[slot] += mass
    return size
