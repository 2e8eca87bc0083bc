# SPDX-License-Identifier: Apache-2.0
"""Replay logged completions through speculators, without a model.

A stream of `width` slots as the engine would run it: prompts are admitted in the log's order, the
completions of each run one after another, all slots take a step together. In a step each slot
drafts, the logged continuation says how much of that is right, and the accepted tokens and one
more are committed. A drafted token is right with the probability that a fresh sample equals it,
so the rates are what live runs would see.

Used by: the command line (`python -m streaminator.speculative.replay FILE --tokenizer FOLDER`).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streaminator.errors import ConfigError
from streaminator.speculative.replay_speculators import SPECULATORS, ReplaySpeculator

_NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class LoggedPrompt:
    """A prompt and its completions in the order they were drawn."""

    prompt_id: str
    token_ids: NDArray[np.int64]
    completions: list[NDArray[np.int64]]


@dataclass(slots=True)
class _Slot:
    prompt: LoggedPrompt
    handle: int
    sample_index: int = 0
    position: int = 0


@dataclass(slots=True)
class ReplayReport:
    """What a speculator did on a log. Arrays of generations hold one sum per sample index."""

    num_steps: NDArray[np.int64]
    num_drafting: NDArray[np.int64]
    """Steps with a draft."""
    num_first_right: NDArray[np.int64]
    """Steps whose first drafted token was right."""
    num_drafted: int = 0
    num_accepted: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """In the speculator."""
    num_bytes: int = 0
    """Most memory the speculator held; 0 if it does not say."""
    by_position: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """[cap, (drafted, accepted)]"""
    reliability: NDArray[np.float64] = field(default_factory=lambda: np.zeros((_NUM_BINS, 3)))
    """[bin of predicted survival, (drafted, sum of predicted, accepted)]"""

    @property
    def acceptance(self) -> NDArray[np.float64]:
        """Share of all steps whose first drafted token was right, by sample index."""
        return self.num_first_right / np.maximum(self.num_steps, 1)

    @property
    def acceptance_when_drafting(self) -> NDArray[np.float64]:
        """The same over steps with a draft."""
        return self.num_first_right / np.maximum(self.num_drafting, 1)

    @property
    def tokens_per_step(self) -> float:
        """Committed tokens per slot-step; 1 without speculation."""
        return self.num_tokens / max(int(self.num_steps.sum()), 1)

    @property
    def drafted_per_step(self) -> float:
        """Drafted tokens per slot-step."""
        return self.num_drafted / max(int(self.num_steps.sum()), 1)


def replay(
    prompts: list[LoggedPrompt], speculator: ReplaySpeculator, *, cap: int, width: int
) -> ReplayReport:
    """Run a log through a speculator that drafts at most `cap` tokens, `width` prompts at once."""
    most = max((len(prompt.completions) for prompt in prompts), default=0)
    report = ReplayReport(
        np.zeros(most, np.int64), np.zeros(most, np.int64), np.zeros(most, np.int64)
    )
    report.by_position = np.zeros((cap, 2), np.int64)
    waiting = iter(prompts)
    slots: list[_Slot] = []
    while True:
        while len(slots) < width and (prompt := next(waiting, None)) is not None:
            speculator.open(prompt.prompt_id, prompt.token_ids)
            slots.append(_Slot(prompt, speculator.start(prompt.prompt_id, prompt.token_ids)))
        if not slots:
            return report
        handles = np.array([slot.handle for slot in slots])
        begun = time.perf_counter()
        tokens, lengths, survival = speculator.draft(handles, np.full(len(slots), cap))
        report.seconds += time.perf_counter() - begun
        pieces = []
        for slot, draft, length, predicted in zip(slots, tokens, lengths, survival, strict=True):
            piece, num_accepted = _verify(slot, draft[:length])
            pieces.append(piece)
            _count(report, slot.sample_index, length, num_accepted, predicted)
        num_new = np.array([len(piece) for piece in pieces])
        new = np.concatenate(pieces)
        begun = time.perf_counter()
        speculator.commit(handles, new, num_new)
        report.seconds += time.perf_counter() - begun
        report.num_tokens += len(new)
        report.num_bytes = max(report.num_bytes, speculator.num_bytes)
        for slot, num in zip(slots, num_new, strict=True):
            slot.position += int(num)
        slots = [slot for slot in slots if _goes_on(slot, speculator)]


def _verify(slot: _Slot, draft: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Tokens that the step adds, and how many drafted ones were right."""
    completion = slot.prompt.completions[slot.sample_index]
    logged = completion[slot.position : slot.position + len(draft)]
    differs = draft[: len(logged)] != logged
    num_accepted = int(differs.argmax()) if differs.any() else len(logged)
    return completion[slot.position : slot.position + num_accepted + 1], num_accepted


def _count(
    report: ReplayReport, index: int, length: int, num_accepted: int, predicted: NDArray
) -> None:
    report.num_steps[index] += 1
    report.num_drafting[index] += length > 0
    report.num_first_right[index] += num_accepted > 0
    report.num_drafted += int(length)
    report.num_accepted += num_accepted
    report.by_position[:length, 0] += 1
    report.by_position[:num_accepted, 1] += 1
    bins = np.minimum((predicted[:length] * _NUM_BINS).astype(int), _NUM_BINS - 1)
    np.add.at(report.reliability[:, 0], bins, 1)
    np.add.at(report.reliability[:, 1], bins, predicted[:length])
    np.add.at(report.reliability[:, 2], bins[:num_accepted], 1)


