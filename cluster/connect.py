# SPDX-License-Identifier: Apache-2.0
"""Connect to a Ray cluster, or start one on this machine.

Used by: `jobs.sample`.
"""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from streaminator.errors import ConfigError, first_line


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """A connection for the `with` block: to `address`, or to a Ray of its own on this machine.

    Raises: ConfigError when no Ray answers at the address, or one of other versions.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray would take the first cluster it finds on this machine for an empty address.
    if address == "":
        raise ConfigError(
            "--address is empty: give HOST:PORT, or leave it out for a Ray of its own"
        )
    try:
        if address is None:
            # Without "local" Ray would join any cluster it finds traces of on this machine, dead or alive.
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        ray.shutdown()  # a refused driver has half connected
        where = f"--address {address or 'a local Ray'}"
        versions = re.findall(r"(?:Ray|Python): (\S+)", str(error))
        if "Version mismatch" in str(error) and len(versions) == 4:
            raise ConfigError(
                f"{where}: the cluster runs Ray {versions[0]} and Python {versions[1]}, this process "
                f"Ray {versions[2]} and Python {versions[3]}; use the same, or submit the job"
            ) from error
        raise ConfigError(
            f"{where}: no Ray answers there ({first_line(error)}); check the address, and "
            "RAY_AUTH_TOKEN_PATH if the cluster has a token"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See who is there first: Ray itself would try for minutes. Raises: OSError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        try:
            answer = connection.recv(6)
        except OSError:
            return  # no answer to a browser
    if answer == b"HTTP/1":
        raise OSError("a web server, the dashboard? The head's own port is 6379 by default")
