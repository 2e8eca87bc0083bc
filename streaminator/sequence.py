# SPDX-License-Identifier: Apache-2.0
"""What travels through the stream: `Prompt` in, `Sequence` in flight, `Completion` out.

Used by: everything. No torch.
"""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """An end-of-text token, a stop token id or a stop string."""
    LENGTH = "length"
    """`max_length`, or the model's context is full."""
    FAILED = "failed"
    """It could not be drawn; `Completion.error` says why."""
    SETTLED = "settled"
    """It was not drawn: the answers before it were settled (`--stop_when_settled`)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distributions:
    """What the model gave its most likely tokens wherever a completion's tokens were drawn."""

    top_ids: NDArray[np.int32]
    """[n, M] most likely first."""
    top_probs: NDArray[np.float32]
    """[n, M] at the sampling temperature (greedy: at 1), before top-k, top-p and min-p."""
    step_lengths: tuple[int, ...]
    """Tokens that each decoding step added; they sum to n."""
    rejected_ids: NDArray[np.int32]
    """[r] drafted tokens that were rejected, whose continuation verifying has told."""
    rejected_top_ids: NDArray[np.int32]
    """[r, M] after each of them, and all before it in its draft."""
    rejected_top_probs: NDArray[np.float32]
    """[r, M]"""
    rejected_lengths: tuple[int, ...]
    """Of them, how many each step verified; as many steps, they sum to r."""

    @classmethod
    def from_steps(cls, steps: Seq["StepTop"], num_top: int) -> "Distributions":
        """Those of a completion, put together from its decoding steps."""
        ids = [np.zeros((0, num_top), np.int32), *(step.ids for step in steps)]
        probs = [np.zeros((0, num_top), np.float32), *(step.probs for step in steps)]
        num_rejected = [0, *(len(step.rejected) for step in steps)]

        def join(arrays: list[NDArray[Any]], *, is_rejected: bool) -> NDArray[Any]:
            ends = [len(rows) - num for rows, num in zip(arrays, num_rejected, strict=True)]
            pieces = zip(arrays, ends, strict=True)
            return np.concatenate([a[end:] if is_rejected else a[:end] for a, end in pieces])

        return cls(
            top_ids=join(ids, is_rejected=False),
            top_probs=join(probs, is_rejected=False),
            step_lengths=tuple(len(step.ids) - len(step.rejected) for step in steps),
            rejected_ids=np.array([token for step in steps for token in step.rejected], np.int32),
            rejected_top_ids=join(ids, is_rejected=True),
            rejected_top_probs=join(probs, is_rejected=True),
            rejected_lengths=tuple(num_rejected[1:]),
        )

    def likeliest(self, num_top: int) -> "Distributions":
        """The same with at most `num_top` tokens per position."""
        names = ("top_ids", "top_probs", "rejected_top_ids", "rejected_top_probs")
        return replace(self, **{name: getattr(self, name)[:, :num_top] for name in names})


