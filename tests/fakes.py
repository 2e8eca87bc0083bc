# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, a tiny tokenizer, and a stream that checks itself at every step."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from streaminator.config import EngineConfig, ModelConfig, SamplingParams, SpeculatorConfig
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.sampler import Drawn, Transfer, to_host
from streaminator.sequence import Completion, Prompt
from streaminator.speculative.draft_budget import StepCosts

VOCAB_SIZE = 128
CONTEXT = 1024
WINDOW = 16
"""Sliding window of the models that have one, and shorter than the tests' texts."""
EOS = 0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_WIDE_HEADS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
_MIXED_LAYERS: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}

# name: configuration class, what differs from `_COMMON`
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _GROUPED),
    "Qwen2": ("Qwen2Config", _GROUPED),
    "Qwen2-sliding": ("Qwen2Config", _GROUPED | _MIXED_LAYERS | {"use_sliding_window": True}),
    "Qwen3": ("Qwen3Config", _WIDE_HEADS),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        _WIDE_HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "Mistral": ("MistralConfig", _GROUPED | {"sliding_window": WINDOW}),
    "Gemma2": (
        "Gemma2Config",
        _WIDE_HEADS
        | _MIXED_LAYERS
        | {
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 20,
        },
    ),
    "Gemma3": ("Gemma3TextConfig", _WIDE_HEADS | _MIXED_LAYERS | {"query_pre_attn_scalar": 20}),
    "Phi-3": ("Phi3Config", _GROUPED),
    "OLMo": ("OlmoConfig", _GROUPED | {"clip_qkv": 2.0}),
    "OLMo2": ("Olmo2Config", _GROUPED),
    "GPT-NeoX": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "Granite": (
        "GraniteConfig",
        _GROUPED
        | {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.7,
        },
    ),
    "GPT-2": ("GPT2Config", {"n_inner": 48}),
}


