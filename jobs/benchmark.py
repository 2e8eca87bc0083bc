# SPDX-License-Identifier: Apache-2.0
"""The same prompts through this engine and through others, held against one another.

    python -m jobs.benchmark --model_name Qwen/Qwen2.5-0.5B-Instruct --num_samples 32
    python -m jobs.benchmark --engines plain,memory,vllm,vllm-suffix --widths 4,16,64

- plain: this engine without speculation; speculative: with it, as configured; ngram, memory: with
  that speculator; plain-siblings, memory-siblings: with `--in_flight_per_prompt auto`.
- transformers: `generate` with its own cache and sdpa attention, on left-padded batches of
  `--stream_width` rows, all completions of a prompt after one another; transformers-batch:
  `generate_batch`.
- vllm, vllm-ngram, vllm-suffix: vLLM in an environment of its own (`make bench-peers`).
- a program's .py file: any other that speaks `jobs.engines.protocol`.

Each engine is a process of its own. All get token ids and give token ids; loading, tokenization
and an engine's construction are not timed. Runs are interleaved, and a ratio is the median over
repeats of the ratios within one. What an engine drew is held against the model
(`jobs.benchmark_check`); one that is wrong has no ratio. Ratios in the table are to the fastest
correct engine of others, or to plain. Exit code 1: one of this engine's modes is wrong, or
speculation changed a token in float32 or float64 on a CPU.

With `--widths 1,4,16` the comparison is made at each of these stream widths; with fewer prompts than
slots (`--num_samples`), strict affinity leaves slots empty. The output ends with a line of JSON for
each width.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmark_measure import Measured, measure
from jobs.benchmark_report import overview, summarize, table
from jobs.engines.protocol import Draw, Load
from jobs.engines.registry import DEFAULT, OWN, find_programs
from jobs.json_out import check_json_out, write_json_out
from jobs.random_model import SIZES, save_random_llama
from jobs.study_output import versions, width_of, with_width
from streaminator.cli import main_program, resolve
from streaminator.cli_args import parse
from streaminator.config import JobConfig
from streaminator.errors import ConfigError, InputError
from streaminator.run_record import cpu_model

# torch and transformers are imported late, so that --help and typos are answered at once.
if TYPE_CHECKING:
    from jobs.benchmark_check import Checker, Verdict
    from jobs.roofline import Machine, Roofline, Shape
    from streaminator.engine.model_runner import ModelRunner
    from streaminator.sequence import Prompt


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    config, other = parse(argv, program="python -m jobs.benchmark", without=["cluster"], extra=_add)
    _check(config, other)
    names = [n for n in other.engines if not (other.no_transformers and n == "transformers")]
    programs, missing = find_programs(names)
    if other.random_model != "none":
        # Random weights hardly ever end a text: all lengths are --max_length.
        config = replace(config, sampling=replace(config.sampling, ignore_eos=True))
    config = resolve(with_width(config))
    if other.dry_run:
        own = {name: vars(other)[name] for name in ("repeats", "random_model", "json_out")}
        print(json.dumps({**config.flat(), **own, "engines": names}, indent=2))
        return 0
    for name, reason in missing.items():
        sys.stderr.write(f"{name} is left out: {reason}\n")
    from jobs.roofline import measure_machine, model_shape
    from streaminator.data.prompts import load_prompts
    from streaminator.engine.checkpoint import load_tokenizer
    from streaminator.engine.model_runner import ModelRunner

    tokenizer = load_tokenizer(config.model)
    widths = other.widths or [width_of(config)]
    prompts = list(load_prompts(config.data, tokenizer))
    results, named = [], config.model
    with tempfile.TemporaryDirectory(prefix="streaminator-benchmark-") as folder:
        if other.random_model != "none":
            save_random_llama(Path(folder), tokenizer, other.random_model)
            named = replace(named, model_name=folder, tokenizer_name=None)
        runner = ModelRunner(named)
        _check_lengths(prompts, config, runner)
        told = _describe(config, other, runner)
        machine, shape = measure_machine(runner.device, runner.dtype), model_shape(runner)
        load = _load(config, runner, prompts)
        del runner  # the engines need the memory
        checker = _make_checker(config, load)
        draw = _draw(config, prompts)
        for width in widths:
            measured = measure(
                programs, replace(load, stream_width=width), draw, repeats=other.repeats
            )
            measured.failed |= missing
            result = told | _describe_work(config, prompts, width)
            result |= _result(config, measured, draw, checker, machine, shape, width)
            results.append(result)
            print(table(result), end="\n\n", flush=True)
    if len(results) > 1:
        print(overview(results), end="\n\n")
    lines = [json.dumps(result, separators=(",", ":")) for result in results]
    print(*lines, sep="\n", flush=True)
    write_json_out(other.json_out, "\n".join(lines))
    return _exit_code(config, results)


def _exit_code(config: JobConfig, results: Sequence[dict[str, Any]]) -> int:
    is_exact = config.model.device == "cpu" and config.model.dtype in ("float32", "float64")
    for result in results:
        own = [name for name in result["engines"] if name in OWN]
        differing = result["outputs"]["differing"]
        if is_exact and any(differing[name] for name in own):
            sys.stderr.write(
                "python -m jobs.benchmark: speculation changed tokens; this is a bug\n"
            )
            return 1
        wrong = [name for name in own if not result["engines"][name]["check"]["is_correct"]]
        if wrong:
            sys.stderr.write(
                f"python -m jobs.benchmark: {', '.join(wrong)} drew what the model does not say; "
                "this is a bug\n"
            )
            return 1
    return 0


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3, help="runs of each engine (default: 3)")
    parser.add_argument(
        "--engines",
        type=lambda text: list(dict.fromkeys(text.split(","))),
        default=list(DEFAULT),
        metavar="NAMES",
        help=f"what to compare, with commas (default: {','.join(DEFAULT)}); see the module's text",
    )
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
        help="stream widths to compare at, with commas (default: --stream_width, or 16)",
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


def _load(config: JobConfig, runner: "ModelRunner", prompts: Sequence["Prompt"]) -> Load:
    ends = set() if config.sampling.ignore_eos else runner.eos_token_ids
    return Load(
        engine="",
        model=runner.model.name_or_path,
        dtype=config.model.dtype,
        device=str(runner.device),
        num_threads=_num_threads(),
        stream_width=width_of(config),
        max_prompt_length=max(len(prompt.token_ids) for prompt in prompts),
        end_token_ids=tuple(sorted(ends | set(config.sampling.stop_token_ids))),
        settings=config.flat(),
    )


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()


def _draw(config: JobConfig, prompts: Sequence["Prompt"]) -> Draw:
    return Draw(
        prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
        prompts=tuple(prompt.token_ids for prompt in prompts),
        num_completions=config.data.num_completions,
        max_length=config.sampling.max_length,
        seed=config.sampling.seed,
    )


def _make_checker(config: JobConfig, load: Load) -> "Checker":
    """With the weights as the engines have them, computed in float32 at least."""
    import torch

    from jobs.benchmark_check import Checker
    from streaminator.engine.checkpoint import load_model

    dtype = getattr(torch, config.model.dtype)
    named = replace(config.model, model_name=load.model)
    model: Any = load_model(named, dtype, "sdpa").to(max(dtype, torch.float32, key=_width))
    model.to(load.device).eval()
    return Checker(model, config.sampling, load.end_token_ids, config.model.dtype)


def _width(dtype: Any) -> int:
    return dtype.itemsize


def _result(
    config: JobConfig,
    measured: Measured,
    draw: Draw,
    checker: "Checker",
    machine: "Machine",
    shape: "Shape | None",
    width: int,
) -> dict[str, Any]:
    from jobs.roofline import roofline

    verdicts: dict[str, Verdict] = {}
    rooflines: dict[str, Roofline | None] = {}
    for name, runs in measured.runs.items():
        verdicts[name] = checker.check(draw, runs)
        middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        rooflines[name] = roofline(middle, shape, machine) if shape else None
    is_greedy = config.sampling.temperature == 0
    return summarize(
        measured, verdicts, rooflines, machine, stream_width=width, is_greedy=is_greedy
    )


def _describe(
    config: JobConfig, other: argparse.Namespace, runner: "ModelRunner"
) -> dict[str, Any]:
    """What was measured, and on what."""
    is_random = other.random_model != "none"
    return {
        "model": f"random-llama-{other.random_model}" if is_random else config.model.model_name,
        "model_type": runner.model.config.model_type,
        "num_parameters": runner.num_parameters,
        "dtype": config.model.dtype,
        "device": str(runner.device),
        "cpu": cpu_model(),
        "gpu": runner.device_name if runner.device.type == "cuda" else None,
        "num_threads": _num_threads(),
        "mkl_cbwr": os.environ.get("MKL_CBWR"),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "versions": versions(),
        "repeats": other.repeats,
        "settings": config.flat() | {"random_model": other.random_model},
    }


def _describe_work(config: JobConfig, prompts: Sequence["Prompt"], width: int) -> dict[str, Any]:
    return {
        "stream_width": width,
        "num_prompts": len(prompts),
        "num_completions": config.data.num_completions,
        "mean_prompt_length": sum(len(p.token_ids) for p in prompts) / len(prompts),
    }


if __name__ == "__main__":
    sys.exit(main_program("python -m jobs.benchmark", main, advice=""))
