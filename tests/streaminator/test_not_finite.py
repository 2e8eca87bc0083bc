# SPDX-License-Identifier: Apache-2.0
"""Logits that are not finite fail their own completion, with its reason, and nobody else's."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from streaminator.config import EngineConfig
from streaminator.engine.model_runner import ModelRunner
from streaminator.sequence import Completion, FinishReason, Prompt
from tests.fakes import (
    FREE,
    MAX_LENGTH,
    NO_SPECULATION,
    PROMPTS,
    VOCAB_SIZE,
    Draws,
    drain,
    draw,
    make_engine,
    make_prompt,
    random_tokens,
    sampling,
    tokens,
)

# Logits that are not finite


@contextmanager
def poisoned(runner: ModelRunner, token: int, value: float = math.nan) -> Iterator[None]:
    """Any text with `token` in it makes the model's logits NaN from there on."""
    weight = runner.model.get_input_embeddings().weight
    with torch.no_grad():
        before = weight[token].clone()  # type: ignore[index]
        weight[token] = value  # type: ignore[index]
        try:
            yield
        finally:
            weight[token] = before  # type: ignore[index]


def unused_token(*prompts: Prompt, draws: Draws) -> int:
    """A token that no prompt and no completion has."""
    used = {token for prompt in prompts for token in prompt.token_ids}
    used |= {token for completion in draws.values() for token in completion.token_ids}
    return next(token for token in range(1, VOCAB_SIZE) if token not in used)


def assert_poisoned(completion: Completion) -> None:
    assert completion.finish_reason is FinishReason.FAILED
    assert completion.error == "the model's logits are not finite at token 0"
    assert completion.token_ids == []


@pytest.mark.parametrize(
    "engine",
    [
        EngineConfig(stream_width=3),
        EngineConfig(stream_width=1),
        EngineConfig(stream_width=3, kv_cache=False),
        EngineConfig(stream_width=3, continuous_batching=False),
        EngineConfig(stream_width=2, num_blocks=9),
    ],
    ids=["width3", "width1", "no_cache", "static", "few_blocks"],
)
@pytest.mark.parametrize("place", [0, 14])
def test_not_finite_logits_fail_their_completions_and_leave_the_others_alone(
    llama: ModelRunner, place: int, engine: EngineConfig
) -> None:
    clean = draw(llama, PROMPTS, sampling=FREE)
    poison = unused_token(*PROMPTS, draws=clean)
    text = list(random_tokens(30, seed=77))
    text[place] = poison
    bad = make_prompt("bad", text, 4)  # the most completions: it starts first and blocks go on
    with poisoned(llama, poison):
        completions = draw(llama, [*PROMPTS, bad], sampling=FREE, engine=engine)
    for index in range(4):
        assert_poisoned(completions.pop(("bad", index)))
    assert tokens(completions) == tokens(clean)
    for key, completion in completions.items():
        assert completion.logprobs == clean[key].logprobs


def test_not_finite_logits_after_a_long_prompt_fail_every_completion(llama: ModelRunner) -> None:
    # The prompt is computed in chunks, and what the first completion left must not be reused.
    clean = draw(llama, PROMPTS, sampling=FREE)
    poison = unused_token(*PROMPTS, draws=clean)
    bad = make_prompt("bad", [poison, *random_tokens(40, seed=77)], 3)
    engine = EngineConfig(stream_width=2, max_batched_tokens=8)
    with poisoned(llama, poison):
        completions = draw(llama, [bad, *PROMPTS], sampling=FREE, engine=engine)
    for index in range(3):
        assert_poisoned(completions.pop(("bad", index)))
    assert tokens(completions) == tokens(clean)


def test_not_finite_logits_after_a_shared_preamble_leave_its_other_prompts_alone(
    llama: ModelRunner,
) -> None:
    preamble = random_tokens(48, seed=99)
    good = [make_prompt(f"q{n}", preamble + random_tokens(n, seed=n), 2) for n in (3, 9)]
    clean = draw(llama, good, sampling=FREE)
    poison = unused_token(*good, draws=clean)
    bad = make_prompt("bad", (*preamble, poison, 5), 2)
    with poisoned(llama, poison):
        completions = draw(llama, [*good, bad], sampling=FREE, engine=EngineConfig(stream_width=3))
    for index in range(2):
        assert_poisoned(completions.pop(("bad", index)))
    assert tokens(completions) == tokens(clean)


def test_prompts_that_share_a_poisoned_preamble_all_fail(llama: ModelRunner) -> None:
    clean = draw(llama, PROMPTS, sampling=FREE)
    poison = unused_token(*PROMPTS, draws=clean)
    preamble = (poison, *random_tokens(40, seed=77))
    bad = [make_prompt(f"bad{n}", preamble + random_tokens(n, seed=n)) for n in (3, 9, 20)]
    engine = EngineConfig(stream_width=2, max_batched_tokens=16)
    with poisoned(llama, poison):
        completions = draw(llama, bad, sampling=FREE, engine=engine)
    for completion in completions.values():
        assert_poisoned(completion)


