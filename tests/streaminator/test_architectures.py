# SPDX-License-Identifier: Apache-2.0
"""Each architecture in the stream gives, greedily, the tokens of `transformers` `generate`."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from streaminator.config import EngineConfig, SamplingParams, SpeculatorConfig
from streaminator.errors import ModelError
from tests.fakes import ARCHITECTURES, draw, load_runner, make_prompt, random_tokens, save_model

ENGINE = EngineConfig(stream_width=2, max_batched_tokens=16, block_size=16)
SPECULATOR = SpeculatorConfig(speculator="ngram", num_speculative_tokens=4, ngram_order=2)
# Prompts that end within, at and past a block, longer and shorter than a sliding window.
LENGTHS = (5, 32, 51)


def dtype_of(architecture: str) -> str:
    # In transformers, experts have no product in double precision on a CPU.
    return "float32" if architecture == "Qwen3-MoE" else "float64"


def generate(folder: Path, dtype: str, prompt: tuple[int, ...], num_new: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_new,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def assert_equals_generate(
    architecture: str, folder: Path, lengths: tuple[int, ...], num_new: int
) -> None:
    dtype = dtype_of(architecture)
    save_model(folder, architecture, dtype=getattr(torch, dtype))
    prompts = [make_prompt(f"p{n}", random_tokens(n, seed=n), 2) for n in lengths]
    completions = draw(
        load_runner(folder, dtype),
        prompts,
        sampling=SamplingParams(temperature=0, max_length=num_new),
        engine=ENGINE,
        speculator=SPECULATOR,
    )
    said = set()
    for prompt in prompts:
        expected = generate(folder, dtype, prompt.token_ids, num_new)
        said |= set(expected)
        for index in prompt.sample_indices:
            assert completions[prompt.prompt_id, index].token_ids == expected
    assert len(said) > 10, "the model says too little to tell anything apart"
    # The second completion repeats the first, so that drafts were verified, not just made.
    assert sum(sum(completion.accepted) for completion in completions.values()) > num_new


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers_generate(architecture: str, tmp_path: Path) -> None:
    assert_equals_generate(architecture, tmp_path, LENGTHS, 40)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma2"])
def test_greedy_equals_generate_where_attention_reads_keys_in_several_chunks(
    architecture: str, tmp_path: Path
) -> None:
    assert_equals_generate(architecture, tmp_path, (20, 250, 300), 20)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_tokens_and_logprobs_do_not_depend_on_speed_settings(
    architecture: str, tmp_path: Path
) -> None:
    runner = load_runner(save_model(tmp_path, architecture, dtype=torch.float32), "float32")
    prompts = [make_prompt(f"p{n}", random_tokens(n, seed=n), 2) for n in (3, 18, 33)]
    sampling = SamplingParams(max_length=20)
    alone = draw(
        runner,
        prompts,
        sampling=sampling,
        engine=EngineConfig(stream_width=1),
        speculator=SpeculatorConfig(spec_decoding=False),
    )
    together = draw(
        runner,
        prompts,
        sampling=sampling,
        engine=EngineConfig(stream_width=3, max_batched_tokens=7),
        speculator=SPECULATOR,
    )
    for key, completion in alone.items():
        assert together[key].token_ids == completion.token_ids
        assert together[key].logprobs == completion.logprobs


def test_a_text_within_the_short_range_of_longrope_does_not_depend_on_its_neighbours(
    tmp_path: Path,
) -> None:
    # As in Phi-3 with 128k tokens of context: beyond the original context other frequencies hold.
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 64,
    }
    save_model(tmp_path, "Phi-3", rope_parameters=rope, original_max_position_embeddings=64)
    try:
        runner = load_runner(tmp_path, "float64")
    except ModelError:
        return  # refusing such a model is right, too
    prompts = [make_prompt(f"p{n}", random_tokens(n, seed=n)) for n in (5, 100)]
    sampling = SamplingParams(temperature=0, max_length=20)
    completions = draw(runner, prompts, sampling=sampling, engine=ENGINE)
    assert completions["p5", 0].token_ids == generate(tmp_path, "float64", prompts[0].token_ids, 20)
