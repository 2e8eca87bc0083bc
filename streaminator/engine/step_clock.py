# SPDX-License-Identifier: Apache-2.0
"""How long each phase of a step takes.

Used by: `engine.Engine`, `jobs.benchmark_step`.
"""

import time

import torch


class StepClock:
    """Seconds per phase of one step, which begins now.

    The host waits for a GPU once in a step, when it reads what was sampled. How much of the time until
    then is the forward's, the GPU's own clock says; the rest, what the host did meanwhile for longer
    than that included, is the phase "sample".
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        """By the names that `sequence.StepStats` has for them."""

    def lap(self, phase: str) -> None:
        """A phase, or a part of one, ends."""
        if self._device.type == "cuda" and phase in ("pack", "forward"):
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        if self._events and phase == "sample":
            # A step that samples nothing has not waited yet.
            self._events[-1].synchronize()
        now = time.perf_counter()
        name = f"seconds_{phase}"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
        if self._events and phase == "sample":
            begun, ended = self._events
            self._charge_forward(begun.elapsed_time(ended) / 1000)

    def restart(self) -> None:
        """The step before is over only now: what this one took so far happened meanwhile."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self._last = time.perf_counter()

    def _charge_forward(self, on_device: float) -> None:
        issued, waited = self.seconds["seconds_forward"], self.seconds["seconds_sample"]
        forward = min(max(issued, on_device), issued + waited)
        self.seconds["seconds_forward"] = forward
        self.seconds["seconds_sample"] = issued + waited - forward

    @property
    def total(self) -> float:
        """Seconds of all phases so far."""
        return sum(self.seconds.values())
