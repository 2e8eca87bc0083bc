# SPDX-License-Identifier: Apache-2.0
"""How many drafted tokens a step verifies: as many as pay for the wider forward.

A step that packs T tokens, n of them drafted, costs `StepCosts(T - n, n)` seconds. A drafted token pays while the chance that
it is accepted exceeds what the wider forward costs, counted in tokens at the stream's present
speed: n maximises (expected tokens) - speed * cost(n), whose fixed point is the highest ratio of
tokens to seconds (Dinkelbach 1967). All slots compete for the same n tokens. So one slot drafts
long, a stream that fills the hardware hardly at all, without a setting.

Chances are taken times the share of what was expected of verified drafts that came true lately: those
that are chosen are more often overrated than underrated (the optimizer's curse, Smith and Winkler 2006).

Drafting takes time, too. Where it lately brought less than that, the next step does without, then two,
four, up to `_LONGEST_REST`, as long as the draft in between says the same; up to `_MOST_STEPS` where it takes
as long as a step, as where a GPU waits for it. After the longest, a few drafts
are verified for half of their price, since a price that nothing is bought for is not known for long; and
where that shows that they do not pay, after two such rests, then four, up to `_MOST_RESTS`.

Invariants
- Changes speed, never a token.
- A step verifies at most as many drafts as the widest measured step had tokens.

Used by: `engine.Engine`, `engine.speculation`, `engine.step_costs`.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from statistics import median

import numpy as np
from numpy.typing import NDArray

_KEPT = 0.985  # of what is known of the present costs, per step
_BELIEVED = 5.0  # steps that the measured costs count for in the beginning
_LIKE = 3.0  # steps with drafts that what was known of their price counts for
_LEAST = 0.01  # of a step is what twice the tokens take more at least
_MIN_DEAR, _MAX_DEAR = 0.1, 100.0
_DECAY = 0.98  # of the counts that speed is computed from, per step
_SURPRISE = 0.5  # no step is believed to differ more than this share from its prediction
_DOUBT = 4.0  # accepted tokens, as expected, that are supposed to have been seen before
_FEW = 1 / 8  # of a step's tokens may be a prompt's where its cost counts
_FAR = 1000.0  # times the largest size measured
_MIN_FLOOR, _MAX_FLOOR = 0.02, 0.9
_LONGEST_REST = 16  # steps without a draft,
_MOST_STEPS = 64  # or, up to this, until a draft has taken no more
_SMALL = 1 / 50  # than this share of them
_MOST_RESTS = 16  # as long as that, from one look at half the price to the next
_MARGIN = 1.1  # times their price is what drafts must bring: it is known no better
_BOLD = 0.5  # of their price is what drafts may bring after such a rest, to see what they cost now,
_FEW_BOLD, _LEAST_BOLD = 1 / 4, 16  # and they may be so many of the step's tokens, or of a tile
_FORGET = 0.8  # of what drafts brought, per drafting step
_NUM_TIMED = 5  # drafting steps whose median drafting is said to take


class StepCosts:
    """Seconds of a step by packed tokens: measured at a few sizes, in between linear.

    Two numbers are kept current: what a step without drafts takes, and what drafts add to it, of what was
    measured. They are fitted to the latest steps (recursive least squares, exponentially weighted;
    Ljung 1999, ch. 11); what these do not tell stays as it was.

    Args:
        sizes: packed tokens, rising.
        seconds: what a step of each size takes.
        multiple: a step takes as long as if its packed tokens were padded to this many.
    """

    def __init__(
        self, sizes: Sequence[int], seconds: Sequence[float], *, multiple: int = 1
    ) -> None:
        self.are_free = False
        """Whether a wider forward costs nothing, whatever is observed."""
        self.multiple = multiple
        """A step takes as long as if its packed tokens were padded to this many."""
        self.max_tokens = int(sizes[-1])
        """The largest size measured."""
        # Beyond the largest size it goes on as it did between the last two.
        self.reach = np.array([*sizes, _FAR * sizes[-1]], np.float64)
        """[m] sizes at which seconds are known, rising; in between they are linear."""
        # Fewer tokens never take longer: where they seemed to, the machine was busy with something else.
        rising = list(accumulate(reversed(seconds), min))[::-1]
        slope = (rising[-1] - rising[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
        rising.append(rising[-1] + slope * (_FAR - 1) * sizes[-1])
        self._rising = np.array(rising, np.float64)
        # The same for Python, whose arithmetic is at hand between two forwards; NumPy's is not.
        self._sizes, self._seconds = self.reach.tolist(), rising
        self._plain = self._dear = 1.0
        self._sums = [0.0] * 6  # see `_add`

    @classmethod
    def free(cls) -> "StepCosts":
        """A wider forward costs nothing, whatever is observed: every draft is verified."""
        costs = cls([1, 1 << 20], [1.0, 1.0])
        costs.are_free = True
        return costs

    def __call__(self, num_tokens: int, num_drafts: int = 0) -> float:
        """Seconds of a step of `num_tokens` and `num_drafts` drafted ones; more never costs less.

        Of `free` ones only their ratio means something.
        """
        plain, drafts = self._measured(num_tokens, num_drafts)
        return self._plain * plain + self._dear * drafts

    def prices(self, num_tokens: int) -> NDArray[np.float64]:
        """[m] seconds of the sizes `reach`, but for a constant, where `num_tokens` are no drafts."""
        if self.are_free:
            return self._rising
        first = self._padded(num_tokens)
        least = _least(first, self._at(first))
        return self._dear * (self._rising + least * self.reach)

    def observe(self, num_tokens: int, num_drafts: int, seconds: float) -> None:
        """Learn from a step of `num_tokens` and `num_drafts` drafted ones."""
        if self.are_free:
            return
        plain, drafts = self._measured(num_tokens, num_drafts)
        expected = self._plain * plain + self._dear * drafts
        taken = min(max(seconds, (1 - _SURPRISE) * expected), (1 + _SURPRISE) * expected)
        if not self._sums[0] or (drafts and not self._sums[-1]):
            self._add(plain, drafts, expected, _BELIEVED)
        self._sums = [_KEPT * x for x in self._sums]
        self._add(plain, drafts, taken, 1)
        self._fit(plain)

    def _add(self, plain: float, drafts: float, taken: float, times: float) -> None:
        """`plain` and `drafts` as measured; `taken`: what the step really took."""
        products = plain * plain, plain * drafts, drafts * drafts, plain * taken, drafts * taken
        added = *products, drafts > 0
        self._sums = [x + times * y for x, y in zip(self._sums, added, strict=True)]

    def _fit(self, plain: float) -> None:
        # Least squares, with one more term: that the ratio of the two numbers is what it was.
        plains, mixed, drafts, plain_taken, drafts_taken, num_drafting = self._sums
        like, ratio = 1e-4 * plain * plain, self._dear / self._plain
        if num_drafting:
            like += _LIKE * drafts / num_drafting
        a, b, c = plains + ratio * ratio * like, mixed - ratio * like, drafts + like
        factor = c * plain_taken - b * drafts_taken
        dear = a * drafts_taken - b * plain_taken
        ratio = min(max(dear / factor, _MIN_DEAR), _MAX_DEAR) if factor > 0 else _MAX_DEAR
        # The best for this ratio: the ratio itself is free but within its bounds.
        self._plain = (plain_taken + ratio * drafts_taken) / (
            plains + 2 * ratio * mixed + ratio**2 * drafts
        )
        self._dear = ratio * self._plain

    def _measured(self, num_tokens: int, num_drafts: int) -> tuple[float, float]:
        """Seconds, as measured, without drafts, and more with them."""
        first, last = self._padded(num_tokens), self._padded(num_tokens + num_drafts)
        plain, all_of_it = self._at(first), self._at(last)
        return plain, all_of_it - plain + _least(first, plain) * (last - first)

    def _at(self, size: int) -> float:
        """Seconds as measured, and in between linear."""
        sizes, seconds = self._sizes, self._seconds
        index = min(max(bisect_right(sizes, size), 1), len(sizes) - 1)
        before, first = sizes[index - 1], seconds[index - 1]
        # Sizes are whole, and there may be one only.
        share = max(size - before, 0.0) / max(sizes[index] - before, 1.0)
        return first + share * (seconds[index] - first)

    def _padded(self, num_tokens: int) -> int:
        return -(-num_tokens // self.multiple) * self.multiple


def _least(num_tokens: int, seconds: float) -> float:
    """Seconds that one more token than in such a step costs: what was measured may be flat by chance."""
    return _LEAST * seconds / max(num_tokens, 1)


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
        self._longest_rest = _LONGEST_REST
        # Longest rests to the next look at half the price, and from that one to the next.
        self._num_rests = self._patience = 1
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

    @property
    def goes_on_resting(self) -> bool:
        """Whether this step rests, and the next one will."""
        return self._num_rested < self._rest

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
        # What is never tried would never become cheaper.
        self._num_rests -= self._rest == self._longest_rest
        is_bold = self._num_rests == 0
        most = costs.max_tokens
        if is_bold:
            most = min(max(int(_FEW_BOLD * num_tokens), _LEAST_BOLD), most)
        pays, self._expects, least, wants_all, gain = self._choose(
            np.ascontiguousarray(survival), min(self.trust, 1.0), speed, costs.reach,
            (_BOLD if is_bold else _MARGIN) * costs.prices(num_tokens), costs.multiple, num_tokens, most,
        )  # fmt: skip
        # Draft a little more than is verified, so that what would pay is seen.
        floor = 0.5 * (self.floor if wants_all else least)
        self.floor = min(max(floor, _MIN_FLOOR), _MAX_FLOOR)
        if is_bold:
            num_drafts = int(pays.sum())
            price = costs(num_tokens, num_drafts) - costs(num_tokens)
            gain -= (_MARGIN - _BOLD) * speed * price
            # If these few pay for their drafting, see soon what all would bring.
            if gain > speed * median(self._took):
                self._rest = 0
                self._patience = 1
            else:
                self._patience = min(2 * self._patience, _MOST_RESTS)
            self._num_rests = self._patience
        self._gained = _FORGET * self._gained + (gain / speed if gain > 0 else 0.0)
        return pays

    def observe(
        self,
        num_tokens: int,
        num_prefill_tokens: int,
        num_drafts: int,
        gained: float,
        num_accepted: float,
        seconds: float,
        draft_seconds: float,
        *,
        teaches_costs: bool = True,
    ) -> None:
        """Learn from a step.

        Args:
            num_tokens: packed.
            num_prefill_tokens: of them, such as the step computed whatever was drafted.
            num_drafts: of them, drafted ones.
            gained: tokens added to completions.
            num_accepted: of the drafted tokens, second choices included.
            seconds: the whole step.
            draft_seconds: of them, what drafting took. Where a GPU waits for it, all that it waited for,
                also in a step without drafts; that may have begun with the end of the step before.
            teaches_costs: whether steps like it will take as long.
        """
        self._expected = _DECAY * self._expected + self._expects
        self._accepted = _DECAY * self._accepted + num_accepted
        self._expects = 0.0
        # A prompt's tokens cost otherwise than sampled ones, and would make all of these look dear.
        if teaches_costs and num_prefill_tokens <= _FEW * num_tokens:
            self.costs.observe(num_tokens - num_drafts, num_drafts, seconds - draft_seconds)
        num_plain = num_tokens - num_prefill_tokens - num_drafts
        decode = self.costs(max(num_plain, 1), num_drafts)
        has_drafted = self._num_rested > self._rest
        if has_drafted:
            self._took.append(draft_seconds)
        # One long pause of the machine would be remembered for hundreds of steps.
        usual = median(self._took) if self._took else 0.0
        drafting = usual if has_drafted else min(draft_seconds, usual)
        self._tokens = _DECAY * self._tokens + gained
        self._seconds = _DECAY * self._seconds + decode + drafting
        if has_drafted:
            self._plan_rest(drafting, decode)

    def _plan_rest(self, drafting: float, decode: float) -> None:
        """After a step that drafted, which takes `drafting` seconds of it, and the rest `decode`: how
        many do without now."""
        self._weight = _FORGET * self._weight + 1
        self._num_rested = 0
        if self._gained >= self._weight * drafting or self.costs.are_free:
            self._rest = 0
        else:
            num = int(drafting / (_SMALL * decode))
            self._longest_rest = min(max(num, _LONGEST_REST), _MOST_STEPS)
            self._rest = min(max(2 * self._rest, 1), self._longest_rest)
