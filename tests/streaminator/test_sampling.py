# SPDX-License-Identifier: Apache-2.0
"""The sampler draws from the model's distribution, with noise that is a pure function of place."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from streaminator.config import EngineConfig, SamplingParams
from streaminator.engine import sampler
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.sampler import INVALID_TOKEN, NUM_CANDIDATES, Drawn, gumbel, noise_key
from tests.fakes import draw, make_prompt, random_tokens, settled

FILTERS = {
    "none": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 7},
    "top_k_beyond_the_candidates": {"top_k": 90},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
}


def sample(
    logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, params: SamplingParams
) -> Drawn:
    return settled(sampler.sample(logits, keys, positions, params))


def random_logits(num_rows: int, size: int, spread: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, size, generator=generator) * spread


def draw_tokens(logits: torch.Tensor, num: int, params: SamplingParams) -> torch.Tensor:
    """`num` draws [num] from one row of logits [V], each with a key of its own."""
    keys = torch.tensor([noise_key(0, f"p{i}", i % 3) for i in range(num)])
    positions = torch.arange(num) % 5
    return sample(logits.expand(num, -1), keys, positions, params)[0]


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Logits [R, V] after transformers' own warpers, in the order `generate` uses."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(logits.shape[0], 1, dtype=torch.int64), logits.double())


def assert_follows(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """Pearson's chi-square of `counts` [V] against `probs` [V] is not implausibly large.

    For X chi-square distributed with d degrees of freedom P(X >= d + 2 sqrt(d t) + 2 t) <= e^-t
    (Laurent and Massart 2000, lemma 1). t = 16 makes a false alarm less likely than 1.2e-7, and
    leaves room up to 1e-6 for Pearson's statistic being only nearly chi-square distributed with
    the tokens expected less than 10 times pooled.
    """
    num = counts.sum()
    expected = probs.double() * num
    assert counts[expected == 0].sum() == 0, "a token was drawn that cannot be"
    is_rare = expected < 10
    observed = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]]).double()
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    if expected[-1] < 10:  # too few to be a bin of their own
        observed = torch.cat([observed[:-2], observed[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    degrees = len(expected) - 1
    assert degrees > 3
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    t = 16
    assert statistic < degrees + 2 * math.sqrt(degrees * t) + 2 * t


@pytest.mark.parametrize("size", [40, 150])
@pytest.mark.parametrize("name", FILTERS)
def test_tokens_are_drawn_with_the_probabilities_of_the_warped_logits(name: str, size: int) -> None:
    params = SamplingParams(**({"temperature": 1.0} | FILTERS[name]))
    logits = random_logits(1, size, spread=1.2, seed=size)
    counts = torch.bincount(draw_tokens(logits[0], 20_000, params), minlength=size)
    assert_follows(counts, warped(logits, params).softmax(-1)[0])


def test_tokens_beyond_the_candidates_are_drawn_as_often_as_they_should_be() -> None:
    size = 5 * NUM_CANDIDATES
    logits = random_logits(1, size, spread=0.3)
    num = 12_000
    drawn = draw_tokens(logits[0], num, SamplingParams(temperature=1.0))
    is_candidate = torch.isin(drawn, logits[0].topk(NUM_CANDIDATES).indices)
    assert (~is_candidate).sum() > num / 2
    assert_follows(torch.bincount(drawn, minlength=size), logits.softmax(-1)[0])


def test_the_first_tokens_of_a_stream_follow_the_models_distribution(llama: ModelRunner) -> None:
    token_ids = random_tokens(9, seed=5)
    num = 3000
    prompts = [make_prompt(f"p{i}", token_ids) for i in range(num)]
    sampling = SamplingParams(temperature=1.5, max_length=1)
    completions = draw(
        llama, prompts, sampling=sampling, engine=EngineConfig(stream_width=256, num_blocks=300)
    )
    drawn = torch.tensor([completion.token_ids[0] for completion in completions.values()])
    logits = greedy_logits(llama, token_ids)
    assert_follows(
        torch.bincount(drawn, minlength=len(logits)), (logits.double() / 1.5).softmax(-1)
    )


def greedy_logits(runner: ModelRunner, token_ids: tuple[int, ...]) -> torch.Tensor:
    """The model's own logits [V] after `token_ids`, from log-probabilities of many draws."""
    attention = runner.model.config._attn_implementation
    runner.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return runner.model(torch.tensor([token_ids])).logits[0, -1].float()
    finally:
        runner.model.set_attn_implementation(attention)


