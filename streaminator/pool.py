# SPDX-License-Identifier: Apache-2.0
"""What the driver sees of its workers, and the pool of one worker in this very process.

Used by: `driver`; `actors.pool` is the same over Ray.
"""

from collections.abc import Sequence
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


class Pool(Protocol):
    """Workers that can be given prompts and report back."""

    @property
    def num_workers(self) -> int:
        """Workers, numbered from 0."""
        ...

    @property
    def device_names(self) -> list[str]:
        """The device of each worker."""
        ...

    def open(self, run: OpenRun) -> None:
        """Let every worker open the run. Raises: InputError, OutputError."""
        ...

    def submit(self, worker: int, prompts: Sequence[Prompt], min_open_prompts: int) -> None:
        """Let a worker that has reported go on, with new prompts."""
        ...

    def next_result(self) -> tuple[int, WorkResult]:
        """Wait for the next report. Raises: WorkerDiedError, OutputError."""
        ...

    def close(self) -> None:
        """Write out everything that is finished. Raises: OutputError, WorkerDiedError."""
        ...

    def shut_down(self) -> None:
        """Let the workers go."""
        ...


class LocalPool:
    """One worker in this process."""

    num_workers = 1

    def __init__(self, config: JobConfig) -> None:
        """Load the model. Raises: InputError."""
        self._session = Session(config)
        self._submitted: tuple[Sequence[Prompt], int] = ((), 0)

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

    def submit(self, worker: int, prompts: Sequence[Prompt], min_open_prompts: int) -> None:
        """Remember what `next_result` is to work on."""
        self._submitted = (prompts, min_open_prompts)

    def next_result(self) -> tuple[int, WorkResult]:
        """Work now."""
        prompts, min_open = self._submitted
        return 0, self._session.work(prompts, min_open_prompts=min_open, max_seconds=SLICE_SECONDS)

    def close(self) -> None:
        """Write out what is finished."""
        self._session.close()

    def shut_down(self) -> None:
        """Nothing to let go of."""
