# SPDX-License-Identifier: Apache-2.0
"""Draw one token per row with noise that depends on the token's place only (contract C1).

Gumbel-max: token = argmax_x(log p(x) + g(x)), p after temperature, top-k, top-p and min-p, and
g(x) a hash of (seed, prompt_id, sample_index, position, x). A draft is accepted while it equals
the token so drawn: the acceptance probability is p(draft), as in rejection sampling, and the
completion does not depend on the drafts at all (Daliri, Musco and Suresh 2024, section 3).

For large vocabularies the noise is made for the `NUM_CANDIDATES` most likely tokens one by one
and for all others as a single event, which is exact: the maximum over a set of Gumbel-perturbed
log-probabilities is the perturbed log of the set's mass. Only when that event wins is a token
drawn from the rest. The rest's mass comes from a float32 log-sum-exp, so it is right to 1e-7.

Compiled kernels (`csrc/sampling.c` on a CPU, `sampling_kernels` on a GPU) draw without filters. Their
tokens are these: only where the rest is within 1e-7 of winning, or two candidates within 1e-15, may
rounding decide, and on a GPU within 1e-7 which token of the rest it is.

Shapes: R rows, V vocabulary, C candidates.

Used by: `engine.Engine`.
"""

import math
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from streaminator.config import SamplingParams

NUM_CANDIDATES = 64
INVALID_TOKEN = -1
"""Stands for a token where the logits were not finite."""
_UNSETTLED = -2
"""Stands for a token that `Drawn.settle` draws."""

# Take a token id's place in the hash: the event "none of the candidates", and the choice then.
_REST = -1
_WITHIN_REST = -2


class Drawn(NamedTuple):
    """One token per row, and what the model said about it."""

    tokens: torch.Tensor
    """[R], `INVALID_TOKEN` where a row's logits hold NaN or +inf; -2 where it takes `settle`."""
    logprobs: torch.Tensor
    """[R] log-probability under the model at temperature 1 without filters."""
    top_ids: torch.Tensor
    """[R, M] the most likely tokens."""
    top_probs: torch.Tensor
    """[R, M] their probabilities at the sampling temperature (at 1 where that is 0), before
    filters; float32."""
    settle: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    """Tokens and log-probabilities of given rows [n], from all of the vocabulary. Few rows need it;
    asking a GPU which ones before the tokens are read would make the host wait twice in a step."""


class SamplingKernels(Protocol):
    """What draws in the place of PyTorch: `kernels.Kernels`, `gpu_sampling.GpuSampling`."""

    dtype: torch.dtype
    """Of the logits."""

    def sample(
        self,
        logits: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
        *,
        temperature: float,
        num_candidates: int,
        num_top: int,
    ) -> tuple[Any, ...]:
        """The fields of `Drawn`."""
        ...


class Transfer:
    """What was drawn, on its way to the host."""

    def __init__(self, drawn: Drawn) -> None:
        """Begin it; a GPU goes on with what it was given before."""
        self._drawn: Drawn | None = drawn
        self._both: torch.Tensor | None = None
        self.settled: list[int] = []
        """Rows whose token the device does not know; known after `wait`."""
        if drawn.tokens.device.type == "cuda":
            # One transfer; token ids are exact in float64.
            columns = [
                drawn.tokens[:, None],
                drawn.logprobs[:, None],
                drawn.top_ids,
                drawn.top_probs,
            ]
            both = torch.cat([column.double() for column in columns], dim=1)
            self._both = both.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(drawn.tokens.device))

    def wait(self) -> tuple[list[int], list[float], np.ndarray, np.ndarray]:
        """Tokens, log-probabilities, most likely tokens and their probabilities, all settled; once."""
        drawn = self._drawn
        assert drawn is not None, "waited for before"
        tokens, logprobs, top_ids, top_probs = self._read(drawn)
        if drawn.settle is not None:
            self.settled = rows = [row for row, token in enumerate(tokens) if token == _UNSETTLED]
            if rows:
                settled = drawn.settle(torch.tensor(rows, device=drawn.tokens.device))
                for row, token, logprob in zip(rows, *(x.tolist() for x in settled), strict=True):
                    tokens[row], logprobs[row] = token, logprob
        # Logits are large, and whoever asked may stay for longer. Where memory ran out, ask again.
        self._drawn = self._both = None
        return tokens, logprobs, top_ids, top_probs

    def _read(self, drawn: Drawn) -> tuple[list[int], list[float], np.ndarray, np.ndarray]:
        if self._both is None:
            tops = drawn.top_ids.numpy(), drawn.top_probs.numpy()
            return drawn.tokens.tolist(), drawn.logprobs.tolist(), *tops
        self._arrived.synchronize()
        both = self._both.numpy()
        num_top = drawn.top_ids.shape[1]
        top_ids, top_probs = both[:, 2 : 2 + num_top], both[:, 2 + num_top :]
        tokens = both[:, 0].astype(np.int64).tolist()
        return tokens, both[:, 1].tolist(), top_ids.astype(np.int64), top_probs.astype(np.float32)


