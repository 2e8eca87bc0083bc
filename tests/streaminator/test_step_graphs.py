# SPDX-License-Identifier: Apache-2.0
"""Steps that are replayed draw what steps that are run draw.

No CUDA graph can be had without a card: here what was captured is run again, on the memory that it
was captured with, which is what a graph would do. The tests marked `gpu` have real ones.
"""

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streaminator.config import EngineConfig, ModelConfig, SamplingParams, SpeculatorConfig
from streaminator.engine import sampler, step_costs, step_graphs
from streaminator.engine.batch import Batch
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.paged_attention import has_triton
from streaminator.engine.step_costs import measure_step_costs
from streaminator.engine.step_graphs import MEETINGS_TO_REPLACE, StepGraphs, Work
from streaminator.sequence import Prompt, Sequence
from tests.fakes import (
    NO_SPECULATION,
    Draws,
    drain,
    draw,
    late_tokens,
    load_gpu_like_runner,
    make_engine,
    make_prompt,
    random_tokens,
    save_model,
    tokens,
)

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.usefixtures("interpreter"),
]

BLOCK = 16
SAMPLING = SamplingParams(temperature=0.8, max_length=8, ignore_eos=True)
STREAM = EngineConfig(stream_width=2, max_batched_tokens=64)
# Triton's interpreter is slow: one layer, one KV head, and few tokens.
SMALL = {"num_hidden_layers": 1, "num_key_value_heads": 1}
SHORT = [make_prompt(f"p{n}", random_tokens(n, seed=n), 2) for n in (3, 20)]
# Four chunks, of which only the last is sampled; its completions reach a second split of keys.
PROMPTS = [*SHORT, make_prompt("p250", random_tokens(250, seed=250), 1)]


class Captures:
    """Stands for a card: counts what is captured and replayed."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, work: Work) -> Work:
        self.num_captured += 1
        work()

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay


def paged_runner(folder: Path, capture: Callable[[Work], Work]) -> ModelRunner:
    """A runner that pages on the CPU, and captures."""
    runner = load_gpu_like_runner(folder)
    runner._graphs = StepGraphs(lambda: capture)
    return runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "Llama", dtype=torch.float32, **SMALL)


def draw_alone(folder: Path) -> Draws:
    """One by one, and by the attention that gathers."""
    runner = ModelRunner(ModelConfig(model_name=str(folder), dtype="float32", device="cpu"))
    alone = EngineConfig(stream_width=1)
    return draw(runner, PROMPTS, sampling=SAMPLING, engine=alone, speculator=NO_SPECULATION)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Draws:
    return draw_alone(folder)


def draw_with(runner: ModelRunner, prompts: list[Prompt] = PROMPTS) -> Draws:
    return draw(runner, prompts, sampling=SAMPLING, engine=STREAM, speculator=SpeculatorConfig())


@pytest.mark.parametrize("head_dim", [8, 16])
def test_replayed_steps_draw_the_same(head_dim: int, tmp_path: Path) -> None:
    """Drafts with second choices, chunks of prompts, and streams that are not full.

    Layers with heads of 16 are fused.
    """
    folder = save_model(tmp_path, "Llama", dtype=torch.float32, **SMALL, head_dim=head_dim)
    captures = Captures()
    runner = paged_runner(folder, captures)
    drawn = draw_with(runner, PROMPTS if head_dim == 8 else SHORT)
    assert runner.is_paged
    assert (runner.layers == "fused") == (head_dim == 16)
    expected = tokens(draw_alone(folder))
    assert tokens(drawn) == {key: expected[key] for key in drawn}
    assert len(drawn) >= 4
    assert sum(sum(completion.accepted) for completion in drawn.values()) > 0
    assert captures.num_replayed > captures.num_captured > 0


@pytest.mark.parametrize("is_own", [True, False], ids=["own sampler", "PyTorch's"])
def test_replayed_steps_that_are_launched_ahead_draw_the_same(
    folder: Path, is_own: bool, overlapping: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn from a step's logits may be asked for when the next step has written its own."""
    # Of few candidates many tokens are none.
    monkeypatch.setattr(sampler, "NUM_CANDIDATES", 4)
    expected = draw_alone(folder)
    captures = Captures()
    runner = paged_runner(folder, captures)
    engine = make_engine(runner, sampling=SAMPLING, engine=STREAM, speculator=NO_SPECULATION)
    assert runner.sampling_kernels is not None
    if not is_own:
        runner.sampling_kernels = None
    settled = late_tokens(monkeypatch)
    drawn = drain(engine, SHORT)
    assert tokens(drawn) == {key: ids for key, ids in tokens(expected).items() if key in drawn}
    for key, completion in drawn.items():
        assert completion.logprobs == pytest.approx(expected[key].logprobs, abs=1e-4)
    assert bool(settled) != is_own
    assert captures.num_replayed > captures.num_captured > 0


