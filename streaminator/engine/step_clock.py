# SPDX-License-Identifier: Apache-2.0
"""How long each phase of a step takes.

Used by: `engine.Engine`.
"""

import time
from collections.abc import Callable


class StepClock:
    """Seconds per phase of one step, which begins now."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        """`synchronize` waits for the device."""
        self._synchronize = synchronize
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        """By the names that `sequence.StepStats` has for them."""

    def lap(self, phase: str) -> None:
        """A phase ends."""
        if phase in ("pack", "forward"):
            self._synchronize()
        now = time.perf_counter()
        self.seconds[f"seconds_{phase}"] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds of all phases so far."""
        return sum(self.seconds.values())
