# SPDX-License-Identifier: Apache-2.0
"""Measure what a step costs by its packed tokens, before the first one.

Used by: `engine.Engine`, for the draft budget; `engine.stream_width`; `jobs.benchmark_step`.
"""

import math
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch

from streaminator.config import EngineConfig, SamplingParams
from streaminator.engine.batch import ROW_MULTIPLE
from streaminator.engine.kv_cache import KVCache, bytes_per_block
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.sampler import sample
from streaminator.sequence import Prompt, Sequence
from streaminator.speculative.draft_budget import StepCosts

_CONTEXT = (
    128  # tokens before the measured ones where none are given; others are learned while running
)
_MAX_TOKENS = 512
_MOST_KEYS = 256 << 20  # bytes of keys and values to read: more than a processor's caches hold
_SLOW = 1.0  # seconds of a step: wider ones are not tried
_REPEATS = 3
_MOST_REPEATS = 10
_MOST_UNUSUAL = 2  # steps of a shape, on a GPU: as they are, then captured; from then on replayed
_QUIET = 0.5  # seconds for which quick steps are repeated
_NEAR = 1 / 8  # of a full stream: closer sizes are not told apart
_RISES = (
    1.25  # by which twice the width must have raised tokens per second for a slow one to be tried
)


@dataclass(frozen=True, slots=True)
class PlainSteps:
    """What steps without drafts cost."""

    context: int
    """Tokens of each sequence."""
    seconds: dict[int, float]
    """By stream width."""