def to_host(drawn: Drawn) -> tuple[list[int], list[float], np.ndarray, np.ndarray]:
    """What `Transfer.wait` returns."""
    return Transfer(drawn).wait()


def noise_key(seed: int, prompt_id: str, sample_index: int) -> int:
    """Signed 64-bit key of one completion's noise; the same in every process."""
    text = f"{seed}\0{sample_index}\0{prompt_id}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)


def gumbel(keys: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [R, C] in float64 for tokens [R, C], a pure function of its arguments.

    Args:
        keys: [R] `noise_key` of each row's completion.
        positions: [R] index of the token in its completion.
        tokens: [R, C] token ids.
    """
    return -torch.log(-torch.log(_uniform(keys, positions, tokens)))


def sample(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    params: SamplingParams,
    num_top: int = 0,
    kernels: SamplingKernels | None = None,
) -> Drawn:
    """Draw a token for each row.

    Args:
        logits: [R, V] of the model, any float type.
        keys: [R] `noise_key` of each row's completion.
        positions: [R] index of the drawn token in its completion.
        params: temperature 0 takes the most likely token.
        num_top: M, at most `NUM_CANDIDATES`.
        kernels: draw with them what they can: without filters, from logits of their type.
    """
    is_greedy = params.temperature == 0
    if kernels and logits.dtype == kernels.dtype and (is_greedy or not _is_filtered(params)):
        size = logits.shape[-1]
        num_top = min(num_top, size)
        num_candidates = max(num_top, 1) if is_greedy else min(NUM_CANDIDATES, size)
        return Drawn(
            *kernels.sample(
                logits,
                keys,
                positions,
                temperature=params.temperature,
                num_candidates=num_candidates,
                num_top=num_top,
            )
        )
    kind = logits.dtype if logits.dtype == torch.float64 else torch.float32
    # `settle` may be asked when the next forward has written its own.
    logits = logits.to(kind, copy=not is_greedy and not params.top_k)
    log_total = logits.logsumexp(-1)
    if is_greedy:
        tokens = logits.argmax(-1)
        top_logits, top_ids = _likeliest(logits, min(num_top, logits.shape[-1]))
        top_probs = (top_logits - log_total[:, None]).exp().float()
        draw_rows = None
    else:
        tokens, top_ids, top_probs, draw_rows = _draw(logits, keys, positions, params)

    def logprobs_of(rows: torch.Tensor | slice, tokens: torch.Tensor) -> torch.Tensor:
        return logits[rows].gather(-1, tokens.clamp(min=0)[:, None])[:, 0] - log_total[rows]

    def settle(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert draw_rows is not None
        tokens = draw_rows(rows)
        return tokens, logprobs_of(rows, tokens)

    logprobs = logprobs_of(slice(None), tokens)
    tokens = torch.where(log_total.isfinite(), tokens, INVALID_TOKEN)
    return Drawn(
        tokens, logprobs, top_ids[:, :num_top], top_probs[:, :num_top], draw_rows and settle
    )


def _draw(
    logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor] | None]:
    """Tokens [R], the candidates' ids and probabilities [R, C], most likely first, and what draws
    the tokens of rows [n] that are not settled.
    """
    size = logits.shape[-1]
    num = min(size, max(NUM_CANDIDATES, params.top_k))
    values, ids = _likeliest(logits, num)
    # By a tensor: a GPU would multiply by the inverse of a number.
    temperature = logits.new_full((), params.temperature)
    values, scaled = values / temperature, logits / temperature
    # The largest is subtracted first: what is left for the rest is a small difference.
    log_total = (scaled - values[:, :1]).logsumexp(-1, keepdim=True)
    logprobs = values.double() - values[:, :1].double() - log_total.double()
    probs = logprobs.exp()
    rest_mass = (1 - probs.sum(-1)).clamp(min=0)
    top = ids, probs.float()
    is_filtered = _is_filtered(params)
    scores = _filter(logprobs, params) if is_filtered else logprobs
    best, index = (scores + gumbel(keys, positions, ids)).max(-1)
    tokens = ids.gather(-1, index[:, None])[:, 0]
    if num == size or params.top_k:
        return tokens, *top, None
    if is_filtered:

        def draw_rows(rows: torch.Tensor) -> torch.Tensor:
            values, order = scaled[rows].sort(dim=-1, descending=True, stable=True)
            logprobs = _filter(values.log_softmax(-1).double(), params)
            index = (logprobs + gumbel(keys[rows], positions[rows], order)).argmax(-1)
            return order.gather(-1, index[:, None])[:, 0]

        is_unsettled = _reaches_past(logprobs, rest_mass, params)
        return torch.where(is_unsettled, _UNSETTLED, tokens), *top, draw_rows

    rest = torch.full_like(ids[:, :1], _REST)
    rest_score = rest_mass.log() + gumbel(keys, positions, rest)[:, 0]

    def draw_of_rest(rows: torch.Tensor) -> torch.Tensor:
        return draw_rest(scaled[rows], ids[rows], keys[rows], positions[rows])

    return torch.where(rest_score > best, _UNSETTLED, tokens), *top, draw_of_rest


def draw_rest(
    scaled: torch.Tensor, ids: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Tokens [n] that are none of the candidates, by the inverse of their cumulative distribution.

    Args:
        scaled: [n, V] logits over the temperature.
        ids: [n, C] candidates, most likely first.
        keys: [n] see `sample`.
        positions: [n] see `sample`.
    """
    probs = (scaled - scaled.gather(-1, ids[:, :1])).double().exp().scatter(-1, ids, 0)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    uniform = _uniform(keys, positions, torch.full_like(ids[:, :1], _WITHIN_REST))
    tokens = torch.searchsorted(cumulative, uniform * total, right=True)
    # Rounding may have let a rest win that has no mass.
    return torch.where(total > 0, tokens.clamp(max=scaled.shape[-1] - 1), ids[:, :1])[:, 0]


def _likeliest(logits: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids [R, num] of the likeliest tokens, of equal ones those of the lowest ids.

    Another choice among equal ones would draw other tokens, with the same probabilities. CUDA's
    `topk` makes this one; a CPU's makes none.
    """
    values, ids = logits.topk(num)
    if num and logits.device.type == "cpu":
        edge = values[:, -1:]
        rows, equal = (logits == edge).nonzero(as_tuple=True)
        place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        place += (values > edge).sum(-1)[rows]
        is_kept = place < num
        ids[rows[is_kept], place[is_kept]] = equal[is_kept]
    return values, ids


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _reaches_past(
    logprobs: torch.Tensor, rest_mass: torch.Tensor, params: SamplingParams
) -> torch.Tensor:
    """Rows [R] in which top-p or min-p may keep tokens beyond the candidates [R, C]."""
    reaches = torch.ones_like(rest_mass, dtype=torch.bool)
    if params.top_p < 1:
        reaches &= 1 - rest_mass < params.top_p
    if params.min_p > 0:
        reaches &= logprobs[:, -1] - logprobs[:, 0] >= math.log(params.min_p)
    return reaches


def _filter(logprobs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """-inf for what top-k, then top-p, then min-p drop; rows are sorted, the top token stays."""
    keep = torch.ones_like(logprobs, dtype=torch.bool)
    if params.top_k:
        keep[:, params.top_k :] = False
    if params.top_p < 1:
        # The mass of what top-k kept is the whole, as in transformers' chain of warpers.
        probs = torch.where(keep, logprobs.exp(), 0)
        probs = probs / probs.sum(-1, keepdim=True) if params.top_k else probs
        keep &= probs.cumsum(-1) - probs < params.top_p
    if params.min_p:
        keep &= logprobs.exp() >= params.min_p * logprobs[:, :1].exp()
    keep[:, 0] = True
    return logprobs.masked_fill(~keep, float("-inf"))


def _uniform(keys: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Hash [R, C] in (0, 1) of each row's place and the token ids [R, C]."""
    row = _mix(keys + positions * _signed(0x9E3779B97F4A7C15))
    bits = _mix(row[:, None] + (tokens + 2) * _signed(0xD1342543DE82EF95))
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shift(x: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Logical shift to the right of 64-bit integers."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), on signed 64-bit integers."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)
