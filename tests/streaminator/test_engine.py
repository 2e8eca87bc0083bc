# SPDX-License-Identifier: Apache-2.0
"""How completions end, how they fail, and what the speculators learn."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from streaminator.config import EngineConfig, SamplingParams, SpeculatorConfig
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.model_runner import ModelRunner
from streaminator.sequence import FinishReason, Prompt
from streaminator.speculative.store import SpeculatorStore
from tests.fakes import (
    CONTEXT,
    FREE,
    MAX_LENGTH,
    NO_SPECULATION,
    PROMPTS,
    TOKENIZER,
    VOCAB_SIZE,
    Draws,
    check_invariants,
    drain,
    draw,
    load_runner,
    make_engine,
    make_prompt,
    random_tokens,
    sampling,
    save_model,
    tokens,
)


def cut_after(token_ids: list[int], stops: set[int]) -> list[int]:
    """`token_ids` up to and with the first of `stops`."""
    for index, token in enumerate(token_ids):
        if token in stops:
            return token_ids[: index + 1]
    return token_ids


# How completions end


def test_without_a_stop_a_completion_ends_at_max_length(free: Draws) -> None:
    for completion in free.values():
        assert completion.finish_reason is FinishReason.LENGTH
        assert len(completion.token_ids) == MAX_LENGTH
        assert completion.error is None
        assert completion.started_at <= completion.finished_at


def test_max_length_1_gives_one_token(llama: ModelRunner, free: Draws) -> None:
    completions = draw(llama, PROMPTS, sampling=sampling(max_length=1))
    assert tokens(completions) == {key: c.token_ids[:1] for key, c in free.items()}


@pytest.mark.parametrize("spec_decoding", [True, False])
def test_a_stop_token_ends_the_completion_and_is_its_last_token(
    llama: ModelRunner, free: Draws, spec_decoding: bool
) -> None:
    stops = {free["p4", 0].token_ids[7], free["p33", 2].token_ids[3]}
    completions = draw(
        llama,
        PROMPTS,
        sampling=sampling(stop_token_ids=tuple(stops)),
        speculator=SpeculatorConfig(spec_decoding=spec_decoding),
    )
    for key, completion in completions.items():
        expected = cut_after(free[key].token_ids, stops)
        assert completion.token_ids == expected
        is_stopped = expected[-1] in stops
        assert completion.finish_reason is (
            FinishReason.STOP if is_stopped else FinishReason.LENGTH
        )
    assert completions["p4", 0].finish_reason is FinishReason.STOP


@contextmanager
def end_of_text(runner: ModelRunner, ids: int | list[int]) -> Iterator[None]:
    before = runner.model.generation_config.eos_token_id
    runner.model.generation_config.eos_token_id = ids
    try:
        yield
    finally:
        runner.model.generation_config.eos_token_id = before


@pytest.mark.parametrize("as_list", [True, False])
def test_the_models_end_of_text_ends_the_completion(
    llama: ModelRunner, free: Draws, as_list: bool
) -> None:
    eos = free["p19", 1].token_ids[9]
    with end_of_text(llama, [eos] if as_list else eos):
        completions = draw(llama, PROMPTS, sampling=FREE)
        ignoring = draw(llama, PROMPTS, sampling=sampling(ignore_eos=True))
    for key, completion in completions.items():
        assert completion.token_ids == cut_after(free[key].token_ids, {eos})
    assert completions["p19", 1].finish_reason is FinishReason.STOP
    assert tokens(ignoring) == tokens(free)


def test_ignore_eos_still_obeys_stop_token_ids(llama: ModelRunner, free: Draws) -> None:
    eos = free["p19", 1].token_ids[9]
    with end_of_text(llama, eos):
        completions = draw(
            llama, PROMPTS, sampling=sampling(ignore_eos=True, stop_token_ids=(eos,))
        )
    assert completions["p19", 1].token_ids == cut_after(free["p19", 1].token_ids, {eos})


@pytest.mark.parametrize("spec_decoding", [True, False])
@pytest.mark.parametrize(("first", "last"), [(6, 8), (7, 9), (5, 12), (0, 1)])
def test_a_stop_string_is_cut_from_the_text_and_its_tokens_are_kept(
    llama: ModelRunner, free: Draws, first: int, last: int, spec_decoding: bool
) -> None:
    # Tokens are two letters each: (7, 9) lies across a border, (0, 1) ends within a token.
    stop = free["p19", 0].text[first:last]
    completions = draw(
        llama,
        PROMPTS,
        sampling=sampling(stop=(stop, "never this")),
        tokenizer=TOKENIZER,
        speculator=SpeculatorConfig(spec_decoding=spec_decoding, ngram_order=2),
    )
    for key, completion in completions.items():
        whole = free[key].token_ids
        num = next(
            (n for n in range(1, len(whole) + 1) if stop in TOKENIZER.decode(whole[:n])), None
        )
        assert completion.token_ids == whole[:num]
        assert completion.text == free[key].text.split(stop)[0]
        assert completion.finish_reason is (
            FinishReason.LENGTH if num is None else FinishReason.STOP
        )
    assert completions["p19", 0].finish_reason is FinishReason.STOP


def test_the_first_of_several_stop_strings_cuts_the_text(llama: ModelRunner, free: Draws) -> None:
    text = free["p19", 0].text
    late, early = text[11:15], text[9:15]  # they end together and begin apart
    completions = draw(llama, PROMPTS, sampling=sampling(stop=(late, early)), tokenizer=TOKENIZER)
    assert completions["p19", 0].text == text[: text.find(early)]


def test_a_stop_string_in_the_prompt_does_not_end_the_completion(llama: ModelRunner) -> None:
    # The prompt's last letter and the completion's first one would make this stop string.
    prompt = PROMPTS[1]
    whole = draw(llama, [prompt], sampling=FREE, tokenizer=TOKENIZER)["p19", 0].text
    stop = TOKENIZER.decode(list(prompt.token_ids))[-1] + whole[:1]
    completion = draw(llama, [prompt], sampling=sampling(stop=(stop,)), tokenizer=TOKENIZER)
    assert completion["p19", 0].text == whole.split(stop)[0]
    assert completion["p19", 0].text != ""


def test_special_tokens_are_not_in_the_text(llama: ModelRunner) -> None:
    biased = sampling(max_length=60, temperature=3.0)
    completions = draw(llama, PROMPTS, sampling=biased, tokenizer=TOKENIZER)
    with_special = [c for c in completions.values() if 0 in c.token_ids]
    assert with_special
    for completion in with_special:
        assert "<eos>" not in completion.text
        num_letters = 2 * sum(token != 0 for token in completion.token_ids)
        assert len(completion.text) == num_letters


def test_without_a_tokenizer_there_are_tokens_and_no_text(llama: ModelRunner) -> None:
    completion = draw(llama, PROMPTS[:1], sampling=FREE)["p4", 0]
    assert completion.text == ""
    assert completion.token_ids


# Limits of the model


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A model with a context of 32 tokens."""
    folder = save_model(
        tmp_path_factory.mktemp("short"),
        "Llama",
        dtype=torch.float32,
        max_position_embeddings=32,
    )
    return load_runner(folder, "float32")


