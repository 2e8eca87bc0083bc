# SPDX-License-Identifier: Apache-2.0
"""Whether what an engine drew is what the model says, so that none is fast and wrong.

Every engine is held against the model itself, in float32 (float64, if that is asked for):

- shape: every completion is there, and ends with an end-of-text token or at the full length;
- greedy: no token's logit is further below the largest than `TIES` allows;
- sampled: the mean log-likelihood of the tokens is the one the model expects of its own (minus its
  entropy), and completions end as often as it expects, both within `DEVIATIONS` standard deviations
  of a sampler that is right, and a little for rounding.

Used by: `jobs.benchmark`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jobs.engines.protocol import Draw, Run
from streaminator.config import SamplingParams

TIES = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""By the engines' type: logits that close may swap by rounding."""
SLACK = {"float64": 0.001, "float32": 0.005, "bfloat16": 0.03, "float16": 0.01}
"""By the engines' type: nats per token that rounding may cost or gain."""
DEVIATIONS = 4.0
_MOST_TOKENS = 4000
"""Completion tokens of an engine that the model is asked about."""
_LEAST_LOGPROB = -20.0


@dataclass(slots=True)
class Verdict:
    """What the check says about one engine."""

    problems: list[str] = field(default_factory=list)
    mean_length: float = 0.0
    num_tokens: int = 0
    """Of those that the model was asked about."""
    logprob: float = 0.0
    """Mean per token, as they are drawn: with temperature, top-k and so on; greedy: without."""
    expected_logprob: float | None = None
    """What the model expects of its own samples; greedy: None."""
    num_ties: int = 0
    """Greedy: tokens that are not the model's first, within the tolerance."""

    @property
    def is_correct(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(slots=True)
class _Score:
    """What the model says about the tokens of completions; scores add up."""

    num_tokens: int = 0
    logprob: float = 0.0
    expected: float = 0.0
    variance: float = 0.0
    num_ends: int = 0
    expected_ends: float = 0.0
    variance_ends: float = 0.0
    num_ties: int = 0
    widest_gap: float = 0.0

    def __add__(self, other: "_Score") -> "_Score":
        total = _Score(widest_gap=max(self.widest_gap, other.widest_gap))
        for name in (entry.name for entry in fields(self) if entry.name != "widest_gap"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total


class Checker:
    """Asks the model about completions; what two engines drew alike it is asked once."""

    def __init__(
        self, model: PreTrainedModel, sampling: SamplingParams, ends: Sequence[int], dtype: str
    ) -> None:
        """`dtype` is the engines'; the model's own may be wider."""
        self._model: Any = model
        self._sampling = sampling
        self._ends = list(ends)
        self._dtype = dtype
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], _Score] = {}

    def check(self, draw: Draw, runs: Sequence[Run]) -> Verdict:
        """All runs of one engine."""
        verdict = Verdict()
        verdict.problems += sorted({p for run in runs if (p := self._malformed(draw, run))})
        if verdict.problems:
            return verdict
        drawn = [
            (prompt, tuple(tokens))
            for run in runs
            for prompt, row in zip(draw.prompts, run.completions, strict=True)
            for tokens in row
        ]
        num_tokens = sum(len(tokens) for _, tokens in drawn)
        verdict.mean_length = num_tokens / len(drawn)
        # Evenly over prompts and repeats; greedy ones are nearly all alike.
        drawn = list(dict.fromkeys(drawn))
        stride = -(-sum(len(tokens) for _, tokens in drawn) // _MOST_TOKENS)
        score = sum((self._score(*one) for one in drawn[:: max(1, stride)]), _Score())
        verdict.num_tokens = score.num_tokens
        verdict.logprob = score.logprob / score.num_tokens
        if self._sampling.temperature == 0:
            self._check_greedy(score, verdict)
        else:
            self._check_sampled(score, verdict)
        return verdict

    def _malformed(self, draw: Draw, run: Run) -> str | None:
        shape = [len(row) for row in run.completions]
        if shape != [draw.num_completions] * len(draw.prompts):
            return "completions are missing"
        size = self._model.get_input_embeddings().num_embeddings
        for tokens in (tokens for row in run.completions for tokens in row):
            if not tokens or len(tokens) > draw.max_length:
                return "a completion is empty or too long"
            if not 0 <= min(tokens) <= max(tokens) < size:
                return "tokens are outside of the vocabulary"
            if any(token in self._ends for token in tokens[:-1]):
                return "a completion goes on behind its end"
            if len(tokens) < draw.max_length and tokens[-1] not in self._ends:
                return "a completion stops without an end-of-text token"
        return None

    def _check_greedy(self, score: _Score, verdict: Verdict) -> None:
        verdict.num_ties = score.num_ties
        if score.widest_gap > TIES[self._dtype]:
            verdict.problems.append(
                f"not greedy: a token's logit is {score.widest_gap:.2g} below the largest, more "
                f"than rounding ({TIES[self._dtype]})"
            )

    def _check_sampled(self, score: _Score, verdict: Verdict) -> None:
        num = score.num_tokens
        verdict.expected_logprob = score.expected / num
        bound = DEVIATIONS * math.sqrt(score.variance) / num + SLACK[self._dtype]
        if abs(verdict.logprob - verdict.expected_logprob) > bound:
            verdict.problems.append(
                f"not the model's text: {verdict.logprob:.3f} nats per token where it expects "
                f"{verdict.expected_logprob:.3f} +- {bound:.3f}"
            )
        bound = (
            DEVIATIONS * math.sqrt(score.variance_ends) + 1 + SLACK[self._dtype] * score.num_ends
        )
        if abs(score.num_ends - score.expected_ends) > bound:
            verdict.problems.append(
                f"not the model's length: {score.num_ends} completions end where it expects "
                f"{score.expected_ends:.1f} +- {bound:.1f}"
            )

    @torch.inference_mode()
    def _score(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> _Score:
        key = (prompt, tokens)
        if key not in self._known:
            device = self._model.device
            ids = torch.tensor([[*prompt, *tokens[:-1]]], device=device)
            logits = self._model(ids, logits_to_keep=len(tokens), use_cache=False).logits[0]
            drawn = torch.tensor(tokens, device=device)
            is_greedy = self._sampling.temperature == 0
            self._known[key] = (
                _greedy_score(logits, drawn) if is_greedy else self._sampled_score(logits, drawn)
            )
        return self._known[key]

    def _sampled_score(self, logits: torch.Tensor, drawn: torch.Tensor) -> _Score:
        warped: Any = _warpers(self._sampling)(drawn[None], logits)  # type: ignore[arg-type]
        logprobs = warped.log_softmax(-1).clamp_min(_LEAST_LOGPROB)
        probs = warped.softmax(-1)
        mean = (probs * logprobs).sum(-1)
        ends = probs[:, self._ends].sum(-1)
        has_ended = bool(self._ends) and int(drawn[-1]) in self._ends
        return _Score(
            num_tokens=len(drawn),
            logprob=float(logprobs.gather(1, drawn[:, None]).sum()),
            expected=float(mean.sum()),
            variance=float(((probs * logprobs**2).sum(-1) - mean**2).sum()),
            num_ends=int(has_ended),
            expected_ends=float(ends.sum()),
            variance_ends=float((ends * (1 - ends)).sum()),
        )


def _greedy_score(logits: torch.Tensor, drawn: torch.Tensor) -> _Score:
    own = logits.gather(1, drawn[:, None])[:, 0]
    gaps = logits.max(-1).values - own
    return _Score(
        num_tokens=len(drawn),
        logprob=float(logits.log_softmax(-1).gather(1, drawn[:, None]).sum()),
        num_ties=int((gaps > 0).sum()),
        widest_gap=float(gaps.max()),
    )


def _warpers(sampling: SamplingParams) -> LogitsProcessorList:
    """In the order that `generate` applies them in."""
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(warpers)
