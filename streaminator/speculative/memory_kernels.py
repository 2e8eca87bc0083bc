# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled loops of the memory: mix the orders, correct, draft chains and second choices.

Mixing. Each context known so far gives an estimate of the next token, its continuations' shares.
From the longest match of the prompt's own table down, then the same in the shared table, a
context takes a learned part of the mass that the ones before left over. That part depends on the
order, how often the context was seen and how many different tokens followed it, and is fitted
online by expectation-maximisation (interpolation weights as in Jelinek and Mercer 1980, tied by
bucket).

Correction. The likeliest candidates' masses are then corrected by what the sequence's own text says
about each (`memory_correction`).

Survival. What a mixture says of itself is overconfident. The hit rate of a drafted token is
learned per bucket of what was known when it was drafted, backed off to coarser buckets.

Noise. The sampler draws argmax(log p + g) with g a hash that is known here too, so the draft is
argmax(log q + strength * g); the strength is the one of NOISE_STRENGTHS that would have hit most
often where matches were alike.

Second choices. Where the chain may go wrong, the second best candidate is drafted beside it (a tree
whose branches are one token long); its chance is learned by its share of what the first leaves.

Used by: `memory`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.compiled import jit, jit_inline
from streaminator.speculative.memory_correction import (
    Correction,
    correct,
    keep,
    keep_likeliest,
)
from streaminator.speculative.memory_features import find_features, pop, push
from streaminator.speculative.memory_math import LANES, sum_of_lanes
from streaminator.speculative.memory_mixing import Scratch, mix
from streaminator.speculative.memory_noise import choose
from streaminator.speculative.memory_rates import (
    KNOWN,
    LENGTH,
    MATCH_BINS,
    NOISE_KEY,
    NUM_PROMPT,
    NUM_SHARES,
    POSITION,
    PREDICTED,
    RUN,
    RUN_BINS,
    TABLE,
    UNTRIED,
    Floats,
    hit_rate,
    second_rate,
    share_bin,
)
from streaminator.speculative.memory_records import Ints, Rows, log_bin, nth
from streaminator.speculative.memory_tables import (
    GAPPED,
    NUM_BUCKETS,
    NUM_CONTEXTS,
    TAIL,
    fetch_buckets,
    find_rows,
    hash_contexts,
)

_AHEAD = 16  # sequences whose contexts are looked up together
_ENOUGH_TRIALS = 64
"""Hits after which all strengths of the noise are tried at every fourth place only."""


class Chains(NamedTuple):
    """Arrays that `draft` works in: of each of n chains its text and how far it is."""

    keys: NDArray[np.uint64]
    found: Ints
    text: Ints
    restore: Rows
    survivals: Floats
    starts: Ints
    waiting: Ints
    picks: Ints


def new_chains(num: int, width: int, num_strengths: int) -> Chains:
    """Arrays for at most `num` chains of at most `width` tokens."""
    return Chains(
        keys=np.empty((num, NUM_CONTEXTS), np.uint64),
        found=np.empty((num, 2, NUM_CONTEXTS), np.int64),
        text=np.empty((num, TAIL + width), np.int64),
        restore=np.empty((num, width), np.int32),
        survivals=np.empty(num),
        starts=np.empty(num, np.int64),
        waiting=np.empty(num, np.int64),
        picks=np.zeros(num_strengths, np.int64),
    )


@jit_inline
def _best_strength(noise_hits: Floats, match: int) -> int:
    best = 0
    for index in range(1, noise_hits.shape[1]):
        if noise_hits[match, index] > noise_hits[match, best]:
            best = index
    return best


