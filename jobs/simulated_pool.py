# SPDX-License-Identifier: Apache-2.0
"""Workers in virtual time: a pool whose workers only count steps, and can be lost, late or slow.

Invariants
- A worker's stream goes from one finished completion to the next; no token exists.
- With `driver_costs_time`, what the caller computes between two calls moves the clock, so that
  workers wait for a slow driver.

Used by: `jobs.simulate`, the tests of `streaminator.dispatch`.
"""

import heapq
import itertools
import math
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from streaminator.pool import SLICE_SECONDS, Event, OpenRun, WorkerLost, WorkerReady, WorkerReported
from streaminator.progress import Report
from streaminator.sequence import Prompt
from streaminator.session import Part, WorkResult


@dataclass(slots=True)
class Row:
    """A finished completion."""

    worker: int
    started_at: float
    finished_at: float
    num_retries: int
    error: str | None = None


@dataclass
class _Stream:
    """`width` slots; `step_seconds(running)` is what a step takes."""

    index: int
    width: int
    step_seconds: Callable[[int], float]
    steps_of: Callable[[str, int], int]
    part_seconds: float
    left: dict[str, list[int]] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    buffer: dict[tuple[str, int], Row] = field(default_factory=dict)
    oldest: float = 0.0
    step: int = 0
    slot_steps: int = 0
    _ends: list[tuple[int, str, int, float]] = field(default_factory=list)
    _waiting: list[tuple[int, int, str]] = field(default_factory=list)
    _order: int = 0

    def work(
        self, prompts: Sequence[Prompt], min_open: int, num_to_release: int, now: float
    ) -> tuple[float, WorkResult, dict[tuple[str, int], Row]]:
        """What `Session.work` does, from `now` on; returns the time of its end as well."""
        for prompt in prompts:
            self.left[prompt.prompt_id] = list(reversed(prompt.sample_indices))
            self.retries[prompt.prompt_id] = prompt.num_retries
            self._wait(prompt.prompt_id)
        released: list[str] = []
        self._release(num_to_release, released)
        end, first_step, self.slot_steps, num_finished = now + SLICE_SECONDS, self.step, 0, 0
        while self.left and now < end and not released:
            self._admit(now)
            seconds = self.step_seconds(len(self._ends))
            num_steps = min(self._ends[0][0] - self.step, max(1, math.ceil((end - now) / seconds)))
            now += num_steps * seconds
            self.step += num_steps
            self.slot_steps += num_steps * len(self._ends)
            while self._ends and self._ends[0][0] <= self.step:
                self._finish(now)
                num_finished += 1
                self._release(num_to_release, released)
            if len(self.left) < min_open:
                break
        parts: tuple[Part, ...] = ()
        rows: dict[tuple[str, int], Row] = {}
        if self.buffer and (released or not self.left or now - self.oldest >= self.part_seconds):
            rows, self.buffer = self.buffer, {}
            parts = (Part(path=f"staging/{self.index}-{now}-{id(rows)}", keys=tuple(rows)),)
        num_steps = self.step - first_step
        report = Report(
            num_finished=num_finished,
            num_steps=num_steps,
            num_running_slots_sum=self.slot_steps,
            num_slots_sum=num_steps * self.width,
        )
        result = WorkResult(
            report=report,
            num_open_prompts=len(self.left),
            parts=parts,
            released=tuple(released),
        )
        return now, result, rows

    def _wait(self, name: str) -> None:
        # As the engine's scheduler: whoever has the most completions left goes first.
        self._order += 1
        heapq.heappush(self._waiting, (-len(self.left[name]), self._order, name))

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._ends) < self.width:
            num_left, _, name = heapq.heappop(self._waiting)
            if name in self.running or len(self.left.get(name, ())) != -num_left:
                continue  # it was released since
            index = self.left[name].pop()
            self.running.add(name)
            heapq.heappush(self._ends, (self.step + self.steps_of(name, index), name, index, now))

    def _finish(self, now: float) -> None:
        _, name, index, started = heapq.heappop(self._ends)
        self.running.remove(name)
        self.oldest = self.oldest if self.buffer else now
        self.buffer[name, index] = Row(self.index, started, now, self.retries[name])
        if self.left[name]:
            self._wait(name)
        else:
            del self.left[name], self.retries[name]

    def _release(self, num: int, released: list[str]) -> None:
        if len(released) >= num:
            return
        for name in [n for n in reversed(self.left) if n not in self.running]:
            if len(released) < num:
                del self.left[name], self.retries[name]
                released.append(name)


