# SPDX-License-Identifier: Apache-2.0
"""The exceptions a user can meet. Each message names the culprit and what to do about it.

Every class takes its message first and nothing else, so that it survives pickling between
processes, and inherits the standard exception it stands for.

Exit codes of the command lines: 0 done; 1 the run could not go on (a bug, a dead worker, a full
disk); 2 bad input (`InputError`), nothing written; 130 interrupted and 143 terminated, both
resumable with the same command.
"""


class StreaminatorError(Exception):
    """Base of all exceptions raised on purpose by this project."""


class InputError(StreaminatorError, ValueError):
    """Something the user gave cannot be used; the command line exits with code 2."""


class ConfigError(InputError):
    """A flag, a TOML key or their combination is wrong."""


class DataError(InputError):
    """A dataset, a file or a row is missing or malformed."""


class ModelError(InputError):
    """A model or tokenizer cannot be loaded, or is not one this engine can run."""


class DeviceError(InputError):
    """The device asked for is not there."""


class RunMismatchError(InputError):
    """A run id is taken by a run whose recorded configuration would give other tokens."""


class RunBusyError(InputError):
    """Another process is writing the run."""


class OutputError(StreaminatorError, OSError):
    """Results cannot be written or read back."""


class Terminated(BaseException):
    """SIGTERM arrived. Not an `Exception`, as KeyboardInterrupt is none."""


class WorkerDiedError(StreaminatorError, RuntimeError):
    """A worker process ended before its work did."""


def kind_and_line(error: BaseException) -> str:
    """Its type and what it says, on one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
