# SPDX-License-Identifier: Apache-2.0
"""Steps in the order that a GPU has them: the next forward is launched before a step is learned from.

A CPU computes in the order given, so what overlaps on a GPU comes one after another here.
"""

import time
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streaminator.config import EngineConfig, SamplingParams, SpeculatorConfig
from streaminator.engine import sampler
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.sampler import Transfer
from streaminator.engine.speculation import Speculation
from streaminator.sequence import Completion, FinishReason
from streaminator.session import step_or_narrow
from streaminator.speculative.draft_budget import StepCosts
from tests.fakes import (
    ENGINES,
    NO_SPECULATION,
    TOKENIZER,
    VOCAB_SIZE,
    drain,
    draw,
    late_tokens,
    make_engine,
    make_prompt,
    random_tokens,
    tokens,
)

pytestmark = pytest.mark.usefixtures("overlapping")

SAMPLING = SamplingParams(temperature=0.8, max_length=20)
SPECULATORS = {
    "off": NO_SPECULATION,
    "ngram": SpeculatorConfig(speculator="ngram", num_speculative_tokens=4),
    "memory": SpeculatorConfig(),
    "memory that keeps what the model gave": SpeculatorConfig(store_distributions=True),
}
PROMPTS = [make_prompt(f"p{n}", random_tokens(n, seed=n), 3) for n in (4, 19, 33, 40)]


@pytest.fixture(scope="module")
def in_turn(llama: ModelRunner) -> dict[str, dict[tuple[str, int], Completion]]:
    engine = EngineConfig(stream_width=3, overlap=False)
    return {
        name: draw(llama, PROMPTS, sampling=SAMPLING, engine=engine, speculator=speculator)
        for name, speculator in SPECULATORS.items()
    }


@pytest.mark.parametrize("width", [1, 3, 16])
@pytest.mark.parametrize("name", SPECULATORS)
def test_overlapping_steps_change_no_token(
    llama: ModelRunner, in_turn, name: str, width: int
) -> None:
    engine = EngineConfig(stream_width=width)
    speculator = SPECULATORS[name]
    drawn = draw(llama, PROMPTS, sampling=SAMPLING, engine=engine, speculator=speculator)
    assert tokens(drawn) == tokens(in_turn[name])
    for key, completion in drawn.items():
        assert completion.logprobs == in_turn[name][key].logprobs
        assert len(completion.from_draft) == len(completion.token_ids)
        if completion.sample_index:
            before = drawn[completion.prompt.prompt_id, completion.sample_index - 1]
            assert before.finished_at <= completion.started_at, "two of one prompt were in flight"
        if completion.distributions:
            assert len(completion.distributions.top_ids) == len(completion.token_ids)


FULL = StepCosts([1, 512], [1e-3, 1e3])
"""A draft never pays."""


