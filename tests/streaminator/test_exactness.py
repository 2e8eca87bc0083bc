# SPDX-License-Identifier: Apache-2.0
"""Whatever changes speed changes no token: everything is compared with one plain, slow stream."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streaminator.config import EngineConfig, SamplingParams, SpeculatorConfig
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.sequence import Completion, Prompt
from tests.fakes import (
    ENGINES,
    VOCAB_SIZE,
    drain,
    draw,
    make_engine,
    make_prompt,
    random_tokens,
    tokens,
)

MAX_LENGTH = 20
SAMPLING = {
    "temperature": SamplingParams(temperature=0.8, max_length=MAX_LENGTH),
    "top_k": SamplingParams(temperature=0.8, top_k=5, max_length=MAX_LENGTH),
    "top_p": SamplingParams(temperature=0.8, top_p=0.7, max_length=MAX_LENGTH),
    "min_p": SamplingParams(temperature=0.8, min_p=0.05, max_length=MAX_LENGTH),
    "greedy": SamplingParams(temperature=0, max_length=MAX_LENGTH),
}
PLAIN = SAMPLING["temperature"]
NO_SPECULATION = SpeculatorConfig(spec_decoding=False)
MEMORY = SpeculatorConfig(speculator="memory")
ALONE = EngineConfig(stream_width=1)
PROMPTS = [make_prompt(f"p{n}", random_tokens(n, seed=n), 3) for n in (4, 19, 33, 40)]
SMALL_PROMPTS = [make_prompt(p.prompt_id, p.token_ids, 2) for p in PROMPTS[:3]]

Draws = dict[tuple[str, int], Completion]


def plain(runner: ModelRunner, sampling: SamplingParams) -> Draws:
    return draw(runner, PROMPTS, sampling=sampling, engine=ALONE, speculator=NO_SPECULATION)


@pytest.fixture(scope="module")
def reference(llama: ModelRunner) -> Draws:
    return plain(llama, PLAIN)


def assert_same(completions: Draws, reference: Draws) -> None:
    assert tokens(completions) == {key: reference[key].token_ids for key in completions}
    for key, completion in completions.items():
        assert completion.logprobs == reference[key].logprobs
        assert completion.finish_reason == reference[key].finish_reason


@pytest.mark.parametrize("name", SAMPLING)
def test_speculation_and_width_change_no_token(llama: ModelRunner, name: str) -> None:
    together = draw(llama, PROMPTS, sampling=SAMPLING[name], engine=EngineConfig(stream_width=3))
    assert_same(together, plain(llama, SAMPLING[name]))


def test_the_reference_is_worth_comparing_with(reference: Draws) -> None:
    assert len({tuple(completion.token_ids) for completion in reference.values()}) == len(reference)
    assert len({token for completion in reference.values() for token in completion.token_ids}) > 30


@pytest.mark.parametrize(
    "speculator",
    [
        NO_SPECULATION,
        *(SpeculatorConfig(speculator="ngram", num_speculative_tokens=num) for num in (1, 4, 8)),
        *(SpeculatorConfig(speculator="ngram", ngram_order=order) for order in (1, 2, 4)),
        SpeculatorConfig(speculator="ngram", ngram_order=2, generation_training=False),
        SpeculatorConfig(speculator="ngram", ngram_order=2, prompt_training=False),
        MEMORY,
        SpeculatorConfig(speculator="memory", num_speculative_tokens=2, shared_memory=False),
        SpeculatorConfig(speculator="memory", num_top_tokens=0, prompt_training=False),
        SpeculatorConfig(speculator="memory", generation_training=False),
    ],
    ids=[
        *("off", "k1", "k4", "k8", "order1", "order2", "order4", "prompt_only"),
        *("generations_only", "memory", "memory_private", "memory_tokens", "memory_prompt_only"),
    ],
)
def test_the_speculator_changes_no_token(
    llama: ModelRunner, reference: Draws, speculator: SpeculatorConfig
) -> None:
    engine = EngineConfig(stream_width=3)
    assert_same(
        draw(llama, PROMPTS, sampling=PLAIN, engine=engine, speculator=speculator), reference
    )


@pytest.mark.parametrize(
    "speculator", [NO_SPECULATION, SpeculatorConfig(speculator="ngram", ngram_order=2), MEMORY]
)
@pytest.mark.parametrize(
    "engine",
    [
        *(EngineConfig(stream_width=width) for width in (1, 3, 16)),
        EngineConfig(stream_width=3, kv_cache=False),
        EngineConfig(stream_width=3, continuous_batching=False),
        EngineConfig(stream_width=3, continuous_batching=False, kv_cache=False),
        EngineConfig(stream_width=3, max_batched_tokens=3),
        EngineConfig(stream_width=3, max_batched_tokens=1),
        EngineConfig(stream_width=3, block_size=32),
        EngineConfig(stream_width=9, in_flight_per_prompt=2),
        EngineConfig(stream_width=16, in_flight_per_prompt=None),
    ],
    ids=[
        "width1",
        "width3",
        "width16",
        "no_cache",
        "static",
        "static_no_cache",
        "chunks_of_3",
        "chunks_of_1",
        "blocks_of_32",
        "two_in_flight",
        "all_in_flight",
    ],
)
def test_the_stream_changes_no_token(
    llama: ModelRunner, reference: Draws, engine: EngineConfig, speculator: SpeculatorConfig
) -> None:
    assert_same(
        draw(llama, PROMPTS, sampling=PLAIN, engine=engine, speculator=speculator), reference
    )


@pytest.mark.parametrize("max_batched_tokens", [5, 512])
@pytest.mark.parametrize("kv_cache", [True, False])
def test_preemption_changes_no_token(
    llama: ModelRunner,
    reference: Draws,
    monkeypatch: pytest.MonkeyPatch,
    kv_cache: bool,
    max_batched_tokens: int,
) -> None:
    # 60 tokens at most are 4 blocks: one sequence fits and a second one does not for long.
    engine = make_engine(
        llama,
        sampling=PLAIN,
        engine=EngineConfig(
            stream_width=4,
            num_blocks=8,
            kv_cache=kv_cache,
            max_batched_tokens=max_batched_tokens,
        ),
        speculator=SpeculatorConfig(speculator="ngram", ngram_order=2),
    )
    num_lost = 0
    preempt = engine.scheduler._preempt

    def count(sequence) -> None:
        nonlocal num_lost
        num_lost += bool(sequence.num_cached_tokens or len(sequence.completion_token_ids))
        preempt(sequence)

    monkeypatch.setattr(engine.scheduler, "_preempt", count)
    assert_same(drain(engine, PROMPTS), reference)
    assert num_lost > 0, "nobody was preempted"


@pytest.mark.parametrize("engine", [EngineConfig(stream_width=3), EngineConfig(stream_width=1)])
def test_a_shared_preamble_is_computed_once_and_changes_no_token(
    llama: ModelRunner, engine: EngineConfig
) -> None:
    preamble = random_tokens(50, seed=99)  # 3 full blocks and a part of one
    prompts = [make_prompt(f"q{n}", preamble + random_tokens(n, seed=n), 2) for n in (3, 9, 20)]
    without = {}
    for prompt in prompts:  # each in a stream of its own, so that there is nothing to share
        without |= draw(llama, [prompt], sampling=PLAIN, engine=ALONE, speculator=NO_SPECULATION)

    stream = make_engine(llama, sampling=PLAIN, engine=engine, speculator=NO_SPECULATION)
    num_computed = 0
    completions = {}
    for prompt in prompts:
        stream.add(prompt)
    while stream.has_work:
        completions |= {(c.prompt.prompt_id, c.sample_index): c for c in stream.step()}
        assert stream.last_step is not None
        num_computed += stream.last_step.num_prefill_tokens
    assert_same(completions, without)
    # All but each first prompt's last token are prefill; 48 of them only once.
    assert num_computed == sum(len(prompt.token_ids) - 1 for prompt in prompts) - 2 * 48


def test_prompts_added_in_another_order_give_the_same_tokens(
    llama: ModelRunner, reference: Draws
) -> None:
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS))
    assert shuffled != PROMPTS
    engine = EngineConfig(stream_width=2)
    assert_same(draw(llama, shuffled, sampling=PLAIN, engine=engine), reference)


def test_prompts_added_while_others_run_give_the_same_tokens(
    llama: ModelRunner, reference: Draws
) -> None:
    engine = make_engine(llama, sampling=PLAIN, engine=EngineConfig(stream_width=4))
    completions = {}
    waiting = list(PROMPTS)
    while waiting or engine.has_work:
        if waiting:
            engine.add(waiting.pop())
        for _ in range(3):
            completions |= {(c.prompt.prompt_id, c.sample_index): c for c in engine.step()}
    assert_same(completions, reference)
    assert len(completions) == len(reference)


def test_a_resumed_prompt_gives_the_tokens_that_were_missing(
    llama: ModelRunner, reference: Draws
) -> None:
    done = tuple(tuple(reference["p19", index].token_ids) for index in (0, 1))
    prompt = Prompt(
        prompt_id="p19",
        token_ids=PROMPTS[1].token_ids,
        text="",
        question="",
        sample_indices=(2,),
        finished=done,
    )
    assert_same(draw(llama, [prompt], sampling=PLAIN), reference)


def test_the_number_of_threads_changes_no_token(llama: ModelRunner, reference: Draws) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        completions = draw(llama, PROMPTS, sampling=PLAIN, engine=EngineConfig(stream_width=3))
    finally:
        torch.set_num_threads(threads)
    assert_same(completions, reference)


def test_texts_of_several_key_chunks_do_not_depend_on_their_neighbours(llama: ModelRunner) -> None:
    prompts = [make_prompt(f"l{n}", random_tokens(n, seed=n), 2) for n in (5, 245, 500, 600)]
    sampling = SamplingParams(max_length=MAX_LENGTH)
    alone = draw(llama, prompts, sampling=sampling, engine=ALONE, speculator=NO_SPECULATION)
    together = draw(
        llama,
        prompts,
        sampling=sampling,
        engine=EngineConfig(stream_width=4, max_batched_tokens=200),
        speculator=SpeculatorConfig(speculator="ngram", ngram_order=2),
    )
    assert_same(together, alone)


def test_other_seeds_prompt_ids_and_sample_indices_give_other_tokens(
    llama: ModelRunner, reference: Draws
) -> None:
    other_seed = draw(llama, PROMPTS, sampling=SamplingParams(seed=1, max_length=MAX_LENGTH))
    assert all(other_seed[key].token_ids != reference[key].token_ids for key in reference)
    renamed = [make_prompt("other", PROMPTS[0].token_ids, 3)]
    other_id = draw(llama, renamed, sampling=PLAIN)
    assert all(other_id["other", i].token_ids != reference["p4", i].token_ids for i in range(3))


# Drafts nobody should make: each strategy gets the right continuation, a random generator and
# the number of tokens asked for.
Drafter = Callable[[list[int], random.Random, int], list[int]]


def wrong(right: list[int], generator: random.Random, num: int) -> list[int]:
    return [generator.randrange(VOCAB_SIZE) for _ in range(num)]


def perfect(right: list[int], generator: random.Random, num: int) -> list[int]:
    return right[:num]


def half_right(right: list[int], generator: random.Random, num: int) -> list[int]:
    keep = generator.randint(0, num)
    return (right[:keep] + wrong(right, generator, num))[:num]


def one_wrong(right: list[int], generator: random.Random, num: int) -> list[int]:
    draft = right[:num]
    if draft:
        place = generator.randrange(len(draft))
        draft[place] = (draft[place] + 1) % VOCAB_SIZE
    return draft


def repeated(right: list[int], generator: random.Random, num: int) -> list[int]:
    return (right[:1] or [0]) * num


def nothing(right: list[int], generator: random.Random, num: int) -> list[int]:
    return []


DRAFTERS: list[Drafter] = [wrong, perfect, half_right, one_wrong, repeated, nothing]


def draft_with(engine: Engine, reference: Draws, drafters: Sequence[Drafter], seed: int) -> None:
    """Replace the speculators by drafters that know how the running completion goes on."""
    generator = random.Random(seed)

    def draft(prompt: Prompt, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        running = next(s for s in engine.scheduler.running if s.prompt is prompt)
        drawn = len(token_ids) - len(prompt.token_ids)
        right = reference[prompt.prompt_id, running.sample_index].token_ids[drawn:]
        num = generator.randint(0, max_tokens)
        return generator.choice(drafters)(right, generator, num)

    engine.store.draft = draft  # type: ignore[method-assign]


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    drafters=st.lists(st.sampled_from(DRAFTERS), min_size=1, max_size=3),
    seed=st.integers(0, 2**32),
    num_speculative_tokens=st.integers(1, 30),
    config=ENGINES,
)
def test_no_draft_however_wrong_changes_a_token(
    llama: ModelRunner,
    reference: Draws,
    drafters: list[Drafter],
    seed: int,
    num_speculative_tokens: int,
    config: EngineConfig,
) -> None:
    engine = make_engine(
        llama,
        sampling=PLAIN,
        engine=config,
        speculator=SpeculatorConfig(
            speculator="ngram", num_speculative_tokens=num_speculative_tokens
        ),
    )
    draft_with(engine, reference, drafters, seed)
    completions = drain(engine, SMALL_PROMPTS)
    assert_same(completions, reference)
    assert len(completions) == 2 * len(SMALL_PROMPTS)
    for completion in completions.values():
        assert_account_balances(completion)


def assert_account_balances(completion: Completion) -> None:
    """Each step adds what it accepted and one token of its own, unless it ended on a draft."""
    num_tokens = len(completion.token_ids)
    assert len(completion.logprobs) == len(completion.from_draft) == num_tokens
    assert len(completion.drafted) == len(completion.accepted)
    pairs = zip(completion.accepted, completion.drafted, strict=True)
    assert all(0 <= accepted <= drafted for accepted, drafted in pairs)
    assert sum(completion.from_draft) == sum(completion.accepted)
    ended_on_a_draft = completion.from_draft[-1:] == [True]
    assert num_tokens == sum(completion.accepted) + len(completion.accepted) - ended_on_a_draft
    # And in this order: the accepted ones of a step, then its own.
    flags = [flag for num in completion.accepted for flag in (*(True,) * num, False)]
    assert completion.from_draft == flags[:num_tokens]


@pytest.mark.parametrize("stop_token", [False, True])
def test_drafted_accepted_and_from_draft_account_for_every_token(
    llama: ModelRunner, reference: Draws, stop_token: bool
) -> None:
    stop_ids = (reference["p19", 0].token_ids[10],) if stop_token else ()
    sampling = SamplingParams(
        temperature=0.8, max_length=MAX_LENGTH, stop_token_ids=stop_ids, ignore_eos=True
    )
    engine = make_engine(
        llama,
        sampling=sampling,
        speculator=SpeculatorConfig(speculator="ngram", num_speculative_tokens=7),
    )
    draft_with(engine, reference, [half_right, perfect], seed=3)
    completions = drain(engine, PROMPTS)
    for completion in completions.values():
        assert_account_balances(completion)
    cut = [c for c in completions.values() if c.from_draft[-1]]
    # The length limit leaves room for a step's own token; only a stop cuts accepted tokens.
    assert bool(cut) is stop_token


def test_perfect_drafts_take_the_fewest_steps(llama: ModelRunner, reference: Draws) -> None:
    engine = make_engine(
        llama,
        sampling=PLAIN,
        speculator=SpeculatorConfig(speculator="ngram", num_speculative_tokens=4),
    )

    def draft(prompt: Prompt, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        running = next(s for s in engine.scheduler.running if s.prompt is prompt)
        drawn = len(token_ids) - len(prompt.token_ids)
        whole = reference[prompt.prompt_id, running.sample_index].token_ids
        return whole[drawn : drawn + max_tokens]

    engine.store.draft = draft  # type: ignore[method-assign]
    for completion in drain(engine, PROMPTS).values():
        assert completion.accepted == completion.drafted == [4] * (MAX_LENGTH // 5)


def test_the_step_counts_add_up_to_the_completions(llama: ModelRunner) -> None:
    engine = make_engine(
        llama,
        sampling=PLAIN,
        engine=EngineConfig(stream_width=3, max_batched_tokens=16),
        speculator=SpeculatorConfig(speculator="ngram", ngram_order=2),
    )
    for prompt in PROMPTS:
        engine.add(prompt)
    completions, steps = [], []
    while engine.has_work:
        completions += engine.step()
        assert engine.last_step is not None
        steps.append(engine.last_step)
    assert sum(s.num_new_tokens for s in steps) == sum(len(c.token_ids) for c in completions)
    assert sum(s.num_draft_tokens for s in steps) == sum(sum(c.drafted) for c in completions)
    assert sum(s.num_accepted_tokens for s in steps) == sum(sum(c.accepted) for c in completions)
    assert sum(s.num_decode_tokens for s in steps) == sum(len(c.accepted) for c in completions)
    assert max(s.num_running for s in steps) == 3
    assert all(before.time <= after.time for before, after in pairwise(steps))
