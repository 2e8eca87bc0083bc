# SPDX-License-Identifier: Apache-2.0
"""Compiled: where in a step each token is, what it is and who draws on it.

Used by: `batch`.
"""

import numpy as np
from numpy.typing import NDArray

from streaminator.compiled import jit

Ints = NDArray[np.int64]


@jit
def lay_out(
    facts: Ints,
    seconds: Ints,
    blocks: Ints,
    block_size: int,
    starts: Ints,
    counts: Ints,
    firsts: Ints,
    tables: Ints,
    positions: Ints,
    slots: Ints,
    sampled: Ints,
    noise_keys: Ints,
    noise_positions: Ints,
) -> None:
    """Fill `starts` and all that follows, of the sequences and then of their second choices.

    Args:
        facts: [B, 8] of each sequence: tokens in the cache, to be computed, drafted, known, and of
            the prompt; the noise's key; whether it is sampled; blocks.
        seconds: [n, 3] of each second choice: its sequence, place in the draft, and token.
        blocks: of all sequences, one after another.
        block_size: tokens of a block.
        starts, counts, firsts, tables: as in `batch.Lines`; tables are zeroed.
        positions, slots, sampled, noise_keys, noise_positions: as in `batch.Batch`, without padding.
    """
    row = draw = block = 0
    for line in range(len(facts)):
        fact = facts[line]
        first, num_drafts = fact[0], fact[2]
        count, num_blocks = fact[1] + num_drafts, fact[7]
        starts[line], counts[line], firsts[line] = row, count, first
        for index in range(num_blocks):
            tables[line, index] = blocks[block + index]
        for position in range(first, first + count):
            positions[row] = position
            slots[row] = tables[line, position // block_size] * block_size + position % block_size
            row += 1
        if fact[6]:
            for index in range(num_drafts + 1):
                sampled[draw] = row - 1 - num_drafts + index
                noise_keys[draw] = fact[5]
                noise_positions[draw] = fact[3] - fact[4] + index
                draw += 1
        block += num_blocks
    for index in range(len(seconds)):
        source, line = seconds[index, 0], len(facts) + index
        fact = facts[source]
        position = fact[3] + seconds[index, 1]
        starts[line], counts[line], firsts[line] = row, 1, position
        for place in range(fact[7]):
            tables[line, place] = tables[source, place]
        positions[row], sampled[draw] = position, row
        noise_keys[draw], noise_positions[draw] = fact[5], position - fact[4] + 1
        row += 1
        draw += 1
