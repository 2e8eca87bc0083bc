# SPDX-License-Identifier: Apache-2.0
"""`run.json`: what a run was started with. Written first, compared when the run is resumed.

Invariants
- A run's rows were all drawn with the same token-affecting settings and the same weights; the
  settings that shape a row (grader, metadata columns) do not change within a run either. Any
  other setting may differ from attempt to attempt.
- The default run id is made from just these settings, so that the same command resumes.
- Ray and torch are never imported here: versions come from package metadata.

Used by: the driver, before anything else; `streaminator.summary` (stream width per attempt).
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, get_origin

import pyarrow as pa
from pyarrow import fs as pafs

from streaminator import __version__
from streaminator.config import JobConfig, token_settings
from streaminator.data.files import (
    join_uri,
    list_parts,
    open_output,
    reason,
    resolve,
    write_whole,
)
from streaminator.errors import ConfigError, OutputError, RunMismatchError
from streaminator.progress import Opened

_PACKAGES = ("torch", "transformers", "ray", "datasets", "pyarrow", "duckdb")
_ROW_SETTINGS = {"metadata_columns", "grader"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The content of `run.json`."""

    run_id: str
    started_at: str
    """ISO 8601, UTC."""
    fingerprints: dict[str, str]
    """Hashes of what the settings only name: the model's files, its vocabulary, the prompts."""
    settings: dict[str, Any]
    """Every setting of the first attempt."""
    command: list[str]
    versions: dict[str, str]
    source: dict[str, Any]
    """`revision` and `is_dirty` of the git checkout; empty if it is not one."""
    hardware: dict[str, Any]
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Per attempt, the first included: number, time, command, settings that may differ, and what its
    workers are like (stream width, memory, layers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that is open for writing."""

    run_id: str
    uri: str
    """The run's folder as other processes can use it: an absolute path or a URI."""
    filesystem: pafs.FileSystem
    path: str
    """The run's folder on `filesystem`."""
    attempt: int
    """From 1."""
    record: RunRecord


def default_run_id(config: JobConfig) -> str:
    """Model, dataset and a hash of the settings that do not change within a run."""
    fixed = {name: value for name, value in config.flat().items() if name in _fixed_settings()}
    digest = hashlib.blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{_slug(config.model.model_name)}-{_slug(config.data.dataset)}-{digest}"


def resolve_run_id(config: JobConfig) -> str:
    """The run id asked for, or the default one."""
    return config.run.run_id or default_run_id(config)


def open_run(
    output: str,
    run_id: str,
    config: JobConfig,
    *,
    fingerprints: dict[str, str],
    gpus: Sequence[str] = (),
) -> Run:
    """Start a run, or resume one that was recorded with the same settings and weights.

    Raises: ConfigError when `output` cannot be written; RunMismatchError when the run id is taken
    by a run that would give other tokens or by one without a record; OutputError when the record
    cannot be read or written.
    """
    filesystem, base = open_output(output)
    uri, path = join_uri(output if "://" in output else base, run_id), f"{base}/{run_id}"
    attempt: dict[str, Any] = {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "settings": {k: v for k, v in config.flat().items() if k not in _fixed_settings()},
    }
    record = check_run(output, run_id, config, fingerprints=fingerprints)
    if record is None:
        record = RunRecord(
            run_id=run_id,
            started_at=attempt["started_at"],
            fingerprints=fingerprints,
            settings=config.flat(),
            command=attempt["command"],
            versions=_versions(),
            source=_source(),
            hardware=_hardware(gpus),
        )
    number = len(record.attempts) + 1
    record = replace(record, attempts=[*record.attempts, {"attempt": number, **attempt}])
    _write(filesystem, path, record)
    return Run(
        run_id=run_id, uri=uri, filesystem=filesystem, path=path, attempt=number, record=record
    )


def record_workers(run: Run, opened: Mapping[int, Opened]) -> None:
    """Write down what the workers of this attempt are like. Raises: OutputError."""
    *before, attempt = run.record.attempts
    workers = {f"worker-{index}": asdict(opened[index]) for index in sorted(opened)}
    record = replace(run.record, attempts=[*before, attempt | {"workers": workers}])
    _write(run.filesystem, run.path, record)


def _write(filesystem: pafs.FileSystem, path: str, record: RunRecord) -> None:
    try:
        filesystem.create_dir(path, recursive=True)
        text = json.dumps(asdict(record), indent=2) + "\n"
        write_whole(filesystem, f"{path}/run.json", text.encode())
    except OSError as error:
        raise OutputError(
            f"{path}/run.json: cannot be written: {reason(error)}; mend that, and give the same command"
        ) from error


def check_run(
    output: str, run_id: str, config: JobConfig, *, fingerprints: dict[str, str]
) -> RunRecord | None:
    """The record of the run to resume, None for a new one. Writes no part of a run.

    Raises: as `open_run`.
    """
    filesystem, base = open_output(output)
    path = f"{base}/{run_id}"
    record = read_record(filesystem, path)
    if record is not None:
        _check_same(record, config, fingerprints)
    elif list_parts(filesystem, f"{path}/completions"):
        raise RunMismatchError(
            f"{path}: has results but no run.json, so their settings are unknown; choose "
            "another --run_id"
        )
    return record


def read_record(filesystem: pafs.FileSystem, path: str) -> RunRecord | None:
    """The record of the run in folder `path`; None if there is none.

    Raises: OutputError when it cannot be read.
    """
    try:
        with filesystem.open_input_file(f"{path}/run.json") as file:
            content = json.loads(file.read())
        for setting in fields(RunRecord):
            kind: Any = get_origin(setting.type) or setting.type
            if not isinstance(content[setting.name], kind):
                raise ValueError(f"{setting.name} is a {type(content[setting.name]).__name__}")
        return RunRecord(**{f.name: content[f.name] for f in fields(RunRecord)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise OutputError(
            f"{path}/run.json: cannot be read ({reason(error)}); repair it, or choose another "
            "--run_id"
        ) from error


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary: where it is the same, token ids mean the same."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=8).hexdigest()


def find_earlier_run(config: JobConfig, run_id: str, tokenizer: str) -> str | None:
    """The folder or URI of the run that `--warm_start` names; None without one.

    Args:
        config: the settings.
        run_id: the run to be drawn.
        tokenizer: fingerprint of its tokenizer.

    Raises: ConfigError when there is no such run, or its token ids mean other tokens; OutputError.
    """
    name, output = config.speculator.warm_start, config.run.output
    if name is None:
        return None
    is_run_id = "/" not in name and not Path(name).is_dir()
    filesystem, path = resolve(join_uri(output, name) if is_run_id else name)
    uri = name if "://" in name else join_uri(output, name) if "://" in output else path
    record = read_record(filesystem, path)
    if record is None or not list_parts(filesystem, f"{path}/completions"):
        raise ConfigError(
            f"--warm_start {name}: no run with completions in {path}; give a run's folder or URI, "
            "or the id of a run in --output"
        )
    if resolve(join_uri(output, run_id))[1] == path:
        raise ConfigError(
            f"--warm_start {name}: is the run to be drawn, which learns from its own rows anyway; "
            "leave it out, or choose another --run_id"
        )
    if record.fingerprints.get("tokenizer") != tokenizer:
        raise ConfigError(
            f"--warm_start {name}: made with another vocabulary than this tokenizer's, or by a "
            "version that did not record it; choose another run"
        )
    return uri


def _fixed_settings() -> set[str]:
    return token_settings() | _ROW_SETTINGS


def _check_same(record: RunRecord, config: JobConfig, fingerprints: dict[str, str]) -> None:
    defaults = JobConfig().flat()
    # Runs of earlier versions lack some.
    known = fingerprints.keys() & record.fingerprints.keys()
    now: dict[str, Any] = {f"fingerprint of the {k}": fingerprints[k] for k in sorted(known)}
    recorded: dict[str, Any] = {f"fingerprint of the {k}": record.fingerprints[k] for k in known}
    for name, value in config.flat().items():
        if name in _fixed_settings():
            recorded[name] = record.settings.get(name, defaults[name])
            now[name] = value
    differences = [
        f"{name}: recorded {recorded[name]}, now {now[name]}"
        for name in now
        if recorded[name] != now[name]
    ]
    if differences:
        raise RunMismatchError(
            f"run {record.run_id} was made otherwise: {'; '.join(differences)}; choose another "
            "--run_id, or the recorded settings"
        )


def _slug(name: str) -> str:
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    last = re.sub(r"\.(jsonl|json|csv|parquet)$", "", last)
    return re.sub(r"[^a-z0-9.]+", "-", last).strip("-.")[:40] or "run"


def _versions() -> dict[str, str]:
    versions = {"streaminator": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _source() -> dict[str, Any]:
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return {}
    try:
        return {
            "revision": _git(checkout, "rev-parse", "HEAD"),
            "is_dirty": bool(_git(checkout, "status", "--porcelain")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()


def _hardware(gpus: Sequence[str]) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "num_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": list(gpus),
    }


def cpu_model() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
