# SPDX-License-Identifier: Apache-2.0
"""Clusters that are not there, are of other versions, or have no GPU: one line before a model is loaded."""

import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
HEAD = """
import sys, ray
ray.init("local", num_cpus=1, object_store_memory=80 << 20, include_dashboard=False, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
JOB = """
import sys, ray, actors.pool, jobs.sample as job
from streaminator.cli import main_program
actors.pool.RayPool = None  # no worker may be started
ray.__version__ = sys.argv.pop(1) or ray.__version__
sys.exit(main_program("job", job.main))
"""
OWN = {
    "a job": "from cluster.connect import connect\nwith connect(None): ...",
    "a pool": """
from actors.sampler_pool import SamplerPool
from streaminator.config import JobConfig, ModelConfig
with SamplerPool(JobConfig(model=ModelConfig(device="cpu"))): ...
""",
}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}


@pytest.mark.parametrize("program", OWN.values(), ids=OWN)
def test_the_traces_of_a_dead_cluster_are_not_followed(program):
    # Short: the names of sockets in it may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        traces = Path(folder) / "ray" / "ray_current_cluster"
        traces.parent.mkdir()
        traces.write_text("127.0.0.1:1")
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"RAY_TMPDIR": folder}, cwd=ROOT, timeout=300, capture_output=True, text=True,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a Ray of another process, with a token of its own; it ends with this process."""
    # Short: the names of sockets in it may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray-")
    command = [sys.executable, "-c", HEAD, folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | TOKEN, **pipes) as process:
        address = process.stdout.readline().strip()
        assert address.startswith("127.0.0.1:"), f"no Ray came up on loopback: {address}"
        yield address
        process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)


class Page(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Refused(NamedTuple):
    """A job that nobody can run, and what it says; {head} and {page} stand for addresses."""

    words: str
    flags: tuple[str, ...] = ()
    version: str = ""
    variables: dict[str, str] = {}  # noqa: RUF012 - nobody changes it


PYTHON = ".".join(map(str, sys.version_info[:3]))
NOBODY = "--address 127.0.0.1:1: no Ray answers there"
REFUSED = {
    "another token": Refused(
        "RAY_AUTH_TOKEN_PATH",
        ("--address", "{head}"),
        variables={"RAY_AUTH_TOKEN": TOKEN["RAY_AUTH_TOKEN"][::-1]},
    ),
    "nobody": Refused(NOBODY, ("--address", "127.0.0.1:1")),
    "nobody, by a variable": Refused(NOBODY, variables={"RAY_ADDRESS": "127.0.0.1:1"}),
    "nothing": Refused("--address is empty", ("--address", "")),
    "a web page": Refused("a web server, the dashboard?", ("--address", "{page}")),
    # The check is Ray's own, of what the head recorded.
    "another Ray": Refused(
        f"and Python {PYTHON}, this process Ray 2.1.0 and Python {PYTHON}",
        ("--address", "{head}"),
        version="2.1.0",
    ),
    "no GPUs": Refused(
        "room for 0 (1 CPU cores, 0 GPUs)",
        ("--address", "{head}", "--device", "cuda", "--num_workers", "2"),
    ),
}


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """The address of a web server."""
    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def runs(
    head: str, page: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[subprocess.CompletedProcess[str]]"]]:
    """All of them, three at a time: they wait more than they work."""
    output = str(tmp_path_factory.mktemp("output"))

    def run(job: Refused) -> "subprocess.CompletedProcess[str]":
        flags = [flag.format(head=head, page=page) for flag in job.flags]
        return subprocess.run(
            [sys.executable, "-c", JOB, job.version, "--output", output, *flags],
            env=os.environ | TOKEN | job.variables, cwd=ROOT, timeout=300, capture_output=True, text=True,
        )  # fmt: skip

    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(run, job) for name, job in REFUSED.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cluster_that_is_of_no_use_is_refused_in_one_line(
    name: str, runs: dict[str, "Future[subprocess.CompletedProcess[str]]"]
) -> None:
    result = runs[name].result()
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    ours = [line for line in result.stderr.splitlines() if line.startswith("job: ")]
    assert len(ours) == 1
    assert REFUSED[name].words in ours[0], ours[0]
    assert "Traceback" not in result.stderr
