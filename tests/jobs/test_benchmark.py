# SPDX-License-Identifier: Apache-2.0
"""Tests of the benchmark: what it prints, that it compares like with like, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from jobs import random_model
from jobs.benchmark import main
from jobs.benchmark_measure import Measured
from jobs.engines.own import PHASES
from jobs.engines.protocol import Run, cut
from jobs.engines.registry import DEFAULT
from streaminator.cli import main_program
from tests.fakes import CONTEXT, save_model
from tests.programs import assert_refused

ROOT = Path(__file__).parents[2]
TEXT = "how many apples pears plums are left when two of ten nine eight were eaten ? : <eos>"
WORDS = TEXT.split()


def make_inputs(folder: Path) -> list[str]:
    """A tiny model with its tokenizer and a dataset; returns the flags that name them."""
    save_model(folder / "model", "Llama", dtype=torch.float32, eos_token_id=len(WORDS) - 1)
    save_tokenizer(folder / "model")
    questions = [
        f"how many {x} are left when {n} were eaten ?"
        for x, n in (
            ("apples", "two"),
            ("pears of ten", "nine"),
            ("plums", "eight of ten"),
            ("apples", "ten"),
            ("pears", "two of nine"),
        )
    ]
    lines = [json.dumps({"question": question, "answer": "2"}) for question in questions]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return ["--model_name", str(folder / "model"), "--dataset", str(folder / "questions.jsonl")]


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="?")
    tokenizer.save_pretrained(folder)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, dict[str, Any]]:
    """The program in this process: its exit code and its last line."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    code = main_program("benchmark", main)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_last_line_is_the_whole_result(tmp_path: Path) -> None:
    flags = [*make_inputs(tmp_path), "--num_completions", "3", "--stream_width", "4"]
    flags += ["--max-length", "24", "--repeats", "2", "--temperature", "0.5", "--device", "cpu"]
    # How much the memory drafts depends on the machine.
    flags += ["--speculator", "ngram", "--json_out", str(tmp_path / "result.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.benchmark", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.splitlines()
    result = json.loads(line)
    assert (tmp_path / "result.json").read_text() == line + "\n"
    assert any(row.startswith("speculative/plain ") for row in table)

    assert result["model_type"] == "llama"
    assert result["num_parameters"] > 0
    assert (result["dtype"], result["device"], result["num_threads"]) == ("float32", "cpu", 1)
    assert (result["num_prompts"], result["stream_width"], result["repeats"]) == (5, 4, 2)
    assert set(result["versions"]) == {"python", "torch", "transformers"}
    assert result["cpu"]
    assert result["settings"]["max_length"] == 24
    assert result["outputs"] == {
        "num_completions": 15,
        "compared_with": "plain",
        "differing": {"plain": 0, "speculative": 0},
    }
    assert (result["reference"], result["failed"]) == ("transformers", {})
    assert list(result["ratios"]) == [
        "speculative/plain",
        "plain/transformers",
        "speculative/transformers",
    ]
    for ratio in result["ratios"].values():
        assert len(ratio["values"]) == 2
        assert min(ratio["values"]) > 0
    assert list(result["engines"]) == list(DEFAULT)
    for name, engine in result["engines"].items():
        assert engine["tokens_per_second"] > 0
        assert engine["tokens_per_step"] > 0
        assert 0 < engine["occupancy"] <= 1
        assert 0 <= engine["padded_waste"] < 1
        assert len(engine["runs"]) == 2
        assert engine["check"]["is_correct"], engine["check"]
        assert set(engine["versions"]) >= {"torch", "transformers"}
        assert (engine["acceptance_rate"] is not None) == (name == "speculative")
        if name == "transformers":
            assert engine["phases"] is engine["roofline"] is None
        else:
            assert list(engine["phases"]) == [*PHASES, "other"]
            assert sum(engine["phases"].values()) == pytest.approx(1)
            assert min(engine["phases"].values()) >= 0
            assert engine["roofline"]["bytes_per_step"] > 0
            assert engine["roofline"]["share"] > 0


def test_siblings_fill_slots_that_strict_affinity_leaves_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*make_inputs(tmp_path), "--num_samples", "2", "--num_completions", "4"]
    flags += ["--widths", "8", "--max_length", "24", "--repeats", "1", "--device", "cpu"]
    names = ["plain", "memory", "plain-siblings", "memory-siblings"]
    code, result = run(monkeypatch, capsys, *flags, "--engines", ",".join(names))
    assert code == 0
    assert result["num_prompts"] == 2
    assert result["outputs"]["differing"] == dict.fromkeys(names, 0)
    engines = result["engines"]
    assert max(engines[name]["occupancy"] for name in names[:2]) <= 2 / 8
    assert min(engines[name]["occupancy"] for name in names[2:]) > 2 / 8
    assert "memory-siblings/memory" in result["ratios"]


def test_greedy_completions_are_those_of_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*make_inputs(tmp_path), "--num_completions", "2", "--stream_width", "3"]
    flags += ["--temperature", "0", "--dtype", "float64", "--max_length", "40", "--repeats", "1"]
    flags += ["--speculator", "ngram"]
    code, result = run(monkeypatch, capsys, *flags)
    assert code == 0
    assert result["outputs"]["num_completions"] == 10
    assert result["outputs"]["differing"] == dict.fromkeys(DEFAULT, 0)
    assert [e["check"]["num_ties"] for e in result["engines"].values()] == [0, 0, 0]
    num_tokens = {engine["runs"][0]["num_tokens"] for engine in result["engines"].values()}
    assert len(num_tokens) == 1
    assert result["engines"]["speculative"]["acceptance_rate"] > 0


