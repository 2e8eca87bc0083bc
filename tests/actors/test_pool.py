# SPDX-License-Identifier: Apache-2.0
"""Ray workers: what a worker cannot do reaches the driver as one of our own exceptions."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
import ray

from actors.pool import RayPool
from cluster.connect import connect
from cluster.resources import plan_workers
from streaminator.config import JobConfig, ModelConfig, SamplingParams
from streaminator.data.prompts import load_prompts
from streaminator.engine.checkpoint import load_tokenizer
from streaminator.errors import ConfigError, ModelError, WorkerDiedError
from streaminator.pool import OpenRun

pytestmark = pytest.mark.ray

CONFIG = JobConfig(
    model=ModelConfig(device="cpu", dtype="float32"), sampling=SamplingParams(max_length=200)
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect(None):
        yield


def test_a_model_that_cannot_be_loaded_is_the_users_error_not_rays(cluster, tmp_path):
    config = replace(CONFIG, model=replace(CONFIG.model, model_name=str(tmp_path)))
    with pytest.raises(ModelError, match=str(tmp_path)):
        RayPool(config, num_workers=1, num_cpus=1, num_gpus=0)


def test_a_killed_worker_is_reported_and_its_rows_are_there(cluster, tmp_path: Path):
    pool = RayPool(CONFIG, num_workers=1, num_cpus=1, num_gpus=0)
    try:
        pool.open(OpenRun(uri=str(tmp_path), attempt=1, max_prompt_length=100))
        prompts = list(load_prompts(CONFIG.data, load_tokenizer(CONFIG.model)))
        pool.submit(0, prompts[:4], 0)
        while not pool.next_result()[1].report.num_finished:
            pool.submit(0, [], 0)
        pool.close()
        num_rows = duckdb.sql(f"SELECT count(*) FROM '{tmp_path}/completions/*.parquet'").fetchall()
        assert num_rows[0][0] > 0
        pool.submit(0, prompts[4:20], 0)
        ray.kill(pool._workers[0])
        with pytest.raises(WorkerDiedError, match="worker 0 died"):
            pool.next_result()
    finally:
        pool.shut_down()


def test_a_cluster_that_is_too_small_says_what_it_has(cluster):
    with pytest.raises(ConfigError, match="CPU cores"):
        plan_workers(10_000, use_gpu=False)
    with pytest.raises(ConfigError, match="0 GPUs"):
        plan_workers(2, use_gpu=True)


def test_workers_on_cpus_share_the_cores(cluster):
    one, two = plan_workers(None, use_gpu=False), plan_workers(2, use_gpu=False)
    assert one.num_workers == 1
    assert two.num_cpus * 2 <= ray.cluster_resources()["CPU"]
    assert one.num_cpus >= two.num_cpus
