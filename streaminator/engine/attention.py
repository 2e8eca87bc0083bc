# SPDX-License-Identifier: Apache-2.0
"""The attention function that every Hugging Face model calls when run in the stream.

It is registered with transformers' `AttentionInterface` under the name "streaminator"; the
packed batch and the KV cache reach it as the keyword argument `stream` given to `model(...)`.

Exactness: on a CPU a row's result must not depend, not even in the last bit, on the other rows,
on padding, or on how many queries its sequence has in this step. Five things see to it: MKL's
strict reproducible mode (set in `model_runner`); queries padded to a multiple of `QUERY_MULTIPLE`
(where that mode is not to be had, on AMD, products of 1 to 3 rows differ from all others); keys
read in chunks of `KEY_CHUNK` positions (longer products are split by a rule that depends on their
padded length); types of fewer than 32 bits widened; and a fixed order of merging the chunks by
their log-sum-exp (FlashAttention, Dao et al. 2022, section 3.1). On a GPU `paged_attention` does
the work where `paged_trial` found it right.

Shapes: T packed tokens, N query heads, K KV heads, G = N / K, B, Q, L as in `batch`, H head dim.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from streaminator.engine.batch import AttentionGroup, Batch
from streaminator.engine.kv_cache import KVCache, LayerShape
from streaminator.engine.paged_attention import attend_paged
from streaminator.errors import ModelError

NAME = "streaminator"
KEY_CHUNK = 128
QUERY_MULTIPLE = 4

# Options of a model's attention that are honoured below, or do nothing at inference.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "relative_position_bias")


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How a layer calls attention."""

    num_heads: int
    shape: LayerShape
    dtype: torch.dtype
    scaling: float | None
    sliding_window: int | None
    softcap: float | None

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.shape.key_dim**-0.5 if self.scaling is None else self.scaling


