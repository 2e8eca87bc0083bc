# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels of `csrc/` by the C compiler of the machine (`CC`, else cc, gcc or clang).

That takes some seconds, is for this machine's own processor, and is kept in the user's cache folder.

Used by: `kernels`.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

_SOURCES = sorted((Path(__file__).parent / "csrc").iterdir())
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-w")
_TIMEOUT = 120.0


class KernelsMissingError(Exception):
    """There are no kernels, for the reason given."""


def compile_library(defines: Mapping[str, int]) -> Path:
    """The path of the library, compiled with -DNAME=VALUE for each of `defines`, if it is not there yet.

    Who compiles it at the same time as another makes the same file. Raises: KernelsMissingError.
    """
    compiler = _compiler()
    flags = [*_FLAGS, *(f"-D{name}={value}" for name, value in defines.items())]
    told = [
        *(source.read_bytes() for source in _SOURCES),
        " ".join([*compiler, *flags]).encode(),
        _processor(),
    ]
    name = f"kernels-{hashlib.blake2b(b'|'.join(told), digest_size=12).hexdigest()}.so"
    sources = [source for source in _SOURCES if source.suffix == ".c"]
    folder = _folder()
    if (folder / name).is_file():
        return folder / name
    with tempfile.TemporaryDirectory(dir=folder) as room:
        objects = [str(Path(room) / f"{source.stem}.o") for source in sources]
        new = Path(room) / name
        compiles = [
            [*compiler, *flags, "-c", str(source), "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, compiles))
        _run([*compiler, *flags, "-shared", *objects, "-o", str(new), "-lm"])
        return new.replace(folder / name)


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        reason = said.split("\n", 1)[0] or str(error)
        raise KernelsMissingError(f"{command[0]} does not compile them ({reason})") from error


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    for command in ([named] if named else []) + [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise KernelsMissingError("there is no C compiler; install gcc, or name one in CC")


def _folder() -> Path:
    """Where libraries are kept: the user's own, since what lies there is run."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "streaminator"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    return _own_folder()


@cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="streaminator-"))


def _processor() -> bytes:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n", 1)[0].splitlines()
        kept = (b"vendor_id", b"cpu family", b"model", b"flags", b"Features")
        return b"\n".join(line for line in lines if line.startswith(kept))
    except OSError:
        return platform.processor().encode()
