# SPDX-License-Identifier: Apache-2.0
"""Second choices beside a draft change speed, never a token: here the drafter knows what is right."""

import random
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streaminator.config import EngineConfig, SamplingParams, SpeculatorConfig
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.sequence import Completion, Prompt, Sequence
from streaminator.speculative.speculator import Guesses
from tests.fakes import (
    ARCHITECTURES,
    ENGINES,
    VOCAB_SIZE,
    Draws,
    drain,
    draw,
    load_runner,
    make_engine,
    make_prompt,
    random_tokens,
    save_model,
)

SAMPLING = SamplingParams(temperature=0.8, max_length=24, ignore_eos=True)
# Completions cross a block at once and late; those of LONG cross a chunk of keys, too.
PROMPTS = [make_prompt(f"p{n}", random_tokens(n, seed=n), 2) for n in (3, 15, 31)]
LONG = [*PROMPTS[1:], make_prompt("p250", random_tokens(250, seed=250), 2)]


def alone(runner: ModelRunner, prompts: Seq[Prompt]) -> Draws:
    return draw(
        runner,
        prompts,
        sampling=SAMPLING,
        engine=EngineConfig(stream_width=1),
        speculator=SpeculatorConfig(spec_decoding=False),
    )


@pytest.fixture(scope="module")
def reference(llama: ModelRunner) -> Draws:
    return alone(llama, PROMPTS)


def guess_with(engine: Engine, reference: Draws, seed: int, chance: float) -> None:
    """Chains that are right up to somewhere; beside each token a second choice, right at times."""
    generator = random.Random(seed)

    def other_than(token: int) -> int:
        return (token + generator.randrange(1, VOCAB_SIZE)) % VOCAB_SIZE

    def draft_all(sequences: Seq[Sequence], caps: Seq[int], floor: float) -> Guesses:
        width = max(caps, default=0)
        tokens = np.zeros((len(sequences), 2, width), np.int64)
        lengths = np.zeros(len(sequences), np.int64)
        survival = np.zeros((len(sequences), 2, width), np.float32)
        for row, (sequence, cap) in enumerate(zip(sequences, caps, strict=True)):
            whole = reference[sequence.prompt.prompt_id, sequence.sample_index].token_ids
            drawn = len(sequence.token_ids) - sequence.num_prompt_tokens
            right = whole[drawn : drawn + cap]
            turn = generator.randint(0, len(right))
            tokens[row, 0, : len(right)] = [*right[:turn], *map(other_than, right[turn:])]
            lengths[row] = len(right)
            survival[row, 0, : len(right)] = 1
            for place, token in enumerate(right):
                is_right = place == turn and generator.random() < chance
                tokens[row, 1, place] = token if is_right else other_than(token)
                survival[row, 1, place] = generator.random() < 0.7
        return Guesses(tokens, lengths, survival)

    engine.store.draft_all = draft_all  # type: ignore[method-assign]


def assert_same(completions: Draws, reference: Draws) -> None:
    assert set(completions) == set(reference)
    for key, completion in completions.items():
        assert completion.token_ids == reference[key].token_ids
        assert completion.logprobs == reference[key].logprobs
        assert_account_balances(completion)


def assert_account_balances(completion: Completion) -> None:
    """Each step added what it accepted, a second choice included, and one token of its own."""
    flags = [flag for num in completion.accepted for flag in (*(True,) * num, False)]
    assert completion.from_draft == flags[: len(completion.token_ids)]
    pairs = zip(completion.accepted, completion.drafted, strict=True)
    assert all(0 <= accepted <= drafted for accepted, drafted in pairs)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32),
    chance=st.sampled_from([0.0, 0.5, 1.0]),
    num_speculative_tokens=st.integers(1, 20),
    config=ENGINES,
)
def test_no_second_choice_however_wrong_changes_a_token(
    llama: ModelRunner,
    reference: Draws,
    seed: int,
    chance: float,
    num_speculative_tokens: int,
    config: EngineConfig,
) -> None:
    engine = make_engine(
        llama,
        sampling=SAMPLING,
        engine=config,
        speculator=SpeculatorConfig(num_speculative_tokens=num_speculative_tokens),
    )
    guess_with(engine, reference, seed, chance)
    assert_same(drain(engine, PROMPTS), reference)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_right_second_choices_are_accepted_on_every_architecture(
    architecture: str, tmp_path: Path
) -> None:
    runner = load_runner(save_model(tmp_path, architecture, dtype=torch.float32), "float32")
    reference = alone(runner, LONG)
    num_steps = []
    for chance in (0.0, 1.0):
        engine = make_engine(
            runner,
            sampling=SAMPLING,
            engine=EngineConfig(stream_width=3),
            speculator=SpeculatorConfig(num_speculative_tokens=5),
        )
        guess_with(engine, reference, 1, chance)
        completions = drain(engine, LONG)
        assert_same(completions, reference)
        num_steps.append(sum(len(completion.accepted) for completion in completions.values()))
    assert num_steps[1] < 0.95 * num_steps[0]
