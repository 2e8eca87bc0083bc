# SPDX-License-Identifier: Apache-2.0
"""Randomly initialised models of a stated size: what a forward pass costs, without a download.

Used by: `jobs.benchmark`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIZES: dict[str, dict[str, Any]] = {
    "100m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
    },
}
MIN_VOCABULARY = 32_000
CONTEXT = 4096
LOGIT_SPREAD = 4.0
"""Standard deviation of the logits."""


def save_random_llama(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", size: str, *, seed: int = 0
) -> None:
    """Write a random Llama and the tokenizer to `folder`; the same seed gives the same weights.

    Args:
        folder: an existing folder.
        tokenizer: the vocabulary has a row for each of its tokens, and `MIN_VOCABULARY` at least.
        size: a key of `SIZES`.
        seed: of the weights.
    """
    # torch and transformers are imported late, so that the flags' names are known at once.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=max(MIN_VOCABULARY, len(tokenizer)),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=None,
        **SIZES[size],
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # Random logits are nearly flat; a trained model's spread is several nats. Sampling costs
        # more on flat ones, which no user draws from.
        model.model.norm.weight.data *= LOGIT_SPREAD / (
            config.hidden_size**0.5 * config.initializer_range
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
