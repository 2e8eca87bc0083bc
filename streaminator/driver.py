# SPDX-License-Identifier: Apache-2.0
"""One sampling job from settings to closing table, whatever the workers are.

    settings -> prompts -> run.json -> workers <-> this loop -> summary

Invariants
- Emit-everything: what is on disk is never drawn again, everything else is given to exactly one
  worker (a prompt with all its completions is one unit of work).
- Affinity: a prompt belongs to the worker that a stable hash of its id names; only prompts that
  no worker has started may move, and only to a worker that has none left.
- Bounded: a worker holds at most `2 * stream_width` open prompts.

Who waits for whom: the loop waits for any worker's report; a worker waits for its next slice,
which it gets with new prompts as soon as it has reported.

Used by: `streaminator.cli`, `jobs.sample`.
"""

import json
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from types import FrameType

from streaminator.config import JobConfig
from streaminator.data.files import clean_temp_files, hold
from streaminator.data.parquet import completions_schema, read_distributions, read_finished
from streaminator.data.prompts import load_prompts
from streaminator.engine.checkpoint import check_model, load_tokenizer, model_fingerprint
from streaminator.errors import ConfigError, StreaminatorError, Terminated
from streaminator.grading import grader_fingerprint, make_grader
from streaminator.pool import OpenRun, Pool
from streaminator.progress import Progress
from streaminator.run_record import (
    Run,
    check_run,
    open_run,
    resolve_run_id,
    tokenizer_fingerprint,
)
from streaminator.sequence import Prompt
from streaminator.summary import Summary, render, summarise
from streaminator.wandb_log import WandbLog


def sample(config: JobConfig, make_pool: Callable[[JobConfig], Pool]) -> Summary:
    """Draw every completion that is not on disk yet; print the closing table.

    Args:
        config: resolved settings (`device` and `dtype` without "auto").
        make_pool: loads the model in all workers.

    Raises:
        InputError: before anything is written.
        StreaminatorError: the run could not go on; what is finished is on disk.
    """
    with _sigterm_raises():
        return _sample(config, make_pool)


