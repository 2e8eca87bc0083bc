# SPDX-License-Identifier: Apache-2.0
"""Tests of the memory's benchmark: made-up texts and a run's, and folders that hold too little."""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs import benchmark_memory, sample
from streaminator.data.finished import read_distributions, read_finished
from streaminator.engine.sampler import noise_key
from tests.programs import assert_refused

SMALL = ["--width", "3", "--cap", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Five completions of each of five bundled problems, with the model's four likeliest tokens."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--num_samples", "5", "--num_completions", "5", "--max_length", "24"]
    flags += ["--store_distributions", "--num_top_tokens", "4"]
    flags += ["--device", "cpu", "--num_workers", "0"]
    assert sample.main([*flags, "--output", str(folder), "--run_id", "run"]) == 0
    return folder / "run"


def test_a_runs_texts_are_drafted_and_learned(run, capsys):
    assert benchmark_memory.main(["--run", str(run), *SMALL, "--num_top_tokens", "0,4"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(" 0 candidates: draft ")
    assert second.startswith(" 4 candidates: draft ")


def test_made_up_texts_need_no_run(capsys):
    assert benchmark_memory.main([*SMALL, "--vocabulary", "500", "--num_top_tokens", "2"]) == 0
    assert "per step" in capsys.readouterr().out


def test_each_text_has_its_own_distributions_and_noise_whatever_the_rows_order(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    table = pq.read_table(copy / "completions").sort_by([("sample_index", "descending")])
    is_first = pc.equal(table["prompt_id"], table["prompt_id"][0])
    table = table.filter(pc.invert(pc.and_(is_first, pc.equal(table["sample_index"], 0))))
    first, *others = sorted((copy / "completions").iterdir())
    for part in others:
        part.unlink()
    pq.write_table(table, first)

    asked = argparse.Namespace(run=str(copy), width=5, cap=4, tokenizer_name=None)
    workload = benchmark_memory.read_run(4, asked)

    finished = read_finished(str(copy))
    kept = read_distributions(str(copy), set(finished))
    drawn = {noise_key(0, p, i): (p, i) for p, samples in finished.items() for i in samples}
    num_completions, num_prompts, length = workload.texts.shape
    assert (num_completions, num_prompts) == (4, 5)
    used = set()
    for n in range(num_prompts):
        for c in range(num_completions):
            prompt_id, index = drawn[workload.keys[n][c]]
            used.add((prompt_id, index))
            assert workload.texts[c, n].tolist() == finished[prompt_id][index][:length]
            top = kept[prompt_id][index]
            assert np.array_equal(workload.ids[c, n], top.top_ids[:length])
            assert np.array_equal(workload.probs[c, n], top.top_probs[:length])
    # Of the prompt that lacks its first completion the second to the fifth.
    expected = {(p, i) for p, samples in finished.items() for i in sorted(samples)[:4]}
    assert used == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--num_top_tokens", "5"], "must hold 4 completions of 3 prompts"),
        (["--num_top_tokens", "0", "--width", "9"], "must hold 4 completions of 9 prompts"),
        (["--num_top_tokens", "4", "--cap", "30"], "each of 32 tokens or more"),
    ],
)
def test_a_run_that_holds_less_is_refused(run, capsys, monkeypatch, asked, message):
    monkeypatch.setattr(sys, "argv", ["", "--run", str(run), *SMALL, *asked])
    assert_refused("benchmark_memory", benchmark_memory.main, capsys, message)


def test_a_file_is_no_run(run, capsys, monkeypatch):
    part = next((run / "completions").iterdir())
    monkeypatch.setattr(sys, "argv", ["", "--run", str(part)])
    assert_refused("benchmark_memory", benchmark_memory.main, capsys, "has no run.json")
