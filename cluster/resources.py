# SPDX-License-Identifier: Apache-2.0
"""How many workers a cluster carries, and what each of them gets.

Used by: `jobs.sample`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import ray

from streaminator.config import ClusterConfig
from streaminator.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Number of workers and the resources of each."""

    num_workers: int
    num_cpus: float
    num_gpus: float
    resources: dict[str, float] = field(default_factory=dict)

    @property
    def demand(self) -> dict[str, float]:
        """What one worker needs of one node, by Ray's names."""
        demand = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: amount for name, amount in demand.items() if amount}


def cluster_has_gpus() -> bool:
    """Whether the connected cluster has a GPU."""
    return ray.cluster_resources().get("GPU", 0) > 0


def plan_workers(config: ClusterConfig, *, use_gpu: bool, can_grow: bool = False) -> Placement:
    """One worker per GPU (or share of one), or on CPUs one that takes all cores of a node.

    Args:
        config: what was asked for.
        use_gpu: whether workers run on GPUs.
        can_grow: more workers may be asked for than there is room for now; they join later.

    Raises: ConfigError when the cluster is too small, saying what it has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    resources = config.resources
    num_gpus = _gpus_per_worker(config.gpus_per_worker, use_gpu=use_gpu)
    num_cpus = config.cpus_per_worker
    if num_cpus is None:
        num_cpus = 1.0 if use_gpu else _fair_cores(nodes, resources, config.num_workers or 1)
    placement = Placement(
        num_workers=config.num_workers or 1,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        resources=resources,
    )
    num_places = sum(_num_fitting(node, placement.demand) for node in nodes)
    if not num_places or (num_places < placement.num_workers and not can_grow):
        asked = f"{config.num_workers or 'any'} workers with {_listed(placement.demand)} each"
        raise ConfigError(
            f"--num_workers: {asked}: the cluster has room for {num_places} "
            f"({_listed(ray.cluster_resources())}); ask for fewer or smaller workers"
        )
    # Without a number: one per place on GPUs, and on CPUs one, which has all cores of a node.
    wanted = config.num_workers or (num_places if use_gpu or config.cpus_per_worker else 1)
    return Placement(num_workers=wanted, num_cpus=num_cpus, num_gpus=num_gpus, resources=resources)


def describe_waiting(placement: Placement) -> str:
    """What a worker needs, and what the cluster has and has free."""
    return (
        f"each needs {_listed(placement.demand)}; the cluster has "
        f"{_listed(ray.cluster_resources())}, free: {_listed(ray.available_resources())}"
    )


def _gpus_per_worker(given: float | None, *, use_gpu: bool) -> float:
    if not use_gpu:
        if given:
            raise ConfigError(f"--gpus_per_worker {given:g}: the device is cpu; take it out")
        return 0.0
    if given is not None and given > 1:
        raise ConfigError(
            f"--gpus_per_worker {given:g}: a worker uses one GPU, there is no tensor parallelism; "
            "give at most 1, and a model that fits one GPU"
        )
    return 1.0 if given is None else given


def _num_fitting(node: Mapping[str, float], demand: Mapping[str, float]) -> int:
    # A fraction of a GPU is never put together from two.
    return min(
        int(node.get("GPU", 0)) * int(1 / amount + 1e-6)
        if name == "GPU"
        else int(node.get(name, 0) / amount + 1e-6)
        for name, amount in demand.items()
    )


def _fair_cores(nodes: list[Mapping[str, float]], resources: dict[str, float], wanted: int) -> int:
    """The most whole cores with which all workers fit."""
    cores = max(int(node.get("CPU", 0)) for node in nodes)
    while cores > 1 and (
        sum(_num_fitting(node, {"CPU": cores, **resources}) for node in nodes) < wanted
    ):
        cores -= 1
    return max(1, cores)


def _listed(resources: Mapping[str, float]) -> str:
    words = {"CPU": "CPU cores", "GPU": "GPUs"}
    shown = {"CPU": 0.0, **resources} | {"GPU": resources.get("GPU", 0.0)}
    return ", ".join(
        f"{amount:g} {words.get(name, name)}"
        for name, amount in shown.items()
        if name in words or not (":" in name or "memory" in name)
    )
