# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled loops of the memory. `advance`, before the next draft: move on to what was drawn, learn rates
and the correction. `count`, any time after: what was drawn and what verifying has told.

Used by: `memory`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.compiled import jit, jit_inline
from streaminator.speculative.memory_correction import Correction, learn_corrections
from streaminator.speculative.memory_features import extend
from streaminator.speculative.memory_mixing import Scratch
from streaminator.speculative.memory_rates import (
    KNOWN,
    POSITION,
    PREDICTED,
    TABLE,
    Floats,
    learn_hits,
    learn_mixing,
)
from streaminator.speculative.memory_records import pack_record
from streaminator.speculative.memory_tables import (
    FIRST_SHARED,
    NUM_BUCKETS,
    NUM_CONTEXTS,
    TAIL,
    Ints,
    Rows,
    count_token,
    fetch_buckets,
    find_all,
    find_rows,
    hash_contexts,
)

_LONG = 7  # place of the shortest own match that spares the shared table
_EAGER, _SELDOM = 8192, 8  # the mixture is fitted to the first tokens, then to every eighth


class Ahead(NamedTuple):
    """Arrays that a sequence's contexts are looked up in before they are needed."""

    text: Ints
    """[TAIL + n] tokens, behind the TAIL before them."""
    keys: NDArray[np.uint64]
    """[n, contexts]"""
    found: Ints
    """[n, 2, contexts] their rows in the own and the shared table, as `find_rows` gives them."""


def new_ahead(num: int) -> Ahead:
    """Room for `num` tokens."""
    return Ahead(
        text=np.empty(TAIL + num, np.int64),
        keys=np.empty((num, NUM_CONTEXTS), np.uint64),
        found=np.empty((num, 2, NUM_CONTEXTS), np.int64),
    )


@jit
def advance(
    running: Ints,
    tails: Ints,
    handles: Ints,
    new: Ints,
    lengths: Ints,
    num_rejected: Ints,
    top_ids: Ints,
    top_probs: NDArray[np.float32],
    hits: Floats,
    second_hits: Floats,
    noise_hits: Floats,
    predictions: Ints,
    correction: Correction,
    learns_rates: bool,
    before: Ints,
    scratch: Scratch,
) -> None:
    """Append `new` (all handles' tokens, `lengths` of each), and judge the drafts by it.

    Args:
        top_ids, top_probs: as for `count`.
        learns_rates: whether there were drafts to judge.
        before: [n, TAIL + 1] set to the tails as they were, and how many tokens of each are known.
    """
    first = first_row = 0
    for n in range(len(handles)):
        handle, num = handles[n], lengths[n]
        state, tail = running[handle], tails[handle]
        drawn = new[first : first + num]
        if learns_rates:
            ids, probs = top_ids[first_row:], top_probs[first_row:]
            learn_corrections(
                correction,
                handle,
                predictions[handle],
                state[PREDICTED],
                drawn,
                ids,
                probs,
                scratch.target,
            )
            extend(correction.histories[handle], state, drawn, correction.numbers)
            learn_hits(state, predictions[handle], drawn, hits, second_hits, noise_hits)
        for index in range(TAIL):
            before[n, index] = tail[index]
        before[n, TAIL] = state[KNOWN]
        for index in range(TAIL):
            from_old = index + num < TAIL
            tail[index] = before[n, index + num] if from_old else drawn[index + num - TAIL]
        state[KNOWN] = min(state[KNOWN] + num, TAIL)
        state[POSITION] += num
        first += num
        first_row += num + num_rejected[n]


