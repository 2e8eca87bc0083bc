# SPDX-License-Identifier: Apache-2.0
"""Measure what a step costs by its packed tokens, before the first one.

Used by: `engine.Engine`, for the draft budget.
"""

import time

import torch

from streaminator.config import SamplingParams
from streaminator.engine.batch import ROW_MULTIPLE, pack
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.sampler import sample
from streaminator.sequence import Prompt, Sequence
from streaminator.speculative.draft_budget import StepCosts

_CONTEXT = 128  # tokens before the measured ones; longer ones are learned while running
_MAX_TOKENS = 512
_SLOW = 1.0  # seconds of a step: wider ones are not tried
_REPEATS = 3


def measure_step_costs(
    runner: ModelRunner,
    cache: KVCache,
    sampling: SamplingParams,
    *,
    stream_width: int,
    max_draft: int,
    num_top: int,
) -> StepCosts:
    """Run steps of made-up tokens, each size a few times, in turn; the least time counts.

    The cache's blocks must not be in use yet.
    """
    most = stream_width * min(1 + max_draft, runner.max_model_len or _MAX_TOKENS)
    most = max(min(most, _MAX_TOKENS), min(most, 2 * stream_width))

    def step(num_tokens: int) -> float:
        return _step(runner, cache, sampling, num_tokens, stream_width, num_top)

    step(ROW_MULTIPLE)  # the first one of all allocates and compiles
    sizes, seconds = [], []
    size = ROW_MULTIPLE
    while not sizes or (sizes[-1] < most and (seconds[-1] < _SLOW or sizes[-1] < stream_width)):
        sizes.append(size)
        seconds.append(step(size))
        size *= 2
    # In rounds: while the machine is busy with something else, all sizes are slow, not one.
    for _ in range(_REPEATS - 1):
        for index, size in enumerate(sizes):
            if seconds[index] < _SLOW / 4:
                seconds[index] = min(seconds[index], step(size))
    return StepCosts(sizes, seconds, multiple=ROW_MULTIPLE)


def _step(
    runner: ModelRunner,
    cache: KVCache,
    sampling: SamplingParams,
    num_tokens: int,
    stream_width: int,
    num_top: int,
) -> float:
    width = min(stream_width, num_tokens)
    lengths = [num_tokens // width + (i < num_tokens % width) for i in range(width)]
    limit = (runner.max_model_len or _CONTEXT + _MAX_TOKENS) - max(lengths)
    context = max(min(_CONTEXT, limit), 1)
    # All share their blocks, and use them again where there are few: what is written is not read.
    num_blocks = -(-(context + max(lengths)) // cache.block_size)
    blocks = [1 + i % (cache.num_blocks - 1) for i in range(num_blocks)]
    prompt = Prompt(prompt_id="", token_ids=(0,) * context, text="", question="")
    sequences = [
        Sequence(
            prompt, 0, [0] * context, 0, 0, 0.0,
            block_table=blocks,
            num_cached_tokens=context - 1,
            num_scheduled_tokens=1,
            draft=[0] * (length - 1),
        )
        for length in lengths
    ]  # fmt: skip
    runner.synchronize()
    start = time.perf_counter()
    batch = pack(sequences, block_size=cache.block_size, device=runner.device)
    logits = runner.forward(batch, cache)
    with torch.inference_mode():
        keys, positions = batch.noise_keys, batch.noise_positions
        sample(logits, keys, positions, sampling, num_top, runner.kernels).tokens.cpu()
    return time.perf_counter() - start
