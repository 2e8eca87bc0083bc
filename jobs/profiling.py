# SPDX-License-Identifier: Apache-2.0
"""Where a model's sampling time goes, how full the stream is, how many drafted tokens are accepted.

    python -m jobs.profiling

The other figures of the original Streaminator, of any model: share of time by component with
speculation and without, stream utilization and memory over steps with continuous and with static
batching, counts of accepted tokens per step with a power law fitted. Three runs of `jobs.sample`'s
own machinery, in this process, write their Parquet into a temporary folder; every number comes from
there, by the SQL of `jobs.profiling_report`.
"""

import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.profiling_report import STATIC, WITH, WITHOUT, draw_figure, summarize, write_table
from jobs.study_output import describe, open_study, width_of, with_width, write_study
from streaminator.cli import main_program, resolve
from streaminator.cli_args import parse
from streaminator.config import JobConfig
from streaminator.errors import ConfigError, InputError

_PROGRAM = "python -m jobs.profiling"
_NUM_PROMPTS = 64
_OWN = {
    "spec_decoding": "the job runs with speculation and without",
    "continuous_batching": "the job runs both kinds of batching",
    "warm_start": "the job's runs start cold",
    "profile": "the job's runs are temporary; give it to jobs.sample",
    "use_wandb": "the job's runs are temporary; give it to jobs.sample",
}
"""Settings that are refused, and why."""


def main(argv: Sequence[str]) -> int:
    """Run the job; returns the exit code."""
    config, other = parse(argv, program=_PROGRAM, without=["cluster"])
    _check(config)
    num = config.data.num_samples or _NUM_PROMPTS
    config = replace(config, data=replace(config.data, num_samples=num))
    config = resolve(with_width(config))
    if other.dry_run:
        print(json.dumps(config.flat(), indent=2))
        return 0
    filesystem, stem = open_study(config, "profiling")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="streaminator-profiling-") as folder:
        _draw(config, folder)
        numbers = summarize(folder, stream_width=width_of(config))
    own = ("wandb_project", *_OWN)
    result: dict[str, Any] = describe(config, without=own)
    result |= {"seconds": round(time.monotonic() - start), **numbers}
    files = {
        "md": write_table(result).encode(),
        "json": (json.dumps(result, indent=1) + "\n").encode(),
        "png": draw_figure(result),
    }
    write_study(filesystem, stem, files)
    print(f"{write_table(result)}\nWritten: {stem}.md, .json, .png", flush=True)
    return 0


def _check(config: JobConfig) -> None:
    default = JobConfig().flat()
    for name, value in config.flat().items():
        if name in _OWN and value != default[name]:
            flag = f"no_{name}" if value is False else name
            raise ConfigError(f"--{flag}: {_OWN[name]}; leave it out")


def _draw(config: JobConfig, folder: str) -> None:
    """One run a folder. The first one, whose times are not compared, warms up for the others."""
    # Imported late, so that --help and typos are answered at once.
    from streaminator.driver import sample
    from streaminator.pool import LocalPool

    engine, speculator = config.engine, config.speculator
    runs = {
        STATIC: replace(config, engine=replace(engine, continuous_batching=False)),
        WITHOUT: replace(config, speculator=replace(speculator, spec_decoding=False)),
        WITH: config,
    }
    for name, own in runs.items():
        sys.stderr.write(f"{name}\n")
        place = replace(own.run, output=folder, run_id=name)
        # Its closing table tells where its results are, and they will be gone.
        with redirect_stdout(io.StringIO()):
            summary = sample(replace(own, run=place), LocalPool)
        if not summary.num_tokens:
            why = next(iter(summary.failures), "the dataset has no rows")
            raise InputError(f"{Path(config.data.dataset).name}: nothing was drawn ({why})")


if __name__ == "__main__":
    sys.exit(main_program(_PROGRAM, main, advice=""))
