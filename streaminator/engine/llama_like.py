# SPDX-License-Identifier: Apache-2.0
"""What makes a model Llama-like: its parts are known, and tried they compute what a Llama's do.

Layers that look alike and are not stay as transformers made them. So whoever fuses layers checks
their parts here, and lets its own ones run beside transformers' on made-up steps.

Used by: `fused_layers`, `fused_model` (CPU), `gpu_layers`, `gpu_model`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from streaminator.engine.attention import LayerCall, Stream
from streaminator.engine.batch import Batch, pack
from streaminator.engine.kv_cache import KVCache
from streaminator.sequence import Prompt, Sequence

_ROWS = 8  # that models are tried with
_LENGTHS = (21, 40)  # of the sequences that layers are tried with

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine [T, H] of the packed rows' positions."""

Embed = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, Rotary]]
"""Tokens and positions [T] to embeddings [T, D] and rotations."""
Forward = Callable[[torch.Tensor, Rotary, KVCache, Batch], torch.Tensor]
"""Rows [T, D], which it may overwrite, through a layer."""

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}


class NotFusedError(Exception):
    """A model's layers stay as they are, for the reason given."""


def differs(module: Any) -> NotFusedError:
    """What to raise for a part that was tried."""
    return NotFusedError(f"{type(module).__name__} computes something else than a Llama's")


class Parts(NamedTuple):
    """What is around the layers."""

    decoder: Any
    embedding: Any
    norm: Any
    head: Any


def parts_of(model: Any, dtype: torch.dtype) -> Parts:
    """Of a model whose layers are of `dtype`. Raises: NotFusedError when one is missing or of another type."""
    name = type(model).__name__
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    norm = getattr(decoder, "norm", None)
    if norm is None or head is None:
        raise NotFusedError(f"{name} is not built like a Llama")
    embedding = model.get_input_embeddings()
    check_norm(norm, embedding.embedding_dim)
    if any(x.weight.dtype != dtype for x in (embedding, norm, head)):
        raise NotFusedError(f"{name} has weights of several types")
    return Parts(decoder, embedding, norm, head)


def layers_of(decoder: Any, calls: dict[int, LayerCall]) -> list[Any]:
    """A decoder's layers. Raises: NotFusedError when they have not the parts that are known."""
    layers: list[Any] = list(getattr(decoder, "layers", []))
    if len(layers) != len(calls) or not hasattr(decoder, "rotary_emb"):
        raise NotFusedError(f"{type(decoder).__name__} is not built like a Llama's")
    for layer in layers:
        _check_layer(layer, calls)
    if len({layer.mlp.down_proj.weight.dtype for layer in layers}) > 1:
        raise NotFusedError(f"{type(decoder).__name__} has layers of several types")
    return layers


def _check_layer(layer: Any, calls: dict[int, LayerCall]) -> None:
    """Raises: NotFusedError when a layer has not the parts that are known, and no others."""
    name = type(layer).__name__
    if {child for child, _ in layer.named_children()} != _PARTS:
        raise NotFusedError(f"{name} has other parts than a Llama's")
    attention, mlp = layer.self_attn, layer.mlp
    call = calls[attention.layer_idx]
    shape = call.shape
    parts = {child for child, _ in attention.named_children()} - {"rotary_emb"}
    if parts not in (_ATTENTION, _ATTENTION | _NORMS):
        raise NotFusedError(f"{type(attention).__name__} has other parts than a Llama's")
    if {child for child, _ in mlp.named_children()} - {"act_fn"} != _MLP:
        raise NotFusedError(f"{type(mlp).__name__} has other parts than a Llama's")
    if any(type(x) is not torch.nn.Linear for joined in linears_of(layer) for x in joined):
        raise NotFusedError(f"{name} has products of other kinds than torch's Linear")
    if len({parameter.dtype for parameter in layer.parameters()}) > 1:
        raise NotFusedError(f"{name} has weights of several types")
    sizes = (mlp.down_proj.in_features, mlp.down_proj.out_features, shape.key_dim)
    if any(size % 16 for size in sizes) or shape.value_dim != shape.key_dim or call.softcap:
        raise NotFusedError(f"{name} has sizes or scores that the kernels do not know")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    of_heads = head_norms(attention)
    dims = [sizes[1]] * 2 + [shape.key_dim] * len(of_heads)
    for norm, dim in zip(norms + of_heads, dims, strict=True):
        check_norm(norm, dim)


