# SPDX-License-Identifier: Apache-2.0
"""A small trained Llama made as big as another without changing what it computes.

    python -m jobs.inflate --model demo --like llama-3.2-1b --output FOLDER

For benchmarks: the text, and so what is accepted, is a trained model's, the cost a big one's
(except the output layer's: the vocabulary stays).

- Hidden state: the source's coordinates, then zeros. An RMSNorm over D coordinates of which d are
  in use divides by sqrt(d / D) less, so its weight is multiplied by that and its eps by d / D.
- Heads: the source's keep their KV head; the added ones' columns of o_proj are zero.
- Head width: a multiple of the source's, whose rotary frequencies are then among the new ones. The
  added entries of a query are zero; queries grow by the root of the multiple, since attention
  divides by the root of the width.
- MLP: the added columns of down_proj are zero. Added layers: all of o_proj and down_proj is zero.

What reads zeros or is read by zeros is random. Before anything is written, the logits are compared
with the source's.
"""

import argparse
import copy
import itertools
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from streaminator.cli import main_program
from streaminator.config import ModelConfig
from streaminator.errors import ConfigError, InputError, ModelError, OutputError, first_line

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
# In the order of `FLAGS`, from the models' config.json.
SHAPES: dict[str, tuple[int, ...]] = {
    "smollm2-135m": (576, 30, 9, 3, 64, 1536),
    "llama-3.2-1b": (2048, 16, 32, 8, 64, 8192),
    "llama-3.2-3b": (3072, 28, 24, 8, 128, 8192),
}
SCALABLE_ROPE = ("default", "linear", "llama3")
"""Rotary types whose frequencies do not depend on the head's width but through the exponent."""
CHECKED_TOKENS = (2, 32)
"""Random sequences that are compared, and tokens in each."""
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
"""Largest difference of a logit; bfloat16's is only reported, since the weights are rounded."""

# A module of the big model, and what writes the source's part into it.
Piece = tuple["torch.nn.Module", Callable[[], None]]


def main(argv: Sequence[str]) -> int:
    """Inflate a model; returns the exit code."""
    options = _parse(argv)
    output: Path = options.output.expanduser().absolute()
    _check_output(output)
    import torch
    from transformers import LlamaForCausalLM

    from streaminator.engine.checkpoint import check_model, load_model, load_tokenizer

    named = ModelConfig(model_name=options.model_name)
    check_model(named)
    source = load_model(named, torch.float64, "sdpa")
    if type(source) is not LlamaForCausalLM:
        name = source.config.model_type
        raise ModelError(f"--model_name {options.model_name}: a {name}, not a Llama; give a Llama")
    try:
        tokenizer = load_tokenizer(named)
    except ModelError as error:
        raise ModelError(f"--model_name {options.model_name}: has no tokenizer") from error
    config = widened_config(source.config, _wanted(options, source.config), options.like)
    dtype = getattr(torch, options.dtype)
    _check_disk(output, config, dtype)
    model = inflate(source, config, dtype, seed=options.seed)
    report = check(source, model, seed=options.seed)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    _write(output, save)
    print(
        f"{output}: {model.num_parameters() / 1e6:.1f}M parameters in {options.dtype}, "
        f"the source has {source.num_parameters() / 1e6:.1f}M; {report}"
    )
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.replace("argument ", "", 1))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m jobs.inflate",
        allow_abbrev=False,
        description="Make a trained Llama bigger without changing what it computes.",
    )
    parser.add_argument(
        "--model_name",
        "--model",
        required=True,
        metavar="SRC",
        help="hub name or folder of a small Llama; 'demo' is the bundled one",
    )
    parser.add_argument(
        "--like", choices=SHAPES, help="shape to take, but for the flags below (default: SRC's)"
    )
    for flag in FLAGS:
        parser.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}", type=int, metavar="N")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="new or empty folder"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    return parser.parse_args(argv)


def _wanted(options: argparse.Namespace, source: "LlamaConfig") -> dict[str, int]:
    """The size asked for by each flag."""
    own = [getattr(source, field) for field in FLAGS.values()]
    like = SHAPES.get(options.like, own)
    given = [getattr(options, flag) for flag in FLAGS]
    pairs = zip(FLAGS, given, like, strict=True)
    return {flag: size if size is not None else named for flag, size, named in pairs}


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
    for _, write in _pieces(model, source):
        write()
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


