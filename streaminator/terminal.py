# SPDX-License-Identifier: Apache-2.0
"""What programs tell whoever watches them. That nobody can read it any more does not end a run.

Used by: `streaminator.driver`, `cli`, `pool`, `progress`.
"""

import os
import sys
from contextlib import suppress
from typing import TextIO


def say(line: str) -> None:
    """A line of progress or a complaint, to stderr."""
    _write(line, sys.stderr)


def show(text: str) -> None:
    """What a program is asked for, to stdout."""
    error = _write(text, sys.stdout)
    if error is not None and not isinstance(error, BrokenPipeError):
        say(f"stdout: cannot be written ({error.strerror}); what was drawn is complete")


def silence(stream: TextIO) -> None:
    """Let what is written to it go nowhere: nobody is there, and Python would try again at its end."""
    sink = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):  # a stream of no file
        os.dup2(sink, stream.fileno())
    os.close(sink)


def _write(text: str, stream: TextIO | None) -> OSError | None:
    if stream is None:  # a program without a console
        return None
    try:
        stream.write(text + "\n")
        stream.flush()
    except BlockingIOError as error:  # full for the moment
        return error
    except OSError as error:
        silence(stream)
        return error
    return None
