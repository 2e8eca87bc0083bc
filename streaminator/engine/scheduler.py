# SPDX-License-Identifier: Apache-2.0
"""Who runs in which step: admission, affinity, chunked prefill, preemption. No tensors.

Invariants
- Affinity: a prompt has at most `in_flight_per_prompt` sequences in flight (running or preempted),
  and more than one only in slots that would stay empty.
- Bounded: at most `stream_width` sequences run; blocks never exceed the pool.
- Longest remaining work first: among prompts not in flight, the one with the most completions
  left is admitted first, which keeps the tail short.
- Out of blocks: first the prompt blocks that idle prompts keep are dropped, then the youngest
  running sequences are preempted; their tokens stay, their keys and values are computed again.

Used by: `engine.Engine`.
"""

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from streaminator.engine.block_manager import BlockManager
from streaminator.sequence import Prompt, Sequence


@dataclass(slots=True, eq=False)
class _OpenPrompt:
    prompt: Prompt
    order: int
    next_sample: int = 0
    num_in_flight: int = 0
    resident_blocks: list[int] = field(default_factory=list)
    """Blocks of the prompt's keys and values, kept between its completions."""
    num_resident_tokens: int = 0
    prefix_keys: list[bytes] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.prompt.sample_indices) - self.next_sample


