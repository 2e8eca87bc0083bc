# SPDX-License-Identifier: Apache-2.0
"""A GPU's sampler draws what the code in PyTorch draws: in Triton's interpreter, or on the card."""

import math
from typing import Any

import pytest
import torch

from streaminator.config import SamplingParams
from streaminator.engine import gpu_sampling, sampler
from streaminator.engine.gpu_sampling import GpuSampling
from streaminator.engine.paged_attention import has_triton
from streaminator.engine.sampler import Drawn, draw_rest, sample
from tests.fakes import settled
from tests.streaminator.test_sampling import random_logits
from tests.streaminator.test_sampling_kernel import assert_poison_stays_in_its_rows

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
FLAT = SamplingParams(temperature=1.0)


def both(logits: torch.Tensor, temperature: float, num_top: int = 0) -> tuple[Drawn, Drawn]:
    """What PyTorch on a CPU and the kernels draw from [R, V], with other noise in each row."""
    keys = torch.arange(len(logits)) * 0x1234567 - (1 << 62)
    positions = 17 + torch.arange(len(logits)) % 3
    params = SamplingParams(temperature=temperature)
    expected = sample(logits, keys, positions, params, num_top)
    on_device = (x.to(DEVICE) for x in (logits, keys, positions))
    drawn = sample(*on_device, params, num_top, GpuSampling(logits.dtype))
    return settled(expected), Drawn(*(x.cpu() for x in settled(drawn)[:4]))


def assert_same(expected: Drawn, drawn: Drawn) -> None:
    assert torch.equal(drawn.tokens, expected.tokens)
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.top_probs, expected.top_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, 0.3, 1])
@pytest.mark.parametrize("size", [1, 64, 65, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_those_that_pytorch_draws(
    dtype: torch.dtype, size: int, temperature: float
) -> None:
    # Peaked rows, and flat ones, of which most tokens are no candidates.
    for spread in (0.3, 2.5):
        logits = random_logits(8, size, spread, seed=size).to(dtype)
        expected, drawn = both(logits, temperature, num_top=9)
        assert_same(expected, drawn)
        # Equal ones come in the order of their ids here, in any order there.
        ordered = logits.double() - torch.arange(size) * 1e-9
        assert torch.equal(drawn.top_ids, ordered.topk(min(9, size)).indices)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("levels", [1, 2, 60])
def test_equal_logits_are_told_apart_as_in_pytorch(levels: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randint(0, levels, (12, 5000), generator=generator) / 4 - 1
    logits[logits == 0] *= torch.randint(0, 2, (int((logits == 0).sum()),)) * 2 - 1.0  # -0 too
    assert_same(*both(logits, temperature))


@pytest.mark.parametrize("temperature", [0, 0.8, 100])
@pytest.mark.parametrize("num_left", [1, 30, 100])
def test_tokens_that_are_ruled_out_are_never_drawn(num_left: int, temperature: float) -> None:
    logits = random_logits(6, 9000, 1.0)
    order = torch.rand(6, 9000, generator=torch.Generator().manual_seed(1)).argsort(-1)
    logits.scatter_(-1, order[:, num_left:], -math.inf)
    expected, drawn = both(logits, temperature)
    assert_same(expected, drawn)
    assert logits.gather(-1, drawn.tokens[:, None]).isfinite().all()


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("size", [40, 5000])
@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf])
def test_a_row_that_is_not_finite_is_invalid_and_the_others_are_not_touched(
    poison: float, size: int, temperature: float
) -> None:
    assert_poison_stays_in_its_rows(both, random_logits(6, size, 1.0), poison, temperature)


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.3])
def test_nothing_is_left_for_the_rest_where_a_few_tokens_have_all_mass(temperature: float) -> None:
    """Rounding of large numbers would leave it 1e-5 and more, in either implementation."""
    logits = random_logits(24, 1000, 1.0)
    logits[:, 7] = 17.9375 + torch.arange(24) / 7
    logits[::2, 300] = logits[::2, 7]
    for drawn in both(logits, temperature, num_top=2):
        mass = drawn.top_probs.double().sum(-1)
        assert (mass - 1).abs().max() < 1e-6
        assert all(token in (7, 300) for token in drawn.tokens.tolist())
        assert (drawn.top_probs[1::2, 0] == 1).all()


def test_rest_without_mass_is_no_token_out_of_range() -> None:
    """Where rounding lets it win all the same."""
    scaled = torch.full((1, 100), -1e4)
    scaled[0, 7] = 1e4
    zero = torch.zeros(1, dtype=torch.int64)
    assert draw_rest(scaled, torch.tensor([[7]]), zero, zero).tolist() == [7]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone(dtype: torch.dtype) -> None:
    logits = random_logits(12, 9000, 1.0).to(DEVICE, dtype)
    keys = torch.arange(12, device=DEVICE)
    params = SamplingParams(temperature=0.8)
    together = sample(logits, keys, keys, params, 8, GpuSampling(dtype))
    for row in range(12):
        one = slice(row, row + 1)
        alone = sample(logits[one], keys[one], keys[one], params, 8, GpuSampling(dtype))
        for field, whole in zip(alone[:4], together[:4], strict=True):
            assert torch.equal(field, whole[one])


def test_a_token_that_is_no_candidate_is_drawn_on_the_device() -> None:
    """The next step may be launched before the host reads it."""
    logits = random_logits(12, 9000, 0.3)
    keys = torch.arange(12)
    drawn = sample(
        *(x.to(DEVICE) for x in (logits, keys, keys)), FLAT, 0, GpuSampling(logits.dtype)
    )
    assert drawn.settle is None
    assert (drawn.tokens >= 0).all()
    candidates = logits.topk(sampler.NUM_CANDIDATES).indices
    is_candidate = (candidates == drawn.tokens.cpu()[:, None]).any(-1)
    assert not is_candidate.all()


def test_kernels_that_are_wrong_or_do_not_run_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = GpuSampling(torch.float32)
    assert sampling.why_not(300, DEVICE) is None
    draw = GpuSampling.sample

    def wrong(self: GpuSampling, logits: torch.Tensor, *arguments: Any, **options: Any) -> Drawn:
        drawn = draw(self, logits, *arguments, **options)
        return drawn._replace(tokens=drawn.tokens + 1)

    def other(self: GpuSampling, logits: torch.Tensor, *arguments: Any, **options: Any) -> Drawn:
        drawn = draw(self, logits, *arguments, **options)
        return drawn._replace(logprobs=drawn.logprobs + len(logits))

    def fails() -> None:
        raise RuntimeError("no C compiler\nat all")

    for spoiled, reason in ((wrong, "draw other tokens"), (other, "not the same in any batch")):
        with monkeypatch.context() as patch:
            patch.setattr(GpuSampling, "sample", spoiled)
            assert reason in (sampling.why_not(300, DEVICE) or "")
    monkeypatch.setattr(gpu_sampling, "_kernels", fails)
    assert "(RuntimeError: no C compiler)" in (sampling.why_not(300, DEVICE) or "")
