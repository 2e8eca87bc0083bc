# SPDX-License-Identifier: Apache-2.0
"""Steps in the order that a GPU has them: the next forward is launched before a step is learned from.

A CPU computes in the order given, so what overlaps on a GPU comes one after another here.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from streaminator.config import EngineConfig, SamplingParams, SpeculatorConfig
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.sequence import Completion
from tests.fakes import ENGINES, draw, make_engine, make_prompt, random_tokens, tokens

pytestmark = pytest.mark.usefixtures("overlapping")

SAMPLING = SamplingParams(temperature=0.8, max_length=20)
SPECULATORS = {
    "off": SpeculatorConfig(spec_decoding=False),
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


@settings(
    max_examples=15, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(engine=ENGINES)
def test_a_narrow_stream_or_one_short_of_memory_changes_no_token(
    llama: ModelRunner, in_turn, engine: EngineConfig
) -> None:
    drawn = draw(llama, PROMPTS, sampling=SAMPLING, engine=engine, speculator=SPECULATORS["memory"])
    assert tokens(drawn) == tokens(in_turn["memory"])


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
    noted(engine.store, "learn_all", "learn")
    noted(engine.store, "finish", "finish")
    return seen


def test_a_step_is_learned_and_completions_come_out_after_the_next_forward_has_begun(
    llama: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculator = SpeculatorConfig(num_speculative_tokens=1)
    engine = make_engine(llama, sampling=SAMPLING, speculator=speculator)
    engine.add(PROMPTS[0])
    seen = watch(engine, monkeypatch)
    while engine.has_work:
        seen.extend("out" for _ in engine.step())
    assert seen[:4] == ["forward", "forward", "learn", "forward"]
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
    assert seen == ["forward", "learn"] * 2


def test_what_ended_before_memory_ran_out_comes_out_and_is_not_given_up_before(
    llama: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = draw(llama, PROMPTS, sampling=SAMPLING)
    engine = make_engine(llama, sampling=SAMPLING, engine=EngineConfig(stream_width=4))
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
