# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""What the memory learns about itself: mixing parts, hit rates, the noise's strength.

Mixing parts are fitted online by expectation-maximisation (interpolation weights as in Jelinek and
Mercer 1980, tied by bucket). Hit rates are counted per bucket of what was known when a token was
drafted, backed off to coarser buckets: what a mixture says of itself is overconfident.

Used by: `memory`, all its loops.
"""

import numpy as np
from numpy.typing import NDArray

from streaminator.compiled import jit, jit_inline
from streaminator.speculative.memory_records import log_bin, nth
from streaminator.speculative.memory_tables import (
    NUM_CONTEXTS,
    SCALE,
    Ints,
    Rows,
    share_of,
    total_of,
)

NOISE_STRENGTHS = np.array([0.0, 0.3, 0.6, 0.8, 1.0])
FIRST_STRENGTH = 2
"""Index of the strength to start from."""

_COUNT_BINS, _DISTINCT_BINS = 6, 4
MIXING_SHAPE = (2, NUM_CONTEXTS, _COUNT_BINS, _DISTINCT_BINS, 2)
"""[tier, context, count, distinct continuations, (reached, taken)]"""

SHARE_EDGES = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98])
UNTRIED = -2
"""Instead of what a strength of the noise would have predicted."""

NUM_SHARES = len(SHARE_EDGES) + 1
RUN_BINS, MATCH_BINS = 5, 4
NUM_MATCHES = (NUM_CONTEXTS + 1) * MATCH_BINS
NUM_BUCKETS = NUM_MATCHES * RUN_BINS * NUM_SHARES
HITS_SHAPE = (NUM_BUCKETS + RUN_BINS * NUM_SHARES + NUM_SHARES, 2)
"""[bucket, (tried, hit)]: finest buckets, then by run and share, then by share."""

SECONDS_SHAPE = (NUM_SHARES, 2)
"""[the second choice's share of what the first leaves, (first was wrong, second was right)]"""

_MEMORY = 4096.0  # observations after which a learned rate halves its past
_HITS_MEMORY = 256.0  # a hit rate: it climbs from generation to generation

NUM_COLUMNS = 8
# Columns of a running sequence's integers; the last: its text's tokens, those of the prompt.
TABLE, KNOWN, POSITION, NOISE_KEY, RUN, PREDICTED, LENGTH, NUM_PROMPT = range(NUM_COLUMNS)

Floats = NDArray[np.float64]


@jit_inline
def share_bin(share: float) -> int:
    """Its bin: how many of the edges are below it."""
    index = 0
    for edge in range(NUM_SHARES - 1):
        index += SHARE_EDGES[edge] < share
    return index


@jit_inline
def _decay(pair: Floats, memory: float) -> None:
    if pair[0] > memory:
        pair[0] *= 0.5
        pair[1] *= 0.5


@jit_inline
def kind_of(total: int, distinct: int) -> tuple[int, int]:
    """Bins of contexts that are treated alike."""
    return log_bin(total // SCALE, _COUNT_BINS), log_bin(distinct, _DISTINCT_BINS)


@jit_inline
def part_of(mixing: Floats, tier: int, place: int, kind: tuple[int, int]) -> float:
    """Part of the mass that such a context takes."""
    count, distinct = nth(kind[0]), nth(kind[1])
    reached = mixing[nth(tier), nth(place), count, distinct, 0]
    taken = mixing[nth(tier), nth(place), count, distinct, 1]
    return (taken + 1.0) / (reached + 2.0)


@jit_inline
def hit_rate(hits: Floats, bucket: int) -> float:
    """Learned rate of a bucket, shrunk towards coarser ones and at last the share itself."""
    share = bucket % NUM_SHARES
    coarse = NUM_BUCKETS + bucket % (RUN_BINS * NUM_SHARES)
    coarsest = NUM_BUCKETS + RUN_BINS * NUM_SHARES + share
    rate = 0.05 + 0.8 * (share / NUM_SHARES)
    rate = (hits[coarsest, 1] + 8 * rate) / (hits[coarsest, 0] + 8)
    rate = (hits[coarse, 1] + 8 * rate) / (hits[coarse, 0] + 8)
    return (hits[bucket, 1] + 8 * rate) / (hits[bucket, 0] + 8)


@jit
def learn_mixing(
    rows: Rows,
    tables: tuple[Ints, Ints],
    num_tiers: int,
    found: Ints,
    token: int,
    mixing: Floats,
    places: Ints,
    estimates: Floats,
) -> None:
    """One step of expectation-maximisation of the parts that the contexts take.

    `places` [m, 4] and `estimates` [3, m + 1] are scratch for all m sources.
    """
    shares, parts, below = estimates
    size = 0
    for tier in range(num_tiers):
        for place in range(NUM_CONTEXTS):
            row = found[tier, place]
            if row < 0:
                continue
            total, distinct = total_of(rows, row)
            kind = kind_of(total, distinct)
            places[size, 0], places[size, 1] = tier, place
            places[size, 2], places[size, 3] = kind
            shares[size] = share_of(rows, tables[tier], row, token)
            parts[size] = part_of(mixing, tier, place, kind)
            size += 1
    # Probability of the token from each source down; what none of them knew has a little.
    below[size] = 1e-5
    for index in range(size - 1, -1, -1):
        below[index] = parts[index] * shares[index] + (1 - parts[index]) * below[index + 1]
    reach = 1.0
    for index in range(size):
        taken = parts[index] * shares[index] / below[index]
        pair = mixing[places[index, 0], places[index, 1], places[index, 2], places[index, 3]]
        pair[0] += reach
        pair[1] += reach * taken
        _decay(pair, _MEMORY)
        reach *= 1 - taken
        if reach < 1e-3:
            break


@jit_inline
def second_rate(second_hits: Floats, share: int) -> float:
    """Learned chance of a second choice, given that the first is wrong."""
    tried, hit = second_hits[share]
    return (hit + 8 * 0.5 * share / NUM_SHARES) / (tried + 8)


@jit
def learn_hits(
    state: Ints,
    predictions: Ints,
    new: Ints,
    hits: Floats,
    second_hits: Floats,
    noise_hits: Floats,
) -> None:
    """Compare what was predicted with what was drawn, up to the first that differs."""
    for step in range(min(state[PREDICTED], len(new))):
        bucket = predictions[step, 1]
        hit = predictions[step, 0] == new[step]
        coarse = NUM_BUCKETS + bucket % (RUN_BINS * NUM_SHARES)
        coarsest = NUM_BUCKETS + RUN_BINS * NUM_SHARES + bucket % NUM_SHARES
        for index in (bucket, coarse, coarsest):
            hits[index, 0] += 1.0
            hits[index, 1] += 1.0 if hit else 0.0
            _decay(hits[index], _HITS_MEMORY)
        match = bucket // (RUN_BINS * NUM_SHARES)
        tried = predictions[step, 4] != UNTRIED
        for j in range(noise_hits.shape[1] if tried else 0):
            noise_hits[match, j] *= 1 - 1 / _MEMORY
            noise_hits[match, j] += 1.0 if predictions[step, 4 + j] == new[step] else 0.0
        if not hit:
            if predictions[step, 2] >= 0:
                pair = second_hits[predictions[step, 3]]
                pair[0] += 1.0
                pair[1] += 1.0 if predictions[step, 2] == new[step] else 0.0
                _decay(pair, _HITS_MEMORY)
            state[RUN] = 0
            break
        state[RUN] += 1
    state[PREDICTED] = 0
