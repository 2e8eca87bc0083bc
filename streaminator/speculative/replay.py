# SPDX-License-Identifier: Apache-2.0
"""Replay logged completions through a speculator, without a model.

A stream of `width` slots as the engine would run it: prompts are admitted in the log's order, the
completions of each run one after another, all slots take a step together. In a step each slot
drafts, the logged continuation says how much of that is right, and the accepted tokens and one
more are committed. A drafted token is right with the probability that a fresh sample equals it,
so the rates are what live runs without the sampler's noise would see.

Used by: `streaminator.cli_replay`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.speculative.replay_speculators import Ints, ReplaySpeculator

NUM_BINS = 10
"""Of predicted survival, equally wide."""


@dataclass(frozen=True, slots=True)
class LoggedPrompt:
    """A prompt and its completions in the order they were drawn."""

    prompt_id: str
    token_ids: Ints
    """Empty if not known."""
    completions: list[Ints]
    """None of them empty."""
    finished: list[Ints] = field(default_factory=list)
    """Completions of an earlier log, learned before the first one here (warm start)."""


class ReplayReport:
    """What a speculator did on a log: counts by generation (sample index) and draft position."""

    def __init__(self, num_generations: int, cap: int) -> None:
        self.num_steps = np.zeros(num_generations, np.int64)
        self.drafted = np.zeros((num_generations, cap), np.int64)
        """[generation, position] tokens drafted in chains; at position 0: steps with a draft."""
        self.accepted = np.zeros((num_generations, cap), np.int64)
        """[generation, position] of them accepted."""
        self.reliability = np.zeros((NUM_BINS, 3))
        """[bin of predicted survival, (drafted, sum of predicted, accepted)]"""
        self.num_seconds = np.zeros(2, np.int64)
        """Second choices (drafted, accepted)."""
        self.num_tokens = 0
        """Committed."""
        self.num_learned = 0
        """Tokens of prompts, of warm start and committed."""
        self.seconds = 0.0
        """In the speculator, from opening a prompt to closing it."""
        self.num_bytes = 0
        """Most memory the speculator held; 0 if it does not say."""

    @property
    def num_first_right(self) -> Ints:
        """Steps whose first drafted token was right, by generation."""
        return self.accepted[:, 0]

    @property
    def num_drafting(self) -> Ints:
        """Steps with a draft, by generation."""
        return self.drafted[:, 0]

    @property
    def num_drafted(self) -> int:
        """Tokens drafted, second choices included."""
        return int(self.drafted.sum() + self.num_seconds[0])

    @property
    def num_accepted(self) -> int:
        """Drafted tokens accepted, second choices included."""
        return int(self.accepted.sum() + self.num_seconds[1])

    @property
    def acceptance(self) -> NDArray[np.float64]:
        """Share of all steps whose first drafted token was right, by generation."""
        return self.num_first_right / np.maximum(self.num_steps, 1)

    @property
    def acceptance_when_drafting(self) -> float:
        """The same over steps with a draft, all generations together."""
        return self.num_first_right.sum() / max(self.num_drafting.sum(), 1)

    @property
    def acceptance_by_position(self) -> NDArray[np.float64]:
        """Accepted / drafted tokens at each position of the draft."""
        return self.accepted.sum(0) / np.maximum(self.drafted.sum(0), 1)

    @property
    def tokens_per_step(self) -> float:
        """Committed tokens per slot-step; 1 without speculation."""
        return self.num_tokens / max(int(self.num_steps.sum()), 1)

    @property
    def drafted_per_step(self) -> float:
        """Drafted tokens per slot-step."""
        return self.num_drafted / max(int(self.num_steps.sum()), 1)

    @property
    def accepted_per_drafted(self) -> float:
        """Accepted / drafted tokens."""
        return self.num_accepted / max(self.num_drafted, 1)

    @property
    def microseconds_per_token(self) -> float:
        """Time in the speculator per committed token."""
        return 1e6 * self.seconds / max(self.num_tokens, 1)

    @property
    def bytes_per_token(self) -> float:
        """Most memory held / tokens learned in all."""
        return self.num_bytes / max(self.num_learned, 1)


class _Slot(NamedTuple):
    prompt: LoggedPrompt
    first: int
    """Number of the prompt's first completion in the log."""