def _goes_on(slot: _Slot, speculator: ReplaySpeculator) -> bool:
    prompt = slot.prompt
    if slot.position < len(prompt.completions[slot.sample_index]):
        return True
    speculator.finish(slot.handle)
    slot.sample_index += 1
    slot.position = 0
    if slot.sample_index == len(prompt.completions):
        speculator.close(prompt.prompt_id)
        return False
    slot.handle = speculator.start(prompt.prompt_id, prompt.token_ids)
    return True


def match_drafted(
    run: Callable[[float], ReplayReport], drafted_per_step: float, num_runs: int = 6
) -> ReplayReport:
    """The run whose drafts are as many, found by bisection of the least survival drafted."""
    low, high = 0.0, 1.0
    best: ReplayReport | None = None
    for _ in range(num_runs):
        middle = (low + high) / 2
        report = run(middle)
        if report.drafted_per_step > drafted_per_step:
            low = middle
            continue
        high = middle
        best = report  # never more tokens than the other had
    return best or run(high)


def read_log(path: Path, tokenizer: Path, num_completions: int) -> list[LoggedPrompt]:
    """Read JSON lines with `prompt_id`, `question` and `completions`.

    Raises: ConfigError naming the file, the line and what is wrong with it.
    """
    from tokenizers import Tokenizer

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not file.is_file():
        raise ConfigError(f"{file}: no such tokenizer file")
    encoder = Tokenizer.from_file(str(file))
    prompts = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not JSON: {error}") from None
        missing = {"prompt_id", "question", "completions"} - row.keys()
        if missing:
            raise ConfigError(f"{path}:{number}: no column {', '.join(sorted(missing))}")
        texts = [text for text in row["completions"][:num_completions] if text]
        encoded = [np.array(encoder.encode(t).ids, np.int64) for t in [row["question"], *texts]]
        if texts:
            prompts.append(LoggedPrompt(str(row["prompt_id"]), encoded[0], encoded[1:]))
    if not prompts:
        raise ConfigError(f"{path}: no completions in it")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def main(arguments: list[str] | None = None) -> int:
    """Print one table per log."""
    parser = argparse.ArgumentParser(
        prog="python -m streaminator.speculative.replay", description=str(replay.__doc__)
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--speculators", default="memory,memory_private,ngram,arctic")
    parser.add_argument("--num_completions", type=int, default=8)
    parser.add_argument("--cap", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--min_survival", type=float, default=0.02)
    parser.add_argument("--reliability", action="store_true")
    args = parser.parse_args(arguments)
    try:
        for path in args.files:
            prompts = read_log(path, args.tokenizer, args.num_completions)
            sys.stdout.write(f"\n{path.name}, {len(prompts)} prompts, width {args.width}\n")
            _print_log(prompts, args)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _print_log(prompts: list[LoggedPrompt], args: argparse.Namespace) -> None:
    reports = {}
    for name in args.speculators.split(","):
        if name not in SPECULATORS:
            raise ConfigError(f"speculators {name}: one of {', '.join(SPECULATORS)}")
        make = SPECULATORS[name]
        one = replay(prompts, make(0.0), cap=1, width=args.width)
        many = replay(prompts, make(args.min_survival), cap=args.cap, width=args.width)
        reports[name] = many
        sys.stdout.flush()
        steps = " ".join(f"{rate:.3f}" for rate in one.acceptance)
        drafting = one.num_first_right.sum() / max(one.num_drafting.sum(), 1)
        sys.stdout.write(
            f"{name:16} k=1 {steps}  mean {one.acceptance.mean():.3f} (when drafting "
            f"{drafting:.3f})\n{'':16} {_summary(many)}\n"
        )
        if args.reliability and many.reliability[:, 1].any():
            for number, predicted, accepted in many.reliability[many.reliability[:, 0] > 0]:
                sys.stdout.write(
                    f"{'':16} predicted {predicted / number:.3f} "
                    f"observed {accepted / number:.3f} of {number:.0f}\n"
                )
    if "arctic" in reports and "memory" in reports:

        def run(least: float) -> ReplayReport:
            return replay(prompts, SPECULATORS["memory"](least), cap=args.cap, width=args.width)

        drafted = reports["arctic"].drafted_per_step
        sys.stdout.write(f"{'memory = arctic':16} {_summary(match_drafted(run, drafted))}\n")


def _summary(report: ReplayReport) -> str:
    positions = report.by_position[:, 1] / np.maximum(report.by_position[:, 0], 1)
    return (
        f"tokens/step {report.tokens_per_step:.3f} drafted/step {report.drafted_per_step:.2f} "
        f"accepted/drafted {report.num_accepted / max(report.num_drafted, 1):.3f} "
        f"us/token {1e6 * report.seconds / max(report.num_tokens, 1):.1f} "
        f"MiB {report.num_bytes / 2**20:.1f} "
        f"by position {' '.join(f'{rate:.2f}' for rate in positions)}"
    )


if __name__ == "__main__":
    sys.exit(main())
