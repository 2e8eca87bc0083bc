# SPDX-License-Identifier: Apache-2.0
"""Prompts that no worker has: read ahead, given back, or left by a worker that was lost.

Invariants
- A prompt belongs to the worker that a stable hash of its id names; others take it while it is not
  started and they have nothing else.
- Bounded: the dataset is read as the queues run low. Here prompts are kept packed.

Used by: `dispatch`.
"""

import pickle
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from streaminator.data.finished import stable_hash
from streaminator.sequence import Prompt


@dataclass(slots=True, eq=False)
class Work:
    """A prompt on its way."""

    prompt_id: str
    packed: bytes
    """The prompt. Tens of thousands wait here, and as objects each would take 5 kB and more."""
    left: Sequence[int]
    """Sample indices not published yet, in order."""
    parts: tuple[str, ...]
    """Published parts that hold completions of it."""
    num_deaths: int = 0
    num_deaths_alone: int = 0
    num_retries: int = 0

    @classmethod
    def of(cls, prompt: Prompt, left: Sequence[int], parts: tuple[str, ...] = ()) -> Self:
        """A prompt with the completions to draw, and the parts that hold the others."""
        packed = zlib.compress(pickle.dumps(prompt), level=1)
        return cls(prompt.prompt_id, packed, left, parts)

    def as_prompt(self) -> Prompt:
        """What a worker is to draw."""
        return replace(
            pickle.loads(zlib.decompress(self.packed)),
            sample_indices=tuple(self.left),
            finished_parts=self.parts,
            num_retries=self.num_retries,
        )


class Backlog:
    """A queue for each worker's own prompts, and one that is for all."""

    def __init__(self, source: Iterator[Work], num_workers: int, room: float) -> None:
        """`source` is the dataset; `room`: prompts of it that may wait in the queues."""
        self.room = room
        self._source: Iterator[Work] | None = source
        self._queues: list[deque[Work]] = [deque() for _ in range(num_workers)]
        self._num_queued = 0
        self._loose: deque[Work] = deque()

    @property
    def is_read_out(self) -> bool:
        """Whether the dataset has come to its end."""
        return self._source is None

    @property
    def num_waiting(self) -> int:
        """Prompts that are here."""
        return self._num_queued + len(self._loose)

    @property
    def has_more(self) -> bool:
        """Whether there are prompts here, or perhaps still to be read."""
        return self._source is not None or self.num_waiting > 0

    @property
    def has_room(self) -> bool:
        """Whether there is something to read, and room for it."""
        return self._source is not None and self._num_queued < self.room

    @property
    def _is_stocked(self) -> bool:
        """Whether there is enough in the queues to take something from a foreign one."""
        return self._source is None or 2 * self._num_queued >= self.room

    def read_on(self, num: int) -> None:
        """Read up to `num` prompts, while there is room in the queues."""
        for _ in range(num):
            if not self.has_room:
                return
            assert self._source is not None
            work = next(self._source, None)
            if work is None:
                self._source = None
                return
            self._queues[home_worker(work.prompt_id, len(self._queues))].append(work)
            self._num_queued += 1

    def take(self, index: int, num: int) -> list[Work]:
        """Up to `num` prompts for a worker: those others left, its own, then others' that they would
        start last."""
        taken: list[Work] = []
        own = self._queues[index]
        while len(taken) < num and self.num_waiting:
            if self._loose:
                taken.append(self._loose.popleft())
            elif own:
                taken.append(own.popleft())
                self._num_queued -= 1
            elif not self._is_stocked:
                break
            else:
                longest = max(self._queues, key=len)
                for _ in range(min(num - len(taken), (len(longest) + 1) // 2)):
                    taken.append(longest.pop())
                    self._num_queued -= 1
        return taken

    def give_back(self, work: Work) -> None:
        """Take in a prompt that a worker had."""
        self._loose.append(work)


def home_worker(prompt_id: str, num_workers: int) -> int:
    """The worker a prompt belongs to; the same in every process and run."""
    return stable_hash(prompt_id) % num_workers
