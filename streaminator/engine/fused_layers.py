# SPDX-License-Identifier: Apache-2.0
"""Llama-like decoder layers on a CPU as four matrix products and four kernels.

As transformers runs it, such a layer is some fifty operations on a few rows each, which take as long
as the products. A layer is fused when it has the parts named below and, tried on made-up rows,
computes what it computed before; so a layer that looks alike and is not stays as it is. All
layers of a model are fused, or none: keys lie differently in the cache (`csrc/attention.h`).

    norm -> q, k, v -> rotate, write, attend -> o + residual -> norm -> gate, up -> silu * -> down + residual

Where the products are the kernels' own, too, all layers are one call.

Used by: `fused_model`.
"""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from streaminator.engine.attention import LayerCall
from streaminator.engine.batch import Batch
from streaminator.engine.compile_kernels import KernelsMissingError
from streaminator.engine.kernels import (
    BLOCK_SIZE,
    KernelProduct,
    Kernels,
    Layer,
    Layers,
    lines_of,
    shape_of,
)
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.llama_like import (
    Forward,
    NotFusedError,
    Rotary,
    differs,
    eps_of,
    head_norms,
    layers_of,
    linears_of,
    try_layer,
)
from streaminator.engine.packed_linear import Packer, Product


class FusedLayer:
    """One layer."""

    def __init__(self, layer: Any, call: LayerCall, kernels: Kernels, packer: Packer) -> None:
        self.layer = layer
        self.kernels = kernels
        self._packer = packer
        self.index: int = layer.self_attn.layer_idx
        self._norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self._head_norms = head_norms(layer.self_attn)
        self._sources = linears_of(layer)
        self._shape = shape_of(
            call.num_heads,
            call.shape.num_heads,
            scale=call.scale,
            window=call.sliding_window,
            eps=eps_of(self._head_norms[0]) if self._head_norms else 0.0,
            norms=[norm.weight for norm in self._head_norms],
        )
        self._products: list[Product] = []
        self.described: Layer | None = None
        """For `Kernels.run_layers`, without its cache; None: a product is not the kernels'."""

    @property
    def linears(self) -> list[torch.nn.Linear]:
        """The layers whose products this computes."""
        return [linear for joined in self._sources for linear in joined]

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights."""
        return sum(product.nbytes for product in self._products)

    def pack(self) -> None:
        """Pack the weights as they are now."""
        self._products = [
            self._packer.pack(_join(layers), _bias(layers)) for layers in self._sources
        ]
        self.described = self._describe()

    def _describe(self) -> Layer | None:
        products = [p.addresses for p in self._products if isinstance(p, KernelProduct)]
        if len(products) < len(self._products):
            return None
        first, second = self._norms
        (down,) = self._sources[-1]
        return Layer(
            down.out_features,
            down.in_features,
            self._shape,
            *(first.weight.data_ptr(), second.weight.data_ptr()),
            *(eps_of(first), eps_of(second)),
            *products,
        )

    def can_pack(self) -> bool:
        """Whether its products give a row the same result in any batch."""
        return all(self._packer.can_pack(_join(layers)) for layers in self._sources)

    def __call__(self, x: torch.Tensor, rotary: Rotary, cache: KVCache, lines: Any) -> torch.Tensor:
        """[T, D] -> [T, D], `rotary` cosine and sine [T, H], `lines` of `kernels.lines_of`."""
        kernels = self.kernels
        qkv, output, gate_up, down = self._products
        first, second = self._norms
        attended = kernels.attend(
            qkv(kernels.rms_norm(x, first.weight, eps_of(first))),
            rotary,
            cache.pools(self.index),
            self._shape,
            lines,
        )
        x = output.add_to(x, attended)
        both = gate_up(kernels.rms_norm(x, second.weight, eps_of(second)))
        return down.add_to(x, kernels.silu_mul(both))


class FusedStack:
    """Layers one after another; one call where all products are the kernels'."""

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        self.layers = layers
        self.kernels = layers[0].kernels
        self.is_one_call = all(layer.described is not None for layer in layers)
        """Whether C goes through the layers; the weights' shapes decide."""
        self._described: Layers | None = None
        self._described_for: tuple[weakref.ref[KVCache], int] | None = None

    def pack(self) -> None:
        """Pack the weights as they are now."""
        self._described = None
        for layer in self.layers:
            layer.pack()

    def __call__(self, x: torch.Tensor, rotary: Rotary, cache: KVCache, lines: Any) -> torch.Tensor:
        """See `FusedLayer`; what comes out may lie where `x` lay."""
        if self.is_one_call:
            self.kernels.run_layers(x, rotary, self._describe(cache), lines)
            return x
        for layer in self.layers:
            x = layer(x, rotary, cache, lines)
        return x

    def _describe(self, cache: KVCache) -> Layers:
        # A cache that has grown lies somewhere else.
        described_for = weakref.ref(cache), cache.num_blocks
        if self._described is None or self._described_for != described_for:
            described = []
            for layer in self.layers:
                assert layer.described is not None
                keys, values = cache.pools(layer.index)
                layer.described.keys, layer.described.values = keys.data_ptr(), values.data_ptr()
                described.append(layer.described)
            self._described = self.kernels.join_layers(described)
            self._described_for = described_for
        return self._described


def fuse_layers(
    decoder: Any, calls: dict[int, LayerCall], block_size: int, packer: Packer
) -> FusedStack:
    """All layers of a model's decoder, tried.

    Raises: NotFusedError naming the reason.
    """
    layers = layers_of(decoder, calls)
    if block_size != BLOCK_SIZE:
        raise NotFusedError(f"they need --block_size {BLOCK_SIZE}")
    dtype = layers[0].mlp.down_proj.weight.dtype
    try:
        kernels = {d: Kernels(d, calls[0].shape.key_dim) for d in {dtype, torch.float32}}
    except KernelsMissingError as error:
        raise NotFusedError(f"kernels: {error}") from error
    trial = kernels[torch.float32], Packer(kernels[torch.float32])
    fused = []
    for layer in layers:
        call = calls[layer.self_attn.layer_idx]
        _try_layer(layer, decoder, call, *trial)
        fused.append(FusedLayer(layer, call, kernels[dtype], packer))
        if not fused[-1].can_pack():
            raise NotFusedError("its products do not pack, or a row is not the same in any batch")
        fused[-1].pack()
    return FusedStack(fused)


def _try_layer(layer: Any, decoder: Any, call: LayerCall, kernels: Kernels, packer: Packer) -> None:
    """Raises: NotFusedError when the fused layer, or a stack of it, does not agree with the layer."""
    layer = copy.deepcopy(layer).float()
    fused = FusedLayer(layer, call, kernels, packer)
    if not fused.can_pack():
        raise differs(layer)
    fused.pack()

    def through(forward: FusedLayer | FusedStack) -> Forward:
        def run(x: torch.Tensor, rotary: Rotary, cache: KVCache, batch: Batch) -> torch.Tensor:
            assert batch.lines is not None
            return forward(x, rotary, cache, lines_of(batch.lines))

        return run

    forwards = [through(fused), through(FusedStack([fused]))]
    try_layer(layer, decoder, call, BLOCK_SIZE, forwards)


def _join(layers: Sequence[torch.nn.Linear]) -> torch.Tensor:
    weights = [layer.weight.detach() for layer in layers]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _bias(layers: Sequence[torch.nn.Linear]) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [
            layer.weight.new_zeros(layer.out_features)
            if layer.bias is None
            else layer.bias.detach()
            for layer in layers
        ]
    )
