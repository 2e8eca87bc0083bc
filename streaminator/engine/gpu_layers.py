# SPDX-License-Identifier: Apache-2.0
"""Llama-like decoder layers on a GPU: four products, four small kernels, and attention.

    add, norm -> q, k, v -> rotate, write -> attend -> o -> add, norm -> gate, up -> silu * -> down

Used by: `gpu_model`.
"""

import copy
from typing import Any

import torch

from streaminator.engine.attention import LayerCall
from streaminator.engine.batch import Batch, next_power, pack
from streaminator.engine.gpu_products import GpuProduct, gpu_kernels
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.llama_like import (
    NotFusedError,
    Rotary,
    eps_of,
    head_norms,
    linears_of,
    rotations_of,
    try_layer,
)
from streaminator.engine.paged_attention import attend_paged
from streaminator.sequence import Prompt, Sequence

_SIZE = 1024
"""Numbers of a row that a program takes at once."""


class GpuLayer:
    """One layer."""

    def __init__(self, layer: Any, call: LayerCall, *, batch_invariant: bool) -> None:
        """Raises: NotFusedError when its weights do not join."""
        self.index: int = layer.self_attn.layer_idx
        self.call = call
        self.attended_shape = call.num_heads, call.shape.value_dim
        self.norm = layer.input_layernorm
        self._second_norm = layer.post_attention_layernorm
        self._head_norms = head_norms(layer.self_attn)
        self.products = [
            GpuProduct(linears, batch_invariant=batch_invariant) for linears in linears_of(layer)
        ]

    def __call__(
        self,
        x: torch.Tensor,
        parts: torch.Tensor | None,
        rotary: Rotary,
        attended: torch.Tensor,
        batch: Batch,
        cache: KVCache,
    ) -> torch.Tensor:
        """All of a layer but its last sum.

        Args:
            x: [T, D]; the sums of `parts` and of attention are added to it.
            parts: [C, T, D] of the layer before; None for the first.
            rotary: cosine and sine [T, H].
            attended: [T, N, H], for what attention gives; rows of no sequence stay as they are, 0.
            batch: of T rows.
            cache: gets their keys and values.

        Returns: [C, T, D], what is still to be added to `x`.
        """
        qkv, output, gate_up, down = self.products
        pools = cache.pools(self.index)
        query, key, value = self._rotate(qkv(add_norm(x, parts, self.norm)), rotary, batch, pools)
        for group in batch.groups:
            attend_paged(
                attended, query, key, value, pools, group,
                scale=self.call.scale, window=self.call.sliding_window, softcap=None,
            )  # fmt: skip
        parts = output(attended.flatten(1))
        return down(_silu_mul(gate_up(add_norm(x, parts, self._second_norm)), x.dtype))

    def _rotate(
        self,
        qkv: torch.Tensor,
        rotary: Rotary,
        batch: Batch,
        pools: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, N, H], keys and values [T, K, H]; the latter are in the cache, too."""
        num_parts, num_rows, _ = qkv.shape
        call, slots = self.call, batch.slot_mapping
        num_heads, num_kv_heads, dim = call.num_heads, call.shape.num_heads, call.shape.key_dim
        query, key, value = (
            pools[0].new_empty(num_rows, num, dim)
            for num in (num_heads, num_kv_heads, num_kv_heads)
        )
        norms = [norm.weight for norm in self._head_norms] or list(rotary)  # not read
        eps = float(eps_of(self._head_norms[0])) if self._head_norms else 0.0
        heads_at_once = max(_SIZE // next_power(dim), 1)
        grid = num_rows, -(-(num_heads + 2 * num_kv_heads) // heads_at_once)
        gpu_kernels().rotate[grid](
            query, key, value, *pools, qkv, *rotary, slots, *norms, num_rows, len(slots), eps,
            N=num_heads, K=num_kv_heads, H=dim, HALF_PADDED=next_power(dim // 2),
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
        D=dim, D_PADDED=next_power(dim), C=0 if parts is None else len(parts),
        num_warps=16,
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
    layers: list[Any],
    decoder: Any,
    calls: dict[int, LayerCall],
    block_size: int,
    *,
    batch_invariant: bool,
) -> list[GpuLayer]:
    """All layers of a model's decoder (`llama_like.layers_of`), tried.

    Raises: NotFusedError naming the reason.
    """
    for layer in layers:
        call = calls[layer.self_attn.layer_idx]
        _try_layer(layer, decoder, call, block_size, batch_invariant)
    weights = [x.weight for layer in layers for joined in linears_of(layer) for x in joined]
    if len({weight.data_ptr() for weight in weights}) < len(weights):
        raise NotFusedError(f"{type(decoder).__name__} uses weights twice")
    fused = [
        GpuLayer(layer, calls[layer.self_attn.layer_idx], batch_invariant=batch_invariant)
        for layer in layers
    ]
    kinds = {product.kind: product for layer in fused for product in layer.products}
    for product in kinds.values():
        product.check()
    if batch_invariant:
        _check_rows(fused[0], decoder, block_size)
    return fused


@torch.inference_mode()
def _check_rows(layer: GpuLayer, decoder: Any, block_size: int) -> None:
    """All kernels in the model's type, for one row and for so many that no product is in parts.

    Raises: NotFusedError when the last row of a made-up text is not the same in both.
    """
    weight = layer.norm.weight
    num_rows = max(product.rows_in_one for product in layer.products)
    tokens = (0,) * num_rows
    prompt = Prompt(prompt_id="", token_ids=tokens, text="", question="")
    num_blocks = -(-num_rows // block_size)
    cache = KVCache(
        {layer.index: layer.call.shape},
        num_blocks=1 + num_blocks,
        block_size=block_size,
        dtype=weight.dtype,
        device=weight.device,
    )
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(
        num_rows, len(weight), generator=generator, dtype=torch.float32, device=weight.device
    )
    x = x.to(weight.dtype)
    rows = []
    for first in (0, num_rows - 1):
        text = Sequence(
            prompt, 0, list(tokens), 0, 0, 0.0,
            block_table=list(range(1, 1 + num_blocks)),
            num_cached_tokens=first,
            num_scheduled_tokens=num_rows - first,
        )  # fmt: skip
        batch = pack([text], block_size=block_size, device=weight.device)
        padded = x.new_zeros(batch.positions.shape[1], len(weight))
        padded[: num_rows - first] = x[first:]
        rotary = rotations_of(decoder, padded, batch.positions[0])
        attended = padded.new_zeros(len(padded), *layer.attended_shape)
        parts = layer(padded, None, rotary, attended, batch, cache)
        add_norm(padded, parts, layer.norm)
        rows.append(padded[num_rows - first - 1])
    if not torch.equal(*rows):
        raise NotFusedError("a row is not the same in any batch on this card")


def _try_layer(
    layer: Any, decoder: Any, call: LayerCall, block_size: int, batch_invariant: bool
) -> None:
    """Raises: NotFusedError when the fused layer does not agree with the layer, in float32."""
    layer = copy.deepcopy(layer).float()
    fused = GpuLayer(layer, call, batch_invariant=batch_invariant)

    def run(x: torch.Tensor, rotary: Rotary, cache: KVCache, batch: Batch) -> torch.Tensor:
        attended = x.new_zeros(len(x), *fused.attended_shape)
        parts = fused(x, None, rotary, attended, batch, cache)
        return x + parts.sum(0)

    try_layer(layer, decoder, call, block_size, [run])
