# SPDX-License-Identifier: Apache-2.0
"""The driver's side of a run's folder: publishing, events, rows of prompts that were given up."""

import pyarrow.parquet as pq
import pytest

import streaminator.run_output as module
from streaminator.config import JobConfig
from streaminator.errors import OutputError
from streaminator.pool import Part
from streaminator.run_output import RunOutput
from streaminator.run_record import open_run
from streaminator.sequence import Prompt
from streaminator.summary import summarise
from streaminator.summary_table import render

PART = Part(path=".staging/w/part-w-000001.parquet", keys=(("p", 0),))


@pytest.fixture
def run(tmp_path):
    return open_run(str(tmp_path), "r", JobConfig(), fingerprints={})


def make(run) -> RunOutput:
    return RunOutput(JobConfig(), run, lambda line: None)


def stage(tmp_path) -> None:
    folder = tmp_path / "r" / ".staging" / "w"
    folder.mkdir(parents=True)
    (folder / "part-w-000001.parquet").write_bytes(b"rows")


def test_a_part_moves_to_where_readers_look(run, tmp_path):
    output = make(run)
    stage(tmp_path)
    output.publish(PART)
    output.close()
    published = tmp_path / "r" / "completions" / "part-w-000001.parquet"
    assert published.read_bytes() == b"rows"
    assert not (tmp_path / "r" / ".staging").exists()


def test_what_an_earlier_attempt_did_not_publish_is_cleared_away(run, tmp_path):
    stage(tmp_path)
    make(run)
    assert not (tmp_path / "r" / ".staging").exists()
    assert not list((tmp_path / "r" / "completions").iterdir())


def test_a_folder_that_a_lost_worker_still_writes_to_does_not_fail_the_run(
    run, tmp_path, monkeypatch
):
    def refuse(filesystem, path):
        raise OutputError(f"{path}: cannot be removed: Directory not empty")

    said: list[str] = []
    monkeypatch.setattr(module, "remove_folder", refuse)
    output = RunOutput(JobConfig(), run, said.append)
    stage(tmp_path)
    output.publish(PART)
    output.close()
    assert len(list((tmp_path / "r" / "completions").iterdir())) == 1
    assert all(line.startswith("left behind: ") for line in said)


def fail_to_publish(monkeypatch, *, times: int, patience: float) -> None:
    real, left = module.publish, [times]

    def fail(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(5, "Input/output error")
        real(*arguments)

    monkeypatch.setattr(module, "publish", fail)
    monkeypatch.setattr(module, "STORAGE_SECONDS", patience)


def test_publishing_is_patient_with_storage_and_the_summary_tells(run, tmp_path, monkeypatch):
    output = make(run)
    stage(tmp_path)
    fail_to_publish(monkeypatch, times=1, patience=60.0)
    output.publish(PART)
    output.close()
    (tmp_path / "r" / "completions" / "part-w-000001.parquet").unlink()
    assert summarise(tmp_path / "r").events == {"storage failed": 1}


def test_storage_that_stays_broken_is_one_line_and_not_waited_for_twice(run, tmp_path, monkeypatch):
    output = make(run)
    stage(tmp_path)
    fail_to_publish(monkeypatch, times=99, patience=0.2)
    for _ in range(2):
        with pytest.raises(OutputError, match="Input/output error; mend that") as error:
            output.publish(PART)
        assert "\n" not in str(error.value)
    assert "for 0 s" not in str(error.value)


def test_a_prompt_given_up_has_failed_rows_with_the_reason_and_the_summary_tells(run, tmp_path):
    output = make(run)
    prompt = Prompt(
        prompt_id="p", token_ids=(1, 2), text="q", question="q", gold_answer="#### 4",
        sample_indices=(1, 3), num_retries=4,
    )  # fmt: skip
    output.fail(prompt, "its worker was lost 4 times")
    output.record("prompt failed", worker=2, detail="its worker was lost 4 times", prompt_id="p")
    rows = pq.read_table(tmp_path / "r" / "completions").to_pylist()
    assert [(row["prompt_id"], row["sample_index"]) for row in rows] == [("p", 1), ("p", 3)]
    for row in rows:
        assert (row["finish_reason"], row["num_retries"]) == ("failed", 4)
        assert row["error"] == "its worker was lost 4 times"
        assert row["is_correct"] is False
    summary = summarise(tmp_path / "r")
    assert (summary.num_failed, summary.events) == (2, {"prompt failed": 1})
    assert "1 x prompt failed" in render(summary)
