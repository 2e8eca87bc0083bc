# SPDX-License-Identifier: Apache-2.0
"""The width a stream chooses: no wider than there is work, memory, or speed to gain."""

import pytest
import torch

import streaminator.engine.step_costs as step_costs
from streaminator.config import EngineConfig, SpeculatorConfig
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.stream_width import narrowest_fast
from tests.fakes import FREE, PROMPTS, Draws, drain, make_engine, tokens


def made_up(monkeypatch, seconds_of, *, fits: int = 10**6) -> list[tuple[int, int]]:
    """Let a step of so many tokens take `seconds_of` them; returns (width, tokens) as they are run."""
    steps = []

    def step(runner, cache, sampling, num_tokens, stream_width, num_top, context):
        if num_tokens > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        steps.append((stream_width, num_tokens))
        return seconds_of(num_tokens)

    monkeypatch.setattr(step_costs, "_step", step)
    return steps


def engine(llama: ModelRunner, max_in_flight: int | None = None, **values) -> Engine:
    return Engine(
        llama,
        None,
        sampling=FREE,
        engine=EngineConfig(**values),
        speculator=SpeculatorConfig(),
        max_prompt_length=40,
        max_in_flight=max_in_flight,
    )


@pytest.mark.parametrize(
    ("fixed", "per_row", "width"),
    [(1.0, 0.0, 256), (0.0, 1.0, 8), (20.0, 1.0, 256), (2.0, 1.0, 64), (0.5, 1.0, 16)],
)
def test_the_narrowest_stream_near_the_most_tokens_per_second(fixed, per_row, width):
    seconds = {2**n: fixed + per_row * 2**n for n in range(3, 9)}
    assert narrowest_fast(seconds) == width


def test_a_dent_in_the_curve_is_passed_over():
    assert narrowest_fast({8: 46.0, 16: 62.0, 32: 86.0, 64: 208.0, 128: 250.0}) == 128


def test_as_wide_as_it_pays(llama, monkeypatch):
    made_up(monkeypatch, lambda num: max(num, 32) / 1000)
    assert engine(llama).stream_width == 32
    assert engine(llama, stream_width=3).stream_width == 3


@pytest.mark.parametrize(
    ("limits", "width"),
    [
        ({"max_in_flight": 5}, 5),
        ({"max_in_flight": 20}, 20),
        ({"num_blocks": 41}, 10),
        ({"num_blocks": 9}, 2),
        ({"kv_memory": 41 * 4096 / 2**30}, 10),
    ],
    ids=str,
)
def test_no_wider_than_work_and_memory(llama, monkeypatch, limits, width):
    made_up(monkeypatch, lambda num: 0.01)
    assert engine(llama, **limits).stream_width == width


def test_what_has_no_room_or_is_slow_for_nothing_ends_the_search(llama, monkeypatch):
    made_up(monkeypatch, lambda num: 0.01, fits=64)
    assert engine(llama, max_in_flight=256).stream_width == 64
    steps = made_up(monkeypatch, lambda num: 0.1 * num)
    assert engine(llama).stream_width == 8
    assert max(width for width, _ in steps) == 16


def test_no_step_without_drafts_is_measured_for_the_budget_again(llama, monkeypatch):
    steps = made_up(monkeypatch, lambda num: max(num, 16) / 1000)
    assert engine(llama).stream_width == 16
    with_drafts = {num for width, num in steps if num > width}
    assert with_drafts == {24, 32, 48, 64, 128, 256, 512}
    quick = [num for width, num in steps if num == width]
    assert set(quick) == {8, 16, 32, 64, 128, 256}
    assert quick.count(8) == quick.count(16) + 1  # the first warms up


def test_a_stream_that_chooses_its_width_draws_the_same(llama: ModelRunner, free: Draws) -> None:
    stream = make_engine(llama, sampling=FREE, engine=EngineConfig(), max_prompt_length=40)
    assert stream.stream_width > 4
    assert tokens(drain(stream, PROMPTS)) == tokens(free)