@pytest.mark.parametrize("spec_decoding", [True, False])
def test_a_full_context_ends_the_completion_by_length(
    short: ModelRunner, spec_decoding: bool
) -> None:
    prompts = [make_prompt(f"p{n}", random_tokens(n, seed=n), 2) for n in (4, 20, 31)]
    completions = draw(
        short,
        prompts,
        sampling=sampling(),
        speculator=SpeculatorConfig(spec_decoding=spec_decoding),
    )
    lengths = {key[0]: len(completion.token_ids) for key, completion in completions.items()}
    assert lengths == {"p4": MAX_LENGTH, "p20": 12, "p31": 1}
    assert {c.finish_reason for c in completions.values()} == {FinishReason.LENGTH}


@pytest.mark.parametrize(
    ("token_ids", "reason"),
    [
        (random_tokens(32, seed=1), "the prompt has 32 tokens and the model's context is 32"),
        (random_tokens(99, seed=1), "the prompt has 99 tokens and the model's context is 32"),
        ((), "the prompt has no tokens"),
        ((1, VOCAB_SIZE), f"from 1 to {VOCAB_SIZE} and the model's vocabulary is 128"),
        ((-1, 5), "from -1 to 5 and the model's vocabulary is 128"),
    ],
    ids=["as_long_as_the_context", "longer_than_the_context", "empty", "unknown_token", "negative"],
)
def test_an_impossible_prompt_fails_with_its_reason_and_the_others_run(
    short: ModelRunner, token_ids: tuple[int, ...], reason: str
) -> None:
    good = [make_prompt(f"p{n}", random_tokens(n, seed=n), 2) for n in (4, 20)]
    bad = make_prompt("bad", token_ids, 2)
    completions = draw(short, [good[0], bad, good[1]], sampling=sampling(), tokenizer=TOKENIZER)
    for index in (0, 1):
        failed = completions.pop(("bad", index))
        assert failed.finish_reason is FinishReason.FAILED
        assert reason in (failed.error or "")
        assert failed.token_ids == failed.logprobs == failed.from_draft == []
        assert failed.text == ""
    assert tokens(completions) == tokens(draw(short, good, sampling=sampling()))
    assert all(completion.error is None for completion in completions.values())


