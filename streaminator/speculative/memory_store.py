# SPDX-License-Identifier: Apache-2.0
"""The stream's side of `memory.Memory`: sequences in, drafts out. A `speculator.Store`.

Used by: `engine.Engine`, with `--speculator memory`.
"""

from collections import OrderedDict
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.config import SpeculatorConfig
from streaminator.sequence import Prompt, Sequence
from streaminator.speculative.memory import Drawn, Memory
from streaminator.speculative.speculator import Gain, Guesses


def _warm_up() -> None:
    """Compile, or load what was compiled before, so that the first steps are not measured by it."""
    memory = Memory(max_bytes=1 << 20, noise=True)
    memory.open("", range(64), ())  # more than a new table has room for, so that it grows
    handles = np.array([memory.start("", (0, 1), 0)])
    memory.draft(handles, np.array([2]))
    ids, probs = np.zeros((2, 1), np.int64), np.ones((2, 1), np.float32)
    one = np.array([1])
    memory.commit(handles, one, one, ids, probs, one, one)


class _Step(NamedTuple):
    """What a step drew; a row of M most likely tokens for each of the gains' tokens."""

    gains: Seq[Gain]
    top_ids: NDArray[np.int64]
    top_probs: NDArray[np.float32]


def _joined(steps: Seq[_Step]) -> _Step:
    """Steps, of which only the last may have drafted, as one: a gain for each sequence."""
    gains: dict[Sequence, Gain] = {}
    first = 0
    for gain in (gain for step in steps for gain in step.gains):
        rows = range(first, first := first + len(gain.rows))
        sequence = gain.sequence
        before = gains.get(sequence)
        if before is None:
            gains[sequence] = gain._replace(rows=list(rows))
        else:
            gains[sequence] = gain._replace(
                token_ids=before.token_ids + gain.token_ids, rows=[*before.rows, *rows]
            )
    joined = list(gains.values())
    order = np.array([row for gain in joined for row in gain.rows])
    return _Step(
        joined,
        np.concatenate([step.top_ids for step in steps]).take(order, 0),
        np.concatenate([step.top_probs for step in steps]).take(order, 0),
    )


class MemoryStore:
    """Learns every token with the distribution it was drawn from, and what the model said after the
    first rejected drafts; at once, or, of a stream that rests from drafting, many steps together, which
    costs less: the tables come from memory once for all."""

    def __init__(
        self,
        config: SpeculatorConfig,
        *,
        is_greedy: bool,
        num_kept_prompts: int = 0,
        numbers: NDArray[np.bool_] | None = None,
    ) -> None:
        """`num_kept_prompts`: how many dropped prompts' memories stay, the latest ones; `numbers`
        [V]: which tokens are parts of numbers, if that is known."""
        self.num_top = 0 if is_greedy or not config.generation_training else config.num_top_tokens
        self._memory = Memory(
            max_bytes=config.speculator_memory << 20,
            shared=config.shared_memory,
            noise=config.draft_noise and not is_greedy,
            learns_prompts=config.prompt_training,
            learns_completions=config.generation_training,
            numbers=numbers,
        )
        _warm_up()
        self._open: set[str] = set()
        self._kept: OrderedDict[str, None] = OrderedDict()
        self._num_kept_prompts = num_kept_prompts
        self._handles: dict[Sequence, int] = {}
        self._waiting: list[_Step] = []
        self._uncounted: list[Drawn] = []

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._memory.num_bytes

    def start(self, sequence: Sequence) -> None:
        """Open the prompt if it is new, and begin the completion."""
        prompt = sequence.prompt
        if prompt.prompt_id not in self._open:
            self._reopen(prompt)
            self._open.add(prompt.prompt_id)
        self._handles[sequence] = self._memory.start(
            prompt.prompt_id, sequence.token_ids, sequence.noise_key
        )

    def draft_all(self, sequences: Seq[Sequence], caps: Seq[int], floor: float) -> Guesses:
        """Draft up to `caps[i]` tokens for `sequences[i]`, while they are likely above `floor`."""
        self._memory.min_survival = floor
        drafts = self._memory.draft(self._arrange(sequences), np.array(caps, np.int64))
        return Guesses(drafts.tokens, drafts.lengths, drafts.survival)

    def advance_all(
        self,
        gains: Seq[Gain],
        top_ids: NDArray[np.int64],
        top_probs: NDArray[np.float32],
        *,
        may_wait: bool = False,
    ) -> None:
        """Go on to a step's tokens, and judge its drafts."""
        if gains:
            rows = np.array([row for gain in gains for row in gain.rows])
            top_ids = top_ids[:, : self.num_top].take(rows, 0)
            top_probs = top_probs[:, : self.num_top].take(rows, 0)
            self._waiting.append(_Step(gains, top_ids, top_probs))
        if not may_wait:
            self._advance_waiting()

    def _advance_waiting(self) -> None:
        steps, self._waiting = self._waiting, []
        if not steps:
            return
        gains, top_ids, top_probs = steps[0] if len(steps) == 1 else _joined(steps)
        drawn = self._memory.advance(
            self._arrange([gain.sequence for gain in gains]),
            np.array([token for gain in gains for token in gain.token_ids], np.int64),
            np.array([len(gain.token_ids) for gain in gains], np.int64),
            top_ids,
            top_probs,
            np.array([token for gain in gains for token in gain.rejected], np.int64),
            np.array([len(gain.rejected) for gain in gains], np.int64),
        )
        self._uncounted.append(drawn)

    def learn_all(self) -> None:
        """Count the tokens of the steps before."""
        uncounted, self._uncounted = self._uncounted, []
        for drawn in uncounted:
            self._memory.count(drawn)

    def finish(self, sequence: Sequence, *, has_failed: bool) -> None:
        """The completion has ended: what it says is there for the prompt's next one."""
        self._advance_waiting()
        self.learn_all()
        self._memory.finish(self._handles.pop(sequence))

    def drop(self, prompt: Prompt) -> None:
        """Forget a prompt, or an older one; what the shared tier learned from it stays."""
        if prompt.prompt_id in self._open:
            self._open.remove(prompt.prompt_id)
            self._kept[prompt.prompt_id] = None
            if len(self._kept) > self._num_kept_prompts:
                self._memory.close(self._kept.popitem(last=False)[0])

    def _reopen(self, prompt: Prompt) -> None:
        top = [top and top.likeliest(self.num_top) for top in prompt.finished_distributions]
        if prompt.prompt_id in self._kept:
            del self._kept[prompt.prompt_id]
            if self._memory.has_table(prompt.prompt_id):
                self._memory.learn(prompt.prompt_id, prompt.finished, top)
                return
            self._memory.close(prompt.prompt_id)
        self._memory.open(prompt.prompt_id, prompt.token_ids, prompt.finished, top)

    def _arrange(self, sequences: Seq[Sequence]) -> np.ndarray:
        handles = [self._handles[sequence] for sequence in sequences]
        return np.array(handles, np.int64)
