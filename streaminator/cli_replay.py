# SPDX-License-Identifier: Apache-2.0
"""`streaminator replay`: speculators side by side on logged completions, without a model.

Used by: `streaminator.cli`; `tokenizer_of` by `jobs.benchmark_memory`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from streaminator.cli_args import make_parser, parse_words
from streaminator.config import ModelConfig
from streaminator.data.files import open_output
from streaminator.errors import ConfigError, ModelError
from streaminator.speculative.memory import MAX_DRAFT
from streaminator.speculative.memory_texts import number_tokens
from streaminator.speculative.replay import LoggedPrompt, ReplayReport, match_drafted, replay
from streaminator.speculative.replay_log import Columns, Log, encode, read_log, vocabulary, warm
from streaminator.speculative.replay_report import Result, print_tables, write_report
from streaminator.speculative.replay_speculators import REGIMES, SPECULATORS, default_speculators


def main(argv: Sequence[str]) -> int:
    """Read the logs, replay each through each speculator, print the tables; the exit code.

    Raises: InputError; OutputError.
    """
    args = _parse(argv)
    _check_regimes(args)
    for name in args.speculators:
        SPECULATORS[name].make("both", 0.0, None)  # refuses what is not installed
    read = [_read(source, args) for source in args.logs]
    if args.output is not None:
        open_output(args.output)
    results = []
    for log, prompts in read:
        for note in log.notes:
            sys.stderr.write(f"{note}\n")
        of_log = list(_replay_log(log, prompts, args))
        num_completions = sum(len(prompt.completions) for prompt in prompts)
        print_tables(
            of_log,
            f"\n{log.source}: {len(prompts):,} prompts, {num_completions:,} completions, "
            f"{of_log[0].report.num_tokens:,} tokens, width {args.stream_width}",
        )
        results += of_log
    if args.output is not None:
        for path in write_report(results, args.output):
            print(path)  # noqa: T201 - where the results are
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("streaminator replay", "Speculators on logged completions, side by side.")

    def add(flag: str, default: Any, text: str, kind: Callable = str) -> None:
        if default not in (None, ""):
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            text += f" (default: {shown})"
        metavar = flag.upper()
        parser.add_argument(f"--{flag}", default=default, type=kind, metavar=metavar, help=text)

    parser.add_argument("logs", nargs="+", metavar="LOG", help="a run's folder or URI, or a "
                        ".jsonl, .json, .csv or .parquet file of completions")  # fmt: skip
    add("tokenizer_name", None, "hub name or folder; not needed for a run, or where token ids are "
        "recorded for prompts and completions")  # fmt: skip
    choice = f"comma-separated: {', '.join(SPECULATORS)}"
    add("speculators", default_speculators(), choice, _names(SPECULATORS))
    add("num_speculative_tokens", [1, 8], "most tokens drafted per step, comma-separated; 1 "
        "drafts at every step", _draft_lengths)  # fmt: skip
    choice = f"what is learned from, comma-separated: {', '.join(REGIMES)}"
    add("regimes", ["both"], choice, _names(REGIMES))
    add("warm_start", None, "earlier log; a prompt's completions in it are learned first")
    add("output", None, "folder or URI for the tables (Parquet) and the figure (PNG)")
    add("stream_width", 16, "prompts in flight at once", _count)
    add("num_samples", None, "number of prompts to take; default: all", _count)
    add("num_completions", None, "completions to take per prompt; default: all", _count)
    add("min_survival", 0.02, "memory, k above 1: no token less likely to be accepted is drafted",
        _survival)  # fmt: skip
    add("match_drafted", None, "replay the memory again drafting as many tokens as this "
        "speculator (default: arctic, if compared)")  # fmt: skip
    for column in fields(Columns):
        add(column.name, None, "column of a file's rows; default: a usual name")
    args = parse_words(parser, argv)
    if args.match_drafted is None and "arctic" in args.speculators:
        args.match_drafted = "arctic"
    if args.match_drafted is not None and args.match_drafted not in args.speculators:
        raise ConfigError(f"--match_drafted {args.match_drafted}: must be among --speculators")
    return args


def _check_regimes(args: argparse.Namespace) -> None:
    """Say which speculators a regime leaves out."""
    for regime in args.regimes:
        other = [name for name in args.speculators if regime not in SPECULATORS[name].regimes]
        note = f"--regimes {regime}: {', '.join(other)} always learns from both"
        if other == args.speculators:
            raise ConfigError(f"{note}; add a speculator, or leave {regime} out")
        if other:
            sys.stderr.write(f"{note}, left out\n")


def _names(known: dict[str, Any]) -> Callable[[str], list[str]]:
    def names(words: str) -> list[str]:
        for name in words.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} must be among {', '.join(known)}")
        return list(dict.fromkeys(words.split(",")))

    return names


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} must be a number, 1 or more")
    return int(word)


def _draft_lengths(words: str) -> list[int]:
    lengths = sorted({_count(word) for word in words.split(",")})
    if lengths[-1] > MAX_DRAFT:
        raise argparse.ArgumentTypeError(f"{lengths[-1]} must be at most {MAX_DRAFT}")
    return lengths


def _survival(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{word!r} must be between 0 and 1")
    return value


def _read(source: str, args: argparse.Namespace) -> tuple[Log, list[LoggedPrompt]]:
    """A log with its prompts, which start warm if that is asked for."""
    columns = Columns(**{column.name: getattr(args, column.name) for column in fields(Columns)})
    log = read_log(source, columns)
    tokenizer = tokenizer_of(log, args.tokenizer_name)
    if tokenizer is not None:
        log.numbers = number_tokens(tokenizer)
    prompts = encode(
        log, tokenizer, num_samples=args.num_samples, num_completions=args.num_completions
    )
    if "prompt" in args.regimes and not all(len(prompt.token_ids) for prompt in prompts):
        raise ConfigError(
            f"--regimes prompt: the prompts' tokens in {source} are not known; give "
            "--tokenizer_name, --prompt_column or --prompt_token_ids_column"
        )
    if args.warm_start is None:
        return log, prompts
    earlier = read_log(args.warm_start, columns)
    log.notes += earlier.notes
    one, other = vocabulary(log, tokenizer), vocabulary(earlier, None)
    if other is not None and one is not None and one != other:
        raise ConfigError(
            f"--warm_start {args.warm_start}: its model has another vocabulary than {source} "
            f"({other}, {one}); give a run of a model with the same tokenizer"
        )
    return log, warm(prompts, log, encode(earlier, tokenizer), earlier)


def tokenizer_of(log: Log, name: str | None) -> Any:
    """The tokenizer asked for, else a run's own, else None. Raises: ModelError for the first."""
    if name is None and log.record is None:
        return None
    # Imports torch and transformers.
    from streaminator.engine.checkpoint import load_tokenizer

    if name is not None or log.record is None:
        return load_tokenizer(ModelConfig(tokenizer_name=name))
    settings = log.record.settings
    recorded = settings.get("tokenizer_name") or settings.get("model_name")
    try:
        # The run's code is not trusted: only names are taken from its settings.
        return load_tokenizer(ModelConfig(tokenizer_name=recorded))
    except ModelError:
        log.notes.append(f"{log.source}: the run's own tokenizer is not there any more")
        return None


