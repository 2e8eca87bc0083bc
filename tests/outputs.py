# SPDX-License-Identifier: Apache-2.0
"""What a run has written, read as a user would: with DuckDB."""

from pathlib import Path

import duckdb

TOKENS = "prompt_id, sample_index, token_ids, text, finish_reason"


def rows(output: Path, columns: str = TOKENS) -> list[tuple]:
    """Of all runs below a folder, by prompt and completion."""
    files = f"'{output}/*/completions/*.parquet'"
    return duckdb.sql(f"SELECT {columns} FROM {files} ORDER BY prompt_id, sample_index").fetchall()


def assert_no_overlap(output: Path) -> None:
    """No two completions of a prompt were in flight at once."""
    files = f"'{output}/*/completions/*.parquet'"
    overlaps = duckdb.sql(f"""
        SELECT a.prompt_id, a.sample_index, b.sample_index FROM {files} a JOIN {files} b
        USING (prompt_id) WHERE a.sample_index < b.sample_index
        AND a.started_at < b.finished_at AND b.started_at < a.finished_at""").fetchall()
    assert overlaps == []


def check(output: Path, undisturbed: list[tuple]) -> None:
    """Nothing lost, doubled, changed or left behind, and no two completions of a prompt overlapped."""
    assert rows(output) == undisturbed
    assert_no_overlap(output)
    assert not list(output.glob("*/.staging/*"))
