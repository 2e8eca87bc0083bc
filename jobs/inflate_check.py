# SPDX-License-Identifier: Apache-2.0
"""Whether an inflated model computes what its source computes.

Used by: `inflate`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.inflate_model import Piece, pieces_of
from streaminator.errors import InputError

# torch and transformers are imported late, so that --help and typos are answered at once.
if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

CHECKED_TOKENS = (2, 32)
"""Random sequences that are compared, and tokens in each."""
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
"""Largest difference of a logit; bfloat16's is only reported, since the weights are rounded."""


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
        pieces = [(m, write if rewrite else _nothing) for m, write in pieces_of(model, source)]
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
