# SPDX-License-Identifier: Apache-2.0
"""The speculators that a replay can compare, behind one interface.

Used by: `replay`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streaminator.errors import ConfigError
from streaminator.speculative.memory import Memory
from streaminator.speculative.memory_tables import Ints
from streaminator.speculative.ngram import NGramSpeculator

Chains = tuple[Ints, Ints, NDArray[np.float32]]
"""Tokens [n, k], lengths [n], predicted survival [n, k] (0: not known)."""


class ReplaySpeculator(Protocol):
    """What the replay asks of a speculator; at most one running completion per prompt."""

    def open(self, prompt_id: str, token_ids: Ints) -> None:
        """A prompt begins."""
        ...

    def close(self, prompt_id: str) -> None:
        """All completions of a prompt are done."""
        ...

    def start(self, prompt_id: str, token_ids: Ints) -> int:
        """A completion begins; returns its handle."""
        ...

    def finish(self, handle: int) -> None:
        """A completion ends."""
        ...

    def draft(self, handles: Ints, caps: Ints) -> Chains:
        """Draft for each handle."""
        ...

    def commit(self, handles: Ints, tokens: Ints, lengths: Ints) -> None:
        """Append new tokens, `lengths` of them to each."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory held; 0: not known."""
        ...


class MemoryReplay:
    """The memory."""

    def __init__(self, **options: Any) -> None:
        self._memory = Memory(**options)

    def open(self, prompt_id: str, token_ids: Ints) -> None:
        """A prompt begins."""
        self._memory.open(prompt_id, token_ids.tolist(), ())

    def close(self, prompt_id: str) -> None:
        """All completions of a prompt are done."""
        self._memory.close(prompt_id)

    def start(self, prompt_id: str, token_ids: Ints) -> int:
        """A completion begins; logs hold no noise."""
        return self._memory.start(prompt_id, token_ids.tolist(), 0)

    def finish(self, handle: int) -> None:
        """A completion ends."""
        self._memory.finish(handle)

    def draft(self, handles: Ints, caps: Ints) -> Chains:
        """Draft for each handle."""
        return self._memory.draft(handles, caps)

    def commit(self, handles: Ints, tokens: Ints, lengths: Ints) -> None:
        """Append new tokens and learn."""
        self._memory.commit(handles, tokens, lengths)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._memory.num_bytes


class _OneByOne:
    """For speculators without a batch interface."""

    num_bytes = 0

    def __init__(self) -> None:
        self._texts: dict[int, tuple[str, int, list[int]]] = {}
        self._next = 0

    def start(self, prompt_id: str, token_ids: Ints) -> int:
        """A completion begins."""
        self._next += 1
        self._texts[self._next] = (prompt_id, len(token_ids), token_ids.tolist())
        return self._next

    def draft(self, handles: Ints, caps: Ints) -> Chains:
        """Draft for each handle."""
        drafts = [self._draft(int(h), int(cap)) for h, cap in zip(handles, caps, strict=True)]
        tokens = np.zeros((len(handles), int(caps.max(initial=0))), np.int64)
        for row, draft in zip(tokens, drafts, strict=True):
            row[: len(draft)] = draft
        return tokens, np.array([len(draft) for draft in drafts]), np.zeros(tokens.shape, "f4")

    def commit(self, handles: Ints, tokens: Ints, lengths: Ints) -> None:
        """Append new tokens."""
        pieces = np.split(tokens, np.cumsum(lengths)[:-1])
        for handle, piece in zip(handles, pieces, strict=True):
            self._texts[int(handle)][2].extend(piece.tolist())
            self._append(int(handle), piece)

    def _draft(self, handle: int, cap: int) -> Sequence[int]:
        raise NotImplementedError

    def _append(self, handle: int, tokens: Ints) -> None:
        """A speculator that learns while a completion runs does it here."""


class NGramReplay(_OneByOne):
    """The original's n-grams, one model per prompt."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self._order = order
        self._models: dict[str, NGramSpeculator] = {}

    def open(self, prompt_id: str, token_ids: Ints) -> None:
        """A prompt begins."""
        self._models[prompt_id] = NGramSpeculator(self._order)
        self._models[prompt_id].observe(token_ids.tolist())

    def close(self, prompt_id: str) -> None:
        """All completions of a prompt are done."""
        del self._models[prompt_id]

    def finish(self, handle: int) -> None:
        """A completion ends: the n-grams learn from it."""
        prompt_id, start, text = self._texts.pop(handle)
        self._models[prompt_id].observe(text[start:])

    def _draft(self, handle: int, cap: int) -> Sequence[int]:
        prompt_id, _, text = self._texts[handle]
        return self._models[prompt_id].draft(text, cap)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(model.num_bytes for model in self._models.values())


class ArcticReplay(_OneByOne):
    """ArcticInference's suffix decoding with vLLM's defaults: a tree per request, one of all."""

    def __init__(self, depth: int = 24, max_cached_requests: int = 10_000) -> None:
        super().__init__()
        try:
            from arctic_inference.suffix_decoding import (  # pyright: ignore[reportMissingImports]
                SuffixDecodingCache,
            )
        except ImportError as error:
            raise ConfigError(
                f"speculators arctic: {error} (pip install arctic-inference)"
            ) from None
        self._depth = depth
        self._cache = SuffixDecodingCache(depth, max_cached_requests)

    def open(self, prompt_id: str, token_ids: Ints) -> None:
        """Nothing is kept per prompt."""

    def close(self, prompt_id: str) -> None:
        """Nothing was kept per prompt."""

    def start(self, prompt_id: str, token_ids: Ints) -> int:
        """A completion begins."""
        handle = super().start(prompt_id, token_ids)
        self._cache.start_request(handle, token_ids.astype(np.int32))
        return handle

    def finish(self, handle: int) -> None:
        """A completion ends; the tree of all keeps it."""
        self._cache.stop_request(handle)
        del self._texts[handle]

    def _draft(self, handle: int, cap: int) -> Sequence[int]:
        context = np.array(self._texts[handle][2][-self._depth :], np.int32)
        return self._cache.speculate(handle, context, max_spec_tokens=cap).token_ids

    def _append(self, handle: int, tokens: Ints) -> None:
        self._cache.add_active_response(handle, tokens.astype(np.int32))


def _memory(**options: Any) -> Callable[[float | None], ReplaySpeculator]:
    def make(min_survival: float | None) -> ReplaySpeculator:
        least = {} if min_survival is None else {"min_survival": min_survival}
        return MemoryReplay(**options, **least)

    return make


SPECULATORS: dict[str, Callable[[float | None], ReplaySpeculator]] = {
    "memory": _memory(),
    "memory_private": _memory(shared=False),
    "ngram": lambda _: NGramReplay(3),
    "bigram": lambda _: NGramReplay(2),
    "arctic": lambda _: ArcticReplay(),
}
"""Name -> how to make one, given the least survival worth drafting (None: its own default)."""
