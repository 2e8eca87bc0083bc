# SPDX-License-Identifier: Apache-2.0
"""One sampling job from settings to closing table, whatever the workers are.

    settings -> prompts -> run.json -> workers <-> dispatch.py -> summary

Invariants
- Emit-everything: what is on disk is never drawn again, everything else is drawn once; a prompt that
  cannot be drawn comes out as failed rows. Who draws what: `dispatch`.
- Bounded: the dataset is read twice, once to check it, once to hand it out; no copy is kept.

Used by: `streaminator.cli`, `jobs.sample`.
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from types import FrameType
from typing import TYPE_CHECKING

from streaminator.backlog import Work
from streaminator.config import JobConfig
from streaminator.data.files import hold, open_output
from streaminator.data.finished import EarlierRun, Finished
from streaminator.data.parquet import completions_schema
from streaminator.data.prompts import load_prompts
from streaminator.dispatch import Dispatcher
from streaminator.engine.checkpoint import check_model, load_tokenizer, model_fingerprint
from streaminator.errors import ConfigError, StreaminatorError, Terminated
from streaminator.grading import grader_fingerprint, make_grader
from streaminator.pool import OpenRun, Pool
from streaminator.progress import Opened, Progress
from streaminator.run_output import RunOutput
from streaminator.run_record import (
    Run,
    check_run,
    find_earlier_run,
    open_run,
    record_workers,
    resolve_run_id,
    tokenizer_fingerprint,
)
from streaminator.summary import Summary, summarise
from streaminator.summary_table import render
from streaminator.terminal import say, show
from streaminator.wandb_log import WandbLog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    open_output(config.run.output)  # the dataset may take minutes to read
    check_model(config.model)
    completions_schema(config.data.metadata_columns)  # refuses names that are taken
    make_grader(config.data)
    tokenizer = load_tokenizer(config.model)
    vocabulary = tokenizer_fingerprint(tokenizer)
    earlier_uri = find_earlier_run(config, run_id, vocabulary)
    earlier = None if earlier_uri is None else EarlierRun(earlier_uri)
    config = replace(config, speculator=replace(config.speculator, warm_start=earlier_uri))
    dataset = _check_dataset(config, tokenizer, earlier)
    _check_blocks(config, dataset.longest)
    fingerprints = {
        "model": model_fingerprint(config.model),
        "tokenizer": vocabulary,
        "prompts": dataset.fingerprint,
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
            _draw(config, pool, run, tokenizer, dataset, earlier, log)
        summary = summarise(run.uri)
    except BaseException:
        if log is not None:
            log.finish()
        raise
    finally:
        pool.shut_down()
    if log is not None:
        log.finish(summary)
    show(render(summary))
    return summary


def _check_blocks(config: JobConfig, longest: int) -> None:
    size, given = config.engine.block_size, config.engine.num_blocks
    needed = -(-(longest + config.sampling.max_length) // size) + 1
    if given is not None and given < needed:
        raise ConfigError(
            f"--num_blocks {given}: the longest prompt ({longest} tokens) and --max_length "
            f"{config.sampling.max_length} need {needed}; give as many, or leave it out"
        )


@dataclass(frozen=True, slots=True)
class _Dataset:
    num_prompts: int
    longest: int
    """Tokens of the longest prompt."""
    fingerprint: str


def _check_dataset(
    config: JobConfig, tokenizer: "PreTrainedTokenizerBase", earlier: EarlierRun | None
) -> _Dataset:
    """Read every row once: whatever is wrong with it is found before anything is started."""
    digest = blake2b(digest_size=8)
    num_prompts = longest = num_warm = 0
    for prompt in load_prompts(config.data, tokenizer):
        digest.update(f"{prompt.prompt_id}\0{prompt.token_ids}\n".encode())
        num_prompts += 1
        longest = max(longest, len(prompt.token_ids))
        num_warm += earlier is not None and bool(earlier.parts_of(prompt.prompt_id))
    if earlier is not None:
        source = config.speculator.warm_start
        if not num_warm:
            raise ConfigError(
                f"--warm_start {source}: has none of these prompts, by id; leave it out, or set "
                "--id_column as it was"
            )
        say(f"{num_warm:,} of {num_prompts:,} prompts start warm from {source}")
    return _Dataset(num_prompts, longest, digest.hexdigest())


def _draw(
    config: JobConfig,
    pool: Pool,
    run: Run,
    tokenizer: "PreTrainedTokenizerBase",
    dataset: _Dataset,
    earlier: EarlierRun | None,
    log: WandbLog | None,
) -> None:
    output = RunOutput(config, run, say)
    finished = Finished(run.uri, config.data.num_completions)
    num_total = dataset.num_prompts * config.data.num_completions
    num_done = finished.num_completions
    _announce(run, num_done, num_total)
    dispatcher = Dispatcher(
        pool,
        _left_to_draw(config, tokenizer, finished, earlier),
        output,
        stream_width=config.engine.stream_width,
        worker_timeout=config.cluster.worker_timeout,
    )
    with (
        _closing(pool, output),
        Progress(num_total, num_done, pool.num_workers) as progress,
    ):
        pool.open(
            OpenRun(
                uri=run.uri,
                attempt=run.attempt,
                max_prompt_length=dataset.longest,
                max_in_flight=_max_in_flight(
                    config, dataset, pool.num_workers, num_total - num_done
                ),
            )
        )
        recorded: dict[int, Opened] = {}
        for report in dispatcher.run():
            progress.update(report)
            if log is not None:
                log.log(report)
            if len(pool.opened) >= max(2 * len(recorded), 1):  # not anew for each of a thousand
                recorded = dict(pool.opened)
                record_workers(run, recorded)
        if pool.opened != recorded:
            record_workers(run, pool.opened)


def _max_in_flight(config: JobConfig, dataset: _Dataset, num_workers: int, num_left: int) -> int:
    """Completions of a worker that can be in flight at once, with its share of the prompts."""
    num_prompts = -(-dataset.num_prompts // num_workers)
    num_each = config.data.num_completions
    num_each = min(config.engine.in_flight_per_prompt or num_each, num_each)
    return min(num_prompts * num_each, num_left)


def _left_to_draw(
    config: JobConfig,
    tokenizer: "PreTrainedTokenizerBase",
    finished: Finished,
    earlier: EarlierRun | None,
) -> Iterator[Work]:
    """The prompts with the completions that are not on disk, in the dataset's order."""
    for prompt in load_prompts(config.data, tokenizer):
        missing, parts = finished.left(prompt)
        if missing:
            if earlier is not None:
                prompt = replace(prompt, warm_parts=earlier.parts_of(prompt.prompt_id))
            yield Work.of(prompt, missing, parts)


@contextmanager
def _closing(pool: Pool, output: RunOutput) -> Iterator[None]:
    """Write out what is finished, whatever ended the block; its own error comes first."""
    try:
        yield
    except BaseException:
        try:
            _close(pool, output)
        except StreaminatorError as error:
            say(f"while closing: {error}")
        raise
    _close(pool, output)


def _close(pool: Pool, output: RunOutput) -> None:
    try:
        for result in pool.close():
            for part in result.parts:
                output.publish(part)
    finally:
        output.close()


def _announce(run: Run, num_done: int, num_total: int) -> None:
    text = f"run {run.run_id}: {num_total:,} completions into {run.uri}"
    if num_done:
        text += f", {num_done:,} of them there already"
    say(text)


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
    run_id = resolve_run_id(config)
    return json.dumps({"run_id": run_id} | config.shown() | {"run_id": run_id}, indent=2)
