# SPDX-License-Identifier: Apache-2.0
"""Many workers on paper: the real dispatcher against workers that only count steps.

    python -m jobs.simulate --num_workers 1024 --num_prompts 100000

Time is virtual, but what the driver computes is measured on this machine and charged to it, so a
slow driver leaves workers idle. The streams live in a process of their own: the memory told is that
of the driver, with its libraries and tokenizer. Not simulated: Ray's own cost of a call beyond
`--call_seconds`, reading and tokenising a prompt beyond `--prompt_seconds`, moving parts. Every
completion is checked to come once. Prints a table and, last, one line of JSON.

The tail begins when the last prompt that no worker had before is handed out.

Used by: the command line.
"""

import argparse
import importlib
import json
import random
import resource
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np

from jobs.json_out import check_json_out, write_json_out
from jobs.simulated_pool import SimulatedPool
from jobs.simulated_streams import RemoteStreams
from streaminator.backlog import Work
from streaminator.cli import main_program
from streaminator.cli_args import make_parser, parse_words
from streaminator.data.files import join_uri, list_parts, resolve
from streaminator.data.finished import HashSet, stable_hash
from streaminator.dispatch import Dispatcher
from streaminator.errors import ConfigError, DataError
from streaminator.pool import Part
from streaminator.run_record import cpu_model
from streaminator.sequence import Prompt

_PROGRAM = "python -m jobs.simulate"
_NUM_LENGTHS = 1 << 16
_NUM_TEXTS = 100
_PART_SECONDS = 5.0
_COUNTS = ("num_workers", "num_prompts", "num_completions", "stream_width", "prompt_tokens")


def main(argv: Sequence[str]) -> int:
    """Simulate, with `--lose` a second time with losses; returns the exit code."""
    options = _parse(argv)
    steps = np.ceil(_lengths(options) / options.tokens_per_step).astype(np.int32).clip(1)
    _load_what_a_driver_loads()
    before = _resident()
    result: dict[str, Any] = {"settings": vars(options), "cpu": cpu_model()}
    result["libraries_mb"] = before
    result |= _simulate(options, steps, None)
    if options.lose:
        # At random moments of the undisturbed run, for good.
        dice = random.Random(options.seed)
        lost = dice.sample(range(options.num_workers), round(options.lose * options.num_workers))
        moments = {worker: dice.uniform(0, result["seconds"]) for worker in lost}
        after = _simulate(options, steps, moments)
        after["slower_by"] = after["seconds"] / result["seconds"] - 1
        result["with_losses"] = after
    for name, value in result.items():
        if not isinstance(value, dict):
            print(f"{name:34} {value if isinstance(value, str) else f'{value:,.4g}'}")
    if options.lose:
        print(*(f"with losses: {n} {v:,.4g}" for n, v in result["with_losses"].items()), sep="\n")
    print(json.dumps(result))
    write_json_out(options.json_out, json.dumps(result, indent=1))
    return 0


