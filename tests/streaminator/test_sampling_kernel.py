# SPDX-License-Identifier: Apache-2.0
"""The compiled sampler draws what the one in PyTorch draws."""

import math
from collections.abc import Callable

import pytest
import torch

from streaminator.config import SamplingParams
from streaminator.engine.compile_kernels import KernelsMissingError
from streaminator.engine.kernels import Kernels
from streaminator.engine.sampler import INVALID_TOKEN, Drawn, sample
from tests.fakes import settled
from tests.streaminator.test_sampling import assert_follows, random_logits

DTYPES = [torch.float32, torch.bfloat16]


def load(dtype: torch.dtype) -> Kernels:
    try:
        return Kernels(dtype)
    except KernelsMissingError as error:
        pytest.skip(str(error))


def both(
    logits: torch.Tensor, temperature: float, num_top: int = 0, position: int = 0
) -> tuple[Drawn, Drawn]:
    """What PyTorch and the kernel draw from [R, V], with other noise in each row."""
    keys = torch.arange(len(logits)) * 0x1234567 - (1 << 62)
    positions = position + torch.arange(len(logits)) % 3
    params = SamplingParams(temperature=temperature)
    kernels = load(logits.dtype)
    return (
        settled(sample(logits, keys, positions, params, num_top)),
        sample(logits, keys, positions, params, num_top, kernels),
    )


def assert_same(expected: Drawn, drawn: Drawn) -> None:
    assert torch.equal(drawn.tokens, expected.tokens)
    assert drawn.top_ids.shape == expected.top_ids.shape
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.top_probs, expected.top_probs, rtol=0, atol=1e-5)


def assert_poison_stays_in_its_rows(
    both: Callable[[torch.Tensor, float, int], tuple[Drawn, Drawn]],
    logits: torch.Tensor,
    poison: float,
    temperature: float,
) -> None:
    """Rows 2 to 4 of six are invalid with it in them, and the others as before."""
    _, clean = both(logits, temperature, 5)
    logits[2, 33] = poison
    logits[3] = poison
    logits[4] = -math.inf
    _, drawn = both(logits, temperature, 5)
    assert drawn.tokens[2:5].tolist() == [INVALID_TOKEN] * 3
    rest = torch.tensor([0, 1, 5])
    for field, before in zip(drawn[:4], clean[:4], strict=True):
        assert torch.equal(field[rest], before[rest])


@pytest.mark.parametrize("temperature", [0, 0.3, 0.8, 1, 1.7])
@pytest.mark.parametrize("size", [1, 2, 40, 63, 64, 65, 255, 256, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_that_pytorch_draws(
    dtype: torch.dtype, size: int, temperature: float
) -> None:
    # Peaked rows, and flat ones, of which most tokens are no candidates.
    for spread in (0.3, 2.5):
        logits = random_logits(400, size, spread, seed=size).to(dtype)
        assert_same(*both(logits, temperature, position=17))


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_tokens_of_a_large_vocabulary_are_those_that_pytorch_draws(temperature: float) -> None:
    logits = random_logits(40, 150_001, 2.5).to(torch.bfloat16)
    assert_same(*both(logits, temperature, num_top=16))


@pytest.mark.parametrize("num_top", [0, 1, 7, 16, 64])
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("size", [5, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_likeliest_tokens_are_those_of_pytorch(
    dtype: torch.dtype, size: int, temperature: float, num_top: int
) -> None:
    logits = random_logits(50, size, 2.0).to(dtype)
    expected, drawn = both(logits, temperature, num_top)
    assert_same(expected, drawn)
    # Equal ones come in the order of their ids here, in any order there.
    ordered = logits.double() - torch.arange(size) * 1e-9
    ids = ordered.topk(min(num_top, size)).indices
    assert torch.equal(drawn.top_ids, ids)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("levels", [1, 2, 5, 60])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_are_told_apart_as_in_pytorch(
    dtype: torch.dtype, levels: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randint(0, levels, (500, 700), generator=generator) / 4 - 1
    logits[logits == 0] *= torch.randint(0, 2, (int((logits == 0).sum()),)) * 2 - 1.0  # -0 too
    assert_same(*both(logits.to(dtype), temperature))


@pytest.mark.parametrize("temperature", [0, 0.8, 100])
@pytest.mark.parametrize("num_left", [1, 30, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_ruled_out_are_never_drawn(
    dtype: torch.dtype, num_left: int, temperature: float
) -> None:
    logits = random_logits(500, 300, 1.0).to(dtype)
    order = torch.rand(500, 300, generator=torch.Generator().manual_seed(1)).argsort(-1)
    logits.scatter_(-1, order[:, num_left:], -math.inf)
    expected, drawn = both(logits, temperature)
    assert_same(expected, drawn)
    assert logits.gather(-1, drawn.tokens[:, None]).isfinite().all()


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("size", [40, 300])
@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_is_invalid_and_the_others_are_not_touched(
    dtype: torch.dtype, poison: float, size: int, temperature: float
) -> None:
    logits = random_logits(6, size, 1.0).to(dtype)
    assert_poison_stays_in_its_rows(both, logits, poison, temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_with_any_number_of_threads(dtype: torch.dtype) -> None:
    logits = random_logits(50, 1000, 1.0).to(dtype)
    keys = torch.arange(50)
    params = SamplingParams(temperature=0.8)
    together = sample(logits, keys, keys, params, 8, load(dtype))
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            kernels = load(dtype)
            for row in range(50):
                one = slice(row, row + 1)
                alone = sample(logits[one], keys[one], keys[one], params, 8, kernels)
                for field, whole in zip(alone[:4], together[:4], strict=True):
                    assert torch.equal(field, whole[one])
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_drawn_with_the_probabilities_of_the_logits(dtype: torch.dtype) -> None:
    # Many are equal, and most are no candidates.
    logits = (random_logits(1, 320, 0.3) * 8).round().div(8).to(dtype)
    _, drawn = both(logits.expand(12_000, -1), 1.0)
    assert_follows(torch.bincount(drawn.tokens, minlength=320), logits.double().softmax(-1)[0])


@pytest.mark.parametrize("temperature", [1e-3, 1e-4])
def test_a_temperature_near_0_takes_the_most_likely_token(temperature: float) -> None:
    logits = random_logits(30, 150, 3.0)
    _, drawn = both(logits, temperature)
    assert torch.equal(drawn.tokens, logits.argmax(-1))