def _sample(config: JobConfig, make_pool: Callable[[JobConfig], Pool]) -> Summary:
    run_id = resolve_run_id(config)
    check_model(config.model)
    completions_schema(config.data.metadata_columns)  # refuses names that are taken
    make_grader(config.data)
    tokenizer = load_tokenizer(config.model)
    prompts = list(load_prompts(config.data, tokenizer))
    longest = max(len(prompt.token_ids) for prompt in prompts)
    _check_blocks(config, longest)
    fingerprints = {
        "model": model_fingerprint(config.model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "prompts": _prompts_fingerprint(prompts),
        "grader": grader_fingerprint(config.data),
    }
    check_run(config.run.output, run_id, config, fingerprints=fingerprints)
    pool = make_pool(config)
    log = None
    try:
        log = WandbLog(config, run_id) if config.run.use_wandb else None
        with hold(config.run.output, run_id):
            run = open_run(
                config.run.output,
                run_id,
                config,
                fingerprints=fingerprints,
                gpus=[name for name in pool.device_names if name != "cpu"],
            )
            with _closing(pool):
                pool.open(OpenRun(uri=run.uri, attempt=run.attempt, max_prompt_length=longest))
                _draw(config, pool, run, prompts, log)
        summary = summarise(run.uri)
    except BaseException:
        if log is not None:
            log.finish()
        raise
    finally:
        pool.shut_down()
    if log is not None:
        log.finish(summary)
    print(render(summary))  # noqa: T201 - the closing table is the program's output
    return summary


def _check_blocks(config: JobConfig, longest: int) -> None:
    size, given = config.engine.block_size, config.engine.num_blocks
    needed = -(-(longest + config.sampling.max_length) // size) + 1
    if given is not None and given < needed:
        raise ConfigError(
            f"--num_blocks {given}: the longest prompt ({longest} tokens) and --max_length "
            f"{config.sampling.max_length} need {needed}; give as many, or leave it out"
        )


def _draw(
    config: JobConfig, pool: Pool, run: Run, prompts: list[Prompt], log: WandbLog | None
) -> None:
    clean_temp_files(run.uri)
    left = _left_to_draw(prompts, run)
    num_total = sum(len(prompt.sample_indices) for prompt in prompts)
    num_done = num_total - sum(len(prompt.sample_indices) for prompt in left)
    _announce(run, num_done, num_total)
    width = config.engine.stream_width
    with Progress(num_total, num_done, width * pool.num_workers) as progress:
        for report in _drive(pool, left, width):
            progress.update(report)
            if log is not None:
                log.log(report)


@contextmanager
def _closing(pool: Pool) -> Iterator[None]:
    """Write out what is finished, whatever ended the block; its own error comes first."""
    try:
        yield
    except BaseException:
        try:
            pool.close()
        except StreaminatorError as error:
            sys.stderr.write(f"while closing: {error}\n")
        raise
    pool.close()


def _announce(run: Run, num_done: int, num_total: int) -> None:
    text = f"run {run.run_id}: {num_total:,} completions into {run.uri}"
    if num_done:
        text += f", {num_done:,} of them there already"
    sys.stderr.write(text + "\n")


def _prompts_fingerprint(prompts: list[Prompt]) -> str:
    digest = blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(f"{prompt.prompt_id}\0{prompt.token_ids}\n".encode())
    return digest.hexdigest()


def _left_to_draw(prompts: list[Prompt], run: Run) -> list[Prompt]:
    """The prompts with the completions that are not on disk, in the dataset's order."""
    finished = read_finished(run.uri)
    left = []
    for prompt in prompts:
        drawn = finished.get(prompt.prompt_id, {})
        missing = tuple(i for i in prompt.sample_indices if i not in drawn)
        if missing:
            texts = tuple(tuple(drawn[i]) for i in sorted(drawn))
            left.append(replace(prompt, sample_indices=missing, finished=texts))
    kept = read_distributions(run.uri, {prompt.prompt_id for prompt in left if prompt.finished})
    for index, prompt in enumerate(left):
        if samples := kept.get(prompt.prompt_id):
            top = tuple(samples.get(i) for i in sorted(finished[prompt.prompt_id]))
            left[index] = replace(prompt, finished_distributions=top)
    return left


def _drive(pool: Pool, prompts: list[Prompt], stream_width: int) -> Iterator:
    """Keep every worker's window full until nothing is left; yields the workers' reports."""
    queues: list[deque[Prompt]] = [deque() for _ in range(pool.num_workers)]
    for prompt in prompts:
        queues[home_worker(prompt.prompt_id, pool.num_workers)].append(prompt)
    window = 2 * stream_width
    num_open = [0] * pool.num_workers
    waiting = set()

    def submit(worker: int) -> None:
        new = _take(queues, worker, window - num_open[worker])
        num_open[worker] += len(new)
        if num_open[worker]:
            has_more = any(queues)
            pool.submit(worker, new, window - stream_width // 2 if has_more else 0)
            waiting.add(worker)

    for worker in range(pool.num_workers):
        submit(worker)
    while waiting:
        worker, result = pool.next_result()
        waiting.discard(worker)
        num_open[worker] = result.num_open_prompts
        yield result.report
        submit(worker)


def home_worker(prompt_id: str, num_workers: int) -> int:
    """The worker a prompt belongs to; the same in every process and run."""
    digest = blake2b(prompt_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % num_workers


def _take(queues: list[deque[Prompt]], worker: int, num: int) -> list[Prompt]:
    """Up to `num` prompts of the worker's own queue, else of the longest one."""
    taken = []
    while len(taken) < num:
        queue = queues[worker] or max(queues, key=len)
        if not queue:
            break
        # Another worker's prompts are taken from the far end: the ones it would start last.
        taken.append(queue.popleft() if queue is queues[worker] else queue.pop())
    return taken


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that finished completions are written before the end."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def dry_run(config: JobConfig) -> str:
    """The resolved settings as JSON."""
    return json.dumps({"run_id": resolve_run_id(config), **config.flat()}, indent=2)
