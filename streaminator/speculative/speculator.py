# SPDX-License-Identifier: Apache-2.0
"""The interface between the stream and whatever drafts tokens.

A speculator belongs to one prompt. It may guess anything: a draft changes speed, never a token.

Used by: `ngram` (implements it), `store` (keeps them), `engine.Engine` (through the store).
"""

from collections.abc import Sequence
from typing import Protocol


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