def check_norm(norm: Any, dim: int) -> None:
    """Raises: NotFusedError when it has not the parts of a Llama's norm of rows [dim]."""
    is_known = getattr(norm, "weight", None) is not None and eps_of(norm) is not None
    if not is_known or norm.weight.shape != (dim,) or getattr(norm, "bias", None) is not None:
        raise NotFusedError(f"{type(norm).__name__} is not a Llama's norm")


@torch.inference_mode()
def try_layer(
    layer: Any, decoder: Any, call: LayerCall, block_size: int, forwards: list[Forward]
) -> None:
    """Run `forwards` beside a layer of float32, on made-up rows.

    Raises: NotFusedError when one does not agree with it, or the layer wants other arguments, or
    parts of heads are rotated.
    """
    with _in_full_float32():
        _try_layer(layer, decoder, call, block_size, forwards)


@contextmanager
def _in_full_float32() -> Iterator[None]:
    """Whatever a trainer in the same process has asked of products.

    PyTorch has two interfaces for that, and raises where one of them is read and they disagree.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends = torch.backends.cuda.matmul, mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    older = None
    with suppress(RuntimeError):
        older = torch.get_float32_matmul_precision()
    try:
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _try_layer(
    layer: Any, decoder: Any, call: LayerCall, block_size: int, forwards: list[Forward]
) -> None:
    index: int = layer.self_attn.layer_idx
    weight = layer.mlp.down_proj.weight
    options: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
    steps = _made_up_steps(block_size, weight.device)

    def plain(x: torch.Tensor, rotary: Rotary, cache: KVCache, batch: Batch) -> torch.Tensor:
        try:
            result = layer(
                x[None],
                position_embeddings=tuple(part[None] for part in rotary),
                stream=Stream(batch, cache),
                attention_mask=None,
            )
        except TypeError as error:
            raise NotFusedError(f"{type(layer).__name__} wants other arguments") from error
        if not isinstance(result, torch.Tensor):
            raise differs(layer)
        return result[0]

    def rotate(x: torch.Tensor, positions: torch.Tensor) -> Rotary:
        name = type(decoder.rotary_emb).__name__
        try:
            rotary = rotations_of(decoder, x, positions)
        except TypeError as error:
            raise NotFusedError(f"{name} wants other arguments") from error
        if rotary[0].shape[-1] != call.shape.key_dim:
            raise NotFusedError(f"{name} rotates parts of heads")
        return rotary

    def deltas(forward: Forward) -> torch.Tensor:
        generator = torch.Generator(weight.device).manual_seed(index)
        num_blocks = 1 + len(_LENGTHS) * _num_blocks(block_size)
        cache = KVCache(
            {index: call.shape}, num_blocks=num_blocks, block_size=block_size, **options
        )
        rows = []
        for batch in steps:
            x = torch.randn(batch.positions.shape[1], len(weight), generator=generator, **options)
            result = forward(x.clone(), rotate(x, batch.positions[0]), cache, batch)
            rows.append((result - x)[: batch.num_tokens])
        return torch.cat(rows)

    expected = deltas(plain)
    if not all(_is_near(expected, deltas(forward)) for forward in forwards):
        raise differs(layer)


@torch.inference_mode()
def try_norm(norm: Any, other: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
    """Raises: NotFusedError when `other`, given made-up rows and the norm in float32, does not agree."""
    norm = copy.deepcopy(norm).float()
    weight = norm.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    rows = torch.randn(
        _ROWS, len(weight), generator=generator, dtype=torch.float32, device=weight.device
    )
    if not _is_near(norm(rows), other(rows, norm)):
        raise differs(norm)


@torch.inference_mode()
def try_rest(model: Any, embed: Embed) -> None:
    """Raises: NotFusedError when, with layers, norm and head that pass on what they get, something else
    than embeddings comes out.
    """
    decoder = model.get_decoder()
    parts = [*decoder.layers, decoder.norm, model.get_output_embeddings()]
    given: list[torch.Tensor] = []
    rotations: list[Rotary] = []

    def pass_on(
        x: torch.Tensor, *_: Any, position_embeddings: Rotary | None = None, **__: Any
    ) -> torch.Tensor:
        given.append(x)
        if position_embeddings is not None:
            rotations.append(position_embeddings)
        return x

    weight = model.get_input_embeddings().weight
    tokens = torch.arange(_ROWS, device=weight.device) % len(weight)
    positions = torch.arange(_ROWS, device=weight.device).flip(0)
    kept = torch.arange(0, _ROWS, 2, device=weight.device)
    forwards = [part.forward for part in parts]
    try:
        for part in parts:
            part.forward = pass_on
        logits = model(
            input_ids=tokens[None],
            position_ids=positions[None],
            logits_to_keep=kept,
            use_cache=False,
        ).logits
    finally:
        for part, forward in zip(parts, forwards, strict=True):
            part.forward = forward
    embedded, rotary = embed(tokens, positions)
    is_all_there_is = (
        len(given) == len(parts)
        and len(rotations) == len(decoder.layers)
        and all(x is given[0] for x in given[:-1])
        and _are_equal(given[0][0], embedded)
        and _are_equal(logits[0], embedded[kept])
        and all(
            _are_equal(one[0], other)
            for rotation in rotations
            for one, other in zip(rotation, rotary, strict=True)
        )
    )
    if not is_all_there_is:
        raise NotFusedError(f"{type(model).__name__} computes something around its layers")


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _is_near(plain: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two float32 results are the same but for rounding."""
    # What rows are is about 1; float32 keeps 1e-7 of it.
    limit = 1e-3 * plain.abs().max() + 1e-5
    return bool((plain - other).abs().max() <= limit)


