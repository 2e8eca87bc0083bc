# SPDX-License-Identifier: Apache-2.0
"""Products on a GPU for which a row's bits do not depend on how many rows there are.

A step of a stream reads the weights for some tens of rows, which bounds its time: what a product
computes with them is small beside that. So one kind of tile is enough for all steps, and its order
of summing need not depend on how many rows there are, as it does in cuBLAS.

Weights that are multiplied together are joined in one piece of memory, of which the layers' own
parameters become parts: new weights that are written to these need no other step.

No number here is tuned while running: another choice would give other bits.

Used by: `gpu_layers`, `gpu_model`.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from streaminator.engine.llama_like import NotFusedError

_OUTPUTS = 128
"""Outputs of a tile."""
_LOW_ROWS, _HIGH_ROWS = 64, 128
"""Rows of a tile: Hopper's tensor cores take 64 at once, so that both sum in one order."""
_STEP_BYTES = 128
"""Of a row's inputs in a step of the loop: low tiles of four and high ones of three stages take 96 KiB
of shared memory."""
_FEW_TILES = 128
"""Fewer leave some of a card's processors without weights to read: the inputs are split, too."""
_ENOUGH = 0.75
"""Of these are enough: to write and read parts takes longer than the other processors would save."""
_MOST_SPLITS = 8
_LEAST_STEPS = 4
"""Of a split."""
_TRIED_ROWS = (1, 8, _LOW_ROWS, _LOW_ROWS + 1)
_TOLERANCE = 0.02
"""Of the largest output: products in bfloat16 keep 1/256 of theirs."""


def gpu_kernels() -> Any:
    """The kernels; Triton may be missing."""
    return importlib.import_module("streaminator.engine.gpu_kernels")


class GpuProduct:
    """x @ weight.T + bias, in parts that the next kernel sums."""

    def __init__(
        self,
        linears: Sequence[torch.nn.Linear],
        *,
        batch_invariant: bool,
        most_splits: int = _MOST_SPLITS,
    ) -> None:
        """Join the weights of `linears`.

        Args:
            linears: layers of the same inputs.
            batch_invariant: by the own kernel; else by PyTorch.
            most_splits: 1 leaves one part.

        Raises: NotFusedError when they do not join.
        """
        biases = [linear.bias for linear in linears]
        if any((bias is None) != (biases[0] is None) for bias in biases):
            raise NotFusedError("some of the products that go together have no bias")
        self._weight = _join([linear.weight for linear in linears])
        self._bias = None if biases[0] is None else _join(biases)
        self._is_own = batch_invariant
        num_outputs, num_inputs = self._weight.shape
        self._step = _STEP_BYTES // self._weight.itemsize
        while num_inputs % self._step:
            self._step //= 2
        num_steps = num_inputs // self._step
        self._num_tiles = -(-num_outputs // _OUTPUTS)
        wanted = min(-(-_FEW_TILES // self._num_tiles), num_steps // _LEAST_STEPS, most_splits)
        if self._num_tiles >= _ENOUGH * _FEW_TILES:
            wanted = 1  # they would never be parts
        self._split_size = -(-num_steps // max(wanted, 1)) * self._step
        self._num_splits = -(-num_inputs // self._split_size)

    @property
    def kind(self) -> tuple[torch.Size, bool]:
        """Shape of the weights, and whether there is a bias."""
        return self._weight.shape, self._bias is not None

    @property
    def rows_in_one(self) -> int:
        """Rows from which there are tiles enough without splitting the inputs."""
        return _HIGH_ROWS * math.ceil(_ENOUGH * _FEW_TILES / self._num_tiles)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [C, T, D']; of float32 where there may be several parts."""
        if not self._is_own:
            return F.linear(x, self._weight, self._bias)[None]
        num_rows, (num_outputs, num_inputs) = len(x), self._weight.shape
        height = _LOW_ROWS if num_rows <= _LOW_ROWS else _HIGH_ROWS
        num_tiles = -(-num_rows // height) * self._num_tiles
        num_parts = self._num_splits if num_tiles < _ENOUGH * _FEW_TILES else 1
        dtype = torch.float32 if self._num_splits > 1 else x.dtype
        out = x.new_empty(num_parts, num_rows, num_outputs, dtype=dtype)
        gpu_kernels().multiply[num_tiles, num_parts](
            out, x.contiguous(), self._weight, x if self._bias is None else self._bias,
            num_rows, num_outputs, num_inputs, self._split_size, self._num_splits,
            ROWS=height, OUTPUTS=_OUTPUTS, STEP=self._step, HAS_BIAS=self._bias is not None,
            SUMS=num_parts < self._num_splits,
            num_warps=height // 16, num_stages=4 if height == _LOW_ROWS else 3,
        )  # fmt: skip
        return out

    @torch.inference_mode()
    def check(self) -> None:
        """Raises: NotFusedError when on this card a row depends on the others, or products are wrong."""
        if not self._is_own:
            return
        weight = self._weight
        generator = torch.Generator(weight.device).manual_seed(0)
        options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        rows = torch.randn(self.rows_in_one, weight.shape[1], generator=generator, **options)
        (products,) = self(rows)
        if not all(torch.equal(_sum(self(rows[:n])), products[:n]) for n in _TRIED_ROWS):
            raise NotFusedError("a product's row is not the same in any batch on this card")
        expected = F.linear(rows, weight, self._bias).float()
        error = (products.float() - expected).abs().max()
        if not error <= _TOLERANCE * expected.abs().max():
            raise NotFusedError(f"its products are off by {error:.2g} on this card")


def _sum(parts: torch.Tensor) -> torch.Tensor:
    """As the kernels do it: one after another."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All in one piece, of which they become parts."""
    if len(tensors) == 1:
        return tensors[0].detach()
    joined = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, joined.split([len(x) for x in tensors]), strict=True):
        tensor.data = part
    if joined.is_cuda:
        # Or what they were would lie in pieces of a size that no later layer's fits into.
        torch.cuda.empty_cache()
    return joined