def replay(
    prompts: list[LoggedPrompt], speculator: ReplaySpeculator, *, cap: int, width: int
) -> ReplayReport:
    """Run a log through a speculator that drafts at most `cap` tokens, `width` prompts at once."""
    report = ReplayReport(max((len(p.completions) for p in prompts), default=0), cap)
    texts = [text for prompt in prompts for text in prompt.completions]
    bounds = np.cumsum([0, *map(len, texts)])
    log = np.concatenate([*texts, np.full(cap, -1)])  # no draft reaches past the end of the log
    firsts = np.cumsum([0, *(len(prompt.completions) for prompt in prompts)])
    waiting = iter(map(_Slot, prompts, firsts.tolist()))

    def timed(method: Callable, *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = method(*arguments)
        report.seconds += time.perf_counter() - begun
        return result

    def begin(slot: _Slot, generation: int) -> tuple[int, int, int, int]:
        number = slot.first + generation
        handle = timed(speculator.start, slot.prompt.prompt_id, slot.prompt.token_ids)
        return handle, bounds[number], bounds[number + 1], generation

    slots: list[_Slot] = []
    running = np.zeros((0, 4), np.int64)  # handle, next token and end in the log, generation
    while True:
        while len(slots) < width and (slot := next(waiting, None)) is not None:
            prompt = slot.prompt
            timed(speculator.open, prompt.prompt_id, prompt.token_ids, prompt.finished)
            report.num_learned += len(prompt.token_ids) + sum(map(len, prompt.finished))
            slots.append(slot)
            running = np.vstack([running, begin(slot, 0)])
        if not slots:
            return report
        handles, at, end, generations = running.T.copy()
        drafts, survival = timed(speculator.draft, handles, np.full(len(slots), cap))
        places = np.arange(drafts.shape[2])
        drafted = survival != 0
        right = drafted & (drafts == log[at[:, None] + places][:, None])
        right &= (places < (end - at)[:, None])[:, None]
        right[:, 0] = np.logical_and.accumulate(right[:, 0], axis=1)
        # A second choice counts where the chain goes wrong.
        right[:, 1:] &= (places == right[:, 0].sum(1)[:, None])[:, None]
        _count(report, generations, drafted, right, survival)
        num_new = np.minimum(right.sum((1, 2)) + 1, end - at)
        within = np.arange(num_new.sum()) - np.repeat(np.cumsum(num_new) - num_new, num_new)
        timed(speculator.commit, handles, log[np.repeat(at, num_new) + within], num_new)
        report.num_tokens += len(within)
        report.num_learned += len(within)
        running[:, 1] += num_new
        ended = np.flatnonzero(running[:, 1] == running[:, 2])
        if len(ended):
            report.num_bytes = max(report.num_bytes, speculator.num_bytes)
        for row in reversed(ended.tolist()):
            timed(speculator.finish, int(running[row, 0]))
            slot, generation = slots[row], int(running[row, 3]) + 1
            if generation < len(slot.prompt.completions):
                running[row] = begin(slot, generation)
                continue
            timed(speculator.close, slot.prompt.prompt_id)
            del slots[row]
            running = np.delete(running, row, 0)


def _count(
    report: ReplayReport,
    generations: Ints,
    drafted: NDArray[np.bool_],
    right: NDArray[np.bool_],
    survival: NDArray[np.float32],
) -> None:
    width = drafted.shape[2]
    np.add.at(report.num_steps, generations, 1)
    np.add.at(report.drafted[:, :width], generations, drafted[:, 0])
    np.add.at(report.accepted[:, :width], generations, right[:, 0])
    report.num_seconds += [np.count_nonzero(drafted[:, 1:]), np.count_nonzero(right[:, 1:])]
    known = drafted & ~np.isnan(survival)
    predicted = survival[known].astype(np.float64)
    bins = np.minimum((predicted * NUM_BINS).astype(int), NUM_BINS - 1)
    counts = np.stack([np.ones_like(predicted), predicted, right[known]], axis=1)
    np.add.at(report.reliability, bins, counts)


def match_drafted(
    run: Callable[[float], ReplayReport], drafted_per_step: float, num_runs: int = 9
) -> ReplayReport:
    """The run that drafts as many tokens but not more, by bisection of the least survival."""
    low, high = 0.0, 1.0
    best: ReplayReport | None = None
    for _ in range(num_runs):
        middle = (low + high) / 2
        report = run(middle)
        if report.drafted_per_step > drafted_per_step:
            low = middle
            continue
        high = middle
        best = report
        if report.drafted_per_step > 0.99 * drafted_per_step:
            break
    return best or run(high)
