# SPDX-License-Identifier: Apache-2.0
"""Tests of the demo model's training script."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.train_demo_model import main, pass_at, prompt_text, train_tokenizer
from jobs.word_problems import generate

SMALL = ["--batch-size", "4", "--hidden-size", "64", "--layers", "1", "--threads", "1"]


def test_a_short_run_leaves_a_loadable_model(tmp_path: Path) -> None:
    output = tmp_path / "model"
    options = ["--steps", "5", "--held-out", "4", "--samples", "2", "--output", str(output)]
    assert main([*options, *SMALL]) == 0

    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    problems = [json.loads(line) for line in (output / "problems.jsonl").read_text().splitlines()]
    assert len(problems) == 4
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problems[0]["question"]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]

    record = json.loads((output / "training.json").read_text())
    assert record["steps"] == 5
    assert record["parameters"] == model.num_parameters()
    assert {"training_loss", "held_out_loss", "pass@1", "pass@2", "seed", "seconds"} <= set(record)
    for file in output.glob("*.json"):
        assert str(tmp_path) not in file.read_text()


def test_chat_template_and_digits() -> None:
    tokenizer = train_tokenizer(list(generate(100, seed=0)), vocabulary=400)
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "What is 12 + 7?"}
    assistant = {"role": "assistant", "content": "12 + 7 = 19.\n#### 19"}

    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt == prompt_text("What is 12 + 7?") == "<|user|>What is 12 + 7?\n<|assistant|>"
    whole = tokenizer.apply_chat_template([system, user, assistant], tokenize=False)
    assert whole == (
        "<|user|>Be brief.\nWhat is 12 + 7?\n<|assistant|>12 + 7 = 19.\n#### 19<|endoftext|>"
    )
    ids = tokenizer(whole).input_ids
    assert tokenizer.decode(ids) == whole
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert all(len(piece) == 1 for piece in pieces if any(letter.isdigit() for letter in piece))


def test_pass_at_k_is_unbiased() -> None:
    assert pass_at(1, 8, 2) == pytest.approx(0.25)
    assert pass_at(2, 4, 1) == pytest.approx(0.5)
    assert pass_at(8, 8, 0) == 0.0
    assert pass_at(8, 8, 1) == 1.0


def test_unusable_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "--steps must be at least 1" in capsys.readouterr().err
