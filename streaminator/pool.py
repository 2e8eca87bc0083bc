# SPDX-License-Identifier: Apache-2.0
"""What the driver sees of its workers, and the pool of one worker in this very process.

Used by: `driver`, `dispatch`; `actors.pool` is the same over Ray.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from streaminator.config import JobConfig
from streaminator.sequence import Prompt
from streaminator.session import Session, WorkResult

SLICE_SECONDS = 1.0
"""How long a worker works before it reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRun:
    """What a worker needs to know of the run it writes to."""

    uri: str
    attempt: int
    max_prompt_length: int


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker, a new one or a replacement, has opened the run and can be given prompts."""

    worker: int


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


Event = WorkerReady | WorkerReported | WorkerLost


class Pool(Protocol):
    """Workers that can be given prompts and report back. Numbered from 0."""

    @property
    def num_workers(self) -> int:
        """Workers wanted; fewer may be there."""
        ...

    @property
    def device_names(self) -> list[str]:
        """The devices of the workers that are there."""
        ...

    def open(self, run: OpenRun) -> None:
        """Let every worker open the run as soon as it is there; each is reported as ready."""
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

    def close(self) -> Iterator[WorkResult]:
        """Let the workers write out what is finished; yields what came of it. Raises: OutputError."""
        ...

    def shut_down(self) -> None:
        """Let the workers go."""
        ...


class LocalPool:
    """One worker in this process; what ends it ends the job."""

    num_workers = 1

    def __init__(self, config: JobConfig) -> None:
        """Load the model. Raises: InputError."""
        self._session = Session(config)
        self._submitted: tuple[Sequence[Prompt], int] | None = None
        self._is_known = False

    @property
    def device_names(self) -> list[str]:
        """The device of this process."""
        return [self._session.device_name]

    def open(self, run: OpenRun) -> None:
        """Open the run."""
        self._session.open(
            run.uri,
            worker_id="worker-0",
            attempt=run.attempt,
            max_prompt_length=run.max_prompt_length,
        )

    def submit(
        self, worker: int, prompts: Sequence[Prompt], min_open_prompts: int, num_to_release: int
    ) -> None:
        """Remember what `next_event` is to work on."""
        self._submitted = (prompts, min_open_prompts)

    def next_event(self, timeout: float) -> Event | None:
        """Work now."""
        if not self._is_known:
            self._is_known = True
            return WorkerReady(0)
        if self._submitted is None:
            return None
        (prompts, min_open), self._submitted = self._submitted, None
        result = self._session.work(prompts, min_open_prompts=min_open, max_seconds=SLICE_SECONDS)
        return WorkerReported(0, result)

    def kill(self, worker: int) -> None:
        """Never asked for: it always reports."""

    def start(self, worker: int) -> None:
        """Never asked for: it is never lost."""

    def close(self) -> Iterator[WorkResult]:
        """Write out what is finished."""
        yield self._session.close()

    def shut_down(self) -> None:
        """Nothing to let go of."""
