# SPDX-License-Identifier: Apache-2.0
"""`--json_out FILE` of the entry points that end with lines of JSON.

Used by: `jobs.benchmark`, `jobs.simulate`.
"""

import os
from pathlib import Path

from streaminator.errors import ConfigError


def check_json_out(path: str | None) -> None:
    """Refuse, before minutes of work, a file that cannot be written. Raises: ConfigError."""
    if path is None:
        return
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"--json_out {path}: cannot be written; give a file in a folder that is there"
        )


def write_json_out(path: str | None, text: str) -> None:
    """Write the file, if one was asked for. Raises: ConfigError."""
    if path is None:
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json_out {path}: cannot be written: {error.strerror}") from error
