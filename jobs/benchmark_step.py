# SPDX-License-Identifier: Apache-2.0
"""What a step takes beside the time of reading the weights, keys and values, with all fast paths and without some.

    python -m jobs.inflate --model demo --like llama-3.2-3b --dtype bfloat16 --output FOLDER
    python -m jobs.benchmark_step --model_name FOLDER --stream_width 64 --context 400

Every sequence has `context` tokens, of which the newest is computed, and verifies a draft of `num_drafts`. Reading is counted
at the rate at which this machine copies. Medians of steps that were run in turn; sampling and packing
are in the step, not in the forward. Switches that others need take these with them, so each line says what
is left. All variants are loaded at once.

Used by: the command line.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from jobs.roofline import measure_machine, model_shape
from streaminator.cli import main_program
from streaminator.config import EngineConfig, ModelConfig, SamplingParams
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.sampler import sample, to_host
from streaminator.engine.step_clock import StepClock
from streaminator.engine.step_costs import made_up_sequences
from streaminator.errors import ConfigError

_PROGRAM = "python -m jobs.benchmark_step"
_SWITCHES = {
    "cuda": ("batch_invariant", "cuda_graphs", "compiled_kernels", "paged_attention"),
    "cpu": ("compiled_kernels", "packed_linear"),
}
_BLOCK_SIZE = 16
_WARM_UPS = 4
"""A shape is captured when it is met a second time, and replayed from the third."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A loaded model, and the keys that its steps read."""

    name: str
    runner: ModelRunner
    cache: KVCache


def main(argv: Sequence[str]) -> int:
    """Print a line per variant.

    Raises: ConfigError for settings that do not fit the model; what loading it raises.
    """
    parser = argparse.ArgumentParser(prog=_PROGRAM, description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--model_name", default="demo", help="hub name or folder")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stream_width", type=int, default=64, help="sequences")
    parser.add_argument("--context", type=int, default=400, help="tokens of each")
    parser.add_argument("--num_drafts", type=int, default=0, help="verified tokens of each")
    parser.add_argument("--num_steps", type=int, default=20, help="measured, of each variant")
    args = parser.parse_args(argv)
    for name, least in (("stream_width", 1), ("context", 1), ("num_drafts", 0), ("num_steps", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be {least} or more")
    config = ModelConfig(model_name=args.model_name, dtype=args.dtype, device=args.device)
    runner = ModelRunner(config)
    limit = runner.max_model_len
    if limit is not None and args.context + args.num_drafts > limit:
        raise ConfigError(f"--context {args.context}: the model's is {limit}; give less")
    reading = _seconds_of_reading(runner, args)
    variants = [_prepare("all", runner, args)]
    variants += [
        _prepare(f"--no_{switch}", ModelRunner(replace(config, **{switch: False})), args)
        for switch in _SWITCHES[runner.device.type]
    ]
    sys.stdout.write(f"{reading * 1e3:.2f} ms to read weights, keys and values once\n")
    sys.stdout.write(f"{'':22}    step ms  x reading  forward ms  x reading  what is fast\n")
    taken = _measure(variants, args)
    for variant in variants:
        step, forward = taken[variant.name]
        sys.stdout.write(
            f"{variant.name:22} {step * 1e3:10.3f} {step / reading:10.2f} "
            f"{forward * 1e3:11.3f} {forward / reading:10.2f}  {_what_is_fast(variant.runner)}\n"
        )
    return 0


def _prepare(name: str, runner: ModelRunner, args: argparse.Namespace) -> Variant:
    runner.pack_weights(_BLOCK_SIZE)
    length = args.context + 1 + args.num_drafts
    num_blocks = 1 + args.stream_width * -(-length // _BLOCK_SIZE)
    engine = EngineConfig(
        stream_width=args.stream_width, block_size=_BLOCK_SIZE, num_blocks=num_blocks
    )
    cache = runner.make_cache(engine, length)
    # The system gives no memory before it is written to.
    cache.clear(list(range(1, num_blocks)))
    return Variant(name, runner, cache)


def _what_is_fast(runner: ModelRunner) -> str:
    parts = {
        f"layers {runner.layers}": bool(runner.layers),
        "drawing": runner.sampling_kernels is not None,
        "paged attention": runner.is_paged,
    }
    return ", ".join(part for part, is_there in parts.items() if is_there) or "nothing"


def _seconds_of_reading(runner: ModelRunner, args: argparse.Namespace) -> float:
    shape = model_shape(runner)
    if shape is None:
        raise ConfigError(
            f"--model_name {args.model_name}: what a mixture of experts reads depends on its text; "
            "give another model"
        )
    num_bytes = shape.weight_bytes + args.stream_width * args.context * shape.kv_bytes
    return num_bytes / measure_machine(runner.device, runner.dtype).copy_rate


@torch.inference_mode()
def _measure(variants: list[Variant], args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Seconds of a step and of its forward, by variant."""
    times: dict[str, list[tuple[float, float]]] = {variant.name: [] for variant in variants}
    for step in range(_WARM_UPS + args.num_steps):
        for variant in variants:
            taken = _step(variant, args)
            if step >= _WARM_UPS:
                times[variant.name].append(taken)
    medians = {}
    for name, taken in times.items():
        steps, forwards = zip(*taken, strict=True)
        medians[name] = statistics.median(steps), statistics.median(forwards)
    return medians


def _step(variant: Variant, args: argparse.Namespace) -> tuple[float, float]:
    runner, cache = variant.runner, variant.cache
    num_tokens = args.stream_width * (1 + args.num_drafts)
    sequences = made_up_sequences(cache, num_tokens, args.stream_width, args.context)
    runner.synchronize()
    clock = StepClock(runner.device)
    batch = runner.pack(sequences, cache.block_size)
    clock.lap("pack")
    logits = runner.forward(batch, cache)
    clock.lap("forward")
    keys, positions = batch.noise_keys, batch.noise_positions
    to_host(sample(logits, keys, positions, SamplingParams(), 0, runner.sampling_kernels))
    clock.lap("sample")
    return clock.total, clock.seconds["seconds_forward"]


if __name__ == "__main__":
    sys.exit(main_program(_PROGRAM, main, advice=""))
