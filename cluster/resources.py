# SPDX-License-Identifier: Apache-2.0
"""How many workers a cluster carries, and what each of them gets.

Used by: `jobs.sample`.
"""

from dataclasses import dataclass

import ray

from streaminator.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Number of workers and the resources of each."""

    num_workers: int
    num_cpus: float
    num_gpus: float


def cluster_has_gpus() -> bool:
    """Whether the connected cluster has a GPU."""
    return ray.cluster_resources().get("GPU", 0) > 0


def plan_workers(num_workers: int | None, *, use_gpu: bool) -> Placement:
    """One worker per GPU, or on CPUs one that takes all cores of the largest node.

    Args:
        num_workers: number asked for, or None.
        use_gpu: whether workers run on GPUs.

    Raises: ConfigError when the cluster is too small, saying what it has.
    """
    resources = ray.cluster_resources()
    num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if use_gpu:
        wanted = num_workers or num_gpus
        if wanted > num_gpus or not num_gpus:
            raise ConfigError(
                f"--device cuda with {wanted or 'any'} workers: the cluster has {num_gpus} GPUs; "
                "ask for at most as many workers, or --device cpu"
            )
        return Placement(num_workers=wanted, num_cpus=1, num_gpus=1)
    wanted = num_workers or 1
    if wanted > num_cpus:
        raise ConfigError(
            f"--num_workers {wanted}: the cluster has {num_cpus} CPU cores; ask for fewer"
        )
    nodes = [int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]]
    # A worker's cores are on one node, and all workers must fit.
    cores = max(nodes)
    while cores > 1 and sum(node // cores for node in nodes) < wanted:
        cores -= 1
    return Placement(num_workers=wanted, num_cpus=cores, num_gpus=0)
