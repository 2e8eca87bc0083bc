# SPDX-License-Identifier: Apache-2.0
"""The driver's side of a run's folder: publishing parts, events, rows of prompts given up.

Invariants
- Only this process makes a part of completions visible, by one move out of the staging folder.
- What storage refuses is tried again for `STORAGE_SECONDS`, then the run ends; it can be resumed.

Used by: `driver`.
"""

import socket
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

import pyarrow as pa

from streaminator.config import JobConfig
from streaminator.data.files import (
    STAGING,
    STORAGE_SECONDS,
    Patience,
    clean_temp_files,
    join_uri,
    publish,
    remove_folder,
)
from streaminator.data.parquet import EVENTS, PartWriter, completion_row, completions_schema
from streaminator.errors import OutputError
from streaminator.grading import make_grader
from streaminator.pool import Part
from streaminator.run_record import Run
from streaminator.sequence import FinishReason, Prompt, not_drawn


class RunOutput:
    """A `dispatch.Output` in a run's folder."""

    def __init__(self, config: JobConfig, run: Run, say: Callable[[str], None]) -> None:
        """Clear away what earlier attempts left unpublished. `say` shows an event.

        Raises: OutputError.
        """
        self._config = config
        self._run = run
        self._say = say
        self._grade = make_grader(config.data)
        clean_temp_files(run.uri)
        self._clear_staging()
        run.filesystem.create_dir(f"{run.path}/completions", recursive=True)
        self._writer_id = f"driver-{run.attempt}-{uuid.uuid4().hex[:8]}"
        self._is_broken = False
        self._events: PartWriter | None = None
        self._failed: PartWriter | None = None

    def publish(self, part: Part) -> None:
        """Make a staged part visible. Raises: OutputError."""
        name = part.path.rpartition("/")[2]
        source = f"{self._run.path}/{part.path}"
        target = f"{self._run.path}/completions/{name}"
        patience = Patience(0.0 if self._is_broken else STORAGE_SECONDS)
        self._is_broken = True  # until it has worked: patience is not for the closing as well
        while True:
            try:
                publish(self._run.filesystem, source, target)
                break
            except OSError as error:
                patience.failed(target, error)
                patience.pause()
        self._is_broken = False
        outage = patience.succeeded()
        if outage is not None:
            self.record("storage failed", worker=None, detail=outage)

    def record(
        self, kind: str, *, worker: int | None, detail: str, prompt_id: str | None = None
    ) -> None:
        """Show an event and write it down. Raises: OutputError."""
        who = None if worker is None else f"worker-{worker}"
        self._say(f"{kind}: {' '.join(name for name in (who, prompt_id) if name)} ({detail})")
        if self._events is None:
            self._events = self._writer("events", EVENTS)
        self._events.write(
            {
                "time": datetime.now(UTC),
                "attempt": self._run.attempt,
                "kind": kind,
                "worker_id": who,
                "prompt_id": prompt_id,
                "detail": detail,
            }
        )

    def fail(self, prompt: Prompt, why: str) -> None:
        """Write failed rows for the completions that are left. Raises: OutputError."""
        if self._failed is None:
            schema = completions_schema(self._config.data.metadata_columns)
            self._failed = self._writer("completions", schema)
        for sample_index in prompt.sample_indices:
            self._failed.write(
                completion_row(
                    not_drawn(prompt, sample_index, FinishReason.FAILED, why),
                    grade=self._grade("", prompt.gold_answer),
                    worker_id="driver",
                    node=socket.gethostname(),
                    attempt=self._run.attempt,
                    logprobs=False,
                )
            )
        self._failed.flush()

    def close(self) -> None:
        """Write out what is buffered. Raises: OutputError."""
        for writer in (self._events, self._failed):
            if writer is not None:
                writer.close()
        self._clear_staging()

    def _clear_staging(self) -> None:
        """Remove what nobody will publish."""
        try:
            remove_folder(self._run.filesystem, f"{self._run.path}/{STAGING}")
        except OutputError as error:
            # A worker that was given up may write there still. No reader looks; the next attempt clears it.
            self._say(f"left behind: {error}")

    def _writer(self, table: str, schema: pa.Schema) -> PartWriter:
        return PartWriter(
            join_uri(self._run.uri, table),
            schema,
            writer_id=self._writer_id,
            max_rows=1000,
            max_seconds=0,
            patience=STORAGE_SECONDS,
        )