@jit
def count(
    rows: Rows,
    tables: Ints,
    running: Ints,
    handles: Ints,
    before: Ints,
    new: Ints,
    lengths: Ints,
    rejected: Ints,
    num_rejected: Ints,
    top_ids: Ints,
    top_probs: NDArray[np.float32],
    mixing: Floats,
    num_learned: Ints,
    numbers: NDArray[np.bool_],
    own_tier: bool,
    use_shared: bool,
    learns_rates: bool,
    ahead: Ahead,
    scratch: Scratch,
) -> None:
    """Count `new` (all handles' tokens, `lengths` of each) in the contexts that `before` tells.

    `top_ids`, `top_probs` [m + r, M] hold each new token's distribution, and what would have
    followed each of the `rejected` drafts (`num_rejected` of each handle), handle by handle;
    M = 0: tokens only. `ahead` has room for a handle's new and rejected tokens.
    """
    record = scratch.record
    is_told = top_ids.shape[1] > 0
    # A distribution says something new each time: twice as many contexts are told.
    excluded_after = 2 if is_told else 1
    use_shared &= tables[0, NUM_BUCKETS] > 0
    num_tiers = 2 if use_shared else 1
    first = first_rejected = 0
    for n in range(len(handles)):
        num = lengths[n]
        first_row = first + first_rejected
        own, shared = tables[running[handles[n], TABLE]], tables[0]
        learns_own = own_tier and own[NUM_BUCKETS] > 0
        drawn = new[first : first + num]
        drafted = rejected[first_rejected : first_rejected + (num_rejected[n] if learns_own else 0)]
        _look_ahead(rows, own, shared, use_shared, before[n], drawn, drafted, numbers, ahead)
        num_all = num + len(drafted)
        for index in range(num_all):
            find_rows(
                rows, own, shared, ahead.keys[index], 0, use_shared and index < num,
                ahead.found[index],
            )  # fmt: skip
        for index in range(num):
            token, keys, found = drawn[index], ahead.keys[index], ahead.found[index]
            ids, probs = top_ids[first_row + index], top_probs[first_row + index]
            num_learned[0] += learns_rates
            if learns_rates and (num_learned[0] < _EAGER or num_learned[0] % _SELDOM == 0):
                find_all(rows, own, keys, 0, scratch.found[0])
                if use_shared:
                    find_all(rows, shared, keys, FIRST_SHARED, scratch.found[1])
                learn_mixing(
                    rows, (own, shared), num_tiers, scratch.found, token, mixing, scratch.places,
                    scratch.estimates,
                )  # fmt: skip
            cell = pack_record(token, ids, probs, record) if is_told else token
            knew = NUM_CONTEXTS
            if learns_own:
                knew = count_token(
                    rows, own, keys, found[0], 0, excluded_after, token, is_told, cell, record
                )
            # What a long match of its own prompt foretells, the others need not be told again.
            if use_shared and (knew > _LONG or is_told):
                count_token(
                    rows, shared, keys, found[1], FIRST_SHARED, 2, token, is_told, cell, record
                )
        for index in range(num, num_all):
            row = first_row + index
            token = top_ids[row, 0]
            cell = pack_record(token, top_ids[row], top_probs[row], record)
            count_token(
                rows, own, ahead.keys[index], ahead.found[index, 0], 0, 2, token, True, cell, record
            )
        first += num
        first_rejected += num_rejected[n]


@jit_inline
def _look_ahead(
    rows: Rows,
    own: Ints,
    shared: Ints,
    use_shared: bool,
    before: Ints,
    drawn: Ints,
    drafted: Ints,
    numbers: NDArray[np.bool_],
    ahead: Ahead,
) -> None:
    """Hash the contexts before each token, and have their buckets fetched.

    The first of the `drafted` tokens stands where the last of those `drawn` was drawn instead; its
    contexts, and theirs that follow, are those that end with it.
    """
    text, keys, num = ahead.text, ahead.keys, len(drawn)
    for index in range(TAIL):
        text[index] = before[index]
    for index in range(num):
        text[TAIL + index] = drawn[index]
    for index in range(num + len(drafted)):
        end = TAIL + index
        if index >= num:
            text[end - 1] = drafted[index - num]
        hash_contexts(text, end, min(before[TAIL] + index, TAIL), numbers, keys[index])
        fetch_buckets(rows, own, shared, keys[index], 0, use_shared and index < num)
