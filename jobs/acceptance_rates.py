# SPDX-License-Identifier: Apache-2.0
"""How much of what is drafted the model accepts, by generation and by what the drafts are made of.

    python -m jobs.acceptance_rates --stream_width 32

The figure of the original Streaminator (a bigram per prompt, one drafted token, trained on the
prompt, on the prompt's earlier completions, or on both), measured on the live stream, and beside it
the memory, whole and without one of its parts, and the memory started from completions that were
drawn with another seed. Every variant draws the same completions; exit code 1: one did not.

k = 1: accepted drafts per slot-step where at most one token is drafted. Verifying is taken to cost
nothing: the memory drafts all but the hopeless, so that the result does not depend on the machine.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.acceptance_report import COUNTS, draw_figure, summarize, write_table
from jobs.study_output import describe, open_study, with_width, write_study
from streaminator.cli import main_program, resolve
from streaminator.cli_args import parse
from streaminator.config import JobConfig, SamplingParams, SpeculatorConfig
from streaminator.errors import ConfigError, InputError

# torch and transformers are imported late, so that --help and typos are answered at once.
if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from transformers import PreTrainedTokenizerBase

    from streaminator.engine.model_runner import ModelRunner
    from streaminator.sequence import Prompt

_PROGRAM = "python -m jobs.acceptance_rates"
_NUM_PROMPTS = 128
_MAX_DRAFT = 8
_TEMPERATURES = "0.8,1.0"

_BIGRAM: dict[str, Any] = {"speculator": "ngram", "ngram_order": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "bigram, prompt": _BIGRAM | {"generation_training": False},
    "bigram, generations": _BIGRAM | {"prompt_training": False},
    "bigram, prompt + generations": _BIGRAM,
    "memory": {},
    "memory, no shared tier": {"shared_memory": False},
    "memory, no noise": {"draft_noise": False},
    "memory, no distributions": {"num_top_tokens": 0},
    "memory, neither": {"num_top_tokens": 0, "draft_noise": False},
    "memory, warm start": {},
}
"""What each variant changes in the speculator's settings."""
_ONE_TOKEN = ("bigram, prompt", "bigram, generations", "memory, neither")
"""Variants that are measured with one drafted token only."""


@dataclass(slots=True)
class Run:
    """All completions drawn once."""

    temperature: float
    variant: str
    max_draft: int
    counts: NDArray[np.int64]
    """[generations, COUNTS]"""
    outputs: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    """Token ids by (prompt_id, sample_index)."""


def main(argv: Sequence[str]) -> int:
    """Run the study; returns the exit code."""
    config, other = parse(argv, program=_PROGRAM, without=["cluster"], extra=_add)
    samplings = _samplings(config, other)
    _check(config)
    config = resolve(with_width(config))
    if other.dry_run:
        temperatures = [sampling.temperature for sampling in samplings]
        print(json.dumps({**config.flat(), "temperatures": temperatures}, indent=2))
        return 0
    from streaminator.engine.checkpoint import load_tokenizer
    from streaminator.engine.model_runner import ModelRunner

    filesystem, stem = open_study(config, "acceptance_rates")
    tokenizer = load_tokenizer(config.model)
    prompts = _load_prompts(config, tokenizer)
    runner = ModelRunner(config.model)
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    differing: dict[float, int] = {}
    result: dict[str, Any] = {}
    for sampling in samplings:
        own = replace(config, sampling=sampling)
        runs, differing[sampling.temperature] = _study(own, runner, tokenizer, prompts)
        rows += _rows(runs)
        result = _describe(config, runner, prompts) | {
            "seconds": round(time.monotonic() - start),
            "num_differing": {str(key): num for key, num in differing.items()},
            "temperatures": summarize(rows),
        }
        # One temperature's results are worth having where the next one's never come.
        _write(filesystem, stem, result, rows)
    print(f"{write_table(result)}\nWritten: {stem}.md, .json, .parquet, .png", flush=True)
    for temperature, num in differing.items():
        if num:
            sys.stderr.write(
                f"{_PROGRAM}: temperature {temperature}: {num} of "
                f"{len(prompts) * config.data.num_completions} completions differ between "
                "variants; in float32 on a CPU this is a bug\n"
            )
    return 1 if any(differing.values()) else 0


