# SPDX-License-Identifier: Apache-2.0
"""The speculators that a replay can compare, behind one interface.

Used by: `replay`, `streaminator.cli_replay`.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from streaminator.errors import ConfigError, first_line
from streaminator.speculative.memory import Memory
from streaminator.speculative.memory_tables import Ints
from streaminator.speculative.ngram import NGramSpeculator

Guesses = tuple[Ints, NDArray[np.float32]]
"""Tokens [n, c, k] and their predicted survival: of the chains, and with c = 2 of the second choices
beside them (NaN: not known; 0: no token here)."""


Numbers = NDArray[np.bool_]


class ReplaySpeculator(Protocol):
    """What the replay asks of a speculator; at most one running completion per prompt."""

    def open(self, prompt_id: str, token_ids: Ints, finished: Sequence[Ints]) -> None:
        """A prompt begins, of which some completions were drawn before (warm start)."""
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

    def draft(self, handles: Ints, caps: Ints) -> Guesses:
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

    def open(self, prompt_id: str, token_ids: Ints, finished: Sequence[Ints]) -> None:
        """A prompt begins."""
        self._memory.open(prompt_id, token_ids.tolist(), [text.tolist() for text in finished])

    def close(self, prompt_id: str) -> None:
        """All completions of a prompt are done."""
        self._memory.close(prompt_id)

    def start(self, prompt_id: str, token_ids: Ints) -> int:
        """A completion begins; logs hold no noise."""
        return self._memory.start(prompt_id, token_ids.tolist(), 0)

    def finish(self, handle: int) -> None:
        """A completion ends."""
        self._memory.finish(handle)

    def draft(self, handles: Ints, caps: Ints) -> Guesses:
        """Draft for each handle."""
        drafts = self._memory.draft(handles, caps)
        return drafts.tokens, drafts.survival

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

    def draft(self, handles: Ints, caps: Ints) -> Guesses:
        """Draft for each handle."""
        drafts = [self._draft(int(h), int(cap)) for h, cap in zip(handles, caps, strict=True)]
        tokens = np.zeros((len(handles), 1, int(caps.max(initial=0))), np.int64)
        survival = np.zeros(tokens.shape, np.float32)
        for row, draft in enumerate(drafts):
            tokens[row, 0, : len(draft)] = draft
            survival[row, 0, : len(draft)] = np.nan
        return tokens, survival

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

    def __init__(self, order: int, *, learns_prompts: bool, learns_completions: bool) -> None:
        super().__init__()
        self._order = order
        self._learns_prompts = learns_prompts
        self._learns_completions = learns_completions
        self._models: dict[str, NGramSpeculator] = {}

    def open(self, prompt_id: str, token_ids: Ints, finished: Sequence[Ints]) -> None:
        """A prompt begins."""
        model = self._models[prompt_id] = NGramSpeculator(self._order)
        if self._learns_prompts:
            model.observe(token_ids.tolist())
        if self._learns_completions:
            for text in finished:
                model.observe(text.tolist())

    def close(self, prompt_id: str) -> None:
        """All completions of a prompt are done."""
        del self._models[prompt_id]

    def finish(self, handle: int) -> None:
        """A completion ends: the n-grams learn from it."""
        prompt_id, start, text = self._texts.pop(handle)
        if self._learns_completions:
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
                f"--speculators arctic: {first_line(error)} (pip install arctic-inference)"
            ) from None
        self._depth = depth
        self._cache: Any = SuffixDecodingCache(depth, max_cached_requests)

    def open(self, prompt_id: str, token_ids: Ints, finished: Sequence[Ints]) -> None:
        """Nothing is kept per prompt; what was drawn before goes into the tree of all."""
        for text in finished:
            handle = self.start(prompt_id, token_ids)
            self._append(handle, text)
            self.finish(handle)

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

    @property
    def num_bytes(self) -> int:
        """Memory of the trees; the package has no public way to ask."""
        trees = [self._cache._global_tree, *self._cache._local_trees.values()]
        return sum(tree.estimate_memory() for tree in trees)


REGIMES = {"both": (True, True), "prompt": (True, False), "generations": (False, True)}
"""Name -> whether a speculator learns from prompts, and from completions."""


class Kind(NamedTuple):
    """A speculator that can be asked for by name."""

    make: Callable[[str, float, Numbers | None], ReplaySpeculator]
    """Of a regime, the least survival worth drafting and [V] which tokens are numbers."""
    regimes: tuple[str, ...] = tuple(REGIMES)
    has_min_survival: bool = False


def _memory(**options: Any) -> Kind:
    def make(regime: str, min_survival: float, numbers: Numbers | None) -> ReplaySpeculator:
        prompts, completions = REGIMES[regime]
        return MemoryReplay(
            learns_prompts=prompts,
            learns_completions=completions,
            min_survival=min_survival,
            numbers=numbers,
            **options,
        )

    return Kind(make, has_min_survival=True)


def _ngram(order: int) -> Kind:
    def make(regime: str, *_: Any) -> ReplaySpeculator:
        prompts, completions = REGIMES[regime]
        return NGramReplay(order, learns_prompts=prompts, learns_completions=completions)

    return Kind(make)


SPECULATORS = {
    "memory": _memory(),
    "memory_private": _memory(shared=False),
    "ngram": _ngram(3),
    "bigram": _ngram(2),
    "arctic": Kind(lambda *_: ArcticReplay(), regimes=("both",)),
}


def default_speculators() -> list[str]:
    """What is compared unless asked otherwise: ArcticInference's too where it is installed."""
    names = ["memory", "memory_private", "ngram"]
    return [*names, "arctic"] if importlib.util.find_spec("arctic_inference") else names
