# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN001, ANN201, ANN202 - Triton gives arguments their types,
# type: ignore - and is not there for pyright on every machine
"""`sampler.sample` without filters, in Triton: one pass over the logits, then little; two more over
rows whose token is none of the likeliest.

The likeliest tokens are found by way of the likeliest groups of tokens: C tokens lie in at most C
groups, those of the largest maxima. Logits are compared as numbers of 64 bits, value before id, so
that no two are equal and whoever picks the largest ones picks the same.

Exactness: a program has a row, or a piece of it whose bounds do not depend on how many rows there are.

Shapes: R rows, V vocabulary, C candidates, P pieces of a row, which are GROUPS groups of GROUP tokens.

Used by: `gpu_sampling`, the only one to import it: Triton may be missing.
"""

import triton
import triton.language as tl

_NO_TOKEN = tl.constexpr(-(2**63))
_LOW = tl.constexpr(2**32 - 1)
"""Flips an index, so that the lower one makes the larger key."""
_INVALID = tl.constexpr(-1)
_UNSETTLED = tl.constexpr(-2)
_REST = tl.constexpr(-1)
_WITHIN_REST = tl.constexpr(-2)


@triton.jit
def _key(value, index):
    """Ordered by value (float32), then, downwards, by index."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # 0 and -0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (index.to(tl.int64) ^ _LOW)


@triton.jit
def _value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(key):
    return (key & _LOW) ^ _LOW


@triton.jit
def scan(
    groups,  # [R, P * GROUPS] keys
    tops,  # [R, P] float32
    totals,  # [2, R, P] float32
    logits,  # [R, V]
    size,
    temperature,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Maximum of each group; of each piece the maximum m and the sums of exp(x - m), at temperature 1
    and as given. Grid: (R, P).
    """
    row = tl.program_id(0).to(tl.int64)
    piece = row * tl.num_programs(1) + tl.program_id(1)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + row * size + token, mask=token < size, other=float("-inf")).to(tl.float32)
    best = tl.max(x, 1)
    tl.store(groups + piece * GROUPS + tl.arange(0, GROUPS), _key(best, group))
    top = tl.max(best, 0)
    tl.store(tops + piece, top)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.sum(tl.exp(x - base), 1), 0)
    tl.store(totals + piece, total)
    total = tl.sum(tl.sum(tl.exp(tl.div_rn(x, temperature) - tl.div_rn(base, temperature)), 1), 0)
    num_pieces = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(totals + num_pieces + piece, total)


