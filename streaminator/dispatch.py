# SPDX-License-Identifier: Apache-2.0
"""Which worker gets which prompt, and what becomes of the prompts of a worker that is lost.

    source --> backlog --> worker --> parts published --> done
                  ^-- given back, or left by a lost worker --'
                  ^-- suspects: run alone --> poison: failed rows

Invariants
- A prompt is in one place: the backlog, suspects, or the works of one worker. It leaves a worker
  when all its completions are published, when the worker gives it back, or when the worker is given
  up. So two workers never draw the same prompt (affinity), and nothing is drawn twice.
- A part is published on the report of a worker that is not given up; the pool delivers no report
  of one that is. A fenced worker can go on writing where nobody looks.
- Bounded: a worker holds at most twice its stream width in open prompts, the backlog `_LOOKAHEAD` of
  these windows.
- Nothing waits for a worker that is not there, and no worker for the queues to be full.
- An event costs no look at every worker.

Used by: `driver`, `sampler_pool`.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from streaminator.backlog import Backlog, Work
from streaminator.errors import WorkerDiedError
from streaminator.pool import Event, Part, WorkerLost, WorkerReady, WorkerReported, Workers
from streaminator.progress import Report
from streaminator.sequence import Prompt

_LOOKAHEAD = 0.5
"""Windows of prompts that wait here for each worker: enough for 19 of 20 to find their home."""
_UNTIL_TOLD = 16
"""Stream width of a worker that has not told it."""
_READ_AT_ONCE = 64
"""Prompts read between two looks at the events, or a stream's width if that is more: reading and
tokenising takes 0.4 ms each."""
_DEATHS_IN_COMPANY = 2
"""Deaths of its worker after which a prompt runs alone."""
_DEATHS_ALONE = 2
"""Deaths that convict a prompt running alone."""
_DEATHS_IN_A_ROW = 5
"""Deaths without a finished completion between them after which a worker is not replaced."""
_FIRST_REPORT = 4
"""The first report of a worker may take this many times longer: kernels are compiled."""
_IDLE_SECONDS = 30.0
"""How long to wait for an event when no worker owes one."""


class Output(Protocol):
    """Where a dispatcher's results go."""

    def publish(self, part: Part) -> None:
        """Make a staged part visible. Raises: OutputError."""
        ...

    def record(
        self, kind: str, *, worker: int | None, detail: str, prompt_id: str | None = None
    ) -> None:
        """Write down something out of the ordinary."""
        ...

    def fail(self, prompt: Prompt, why: str) -> None:
        """Write failed rows for the completions that are left. Raises: OutputError."""
        ...


@dataclass(slots=True)
class _Worker:
    width: int
    works: dict[str, Work] = field(default_factory=dict)
    is_ready: bool = False
    is_busy: bool = False
    is_alone: bool = False
    """Whether it runs a suspect."""
    is_given_up: bool = False
    num_open: int = 0
    """Prompts in its stream; those that only wait to be published are not."""
    num_unpublished: int = 0
    num_deaths_in_a_row: int = 0
    submitted_at: float = 0.0
    deadline: float = math.inf
    has_reported: bool = False
    speed: float = 1.0
    """Steps a second."""

    @property
    def window(self) -> int:
        """Most open prompts."""
        return 2 * self.width


