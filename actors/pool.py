# SPDX-License-Identifier: Apache-2.0
"""The driver's workers as Ray actors.

Invariants
- At most one call per worker is pending: load, then open, then work after work.
- Prompts go to a worker, ids and counts come back; tokens stay with the worker, which writes them.
- The pending call of a killed worker is forgotten, so that nothing it still says is heard.
- Workers that cannot be placed are waited for by nobody, except that the first must come.

Used by: `jobs.sample`, `actors.sampler_pool`.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    RayError,
    RayTaskError,
)

from actors.worker import SamplerWorker, Worker
from streaminator.config import JobConfig
from streaminator.errors import (
    InputError,
    StreaminatorError,
    WorkerDiedError,
    first_line,
    kind_and_line,
)
from streaminator.pool import (
    Event,
    OpenRun,
    WorkerLost,
    WorkerReady,
    WorkerReported,
    WorkResult,
    say_opened,
)
from streaminator.progress import Opened
from streaminator.sequence import Prompt

CLOSE_SECONDS = 30.0
"""How long a worker may take to write out its rows at the end."""
_GRACE_SECONDS = 10.0
"""How long the first loaded worker waits for the others before the run begins without them."""
_MESSAGE_SECONDS = 15.0
"""How often to tell what is waited for, while there is no worker."""


class RayPool:
    """`num_workers` actors on a Ray that is connected already."""

    def __init__(
        self,
        config: JobConfig,
        *,
        num_workers: int,
        num_cpus: float,
        num_gpus: float,
        resources: dict[str, float] | None = None,
        describe: Callable[[], str] = lambda: "",
        worker_class: type[Worker] = SamplerWorker,
    ) -> None:
        """Start the actors and wait until one has loaded the model, and a moment for the others.

        Args:
            config: resolved settings.
            num_workers: number of actors.
            num_cpus: cores of each; also its number of threads on a CPU.
            num_gpus: GPUs of each.
            resources: custom resources of each.
            describe: says what the cluster has, for the message while waiting.
            worker_class: made into the actors; a `Worker` that has `open`, and `close` if the pool is closed.

        Raises: InputError of a worker that cannot load the model; WorkerDiedError.
        """
        self.num_workers = num_workers
        self._config = config
        self._num_threads = None if num_gpus else max(1, int(num_cpus))
        self._describe = describe
        # A call is tried once: whatever becomes of it, the driver decides.
        self._actor = ray.remote(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            resources=resources or {},
            max_restarts=0,
            max_task_retries=0,
        )(worker_class)
        self._workers: list[Any] = [None] * num_workers
        self._devices: dict[int, str] = {}
        self.pids: dict[int, int] = {}
        """Process of each worker that is there, on its own machine."""
        self.opened: dict[int, Opened] = {}
        self._run: Any = None
        self._loaded: set[int] = set()
        self._pending: dict[Any, tuple[int, str]] = {}
        self._events: deque[Event] = deque()
        self._was_ready = False
        self._quiet_until = time.monotonic() + _MESSAGE_SECONDS
        try:
            for worker in range(num_workers):
                self.start(worker)
            self._wait_for_first()
        except BaseException:
            self.shut_down()
            raise

    @property
    def device_names(self) -> list[str]:
        """The devices of the workers that are there."""
        return [self._devices[worker] for worker in sorted(self._devices)]

    def open(self, run: OpenRun) -> None:
        """Let every worker open the run as soon as it has loaded the model."""
        self._open(run)

    def _open(self, run: object) -> None:
        """As `open`; what workers were asked for an earlier run is not waited for any more."""
        self._pending = {ref: call for ref, call in self._pending.items() if call[1] == "load"}
        lost = (event for event in self._events if isinstance(event, WorkerLost))
        self._events = deque(event for event in lost if event.refused is None)
        self._run = run
        for worker in sorted(self._loaded):
            self._call(worker, "open", run)

    def submit(
        self, worker: int, prompts: Sequence[Prompt], min_open_prompts: int, num_to_release: int
    ) -> None:
        """Let a worker go on, with new prompts."""
        self._call(worker, "work", list(prompts), min_open_prompts, num_to_release)

    def next_event(self, timeout: float) -> Event | None:
        """Wait for the next event; None when there is none in time."""
        deadline = time.monotonic() + timeout
        while not self._events:
            left = deadline - time.monotonic()
            self._collect(min(max(left, 0.0), _MESSAGE_SECONDS))
            self._say_what_is_missing()
            if left <= 0:
                break
        return self._events.popleft() if self._events else None

    def kill(self, worker: int) -> None:
        """End a worker's process, if it can be reached, and forget what it was asked."""
        self._pending = {ref: call for ref, call in self._pending.items() if call[0] != worker}
        self._events = deque(event for event in self._events if event.worker != worker)
        for known in (self._devices, self.pids):
            known.pop(worker, None)
        self._loaded.discard(worker)
        actor, self._workers[worker] = self._workers[worker], None
        if actor is not None:
            ray.kill(actor)

    def start(self, worker: int) -> None:
        """Ask for an actor; it comes when and where there is room."""
        self._workers[worker] = self._actor.remote(self._config, worker, self._num_threads)
        self._call(worker, "load")

    def close(self) -> Iterator[WorkResult]:
        """Let every worker that is there write out what is finished; yields what came of it.

        Raises: OutputError of a worker; rows of dead workers will be drawn again.
        """
        for worker in [worker for worker, stage in self._pending.values() if stage == "open"]:
            # It has nothing to write, and would begin a folder that is cleared away.
            self.kill(worker)
        late = [ref for ref, (_, stage) in self._pending.items() if stage == "work"]
        opened = [w for w in sorted(self._loaded) if self._run is not None]
        last = [self._workers[worker].close.remote() for worker in opened]
        deadline = time.monotonic() + CLOSE_SECONDS
        failed: StreaminatorError | None = None
        # A slice that was under way ends first, and has results of its own.
        for reference in [*late, *last]:
            try:
                yield _get(reference, max(0.0, deadline - time.monotonic()))
            except WorkerDiedError:
                continue
            except StreaminatorError as error:
                failed = failed or error
        self._pending = {}
        if failed is not None:
            raise failed

    def shut_down(self) -> None:
        """End the actors."""
        for worker in range(self.num_workers):
            self.kill(worker)

    def _wait_for_first(self) -> None:
        """Until one worker has loaded the model, and a moment longer for the others."""
        until = float("inf")
        num_lost = 0
        while len(self._loaded) < self.num_workers and time.monotonic() < until:
            self._collect(min(_MESSAGE_SECONDS, until - time.monotonic()))
            self._say_what_is_missing()
            for event in self._events:
                assert isinstance(event, WorkerLost)
                num_lost += 1
                if num_lost >= 2 * self.num_workers and not self._loaded:
                    raise WorkerDiedError(
                        f"worker {event.worker} died while it loaded the model ({event.why})"
                    )
            lost, self._events = self._events, deque()
            for event in lost:
                self.kill(event.worker)
                self.start(event.worker)
            if self._loaded and until == float("inf"):
                until = time.monotonic() + _GRACE_SECONDS

    def _call(self, worker: int, stage: str, *arguments: object) -> None:
        reference = getattr(self._workers[worker], stage).remote(*arguments)
        self._pending[reference] = (worker, stage)

    def _collect(self, timeout: float) -> None:
        """Turn all calls that have ended into events; wait for one if there is none."""
        if not self._pending:
            time.sleep(min(timeout, 1.0))
            return
        references = list(self._pending)
        with _own_exceptions():
            ready, rest = ray.wait(references, num_returns=1, timeout=timeout)
            if ready and rest:
                ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for reference in ready:
            worker, stage = self._pending.pop(reference)
            try:
                result = _get(reference)
            except WorkerDiedError as error:
                is_node_lost = "node" in str(error) and _is_node_lost(error.__cause__)
                self._events.append(WorkerLost(worker, str(error), is_node_lost))
                continue
            except InputError as error:
                # Once there are workers, one machine that lacks the model, say, is only lost.
                if not self._was_ready:
                    raise
                self._events.append(WorkerLost(worker, first_line(error), refused=error))
                continue
            if stage == "load":
                self._devices[worker], self.pids[worker] = result
                self._loaded.add(worker)
                if self._run is not None:
                    self._call(worker, "open", self._run)
            elif stage == "open":
                if result.memory and not self._was_ready:
                    say_opened(result)
                self._was_ready = True
                self.opened[worker] = result
                self._events.append(WorkerReady(worker, result.stream_width))
            else:
                self._events.append(WorkerReported(worker, result))

    def _say_what_is_missing(self) -> None:
        now = time.monotonic()
        if self._loaded or now < self._quiet_until:
            return
        self._quiet_until = now + _MESSAGE_SECONDS
        sys.stderr.write(f"no worker has loaded yet: {self._describe()}\n")


def _get(reference: Any, timeout: float | None = None) -> Any:
    """The result; a worker's own exception as it was raised there, any other as WorkerDiedError."""
    try:
        with _own_exceptions():
            return ray.get(reference, timeout=timeout)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, StreaminatorError):
            raise cause from None
        raise WorkerDiedError(kind_and_line(cause)) from error
    except GetTimeoutError as error:
        raise WorkerDiedError(f"no answer in {timeout:.0f} s") from error
    except RayError as error:
        raise WorkerDiedError(_why(error)) from error


@contextmanager
def _own_exceptions() -> Iterator[None]:
    """What a signal's handler raises while Ray's C code runs may come as the cause of a SystemError."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _why(error: RayError) -> str:
    """Ray's many lines about a dead actor, in a few words."""
    text = str(error)
    if _is_node_lost(error):
        return "its node is gone"
    if "SYSTEM_ERROR" in text or "connection error" in text:
        return "its process ended (killed, or out of memory?)"
    return first_line(error)


def _is_node_lost(error: object) -> bool:
    text = str(error)
    return isinstance(error, ActorDiedError) and ("node has died" in text or "node died" in text)