def check(source: "LlamaForCausalLM", model: "LlamaForCausalLM", *, seed: int = 0) -> str:
    """Compare the logits on random tokens; returns what was found.

    Once in float32, with the weights as they are, and once in float64, with the source's part of
    the weights written anew in float64.

    Raises: InputError when the two are not the same function.
    """
    import torch

    length = min(CHECKED_TOKENS[1], source.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(
        source.config.vocab_size, (CHECKED_TOKENS[0], length), generator=generator
    )
    is_rounded = model.dtype == torch.bfloat16
    found = []
    for dtype in (torch.float32, torch.float64):  # the second writes the weights anew
        name = str(dtype).removeprefix("torch.")
        rewrite = dtype == torch.float64
        expected = _logits(source, tokens, dtype, [(source, _nothing)])
        pieces = [(m, write if rewrite else _nothing) for m, write in _pieces(model, source)]
        logits = _logits(model, tokens, dtype, pieces)
        difference = (logits - expected).abs().max().item()
        same = (logits.argmax(-1) == expected.argmax(-1)).double().mean().item()
        if rewrite or not is_rounded:
            found.append(f"logits differ by {difference:.0e} at most in {name}")
            # A difference that is no number is refused, too.
            if not difference <= TOLERANCE[name] or same < 1:
                raise InputError(
                    f"the inflated model is not the source: {found[-1]}, {same:.1%} of the likeliest "
                    "tokens agree; nothing written"
                )
        else:
            found.append(
                f"logits differ by {difference:.0e} at most with weights rounded to bfloat16 "
                f"({same:.1%} of the likeliest tokens agree)"
            )
    return ", ".join(found)


def _group(config: "LlamaConfig") -> int:
    """Query heads to a KV head."""
    return config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)


def _head_dim(config: "LlamaConfig") -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def _pieces(model: "LlamaForCausalLM", source: "LlamaForCausalLM") -> Iterator[Piece]:
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


def _logits(
    model: "LlamaForCausalLM", tokens: "torch.Tensor", dtype: "torch.dtype", pieces: Sequence[Piece]
) -> "torch.Tensor":
    """Logits in `dtype`, [sequence, token, vocabulary].

    One piece at a time is held in `dtype` and written anew: two copies need not fit.
    """
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    own = model.dtype

    def normalize(norm: Any, inputs: Any, _: Any) -> torch.Tensor:
        # transformers normalises in float32, whatever the type.
        (x,) = inputs
        variance = x.pow(2).mean(-1, keepdim=True)
        return norm.weight * (x * torch.rsqrt(variance + norm.variance_epsilon))

    def enter(module: Any, _: Any, *, write: Callable[[], None]) -> None:
        module.to(dtype)
        write()

    def leave(module: Any, *_: Any) -> None:
        module.to(own)

    handles = [
        module.register_forward_hook(normalize)
        for module in model.modules()
        if isinstance(module, LlamaRMSNorm)
    ]
    for module, write in pieces:
        handles.append(module.register_forward_pre_hook(partial(enter, write=write)))
        handles.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad():
            run: Any = model
            return run(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def _nothing() -> None:
    pass


def _check_output(output: Path) -> None:
    try:
        is_taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be read ({error.strerror})") from error
    if is_taken:
        raise ConfigError(f"--output {output}: is there and not empty; give a new folder")


def _check_disk(output: Path, config: "LlamaConfig", dtype: "torch.dtype") -> None:
    """Raises: ConfigError when the weights would not fit."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        needed = LlamaForCausalLM(config).num_parameters() * dtype.itemsize
    existing = next(path for path in (output, *output.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"--output {output}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
            "give another disk, a smaller shape or --dtype bfloat16"
        )


def _write(output: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill `output`, which appears whole or not at all.

    Raises: OutputError.
    """
    from safetensors import SafetensorError

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".inflate-") as folder:
            whole = Path(folder) / "model"
            save(whole)
            whole.replace(output)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"--output {output}: cannot be written ({first_line(error)})") from error


if __name__ == "__main__":
    sys.exit(main_program("python -m jobs.inflate", main, advice="; nothing was written"))
