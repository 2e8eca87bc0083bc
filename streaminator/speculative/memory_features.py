# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled texts of running sequences, and what they say about candidates (`memory_correction`).

The text of a running sequence is its last tokens, one in each row of `history`:

    TEXT    the token
    ROLE    the last word before it, and how many tokens of a number lie between
    LINK    where the same token stood before (-1: nowhere), times 4; and how often by now, up to 3
    BEFORE  1 + where the last word before it stood, and in the high bits the last part of a number

Behind them are, four to a row, 1 + where the token stood last whose id modulo _SIZE is 0, 1, 2 ...

Used by: `memory`, `memory_correction`, `memory_kernels`, `memory_learning`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streaminator.compiled import jit, jit_inline
from streaminator.speculative.memory_math import LANES
from streaminator.speculative.memory_rates import LENGTH, NUM_PROMPT, Floats
from streaminator.speculative.memory_records import Ints, Rows, nth
from streaminator.speculative.memory_tables import is_number

MAX_DRAFT = 64
"""No draft is longer."""
_SIZE = 512
HISTORY_SHAPE = (_SIZE + _SIZE // 4, 4)
"""Of one running sequence."""
_TEXT, _ROLE, _LINK, _BEFORE = range(4)
_HIGH, _LOW_BITS = 16, 0xFFFF
_KEPT = 256  # tokens that stay when a history is full

NUM_FEATURES = 10
"""Of each candidate."""
HASH_BITS = 16
_STEPS = 8  # earlier places of a token that are looked at
_NUMBERS, _NUMBERS_BACK = 4, 96  # latest numbers that may be repeated, and tokens back to look
_NO, _END = -1, -2  # instead of a token: not repeated, not a number's

_HASH1, _HASH2, _HASH3 = (np.uint32(n) for n in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D))
_KINDS = tuple(np.uint32(n * 0x27D4EB2F & 0xFFFFFFFF) for n in range(NUM_FEATURES))
_SHIFT15, _SHIFT16 = np.uint32(15), np.uint32(32 - HASH_BITS)
_FOUR = np.uint32(4)

TRAITS_SHAPE = (8 * LANES,)
"""Scratch: each candidate, and what the text says about it; all of 32 bits, as their hashes are."""
(
    _TOKEN, _OLD_ROLE, _DISTANCE, _FOLLOWS, _TIMES, _KNOWN, _REPEATS, _NUMBER,
) = range(0, 8 * LANES, LANES)  # fmt: skip


@jit_inline
def _role_after(history: Rows, place: int, numbers: NDArray[np.bool_]) -> int:
    """Role of the place behind this one."""
    token, role = np.int64(history[place, _TEXT]), np.int64(history[place, _ROLE])
    if is_number(numbers, token):
        return role + 1 if role & 3 < 3 else role
    return token << 2


@jit_inline
def _before_after(history: Rows, place: int, numbers: NDArray[np.bool_]) -> int:
    """BEFORE of the place behind this one."""
    before = np.int64(history[place, _BEFORE])
    if is_number(numbers, np.int64(history[place, _TEXT])):
        return (before & _LOW_BITS) | (place + 1) << _HIGH
    return (before & ~_LOW_BITS) | (place + 1)


@jit_inline
def _word_before(history: Rows, place: int) -> int:
    """Where the last word before a place stood; -1: nowhere."""
    return (np.int64(history[nth(place), _BEFORE]) & _LOW_BITS) - 1 if place >= 0 else -1


@jit_inline
def _last_of(history: Rows, token: int) -> int:
    """1 + where a token stood last, or another one in its place; 0: nowhere."""
    at = token & (_SIZE - 1)
    return np.int64(history[_SIZE + (at >> 2), at & 3])


@jit_inline
def _set_last(history: Rows, token: int, last: int) -> None:
    at = token & (_SIZE - 1)
    history[_SIZE + (at >> 2), at & 3] = last


@jit_inline
def push(history: Rows, length: int, token: int, numbers: NDArray[np.bool_]) -> int:
    """Append a token to a text of `length`; returns what its place among the last was before."""
    before = _last_of(history, token)
    last = before - 1
    history[length, _TEXT] = token
    history[length, _ROLE] = _role_after(history, length - 1, numbers) if length else 0
    history[length, _BEFORE] = _before_after(history, length - 1, numbers) if length else 0
    if last >= 0 and history[last, _TEXT] == token:
        history[length, _LINK] = last << 2 | min((history[last, _LINK] & 3) + 1, 3)
    else:
        history[length, _LINK] = -4 | 1
    _set_last(history, token, length + 1)
    return before


@jit_inline
def pop(history: Rows, place: int, before: int) -> None:
    """Undo a `push`, the newest first."""
    _set_last(history, np.int64(history[place, _TEXT]), before)


@jit
def extend(history: Rows, state: Ints, new: Ints, numbers: NDArray[np.bool_]) -> None:
    """Append tokens to a running sequence's text; what is too long ago goes."""
    for index in range(len(new)):
        if state[LENGTH] >= _SIZE - MAX_DRAFT:
            first = state[LENGTH] - _KEPT
            history[_SIZE:] = 0
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
    history[_SIZE:] = 0
    kept = np.array(token_ids[-_KEPT:], np.int64)
    state[LENGTH] = 0
    state[NUM_PROMPT] = max(num_prompt - (len(token_ids) - len(kept)), 0)
    extend(history, state, kept, numbers)


@jit_inline
def _start(kind: int, one: int) -> int:
    return np.uint32(np.uint32(one) * _HASH1 + _KINDS[kind])


