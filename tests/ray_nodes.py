# SPDX-License-Identifier: Apache-2.0
"""A Ray of two nodes on this machine, each a raylet with one core, kept by a process of its own.

The nodes listen on 127.0.0.1 and 127.0.0.2 and want a token, which their environment has.
"""

import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class RayNodes:
    """The keeper's end of this process."""

    def __init__(self, keeper: subprocess.Popen, environment: dict[str, str]) -> None:
        self._keeper = keeper
        self.environment = environment
        """What programs need that talk to this Ray."""
        started = self._read()
        self.address: str = started["address"]
        self.dashboard: str = started["dashboard"]
        self.names: list[str] = started["names"]
        """Ids of the nodes, the head first."""

    def kill_node(self) -> None:
        """SIGKILL the second node's raylet; its workers end when they notice."""
        self._tell("kill_node")

    def add_node(self) -> None:
        """A new second node in place of the killed one."""
        self.names[1:] = self._tell("add_node")

    def kill_worker(self, choose: Any) -> bool:
        """SIGKILL one of the workers' processes; False when there are none."""
        return bool(self._tell("kill_worker", choose.randrange(1000)))

    def _tell(self, command: str, *arguments: int) -> Any:
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._keeper.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline()
        assert line, "the keeper of the nodes has ended"
        return json.loads(line)


@contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """A Ray of two nodes for the `with` block; it ends with this process, however that ends."""
    # Short: the names of sockets in it may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray-")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment = os.environ | token
    # A submitted job says "python".
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "tests.ray_nodes", folder],
            env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as keeper:  # fmt: skip
            try:
                yield RayNodes(keeper, environment)
            finally:
                assert keeper.stdin is not None
                keeper.stdin.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(folder: str) -> None:
    """Be the keeper until nobody tells it anything any more."""
    # What is said here is for the other end only; Ray's own words go to stderr.
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    common: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
    head = cluster.add_node(
        **common,
        temp_dir=folder,
        node_ip_address="127.0.0.1",
        gcs_server_port=_free_port(),
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=_free_port(),
    )

    numbers = itertools.count()

    def add() -> Any:
        # Its own folder for submitted code: in a shared one a node replaces what the others run.
        folder = f"code-{next(numbers)}"
        return cluster.add_node(**common, node_ip_address="127.0.0.2", runtime_env_dir_name=folder)

    other = add()
    where = {"address": cluster.address, "dashboard": f"http://{cluster.webui_url}"}
    said.write(json.dumps({**where, "names": [head.node_id, other.node_id]}) + "\n")
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer: Any = None
        if command == "kill_node":
            process = _raylet(other)
            process.kill()
            process.wait()
        elif command == "add_node":
            cluster.remove_node(other, allow_graceful=False)
            other = add()
            answer = [other.node_id]
        elif command == "kill_worker":
            pids = [pid for node in (head, other) for pid in _workers_of(_raylet(node).pid)]
            if pids:
                with suppress(ProcessLookupError):
                    os.kill(pids[arguments[0] % len(pids)], signal.SIGKILL)
            answer = len(pids)
        said.write(json.dumps(answer) + "\n")
    cluster.shutdown()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _raylet(node: Any) -> subprocess.Popen:
    return node.all_processes["raylet"][0].process


def _workers_of(raylet: int) -> list[int]:
    """Processes of the raylet that are sampling workers, by the names that Ray gives them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            name = (folder / "cmdline").read_bytes()
            if parent == str(raylet) and name.startswith(b"ray::SamplerWorker"):
                found.append(int(folder.name))
    return sorted(found)


if __name__ == "__main__":
    _keep(sys.argv[1])
