# SPDX-License-Identifier: Apache-2.0
"""One worker's whole job, free of Ray: a model, a stream, and the Parquet parts it writes.

Invariants
- `Session` is built before a run is opened, so that a bad model leaves nothing behind.
- A completion is written by the session that drew it; only counts travel back.

Used by: `pool.LocalPool`, `actors.worker`.
"""

import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streaminator.config import JobConfig
from streaminator.data.files import join_uri
from streaminator.data.parquet import (
    STEPS,
    PartWriter,
    completion_row,
    completions_schema,
    step_row,
)
from streaminator.engine.checkpoint import load_tokenizer
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.grading import make_grader
from streaminator.progress import Report
from streaminator.sequence import Completion, FinishReason, Prompt

_MANY_PARAMETERS = 20_000_000
"""From here on a second thread pays on a CPU."""

_PART_ROWS = 1024
_PART_SECONDS = 5.0
_STEPS_PART_ROWS = 20_000
_STEPS_PART_SECONDS = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkResult:
    """What came of one call of `Session.work`."""

    report: Report
    num_open_prompts: int
    """Prompts the session still holds."""


class Session:
    """Draws completions of the prompts it is given and writes them out."""

    def __init__(self, config: JobConfig, *, num_threads: int | None = None) -> None:
        """Load tokenizer, grader and model.

        Args:
            config: resolved settings.
            num_threads: threads of torch on a CPU; default: torch's own choice. A small model
                gets one: its operations are shorter than the threads' meeting.

        Raises: InputError naming what cannot be used.
        """
        self._config = config
        self._grade = make_grader(config.data)
        self._tokenizer = load_tokenizer(config.model)
        self._runner = ModelRunner(config.model)
        if self._runner.num_parameters < _MANY_PARAMETERS:
            torch.set_num_threads(1)
        elif num_threads is not None:
            torch.set_num_threads(num_threads)
        self._writers: list[PartWriter] = []

    @property
    def device_name(self) -> str:
        """The accelerator's name, or "cpu"."""
        device = self._runner.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def open(self, run_uri: str, *, worker_id: str, attempt: int, max_prompt_length: int) -> None:
        """Set up the stream and the part files of a run.

        Args:
            run_uri: the run's folder, an absolute path or a URI.
            worker_id: this worker's name in the output.
            attempt: the run's attempt, from 1.
            max_prompt_length: tokens of the longest prompt to come.

        Raises: ConfigError when the KV cache does not fit; OutputError.
        """
        config = self._config
        self.engine = Engine(
            self._runner,
            self._tokenizer,
            sampling=config.sampling,
            engine=config.engine,
            speculator=config.speculator,
            max_prompt_length=max_prompt_length,
        )
        self._worker_id = worker_id
        self._attempt = attempt
        self._num_steps = 0
        self._num_left: dict[str, int] = {}
        writer_id = f"{worker_id}-{attempt}-{uuid.uuid4().hex[:8]}"
        self._completions = PartWriter(
            join_uri(run_uri, "completions"),
            completions_schema(config.data.metadata_columns),
            writer_id=writer_id,
            max_rows=_PART_ROWS,
            max_seconds=_PART_SECONDS,
        )
        self._steps = PartWriter(
            join_uri(run_uri, "steps"),
            STEPS,
            writer_id=writer_id,
            max_rows=_STEPS_PART_ROWS,
            max_seconds=_STEPS_PART_SECONDS,
        )
        self._writers = [self._completions, self._steps]

    def work(
        self, prompts: Sequence[Prompt], *, min_open_prompts: int, max_seconds: float
    ) -> WorkResult:
        """Take in `prompts` and run the stream for a while.

        Args:
            prompts: new ones, each with the completions left to draw.
            min_open_prompts: come back for more when fewer prompts than this are open.
            max_seconds: come back after this time in any case.

        Raises: OutputError when rows cannot be written.
        """
        for prompt in prompts:
            self._num_left[prompt.prompt_id] = len(prompt.sample_indices)
            self.engine.add(prompt)
        report = Report()
        deadline = time.monotonic() + max_seconds
        while self.engine.has_work:
            for completion in self.engine.step():
                report += self._write(completion)
            report += self._count_step()
            self._completions.flush_if_due()
            if len(self._num_left) < min_open_prompts or time.monotonic() >= deadline:
                break
        return WorkResult(report=report, num_open_prompts=len(self._num_left))

    def close(self) -> None:
        """Write out what is buffered. Raises: OutputError."""
        for writer in self._writers:
            writer.close()

    def _write(self, completion: Completion) -> Report:
        prompt = completion.prompt
        self._completions.write(
            completion_row(
                completion,
                grade=self._grade(completion.text, prompt.gold_answer),
                worker_id=self._worker_id,
                node=socket.gethostname(),
                attempt=self._attempt,
                logprobs=self._config.run.logprobs,
            )
        )
        self._num_left[prompt.prompt_id] -= 1
        if not self._num_left[prompt.prompt_id]:
            del self._num_left[prompt.prompt_id]
        has_failed = completion.finish_reason is FinishReason.FAILED
        return Report(num_finished=int(not has_failed), num_failed=int(has_failed))

    def _count_step(self) -> Report:
        stats, self.engine.last_step = self.engine.last_step, None
        if stats is None:
            return Report()
        self._steps.write(
            step_row(
                stats, worker_id=self._worker_id, attempt_id=self._attempt, step=self._num_steps
            )
        )
        self._num_steps += 1
        return Report(
            num_new_tokens=stats.num_new_tokens,
            num_draft_tokens=stats.num_draft_tokens,
            num_accepted_tokens=stats.num_accepted_tokens,
            num_steps=1,
            num_running_slots_sum=stats.num_running,
            num_slots_sum=self._config.engine.stream_width,
            device_memory=stats.device_memory,
        )