class SimulatedPool:
    """`faults(worker, ids of its prompts)` decides what becomes of a slice.

    None: nothing; "hang": no report; "node": the machine is lost; anything else: why it died.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        width: int,
        step_seconds: Callable[[int, int], float],
        steps_of: Callable[[str, int], int],
        joins_at: dict[int, float] | None = None,
        restarts_after: float = 5.0,
        part_seconds: float = 5.0,
        latency: float = 0.01,
        driver_costs_time: bool = False,
        faults: Callable[[int, set[str]], str | None] | None = None,
    ) -> None:
        """Args: step_seconds: by worker and running slots; latency: seconds between two slices."""
        self.num_workers = num_workers
        self.device_names = ["simulated"] * num_workers
        self.width = width
        self.now = 0.0
        self.faults = faults
        self.staged: dict[str, dict[tuple[str, int], Row]] = {}
        self.num_starts = [0] * num_workers
        self.largest_window = 0
        self.driver_seconds = 0.0
        """What the caller computed between two calls; counted with `driver_costs_time`."""
        self.num_calls = 0
        self.last_new_at = 0.0
        """When a prompt was last given to a worker."""
        self.slices = array("d")
        """Per slice: begin, end, share of the slots in use."""
        self._step_seconds, self._steps_of = step_seconds, steps_of
        self._restarts_after, self._part_seconds = restarts_after, part_seconds
        self._latency = latency
        self._left_at = time.thread_time() if driver_costs_time else None
        self._heap: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._pending: set[int] = set()
        self._streams: list[_Stream | None] = [None] * num_workers
        for index in range(num_workers):
            self._start(index, (joins_at or {}).get(index, 0.0))

    def open(self, run: OpenRun) -> None:
        """Nothing to open."""

    def start(self, worker: int) -> None:
        """A replacement is ready `restarts_after` seconds later."""
        self._start(worker, self.now + self._restarts_after)

    def _start(self, worker: int, at: float) -> None:
        self.num_starts[worker] += 1
        self._streams[worker] = _Stream(
            worker,
            self.width,
            lambda running: self._step_seconds(worker, running),
            self._steps_of,
            self._part_seconds,
        )
        self._push(at, WorkerReady(worker))

    def _push(self, at: float, event: Event) -> None:
        heapq.heappush(self._heap, (at, next(self._order), event))
        self._pending.add(event.worker)

    def submit(
        self, worker: int, prompts: Sequence[Prompt], min_open_prompts: int, num_to_release: int
    ) -> None:
        """Run the slice now; its report comes at its end."""
        self._enter()
        stream = self._streams[worker]
        assert stream is not None, "a dead worker is given prompts"
        assert worker not in self._pending, "two calls at once"
        names = {prompt.prompt_id for prompt in prompts}
        assert len(names) == len(prompts), "a prompt is given twice"
        assert not names & stream.left.keys(), "a prompt is given twice"
        if prompts:
            self.last_new_at = self.now
        self.num_calls += 1
        begin = self.now + self._latency
        at, result, rows = stream.work(prompts, min_open_prompts, num_to_release, begin)
        self.largest_window = max(self.largest_window, len(stream.left))
        fault = self.faults(worker, names | stream.left.keys()) if self.faults else None
        if fault is None:
            slots = result.report.num_slots_sum
            used = result.report.num_running_slots_sum / slots if slots else 0.0
            self.slices.extend((begin, at, used))
            for part in result.parts:
                self.staged[part.path] = rows
            self._push(at, WorkerReported(worker, result))
        elif fault != "hang":  # of a hung one a part, if any, stays where nobody looks
            self._push(self.now + SLICE_SECONDS / 2, WorkerLost(worker, fault, fault == "node"))
        self._leave()

    def next_event(self, timeout: float) -> Event | None:
        """The next event, if it is due within `timeout`; the clock goes on to it."""
        self._enter()
        event = None
        if not self._heap or self._heap[0][0] > self.now + timeout:
            self.now += timeout
        else:
            at, _, event = heapq.heappop(self._heap)
            self._pending.discard(event.worker)
            self.now = max(self.now, at)
        self._leave()
        return event

    def kill(self, worker: int) -> None:
        """Forget the worker, and what it was asked."""
        self._streams[worker] = None
        self._pending.discard(worker)
        self._heap = [item for item in self._heap if item[2].worker != worker]
        heapq.heapify(self._heap)

    def close(self) -> Iterator[WorkResult]:
        """Everything is reported already."""
        return iter(())

    def shut_down(self) -> None:
        """Nothing to let go of."""

    def _enter(self) -> None:
        if self._left_at is not None:
            spent = time.thread_time() - self._left_at
            self.driver_seconds += spent
            self.now += spent

    def _leave(self) -> None:
        if self._left_at is not None:
            self._left_at = time.thread_time()