def test_without_drafts_a_step_is_launched_before_the_tokens_of_the_last_one_are_known(
    llama: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama, sampling=SAMPLING, speculator=NO_SPECULATION)
    engine.add(make_prompt("p", (1, 2, 3)))
    seen = watch(engine, monkeypatch)
    while engine.has_work:
        seen.extend("out" for _ in engine.step())
    assert forwards_and_waits(seen)[:6] == [
        "forward",
        "forward",
        "wait",
        "forward",
        "wait",
        "forward",
    ]
    # The last token's place is known: nothing is launched behind it.
    assert seen.count("forward") == seen.count("wait") == SAMPLING.max_length
    assert seen[-1] == "out"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0},
        {"top_p": 0.95},
        {"stop_token_ids": tuple(range(1, VOCAB_SIZE, 9))},
        {"stop": ("a",)},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "engine",
    [
        EngineConfig(stream_width=3),
        EngineConfig(stream_width=3, kv_cache=False),
        EngineConfig(stream_width=3, continuous_batching=False),
        EngineConfig(stream_width=4, num_blocks=7),
        EngineConfig(stream_width=8, in_flight_per_prompt=3, num_blocks=10),
    ],
    ids=["width3", "no_cache", "static", "few_blocks", "siblings"],
)
def test_wherever_completions_end_steps_launched_ahead_change_no_token(
    llama: ModelRunner, changes: dict, engine: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = replace(SAMPLING, **changes)
    # Of few candidates many tokens are none, and the device does not know these.
    monkeypatch.setattr(sampler, "NUM_CANDIDATES", 4)
    monkeypatch.setattr(llama, "sampling_kernels", None)
    settled = late_tokens(monkeypatch)
    drawn = [
        draw(
            llama, PROMPTS, sampling=params, engine=config, speculator=NO_SPECULATION,
            tokenizer=TOKENIZER,
        )
        for config in (engine, replace(engine, overlap=False))
    ]  # fmt: skip
    assert tokens(drawn[0]) == tokens(drawn[1])
    for key, completion in drawn[0].items():
        other = drawn[1][key]
        assert completion.text == other.text
        assert completion.logprobs == other.logprobs
        assert completion.finish_reason == other.finish_reason
        assert completion.from_draft == other.from_draft
        assert completion.drafted == completion.accepted == [0] * len(completion.token_ids)
    assert bool(settled) == (params.temperature > 0)


@pytest.mark.parametrize("speculator", ["off", "memory"])
def test_a_stream_that_rests_from_drafting_changes_no_token(
    llama: ModelRunner, in_turn, speculator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SPECULATORS[speculator]
    engine = make_engine(llama, sampling=SAMPLING, speculator=config, step_costs=FULL)
    seen = watch(engine, monkeypatch)
    drawn = drain(engine, PROMPTS)
    assert tokens(drawn) == tokens(in_turn[speculator])
    assert ("forward", "forward") in pairwise(forwards_and_waits(seen))


@settings(
    max_examples=15, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(engine=ENGINES, speculator=st.sampled_from(["off", "memory"]))
def test_a_narrow_stream_or_one_short_of_memory_changes_no_token(
    llama: ModelRunner, in_turn, engine: EngineConfig, speculator: str
) -> None:
    config = SPECULATORS[speculator]
    drawn = draw(llama, PROMPTS, sampling=SAMPLING, engine=engine, speculator=config)
    assert tokens(drawn) == tokens(in_turn[speculator])


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens from now on, in order."""
    seen: list[str] = []

    def noted(owner: object, name: str, word: str) -> None:
        original = getattr(owner, name)

        def note(*args: object, **kwargs: object) -> object:
            seen.append(word)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, note)

    noted(engine.runner, "forward", "forward")
    noted(Transfer, "wait", "wait")
    noted(engine.store, "learn_all", "learn")
    noted(engine.store, "finish", "finish")
    return seen


def forwards_and_waits(seen: list[str]) -> list[str]:
    return [word for word in seen if word in ("forward", "wait")]


def test_a_step_is_learned_and_completions_come_out_after_the_next_forward_has_begun(
    llama: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculator = SpeculatorConfig(num_speculative_tokens=1)
    engine = make_engine(llama, sampling=SAMPLING, speculator=speculator)
    engine.add(PROMPTS[0])
    seen = watch(engine, monkeypatch)
    while engine.has_work:
        seen.extend("out" for _ in engine.step())
    assert seen[:6] == ["forward", "wait", "forward", "learn", "wait", "forward"]
    # Each completion's end is learned, and it comes out, behind the first forward of the next one.
    places = [index for index, word in enumerate(seen) if word == "finish"]
    assert len(places) == seen.count("out") == 3
    for place in places[:2]:
        assert seen[place - 2 : place] == ["forward", "learn"]
    assert seen[-3:] == ["finish", "learn", "out"]


def test_with_no_overlap_a_step_is_learned_before_the_next_one(
    llama: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(
        llama,
        sampling=SAMPLING,
        engine=EngineConfig(stream_width=2, overlap=False),
        speculator=SpeculatorConfig(),
    )
    engine.add(PROMPTS[0])
    seen = watch(engine, monkeypatch)
    engine.step()
    engine.step()
    assert seen == ["forward", "wait", "learn"] * 2


@pytest.mark.parametrize("speculator", ["ngram", "off"])
def test_what_ended_before_memory_ran_out_comes_out_and_is_not_given_up_before(
    llama: ModelRunner, speculator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = draw(llama, PROMPTS, sampling=SAMPLING)
    engine = make_engine(
        llama,
        sampling=SAMPLING,
        engine=EngineConfig(stream_width=4, max_batched_tokens=16),
        speculator=SPECULATORS[speculator],
    )
    for prompt in PROMPTS:
        engine.add(prompt)
    drawn = []
    while not any(len(s.token_ids) + 1 == s.max_num_tokens for s in engine.scheduler.running):
        drawn += engine.step()
    engine.scheduler.release(1)
    forward = engine.runner.forward

    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.runner, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    monkeypatch.setattr(engine.runner, "forward", forward)
    engine.scheduler.narrow()
    assert engine.take_released() == []
    given_up = []
    while engine.has_work:
        drawn += engine.step()
        given_up += engine.take_released()
        for prompt in given_up:
            left = [c for c in drawn if c.prompt is prompt]
            assert len(left) < len(prompt.sample_indices)
    keys = {(c.prompt.prompt_id, c.sample_index) for c in drawn}
    assert len(keys) == len(drawn)
    assert given_up
    assert {c.prompt.prompt_id for c in drawn} == {p.prompt_id for p in PROMPTS}
    for completion in drawn:
        key = completion.prompt.prompt_id, completion.sample_index
        assert completion.token_ids == expected[key].token_ids


def test_the_draft_budget_is_told_what_the_gpu_waited_for(
    llama: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verifying, packing and the rest would be hidden behind a forward if nothing were drafted."""
    ticks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))

    def told(*, overlap: bool, costs: StepCosts) -> list[list[float]]:
        """What each step said that drafting took, in two calls."""
        engine = make_engine(
            llama,
            sampling=SAMPLING,
            engine=EngineConfig(stream_width=4, overlap=overlap),
            speculator=SpeculatorConfig(),
            step_costs=costs,
        )
        observe = engine._speculation.observe_step
        calls: list[list[float]] = []

        def note(*args: float, **kwargs: bool) -> None:
            calls[-1].append(args[6])
            observe(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(engine._speculation, "observe_step", note)
        for _ in range(2):
            calls.append([])
            drain(engine, PROMPTS)
        return calls

    free = StepCosts.free()
    assert set(told(overlap=False, costs=free)[0]) == {1}, "the phase of drafting alone"
    for call in told(overlap=True, costs=free):
        assert call[0] == 1, "nobody waited before"
        assert min(call[1:]) > 4, "and schedule, pack, verify and commit"
    assert 0 in told(overlap=True, costs=FULL)[0], "steps launched ahead"


@pytest.mark.parametrize("name", ["ahead", "behind", "with drafts"])
def test_memory_that_runs_out_where_a_token_is_settled_changes_no_token(
    llama: ModelRunner, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the next step was to be launched ahead, and is not any more ("behind")."""
    monkeypatch.setattr(sampler, "NUM_CANDIDATES", 4)
    monkeypatch.setattr(llama, "sampling_kernels", None)
    expected = draw(llama, PROMPTS, sampling=SAMPLING, speculator=NO_SPECULATION)
    speculator = SpeculatorConfig() if name == "with drafts" else NO_SPECULATION
    engine = make_engine(
        llama, sampling=SAMPLING, engine=EngineConfig(stream_width=4), speculator=speculator
    )
    forward, draw_rest = engine.runner.forward, sampler.draw_rest
    num_forwards = count()
    failures: list[str] = []

    def fail_forward(*args: Any) -> torch.Tensor:
        if name == "behind" and next(num_forwards) == 6:
            failures.append("forward")
            monkeypatch.setattr(Speculation, "rests_next", False)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args)

    def fail_settling(*args: torch.Tensor) -> torch.Tensor:
        if name == "with drafts":
            is_due = any(sequence.draft for sequence in engine.scheduler.running)
        else:
            is_due = engine._launched is not None and engine._launched.is_assumed
        if is_due and "settle" not in failures and (name != "behind" or failures):
            failures.append("settle")
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_rest(*args)

    monkeypatch.setattr(engine.runner, "forward", fail_forward)
    monkeypatch.setattr(sampler, "draw_rest", fail_settling)
    drawn = drain(engine, PROMPTS, lambda: step_or_narrow(engine)[0])
    assert failures == (["forward", "settle"] if name == "behind" else ["settle"])
    assert tokens(drawn) == tokens(expected)
    for key, completion in drawn.items():
        assert completion.logprobs == expected[key].logprobs


def test_after_the_last_completion_nothing_is_left_to_do(llama: ModelRunner) -> None:
    """Whoever goes on with the stream may change its weights then."""
    stop = draw(llama, PROMPTS[:1], sampling=SAMPLING, speculator=NO_SPECULATION)["p4", 0]
    params = replace(SAMPLING, stop_token_ids=(stop.token_ids[7],))
    engine = make_engine(llama, sampling=params, speculator=NO_SPECULATION)
    engine.add(replace(PROMPTS[0], sample_indices=(0,)))
    while not (drawn := engine.step()):
        assert engine.has_work
    assert drawn[0].finish_reason is FinishReason.STOP
    assert not engine.has_work
