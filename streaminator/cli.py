# SPDX-License-Identifier: Apache-2.0
"""The library's own front, for one device and without Ray.

    streaminator sample   draw many completions per prompt
    streaminator replay   try speculators on logged completions
    streaminator COMMAND --help

Used by: the `streaminator` command; `main_program` also by `jobs.*`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from streaminator.cli_args import parse
from streaminator.config import JobConfig
from streaminator.errors import (
    ConfigError,
    InputError,
    StreaminatorError,
    Terminated,
    WorkerDiedError,
)
from streaminator.terminal import say


def main() -> int:
    """Entry point of the `streaminator` command; returns the exit code."""
    return main_program("streaminator", _command)


def _command(argv: Sequence[str]) -> int:
    if argv and argv[0] in _COMMANDS:
        return _COMMANDS[argv[0]](argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(str(__doc__).partition("\nUsed by")[0])  # noqa: T201
        return 0
    got = f"got {argv[0]!r}" if argv else "no command given"
    raise ConfigError(f"{got}: the commands are {', '.join(_COMMANDS)} (streaminator --help)")


def _sample(argv: Sequence[str]) -> int:
    config, other = parse(argv, program="streaminator sample", without=["cluster"])
    # torch and transformers are imported late, so that --help and typos are answered at once.
    from streaminator.driver import dry_run, sample
    from streaminator.pool import LocalPool

    config = resolve(config)
    if other.dry_run:
        print(dry_run(config))  # noqa: T201
        return 0
    sample(config, LocalPool)
    return 0


def _replay(argv: Sequence[str]) -> int:
    from streaminator.cli_replay import main

    return main(argv)


_COMMANDS = {"sample": _sample, "replay": _replay}


def resolve(config: JobConfig) -> JobConfig:
    """The settings with "auto" replaced by this machine's device and type.

    Raises: DeviceError.
    """
    from streaminator.engine.device import resolve_device, resolve_dtype

    device = resolve_device(config.model.device)
    dtype = str(resolve_dtype(config.model.dtype, device)).removeprefix("torch.")
    return replace(config, model=replace(config.model, device=str(device), dtype=dtype))


def main_program(
    name: str, body: Callable[[Sequence[str]], int], *, advice: str = "; the same command resumes"
) -> int:
    """Run a command line: our own exceptions become one line and an exit code (see `errors`).

    `advice` follows the message where the program was stopped on its way.
    """
    # Progress bars and advice of libraries would drown our own lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        return body(sys.argv[1:])
    except InputError as error:
        say(f"{name}: {error}")
        return 2
    except WorkerDiedError as error:
        say(f"{name}: {error}{advice}")
        return 1
    except StreaminatorError as error:
        say(f"{name}: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"{name}: interrupted{advice}")
        return 130
    except Terminated:
        say(f"{name}: terminated{advice}")
        return 143
