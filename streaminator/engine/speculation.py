# SPDX-License-Identifier: Apache-2.0
"""The stream's side of speculation: who drafts how much, and what a step teaches.

Used by: `engine.Engine`.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streaminator.config import SpeculatorConfig
from streaminator.errors import ConfigError
from streaminator.sequence import Distributions, Sequence, StepTop
from streaminator.speculative.draft_budget import DraftBudget
from streaminator.speculative.speculator import MAX_REJECTED, Gain, Store
from streaminator.speculative.store import SpeculatorStore
from streaminator.speculative.verify import Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Speculation:
    """A store of speculators and the budget of its drafts; with speculation off it does nothing."""

    def __init__(
        self,
        config: SpeculatorConfig,
        *,
        is_greedy: bool,
        num_kept_prompts: int,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> None:
        """`num_kept_prompts`: finished prompts whose speculators stay, for when they come again;
        `tokenizer` says what numbers are."""
        self._config = config
        self._is_on = config.spec_decoding
        self.has_budget = self._is_on and config.speculator == "memory"
        """Whether a `budget` decides how many drafts are verified."""
        self.store = self._make_store(is_greedy, num_kept_prompts, tokenizer)
        learned = self.store.num_top if self._is_on else 0
        self.num_top = config.num_top_tokens if config.store_distributions else learned
        """The model's most likely tokens that a step is to tell at each position."""
        self.budget: DraftBudget | None = None

    def _make_store(
        self,
        is_greedy: bool,
        num_kept_prompts: int,
        tokenizer: "PreTrainedTokenizerBase | None",
    ) -> Store:
        if not self.has_budget:
            return SpeculatorStore(self._config, num_kept_prompts=num_kept_prompts)
        # Imported late: its compiled loops take a moment to load.
        from streaminator.speculative.memory_store import MemoryStore
        from streaminator.speculative.memory_texts import number_tokens

        try:
            return MemoryStore(
                self._config,
                is_greedy=is_greedy,
                num_kept_prompts=num_kept_prompts,
                numbers=None if tokenizer is None else number_tokens(tokenizer),
            )
        except MemoryError as error:
            raise ConfigError(
                f"--speculator_memory {self._config.speculator_memory}: more MiB than this machine "
                "gives; give fewer"
            ) from error

    @property
    def rests_next(self) -> bool:
        """Whether it is known already that the next step does not draft."""
        return not self._is_on or (self.budget is not None and self.budget.goes_on_resting)

    def start(self, sequence: Sequence) -> None:
        """A completion begins."""
        if self._is_on:
            self.store.start(sequence)

    def draft(
        self, sequences: list[Sequence], reserve: Callable[[Sequence, int], int]
    ) -> tuple[list[Sequence], NDArray[np.float32] | None]:
        """Give each sequence its draft, of which `reserve` says how much fits.

        Returns:
            Who may draft, and [n, 2, k] the store's chances of acceptance, if it gives any.
        """
        for sequence in sequences:
            sequence.draft, sequence.alternatives = [], {}
        if not self._is_on or (self.budget and self.budget.rests()):
            return [], None
        drafting = [s for s in sequences if s.is_sampled and s.may_draft]
        # The step adds one token more than it accepts.
        most = self._config.max_draft
        caps = [min(most, s.max_num_tokens - len(s.token_ids) - 1) for s in drafting]
        floor = self.budget.floor if self.budget else 0.0
        tokens, lengths, survival = self.store.draft_all(drafting, caps, floor)
        seconds: Iterable[tuple[int, ...]] = ()
        if self.budget and survival is not None:
            num_tokens = sum(s.num_scheduled_tokens for s in sequences)
            pays = self.budget.cut(survival, num_tokens, len(drafting))
            lengths = pays[:, 0].sum(1)
            places = np.nonzero(pays[:, 1])
            seconds = zip(*(x.tolist() for x in (*places, tokens[:, 1][places])), strict=True)
        chains = tokens[:, 0, : lengths.max(initial=0)].tolist()
        for sequence, chain, num in zip(drafting, chains, lengths.tolist(), strict=True):
            if num:
                sequence.draft = chain[: reserve(sequence, num)]
        for index, place, token in seconds:
            if place < len(drafting[index].draft):
                drafting[index].alternatives[place] = token
        return drafting, survival

    def gain(self, verdict: Verdict, new: list[int], *, has_ended: bool) -> Gain:
        """What there is to learn from a sequence's rows."""
        sequence, accepted = verdict.sequence, verdict.num_accepted
        rows = verdict.rows[: len(new)]
        rejected: list[int] = []
        if self.num_top and not has_ended and not verdict.takes_second:
            rejected = sequence.draft[accepted : accepted + MAX_REJECTED]
            rows.extend(range(rows[-1] + 1, rows[-1] + 1 + len(rejected)))
        return Gain(sequence, new, rejected, rows)

    def advance(
        self,
        gains: Seq[Gain],
        top_ids: NDArray[np.int64],
        top_probs: NDArray[np.float32],
        *,
        overlaps: bool,
    ) -> None:
        """Go on to what a step's sequences gained; see `Store.advance_all`.

        Where the host `overlaps` with the device, nothing is put off: the host has time now.
        """
        if self._config.store_distributions:
            for gain in gains:
                ids, probs = top_ids[gain.rows].astype(np.int32), top_probs[gain.rows]
                gain.sequence.top.append(StepTop(gain.rejected, ids, probs))
        if not self._is_on:
            return
        if self.num_top > self.store.num_top == 0:
            gains = [
                gain._replace(rejected=[], rows=gain.rows[: len(gain.token_ids)]) for gain in gains
            ]
        may_wait = not overlaps and self.budget is not None and self.budget.goes_on_resting
        self.store.advance_all(gains, top_ids, top_probs, may_wait=may_wait)

    def learn(self) -> None:
        """Learn what they gained; see `Store.learn_all`."""
        if self._is_on:
            self.store.learn_all()

    def observe_step(
        self,
        num_tokens: int,
        num_prefill_tokens: int,
        num_drafts: int,
        gained: int,
        num_accepted: int,
        seconds: float,
        draft_seconds: float,
        *,
        teaches_costs: bool,
    ) -> None:
        """Learn what a step cost and brought; see `DraftBudget.observe`."""
        if self.budget:
            self.budget.observe(
                num_tokens, num_prefill_tokens, num_drafts, gained, num_accepted, seconds,
                draft_seconds, teaches_costs=teaches_costs,
            )  # fmt: skip

    def finish(self, sequence: Sequence, *, has_failed: bool) -> None:
        """A completion has ended."""
        if self._is_on:
            self.store.finish(sequence, has_failed=has_failed)

    def distributions(self, sequence: Sequence) -> Distributions | None:
        """What the model gave at each of its places, where that is kept."""
        if not self._config.store_distributions:
            return None
        return Distributions.from_steps(sequence.top, self.num_top)
