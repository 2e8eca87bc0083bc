# SPDX-License-Identifier: Apache-2.0
"""The interfaces between the stream and whatever drafts tokens.

The stream talks to one `Store`, for all its sequences at once; a `Speculator` is what the n-gram
store keeps for each prompt. Either may guess anything: a draft changes speed, never a token.

Used by: `ngram`, `store`, `memory_store` (implement them), `engine.Engine` (calls the store).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from streaminator import sequence as flight
from streaminator.sequence import Prompt


class Speculator(Protocol):
    """Drafts tokens for one prompt's completions and learns from them."""

    def observe(self, token_ids: Sequence[int]) -> None:
        """Learn from a text: the prompt, or a finished completion.

        State is a function of the texts observed, in order, so it can be rebuilt from them.
        """
        ...

    def draft(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Guess up to `max_tokens` tokens that follow `token_ids` (prompt and completion)."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory held, approximately."""
        ...


MAX_REJECTED = 3
"""Rejected drafts of a step to learn from: later ones follow guesses that few completions make."""


class Guesses(NamedTuple):
    """What n sequences may go on with."""

    tokens: NDArray[np.int64]
    """[n, 2, k] tokens one after another (a chain), and at each of its places the second choice."""
    lengths: NDArray[np.int64]
    """[n] of the chains."""
    survival: NDArray[np.float32] | None = None
    """[n, 2, k] chance that a token of the chain, and all before it, is accepted, and that the
    second choice beside it is; 0 where there is none. None: not known, and no second choices."""


class Gain(NamedTuple):
    """What one sequence gained in a step."""

    sequence: flight.Sequence
    token_ids: list[int]
    """Accepted drafts and one more."""
    rejected: list[int]
    """The first drafts behind the accepted ones, at most `MAX_REJECTED`; none where M is 0, or
    where a second choice was accepted."""
    rows: list[int]
    """[len(token_ids) + len(rejected)] which of the sampled rows tell what the model said where each
    of `token_ids` was drawn, then after each of `rejected`."""


class Store(Protocol):
    """Drafts for all sequences of a stream."""

    num_top: int
    """M: how many of the model's most likely tokens it wants to learn from."""

    def start(self, sequence: flight.Sequence) -> None:
        """A completion begins."""
        ...

    def draft_all(
        self, sequences: Sequence[flight.Sequence], caps: Sequence[int], floor: float
    ) -> Guesses:
        """Guess up to `caps[i]` tokens, second choices included, that follow `sequences[i]`.

        Tokens less likely than `floor` to be accepted may be left out.
        """
        ...

    def advance_all(
        self,
        gains: Sequence[Gain],
        top_ids: NDArray[np.int64],
        top_probs: NDArray[np.float32],
        *,
        may_wait: bool = False,
    ) -> None:
        """Take in what a step drew, so that drafts go on from there.

        Args:
            gains: of the sequences that were drawn for.
            top_ids: [R, M or more] the model's most likely tokens on each sampled row.
            top_probs: [R, M or more] their probabilities.
            may_wait: this step drafted nothing, nor will the next one: it may be done later.
        """
        ...

    def learn_all(self) -> None:
        """Learn what the steps before drew; called before the sequences that ended with them finish.
        It may come after the next drafts.
        """
        ...

    def finish(self, sequence: flight.Sequence, *, has_failed: bool) -> None:
        """A completion has ended."""
        ...

    def drop(self, prompt: Prompt) -> None:
        """All completions of `prompt` are done."""
        ...
