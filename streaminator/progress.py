# SPDX-License-Identifier: Apache-2.0
"""What is told while a run goes on: a live bar on a terminal, a plain line now and then elsewhere.

Invariants
- Everything goes to stderr; stdout stays free for results.
- rich is imported only for a terminal.

Used by: the driver (`Progress`), the workers (`Opened`, `Report`), `run_record` (`Opened`),
`streaminator.wandb_log` (`Report`).
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

from streaminator.terminal import say, silence

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a worker tells of its stream when it has opened a run."""

    stream_width: int
    memory: str = ""
    """What it takes, in words."""
    layers: str = ""
    """Whether the model's layers run fused, in words; "" where nothing fuses them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a worker did since its last report. Reports add up."""

    num_finished: int = 0
    """Completions finished, failed ones not counted."""
    num_failed: int = 0
    num_new_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0
    num_running_slots_sum: int = 0
    """Slots in use, summed over the steps."""
    num_slots_sum: int = 0
    """Stream width, summed over the steps."""
    device_memory: int = 0
    """Bytes in use now; of a sum of reports: the largest."""

    def __add__(self, other: "Report") -> "Report":
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        values["device_memory"] = max(self.device_memory, other.device_memory)
        return Report(**values)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens; None if nothing was drafted."""
        if not self.num_draft_tokens:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens

    @property
    def stream_utilization(self) -> float | None:
        """Running slots / stream width; None before the first step."""
        return self.num_running_slots_sum / self.num_slots_sum if self.num_slots_sum else None


class Progress:
    """Shows how far a run is. `update` it with every report, `close` it at the end."""

    def __init__(
        self,
        total_completions: int,
        done_already: int,
        num_workers: int,
        *,
        seconds_per_line: float = 5.0,
    ) -> None:
        self._total = total_completions
        self._done_already = done_already
        self._num_workers = num_workers
        self._seconds_per_line = seconds_per_line
        self._sum = Report()
        self._started = self._last_line = time.monotonic()
        self._is_closed = False
        self._bar: tuple[RichProgress, TaskID] | None = None
        if sys.stderr.isatty():
            self._bar = _start_bar(total_completions, done_already)

    def update(self, report: Report) -> None:
        """Add a report and show the new state."""
        self._sum += report
        if self._bar is not None:
            progress, task = self._bar
            with self._losing_the_terminal():
                progress.update(task, completed=self._num_done, state=self._state())
        elif time.monotonic() - self._last_line >= self._seconds_per_line:
            self._write_line()

    def close(self) -> None:
        """Show the last state and leave the terminal as it was."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._bar is not None:
            with self._losing_the_terminal():
                self._bar[0].stop()
        else:
            self._write_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _num_done(self) -> int:
        return self._done_already + self._sum.num_finished + self._sum.num_failed

    @contextmanager
    def _losing_the_terminal(self) -> Iterator[None]:
        """What it shows from then on goes nowhere, and ends nothing."""
        try:
            yield
        except OSError:
            self._bar = None
            silence(sys.stderr)

    def _state(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        parts = [f"{self._sum.num_new_tokens / seconds:,.0f} tokens/s"]
        if self._sum.acceptance_rate is not None:
            parts.append(f"acceptance {self._sum.acceptance_rate:.0%}")
        utilization = self._sum.stream_utilization
        if utilization is not None:
            width = self._num_workers * self._sum.num_slots_sum / self._sum.num_steps
            parts.append(f"stream {utilization:.0%} ({utilization * width:.1f}/{width:.0f})")
        if self._sum.num_failed:
            parts.append(f"{self._sum.num_failed:,} failed")
        num_left = self._total - self._num_done
        num_drawn = self._num_done - self._done_already
        if num_left > 0 and num_drawn:
            parts.append(f"ETA {_duration(seconds * num_left / num_drawn)}")
        return ", ".join(parts)

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        say(f"{self._num_done:,}/{self._total:,} completions, {self._state()}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _start_bar(total: int, done: int) -> "tuple[RichProgress, TaskID]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    progress = RichProgress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
    task = progress.add_task("", total=total, completed=done, state="")
    progress.start()
    return progress, task
