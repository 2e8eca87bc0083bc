# SPDX-License-Identifier: Apache-2.0
"""The whole job on a Ray of two nodes: placed on both, a node killed, everything killed at random."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import duckdb
import pytest

from jobs.sample import main
from tests.outputs import check, rows
from tests.ray_nodes import ROOT, RayNodes, ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
# 10 s of work for two workers at 7,000 tokens per second each: a kill after the first part finds the run under way.
FLAGS = ["--num_samples", "48", "--num_completions", "48", "--max_length", "96"]
FLAGS += ["--stream_width", "4"]


def events(output: Path) -> list[tuple]:
    return duckdb.sql(f"SELECT kind, detail FROM '{output}/*/events/*.parquet'").fetchall()


def num_parts(output: Path) -> int:
    return len(list(output.glob("*/completions/*.parquet")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple]:
    output = tmp_path_factory.mktemp("undisturbed")
    assert main([*FLAGS, "--num_workers", "0", "--output", str(output)]) == 0
    return rows(output)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes() as nodes:
        yield nodes


class Job:
    """The job in a process of its own."""

    def __init__(self, nodes: RayNodes, output: Path) -> None:
        flags = ["--address", nodes.address, "--num_workers", "2", "--output", str(output)]
        self._log = output / "job.log"
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.sample", *FLAGS, *flags],
                cwd=ROOT, env=nodes.environment, stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def sleep(self, seconds: float) -> None:
        """Shorter when the job ends."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def finish(self) -> None:
        assert self._process.wait(timeout=400) == 0, self._log.read_text()

    def wait_for_part(self, output: Path, num: int = 1) -> None:
        """Until there are so many, or the job has ended."""
        while self.is_running and num_parts(output) < num:
            self.sleep(0.1)


def test_workers_on_both_nodes_draw_what_one_process_draws(nodes, tmp_path, undisturbed):
    with Job(nodes, tmp_path) as job:
        job.finish()
    check(tmp_path, undisturbed)
    drawn_on = {
        node.rpartition("/")[2] for _, _, node in rows(tmp_path, "prompt_id, sample_index, node")
    }
    assert drawn_on == {name[:8] for name in nodes.names}


def test_a_killed_node_loses_nothing_and_the_run_goes_on_without_it(nodes, tmp_path, undisturbed):
    with Job(nodes, tmp_path) as job:
        job.wait_for_part(tmp_path)
        nodes.kill_node()
        job.finish()
    nodes.add_node()
    check(tmp_path, undisturbed)
    assert [kind for kind, _ in events(tmp_path)] == ["worker died"]


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_chaos_of_workers_nodes_and_drivers_loses_doubles_and_changes_nothing(
    nodes, tmp_path, undisturbed, seed
):
    """CHAOS_ROUNDS=20 for more. Two or three kills a round: most after a new part, some in a start."""
    dice = random.Random(seed)
    job = Job(nodes, tmp_path)
    try:
        for _ in range(dice.choice((2, 3))):
            if dice.random() < 0.75:
                job.wait_for_part(tmp_path, num_parts(tmp_path) + 1)
            job.sleep(dice.uniform(0, 6))
            victim = dice.choice(("worker", "node", "driver"))
            was_running = job.is_running
            if victim == "worker":
                while job.is_running and not nodes.kill_worker(dice):
                    job.sleep(0.2)
            elif victim == "node":
                nodes.kill_node()
                job.sleep(dice.uniform(0, 10))
                nodes.add_node()
            elif job.is_running:
                job.kill()
                job = Job(nodes, tmp_path)
            there = (
                f"{num_parts(tmp_path)} parts there, the job {'' if was_running else 'not '}running"
            )
            sys.stderr.write(f"killed a {victim}: {there}\n")
        job.finish()
    finally:
        job.kill()
    check(tmp_path, undisturbed)


def ray_job(nodes: RayNodes, log: Path, *words: str) -> subprocess.Popen:
    """`ray job ...` as a person types it."""
    program = Path(sys.executable).parent / "ray"
    with log.open("w") as file:
        return subprocess.Popen(
            [program, "job", words[0], "--address", nodes.dashboard, *words[1:]],
            cwd=ROOT, env=nodes.environment, stdout=file, stderr=file,
        )  # fmt: skip


def submit(nodes: RayNodes, output: Path, *flags: str) -> subprocess.Popen:
    env = ["--runtime-env", "cluster/runtime_env.yaml", "--working-dir", "."]
    command = ["python", "-m", "jobs.sample", *FLAGS, "--num_workers", "2", "--output", str(output)]
    return ray_job(nodes, output / "submit.log", "submit", *flags, *env, "--", *command)


def test_a_submitted_job_that_is_stopped_ends_in_order_and_is_finished_by_the_next(
    nodes, tmp_path, undisturbed
):
    log = tmp_path / "submit.log"
    first = submit(nodes, tmp_path, "--submission-id", "first")
    while not num_parts(tmp_path):
        assert first.poll() is None, log.read_text()
        time.sleep(0.05)
    assert ray_job(nodes, tmp_path / "stop.log", "stop", "first").wait(timeout=100) == 0
    assert "was stopped" in (tmp_path / "stop.log").read_text()
    first.wait(timeout=100)
    assert "terminated; the same command resumes" in log.read_text()
    num_before = len(rows(tmp_path))
    assert 0 < num_before < len(undisturbed)
    assert submit(nodes, tmp_path).wait(timeout=400) == 0, log.read_text()
    assert f"{num_before:,} of them there already" in log.read_text()
    check(tmp_path, undisturbed)
