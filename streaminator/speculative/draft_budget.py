# SPDX-License-Identifier: Apache-2.0
"""How many drafted tokens a step verifies: as many as pay for the wider forward.

A step that packs T tokens costs `StepCosts(T)` seconds. A drafted token pays while the chance that
it is accepted exceeds what the wider forward costs, counted in tokens at the stream's present
speed: n maximises (expected tokens) - speed * cost(n), whose fixed point is the highest ratio of
tokens to seconds (Dinkelbach 1967). All slots compete for the same n tokens. So one slot drafts
long, a stream that fills the hardware hardly at all, without a setting.

Invariants
- Changes speed, never a token.
- A step verifies at most as many drafts as the widest measured step had tokens.

Used by: `engine.Engine`, `engine.step_costs`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_RATE = 0.1  # of what a step took more or less than predicted is believed
_DECAY = 0.98  # of the counts that speed is computed from, per step
_SURPRISE = 0.5  # no step is believed to differ more than this share from its prediction
_MIN_FLOOR, _MAX_FLOOR = 0.02, 0.9


class StepCosts:
    """Seconds of a step by packed tokens: measured at a few sizes, kept current, in between linear.

    Args:
        sizes: packed tokens, rising.
        seconds: what a step of each size takes.
        multiple: packed tokens are padded to this many.
    """

    def __init__(
        self, sizes: Sequence[int], seconds: Sequence[float], *, multiple: int = 1
    ) -> None:
        self._sizes = np.array(sizes, np.float64)
        self._seconds = np.array(seconds, np.float64)
        self._multiple = multiple
        self._is_fixed = False

    @classmethod
    def free(cls) -> "StepCosts":
        """A wider forward costs nothing, whatever is observed: every draft is verified."""
        costs = cls([1, 1 << 20], [1.0, 1.0])
        costs._is_fixed = True
        return costs

    @property
    def max_tokens(self) -> int:
        """The largest size known."""
        return int(self._sizes[-1])

    def __call__(self, num_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds of steps of `num_tokens` (any shape); more never costs less."""
        padded = -(-num_tokens // self._multiple) * self._multiple
        seconds = np.maximum.accumulate(self._seconds)
        inside = np.interp(padded, self._sizes, seconds)
        if len(seconds) == 1:
            return inside
        slope = (seconds[-1] - seconds[-2]) / (self._sizes[-1] - self._sizes[-2])
        return inside + slope * np.maximum(padded - self._sizes[-1], 0)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step: half of the surprise is everywhere's, half its neighbours'."""
        if self._is_fixed:
            return
        surprise = seconds / float(self(np.array(num_tokens))) - 1
        factor = 1 + _RATE * min(max(surprise, -_SURPRISE), _SURPRISE)
        index = np.arange(len(self._sizes))
        distance = np.abs(index - np.interp(num_tokens, self._sizes, index))
        # As a factor: most of what changes while running is how fast the machine is.
        self._seconds *= factor ** (0.5 + 0.5 * np.maximum(1 - distance, 0))


class DraftBudget:
    """Chooses, in each step, which of the drafted tokens are verified."""

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self.floor = _MIN_FLOOR
        """Tokens less likely to be accepted need not be drafted."""
        self._tokens = 0.0
        self._seconds = 0.0

    def cut(
        self, survival: NDArray[np.float32], lengths: NDArray[np.int64], num_tokens: int, num: int
    ) -> NDArray[np.int64]:
        """How much of each chain to verify.

        Args:
            survival: [n, k] probability that a token and all before it in its chain are accepted.
            lengths: [n] of the chains.
            num_tokens: the step's packed tokens without drafts.
            num: sequences that gain a token without drafts.

        Returns:
            [n] lengths, none above those given.
        """
        # Survival never rises along a chain, and the sort is stable: the best are prefixes.
        order = np.argsort(-survival, axis=None, kind="stable")
        order = order[: min(int(lengths.sum()), self.costs.max_tokens)]
        gains = np.concatenate([[0.0], np.cumsum(survival.flat[order], dtype=np.float64)])
        costs = self.costs(num_tokens + np.arange(len(gains)))
        speed = self._tokens / self._seconds if self._seconds else num / costs[0]
        best = int(np.argmax(gains - speed * costs))
        self._move_floor(survival.flat[order], best)
        if best == 0:
            return np.zeros_like(lengths)
        return np.bincount(order[:best] // survival.shape[1], minlength=len(lengths))

    def observe(
        self, num_tokens: int, num_prefill_tokens: int, gained: int, seconds: float
    ) -> None:
        """Learn from a step.

        Args:
            num_tokens: packed.
            num_prefill_tokens: of them, such as the step computed whatever was drafted.
            gained: tokens added to completions.
            seconds: the whole step.
        """
        self.costs.observe(num_tokens, seconds)
        decode = float(self.costs(np.array(max(num_tokens - num_prefill_tokens, 1))))
        self._tokens = _DECAY * self._tokens + gained
        self._seconds = _DECAY * self._seconds + decode

    def _move_floor(self, survival: NDArray[np.float32], best: int) -> None:
        """Draft a little more than is verified, so that what would pay is seen."""
        wants_all = best == len(survival)
        floor = 0.5 * (self.floor if wants_all else float(survival[max(best - 1, 0)]))
        self.floor = min(max(floor, _MIN_FLOOR), _MAX_FLOOR)


def count_by_survival(
    survival: NDArray[np.float32], lengths: Sequence[int], accepted: Sequence[int]
) -> NDArray[np.int64]:
    """[2, 10] verified and accepted tokens by tenths of the chance that they were given.

    Args:
        survival: [n, k] as drafted.
        lengths: [n] how much of each chain was verified.
        accepted: [n] how much of it was accepted.
    """
    tenths = np.minimum((survival * 10).astype(np.int64), 9)
    position = np.arange(survival.shape[1])
    ends = np.array([lengths, accepted], np.int64)
    is_in = position < ends[:, :, None]
    return np.stack([np.bincount(tenths[mask], minlength=10) for mask in is_in])
