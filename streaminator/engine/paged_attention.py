# SPDX-License-Identifier: Apache-2.0
"""Attention on a GPU that reads the KV cache where it lies: no gather, keys split over the card.

A step reads every visible key once from memory, which bounds its time; what it computes with a key
(G * Q rows) is small beside that. A split of `SPLIT` keys is one program per tile, so that B
sequences of L keys give B * K * L / SPLIT of them: 16 x 8 x 1024 / 512 = 256 for 132 processors, each
of which has 32 KiB or more on their way to it. A tile of 32 rows writes parts of a sixteenth of what
it reads in bfloat16, and they are read again.

No number here is tuned while running: another choice would give other bits.

Used by: `attention`, `paged_trial`, `gpu_layers`.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from streaminator.engine.batch import MOST_SHORT, AttentionGroup, next_power
from streaminator.engine.device import on_device

SPLIT = 512
"""Keys per split."""
_MOST_PART_BYTES = 64 * 2**20
"""Of splits that are to be merged."""
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
    """Keys per step of the loop: 16 KiB of keys and values, unless these are very long."""
    return min(max(2**12 // (next_power(dim) * dtype.itemsize // 2), 16), 64)


def num_stages(dim: int, dtype: torch.dtype) -> int:
    """Of the loop. Keys wait for the block table, which Triton loads two stages ahead of them: with 7
    it has two steps on their way while it computes a third, with up to 4 none.
    """
    return 7 if 2 * next_power(dim) * dtype.itemsize * key_step(dim, dtype) <= 2**14 else 2


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
    num_blocks = table.shape[1]
    num_splits = -(-num_blocks * block_size // SPLIT)
    dim = max(key_dim, value_dim)
    tile = tile_height(num_groups, dim, keys.dtype)
    window = _NO_WINDOW if window is None else window
    bytes_per_query = num_splits * num_heads * (value_dim + 1) * 4 if num_splits > 1 else 0
    with on_device(query.device):
        for lines, columns in _pieces(len(all_rows), all_rows.shape[1], bytes_per_query):
            rows, positions = all_rows[lines, columns], all_positions[lines, columns]
            num_lines, num_queries = rows.shape
            parts, log_sums = output, output  # not touched
            if num_splits > 1:
                shape = (num_splits, num_lines * num_queries, num_heads)
                parts = output.new_empty(*shape, value_dim, dtype=torch.float32)
                log_sums = output.new_empty(shape, dtype=torch.float32)
            num_tiles = -(-num_queries * num_groups // tile)
            kernels.attend[num_tiles * num_kv_heads * num_lines, num_splits](
                output, parts, log_sums, query, keys, values, key, value,
                rows, positions, table[lines],
                *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
                num_queries, rows.stride(0), num_blocks, num_splits, window,
                float(scale), float(softcap or 0),
                K=num_kv_heads, G=num_groups, S=block_size, H=key_dim, V=value_dim,
                H_PADDED=max(next_power(key_dim), 16),
                V_PADDED=max(next_power(value_dim), 16),
                TILE=tile, STEP=key_step(dim, keys.dtype), SPLIT=SPLIT,
                HAS_SOFTCAP=softcap is not None, HAS_OWN=group.has_own_keys,
                num_warps=4, num_stages=num_stages(dim, keys.dtype),
            )  # fmt: skip
            if num_splits > 1:
                kernels.merge[num_lines * num_queries, num_heads](
                    output, parts, log_sums, rows, positions,
                    num_queries, rows.stride(0), window,
                    N=num_heads, V=value_dim, V_PADDED=next_power(value_dim), SPLIT=SPLIT,
                    num_warps=1,
                )  # fmt: skip


def _pieces(
    num_lines: int, num_queries: int, bytes_per_query: int
) -> Iterator[tuple[slice, slice]]:
    """Sequences and queries of each call, so that the parts of its splits stay small.

    A call reads its sequences' keys. So they are shared out, and only a prompt's chunk is cut. Sizes
    are even where they can be: Triton compiles anew for what begins at an odd number.
    """
    most = max(_MOST_PART_BYTES // max(bytes_per_query, 1), MOST_SHORT)
    width = num_queries if num_queries <= most else most // 2 * 2
    height = num_lines if num_lines * width <= most else max(most // width // 2 * 2, 1)
    for line in range(0, num_lines, height):
        for query in range(0, num_queries, width):
            yield slice(line, line + height), slice(query, query + width)
