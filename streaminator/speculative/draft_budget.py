# SPDX-License-Identifier: Apache-2.0
"""How many drafted tokens a step verifies: as many as pay for the wider forward.

A step that packs T tokens costs `StepCosts(T)` seconds. A drafted token pays while the chance that
it is accepted exceeds what the wider forward costs, counted in tokens at the stream's present
speed: n maximises (expected tokens) - speed * cost(n), whose fixed point is the highest ratio of
tokens to seconds (Dinkelbach 1967). All slots compete for the same n tokens. So one slot drafts
long, a stream that fills the hardware hardly at all, without a setting.

Chances are taken times the share of what was expected of verified drafts that came true lately: those
that are chosen are more often overrated than underrated (the optimizer's curse, Smith and Winkler 2006).

Drafting takes time, too. Where it lately brought less than that, the next step does without, then two,
four, up to `_LONGEST_REST`, as long as the draft in between says the same.

Invariants
- Changes speed, never a token.
- A step verifies at most as many drafts as the widest measured step had tokens.

Used by: `engine.Engine`, `engine.speculation`, `engine.step_costs`.
"""

from bisect import bisect
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from statistics import median

import numpy as np
from numpy.typing import NDArray

_RATE = 0.1  # of what a step took more or less than predicted is believed
_OWN = 0.1  # of that only where the step's size is
_DECAY = 0.98  # of the counts that speed is computed from, per step
_SURPRISE = 0.5  # no step is believed to differ more than this share from its prediction
_DOUBT = 4.0  # accepted tokens, as expected, that are supposed to have been seen before
_FEW = 1 / 8  # of a step's tokens may be a prompt's where its cost counts
_FAR = 1000.0  # times the largest size measured
_MIN_FLOOR, _MAX_FLOOR = 0.02, 0.9
_LONGEST_REST = 16  # steps without a draft
_FORGET = 0.8  # of what drafts brought, per drafting step
_NUM_TIMED = 5  # drafting steps whose median drafting is said to take


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
        self._sizes = [float(size) for size in sizes]
        self._seconds = [float(taken) for taken in seconds]
        self.are_free = False
        """Whether a wider forward costs nothing, whatever is observed."""
        self.multiple = multiple
        """Packed tokens are padded to this many."""
        # Beyond the largest size it goes on as it did between the last two.
        self.reach = np.array([*self._sizes, _FAR * self._sizes[-1]])
        """[m] sizes at which seconds are known, rising; in between they are linear."""
        self.rising = self._rise()
        """[m] seconds of these sizes."""

    def _rise(self) -> NDArray[np.float64]:
        rising = list(accumulate(self._seconds, max))
        slope = 0.0
        if len(rising) > 1:
            slope = (rising[-1] - rising[-2]) / (self._sizes[-1] - self._sizes[-2])
        rising.append(rising[-1] + slope * (_FAR - 1) * self._sizes[-1])
        return np.array(rising)

    @classmethod
    def free(cls) -> "StepCosts":
        """A wider forward costs nothing, whatever is observed: every draft is verified."""
        costs = cls([1, 1 << 20], [1.0, 1.0])
        costs.are_free = True
        return costs

    @property
    def max_tokens(self) -> int:
        """The largest size measured."""
        return int(self._sizes[-1])

    def __call__(self, num_tokens: int) -> float:
        """Seconds of a step of `num_tokens`; more never costs less."""
        padded = -(-num_tokens // self.multiple) * self.multiple
        return float(np.interp(padded, self.reach, self.rising))

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step: a little of the surprise is its neighbours', the rest everywhere's."""
        if self.are_free:
            return
        surprise = seconds / self(num_tokens) - 1
        factor = 1 + _RATE * min(max(surprise, -_SURPRISE), _SURPRISE)
        sizes = self._sizes
        place = bisect(sizes, num_tokens) - 1
        if place < 0:
            at = 0.0
        elif place == len(sizes) - 1:
            at = float(place)
        else:
            at = place + (num_tokens - sizes[place]) / (sizes[place + 1] - sizes[place])
        # As a factor: most of what changes while running is how fast the machine is. Sizes that no
        # step has now must follow, or they would look dear as soon as it is faster.
        self._seconds = [
            taken * factor ** (1 - _OWN + _OWN * max(1 - abs(index - at), 0))
            for index, taken in enumerate(self._seconds)
        ]
        self.rising = self._rise()


class DraftBudget:
    """Chooses, in each step, which of the drafted tokens are verified."""

    def __init__(self, costs: StepCosts) -> None:
        # Imported late: what is compiled takes a moment to load.
        from streaminator.speculative.draft_choice import choose

        self._choose = choose
        self.costs = costs
        self.floor = _MIN_FLOOR
        """Tokens less likely to be accepted need not be drafted."""
        self._tokens = 0.0
        self._seconds = 0.0
        self._expected = self._accepted = 0.0
        self._expects = 0.0
        self._gained = self._weight = 0.0
        self._took: deque[float] = deque(maxlen=_NUM_TIMED)
        self._rest = self._num_rested = 0
        # What is compiled is compiled now, or loaded, not while a step is measured.
        self.cut(np.zeros((1, 2, 1), np.float32), 1, 1)

    @property
    def trust(self) -> float:
        """Share of what was expected of verified drafts that came true lately."""
        return (self._accepted + _DOUBT) / (self._expected + _DOUBT)

    def rests(self) -> bool:
        """Whether the next step had better not draft, because it would not pay for the time it takes."""
        self._num_rested += 1
        return self._num_rested <= self._rest

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
        costs = self.costs
        # Steps that only computed prompts gained nothing; without sequences nothing can pay.
        speed = self._tokens / self._seconds if self._tokens else num / costs(num_tokens)
        pays, self._expects, least, wants_all, gain = self._choose(
            np.ascontiguousarray(survival), min(self.trust, 1.0), speed,
            costs.reach, costs.rising, costs.multiple, num_tokens, costs.max_tokens,
        )  # fmt: skip
        # Draft a little more than is verified, so that what would pay is seen.
        floor = 0.5 * (self.floor if wants_all else least)
        self.floor = min(max(floor, _MIN_FLOOR), _MAX_FLOOR)
        self._gained = _FORGET * self._gained + (gain / speed if gain else 0.0)
        return pays

    def observe(
        self,
        num_tokens: int,
        num_prefill_tokens: int,
        gained: int,
        num_accepted: int,
        seconds: float,
        draft_seconds: float,
    ) -> None:
        """Learn from a step.

        Args:
            num_tokens: packed.
            num_prefill_tokens: of them, such as the step computed whatever was drafted.
            gained: tokens added to completions.
            num_accepted: of the drafted tokens, second choices included.
            seconds: the whole step.
            draft_seconds: of them, what drafting took.
        """
        self._expected = _DECAY * self._expected + self._expects
        self._accepted = _DECAY * self._accepted + num_accepted
        self._expects = 0.0
        # A prompt's tokens cost otherwise than sampled ones, and would make all of these look dear.
        if num_prefill_tokens <= _FEW * num_tokens:
            self.costs.observe(num_tokens, seconds - draft_seconds)
        decode = self.costs(max(num_tokens - num_prefill_tokens, 1))
        has_drafted = self._num_rested > self._rest
        drafting = 0.0
        if has_drafted:
            # One long pause of the machine would be remembered for hundreds of steps.
            self._took.append(draft_seconds)
            drafting = median(self._took)
        self._tokens = _DECAY * self._tokens + gained
        self._seconds = _DECAY * self._seconds + decode + drafting
        if has_drafted:
            self._plan_rest(drafting)

    def _plan_rest(self, drafting: float) -> None:
        """After a step that drafted, which takes `drafting` seconds: how many do without now."""
        self._weight = _FORGET * self._weight + 1
        self._num_rested = 0
        if self._gained >= self._weight * drafting or self.costs.are_free:
            self._rest = 0
        else:
            self._rest = min(max(2 * self._rest, 1), _LONGEST_REST)
