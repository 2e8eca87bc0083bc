# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled loop of the memory: count what was drawn and what verifying has told, learn rates and the
correction.

Used by: `memory`.
"""

import numpy as np
from numpy.typing import NDArray

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
from streaminator.speculative.memory_records import jit, pack_record
from streaminator.speculative.memory_tables import (
    FIRST_SHARED,
    NUM_BUCKETS,
    NUM_CONTEXTS,
    TAIL,
    Ints,
    Rows,
    count_token,
    find_all,
    hash_contexts,
)

_LONG = 7  # place of the shortest own match that spares the shared table
_EAGER, _SELDOM = 8192, 8  # the mixture is fitted to the first tokens, then to every eighth


@jit
def learn(
    rows: Rows,
    tables: Ints,
    running: Ints,
    tails: Ints,
    handles: Ints,
    new: Ints,
    lengths: Ints,
    rejected: Ints,
    num_rejected: Ints,
    top_ids: Ints,
    top_probs: NDArray[np.float32],
    mixing: Floats,
    num_learned: Ints,
    hits: Floats,
    second_hits: Floats,
    noise_hits: Floats,
    predictions: Ints,
    correction: Correction,
    own_tier: bool,
    use_shared: bool,
    learns_rates: bool,
    text: Ints,
    scratch: Scratch,
) -> None:
    """Append `new` (all handles' tokens, `lengths` of each) and count them.

    `top_ids`, `top_probs` [m + r, M] hold each new token's distribution, and what would have
    followed each of the `rejected` drafts (`num_rejected` of each handle), handle by handle;
    M = 0: tokens only. `text` has room for TAIL tokens before a handle's own.
    """
    keys, found, record = scratch.keys, scratch.found, scratch.record
    is_told = top_ids.shape[1] > 0
    use_shared &= tables[0, NUM_BUCKETS] > 0
    num_tiers = 2 if use_shared else 1
    first = first_rejected = 0
    for n in range(len(handles)):
        handle, num = handles[n], lengths[n]
        first_row = first + first_rejected
        state = running[handle]
        own, shared = tables[state[TABLE]], tables[0]
        for index in range(TAIL):
            text[index] = tails[handle, index]
        for index in range(num):
            text[TAIL + index] = new[first + index]
        if learns_rates:
            drawn = new[first : first + num]
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
        for index in range(num):
            end = TAIL + index
            known = min(state[KNOWN] + index, TAIL)
            ids, probs = top_ids[first_row + index], top_probs[first_row + index]
            hash_contexts(text, end, known, correction.numbers, keys)
            num_learned[0] += learns_rates
            if learns_rates and (num_learned[0] < _EAGER or num_learned[0] % _SELDOM == 0):
                find_all(rows, own, keys, 0, found[0])
                if use_shared:
                    find_all(rows, shared, keys, FIRST_SHARED, found[1])
                learn_mixing(
                    rows, (own, shared), num_tiers, found, text[end], mixing, scratch.places,
                    scratch.estimates,
                )  # fmt: skip
            # A distribution says something new each time: twice as many contexts are told.
            excluded_after = 2 if is_told else 1
            cell = pack_record(text[end], ids, probs, record) if is_told else text[end]
            knew = NUM_CONTEXTS
            if own_tier and own[NUM_BUCKETS] > 0:
                knew = count_token(
                    rows, own, keys, 0, excluded_after, text[end], is_told, cell, record
                )
            # What a long match of its own prompt foretells, the others need not be told again.
            if use_shared and (knew > _LONG or is_told):
                count_token(rows, shared, keys, FIRST_SHARED, 2, text[end], is_told, cell, record)
        for index in range(TAIL):
            tails[handle, index] = text[num + index]
        for index in range(num_rejected[n] if own_tier and own[NUM_BUCKETS] > 0 else 0):
            # The first one stands where the last of the new tokens was drawn instead.
            end = TAIL + num + index
            text[end - 1] = rejected[first_rejected + index]
            ids, probs = top_ids[first_row + num + index], top_probs[first_row + num + index]
            known = min(state[KNOWN] + num + index, TAIL)
            hash_contexts(text, end, known, correction.numbers, keys)
            cell = pack_record(ids[0], ids, probs, record)
            count_token(rows, own, keys, 0, 2, ids[0], True, cell, record)
        state[KNOWN] = min(state[KNOWN] + num, TAIL)
        state[POSITION] += num
        first += num
        first_rejected += num_rejected[n]
