# SPDX-License-Identifier: Apache-2.0
"""The same prompts through this engine, without and with speculation, and through transformers.

    python -m jobs.benchmark --model_name Qwen/Qwen2.5-0.5B-Instruct --num_samples 32

- plain: this engine without speculation; speculative: with it, as configured.
- transformers: `generate` with its own cache and sdpa attention, on left-padded batches of
  `--stream_width` rows, all completions of a prompt after one another.

All three get token ids and give token ids; loading, tokenization and the engine's construction
are not timed. Runs are interleaved, and a ratio is the median over repeats of the ratios within
one. Exit code 1: speculation changed a token.

With `--widths 1,4,16` the comparison is made at each of these stream widths, with at least as many
prompts as slots. The output ends with a line of JSON for each width.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.json_out import check_json_out, write_json_out
from jobs.random_model import SIZES, save_random_llama
from streaminator.cli import main_program, resolve
from streaminator.cli_args import parse
from streaminator.config import JobConfig
from streaminator.errors import ConfigError, InputError
from streaminator.run_record import cpu_model

# torch and transformers are imported late, so that --help and typos are answered at once.
if TYPE_CHECKING:
    from jobs.benchmark_engines import Run
    from streaminator.engine.model_runner import ModelRunner
    from streaminator.sequence import Prompt

_RATIOS = (("speculative", "plain"), ("plain", "transformers"), ("speculative", "transformers"))


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    config, other = parse(argv, program="python -m jobs.benchmark", without=["cluster"], extra=_add)
    _check(config, other)
    if other.random_model != "none":
        # Random weights hardly ever end a text: all lengths are --max_length.
        config = replace(config, sampling=replace(config.sampling, ignore_eos=True))
    config = resolve(config)
    if other.dry_run:
        own = {name: vars(other)[name] for name in ("repeats", "random_model", "json_out")}
        print(json.dumps({**config.flat(), **own}, indent=2))
        return 0
    from jobs.benchmark_engines import load_transformers, measure
    from streaminator.data.prompts import load_prompts
    from streaminator.engine.checkpoint import load_tokenizer
    from streaminator.engine.model_runner import ModelRunner

    tokenizer = load_tokenizer(config.model)
    widths = other.widths or [config.engine.stream_width]
    num = config.data.num_samples
    data = replace(config.data, num_samples=None if num is None else max(num, *widths, 1))
    prompts = list(load_prompts(data, tokenizer))
    with tempfile.TemporaryDirectory(prefix="streaminator-benchmark-") as folder:
        model_config = config.model
        if other.random_model != "none":
            save_random_llama(Path(folder), tokenizer, other.random_model)
            model_config = replace(model_config, model_name=folder, tokenizer_name=None)
        runner = ModelRunner(model_config)
        _check_lengths(prompts, config, runner)
        model = None if other.no_transformers else load_transformers(config, runner)
    results = []
    for width in widths:
        at_width = replace(config, engine=replace(config.engine, stream_width=width))
        some = prompts if num is None else prompts[: max(num, width)]
        runs = measure(at_width, runner, model, some, repeats=other.repeats)
        results.append(_describe(at_width, other, runner, some) | _summarize(at_width, runs))
        print(_table(results[-1]), end="\n\n", flush=True)
    lines = [json.dumps(result, separators=(",", ":")) for result in results]
    print(*lines, sep="\n", flush=True)
    write_json_out(other.json_out, "\n".join(lines))
    if any(result["outputs"].get("speculative_differs") for result in results):
        sys.stderr.write("python -m jobs.benchmark: speculation changed tokens; this is a bug\n")
        return 1
    return 0


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3, help="runs of each engine (default: 3)")
    parser.add_argument(
        "--random_model",
        choices=("none", *SIZES),
        default="none",
        help="random weights of this size with the model's tokenizer; implies --ignore_eos",
    )
    parser.add_argument(
        "--no_transformers", action="store_true", help="leave transformers' generate out"
    )
    parser.add_argument(
        "--widths",
        type=_parse_widths,
        metavar="NUMBERS",
        help="stream widths to compare at, with commas (default: --stream_width)",
    )
    parser.add_argument("--json_out", metavar="FILE", help="file to write the last line to, too")


def _parse_widths(text: str) -> list[int]:
    try:
        widths = [int(width) for width in text.split(",")]
    except ValueError:
        widths = [0]
    if min(widths) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers from 1, with commas, not {text!r}")
    return widths


def _check(config: JobConfig, other: argparse.Namespace) -> None:
    if other.repeats < 1:
        raise ConfigError(f"--repeats {other.repeats}: must be 1 or more")
    if not config.speculator.spec_decoding:
        raise ConfigError("--no_spec_decoding: the benchmark always runs without and with it")
    if config.sampling.stop:
        raise ConfigError("--stop: the benchmark compares tokens, not text; use --stop_token_ids")
    check_json_out(other.json_out)


def _check_lengths(prompts: Sequence["Prompt"], config: JobConfig, runner: "ModelRunner") -> None:
    """Raises: InputError when an engine would cut or refuse what the other draws."""
    limit = runner.max_model_len
    for prompt in prompts:
        num = len(prompt.token_ids)
        if limit is not None and num + config.sampling.max_length > limit:
            raise InputError(
                f"prompt {prompt.prompt_id}: {num} tokens and --max_length "
                f"{config.sampling.max_length} exceed the model's context of {limit}"
            )
        if max(prompt.token_ids) >= runner.vocab_size:
            raise InputError(f"prompt {prompt.prompt_id}: tokens beyond the model's vocabulary")


def _describe(
    config: JobConfig, other: argparse.Namespace, runner: "ModelRunner", prompts: Sequence["Prompt"]
) -> dict[str, Any]:
    """What was measured, and on what."""
    import torch

    is_random = other.random_model != "none"
    gpu = torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else None
    return {
        "model": f"random-llama-{other.random_model}" if is_random else config.model.model_name,
        "model_type": runner.model.config.model_type,
        "num_parameters": sum(p.numel() for p in runner.model.parameters()),
        "dtype": config.model.dtype,
        "device": str(runner.device),
        "cpu": cpu_model(),
        "gpu": gpu,
        "num_threads": torch.get_num_threads(),
        "mkl_cbwr": os.environ.get("MKL_CBWR"),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
        },
        "stream_width": config.engine.stream_width,
        "num_prompts": len(prompts),
        "num_completions": config.data.num_completions,
        "mean_prompt_length": sum(len(p.token_ids) for p in prompts) / len(prompts),
        "repeats": other.repeats,
        "settings": config.flat() | {"random_model": other.random_model},
    }


def _summarize(config: JobConfig, runs: dict[str, list["Run"]]) -> dict[str, Any]:
    """Speeds, ratios and the comparison of the outputs."""
    ratios = {}
    for above, below in _RATIOS:
        if not {above, below} <= set(runs):
            continue
        pairs = zip(runs[above], runs[below], strict=True)
        values = [a.speed / b.speed for a, b in pairs]
        ratios[f"{above}/{below}"] = {"median": statistics.median(values), "values": values}
    reference = runs["plain"][0].outputs
    differing = {
        name: max(sum(run.outputs.get(key) != reference[key] for key in reference) for run in own)
        for name, own in runs.items()
    }
    is_greedy = config.sampling.temperature == 0
    return {
        "engines": {
            name: _summarize_engine(own, config.engine.stream_width) for name, own in runs.items()
        },
        "ratios": ratios,
        "outputs": {
            "num_completions": len(reference),
            "speculative_differs": max(differing["plain"], differing["speculative"]),
            "transformers_differs": differing.get("transformers") if is_greedy else None,
        },
    }


def _summarize_engine(runs: list["Run"], stream_width: int) -> dict[str, Any]:
    def total(count: Callable[["Run"], float]) -> float:
        return sum(map(count, runs))

    seconds = total(lambda run: run.seconds)
    num_tokens = total(lambda run: run.num_tokens)
    num_steps = total(lambda run: run.num_steps)
    num_rows = total(lambda run: run.num_rows)
    num_busy = total(lambda run: run.num_busy_slots)
    num_drafted = total(lambda run: run.num_drafted)
    phases = {name: total(lambda run, n=name: run.phases[n]) / seconds for name in runs[0].phases}
    return {
        "tokens_per_second": statistics.median(run.speed for run in runs),
        "runs": [
            {"tokens_per_second": r.speed, "seconds": r.seconds, "num_tokens": r.num_tokens}
            for r in runs
        ],
        "tokens_per_step": num_tokens / num_steps,
        "acceptance_rate": total(lambda r: r.num_accepted) / num_drafted if num_drafted else None,
        "occupancy": num_busy / (num_steps * stream_width),
        "padded_waste": 1 - num_busy / num_rows,
        # Only this engine counts its phases.
        "phases": phases | {"other": 1 - sum(phases.values())} if any(phases.values()) else None,
    }


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}: {result['num_parameters'] / 1e6:.1f}M parameters, {result['dtype']}, "
        f"{result['gpu'] or result['cpu']}, {result['num_threads']} threads",
        f"{result['num_prompts']} prompts of {result['mean_prompt_length']:.0f} tokens x "
        f"{result['num_completions']} completions, stream width {result['stream_width']}, "
        f"max length {result['settings']['max_length']}, "
        f"temperature {result['settings']['temperature']}, {result['repeats']} repeats",
        "",
        f"{'':14}{'tokens/s':>10}{'tokens/step':>13}{'accepted':>10}{'occupancy':>11}"
        f"{'padded waste':>14}",
    ]
    for name, engine in result["engines"].items():
        lines.append(
            f"{name:14}{engine['tokens_per_second']:10.1f}{engine['tokens_per_step']:13.2f}"
            f"{_percent(engine['acceptance_rate']):>10}{_percent(engine['occupancy']):>11}"
            f"{_percent(engine['padded_waste']):>14}"
        )
    lines += ["", "Ratios of tokens per second, median over repeats (least to most)"]
    for name, ratio in result["ratios"].items():
        values = ratio["values"]
        lines.append(f"{name:28}{ratio['median']:7.2f}  ({min(values):.2f} to {max(values):.2f})")
    phases = {name: e["phases"] for name, e in result["engines"].items() if e["phases"]}
    lines += ["", f"{'Share of time':14}" + "".join(f"{n:>10}" for n in phases["plain"])]
    for name, shares in phases.items():
        lines.append(f"{name:14}" + "".join(f"{_percent(share):>10}" for share in shares.values()))
    outputs = result["outputs"]
    lines += ["", f"Completions: {outputs['num_completions']}, of which differ from plain's"]
    lines.append(f"speculative   {outputs['speculative_differs']}")
    if outputs["transformers_differs"] is not None:
        lines.append(f"transformers  {outputs['transformers_differs']} (greedy; ties may round)")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    sys.exit(main_program("python -m jobs.benchmark", main, advice=""))
