# SPDX-License-Identifier: Apache-2.0
"""A pool of Ray workers: weights from call to call, by reference too, and workers that die."""

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from actors.resident_worker import OpenCall, Weights
from actors.sampler_pool import SamplerPool
from cluster.connect import connect
from streaminator import sampler_pool
from streaminator.config import ClusterConfig
from streaminator.engine.weights import PackedWeights
from streaminator.errors import ConfigError, InputError, ModelError
from tests.streaminator.test_sampler_pool import CONFIG, TEXTS, demo_weights, num_accepted, said

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
SMALL = replace(CONFIG, cluster=ClusterConfig(cpus_per_worker=0.5))


@pytest.fixture(scope="module")
def cluster():
    with connect(None):
        yield


@pytest.fixture(scope="module")
def pool(cluster):
    with SamplerPool(SMALL, num_workers=2) as pool:
        yield pool


@pytest.fixture(scope="module")
def new_weights() -> dict[str, torch.Tensor]:
    return demo_weights(noise=0.05)


@pytest.fixture(scope="module")
def alone(new_weights) -> tuple[list, list]:
    """What one process says, with the old and with the new weights."""
    with sampler_pool.SamplerPool(CONFIG) as pool:
        old = said(pool.sample(TEXTS, seed=2))
        pool.update_weights(new_weights)
        return old, said(pool.sample(TEXTS, seed=2))


def test_two_workers_say_what_one_process_says_also_after_updates(pool, new_weights, alone):
    assert said(pool.sample(TEXTS, seed=2)) == alone[0]
    pool.update_weights(new_weights)
    assert said(pool.sample(TEXTS, seed=2)) == alone[1]
    pool.update_weights("demo")
    assert said(pool.sample(TEXTS, seed=2)) == alone[0]


def test_a_prompt_finds_the_worker_that_remembers_it(pool):
    # Prompts that no other test has drawn from. With the same noise, the same is said again.
    texts = [f"{text} Now:" for text in TEXTS]
    first, second = (num_accepted(pool.sample(texts, seed=11), 0) for _ in range(2))
    assert second > 1.2 * first


@ray.remote
def train() -> dict[str, torch.Tensor]:
    return demo_weights(noise=0.05)


def test_a_reference_is_passed_on_without_being_fetched(pool, alone, monkeypatch):
    reference, fetched, get = train.options(num_cpus=0).remote(), [], ray.get
    with monkeypatch.context() as patched:
        patched.setattr(
            ray, "get", lambda ref, **options: fetched.append(ref) or get(ref, **options)
        )
        pool.update_weights(reference)
    assert fetched
    assert reference not in fetched
    assert said(pool.sample(TEXTS, seed=2)) == alone[1]
    pool.update_weights("demo")


def test_refused_weights_leave_all_workers_with_the_old_ones(pool, new_weights, alone):
    spoilt = dict(new_weights)
    del spoilt["model.norm.weight"]
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' is missing") as error:
        pool.update_weights(spoilt)
    assert "\n" not in str(error.value)
    assert said(pool.sample(TEXTS, seed=2)) == alone[0]


def test_weights_that_one_worker_took_and_another_refused_are_used_by_none(
    pool, new_weights, alone
):
    taken = Weights(version=99, source=PackedWeights.of(new_weights))
    actor = pool._workers._workers[0]
    ray.get(actor.open.remote(OpenCall(weights=taken)), timeout=60)
    assert said(pool.sample(TEXTS, seed=2)) == alone[0]


def test_a_reference_to_what_failed_is_refused(pool, alone):
    @ray.remote(num_cpus=0, max_retries=0)
    def fail() -> None:
        raise RuntimeError("training diverged")

    with pytest.raises(ModelError, match="referenced weights cannot be had") as error:
        pool.update_weights(fail.remote())
    assert "\n" not in str(error.value)
    assert said(pool.sample(TEXTS, seed=2)) == alone[0]


def test_a_worker_killed_in_a_call_is_replaced_and_draws_with_the_newest_weights(
    cluster, new_weights, alone
):
    with SamplerPool(SMALL, num_workers=2) as pool:
        pool.update_weights(new_weights)
        workers = pool._workers
        submit, killed = workers.submit, []

        def submit_and_kill(worker, *arguments):
            submit(worker, *arguments)
            if not killed:
                killed.append(workers.pids[worker])
                os.kill(killed[0], signal.SIGKILL)

        workers.submit = submit_and_kill
        assert said(pool.sample(TEXTS, seed=2)) == alone[1]
        deadline = time.monotonic() + 120
        while len(workers.pids) < 2 and time.monotonic() < deadline:
            pool.sample(TEXTS[:1])
        assert killed[0] not in workers.pids.values()
        for worker in range(2):  # the other one dies between two calls
            assert said(pool.sample(TEXTS, seed=2)) == alone[1]
            os.kill(workers.pids[worker], signal.SIGKILL)
            assert said(pool.sample(TEXTS, seed=2)) == alone[1]


def test_without_workers_it_runs_in_this_process_and_takes_references(cluster, new_weights, alone):
    with SamplerPool(CONFIG, num_workers=0) as pool:
        pool.update_weights(ray.put(new_weights))
        assert said(pool.sample(TEXTS, seed=2)) == alone[1]


def test_a_gpu_share_without_a_gpu_is_refused(cluster):
    config = replace(CONFIG, cluster=ClusterConfig(gpus_per_worker=0.5))
    with pytest.raises(ConfigError, match="--gpus_per_worker"):
        SamplerPool(config, num_workers=1)


def test_the_readmes_example_runs(cluster, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert len(names["rewards"]) == 8
    with pytest.raises(InputError, match="the pool is closed"):
        names["pool"].sample(["a"])