class Dispatcher:
    """Hands out prompts until every completion is published."""

    def __init__(
        self,
        pool: Workers,
        source: Iterator[Work],
        output: Output,
        *,
        stream_width: int | None,
        worker_timeout: float,
        ready: Mapping[int, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args beside the parts:
        stream_width: completions in flight on a worker; None: each tells its own.
        worker_timeout: seconds without a report after which a worker counts as hung.
        ready: workers that have told so already, with their stream widths.
        """
        self._pool = pool
        self._output = output
        self._timeout = worker_timeout
        self._clock = clock
        self._workers = [_Worker(stream_width or _UNTIL_TOLD) for _ in range(pool.num_workers)]
        room = _LOOKAHEAD * sum(worker.window for worker in self._workers)
        self._backlog = Backlog(source, len(self._workers), room)
        self._suspects: deque[Work] = deque()
        self._share_per_speed = 0.0
        """Open prompts a worker should have of all that are left, by its speed."""
        self._num_held = 0
        """Prompts that workers have, also those that only wait to be published."""
        self._num_open = 0
        self._speed = 0.0
        """Open prompts and speeds of the workers that are there and not alone, summed up."""
        self._read_at_once = max(_READ_AT_ONCE, self._workers[0].width)
        self._waiting: set[int] = set()
        """Workers that are ready and not busy."""
        for index, width in (ready or {}).items():
            with self._recount(index):
                self._take_up(WorkerReady(index, width))
        self._soonest = math.inf
        """No deadline is before it."""

    def run(self) -> Iterator[Report]:
        """Yields the workers' reports, and negative ones for what a lost worker had not published.

        Raises: WorkerDiedError when no worker is left; OutputError; InputError of a worker.
        """
        event = None
        while self._backlog.has_more or self._suspects or self._num_held:
            self._backlog.read_on(self._read_at_once)
            self._hand_out(self._waiting)
            event = event or self._pool.next_event(self._patience())
            num_heard = 0
            while event is not None and num_heard < len(self._workers):
                with self._recount(event.worker):
                    report = self._handle(event)
                if report is not None:
                    yield report
                # Nobody waits for the others, until the dataset is out: then all that have something
                # to say are heard first, and what is left is shared out among them. For a new one
                # there may have to be read first.
                if not self._backlog.is_read_out and not isinstance(event, WorkerReady):
                    self._hand_out(self._waiting & {event.worker})
                num_heard += 1
                event = self._pool.next_event(0.0)
            if event is None and self._clock() >= self._soonest:
                yield from self._lose_hung()

    def _handle(self, event: Event) -> Report | None:
        if isinstance(event, WorkerReported):
            return self._take_in(event)
        if isinstance(event, WorkerLost):
            return self._lose(event)
        self._take_up(event)
        return None

    def _take_up(self, event: WorkerReady) -> None:
        worker = self._workers[event.worker]
        worker.is_ready = True
        self._waiting.add(event.worker)
        self._backlog.room -= _LOOKAHEAD * worker.window
        worker.width = event.stream_width or worker.width
        self._read_at_once = max(self._read_at_once, worker.width)
        self._backlog.room += _LOOKAHEAD * worker.window

    def _patience(self) -> float:
        """How long the next event is waited for."""
        if self._backlog.has_room:
            return 0.0
        return max(0.0, min(self._soonest - self._clock(), _IDLE_SECONDS))

    @contextmanager
    def _recount(self, index: int) -> Iterator[None]:
        """Keep the sums over the workers right while one of them changes."""
        self._count(self._workers[index], -1)
        yield
        self._count(self._workers[index], 1)

    def _count(self, worker: _Worker, sign: int) -> None:
        self._num_held += sign * len(worker.works)
        if worker.is_ready and not worker.is_alone:
            self._num_open += sign * worker.num_open
            self._speed += sign * worker.speed

    def _hand_out(self, waiting: Iterable[int]) -> None:
        """Let every one of these workers go on that has, or gets, something to do."""
        has_unstarted = self._backlog.has_more or self._suspects
        free = [i for i in waiting if has_unstarted or self._workers[i].works]
        if not free:
            return
        if self._backlog.is_read_out:
            num_left = self._num_open + self._backlog.num_waiting
            self._share_per_speed = num_left / max(self._speed, 1e-9)
        # The fastest first: what a slow one gave back is not for itself.
        free.sort(key=lambda i: (-self._workers[i].speed, i))
        given = {index: self._give(index) for index in free}
        idle = [self._workers[i].speed for i in self._waiting if not self._workers[i].works]
        for index, new in given.items():
            if self._workers[index].works:
                self._submit(index, [work.as_prompt() for work in new], max(idle, default=0.0))

    def _give(self, index: int) -> list[Work]:
        worker = self._workers[index]
        with self._recount(index):
            new = self._take(index)
            for work in new:
                worker.works[work.prompt_id] = work
            worker.num_open += len(new)
        return new

    def _submit(self, index: int, prompts: list[Prompt], idle_speed: float) -> None:
        """`idle_speed`: of the fastest worker that has nothing; 0: all have something."""
        worker = self._workers[index]
        has_more = self._backlog.has_more and not worker.is_alone
        # Never more than it has: it would come back after every step.
        min_open = min(worker.window - worker.width // 2, worker.num_open) if has_more else 0
        # Not of one that is given some: they would go from hand to hand and no step be made.
        may_release = not (has_more or prompts or self._suspects)
        num_to_release = self._num_to_release(worker, idle_speed) if may_release else 0
        worker.is_busy = True
        self._waiting.discard(index)
        worker.submitted_at = self._clock()
        patience = self._timeout * (1 if worker.has_reported else _FIRST_REPORT)
        worker.deadline = worker.submitted_at + patience
        self._soonest = min(self._soonest, worker.deadline)
        self._pool.submit(index, prompts, min_open, num_to_release)

    def _take(self, index: int) -> list[Work]:
        worker = self._workers[index]
        if worker.is_alone:
            return []
        room = worker.window - worker.num_open
        if self._backlog.is_read_out:
            share = math.ceil(self._share_per_speed * worker.speed - 1e-6)  # the sums are rounded
            room = min(room, max(share, int(not worker.works)) - worker.num_open)
        taken = self._backlog.take(index, room)
        if not taken and not worker.works and self._suspects:
            taken.append(self._suspects.popleft())
            worker.is_alone = True
        return taken

    def _num_to_release(self, worker: _Worker, idle_speed: float) -> int:
        """In the tail: prompts that others, who have none, would finish sooner."""
        if worker.is_alone or not idle_speed:
            return 0
        keep = math.floor(self._share_per_speed * worker.speed + 0.5)
        if idle_speed < 1.5 * worker.speed:
            keep = max(keep, 1)  # moving the last one would gain nothing
        return max(0, worker.num_open - keep)

    def _take_in(self, event: WorkerReported) -> Report:
        worker, result = self._workers[event.worker], event.result
        worker.is_busy, worker.has_reported, worker.deadline = False, True, math.inf
        self._waiting.add(event.worker)
        worker.num_open = result.num_open_prompts
        seconds = self._clock() - worker.submitted_at
        if result.report.num_steps > 1 and seconds > 0:
            worker.speed = result.report.num_steps / seconds
        num_done = result.report.num_finished + result.report.num_failed
        if num_done:
            worker.num_deaths_in_a_row = 0
        worker.num_unpublished += num_done
        for part in result.parts:
            self._output.publish(part)
            self._count_published(worker, part)
        for kind, detail in result.events:
            self._output.record(kind, worker=event.worker, detail=detail)
        for prompt_id in result.released:
            self._backlog.give_back(worker.works.pop(prompt_id))
        if not worker.works:
            worker.is_alone = False
        return result.report

    def _count_published(self, worker: _Worker, part: Part) -> None:
        worker.num_unpublished -= len(part.keys)
        name = part.path.rpartition("/")[2]
        for prompt_id, sample_index in part.keys:
            work = worker.works[prompt_id]
            if not isinstance(work.left, list):
                work.left = list(work.left)  # all that wait share one
            work.left.remove(sample_index)
            if not work.parts or work.parts[-1] != name:
                work.parts = (*work.parts, name)
            if not work.left:
                del worker.works[prompt_id]

    def _lose_hung(self) -> Iterator[Report]:
        now = self._clock()
        for index, worker in enumerate(self._workers):
            if worker.deadline <= now:
                why = f"no report for {now - worker.submitted_at:.0f} s"
                with self._recount(index):
                    report = self._lose(WorkerLost(index, why), kind="worker hung")
                yield report
        self._soonest = min(worker.deadline for worker in self._workers)

    def _lose(self, event: WorkerLost, kind: str = "worker died") -> Report:
        """Give a worker up for good, pass on its prompts and ask for a replacement."""
        index, before = event.worker, self._workers[event.worker]
        # From here on nothing of it is heard, whatever it does: this is the fence.
        self._pool.kill(index)
        self._waiting.discard(index)
        self._output.record(kind, worker=index, detail=event.why)
        num_deaths = before.num_deaths_in_a_row + (not before.is_alone)
        after = self._workers[index] = _Worker(
            before.width, speed=before.speed, num_deaths_in_a_row=num_deaths
        )
        for work in before.works.values():
            work.num_retries += 1
            self._pass_on(work, index, event, was_alone=before.is_alone)
        if num_deaths < _DEATHS_IN_A_ROW:
            self._pool.start(index)
        else:
            after.is_given_up = True
            detail = f"lost {num_deaths} times in a row; the last time: {event.why}"
            self._output.record("worker given up", worker=index, detail=detail)
            if all(worker.is_given_up for worker in self._workers):
                raise WorkerDiedError(f"worker {index} {detail}; no worker is left")
        return Report(num_finished=-before.num_unpublished)

    def _pass_on(self, work: Work, index: int, event: WorkerLost, *, was_alone: bool) -> None:
        if not event.is_node_lost:
            work.num_deaths += 1
            work.num_deaths_alone += was_alone
        if work.num_deaths_alone >= _DEATHS_ALONE:
            why = f"its worker was lost {work.num_deaths} times, the last time: {event.why}"
            self._output.fail(work.as_prompt(), why)
            self._output.record("prompt failed", worker=index, detail=why, prompt_id=work.prompt_id)
        elif work.num_deaths >= _DEATHS_IN_COMPANY:
            self._suspects.append(work)
        else:
            self._backlog.give_back(work)