def _load_what_a_driver_loads() -> None:
    for name in ("actors.pool", "cluster.connect", "cluster.resources", "streaminator.driver"):
        importlib.import_module(name)
    from streaminator.config import ModelConfig
    from streaminator.engine.checkpoint import load_tokenizer

    load_tokenizer(ModelConfig())("What an owner of a tokenizer holds.")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(_PROGRAM, str(__doc__).split("\n", 1)[0])
    add = parser.add_argument
    add("--num_workers", type=int, default=64)
    add("--num_prompts", type=int, default=20_000)
    add("--num_completions", type=int, default=8)
    add("--stream_width", type=int, default=16)
    add("--prompt_tokens", type=int, default=100, help="tokens of a prompt the driver holds")
    add(
        "--step_costs",
        default="1:0.010,64:0.012,256:0.020",
        help="seconds of a step by packed tokens; the default is assumed, not measured",
    )
    add("--tokens_per_step", type=float, default=2.0, help="new tokens of a slot in a step")
    add("--drafts_per_step", type=float, default=3.0, help="drafted tokens of a slot in a step")
    add("--median_length", type=float, default=200.0, help="tokens of a completion: log-normal,")
    add("--sigma", type=float, default=0.6, help="its spread")
    add("--max_length", type=int, default=1024, help="and where it is cut")
    add("--lengths_from", help="a run (folder or URI) whose completions' lengths are drawn instead")
    add("--call_seconds", type=float, default=0.0, help="driver seconds per call to a worker")
    add("--prompt_seconds", type=float, default=0.0, help="driver seconds to read a prompt")
    add("--latency", type=float, default=0.003, help="seconds between two slices of a worker")
    add("--lose", type=float, default=0.0, help="share of the workers to lose in a second run")
    add("--seed", type=int, default=0)
    add("--json_out", help="write the JSON here as well")
    options = parse_words(parser, argv)
    for name in _COUNTS:
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be 1 or more")
    if not 0 <= options.lose < 1:
        raise ConfigError(f"--lose {options.lose}: must be 0 or more and below 1")
    if options.tokens_per_step <= 0:
        raise ConfigError(f"--tokens_per_step {options.tokens_per_step}: must be more than 0")
    check_json_out(options.json_out)
    return options


def _lengths(options: argparse.Namespace) -> np.ndarray:
    rng = np.random.default_rng(options.seed)
    if options.lengths_from is None:
        lengths = options.median_length * rng.lognormal(0, options.sigma, _NUM_LENGTHS)
        return lengths.clip(1, options.max_length)
    filesystem, folder = resolve(join_uri(options.lengths_from, "completions"))
    parts = list_parts(filesystem, folder)
    if not parts:
        raise DataError(
            f"--lengths_from {options.lengths_from}: no completions; give a run's folder"
        )
    import pyarrow.dataset as ds  # late: it brings pandas, which a driver does not load

    table = ds.dataset(parts, filesystem=filesystem, format="parquet").to_table(
        columns=["num_completion_tokens"]
    )
    return rng.choice(table.column(0).to_numpy(), _NUM_LENGTHS)


def _step_seconds(options: argparse.Namespace) -> list[float]:
    """By running slots."""
    try:
        points = sorted(tuple(map(float, p.split(":"))) for p in options.step_costs.split(","))
        tokens, seconds = zip(*points, strict=True)
    except ValueError:
        raise ConfigError(
            f"--step_costs {options.step_costs}: must be TOKENS:SECONDS,TOKENS:SECONDS,..."
        ) from None
    if min(seconds) <= 0:
        raise ConfigError(f"--step_costs {options.step_costs}: seconds must be more than 0")
    packed = np.arange(options.stream_width + 1) * (1 + options.drafts_per_step)
    return np.interp(packed, tokens, seconds).tolist()


class _Output:
    """Counts what is published; a completion that comes twice is an error."""

    def __init__(self, pool: SimulatedPool, num_prompts: int, num_completions: int) -> None:
        self._pool, self._width = pool, num_completions
        self._seen = np.zeros(num_prompts * num_completions, bool)
        self.num_events = self.num_retried = 0

    @property
    def num_bytes(self) -> int:
        """What counting takes."""
        return self._seen.nbytes

    @property
    def num_seen(self) -> int:
        return int(self._seen.sum())

    def publish(self, part: Part) -> None:
        self.num_retried += len(self._pool.staged.pop(part.path))
        for name, index in part.keys:
            place = int(name[1:]) * self._width + index
            assert not self._seen[place], f"{name}, completion {index}: published twice"
            self._seen[place] = True

    def record(
        self, kind: str, *, worker: int | None, detail: str, prompt_id: str | None = None
    ) -> None:
        self.num_events += 1

    def fail(self, prompt: Prompt, why: str) -> None:
        raise AssertionError(f"{prompt.prompt_id} failed: {why}")


