# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN001, ANN201, ANN202 - Triton gives arguments their types,
# type: ignore - and is not there for pyright on every machine
"""A Llama's layer on a GPU but for its attention, in Triton: products, norms, rotation, SiLU.

As transformers runs it, a layer is some 30 small kernels beside its products, each of which takes a
card 2 us however few rows there are: for 28 layers as long as reading a model of 3B. Here they are
four, each of which also sums what the product before it left.

Exactness: a row's result does not depend on how many rows there are. A product's steps over its
inputs, the splits that they are shared out to and the order in which these are summed are constants
of the layer, as in He et al. (2025), Defeating nondeterminism in LLM inference; a norm is one
program per row.

Shapes: T packed rows, D inputs and D' outputs of a product, C splits of D, N heads, K KV heads, H head dim.

Used by: `gpu_layers`, the only one to import it: Triton may be missing.
"""

import triton
import triton.language as tl

_VARIABLE = ["num_rows", "num_slots"]
"""Numbers that change from step to step: Triton would compile anew for 1 and multiples of 16."""


@triton.jit
def _multiply_split(
    x_place,
    weight_place,
    is_row,
    is_output,
    split,
    split_size,
    num_inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    part = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for begin in range(split * split_size, tl.minimum((split + 1) * split_size, num_inputs), STEP):
        a = tl.load(x_place + begin, mask=is_row[:, None], other=0.0)
        b = tl.load(weight_place + begin, mask=is_output[:, None], other=0.0)
        part = tl.dot(a, tl.trans(b), part, input_precision="ieee")
    return part


@triton.jit(do_not_specialize=_VARIABLE)
def multiply(
    out,  # [1 or C, T, D']
    x,  # [T, D]
    weight,  # [D', D]
    bias,  # [D']
    num_rows,
    num_outputs,
    num_inputs,
    split_size,
    num_splits,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """A tile of x @ weight.T + bias. Grid: (row tiles * output tiles, C), where each split is a part of
    `out` for the next kernel to sum; or with `SUMS` (..., 1), where they are summed here, one after
    another: that takes registers for a second tile, so that fewer programs run at a time.

    Tiles of the same weights lie side by side, so that they find them in the L2 cache.
    """
    num_tiles = tl.cdiv(num_rows, ROWS)
    rows = tl.program_id(0) % num_tiles * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) // num_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row = rows < num_rows
    is_output = outputs < num_outputs
    inputs = tl.arange(0, STEP)
    x_place = x + rows.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
    weight_place = weight + outputs.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
    split = tl.program_id(1)
    total = _multiply_split(
        x_place, weight_place, is_row, is_output, split, split_size, num_inputs, ROWS, OUTPUTS, STEP
    )
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=is_output & (split == 0), other=0.0)[None, :]
    if SUMS:
        for split in range(1, num_splits):
            total += _multiply_split(
                x_place, weight_place, is_row, is_output, split, split_size, num_inputs, ROWS,
                OUTPUTS, STEP,
            )  # fmt: skip
    place = (tl.program_id(1) * num_rows.to(tl.int64) + rows)[:, None] * num_outputs
    mask = is_row[:, None] & is_output[None, :]
    tl.store(out + place + outputs[None, :], total, mask=mask)


@triton.jit
def _sum_parts(parts, num_elements, place, mask, C: tl.constexpr):
    """What a product left in parts, at `place` of each; float32."""
    total = tl.load(parts + place, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, C):
        total += tl.load(parts + split * num_elements + place, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=_VARIABLE)
def add_norm(
    normed,  # [T, D]
    x,  # [T, D]
    parts,  # [C, T, D]; not read where C = 0
    weight,  # [D]
    num_rows,
    eps,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    C: tl.constexpr,
):
    """x += sum(parts), and its RMSNorm (Zhang and Sennrich 2019). Grid: (T,)."""
    d = tl.arange(0, D_PADDED)
    mask = d < D
    place = tl.program_id(0).to(tl.int64) * D + d
    row = tl.load(x + place, mask=mask, other=0.0)
    factor = tl.load(weight + d, mask=mask, other=0.0)  # not waited for until all is summed
    if C > 0:
        row = row.to(tl.float32) + _sum_parts(parts, num_rows.to(tl.int64) * D, place, mask, C)
        row = row.to(x.dtype.element_ty)
        tl.store(x + place, row, mask=mask)
    row = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / D + eps)
    row = (row * scale).to(x.dtype.element_ty).to(tl.float32)
    row *= factor.to(tl.float32)
    tl.store(normed + place, row, mask=mask)


