# SPDX-License-Identifier: Apache-2.0
"""The library's `Session` as a Ray actor.

Plain classes: `ray.remote(num_gpus=...)(SamplerWorker)` at the call site makes an actor.

Used by: `actors.pool`; `actors.resident_worker` is its like for a `SamplerPool`.
"""

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import ray

from streaminator.config import JobConfig
from streaminator.pool import SLICE_SECONDS, OpenRun, WorkResult
from streaminator.progress import Opened
from streaminator.sequence import Prompt


class Worker(ABC):
    """One stream on one device, in its own process."""

    def __init__(self, config: JobConfig, worker: int, num_threads: int | None) -> None:
        # Nothing that can fail: Ray keeps the exception of a constructor as text only.
        self._config = config
        self._worker = worker
        self._num_threads = num_threads

    @abstractmethod
    def _make_session(self) -> Any:
        """Load the model. Raises: InputError."""

    @ray.method
    def load(self) -> tuple[str, int]:
        """Load the model; returns the device's name and the process id. Raises: InputError."""
        self._session = self._make_session()
        return self._session.device_name, os.getpid()

    @ray.method
    def work(
        self, prompts: Sequence[Prompt], min_open_prompts: int, num_to_release: int
    ) -> WorkResult:
        """Take in prompts and run the stream for a slice of time."""
        return self._session.work(
            prompts,
            min_open_prompts=min_open_prompts,
            num_to_release=num_to_release,
            max_seconds=SLICE_SECONDS,
        )


class SamplerWorker(Worker):
    """A worker that writes a run."""

    def _make_session(self) -> Any:
        # Late: the driver imports this class, too, and needs no engine.
        from streaminator.session import Session

        return Session(self._config, num_threads=self._num_threads)

    @ray.method
    def open(self, run: OpenRun) -> Opened:
        """Open the run; returns what the stream is like."""
        node_id = ray.get_runtime_context().get_node_id()
        return self._session.open(
            run.uri,
            worker_id=f"worker-{self._worker}",
            attempt=run.attempt,
            max_prompt_length=run.max_prompt_length,
            max_in_flight=run.max_in_flight,
            node=f"{socket.gethostname()}/{node_id[:8]}",
        )

    @ray.method
    def close(self) -> WorkResult:
        """Write out what is finished."""
        return self._session.close()
