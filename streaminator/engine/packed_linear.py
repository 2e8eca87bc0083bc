# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weights lie as matrix kernels read them.

On a CPU products of 8 to 64 rows, a stream's, take up to half the time so, and
a row's result does not depend on how many rows there are. That is tried for every shape; one for
which it does not hold keeps the plain product. The kernels are this project's own on processors with
AVX2, AVX-512 (`csrc/products.c`) or AMX (`csrc/product_tiles.c`), elsewhere oneDNN's:
of float32 for types of which the processor has no fast ones, and for float16.

Used by: `model_runner`, `fused_layers`.
"""

from collections.abc import Container, Iterable
from typing import Any, Protocol

import torch

from streaminator.engine.huge_pages import Pages
from streaminator.engine.kernels import KERNEL_ROW_MULTIPLE, Kernels

_ROWS = (8, 16, 24, 32, 48, 64, 96, 136, 264)
"""Sizes of the batches that are tried."""
_MORE_ROWS = tuple(num * KERNEL_ROW_MULTIPLE for num in (1, 3, 5, 14))
"""And of the kernels' products."""
_HINT = 16
"""Rows that oneDNN's layout is chosen for."""
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Product(Protocol):
    """A product with a packed copy of weights [D', D], and a bias."""

    nbytes: int
    """Memory of the copy."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D']."""
        ...

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The product, added to `residual` [..., D'] before it is rounded."""
        ...


class Packer:
    """Packs weights, each shape in one way; the number of threads must stay.

    Args:
        kernels: this project's, if there are any.
    """

    def __init__(self, kernels: Kernels | None) -> None:
        self._kernels = kernels
        self._pages = Pages()
        self._can_pack: dict[tuple[torch.Size, torch.dtype], bool] = {}

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """The product with the weights as they are now."""
        return self._pack(weight, bias, self._pages)

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None, pages: Pages) -> Product:
        if self._kernels and self._has_own(weight):
            return self._kernels.product(weight, bias, pages)
        return _OneDnnProduct(weight, bias)

    @torch.inference_mode()
    def can_pack(self, weight: torch.Tensor) -> bool:
        """Whether packed products are there for this type, and each row's is the same in any batch."""
        kind = weight.shape, weight.dtype
        if kind not in self._can_pack:
            is_known = weight.dtype in _TYPES
            has_one = self._has_own(weight) or torch.backends.mkldnn.is_available()
            self._can_pack[kind] = is_known and has_one and self._are_rows_equal(weight)
        return self._can_pack[kind]

    def _has_own(self, weight: torch.Tensor) -> bool:
        kernels = self._kernels
        return bool(
            kernels and kernels.dtype == weight.dtype and kernels.has_product(*weight.shape)
        )

    def _are_rows_equal(self, weight: torch.Tensor) -> bool:
        packed = self._pack(weight, None, Pages())
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(_ROWS[-1], weight.shape[1], generator=generator, dtype=torch.float32).to(
            weight.dtype
        )
        base = torch.randn(_ROWS[-1], weight.shape[0], generator=generator, dtype=torch.float32).to(
            weight.dtype
        )
        products, sums = packed(rows), packed.add_to(base, rows)
        return all(
            torch.equal(packed(rows[:num]), products[:num])
            and torch.equal(packed.add_to(base[:num], rows[:num]), sums[:num])
            for num in (_ROWS if type(packed) is _OneDnnProduct else _ROWS + _MORE_ROWS)
        )


def find_packable(
    model: Any, packer: Packer, others: Container[torch.nn.Module] = ()
) -> list[torch.nn.Linear]:
    """The linear layers that can be packed, but for `others`."""
    return [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear
        and module not in others
        and packer.can_pack(module.weight.detach())
    ]


@torch.inference_mode()
def pack_linear(layers: Iterable[torch.nn.Linear], packer: Packer) -> None:
    """Let layers compute with a packed copy of the weights they have now.

    Their own weights stay what `state_dict` gives, so that these layers take twice their memory, or three
    times where products are of more bits.
    """
    for layer in layers:
        layer.forward = packer.pack(layer.weight.detach(), layer.bias)  # type: ignore[method-assign]


class _OneDnnProduct:
    """In float32 where the processor has no fast products of the weights' type."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._dtype = weight.dtype if _has_packed(weight.dtype) else torch.float32
        weight = weight.to(self._dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _HINT)
        self._bias = None if bias is None else bias.to(self._dtype)
        self.nbytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = torch.ops.mkldnn._linear_pointwise(
            x.to(self._dtype), self._weight, self._bias, "none", [], ""
        )
        return product.to(x.dtype)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        total = torch.ops.mkldnn._linear_pointwise.binary(
            x.to(self._dtype), residual.to(self._dtype), self._weight, self._bias, "add"
        )
        return total.to(x.dtype)


def _has_packed(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32
