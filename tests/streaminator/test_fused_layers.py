# SPDX-License-Identifier: Apache-2.0
"""Llama-like layers by compiled kernels: the same text as without, and the same in any batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from streaminator.config import EngineConfig, ModelConfig, SamplingParams, SpeculatorConfig
from streaminator.engine import compile_kernels, kernels
from streaminator.engine.compile_kernels import KernelsMissingError
from streaminator.engine.model_runner import ModelRunner
from tests.fakes import draw, make_engine, make_prompt, random_tokens, tokens

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
WIDE = {"hidden_size": 288, "intermediate_size": 288, "num_key_value_heads": 3, "head_dim": 96}
FUSED = {
    "Llama": transformers.LlamaConfig(**SIZES),
    "Llama, wide": transformers.LlamaConfig(**(SIZES | WIDE)),
    "Llama with biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "Qwen2": transformers.Qwen2Config(**(SIZES | {"head_dim": 64})),
    "Qwen3": transformers.Qwen3Config(**(SIZES | {"head_dim": 48})),
    "Mistral, window": transformers.MistralConfig(**(SIZES | {"head_dim": 16}), sliding_window=20),
}
OTHERS = {
    "Granite": transformers.GraniteConfig(**SIZES, residual_multiplier=0.5),
    "Llama, gelu": transformers.LlamaConfig(**SIZES, hidden_act="gelu"),
    "Llama, odd heads": transformers.LlamaConfig(**(SIZES | {"head_dim": 24})),
    "Gemma": transformers.GemmaConfig(**SIZES),
    "Ministral, which is told positions": transformers.Ministral3Config(**SIZES),
}
PROMPTS = [make_prompt(f"p{n}", random_tokens(n, seed=n), 3) for n in (3, 16, 17, 40, 61)]
SAMPLING = SamplingParams(temperature=0.8, max_length=24, seed=3)


def save(folder: Path, config: Any, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: str = "float32", **changes: Any) -> ModelRunner:
    return ModelRunner(ModelConfig(model_name=str(folder), dtype=dtype, device="cpu", **changes))


def sample(runner: ModelRunner, width: int = 4, **changes: Any) -> Any:
    engine = EngineConfig(stream_width=width, max_batched_tokens=48, block_size=16)
    return draw(
        runner, PROMPTS, sampling=SAMPLING, engine=engine, speculator=SpeculatorConfig(**changes)
    )


def told(runner: ModelRunner) -> str:
    return make_engine(runner, sampling=SAMPLING).memory


def has_compiler() -> bool:
    try:
        kernels.Kernels(torch.float32)
    except KernelsMissingError:
        return False
    return True


def has_products() -> bool:
    return kernels.Kernels(torch.float32).has_product(96, 96)


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")


@needs_compiler
@pytest.mark.parametrize("all_in_one_call", [True, False])
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_give_the_text_that_plain_ones_do(
    name: str, all_in_one_call: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not all_in_one_call:  # as where products are oneDNN's
        monkeypatch.setattr(kernels.Kernels, "has_product", lambda *_: False)
    folder = save(tmp_path, FUSED[name], torch.float32)
    runner, plain = load(folder), load(folder, packed_linear=False)
    assert told(runner).endswith("layers are fused")
    assert runner.row_multiple == (4 if all_in_one_call and has_products() else 8)
    fused, expected = sample(runner), sample(plain)
    assert tokens(fused) == tokens(expected)
    for key, completion in fused.items():
        assert completion.logprobs == pytest.approx(expected[key].logprobs, abs=1e-4)


@needs_compiler
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_in_bfloat16_are_near_plain_ones_in_float32(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, FUSED[name], torch.bfloat16)
    runner = load(folder, "bfloat16")
    assert told(runner).endswith("layers are fused")
    fused, expected = sample(runner), sample(load(folder, packed_linear=False))
    gaps, num_tokens = [], 0
    for key, completion in fused.items():
        num_tokens += len(completion.token_ids)
        other = expected[key]
        for index, token in enumerate(completion.token_ids):
            if token != other.token_ids[index]:
                break  # another text from here on
            gaps.append(abs(completion.logprobs[index] - other.logprobs[index]))
    assert len(gaps) > num_tokens / 3
    assert sum(gaps) / len(gaps) < 0.1


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUSED)
def test_a_completion_does_not_depend_on_the_batch_in_either_type(
    name: str, dtype: str, tmp_path: Path
) -> None:
    runner = load(save(tmp_path, FUSED[name], getattr(torch, dtype)), dtype)
    alone = sample(runner, width=1, spec_decoding=False)
    assert told(runner).endswith("layers are fused")
    for other in (
        sample(runner, width=5, spec_decoding=False),
        sample(runner, width=3, speculator="ngram", num_speculative_tokens=5, ngram_order=2),
        sample(runner, width=4, num_speculative_tokens=6),
    ):
        assert tokens(other) == tokens(alone)
        for key, completion in other.items():
            assert completion.logprobs == alone[key].logprobs


@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_only_look_like_a_llamas_stay_as_they_are(name: str, tmp_path: Path) -> None:
    runner = load(save(tmp_path, OTHERS[name], torch.float32))
    assert "layers are not fused: " in told(runner)
    expected = sample(load(tmp_path, packed_linear=False))
    assert tokens(sample(runner)) == tokens(expected)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("model.embed_tokens", "LlamaForCausalLM computes something around its layers"),
        ("model.layers.0", "LlamaDecoderLayer computes something else than a Llama's"),
        ("model.layers.1", "LlamaDecoderLayer computes something else than a Llama's"),
        ("model.norm", "LlamaRMSNorm computes something else than a Llama's"),
        ("", "LlamaForCausalLM computes something around its layers"),
    ],
)
def test_a_model_stays_as_it_is_where_something_happens_around_its_layers(
    place: str, reason: str, tmp_path: Path
) -> None:
    def change(_module: Any, _given: Any, result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return result * 1.5
        result.logits = result.logits * 1.5
        return result

    def steer(runner: ModelRunner) -> ModelRunner:
        runner.model.get_submodule(place).register_forward_hook(change)
        return runner

    folder = save(tmp_path, FUSED["Llama"], torch.float32)
    runner = steer(load(folder))
    expected = sample(steer(load(folder, packed_linear=False)))
    assert tokens(sample(runner)) == tokens(expected)
    if has_compiler():
        assert told(runner).endswith(f"layers are not fused: {reason}")


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotations_of_a_fused_model_are_the_models_own_at_any_length(
    dtype: str, tmp_path: Path
) -> None:
    runner = load(save(tmp_path, FUSED["Llama"], getattr(torch, dtype)), dtype)
    make_engine(runner, sampling=SAMPLING)
    fused = runner._fused
    assert fused is not None
    like = torch.empty(0, dtype=getattr(torch, dtype))
    for length in (8, 1500, 3000):
        positions = torch.randint(length, (24,), generator=torch.Generator().manual_seed(length))
        _, rotary = fused.embed(positions * 0, positions, length)
        cosine, sine = runner.model.model.rotary_emb(like, position_ids=positions[None])
        assert torch.equal(rotary[0], cosine[0])
        assert torch.equal(rotary[1], sine[0])


def test_without_a_compiler_layers_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load(save(tmp_path, FUSED["Llama"], torch.float32))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels._load.cache_clear()
    assert "there is no C compiler; install gcc, or name one in CC" in told(runner)
    assert not list(tmp_path.glob("cache/**/*.so"))


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load(save(tmp_path, FUSED["Llama"], torch.float32))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "false")
    kernels._load.cache_clear()
    assert "false does not compile them" in told(runner)
    assert not list(tmp_path.glob("cache/**/*.so"))


@needs_compiler
def test_a_library_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load(save(tmp_path, FUSED["Llama"], torch.float32))
    monkeypatch.setattr(kernels, "compile_library", lambda *_: tmp_path / "nothing.so")
    kernels._load.cache_clear()
    assert "layers are not fused: they do not load" in told(runner)


@needs_compiler
def test_a_user_without_a_home_has_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    runner = load(save(tmp_path, FUSED["Llama"], torch.float32))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compile_kernels.Path, "home", no_home)
    kernels._load.cache_clear()
    assert told(runner).endswith("layers are fused")


def test_the_switch_leaves_layers_as_they_are(tmp_path: Path) -> None:
    runner = load(save(tmp_path, FUSED["Llama"], torch.float32), compiled_kernels=False)
    assert "fused" not in told(runner)


@needs_compiler
def test_new_weights_reach_the_fused_layers(tmp_path: Path) -> None:
    runner = load(save(tmp_path, FUSED["Llama"], torch.float32))
    before = sample(runner)
    projection = runner.model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        projection.neg_()
        runner.repack_weights()
        changed = sample(runner)
        projection.neg_()
        runner.repack_weights()
    assert tokens(changed) != tokens(before)
    assert tokens(sample(runner)) == tokens(before)


@needs_compiler
def test_what_is_not_finite_fails_the_completions_that_drew_it_alone(tmp_path: Path) -> None:
    folder = save(tmp_path, FUSED["Llama"], torch.float32)
    runner, plain = load(folder), load(folder, packed_linear=False)
    for some in (runner, plain):
        with torch.no_grad():
            some.model.get_input_embeddings().weight[7] = float("nan")
    expected = sample(plain, width=1, spec_decoding=False)
    assert 0 < sum(bool(c.error) for c in expected.values()) < len(expected)
    for fused in (sample(runner, width=5), sample(runner, width=1, spec_decoding=False)):
        assert {key: c.error for key, c in fused.items()} == {
            key: c.error for key, c in expected.items()
        }
        assert tokens(fused) == tokens(expected)


@needs_compiler
@pytest.mark.parametrize("all_in_one_call", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_hold_what_is_not_finite_are_used_again(
    dtype: str, all_in_one_call: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not all_in_one_call:
        monkeypatch.setattr(kernels.Kernels, "has_product", lambda *_: False)
    runner = load(save(tmp_path, FUSED["Llama"], getattr(torch, dtype)), dtype)
    good = [make_prompt(f"good{n}", random_tokens(n, seed=n), 2) for n in (3, 16, 17, 40)]
    clean = draw(runner, good, sampling=SAMPLING)
    used = {token for prompt in good for token in prompt.token_ids}
    used |= {token for completion in clean.values() for token in completion.token_ids}
    poison = next(token for token in range(1, 128) if token not in used)
    # Most completions: it comes first, and the others go on in its blocks.
    bad = make_prompt("bad", [poison, *random_tokens(60, seed=77)], 3)
    with torch.no_grad():
        runner.model.get_input_embeddings().weight[poison] = float("nan")
    for width, num_blocks in ((1, 8), (3, 14)):
        engine = EngineConfig(stream_width=width, num_blocks=num_blocks, max_batched_tokens=48)
        drawn = draw(runner, [bad, *good], sampling=SAMPLING, engine=engine)
        assert all(drawn.pop(("bad", index)).error for index in range(3))
        assert tokens(drawn) == tokens(clean)
