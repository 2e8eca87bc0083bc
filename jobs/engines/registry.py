# SPDX-License-Identifier: Apache-2.0
"""The engines by name: which program, in which environment.

Another one is named by its file, `--engines plain,my_engine.py`, a program that speaks
`jobs.engines.protocol`; it runs with this Python.

Used by: `jobs.benchmark*`.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streaminator.errors import ConfigError

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers"
OPENVINO = ROOT / ".venv-openvino"
SIBLINGS = "-siblings"
"""Behind a name of this engine's: with completions of one prompt in flight together."""
OWN = ("plain", "speculative", "ngram", "memory", "plain-siblings", "memory-siblings")
DEFAULT = ("plain", "speculative", "transformers")
# name: module of the program, its environment if it is another one
_PROGRAMS: dict[str, tuple[str, Path | None]] = {
    **dict.fromkeys(OWN, ("own", None)),
    **dict.fromkeys(("transformers", "transformers-batch"), ("transformers_peer", None)),
    **dict.fromkeys(("vllm", "vllm-ngram", "vllm-suffix"), ("vllm_peer", PEERS)),
    **dict.fromkeys(("openvino", "openvino-lookup"), ("openvino_peer", OPENVINO)),
}
NAMES = tuple(_PROGRAMS)
_TCMALLOC = ("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",)


@dataclass(frozen=True, slots=True)
class Program:
    """How an engine is started."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    """Variables beside the benchmark's own."""

    @property
    def is_own(self) -> bool:
        """Whether it is this project's engine."""
        return self.name in OWN


def find_programs(names: Sequence[str]) -> tuple[list[Program], dict[str, str]]:
    """The engines that can be started, and for those that cannot the reason.

    Raises: ConfigError for a name that is none.
    """
    programs, missing = [], {}
    for name in names:
        if name.endswith(".py"):
            if not Path(name).is_file():
                raise ConfigError(f"--engines {name}: no such file")
            path = str(ROOT)
            programs.append(Program(name, (sys.executable, name), {"PYTHONPATH": path}))
            continue
        if name not in _PROGRAMS:
            known = ", ".join(NAMES)
            raise ConfigError(f"--engines {name}: must be of {known}, or a program's .py file")
        module, home = _PROGRAMS[name]
        python = str(home / "bin" / "python") if home else sys.executable
        if home and not os.access(python, os.X_OK):
            missing[name] = f"no environment {home.name}; build it with `make bench-peers`"
            continue
        environment = _preloads() if home == PEERS else {}
        programs.append(Program(name, (python, "-m", f"jobs.engines.{module}"), environment))
    return programs, missing


def _preloads() -> dict[str, str]:
    """What vLLM's guide asks for on CPUs: Intel's OpenMP, and tcmalloc where it is installed."""
    paths = [str(PEERS / "lib" / "libiomp5.so"), *_TCMALLOC]
    found = [path for path in paths if Path(path).is_file()]
    return {"LD_PRELOAD": ":".join(found)} if found else {}
