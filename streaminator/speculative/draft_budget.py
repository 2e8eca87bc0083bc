# SPDX-License-Identifier: Apache-2.0
"""How many drafted tokens a step verifies: as many as pay for the wider forward.

A step that packs T tokens costs `StepCosts(T)` seconds. A drafted token pays while the chance that
it is accepted exceeds what the wider forward costs, counted in tokens at the stream's present
speed: n maximises (expected tokens) - speed * cost(n), whose fixed point is the highest ratio of
tokens to seconds (Dinkelbach 1967). All slots compete for the same n tokens. So one slot drafts
long, a stream that fills the hardware hardly at all, without a setting.

Chances are taken times the share of what was expected of verified drafts that came true lately: those
that are chosen are more often overrated than underrated (the optimizer's curse, Smith and Winkler 2006).

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
_DOUBT = 4.0  # accepted tokens, as expected, that are supposed to have been seen before
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
        self._expected = self._accepted = 0.0
        self._expects = 0.0

    @property
    def trust(self) -> float:
        """Share of what was expected of verified drafts that came true lately."""
        return (self._accepted + _DOUBT) / (self._expected + _DOUBT)

    def cut(self, survival: NDArray[np.float32], num_tokens: int, num: int) -> NDArray[np.bool_]:
        """Which drafted tokens to verify.

        Args:
            survival: [n, 2, k] chance that a token is accepted (with all before it in its chain):
                of the chain's tokens, then of the second choices beside them; 0 where there is none.
            num_tokens: the step's packed tokens without drafts.
            num: sequences that gain a token without drafts.

        Returns:
            [n, 2, k] what pays; of a chain a prefix.
        """
        most = min(int(np.count_nonzero(survival)), self.costs.max_tokens)
        costs = self.costs(num_tokens + np.arange(most + 1))
        speed = self._tokens / self._seconds if self._seconds else num / costs[0]
        trusted = survival * np.float32(min(self.trust, 1.0))
        order, best = _likeliest(trusted, speed * costs)
        if best and (pays_again := speed * (costs[best] - costs[0]) / best) > 0:
            # A second choice that is right is computed once more, in the next step.
            worth = trusted * np.array([[1], [max(1 - pays_again, 0)]], np.float32)
            order, best = _likeliest(worth, speed * costs)
        self._move_floor(survival.flat[order], best)
        pays = np.zeros(survival.shape, bool)
        pays.flat[order[:best]] = True
        self._expects = float(survival[pays].sum())
        return pays

    def observe(
        self,
        num_tokens: int,
        num_prefill_tokens: int,
        gained: int,
        num_accepted: int,
        seconds: float,
    ) -> None:
        """Learn from a step.

        Args:
            num_tokens: packed.
            num_prefill_tokens: of them, such as the step computed whatever was drafted.
            gained: tokens added to completions.
            num_accepted: of the drafted tokens, second choices included.
            seconds: the whole step.
        """
        self._expected = _DECAY * self._expected + self._expects
        self._accepted = _DECAY * self._accepted + num_accepted
        self._expects = 0.0
        self.costs.observe(num_tokens, seconds)
        decode = float(self.costs(np.array(max(num_tokens - num_prefill_tokens, 1))))
        self._tokens = _DECAY * self._tokens + gained
        self._seconds = _DECAY * self._seconds + decode

    def _move_floor(self, survival: NDArray[np.float32], best: int) -> None:
        """Draft a little more than is verified, so that what would pay is seen."""
        wants_all = best == len(survival)
        floor = 0.5 * (self.floor if wants_all else float(survival[max(best - 1, 0)]))
        self.floor = min(max(floor, _MIN_FLOOR), _MAX_FLOOR)


def _likeliest(
    worth: NDArray[np.float32], prices: NDArray[np.float64]
) -> tuple[NDArray[np.int64], int]:
    """Flat indices by falling worth, and of how many the sum of worth exceeds the price most."""
    # Worth never rises along a chain nor from it to the side, and the sort is stable.
    order = np.argsort(-worth, axis=None, kind="stable")[: len(prices) - 1]
    gains = np.concatenate([[0.0], np.cumsum(worth.flat[order], dtype=np.float64)])
    return order, int(np.argmax(gains - prices))
