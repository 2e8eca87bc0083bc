# SPDX-License-Identifier: Apache-2.0
"""Paged attention against the gather and PyTorch's, as shares of the card's copy bandwidth.

    python -m jobs.benchmark_attention --batch 16 --num_kv_heads 8 --num_groups 3 --head_dim 128

Counted are the keys and values of the contexts, read once; the gather's copy is not, so that its
share says what it costs. The gather writes the new keys to the cache first, as it does in a stream.
One layer, bfloat16, medians of interleaved repeats; short contexts fit the L2 cache, where shares of
more than 100 % are no error.
"""

import argparse
import statistics
import sys
from types import SimpleNamespace
from typing import Any

import torch

from jobs.roofline import seconds_on_card
from streaminator.engine.attention import LayerCall, Stream, attention
from streaminator.engine.batch import AttentionGroup, Batch
from streaminator.engine.kv_cache import KVCache, LayerShape
from streaminator.engine.paged_attention import attend_paged
from streaminator.engine.paged_trial import why_not_paged

BLOCK_SIZE = 16
CONTEXTS = (512, 1024, 2048, 4096, 8192)
_COPY_BYTES = 1 << 30
_REPEATS = 30


def main(arguments: list[str] | None = None) -> int:
    """Print the table; without a GPU, only that there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--num_kv_heads", type=int, default=8)
    parser.add_argument("--num_groups", type=int, default=3, help="query heads per KV head")
    parser.add_argument("--head_dim", type=int, default=128)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure")
        return 0
    device = torch.device("cuda")
    shape = LayerShape(args.num_kv_heads, args.head_dim, args.head_dim)
    num_heads = args.num_kv_heads * args.num_groups
    call = LayerCall(num_heads, shape, torch.bfloat16, None, None, None)
    reason = why_not_paged([call], BLOCK_SIZE, device)
    if reason is not None:
        print(f"paged attention cannot be used here: {reason}")
        return 1
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * _COPY_BYTES / _seconds([lambda: target.copy_(source)])[0]
    print(f"{torch.cuda.get_device_name(device)}: copies {copy / 1e9:.0f} GB/s")
    print("context  queries  paged us  share  gathered us  share  ratio")
    for context in CONTEXTS:
        for num_queries in range(1, 10):
            paged, gathered = _measure(call, args.batch, context, num_queries, device)
            num_bytes = args.batch * context * args.num_kv_heads * args.head_dim * 2 * 2
            print(
                f"{context:7} {num_queries:8} {paged * 1e6:9.1f} {num_bytes / paged / copy:6.1%} "
                f"{gathered * 1e6:12.1f} {num_bytes / gathered / copy:6.1%} {gathered / paged:6.2f}"
            )
    return 0


@torch.inference_mode()
def _measure(
    call: LayerCall, batch: int, context: int, num_queries: int, device: torch.device
) -> list[float]:
    """Seconds of one layer's attention, paged and gathered."""
    num_blocks = -(-context // BLOCK_SIZE)
    options: dict[str, Any] = {"dtype": call.dtype, "device": device}
    cache = KVCache(
        {0: call.shape}, num_blocks=batch * num_blocks + 1, block_size=BLOCK_SIZE, **options
    )
    for pool in cache.pools(0):
        pool.normal_()
    order = 1 + torch.randperm(batch * num_blocks, device=device).view(batch, num_blocks)
    rows = torch.arange(batch * num_queries, device=device).view(batch, num_queries)
    positions = context - num_queries + torch.arange(num_queries, device=device)
    positions = positions.expand(batch, num_queries).contiguous()
    slots = order.gather(1, positions // BLOCK_SIZE) * BLOCK_SIZE + positions % BLOCK_SIZE
    none = rows.new_empty(0)
    group = AttentionGroup(rows, order, positions, None)
    packed = Batch(
        none, none, slots.flatten(), none, none, none, rows.numel(), None, _groups=[group]
    )
    query, key, value = (
        torch.randn(1, rows.numel(), num_heads, dim, **options).transpose(1, 2)
        for num_heads, dim in (
            (call.num_heads, call.shape.key_dim),
            (call.shape.num_heads, call.shape.key_dim),
            (call.shape.num_heads, call.shape.value_dim),
        )
    )
    module: Any = SimpleNamespace(layer_idx=0)
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    output = queries.new_empty(queries.shape)
    cache.write(0, slots.flatten(), keys, values)

    def paged() -> torch.Tensor:
        attend_paged(
            output, queries, keys, values, cache.pools(0), group,
            scale=call.scale, window=None, softcap=None,
        )  # fmt: skip
        return output

    def gathered() -> torch.Tensor:
        return attention(module, query, key, value, stream=Stream(packed, cache, False))[0][0]

    return _seconds([paged, gathered])


def _seconds(functions: list[Any]) -> list[float]:
    """Median time of each on the card, in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(_REPEATS + 3):
        for function, seconds in zip(functions, times, strict=True):
            taken = seconds_on_card(function)
            if repeat >= 3:
                seconds.append(taken)
    return [statistics.median(seconds) for seconds in times]


if __name__ == "__main__":
    sys.exit(main())
