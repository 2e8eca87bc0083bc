# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled choice among candidates, with the sampler's noise (`memory_kernels` says why).

Used by: `memory_kernels`.
"""

import math

import numpy as np

from streaminator.compiled import jit_inline
from streaminator.speculative.memory_math import exp, log, most_of_lanes
from streaminator.speculative.memory_rates import Floats
from streaminator.speculative.memory_records import Ints
from streaminator.speculative.memory_tables import mix64

_HOPELESS = math.log(0.01)  # below the best candidate's mass: the noise would have to be rare

_NOISE_ROW, _NOISE_TOKEN = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)
_SHIFT12 = np.uint64(12)
_TWO = np.uint64(2)


@jit_inline
def _row_of(noise_key: int, position: int) -> int:
    return mix64(np.uint64(noise_key) + np.uint64(position) * _NOISE_ROW)


@jit_inline
def _log_exponential(row: int, token: int) -> float:
    """Logarithm of the exponential variate whose negative is the sampler's noise."""
    bits = mix64(row + (np.uint64(token) + _TWO) * _NOISE_TOKEN)
    uniform = (np.float64(bits >> _SHIFT12) + 0.5) * 2.0**-52
    return log(-log(uniform))


@jit_inline
def gumbel(noise_key: int, position: int, token: int) -> float:
    """The sampler's noise (`streaminator.engine.sampler.gumbel`), bit for bit its uniform."""
    return -_log_exponential(_row_of(noise_key, position), token)


@jit_inline
def choose(
    tokens: Ints,
    masses: Floats,
    size: int,
    strengths: Floats,
    strength: int,
    tries_all: bool,
    key: int,
    position: int,
    scores: Floats,
    picks: Ints,
) -> tuple[float, int, float]:
    """For each strength of the noise the index of the best candidate.

    With noise `scores[0]` [LANES] are logarithms of the masses, but for a constant, -inf from
    `size` on; it and `scores[1]` are scratch.

    Returns: with noise how far the best one at `strength` leads the next, from one half to one,
    without one; the index of the next, -1: there is none; the same lead of it over the third.
    """
    if len(strengths) == 1:
        top, next_index = 0, -1
        for index in range(1, size):
            if masses[index] > masses[top]:
                top, next_index = index, top
            elif next_index < 0 or masses[index] > masses[next_index]:
                next_index = index
        picks[0] = top
        return 1.0, next_index, 1.0
    near, noise = scores[0], scores[1]
    hopeless = most_of_lanes(near) + _HOPELESS
    num, pick = 0, 0
    for index in range(len(noise)):
        num += near[index] >= hopeless
    if num == 1:
        for index in range(len(noise)):
            pick = index if near[index] >= hopeless else pick
        for j in range(len(strengths)):
            picks[j] = pick
        return 1.0, -1, 0.0
    row = _row_of(key, position)
    for index in range(len(noise)):
        noise[index] = _log_exponential(row, tokens[index])
    for index in range(len(noise)):
        near[index] = near[index] if near[index] >= hopeless else -np.inf
    first = second = third = -np.inf
    pick = next_index = -1
    for index in range(size):
        here = near[index] - strengths[strength] * noise[index]
        is_first, is_second = here > first, here > second
        third = max(third, min(second, here))
        next_index = pick if is_first else (index if is_second else next_index)
        second = max(second, min(first, here))
        pick = index if is_first else pick
        first = max(first, here)
    if tries_all:
        for j in range(len(strengths)):
            best = -np.inf
            for index in range(size):
                here = near[index] - strengths[j] * noise[index]
                is_best = here > best
                picks[j] = index if is_best else picks[j]
                best = max(best, here)
    picks[strength] = pick
    lead = 1 / (1 + exp(second - first))
    if next_index < 0:
        return lead, -1, 0.0
    return lead, next_index, 1 / (1 + exp(third - second))
