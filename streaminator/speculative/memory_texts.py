# SPDX-License-Identifier: Apache-2.0
"""Texts that the memory learns without drafting them, in the pieces it takes them in; which tokens
are numbers.

Used by: `memory`, `engine.Engine`, `streaminator.cli_replay`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaminator.sequence import Distributions
from streaminator.speculative.memory_records import Ints

_SPACES = " \u0120\u2581"  # as byte-level BPE and SentencePiece write them, too
NOTHING = np.zeros(0, np.int64)


def no_distributions(num: int) -> tuple[Ints, NDArray[np.float32]]:
    """For `num` tokens."""
    return np.zeros((num, 0), np.int64), np.zeros((num, 0), np.float32)


Step = tuple[Ints, Ints, Ints, NDArray[np.float32]]
"""Tokens, rejected drafts, and the distributions as `Memory.commit` takes them."""


def chunks(token_ids: Sequence[int], length: int) -> Iterator[Step]:
    """Of which nothing but the tokens is known."""
    for first in range(0, len(token_ids), length):
        tokens = np.array(token_ids[first : first + length], np.int64)
        yield tokens, NOTHING, *no_distributions(len(tokens))


def steps(token_ids: Sequence[int], top: Distributions) -> Iterator[Step]:
    """In the steps it was drawn in: when tables grow decides what overflows are cut."""
    first = first_rejected = 0
    knows = top.top_ids.shape[1] > 0
    for length, num_rejected in zip(top.step_lengths, top.rejected_lengths, strict=True):
        own = slice(first, first + length)
        others = slice(first_rejected, first_rejected + num_rejected * knows)
        ids = np.concatenate([top.top_ids[own], top.rejected_top_ids[others]])
        probs = np.concatenate([top.top_probs[own], top.rejected_top_probs[others]])
        yield (
            np.array(token_ids[own], np.int64),
            top.rejected_ids[others].astype(np.int64),
            ids.astype(np.int64),
            probs.astype(np.float32),
        )
        first, first_rejected = own.stop, others.stop


def number_tokens(tokenizer: Any) -> NDArray[np.bool_]:
    """[V] which of a tokenizer's tokens are digits only, but for a space before them."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([(token or "").lstrip(_SPACES).isdecimal() for token in tokens], np.bool_)
