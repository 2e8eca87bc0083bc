# SPDX-License-Identifier: Apache-2.0
"""What programs tell whoever watches them. That nobody can read it any more does not end a run.

Used by: `streaminator.driver`, `cli`, `pool`, `progress`.
"""

import os
import sys
from typing import TextIO


def say(line: str) -> None:
    """A line of progress or a complaint, to stderr."""
    _write(line, sys.stderr)


def show(text: str) -> None:
    """What a program is asked for, to stdout."""
    error = _write(text, sys.stdout)
    if error is not None and not isinstance(error, BrokenPipeError):
        say(f"stdout: cannot be written ({error.strerror}); what was drawn is complete")


def _write(text: str, stream: TextIO) -> OSError | None:
    try:
        stream.write(text + "\n")
        stream.flush()
    except OSError as error:
        # Python would try again to write what is left when it ends, and say so.
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)
        return error
    return None