class StepTop(NamedTuple):
    """What the model gave in one decoding step of one sequence."""

    rejected: list[int]
    ids: NDArray[np.int32]
    """[tokens added + rejected, M]"""
    probs: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One input with the completions still to draw for it: the unit of work."""

    prompt_id: str
    """Stable id; part of the key of the sampling noise."""
    token_ids: tuple[int, ...]
    text: str
    """The prompt as the model sees it, template and examples included."""
    question: str
    gold_answer: str | None = None
    """The dataset's answer text, unparsed; None: not graded."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Columns copied into the output, as text."""
    sample_indices: tuple[int, ...] = (0,)
    """Completions to draw, in this order."""
    finished: tuple[tuple[int, ...], ...] = ()
    """Token ids of completions drawn before; the speculator learns from them."""
    finished_distributions: tuple[Distributions | None, ...] = ()
    """One per completion of `finished`, None where they were not kept; empty: none were."""
    finished_parts: tuple[str, ...] = ()
    """Names of the published parts that hold them, for whoever has not read `finished` yet."""
    warm_parts: tuple[str, ...] = ()
    """Names of the parts of the run of `--warm_start` that hold completions of it."""
    num_retries: int = 0
    """Workers lost while they held the prompt."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A completion in flight. Only the engine changes it."""

    prompt: Prompt
    sample_index: int
    token_ids: list[int]
    """Prompt and completion."""
    noise_key: int
    """Signed 64-bit key of this completion's sampling noise."""
    max_num_tokens: int
    """Length of prompt and completion at which it ends."""
    started_at: float
    """Seconds since the epoch."""
    block_table: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    """Tokens whose keys and values are in the cache."""
    num_scheduled_tokens: int = 0
    """Known tokens to compute in the current step, drafts not counted."""
    draft: list[int] = field(default_factory=list)
    """Tokens to verify in the current step."""
    alternatives: dict[int, int] = field(default_factory=dict)
    """Second choices to verify beside them: {place in the draft: token}."""
    may_draft: bool = True
    """False once a draft led the model to logits that are not finite."""
    logprobs: list[float] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    """Per decoding step: tokens drafted."""
    accepted: list[int] = field(default_factory=list)
    """Per decoding step: drafted tokens accepted."""
    top: list[StepTop] = field(default_factory=list)
    """Per decoding step, where they are kept."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.token_ids)

    @property
    def completion_token_ids(self) -> list[int]:
        """Tokens drawn so far."""
        return self.token_ids[len(self.prompt.token_ids) :]

    @property
    def num_uncached_tokens(self) -> int:
        """Known tokens whose keys and values are still to be computed."""
        return len(self.token_ids) - self.num_cached_tokens

    @property
    def is_sampled(self) -> bool:
        """Whether the current step reaches the last known token, so that a new one is drawn."""
        return self.num_scheduled_tokens == self.num_uncached_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished (or failed) completion, as it is written out."""

    prompt: Prompt
    sample_index: int
    token_ids: list[int]
    text: str
    """Decoded without special tokens, cut before a stop string."""
    finish_reason: FinishReason
    logprobs: list[float]
    """Log-probability of each token under the model at temperature 1, unfiltered."""
    from_draft: list[bool]
    """One per token: whether it came from an accepted draft."""
    drafted: list[int]
    """Per decoding step: tokens drafted."""
    accepted: list[int]
    """Per decoding step: drafted tokens accepted."""
    started_at: float
    """Seconds since the epoch."""
    finished_at: float
    error: str | None = None
    distributions: Distributions | None = None


def not_drawn(
    prompt: Prompt, sample_index: int, reason: FinishReason, error: str | None = None
) -> Completion:
    """What stands for a completion without tokens."""
    now = time.time()
    return Completion(
        prompt=prompt,
        sample_index=sample_index,
        token_ids=[],
        text="",
        finish_reason=reason,
        logprobs=[],
        from_draft=[],
        drafted=[],
        accepted=[],
        started_at=now,
        finished_at=now,
        error=error,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One engine step, as it is written out."""

    time: float
    """Seconds since the epoch, at the end of the step."""
    num_running: int
    """Slots in use."""
    stream_width: int
    """Slots."""
    num_prefill_tokens: int
    """Prompt (or recomputed) tokens whose keys and values were computed."""
    num_decode_tokens: int
    """Sequences for which a token was drawn."""
    num_draft_tokens: int
    num_accepted_tokens: int
    num_new_tokens: int
    """Tokens added to completions."""
    num_draft_by_survival: list[int] = field(default_factory=list)
    """[10] tokens drafted, by tenths of the chance of acceptance that the speculator gave them;
    empty where it gives none."""
    num_accepted_by_survival: list[int] = field(default_factory=list)
    """[10] the accepted ones of these."""
    seconds_schedule: float
    seconds_draft: float
    seconds_pack: float
    seconds_forward: float
    seconds_sample: float
    seconds_verify: float
    seconds_commit: float
    """Commit, retire, and, where steps do not overlap, learning."""
    num_blocks_used: int
    device_memory: int
    """Bytes in use: torch's on a GPU, the process's resident set on a CPU."""
