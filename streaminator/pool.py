# SPDX-License-Identifier: Apache-2.0
"""What a dispatcher and the driver see of their workers, and the pool of one in this very process.

Used by: `driver`, `dispatch`, `session`, `sampler_pool`; `actors.pool` is the same over Ray.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from streaminator.config import JobConfig
from streaminator.errors import InputError
from streaminator.progress import Opened, Report
from streaminator.sequence import Prompt
from streaminator.terminal import say

SLICE_SECONDS = 1.0
"""How long a worker works before it reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRun:
    """What a worker needs to know of the run it writes to."""

    uri: str
    attempt: int
    max_prompt_length: int
    max_in_flight: int
    """Completions of a worker that can be in flight at once, with its share of the prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A whole part of completions, staged: nobody sees it until the driver publishes it."""

    path: str
    """Below the run's folder."""
    keys: tuple[tuple[str, int], ...]
    """(prompt_id, sample_index) of its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkResult:
    """What came of one call of `Session.work`."""

    report: Report = field(default_factory=Report)
    num_open_prompts: int = 0
    """Prompts the session still holds."""
    parts: tuple[Part, ...] = ()
    released: tuple[str, ...] = ()
    """Ids of the prompts given up; their finished completions are in parts reported by now."""
    events: tuple[tuple[str, str], ...] = ()
    """(kind, detail) of what went wrong and was mended."""


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker, a new one or a replacement, has opened the run and can be given prompts."""

    worker: int
    stream_width: int | None = None
    """Completions in flight on it; None: as many as it was told."""


@dataclass(frozen=True, slots=True)
class WorkerReported:
    """A worker has ended its slice."""

    worker: int
    result: WorkResult


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker has ended, or failed in a way that it cannot be trusted any more."""

    worker: int
    why: str
    is_node_lost: bool = False
    """Its machine went away, so that no prompt can be to blame."""
    refused: InputError | None = None
    """What it would not take; it is well otherwise."""


Event = WorkerReady | WorkerReported | WorkerLost


class Workers(Protocol):
    """Workers that can be given prompts and report back. Numbered from 0."""

    @property
    def num_workers(self) -> int:
        """Workers wanted; fewer may be there."""
        ...

    def submit(
        self, worker: int, prompts: Sequence[Prompt], min_open_prompts: int, num_to_release: int
    ) -> None:
        """Let a worker that is ready or has reported go on; see `Session.work`."""
        ...

    def next_event(self, timeout: float) -> Event | None:
        """Wait for the next event; None when there is none in time. Raises: OutputError."""
        ...

    def kill(self, worker: int) -> None:
        """End a worker's process, if it can be reached. No event of it will come any more."""
        ...

    def start(self, worker: int) -> None:
        """Start a replacement of a worker that was killed, when and where there is room."""
        ...

    def shut_down(self) -> None:
        """Let the workers go."""
        ...


class Pool(Workers, Protocol):
    """Workers that write a run."""

    @property
    def device_names(self) -> list[str]:
        """The devices of the workers that are there."""
        ...

    @property
    def opened(self) -> Mapping[int, Opened]:
        """What the workers told when they opened the run; of one that was replaced, the newest."""
        ...

    def open(self, run: OpenRun) -> None:
        """Let every worker open the run as soon as it is there; each is reported as ready."""
        ...

    def close(self) -> Iterator[WorkResult]:
        """Let the workers write out what is finished; yields what came of it. Raises: OutputError."""
        ...


class CanWork(Protocol):
    """A `Session`, as far as a dispatcher's prompts go."""

    def work(
        self,
        prompts: Sequence[Prompt],
        *,
        min_open_prompts: int = 0,
        num_to_release: int = 0,
        max_seconds: float,
    ) -> WorkResult:
        """See `Session.work`."""
        ...


class OneWorker:
    """One worker in this process; what ends it ends the program."""

    num_workers = 1

    def __init__(self, session: CanWork) -> None:
        self._working = session
        self._submitted: tuple[Sequence[Prompt], int] | None = None
        self._events: list[Event] = []

    def submit(
        self, worker: int, prompts: Sequence[Prompt], min_open_prompts: int, num_to_release: int
    ) -> None:
        """Remember what `next_event` is to work on."""
        self._submitted = (prompts, min_open_prompts)

    def next_event(self, timeout: float) -> Event | None:
        """Work now."""
        if self._events:
            return self._events.pop()
        if self._submitted is None:
            return None
        (prompts, min_open), self._submitted = self._submitted, None
        result = self._working.work(prompts, min_open_prompts=min_open, max_seconds=SLICE_SECONDS)
        return WorkerReported(0, result)

    def kill(self, worker: int) -> None:
        """Never asked for: it always reports."""

    def start(self, worker: int) -> None:
        """Never asked for: it is never lost."""

    def shut_down(self) -> None:
        """Nothing to let go of."""


def say_opened(opened: Opened) -> None:
    """Tell what a worker's stream is and takes, before it begins."""
    say(f"a worker: stream width {opened.stream_width}; {opened.memory}")


class LocalPool(OneWorker):
    """One worker in this process that writes a run."""

    def __init__(self, config: JobConfig) -> None:
        """Load the model. Raises: InputError."""
        # Late: the driver of other pools needs no engine, and so none of its memory.
        from streaminator.session import Session

        self._session = Session(config)
        self.opened: dict[int, Opened] = {}
        super().__init__(self._session)

    @property
    def device_names(self) -> list[str]:
        """The device of this process."""
        return [self._session.device_name]

    def open(self, run: OpenRun) -> None:
        """Open the run."""
        opened = self._session.open(
            run.uri,
            worker_id="worker-0",
            attempt=run.attempt,
            max_prompt_length=run.max_prompt_length,
            max_in_flight=run.max_in_flight,
        )
        say_opened(opened)
        self.opened[0] = opened
        self._events = [WorkerReady(0, opened.stream_width)]

    def close(self) -> Iterator[WorkResult]:
        """Write out what is finished."""
        yield self._session.close()
