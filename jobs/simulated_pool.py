# SPDX-License-Identifier: Apache-2.0
"""Workers in virtual time: a pool whose workers only count steps, and can be lost, late or slow.

Invariants
- With `driver_costs_time`, what the caller computes between two calls moves the clock, so that
  workers wait for a slow driver.

Used by: `jobs.simulate`, the tests of `streaminator.dispatch`.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

from jobs.simulated_streams import RemoteStreams, Row, Streams
from streaminator.pool import (
    SLICE_SECONDS,
    Event,
    OpenRun,
    WorkerLost,
    WorkerReady,
    WorkerReported,
    WorkResult,
)
from streaminator.sequence import Prompt


class SimulatedPool:
    """`faults(worker, ids of its prompts)` decides what becomes of a slice.

    None: nothing; "hang": no report; "node": the machine is lost; anything else: why it died.
    """

    def __init__(
        self,
        num_workers: int,
        streams: Streams | RemoteStreams,
        *,
        joins_at: dict[int, float] | None = None,
        restarts_after: float = 5.0,
        latency: float = 0.01,
        call_seconds: float = 0.0,
        driver_costs_time: bool = False,
        faults: Callable[[int, set[str]], str | None] | None = None,
    ) -> None:
        """Args: latency: seconds between two slices of a worker; call_seconds: the driver's."""
        self.num_workers = num_workers
        self.device_names = ["simulated"] * num_workers
        self.now = 0.0
        self.faults = faults
        self.staged: dict[str, dict[tuple[str, int], Row]] = {}
        self.num_starts = [0] * num_workers
        self.largest_window = 0
        self.driver_seconds = 0.0
        """What the caller computed between two calls; counted with `driver_costs_time`."""
        self.last_new_at = 0.0
        """When a worker was last given a prompt that none had before."""
        self._passed_on: set[str] = set()
        self._streams = streams
        self._restarts_after = restarts_after
        self._latency, self._call_seconds = latency, call_seconds
        self._left_at = time.thread_time() if driver_costs_time else None
        self._heap: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._pending: set[int] = set()
        self._is_there = [False] * num_workers
        for index in range(num_workers):
            self._start(index, (joins_at or {}).get(index, 0.0))

    def open(self, run: OpenRun) -> None:
        """Nothing to open."""

    def start(self, worker: int) -> None:
        """A replacement is ready `restarts_after` seconds later."""
        self._start(worker, self.now + self._restarts_after)

    def _start(self, worker: int, at: float) -> None:
        self.num_starts[worker] += 1
        self._is_there[worker] = True
        self._streams.start(worker)
        self._push(at, WorkerReady(worker))

    def _push(self, at: float, event: Event) -> None:
        heapq.heappush(self._heap, (at, next(self._order), event))
        self._pending.add(event.worker)

    def submit(
        self, worker: int, prompts: Sequence[Prompt], min_open_prompts: int, num_to_release: int
    ) -> None:
        """Run the slice now; its report comes at its end."""
        self._enter()
        assert self._is_there[worker], "a dead worker is given prompts"
        assert worker not in self._pending, "two calls at once"
        names = {prompt.prompt_id for prompt in prompts}
        assert len(names) == len(prompts), "a prompt is given twice"
        if any(p.num_retries == 0 and p.prompt_id not in self._passed_on for p in prompts):
            self.last_new_at = self.now
        self._passed_on -= names
        self.spend(self._call_seconds)
        fault = None
        if self.faults:
            fault = self.faults(worker, names | self._streams.held(worker))
        if fault is None:
            at, result, rows = self._streams.work(
                worker, prompts, min_open_prompts, num_to_release, self.now + self._latency
            )
            self.largest_window = max(self.largest_window, result.num_open_prompts)
            self._passed_on.update(result.released)
            for part in result.parts:
                self.staged[part.path] = rows
            self._push(at, WorkerReported(worker, result))
        elif fault != "hang":
            self._push(self.now + SLICE_SECONDS / 2, WorkerLost(worker, fault, fault == "node"))
        self._leave()

    def spend(self, seconds: float) -> None:
        """The driver is busy for so long, beyond what it computes."""
        self.driver_seconds += seconds
        self.now += seconds

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
        self._is_there[worker] = False
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
            self.spend(time.thread_time() - self._left_at)

    def _leave(self) -> None:
        if self._left_at is not None:
            self._left_at = time.thread_time()