@jit
def draft(
    rows: Rows,
    tables: Ints,
    running: Ints,
    tails: Ints,
    handles: Ints,
    caps: Ints,
    min_survival: float,
    mixing: Floats,
    hits: Floats,
    second_hits: Floats,
    strengths: Floats,
    noise_hits: Floats,
    use_shared: bool,
    correction: Correction,
    predictions: Ints,
    chains: Chains,
    scratch: Scratch,
    out_tokens: Ints,
    out_survival: NDArray[np.float32],
) -> int:
    """Draft a chain for each handle, and second choices beside it; returns the longest's length.

    What was predicted is kept for `advance` in `predictions`.

    Args:
        rows, tables: the arena and the tables' records; table 0 is the shared one.
        running, tails: state of running sequences.
        handles, caps: [n] whom to draft for, at most how many tokens, second choices included.
        min_survival: drafting stops at the first token less likely to be accepted.
        mixing, hits, second_hits, strengths, noise_hits: what was learned about each.
        use_shared: whether the shared table is mixed in.
        correction: of the mixture; the drafted tokens' candidates are kept there.
        predictions: [H, K, 4 + S] token, bucket, second choice (-1: none) and its share, and the
            token by each strength.
        chains, scratch: arrays to work in.
        out_tokens, out_survival: [n, 2, K] zeroed, chains and second choices; survival 0: none.
    """
    num, width = len(handles), out_tokens.shape[2]
    # Without noise a lead above what is left decides; noise may turn a larger lead around.
    factor = 1.0 if len(strengths) == 1 else 20.0
    use_shared &= tables[0, NUM_BUCKETS] > 0
    keys, found, text, restore, survivals, starts, waiting, picks = chains
    tokens, masses, own_masses = scratch.tokens, scratch.masses, scratch.own_masses
    scores = scratch.scores
    num_waiting = num
    for n in range(num):
        state = running[handles[n]]
        state[PREDICTED] = 0
        survivals[n], starts[n], waiting[n] = 1.0, 0, n
        for index in range(TAIL):
            text[n, index] = tails[handles[n], index]
        hash_contexts(text[n], TAIL, state[KNOWN], correction.numbers, keys[n])
        fetch_buckets(rows, tables[state[TABLE]], tables[0], keys[n], 0, use_shared)
    # A token of each at a time, so that the rows it needs come from memory meanwhile.
    for step in range(width):
        num_left = 0
        for place in range(num_waiting):
            if place % _AHEAD == 0:
                for index in range(place, min(place + _AHEAD, num_waiting)):
                    n = waiting[index]
                    own = tables[running[handles[n]][TABLE]]
                    find_rows(rows, own, tables[0], keys[n], starts[n], use_shared, found[n])
            n = waiting[place]
            if step >= caps[n]:
                continue
            handle = handles[n]
            state = running[handle]
            own, end = tables[state[TABLE]], TAIL + step
            size, rest, own_longest, count, shared_longest = mix(
                rows, own, tables[0], use_shared, found[n], starts[n], mixing, scratch, factor
            )
            # What was never seen after n tokens is not after n + 1 in the next step.
            starts[n] = max(own_longest - 1, 0) if own_longest < GAPPED else 0
            match = min(NUM_CONTEXTS - shared_longest, MATCH_BINS - 1)
            if own_longest < NUM_CONTEXTS:
                match = (NUM_CONTEXTS - own_longest) * MATCH_BINS + log_bin(count, MATCH_BINS)
            if size == 0:
                continue
            size = keep_likeliest(tokens, masses, own_masses, size)
            known_mass = sum_of_lanes(masses)
            history, length = correction.histories[handle], state[LENGTH] + step
            # One alone keeps what it has.
            if size > 1:
                features, logs = correction.features[step, handle], correction.logs[step, handle]
                find_features(
                    history, length, state[NUM_PROMPT], own_longest, tokens, masses, own_masses,
                    size, correction.numbers, scratch.traits, features,
                )  # fmt: skip
                correct(
                    correction.weights, own_longest, masses, known_mass, size, features, logs,
                    scores[0],
                )  # fmt: skip
            else:
                for index in range(LANES):
                    scores[0, index] = -np.inf if index else 0.0
            keep(correction, handle, step, own_longest, tokens, masses, known_mass, size)
            strength = _best_strength(noise_hits, match)
            position = state[POSITION] + step
            is_new = noise_hits[match, strength] < _ENOUGH_TRIALS
            tries_all = len(strengths) > 1 and (position & 3 == 0 or is_new)
            lead, second, second_lead = choose(
                tokens, masses, size, strengths, strength, tries_all, state[NOISE_KEY], position,
                scores, picks,
            )  # fmt: skip
            pick = picks[strength]
            share = (masses[pick] if len(strengths) == 1 else lead * known_mass) / (
                known_mass + rest
            )
            run = log_bin(state[RUN] + step + 1, RUN_BINS)
            bucket = (match * RUN_BINS + run) * NUM_SHARES + share_bin(share)
            before = survivals[n]
            survival = before * hit_rate(hits, bucket)
            survivals[n] = survival
            token = tokens[pick]
            text[n, end] = token
            # For the rest of the chain it has been said.
            restore[n, step] = push(history, length, token, correction.numbers)
            guess = predictions[handle, step]
            guess[0], guess[1], guess[2] = token, bucket, -1
            for j in range(len(strengths)):
                guess[4 + j] = tokens[picks[j]] if tries_all else UNTRIED
            # Also predictions that are too unlikely are checked later: no bucket is given up on.
            state[PREDICTED] += 1
            if survival < min_survival:
                continue
            out_tokens[n, 0, step] = token
            out_survival[n, 0, step] = survival
            if second >= 0:
                left = known_mass + rest - masses[pick]
                share = masses[second] / left
                if len(strengths) > 1:
                    share = second_lead * (known_mass - masses[pick]) / left
                guess[2], guess[3] = tokens[second], share_bin(share)
                # Not before the first choice: a draft cut anywhere is a chain and its sides.
                chance = min(survival, (before - survival) * second_rate(second_hits, guess[3]))
                if chance >= min_survival:
                    out_tokens[n, 1, step] = tokens[second]
                    out_survival[n, 1, step] = chance
            num_before = step + 1
            for index in range(step + 1):
                num_before += out_survival[n, 1, index] > out_survival[n, 0, step]
            # Of what follows nothing would be among the likeliest that are left in the end.
            if num_before < caps[n]:
                known = min(state[KNOWN] + step + 1, TAIL)
                hash_contexts(text[n], end + 1, known, correction.numbers, keys[n])
                fetch_buckets(rows, own, tables[0], keys[n], starts[n], use_shared)
                waiting[num_left] = n
                num_left += 1
        num_waiting = num_left
    longest = 0
    for n in range(num):
        longest = max(longest, _keep_best(out_survival[n], caps[n]))
        state, history = running[handles[n]], correction.histories[handles[n]]
        for step in range(state[PREDICTED] - 1, -1, -1):
            pop(history, state[LENGTH] + step, restore[n, step])
    return longest


@jit
def _keep_best(survival: NDArray[np.float32], cap: int) -> int:
    """Leave the `cap` likeliest of a chain and the second choices beside it; returns its length."""
    length = num = 0
    for step in range(survival.shape[1]):
        length += survival[0, step] > 0
        num += (survival[0, step] > 0) + (survival[1, step] > 0)
    while num > cap:
        row, place = 0, length - 1
        least = survival[0, nth(place)]
        for step in range(length):
            here = survival[1, nth(step)]
            is_less = (here > 0) & (here <= least)
            least = here if is_less else least
            row, place = (1 if is_less else row), (step if is_less else place)
        survival[nth(row), nth(place)] = 0
        length -= row == 0
        num -= 1
    return length
