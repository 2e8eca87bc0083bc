# SPDX-License-Identifier: Apache-2.0
"""The keys and values of all layers, in blocks.

Shapes: N blocks, S = block_size, K KV heads, H head dim (may differ between layers).

Used by: `attention` (writes and reads), `model_runner` (makes it).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores per token."""

    num_heads: int
    key_dim: int
    value_dim: int


class KVCache:
    """Per layer one key and one value tensor [N, S, K, H]; block 0 stays unused."""

    def __init__(
        self,
        shapes: dict[int, LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._layers = {
            index: tuple(
                torch.zeros(
                    num_blocks, block_size, shape.num_heads, dim, dtype=dtype, device=device
                )
                for dim in (shape.key_dim, shape.value_dim)
            )
            for index, shape in shapes.items()
        }

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store key and value [T, K, H] of one layer at `slots` [T]."""
        for pool, new in zip(self._layers[layer], (key, value), strict=True):
            pool.flatten(0, 1).index_copy_(0, slots, new.to(pool.dtype))

    def read(self, layer: int, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [B, K, L, H] of the blocks in `block_table` [B, M], L = M * S."""
        num_sequences = block_table.shape[0]
        key, value = (
            pool.index_select(0, block_table.flatten())
            .view(num_sequences, -1, *pool.shape[2:])
            .transpose(1, 2)
            for pool in self._layers[layer]
        )
        return key, value

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that may hold NaN: masked keys are harmless only while they are finite."""
        index = torch.tensor(blocks, dtype=torch.int64)
        for pools in self._layers.values():
            for pool in pools:
                pool.index_fill_(0, index.to(pool.device), 0)


def bytes_per_block(shapes: dict[int, LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes one block takes over all layers."""
    per_token = sum(s.num_heads * (s.key_dim + s.value_dim) for s in shapes.values())
    return per_token * block_size * dtype.itemsize
