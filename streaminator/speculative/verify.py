# SPDX-License-Identifier: Apache-2.0
"""Verify: how much of a draft the sampler itself would have drawn.

Used by: `streaminator.engine.engine`.
"""

from collections.abc import Sequence


def count_accepted(drawn: Sequence[int], draft: Sequence[int]) -> int:
    """Number of leading draft tokens that equal the tokens drawn at their positions.

    Args:
        drawn: the token drawn after each prefix of the draft, len(draft) + 1 of them.
        draft: the drafted tokens.

    Returns:
        n; `drawn[: n + 1]` is what the step adds to the completion, the last one being the
        correction or, after a fully accepted draft, the bonus token (Leviathan et al. 2023,
        section 2.3, for drafts that are certain of their token).
    """
    for index, token in enumerate(draft):
        if drawn[index] != token:
            return index
    return len(draft)