def _write(
    filesystem: "FileSystem", stem: str, result: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> None:
    """Raises: OutputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    pq.write_table(pa.table(columns), sink, compression="zstd")
    files = {
        "md": write_table(result).encode(),
        "json": (json.dumps(result, indent=1) + "\n").encode(),
        "parquet": sink.getvalue(),
        "png": draw_figure(result),
    }
    write_study(filesystem, stem, files)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperatures",
        help=f"temperatures to study, like {_TEMPERATURES} (the default; or what --temperature says)",
    )


def _samplings(config: JobConfig, other: argparse.Namespace) -> list[SamplingParams]:
    if other.temperatures is None:
        given = config.sampling.temperature
        if other.temperature is not None or given != SamplingParams().temperature:
            return [config.sampling]
    elif other.temperature is not None:
        raise ConfigError("--temperature with --temperatures: give one of them")
    text = other.temperatures or _TEMPERATURES
    try:
        temperatures = dict.fromkeys(float(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--temperatures {text}: must be numbers with commas between, like {_TEMPERATURES}"
        ) from None
    return [replace(config.sampling, temperature=value) for value in temperatures]


def _check(config: JobConfig) -> None:
    default = SpeculatorConfig()
    for name in _varied():
        value = getattr(config.speculator, name)
        if value != getattr(default, name):
            flag = f"no_{name}" if value is False else name
            raise ConfigError(f"--{flag}: the study varies it itself; leave it out")
    num = config.speculator.num_speculative_tokens
    if num is not None and num < 2:
        raise ConfigError(f"--num_speculative_tokens {num}: must be 2 or more; 1 is drawn anyway")


def _varied() -> list[str]:
    """Settings that are the study's own."""
    return ["spec_decoding", *{name: None for own in VARIANTS.values() for name in own}]


def _load_prompts(config: JobConfig, tokenizer: "PreTrainedTokenizerBase") -> list["Prompt"]:
    from streaminator.data.prompts import load_prompts

    num = config.data.num_samples or _NUM_PROMPTS
    data = replace(config.data, num_samples=num)
    if data.dataset != "demo":
        return list(load_prompts(data, tokenizer))
    with tempfile.TemporaryDirectory(prefix="streaminator-acceptance-") as folder:
        path = Path(folder) / "demo.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in demo_problems(num)))
        return list(load_prompts(replace(data, dataset=str(path)), tokenizer))


def demo_problems(num: int) -> list[dict[str, str]]:
    """The bundled held-out problems, and as many more as asked that the demo model never saw."""
    from jobs.train_demo_model import parse_arguments
    from jobs.word_problems import generate, split

    trained = parse_arguments([])
    num_trained = trained.steps * trained.batch_size
    training, problems = split(num_trained, trained.held_out, trained.seed)
    if num > len(problems):
        seen = {problem["question"] for problem in [*training, *problems]}
        more = (p for p in generate(10 * num, trained.seed + 1) if p["question"] not in seen)
        problems += islice(more, num - len(problems))
    return problems[:num]


def _longest(config: JobConfig) -> int:
    return config.speculator.num_speculative_tokens or _MAX_DRAFT


def _study(
    config: JobConfig,
    runner: "ModelRunner",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence["Prompt"],
) -> tuple[list[Run], int]:
    """All variants at one temperature, and how many completions differ between them."""
    longest = _longest(config)
    sampling = config.sampling
    other = replace(sampling, seed=(sampling.seed + 1) % 2**63)
    before = _run(replace(config, sampling=other), runner, tokenizer, prompts, "memory", longest)
    warm = []
    for prompt in prompts:
        own = [before.outputs[prompt.prompt_id, index] for index in prompt.sample_indices]
        warm.append(replace(prompt, finished=tuple(own)))
    runs: list[Run] = []
    expected: dict[tuple[str, int], tuple[int, ...]] = {}
    differing = set()
    for variant in VARIANTS:
        for max_draft in (1,) if variant in _ONE_TOKEN else (1, longest):
            known = warm if "warm" in variant else prompts
            start = time.monotonic()
            run = _run(config, runner, tokenizer, known, variant, max_draft)
            expected = expected or run.outputs
            differing |= {key for key in expected if run.outputs[key] != expected[key]}
            run.outputs = {}
            runs.append(run)
            sys.stderr.write(
                f"temperature {sampling.temperature}, {variant}, k = {max_draft}: "
                f"{time.monotonic() - start:.1f} s\n"
            )
    return runs, len(differing)


def _run(
    config: JobConfig,
    runner: "ModelRunner",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence["Prompt"],
    variant: str,
    max_draft: int,
) -> Run:
    from streaminator.engine.engine import Engine
    from streaminator.speculative.draft_budget import StepCosts

    speculator = replace(config.speculator, num_speculative_tokens=max_draft, **VARIANTS[variant])
    engine = Engine(
        runner,
        tokenizer,
        sampling=config.sampling,
        # Drafts know all that was said before them, as in a replay.
        engine=replace(config.engine, overlap=False),
        speculator=speculator,
        max_prompt_length=max(len(prompt.token_ids) for prompt in prompts),
        step_costs=StepCosts.free(),
    )
    counts = np.zeros((config.data.num_completions, len(COUNTS)), np.int64)
    run = Run(config.sampling.temperature, variant, max_draft, counts)
    waiting = iter(prompts)
    while True:
        # As a worker does: what is learned for all is learned from prompts before, not beside.
        room = 2 * engine.stream_width - engine.scheduler.num_open_prompts
        for prompt in islice(waiting, room):
            engine.add(prompt)
        if not engine.has_work:
            return run
        for completion in engine.step():
            prompt_id = completion.prompt.prompt_id
            if completion.error is not None:
                raise InputError(f"prompt {prompt_id}: {completion.error}")
            run.outputs[prompt_id, completion.sample_index] = tuple(completion.token_ids)
            counts[completion.sample_index] += (
                1,
                len(completion.token_ids),
                len(completion.drafted),
                np.count_nonzero(completion.drafted),
                sum(completion.drafted),
                sum(completion.accepted),
            )


def _rows(runs: Iterable[Run]) -> Iterator[dict[str, Any]]:
    for run in runs:
        for index, counts in enumerate(run.counts.tolist()):
            yield {
                "temperature": run.temperature,
                "variant": run.variant,
                "max_draft": run.max_draft,
                "generation": index + 1,
                **dict(zip(COUNTS, counts, strict=True)),
            }


def _describe(
    config: JobConfig, runner: "ModelRunner", prompts: Sequence["Prompt"]
) -> dict[str, Any]:
    return describe(config, without=("temperature", *_varied())) | {
        "num_parameters": runner.num_parameters,
        "num_prompts": len(prompts),
        "max_draft": _longest(config),
    }


if __name__ == "__main__":
    sys.exit(main_program(_PROGRAM, main, advice=""))
