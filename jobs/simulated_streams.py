# SPDX-License-Identifier: Apache-2.0
"""The streams of simulated workers, in this process or in one of their own.

Invariants
- A worker's stream goes from one finished completion to the next; no token exists.

Used by: `jobs.simulated_pool`, `jobs.simulate`.
"""

import heapq
import math
import multiprocessing
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np

from streaminator.pool import SLICE_SECONDS, Part, WorkResult
from streaminator.progress import Report
from streaminator.sequence import Prompt

Slice = tuple[float, WorkResult, dict[tuple[str, int], "Row"]]
"""When it ends, what is reported, the rows of its part."""


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
    _ends: list[tuple[int, str, int, float]] = field(default_factory=list)
    _waiting: list[tuple[int, int, str]] = field(default_factory=list)
    _order: int = 0

    def work(
        self, prompts: Sequence[Prompt], min_open: int, num_to_release: int, now: float
    ) -> Slice:
        """What `Session.work` does, from `now` on; returns the time of its end as well."""
        for prompt in prompts:
            assert prompt.prompt_id not in self.left, "a prompt is given twice"
            self.left[prompt.prompt_id] = list(reversed(prompt.sample_indices))
            self.retries[prompt.prompt_id] = prompt.num_retries
            self._wait(prompt.prompt_id)
        released: list[str] = []
        self._release(num_to_release, released)
        end, first_step, slot_steps, num_finished = now + SLICE_SECONDS, self.step, 0, 0
        while self.left and now < end and not released:
            self._admit(now)
            seconds = self.step_seconds(len(self._ends))
            num_steps = min(self._ends[0][0] - self.step, max(1, math.ceil((end - now) / seconds)))
            now += num_steps * seconds
            self.step += num_steps
            slot_steps += num_steps * len(self._ends)
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
            num_running_slots_sum=slot_steps,
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


class Streams:
    """The streams of all workers."""

    def __init__(
        self,
        width: int,
        step_seconds: Callable[[int, int], float],
        steps_of: Callable[[str, int], int],
        part_seconds: float,
    ) -> None:
        """Args: step_seconds: by worker and running slots; steps_of: by prompt id and completion."""
        self._make = lambda worker: _Stream(
            worker, width, lambda running: step_seconds(worker, running), steps_of, part_seconds
        )
        self._streams: dict[int, _Stream] = {}
        self._slices = array("d")
        """Per slice: begin, end, share of the slots in use."""

    def start(self, worker: int) -> None:
        """An empty stream in the place of the one before."""
        self._streams[worker] = self._make(worker)

    def held(self, worker: int) -> set[str]:
        """Ids of the prompts a worker has not finished."""
        return set(self._streams[worker].left)

    def work(
        self,
        worker: int,
        prompts: Sequence[Prompt],
        min_open: int,
        num_to_release: int,
        begin: float,
    ) -> Slice:
        """One slice."""
        end, result, rows = self._streams[worker].work(prompts, min_open, num_to_release, begin)
        slots = result.report.num_slots_sum
        used = result.report.num_running_slots_sum / slots if slots else 0.0
        self._slices.extend((begin, end, used))
        return end, result, rows

    def busy(self, until: float) -> tuple[float, float]:
        """Seconds that all workers were busy until then, and that their slots were, on average."""
        begins, ends, used = np.array(self._slices).reshape(-1, 3).T
        busy = (ends.clip(max=until) - begins.clip(max=until)).clip(0)
        return float(busy.sum()), float((busy * used).sum())


class RemoteStreams:
    """`Streams` in a process of their own, so that the memory of this one is the driver's alone."""

    def __init__(self, *arguments: Any) -> None:
        """As those of `Streams`; they are sent to the process."""
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.join()

    def start(self, worker: int) -> None:
        """As there."""
        self._ask("start", worker)

    def held(self, worker: int) -> set[str]:
        """Not told: it would have to travel with every slice."""
        return set()

    def work(
        self,
        worker: int,
        prompts: Sequence[Prompt],
        min_open: int,
        num_to_release: int,
        begin: float,
    ) -> Slice:
        """As there, of the rows only those of prompts that lost a worker.

        A stream needs no text and no tokens.
        """
        light = [(p.prompt_id, p.sample_indices, p.num_retries) for p in prompts]
        return self._ask("work", worker, light, min_open, num_to_release, begin)

    def busy(self, until: float) -> tuple[float, float]:
        """As there."""
        return self._ask("busy", until)

    def _ask(self, *question: object) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()


def _serve(pipe: Connection, arguments: tuple[Any, ...]) -> None:
    streams = Streams(*arguments)
    while True:
        try:
            name, *rest = pipe.recv()
        except EOFError:
            return
        if name != "work":
            pipe.send(getattr(streams, name)(*rest))
        else:
            worker, light, *limits = rest
            prompts = [
                Prompt(
                    prompt_id=name,
                    token_ids=(),
                    text="",
                    question="",
                    sample_indices=indices,
                    num_retries=num_retries,
                )
                for name, indices, num_retries in light
            ]
            end, result, rows = streams.work(worker, prompts, *limits)
            retried = {key: row for key, row in rows.items() if row.num_retries}
            pipe.send((end, result, retried))
