# SPDX-License-Identifier: Apache-2.0
"""Connect to a Ray cluster, or start one on this machine.

Used by: `jobs.sample`.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from streaminator.errors import ConfigError, first_line


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """A connection for the `with` block: to `address`, to the cluster this job was submitted to,
    or to a Ray of its own on this machine.

    Raises: ConfigError when the address does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    is_submitted = "RAY_ADDRESS" in os.environ
    where = address or os.environ.get("RAY_ADDRESS", "a local Ray")
    try:
        if address is not None:
            _knock(address)
        if address is None and not is_submitted:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        why = first_line(error)
        raise ConfigError(f"--address {where}: no Ray answers there ({why})") from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ask for a TCP connection first: Ray itself would try for minutes. Raises: OSError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()
