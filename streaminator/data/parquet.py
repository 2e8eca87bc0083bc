# SPDX-License-Identifier: Apache-2.0
"""The tables of a run, `completions`, `steps` and `events`: their schemas, writing.

Invariants
- A part file appears whole or not at all (`streaminator.data.files`).
- A (prompt_id, sample_index) is in one part only; `finished` refuses anything else.
- `top_ids` and `top_probs` are there in full for every token of a row, or null; the `rejected_`
  columns with them.
- Rows leave the buffer only after their part is written. A failed or interrupted flush can be
  repeated: it writes the same part name again, so that no row is ever there twice.
- Every column carries its description in the Parquet schema (field metadata `doc`).

Used by: the workers (`PartWriter`), resuming (`read_finished`, `read_distributions`),
`streaminator.summary`.
"""

import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from streaminator.data.files import (
    Patience,
    reason,
    resolve,
    write_whole,
)
from streaminator.errors import ConfigError, OutputError
from streaminator.sequence import Completion, StepStats

if TYPE_CHECKING:
    from streaminator.grading import Grade

_TIMESTAMP = pa.timestamp("us", tz="UTC")


def _schema(*columns: tuple[str, pa.DataType, str]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in columns])


COMPLETIONS = _schema(
    ("prompt_id", pa.string(), "stable id of the prompt"),
    ("sample_index", pa.int32(), "which completion of the prompt, from 0"),
    ("question", pa.string(), "the question as the dataset words it"),
    ("prompt", pa.string(), "the prompt as the model sees it"),
    ("token_ids", pa.list_(pa.int32()), "tokens of the completion"),
    ("text", pa.string(), "the completion, without special tokens"),
    (
        "finish_reason",
        pa.string(),
        "stop, length, failed, or settled: not drawn, the answers before it were clear",
    ),
    ("num_prompt_tokens", pa.int32(), "tokens of the prompt"),
    ("num_completion_tokens", pa.int32(), "tokens of the completion"),
    ("from_draft", pa.list_(pa.bool_()), "per token: came from an accepted draft"),
    ("drafted", pa.list_(pa.int16()), "per decoding step: tokens drafted"),
    ("accepted", pa.list_(pa.int16()), "per decoding step: drafted tokens accepted"),
    ("num_steps", pa.int32(), "decoding steps"),
    ("num_draft_tokens", pa.int32(), "tokens drafted in all steps"),
    ("num_accepted_tokens", pa.int32(), "drafted tokens accepted in all steps"),
    (
        "cumulative_logprob",
        pa.float64(),
        "sum of the log-probabilities of the tokens, as `logprobs` has them",
    ),
    (
        "logprobs",
        pa.list_(pa.float32()),
        "per token: log-probability under the model at temperature 1, unfiltered; null unless asked for",
    ),
    (
        "top_ids",
        pa.list_(pa.list_(pa.int32())),
        "per token: the model's most likely tokens there; null unless asked for",
    ),
    (
        "top_probs",
        pa.list_(pa.list_(pa.float32())),
        "per token: their probabilities at the sampling temperature, before top_k, top_p and min_p",
    ),
    (
        "rejected_ids",
        pa.list_(pa.int32()),
        "rejected drafts whose continuation was learned; null likewise",
    ),
    ("rejected_lengths", pa.list_(pa.int16()), "per decoding step with tokens: of these, how many"),
    (
        "rejected_top_ids",
        pa.list_(pa.list_(pa.int32())),
        "per rejected token: the model's most likely tokens after it and its draft before it",
    ),
    ("rejected_top_probs", pa.list_(pa.list_(pa.float32())), "per rejected token: of these"),
    ("answer", pa.string(), "answer found in the text"),
    ("gold_answer", pa.string(), "reference answer"),
    ("is_correct", pa.bool_(), "whether they agree; null: not graded"),
    ("grader_error", pa.string(), "why the user's grader could not grade it"),
    ("worker_id", pa.string(), "worker that drew it"),
    ("node", pa.string(), "machine of the worker; on Ray with the first 8 digits of its node's id"),
    ("attempt", pa.int32(), "attempt of the run (run.json) that drew it, from 1"),
    ("num_retries", pa.int32(), "workers lost in this attempt while they held the prompt"),
    ("started_at", _TIMESTAMP, "when it got a slot"),
    ("finished_at", _TIMESTAMP, "when it left its slot"),
    ("error", pa.string(), "why it failed"),
)