def test_a_poisoned_prompt_that_is_preempted_leaves_no_trace_in_its_blocks(
    llama: ModelRunner,
) -> None:
    good = make_prompt("good", random_tokens(30, seed=30), 2)
    clean = draw(llama, [good], sampling=FREE)
    poison = unused_token(good, draws=clean)
    # The long prompt is computed bit by bit while the other grows into its blocks: it is
    # preempted before a draw could show that its keys are NaN.
    bad = make_prompt("bad", [poison, *random_tokens(60, seed=77)])
    stream = make_engine(
        llama,
        sampling=FREE,
        engine=EngineConfig(stream_width=2, num_blocks=7, max_batched_tokens=4),
        speculator=NO_SPECULATION,
    )
    preempted = []
    preempt = stream.scheduler._preempt

    def note(sequence) -> None:
        if sequence.num_cached_tokens:
            preempted.append(sequence.prompt.prompt_id)
        preempt(sequence)

    stream.scheduler._preempt = note  # type: ignore[method-assign]
    with poisoned(llama, poison):
        completions = drain(stream, [good, bad])
    assert "bad" in preempted
    assert_poisoned(completions.pop(("bad", 0)))
    assert tokens(completions) == tokens(clean)


def test_a_poisoned_draft_fails_nobody(llama: ModelRunner) -> None:
    clean = draw(llama, PROMPTS, sampling=FREE)
    poison = unused_token(*PROMPTS, draws=clean)
    stream = make_engine(llama, sampling=FREE, engine=EngineConfig(stream_width=2))
    stream.store.draft = lambda prompt, known, num: [poison] * num  # type: ignore[method-assign]
    with poisoned(llama, poison):
        completions = drain(stream, PROMPTS)
    assert tokens(completions) == tokens(clean)


def test_a_poisoned_token_0_fails_nobody_who_does_not_have_it(llama: ModelRunner) -> None:
    # Batches are padded with it.
    params = sampling(max_length=6)
    prompts = [make_prompt(f"p{n}", random_tokens(n, seed=n)) for n in (3, 18, 33)]
    clean = draw(llama, prompts, sampling=params)
    assert all(0 not in completion.token_ids for completion in clean.values())
    with poisoned(llama, 0):
        completions = draw(
            llama, prompts, sampling=params, engine=EngineConfig(max_batched_tokens=5)
        )
    assert tokens(completions) == tokens(clean)


def test_logits_that_turn_infinite_on_the_way_keep_the_tokens_drawn_so_far(
    llama: ModelRunner, free: Draws
) -> None:
    # The poison is a token that the completion draws itself.
    drawn = free["p33", 0].token_ids
    place = next(i for i in range(3, MAX_LENGTH - 1) if drawn[i] not in drawn[:i])
    poison = drawn[place]
    assert poison not in PROMPTS[2].token_ids
    with poisoned(llama, poison):
        completion = draw(llama, PROMPTS, sampling=FREE, speculator=NO_SPECULATION)["p33", 0]
    assert completion.finish_reason is FinishReason.FAILED
    assert completion.error == f"the model's logits are not finite at token {place + 1}"
    assert completion.token_ids == drawn[: place + 1]
    assert len(completion.logprobs) == len(completion.from_draft) == place + 1


@pytest.mark.parametrize("order", ["in turn", "ahead"])
def test_a_completion_that_fails_on_the_way_leaves_the_next_ones_of_its_prompt_alone(
    llama: ModelRunner, free: Draws, order: str, request: pytest.FixtureRequest
) -> None:
    """Also where the next step is launched before it is known that it fails."""
    if order == "ahead":
        request.getfixturevalue("overlapping")
    first, *later = (free["p33", index].token_ids for index in range(3))
    poison = next(
        token
        for token in first[3:-1]
        if not any(token in text for text in (*later, PROMPTS[2].token_ids))
    )
    with poisoned(llama, poison):
        completions = draw(llama, PROMPTS[2:], sampling=FREE, speculator=NO_SPECULATION)
    failed = completions["p33", 0]
    assert failed.finish_reason is FinishReason.FAILED
    assert failed.token_ids == first[: first.index(poison) + 1]
    assert [completions["p33", index].token_ids for index in (1, 2)] == later


def test_what_is_computed_behind_an_end_reaches_no_other_completion(
    llama: ModelRunner, free: Draws, overlapping: None
) -> None:
    """A step is launched before it is known that the token before it ended its completion."""
    stop = next(
        token
        for token in free["p19", 0].token_ids[3:10]
        if not any(token in prompt.token_ids for prompt in PROMPTS)
    )
    drawn = []
    for is_poisoned in (False, True):
        with poisoned(llama, stop) if is_poisoned else nullcontext():
            drawn.append(
                draw(
                    llama, PROMPTS, sampling=sampling(stop_token_ids=(stop,)),
                    speculator=NO_SPECULATION,
                )
            )  # fmt: skip
    assert drawn[0]["p19", 0].finish_reason is FinishReason.STOP
    assert tokens(drawn[1]) == tokens(drawn[0])
    assert all(completion.error is None for completion in drawn[1].values())