def linears_of(layer: Any) -> list[list[torch.nn.Linear]]:
    """Those that are multiplied with the same rows together, in the order of a forward."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def rotations_of(decoder: Any, x: torch.Tensor, positions: torch.Tensor) -> Rotary:
    """The model's own of `positions` [T], in the type of `x` [T, D]."""
    cosine, sine = decoder.rotary_emb(x[None], position_ids=positions[None])
    return cosine[0].contiguous(), sine[0].contiguous()


def head_norms(attention: Any) -> list[Any]:
    """Of queries and of keys, if there are such."""
    has_norms = getattr(attention, "q_norm", None) is not None
    return [attention.q_norm, attention.k_norm] if has_norms else []


def eps_of(norm: Any) -> Any:
    """Its epsilon, None without one."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _num_blocks(block_size: int) -> int:
    """That one of the sequences takes, with a token and a draft of 3."""
    return -(-(max(_LENGTHS) + 4) // block_size)


def _made_up_steps(block_size: int, device: torch.device) -> list[Batch]:
    """Two sequences' prefill, then a step with drafts and a second choice."""
    prompt = Prompt(prompt_id="", token_ids=(0,) * max(_LENGTHS), text="", question="")
    num = _num_blocks(block_size)
    tables = [list(range(1 + i * num, 1 + (i + 1) * num)) for i in range(len(_LENGTHS))]
    first = [
        Sequence(prompt, 0, [0] * n, 0, 0, 0.0, block_table=t, num_scheduled_tokens=n)
        for n, t in zip(_LENGTHS, tables, strict=True)
    ]
    then = [
        Sequence(
            prompt, 0, [0] * (n + 1), 0, 0, 0.0,
            block_table=t, num_cached_tokens=n, num_scheduled_tokens=1, draft=[0] * 3,
            alternatives={1: 0},
        )
        for n, t in zip(_LENGTHS, tables, strict=True)
    ]  # fmt: skip
    return [pack(step, block_size=block_size, device=device) for step in (first, then)]
