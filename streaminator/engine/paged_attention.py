# SPDX-License-Identifier: Apache-2.0
"""Attention on a GPU that reads the KV cache where it lies: no gather, keys split over the card.

A step reads every visible key once from memory, which bounds its time; what it computes with a key
(G * Q rows) is small beside that. A split of `SPLIT` keys is one program per tile, so that B
sequences of L keys give B * K * L / SPLIT of them: 16 x 8 x 1024 / 256 = 512 for 132 processors.
A tile of 32 rows writes parts of an eighth of what it reads in bfloat16, and they are read again.

No number here is tuned while running: another choice would give other bits.

Used by: `attention`, `paged_trial`, `gpu_layers`.
"""

import importlib
import importlib.util
from typing import Any

import torch

from streaminator.engine.batch import AttentionGroup, next_power
from streaminator.engine.device import on_device

SPLIT = 256
"""Keys per split."""
_MOST_PART_BYTES = 64 * 2**20
_NO_WINDOW = 2**30


def has_triton() -> bool:
    """Whether the kernels can be imported."""
    return importlib.util.find_spec("triton") is not None


def tile_height(num_groups: int, dim: int, dtype: torch.dtype) -> int:
    """Rows of a tile: some 6 queries of the heads that share a KV head.

    It depends on the layer alone: tensor cores sum in another order for another height.
    """
    if dtype == torch.float32 or dim > 256:
        return 16  # no tensor cores, or no room
    return min(max(next_power(6 * num_groups), 16), 64)


def key_step(dim: int, dtype: torch.dtype) -> int:
    """Keys per step of the loop: two steps of keys and values in 64 KiB of shared memory."""
    return min(max(2**13 // (next_power(dim) * dtype.itemsize // 2), 16), 64)


def attend_paged(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    group: AttentionGroup,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Attention of a group's rows over the keys in its blocks.

    Args:
        output: [T, N, V], contiguous; the group's rows are written.
        query: [T, N, H]; key, value: [T, K, H], [T, K, V], read for second choices.
        pools: keys [blocks, S, K, H] and values [blocks, S, K, V] of the layer, contiguous.
        group: which rows, where, over which blocks.
        scale: factor on the scores.
        window: a query sees at most so many keys.
        softcap: scores are squashed to softcap * tanh(score / softcap).
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    kernels: Any = importlib.import_module("streaminator.engine.paged_kernels")
    keys, values = pools
    all_rows, all_positions, table = (
        x.contiguous() for x in (group.rows, group.query_positions, group.block_table)
    )
    _, block_size, num_kv_heads, key_dim = keys.shape
    num_heads, value_dim = output.shape[1:]
    num_groups = num_heads // num_kv_heads
    num_sequences, num_blocks = table.shape
    num_splits = -(-num_blocks * block_size // SPLIT)
    tile = tile_height(num_groups, max(key_dim, value_dim), keys.dtype)
    window = _NO_WINDOW if window is None else window
    # Long chunks of a prompt go in pieces, so that their parts stay small.
    bytes_per_query = num_splits * num_sequences * num_heads * (value_dim + 1) * 4
    most = all_rows.shape[1] if num_splits == 1 else max(1, _MOST_PART_BYTES // bytes_per_query)
    with on_device(query.device):
        for first in range(0, all_rows.shape[1], most):
            rows = all_rows[:, first : first + most]
            positions = all_positions[:, first : first + most]
            num_queries = rows.shape[1]
            parts, log_sums = output, output  # not touched
            if num_splits > 1:
                shape = (num_splits, num_sequences * num_queries, num_heads)
                parts = output.new_empty(*shape, value_dim, dtype=torch.float32)
                log_sums = output.new_empty(shape, dtype=torch.float32)
            num_tiles = -(-num_queries * num_groups // tile)
            kernels.attend[num_tiles * num_kv_heads * num_sequences, num_splits](
                output, parts, log_sums, query, keys, values, key, value,
                rows, positions, table,
                *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
                num_queries, rows.stride(0), num_blocks, num_splits, window,
                float(scale), float(softcap or 0),
                K=num_kv_heads, G=num_groups, S=block_size, H=key_dim, V=value_dim,
                H_PADDED=max(next_power(key_dim), 16),
                V_PADDED=max(next_power(value_dim), 16),
                TILE=tile, STEP=key_step(max(key_dim, value_dim), keys.dtype), SPLIT=SPLIT,
                HAS_SOFTCAP=softcap is not None, HAS_OWN=group.has_own_keys,
                num_warps=4, num_stages=2,
            )  # fmt: skip
            if num_splits > 1:
                kernels.merge[num_sequences * num_queries, num_heads](
                    output, parts, log_sums, rows, positions,
                    num_queries, rows.stride(0), window,
                    N=num_heads, V=value_dim, V_PADDED=next_power(value_dim), SPLIT=SPLIT,
                    num_warps=1,
                )  # fmt: skip