@triton.jit(do_not_specialize=_VARIABLE)
def silu_mul(
    out,  # [T, D]
    both,  # [C, T, 2 * D]
    num_rows,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
):
    """silu(gate) * up. Grid: (T, D / SIZE)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    mask = d < D
    num_elements = num_rows.to(tl.int64) * 2 * D
    gate = _sum_parts(both, num_elements, row * 2 * D + d, mask, C)
    up = _sum_parts(both, num_elements, row * 2 * D + D + d, mask, C)
    tl.store(out + row * D + d, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _load_row(place, mask):
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_halves(pointer, place, first, second, mask, H: tl.constexpr):
    tl.store(pointer + place, first, mask=mask)
    tl.store(pointer + place + H // 2, second, mask=mask)


@triton.jit(do_not_specialize=_VARIABLE)
def rotate(
    queries,  # [T, N, H]
    own_keys,  # [T, K, H]
    own_values,  # [T, K, H]
    keys,  # [blocks, S, K, H]
    values,  # [blocks, S, K, H]
    qkv,  # [C, T, (N + 2 * K) * H]
    cosines,  # [T, H]
    sines,  # [T, H]
    slots,  # [n]
    query_norm,  # [H]
    key_norm,  # [H]
    num_rows,
    num_slots,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    C: tl.constexpr,
):
    """Rotate queries and keys (Su et al. 2021), with a norm before where there is one; the first n
    rows' keys and values go to their slots of the cache. Grid: (T, heads / HEADS).
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF_PADDED)
    is_value = (head >= N + K)[:, None]
    mask = (head < N + 2 * K)[:, None] & (d < H // 2)[None, :]
    place = (row * (N + 2 * K) + head)[:, None] * H + d[None, :]
    num_elements = num_rows.to(tl.int64) * (N + 2 * K) * H
    first = _sum_parts(qkv, num_elements, place, mask, C)
    second = _sum_parts(qkv, num_elements, place + H // 2, mask, C)
    is_dim = d < H // 2
    if HAS_NORMS:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / H + eps)
        is_query = (head < N)[:, None]
        norm = tl.where(
            is_query, _load_row(query_norm + d, is_dim), _load_row(key_norm + d, is_dim)
        )
        first = tl.where(is_value, first, first * scale[:, None] * norm)
        query_norm += H // 2
        key_norm += H // 2
        norm = tl.where(
            is_query, _load_row(query_norm + d, is_dim), _load_row(key_norm + d, is_dim)
        )
        second = tl.where(is_value, second, second * scale[:, None] * norm)
    cosines += row * H + d
    sines += row * H + d
    rotated_first = first * _load_row(cosines, is_dim) - second * _load_row(sines, is_dim)
    cosine, sine = _load_row(cosines + H // 2, is_dim), _load_row(sines + H // 2, is_dim)
    rotated_second = second * cosine + first * sine
    first = tl.where(is_value, first, rotated_first)
    second = tl.where(is_value, second, rotated_second)
    row_place = row * K * H + d[None, :]
    slot = tl.load(slots + row, mask=row < num_slots, other=0)
    slot_place = slot * K * H + d[None, :]
    is_query = mask & (head < N)[:, None]
    place = (row * N + head)[:, None] * H + d[None, :]
    _store_halves(queries, place, first, second, is_query, H)
    is_key = mask & (head >= N)[:, None] & (head < N + K)[:, None]
    place = (head - N)[:, None] * H
    _store_halves(own_keys, row_place + place, first, second, is_key, H)
    _store_halves(keys, slot_place + place, first, second, is_key & (row < num_slots), H)
    place = (head - N - K)[:, None] * H
    is_value = mask & is_value
    _store_halves(own_values, row_place + place, first, second, is_value, H)
    _store_halves(values, slot_place + place, first, second, is_value & (row < num_slots), H)