def test_a_prompt_that_needs_more_blocks_than_there_are_fails_and_says_what_to_do(
    llama: ModelRunner,
) -> None:
    engine = EngineConfig(num_blocks=4)  # 3 of 16 tokens
    prompts = [make_prompt("fits", random_tokens(28, 1)), make_prompt("big", random_tokens(29, 1))]
    completions = draw(llama, prompts, sampling=sampling(), engine=engine)
    assert completions["fits", 0].error is None
    assert "--num_blocks" in (completions["big", 0].error or "")


@pytest.mark.parametrize("stream_width", [16, 1])
def test_a_prompt_longer_than_the_cache_was_sized_for_still_runs(
    llama: ModelRunner, stream_width: int
) -> None:
    prompt = make_prompt("long", random_tokens(CONTEXT - MAX_LENGTH, seed=1))
    stream = make_engine(
        llama,
        sampling=sampling(),
        engine=EngineConfig(stream_width=stream_width),
        max_prompt_length=64,
    )
    completion = drain(stream, [prompt])["long", 0]
    assert completion.error is None
    assert len(completion.token_ids) == MAX_LENGTH


def test_a_prompt_for_which_no_memory_is_left_fails_and_the_others_run(
    llama: ModelRunner, free: Draws, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = EngineConfig(stream_width=1)
    engine = make_engine(llama, sampling=FREE, engine=width, max_prompt_length=64)

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(KVCache, "_zeros", fails)
    long = make_prompt("long", random_tokens(CONTEXT - MAX_LENGTH, seed=1))
    drawn = drain(engine, [long, PROMPTS[0]])
    failed = drawn.pop(("long", 0))
    assert failed.finish_reason is FinishReason.FAILED
    assert "memory is short (CUDA out of memory" in (failed.error or "")
    name = PROMPTS[0].prompt_id
    assert tokens(drawn) == {key: ids for key, ids in tokens(free).items() if key[0] == name}


# Prompts come and go


def test_an_engine_that_is_given_up_frees_its_cache_at_once(llama: ModelRunner) -> None:
    """The next one sizes its own by what is free."""
    gc.collect()
    gc.disable()
    try:
        engine = make_engine(llama, tokenizer=TOKENIZER, sampling=FREE)
        assert list(engine.run(PROMPTS))
        cache = weakref.ref(engine._cache)
        del engine
        assert cache() is None
    finally:
        gc.enable()


def test_run_yields_every_completion_as_it_finishes(llama: ModelRunner, free: Draws) -> None:
    engine = make_engine(llama, sampling=FREE, engine=EngineConfig(stream_width=2))
    seen = {}
    for completion in engine.run(PROMPTS):
        check_invariants(engine)
        seen[completion.prompt.prompt_id, completion.sample_index] = completion.token_ids
    assert seen == tokens(free)
    assert not engine.has_work


def test_completions_of_a_prompt_finish_in_the_order_asked_for(llama: ModelRunner) -> None:
    prompt = Prompt(
        prompt_id="p4",
        token_ids=PROMPTS[0].token_ids,
        text="",
        question="",
        sample_indices=(2, 0, 7),
    )
    engine = make_engine(llama, sampling=FREE)
    assert [completion.sample_index for completion in engine.run([prompt])] == [2, 0, 7]


def test_completions_of_a_prompt_do_not_overlap_in_time(free: Draws) -> None:
    for prompt in PROMPTS:
        for index in range(2):
            before, after = (free[prompt.prompt_id, i] for i in (index, index + 1))
            assert before.finished_at <= after.started_at


def test_an_engine_without_work_does_nothing(llama: ModelRunner) -> None:
    engine = make_engine(llama, sampling=FREE)
    assert not engine.has_work
    assert engine.step() == []


def test_a_prompt_id_may_be_used_again_after_its_completions_are_out(
    llama: ModelRunner, free: Draws
) -> None:
    engine = make_engine(llama, sampling=FREE)
    for _ in range(2):
        assert tokens(drain(engine, PROMPTS)) == tokens(free)


def test_memory_is_that_of_the_open_prompts(llama: ModelRunner) -> None:
    engine = make_engine(llama, sampling=FREE)
    for _ in range(3):
        drain(engine, PROMPTS)
        assert engine.store.num_bytes == 0
        assert engine.scheduler.block_manager.num_used == 0
        assert not engine.scheduler._open
        assert not engine.scheduler._computing


# What the speculators learn


def test_speculators_stay_within_their_memory(llama: ModelRunner, free: Draws) -> None:
    engine = make_engine(llama, sampling=FREE, engine=EngineConfig(stream_width=3))
    store = engine.store
    cap = store._max_bytes = 40_000  # one of these prompts' speculators, not three
    completions: dict = {}
    most = 0
    for prompt in PROMPTS:
        engine.add(prompt)
    while engine.has_work:
        completions |= {(c.prompt.prompt_id, c.sample_index): c for c in engine.step()}
        held = sum(speculator.num_bytes for speculator in store._speculators.values())
        assert store.num_bytes == held
        assert held <= cap or len(store._speculators) == 1
        most = max(most, held)
    assert most > cap / 2, "the cap was never in reach"
    assert tokens(completions) == tokens(free)


def repetitive(name: str) -> Prompt:
    return make_prompt(name, [3, 4, 5, 6] * 5)


def drafts(config: SpeculatorConfig, completion: list[int]) -> tuple[list[int], list[int]]:
    """Drafts after the prompt's pattern, before and after a completion was observed."""
    store = SpeculatorStore(config)
    prompt = repetitive("p")
    before = store.draft(prompt, [1, 2, 3, 4], 3)
    store.observe(prompt, completion)
    return before, store.draft(prompt, [1, 2, 3, 4], 3)


def test_the_three_regimes_learn_from_what_they_are_told_to() -> None:
    completion = [3, 4, 9, 8] * 9
    both = SpeculatorConfig(speculator="ngram")
    assert drafts(both, completion) == ([5, 6, 3], [9, 8, 3])
    prompt_only = SpeculatorConfig(speculator="ngram", generation_training=False)
    assert drafts(prompt_only, completion) == ([5, 6, 3], [5, 6, 3])
    generations_only = SpeculatorConfig(speculator="ngram", prompt_training=False)
    assert drafts(generations_only, completion) == ([], [9, 8, 3])


def test_a_prompts_speculator_learns_nothing_from_other_prompts() -> None:
    store = SpeculatorStore(SpeculatorConfig(speculator="ngram"))
    store.observe(repetitive("one"), [3, 4, 9, 8] * 9)
    assert store.draft(repetitive("other"), [1, 2, 3, 4], 3) == [5, 6, 3]


def test_a_resumed_prompts_speculator_knows_its_finished_completions() -> None:
    store = SpeculatorStore(SpeculatorConfig(speculator="ngram"))
    prompt = make_prompt("p", [3, 4, 5, 6] * 5, finished=((3, 4, 9, 8) * 9,))
    assert store.draft(prompt, [1, 2, 3, 4], 3) == [9, 8, 3]


def test_a_dropped_speculator_starts_again_from_its_prompt() -> None:
    store = SpeculatorStore(SpeculatorConfig(speculator="ngram"))
    prompt = repetitive("p")
    store.observe(prompt, [3, 4, 9, 8] * 9)
    store.drop(prompt)
    assert store.num_bytes == 0
    assert store.draft(prompt, [1, 2, 3, 4], 3) == [5, 6, 3]


@pytest.mark.parametrize("regime", ["both", "prompt", "generations"])
def test_a_model_that_repeats_itself_has_its_drafts_accepted(
    llama: ModelRunner, regime: str
) -> None:
    # Greedy completions of a prompt are all the same, and its end is a repetition of its start.
    config = SpeculatorConfig(
        speculator="ngram",
        prompt_training=regime != "generations",
        generation_training=regime != "prompt",
    )
    greedy = SamplingParams(temperature=0, max_length=30)
    start = make_prompt("start", random_tokens(9, seed=2))
    said = draw(llama, [start], sampling=greedy)["start", 0].token_ids
    prompt = make_prompt("p", (*start.token_ids, *said, *start.token_ids), 3)
    completions = draw(llama, [prompt], sampling=greedy, speculator=config)
    accepted = [sum(completions["p", index].accepted) for index in range(3)]
    if regime == "prompt":
        assert accepted[0] == accepted[1] == accepted[2]
    else:
        assert accepted[0] < accepted[1] == accepted[2]
        assert accepted[1] >= 20
    assert (sum(completions["p", 0].drafted) == 0) is (regime == "generations")


def test_without_speculation_nothing_is_drafted(llama: ModelRunner) -> None:
    completions = draw(llama, PROMPTS, sampling=FREE, speculator=NO_SPECULATION)
    for completion in completions.values():
        assert completion.drafted == completion.accepted == [0] * MAX_LENGTH
        assert not any(completion.from_draft)
