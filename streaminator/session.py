# SPDX-License-Identifier: Apache-2.0
"""One worker's whole job, free of Ray: a model, a stream, and the Parquet parts it writes.

Invariants
- `Session` is built before a run is opened, so that a bad model leaves nothing behind.
- A completion is written by the session that drew it, into its own staging folder; ids and counts
  travel back, and the driver publishes the parts.

Used by: `pool.LocalPool`, `actors.worker`.
"""

import gc
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pyarrow as pa
import torch

from streaminator.config import JobConfig
from streaminator.data.files import STAGING, STORAGE_SECONDS, join_uri
from streaminator.data.finished import read_answers, read_distributions, read_finished
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
from streaminator.errors import DeviceError, first_line
from streaminator.grading import Grade, is_settled, make_grader
from streaminator.pool import Part, WorkResult
from streaminator.progress import Opened, Report
from streaminator.sequence import Completion, Distributions, FinishReason, Prompt, not_drawn
from streaminator.step_trace import StepTrace

_MANY_PARAMETERS = 20_000_000
"""From here on a second thread pays on a CPU."""

_PART_ROWS = 1024
_PART_SECONDS = 5.0
_STEPS_PART_ROWS = 20_000
_STEPS_PART_SECONDS = 15.0


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
        _keep_imports()
        self._config = config
        self._grade = make_grader(config.data)
        self._tokenizer = load_tokenizer(config.model)
        self._runner = ModelRunner(config.model)
        torch.set_num_threads(threads_for(self._runner, num_threads))
        self._writers: list[PartWriter] = []
        self._num_left: dict[str, int] = {}
        self._answers: dict[str, dict[int, str | None]] = {}
        self._parts: list[Part] = []
        self._events: list[tuple[str, str]] = []
        self._trace: StepTrace | None = None

    @property
    def device_name(self) -> str:
        """The accelerator's name, or "cpu"."""
        return self._runner.device_name

    def open(
        self,
        run_uri: str,
        *,
        worker_id: str,
        attempt: int,
        max_prompt_length: int,
        max_in_flight: int | None = None,
        node: str | None = None,
    ) -> Opened:
        """Set up the stream and the part files of a run; returns what the stream is like.

        Args:
            run_uri: the run's folder, an absolute path or a URI.
            worker_id: this worker's name in the output.
            attempt: the run's attempt, from 1.
            max_prompt_length: tokens of the longest prompt to come.
            max_in_flight: completions that can be in flight at once at most, if that is known.
            node: the machine's name in the output; default: its host name.

        Raises: ConfigError when the KV cache does not fit; OutputError.
        """
        config, engine = self._config, self._config.engine
        if config.data.stop_when_settled is not None:
            # Whether there is a next completion, the answer of the last one says.
            engine = replace(engine, overlap=False)
        self.engine = Engine(
            self._runner,
            self._tokenizer,
            sampling=config.sampling,
            engine=engine,
            speculator=config.speculator,
            max_prompt_length=max_prompt_length,
            max_in_flight=max_in_flight,
        )
        self._worker_id = worker_id
        self._attempt = attempt
        self._node = node or socket.gethostname()
        self._num_steps = 0
        self._num_left, self._answers, self._parts, self._events = {}, {}, [], []
        writer_id = f"{worker_id}-{attempt}-{uuid.uuid4().hex[:8]}"
        self._run_uri = run_uri
        self._staging = f"{STAGING}/{writer_id}"
        self._completions = PartWriter(
            join_uri(run_uri, *self._staging.split("/")),
            completions_schema(config.data.metadata_columns),
            writer_id=writer_id,
            max_rows=_PART_ROWS,
            max_seconds=_PART_SECONDS,
            patience=STORAGE_SECONDS,
            on_part=self._stage,
        )
        self._steps = PartWriter(
            join_uri(run_uri, "steps"),
            STEPS,
            writer_id=writer_id,
            max_rows=_STEPS_PART_ROWS,
            max_seconds=_STEPS_PART_SECONDS,
            patience=STORAGE_SECONDS,
        )
        self._writers = [self._completions, self._steps]
        if config.run.profile:
            uri = join_uri(run_uri, "profile", f"{writer_id}.json.gz")
            self._trace = StepTrace(uri, self._runner.device)
        return Opened(
            stream_width=self.engine.stream_width,
            memory=self.engine.memory,
            layers=self._runner.layers,
        )

    def work(
        self,
        prompts: Sequence[Prompt],
        *,
        min_open_prompts: int = 0,
        num_to_release: int = 0,
        max_seconds: float,
    ) -> WorkResult:
        """Take in `prompts` and run the stream for a while.

        Comes back early with a new part or a released prompt, and whenever there is no more work;
        then nothing is left in a buffer.

        Args:
            prompts: new ones, each with the completions left to draw.
            min_open_prompts: come back for more when fewer prompts than this are open.
            num_to_release: prompts to give up, each as soon as it is between two completions.
            max_seconds: come back after this time in any case.

        Raises: OutputError when rows cannot be written; DeviceError when memory runs out at width 1.
        """
        report = Report()
        self._recall_answers(prompts)
        for prompt in self._with_finished(prompts):
            self._num_left[prompt.prompt_id] = len(prompt.sample_indices)
            num_settled = self._settle(prompt)
            report += Report(num_finished=num_settled)
            if not num_settled:
                self.engine.add(prompt)
        self.engine.scheduler.release(num_to_release)
        released = self._take_released()
        deadline = time.monotonic() + max_seconds
        while self.engine.has_work and not released:
            completions, trouble = step_or_narrow(self.engine)
            self._events.extend(trouble)
            for completion in completions:
                report += self._write(completion)
            report += self._count_step()
            self._completions.flush_if_due()
            released = self._take_released()
            has_few = len(self._num_left) < min_open_prompts
            if has_few or self._parts or time.monotonic() >= deadline:
                break
        if released or not self.engine.has_work:
            self._completions.flush()
        return self._result(report, released)

    def close(self) -> WorkResult:
        """Write out what is buffered. Raises: OutputError."""
        for writer in self._writers:
            writer.close()
        if self._trace is not None and (why := self._trace.close()):
            self._events.append(("not profiled", why))
        return self._result(Report(), ())

    def _result(self, report: Report, released: tuple[str, ...]) -> WorkResult:
        for writer in self._writers:
            if writer.outage is not None:
                self._events.append(("storage failed", writer.outage))
                writer.outage = None
        parts, self._parts = self._parts, []
        events, self._events = self._events, []
        return WorkResult(
            report=report,
            num_open_prompts=len(self._num_left),
            parts=tuple(parts),
            released=released,
            events=tuple(events),
        )

    def _with_finished(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts, with what they have drawn elsewhere for the speculator to learn from."""
        warm = self._config.speculator.warm_start
        earlier = _read_drawn(warm, {p.prompt_id: p.warm_parts for p in prompts})
        drawn = _read_drawn(self._run_uri, {p.prompt_id: p.finished_parts for p in prompts})
        ready = []
        for prompt in prompts:
            both = [*earlier.get(prompt.prompt_id, ()), *drawn.get(prompt.prompt_id, ())]
            top = tuple(distributions for _, distributions in both)
            ready.append(
                replace(
                    prompt,
                    finished=tuple(tuple(token_ids) for token_ids, _ in both),
                    finished_distributions=top if any(top) else (),
                    finished_parts=(),
                    warm_parts=(),
                )
            )
        return ready

    def _take_released(self) -> tuple[str, ...]:
        ids = tuple(prompt.prompt_id for prompt in self.engine.take_released())
        for prompt_id in ids:
            self._forget(prompt_id)
        return ids

    def _forget(self, prompt_id: str) -> None:
        del self._num_left[prompt_id]
        self._answers.pop(prompt_id, None)

    def _recall_answers(self, prompts: Sequence[Prompt]) -> None:
        """Of what was drawn elsewhere, where answers decide what is drawn."""
        waiting = {prompt.prompt_id for prompt in prompts if prompt.finished_parts}
        if waiting and self._config.data.stop_when_settled is not None:
            names = sorted({name for prompt in prompts for name in prompt.finished_parts})
            self._answers |= read_answers(self._run_uri, waiting, names)

    def _settle(self, prompt: Prompt) -> int:
        """Write rows for what is left of a prompt if its answers are settled; returns how many.

        Only the answers before the next completion count, so that a row that was lost and is drawn
        again is decided on as it was the first time.
        """
        threshold = self._config.data.stop_when_settled
        left = prompt.sample_indices[-self._num_left[prompt.prompt_id] :]
        answers = self._answers.get(prompt.prompt_id, {})
        if threshold is None or not is_settled(map(answers.get, range(left[0])), threshold):
            return 0
        for sample_index in left:
            completion = not_drawn(prompt, sample_index, FinishReason.SETTLED)
            self._write_row(completion, Grade(None, None, None))
        self._forget(prompt.prompt_id)
        return len(left)

    def _stage(self, name: str, rows: list[dict[str, Any]]) -> None:
        keys = tuple((row["prompt_id"], row["sample_index"]) for row in rows)
        self._parts.append(Part(path=f"{self._staging}/{name}", keys=keys))

    def _write(self, completion: Completion) -> Report:
        prompt = completion.prompt
        grade = self._grade(completion.text, prompt.gold_answer)
        self._write_row(completion, grade)
        has_failed = completion.finish_reason is FinishReason.FAILED
        report = Report(num_finished=int(not has_failed), num_failed=int(has_failed))
        self._num_left[prompt.prompt_id] -= 1
        if not self._num_left[prompt.prompt_id]:
            self._forget(prompt.prompt_id)
            return report
        if not has_failed:
            answers = self._answers.setdefault(prompt.prompt_id, {})
            answers[completion.sample_index] = grade.answer
        num_settled = self._settle(prompt)
        if num_settled:
            self.engine.drop_rest(prompt)
        return report + Report(num_finished=num_settled)

    def _write_row(self, completion: Completion, grade: Grade) -> None:
        self._completions.write(
            completion_row(
                completion,
                grade=grade,
                worker_id=self._worker_id,
                node=self._node,
                attempt=self._attempt,
                logprobs=self._config.run.logprobs,
            )
        )

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
        if self._trace is not None:
            self._trace.step()
        return Report(
            num_new_tokens=stats.num_new_tokens,
            num_draft_tokens=stats.num_draft_tokens,
            num_accepted_tokens=stats.num_accepted_tokens,
            num_steps=1,
            num_running_slots_sum=stats.num_running,
            num_slots_sum=stats.stream_width,
            device_memory=stats.device_memory,
        )


@cache
def _keep_imports() -> None:
    """Once in a process: else Python looks for garbage in all that was imported, for some tenths of a
    second in the middle of a run. So does pyarrow for pandas, to import it, with its first array."""
    pa.array([0])
    gc.collect()
    gc.freeze()


def threads_for(runner: ModelRunner, num_threads: int | None) -> int:
    """How many threads pay on a CPU: one for a small model, `num_threads`, or torch's own choice."""
    if runner.num_parameters < _MANY_PARAMETERS:
        return 1
    return num_threads or torch.get_num_threads()


def step_or_narrow(engine: Engine) -> tuple[list[Completion], list[tuple[str, str]]]:
    """Make a step; out of memory, halve the stream instead, and say so (kind, detail).

    Raises: DeviceError when memory runs out at width 1.
    """
    try:
        return engine.step(), []
    except torch.OutOfMemoryError as error:
        before = engine.scheduler.stream_width
        if before == 1:
            raise DeviceError(
                f"out of memory with a single completion in flight ({first_line(error)}); "
                "lower --max_length or --max_batched_tokens"
            ) from error
        width = engine.scheduler.narrow()
        detail = f"stream width {before} -> {width}: {first_line(error)}"
    # Outside of the handler, whose traceback would keep the tensors of the failed step.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [], [("out of memory", detail)]


def _read_drawn(
    run: str | None, parts_of: dict[str, tuple[str, ...]]
) -> dict[str, list[tuple[list[int], Distributions | None]]]:
    """{prompt_id: [(token ids, what the model gave)]} in sample order, from a run's parts."""
    waiting = {prompt_id for prompt_id, parts in parts_of.items() if parts}
    names = sorted({name for parts in parts_of.values() for name in parts})
    if run is None or not names:
        return {}
    drawn = read_finished(run, names)
    kept = read_distributions(run, waiting, names)
    return {
        prompt_id: [
            (token_ids, kept.get(prompt_id, {}).get(index))
            for index, token_ids in sorted(drawn.get(prompt_id, {}).items())
        ]
        for prompt_id in waiting
    }
