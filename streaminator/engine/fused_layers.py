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

from streaminator.engine.attention import LayerCall, Stream
from streaminator.engine.batch import pack
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
from streaminator.engine.packed_linear import Packer, Product
from streaminator.sequence import Prompt
from streaminator.sequence import Sequence as TokenSequence

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine [T, H] of the packed rows' positions."""

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}


class NotFusedError(Exception):
    """A model's layers stay as they are, for the reason given."""


class FusedLayer:
    """One layer."""

    def __init__(self, layer: Any, call: LayerCall, kernels: Kernels, packer: Packer) -> None:
        self.layer = layer
        self.kernels = kernels
        self._packer = packer
        attention, mlp = layer.self_attn, layer.mlp
        self.index: int = attention.layer_idx
        self._norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self._head_norms = _head_norms(attention)
        self._sources = [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]
        head_dim = call.shape.key_dim
        self._shape = shape_of(
            call.num_heads,
            call.shape.num_heads,
            scale=head_dim**-0.5 if call.scaling is None else call.scaling,
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
    layers: list[Any] = list(getattr(decoder, "layers", []))
    if len(layers) != len(calls) or not hasattr(decoder, "rotary_emb"):
        raise NotFusedError(f"{type(decoder).__name__} is not built like a Llama's")
    if block_size != BLOCK_SIZE:
        raise NotFusedError(f"they need --block_size {BLOCK_SIZE}")
    for layer in layers:
        _check(layer, calls)
    dtype = layers[0].mlp.down_proj.weight.dtype
    try:
        kernels = {d: Kernels(d, calls[0].shape.key_dim) for d in {dtype, torch.float32}}
    except KernelsMissingError as error:
        raise NotFusedError(f"kernels: {error}") from error
    trial = kernels[torch.float32], Packer(kernels[torch.float32])
    fused = []
    for layer in layers:
        call = calls[layer.self_attn.layer_idx]
        if not _computes_the_same(layer, decoder, call, *trial):
            raise NotFusedError(f"{type(layer).__name__} computes something else than a Llama's")
        fused.append(FusedLayer(layer, call, kernels[dtype], packer))
        if not fused[-1].can_pack():
            raise NotFusedError("its products do not pack, or a row is not the same in any batch")
        fused[-1].pack()
    return FusedStack(fused)


def _check(layer: Any, calls: dict[int, LayerCall]) -> None:
    """Raises: NotFusedError when a layer has not the parts that are known, and no others."""
    name = type(layer).__name__
    if {child for child, _ in layer.named_children()} != _PARTS:
        raise NotFusedError(f"{name} has other parts than a Llama's")
    attention, mlp = layer.self_attn, layer.mlp
    call = calls[attention.layer_idx]
    shape = call.shape
    parts = {child for child, _ in attention.named_children()} - {"rotary_emb"}
    if parts not in (_ATTENTION, _ATTENTION | _NORMS):
        raise NotFusedError(f"{type(attention).__name__} has other parts than a Llama's")
    if {child for child, _ in mlp.named_children()} - {"act_fn"} != _MLP:
        raise NotFusedError(f"{type(mlp).__name__} has other parts than a Llama's")
    products = [getattr(attention, part) for part in _ATTENTION] + [getattr(mlp, p) for p in _MLP]
    if any(type(product) is not torch.nn.Linear for product in products):
        raise NotFusedError(f"{name} has products of other kinds than torch's Linear")
    if len({parameter.dtype for parameter in layer.parameters()}) > 1:
        raise NotFusedError(f"{name} has weights of several types")
    sizes = (mlp.down_proj.in_features, mlp.down_proj.out_features, shape.key_dim)
    if any(size % 16 for size in sizes) or shape.value_dim != shape.key_dim or call.softcap:
        raise NotFusedError(f"{name} has sizes or scores that the kernels do not know")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    head_norms = _head_norms(attention)
    dims = [sizes[1]] * 2 + [shape.key_dim] * len(head_norms)
    for norm, dim in zip(norms + head_norms, dims, strict=True):
        check_norm(norm, dim)


def check_norm(norm: Any, dim: int) -> None:
    """Raises: NotFusedError when it has not the parts of a Llama's norm of rows [dim]."""
    is_known = getattr(norm, "weight", None) is not None and eps_of(norm) is not None
    if not is_known or norm.weight.shape != (dim,) or getattr(norm, "bias", None) is not None:
        raise NotFusedError(f"{type(norm).__name__} is not a Llama's norm")


@torch.inference_mode()
def _computes_the_same(
    layer: Any, decoder: Any, call: LayerCall, kernels: Kernels, packer: Packer
) -> bool:
    """Whether the fused layer, and a stack of it, agree with the layer, in float32, on made-up rows."""
    layer = copy.deepcopy(layer).float()
    index: int = layer.self_attn.layer_idx
    generator = torch.Generator().manual_seed(index)
    results = []
    fused = FusedLayer(layer, call, kernels, packer)
    if not fused.can_pack():
        return False
    fused.pack()
    for forward in (layer, fused, FusedStack([fused])):
        generator.manual_seed(index)
        options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
        cache = KVCache({index: call.shape}, num_blocks=8, block_size=BLOCK_SIZE, **options)
        deltas = []
        for batch in _made_up_steps():
            x = torch.randn(
                batch.positions.shape[1], layer.mlp.down_proj.out_features, generator=generator
            )
            cosine, sine = decoder.rotary_emb(x[None], position_ids=batch.positions)
            if forward is layer:
                rotary, stream = (cosine, sine), Stream(batch, cache)
                result = layer(
                    x[None], position_embeddings=rotary, stream=stream, attention_mask=None
                )
                if not isinstance(result, torch.Tensor):
                    return False
                result = result[0]
            else:
                assert batch.lines is not None
                result = forward(x.clone(), (cosine[0], sine[0]), cache, lines_of(batch.lines))
            deltas.append((result - x)[: batch.num_tokens])
        results.append(torch.cat(deltas))
    plain, *others = results
    return all(is_near(plain, other) for other in others)


def is_near(plain: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two float32 results are the same but for rounding."""
    # What rows are is about 1; float32 keeps 1e-7 of it.
    limit = 1e-3 * plain.abs().max() + 1e-5
    return bool((plain - other).abs().max() <= limit)


def _made_up_steps() -> list[Any]:
    """Two sequences' prefill, then a step with drafts and a second choice."""
    prompt = Prompt(prompt_id="", token_ids=(0,) * 40, text="", question="")
    lengths, tables = (21, 40), ([1, 2], [3, 4, 5])
    first = [
        TokenSequence(prompt, 0, [0] * n, 0, 0, 0.0, block_table=t, num_scheduled_tokens=n)
        for n, t in zip(lengths, tables, strict=True)
    ]
    then = [
        TokenSequence(
            prompt, 0, [0] * (n + 1), 0, 0, 0.0,
            block_table=t, num_cached_tokens=n, num_scheduled_tokens=1, draft=[0] * 3,
            alternatives={1: 0},
        )
        for n, t in zip(lengths, tables, strict=True)
    ]  # fmt: skip
    device = torch.device("cpu")
    return [pack(step, block_size=BLOCK_SIZE, device=device) for step in (first, then)]


def _head_norms(attention: Any) -> list[Any]:
    """Of queries and of keys, if there are such."""
    has_norms = getattr(attention, "q_norm", None) is not None
    return [attention.q_norm, attention.k_norm] if has_norms else []


def eps_of(norm: Any) -> Any:
    """Its epsilon, None without one."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


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
