# SPDX-License-Identifier: Apache-2.0
"""The memory of everything a worker's prompts have said, and drafts from it.

Each open prompt has a table of the contexts in its prompt and completions (up to 12 tokens), all
prompts together have one more (up to 4 tokens). Drafts are chains, with second choices beside them. See `memory_kernels` for how
orders are mixed, how long a draft gets and what the sampler's noise is for.

Invariants
- Counts are a function of the tokens (and distributions) observed, in order.
- Bounded by `max_bytes`: tables double as they fill. A prompt's stops at 1/8 of the whole, the
  shared one at 1/4; then the half of its contexts that was not touched longest goes. When the
  arena is full, the table of the prompt that was started longest ago goes; that prompt drafts
  from the shared table until its next completion.
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
from streaminator.speculative.arena import Arena
from streaminator.speculative.memory_correction import Correction
from streaminator.speculative.memory_features import MAX_DRAFT, begin
from streaminator.speculative.memory_growth import PER_BUCKET_AT_MOST, find_full, rebuild
from streaminator.speculative.memory_mixing import new_scratch
from streaminator.speculative.memory_tables import (
    CLOCK,
    NUM_BUCKETS,
    NUM_ROWS,
    NUM_SHARED_CONTEXTS,
    PER_BUCKET,
    ROW_BYTES,
    START,
    TAIL,
    USED_CONTEXTS,
    USED_ROWS,
    Ints,
)
from streaminator.speculative.memory_texts import NOTHING, chunks, no_distributions, steps

_MIN_ROWS = 256
_SHARED = 0
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
        self._arena = Arena(max_bytes)
        num_rows = len(self._arena.rows)
        self._max_rows = max(num_rows // 8, _MIN_ROWS)
        self._shared_max_rows = max(num_rows // 4, _MIN_ROWS)
        self._shared = shared
        self.min_survival = min_survival
        self._learns_prompts = learns_prompts
        self._learns_completions = learns_completions
        self._strengths = rates.NOISE_STRENGTHS if noise else np.zeros(1)
        self._tables = np.zeros((8, 6), np.int64)
        self._free_tables = list(range(7, 0, -1))
        self._prompts: dict[str, int] = {}  # least recently started first
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
        if shared:
            self._allocate(_SHARED, _MIN_ROWS)

    @property
    def num_bytes(self) -> int:
        """Memory of all tables."""
        return self._arena.num_used * ROW_BYTES

    @property
    def num_prompts(self) -> int:
        """Open prompts."""
        return len(self._prompts)

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
        if prompt_id in self._prompts:
            raise ValueError(f"prompt {prompt_id!r} is open already")
        if not self._free_tables:
            size = len(self._tables)
            self._tables = np.concatenate([self._tables, np.zeros_like(self._tables)])
            self._free_tables = list(range(2 * size - 1, size - 1, -1))
        self._prompts[prompt_id] = self._free_tables.pop()
        self._starts[prompt_id] = tuple(prompt_token_ids[-TAIL:])
        self._num_prompt[prompt_id] = len(prompt_token_ids)
        self._revive(prompt_id)
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
        return bool(self._tables[self._prompts[prompt_id], NUM_BUCKETS])

    def close(self, prompt_id: str) -> None:
        """Forget a prompt; what the shared tier learned from it stays."""
        table = self._prompts.pop(prompt_id)
        del self._starts[prompt_id], self._num_prompt[prompt_id]
        self._drop(table)
        self._tables[table] = 0
        self._free_tables.append(table)

    def start(self, prompt_id: str, token_ids: Sequence[int], noise_key: int) -> int:
        """Begin a completion of an open prompt.

        Args:
            prompt_id: the prompt; its completions that run at a time learn from each other.
            token_ids: prompt, and completion so far if it is resumed.
            noise_key: signed 64-bit key of its sampling noise.

        Returns:
            A handle, valid until `finish`.
        """
        self._prompts[prompt_id] = self._prompts.pop(prompt_id)
        self._revive(prompt_id)
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
            self._arena.rows, self._tables, self._running, self._tails, handles, caps,
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
        chunk = max(1, min(_CHUNK, self._max_rows // 64))
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
            self._make_room(handles, num_all, _ROWS_PER_CONTEXT[top_ids.shape[1] > 0])
        learning.count(
            self._arena.rows, self._tables, self._running, handles, before, tokens, lengths,
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
        self._running[handle] = (self._prompts[prompt_id], len(tail), 0, noise_key, 0, 0, 0, 0)
        return handle

    def _make_room(self, handles: Ints, lengths: Ints, rows_per_context: float) -> None:
        """Grow the tables that might not hold what comes next."""
        full, num_contexts = find_full(
            self._tables,
            self._running,
            handles,
            lengths,
            rows_per_context,
            self._shared,
        )
        for table, num in zip(full.tolist(), num_contexts.tolist(), strict=True):
            self._grow(table, num, rows_per_context)

    def _grow(self, table: int, num_contexts: int, rows_per_context: float) -> None:
        """Double a table until it has room; one that may not double drops its oldest half."""
        old = self._tables[table].copy()
        if old[NUM_ROWS] == 0:
            return  # it gave way to another one that had to grow
        limit = self._shared_max_rows if table == _SHARED else self._max_rows
        used = int(old[USED_ROWS] - 2 * old[NUM_BUCKETS])
        wanted = used + int(num_contexts * rows_per_context)
        wanted += int(2 * (old[USED_CONTEXTS] + num_contexts) / PER_BUCKET_AT_MOST) + 2
        num_rows = int(old[NUM_ROWS])
        while num_rows < min(limit, wanted):
            num_rows *= 2
        if num_rows == old[NUM_ROWS] and num_rows * 2 <= limit:
            num_rows *= 2
        oldest = 0
        if old[USED_CONTEXTS] and (num_rows < wanted or num_rows == old[NUM_ROWS]):
            rows = self._arena.rows[old[START] : old[START] + old[NUM_ROWS]]
            buckets = rows[: 2 * old[NUM_BUCKETS]].reshape(-1, 2, PER_BUCKET)
            contexts = buckets[:, 1][buckets[:, 0] != 0]
            oldest = int(np.median(rows[contexts, 7])) + 1
        # Of the rows in use as many as before are contexts, which need room in buckets.
        share = (old[USED_CONTEXTS] + num_contexts) / (used + num_contexts * rows_per_context)
        if not self._allocate(table, num_rows, share):
            self._drop(table, old)
            return
        rebuild(self._arena.rows, old, self._tables[table], oldest)
        self._arena.free(int(old[START]), int(old[NUM_ROWS]))

    def _allocate(self, table: int, num_rows: int, share: float = 1.0) -> bool:
        """Give a table an empty range, at the cost of other prompts if need be.

        Of the rows in use a `share` will be contexts.
        """
        start = self._arena.allocate(num_rows)
        others = list(self._prompts.values())
        victims = (n for n in others if n != table and self._tables[n, NUM_ROWS])
        while start is None:
            victim = next(victims, None)
            if victim is None:
                return False
            self._drop(victim)
            start = self._arena.allocate(num_rows)
        buckets = max(int(num_rows * share / (PER_BUCKET_AT_MOST + 2 * share)), 1)
        self._tables[table] = (start, buckets, num_rows, 0, 2 * buckets, self._tables[table, CLOCK])
        return True

    def _revive(self, prompt_id: str) -> None:
        table = self._prompts[prompt_id]
        if self._tables[table, NUM_BUCKETS] == 0:
            self._allocate(table, _MIN_ROWS)

    def _drop(self, table: int, record: Ints | None = None) -> None:
        held: Ints = self._tables[table] if record is None else record
        if held[NUM_ROWS]:
            self._arena.free(int(held[START]), int(held[NUM_ROWS]))
        self._tables[table, :CLOCK] = 0
