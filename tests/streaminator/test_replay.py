# SPDX-License-Identifier: Apache-2.0
"""Replay on logged completions, as a person runs it."""

import json
from pathlib import Path

import pytest

from streaminator.speculative.replay import main

TOKENIZER = Path(__file__).parents[2] / "streaminator" / "demo"


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*flags: str) -> int:
    return main([*flags, "--tokenizer", str(TOKENIZER)])


def test_repeated_completions_are_accepted_more_from_one_to_the_next(tmp_path, capsys):
    text = "Tom has 3 apples. He buys 4 more apples. 3 + 4 = 7 apples."
    rows = [
        {"prompt_id": i, "question": f"How many {i}?", "completions": [text] * 4} for i in range(3)
    ]
    assert run(write(tmp_path / "log.jsonl", rows), "--speculators", "memory,ngram") == 0
    lines = capsys.readouterr().out.splitlines()
    (memory,) = (line for line in lines if line.startswith("memory"))
    rates = [float(word) for word in memory.split("k=1 ")[1].split("  mean")[0].split()]
    assert len(rates) == 4
    assert rates[0] < rates[1]
    assert rates[-1] > 0.8


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        (None, [], ["no such file"]),
        ([{"prompt_id": 1, "question": "q"}], [], [":1", "completions"]),
        ([{"prompt_id": 1, "question": "q", "completions": []}], [], ["no completions"]),
        ([{"prompt_id": 1, "question": "q", "completions": ["a"]}], ["--speculators", "x"], ["x"]),
    ],
)
def test_bad_logs_get_one_line_and_exit_2(tmp_path, capsys, rows, flags, words):
    path = tmp_path / "log.jsonl"
    file = write(path, rows) if rows is not None else str(path)
    assert run(file, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line
