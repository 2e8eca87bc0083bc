# SPDX-License-Identifier: Apache-2.0
"""Run the engines in turn, each in its own process.

Used by: `jobs.benchmark`.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from jobs.engines.client import Client, EngineFailedError
from jobs.engines.protocol import Draw, Load, Run
from jobs.engines.registry import Program

_WARM_UP_LENGTH = 8
_FIRST_LIMIT = 7200.0
"""Seconds that the first engine may take; another may take `_PATIENCE` times the fastest's."""
_PATIENCE = 20.0
_LEAST_LIMIT = 300.0


@dataclass(slots=True)
class Measured:
    """What came of the engines at one stream width."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    """By engine, in the order of the repeats."""
    failed: dict[str, str] = field(default_factory=dict)
    """The others, with the reason."""
    versions: dict[str, dict[str, str]] = field(default_factory=dict)


def measure(programs: Sequence[Program], load: Load, draw: Draw, *, repeats: int) -> Measured:
    """Each engine's runs, interleaved; a short one of each goes before.

    Raises: EngineFailedError for one of this project's own, or when none is left.
    """
    measured = Measured()
    with ExitStack() as stack:
        clients: dict[str, Client] = {}

        def fail(program: Program, error: EngineFailedError) -> None:
            if program.is_own:
                raise EngineFailedError(f"{program.name}: {error}") from error
            measured.failed[program.name] = str(error)
            measured.runs.pop(program.name, None)
            clients.pop(program.name).end()  # it may be computing still
            sys.stderr.write(f"{program.name} is left out: {error}\n")

        short = _warm_up(draw, load.stream_width)
        for program in programs:
            client = Client(program, replace(load, engine=program.name))
            clients[program.name] = stack.enter_context(client)
        for program in programs:
            # One after another: while it compiles, an engine may need more memory than later.
            client = clients[program.name]
            try:
                measured.versions[program.name] = client.load()
                client.draw(short, _LEAST_LIMIT)
            except EngineFailedError as error:
                fail(program, error)
        fastest = _FIRST_LIMIT / _PATIENCE
        for repeat in range(repeats):
            again = replace(draw, seed=draw.seed + repeat)
            for program in [program for program in programs if program.name in clients]:
                limit = max(_LEAST_LIMIT, _PATIENCE * fastest)
                try:
                    run = clients[program.name].draw(again, limit)
                except EngineFailedError as error:
                    fail(program, error)
                    continue
                fastest = min(fastest, run.seconds)
                measured.runs.setdefault(program.name, []).append(run)
            speeds = ", ".join(f"{n} {runs[-1].speed:.1f}" for n, runs in measured.runs.items())
            sys.stderr.write(f"repeat {repeat + 1}/{repeats}: {speeds} tokens/s\n")
    if not measured.runs:
        raise EngineFailedError("no engine is left to compare")
    return measured


def _warm_up(draw: Draw, stream_width: int) -> Draw:
    return replace(
        draw,
        prompt_ids=draw.prompt_ids[:stream_width],
        prompts=draw.prompts[:stream_width],
        num_completions=1,
        max_length=min(_WARM_UP_LENGTH, draw.max_length),
    )
