# SPDX-License-Identifier: Apache-2.0
"""The memory of everything a worker's prompts have said, and drafts from it.

Each open prompt has a table of the contexts in its prompt and completions (up to 12 tokens), all
prompts together have one more (up to 4 tokens). Drafts are chains, with second choices beside them. See `memory_kernels` for how
orders are mixed, how long a draft gets and what the sampler's noise is for.

Invariants
- Counts are a function of the tokens (and distributions) observed, in order.
- Bounded by `max_bytes`; see `memory_space`. A prompt whose table gave way drafts from the shared
  one until its next completion.
- Work is linear in tokens drafted and tokens committed. Growing a table costs its size, which
  doubles: constant per token.

A token that is new in all its contexts costs 10 rows of 32 bytes and their part of a bucket, 44 bytes,
in its prompt's table and 7 in the shared one; tables are at least half full: 440 to 880 bytes and 310
to 620. A token already known in its contexts costs nothing, its distribution at most two rows in either table. Beside the
tables a running sequence holds 10 KiB for its text and 38 for what it drafts, 0.6 for each of 64 tokens.

Used by: `memory_store` (the stream), `replay`.
"""

from collections.abc import Sequence
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.sequence import Distributions
from streaminator.speculative import memory_kernels as kernels
from streaminator.speculative import memory_learning as learning
from streaminator.speculative import memory_rates as rates
from streaminator.speculative.memory_correction import Correction
from streaminator.speculative.memory_features import MAX_DRAFT, begin
from streaminator.speculative.memory_mixing import new_scratch
from streaminator.speculative.memory_space import Tables
from streaminator.speculative.memory_tables import NUM_SHARED_CONTEXTS, TAIL, Ints
from streaminator.speculative.memory_texts import NOTHING, chunks, no_distributions, steps

_CHUNK = 512  # tokens learned between two looks at the room left
_ROWS_PER_CONTEXT = (1.0, 1 + 2 / NUM_SHARED_CONTEXTS)  # its own, and its part of a record


class Drafts(NamedTuple):
    """Guesses for n sequences: chains, and second choices beside them, padded to the longest."""

    tokens: Ints
    """[n, 2, k] token ids of the chains and of the second choices."""
    survival: NDArray[np.float32]
    """[n, 2, k] chance that the token, and all of the chain before it, is accepted; 0: none here.
    It never rises along a chain, nor from it to the side."""

    @property
    def lengths(self) -> Ints:
        """[n] of the chains."""
        return (self.survival[:, 0] > 0).sum(1)


class Drawn(NamedTuple):
    """Tokens that n sequences have gone on with, and what they are counted by; see `Memory.advance`."""

    handles: Ints
    tokens: Ints
    lengths: Ints
    rejected: Ints
    num_rejected: Ints
    top_ids: Ints
    top_probs: NDArray[np.float32]
    before: Ints
    """[n, TAIL + 1] the tokens before them, and how many of these are known."""


