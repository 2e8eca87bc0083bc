# SPDX-License-Identifier: Apache-2.0
"""A Llama-like model on a CPU from tokens to logits: embedding, fused layers, last norm, head.

transformers' own way there passes every layer's module, whatever the layers do, which takes a
twentieth of a small model's step. It is left out where the model is found to do nothing else: with
layers, norm and head that pass on what they are given, what comes out is the tokens' embeddings.

Used by: `model_runner`.
"""

from typing import Any

import torch

from streaminator.engine.attention import LayerCall
from streaminator.engine.batch import ROW_MULTIPLE, Batch
from streaminator.engine.fused_layers import FusedStack, fuse_layers
from streaminator.engine.kernels import KERNEL_ROW_MULTIPLE, Kernels, lines_of
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.llama_like import Rotary, eps_of, parts_of, try_norm, try_rest
from streaminator.engine.packed_linear import Packer


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
        if batch.num_sampled < batch.num_tokens or len(x) < len(batch.sampled_rows):
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
            like = positions.new_empty(0, dtype=self._dtype)
            places = torch.arange(max(size, end), device=positions.device)
            tables = self._module(like, position_ids=places[None])
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
    stack = fuse_layers(model.get_decoder(), calls, block_size, packer)
    norm = parts_of(model, stack.kernels.dtype).norm
    plain = Kernels(torch.float32, calls[0].shape.key_dim)
    try_norm(norm, lambda x, norm: plain.rms_norm(x, norm.weight, eps_of(norm)))
    fused = FusedModel(model, stack, max_length)
    try_rest(model, lambda *rows: fused.embed(*rows, end=1 + int(rows[1].max())))
    return fused