def save_model(
    folder: Path,
    architecture: str,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a random model whose norms and biases are random, too; returns `folder`."""
    name, differences = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**(_COMMON | differences | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return folder


def load_runner(folder: Path, dtype: str) -> ModelRunner:
    """The model as the stream runs it, on the CPU."""
    return ModelRunner(ModelConfig(model_name=str(folder), dtype=dtype, device="cpu"))


def load_gpu_like_runner(folder: Path, dtype: str = "float32", **changes: Any) -> ModelRunner:
    """The model as the stream runs it on a GPU, without graphs; in Triton's interpreter."""
    config = ModelConfig(
        model_name=str(folder), dtype=dtype, device="cpu", packed_linear=False, **changes
    )
    runner = ModelRunner(config)
    runner._pages = True
    return runner


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is a pair of letters of its own, 0 the end of text; decoding only joins them."""
    alphabet = "abcdefghijkl"
    pairs = [first + second for first in alphabet for second in alphabet][: VOCAB_SIZE - 1]
    vocabulary = {"<eos>": EOS} | {pair: index + 1 for index, pair in enumerate(pairs)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def random_tokens(num: int, seed: int) -> tuple[int, ...]:
    """Token ids that are the same in every run, without the end of text."""
    generator = random.Random(seed)
    return tuple(generator.randrange(1, VOCAB_SIZE) for _ in range(num))


def make_prompt(
    name: str,
    token_ids: Iterable[int],
    num_completions: int = 1,
    finished: tuple[tuple[int, ...], ...] = (),
) -> Prompt:
    """A prompt of which only id, tokens and the number of completions matter."""
    return Prompt(
        prompt_id=name,
        token_ids=tuple(token_ids),
        text="",
        question="",
        sample_indices=tuple(range(num_completions)),
        finished=finished,
    )


MAX_LENGTH = 20
FREE = SamplingParams(max_length=MAX_LENGTH, temperature=1.0)
NO_SPECULATION = SpeculatorConfig(spec_decoding=False)
PROMPTS = [make_prompt(f"p{n}", random_tokens(n, seed=n), 3) for n in (4, 19, 33)]
TOKENIZER = letters_tokenizer()

Draws = dict[tuple[str, int], Completion]


def settled(drawn: Drawn) -> Drawn:
    """What the stream reads of it."""
    tokens, logprobs, *tops = to_host(drawn)
    kind = drawn.logprobs.dtype
    return Drawn(
        torch.tensor(tokens), torch.tensor(logprobs, dtype=kind), *map(torch.from_numpy, tops)
    )


def sampling(**changes: Any) -> SamplingParams:
    """`FREE` with changes."""
    return SamplingParams(**({"max_length": MAX_LENGTH, "temperature": 1.0} | changes))


def make_engine(
    runner: ModelRunner,
    *,
    sampling: SamplingParams | None = None,
    engine: EngineConfig | None = None,
    speculator: SpeculatorConfig | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_prompt_length: int = 320,
    step_costs: StepCosts | None = None,
) -> Engine:
    """A stream that drafts whatever its speculator proposes, unless `step_costs` says otherwise."""
    return Engine(
        runner,
        tokenizer,
        sampling=sampling or SamplingParams(),
        engine=engine or EngineConfig(stream_width=16),
        speculator=speculator or SpeculatorConfig(speculator="ngram"),
        max_prompt_length=max_prompt_length,
        step_costs=step_costs or StepCosts.free(),
    )


def late_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows whose tokens, from now on, are drawn only when they are read."""
    rows: list[int] = []
    wait = Transfer.wait

    def note(transfer: Transfer) -> object:
        drawn = wait(transfer)
        rows.extend(transfer.settled)
        return drawn

    monkeypatch.setattr(Transfer, "wait", note)
    return rows


def drain(
    engine: Engine, prompts: Iterable[Prompt], step: Callable[[], list[Completion]] | None = None
) -> dict[tuple[str, int], Completion]:
    """Draw everything, checking after each step that no block and no prompt is lost or doubled.

    `step` stands for the engine's own.
    """
    completions = {}
    for prompt in prompts:
        engine.add(prompt)
    num_steps = 0
    while engine.has_work:
        num_steps += 1
        assert num_steps < 5000, "the work never ends"
        finished = (step or engine.step)()
        check_invariants(engine)
        for completion in finished:
            key = (completion.prompt.prompt_id, completion.sample_index)
            assert key not in completions, f"{key} came out twice"
            completions[key] = completion
    assert engine.scheduler.block_manager.num_used == 0, "blocks are held after the last prompt"
    return completions


def check_invariants(engine: Engine) -> None:
    """Block accounting, affinity and the bound on running sequences."""
    scheduler = engine.scheduler
    scheduler.check_integrity()
    running = [sequence.prompt.prompt_id for sequence in scheduler.running]
    most = scheduler._max_in_flight
    assert all(num <= most for num in Counter(running).values()), "too many of one prompt in flight"
    assert len(running) <= scheduler.stream_width


def draw(
    runner: ModelRunner,
    prompts: Sequence[Prompt],
    *,
    sampling: SamplingParams | None = None,
    engine: EngineConfig | None = None,
    speculator: SpeculatorConfig | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> dict[tuple[str, int], Completion]:
    """All completions of `prompts` by (prompt_id, sample_index)."""
    stream = make_engine(
        runner, sampling=sampling, engine=engine, speculator=speculator, tokenizer=tokenizer
    )
    completions = drain(stream, prompts)
    assert set(completions) == {(p.prompt_id, i) for p in prompts for i in p.sample_indices}
    return completions


def tokens(completions: dict[tuple[str, int], Completion]) -> dict[tuple[str, int], list[int]]:
    """Only the token ids."""
    return {key: completion.token_ids for key, completion in completions.items()}


ENGINES = st.builds(
    EngineConfig,
    stream_width=st.integers(1, 4),
    max_batched_tokens=st.sampled_from([4, 512]),
    num_blocks=st.sampled_from([5, 7, None]),
    kv_cache=st.booleans(),
)
"""Streams that are narrow, short of memory or without a cache."""
