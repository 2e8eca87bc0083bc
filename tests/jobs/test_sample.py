# SPDX-License-Identifier: Apache-2.0
"""The main job as a person runs it: rows, resuming, switches that change no token, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs.sample import main
from streaminator.cli import main_program
from streaminator.speculative.memory import Memory
from tests import outputs

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
SMALL = ["--num_samples", "5", "--num_completions", "3", "--max_length", "24", "--num_workers", "0"]
TOKENS = f"{outputs.TOKENS}, cumulative_logprob, is_correct"


def rows(output: Path, columns: str = TOKENS) -> list[tuple]:
    return outputs.rows(output, columns)


def draw(output: Path, *flags: str) -> list[tuple]:
    assert main([*SMALL, "--output", str(output), *flags]) == 0
    return rows(output)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> list[tuple]:
    return draw(tmp_path_factory.mktemp("undisturbed"), "--stream_width", "4")


def start(output: Path, *flags: str) -> subprocess.Popen:
    """The job in a process of its own, whose rows reach the disk at once."""
    code = (
        "import signal, sys, streaminator.session as session, jobs.sample as job\n"
        # A shell ignores it for what it starts in the background, these tests perhaps.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from streaminator.cli import main_program\n"
        "session._PART_SECONDS = 0\n"
        "sys.exit(main_program('job', job.main))"
    )
    command = [sys.executable, "-c", code, *SMALL, "--stream_width", "1", "--output", str(output)]
    return subprocess.Popen([*command, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for_parts(output: Path, process: subprocess.Popen, num: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(output.glob("*/completions/*.parquet"))) < num:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no rows appeared"
        time.sleep(0.01)


def test_every_completion_is_there_once_and_the_table_tells_where(tmp_path, capsys):
    drawn = draw(tmp_path)
    assert len(drawn) == 15
    assert len({row[:2] for row in drawn}) == 15
    out = capsys.readouterr().out
    assert "pass@1" in out
    assert "acceptance rate" in out
    assert str(tmp_path) in out
    steps = duckdb.sql(
        f"SELECT sum(num_new_tokens) FROM '{tmp_path}/*/steps/*.parquet'"
    ).fetchall()[0]
    tokens = rows(tmp_path, "prompt_id, sample_index, num_completion_tokens")
    assert steps == (sum(row[2] for row in tokens),)


def test_the_same_command_draws_nothing_twice(tmp_path, undisturbed, capsys):
    draw(tmp_path)
    parts = sorted(tmp_path.glob("*/completions/*.parquet"))
    assert draw(tmp_path) == undisturbed
    assert sorted(tmp_path.glob("*/completions/*.parquet")) == parts
    assert "15 of them there already" in capsys.readouterr().err


def test_kill_9_anywhere_and_the_same_command_loses_and_changes_nothing(tmp_path, undisturbed):
    for num in (1, 4, 9):
        process = start(tmp_path)
        wait_for_parts(tmp_path, process, num)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        process.stderr.close()
    num_before = len(rows(tmp_path))
    assert 9 <= num_before < 15
    assert draw(tmp_path) == undisturbed


def test_a_resumed_run_learns_from_the_stored_distributions(tmp_path, undisturbed, monkeypatch):
    columns = "prompt_id, sample_index, top_ids, top_probs"
    draw(tmp_path, "--store_distributions")
    stored = rows(tmp_path, columns)
    [part] = tmp_path.glob("*/completions/*.parquet")
    table = pq.read_table(part)
    pq.write_table(table.filter(pc.field("sample_index") < 2), part)
    opened = []
    learn = Memory.open

    def note(self, prompt_id, prompt_token_ids, finished, distributions=()):
        opened.append([prompt_id, *(d.top_ids.tolist() for d in distributions)])
        learn(self, prompt_id, prompt_token_ids, finished, distributions)

    monkeypatch.setattr(Memory, "open", note)
    assert draw(tmp_path) == undisturbed
    resumed = [row for row in opened if row[0]]  # the warm-up's prompt has no name
    done = [row[:3] for row in stored if row[1] < 2]
    both = zip(done[::2], done[1::2], strict=True)
    assert sorted(resumed) == [[name, first, second] for (name, _, first), (_, _, second) in both]
    # This time the flag was off: the columns are there, and null.
    assert rows(tmp_path, columns) == [(*r[:2], None, None) if r[1] == 2 else r for r in stored]


def test_a_terminal_that_goes_away_ends_no_run(tmp_path, undisturbed):
    process = start(tmp_path)
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert rows(tmp_path) == undisturbed


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_run_folder_that_cannot_be_held_is_one_line(tmp_path, capsys, is_folder):
    if is_folder:
        (tmp_path / "r" / ".lock").mkdir(parents=True)
    else:
        (tmp_path / "r").symlink_to("/nowhere/at/all")
    code, line = run_main(capsys, *SMALL, "--output", str(tmp_path), "--run_id", "r")
    assert code == 1
    assert f"{tmp_path / 'r'}: cannot be written" in line


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_its_rows_written(tmp_path, undisturbed, sent, code):
    process = start(tmp_path)
    wait_for_parts(tmp_path, process, 2)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.splitlines()[-1].endswith("the same command resumes")
    assert "Traceback" not in err
    assert len(rows(tmp_path)) >= 2
    assert draw(tmp_path) == undisturbed


def test_a_second_process_cannot_write_the_same_run(tmp_path, capsys):
    process = start(tmp_path, "--run_id", "r")
    wait_for_parts(tmp_path, process, 1)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        code = run_main(capsys, *SMALL, "--output", str(tmp_path), "--run_id", "r")
    finally:
        process.kill()
        process.communicate(timeout=30)
    assert code[0] == 2
    assert "another process is writing this run" in code[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--no_spec_decoding"],
        ["--num-speculative-tokens", "1"],
        ["--num_top_tokens", "0", "--no_shared_memory"],
        ["--no_prompt_training"],
        ["--store_distributions"],
        ["--speculator", "ngram"],
        ["--speculator", "ngram", "--num_speculative_tokens=8", "--ngram_order", "4"],
        ["--speculator", "ngram", "--no_generation_training", "--ngram_order", "2"],
        ["--stream_width", "1"],
        ["--stream_width", "3"],
        ["--no_kv_cache"],
        ["--no-continuous-batching", "--stream_width", "3"],
        ["--no_kv_cache", "--no_continuous_batching", "--no_spec_decoding"],
        ["--max_batched_tokens", "7"],
        ["--num_blocks", "21"],
        ["--kv_memory", "0.003"],
        ["--in_flight_per_prompt", "auto", "--stream_width", "40"],
    ],
    ids=" ".join,
)
def test_a_switch_changes_speed_and_no_token(tmp_path, undisturbed, flags):
    assert draw(tmp_path, *flags) == undisturbed


def test_a_width_left_to_the_program_is_told_and_recorded(tmp_path, undisturbed, capsys):
    assert main([*SMALL, "--output", str(tmp_path), "--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["stream_width"], shown["num_workers"]) == ("auto", 0)
    assert draw(tmp_path) == undisturbed
    told = capsys.readouterr()
    assert "stream width 5;" in told.err  # as many slots as prompts
    assert re.search(r"stream width +5\n", told.out)
    [file] = tmp_path.glob("*/run.json")
    record = json.loads(file.read_text())
    assert record["settings"]["stream_width"] is None
    [worker] = record["attempts"][0]["workers"].values()
    assert worker["stream_width"] == 5
    assert worker["layers"].startswith(("fused", "not fused"))


def test_layers_that_stay_plain_differ_in_rounding_only(tmp_path, undisturbed):
    for plain, packed in zip(draw(tmp_path, "--no_packed_linear"), undisturbed, strict=True):
        assert plain[:5] == packed[:5]
        assert plain[5] == pytest.approx(packed[5], rel=1e-4)


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.cluster), 2])
def test_ray_workers_change_no_token(tmp_path, undisturbed, num_workers):
    flags = [*SMALL[:-1], str(num_workers), "--output", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "jobs.sample", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path) == undisturbed
    query = "SELECT prompt_id, count(DISTINCT worker_id) FROM '{}' GROUP BY 1"
    workers = duckdb.sql(query.format(f"{tmp_path}/*/completions/*.parquet")).fetchall()
    assert all(num == 1 for _, num in workers)


def test_completions_of_a_prompt_never_overlap_in_time(tmp_path):
    draw(tmp_path, "--stream_width", "4")
    outputs.assert_no_overlap(tmp_path)


def test_the_library_front_draws_the_same(tmp_path, undisturbed):
    flags = [*SMALL[:-2], "--output", str(tmp_path)]
    program = Path(sys.executable).parent / "streaminator"
    result = subprocess.run(
        [program, "sample", *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path) == undisturbed


def test_toml_lies_under_the_flags_and_dry_run_shows_the_result(tmp_path, capsys):
    file = tmp_path / "job.toml"
    file.write_text(
        'seed = 7\nstream-width = 3\nstop = ["x", "y"]\nstop_token_ids = 5\ntop_p = 1\n'
    )
    assert main(["--config", str(file), "--seed", "9", "--dry_run", "--output", "/never"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["seed"], shown["stream_width"], shown["stop"]) == (9, 3, ["x", "y"])
    assert shown["stop_token_ids"] == [5]
    assert shown["device"] in ("cpu", "cuda")
    assert main(["--dry_run", "--run_id", "mine"]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == "mine"
    assert next(iter(shown)) == "run_id"
    assert shown["run_id"].startswith("demo-")


def test_speculators_that_learn_from_completions_climb_and_prompt_only_stays_flat(tmp_path):
    flags = ["--num_samples", "32", "--num_completions", "6", "--max_length", "96"]
    flags += ["--num_speculative_tokens", "1", "--speculator", "ngram", "--ngram_order", "2"]

    def acceptance(name: str, *more: str) -> list[float]:
        draw(tmp_path / name, *flags, *more)
        query = f"""SELECT sum(num_accepted_tokens) / nullif(sum(num_draft_tokens), 0)
            FROM '{tmp_path / name}/*/completions/*.parquet'
            GROUP BY sample_index ORDER BY sample_index"""
        return [row[0] for row in duckdb.sql(query).fetchall()]

    prompt_only = acceptance("prompt", "--no_generation_training")
    generations = acceptance("generations", "--no_prompt_training")
    both = acceptance("both")
    assert max(prompt_only) - min(prompt_only) < 0.05
    assert generations[0] is None  # nothing learned, nothing drafted
    assert min(generations[1:]) > max(prompt_only)
    assert both[1] > both[0] + 0.05
    assert sum(both[3:]) / 3 > both[1]


def test_the_memory_accepts_far_more_than_the_bigram(tmp_path):
    flags = ["--num_samples", "32", "--num_completions", "6", "--max_length", "96"]
    flags += ["--stream_width", "4"]  # so narrow that many drafts pay on any machine
    query = "SELECT sum(num_completion_tokens) / sum(num_steps) FROM '{}/*/completions/*.parquet'"

    def tokens_per_step(name: str, *more: str) -> float:
        draw(tmp_path / name, *flags, *more)
        return duckdb.sql(query.format(tmp_path / name)).fetchall()[0][0]

    bigram = tokens_per_step("bigram", "--speculator", "ngram", "--ngram_order", "2")
    assert tokens_per_step("memory", "--speculator", "memory") > 1.3 * bigram


def test_a_prompt_longer_than_the_context_fails_alone_and_says_why(tmp_path):
    problems = tmp_path / "problems.jsonl"
    questions = ["Tom has 3 apples and buys 2. How many apples has he?", "apples " * 3000]
    problems.write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    drawn = tmp_path / "out"
    draw(drawn, "--dataset", str(problems), "--num_completions", "2")
    result = sorted(rows(drawn, "length(question) > 1000, sample_index, finish_reason, error"))
    assert [row[2] for row in result[:2]] != ["failed", "failed"]
    assert all(row[2] == "failed" and "context" in row[3] for row in result[2:])


def run_main(capsys, *flags: str) -> tuple[int, str]:
    """Exit code and the last line of stderr."""
    capsys.readouterr()
    argv, sys.argv = sys.argv, ["job", *flags]
    try:
        code = main_program("job", main)
    finally:
        sys.argv = argv
    return code, capsys.readouterr().err.strip().split("\n")[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--strem_width", "3"], ["--strem_width", "--stream_width"]),
        (["--stream_width", "0"], ["--stream_width 0"]),
        (["--num_completions", "0"], ["--num_completions 0"]),
        (["--temperature", "warm"], ["--temperature", "warm"]),
        (["--top_p", "0"], ["--top_p 0"]),
        (["--config", "missing.toml"], ["missing.toml"]),
        (["--config", "typo.toml"], ["typo.toml", "'sede'", "seed"]),
        (["--model_name", "folder"], ["folder", "config.json"]),
        (["--model_name", "./nowhere"], ["./nowhere", "no such folder"]),
        (["--model_name", "encoder"], ["encoder", "t5", "causal"]),
        (["--model_name", "remote"], ["remote", "--trust_remote_code"]),
        (["--tokenizer_name", "folder"], ["folder", "--tokenizer_name"]),
        (["--dataset", "missing.jsonl"], ["missing.jsonl"]),
        (["--dataset", "empty.jsonl"], ["empty.jsonl"]),
        (["--dataset", "rows.jsonl"], ["rows.jsonl", "line 2", "--question_column"]),
        (["--dataset", "rows.jsonl", "--question_column", "ask"], ["rows.jsonl", "ask"]),
        (["--output", "rows.jsonl"], ["--output", "rows.jsonl"]),
        (["--device", "cuda:63"], ["cuda:63", "cpu"]),
        (["--device", "toaster"], ["toaster", "cpu"]),
        (["--no_prompt_training", "--no_generation_training"], ["--no_spec_decoding"]),
        (["--store_distributions", "--num_top_tokens", "0"], ["--store_distributions"]),
        (["--address", "127.0.0.1:1"], ["--address", "--num_workers 0"]),
        (["--grader", "nowhere:f"], ["nowhere:f"]),
        (["--stop_when_settled", "0.9", "--grader", "none"], ["--stop_when_settled", "--grader"]),
        (["--warm_start", "nowhere"], ["--warm_start nowhere", "no run"]),
        (["--warm_start", "r", "--no_spec_decoding"], ["--warm_start"]),
        (["--stop_when_settled", "1"], ["--stop_when_settled 1.0"]),
        (["--kv_memory", "1", "--num_blocks", "99"], ["--kv_memory", "--num_blocks"]),
        (["--in_flight_per_prompt", "0"], ["--in_flight_per_prompt 0", "auto"]),
        (
            ["--in_flight_per_prompt", "2", "--stop_when_settled", "0.9"],
            ["--in_flight_per_prompt", "--stop_when_settled"],
        ),
        (["--metadata_columns", "text"], ["--metadata_columns text"]),
        (["--run_id", "../up"], ["--run_id"]),
        (["--num_blocks", "4"], ["--num_blocks 4", "need"]),
        (["--run_id", "x" * 300], ["--run_id", "200 bytes"]),
        (["--temperature", "inf"], ["--temperature inf"]),
        (["--kv_memory", "inf"], ["--kv_memory inf"]),
        (["--stop", "\udcff"], ["--stop", "UTF-8"]),
        (["--stop_token_ids", "-1"], ["--stop_token_ids -1"]),
        (["--num_completions", "1000000000"], ["--num_completions 1000000000"]),
        (["--stream_width", "100000000"], ["--stream_width 100000000"]),
        (["--speculator_memory", "100000000"], ["--speculator_memory 100000000"]),
        (["--config", "kind.toml"], ["kind.toml", "stop_token_ids", "int"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input_gets_one_line_exit_2_and_writes_nothing(
    tmp_path, monkeypatch, capsys, flags, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, config in {
        "encoder": {"model_type": "t5"},
        "remote": {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config"}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "typo.toml").write_text("sede = 1\n")
    (tmp_path / "kind.toml").write_text('stop_token_ids = "x"\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?"}\n{"q": "2 + 2?"}\n')
    before = sorted(tmp_path.rglob("*"))
    code, line = run_main(capsys, *SMALL, *flags)
    assert code == 2
    assert all(word in line for word in words), line
    assert len(line) < 400
    assert sorted(tmp_path.rglob("*")) in (before, sorted([*before, tmp_path / "results"]))


def test_memory_that_holds_no_completion_is_refused_and_more_goes_on(tmp_path, undisturbed, capsys):
    code, line = run_main(capsys, *SMALL, "--output", str(tmp_path), "--kv_memory", "0.0001")
    assert code == 2
    assert "--kv_memory 0.0001" in line
    assert "needs 0." in line
    assert draw(tmp_path, "--kv_memory", "0.003") == undisturbed
    assert "keys and values 0.003 GiB" in capsys.readouterr().err


def test_a_run_id_of_other_settings_is_refused_with_the_differences(tmp_path, capsys):
    draw(tmp_path, "--run_id", "r")
    flags = [*SMALL, "--output", str(tmp_path), "--run_id", "r", "--seed", "1", "--top_k", "5"]
    code, line = run_main(capsys, *flags)
    assert code == 2
    assert "seed: recorded 0, now 1" in line
    assert "top_k: recorded 0, now 5" in line
    assert len(rows(tmp_path)) == 15


def test_a_grader_that_raises_costs_its_grades_and_not_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "picky.py").write_text(
        "def grade(text, gold):\n    assert len(text) % 2, 'even'\n    return True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    draw(tmp_path / "out", "--grader", "picky:grade")
    graded = rows(
        tmp_path / "out", "prompt_id, sample_index, length(text), is_correct, grader_error"
    )
    assert len(graded) == 15
    assert all((row[3] is None) == (row[2] % 2 == 0) for row in graded)
    assert all(row[4] == "raised AssertionError: even" for row in graded if row[3] is None)
    assert "x the grader raised AssertionError: even" in capsys.readouterr().out


@pytest.mark.ray
def test_a_ray_that_does_not_answer_is_named(capsys):
    code, line = run_main(capsys, "--address", "127.0.0.1:1")
    assert code == 2
    assert "--address 127.0.0.1:1" in line


def test_wandb_gets_the_series_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    draw(tmp_path / "out", "--use_wandb")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real GSM8K and models at {SHARED}")
@pytest.mark.parametrize("model", ["stories260K", "gsm8k-llama-7m"])
def test_other_checkpoints_run_on_real_gsm8k(tmp_path, model):
    flags = ["--model_name", str(SHARED / "models" / model)]
    drawn = draw(tmp_path, "--dataset", str(SHARED / "gsm8k" / "test.jsonl"), *flags)
    assert len(drawn) == 15
    assert all(row[6] is not None for row in drawn)
