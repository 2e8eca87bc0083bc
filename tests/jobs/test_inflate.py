# SPDX-License-Identifier: Apache-2.0
"""Tests of the inflated models: the same function in another shape, or nothing written."""

import shutil
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils import logging

from jobs.inflate import main
from jobs.inflate_check import check
from jobs.inflate_model import inflate, widened_config
from streaminator.cli import main_program
from streaminator.engine.checkpoint import DEMO_MODEL
from streaminator.errors import InputError
from tests.fakes import TOKENIZER, save_model

# The fakes' Llama has hidden size 32, 2 layers, 4 heads on 2 KV heads of width 8, MLP 48.
LARGER = {
    "hidden_size": 80,
    "num_layers": 5,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 24,
    "intermediate_size": 100,
}
ONE_AT_A_TIME = [{name: size} for name, size in LARGER.items() if name not in ("num_kv_heads",)]
MORE_KV_HEADS = {"num_heads": 8, "num_kv_heads": 4}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    # The program switches them off, but only before transformers is imported.
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def flags(shape: dict[str, int]) -> list[str]:
    return [word for name, size in shape.items() for word in (f"--{name}", str(size))]


def save_source(folder: Path, architecture: str = "Llama", **changes: Any) -> Path:
    save_model(folder, architecture, dtype=torch.float32, **changes)
    TOKENIZER.save_pretrained(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, source: Path, output: Path, *words: str) -> int:
    command = ["inflate", "--model", str(source), "--output", str(output), *words]
    monkeypatch.setattr(sys, "argv", command)
    return main_program("inflate", main)


def same_greedy_text(source: Any, big: Any, tokens: torch.Tensor, num_tokens: int) -> bool:
    texts = [
        model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )
        for model in (source, big)
    ]
    return torch.equal(*texts)


@pytest.mark.parametrize("shape", [*ONE_AT_A_TIME, MORE_KV_HEADS, LARGER], ids=str)
def test_a_llama_widened_anywhere_has_the_same_logits(tmp_path, shape):
    source = load(save_model(tmp_path, "Llama"), torch.float64)
    wanted = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
    } | shape
    big = inflate(source, widened_config(source.config, wanted), torch.float64)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(big(tokens).logits, source(tokens).logits, rtol=0, atol=1e-4)
    # transformers normalises in float32; the check does not, and is strict.
    assert "in float64" in check(source, big)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3_ROPE},
        {"num_key_value_heads": 4, "num_attention_heads": 4},
    ],
    ids=["tied", "biases", "llama3 rope", "no groups"],
)
def test_every_kind_of_llama_keeps_its_text_on_disk(tmp_path, monkeypatch, changes):
    source = save_source(tmp_path / "small", **changes)
    shape = LARGER | {"num_heads": 8, "num_kv_heads": 4}
    assert run(monkeypatch, source, tmp_path / "big", *flags(shape)) == 0
    small, big = load(source), load(tmp_path / "big")
    assert [getattr(big.config, n) for n in ("num_hidden_layers", "head_dim")] == [5, 24]
    assert big.config.tie_word_embeddings == small.config.tie_word_embeddings
    tokens = torch.arange(30).reshape(3, 10)
    with torch.no_grad():
        torch.testing.assert_close(big(tokens).logits, small(tokens).logits, rtol=0, atol=1e-4)
    assert same_greedy_text(small, big, tokens, 30)


def test_the_demo_model_keeps_its_text_and_tokenizer(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "big"
    shape = {"num_layers": 6, "intermediate_size": 640}
    words = ["--like", "smollm2-135m", *flags(shape)]
    assert run(monkeypatch, Path("demo"), folder, *words) == 0
    assert "M parameters in float32" in capsys.readouterr().out
    small, big = load(DEMO_MODEL), load(folder)
    assert big.config.hidden_size == 576
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Tom has 3 apples and buys 5 more. How many has he?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert same_greedy_text(small, big, prompt, 40)
    assert big.generation_config.eos_token_id == small.generation_config.eos_token_id


def test_bfloat16_weights_are_nearly_the_source(tmp_path, monkeypatch, capsys):
    source = save_source(tmp_path / "small")
    words = [*flags({"hidden_size": 96}), "--dtype", "bfloat16"]
    assert run(monkeypatch, source, tmp_path / "big", *words) == 0
    assert "rounded to bfloat16" in capsys.readouterr().out
    big = load(tmp_path / "big", "auto")  # pyright: ignore[reportArgumentType]
    assert big.dtype == torch.bfloat16
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = load(source)(tokens).logits
        difference = big.float()(tokens).logits - expected
    assert difference.std() < 0.05 * expected.std()


def test_a_model_that_computes_something_else_is_refused(tmp_path):
    source = load(save_model(tmp_path, "Llama"), torch.float64)
    wanted = {**LARGER, "num_layers": 3}
    big = inflate(source, widened_config(source.config, wanted), torch.float32)
    check(source, big)
    big.model.layers[2].mlp.down_proj.weight.data[0, 0] = 1.0
    with pytest.raises(InputError, match=r"not the source.*float32"):
        check(source, big)
    big = inflate(source, widened_config(source.config, wanted), torch.float32)
    for norm in (big.model.norm, big.model.layers[0].input_layernorm):
        norm.variance_epsilon = source.config.rms_norm_eps * 2
    with pytest.raises(InputError, match="not the source"):
        check(source, big)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hidden_size", "16"], "--hidden_size 16: the source has 32"),
        (["--num_layers", "1"], "--num_layers 1: the source has 2"),
        (["--num-kv-heads", "1"], "--num_kv_heads 1: the source has 2"),
        (["--intermediate_size", "47"], "--intermediate_size 47: the source has 48"),
        (["--num_heads", "5"], "--num_heads 5: must be a multiple of 2 KV heads"),
        (["--num_kv_heads", "4"], "give at least 8"),
        (["--hidden_size", "33"], "must be a multiple of 4 heads"),
        (["--head_dim", "12"], "--head_dim 12: must be a multiple of the source's 8"),
        (["--like", "gpt-5"], "--like"),
        (["--hiden_size", "64"], "--hiden_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_shape_that_does_not_fit_is_one_line(tmp_path, monkeypatch, capsys, words, said):
    source = save_source(tmp_path / "small")
    assert run(monkeypatch, source, tmp_path / "big", *words) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
    assert not (tmp_path / "big").exists()


def test_what_cannot_be_read_or_written_is_one_line(tmp_path, monkeypatch, capsys):
    def refused(source: Path, output: Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert run(monkeypatch, source, output) == 2
        assert sorted(tmp_path.rglob("*")) == before
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    llama = save_source(tmp_path / "llama")
    assert "a qwen2, not a Llama" in refused(
        save_source(tmp_path / "qwen", "Qwen2"), tmp_path / "out"
    )
    assert "no such folder" in refused(tmp_path / "nothing", tmp_path / "out")
    bare = save_model(tmp_path / "bare", "Llama", dtype=torch.float32)
    assert "no tokenizer" in refused(bare, tmp_path / "out")
    assert "not empty" in refused(llama, llama)
    assert "not empty" in refused(llama, llama / "config.json")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    assert "GB free" in refused(llama, tmp_path / "out")


def test_rotary_types_tied_to_the_head_width_are_refused_only_when_it_changes():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    source = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=48,
        rope_parameters=rope,
    )
    assert widened_config(source, {**LARGER, "head_dim": 8}).num_hidden_layers == 5
    with pytest.raises(InputError, match="type dynamic cannot be widened; give --head_dim 8"):
        widened_config(source, LARGER)