def _replay_log(
    log: Log, prompts: list[LoggedPrompt], args: argparse.Namespace
) -> Iterator[Result]:
    for cap in args.num_speculative_tokens:
        for regime in args.regimes:
            drafted = None
            names = [name for name in args.speculators if regime in SPECULATORS[name].regimes]
            # The one to be matched goes first; the tables keep the order asked for.
            results = {}
            for name in sorted(names, key=lambda name: name != args.match_drafted):
                _tell(f"{log.source}: {name}, k = {cap}, {regime}")
                run = _runner(log, prompts, name, regime, cap, args.stream_width)
                report = run(args.min_survival if cap > 1 else 0.0)
                keys = (log.source, name, cap, regime)
                results[name] = [Result(*keys, None, args.warm_start, report)]
                if name == args.match_drafted:
                    drafted = report.drafted_per_step
                elif drafted is not None and cap > 1 and SPECULATORS[name].has_min_survival:
                    _tell(
                        f"{log.source}: {name}, k = {cap}, as many drafted as {args.match_drafted}"
                    )
                    matched = match_drafted(run, drafted)
                    keys = (*keys, args.match_drafted)
                    results[name].append(Result(*keys, args.warm_start, matched))
            for name in names:
                yield from results[name]
    _tell("")


def _runner(
    log: Log, prompts: list[LoggedPrompt], name: str, regime: str, cap: int, width: int
) -> Callable[[float], ReplayReport]:
    """Replays with a new speculator, given the least survival worth drafting."""
    kind = SPECULATORS[name]

    def run(min_survival: float) -> ReplayReport:
        # Compiled code is compiled, or loaded, before the clock starts.
        tokens = np.array([0, 1, 0, 1])
        replay(
            [LoggedPrompt("", tokens, [tokens], [tokens])],
            kind.make(regime, min_survival, log.numbers), cap=cap, width=1,
        )  # fmt: skip
        speculator = kind.make(regime, min_survival, log.numbers)
        return replay(prompts, speculator, cap=cap, width=width)

    return run


def _tell(text: str) -> None:
    """What is going on, on a line that is written over."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
