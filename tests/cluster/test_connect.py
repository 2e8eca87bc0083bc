# SPDX-License-Identifier: Apache-2.0
"""Clusters that are not there, are of other versions, or have no GPU: one line before a model is loaded."""

import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture
def refuse(tmp_path) -> Callable[..., None]:
    def refused(words: str, *flags: str, version: str = "", **variables: str) -> None:
        command = [sys.executable, "-c", JOB, version, "--output", str(tmp_path), *flags]
        environment = os.environ | TOKEN | variables
        result = subprocess.run(
            command, env=environment, cwd=ROOT, timeout=300, capture_output=True, text=True
        )
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        ours = [line for line in result.stderr.splitlines() if line.startswith("job: ")]
        assert len(ours) == 1
        assert words in ours[0], ours[0]
        assert "Traceback" not in result.stderr

    return refused


def test_an_address_where_nobody_is_is_refused(refuse):
    refuse("--address 127.0.0.1:1: no Ray answers there", "--address", "127.0.0.1:1")
    refuse("--address 127.0.0.1:1: no Ray answers there", RAY_ADDRESS="127.0.0.1:1")
    refuse("--address is empty", "--address", "")


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


class Page(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_the_address_of_a_web_page_is_refused_at_once(refuse):
    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    server.timeout = 60
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    refuse("a web server, the dashboard?", "--address", f"127.0.0.1:{server.server_port}")
    thread.join()
    server.server_close()


def test_a_cluster_of_another_ray_or_python_is_refused_with_both(head, refuse):
    """The check is Ray's own, of what the head recorded."""
    python = ".".join(map(str, sys.version_info[:3]))
    words = f"and Python {python}, this process Ray 2.1.0 and Python {python}"
    refuse(words, "--address", head, version="2.1.0")


def test_a_cluster_without_the_gpus_says_what_it_has(head, refuse):
    flags = ["--address", head, "--device", "cuda", "--num_workers", "2"]
    refuse("room for 0 (1 CPU cores, 0 GPUs)", *flags)


def test_a_cluster_that_wants_another_token_is_refused_and_says_how_to_give_it(head, refuse):
    other = TOKEN["RAY_AUTH_TOKEN"][::-1]
    refuse("RAY_AUTH_TOKEN_PATH", "--address", head, RAY_AUTH_TOKEN=other)
