# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled texts of running sequences, and what they say about candidates (`memory_correction`).

The text of a running sequence is its last tokens, one in each row of `history`:

    TEXT    the token
    ROLE    the last word before it, and how many tokens of a number lie between
    LINK    where the same token stood before (-1: nowhere), times 4; and how often by now, up to 3
    LAST    of the token whose id modulo the rows this is: 1 + where it stood last

Used by: `memory`, `memory_correction`, `memory_kernels`, `memory_learning`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streaminator.speculative.memory_rates import LENGTH, NUM_PROMPT, Floats
from streaminator.speculative.memory_records import Ints, Rows, jit, jit_inline
from streaminator.speculative.memory_tables import is_number

MAX_DRAFT = 64
"""No draft is longer."""
HISTORY_SHAPE = (512, 4)
"""Of one running sequence."""
_TEXT, _ROLE, _LINK, _LAST = range(4)
_SIZE = HISTORY_SHAPE[0]
_KEPT = 256  # tokens that stay when a history is full

NUM_FEATURES = 10
"""Of each candidate."""
HASH_BITS = 16
_STEPS = 8  # earlier places of a token that are looked at
_NUMBERS, _NUMBERS_BACK = 4, 96  # latest numbers that may be repeated, and tokens back to look
_NO, _END = -1, -2  # instead of a token: not repeated, not a number's

_HASH = np.uint64(0x9E3779B97F4A7C15)
_HASH_SHIFT = np.uint64(64 - HASH_BITS)


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
        if state[LENGTH] >= _SIZE - MAX_DRAFT:
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
    history: Rows,
    state: Ints,
    token_ids: Sequence[int],
    num_prompt: int,
    numbers: NDArray[np.bool_],
) -> None:
    """Start a sequence's text: prompt, and completion so far."""
    history[:, _LAST] = 0
    kept = np.array(token_ids[-_KEPT:], np.int64)
    state[LENGTH] = 0
    state[NUM_PROMPT] = max(num_prompt - (len(token_ids) - len(kept)), 0)
    extend(history, state, kept, numbers)


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
    longest: int,
    tokens: Ints,
    masses: Floats,
    own_masses: Floats,
    size: int,
    numbers: NDArray[np.bool_],
    features: Rows,
) -> None:
    """Fill [size, NUM_FEATURES] with the weights' places of each candidate that may come next.

    `longest` is the place of the own longest match; `own_masses` is what `masses` were before the
    shared tier added to them.
    """
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
    behind = (role << 20) + second
    num_digits = min(_mark_repeated(history, length, tokens, size, numbers, features), 7)
    for k in range(size):
        token = tokens[k]
        place = np.int64(history[token & (_SIZE - 1), _LAST]) - 1
        if place >= 0 and history[place, _TEXT] != token:
            place = -1
        old_role = -1
        distance, num, is_said = 63, 0, 0
        if place >= 0:
            distance = min(length - place, 62)
            old_role = np.int64(history[place, _ROLE])
            is_said = 1 if place >= num_prompt else 0
            num = np.int64(history[place, _LINK]) & 3
        follows = 1 if token == after_one else 0
        if after_two >= 0:
            follows += 2 if token == after_two else 4
        times = num * 2 + is_said
        own_share = own_masses[k] / masses[k]
        whose = (own_share > 0) + (own_share >= 0.5) + (own_share >= 0.95)
        row = features[k]
        repeats = np.int64(row[0])
        row[0] = _place_of(_pair(0, role, token))
        row[1] = _place_of(_pair(1, behind, token))
        row[2] = _place_of(_pair(2, third, token))
        row[3] = _place_of(_pair(3, longest, times * 4 + whose))
        row[4] = _place_of(_pair(4, role, old_role))
        row[5] = _place_of(_pair(5, last, distance))
        row[6] = _place_of(_pair(6, last, follows))
        row[7] = _place_of(_pair(7, behind, times))
        row[8] = _place_of(_pair(8, behind, repeats))
        row[9] = _place_of(_pair(9, num_digits, repeats))
