# SPDX-License-Identifier: Apache-2.0
"""What is on disk already: what is left of each prompt, and which part holds the rest."""

from pathlib import Path

import pytest

from streaminator.data.finished import Finished
from streaminator.data.parquet import COMPLETIONS, PartWriter
from streaminator.errors import OutputError
from streaminator.sequence import Prompt


def write(run: Path, writer_id: str, *keys: tuple[str, int]) -> None:
    with PartWriter(
        str(run / "completions"), COMPLETIONS, writer_id=writer_id, max_rows=99, max_seconds=99
    ) as writer:
        for prompt_id, sample_index in keys:
            writer.write({"prompt_id": prompt_id, "sample_index": sample_index})


def prompt(name: str) -> Prompt:
    return Prompt(prompt_id=name, token_ids=(1,), text="", question="", sample_indices=(0, 1, 2))


def test_what_is_left_and_where_the_rest_is(tmp_path):
    write(tmp_path, "a", ("p", 0), ("p", 1), ("q", 1))
    write(tmp_path, "b", ("p", 2), ("q", 0))
    finished = Finished(str(tmp_path), 3)
    assert finished.num_completions == 5
    assert finished.left(prompt("p")) == ((), ())
    parts = ("part-a-000001.parquet", "part-b-000001.parquet")
    assert finished.left(prompt("q")) == ((2,), parts)
    assert finished.left(prompt("new")) == ((0, 1, 2), ())


@pytest.mark.parametrize(
    "again", [[("p", 0)], [("p", 0), ("p", 1), ("p", 2)], [("p", 2), ("q", 0)]], ids=str
)
def test_a_completion_that_is_there_twice_names_both_parts(tmp_path, again):
    write(tmp_path, "a", ("p", 0), ("p", 1), ("p", 2))
    write(tmp_path, "b", *again)
    with pytest.raises(OutputError, match=r"part-b-000001.*part-a-000001|every completion"):
        Finished(str(tmp_path), 3)


def test_a_run_without_rows_has_all_to_draw(tmp_path):
    assert Finished(str(tmp_path), 3).left(prompt("p")) == ((0, 1, 2), ())
