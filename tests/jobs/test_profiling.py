# SPDX-License-Identifier: Apache-2.0
"""Tests of the profiling job: a tiny one end to end, its fits, what it refuses."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.power_law import Fit, fit_geometric, fit_power_law
from jobs.profiling import main
from jobs.profiling_report import COMPONENTS, write_table
from streaminator.engine import engine as engine_module
from streaminator.speculative.draft_budget import StepCosts
from streaminator.summary import PHASES
from tests.jobs.test_benchmark import make_inputs
from tests.programs import assert_refused

NUM_PROMPTS, NUM_COMPLETIONS = 5, 3
SMALL = ["--num_completions", str(NUM_COMPLETIONS), "--max_length", "24", "--stream_width", "3"]
SMALL += ["--num_speculative_tokens", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a tiny random model, a file less its suffix."""
    folder = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        # Else it would depend on the machine whether anything is drafted.
        patch.setattr(engine_module, "measure_step_costs", lambda *_, **__: StepCosts.free())
        assert main([*make_inputs(folder), *SMALL, "--output", str(folder / "out")]) == 0
    return folder / "out" / "profiling" / "model"


def load(profile: Path) -> dict[str, Any]:
    return json.loads(profile.with_suffix(".json").read_text())


def test_a_profile_leaves_tables_a_figure_and_numbers_and_no_run(profile: Path) -> None:
    names = sorted(path.name for path in profile.parent.iterdir())
    assert names == ["model.json", "model.md", "model.png"]
    assert [path.name for path in profile.parents[1].iterdir()] == ["profiling"]
    assert profile.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = profile.with_suffix(".md").read_text()
    assert f"{NUM_PROMPTS} prompts of questions.jsonl x {NUM_COMPLETIONS} completions" in text
    result = load(profile)
    assert result["device"] in text
    assert result["settings"]["max_length"] == 24
    assert list(result["runs"]) == ["speculation", "no-speculation", "static"]


def test_nothing_names_a_place_of_this_machine(profile: Path) -> None:
    text = "".join(profile.with_suffix(suffix).read_text() for suffix in (".md", ".json"))
    assert str(profile.parents[2]) not in text
    assert str(Path(__file__).parents[2]) not in text


def test_the_components_are_the_phases_of_a_step_and_share_all_of_the_time(profile: Path) -> None:
    assert (*PHASES, "other") == COMPONENTS
    for run in load(profile)["runs"].values():
        assert list(run["shares"]) == list(COMPONENTS)
        assert sum(run["shares"].values()) == pytest.approx(1, abs=1e-5)
        assert min(run["shares"].values()) >= 0
        assert run["shares"]["forward"] > 0


def test_every_run_draws_the_same_completions(profile: Path) -> None:
    result = load(profile)
    assert result["num_differing"] == 0
    runs = list(result["runs"].values())
    assert {run["num_completions"] for run in runs} == {NUM_PROMPTS * NUM_COMPLETIONS}
    assert len({run["num_tokens"] for run in runs}) == 1


def test_static_batching_fills_no_more_of_the_stream_than_continuous(profile: Path) -> None:
    runs = load(profile)["runs"]
    assert runs["static"]["utilization"] < runs["speculation"]["utilization"] <= 1
    for run in runs.values():
        curve = run["over_steps"]
        assert len(curve["step"]) == len(curve["blocks"]) == run["num_steps"]
        assert 0 < max(curve["utilization"]) <= 1
        assert max(curve["blocks"]) == run["most_blocks"]
        mean = sum(curve["utilization"]) / run["num_steps"]
        assert mean == pytest.approx(run["utilization"], abs=1e-3)


def test_accepted_tokens_are_counted_once_per_slot_step_with_a_draft(profile: Path) -> None:
    result = load(profile)
    run, counts = result["runs"]["speculation"], result["accepted"]["counts"]
    accepted = sum(int(value) * num for value, num in counts.items())
    # Each slot-step adds a token beside those it accepts, unless one of them ends the completion.
    assert 0 < accepted < run["num_tokens"]
    assert max(map(int, counts)) <= 4
    no_speculation = result["runs"]["no-speculation"]
    assert no_speculation["acceptance_rate"] is None
    assert no_speculation["tokens_per_slot_step"] == 1


def test_without_an_accepted_pair_there_is_nothing_to_fit(tmp_path: Path) -> None:
    flags = [*make_inputs(tmp_path), *SMALL, "--num_speculative_tokens", "1"]
    flags += ["--speculator", "ngram", "--run_id", "one", "--output", str(tmp_path / "out")]
    assert main(flags) == 0
    result = load(tmp_path / "out" / "profiling" / "one")
    assert result["accepted"]["power_law"] is None
    assert "nothing to fit" in write_table(result)


@pytest.mark.parametrize("exponent", [1.6, 2.5, 4.0])
def test_the_power_law_of_a_sample_is_found(exponent: float) -> None:
    sample = np.random.default_rng(0).zipf(exponent, 20_000)
    sample = sample[sample < 100_000]  # the fit lists the chance of every value below the largest
    fit, other = both(Counter(sample.tolist()))
    # The values cut off would move the exponent by less than this.
    assert fit.parameter == pytest.approx(exponent, abs=4 * fit.standard_error + 0.01)
    assert fit.standard_error < 0.05
    assert fit.distance < 0.02 < other.distance
    assert fit.log_likelihood > other.log_likelihood


def test_a_sample_that_follows_no_power_law_is_told_apart() -> None:
    sample = np.random.default_rng(0).geometric(0.3, 20_000)
    fit, other = both(Counter(sample.tolist()))
    assert other.parameter == pytest.approx(0.3, abs=4 * other.standard_error)
    assert other.distance < 0.02 < fit.distance
    assert other.log_likelihood > fit.log_likelihood + 0.05


def test_the_likelihood_is_the_distributions_own_and_the_largest() -> None:
    counts = {0: 50, 1: 60, 2: 20, 3: 11, 7: 4}
    fit, _ = both(counts)
    assert len(fit.chances) == 7
    own = sum(n * math.log(fit.chances[x - 1]) for x, n in counts.items() if x) / 95
    assert own == pytest.approx(fit.log_likelihood)
    whole_numbers = np.arange(1.0, 1_000_000)
    for exponent in (2.0, fit.parameter - 0.05, fit.parameter + 0.05):
        zeta = (whole_numbers**-exponent).sum()
        other = sum(n * math.log(x**-exponent / zeta) for x, n in counts.items() if x) / 95
        assert other < fit.log_likelihood < other + 0.1


@pytest.mark.parametrize("counts", [{}, {0: 5}, {0: 5, 1: 9}])
def test_no_value_above_one_has_no_fit(counts: dict[int, int]) -> None:
    assert fit_power_law(counts) is None
    assert fit_geometric(counts) is None


def both(counts: dict[int, int]) -> tuple[Fit, Fit]:
    power, geometric = fit_power_law(counts), fit_geometric(counts)
    assert power
    assert geometric
    return power, geometric


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no_spec_decoding"], "--no_spec_decoding: the job runs with speculation and without"),
        (["--no_continuous_batching"], "--no_continuous_batching: the job runs both kinds"),
        (["--warm_start", "x"], "--warm_start: the job's runs start cold; leave it out"),
        (["--profile"], "--profile: the job's runs are temporary; give it to jobs.sample"),
        (["--num_workers", "2"], "unknown flag --num_workers"),
        (["--output", "/dev/null/x"], "--output /dev/null/x/profiling: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["profiling", *flags])
    assert_refused("profiling", main, capsys, message)
