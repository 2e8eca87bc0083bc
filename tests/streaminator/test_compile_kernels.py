# SPDX-License-Identifier: Apache-2.0
"""What would be launched on a card compiles for it, also where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from streaminator.engine.paged_attention import has_triton

COMPILE = Path(__file__).with_name("compile_kernels.py")
KERNELS = {
    *("attend", "merge"),
    *("multiply", "add_norm", "rotate", "silu_mul"),
    *("scan", "gather", "draw", "settle"),
}


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_all_kernels_compile_for_cards_that_are_not_here(capability: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(COMPILE), capability],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in rows} == KERNELS
    # What the smallest of these cards give one program.
    assert max(int(shared) for _, _, shared in rows) <= 99 * 1024
