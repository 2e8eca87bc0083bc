# SPDX-License-Identifier: Apache-2.0
"""Which prompts can run, and room for the longest of them.

Used by: `engine.Engine`.
"""

import torch

from streaminator.config import EngineConfig
from streaminator.engine.block_manager import BlockManager
from streaminator.engine.kv_cache import KVCache
from streaminator.engine.model_runner import ModelRunner
from streaminator.errors import first_line
from streaminator.sequence import Prompt


class Admission:
    """Says why a prompt cannot run; where only the cache is too small for it, the cache grows."""

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        cache: KVCache,
        block_manager: BlockManager,
        *,
        max_length: int,
        max_prompt_length: int,
    ) -> None:
        """`cache` has room for prompts of `max_prompt_length` tokens and as many as `max_length` more."""
        self._runner = runner
        self._config = config
        self._cache = cache
        self._block_manager = block_manager
        self._max_length = max_length
        self._longest = max_prompt_length

    def why_impossible(self, prompt: Prompt) -> str | None:
        """In words; None: it can run."""
        num = len(prompt.token_ids)
        limit = self._runner.max_model_len
        if num == 0:
            return "the prompt has no tokens"
        if limit is not None and num >= limit:
            return f"the prompt has {num} tokens and the model's context is {limit}"
        if min(prompt.token_ids) < 0 or max(prompt.token_ids) >= self._runner.vocab_size:
            return (
                f"the prompt's tokens go from {min(prompt.token_ids)} to {max(prompt.token_ids)} "
                f"and the model's vocabulary is {self._runner.vocab_size}: tokenizer and model do "
                "not belong together"
            )
        manager, config = self._block_manager, self._config
        needed = manager.num_blocks_for(self._total_length(num)) + 1
        if needed > manager.num_blocks:
            if config.num_blocks is not None:
                return f"it may need {needed} KV blocks: raise --num_blocks {config.num_blocks}"
            if config.kv_memory is not None:
                return f"it may need {needed} KV blocks: raise --kv_memory {config.kv_memory:g}"
            if problem := self._grow(needed):
                return f"it may need {needed} KV blocks, for which memory is short ({problem})"
        return None

    def make_room(self, max_prompt_length: int) -> None:
        """Between prompts: have room for a full stream of longer ones."""
        if max_prompt_length > self._longest:
            self._longest = max_prompt_length
            length = self._total_length(max_prompt_length)
            num_blocks = self._runner.num_blocks(self._config, length)
            if num_blocks > self._cache.num_blocks:
                self._grow(num_blocks)  # without that room they preempt each other

    def _total_length(self, num_prompt_tokens: int) -> int:
        return self._runner.total_length(num_prompt_tokens, self._max_length)

    def _grow(self, num_blocks: int) -> str | None:
        """Why there is no memory for it, in words; None: done."""
        try:
            self._cache.grow(num_blocks)
        except (torch.OutOfMemoryError, MemoryError, OSError) as error:
            return first_line(error)
        self._block_manager.grow(num_blocks)
        return None
