# SPDX-License-Identifier: Apache-2.0
"""What the memory drafts of its own text's making: copies, and words around other numbers."""

from collections.abc import Iterator

import numpy as np

from streaminator.speculative import memory_features as features
from streaminator.speculative.memory import Memory
from streaminator.speculative.memory_rates import LENGTH, NUM_COLUMNS

SMALL = 1 << 20


def hits(memory: Memory, prompt_id: str, prompt: list[int], text: list[int]) -> list[bool]:
    """Whether each token of `text` was the first one drafted."""
    handle = np.array([memory.start(prompt_id, prompt, 0)])
    right = []
    for token in text:
        drafts = memory.draft(handle, np.array([1]))
        right.append(bool(drafts.lengths[0] and drafts.tokens[0, 0, 0] == token))
        memory.commit(handle, np.array([token]), np.array([1]))
    memory.finish(int(handle[0]))
    return right


def new_prompts(
    memory: Memory, rng: np.random.Generator, num: int
) -> Iterator[tuple[str, list[int]]]:
    """Prompts of other words each, open while they are in use."""
    for index in range(num):
        prompt = rng.integers(100, 140, 8).tolist()
        memory.open(str(index), prompt, ())
        yield str(index), prompt
        memory.close(str(index))


def copying(rng: np.random.Generator) -> list[int]:
    """`= x >> x` with other words between and behind."""
    x = int(rng.integers(100, 140))
    return [*rng.integers(100, 140, 3).tolist(), 1, x, 2, x, *rng.integers(100, 140, 3).tolist()]


def test_what_is_copied_is_learned_across_prompts():
    rng = np.random.default_rng(0)
    memory = Memory(max_bytes=SMALL, min_survival=0)
    rates = []
    for prompt_id, prompt in new_prompts(memory, rng, 400):
        rates.append(hits(memory, prompt_id, prompt, copying(rng))[6])
    assert np.mean(rates[:40]) < 0.4
    assert np.mean(rates[-100:]) > 0.6


def test_what_is_always_drafted_late_is_learned_too():
    rng = np.random.default_rng(0)
    memory = Memory(max_bytes=SMALL, min_survival=0)
    rates = []
    for prompt_id, prompt in new_prompts(memory, rng, 200):
        handle = np.array([memory.start(prompt_id, prompt, 0)])
        x, other = int(rng.integers(100, 112)), int(rng.integers(1000, 3000))
        text = [1, x, other, 2, 3, 4, x]
        for first, end in ((0, 4), (4, 7)):
            if first == 4:
                drafts = memory.draft(handle, np.array([3]))
                rates.append(drafts.tokens[0, 0].tolist() == text[4:])
            memory.commit(handle, np.array(text[first:end]), np.array([end - first]))
        memory.finish(int(handle[0]))
    assert np.mean(rates[-100:]) > 0.9


def test_a_text_longer_than_what_is_kept_of_it_is_drafted_on():
    memory = Memory(max_bytes=SMALL, min_survival=0)
    text = [7, 8, 9, 10] * 400
    memory.open("", text[:700], ())
    assert all(hits(memory, "", text[:700], text[700:]))


def test_words_around_other_numbers_are_drafted():
    numbers = np.zeros(64, np.bool_)
    numbers[10:20] = True
    story = [30, 31, 10, 32, 33]
    other = [30, 31, 15, 16, 32]
    results = []
    for known in (None, numbers):
        memory = Memory(max_bytes=SMALL, min_survival=0, numbers=known)
        memory.open("", [40, 41, 42], ())
        for _ in range(3):
            hits(memory, "", [40, 41, 42], story)
        results.append(hits(memory, "", [40, 41, 42], other)[4])
    assert results == [False, True]


def test_a_number_is_repeated_digit_by_digit():
    rng = np.random.default_rng(0)
    numbers = np.zeros(64, np.bool_)
    numbers[:10] = True
    memory = Memory(max_bytes=SMALL, min_survival=0, numbers=numbers)
    rates = []
    for index in range(300):
        memory.open(str(index), [20, 21, 22], ())
        others, number = rng.integers(0, 10, (2, 4)).tolist()
        text = [*others, 23, 24, *number, 25, 26, *number, 27]
        rates.append(np.mean(hits(memory, str(index), [20, 21, 22], text)[12:16]))
        memory.close(str(index))
    assert np.mean(rates[-100:]) > 0.98


def test_each_place_knows_the_last_word_and_number_before_it():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.6, 1.0):
        numbers = rng.random(40) < share
        history, state = np.zeros(features.HISTORY_SHAPE, np.int32), np.zeros(NUM_COLUMNS, np.int64)
        text = rng.integers(0, 40, 700)  # more than is kept
        for begin in range(0, 700, 7):
            features.extend(history, state, text[begin : begin + 7], numbers)
        length = int(state[LENGTH])
        is_number = numbers[history[:length, 0]]
        for place in range(1, length):
            words, parts = (np.flatnonzero(kind[:place]) for kind in (~is_number, is_number))
            before = int(history[place, 3])
            assert before & 0xFFFF == (words[-1] + 1 if len(words) else 0)
            assert before >> 16 == (parts[-1] + 1 if len(parts) else 0)
