# SPDX-License-Identifier: Apache-2.0
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import duckdb
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from streaminator.data.files import clean_temp_files, open_output
from streaminator.data.finished import read_finished
from streaminator.data.parquet import (
    COMPLETIONS,
    STEPS,
    PartWriter,
    completion_row,
    completions_schema,
    step_row,
)
from streaminator.errors import ConfigError, OutputError
from streaminator.grading import Grade
from streaminator.sequence import Completion, FinishReason, Prompt, StepStats

RIGHT = Grade(answer="7", gold="7", is_correct=True)
NOT_GRADED = Grade(answer=None, gold=None, is_correct=None)


def make_row(prompt_id="p", sample_index=0, *, keep_logprobs=False, grade=RIGHT, **changes):
    prompt = Prompt(
        prompt_id=prompt_id,
        token_ids=(1, 2, 3),
        text="Q: 3+4? A:",
        question="3+4?",
        metadata={"level": "easy"},
    )
    values = {
        "prompt": prompt,
        "sample_index": sample_index,
        "token_ids": [5, 6, 7],
        "text": "it is 7",
        "finish_reason": FinishReason.STOP,
        "logprobs": [-0.5, -0.25, -0.25],
        "from_draft": [False, True, False],
        "drafted": [2, 0],
        "accepted": [1, 0],
        "started_at": 1_700_000_000.25,
        "finished_at": 1_700_000_001.5,
    }
    completion = Completion(**(values | changes))
    return completion_row(
        completion, grade=grade, worker_id="w0", node="n", attempt=1, logprobs=keep_logprobs
    )


def make_writer(folder, *, writer_id="a", schema=COMPLETIONS, max_rows=100, max_seconds=100.0):
    return PartWriter(
        str(folder), schema, writer_id=writer_id, max_rows=max_rows, max_seconds=max_seconds
    )


def names(folder):
    return sorted(os.listdir(folder))


def test_a_completion_survives_the_round_trip(tmp_path):
    with make_writer(tmp_path / "completions", schema=completions_schema(["level"])) as writer:
        writer.write(make_row(keep_logprobs=True))
        failed = {"token_ids": [], "text": "", "logprobs": [], "from_draft": []}
        failed |= {"drafted": [], "accepted": [], "finish_reason": FinishReason.FAILED}
        writer.write(make_row("q", grade=NOT_GRADED, error="out of memory", **failed))
    row, failed_row = pq.read_table(tmp_path / "completions").to_pylist()
    assert row["token_ids"] == [5, 6, 7]
    assert row["level"] == "easy"
    assert row["num_prompt_tokens"] == row["num_completion_tokens"] == 3
    assert (row["num_steps"], row["num_draft_tokens"], row["num_accepted_tokens"]) == (2, 2, 1)
    assert row["cumulative_logprob"] == -1.0
    assert row["logprobs"] == [-0.5, -0.25, -0.25]
    assert row["is_correct"] is True
    assert row["started_at"].timestamp() == 1_700_000_000.25
    assert failed_row["error"] == "out of memory"
    assert failed_row["is_correct"] is None
    assert failed_row["cumulative_logprob"] is None
    assert failed_row["logprobs"] is None


def test_a_row_has_exactly_the_columns_of_the_schema():
    assert set(make_row()) == set(completions_schema(["level"]).names)


def test_a_step_has_every_field_of_step_stats(tmp_path):
    values = {f.name: [i] if f.type == list[int] else i for i, f in enumerate(fields(StepStats))}
    stats = StepStats(**values)
    row = step_row(stats, worker_id="w0", attempt_id=1, step=4)
    assert set(row) == set(STEPS.names)
    with make_writer(tmp_path, schema=STEPS) as writer:
        writer.write(row)
    assert pq.read_table(tmp_path).to_pylist() == [row]


