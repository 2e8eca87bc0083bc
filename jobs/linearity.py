# SPDX-License-Identifier: Apache-2.0
"""Whether many prompts take no longer per token than few, and no more memory.

    python -m jobs.linearity

Draws made-up word problems with the bundled model by `jobs.sample --num_workers 0`, few and many in
turn, each run in a process of its own. The rate is of the time in which the stream is full: few
prompts spend more of their time on filling and emptying it. Prints a table and, last, one line of
JSON.

Used by: the command line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.json_out import check_json_out, write_json_out
from jobs.study_output import versions
from jobs.word_problems import generate
from streaminator.cli import main_program
from streaminator.cli_args import make_parser, parse_words
from streaminator.errors import ConfigError, InputError
from streaminator.run_record import cpu_model

_PROGRAM = "python -m jobs.linearity"
_FULL = """
WITH bounds AS (
    SELECT min(time) AS first, max(time) AS last
    FROM read_parquet($steps) WHERE num_running = stream_width
)
SELECT sum(num_new_tokens) FILTER (time > first)
       / nullif(date_diff('millisecond', first, last), 0) * 1000
FROM read_parquet($steps), bounds WHERE time <= last GROUP BY first, last
"""
"""Tokens per second from the first to the last step of a full stream."""


def main(argv: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    options = _parse(argv)
    runs: dict[int, list[dict[str, float]]] = {options.few: [], options.many: []}
    with tempfile.TemporaryDirectory(prefix="streaminator-linearity-") as folder:
        problems = Path(folder, "problems.jsonl")
        with problems.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in generate(options.many, seed=0))
        for repeat in range(options.repeats):
            for num, done in runs.items():
                sys.stderr.write(f"{num} prompts\n")
                done.append(_run(options, problems, Path(folder, f"{num}-{repeat}"), num))
    rates = [
        many["tokens_per_second"] / few["tokens_per_second"]
        for few, many in zip(runs[options.few], runs[options.many], strict=True)
    ]
    result = {
        "settings": vars(options) | {"json_out": None},
        "cpu": cpu_model(),
        "versions": versions(),
        "runs": {str(num): done for num, done in runs.items()},
        "many_to_few": {"median": statistics.median(rates), "values": rates},
    }
    for num, done in runs.items():
        for run in done:
            print(
                f"{num:>8,} prompts: {run['tokens_per_second']:>8,.0f} tokens/s while the stream is "
                f"full, {run['overall']:>8,.0f} overall; at most {run['peak_mb']:,.0f} MB"
            )
    print(f"many to few: {result['many_to_few']['median']:.3f} tokens/s while the stream is full")
    print(json.dumps(result))
    write_json_out(options.json_out, json.dumps(result, indent=1))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(_PROGRAM, str(__doc__).split("\n", 1)[0])
    add = parser.add_argument
    add("--few", type=int, default=100, help="prompts of the short runs")
    add("--many", type=int, default=10_000, help="prompts of the long runs")
    add("--num_completions", type=int, default=4)
    add("--max_length", type=int, default=128, help="most tokens of a completion")
    add("--stream_width", type=int, default=16)
    add("--repeats", type=int, default=1, help="pairs of runs")
    add("--json_out", help="write the result there, too")
    options = parse_words(parser, argv)
    for name in ("few", "num_completions", "max_length", "stream_width", "repeats"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: give 1 or more")
    if options.many <= options.few:
        raise ConfigError(f"--many {options.many}: give more than --few {options.few}")
    if options.few < 2 * options.stream_width:
        raise ConfigError(
            f"--few {options.few}: the stream would hardly be full; give {2 * options.stream_width} "
            "or more, or a narrower --stream_width"
        )
    check_json_out(options.json_out)
    return options


def _run(options: argparse.Namespace, problems: Path, output: Path, num: int) -> dict[str, Any]:
    """One run in a process of its own, of which the system tells the memory."""
    settings = {
        "dataset": problems,
        "num_samples": num,
        "num_completions": options.num_completions,
        "max_length": options.max_length,
        "stream_width": options.stream_width,
        "num_workers": 0,
        "output": output,
        "run_id": "run",
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.sample", *flags], stdout=subprocess.DEVNULL
    )
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"jobs.sample ended with {process.returncode}, for the reason above")
    # Imported late, so that --help and typos are answered at once.
    import duckdb

    from streaminator.summary import summarise

    steps = str(output / "run" / "steps" / "*.parquet")
    rates = duckdb.execute(_FULL, {"steps": steps}).fetchall()
    if not rates or rates[0][0] is None:
        raise InputError(
            f"--stream_width {options.stream_width}: the stream of {num} prompts was never full; "
            "give a narrower one"
        )
    return {
        "tokens_per_second": rates[0][0],
        "overall": summarise(str(output / "run")).tokens_per_second,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


if __name__ == "__main__":
    sys.exit(main_program(_PROGRAM, main, advice=""))
