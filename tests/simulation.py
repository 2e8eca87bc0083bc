# SPDX-License-Identifier: Apache-2.0
"""A scheduler without a model."""

import random
from collections.abc import Iterable

from streaminator.engine.block_manager import NULL_BLOCK, BlockManager
from streaminator.engine.scheduler import Scheduler
from streaminator.sequence import Prompt
from streaminator.sequence import Sequence as Flying

BLOCK_SIZE = 16
MAX_LENGTH = 24
"""Tokens that a simulated completion has at most."""


class Simulation:
    """A scheduler whose forward is a dice; it checks the scheduler's invariants at every step."""

    def __init__(
        self,
        *,
        num_blocks: int = 200,
        stream_width: int = 4,
        max_batched_tokens: int = 512,
        kv_cache: bool = True,
        continuous_batching: bool = True,
        in_flight_per_prompt: int = 1,
        seed: int = 0,
    ) -> None:
        self.manager = BlockManager(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(
            self.manager,
            stream_width=stream_width,
            max_batched_tokens=max_batched_tokens,
            kv_cache=kv_cache,
            continuous_batching=continuous_batching,
            in_flight_per_prompt=in_flight_per_prompt,
            start=self.start,
        )
        self.max_batched_tokens = max_batched_tokens
        self.kv_cache = kv_cache
        self.random = random.Random(seed)
        self.started: list[tuple[str, int]] = []
        self.retired: list[tuple[str, int]] = []
        self.num_preempted = 0
        self.content: dict[int, tuple] = {}
        preempt = self.scheduler._preempt

        def count(sequence: Flying) -> None:
            self.num_preempted += 1
            preempt(sequence)

        self.scheduler._preempt = count  # type: ignore[method-assign]

    def start(self, prompt: Prompt, sample_index: int) -> Flying:
        self.started.append((prompt.prompt_id, sample_index))
        limit = len(prompt.token_ids) + MAX_LENGTH
        return Flying(prompt, sample_index, list(prompt.token_ids), 0, limit, 0.0)

    def add(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            self.scheduler.add(prompt)

    def schedule(self) -> list[Flying]:
        scheduled = self.scheduler.schedule()
        self.scheduler.check_integrity()
        running = self.scheduler.running
        assert len(running) <= self.scheduler.stream_width
        for sequence in scheduled:
            assert sequence in running
            num_tokens = sequence.num_cached_tokens + sequence.num_scheduled_tokens
            assert len(sequence.block_table) * BLOCK_SIZE >= num_tokens
            assert NULL_BLOCK not in sequence.block_table
        if self.kv_cache:
            chunks = [s.num_scheduled_tokens for s in scheduled if s.num_uncached_tokens > 1]
            assert sum(chunks) <= self.max_batched_tokens
        if self.scheduler.num_open_prompts:
            assert scheduled, "there is work and nobody does it"
        return scheduled

    def write(self, sequence: Flying, num_tokens: int) -> None:
        """Put into the blocks what a forward would, and check what it would read."""
        known = sequence.token_ids + sequence.draft
        for place in range(sequence.num_cached_tokens):
            block, offset = (
                sequence.block_table[place // BLOCK_SIZE],
                place % BLOCK_SIZE,
            )
            expected = tuple(sequence.token_ids[: place + 1])
            assert self.content[block * BLOCK_SIZE + offset] == expected, "keys of another text"
        for place in range(sequence.num_cached_tokens, num_tokens):
            block, offset = (
                sequence.block_table[place // BLOCK_SIZE],
                place % BLOCK_SIZE,
            )
            self.content[block * BLOCK_SIZE + offset] = tuple(known[: place + 1])

    def step(self, *, max_draft: int = 5, chance_to_end: float = 0.1) -> list[Flying]:
        scheduled = self.schedule()
        for sequence in scheduled:
            sequence.draft = []
            if sequence.is_sampled:
                num = self.random.randint(0, max_draft)
                num = self.scheduler.reserve_draft(sequence, num)
                sequence.draft = [self.random.randrange(50) for _ in range(num)]
                assert len(sequence.block_table) * BLOCK_SIZE >= len(sequence.token_ids) + num
        self.scheduler.check_integrity()
        for sequence in scheduled:
            cached = sequence.num_cached_tokens + sequence.num_scheduled_tokens
            self.write(sequence, cached + len(sequence.draft))
        for sequence in scheduled:
            cached = sequence.num_cached_tokens + sequence.num_scheduled_tokens
            num = 0
            if sequence.is_sampled:
                num = self.random.randint(0, len(sequence.draft))
                sequence.token_ids += [*sequence.draft[:num], self.random.randrange(50)]
                is_full = len(sequence.token_ids) >= sequence.max_num_tokens
                if is_full or self.random.random() < chance_to_end:
                    self.retired.append((sequence.prompt.prompt_id, sequence.sample_index))
                    self.scheduler.retire(sequence)
                    self.scheduler.check_integrity()
                    continue
            self.scheduler.commit(sequence, cached + num)
            self.scheduler.check_integrity()
        return scheduled

    def run(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.num_open_prompts:
                break
            self.step()
        assert not self.scheduler.num_open_prompts, "the work never ends"
        assert sorted(self.retired) == sorted(self.started)
        assert len(set(self.retired)) == len(self.retired)
        assert self.manager.num_used == 0
