# SPDX-License-Identifier: Apache-2.0
"""Ray workers that are killed, frozen, cannot load or do not fit, with the real model."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from actors.pool import RayPool
from actors.worker import SamplerWorker
from cluster.connect import connect
from cluster.resources import describe_waiting, plan_workers
from streaminator import driver
from streaminator.config import (
    ClusterConfig,
    DataConfig,
    EngineConfig,
    JobConfig,
    ModelConfig,
    RunConfig,
    SamplingParams,
)
from streaminator.errors import ConfigError, ModelError
from streaminator.pool import LocalPool, WorkerReported
from streaminator.summary import Summary
from tests.outputs import check, rows

pytestmark = pytest.mark.ray

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
CONFIG = JobConfig(
    model=ModelConfig(device="cpu", dtype="float32"),
    sampling=SamplingParams(max_length=32),
    data=DataConfig(num_samples=24, num_completions=4),
    engine=EngineConfig(stream_width=4),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect(None):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple]:
    output = tmp_path_factory.mktemp("undisturbed")
    driver.sample(at(output), LocalPool)
    return rows(output)


def at(output: Path, **cluster: float) -> JobConfig:
    return replace(CONFIG, run=RunConfig(output=str(output)), cluster=ClusterConfig(**cluster))


class DisturbedPool(RayPool):
    """Lets `disturb(pool)` act after each report; the `frozen` worker wakes up when it is killed."""

    disturb = staticmethod(lambda pool: None)
    frozen = None
    """(actor, process id)"""

    def kill(self, worker):
        is_frozen = self.frozen is not None and self._workers[worker] == self.frozen[0]
        if is_frozen:
            self._workers[worker] = None  # as on a machine that cannot be reached
        super().kill(worker)
        if is_frozen:
            os.kill(self.frozen[1], signal.SIGCONT)

    def next_event(self, timeout):
        event = super().next_event(timeout)
        if isinstance(event, WorkerReported):
            self.disturb(self)
        return event


def draw(config: JobConfig, disturb, num_workers: int = 2) -> Summary:
    def make_pool(config: JobConfig) -> RayPool:
        pool = DisturbedPool(config, num_workers=num_workers, num_cpus=0.5, num_gpus=0)
        pool.disturb = disturb
        return pool

    return driver.sample(config, make_pool)


def once(action):
    """Do it at the first event only."""
    done = []

    def disturb(pool):
        if not done:
            done.append(True)
            action(pool)

    return disturb


def test_a_model_that_cannot_be_loaded_is_the_users_error_not_rays(cluster, tmp_path):
    config = replace(CONFIG, model=replace(CONFIG.model, model_name=str(tmp_path)))
    with pytest.raises(ModelError, match=str(tmp_path)):
        RayPool(config, num_workers=1, num_cpus=1, num_gpus=0)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(cluster, tmp_path, undisturbed):
    kill = once(lambda pool: os.kill(pool.pids[0], signal.SIGKILL))
    summary = draw(at(tmp_path), kill)
    check(tmp_path, undisturbed)
    assert summary.events == {"worker died": 1}
    assert (1,) in rows(tmp_path, "num_retries")


@pytest.mark.cluster
def test_a_frozen_worker_that_wakes_up_again_adds_nothing(cluster, tmp_path, undisturbed):
    """It wakes up when its prompts are given to others, ends its slice and writes its part."""
    pools = []

    def freeze(pool):
        pools.append(pool)
        pool.frozen = pool._workers[0], pool.pids[0]
        os.kill(pool.pids[0], signal.SIGSTOP)

    summary = draw(at(tmp_path, worker_timeout=5), once(freeze))
    ray.kill(pools[0].frozen[0])
    check(tmp_path, undisturbed)
    assert summary.events["worker hung"] >= 1


@pytest.mark.cluster
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_chaos_loses_nothing_doubles_nothing_and_changes_nothing(
    cluster, tmp_path, undisturbed, seed
):
    """CHAOS_ROUNDS=20 for more. Two or three random kills a round."""
    dice = random.Random(seed)
    moments = sorted(dice.uniform(0.0, 5.0) for _ in range(dice.choice((2, 3))))
    since: list[float] = []

    def disturb(pool):
        since.append(time.monotonic())
        if moments and pool.pids and since[-1] - since[0] > moments[0]:
            # The one killed before may be gone already, and the pool not know it yet.
            with suppress(ProcessLookupError):
                os.kill(dice.choice(sorted(pool.pids.values())), signal.SIGKILL)
                moments.pop(0)

    draw(at(tmp_path), disturb)
    check(tmp_path, undisturbed)


@pytest.mark.cluster
def test_the_end_waits_for_no_worker_that_still_opens_the_run(cluster, tmp_path, undisturbed):
    class SlowToOpen(SamplerWorker):
        def open(self, run):
            if self._worker == 1:
                time.sleep(15)
                (tmp_path / "opened").touch()
            return super().open(run)

    def make_pool(config: JobConfig) -> RayPool:
        return RayPool(config, num_workers=2, num_cpus=0.5, num_gpus=0, worker_class=SlowToOpen)

    config = at(tmp_path)
    driver.sample(replace(config, data=replace(config.data, num_samples=2)), make_pool)
    assert not (tmp_path / "opened").exists()


@pytest.mark.cluster
def test_workers_that_find_no_room_are_not_waited_for(cluster, tmp_path, undisturbed):
    def make_pool(config: JobConfig) -> RayPool:
        cores = ray.cluster_resources()["CPU"]
        return RayPool(config, num_workers=3, num_cpus=cores, num_gpus=0)

    driver.sample(at(tmp_path), make_pool)
    check(tmp_path, undisturbed)


def test_a_cluster_that_is_too_small_says_what_it_has(cluster):
    with pytest.raises(ConfigError, match=r"10000 workers .* CPU cores"):
        plan_workers(ClusterConfig(num_workers=10_000), use_gpu=False)
    with pytest.raises(ConfigError, match=r"2 workers .*1 GPUs.* room for 0 .*0 GPUs"):
        plan_workers(ClusterConfig(num_workers=2), use_gpu=True, can_grow=True)
    with pytest.raises(ConfigError, match="1 tpu_slice"):
        plan_workers(ClusterConfig(worker_resources=("tpu_slice=1",)), use_gpu=False)
    grown = plan_workers(ClusterConfig(num_workers=99), use_gpu=False, can_grow=True)
    assert grown.num_workers == 99


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"worker_resources": ("tpu",)}, "NAME=AMOUNT"),
        ({"worker_resources": ("tpu=none",)}, "NAME=AMOUNT"),
        ({"gpus_per_worker": 2.0}, "no tensor parallelism"),
    ],
)
def test_resources_that_make_no_sense_are_named(cluster, flags, words):
    with pytest.raises(ConfigError, match=words):
        plan_workers(ClusterConfig(**flags), use_gpu="gpus_per_worker" in flags)


def test_workers_on_cpus_share_the_cores(cluster):
    one = plan_workers(ClusterConfig(), use_gpu=False)
    two = plan_workers(ClusterConfig(num_workers=2), use_gpu=False)
    assert one.num_workers == 1
    assert two.num_cpus * 2 <= ray.cluster_resources()["CPU"]
    assert one.num_cpus >= two.num_cpus
    four = plan_workers(ClusterConfig(cpus_per_worker=0.5), use_gpu=False)
    assert four.num_workers == 2 * int(ray.cluster_resources()["CPU"])


def test_who_waits_says_what_for(cluster):
    text = describe_waiting(plan_workers(ClusterConfig(), use_gpu=False))
    assert "CPU cores" in text
    assert "free" in text
