# SPDX-License-Identifier: Apache-2.0
"""What the benchmark compares: this engine, without and with speculation, and `generate`.

Used by: `jobs.benchmark`.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from streaminator.config import JobConfig
from streaminator.engine.checkpoint import load_model
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.errors import InputError
from streaminator.sequence import Prompt

ENGINES = ("plain", "speculative", "transformers")
PHASES = ("schedule", "draft", "pack", "forward", "sample", "verify", "commit")
_WARM_UP_LENGTH = 8


@dataclass(slots=True)
class Run:
    """All completions drawn once by one engine."""

    outputs: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    """Token ids by (prompt_id, sample_index), up to and including the end-of-text token."""
    seconds: float = 0.0
    num_steps: int = 0
    num_busy_slots: int = 0
    """Rows with an unfinished completion, summed over steps."""
    num_rows: int = 0
    """Rows computed, summed over steps: finished ones of a padded batch count."""
    num_drafted: int = 0
    num_accepted: int = 0
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """Seconds per phase of this engine's steps."""

    @property
    def num_tokens(self) -> int:
        """Completion tokens."""
        return sum(map(len, self.outputs.values()))

    @property
    def speed(self) -> float:
        """Completion tokens per second."""
        return self.num_tokens / self.seconds


def load_transformers(config: JobConfig, runner: ModelRunner) -> PreTrainedModel:
    """The same weights as `generate` runs them, drawing as this engine does."""
    # A random model lies in a folder of its own, which only the runner's configuration names.
    source = replace(config.model, model_name=runner.model.name_or_path)
    model: Any = load_model(source, runner.dtype, "sdpa")
    sampling = config.sampling
    drawing: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawing = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }
    # The checkpoint's own settings would fill in whatever is not given.
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(_end_tokens(config, runner)) or None, pad_token_id=0, **drawing
    )
    return model.to(runner.device).eval()


def _end_tokens(config: JobConfig, runner: ModelRunner) -> set[int]:
    own = set() if config.sampling.ignore_eos else runner.eos_token_ids
    return own | set(config.sampling.stop_token_ids)


def measure(
    config: JobConfig,
    runner: ModelRunner,
    model: PreTrainedModel | None,
    prompts: Sequence[Prompt],
    *,
    repeats: int,
) -> dict[str, list[Run]]:
    """Each engine's runs, in the order of the repeats; a short one of each goes before.

    Without `model` (`load_transformers`) transformers is left out.
    """
    engines = ENGINES if model is not None else ENGINES[:2]
    sampling = config.sampling
    short = replace(sampling, max_length=min(_WARM_UP_LENGTH, sampling.max_length))
    first = [
        replace(prompt, sample_indices=prompt.sample_indices[:1])
        for prompt in prompts[: config.engine.stream_width]
    ]
    for name in engines:
        _run(name, replace(config, sampling=short), runner, model, first, repeat=0)
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for repeat in range(repeats):
        for name in engines:
            runs[name].append(_run(name, config, runner, model, prompts, repeat=repeat))
        speeds = ", ".join(f"{name} {runs[name][-1].speed:.1f}" for name in engines)
        sys.stderr.write(f"repeat {repeat + 1}/{repeats}: {speeds} tokens/s\n")
    return runs


def _run(
    name: str,
    config: JobConfig,
    runner: ModelRunner,
    model: PreTrainedModel | None,
    prompts: Sequence[Prompt],
    *,
    repeat: int,
) -> Run:
    if name == "transformers":
        assert model is not None
        return _run_transformers(config, runner, model, prompts, seed=config.sampling.seed + repeat)
    return _run_engine(config, runner, prompts, spec_decoding=name == "speculative")


def _run_engine(
    config: JobConfig, runner: ModelRunner, prompts: Sequence[Prompt], *, spec_decoding: bool
) -> Run:
    engine = Engine(
        runner,
        None,
        sampling=config.sampling,
        engine=config.engine,
        speculator=replace(config.speculator, spec_decoding=spec_decoding),
        max_prompt_length=max(len(prompt.token_ids) for prompt in prompts),
    )
    run = Run()
    runner.synchronize()
    start = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt)
    while engine.has_work:
        for completion in engine.step():
            if completion.error is not None:
                raise InputError(f"prompt {completion.prompt.prompt_id}: {completion.error}")
            run.outputs[completion.prompt.prompt_id, completion.sample_index] = completion.token_ids
        stats, engine.last_step = engine.last_step, None
        if stats is None:
            continue
        run.num_steps += 1
        run.num_busy_slots += stats.num_running
        run.num_drafted += stats.num_draft_tokens
        run.num_accepted += stats.num_accepted_tokens
        for phase in PHASES:
            run.phases[phase] += getattr(stats, f"seconds_{phase}")
    runner.synchronize()
    run.seconds = time.perf_counter() - start
    run.num_rows = run.num_busy_slots
    return run


def _run_transformers(
    config: JobConfig,
    runner: ModelRunner,
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    seed: int,
) -> Run:
    ends = _end_tokens(config, runner)
    rows = [(prompt, index) for prompt in prompts for index in prompt.sample_indices]
    width = config.engine.stream_width
    run = Run()
    torch.manual_seed(seed)
    runner.synchronize()
    start = time.perf_counter()
    for batch in (rows[at : at + width] for at in range(0, len(rows), width)):
        longest = max(len(prompt.token_ids) for prompt, _ in batch)
        padding = [longest - len(prompt.token_ids) for prompt, _ in batch]
        ids = [[0] * num + list(p.token_ids) for num, (p, _) in zip(padding, batch, strict=True)]
        mask = [[0] * num + [1] * (longest - num) for num in padding]
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]
                torch.tensor(ids, device=runner.device),
                attention_mask=torch.tensor(mask, device=runner.device),
                max_new_tokens=config.sampling.max_length,
            )
        drawn = output[:, longest:].tolist()
        run.num_steps += len(drawn[0])
        run.num_rows += len(drawn) * len(drawn[0])
        for (prompt, index), tokens in zip(batch, drawn, strict=True):
            run.outputs[prompt.prompt_id, index] = _cut(tokens, ends)
    runner.synchronize()
    run.seconds = time.perf_counter() - start
    run.num_busy_slots = run.num_tokens
    return run


def _cut(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first end-of-text token."""
    num = next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:num]
