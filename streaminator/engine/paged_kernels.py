# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN001, ANN201, ANN202 - Triton gives arguments their types,
# type: ignore - and is not there for pyright on every machine
"""Attention over the blocks of the KV cache, in Triton: split over keys, then merged.

Flash-decoding (Dao, Haziza, Massa, Sizov 2023) for several queries per sequence: the queries of a
sequence times the G heads that share a KV head are the rows of a tile, so that a verified draft
reads each key once and still fills the card; FlashAttention 2 gives up its splits there (issue 176
of vllm-project/flash-attention).

Exactness: height of the tile, width of the steps over keys and the bounds of the splits are
constants of the layer, and merging goes from the first split to the last. So a row's result does
not depend on its batch, on padding, or on how many queries its sequence has.

Shapes: T packed tokens, N query heads, K KV heads, G = N / K, B, Q, M as in `batch`, S tokens per
block, H and V dims of a key and a value, C splits.

Used by: `paged_attention`, the only one to import it: Triton may be missing.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_POSITION = tl.constexpr(2**31 - 1)
_MERGED_AT_ONCE = tl.constexpr(8)

_VARIABLE = ["num_queries", "line", "num_blocks", "num_splits", "window"]
"""Numbers that change from step to step: Triton would compile anew for 1 and multiples of 16."""


@triton.jit
def _load_queries(rows, positions, query, in_range):
    """Packed row, position and validity of queries; the padded ones have row -1."""
    row = tl.load(rows + query, mask=in_range, other=-1)
    position = tl.load(positions + query, mask=in_range, other=0).to(tl.int32)
    return row, position, row >= 0


@triton.jit(do_not_specialize=_VARIABLE)
def attend(
    output,  # [T, N, V]
    parts,  # [C, B * Q, N, V] float32; not used with one split
    log_sums,  # [C, B * Q, N] float32, base 2
    queries,  # [T, N, H]
    keys,  # [blocks, S, K, H]
    values,  # [blocks, S, K, V]
    own_keys,  # [T, K, H]
    own_values,  # [T, K, V]
    rows,  # [B, Q], lines `line` apart
    positions,  # the same
    table,  # [B, M]
    query_token,
    query_head,
    own_key_token,
    own_key_head,
    own_value_token,
    own_value_head,
    num_queries,
    line,
    num_blocks,
    num_splits,
    window,
    scale,
    softcap,
    K: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    """One split of the keys for one tile of rows. Grid: (tiles * K * B, C), tiles side by side so
    that those of one KV head find its keys in the L2 cache.
    """
    num_tiles = tl.cdiv(num_queries * G, TILE)
    tile = tl.program_id(0) % num_tiles
    kv_head = tl.program_id(0) // num_tiles % K
    sequence = (tl.program_id(0) // num_tiles // K).to(tl.int64)
    split = tl.program_id(1)
    index = tile * TILE + tl.arange(0, TILE)
    query = index // G
    head = kv_head * G + index % G
    row, position, is_valid = _load_queries(
        rows + sequence * line,
        positions + sequence * line,
        query,
        query < num_queries,
    )
    last = tl.max(tl.where(is_valid, position, -1), 0)
    first = tl.maximum(tl.min(tl.where(is_valid, position, _NO_POSITION), 0) - window + 1, 0)
    start = tl.maximum(split * SPLIT, first // STEP * STEP)
    end = tl.minimum(split * SPLIT + SPLIT, last + 1)
    if start >= end:
        return
    h = tl.arange(0, H_PADDED)
    v = tl.arange(0, V_PADDED)
    q = tl.load(
        queries + row[:, None] * query_token + head[:, None] * query_head + h[None, :],
        mask=is_valid[:, None] & (h < H)[None, :],
        other=0.0,
    ).to(keys.dtype.element_ty)
    if HAS_OWN:
        own_row = tl.load(rows + sequence * line)
        own_position = tl.load(positions + sequence * line).to(tl.int32)
        own_key = tl.load(
            own_keys + own_row * own_key_token + kv_head * own_key_head + h, mask=h < H, other=0.0
        ).to(keys.dtype.element_ty)
        own_value = tl.load(
            own_values + own_row * own_value_token + kv_head * own_value_head + v,
            mask=v < V,
            other=0.0,
        ).to(values.dtype.element_ty)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    result = tl.zeros([TILE, V_PADDED], tl.float32)
    for begin in range(start, end, STEP):
        at = begin + tl.arange(0, STEP)
        is_there = at < end
        block = tl.load(table + sequence * num_blocks + at // S, mask=is_there, other=0)
        place = (block * S + at % S) * K + kv_head
        key = tl.load(
            keys + place[:, None] * H + h[None, :],
            mask=is_there[:, None] & (h < H)[None, :],
            other=0.0,
        )
        value = tl.load(
            values + place[:, None] * V + v[None, :],
            mask=is_there[:, None] & (v < V)[None, :],
            other=0.0,
        )
        if HAS_OWN:
            is_own = (at == own_position)[:, None]
            key = tl.where(is_own, own_key[None, :], key)
            value = tl.where(is_own, own_value[None, :], value)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            scores = softcap * (1 - 2 / (tl.exp2(scores / softcap * (2 * _LOG2_E)) + 1))
        scores = scores * _LOG2_E
        is_seen = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet must not subtract infinities.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(top - base)
        total = total * rescale + tl.sum(weights, 1)
        result = result * rescale[:, None]
        result += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        top = new_top
    total = tl.where(total == 0, 1.0, total)  # a row that sees nothing of this split
    result = result / total[:, None]
    mask = is_valid[:, None] & (v < V)[None, :]
    if num_splits == 1:
        place = row * (K * G) + head
        tl.store(output + place[:, None] * V + v[None, :], result, mask=mask)
    else:
        num_lines = tl.num_programs(0) // (num_tiles * K)
        place = (split.to(tl.int64) * num_lines + sequence) * num_queries + query
        place = place * (K * G) + head
        tl.store(parts + place[:, None] * V + v[None, :], result, mask=mask)
        tl.store(log_sums + place, top + tl.log2(total), mask=is_valid)


@triton.jit(do_not_specialize=_VARIABLE)
def merge(
    output,  # [T, N, V]
    parts,  # [C, B * Q, N, V]
    log_sums,  # [C, B * Q, N]
    rows,  # [B, Q], lines `line` apart
    positions,
    num_queries,
    line,
    window,
    N: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One head of one query: its splits, weighted by their log-sum-exp. Grid: (B * Q, N)."""
    sequence = (tl.program_id(0) // num_queries).to(tl.int64)
    query = tl.program_id(0) % num_queries
    head = tl.program_id(1)
    row, position, is_valid = _load_queries(
        rows + sequence * line, positions + sequence * line, query, True
    )
    if not is_valid:
        return
    first = tl.maximum(position - window + 1, 0) // SPLIT
    last = position // SPLIT
    v = tl.arange(0, V_PADDED)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    result = tl.zeros([V_PADDED], tl.float32)
    for begin in range(first // _MERGED_AT_ONCE * _MERGED_AT_ONCE, last + 1, _MERGED_AT_ONCE):
        split = begin + tl.arange(0, _MERGED_AT_ONCE)
        is_there = (split >= first) & (split <= last)
        place = (split.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * N + head
        log_sum = tl.load(log_sums + place, mask=is_there, other=float("-inf"))
        part = tl.load(
            parts + place[:, None] * V + v[None, :],
            mask=is_there[:, None] & (v < V)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(log_sum, 0))
        rescale = tl.exp2(top - new_top)
        weights = tl.where(is_there, tl.exp2(log_sum - new_top), 0.0)
        result = result * rescale + tl.sum(part * weights[:, None], 0)
        total = total * rescale + tl.sum(weights, 0)
        top = new_top
    tl.store(output + (row * N + head) * V + v, result / total, mask=v < V)
