# SPDX-License-Identifier: Apache-2.0
"""Products whose rows do not depend on how many rows there are. To be imported before the first.

MKL on Intel needs its strict mode for that, which it reads at its first call and which costs nothing
from about 8 rows on. On AMD that mode is not to be had (asking for it makes small products differ),
and without it products of 4 rows or more agree.

Used by: `model_runner`.
"""

import os
from contextlib import suppress
from pathlib import Path


def _is_intel() -> bool:
    with suppress(OSError):
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return True


if _is_intel():
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
