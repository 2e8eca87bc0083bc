# SPDX-License-Identifier: Apache-2.0
"""One worker of a `SamplerPool`, free of Ray: a model and a stream that stay from call to call.

Invariants
- The speculators' memory outlives a call, and new weights: what was learned from old ones is only
  a guess. Keys and values of old weights are never used again.
- Bounded: at most `NUM_KEPT_PROMPTS` prompts that are not being drawn from are remembered (the latest),
  within `speculator_memory`.
- A call that was broken off leaves nothing in flight: the stream is made anew.

Used by: `sampler_pool`, `actors.resident_worker`.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from streaminator.config import JobConfig
from streaminator.engine.checkpoint import load_tokenizer, read_weights
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.weights import PackedWeights, copy_weights
from streaminator.progress import Opened, Report
from streaminator.sequence import Completion, FinishReason, Prompt
from streaminator.session import Part, WorkResult, step_or_narrow, threads_for

NUM_KEPT_PROMPTS = 4096
"""Their tables share `speculator_memory`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn(Part):
    """Completions that travel back instead of being staged."""

    completions: tuple[Completion, ...]


class ResidentSession:
    """Draws completions of the prompts it is given and hands them back."""

    def __init__(self, config: JobConfig, *, num_threads: int | None = None) -> None:
        """Load tokenizer and model; `num_threads` as for a `Session`. Raises: InputError."""
        self._config = config
        self._tokenizer = load_tokenizer(config.model)
        self._runner = ModelRunner(config.model)
        self._num_threads = threads_for(self._runner, num_threads)
        self._engine: Engine | None = None

    @property
    def device_name(self) -> str:
        """The accelerator's name, or "cpu"."""
        return self._runner.device_name

    def open(self, *, seed: int, max_prompt_length: int) -> Opened:
        """Begin a call; what an earlier one left undone is forgotten.

        A width that the stream chooses is for calls of any size, and stays.

        Args:
            seed: of the call's sampling noise.
            max_prompt_length: tokens of the longest prompt to come.

        Raises: ConfigError when the KV cache does not fit.
        """
        if self._engine is not None and not self._engine.has_work:
            self._engine.restart(seed=seed, max_prompt_length=max_prompt_length)
            return Opened(stream_width=self._engine.stream_width)
        self._engine = None  # before there is a second KV cache
        # Whatever device the caller has made the default: weights are packed and tried here.
        with self._threads(), torch.device("cpu"):
            self._engine = Engine(
                self._runner,
                self._tokenizer,
                sampling=replace(self._config.sampling, seed=seed),
                engine=self._config.engine,
                speculator=self._config.speculator,
                max_prompt_length=max_prompt_length,
                num_kept_prompts=NUM_KEPT_PROMPTS,
            )
        return Opened(stream_width=self._engine.stream_width)

    def update_weights(self, weights: object) -> None:
        """Load a state dict, or a checkpoint by its folder or name, into the model.

        Raises: ModelError; the old weights stay.
        """
        if isinstance(weights, PackedWeights):
            weights = weights.unpack()
        elif isinstance(weights, str | os.PathLike):
            weights = read_weights(os.fspath(weights), self._config.model, self._runner.dtype)
        copy_weights(self._runner.model, weights)
        self._runner.repack_weights()
        if self._engine is not None:
            if self._engine.has_work:
                self._engine = None
            else:
                self._engine.forget_keys()

    def work(
        self,
        prompts: Sequence[Prompt],
        *,
        min_open_prompts: int = 0,
        num_to_release: int = 0,
        max_seconds: float,
    ) -> WorkResult:
        """Take in `prompts` and run the stream for a while; see `Session.work`.

        Raises: DeviceError when memory runs out at width 1.
        """
        engine = self._engine
        assert engine is not None, "work before open"
        try:
            with self._threads():
                return self._work(engine, prompts, min_open_prompts, num_to_release, max_seconds)
        except BaseException:
            # Wherever it was broken off, its parts need not agree with each other.
            self._engine = None
            raise

    def _work(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        min_open_prompts: int,
        num_to_release: int,
        max_seconds: float,
    ) -> WorkResult:
        for prompt in prompts:
            engine.add(prompt)
        engine.scheduler.release(num_to_release)
        deadline = time.monotonic() + max_seconds
        drawn: list[Completion] = []
        events: list[tuple[str, str]] = []
        num_steps = 0
        released = engine.take_released()
        while engine.has_work and not released:
            completions, trouble = step_or_narrow(engine)
            drawn += completions
            events += trouble
            num_steps += engine.last_step is not None
            engine.last_step = None
            released = engine.take_released()
            has_few = engine.scheduler.num_open_prompts < min_open_prompts
            if has_few or time.monotonic() >= deadline:
                break
        num_failed = sum(c.finish_reason is FinishReason.FAILED for c in drawn)
        keys = tuple((c.prompt.prompt_id, c.sample_index) for c in drawn)
        return WorkResult(
            report=Report(
                num_finished=len(drawn) - num_failed, num_failed=num_failed, num_steps=num_steps
            ),
            num_open_prompts=engine.scheduler.num_open_prompts,
            parts=(Drawn(path="", keys=keys, completions=tuple(drawn)),) if drawn else (),
            released=tuple(prompt.prompt_id for prompt in released),
            events=tuple(events),
        )

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Its own number of threads, and after that the caller's, who may train in this process."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