def test_random_weights_draw_to_the_full_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = random_model.SIZES["100m"] | {"num_hidden_layers": 1, "hidden_size": 48}
    monkeypatch.setitem(random_model.SIZES, "100m", small | {"intermediate_size": 64})
    monkeypatch.setattr(random_model, "MIN_VOCABULARY", 32)
    flags = [*make_inputs(tmp_path), "--num_completions", "2", "--stream_width", "4"]
    flags += ["--random_model", "100m", "--max_length", "6", "--repeats", "1"]
    code, result = run(monkeypatch, capsys, *flags)
    assert code == 0
    assert result["model"] == "random-llama-100m"
    assert result["settings"]["ignore_eos"]
    for engine in result["engines"].values():
        assert engine["runs"][0]["num_tokens"] == 5 * 2 * 6
        assert engine["padded_waste"] == 0


def test_a_random_model_is_saved_with_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_model, "MIN_VOCABULARY", 32)
    monkeypatch.setitem(random_model.SIZES["100m"], "num_hidden_layers", 1)
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        random_model.save_random_llama(tmp_path / name, tokenizer, "100m")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert first.config.vocab_size == 32
    assert first.config.eos_token_id == len(WORDS) - 1
    assert AutoTokenizer.from_pretrained(tmp_path / "a").get_vocab() == tokenizer.get_vocab()
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_changed_token_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(programs, load, draw, *, repeats):
        tokens = {"plain": [1, 2], "speculative": [1, 3], "transformers": [1, 2]}
        runs = {
            name: [Run(completions=[[ids] * draw.num_completions for _ in draw.prompts], seconds=1)]
            for name, ids in tokens.items()
        }
        return Measured(runs=runs)

    monkeypatch.setattr("jobs.benchmark.measure", measure)
    flags = ["--repeats", "1", "--num_completions", "2", "--max_length", "2"]
    code, result = run(monkeypatch, capsys, *make_inputs(tmp_path), *flags)
    assert code == 1
    assert result["outputs"]["differing"] == {"plain": 0, "speculative": 10}


def test_tokens_behind_the_end_are_not_counted() -> None:
    assert cut([4, 0, 0, 5], {0}) == [4, 0]
    assert cut([4, 5], {0}) == [4, 5]
    assert cut([4, 5], set()) == [4, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "--repeats 0: must be 1 or more"),
        (["--engines", "plain,vlm"], "--engines vlm: must be of plain, speculative, ngram"),
        (["--engines", "no/such.py"], "--engines no/such.py: no such file"),
        (["--repeats", "x"], "--repeats x: must be a whole number"),
        (["--repeat", "2"], "unknown flag --repeat: did you mean --repeats?"),
        (["--random-modle", "100m"], "unknown flag --random_modle: did you mean --random_model?"),
        (["--random_model", "1b"], "--random_model: invalid choice: '1b'"),
        (["--num_workers", "2"], "unknown flag --num_workers"),
        (["--no_spec_decoding"], "--no_spec_decoding: the benchmark always runs"),
        (["--stop", "x"], "--stop: the benchmark compares tokens"),
        (["--json_out", "no/such/folder/x.json"], "--json_out no/such/folder/x.json: cannot be"),
        (["--max_length", "2000"], f"exceed the model's context of {CONTEXT}"),
        (["--stream_width", "0"], "--stream_width 0: must be between 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *make_inputs(tmp_path), *flags])
    capsys.readouterr()
    assert_refused("benchmark", main, capsys, message)
