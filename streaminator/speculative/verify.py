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
    """Accepted drafts and one more; none where its prefill goes on."""
    logprobs: list[float]
    rows: list[int]
    """Which of the sampled rows each was drawn on."""
    num_accepted: int
    """Of the chain."""

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
        sequences: as they were packed.
        tokens: drawn on each sampled row: those of the sequences, one after another, then those
            of their second choices.
        logprobs: of these tokens.
    """
    verdicts = []
    row = 0
    for sequence in sequences:
        if not sequence.is_sampled:
            verdicts.append(Verdict(sequence, [], [], [], 0))
            continue
        num_rows = 1 + len(sequence.draft)
        num = count_accepted(tokens[row : row + num_rows], sequence.draft)
        end = row + num + 1
        rows = list(range(row, end))
        verdicts.append(Verdict(sequence, tokens[row:end], logprobs[row:end], rows, num))
        row += num_rows
    for verdict in verdicts:
        for place, token in verdict.sequence.alternatives.items():
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
    verified, accepted = [0] * 10, [0] * 10
    verdict_of = {id(v.sequence): v for v in verdicts if v.sequence.draft}
    for sequence, (chain, beside) in zip(drafting, survival.tolist(), strict=True):
        verdict = verdict_of.get(id(sequence))
        if verdict is None:
            continue
        for place, chance in enumerate(chain[: len(sequence.draft)]):
            tenth = min(int(chance * 10), 9)
            verified[tenth] += 1
            accepted[tenth] += place < verdict.num_accepted
        for place in sequence.alternatives:
            tenth = min(int(beside[place] * 10), 9)
            verified[tenth] += 1
            accepted[tenth] += verdict.takes_second and place == verdict.num_accepted
    return verified, accepted
