# SPDX-License-Identifier: Apache-2.0
"""Products whose rows do not depend on how many rows there are. To be imported before the first.

MKL on Intel needs its strict mode for that, which it reads at its first call and which costs nothing
from about 8 rows on. On AMD that mode is not to be had (asking for it makes small products differ),
and without it products of 4 rows or more agree. oneDNN with AMX builds up a row's sums otherwise for
other numbers of rows, so it is kept to AVX-512; `csrc/product_tiles.c` uses AMX. A mixture's experts get whatever
rows there are: there each row is a product of its own.

Used by: `model_runner`; `jobs.engines`, which spares others what is set here.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def _cpu_info() -> str | None:
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return None


_CPU = _cpu_info()
IS_INTEL = _CPU is None or "GenuineIntel" in _CPU
_WANTED = {"MKL_CBWR": "AUTO,STRICT"} if IS_INTEL else {}
if _CPU is not None and "amx_tile" in _CPU:
    _WANTED["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_FP16"
ADDED = {name: value for name, value in _WANTED.items() if name not in os.environ}
"""What is set here, for this process and those that it starts."""
os.environ.update(ADDED)


def separate_expert_rows(model: Any) -> None:
    """Let no row of a mixture of experts share a product with others, where that shows."""
    can_set = getattr(model, "_can_set_experts_implementation", None)
    if not IS_INTEL and can_set is not None and can_set():
        model.set_experts_implementation("batched_mm")
