# SPDX-License-Identifier: Apache-2.0
"""The keys and values of all layers, in blocks.

Shapes: N blocks, S = block_size, K KV heads, H head dim (may differ between layers).

Used by: `attention` (writes and reads), `model_runner` (makes it).
"""

from dataclasses import dataclass
from typing import Any

import torch

from streaminator.engine import huge_pages


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores per token."""

    num_heads: int
    key_dim: int
    value_dim: int


class KVCache:
    """Per layer one key and one value tensor [N, S, K, H]; block 0 is nobody's. It stays zero, but for
    its first place where steps are padded, whose padding is written there."""

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
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        places: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for layer, shape in shapes.items():
            for side, dim in enumerate((shape.key_dim, shape.value_dim)):
                places.setdefault((shape.num_heads, dim), []).append((layer, side))
        self._places = list(places.values())
        # Tensors of one shape lie in one piece, so that a block is cleared in one operation.
        self._pieces = [
            self._zeros(len(members), num_blocks, block_size, *shape)
            for shape, members in places.items()
        ]
        self._gathered: dict[tuple[int, ...], torch.Tensor] = {}
        self._map_layers()

    @property
    def num_blocks(self) -> int:
        """N."""
        return self._pieces[0].shape[1]

    def grow(self, num_blocks: int) -> None:
        """Add blocks, up to `num_blocks`; what is stored stays. Out of memory, all is as it was."""
        pieces = []
        for old in self._pieces:
            new = self._zeros(old.shape[0], num_blocks, *old.shape[2:])
            new[:, : old.shape[1]] = old
            pieces.append(new)
        self._pieces = pieces
        self._map_layers()

    def _zeros(self, *shape: int) -> torch.Tensor:
        if self._options["device"].type == "cpu":
            return huge_pages.zeros(shape, self._options["dtype"])
        return torch.zeros(*shape, **self._options)

    def _map_layers(self) -> None:
        self._layers: dict[int, list[torch.Tensor]] = {}
        for piece, members in zip(self._pieces, self._places, strict=True):
            for tensor, (layer, side) in zip(piece, members, strict=True):
                self._layers.setdefault(layer, [tensor, tensor])[side] = tensor

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store key and value of one layer at `slots` [n]; rows of [T, K, H] behind n are padding."""
        for pool, new in zip(self._layers[layer], (key, value), strict=True):
            pool.flatten(0, 1).index_copy_(0, slots, new[: slots.shape[0]].to(pool.dtype))

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [N, S, K, H] of one layer, where they lie."""
        key, value = self._layers[layer]
        return key, value

    def read(self, layer: int, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [B, K, L, H] of the blocks in `block_table` [B, M], L = M * S.

        They lie where the next call puts its own: memory that is given back after every layer costs
        a CPU more time than what is done in it.
        """
        key, value = (
            self._gather(side, pool, block_table.flatten())
            .view(block_table.shape[0], -1, *pool.shape[2:])
            .transpose(1, 2)
            for side, pool in enumerate(self._layers[layer])
        )
        return key, value

    def _gather(self, side: int, pool: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        place = self._gathered.get((side, *pool.shape[1:]))
        if place is None or len(place) < len(blocks):
            place = pool.new_empty(len(blocks) * 5 // 4, *pool.shape[1:])
            self._gathered[side, *pool.shape[1:]] = place
        return torch.index_select(pool, 0, blocks, out=place[: len(blocks)])

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks: what their last owner left may be NaN, and masked keys must be finite."""
        if self._options["device"].type == "cpu":  # where index_fill_ takes four times as long
            for piece in self._pieces:
                for block in blocks:
                    piece[:, block].zero_()
            return
        index = torch.tensor(blocks, dtype=torch.int64, device="cpu", pin_memory=True)
        index = index.to(self._options["device"], non_blocking=True)
        for piece in self._pieces:
            piece.index_fill_(1, index, 0)


def bytes_per_block(shapes: dict[int, LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes one block takes over all layers."""
    per_token = sum(s.num_heads * (s.key_dim + s.value_dim) for s in shapes.values())
    return per_token * block_size * dtype.itemsize
