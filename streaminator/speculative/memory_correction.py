# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled correction of a mixture by what its own text says about each candidate.

A log-linear model over the mixture's candidates (maximum entropy, Rosenfeld 1996; hashed features):
a candidate's log mass gets a learned exponent by the longest match and a weight for each of its
features. The features pair the candidate with the words before it, or say where in the text it stood
last: how far back, after what, how often, whether what stood there once before here was followed by
it, and which of the latest numbers it would repeat; one says how much of its mass its own prompt gave.
They do not name the candidate where they can do without: so what is learned ("behind `>>` comes what
stood behind `=`") holds for numbers and names never seen. Weights climb the gradient of the
log-likelihood under the model's distribution (AdaGrad, Duchi 2011), at each drafted token that the
tokens drawn lead up to.

Used by: `memory`, `memory_kernels`, `memory_learning`.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.compiled import jit, jit_inline
from streaminator.speculative.memory_features import (
    HASH_BITS,
    HISTORY_SHAPE,
    MAX_DRAFT,
    NUM_FEATURES,
)
from streaminator.speculative.memory_math import LANES, exp, log, most_of_lanes, sum_of_lanes
from streaminator.speculative.memory_rates import Floats
from streaminator.speculative.memory_records import Ints, Rows, nth
from streaminator.speculative.memory_tables import NUM_CONTEXTS

MOST = 12
"""Candidates that are corrected; the others are dropped."""
WEIGHTS_SHAPE = (2, (1 << HASH_BITS) + NUM_CONTEXTS + 1)
"""[(weight, squared gradients), feature by its hash, then exponents by the longest match]"""
_EXPONENTS = 1 << HASH_BITS
_RATE, _EXPONENT_RATE = 0.2, 0.03
_HOPELESS = 0.01  # of the best candidate's mass
_UNLIKELY = 1e-6  # what a candidate's share is taken for at least


class Correction(NamedTuple):
    """What is learned, and the texts of H running sequences."""

    weights: NDArray[np.float32]
    numbers: NDArray[np.bool_]
    """[V] whether a token is part of a number; empty: not known."""
    histories: Rows
    """[H, *HISTORY_SHAPE]"""
    # Places of a chain first: drafting goes a token of each sequence at a time.
    sizes: Ints
    """[MAX_DRAFT, H, 2] at each drafted token: how many candidates, and the longest match."""
    tokens: Rows
    """[MAX_DRAFT, H, LANES] these candidates."""
    shares: NDArray[np.float32]
    """[MAX_DRAFT, H, LANES] what they were given in the end."""
    logs: NDArray[np.float32]
    """[MAX_DRAFT, H, LANES] of what the mixture gave them."""
    features: NDArray[np.uint16]
    """[MAX_DRAFT, H, NUM_FEATURES * LANES] places of their weights."""

    @classmethod
    def of(cls, num: int, numbers: NDArray[np.bool_]) -> "Correction":
        """Nothing learned, for `num` sequences."""
        weights = np.zeros(WEIGHTS_SHAPE, np.float32)
        return cls(weights, numbers, *_empty(num))

    def widened(self, num: int) -> "Correction":
        """The same with room for `num` more sequences."""
        histories, *kept = _empty(num)
        more = zip(self[3:], kept, strict=True)
        return Correction(
            *self[:2],
            np.concatenate([self.histories, histories]),
            *(np.concatenate(pair, 1) for pair in more),
        )


def _empty(num: int) -> tuple[NDArray[Any], ...]:
    return (
        np.zeros((num, *HISTORY_SHAPE), np.int32),
        np.zeros((MAX_DRAFT, num, 2), np.int64),
        np.zeros((MAX_DRAFT, num, LANES), np.int32),
        np.zeros((MAX_DRAFT, num, LANES), np.float32),
        np.zeros((MAX_DRAFT, num, LANES), np.float32),
        np.zeros((MAX_DRAFT, num, NUM_FEATURES * LANES), np.uint16),
    )


@jit_inline
def keep_likeliest(tokens: Ints, masses: Floats, own_masses: Floats, size: int) -> int:
    """Leave at most MOST candidates, and their masses, 0 behind them; returns how many."""
    top = 0.0
    for k in range(size):
        top = max(top, masses[k])
    least = _HOPELESS * top
    num = MOST + 1
    # Counting vectorises, and nothing here branches on a mass.
    while num > MOST and least < top:
        num = 0
        for k in range(size):
            num += masses[k] >= least
        least = min(1.5 * least, top) if num > MOST else least
    num = 0
    for k in range(size):
        token, mass, own_mass = tokens[k], masses[k], own_masses[k]
        tokens[nth(num)], masses[nth(num)], own_masses[nth(num)] = token, mass, own_mass
        num += mass >= least
    num = min(num, MOST)
    for k in range(num, LANES):
        masses[k] = 0.0
    return num


@jit_inline
def keep(
    correction: Correction,
    handle: int,
    step: int,
    longest: int,
    tokens: Ints,
    masses: Floats,
    total: float,
    size: int,
) -> None:
    """Remember what else `learn_corrections` needs of a drafted token."""
    kept, shares = correction.tokens[step, handle], correction.shares[step, handle]
    correction.sizes[step, handle, 0], correction.sizes[step, handle, 1] = size, longest
    for k in range(len(kept)):
        kept[k] = tokens[k]
    for k in range(len(shares)):
        shares[k] = masses[k] / total


@jit_inline
def correct(
    weights: NDArray[np.float32],
    longest: int,
    masses: Floats,
    total: float,
    size: int,
    features: NDArray[np.uint16],
    logs: NDArray[np.float32],
    scores: Floats,
) -> None:
    """Multiply the masses of LANES candidates by what the features say; `total`, their sum, stays.

    `logs` become those of their shares before, `scores` of what they are in the end, but for a
    constant; -inf from `size` on.
    """
    exponent = 1.0 + weights[0, _EXPONENTS + longest]
    for k in range(len(scores)):
        scores[k] = log(masses[k] / total + _UNLIKELY)
    for k in range(len(scores)):
        logs[k] = scores[k]
    # Places that are looked up do not vectorise: only for candidates that are there.
    for k in range(size):
        low = (_at(weights, features, k, 0) + _at(weights, features, k, 1)) + (
            _at(weights, features, k, 2) + _at(weights, features, k, 3)
        )
        high = (_at(weights, features, k, 4) + _at(weights, features, k, 5)) + (
            _at(weights, features, k, 6) + _at(weights, features, k, 7)
        )
        more = _at(weights, features, k, 8) + _at(weights, features, k, 9)
        scores[k] = exponent * scores[k] + (low + high + more)
    for k in range(len(scores)):
        scores[k] = scores[k] if k < size else -np.inf
    top = most_of_lanes(scores)
    for k in range(len(scores)):
        masses[k] = exp(scores[k] - top) if k < size else 0.0
    scale = total / sum_of_lanes(masses)
    for k in range(len(scores)):
        masses[k] *= scale


@jit_inline
def _at(weights: NDArray[np.float32], features: NDArray[np.uint16], k: int, j: int) -> float:
    return weights[0, nth(features[nth(j * LANES + k)])]


@jit
def learn_corrections(
    correction: Correction,
    handle: int,
    predictions: Ints,
    num_predicted: int,
    drawn: Ints,
    top_ids: Ints,
    top_probs: NDArray[np.float32],
    target: NDArray[np.float32],
) -> None:
    """Climb at each drafted token up to the first that was not drawn, and there.

    Args:
        correction, handle: what is learned, and of which sequence.
        predictions: [K, 1 or more] the drafted tokens, `num_predicted` of them.
        drawn: [n] what was drawn instead.
        top_ids, top_probs: [n, M] the distributions it was drawn from; M = 0: not known.
        target: [LANES] scratch.
    """
    for step in range(min(num_predicted, len(drawn))):
        _learn(correction, handle, step, drawn[step], top_ids[step], top_probs[step], target)
        if predictions[step, 0] != drawn[step]:
            return


@jit_inline
def _learn(
    correction: Correction,
    handle: int,
    step: int,
    token: int,
    top_ids: Ints,
    top_probs: NDArray[np.float32],
    target: NDArray[np.float32],
) -> None:
    """One step up the gradient: corrected shares against the distribution that `token` was drawn from."""
    size, longest = correction.sizes[step, handle]
    if size < 2:
        return
    weights = correction.weights
    tokens, shares = correction.tokens[step, handle], correction.shares[step, handle]
    logs, features = correction.logs[step, handle], correction.features[step, handle]
    for k in range(LANES):
        target[k] = 0.0
    if len(top_ids) == 0:
        for k in range(LANES):
            target[k] = 1.0 if tokens[k] == token else 0.0
    for j in range(len(top_ids)):
        top_id, prob = np.int32(top_ids[j]), top_probs[j]
        for k in range(len(target)):
            target[k] = prob if tokens[k] == top_id else target[k]
    total = 0.0
    for k in range(size):
        total += target[k]
    if total < 0.01:
        return
    exponent = 0.0
    for k in range(size):
        gradient = target[k] - shares[k] * total
        exponent += gradient * logs[k]
        if abs(gradient) < 1e-2:
            continue
        for j in range(NUM_FEATURES):
            _climb(weights, features[j * LANES + k], gradient, _RATE)
    _climb(weights, _EXPONENTS + longest, exponent, _EXPONENT_RATE)


@jit_inline
def _climb(weights: NDArray[np.float32], place: int, gradient: float, rate: float) -> None:
    weights[1, place] += gradient * gradient
    weights[0, place] += rate * gradient / math.sqrt(1 + weights[1, place])
