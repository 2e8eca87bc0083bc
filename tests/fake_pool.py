# SPDX-License-Identifier: Apache-2.0
"""The simulated pool with faults by name, an output that checks, and a source that counts."""

import itertools
import random
from collections.abc import Callable, Iterator

from jobs.simulated_pool import SimulatedPool
from jobs.simulated_streams import Row, Streams
from streaminator.backlog import Work
from streaminator.dispatch import Dispatcher
from streaminator.pool import Part, WorkerReady
from streaminator.sequence import Prompt


class FakePool(SimulatedPool):
    """`faults(pool, worker, its prompts)` decides what becomes of a slice; speeds: steps a second."""

    def __init__(
        self,
        num_workers: int,
        *,
        width: int = 4,
        widths: dict[int, int] | None = None,
        speeds: dict[int, float] | None = None,
        joins_at: dict[int, float] | None = None,
        restarts_after: float = 5.0,
        faults: Callable[["FakePool", int, set[str]], str | None] = lambda *_: None,
        steps_of: Callable[[str, int], int] = lambda name, index: 10,
    ) -> None:
        self.width = width
        self._widths = widths
        self.most_open = [0] * num_workers
        self.source: Source | None = None
        streams = Streams(
            width,
            lambda worker, running: 1 / (speeds or {}).get(worker, 20.0),
            steps_of,
            part_seconds=3.0,
        )
        super().__init__(
            num_workers,
            streams,
            joins_at=joins_at,
            restarts_after=restarts_after,
            faults=lambda worker, held: faults(self, worker, held),
        )

    def submit(self, worker, prompts, min_open_prompts, num_to_release):
        num_open = len(self._streams.held(worker)) + len(prompts)
        assert min_open_prompts <= num_open, "it would come back after every step"
        self.most_open[worker] = max(self.most_open[worker], num_open)
        super().submit(worker, prompts, min_open_prompts, num_to_release)

    def next_event(self, timeout):
        event = super().next_event(timeout)
        if isinstance(event, WorkerReady) and self._widths:
            return WorkerReady(event.worker, self._widths[event.worker])
        return event


class FakeOutput:
    """What became visible; a row that is there twice is an error."""

    def __init__(self, pool: FakePool) -> None:
        self.pool = pool
        self.rows: dict[tuple[str, int], Row] = {}
        self.events: list[str] = []

    def publish(self, part: Part) -> None:
        for key, row in self.pool.staged.pop(part.path).items():
            assert key not in self.rows, f"{key} is published twice"
            self.rows[key] = row

    def record(self, kind, *, worker, detail, prompt_id=None) -> None:
        self.events.append(kind)

    def fail(self, prompt: Prompt, why: str) -> None:
        for index in prompt.sample_indices:
            assert (prompt.prompt_id, index) not in self.rows
            now = self.pool.now
            self.rows[prompt.prompt_id, index] = Row(-1, now, now, prompt.num_retries, why)


class Source:
    """Prompts p0, p1, ... that counts how many were taken."""

    def __init__(self, num_prompts: int, num_completions: int) -> None:
        self.num_prompts, self.num_completions = num_prompts, num_completions
        self.num_taken = 0

    def __iter__(self) -> Iterator[Work]:
        indices = tuple(range(self.num_completions))
        for number in range(self.num_prompts):
            self.num_taken += 1
            prompt = Prompt(
                prompt_id=f"p{number}", token_ids=(1,), text="", question="", sample_indices=indices
            )
            yield Work.of(prompt, indices)


def dispatch(
    pool: FakePool,
    *,
    num_prompts: int = 60,
    num_completions: int = 3,
    worker_timeout: float = 20.0,
    on_report: Callable[[Source, FakeOutput], None] = lambda *_: None,
) -> FakeOutput:
    """Run to the end; checks that each completion is there once and none of a prompt overlap."""
    output = FakeOutput(pool)
    source = pool.source = Source(num_prompts, num_completions)
    dispatcher = Dispatcher(
        pool,
        iter(source),
        output,
        stream_width=None if pool._widths else pool.width,
        worker_timeout=worker_timeout,
        clock=lambda: pool.now,
    )
    num_done = 0
    for report in dispatcher.run():
        num_done += report.num_finished
        assert pool.now < 1e6, "the run never ends"
        on_report(source, output)
    num_failed = sum(row.error is not None for row in output.rows.values())
    assert len(output.rows) == num_prompts * num_completions
    assert num_done == len(output.rows) - num_failed, "the counts shown do not add up"
    spans: dict[str, list[tuple[float, float]]] = {}
    for (name, _), row in output.rows.items():
        spans.setdefault(name, []).append((row.started_at, row.finished_at))
    for times in spans.values():
        times.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(times)), "completions overlap"
    return output


def random_faults(seed: int, rate: float, kinds: tuple[str, ...]):
    """Faults at random moments, the same for the same seed."""
    dice = random.Random(seed)
    return lambda pool, worker, held: dice.choice(kinds) if dice.random() < rate else None