class Memory:
    """The memories of all prompts of a worker.

    Args:
        max_bytes: of tables; rounded down to a power of two.
        shared: whether prompts share a tier.
        noise: draft with the sampler's noise (temperature above 0).
        min_survival: no token less likely to be accepted is drafted.
        learns_prompts: whether a prompt's own text is observed.
        learns_completions: whether completions are.
        numbers: [V] which tokens are parts of numbers; None: not known.
    """

    def __init__(
        self,
        *,
        max_bytes: int = 256 << 20,
        shared: bool = True,
        noise: bool = False,
        min_survival: float = 0.1,
        learns_prompts: bool = True,
        learns_completions: bool = True,
        numbers: NDArray[np.bool_] | None = None,
    ) -> None:
        self._tables = Tables(max_bytes, shared=shared)
        self._shared = shared
        self.min_survival = min_survival
        self._learns_prompts = learns_prompts
        self._learns_completions = learns_completions
        self._strengths = rates.NOISE_STRENGTHS if noise else np.zeros(1)
        self._running = np.zeros((8, rates.NUM_COLUMNS), np.int64)
        self._tails = np.zeros((8, TAIL), np.int64)
        self._predictions = np.zeros((8, MAX_DRAFT, 4 + len(self._strengths)), np.int64)
        self._free_handles = list(range(7, -1, -1))
        self._scratch = new_scratch()
        self._chains = kernels.new_chains(0, 0, len(self._strengths))
        self._ahead = learning.new_ahead(0)
        self._starts: dict[str, tuple[int, ...]] = {}
        self._num_prompt: dict[str, int] = {}
        none = np.zeros(0, np.bool_)
        self._correction = Correction.of(8, none if numbers is None else numbers)
        self._mixing = np.zeros(rates.MIXING_SHAPE)
        self._num_learned = np.zeros(1, np.int64)
        self._hits = np.zeros(rates.HITS_SHAPE)
        self._second_hits = np.zeros(rates.SECONDS_SHAPE)
        self._noise_hits = np.zeros((rates.NUM_MATCHES, len(self._strengths)))
        if noise:
            self._noise_hits[:, rates.FIRST_STRENGTH] = 2

    @property
    def num_bytes(self) -> int:
        """Memory of all tables."""
        return self._tables.num_bytes

    @property
    def num_prompts(self) -> int:
        """Open prompts."""
        return len(self._tables.of)

    def open(
        self,
        prompt_id: str,
        prompt_token_ids: Sequence[int],
        finished: Sequence[Sequence[int]],
        distributions: Sequence[Distributions | None] = (),
    ) -> None:
        """Begin a prompt: learn from its text and from completions drawn before.

        Where a completion's distributions are given, its counts become what `commit` made them.
        """
        if prompt_id in self._tables.of:
            raise ValueError(f"prompt {prompt_id!r} is open already")
        self._tables.open(prompt_id)
        self._starts[prompt_id] = tuple(prompt_token_ids[-TAIL:])
        self._num_prompt[prompt_id] = len(prompt_token_ids)
        if self._learns_prompts:
            handle = self._new_handle(prompt_id, (), 0)
            self._observe(handle, prompt_token_ids, shared=False)
            self.finish(handle)
        self.learn(prompt_id, finished, distributions)

    def learn(
        self,
        prompt_id: str,
        finished: Sequence[Sequence[int]],
        distributions: Sequence[Distributions | None] = (),
    ) -> None:
        """Learn from completions of an open prompt that were drawn elsewhere."""
        if self._learns_completions:
            for token_ids, top in zip(finished, chain(distributions, repeat(None)), strict=False):
                handle = self._new_handle(prompt_id, self._starts[prompt_id], 0)
                self._observe(handle, token_ids, shared=self._shared, top=top)
                self.finish(handle)

    def has_table(self, prompt_id: str) -> bool:
        """Whether an open prompt still has what it learned: its table may have given way."""
        return self._tables.has_table(prompt_id)

    def close(self, prompt_id: str) -> None:
        """Forget a prompt; what the shared tier learned from it stays."""
        self._tables.close(prompt_id)
        del self._starts[prompt_id], self._num_prompt[prompt_id]

    def start(self, prompt_id: str, token_ids: Sequence[int], noise_key: int) -> int:
        """Begin a completion of an open prompt.

        Args:
            prompt_id: the prompt; its completions that run at a time learn from each other.
            token_ids: prompt, and completion so far if it is resumed.
            noise_key: signed 64-bit key of its sampling noise.

        Returns:
            A handle, valid until `finish`.
        """
        self._tables.start(prompt_id)
        handle = self._new_handle(prompt_id, token_ids, noise_key)
        begin(
            self._correction.histories[handle], self._running[handle], token_ids,
            self._num_prompt[prompt_id], self._correction.numbers,
        )  # fmt: skip
        return handle

    def finish(self, handle: int) -> None:
        """The completion has ended."""
        self._free_handles.append(handle)

    def draft(self, handles: Ints, caps: Ints) -> Drafts:
        """Guess what follows each running sequence.

        Args:
            handles: [n] each at most once.
            caps: [n] most tokens for each, second choices included.
        """
        caps = np.minimum(np.maximum(caps, 0), MAX_DRAFT)
        tokens = np.zeros((len(handles), 2, int(caps.max(initial=0))), np.int64)
        survival = np.zeros(tokens.shape, np.float32)
        width = kernels.draft(
            self._tables.rows, self._tables.records, self._running, self._tails, handles, caps,
            self.min_survival, self._mixing, self._hits, self._second_hits,
            self._strengths, self._noise_hits, self._shared, self._correction, self._predictions,
            self._chains_for(len(handles), tokens.shape[2]), self._scratch, tokens, survival,
        )  # fmt: skip
        return Drafts(tokens[..., :width], survival[..., :width])

    def commit(
        self,
        handles: Ints,
        tokens: Ints,
        lengths: Ints,
        top_ids: Ints | None = None,
        top_probs: NDArray[np.float32] | None = None,
        rejected: Ints = NOTHING,
        num_rejected: Ints | None = None,
    ) -> None:
        """Append the tokens drawn in a step and learn from them: `advance` and `count` in one."""
        args = handles, tokens, lengths, top_ids, top_probs, rejected, num_rejected
        self.count(self.advance(*args))

    def advance(
        self,
        handles: Ints,
        tokens: Ints,
        lengths: Ints,
        top_ids: Ints | None = None,
        top_probs: NDArray[np.float32] | None = None,
        rejected: Ints = NOTHING,
        num_rejected: Ints | None = None,
    ) -> Drawn:
        """Append the tokens drawn in a step, and judge the drafts by them.

        Args:
            handles: [n] each at most once.
            tokens: [m] new tokens of all sequences, one after another.
            lengths: [n] how many belong to each: accepted drafts and one more.
            top_ids: [m + r, M] the target's most likely tokens where each token was drawn, then
                after each rejected one, sequence by sequence.
            top_probs: [m + r, M] their probabilities as sampled from.
            rejected: [r] drafts behind the accepted ones, whose distributions are known.
            num_rejected: [n] how many belong to each; default: none.

        Returns:
            What `count` takes, before any of the `handles` is finished.
        """
        if top_ids is None or top_probs is None:
            top_ids, top_probs = no_distributions(len(tokens) + len(rejected))
        if num_rejected is None:
            num_rejected = np.zeros_like(lengths)
        drawn = (tokens, lengths, rejected, num_rejected, top_ids, top_probs)
        return self._advance(handles, *drawn, learns_rates=True)

    def count(self, drawn: Drawn) -> None:
        """Learn from tokens that were appended."""
        own = self._learns_completions
        self._count(drawn, own=own, shared=own and self._shared, learns_rates=True)

    def _observe(
        self,
        handle: int,
        token_ids: Sequence[int],
        *,
        shared: bool,
        top: Distributions | None = None,
    ) -> None:
        """Count a text without judging drafts by it."""
        handles = np.array([handle])
        chunk = max(1, min(_CHUNK, self._tables.max_rows // 64))
        pieces = chunks(token_ids, chunk) if top is None else steps(token_ids, top)
        for tokens, rejected, top_ids, top_probs in pieces:
            lengths, num_rejected = np.array([len(tokens)]), np.array([len(rejected)])
            texts = (tokens, lengths, rejected, num_rejected, top_ids, top_probs)
            drawn = self._advance(handles, *texts, learns_rates=False)
            self._count(drawn, own=True, shared=shared, learns_rates=False)

    def _advance(
        self,
        handles: Ints,
        tokens: Ints,
        lengths: Ints,
        rejected: Ints,
        num_rejected: Ints,
        top_ids: Ints,
        top_probs: NDArray[np.float32],
        *,
        learns_rates: bool,
    ) -> Drawn:
        before = np.empty((len(handles), TAIL + 1), np.int64)
        learning.advance(
            self._running, self._tails, handles, tokens, lengths, num_rejected, top_ids, top_probs,
            self._hits, self._second_hits, self._noise_hits, self._predictions, self._correction,
            learns_rates, before, self._scratch,
        )  # fmt: skip
        return Drawn(handles, tokens, lengths, rejected, num_rejected, top_ids, top_probs, before)

    def _count(self, drawn: Drawn, *, own: bool, shared: bool, learns_rates: bool) -> None:
        handles, tokens, lengths, rejected, num_rejected, top_ids, top_probs, before = drawn
        num_all = lengths + num_rejected
        if own:
            per_context = _ROWS_PER_CONTEXT[top_ids.shape[1] > 0]
            self._tables.make_room(self._running, handles, num_all, per_context)
        learning.count(
            self._tables.rows, self._tables.records, self._running, handles, before, tokens, lengths,
            rejected, num_rejected, top_ids, top_probs, self._mixing, self._num_learned,
            self._correction.numbers, own, shared, learns_rates, self._ahead_of(num_all),
            self._scratch,
        )  # fmt: skip

    def _chains_for(self, num: int, width: int) -> kernels.Chains:
        """Arrays for `num` chains of `width` tokens; they stay for the next ones."""
        most, widest = self._chains.restore.shape
        if num > most or width > widest:
            self._chains = kernels.new_chains(
                max(num, most), max(width, widest), len(self._strengths)
            )
        return self._chains

    def _ahead_of(self, lengths: Ints) -> learning.Ahead:
        """Arrays to look contexts up in, of the longest of some texts; they stay, too."""
        num = int(lengths.max(initial=0))
        if num > len(self._ahead.found):
            self._ahead = learning.new_ahead(num)
        return self._ahead

    def _new_handle(self, prompt_id: str, token_ids: Sequence[int], noise_key: int) -> int:
        if not self._free_handles:
            size = len(self._running)
            self._running = np.concatenate([self._running, np.zeros_like(self._running)])
            self._tails = np.concatenate([self._tails, np.zeros_like(self._tails)])
            more = np.zeros_like(self._predictions)
            self._predictions = np.concatenate([self._predictions, more])
            self._correction = self._correction.widened(size)
            self._free_handles = list(range(2 * size - 1, size - 1, -1))
        handle = self._free_handles.pop()
        tail = token_ids[-TAIL:]
        self._tails[handle, TAIL - len(tail) :] = tail
        self._running[handle] = (self._tables.of[prompt_id], len(tail), 0, noise_key, 0, 0, 0, 0)
        return handle