STEPS = _schema(
    ("worker_id", pa.string(), "worker that ran the step"),
    ("attempt_id", pa.int32(), "attempt of the run (run.json), from 1"),
    ("step", pa.int64(), "index of the step in its worker and attempt, from 0"),
    ("time", _TIMESTAMP, "end of the step"),
    ("num_running", pa.int32(), "slots in use"),
    ("stream_width", pa.int32(), "slots"),
    ("num_prefill_tokens", pa.int32(), "prompt tokens computed"),
    ("num_decode_tokens", pa.int32(), "completions for which a token was drawn"),
    ("num_draft_tokens", pa.int32(), "tokens drafted"),
    ("num_accepted_tokens", pa.int32(), "drafted tokens accepted"),
    ("num_new_tokens", pa.int32(), "tokens added to completions"),
    (
        "num_draft_by_survival",
        pa.list_(pa.int32()),
        "tokens drafted, by tenths of the chance they were given; empty where none was",
    ),
    ("num_accepted_by_survival", pa.list_(pa.int32()), "the accepted ones of these"),
    (
        "seconds_schedule",
        pa.float64(),
        "choosing what runs; on a GPU this phase, and the next two, are 0 where they were over "
        "before the step before was",
    ),
    ("seconds_draft", pa.float64(), "drafting"),
    ("seconds_pack", pa.float64(), "building the batch"),
    ("seconds_forward", pa.float64(), "the model"),
    (
        "seconds_sample",
        pa.float64(),
        "drawing tokens; on a GPU also what the host does meanwhile, where the model does not take as long",
    ),
    ("seconds_verify", pa.float64(), "comparing drafts with the drawn tokens"),
    ("seconds_commit", pa.float64(), "commit, retire, and, where steps do not overlap, learning"),
    ("num_blocks_used", pa.int32(), "KV blocks in use"),
    ("device_memory", pa.int64(), "bytes in use"),
)

EVENTS = _schema(
    ("time", _TIMESTAMP, "when the driver learned of it"),
    ("attempt", pa.int32(), "attempt of the run (run.json), from 1"),
    ("kind", pa.string(), "what happened: worker died, worker hung, out of memory, ..."),
    ("worker_id", pa.string(), "the worker concerned"),
    ("prompt_id", pa.string(), "the prompt concerned"),
    ("detail", pa.string(), "the reason"),
)


def completions_schema(metadata_columns: Sequence[str] = ()) -> pa.Schema:
    """COMPLETIONS with a string column per metadata name after the prompt.

    Raises: ConfigError for a name that is taken, ignoring case as SQL does.
    """
    schema = COMPLETIONS
    for position, name in enumerate(metadata_columns, start=4):
        if name.lower() in {taken.lower() for taken in schema.names}:
            raise ConfigError(
                f"--metadata_columns {name}: the output already has a column of this name; "
                "rename it in the dataset"
            )
        doc = {"doc": "copied from the dataset"}
        schema = schema.insert(position, pa.field(name, pa.string(), metadata=doc))
    return schema


_OF_DISTRIBUTIONS = (
    "top_ids", "top_probs", "rejected_ids", "rejected_top_ids", "rejected_top_probs",
    "rejected_lengths",
)  # fmt: skip


def completion_row(
    completion: Completion,
    *,
    grade: "Grade",
    worker_id: str,
    node: str,
    attempt: int,
    logprobs: bool,
) -> dict[str, Any]:
    """The row of a completion; `logprobs` keeps the log-probability of every token."""
    prompt, distributions = completion.prompt, completion.distributions
    return {
        **prompt.metadata,
        "prompt_id": prompt.prompt_id,
        "sample_index": completion.sample_index,
        "question": prompt.question,
        "prompt": prompt.text,
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason.value,
        "num_prompt_tokens": len(prompt.token_ids),
        "num_completion_tokens": len(completion.token_ids),
        "from_draft": completion.from_draft,
        "drafted": completion.drafted,
        "accepted": completion.accepted,
        "num_steps": len(completion.drafted),
        "num_draft_tokens": sum(completion.drafted),
        "num_accepted_tokens": sum(completion.accepted),
        "cumulative_logprob": math.fsum(completion.logprobs) if completion.logprobs else None,
        "logprobs": completion.logprobs if logprobs else None,
        **{
            name: np.asarray(getattr(distributions, name)).tolist() if distributions else None
            for name in _OF_DISTRIBUTIONS
        },
        "answer": grade.answer,
        "gold_answer": grade.gold,
        "is_correct": grade.is_correct,
        "grader_error": grade.error,
        "worker_id": worker_id,
        "node": node,
        "attempt": attempt,
        "num_retries": prompt.num_retries,
        "started_at": datetime.fromtimestamp(completion.started_at, UTC),
        "finished_at": datetime.fromtimestamp(completion.finished_at, UTC),
        "error": completion.error,
    }


