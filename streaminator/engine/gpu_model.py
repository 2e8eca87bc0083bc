# SPDX-License-Identifier: Apache-2.0
"""A Llama-like model on a GPU from tokens to logits: embedding, fused layers, last norm, head.

With paged attention, which it needs, all that a step computes from a token's row is the same in any
batch, to the last bit: products (`gpu_products`), norms, attention (`paged_kernels`).

Used by: `model_runner`.
"""

from typing import Any

import torch

from streaminator.engine.attention import LayerCall
from streaminator.engine.batch import Batch
from streaminator.engine.device import check_card, on_device
from streaminator.engine.gpu_layers import GpuLayer, add_norm, fuse_gpu_layers
from streaminator.engine.gpu_products import GpuProduct
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.llama_like import (
    NotFusedError,
    Parts,
    Rotary,
    layers_of,
    parts_of,
    rotations_of,
    try_norm,
    try_rest,
)
from streaminator.errors import kind_and_line

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class GpuModel:
    """Takes the place of a model's `forward`."""

    def __init__(self, parts: Parts, layers: list[GpuLayer], head: GpuProduct) -> None:
        """Of `parts`, whose layers and head are these."""
        self._parts = parts
        self._layers = layers
        self._head = head

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, Rotary]:
        """Embeddings [T, D] of `tokens` [T], rotations of `positions` [T]."""
        x = torch.embedding(self._parts.embedding.weight, tokens)
        return x, rotations_of(self._parts.decoder, x, positions)

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Logits [padded, V] of the batch's sampled rows; keys and values go to the cache."""
        with on_device(batch.input_ids.device):
            x, rotary = self.embed(batch.input_ids[0], batch.positions[0])
            rooms: dict[tuple[int, ...], torch.Tensor] = {}
            parts = None
            for layer in self._layers:
                shape = layer.attended_shape
                if shape not in rooms:
                    rooms[shape] = x.new_zeros(len(x), *shape)
                parts = layer(x, parts, rotary, rooms[shape], batch, cache)
            x = add_norm(x, parts, self._parts.norm)
            return self._head(x.index_select(0, batch.sampled_rows))[0]


def fuse_gpu_model(
    model: Any, calls: dict[int, LayerCall], block_size: int, *, batch_invariant: bool
) -> GpuModel:
    """A model that is built like a Llama, tried.

    Args:
        model: as transformers made it.
        calls: how its layers attend.
        block_size: of the KV cache.
        batch_invariant: products are own kernels; else PyTorch's.

    Raises: NotFusedError naming the reason; whatever goes wrong in here, the model is as it was.
    """
    try:
        with on_device(model.get_input_embeddings().weight.device):
            return _fuse(model, calls, block_size, batch_invariant)
    except NotFusedError:
        raise
    except Exception as problem:  # compilers raise anything
        check_card(model.get_input_embeddings().weight.device)
        raise NotFusedError(f"its kernels do not run ({kind_and_line(problem)})") from problem


def _fuse(
    model: Any, calls: dict[int, LayerCall], block_size: int, batch_invariant: bool
) -> GpuModel:
    layers = layers_of(model.get_decoder(), calls)
    dtype = layers[0].mlp.down_proj.weight.dtype
    if dtype not in _TYPES:
        raise NotFusedError(f"no kernels for {dtype}")
    parts = parts_of(model, dtype)
    try_norm(parts.norm, lambda x, norm: add_norm(x, None, norm))
    fused_layers = fuse_gpu_layers(
        layers, parts.decoder, calls, block_size, batch_invariant=batch_invariant
    )
    head = GpuProduct([parts.head], batch_invariant=batch_invariant, most_splits=1)
    head.check()
    fused = GpuModel(parts, fused_layers, head)
    try_rest(model, fused.embed)
    return fused