@triton.jit
def gather(
    keys_of,  # [R, GROUPS * GROUP]
    groups,  # [R, GROUPS] keys
    logits,  # [R, V]
    size,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Keys of all tokens of the groups given. Grid: (R,)."""
    row = tl.program_id(0).to(tl.int64)
    place = row * GROUPS + tl.arange(0, GROUPS)
    group = _index_of(tl.load(groups + place))
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_token = token < size
    x = tl.load(logits + row * size + token, mask=is_token, other=0.0).to(tl.float32)
    place = place[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(keys_of + place, tl.where(is_token, _key(x, token), _NO_TOKEN))


@triton.jit
def _mix(x):
    """SplitMix64's finaliser, as in `sampler`."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _row_key(noise_keys, positions, row):
    step = tl.load(positions + row).to(tl.uint64) * 0x9E3779B97F4A7C15
    return _mix(tl.load(noise_keys + row).to(tl.uint64) + step)


@triton.jit
def _uniform(row_key, token):
    bits = _mix(row_key + (token + 2).to(tl.uint64) * 0xD1342543DE82EF95)
    return ((bits >> 12).to(tl.float64) + 0.5) * 2.0**-52


@triton.jit
def _gumbel(row_key, token):
    return -tl.log(-tl.log(_uniform(row_key, token)))


@triton.jit
def _log_sum(scaled, totals, top, mask):
    """log(sum(exp(x - top))) of a row's scaled logits, from its pieces' largest and sums, in float64."""
    weight = tl.where(scaled == float("-inf"), 0.0, tl.exp((scaled - top).to(tl.float64)))
    total = tl.load(totals, mask=mask, other=0.0).to(tl.float64)
    return tl.log(tl.sum(total * weight, 0))


@triton.jit
def draw(
    tokens,  # [R]
    logprobs,  # [R] float32
    log_totals,  # [R] float64, log(sum(exp(x)))
    top_ids,  # [R, M]
    top_probs,  # [R, M] float32
    candidates,  # [R, C] keys, largest first
    tops,  # [R, P]
    totals,  # [2, R, P]
    noise_keys,  # [R]
    positions,  # [R]
    temperature,
    num_top,
    num_pieces,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    P_PADDED: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    """A row's token, or that it is none of the candidates. Grid: (R,)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C_PADDED)
    key = tl.load(candidates + row * C + c, mask=c < C, other=_NO_TOKEN)
    value, token = _value_of(key), _index_of(key)
    piece = tl.arange(0, P_PADDED)
    mask = piece < num_pieces
    place = row * num_pieces + piece
    most = tl.load(tops + place, mask=mask, other=float("-inf"))
    top = tl.max(most, 0)
    log_total = top.to(tl.float64) + _log_sum(most, totals + place, top, mask)
    is_one = c < C
    if IS_GREEDY:
        probs = tl.exp(value.to(tl.float64) - log_total)
        drawn = tl.sum(tl.where(c == 0, token, 0), 0)
        chosen = tl.sum(tl.where(c == 0, value, 0.0), 0)
    else:
        # Rounded as in `scan`, and subtracted before anything is added: what is left for the rest is
        # a small difference.
        totals += tl.num_programs(0).to(tl.int64) * num_pieces
        top = tl.div_rn(top, temperature)
        log_sum = _log_sum(tl.div_rn(most, temperature), totals + place, top, mask)
        scaled = tl.div_rn(value, temperature).to(tl.float64) - top.to(tl.float64) - log_sum
        probs = tl.where(is_one, tl.exp(scaled), 0.0)
        row_key = _row_key(noise_keys, positions, row)
        scores = tl.where(is_one, scaled + _gumbel(row_key, token), float("-inf"))
        best = tl.argmax(scores, 0)
        drawn = tl.sum(tl.where(c == best, token, 0), 0)
        chosen = tl.sum(tl.where(c == best, value, 0.0), 0)
        if HAS_REST:
            rest = tl.maximum(1 - tl.sum(probs, 0), 0.0)
            score = tl.log(rest) + _gumbel(row_key, tl.full([], _REST, tl.int64))
            drawn = tl.where(score > tl.max(scores, 0), _UNSETTLED, drawn)
    is_finite = (log_total - log_total) == 0
    tl.store(tokens + row, tl.where(is_finite, drawn, _INVALID))
    tl.store(logprobs + row, chosen.to(tl.float64) - log_total)
    tl.store(log_totals + row, log_total)
    is_top = c < num_top
    tl.store(top_ids + row * num_top + c, token, mask=is_top)
    tl.store(top_probs + row * num_top + c, probs, mask=is_top)


@triton.jit
def _rest_of(logits, row, start, size, temperature, top, last, BLOCK: tl.constexpr):
    """Tokens from `start` on, and their exp(x - top), but 0 for candidates, whose keys reach `last`."""
    token = start + tl.arange(0, BLOCK)
    x = tl.load(logits + row * size + token, mask=token < size, other=float("-inf")).to(tl.float32)
    # Many cards are slow at float64: it is for the sums.
    mass = tl.exp(tl.div_rn(x, temperature) - top)
    mass = tl.where((token < size) & (_key(x, token) < last), mass, 0.0)
    return token, mass.to(tl.float64)


@triton.jit
def settle(
    tokens,  # [R]
    logprobs,  # [R] float32
    log_totals,  # [R] float64
    candidates,  # [R, C] keys, largest first
    logits,  # [R, V]
    noise_keys,  # [R]
    positions,  # [R]
    size,
    temperature,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens that are none of the candidates, as `sampler.draw_rest` draws them. Grid: (R,)."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(tokens + row) == _UNSETTLED:
        best = tl.load(candidates + row * C)
        last = tl.load(candidates + row * C + C - 1)
        top = tl.div_rn(_value_of(best), temperature)
        total = tl.full([], 0.0, tl.float64)
        for start in range(0, size, BLOCK):
            _, mass = _rest_of(logits, row, start, size, temperature, top, last, BLOCK)
            total += tl.sum(mass, 0)
        row_key = _row_key(noise_keys, positions, row)
        wanted = _uniform(row_key, tl.full([], _WITHIN_REST, tl.int64)) * total
        drawn = tl.full([], 0, tl.int64) + size - 1
        before = tl.full([], 0.0, tl.float64)
        for start in range(0, size, BLOCK):
            token, mass = _rest_of(logits, row, start, size, temperature, top, last, BLOCK)
            is_past = before + tl.cumsum(mass, 0) > wanted
            drawn = tl.minimum(drawn, tl.min(tl.where(is_past, token, size - 1), 0).to(tl.int64))
            before += tl.sum(mass, 0)
        # Rounding may have let a rest win that has no mass.
        drawn = tl.where(total > 0, drawn, _index_of(best))
        chosen = tl.load(logits + row * size + drawn).to(tl.float32)
        tl.store(tokens + row, drawn)
        tl.store(logprobs + row, chosen.to(tl.float64) - tl.load(log_totals + row))
