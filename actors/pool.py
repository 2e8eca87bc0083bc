# SPDX-License-Identifier: Apache-2.0
"""The driver's workers as Ray actors.

Invariants
- At most one `work` call per worker is pending.
- Prompts go to a worker, counts come back; tokens stay with the worker, which writes them.

Used by: `jobs.sample`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.worker import SamplerWorker
from streaminator.config import JobConfig
from streaminator.errors import StreaminatorError, WorkerDiedError
from streaminator.pool import OpenRun
from streaminator.sequence import Prompt
from streaminator.session import WorkResult

CLOSE_SECONDS = 30.0
"""How long a worker may take to write out its rows at the end."""


class RayPool:
    """`num_workers` actors on a Ray that is connected already."""

    def __init__(
        self, config: JobConfig, *, num_workers: int, num_cpus: float, num_gpus: float
    ) -> None:
        """Start the actors and wait until each has loaded the model.

        Args:
            config: resolved settings.
            num_workers: number of actors.
            num_cpus: cores of each; also its number of threads on a CPU.
            num_gpus: GPUs of each.

        Raises: InputError of a worker that cannot load the model; WorkerDiedError.
        """
        self.num_workers = num_workers
        num_threads = None if num_gpus else max(1, int(num_cpus))
        actor = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(SamplerWorker)
        self._workers: list[Any] = [
            actor.remote(config, i, num_threads) for i in range(num_workers)
        ]
        self._pending: dict[Any, int] = {}
        try:
            self.device_names = self._call_all(lambda worker: worker.load.remote())
        except BaseException:
            self.shut_down()
            raise

    def open(self, run: OpenRun) -> None:
        """Let every worker open the run."""
        self._call_all(lambda worker: worker.open.remote(run))

    def submit(self, worker: int, prompts: Sequence[Prompt], min_open_prompts: int) -> None:
        """Let a worker go on, with new prompts."""
        reference = self._workers[worker].work.remote(list(prompts), min_open_prompts)
        self._pending[reference] = worker

    def next_result(self) -> tuple[int, WorkResult]:
        """Wait for the next report."""
        ready, _ = ray.wait(list(self._pending), num_returns=1)
        worker = self._pending.pop(ready[0])
        return worker, _get(ready[0], worker)

    def close(self) -> None:
        """Let every worker write out what is finished, also when another one died."""
        self._call_all(lambda worker: worker.close.remote(), timeout=CLOSE_SECONDS)

    def shut_down(self) -> None:
        """End the actors."""
        for worker in self._workers:
            ray.kill(worker)

    def _call_all(self, call: Callable[[Any], Any], timeout: float | None = None) -> list[Any]:
        references = [call(worker) for worker in self._workers]
        results, errors = [], []
        for index, reference in enumerate(references):
            try:
                results.append(_get(reference, index, timeout))
            except StreaminatorError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results


def _get(reference: Any, worker: int, timeout: float | None = None) -> Any:
    """The result; a worker's own exception as it was raised there."""
    try:
        return ray.get(reference, timeout=timeout)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, StreaminatorError):
            raise cause from None
        raise
    except RayActorError as error:
        raise WorkerDiedError(f"worker {worker} died (killed, or out of memory?)") from error
    except GetTimeoutError as error:
        raise WorkerDiedError(f"worker {worker} did not answer in {timeout:.0f} s") from error