@pytest.mark.parametrize("problem", ["not permitted when stream is capturing", "other logits"])
def test_where_graphs_fail_steps_run_without(
    folder: Path, expected: Draws, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(work: Work) -> Work:
        if problem != "other logits":
            raise RuntimeError(f"CUDA error: operation {problem}\nmore")
        return lambda: None  # a graph that computes nothing

    runner = paged_runner(folder, fail)
    with caplog.at_level(logging.WARNING, "streaminator"):
        drawn = tokens(draw_with(runner, SHORT))
    assert drawn == {key: ids for key, ids in tokens(expected).items() if key in drawn}
    assert [problem in message for message in caplog.messages] == [True]


def step_of(num_drafted: int) -> list[Sequence]:
    """One sequence, its newest token and a draft."""
    prompt = make_prompt("p", (1,) * 4)
    return [
        Sequence(
            prompt, 0, [1] * 5, 0, 0, 0.0,
            block_table=list(range(1, 2 + (5 + num_drafted) // BLOCK)),
            num_cached_tokens=4,
            num_scheduled_tokens=1,
            draft=[2] * num_drafted,
        )
    ]  # fmt: skip


def small_cache(runner: ModelRunner) -> KVCache:
    runner._use_paged[BLOCK] = True
    return KVCache(
        runner.shapes, num_blocks=20, block_size=BLOCK, dtype=runner.dtype, device=runner.device
    )


def test_few_graphs_are_kept_and_a_rare_shape_replaces_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 4)
    captures = Captures()
    runner = paged_runner(folder, captures)
    cache = small_cache(runner)
    graphs = StepGraphs(lambda: captures)

    def run(num_drafted: int, times: int) -> None:
        for _ in range(times):
            batch = runner.pack(step_of(num_drafted), BLOCK)
            graphs.run(lambda batch, cache: torch.ones(1, 4), batch, cache)

    for num_drafted in range(0, 48, 8):
        run(num_drafted, 3)
    assert graphs.num_graphs == captures.num_captured == 4
    assert captures.num_replayed == 2 * 4  # the first one of each is compared
    run(200, MEETINGS_TO_REPLACE + 1)
    assert graphs.num_graphs == 4
    assert captures.num_captured == 5
    assert graphs.was_usual


def test_only_steps_that_will_be_replayed_are_unusual(folder: Path) -> None:
    """What they take tells nothing of later ones, unlike what is never captured."""
    runner = paged_runner(folder, Captures())
    cache = small_cache(runner)
    graphs = StepGraphs(lambda: Captures())

    def are_usual(times: int) -> list[bool]:
        usual = []
        for _ in range(times):
            batch = runner.pack(step_of(1), BLOCK)
            graphs.run(lambda batch, cache: torch.ones(1, 4), batch, cache)
            usual.append(graphs.was_usual)
        return usual

    assert are_usual(4) == [False, False, True, True]
    runner._use_paged[BLOCK] = False  # steps are not padded
    assert are_usual(2) == [True, True]


def test_a_cache_that_has_grown_is_captured_anew(folder: Path) -> None:
    """What was captured would read and write where the keys lay before."""
    captures = Captures()
    runner = paged_runner(folder, captures)
    cache = small_cache(runner)
    graphs = StepGraphs(lambda: captures)
    for num_captured in (1, 2):
        for _ in range(3):
            batch = runner.pack(step_of(1), BLOCK)
            graphs.run(lambda batch, cache: torch.ones(1, 4), batch, cache)
        assert captures.num_captured == num_captured
        cache.grow(40)


def test_a_step_that_finds_no_memory_gives_back_what_graphs_hold(folder: Path) -> None:
    runner = paged_runner(folder, Captures())
    cache = small_cache(runner)
    # Like a card's graph it knows where the keys lie, and does not hold them.
    graphs = StepGraphs(lambda: lambda work: lambda: None)

    def forward(batch: Batch, cache: KVCache) -> torch.Tensor:
        if batch.num_tokens > 40:
            raise torch.OutOfMemoryError("no room")
        return torch.zeros(1, 4)

    for _ in range(3):
        graphs.run(forward, runner.pack(step_of(1), BLOCK), cache)
    assert graphs.num_graphs == 1
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(forward, runner.pack(step_of(60), BLOCK), cache)
    assert graphs.num_graphs == 0
    for _ in range(3):
        graphs.run(forward, runner.pack(step_of(1), BLOCK), cache)
    assert graphs.num_graphs == 1
    del cache
    gc.collect()
    assert graphs.num_graphs == 0


def test_steps_of_one_shape_have_their_numbers_in_the_same_places(folder: Path) -> None:
    runner = paged_runner(folder, Captures())
    runner._use_paged[BLOCK] = True
    one, other = (runner.pack(step_of(num), BLOCK) for num in (2, 3))
    assert one.shape == other.shape
    assert one.numbers is not None
    assert other.numbers is not None
    one.numbers.copy_(other.numbers)
    for mine, theirs in zip(one.groups, other.groups, strict=True):
        assert torch.equal(mine.rows, theirs.rows)
        assert torch.equal(mine.query_positions, theirs.query_positions)
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.sampled_rows, other.sampled_rows)


def test_step_costs_are_those_of_replayed_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is captured takes several times as long."""
    runner = paged_runner(folder, Captures())
    taken: list[tuple[int, bool]] = []
    step = step_costs._step

    def spied(*args: Any) -> float:
        seconds = step(*args)
        taken.append((args[3], runner.was_usual))
        return seconds

    monkeypatch.setattr(step_costs, "_step", spied)
    measure_step_costs(runner, STREAM, SAMPLING, stream_width=2, max_draft=3, num_top=0)
    assert len({size for size, _ in taken}) > 1
    assert all(was_usual for _, was_usual in taken)


def test_the_longest_draft_is_padded_like_the_others(folder: Path) -> None:
    """A group of its own would be another shape for each number of such drafts."""
    runner = paged_runner(folder, Captures())
    runner._use_paged[BLOCK] = True
    longest = SpeculatorConfig().max_draft
    (group,) = runner.pack([*step_of(longest), *step_of(1)], BLOCK).groups
    assert group.rows.shape == (2, longest + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Qwen3-MoE"])
def test_the_engine_draws_the_same_with_graphs(architecture: str, tmp_path: Path) -> None:
    """Experts may ask the host how many tokens each has: then they run without."""
    folder = save_model(tmp_path, architecture, dtype=torch.float32)
    drawn = []
    for graphs in (True, False):
        config = ModelConfig(
            model_name=str(folder), dtype="float32", device="cuda", cuda_graphs=graphs
        )
        runner = ModelRunner(config)
        drawn.append(tokens(draw_with(runner)))
        if graphs and architecture != "Qwen3-MoE":
            assert runner._graphs is not None
            assert runner._graphs.num_graphs > 0
            assert not runner._graphs.why_not
    assert drawn[0] == drawn[1]
