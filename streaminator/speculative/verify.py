# SPDX-License-Identifier: Apache-2.0
"""Verify: how much of a draft the sampler itself would have drawn.

Used by: `streaminator.engine.engine`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator import sequence as flight


class Verdict(NamedTuple):
    """What a sequence gains in a step."""

    sequence: flight.Sequence
    drawn: list[int]
    """Accepted drafts and one more."""
    logprobs: list[float]
    rows: list[int]
    """Which of the sampled rows each was drawn on."""
    num_accepted: int
    """Of the chain."""
    draft: list[int]
    """What was verified: the chain."""
    alternatives: dict[int, int]
    """And second choices: {place in the chain: token}."""

    @property
    def takes_second(self) -> bool:
        """Whether behind the accepted part of the chain a second choice was right."""
        return len(self.drawn) > self.num_accepted + 1


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


def verify(
    sequences: Sequence[flight.Sequence], tokens: list[int], logprobs: list[float]
) -> list[Verdict]:
    """Compare the drafts of all sequences with the tokens drawn on their rows.

    Args:
        sequences: those that a token was drawn for, as they were packed.
        tokens: drawn on each sampled row: those of the sequences, one after another, then those
            of their second choices.
        logprobs: of these tokens.
    """
    verdicts = []
    row = 0
    for sequence in sequences:
        draft, beside = sequence.draft, sequence.alternatives
        num = count_accepted(tokens[row : row + 1 + len(draft)], draft)
        end = row + num + 1
        drawn, rows = tokens[row:end], list(range(row, end))
        verdicts.append(Verdict(sequence, drawn, logprobs[row:end], rows, num, draft, beside))
        row += 1 + len(draft)
    for verdict in verdicts:
        for place, token in verdict.alternatives.items():
            if place == verdict.num_accepted and verdict.drawn[place] == token:
                verdict.drawn.append(tokens[row])
                verdict.logprobs.append(logprobs[row])
                verdict.rows.append(row)
            row += 1
    return verdicts


def calibration(
    drafting: Sequence[flight.Sequence],
    survival: NDArray[np.float32] | None,
    verdicts: Sequence[Verdict],
) -> tuple[list[int], list[int]]:
    """Verified and accepted tokens by tenths of the chance given; empty without one.

    Args:
        drafting: [n] whom `survival` [n, 2, k] is of.
        survival: of chains and second choices.
        verdicts: of all sequences of the step.
    """
    if survival is None:
        return [], []
    verdict_of = {v.sequence: v for v in verdicts if v.draft}
    own = [verdict_of.get(sequence) for sequence in drafting]
    bounds = [(len(v.draft), v.num_accepted) if v else (0, 0) for v in own]
    lengths, right = np.array(bounds, np.int64).reshape(-1, 2, 1).swapaxes(0, 1)
    tenths = np.minimum(survival * 10, 9).astype(np.int64)
    places = np.arange(survival.shape[2])
    verified = np.bincount(tenths[:, 0][places < lengths], minlength=10).tolist()
    accepted = np.bincount(tenths[:, 0][places < right], minlength=10).tolist()
    for index, verdict in enumerate(own):
        if verdict is None:
            continue
        for place in verdict.alternatives:
            tenth = tenths[index, 1, place]
            verified[tenth] += 1
            accepted[tenth] += verdict.takes_second and place == verdict.num_accepted
    return verified, accepted
