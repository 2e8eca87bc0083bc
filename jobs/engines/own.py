# SPDX-License-Identifier: Apache-2.0
"""This engine for the benchmark: without speculation, as configured, n-grams, or the memory.

Used by: `jobs.engines.registry`.
"""

from dataclasses import replace
from typing import Any

import torch

from jobs.engines.protocol import Draw, Drawer, Load, Run, serve, timed
from jobs.engines.registry import SIBLINGS
from streaminator.config import JobConfig, SpeculatorConfig
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.errors import InputError
from streaminator.sequence import Prompt
from streaminator.summary import PHASES

_COUNTS = (
    "num_steps",
    "num_busy_slots",
    "num_drafted",
    "num_accepted",
    "num_prefill_tokens",
    "num_sampled_tokens",
)


def load(what: Load) -> Drawer:
    """Load the weights once; each run has an engine of its own, which remembers nothing."""
    torch.set_num_threads(what.num_threads)
    lists = {n: tuple(v) if isinstance(v, list) else v for n, v in what.settings.items()}
    config = JobConfig.from_flat(lists)
    runner = ModelRunner(replace(config.model, model_name=what.model))
    speculator = _speculator(what.engine.removesuffix(SIBLINGS), config.speculator)
    engine_config = replace(config.engine, stream_width=what.stream_width)
    if what.engine.endswith(SIBLINGS):
        engine_config = replace(engine_config, in_flight_per_prompt=None)

    def draw(draw: Draw) -> Run:
        engine = Engine(
            runner,
            None,
            # The seed stays: the text is the same in every repeat.
            sampling=replace(config.sampling, max_length=draw.max_length),
            engine=engine_config,
            speculator=speculator,
            max_prompt_length=what.max_prompt_length,
        )
        indices = tuple(range(draw.num_completions))
        prompts = [
            Prompt(prompt_id=n, token_ids=tuple(ids), text="", question="", sample_indices=indices)
            for n, ids in zip(draw.prompt_ids, draw.prompts, strict=True)
        ]
        return _run(engine, prompts)

    return draw


def _speculator(name: str, config: SpeculatorConfig) -> SpeculatorConfig:
    if name == "plain":
        return replace(config, spec_decoding=False)
    return config if name == "speculative" else replace(config, speculator=name)


def _run(engine: Engine, prompts: list[Prompt]) -> Run:
    counts: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
    phases: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    done = []

    def draw() -> None:
        for prompt in prompts:
            engine.add(prompt)
        while engine.has_work:
            done.extend(engine.step())
            stats, engine.last_step = engine.last_step, None
            if stats is None:
                continue
            counts["num_steps"] += 1
            counts["num_busy_slots"] += stats.num_running
            counts["num_drafted"] += stats.num_draft_tokens
            counts["num_accepted"] += stats.num_accepted_tokens
            counts["num_prefill_tokens"] += stats.num_prefill_tokens
            counts["num_sampled_tokens"] += stats.num_decode_tokens + stats.num_draft_tokens
            for phase in PHASES:
                phases[phase] += getattr(stats, f"seconds_{phase}")
        engine.runner.synchronize()

    engine.runner.synchronize()
    run = Run(seconds=timed(draw), phases=phases, num_rows=counts["num_busy_slots"], **counts)
    failed = next((completion for completion in done if completion.error is not None), None)
    if failed is not None:
        raise InputError(f"prompt {failed.prompt.prompt_id}: {failed.error}")
    places = {prompt.prompt_id: place for place, prompt in enumerate(prompts)}
    run.completions = [[[] for _ in prompt.sample_indices] for prompt in prompts]
    for completion in done:
        place = places[completion.prompt.prompt_id]
        run.completions[place][completion.sample_index] = completion.token_ids
    # On average, half of a completion is there when a step of it attends; a prompt attends once.
    contexts = [len(c.prompt.token_ids) + len(c.token_ids) // 2 for c in done]
    steps = [(context, c.drafted) for context, c in zip(contexts, done, strict=True)]
    run.num_read_tokens = sum(context * len(drafted) for context, drafted in steps)
    run.num_attended_tokens = sum(len(prompt.token_ids) ** 2 // 2 for prompt in prompts) + sum(
        context * (len(drafted) + sum(drafted)) for context, drafted in steps
    )
    return run


if __name__ == "__main__":
    serve(load)
