# SPDX-License-Identifier: Apache-2.0
"""Tests of the acceptance study: a small one end to end, what it refuses, what it reports."""

import json
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest

from jobs import acceptance_rates
from jobs.acceptance_rates import VARIANTS, demo_problems, main
from jobs.train_demo_model import parse_arguments
from jobs.word_problems import split
from tests.jobs.test_benchmark import make_inputs
from tests.programs import assert_refused

NUM_PROMPTS, NUM_COMPLETIONS = 8, 2
SMALL = ["--num_samples", str(NUM_PROMPTS), "--num_completions", str(NUM_COMPLETIONS)]
SMALL += ["--num_speculative_tokens", "4", "--max_length", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study of the demo model; the folder of its results."""
    folder = tmp_path_factory.mktemp("study")
    assert main([*SMALL, "--temperatures", "0.8", "--output", str(folder)]) == 0
    return folder / "acceptance_rates"


def load(study: Path) -> dict[str, Any]:
    result = json.loads((study / "demo.json").read_text())
    assert list(result["temperatures"]) == ["0.8"]
    return result["temperatures"]["0.8"]


def test_a_study_leaves_a_table_a_figure_counts_and_a_record(study: Path) -> None:
    assert sorted(path.name for path in study.iterdir()) == [
        "demo.json",
        "demo.md",
        "demo.parquet",
        "demo.png",
    ]
    assert (study / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (study / "demo.png").stat().st_size < 100_000
    lines = (study / "demo.md").read_text().splitlines()
    for name, rates in load(study)["variants"].items():
        (line,) = (line for line in lines if line.startswith(f"| {name} | "))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert len(cells) == NUM_COMPLETIONS + 6
        assert all(cells)
        assert cells[:NUM_COMPLETIONS] == [f"{rate:.3f}" for rate in rates["by_generation"]]
    assert list(load(study)["variants"]) == list(VARIANTS)
    assert "differ between the variants: 0 of 16." in lines[-1]


def test_a_record_names_no_place_of_this_machine(study: Path) -> None:
    text = (study / "demo.json").read_text() + (study / "demo.md").read_text()
    assert str(study.parent) not in text
    assert str(Path(__file__).parents[2]) not in text


def test_the_counts_are_those_of_the_table(study: Path) -> None:
    rows = duckdb.sql(
        f"""SELECT variant, generation, sum(num_accepted) / sum(num_steps),
                   sum(num_completions), min(num_steps >= num_drafting)
            FROM '{study}/demo.parquet' WHERE max_draft = 1 GROUP BY ALL ORDER BY generation"""
    ).fetchall()
    assert len(rows) == len(VARIANTS) * NUM_COMPLETIONS
    variants = load(study)["variants"]
    for variant, generation, rate, num_completions, is_sound in rows:
        assert rate == pytest.approx(variants[variant]["by_generation"][generation - 1], abs=1e-4)
        assert num_completions == NUM_PROMPTS
        assert is_sound
    totals = duckdb.sql(
        f"""SELECT DISTINCT sum(num_tokens) FROM '{study}/demo.parquet'
            GROUP BY variant, max_draft"""
    ).fetchall()
    assert len(totals) == 1, "variants drew different numbers of tokens"


def test_trained_on_generations_acceptance_climbs_on_the_prompt_alone_it_does_not(
    study: Path,
) -> None:
    variants = load(study)["variants"]
    generations = variants["bigram, generations"]["by_generation"]
    assert generations[0] == 0
    assert min(generations[1:]) > 0.3
    prompt = variants["bigram, prompt"]["by_generation"]
    assert max(prompt) - min(prompt) < 0.1
    memory = variants["memory"]["by_generation"]
    assert memory[0] < memory[-1]
    assert variants["memory, warm start"]["by_generation"][0] > memory[0] + 0.1


def test_each_part_of_the_memory_can_be_taken_away(study: Path) -> None:
    variants = load(study)["variants"]
    rates = {tuple(variants[name]["by_generation"]) for name in VARIANTS}
    assert len(rates) == len(VARIANTS)


def test_any_model_and_dataset_can_be_studied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*make_inputs(tmp_path), *SMALL, "--max_length", "8", "--temperature", "1.5"]
    assert main([*flags, "--output", str(tmp_path), "--run_id", "tiny"]) == 0
    assert "## Temperature 1.5" in capsys.readouterr().out
    result = json.loads((tmp_path / "acceptance_rates" / "tiny.json").read_text())
    assert (result["model"], result["dataset"]) == ("model", "questions.jsonl")
    assert result["num_prompts"] == 5


def test_a_completion_that_differs_between_variants_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = acceptance_rates._run

    def broken(config, runner, tokenizer, prompts, variant, max_draft):
        run = draw(config, runner, tokenizer, prompts, variant, max_draft)
        if variant == "memory, no noise":
            run.outputs[prompts[0].prompt_id, 1] += (1,)
        return run

    monkeypatch.setattr(acceptance_rates, "_run", broken)
    flags = [*make_inputs(tmp_path), *SMALL, "--max_length", "4", "--temperatures", "1"]
    assert main([*flags, "--output", str(tmp_path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "temperature 1.0: 1 of 10 completions differ between variants" in last


def test_the_demo_model_never_saw_the_problems() -> None:
    trained = parse_arguments([])
    training, _ = split(trained.steps * trained.batch_size, trained.held_out, trained.seed)
    problems = {problem["question"] for problem in demo_problems(128)}
    assert len(problems) == 128
    assert problems.isdisjoint(problem["question"] for problem in training)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperatures", "0.8;1"], "--temperatures 0.8;1: must be numbers with commas"),
        (["--temperatures", "-1"], "temperature -1.0: must be 0 (greedy), or between"),
        (["--temperature", "0.8", "--temperatures", "1"], "--temperature with --temperatures"),
        (["--no_shared_memory"], "--no_shared_memory: the study varies it itself"),
        (["--speculator", "ngram"], "--speculator: the study varies it itself"),
        (["--no_spec_decoding"], "--no_spec_decoding: the study varies it itself"),
        (["--num_speculative_tokens", "1"], "--num_speculative_tokens 1: must be 2 or more"),
        (["--temprature", "1"], "unknown flag --temprature: did you mean --temperature?"),
        (["--num_workers", "2"], "unknown flag --num_workers"),
        (["--output", "/dev/null/x"], "--output /dev/null/x/acceptance_rates: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["study", *flags])
    assert_refused("study", main, capsys, message)