def test_every_column_is_described_in_the_file(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(make_row())
    schema = pq.read_schema(tmp_path / "part-a-000001.parquet")
    assert all(field.metadata[b"doc"] for field in schema)
    assert all(field.metadata[b"doc"] for field in STEPS)


@pytest.mark.parametrize("columns", [["text"], ["Text"], ["level", "LEVEL"]])
def test_a_metadata_name_that_is_taken_is_refused(columns):
    with pytest.raises(ConfigError, match="--metadata_columns"):
        completions_schema(columns)


def test_rows_are_flushed_by_number(tmp_path):
    writer = make_writer(tmp_path, max_rows=2)
    for index in range(5):
        writer.write(make_row(sample_index=index))
    assert names(tmp_path) == ["part-a-000001.parquet", "part-a-000002.parquet"]
    writer.close()
    assert pq.read_table(tmp_path).num_rows == 5


def test_rows_are_flushed_by_age(tmp_path):
    writer = make_writer(tmp_path, max_seconds=0.05)
    writer.write(make_row())
    writer.flush_if_due()
    assert names(tmp_path) == []
    time.sleep(0.06)
    writer.flush_if_due()
    assert names(tmp_path) == ["part-a-000001.parquet"]
    writer.flush()
    assert len(names(tmp_path)) == 1


def test_duckdb_reads_a_run_while_a_writer_is_open(tmp_path):
    folder = tmp_path / "completions"
    writer = make_writer(folder, max_rows=2)
    (folder / ".part-dead-000001.parquet.tmp").write_bytes(b"half a file")
    for index in range(3):
        writer.write(make_row(sample_index=index))
    count = duckdb.execute(f"SELECT count(*) FROM '{folder}/*.parquet'").fetchall()
    assert count == [(2,)]
    assert pq.read_table(folder).num_rows == 2
    writer.close()


def test_a_failed_flush_keeps_the_rows(tmp_path):
    folder = tmp_path / "completions"
    writer = make_writer(folder)
    writer.write(make_row())
    folder.rmdir()
    with pytest.raises(OutputError, match="1 rows cannot be written") as error:
        writer.flush()
    assert "\n" not in str(error.value)
    folder.mkdir()
    writer.close()
    assert read_finished(str(tmp_path)) == {"p": {0: [5, 6, 7]}}


def test_a_flush_that_was_interrupted_after_the_rename_duplicates_nothing(tmp_path, monkeypatch):
    writer = make_writer(tmp_path / "completions")
    writer.write(make_row())
    real = os.replace

    def replace_then_interrupt(source, target):
        real(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.flush()
    monkeypatch.undo()
    writer.write(make_row(sample_index=1))
    writer.close()
    assert read_finished(str(tmp_path)) == {"p": {0: [5, 6, 7], 1: [5, 6, 7]}}


def test_a_writer_id_serves_once(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(make_row())
    with pytest.raises(OutputError, match="writer id a was used before"):
        make_writer(tmp_path)
    with make_writer(tmp_path, writer_id="b") as writer:
        writer.write(make_row())
    assert names(tmp_path) == ["part-a-000001.parquet", "part-b-000001.parquet"]


def test_a_uri_is_written_like_a_path(tmp_path):
    filesystem, path = open_output(f"file://{tmp_path}/out")
    assert path == f"{tmp_path}/out"
    with make_writer(f"file://{path}/completions") as writer:
        writer.write(make_row())
    assert filesystem.get_file_info(f"{path}/completions/part-a-000001.parquet").is_file
    assert read_finished(f"file://{path}") == {"p": {0: [5, 6, 7]}}


def test_a_file_system_without_rename_gets_whole_parts(tmp_path, monkeypatch):
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    for module in ("parquet", "finished"):
        monkeypatch.setattr(f"streaminator.data.{module}.resolve", lambda uri: (remote, uri))
    with make_writer("run/completions") as writer:
        writer.write(make_row())
    assert read_finished("run") == {"p": {0: [5, 6, 7]}}


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for uri in (f"{tmp_path}/file/out", "nosuch://bucket/out"):
        with pytest.raises(ConfigError, match="--output") as error:
            open_output(uri)
        assert "\n" not in str(error.value)
    assert open_output(str(tmp_path / "a" / "b"))[1] == str(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_finished_rows_of_all_parts_are_read(tmp_path):
    assert read_finished(str(tmp_path)) == {}
    for writer_id, prompt_id in (("a", "p"), ("b", "q")):
        with make_writer(tmp_path / "completions", writer_id=writer_id) as writer:
            writer.write(make_row(prompt_id))
            writer.write(make_row(prompt_id, 3, token_ids=[9]))
    assert read_finished(str(tmp_path)) == {
        "p": {0: [5, 6, 7], 3: [9]},
        "q": {0: [5, 6, 7], 3: [9]},
    }


@pytest.mark.parametrize("content", [b"", b"PAR1 cut short", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_damaged_part_is_named_with_the_remedy(tmp_path, content):
    with make_writer(tmp_path / "completions") as writer:
        writer.write(make_row())
    (tmp_path / "completions" / "part-b-000001.parquet").write_bytes(content)
    with pytest.raises(OutputError, match=r"part-b-000001\.parquet: damaged.*delete it") as error:
        read_finished(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_completion_that_is_there_twice_names_both_parts(tmp_path):
    for writer_id in ("a", "b"):
        with make_writer(tmp_path / "completions", writer_id=writer_id) as writer:
            writer.write(make_row())
    with pytest.raises(OutputError, match=r"part-b-000001.*part-a-000001"):
        read_finished(str(tmp_path))


KILLED_WRITER = """
import os, sys
from streaminator.data.parquet import STEPS, PartWriter
writer = PartWriter(sys.argv[1], STEPS, writer_id=sys.argv[2], max_rows=20, max_seconds=9)
for step in range(20_000):
    writer.write({"step": step, "worker_id": os.urandom(50_000).hex()})
    if step == 40:
        print("writing", flush=True)
"""


def test_a_killed_writer_leaves_only_whole_parts(tmp_path):
    folder = tmp_path / "completions"
    for attempt in range(4):
        command = [sys.executable, "-c", KILLED_WRITER, str(folder), f"w{attempt}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.01 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    parts = [name for name in names(folder) if not name.startswith(".")]
    assert len(parts) >= 4
    for part in parts:
        assert pq.read_table(folder / part).num_rows == 20
    clean_temp_files(str(tmp_path))
    assert names(folder) == parts


def test_temp_files_of_dead_writers_are_removed(tmp_path):
    with make_writer(tmp_path / "completions") as writer:
        writer.write(make_row())
    temp = tmp_path / "completions" / ".part-x-000001.parquet.tmp"
    temp.write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert clean_temp_files(str(tmp_path)) == 1
    assert not temp.exists()
    assert names(tmp_path) == ["completions", "notes.txt"]
    assert len(names(tmp_path / "completions")) == 1
