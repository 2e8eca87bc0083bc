# SPDX-License-Identifier: Apache-2.0
"""A Llama-like model on a CPU from tokens to logits: embedding, fused layers, last norm, head.

transformers' own way there passes every layer's module, whatever the layers do, which takes a
twentieth of a small model's step. It is left out where the model is found to do nothing else: with
layers, norm and head that pass on what they are given, what comes out is the tokens' embeddings.

Used by: `model_runner`.
"""

import copy
from typing import Any

import torch

from streaminator.engine.attention import LayerCall
from streaminator.engine.batch import ROW_MULTIPLE, Batch
from streaminator.engine.fused_layers import (
    FusedStack,
    NotFusedError,
    Rotary,
    check_norm,
    eps_of,
    fuse_layers,
    is_near,
)
from streaminator.engine.kernels import KERNEL_ROW_MULTIPLE, Kernels, lines_of
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.packed_linear import Packer

_ROWS = 8  # that models are tried with


class FusedModel:
    """Takes the place of a model's `forward`."""

    def __init__(self, model: Any, stack: FusedStack, max_length: int | None) -> None:
        """`max_length`: tokens of the longest sequence, if that is known."""
        decoder = model.get_decoder()
        self._stack = stack
        self._embedding = model.get_input_embeddings()
        self._rotation = _Rotation(decoder.rotary_emb, self._embedding.weight.dtype, max_length)
        self._norm = decoder.norm
        self._head = model.get_output_embeddings()

    @property
    def linears(self) -> set[torch.nn.Linear]:
        """The layers whose products this computes with weights of its own."""
        return {linear for layer in self._stack.layers for linear in layer.linears}

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights."""
        return sum(layer.nbytes for layer in self._stack.layers)

    def pack(self) -> None:
        """Pack the weights as they are now."""
        self._stack.pack()

    @property
    def row_multiple(self) -> int:
        """Packed rows are padded to this many."""
        return KERNEL_ROW_MULTIPLE if self._stack.is_one_call else ROW_MULTIPLE

    @property
    def rows_at_once(self) -> int:
        """Packed rows for which a forward takes about as long as for fewer of them."""
        if not self._stack.is_one_call:
            return self.row_multiple
        at_once = self._stack.kernels.rows_at_once
        return min(at_once(linear.in_features) for linear in self.linears)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return len(self._embedding.weight)

    def embed(
        self, tokens: torch.Tensor, positions: torch.Tensor, end: int
    ) -> tuple[torch.Tensor, Rotary]:
        """Embeddings [T, D] of `tokens` [T], rotations of `positions` [T], which are below `end`."""
        return torch.embedding(self._embedding.weight, tokens), self._rotation(positions, end)

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Logits [padded, V] of the batch's sampled rows; keys and values go to the cache."""
        assert batch.lines is not None
        end = int((batch.lines.firsts + batch.lines.counts).max())
        x, rotary = self.embed(batch.input_ids[0], batch.positions[0], end)
        x = self._stack(x, rotary, cache, lines_of(batch.lines))
        if len(batch.noise_keys) < batch.num_tokens or len(x) < len(batch.sampled_rows):
            x = x.index_select(0, batch.sampled_rows)
        x = self._stack.kernels.rms_norm(x, self._norm.weight, eps_of(self._norm))
        return self._head(x)


class _Rotation:
    """Cosines and sines by position, computed by the model once, as far as they were needed."""

    def __init__(self, module: Any, dtype: torch.dtype, max_length: int | None) -> None:
        self._module = module
        self._dtype = dtype
        self._max_length = max_length
        self._tables: Rotary = (torch.empty(0), torch.empty(0))

    def __call__(self, positions: torch.Tensor, end: int) -> Rotary:
        """See `FusedModel.embed`."""
        if end > len(self._tables[0]):
            # Beyond a model's length its frequencies may change.
            size = min(max(1024, 2 * end), self._max_length or 2 * end)
            like = torch.empty(0, dtype=self._dtype)
            tables = self._module(like, position_ids=torch.arange(max(size, end))[None])
            self._tables = tables[0][0].contiguous(), tables[1][0].contiguous()
        cosine, sine = self._tables
        return cosine.index_select(0, positions), sine.index_select(0, positions)


def fuse_model(
    model: Any,
    calls: dict[int, LayerCall],
    block_size: int,
    packer: Packer,
    max_length: int | None,
) -> FusedModel:
    """A model that is built like a Llama, tried.

    Args:
        model: as transformers made it.
        calls: how its layers attend.
        block_size: of the KV cache.
        packer: packs the weights.
        max_length: tokens of the longest sequence, if that is known.

    Raises: NotFusedError naming the reason.
    """
    name = type(model).__name__
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    norm = getattr(decoder, "norm", None)
    if norm is None or head is None:
        raise NotFusedError(f"{name} is not built like a Llama")
    embedding = model.get_input_embeddings()
    check_norm(norm, embedding.embedding_dim)
    stack = fuse_layers(decoder, calls, block_size, packer)
    if any(x.weight.dtype != stack.kernels.dtype for x in (embedding, norm, head)):
        raise NotFusedError(f"{name} has weights of several types")
    if not _norms_the_same(norm, Kernels(torch.float32, calls[0].shape.key_dim)):
        raise NotFusedError(f"{type(norm).__name__} computes something else than a Llama's")
    fused = FusedModel(model, stack, max_length)
    if not _is_all_there_is(model, fused):
        raise NotFusedError(f"{name} computes something around its layers")
    return fused


@torch.inference_mode()
def _norms_the_same(norm: Any, kernels: Kernels) -> bool:
    """Whether the kernels' norm agrees with the model's, in float32, on made-up rows."""
    norm = copy.deepcopy(norm).float()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, len(norm.weight), generator=generator)
    return is_near(norm(rows), kernels.rms_norm(rows, norm.weight, eps_of(norm)))


@torch.inference_mode()
def _is_all_there_is(model: Any, fused: FusedModel) -> bool:
    """Whether, with layers, norm and head that pass on what they get, embeddings come out."""
    decoder = model.get_decoder()
    parts = [*decoder.layers, decoder.norm, model.get_output_embeddings()]
    given: list[torch.Tensor] = []
    rotations: list[Rotary] = []

    def pass_on(
        x: torch.Tensor, *_: Any, position_embeddings: Rotary | None = None, **__: Any
    ) -> torch.Tensor:
        given.append(x)
        if position_embeddings is not None:
            rotations.append(position_embeddings)
        return x

    tokens = torch.arange(_ROWS) % fused.vocab_size
    positions = torch.arange(_ROWS).flip(0)
    kept = torch.arange(0, _ROWS, 2)
    forwards = [part.forward for part in parts]
    try:
        for part in parts:
            part.forward = pass_on
        logits = model(
            input_ids=tokens[None],
            position_ids=positions[None],
            logits_to_keep=kept,
            use_cache=False,
        ).logits
    finally:
        for part, forward in zip(parts, forwards, strict=True):
            part.forward = forward
    embedded, rotary = fused.embed(tokens, positions, _ROWS)
    return (
        len(given) == len(parts)
        and len(rotations) == len(decoder.layers)
        and all(x is given[0] for x in given[:-1])
        and _are_equal(given[0][0], embedded)
        and _are_equal(logits[0], embedded[kept])
        and all(
            _are_equal(one[0], other)
            for rotation in rotations
            for one, other in zip(rotation, rotary, strict=True)
        )
    )


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
