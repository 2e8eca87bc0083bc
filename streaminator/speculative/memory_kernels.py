# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled loops of the memory: mix the orders, draft chains, learn from what was verified.

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

Used by: `memory`.
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
    learn_hits,
    learn_mixing,
    learn_recency,
    log_bin,
    part_of,
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
    count_token,
    find,
    find_all,
    hash_contexts,
    jit,
    total_of,
)

_MAX_CANDIDATES = 64
_ENOUGH = 0.01  # of the mass may stay unexplained: what is left cannot change the draft
_HOPELESS = 0.01  # of the best candidate's mass: the noise would have to be rare
_LEAST = 0.001  # mass that makes a candidate
_LONG = 8  # place of the shortest own match that spares the shared table
_EAGER, _SELDOM = 8192, 4  # parts are fitted to the first tokens, then to every fourth


@jit
def _mix_tier(
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
                    if size == _MAX_CANDIDATES or mass < _LEAST:
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
        if rest < _ENOUGH:
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
) -> float:
    """For each strength of the noise the index of the best candidate.

    Returns: with noise how far the best one at `strength` leads the next, from one half to one;
    without one.
    """
    top = 0
    for index in range(1, size):
        if masses[index] > masses[top]:
            top = index
    if len(strengths) == 1:
        picks[0] = top
        return 1.0
    best[:] = -np.inf
    second = -np.inf
    for index in range(size):
        if masses[index] < _HOPELESS * masses[top]:
            continue
        score = math.log(masses[index])
        noise = gumbel(key, position, tokens[index])
        for j in range(len(strengths)):
            here = score + strengths[j] * noise
            if here > best[j]:
                if j == strength:
                    second = best[j]
                best[j] = here
                picks[j] = index
            elif j == strength and here > second:
                second = here
    return 1 / (1 + math.exp(second - best[strength]))


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
    strengths: Floats,
    noise_hits: Floats,
    use_shared: bool,
    predictions: Ints,
    out_tokens: Ints,
    out_survival: NDArray[np.float32],
) -> None:
    """Draft a chain for each handle; what was predicted is kept for `learn` in `predictions`.

    Args:
        rows, tables: the arena and the tables' records; table 0 is the shared one.
        running, tails: state of running sequences.
        handles, caps: [n] whom to draft for, at most how many tokens.
        min_survival: drafting stops at the first token less likely to be accepted.
        mixing, recency, hits, strengths, noise_hits: what was learned about each.
        seen: [tables, NUM_SEEN] where tokens stood last.
        use_shared: whether the shared table is mixed in.
        predictions: [H, K, 2 + S] token, bucket and the token by each strength.
        out_tokens, out_survival: [n, K] zeroed; survival 0 is behind the end of a draft.
    """
    keys = np.empty(NUM_CONTEXTS, np.uint64)
    # Without noise a lead above what is left decides; noise may turn a larger lead around.
    factor = recency[:, 2].max() if len(strengths) == 1 else 20.0
    tokens = np.empty(_MAX_CANDIDATES, np.int64)
    masses = np.empty(_MAX_CANDIDATES, np.float64)
    ages = np.empty(_MAX_CANDIDATES, np.int64)
    picks = np.zeros(len(strengths), np.int64)
    best = np.empty(len(strengths), np.float64)
    text = np.empty(MAX_ORDER + out_tokens.shape[1], np.int64)
    restore = np.empty(out_tokens.shape[1], np.int32)
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
            size, rest, matters, longest, count = _mix_tier(
                rows, own, 0, keys, start, mixing, own_seen, clock, recency, tokens, masses, ages,
                0, 1.0, factor,
            )  # fmt: skip
            start = max(longest - 1, 0) if longest < GAPPED else 0
            match = 0
            if longest < NUM_CONTEXTS:
                match = (NUM_CONTEXTS - longest) * MATCH_BINS + log_bin(count, MATCH_BINS)
            if use_shared and matters:
                size, rest, _, longest, _ = _mix_tier(
                    rows, tables[0], 1, keys, FIRST_SHARED, mixing, own_seen, clock, recency,
                    tokens, masses, ages, size, rest, factor,
                )  # fmt: skip
                if match == 0:
                    match = min(NUM_CONTEXTS - longest, MATCH_BINS - 1)
            if size == 0:
                break
            strength = np.argmax(noise_hits[match])
            lead = _choose(
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
            survival *= hit_rate(hits, bucket)
            text[end] = tokens[pick]
            # For the rest of the chain it has been said.
            restore[step] = own_seen[tokens[pick] & (NUM_SEEN - 1)]
            own_seen[tokens[pick] & (NUM_SEEN - 1)] = clock + 1
            predictions[handle, step, 0] = tokens[pick]
            predictions[handle, step, 1] = bucket
            for j in range(len(strengths)):
                predictions[handle, step, 2 + j] = tokens[picks[j]]
            # Also predictions that are not drafted are checked later: no bucket is given up on.
            state[PREDICTED] += 1
            if survival < min_survival:
                break
            out_tokens[n, step] = tokens[pick]
            out_survival[n, step] = survival
        for step in range(state[PREDICTED] - 1, -1, -1):
            own_seen[text[MAX_ORDER + step] & (NUM_SEEN - 1)] = restore[step]


@jit
def learn(
    rows: Rows,
    tables: Ints,
    running: Ints,
    tails: Ints,
    handles: Ints,
    new: Ints,
    lengths: Ints,
    top_ids: Ints,
    top_probs: NDArray[np.float32],
    mixing: Floats,
    seen: Rows,
    recency: Floats,
    num_learned: Ints,
    hits: Floats,
    noise_hits: Floats,
    predictions: Ints,
    own_tier: bool,
    use_shared: bool,
    learns_rates: bool,
) -> None:
    """Append `new` (all handles' tokens, `lengths` of each) and count them.

    `top_ids`, `top_probs` [m, M] hold each new token's distribution; M = 0: tokens only.
    """
    longest = 0
    for n in range(len(handles)):
        longest = max(longest, lengths[n])
    text = np.empty(MAX_ORDER + longest, np.int64)
    keys = np.empty(NUM_CONTEXTS, np.uint64)
    found = np.empty((2, NUM_CONTEXTS), np.int64)
    num_tiers = 2 if use_shared else 1
    tokens = np.empty(_MAX_CANDIDATES, np.int64)
    masses = np.empty(_MAX_CANDIDATES, np.float64)
    ages = np.empty(_MAX_CANDIDATES, np.int64)
    first = 0
    for n in range(len(handles)):
        handle, num = handles[n], lengths[n]
        state = running[handle]
        own, shared, own_seen = tables[state[TABLE]], tables[0], seen[state[TABLE]]
        text[:MAX_ORDER] = tails[handle]
        text[MAX_ORDER : MAX_ORDER + num] = new[first : first + num]
        if learns_rates:
            learn_hits(state, predictions[handle], new[first : first + num], hits, noise_hits)
        for index in range(num):
            end = MAX_ORDER + index
            known = min(state[KNOWN] + index, MAX_ORDER)
            ids, probs = top_ids[first + index], top_probs[first + index]
            hash_contexts(text, end, known, keys)
            num_learned[0] += learns_rates
            if learns_rates and (num_learned[0] < _EAGER or num_learned[0] % _SELDOM == 0):
                find_all(rows, own, keys, 0, found[0])
                if use_shared:
                    find_all(rows, shared, keys, FIRST_SHARED, found[1])
                learn_mixing(rows, (own, shared), num_tiers, found, text[end], mixing)
                # Where distributions are stored the factors lost (DECISIONS 0018).
                if noise_hits.shape[1] == 1:
                    size, rest, _, _, _ = _mix_tier(
                        rows, own, 0, keys, 0, mixing, own_seen, own[CLOCK], recency, tokens,
                        masses, ages, 0, 1.0, np.inf,
                    )  # fmt: skip
                    if use_shared and rest >= _ENOUGH:
                        size, rest, _, _, _ = _mix_tier(
                            rows, shared, 1, keys, FIRST_SHARED, mixing, own_seen, own[CLOCK], recency,
                            tokens, masses, ages, size, rest, np.inf,
                        )  # fmt: skip
                    learn_recency(tokens, masses, ages, size, rest, text[end], recency)
            # A distribution says something new each time: twice as many contexts are told.
            excluded_after = 1 if len(ids) == 0 else 2
            knew = NUM_CONTEXTS
            if own_tier and own[NUM_SLOTS] > 0:
                knew = count_token(rows, own, keys, 0, excluded_after, text[end], ids, probs)
                own_seen[text[end] & (NUM_SEEN - 1)] = own[CLOCK]
            # What a long match of its own prompt foretells, the others need not be told again.
            if use_shared and (knew > _LONG or len(ids) > 0):
                count_token(rows, shared, keys, FIRST_SHARED, 2, text[end], ids, probs)
        tails[handle] = text[num : num + MAX_ORDER]
        state[KNOWN] = min(state[KNOWN] + num, MAX_ORDER)
        state[POSITION] += num
        first += num
