# SPDX-License-Identifier: Apache-2.0
"""Compile for an NVIDIA card of a given capability what this project would launch on it.

The host's code runs as on a card, on tensors in memory; what it launches is compiled, and not run.
Prints each kernel, how often it was compiled, and the most shared memory that it takes.

A program of its own, because Triton either interprets or compiles for as long as it is imported.
"""

import sys
from collections import defaultdict
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from streaminator.engine.attention import LayerCall
from streaminator.engine.batch import pack
from streaminator.engine.gpu_layers import GpuLayer
from streaminator.engine.gpu_model import GpuModel
from streaminator.engine.gpu_products import GpuProduct
from streaminator.engine.gpu_sampling import GpuSampling
from streaminator.engine.kv_cache import KVCache, LayerShape
from streaminator.engine.llama_like import parts_of
from streaminator.engine.paged_trial import why_not_paged
from streaminator.sequence import Prompt, Sequence

BLOCK = 16
CPU = torch.device("cpu")
# A layer of Llama 3.2 3B; the vocabulary is another one's, for 128k take long on a CPU.
CONFIG = LlamaConfig(
    hidden_size=3072, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128, vocab_size=32000, tie_word_embeddings=True,
)  # fmt: skip
CALL = LayerCall(24, LayerShape(8, 128, 128), torch.bfloat16, None, None, None)
STEPS = ((64, 400, 0, 0), (64, 400, 4, 3), (3, 1500, 8, 1), (1, 20, 0, 0), (2, 1, 299, 0))
"""Sequences, tokens of each in the cache, drafts of each, and how many have a second choice."""


class Card:
    """What Triton asks of a driver, to compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return CPU


def sequences(num, num_cached, num_drafts, num_seconds):
    prompt = Prompt(prompt_id="", token_ids=(0,), text="", question="")
    blocks = [1] * -(-(num_cached + num_drafts + 1) // BLOCK)
    return [
        Sequence(
            prompt, 0, [0] * (num_cached + 1), 0, 0, 0.0,
            block_table=blocks, num_cached_tokens=num_cached, num_scheduled_tokens=1,
            draft=[0] * num_drafts, alternatives={0: 0} if index < num_seconds else {},
        )
        for index in range(num)
    ]  # fmt: skip


def run_model(dtype, steps):
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG).to(dtype)
    rotary = type(model.model.rotary_emb)(CONFIG)
    model = model.to_empty(device=CPU)
    model.model.rotary_emb = rotary
    model.tie_weights()
    call = replace(CALL, dtype=dtype)
    layers = [GpuLayer(layer, call, batch_invariant=True) for layer in model.model.layers]
    parts = parts_of(model, dtype)
    head = GpuProduct([parts.head], batch_invariant=True, most_splits=1)
    fused = GpuModel(parts, layers, head)
    cache = KVCache({0: CALL.shape}, num_blocks=2, block_size=BLOCK, dtype=dtype, device=CPU)
    for step in steps:
        for pads in (True, False):
            batch = pack(sequences(*step), block_size=BLOCK, device=CPU, pads=pads)
            fused(batch, cache)


def draw(dtype):
    logits, keys = torch.zeros(8, CONFIG.vocab_size, dtype=dtype), torch.arange(8)
    for temperature in (0.0, 0.8):
        for num_candidates, num_top in ((64, 8), (1, 0)):
            GpuSampling(dtype).sample(
                logits, keys, keys,
                temperature=temperature, num_candidates=num_candidates, num_top=num_top,
            )  # fmt: skip


@torch.inference_mode()
def main(capability: int) -> None:
    driver.set_active(Card(capability))
    shared, variants = defaultdict(int), defaultdict(set)

    def launcher(kernel, grid):
        def launch(*args, **options):
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            shared[kernel.__name__] = max(shared[kernel.__name__], compiled.metadata.shared)
            variants[kernel.__name__].add(compiled.hash)

        return launch

    JITFunction.__getitem__ = launcher
    run_model(torch.bfloat16, STEPS)
    run_model(torch.float32, STEPS[1:2])  # as layers are tried
    for dtype in (torch.bfloat16, torch.float16):
        draw(dtype)
    for call in (
        replace(CALL, num_heads=32, softcap=50.0, sliding_window=4096),
        replace(CALL, num_heads=8, shape=LayerShape(8, 80, 80), dtype=torch.float16),
        replace(CALL, num_heads=8, shape=LayerShape(4, 256, 256)),
        replace(CALL, num_heads=32, dtype=torch.float32),
    ):
        reason = why_not_paged([call], BLOCK, CPU) or ""
        assert "off by" in reason, reason  # nothing was computed
    for name in sorted(shared):
        sys.stdout.write(f"{name} {len(variants[name])} {shared[name]}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
