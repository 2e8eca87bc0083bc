# SPDX-License-Identifier: Apache-2.0
"""Rows that decide what follows them: settled prompts, and stores warm from an earlier run."""

import json
from pathlib import Path

import duckdb
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs.sample import main
from streaminator.grading import is_settled
from streaminator.speculative.memory import Memory
from tests.jobs.test_sample import SMALL, draw, rows, run_main

SETTLING = ["--num_completions", "8", "--max_length", "48", "--temperature", "0.5"]
SETTLING += ["--stop_when_settled", "0.8"]
ANSWERS = "prompt_id, sample_index, finish_reason, token_ids, answer"


@pytest.fixture(scope="session")
def settled(tmp_path_factory) -> list[tuple]:
    return [row[:4] for row in draw_answers(tmp_path_factory.mktemp("settled"), *SETTLING)]


def draw_answers(output: Path, *flags: str) -> list[tuple]:
    draw(output, *flags)
    return rows(output, ANSWERS)


def test_settled_prompts_draw_the_first_completions_and_account_for_the_rest(tmp_path, settled):
    expected, answers = [], {}
    for prompt_id, index, reason, ids, answer in draw_answers(tmp_path, *SETTLING[:-2]):
        seen = answers.setdefault(prompt_id, [])
        is_drawn = not is_settled(seen, 0.8)
        seen.append(answer)
        end = (reason, ids) if is_drawn else ("settled", [])
        expected.append((prompt_id, index, *end))
    assert settled == expected
    assert 0 < sum(row[2] == "settled" for row in settled) < len(settled)


def test_prompts_settle_on_a_gpu_as_they_do_elsewhere(tmp_path, settled, overlapping):
    assert [row[:4] for row in draw_answers(tmp_path, *SETTLING)] == settled


@pytest.mark.parametrize(
    "is_kept",
    [
        lambda index: index < 1,
        lambda index: index < 2,
        lambda index: index != 1,
        lambda index: index not in (1, 6),
        lambda index: index != 7,
    ],
    ids=["first", "two", "a gap", "two gaps", "all but the last"],
)
def test_a_settled_prompt_stays_settled_when_the_run_is_resumed(tmp_path, settled, is_kept):
    draw(tmp_path, *SETTLING, "--stream_width", "3")
    assert [row[:4] for row in rows(tmp_path, ANSWERS)] == settled
    for part in tmp_path.glob("*/completions/*.parquet"):
        table = pq.read_table(part)
        mask = [is_kept(index) for index in table["sample_index"].to_pylist()]
        pq.write_table(table.filter(mask), part)
    assert [row[:4] for row in draw_answers(tmp_path, *SETTLING)] == settled


def test_the_table_says_what_settling_saved(tmp_path, settled, capsys):
    draw(tmp_path, *SETTLING)
    num = sum(row[2] == "settled" for row in settled)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("settled")]
    assert f" {num} of " in line
    assert "tokens" in line


@pytest.mark.parametrize("speculator", ["ngram", "memory"])
def test_a_warm_start_changes_no_token_and_begins_where_the_earlier_run_ended(
    tmp_path, capsys, speculator
):
    flags = ["--temperature", "0.6", "--speculator", speculator, "--num_samples", "8"]
    old = [*flags, "--run_id", "old", "--store_distributions", "--stream_width", "2"]
    draw(tmp_path / "old", *old, "--max_length", "48", "--num_samples", "6")
    flags += ["--max_length", "48", "--seed", "1", "--run_id", "new", "--num_completions", "2"]
    cold = draw(tmp_path / "cold", *flags)
    capsys.readouterr()
    warm = draw(tmp_path / "warm", *flags, "--warm_start", str(tmp_path / "old" / "old"))
    assert "6 of 8 prompts start warm" in capsys.readouterr().err
    assert warm == cold
    accepted = [
        sum(row[2] for row in rows(tmp_path / name, columns) if row[1] == 0)
        for columns in ["prompt_id, sample_index, num_accepted_tokens"]
        for name in ("cold", "warm")
    ]
    assert accepted[1] > 1.1 * accepted[0]


def test_a_warm_started_prompt_learns_the_stored_distributions_then_its_own_rows(
    tmp_path, monkeypatch
):
    draw(tmp_path, "--store_distributions", "--run_id", "old")
    flags = ["--run_id", "new", "--seed", "1", "--warm_start", "old", "--output", str(tmp_path)]
    assert main([*SMALL, *flags]) == 0
    [part] = tmp_path.glob("new/completions/*.parquet")
    table = pq.read_table(part)
    pq.write_table(table.filter(pc.field("sample_index") < 1), part)
    opened = {}
    learn = Memory.open

    def note(self, prompt_id, prompt_token_ids, finished, distributions=()):
        opened[prompt_id] = list(finished), [top is not None for top in distributions]
        learn(self, prompt_id, prompt_token_ids, finished, distributions)

    monkeypatch.setattr(Memory, "open", note)
    assert main([*SMALL, *flags]) == 0
    del opened[""]  # the warm-up's prompt
    query = "SELECT token_ids FROM '{}' WHERE prompt_id = '{}' AND sample_index < {} ORDER BY {}"
    for prompt_id, (finished, has_top) in opened.items():
        expected = []
        for run, num in (("old", 3), ("new", 1)):
            files = f"{tmp_path}/{run}/completions/*.parquet"
            found = duckdb.sql(query.format(files, prompt_id, num, "sample_index")).fetchall()
            expected += [tuple(row[0]) for row in found]
        assert finished == expected
        assert has_top == [True, True, True, False]
    assert len(opened) == 5


def test_a_warm_start_that_cannot_help_is_refused_in_one_line(tmp_path, capsys):
    draw(tmp_path, "--run_id", "old")
    flags = [*SMALL, "--output", str(tmp_path), "--warm_start", "old"]
    (tmp_path / "other.jsonl").write_text('{"question": "1 + 1?"}\n')
    code, line = run_main(capsys, *flags, "--dataset", str(tmp_path / "other.jsonl"))
    assert (code, "none of these prompts" in line) == (2, True)
    code, line = run_main(capsys, *flags, "--run_id", "old")
    assert (code, "is the run to be drawn" in line) == (2, True)
    record = json.loads((tmp_path / "old" / "run.json").read_text())
    record["fingerprints"]["tokenizer"] = "another"
    (tmp_path / "old" / "run.json").write_text(json.dumps(record))
    code, line = run_main(capsys, *flags)
    assert (code, "another vocabulary" in line) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "other.jsonl"]
