# SPDX-License-Identifier: Apache-2.0
"""What a step carries from its launch to its statistics.

Used by: `engine.Engine`.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from streaminator.engine.batch import Newest
from streaminator.engine.sampler import Transfer
from streaminator.engine.step_clock import StepClock
from streaminator.sequence import Completion, Distributions, FinishReason, Sequence, StepStats
from streaminator.speculative.speculator import Gain
from streaminator.speculative.verify import Verdict, calibration


@dataclass(slots=True, kw_only=True)
class Launched:
    """A step whose forward is on its way."""

    clock: StepClock
    sampled: list[Sequence]
    """Those that a token is drawn for."""
    drafting: list[Sequence]
    survival: NDArray[np.float32] | None
    """[n, 2, k] of those that are `drafting`; see `speculator.Guesses`."""
    transfer: Transfer
    tokens: torch.Tensor
    """[R] drawn, on the device."""
    num_tokens: int
    """Packed."""
    num_sampled: int
    """Of them, rows that a token is drawn on."""
    num_running: int
    stream_width: int
    teaches_costs: bool
    drafting_seconds: float
    """What drafting took; where steps overlap, for how long the GPU had nothing to do, from the tokens of
    the step before to the forward: without drafts it would have had."""
    is_assumed: bool = False
    """Whether each sequence has gone on, for the launch of the next step, to a token that only the
    device knows, and a placeholder stands for it."""
    void: set[Sequence] = field(default_factory=set)
    """Sequences whose rows say nothing: launched before the token before them was known, which has
    turned out to be the last one, or another one than the device had."""

    @property
    def newest(self) -> Newest:
        """What the next step is packed with, where this one `is_assumed`."""
        rows = {s: row for row, s in enumerate(self.sampled) if s not in self.void}
        return Newest(self.tokens, rows)


class Ended(NamedTuple):
    """A sequence that a step has ended."""

    sequence: Sequence
    reason: FinishReason
    error: str | None
    at: float
    """Seconds since the epoch; the prompt's next one begins after that."""
    ends_prompt: bool
    """Whether it was its prompt's last one."""

    def completion(self, text: str, distributions: Distributions | None) -> Completion:
        """As it is written out."""
        sequence = self.sequence
        return Completion(
            prompt=sequence.prompt,
            sample_index=sequence.sample_index,
            token_ids=sequence.completion_token_ids,
            text=text,
            finish_reason=self.reason,
            logprobs=sequence.logprobs,
            from_draft=sequence.from_draft,
            drafted=sequence.drafted,
            accepted=sequence.accepted,
            started_at=sequence.started_at,
            finished_at=self.at,
            error=self.error,
            distributions=distributions,
        )


@dataclass(frozen=True)
class Collected:
    """A step whose tokens are known and added to their sequences."""

    launched: Launched
    verdicts: list[Verdict]
    gains: list[Gain]
    ended: list[Ended]
    at: float
    """Seconds since the epoch."""
    num_blocks_used: int
    device_memory: int

    @cached_property
    def num_new(self) -> int:
        """Tokens added to completions."""
        return sum(len(gain.token_ids) for gain in self.gains)

    @cached_property
    def decoded(self) -> list[Sequence]:
        """Sequences for which tokens were drawn."""
        return [verdict.sequence for verdict in self.verdicts if verdict.drawn]

    @cached_property
    def num_drafts(self) -> int:
        """Tokens verified."""
        return sum(sequence.drafted[-1] for sequence in self.decoded)

    @cached_property
    def num_accepted(self) -> int:
        """Of them, accepted."""
        return sum(sequence.accepted[-1] for sequence in self.decoded)

    def stats(self, at: float) -> StepStats:
        """As they are written out; `at`: when the step was over."""
        launched = self.launched
        verified, accepted = calibration(launched.drafting, launched.survival, self.verdicts)
        return StepStats(
            time=at,
            num_running=launched.num_running,
            stream_width=launched.stream_width,
            num_prefill_tokens=launched.num_tokens - launched.num_sampled,
            num_decode_tokens=len(self.decoded),
            num_draft_tokens=self.num_drafts,
            num_accepted_tokens=self.num_accepted,
            num_new_tokens=self.num_new,
            num_draft_by_survival=verified,
            num_accepted_by_survival=accepted,
            num_blocks_used=self.num_blocks_used,
            device_memory=self.device_memory,
            **launched.clock.seconds,
        )
