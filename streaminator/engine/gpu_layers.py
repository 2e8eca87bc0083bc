# SPDX-License-Identifier: Apache-2.0
"""Llama-like decoder layers on a GPU: four products, four small kernels, and attention.

    add, norm -> q, k, v -> rotate, write -> attend -> o -> add, norm -> gate, up -> silu * -> down

Used by: `gpu_model`.
"""

import copy
from typing import Any

import torch

from streaminator.engine.attention import LayerCall
from streaminator.engine.batch import Batch
from streaminator.engine.gpu_products import GpuProduct, gpu_kernels
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.llama_like import (
    NotFusedError,
    Rotary,
    computes_the_same,
    eps_of,
    head_norms,
    layers_of,
)
from streaminator.engine.paged_attention import attend_paged, power_of_two

_SIZE = 1024
"""Numbers of a row that a program takes at once."""


class GpuLayer:
    """One layer."""

    def __init__(self, layer: Any, call: LayerCall, *, batch_invariant: bool) -> None:
        """Raises: NotFusedError when its weights do not join."""
        attention, mlp = layer.self_attn, layer.mlp
        self._index: int = attention.layer_idx
        self._call = call
        self._scale = call.shape.key_dim**-0.5 if call.scaling is None else call.scaling
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._head_norms = head_norms(attention)
        self.products = [
            GpuProduct(linears, batch_invariant=batch_invariant)
            for linears in (
                [attention.q_proj, attention.k_proj, attention.v_proj],
                [attention.o_proj],
                [mlp.gate_proj, mlp.up_proj],
                [mlp.down_proj],
            )
        ]

    def __call__(
        self,
        x: torch.Tensor,
        parts: torch.Tensor | None,
        rotary: Rotary,
        batch: Batch,
        cache: KVCache,
    ) -> torch.Tensor:
        """All of a layer but its last sum.

        Args:
            x: [T, D]; the sums of `parts` and of attention are added to it.
            parts: [C, T, D] of the layer before; None for the first.
            rotary: cosine and sine [T, H].
            batch: of T rows.
            cache: gets their keys and values.

        Returns: [C, T, D], what is still to be added to `x`.
        """
        qkv, output, gate_up, down = self.products
        first, second = self._norms
        pools = cache.pools(self._index)
        query, key, value = self._rotate(qkv(add_norm(x, parts, first)), rotary, batch, pools)
        attended = torch.zeros_like(query)  # rows of no sequence
        for group in batch.groups:
            attend_paged(
                attended, query, key, value, pools, group,
                scale=self._scale, window=self._call.sliding_window, softcap=None,
            )  # fmt: skip
        parts = output(attended.flatten(1))
        return down(_silu_mul(gate_up(add_norm(x, parts, second)), x.dtype))

    def _rotate(
        self,
        qkv: torch.Tensor,
        rotary: Rotary,
        batch: Batch,
        pools: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, N, H], keys and values [T, K, H]; the latter are in the cache, too."""
        num_parts, num_rows, _ = qkv.shape
        call, slots = self._call, batch.slot_mapping
        num_heads, num_kv_heads, dim = call.num_heads, call.shape.num_heads, call.shape.key_dim
        query, key, value = (
            pools[0].new_empty(num_rows, num, dim)
            for num in (num_heads, num_kv_heads, num_kv_heads)
        )
        norms = [norm.weight for norm in self._head_norms] or list(rotary)  # not read
        eps = float(eps_of(self._head_norms[0])) if self._head_norms else 0.0
        heads_at_once = max(_SIZE // power_of_two(dim), 1)
        grid = num_rows, -(-(num_heads + 2 * num_kv_heads) // heads_at_once)
        gpu_kernels().rotate[grid](
            query, key, value, *pools, qkv, *rotary, slots, *norms, num_rows, len(slots), eps,
            N=num_heads, K=num_kv_heads, H=dim, HALF_PADDED=power_of_two(dim // 2),
            HEADS=heads_at_once, HAS_NORMS=bool(self._head_norms), C=num_parts,
            num_warps=4,
        )  # fmt: skip
        return query, key, value


def add_norm(x: torch.Tensor, parts: torch.Tensor | None, norm: Any) -> torch.Tensor:
    """Add the sum of `parts` [C, T, D] to `x` [T, D]; returns the norm of its rows."""
    num_rows, dim = x.shape
    normed = torch.empty_like(x)
    gpu_kernels().add_norm[(num_rows,)](
        normed, x, x if parts is None else parts, norm.weight, num_rows, float(eps_of(norm)),
        D=dim, D_PADDED=power_of_two(dim), C=0 if parts is None else len(parts),
        num_warps=8,
    )  # fmt: skip
    return normed


def _silu_mul(both: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Gate and up [C, T, 2 D] -> silu(gate) * up [T, D]."""
    num_parts, num_rows, width = both.shape
    out = both.new_empty(num_rows, width // 2, dtype=dtype)
    gpu_kernels().silu_mul[num_rows, -(-width // 2 // _SIZE)](
        out, both, num_rows, D=width // 2, SIZE=_SIZE, C=num_parts, num_warps=4
    )
    return out


def fuse_gpu_layers(
    decoder: Any, calls: dict[int, LayerCall], block_size: int, *, batch_invariant: bool
) -> list[GpuLayer]:
    """All layers of a model's decoder, tried.

    Raises: NotFusedError naming the reason.
    """
    layers = layers_of(decoder, calls)
    for layer in layers:
        call = calls[layer.self_attn.layer_idx]
        if not _computes_the_same(layer, decoder, call, block_size, batch_invariant):
            raise NotFusedError(f"{type(layer).__name__} computes something else than a Llama's")
    fused = [
        GpuLayer(layer, calls[layer.self_attn.layer_idx], batch_invariant=batch_invariant)
        for layer in layers
    ]
    for product in fused[0].products:
        product.check()
    return fused


def _computes_the_same(
    layer: Any, decoder: Any, call: LayerCall, block_size: int, batch_invariant: bool
) -> bool:
    """Whether the fused layer agrees with the layer, in float32."""
    layer = copy.deepcopy(layer).float()
    fused = GpuLayer(layer, call, batch_invariant=batch_invariant)

    def run(x: torch.Tensor, rotary: Rotary, cache: KVCache, batch: Batch) -> torch.Tensor:
        parts = fused(x, None, rotary, batch, cache)
        return x + parts.sum(0)

    return computes_the_same(layer, decoder, call, block_size, [run])