@pytest.mark.parametrize("size", [40, 150])
@pytest.mark.parametrize("name", [name for name in FILTERS if name not in ("none", "hot", "cold")])
def test_filters_keep_exactly_the_tokens_that_transformers_keeps(name: str, size: int) -> None:
    params = SamplingParams(**({"temperature": 1.0} | FILTERS[name]))
    for seed, spread in enumerate([0.1, 0.5, 1.0, 3.0]):
        logits = random_logits(1, size, spread, seed)
        kept = warped(logits, params)[0].isfinite()
        # Noise is high enough for every kept token within so many draws, unless it is very rare.
        drawn = draw_tokens(logits[0], 3000, params).unique()
        assert kept[drawn].all()
        probs = warped(logits, params).softmax(-1)[0]
        missed = kept.index_fill(0, drawn, False)
        assert probs[missed].sum() < 0.05
        scaled = logits.double() / params.temperature
        logprobs, ids = scaled.log_softmax(-1).sort(-1, descending=True)
        left = sampler._filter(logprobs, params)[0].isfinite()
        assert set(ids[0][left].tolist()) == set(kept.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("name", FILTERS)
def test_a_draw_does_not_depend_on_the_other_rows(name: str) -> None:
    params = SamplingParams(**({"temperature": 1.0} | FILTERS[name]))
    # Peaked and flat rows: the flat ones need more candidates than the peaked ones.
    logits = torch.cat([random_logits(4, 200, 4.0), random_logits(4, 200, 0.2, seed=1)])
    keys = torch.tensor([noise_key(0, "p", index) for index in range(8)])
    positions = torch.arange(8)
    together, logprobs, *_ = sample(logits, keys, positions, params)
    for row in range(8):
        one = slice(row, row + 1)
        token, logprob, *_ = sample(logits[one], keys[one], positions[one], params)
        assert token.item() == together[row].item()
        assert logprob.item() == logprobs[row].item()


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 20},
        {"min_p": 0.1},
        {"top_p": 0.8},
    ],
)
def test_a_draw_among_equal_logits_does_not_depend_on_the_other_rows(
    filters: dict[str, float],
) -> None:
    params = SamplingParams(temperature=0.5, **filters)
    num = 1000
    # As coarse as those of a model in bfloat16, so that many tokens tie; one flat row that
    # needs more candidates than the others.
    peaked = (random_logits(num, 400, 3.5) * 4).round() / 4
    flat = random_logits(1, 400, 0.1)
    keys = torch.arange(num + 1)
    positions = torch.zeros(num + 1, dtype=torch.int64)
    together, _, *_ = sample(torch.cat([peaked, flat]), keys, positions, params)
    alone, _, *_ = sample(peaked, keys[:num], positions[:num], params)
    assert torch.equal(together[:num], alone)


def test_noise_is_a_pure_function_of_key_position_and_token() -> None:
    keys = torch.tensor([noise_key(0, f"p{i}", i) for i in range(6)])
    positions = torch.arange(6) * 100
    ids = torch.arange(50).expand(6, -1)
    whole = gumbel(keys, positions, ids)
    assert torch.equal(whole, gumbel(keys, positions, ids))
    backwards = gumbel(keys.flip(0), positions.flip(0), ids.flip(1))
    assert torch.equal(whole, backwards.flip(0, 1))
    for row in range(6):
        for token in (0, 49):
            one = gumbel(keys[row, None], positions[row, None], torch.tensor([[token]]))
            assert one.item() == whole[row, token].item()


def test_noise_keys_are_the_same_in_every_process() -> None:
    # Written down once: another value would give a resumed run other tokens.
    assert noise_key(0, "p", 0) == -5819850857439336274
    assert noise_key(1, "p", 0) != noise_key(0, "p", 0) != noise_key(0, "p", 1)
    assert noise_key(1, "0", 1) != noise_key(1, "1", 0) != noise_key(0, "1", 1)


