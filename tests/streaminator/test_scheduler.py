# SPDX-License-Identifier: Apache-2.0
"""Who runs when, and whose blocks are whose: scheduler and block manager without a model."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaminator.engine.block_manager import NULL_BLOCK, BlockManager
from streaminator.sequence import Prompt, Sequence
from tests.fakes import make_prompt
from tests.simulation import BLOCK_SIZE as SIZE
from tests.simulation import MAX_LENGTH, Simulation


def prompt(name: str, num_tokens: int, num_completions: int = 1, first: int = 0) -> Prompt:
    """A prompt of its own tokens, or of those of all prompts with the same `first`."""
    return make_prompt(name, range(first, first + num_tokens), num_completions)


def names(sequences: Iterable[Sequence]) -> list[str]:
    return [sequence.prompt.prompt_id for sequence in sequences]


PROMPT_SHAPES = st.lists(
    st.tuples(st.integers(1, 70), st.integers(1, 4), st.sampled_from([0, 1000])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    shapes=PROMPT_SHAPES,
    late=PROMPT_SHAPES,
    num_blocks=st.integers(8, 40),
    stream_width=st.integers(1, 6),
    max_batched_tokens=st.sampled_from([1, 7, 16, 512]),
    kv_cache=st.booleans(),
    continuous_batching=st.booleans(),
    in_flight_per_prompt=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_every_completion_ends_once_and_no_block_is_lost_or_read_by_a_stranger(
    shapes: list[tuple[int, int, int]],
    late: list[tuple[int, int, int]],
    num_blocks: int,
    stream_width: int,
    max_batched_tokens: int,
    kv_cache: bool,
    continuous_batching: bool,
    in_flight_per_prompt: int,
    seed: int,
) -> None:
    simulation = Simulation(
        num_blocks=num_blocks,
        stream_width=stream_width,
        max_batched_tokens=max_batched_tokens,
        kv_cache=kv_cache,
        continuous_batching=continuous_batching,
        in_flight_per_prompt=in_flight_per_prompt,
        seed=seed,
    )
    prompts = [prompt(f"p{i}", num, n, first) for i, (num, n, first) in enumerate(shapes)]
    simulation.add(prompts)
    for _ in range(5):
        if simulation.scheduler.num_open_prompts:
            simulation.step()
    more = [prompt(f"late{i}", num, n, first) for i, (num, n, first) in enumerate(late)]
    simulation.add(more)
    simulation.run()
    wanted = {(p.prompt_id, i) for p in prompts + more for i in p.sample_indices}
    assert set(simulation.retired) == wanted


def test_the_prompt_with_the_most_completions_left_is_admitted_first() -> None:
    simulation = Simulation(stream_width=2)
    simulation.add([prompt("few", 5, 1), prompt("many", 5, 4, 100), prompt("some", 5, 2, 200)])
    assert names(simulation.step(chance_to_end=1)) == ["many", "some"]
    # Of `many` 3 are left, of the others 1 each: the one added first is next.
    assert names(simulation.step(chance_to_end=1)) == ["many", "few"]
    assert names(simulation.step(chance_to_end=1)) == ["many", "some"]
    assert names(simulation.step(chance_to_end=1)) == ["many"]


def test_one_prompt_never_has_two_completions_in_flight() -> None:
    simulation = Simulation(stream_width=8)
    simulation.add([prompt("only", 5, 6)])
    while simulation.scheduler.num_open_prompts:
        assert len(simulation.step()) == 1
    assert simulation.retired == [("only", index) for index in range(6)]


def test_siblings_fill_slots_that_would_stay_empty_and_share_the_prompts_blocks() -> None:
    simulation = Simulation(stream_width=5, in_flight_per_prompt=3)
    simulation.add([prompt("p", 37, 4), prompt("q", 37, 1, 100)])
    first = simulation.step(max_draft=0, chance_to_end=0)
    assert names(first) == ["p", "q"], "siblings wait until the prompt is computed"
    scheduled = simulation.schedule()
    assert names(scheduled) == ["p", "q", "p", "p"]
    assert [s.num_cached_tokens for s in scheduled] == [37, 37, 32, 32]
    first, _, second, third = (s.block_table for s in scheduled)
    assert first[:2] == second[:2] == third[:2]
    assert len({table[2] for table in (first, second, third)}) == 3, "a block written by two"


def test_prompts_that_wait_come_before_siblings() -> None:
    simulation = Simulation(stream_width=2, in_flight_per_prompt=8)
    simulation.add([prompt(f"p{i}", 5, 3, 100 * i) for i in range(3)])
    while simulation.scheduler.num_open_prompts > 1:
        assert len(set(names(simulation.step(chance_to_end=0.4)))) == 2


def test_a_prompt_to_be_given_up_gets_no_more_siblings() -> None:
    simulation = Simulation(stream_width=4, in_flight_per_prompt=4)
    simulation.add([prompt("p", 5, 30)])
    simulation.step(chance_to_end=0)
    simulation.scheduler.release(1)
    started = len(simulation.started)
    while simulation.scheduler.num_open_prompts:
        simulation.step(chance_to_end=0.5)
    assert [p.prompt_id for p in simulation.scheduler.take_released()] == ["p"]
    assert len(simulation.started) == started


def test_a_slot_is_refilled_in_the_step_after_its_completion_ended() -> None:
    simulation = Simulation(stream_width=2)
    simulation.add([prompt(f"p{i}", 5, 1, 100 * i) for i in range(3)])
    simulation.scheduler.schedule()
    first, second = simulation.scheduler.running
    simulation.scheduler.retire(first)
    assert names(simulation.schedule()) == [second.prompt.prompt_id, "p2"]


def test_static_batching_refills_only_when_all_slots_are_empty() -> None:
    simulation = Simulation(stream_width=3, continuous_batching=False)
    simulation.add([prompt(f"p{i}", 5, 2, 100 * i) for i in range(4)])
    before = names(simulation.step(chance_to_end=0))
    while simulation.scheduler.num_open_prompts:
        was_empty = not simulation.scheduler.running
        now = names(simulation.step(chance_to_end=0.3))
        assert was_empty or set(now) <= set(before)
        before = now
    assert len(simulation.retired) == 8


def test_a_preempted_completion_keeps_its_tokens_and_comes_back() -> None:
    # 12 blocks for 3 sequences that grow to 5 each.
    simulation = Simulation(num_blocks=13, stream_width=3)
    simulation.add([prompt(f"p{i}", 50, 1, 100 * i) for i in range(3)])
    tokens: dict[str, list[int]] = {}
    while simulation.scheduler.num_open_prompts:
        for sequence in simulation.step(max_draft=0, chance_to_end=0):
            name = sequence.prompt.prompt_id
            assert sequence.token_ids[: len(tokens.get(name, []))] == tokens.get(name, [])
            tokens[name] = list(sequence.token_ids)
    assert simulation.num_preempted > 0
    assert {len(t) for t in tokens.values()} == {50 + MAX_LENGTH}
    assert sorted(simulation.started) == [(f"p{i}", 0) for i in range(3)], "started twice"


def test_a_completion_that_lost_its_blocks_while_its_last_token_was_on_its_way_ends() -> None:
    simulation = Simulation(num_blocks=13, stream_width=3)
    simulation.add([prompt(f"p{i}", 50, 2, 100 * i) for i in range(3)])
    while not simulation.num_preempted:
        simulation.step(max_draft=0, chance_to_end=0)
    [sequence] = simulation.scheduler._preempted
    simulation.scheduler.retire(sequence)
    simulation.retired.append((sequence.prompt.prompt_id, sequence.sample_index))
    simulation.scheduler.check_integrity()
    simulation.run()


def test_the_youngest_is_preempted_and_the_oldest_never() -> None:
    simulation = Simulation(num_blocks=13, stream_width=3)
    simulation.add([prompt(f"p{i}", 50, 1, 100 * i) for i in range(3)])
    while "p0" not in [name for name, _ in simulation.retired]:
        assert names(simulation.step(max_draft=0, chance_to_end=0))[0] == "p0"
    assert simulation.num_preempted > 0


def test_a_pool_of_one_sequence_still_finishes_everything() -> None:
    simulation = Simulation(num_blocks=1 + 5, stream_width=4)
    simulation.add([prompt(f"p{i}", 50, 3, 100 * i) for i in range(4)])
    simulation.run()
    assert len(simulation.retired) == 12


def test_the_second_completion_starts_from_the_prompts_blocks() -> None:
    simulation = Simulation()
    simulation.add([prompt("p", 39, 3)])
    while len(simulation.retired) < 1:
        simulation.step()
    for _ in range(2):
        assert simulation.manager.num_used == 3, "the prompt's blocks stay between completions"
        (sequence,) = simulation.schedule()
        assert sequence.num_cached_tokens == 38
        assert sequence.num_scheduled_tokens == 1
        simulation.scheduler.commit(sequence, 39)
        sequence.token_ids.append(7)
        simulation.retired.clear()
        while not simulation.retired:
            simulation.step()
    assert simulation.manager.num_used == 0


def test_blocks_of_idle_prompts_are_dropped_before_anyone_is_preempted() -> None:
    simulation = Simulation(num_blocks=1 + 12, stream_width=2)
    # Each leaves 4 blocks behind when it is idle, and needs up to 6.
    simulation.add([prompt("a", 64, 2), prompt("b", 64, 2, 100), prompt("c", 64, 3, 200)])
    while simulation.scheduler.num_open_prompts:
        simulation.step(max_draft=0, chance_to_end=0)
    assert len(simulation.retired) == 7
    assert simulation.num_preempted == 0


def test_a_draft_takes_free_blocks_only() -> None:
    simulation = Simulation(num_blocks=1 + 2, stream_width=2)
    simulation.add([prompt("a", 14, 1), prompt("b", 14, 1, 100)])
    first, second = simulation.schedule()
    # 14 tokens are known and 16 fit into the block that each has.
    assert simulation.scheduler.reserve_draft(first, 2) == 2
    assert simulation.scheduler.reserve_draft(second, 9) == 2
    assert simulation.num_preempted == 0


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    simulation = Simulation(max_batched_tokens=10, stream_width=2)
    simulation.add([prompt("short", 5, 1), prompt("long", 35, 1, 100)])
    chunks = []
    for _ in range(4):
        scheduled = simulation.step(max_draft=0, chance_to_end=0)
        chunks.append({s.prompt.prompt_id: s.num_cached_tokens for s in scheduled})
    assert chunks == [
        {"short": 5, "long": 5},
        {"short": 6, "long": 15},
        {"short": 7, "long": 25},
        {"short": 8, "long": 35},
    ]


def test_a_preamble_is_computed_once_and_waited_for() -> None:
    simulation = Simulation(max_batched_tokens=20, stream_width=3)
    common = tuple(range(40))  # 2 full blocks
    simulation.add([make_prompt(f"p{i}", (*common, 100 + i, 200 + i), 1) for i in range(3)])
    assert names(simulation.step(chance_to_end=0)) == ["p0"], "the others wait for the preamble"
    simulation.step(chance_to_end=0)
    scheduled = simulation.step(chance_to_end=0)
    assert sorted(names(scheduled)) == ["p0", "p1", "p2"]
    tables = {s.prompt.prompt_id: s.block_table for s in simulation.scheduler.running}
    assert tables["p0"][:2] == tables["p1"][:2] == tables["p2"][:2]
    assert len({tables[name][2] for name in tables}) == 3


def test_nobody_waits_for_a_preamble_whose_owner_is_gone() -> None:
    simulation = Simulation(max_batched_tokens=4, stream_width=2)
    common = tuple(range(40))
    simulation.add([make_prompt(f"p{i}", (*common, 100 + i), 1) for i in range(2)])
    (owner,) = simulation.step()
    simulation.scheduler.retire(owner)  # as after a failure
    assert names(simulation.schedule()) == ["p1"]


def test_prompts_without_a_common_block_do_not_wait_for_each_other() -> None:
    simulation = Simulation(max_batched_tokens=4, stream_width=3)
    simulation.add([prompt(f"p{i}", 40, 1, 100 * i) for i in range(3)])
    simulation.step()
    assert len(simulation.scheduler.running) == 3


def test_without_a_cache_every_step_computes_everything_and_keeps_nothing() -> None:
    simulation = Simulation(kv_cache=False, max_batched_tokens=4, stream_width=2)
    simulation.add([prompt("a", 40, 1), prompt("b", 20, 1, 100)])
    for _ in range(3):
        for sequence in simulation.schedule():
            assert sequence.num_scheduled_tokens == len(sequence.token_ids)
            sequence.token_ids.append(1)
            simulation.scheduler.commit(sequence, len(sequence.token_ids))
        assert simulation.manager.num_used == 0


def test_a_prompt_id_that_is_open_cannot_be_added_again() -> None:
    simulation = Simulation()
    simulation.add([prompt("p", 5, 1)])
    with pytest.raises(AssertionError, match="p is open already"):
        simulation.add([prompt("p", 5, 1)])


def test_waiting_prompts_are_those_without_a_completion_in_flight() -> None:
    simulation = Simulation(stream_width=2)
    simulation.add([prompt(f"p{i}", 5, 1, 100 * i) for i in range(5)])
    assert simulation.scheduler.num_open_prompts == 5
    simulation.step(chance_to_end=0)
    assert simulation.scheduler.num_open_prompts == 5
    assert simulation.scheduler.num_open_prompts - len(simulation.scheduler.running) == 3


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10_000), num_blocks=st.integers(2, 12))
def test_the_pool_survives_any_order_of_calls(seed: int, num_blocks: int) -> None:
    generator = random.Random(seed)
    manager = BlockManager(num_blocks, SIZE)
    tables: list[list[int]] = []
    keys = manager.prefix_keys(range(SIZE * 20))
    for _ in range(60):
        action = generator.randrange(4)
        if action == 0 and manager.num_free:
            tables.append(manager.allocate(generator.randint(1, manager.num_free)))
        elif action == 1 and tables:
            manager.free(tables.pop(generator.randrange(len(tables))))
        elif action == 2 and tables:
            for block in generator.choice(tables):
                manager.publish(block, generator.choice(keys))
        else:
            blocks = manager.cached_blocks(keys[: generator.randint(1, 20)])
            manager.share(blocks)
            tables.append(blocks)
        manager.check_integrity(tables)
        assert NULL_BLOCK not in {block for table in tables for block in table}
    for table in tables:
        manager.free(table)
    manager.check_integrity([])
    assert manager.num_used == 0


def test_keys_are_equal_only_where_all_tokens_up_to_there_are() -> None:
    manager = BlockManager(4, SIZE)
    text = list(range(50))
    assert len(manager.prefix_keys(text)) == 3
    assert manager.prefix_keys(text)[:2] == manager.prefix_keys(text[:40])
    other = [9, *text[1:]]
    assert not set(manager.prefix_keys(text)) & set(manager.prefix_keys(other))
    # Digits alone would not tell these apart.
    assert manager.prefix_keys([1, 23] * 8) != manager.prefix_keys([12, 3] * 8)


def test_a_freed_block_is_found_again_until_it_is_handed_out() -> None:
    manager = BlockManager(4, SIZE)
    keys = manager.prefix_keys(range(2 * SIZE))
    blocks = manager.allocate(2)
    for block, key in zip(blocks, keys, strict=True):
        manager.publish(block, key)
    manager.free(blocks)
    assert manager.cached_blocks(keys) == blocks
    manager.allocate(2)  # the one that was free all along, then the tail of the prefix
    assert manager.cached_blocks(keys) == blocks[:1]


def test_a_large_pool_is_touched_only_as_far_as_it_is_used_and_prefixes_stay() -> None:
    manager = BlockManager(1000, SIZE)
    keys = manager.prefix_keys(range(2 * SIZE))
    prompt = manager.allocate(2)
    for block, key in zip(prompt, keys, strict=True):
        manager.publish(block, key)
    touched = set(prompt)
    for _ in range(50):
        manager.share(prompt)
        tail = manager.allocate(3)
        touched.update(tail)
        manager.free(prompt + tail)
    manager.free(prompt)
    assert len(touched) == 5
    manager.free(manager.allocate(900))
    assert manager.cached_blocks(keys) == prompt


def test_damage_is_noticed() -> None:
    manager = BlockManager(4, SIZE)
    blocks = manager.allocate(2)
    with pytest.raises(AssertionError, match="reference counts"):
        manager.check_integrity([blocks[:1]])
    manager.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(blocks)
    with pytest.raises(AssertionError, match="blocks asked"):
        manager.allocate(4)