def _simulate(
    options: argparse.Namespace, steps: np.ndarray, lost_at: dict[int, float] | None
) -> dict[str, Any]:
    streams = RemoteStreams(
        options.stream_width,
        partial(_seconds_of_step, _step_seconds(options)),
        partial(_steps_of, steps),
        _PART_SECONDS,
    )
    with streams:
        return _figures(options, streams, lost_at)


def _figures(
    options: argparse.Namespace, streams: RemoteStreams, lost_at: dict[int, float] | None
) -> dict[str, Any]:
    def faults(worker: int, _held: set[str]) -> str | None:
        assert lost_at is not None
        return "node" if pool.now >= lost_at.get(worker, float("inf")) else None

    pool = SimulatedPool(
        options.num_workers,
        streams,
        latency=options.latency,
        call_seconds=options.call_seconds,
        restarts_after=float("inf"),
        driver_costs_time=True,
        faults=faults if lost_at else None,
    )
    output = _Output(pool, options.num_prompts, options.num_completions)
    dispatcher = Dispatcher(
        pool,
        _works(options, pool),
        output,
        stream_width=options.stream_width,
        worker_timeout=300.0,
        clock=lambda: pool.now,
    )
    for _ in dispatcher.run():
        pass
    num_completions = options.num_prompts * options.num_completions
    assert output.num_seen == num_completions, "a completion is missing"
    tail = pool.last_new_at
    busy_before, used_before = streams.busy(tail)
    busy, _ = streams.busy(pool.now)
    # Prompts that all find room at once leave nothing before the tail.
    has_body = options.num_prompts > 2 * options.num_workers * options.stream_width
    body = options.num_workers * tail if has_body else float("nan")
    figures = {
        "seconds": pool.now,
        "idle_before_tail": 1 - busy_before / body,
        "slots_empty_before_tail": 1 - used_before / body,
        "idle_overall": 1 - busy / (options.num_workers * pool.now),
        "tail_seconds": pool.now - tail,
        "driver_seconds_per_1000_prompts": pool.driver_seconds / options.num_prompts * 1000,
        "driver_share_of_time": pool.driver_seconds / pool.now,
        "driver_peak_mb": _resident(),
        "simulation_mb_of_it": output.num_bytes / 2**20,
        "num_completions": num_completions,
        "num_retried": output.num_retried,
        "num_events": output.num_events,
    }
    return {name: value for name, value in figures.items() if value == value}  # no NaN in JSON


def _seconds_of_step(by_slots: list[float], _worker: int, running: int) -> float:
    return by_slots[running]


def _steps_of(steps: np.ndarray, name: str, index: int) -> int:
    return int(steps[(crc32(name.encode()) + index * 40503) % len(steps)])


def _works(options: argparse.Namespace, pool: SimulatedPool) -> Iterator[Work]:
    """Prompts as large as real ones, also when compressed: words of a few thousand, by Zipf's law."""
    rng = np.random.default_rng(options.seed)
    letters = rng.integers(97, 123, (8192, 8), np.uint8)
    words = [
        row[:n].tobytes().decode() for row, n in zip(letters, rng.integers(1, 8, 8192), strict=True)
    ]
    ranks = (8192 ** rng.random((_NUM_TEXTS, options.prompt_tokens))).astype(int)
    tokens = [tuple((row * 18).tolist()) for row in ranks]
    texts = [" ".join(words[i] for i in row) for row in ranks]
    indices = tuple(range(options.num_completions))
    ids = HashSet()  # as `load_prompts` keeps them
    for number in range(options.num_prompts):
        pool.spend(options.prompt_seconds)
        ids.add(stable_hash(f"p{number}"))
        text = f"{number} {texts[number % _NUM_TEXTS]}"
        prompt = Prompt(
            prompt_id=f"p{number}",
            token_ids=tokens[number % _NUM_TEXTS],
            text=text,
            question=text,
            gold_answer=str(number),
            sample_indices=indices,
        )
        yield Work.of(prompt, indices)


def _resident() -> float:
    """Megabytes, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main_program(_PROGRAM, main))
