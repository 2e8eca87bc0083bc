# SPDX-License-Identifier: Apache-2.0
"""The two tables of a run, `completions` and `steps`: their schemas, writing, reading back.

Invariants
- A part file appears whole or not at all (`streaminator.data.files`).
- A (prompt_id, sample_index) is in one part only; `read_finished` refuses anything else.
- `top_ids` and `top_probs` are there in full for every token of a row, or null.
- Rows leave the buffer only after their part is written. A failed or interrupted flush can be
  repeated: it writes the same part name again, so that no row is ever there twice.
- Every column carries its description in the Parquet schema (field metadata `doc`).

Used by: the workers (`PartWriter`), resuming (`read_finished`, `read_distributions`),
`streaminator.summary`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from streaminator.data.files import (
    list_parts,
    reason,
    resolve,
    write_whole,
)
from streaminator.errors import ConfigError, OutputError
from streaminator.sequence import Completion, Distributions, StepStats

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
    ("finish_reason", pa.string(), "stop, length or failed"),
    ("num_prompt_tokens", pa.int32(), "tokens of the prompt"),
    ("num_completion_tokens", pa.int32(), "tokens of the completion"),
    ("from_draft", pa.list_(pa.bool_()), "per token: came from an accepted draft"),
    ("drafted", pa.list_(pa.int16()), "per decoding step: tokens drafted"),
    ("accepted", pa.list_(pa.int16()), "per decoding step: drafted tokens accepted"),
    ("num_steps", pa.int32(), "decoding steps"),
    ("num_draft_tokens", pa.int32(), "tokens drafted in all steps"),
    ("num_accepted_tokens", pa.int32(), "drafted tokens accepted in all steps"),
    ("cumulative_logprob", pa.float64(), "sum of the log-probabilities of the tokens"),
    ("logprobs", pa.list_(pa.float32()), "per token: log-probability; null unless asked for"),
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
    ("answer", pa.string(), "answer found in the text"),
    ("gold_answer", pa.string(), "reference answer"),
    ("is_correct", pa.bool_(), "whether they agree; null: not graded"),
    ("grader_error", pa.string(), "why the user's grader could not grade it"),
    ("worker_id", pa.string(), "worker that drew it"),
    ("node", pa.string(), "machine of the worker"),
    ("attempt", pa.int32(), "attempt of the run (run.json) that drew it, from 1"),
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
    ("seconds_schedule", pa.float64(), "choosing what runs"),
    ("seconds_draft", pa.float64(), "drafting"),
    ("seconds_pack", pa.float64(), "building the batch"),
    ("seconds_forward", pa.float64(), "the model"),
    ("seconds_sample", pa.float64(), "drawing tokens"),
    ("seconds_verify", pa.float64(), "comparing drafts with the drawn tokens"),
    ("seconds_commit", pa.float64(), "commit and retire"),
    ("num_blocks_used", pa.int32(), "KV blocks in use"),
    ("device_memory", pa.int64(), "bytes in use"),
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
        "top_ids": distributions.top_ids.tolist() if distributions else None,
        "top_probs": distributions.top_probs.tolist() if distributions else None,
        "answer": grade.answer,
        "gold_answer": grade.gold,
        "is_correct": grade.is_correct,
        "grader_error": grade.error,
        "worker_id": worker_id,
        "node": node,
        "attempt": attempt,
        "started_at": datetime.fromtimestamp(completion.started_at, UTC),
        "finished_at": datetime.fromtimestamp(completion.finished_at, UTC),
        "error": completion.error,
    }


def step_row(stats: StepStats, *, worker_id: str, attempt_id: int, step: int) -> dict[str, Any]:
    """The row of an engine step."""
    return {
        **asdict(stats),
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
        self, folder: str, schema: pa.Schema, *, writer_id: str, max_rows: int, max_seconds: float
    ) -> None:
        """Raises: OutputError when the folder cannot be made or the writer id was used before."""
        self._schema = schema
        self._max_rows = max_rows
        self._max_seconds = max_seconds
        self._rows: list[dict[str, Any]] = []
        self._oldest = 0.0
        self._num_parts = 0
        self._filesystem, self._folder = resolve(folder)
        self._name = f"part-{writer_id}"
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
        """Flush if there are `max_rows` rows or one is `max_seconds` old. Raises: OutputError."""
        age = time.monotonic() - self._oldest
        if self._rows and (len(self._rows) >= self._max_rows or age >= self._max_seconds):
            self.flush()

    def flush(self) -> None:
        """Write the buffered rows as one part. Raises: OutputError; the rows stay buffered."""
        if not self._rows:
            return
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        pq.write_table(table, sink, compression="zstd")
        try:
            write_whole(self._filesystem, self._next_path, sink.getvalue())
        except OSError as error:
            raise OutputError(
                f"{self._next_path}: {len(self._rows)} rows cannot be written: {reason(error)}; "
                "mend that, and the same command draws them again"
            ) from error
        self._rows = []
        self._num_parts += 1

    def close(self) -> None:
        """Flush what is left. Raises: OutputError."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_finished(run: str) -> dict[str, dict[int, list[int]]]:
    """{prompt_id: {sample_index: token_ids}} of every row of a run's folder or URI, failed or not.

    Raises: OutputError for a part that cannot be read, and for a completion that is there twice.
    """
    filesystem, path = resolve(run)
    parts = list_parts(filesystem, f"{path}/completions")
    finished: dict[str, dict[int, list[int]]] = {}
    for part in parts:
        columns = _read_columns(filesystem, part, ["prompt_id", "sample_index", "token_ids"])
        for prompt_id, sample_index, token_ids in zip(*columns, strict=True):
            samples = finished.setdefault(prompt_id, {})
            if sample_index in samples:
                first = _first_with(filesystem, parts, prompt_id, sample_index)
                raise OutputError(
                    f"{part}: completion {sample_index} of prompt {prompt_id} is in {first} too; "
                    "delete one of the two: its other rows will be drawn again"
                )
            samples[sample_index] = token_ids
    return finished


