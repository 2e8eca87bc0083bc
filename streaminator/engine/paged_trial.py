# SPDX-License-Identifier: Apache-2.0
"""Try the paged kernels against PyTorch's attention before they are used, on the card at hand.

Used by: `model_runner`.
"""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch

from streaminator.engine.attention import LayerCall, Stream, attention
from streaminator.engine.batch import AttentionGroup, Batch
from streaminator.engine.device import check_card
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.paged_attention import SPLIT, has_triton
from streaminator.errors import kind_and_line

_TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Of outputs of size 1: one key more or less in a softmax of a few changes more."""
_WINDOW = 100  # longer ones are cut, so that they hide something
_CONTEXTS = (0, SPLIT - 2, 2 * SPLIT + 188)
_NUM_QUERIES = 5


def why_not_paged(calls: Iterable[LayerCall], block_size: int, device: torch.device) -> str | None:
    """Why the kernels cannot be used for layers that attend so; None: they can.

    Whatever goes wrong in here, from a missing compiler to a wrong number, the other path is there.

    Raises: DeviceError where a kernel has left the card out of order.
    """
    if not has_triton():
        return "Triton is not installed"
    for call in calls:
        if call.dtype not in _TOLERANCE:
            return f"no kernels for {call.dtype}"
        try:
            error = _error(call, block_size, device)
        except Exception as problem:  # noqa: BLE001 - compilers raise anything
            check_card(device)
            return f"its kernels do not run ({kind_and_line(problem)})"
        if not error <= _TOLERANCE[call.dtype]:
            return f"its kernels are off by {error:.2g} on this card for {call}"
    return None


@torch.inference_mode()
def _error(call: LayerCall, block_size: int, device: torch.device) -> float:
    """Largest difference between both paths; NaN if one has a NaN."""
    batch, num_blocks = _make_batch(block_size, device)
    options: dict[str, Any] = {"dtype": call.dtype, "device": device}
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, **options)

    cache = KVCache({0: call.shape}, num_blocks=num_blocks, block_size=block_size, **options)
    for pool in cache.pools(0):
        pool.copy_(random(*pool.shape))
    num_rows, shape = batch.num_tokens, call.shape
    # Laid out as the models do it: heads of a token side by side.
    query, key, value = (
        random(1, num_rows, num_heads, dim).transpose(1, 2)
        for num_heads, dim in (
            (call.num_heads, shape.key_dim),
            (shape.num_heads, shape.key_dim),
            (shape.num_heads, shape.value_dim),
        )
    )
    window = None if call.sliding_window is None else min(call.sliding_window, _WINDOW)
    module: Any = SimpleNamespace(layer_idx=0)
    paged, gathered = (
        attention(
            module, query, key, value,
            stream=Stream(batch, cache, use_paged),
            scaling=call.scaling,
            sliding_window=window,
            softcap=call.softcap,
        )[0].float()
        for use_paged in (True, False)
    )  # fmt: skip
    return (paged - gathered).abs().max().item()


def _make_batch(block_size: int, device: torch.device) -> tuple[Batch, int]:
    """Verified drafts, one of them shorter than the others, with splits and without; then second
    choices, also with one split. Returns the number of blocks, too.
    """

    def tensor(values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=device)

    num_lines = len(_CONTEXTS)
    num_blocks = -(-(max(_CONTEXTS) + _NUM_QUERIES) // block_size)
    table = 1 + torch.arange(num_lines * num_blocks).view(num_lines, num_blocks)
    rows = torch.arange(num_lines * _NUM_QUERIES).view(num_lines, _NUM_QUERIES)
    positions = torch.tensor(_CONTEXTS)[:, None] + torch.arange(_NUM_QUERIES)
    slots = table.gather(1, positions // block_size) * block_size + positions % block_size
    first_second = rows.numel()
    short = -(-(_CONTEXTS[1] + 1) // block_size)
    is_valid = torch.ones_like(rows, dtype=torch.bool)
    is_valid[1, 3:] = False
    groups = [
        AttentionGroup(
            tensor(rows.where(is_valid, -1)),
            tensor(table),
            tensor(positions * is_valid),
            tensor(is_valid.flatten().nonzero()[:, 0]),
        ),
        # One split: the row that was left out above.
        AttentionGroup(
            tensor(rows[1:2, 3:4] * 0 + 8), tensor(table[:1, :short]), tensor([[9]]), None
        ),
        AttentionGroup(
            tensor(first_second + torch.arange(num_lines)[:, None]),
            tensor(table),
            tensor(positions[:, 1:2]),
            None,
            has_own_keys=True,
        ),
        # One split: the second row that was left out above.
        AttentionGroup(
            tensor(rows[1:2, 4:] * 0 + 9), tensor(table[:1, :short]), tensor([[11]]), None,
            has_own_keys=True,
        ),
    ]  # fmt: skip
    none = tensor([])
    batch = Batch(
        none,
        none,
        tensor(slots.flatten()),
        none,
        none,
        none,
        first_second + num_lines,
        None,
        _groups=groups,
    )
    return batch, 1 + num_lines * num_blocks
