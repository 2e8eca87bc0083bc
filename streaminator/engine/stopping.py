# SPDX-License-Identifier: Apache-2.0
"""When a completion ends, and its text.

Used by: `engine.Engine`.
"""

from typing import TYPE_CHECKING

from streaminator.config import SamplingParams
from streaminator.engine.sampler import INVALID_TOKEN
from streaminator.sequence import FinishReason, Sequence
from streaminator.speculative.verify import Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopChecker:
    """End-of-text tokens, stop token ids, stop strings and the length limit."""

    def __init__(
        self,
        params: SamplingParams,
        eos_token_ids: set[int],
        tokenizer: "PreTrainedTokenizerBase | None",
    ) -> None:
        """`tokenizer` None: no text, and stop strings are not allowed."""
        assert tokenizer is not None or not params.stop
        self._tokenizer = tokenizer
        self._stop = params.stop
        self._stop_token_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            self._stop_token_ids |= eos_token_ids
        for stop in params.stop:
            # Text is decoded without special tokens, so one given as text is looked for as token.
            token = getattr(tokenizer, "added_tokens_encoder", {}).get(stop)
            if token is not None:
                self._stop_token_ids.add(token)
        self._suspects = self._stop_token_ids | {INVALID_TOKEN}
        # A stop string ends in the newest token, so it lies within so many last ones: every
        # token but a byte of a character, or a special one, adds at least one byte of text.
        self._window = max((len(s.encode()) for s in params.stop), default=0) + 8

    def add(self, verdict: Verdict) -> tuple[FinishReason | None, str | None]:
        """Add what was drawn to its sequence, up to the token that ends it: why, and what went wrong."""
        sequence, drawn = verdict.sequence, verdict.drawn
        length = len(sequence.token_ids) + len(drawn)
        is_plain = not self._stop and length < sequence.max_num_tokens
        if is_plain and self._suspects.isdisjoint(drawn):  # as in most steps
            sequence.token_ids += drawn
            sequence.logprobs += verdict.logprobs
            sequence.from_draft += [True] * (len(drawn) - 1) + [False]
            return None, None
        for index, (token, logprob) in enumerate(zip(drawn, verdict.logprobs, strict=True)):
            if token == INVALID_TOKEN:
                where = f"token {len(sequence.token_ids) - sequence.num_prompt_tokens}"
                return FinishReason.FAILED, f"the model's logits are not finite at {where}"
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.from_draft.append(index < len(drawn) - 1)
            reason = self.check(sequence)
            if reason is not None:
                # Accepted tokens behind the end are not part of the completion.
                sequence.accepted[-1] = min(index + 1, len(drawn) - 1)
                return reason, None
        return None, None

    def check(self, sequence: Sequence) -> FinishReason | None:
        """Why the sequence ends at its last token, or None if it goes on."""
        if sequence.token_ids[-1] in self._stop_token_ids:
            return FinishReason.STOP
        if self._stop:
            start = max(len(sequence.token_ids) - self._window, sequence.num_prompt_tokens)
            tail = self._decode(sequence.token_ids[start:])
            if any(stop in tail for stop in self._stop):
                return FinishReason.STOP
        if len(sequence.token_ids) >= sequence.max_num_tokens:
            return FinishReason.LENGTH
        return None

    def text(self, sequence: Sequence) -> str:
        """The completion without special tokens, cut before the first stop string."""
        if self._tokenizer is None:
            return ""
        text = self._decode(sequence.completion_token_ids)
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        return text[: min(found)] if found else text

    def _decode(self, token_ids: list[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)  # type: ignore[return-value]
