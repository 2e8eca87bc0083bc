# SPDX-License-Identifier: Apache-2.0
"""The cluster files: valid by Ray's schema and KubeRay's fields, and explained by their README."""

import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from streaminator.cli_args import parse

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text()
# Kubernetes' own words, and names that say what they are.
KUBERNETES = {"apiVersion", "kind", "metadata", "spec", "template", "containers", "name"}
SELF_NAMED = {
    "cluster_name", "provider", "type", "auth", "docker", "node_config", "head", "gpu", "env_vars",
    "resources", "CPU", "GPU", "cpu", "memory", "headGroupSpec", "workerGroupSpecs", "groupName",
    "rayClusterSpec", "rayStartParams",
}  # fmt: skip


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def test_ray_itself_accepts_the_ray_up_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load("ray_up.yaml"))
    validate_config(config)
    assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 8
    assert config["head_node_type"] in config["available_node_types"]


def check_cluster_spec(spec: dict) -> None:
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        assert container["image"]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in spec["workerGroupSpecs"]:
        assert group["groupName"]
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_kuberay_files_have_what_the_operator_requires():
    cluster, job = load("raycluster.yaml"), load("rayjob.yaml")
    for manifest, kind in ((cluster, "RayCluster"), (job, "RayJob")):
        assert manifest["apiVersion"] == "ray.io/v1"
        assert manifest["kind"] == kind
        assert manifest["metadata"]["name"]
    check_cluster_spec(cluster["spec"])
    check_cluster_spec(job["spec"]["rayClusterSpec"])
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["working_dir"]


def test_image_and_manifests_name_the_ray_of_the_constraints():
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    assert f"rayproject/ray:{pinned[1]}-py311" in (CLUSTER / "Dockerfile").read_text()
    assert load("raycluster.yaml")["spec"]["rayVersion"] == pinned[1]


def commands() -> list[str]:
    text = README + (ROOT / "README.md").read_text()
    found = re.findall(r"^    .*python -m jobs\.sample(.*)$", text, re.M)
    return [*found, load("rayjob.yaml")["spec"]["entrypoint"].partition("jobs.sample")[2]]


@pytest.mark.parametrize("flags", commands())
def test_every_command_of_the_files_parses(flags):
    words = [word for word in shlex.split(flags) if word != "..."]
    parse(words, program="python -m jobs.sample")


def test_every_flag_named_in_the_readme_exists(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], program="python -m jobs.sample")
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z]+_[a-z_]+", README)) <= known


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*(keys(item) for item in value.values()))
    return set().union(*(keys(item) for item in value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("file", sorted(CLUSTER.glob("*.yaml")), ids=lambda file: file.name)
def test_the_readme_explains_every_key(file):
    unexplained = keys(yaml.safe_load(file.read_text())) - KUBERNETES - SELF_NAMED
    assert {key for key in unexplained if key not in README} == set()
    assert f"cluster/{file.name}" in README


def test_the_upload_has_the_code_and_neither_results_nor_environment(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    names = ["results/r/run.json", ".venv/bin/python", ".git/config", "wandb/x", "tests/t.py"]
    kept = {"jobs/sample.py", "streaminator/data/files.py"}
    for name in [*names, "data/mine.jsonl", *kept]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    uploaded = tmp_path.parent / "upload.zip"
    create_package(
        str(tmp_path), uploaded, include_gitignore=True, include_parent_dir=False, excludes=[]
    )
    with zipfile.ZipFile(uploaded) as upload:
        files = {name for name in upload.namelist() if not name.endswith("/")}
    assert files - {".rayignore"} == kept
