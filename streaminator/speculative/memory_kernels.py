# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled loops of the memory: mix the orders, draft chains and second choices.

Mixing. Each context known so far gives an estimate of the next token, its continuations' shares.
From the longest match of the prompt's own table down, then the same in the shared table, a
context takes a learned part of the mass that the ones before left over. That part depends on the
order, how often the context was seen and how many different tokens followed it, and is fitted
online by expectation-maximisation (interpolation weights as in Jelinek and Mercer 1980, tied by
bucket). A candidate's mass is then multiplied by a factor for how long ago it stood in its
prompt's text (what other prompts said is less likely here if it names what was never named
here); the factors are fitted by gradient.

Survival. What a mixture says of itself is overconfident. The hit rate of a drafted token is
learned per bucket of what was known when it was drafted, backed off to coarser buckets.

Noise. The sampler draws argmax(log p + g) with g a hash that is known here too, so the draft is
argmax(log q + strength * g); the strength is the one of NOISE_STRENGTHS that would have hit most
often where matches were alike.

Second choices. Where the chain may go wrong, the second best candidate is drafted beside it (a tree
whose branches are one token long); its chance is learned by its share of what the first leaves.

Used by: `memory`, `memory_learning`.
"""

import math

import numpy as np
from numpy.typing import NDArray

from streaminator.speculative.memory_rates import (
    KNOWN,
    MATCH_BINS,
    NOISE_KEY,
    NUM_SEEN,
    NUM_SHARES,
    POSITION,
    PREDICTED,
    RUN,
    RUN_BINS,
    SHARE_EDGES,
    TABLE,
    Floats,
    age_of,
    gumbel,
    hit_rate,
    kind_of,
    log_bin,
    part_of,
    second_rate,
)
from streaminator.speculative.memory_tables import (
    CLOCK,
    EMPTY,
    FIRST_SHARED,
    GAPPED,
    MAX_ORDER,
    NUM_CONTEXTS,
    NUM_SLOTS,
    SCALE,
    START,
    Ints,
    Rows,
    find,
    hash_contexts,
    jit,
    total_of,
)

MAX_CANDIDATES = 64
ENOUGH = 0.01  # of the mass may stay unexplained: what is left cannot change the draft
_HOPELESS = 0.01  # of the best candidate's mass: the noise would have to be rare
_LEAST = 0.001  # mass that makes a candidate


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
    tokens: Ints,
    masses: Floats,
    ages: Ints,
    size: int,
    rest: float,
    factor: float,
) -> tuple[int, float, bool, int, int]:
    """Add a table's contexts from `first` on to the mixture, until the rest cannot matter.

    Returns: the number of candidates, the mass left, whether that matters, the longest match's
    place and count.
    """
    longest, count = NUM_CONTEXTS, 0
    if table[NUM_SLOTS] == 0:
        return size, rest, True, longest, count
    for place in range(first, NUM_CONTEXTS):
        if keys[place] == 0:
            continue
        row = find(rows, table, keys[place])
        if row < 0:
            continue
        total, distinct = total_of(rows, row)
        if longest == NUM_CONTEXTS and not GAPPED <= place <= GAPPED + 1:
            longest, count = place, total // SCALE
        part = part_of(mixing, tier, place, kind_of(total, distinct))
        scale = rest * part / total
        at, column, num = row, 2, 2
        while at >= 0:
            for index in range(num):
                token = np.int64(rows[at, column + 2 * index])
                if token == EMPTY:
                    break
                mass = scale * rows[at, column + 2 * index + 1]
                slot = 0
                while slot < size and tokens[slot] != token:
                    slot += 1
                if slot == size:
                    if size == MAX_CANDIDATES or mass < _LEAST:
                        continue
                    size += 1
                    tokens[slot] = token
                    masses[slot] = 0.0
                    ages[slot] = age_of(seen, clock, token)
                masses[slot] += mass * recency[ages[slot], 2]
            at = np.int64(rows[at, 6])
            at = at + table[START] if at >= 0 else at
            column, num = 0, 3
        rest *= 1 - part
        if rest < ENOUGH:
            return size, rest, False, longest, count
        if rest > 0.5:
            continue
        top = second = 0.0
        for slot in range(size):
            if masses[slot] > top:
                top, second = masses[slot], top
            elif masses[slot] > second:
                second = masses[slot]
        if top - second > factor * rest:
            return size, rest, False, longest, count
    return size, rest, True, longest, count


@jit
def _choose(
    tokens: Ints,
    masses: Floats,
    size: int,
    strengths: Floats,
    strength: int,
    key: int,
    position: int,
    best: Floats,
    picks: Ints,
) -> tuple[float, int, float]:
    """For each strength of the noise the index of the best candidate.

    Returns: with noise how far the best one at `strength` leads the next, from one half to one,
    without one; the index of the next, -1: there is none; the same lead of it over the third.
    """
    top, next_index = 0, -1
    for index in range(1, size):
        if masses[index] > masses[top]:
            top, next_index = index, top
        elif next_index < 0 or masses[index] > masses[next_index]:
            next_index = index
    if len(strengths) == 1:
        picks[0] = top
        return 1.0, next_index, 1.0
    best[:] = -np.inf
    second = third = -np.inf
    next_index = -1
    for index in range(size):
        if masses[index] < _HOPELESS * masses[top]:
            continue
        score = math.log(masses[index])
        noise = gumbel(key, position, tokens[index])
        for j in range(len(strengths)):
            here = score + strengths[j] * noise
            if here > best[j]:
                if j == strength:
                    third, second = second, best[j]
                    next_index = picks[j] if best[j] > -np.inf else -1
                best[j] = here
                picks[j] = index
            elif j == strength and here > second:
                third, second, next_index = second, here, index
            elif j == strength and here > third:
                third = here
    lead = 1 / (1 + math.exp(second - best[strength]))
    if next_index < 0:
        return lead, -1, 0.0
    return lead, next_index, 1 / (1 + math.exp(third - second))


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
    seen: Rows,
    recency: Floats,
    hits: Floats,
    second_hits: Floats,
    strengths: Floats,
    noise_hits: Floats,
    use_shared: bool,
    predictions: Ints,
    out_tokens: Ints,
    out_survival: NDArray[np.float32],
) -> None:
    """Draft a chain for each handle, and second choices beside it.

    What was predicted is kept for `learn` in `predictions`.

    Args:
        rows, tables: the arena and the tables' records; table 0 is the shared one.
        running, tails: state of running sequences.
        handles, caps: [n] whom to draft for, at most how many tokens, second choices included.
        min_survival: drafting stops at the first token less likely to be accepted.
        mixing, recency, hits, second_hits, strengths, noise_hits: what was learned about each.
        seen: [tables, NUM_SEEN] where tokens stood last.
        use_shared: whether the shared table is mixed in.
        predictions: [H, K, 4 + S] token, bucket, second choice (-1: none) and its share, and the
            token by each strength.
        out_tokens, out_survival: [n, 2, K] zeroed, chains and second choices; survival 0: none.
    """
    keys = np.empty(NUM_CONTEXTS, np.uint64)
    # Without noise a lead above what is left decides; noise may turn a larger lead around.
    factor = recency[:, 2].max() if len(strengths) == 1 else 20.0
    tokens = np.empty(MAX_CANDIDATES, np.int64)
    masses = np.empty(MAX_CANDIDATES, np.float64)
    ages = np.empty(MAX_CANDIDATES, np.int64)
    picks = np.zeros(len(strengths), np.int64)
    best = np.empty(len(strengths), np.float64)
    text = np.empty(MAX_ORDER + out_tokens.shape[2], np.int64)
    restore = np.empty(out_tokens.shape[2], np.int32)
    for n in range(len(handles)):
        handle = handles[n]
        state = running[handle]
        text[:MAX_ORDER] = tails[handle]
        own, own_seen = tables[state[TABLE]], seen[state[TABLE]]
        survival = 1.0
        start = 0
        state[PREDICTED] = 0
        for step in range(caps[n]):
            end = MAX_ORDER + step
            known = min(state[KNOWN] + step, MAX_ORDER)
            hash_contexts(text, end, known, keys)
            # What was never seen after n tokens was not after n + 1 in the step before.
            clock = own[CLOCK] + step
            size, rest, matters, longest, count = mix_tier(
                rows, own, 0, keys, start, mixing, own_seen, clock, recency, tokens, masses, ages,
                0, 1.0, factor,
            )  # fmt: skip
            start = max(longest - 1, 0) if longest < GAPPED else 0
            match = 0
            if longest < NUM_CONTEXTS:
                match = (NUM_CONTEXTS - longest) * MATCH_BINS + log_bin(count, MATCH_BINS)
            if use_shared and matters:
                size, rest, _, longest, _ = mix_tier(
                    rows, tables[0], 1, keys, FIRST_SHARED, mixing, own_seen, clock, recency,
                    tokens, masses, ages, size, rest, factor,
                )  # fmt: skip
                if match == 0:
                    match = min(NUM_CONTEXTS - longest, MATCH_BINS - 1)
            if size == 0:
                break
            strength = np.argmax(noise_hits[match])
            lead, second, second_lead = _choose(
                tokens, masses, size, strengths, strength, state[NOISE_KEY],
                state[POSITION] + step, best, picks,
            )  # fmt: skip
            pick = picks[strength]
            known_mass = 0.0
            for index in range(size):
                known_mass += masses[index]
            share = (masses[pick] if len(strengths) == 1 else lead * known_mass) / (
                known_mass + rest
            )
            run = log_bin(state[RUN] + step + 1, RUN_BINS)
            bucket = (match * RUN_BINS + run) * NUM_SHARES
            bucket += np.searchsorted(SHARE_EDGES, share)
            before = survival
            survival *= hit_rate(hits, bucket)
            text[end] = tokens[pick]
            # For the rest of the chain it has been said.
            restore[step] = own_seen[tokens[pick] & (NUM_SEEN - 1)]
            own_seen[tokens[pick] & (NUM_SEEN - 1)] = clock + 1
            predictions[handle, step, 0] = tokens[pick]
            predictions[handle, step, 1] = bucket
            predictions[handle, step, 2] = -1
            for j in range(len(strengths)):
                predictions[handle, step, 4 + j] = tokens[picks[j]]
            # Also predictions that are not drafted are checked later: no bucket is given up on.
            state[PREDICTED] += 1
            if survival < min_survival:
                break
            out_tokens[n, 0, step] = tokens[pick]
            out_survival[n, 0, step] = survival
            if second < 0:
                continue
            left = known_mass + rest - masses[pick]
            share = masses[second] / left
            if len(strengths) > 1:
                share = second_lead * (known_mass - masses[pick]) / left
            share_bin = np.searchsorted(SHARE_EDGES, share)
            predictions[handle, step, 2] = tokens[second]
            predictions[handle, step, 3] = share_bin
            # Not before the first choice, so that a draft cut anywhere is a chain and its sides.
            chance = min(survival, (before - survival) * second_rate(second_hits, share_bin))
            if chance >= min_survival:
                out_tokens[n, 1, step] = tokens[second]
                out_survival[n, 1, step] = chance
        _keep_best(out_survival[n], caps[n])
        for step in range(state[PREDICTED] - 1, -1, -1):
            own_seen[text[MAX_ORDER + step] & (NUM_SEEN - 1)] = restore[step]


@jit
def _keep_best(survival: NDArray[np.float32], cap: int) -> None:
    """Leave the `cap` likeliest of a chain and the second choices beside it."""
    num = np.count_nonzero(survival)
    length = np.count_nonzero(survival[0])
    while num > cap:
        row, place = 0, length - 1
        for step in range(length):
            if 0 < survival[1, step] <= survival[row, place]:
                row, place = 1, step
        survival[row, place] = 0
        length -= row == 0
        num -= 1
