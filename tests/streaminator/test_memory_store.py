# SPDX-License-Identifier: Apache-2.0
"""The stream's side of the memory: steps that are learned together teach what they teach one by one."""

import numpy as np
import pytest

from streaminator.config import SpeculatorConfig
from streaminator.sequence import Prompt, Sequence
from streaminator.speculative.memory_store import MemoryStore
from streaminator.speculative.speculator import Gain, Guesses

TEXT = [7, 8, 9, 10, 11, 12, 13, 14]


def make_store() -> MemoryStore:
    config = SpeculatorConfig(num_top_tokens=2, shared_memory=False)
    return MemoryStore(config, is_greedy=False)


def start(store: MemoryStore, prompt: Prompt, sample_index: int) -> Sequence:
    sequence = Sequence(prompt, sample_index, list(prompt.token_ids), sample_index, 0, 0.0)
    store.start(sequence)
    return sequence


def prompt(name: str) -> Prompt:
    return Prompt(prompt_id=name, token_ids=(1, 2, 3), text="", question="")


def learn(store: MemoryStore, sequences: list[Sequence], step: int, *, may_wait: bool) -> None:
    """Each draws its next token; the second one's text is the first one's, a token later."""
    tokens = [TEXT[(step + n) % len(TEXT)] for n in range(len(sequences))]
    ids = np.array([[token, token + 20] for token in tokens])
    probs = np.tile(np.array([0.7, 0.2], np.float32), (len(tokens), 1))
    gains = [
        Gain(sequence, [token], [], [n])
        for n, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
    ]
    store.advance_all(gains, ids, probs, may_wait=may_wait)
    store.learn_all()


def chains(guesses: Guesses) -> list[list[int]]:
    rows = zip(guesses.tokens[:, 0].tolist(), guesses.lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows]


@pytest.mark.parametrize("num_together", [2, 5, 16])
def test_steps_learned_together_teach_what_they_teach_one_by_one(num_together: int) -> None:
    guesses = []
    for waits in (False, True):
        store = make_store()
        sequences = [start(store, prompt(name), 0) for name in "ab"]
        for step in range(num_together * (24 // num_together)):
            learn(store, sequences, step, may_wait=waits and (step + 1) % num_together > 0)
        guesses.append(store.draft_all(sequences, [6, 6], 0.0))
    at_once, together = guesses
    assert chains(at_once) == chains(together)
    assert any(chains(at_once))
    assert at_once.survival is not None
    assert together.survival is not None
    np.testing.assert_array_equal(at_once.survival, together.survival)


def test_what_waits_is_learned_before_the_prompt_is_drawn_again() -> None:
    store = make_store()
    first = start(store, prompt("a"), 0)
    for step in range(len(TEXT)):
        learn(store, [first], step, may_wait=True)
    store.finish(first, has_failed=False)
    second = start(store, prompt("a"), 1)
    assert chains(store.draft_all([second], [3], 0.0)) == [TEXT[:3]]
