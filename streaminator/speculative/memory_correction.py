# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled correction of a mixture by what its own text says about each candidate.

A log-linear model over the mixture's candidates (maximum entropy, Rosenfeld 1996; hashed features):
a candidate's log mass gets a learned exponent by the longest match and a weight for each of its
features. The features pair the candidate with the words before it, or say where in the text it stood
last: how far back, after what, whether what stood there once before here was followed by it, and
which of the latest numbers it would repeat.
They do not name the candidate where they can do without: so what is learned ("behind `>>` comes what
stood behind `=`") holds for numbers and names never seen. Weights climb the gradient of the
log-likelihood under the model's distribution (AdaGrad, Duchi 2011), at each step's first drafted token.

The text of a running sequence is its last tokens, one in each row of `history`:

    TEXT    the token
    ROLE    the last word before it, and how many tokens of a number lie between
    LINK    where the same token stood before (-1: nowhere), times 4; and how often by now, up to 3
    LAST    of the token whose id modulo the rows this is: 1 + where it stood last

Used by: `memory`, `memory_kernels`, `memory_learning`, `memory_mixing`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.speculative.memory_noise import exp, log
from streaminator.speculative.memory_rates import LENGTH, NUM_PROMPT, Floats
from streaminator.speculative.memory_records import Ints, Rows, jit, jit_inline
from streaminator.speculative.memory_tables import NUM_CONTEXTS, is_number

HISTORY_SHAPE = (512, 4)
"""Of one running sequence."""
_TEXT, _ROLE, _LINK, _LAST = range(4)
_SIZE = HISTORY_SHAPE[0]
_KEPT = 256  # tokens that stay when a history is full
_DRAFTED = 64  # tokens that may be drafted behind it

MOST = 12
"""Candidates that are corrected; the others are dropped."""
NUM_FEATURES = 10
_BITS = 16
WEIGHTS_SHAPE = (2, (1 << _BITS) + NUM_CONTEXTS + 1)
"""[(weight, squared gradients), feature by its hash, then exponents by the longest match]"""
_EXPONENTS = 1 << _BITS
_RATE, _EXPONENT_RATE = 0.15, 0.03
_HOPELESS = 0.005  # of the best candidate's mass
_UNLIKELY = 1e-6  # what a candidate's share is taken for at least
_STEPS = 8  # earlier places of a token that are looked at
_NUMBERS, _NUMBERS_BACK = 4, 96  # latest numbers that may be repeated, and tokens back to look
_NO, _END = -1, -2  # instead of a token: not repeated, not a number's


class Correction(NamedTuple):
    """What is learned, and the texts of H running sequences."""

    weights: NDArray[np.float32]
    numbers: NDArray[np.bool_]
    """[V] whether a token is part of a number; empty: not known."""
    histories: Rows
    """[H, *HISTORY_SHAPE]"""
    sizes: Ints
    """[H, 2] at the first drafted token: how many candidates, and the longest match."""
    tokens: Ints
    """[H, MOST] these candidates."""
    shares: Floats
    """[H, MOST] what they were given in the end."""
    logs: Floats
    """[H, MOST] of what the mixture gave them."""
    features: Rows
    """[H, MOST, NUM_FEATURES] places of their weights."""

    @classmethod
    def of(cls, num: int, numbers: NDArray[np.bool_]) -> "Correction":
        """Nothing learned, for `num` sequences."""
        weights = np.zeros(WEIGHTS_SHAPE, np.float32)
        return cls(weights, numbers, *_empty(num))

    def widened(self, num: int) -> "Correction":
        """The same with room for `num` more sequences."""
        more = zip(self[2:], _empty(num), strict=True)
        return Correction(*self[:2], *(np.concatenate(pair) for pair in more))


def _empty(num: int) -> tuple[NDArray[Any], ...]:
    return (
        np.zeros((num, *HISTORY_SHAPE), np.int32),
        np.zeros((num, 2), np.int64),
        np.zeros((num, MOST), np.int64),
        np.zeros((num, MOST), np.float64),
        np.zeros((num, MOST), np.float64),
        np.zeros((num, MOST, NUM_FEATURES), np.int32),
    )


_HASH = np.uint64(0x9E3779B97F4A7C15)
_HASH_SHIFT = np.uint64(64 - _BITS)


@jit_inline
def _role_after(history: Rows, place: int, numbers: NDArray[np.bool_]) -> int:
    """Role of the place behind this one."""
    token, role = np.int64(history[place, _TEXT]), np.int64(history[place, _ROLE])
    if is_number(numbers, token):
        return role + 1 if role & 3 < 3 else role
    return token << 2


@jit_inline
def push(history: Rows, length: int, token: int, numbers: NDArray[np.bool_]) -> int:
    """Append a token to a text of `length`; returns what stood in its place of LAST before."""
    at = token & (_SIZE - 1)
    before = np.int64(history[at, _LAST])
    last = before - 1
    history[length, _TEXT] = token
    history[length, _ROLE] = _role_after(history, length - 1, numbers) if length else 0
    if last >= 0 and history[last, _TEXT] == token:
        history[length, _LINK] = last << 2 | min((history[last, _LINK] & 3) + 1, 3)
    else:
        history[length, _LINK] = -4 | 1
    history[at, _LAST] = length + 1
    return before


@jit_inline
def pop(history: Rows, place: int, before: int) -> None:
    """Undo a `push`, the newest first."""
    history[np.int64(history[place, _TEXT]) & (_SIZE - 1), _LAST] = before


@jit
def extend(history: Rows, state: Ints, new: Ints, numbers: NDArray[np.bool_]) -> None:
    """Append tokens to a running sequence's text; what is too long ago goes."""
    for index in range(len(new)):
        if state[LENGTH] >= _SIZE - _DRAFTED:
            first = state[LENGTH] - _KEPT
            for at in range(_SIZE):
                history[at, _LAST] = 0
            state[LENGTH] = _KEPT
            state[NUM_PROMPT] = max(state[NUM_PROMPT] - first, 0)
            for place in range(_KEPT):
                push(history, place, np.int64(history[first + place, _TEXT]), numbers)
        push(history, state[LENGTH], new[index], numbers)
        state[LENGTH] += 1


def begin(
    correction: Correction, handle: int, state: Ints, token_ids: Sequence[int], num_prompt: int
) -> None:
    """Start a sequence's text: prompt, and completion so far."""
    history = correction.histories[handle]
    history[:, _LAST] = 0
    kept = np.array(token_ids[-_KEPT:], np.int64)
    state[LENGTH] = 0
    state[NUM_PROMPT] = max(num_prompt - (len(token_ids) - len(kept)), 0)
    extend(history, state, kept, correction.numbers)


@jit_inline
def _pair(kind: int, one: int, other: int) -> int:
    return (np.uint64(one) * _HASH + np.uint64(other)) * np.uint64(16) + np.uint64(kind)


@jit_inline
def _place_of(key: int) -> int:
    key = (key ^ (key >> np.uint64(29))) * _HASH
    return np.int64(key >> _HASH_SHIFT)


@jit_inline
def _next_of(history: Rows, first: int, end: int, start: int, length: int) -> int:
    """What a number, `text[first:end]`, has behind the digits from `start` on."""
    num = length - start
    if num > end - first:
        return _NO
    for index in range(num):
        if history[first + index, _TEXT] != history[start + index, _TEXT]:
            return _NO
    return np.int64(history[first + num, _TEXT]) if first + num < end else _END


@jit_inline
def _mark_repeated(
    history: Rows,
    length: int,
    tokens: Ints,
    size: int,
    numbers: NDArray[np.bool_],
    marks: Rows,
) -> int:
    """Bits in `marks[:, 0]` for which of the latest numbers each candidate would repeat.

    Returns: how many tokens of a number are there already.
    """
    for k in range(size):
        marks[k, 0] = 0
    if len(numbers) == 0:
        return 0
    start = length
    while start > 0 and is_number(numbers, np.int64(history[start - 1, _TEXT])):
        start -= 1
    end, num = start, 0
    while end > max(0, length - _NUMBERS_BACK) and num < _NUMBERS:
        first = end
        while first > 0 and is_number(numbers, np.int64(history[first - 1, _TEXT])):
            first -= 1
        if first < end:
            following = _next_of(history, first, end, start, length)
            for k in range(size):
                token = tokens[k] if is_number(numbers, tokens[k]) else _END
                marks[k, 0] |= (token == following) << num
            num += 1
        end = min(first, end - 1)
    return length - start


@jit
def find_features(
    history: Rows,
    length: int,
    num_prompt: int,
    tokens: Ints,
    size: int,
    numbers: NDArray[np.bool_],
    features: Rows,
) -> None:
    """Fill [size, NUM_FEATURES] with the weights' places of each candidate that may come next."""
    newest = length - 1
    last = np.int64(history[newest, _TEXT])
    role = _role_after(history, newest, numbers)
    # The words before it, numbers left out.
    first = second = third = -1
    index = newest
    while index >= 0 and third < 0:
        token = np.int64(history[index, _TEXT])
        if not is_number(numbers, token):
            if first < 0:
                first = token
            elif second < 0:
                second = token
            else:
                third = token
        index -= 1
    # What followed where the last token, the last two tokens stood before.
    after_one = after_two = -1
    at = np.int64(history[newest, _LINK]) >> 2
    if at >= 0:
        after_one = np.int64(history[at + 1, _TEXT])
        before = np.int64(history[newest - 1, _TEXT])
        for _ in range(_STEPS):
            if at < 1:
                break
            if history[at - 1, _TEXT] == before:
                after_two = np.int64(history[at + 1, _TEXT])
                break
            at = np.int64(history[at, _LINK]) >> 2
    num_digits = min(_mark_repeated(history, length, tokens, size, numbers, features), 7)
    for k in range(size):
        token = tokens[k]
        place = np.int64(history[token & (_SIZE - 1), _LAST]) - 1
        if place >= 0 and history[place, _TEXT] != token:
            place = -1
        old_role = previous = -1
        distance, num, is_said = 63, 0, 0
        if place >= 0:
            distance = min(length - place, 62)
            old_role = np.int64(history[place, _ROLE])
            previous = np.int64(history[place - 1, _TEXT]) if place > 0 else -1
            is_said = 1 if place >= num_prompt else 0
            num = np.int64(history[place, _LINK]) & 3
        follows = 1 if token == after_one else 0
        if after_two >= 0:
            follows += 2 if token == after_two else 4
        row = features[k]
        repeats = np.int64(row[0])
        row[0] = _place_of(_pair(0, role, token))
        row[1] = _place_of(_pair(1, (role << 20) + second, token))
        row[2] = _place_of(_pair(2, third, token))
        row[3] = _place_of(_pair(3, 0, num * 2 + is_said))
        row[4] = _place_of(_pair(4, role, old_role))
        row[5] = _place_of(_pair(5, last, distance))
        row[6] = _place_of(_pair(6, last, follows))
        row[7] = _place_of(_pair(7, last, previous))
        row[8] = _place_of(_pair(8, role, repeats))
        row[9] = _place_of(_pair(9, num_digits, repeats))


@jit_inline
def keep_likeliest(tokens: Ints, masses: Floats, size: int) -> int:
    """Leave at most MOST candidates; returns how many."""
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
        token, mass = tokens[k], masses[k]
        tokens[num], masses[num] = token, mass
        num += mass >= least
    return min(num, MOST)


@jit_inline
def keep(
    correction: Correction,
    handle: int,
    longest: int,
    tokens: Ints,
    masses: Floats,
    size: int,
    logs: Floats,
    features: Rows,
) -> None:
    """Remember what `learn_correction` needs."""
    correction.sizes[handle, 0], correction.sizes[handle, 1] = size, longest
    total = 0.0
    for k in range(size):
        total += masses[k]
    for k in range(size):
        correction.tokens[handle, k] = tokens[k]
        correction.shares[handle, k] = masses[k] / total
        correction.logs[handle, k] = logs[k]
        for j in range(NUM_FEATURES):
            correction.features[handle, k, j] = features[k, j]


@jit
def correct(
    weights: NDArray[np.float32],
    longest: int,
    masses: Floats,
    size: int,
    features: Rows,
    logs: Floats,
    scores: Floats,
) -> None:
    """Multiply candidates' masses by what the features say; their sum stays.

    `logs` [size] become those of their shares before, `scores` [size] of what they are in the end,
    but for a constant.
    """
    total = 0.0
    for k in range(size):
        total += masses[k]
    exponent = 1.0 + weights[0, _EXPONENTS + longest]
    for k in range(size):
        logs[k] = log(masses[k] / total + _UNLIKELY)
    top = -np.inf
    for k in range(size):
        score = exponent * logs[k]
        for j in range(NUM_FEATURES):
            score += weights[0, features[k, j]]
        scores[k] = score
        top = max(top, score)
    new_total = 0.0
    for k in range(size):
        masses[k] = exp(scores[k] - top)
    for k in range(size):
        new_total += masses[k]
    for k in range(size):
        masses[k] *= total / new_total


@jit
def learn_correction(
    correction: Correction,
    handle: int,
    token: int,
    top_ids: Ints,
    top_probs: NDArray[np.float32],
    target: Floats,
) -> None:
    """One step up the gradient: corrected shares against the distribution that `token` was drawn from.

    `target` [MOST] is scratch.
    """
    size, longest = correction.sizes[handle]
    if size < 2:
        return
    weights, tokens, shares = (
        correction.weights,
        correction.tokens[handle],
        correction.shares[handle],
    )
    logs, features = correction.logs[handle], correction.features[handle]
    total = 0.0
    for k in range(size):
        target[k] = 0.0
        if len(top_ids) == 0:
            target[k] = 1.0 if tokens[k] == token else 0.0
        for j in range(len(top_ids)):
            if top_ids[j] == tokens[k]:
                target[k] = top_probs[j]
                break
        total += target[k]
    if total < 0.01:
        return
    exponent = 0.0
    for k in range(size):
        gradient = target[k] - shares[k] * total
        exponent += gradient * logs[k]
        if abs(gradient) < 1e-3:
            continue
        for j in range(NUM_FEATURES):
            _climb(weights, features[k, j], gradient, _RATE)
    _climb(weights, _EXPONENTS + longest, exponent, _EXPONENT_RATE)


@jit_inline
def _climb(weights: NDArray[np.float32], place: int, gradient: float, rate: float) -> None:
    weights[1, place] += gradient * gradient
    weights[0, place] += rate * gradient / math.sqrt(1 + weights[1, place])
