# SPDX-License-Identifier: Apache-2.0
"""The library's `ResidentSession` as a Ray actor.

Invariants
- Draws with the weights of the newest call it was asked to open, whatever it drew with before.

Used by: `actors.sampler_pool`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from streaminator.config import JobConfig
from streaminator.errors import ModelError, first_line
from streaminator.pool import SLICE_SECONDS
from streaminator.resident_session import ResidentSession
from streaminator.sequence import Prompt
from streaminator.session import WorkResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Which weights to draw with."""

    version: int
    source: object
    """What `ResidentSession.update_weights` takes, or a reference to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCall:
    """What a worker needs to know of a call."""

    weights: Weights
    seed: int | None = None
    """Of the noise; None: nothing is to be drawn."""
    max_prompt_length: int = 0


class ResidentWorker:
    """One stream on one device, in its own process, from call to call."""

    def __init__(self, config: JobConfig, worker: int, num_threads: int | None) -> None:
        # Nothing that can fail: Ray keeps the exception of a constructor as text only.
        self._config = config
        self._num_threads = num_threads
        self._version = 0

    @ray.method
    def load(self) -> tuple[str, int]:
        """Load the model; returns the device's name and the process id. Raises: InputError."""
        self._session = ResidentSession(self._config, num_threads=self._num_threads)
        return self._session.device_name, os.getpid()

    @ray.method
    def open(self, call: OpenCall) -> None:
        """Begin a call, with its weights. Raises: ModelError; the old weights stay."""
        if call.weights.version != self._version:
            self._session.update_weights(_fetch(call.weights.source))
            self._version = call.weights.version
        if call.seed is not None:
            self._session.open(seed=call.seed, max_prompt_length=call.max_prompt_length)

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


def _fetch(source: object) -> object:
    if not isinstance(source, ray.ObjectRef):
        return source
    try:
        return ray.get(source)
    except RayError as error:
        raise ModelError(
            f"update_weights: the referenced weights cannot be had ({first_line(error)}); keep "
            "their owner alive until the next update"
        ) from error