def step_row(stats: StepStats, *, worker_id: str, attempt_id: int, step: int) -> dict[str, Any]:
    """The row of an engine step."""
    return {
        **{name: getattr(stats, name) for name in StepStats.__slots__},
        "worker_id": worker_id,
        "attempt_id": attempt_id,
        "step": step,
        "time": datetime.fromtimestamp(stats.time, UTC),
    }


class PartWriter:
    """Buffers rows of one table and writes them as parts `part-<writer_id>-<number>.parquet`.

    `writer_id` is used by one process start only, so that a restarted worker never overwrites.
    """

    def __init__(
        self,
        folder: str,
        schema: pa.Schema,
        *,
        writer_id: str,
        max_rows: int,
        max_seconds: float,
        patience: float = 0.0,
        on_part: Callable[[str, list[dict[str, Any]]], None] | None = None,
    ) -> None:
        """`on_part(name, rows)` hears of each part; failing storage is retried for `patience` s.

        Raises: OutputError when the folder cannot be made or the writer id was used before.
        """
        self._schema = schema
        self._max_rows = max_rows
        self._max_seconds = max_seconds
        self._patience = Patience(patience)
        self._on_part = on_part
        self._rows: list[dict[str, Any]] = []
        self._oldest = 0.0
        self._num_parts = 0
        self._filesystem, self._folder = resolve(folder)
        self._name = f"part-{writer_id}"
        self.outage: str | None = None
        """Set when a part was written after failures; whoever reports it clears it."""
        try:
            self._filesystem.create_dir(self._folder, recursive=True)
            is_new = self._filesystem.get_file_info(self._next_path).type == pafs.FileType.NotFound
        except OSError as error:
            raise OutputError(f"{self._folder}: cannot be written: {reason(error)}") from error
        if not is_new:
            raise OutputError(f"{self._next_path}: writer id {writer_id} was used before")

    @property
    def _next_path(self) -> str:
        return f"{self._folder}/{self._name}-{self._num_parts + 1:06d}.parquet"

    def write(self, row: dict[str, Any]) -> None:
        """Add a row and flush if due. Raises: OutputError; the row is kept even then."""
        if not self._rows:
            self._oldest = time.monotonic()
        self._rows.append(row)
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Flush if there are `max_rows` rows or one is `max_seconds` old, without waiting for
        failing storage: the rows stay, and a later call tries again.

        Raises: OutputError when storage fails for longer than `patience`.
        """
        now = time.monotonic()
        is_due = len(self._rows) >= self._max_rows or now - self._oldest >= self._max_seconds
        if self._rows and is_due and now >= self._patience.next_try:
            self._try_to_flush()

    def flush(self) -> None:
        """Write the buffered rows as one part. Raises: OutputError; the rows stay buffered."""
        while self._rows and not self._try_to_flush():
            self._patience.pause()

    def _try_to_flush(self) -> bool:
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        pq.write_table(table, sink, compression="zstd")
        try:
            write_whole(self._filesystem, self._next_path, sink.getvalue())
        except OSError as error:
            self._patience.failed(f"{self._next_path}: {len(self._rows)} rows", error)
            return False
        self.outage = self._patience.succeeded() or self.outage
        rows, self._rows = self._rows, []
        name = self._next_path.rpartition("/")[2]
        self._num_parts += 1
        if self._on_part is not None:
            self._on_part(name, rows)
        return True

    def close(self) -> None:
        """Flush what is left. Raises: OutputError."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
