# SPDX-License-Identifier: Apache-2.0
"""Attention by torch's own operations: a row is the same whatever is in the batch with it."""

import pytest
import torch

from streaminator.engine.attention import _attend_group
from streaminator.engine.batch import AttentionGroup

NUM_KV_HEADS, HEAD_DIM, MOST_KEYS = 2, 64, 640


def attend(
    queries: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor],
    position: int,
    num_keys: int,
    num_sequences: int,
) -> torch.Tensor:
    """Rows [Q, N, H] at `position` and on, of the last of some sequences, padded to `num_keys`."""
    num_queries = len(queries)
    rows = torch.arange(num_sequences * num_queries).view(num_sequences, num_queries)
    positions = position + torch.arange(num_queries).expand(num_sequences, -1)
    group = AttentionGroup(rows, torch.zeros(num_sequences, 1, dtype=torch.int64), positions, None)
    others = torch.zeros((num_sequences - 1) * num_queries, *queries.shape[1:])
    query = torch.cat([others.to(queries.dtype), queries])
    padded = []
    for kept in past:
        one = kept.new_full((num_sequences, NUM_KV_HEADS, num_keys, HEAD_DIM), 3.0)
        one[-1, :, : position + num_queries] = kept[:, : position + num_queries]
        padded.append(one)
    output = torch.zeros_like(query)
    _attend_group(output, query, (padded[0], padded[1]), group, 0.2, None, None)
    return output[-num_queries:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position", [20, 170, 300])
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_keys_of_others(dtype, position):
    torch.manual_seed(0)
    past = tuple(torch.randn(NUM_KV_HEADS, MOST_KEYS, HEAD_DIM).to(dtype) for _ in range(2))
    queries = torch.randn(9, 2 * NUM_KV_HEADS, HEAD_DIM).to(dtype)
    alone = attend(queries, past, position, MOST_KEYS, 1)
    for num_queries in (1, 2, 9):
        for num_keys in (position // 16 * 16 + 32, 384, 512, MOST_KEYS):
            for num_sequences in (1, 3):
                rows = attend(queries[:num_queries], past, position, num_keys, num_sequences)
                assert torch.equal(rows, alone[:num_queries])
