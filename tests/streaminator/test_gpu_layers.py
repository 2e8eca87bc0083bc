# SPDX-License-Identifier: Apache-2.0
"""Llama-like layers by a GPU's kernels: what transformers computes, and the same in any batch.

In Triton's interpreter, or on the card if there is one.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streaminator.config import EngineConfig, ModelConfig, SamplingParams, SpeculatorConfig
from streaminator.engine import gpu_layers, gpu_products, llama_like, model_runner
from streaminator.engine.gpu_model import fuse_gpu_model
from streaminator.engine.gpu_products import GpuProduct
from streaminator.engine.gpu_sampling import GpuSampling
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.llama_like import NotFusedError
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.paged_attention import has_triton
from streaminator.engine.weights import copy_weights
from streaminator.sequence import Sequence
from tests.fakes import (
    NO_SPECULATION,
    draw,
    load_gpu_like_runner,
    make_prompt,
    random_tokens,
    save_model,
    tokens,
)
from tests.streaminator.test_fused_layers import save

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.usefixtures("interpreter"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_card = pytest.mark.skipif(DEVICE.type == "cpu", reason="no CUDA device")

BLOCK = 16
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 80,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
ONE = SIZES | {"num_hidden_layers": 1}
FUSED = {
    "Llama": transformers.LlamaConfig(**SIZES),
    "Llama with biases": transformers.LlamaConfig(
        **(ONE | {"head_dim": 48}), attention_bias=True, mlp_bias=True
    ),
    "Qwen2": transformers.Qwen2Config(**ONE),
    "Qwen3": transformers.Qwen3Config(**(ONE | {"head_dim": 32}), tie_word_embeddings=True),
    "Mistral, window": transformers.MistralConfig(**ONE, sliding_window=20),
}
OTHERS = {
    "Granite": transformers.GraniteConfig(**ONE, residual_multiplier=0.5),
    "Granite, embedding": transformers.GraniteConfig(**ONE, embedding_multiplier=3.0),
    "Llama, gelu": transformers.LlamaConfig(**ONE, hidden_act="gelu"),
    "Llama, odd heads": transformers.LlamaConfig(**(ONE | {"head_dim": 24})),
    "Gemma": transformers.GemmaConfig(**ONE),
    "Ministral, which is told positions": transformers.Ministral3Config(**ONE),
}
LENGTHS = (17, 5, 9)
TEXTS = [random_tokens(length, seed=length) for length in LENGTHS]
DRAFTS = [random_tokens(length, seed=length + 100) for length in (2, 0, 3)]
SECOND = 77


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are split as in a real model."""
    monkeypatch.setattr(gpu_products, "_FEW_TILES", 2)
    monkeypatch.setattr(gpu_products, "_LEAST_STEPS", 1)
    if DEVICE.type == "cpu":
        # `test_paged_attention` and `test_gpu_sampling` try these.
        monkeypatch.setattr(model_runner, "why_not_paged", lambda *_: None)
        monkeypatch.setattr(GpuSampling, "why_not", lambda *_: None)


def sequence(index: int, cached: int, scheduled: int, *, drafts: bool) -> Sequence:
    """The first tokens of a text and its newest one; with its draft and a second choice."""
    num_blocks = 5
    draft = list(DRAFTS[index]) if drafts else []
    return Sequence(
        make_prompt(f"p{index}", TEXTS[index]),
        0,
        [*TEXTS[index], *DRAFTS[index]][: cached + scheduled],
        0,
        0,
        0.0,
        block_table=list(range(1 + index * num_blocks, 1 + (index + 1) * num_blocks)),
        num_cached_tokens=cached,
        num_scheduled_tokens=scheduled,
        draft=draft,
        alternatives={1: SECOND} if draft else {},
    )


@torch.inference_mode()
def logits_of(runner: ModelRunner, steps: list[list[Sequence]]) -> list[torch.Tensor]:
    """Of each step's sampled rows."""
    runner._try_paged(BLOCK)
    cache = KVCache(
        runner.shapes, num_blocks=20, block_size=BLOCK, dtype=runner.dtype, device=runner.device
    )
    return [runner.forward(runner.pack(step, BLOCK), cache).clone() for step in steps]


