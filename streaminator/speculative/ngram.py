# SPDX-License-Identifier: Apache-2.0
"""The online n-gram speculator of the original Streaminator.

Counts what followed each context of `order - 1` tokens; drafts the most frequent continuation,
and where the context is new the most frequent token of all (unigram fall-back).

Used by: `store`.
"""

from collections.abc import Sequence

# A dictionary entry with its key and its counter, measured with tracemalloc over real text.
_BYTES_PER_ENTRY = 330


class NGramSpeculator:
    """An n-gram model of order `order` (2: bigram) learned from the texts it observed."""

    def __init__(self, order: int) -> None:
        self._context_length = order - 1
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}
        self._best: dict[tuple[int, ...], int] = {}
        self._num_entries = 0

    @property
    def num_bytes(self) -> int:
        """Memory held, approximately."""
        return self._num_entries * _BYTES_PER_ENTRY

    def observe(self, token_ids: Sequence[int]) -> None:
        """Count every n-gram of a text. Among equally frequent continuations the newest wins."""
        length = self._context_length
        for index, token in enumerate(token_ids):
            self._count((), token)
            if length and index >= length:
                self._count(tuple(token_ids[index - length : index]), token)

    def draft(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Follow the most frequent continuations; at most one token by the unigram fall-back."""
        length = self._context_length
        recent = list(token_ids[-length:]) if length else []
        draft: list[int] = []
        while len(draft) < max_tokens:
            context = tuple(recent[-length:]) if length else ()
            token = self._best.get(context)
            if token is None:
                fallback = self._best.get(())
                # What follows a guess without context is not worth verifying.
                return draft if draft or fallback is None else [fallback]
            draft.append(token)
            recent.append(token)
        return draft

    def _count(self, context: tuple[int, ...], token: int) -> None:
        counts = self._counts.setdefault(context, {})
        count = counts.get(token, 0) + 1
        self._num_entries += count == 1
        counts[token] = count
        best = self._best.get(context)
        if best is None or count >= counts[best]:
            self._best[context] = token
