# SPDX-License-Identifier: Apache-2.0
"""The speculators of all open prompts, within a stated memory.

Invariants
- A speculator sees its own prompt's tokens only, each text once.
- Bounded: above `max_bytes` the least recently used speculators are dropped; a dropped one
  starts again from its prompt. That costs acceptance, never a token.

Used by: `engine.Engine`.
"""

from collections import OrderedDict
from collections.abc import Sequence as Seq

import numpy as np

from streaminator.config import SpeculatorConfig
from streaminator.sequence import Prompt, Sequence
from streaminator.speculative.ngram import NGramSpeculator
from streaminator.speculative.speculator import Gain, Guesses, Speculator


class SpeculatorStore:
    """prompt_id -> n-gram speculator; decides what each is trained on. A `speculator.Store`."""

    num_top = 0

    def __init__(self, config: SpeculatorConfig, *, num_kept_prompts: int = 0) -> None:
        """`num_kept_prompts`: how many dropped prompts' speculators stay, the latest ones."""
        self._config = config
        self._kept: OrderedDict[str, None] = OrderedDict()
        self._num_kept_prompts = num_kept_prompts
        self._max_bytes = config.speculator_memory << 20
        self._speculators: OrderedDict[str, Speculator] = OrderedDict()
        self.num_bytes = 0
        """Memory of all speculators, approximately."""

    def start(self, sequence: Sequence) -> None:
        """Nothing to prepare; a prompt that is drawn from again is not dropped for an older one."""
        self._kept.pop(sequence.prompt.prompt_id, None)

    def draft_all(self, sequences: Seq[Sequence], caps: Seq[int], floor: float) -> Guesses:
        """Draft up to `caps[i]` tokens for `sequences[i]`."""
        drafts = [
            self.draft(sequence.prompt, sequence.token_ids, cap)
            for sequence, cap in zip(sequences, caps, strict=True)
        ]
        lengths = np.array([len(draft) for draft in drafts], np.int64)
        tokens = np.zeros((len(drafts), 2, int(lengths.max(initial=0))), np.int64)
        for row, draft in zip(tokens, drafts, strict=True):
            row[0, : len(draft)] = draft
        return Guesses(tokens, lengths)

    def advance_all(
        self, gains: Seq[Gain], top_ids: object, top_probs: object, *, may_wait: bool = False
    ) -> None:
        """Nothing: an n-gram model goes by its text."""

    def learn_all(self) -> None:
        """Nothing: it learns finished completions."""

    def finish(self, sequence: Sequence, *, has_failed: bool) -> None:
        """Learn a finished completion."""
        if not has_failed:
            self.observe(sequence.prompt, sequence.completion_token_ids)

    def draft(self, prompt: Prompt, token_ids: Seq[int], max_tokens: int) -> list[int]:
        """Draft for a sequence of `prompt` whose known tokens are `token_ids`."""
        return self._get(prompt).draft(token_ids, max_tokens)

    def observe(self, prompt: Prompt, completion_token_ids: Seq[int]) -> None:
        """A completion of `prompt` has finished."""
        if self._config.generation_training:
            speculator = self._get(prompt)
            self.num_bytes -= speculator.num_bytes
            speculator.observe(completion_token_ids)
            self.num_bytes += speculator.num_bytes
            self._shrink()

    def drop(self, prompt: Prompt) -> None:
        """All completions of `prompt` are done: forget it, or an older one."""
        self._kept[prompt.prompt_id] = None
        if len(self._kept) > self._num_kept_prompts:
            speculator = self._speculators.pop(self._kept.popitem(last=False)[0], None)
            if speculator is not None:
                self.num_bytes -= speculator.num_bytes

    def _get(self, prompt: Prompt) -> Speculator:
        speculator = self._speculators.get(prompt.prompt_id)
        if speculator is None:
            speculator = self._make(prompt)
            self._speculators[prompt.prompt_id] = speculator
            self.num_bytes += speculator.num_bytes
            self._shrink()
        self._speculators.move_to_end(prompt.prompt_id)
        return speculator

    def _make(self, prompt: Prompt) -> Speculator:
        speculator = NGramSpeculator(self._config.ngram_order)
        if self._config.prompt_training:
            speculator.observe(prompt.token_ids)
        if self._config.generation_training:
            for token_ids in prompt.finished:
                speculator.observe(token_ids)
        return speculator

    def _shrink(self) -> None:
        while self.num_bytes > self._max_bytes and len(self._speculators) > 1:
            _, dropped = self._speculators.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
