# SPDX-License-Identifier: Apache-2.0
"""The library's `ResidentSession` as a Ray actor.

Invariants
- Draws with the weights of the newest call it was asked to open, whatever it drew with before.

Used by: `actors.sampler_pool`.
"""

from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from actors.worker import Worker
from streaminator.errors import ModelError, first_line
from streaminator.progress import Opened
from streaminator.resident_session import ResidentSession


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


class ResidentWorker(Worker):
    """A worker that stays from call to call."""

    _version = 0

    def _make_session(self) -> ResidentSession:
        return ResidentSession(self._config, num_threads=self._num_threads)

    @ray.method
    def open(self, call: OpenCall) -> Opened:
        """Begin a call, with its weights. Raises: ModelError; the old weights stay."""
        if call.weights.version != self._version:
            self._session.update_weights(_fetch(call.weights.source))
            self._version = call.weights.version
        if call.seed is None:
            return Opened(stream_width=0)
        return self._session.open(seed=call.seed, max_prompt_length=call.max_prompt_length)


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
