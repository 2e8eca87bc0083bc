# SPDX-License-Identifier: Apache-2.0
"""A Llama of a bigger shape that computes what a small one computes.

- Hidden state: the source's coordinates, then zeros. An RMSNorm over D coordinates of which d are
  in use divides by sqrt(d / D) less, so its weight is multiplied by that and its eps by d / D.
- Heads: the source's keep their KV head; the added ones' columns of o_proj are zero.
- Head width: a multiple of the source's, whose rotary frequencies are then among the new ones. The
  added entries of a query are zero; queries grow by the root of the multiple, since attention
  divides by the root of the width.
- MLP: the added columns of down_proj are zero. Added layers: all of o_proj and down_proj is zero.

What reads zeros or is read by zeros is random.

Used by: `inflate`, `inflate_check`.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from streaminator.errors import ConfigError

# torch and transformers are imported late, so that --help and typos are answered at once.
if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

# flag: field of LlamaConfig
FLAGS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
}
SCALABLE_ROPE = ("default", "linear", "llama3")
"""Rotary types whose frequencies do not depend on the head's width but through the exponent."""

# A module of the big model, and what writes the source's part into it.
Piece = tuple["torch.nn.Module", Callable[[], None]]


def widened_config(
    source: "LlamaConfig", wanted: dict[str, int], like: str | None = None
) -> "LlamaConfig":
    """The big model's configuration.

    Args:
        source: the small model's.
        wanted: a size for each of `FLAGS`.
        like: where the sizes come from, for the messages.

    Raises: ConfigError when the small model does not fit into this shape.
    """
    origin = f" (with --like {like})" if like else ""
    for flag, size in wanted.items():
        least = getattr(source, FLAGS[flag])
        if size < least:
            raise ConfigError(
                f"--{flag} {size}{origin}: the source has {least}; give at least that"
            )
    width, heads, kv_heads = (wanted[k] for k in ("hidden_size", "num_heads", "num_kv_heads"))
    group = _group(source)
    if heads % kv_heads:
        raise ConfigError(f"--num_heads {heads}{origin}: must be a multiple of {kv_heads} KV heads")
    if heads // kv_heads < group:
        raise ConfigError(
            f"--num_heads {heads}{origin}: {heads // kv_heads} to a KV head, the source has "
            f"{group}; give at least {group * kv_heads}"
        )
    if width % heads:
        raise ConfigError(f"--hidden_size {width}{origin}: must be a multiple of {heads} heads")
    head_dim = _head_dim(source)
    if wanted["head_dim"] % head_dim:
        raise ConfigError(
            f"--head_dim {wanted['head_dim']}{origin}: must be a multiple of the source's "
            f"{head_dim}"
        )
    rope: dict[str, Any] = source.rope_parameters or {}  # pyright: ignore[reportAssignmentType]
    kind = rope.get("rope_type", "default")
    if wanted["head_dim"] != head_dim and kind not in SCALABLE_ROPE:
        raise ConfigError(
            f"--head_dim {wanted['head_dim']}{origin}: rotary embeddings of type {kind} cannot be "
            f"widened; give --head_dim {head_dim}"
        )
    config = copy.deepcopy(source)
    for flag, field in FLAGS.items():
        setattr(config, field, wanted[flag])
    config.rms_norm_eps = source.rms_norm_eps * source.hidden_size / width
    return config


def inflate(
    source: "LlamaForCausalLM", config: "LlamaConfig", dtype: "torch.dtype", *, seed: int = 0
) -> "LlamaForCausalLM":
    """A model of `config`'s shape, from `widened_config`, with `source`'s logits."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for _, write in pieces_of(model, source):
        write()
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


def _group(config: "LlamaConfig") -> int:
    """Query heads to a KV head."""
    return config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)


def _head_dim(config: "LlamaConfig") -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def pieces_of(model: "LlamaForCausalLM", source: "LlamaForCausalLM") -> Iterator[Piece]:
    """The modules that have weights, in the order they run."""
    width, full = source.config.hidden_size, model.config.hidden_size
    scale = math.sqrt(width / full)

    def write_embedding(target: Any, origin: Any) -> None:
        target.weight.data[:, width:] = 0
        target.weight.data[:, :width] = origin.weight.data

    def write_norm(target: Any, origin: Any) -> None:
        target.weight.data[:width] = origin.weight.data * scale

    def write_output(target: Any, origin: Any) -> None:
        target.weight.data[:, :width] = origin.weight.data

    def write_layer(target: Any, origin: Any) -> None:
        for linear in (target.self_attn.o_proj, target.mlp.down_proj):
            for parameter in linear.parameters():
                parameter.data.zero_()
        if origin is None:
            return
        write_norm(target.input_layernorm, origin.input_layernorm)
        write_norm(target.post_attention_layernorm, origin.post_attention_layernorm)
        _write_layer(target, origin, model.config, source.config)

    embedding = (model.model.embed_tokens, source.model.embed_tokens)
    yield embedding[0], partial(write_embedding, *embedding)
    for target, origin in itertools.zip_longest(model.model.layers, source.model.layers):
        yield target, partial(write_layer, target, origin)
    yield model.model.norm, partial(write_norm, model.model.norm, source.model.norm)
    yield model.lm_head, partial(write_output, model.lm_head, source.lm_head)


def _write_layer(target: Any, origin: Any, config: "LlamaConfig", source: "LlamaConfig") -> None:
    """Write the source's part of the linear maps of a layer."""
    import torch

    hidden = torch.arange(source.hidden_size)
    inner = torch.arange(source.intermediate_size)
    # A rotary pair is (i, i + half); pair i of the source has the frequency of pair i * multiple.
    size, full = _head_dim(source), _head_dim(config)
    multiple = full // size
    half = torch.arange(size // 2) * multiple
    entries = torch.cat([half, half + full // 2])
    kv_heads = torch.arange(source.num_key_value_heads or source.num_attention_heads)
    # The source's query heads are the first of their KV head.
    heads = (kv_heads[:, None] * _group(config) + torch.arange(_group(source))).flatten()
    queries = (heads[:, None] * full + entries).flatten()
    keys = (kv_heads[:, None] * full + entries).flatten()

    attention, own = target.self_attn, origin.self_attn
    for parameter in attention.q_proj.parameters():
        parameter.data.unflatten(0, (-1, full))[heads] = 0
    _write_linear(attention.q_proj, own.q_proj, queries, hidden, math.sqrt(multiple))
    _write_linear(attention.k_proj, own.k_proj, keys, hidden)
    _write_linear(attention.v_proj, own.v_proj, keys, hidden)
    _write_linear(attention.o_proj, own.o_proj, hidden, queries)
    _write_linear(target.mlp.gate_proj, origin.mlp.gate_proj, inner, hidden)
    _write_linear(target.mlp.up_proj, origin.mlp.up_proj, inner, hidden)
    _write_linear(target.mlp.down_proj, origin.mlp.down_proj, hidden, inner)


def _write_linear(
    target: Any, origin: Any, rows: "torch.Tensor", columns: "torch.Tensor", scale: float = 1.0
) -> None:
    weight = origin.weight.data * scale
    target.weight.data[rows[:, None], columns] = weight.to(target.weight.dtype)
    if origin.bias is not None:
        target.bias.data[rows] = (origin.bias.data * scale).to(target.bias.dtype)