def together() -> list[list[Sequence]]:
    """Prompts but for their last token, then that with a draft and second choices."""
    first = [sequence(i, 0, n - 1, drafts=False) for i, n in enumerate(LENGTHS)]
    return [first, [sequence(i, n - 1, 1, drafts=True) for i, n in enumerate(LENGTHS)]]


def alone(index: int) -> list[list[Sequence]]:
    return [[each] for step in together() for each in step[index : index + 1]]


def one_by_one(index: int) -> list[list[Sequence]]:
    """A prompt in two chunks, then each token of its draft as if it had been drawn."""
    length = LENGTHS[index]
    chunks = [
        (0, 3),
        (3, length - 4),
        *((length - 1 + i, 1) for i in range(len(DRAFTS[index]) + 1)),
    ]
    return [[sequence(index, *chunk, drafts=False)] for chunk in chunks]


@pytest.mark.parametrize("name", FUSED)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, FUSED[name], torch.float32)
    runner = load_gpu_like_runner(folder)
    plain = ModelRunner(ModelConfig(model_name=str(folder), dtype="float32", device="cpu"))
    pairs = zip(logits_of(runner, together()), logits_of(plain, together()), strict=True)
    assert runner.layers == "fused"
    for fused, expected in pairs:
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)


def test_a_row_is_the_same_in_any_batch(tmp_path: Path) -> None:
    """Among others and alone; in a draft, and as the newest token; to the last bit."""
    runner = load_gpu_like_runner(save(tmp_path, FUSED["Qwen2"], torch.bfloat16), "bfloat16")
    rows = logits_of(runner, together())[1]
    assert runner.layers == "fused"
    first, num_rows = 0, sum(1 + len(draft) for draft in DRAFTS)
    for index, draft in enumerate(DRAFTS):
        own = rows[first : first + 1 + len(draft)]
        first += len(own)
        seconds = rows[num_rows : num_rows + bool(draft)]
        num_rows += len(seconds)
        if draft:
            assert torch.equal(logits_of(runner, alone(index))[1], torch.cat([own, seconds]))
            drawn = torch.cat(logits_of(runner, one_by_one(index))[2:])
            assert torch.equal(drawn, own)


@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_only_look_like_a_llamas_stay_as_they_are(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, OTHERS[name], torch.float32)
    runner = load_gpu_like_runner(folder)
    plain = ModelRunner(ModelConfig(model_name=str(folder), dtype="float32", device="cpu"))
    expected = logits_of(plain, together())[1]
    torch.testing.assert_close(logits_of(runner, together())[1], expected, rtol=1e-4, atol=1e-4)
    assert runner.is_paged
    assert "kernels do not run" not in runner.layers
    assert runner.layers.startswith("not fused: ")


