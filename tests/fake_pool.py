# SPDX-License-Identifier: Apache-2.0
"""Workers in virtual time: a pool that can kill, freeze, slow down and withhold its workers."""

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from streaminator.dispatch import Dispatcher, Work
from streaminator.pool import Event, WorkerLost, WorkerReady, WorkerReported
from streaminator.progress import Report
from streaminator.sequence import Prompt
from streaminator.session import Part, WorkResult

SLICE = 1.0
PART_SECONDS = 3.0


@dataclass
class Row:
    worker: int
    started_at: float
    finished_at: float
    num_retries: int
    error: str | None = None


@dataclass
class FakeWorker:
    """A stream of `width` slots that makes `speed` steps a second of virtual time."""

    index: int
    width: int
    speed: float
    steps_of: Callable[[str, int], int]
    left: dict[str, list[int]] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    running: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    buffer: dict[tuple[str, int], Row] = field(default_factory=dict)
    oldest: float = 0.0

    def work(self, prompts, min_open, num_to_release, now) -> tuple[float, WorkResult, dict]:
        for prompt in prompts:
            self.left[prompt.prompt_id] = list(prompt.sample_indices)
            self.retries[prompt.prompt_id] = prompt.num_retries
        released: list[str] = []
        self._release(num_to_release, released)
        end, num_finished, num_steps = now + SLICE, 0, 0
        while self.left and now < end and not released:
            for name in list(self.left):
                if len(self.running) < self.width and name not in self.running:
                    index = self.left[name].pop(0)
                    self.running[name] = (index, self.steps_of(name, index), now)
            now += 1 / self.speed
            num_steps += 1
            for name, (index, steps, started) in list(self.running.items()):
                if steps > 1:
                    self.running[name] = (index, steps - 1, started)
                    continue
                del self.running[name]
                self.oldest = self.oldest if self.buffer else now
                row = Row(self.index, started, now, self.retries[name])
                self.buffer[name, index] = row
                num_finished += 1
                if not self.left[name]:
                    del self.left[name]
                elif len(released) < num_to_release:
                    self._release(num_to_release, released)
            if len(self.left) < min_open:
                break
        parts: tuple[Part, ...] = ()
        rows: dict[tuple[str, int], Row] = {}
        if self.buffer and (released or not self.left or now - self.oldest >= PART_SECONDS):
            rows, self.buffer = self.buffer, {}
            parts = (Part(path=f"staging/{id(rows)}", keys=tuple(rows)),)
        report = Report(num_finished=num_finished, num_steps=num_steps)
        result = WorkResult(
            report=report,
            num_open_prompts=len(self.left),
            parts=parts,
            released=tuple(released),
        )
        return now, result, rows

    def _release(self, num: int, released: list[str]) -> None:
        for name in [n for n in reversed(self.left) if n not in self.running]:
            if len(released) < num:
                del self.left[name]
                released.append(name)


class FakePool:
    """`faults(worker, generation, running prompts, now)` decides what becomes of a slice."""

    def __init__(
        self,
        num_workers: int,
        *,
        width: int = 4,
        speeds: dict[int, float] | None = None,
        joins_at: dict[int, float] | None = None,
        restarts_after: float = 5.0,
        faults: Callable[["FakePool", int, set[str]], str | None] = lambda *_: None,
        steps_of: Callable[[str, int], int] = lambda name, index: 10,
    ) -> None:
        self.num_workers = num_workers
        self.width = width
        self.now = 0.0
        self.speeds = speeds or {}
        self.joins_at = joins_at or {}
        self.restarts_after = restarts_after
        self.faults = faults
        self.steps_of = steps_of
        self.staged: dict[str, dict[tuple[str, int], Row]] = {}
        self.num_starts = [0] * num_workers
        self.largest_window = 0
        self._heap: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._workers: list[FakeWorker | None] = [None] * num_workers
        for index in range(num_workers):
            self._start(index, self.joins_at.get(index, 0.0))

    def start(self, worker: int) -> None:
        self._start(worker, self.now + self.restarts_after)

    def _start(self, worker: int, at: float) -> None:
        self.num_starts[worker] += 1
        speed = self.speeds.get(worker, 20.0)
        self._workers[worker] = FakeWorker(worker, self.width, speed, self.steps_of)
        self._push(at, WorkerReady(worker))

    def _push(self, at: float, event: Event) -> None:
        heapq.heappush(self._heap, (at, next(self._order), event))

    def submit(self, worker, prompts, min_open_prompts, num_to_release) -> None:
        stream = self._workers[worker]
        assert stream is not None, "a dead worker is given prompts"
        assert not [e for _, _, e in self._heap if e.worker == worker], "two calls at once"
        assert len({p.prompt_id for p in prompts} | set(stream.left)) == len(prompts) + len(
            stream.left
        ), "a prompt is given twice"
        at, result, rows = stream.work(prompts, min_open_prompts, num_to_release, self.now)
        self.largest_window = max(self.largest_window, len(stream.left))
        held = set(stream.left) | {p.prompt_id for p in prompts}
        fault = self.faults(self, worker, held)
        if fault == "hang":
            return  # its part, if any, stays where nobody looks
        if fault is not None:
            self._push(self.now + SLICE / 2, WorkerLost(worker, fault, fault == "node"))
            return
        for part in result.parts:
            self.staged[part.path] = rows
        self._push(max(at, self.now + 0.01), WorkerReported(worker, result))

    def next_event(self, timeout: float) -> Event | None:
        if not self._heap or self._heap[0][0] > self.now + timeout:
            self.now += timeout
            return None
        at, _, event = heapq.heappop(self._heap)
        self.now = max(self.now, at)
        return event

    def kill(self, worker: int) -> None:
        self._workers[worker] = None
        self._heap = [item for item in self._heap if item[2].worker != worker]
        heapq.heapify(self._heap)


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
            yield Work(prompt, set(indices), [])


def dispatch(
    pool: FakePool,
    *,
    num_prompts: int = 60,
    num_completions: int = 3,
    worker_timeout: float = 20.0,
    on_report: Callable[[Source, FakeOutput], None] = lambda *_: None,
) -> FakeOutput:
    """Run to the end; checks that each completion is there once and none of a prompt overlap."""
    output, source = FakeOutput(pool), Source(num_prompts, num_completions)
    dispatcher = Dispatcher(
        pool,
        iter(source),
        output,
        stream_width=pool.width,
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