def read_distributions(
    run: str, prompt_ids: AbstractSet[str]
) -> dict[str, dict[int, Distributions]]:
    """{prompt_id: {sample_index: distributions}} of the rows of these prompts that hold them.

    Raises: OutputError for a part that cannot be read.
    """
    filesystem, path = resolve(run)
    kept: dict[str, dict[int, Distributions]] = {}
    for part in list_parts(filesystem, f"{path}/completions") if prompt_ids else []:
        # Few parts hold a prompt that is not finished, and these columns are large.
        if prompt_ids.isdisjoint(_read_columns(filesystem, part, ["prompt_id"])[0]):
            continue
        with _reading(part), filesystem.open_input_file(part) as file:
            names = ["prompt_id", "sample_index", "num_completion_tokens", "accepted"]
            names += ["top_ids", "top_probs"]
            table = pq.ParquetFile(file).read(columns=names)
            if "top_ids" not in table.column_names:  # older than this column
                continue
            is_wanted = pc.field("prompt_id").isin(list(prompt_ids))
            table = table.filter(is_wanted & pc.field("top_ids").is_valid())
            for columns in zip(*(table[name] for name in names), strict=True):
                prompt_id, sample_index, num, accepted = (value.as_py() for value in columns[:4])
                samples = kept.setdefault(prompt_id, {})
                samples[sample_index] = _distributions(num, accepted, *columns[4:])
    return kept


def _distributions(
    num: int, accepted: list[int], top_ids: pa.ListScalar, top_probs: pa.ListScalar
) -> Distributions:
    """Raises: ValueError where the columns do not fit together."""
    # A step's last tokens may lie behind the completion's end.
    ends = np.minimum(np.cumsum(np.array(accepted, np.int64) + 1), num)
    lengths = np.diff(ends, prepend=0)
    ids, probs = (
        rows.values.flatten().to_numpy().reshape(num, -1 if num else 0)
        for rows in (top_ids, top_probs)
    )
    if ids.shape != probs.shape or lengths.sum() != num:
        raise ValueError("top_ids, top_probs and accepted do not fit together")
    steps = tuple(lengths[lengths > 0].tolist())
    return Distributions(top_ids=ids, top_probs=probs, step_lengths=steps)


def _read_columns(filesystem: pafs.FileSystem, part: str, names: list[str]) -> list[list[Any]]:
    with _reading(part):
        with filesystem.open_input_file(part) as file:
            table = pq.ParquetFile(file).read(columns=names)
        return [table[name].to_pylist() for name in names]


@contextmanager
def _reading(part: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise OutputError(f"{part}: cannot be read: {reason(error)}") from error
        raise OutputError(
            f"{part}: damaged ({reason(error)}); delete it and run the same command again: "
            "its rows will be drawn again"
        ) from error


def _first_with(
    filesystem: pafs.FileSystem, parts: list[str], prompt_id: str, sample_index: int
) -> str:
    key = (prompt_id, sample_index)
    for part in parts:
        columns = _read_columns(filesystem, part, ["prompt_id", "sample_index"])
        if key in zip(*columns, strict=True):
            return part
    raise AssertionError(f"{key} is in no part")
