# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weights lie as oneDNN's matrix kernels read them.

On a CPU products of 8 to 64 rows, a stream's, take up to half the time so, in float32 and bfloat16, and
a row's result does not depend on how many rows there are. That is tried for every shape; one for
which it does not hold keeps the plain product.

Used by: `model_runner`.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

_ROWS = (8, 16, 24, 32, 48, 64, 96, 136, 264)
"""Sizes of the batches that are tried."""
_HINT = 16
"""Rows that the layout is chosen for."""


@torch.inference_mode()
def find_packable(model: Any) -> list[torch.nn.Linear]:
    """The linear layers that can be packed. The number of threads must stay from now on."""
    if not torch.backends.mkldnn.is_available():
        return []
    are_packable: dict[tuple[torch.Size, torch.dtype], bool] = {}
    found = []
    for module in model.modules():
        if type(module) is not torch.nn.Linear:
            continue
        kind = module.weight.shape, module.weight.dtype
        if kind not in are_packable:
            are_packable[kind] = _is_packable(module.weight.detach())
        if are_packable[kind]:
            found.append(module)
    return found


@torch.inference_mode()
def pack_linear(layers: Iterable[torch.nn.Linear]) -> None:
    """Let layers compute with a packed copy of the weights they have now.

    Their own weights stay what `state_dict` gives, so that these layers take twice their memory.
    """
    for layer in layers:
        layer.forward = partial(_linear, _pack(layer.weight.detach()), layer.bias)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _HINT)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def _is_packable(weight: torch.Tensor) -> bool:
    """Whether packed products are there for this type, and each row's is the same in any batch."""
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    packed = _pack(weight)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS[-1], weight.shape[1], generator=generator).to(weight.dtype)
    all_rows = _linear(packed, None, rows)
    return all(torch.equal(_linear(packed, None, rows[:num]), all_rows[:num]) for num in _ROWS[:-1])