def test_noise_has_the_gumbel_distribution() -> None:
    keys = torch.tensor([noise_key(0, f"p{i}", 0) for i in range(200)])
    noise = gumbel(keys, torch.zeros(200, dtype=torch.int64), torch.arange(100).expand(200, -1))
    assert noise.isfinite().all()
    # Of 20,000 values, compared with -log(-log u); 6 standard errors of a binomial count.
    for quantile in (0.01, 0.1, 0.5, 0.9, 0.99):
        share = (noise <= -math.log(-math.log(quantile))).double().mean().item()
        assert abs(share - quantile) < 6 * math.sqrt(quantile * (1 - quantile) / noise.numel())


@pytest.mark.parametrize("changed", ["seed", "prompt_id", "sample_index", "position", "token"])
def test_noise_of_different_places_is_uncorrelated(changed: str) -> None:
    num = 20_000
    ids = torch.arange(num)[:, None] % 100

    def noise(step: int) -> torch.Tensor:
        place = {"seed": 0, "prompt_id": 0, "sample_index": 0, "position": 0, "token": 0}
        place[changed] += step
        keys = torch.tensor(
            [
                noise_key(place["seed"], f"p{i}-{place['prompt_id']}", place["sample_index"])
                for i in range(num)
            ]
        )
        positions = torch.full((num,), place["position"])
        return gumbel(keys, positions, ids + place["token"])[:, 0]

    # A correlation of independent values has a standard error of 1 / sqrt(num).
    for step in (1, 2):
        pair = torch.stack([noise(0), noise(step)])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 6 / math.sqrt(num)


def test_consecutive_tokens_of_a_completion_are_drawn_independently() -> None:
    logits = random_logits(1, 6, spread=0.5)
    num = 20_000
    keys = torch.tensor([noise_key(0, f"p{i}", 0) for i in range(num)])
    rows = logits.expand(num, -1)
    params = SamplingParams(temperature=1.0)
    first, _, *_ = sample(rows, keys, torch.zeros(num, dtype=torch.int64), params)
    second, _, *_ = sample(rows, keys, torch.ones(num, dtype=torch.int64), params)
    probs = logits.softmax(-1)[0]
    assert_follows(
        torch.bincount(first * 6 + second, minlength=36), torch.outer(probs, probs).flatten()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["none", "cold", "top_k", "all"])
def test_logprobs_are_the_models_at_temperature_1_without_filters(
    name: str, dtype: torch.dtype
) -> None:
    params = SamplingParams(**({"temperature": 1.0} | FILTERS[name]))
    logits = random_logits(30, 100, 2.0).to(dtype)
    keys = torch.arange(30)
    drawn, logprobs, *_ = sample(logits, keys, keys, params)
    expected = logits.double().log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("size", [40, 150])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_invalid_and_the_others_are_not_touched(
    poison: float, size: int, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature)
    logits = random_logits(5, size, 1.0)
    keys = torch.arange(5)
    clean, _, *_ = sample(logits, keys, keys, params)
    logits[2, 3] = poison
    drawn, _, *_ = sample(logits, keys, keys, params)
    assert drawn[2] == INVALID_TOKEN
    is_clean = torch.arange(5) != 2
    assert torch.equal(drawn[is_clean], clean[is_clean])


@pytest.mark.parametrize("name", FILTERS)
def test_a_token_that_the_model_rules_out_is_never_drawn(name: str) -> None:
    params = SamplingParams(**({"temperature": 1.0} | FILTERS[name]))
    logits = random_logits(1, 100, 0.2)
    logits[0, 50:] = -math.inf
    assert draw_tokens(logits[0], 2000, params).max() < 50


def test_temperature_0_takes_the_most_likely_token() -> None:
    logits = random_logits(30, 150, 1.0)
    keys = torch.arange(30)
    drawn, _, *_ = sample(logits, keys, keys, SamplingParams(temperature=0))
    assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-4])
def test_a_temperature_near_0_takes_the_most_likely_token(temperature: float) -> None:
    logits = random_logits(30, 150, 3.0)
    keys = torch.arange(30)
    drawn, _, *_ = sample(logits, keys, keys, SamplingParams(temperature=temperature))
    assert torch.equal(drawn, logits.argmax(-1))


def test_a_filter_that_keeps_one_token_is_greedy() -> None:
    logits = random_logits(30, 150, 1.0)
    keys = torch.arange(30)
    for kept_one in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        drawn, _, *_ = sample(logits, keys, keys, SamplingParams(temperature=1.0, **kept_one))
        assert torch.equal(drawn, logits.argmax(-1))
