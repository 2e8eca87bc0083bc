# SPDX-License-Identifier: Apache-2.0
"""Tests of the memory's benchmark: made-up texts and a run's, and folders that hold too little."""

import pytest

from jobs import benchmark_memory, sample

SMALL = ["--width", "3", "--cap", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """Four completions of each of five bundled problems, with the model's four likeliest tokens."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--num_samples", "5", "--num_completions", "4", "--max_length", "24"]
    flags += ["--store_distributions", "--num_top_tokens", "4"]
    flags += ["--device", "cpu", "--num_workers", "0"]
    assert sample.main([*flags, "--output", str(folder), "--run_id", "run"]) == 0
    return str(folder / "run")


def test_a_runs_texts_are_drafted_and_learned(run, capsys):
    assert benchmark_memory.main(["--run", run, *SMALL, "--num_top_tokens", "0,4"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(" 0 candidates: draft ")
    assert second.startswith(" 4 candidates: draft ")


def test_made_up_texts_need_no_run(capsys):
    assert benchmark_memory.main([*SMALL, "--vocabulary", "500", "--num_top_tokens", "2"]) == 0
    assert "per step" in capsys.readouterr().out


@pytest.mark.parametrize("asked", [["--num_top_tokens", "5"], ["--width", "9"], ["--cap", "30"]])
def test_a_run_that_holds_less_is_refused(run, capsys, asked):
    with pytest.raises(SystemExit) as refused:
        benchmark_memory.main(["--run", run, *SMALL, "--num_top_tokens", "4", *asked])
    assert refused.value.code == 2
    assert f"error: {run}: must hold" in capsys.readouterr().err