def linears(*sizes: int, bias: bool, dtype: torch.dtype) -> list[Any]:
    """Of 336 inputs."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.nn.Linear(336, size, bias=bias) for size in sizes]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(DEVICE, dtype)
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("most_splits", [1, 8])
def test_products_are_right_and_rows_do_not_depend_on_the_batch(
    dtype: torch.dtype, most_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_products, "_FEW_TILES", 3)
    layers = linears(130, 40, bias=most_splits == 8, dtype=dtype)
    low, high = gpu_products._LOW_ROWS, gpu_products._HIGH_ROWS
    most = 2 * high + 5
    x = torch.randn(most, 336, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    expected = torch.cat([copy.deepcopy(layer).double()(x.double()) for layer in layers], dim=1)
    product = GpuProduct(layers, batch_invariant=True, most_splits=most_splits)
    products = {num: product(x[:num]) for num in (most, high + 1, high, low + 1, low, 3, 1)}
    num_parts = {num: len(parts) for num, parts in products.items()}
    assert num_parts == {num: 1 if num > high or most_splits == 1 else 2 for num in products}
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    (whole,) = products[most]
    assert (whole - expected).abs().max() < limit * expected.abs().max()
    for num, parts in products.items():
        assert torch.equal(sum(parts[1:], parts[0]), whole[:num])
    product.check()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda parts: parts + len(parts[0]) / 64, "a product's row is not the same in any batch"),
        (lambda parts: parts * 2, "its products are off by"),
    ],
)
def test_products_that_are_wrong_on_this_card_are_found(
    spoil: Callable[[torch.Tensor], torch.Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = GpuProduct(linears(40, bias=False, dtype=torch.float32), batch_invariant=True)
    multiply = GpuProduct.__call__
    monkeypatch.setattr(GpuProduct, "__call__", lambda self, x: spoil(multiply(self, x)))
    with pytest.raises(NotFusedError, match=reason):
        product.check()


def test_joined_weights_stay_the_layers_own(tmp_path: Path) -> None:
    """They take no memory twice, and new ones reach what multiplies with them."""
    runner = load_gpu_like_runner(save(tmp_path, FUSED["Qwen3"], torch.float32))
    before = logits_of(runner, alone(1))[1]
    assert runner.layers == "fused"
    mlp = runner.model.model.layers[0].mlp
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    assert gate.untyped_storage().nbytes() == gate.nbytes + up.nbytes
    old = {name: value.clone() for name, value in runner.model.state_dict().items()}
    copy_weights(runner.model, {name: value * 0.9 for name, value in old.items()})
    changed = logits_of(runner, alone(1))[1]
    runner._gpu_model = None
    expected = logits_of(runner, alone(1))[1]
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, before, atol=1e-2)


def test_products_can_be_pytorchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load_gpu_like_runner(
        save(tmp_path, FUSED["Qwen2"], torch.float32), batch_invariant=False
    )
    monkeypatch.setattr(gpu_products, "gpu_kernels", None)  # own ones are not called
    rows = logits_of(runner, together())[1]
    assert runner.layers == "fused"
    runner._gpu_model = None
    expected = logits_of(runner, together())[1]
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interface", ["older", "newer"])
def test_what_a_trainer_has_asked_of_products_stays_and_does_not_matter(interface: str) -> None:
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.backends.fp32_precision
    try:
        if interface == "older":
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.fp32_precision = "tf32"
        asked = [backend.fp32_precision for backend in backends]
        with llama_like._in_full_float32():
            assert [backend.fp32_precision for backend in backends] == ["ieee"] * 2
            # What a product asks; it raises where the interfaces disagree.
            assert not torch.backends.cuda.matmul.allow_tf32
        assert [backend.fp32_precision for backend in backends] == asked
        if interface == "older":
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.backends.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "none"


def test_without_kernels_layers_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, FUSED["Qwen2"], torch.float32)
    expected = logits_of(load_gpu_like_runner(folder, compiled_kernels=False), together())

    def fails() -> None:
        raise RuntimeError("no C compiler\nat all")

    monkeypatch.setattr(gpu_layers, "gpu_kernels", fails)
    runner = load_gpu_like_runner(folder)
    for rows, others in zip(logits_of(runner, together()), expected, strict=True):
        assert torch.equal(rows, others)
    assert runner.layers == "not fused: its kernels do not run (RuntimeError: no C compiler)"
    runner = load_gpu_like_runner(save(tmp_path / "64", FUSED["Qwen2"], torch.float64), "float64")
    with pytest.raises(NotFusedError, match=r"no kernels for torch\.float64"):
        fuse_gpu_model(runner.model, runner._calls, BLOCK, batch_invariant=True)


@needs_card
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_on_a_card_a_completion_does_not_depend_on_its_batch(dtype: str, tmp_path: Path) -> None:
    """Nor on drafts, in few bits, where the smallest difference would be another token soon."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "head_dim": 64}
    folder = save_model(
        tmp_path, "Llama", dtype=getattr(torch, dtype), initializer_range=0.05, **sizes
    )
    runner = ModelRunner(ModelConfig(model_name=str(folder), dtype=dtype, device="cuda"))
    prompts = [make_prompt(f"p{n}", random_tokens(n, seed=n), 8) for n in (3, 31, 300, 40)]
    sampling = SamplingParams(temperature=0.8, max_length=100, ignore_eos=True)

    def drawn(width: int, speculator: SpeculatorConfig) -> Any:
        engine = EngineConfig(stream_width=width)
        return tokens(
            draw(runner, prompts, sampling=sampling, engine=engine, speculator=speculator)
        )

    alone = drawn(1, NO_SPECULATION)
    assert runner.layers == "fused"
    assert drawn(4, NO_SPECULATION) == alone
    assert drawn(4, SpeculatorConfig()) == alone
    assert drawn(3, SpeculatorConfig(num_speculative_tokens=5)) == alone