@jit_inline
def _place_of(start: int, other: int) -> int:
    key = np.uint32(start + np.uint32(np.uint32(other) * _HASH2))
    key = np.uint32((key ^ (key >> _SHIFT15)) * _HASH3)
    return key >> _SHIFT16


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
    before: int,
    tokens: Ints,
    size: int,
    numbers: NDArray[np.bool_],
    traits: Rows,
) -> int:
    """Bits in `traits` for which of the latest numbers each candidate would repeat.

    `before` is BEFORE of the place `length`. Returns: how many tokens of a number are there already.
    """
    for k in range(LANES):
        traits[_REPEATS + k] = 0
    if len(numbers) == 0:
        return 0
    start = before & _LOW_BITS
    can_repeat = start < length
    for k in range(size):
        is_part = is_number(numbers, tokens[k])
        can_repeat |= is_part
        traits[_NUMBER + k] = tokens[k] if is_part else _END
    # Behind a word only a number repeats one.
    if not can_repeat:
        return 0
    end = (np.int64(history[start - 1, _BEFORE]) if start > 0 else 0) >> _HIGH
    num = 0
    while end > max(0, length - _NUMBERS_BACK) and num < _NUMBERS:
        first = _word_before(history, end - 1) + 1
        following = np.int32(_next_of(history, first, end, start, length))
        bit = np.int32(1 << num)
        for k in range(LANES):
            traits[_REPEATS + k] |= bit if traits[_NUMBER + k] == following else np.int32(0)
        num += 1
        end = np.int64(history[first, _BEFORE]) >> _HIGH
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
    traits: Rows,
    features: NDArray[np.uint16],
) -> None:
    """Fill [NUM_FEATURES * LANES] with the weights' places of the candidates that may come next.

    `longest` is the place of the own longest match; `own_masses` is what `masses` were before the
    shared tier added to them. Lanes from `size` on hold any places.
    """
    newest = length - 1
    last = np.int64(history[newest, _TEXT])
    role = _role_after(history, newest, numbers)
    # The words before it, numbers left out.
    before = _before_after(history, newest, numbers)
    place = (before & _LOW_BITS) - 1
    next_place = _word_before(history, place)
    last_place = _word_before(history, next_place)
    second = np.int64(history[nth(next_place), _TEXT]) if next_place >= 0 else -1
    third = np.int64(history[nth(last_place), _TEXT]) if last_place >= 0 else -1
    # What followed where the last token, the last two tokens stood before.
    after_one = after_two = -1
    at = np.int64(history[newest, _LINK]) >> 2
    if at >= 0:
        after_one = np.int64(history[at + 1, _TEXT])
        previous = np.int64(history[newest - 1, _TEXT])
        for _ in range(_STEPS):
            if at < 1:
                break
            if history[at - 1, _TEXT] == previous:
                after_two = np.int64(history[at + 1, _TEXT])
                break
            at = np.int64(history[at, _LINK]) >> 2
    num_digits = min(_mark_repeated(history, length, before, tokens, size, numbers, traits), 7)
    is_known = 4 if after_two >= 0 else 0
    for k in range(size):
        token = tokens[k]
        place = _last_of(history, token) - 1
        there = nth(max(place, 0))
        is_there = (place >= 0) & (history[there, _TEXT] == token)
        link = np.int64(history[there, _LINK]) & 3
        is_said = np.int64(place >= num_prompt)
        traits[_TOKEN + k] = token
        traits[_OLD_ROLE + k] = np.int64(history[there, _ROLE]) if is_there else -1
        traits[_DISTANCE + k] = min(length - place, 62) if is_there else 63
        traits[_TIMES + k] = link * 2 + is_said if is_there else 0
        follows = 2 if token == after_two else is_known
        traits[_FOLLOWS + k] = follows + np.int64(token == after_one)
        own_share, mass = own_masses[k], masses[k]
        traits[_KNOWN + k] = (
            np.int64(own_share > 0)
            + np.int64(own_share >= 0.5 * mass)
            + np.int64(own_share >= 0.95 * mass)
        )
    behind = np.uint32(np.uint32(role) * _HASH3 + np.uint32(second))
    of_role, of_behind, of_third = _start(0, role), _start(1, behind), _start(2, third)
    of_match, from_role = _start(3, longest), _start(4, role)
    at_distance, of_last = _start(5, last), _start(6, last)
    at_times, repeating = _start(7, behind), _start(8, behind)
    of_digits = _start(9, num_digits)
    for k in range(LANES):
        token, times = np.uint32(traits[_TOKEN + k]), np.uint32(traits[_TIMES + k])
        known, repeats = np.uint32(traits[_KNOWN + k]), np.uint32(traits[_REPEATS + k])
        features[k] = _place_of(of_role, token)
        features[LANES + k] = _place_of(of_behind, token)
        features[2 * LANES + k] = _place_of(of_third, token)
        features[3 * LANES + k] = _place_of(of_match, np.uint32(times * _FOUR) + known)
        features[4 * LANES + k] = _place_of(from_role, traits[_OLD_ROLE + k])
        features[5 * LANES + k] = _place_of(at_distance, traits[_DISTANCE + k])
        features[6 * LANES + k] = _place_of(of_last, traits[_FOLLOWS + k])
        features[7 * LANES + k] = _place_of(at_times, times)
        features[8 * LANES + k] = _place_of(repeating, repeats)
        features[9 * LANES + k] = _place_of(of_digits, repeats)
