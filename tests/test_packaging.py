# SPDX-License-Identifier: Apache-2.0
"""The wheel is the library; the checkout is the application."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_library_and_the_demo_and_nothing_else(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"streaminator"}
    for needed in ("demo/model.safetensors", "demo/tokenizer.json", "demo/problems.jsonl"):
        assert f"streaminator/{needed}" in names
    assert wheel.stat().st_size < 10e6


def test_importing_the_library_loads_neither_torch_nor_ray():
    code = (
        "import sys, streaminator, streaminator.cli, streaminator.cli_args\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_engine_needs_neither_ray_nor_datasets_nor_wandb():
    code = (
        "import sys\n"
        "for name in ('ray', 'datasets', 'wandb'):\n"
        "    sys.modules[name] = None\n"
        "import streaminator.driver, streaminator.pool"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