@dataclass(slots=True)
class Stream:
    """What the attention function needs besides the layer's own tensors."""

    batch: Batch
    cache: KVCache | None
    """None in the probing forward, which only learns the layers' shapes."""
    use_paged: bool = False
    """Whether the kernels of `paged_attention` read the cache."""
    calls: dict[int, LayerCall] = field(default_factory=dict)
    """Learned from the probing forward, by layer."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    stream: Stream,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of the packed rows over each sequence's cached keys.

    Args:
        module: the calling layer; its `layer_idx` names its cache.
        query: [1, N, T, H]; key, value: [1, K, T, H] of the packed tokens.
        attention_mask: not used; the batch says who sees whom.
        stream: this step's batch and the cache.
        scaling: factor on the scores; default 1 / sqrt(H).
        sliding_window: a query sees at most so many keys, itself included.
        softcap: scores are squashed to softcap * tanh(score / softcap).
        options: whatever else the model passes.

    Returns:
        [1, T, N, H], and None for the weights.

    Raises:
        ModelError: the model needs something this function does not do.
    """
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} uses attention with {name!r}: not supported")
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if stream.cache is None:
        shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        stream.calls[layer] = LayerCall(
            query.shape[1], shape, key.dtype, scaling, sliding_window, softcap
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    stream.cache.write(layer, stream.batch.slot_mapping, key, value)
    output = query.new_zeros(query.shape[0], query.shape[1], value.shape[-1])
    for group in stream.batch.groups:
        if stream.use_paged:
            attend_paged(
                output, query, key, value, stream.cache.pools(layer), group,
                scale=scale, window=sliding_window, softcap=softcap,
            )  # fmt: skip
            continue
        past = stream.cache.read(layer, group.block_table)
        if group.has_own_keys:
            lines = torch.arange(len(group.rows), device=query.device)
            for kept, new in zip(past, (key, value), strict=True):
                kept[lines, :, group.query_positions[:, 0]] = new[group.rows[:, 0]].to(kept.dtype)
        _attend_group(output, query, past, group, scale, sliding_window, softcap)
    return output[None], None


def _attend_group(
    output: torch.Tensor,
    query: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor],
    group: AttentionGroup,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    key, value = past
    num_sequences, num_queries = group.rows.shape
    num_kv_heads = key.shape[1]
    num_groups = query.shape[1] // num_kv_heads
    # The heads that share a KV head become further queries of it: [B, K, G * Q, H].
    packed = (
        query[group.rows.flatten()]
        .view(num_sequences, num_queries, num_kv_heads, num_groups, -1)
        .permute(0, 2, 3, 1, 4)
        .reshape(num_sequences, num_kv_heads, num_groups * num_queries, -1)
    )
    if query.device.type == "cpu":
        # With fewer bits a row's result depends on how many rows there are.
        dtype = torch.promote_types(query.dtype, torch.float32)
        packed, key, value = packed.to(dtype), key.to(dtype), value.to(dtype)
    mask = _mask(group, key.shape[2], num_groups, window, packed.dtype)
    num_rows = packed.shape[2]
    packed = F.pad(packed, (0, 0, 0, mask.shape[2] - num_rows))
    result = _attend(packed, key, value, mask, scale, softcap)[:, :, :num_rows]
    rows = (
        result.reshape(num_sequences, num_kv_heads, num_groups, num_queries, -1)
        .permute(0, 3, 1, 2, 4)
        .reshape(num_sequences * num_queries, query.shape[1], -1)
    )
    rows = rows.to(output.dtype)
    if group.valid is None:
        output.index_copy_(0, group.rows.flatten(), rows)
    else:
        output.index_copy_(0, group.rows.flatten()[group.valid], rows[group.valid])


def _mask(
    group: AttentionGroup, num_keys: int, num_groups: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Additive mask [B, 1, G * Q, L], on a CPU padded with rows that see all; made once a step."""
    mask = group.masks.get((window, num_groups))
    if mask is None:
        keys = torch.arange(num_keys, device=group.rows.device)
        queries = group.query_positions[..., None]
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        mask = mask.masked_fill_(~visible, float("-inf"))[:, None].repeat(1, 1, num_groups, 1)
        if mask.device.type == "cpu":
            mask = F.pad(mask, (0, 0, 0, -mask.shape[2] % QUERY_MULTIPLE))
        group.masks[window, num_groups] = mask
    return mask


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax attention [B, K, Q', H] over [B, K, L, H] with an additive mask [B, 1, Q', L]."""
    if softcap is None and query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    parts = [
        _attend_chunk(
            query,
            key[:, :, start : start + KEY_CHUNK],
            value[:, :, start : start + KEY_CHUNK],
            mask[..., start : start + KEY_CHUNK],
            scale,
            softcap,
        )
        for start in range(0, key.shape[2], KEY_CHUNK)
    ]
    if len(parts) == 1:
        return parts[0][0]
    # In double precision: on tensors this small, exp's last bit depends on their shape.
    log_sums = torch.stack([log_sum for _, log_sum in parts]).double()
    weights = (log_sums - log_sums.amax(0)).exp()[..., None]
    result = parts[0][0] * weights[0]
    for weight, (part, _) in zip(weights[1:], parts[1:], strict=True):
        result = result + part * weight
    return (result / weights.sum(0)).to(query.dtype)


def _attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within a chunk of keys, and the log-sum-exp [B, K, Q'] of its scores.

    A row that sees no key of the chunk gets 0 and minus infinity.
    """
    if softcap is None:
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )
        return output, log_sum.masked_fill(mask.amax(-1) < 0, float("-inf"))
    # In double precision, because batched products are not reproducible over their shape.
    scores = query.double() @ key.double().transpose(2, 3) * scale
    scores = torch.tanh(scores / softcap) * softcap + mask
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum[..., None].clamp(min=-1e300)).exp()
    return (weights @ value.double()).to(query.dtype), log_sum.to(mask.dtype)
