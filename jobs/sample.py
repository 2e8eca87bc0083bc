# SPDX-License-Identifier: Apache-2.0
"""The main job: many completions per prompt, sampled on Ray workers, graded, in Parquet.

    python -m jobs.sample --model_name meta-llama/Llama-3.2-3B-Instruct --dataset openai/gsm8k

Without flags it samples the bundled model on the bundled problems. `--num_workers 0` runs in this
process, without Ray. The same command resumes an interrupted run.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from streaminator.cli import main_program, resolve
from streaminator.cli_args import parse
from streaminator.config import JobConfig


def main(argv: Sequence[str]) -> int:
    """Run the job; returns the exit code."""
    config, other = parse(argv, program="python -m jobs.sample")
    from streaminator.driver import dry_run, sample
    from streaminator.pool import LocalPool

    if other.dry_run:
        print(dry_run(resolve(config)))
        return 0
    if config.cluster.num_workers == 0:
        sample(resolve(config), LocalPool)
        return 0
    # Ray is imported only where it is used.
    from actors.pool import RayPool
    from cluster.connect import connect
    from cluster.resources import cluster_has_gpus, describe_waiting, plan_workers

    with connect(config.cluster.ray_address):
        config = _resolve_on_cluster(config, has_gpus=cluster_has_gpus())
        placement = plan_workers(
            config.cluster,
            use_gpu=config.model.device.startswith("cuda"),
            can_grow=config.cluster.ray_address is not None,
        )
        sample(
            config,
            lambda resolved: RayPool(
                resolved,
                num_workers=placement.num_workers,
                num_cpus=placement.num_cpus,
                num_gpus=placement.num_gpus,
                resources=placement.resources,
                describe=lambda: describe_waiting(placement),
            ),
        )
    return 0


def _resolve_on_cluster(config: JobConfig, *, has_gpus: bool) -> JobConfig:
    """The settings with "auto" replaced by the workers' device, not by the driver's."""
    if config.model.device == "auto":
        device = "cuda" if has_gpus else "cpu"
        config = replace(config, model=replace(config.model, device=device))
    if config.model.device.startswith("cuda"):
        dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
        return replace(config, model=replace(config.model, dtype=dtype))
    return resolve(config)


if __name__ == "__main__":
    sys.exit(main_program("python -m jobs.sample", main))