def measure_step_costs(
    runner: ModelRunner,
    config: EngineConfig,
    sampling: SamplingParams,
    *,
    stream_width: int,
    max_draft: int,
    num_top: int,
    plain: PlainSteps | None = None,
) -> StepCosts:
    """Run steps of made-up tokens, each size a few times, in turn; the least time counts.

    What `plain` tells is not measured again.
    """
    known = {n: s for n, s in plain.seconds.items() if n <= stream_width} if plain else {}
    context = plain.context if plain else _CONTEXT
    most = stream_width * min(1 + max_draft, runner.max_model_len or _MAX_TOKENS)
    most = max(min(most, _MAX_TOKENS), min(most, 2 * stream_width))
    cache = _make_cache(runner, config, stream_width, context)

    def step(num_tokens: int) -> float:
        return _step(runner, cache, sampling, num_tokens, stream_width, num_top, context)

    multiple = size = runner.rows_at_once
    if not known:
        step(size)  # the first one of all allocates and compiles
    seconds: dict[int, float] = {}
    last = 0.0
    while not seconds or (
        (len(seconds) < 2 or size < 2 * most) and (last < _SLOW or size < 2 * stream_width)
    ):
        taken = known.get(size) or _try(step, size, is_needed=not seconds)
        if taken is None:
            break
        last = seconds[size] = taken
        size *= 2
    _repeat(step, seconds, _REPEATS - 1, without=known)
    full = -(-stream_width // multiple) * multiple
    _measure_first_drafts(step, seconds, full, multiple, known)
    sizes = sorted(seconds)
    return StepCosts(sizes, [seconds[size] for size in sizes], multiple=multiple)


def _measure_first_drafts(
    step: Callable[[int], float],
    seconds: dict[int, float],
    full: int,
    multiple: int,
    known: Container[int],
) -> None:
    """Add what a full stream's steps with a few drafts take, where steps are quick.

    A draft's price is the difference of two sizes. The first ones may fill rows that are computed
    anyway; in wide streams they do not, and the difference of close sizes is mostly noise.
    """
    near = [full + num * multiple for num in (1, 2, 4)]
    near = [size for size in near if size - full >= _NEAR * full and size < max(seconds)]
    if not near:
        return
    taken = {near[-1]: step(near[-1])}
    if taken[near[-1]] >= _SLOW / 4:
        return
    taken |= {size: step(size) for size in (full, *near[:-1]) if size not in known}
    rounds = int(_QUIET / sum(taken.values()))
    _repeat(step, taken, min(max(rounds, _REPEATS - 1), _MOST_REPEATS))
    for size, least in taken.items():
        seconds[size] = min(least, seconds.get(size, least))


def measure_widths(
    runner: ModelRunner,
    config: EngineConfig,
    sampling: SamplingParams,
    *,
    most: int,
    context: int,
    num_top: int,
) -> PlainSteps:
    """Run steps without drafts of streams that are 8, 16, 32 ... and `most` wide.

    No wider one is tried after one that is slow and hardly brings more tokens per second, or where
    memory runs out.
    """
    cache = _make_cache(runner, config, most, context)

    def step(width: int) -> float:
        return _step(runner, cache, sampling, width, width, num_top, context)

    step(ROW_MULTIPLE)
    seconds: dict[int, float] = {}
    width, speed = min(ROW_MULTIPLE, most), 0.0
    while True:
        taken = _try(step, width, is_needed=not seconds)
        if taken is None:
            break
        seconds[width] = taken
        before, speed = speed, width / taken
        if width == most or (taken >= _SLOW and speed < _RISES * before):
            break
        width = min(2 * width, most)
    # Among quick steps a disturbed one is more often the quickest of three.
    rounds = int(_QUIET / sum(seconds.values()))
    _repeat(step, seconds, min(max(rounds, _REPEATS - 1), _MOST_REPEATS))
    return PlainSteps(context, seconds)


def _make_cache(
    runner: ModelRunner, config: EngineConfig, stream_width: int, context: int
) -> KVCache:
    """Blocks for made-up steps to read: of a full stream, or as many as no processor's caches hold."""
    per_block = bytes_per_block(runner.shapes, config.block_size, runner.dtype)
    per_sequence = 1 + -(-context // config.block_size)
    room = runner.num_fitting(config, config.block_size)  # in blocks
    num = max(min(stream_width * per_sequence, room, _MOST_KEYS // per_block), 1)
    cache = runner.make_cache(replace(config, num_blocks=1 + num, kv_memory=None), context)
    # The system gives no memory before it is written to.
    cache.clear(list(range(1, 1 + num)))
    return cache


def _try(step: Callable[[int], float], size: int, *, is_needed: bool) -> float | None:
    """Seconds of a step; None where memory runs out, unless it is needed."""
    try:
        return step(size)
    except torch.OutOfMemoryError:
        if is_needed:
            raise
    # Outside of the handler, whose traceback would keep the tensors of the failed step.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _repeat(
    step: Callable[[int], float],
    seconds: dict[int, float],
    rounds: int,
    without: Container[int] = (),
) -> None:
    """Keep the least time of each size that is quick."""
    # In rounds: while the machine is busy with something else, all sizes are slow, not one.
    for _ in range(rounds):
        for size, taken in seconds.items():
            if taken < _SLOW / 4 and size not in without:
                seconds[size] = min(taken, step(size))


def made_up_sequences(
    cache: KVCache, num_tokens: int, stream_width: int, context: int
) -> list[Sequence]:
    """What a step is to compute, where nothing depends on the text.

    Args:
        cache: each sequence has blocks of its own, as far as there are; what is written to them is
            not read.
        num_tokens: of the step; what is more than one of each sequence is drafts.
        stream_width: sequences at most.
        context: tokens of each, of which the newest is to be computed.
    """
    width = min(stream_width, num_tokens)
    lengths = [num_tokens // width + (i < num_tokens % width) for i in range(width)]
    num_blocks = -(-(context + max(lengths)) // cache.block_size)
    blocks = cycle(range(1, cache.num_blocks))
    tables = [list(islice(blocks, num_blocks)) for _ in lengths]
    prompt = Prompt(prompt_id="", token_ids=(0,) * context, text="", question="")
    return [
        Sequence(
            prompt, 0, [0] * context, 0, 0, 0.0,
            block_table=table,
            num_cached_tokens=context - 1,
            num_scheduled_tokens=1,
            draft=[0] * (length - 1),
        )
        for table, length in zip(tables, lengths, strict=True)
    ]  # fmt: skip


@torch.inference_mode()
def _step(
    runner: ModelRunner,
    cache: KVCache,
    sampling: SamplingParams,
    num_tokens: int,
    stream_width: int,
    num_top: int,
    context: int,
) -> float:
    limit = (runner.max_model_len or context + _MAX_TOKENS) - -(-num_tokens // stream_width)
    context = max(min(context, limit), 1)
    sequences = made_up_sequences(cache, num_tokens, stream_width, context)
    seconds = math.inf
    for _ in range(_MOST_UNUSUAL + 1):
        runner.synchronize()
        start = time.perf_counter()
        batch = runner.pack(sequences, cache.block_size)
        logits = runner.forward(batch, cache)
        keys, positions = batch.noise_keys, batch.noise_positions
        sample(logits, keys, positions, sampling, num_top, runner.sampling_kernels).tokens.cpu()
        seconds = time.perf_counter() - start
        if runner.was_usual:
            break
    return seconds
