# SPDX-License-Identifier: Apache-2.0
"""`streaminator.sampler_pool` with one Ray actor per GPU.

    with SamplerPool(JobConfig(...), num_workers=8) as pool:
        completions = pool.sample(prompts, seed=epoch)
        pool.update_weights(model.state_dict())

Invariants
- Weights are put into Ray's object store once for all workers, and stay there until the next ones
  are in use: a worker that replaces a dead one loads them.
- Weights that one worker refuses are used by none.

Used by: programs.
"""

import os
import time
from dataclasses import replace

import ray

from actors.pool import RayPool
from actors.resident_worker import OpenCall, ResidentWorker, Weights
from streaminator import sampler_pool
from streaminator.config import JobConfig
from streaminator.engine.weights import PackedWeights
from streaminator.errors import ConfigError, InputError, WorkerDiedError
from streaminator.pool import WorkerLost, WorkerReady
from streaminator.sampler_pool import LocalWorkers

_FIRST_OPEN = 4
"""Opening may take this many times `worker_timeout`: kernels are compiled, weights fetched."""


class SamplerPool(sampler_pool.SamplerPool):
    """A model on Ray workers, to be sampled again and again.

    Uses the Ray this process is connected to, or connects to `cluster.address`, or starts one.
    """

    def __init__(self, config: JobConfig, *, num_workers: int | None = None) -> None:
        """Load the model in all workers.

        Args:
            config: see `streaminator.sampler_pool`; `cluster` says what each worker gets, by default
                a GPU, or one core where there is none.
            num_workers: actors; 0: none, the model runs in this process; default: that of the
                settings, or one per GPU (without GPUs: one).

        Raises: InputError; WorkerDiedError.
        """
        num = config.cluster.num_workers if num_workers is None else num_workers
        super().__init__(config, lambda c: _LocalWorkers(c) if num == 0 else RayWorkers(c, num))


class _LocalWorkers(LocalWorkers):
    def update_weights(self, weights: object) -> None:
        if isinstance(weights, ray.ObjectRef):
            weights = ray.get(weights)
        super().update_weights(weights)


class RayWorkers(RayPool):
    """Resident sessions as actors."""

    def __init__(self, config: JobConfig, num_workers: int | None) -> None:
        """Start the actors and wait for them as `RayPool` does."""
        if not ray.is_initialized():
            # Without "local" Ray would join any cluster it finds traces of, dead or alive.
            ray.init(address=config.cluster.ray_address or "local")
        given, device = config.cluster, config.model.device
        num_in_cluster = ray.cluster_resources().get("GPU", 0)
        use_gpu = device.startswith("cuda") or (device == "auto" and num_in_cluster > 0)
        num_gpus = (given.gpus_per_worker or 1.0) if use_gpu else 0.0
        if num_gpus > 1 or (given.gpus_per_worker and not use_gpu):
            raise ConfigError(
                f"--gpus_per_worker {given.gpus_per_worker:g}: a worker uses one GPU, and none where "
                "the device is cpu; give at most 1, or leave it out"
            )
        if not use_gpu:
            config = replace(config, model=replace(config.model, device="cpu"))
        self._timeout = _FIRST_OPEN * given.worker_timeout
        self._weights = Weights(version=0, source=config.model.model_name)
        self._num_versions = 0
        super().__init__(
            config,
            num_workers=num_workers or max(1, int(num_in_cluster / num_gpus) if use_gpu else 1),
            num_cpus=given.cpus_per_worker or 1.0,
            num_gpus=num_gpus,
            resources=given.resources,
            describe=lambda: f"Ray has free: {ray.available_resources()}",
            worker_class=ResidentWorker,
        )

    def begin(self, *, seed: int, max_prompt_length: int) -> dict[int, int]:
        """Begin a call on all workers that are there."""
        call = OpenCall(weights=self._weights, seed=seed, max_prompt_length=max_prompt_length)
        return self._open_all(call)

    def update_weights(self, weights: object) -> None:
        """Load other weights in all workers."""
        if isinstance(weights, ray.ObjectRef):
            # Its task may take as long as it likes; the object is not fetched to here.
            ray.wait([weights], fetch_local=False)
            source: object = weights
        elif isinstance(weights, str | os.PathLike):
            source = os.fspath(weights)
        else:
            source = ray.put(PackedWeights.of(weights))
        # A number that a refused update had is not given again: some may have taken it.
        self._num_versions += 1
        new = Weights(version=self._num_versions, source=source)
        self._open_all(OpenCall(weights=new))
        self._weights = new

    def _open_all(self, call: OpenCall) -> dict[int, int]:
        """Let all workers that are there open a call; returns who did, with their stream widths.

        Raises: InputError of the first worker that refused; WorkerDiedError when all die.
        """
        self._open(call)
        ready: dict[int, int] = {}
        refusals: dict[int, InputError] = {}
        num_lost = 0
        deadline = time.monotonic() + self._timeout
        while (silent := self.pids.keys() - ready.keys() - refusals.keys()) or not (
            ready or refusals
        ):
            event = self.next_event(max(0.0, deadline - time.monotonic()))
            if isinstance(event, WorkerReady):
                ready[event.worker] = event.stream_width or 0
                continue
            if isinstance(event, WorkerLost) and event.refused is not None:
                refusals[event.worker] = event.refused
                continue
            why = (
                event.why
                if isinstance(event, WorkerLost)
                else f"no answer in {self._timeout:.0f} s"
            )
            lost = [event.worker] if event is not None else sorted(silent)
            num_lost += len(lost)
            if not (ready or refusals) and (event is None or num_lost >= 2 * self.num_workers):
                raise WorkerDiedError(f"no worker can begin: {why}")
            for worker in lost:
                self.kill(worker)
                self.start(worker)
        for refusal in refusals.values():
            raise refusal
        return ready