class Scheduler:
    """Decides, before each step, which sequences take part and with how many tokens."""

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        stream_width: int,
        max_batched_tokens: int,
        kv_cache: bool,
        continuous_batching: bool,
        in_flight_per_prompt: int,
        start: Callable[[Prompt, int], Sequence],
    ) -> None:
        """`start(prompt, sample_index)` makes the sequence of a new completion."""
        self.block_manager = block_manager
        self.stream_width = stream_width
        self.running: list[Sequence] = []
        self._max_batched_tokens = max_batched_tokens
        self._kv_cache = kv_cache
        self._continuous_batching = continuous_batching
        self._max_in_flight = in_flight_per_prompt
        self._start = start
        self._preempted: list[Sequence] = []
        self._open: dict[str, _OpenPrompt] = {}
        self._idle: list[tuple[int, int, str]] = []
        self._num_added = 0
        self._num_to_release = 0
        self._released: list[Prompt] = []
        self._computing: dict[bytes, str] = {}

    @property
    def num_open_prompts(self) -> int:
        """Prompts with completions still to finish."""
        return len(self._open)

    def add(self, prompt: Prompt) -> None:
        """Queue a prompt. Its id must not be open already."""
        assert prompt.prompt_id not in self._open, f"prompt {prompt.prompt_id} is open already"
        entry = _OpenPrompt(prompt, order=self._num_added)
        self._num_added += 1
        if self._kv_cache:
            # The last prompt token is always computed: its logits give the first new token.
            entry.prefix_keys = self.block_manager.prefix_keys(prompt.token_ids[:-1])
        self._open[prompt.prompt_id] = entry
        self._push_idle(entry)

    def schedule(self) -> list[Sequence]:
        """Admit what fits and give every running sequence its tokens and blocks for one step."""
        self._admit()
        budget = self._max_batched_tokens
        index = 0
        while index < len(self.running):  # it shrinks at its end when sequences are preempted
            sequence = self.running[index]
            index += 1
            num = sequence.num_uncached_tokens
            if len(sequence.token_ids) == sequence.max_num_tokens:
                num = 0  # its last token is on its way
            if self._kv_cache and num > 1:
                # Prefill in chunks; decoding (1 token) is never held back by the budget, nor 2 after
                # an accepted second choice, unless as many sequences as the budget has tokens run.
                num = min(num, budget)
                budget -= num
            sequence.num_scheduled_tokens = num
            if num:
                self._reserve(sequence, sequence.num_cached_tokens + num, may_preempt=True)
        return [s for s in self.running if s.num_scheduled_tokens]

    def reserve_draft(self, sequence: Sequence, num_draft_tokens: int) -> int:
        """Blocks for drafts, as far as they are free; returns how many drafts fit."""
        start = len(sequence.token_ids)
        if self._reserve(sequence, start + num_draft_tokens, may_preempt=False):
            return num_draft_tokens
        return len(sequence.block_table) * self.block_manager.block_size - start

    def commit(self, sequence: Sequence, num_cached_tokens: int) -> None:
        """Record whose keys and values are valid now; what lies behind is rolled back."""
        if not self._kv_cache:
            self._release(sequence)
            return
        sequence.num_cached_tokens = num_cached_tokens
        entry = self._open[sequence.prompt.prompt_id]
        keep = min(num_cached_tokens, sequence.num_prompt_tokens - 1)
        if keep <= entry.num_resident_tokens:
            return
        self._publish(entry, sequence)
        size = self.block_manager.block_size
        # A sibling may have written its own copy of the last resident block: it cannot go on there.
        num = len(entry.resident_blocks)
        if sequence.block_table[:num] == entry.resident_blocks:
            blocks = sequence.block_table[num : -(-keep // size)]
            self.block_manager.share(blocks)
            entry.resident_blocks.extend(blocks)
            entry.num_resident_tokens = keep

    def restart(self, sequence: Sequence) -> None:
        """Compute a sequence's keys and values again, in blocks that nobody used."""
        self._preempt(sequence)

    def retire(self, sequence: Sequence, *, is_spoilt: bool = False) -> bool:
        """A completion ended: free its slot; drop the prompt, and say so, when it was the last one.

        `is_spoilt`: behind the prompt there may be keys and values that are not finite.
        """
        is_waiting = sequence in self._preempted
        (self._preempted if is_waiting else self.running).remove(sequence)
        self._release(sequence)
        entry = self._open[sequence.prompt.prompt_id]
        if is_spoilt:
            self._drop_partial(entry)
        entry.num_in_flight -= 1
        if entry.num_in_flight:
            return False
        self._forget_computing(entry)
        if entry.num_left and self._num_to_release:
            self._let_go(entry)
        elif entry.num_left:
            self._push_idle(entry)
        else:
            self._drop_resident(entry)
            del self._open[entry.prompt.prompt_id]
            return True
        return False

    def release(self, num: int) -> None:
        """Give up `num` prompts: those not in flight now, then others between two completions."""
        self._num_to_release = num
        while self._num_to_release and self._idle:
            # The lowest priority is somewhere among the leaves; the heap is small.
            item = max(self._idle)
            self._idle.remove(item)
            self._let_go(self._open[item[2]])
        heapq.heapify(self._idle)

    def drop(self, prompt: Prompt) -> None:
        """Draw no more of a prompt that is between two completions, be it just given up."""
        entry = self._open.pop(prompt.prompt_id, None)
        if entry is None:
            self._released.remove(prompt)
            return
        self._idle = [item for item in self._idle if item[2] != prompt.prompt_id]
        heapq.heapify(self._idle)
        self._drop_resident(entry)
        self._forget_computing(entry)

    def take_released(self) -> list[Prompt]:
        """The prompts given up since the last call; nothing of them is kept."""
        released, self._released = self._released, []
        return released

    def narrow(self) -> int:
        """Halve the stream, the youngest sequences wait; returns the new width."""
        self.stream_width = max(1, self.stream_width // 2)
        while len(self.running) > self.stream_width:
            self._preempt(self.running[-1])
        return self.stream_width

    def check_integrity(self) -> None:
        """Raise AssertionError when a block or a prompt is lost or held twice."""
        flying = self.running + self._preempted
        flights = Counter(s.prompt.prompt_id for s in flying)
        assert max(flights.values(), default=0) <= self._max_in_flight, "affinity is broken"
        counted = {name: entry.num_in_flight for name, entry in self._open.items()}
        assert flights == Counter(counted), "sequences in flight are miscounted"
        tables = [s.block_table for s in flying]
        tables += [entry.resident_blocks for entry in self._open.values()]
        self.block_manager.check_integrity(tables)

    def _let_go(self, entry: _OpenPrompt) -> None:
        self._drop_resident(entry)
        self._forget_computing(entry)
        del self._open[entry.prompt.prompt_id]
        self._released.append(entry.prompt)
        self._num_to_release -= 1

    def _push_idle(self, entry: _OpenPrompt) -> None:
        heapq.heappush(self._idle, (-entry.num_left, entry.order, entry.prompt.prompt_id))

    def _admit(self) -> None:
        if not self._continuous_batching and self.running:
            return
        held_back: list[tuple[int, int, str]] = []
        while len(self.running) < self.stream_width:
            if self._preempted:
                sequence = self._preempted.pop()
                self._attach_prefix(sequence)
            elif (entry := self._next_prompt(held_back)) is not None:
                sequence = self._start(entry.prompt, entry.prompt.sample_indices[entry.next_sample])
                self._attach_prefix(sequence)
                entry.next_sample += 1
                entry.num_in_flight += 1
            else:
                break
            self.running.append(sequence)
            # A sequence that cannot get its first blocks waits instead of pushing others out.
            first = min(sequence.num_uncached_tokens, self._max_batched_tokens)
            if not self._reserve(sequence, sequence.num_cached_tokens + first, may_preempt=False):
                if len(self.running) > 1:
                    self._preempt(sequence)
                break
        for item in held_back:
            heapq.heappush(self._idle, item)

    def _next_prompt(self, held_back: list[tuple[int, int, str]]) -> _OpenPrompt | None:
        """Whose next completion is admitted; idle prompts that must wait are put in `held_back`."""
        while self._idle:
            item = heapq.heappop(self._idle)
            entry = self._open[item[2]]
            if not self._waits_for_preamble(entry):
                return entry
            held_back.append(item)
        # A slot given to a sibling would be missing in the next step; prompts to be given up drain.
        if self._max_in_flight == 1 or held_back or self._num_to_release:
            return None
        siblings = (
            entry
            for entry in self._open.values()
            if entry.num_left
            and entry.num_in_flight < self._max_in_flight
            and not self._waits_for_sibling(entry)
        )
        return min(siblings, key=lambda e: (e.num_in_flight, -e.num_left, e.order), default=None)

    def _waits_for_sibling(self, entry: _OpenPrompt) -> bool:
        """Whether the prompt's first sequence has still to compute what others can share."""
        return self._continuous_batching and bool(self._missing_prefix(entry))

    def _waits_for_preamble(self, entry: _OpenPrompt) -> bool:
        """Whether another prompt's sequence is computing the very block this prompt needs next."""
        if entry.resident_blocks or not self._continuous_batching:
            return False
        missing = self._missing_prefix(entry)
        if not missing:
            return False
        if self._computing.get(missing[0], entry.prompt.prompt_id) != entry.prompt.prompt_id:
            return True
        for key in missing:
            self._computing.setdefault(key, entry.prompt.prompt_id)
        return False

    def _missing_prefix(self, entry: _OpenPrompt) -> list[bytes]:
        """Keys of the prompt's full blocks that are in no block, from the first one on."""
        return entry.prefix_keys[len(self.block_manager.cached_blocks(entry.prefix_keys)) :]

    def _attach_prefix(self, sequence: Sequence) -> None:
        """Start from the prompt's resident blocks, or from a known prefix of it."""
        entry = self._open[sequence.prompt.prompt_id]
        size = self.block_manager.block_size
        blocks, num_tokens = entry.resident_blocks, entry.num_resident_tokens
        if not blocks:
            blocks = self.block_manager.cached_blocks(entry.prefix_keys)
            num_tokens = len(blocks) * size
        elif any(other.prompt is sequence.prompt for other in self.running):
            blocks = blocks[: num_tokens // size]
            num_tokens = len(blocks) * size
        self.block_manager.share(blocks)
        # The last resident block may be part prompt, part completion. The only sequence of a prompt
        # in flight writes to it in place, without a copy; siblings compute their own.
        sequence.block_table = list(blocks)
        sequence.num_cached_tokens = num_tokens

    def _publish(self, entry: _OpenPrompt, sequence: Sequence) -> None:
        size = self.block_manager.block_size
        num_full = min(sequence.num_cached_tokens // size, len(entry.prefix_keys))
        for index in range(entry.num_resident_tokens // size, num_full):
            key = entry.prefix_keys[index]
            self.block_manager.publish(sequence.block_table[index], key)
            self._computing.pop(key, None)

    def _forget_computing(self, entry: _OpenPrompt) -> None:
        for key in entry.prefix_keys:
            if self._computing.get(key) == entry.prompt.prompt_id:
                del self._computing[key]

    def _reserve(self, sequence: Sequence, num_tokens: int, *, may_preempt: bool) -> bool:
        """Grow the block table to hold `num_tokens` tokens; False when blocks ran out."""
        manager = self.block_manager
        missing = manager.num_blocks_for(num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        while missing > manager.num_free:
            if self._drop_idle_resident():
                continue
            victim = self.running[-1]
            if not may_preempt:
                return False
            assert victim is not sequence or len(self.running) > 1, "pool below one sequence"
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table.extend(manager.allocate(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        entry = self._open[sequence.prompt.prompt_id]
        self._drop_resident(entry)
        self._forget_computing(entry)
        self._preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.block_manager.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_cached_tokens = 0
        sequence.num_scheduled_tokens = 0

    def _drop_idle_resident(self) -> bool:
        """Give up one idle prompt's resident blocks; False when there are none."""
        for entry in self._open.values():
            if entry.resident_blocks and not entry.num_in_flight:
                self._drop_resident(entry)
                return True
        return False

    def _drop_partial(self, entry: _OpenPrompt) -> None:
        """Give up the block that holds more than prompt."""
        num_full = entry.num_resident_tokens // self.block_manager.block_size
        self.block_manager.free(entry.resident_blocks[num_full:])
        del entry.resident_blocks[num_full:]
        entry.num_resident_tokens = num_full * self.block_manager.block_size

    def _drop_resident(self, entry: _OpenPrompt) -> None:
        self.block_manager.free(entry.resident_blocks)
        entry.resident_blocks = []
        entry.num_resident_tokens = 0
